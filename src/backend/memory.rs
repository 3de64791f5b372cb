//! The reference implementation: messages in this process's memory, gone with it.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use bytes::BytesMut;
use tokio::sync::Notify;

use super::{Backend, Caps, Floor, Fut, Limit, PipeInfo, Source, Start, not_found, weight};
use crate::error::{Error, Kind, Result};
use crate::message::{Batch, Message, Position, Producers, PushId, micros_from_time};
use crate::name::PipeName;

/// The in-memory backend. Clones share their pipes.
#[derive(Clone)]
pub struct Memory {
    pipes: Arc<Mutex<Pipes>>,
    limit: u64,
    /// In front of every position: a later store's are greater, for those who read it through a gateway
    /// that was started anew.
    epoch: u64,
}

/// Pipes of which only the name is known, in all, before those are forgotten for which nobody waits.
const ABSENT: usize = 4096;

struct Pipes {
    /// A removed pipe stays here for a while, absent, so that its positions go on rising when it comes again.
    by_name: BTreeMap<PipeName, Pipe>,
    /// Where pipes begin, behind all that were forgotten.
    start: u64,
    /// How many may be there before they are looked through again.
    crowded: usize,
    /// The weight of all messages and producers.
    held: u64,
}

impl Default for Pipes {
    fn default() -> Self {
        Pipes {
            by_name: BTreeMap::new(),
            start: 1,
            crowded: 0,
            held: 0,
        }
    }
}

/// What it takes to remember a producer, in bytes.
const PRODUCER: u64 = 64;

struct Pipe {
    present: bool,
    /// The number of the first message in `log`.
    first: u64,
    log: VecDeque<Message>,
    bytes: u64,
    modified: SystemTime,
    pushed: Arc<Notify>,
    /// A copy of `first` for the readers.
    floor: Arc<AtomicU64>,
    /// Each producer's last push, to store a repeated one once.
    producers: Producers<(u64, Position)>,
}

impl Pipe {
    fn starting_at(first: u64) -> Self {
        Pipe {
            present: false,
            first,
            log: VecDeque::new(),
            bytes: 0,
            modified: SystemTime::now(),
            pushed: Arc::default(),
            floor: Arc::new(AtomicU64::new(first)),
            producers: Producers::default(),
        }
    }

    /// Whether it is not there, and nobody waits for it.
    fn is_forgettable(&self) -> bool {
        !self.present && Arc::strong_count(&self.pushed) + Arc::strong_count(&self.floor) == 2
    }

    fn next(&self) -> u64 {
        self.first + self.log.len() as u64
    }

    /// Drops all messages, forgets who pushed them, and returns what that took.
    fn clear(&mut self) -> u64 {
        let weight = self
            .log
            .iter()
            .map(|message| weight(&message.data))
            .sum::<usize>();
        self.first = self.next();
        self.floor.store(self.first, Ordering::Release);
        self.log = VecDeque::new();
        self.bytes = 0;
        self.modified = SystemTime::now();
        let producers = std::mem::take(&mut self.producers);
        weight as u64 + producers.len() as u64 * PRODUCER
    }

    fn info(&self) -> PipeInfo {
        PipeInfo {
            count: self.log.len() as u64,
            bytes: Some(self.bytes),
            first: self.log.front().map(|message| message.position),
            last: self.log.back().map(|message| message.position),
            modified: self.modified,
        }
    }
}

impl Memory {
    /// An empty store that holds at most `limit` bytes (counted by [`weight`]).
    pub fn new(limit: u64) -> Self {
        Memory {
            pipes: Arc::default(),
            limit,
            epoch: micros_from_time(SystemTime::now()),
        }
    }

    fn position(&self, seq: u64) -> Position {
        Position::new(self.epoch, seq)
    }

