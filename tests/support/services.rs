//! Real servers for the tests, by `scripts/services`; they end with the test, however that ends.

// Each test program uses its part.
#![allow(dead_code)]

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// The servers of one kind, started together.
pub(crate) struct Services {
    process: Child,
    talk: Mutex<Talk>,
}

struct Talk {
    /// `None` at the end.
    commands: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
    servers: BTreeMap<String, Server>,
}

/// What is known of a server.
#[derive(Clone, Debug)]
pub(crate) struct Server {
    pub(crate) name: String,
    pub(crate) url: String,
    pub(crate) port: u16,
    pub(crate) pid: i32,
    pub(crate) folder: PathBuf,
}

impl Server {
    /// A way to the server on which each connection takes `delay` to be made. Ends with the runtime.
    pub(crate) async fn slow_way(&self, delay: Duration) -> u16 {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0");
        let listener = listener.await.expect("a port");
        let (port, server) = (
            listener.local_addr().expect("its address").port(),
            self.port,
        );
        tokio::spawn(async move {
            while let Ok((mut near, _)) = listener.accept().await {
                tokio::spawn(async move {
                    tokio::time::sleep(delay).await;
                    let far = tokio::net::TcpStream::connect(("127.0.0.1", server)).await;
                    let mut far = far.expect("the server");
                    // An end of either is the end.
                    drop(tokio::io::copy_bidirectional(&mut near, &mut far).await);
                });
            }
        });
        port
    }
}

impl Services {
    /// Starts servers: `words` are the arguments of `scripts/services`.
    pub(crate) fn start(words: &[&str]) -> Self {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/services");
        let mut process = Command::new(script)
            .args(words)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("scripts/services starts");
        let talk = Talk {
            commands: process.stdin.take(),
            answers: BufReader::new(process.stdout.take().expect("its output")),
            servers: BTreeMap::new(),
        };
        let services = Services {
            process,
            talk: Mutex::new(talk),
        };
        let count = match words[0] {
            kind if kind.ends_with("-cluster") || kind.ends_with("-sentinel") => 3,
            "nats-leaf" => 2,
            _ => 1,
        };
        for _ in 0..count {
            services.lock().hear();
        }
        services
    }

    fn lock(&self) -> MutexGuard<'_, Talk> {
        self.talk.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All of them, by name.
    pub(crate) fn servers(&self) -> Vec<Server> {
        self.lock().servers.values().cloned().collect()
    }

    /// The first of them.
    pub(crate) fn server(&self) -> Server {
        self.servers().swap_remove(0)
    }

    /// The one of this name.
    pub(crate) fn named(&self, name: &str) -> Server {
        self.lock().servers[name].clone()
    }

    /// The URL of the first one.
    pub(crate) fn url(&self) -> String {
        self.server().url
    }

    /// `kill`, `start`, `stop` or `cont`; returns when it is done, and the server answers if it should.
    pub(crate) fn tell(&self, word: &str, name: &str) -> Server {
        let mut talk = self.lock();
        let commands = talk.commands.as_mut().expect("its input");
        writeln!(commands, "{word} {name}").expect("scripts/services listens");
        talk.hear()
    }
}

impl Talk {
    fn hear(&mut self) -> Server {
        let mut line = String::new();
        self.answers.read_line(&mut line).expect("an answer");
        let told: serde_json::Value = serde_json::from_str(&line)
            .unwrap_or_else(|error| panic!("scripts/services says {line:?}: {error}"));
        let text = |key: &str| told[key].as_str().expect("text").to_owned();
        let number = |key: &str| told[key].as_i64().expect("a number");
        let server = Server {
            name: text("name"),
            url: text("url"),
            port: number("port") as u16,
            pid: number("pid") as i32,
            folder: text("folder").into(),
        };
        self.servers.insert(server.name.clone(), server.clone());
        server
    }
}

impl Drop for Services {
    fn drop(&mut self) {
        // At the end of its input it ends, and reaps its own.
        self.lock().commands = None;
        let _ = self.process.wait();
    }
}
