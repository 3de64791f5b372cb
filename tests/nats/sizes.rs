//! How many bytes a pipe's messages have, which no server says.

use std::time::{Duration, Instant};

use dnpipes::backend::Backend;
use dnpipes::backend::nats::Nats;
use serde_json::json;

use crate::odd::{ODD, Raw};
use crate::services::Services;
use crate::{Other, batch, client, name, new_id, push};

/// What is known of the pipe's bytes; also by a listing, which must agree.
async fn bytes(client: &Nats, pipe: &str) -> Option<u64> {
    let known = client.stat(&name(pipe)).await.expect("stat").bytes;
    let listed = client.list().await.expect("a listing");
    let (_, listed) = listed
        .iter()
        .find(|(other, _)| *other == name(pipe))
        .expect("it is listed");
    // A look later some more may be known.
    if known.is_some() {
        assert_eq!(listed.bytes, known);
    }
    known
}

/// The bytes, once they are counted; what is said before must not be wrong.
async fn counted(client: &Nats, pipe: &str, expected: u64) {
    let since = Instant::now();
    loop {
        match bytes(client, pipe).await {
            Some(known) => return assert_eq!(known, expected),
            None => assert!(since.elapsed() < Duration::from_secs(20), "never"),
        }
    }
}

/// Texts of different lengths, and their bytes.
fn texts(count: usize) -> (Vec<String>, u64) {
    let texts: Vec<String> = (0..count).map(|number| "x".repeat(number % 50)).collect();
    let bytes = texts.iter().map(|text| text.len() as u64).sum();
    (texts, bytes)
}

async fn push_texts(client: &Nats, texts: &[String]) {
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    push(client, "topic", &texts).await.expect("stored");
}

/// Publishes with these headers, and waits until all of it is stored: nobody answers for it.
async fn publish_raw(client: &Nats, raw: &mut Raw, headers: &[&[u8]], data: &[u8]) {
    let count = async || client.stat(&name("topic")).await.expect("stat").count;
    let expected = count().await + headers.len() as u64;
    for headers in headers {
        raw.publish(b"dnpipes-topic", Some(headers), data);
    }
    let since = Instant::now();
    while count().await != expected {
        assert!(since.elapsed() < Duration::from_secs(20), "never");
    }
}

#[tokio::test]
async fn a_pipes_bytes_are_its_messages_however_they_came() {
    for kind in ["nats", "nats-new"] {
        let services = Services::start(&[kind]);
        let (client_one, other) = (client(&services.url()), Other::new(&services).await);
        client_one.create(&name("topic")).await.expect("made");
        assert_eq!(bytes(&client_one, "topic").await, Some(0), "{kind}");
        let mut sum = 0;
        for count in [1, 3, 700, 2500, 1] {
            let (texts, added) = texts(count);
            push_texts(&client_one, &texts).await;
            sum += added;
            assert_eq!(bytes(&client_one, "topic").await, Some(sum), "{kind}");
        }
        // Messages of others, with and without headers, and between two pushes from here.
        other.publish("dnpipes-topic", "plain").await;
        let mut headers = async_nats::HeaderMap::new();
        headers.insert("Colour", "green");
        let sent = other
            .0
            .request_with_headers("dnpipes-topic", headers, "four".into());
        sent.await.expect("stored");
        push_texts(&client_one, &texts(2).0).await;
        let mut raw = Raw::new(&services);
        // The server's word of the size gets into the last header of these.
        let open = &b"NATS/1.0\r\nA: b\r\n"[..];
        publish_raw(&client_one, &mut raw, &[open, open], b"open").await;
        sum += 5 + 4 + 1 + 2 * 4;
        counted(&client_one, "topic", sum).await;
        publish_raw(&client_one, &mut raw, &ODD, b"odd").await;
        push_texts(&client_one, &texts(3).0).await;
        sum += 3 * ODD.len() as u64 + 3;
        // Some lie.
        for size in ["99999999999", "18446744073709551615", "x"] {
            let mut headers = async_nats::HeaderMap::new();
            headers.insert("Nats-Msg-Size", size);
            let sent = other
                .0
                .request_with_headers("dnpipes-topic", headers, "six  6".into());
            sent.await.expect("stored");
            sum += 6;
        }
        let fresh = client(&services.url());
        for client in [&client_one, &fresh] {
            counted(client, "topic", sum).await;
        }
        // A repeated one is no other.
        let (id, three) = (new_id(), batch(&["a", "bb", "ccc"]));
        for (id, client) in [
            (id, &client_one),
            (id.again(), &client_one),
            (id.again(), &fresh),
        ] {
            client
                .push(&name("topic"), id, three.clone())
                .await
                .expect("stored");
        }
        sum += 6;
        for client in [&client_one, &fresh] {
            counted(client, "topic", sum).await;
        }
    }
}

#[tokio::test]
async fn a_pipes_bytes_are_those_that_are_left() {
    for kind in ["nats", "nats-new"] {
        let services = Services::start(&[kind]);
        let (one, two) = (client(&services.url()), client(&services.url()));
        let other = Other::new(&services).await;
        let all_see = async |expected| {
            for client in [&one, &two] {
                counted(client, "topic", expected).await;
            }
        };
        push(&one, "topic", &["1", "22", "333", "4444", "55555"])
            .await
            .expect("stored");
        all_see(15).await;
        other
            .api("STREAM.MSG.DELETE.dnpipes-topic", json!({ "seq": 2 }))
            .await;
        all_see(13).await;
        other
            .api("STREAM.MSG.DELETE.dnpipes-topic", json!({ "seq": 5 }))
            .await;
        all_see(8).await;
        other
            .api("STREAM.PURGE.dnpipes-topic", json!({ "seq": 4 }))
            .await;
        all_see(4).await;
        two.reset(&name("topic")).await.expect("reset");
        all_see(0).await;
        push(&two, "topic", &["after"]).await.expect("stored");
        all_see(5).await;
        one.remove(&name("topic")).await.expect("removed");
        push(&two, "topic", &["again and again"])
            .await
            .expect("stored");
        all_see(15).await;
    }
}

#[tokio::test]
async fn many_messages_of_others_are_counted_a_few_at_a_look() {
    for kind in ["nats", "nats-new"] {
        let services = Services::start(&[kind]);
        let (one, two) = (client(&services.url()), client(&services.url()));
        let (texts, sum) = texts(20_000);
        push_texts(&one, &texts).await;
        let since = Instant::now();
        assert_eq!(bytes(&two, "topic").await, None, "{kind}");
        assert!(
            since.elapsed() < Duration::from_secs(1),
            "{:?}",
            since.elapsed()
        );
        counted(&two, "topic", sum).await;
        // From now on it keeps up.
        push_texts(&one, &texts[..1000]).await;
        let more: usize = texts[..1000].iter().map(String::len).sum();
        counted(&two, "topic", sum + more as u64).await;
    }
}