    fn lock(&self) -> MutexGuard<'_, Pipes> {
        self.pipes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn append(&self, name: &PipeName, id: PushId, batch: &Batch) -> Result<Position> {
        // As they came they may be small parts of something large, a request, which they would keep whole.
        let mut kept = BytesMut::with_capacity(batch.bytes());
        for data in batch.messages() {
            kept.extend_from_slice(data);
        }
        let mut guard = self.lock();
        let pipes = &mut *guard;
        let before = pipes
            .by_name
            .get(name)
            .and_then(|pipe| pipe.producers.get(&id.producer));
        if let Some((seq, position)) = before
            && id.seq <= *seq
        {
            return Ok(*position);
        }
        let weights = batch.messages().iter().map(|data| weight(data));
        let added = weights.sum::<usize>() as u64;
        if pipes.held + added > self.limit {
            return Err(Error::new(
                Kind::Full,
                format!("memory: its limit of {} bytes is reached", self.limit),
            ));
        }
        pipes.held += added;
        let pipe = pipes.entry(name);
        let time = SystemTime::now();
        let mut kept = kept.freeze();
        for data in batch.messages() {
            pipe.log.push_back(Message {
                position: self.position(pipe.next()),
                time,
                data: kept.split_to(data.len()),
            });
        }
        pipe.present = true;
        pipe.bytes += batch.bytes() as u64;
        pipe.modified = time;
        let last = self.position(pipe.next() - 1);
        let pushed = Arc::clone(&pipe.pushed);
        let known = pipe.producers.len();
        pipe.producers.set(id.producer, (id.seq, last));
        pipes.held += (pipe.producers.len() - known) as u64 * PRODUCER;
        drop(guard);
        pushed.notify_waiters();
        Ok(last)
    }

    fn with<T>(&self, name: &PipeName, act: impl FnOnce(&mut Pipe) -> T) -> Result<T> {
        match self.lock().by_name.get_mut(name) {
            Some(pipe) if pipe.present => Ok(act(pipe)),
            _ => Err(not_found(name)),
        }
    }

    fn clear(&self, name: &PipeName, present: bool) -> Result<()> {
        let freed = self.with(name, |pipe| {
            pipe.present = present;
            pipe.clear()
        })?;
        self.lock().held -= freed;
        Ok(())
    }
}

impl Pipes {
    /// The pipe, present or not. Who asks for many names leaves few of them here.
    fn entry(&mut self, name: &PipeName) -> &mut Pipe {
        if self.by_name.len() >= self.crowded.max(ABSENT) {
            let start = &mut self.start;
            self.by_name.retain(|_, pipe| {
                let stays = !pipe.is_forgettable();
                if !stays {
                    *start = pipe.next().max(*start);
                }
                stays
            });
            self.crowded = self.by_name.len() * 2;
        }
        let start = self.start;
        self.by_name
            .entry(name.clone())
            .or_insert_with(|| Pipe::starting_at(start))
    }
}

impl Backend for Memory {
    fn caps(&self) -> Caps {
        Caps {
            name: "memory",
            durable: false,
            remote: false,
            max_message: usize::MAX,
            whole_batches: true,
        }
    }

    fn push<'a>(&'a self, pipe: &'a PipeName, id: PushId, batch: Batch) -> Fut<'a, Position> {
        Box::pin(async move { self.append(pipe, id, &batch) })
    }

    fn subscribe<'a>(&'a self, pipe: &'a PipeName, start: Start) -> Fut<'a, Box<dyn Source>> {
        Box::pin(async move {
            Ok(Box::new(Cursor {
                store: self.clone(),
                pipe: pipe.clone(),
                next: match start {
                    Start::After(position) if position.epoch() == self.epoch => {
                        position.seq().saturating_add(1)
                    }
                    // Of another store, whose messages are gone.
                    Start::Oldest | Start::After(_) => 0,
                },
            }) as Box<dyn Source>)
        })
    }

    fn stat<'a>(&'a self, pipe: &'a PipeName) -> Fut<'a, PipeInfo> {
        Box::pin(async move { self.with(pipe, |pipe| pipe.info()) })
    }

    fn list(&self) -> Fut<'_, Vec<(PipeName, PipeInfo)>> {
        Box::pin(async move {
            let pipes = self.lock();
            let present = pipes.by_name.iter().filter(|(_, pipe)| pipe.present);
            Ok(present
                .map(|(name, pipe)| (name.clone(), pipe.info()))
                .collect())
        })
    }

    fn create<'a>(&'a self, pipe: &'a PipeName) -> Fut<'a, bool> {
        Box::pin(async move {
            let mut pipes = self.lock();
            let pipe = pipes.entry(pipe);
            let created = !pipe.present;
            if created {
                pipe.present = true;
                pipe.modified = SystemTime::now();
            }
            Ok(created)
        })
    }

    fn reset<'a>(&'a self, pipe: &'a PipeName) -> Fut<'a, ()> {
        Box::pin(async move { self.clear(pipe, true) })
    }

    fn remove<'a>(&'a self, pipe: &'a PipeName) -> Fut<'a, ()> {
        Box::pin(async move { self.clear(pipe, false) })
    }

    fn sync<'a>(&'a self, _pipe: &'a PipeName) -> Fut<'a, ()> {
        Box::pin(async { Ok(()) })
    }
}

/// A subscriber's place: the number of the message it wants next.
struct Cursor {
    store: Memory,
    pipe: PipeName,
    next: u64,
}

