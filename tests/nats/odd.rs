//! Messages of foreign publishers that the client's parser cannot read: it breaks the connection over them.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use dnpipes::backend::retry::Retry;
use dnpipes::backend::{Backend, Limit, Source, Start};
use dnpipes::error::Kind;
use serde_json::json;

use crate::services::Services;
use crate::{Other, batch, client, name, new_id, pull, push, refused};

/// Blocks of headers that a server stores, whatever they hold.
pub(crate) const ODD: [&[u8]; 12] = [
    b"NATS/1.0\r\nX: \xff\xfe\r\n\r\n",
    b"NATS/1.0\r\nno colon\r\n\r\n",
    b"NATS/1.0\r\nbad name: x\r\n\r\n",
    b"NATS/1.0 odd text\r\n\r\n",
    b"NATS/1.0 100 Idle Heartbeat\r\n\r\n",
    b"NATS/1.0 404 No Messages\r\nNats-Pending-Bytes: 1000000\r\n\r\n",
    b"NATS/1.0 409 Consumer Deleted\r\n\r\n",
    b"NATS/1.0 503\r\n\r\n",
    b"\r\n\r\n",
    b"\xff\r\n\r\n",
    b"no headers at all",
    b"NATS/1.0\r\nfolded: a\r\n b\r\n\r\n",
];

/// A client that checks nothing.
pub(crate) struct Raw(BufReader<TcpStream>);

impl Raw {
    pub(crate) fn new(services: &Services) -> Self {
        Raw::as_user(services, "")
    }

    fn as_user(services: &Services, user: &str) -> Self {
        let stream = TcpStream::connect(("127.0.0.1", services.server().port));
        let mut raw = Raw(BufReader::new(stream.expect("a connection")));
        let hello = json!({
            "verbose": false, "pedantic": false, "headers": true, "user": user, "pass": "s3cret",
        });
        raw.send(&[format!("CONNECT {hello}\r\n").as_bytes()]);
        raw
    }

    /// Sends, and waits until the server has taken it.
    fn send(&mut self, parts: &[&[u8]]) {
        let bytes = [&parts.concat()[..], b"PING\r\n"].concat();
        self.0.get_mut().write_all(&bytes).expect("sent");
        let mut line = String::new();
        while line != "PONG\r\n" {
            line.clear();
            self.0.read_line(&mut line).expect("an answer");
            assert!(!line.starts_with("-ERR"), "{line}");
        }
    }

    pub(crate) fn publish(&mut self, subject: &[u8], headers: Option<&[u8]>, data: &[u8]) {
        let line = match headers {
            Some(headers) => {
                let (head, all) = (headers.len(), headers.len() + data.len());
                [b"HPUB ", subject, format!(" {head} {all}\r\n").as_bytes()].concat()
            }
            None => [b"PUB ", subject, format!(" {}\r\n", data.len()).as_bytes()].concat(),
        };
        self.send(&[&line, headers.unwrap_or_default(), data, b"\r\n"]);
    }
}

const NEXT: Limit = Limit {
    max_bytes: 1 << 20,
    before: None,
};

/// Reads `count` messages, as a mount does.
async fn read(source: &mut Box<dyn Source>, count: usize) -> Vec<String> {
    let mut texts = Vec::new();
    while texts.len() < count {
        let next = tokio::time::timeout(Duration::from_secs(60), source.next(NEXT)).await;
        let next = next.unwrap_or_else(|_| panic!("it stands still behind {texts:?}"));
        for message in next.expect("messages") {
            texts.push(String::from_utf8_lossy(&message.data).into_owned());
        }
    }
    texts
}

