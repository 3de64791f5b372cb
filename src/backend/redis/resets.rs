//! Resets by others, as the server tells of them.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use redis::aio::{AsyncPushSender, SendError};
use redis::{PushInfo, PushKind, Value};
use tokio::sync::oneshot;

use super::client::{Client, within};
use super::entry::{position, text};
use super::link::{Link, is_broken, translated};
use super::look;
use crate::backend::Fut;
use crate::backend::ear::{Ear, Hearing, Hints};
use crate::backend::floor::Floors;
use crate::name::PipeName;

/// How often the server is asked for a sign of life where it has no resets to tell of.
const PULSE: Duration = Duration::from_secs(5);

/// Lets the readers here know of resets, by whomever.
struct Resets {
    floors: Arc<Floors>,
    hints: Arc<Hints>,
    prefix: String,
    /// Dropped when the connection has ended.
    alive: Mutex<Option<oneshot::Sender<()>>>,
}

impl AsyncPushSender for Resets {
    fn send(&self, info: PushInfo) -> Result<(), SendError> {
        if info.kind == PushKind::Disconnection {
            let mut alive = self.alive.lock().unwrap_or_else(PoisonError::into_inner);
            drop(alive.take());
        }
        if info.kind == PushKind::Message
            && let [_, told] = info.data.as_slice()
            && let Ok(told) = text(told)
            && let Some((floor, stream)) = told.split_once(' ')
            && let Ok(floor) = position(floor)
            && let Some(Ok(pipe)) = stream.strip_prefix(&self.prefix).map(PipeName::new)
        {
            self.hints.note(&self.floors, pipe, floor);
        }
        Ok(())
    }
}

/// Ends when `link` answers no more. TCP does not notice where something between here and the server takes what is sent,
/// and does not pass it on. Never so in a cluster: it is not known which node tells of resets, and one that hangs must not
/// take the word of the others away.
async fn silence(link: &mut Link) {
    let Link::Single(link) = link else {
        return std::future::pending().await;
    };
    loop {
        tokio::time::sleep(PULSE).await;
        let ping = redis::cmd("PING");
        // A refusal is an answer, and the end of a connection is told.
        let pinged = ping.query_async::<Value>(link);
        if let Err(error) = within("asking for a sign of life", pinged).await {
            log::debug!("listening for resets: {error}");
            return;
        }
    }
}

impl Ear for Client {
    fn floors(&self) -> &Floors {
        &self.floors
    }

    fn listen(self: Arc<Self>) -> Fut<'static, Hearing> {
        Box::pin(async move {
            let (alive, ended) = oneshot::channel();
            // The old master hears of no resets any more, and lives on.
            let mut failovers = self.failovers.subscribe();
            let hints = Arc::<Hints>::default();
            let resets = Resets {
                floors: Arc::clone(&self.floors),
                hints: Arc::clone(&hints),
                prefix: self.url.prefix.clone(),
                alive: Mutex::new(Some(alive)),
            };
            let mut link = self.connector.connect(Some(Arc::new(resets))).await?;
            let channel = self.channel();
            let subscribed = async {
                match &mut link {
                    Link::Single(link) => link.subscribe(channel).await,
                    Link::Cluster(link) => link.subscribe(channel).await,
                }
            };
            match within("subscribing to resets", subscribed).await? {
                Ok(()) => {}
                Err(error) if is_broken(&error) => {
                    return Err(translated("subscribing to resets", error));
                }
                Err(error) => log::warn!(
                    "{}: no word of others' resets: {error}; readers may still get what they have fetched before one",
                    self.url
                ),
            }
            let client = Arc::downgrade(&self);
            let hearing = async move {
                tokio::select! {
                    () = hints.follow(&client) => {}
                    // Nothing is sent, only dropped.
                    _ = ended => {}
                    _ = failovers.changed() => {}
                    () = silence(&mut link) => {}
                }
                drop(link);
            };
            Ok(Box::pin(hearing) as Hearing)
        })
    }

    fn look_at(self: Arc<Self>, pipe: PipeName) -> Fut<'static, ()> {
        Box::pin(async move {
            let keys = self.keys(&pipe)?;
            let look = look(&self, &self.fetches, &pipe, &keys).await?;
            self.floors.of(&pipe).raise(look.floor()?);
            Ok(())
        })
    }
}
