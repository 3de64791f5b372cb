//! Looking for a push by the identity of its messages, where the server may have forgotten it.

use std::sync::Arc;

use super::api::Info;
use super::feed::{Feed, Loss};
use super::link::{ANSWER, Line, Link};
use crate::error::{Error, Kind, Result};

/// How many pushes are looked through.
const PUSHES: u64 = 65_536;

/// How many messages are looked through at a time, from the last one backwards.
const BLOCK: u64 = 65_536;

/// A message that was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Found {
    /// Its place in the push.
    pub(super) index: usize,
    pub(super) seq: u64,
}

/// The last message with an identity that starts with `push`, among the last 65,536 pushes to the stream. Messages
/// of others may break the connections of `line`.
///
/// # Errors
/// As for [`Link::api`].
pub(super) async fn search(line: &Line, info: &Info, push: &str) -> Result<Option<Found>> {
    let first = info.state.first_seq;
    let mut end = info.state.last_seq + 1;
    let mut pushes = 0;
    while info.state.messages > 0 && end > first && pushes < PUSHES {
        let start = end.saturating_sub(BLOCK).max(first);
        let mut block = Block {
            push,
            next: start,
            end,
            found: None,
            pushes: 0,
        };
        block.look_through(line, info).await?;
        if block.found.is_some() {
            return Ok(block.found);
        }
        pushes += block.pushes;
        end = start;
    }
    Ok(None)
}

/// Messages that are looked through in their order.
struct Block<'a> {
    /// What the identities looked for start with.
    push: &'a str,
    /// The first that was not looked at.
    next: u64,
    /// Behind the last one.
    end: u64,
    found: Option<Found>,
    pushes: u64,
}

impl Block<'_> {
    async fn look_through(&mut self, line: &Line, info: &Info) -> Result<()> {
        loop {
            let link = line.link().await?;
            match self.stream_through(&link, info).await {
                // Perhaps it broke over the next message.
                Err(error) if error.kind() == Kind::Unreachable && !link.is_alive() => {}
                other => return other,
            }
            let link = line.link().await?;
            let mut careful = 1;
            while careful > 0 {
                match link.single(&info.config.name, self.next).await? {
                    Some(single) if single.seq < self.end => {
                        careful = single.careful(careful);
                        self.note(single.seq, |name| single.header(name));
                    }
                    _ => return Ok(()),
                }
            }
        }
    }

    async fn stream_through(&mut self, link: &Arc<Link>, info: &Info) -> Result<()> {
        let stream = &info.config.name;
        let Some(mut feed) = Feed::open(Arc::clone(link), stream, self.next, true).await? else {
            return Ok(());
        };
        loop {
            let unreachable = |why| Error::new(Kind::Unreachable, why);
            let arrival = match tokio::time::timeout(ANSWER, feed.next()).await {
                Ok(Ok(arrival)) => arrival,
                Ok(Err(Loss::Failed(error))) => return Err(error),
                Ok(Err(Loss::Gone(why, _))) => return Err(unreachable(why)),
                // They were dropped meanwhile.
                Err(_) => return Err(unreachable(format!("{stream}: its messages do not come"))),
            };
            if arrival.seq >= self.end {
                return Ok(());
            }
            let headers = arrival.headers.as_ref();
            self.note(arrival.seq, |name| Some(headers?.get(name)?.as_str()));
            // Where some were deleted one by one, the last may be one of them.
            if self.next == self.end || arrival.pending == 0 && info.state.num_deleted > 0 {
                return Ok(());
            }
        }
    }

    /// Notes what a message's headers say.
    fn note<'h>(&mut self, seq: u64, header: impl Fn(&'static str) -> Option<&'h str>) {
        self.next = seq + 1;
        // The last message of an atomic batch, the first one of a chain, or one that came alone.
        let together = header("Nats-Batch-Id").is_some() && header("Nats-Batch-Commit").is_none()
            || header("Nats-Expected-Last-Msg-Id").is_some();
        self.pushes += u64::from(!together);
        let id = header("Nats-Msg-Id").and_then(|id| id.strip_prefix(self.push));
        if let Some(index) = id.and_then(|index| index.parse().ok()) {
            self.found = Some(Found { index, seq });
        }
    }
}
