//! What became of each producer's last push, as far as this process knows: its repetition goes on from there.
//!
//! Of an atomic batch the server knows the last message's identity alone, of messages that go otherwise each one's. So a
//! repetition groups its messages as the try before did: grouped otherwise, what is stored would not be known again.
//! A server that is killed may keep a batch's first messages, and knows none of them: they are searched for, behind what the
//! stream held before the first try.

use std::sync::{Arc, Mutex};
use std::time::Instant;

use super::lock;
use crate::message::{Position, Producers, PushId};
use crate::name::PipeName;

/// A producer's last push.
pub(super) struct Tried {
    pipe: PipeName,
    seq: u64,
    /// When it was tried first, or known not to be stored yet; `None` if not from here.
    pub(super) first: Option<Instant>,
    /// Up to where the stream holds nothing of it.
    since: Option<Position>,
    groups: Vec<Group>,
    /// Whether several of its messages may have been under way at a time, each for itself: then any of them may be missing
    /// among those that are stored.
    pub(super) apart: bool,
    /// Where it ends, and how many messages it has, once it is stored; and since when that is known.
    stored: Option<(Position, usize, Instant)>,
}

/// Messages that went the same way, behind those of the group before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Group {
    /// Its first message.
    pub(super) begin: usize,
    /// Behind its last message.
    pub(super) end: usize,
    /// Whether they are an atomic batch.
    pub(super) whole: bool,
}

/// The right to push for a producer: servers of a cluster do not answer a batch that comes twice at a time.
pub(super) struct Turn {
    tried: tokio::sync::OwnedMutexGuard<Tried>,
}

/// The producers that pushed last.
#[derive(Default)]
pub(super) struct Turns(Mutex<Producers<Arc<Pusher>>>);

struct Pusher {
    /// The last push of which a first try came, also if it was given up before its turn.
    asked: Mutex<Option<(PipeName, u64)>>,
    tried: Arc<tokio::sync::Mutex<Tried>>,
}

impl Turns {
    /// Waits until no other push of the producer is under way.
    pub(super) async fn take(&self, pipe: &PipeName, id: PushId) -> Turn {
        let pusher = self.of(pipe, id);
        if !id.repeated {
            *lock(&pusher.asked) = Some((pipe.clone(), id.seq));
        }
        let mut tried = Arc::clone(&pusher.tried).lock_owned().await;
        if !id.repeated || (&tried.pipe, tried.seq) != (pipe, id.seq) {
            let asked = lock(&pusher.asked);
            let is_from_here = asked
                .as_ref()
                .is_some_and(|(asked, seq)| (asked, *seq) == (pipe, id.seq));
            *tried = Tried::new(pipe, id.seq, is_from_here);
        }
        Turn { tried }
    }

    fn of(&self, pipe: &PipeName, id: PushId) -> Arc<Pusher> {
        let mut pushers = lock(&self.0);
        if let Some(pusher) = pushers.get(&id.producer) {
            return Arc::clone(pusher);
        }
        let pusher = Arc::new(Pusher {
            asked: Mutex::default(),
            tried: Arc::new(tokio::sync::Mutex::new(Tried::new(pipe, id.seq, false))),
        });
        pushers.set(id.producer, Arc::clone(&pusher));
        pusher
    }
}

impl Turn {
    /// What is known of the push.
    pub(super) fn tried(&self) -> &Tried {
        &self.tried
    }

    /// Where the push ends, if all of its messages are known to be stored, and since when that is known.
    pub(super) fn stored(&self, messages: usize) -> Option<(Position, Instant)> {
        let (position, count, since) = self.tried.stored?;
        (count == messages).then_some((position, since))
    }

    /// The group to which message `index` belonged.
    pub(super) fn group(&self, index: usize) -> Option<Group> {
        let mut groups = self.tried.groups.iter().copied();
        groups.find(|group| (group.begin..group.end).contains(&index))
    }

    /// Notes how the next messages go. To be called before the first one does.
    pub(super) fn note(&mut self, group: Group) {
        self.tried.groups.push(group);
    }

    /// Notes that several messages are under way at a time, each for itself.
    pub(super) fn go_apart(&mut self) {
        self.tried.apart = true;
    }

    /// Notes, unless it is known, that the stream's messages up to `position` are none of the push.
    pub(super) fn begin(&mut self, position: Position) {
        self.tried.since.get_or_insert(position);
    }

    /// Notes that nothing of the push was stored up to `position`, now the last one: what is sent from now on, the server
    /// knows by itself.
    pub(super) fn is_not_stored(&mut self, position: Position) {
        self.tried.first = Some(Instant::now());
        self.tried.since = Some(position);
    }

    /// Notes that so many messages, all of the push, are stored, the last one at `position`.
    pub(super) fn end(&mut self, position: Position, messages: usize) {
        self.tried.stored = Some((position, messages, Instant::now()));
    }
}

impl Tried {
    fn new(pipe: &PipeName, seq: u64, is_from_here: bool) -> Self {
        Tried {
            pipe: pipe.clone(),
            seq,
            first: is_from_here.then(Instant::now),
            since: None,
            groups: Vec::new(),
            apart: !is_from_here,
            stored: None,
        }
    }

    /// The number of a message of stream `epoch` behind which all of the push is.
    pub(super) fn since(&self, epoch: u64) -> u64 {
        let since = self.since.filter(|since| since.epoch() == epoch);
        since.map_or(0, Position::seq)
    }

    /// Whether any of it went as an atomic batch.
    pub(super) fn any_whole(&self) -> bool {
        self.groups.iter().any(|group| group.whole)
    }
}
