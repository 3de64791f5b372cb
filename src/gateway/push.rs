//! Messages in. A body whose length is known is one batch, stored as a whole; one that streams is pushed
//! message by message as it comes.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use bytes::{Buf, Bytes, BytesMut};
use http_body_util::BodyExt;
use serde::Deserialize;
use tokio::time::{Instant, sleep, sleep_until};

use super::Gateway;
use super::access::Right;
use super::frames::PushFormat;
use super::identity::Push;
use super::parts::{Document, Parameters, Pipe};
use super::problem::Failed;
use super::room::Room;
use crate::backend::http::wire::{
    ATTEMPT, FIRST, KEY, MAX_BODY, MAX_MESSAGE, MAX_MESSAGES, Pushed, identity,
};
use crate::backend::weight;
use crate::error::{Error, Kind, Result};
use crate::message::{Batch, Position, Producer, PushId};
use crate::metrics;
use crate::name::PipeName;
use crate::pipe::framing::{self, Decoder};

/// How long a body that is announced may be silent.
const SILENCE: Duration = Duration::from_secs(20);

/// The slowest that a body may come, in bytes a second, after the first [`SILENCE`].
const SLOWEST: u64 = 16 << 10;

/// The same two where others wait for the memory that is held for the body.
const HASTE: Duration = Duration::from_secs(1);
const BRISK: u64 = 512 << 10;

/// How much of a body that streams is pushed at once, in bytes: each of them may be a message.
const PART: usize = 64 << 10;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Query {
    frame: Option<String>,
}

pub(super) async fn push(
    State(gateway): State<Arc<Gateway>>,
    pipe: Pipe,
    Parameters(query): Parameters<Query>,
    headers: HeaderMap,
    body: Body,
) -> Result<Document<Pushed>, Failed> {
    pipe.check(Right::Push)?;
    for (name, plain) in [
        ("Content-Encoding", "identity"),
        ("Transfer-Encoding", "chunked"),
    ] {
        let is_plain =
            |value: &HeaderValue| value.as_bytes().eq_ignore_ascii_case(plain.as_bytes());
        if !headers.get_all(name).iter().all(is_plain) {
            let error = Error::new(
                Kind::Unsupported,
                format!("a body with a {name} other than {plain}"),
            );
            return Err(Failed::with(StatusCode::UNSUPPORTED_MEDIA_TYPE, error));
        }
    }
    let content_type = headers
        .get(header::CONTENT_TYPE)
        .map(|value| value.as_bytes());
    let format = PushFormat::of_push(query.frame.as_deref(), content_type)?;
    let length = headers
        .get(header::CONTENT_LENGTH)
        .and_then(|length| length.to_str().ok()?.parse::<usize>().ok());
    let incoming = Incoming {
        gateway: &gateway,
        pipe: &pipe.name,
        format,
        limit: MAX_MESSAGE.min(gateway.backend.caps().max_message),
    };
    let pushed = match (length, headers.get(KEY)) {
        (Some(length), key) => {
            let key = key.map(|key| identity(key.as_bytes())).transpose()?;
            let first = headers.get(ATTEMPT).is_some_and(|value| value == FIRST);
            incoming.whole(key, first, body, length).await?
        }
        (None, Some(_)) => {
            let why = format!("a push with an {KEY} needs a Content-Length");
            return Err(Error::new(Kind::InvalidInput, why).into());
        }
        (None, None) => incoming.stream(body).await?,
    };
    Ok(Document(pushed))
}

struct Incoming<'a> {
    gateway: &'a Gateway,
    pipe: &'a PipeName,
    format: PushFormat,
    limit: usize,
}

