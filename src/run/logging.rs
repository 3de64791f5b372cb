//! The log: to standard error, as much as `DNPIPES_LOG` says.
//!
//! Standard error may be a pipe that nobody reads, or a terminal that is stopped: then a write to it waits, for ever
//! perhaps. In a daemon no request waits with it: a line for which there is no room is dropped, and the next one says so.

use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use env_logger::{Logger, Target};
use log::{Level, LevelFilter, Log, Metadata, Record};

use crate::error::{Error, Kind, Result};
use crate::fs::session;

/// What fails in a crate is an error here, and is told of once.
const USUAL: &str = "error,dnpipes=warn,fuser=warn";

/// So much goes into a pipe that takes anything at all, in bytes (pipe(7)).
const ROOM: usize = 4096;

/// Whether a line is rather dropped than waited with.
static NEVER_WAITS: AtomicBool = AtomicBool::new(false);

/// How many lines were dropped since the last that was written; held while one is.
static DROPPED: Mutex<u64> = Mutex::new(0);

/// Starts the log.
///
/// # Errors
/// `InvalidInput` where `DNPIPES_LOG` makes no sense.
pub fn start() -> Result<()> {
    let wanted = std::env::var("DNPIPES_LOG").unwrap_or_default();
    let wanted = if wanted.is_empty() { USUAL } else { &wanted };
    check(wanted)?;
    let logger = env_logger::Builder::new()
        .parse_filters(wanted)
        .target(Target::Pipe(Box::new(Lines)))
        .build();
    log::set_max_level(logger.filter());
    if log::set_boxed_logger(Box::new(Filtered(logger))).is_err() {
        log::error!("the log was started twice");
    }
    Ok(())
}

/// Has nobody wait for who reads the log any more.
pub(super) fn never_wait() {
    NEVER_WAITS.store(true, Ordering::Relaxed);
}

/// Where the logger writes: each time a whole line.
struct Lines;

impl Write for Lines {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if !NEVER_WAITS.load(Ordering::Relaxed) {
            return io::stderr().write(line);
        }
        let mut dropped = DROPPED.lock().unwrap_or_else(PoisonError::into_inner);
        if !has_room() {
            *dropped += 1;
            return Ok(line.len());
        }
        let mut out = Vec::new();
        if *dropped > 0 {
            writeln!(
                out,
                "[{dropped} lines of the log were dropped: nobody took them]"
            )?;
        }
        out.extend_from_slice(line);
        if out.len() > ROOM {
            out.truncate(ROOM - 1);
            out.push(b'\n');
        }
        *dropped = 0;
        io::stderr().write_all(&out)?;
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Whether standard error takes something now.
fn has_room() -> bool {
    let mut stderr = libc::pollfd {
        fd: libc::STDERR_FILENO,
        events: libc::POLLOUT,
        revents: 0,
    };
    // SAFETY: one structure that outlives the call, which does not wait.
    unsafe { libc::poll(&mut stderr, 1, 0) > 0 }
}

/// Refuses what the log would take for the name of a module, and be silent.
fn check(wanted: &str) -> Result<()> {
    // What stands behind a slash is a pattern for the text.
    let words = wanted.split('/').next().unwrap_or_default();
    for word in words.split(',') {
        let level = word.rsplit('=').next().unwrap_or_default();
        if level.parse::<LevelFilter>().is_err() {
            let why = format!(
                "DNPIPES_LOG: {word:?} is not off, error, warn, info, debug or trace, nor module=level"
            );
            return Err(Error::new(Kind::InvalidInput, why).usage());
        }
    }
    Ok(())
}

struct Filtered(Logger);

impl Log for Filtered {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        self.0.enabled(metadata)
    }

    fn log(&self, record: &Record<'_>) {
        if !session::is_late_answer(record) {
            return self.0.log(record);
        }
        let everyday = Record::builder()
            .args(*record.args())
            .target(record.target())
            .level(Level::Debug)
            .build();
        self.0.log(&everyday);
    }

    fn flush(&self) {
        self.0.flush();
    }
}
