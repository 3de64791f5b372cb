//! Writes that wait for one another in the kernel.
//!
//! Of the writes to one file the kernel lets one through at a time where they append, or their file was opened with
//! O_TRUNC. Whoever waits for that cannot be killed, and does not reach the daemon: with a store that is away each would
//! wait for all those before it, and for its own time only then. Two things are done about it:
//!
//! - Of those who open a file to write, while a write is stuck or the store says nothing, one at a time is let in, to find
//!   out. The others wait in open(2), where a signal ends it.
//! - A write that comes as soon as one before it has timed out has waited since that one did, or since its file was opened
//!   or last written to, if that is later. So much of its time has passed; an eighth of it is left at least, as who had
//!   the file open for long may have come just now.

use std::collections::HashMap;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use crate::backend::retry::Deadline;
use crate::error::{Error, Kind, Result};
use crate::name::PipeName;

/// A write that comes so soon after one that timed out has waited for it.
const AT_ONCE: Duration = Duration::from_millis(250);

/// The part of its time that is left to a write that has waited for others.
const LEAST: u32 = 8;

/// A write that takes longer may be stuck. Whoever is let in has so much time to begin one.
const SLOW: Duration = Duration::from_millis(200);

/// So often it is looked again by itself whether a write is stuck.
const LOOK: Duration = Duration::from_secs(1);

/// So many pipes are remembered before those are forgotten that nobody writes to.
const MANY: usize = 256;

/// The writes of a mount.
pub(super) struct Queues {
    timeout: Option<Duration>,
    table: Mutex<Table>,
}

struct Table {
    queues: HashMap<PipeName, Arc<Queue>>,
    /// How many there may be before it is looked which are not needed.
    room: usize,
}

/// The writes to one pipe.
struct Queue {
    state: Mutex<State>,
    changed: Notify,
}

struct State {
    under_way: usize,
    /// When the store answered one last, or the first of those that are under way came.
    answered: Instant,
    /// When somebody was let in who has not written yet.
    let_in: Option<Instant>,
    /// The last one, if it timed out: when it did, and since when it had waited.
    timed_out: Option<(Instant, Instant)>,
}

/// A file's place among the writes.
pub(super) struct Place {
    pipe: PipeName,
    queue: Arc<Queue>,
    timeout: Option<Duration>,
    /// Whether its writes wait for others in the kernel.
    is_queued: bool,
    /// When its last write ended, or it was begun to open it.
    idle: Mutex<Instant>,
}

/// How a write ended.
enum End {
    Answered,
    TimedOut,
    /// A signal came, or nothing was to be stored yet.
    Unasked,
}

/// A write, until it is dropped.
struct Turn<'a> {
    place: &'a Place,
    since: Instant,
    /// Whether it has waited for another one.
    has_waited: bool,
    end: End,
}

impl Queues {
    /// Of writes that take `timeout` at most.
    pub(super) fn new(timeout: Option<Duration>) -> Self {
        Queues {
            timeout,
            table: Mutex::new(Table {
                queues: HashMap::new(),
                room: MANY,
            }),
        }
    }

    /// A place for a file that is being opened with `flags`, as of open(2).
    pub(super) fn place(&self, pipe: &PipeName, flags: i32) -> Place {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        if table.queues.len() >= table.room && !table.queues.contains_key(pipe) {
            table.queues.retain(|_, queue| Arc::strong_count(queue) > 1);
            table.room = MANY.max(2 * table.queues.len());
        }
        let queue = table.queues.entry(pipe.clone()).or_default();
        Place {
            pipe: pipe.clone(),
            queue: Arc::clone(queue),
            timeout: self.timeout,
            is_queued: flags & (libc::O_APPEND | libc::O_TRUNC) != 0,
            idle: Mutex::new(Instant::now()),
        }
    }
}

