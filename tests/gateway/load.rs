//! Many at once.

use std::collections::HashMap;
use std::fs;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use dnpipes::backend::http::{Http, HttpUrl};
use dnpipes::backend::{Backend, Limit, Start};
use dnpipes::message::{Batch, Producer, PushId};
use dnpipes::name::PipeName;

use crate::curl::curl;
use crate::gateway::Gateway;

/// The most memory that the process ever had resident, in MiB.
fn peak_mib(pid: i32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("its status");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB"));
    kib.expect("VmHWM").parse::<u64>().expect("a number") / 1024
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hundred_followers_of_twenty_writers_get_everything_in_order_in_little_memory() {
    const FOLLOWERS: usize = 200;
    const WRITERS: usize = 20;
    const PUSHES: usize = 40;
    let folder = tempfile::tempdir().expect("a folder");
    let source = format!("sqlite:{}/pipes.db", folder.path().display());
    let gateway = Gateway::start(&source, &[]);
    let url = HttpUrl::parse(gateway.url()).expect("its URL");
    let client: Arc<dyn Backend> = Arc::new(Http::open(&url).expect("a client"));
    let topic = PipeName::new("topic").expect("a name");
    let followers: Vec<_> = (0..FOLLOWERS)
        .map(|_| {
            let (client, topic) = (Arc::clone(&client), topic.clone());
            tokio::spawn(async move {
                let mut source = client
                    .subscribe(&topic, Start::Oldest)
                    .await
                    .expect("a source");
                let mut seen = Vec::new();
                while seen.len() < WRITERS * PUSHES {
                    let limit = Limit {
                        max_bytes: 1 << 16,
                        before: None,
                    };
                    let messages = source.next(limit).await.expect("messages");
                    seen.extend(messages.into_iter().map(|message| message.data));
                }
                seen
            })
        })
        .collect();
    let writers: Vec<_> = (0..WRITERS)
        .map(|writer| {
            let (client, topic) = (Arc::clone(&client), topic.clone());
            tokio::spawn(async move {
                let producer = Producer::random().expect("randomness");
                for number in 0..PUSHES {
                    let text = format!("{writer} {number} {}", "x".repeat(number * 211 % 5000));
                    let batch = Batch::new(vec![Bytes::from(text)]).expect("a message");
                    let id = PushId::first(producer, number as u64 + 1);
                    client.push(&topic, id, batch).await.expect("stored");
                }
            })
        })
        .collect();
    let everything = async {
        for writer in writers {
            writer.await.expect("a writer");
        }
        let mut all = Vec::new();
        for follower in followers {
            all.push(follower.await.expect("a follower"));
        }
        all
    };
    let all = tokio::time::timeout(Duration::from_secs(120), everything)
        .await
        .expect("everybody gets everything in time");
    let mut next = HashMap::new();
    for message in &all[0] {
        let text = str::from_utf8(message).expect("text");
        let mut words = text.split(' ');
        let writer = words.next().expect("a writer");
        let number: usize = words.next().expect("a number").parse().expect("a number");
        let expected: &mut usize = next.entry(writer.to_owned()).or_default();
        assert_eq!(number, *expected, "writer {writer}");
        *expected += 1;
    }
    assert!(all.iter().all(|seen| *seen == all[0]), "all see one order");
    let peak = peak_mib(gateway.pid());
    assert!(peak < 200, "{peak} MiB");
}

#[test]
fn a_body_of_very_many_messages_is_refused_and_one_of_many_takes_little() {
    const MOST: usize = 1 << 20;
    let folder = tempfile::tempdir().expect("a folder");
    let gateway = Gateway::start("memory:", &[]);
    let pipe = format!("{}v1/pipes/topic", gateway.url());
    let push = |content: &[u8], frame: &str| {
        let file = folder.path().join("body");
        std::fs::write(&file, content).expect("a file");
        let data = format!("@{}", file.display());
        let messages = format!("{pipe}/messages?frame={frame}");
        curl(&["--data-binary", &data, &messages]).0
    };
    for (frame, empty) in [("line", &b"\n"[..]), ("nul", b"\0"), ("len", b"\0\0\0\0")] {
        assert_eq!(push(&empty.repeat(MOST + 1), frame), 413, "{frame}");
        assert_eq!(
            push(&empty.repeat((60 << 20) / empty.len()), frame),
            413,
            "{frame}"
        );
        assert_eq!(push(&empty.repeat(MOST), frame), 200, "{frame}");
        assert_eq!(curl(&["-X", "DELETE", &pipe]).0, 200);
    }
    let peak = peak_mib(gateway.pid());
    assert!(peak < 512, "{peak} MiB");
}
