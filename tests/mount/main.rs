//! Real mounts, real programs.

mod support;

mod basics;
mod commands;
mod metadata;
mod reading;
mod writing;
