//! Hearing of others' resets while somebody reads: for backends whose server tells of them over a connection.

use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::time::Instant;

use super::Fut;
use super::floor::Floors;
use crate::error::{Kind, Result};
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
        match Arc::clone(&ear).look_at(pipe.clone()).await {
            Err(error) if error.kind() == Kind::Unreachable => return Err(error),
            // Its readers are told; those of the others must hear.
            Err(error) => log::debug!("{pipe}: {error}"),
            Ok(()) => {}
        }
    }
    Ok(hearing)
}
