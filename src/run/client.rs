//! The commands that use a store directly, without a mount: the same engine, without FUSE.

use std::io::{self, Read, StdoutLock, Write};
use std::os::unix::ffi::OsStringExt;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use super::{Outcome, runtime, source_or_default};
use crate::backend::{self, Backend, BackendUrl, retry::Retry};
use crate::cli::{LsArgs, PipeArgs, PullArgs, PushArgs, SourceArgs};
use crate::error::{Error, Kind, Result};
use crate::message::{Batch, Message, Producer, PushId};
use crate::pipe::framing::encode;
use crate::pipe::subscription::{Step, Subscription};
use crate::pipe::writer::Writer;
use crate::selector::{Frame, Mode};

/// How long an unreachable backend is retried; for who will not wait so long for a message, no longer than that, but
/// this long at least.
const TIMEOUT: Duration = Duration::from_secs(30);
const SHORTEST: Duration = Duration::from_secs(2);

/// Bytes read from standard input, or fetched, at once.
const PIECE: usize = 256 << 10;

fn open(args: SourceArgs) -> Result<Arc<dyn Backend>> {
    Ok(Arc::new(open_within(TIMEOUT, args)?))
}

fn open_within(timeout: Duration, args: SourceArgs) -> Result<Retry> {
    let source = source_or_default(args.source)?;
    if matches!(source, BackendUrl::Memory { .. }) {
        return Err(Error::new(
            Kind::InvalidInput,
            "memory: lives in one mount's process; use its files instead",
        ));
    }
    Ok(Retry::new(backend::open(&source)?, Some(timeout)))
}

pub(super) fn push(args: PushArgs) -> Result<Outcome> {
    if let Some(mode) = args.topic.options.mode {
        let why = format!("@{mode} is for reading: a push has no mode");
        return Err(Error::new(Kind::InvalidInput, why).usage());
    }
    let frame = args.topic.options.frame.unwrap_or(args.frame);
    let pipe = args.topic.pipe;
    runtime(1)?.block_on(async move {
        let backend = open(args.source)?;
        if !args.messages.is_empty() {
            let messages = args
                .messages
                .into_iter()
                .map(|message| message.into_vec().into());
            let id = PushId::first(Producer::random()?, 1);
            backend
                .push(&pipe, id, Batch::new(messages.collect())?)
                .await?;
            return Ok(Outcome::Done);
        }
        let limit = backend.caps().max_message;
        let writer = Writer::new(backend, pipe, frame, limit);
        let mut buffer = vec![0; PIECE];
        loop {
            let read = match io::stdin().lock().read(&mut buffer) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                other => other.map_err(|error| Error::io("reading standard input", error))?,
            };
            if read == 0 {
                writer.finish().await?;
                return Ok(Outcome::Done);
            }
            let mut piece = Bytes::copy_from_slice(&buffer[..read]);
            while !piece.is_empty() {
                let taken = writer.write(0, piece.clone(), false).await?;
                piece = piece.split_off(taken);
            }
        }
    })
}

pub(super) fn pull(args: PullArgs) -> Result<Outcome> {
    let frame = args.topic.options.frame.unwrap_or(args.frame);
    let mode = args.topic.options.mode.unwrap_or(Mode::Drain);
    let patience = args.timeout.unwrap_or(TIMEOUT).clamp(SHORTEST, TIMEOUT);
    runtime(1)?.block_on(async move {
        let mut backend = open_within(patience, args.source)?;
        if args.timeout.is_none() {
            backend = backend.waiting_for_ever();
        }
        let mut subscription = Subscription::open(&backend, &args.topic.pipe, mode).await?;
        let mut output = Output::new(frame, args.count);
        while !output.is_complete() {
            let ready = match subscription.ready(PIECE).await {
                // Who follows waits, however long the store is away.
                Err(error)
                    if error.kind() == Kind::TimedOut
                        && args.timeout.is_none()
                        && !subscription.has_end() =>
                {
                    Step::Wait
                }
                ready => ready?,
            };
            let step = match ready {
                Step::Wait => {
                    output.flush()?;
                    match args.timeout {
                        None => subscription.wait(PIECE).await?,
                        Some(time) => {
                            match tokio::time::timeout(time, subscription.wait(PIECE)).await {
                                Ok(step) => step?,
                                Err(_) => break,
                            }
                        }
                    }
                }
                step => step,
            };
            match step {
                Step::Messages(messages) => output.print(&messages)?,
                Step::End => break,
                Step::Wait => {}
            }
        }
        output.flush()?;
        Ok(match (output.printed, args.timeout) {
            (0, Some(_)) if args.count != Some(0) => Outcome::GotNothing,
            _ => Outcome::Done,
        })
    })
}

/// Standard output in a frame, up to a number of messages.
struct Output {
    stdout: StdoutLock<'static>,
    frame: Frame,
    left: Option<u64>,
    printed: u64,
    /// Whoever read it has gone, as `head` does; that is no failure.
    closed: bool,
}

impl Output {
    fn new(frame: Frame, left: Option<u64>) -> Self {
        Output {
            stdout: io::stdout().lock(),
            frame,
            left,
            printed: 0,
            closed: false,
        }
    }

    fn is_complete(&self) -> bool {
        self.closed || self.left == Some(0)
    }

    fn print(&mut self, messages: &[Message]) -> Result<()> {
        let count = self
            .left
            .map_or(messages.len(), |left| messages.len().min(left as usize));
        let mut out = Vec::new();
        for message in &messages[..count] {
            encode(self.frame, &message.data, 0, usize::MAX, &mut out);
        }
        self.printed += count as u64;
        self.left = self.left.map(|left| left - count as u64);
        let written = self.stdout.write_all(&out);
        self.check(written)
    }

    fn flush(&mut self) -> Result<()> {
        let flushed = self.stdout.flush();
        self.check(flushed)
    }

    fn check(&mut self, result: io::Result<()>) -> Result<()> {
        match result {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                self.closed = true;
                Ok(())
            }
            other => other.map_err(|error| Error::io("writing to standard output", error)),
        }
    }
}

pub(super) fn reset(args: PipeArgs) -> Result<Outcome> {
    runtime(1)?.block_on(async move { open(args.source)?.reset(&args.topic).await })?;
    Ok(Outcome::Done)
}

pub(super) fn rm(args: PipeArgs) -> Result<Outcome> {
    runtime(1)?.block_on(async move { open(args.source)?.remove(&args.topic).await })?;
    Ok(Outcome::Done)
}

pub(super) fn ls(args: LsArgs) -> Result<Outcome> {
    let pipes = runtime(1)?.block_on(async move { open(args.source)?.list().await })?;
    let mut text = String::new();
    for (name, info) in pipes {
        if args.long {
            let bytes = info
                .bytes
                .map_or_else(|| "-".to_owned(), |bytes| bytes.to_string());
            let modified = humantime::format_rfc3339_seconds(info.modified);
            text += &format!("{:>12} {bytes:>14} {modified} ", info.count);
        }
        text += &format!("{name}\n");
    }
    let mut output = Output::new(Frame::Line, None);
    let written = output.stdout.write_all(text.as_bytes());
    output.check(written)?;
    output.flush()?;
    Ok(Outcome::Done)
}
