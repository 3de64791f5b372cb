//! What a push has to know of a stream.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use super::api::Info;
use super::link::Link;
use crate::error::{Error, Kind, Result};
use crate::message::Position;

/// How long a server should remember identities: as long as a push is repeated, unless a mount's `--timeout` is longer.
pub(super) const LONG_ENOUGH: Duration = Duration::from_secs(30);

/// A stream, as it was looked at.
pub(super) struct Stream {
    pub(super) name: String,
    /// Where it is pushed to.
    pub(super) subject: String,
    pub(super) epoch: u64,
    /// Its last message when it was looked at.
    pub(super) last: u64,
    /// Whether it takes atomic batches.
    pub(super) atomic: bool,
    /// Whether one server alone decides what is stored. Where several do, a message is looked at before those
    /// on which it depends are stored.
    pub(super) alone: bool,
    /// Whether it may refuse a message for its size, or as it is full.
    pub(super) limited: bool,
    /// How many short chains are still to come, as others' messages came into a long one.
    pub(super) crowded: AtomicU32,
    /// How long the server remembers messages' identities.
    pub(super) window: Duration,
    pub(super) seen: Instant,
}

impl Stream {
    pub(super) fn new(info: &Info, link: &Link) -> Result<Self> {
        Ok(Stream {
            name: info.config.name.clone(),
            subject: subject(info)?,
            epoch: info.epoch()?,
            last: info.state.last_seq,
            atomic: info.config.allow_atomic && link.knows_batches(),
            alone: info.config.num_replicas <= 1,
            limited: info.config.may_refuse(),
            crowded: AtomicU32::new(0),
            window: info.duplicate_window(),
            seen: Instant::now(),
        })
    }

    /// Whether the server still knows again what it has stored from `then` on.
    pub(super) fn remembers_since(&self, then: Instant) -> bool {
        // Half of the time is for the messages' way, and for clocks that differ.
        self.window >= LONG_ENOUGH && then.elapsed() < self.window / 2
    }

    /// Whether messages may go as a chain.
    pub(super) fn takes_chains(&self) -> bool {
        self.alone && self.window >= LONG_ENOUGH
    }

    /// Takes one of the short chains that are still to come; false if there is none.
    pub(super) fn take_short(&self) -> bool {
        let less = |left: u32| left.checked_sub(1);
        self.crowded
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, less)
            .is_ok()
    }

    pub(super) fn position(&self, seq: u64) -> Position {
        Position::new(self.epoch, seq)
    }
}

/// Where the stream is pushed to.
fn subject(info: &Info) -> Result<String> {
    let unsupported = |why: String| {
        Error::new(
            Kind::Unsupported,
            format!("stream {}: {why}", info.config.name),
        )
    };
    if info.config.mirror.is_some() {
        return Err(unsupported("a mirror cannot be pushed to".to_owned()));
    }
    if info.config.no_ack {
        let why = "it acknowledges nothing (no_ack), so it is not known what of a push is stored";
        return Err(unsupported(why.to_owned()));
    }
    if !info.keeps() {
        let why = "it keeps messages only for consumers (interest retention), and has none";
        return Err(unsupported(why.to_owned()));
    }
    match info.config.subjects.as_slice() {
        [subject] if !subject.split('.').any(|token| token == "*" || token == ">") => {
            Ok(subject.clone())
        }
        subjects => Err(unsupported(format!(
            "it is not clear under which subject to push; it has: {}",
            subjects.join(" ")
        ))),
    }
}
