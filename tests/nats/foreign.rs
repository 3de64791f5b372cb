//! Streams that other programs made, and what they do to those that were made here.

use dnpipes::backend::{Backend, Limit, Start};
use dnpipes::error::Kind;
use serde_json::{Value, json};

use crate::services::Services;
use crate::{LOG, Other, client, keep_log, name, pull, push, refused};

#[tokio::test]
async fn a_stream_of_another_program_is_a_pipe_under_its_prefix() {
    for kind in ["nats", "nats-new"] {
        let services = Services::start(&[kind]);
        let other = Other::new(&services).await;
        other
            .stream("ORDERS", json!({ "subjects": ["orders.new"] }))
            .await;
        other.publish("orders.new", "one").await;
        for prefix in ["", "ORD"] {
            let client = client(&format!("{}/?prefix={prefix}", services.url()));
            let pipe = &"ORDERS"[prefix.len()..];
            let listed = client.list().await.expect("a list");
            assert_eq!(listed[0].0, name(pipe));
            assert_eq!(listed[0].1.count, 1);
            assert_eq!(pull(&client, pipe).await.expect("messages"), ["one"]);
        }
        let client = client(&format!("{}/?prefix=", services.url()));
        push(&client, "ORDERS", &["two", "three"])
            .await
            .expect("stored");
        let all = pull(&client, "ORDERS").await.expect("messages");
        assert_eq!(all, ["one", "two", "three"]);
    }
}

#[tokio::test]
async fn what_others_publish_to_a_pipe_is_read_and_the_other_way_round() {
    for kind in ["nats", "nats-new"] {
        let services = Services::start(&[kind]);
        let (client, other) = (client(&services.url()), Other::new(&services).await);
        push(&client, "a b", &["ours"]).await.expect("stored");
        other.publish("dnpipes-a=20b", "theirs").await;
        assert_eq!(
            pull(&client, "a b").await.expect("messages"),
            ["ours", "theirs"]
        );
        let got = json!({ "seq": 1 });
        let got = other.api("STREAM.MSG.GET.dnpipes-a=20b", got).await;
        assert_eq!(got["message"]["data"], "b3Vycw==");
    }
}

#[tokio::test]
async fn a_push_to_a_stream_whose_subject_is_not_clear_is_refused() {
    let services = Services::start(&["nats-new"]);
    let other = Other::new(&services).await;
    let client = client(&format!("{}/?prefix=", services.url()));
    other
        .stream("WILD", json!({ "subjects": ["wild.>"] }))
        .await;
    other
        .stream("MANY", json!({ "subjects": ["many.a", "many.b"] }))
        .await;
    other
        .stream(
            "COPY",
            json!({ "subjects": [], "mirror": { "name": "WILD" } }),
        )
        .await;
    other
        .stream("MUTE", json!({ "subjects": ["mute"], "no_ack": true }))
        .await;
    other.publish("wild.x", "read all the same").await;
    for (pipe, why) in [
        ("WILD", "wild.>"),
        ("MANY", "many.a many.b"),
        ("COPY", "mirror"),
        ("MUTE", "no_ack"),
    ] {
        let error = refused(push(&client, pipe, &["x"])).await;
        assert_eq!(error.kind(), Kind::Unsupported);
        assert!(error.to_string().contains(why), "{error}");
    }
    let read = pull(&client, "WILD").await.expect("messages");
    assert_eq!(read, ["read all the same"]);
    // Nor is a pipe made where another stream would take what is pushed to it.
    other
        .stream("TAKER", json!({ "subjects": ["taken"] }))
        .await;
    let error = refused(push(&client, "taken", &["x"])).await;
    assert_eq!(error.kind(), Kind::Unsupported);
    assert!(error.to_string().contains("overlap"), "{error}");
}

#[tokio::test]
async fn a_reader_too_many_is_told_why() {
    let services = Services::start(&["nats-new"]);
    let other = Other::new(&services).await;
    let client = client(&format!("{}/?prefix=", services.url()));
    let settings = json!({ "subjects": ["small"], "max_consumers": 1 });
    other.stream("SMALL", settings).await;
    push(&client, "SMALL", &["x"]).await.expect("stored");
    let mut readers = Vec::new();
    for _ in 0..2 {
        let reader = client.subscribe(&name("SMALL"), Start::Oldest).await;
        readers.push(reader.expect("a source"));
    }
    let next = Limit {
        max_bytes: 1,
        before: None,
    };
    readers[0].next(next).await.expect("let in");
    let error = readers[1].next(next).await.expect_err("one too many");
    assert_eq!(error.kind(), Kind::Denied, "{error}");
    assert!(error.to_string().contains("max_consumers"), "{error}");
}

