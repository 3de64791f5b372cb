//! What the gateway and its client say to each other: JSON documents, headers, and the stream of records
//! in which messages travel with their positions.

use std::borrow::Cow;
use std::time::SystemTime;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use sha2::{Digest, Sha256};

use crate::backend::PipeInfo;
use crate::error::{Applied, Error, Kind, Result};
use crate::message::{Message, Position, Producer, PushId, micros_from_time, time_from_micros};
use crate::name::PipeName;

/// Longest message that travels, in bytes.
pub const MAX_MESSAGE: usize = 64 << 20;

/// Longest body of a push that is stored as one batch, in bytes: what one request of a mount can end, the longest message
/// and others behind it, each with its length.
pub const MAX_BODY: usize = MAX_MESSAGE + (1 << 20) + 4 * MAX_MESSAGES;

/// Most messages in such a body: as many as one request of a mount can hold.
pub const MAX_MESSAGES: usize = 1 << 20;

/// The media type of [`Record`]s.
pub const RECORDS: &str = "application/vnd.dnpipes.records";

/// The media type of the `len` frame.
pub const LEN: &str = "application/vnd.dnpipes.len";

/// The media type of [`Problem`] (RFC 9457).
pub const PROBLEM: &str = "application/problem+json";

/// The header that bears a push's identity (draft-ietf-httpapi-idempotency-key-header).
pub const KEY: &str = "idempotency-key";

/// The header by which a client says that it sends this key for the first time ([`FIRST`]), so that nobody
/// needs to look for an earlier push.
pub const ATTEMPT: &str = "dnpipes-attempt";

/// The value of [`ATTEMPT`].
pub const FIRST: &str = "first";

/// How often a stream that has nothing to say says so, in seconds.
pub const HEARTBEAT: u64 = 5;

/// What the keys of mounts and commands begin with. Those of other programs, which may look as they like, must not be
/// taken for such: of these a store remembers one producer's last number only, and takes those below it for stored.
const OWN: &str = "dnpipes-";

/// A push's identity as the value of [`KEY`]: a mark, 32 hexadecimal digits, a dash, a number.
pub fn key(id: PushId) -> String {
    let producer = u128::from_be_bytes(*id.producer.as_bytes());
    format!("\"{OWN}{producer:032x}-{}\"", id.seq)
}

/// The identity that a value of [`KEY`] stands for. Other values than those of [`key`] are taken as they
/// are: they name a producer of one push. It is marked as repeated.
///
/// # Errors
/// [`Kind::InvalidInput`] for one that is empty or longer than 256 bytes.
pub fn identity(key: &[u8]) -> Result<PushId> {
    if key.is_empty() || key.len() > 256 {
        return Err(Error::new(
            Kind::InvalidInput,
            format!("the {KEY} is empty or longer than 256 bytes"),
        ));
    }
    let own = str::from_utf8(key).ok().and_then(|text| {
        let text = text.strip_prefix('"')?.strip_suffix('"')?;
        let (producer, seq) = text.strip_prefix(OWN)?.split_once('-')?;
        let is_hex = producer.len() == 32 && producer.bytes().all(|b| b.is_ascii_hexdigit());
        let producer = u128::from_str_radix(producer, 16).ok().filter(|_| is_hex)?;
        // As many as every store can hold.
        let seq = seq
            .parse()
            .ok()
            .filter(|seq| (1..=i64::MAX as u64).contains(seq))?;
        Some(PushId::first(
            Producer::from_bytes(producer.to_be_bytes()),
            seq,
        ))
    });
    // Shortened, so that others' keys cannot be met on purpose.
    let id = own.unwrap_or_else(|| {
        let digest = Sha256::digest(key);
        let mut producer = [0; 16];
        producer.copy_from_slice(&digest[..16]);
        PushId::first(Producer::from_bytes(producer), 1)
    });
    Ok(id.again())
}

