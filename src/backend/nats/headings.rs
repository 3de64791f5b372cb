//! A stream's messages without their bytes.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::api::Info;
use super::feed::{Feed, Loss};
use super::link::{ANSWER, Line, Link};
use crate::error::{Error, Kind, Result};

/// After so much silence it is looked whether there is anything to come, and after twice as much the next time.
const LOOK: Duration = Duration::from_millis(500);

/// What is known of a message.
pub(super) struct Heading<'a> {
    pub(super) seq: u64,
    /// Its bytes, without headers.
    pub(super) size: u64,
    header: &'a dyn Fn(&'static str) -> Option<&'a str>,
}

impl<'a> Heading<'a> {
    #[cfg(test)]
    pub(super) fn new(seq: u64, header: &'a dyn Fn(&'static str) -> Option<&'a str>) -> Self {
        Heading {
            seq,
            size: 0,
            header,
        }
    }

    /// The first header of this name.
    pub(super) fn header(&self, name: &'static str) -> Option<&'a str> {
        (self.header)(name)
    }
}

/// Messages of a stream that are looked through in their order.
pub(super) struct Headings<'a> {
    pub(super) info: &'a Info,
    /// The first that was not looked at.
    pub(super) next: u64,
    /// Behind the last one.
    pub(super) end: u64,
}

impl Headings<'_> {
    /// Notes what is known of each message that is still there. Messages of others may break the connections of
    /// `line`.
    ///
    /// # Errors
    /// As for [`Link::api`].
    pub(super) async fn look_through(
        &mut self,
        line: &Line,
        note: &mut (dyn FnMut(&Heading<'_>) + Send),
    ) -> Result<()> {
        while self.next < self.end {
            let link = line.link().await?;
            match self.stream_through(&link, note).await {
                Ok(true) => return Ok(()),
                Ok(false) => {}
                // Perhaps it broke over the next message.
                Err(error) if error.kind() == Kind::Unreachable && !link.is_alive() => {}
                Err(error) => return Err(error),
            }
            let link = line.link().await?;
            let mut careful = 1;
            while careful > 0 {
                match link.single(&self.info.config.name, self.next).await? {
                    Some(single) if single.seq < self.end => {
                        careful = single.careful(careful);
                        self.next = single.seq + 1;
                        note(&Heading {
                            seq: single.seq,
                            size: single.data.len() as u64,
                            header: &|name| single.header(name),
                        });
                    }
                    _ => return Ok(()),
                }
            }
        }
        Ok(())
    }

    /// `false` if the next message has to be fetched by itself.
    async fn stream_through(
        &mut self,
        link: &Arc<Link>,
        note: &mut (dyn FnMut(&Heading<'_>) + Send),
    ) -> Result<bool> {
        let stream = &self.info.config.name;
        let Some(mut feed) = Feed::open(Arc::clone(link), stream, self.next, true).await? else {
            return Ok(true);
        };
        let mut heard = Instant::now();
        let mut patience = LOOK;
        loop {
            let unreachable = |why| Error::new(Kind::Unreachable, why);
            let arrival = match tokio::time::timeout(patience, feed.next()).await {
                Ok(Ok(arrival)) => arrival,
                Ok(Err(Loss::Failed(error))) => return Err(error),
                Ok(Err(Loss::Gone(why, _))) => return Err(unreachable(why)),
                Err(_) if heard.elapsed() > ANSWER => {
                    return Err(unreachable(format!("{stream}: its messages do not come")));
                }
                Err(_) => {
                    match link.info(stream).await? {
                        Some(info) if info.state.first_seq < self.end => {}
                        // They were dropped meanwhile.
                        _ => return Ok(true),
                    }
                    // All may have been deleted one by one, or have come to their own end.
                    match link.single(stream, self.next).await? {
                        Some(single) if single.seq < self.end => {}
                        _ => return Ok(true),
                    }
                    // A server that was started anew since does not know the consumer, and does not say so.
                    let link = Arc::clone(link);
                    let Some(another) = Feed::open(link, stream, self.next, true).await? else {
                        return Ok(true);
                    };
                    feed = another;
                    patience *= 2;
                    continue;
                }
            };
            heard = Instant::now();
            if arrival.seq >= self.end {
                return Ok(true);
            }
            let header = |name: &'static str| Some(arrival.headers.as_ref()?.get(name)?.as_str());
            // The server's own is the last one of this name.
            let sizes = arrival.headers.as_ref();
            let sizes = sizes.and_then(|headers| headers.get_all("Nats-Msg-Size").last());
            let size = sizes.and_then(|size| size.as_str().parse().ok());
            // Where headers of others have no end, it is part of the last one.
            let Some(size) = size else {
                return Ok(false);
            };
            self.next = arrival.seq + 1;
            note(&Heading {
                seq: arrival.seq,
                size,
                header: &header,
            });
            // Where some were deleted one by one, the last may be one of them.
            let is_deleted = arrival.pending == 0 && self.info.state.num_deleted > 0;
            if self.next == self.end || is_deleted {
                return Ok(true);
            }
        }
    }
}