#[tokio::test]
async fn limits_of_a_stream_are_warned_of_once_and_again_when_they_change() {
    keep_log();
    let services = Services::start(&["nats-new"]);
    let other = Other::new(&services).await;
    let client = client(&format!("{}/?prefix=", services.url()));
    other
        .stream(
            "OLD",
            json!({ "max_msgs": 2, "discard": "old", "max_age": 3_600_000_000_000_u64 }),
        )
        .await;
    other.stream("RAM", json!({ "storage": "memory" })).await;
    for text in ["a", "b", "c"] {
        push(&client, "OLD", &[text]).await.expect("stored");
        push(&client, "RAM", &[text]).await.expect("stored");
    }
    assert_eq!(pull(&client, "OLD").await.expect("messages"), ["b", "c"]);
    let warnings = LOG.warnings("OLD");
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    assert!(
        warnings[0].contains("over max_msgs 2; they are dropped after 3600s"),
        "{warnings:?}"
    );
    assert_eq!(LOG.warnings("RAM").len(), 1);
    // Its maker changes it, and makes another one of that name.
    let limits = [
        ("new", "pushes are refused"),
        ("old", "the oldest are dropped"),
    ];
    for (count, (discard, said)) in (1..).zip(limits) {
        let limits = json!({
            "name": "EDITED", "subjects": ["EDITED"], "max_msgs": 4, "discard": discard,
        });
        let what = if count == 1 { "CREATE" } else { "UPDATE" };
        other.api(&format!("STREAM.{what}.EDITED"), limits).await;
        client.stat(&name("EDITED")).await.expect("there");
        client.stat(&name("EDITED")).await.expect("there");
        let warnings = LOG.warnings("EDITED");
        assert_eq!(warnings.len(), count, "{warnings:?}");
        assert!(warnings[count - 1].contains(said), "{warnings:?}");
    }
    other.api("STREAM.DELETE.EDITED", Value::Null).await;
    other.stream("EDITED", json!({ "storage": "memory" })).await;
    client.stat(&name("EDITED")).await.expect("there");
    let warnings = LOG.warnings("EDITED");
    assert!(
        warnings[2..].len() == 1 && warnings[2].contains("memory storage"),
        "{warnings:?}"
    );
    push(&client, "own", &["x"]).await.expect("stored");
    assert!(LOG.warnings("own").is_empty());
}

/// Also with `discard: new`, which such a limit does not heed by itself.
#[tokio::test]
async fn a_limit_of_a_subject_is_warned_of_as_what_it_does() {
    keep_log();
    for kind in ["nats", "nats-new"] {
        let services = Services::start(&[kind]);
        let other = Other::new(&services).await;
        let client = client(&format!("{}/?prefix=", services.url()));
        for (stream, refuses, warning) in [
            (
                "SLIDES",
                false,
                "the oldest are dropped over max_msgs_per_subject 2",
            ),
            (
                "STAYS",
                true,
                "pushes are refused over max_msgs_per_subject 2",
            ),
        ] {
            let stream = format!("{stream}-{kind}");
            let settings = json!({
                "max_msgs_per_subject": 2, "discard": "new", "discard_new_per_subject": refuses,
            });
            other.stream(&stream, settings).await;
            push(&client, &stream, &["a", "b"]).await.expect("stored");
            let third = push(&client, &stream, &["c"]).await;
            let kind_of = third.as_ref().err().map(|error| error.kind());
            assert_eq!(kind_of, refuses.then_some(Kind::Full), "{third:?}");
            let kept = if refuses { ["a", "b"] } else { ["b", "c"] };
            assert_eq!(pull(&client, &stream).await.expect("messages"), kept);
            let warnings = LOG.warnings(&format!("stream {stream} does"));
            assert!(warnings[0].contains(warning), "{warnings:?}");
        }
    }
}

