//! How many bytes a pipe's messages have. The server counts what it stores, with subjects and headers of any length; so
//! they are counted here: those pushed from here as they are stored, and of those of others a few at each look.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::api::Info;
use super::headings::{Heading, Headings};
use super::link::Line;
use super::lock;
use crate::error::Result;
use crate::name::PipeName;

/// How many messages are looked at for one answer, and how long.
const MOST: u64 = 4096;
const PATIENCE: Duration = Duration::from_millis(50);

/// Pipes whose bytes are known at a time; each takes some hundred bytes.
const PIPES: usize = 65_536;

/// The bytes of a pipe's first messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Tally {
    /// Of which stream.
    epoch: u64,
    /// The first message, and the first that is not counted.
    first: u64,
    next: u64,
    /// How many of the stream's messages others have deleted one by one.
    deleted: u64,
    bytes: u64,
}

impl Tally {
    /// Of a stream's messages none yet.
    fn new(info: &Info) -> Result<Self> {
        let first = info.state.first_seq.max(1);
        Ok(Tally {
            epoch: info.epoch()?,
            first,
            next: first,
            deleted: info.state.num_deleted,
            bytes: 0,
        })
    }

    fn begins_like(&self, other: &Tally) -> bool {
        (self.epoch, self.first, self.deleted) == (other.epoch, other.first, other.deleted)
    }
}

/// Messages that were stored.
#[derive(Debug, Clone, Copy)]
pub(super) struct Added {
    pub(super) epoch: u64,
    pub(super) last: u64,
    pub(super) count: u64,
    pub(super) bytes: u64,
}

/// What was counted of each pipe.
pub(super) struct Tallies {
    /// A connection of its own, which messages of others may break.
    line: Line,
    known: Mutex<HashMap<PipeName, Arc<tokio::sync::Mutex<Tally>>>>,
}

impl Tallies {
    pub(super) fn new(line: Line) -> Self {
        Tallies {
            line,
            known: Mutex::default(),
        }
    }

    /// Counts what was pushed from here.
    pub(super) fn add(&self, pipe: &PipeName, added: Added) {
        let Some(tally) = lock(&self.known).get(pipe).cloned() else {
            return;
        };
        // Where those of others are among them they are counted later, as by who is counting now.
        if let Ok(mut tally) = tally.try_lock()
            && tally.epoch == added.epoch
            && tally.next + added.count == added.last + 1
        {
            tally.next += added.count;
            tally.bytes = tally.bytes.saturating_add(added.bytes);
        }
    }

    /// The bytes of all messages of the pipe; `None` where it takes too long to tell: then some more are known the
    /// next time.
    pub(super) async fn bytes(&self, pipe: &PipeName, info: &Info) -> Option<u64> {
        let fresh = Tally::new(info).ok()?;
        let tally = {
            let mut known = lock(&self.known);
            if known.len() >= PIPES && !known.contains_key(pipe) {
                known.clear();
            }
            let tally = known.entry(pipe.clone());
            Arc::clone(tally.or_insert_with(|| Arc::new(tokio::sync::Mutex::new(fresh))))
        };
        let counted = async {
            let mut tally = tally.lock().await;
            if !tally.begins_like(&fresh) {
                *tally = fresh;
            }
            self.count(&mut tally, info).await
        };
        match tokio::time::timeout(PATIENCE, counted).await {
            Ok(Ok(bytes)) => bytes,
            Ok(Err(error)) => {
                log::debug!("{pipe}: its bytes are not known: {error}");
                None
            }
            Err(_) => None,
        }
    }

    async fn count(&self, tally: &mut Tally, info: &Info) -> Result<Option<u64>> {
        let all = info.state.last_seq + 1;
        let end = all.min(tally.next.saturating_add(MOST));
        if info.state.messages > 0 && tally.next < end {
            let mut headings = Headings {
                info,
                next: tally.next,
                end,
            };
            let mut note = |heading: &Heading<'_>| {
                tally.next = heading.seq + 1;
                tally.bytes = tally.bytes.saturating_add(heading.size);
            };
            headings.look_through(&self.line, &mut note).await?;
            // Behind the last one there may be some that were deleted.
            tally.next = end;
        }
        Ok((tally.next >= all).then_some(tally.bytes))
    }
}
