//! What stands between a client and a gateway: it cuts answers off behind their heads, or takes its time.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::gateway::Gateway;

/// How long it takes to pass on a piece, and each byte of it.
#[derive(Clone, Copy, Default)]
struct Pace {
    piece: Duration,
    byte: Duration,
}

/// What is done to an answer that begins so.
type Fate = dyn Fn(&str) -> bool + Send + Sync;

/// Stands before a gateway; its threads end with the connections, and with the tests' program.
pub(crate) struct Between {
    port: u16,
}

impl Between {
    fn new(gateway: &Gateway, pace: Pace, is_cut: Arc<Fate>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("its address").port();
        let behind = gateway.port();
        std::thread::spawn(move || {
            for client in listener.incoming() {
                let client = client.expect("a connection");
                // Without a gateway there is nothing to be had.
                let Ok(gateway) = TcpStream::connect(("127.0.0.1", behind)) else {
                    continue;
                };
                let (from, to) = (copy_of(&client), copy_of(&gateway));
                std::thread::spawn(move || pass(from, to, pace, |_| false));
                let is_cut = Arc::clone(&is_cut);
                std::thread::spawn(move || pass(gateway, client, pace, |answer| is_cut(answer)));
            }
        });
        Between { port }
    }

    /// Cuts the first answer of each of these statuses behind its head.
    pub(crate) fn cutting(gateway: &Gateway, statuses: &[u16]) -> Self {
        let left = Mutex::new(statuses.to_vec());
        let is_cut = move |answer: &str| {
            let status = answer.split(' ').nth(1).and_then(|code| code.parse().ok());
            let mut left = left.lock().unwrap_or_else(PoisonError::into_inner);
            let before = left.len();
            left.retain(|one| Some(*one) != status);
            left.len() < before
        };
        Between::new(gateway, Pace::default(), Arc::new(is_cut))
    }

    /// Lets what is sent come later, both ways.
    pub(crate) fn delaying(gateway: &Gateway, delay: Duration) -> Self {
        let pace = Pace {
            piece: delay,
            ..Pace::default()
        };
        Between::new(gateway, pace, Arc::new(|_: &str| false))
    }

    /// A line of so many bytes a second, both ways.
    pub(crate) fn slow(gateway: &Gateway, bytes: u32) -> Self {
        let pace = Pace {
            byte: Duration::from_secs(1) / bytes,
            ..Pace::default()
        };
        Between::new(gateway, pace, Arc::new(|_: &str| false))
    }

    pub(crate) fn url(&self) -> String {
        format!("http://127.0.0.1:{}/", self.port)
    }
}

fn copy_of(stream: &TcpStream) -> TcpStream {
    stream.try_clone().expect("a copy")
}

/// Passes on what comes, until one side ends or an answer is cut.
fn pass(mut from: TcpStream, mut to: TcpStream, pace: Pace, is_cut: impl Fn(&str) -> bool) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok(read @ 1..) = from.read(&mut buffer) {
        let mut piece = &buffer[..read];
        let head = piece.windows(4).position(|four| four == b"\r\n\r\n");
        let cut = match (piece.starts_with(b"HTTP/1.1 "), head) {
            (true, Some(head)) if is_cut(&String::from_utf8_lossy(&piece[..head])) => {
                piece = &piece[..head + 4];
                true
            }
            _ => false,
        };
        std::thread::sleep(pace.piece + pace.byte * piece.len() as u32);
        if to.write_all(piece).is_err() || cut {
            break;
        }
    }
    // One of them may have gone already.
    let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
}
