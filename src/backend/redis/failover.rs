//! Sentinels name another master some ten seconds before the old one hears that it is a replica now, and closes its
//! connections. What it acknowledges meanwhile is lost; so they are asked again and again.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::Duration;

use super::client::Client;
use super::link::{CONNECT, Server, translated};
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
    // What was named last, and not what was connected to last: some connections may be new, and others old.
    let mut last: Option<Server> = None;
    loop {
        let Some(client) = client.upgrade() else {
            return;
        };
        match named(&client).await {
            Ok(Some(named)) => {
                let before = last.as_ref().map(|last| !last.is(&named));
                let used = client.server().map(|used| !used.is(&named));
                if before.or(used) == Some(true) {
                    log::info!("{}: another server is the master now", client.url);
                    client.connect_anew();
                }
                last = Some(named);
            }
            Ok(None) => {}
            Err(error) => log::debug!("asking for the master: {error}"),
        }
        drop(client);
        tokio::time::sleep(OFTEN).await;
    }
}

/// The master that Sentinels name.
async fn named(client: &Client) -> Result<Option<Server>> {
    let Topology::Sentinel(name) = &client.url.topology else {
        return Ok(None);
    };
    let hosts = client.url.broker.hosts.resolve().await?;
    let asked = client.connector.master(&hosts, name);
    match tokio::time::timeout(CONNECT, asked).await {
        Ok(Ok(client)) => Ok(Some(Server { client })),
        Ok(Err(error)) => Err(translated("asking Sentinels", error)),
        // They may answer the next time.
        Err(_) => Ok(None),
    }
}
