//! What streams of other programs may hold, beside messages that follow one another.

use std::time::{Duration, Instant};

use bytes::Bytes;
use dnpipes::backend::{Backend, Limit, Start};
use serde_json::json;

use crate::services::Services;
use crate::{Other, client, name, pull, push};

#[tokio::test]
async fn a_stream_that_begins_late_is_read_from_its_first_message_on() {
    for kind in ["nats", "nats-new"] {
        let services = Services::start(&[kind]);
        let (client, other) = (client(&services.url()), Other::new(&services).await);
        push(&client, "topic", &["a", "b", "c", "d"])
            .await
            .expect("stored");
        let third = json!({ "seq": 3 });
        other.api("STREAM.PURGE.dnpipes-topic", third).await;
        assert_eq!(pull(&client, "topic").await.expect("messages"), ["c", "d"]);
        // And where nothing is left, from the next one.
        other.api("STREAM.PURGE.dnpipes-topic", json!({})).await;
        assert!(pull(&client, "topic").await.expect("nothing").is_empty());
        push(&client, "topic", &["e"]).await.expect("stored");
        assert_eq!(pull(&client, "topic").await.expect("messages"), ["e"]);
    }
}

#[tokio::test]
async fn a_rolled_up_stream_holds_its_last_message() {
    for kind in ["nats", "nats-new"] {
        let services = Services::start(&[kind]);
        let (client, other) = (client(&services.url()), Other::new(&services).await);
        let rollup = json!({ "allow_rollup_hdrs": true });
        other.stream("dnpipes-UP", rollup).await;
        push(&client, "UP", &["a", "b"]).await.expect("stored");
        let mut source = client
            .subscribe(&name("UP"), Start::Oldest)
            .await
            .expect("a source");
        let next = Limit {
            max_bytes: 1 << 20,
            before: None,
        };
        source.next(next).await.expect("messages");
        let mut headers = async_nats::HeaderMap::new();
        headers.insert("Nats-Rollup", "all");
        let sent = other
            .0
            .request_with_headers("dnpipes-UP", headers, "sum".into());
        sent.await.expect("stored");
        assert_eq!(source.next(next).await.expect("messages")[0].data, "sum");
        assert_eq!(pull(&client, "UP").await.expect("messages"), ["sum"]);
    }
}

#[tokio::test]
async fn messages_that_expire_one_by_one_are_passed_over() {
    let services = Services::start(&["nats-new"]);
    let (client, other) = (client(&services.url()), Other::new(&services).await);
    other
        .stream("dnpipes-TTL", json!({ "allow_msg_ttl": true }))
        .await;
    for (text, life) in [
        ("a", None),
        ("b", Some("1s")),
        ("c", None),
        ("d", Some("1s")),
    ] {
        let mut headers = async_nats::HeaderMap::new();
        if let Some(life) = life {
            headers.insert("Nats-TTL", life);
        }
        let sent = other
            .0
            .request_with_headers("dnpipes-TTL", headers, text.into());
        sent.await.expect("stored");
    }
    let all = pull(&client, "TTL").await.expect("messages");
    assert_eq!(all, ["a", "b", "c", "d"]);
    let since = Instant::now();
    while client.stat(&name("TTL")).await.expect("stat").count > 2 {
        assert!(since.elapsed() < Duration::from_secs(20), "none expires");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(pull(&client, "TTL").await.expect("messages"), ["a", "c"]);
    push(&client, "TTL", &["e"]).await.expect("stored");
    assert_eq!(
        pull(&client, "TTL").await.expect("messages"),
        ["a", "c", "e"]
    );
}

#[tokio::test]
async fn mirrors_and_streams_with_sources_are_read() {
    // 2.9.10 never fills a mirror of this one.
    for kind in ["nats-new"] {
        let services = Services::start(&[kind]);
        let (client, other) = (client(&services.url()), Other::new(&services).await);
        push(&client, "topic", &["a", "b", "c"])
            .await
            .expect("stored");
        let deleted = json!({ "seq": 2 });
        other.api("STREAM.MSG.DELETE.dnpipes-topic", deleted).await;
        let of = json!({ "name": "dnpipes-topic" });
        let mirror = json!({ "subjects": [], "mirror": of });
        other.stream("dnpipes-COPY", mirror).await;
        let sourced = json!({ "sources": [of] });
        other.stream("dnpipes-MORE", sourced).await;
        for (pipe, expected) in [("COPY", &["a", "c"][..]), ("MORE", &["a", "c"])] {
            let mut tries = 0;
            while client.stat(&name(pipe)).await.expect("stat").count < 2 {
                tokio::time::sleep(Duration::from_millis(20)).await;
                tries += 1;
                assert!(tries < 250, "{kind}: {pipe} stays empty");
            }
            assert_eq!(pull(&client, pipe).await.expect("messages"), expected);
        }
        push(&client, "MORE", &["own"]).await.expect("stored");
        let all = pull(&client, "MORE").await.expect("messages");
        assert_eq!(all, ["a", "c", "own"]);
    }
}

#[tokio::test]
async fn a_stream_of_many_subjects_and_long_messages_is_read_as_a_whole() {
    const SUBJECTS: usize = 20_000;
    for kind in ["nats", "nats-new"] {
        let services = Services::start(&[kind]);
        let (client, other) = (client(&services.url()), Other::new(&services).await);
        let wild = json!({ "subjects": ["wild.>"] });
        other.stream("dnpipes-WILD", wild).await;
        for number in 0..SUBJECTS {
            let subject = format!("wild.x{}.{number}", "x".repeat(number % 200));
            let sent = other.0.publish(subject, number.to_string().into());
            sent.await.expect("sent");
        }
        // As long as the server takes, with as many headers.
        let long = Bytes::from(vec![b'x'; 31 << 20]);
        let mut headers = async_nats::HeaderMap::new();
        headers.insert("X", "y".repeat(60_000));
        let sent = other
            .0
            .request_with_headers("wild.long", headers, long.clone());
        sent.await.expect("stored");
        let mut source = client
            .subscribe(&name("WILD"), Start::Oldest)
            .await
            .expect("a source");
        let next = Limit {
            max_bytes: 1 << 20,
            before: None,
        };
        let mut count = 0;
        while count < SUBJECTS {
            let next = tokio::time::timeout(Duration::from_secs(60), source.next(next));
            for message in next.await.expect("in time").expect("messages") {
                if count == SUBJECTS {
                    assert!(message.data == long);
                } else {
                    assert_eq!(message.data, count.to_string());
                }
                count += 1;
            }
        }
        if count == SUBJECTS {
            let last = tokio::time::timeout(Duration::from_secs(60), source.next(next));
            assert!(last.await.expect("in time").expect("a message")[0].data == long);
        }
    }
}
