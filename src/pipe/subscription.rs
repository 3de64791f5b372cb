//! The read modes: where a read ends, and when it waits.

use std::sync::Arc;

use crate::backend::{Backend, Floor, Limit, Source, Start};
use crate::error::Result;
use crate::message::{Message, Position};
use crate::name::PipeName;
use crate::selector::Mode;

/// A source read in a mode.
pub struct Subscription {
    source: Box<dyn Source>,
    mode: Mode,
    /// The pinned end of this round; none in `follow`.
    end: Option<Position>,
    /// Whether this round may end: in `drain` the first one delivers something before.
    may_end: bool,
    /// Received, but the end was not pinned yet.
    held: Vec<Message>,
}

/// What there is to read now.
#[derive(Debug)]
pub enum Step {
    /// These, at least one.
    Messages(Vec<Message>),
    /// The end of this round; [`Subscription::restart`] begins another.
    End,
    /// Nothing; [`Subscription::wait`] for it.
    Wait,
}

impl Subscription {
    /// Subscribes from the oldest message on, and pins the end where the mode has one.
    ///
    /// # Errors
    /// As for [`Backend::subscribe`].
    pub async fn open(backend: &dyn Backend, pipe: &PipeName, mode: Mode) -> Result<Self> {
        let mut source = backend.subscribe(pipe, Start::Oldest).await?;
        let end = match mode {
            Mode::Follow => None,
            Mode::Drain | Mode::Snapshot => Some(source.end().await?),
        };
        Ok(Subscription {
            source,
            mode,
            end,
            may_end: mode == Mode::Snapshot,
            held: Vec::new(),
        })
    }

    /// Where the pipe starts, for discarding what was fetched before a reset.
    pub fn floor(&self) -> Arc<dyn Floor> {
        self.source.floor()
    }

    /// What there is now, about `max_bytes` of it. Never waits for a push.
    ///
    /// # Errors
    /// As for [`Source::next`].
    pub async fn ready(&mut self, max_bytes: usize) -> Result<Step> {
        if !self.held.is_empty() {
            return self.pin_behind_held().await;
        }
        let messages = self
            .source
            .next(Limit {
                max_bytes,
                before: Some(self.end.unwrap_or(Position::MAX)),
            })
            .await?;
        if !messages.is_empty() {
            self.may_end = true;
            Ok(Step::Messages(messages))
        } else if self.may_end() {
            Ok(Step::End)
        } else {
            Ok(Step::Wait)
        }
    }

    /// Whether this mode has to know if there is something now, or may wait at once.
    pub fn has_end(&self) -> bool {
        self.mode != Mode::Follow
    }

    /// Whether this round ends once there is nothing more to deliver.
    pub fn may_end(&self) -> bool {
        self.end.is_some() && self.may_end
    }

    /// Waits for the next messages. Dropping the future loses nothing.
    ///
    /// # Errors
    /// As for [`Source::next`].
    pub async fn wait(&mut self, max_bytes: usize) -> Result<Step> {
        if self.held.is_empty() {
            self.held = self
                .source
                .next(Limit {
                    max_bytes,
                    before: None,
                })
                .await?;
        }
        self.pin_behind_held().await
    }

    async fn pin_behind_held(&mut self) -> Result<Step> {
        if self.mode != Mode::Follow {
            self.end = Some(self.source.end().await?);
        }
        self.may_end = true;
        Ok(Step::Messages(std::mem::take(&mut self.held)))
    }

    /// Begins another round behind what was delivered: the end is pinned afresh, and an empty round ends
    /// at once; in `drain` not, where somebody still `waits` for a first message, as a reset dropped what came.
    ///
    /// # Errors
    /// As for [`Source::end`].
    pub async fn restart(&mut self, waits: bool) -> Result<()> {
        self.may_end = self.mode == Mode::Snapshot || !waits;
        if self.mode != Mode::Follow {
            self.end = Some(self.source.end().await?);
        }
        Ok(())
    }
}
