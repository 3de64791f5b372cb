//! Subscribers: each has a consumer of its own.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use serde::Deserialize;
use serde_json::json;

use super::Shared;
use super::api::{Info, NO_MESSAGE};
use super::feed::{Arrival, Feed, Loss};
use crate::backend::floor::KnownFloor;
use crate::backend::{Floor, Fut, Limit, Source, Start, weight};
use crate::error::{Error, Kind, Result};
use crate::message::{Message, Position};
use crate::name::PipeName;

/// How long to wait for a message that is known to be there, before it is looked whether it still is. Doubled
/// each time, up to a second.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// How often a pipe that does not exist is looked for, should the news of its making be lost, or not be
/// permitted.
const LOOK_FOR: Duration = Duration::from_secs(5);

/// A subscriber's place.
pub(super) struct Subscriber {
    shared: Arc<Shared>,
    pipe: PipeName,
    floor: Arc<KnownFloor>,
    /// The last message that was delivered or is pending.
    received: Option<Position>,
    /// Received, not delivered.
    pending: VecDeque<Message>,
    stage: Stage,
    /// The incarnation that was there at the last look.
    epoch: Option<u64>,
}

/// How far the consumer is.
enum Stage {
    None,
    /// It is being made; that goes on where a wait was dropped.
    Opening(Pin<Box<dyn Future<Output = Result<Open>> + Send>>),
    Open(Open),
}

/// A consumer of a known incarnation of the pipe.
struct Open {
    epoch: u64,
    feed: Feed,
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
            stage: Stage::None,
            epoch: None,
        }
    }

    /// What the server says of the pipe now.
    async fn look(&mut self) -> Result<Option<Info>> {
        let link = self.shared.reading.link().await?;
        let info = self.shared.look(&link, &self.pipe).await?;
        match &info {
            Some(info) => {
                readable(info)?;
                let epoch = info.epoch()?;
                self.epoch = Some(epoch);
                if matches!(&self.stage, Stage::Open(open) if open.epoch != epoch) {
                    self.stage = Stage::None;
                }
            }
            None => {
                self.epoch = None;
                if let Some(position) = self.received {
                    // It is gone, with its messages. One that is made again is later.
                    self.floor
                        .raise(Position::new(position.epoch().saturating_add(1), 0));
                }
                self.stage = Stage::None;
            }
        }
        Ok(info)
    }

    /// Whether a message that was not received is there before `before`.
    async fn is_more(&mut self, info: &Info, before: Position) -> Result<bool> {
        let epoch = info.epoch()?;
        let next = next_number(self.received, epoch).max(info.state.first_seq);
        if info.state.messages == 0
            || next > info.state.last_seq
            || Position::new(epoch, next) >= before
        {
            return Ok(false);
        }
        if info.state.num_deleted == 0 {
            return Ok(true);
        }
        // Some were deleted one by one; perhaps all of these.
        let link = self.shared.reading.link().await?;
        let ask = json!({ "seq": next, "next_by_subj": ">" });
        let what = format!("STREAM.MSG.GET.{}", info.config.name);
        match link.api::<Got>(&what, &ask).await? {
            Ok(got) => Ok(Position::new(epoch, got.message.seq) < before),
            Err(error) if error.is(NO_MESSAGE) => Ok(false),
            Err(error) => Err(error.typed()),
        }
    }

    /// Takes what was dropped out of `pending`, and up to `max_bytes` of what stands before `before`.
    fn take(&mut self, max_bytes: usize, before: Position) -> Vec<Message> {
        let floor = self.floor.position();
        let mut taken = Vec::new();
        let mut bytes = 0;
        while let Some(message) = self.pending.front() {
            if message.position >= floor {
                if message.position >= before || bytes >= max_bytes.max(1) {
                    break;
                }
                bytes += weight(&message.data);
                taken.extend(self.pending.pop_front());
            } else {
                self.pending.pop_front();
            }
        }
        taken
    }

    fn put(&mut self, epoch: u64, arrival: Arrival) {
        let position = Position::new(epoch, arrival.seq);
        if arrival.seq < next_number(self.received, epoch) {
            return;
        }
        self.received = Some(position);
        self.pending.push_back(Message {
            position,
            time: arrival.time,
            data: arrival.data,
        });
    }

    /// Moves what has arrived to `pending`, until about `max_bytes` are there.
    async fn gather(&mut self, max_bytes: usize) -> Result<()> {
        let mut bytes: usize = self.pending.iter().map(|m| weight(&m.data)).sum();
        while bytes < max_bytes
            && let Stage::Open(open) = &mut self.stage
        {
            let epoch = open.epoch;
            match open.feed.next_now().await {
                Ok(Some(arrival)) => {
                    bytes += weight(&arrival.data);
                    self.put(epoch, arrival);
                }
                Ok(None) => break,
                Err(loss) => {
                    self.stage = Stage::None;
                    // What has come is delivered first.
                    if let Loss::Failed(error) = loss
                        && self.pending.is_empty()
                    {
                        return Err(error);
                    }
                }
            }
        }
        Ok(())
    }

    /// Waits until something has arrived. Dropping the future loses nothing.
    async fn arrive(&mut self, max_bytes: usize) -> Result<()> {
        loop {
            match &mut self.stage {
                Stage::None => {
                    let (shared, pipe) = (Arc::clone(&self.shared), self.pipe.clone());
                    let opening = open(shared, pipe, self.epoch.take(), self.received);
                    self.stage = Stage::Opening(Box::pin(opening));
                }
                Stage::Opening(opening) => {
                    let opened = opening.await;
                    self.stage = Stage::None;
                    self.stage = Stage::Open(opened?);
                }
                Stage::Open(open) => match open.feed.next().await {
                    Ok(arrival) => {
                        let epoch = open.epoch;
                        self.put(epoch, arrival);
                        return self.gather(max_bytes).await;
                    }
                    Err(loss) => {
                        self.stage = Stage::None;
                        match loss {
                            Loss::Failed(error) => return Err(error),
                            Loss::Gone(why, true) => log::debug!("{}: {why}", self.pipe),
                            Loss::Gone(why, false) => {
                                return Err(Error::new(Kind::Unreachable, why));
                            }
                        }
                    }
                },
            }
        }
    }

    /// For a caller that does not wait.
    async fn next_before(&mut self, limit: Limit, before: Position) -> Result<Vec<Message>> {
        let mut patience = LOOK_AGAIN;
        loop {
            // What came before this call may have been dropped since.
            let Some(info) = self.look().await? else {
                return Ok(self.take(limit.max_bytes, before));
            };
            let arriving = self.arrive_before(&info, limit.max_bytes, before);
            // What is waited for may be dropped before it comes.
            let arrived = tokio::time::timeout(patience, arriving).await;
            let late = arrived.is_err();
            let failed = arrived.ok().and_then(Result::err);
            let ready = self.take(limit.max_bytes, before);
            match failed {
                _ if !ready.is_empty() => return Ok(ready),
                Some(error) => return Err(error),
                None if !late => return Ok(ready),
                None => patience = (patience * 2).min(Duration::from_secs(1)),
            }
        }
    }

    /// Waits until all that stands before `before` has arrived, or `max_bytes` of it.
    async fn arrive_before(
        &mut self,
        info: &Info,
        max_bytes: usize,
        before: Position,
    ) -> Result<()> {
        loop {
            self.gather(max_bytes).await?;
            let bytes: usize = self.pending.iter().map(|m| weight(&m.data)).sum();
            let far = self
                .pending
                .back()
                .is_some_and(|last| last.position >= before);
            if bytes >= max_bytes.max(1) || far || !self.is_more(info, before).await? {
                return Ok(());
            }
            self.arrive(max_bytes).await?;
        }
    }

    /// For a caller that waits.
    async fn next_whenever(&mut self, limit: Limit) -> Result<Vec<Message>> {
        self.gather(limit.max_bytes).await?;
        if !self.pending.is_empty() {
            self.look().await?;
        }
        loop {
            let ready = self.take(limit.max_bytes, Position::MAX);
            if !ready.is_empty() {
                return Ok(ready);
            }
            self.arrive(limit.max_bytes).await?;
        }
    }
}

