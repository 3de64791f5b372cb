//! What JetStream is asked, and what it answers: the part of its API that is used here
//! (<https://github.com/nats-io/jsm.go/tree/main/schemas/jetstream/api/v1>).

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::ids::Tags;
use super::link::{ANSWER, Link, Reply};
use super::options::NatsUrl;
use crate::backend::PipeInfo;
use crate::error::{Error, Kind, Result};
use crate::message::Position;

/// How long a server remembers the identities of messages in pipes made here: longer than TCP waits at most
/// before it sends again what an outage has kept. Each takes memory there, so not much longer.
const DUPLICATES: Duration = Duration::from_secs(150);

/// Go's time before all others: the server says it of a stream that it has not made in full.
const NEVER: &str = "0001-01-01T";

/// A stream: how it is configured, and what it holds.
#[derive(Debug, Deserialize)]
pub(super) struct Info {
    pub(super) config: Config,
    created: String,
    pub(super) state: State,
}

#[derive(Debug, Deserialize)]
pub(super) struct Config {
    pub(super) name: String,
    #[serde(default)]
    pub(super) subjects: Vec<String>,
    pub(super) retention: String,
    #[serde(default)]
    pub(super) max_msgs: i64,
    #[serde(default)]
    pub(super) max_bytes: i64,
    #[serde(default)]
    max_msg_size: i64,
    #[serde(default)]
    pub(super) max_age: i64,
    #[serde(default)]
    pub(super) max_msgs_per_subject: i64,
    #[serde(default)]
    pub(super) discard: String,
    /// Without it the oldest are dropped over `max_msgs_per_subject`, whatever `discard` says.
    #[serde(default)]
    pub(super) discard_new_per_subject: bool,
    pub(super) storage: String,
    /// `async` where messages are acknowledged before they are written.
    #[serde(default)]
    pub(super) persist_mode: String,
    /// In nanoseconds.
    #[serde(default)]
    duplicate_window: u64,
    #[serde(default)]
    pub(super) num_replicas: u32,
    #[serde(default)]
    pub(super) allow_atomic: bool,
    /// Whether nobody is told that a message is stored.
    #[serde(default)]
    pub(super) no_ack: bool,
    #[serde(default)]
    pub(super) mirror: Option<Value>,
}

impl Config {
    /// Whether it drops messages by itself.
    pub(super) fn sheds(&self) -> bool {
        let full = self.max_bytes > 0 || self.max_msgs > 0;
        let of_subject = self.max_msgs_per_subject > 0 && !self.discard_new_per_subject;
        let is_limited = full || self.max_msgs_per_subject > 0;
        self.max_age > 0 || of_subject || is_limited && self.discard != "new"
    }

    /// Whether some messages are refused and others are not.
    pub(super) fn may_refuse(&self) -> bool {
        let full = self.max_bytes > 0 || self.max_msgs > 0;
        let of_subject = self.max_msgs_per_subject > 0 && self.discard_new_per_subject;
        self.max_msg_size > 0 || (full || of_subject) && self.discard == "new"
    }
}

#[derive(Debug, Deserialize)]
pub(super) struct State {
    pub(super) messages: u64,
    pub(super) first_seq: u64,
    pub(super) last_seq: u64,
    #[serde(default)]
    last_ts: String,
    #[serde(default)]
    pub(super) num_deleted: u64,
    #[serde(default)]
    consumer_count: u64,
}

impl Info {
    /// Whether a message that is stored now stays for anybody.
    pub(super) fn keeps(&self) -> bool {
        self.config.retention != "interest" || self.state.consumer_count > 0
    }

    /// When the stream was made, in nanoseconds since 1970: another one of its name was made at another
    /// time, and numbers its messages from 1 again.
    ///
    /// # Errors
    /// `Io` where it is no time; `Unreachable` where the stream is not made in full.
    pub(super) fn epoch(&self) -> Result<u64> {
        let age = self.created()?.duration_since(UNIX_EPOCH);
        Ok(age.map_or(0, |age| age.as_nanos() as u64))
    }

    fn created(&self) -> Result<SystemTime> {
        if self.created.starts_with(NEVER) {
            let why = format!("stream {} is just being made, or removed", self.config.name);
            return Err(Error::new(Kind::Unreachable, why));
        }
        humantime::parse_rfc3339(&self.created).map_err(|error| {
            Error::new(Kind::Io, format!("{:?} is no time", self.created)).caused_by(error)
        })
    }

