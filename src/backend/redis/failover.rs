//! Sentinels name another master some ten seconds before the old one hears that it is a replica now, and closes its
//! connections. What it acknowledges meanwhile is lost; so they are asked again and again.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::Duration;

use super::client::Client;
use super::link::{CONNECT, translated};
use super::options::Topology;
use crate::error::Result;

/// How often they are asked.
const OFTEN: Duration = Duration::from_secs(1);

/// Has the client go over to another master as soon as it is named, from now on, as long as the client is there. To be
/// called in the runtime.
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
        match is_another(&client).await {
            Ok(true) => {
                log::info!("{}: another server is the master now", client.url);
                client.connect_anew();
            }
            Ok(false) => {}
            Err(error) => log::debug!("asking for the master: {error}"),
        }
    }
}

/// Whether the master that they name is not the server that is used.
async fn is_another(client: &Client) -> Result<bool> {
    let (Some(used), Topology::Sentinel(name)) = (client.server(), &client.url.topology) else {
        return Ok(false);
    };
    let hosts = client.url.broker.hosts.resolve().await?;
    let asked = client.connector.master(&hosts, name);
    match tokio::time::timeout(CONNECT, asked).await {
        Ok(Ok(named)) => Ok(!used.is_of(&named)),
        Ok(Err(error)) => Err(translated("asking Sentinels", error)),
        // They may answer the next time.
        Err(_) => Ok(false),
    }
}
