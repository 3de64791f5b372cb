//! Writes that wait for one another in the kernel.
//!
//! Of the writes to one file the kernel lets one through at a time where they append, or are longer than the file that it
//! knows. Whoever waits for that cannot be killed, and does not reach the daemon: so a store that is away would let each
//! of them wait for all those before it, and for its own time only then. Two things are done about it:
//!
//! - A write that comes as soon as one before it was given up has waited since that one did, or since its file was opened
//!   or last written to, if that is later. That counts.
//! - Whoever opens a file to write, while a write is stuck, waits for the store there, where a signal ends it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::error::{Error, Kind, Result};
use crate::name::PipeName;

/// A write that comes so soon after one that was given up has waited for it.
const AT_ONCE: Duration = Duration::from_millis(50);

/// What is left to a write that has waited for long.
const LEAST: Duration = Duration::from_millis(200);

/// A write that takes longer may be stuck.
const SLOW: Duration = Duration::from_millis(200);

/// So many pipes are remembered before those are forgotten that nobody writes to.
const MANY: usize = 256;

/// The writes of a mount.
pub(super) struct Queues {
    timeout: Option<Duration>,
    queues: Mutex<HashMap<PipeName, Arc<Queue>>>,
}

/// The writes to one pipe.
pub(super) struct Queue(Mutex<State>);

struct State {
    under_way: usize,
    /// When the store answered one last, or the first of those that are under way came.
    answered: Instant,
    /// The last one, if the store did not answer it: when it was given up, and since when it had waited.
    given_up: Option<(Instant, Instant)>,
}

/// An open file's place among the writes.
pub(super) struct Place {
    pipe: PipeName,
    queue: Arc<Queue>,
    timeout: Option<Duration>,
    /// When its last write ended, or it was begun to open it.
    idle: Mutex<Instant>,
}

/// A write, until it is dropped.
struct Turn<'a> {
    place: &'a Place,
    /// Since when it has waited, and whether that was for another one.
    since: Instant,
    is_queued: bool,
    is_answered: bool,
}

impl Queues {
    /// Of writes that take `timeout` at most.
    pub(super) fn new(timeout: Option<Duration>) -> Self {
        Queues {
            timeout,
            queues: Mutex::default(),
        }
    }

    /// A place for a file that is being opened.
    pub(super) fn place(&self, pipe: &PipeName) -> Place {
        let mut queues = self.queues.lock().unwrap_or_else(PoisonError::into_inner);
        if queues.len() >= MANY && !queues.contains_key(pipe) {
            queues.retain(|_, queue| Arc::strong_count(queue) > 1);
        }
        let queue = queues.entry(pipe.clone()).or_default();
        Place {
            pipe: pipe.clone(),
            queue: Arc::clone(queue),
            timeout: self.timeout,
            idle: Mutex::new(Instant::now()),
        }
    }
}

impl Default for Queue {
    fn default() -> Self {
        Queue(Mutex::new(State {
            under_way: 0,
            answered: Instant::now(),
            given_up: None,
        }))
    }
}

impl Queue {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let now = Instant::now();
        *self.place.idle() = now;
        let mut state = self.place.queue.state();
        state.under_way -= 1;
        if self.is_answered {
            state.answered = now;
            state.given_up = None;
        } else {
            state.given_up = Some((now, self.since));
        }
    }
}

impl Place {
    /// Whether the store may be away, by the writes that there are or were.
    pub(super) fn is_stuck(&self) -> bool {
        let state = self.queue.state();
        let is_slow = state.under_way > 0 && state.answered.elapsed() > SLOW;
        is_slow || state.given_up.is_some()
    }

    /// Notes that the store has answered.
    pub(super) fn answered(&self) {
        let mut state = self.queue.state();
        state.answered = Instant::now();
        state.given_up = None;
    }

    /// Does `write`, for as long as is left of its time.
    ///
    /// # Errors
    /// Those of `write`; `TimedOut` where nothing is left.
    pub(super) async fn write<T>(&self, write: impl Future<Output = Result<T>>) -> Result<T> {
        let mut turn = self.begin();
        let result = match self.timeout {
            Some(timeout) if turn.is_queued && timeout > LEAST => {
                let left = timeout.saturating_sub(turn.since.elapsed()).max(LEAST);
                let kept = tokio::time::timeout(left, write).await;
                kept.unwrap_or_else(|_| {
                    let pipe = &self.pipe;
                    let why =
                        format!("pushing to {pipe}: no answer within {timeout:?}, behind others");
                    Err(Error::new(Kind::TimedOut, why).maybe_applied())
                })
            }
            _ => write.await,
        };
        turn.is_answered = !matches!(&result, Err(error) if error.kind() == Kind::TimedOut);
        result
    }

    fn begin(&self) -> Turn<'_> {
        let now = Instant::now();
        let idle = *self.idle();
        let mut state = self.queue.state();
        if state.under_way == 0 {
            state.answered = now;
        }
        state.under_way += 1;
        let behind = state
            .given_up
            .filter(|(at, _)| now.duration_since(*at) < AT_ONCE);
        let since = behind.map_or(now, |(_, since)| idle.max(since));
        Turn {
            place: self,
            since,
            is_queued: behind.is_some(),
            is_answered: false,
        }
    }

    fn idle(&self) -> MutexGuard<'_, Instant> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