    /// Where the stream starts: what stood before was dropped.
    ///
    /// # Errors
    /// As for [`Info::epoch`].
    pub(super) fn floor(&self) -> Result<Position> {
        Ok(Position::new(self.epoch()?, self.state.first_seq))
    }

    /// Behind its last message.
    ///
    /// # Errors
    /// As for [`Info::epoch`].
    pub(super) fn end(&self) -> Result<Position> {
        Ok(Position::new(self.epoch()?, self.state.last_seq + 1))
    }

    /// What a pipe's user wants to know; its bytes have to be counted ([`super::tally`]), if they could be.
    ///
    /// # Errors
    /// As for [`Info::epoch`].
    pub(super) fn pipe(&self, bytes: Option<u64>) -> Result<PipeInfo> {
        let epoch = self.epoch()?;
        let state = &self.state;
        let some = |seq| (state.messages > 0).then(|| Position::new(epoch, seq));
        let created = self.created()?;
        // An empty stream's is long before anything.
        let last = humantime::parse_rfc3339(&state.last_ts).unwrap_or(created);
        Ok(PipeInfo {
            count: state.messages,
            bytes,
            first: some(state.first_seq),
            last: some(state.last_seq),
            modified: last.max(created),
        })
    }

    pub(super) fn duplicate_window(&self) -> Duration {
        Duration::from_nanos(self.config.duplicate_window)
    }
}

/// A consumer's name.
#[derive(Debug, Deserialize)]
pub(super) struct Consumer {
    pub(super) name: String,
}

/// What a push is answered.
#[derive(Debug, Deserialize)]
pub(super) struct Stored {
    pub(super) seq: u64,
}

#[derive(Deserialize)]
struct Answer {
    error: Option<ApiError>,
}

/// Why JetStream refuses.
#[derive(Debug, Deserialize)]
pub(super) struct ApiError {
    /// As in HTTP.
    #[serde(default)]
    code: u32,
    /// Which error it is.
    #[serde(default)]
    err_code: u32,
    #[serde(default)]
    description: String,
}

/// There is no such message.
pub(super) const NO_MESSAGE: u32 = 10037;
/// A stream cannot be so; the text says what is wrong.
const BAD_CONFIG: u32 = 10052;
/// A stream of this account has to have a limit of bytes.
const NO_MAX_BYTES: u32 = 10113;
/// A consumer of this stream may not be kept for so long.
pub(super) const IDLE_TOO_LONG: u32 = 10153;
/// There is a stream of that name with another configuration.
const OTHER_CONFIG: u32 = 10058;
/// The stream, or the account, has as many consumers as it may.
const TOO_MANY: u32 = 10026;
/// The account has no JetStream.
const NOT_ENABLED: u32 = 10039;
/// Another stream has the subject.
const OVERLAP: u32 = 10065;
/// There is no such stream.
pub(super) const NOT_FOUND: u32 = 10059;
/// A consumer cannot be made; the text says why.
const NO_CONSUMER: u32 = 10012;
/// A stream's files cannot be made.
const NOT_MADE: u32 = 10049;
/// No server that is up has the stream.
const OFFLINE: u32 = 10118;
/// Nor the consumer.
const OFFLINE_CONSUMER: u32 = 10119;
/// What was pushed would go to another stream.
pub(super) const OTHER_STREAM: u32 = 10060;
/// The stream takes no atomic batches.
pub(super) const NO_BATCHES: u32 = 10174;
/// A message of a batch did not arrive, or was refused.
pub(super) const INCOMPLETE: u32 = 10176;
/// A message of a batch has the identity of one that is stored.
pub(super) const STORED_BEFORE: u32 = 10201;

impl ApiError {
    pub(super) fn is(&self, code: u32) -> bool {
        self.err_code == code
    }

    /// Whether identities may not be remembered for so long.
    fn is_about_the_window(&self) -> bool {
        self.is(BAD_CONFIG) && self.description.contains("duplicates window")
    }

