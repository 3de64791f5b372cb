//! The writing side of an open file: partial lines for each writing process, and the pushes.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, MutexGuard, PoisonError};

use bytes::Bytes;
use tokio::sync::Mutex;

use super::framing::{Decoder, framed_total};
use crate::backend::{Backend, Start};
use crate::error::{Applied, Error, Kind, Result};
use crate::message::{Batch, Position, Producer, PushId};
use crate::name::PipeName;
use crate::selector::Frame;

/// Turns what is written into pushes. Writers of one open file take turns, so that its pushes have one
/// order and one is under way at a time.
pub struct Writer {
    backend: Arc<dyn Backend>,
    pipe: PipeName,
    frame: Frame,
    limit: usize,
    state: Mutex<State>,
    /// Who closes a descriptor, until that is done; a signal may have ended it before.
    closing: std::sync::Mutex<HashSet<u64>>,
    /// How many pushes the backend has answered, in any way but by letting them time out.
    answers: AtomicU64,
}

#[derive(Default)]
struct State {
    /// The streams, by FUSE lock owner: one for each process that writes through this open file.
    streams: HashMap<u64, Stream>,
    /// Of the last stream that was closed, for the next one: a shell closes a copy of the descriptor behind each command.
    spare: Numbers,
}

/// Numbers its pushes.
#[derive(Default)]
struct Numbers {
    producer: Option<Producer>,
    pushes: u64,
}

struct Stream {
    decoder: Decoder,
    /// Of its own: what this process repeats must not come behind another's push, as backends take a producer's lower number
    /// for one that is stored. And its next push tells them that the one before it was given up.
    numbers: Numbers,
    /// A piece whose push was given up without knowing whether it had arrived. A program that was
    /// interrupted writes it again; it is then the same push.
    doubtful: Option<(Bytes, PushId)>,
    /// Whether the last piece failed: then the line that it should have ended is not pushed as it stands.
    failed: bool,
    /// The identity under which the last line is being pushed, should that be repeated.
    closing: Option<PushId>,
}

impl Numbers {
    /// An identity that was not used before.
    fn next(&mut self) -> Result<PushId> {
        let producer = match self.producer {
            Some(producer) => producer,
            None => *self.producer.insert(Producer::random()?),
        };
        self.pushes += 1;
        Ok(PushId::first(producer, self.pushes))
    }
}

impl Writer {
    /// A writer whose messages are at most `limit` bytes long; the backend's own limit counts too.
    pub fn new(backend: Arc<dyn Backend>, pipe: PipeName, frame: Frame, limit: usize) -> Self {
        let limit = limit.min(backend.caps().max_message);
        Writer {
            backend,
            pipe,
            frame,
            limit,
            state: Mutex::default(),
            closing: std::sync::Mutex::default(),
            answers: AtomicU64::new(0),
        }
    }

    /// How many of its pushes the backend has answered, in any way but by letting them time out.
    pub fn answers(&self) -> u64 {
        self.answers.load(Ordering::Relaxed)
    }

    async fn push(&self, id: PushId, batch: Batch) -> Result<Position> {
        let pushed = self.backend.push(&self.pipe, id, batch).await;
        if !matches!(&pushed, Err(error) if error.kind() == Kind::TimedOut) {
            self.answers.fetch_add(1, Ordering::Relaxed);
        }
        pushed
    }