/// As in a mount: what is unreachable is tried again for a while.
fn patient(services: &Services) -> Retry {
    let client = client(&services.url());
    Retry::new(Arc::new(client), Some(Duration::from_secs(30)))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_with_malformed_headers_is_read_and_keeps_nobody_up() {
    for kind in ["nats", "nats-new"] {
        let services = Services::start(&[kind]);
        let (client, mut raw) = (patient(&services), Raw::new(&services));
        for pipe in ["topic", "other"] {
            client.create(&name(pipe)).await.expect("made");
        }
        let mut live = client
            .subscribe(&name("topic"), Start::Oldest)
            .await
            .expect("a source");
        let mut beside = client
            .subscribe(&name("other"), Start::Oldest)
            .await
            .expect("a source");
        let mut expected = Vec::new();
        for (at, headers) in ODD.iter().enumerate() {
            let (plain, odd) = (format!("plain {at}"), format!("odd {at}"));
            client
                .push(&name("topic"), new_id(), batch(&[&plain]))
                .await
                .expect("stored");
            raw.publish(b"dnpipes-topic", Some(headers), odd.as_bytes());
            let shown = String::from_utf8_lossy(headers);
            assert_eq!(
                read(&mut live, 2).await,
                [&*plain, &*odd],
                "{kind}: {shown:?}"
            );
            client
                .push(&name("other"), new_id(), batch(&[&plain]))
                .await
                .expect("stored");
            assert_eq!(read(&mut beside, 1).await, [&*plain], "{kind}: {shown:?}");
            expected.extend([plain, odd]);
        }
        client
            .push(&name("topic"), new_id(), batch(&["end"]))
            .await
            .expect("stored");
        expected.push("end".to_owned());
        assert_eq!(read(&mut live, 1).await, ["end"]);
        // Who comes later finds all of it at once.
        let mut late = client
            .subscribe(&name("topic"), Start::Oldest)
            .await
            .expect("a source");
        assert_eq!(read(&mut late, expected.len()).await, expected, "{kind}");
    }
}

#[tokio::test]
async fn a_repeated_push_is_found_among_malformed_messages() {
    for kind in ["nats", "nats-new"] {
        let services = Services::start(&[kind]);
        let mut raw = Raw::new(&services);
        let id = new_id();
        let first = client(&services.url());
        let pipe = name("topic");
        first.create(&pipe).await.expect("made");
        raw.publish(b"dnpipes-topic", Some(ODD[0]), b"odd");
        let pushed = first.push(&pipe, id, batch(&["a", "b"])).await;
        for headers in ODD.iter().chain(&ODD) {
            raw.publish(b"dnpipes-topic", Some(headers), b"odd");
            push(&first, "topic", &["plain"]).await.expect("stored");
        }
        // A client that does not know whether the server still remembers it.
        let second = client(&services.url());
        let again = second.push(&pipe, id.again(), batch(&["a", "b"])).await;
        assert_eq!(again.expect("found"), pushed.expect("stored"), "{kind}");
        let count = second.stat(&pipe).await.expect("stat").count;
        assert_eq!(count, 3 + 4 * ODD.len() as u64, "{kind}");
        // Nor did it break the connection for pushes.
        push(&second, "topic", &["x"]).await.expect("stored");
    }
}

#[tokio::test]
async fn a_message_under_a_subject_that_is_no_text_is_read() {
    for kind in ["nats", "nats-new"] {
        let services = Services::start(&[kind]);
        let (other, mut raw) = (Other::new(&services).await, Raw::new(&services));
        let wild = json!({ "subjects": ["wild.>"] });
        other.stream("dnpipes-WILD", wild).await;
        let plain = Some(&b"NATS/1.0\r\nA: b\r\n\r\n"[..]);
        let mut expected = Vec::new();
        for subject in [
            "wild.x".as_bytes(),
            b"wild.\xff",
            "wild.\u{3000}x".as_bytes(),
        ] {
            for headers in [None, plain] {
                let text = format!("{}", expected.len());
                raw.publish(subject, headers, text.as_bytes());
                expected.push(text);
            }
        }
        let client = client(&services.url());
        // They are stored a moment after the server has taken them.
        let mut source = client
            .subscribe(&name("WILD"), Start::Oldest)
            .await
            .expect("a source");
        assert_eq!(read(&mut source, expected.len()).await, expected);
    }
}

#[tokio::test]
async fn malformed_messages_of_any_size_and_number_are_read_in_their_order() {
    for kind in ["nats", "nats-new"] {
        let services = Services::start(&[kind]);
        let (client, mut raw) = (patient(&services), Raw::new(&services));
        client.create(&name("topic")).await.expect("made");
        let mut expected = Vec::new();
        for number in 0..1000 {
            // Alone, in groups, and among many others.
            let odd = number % 300 == 200 || number % 7 == 3 && number > 500;
            let text = number.to_string();
            raw.publish(
                b"dnpipes-topic",
                odd.then_some(ODD[number % 3]),
                text.as_bytes(),
            );
            expected.push(text);
        }
        let mut sources = Vec::new();
        for _ in 0..5 {
            let source = client.subscribe(&name("topic"), Start::Oldest).await;
            sources.push(source.expect("a source"));
        }
        let reads = sources.iter_mut().map(|source| read(source, 1000));
        for texts in futures_util::future::join_all(reads).await {
            assert!(texts == expected, "{kind}");
        }
        let headers = [b"NATS/1.0\r\nX: \xff", &vec![b'x'; 65_000][..], b"\r\n\r\n"].concat();
        let long = vec![b'y'; 31 << 20];
        raw.publish(b"dnpipes-topic", Some(&headers), &long);
        assert_eq!(read(&mut sources[0], 1).await[0].len(), long.len());
    }
}

#[tokio::test]
async fn who_may_not_fetch_a_malformed_message_is_told() {
    let users = r#"authorization { users: [
        { user: all, password: s3cret }
        { user: reads, password: s3cret, permissions: { publish: { deny: ["$JS.API.STREAM.MSG.GET.>"] } } }
    ] }"#;
    let services = Services::start(&["nats", "--set", users]);
    let at = format!("127.0.0.1:{}/", services.server().port);
    let all = client(&format!("nats://all:s3cret@{at}"));
    let reads = client(&format!("nats://reads:s3cret@{at}"));
    push(&all, "topic", &["a"]).await.expect("stored");
    assert_eq!(pull(&reads, "topic").await.expect("messages"), ["a"]);
    Raw::as_user(&services, "all").publish(b"dnpipes-topic", Some(ODD[0]), b"odd");
    assert_eq!(pull(&reads, "topic").await.expect("messages"), ["a"]);
    let mut source = reads
        .subscribe(&name("topic"), Start::Oldest)
        .await
        .expect("a source");
    source.next(NEXT).await.expect("a message");
    let error = refused(source.next(NEXT)).await;
    assert_eq!(error.kind(), Kind::Denied);
}

