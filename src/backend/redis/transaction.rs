//! The transaction of a large push: plain `XADD`s take the server half as long as a script that calls them, and it begins
//! to read them while the last ones are still being packed.
//!
//! A transaction has no condition, but for the keys that its connection watches. So first, outside, a script looks whether
//! the push is to be stored, and the messages are sent once it has said so; who must keep the transaction from being run
//! (EXEC) later touches one of the keys (begin.lua).
//!
//! Who writes a large file pushes again at once. So once a push is stored the server is asked for the next one before that
//! is there, while it has nothing else to do.
//!
//! The answers to each `XADD` are left away (CLIENT REPLY OFF). Within a transaction CLIENT REPLY ON is run only if that
//! is, so the answers that come tell what happened.

use std::io::Write;
use std::time::Duration;

use bytes::Bytes;
use redis::{Cmd, Connection, RedisError, Value};

use super::entry::{position, text};
use super::keys::Keys;
use super::link::patience;
use super::scripts;
use crate::message::{Batch, Position, PushId};

/// Bytes that are packed before they are sent; of the first ones more where there is an answer to wait for meanwhile.
const PIECE: usize = 32 << 10;
const FIRST: usize = 256 << 10;

/// What the server echoes behind a transaction, unlike any id of a message.
const END: &str = "end";

/// More answers than this are never asked for at once: a rehearsal whose every word is answered has some fewer.
const ANSWERS: usize = 16;

/// How long an answer to a rehearsal may take: where there is none, the script is still to be waited for.
const REHEARSAL: Duration = Duration::from_secs(2);

/// What the server says to a push.
pub(super) enum Offer {
    /// The transaction may be run.
    Open,
    /// It was stored before.
    Stored(Position),
    /// What it says instead.
    Refused(Value),
}

/// Which push a connection has been used to [`ask_ahead`] for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Asked {
    Nothing,
    This,
    Another,
}

/// Asks for a push that is not there yet, as [`offer`] does. Makes no pipe for it.
pub(super) fn ask_ahead(
    connection: &mut Connection,
    keys: &Keys,
    id: PushId,
) -> Result<(), RedisError> {
    let mut out = Out::new(connection);
    out.question(keys, id, true);
    out.send()
}

/// Sends all of a push but the EXEC that has it stored: nothing of it where the server refuses a transaction, as what is
/// to be in one would then be done at once.
pub(super) fn offer(
    connection: &mut Connection,
    keys: &Keys,
    id: PushId,
    batch: &Batch,
    asked: Asked,
) -> Result<Offer, RedisError> {
    let messages = batch.messages();
    let patience = Some(patience(batch.bytes()));
    connection.set_read_timeout(patience)?;
    connection.set_write_timeout(patience)?;
    let mut out = Out::new(connection);
    if asked == Asked::Another {
        out.command(&words(&["DISCARD"]));
        out.end();
    }
    if asked != Asked::This {
        out.question(keys, id, false);
        out.send()?;
        out.enough = FIRST;
    }
    let mut entries = Entries::new(&keys.stream, messages);
    out.entries(&mut entries);
    if asked == Asked::Another {
        answers(out.connection)?;
    }
    let watched = out.connection.recv_response()?;
    let begun = out.connection.recv_response()?;
    let refused = match text(&begun) {
        _ if watched != Value::Okay => Some(Offer::Refused(watched)),
        Ok("") => None,
        Ok(id) => Some(match position(id) {
            Ok(position) => Offer::Stored(position),
            Err(_) => Offer::Refused(begun),
        }),
        Err(_) => Some(Offer::Refused(begun)),
    };
    if let Some(refused) = refused {
        return Ok(refused);
    }
    out.enough = PIECE;
    while !out.packed.is_empty() {
        out.send()?;
        out.entries(&mut entries);
    }
    out.command(&words(&["CLIENT", "REPLY", "ON"]));
    let largest = messages.iter().map(Bytes::len).max();
    let mut last = part(&["EVAL", scripts::END.code], keys, id);
    last.arg(messages.len())
        .arg(batch.bytes())
        .arg(largest.unwrap_or(0));
    out.command(&last);
    out.send()?;
    Ok(Offer::Open)
}

/// Has the transaction run, and returns what its last part says; nothing if it was not run.
pub(super) fn run(connection: &mut Connection) -> Result<Option<Value>, RedisError> {
    let mut out = Out::new(connection);
    out.command(&words(&["EXEC"]));
    out.end();
    out.send()?;
    let mut answers = answers(connection)?;
    match answers.as_mut_slice() {
        [Value::Okay] => Ok(None),
        [Value::Okay, said, Value::Okay] => Ok(Some(std::mem::replace(said, Value::Nil))),
        other => Err(unexpected(other)),
    }
}

