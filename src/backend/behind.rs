//! Readers that were too slow for what a broker retains: what they have missed is counted and logged.

use std::time::{Duration, Instant};

use crate::metrics;
use crate::name::PipeName;

/// How long a reader's next gaps are gathered for one line in the log.
const GATHERED: Duration = Duration::from_secs(10);

/// What one reader has missed.
pub(super) struct Behind {
    pipe: PipeName,
    /// Messages that were not logged yet, and when some were last.
    untold: u64,
    told: Option<Instant>,
}

impl Behind {
    pub(super) fn new(pipe: PipeName) -> Self {
        Behind {
            pipe,
            untold: 0,
            told: None,
        }
    }

    /// Notes that so many messages were gone before the reader came to them.
    pub(super) fn missed(&mut self, count: u64) {
        if count == 0 {
            return;
        }
        metrics::MISSED.add(count);
        self.untold = self.untold.saturating_add(count);
        if self.told.is_none_or(|told| told.elapsed() > GATHERED) {
            self.tell();
            self.told = Some(Instant::now());
        }
    }

    fn tell(&mut self) {
        let count = std::mem::take(&mut self.untold);
        log::warn!(
            "{}: a reader fell behind: {count} messages were dropped from the broker's stream before it came to them",
            self.pipe
        );
    }
}

impl Drop for Behind {
    fn drop(&mut self) {
        if self.untold > 0 {
            self.tell();
        }
    }
}