/// The number of the first message of incarnation `epoch` that was not received.
fn next_number(received: Option<Position>, epoch: u64) -> u64 {
    match received {
        Some(position) if position.epoch() == epoch => position.seq().saturating_add(1),
        // Of another incarnation, whose messages are gone.
        _ => 0,
    }
}

#[derive(Deserialize)]
struct Got {
    message: GotMessage,
}

#[derive(Deserialize)]
struct GotMessage {
    seq: u64,
}

/// Makes a consumer behind `received`; waits until the pipe exists. `epoch` is the incarnation that was seen
/// last.
async fn open(
    shared: Arc<Shared>,
    pipe: PipeName,
    mut epoch: Option<u64>,
    received: Option<Position>,
) -> Result<Open> {
    let stream = shared.url.naming.stream(&pipe)?;
    let link = shared.reading.link().await?;
    let mut news = None;
    loop {
        let mut feed = None;
        if let Some(epoch) = epoch {
            let start = next_number(received, epoch);
            feed = Feed::open(Arc::clone(&link), &stream, start, false).await?;
        }
        // A consumer is of the incarnation that was there before and is there after.
        if let Some(info) = shared.look(&link, &pipe).await? {
            readable(&info)?;
            let now = info.epoch()?;
            match feed {
                Some(feed) if epoch == Some(now) => return Ok(Open { epoch: now, feed }),
                _ => epoch = Some(now),
            }
            continue;
        }
        epoch = None;
        // The next look comes after the server knows who listens.
        let Some(made) = &mut news else {
            let made = format!("$JS.EVENT.ADVISORY.STREAM.CREATED.{stream}");
            news = Some(link.listen(made).await?);
            continue;
        };
        if let Ok(None) = tokio::time::timeout(LOOK_FOR, made.next()).await {
            return Err(Error::new(Kind::Unreachable, "the connection broke"));
        }
    }
}

/// Refuses streams whose messages are removed by who reads them.
fn readable(info: &Info) -> Result<()> {
    match info.config.retention.as_str() {
        "limits" => Ok(()),
        retention => Err(Error::new(
            Kind::Unsupported,
            format!(
                "stream {} has {retention} retention: reading it would take its messages from others",
                info.config.name
            ),
        )),
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
        Box::pin(async move {
            match self.look().await? {
                Some(info) => info.end(),
                // Before all that can still come.
                None => Ok(self.floor.position()),
            }
        })
    }
}
