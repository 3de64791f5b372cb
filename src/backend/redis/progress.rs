//! Whether entries were trimmed before a reader came to them. Their ids do not tell, but the server counts what was ever
//! added to a stream.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::Look;
use crate::backend::behind::Behind;
use crate::message::{Message, Position};
use crate::name::PipeName;

/// After so many entries it is looked again, and after this time if there were any.
const OFTEN: u64 = 64;
const SOON: Duration = Duration::from_secs(1);

/// How many readers that ended are remembered.
const PLACES: usize = 256;

/// Where readers were when they ended, and how many entries were ever added up to there: one that is made anew after an
/// outage goes on there.
#[derive(Default)]
pub(super) struct Places(Mutex<VecDeque<(PipeName, Position, u64)>>);

impl Places {
    fn lock(&self) -> MutexGuard<'_, VecDeque<(PipeName, Position, u64)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn find(&self, pipe: &PipeName, after: Position) -> Option<u64> {
        let places = self.lock();
        let mut newest = places.iter().rev();
        let (_, _, read) = newest.find(|place| (&place.0, place.1) == (pipe, after))?;
        Some(*read)
    }

    fn note(&self, pipe: &PipeName, after: Position, read: u64) {
        let mut places = self.lock();
        if places.len() == PLACES {
            places.pop_front();
        }
        places.push_back((pipe.clone(), after, read));
    }
}

/// How far a reader is.
pub(super) struct Progress {
    pipe: PipeName,
    places: Arc<Places>,
    behind: Behind,
    /// The last entry that came.
    after: Position,
    /// How many entries were ever added up to where it is, once that is known.
    read: Option<u64>,
    /// What told the stream from others of its name at the last look.
    made: Option<String>,
    /// Of a reader that began with the oldest entry, its first.
    first: Option<Position>,
    is_from_oldest: bool,
    /// Entries that came since it began, and since the last look.
    came: u64,
    unlooked: u64,
    /// Where it was at the last look, and when that was.
    looked: Position,
    since: Instant,
}

impl Progress {
    /// Of a reader that begins behind `after`.
    pub(super) fn new(places: &Arc<Places>, pipe: &PipeName, after: Position) -> Self {
        Progress {
            pipe: pipe.clone(),
            places: Arc::clone(places),
            behind: Behind::new(pipe.clone()),
            after,
            read: places.find(pipe, after),
            made: None,
            first: None,
            is_from_oldest: after == Position::MIN,
            came: 0,
            // The first look tells where it begins.
            unlooked: OFTEN,
            looked: after,
            since: Instant::now(),
        }
    }

    /// The last entry that came.
    pub(super) fn after(&self) -> Position {
        self.after
    }

    /// Notes entries that came.
    pub(super) fn came(&mut self, messages: &[Message]) {
        let count = messages.len() as u64;
        self.after = messages.last().map_or(self.after, |last| last.position);
        if let Some(first) = messages.first()
            && self.came == 0
            && self.is_from_oldest
        {
            self.first = Some(first.position);
        }
        self.came += count;
        self.unlooked += count;
        self.read = self.read.map(|read| read + count);
    }

    /// Whether it is time to look at the pipe.
    pub(super) fn is_due(&self) -> bool {
        self.unlooked >= OFTEN || self.unlooked > 0 && self.since.elapsed() > SOON
    }

    /// Compares what came with what there is, and was.
    pub(super) fn compare(&mut self, look: &Look) {
        let after = self.after;
        self.unlooked = 0;
        self.since = Instant::now();
        let looked = std::mem::replace(&mut self.looked, after);
        let Some(info) = &look.info else {
            self.read = None;
            return;
        };
        let made = self.made.replace(look.made.clone());
        if made.is_some_and(|made| made != look.made) {
            // Another one, as behind SWAPDB, has its own count.
            (self.read, self.first) = (None, None);
        }
        let gone = look.added.saturating_sub(info.count);
        // Where this is known for certain: at the end, and before the oldest that is left.
        let certain = if after >= look.newest {
            Some(look.added)
        } else if info.first.is_none_or(|first| after < first) {
            Some(gone)
        } else if self.first.is_some() && self.first == info.first {
            Some(gone + self.came)
        } else {
            None
        };
        // By a reset, or one by one.
        let starts_behind = look.floor.as_ref().is_ok_and(|floor| *floor > looked);
        let is_meant = starts_behind || look.deleted > looked;
        match (self.read, certain) {
            (Some(read), Some(certain)) if !is_meant => {
                self.behind.missed(certain.saturating_sub(read));
            }
            (_, None) if is_meant => self.read = None,
            _ => {}
        }
        self.read = certain.or(self.read);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(read) = self.read {
            self.places.note(&self.pipe, self.after, read);
        }
    }
}
