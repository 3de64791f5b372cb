//! The system's log: where a daemon in the background says what its starter's standard error would have been told.
//!
//! A line is a datagram to `/dev/log`, where systemd-journald(8), rsyslogd(8) and busybox's syslogd listen, in the form of
//! RFC 3164 without a time and a host: all three then take their own, which no time zone can shift.

use std::io;
use std::os::unix::net::UnixDatagram;
use std::sync::atomic::{AtomicU64, Ordering};

use log::Level;

/// Where it listens (syslog(3)).
const PATH: &str = "/dev/log";

/// The facility of daemons without one of their own (RFC 3164, 4.1.1), times 8.
const DAEMON: u8 = 3 << 3;

/// Longest text, in bytes: some cut messages at 8 KiB.
const LONGEST: usize = 8000;

/// The way there, which makes nobody wait.
pub(super) struct Syslog {
    socket: UnixDatagram,
    /// How many lines were dropped since the last that was taken.
    dropped: AtomicU64,
}

impl Syslog {
    /// # Errors
    /// Those of making a socket. Whether anybody listens is of no matter: who is started later gets what comes then.
    pub(super) fn new() -> io::Result<Self> {
        let socket = UnixDatagram::unbound()?;
        socket.set_nonblocking(true)?;
        Ok(Syslog {
            socket,
            dropped: AtomicU64::new(0),
        })
    }

    /// Sends a line; without one who takes it at once it is dropped and counted.
    pub(super) fn say(&self, level: Level, text: &str) {
        let dropped = self.dropped.swap(0, Ordering::Relaxed);
        let told = match dropped {
            0 => Ok(()),
            count => {
                let lost = format!("{count} lines of the log were dropped: nobody took them");
                self.send(Level::Warn, &lost)
            }
        };
        match told {
            Ok(()) if self.send(level, text).is_ok() => return,
            Ok(()) => self.dropped.fetch_add(1, Ordering::Relaxed),
            Err(_) => self.dropped.fetch_add(dropped + 1, Ordering::Relaxed),
        };
    }

    fn send(&self, level: Level, text: &str) -> io::Result<()> {
        let line = line(level, std::process::id(), text);
        self.socket.send_to(line.as_bytes(), PATH).map(|_| ())
    }
}

/// As RFC 3164 has it in 4.1.1 and 4.1.3.
fn line(level: Level, process: u32, text: &str) -> String {
    let severity = match level {
        Level::Error => 3,
        Level::Warn => 4,
        Level::Info => 6,
        Level::Debug | Level::Trace => 7,
    };
    let mut end = text.len().min(LONGEST);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    let text = &text[..end];
    format!("<{}>dnpipes[{process}]: {text}", DAEMON | severity)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_bears_its_severity_and_is_cut_between_characters() {
        let said = line(Level::Error, 7, "a pipe's end");
        assert_eq!(said, "<27>dnpipes[7]: a pipe's end");
        assert!(line(Level::Warn, 7, "x").starts_with("<28>"));
        let long = line(Level::Debug, 7, &"é".repeat(LONGEST));
        let text = long.strip_prefix("<31>dnpipes[7]: ").expect("its head");
        assert_eq!(text.len(), LONGEST);
        let odd = line(Level::Info, 7, &format!("a{}", "é".repeat(LONGEST)));
        let text = odd.strip_prefix("<30>dnpipes[7]: ").expect("its head");
        assert_eq!(text.len(), LONGEST - 1);
    }
}
