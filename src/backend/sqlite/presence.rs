//! Whether the store's files are still those that were opened: what is written to one that was deleted is gone when the
//! last process closes it, and a bell of one's own reaches nobody.

use std::fs::Metadata;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use crate::error::{Error, Kind, Result};

/// How often a push looks, in milliseconds.
const OFTEN: u64 = 100;

/// A file, as it was when it was opened: its device and inode.
#[derive(Clone)]
pub(super) struct Identity {
    path: PathBuf,
    identity: (u64, u64),
}

impl Identity {
    /// The file at `path`, of which this is told.
    pub(super) fn of(path: &Path, told: &Metadata) -> Self {
        Identity {
            path: path.to_owned(),
            identity: (told.dev(), told.ino()),
        }
    }

    /// What has become of it: nothing, as far as one may know.
    pub(super) fn lost(&self) -> Option<&'static str> {
        match std::fs::metadata(&self.path) {
            Ok(told) => ((told.dev(), told.ino()) != self.identity).then_some("replaced"),
            Err(error) => (error.kind() == io::ErrorKind::NotFound).then_some("deleted"),
        }
    }
}

/// The store's files.
pub(super) struct Presence {
    files: [Identity; 2],
    opened: Instant,
    /// When a push has to look next, in milliseconds since then.
    looks_next: AtomicU64,
}

impl Presence {
    /// # Errors
    /// Of stat(2).
    pub(super) fn of(database: &Path, bell: Identity) -> Result<Self> {
        let told = std::fs::metadata(database)
            .map_err(|error| Error::io(format!("the store {}", database.display()), error))?;
        Ok(Presence {
            files: [Identity::of(database, &told), bell],
            opened: Instant::now(),
            looks_next: AtomicU64::new(0),
        })
    }

    /// Refuses to change what is not there for others.
    ///
    /// # Errors
    /// `Io` where a file was deleted or replaced.
    pub(super) fn check(&self) -> Result<()> {
        for file in &self.files {
            if let Some(how) = file.lost() {
                let path = file.path.display();
                let why = format!("the store's {path} was {how} while it was open; mount it anew");
                return Err(Error::new(Kind::Io, why));
            }
        }
        Ok(())
    }

    /// The same for what is done very often.
    ///
    /// # Errors
    /// As for [`Presence::check`], a tenth of a second later.
    pub(super) fn check_now_and_then(&self) -> Result<()> {
        let now = self.opened.elapsed().as_millis() as u64;
        if now < self.looks_next.load(Ordering::Relaxed) {
            return Ok(());
        }
        self.check()?;
        self.looks_next.store(now + OFTEN, Ordering::Relaxed);
        Ok(())
    }
}
