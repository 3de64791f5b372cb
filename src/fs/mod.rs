//! The mount: FUSE requests to pipes. Only this module knows fuser and errnos.

mod adapter;
mod device;
mod directory;
mod errno;
mod files;
mod handles;
mod interrupt;
mod known;
mod place;
mod pump;
mod queue;
mod remount;
pub mod session;
mod table;
mod tree;
