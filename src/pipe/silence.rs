//! A store that says nothing, and how long those wait for it who do not want to wait.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// How long who does not want to wait for a message waits until it is known whether there is one. Also elsewhere a store
/// that is slow or down is waited for so long (SEMANTICS: metadata).
const LOOK: Duration = Duration::from_secs(1);

/// The same where others have just waited so long: who asks many files one by one need not wait for each.
const BRIEF: Duration = Duration::from_millis(50);

/// When somebody has last waited in vain for the store of a mount's pipes.
#[derive(Default)]
pub struct Silence(Mutex<Option<Instant>>);

/// How long somebody waits.
pub(super) struct Patience {
    pub(super) until: Instant,
    /// Whether it is long enough to tell whether the store answers.
    pub(super) is_full: bool,
}

impl Silence {
    /// Notes that somebody has waited in vain for as long as it takes to tell.
    pub(super) fn begin(&self) {
        *self.last() = Some(Instant::now());
    }

    fn last(&self) -> MutexGuard<'_, Option<Instant>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How long who asks now waits at most.
    pub(super) fn patience(&self) -> Patience {
        let now = Instant::now();
        let is_recent = |last| now.saturating_duration_since(last) < LOOK;
        let is_full = !self.last().is_some_and(is_recent);
        Patience {
            until: now + if is_full { LOOK } else { BRIEF },
            is_full,
        }
    }

    /// Notes that the store has answered.
    pub(super) fn end(&self) {
        *self.last() = None;
    }
}
