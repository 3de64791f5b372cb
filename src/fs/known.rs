//! What is known of the pipes, for when the backend is slow or away.

use std::collections::HashMap;
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::watch;

use crate::backend::{Backend, PipeInfo};
use crate::error::{Error, Kind, Result};
use crate::name::PipeName;

/// Metadata that takes longer is answered from what is known.
const METADATA: Duration = Duration::from_secs(1);

/// A list may take so long where none was ever complete, nor waited for in vain.
const FIRST_LIST: Duration = Duration::from_secs(5);

/// A backend, and the last known state of its pipes.
pub(super) struct Known {
    backend: Arc<dyn Backend>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    pipes: HashMap<PipeName, PipeInfo>,
    /// The number of the newest list that was made; 0 for none.
    listed: u64,
    /// Whether somebody has waited for one in vain.
    is_late: bool,
    /// The list that was begun last, until it is made.
    listing: Option<Listing>,
    /// How many were begun.
    lists: u64,
    /// What was learned of single pipes since one was begun; nothing of those that are gone.
    learned: HashMap<PipeName, Option<PipeInfo>>,
    /// When one of them changed last.
    newest: Option<SystemTime>,
    /// When a question stayed without an answer last.
    silent: Option<Instant>,
}

/// A list that is being made.
struct Listing {
    number: u64,
    began: Instant,
    end: watch::Receiver<Option<Listed>>,
}

/// How a list ended: made, or why not.
type Listed = std::result::Result<(), (Kind, String)>;

impl State {
    /// Whether the backend has just let somebody wait in vain: the next ones need not.
    fn is_silent(&self) -> bool {
        self.silent.is_some_and(|since| since.elapsed() < METADATA)
    }

    fn learn(&mut self, pipe: &PipeName, info: Option<PipeInfo>) {
        self.silent = None;
        if self.listing.is_some() {
            self.learned.insert(pipe.clone(), info);
        }
        self.newest = self.newest.max(info.map(|info| info.modified));
        match info {
            Some(info) => self.pipes.insert(pipe.clone(), info),
            None => self.pipes.remove(pipe),
        };
    }

    fn end_listing(&mut self, number: u64, listed: &Result<Vec<(PipeName, PipeInfo)>>) {
        if let Ok(listed) = listed
            && number > self.listed
        {
            self.pipes = listed.iter().cloned().collect();
            let newest = listed.iter().map(|(_, info)| info.modified).max();
            self.newest = self.newest.max(newest);
            self.listed = number;
            for (pipe, info) in self.learned.clone() {
                self.learn(&pipe, info);
            }
        }
        if let Some(listing) = &self.listing
            && listing.number == number
        {
            self.listing = None;
            self.learned.clear();
        }
    }
}

