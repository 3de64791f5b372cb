//! What no client should send. It is refused, or its connection is closed, and nobody else notices.

use std::time::{Duration, Instant};

use crate::gateway::Gateway;
use crate::raw::{DEADLINE, Raw};

/// What anybody else waits for an answer at most, whatever goes on.
const AT_ONCE: Duration = Duration::from_secs(5);

fn push(head: &str, body: &str) -> Vec<u8> {
    format!("POST /v1/pipes/bad/messages HTTP/1.1\r\nHost: localhost\r\n{head}\r\n{body}")
        .into_bytes()
}

/// Anybody else pushes and pulls as if nothing were.
fn assert_well(gateway: &Gateway, what: &str) {
    let since = Instant::now();
    let mut other = Raw::open(gateway);
    let text = format!("{what:?}\n");
    let length = text.len();
    let request = format!(
        "POST /v1/pipes/well/messages HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n{text}"
    );
    let pushed = other.send(request.as_bytes()).answer();
    assert_eq!(pushed.expect(what).status, 200, "{what}");
    let request = "GET /v1/pipes/well/messages HTTP/1.1\r\nHost: localhost\r\n\r\n";
    let pulled = other.send(request.as_bytes()).answer().expect(what);
    assert!(pulled.body.contains(&text), "{what}: {}", pulled.body);
    assert!(since.elapsed() < AT_ONCE, "{what}: {:?}", since.elapsed());
}

/// How many messages came of what is bad.
fn stored(gateway: &Gateway) -> usize {
    let request = "GET /v1/pipes/bad/messages HTTP/1.1\r\nHost: localhost\r\n\r\n";
    let pulled = Raw::open(gateway).send(request.as_bytes()).answer();
    pulled.expect("an answer").body.matches("bad!").count()
}

/// Sends each on a connection of its own and expects one of the statuses, or none if 0 is one of them.
fn assert_refused(gateway: &Gateway, cases: &[(&str, Vec<u8>)], statuses: &[u16]) {
    for (what, bytes) in cases {
        let answer = Raw::open(gateway).send(bytes).answer();
        let status = answer.as_ref().map_or(0, |answer| answer.status);
        assert!(statuses.contains(&status), "{what}: {status}");
        if let Some(answer) = answer
            && answer.head.contains("problem+json")
        {
            let said = format!("\"status\":{status}");
            assert!(answer.body.contains(&said), "{what}: {}", answer.body);
        }
        assert_well(gateway, what);
    }
    assert_eq!(stored(gateway), 0);
}

