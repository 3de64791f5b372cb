//! Atomic batches of which a server that was killed has kept the first messages, without the rest.

use dnpipes::backend::Backend;
use dnpipes::backend::nats::Nats;
use dnpipes::error::{Applied, Kind};
use dnpipes::message::PushId;
use serde_json::{Value, json};

use crate::services::Services;
use crate::{Other, batch, client, contents, name, new_id, push};

/// Stores messages as the part of a try that begins with message `first` of the push which a server has kept.
async fn keep(other: &Other, id: PushId, first: usize, messages: &[&str]) {
    let batch = format!("{}-{:x}-{first:x}-{}", id.producer, id.seq, messages.len());
    for (place, message) in (1..).zip(messages) {
        let mut headers = async_nats::HeaderMap::new();
        headers.insert("Nats-Batch-Id", batch.as_str());
        headers.insert("Nats-Batch-Sequence", place.to_string());
        if place == messages.len() {
            headers.insert("Nats-Batch-Commit", "1");
        }
        let message = bytes::Bytes::copy_from_slice(message.as_bytes());
        let sent = other
            .0
            .request_with_headers("dnpipes-topic", headers, message);
        let answer = sent.await.expect("an answer").payload;
        assert!(!String::from_utf8_lossy(&answer).contains("error"));
    }
}

/// A first try, while the server stands still; then that is killed, and started anew.
async fn try_in_vain(services: &Services, one: &Nats, id: PushId, messages: &[&str]) {
    let server = services.server().name;
    services.tell("stop", &server);
    let error = one.push(&name("topic"), id, batch(messages)).await;
    let error = error.expect_err("the server stands still");
    assert_eq!(error.kind(), Kind::Unreachable, "{error}");
    assert_eq!(error.applied(), Applied::Unknown, "{error}");
    services.tell("kill", &server);
    services.tell("start", &server);
}

fn numbers(count: usize) -> Vec<String> {
    (0..count).map(|number| number.to_string()).collect()
}

#[tokio::test]
async fn a_push_goes_on_behind_what_a_server_kept_of_its_batch() {
    let numbers = numbers(900);
    let numbers: Vec<&str> = numbers.iter().map(String::as_str).collect();
    // Where tries were cut.
    for cuts in [&[1][..], &[450], &[899], &[300, 500], &[2, 898, 899]] {
        let services = Services::start(&["nats-new"]);
        let (one, other) = (client(&services.url()), Other::new(&services).await);
        let (pipe, id) = (name("topic"), new_id());
        push(&one, "topic", &["before"]).await.expect("stored");
        let mut first = 0;
        for &cut in cuts {
            keep(&other, id, first, &numbers[first..cut]).await;
            first = cut;
        }
        push(&one, "topic", &["other"]).await.expect("stored");
        let stored = one.push(&pipe, id.again(), batch(&numbers)).await;
        let stored = stored.expect("stored");
        for again in [one, client(&services.url())] {
            let known = again.push(&pipe, id.again(), batch(&numbers)).await;
            assert_eq!(known.expect("known"), stored, "{cuts:?}");
            let mut all = contents(&again, "topic").await;
            assert_eq!(
                (all.remove(0), all.remove(first)),
                ("before".to_owned(), "other".to_owned())
            );
            assert_eq!(all, numbers, "{cuts:?}");
        }
    }
}

/// Repeats a push; then it is there as a whole and once, behind what was there before.
async fn assert_completes(one: &Nats, id: PushId, texts: &[&str]) {
    one.push(&name("topic"), id.again(), batch(texts))
        .await
        .expect("stored");
    assert_eq!(contents(one, "topic").await, [&["before"], texts].concat());
}

/// Changes the stream's settings.
async fn edit(other: &Other, change: impl Fn(&mut Value)) {
    let info = other.api("STREAM.INFO.dnpipes-topic", Value::Null).await;
    let mut config = info["config"].clone();
    change(&mut config);
    other.api("STREAM.UPDATE.dnpipes-topic", config).await;
}

#[tokio::test]
async fn a_repetition_that_fails_behind_what_a_server_kept_is_repeated_behind_it_too() {
    let services = Services::start(&["nats-new"]);
    let numbers = numbers(900);
    let numbers: Vec<&str> = numbers.iter().map(String::as_str).collect();
    let (one, other) = (client(&services.url()), Other::new(&services).await);
    let (pipe, id) = (name("topic"), new_id());
    push(&one, "topic", &["before"]).await.expect("stored");
    keep(&other, id, 0, &numbers[..450]).await;
    edit(&other, |config| {
        config["max_msgs"] = json!(451);
        config["discard"] = json!("new");
    })
    .await;
    let error = one.push(&pipe, id.again(), batch(&numbers)).await;
    assert_eq!(error.expect_err("no room").kind(), Kind::Full);
    edit(&other, |config| config["max_msgs"] = json!(-1)).await;
    assert_completes(&one, id, &numbers).await;
}

/// There is nothing to hear of messages that were deleted one by one.
#[tokio::test]
async fn a_search_among_messages_that_were_deleted_ends() {
    let services = Services::start(&["nats-new"]);
    let (pipe, id) = (name("topic"), new_id());
    push(&client(&services.url()), "topic", &["before"])
        .await
        .expect("stored");
    let one = client(&services.url());
    // By now it knows the stream, with one message.
    push(&one, "topic", &["more"]).await.expect("stored");
    try_in_vain(&services, &one, id, &["a", "b"]).await;
    let other = Other::new(&services).await;
    other.publish("dnpipes-topic", "other").await;
    for seq in [2, 3] {
        let deleted = json!({ "seq": seq });
        other.api("STREAM.MSG.DELETE.dnpipes-topic", deleted).await;
    }
    one.push(&pipe, id.again(), batch(&["a", "b"]))
        .await
        .expect("stored");
    assert_eq!(contents(&one, "topic").await, ["before", "a", "b"]);
}

/// The server remembers identities by then, but those of no torn batch.
#[tokio::test]
async fn who_has_tried_before_looks_for_what_a_server_kept_of_its_batch() {
    let services = Services::start(&["nats-new"]);
    let numbers = numbers(900);
    let numbers: Vec<&str> = numbers.iter().map(String::as_str).collect();
    let one = client(&services.url());
    let id = new_id();
    push(&one, "topic", &["before"]).await.expect("stored");
    try_in_vain(&services, &one, id, &numbers).await;
    keep(&Other::new(&services).await, id, 0, &numbers[..450]).await;
    assert_completes(&one, id, &numbers).await;
}
