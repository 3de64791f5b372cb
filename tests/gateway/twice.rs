//! Pushes whose first request arrives behind the repeated one, as over a network that was cut and is whole
//! again.

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use dnpipes::backend::Backend;
use dnpipes::backend::http::{Http, HttpUrl};
use dnpipes::backend::retry::Retry;
use dnpipes::error::{Applied, Kind};
use dnpipes::message::{Batch, Producer, PushId};
use dnpipes::name::PipeName;
use dnpipes::pipe::writer::Writer;
use dnpipes::selector::Frame;

use crate::curl::{curl, get};
use crate::gateway::{Gateway, text};
use crate::raw::Raw;

const BODY: &[u8] = b"\0\0\0\x05order";

fn head(seq: u32, first: bool) -> String {
    let attempt = if first {
        "Dnpipes-Attempt: first\r\n"
    } else {
        ""
    };
    format!(
        "POST /v1/pipes/topic/messages HTTP/1.1\r\nHost: localhost\r\n{attempt}\
         Idempotency-Key: \"dnpipes-000102030405060708090a0b0c0d0e0f-{seq}\"\r\n\
         Content-Type: application/vnd.dnpipes.len\r\nContent-Length: {}\r\n\r\n",
        BODY.len()
    )
}

/// A store of the test's own, behind a gateway, with or without a place on the disk.
fn gateways() -> Vec<(Gateway, tempfile::TempDir)> {
    let start = |source: fn(&str) -> String| {
        let folder = tempfile::tempdir().expect("a folder");
        let source = source(&folder.path().display().to_string());
        (Gateway::start(&source, &[]), folder)
    };
    vec![
        start(|_| "memory:".to_owned()),
        start(|folder| format!("sqlite:{folder}/pipes.db?durability=process")),
    ]
}

#[test]
fn a_first_try_whose_body_comes_behind_its_repeat_is_stored_once() {
    for (gateway, _folder) in gateways() {
        let messages = format!("{}v1/pipes/topic/messages", gateway.url());
        // Wherever it stops: within the head, before the body, and within it.
        for (left, seq) in [100, BODY.len(), 2].into_iter().zip(1..) {
            let whole = [head(seq, true).as_bytes(), BODY].concat();
            let sent = whole.len() - left;
            let (mut late, mut repeat) = (Raw::open(&gateway), Raw::open(&gateway));
            late.send(&whole[..sent]);
            // The gateway has seen what was sent when it answers to what came after it.
            get(&format!("{}healthz", gateway.url()), &[]);
            repeat.send(head(seq, false).as_bytes()).send(BODY);
            let repeated = repeat.answer().expect("an answer");
            late.send(&whole[sent..]);
            let first = late.answer().expect("an answer");
            assert_eq!(
                (repeated.status, first.status),
                (200, 200),
                "{}",
                first.body
            );
            assert_eq!(repeated.body, first.body);
            assert_eq!(get(&messages, &[]), "order\n".repeat(seq as usize));
        }
    }
}

#[test]
fn a_first_try_that_comes_when_its_client_has_gone_on_is_refused_unless_it_is_asked_for() {
    for (gateway, _folder) in gateways() {
        let push = |seq, first| {
            let mut client = Raw::open(&gateway);
            client.send(head(seq, first).as_bytes()).send(BODY);
            client.answer().expect("an answer").status
        };
        assert_eq!((push(7, true), push(6, true)), (200, 409));
        let messages = format!("{}v1/pipes/topic/messages", gateway.url());
        assert_eq!(get(&messages, &[]), "order\n");
    }
}

/// Also one with a number in it, in whatever order they come: only a mount's own keys say what is behind what.
#[test]
fn every_key_is_a_push_of_its_own() {
    for (gateway, _folder) in gateways() {
        let messages = format!("{}v1/pipes/topic/messages", gateway.url());
        let push = |number: u32| {
            let key = format!("Idempotency-Key: \"000102030405060708090a0b0c0d0e0f-{number}\"");
            get(&messages, &["-d", &number.to_string(), "-H", &key])
        };
        let numbers = [3, 1, 2];
        let pushed = numbers.map(push);
        assert_eq!(numbers.map(push), pushed);
        assert_eq!(get(&messages, &[]), "3\n1\n2\n");
    }
}

