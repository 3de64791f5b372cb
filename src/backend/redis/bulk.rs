//! Large pushes: a transaction of plain `XADD`s takes the server half as long as a script that calls them, and it
//! begins to read them while the last ones are still being packed.
//!
//! A transaction has no condition, but for the keys that its connection watches. So first, outside, a script looks whether
//! the push is to be stored, and the transaction is run (EXEC) once it has said so; who must keep it from being run later
//! touches one of the keys (bulk.lua). Where anything is not as it should be it is left away, and the script that other
//! pushes go by says why.
//!
//! It is done over connections of their own, whose calls block, as they take what is packed already, in pieces; and
//! without the answers to each `XADD` (CLIENT REPLY OFF). Within a transaction CLIENT REPLY ON is run only if that is, so
//! the answers that come tell what happened.

use std::io::Write;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use redis::{Cmd, Connection, RedisError, Value};

use super::client::{Client, patience};
use super::entry::{position, text};
use super::keys::Keys;
use super::link::{ANSWER, Server, translated};
use super::scripts;
use crate::error::{Error, Kind, Result};
use crate::message::{Batch, Position, Producer, PushId};

/// From so many messages on it is faster than the script.
const MANY: usize = 400;

/// Pushes at a time; those for which there is no room go by the script.
const LANES: usize = 4;

/// Bytes that are packed before they are sent.
const PIECE: usize = 32 << 10;

/// What the server echoes behind a transaction, unlike any id of a message.
const END: &str = "end";

/// The connections, and who uses them.
#[derive(Default)]
pub(super) struct Bulk {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// The server does not do as is asked here.
    is_refused: bool,
    idle: Vec<(Server, Connection)>,
    under_way: Vec<Producer>,
}

/// The right to push by a transaction, until it is dropped.
pub(super) struct Turn {
    bulk: Arc<Bulk>,
    producer: Producer,
}

impl Bulk {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The turn of a push that may go by a transaction: a large one, of which no earlier try can be under way.
    pub(super) fn turn(self: &Arc<Self>, id: PushId, batch: &Batch) -> Option<Turn> {
        if batch.messages().len() < MANY || id.repeated {
            return None;
        }
        let mut state = self.state();
        if state.is_refused
            || state.under_way.len() >= LANES
            || state.under_way.contains(&id.producer)
        {
            return None;
        }
        state.under_way.push(id.producer);
        drop(state);
        Some(Turn {
            bulk: Arc::clone(self),
            producer: id.producer,
        })
    }

    /// Whether a transaction is under way of which nobody waits to hear, if the producer pushes again.
    pub(super) fn is_under_way(&self, producer: Producer) -> bool {
        self.state().under_way.contains(&producer)
    }

    /// A connection to the server, unless that refuses what is done here.
    fn connection(&self, server: &Server, gate: &str) -> Result<Option<Connection>, RedisError> {
        let mut state = self.state();
        // Another one may have become a replica.
        state.idle.retain(|(other, _)| other.is(server));
        if let Some((_, connection)) = state.idle.pop() {
            return Ok(Some(connection));
        }
        drop(state);
        let mut connection = server.connect()?;
        if rehearse(&mut connection, gate)? {
            return Ok(Some(connection));
        }
        log::info!(
            "the server does not let transactions be watched; large pushes go by a script, too"
        );
        self.state().is_refused = true;
        Ok(None)
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
    client: &Client,
    keys: &Keys,
    id: PushId,
    batch: &Batch,
) -> Result<Option<Position>> {
    let Some(server) = client.server() else {
        return Ok(None);
    };
    let (keys, batch) = (keys.clone(), batch.clone());
    let pushed = tokio::task::spawn_blocking(move || turn.push(&server, &keys, id, &batch));
    pushed.await.map_err(|error| {
        Error::new(Kind::Io, "pushing")
            .caused_by(error)
            .maybe_applied()
    })?
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
        let mut connection = match self.bulk.connection(server, &keys.gate()) {
            Ok(Some(connection)) => connection,
            Ok(None) => return Ok(None),
            Err(error) => return not_begun(what(), error),
        };
        match offer(&mut connection, keys, id, batch) {
            Ok(Offer::Open) => {}
            Ok(Offer::Stored(position)) => return Ok(Some(position)),
            Ok(Offer::Refused(why)) => {
                log::debug!("{}: no transaction: {why:?}", what());
                return Ok(None);
            }
            Err(error) => return not_begun(what(), error),
        }
        let ended = run(&mut connection).map_err(|error| {
            // Whatever it is, the push may be repeated.
            let failed = Error::new(Kind::Unreachable, what()).caused_by(error.to_string());
            failed.maybe_applied()
        })?;
        // Now it is as it was before.
        self.bulk.state().idle.push((server.clone(), connection));
        match ended {
            None => Ok(None),
            Some(Value::ServerError(error)) => {
                Err(translated(what(), error.into()).maybe_applied())
            }
            Some(id) => position(text(&id)?).map(Some),
        }
    }
}

