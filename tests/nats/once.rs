//! A push is stored once, also where the server does not know it any more.

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_nats::ConnectOptions;
use dnpipes::backend::Backend;
use dnpipes::backend::nats::Nats;
use dnpipes::backend::retry::Retry;
use dnpipes::error::{Applied, Kind};
use dnpipes::message::PushId;
use serde_json::json;

use crate::services::Services;
use crate::{Other, batch, client, contents, name, new_id, pull, push};

const DEADLINE: Duration = Duration::from_secs(20);

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
        assert_eq!(error.kind(), Kind::TooLong);
        let limit = client.caps().max_message;
        assert_eq!(limit, (1 << 20) - 1024);
        push(&client, "topic", &[&long[..limit]])
            .await
            .expect("stored");
        assert_eq!(pull(&client, "topic").await.expect("messages").len(), 1);
    }
}

#[tokio::test]
async fn a_push_that_is_repeated_is_stored_once_although_others_write_by_then() {
    for kind in ["nats", "nats-new"] {
        let services = Services::start(&[kind]);
        let numbers: Vec<String> = (0..1400).map(|number| number.to_string()).collect();
        let numbers: Vec<&str> = numbers.iter().map(String::as_str).collect();
        let url = services.url();
        let (one, two) = (client(&url), client(&url));
        let pipe = name("topic");
        let id = new_id();
        // As if it had ended there; nobody else writes.
        one.push(&pipe, id, batch(&numbers[..1200]))
            .await
            .expect("stored");
        // Messages come between those of others, whose pushes go otherwise then.
        let crowd = async |client: &Nats| {
            for _ in 0..20 {
                push(client, "topic", &["other"; 1100])
                    .await
                    .expect("stored");
            }
        };
        tokio::join!(crowd(&one), crowd(&two));
        one.push(&pipe, id.again(), batch(&numbers))
            .await
            .expect("stored");
        let mut stored = contents(&one, "topic").await;
        stored.retain(|message| message != "other");
        assert_eq!(stored, numbers, "{kind}");
    }
}

#[tokio::test]
async fn what_is_stored_of_a_push_that_is_refused_in_its_midst_is_told() {
    for (kind, count) in [("nats", 4), ("nats-new", 4), ("nats-new", 1499)] {
        let services = Services::start(&[kind]);
        let other = Other::new(&services).await;
        let client = client(&format!("{}/?prefix=", services.url()));
        let limits = json!({ "max_msgs": count + 1, "discard": "new" });
        other.stream("FULL", limits).await;
        push(&client, "FULL", &["first"]).await.expect("stored");
        let id = new_id();
        let messages = vec!["message"; count + 1];
        let error = client.push(&name("FULL"), id, batch(&messages)).await;
        let error = error.expect_err("full");
        assert_eq!(error.kind(), Kind::Full, "{kind}: {error}");
        assert_eq!(error.applied(), Applied::Part(count), "{kind}: {error}");
        assert_eq!(contents(&client, "FULL").await.len(), count + 1, "{kind}");
    }
}

/// A server with an account that may store 1 MB, and the account's URL.
fn small_account(kind: &str) -> (Services, String) {
    let account = "accounts { small { jetstream { max_file: 1MB }, users: [ { user: me, password: s3cret } ] } }";
    let services = Services::start(&[kind, "--set", account]);
    let url = format!("nats://me:s3cret@127.0.0.1:{}", services.server().port);
    (services, url)
}

/// Where some messages are refused others may be under way behind them, and are stored.
#[tokio::test]
async fn what_was_refused_among_what_was_stored_is_stored_when_it_is_repeated() {
    for kind in ["nats", "nats-new"] {
        let (_services, url) = small_account(kind);
        let user = ConnectOptions::with_user_and_password("me".into(), "s3cret".into());
        let other = Other(user.connect(&url).await.expect("a connection"));
        let window = json!({ "duplicate_window": 10_000_000_000_u64 });
        other.stream("TOPIC", window).await;
        let client = client(&format!("{url}/?prefix="));
        let long = "x".repeat(20_000);
        while push(&client, "FILL", &[&long]).await.is_ok() {}
        let messages = ["first", &long, "third", "last"];
        let id = new_id();
        let pushed = client.push(&name("TOPIC"), id, batch(&messages)).await;
        let error = pushed.expect_err("full");
        assert_eq!(error.kind(), Kind::Full, "{kind}: {error}");
        assert_eq!(error.applied(), Applied::Unknown, "{kind}: {error}");
        assert_eq!(contents(&client, "TOPIC").await, ["first", "third", "last"]);
        client.reset(&name("FILL")).await.expect("reset");
        let again = client
            .push(&name("TOPIC"), id.again(), batch(&messages))
            .await;
        again.expect("stored");
        let stored = contents(&client, "TOPIC").await;
        assert_eq!(stored, ["first", "third", "last", &long], "{kind}");
    }
}

/// A server keeps those messages of a batch that fitted into what an account, or it, may store.
#[tokio::test]
async fn what_an_account_had_room_for_of_a_push_is_told() {
    let (_services, url) = small_account("nats-new");
    let (raw, pipe) = (client(&url), name("topic"));
    let retrying = Retry::new(Arc::new(client(&url)), Some(Duration::from_secs(30)));
    for (count, length) in [(2, 40_000), (20, 10_000), (900, 100)] {
        raw.create(&pipe).await.expect("made");
        raw.reset(&pipe).await.expect("reset");
        let message = "x".repeat(length);
        let messages = vec![message.as_str(); count];
        let mut stored = 0;
        let error = loop {
            let pushed = retrying.push(&pipe, new_id(), batch(&messages));
            match pushed.await {
                Ok(_) => stored += count,
                Err(error) => break error,
            }
        };
        assert_eq!(error.kind(), Kind::Full, "{count}: {error}");
        let kept = match error.applied() {
            Applied::No => 0,
            Applied::Part(kept) => kept,
            Applied::Unknown => panic!("{count}: it is not known: {error}"),
        };
        assert_eq!(
            contents(&raw, "topic").await.len(),
            stored + kept,
            "{count}"
        );
    }
}