    /// Takes the next piece of `owner`'s stream and pushes the messages that end in it. Returns the bytes
    /// taken, once all of those messages are acknowledged: fewer than given where a message is over the
    /// limit, or the unfinished lines of all owners together are. `continued` says that the piece is a later
    /// part of one write(2).
    ///
    /// Where the future is dropped, nothing of the piece is kept either, but the push under way may still arrive. It is
    /// the same push if the piece is what `owner` writes next.
    ///
    /// # Errors
    /// As for [`Backend::push`]; nothing of the piece is kept then, and nothing of it is stored unless the error says so.
    pub async fn write(&self, owner: u64, piece: Bytes, continued: bool) -> Result<usize> {
        let mut state = self.state.lock().await;
        if self.closing().contains(&owner) {
            // One of its descriptors was closed, and nobody waited for the end of that: this is the next line.
            let closed = self.close_stream(&mut state, owner).await;
            self.closing().remove(&owner);
            closed?;
        }
        let all = state.streams.values();
        let kept: usize = all.map(|stream| stream.decoder.kept()).sum();
        let stream = self.stream(&mut state, owner);
        let mut decoded = stream.decoder.decode(&piece);
        // What ends in the piece need not be kept.
        let ended = match decoded.whole {
            0 => 0,
            whole => stream.decoder.kept() + whole,
        };
        let keep = kept + piece.len() - ended;
        if decoded.refused.is_none() && keep > self.limit.saturating_mul(2).max(4 << 20) {
            // Like one over the limit, so that its stream goes on with the next line.
            decoded.refused = Some(Error::new(
                Kind::TooLong,
                format!("the unfinished lines of several processes reach {keep} bytes together"),
            ));
        }
        let doubtful = stream.doubtful.take();
        stream.failed = true;
        if !decoded.messages.is_empty() {
            let batch = Batch::new(std::mem::take(&mut decoded.messages))?;
            let mut id = match doubtful {
                Some((earlier, id)) if earlier == piece => id.again(),
                _ => stream.numbers.next()?,
            };
            stream.doubtful = Some((piece.clone(), id));
            let mut pushed = self.push(id, batch.clone()).await;
            if id.repeated
                && let Ok(position) = &pushed
                && self.was_dropped(*position).await?
            {
                // What was written before a reset is gone, and this is written behind it.
                id = stream.numbers.next()?;
                stream.doubtful = Some((piece.clone(), id));
                pushed = self.push(id, batch.clone()).await;
            }
            if let Err(error) = pushed {
                if let Applied::Part(stored) = error.applied()
                    && let Some(stored) = batch.messages().get(..stored)
                {
                    let bytes = stored.iter().map(|message| message.len() as u64).sum();
                    let whole = framed_total(self.frame, stored.len() as u64, bytes) as usize;
                    (stream.doubtful, stream.failed) = (None, false);
                    decoded.whole = decoded.passed + whole - stream.decoder.kept();
                    decoded.refused = Some(error);
                    // A short count; the rest, written again, is told why.
                    return stream.decoder.accept(&piece, decoded, continued);
                }
                if error.applied() == Applied::No && !id.repeated {
                    stream.doubtful = None;
                }
                return Err(error);
            }
        }
        stream.doubtful = None;
        let taken = stream
            .decoder
            .accept(&piece, decoded, continued)
            .map_err(|error| self.named(error))?;
        stream.failed = false;
        Ok(taken)
    }

    /// `owner` closes the file: its last, unterminated line is pushed.
    ///
    /// Dropping the future keeps the line for [`Writer::finish`].
    ///
    /// # Errors
    /// As for [`Backend::push`], and [`Kind::InvalidInput`] for a cut `len` frame; the line is dropped.
    pub async fn close(&self, owner: u64) -> Result<()> {
        self.closing().insert(owner);
        let mut state = self.state.lock().await;
        let closed = self.close_stream(&mut state, owner).await;
        self.closing().remove(&owner);
        closed
    }

    fn closing(&self) -> MutexGuard<'_, HashSet<u64>> {
        self.closing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn close_stream(&self, state: &mut State, owner: u64) -> Result<()> {
        let Some(stream) = state.streams.get_mut(&owner) else {
            return Ok(());
        };
        let pushed = match stream.decoder.finish() {
            Ok(None) => Ok(()),
            Ok(Some(begun)) if stream.failed => {
                // Whoever wrote it was told.
                let bytes = begun.len();
                log::warn!(
                    "{}: the first {bytes} bytes of a line that failed are dropped",
                    self.pipe
                );
                Ok(())
            }
            Ok(Some(last)) => {
                let id = match stream.closing {
                    Some(id) => id.again(),
                    None => stream.numbers.next()?,
                };
                stream.closing = Some(id);
                let batch = Batch::new(vec![last])?;
                self.push(id, batch).await.map(|_| ())
            }
            Err(error) => Err(self.named(error)),
        };
        if let Some(stream) = state.streams.remove(&owner)
            && stream.doubtful.is_none()
            && pushed.is_ok()
        {
            // None of its pushes is repeated any more.
            state.spare = stream.numbers;
        }
        pushed
    }

    /// The last close: whatever lines are left are pushed, and the first failure is returned.
    ///
    /// # Errors
    /// As for [`Writer::close`].
    pub async fn finish(&self) -> Result<()> {
        let mut state = self.state.lock().await;
        let owners: Vec<u64> = state.streams.keys().copied().collect();
        let mut result = Ok(());
        for owner in owners {
            let closed = self.close_stream(&mut state, owner).await;
            result = result.and(closed);
        }
        result
    }

