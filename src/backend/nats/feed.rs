//! What streams out of the server: a consumer of one's own, asked for as much as there is room for.
//!
//! A pull consumer, because the client says how much may be under way: what is pushed without being asked
//! for piles up with a reader that is slow, and is dropped there.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_nats::{HeaderMap, Message, Subscriber};
use bytes::Bytes;
use futures_util::{FutureExt, StreamExt};
use serde_json::{Value, json};
use tokio::time::Instant;

use super::api::{Consumer, NOT_FOUND};
use super::link::{Link, MISSES, Refusals, SETTLE};
use crate::error::{Error, Kind, Result};

/// What is asked for first, in bytes; who reads on quickly is given more.
const FIRST: usize = 256 << 10;

/// What is asked for at most, in bytes. Twice that is under way.
const MOST: usize = 2 << 20;

/// How many messages are asked for at most; the client keeps room for four times as many.
const MESSAGES: u64 = 16 << 10;

/// How often the server says that it is still there, while it has nothing.
const HEARTBEAT: Duration = Duration::from_secs(2);

/// How long it may be silent: one sign of life may be lost.
const SILENCE: Duration = Duration::from_secs(5);

/// How long the server keeps a request for more.
const PATIENCE: Duration = Duration::from_secs(60);

/// How long the server keeps a consumer that nobody asks.
const IDLE: Duration = Duration::from_secs(120);

/// A consumer and what it was asked for.
pub(super) struct Feed {
    link: Arc<Link>,
    stream: String,
    consumer: String,
    /// Where messages are asked for.
    asking: String,
    /// What the server does not permit.
    refusals: Refusals,
    inbox: String,
    subscriber: Subscriber,
    /// Requests that the server is still to answer, the oldest first.
    pulls: VecDeque<Pull>,
    asked: u64,
    /// How much the next request is for, in bytes.
    bytes: usize,
    /// Whether the next message is larger than that.
    large: bool,
    /// Messages that came from this consumer: it numbers them.
    received: u64,
    /// When something came last, or was asked for.
    heard: Instant,
    /// Whether anything ever came.
    spoke: bool,
    /// How often nobody listened for requests.
    misses: u32,
}

struct Pull {
    serial: u64,
    messages: u64,
    received: u64,
}

/// A message of the stream.
pub(super) struct Arrival {
    pub(super) seq: u64,
    pub(super) time: SystemTime,
    pub(super) headers: Option<HeaderMap>,
    pub(super) data: Bytes,
}

/// Why nothing more comes.
pub(super) enum Loss {
    /// There is no such consumer any more, or it does not speak: another one has to be made. Says whether
    /// this one ever spoke.
    Gone(String, bool),
    Failed(Error),
}

impl From<Error> for Loss {
    fn from(error: Error) -> Self {
        Loss::Failed(error)
    }
}

impl Feed {
    /// Makes a consumer of `stream` that begins with message `start`, or the next one there is, and leaves
    /// messages' bytes out if it is for `headers_only`. `None` where there is no such stream.
    ///
    /// # Errors
    /// As for [`Link::api`].
    pub(super) async fn open(
        link: Arc<Link>,
        stream: &str,
        start: u64,
        headers_only: bool,
    ) -> Result<Option<Self>> {
        let mut config = json!({
            "deliver_policy": "by_start_sequence",
            "opt_start_seq": start.max(1),
            "ack_policy": "none",
            "replay_policy": "instant",
            "mem_storage": true,
            "num_replicas": 1,
            "inactive_threshold": IDLE.as_nanos() as u64,
        });
        if headers_only {
            config["headers_only"] = Value::Bool(true);
        }
        let inbox = link.inbox();
        let subscriber = link.listen(format!("{inbox}.*")).await?;
        let body = json!({ "stream_name": stream, "config": config });
        let what = format!("CONSUMER.CREATE.{stream}");
        let consumer = match link.api::<Consumer>(&what, &body).await? {
            Ok(consumer) => consumer.name,
            Err(error) if error.is(NOT_FOUND) => return Ok(None),
            Err(error) => return Err(error.typed()),
        };
        let asking = format!("$JS.API.CONSUMER.MSG.NEXT.{stream}.{consumer}");
        let mut feed = Feed {
            refusals: link.refusals(),
            link,
            stream: stream.to_owned(),
            consumer,
            asking,
            inbox,
            subscriber,
            pulls: VecDeque::new(),
            asked: 0,
            bytes: FIRST,
            large: false,
            received: 0,
            heard: Instant::now(),
            spoke: false,
            misses: 0,
        };
        feed.ask_for_more().await?;
        Ok(Some(feed))
    }

