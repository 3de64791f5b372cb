//! What answers is no gateway, or one that errs: clients say so, and come to no harm.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use dnpipes::backend::http::wire::{PROBLEM, RECORDS, Record};
use dnpipes::backend::http::{Http, HttpUrl};
use dnpipes::backend::{Backend, Limit, Start};
use dnpipes::error::{Error, Kind};
use dnpipes::message::{Message, Position};
use dnpipes::name::PipeName;

/// Answers every request alike; a client of it, and how many requests it has had.
fn impostor(status: &str, media: &str, body: Vec<u8>) -> (Http, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("its address").port();
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {media}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    let requests = Arc::new(AtomicUsize::new(0));
    let had = Arc::clone(&requests);
    std::thread::spawn(move || {
        for client in listener.incoming() {
            let mut client = BufReader::new(client.expect("a connection"));
            let mut line = String::new();
            while client.read_line(&mut line).is_ok_and(|read| read > 2) {
                line.clear();
            }
            had.fetch_add(1, Ordering::SeqCst);
            // Whoever has heard enough does not take all.
            drop(
                client
                    .get_mut()
                    .write_all(&[head.as_bytes(), &body].concat()),
            );
        }
    });
    let url = HttpUrl::parse(&format!("http://127.0.0.1:{port}/")).expect("legal");
    (Http::open(&url).expect("a client"), requests)
}

fn topic() -> PipeName {
    PipeName::new("topic").expect("legal")
}

/// What a reader gets that waits: messages, and then an error.
async fn read(client: &Http) -> (Vec<Bytes>, Error) {
    let limit = Limit {
        max_bytes: 1,
        before: None,
    };
    let source = client.subscribe(&topic(), Start::Oldest).await;
    let mut source = source.expect("a source");
    let mut read = Vec::new();
    loop {
        let next = tokio::time::timeout(Duration::from_secs(20), source.next(limit)).await;
        match next.expect("an answer") {
            Ok(messages) => read.extend(messages.into_iter().map(|message| message.data)),
            Err(error) => return (read, error),
        }
    }
}

#[tokio::test]
async fn a_stream_that_ends_at_once_is_not_asked_for_again_and_again() {
    let mut ends = Vec::new();
    Record::put_end(&mut ends);
    let mut floors = Vec::new();
    Record::put_floor(Position::new(1, 1), &mut floors);
    Record::put_end(&mut floors);
    for body in [ends, floors] {
        let (client, requests) = impostor("200 OK", RECORDS, body);
        let (messages, error) = read(&client).await;
        assert!(messages.is_empty());
        // So it is tried again by who knows how to wait between two tries.
        assert_eq!(error.kind(), Kind::Unreachable);
        assert_eq!(requests.load(Ordering::SeqCst), 1);
    }
}

#[tokio::test]
async fn positions_that_do_not_grow_are_an_error() {
    let mut body = Vec::new();
    for (seq, data) in [(1, "one"), (3, "three"), (2, "two")] {
        let message = Message {
            position: Position::new(1, seq),
            time: SystemTime::UNIX_EPOCH,
            data: data.into(),
        };
        Record::put_message(&message, &mut body);
    }
    let (client, _) = impostor("200 OK", RECORDS, body);
    let (messages, error) = read(&client).await;
    assert!(messages.len() <= 2, "{messages:?}");
    assert_eq!(error.kind(), Kind::Io);
    assert!(error.to_string().contains("do not grow"), "{error}");
}

#[tokio::test]
async fn a_failure_without_end_is_none_of_a_gateways() {
    let problem = format!(
        r#"{{"title":"Full","status":507,"detail":"{}","kind":"full","maybe_applied":false}}"#,
        "x".repeat(8 << 20)
    );
    let (client, _) = impostor("507 Insufficient Storage", PROBLEM, problem.into_bytes());
    let error = client.list().await.expect_err("a failure");
    assert_eq!(error.kind(), Kind::Io);
    assert!(error.to_string().len() < 1000, "{error:.200}");
}

#[tokio::test]
async fn a_list_that_is_too_long_is_told_as_such() {
    let list = vec![b' '; 65 << 20];
    let (client, _) = impostor("200 OK", "application/json", list);
    let error = client.list().await.expect_err("a failure");
    assert_eq!(error.kind(), Kind::Io);
    let said = error.to_string();
    assert!(said.contains("lists too many pipes"), "{said}");
}

#[tokio::test]
async fn a_list_with_names_that_no_pipe_has_is_none_of_a_gateways() {
    let list = br#"[{"name":"../up","count":1,"bytes":1,"first":null,"last":null,"modified":"2026-01-01T00:00:00Z"}]"#;
    let (client, _) = impostor("200 OK", "application/json", list.to_vec());
    let error = client.list().await.expect_err("a failure");
    assert_eq!(error.kind(), Kind::Io, "{error}");
}
