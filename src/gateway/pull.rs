//! Messages out, as a stream: what is there, and with `follow` what comes.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::stream::{self, BoxStream, StreamExt};
use serde::Deserialize;
use tokio::sync::watch;
use tokio::time::{Instant, Interval, MissedTickBehavior, interval, timeout_at};

use super::Gateway;
use super::access::Right;
use super::frames::Format;
use super::parts::{Parameters, Pipe};
use super::problem::{Failed, document};
use crate::backend::http::wire::{HEARTBEAT, Record};
use crate::backend::{Backend, Floor, Limit, Source, Start};
use crate::error::{Error, Kind, Result};
use crate::message::{Message, Position};
use crate::metrics;
use crate::name::PipeName;
use crate::selector::{Frame, parse_duration};

/// Weight of messages that are fetched for one reader at a time.
const FETCH: usize = 64 << 10;

/// How often a waiting stream looks for resets that were made elsewhere.
const LOOK: Duration = Duration::from_secs(1);

/// The longest that `wait` may ask for.
const LONGEST_WAIT: Duration = Duration::from_secs(3600);

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Query {
    frame: Option<String>,
    follow: Option<String>,
    from: Option<String>,
    after: Option<String>,
    before: Option<String>,
    wait: Option<String>,
    limit: Option<u64>,
}

fn refuse(why: impl Into<String>) -> Error {
    Error::new(Kind::InvalidInput, why)
}

impl Query {
    fn follow(&self) -> Result<bool> {
        match self.follow.as_deref() {
            None | Some("false" | "0") => Ok(false),
            Some("" | "true" | "1") => Ok(true),
            Some(other) => Err(refuse(format!("follow={other} is neither true nor false"))),
        }
    }

    fn wait(&self) -> Result<Option<Duration>> {
        let Some(text) = self.wait.as_deref() else {
            return Ok(None);
        };
        match parse_duration(text) {
            Some(time) if time <= LONGEST_WAIT => Ok(Some(time)),
            _ => Err(refuse(format!(
                "wait={text} is not a time of up to an hour, as 30s"
            ))),
        }
    }

    /// Where the query, or a browser that comes again, wants to start; `None` behind the newest message.
    fn start(&self, headers: &HeaderMap) -> Result<Option<Start>> {
        let seen = headers.get("last-event-id").and_then(|id| id.to_str().ok());
        // Empty, it says that no event had an id.
        let seen = seen.filter(|id| !id.is_empty());
        Ok(match (self.from.as_deref(), self.after.as_deref()) {
            (Some(_), Some(_)) => return Err(refuse("from and after exclude each other")),
            // It has the address that it had from the beginning, and has seen more since.
            _ if seen.is_some() => seen.map(str::parse).transpose()?.map(Start::After),
            (None, Some(after)) => Some(Start::After(after.parse()?)),
            (None | Some("oldest"), None) => Some(Start::Oldest),
            (Some("newest"), None) => None,
            (Some(position), None) => Some(Start::After(position.parse::<Position>()?.before())),
        })
    }
}

async fn open(
    backend: &dyn Backend,
    pipe: &PipeName,
    start: Option<Start>,
) -> Result<Box<dyn Source>> {
    let start = match start {
        Some(start) => start,
        None => {
            let mut source = backend.subscribe(pipe, Start::Oldest).await?;
            Start::After(source.end().await?.before())
        }
    };
    backend.subscribe(pipe, start).await
}