impl Incoming<'_> {
    /// Pushes the body as one batch, under the identity of its key, if it has one.
    async fn whole(
        &self,
        key: Option<PushId>,
        first: bool,
        body: Body,
        length: usize,
    ) -> Result<Pushed, Failed> {
        if length > MAX_BODY {
            let why = format!("a body of {length} bytes is over the limit of {MAX_BODY}");
            return Err(Error::new(Kind::TooLong, why).into());
        }
        let mut room = Room::default();
        let body = self.collect(body, length, &mut room).await?;
        let count = framing::count(self.format.frame(), &body);
        if count > MAX_MESSAGES {
            let why = format!("a body of {count} messages is over the limit of {MAX_MESSAGES}");
            return Err(Error::new(Kind::TooLong, why).into());
        }
        let weight = body.len() + count * weight(&[]);
        self.gateway.rooms.reserve(&mut room, weight).await?;
        let mut decoder = Decoder::new(self.format.frame(), self.limit);
        let mut decoded = decoder.decode(&body);
        if let Some(refused) = decoded.refused {
            return Err(refused.into());
        }
        let mut contents = std::mem::take(&mut decoded.messages);
        decoder.accept(&body, decoded, false)?;
        contents.extend(decoder.finish()?);
        // A message that nothing ends was copied.
        drop(body);
        let Some(key) = key else {
            let id = PushId::first(Producer::random()?, 1);
            let (position, count) = self.store(id, contents).await?;
            return Ok(Pushed { position, count });
        };
        // Held until the push is made, so that one of the same key finds it.
        let mut turn = self.gateway.identities.turn(key).await;
        let id = match turn.note(self.pipe, key, first)? {
            Push::Store(id) => id,
            Push::Known(position) => {
                return Ok(Pushed {
                    position: Some(position),
                    count: contents.len() as u64,
                });
            }
        };
        if id.repeated {
            metrics::SEARCHED.add(1);
        }
        let (position, count) = self.store(id, contents).await?;
        if let Some(position) = position {
            turn.stored(id, position);
        }
        Ok(Pushed { position, count })
    }

    async fn collect(&self, body: Body, length: usize, room: &mut Room) -> Result<Bytes, Failed> {
        let mut since = Instant::now();
        let mut body = pin!(body);
        let mut all = BytesMut::new();
        loop {
            let frame = tokio::select! {
                biased;
                frame = body.frame() => frame,
                () = sleep(SILENCE) => return Err(too_slow()),
                () = self.overdue(room, Some(since), all.len()) => return Err(too_slow()),
            };
            let Some(frame) = frame else {
                return Ok(all.freeze());
            };
            let Ok(data) = frame.map_err(cut)?.into_data() else {
                continue;
            };
            let asked = Instant::now();
            self.gateway
                .rooms
                .reserve(room, all.len() + data.len())
                .await?;
            // To wait for room is not to be slow.
            since += asked.elapsed();
            if all.is_empty() {
                // What is announced is believed so far; the rest grows as it comes.
                all.reserve(length.min(1 << 20).max(data.len()));
            }
            all.extend_from_slice(&data);
        }
    }

    /// Returns when a body, or a message of a stream, is late: it has begun at `since`, and `bytes` of it
    /// have come, for which `room` is held. Between messages a stream may be silent for as long as it likes.
    async fn overdue(&self, room: &Room, since: Option<Instant>, bytes: usize) {
        let Some(since) = since else {
            return std::future::pending().await;
        };
        let by = |grace: Duration, rate: u64| {
            sleep_until(since + grace + Duration::from_secs_f64(bytes as f64 / rate as f64))
        };
        tokio::select! {
            () = by(SILENCE, SLOWEST) => {}
            () = async {
                self.gateway.rooms.wanted(room).await;
                by(HASTE, BRISK).await;
            } => {}
        }
    }

    /// Pushes what ends in each piece of the body.
    async fn stream(&self, body: Body) -> Result<Pushed, Failed> {
        let mut body = pin!(body);
        let mut decoder = Decoder::new(self.format.frame(), self.limit);
        let (producer, mut pushes) = (Producer::random()?, 0);
        let mut pushed = Pushed {
            position: None,
            count: 0,
        };
        let mut store = async |contents: Vec<Bytes>, pushed: &mut Pushed| {
            pushes += 1;
            let stored = self.store(PushId::first(producer, pushes), contents).await;
            let (last, count) = stored.map_err(|error| Failed::after(error, pushed.count))?;
            pushed.position = last.or(pushed.position);
            pushed.count += count;
            Ok::<_, Failed>(())
        };
        let mut room = Room::default();
        // Since when room is held for a message that has not ended.
        let mut since = None;
        let mut end = pin!(self.gateway.end());
        loop {
            let frame = tokio::select! {
                biased;
                () = &mut end => {
                    let error = Error::new(Kind::Unreachable, "the gateway is ending");
                    return Err(Failed::after(error, pushed.count));
                }
                frame = body.frame() => frame,
                () = self.overdue(&room, since, decoder.kept()) => {
                    return Err(too_slow().having_stored(pushed.count));
                }
            };
            let Some(frame) = frame else {
                break;
            };
            let frame = frame.map_err(|error| Failed::after(cut(error), pushed.count))?;
            let Ok(mut piece) = frame.into_data() else {
                continue;
            };
            let before = pushed.count;
            while !piece.is_empty() {
                let part = piece.slice(..piece.len().min(PART));
                let mut decoded = decoder.decode(&part);
                let contents = std::mem::take(&mut decoded.messages);
                store(contents, &mut pushed).await?;
                let taken = decoder.accept(&part, decoded, false);
                let taken = taken.map_err(|error| Failed::after(error, pushed.count))?;
                piece.advance(taken);
            }
            // A long message is gathered in memory that others wait for too.
            if pushed.count > before || decoder.kept() == 0 {
                (room, since) = (Room::default(), None);
            }
            let asked = Instant::now();
            let reserved = self.gateway.rooms.reserve(&mut room, decoder.kept()).await;
            reserved.map_err(|error| Failed::after(error, pushed.count))?;
            since = since.map(|since| since + asked.elapsed());
            if room.is_held() {
                since = since.or_else(|| Some(Instant::now()));
            }
        }
        let last = decoder
            .finish()
            .map_err(|error| Failed::after(error, pushed.count))?;
        store(last.into_iter().collect(), &mut pushed).await?;
        Ok(pushed)
    }

    /// Stores a batch; an empty one is none.
    async fn store(&self, id: PushId, contents: Vec<Bytes>) -> Result<(Option<Position>, u64)> {
        if contents.is_empty() {
            return Ok((None, 0));
        }
        let messages = contents
            .into_iter()
            .map(|content| self.format.message(content))
            .collect::<Result<Vec<Bytes>>>()?;
        let batch = Batch::new(messages)?;
        let (count, bytes) = (batch.messages().len() as u64, batch.bytes() as u64);
        let last = self.gateway.backend.push(self.pipe, id, batch).await?;
        metrics::PUSHED.add(count);
        metrics::PUSHED_BYTES.add(bytes);
        Ok((Some(last), count))
    }
}

