//! Where pipes start, as far as a client has been told: for backends that learn it from a server.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use super::{Floor, weight};
use crate::message::{Message, Position};
use crate::name::PipeName;

/// The floor of a pipe, as far as this client has been told.
pub(super) struct KnownFloor(Mutex<Position>);

impl KnownFloor {
    /// Notes that the pipe starts at `floor`, or later.
    pub(super) fn raise(&self, floor: Position) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *known = floor.max(*known);
    }

    /// Takes out of `pending` what was dropped, and up to `max_bytes` (at least one message) of what stands
    /// before `before`. Returns the latter.
    pub(super) fn take(
        &self,
        pending: &mut VecDeque<Message>,
        max_bytes: usize,
        before: Position,
    ) -> Vec<Message> {
        let floor = self.position();
        let mut taken = Vec::new();
        let mut bytes = 0;
        while let Some(message) = pending.front() {
            if message.position >= floor {
                if message.position >= before || bytes >= max_bytes.max(1) {
                    break;
                }
                bytes += weight(&message.data);
                taken.extend(pending.pop_front());
            } else {
                pending.pop_front();
            }
        }
        taken
    }
}

impl Floor for KnownFloor {
    fn position(&self) -> Position {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The floors of the pipes that somebody here reads.
#[derive(Default)]
pub(super) struct Floors {
    known: Mutex<HashMap<PipeName, Weak<KnownFloor>>>,
    /// Whether somebody hears of resets for them.
    heard_of: AtomicBool,
}

impl Floors {
    /// The floor that all readers of `pipe` share.
    pub(super) fn of(&self, pipe: &PipeName) -> Arc<KnownFloor> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(floor) = known.get(pipe).and_then(Weak::upgrade) {
            return floor;
        }
        known.retain(|_, floor| floor.strong_count() > 0);
        let floor = Arc::new(KnownFloor(Mutex::new(Position::MIN)));
        known.insert(pipe.clone(), Arc::downgrade(&floor));
        floor
    }

    /// Whether somebody here reads `pipe` and does not know yet that it starts at `floor`.
    pub(super) fn lack(&self, pipe: &PipeName, floor: Position) -> bool {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let read = known.get(pipe).and_then(Weak::upgrade);
        read.is_some_and(|known| known.position() < floor)
    }

    /// The pipes that are being read.
    pub(super) fn pipes(&self) -> Vec<PipeName> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let read = known.iter().filter(|(_, floor)| floor.strong_count() > 0);
        read.map(|(pipe, _)| pipe.clone()).collect()
    }

    /// Whether somebody hears of resets already; from now on, the caller does.
    pub(super) fn are_heard_of(&self) -> bool {
        self.heard_of.swap(true, Ordering::SeqCst)
    }
}
