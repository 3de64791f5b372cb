//! Answers that are cut off: what they said is asked for again, and what was done is known to have been done.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use dnpipes::backend::Backend;
use dnpipes::backend::http::{Http, HttpUrl};
use dnpipes::backend::retry::Retry;
use dnpipes::error::{Error, Kind};
use dnpipes::message::{Batch, Producer, PushId};
use dnpipes::name::PipeName;

use crate::between::Between;
use crate::gateway::{Gateway, text};

/// A client of the gateway, whose first answer of this status is cut.
fn client(gateway: &Gateway, status: u16) -> Retry {
    let between = Between::cutting(gateway, &[status]);
    let url = HttpUrl::parse(&between.url()).expect("legal");
    let http = Http::open(&url).expect("a client");
    Retry::new(Arc::new(http), Some(Duration::from_secs(20)))
}

fn topic() -> PipeName {
    PipeName::new("topic").expect("legal")
}

async fn push(client: &Retry, seq: u64, messages: Vec<Bytes>) -> Result<(), Error> {
    let id = PushId::first(Producer::from_bytes([7; 16]), seq);
    let batch = Batch::new(messages).expect("a batch");
    client.push(&topic(), id, batch).await.map(drop)
}

#[tokio::test]
async fn an_error_that_is_cut_is_asked_for_again() {
    let kind_of = |error: Error| (error.kind(), error.to_string());
    let gateway = Gateway::start("memory:?limit=4KiB", &[]);
    let missing = client(&gateway, 404).stat(&topic()).await.map(drop);
    let (kind, why) = kind_of(missing.expect_err("nothing is there"));
    assert_eq!(kind, Kind::NotFound, "{why}");
    // Nothing was removed, and that is known.
    let missing = client(&gateway, 404).remove(&topic()).await;
    let (kind, why) = kind_of(missing.expect_err("nothing is there"));
    assert_eq!(kind, Kind::NotFound, "{why}");
    let full = push(&client(&gateway, 507), 1, vec![vec![0; 5 << 10].into()]).await;
    let (kind, why) = kind_of(full.expect_err("no room"));
    assert_eq!(kind, Kind::Full, "{why}");
    let many = push(&client(&gateway, 413), 2, vec![Bytes::new(); (1 << 20) + 1]).await;
    let (kind, why) = kind_of(many.expect_err("too many"));
    assert_eq!(kind, Kind::TooLong, "{why}");
    assert!(why.contains("1048577 messages"), "{why}");
    // A first try that comes late is answered 409, which is asked for again as a repeat.
    let late = push(&client(&gateway, 409), 1, vec!["late".into()]).await;
    late.expect("it is stored");
    let stored = client(&gateway, 0)
        .stat(&topic())
        .await
        .expect("it is there");
    assert_eq!(stored.count, 1);

    let folder = tempfile::tempdir().expect("a folder");
    let tokens = folder.path().join("tokens");
    std::fs::write(&tokens, "a-token-that-is-known\n").expect("the tokens");
    let closed = Gateway::start("memory:", &["--token-file", &text(&tokens)]);
    let refused = client(&closed, 401).stat(&topic()).await.map(drop);
    let (kind, why) = kind_of(refused.expect_err("no token"));
    assert_eq!(kind, Kind::Denied);
    assert!(why.contains("a known token is needed"), "{why}");
}

#[tokio::test]
async fn a_removal_and_a_reset_whose_answers_are_cut_have_been_done() {
    let gateway = Gateway::start("memory:", &[]);
    push(&client(&gateway, 200), 1, vec!["one".into()])
        .await
        .expect("stored");
    client(&gateway, 200).reset(&topic()).await.expect("reset");
    let left = client(&gateway, 200).stat(&topic()).await.expect("there");
    assert_eq!(left.count, 0);
    client(&gateway, 200).remove(&topic()).await.expect("gone");
    let gone = client(&gateway, 0).stat(&topic()).await.map(drop);
    assert_eq!(gone.expect_err("gone").kind(), Kind::NotFound);
}
