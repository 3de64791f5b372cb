//! Pipes in Redis: each is a stream, so that `XADD` and `XRANGE` of other programs push and pull too.
//!
//! - [`options`]: the source's URL.
//! - [`link`], [`login`]: connections and what their failures mean; [`failover`]: when they go elsewhere.
//! - [`client`], [`scripts`]: requests; [`settings`]: who takes them; [`keys`], [`entry`]: what lies in the database.
//! - [`push`], [`bulk`], [`transaction`]: writers; [`copies`]: what they wait for; [`source`], [`fetch`], [`progress`]: subscribers.
//!
//! A request is made once: [`super::retry::Retry`] repeats it. Whatever changes something is one script or transaction, so
//! that it happens as a whole, and one that comes late or twice does no harm: a push is known by its identity, a reset
//! drops what was there when it was asked for.

mod bulk;
mod client;
mod copies;
mod entry;
mod failover;
mod fetch;
mod keys;
mod link;
mod login;
mod options;
mod progress;
mod push;
mod resets;
mod scripts;
mod settings;
mod source;
mod transaction;

use std::sync::{Arc, Mutex, PoisonError};

use futures_util::{StreamExt, TryStreamExt, stream};
use redis::Value;

pub use options::RedisUrl;

use super::{Backend, Caps, Fut, PipeInfo, Source, Start, not_found};
use crate::error::{Error, Kind, Result};
use crate::message::{Batch, Position, PushId, time_from_micros};
use crate::name::PipeName;
use client::{Client, Lane};
use copies::Proof;
use entry::{position, strange, text};
use keys::Keys;
use source::Subscriber;

/// How many pipes are looked at together for a listing.
const TOGETHER: usize = 64;

/// The client of a Redis.
pub struct Redis {
    client: Arc<Client>,
}

/// What a look at a pipe tells.
struct Look {
    /// Nothing where it does not exist.
    info: Option<PipeInfo>,
    /// The newest message that it ever had.
    newest: Position,
    /// Behind that.
    end: Position,
    /// The longest message's bytes.
    largest: Option<usize>,
    /// Where it starts, by a reset or a removal; see [`Look::floor`].
    floor: Result<Position, String>,
    /// What tells it from another of that name.
    made: String,
    /// How many messages were ever added to it.
    added: u64,
    /// The newest one that was deleted by itself.
    deleted: Position,
}

impl Look {
    /// Where the pipe starts.
    ///
    /// # Errors
    /// `Damaged` where that makes no sense. Only readers need it: a reset or removal sets it anew.
    fn floor(&self) -> Result<Position> {
        let floor = self.floor.clone();
        floor.map_err(|why| Error::new(Kind::Damaged, why))
    }
}

/// Looks at a pipe.
async fn look(
    client: &Arc<Client>,
    lane: &Arc<Lane>,
    pipe: &PipeName,
    keys: &Keys,
) -> Result<Look> {
    let what = || format!("looking at {pipe}");
    let keys = [keys.stream.as_str(), keys.known.as_str()];
    let answer = client
        .run(lane, what, &scripts::STAT, keys, 0, |_| ())
        .await?;
    let Value::Array(fields) = answer else {
        return Err(strange("no look at a pipe"));
    };
    let [
        length,
        newest,
        first,
        last,
        bytes,
        largest,
        modified,
        floor,
        made,
        added,
        deleted,
        expires,
    ] = fields.as_slice()
    else {
        return Err(strange("no look at a pipe"));
    };
    let number = |value: &Value| match value {
        Value::Int(number) => Ok(u64::try_from(*number).ok()),
        _ => Err(strange("no number")),
    };
    let place = |value: &Value| match text(value)? {
        "" => Ok(None),
        id => position(id).map(Some),
    };
    if let Some(expires) = number(expires)? {
        client.warn_of_expiry(pipe, keys[0], expires);
    }
    let newest = place(newest)?.unwrap_or(Position::MIN);
    // Ids begin with milliseconds of the server's clock, unless somebody chose them.
    let pushed = newest.epoch().saturating_mul(1000);
    let changed = text(modified)?.parse().unwrap_or(0).max(pushed);
    let info = match number(length)? {
        None => None,
        Some(count) => Some(PipeInfo {
            count,
            bytes: number(bytes)?,
            first: place(first)?,
            last: place(last)?,
            modified: time_from_micros(changed),
        }),
    };
    let end = behind(newest);
    let floor = match place(floor) {
        // A stream that starts behind its end is not the one that was reset: others deleted that, and made this.
        Ok(floor) => Ok(floor.filter(|floor| info.is_none() || *floor <= end)),
        Err(_) => Err(format!(
            "{}: its field .floor makes no sense; a reset or removal of {pipe} mends it",
            keys[1]
        )),
    };
    Ok(Look {
        info,
        newest,
        end,
        largest: number(largest)?.map(|bytes| bytes as usize),
        floor: floor.map(|floor| floor.unwrap_or(Position::MIN)),
        made: text(made)?.to_owned(),
        added: number(added)?.unwrap_or(0),
        deleted: place(deleted)?.unwrap_or(Position::MIN),
    })
}

/// The position behind another; there is none behind the greatest.
fn behind(position: Position) -> Position {
    let (ms, seq) = (position.epoch(), position.seq());
    match (seq.checked_add(1), ms.checked_add(1)) {
        (Some(seq), _) => Position::new(ms, seq),
        (None, Some(ms)) => Position::new(ms, 0),
        (None, None) => Position::MAX,
    }
}

