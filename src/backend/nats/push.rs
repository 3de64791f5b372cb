//! Pushes: messages with identities, and how many of them go together:
//!
//! - As an atomic batch, of up to 1,000, where the server has them.
//! - As a chain, where one server alone has the stream: each message goes only if the one before it is the
//!   stream's last, so the answer to the last one stands for all. They stay together, and the server is spared
//!   most of the answers, but a crash may leave the first ones.
//!   Where others' messages come between, chains are short.
//! - Each for itself, with its own answer, where neither will do; also where the server soon forgets what it has stored,
//!   as what is left of a broken chain is sent again.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::Instant;

use async_nats::header::{
    NATS_BATCH_COMMIT, NATS_BATCH_ID, NATS_BATCH_SEQUENCE, NATS_EXPECTED_LAST_MESSAGE_ID,
    NATS_EXPECTED_STREAM, NATS_MESSAGE_ID,
};
use async_nats::{HeaderMap, Message};
use bytes::Bytes;

use super::answers::{Acks, Outcome, outcome, taken, understood, unless_removed, went_away};
use super::api;
use super::ids::PushName;
use super::link::{Link, MISSES, SETTLE};
use super::search::{Found, Search};
use super::tally::Added;
use super::tried::{Group, Turn};
use super::{Shared, Stream};
use crate::error::{Error, Kind, Result};
use crate::message::{Batch, Position, PushId};
use crate::name::PipeName;

/// The most messages that servers take as an atomic batch.
const WHOLE: usize = 1000;

/// The most messages of a chain: fewer than a server lets wait (10,000, its `max_buffered_msgs`).
const CHAIN: usize = 4096;

/// The most messages of a chain after one into which others have come, and how many such chains.
const SHORT: usize = 64;
const CROWDED: u32 = 32;

/// The most messages under way without an acknowledgement, where each goes for itself. Those that are sent while the
/// stream's leader changes are lost, but for those behind them that find the new one, which are out of order then: the
/// fewer, the rarer. More than these are not stored faster.
const WINDOW: usize = 64;

/// A push under way.
pub(super) struct Push {
    pub(super) shared: Arc<Shared>,
    pub(super) link: Arc<Link>,
    pub(super) pipe: PipeName,
    pub(super) turn: Turn,
    /// Of the caller, while it waits.
    wanted: Weak<()>,
    id: PushId,
    pub(super) name: PushName,
    pub(super) batch: Batch,
}

/// How messages go together.
enum Way {
    Whole,
    Chain,
    Each,
}

impl Push {
    pub(super) fn new(
        shared: Arc<Shared>,
        link: Arc<Link>,
        pipe: PipeName,
        turn: Turn,
        wanted: Weak<()>,
        id: PushId,
        batch: Batch,
    ) -> Self {
        Push {
            shared,
            link,
            pipe,
            turn,
            wanted,
            name: PushName::new(id),
            id,
            batch,
        }
    }

    /// Notes where it ends, for those that repeat it.
    pub(super) fn end(&mut self, position: Position) {
        self.turn.end(position, self.batch.messages().len());
    }

