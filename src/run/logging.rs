//! The log: to standard error, as much as `DNPIPES_LOG` says, or to the system's from a daemon in the background.
//!
//! Standard error may be a pipe that nobody reads, or a terminal that is stopped: then a write to it waits, for ever
//! perhaps. In a daemon no request waits with it: a line for which there is no room is dropped, and the next one says so.
//! What clients cause is said a few times within some seconds, and then counted.
//! Standard error itself stays as it is, as others may have it too: pipes and terminals are opened once more, so that
//! writes to them do not wait.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Instant;

use env_logger::{Logger, Target};
use log::{Level, LevelFilter, Log, Metadata, Record};

use super::repeats::{Line, Repeats};
use super::syslog::Syslog;
use crate::error::{Error, Kind, Result};
use crate::fs::session;

/// What fails in a crate is an error here, and is told of once.
const USUAL: &str = "error,dnpipes=warn,fuser=warn";

/// So much goes into a socket that takes anything at all, in bytes.
const ROOM: usize = 4096;

/// Where lines go without waiting.
enum Sink {
    /// A file, which makes nobody wait but for its disk.
    File,
    /// Standard error, opened once more.
    Own(File),
    /// What cannot be opened, as a socket: it is asked whether it has room.
    Asked,
}

static SINK: OnceLock<Sink> = OnceLock::new();

/// Where lines go instead of standard error, once there is none.
static SYSLOG: OnceLock<Syslog> = OnceLock::new();

/// What is to be said before the next line.
struct Before {
    /// How many lines were dropped since the last that was written.
    dropped: u64,
    /// Whether that one was cut.
    cut: bool,
}

/// Held while a line is written.
static BEFORE: Mutex<Before> = Mutex::new(Before {
    dropped: 0,
    cut: false,
});

/// Who says what clients cause, who may do so again and again.
const OFTEN: [&str; 3] = [
    "dnpipes::fs::errno",
    "dnpipes::gateway::problem",
    "dnpipes::pipe::writer",
];

static REPEATS: Mutex<Repeats> = Mutex::new(Repeats::new());

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

/// Has nobody wait for who reads the log any more. Standard error must stay where it is from now on.
pub(super) fn never_wait() {
    SINK.get_or_init(|| {
        if is_to_a_file() {
            return Sink::File;
        }
        let opened = File::options()
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
            .open("/proc/self/fd/2");
        opened.map_or(Sink::Asked, Sink::Own)
    });
}

/// Has lines go to the system's log: standard error is about to go away.
///
/// # Errors
/// Those of making a socket.
pub(super) fn to_the_system() -> Result<()> {
    let syslog = Syslog::new().map_err(|error| Error::io("opening the system's log", error))?;
    // It was opened before: one is as good as the other.
    drop(SYSLOG.set(syslog));
    Ok(())
}

/// Says in the system's log what went to standard error without being logged, where lines go there.
pub fn also_to_the_system(text: &str) {
    if let Some(syslog) = SYSLOG.get() {
        syslog.say(Level::Error, text);
    }
}

/// Whether standard error is a file.
pub(super) fn is_to_a_file() -> bool {
    let stderr = io::stderr().as_fd().try_clone_to_owned().map(File::from);
    let told = stderr.and_then(|file| file.metadata());
    told.is_ok_and(|told| told.is_file())
}

/// Where the logger writes: each time a whole line.
struct Lines;

impl Write for Lines {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let Some(sink) = SINK.get() else {
            return io::stderr().write(line);
        };
        let mut before = BEFORE.lock().unwrap_or_else(PoisonError::into_inner);
        let mut out = Vec::new();
        if before.cut {
            out.push(b'\n');
        }
        if before.dropped > 0 {
            let count = before.dropped;
            writeln!(
                out,
                "[{count} lines of the log were dropped: nobody took them]"
            )?;
        }
        out.extend_from_slice(line);
        match sink.write(&mut out) {
            Ok(0) | Err(_) => before.dropped += 1,
            Ok(count) => {
                *before = Before {
                    dropped: 0,
                    cut: count < out.len(),
                };
            }
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Sink {
    /// Writes what there is room for.
    fn write(&self, out: &mut Vec<u8>) -> io::Result<usize> {
        match self {
            Sink::Own(file) => {
                let mut file = file;
                return file.write(out);
            }
            Sink::Asked if !has_room() => return Ok(0),
            Sink::Asked if out.len() > ROOM => {
                out.truncate(ROOM - 1);
                out.push(b'\n');
            }
            Sink::Asked | Sink::File => {}
        }
        io::stderr().write_all(out)?;
        Ok(out.len())
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

impl Filtered {
    fn put(&self, record: &Record<'_>) {
        match SYSLOG.get() {
            Some(syslog) if self.0.matches(record) => {
                syslog.say(record.level(), &record.args().to_string());
            }
            Some(_) => {}
            None => self.0.log(record),
        }
    }

    fn say(&self, record: &Record<'_>) {
        let target = OFTEN.into_iter().find(|often| *often == record.target());
        let Some(target) = target.filter(|_| self.0.matches(record)) else {
            return self.put(record);
        };
        let line = Line {
            level: record.level(),
            target,
            text: record.args().to_string(),
        };
        let lines = {
            let mut repeats = REPEATS.lock().unwrap_or_else(PoisonError::into_inner);
            repeats.hear(line, Instant::now())
        };
        for Line {
            level,
            target,
            text,
        } in lines
        {
            self.put(
                &Record::builder()
                    .args(format_args!("{text}"))
                    .target(target)
                    .level(level)
                    .build(),
            );
        }
    }
}

impl Log for Filtered {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        self.0.enabled(metadata)
    }

    fn log(&self, record: &Record<'_>) {
        if !session::is_late_answer(record) {
            return self.say(record);
        }
        let everyday = Record::builder()
            .args(*record.args())
            .target(record.target())
            .level(Level::Debug)
            .build();
        self.put(&everyday);
    }

    fn flush(&self) {
        self.0.flush();
    }
}
