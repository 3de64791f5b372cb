//! Memory for what clients send: bounded, whatever they announce.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

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
    small: Pool,
    large: Pool,
}

impl Default for Rooms {
    fn default() -> Self {
        Rooms {
            small: Pool::new(FOR_SMALL),
            large: Pool::new(FOR_LARGE),
        }
    }
}

struct Pool {
    free: Arc<Semaphore>,
    /// How many wait for a part of it.
    waiting: watch::Sender<usize>,
}

impl Pool {
    fn new(bytes: usize) -> Self {
        Pool {
            free: Arc::new(Semaphore::new(bytes / UNIT)),
            waiting: watch::Sender::new(0),
        }
    }

    async fn take(&self, units: u32) -> Option<OwnedSemaphorePermit> {
        if let Ok(taken) = Arc::clone(&self.free).try_acquire_many_owned(units) {
            return Some(taken);
        }
        let _waits = Waits::new(&self.waiting);
        let taken = Arc::clone(&self.free).acquire_many_owned(units);
        tokio::time::timeout(PATIENCE, taken).await.ok()?.ok()
    }

    /// Returns when somebody waits.
    async fn wanted(&self) {
        drop(self.waiting.subscribe().wait_for(|count| *count > 0).await);
    }
}

/// Counts one who waits, also if he is dropped meanwhile.
struct Waits<'a>(&'a watch::Sender<usize>);

impl<'a> Waits<'a> {
    fn new(waiting: &'a watch::Sender<usize>) -> Self {
        waiting.send_modify(|count| *count += 1);
        Waits(waiting)
    }
}

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        self.0.send_modify(|count| *count -= 1);
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
    /// Returns when somebody waits for what `room` holds.
    pub(super) async fn wanted(&self, room: &Room) {
        tokio::select! {
            () = self.small.wanted(), if room.small.is_some() => {}
            () = self.large.wanted(), if room.large.is_some() => {}
            else => std::future::pending().await,
        }
    }

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
        // Who wants more than there is gets all of it.
        let missing = (bytes.min(FOR_LARGE) / UNIT).saturating_sub(have);
        if missing == 0 {
            return Ok(());
        }
        match from.take(missing as u32).await {
            Some(more) => {
                match held {
                    Some(held) => held.merge(more),
                    None => *held = Some(more),
                }
                Ok(())
            }
            None => Err(Error::new(
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
