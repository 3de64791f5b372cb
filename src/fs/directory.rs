//! An open directory: the list that a program reads from it in pieces.

use std::sync::{Arc, Mutex, PoisonError};

use super::known::Known;
use crate::backend::PipeInfo;
use crate::error::Result;
use crate::name::PipeName;

/// The pipes, in the order of their names.
pub(super) type List = Arc<Vec<(PipeName, PipeInfo)>>;

/// What is read of a list stays as it was when its beginning was read.
#[derive(Default)]
pub(super) struct Directory {
    list: Mutex<List>,
}

impl Directory {
    /// The list, to be read from entry `offset` on. From the beginning it is that of now, also when it is read once more
    /// (rewinddir(3)).
    ///
    /// # Errors
    /// As for [`Known::list`].
    pub(super) async fn list(&self, known: &Arc<Known>, offset: u64) -> Result<List> {
        let now = match offset {
            0 => Some(Arc::new(known.list().await?)),
            _ => None,
        };
        let mut list = self.list.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(now) = now {
            *list = now;
        }
        Ok(Arc::clone(&list))
    }
}
