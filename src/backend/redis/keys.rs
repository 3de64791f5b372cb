//! Which keys belong to a pipe.

use std::fmt;

use crate::error::{Error, Kind, Result};
use crate::message::Producer;
use crate::name::PipeName;

/// The keys of one pipe. They lie in the same slot of a cluster.
#[derive(Clone)]
pub(super) struct Keys {
    /// Its messages.
    pub(super) stream: String,
    /// A hash of what is known of it, and of the last push of each producer (known.lua).
    pub(super) known: String,
    /// The last pushes of earlier producers.
    pub(super) earlier: String,
}

impl Keys {
    /// Touched by who removes the pipe (begin.lua). Like the next one it begins as `known`, for the rights of users.
    pub(super) fn gate(&self) -> String {
        self.beside("gate")
    }

    /// Touched where transactions of the producer must not be run any more (begin.lua).
    pub(super) fn claim(&self, producer: Producer) -> String {
        self.beside(producer)
    }

    /// Written by who waits until others have what was written before (copies.rs).
    pub(super) fn mark(&self) -> String {
        self.beside("mark")
    }

    /// A key of the pipe's own, that is none of another pipe: names hold no control characters.
    fn beside(&self, what: impl fmt::Display) -> String {
        format!("{}\x1f{what}", self.known)
    }

    /// The keys of the pipe whose stream is `prefix` and its name. `cluster` says that slots count.
    ///
    /// # Errors
    /// `InvalidName` where no other key can lie in the stream's slot.
    pub(super) fn new(prefix: &str, pipe: &PipeName, cluster: bool) -> Result<Self> {
        let stream = format!("{prefix}{pipe}");
        // What decides on the slot: the text between the first { and the next }, if there is some, else all.
        let tag = stream
            .split_once('{')
            .and_then(|(_, rest)| rest.split_once('}'))
            .map(|(tag, _)| tag)
            .filter(|tag| !tag.is_empty());
        let tag = match tag {
            Some(tag) => tag,
            None if cluster && stream.contains('}') => {
                return Err(Error::new(
                    Kind::InvalidName,
                    format!("{pipe} cannot be a pipe of a Redis Cluster: it contains a }}"),
                ));
            }
            None => stream.as_str(),
        };
        let beside = |what| match tag == stream {
            true => format!("dnpipes-{what}:{{{stream}}}"),
            false => format!("dnpipes-{what}:{{{tag}}}:{stream}"),
        };
        Ok(Keys {
            known: beside("known"),
            earlier: beside("earlier"),
            stream,
        })
    }
}

/// A pattern of SCAN for the keys that begin with `prefix`.
pub(super) fn pattern(prefix: &str) -> String {
    let mut pattern = String::new();
    for c in prefix.chars() {
        if matches!(c, '*' | '?' | '[' | ']' | '\\') {
            pattern.push('\\');
        }
        pattern.push(c);
    }
    pattern.push('*');
    pattern
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(name: &str) -> Result<Keys> {
        Keys::new("p:", &PipeName::new(name).expect("legal"), true)
    }

    #[test]
    fn all_keys_of_a_pipe_lie_in_one_slot() {
        for (name, tag) in [("a", "p:a"), ("a{b}c", "b"), ("a{b", "p:a{b"), ("{x}", "x")] {
            let keys = keys(name).expect("a slot");
            assert_eq!(keys.stream, format!("p:{name}"));
            for key in [&keys.known, &keys.earlier] {
                let (_, rest) = key.split_once('{').expect("a tag");
                assert_eq!(rest.split_once('}').expect("a tag").0, tag, "{key}");
            }
        }
        assert_ne!(
            keys("x{b}").expect("one").known,
            keys("y{b}").expect("another").known
        );
        for name in ["a}", "a{}b", "}x{"] {
            assert_eq!(
                keys(name).err().map(|error| error.kind()),
                Some(Kind::InvalidName)
            );
        }
    }

    #[test]
    fn a_pattern_matches_the_prefix_as_it_is() {
        assert_eq!(pattern("a*[b]?\\:"), "a\\*\\[b\\]\\?\\\\:*");
    }
}
