//! Readers of a gateway whose own source is slow, or away.

use std::fs;
use std::net::TcpListener;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::between::Between;
use crate::curl::{Curl, get};
use crate::gateway::{Gateway, text};

/// What does not come within this time does not come.
const DEADLINE: Duration = Duration::from_secs(30);

fn messages(gateway: &Gateway) -> String {
    format!("{}v1/pipes/topic/messages", gateway.url())
}

/// A follower that ends where nothing comes.
fn follow(gateway: &Gateway) -> Curl {
    Curl::start(&["-m", "30", &format!("{}?follow", messages(gateway))])
}

#[test]
fn a_follower_of_a_source_that_answers_slowly_gets_everything() {
    let source = Gateway::start("memory:", &[]);
    let slow = Between::delaying(&source, Duration::from_millis(600));
    let gateway = Gateway::start(&slow.url(), &["--timeout", "20s"]);
    get(&messages(&source), &["-d", "one"]);
    let mut follower = follow(&gateway);
    assert_eq!(follower.line(), "one");
    get(&messages(&source), &["-d", "two"]);
    assert_eq!(follower.line(), "two");
}

#[test]
fn a_source_that_is_away_is_logged_once_by_a_follower_that_then_goes_on() {
    let folder = tempfile::tempdir().expect("a folder");
    let store = format!("sqlite:{}/pipes.db", folder.path().display());
    let log = folder.path().join("log");
    let source = Gateway::start(&store, &[]);
    let port = source.port();
    let logging = ["sh", "-c", "exec \"$@\" 2> \"$0\"", &text(&log)];
    let flags = ["--timeout", "1s"];
    let gateway = Gateway::start_at(source.url(), &flags, "127.0.0.1:0", &logging);
    get(&messages(&gateway), &["-d", "one"]);
    let mut follower = follow(&gateway);
    assert_eq!(follower.line(), "one");

    drop(source);
    let nobody = TcpListener::bind(("127.0.0.1", port)).expect("its port");
    nobody.set_nonblocking(true).expect("no wait");
    let since = Instant::now();
    let mut tries = 0;
    // With pauses between them that grow to a second: longer than the timeout, and than a look for resets.
    while tries < 12 {
        tries += usize::from(nobody.accept().is_ok());
        assert!(since.elapsed() < DEADLINE, "only {tries} tries");
    }
    drop(nobody);
    let source = Gateway::start_at(&store, &[], &format!("127.0.0.1:{port}"), &[]);
    get(&messages(&source), &["-d", "two"]);
    assert_eq!(follower.line(), "two");
    let log = fs::read_to_string(&log).expect("its log");
    assert_eq!(log.matches("reading topic").count(), 1, "{log}");
}

#[test]
fn who_waits_for_a_first_message_is_not_told_of_an_end_while_the_source_is_away() {
    let source = Gateway::start("memory:", &[]);
    let gateway = Gateway::start(source.url(), &["--timeout", "3s"]);
    let wait = format!("{}?wait=1s", messages(&gateway));
    let pull = || {
        let mut curl = Command::new("curl");
        curl.args(["-sS", "-m", "30", &wait])
            .output()
            .expect("curl")
    };
    assert!(pull().status.success(), "nothing comes");
    drop(source);
    assert!(!pull().status.success(), "nobody knows whether it came");
}

/// Longer than a stream may be silent: what is being sent is no silence.
#[test]
fn a_push_that_takes_long_to_send_arrives() {
    const BYTES: usize = 3_600_000;
    let gateway = Gateway::start("memory:", &[]);
    let slow = Between::slow(&gateway, 220_000);
    let mut push = Command::new("sh");
    push.arg("-c").arg(format!(
        "head -c {BYTES} /dev/zero | {} push --source {} --frame file topic",
        env!("CARGO_BIN_EXE_dnpipes"),
        slow.url()
    ));
    let since = Instant::now();
    let output = push.output().expect("sh");
    assert!(output.status.success(), "{output:?}");
    assert!(since.elapsed() > Duration::from_secs(15), "it was not slow");
    let pulled = get(&messages(&gateway), &[]);
    assert_eq!(pulled.len(), BYTES + 1);
}
