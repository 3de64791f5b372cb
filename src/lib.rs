//! Distributed named pipes as files.
//!
//! `dnpipes mount` gives a directory in which every file is a pipe: an ordered queue of messages that every
//! participant can read in full until somebody resets it. Writing pushes, reading pulls and removes
//! nothing, truncating to 0 resets. The README says what each system call does.
//!
//! The house, from the ground up; each floor uses those below it only:
//!
//! - [`error`], [`name`], [`selector`], [`message`]: the vocabulary; [`metrics`]: what is counted.
//! - [`backend`]: where messages live. The docs of [`backend::Backend`] are the contract.
//! - [`pipe`]: bytes to messages and back; the writing and the reading side of an open file.
//! - [`fs`]: FUSE requests. Only this floor knows fuser and errnos.
//! - [`gateway`]: HTTP requests. It and [`fs`] do not see each other.
//! - [`run`], [`cli`]: the commands.

#![warn(missing_docs)]

pub mod backend;
pub mod cli;
pub mod error;
pub mod fs;
pub mod gateway;
pub mod message;
pub mod metrics;
pub mod name;
pub mod pipe;
pub mod run;
pub mod selector;
