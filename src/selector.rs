//! Selectors: options in the name, as in `topic@follow,nul`.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use crate::error::{Error, Kind, Result};
use crate::name::PipeName;

/// A time as people write it in options: `90s`, `1m 30s`, or a number of seconds. `None` for anything else.
pub fn parse_duration(text: &str) -> Option<Duration> {
    // Of times near the end of 64 bits humantime 2.4 panics on some; to write one takes more than this.
    const LONGEST: usize = 20;
    match text.parse() {
        Ok(seconds) => Some(Duration::from_secs(seconds)),
        Err(_) if text.len() > LONGEST => None,
        Err(_) => humantime::parse_duration(text).ok(),
    }
}

/// A size as people write it in options, in bytes: `4096`, `64KiB`, `16MiB`, `1GiB`; at most what 64 bits hold. `None` for
/// anything else.
pub fn parse_size(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit: u64 = match text.strip_prefix(digits)? {
        "" | "B" => 1,
        "KiB" | "K" => 1 << 10,
        "MiB" | "M" => 1 << 20,
        "GiB" | "G" => 1 << 30,
        _ => return None,
    };
    Some(digits.parse::<u64>().ok()?.saturating_mul(unit))
}

/// What a read does at the end of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Mode {
    /// The end is pinned at open, then end of file; an empty pipe waits for its first message.
    Drain,
    /// Waits for the next message, for ever.
    Follow,
    /// The end is pinned at open, then end of file; never waits.
    Snapshot,
}

/// How bytes and messages map onto each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Frame {
    /// Each message ends with `\n`.
    Line,
    /// Each message ends with a NUL byte.
    Nul,
    /// What one writer writes between open and close is one message; one message a read.
    File,
    /// Each message follows its length: 4 bytes, big-endian.
    Len,
}

macro_rules! words {
    ($type:ident, $what:literal: $($variant:ident = $word:literal),+) => {
        impl $type {
            /// Every value's word, for messages and help.
            pub const WORDS: &'static [&'static str] = &[$($word),+];
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(match self { $($type::$variant => $word),+ })
            }
        }

        impl FromStr for $type {
            type Err = Error;

            fn from_str(word: &str) -> Result<Self> {
                match word {
                    $($word => Ok($type::$variant),)+
                    _ => Err(Error::new(
                        Kind::InvalidSelector,
                        format!(concat!("unknown ", $what, " {:?}; there are: {}"), word, Self::WORDS.join(" ")),
                    )),
                }
            }
        }
    };
}

words!(Mode, "mode": Drain = "drain", Follow = "follow", Snapshot = "snapshot");
words!(Frame, "frame": Line = "line", Nul = "nul", File = "file", Len = "len");

/// What a selector asked for; `None` leaves the mount's default.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct OpenOptions {
    /// The read mode.
    pub mode: Option<Mode>,
    /// The framing.
    pub frame: Option<Frame>,
}

/// A pipe's name with the options of one open.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Selector {
    /// The pipe.
    pub pipe: PipeName,
    /// Its options.
    pub options: OpenOptions,
}

impl Selector {
    /// A pipe without options.
    pub fn plain(pipe: PipeName) -> Self {
        Selector {
            pipe,
            options: OpenOptions::default(),
        }
    }
}

impl FromStr for Selector {
    type Err = Error;

    /// Parses `topic` or `topic@opt[,opt…]`.
    ///
    /// # Errors
    /// [`Kind::InvalidName`] for the part before `@`, [`Kind::InvalidSelector`] for what follows.
    fn from_str(text: &str) -> Result<Self> {
        let Some((name, words)) = text.split_once('@') else {
            return PipeName::new(text).map(Selector::plain);
        };
        let mut selector = Selector::plain(PipeName::new(name)?);
        for word in words.split(',') {
            selector.options.set(text, word)?;
        }
        Ok(selector)
    }
}

impl OpenOptions {
    fn set(&mut self, text: &str, word: &str) -> Result<()> {
        let doubled = if let Ok(mode) = word.parse() {
            self.mode.replace(mode).is_some()
        } else if let Ok(frame) = word.parse() {
            self.frame.replace(frame).is_some()
        } else {
            return Err(refuse(text, &format!("unknown option {word:?}")));
        };
        if doubled {
            return Err(refuse(text, &format!("a second value {word:?}")));
        }
        Ok(())
    }
}

fn refuse(text: &str, why: &str) -> Error {
    Error::new(
        Kind::InvalidSelector,
        format!(
            "{text:?}: {why}; allowed after `@`, once each and separated by commas: one mode of {}; one frame of {}",
            Mode::WORDS.join(" "),
            Frame::WORDS.join(" ")
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Selector> {
        text.parse()
    }

    #[test]
    fn options_are_read_in_any_order() {
        for text in ["t@follow,nul", "t@nul,follow"] {
            let selector = parse(text).expect(text);
            assert_eq!(selector.pipe.as_str(), "t");
            assert_eq!(selector.options.mode, Some(Mode::Follow));
            assert_eq!(selector.options.frame, Some(Frame::Nul));
        }
        assert_eq!(parse("t").expect("plain").options, OpenOptions::default());
    }

    #[test]
    fn unknown_doubled_and_malformed_options_are_refused() {
        for text in [
            "t@",
            "t@,",
            "t@follow,",
            "t@bogus",
            "t@follow,follow",
            "t@follow,drain",
            "t@nul,len",
            "t@@follow",
            "t@follow@nul",
            "t@ follow",
            "t@FOLLOW",
        ] {
            let error = parse(text).expect_err(text);
            assert_eq!(error.kind(), Kind::InvalidSelector, "{text}");
            assert!(error.to_string().contains("snapshot"), "{error}");
        }
        assert_eq!(
            parse("@follow").expect_err("no name").kind(),
            Kind::InvalidName
        );
    }
}
