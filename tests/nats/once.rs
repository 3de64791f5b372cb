//! A push is stored once, also where the server does not know it any more.

use std::time::Duration;

use dnpipes::backend::Backend;
use serde_json::json;

use crate::services::Services;
use crate::{Other, batch, client, contents, name, new_id, pull, push};

#[tokio::test]
async fn a_repeated_push_is_known_beyond_the_servers_window() {
    for kind in ["nats", "nats-new"] {
        let services = Services::start(&[kind]);
        let other = Other::new(&services).await;
        let url = format!("{}/?prefix=", services.url());
        let window = json!({ "duplicate_window": 100_000_000 });
        let mut settings = window;
        if kind == "nats-new" {
            settings["allow_atomic"] = json!(true);
        }
        other.stream("SHORT", settings).await;
        let pipe = name("SHORT");
        let one = client(&url);
        let (single, many) = (new_id(), new_id());
        let first = one
            .push(&pipe, single, batch(&["one"]))
            .await
            .expect("stored");
        let second = one
            .push(&pipe, many, batch(&["two", "three"]))
            .await
            .expect("stored");
        for number in 0..50 {
            push(&one, "SHORT", &[&number.to_string()])
                .await
                .expect("stored");
        }
        // It has forgotten them when it stores such an identity twice.
        let mut headers = async_nats::HeaderMap::new();
        headers.insert("Nats-Msg-Id", "other");
        loop {
            let sent = other
                .0
                .request_with_headers("SHORT", headers.clone(), "x".into());
            let answer = sent.await.expect("an answer");
            let stored: serde_json::Value = serde_json::from_slice(&answer.payload).expect("JSON");
            if stored["duplicate"].is_null() && stored["seq"].as_u64() > Some(54) {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let count = one.stat(&pipe).await.expect("stat").count;
        for again in [client(&url), one] {
            let again_first = again.push(&pipe, single.again(), batch(&["one"])).await;
            assert_eq!(again_first.expect("known"), first, "{kind}");
            let again_second = again
                .push(&pipe, many.again(), batch(&["two", "three"]))
                .await;
            assert_eq!(again_second.expect("known"), second, "{kind}");
            assert_eq!(again.stat(&pipe).await.expect("stat").count, count);
        }
    }
}

#[tokio::test]
async fn the_rest_of_a_push_that_was_cut_is_stored_when_it_is_repeated() {
    for kind in ["nats", "nats-new"] {
        let services = Services::start(&[kind]);
        let numbers: Vec<String> = (0..2500).map(|number| number.to_string()).collect();
        let numbers: Vec<&str> = numbers.iter().map(String::as_str).collect();
        let id = new_id();
        // As if it had ended after the first two batches.
        let one = client(&services.url());
        let pipe = name("topic");
        one.push(&pipe, id, batch(&numbers[..2000]))
            .await
            .expect("stored");
        for again in [one, client(&services.url())] {
            again
                .push(&pipe, id.again(), batch(&numbers))
                .await
                .expect("stored");
            assert_eq!(contents(&again, "topic").await, numbers, "{kind}");
        }
    }
}

#[tokio::test]
async fn a_message_over_the_servers_payload_is_refused_at_once() {
    for kind in ["nats", "nats-new"] {
        let services = Services::start(&[kind, "--set", "max_payload: 1MB"]);
        let client = client(&services.url());
        let long = "x".repeat(1 << 20);
        let error = crate::refused(push(&client, "topic", &["short", &long])).await;
        assert_eq!(error.kind(), dnpipes::error::Kind::TooLong);
        let limit = client.caps().max_message;
        assert_eq!(limit, (1 << 20) - 1024);
        push(&client, "topic", &[&long[..limit]])
            .await
            .expect("stored");
        assert_eq!(pull(&client, "topic").await.expect("messages").len(), 1);
    }
}
