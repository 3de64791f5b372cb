//! Names that no other process gives.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::{Error, Kind, Result};

/// Numbers atomic batches: a try that was given up must not mix with the next one.
pub(super) struct BatchIds {
    process: u64,
    next: AtomicU64,
}

impl BatchIds {
    /// Unlike any other process's.
    ///
    /// # Errors
    /// `Io` if the system has no randomness to give.
    pub(super) fn random() -> Result<Self> {
        let process = getrandom::u64().map_err(|error| {
            Error::new(Kind::Io, "drawing a random number").caused_by(error.to_string())
        })?;
        Ok(BatchIds {
            process,
            next: AtomicU64::new(1),
        })
    }

    pub(super) fn next(&self) -> String {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        format!("{:016x}{number:x}", self.process)
    }
}
