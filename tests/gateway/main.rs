//! Real gateways, real clients of HTTP.

#[path = "../support/gateway.rs"]
mod gateway;

mod access;
mod badinput;
mod curl;
mod impostor;
mod load;
mod openapi;
mod raw;
mod twice;