/// A failure before there was anything to run. A connection that was closed meanwhile says nothing of the server.
fn not_begun(what: String, error: RedisError) -> Result<Option<Position>> {
    if error.is_timeout() {
        return Err(Error::new(Kind::Unreachable, what).caused_by(error.to_string()));
    }
    log::debug!("{what}: no transaction: {error}");
    Ok(None)
}

/// What the server says to a push.
enum Offer {
    /// The transaction may be run.
    Open,
    /// It was stored before.
    Stored(Position),
    /// What it says instead.
    Refused(Value),
}

/// Sends all of a push but the EXEC that has it stored.
fn offer(
    connection: &mut Connection,
    keys: &Keys,
    id: PushId,
    batch: &Batch,
) -> Result<Offer, RedisError> {
    let messages = batch.messages();
    let patience = Some(patience(batch.bytes()));
    connection.set_read_timeout(patience)?;
    connection.set_write_timeout(patience)?;
    let number = format!("{:020}", id.seq);
    let part = || {
        let mut part = words(&["EVALSHA", &scripts::BULK.hash, "3"]);
        part.arg(&[&keys.stream, &keys.known, &keys.earlier]);
        part.arg(id.producer.as_bytes()).arg(&number);
        part
    };
    let mut out = Out {
        connection,
        packed: Vec::with_capacity(2 * PIECE),
    };
    out.command(&words(&["WATCH", &keys.gate(), &keys.claim(id.producer)]));
    out.command(&part());
    out.command(&words(&["CLIENT", "REPLY", "OFF"]));
    out.command(&words(&["MULTI"]));
    let mark = [
        "EVALSHA",
        &scripts::MARK.hash,
        "2",
        &keys.stream,
        &keys.known,
    ];
    out.command(&words(&mark));
    // The server may begin.
    out.send()?;
    let head = head(&keys.stream);
    for message in messages {
        out.entry(&head, message)?;
    }
    out.command(&words(&["CLIENT", "REPLY", "ON"]));
    let largest = messages.iter().map(Bytes::len).max();
    let mut last = part();
    last.arg(messages.len())
        .arg(batch.bytes())
        .arg(largest.unwrap_or(0));
    out.command(&last);
    out.send()?;
    let watched = connection.recv_response()?;
    let begun = connection.recv_response()?;
    if watched != Value::Okay {
        return Ok(Offer::Refused(watched));
    }
    match text(&begun) {
        Ok("") => Ok(Offer::Open),
        Ok(id) => match position(id) {
            Ok(position) => Ok(Offer::Stored(position)),
            Err(_) => Ok(Offer::Refused(begun)),
        },
        Err(_) => Ok(Offer::Refused(begun)),
    }
}

