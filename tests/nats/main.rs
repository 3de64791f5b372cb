//! What is particular to NATS: streams that others made, limits, who may come in, and what a server forgets.

#[path = "../support/gateway.rs"]
mod gateway;
#[path = "../support/services.rs"]
mod services;

mod access;
mod content;
mod foreign;
mod limits;
mod listing;
mod odd;
mod once;
mod removed;
mod sheds;
mod sizes;
mod together;
mod torn;
mod waiting;

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use dnpipes::backend::nats::{Nats, NatsUrl};
use dnpipes::backend::{Backend, Limit, Start};
use dnpipes::error::{Error, Result};
use dnpipes::message::{Batch, Position, Producer, PushId};
use dnpipes::name::PipeName;
use serde_json::{Value, json};

use services::Services;

fn client(url: &str) -> Nats {
    Nats::open(&NatsUrl::parse(url).expect("a URL")).expect("a client")
}

fn name(text: &str) -> PipeName {
    PipeName::new(text).expect("legal")
}

fn batch(messages: &[&str]) -> Batch {
    let copy = |message: &&str| Bytes::copy_from_slice(message.as_bytes());
    Batch::new(messages.iter().map(copy).collect()).expect("not empty")
}

fn new_id() -> PushId {
    PushId::first(Producer::random().expect("randomness"), 1)
}

async fn push(client: &Nats, pipe: &str, messages: &[&str]) -> Result<Position> {
    client.push(&name(pipe), new_id(), batch(messages)).await
}

/// What a new reader finds.
async fn pull(client: &Nats, pipe: &str) -> Result<Vec<String>> {
    let mut source = client.subscribe(&name(pipe), Start::Oldest).await?;
    let limit = Limit {
        max_bytes: 1 << 20,
        before: Some(Position::MAX),
    };
    let messages = source.next(limit).await?;
    let text = |data: &[u8]| String::from_utf8_lossy(data).into_owned();
    Ok(messages.iter().map(|message| text(&message.data)).collect())
}

/// All that there is.
async fn contents(client: &Nats, pipe: &str) -> Vec<String> {
    let mut source = client
        .subscribe(&name(pipe), Start::Oldest)
        .await
        .expect("a source");
    let limit = Limit {
        max_bytes: 1 << 20,
        before: Some(source.end().await.expect("the end")),
    };
    let mut all = Vec::new();
    loop {
        let some = source.next(limit).await.expect("messages");
        if some.is_empty() {
            return all;
        }
        all.extend(
            some.iter()
                .map(|m| String::from_utf8_lossy(&m.data).into_owned()),
        );
    }
}

/// Another program.
struct Other(async_nats::Client);

impl Other {
    async fn new(services: &Services) -> Self {
        let connected = async_nats::connect(services.url()).await;
        Other(connected.expect("a connection"))
    }

    /// Asks JetStream.
    async fn api(&self, what: &str, body: Value) -> Value {
        let subject = format!("$JS.API.{what}");
        let body = match body {
            Value::Null => String::new(),
            body => body.to_string(),
        };
        let asked = self.0.request(subject, body.into()).await;
        let answer = serde_json::from_slice(&asked.expect("an answer").payload);
        let answer: Value = answer.expect("JSON");
        assert!(answer["error"].is_null(), "{what}: {answer}");
        answer
    }

    /// Makes a stream of this name, with these settings.
    async fn stream(&self, name: &str, settings: Value) {
        let mut config = json!({ "name": name, "storage": "file", "subjects": [name] });
        let more = settings.as_object().expect("settings").clone();
        config.as_object_mut().expect("settings").extend(more);
        self.api(&format!("STREAM.CREATE.{name}"), config).await;
    }

    /// The next message of a consumer.
    async fn next(&self, subject: &'static str) -> async_nats::Message {
        // One that is delivered bears its own subject: it has to have an inbox to itself.
        let request = async_nats::Request::new().inbox(self.0.new_inbox());
        let asked = self.0.send_request(subject, request).await;
        asked.expect("a message")
    }

    async fn publish(&self, subject: &str, data: &'static str) {
        let sent = self.0.request(subject.to_owned(), data.into()).await;
        sent.expect("an acknowledgement");
    }
}

/// Keeps what is logged.
struct Log(Mutex<Vec<String>>);

static LOG: Log = Log(Mutex::new(Vec::new()));

impl log::Log for Log {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        let line = format!("{} {}", record.level(), record.args());
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(line);
    }

    fn flush(&self) {}
}

impl Log {
    /// The warnings that mention `what`.
    fn warnings(&self, what: &str) -> Vec<String> {
        let lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let of_it = |line: &&String| line.starts_with("WARN") && line.contains(what);
        lines.iter().filter(of_it).cloned().collect()
    }
}

fn keep_log() {
    if log::set_logger(&LOG).is_ok() {
        log::set_max_level(log::LevelFilter::Warn);
    }
}

/// The error, which comes at once.
async fn refused<T>(call: impl Future<Output = Result<T>>) -> Error {
    let called = tokio::time::timeout(Duration::from_secs(3), call).await;
    match called.expect("an answer at once") {
        Ok(_) => panic!("it is not refused"),
        Err(error) => error,
    }
}
