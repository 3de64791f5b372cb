//! Large pushes, which go by transactions over connections of their own, whose calls block. Where anything is not as it
//! should be the transaction is left away, and the script that other pushes go by says why.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use redis::{Connection, RedisError, Value};

use super::entry::{position, text};
use super::keys::Keys;
use super::link::{CONNECT, Server, patience, translated};
use super::transaction::{self, Asked, Offer};
use crate::error::{Error, Kind, Result};
use crate::message::{Batch, Position, Producer, Producers, PushId};

/// From so many messages on it is faster than the script. The server keeps some 200 bytes for each message until the
/// transaction is run, which is no longer little where there are more than the second number.
const MANY: usize = 400;
const TOO_MANY: usize = 20_000;

/// Pushes at a time; those for which there is no room go by the script.
const LANES: usize = 4;

/// How long a connection is kept at least that nobody uses, and at most twice that: others on the way may forget it, too.
const IDLE: Duration = Duration::from_secs(30);

/// How long what was asked ahead holds: somebody who writes a large file is back by then.
const AHEAD: Duration = Duration::from_millis(20);

/// How long no transaction is tried after the server has let one wait in vain, and after it refused to.
const SILENT: Duration = Duration::from_secs(60);
const REFUSED: Duration = Duration::from_secs(5);

/// The connections, and who uses them.
#[derive(Default)]
pub(super) struct Bulk {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// No transaction until then.
    rests_until: Option<Instant>,
    idle: Vec<Idle>,
    /// Somebody closes those that nobody uses.
    is_swept: bool,
    under_way: Vec<Producer>,
    /// Whose last transaction may still be run, as far as is known.
    doubtful: Producers<bool>,
}

struct Idle {
    server: Server,
    connection: Connection,
    since: Instant,
    /// The push that the server has been asked for.
    asked: Option<Ahead>,
}

/// A push that may come next.
#[derive(PartialEq, Eq)]
struct Ahead {
    producer: Producer,
    seq: u64,
    stream: String,
}

impl Ahead {
    fn new(keys: &Keys, id: PushId) -> Self {
        Ahead {
            producer: id.producer,
            seq: id.seq,
            stream: keys.stream.clone(),
        }
    }
}

/// The right to push by a transaction, until it is dropped.
pub(super) struct Turn {
    bulk: Arc<Bulk>,
    producer: Producer,
}

impl State {
    /// Whether a transaction of the producer may be run behind what it pushes now.
    fn may_come(&self, producer: Producer) -> bool {
        self.under_way.contains(&producer) || self.doubtful.get(&producer) == Some(&true)
    }
}

impl Bulk {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The turn of a push that may go by a transaction: a large one, of a producer of whom no other can be under way.
    pub(super) fn turn(self: &Arc<Self>, id: PushId, batch: &Batch) -> Option<Turn> {
        if !(MANY..=TOO_MANY).contains(&batch.messages().len()) || id.repeated {
            return None;
        }
        let mut state = self.state();
        let rests = state.rests_until.is_some_and(|end| Instant::now() < end);
        if rests || state.under_way.len() >= LANES || state.may_come(id.producer) {
            return None;
        }
        state.under_way.push(id.producer);
        drop(state);
        Some(Turn {
            bulk: Arc::clone(self),
            producer: id.producer,
        })
    }

    /// Whether the claim has to be touched by the producer's next push.
    pub(super) fn may_come(&self, producer: Producer) -> bool {
        self.state().may_come(producer)
    }

    /// Notes that the claim was touched, so that nothing comes any more.
    pub(super) fn settle(&self, producer: Producer) {
        let mut state = self.state();
        if state.doubtful.get(&producer).is_some() {
            state.doubtful.set(producer, false);
        }
    }

    /// A connection to the server, unless that refuses what is done here, and what the server has been asked for on it.
    fn connection(
        &self,
        server: &Server,
        keys: &Keys,
        id: PushId,
    ) -> Result<Option<(Connection, Asked)>, RedisError> {
        let wanted = Some(Ahead::new(keys, id));
        let mut state = self.state();
        // Another one may have become a replica.
        state
            .idle
            .retain(|idle| idle.since.elapsed() < IDLE && idle.server.is(server));
        // Another producer's question may still be wanted.
        let at = (0..state.idle.len()).min_by_key(|at| {
            let Idle { asked, since, .. } = &state.idle[*at];
            (*asked != wanted, asked.is_some(), *since)
        });
        if let Some(at) = at {
            let idle = state.idle.swap_remove(at);
            let asked = match idle.asked {
                None => Asked::Nothing,
                asked if asked == wanted && idle.since.elapsed() < AHEAD => Asked::This,
                Some(_) => Asked::Another,
            };
            return Ok(Some((idle.connection, asked)));
        }
        drop(state);
        let mut connection = server.connect()?;
        let is_able = transaction::rehearse(&mut connection, &keys.gate())?;
        Ok(is_able.then_some((connection, Asked::Nothing)))
    }

