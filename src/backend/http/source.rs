//! Subscribers: one streamed request delivers what is there and what comes.

use std::collections::VecDeque;
use std::sync::Arc;

use reqwest::{Method, Response};

use super::client::{piece, translated};
use super::wire::{self, Record, Records};
use super::{Shared, not_a_gateway};
use crate::backend::floor::KnownFloor;
use crate::backend::{Floor, Fut, Limit, Source, Start};
use crate::error::{Error, Kind, Result};
use crate::message::{Message, Position};
use crate::name::PipeName;

/// A subscriber's place.
pub(super) struct Subscriber {
    shared: Arc<Shared>,
    pipe: PipeName,
    floor: Arc<KnownFloor>,
    /// The last message that was delivered or is pending.
    received: Option<Position>,
    /// Received, not delivered.
    pending: VecDeque<Message>,
    stream: Option<Stream>,
}

/// A response that is being read.
struct Stream {
    response: Response,
    records: Records,
    /// Where it ends by itself; `None` goes on for ever.
    before: Option<Position>,
}

/// How far a stream has come.
enum Progress {
    Messages,
    /// A floor, or a sign of life.
    Other,
    /// It is complete.
    End,
}

impl Subscriber {
    pub(super) fn new(shared: Arc<Shared>, pipe: PipeName, start: Start) -> Self {
        let floor = shared.floors.of(&pipe);
        Subscriber {
            shared,
            pipe,
            floor,
            received: match start {
                Start::Oldest => None,
                Start::After(position) => Some(position),
            },
            pending: VecDeque::new(),
            stream: None,
        }
    }

    /// The parameters that say which messages.
    fn range(&self, before: Option<Position>) -> Vec<(&'static str, String)> {
        let after = self
            .received
            .map(|position| ("after", position.to_string()));
        let before = before.map(|position| ("before", position.to_string()));
        after.into_iter().chain(before).collect()
    }

    /// Asks for the pipe's bounds, and whether something that was not received stands before `before`.
    async fn bounds(&self, before: Option<Position>) -> Result<wire::Bounds> {
        let client = &self.shared.client;
        let request = client.request(Method::GET, &self.pipe, &["bounds"]);
        let bounds: wire::Bounds = client.json(request.query(&self.range(before))).await?;
        self.floor.raise(bounds.floor);
        Ok(bounds)
    }

    async fn open(&self, before: Option<Position>) -> Result<Stream> {
        let client = &self.shared.client;
        let mut request = client
            .request(Method::GET, &self.pipe, &["messages"])
            .header(reqwest::header::ACCEPT, wire::RECORDS)
            .query(&self.range(before));
        if before.is_none() {
            request = request.query(&[("follow", "true")]);
        }
        let response = client.send(request).await?;
        let is_records = response
            .headers()
            .get(reqwest::header::CONTENT_TYPE)
            .is_some_and(|value| value == wire::RECORDS);
        if !is_records {
            return Err(not_a_gateway("its messages are no records"));
        }
        Ok(Stream {
            response,
            records: Records::default(),
            before,
        })
    }

    /// Takes what was dropped out of `pending`, and up to `max_bytes` of what stands before `before`.
    fn take(&mut self, max_bytes: usize, before: Option<Position>) -> Vec<Message> {
        self.floor.take(
            &mut self.pending,
            max_bytes,
            before.unwrap_or(Position::MAX),
        )
    }

