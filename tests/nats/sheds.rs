//! Streams that drop messages before everybody has read them: what a reader missed is counted, and said.

use std::sync::Arc;

use dnpipes::backend::retry::Retry;
use dnpipes::backend::{Backend, Limit, Source, Start};
use serde_json::json;

use crate::services::Services;
use crate::{LOG, Other, client, keep_log, name, push};

/// The sum of what the log says was missed of a pipe.
fn missed(pipe: &str) -> u64 {
    let lines = LOG.warnings(&format!("{pipe}: a reader fell behind: "));
    let count = |line: &String| {
        let (_, rest) = line.split_once("behind: ")?;
        rest.split(' ').next()?.parse::<u64>().ok()
    };
    lines.iter().filter_map(count).sum()
}

/// Reads up to message `last`, and returns the numbers that the messages are.
async fn read_up_to(source: &mut Box<dyn Source>, last: u64) -> Vec<u64> {
    let limit = Limit {
        max_bytes: 1,
        before: None,
    };
    let mut numbers = Vec::new();
    while numbers.last() != Some(&last) {
        for message in source.next(limit).await.expect("messages") {
            let text = String::from_utf8_lossy(&message.data).into_owned();
            let number = text.split(' ').next().and_then(|word| word.parse().ok());
            numbers.push(number.expect("a number"));
        }
    }
    assert!(numbers.is_sorted_by(|one, next| one < next));
    numbers
}

async fn publish(other: &Other, subject: &'static str, numbers: std::ops::Range<u64>) {
    let padding = "x".repeat(1000);
    for number in numbers {
        let sent = other
            .0
            .request(subject, format!("{number} {padding}").into());
        sent.await.expect("an acknowledgement");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_falls_behind_a_limit_is_told_of_and_goes_on() {
    keep_log();
    for kind in ["nats", "nats-new"] {
        let services = Services::start(&[kind]);
        let other = Other::new(&services).await;
        let pipe = format!("SHED-{kind}");
        let settings = json!({ "max_msgs": 100, "discard": "old", "subjects": ["shed"] });
        other.stream(&format!("dnpipes-{pipe}"), settings).await;
        publish(&other, "shed", 0..150).await;
        let client = Arc::new(client(&services.url()));
        let client = Retry::new(client, None);
        let source = client.subscribe(&name(&pipe), Start::Oldest).await;
        let mut source = source.expect("a source");
        // Where it begins, it has missed nothing.
        assert_eq!(read_up_to(&mut source, 50).await, [50]);
        assert_eq!(missed(&pipe), 0);
        publish(&other, "shed", 150..1150).await;
        let read = read_up_to(&mut source, 1149).await;
        // Who keeps up misses nothing.
        for number in 1150..1300 {
            publish(&other, "shed", number..number + 1).await;
            assert_eq!(read_up_to(&mut source, number).await, [number]);
        }
        drop(source);
        assert!(read.len() < 1099);
        assert_eq!(read.len() as u64 + missed(&pipe), 1099, "{kind}");
    }
    let text = dnpipes::metrics::text();
    let line = text
        .lines()
        .find(|line| line.starts_with("dnpipes_missed_messages_total "));
    assert_ne!(line, Some("dnpipes_missed_messages_total 0"));
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_overtaken_by_a_reset_has_not_fallen_behind() {
    keep_log();
    for kind in ["nats", "nats-new"] {
        let services = Services::start(&[kind]);
        let client = client(&services.url());
        let pipe = format!("reset-{kind}");
        let texts: Vec<String> = (0..5000)
            .map(|number| format!("{number} {}", "x".repeat(1000)))
            .collect();
        let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
        push(&client, &pipe, &texts).await.expect("stored");
        let source = client.subscribe(&name(&pipe), Start::Oldest).await;
        let mut source = source.expect("a source");
        assert_eq!(read_up_to(&mut source, 0).await, [0]);
        client.reset(&name(&pipe)).await.expect("reset");
        push(&client, &pipe, &["5000"]).await.expect("stored");
        assert_eq!(read_up_to(&mut source, 5000).await, [5000]);
        drop(source);
        assert_eq!(missed(&pipe), 0);
    }
}