impl Known {
    pub(super) fn new(backend: Arc<dyn Backend>) -> Self {
        Known {
            backend,
            state: Mutex::default(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the backend says of `pipe`, or what is known where it takes longer than a second.
    pub(super) async fn info(&self, pipe: &PipeName) -> Result<PipeInfo> {
        {
            let state = self.state();
            if let Some(info) = state.pipes.get(pipe)
                && state.is_silent()
            {
                return Ok(*info);
            }
        }
        let asked = within(METADATA, self.backend.stat(pipe)).await;
        let mut state = self.state();
        match asked {
            Ok(info) => {
                state.learn(pipe, Some(info));
                Ok(info)
            }
            Err(error) if error.kind() == Kind::NotFound => {
                state.learn(pipe, None);
                Err(error)
            }
            Err(error) => {
                if matches!(error.kind(), Kind::TimedOut | Kind::Unreachable) {
                    state.silent = Some(Instant::now());
                }
                match state.pipes.get(pipe) {
                    Some(info) => {
                        log::debug!("{error}; answering with what was known");
                        Ok(*info)
                    }
                    None => Err(error),
                }
            }
        }
    }

    /// What the backend says of a pipe that it has just made; it is empty, where the backend says nothing for a second.
    ///
    /// # Errors
    /// `NotFound` where it is gone already, and what else the backend says.
    pub(super) async fn made(&self, pipe: &PipeName) -> Result<PipeInfo> {
        match self.info(pipe).await {
            Err(error) if matches!(error.kind(), Kind::TimedOut | Kind::Unreachable) => {
                log::debug!("{pipe} is made; {error}");
                let empty = PipeInfo {
                    count: 0,
                    bytes: Some(0),
                    first: None,
                    last: None,
                    modified: SystemTime::now(),
                };
                let mut state = self.state();
                // It says no more to others now.
                let silent = state.silent;
                state.learn(pipe, Some(empty));
                state.silent = silent;
                Ok(empty)
            }
            answer => answer,
        }
    }

    /// Whether the backend has just let somebody wait in vain.
    pub(super) fn is_silent(&self) -> bool {
        self.state().is_silent()
    }

    /// Notes that the pipe is gone.
    pub(super) fn forget(&self, pipe: &PipeName) {
        self.state().learn(pipe, None);
    }

    /// When a pipe that was known changed last.
    pub(super) fn newest(&self) -> Option<SystemTime> {
        self.state().newest
    }

    /// The pipes there are, in the order of their names, or those that are known where a list takes longer than a second.
    pub(super) async fn list(self: &Arc<Self>) -> Result<Vec<(PipeName, PipeInfo)>> {
        let (mut listing, patience) = {
            let mut state = self.state();
            let patience = match (state.listed > 0, state.is_silent()) {
                (true, true) => Duration::ZERO,
                (false, false) if !state.is_late => FIRST_LIST,
                _ => METADATA,
            };
            (self.join_listing(&mut state), patience)
        };
        let listed = within(patience, async {
            let ended = listing.wait_for(Option::is_some).await;
            match ended.as_deref() {
                Ok(Some(Err((kind, why)))) => Err(Error::new(*kind, why.clone())),
                Ok(_) => Ok(()),
                Err(_) => Err(Error::new(Kind::Io, "the list was given up")),
            }
        })
        .await;
        let mut state = self.state();
        if let Err(error) = listed {
            let is_away = matches!(error.kind(), Kind::TimedOut | Kind::Unreachable);
            state.is_late |= is_away;
            // Of a store that is away it is known, too, that it held nothing.
            if state.pipes.is_empty() && !(is_away && state.listed > 0) {
                return Err(error);
            }
            match state.listed > 0 {
                true => log::debug!("{error}; listing what was known"),
                false => log::warn!("{error}; listing the pipes that were used here"),
            }
        }
        let pipes = state.pipes.iter();
        let mut pipes: Vec<_> = pipes.map(|(pipe, info)| (pipe.clone(), *info)).collect();
        pipes.sort_by(|one, other| one.0.cmp(&other.0));
        Ok(pipes)
    }

    /// Begins a list, which goes on where nobody waits for it. One that takes longer than others wait is joined instead,
    /// as they would make no more of another.
    fn join_listing(self: &Arc<Self>, state: &mut State) -> watch::Receiver<Option<Listed>> {
        match &state.listing {
            // Unless it was given up.
            Some(listing) if listing.end.has_changed().is_ok() => {
                if listing.began.elapsed() > METADATA {
                    return listing.end.clone();
                }
            }
            _ => state.learned.clear(),
        }
        state.lists += 1;
        let number = state.lists;
        let (ended, end) = watch::channel(None);
        state.listing = Some(Listing {
            number,
            began: Instant::now(),
            end: end.clone(),
        });
        let known = Arc::clone(self);
        tokio::spawn(async move {
            let listed = known.backend.list().await;
            known.state().end_listing(number, &listed);
            let listed = listed.map(drop);
            ended.send_replace(Some(
                listed.map_err(|error| (error.kind(), error.to_string())),
            ));
        });
        end
    }
}

/// What does not end in time is an error.
async fn within<T>(time: Duration, work: impl Future<Output = Result<T>>) -> Result<T> {
    match tokio::time::timeout(time, work).await {
        Ok(result) => result,
        Err(_) => Err(Error::new(
            Kind::TimedOut,
            format!("the backend did not answer within {time:?}"),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::memory::Memory;
    use crate::backend::{Caps, Fut, Source, Start};
    use crate::message::{Batch, Position, PushId};

    /// Says nothing of its pipes.
    struct Mute(Memory);

    impl Backend for Mute {
        fn caps(&self) -> Caps {
            self.0.caps()
        }

        fn push<'a>(&'a self, pipe: &'a PipeName, id: PushId, batch: Batch) -> Fut<'a, Position> {
            self.0.push(pipe, id, batch)
        }

        fn subscribe<'a>(&'a self, pipe: &'a PipeName, start: Start) -> Fut<'a, Box<dyn Source>> {
            self.0.subscribe(pipe, start)
        }

        fn stat<'a>(&'a self, _pipe: &'a PipeName) -> Fut<'a, PipeInfo> {
            Box::pin(std::future::pending())
        }

        fn list(&self) -> Fut<'_, Vec<(PipeName, PipeInfo)>> {
            Box::pin(std::future::pending())
        }

        fn create<'a>(&'a self, pipe: &'a PipeName) -> Fut<'a, bool> {
            self.0.create(pipe)
        }

        fn reset<'a>(&'a self, pipe: &'a PipeName) -> Fut<'a, ()> {
            self.0.reset(pipe)
        }

        fn remove<'a>(&'a self, pipe: &'a PipeName) -> Fut<'a, ()> {
            self.0.remove(pipe)
        }

        fn sync<'a>(&'a self, pipe: &'a PipeName) -> Fut<'a, ()> {
            self.0.sync(pipe)
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_pipe_that_was_made_is_there_although_nobody_says_how_full_it_is() {
        let known = Known::new(Arc::new(Mute(Memory::new(1 << 20))));
        let pipe = PipeName::new("topic").expect("legal");
        let unknown = known.info(&pipe).await.expect_err("silence");
        assert_eq!(unknown.kind(), Kind::TimedOut);
        assert_eq!(known.made(&pipe).await.expect("made").count, 0);
        assert_eq!(known.info(&pipe).await.expect("known").count, 0);
    }

    #[tokio::test(start_paused = true)]
    async fn only_the_first_list_of_a_backend_that_says_nothing_is_waited_for_longer() {
        let known = Arc::new(Known::new(Arc::new(Mute(Memory::new(1 << 20)))));
        for patience in [FIRST_LIST, METADATA, METADATA] {
            let since = tokio::time::Instant::now();
            let error = known.list().await.expect_err("silence");
            assert_eq!(error.kind(), Kind::TimedOut);
            assert_eq!(since.elapsed().as_secs(), patience.as_secs());
        }
    }
}
