//! Real gateways, real clients of HTTP.

#[path = "../support/gateway.rs"]
mod gateway;

mod access;
mod away;
mod badinput;
mod between;
mod curl;
mod cut;
mod impostor;
mod load;
mod openapi;
mod raw;
mod twice;