    /// What it means.
    pub(super) fn typed(self) -> Error {
        let text = &self.description;
        let kind = match (self.err_code, self.code) {
            (NOT_FOUND, _) => Kind::NotFound,
            (NOT_ENABLED | 10076 | OVERLAP | NO_MAX_BYTES, _) => Kind::Unsupported,
            (10054 | 10097, _) => Kind::TooLong,
            // Of the account, the server's memory and disk, and the number of streams.
            (10002 | 10023 | 10027 | 10028 | 10047 | 10122, _) => Kind::Full,
            (10077, _) if text.contains("maximum") => Kind::Full,
            _ if text.contains("no space left on device") => Kind::Full,
            // Sealed; deletion or purge denied.
            (10109 | TOO_MANY, _) => Kind::Denied,
            // Its server ends, or begins.
            (OFFLINE | OFFLINE_CONSUMER, _) => Kind::Unreachable,
            // Others remove the pipe, or make it anew, just now.
            (NOT_MADE, _) if !text.contains("permission") => Kind::Unreachable,
            (NO_CONSUMER, _) if text.contains("invalid stream") => Kind::Unreachable,
            (10158 | INCOMPLETE | 10211, _) | (_, 503) => Kind::Unreachable,
            (_, 401 | 403) => Kind::Denied,
            _ if text.contains("not permitted") => Kind::Denied,
            _ => Kind::Io,
        };
        let mut why = format!("JetStream refuses: {text} ({})", self.err_code);
        match self.err_code {
            NOT_ENABLED | 10076 => why += "; it is not enabled for this account",
            TOO_MANY => why += "; each reader is a consumer, and max_consumers lets no more in",
            NO_MAX_BYTES => {
                why +=
                    "; a pipe is made without, so make its stream by: nats stream add --max-bytes";
            }
            OVERLAP => why += "; another stream takes the messages of this name",
            _ => {}
        }
        Error::new(kind, why)
    }
}

/// Takes an answer apart: what was asked for, or why not.
///
/// # Errors
/// `Io` for what is no answer of JetStream's.
pub(super) fn parse<T: DeserializeOwned>(payload: &[u8]) -> Result<Result<T, ApiError>> {
    let strange = |error: serde_json::Error| {
        Error::new(Kind::Io, "what answers there is not JetStream").caused_by(error)
    };
    let answer: Answer = serde_json::from_slice(payload).map_err(strange)?;
    match answer.error {
        Some(error) => Ok(Err(error)),
        None => serde_json::from_slice(payload).map_err(strange).map(Ok),
    }
}

impl Link {
    /// Asks JetStream for `what`, as `STREAM.INFO.name`; more than once where no answer comes.
    ///
    /// # Errors
    /// As for [`Link::ask`]; `Unsupported` where there is no JetStream.
    pub(super) async fn api<T: DeserializeOwned>(
        &self,
        what: &str,
        body: &Value,
    ) -> Result<Result<T, ApiError>> {
        // In a cluster nobody answers while a leader is elected.
        self.api_patiently(&[ANSWER / 6, ANSWER / 3, ANSWER / 2], what, body)
            .await
    }

    /// Asks for what must not happen twice.
    ///
    /// # Errors
    /// As for [`Link::api`].
    pub(super) async fn api_once<T: DeserializeOwned>(
        &self,
        what: &str,
        body: &Value,
    ) -> Result<Result<T, ApiError>> {
        self.api_patiently(&[ANSWER], what, body).await
    }

    /// Asks as often as there are times in `patience`, and waits that long.
    ///
    /// # Errors
    /// As for [`Link::api`].
    pub(super) async fn api_patiently<T: DeserializeOwned>(
        &self,
        patience: &[Duration],
        what: &str,
        body: &Value,
    ) -> Result<Result<T, ApiError>> {
        let body = match body {
            Value::Null => Bytes::new(),
            body => body.to_string().into(),
        };
        let subject = format!("$JS.API.{what}");
        let mut reply = Reply::Silence;
        for patience in patience {
            reply = self
                .ask_within(*patience, &subject, None, body.clone())
                .await?;
            if !matches!(reply, Reply::Silence) {
                break;
            }
        }
        match reply {
            Reply::Message(answer) => {
                self.jetstream_answered();
                parse(&answer.payload)
            }
            Reply::Silence => Err(self.silence()),
            Reply::Nobody if !self.has_jetstream() => Err(Error::new(
                Kind::Unsupported,
                "the server has no JetStream; start it with -js, or jetstream {} in its configuration",
            )),
            Reply::Nobody => Err(Error::new(
                Kind::Unreachable,
                "nobody answers for JetStream: it is not enabled for this account, or has no leader now",
            )),
        }
    }

