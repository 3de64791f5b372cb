//! The messages of a large push go together, whoever else writes, and none after one that is refused.

use dnpipes::backend::Backend;
use dnpipes::error::Kind;
use serde_json::json;

use crate::services::Services;
use crate::{Other, batch, client, contents, name, new_id, push, refused};

fn numbered(writer: &str, count: usize) -> Vec<String> {
    (0..count)
        .map(|number| format!("{writer} {number}"))
        .collect()
}

fn texts(messages: &[String]) -> Vec<&str> {
    messages.iter().map(String::as_str).collect()
}

#[tokio::test]
async fn writers_of_large_batches_lose_and_double_nothing() {
    const BATCHES: usize = 8;
    const SIZE: usize = 2500;
    for kind in ["nats", "nats-new"] {
        let services = Services::start(&[kind]);
        client(&services.url())
            .create(&name("topic"))
            .await
            .expect("made");
        let other = Other::new(&services).await;
        let write = |writer: &'static str| {
            let client = client(&services.url());
            async move {
                let messages = numbered(writer, BATCHES * SIZE);
                for part in messages.chunks(SIZE) {
                    let pushed = client
                        .push(&name("topic"), new_id(), batch(&texts(part)))
                        .await;
                    pushed.expect("stored");
                }
            }
        };
        let foreign = async {
            for message in numbered("foreign", 300) {
                let sent = other.0.request("dnpipes-topic", message.into()).await;
                sent.expect("stored");
                tokio::task::yield_now().await;
            }
        };
        tokio::join!(write("one"), write("two"), write("three"), foreign);
        let all = contents(&client(&services.url()), "topic").await;
        assert_eq!(all.len(), 3 * BATCHES * SIZE + 300, "{kind}");
        for (writer, count) in [
            ("one", BATCHES * SIZE),
            ("two", BATCHES * SIZE),
            ("three", BATCHES * SIZE),
            ("foreign", 300),
        ] {
            let own: Vec<&String> = all
                .iter()
                .filter(|text| text.split(' ').next() == Some(writer))
                .collect();
            assert!(
                own.iter().copied().eq(&numbered(writer, count)),
                "{kind}: {writer}"
            );
        }
    }
}

#[tokio::test]
async fn nothing_of_a_large_batch_is_stored_behind_a_message_that_is_refused() {
    for kind in ["nats", "nats-new"] {
        let services = Services::start(&[kind]);
        let other = Other::new(&services).await;
        other
            .stream(
                "SMALL",
                json!({ "max_msg_size": 200, "allow_atomic": kind == "nats-new" }),
            )
            .await;
        let client = client(&format!("{}/?prefix=", services.url()));
        let mut messages = numbered("m", 3000);
        messages[1700] = "x".repeat(1000);
        let id = new_id();
        for id in [id, id.again()] {
            let error = refused(client.push(&name("SMALL"), id, batch(&texts(&messages)))).await;
            assert_eq!(error.kind(), Kind::TooLong, "{kind}: {error}");
            let stored = contents(&client, "SMALL").await;
            assert!(stored == messages[..1700], "{kind}: {}", stored.len());
        }
    }
}

/// Of what it has stored the server forgets the identities before a writer could ask it again.
#[tokio::test]
async fn writers_in_a_stream_that_forgets_at_once_double_nothing() {
    const WRITES: usize = 12;
    const SIZE: usize = 1500;
    let short = json!({ "duplicate_window": 100_000_000 });
    let batches = json!({ "duplicate_window": 100_000_000, "allow_atomic": true });
    // Such a stream remembers nothing at all, on newer servers.
    let source = json!({ "sources": [{ "name": "ANOTHER" }] });
    for (kind, settings) in [
        ("nats", &short),
        ("nats-new", &short),
        ("nats-new", &batches),
        ("nats-new", &source),
    ] {
        let services = Services::start(&[kind]);
        let other = Other::new(&services).await;
        other.stream("ANOTHER", json!({})).await;
        other.stream("FORGETS", settings.clone()).await;
        let write = |writer: &'static str| {
            let client = client(&format!("{}/?prefix=", services.url()));
            async move {
                for part in numbered(writer, WRITES * SIZE).chunks(SIZE) {
                    let pushed = push(&client, "FORGETS", &texts(part)).await;
                    pushed.expect("stored");
                }
            }
        };
        tokio::join!(write("one"), write("two"), write("three"));
        let all = contents(&client(&format!("{}/?prefix=", services.url())), "FORGETS").await;
        for writer in ["one", "two", "three"] {
            let is_own = |text: &&String| text.split(' ').next() == Some(writer);
            let own: Vec<&String> = all.iter().filter(is_own).collect();
            let expected = numbered(writer, WRITES * SIZE);
            assert_eq!(own.len(), expected.len(), "{kind}: {writer}: {settings}");
            assert!(own.into_iter().eq(&expected), "{kind}: {writer}");
        }
    }
}
