//! Looking for a push by the identity of its messages, where the server may have forgotten it.

use std::collections::BTreeSet;

use super::api::Info;
use super::headings::{Heading, Headings};
use super::ids::PushName;
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
    /// The last message, and those before it that are missing.
    Found(Found, Vec<usize>),
    /// All messages were looked through.
    Nowhere,
    /// There are too many to look through all.
    NotAmongTheLast,
}

impl Search {
    pub(super) fn found(&self) -> Option<Found> {
        match self {
            Search::Found(found, _) => Some(*found),
            Search::Nowhere | Search::NotAmongTheLast => None,
        }
    }

    pub(super) fn missing(self) -> Vec<usize> {
        match self {
            Search::Found(_, missing) => missing,
            Search::Nowhere | Search::NotAmongTheLast => Vec::new(),
        }
    }
}

/// The last message of `push`, which has `count`, among the last 65,536 pushes to the stream and behind message `since`.
/// Where its messages went `apart`, also which of those before are missing; else there are none. Messages of others may
/// break the connections of `line`.
///
/// # Errors
/// As for [`Link::api`](super::link::Link::api).
pub(super) async fn search(
    line: &Line,
    info: &Info,
    push: &PushName,
    count: usize,
    since: u64,
    apart: bool,
) -> Result<Search> {
    let mut found = FoundSoFar::default();
    let first = info.state.first_seq.max(since + 1);
    let mut end = info.state.last_seq + 1;
    let mut pushes = 0;
    while info.state.messages > 0 && end > first && pushes < PUSHES {
        let start = end.saturating_sub(BLOCK).max(first);
        let mut block = Block {
            push,
            count,
            found: &mut found,
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
        pushes += block.pushes;
        end = start;
        if found.last.is_some() && (!apart || found.is_whole()) {
            break;
        }
    }
    let is_all = info.state.messages == 0 || end <= first;
    // What was dropped from the stream's beginning was stored.
    let is_kept = is_all && info.state.first_seq <= since + 1;
    Ok(match found.last {
        Some(_) if apart => found.among(is_kept),
        Some(last) => Search::Found(last, Vec::new()),
        None if is_all => Search::Nowhere,
        None => Search::NotAmongTheLast,
    })
}

/// What was found of a push.
#[derive(Default)]
struct FoundSoFar {
    /// The last one in the stream, of the last messages that any were found among.
    last: Option<Found>,
    indexes: BTreeSet<usize>,
}

impl FoundSoFar {
    /// Whether none is missing before the last one.
    fn is_whole(&self) -> bool {
        self.indexes
            .last()
            .is_none_or(|last| self.indexes.len() == last + 1)
    }

    /// The greatest one, and which are missing before it: those before the first one only if what was stored `is_kept`.
    fn among(&self, is_kept: bool) -> Search {
        let (Some(last), Some(low), Some(high)) =
            (self.last, self.indexes.first(), self.indexes.last())
        else {
            return Search::Nowhere;
        };
        let low = if is_kept { 0 } else { *low };
        let missing = (low..*high).filter(|index| !self.indexes.contains(index));
        let found = Found {
            index: *high,
            seq: last.seq,
        };
        Search::Found(found, missing.collect())
    }
}

/// What is found in a block of messages.
struct Block<'a> {
    push: &'a PushName,
    count: usize,
    found: &'a mut FoundSoFar,
    pushes: u64,
}

impl Block<'_> {
    fn note(&mut self, heading: &Heading<'_>) {
        // The last message of an atomic batch, the first one of a chain, or one that came alone.
        let is_batched = heading.header("Nats-Batch-Id").is_some();
        let together = is_batched && heading.header("Nats-Batch-Commit").is_none()
            || heading.header("Nats-Expected-Last-Msg-Id").is_some();
        self.pushes += u64::from(!together);
        // Others may make up what they like.
        let index = self.index(heading).filter(|index| *index < self.count);
        if let Some(index) = index {
            let seq = heading.seq;
            self.found.indexes.insert(index);
            if self.found.last.is_none_or(|last| last.seq < seq) {
                self.found.last = Some(Found { index, seq });
            }
        }
    }

    /// Which message of the push it is.
    fn index(&self, heading: &Heading<'_>) -> Option<usize> {
        let identity = heading.header("Nats-Msg-Id");
        if let Some(index) = identity.and_then(|identity| self.push.index_of(identity)) {
            return Some(index);
        }
        let batch = heading.header("Nats-Batch-Id")?;
        let place = heading.header("Nats-Batch-Sequence")?;
        self.push.index_in(batch, place)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::nats::ids::Tags;
    use crate::message::{Producer, PushId};

    #[test]
    fn messages_of_a_batch_are_known_by_their_place_in_it() {
        let tags = Tags::random().expect("randomness");
        let id = PushId::first(Producer::from_bytes([7; 16]), 3);
        let (name, other) = (PushName::new(id), PushName::new(PushId { seq: 4, ..id }));
        let mut found = FoundSoFar::default();
        let mut block = Block {
            push: &name,
            count: 1401,
            found: &mut found,
            pushes: 0,
        };
        let messages = [
            (None, Some((other.batch(0, &tags), "1", false)), None),
            (
                None,
                Some((name.batch(1000, &tags), "1", false)),
                Some(1000),
            ),
            (
                None,
                Some((name.batch(1000, &tags), "2", false)),
                Some(1001),
            ),
            (Some(other.message(9)), None, Some(1001)),
            (
                Some(name.message(1400)),
                Some((name.batch(1002, &tags), "399", true)),
                Some(1400),
            ),
            (Some(name.message(usize::MAX)), None, Some(1400)),
        ];
        for (seq, (identity, batch, index)) in (1..).zip(messages) {
            let header = |name: &'static str| match (name, &batch) {
                ("Nats-Msg-Id", _) => identity.as_deref(),
                ("Nats-Batch-Id", Some((batch, _, _))) => Some(batch.as_str()),
                ("Nats-Batch-Sequence", Some((_, place, _))) => Some(*place),
                ("Nats-Batch-Commit", Some((_, _, true))) => Some("1"),
                _ => None,
            };
            block.note(&Heading::new(seq, &header));
            assert_eq!(block.found.last.map(|found| found.index), index, "{seq}");
        }
        assert_eq!(block.found.last.map(|found| found.seq), Some(5));
        assert_eq!(block.pushes, 3);
    }

    #[test]
    fn messages_that_are_missing_among_others_are_told() {
        let found = |indexes: &[usize]| FoundSoFar {
            last: Some(Found { index: 0, seq: 9 }),
            indexes: indexes.iter().copied().collect(),
        };
        for (indexes, is_kept, last, missing) in [
            (&[0, 1, 2][..], true, 2, vec![]),
            (&[3, 0, 2], true, 3, vec![1]),
            (&[2, 4], true, 4, vec![0, 1, 3]),
            // Those before them may have been dropped by a reset.
            (&[2, 4], false, 4, vec![3]),
        ] {
            let found = found(indexes);
            assert_eq!(found.is_whole(), missing.is_empty() && is_kept);
            let Search::Found(told, lacking) = found.among(is_kept) else {
                panic!("{indexes:?}");
            };
            assert_eq!((told.index, lacking), (last, missing), "{indexes:?}");
        }
    }
}
