//! Real mounts, real programs.

mod support;

mod basics;
mod commands;
mod crash;
mod metadata;
mod reading;
mod refusals;
mod sharing;
mod signals;
mod writing;