impl Default for Queue {
    fn default() -> Self {
        Queue {
            state: Mutex::new(State {
                under_way: 0,
                answered: Instant::now(),
                let_in: None,
                timed_out: None,
            }),
            changed: Notify::new(),
        }
    }
}

impl Queue {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets somebody in who opens a file to write, or says how long he should wait before he asks again.
    fn let_in(&self, is_silent: bool) -> Option<Duration> {
        let now = Instant::now();
        let mut state = self.state();
        let is_away = is_silent || state.timed_out.is_some();
        if state.under_way > 0 {
            let is_stuck = is_away || now.duration_since(state.answered) > SLOW;
            return is_stuck.then_some(LOOK);
        }
        if !is_away {
            return None;
        }
        let left = state
            .let_in
            .and_then(|at| SLOW.checked_sub(now.duration_since(at)));
        if left.is_none() {
            state.let_in = Some(now);
        }
        left
    }
}

impl Place {
    /// Waits until a write that begins now is not behind one that is stuck. `is_silent` says whether the store has let
    /// somebody wait in vain.
    ///
    /// # Errors
    /// `TimedOut`.
    pub(super) async fn wait(&self, is_silent: impl Fn() -> bool) -> Result<()> {
        if self.queue.let_in(is_silent()).is_none() {
            return Ok(());
        }
        let waiting = async {
            loop {
                let mut changed = pin!(self.queue.changed.notified());
                changed.as_mut().enable();
                match self.queue.let_in(is_silent()) {
                    Some(pause) => drop(tokio::time::timeout(pause, changed).await),
                    None => return,
                }
            }
        };
        let waited = Deadline::new(self.timeout).keep(waiting).await;
        waited.ok_or_else(|| self.timed_out())
    }

    /// Does `write`, for as long as is left of its time. `answers` counts what the store has answered to the file's writes.
    ///
    /// # Errors
    /// Those of `write`; `TimedOut` where nothing is left.
    pub(super) async fn write<T>(
        &self,
        write: impl Future<Output = Result<T>>,
        answers: impl Fn() -> u64,
    ) -> Result<T> {
        let mut turn = self.begin();
        let before = answers();
        let result = match self.timeout {
            Some(timeout) if turn.has_waited => {
                let left = timeout.saturating_sub(turn.since.elapsed());
                let mut deadline = Deadline::new(Some(left.max(timeout / LEAST)));
                let kept = deadline.keep(write).await;
                kept.unwrap_or_else(|| Err(self.timed_out().maybe_applied()))
            }
            _ => write.await,
        };
        turn.end = match &result {
            Err(error) if error.kind() == Kind::TimedOut => End::TimedOut,
            _ if answers() != before => End::Answered,
            _ => End::Unasked,
        };
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
        let before = state
            .timed_out
            .filter(|(at, _)| self.is_queued && now.duration_since(*at) < AT_ONCE);
        Turn {
            place: self,
            since: before.map_or(now, |(_, since)| idle.max(since)),
            has_waited: before.is_some(),
            end: End::Unasked,
        }
    }

    fn timed_out(&self) -> Error {
        let (pipe, timeout) = (&self.pipe, self.timeout.unwrap_or_default());
        let why = format!("pushing to {pipe}: no answer within {timeout:?}, behind other writes");
        Error::new(Kind::TimedOut, why)
    }

    fn idle(&self) -> MutexGuard<'_, Instant> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let now = Instant::now();
        *self.place.idle() = now;
        let queue = &self.place.queue;
        {
            let mut state = queue.state();
            state.under_way -= 1;
            match self.end {
                End::Answered => (state.answered, state.timed_out) = (now, None),
                End::TimedOut => state.timed_out = Some((now, self.since)),
                // Those behind it go on waiting for the same.
                End::Unasked if self.has_waited => {
                    state.timed_out = state.timed_out.map(|(_, since)| (now, since));
                }
                End::Unasked => {}
            }
            state.let_in = None;
        }
        queue.changed.notify_waiters();
    }
}
