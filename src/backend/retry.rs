//! The only retry loop: an unreachable backend is tried again, with backoff, until a deadline.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::time::Instant;

use super::{Backend, Caps, Floor, Fut, Limit, PipeInfo, Source, Start};
use crate::error::{Applied, Error, Kind, Result};
use crate::message::{Batch, Message, Position, PushId};
use crate::name::PipeName;

/// The first pause after a failure; it doubles up to [`LONGEST`].
const SHORTEST: Duration = Duration::from_millis(10);
/// The longest pause between two tries.
const LONGEST: Duration = Duration::from_secs(1);

/// A failure so long after the last one is another outage: no try takes as long to fail.
const CALM: Duration = Duration::from_secs(20);

/// A deadline is noticed so soon, unless this program was stopped, and then put off by so much.
const LATE: Duration = Duration::from_millis(250);
const AGAIN: Duration = Duration::from_secs(5);

/// A backend whose calls are repeated while it is unreachable. A push is repeated with its own identity,
/// so that a repeat of one that had arrived is stored once; a source resumes after the last message that
/// it delivered.
#[derive(Clone)]
pub struct Retry {
    inner: Arc<dyn Backend>,
    timeout: Option<Duration>,
    /// Whether who waits for a push is told that the backend cannot be reached.
    waits_for_ever: bool,
}

impl Retry {
    /// Retries until `timeout` has passed since the call; `None` retries for ever.
    pub fn new(inner: Arc<dyn Backend>, timeout: Option<Duration>) -> Self {
        Retry {
            inner,
            timeout,
            waits_for_ever: false,
        }
    }

    /// Has who waits for a push ([`Limit::before`] is nothing) wait for ever, also while the backend cannot be reached.
    pub fn waiting_for_ever(self) -> Self {
        Retry {
            waits_for_ever: true,
            ..self
        }
    }

    async fn run<T, F>(
        &self,
        what: &str,
        pipe: Option<&PipeName>,
        mut call: impl FnMut() -> F,
    ) -> Result<T>
    where
        F: Future<Output = Result<T>>,
    {
        let began = Instant::now();
        let mut deadline = Deadline::new(self.timeout);
        let mut outage: Option<Outage> = None;
        loop {
            let Some(result) = deadline.keep(call()).await else {
                return Err(Outage::expired(outage, what, pipe, self.timeout));
            };
            match result {
                Err(error) if error.kind() == Kind::Unreachable => {
                    let current = outage.get_or_insert_with(|| Outage::since(began));
                    let Some(pause) = current.pause_within(deadline.left()) else {
                        current.cause = Some(error);
                        return Err(Outage::expired(outage, what, pipe, self.timeout));
                    };
                    current.wait(pause, error, what, pipe).await;
                }
                Ok(value) => {
                    if let Some(outage) = outage {
                        log::info!(
                            "{what}{}: reachable again after {:.1?}",
                            named(pipe),
                            outage.since.elapsed()
                        );
                    }
                    return Ok(value);
                }
                // One that knows what is stored has looked.
                Err(error) if matches!(error.applied(), Applied::Part(_)) => return Err(error),
                // What became of an earlier try is not known by others.
                Err(error) => {
                    return Err(match outage {
                        Some(outage) if outage.is_doubtful() => error.maybe_applied(),
                        _ => error,
                    });
                }
            }
        }
    }
}

fn named(pipe: Option<&PipeName>) -> String {
    pipe.map_or_else(String::new, |pipe| format!(" {pipe}"))
}

/// When to give up. It is put off where nothing could be done until it had passed, as this program was stopped meanwhile
/// (SIGSTOP, a machine that is paused): what it waited for may be there.
pub(crate) struct Deadline {
    timeout: Option<Duration>,
    at: Option<Instant>,
}

impl Deadline {
    /// After `timeout` from now on; `None` is never.
    pub(crate) fn new(timeout: Option<Duration>) -> Self {
        Deadline {
            timeout,
            // One that is behind all time is none.
            at: timeout.and_then(|timeout| Instant::now().checked_add(timeout)),
        }
    }

    /// What comes of `attempt`; nothing at the deadline.
    pub(crate) async fn keep<T>(&mut self, attempt: impl Future<Output = T>) -> Option<T> {
        let mut attempt = pin!(attempt);
        loop {
            let Some(at) = self.at else {
                return Some(attempt.await);
            };
            let kept = tokio::time::timeout_at(at, &mut attempt).await.ok();
            if at.elapsed() > LATE {
                let again = self.timeout.unwrap_or(AGAIN).min(AGAIN);
                self.at = Some(Instant::now() + again);
            } else if kept.is_none() {
                return None;
            }
            if kept.is_some() {
                return kept;
            }
        }
    }

    /// How long it is until then.
    fn left(&self) -> Option<Duration> {
        self.at
            .map(|at| at.saturating_duration_since(Instant::now()))
    }
}

struct Outage {
    since: Instant,
    /// When it was noticed last.
    last: Instant,
    pause: Duration,
    cause: Option<Error>,
    /// Whether it is that of an earlier call.
    is_earlier: bool,
}