/// Does with nothing what a push does; false where the server does not do it so.
pub(super) fn rehearse(connection: &mut Connection, gate: &str) -> Result<bool, RedisError> {
    connection.set_read_timeout(Some(REHEARSAL))?;
    connection.set_write_timeout(Some(REHEARSAL))?;
    let mut out = Out::new(connection);
    out.command(&words(&["SCRIPT", "LOAD", scripts::BEGIN.code]));
    out.command(&words(&["WATCH", gate]));
    out.command(&words(&["CLIENT", "REPLY", "OFF"]));
    out.command(&words(&["MULTI"]));
    out.command(&words(&["DISCARD"]));
    out.command(&words(&["WATCH", gate]));
    out.command(&words(&["MULTI"]));
    out.command(&words(&["ECHO", "unheard"]));
    out.command(&words(&["CLIENT", "REPLY", "ON"]));
    out.command(&words(&["ECHO", "heard"]));
    out.command(&words(&["EXEC"]));
    out.end();
    out.send()?;
    let answers = answers(connection)?;
    let is = |value, wanted: &str| text(value).is_ok_and(|text| text == wanted);
    match answers.as_slice() {
        [begin, Value::Okay, Value::Okay, heard, Value::Okay] => {
            Ok(is(begin, &scripts::BEGIN.hash) && is(heard, "heard"))
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
    while answers.len() < ANSWERS {
        let answer = connection.recv_response()?;
        if text(&answer).is_ok_and(|text| text == END) {
            return Ok(answers);
        }
        answers.push(answer);
    }
    Err(unexpected(&answers))
}

fn unexpected(answers: &[Value]) -> RedisError {
    let found = format!("{answers:?}");
    let kind = redis::ErrorKind::UnexpectedReturnType;
    (kind, "in a transaction", found).into()
}

fn words(words: &[&str]) -> Cmd {
    let mut command = Cmd::new();
    command.arg(words);
    command
}

/// A part of a transaction that knows which push it is of.
fn part(script: &[&str], keys: &Keys, id: PushId) -> Cmd {
    let mut part = words(script);
    part.arg(3).arg(&[&keys.stream, &keys.known, &keys.earlier]);
    part.arg(id.producer.as_bytes())
        .arg(format!("{:020}", id.seq));
    part
}

/// An `XADD` of each message, packed by hand, as there are many (redis.io, "RESP protocol description").
struct Entries<'a> {
    left: std::slice::Iter<'a, Bytes>,
    /// What all of them begin with: all but the last argument.
    common: Vec<u8>,
    /// What those of the last one's length begin with.
    head: Vec<u8>,
    length: Option<usize>,
}

impl<'a> Entries<'a> {
    fn new(stream: &str, messages: &'a [Bytes]) -> Self {
        let last = b"$0\r\n\r\n";
        let mut common = words(&["XADD", stream, "*", "data", ""]).get_packed_command();
        debug_assert!(common.ends_with(last));
        common.truncate(common.len() - last.len());
        Entries {
            left: messages.iter(),
            common,
            head: Vec::new(),
            length: None,
        }
    }

    /// Packs the next one, if there is one.
    fn pack(&mut self, packed: &mut Vec<u8>) -> bool {
        let Some(message) = self.left.next() else {
            return false;
        };
        if self.length != Some(message.len()) {
            self.length = Some(message.len());
            self.head.clone_from(&self.common);
            // Writing to a vector does not fail.
            let _written = write!(self.head, "${}\r\n", message.len());
        }
        packed.extend_from_slice(&self.head);
        packed.extend_from_slice(message);
        packed.extend_from_slice(b"\r\n");
        true
    }
}

/// What is on its way to the server.
struct Out<'a> {
    connection: &'a mut Connection,
    packed: Vec<u8>,
    /// From so many bytes on they are sent.
    enough: usize,
}

impl<'a> Out<'a> {
    fn new(connection: &'a mut Connection) -> Self {
        Out {
            connection,
            packed: Vec::new(),
            enough: PIECE,
        }
    }

    /// All that comes before the messages.
    fn question(&mut self, keys: &Keys, id: PushId, is_ahead: bool) {
        let mut begin = part(&["EVALSHA", &scripts::BEGIN.hash], keys, id);
        begin.arg(if is_ahead { "ahead" } else { "" });
        self.command(&words(&["WATCH", &keys.gate(), &keys.claim(id.producer)]));
        self.command(&begin);
        self.command(&words(&["CLIENT", "REPLY", "OFF"]));
        self.command(&words(&["MULTI"]));
        // With its text, as the last part: one that the server has forgotten must not fail within.
        let mark = ["EVAL", scripts::MARK.code, "2", &keys.stream, &keys.known];
        self.command(&words(&mark));
    }

    fn command(&mut self, command: &Cmd) {
        command.write_packed_command(&mut self.packed);
    }

    /// Packs entries until there are enough bytes, or no more entries.
    fn entries(&mut self, entries: &mut Entries<'_>) {
        while self.packed.len() < self.enough && entries.pack(&mut self.packed) {}
    }

    /// Ends a transaction, however it went, so that [`answers`] come to an end.
    fn end(&mut self) {
        self.command(&words(&["CLIENT", "REPLY", "ON"]));
        self.command(&words(&["ECHO", END]));
    }

    fn send(&mut self) -> Result<(), RedisError> {
        self.connection.send_packed_command(&self.packed)?;
        self.packed.clear();
        Ok(())
    }
}
