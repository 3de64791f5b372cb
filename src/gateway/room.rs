//! Memory for what clients send: bounded, whatever they announce.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::error::{Error, Kind, Result};

/// Bytes in all for bodies of at most [`SMALL`]: those who send more, or slowly, do not take it.
const FOR_SMALL: usize = 32 << 20;
const SMALL: usize = 1 << 20;

/// Bytes in all for larger ones: one of the largest, and some.
const FOR_LARGE: usize = 96 << 20;

/// What room is counted in, bytes: less than that anybody may have.
const UNIT: usize = 16 << 10;

/// How long one waits for others' room.
const PATIENCE: Duration = Duration::from_secs(10);

pub(super) struct Rooms {
    small: Arc<Semaphore>,
    large: Arc<Semaphore>,
}

impl Default for Rooms {
    fn default() -> Self {
        Rooms {
            small: Arc::new(Semaphore::new(FOR_SMALL / UNIT)),
            large: Arc::new(Semaphore::new(FOR_LARGE / UNIT)),
        }
    }
}

/// One body's part of the room, given back when it is dropped.
#[derive(Default)]
pub(super) struct Room {
    small: Option<OwnedSemaphorePermit>,
    large: Option<OwnedSemaphorePermit>,
}

impl Room {
    /// Whether it is part of what others wait for.
    pub(super) fn is_held(&self) -> bool {
        self.small.is_some() || self.large.is_some()
    }
}

impl Rooms {
    /// Makes `room` large enough for `bytes`, as they really come.
    ///
    /// # Errors
    /// `Unreachable` where others keep the room.
    pub(super) async fn reserve(&self, room: &mut Room, bytes: usize) -> Result<()> {
        let (from, held) = match bytes <= SMALL {
            true => (&self.small, &mut room.small),
            false => (&self.large, &mut room.large),
        };
        let have = held.as_ref().map_or(0, OwnedSemaphorePermit::num_permits);
        let missing = (bytes / UNIT).saturating_sub(have);
        if missing == 0 {
            return Ok(());
        }
        let more = Arc::clone(from).acquire_many_owned(missing as u32);
        match tokio::time::timeout(PATIENCE, more).await {
            Ok(Ok(more)) => {
                match held {
                    Some(held) => held.merge(more),
                    None => *held = Some(more),
                }
                Ok(())
            }
            _ => Err(Error::new(
                Kind::Unreachable,
                "the gateway has no memory left for what is being sent to it",
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn large_bodies_leave_room_for_small_ones_and_give_back_what_they_had() {
        let rooms = Rooms::default();
        let (mut one, mut two, mut small) = (Room::default(), Room::default(), Room::default());
        rooms
            .reserve(&mut one, 64 << 20)
            .await
            .expect("there is room");
        let refused = rooms
            .reserve(&mut two, 64 << 20)
            .await
            .expect_err("too much");
        assert_eq!(refused.kind(), Kind::Unreachable);
        rooms
            .reserve(&mut small, SMALL)
            .await
            .expect("room of its own");
        drop(one);
        rooms
            .reserve(&mut two, 64 << 20)
            .await
            .expect("there is room again");
    }
}
