//! Open files and directories, by the number that the kernel gives back with each request.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A table of what is open.
pub(super) struct Handles<T> {
    open: Mutex<Open<T>>,
}

struct Open<T> {
    by_number: HashMap<u64, Arc<T>>,
    last: u64,
}

impl<T> Default for Handles<T> {
    fn default() -> Self {
        Handles {
            open: Mutex::new(Open {
                by_number: HashMap::new(),
                last: 0,
            }),
        }
    }
}

impl<T> Handles<T> {
    fn lock(&self) -> MutexGuard<'_, Open<T>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn add(&self, value: T) -> u64 {
        let mut open = self.lock();
        open.last += 1;
        let number = open.last;
        open.by_number.insert(number, Arc::new(value));
        number
    }

    pub(super) fn get(&self, number: u64) -> Option<Arc<T>> {
        self.lock().by_number.get(&number).cloned()
    }

    pub(super) fn remove(&self, number: u64) -> Option<Arc<T>> {
        self.lock().by_number.remove(&number)
    }

    pub(super) fn all(&self) -> Vec<Arc<T>> {
        self.lock().by_number.values().cloned().collect()
    }
}