#[test]
fn a_repeat_that_comes_behind_a_reset_brings_nothing_back() {
    for dropped in ["/messages", ""] {
        for (gateway, _folder) in gateways() {
            let pipe = format!("{}v1/pipes/topic", gateway.url());
            let messages = format!("{pipe}/messages");
            let push = |seq, first| {
                let mut client = Raw::open(&gateway);
                client.send(head(seq, first).as_bytes()).send(BODY);
                client.answer().expect("an answer").status
            };
            let drop_all = || {
                let answer = curl(&["-X", "DELETE", &format!("{pipe}{dropped}")]);
                assert_eq!(answer.0, 200, "{}", answer.1);
            };
            let assert_empty = || {
                let (status, body) = curl(&[&messages]);
                // One that was removed is not even there.
                assert!(body.is_empty() || status == 404, "{body}");
            };
            let whole = [head(1, false).as_bytes(), BODY].concat();
            let (last, rest) = whole.split_last().expect("bytes");
            let mut late = Raw::open(&gateway);
            late.send(rest);
            assert_eq!(push(1, false), 200);
            drop_all();
            late.send(&[*last]);
            assert_eq!(late.answer().expect("an answer").status, 200);
            assert_empty();
            // Behind many later ones, too.
            for seq in 2..=40 {
                assert_eq!(push(seq, true), 200);
            }
            drop_all();
            assert_eq!((push(2, false), push(20, false)), (200, 200));
            assert_empty();
        }
    }
}

#[test]
fn the_same_key_at_the_same_time_is_stored_once() {
    for (gateway, _folder) in gateways() {
        let messages = format!("{}v1/pipes/topic/messages", gateway.url());
        for seq in 1..=20 {
            let whole = [head(seq, true).as_bytes(), BODY].concat();
            let mut clients: Vec<Raw> = (0..8).map(|_| Raw::open(&gateway)).collect();
            let (last, rest) = whole.split_last().expect("bytes");
            for client in &mut clients {
                client.send(rest);
            }
            for client in &mut clients {
                client.send(&[*last]);
            }
            let answers: Vec<String> = clients
                .iter_mut()
                .map(|client| client.answer().expect("an answer").body)
                .collect();
            assert!(
                answers.iter().all(|answer| *answer == answers[0]),
                "{answers:?}"
            );
            assert_eq!(get(&messages, &[]).lines().count(), seq as usize);
        }
    }
}

/// Passes requests on to the gateway, and swallows the first answer to one that begins with `method`, once
/// `meanwhile` has happened.
fn swallow_one_answer(
    gateway: &Gateway,
    method: &'static str,
    meanwhile: impl Fn() + Send + 'static,
) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("its address").port();
    let behind = gateway.port();
    std::thread::spawn(move || {
        let mut swallowed = false;
        for client in listener.incoming() {
            let (mut client, mut bytes) = (client.expect("a connection"), [0; 65536]);
            let mut gateway = TcpStream::connect(("127.0.0.1", behind)).expect("the gateway");
            // One request and its answer at a time, each in one piece, as they are small.
            while let Ok(count @ 1..) = client.read(&mut bytes) {
                gateway.write_all(&bytes[..count]).expect("passed on");
                let last = !swallowed && bytes.starts_with(method.as_bytes());
                let count = gateway.read(&mut bytes).expect("an answer");
                if last {
                    swallowed = true;
                    meanwhile();
                    break;
                }
                client.write_all(&bytes[..count]).expect("passed back");
            }
        }
    });
    port
}

#[test]
fn a_removal_whose_answer_was_lost_is_no_error_when_it_is_repeated() {
    let gateway = Gateway::start("memory:", &[]);
    let port = swallow_one_answer(&gateway, "DELETE", || ());
    let dnpipes = |args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_dnpipes"));
        command
            .args(args)
            .env("DNPIPES_SOURCE", format!("http://127.0.0.1:{port}/"));
        command.output().expect("it runs")
    };
    assert!(dnpipes(&["push", "topic", "x"]).status.success());
    let removed = dnpipes(&["rm", "topic"]);
    assert!(removed.status.success(), "{removed:?}");
    // One that nobody had removed is an error still.
    assert_eq!(dnpipes(&["rm", "topic"]).status.code(), Some(1));
}