/// A pipe, as the listing and the look at one give it.
#[derive(Debug, Serialize, Deserialize)]
pub struct Pipe {
    /// Its name.
    pub name: String,
    /// Messages retained.
    pub count: u64,
    /// Their bytes, without framing.
    pub bytes: Option<u64>,
    /// The oldest message's position.
    #[serde(with = "text::option")]
    pub first: Option<Position>,
    /// The newest message's position.
    #[serde(with = "text::option")]
    pub last: Option<Position>,
    /// The last push or reset, or the creation (RFC 3339).
    #[serde(with = "time")]
    pub modified: SystemTime,
}

impl Pipe {
    /// What is known of the pipe `name`.
    pub fn new(name: &PipeName, info: &PipeInfo) -> Self {
        Pipe {
            name: name.as_str().to_owned(),
            count: info.count,
            bytes: info.bytes,
            first: info.first,
            last: info.last,
            modified: info.modified,
        }
    }

    /// The same without the name.
    pub fn info(&self) -> PipeInfo {
        PipeInfo {
            count: self.count,
            bytes: self.bytes,
            first: self.first,
            last: self.last,
            modified: self.modified,
        }
    }
}

/// The answer to a push.
#[derive(Debug, Serialize, Deserialize)]
pub struct Pushed {
    /// The last message's position; none where the body held no message.
    #[serde(with = "text::option")]
    pub position: Option<Position>,
    /// Messages stored.
    pub count: u64,
}

/// Where a pipe starts and ends.
#[derive(Debug, Serialize, Deserialize)]
pub struct Bounds {
    /// Messages before this position were dropped by a reset or a removal.
    #[serde(with = "text")]
    pub floor: Position,
    /// Every message that was acknowledged stands before this position.
    #[serde(with = "text")]
    pub end: Position,
    /// Whether a message is retained between the positions that were asked about.
    pub more: bool,
}

/// The answer to a reset or a removal.
#[derive(Debug, Serialize, Deserialize)]
pub struct Dropped {
    /// Messages before this position were dropped.
    #[serde(with = "text")]
    pub floor: Position,
}

/// An error's document (RFC 9457). `kind`, `applied` and `stored` are dnpipes's own members.
#[derive(Debug, Serialize, Deserialize)]
pub struct Problem {
    /// `about:blank`: the status says it all.
    #[serde(rename = "type", default = "blank")]
    pub type_uri: Cow<'static, str>,
    /// The kind in words.
    pub title: String,
    /// The response's status code.
    pub status: u16,
    /// What went wrong, with every cause.
    pub detail: String,
    /// [`Kind`], by its name.
    pub kind: String,
    /// Whether a push that failed may have been stored.
    pub maybe_applied: bool,
    /// Messages of the push that are stored all the same, its first ones.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stored: Option<u64>,
}

fn blank() -> Cow<'static, str> {
    Cow::Borrowed("about:blank")
}

impl Problem {
    /// The document for `error`, answered with `status`.
    pub fn new(error: &Error, status: u16) -> Self {
        let (kind, title) = names(error.kind());
        Problem {
            type_uri: blank(),
            title: title.to_owned(),
            status,
            detail: error.to_string(),
            kind: kind.to_owned(),
            maybe_applied: error.applied() == Applied::Unknown,
            stored: None,
        }
    }

    /// The error that it tells of; `None` for a kind that this version does not know.
    pub fn error(&self) -> Option<Error> {
        let kind = KINDS.into_iter().find(|kind| names(*kind).0 == self.kind)?;
        let error = Error::new(kind, shown(&self.detail));
        let stored = self.stored.and_then(|stored| usize::try_from(stored).ok());
        Some(match (self.maybe_applied, stored) {
            (true, _) => error.maybe_applied(),
            (false, Some(stored)) => error.stored(stored),
            (false, None) => error,
        })
    }
}

/// Longest text of another side that is passed on, in characters.
const SHOWN: usize = 2000;

/// What another side says, as one line that the log and a terminal can bear.
fn shown(text: &str) -> String {
    let mut shown = String::new();
    for character in text.chars().take(SHOWN) {
        match character.is_control() {
            true => shown.extend(character.escape_default()),
            false => shown.push(character),
        }
    }
    if text.chars().nth(SHOWN).is_some() {
        shown.push('…');
    }
    shown
}

