//! Pipes that are removed while others write to them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use dnpipes::backend::Backend;
use dnpipes::backend::retry::Retry;
use dnpipes::name::PipeName;

use crate::services::Services;
use crate::{batch, client, name, new_id};

/// The last message of each push, in bytes: for an answer to so much a push waits for 19 seconds.
const LAST: usize = 900_000;

/// Far longer than a push waits for the news of a removal, also on a busy machine, and shorter than for the answer.
const PATIENCE: Duration = Duration::from_secs(15);

/// How often to look at the pipe: the server is to have time for the writers.
const LOOK: Duration = Duration::from_millis(10);

/// Writes until it is told to stop. Stops where the server has broken the stream, as it may when one is made while another
/// one of its name is removed.
async fn write(client: Retry, pipe: PipeName, count: usize, stop: Arc<AtomicBool>) {
    let last = "x".repeat(LAST);
    let mut messages = vec!["message"; count - 1];
    messages.push(&last);
    let messages = batch(&messages);
    while !stop.load(Ordering::Relaxed) {
        if let Err(error) = client.push(&pipe, new_id(), messages.clone()).await {
            let why = format!("{error:?}");
            assert!(why.contains(" msg block file "), "{why}");
            return;
        }
    }
}

/// Nobody answers for what has come to the stream by then.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writers_soon_go_on_after_a_removal() {
    for kind in ["nats", "nats-new"] {
        let services = Services::start(&[kind]);
        let remover = client(&services.url());
        for round in 0..4 {
            let pipe = name(&format!("topic {round}"));
            let stop = Arc::new(AtomicBool::new(false));
            let writers = [1, 1, 3, 1500].map(|count| {
                let patient = Arc::new(client(&services.url()));
                let patient = Retry::new(patient, Some(PATIENCE));
                tokio::spawn(write(patient, pipe.clone(), count, Arc::clone(&stop)))
            });
            let since = Instant::now();
            while !(remover.stat(&pipe).await).is_ok_and(|info| info.count > 1000) {
                assert!(since.elapsed() < Duration::from_secs(60), "nobody writes");
                tokio::time::sleep(LOOK).await;
            }
            remover.remove(&pipe).await.expect("removed");
            let since = Instant::now();
            while since.elapsed() < PATIENCE
                && !(remover.stat(&pipe).await).is_ok_and(|info| info.count > 0)
            {
                tokio::time::sleep(LOOK).await;
            }
            stop.store(true, Ordering::Relaxed);
            for writer in writers {
                writer
                    .await
                    .unwrap_or_else(|error| panic!("{kind}: {error}"));
            }
        }
    }
}