    /// Stores what is not stored yet, and returns the position of the last message.
    pub(super) async fn run(&mut self) -> Result<Position> {
        let mut stream = self.shared.stream(&self.link, &self.pipe).await?;
        let (mut next, mut lacking) = (0, Vec::new());
        if self.id.repeated && !self.is_remembered(&stream) {
            // What the earlier try has done is not known without it.
            let (known, search) = self.search().await.map_err(Error::maybe_applied)?;
            let (found, missing) = (search.found(), search.missing());
            let is_last = |found: Found| found.index + 1 == self.batch.messages().len();
            if missing.is_empty() && found.is_some_and(is_last) {
                return Ok(known.position(found.map_or(0, |found| found.seq)));
            }
            if found.is_none() {
                self.turn.is_not_stored(known.position(known.last));
            }
            next = found.map_or(0, |found| found.index + 1);
            lacking = missing;
            stream = known;
        }
        if !self.id.repeated {
            self.turn.begin(stream.position(stream.last));
        }
        if self.wanted.strong_count() == 0 {
            // What was reported as failed must not be stored long after, behind a reset perhaps.
            return Err(Error::new(Kind::Interrupted, "given up").maybe_applied());
        }
        self.fill(&stream, lacking).await?;
        let mut last = None;
        let mut misses = 0;
        while next < self.batch.messages().len() {
            let (way, count) = self.way(&stream, next);
            let is_whole = matches!(way, Way::Whole);
            // Of others, some may have been stored by an earlier try.
            let is_new = is_whole || !self.id.repeated;
            // Of a batch the first ones, whatever became of earlier tries.
            let may_be_cut = is_whole && count > 1 && !self.turn.tried().apart;
            let outcome = match self.store(&stream, way, next, count).await {
                Ok(outcome) => outcome,
                Err(error) if error.kind() == Kind::Full && may_be_cut => {
                    return Err(self.full(error, next).await);
                }
                Err(error) => return Err(self.failed(error, next)),
            };
            match outcome {
                Outcome::Stored(seq) => {
                    if is_new {
                        self.tally(&stream, seq, next, count);
                    }
                    last = Some(seq);
                }
                Outcome::Before => last = None,
                Outcome::Elsewhere if misses < MISSES => {
                    // At once where the stream was removed; else the news of it is on its way.
                    if misses > 0 {
                        tokio::time::sleep(SETTLE * (1 << misses)).await;
                    }
                    misses += 1;
                    self.shared.forget(&self.pipe);
                    let made = self.shared.stream(&self.link, &self.pipe).await;
                    stream = made.map_err(|error| self.failed(error, next))?;
                    continue;
                }
                Outcome::Elsewhere => {
                    let why = format!("stream {} has no leader now", stream.name);
                    return Err(self.failed(Error::new(Kind::Unreachable, why), next));
                }
            }
            next += count;
        }
        match last {
            Some(seq) => Ok(stream.position(seq)),
            None => {
                let (stream, search) = self.search().await.map_err(Error::maybe_applied)?;
                Ok(stream.position(match search {
                    Search::Found(found, _) => found.seq,
                    // A reset has dropped them since.
                    Search::Nowhere => 0,
                    Search::NotAmongTheLast => stream.last,
                }))
            }
        }
    }

    /// What has failed of the messages from `next` on; those before are stored.
    pub(super) fn failed(&self, error: Error, next: usize) -> Error {
        match self.id.repeated {
            // What an earlier try has sent may come yet.
            true => error.maybe_applied(),
            false => error.behind(next),
        }
    }

    /// Counts messages that are stored, the last one as `last`.
    fn tally(&self, stream: &Stream, last: u64, next: usize, count: usize) {
        let messages = &self.batch.messages()[next..next + count];
        let added = Added {
            epoch: stream.epoch,
            last,
            count: count as u64,
            bytes: messages.iter().map(|message| message.len() as u64).sum(),
        };
        self.shared.tallies.add(&self.pipe, added);
    }

    /// How the messages from `next` on go, and how many of them: as in the try before, where there was one.
    fn way(&mut self, stream: &Stream, next: usize) -> (Way, usize) {
        let (way, count) = self.next_way(stream, next);
        if matches!(way, Way::Each) && !stream.limited {
            self.turn.go_apart();
        }
        (way, count)
    }

    fn next_way(&mut self, stream: &Stream, next: usize) -> (Way, usize) {
        if let Some(group) = self.turn.group(next) {
            // A repetition has as many messages, unless its sender does not keep to that.
            let count = group.end.min(self.batch.messages().len()) - next;
            return match group.whole && stream.atomic {
                true => (Way::Whole, count),
                false => by_ids(stream, count),
            };
        }
        let (way, count) = self.free_way(stream, next);
        self.turn.note(Group {
            begin: next,
            end: next + count,
            whole: matches!(way, Way::Whole) && count > 1,
        });
        (way, count)
    }

    fn free_way(&self, stream: &Stream, next: usize) -> (Way, usize) {
        let left = self.batch.messages().len() - next;
        if !stream.atomic {
            by_ids(stream, left)
        } else if left > WHOLE && stream.takes_chains() && !stream.take_short() {
            (Way::Chain, left.min(CHAIN))
        } else {
            (Way::Whole, left.min(WHOLE))
        }
    }

