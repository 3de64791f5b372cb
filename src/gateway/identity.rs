//! Pushes that come twice.
//!
//! A client that has lost its connection repeats a push under its old identity on another one. The first
//! request may still be on its way, arrive after the second, or at the same time, and any later. So of each producer it
//! is remembered which numbers were seen here, and which were stored: a request that comes late is not taken for a new
//! one, also where the store has forgotten it by a reset. And a producer's pushes are made one after the other. A gateway
//! that was started anew has no connections of old from which one could come.

use std::collections::VecDeque;
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::OwnedMutexGuard;

use crate::error::{Error, Kind, Result};
use crate::message::{Position, Producers, PushId};
use crate::name::PipeName;

/// Of so many of a producer's last pushes it is remembered where they were stored: its client may not have heard.
const STORED: usize = 32;

/// So many gaps are remembered between a producer's pushes that were stored.
const GAPS: usize = 8;

/// Some 100 MiB at most, and mostly a tenth of that.
#[derive(Default)]
pub(super) struct Identities(Mutex<Producers<Arc<tokio::sync::Mutex<Pushes>>>>);

/// What was seen here of a producer's pushes.
#[derive(Default)]
struct Pushes {
    /// The last number; 0 before the first.
    last: u64,
    /// The pipe to which it pushes, and from which number on all were stored in that but those in `gaps`.
    pipe: Option<PipeName>,
    from: u64,
    /// In their order.
    gaps: VecDeque<RangeInclusive<u64>>,
    /// The last ones that were stored, and where.
    stored: VecDeque<(u64, Position)>,
}

/// A producer's turn, for as long as a push takes.
pub(super) struct Turn(OwnedMutexGuard<Pushes>);

/// What to do with a push.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Push {
    /// Store it, unless it is repeated and is found.
    Store(PushId),
    /// Nothing: it was stored there.
    Known(Position),
}

impl Identities {
    /// Waits until no other push of its producer is under way. The body must have come: a request that
    /// stops half-way must not keep the turn.
    pub(super) async fn turn(&self, id: PushId) -> Turn {
        let pushes = {
            let mut seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            let pushes = seen.get(&id.producer).cloned().unwrap_or_default();
            seen.set(id.producer, Arc::clone(&pushes));
            pushes
        };
        Turn(pushes.lock_owned().await)
    }
}

impl Turn {
    /// Notes the push, and says whether an earlier one of the same identity has to be searched for. `first`:
    /// its sender takes it for the first try.
    ///
    /// # Errors
    /// `Interrupted` for a first try that comes after a later push of the same producer: its sender has
    /// given it up.
    pub(super) fn note(&mut self, pipe: &PipeName, id: PushId, first: bool) -> Result<Push> {
        let pushes = &mut *self.0;
        let last = pushes.last;
        pushes.turn_to(pipe);
        pushes.go_on_to(id.seq);
        if let Some((_, position)) = pushes.stored.iter().find(|stored| stored.0 == id.seq) {
            return Ok(Push::Known(*position));
        }
        if first && id.seq < last {
            return Err(Error::new(
                Kind::Interrupted,
                "a push that was given up came late; it is not stored",
            ));
        }
        // Where it was stored long ago is not known; it was before the last one.
        if pushes.was_stored(id.seq)
            && let Some((_, position)) = pushes.stored.back()
        {
            return Ok(Push::Known(*position));
        }
        Ok(Push::Store(PushId {
            repeated: !first || id.seq == last,
            ..id
        }))
    }

    /// Notes where the push was stored.
    pub(super) fn stored(&mut self, id: PushId, position: Position) {
        let pushes = &mut *self.0;
        let gaps = &mut pushes.gaps;
        if let Some(at) = gaps.iter().position(|gap| gap.contains(&id.seq))
            && let Some(gap) = gaps.remove(at)
        {
            for part in [id.seq + 1..=*gap.end(), *gap.start()..=id.seq - 1] {
                if !part.is_empty() {
                    gaps.insert(at, part);
                }
            }
        }
        pushes.forget_old_gaps();
        pushes.stored.push_back((id.seq, position));
        if pushes.stored.len() > STORED {
            pushes.stored.pop_front();
        }
    }
}

impl Pushes {
    /// Begins anew where the producer pushes to another pipe: of that nothing is known.
    fn turn_to(&mut self, pipe: &PipeName) {
        if self.pipe.as_ref() != Some(pipe) {
            self.pipe = Some(pipe.clone());
            self.from = self.last + 1;
            self.gaps.clear();
            self.stored.clear();
        }
    }

