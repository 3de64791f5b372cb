//! Pushes that come twice.
//!
//! A client that has lost its connection repeats a push under its old identity on another one. The first
//! request may still be on its way, arrive after the second, or at the same time. So of each producer the last
//! number that was seen here is remembered, a request that comes late is not taken for a new one, and a
//! producer's pushes are made one after the other. A gateway that was started anew has no connections of old
//! from which one could come.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::OwnedMutexGuard;

use crate::error::{Error, Kind, Result};
use crate::message::{Producers, PushId};

/// Some 15 MiB at most.
#[derive(Default)]
pub(super) struct Identities(Mutex<Producers<Last>>);

/// The last number that a producer has pushed; 0 before the first.
type Last = Arc<tokio::sync::Mutex<u64>>;

/// A producer's turn, for as long as a push takes.
pub(super) struct Turn(OwnedMutexGuard<u64>);

impl Identities {
    /// Waits until no other push of its producer is under way. The body must have come: a request that
    /// stops half-way must not keep the turn.
    pub(super) async fn turn(&self, id: PushId) -> Turn {
        let last = {
            let mut seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            let last = seen.get(&id.producer).cloned().unwrap_or_default();
            seen.set(id.producer, Arc::clone(&last));
            last
        };
        Turn(last.lock_owned().await)
    }
}

impl Turn {
    /// Notes the push, and says whether an earlier one of the same identity has to be searched for. `first`:
    /// its sender takes it for the first try.
    ///
    /// # Errors
    /// `Interrupted` for a first try that comes after a later push of the same producer: its sender has
    /// given it up.
    pub(super) fn note(&mut self, id: PushId, first: bool) -> Result<PushId> {
        let last = *self.0;
        *self.0 = id.seq.max(last);
        if !first || id.seq == last {
            return Ok(id.again());
        }
        if id.seq < last {
            return Err(Error::new(
                Kind::Interrupted,
                "a push that was given up came late; it is not stored",
            ));
        }
        Ok(PushId {
            repeated: false,
            ..id
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::Producer;

    fn id(producer: u128, seq: u64) -> PushId {
        PushId::first(Producer::from_bytes(producer.to_be_bytes()), seq).again()
    }

    async fn repeated(seen: &Identities, id: PushId, first: bool) -> Result<bool> {
        let noted = seen.turn(id).await.note(id, first);
        noted.map(|id| id.repeated)
    }

    #[tokio::test]
    async fn only_a_first_try_that_is_new_is_not_searched_for() {
        let seen = Identities::default();
        for (id, first, searched) in [
            (id(1, 1), true, false),
            // A repeat, then a first try that arrives behind it.
            (id(1, 1), false, true),
            (id(1, 1), true, true),
            (id(1, 2), true, false),
            // Who says nothing may repeat.
            (id(2, 5), false, true),
            (id(2, 5), true, true),
        ] {
            let noted = repeated(&seen, id, first).await;
            assert_eq!(noted.expect("taken"), searched, "{id:?} {first}");
        }
    }

    #[tokio::test]
    async fn what_was_given_up_is_not_stored_late_but_may_be_asked_for_again() {
        let seen = Identities::default();
        repeated(&seen, id(1, 7), true).await.expect("new");
        assert!(repeated(&seen, id(1, 6), true).await.is_err());
        assert!(repeated(&seen, id(1, 6), false).await.expect("asked for"));
    }

    #[tokio::test]
    async fn a_producer_has_one_push_under_way_and_holds_up_no_other() {
        let seen = Identities::default();
        let turn = seen.turn(id(1, 1)).await;
        let soon = std::time::Duration::from_millis(20);
        let second = tokio::time::timeout(soon, seen.turn(id(1, 1))).await;
        assert!(second.is_err());
        seen.turn(id(2, 1)).await;
        drop(turn);
        seen.turn(id(1, 1)).await;
    }
}