impl Outage {
    fn since(since: Instant) -> Self {
        Outage {
            since,
            last: Instant::now(),
            pause: SHORTEST,
            cause: None,
            is_earlier: false,
        }
    }

    /// Whether a try that failed may have been done all the same.
    fn is_doubtful(&self) -> bool {
        let cause = self.cause.as_ref();
        cause.is_some_and(|cause| cause.applied() != Applied::No)
    }

    /// How long to wait before the next try where so much time is left: tries come closer together before the end, which
    /// none is given up long before. Nothing where it is over.
    fn pause_within(&self, left: Option<Duration>) -> Option<Duration> {
        match left {
            Some(left) => (left > SHORTEST).then(|| self.pause.min(left / 2)),
            None => Some(self.pause),
        }
    }

    async fn wait(&mut self, pause: Duration, error: Error, what: &str, pipe: Option<&PipeName>) {
        if self.cause.is_none() {
            log::warn!("{what}{}: {error}; trying again", named(pipe));
        }
        // Once in doubt, in doubt: a later clean failure does not tell what became of an earlier try.
        self.cause = Some(match self.is_doubtful() {
            true => error.maybe_applied(),
            false => error,
        });
        tokio::time::sleep(pause).await;
        self.last = Instant::now();
        self.pause = (self.pause * 2).min(LONGEST);
    }

    fn expired(
        outage: Option<Outage>,
        what: &str,
        pipe: Option<&PipeName>,
        timeout: Option<Duration>,
    ) -> Error {
        let timeout = timeout.unwrap_or_default();
        let context = format!("{what}{}: no answer within {timeout:?}", named(pipe));
        let error = Error::new(Kind::TimedOut, context).maybe_applied();
        match outage.and_then(|outage| outage.cause) {
            Some(cause) => error.caused_by(cause),
            None => error,
        }
    }
}

impl Backend for Retry {
    fn caps(&self) -> Caps {
        self.inner.caps()
    }

    fn push<'a>(&'a self, pipe: &'a PipeName, id: PushId, batch: Batch) -> Fut<'a, Position> {
        Box::pin(async move {
            let mut id = id;
            self.run("pushing to", Some(pipe), || {
                let tried = self.inner.push(pipe, id, batch.clone());
                id = id.again();
                tried
            })
            .await
        })
    }

    fn subscribe<'a>(&'a self, pipe: &'a PipeName, start: Start) -> Fut<'a, Box<dyn Source>> {
        Box::pin(async move {
            let source = self
                .run("opening", Some(pipe), || self.inner.subscribe(pipe, start))
                .await?;
            Ok(Box::new(Resuming {
                floor: source.floor(),
                retry: self.clone(),
                pipe: pipe.clone(),
                start,
                source: Some(source),
                outage: None,
            }) as Box<dyn Source>)
        })
    }

    fn stat<'a>(&'a self, pipe: &'a PipeName) -> Fut<'a, PipeInfo> {
        Box::pin(async move {
            self.run("looking at", Some(pipe), || self.inner.stat(pipe))
                .await
        })
    }

    fn list(&self) -> Fut<'_, Vec<(PipeName, PipeInfo)>> {
        Box::pin(async move { self.run("listing", None, || self.inner.list()).await })
    }

    fn create<'a>(&'a self, pipe: &'a PipeName) -> Fut<'a, bool> {
        Box::pin(async move {
            let doubtful = AtomicBool::new(false);
            let create = || async {
                let created = self.inner.create(pipe).await;
                if let Err(error) = &created
                    && error.applied() != Applied::No
                {
                    doubtful.store(true, Ordering::Relaxed);
                }
                created
            };
            let created = self.run("creating", Some(pipe), create).await?;
            if !created && doubtful.into_inner() {
                let why = format!("{pipe} exists; perhaps an earlier try has made it");
                return Err(Error::new(Kind::AlreadyExists, why).maybe_applied());
            }
            Ok(created)
        })
    }

    fn reset<'a>(&'a self, pipe: &'a PipeName) -> Fut<'a, ()> {
        Box::pin(async move {
            self.run("resetting", Some(pipe), || self.inner.reset(pipe))
                .await
        })
    }

    fn remove<'a>(&'a self, pipe: &'a PipeName) -> Fut<'a, ()> {
        Box::pin(async move {
            let removed = self.run("removing", Some(pipe), || self.inner.remove(pipe));
            match removed.await {
                // An earlier try may have done it.
                Err(error)
                    if error.kind() == Kind::NotFound && error.applied() == Applied::Unknown =>
                {
                    Ok(())
                }
                result => result,
            }
        })
    }

    fn sync<'a>(&'a self, pipe: &'a PipeName) -> Fut<'a, ()> {
        Box::pin(async move {
            self.run("syncing", Some(pipe), || self.inner.sync(pipe))
                .await
        })
    }
}

/// A source that is made anew, behind the last message delivered, when its backend was unreachable.
struct Resuming {
    retry: Retry,
    pipe: PipeName,
    start: Start,
    source: Option<Box<dyn Source>>,
    floor: Arc<dyn Floor>,
    /// The last one. A connection may be cut again and again, and bring a little each time: that is one outage.
    outage: Option<Outage>,
}

