//! The only translation of errors to errnos, and the only place that logs a failed request.

use fuser::Errno;

use crate::error::{Error, Kind};

/// The errno for `error`; see the table "Errors" in the README.
fn errno(kind: Kind) -> Errno {
    match kind {
        Kind::InvalidName | Kind::InvalidInput => Errno::EINVAL,
        Kind::InvalidSelector | Kind::NotFound => Errno::ENOENT,
        Kind::AlreadyExists => Errno::EEXIST,
        Kind::TooLong => Errno::EMSGSIZE,
        Kind::Full => Errno::ENOSPC,
        Kind::Denied => Errno::EACCES,
        Kind::NotAllowed => Errno::EPERM,
        Kind::ReadOnly => Errno::EROFS,
        Kind::Unsupported => Errno::EOPNOTSUPP,
        Kind::Unreachable | Kind::TimedOut => Errno::ETIMEDOUT,
        Kind::Damaged | Kind::Io => Errno::EIO,
        Kind::Interrupted => Errno::EINTR,
        Kind::WouldBlock => Errno::EAGAIN,
    }
}

/// Logs the failure of `operation`, and gives the errno for it.
pub(super) fn answer(operation: &str, error: &Error) -> Errno {
    let level = match error.kind() {
        // What a program's every-day probing meets.
        Kind::NotFound | Kind::AlreadyExists | Kind::Interrupted | Kind::WouldBlock => {
            log::Level::Debug
        }
        Kind::InvalidName
        | Kind::InvalidInput
        | Kind::InvalidSelector
        | Kind::TooLong
        | Kind::NotAllowed
        | Kind::ReadOnly
        | Kind::Unsupported => log::Level::Warn,
        Kind::Full
        | Kind::Denied
        | Kind::Unreachable
        | Kind::TimedOut
        | Kind::Damaged
        | Kind::Io => log::Level::Error,
    };
    log::log!(level, "{operation}: {error}");
    errno(error.kind())
}

/// The same for who asks a remote backend by an inode: what he found by its name a moment ago may be gone. Then the kernel
/// is to look the name up again, before it says so or has the pipe made (open(2) with O_CREAT); it does after ESTALE only.
pub(super) fn answer_by_inode(operation: &str, error: &Error, is_remote: bool) -> Errno {
    let errno = answer(operation, error);
    match error.kind() {
        Kind::NotFound if is_remote => Errno::ESTALE,
        _ => errno,
    }
}