    /// A stream, if there is one of this name.
    ///
    /// # Errors
    /// As for [`Link::api`].
    pub(super) async fn info(&self, stream: &str) -> Result<Option<Info>> {
        let what = format!("STREAM.INFO.{stream}");
        match self.api(&what, &Value::Null).await? {
            Ok(info) => Ok(Some(info)),
            Err(error) if error.is(NOT_FOUND) => Ok(None),
            Err(error) => Err(error.typed()),
        }
    }

    /// Makes a pipe's stream; `false` if it was there.
    ///
    /// # Errors
    /// As for [`Link::api`]; `Unsupported` where another stream takes what is pushed to it.
    pub(super) async fn create(&self, stream: &str, url: &NatsUrl, tags: &Tags) -> Result<bool> {
        let mut config = json!({
            "name": stream,
            // Servers take a repetition with the same configuration for the making. This one is like no other.
            "description": format!("a pipe (dnpipes, {})", tags.next()),
            "subjects": [stream],
            "retention": "limits",
            "storage": "file",
            "discard": "new",
            "max_consumers": -1,
            "max_msgs": -1,
            "max_bytes": -1,
            "max_age": 0,
            "num_replicas": url.replicas,
            "duplicate_window": DUPLICATES.as_nanos() as u64,
            "allow_direct": true,
        });
        if self.knows_batches() {
            config["allow_atomic"] = Value::Bool(true);
        }
        let what = format!("STREAM.CREATE.{stream}");
        let mut made = self.api::<Value>(&what, &config).await?;
        if made.as_ref().is_err_and(ApiError::is_about_the_window) {
            // Not said, it is two minutes, or what the server allows.
            config["duplicate_window"] = Value::Null;
            made = self.api(&what, &config).await?;
        }
        match made {
            Ok(_) => Ok(true),
            Err(error) if error.is(OTHER_CONFIG) => Ok(false),
            Err(error) if error.is(OVERLAP) && !self.is_taken(stream).await.unwrap_or(true) => {
                let why = format!("stream {stream} is just being made, or removed, by others");
                Err(Error::new(Kind::Unreachable, why))
            }
            Err(error) => Err(error.typed()),
        }
    }

    /// Whether another stream takes what is pushed to this one, which need not be there.
    async fn is_taken(&self, stream: &str) -> Result<bool> {
        let of_subject = json!({ "subject": stream });
        let listed = self.api::<Value>("STREAM.LIST", &of_subject).await?;
        let listed = listed.map_err(ApiError::typed)?;
        let streams = listed["streams"].as_array().into_iter().flatten();
        let mut names = streams.filter_map(|other| other["config"]["name"].as_str());
        Ok(names.any(|name| name != stream))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_say_whether_to_try_again() {
        for (code, err_code, description, kind) in [
            (404, 10059, "stream not found", Kind::NotFound),
            (500, 10118, "stream is offline", Kind::Unreachable),
            (500, 10119, "consumer is offline", Kind::Unreachable),
            (
                503,
                10008,
                "JetStream system temporarily unavailable",
                Kind::Unreachable,
            ),
            (
                500,
                10049,
                "error creating store for stream",
                Kind::Unreachable,
            ),
            (
                500,
                10049,
                "error creating store for stream: permission denied",
                Kind::Io,
            ),
            (
                500,
                10049,
                "error creating store for stream: no space left on device",
                Kind::Full,
            ),
            (500, 10012, "invalid stream", Kind::Unreachable),
            (500, 10012, "another reason", Kind::Io),
            (
                500,
                10051,
                "write t/msgs/1.blk: no space left on device",
                Kind::Full,
            ),
            (500, 10077, "no space left on device", Kind::Full),
            (500, 10077, "maximum messages exceeded", Kind::Full),
            (500, 10051, "another reason", Kind::Io),
        ] {
            let description = description.to_owned();
            let error = ApiError {
                code,
                err_code,
                description,
            };
            let error = error.typed();
            assert_eq!(error.kind(), kind, "{error}");
        }
    }
}