impl Redis {
    /// A client of the servers at `url`. Connects when it is first used.
    ///
    /// # Errors
    /// `NotFound`, `Denied` or `InvalidInput` for the files with certificates or secrets.
    pub fn open(url: &RedisUrl) -> Result<Self> {
        Ok(Redis {
            client: Arc::new(Client::new(url)?),
        })
    }

    async fn look(&self, pipe: &PipeName) -> Result<(Keys, Look)> {
        let keys = self.client.keys(pipe)?;
        let look = look(&self.client, &self.client.commands, pipe, &keys).await?;
        Ok((keys, look))
    }

    async fn info(&self, pipe: &PipeName) -> Result<PipeInfo> {
        let (_, look) = self.look(pipe).await?;
        look.info.ok_or_else(|| not_found(pipe))
    }

    /// Lets the readers here know where the pipe starts, as a script says, and returns it.
    fn dropped(&self, pipe: &PipeName, answer: &Value) -> Result<Position> {
        if matches!(answer, Value::Nil) {
            return Err(not_found(pipe));
        }
        let floor = position(text(answer)?)?;
        self.client.floors.of(pipe).raise(floor);
        Ok(floor)
    }
}

impl Backend for Redis {
    fn caps(&self) -> Caps {
        Caps {
            name: "redis",
            durable: true,
            remote: true,
            max_message: push::MAX_MESSAGE,
            whole_batches: true,
        }
    }

    fn push<'a>(&'a self, pipe: &'a PipeName, id: PushId, batch: Batch) -> Fut<'a, Position> {
        Box::pin(async move {
            failover::watch(&self.client);
            let keys = self.client.keys(pipe)?;
            let position = push::push(&self.client, pipe, &keys, id, &batch).await?;
            self.client.copied(&keys, Proof::Push(id)).await?;
            Ok(position)
        })
    }

    fn subscribe<'a>(&'a self, pipe: &'a PipeName, start: Start) -> Fut<'a, Box<dyn Source>> {
        Box::pin(async move {
            let subscriber = Subscriber::new(Arc::clone(&self.client), pipe.clone(), start)?;
            Ok(Box::new(subscriber) as Box<dyn Source>)
        })
    }

    fn stat<'a>(&'a self, pipe: &'a PipeName) -> Fut<'a, PipeInfo> {
        Box::pin(async move { self.info(pipe).await })
    }

    fn list(&self) -> Fut<'_, Vec<(PipeName, PipeInfo)>> {
        Box::pin(async move {
            let mut names = self.client.names().await?;
            names.sort_unstable();
            names.dedup();
            let denied = Mutex::new(None);
            let denied = &denied;
            let looked = stream::iter(names).map(|name| async move {
                match self.info(&name).await {
                    Ok(info) => Ok(Some((name, info))),
                    // Who may look at some pipes sees those.
                    Err(error) if error.kind() == Kind::Denied => {
                        *denied.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                        Ok(None)
                    }
                    // Gone, or made something else, since it was listed; or no name of a cluster's pipe.
                    Err(error)
                        if matches!(
                            error.kind(),
                            Kind::NotFound | Kind::Damaged | Kind::InvalidName
                        ) =>
                    {
                        Ok(None)
                    }
                    Err(error) => Err(error),
                }
            });
            let found: Vec<_> = looked.buffered(TOGETHER).try_collect().await?;
            let found: Vec<_> = found.into_iter().flatten().collect();
            let denied = denied.lock().unwrap_or_else(PoisonError::into_inner).take();
            match denied {
                Some(error) if found.is_empty() => Err(error),
                _ => Ok(found),
            }
        })
    }

    fn create<'a>(&'a self, pipe: &'a PipeName) -> Fut<'a, bool> {
        Box::pin(async move {
            let keys = self.client.keys(pipe)?;
            let made = self.client.run(
                &self.client.commands,
                || format!("making {pipe}"),
                &scripts::CREATE,
                [&keys.stream, &keys.known],
                0,
                |_| (),
            );
            let is_new = made.await? == Value::Int(1);
            self.client.copied(&keys, Proof::None).await?;
            Ok(is_new)
        })
    }

    fn reset<'a>(&'a self, pipe: &'a PipeName) -> Fut<'a, ()> {
        Box::pin(async move {
            let (keys, look) = self.look(pipe).await?;
            let dropped = self.client.run(
                &self.client.commands,
                || format!("resetting {pipe}"),
                &scripts::RESET,
                [&keys.stream, &keys.known],
                0,
                |script| {
                    script
                        .arg(look.newest.to_string())
                        .arg(self.client.channel());
                },
            );
            let floor = self.dropped(pipe, &dropped.await?)?;
            self.client.copied(&keys, Proof::Floor(floor)).await
        })
    }

    fn remove<'a>(&'a self, pipe: &'a PipeName) -> Fut<'a, ()> {
        Box::pin(async move {
            let (keys, look) = self.look(pipe).await?;
            if look.info.is_none() {
                // An earlier try may have removed it.
                self.client.copied(&keys, Proof::None).await?;
                return Err(not_found(pipe));
            }
            let gate = keys.gate();
            let dropped = self.client.run(
                &self.client.commands,
                || format!("removing {pipe}"),
                &scripts::REMOVE,
                [&keys.stream, &keys.known, &keys.earlier, &gate],
                0,
                |script| {
                    script.arg(&look.made).arg(self.client.channel());
                },
            );
            let floor = self.dropped(pipe, &dropped.await?)?;
            self.client.copied(&keys, Proof::Floor(floor)).await
        })
    }

    fn sync<'a>(&'a self, pipe: &'a PipeName) -> Fut<'a, ()> {
        Box::pin(async move { self.client.sync(&self.client.keys(pipe)?).await })
    }
}
