//! Real mounts, real programs.

mod support;

mod basics;
mod crash;
mod refusals;
mod sharing;
mod signals;
