//! Pipe names, valid by construction.

use std::fmt;
use std::sync::Arc;

use crate::error::{Error, Kind, Result};

/// Longest name, in bytes.
pub const MAX_BYTES: usize = 200;

/// The name of a pipe: 1 to [`MAX_BYTES`] bytes of UTF-8 without `/`, `@` or control characters, not
/// starting with `.`. Cheap to clone.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PipeName(Arc<str>);

impl PipeName {
    /// Checks `name`.
    ///
    /// # Errors
    /// [`Kind::InvalidName`], naming the rule that is broken.
    pub fn new(name: &str) -> Result<Self> {
        let broken = if name.is_empty() {
            Some("it is empty".to_owned())
        } else if name.len() > MAX_BYTES {
            Some(format!("it is longer than {MAX_BYTES} bytes"))
        } else if name.starts_with('.') {
            Some("it starts with `.`".to_owned())
        } else if let Some(c) = name.chars().find(|c| matches!(c, '/' | '@')) {
            Some(format!("it contains `{c}`"))
        } else if name.chars().any(char::is_control) {
            Some("it contains a control character".to_owned())
        } else {
            None
        };
        match broken {
            None => Ok(PipeName(name.into())),
            Some(rule) => Err(Error::new(
                Kind::InvalidName,
                format!("{name:?} is not a pipe name: {rule}"),
            )),
        }
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for PipeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn legal_names_are_kept_as_they_are() {
        let longest = "x".repeat(MAX_BYTES);
        for name in ["a", "with space", "ünïcode-π", "a.b:c~$%#", &longest] {
            let kept = PipeName::new(name).map(|n| n.as_str().to_owned());
            assert_eq!(kept.ok().as_deref(), Some(name));
        }
    }

    #[test]
    fn illegal_names_are_refused_with_their_rule() {
        let too_long = "x".repeat(MAX_BYTES + 1);
        for (name, rule) in [
            ("", "empty"),
            (".", "starts with"),
            (".hidden", "starts with"),
            ("a/b", "contains `/`"),
            ("a@b", "contains `@`"),
            ("a\nb", "control"),
            ("a\u{7f}", "control"),
            ("a\u{85}", "control"),
            (too_long.as_str(), "longer"),
        ] {
            let error = PipeName::new(name).expect_err(name);
            assert_eq!(error.kind(), Kind::InvalidName);
            assert!(error.to_string().contains(rule), "{error}");
        }
    }
}
