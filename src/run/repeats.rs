//! What was logged lately, so that who fails again and again does not fill the disk with it.

use std::time::{Duration, Instant};

/// What was said within this time is counted only.
const LATELY: Duration = Duration::from_secs(10);

/// So many different lines are known; there is room for each that a few programs can cause by turns.
const MANY: usize = 32;

/// Lines of the log.
pub(super) struct Repeats(Vec<Said>);

struct Said {
    text: String,
    at: Instant,
    /// How often it was to be said since then.
    more: u64,
}

/// What is to be done with a line.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Heard {
    /// What is forgotten for it, and how often that was not said.
    pub(super) forgotten: Option<(String, u64)>,
    /// Whether it is to be said, and how often it was not.
    pub(super) say: Option<u64>,
}

impl Repeats {
    pub(super) const fn new() -> Self {
        Repeats(Vec::new())
    }

    /// Takes a line that is to be said `now`.
    pub(super) fn hear(&mut self, text: &str, now: Instant) -> Heard {
        if let Some(said) = self.0.iter_mut().find(|said| said.text == text) {
            let is_lately = now.duration_since(said.at) < LATELY;
            let say = match is_lately {
                true => None,
                false => {
                    said.at = now;
                    Some(std::mem::take(&mut said.more))
                }
            };
            said.more += u64::from(is_lately);
            return Heard {
                forgotten: None,
                say,
            };
        }
        let oldest = (0..self.0.len()).min_by_key(|at| (self.0[*at].more > 0, self.0[*at].at));
        let forgotten = oldest
            .filter(|_| self.0.len() >= MANY)
            .map(|at| self.0.swap_remove(at))
            .filter(|said| said.more > 0);
        self.0.push(Said {
            text: text.to_owned(),
            at: now,
            more: 0,
        });
        Heard {
            forgotten: forgotten.map(|said| (said.text, said.more)),
            say: Some(0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(more: u64) -> Heard {
        Heard {
            forgotten: None,
            say: Some(more),
        }
    }

    const HELD: Heard = Heard {
        forgotten: None,
        say: None,
    };

    #[test]
    fn what_was_said_lately_is_counted() {
        let mut repeats = Repeats::new();
        let start = Instant::now();
        let second = Duration::from_secs(1);
        for text in ["one", "two"] {
            assert_eq!(repeats.hear(text, start), said(0));
        }
        for _ in 0..3 {
            assert_eq!(repeats.hear("one", start + second), HELD);
        }
        assert_eq!(repeats.hear("one", start + LATELY), said(3));
        assert_eq!(repeats.hear("one", start + LATELY + second), HELD);
        assert_eq!(repeats.hear("two", start + LATELY + second), said(0));
    }

    #[test]
    fn what_is_forgotten_is_told_with_its_count() {
        let mut repeats = Repeats::new();
        let now = Instant::now();
        for number in 0..MANY {
            for again in 0..3 {
                let heard = repeats.hear(&number.to_string(), now);
                assert_eq!(heard.say.is_some(), again == 0);
            }
        }
        let forgotten = repeats.hear("new", now).forgotten;
        assert_eq!(forgotten, Some(("0".to_owned(), 2)));
        // Of which there is nothing to tell.
        assert_eq!(repeats.hear("newer", now), said(0));
        assert_eq!(repeats.0.len(), MANY);
    }
}