#[tokio::test]
async fn a_stream_that_acknowledges_before_it_writes_is_warned_of_once() {
    keep_log();
    let services = Services::start(&["nats-new"]);
    let other = Other::new(&services).await;
    let client = client(&format!("{}/?prefix=", services.url()));
    let settings = json!({ "persist_mode": "async" });
    other.stream("HASTY", settings).await;
    for text in ["a", "b"] {
        push(&client, "HASTY", &[text]).await.expect("stored");
    }
    let warnings = LOG.warnings("stream HASTY");
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    assert!(warnings[0].contains("persist_mode async"), "{warnings:?}");
}

#[tokio::test]
async fn a_stream_that_forgets_identities_soon_is_warned_of_once() {
    keep_log();
    for kind in ["nats", "nats-new"] {
        let services = Services::start(&[kind]);
        let other = Other::new(&services).await;
        let client = client(&format!("{}/?prefix=", services.url()));
        for (stream, seconds, count) in [("SOON", 29, 1), ("LATE", 30, 0)] {
            let stream = format!("{stream}-{kind}");
            let window = json!({ "duplicate_window": seconds * 1_000_000_000_u64 });
            other.stream(&stream, window).await;
            for text in ["a", "b"] {
                push(&client, &stream, &[text]).await.expect("stored");
            }
            let warnings = LOG.warnings(&format!("stream {stream} "));
            assert_eq!(warnings.len(), count, "{warnings:?}");
            let about = |line: &String| line.contains("29s") && line.contains("--dupe-window");
            assert!(warnings.iter().all(about), "{warnings:?}");
        }
    }
}

#[tokio::test]
async fn a_full_stream_refuses_and_stores_nothing_of_the_push() {
    let services = Services::start(&["nats-new"]);
    let other = Other::new(&services).await;
    let client = client(&format!("{}/?prefix=", services.url()));
    let settings = json!({ "max_msgs": 3, "discard": "new", "allow_atomic": true });
    other.stream("FULL", settings).await;
    push(&client, "FULL", &["a", "b"]).await.expect("stored");
    let error = refused(push(&client, "FULL", &["c", "d"])).await;
    assert_eq!(error.kind(), Kind::Full, "{error}");
    push(&client, "FULL", &["e"]).await.expect("stored");
    assert_eq!(
        refused(push(&client, "FULL", &["f"])).await.kind(),
        Kind::Full
    );
    assert_eq!(
        pull(&client, "FULL").await.expect("messages"),
        ["a", "b", "e"]
    );
}

#[tokio::test]
async fn a_server_without_room_says_so() {
    for kind in ["nats", "nats-new"] {
        let room = "accounts { small { jetstream { max_file: 300KB }, users: [ { user: me, password: s3cret } ] } }";
        let services = Services::start(&[kind, "--set", room]);
        let port = services.server().port;
        let client = client(&format!("nats://me:s3cret@127.0.0.1:{port}"));
        let long = "x".repeat(100_000);
        let mut stored = 0;
        let error = loop {
            match push(&client, "topic", &[&long]).await {
                Ok(_) => stored += 1,
                Err(error) => break error,
            }
            assert!(stored < 10);
        };
        assert_eq!(error.kind(), Kind::Full, "{kind}: {error}");
        let error = refused(push(&client, "topic", &[&long, &long, &long])).await;
        assert_eq!(error.kind(), Kind::Full, "{kind}: {error}");
        assert_eq!(
            client.stat(&name("topic")).await.expect("stat").count,
            stored
        );
    }
}

#[tokio::test]
async fn streams_whose_readers_remove_messages_are_not_read() {
    let services = Services::start(&["nats-new"]);
    let other = Other::new(&services).await;
    let client = client(&format!("{}/?prefix=", services.url()));
    for retention in ["workqueue", "interest"] {
        other
            .stream(retention, json!({ "retention": retention }))
            .await;
        let durable = json!({
            "stream_name": retention,
            "config": { "durable_name": "w", "ack_policy": "explicit" },
        });
        other
            .api(&format!("CONSUMER.DURABLE.CREATE.{retention}.w"), durable)
            .await;
        push(&client, retention, &["a job"]).await.expect("stored");
        let error = refused(pull(&client, retention)).await;
        assert_eq!(error.kind(), Kind::Unsupported);
        assert!(error.to_string().contains(retention), "{error}");
        assert_eq!(client.stat(&name(retention)).await.expect("stat").count, 1);
    }
}