/// Has the transaction run, and returns what its last part says; nothing if it was not run.
fn run(connection: &mut Connection) -> Result<Option<Value>, RedisError> {
    let mut out = Out {
        connection,
        packed: Vec::new(),
    };
    out.command(&words(&["EXEC"]));
    out.end()?;
    let mut answers = answers(connection)?;
    match answers.as_mut_slice() {
        [Value::Okay] => Ok(None),
        [Value::Okay, said, Value::Okay] => Ok(Some(std::mem::replace(said, Value::Nil))),
        other => {
            let found = format!("{other:?}");
            Err((redis::ErrorKind::UnexpectedReturnType, "EXEC", found).into())
        }
    }
}

/// Does with nothing what a push does; false where the server does not do it so.
fn rehearse(connection: &mut Connection, gate: &str) -> Result<bool, RedisError> {
    connection.set_read_timeout(Some(ANSWER))?;
    connection.set_write_timeout(Some(ANSWER))?;
    let mut out = Out {
        connection,
        packed: Vec::new(),
    };
    for script in [&scripts::MARK, &scripts::BULK] {
        out.command(&words(&["SCRIPT", "LOAD", script.code]));
    }
    out.command(&words(&["WATCH", gate]));
    out.command(&words(&["CLIENT", "REPLY", "OFF"]));
    out.command(&words(&["MULTI"]));
    out.command(&words(&["ECHO", "unheard"]));
    out.command(&words(&["CLIENT", "REPLY", "ON"]));
    out.command(&words(&["ECHO", "heard"]));
    out.command(&words(&["EXEC"]));
    out.end()?;
    let answers = answers(connection)?;
    let is = |value, wanted: &str| text(value).is_ok_and(|text| text == wanted);
    match answers.as_slice() {
        [mark, bulk, Value::Okay, Value::Okay, heard, Value::Okay] => {
            Ok(
                is(mark, &scripts::MARK.hash)
                    && is(bulk, &scripts::BULK.hash)
                    && is(heard, "heard"),
            )
        }
        other => {
            log::debug!("rehearsing a transaction: {other:?}");
            Ok(false)
        }
    }
}

/// What is answered before [`END`].
fn answers(connection: &mut Connection) -> Result<Vec<Value>, RedisError> {
    let mut answers = Vec::new();
    loop {
        let answer = connection.recv_response()?;
        if text(&answer).is_ok_and(|text| text == END) {
            return Ok(answers);
        }
        answers.push(answer);
    }
}

fn words(words: &[&str]) -> Cmd {
    let mut command = Cmd::new();
    command.arg(words);
    command
}

/// What all entries of a push begin with: an `XADD` up to its last argument.
fn head(stream: &str) -> Vec<u8> {
    let last = b"$0\r\n\r\n";
    let mut head = words(&["XADD", stream, "*", "data", ""]).get_packed_command();
    debug_assert!(head.ends_with(last));
    head.truncate(head.len() - last.len());
    head
}

/// What is on its way to the server.
struct Out<'a> {
    connection: &'a mut Connection,
    packed: Vec<u8>,
}

impl Out<'_> {
    fn command(&mut self, command: &Cmd) {
        command.write_packed_command(&mut self.packed);
    }

    /// An `XADD` of a message, packed by hand, as there are many (redis.io, "RESP protocol description").
    fn entry(&mut self, head: &[u8], message: &[u8]) -> Result<(), RedisError> {
        self.packed.extend_from_slice(head);
        // Writing to a vector does not fail.
        let _written = write!(self.packed, "${}\r\n", message.len());
        self.packed.extend_from_slice(message);
        self.packed.extend_from_slice(b"\r\n");
        match self.packed.len() < PIECE {
            true => Ok(()),
            false => self.send(),
        }
    }

    /// Ends a transaction, however it went, so that [`answers`] come to an end.
    fn end(&mut self) -> Result<(), RedisError> {
        self.command(&words(&["CLIENT", "REPLY", "ON"]));
        self.command(&words(&["ECHO", END]));
        self.send()
    }

    fn send(&mut self) -> Result<(), RedisError> {
        self.connection.send_packed_command(&self.packed)?;
        self.packed.clear();
        Ok(())
    }
}