fn too_slow() -> Failed {
    let error = Error::new(Kind::Unreachable, "the body comes too slowly");
    Failed::with(StatusCode::REQUEST_TIMEOUT, error)
}

fn cut(error: axum::Error) -> Error {
    Error::new(Kind::InvalidInput, "the body was cut").caused_by(error)
}

#[cfg(test)]
mod tests {
    use axum::response::IntoResponse;
    use futures_util::{StreamExt, stream};

    use super::*;
    use crate::backend::memory::Memory;
    use crate::gateway::access::Access;
    use crate::selector::Frame;

    /// What a stream is answered that brings these pieces and then nothing, without an end.
    async fn answer(pieces: &[&[u8]]) -> Result<StatusCode, tokio::time::error::Elapsed> {
        let gateway = Gateway::new(Arc::new(Memory::new(64 << 20)), Access::open());
        let pieces: Vec<std::io::Result<Bytes>> = pieces
            .iter()
            .map(|piece| Ok(Bytes::copy_from_slice(piece)))
            .collect();
        let incoming = Incoming {
            gateway: &gateway,
            pipe: &PipeName::new("topic").expect("a name"),
            format: PushFormat::Framed(Frame::Line),
            limit: MAX_MESSAGE,
        };
        let body = Body::from_stream(stream::iter(pieces).chain(stream::pending()));
        let pushed = tokio::time::timeout(Duration::from_secs(3600), incoming.stream(body)).await?;
        Ok(pushed.map_or_else(|failed| failed.into_response().status(), |_| StatusCode::OK))
    }

    #[tokio::test(start_paused = true)]
    async fn only_who_keeps_room_from_others_must_go_on() {
        let long = vec![b'x'; 1 << 20];
        let slow = Ok(StatusCode::REQUEST_TIMEOUT);
        assert_eq!(answer(&[&long]).await, slow);
        assert_eq!(answer(&[b"one\n", &long, b"two\n", &long]).await, slow);
        // Between messages, and with a few bytes of one, a stream may wait for hours.
        assert!(answer(&[b"one\n"]).await.is_err());
        assert!(answer(&[b"one\ntw"]).await.is_err());
        assert!(answer(&[&long, &long, b"\ntw"]).await.is_err());
    }
}
