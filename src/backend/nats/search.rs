//! Looking for a push by the identity of its messages, where the server may have forgotten it.

use std::sync::Arc;

use async_nats::HeaderMap;
use async_nats::header::{NATS_BATCH_COMMIT, NATS_BATCH_ID, NATS_MESSAGE_ID};

use super::api::Info;
use super::feed::{Feed, Loss};
use super::link::{ANSWER, Link};
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

/// The last message with an identity that starts with `push`, among the last 65,536 pushes to the stream.
///
/// # Errors
/// As for [`Link::api`].
pub(super) async fn search(link: &Arc<Link>, info: &Info, push: &str) -> Result<Option<Found>> {
    let first = info.state.first_seq;
    let mut end = info.state.last_seq + 1;
    let mut pushes = 0;
    while info.state.messages > 0 && end > first && pushes < PUSHES {
        let start = end.saturating_sub(BLOCK).max(first);
        let block = look_through(link, info, start, end, push).await?;
        if block.found.is_some() {
            return Ok(block.found);
        }
        pushes += block.pushes;
        end = start;
    }
    Ok(None)
}

struct Block {
    found: Option<Found>,
    pushes: u64,
}

/// Looks through the messages from `start` to before `end`.
async fn look_through(
    link: &Arc<Link>,
    info: &Info,
    start: u64,
    end: u64,
    push: &str,
) -> Result<Block> {
    let mut block = Block {
        found: None,
        pushes: 0,
    };
    let stream = &info.config.name;
    let Some(mut feed) = Feed::open(Arc::clone(link), stream, start, true).await? else {
        return Ok(block);
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
        if arrival.seq >= end {
            return Ok(block);
        }
        if let Some(headers) = &arrival.headers {
            block.pushes += u64::from(ends_push(headers));
            if let Some(index) = index(headers, push) {
                block.found = Some(Found {
                    index,
                    seq: arrival.seq,
                });
            }
        }
        // Where some were deleted one by one, the last may be one of them.
        if arrival.seq + 1 == end || arrival.pending == 0 && info.state.num_deleted > 0 {
            return Ok(block);
        }
    }
}

/// Whether it is the last message of an atomic batch, or one that came alone.
fn ends_push(headers: &HeaderMap) -> bool {
    headers.get(NATS_BATCH_ID).is_none() || headers.get(NATS_BATCH_COMMIT).is_some()
}

fn index(headers: &HeaderMap, push: &str) -> Option<usize> {
    let id = headers.get(NATS_MESSAGE_ID)?.as_str();
    id.strip_prefix(push)?.parse().ok()
}