    /// Keeps a connection for the next push, for a while.
    fn keep(self: &Arc<Self>, server: &Server, connection: Connection, asked: Option<Ahead>) {
        let mut state = self.state();
        state.idle.push(Idle {
            server: server.clone(),
            connection,
            since: Instant::now(),
            asked,
        });
        if !std::mem::replace(&mut state.is_swept, true) {
            let bulk = Arc::downgrade(self);
            tokio::spawn(sweep(bulk));
        }
    }

    fn rest(&self, time: Duration, why: &str) {
        let mut state = self.state();
        let is_news = state.rests_until.is_none();
        state.rests_until = Some(Instant::now() + time);
        drop(state);
        if is_news {
            log::info!("large pushes go by a script, which takes longer: {why}");
        }
    }
}

/// Closes connections that nobody uses, until there are none.
async fn sweep(bulk: Weak<Bulk>) {
    loop {
        tokio::time::sleep(IDLE).await;
        let Some(bulk) = bulk.upgrade() else { return };
        let mut state = bulk.state();
        state.idle.retain(|idle| idle.since.elapsed() < IDLE);
        state.is_swept = !state.idle.is_empty();
        if !state.is_swept {
            return;
        }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut state = self.bulk.state();
        state.under_way.retain(|other| *other != self.producer);
    }
}

/// Pushes by a transaction. Nothing where that cannot be: then nothing is stored.
///
/// Goes on although the caller stops waiting.
///
/// # Errors
/// `Unreachable`; whatever keeps the server from storing it is left to the script to say.
pub(super) async fn push(
    turn: Turn,
    server: Server,
    keys: &Keys,
    id: PushId,
    batch: &Batch,
) -> Result<Option<Position>> {
    let what = format!("pushing to {}", keys.stream);
    let all = CONNECT + 3 * patience(batch.bytes());
    let (keys, batch) = (keys.clone(), batch.clone());
    let pushing = tokio::task::spawn_blocking(move || turn.push(&server, &keys, id, &batch));
    // A server that goes on saying a little has no other end.
    match tokio::time::timeout(all, pushing).await {
        Ok(Ok(pushed)) => pushed,
        Ok(Err(panicked)) => Err(Error::new(Kind::Io, what)
            .caused_by(panicked)
            .maybe_applied()),
        Err(_) => Err(Error::new(Kind::Unreachable, what)
            .caused_by("no end of its answer")
            .maybe_applied()),
    }
}

impl Turn {
    fn push(
        &self,
        server: &Server,
        keys: &Keys,
        id: PushId,
        batch: &Batch,
    ) -> Result<Option<Position>> {
        let what = || format!("pushing to {}", keys.stream);
        let (mut connection, asked) = match self.bulk.connection(server, keys, id) {
            Ok(Some(found)) => found,
            Ok(None) => {
                let why = "the server does not watch transactions";
                self.bulk.rest(REFUSED, why);
                return Ok(None);
            }
            Err(error) => {
                // Whatever else it is took no time.
                if error.is_timeout() {
                    self.bulk.rest(SILENT, &error.to_string());
                }
                return Ok(None);
            }
        };
        match transaction::offer(&mut connection, keys, id, batch, asked) {
            Ok(Offer::Open) => {}
            Ok(Offer::Stored(position)) => return Ok(Some(position)),
            Ok(Offer::Refused(why)) => {
                log::debug!("{}: no transaction: {why:?}", what());
                return Ok(None);
            }
            // It says nothing of the server that it has closed a connection meanwhile.
            Err(error) if !error.is_timeout() => {
                log::debug!("{}: no transaction: {error}", what());
                return Ok(None);
            }
            Err(error) => {
                self.bulk.rest(SILENT, &error.to_string());
                return Err(Error::new(Kind::Unreachable, what()).caused_by(error.to_string()));
            }
        }
        let ended = transaction::run(&mut connection).map_err(|error| {
            self.bulk.state().doubtful.set(self.producer, true);
            // Whatever it is, the push may be repeated.
            let failed = Error::new(Kind::Unreachable, what()).caused_by(error.to_string());
            failed.maybe_applied()
        })?;
        let said = match ended {
            Some(Value::ServerError(error)) => {
                self.bulk.keep(server, connection, None);
                return Err(translated(what(), error.into()).maybe_applied());
            }
            Some(said) => said,
            None => Value::BulkString(Vec::new()),
        };
        let said = text(&said).map_err(Error::maybe_applied)?;
        if said.is_empty() {
            log::debug!("{}: nothing of a transaction is stored", what());
            self.bulk.keep(server, connection, None);
            return Ok(None);
        }
        let stored = position(said).map_err(Error::maybe_applied)?;
        let next = PushId {
            seq: id.seq.saturating_add(1),
            ..id
        };
        // Where that fails the push is stored all the same.
        match transaction::ask_ahead(&mut connection, keys, next) {
            Ok(()) => {
                let asked = Some(Ahead::new(keys, next));
                self.bulk.keep(server, connection, asked);
            }
            Err(error) => log::debug!("{}: asking ahead: {error}", what()),
        }
        Ok(Some(stored))
    }
}
