//! Going to the background, with an answer about how it went.

use std::fs::File;
use std::io::{self, PipeWriter, Read, Write};
use std::os::fd::{AsRawFd, RawFd};

use super::logging;
use crate::error::{Error, Kind, Result};

/// What the daemon says when it is ready; anything else is why it is not.
const READY: &[u8] = b"\0";

/// Which of the two processes this is.
pub(super) enum Side {
    /// The one that was started: the daemon has said how it went.
    Starter(Result<()>),
    /// The daemon; it has to say how it went.
    Daemon(Starter),
}

/// The way to the process that waits for the daemon, and what was open before.
pub(super) struct Starter {
    answer: PipeWriter,
    inherited: Vec<RawFd>,
}

/// Forks. Must be called before any thread is started.
pub(super) fn detach() -> Result<Side> {
    // Whoever waits for their end, or for a lock, waits for every process that has them.
    let inherited = inherited();
    let (mut answer, starter) = io::pipe().map_err(|error| Error::io("making a pipe", error))?;
    // SAFETY: there is one thread, so the child is a whole process.
    match unsafe { libc::fork() } {
        -1 => Err(Error::io("starting the daemon", io::Error::last_os_error())),
        0 => {
            drop(answer);
            // SAFETY: no preconditions; the child leads no process group, so it cannot fail.
            unsafe { libc::setsid() };
            Ok(Side::Daemon(Starter {
                answer: starter,
                inherited,
            }))
        }
        _ => {
            drop(starter);
            let mut said = Vec::new();
            answer
                .read_to_end(&mut said)
                .map_err(|error| Error::io("waiting for the daemon", error))?;
            Ok(Side::Starter(match said.as_slice() {
                READY => Ok(()),
                [] => Err(Error::new(Kind::Io, "the daemon ended before it was ready")),
                why => Err(Error::new(Kind::Io, String::from_utf8_lossy(why))),
            }))
        }
    }
}

impl Starter {
    /// Says that all is well, and lets go of the terminal and of what else the starter had open. Standard error stays
    /// where it is a file; otherwise the log goes to the system's.
    pub(super) fn ready(mut self) -> Result<()> {
        std::env::set_current_dir("/").map_err(|error| Error::io("changing to /", error))?;
        let null = File::options()
            .read(true)
            .write(true)
            .open("/dev/null")
            .map_err(|error| Error::io("opening /dev/null", error))?;
        let streams = if logging::is_to_a_file() {
            0..=1
        } else {
            logging::to_the_system()?;
            0..=2
        };
        for stream in streams {
            // SAFETY: both are open descriptors, and nothing in this program owns 0 to 2.
            if unsafe { libc::dup2(null.as_raw_fd(), stream) } < 0 {
                return Err(Error::io(
                    "leaving the terminal",
                    io::Error::last_os_error(),
                ));
            }
        }
        for descriptor in self.inherited {
            // SAFETY: it was open before this program had opened anything, so nothing here owns it.
            unsafe { libc::close(descriptor) };
        }
        self.answer
            .write_all(READY)
            .map_err(|error| Error::io("answering who started the daemon", error))
    }

    /// Says why it failed.
    pub(super) fn failed(mut self, error: &Error) {
        if let Err(unheard) = self.answer.write_all(error.to_string().as_bytes()) {
            log::error!("{error} (and nobody to tell: {unheard})");
        }
    }
}

/// The descriptors behind standard error that the starter has left open: this program's own are closed on exec.
fn inherited() -> Vec<RawFd> {
    let names = std::fs::read_dir("/proc/self/fd").into_iter().flatten();
    let numbers = names.filter_map(|name| name.ok()?.file_name().to_str()?.parse().ok());
    let is_left = |descriptor: &RawFd| {
        // SAFETY: fcntl(2) says of a number that is no descriptor that it is none.
        let flags = unsafe { libc::fcntl(*descriptor, libc::F_GETFD) };
        *descriptor > libc::STDERR_FILENO && flags >= 0 && flags & libc::FD_CLOEXEC == 0
    };
    numbers.filter(is_left).collect()
}
