//! Subscribers: a range of entries at a time, and a connection of their own to wait on.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use redis::Value;

use super::client::{self, Client};
use super::entry;
use super::keys::Keys;
use super::link::{ANSWER, Link, translated};
use super::progress::Progress;
use super::scripts;
use super::{Look, look};
use crate::backend::ear;
use crate::backend::floor::KnownFloor;
use crate::backend::{Floor, Fut, Limit, Source, Start, weight};
use crate::error::Result;
use crate::message::{Message, Position};
use crate::name::PipeName;

/// How long one request waits for a push. Then another one asks, so that a connection that is dead without a
/// word is noticed.
const WAIT: Duration = Duration::from_secs(5);

/// As many entries must fit into one answer for XRANGE to be asked for a number of them; otherwise a script
/// looks at their sizes.
const FEW: usize = 64;

/// A request that waits, on a connection that it keeps to itself.
type Waiting = Pin<Box<dyn Future<Output = Result<(Link, Vec<Message>)>> + Send>>;

/// A subscriber's place.
pub(super) struct Subscriber {
    client: Arc<Client>,
    pipe: PipeName,
    keys: Keys,
    floor: Arc<KnownFloor>,
    /// Up to where it is known how long the longest message is, and how long.
    known: Option<(Position, usize)>,
    /// The last message that came, and what was missed before it.
    progress: Progress,
    /// Kept while nobody looks at it, so that a caller that stops waiting loses nothing.
    waiting: Option<Waiting>,
    /// What to wait on next.
    link: Option<Link>,
}

impl Subscriber {
    pub(super) fn new(client: Arc<Client>, pipe: PipeName, start: Start) -> Result<Self> {
        let keys = client.keys(&pipe)?;
        let floor = client.floors.of(&pipe);
        ear::open(&client);
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
            known: None,
            waiting: None,
            link: None,
        })
    }

    /// Looks at the pipe, and notes how large its messages are.
    async fn look(&mut self) -> Result<Look> {
        let look = look(&self.client, &self.client.fetches, &self.pipe, &self.keys).await?;
        self.floor.raise(look.floor);
        self.known = look.largest.map(|largest| (look.newest, largest));
        Ok(look)
    }

    /// Looks whether something was missed.
    async fn check(&mut self) -> Result<Look> {
        let look = self.look().await?;
        self.progress.compare(&look);
        Ok(look)
    }

    /// What there is now behind `after` and before `before`.
    async fn fetch(&mut self, limit: Limit) -> Result<Vec<Message>> {
        let before = limit.before.unwrap_or(Position::MAX);
        let after = self.progress.after();
        if after.before() >= before || after >= before.before() {
            return Ok(Vec::new());
        }
        let from = match after {
            Position::MIN => "-".to_owned(),
            after => format!("({after}"),
        };
        let mut most = usize::MAX;
        if let Some((newest, largest)) = self.known {
            if after < newest {
                let to = newest.min(before.before()).to_string();
                let messages = self
                    .fetch_known(&from, &to, limit.max_bytes, largest)
                    .await?;
                if !messages.is_empty() {
                    return Ok(self.deliver(messages));
                }
                // Dropped meanwhile.
                self.known = None;
            } else {
                // Then it is looked how large the others are.
                most = FEW;
            }
        }
        let to = match before {
            Position::MAX => "+".to_owned(),
            before => format!("({before}"),
        };
        let messages = self
            .fetch_by_size(&from, &to, limit.max_bytes, 1, most)
            .await?;
        if messages.len() < FEW && !self.progress.is_due() {
            return Ok(self.deliver(messages));
        }
        // There may be many more.
        let look = self.look().await?;
        let messages = self.deliver(messages);
        self.progress.compare(&look);
        Ok(messages)
    }

    /// What there is of a range in which no message has more than `largest` bytes: about `bytes` of it.
    async fn fetch_known(
        &mut self,
        from: &str,
        to: &str,
        bytes: usize,
        largest: usize,
    ) -> Result<Vec<Message>> {
        // As many as certainly fit.
        let step = (bytes / (largest + weight(&[]))).max(1);
        if step < FEW {
            return self.fetch_by_size(from, to, bytes, step, usize::MAX).await;
        }
        let stream = &self.keys.stream;
        let mut range = redis::cmd("XRANGE");
        range.arg(stream).arg(from).arg(to).arg("COUNT").arg(step);
        let reading = || format!("reading {stream}");
        let under_way = largest.saturating_add(bytes);
        let found = self
            .client
            .call(&self.client.fetches, reading, under_way, &range);
        entry::messages(found.await?)
    }

    /// About `bytes` of a range, and `most` entries at most, `step` of which certainly fit.
    async fn fetch_by_size(
        &mut self,
        from: &str,
        to: &str,
        bytes: usize,
        step: usize,
        most: usize,
    ) -> Result<Vec<Message>> {
        let stream = &self.keys.stream;
        let largest = self.known.map_or(0, |(_, largest)| largest);
        let found = self.client.run(
            &self.client.fetches,
            || format!("reading {stream}"),
            &scripts::FETCH,
            [stream],
            largest.saturating_add(bytes),
            |script| {
                script.arg(from).arg(to).arg(bytes).arg(step).arg(most);
            },
        );
        entry::messages(found.await?)
    }

    fn deliver(&mut self, messages: Vec<Message>) -> Vec<Message> {
        self.progress.came(&messages);
        messages
    }

    /// Waits for the next message, or for some seconds.
    async fn wait(&mut self) -> Result<Vec<Message>> {
        let waiting = self.waiting.get_or_insert_with(|| {
            // Also the connection is made in it, which may take longer than a caller waits.
            let (client, link) = (Arc::clone(&self.client), self.link.take());
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
