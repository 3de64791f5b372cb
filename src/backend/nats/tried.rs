//! What became of each producer's last push, as far as this process knows: its repetition goes on from there.
//!
//! Of an atomic batch the server knows the last message's identity alone, of messages that go otherwise each one's. So a
//! repetition groups its messages as the try before did: grouped otherwise, what is stored would not be known again.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use super::lock;
use crate::error::Result;
use crate::message::{Position, Producer, Producers, PushId};

/// A producer's last push.
pub(super) struct Tried {
    seq: u64,
    /// When it was tried first.
    pub(super) first: Instant,
    groups: Vec<Group>,
    /// Where it ends, and how many messages it has, once it is stored.
    stored: Option<(Position, usize)>,
}

/// Messages that went the same way, behind those of the group before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Group {
    /// Behind its last message.
    pub(super) end: usize,
    /// Whether they are an atomic batch.
    pub(super) whole: bool,
}

/// The right to push for a producer: servers of a cluster do not answer a batch that comes twice at a time.
pub(super) struct Turn {
    id: PushId,
    tried: tokio::sync::OwnedMutexGuard<Option<Tried>>,
}

/// The producers that pushed last.
#[derive(Default)]
pub(super) struct Turns(Mutex<Producers<Arc<Pusher>>>);

#[derive(Default)]
struct Pusher {
    /// The last push of which a first try came, also if it was given up before its turn.
    asked: AtomicU64,
    tried: Arc<tokio::sync::Mutex<Option<Tried>>>,
}

impl Turns {
    /// Waits until no other push of the producer is under way.
    pub(super) async fn take(&self, id: PushId) -> Turn {
        let pusher = self.of(id.producer);
        if !id.repeated {
            pusher.asked.store(id.seq, Ordering::Relaxed);
        }
        let mut tried = Arc::clone(&pusher.tried).lock_owned().await;
        let has_begun = tried.as_ref().is_some_and(|tried| tried.seq == id.seq);
        let is_from_here = pusher.asked.load(Ordering::Relaxed) == id.seq;
        if !id.repeated || is_from_here && !has_begun {
            *tried = Some(Tried {
                seq: id.seq,
                first: Instant::now(),
                groups: Vec::new(),
                stored: None,
            });
        }
        Turn { id, tried }
    }

    fn of(&self, producer: Producer) -> Arc<Pusher> {
        let mut pushers = lock(&self.0);
        if let Some(pusher) = pushers.get(&producer) {
            return Arc::clone(pusher);
        }
        let pusher = Arc::default();
        pushers.set(producer, Arc::clone(&pusher));
        pusher
    }
}

impl Turn {
    /// The push, if it was first tried from here.
    pub(super) fn tried(&self) -> Option<&Tried> {
        self.tried.as_ref().filter(|tried| tried.seq == self.id.seq)
    }

    fn tried_mut(&mut self) -> Option<&mut Tried> {
        let seq = self.id.seq;
        self.tried.as_mut().filter(|tried| tried.seq == seq)
    }

    /// Where the push ends, if all of its messages are known to be stored.
    pub(super) fn stored(&self, messages: usize) -> Option<Position> {
        let (position, count) = self.tried()?.stored?;
        (count == messages).then_some(position)
    }

    /// The group to which message `index` belonged.
    pub(super) fn group(&self, index: usize) -> Option<Group> {
        let groups = &self.tried()?.groups;
        groups.iter().copied().find(|group| index < group.end)
    }

    /// Notes how the next messages go. To be called before the first one does.
    pub(super) fn note(&mut self, group: Group) {
        if let Some(tried) = self.tried_mut() {
            tried.groups.push(group);
        }
    }

    /// Notes what became of a push of so many messages.
    pub(super) fn end(&mut self, pushed: &Result<Position>, messages: usize) {
        if let (Ok(position), Some(tried)) = (pushed, self.tried_mut()) {
            tried.stored = Some((*position, messages));
        }
    }
}

impl Tried {
    /// Whether any of it went as an atomic batch.
    pub(super) fn any_whole(&self) -> bool {
        self.groups.iter().any(|group| group.whole)
    }
}
