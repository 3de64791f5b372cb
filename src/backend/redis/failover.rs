//! Sentinels name another master some ten seconds before the old one hears that it is a replica now, and closes its
//! connections. What it acknowledges meanwhile is lost; so they are asked again and again.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::Duration;

use super::client::Client;
use super::options::Topology;

/// How often they are asked.
const OFTEN: Duration = Duration::from_secs(1);

/// Has the client go over to another master as soon as it is named, from now on, as long as the client is there.
pub(super) fn watch(client: &Arc<Client>) {
    if matches!(client.url.topology, Topology::Sentinel(_))
        && !client.is_watched.swap(true, Ordering::Relaxed)
    {
        tokio::spawn(look_often(Arc::downgrade(client)));
    }
}

async fn look_often(client: Weak<Client>) {
    loop {
        tokio::time::sleep(OFTEN).await;
        let Some(client) = client.upgrade() else {
            return;
        };
        let Some(used) = client.server() else {
            continue;
        };
        match client.connector.named_server().await {
            Ok(named) if !used.is(&named) => {
                log::info!("{}: another server is the master now", client.url);
                client.connect_anew();
            }
            Ok(_) => {}
            Err(error) => log::debug!("asking for the master: {error}"),
        }
    }
}
