//! Subscribers: a range of entries at a time, and a connection of their own to wait on.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use redis::Value;

use super::client::{self, Client};
use super::entry;
use super::failover;
use super::fetch::{Fetch, Fetched, Sizes};
use super::keys::Keys;
use super::link::{ANSWER, Link, translated};
use super::progress::Progress;
use super::{Look, look};
use crate::backend::ear;
use crate::backend::floor::KnownFloor;
use crate::backend::{Floor, Fut, Limit, Source, Start};
use crate::error::Result;
use crate::message::{Message, Position};
use crate::name::PipeName;

/// How long one request waits for a push. Then another one asks, so that a connection that is dead without a
/// word is noticed.
const WAIT: Duration = Duration::from_secs(5);

/// A request that waits, on a connection that it keeps to itself.
type Waiting = Pin<Box<dyn Future<Output = Result<(Link, Vec<Message>)>> + Send>>;

/// A request for entries behind a position. It is kept while nobody looks at it: made anew each time, a caller that
/// stops waiting more often than the server answers would never get one.
struct Fetching {
    of: (Position, Limit),
    answer: Pin<Box<dyn Future<Output = Result<Fetched>> + Send>>,
}

/// A subscriber's place.
pub(super) struct Subscriber {
    client: Arc<Client>,
    pipe: PipeName,
    keys: Keys,
    floor: Arc<KnownFloor>,
    sizes: Sizes,
    /// The last message that came, and what was missed before it.
    progress: Progress,
    fetching: Option<Fetching>,
    /// Kept while nobody looks at it, so that a caller that stops waiting loses nothing.
    waiting: Option<Waiting>,
    /// What to wait on next, as long as there is no failover.
    link: Option<Link>,
    failovers: u64,
}

impl Subscriber {
    pub(super) fn new(client: Arc<Client>, pipe: PipeName, start: Start) -> Result<Self> {
        let keys = client.keys(&pipe)?;
        let floor = client.floors.of(&pipe);
        ear::open(&client);
        failover::watch(&client);
        let after = match start {
            Start::Oldest => Position::MIN,
            Start::After(position) => position,
        };
        Ok(Subscriber {
            progress: Progress::new(&client.places, &pipe, after),
            client,
            pipe,
            keys,
            floor,
            sizes: Sizes::Unasked,
            fetching: None,
            waiting: None,
            link: None,
            failovers: 0,
        })
    }

    /// Notes where the pipe starts, and how large its messages are.
    fn note(&mut self, look: &Look) -> Result<()> {
        self.floor.raise(look.floor()?);
        let newest = look.newest;
        self.sizes = match look.largest {
            Some(largest) => Sizes::UpTo { newest, largest },
            None => Sizes::Untold,
        };
        Ok(())
    }

    /// Looks whether something was missed.
    async fn check(&mut self) -> Result<Look> {
        let look = look(&self.client, &self.client.fetches, &self.pipe, &self.keys).await?;
        self.note(&look)?;
        self.progress.compare(&look);
        Ok(look)
    }

    /// What there is now behind the last message and before the limit.
    async fn fetch(&mut self, limit: Limit) -> Result<Vec<Message>> {
        let before = limit.before.unwrap_or(Position::MAX);
        loop {
            let after = self.progress.after();
            if after.before() >= before || after >= before.before() {
                return Ok(Vec::new());
            }
            let of = (after, limit);
            let kept = self.fetching.take().filter(|fetching| fetching.of == of);
            // That nothing is there was so when it was asked; who waits next finds what came since.
            let is_now = kept.is_none() || limit.before.is_none();
            let fetching = self.fetching.insert(kept.unwrap_or_else(|| Fetching {
                of,
                answer: Box::pin(self.to_fetch(of).run()),
            }));
            let fetched = (&mut fetching.answer).await;
            self.fetching = None;
            let messages = self.came(fetched?)?;
            if !messages.is_empty() || is_now && self.progress.after() == after {
                return Ok(messages);
            }
        }
    }

