//! Readers that wait.

use std::time::{Duration, Instant};

use dnpipes::backend::{Backend, Limit, Start};

use crate::services::Services;
use crate::{client, name, push};

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