    /// Push `seq` has come; it and those left out before it may still be stored.
    fn go_on_to(&mut self, seq: u64) {
        if seq <= self.last {
            return;
        }
        if self.from > self.last {
            // The first one to this pipe. Those before may have come to a gateway before this one.
            self.from = seq;
            self.gaps.push_back(seq..=seq);
        } else {
            self.gaps.push_back(self.last + 1..=seq);
        }
        self.last = seq;
        self.forget_old_gaps();
    }

    /// Of what stands before a gap that is forgotten, nothing is known any more.
    fn forget_old_gaps(&mut self) {
        while self.gaps.len() > GAPS
            && let Some(gap) = self.gaps.pop_front()
        {
            self.from = gap.end() + 1;
        }
    }

    fn was_stored(&self, seq: u64) -> bool {
        (self.from..=self.last).contains(&seq) && !self.gaps.iter().any(|gap| gap.contains(&seq))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::Producer;

    fn id(producer: u128, seq: u64) -> PushId {
        PushId::first(Producer::from_bytes(producer.to_be_bytes()), seq).again()
    }

    fn pipe(name: &str) -> PipeName {
        PipeName::new(name).expect("legal")
    }

    fn at(seq: u64) -> Position {
        Position::new(1, seq)
    }

    /// What becomes of a push that is then stored, if it is stored.
    async fn pushed(seen: &Identities, to: &str, id: PushId, first: bool) -> Result<Push> {
        let mut turn = seen.turn(id).await;
        let noted = turn.note(&pipe(to), id, first)?;
        if noted != Push::Known(at(id.seq)) {
            turn.stored(id, at(id.seq));
        }
        Ok(noted)
    }

    async fn failed_or_known(seen: &Identities, id: PushId, first: bool) -> Result<Push> {
        seen.turn(id).await.note(&pipe("topic"), id, first)
    }

    /// Whether one that then fails is to be searched for.
    async fn failed(seen: &Identities, id: PushId, first: bool) -> Result<bool> {
        match failed_or_known(seen, id, first).await? {
            Push::Store(id) => Ok(id.repeated),
            Push::Known(position) => panic!("stored at {position}"),
        }
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
            let noted = failed(&seen, id, first).await;
            assert_eq!(noted.expect("taken"), searched, "{id:?} {first}");
        }
    }

    #[tokio::test]
    async fn what_was_given_up_is_not_stored_late_but_may_be_asked_for_again() {
        let seen = Identities::default();
        failed(&seen, id(1, 6), true).await.expect("new");
        pushed(&seen, "topic", id(1, 8), true).await.expect("new");
        for seq in [6, 7] {
            assert!(failed(&seen, id(1, seq), true).await.is_err());
            assert!(failed(&seen, id(1, seq), false).await.expect("asked for"));
        }
        // One that a gateway before this one may have seen, too.
        assert!(failed(&seen, id(1, 5), false).await.expect("asked for"));
    }

    #[tokio::test]
    async fn what_was_stored_is_not_stored_again_though_the_store_may_have_forgotten_it() {
        let seen = Identities::default();
        for seq in 1..=20 {
            pushed(&seen, "topic", id(1, seq), true).await.expect("new");
            let again = pushed(&seen, "topic", id(1, seq), false).await;
            assert_eq!(again.expect("stored"), Push::Known(at(seq)));
        }
        let late = pushed(&seen, "topic", id(1, 15), false).await;
        assert_eq!(late.expect("stored"), Push::Known(at(15)));
        for seq in 21..=60 {
            pushed(&seen, "topic", id(1, seq), true).await.expect("new");
        }
        let late = failed_or_known(&seen, id(1, 3), false).await;
        assert_eq!(late.expect("stored"), Push::Known(at(60)));
        let late = failed_or_known(&seen, id(1, 3), true).await;
        assert_eq!(late.expect_err("late").kind(), Kind::Interrupted);
        // In another pipe it is another push.
        let other = pushed(&seen, "other", id(1, 60), false).await;
        assert_eq!(other.expect("taken"), Push::Store(id(1, 60)));
    }

    #[tokio::test]
    async fn of_many_gaps_the_oldest_are_forgotten() {
        let seen = Identities::default();
        pushed(&seen, "topic", id(2, 1), true).await.expect("new");
        failed(&seen, id(2, 1000), true).await.expect("new");
        for seq in (1..500).map(|number| 2 * number) {
            pushed(&seen, "topic", id(2, seq), false)
                .await
                .expect("a gap");
        }
        assert!(seen.turn(id(2, 1)).await.0.gaps.len() <= GAPS);
        for seq in (1..100).map(|number| 10 * number) {
            pushed(&seen, "topic", id(1, seq), true).await.expect("new");
        }
        for seq in [1, 11, 500, 985, 989] {
            assert!(
                failed(&seen, id(1, seq), false).await.expect("unknown"),
                "{seq}"
            );
        }
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
