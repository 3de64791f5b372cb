//! How a subscriber gets at messages: a consumer, or a few fetched one at a time.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;

use super::Shared;
use super::api::Info;
use super::feed::Feed;
use super::link::{Line, SETTLE};
use super::single::Single;
use crate::backend::weight;
use crate::error::{Error, Kind, Result};
use crate::message::Position;
use crate::name::PipeName;

/// How often a pipe that does not exist is looked for, should the news of its making be lost, or not be
/// permitted.
const LOOK_FOR: Duration = Duration::from_secs(5);

/// How much is fetched one at a time before it is delivered: messages, and bytes.
const FETCHED: usize = 256;
const FETCHED_BYTES: usize = 1 << 20;

/// How often a connection breaks before the same message until it is taken for the reason, by one who may not
/// fetch it.
pub(super) const SUSPICIOUS: u32 = 4;

/// A consumer of a known incarnation of the pipe.
pub(super) struct Open {
    pub(super) epoch: u64,
    /// Whether the stream drops messages by itself.
    pub(super) sheds: bool,
    pub(super) feed: Feed,
}

/// The number of the first message of incarnation `epoch` that was not received.
pub(super) fn next_number(received: Option<Position>, epoch: u64) -> u64 {
    match received {
        Some(position) if position.epoch() == epoch => position.seq().saturating_add(1),
        // Of another incarnation, whose messages are gone.
        _ => 0,
    }
}

/// What was fetched without a consumer.
pub(super) struct Fetched {
    /// The incarnation that it is of; `None` where there was none, or it changed.
    pub(super) epoch: Option<u64>,
    pub(super) singles: Vec<Single>,
    /// How many more are to be fetched like this.
    pub(super) careful: u32,
}

/// Fetches `careful` messages behind `received` one at a time, and more where they are odd; a part of them
/// where that would take long.
pub(super) async fn fetch(
    shared: Arc<Shared>,
    line: Arc<Line>,
    pipe: PipeName,
    received: Option<Position>,
    mut careful: u32,
    stumbles: u32,
) -> Result<Fetched> {
    let link = line.link().await?;
    let mut singles = Vec::new();
    let nothing = |careful| Fetched {
        epoch: None,
        singles: Vec::new(),
        careful,
    };
    let Some(info) = shared.look(&link, &pipe).await? else {
        return Ok(nothing(0));
    };
    readable(&info)?;
    let epoch = info.epoch()?;
    let mut next = next_number(received, epoch).max(1);
    let mut bytes = 0;
    while careful > 0 && bytes < FETCHED_BYTES && singles.len() < FETCHED {
        let single = match link.single(&info.config.name, next).await {
            Ok(Some(single)) => single,
            Ok(None) => {
                careful = 0;
                break;
            }
            // Most probably it was no message that broke the connection.
            Err(error)
                if error.kind() == Kind::Denied
                    && (stumbles < SUSPICIOUS || next > info.state.last_seq) =>
            {
                careful = 0;
                break;
            }
            Err(error) => return Err(error),
        };
        careful = single.careful(careful);
        if single.odd {
            shared.set_apart(&pipe, single.seq);
        }
        next = single.seq + 1;
        bytes += weight(&single.data);
        singles.push(single);
    }
    // They are of the incarnation that was there before and is there after.
    match shared.look(&link, &pipe).await? {
        Some(info) if info.epoch()? == epoch => Ok(Fetched {
            epoch: Some(epoch),
            singles,
            careful,
        }),
        _ => Ok(nothing(careful)),
    }
}

/// Makes a consumer behind `received`; waits until the pipe exists. `epoch` is the incarnation that was seen
/// last.
pub(super) async fn open(
    shared: Arc<Shared>,
    line: Arc<Line>,
    pipe: PipeName,
    mut epoch: Option<u64>,
    received: Option<Position>,
) -> Result<Open> {
    let stream = shared.url.naming.stream(&pipe)?;
    let link = line.link().await?;
    let mut news = None;
    let mut patience = LOOK_FOR;
    loop {
        let mut feed = None;
        if let Some(epoch) = epoch {
            let start = next_number(received, epoch);
            feed = Feed::open(Arc::clone(&link), &stream, start, false).await?;
        }
        // A consumer is of the incarnation that was there before and is there after.
        if let Some(info) = shared.look_by(&line, &pipe).await? {
            readable(&info)?;
            let now = info.epoch()?;
            match feed {
                Some(feed) if epoch == Some(now) => {
                    return Ok(Open {
                        epoch: now,
                        sheds: info.config.sheds(),
                        feed,
                    });
                }
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
        patience = match tokio::time::timeout(patience, made.next()).await {
            // The news may come before the stream is there for who asks.
            Ok(Some(_)) => SETTLE,
            Ok(None) => return Err(Error::new(Kind::Unreachable, "the connection broke")),
            Err(_) => (2 * patience).min(LOOK_FOR),
        };
    }
}

/// Refuses streams whose messages are removed by who reads them.
pub(super) fn readable(info: &Info) -> Result<()> {
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