const KINDS: [Kind; 17] = [
    Kind::InvalidName,
    Kind::InvalidSelector,
    Kind::InvalidInput,
    Kind::NotFound,
    Kind::AlreadyExists,
    Kind::TooLong,
    Kind::Full,
    Kind::Denied,
    Kind::NotAllowed,
    Kind::ReadOnly,
    Kind::Unsupported,
    Kind::Unreachable,
    Kind::TimedOut,
    Kind::Damaged,
    Kind::Io,
    Kind::Interrupted,
    Kind::WouldBlock,
];

/// A kind's name on the wire, and its title for people.
fn names(kind: Kind) -> (&'static str, &'static str) {
    match kind {
        Kind::InvalidName => ("invalid-name", "Not a pipe name"),
        Kind::InvalidSelector => ("invalid-selector", "Not a selector"),
        Kind::InvalidInput => ("invalid-input", "Not a request that makes sense"),
        Kind::NotFound => ("not-found", "Not found"),
        Kind::AlreadyExists => ("already-exists", "It exists already"),
        Kind::TooLong => ("too-long", "Message too long"),
        Kind::Full => ("full", "No room left"),
        Kind::Denied => ("denied", "Access denied"),
        Kind::NotAllowed => ("not-allowed", "Not allowed"),
        Kind::ReadOnly => ("read-only", "Read-only"),
        Kind::Unsupported => ("unsupported", "Not offered"),
        Kind::Unreachable => ("unreachable", "Unreachable just now"),
        Kind::TimedOut => ("timed-out", "No answer in time"),
        Kind::Damaged => ("damaged", "Damaged data"),
        Kind::Io => ("io", "Input or output failed"),
        Kind::Interrupted => ("interrupted", "Interrupted"),
        Kind::WouldBlock => ("would-block", "It would wait"),
    }
}

/// Positions and errors as text.
mod text {
    use super::*;

    pub(super) fn serialize<S: Serializer>(position: &Position, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(position)
    }

    pub(super) fn deserialize<'a, D: Deserializer<'a>>(from: D) -> Result<Position, D::Error> {
        let text = Cow::<'a, str>::deserialize(from)?;
        text.parse().map_err(de::Error::custom)
    }

    pub(super) mod option {
        use super::*;

        pub(in super::super) fn serialize<S: Serializer>(
            position: &Option<Position>,
            to: S,
        ) -> Result<S::Ok, S::Error> {
            position.map(|position| position.to_string()).serialize(to)
        }

        pub(in super::super) fn deserialize<'a, D: Deserializer<'a>>(
            from: D,
        ) -> Result<Option<Position>, D::Error> {
            let text = Option::<String>::deserialize(from)?;
            text.map(|text| text.parse().map_err(de::Error::custom))
                .transpose()
        }
    }
}

/// Times as RFC 3339 writes them.
mod time {
    use super::*;

    pub(super) fn serialize<S: Serializer>(time: &SystemTime, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(&humantime::format_rfc3339_micros(*time))
    }

    pub(super) fn deserialize<'a, D: Deserializer<'a>>(from: D) -> Result<SystemTime, D::Error> {
        let text = Cow::<'a, str>::deserialize(from)?;
        humantime::parse_rfc3339(&text).map_err(de::Error::custom)
    }
}

/// One element of a stream of messages. On the wire: a byte for which, then big-endian numbers, then data
/// behind its 32-bit length.
#[derive(Debug)]
pub enum Record {
    /// A message: epoch, seq, microseconds since 1970, length, data.
    Message(Message),
    /// A reset: messages before this position were dropped. Epoch, seq.
    Floor(Position),
    /// Nothing has happened.
    Alive,
    /// The stream is complete. One that stops without it was cut.
    End,
    /// It goes no further, because of this: length, [`Problem`].
    Failed(Error),
}