    async fn store(&self, stream: &Stream, way: Way, next: usize, count: usize) -> Result<Outcome> {
        match way {
            Way::Whole if count == 1 => self.store_one(stream, next).await,
            Way::Whole => self.store_whole(stream, next, count).await,
            Way::Chain => self.store_together(stream, next, count).await,
            Way::Each => {
                self.shared.warn_of_mixing(stream, &self.link);
                // Where one may be refused, none may be under way behind it.
                let window = if stream.limited { 1 } else { WINDOW };
                self.store_each(stream, next, count, window).await
            }
        }
    }

    /// Stores messages as a chain, and as short ones where that breaks.
    async fn store_together(&self, stream: &Stream, next: usize, count: usize) -> Result<Outcome> {
        let begun = Instant::now();
        if let Some(outcome) = self.store_chain(stream, next, count).await? {
            return Ok(outcome);
        }
        stream.crowded.store(CROWDED, Ordering::Relaxed);
        let mut last = Outcome::Before;
        // The server knows those again that are stored, and says which one it refuses.
        for first in (next..next + count).step_by(SHORT) {
            if !stream.remembers_since(begun) {
                let why = "it takes long to store messages among those of others";
                return Err(Error::new(Kind::Unreachable, why).maybe_applied());
            }
            let some = SHORT.min(next + count - first);
            let stored = match some < count {
                true => self.store_chain(stream, first, some).await?,
                false => None,
            };
            last = match stored {
                Some(outcome) => outcome,
                None => {
                    let stored = self.store_each(stream, first, some, 1).await;
                    stored.map_err(|error| error.behind(first - next))?
                }
            };
            if let Outcome::Elsewhere = last {
                return went_away(stream, first == next);
            }
        }
        Ok(last)
    }

    async fn store_whole(&self, stream: &Stream, next: usize, count: usize) -> Result<Outcome> {
        let link = &self.link;
        let (head, last) = (next..next + count - 1, next + count - 1);
        let batch = self.name.batch(next, &self.shared.tags);
        for index in head {
            let headers = batch_headers(&batch, index - next + 1);
            let data = self.data(index);
            link.send(&stream.subject, None, Some(headers), data)
                .await?;
        }
        let mut headers = batch_headers(&batch, count);
        headers.insert(NATS_BATCH_COMMIT, "1");
        self.identify(&mut headers, stream, last);
        let answer = self.ask(stream, headers, last).await?;
        match understood(answer)? {
            Err(error) if error.is(api::INCOMPLETE) => {
                // A message before was refused, without an answer as nobody had asked for one.
                self.store_asking(stream, next, count).await
            }
            answer => outcome(answer),
        }
    }

    pub(super) async fn store_one(&self, stream: &Stream, index: usize) -> Result<Outcome> {
        let mut headers = HeaderMap::new();
        self.identify(&mut headers, stream, index);
        let answer = self.ask(stream, headers, index).await?;
        outcome(understood(answer)?)
    }

    /// Stores an atomic batch and asks for an answer to each message: the first refusal is the reason.
    async fn store_asking(&self, stream: &Stream, next: usize, count: usize) -> Result<Outcome> {
        let batch = self.name.batch(next, &self.shared.tags);
        let mut acks = Acks::listen(&self.link).await?;
        for index in next..next + count {
            let mut headers = batch_headers(&batch, index - next + 1);
            if index + 1 == next + count {
                headers.insert(NATS_BATCH_COMMIT, "1");
                self.identify(&mut headers, stream, index);
            }
            let reply = acks.reply();
            self.link
                .send(
                    &stream.subject,
                    Some(reply),
                    Some(headers),
                    self.data(index),
                )
                .await?;
            if index + 1 < next + count {
                let answer = acks.next(&self.link, stream).await?;
                // An empty answer says that the message waits for the rest.
                if answer.status.is_some() || !answer.payload.is_empty() {
                    return outcome(understood(taken(answer))?);
                }
            }
        }
        let answer = acks.next(&self.link, stream).await;
        outcome(understood(taken(answer.map_err(Error::maybe_applied)?))?)
    }