pub(super) async fn pull(
    State(gateway): State<Arc<Gateway>>,
    pipe: Pipe,
    Parameters(query): Parameters<Query>,
    headers: HeaderMap,
) -> Result<Response, Failed> {
    pipe.check(Right::Read)?;
    let format = Format::of_pull(query.frame.as_deref(), &headers)?;
    let (follow, wait, start) = (query.follow()?, query.wait()?, query.start(&headers)?);
    let before = query
        .before
        .as_deref()
        .map(str::parse::<Position>)
        .transpose()?;
    if follow && (wait.is_some() || before.is_some()) {
        return Err(refuse("follow goes with neither wait nor before").into());
    }
    // Browsers ask for events as long as their page is open.
    let follow = follow || format == Format::Events && wait.is_none() && before.is_none();
    if !follow && wait.is_none() && format != Format::Records {
        // Who does not wait is told that there is nothing to wait for.
        gateway.backend.stat(&pipe.name).await?;
    }
    let mut source = open(&*gateway.backend, &pipe.name, start).await?;
    let left = query.limit.unwrap_or(u64::MAX);
    let floor = source.floor();
    let messages = match (follow, wait) {
        (true, _) => Messages::ThatCome(coming(source, limit(left, None))),
        (false, Some(wait)) => Messages::Until(source, End::First(Instant::now() + wait)),
        // Pinned, so that it ends also where others push faster than this is read.
        (false, None) => {
            let end = source.end().await?.min(before.unwrap_or(Position::MAX));
            Messages::Until(source, End::Bound(end))
        }
    };
    let mut look = interval(LOOK);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let stream = Pull {
        messages,
        floor,
        told: Position::MIN,
        resets: gateway.resets.subscribe(),
        ending: gateway.ending.subscribe(),
        said: Instant::now(),
        left,
        format,
        look,
        _reader: metrics::READERS.held(),
    };
    let body = stream::unfold(Some(stream), async |pull| {
        let mut pull = pull?;
        match pull.piece().await {
            Ok(Some(piece)) => Some((Ok(piece), Some(pull))),
            Ok(None) => pull.last_words().map(|piece| (Ok(piece), None)),
            Err(error) => {
                log::warn!("a pull ends: {error}");
                Some((pull.failure(error), None))
            }
        }
    });
    let headers = [
        (
            header::CONTENT_TYPE,
            HeaderValue::from_static(format.content_type()),
        ),
        (header::CACHE_CONTROL, HeaderValue::from_static("no-store")),
        // nginx hands on what comes when it comes.
        (
            header::HeaderName::from_static("x-accel-buffering"),
            HeaderValue::from_static("no"),
        ),
    ];
    Ok((headers, Body::from_stream(body)).into_response())
}

/// What a pull delivers.
enum Messages {
    ThatCome(BoxStream<'static, Result<Vec<Message>>>),
    Until(Box<dyn Source>, End),
}

/// How long a pull goes on.
#[derive(Clone, Copy)]
enum End {
    /// Everything before this position.
    Bound(Position),
    /// For the first message until then.
    First(Instant),
}

/// What comes, for ever. The source goes on with what it was asked for while nobody waits for it: asked anew
/// again and again, one that is slow, or away, would begin anew each time.
fn coming(source: Box<dyn Source>, limit: Limit) -> BoxStream<'static, Result<Vec<Message>>> {
    stream::unfold(source, move |mut source| async move {
        let messages = source.next(limit).await;
        Some((messages, source))
    })
    .boxed()
}

/// What is fetched at a time for a reader who wants `left` messages more.
fn limit(left: u64, before: Option<Position>) -> Limit {
    Limit {
        // Who wants one message more does not fetch many.
        max_bytes: if left == 1 { 1 } else { FETCH },
        before,
    }
}

struct Pull {
    messages: Messages,
    format: Format,
    /// Messages that may still be sent.
    left: u64,
    floor: Arc<dyn Floor>,
    /// The floor that the reader was told.
    told: Position,
    resets: watch::Receiver<u64>,
    ending: watch::Receiver<bool>,
    look: Interval,
    /// When something was last sent.
    said: Instant,
    _reader: metrics::Held,
}

impl Pull {
    /// The body's next piece; `None` at its end.
    async fn piece(&mut self) -> Result<Option<Bytes>> {
        if self.left == 0 {
            return Ok(None);
        }
        let mut out = Vec::new();
        let goes_on = match self.messages {
            Messages::ThatCome(_) => self.follow(&mut out).await?,
            Messages::Until(..) => self.go_on(&mut out).await?,
        };
        if !goes_on {
            return Ok(None);
        }
        self.said = Instant::now();
        Ok(Some(out.into()))
    }

