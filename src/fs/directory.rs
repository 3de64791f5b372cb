//! An open directory: the list that a program reads from it in pieces.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::known::Known;
use crate::backend::PipeInfo;
use crate::error::Result;
use crate::name::PipeName;

/// The pipes, in the order of their names.
pub(super) type List = Arc<Vec<(PipeName, PipeInfo)>>;

pub(super) struct Directory {
    list: Mutex<List>,
    /// Whether its beginning was read.
    begun: AtomicBool,
}

impl Directory {
    /// Lists the pipes there are now: here, as the kernel lets nobody make or remove a file while it is read.
    ///
    /// # Errors
    /// As for [`Known::list`].
    pub(super) async fn open(known: &Arc<Known>) -> Result<Self> {
        Ok(Directory {
            list: Mutex::new(Arc::new(known.list().await?)),
            begun: AtomicBool::new(false),
        })
    }

    /// The list, to be read from entry `offset` on. From the beginning once more (rewinddir(3)) it is that of now.
    ///
    /// # Errors
    /// As for [`Known::list`].
    pub(super) async fn list(&self, known: &Arc<Known>, offset: u64) -> Result<List> {
        let is_again = offset == 0 && self.begun.swap(true, Ordering::Relaxed);
        let now = match is_again {
            true => Some(Arc::new(known.list().await?)),
            false => None,
        };
        let mut list = self.list.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(now) = now {
            *list = now;
        }
        Ok(Arc::clone(&list))
    }
}
