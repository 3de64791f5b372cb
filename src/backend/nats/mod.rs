//! Pipes on NATS JetStream, servers 2.9 and later.
//!
//! - [`options`]: the source's URL; [`names`]: pipe names as stream names.
//! - [`link`]: connections and requests; [`api`]: what JetStream is asked and answers; [`listing`]: all pipes there are.
//! - [`push`], [`repeated`], [`ids`], [`answers`], [`target`], [`tried`] and [`search`]: storing once; [`feed`],
//!   [`opening`] and [`source`]: subscribers; [`single`]: what cannot be streamed to them; [`headings`] and [`tally`]: how
//!   many bytes there are.
//! - [`warnings`]: what is said of streams that do not keep what they are given.
//!
//! A pipe is a stream; a stream that another program made is a pipe too, if its name has the prefix. A
//! message's position is the stream's time of creation and the message's number.
//!
//! A push is acknowledged when JetStream has it: on disk, but not flushed, unless the server is configured
//! with `sync_interval: always`; on a majority of the servers where the stream has replicas. That is also all
//! that [`crate::backend::Backend::sync`] can offer.
//!
//! Up to 1,000 messages of a push are stored as an atomic batch, on servers from 2.12 on and in streams that
//! allow it, as those made here do: together, or not at all, unless the server is killed amid that. A larger push is
//! stored as several of them. Elsewhere each message is stored by itself: those of others may come between. What a
//! crash leaves of a push, a repetition completes.

mod answers;
mod api;
mod feed;
mod headings;
mod ids;
mod link;
mod listing;
mod names;
mod opening;
mod options;
mod push;
mod repeated;
mod resets;
mod search;
mod single;
mod source;
mod tally;
mod target;
mod tried;
mod warnings;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::Semaphore;

pub use options::NatsUrl;

use super::broker::made_to_its_end;
use super::floor::Floors;
use super::{Backend, Caps, Fut, PipeInfo, Source, Start, not_found, secret};
use crate::error::{Error, Kind, Result};
use crate::message::{Batch, Position, PushId};
use crate::name::PipeName;
use api::{ApiError, Info, NOT_FOUND};
use ids::Tags;
use link::{Line, Link, MISSES, SETTLE};
use push::Push;
use source::Subscriber;
use tally::Tallies;
use target::Stream;
use tried::{Turn, Turns};

/// How long it is taken for granted that a stream was not removed and made again.
const FRESH: Duration = Duration::from_secs(1);

/// How many searches go on at a time.
const SEARCHES: usize = 4;

/// The client of NATS servers.
pub struct Nats {
    shared: Arc<Shared>,
}

struct Shared {
    url: Arc<NatsUrl>,
    /// For pushes and all that is asked.
    asking: Line,
    /// For messages that stream out, which would keep pushes up.
    reading: Arc<Line>,
    /// Pipes that hold messages over which the connection breaks.
    odd: Mutex<HashSet<PipeName>>,
    floors: Floors,
    tallies: Tallies,
    /// Streams that were pushed to.
    streams: Mutex<HashMap<PipeName, Arc<Stream>>>,
    turns: Turns,
    /// Searches for what was pushed before, which nobody ends.
    searches: Semaphore,
    tags: Tags,
    /// What was said last of streams' limits.
    limits: Mutex<HashMap<String, String>>,
    /// What else was warned of.
    warned: Mutex<HashSet<String>>,
    /// The last list.
    listed: Mutex<BTreeMap<PipeName, PipeInfo>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    /// What the server says of a pipe's stream now.
    async fn look(&self, link: &Link, pipe: &PipeName) -> Result<Option<Info>> {
        let name = self.url.naming.stream(pipe)?;
        let info = link.info(&name).await?;
        if let Some(info) = &info {
            self.floors.of(pipe).raise(info.floor()?);
            self.warn_of_limits(info, link);
        }
        Ok(info)
    }

    /// What a pipe's user wants to know.
    async fn describe(&self, pipe: &PipeName, info: &Info) -> Result<PipeInfo> {
        info.pipe(self.tallies.bytes(pipe, info).await)
    }

    /// Whether the connection breaks over messages of the pipe.
    fn is_odd(&self, pipe: &PipeName) -> bool {
        lock(&self.odd).contains(pipe)
    }

    /// A connection that breaks for nobody else.
    fn own_line(&self) -> Line {
        self.asking.apart()
    }

    /// What the server says of a pipe's stream to one who reads it by way of `line`.
    async fn look_by(&self, line: &Line, pipe: &PipeName) -> Result<Option<Info>> {
        line.ask(|link| async move { self.look(&link, pipe).await })
            .await
    }