    /// Stores a chain; `None` if it broke, or its last message was refused: then those before are stored, or some, or none.
    async fn store_chain(
        &self,
        stream: &Stream,
        next: usize,
        count: usize,
    ) -> Result<Option<Outcome>> {
        let link = &self.link;
        let last = next + count - 1;
        for index in next..last {
            let headers = self.chained(stream, next, index);
            let sent = link.send(&stream.subject, None, Some(headers), self.data(index));
            sent.await.map_err(Error::maybe_applied)?;
        }
        let headers = self.chained(stream, next, last);
        let answer = self.ask(stream, headers, last).await;
        let answer = answer.map_err(Error::maybe_applied)?;
        Ok(outcome(understood(answer)?).ok())
    }

    /// The headers of a message of the chain that begins at `first`.
    fn chained(&self, stream: &Stream, first: usize, index: usize) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(NATS_MESSAGE_ID, self.identity(index));
        match index == first {
            true => headers.insert(NATS_EXPECTED_STREAM, stream.name.as_str()),
            // In another stream that one is not the last.
            false => headers.insert(NATS_EXPECTED_LAST_MESSAGE_ID, self.identity(index - 1)),
        }
        headers
    }

    /// Stores messages one after the other, with up to `window` under way at a time.
    async fn store_each(
        &self,
        stream: &Stream,
        next: usize,
        count: usize,
        window: usize,
    ) -> Result<Outcome> {
        let mut acks = Acks::listen(&self.link).await?;
        let mut sent = 0;
        let mut last = Outcome::Before;
        for acknowledged in 0..count {
            while sent < count && sent - acknowledged < window {
                let mut headers = HeaderMap::new();
                self.identify(&mut headers, stream, next + sent);
                let reply = acks.reply();
                let data = self.data(next + sent);
                self.link
                    .send(&stream.subject, Some(reply), Some(headers), data)
                    .await
                    .map_err(Error::maybe_applied)?;
                sent += 1;
            }
            let answer = acks.next(&self.link, stream).await;
            let answer = answer.map_err(Error::maybe_applied)?;
            let stored = outcome(understood(taken(answer))?);
            last = stored.map_err(|error| match window {
                1 => error.stored(acknowledged),
                // Those behind it are under way.
                _ => error.maybe_applied(),
            })?;
            if let Outcome::Elsewhere = last {
                return went_away(stream, acknowledged == 0);
            }
        }
        Ok(last)
    }

    /// Sends message `index`, and waits for the answer to it.
    async fn ask(
        &self,
        stream: &Stream,
        headers: HeaderMap,
        index: usize,
    ) -> Result<Option<Message>> {
        let link = &self.link;
        let answer = link.ask(&stream.subject, Some(headers), self.data(index));
        unless_removed(link, stream, answer).await
    }

    fn data(&self, index: usize) -> Bytes {
        self.batch.messages()[index].clone()
    }

    fn identity(&self, index: usize) -> String {
        self.name.message(index)
    }

    /// Says which message it is, and that it is for no other stream.
    fn identify(&self, headers: &mut HeaderMap, stream: &Stream, index: usize) {
        headers.insert(NATS_MESSAGE_ID, self.identity(index));
        headers.insert(NATS_EXPECTED_STREAM, stream.name.as_str());
    }
}

/// How so many messages go for which the server is to know each one's identity.
fn by_ids(stream: &Stream, count: usize) -> (Way, usize) {
    match (count, stream.takes_chains()) {
        (1, _) => (Way::Whole, 1),
        (_, true) if stream.take_short() => (Way::Chain, count.min(SHORT)),
        (_, true) => (Way::Chain, count.min(CHAIN)),
        (_, false) => (Way::Each, count),
    }
}

fn batch_headers(batch: &str, place: usize) -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.insert(NATS_BATCH_ID, batch);
    headers.insert(NATS_BATCH_SEQUENCE, place.to_string());
    headers
}
