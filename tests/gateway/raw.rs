//! A client that sends any bytes.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::Duration;

use crate::gateway::Gateway;

/// An answer that comes later has not come.
pub(crate) const DEADLINE: Duration = Duration::from_secs(20);

pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) head: String,
    pub(crate) body: String,
}

/// A connection on which anything can be sent.
pub(crate) struct Raw {
    pub(crate) stream: TcpStream,
    /// Read, but not yet taken.
    held: Vec<u8>,
}

impl Raw {
    pub(crate) fn open(gateway: &Gateway) -> Self {
        let stream = TcpStream::connect(("127.0.0.1", gateway.port())).expect("a connection");
        stream
            .set_read_timeout(Some(DEADLINE))
            .expect("a time limit");
        stream.set_nodelay(true).expect("no delay");
        Raw {
            stream,
            held: Vec::new(),
        }
    }

    /// Sends as much as the gateway takes: it may have closed the connection.
    pub(crate) fn send(&mut self, bytes: &[u8]) -> &mut Self {
        let _ = self.stream.write_all(bytes);
        self
    }

    pub(crate) fn end(&mut self) -> &mut Self {
        let _ = self.stream.shutdown(Shutdown::Write);
        self
    }

    /// Reads some; false at the end.
    fn read(&mut self) -> bool {
        let mut piece = [0; 4096];
        match self.stream.read(&mut piece) {
            Ok(count) => {
                self.held.extend_from_slice(&piece[..count]);
                count > 0
            }
            Err(error) if error.kind() == ErrorKind::ConnectionReset => false,
            Err(error) => panic!("there is neither an answer nor an end: {error}"),
        }
    }

    /// The next answer; none if the connection is closed instead.
    pub(crate) fn answer(&mut self) -> Option<Answer> {
        self.answer_to("")
    }

    /// The same of a request that may be one for a head only.
    pub(crate) fn answer_to(&mut self, request: &str) -> Option<Answer> {
        let end = loop {
            match self.held.windows(4).position(|bytes| bytes == b"\r\n\r\n") {
                Some(at) => break at + 4,
                None if self.read() => {}
                None => return None,
            }
        };
        let head = self.take(end);
        let lower = head.to_lowercase();
        let status = head.split(' ').nth(1).expect("a status");
        let status = status.parse().expect("a number");
        let length = lower.split("content-length: ").nth(1);
        let body = match length
            .filter(|_| !request.starts_with("HEAD"))
            .and_then(|rest| rest.split("\r\n").next())
        {
            Some(length) => self.take(length.parse().expect("a number")),
            None if lower.contains("transfer-encoding: chunked") => self.chunks(),
            None => String::new(),
        };
        Some(Answer { status, head, body })
    }

    fn take(&mut self, count: usize) -> String {
        while self.held.len() < count {
            assert!(self.read(), "the answer is cut");
        }
        let taken: Vec<u8> = self.held.drain(..count).collect();
        String::from_utf8(taken).expect("text")
    }

    fn chunks(&mut self) -> String {
        let mut all = String::new();
        loop {
            let end = loop {
                match self.held.windows(2).position(|bytes| bytes == b"\r\n") {
                    Some(at) => break at + 2,
                    None => assert!(self.read(), "the answer is cut"),
                }
            };
            let size = self.take(end);
            let size = usize::from_str_radix(size.trim(), 16).expect("a number");
            let chunk = self.take(size + 2);
            all.push_str(&chunk[..size]);
            if size == 0 {
                return all;
            }
        }
    }

    pub(crate) fn is_closed(&mut self) -> bool {
        while self.read() {}
        self.held.is_empty()
    }
}
