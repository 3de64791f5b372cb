//! Pipes as byte streams: framing, the writing side and the reading side of an open file. Knows nothing of
//! FUSE; the command line uses it too.

pub mod framing;
pub mod reader;
pub mod silence;
pub mod subscription;
pub mod writer;
