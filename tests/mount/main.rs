//! Real mounts, real programs.

#[path = "../support/gateway.rs"]
mod gateway;
mod load;
mod network;
#[path = "../support/services.rs"]
mod services;
mod support;

mod basics;
mod brokers;
mod commands;
mod crash;
mod metadata;
mod reading;
mod redis;
mod redis_bulk;
mod redis_copies;
mod redis_news;
mod redis_odd;
mod redis_rights;
mod refusals;
mod remote;
mod sharing;
mod signals;
mod writing;
