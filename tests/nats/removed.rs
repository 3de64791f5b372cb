//! Pipes that are removed while others write to them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use dnpipes::backend::Backend;
use dnpipes::backend::retry::Retry;
use dnpipes::name::PipeName;

use crate::services::Services;
use crate::{batch, client, name, new_id};

/// Longer than a push waits for the news of a removal, and shorter than for an answer.
const PATIENCE: Duration = Duration::from_secs(4);

/// Writes until it is told to stop. Stops where the server has broken the stream, as it may when one is made while another
/// one of its name is removed.
async fn write(client: Retry, pipe: PipeName, count: usize, stop: Arc<AtomicBool>) {
    let messages = batch(&vec!["message"; count]);
    while !stop.load(Ordering::Relaxed) {
        if let Err(error) = client.push(&pipe, new_id(), messages.clone()).await {
            let why = format!("{error:?}");
            assert!(why.contains("error opening msg block file"), "{why}");
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
            while !(remover.stat(&pipe).await).is_ok_and(|info| info.count > 5000) {
                assert!(since.elapsed() < Duration::from_secs(20), "nobody writes");
            }
            remover.remove(&pipe).await.expect("removed");
            let since = Instant::now();
            while since.elapsed() < PATIENCE
                && !(remover.stat(&pipe).await).is_ok_and(|info| info.count > 0)
            {}
            stop.store(true, Ordering::Relaxed);
            for writer in writers {
                writer
                    .await
                    .unwrap_or_else(|error| panic!("{kind}: {error}"));
            }
        }
    }
}
