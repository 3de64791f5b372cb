//! Atomic batches of which a server that was killed has kept the first messages, without the rest.

use dnpipes::backend::Backend;
use dnpipes::error::{Applied, Kind};
use dnpipes::message::PushId;

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

/// The server remembers identities by then, but those of no torn batch.
#[tokio::test]
async fn who_has_tried_before_looks_for_what_a_server_kept_of_its_batch() {
    let services = Services::start(&["nats-new"]);
    let numbers = numbers(900);
    let numbers: Vec<&str> = numbers.iter().map(String::as_str).collect();
    let one = client(&services.url());
    let (pipe, id) = (name("topic"), new_id());
    push(&one, "topic", &["before"]).await.expect("stored");
    let server = services.server().name;
    services.tell("stop", &server);
    let error = one.push(&pipe, id, batch(&numbers)).await;
    let error = error.expect_err("the server stands still");
    assert_eq!(error.kind(), Kind::Unreachable, "{error}");
    assert_eq!(error.applied(), Applied::Unknown, "{error}");
    services.tell("kill", &server);
    services.tell("start", &server);
    keep(&Other::new(&services).await, id, 0, &numbers[..450]).await;
    one.push(&pipe, id.again(), batch(&numbers))
        .await
        .expect("stored");
    let mut all = contents(&one, "topic").await;
    assert_eq!(all.remove(0), "before");
    assert_eq!(all, numbers);
}
