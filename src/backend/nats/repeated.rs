//! What became of a push: for one that is repeated, and for one that found no room.

use std::sync::Arc;

use super::Stream;
use super::answers::{Outcome, went_away};
use super::push::Push;
use super::search::{Search, search};
use crate::error::{Error, Result};

impl Push {
    /// Looks for this push's last message that is stored.
    pub(super) async fn search(&self) -> Result<(Arc<Stream>, Search)> {
        self.shared.forget(&self.pipe);
        let stream = self.shared.stream(&self.link, &self.pipe).await?;
        let Some(info) = self.link.info(&stream.name).await? else {
            return Ok((stream, Search::Nowhere));
        };
        let tried = self.turn.tried();
        let since = tried.since(info.epoch()?);
        let _turn = self.shared.searches.acquire().await;
        let line = self.shared.own_line();
        let count = self.batch.messages().len();
        let found = search(&line, &info, &self.name, count, since, tried.apart).await?;
        Ok((stream, found))
    }

    /// Whether the server still knows by itself what the tries before have stored. Of a batch it may have kept the first
    /// messages when it was killed, and does not know them.
    pub(super) fn is_remembered(&self, stream: &Stream) -> bool {
        let tried = self.turn.tried();
        let is_fresh = |first| stream.remembers_since(first);
        tried.first.is_some_and(is_fresh) && !tried.any_whole()
    }

    /// What has failed, of the messages from `next` on, as the server has no room: of a batch it keeps those that fitted in.
    pub(super) async fn full(&self, error: Error, next: usize) -> Error {
        match self.search().await {
            Ok((_, search)) => match search.found() {
                Some(found) => error.stored(found.index + 1),
                None => self.failed(error, next),
            },
            Err(unknown) => {
                log::debug!("what is stored of a push that found no room: {unknown}");
                error.maybe_applied()
            }
        }
    }

    /// Stores those messages that are missing among others that are stored.
    pub(super) async fn fill(&self, stream: &Stream, missing: Vec<usize>) -> Result<()> {
        for index in missing {
            let stored = self.store_one(stream, index).await;
            if let Outcome::Elsewhere = stored.map_err(Error::maybe_applied)? {
                return went_away(stream, false).map(drop);
            }
        }
        Ok(())
    }
}