    /// Reads on in the stream until it has said something.
    async fn advance(&mut self) -> Result<Progress> {
        let Some(stream) = &mut self.stream else {
            return Ok(Progress::End);
        };
        let mut progress = None;
        loop {
            let record = match stream.records.take() {
                Ok(record) => record,
                Err(error) => {
                    // Nothing that follows can be understood.
                    self.stream = None;
                    return Err(error);
                }
            };
            match record {
                Some(Record::Message(message)) => {
                    if self.received.is_some_and(|last| message.position <= last) {
                        self.stream = None;
                        return Err(not_a_gateway("positions that do not grow"));
                    }
                    self.received = Some(message.position);
                    self.pending.push_back(message);
                    progress = Some(Progress::Messages);
                }
                Some(Record::Floor(floor)) => {
                    self.floor.raise(floor);
                    progress = progress.or(Some(Progress::Other));
                }
                Some(Record::Alive) => progress = progress.or(Some(Progress::Other)),
                Some(Record::Failed(error)) => {
                    self.stream = None;
                    // What came before it comes first; asked on, the gateway says so again.
                    return progress.ok_or_else(|| translated(error));
                }
                Some(Record::End) => {
                    self.stream = None;
                    return Ok(progress.unwrap_or(Progress::End));
                }
                None => {
                    if let Some(progress) = progress {
                        return Ok(progress);
                    }
                    // Dropped while it waits, it loses nothing: what has arrived stays in the response.
                    let came = piece(&mut stream.response).await;
                    if let Ok(Some(piece)) = &came {
                        stream.records.feed(piece);
                        continue;
                    }
                    self.stream = None;
                    came?;
                    return Err(Error::new(Kind::Unreachable, "the stream was cut"));
                }
            }
        }
    }

    /// For a caller that does not wait.
    async fn next_before(&mut self, limit: Limit, before: Position) -> Result<Vec<Message>> {
        // What came before this call may have been dropped since; what a new request brings was not.
        if self.stream.is_some() || !self.pending.is_empty() {
            let more = self.bounds(Some(before)).await?.more;
            let ready = self.take(limit.max_bytes, Some(before));
            if !ready.is_empty() || !more {
                return Ok(ready);
            }
        }
        let mut fresh = self.pending.is_empty() && self.stream.is_none();
        if fresh {
            self.stream = Some(self.open(Some(before)).await?);
        }
        loop {
            let progress = self.advance().await?;
            let ready = self.take(limit.max_bytes, Some(before));
            if !ready.is_empty() {
                return Ok(ready);
            }
            match progress {
                // Only what lies behind the bound, or what was dropped, has come.
                Progress::Messages if !self.pending.is_empty() => return Ok(ready),
                Progress::End if fresh => return Ok(ready),
                // It was opened for an earlier bound.
                Progress::End => {
                    self.stream = Some(self.open(Some(before)).await?);
                    fresh = true;
                }
                Progress::Messages => {}
                Progress::Other => {
                    // What was announced may have been dropped meanwhile.
                    if !self.bounds(Some(before)).await?.more {
                        return Ok(ready);
                    }
                }
            }
        }
    }

    /// For a caller that waits.
    async fn next_whenever(&mut self, limit: Limit) -> Result<Vec<Message>> {
        if !self.pending.is_empty() {
            self.bounds(None).await?;
        }
        if self.stream.as_ref().is_some_and(|s| s.before.is_some()) {
            self.stream = None;
        }
        let mut opened = false;
        loop {
            let ready = self.take(limit.max_bytes, None);
            if !ready.is_empty() {
                return Ok(ready);
            }
            if self.stream.is_none() {
                if opened {
                    // Opened once more at once, it would end as soon, and so on.
                    let why = "the gateway has ended a stream that goes on for ever";
                    return Err(Error::new(Kind::Unreachable, why));
                }
                self.stream = Some(self.open(None).await?);
                opened = true;
            }
            self.advance().await?;
        }
    }
}

impl Source for Subscriber {
    fn next(&mut self, limit: Limit) -> Fut<'_, Vec<Message>> {
        Box::pin(async move {
            match limit.before {
                Some(before) => self.next_before(limit, before).await,
                None => self.next_whenever(limit).await,
            }
        })
    }

    fn floor(&self) -> Arc<dyn Floor> {
        Arc::clone(&self.floor) as Arc<dyn Floor>
    }

    fn end(&mut self) -> Fut<'_, Position> {
        Box::pin(async move { Ok(self.bounds(None).await?.end) })
    }
}