    /// The next message. Dropping the future loses nothing.
    pub(super) async fn next(&mut self) -> Result<Arrival, Loss> {
        loop {
            self.ask_for_more().await?;
            let next = tokio::time::timeout_at(self.heard + SILENCE, self.subscriber.next());
            let message = tokio::select! {
                biased;
                next = next => match next {
                    Ok(message) => message,
                    Err(_) => return Err(self.gone("it is silent")),
                },
                refused = self.refusals.of(&self.asking) => return Err(Loss::Failed(refused)),
            };
            if let Some(arrival) = self.take(message)? {
                return Ok(arrival);
            }
        }
    }

    /// The next message, if it has arrived already.
    pub(super) async fn next_now(&mut self) -> Result<Option<Arrival>, Loss> {
        loop {
            self.ask_for_more().await?;
            // The runtime's budget would say that there is nothing.
            let next = tokio::task::unconstrained(self.subscriber.next()).now_or_never();
            let Some(message) = next else {
                return Ok(None);
            };
            if let Some(arrival) = self.take(message)? {
                return Ok(Some(arrival));
            }
        }
    }

    /// Keeps one request waiting at the server, and another behind it while messages come.
    async fn ask_for_more(&mut self) -> Result<()> {
        let begun = match self.pulls.front() {
            None => true,
            Some(pull) => self.pulls.len() == 1 && pull.received > 0 && !self.large,
        };
        if !begun {
            return Ok(());
        }
        if self.misses > 0 {
            tokio::time::sleep(SETTLE * (1 << self.misses)).await;
        }
        let mut request = json!({
            "batch": MESSAGES,
            "max_bytes": self.bytes,
            "expires": PATIENCE.as_nanos() as u64,
            "idle_heartbeat": HEARTBEAT.as_nanos() as u64,
        });
        let mut messages = MESSAGES;
        if self.large {
            messages = 1;
            request["batch"] = json!(1);
            request["max_bytes"] = json!(0);
        }
        let reply = format!("{}.{}", self.inbox, self.asked);
        let sent = self
            .link
            .send(&self.asking, Some(reply), None, request.to_string().into());
        sent.await?;
        self.pulls.push_back(Pull {
            serial: self.asked,
            messages,
            received: 0,
        });
        self.asked += 1;
        self.large = false;
        self.heard = Instant::now();
        Ok(())
    }

    /// Takes what came: a message, or news of the requests.
    fn take(&mut self, message: Option<Message>) -> Result<Option<Arrival>, Loss> {
        let Some(message) = message else {
            let broken = Error::new(Kind::Unreachable, "the connection broke");
            return Err(Loss::Failed(broken));
        };
        self.heard = Instant::now();
        self.spoke = true;
        if let Some(status) = message.status {
            let why = message.description.unwrap_or_default();
            let serial = message.subject.rsplit('.').next();
            let serial = serial.and_then(|serial| serial.parse().ok());
            return self.news(status.as_u16(), &why, serial).map(|()| None);
        }
        let place = message.reply.as_deref().and_then(Place::parse);
        let place = place
            .ok_or_else(|| Error::new(Kind::Io, "a message without its place in the stream"))?;
        self.misses = 0;
        self.received += 1;
        if place.delivered != self.received {
            return Err(self.gone("a message was lost on its way"));
        }
        if let Some(pull) = self.pulls.front_mut() {
            pull.received += 1;
            if pull.received == pull.messages {
                self.pulls.pop_front();
            }
        }
        Ok(Some(Arrival {
            seq: place.seq,
            time: place.time,
            headers: message.headers,
            data: message.payload,
        }))
    }

