//! Hearing of others' resets while somebody reads: for backends whose server tells of them over a connection.

use std::collections::HashSet;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use super::Fut;
use super::floor::Floors;
use crate::error::{Kind, Result};
use crate::message::Position;
use crate::name::PipeName;

/// The pause before it is listened again; it doubles up to [`LONGEST`].
const SHORTEST: Duration = Duration::from_millis(10);
/// The longest of them.
const LONGEST: Duration = Duration::from_secs(1);

/// Ends when nothing is heard any more, as the connection has ended.
pub(super) type Hearing = Pin<Box<dyn Future<Output = ()> + Send>>;

/// A client that can be told.
pub(super) trait Ear: Send + Sync + 'static {
    /// What it keeps for the readers.
    fn floors(&self) -> &Floors;

    /// Connects, and from then on raises the floors that it is told.
    fn listen(self: Arc<Self>) -> Fut<'static, Hearing>;

    /// Looks where `pipe` starts, and raises its floor.
    fn look_at(self: Arc<Self>, pipe: PipeName) -> Fut<'static, ()>;
}

/// Pipes of which a reset was told. Whoever may tell of one need not be somebody who may reset, so the server is asked.
#[derive(Default)]
pub(super) struct Hints {
    pipes: Mutex<HashSet<PipeName>>,
    told: Notify,
}

impl Hints {
    /// Notes a word that `pipe` starts at `floor` now; to no end where nobody here reads it.
    pub(super) fn note(&self, floors: &Floors, pipe: PipeName, floor: Position) {
        if floors.lack(&pipe, floor) {
            let mut pipes = self.pipes.lock().unwrap_or_else(PoisonError::into_inner);
            pipes.insert(pipe);
            self.told.notify_one();
        }
    }

    fn take(&self) -> HashSet<PipeName> {
        let mut pipes = self.pipes.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut *pipes)
    }

    /// Looks at what is noted, as long as the client is there and the server can be asked.
    pub(super) async fn follow<E: Ear>(&self, client: &Weak<E>) {
        loop {
            self.told.notified().await;
            for pipe in self.take() {
                let Some(ear) = client.upgrade() else { return };
                if look(&ear, pipe).await.is_err() {
                    return;
                }
            }
        }
    }
}

/// Has the readers of `client` hear of resets from now on, as long as it is there, also after its connection broke.
/// To be called in the runtime, by each reader.
pub(super) fn open<E: Ear>(client: &Arc<E>) {
    if client.floors().are_heard_of() {
        return;
    }
    tokio::spawn(hear(Arc::downgrade(client)));
}

async fn hear<E: Ear>(client: Weak<E>) {
    let mut pause = SHORTEST;
    while let Some(ear) = client.upgrade() {
        let since = Instant::now();
        match listen(ear).await {
            Ok(hearing) => hearing.await,
            Err(error) => log::debug!("listening for resets: {error}; trying again"),
        }
        if since.elapsed() > LONGEST {
            pause = SHORTEST;
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LONGEST);
    }
}

/// Listens, and then looks at what may have been told before.
async fn listen<E: Ear>(ear: Arc<E>) -> Result<Hearing> {
    let hearing = Arc::clone(&ear).listen().await?;
    for pipe in ear.floors().pipes() {
        look(&ear, pipe).await?;
    }
    Ok(hearing)
}

async fn look<E: Ear>(ear: &Arc<E>, pipe: PipeName) -> Result<()> {
    match Arc::clone(ear).look_at(pipe.clone()).await {
        Err(error) if error.kind() == Kind::Unreachable => Err(error),
        // Its readers are told; those of the others must hear.
        Err(error) => {
            log::debug!("{pipe}: {error}");
            Ok(())
        }
        Ok(()) => Ok(()),
    }
}
