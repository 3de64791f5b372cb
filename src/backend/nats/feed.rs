//! What streams out of the server: a consumer of one's own, asked for as much as there is room for.
//!
//! A pull consumer, because the client says how much may be under way: what is pushed without being asked
//! for piles up with a reader that is slow, and is dropped there.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_nats::{HeaderMap, Message, Subscriber};
use bytes::Bytes;
use futures_util::{FutureExt, StreamExt};
use serde_json::{Value, json};
use tokio::time::Instant;

use super::api::{Consumer, IDLE_TOO_LONG, NOT_FOUND};
use super::link::{Link, MISSES, Refusals, SETTLE};
use crate::backend::broker::made_to_its_end;
use crate::error::{Error, Kind, Result};

/// What is asked for first, in bytes; who reads on quickly is given more.
const FIRST: i64 = 256 << 10;

/// What is asked for at most, in bytes. One and a half times that is under way.
const MOST: i64 = 2 << 20;

/// Less than the server counts for a message without any bytes: its subjects.
const LEAST: i64 = 40;

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
    /// How much was asked for and has not come, in bytes, as the server counts them. It serves requests by
    /// turns, and does not say when one is filled to the byte.
    owed: i64,
    /// How much the next request is for, in bytes, and how much it may be for.
    bytes: i64,
    most: i64,
    /// Whether the next message is larger than that.
    large: bool,
    /// Whether one message of any size was asked for.
    single: bool,
    /// Messages that came from this consumer: it numbers them.
    received: u64,
    /// When something came last, or was asked for.
    heard: Instant,
    /// Whether anything ever came.
    spoke: bool,
    /// How often nobody listened for requests.
    misses: u32,
}

/// A message of the stream.
pub(super) struct Arrival {
    pub(super) seq: u64,
    pub(super) time: SystemTime,
    /// How many came behind it when it was sent.
    pub(super) pending: u64,
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
    /// Goes on although the caller stops waiting: a consumer whose name is not known cannot be removed.
    ///
    /// # Errors
    /// As for [`Link::api`].
    pub(super) async fn open(
        link: Arc<Link>,
        stream: &str,
        start: u64,
        headers_only: bool,
    ) -> Result<Option<Self>> {
        let stream = stream.to_owned();
        made_to_its_end(async move { Feed::make(link, &stream, start, headers_only).await }).await
    }

    async fn make(
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
        let mut body = json!({ "stream_name": stream, "config": config });
        let what = format!("CONSUMER.CREATE.{stream}");
        let mut made = link.api::<Consumer>(&what, &body).await?;
        if made.as_ref().is_err_and(|error| error.is(IDLE_TOO_LONG)) {
            // Not said, it is as long as the stream allows.
            body["config"]["inactive_threshold"] = Value::Null;
            made = link.api(&what, &body).await?;
        }
        let consumer = match made {
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
            owed: 0,
            bytes: FIRST,
            most: MOST,
            large: false,
            single: false,
            received: 0,
            heard: Instant::now(),
            spoke: false,
            misses: 0,
        };
        feed.ask_for_more().await;
        Ok(Some(feed))
    }