    /// Takes what there is up to the end; false if that is reached.
    async fn go_on(&mut self, out: &mut Vec<u8>) -> Result<bool> {
        let Messages::Until(source, end) = &mut self.messages else {
            return Ok(false);
        };
        let bound = match *end {
            End::Bound(bound) => bound,
            End::First(deadline) => {
                if *self.ending.borrow() {
                    return Ok(false);
                }
                let first = source.next(limit(self.left, None));
                let first = tokio::select! {
                    first = timeout_at(deadline, first) => first,
                    _ = self.ending.changed() => return Ok(false),
                };
                // Asked for also where none came in time: a source that is away must not pass for an empty pipe.
                let bound = source.end().await?;
                *end = End::Bound(bound);
                if let Ok(messages) = first {
                    self.put(messages?, out);
                    return Ok(true);
                }
                bound
            }
        };
        let messages = source.next(limit(self.left, Some(bound))).await?;
        let some = !messages.is_empty();
        self.put(messages, out);
        Ok(some)
    }

    /// Waits until there is something to say; false if it is the end.
    async fn follow(&mut self, out: &mut Vec<u8>) -> Result<bool> {
        loop {
            self.tell_floor(out);
            if *self.ending.borrow() {
                return Ok(false);
            }
            if !out.is_empty() {
                return Ok(true);
            }
            let Messages::ThatCome(messages) = &mut self.messages else {
                return Ok(false);
            };
            tokio::select! {
                biased;
                messages = messages.next() => {
                    let Some(messages) = messages.transpose()? else {
                        return Ok(false);
                    };
                    self.tell_floor(out);
                    self.put(messages, out);
                    return Ok(true);
                }
                _ = self.resets.changed() => {}
                _ = self.ending.changed() => {}
                _ = self.look.tick() => {
                    if self.said.elapsed() >= Duration::from_secs(HEARTBEAT) {
                        self.put_alive(out);
                        self.said = Instant::now();
                    }
                }
            }
        }
    }

    fn put(&mut self, messages: Vec<Message>, out: &mut Vec<u8>) {
        let sent = messages
            .len()
            .min(usize::try_from(self.left).unwrap_or(usize::MAX));
        let mut bytes = 0;
        for message in &messages[..sent] {
            self.format.put(message, out);
            bytes += message.data.len() as u64;
        }
        self.left -= sent as u64;
        metrics::PULLED.add(sent as u64);
        metrics::PULLED_BYTES.add(bytes);
    }

    /// Tells a reader who wants to know it of a reset.
    fn tell_floor(&mut self, out: &mut Vec<u8>) {
        let floor = self.floor.position();
        if floor > self.told && self.format == Format::Records {
            self.told = floor;
            Record::put_floor(floor, out);
        }
    }

    fn put_alive(&self, out: &mut Vec<u8>) {
        match self.format {
            Format::Records => Record::put_alive(out),
            // A comment.
            Format::Events => out.extend_from_slice(b":\n\n"),
            Format::Framed(Frame::Line | Frame::Nul | Frame::File | Frame::Len) | Format::Json => {}
        }
    }

    /// What tells a whole body from one that was cut. A stream that the gateway's end cuts has none: the
    /// reader comes again.
    fn last_words(&self) -> Option<Bytes> {
        let complete = matches!(self.messages, Messages::Until(..)) || self.left == 0;
        if self.format != Format::Records || !complete {
            return None;
        }
        let mut out = Vec::new();
        Record::put_end(&mut out);
        Some(out.into())
    }

    /// How the reader learns of a failure: by a record, or by a body that breaks off.
    fn failure(&self, error: Error) -> Result<Bytes> {
        if self.format != Format::Records {
            return Err(error);
        }
        let mut out = Vec::new();
        Record::put_failed(&document(&error), &mut out);
        Ok(out.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wait(text: &str) -> Option<Duration> {
        let query = Query {
            frame: None,
            follow: None,
            from: None,
            after: None,
            before: None,
            wait: Some(text.to_owned()),
            limit: None,
        };
        query.wait().ok().flatten()
    }

    #[test]
    fn a_time_to_wait_is_an_hour_at_most_however_it_is_written() {
        assert_eq!(wait("0"), Some(Duration::ZERO));
        assert_eq!(wait("90"), wait("1m 30s"));
        assert_eq!(wait("59m 59s 1000ms"), Some(LONGEST_WAIT));
        for text in [
            "",
            "-1",
            "3601",
            "1h 1s",
            "584542046090y",
            "18446744073709551616",
            // These make humantime panic.
            "18446744073709551615s 1000000000ns",
            "5124095576030431h15s1000ms",
        ] {
            assert_eq!(wait(text), None, "{text}");
        }
    }
}