    fn news(&mut self, status: u16, why: &str, serial: Option<u64>) -> Result<(), Loss> {
        if status != 503 {
            self.misses = 0;
        }
        match (status, why) {
            (100, _) => {}
            (404 | 408, _) => self.end(serial),
            (409, why) if why.starts_with("Message Size Exceeds") => {
                let fresh = |pull: &Pull| Some(pull.serial) == serial && pull.received == 0;
                self.large = self.pulls.iter().any(fresh);
                self.end(serial);
                self.bytes = (self.bytes * 2).min(MOST);
            }
            (409, why) if why.eq_ignore_ascii_case("Batch Completed") => self.end(serial),
            (409, why) if why.starts_with("Exceeded") => {
                let why = format!("the stream does not allow it: {why}");
                return Err(Loss::Failed(Error::new(Kind::Unsupported, why)));
            }
            // The stream or the consumer was removed, or another server leads it now.
            (503, _) if self.received == 0 && self.misses < MISSES => {
                self.misses += 1;
                self.end(serial);
            }
            (409 | 503, why) => return Err(self.gone(why)),
            (status, why) => {
                let why = format!("asking for messages: {status} {why}");
                return Err(Loss::Failed(Error::new(Kind::Io, why)));
            }
        }
        Ok(())
    }

    fn end(&mut self, serial: Option<u64>) {
        self.pulls.retain(|pull| Some(pull.serial) != serial);
    }

    fn gone(&self, why: &str) -> Loss {
        Loss::Gone(format!("its consumer is gone: {why}"), self.spoke)
    }
}

impl Drop for Feed {
    /// Frees the consumer; one that is left is removed by the server after a while.
    fn drop(&mut self) {
        let Ok(runtime) = tokio::runtime::Handle::try_current() else {
            return;
        };
        let link = Arc::clone(&self.link);
        let subject = format!("$JS.API.CONSUMER.DELETE.{}.{}", self.stream, self.consumer);
        runtime.spawn(async move {
            if let Err(error) = link.send(&subject, None, None, Bytes::new()).await {
                log::debug!("a consumer is left to the server: {error}");
            }
        });
    }
}

/// What the subject for acknowledgements says of a message.
struct Place {
    seq: u64,
    /// Its number among those that the consumer has delivered.
    delivered: u64,
    time: SystemTime,
}

impl Place {
    /// `$JS.ACK.[domain.account.]stream.consumer.tries.seq.delivered.time.pending[.token]`
    fn parse(subject: &str) -> Option<Self> {
        let tokens = subject.bytes().filter(|byte| *byte == b'.').count() + 1;
        let skipped = if tokens == 9 { 5 } else { 7 };
        let mut tokens = subject.split('.').skip(skipped);
        let mut number = || tokens.next()?.parse::<u64>().ok();
        Some(Place {
            seq: number()?,
            delivered: number()?,
            time: SystemTime::UNIX_EPOCH + Duration::from_nanos(number()?),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_messages_place_is_read_in_both_forms() {
        for subject in [
            "$JS.ACK.s.c.1.42.7.1000000000.0",
            "$JS.ACK._.hash.s.c.1.42.7.1000000000.0",
            "$JS.ACK.domain.hash.s.c.1.42.7.1000000000.0.token",
        ] {
            let place = Place::parse(subject).expect(subject);
            assert_eq!((place.seq, place.delivered), (42, 7));
            let second = SystemTime::UNIX_EPOCH + Duration::from_secs(1);
            assert_eq!(place.time, second);
        }
        assert!(Place::parse("$JS.ACK.s").is_none());
    }
}
