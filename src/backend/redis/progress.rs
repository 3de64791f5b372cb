//! Whether entries were trimmed before a reader came to them. Their ids do not tell, but the server counts what was ever
//! added to a stream.

use super::Look;
use crate::backend::behind::Behind;
use crate::message::{Message, Position};
use crate::name::PipeName;

/// After so many entries it is looked again.
const OFTEN: u64 = 64;

/// How far a reader is.
pub(super) struct Progress {
    behind: Behind,
    /// How many entries were ever added up to where it is, once that is known.
    read: Option<u64>,
    /// Of a reader that began with the oldest entry, its first.
    first: Option<Position>,
    is_from_oldest: bool,
    /// Entries that came since it began, and since the last look.
    came: u64,
    unlooked: u64,
    /// Where it was at the last look.
    looked: Position,
}

impl Progress {
    /// Of a reader that begins behind `after`.
    pub(super) fn new(pipe: PipeName, after: Position) -> Self {
        Progress {
            behind: Behind::new(pipe),
            read: None,
            first: None,
            is_from_oldest: after == Position::MIN,
            came: 0,
            // The first look tells where it begins.
            unlooked: OFTEN,
            looked: after,
        }
    }

    /// Notes entries that came.
    pub(super) fn came(&mut self, messages: &[Message]) {
        let count = messages.len() as u64;
        if let Some(first) = messages.first()
            && self.came == 0
            && self.is_from_oldest
        {
            self.first = Some(first.position);
        }
        self.came += count;
        self.unlooked += count;
        self.read = self.read.map(|read| read + count);
    }

    /// Whether it is time to look at the pipe.
    pub(super) fn is_due(&self) -> bool {
        self.unlooked >= OFTEN
    }

    /// Compares what came with what there is, and was. `after` is the last entry that came.
    pub(super) fn compare(&mut self, after: Position, look: &Look) {
        self.unlooked = 0;
        let looked = std::mem::replace(&mut self.looked, after);
        let Some(info) = &look.info else {
            self.read = None;
            return;
        };
        let gone = look.added.saturating_sub(info.count);
        // Where this is known for certain: at the end, and before the oldest that is left.
        let certain = if after >= look.newest {
            Some(look.added)
        } else if info.first.is_none_or(|first| after < first) {
            Some(gone)
        } else if self.first.is_some() && self.first == info.first {
            Some(gone + self.came)
        } else {
            None
        };
        // By a reset, or one by one.
        let is_meant = look.floor > looked || look.deleted > looked;
        match (self.read, certain) {
            (Some(read), Some(certain)) if !is_meant => {
                self.behind.missed(certain.saturating_sub(read));
            }
            (_, None) if is_meant => self.read = None,
            _ => {}
        }
        self.read = certain.or(self.read);
    }
}
