//! Subscribers: each has a consumer of its own.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use super::Shared;
use super::api::Info;
use super::feed::Loss;
use super::link::Line;
use super::opening::{self, Fetched, Open, SUSPICIOUS, next_number, readable};
use crate::backend::behind::Behind;
use crate::backend::ear;
use crate::backend::floor::KnownFloor;
use crate::backend::{Floor, Fut, Limit, Source, Start, weight};
use crate::error::{Error, Kind, Result};
use crate::message::{Message, Position};
use crate::name::PipeName;
use bytes::Bytes;

/// How long to wait for a message that is known to be there, before it is looked whether it still is. Doubled
/// each time, up to a second.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// A subscriber's place.
pub(super) struct Subscriber {
    shared: Arc<Shared>,
    pipe: PipeName,
    /// Its own connection, if it needs one.
    own: Option<Arc<Line>>,
    floor: Arc<KnownFloor>,
    /// The last message that was delivered or is pending.
    received: Option<Position>,
    /// Received, not delivered.
    pending: VecDeque<Message>,
    stage: Stage,
    /// The incarnation that was there at the last look.
    epoch: Option<u64>,
    /// Whether the stream drops messages by itself, when it was looked at last.
    sheds: bool,
    behind: Behind,
    /// How many messages are to be fetched one at a time before a consumer is made.
    careful: u32,
    /// How often a connection broke since something was received.
    stumbles: u32,
}

/// How far the consumer is.
enum Stage {
    None,
    /// It is being made; that goes on where a wait was dropped.
    Opening(Pin<Box<dyn Future<Output = Result<Open>> + Send>>),
    Open(Open),
    /// Messages are being fetched one at a time; so does that.
    Fetching(Pin<Box<dyn Future<Output = Result<Fetched>> + Send>>),
}

impl Subscriber {
    pub(super) fn new(shared: Arc<Shared>, pipe: PipeName, start: Start) -> Self {
        let floor = shared.floors.of(&pipe);
        ear::open(&shared);
        Subscriber {
            shared,
            sheds: false,
            behind: Behind::new(pipe.clone()),
            pipe,
            own: None,
            floor,
            received: match start {
                Start::Oldest => None,
                Start::After(position) => Some(position),
            },
            pending: VecDeque::new(),
            stage: Stage::None,
            epoch: None,
            careful: 0,
            stumbles: 0,
        }
    }

    /// Where messages stream out.
    fn line(&mut self) -> Arc<Line> {
        if self.own.is_none() && self.shared.is_odd(&self.pipe) {
            self.own = Some(Arc::new(self.shared.own_line()));
        }
        Arc::clone(self.own.as_ref().unwrap_or(&self.shared.reading))
    }

    /// What the server says of the pipe now.
    async fn look(&mut self) -> Result<Option<Info>> {
        let line = self.line();
        let info = self.shared.look_by(&line, &self.pipe).await?;
        match &info {
            Some(info) => {
                readable(info)?;
                self.sheds = info.config.sheds();
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
        let stream = &info.config.name;
        let line = self.line();
        let single = line.ask(|link| async move { link.single(stream, next).await });
        let single = single.await?;
        Ok(single.is_some_and(|single| Position::new(epoch, single.seq) < before))
    }

    /// Takes what was dropped out of `pending`, and up to `max_bytes` of what stands before `before`.
    fn take(&mut self, max_bytes: usize, before: Position) -> Vec<Message> {
        let held = self.pending.len();
        let taken = self.floor.take(&mut self.pending, max_bytes, before);
        if self.sheds {
            let dropped = held - self.pending.len() - taken.len();
            self.behind.missed(dropped as u64);
        }
        taken
    }

    fn put(&mut self, epoch: u64, seq: u64, time: SystemTime, data: Bytes) {
        let position = Position::new(epoch, seq);
        let next = next_number(self.received, epoch);
        if seq < next {
            return;
        }
        if next > 0 && self.sheds {
            self.behind.missed(seq - next);
        }
        self.stumbles = 0;
        self.received = Some(position);
        self.pending.push_back(Message {
            position,
            time,
            data,
        });
    }

    /// Whether it is by the next message, perhaps, that a connection broke: then that one is fetched by itself.
    /// In an outage nobody is there to be asked for it.
    fn stumbles_over(&mut self, error: &Error) -> bool {
        if error.kind() != Kind::Unreachable || self.stumbles > SUSPICIOUS {
            return false;
        }
        self.stumbles += 1;
        self.careful = self.careful.max(1);
        true
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
                    self.put(epoch, arrival.seq, arrival.time, arrival.data);
                }
                Ok(None) => break,
                Err(loss) => {
                    self.stage = Stage::None;
                    if let Loss::Failed(error) = loss
                        && !self.stumbles_over(&error)
                        // What has come is delivered first.
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
                Stage::None if self.careful > 0 => {
                    let (shared, pipe) = (Arc::clone(&self.shared), self.pipe.clone());
                    let fetching = opening::fetch(
                        shared,
                        self.line(),
                        pipe,
                        self.received,
                        self.careful,
                        self.stumbles,
                    );
                    self.stage = Stage::Fetching(Box::pin(fetching));
                }
                Stage::Fetching(fetching) => {
                    let fetched = fetching.await;
                    self.stage = Stage::None;
                    let fetched = fetched?;
                    self.careful = fetched.careful;
                    self.epoch = fetched.epoch;
                    let epoch = fetched.epoch.unwrap_or(0);
                    for single in fetched.singles {
                        self.put(epoch, single.seq, single.time, single.data);
                    }
                    if !self.pending.is_empty() {
                        return Ok(());
                    }
                }
                Stage::None => {
                    let (shared, pipe) = (Arc::clone(&self.shared), self.pipe.clone());
                    let opening =
                        opening::open(shared, self.line(), pipe, self.epoch.take(), self.received);
                    self.stage = Stage::Opening(Box::pin(opening));
                }
                Stage::Opening(opening) => {
                    let opened = opening.await;
                    self.stage = Stage::None;
                    let open = opened?;
                    self.sheds = open.sheds;
                    self.stage = Stage::Open(open);
                }
                Stage::Open(open) => match open.feed.next().await {
                    Ok(arrival) => {
                        let epoch = open.epoch;
                        self.put(epoch, arrival.seq, arrival.time, arrival.data);
                        return self.gather(max_bytes).await;
                    }
                    Err(loss) => {
                        self.stage = Stage::None;
                        match loss {
                            Loss::Failed(error) if self.stumbles_over(&error) => {}
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