#[tokio::test]
async fn pushes_that_are_given_up_leave_nothing_under_way_but_one() {
    let services = Services::start(&["nats-new"]);
    let client = client(&services.url());
    push(&client, "topic", &["first"]).await.expect("stored");
    let id = new_id();
    let (pipe, messages) = (name("topic"), vec!["message"; 1400]);
    // As by a program that is interrupted all the time, and writes the same again.
    let mut tries = 0;
    let mut try_id = id;
    let stored = loop {
        let push = client.push(&pipe, try_id, batch(&messages));
        match tokio::time::timeout(Duration::from_micros(200), push).await {
            Ok(pushed) => break pushed.expect("stored"),
            Err(_) => tries += 1,
        }
        try_id = id.again();
    };
    assert!(tries > 0, "it was too fast to be given up");
    let again = client.push(&pipe, id.again(), batch(&messages)).await;
    assert_eq!(again.expect("known"), stored);
    assert_eq!(contents(&client, "topic").await.len(), 1401);
    let other = Other::new(&services).await;
    let stream = &other.api("STREAM.NAMES", json!({})).await["streams"][0];
    let what = format!("CONSUMER.LIST.{}", stream.as_str().expect("a stream"));
    // Those of readers are gone after a moment; that of a search is none.
    let start = std::time::Instant::now();
    while other.api(&what, json!({})).await["total"] != json!(0) {
        assert!(start.elapsed() < Duration::from_secs(20), "consumers stay");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn what_is_known_of_a_push_holds_for_its_pipe_as_long_as_that_is_there() {
    for kind in ["nats", "nats-new"] {
        let services = Services::start(&[kind]);
        let client = client(&services.url());
        let (id, two) = (new_id(), ["one", "two"]);
        client
            .push(&name("a"), id, batch(&two))
            .await
            .expect("stored");
        // The same number for another pipe is another push.
        client
            .push(&name("b"), id.again(), batch(&two))
            .await
            .expect("stored");
        assert_eq!(contents(&client, "b").await, two, "{kind}");
        client.remove(&name("b")).await.expect("removed");
        client
            .push(&name("b"), id.again(), batch(&two))
            .await
            .expect("stored");
        assert_eq!(contents(&client, "b").await, two, "{kind}");
        // Whoever sends other messages under a number that was used gets an answer, too.
        let five = ["1", "2", "3", "4", "5"];
        let id = new_id();
        client
            .push(&name("c"), id, batch(&five))
            .await
            .expect("stored");
        for fewer in [3, 1] {
            let pipe = name("c");
            let pushed = client.push(&pipe, id.again(), batch(&five[..fewer]));
            pushed.await.expect("an answer");
        }
    }
}

#[tokio::test]
async fn a_search_that_is_given_up_again_and_again_ends_and_leaves_no_consumer() {
    for kind in ["nats", "nats-new"] {
        let services = Services::start(&[kind]);
        let one = client(&services.url());
        let (pipe, id) = (name("topic"), new_id());
        let first = one.push(&pipe, id, batch(&["first"])).await;
        for _ in 0..20 {
            push(&one, "topic", &["other"; 1000]).await.expect("stored");
        }
        // Who repeats it does not know of the first try.
        let again = client(&services.url());
        let mut given_up = 0;
        let since = Instant::now();
        let found = loop {
            let tried = again.push(&pipe, id.again(), batch(&["first"]));
            match tokio::time::timeout(Duration::from_millis(2), tried).await {
                Ok(found) => break found,
                Err(_) => given_up += 1,
            }
            assert!(since.elapsed() < DEADLINE, "given up {given_up} times");
        };
        assert_eq!(found.expect("found"), first.expect("stored"), "{kind}");
        assert!(given_up > 1, "this shows nothing");
        let other = Other::new(&services).await;
        loop {
            let info = other.api("STREAM.INFO.dnpipes-topic", json!(null)).await;
            let consumers = info["state"]["consumer_count"].as_u64();
            if consumers == Some(0) {
                break;
            }
            assert!(since.elapsed() < DEADLINE, "{kind}: {consumers:?} are left");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

#[tokio::test]
async fn a_push_that_is_given_up_in_its_search_is_not_stored_behind_a_reset() {
    for kind in ["nats", "nats-new"] {
        let services = Services::start(&[kind]);
        let one = client(&services.url());
        let pipe = name("topic");
        for _ in 0..20 {
            push(&one, "topic", &["before"; 1000])
                .await
                .expect("stored");
        }
        let again = client(&services.url());
        let id = new_id();
        let tried = again.push(&pipe, id.again(), batch(&["given up"]));
        let tried = tokio::time::timeout(Duration::from_millis(2), tried).await;
        assert!(tried.is_err(), "this shows nothing");
        one.reset(&pipe).await.expect("reset");
        push(&one, "topic", &["other"]).await.expect("stored");
        // It waits for what is under way.
        let next = PushId {
            seq: 2,
            repeated: false,
            ..id
        };
        let since = Instant::now();
        again
            .push(&pipe, next, batch(&["next"]))
            .await
            .expect("stored");
        assert!(
            since.elapsed() < Duration::from_secs(5),
            "{:?}",
            since.elapsed()
        );
        assert_eq!(contents(&one, "topic").await, ["other", "next"], "{kind}");
    }
}