    /// Whether what was stored at `position` was dropped, by anybody's reset or removal: known again as the push before, what
    /// is written again would be acknowledged, and be gone like that.
    async fn was_dropped(&self, position: Position) -> Result<bool> {
        let mut source = self.backend.subscribe(&self.pipe, Start::Oldest).await?;
        // With that it is known where the pipe starts.
        source.end().await?;
        Ok(position < source.floor().position())
    }

    fn stream<'a>(&self, state: &'a mut State, owner: u64) -> &'a mut Stream {
        let State { streams, spare } = state;
        streams.entry(owner).or_insert_with(|| Stream {
            decoder: Decoder::new(self.frame, self.limit),
            numbers: std::mem::take(spare),
            doubtful: None,
            failed: false,
            closing: None,
        })
    }

    fn named(&self, error: Error) -> Error {
        Error::new(error.kind(), format!("{}: {error}", self.pipe))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::memory::Memory;

    const MIB: usize = 1 << 20;

    /// A piece of a line.
    fn part(bytes: usize) -> Bytes {
        Bytes::from(vec![b'x'; bytes])
    }

    /// A writer to an empty pipe, and the messages and bytes that the pipe holds.
    fn writer(frame: Frame, limit: usize) -> (Writer, impl AsyncFn() -> (u64, u64)) {
        let backend: Arc<dyn Backend> = Arc::new(Memory::new(1 << 30));
        let pipe = PipeName::new("topic").expect("legal");
        let writer = Writer::new(Arc::clone(&backend), pipe.clone(), frame, limit);
        (writer, async move || {
            let info = backend.stat(&pipe).await;
            info.map_or((0, 0), |info| (info.count, info.bytes.unwrap_or(0)))
        })
    }

    #[tokio::test]
    async fn no_fragment_of_a_line_is_pushed_for_which_others_left_no_room() {
        for frame in [Frame::Line, Frame::Nul, Frame::File, Frame::Len] {
            // Together they may keep 6 MiB.
            let (writer, pushed) = writer(frame, 3 * MIB);
            let begin = |bytes| match frame {
                Frame::Len => Bytes::from([&[0, 44, 0, 0][..], &part(bytes - 4)].concat()),
                _ => part(bytes),
            };
            for other in [1, 2] {
                let taken = writer.write(other, begin(11 * MIB / 4), false).await;
                assert_eq!(taken.expect("room"), 11 * MIB / 4, "{frame}");
            }
            writer.write(3, begin(MIB / 4), false).await.expect("room");
            let refused = writer.write(3, part(3 * MIB / 4), false).await;
            assert_eq!(refused.expect_err("no room").kind(), Kind::TooLong);
            // Whoever does not care goes on with the line, which has a hole now.
            let rest = writer.write(3, part(10), false).await;
            assert_eq!(rest.expect_err("a hole").kind(), Kind::TooLong, "{frame}");
            writer.close(3).await.expect("closed");
            assert_eq!(pushed().await, (0, 0), "{frame}");
        }
    }

    #[tokio::test]
    async fn the_line_after_one_that_found_no_room_is_pushed() {
        let (writer, pushed) = writer(Frame::Line, 3 * MIB);
        for other in [1, 2] {
            let taken = writer.write(other, part(11 * MIB / 4), false).await;
            assert_eq!(taken.expect("room"), 11 * MIB / 4);
        }
        // What ends needs no room, also where the rest of the piece finds none.
        writer.write(3, part(MIB / 4), false).await.expect("room");
        let piece = Bytes::from([b"end\n", &part(3 * MIB / 4)[..]].concat());
        let taken = writer.write(3, piece.clone(), false).await.expect("a line");
        assert_eq!(taken, 4);
        assert_eq!(pushed().await, (1, (MIB / 4 + 3) as u64));
        let rest = writer.write(3, piece.slice(taken..), false).await;
        assert_eq!(rest.expect_err("no room").kind(), Kind::TooLong);
        let rest = writer.write(3, Bytes::from_static(b"end\n"), false).await;
        assert_eq!(rest.expect_err("a hole").kind(), Kind::TooLong);
        let next = writer.write(3, Bytes::from_static(b"next\n"), false).await;
        assert_eq!(next.expect("whole"), 5);
        writer.close(3).await.expect("closed");
        assert_eq!(pushed().await, (2, (MIB / 4 + 3 + 4) as u64));
    }
}