    /// Notes what was fetched, and takes out what was dropped since.
    fn came(&mut self, fetched: Fetched) -> Result<Vec<Message>> {
        if fetched.is_unknown && matches!(self.sizes, Sizes::UpTo { .. }) {
            self.sizes = Sizes::Untold;
        }
        if let Some(look) = &fetched.look {
            self.note(look)?;
        }
        let mut messages = fetched.messages;
        self.progress.came(&messages);
        if let Some(look) = &fetched.look {
            self.progress.compare(look);
        }
        let floor = self.floor.position();
        messages.retain(|message| message.position >= floor);
        Ok(messages)
    }

    fn to_fetch(&self, (after, limit): (Position, Limit)) -> Fetch {
        Fetch {
            client: Arc::clone(&self.client),
            pipe: self.pipe.clone(),
            keys: self.keys.clone(),
            after,
            limit,
            sizes: self.sizes,
            is_due: self.progress.is_due(),
        }
    }

    /// Waits for the next message, or for some seconds.
    async fn wait(&mut self) -> Result<Vec<Message>> {
        let waiting = self.waiting.get_or_insert_with(|| {
            // Also the connection is made in it, which may take longer than a caller waits.
            let failovers = *self.client.failovers.borrow();
            let is_same = std::mem::replace(&mut self.failovers, failovers) == failovers;
            let link = self.link.take().filter(|_| is_same);
            let client = Arc::clone(&self.client);
            let after = self.progress.after();
            Box::pin(wait(client, link, self.keys.stream.clone(), after))
        });
        let waited = waiting.await;
        self.waiting = None;
        let (link, mut messages) = waited?;
        self.link = Some(link);
        // Some may have been fetched since it was asked, or dropped.
        let (after, floor) = (self.progress.after(), self.floor.position());
        messages.retain(|message| message.position > after);
        // Also what is dropped here: asked for again, it would come again, and at once.
        self.progress.came(&messages);
        messages.retain(|message| message.position >= floor);
        Ok(messages)
    }
}

/// Asks for the next entry, one as it could be large; those behind it are fetched.
async fn wait(
    client: Arc<Client>,
    link: Option<Link>,
    stream: String,
    after: Position,
) -> Result<(Link, Vec<Message>)> {
    let mut link = match link {
        Some(link) => link,
        None => client.own_link().await?,
    };
    let mut read = redis::cmd("XREAD");
    read.arg("COUNT")
        .arg(1)
        .arg("BLOCK")
        .arg(WAIT.as_millis() as u64);
    read.arg("STREAMS").arg(&stream).arg(after.to_string());
    let what = || format!("waiting for {stream}");
    let answer = tokio::time::timeout(WAIT + ANSWER, read.query_async::<Value>(&mut link)).await;
    match answer {
        Ok(Ok(value)) => Ok((link, entry::read(value)?)),
        Ok(Err(error)) => Err(translated(what(), error)),
        Err(_) => Err(client::no_answer(what(), WAIT + ANSWER)),
    }
}

impl Source for Subscriber {
    fn next(&mut self, limit: Limit) -> Fut<'_, Vec<Message>> {
        Box::pin(async move {
            // Where somebody waits already, what he waits for is the next.
            if limit.before.is_some() || self.waiting.is_none() {
                let messages = self.fetch(limit).await?;
                if !messages.is_empty() || limit.before.is_some() {
                    return Ok(messages);
                }
            }
            loop {
                let messages = self.wait().await?;
                if !messages.is_empty() {
                    return Ok(messages);
                }
                if self.progress.is_due() {
                    self.check().await?;
                }
            }
        })
    }

    fn floor(&self) -> Arc<dyn Floor> {
        Arc::clone(&self.floor) as Arc<dyn Floor>
    }

    fn end(&mut self) -> Fut<'_, Position> {
        Box::pin(async move { Ok(self.check().await?.end) })
    }
}
