//! Real mounts, real programs.

mod support;

mod basics;
