//! Failures that clients cause, as fast as they like: the log of them must not fill the disk.

use std::time::{Duration, Instant};

use log::Level;

/// The time within which the same line is said a few times only; the others are counted, and told behind it.
const LATELY: Duration = Duration::from_secs(10);
const TIMES: u64 = 10;

/// So many different lines are said within that time.
const MANY: usize = 32;

/// A line of the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Line {
    pub(super) level: Level,
    pub(super) target: &'static str,
    pub(super) text: String,
}

/// The lines that were said lately.
pub(super) struct Repeats {
    said: Vec<Said>,
    /// How many others there was no room for.
    others: u64,
}

struct Said {
    line: Line,
    since: Instant,
    /// How often it came since then.
    count: u64,
}

impl Repeats {
    pub(super) const fn new() -> Self {
        Repeats {
            said: Vec::new(),
            others: 0,
        }
    }

    /// What is to be written for a line that comes `now`.
    pub(super) fn hear(&mut self, line: Line, now: Instant) -> Vec<Line> {
        let mut out = Vec::new();
        self.said.retain(|said| {
            let is_lately = now.duration_since(said.since) < LATELY;
            if !is_lately && said.count > TIMES {
                let more = said.count - TIMES;
                let text = format!("{} (and {more} times more)", said.line.text);
                out.push(Line {
                    text,
                    ..said.line.clone()
                });
            }
            is_lately
        });
        if let Some(said) = self.said.iter_mut().find(|said| said.line == line) {
            said.count += 1;
            if said.count <= TIMES {
                out.push(line);
            }
            return out;
        }
        if self.said.len() >= MANY {
            self.others += 1;
            return out;
        }
        let others = std::mem::take(&mut self.others);
        if others > 0 {
            out.push(Line {
                level: Level::Warn,
                target: module_path!(),
                text: format!("{others} lines more, as there were too many different ones"),
            });
        }
        out.push(line.clone());
        self.said.push(Said {
            line,
            since: now,
            count: 1,
        });
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn hear(repeats: &mut Repeats, text: &str, now: Instant) -> Vec<String> {
        let line = Line {
            level: Level::Error,
            target: "here",
            text: text.to_owned(),
        };
        let out = repeats.hear(line, now);
        out.into_iter().map(|line| line.text).collect()
    }

    #[test]
    fn what_was_said_lately_is_counted_and_told_later() {
        let mut repeats = Repeats::new();
        let start = Instant::now();
        for text in ["one", "two"] {
            assert_eq!(hear(&mut repeats, text, start), [text]);
        }
        for time in 1..TIMES + 3 {
            let said = hear(&mut repeats, "one", start + SECOND);
            assert_eq!(said.len(), usize::from(time < TIMES), "{time}");
        }
        let later = start + LATELY;
        assert_eq!(
            hear(&mut repeats, "three", later),
            ["one (and 3 times more)", "three"]
        );
        assert_eq!(hear(&mut repeats, "two", later + SECOND), ["two"]);
        assert_eq!(hear(&mut repeats, "one", later + SECOND), ["one"]);
    }

    #[test]
    fn of_too_many_different_lines_the_others_are_counted() {
        let mut repeats = Repeats::new();
        let start = Instant::now();
        for number in 0..MANY + 7 {
            let said = hear(&mut repeats, &number.to_string(), start);
            assert_eq!(said.len(), usize::from(number < MANY));
        }
        assert_eq!(hear(&mut repeats, "0", start), ["0"]);
        assert_eq!(
            hear(&mut repeats, "0", start + LATELY),
            ["7 lines more, as there were too many different ones", "0"]
        );
    }
}
