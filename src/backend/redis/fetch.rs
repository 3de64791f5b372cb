//! A range of a stream's entries, about as many bytes of it as the caller wants.

use std::sync::Arc;

use super::client::Client;
use super::entry;
use super::keys::Keys;
use super::scripts;
use super::{Look, look};
use crate::backend::{Limit, weight};
use crate::error::Result;
use crate::message::{Message, Position};
use crate::name::PipeName;

/// As many entries must fit into one answer for XRANGE to be asked for a number of them; otherwise a script
/// looks at their sizes.
const FEW: usize = 64;

/// As many entries are looked at by themselves in one request; longer it would keep the server from others.
const MANY: usize = 1024;

/// What is known of how large the messages are.
#[derive(Clone, Copy)]
pub(super) enum Sizes {
    /// Nobody has asked.
    Unasked,
    /// It cannot be told.
    Untold,
    /// Those up to `newest` have `largest` bytes at most.
    UpTo { newest: Position, largest: usize },
}

/// What to ask for.
pub(super) struct Fetch {
    pub(super) client: Arc<Client>,
    pub(super) pipe: PipeName,
    pub(super) keys: Keys,
    pub(super) after: Position,
    pub(super) limit: Limit,
    pub(super) sizes: Sizes,
    /// Whether to look at the pipe as well.
    pub(super) is_due: bool,
}

/// What came.
pub(super) struct Fetched {
    pub(super) messages: Vec<Message>,
    /// A look at the pipe, made behind them.
    pub(super) look: Option<Look>,
    /// Whether the sizes are not known, or not any more.
    pub(super) is_unknown: bool,
}

impl Fetch {
    /// What there is now behind `after` and before the limit.
    pub(super) async fn run(mut self) -> Result<Fetched> {
        let before = self.limit.before.unwrap_or(Position::MAX);
        if let Sizes::UpTo { newest, largest } = self.sizes
            && self.after < newest
        {
            let to = newest.min(before.before()).to_string();
            let messages = self.of_known(&to, largest).await?;
            if !messages.is_empty() {
                return Ok(Fetched {
                    messages,
                    look: None,
                    is_unknown: false,
                });
            }
            // Dropped meanwhile.
            self.sizes = Sizes::Untold;
        }
        let to = match before {
            Position::MAX => "+".to_owned(),
            before => format!("({before}"),
        };
        let most = match self.sizes {
            Sizes::Untold => MANY,
            // Behind these it is asked.
            Sizes::Unasked | Sizes::UpTo { .. } => FEW,
        };
        let messages = self.by_size(&to, 1, most).await?;
        let look = if messages.len() >= FEW || self.is_due {
            Some(look(&self.client, &self.client.fetches, &self.pipe, &self.keys).await?)
        } else {
            None
        };
        Ok(Fetched {
            messages,
            look,
            is_unknown: !matches!(self.sizes, Sizes::UpTo { .. }),
        })
    }

    fn from(&self) -> String {
        match self.after {
            Position::MIN => "-".to_owned(),
            after => format!("({after}"),
        }
    }

    /// What there is of a range in which no message has more than `largest` bytes.
    async fn of_known(&self, to: &str, largest: usize) -> Result<Vec<Message>> {
        let bytes = self.limit.max_bytes;
        // As many as certainly fit.
        let step = (bytes / (largest + weight(&[]))).max(1);
        if step < FEW {
            return self.by_size(to, step, usize::MAX).await;
        }
        let stream = &self.keys.stream;
        let mut range = redis::cmd("XRANGE");
        range
            .arg(stream)
            .arg(self.from())
            .arg(to)
            .arg("COUNT")
            .arg(step);
        let reading = || format!("reading {stream}");
        let under_way = largest.saturating_add(bytes);
        let found = self
            .client
            .call(&self.client.fetches, reading, under_way, &range);
        entry::messages(found.await?)
    }

    /// What there is of a range, and `most` entries at most, `step` of which certainly fit.
    async fn by_size(&self, to: &str, step: usize, most: usize) -> Result<Vec<Message>> {
        let (stream, from) = (&self.keys.stream, self.from());
        let bytes = self.limit.max_bytes;
        let largest = match self.sizes {
            Sizes::UpTo { largest, .. } => largest,
            Sizes::Unasked | Sizes::Untold => 0,
        };
        let found = self.client.run(
            &self.client.fetches,
            || format!("reading {stream}"),
            &scripts::FETCH,
            [stream],
            largest.saturating_add(bytes),
            |script| {
                script.arg(&from).arg(to).arg(bytes).arg(step).arg(most);
            },
        );
        entry::messages(found.await?)
    }
}