#[tokio::test]
async fn who_has_made_a_pipe_is_not_known_where_the_answer_was_lost() {
    let gateway = Gateway::start("memory:", &[]);
    let port = swallow_one_answer(&gateway, "PUT", || ());
    let url = HttpUrl::parse(&format!("http://127.0.0.1:{port}/")).expect("legal");
    let client = Http::open(&url).expect("a client");
    let client = Retry::new(Arc::new(client), Some(Duration::from_secs(20)));
    let pipe = PipeName::new("topic").expect("legal");
    let error = client.create(&pipe).await.expect_err("it is not known");
    assert_eq!(
        (error.kind(), error.applied()),
        (Kind::AlreadyExists, Applied::Unknown)
    );
    // What nothing was lost of is known.
    assert!(!client.create(&pipe).await.expect("an answer"));
}

#[test]
fn a_push_whose_answer_was_lost_stays_in_doubt_when_its_repeat_is_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let tokens = folder.path().join("tokens");
    let file = tokens.clone();
    let admit = move |token: &str| fs::write(&file, token).expect("the tokens");
    admit("a-token-of-the-tests\n");
    let gateway = Gateway::start("memory:", &["--token-file", &text(&tokens)]);
    let (pid, list) = (gateway.pid(), format!("{}v1/pipes", gateway.url()));
    let port = swallow_one_answer(&gateway, "POST", move || {
        admit("another-token-of-the-tests\n");
        // SAFETY: the gateway is not reaped before the test ends.
        assert_eq!(unsafe { libc::kill(pid, libc::SIGHUP) }, 0);
        let another = "Authorization: Bearer another-token-of-the-tests";
        while curl(&["-H", another, &list]).0 != 200 {}
    });
    let url = HttpUrl::parse(&format!("http://:a-token-of-the-tests@127.0.0.1:{port}/"));
    let client = Http::open(&url.expect("legal")).expect("a client");
    let client = Retry::new(Arc::new(client), Some(Duration::from_secs(20)));
    let id = PushId::first(Producer::random().expect("randomness"), 1);
    let batch = Batch::new(vec!["x".into()]).expect("one");
    let pipe = PipeName::new("topic").expect("legal");
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let refused = runtime.block_on(client.push(&pipe, id, batch));
    let error = refused.expect_err("refused");
    // Whoever writes it again must do so under the same identity.
    assert_eq!(
        (error.kind(), error.applied()),
        (Kind::Denied, Applied::Unknown)
    );
}

#[tokio::test]
async fn what_is_written_again_after_a_reset_by_others_is_there() {
    for dropped in ["/messages", ""] {
        for (gateway, _folder) in gateways() {
            let port = swallow_one_answer(&gateway, "POST", || ());
            let url = HttpUrl::parse(&format!("http://127.0.0.1:{port}/")).expect("legal");
            let client = Arc::new(Http::open(&url).expect("a client"));
            let pipe = PipeName::new("topic").expect("legal");
            let writer = Writer::new(client, pipe, Frame::Line, 1 << 20);
            let line = Bytes::from_static(b"line\n");
            let unknown = writer.write(0, line.clone(), false).await;
            let error = unknown.expect_err("its answer was lost");
            assert_eq!(error.applied(), Applied::Unknown);
            let pipe = format!("{}v1/pipes/topic", gateway.url());
            let messages = format!("{pipe}/messages");
            assert_eq!(get(&messages, &[]), "line\n");
            assert_eq!(curl(&["-X", "DELETE", &format!("{pipe}{dropped}")]).0, 200);
            let again = writer.write(0, line.clone(), false).await;
            assert_eq!(again.expect("written"), 5);
            assert_eq!(get(&messages, &[]), "line\n");
            // And what nothing was unknown of is another push.
            writer.write(0, line, false).await.expect("written");
            assert_eq!(get(&messages, &[]), "line\nline\n");
        }
    }
}