    /// Keeps others from what message `seq` of the pipe does to a connection: its readers get their own.
    fn set_apart(&self, pipe: &PipeName, seq: u64) {
        if lock(&self.odd).insert(pipe.clone()) {
            log::warn!(
                "{pipe}: the headers or the subject of message {seq} are malformed; such messages of other \
                 programs are read, but slowly"
            );
        }
    }

    /// The pipe's stream; it is made if there is none.
    async fn stream(&self, link: &Link, pipe: &PipeName) -> Result<Arc<Stream>> {
        if let Some(stream) = lock(&self.streams).get(pipe) {
            return Ok(Arc::clone(stream));
        }
        // It may be removed before it is looked at again, or be news to the server that is asked.
        for miss in 0..=MISSES {
            if miss > 0 {
                tokio::time::sleep(SETTLE * (1 << miss)).await;
            }
            if let Some(info) = self.look(link, pipe).await? {
                let stream = Arc::new(Stream::new(&info, link)?);
                self.warn_of_doubling(&stream);
                lock(&self.streams).insert(pipe.clone(), Arc::clone(&stream));
                return Ok(stream);
            }
            self.create(link, pipe).await?;
        }
        Err(Error::new(
            Kind::Unreachable,
            format!("the stream of {pipe} is made, and still not there"),
        ))
    }

    /// Makes the pipe's stream; `false` if it was there.
    async fn create(&self, link: &Link, pipe: &PipeName) -> Result<bool> {
        let name = self.url.naming.stream(pipe)?;
        link.create(&name, &self.url, &self.tags).await
    }

    fn forget(&self, pipe: &PipeName) {
        lock(&self.streams).remove(pipe);
    }

    async fn push(
        self: &Arc<Self>,
        pipe: &PipeName,
        turn: Turn,
        wanted: Weak<()>,
        id: PushId,
        batch: Batch,
    ) -> Result<Position> {
        let known = lock(&self.streams).get(pipe).cloned();
        let stale = known
            .as_ref()
            .is_some_and(|known| known.seen.elapsed() > FRESH);
        // Of a pipe that was removed since it has to be stored again.
        if let Some((position, since)) = turn.stored(batch.messages().len())
            && known.is_some_and(|known| known.epoch == position.epoch())
            && (!stale || since.elapsed() < FRESH)
        {
            return Ok(position);
        }
        let link = self.asking.link().await?;
        batch.check(link.max_message())?;
        let mut push = Push::new(
            Arc::clone(self),
            Arc::clone(&link),
            pipe.clone(),
            turn,
            wanted,
            id,
            batch,
        );
        // What others have changed in its settings may be why it fails.
        let pushed = match stale {
            false => push.run().await,
            true => self.push_and_look(&mut push, &link, pipe).await,
        };
        match pushed {
            Ok(position) => push.end(position),
            Err(_) => self.forget(pipe),
        }
        pushed
    }

    /// Pushes, and looks meanwhile whether others have removed the pipe and made it again: positions are of another epoch
    /// then. The push does not wait for that to be known, unless it cannot be answered.
    async fn push_and_look(
        &self,
        push: &mut Push,
        link: &Arc<Link>,
        pipe: &PipeName,
    ) -> Result<Position> {
        let look = async {
            match self.look(link, pipe).await {
                Ok(Some(info)) => match Stream::new(&info, link) {
                    Ok(stream) => Ok(Some(Arc::new(stream))),
                    Err(error) => Err(error.maybe_applied()),
                },
                _ => Ok(None),
            }
        };
        let (position, stream) = tokio::try_join!(push.run(), look)?;
        match stream {
            Some(stream) => {
                lock(&self.streams).insert(pipe.clone(), Arc::clone(&stream));
                Ok(stream.position(position.seq()))
            }
            None => {
                self.forget(pipe);
                Ok(position)
            }
        }
    }
}

impl Nats {
    /// A client of the servers at `url`. Connects when it is first used.
    ///
    /// # Errors
    /// `NotFound` or `Denied` for the files with certificates and credentials; `Io` without randomness.
    pub fn open(url: &NatsUrl) -> Result<Self> {
        let tls = url.broker.tls.iter();
        let files = tls.flat_map(|tls| {
            let identity = tls.identity.iter().flat_map(|(cert, key)| [cert, key]);
            tls.ca.iter().chain(identity)
        });
        // Read again at every connection, as they may be renewed.
        for file in files.chain(&url.creds) {
            secret::read(file)?;
        }
        let url = Arc::new(url.clone());
        let asking = Line::new(Arc::clone(&url));
        Ok(Nats {
            shared: Arc::new(Shared {
                reading: Arc::new(asking.apart()),
                tallies: Tallies::new(asking.apart()),
                asking,
                odd: Mutex::default(),
                url,
                floors: Floors::default(),
                streams: Mutex::default(),
                turns: Turns::default(),
                searches: Semaphore::new(SEARCHES),
                tags: Tags::random()?,
                limits: Mutex::default(),
                warned: Mutex::default(),
                listed: Mutex::default(),
            }),
        })
    }