const MESSAGE: u8 = b'm';
const FLOOR: u8 = b'f';
const ALIVE: u8 = b'a';
const END: u8 = b'e';
const FAILED: u8 = b'x';

/// Bytes of a message's record before its data.
const MESSAGE_HEAD: usize = 1 + 8 + 8 + 8 + 4;
const FLOOR_HEAD: usize = 1 + 8 + 8;
const FAILED_HEAD: usize = 1 + 4;

impl Record {
    /// Appends a message's record.
    pub fn put_message(message: &Message, out: &mut Vec<u8>) {
        out.put_u8(MESSAGE);
        out.put_u64(message.position.epoch());
        out.put_u64(message.position.seq());
        out.put_u64(micros_from_time(message.time));
        out.put_u32(message.data.len() as u32);
        out.put_slice(&message.data);
    }

    /// Appends a reset's record.
    pub fn put_floor(floor: Position, out: &mut Vec<u8>) {
        out.put_u8(FLOOR);
        out.put_u64(floor.epoch());
        out.put_u64(floor.seq());
    }

    /// Appends a sign of life.
    pub fn put_alive(out: &mut Vec<u8>) {
        out.put_u8(ALIVE);
    }

    /// Appends the end.
    pub fn put_end(out: &mut Vec<u8>) {
        out.put_u8(END);
    }

    /// Appends a failure.
    pub fn put_failed(problem: &[u8], out: &mut Vec<u8>) {
        out.put_u8(FAILED);
        out.put_u32(problem.len() as u32);
        out.put_slice(problem);
    }
}

/// Takes a stream of records apart.
#[derive(Debug, Default)]
pub struct Records {
    buffer: BytesMut,
}

impl Records {
    /// More of the stream.
    pub fn feed(&mut self, piece: &Bytes) {
        self.buffer.extend_from_slice(piece);
    }

    /// The next record, if all of it has arrived.
    ///
    /// # Errors
    /// [`Kind::Io`] for what is no record; nothing that follows can be understood.
    pub fn take(&mut self) -> Result<Option<Record>> {
        let Some(which) = self.buffer.first() else {
            return Ok(None);
        };
        let (head, limit) = match *which {
            MESSAGE => (MESSAGE_HEAD, MAX_MESSAGE),
            FLOOR => (FLOOR_HEAD, 0),
            ALIVE | END => (1, 0),
            FAILED => (FAILED_HEAD, 1 << 20),
            other => return Err(garbled(format!("there is no record {other:#x}"))),
        };
        if self.buffer.len() < head {
            return Ok(None);
        }
        let length = match *which {
            MESSAGE | FAILED => (&self.buffer[head - 4..head]).get_u32() as usize,
            _ => 0,
        };
        if length > limit {
            return Err(garbled(format!("a record of {length} bytes")));
        }
        if self.buffer.len() < head + length {
            self.buffer.reserve(head + length - self.buffer.len());
            return Ok(None);
        }
        let mut record = self.buffer.split_to(head + length).freeze();
        let which = record.get_u8();
        let position = |record: &mut Bytes| Position::new(record.get_u64(), record.get_u64());
        Ok(Some(match which {
            MESSAGE => {
                let position = position(&mut record);
                let time = time_from_micros(record.get_u64());
                record.advance(4);
                Record::Message(Message {
                    position,
                    time,
                    data: record,
                })
            }
            FLOOR => Record::Floor(position(&mut record)),
            FAILED => {
                record.advance(4);
                let problem = serde_json::from_slice::<Problem>(&record).ok();
                Record::Failed(
                    problem
                        .and_then(|problem| problem.error())
                        .unwrap_or_else(|| garbled("a failure of an unknown kind".to_owned())),
                )
            }
            ALIVE => Record::Alive,
            _ => Record::End,
        }))
    }
}

