//! Pushes whose first request arrives behind the repeated one, as over a network that was cut and is whole
//! again.

use crate::curl::get;
use crate::gateway::Gateway;
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
         Idempotency-Key: \"000102030405060708090a0b0c0d0e0f-{seq}\"\r\n\
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
