//! Looking for a push by the identity of its messages, where the server may have forgotten it.

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

/// The last message of `push`, among the last 65,536 pushes to the stream and behind message `since`. Messages
/// of others may break the connections of `line`.
///
/// # Errors
/// As for [`Link::api`](super::link::Link::api).
pub(super) async fn search(
    line: &Line,
    info: &Info,
    push: &PushName,
    since: u64,
) -> Result<Search> {
    let first = info.state.first_seq.max(since + 1);
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
    push: &'a PushName,
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
        if let Some(index) = self.index(heading) {
            let seq = heading.seq;
            self.found = Some(Found { index, seq });
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
        let mut block = Block {
            push: &name,
            found: None,
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
            assert_eq!(block.found.map(|found| found.index), index, "{seq}");
        }
        assert_eq!(block.found.map(|found| found.seq), Some(5));
        assert_eq!(block.pushes, 2);
    }
}
