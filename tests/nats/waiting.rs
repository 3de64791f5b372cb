//! Readers that wait.

use std::time::{Duration, Instant};

use dnpipes::backend::{Backend, Limit, Start};

use crate::services::Services;
use crate::{Other, client, name, push};

const NEXT: Limit = Limit {
    max_bytes: 1 << 20,
    before: None,
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_waiting_reader_goes_on_at_once_in_a_pipe_that_others_made_again() {
    for kind in ["nats", "nats-new"] {
        let services = Services::start(&[kind]);
        let (reader, other) = (client(&services.url()), client(&services.url()));
        let pipe = name("topic");
        let mut source = reader
            .subscribe(&pipe, Start::Oldest)
            .await
            .expect("a source");
        for round in 0..3 {
            let text = round.to_string();
            let since = Instant::now();
            let (woken, ()) = tokio::join!(source.next(NEXT), async {
                tokio::time::sleep(Duration::from_millis(100)).await;
                push(&other, "topic", &[&text]).await.expect("stored");
            });
            assert_eq!(woken.expect("a message")[0].data, text);
            let took = since.elapsed();
            assert!(took < Duration::from_secs(2), "{kind}: {took:?}");
            let waiting = tokio::time::timeout(Duration::from_millis(50), source.next(NEXT));
            assert!(waiting.await.is_err());
            other.remove(&pipe).await.expect("removed");
        }
    }
}

/// Whoever may publish there need not be one who may reset.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_made_up_word_of_a_reset_hides_nothing() {
    let services = Services::start(&["nats"]);
    let (reader, other) = (client(&services.url()), Other::new(&services).await);
    let pipe = name("topic");
    let last = push(&reader, "topic", &["one"]).await.expect("stored");
    let mut source = reader
        .subscribe(&pipe, Start::Oldest)
        .await
        .expect("a source");
    assert_eq!(source.next(NEXT).await.expect("one")[0].data, "one");
    for _ in 0..20 {
        let told = format!("{}-99 dnpipes-topic", last.epoch() + 1);
        let told = other.0.publish("dnpipes.resets", told.into()).await;
        told.expect("published");
        other.0.flush().await.expect("sent");
        push(&reader, "topic", &["two"]).await.expect("stored");
        let next = tokio::time::timeout(Duration::from_secs(60), source.next(NEXT)).await;
        assert_eq!(next.expect("in time").expect("two")[0].data, "two");
    }
}

/// Memory of this process, in bytes.
fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").expect("a status");
    let line = status.lines().find(|line| line.starts_with("VmRSS:"));
    let number = line.and_then(|line| line.split_whitespace().nth(1));
    number
        .and_then(|number| number.parse::<usize>().ok())
        .expect("a number")
        << 10
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_readers_that_stand_still_hold_little_and_keep_nobody_up() {
    const BLOCKS: usize = 3000;
    let services = Services::start(&["nats-new"]);
    let client = client(&services.url());
    let block = "x".repeat(10_000);
    for _ in 0..BLOCKS / 100 {
        push(&client, "topic", &vec![block.as_str(); 100])
            .await
            .expect("stored");
    }
    let before = resident();
    let mut sources = Vec::new();
    let one = Limit {
        max_bytes: 1,
        before: None,
    };
    for _ in 0..100 {
        let mut source = client
            .subscribe(&name("topic"), Start::Oldest)
            .await
            .expect("a source");
        assert_eq!(source.next(one).await.expect("a message").len(), 1);
        sources.push(source);
    }
    let mut reader = client
        .subscribe(&name("topic"), Start::Oldest)
        .await
        .expect("a source");
    let mut count = 0;
    while count < BLOCKS {
        let since = Instant::now();
        count += reader.next(NEXT).await.expect("messages").len();
        push(&client, "other", &["x"]).await.expect("stored");
        assert!(since.elapsed() < Duration::from_secs(1));
    }
    let held = resident().saturating_sub(before);
    assert!(held < 100 << 20, "{held}");
    // They go on where they stood.
    for mut source in sources.into_iter().take(3) {
        let mut count = 1;
        while count < BLOCKS {
            count += source.next(NEXT).await.expect("messages").len();
        }
        assert_eq!(count, BLOCKS);
    }
}

#[tokio::test]
async fn a_connection_is_made_although_no_caller_waits_so_long() {
    let services = Services::start(&["nats"]);
    push(&client(&services.url()), "topic", &["hello"])
        .await
        .expect("stored");
    let port = services.server().slow_way(Duration::from_millis(200)).await;
    let slow = client(&format!("nats://127.0.0.1:{port}"));
    let since = Instant::now();
    loop {
        assert!(since.elapsed() < Duration::from_secs(20), "never");
        let pipe = name("topic");
        let stat = tokio::time::timeout(Duration::from_millis(50), slow.stat(&pipe));
        if let Ok(info) = stat.await {
            assert_eq!(info.expect("a pipe").count, 1);
            break;
        }
    }
}