    /// The stream of `pipe` as it is now.
    async fn found(&self, pipe: &PipeName) -> Result<(Arc<Link>, Info)> {
        let link = self.shared.asking.link().await?;
        match self.shared.look(&link, pipe).await? {
            Some(info) => Ok((link, info)),
            None => Err(not_found(pipe)),
        }
    }
}

/// More than this no server takes, in bytes (nats.io, "max_payload").
const MAX_PAYLOAD: usize = 64 << 20;

/// Whether the server did what was asked.
fn done(pipe: &PipeName, answer: Result<Value, ApiError>) -> Result<()> {
    match answer {
        Ok(_) => Ok(()),
        Err(error) if error.is(NOT_FOUND) => Err(not_found(pipe)),
        Err(error) => Err(error.typed()),
    }
}

impl Backend for Nats {
    fn caps(&self) -> Caps {
        let link = self.shared.asking.last();
        Caps {
            name: "nats",
            durable: true,
            remote: true,
            // The server says it when it is connected to.
            max_message: link.as_ref().map_or(MAX_PAYLOAD, |link| link.max_message()),
            whole_batches: link.as_ref().is_none_or(|link| link.knows_batches()),
        }
    }

    fn push<'a>(&'a self, pipe: &'a PipeName, id: PushId, batch: Batch) -> Fut<'a, Position> {
        Box::pin(async move {
            // Who gives up before its turn has not pushed; there is one task for a producer at most.
            let turn = self.shared.turns.take(pipe, id).await;
            let caller = Arc::new(());
            let wanted = Arc::downgrade(&caller);
            if batch.messages().len() == 1 && !id.repeated {
                return self.shared.push(pipe, turn, wanted, id, batch).await;
            }
            // Dropping this future must not cut the batch, nor the search for what was stored: signals that come one
            // after the other would have it begin again and again.
            let (shared, pipe) = (Arc::clone(&self.shared), pipe.clone());
            let pushing = async move { Ok(shared.push(&pipe, turn, wanted, id, batch).await) };
            let pushed = made_to_its_end(pushing).await;
            drop(caller);
            pushed.map_err(Error::maybe_applied)?
        })
    }

    fn subscribe<'a>(&'a self, pipe: &'a PipeName, start: Start) -> Fut<'a, Box<dyn Source>> {
        Box::pin(async move {
            let subscriber = Subscriber::new(Arc::clone(&self.shared), pipe.clone(), start);
            Ok(Box::new(subscriber) as Box<dyn Source>)
        })
    }

    fn stat<'a>(&'a self, pipe: &'a PipeName) -> Fut<'a, PipeInfo> {
        Box::pin(async move {
            let (_, info) = self.found(pipe).await?;
            self.shared.describe(pipe, &info).await
        })
    }

    fn list(&self) -> Fut<'_, Vec<(PipeName, PipeInfo)>> {
        Box::pin(async move {
            let link = self.shared.asking.link().await?;
            self.shared.list(&link).await
        })
    }

    fn create<'a>(&'a self, pipe: &'a PipeName) -> Fut<'a, bool> {
        Box::pin(async move {
            let link = self.shared.asking.link().await?;
            self.shared.create(&link, pipe).await
        })
    }

    fn reset<'a>(&'a self, pipe: &'a PipeName) -> Fut<'a, ()> {
        Box::pin(async move {
            let (link, info) = self.found(pipe).await?;
            if info.state.messages > 0 {
                // What is pushed later is not meant, should this come late, or twice.
                let keep = info.state.last_seq + 1;
                let what = format!("STREAM.PURGE.{}", info.config.name);
                done(pipe, link.api(&what, &json!({ "seq": keep })).await?)?;
            }
            self.shared.dropped(&link, pipe, info.end()?).await
        })
    }

    fn remove<'a>(&'a self, pipe: &'a PipeName) -> Fut<'a, ()> {
        Box::pin(async move {
            let (link, info) = self.found(pipe).await?;
            let what = format!("STREAM.DELETE.{}", info.config.name);
            done(pipe, link.api_once(&what, &Value::Null).await?)?;
            self.shared.forget(pipe);
            let later = Position::new(info.epoch()?.saturating_add(1), 0);
            self.shared.dropped(&link, pipe, later).await
        })
    }

    fn sync<'a>(&'a self, _pipe: &'a PipeName) -> Fut<'a, ()> {
        // What is acknowledged is as durable as the server makes it: nothing can be asked of it.
        Box::pin(async { Ok(()) })
    }
}
