//! Messages in. A body whose length is known is one batch, stored as a whole; one that streams is pushed
//! message by message as it comes.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, header};
use bytes::{Buf, Bytes, BytesMut};
use http_body_util::BodyExt;
use serde::Deserialize;
use tokio::time::Instant;

use super::Gateway;
use super::access::Right;
use super::frames::PushFormat;
use super::problem::Failed;
use super::room::Room;
use super::routes::{Document, Parameters, Pipe};
use crate::backend::http::wire::{ATTEMPT, FIRST, KEY, MAX_BODY, MAX_MESSAGE, Pushed, identity};
use crate::error::{Error, Kind, Result};
use crate::message::{Batch, Position, Producer, PushId};
use crate::metrics;
use crate::name::PipeName;
use crate::pipe::framing::Decoder;

/// How long a body that is announced may be silent.
const SILENCE: Duration = Duration::from_secs(20);

/// The slowest that a body may come, in bytes a second, after the first [`SILENCE`].
const SLOWEST: u64 = 16 << 10;

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
            let id = match key {
                Some(key) => {
                    let first = headers.get(ATTEMPT).is_some_and(|value| value == FIRST);
                    gateway.identities.note(identity(key.as_bytes())?, first)?
                }
                None => PushId::first(Producer::random()?, 1),
            };
            if id.repeated {
                metrics::REPEATED.add(1);
            }
            incoming.whole(id, body, length).await?
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
    /// Pushes the body as one batch.
    async fn whole(&self, id: PushId, body: Body, length: usize) -> Result<Pushed, Failed> {
        if length > MAX_BODY {
            let why = format!("a body of {length} bytes is over the limit of {MAX_BODY}");
            return Err(Error::new(Kind::TooLong, why).into());
        }
        let mut room = Room::default();
        let body = self.collect(body, length, &mut room).await?;
        let mut decoder = Decoder::new(self.format.frame(), self.limit);
        let decoded = decoder.decode(&body);
        if let Some(refused) = decoded.refused {
            return Err(refused.into());
        }
        let mut contents = decoded.messages.clone();
        decoder.accept(&body, decoded, false)?;
        contents.extend(decoder.finish()?);
        let (last, count) = self.store(id, contents).await?;
        Ok(Pushed {
            position: last,
            count,
        })
    }

    async fn collect(&self, body: Body, length: usize, room: &mut Room) -> Result<Bytes, Failed> {
        let since = Instant::now();
        let mut body = pin!(body);
        let mut all = BytesMut::new();
        loop {
            let slowest = since + SILENCE + Duration::from_secs(all.len() as u64 / SLOWEST);
            let frame = tokio::time::timeout(SILENCE, body.frame());
            let Ok(Ok(frame)) = tokio::time::timeout_at(slowest, frame).await else {
                let status = axum::http::StatusCode::REQUEST_TIMEOUT;
                let error = Error::new(Kind::Unreachable, "the body comes too slowly");
                return Err(Failed::with(status, error));
            };
            let Some(frame) = frame else {
                return Ok(all.freeze());
            };
            let Ok(data) = frame.map_err(cut)?.into_data() else {
                continue;
            };
            self.gateway
                .rooms
                .reserve(room, all.len() + data.len())
                .await?;
            if all.is_empty() {
                // What is announced is believed so far; the rest grows as it comes.
                all.reserve(length.min(1 << 20).max(data.len()));
            }
            all.extend_from_slice(&data);
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
        let mut end = pin!(self.gateway.end());
        loop {
            let frame = tokio::select! {
                biased;
                () = &mut end => {
                    let error = Error::new(Kind::Unreachable, "the gateway is ending");
                    return Err(Failed::after(error, pushed.count));
                }
                frame = body.frame() => frame,
            };
            let Some(frame) = frame else {
                break;
            };
            let frame = frame.map_err(|error| Failed::after(cut(error), pushed.count))?;
            let Ok(mut piece) = frame.into_data() else {
                continue;
            };
            while !piece.is_empty() {
                let mut decoded = decoder.decode(&piece);
                let contents = std::mem::take(&mut decoded.messages);
                store(contents, &mut pushed).await?;
                let taken = decoder.accept(&piece, decoded, false);
                let taken = taken.map_err(|error| Failed::after(error, pushed.count))?;
                piece.advance(taken);
            }
            // A long message is gathered in memory that others wait for too.
            match decoder.kept() {
                0 => room = Room::default(),
                kept => self.gateway.rooms.reserve(&mut room, kept).await?,
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

fn cut(error: axum::Error) -> Error {
    Error::new(Kind::InvalidInput, "the body was cut").caused_by(error)
}