impl Cursor {
    fn bell(&self) -> Arc<Notify> {
        Arc::clone(&self.store.lock().entry(&self.pipe).pushed)
    }

    fn take(&mut self, limit: Limit) -> Vec<Message> {
        let pipes = self.store.lock();
        let Some(pipe) = pipes.by_name.get(&self.pipe) else {
            return Vec::new();
        };
        let skip = self.next.saturating_sub(pipe.first) as usize;
        let before = limit.before.unwrap_or(Position::MAX);
        let mut messages = Vec::new();
        let mut gathered = 0;
        for message in pipe.log.range(skip.min(pipe.log.len())..) {
            if gathered >= limit.max_bytes.max(1) || message.position >= before {
                break;
            }
            gathered += weight(&message.data);
            messages.push(message.clone());
        }
        if let Some(last) = messages.last() {
            self.next = last.position.seq() + 1;
        }
        messages
    }
}

impl Source for Cursor {
    fn next(&mut self, limit: Limit) -> Fut<'_, Vec<Message>> {
        Box::pin(async move {
            let bell = self.bell();
            loop {
                // Made before the look, so that a push in between rings it.
                let rung = bell.notified();
                let messages = self.take(limit);
                if !messages.is_empty() || limit.before.is_some() {
                    return Ok(messages);
                }
                rung.await;
            }
        })
    }

    fn floor(&self) -> Arc<dyn Floor> {
        let first = Arc::clone(&self.store.lock().entry(&self.pipe).floor);
        Arc::new(MemoryFloor {
            epoch: self.store.epoch,
            first,
        })
    }

    fn end(&mut self) -> Fut<'_, Position> {
        Box::pin(async move {
            let pipes = self.store.lock();
            let next = pipes.by_name.get(&self.pipe).map_or(0, Pipe::next);
            Ok(self.store.position(next))
        })
    }
}

struct MemoryFloor {
    epoch: u64,
    first: Arc<AtomicU64>,
}

impl Floor for MemoryFloor {
    fn position(&self) -> Position {
        Position::new(self.epoch, self.first.load(Ordering::Acquire))
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::message::Producer;

    #[tokio::test]
    async fn a_small_part_of_a_large_request_does_not_keep_it() {
        let store = Memory::new(1 << 20);
        let request = Bytes::from(vec![b'x'; 1 << 16]);
        let batch = Batch::new(vec![request.slice(..1), request.slice(2..4)]).expect("a batch");
        let id = PushId::first(Producer::random().expect("random"), 1);
        let pipe = PipeName::new("topic").expect("legal");
        store.push(&pipe, id, batch).await.expect("stored");
        assert!(request.is_unique());
    }

    #[tokio::test]
    async fn names_that_are_only_asked_for_are_forgotten_unless_somebody_waits() {
        let store = Memory::new(1 << 20);
        let name = |number| PipeName::new(&format!("name{number}")).expect("legal");
        let waited_for = store
            .subscribe(&name(0), Start::Oldest)
            .await
            .expect("a source");
        let floor = waited_for.floor();
        store.create(&name(1)).await.expect("made");
        for number in 2..5 * ABSENT {
            let source = store.subscribe(&name(number), Start::Oldest).await;
            source.expect("a source").floor();
        }
        let pipes = store.lock();
        assert!(pipes.by_name.len() <= ABSENT + 2, "{}", pipes.by_name.len());
        assert!(pipes.by_name.contains_key(&name(0)) && pipes.by_name.contains_key(&name(1)));
        drop(floor);
    }

    #[tokio::test]
    async fn pipes_that_were_removed_are_forgotten_and_their_positions_do_not_come_again() {
        let store = Memory::new(1 << 20);
        let name = |number| PipeName::new(&format!("name{number}")).expect("legal");
        let push = async |number, seq| {
            let id = PushId::first(Producer::random().expect("random"), seq);
            let batch = Batch::new(vec!["one".into(), "two".into()]).expect("a batch");
            store.push(&name(number), id, batch).await.expect("stored")
        };
        let last = push(0, 1).await;
        store.remove(&name(0)).await.expect("removed");
        for number in 1..3 * ABSENT {
            push(number, 1).await;
            store.remove(&name(number)).await.expect("removed");
        }
        let known = store.lock().by_name.len();
        assert!(known <= ABSENT + 1, "{known}");
        assert!(!store.lock().by_name.contains_key(&name(0)));
        assert!(push(0, 1).await.seq() > last.seq() + 1);
        assert_eq!(store.lock().held, 2 * weight(b"one") as u64 + PRODUCER);
    }
}
