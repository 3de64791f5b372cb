//! Names: of what is pushed, by which it is known again, and of what no other process has named.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::{Error, Kind, Result};
use crate::message::PushId;

/// Tells apart what is made here: a try that was given up must not mix with the next one.
pub(super) struct Tags {
    process: u64,
    next: AtomicU64,
}

impl Tags {
    /// Unlike any other process's.
    ///
    /// # Errors
    /// `Io` if the system has no randomness to give.
    pub(super) fn random() -> Result<Self> {
        let process = getrandom::u64().map_err(|error| {
            Error::new(Kind::Io, "drawing a random number").caused_by(error.to_string())
        })?;
        Ok(Tags {
            process,
            next: AtomicU64::new(1),
        })
    }

    /// Unlike any other.
    pub(super) fn next(&self) -> String {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        format!("{:016x}{number:x}", self.process)
    }

    /// A short one, for the tries of one push.
    fn short(&self) -> u32 {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        (self.process as u32).wrapping_add(number as u32) & 0xff_ffff
    }
}

/// What a push's messages and atomic batches are called.
pub(super) struct PushName {
    /// What its messages' identities start with.
    message: String,
    /// What its batches' names start with.
    batch: String,
}

impl PushName {
    pub(super) fn new(id: PushId) -> Self {
        PushName {
            message: format!("{}-{}-", id.producer, id.seq),
            // Servers take no more than 64 characters, so it is short.
            batch: format!("{}-{:x}-", id.producer, id.seq),
        }
    }

    /// The identity of message `index`.
    pub(super) fn message(&self, index: usize) -> String {
        format!("{}{index}", self.message)
    }

    /// A name for a try to store an atomic batch that begins with message `first`. It says where each of its messages
    /// stands in the push: a server that is killed may keep the first ones, which have no identities.
    pub(super) fn batch(&self, first: usize, tags: &Tags) -> String {
        format!("{}{first:x}-{:x}", self.batch, tags.short())
    }

    /// Which message of the push has this identity.
    pub(super) fn index_of(&self, identity: &str) -> Option<usize> {
        identity.strip_prefix(&self.message)?.parse().ok()
    }

    /// Which message of the push has this place, from 1 on, in the batch of this name.
    pub(super) fn index_in(&self, batch: &str, place: &str) -> Option<usize> {
        let (first, _) = batch.strip_prefix(&self.batch)?.split_once('-')?;
        let first = usize::from_str_radix(first, 16).ok()?;
        first.checked_add(place.parse::<usize>().ok()?.checked_sub(1)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::Producer;

    fn name(seq: u64) -> PushName {
        PushName::new(PushId::first(Producer::from_bytes([7; 16]), seq))
    }

    #[test]
    fn a_batchs_name_and_a_place_in_it_say_which_message_of_the_push_it_is() {
        let tags = Tags::random().expect("randomness");
        let name = name(18);
        let batch = name.batch(2000, &tags);
        assert_eq!(name.index_in(&batch, "1"), Some(2000));
        assert_eq!(name.index_in(&batch, "1000"), Some(2999));
        assert_eq!(name.index_of(&name.message(2999)), Some(2999));
        assert_ne!(name.batch(2000, &tags), batch);
        for (batch, place) in [
            (self::name(1).batch(0, &tags), "1"),
            (self::name(180).batch(0, &tags), "1"),
            ("another".to_owned(), "1"),
            (batch.clone(), "0"),
            (batch, "x"),
        ] {
            assert_eq!(name.index_in(&batch, place), None, "{batch} {place}");
        }
    }

    #[test]
    fn a_batchs_name_is_no_longer_than_servers_take() {
        let tags = Tags {
            process: u64::from(u32::MAX),
            next: AtomicU64::new(0),
        };
        // More messages than any push has.
        let batch = name(u64::MAX).batch(0xfff_ffff, &tags);
        assert!(batch.len() <= 64, "{batch}");
    }
}