#[tokio::test]
async fn a_push_to_a_stream_that_keeps_nothing_is_refused() {
    let services = Services::start(&["nats-new"]);
    let other = Other::new(&services).await;
    let client = client(&format!("{}/?prefix=", services.url()));
    other
        .stream("idle", json!({ "retention": "interest" }))
        .await;
    let error = refused(push(&client, "idle", &["lost"])).await;
    assert_eq!(error.kind(), Kind::Unsupported);
    assert!(error.to_string().contains("interest"), "{error}");
}

/// Also while it is pushed to: the first push behind it finds out.
#[tokio::test]
async fn settings_that_others_change_meanwhile_are_found_out() {
    let services = Services::start(&["nats-new"]);
    let other = Other::new(&services).await;
    let client = client(&services.url());
    let texts = ["one", "two", "three"];
    push(&client, "topic", &texts).await.expect("stored");
    let mut config = other.api("STREAM.INFO.dnpipes-topic", json!({})).await["config"].clone();
    config["allow_atomic"] = json!(false);
    other
        .api("STREAM.UPDATE.dnpipes-topic", config.clone())
        .await;
    // Taken for granted yet, and not any more.
    push(&client, "topic", &texts).await.expect("stored");
    push(&client, "topic", &texts).await.expect("stored");
    let all = pull(&client, "topic").await.expect("messages");
    assert_eq!(all, [texts, texts, texts].concat());
    config["no_ack"] = json!(true);
    other.api("STREAM.UPDATE.dnpipes-topic", config).await;
    // Nobody hears of it before the next look.
    tokio::time::sleep(std::time::Duration::from_millis(1100)).await;
    let error = refused(push(&client, "topic", &["unheard"])).await;
    assert_eq!(error.kind(), Kind::Unsupported, "{error}");
}

#[tokio::test]
async fn a_reset_leaves_nothing_pending_with_another_programs_consumer() {
    for kind in ["nats", "nats-new"] {
        let services = Services::start(&[kind]);
        let (client, other) = (client(&services.url()), Other::new(&services).await);
        push(&client, "topic", &["a", "b", "c", "d"])
            .await
            .expect("stored");
        let durable = json!({
            "stream_name": "dnpipes-topic",
            "config": { "durable_name": "w", "ack_policy": "explicit", "ack_wait": 300_000_000 },
        });
        other
            .api("CONSUMER.DURABLE.CREATE.dnpipes-topic.w", durable)
            .await;
        let next = "$JS.API.CONSUMER.MSG.NEXT.dnpipes-topic.w";
        for _ in 0..2 {
            let message = other.next(next).await;
            assert!(message.status.is_none());
        }
        client.reset(&name("topic")).await.expect("reset");
        let info = other
            .api("CONSUMER.INFO.dnpipes-topic.w", Value::Null)
            .await;
        assert_eq!(
            (
                &info["num_ack_pending"],
                &info["num_pending"],
                &info["num_redelivered"]
            ),
            (&json!(0), &json!(0), &json!(0)),
            "{kind}: {info}"
        );
        push(&client, "topic", &["e"]).await.expect("stored");
        let message = other.next(next).await;
        assert_eq!(message.payload, "e", "{kind}");
    }
}

#[tokio::test]
async fn messages_that_were_deleted_one_by_one_are_passed_over() {
    for kind in ["nats", "nats-new"] {
        let services = Services::start(&[kind]);
        let (client, other) = (client(&services.url()), Other::new(&services).await);
        push(&client, "topic", &["a", "b", "c", "d"])
            .await
            .expect("stored");
        for seq in [2, 4] {
            let deleted = json!({ "seq": seq });
            other.api("STREAM.MSG.DELETE.dnpipes-topic", deleted).await;
        }
        assert_eq!(pull(&client, "topic").await.expect("messages"), ["a", "c"]);
        for seq in [1, 3] {
            let deleted = json!({ "seq": seq });
            other.api("STREAM.MSG.DELETE.dnpipes-topic", deleted).await;
        }
        assert!(pull(&client, "topic").await.expect("nothing").is_empty());
    }
}