/// Passes on what a client and the server say, and once, with what the server says behind the first push, `evil`.
fn with_evil(services: &Services, evil: &'static [u8]) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("its address").port();
    let server = services.server().port;
    let done = Arc::new(AtomicBool::new(false));
    std::thread::spawn(move || {
        for client in listener.incoming() {
            let client = client.expect("a client");
            let server = TcpStream::connect(("127.0.0.1", server)).expect("the server");
            let halves = |from: &TcpStream, to: &TcpStream| {
                (
                    from.try_clone().expect("a copy"),
                    to.try_clone().expect("a copy"),
                )
            };
            let pushed = Arc::new(AtomicBool::new(false));
            let (done, seen) = (Arc::clone(&done), Arc::clone(&pushed));
            let (from, to) = halves(&client, &server);
            std::thread::spawn(move || {
                pass_on(from, to, |bytes| {
                    let is_push = bytes.windows(18).any(|part| part == b"PUB dnpipes-topic ");
                    seen.fetch_or(is_push, Ordering::SeqCst);
                    &[]
                })
            });
            std::thread::spawn(move || {
                pass_on(server, client, |_| match pushed.load(Ordering::SeqCst) {
                    true if !done.swap(true, Ordering::SeqCst) => evil,
                    _ => &[],
                })
            });
        }
    });
    port
}

fn pass_on(mut from: TcpStream, mut to: TcpStream, first: impl Fn(&[u8]) -> &'static [u8]) {
    let mut bytes = [0; 65536];
    while let Ok(count @ 1..) = from.read(&mut bytes) {
        if to.write_all(first(&bytes[..count])).is_err() || to.write_all(&bytes[..count]).is_err() {
            break;
        }
    }
    // The other one may have gone already.
    drop((from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both)));
}

#[tokio::test]
async fn what_stops_the_client_in_the_midst_of_its_work_costs_a_connection_and_no_more() {
    for evil in [
        &b"MSG x 1 18446744073709551613\r\n"[..],
        b"HMSG x 1 18446744073709551615 18446744073709551615\r\n",
        b"no word of the protocol\r\n",
    ] {
        let services = Services::start(&["nats-new"]);
        let url = format!("nats://127.0.0.1:{}/", with_evil(&services, evil));
        let client = Retry::new(Arc::new(client(&url)), Some(Duration::from_secs(20)));
        for text in ["one", "two", "three"] {
            let pushed = client.push(&name("topic"), new_id(), batch(&[text])).await;
            pushed.expect("stored");
        }
        let direct = crate::client(&services.url());
        assert_eq!(
            pull(&direct, "topic").await.expect("messages"),
            ["one", "two", "three"]
        );
    }
}
