//! The one error type: what went wrong, whether a push may have been applied, and where.
//!
//! Errors are typed where they arise. Nothing below `fs/` knows an errno; `fs/errno.rs` holds the only
//! translation.

use std::fmt;
use std::io;

/// A result with the crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, in the terms a caller can act on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// A pipe name breaks the naming rules (see [`crate::name::PipeName`]).
    InvalidName,
    /// A selector after `@` is unknown, doubled or malformed.
    InvalidSelector,
    /// An argument, URL or option makes no sense.
    InvalidInput,
    /// There is no such pipe, file or directory.
    NotFound,
    /// Something of that name exists already.
    AlreadyExists,
    /// A message is longer than the limit.
    TooLong,
    /// The backend has no room for the message.
    Full,
    /// The backend or the operating system denies access.
    Denied,
    /// The mount does not allow the operation.
    NotAllowed,
    /// The mount is read-only.
    ReadOnly,
    /// The backend does not offer the operation.
    Unsupported,
    /// The backend cannot be reached just now; trying again may help.
    Unreachable,
    /// The backend stayed unreachable until the deadline.
    TimedOut,
    /// Stored data is damaged, or is not a dnpipes store.
    Damaged,
    /// The storage device or the operating system failed.
    Io,
    /// The caller was interrupted by a signal.
    Interrupted,
    /// The operation would have to wait, and the caller asked not to.
    WouldBlock,
}

/// Whether a push that failed may have been stored all the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Applied {
    /// Certainly not stored.
    No,
    /// Its first so many messages are stored, and certainly no others.
    Part(usize),
    /// Possibly stored: repeat it only with the same [`crate::message::PushId`].
    Unknown,
}

type Source = Box<dyn std::error::Error + Send + Sync + 'static>;

/// An error with its kind, its context and its cause.
#[derive(Debug)]
pub struct Error {
    kind: Kind,
    applied: Applied,
    usage: bool,
    context: String,
    source: Option<Source>,
}

impl Error {
    /// An error of `kind`, described by `context`.
    pub fn new(kind: Kind, context: impl Into<String>) -> Self {
        Error {
            kind,
            applied: Applied::No,
            usage: false,
            context: context.into(),
            source: None,
        }
    }

    /// An operating system error met while doing `context`.
    pub fn io(context: impl Into<String>, source: io::Error) -> Self {
        let kind = match source.kind() {
            io::ErrorKind::NotFound => Kind::NotFound,
            io::ErrorKind::AlreadyExists => Kind::AlreadyExists,
            io::ErrorKind::PermissionDenied => Kind::Denied,
            io::ErrorKind::ReadOnlyFilesystem => Kind::Denied,
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Kind::Full,
            io::ErrorKind::Interrupted => Kind::Interrupted,
            io::ErrorKind::TimedOut => Kind::TimedOut,
            _ => Kind::Io,
        };
        Error::new(kind, context).caused_by(source)
    }

    /// Adds the underlying cause.
    pub fn caused_by(mut self, source: impl Into<Source>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// Marks a push whose outcome is not known.
    pub fn maybe_applied(mut self) -> Self {
        self.applied = Applied::Unknown;
        self
    }

    /// Marks a push of which the first `messages` messages are stored, and certainly no others.
    pub fn stored(mut self, messages: usize) -> Self {
        self.applied = match messages {
            0 => Applied::No,
            some => Applied::Part(some),
        };
        self
    }

    /// For what has failed of a part of a push, where the `messages` messages before it are stored.
    pub fn behind(self, messages: usize) -> Self {
        match self.applied {
            Applied::No => self.stored(messages),
            Applied::Part(more) => self.stored(messages + more),
            Applied::Unknown => self,
        }
    }

    /// Marks a command line that makes no sense.
    pub fn usage(mut self) -> Self {
        self.usage = true;
        self
    }

    /// Whether the command line is at fault.
    pub fn is_usage(&self) -> bool {
        self.usage
    }

    /// What went wrong.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Whether the push that failed may have been stored.
    pub fn applied(&self) -> Applied {
        self.applied
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.context)?;
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            // On one line, as the log has one for each: crates, and servers, say more.
            let said = error.to_string();
            let mut separator = ": ";
            for line in said.lines().map(str::trim).filter(|line| !line.is_empty()) {
                write!(f, "{separator}{line}")?;
                separator = " ";
            }
            // One of ours has told its own causes.
            cause = match error.is::<Error>() {
                true => None,
                false => error.source(),
            };
        }
        Ok(())
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source
            .as_deref()
            .map(|source| source as &(dyn std::error::Error + 'static))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn display_stays_on_one_line() {
        let error =
            Error::new(Kind::Io, "reading").caused_by("Parse error\nUnexpected `*`\n\n  at 3\n");
        assert_eq!(
            error.to_string(),
            "reading: Parse error Unexpected `*` at 3"
        );
    }

    #[test]
    fn display_names_the_context_and_every_cause() {
        let disk = io::Error::from_raw_os_error(libc::ENOSPC);
        let error = Error::io("writing the store", disk);
        assert_eq!(error.kind(), Kind::Full);
        assert_eq!(
            error.to_string(),
            "writing the store: No space left on device (os error 28)"
        );
        let outer = Error::new(Kind::TimedOut, "pushing").caused_by(error);
        assert_eq!(
            outer.to_string(),
            "pushing: writing the store: No space left on device (os error 28)"
        );
    }
}
