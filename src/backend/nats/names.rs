//! Pipe names as stream names. A stream's name is one token of a subject, and a folder on the server's
//! disk: it has no dot, wildcard, white space or slash, and at most 255 bytes.

use crate::error::{Error, Kind, Result};
use crate::name::PipeName;

/// The longest name of a stream, in bytes.
const MAX_BYTES: usize = 255;

/// What stands in front of each pipe's stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Naming(String);

impl Naming {
    /// Streams whose names start with `prefix`.
    ///
    /// # Errors
    /// Why no stream's name does.
    pub(super) fn new(prefix: String) -> Result<Self, String> {
        match prefix.chars().find(|c| !is_plain(*c)) {
            Some(c) => Err(format!("prefix: no stream's name contains {c:?}")),
            None => Ok(Naming(prefix)),
        }
    }

    /// The name of the pipe's stream: the pipe's, with `=XX` for each byte that a stream's name cannot
    /// have, and for `=`.
    ///
    /// # Errors
    /// `InvalidName` where that is too long.
    pub(super) fn stream(&self, pipe: &PipeName) -> Result<String> {
        let mut name = self.0.clone();
        for c in pipe.as_str().chars() {
            if is_plain(c) && c != '=' {
                name.push(c);
                continue;
            }
            for byte in c.encode_utf8(&mut [0; 4]).bytes() {
                name.push_str(&format!("={byte:02X}"));
            }
        }
        if name.len() > MAX_BYTES {
            let why = format!(
                "{pipe:?}: its stream {name:?} would have {} bytes, more than {MAX_BYTES} (space . * > \\ % = take three)",
                name.len(),
                pipe = pipe.as_str(),
            );
            return Err(Error::new(Kind::InvalidName, why));
        }
        Ok(name)
    }

    /// The pipe that the stream is, if it is one.
    pub(super) fn pipe(&self, stream: &str) -> Option<PipeName> {
        let escaped = stream.strip_prefix(&self.0)?;
        let mut bytes = Vec::with_capacity(escaped.len());
        let mut rest = escaped.as_bytes();
        while let Some((&byte, behind)) = rest.split_first() {
            rest = behind;
            if byte == b'=' {
                let digits = std::str::from_utf8(rest.get(..2)?).ok()?;
                bytes.push(u8::from_str_radix(digits, 16).ok()?);
                rest = &rest[2..];
            } else {
                bytes.push(byte);
            }
        }
        let pipe = PipeName::new(std::str::from_utf8(&bytes).ok()?).ok()?;
        // What is escaped otherwise than above would be another pipe's stream when it is pushed to.
        (self.stream(&pipe).ok()? == stream).then_some(pipe)
    }
}

/// Whether it may stand in a stream's name. Servers care for ASCII's white space only, but clients split
/// protocol lines at any; and servers of 2.9 take a `%` for a directive of Go's `Printf`.
fn is_plain(c: char) -> bool {
    !(c.is_whitespace() || c.is_control() || matches!(c, '.' | '*' | '>' | '/' | '\\' | '%'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn naming(prefix: &str) -> Naming {
        Naming::new(prefix.to_owned()).expect("a legal prefix")
    }

    #[test]
    fn names_come_back_and_stay_readable() {
        let naming = naming("dnpipes-");
        for (pipe, stream) in [
            ("topic", "dnpipes-topic"),
            ("ünïcode-π😀", "dnpipes-ünïcode-π😀"),
            ("a.b c", "dnpipes-a=2Eb=20c"),
            ("*>\\%2F=", "dnpipes-=2A=3E=5C=252F=3D"),
            ("wide\u{3000}space", "dnpipes-wide=E3=80=80space"),
        ] {
            let pipe = PipeName::new(pipe).expect("legal");
            assert_eq!(naming.stream(&pipe).expect("short"), stream);
            assert_eq!(naming.pipe(stream), Some(pipe));
        }
    }

    #[test]
    fn what_no_pipe_is_called_is_no_pipe() {
        let own = naming("dnpipes-");
        for stream in [
            "dnpipes-",
            "other",
            "dnpipes-a=2",
            "dnpipes-=2e",
            "dnpipes-=41",
            "dnpipes-=FF",
            "dnpipes-a=2Fb",
            "dnpipes-a%b",
            "dnpipes-a@b",
            "dnpipes-=2Ehidden",
        ] {
            assert_eq!(own.pipe(stream), None, "{stream}");
        }
        assert_eq!(naming("").pipe("ORDERS"), PipeName::new("ORDERS").ok());
        assert!(Naming::new("a.".to_owned()).is_err());
    }

    #[test]
    fn a_name_that_gets_too_long_is_refused_by_its_rule() {
        let naming = naming("dnpipes-");
        let fits = PipeName::new(&".".repeat(83)[..82].replacen('.', "x", 1)).expect("legal");
        assert!(naming.stream(&fits).is_ok());
        let long = PipeName::new(&format!("x{}", ".".repeat(90))).expect("legal");
        let error = naming.stream(&long).expect_err("too long");
        assert_eq!(error.kind(), Kind::InvalidName);
        assert!(error.to_string().contains("255"), "{error}");
    }
}
