//! Looking for a push by the identity of its messages, where the server may have forgotten it.

use super::api::Info;
use super::headings::{Heading, Headings};
use super::link::Line;
use crate::error::Result;

/// How many pushes are looked through.
const PUSHES: u64 = 65_536;

/// How many messages are looked through at a time, from the last one backwards.
const BLOCK: u64 = 65_536;

/// A message that was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Found {
    /// Its place in the push.
    pub(super) index: usize,
    pub(super) seq: u64,
}

/// What a search has come to.
pub(super) enum Search {
    Found(Found),
    /// All messages were looked through.
    Nowhere,
    /// There are too many to look through all.
    NotAmongTheLast,
}

impl Search {
    pub(super) fn found(&self) -> Option<Found> {
        match self {
            Search::Found(found) => Some(*found),
            Search::Nowhere | Search::NotAmongTheLast => None,
        }
    }
}

/// The last message with an identity that starts with `push`, among the last 65,536 pushes to the stream. Messages
/// of others may break the connections of `line`.
///
/// # Errors
/// As for [`Link::api`](super::link::Link::api).
pub(super) async fn search(line: &Line, info: &Info, push: &str) -> Result<Search> {
    let first = info.state.first_seq;
    let mut end = info.state.last_seq + 1;
    let mut pushes = 0;
    while info.state.messages > 0 && end > first && pushes < PUSHES {
        let start = end.saturating_sub(BLOCK).max(first);
        let mut block = Block {
            push,
            found: None,
            pushes: 0,
        };
        let mut headings = Headings {
            info,
            next: start,
            end,
        };
        headings
            .look_through(line, &mut |heading| block.note(heading))
            .await?;
        if let Some(found) = block.found {
            return Ok(Search::Found(found));
        }
        pushes += block.pushes;
        end = start;
    }
    Ok(match info.state.messages > 0 && end > first {
        true => Search::NotAmongTheLast,
        false => Search::Nowhere,
    })
}

/// What was found among messages.
struct Block<'a> {
    /// What the identities looked for start with.
    push: &'a str,
    found: Option<Found>,
    pushes: u64,
}

impl Block<'_> {
    fn note(&mut self, heading: &Heading<'_>) {
        // The last message of an atomic batch, the first one of a chain, or one that came alone.
        let is_batched = heading.header("Nats-Batch-Id").is_some();
        let together = is_batched && heading.header("Nats-Batch-Commit").is_none()
            || heading.header("Nats-Expected-Last-Msg-Id").is_some();
        self.pushes += u64::from(!together);
        let id = heading.header("Nats-Msg-Id");
        let index = id.and_then(|id| id.strip_prefix(self.push)?.parse().ok());
        if let Some(index) = index {
            let seq = heading.seq;
            self.found = Some(Found { index, seq });
        }
    }
}
