//! The mount: FUSE requests to pipes. Only this module knows fuser and errnos.

mod adapter;
mod errno;
mod files;
mod handles;
mod interrupt;
mod known;
pub mod session;

mod tree;