    /// The next message. Dropping the future loses nothing.
    pub(super) async fn next(&mut self) -> Result<Arrival, Loss> {
        loop {
            self.ask_for_more().await;
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
            self.ask_for_more().await;
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

    /// Sees to it that the server always has leave to send: for more while messages come.
    async fn ask_for_more(&mut self) {
        let enough = if self.large { 0 } else { self.bytes / 2 };
        if self.single || self.owed > enough {
            return;
        }
        if self.misses > 0 {
            tokio::time::sleep(SETTLE * (1 << self.misses)).await;
        }
        let bytes = if self.large { 0 } else { self.bytes };
        let request = json!({
            // So many that it is always the bytes that count.
            "batch": (bytes / LEAST).max(1),
            "max_bytes": bytes,
            "expires": PATIENCE.as_nanos() as u64,
            "idle_heartbeat": HEARTBEAT.as_nanos() as u64,
        });
        let reply = format!("{}.{bytes}", self.inbox);
        let request = request.to_string().into();
        let sent = self.link.send(&self.asking, Some(reply), None, request);
        if sent.await.is_err() {
            // What has come already is taken first; behind it is the end.
            return;
        }
        self.owed += bytes;
        self.single = self.large;
        self.large = false;
        self.heard = Instant::now();
    }

    /// Takes what came: a message, or news of the requests.
    fn take(&mut self, message: Option<Message>) -> Result<Option<Arrival>, Loss> {
        let Some(message) = message else {
            return Err(Loss::Failed(self.link.ended()));
        };
        self.heard = Instant::now();
        self.spoke = true;
        // One of the stream bears its own subject, and may bear any status.
        let news = message.subject.starts_with(&self.inbox);
        if let Some(status) = message.status.filter(|_| news) {
            return self.news(status.as_u16(), &message).map(|()| None);
        }
        let place = message.reply.as_deref().and_then(Place::parse);
        let place = place
            .ok_or_else(|| Error::new(Kind::Io, "a message without its place in the stream"))?;
        self.misses = 0;
        self.received += 1;
        if place.delivered != self.received {
            return Err(self.gone("a message was lost on its way"));
        }
        if self.single {
            self.single = false;
        } else {
            self.owed -= message.length as i64;
        }
        Ok(Some(Arrival {
            seq: place.seq,
            time: place.time,
            pending: place.pending,
            headers: message.headers,
            data: message.payload,
        }))
    }

    fn news(&mut self, status: u16, message: &Message) -> Result<(), Loss> {
        if status != 503 {
            self.misses = 0;
        }
        let why = message.description.as_deref().unwrap_or_default();
        match status {
            100 => {}
            404 | 408 => {
                self.end(message);
            }
            409 if why.starts_with("Message Size Exceeds") => {
                // Not even the first one had room.
                self.large = self.end(message);
                self.bytes = (self.bytes * 2).min(self.most);
            }
            // Known by the first request that is refused.
            409 if let Some(batch) = allowed_batch(why) => {
                self.end(message);
                self.most = batch * LEAST;
                self.bytes = self.bytes.min(self.most);
            }
            409 if why.eq_ignore_ascii_case("Batch Completed") => {
                self.end(message);
            }
            409 if why.starts_with("Exceeded") => {
                let why = format!("the stream does not allow it: {why}");
                return Err(Loss::Failed(Error::new(Kind::Unsupported, why)));
            }
            503 if self.received == 0 && self.misses < MISSES => {
                self.misses += 1;
                self.end(message);
            }
            // The stream or the consumer was removed, or another server leads it now.
            409 | 503 => return Err(self.gone(why)),
            _ => {
                let why = format!("asking for messages: {status} {why}");
                return Err(Loss::Failed(Error::new(Kind::Io, why)));
            }
        }
        Ok(())
    }

    /// Takes note that a request has ended; says whether it brought nothing.
    fn end(&mut self, message: &Message) -> bool {
        let number = |text: &str| text.parse::<i64>().ok();
        let asked = message.subject.rsplit('.').next().and_then(number);
        let asked = asked.unwrap_or(0);
        if asked == 0 {
            self.single = false;
            return false;
        }
        let headers = message.headers.as_ref();
        let left = headers.and_then(|headers| number(headers.get("Nats-Pending-Bytes")?.as_str()));
        let left = left.unwrap_or(asked);
        self.owed -= left;
        left == asked
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
            // The connection may have been made for this one alone, and end with it.
            if let Err(error) = link.tell(&subject, Bytes::new()).await {
                log::debug!("a consumer is left to the server: {error}");
            }
        });
    }
}

/// How many messages may be asked for at a time, where those were too many.
fn allowed_batch(why: &str) -> Option<i64> {
    let batch = why.strip_prefix("Exceeded MaxRequestBatch of ")?.parse();
    batch.ok().filter(|batch| *batch > 0)
}

/// What the subject for acknowledgements says of a message.
struct Place {
    seq: u64,
    /// Its number among those that the consumer has delivered.
    delivered: u64,
    time: SystemTime,
    pending: u64,
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
            pending: number()?,
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
