//! Real mounts, real programs.

#[path = "../support/gateway.rs"]
mod gateway;
mod support;

mod basics;
mod commands;
mod crash;
mod metadata;
mod reading;
mod refusals;
mod remote;
mod sharing;
mod signals;
mod writing;