#[test]
fn what_is_no_http_is_refused() {
    let gateway = Gateway::start("memory:", &[]);
    let cases = [
        (
            "a TLS client",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03".to_vec(),
        ),
        ("HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec()),
        ("HTTP/0.9", b"GET /v1/pipes\r\n\r\n".to_vec()),
        ("bytes", b"\xff\xfe\x00\x01\r\n\r\n".to_vec()),
        ("no path", b"GET HTTP/1.1\r\n\r\n".to_vec()),
        (
            "a space in a name",
            b"GET / HTTP/1.1\r\nHo st: x\r\n\r\n".to_vec(),
        ),
        (
            "NUL in a path",
            b"GET /v1/pipes/a\0b HTTP/1.1\r\nHost: localhost\r\n\r\n".to_vec(),
        ),
        (
            "NUL in a header",
            b"GET /v1/pipes HTTP/1.1\r\nHost: localhost\r\nA: b\0c\r\n\r\n".to_vec(),
        ),
        (
            "a bare newline in a header",
            b"GET / HTTP/1.1\r\nA: b\rc\r\n\r\n".to_vec(),
        ),
    ];
    // To HTTP/2 there is no answer.
    assert_refused(&gateway, &cases, &[0, 400]);
}

#[test]
fn names_and_queries_that_are_no_text_are_refused() {
    let gateway = Gateway::start("memory:", &[]);
    let get = |path: &[u8]| {
        [
            b"GET /v1/pipes/",
            path,
            b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        ]
        .concat()
    };
    let cases = [
        ("%ff", get(b"%ff")),
        ("%ff in front of a path", get(b"%ff/messages")),
        ("half a letter", get(b"t%c3/messages")),
        ("a raw byte", get(b"\xff")),
        ("%00", get(b"a%00b")),
        ("a newline", get(b"a%0ab/bounds")),
        ("a slash", get(b"a%2fb")),
        ("two dots", get(b"%2e%2e/messages")),
        ("%ff in a query", get(b"well/messages?frame=%ff")),
        ("%ff as a position", get(b"well/bounds?after=%ff")),
        ("%00 in a query", get(b"well/messages?wait=%00")),
        ("a raw byte in a query", get(b"well/messages?limit=\xff")),
        ("an unknown %ff", get(b"well/messages?%ff=1")),
        ("a parameter twice", get(b"well/messages?limit=1&limit=2")),
    ];
    assert_refused(&gateway, &cases, &[400]);
}

#[test]
fn long_heads_are_refused() {
    let gateway = Gateway::start("memory:", &[]);
    let long = "x".repeat(100 << 10);
    let many = "A: b\r\n".repeat(2000);
    let endless = format!("GET /healthz HTTP/1.1\r\nA: {long}");
    let cases = [
        ("a long header", push(&format!("A: {long}\r\n"), "bad!\n")),
        ("many headers", push(&many, "bad!\n")),
        (
            "a long path",
            format!("GET /{long} HTTP/1.1\r\nHost: localhost\r\n\r\n").into_bytes(),
        ),
        (
            "a long method",
            format!("{long} / HTTP/1.1\r\nHost: localhost\r\n\r\n").into_bytes(),
        ),
        ("a header without an end", endless.into_bytes()),
    ];
    // The gateway may have closed the connection before all was sent; then its answer is lost.
    assert_refused(&gateway, &cases, &[0, 400, 414, 431]);
}

#[test]
fn lengths_that_make_no_sense_are_refused() {
    let gateway = Gateway::start("memory:", &[]);
    let max = u64::MAX.to_string();
    let over = format!("{max}0");
    let terabyte = (1_u64 << 40).to_string();
    for length in ["", "x", "-1", "+5", "0x5", "5 5", "5, 6", &over] {
        let case = push(&format!("Content-Length: {length}\r\n"), "bad!\n");
        assert_refused(&gateway, &[(length, case)], &[400]);
    }
    // Said at once, without waiting for a body.
    for length in [&max, &terabyte, "72351745"] {
        let plain = push(&format!("Content-Length: {length}\r\n"), "");
        let asking = format!("Content-Length: {length}\r\nExpect: 100-continue\r\n");
        let cases = [(length, plain), (length, push(&asking, ""))];
        assert_refused(&gateway, &cases, &[413, 431]);
    }
    let two = push("Content-Length: 5\r\nContent-Length: 6\r\n", "bad!\n");
    assert_refused(&gateway, &[("two lengths", two)], &[400]);
}

#[test]
fn wrong_chunks_are_refused() {
    let gateway = Gateway::start("memory:", &[]);
    let chunked = |body: &str| push("Transfer-Encoding: chunked\r\n", body);
    let long = "x".repeat(100 << 10);
    let cases = [
        ("no number", chunked("zz\r\nbad!\r\n0\r\n\r\n")),
        (
            "a number that is too long",
            chunked("ffffffffffffffffff\r\nbad!"),
        ),
        ("a negative number", chunked("-4\r\nbad!\r\n0\r\n\r\n")),
        ("no number at all", chunked("\r\nbad!\r\n0\r\n\r\n")),
        ("no end of a chunk", chunked("4\r\nbad!bad!\r\n0\r\n\r\n")),
        (
            "a long extension",
            chunked(&format!("4;{long}\r\nbad!\r\n0\r\n\r\n")),
        ),
        (
            "a long trailer",
            chunked(&format!("4\r\nbad!\r\n0\r\nA: {long}\r\n\r\n")),
        ),
        (
            "another encoding",
            push("Transfer-Encoding: gzip\r\n", "bad!\n"),
        ),
        (
            "chunked not last",
            push("Transfer-Encoding: chunked, gzip\r\n", "bad!\n"),
        ),
        (
            "chunked in HTTP/1.0",
            b"POST /v1/pipes/bad/messages HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nbad!"
                .to_vec(),
        ),
    ];
    assert_refused(&gateway, &cases, &[0, 400]);
}

#[test]
fn compressed_bodies_are_refused_however_they_are_announced() {
    let gateway = Gateway::start("memory:", &[]);
    let chunked = |head: &str| push(head, "5\r\nbad!\n\r\n0\r\n\r\n");
    let two = "Content-Length: 5\r\nContent-Encoding: identity\r\nContent-Encoding: gzip\r\n";
    let cases = [
        ("of two", chunked("Transfer-Encoding: gzip, chunked\r\n")),
        (
            "of two lines",
            chunked("Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n"),
        ),
        ("a second header", push(two, "bad!\n")),
    ];
    assert_refused(&gateway, &cases, &[415]);
    let plain = chunked("Transfer-Encoding: Chunked\r\nContent-Encoding: Identity\r\n");
    let answer = Raw::open(&gateway).send(&plain).answer();
    assert_eq!(answer.expect("an answer").status, 200);
}

#[test]
fn a_body_with_two_framings_ends_its_connection() {
    let gateway = Gateway::start("memory:", &[]);
    assert_well(&gateway, "before");
    // What a proxy that believes the length takes for the body is a request to others.
    let hidden = "DELETE /v1/pipes/well/messages HTTP/1.1\r\nHost: localhost\r\n\r\n";
    for order in [
        "Content-Length: 100\r\nTransfer-Encoding: chunked\r\n",
        "Transfer-Encoding: chunked\r\nContent-Length: 100\r\n",
    ] {
        let mut raw = Raw::open(&gateway);
        raw.send(&push(order, &format!("0\r\n\r\n{hidden}")));
        let answer = raw.answer().expect("an answer");
        assert!(answer.body.contains("\"count\":0"), "{}", answer.body);
        assert!(raw.is_closed(), "{order}");
    }
    let request = b"GET /v1/pipes/well/messages HTTP/1.1\r\nHost: localhost\r\n\r\n";
    let pulled = Raw::open(&gateway)
        .send(request)
        .answer()
        .expect("messages");
    assert_eq!(pulled.body.matches("before").count(), 1);
}

#[test]
fn what_breaks_off_stores_nothing() {
    let gateway = Gateway::start("memory:", &[]);
    let whole = push("Content-Length: 10\r\n", "bad!\nbad!\n");
    // Every cut: in the head, at its end, in the body.
    for cut in 0..whole.len() {
        let mut raw = Raw::open(&gateway);
        let answer = raw.send(&whole[..cut]).end().answer();
        let status = answer.map_or(0, |answer| answer.status);
        assert!([0, 400].contains(&status), "cut at {cut}: {status}");
        drop(raw);
        // And without waiting for what is answered.
        Raw::open(&gateway).send(&whole[..cut]);
    }
    assert_well(&gateway, "cut");
    assert_eq!(stored(&gateway), 0);

    // Of a stream every whole message counts, and the answer says how many.
    let mut raw = Raw::open(&gateway);
    let begun = push("Transfer-Encoding: chunked\r\n", "7\r\nbad!\nba\r\n");
    raw.send(&begun);
    let since = Instant::now();
    while stored(&gateway) < 1 {
        assert!(since.elapsed() < DEADLINE, "what has come is not stored");
    }
    let answer = raw.end().answer().expect("an answer");
    assert_eq!(answer.status, 400);
    assert!(answer.body.contains("\"stored\":1"), "{}", answer.body);
    assert_eq!(stored(&gateway), 1);
}

#[test]
fn requests_in_one_piece_are_answered_in_order() {
    let gateway = Gateway::start("memory:", &[]);
    let mut all = Vec::new();
    for number in 0..50 {
        let text = format!("{number:03}\n");
        all.extend(push("Content-Length: 4\r\n", &text));
        let after = format!("messages?after=0-{number}");
        all.extend(
            format!("GET /v1/pipes/bad/{after} HTTP/1.1\r\nHost: localhost\r\n\r\n").into_bytes(),
        );
    }
    all.extend(b"GET /nowhere HTTP/1.1\r\nHost: localhost\r\n\r\nnonsense\r\n\r\n");
    let mut raw = Raw::open(&gateway);
    raw.send(&all);
    for _ in 0..50 {
        let pushed = raw.answer().expect("an answer to a push");
        assert_eq!(pushed.status, 200, "{}", pushed.body);
        assert_eq!(raw.answer().expect("an answer to a pull").status, 200);
    }
    assert_eq!(raw.answer().expect("an answer").status, 404);
    assert_eq!(raw.answer().expect("an answer").status, 400);
    assert!(raw.is_closed());
}

#[test]
fn who_is_slow_holds_up_nobody() {
    let gateway = Gateway::start("memory:", &[]);
    let head = b"GET /v1/pipes HTTP/1.1\r\nHost: localhost\r\nX-Slow: ";
    let body = push("Content-Length: 1000000\r\n", "slow\n");
    let stream = push("Transfer-Encoding: chunked\r\n", "ffff\r\nslow");
    let mut slow: Vec<Raw> = (0..100).map(|_| Raw::open(&gateway)).collect();
    for (number, raw) in slow.iter_mut().enumerate() {
        raw.send([&head[..], &body, &stream][number % 3]);
    }
    for _ in 0..20 {
        for raw in &mut slow {
            raw.send(b"x");
        }
        assert_well(&gateway, "drops");
    }

    // Who is slow, but comes to an end, is answered.
    let whole = push("Content-Length: 10\r\n", "bad!\nbad!\n");
    let mut raw = Raw::open(&gateway);
    for byte in &whole {
        raw.send(&[*byte]);
    }
    assert_eq!(raw.answer().expect("an answer").status, 200);
    assert_eq!(stored(&gateway), 2);
}

#[test]
fn odd_requests_are_answered() {
    let gateway = Gateway::start("memory:", &[]);
    assert_well(&gateway, "before");
    for (request, status) in [
        ("CONNECT x:80", 404),
        ("OPTIONS *", 404),
        ("TRACE /v1/pipes", 405),
        ("ODD /v1/pipes", 405),
        ("GET //healthz", 404),
        ("GET /v1/pipes/../../etc/passwd", 404),
        ("GET http://other/healthz", 200),
        // Without a body there is nothing to wait for.
        ("HEAD /v1/pipes/well/messages?follow", 200),
        ("HEAD /v1/pipes/none/messages?wait=3600", 200),
        (
            "GET /v1/pipes/well/messages?wait=18446744073709551615s%201000000000ns",
            400,
        ),
        (
            "GET /v1/pipes/well/messages?wait=5124095576030431h15s1000ms",
            400,
        ),
        (
            "GET /v1/pipes/well/messages?limit=18446744073709551616",
            400,
        ),
    ] {
        let since = Instant::now();
        let bytes = format!("{request} HTTP/1.1\r\nHost: localhost\r\n\r\n");
        let answer = Raw::open(&gateway)
            .send(bytes.as_bytes())
            .answer_to(request);
        assert_eq!(
            answer.map(|answer| answer.status),
            Some(status),
            "{request}"
        );
        assert!(since.elapsed() < AT_ONCE, "{request}");
    }
    assert_well(&gateway, "after");
}

#[test]
fn who_stops_within_a_long_body_makes_room_for_others() {
    let gateway = Gateway::start("memory:", &[]);
    let length = 1 << 20;
    let begun = "x".repeat(length - 1);
    let whole = push(&format!("Content-Length: {length}\r\n"), &begun);
    let chunk = format!("{length:x}\r\n{begun}");
    let stream = push("Transfer-Encoding: chunked\r\n", &chunk);
    // More than there is room for.
    let mut slow: Vec<Raw> = (0..40).map(|_| Raw::open(&gateway)).collect();
    for (number, raw) in slow.iter_mut().enumerate() {
        raw.send([&whole, &stream][number % 2]);
    }
    let since = Instant::now();
    let refused = |raw: &Raw| {
        raw.stream.set_nonblocking(true).expect("no wait");
        let mut piece = [0; 12];
        raw.stream.peek(&mut piece).is_ok() && &piece == b"HTTP/1.1 408"
    };
    // Others are served while the room fills up, when it is full, and when it is taken from the slow ones.
    let kept = |nth: usize| !slow.iter().skip(nth).step_by(2).any(refused);
    while kept(0) || kept(1) {
        for length in [10, 100_000, length] {
            let text = "y".repeat(length);
            let request = format!(
                "POST /v1/pipes/well/messages HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n{text}"
            );
            let pushed = Raw::open(&gateway).send(request.as_bytes()).answer();
            assert_eq!(pushed.expect("an answer").status, 200, "{length}");
        }
        let reset = b"DELETE /v1/pipes/well/messages HTTP/1.1\r\nHost: localhost\r\n\r\n";
        let reset = Raw::open(&gateway).send(reset).answer();
        assert_eq!(reset.expect("an answer").status, 200);
        // Where nobody needs their room they have longer than this.
        assert!(since.elapsed() < 2 * AT_ONCE, "the slow ones are kept");
    }
}