impl Resuming {
    async fn source(&mut self) -> Result<&mut Box<dyn Source>> {
        let source = match self.source.take() {
            Some(source) => source,
            None => {
                let again = self.retry.inner.subscribe(&self.pipe, self.start);
                again.await?
            }
        };
        Ok(self.source.insert(source))
    }

    /// Makes `call` of the source. What is not for a push to wait for has a deadline.
    async fn tried<T>(
        &mut self,
        deadline: &mut Option<Deadline>,
        call: impl for<'a> FnOnce(&'a mut Box<dyn Source>) -> Fut<'a, T>,
    ) -> Result<T> {
        let (pipe, timeout) = (self.pipe.clone(), self.retry.timeout);
        let tried = async { call(self.source().await?).await };
        let kept = match deadline {
            None => return tried.await,
            Some(deadline) => deadline.keep(tried).await,
        };
        kept.unwrap_or_else(|| {
            let outage = self.outage.take_if(|outage| !outage.is_earlier);
            Err(Outage::expired(outage, "reading", Some(&pipe), timeout))
        })
    }

    /// A call has its own time, also in an outage that an earlier one has noticed.
    fn begin(&mut self) {
        if let Some(outage) = &mut self.outage {
            outage.is_earlier = true;
        }
    }

    fn deadline(&self) -> Option<Deadline> {
        Some(Deadline::new(self.retry.timeout))
    }

    /// Notes a failed call. The source is dropped if its backend was unreachable; past the deadline, or
    /// for any other failure, the error is the caller's.
    async fn failed(&mut self, error: Error, deadline: &Option<Deadline>) -> Result<()> {
        if error.kind() != Kind::Unreachable {
            return Err(error);
        }
        self.source = None;
        // Long ago it worked again.
        self.outage.take_if(|outage| outage.last.elapsed() > CALM);
        let current = self
            .outage
            .get_or_insert_with(|| Outage::since(Instant::now()));
        let timeout = self.retry.timeout;
        if std::mem::take(&mut current.is_earlier) {
            current.since = Instant::now();
        }
        let left = match deadline {
            Some(deadline) => deadline.left(),
            None if self.retry.waits_for_ever => None,
            None => timeout.map(|time| time.saturating_sub(current.since.elapsed())),
        };
        let Some(pause) = current.pause_within(left) else {
            current.cause = Some(error);
            let outage = self.outage.take();
            return Err(Outage::expired(
                outage,
                "reading",
                Some(&self.pipe),
                timeout,
            ));
        };
        current
            .wait(pause, error, "reading", Some(&self.pipe))
            .await;
        Ok(())
    }
}

impl Source for Resuming {
    fn next(&mut self, limit: Limit) -> Fut<'_, Vec<Message>> {
        Box::pin(async move {
            self.begin();
            let mut deadline = limit.before.and_then(|_| self.deadline());
            loop {
                let tried = self.tried(&mut deadline, |source| source.next(limit));
                match tried.await {
                    Ok(messages) => {
                        if let Some(last) = messages.last() {
                            self.start = Start::After(last.position);
                        }
                        return Ok(messages);
                    }
                    Err(error) => self.failed(error, &deadline).await?,
                }
            }
        })
    }

    fn floor(&self) -> Arc<dyn Floor> {
        Arc::clone(&self.floor)
    }

    fn end(&mut self) -> Fut<'_, Position> {
        Box::pin(async move {
            self.begin();
            let mut deadline = self.deadline();
            loop {
                let tried = self.tried(&mut deadline, |source| source.end());
                match tried.await {
                    Ok(end) => return Ok(end),
                    Err(error) => self.failed(error, &deadline).await?,
                }
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::memory::Memory;

    #[tokio::test(start_paused = true)]
    async fn what_an_earlier_try_has_stored_stays_in_doubt() {
        let unreachable = || Error::new(Kind::Unreachable, "gone");
        for (first, is_doubtful) in [
            (unreachable(), false),
            (unreachable().stored(2), true),
            (unreachable().maybe_applied(), true),
        ] {
            let mut outage = Outage::since(Instant::now());
            outage.wait(SHORTEST, first, "pushing", None).await;
            outage.wait(SHORTEST, unreachable(), "pushing", None).await;
            assert_eq!(outage.is_doubtful(), is_doubtful);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_away_is_tried_until_the_deadline() {
        for seconds in [0, 1, 2, 30] {
            let timeout = Duration::from_secs(seconds);
            let retry = Retry::new(Arc::new(Memory::new(1 << 20)), Some(timeout));
            let (began, mut tries) = (Instant::now(), 0);
            let away = || {
                tries += 1;
                async { Err::<(), _>(Error::new(Kind::Unreachable, "gone")) }
            };
            let error = retry.run("looking", None, away).await.expect_err("away");
            assert_eq!(error.kind(), Kind::TimedOut);
            let took = began.elapsed();
            assert!(took <= timeout && took + SHORTEST >= timeout, "{took:?}");
            assert!(tries > seconds && tries < 2 * seconds + 12, "{tries}");
        }
    }
}
