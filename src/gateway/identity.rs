//! Pushes that come twice.
//!
//! A client that has lost its connection repeats a push under its old identity on another one. The first
//! request may still be on its way, and even arrive after the second: so of each producer the last number
//! that was seen here is remembered, and a request that comes late is not taken for a new one. A gateway
//! that was started anew has no connections of old from which one could come.

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, PoisonError};

use crate::error::{Error, Kind, Result};
use crate::message::{Producer, PushId};

/// How many producers are remembered; some 10 MiB.
const PRODUCERS: usize = 65_536;

#[derive(Default)]
pub(super) struct Identities(Mutex<Seen>);

#[derive(Default)]
struct Seen {
    last: HashMap<Producer, u64>,
    /// In the order of their first push, for forgetting the oldest.
    order: VecDeque<Producer>,
}

impl Identities {
    /// Notes a push that has come, and says whether an earlier one of the same identity has to be searched
    /// for. `first`: its sender takes it for the first try.
    ///
    /// # Errors
    /// `Interrupted` for a first try that comes after a later push of the same producer: its sender has
    /// given it up.
    pub(super) fn note(&self, id: PushId, first: bool) -> Result<PushId> {
        let mut seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let last = match seen.last.get_mut(&id.producer) {
            Some(last) => Some(std::mem::replace(last, id.seq.max(*last))),
            None => {
                seen.remember(id);
                None
            }
        };
        match last {
            Some(last) if first && id.seq < last => Err(Error::new(
                Kind::Interrupted,
                "a push that was given up came late; it is not stored",
            )),
            Some(last) if first && id.seq > last => Ok(PushId {
                repeated: false,
                ..id
            }),
            None if first => Ok(PushId {
                repeated: false,
                ..id
            }),
            _ => Ok(id.again()),
        }
    }
}

impl Seen {
    fn remember(&mut self, id: PushId) {
        self.last.insert(id.producer, id.seq);
        self.order.push_back(id.producer);
        if self.order.len() > PRODUCERS
            && let Some(oldest) = self.order.pop_front()
        {
            self.last.remove(&oldest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(producer: u128, seq: u64) -> PushId {
        PushId::first(Producer::from_bytes(producer.to_be_bytes()), seq).again()
    }

    #[test]
    fn only_a_first_try_that_is_new_is_not_searched_for() {
        let seen = Identities::default();
        let repeated = |id, first| seen.note(id, first).expect("taken").repeated;
        assert!(!repeated(id(1, 1), true));
        assert!(repeated(id(1, 1), false), "a repeat");
        assert!(
            repeated(id(1, 1), true),
            "a first try that arrives behind it"
        );
        assert!(!repeated(id(1, 2), true));
        assert!(repeated(id(2, 5), false), "who says nothing may repeat");
        assert!(repeated(id(2, 5), true));
    }

    #[test]
    fn what_was_given_up_is_not_stored_late_but_may_be_asked_for_again() {
        let seen = Identities::default();
        seen.note(id(1, 7), true).expect("new");
        assert!(seen.note(id(1, 6), true).is_err());
        assert!(seen.note(id(1, 6), false).expect("asked for").repeated);
    }

    #[test]
    fn the_oldest_producers_are_forgotten() {
        let seen = Identities::default();
        for producer in 0..=PRODUCERS as u128 {
            seen.note(id(producer, 1), true).expect("new");
        }
        let seen = seen.0.lock().expect("lock");
        assert_eq!(seen.last.len(), PRODUCERS);
        assert!(!seen.last.contains_key(&id(0, 1).producer));
    }
}