fn garbled(what: String) -> Error {
    Error::new(Kind::Io, format!("the gateway's stream is garbled: {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(seq: u64, data: &'static [u8]) -> Message {
        Message {
            position: Position::new(2, seq),
            time: time_from_micros(1_700_000_000_000_000 + seq),
            data: Bytes::from_static(data),
        }
    }

    #[test]
    fn what_another_side_says_is_one_line_of_a_bearable_length() {
        let mut problem = Problem::new(&Error::new(Kind::Io, "disk"), 500);
        problem.detail = format!("one\nERROR forged \u{1b}[31m {}", "x".repeat(1 << 20));
        let said = problem.error().expect("a known kind").to_string();
        assert!(
            said.starts_with("one\\nERROR forged \\u{1b}[31m xxx"),
            "{said:.80}"
        );
        assert!(said.len() < 3000 && said.ends_with('…'));
    }

    #[test]
    fn records_come_back_however_they_are_cut() {
        let mut bytes = Vec::new();
        let problem = Problem::new(&Error::new(Kind::Full, "no room").maybe_applied(), 507);
        Record::put_message(&message(1, b"one"), &mut bytes);
        Record::put_floor(Position::new(2, 9), &mut bytes);
        Record::put_message(&message(9, b""), &mut bytes);
        Record::put_alive(&mut bytes);
        Record::put_failed(&serde_json::to_vec(&problem).expect("json"), &mut bytes);
        Record::put_end(&mut bytes);
        for size in [1, 2, 7, bytes.len()] {
            let mut records = Records::default();
            let mut seen = Vec::new();
            for piece in bytes.chunks(size) {
                records.feed(&Bytes::copy_from_slice(piece));
                while let Some(record) = records.take().expect("a record") {
                    seen.push(record);
                }
            }
            let [
                Record::Message(one),
                Record::Floor(floor),
                Record::Message(two),
                Record::Alive,
                Record::Failed(error),
                Record::End,
            ] = seen.as_slice()
            else {
                panic!("{seen:?}");
            };
            assert_eq!((one, two), (&message(1, b"one"), &message(9, b"")));
            assert_eq!(*floor, Position::new(2, 9));
            assert_eq!(
                (error.kind(), error.applied()),
                (Kind::Full, Applied::Unknown)
            );
        }
    }

    #[test]
    fn what_is_no_record_is_an_error_and_reserves_nothing() {
        for bytes in [
            &b"?"[..],
            b"m\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\xff\xff\xff\xff",
        ] {
            let mut records = Records::default();
            records.feed(&Bytes::copy_from_slice(bytes));
            assert!(records.take().is_err());
            assert!(records.buffer.capacity() < 4096);
        }
    }

    #[test]
    fn an_identity_comes_back_from_its_key_and_any_other_key_is_one() {
        let id = PushId::first(Producer::from_bytes([0xab; 16]), 77);
        assert_eq!(identity(key(id).as_bytes()).expect("own"), id.again());
        let (one, two) = (identity(b"order-1"), identity(b"order-2"));
        let (one, two) = (one.expect("legal"), two.expect("legal"));
        assert_eq!(one, identity(b"order-1").expect("the same"));
        assert!(one.producer != two.producer && one.repeated);
        let bare = key(id).replace(OWN, "");
        assert_ne!(identity(bare.as_bytes()).expect("legal"), id.again());
        assert!(identity(b"").is_err() && identity(&[b'x'; 257]).is_err());
    }

    #[test]
    fn every_kind_has_a_name_of_its_own() {
        for kind in KINDS {
            let problem = Problem::new(&Error::new(kind, "x"), 400);
            assert_eq!(problem.error().expect("known").kind(), kind);
        }
    }

    #[test]
    fn a_pipe_comes_back_from_its_json() {
        let pipe = Pipe {
            name: "täglich \"x\"".to_owned(),
            count: 2,
            bytes: None,
            first: Some(Position::new(1, 1)),
            last: None,
            modified: time_from_micros(1_700_000_000_123_456),
        };
        let json = serde_json::to_string(&pipe).expect("json");
        let back: Pipe = serde_json::from_str(&json).expect("the same");
        assert_eq!(
            (back.name.as_str(), back.info()),
            (pipe.name.as_str(), pipe.info())
        );
    }
}
