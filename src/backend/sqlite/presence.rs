//! Whether the store's files are still those that were opened: what is written to one that was deleted is gone when the
//! last process closes it, and a bell of one's own reaches nobody.

use std::fs::Metadata;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use crate::error::{Error, Kind, Result};

/// How often pushes look, in milliseconds.
const OFTEN: u64 = 100;

/// Which file stood at a path: its device and inode.
pub(super) struct FileId {
    path: PathBuf,
    id: (u64, u64),
}

impl FileId {
    /// The file at `path`, of which this is told.
    pub(super) fn of(path: &Path, told: &Metadata) -> Self {
        FileId {
            path: path.to_owned(),
            id: (told.dev(), told.ino()),
        }
    }

    /// Whether it stands there still, as far as one may know.
    ///
    /// # Errors
    /// `Io` where it was deleted or replaced.
    pub(super) fn check(&self) -> Result<()> {
        let how = match std::fs::metadata(&self.path) {
            Ok(told) if (told.dev(), told.ino()) != self.id => "replaced",
            Err(error) if error.kind() == io::ErrorKind::NotFound => "deleted",
            _ => return Ok(()),
        };
        let path = self.path.display();
        let why = format!("the store's {path} was {how} while it was open; mount it anew");
        Err(Error::new(Kind::Io, why))
    }
}

/// When to look again.
pub(super) struct Looks {
    opened: Instant,
    /// In milliseconds since then.
    next: AtomicU64,
}

impl Looks {
    pub(super) fn new() -> Self {
        Looks {
            opened: Instant::now(),
            next: AtomicU64::new(0),
        }
    }

    /// Looks, if it is time to.
    ///
    /// # Errors
    /// Those of `look`; then it is looked again the next time.
    pub(super) fn now_and_then(&self, look: impl FnOnce() -> Result<()>) -> Result<()> {
        let now = self.opened.elapsed().as_millis() as u64;
        if now >= self.next.load(Ordering::Relaxed) {
            look()?;
            self.next.store(now + OFTEN, Ordering::Relaxed);
        }
        Ok(())
    }
}
