//! Pushes.

use std::sync::Arc;

use super::bulk;
use super::client::Client;
use super::entry::{position, text};
use super::keys::Keys;
use super::options::Topology;
use super::scripts;
use crate::error::{Error, Kind, Result};
use crate::message::{Batch, Position, PushId};
use crate::name::PipeName;

/// The longest string that Redis takes by default (proto-max-bulk-len), in bytes.
pub(super) const MAX_MESSAGE: usize = 512 << 20;

/// The most messages of one push: the script keeps others from the server while it runs.
const MAX_BATCH: usize = 2 << 20;

/// What Redis says where there is no id for a message.
const USED_UP: &str = "exhausted the last possible ID";

/// Appends the messages under the push's identity.
pub(super) async fn push(
    client: &Arc<Client>,
    pipe: &PipeName,
    keys: &Keys,
    id: PushId,
    batch: &Batch,
) -> Result<Position> {
    batch.check(MAX_MESSAGE)?;
    let messages = batch.messages();
    if messages.len() > MAX_BATCH {
        let why = format!("{pipe}: a push has {MAX_BATCH} messages at most");
        return Err(Error::new(Kind::TooLong, why));
    }
    if let Some(turn) = client.bulk.turn(id, batch)
        && let Some(server) = client.server()
        && let Some(position) = bulk::push(turn, server, keys, id, batch).await?
    {
        return Ok(position);
    }
    let in_cluster = client.url.topology == Topology::Cluster;
    // In a cluster nobody pushes by transactions.
    let touches = !in_cluster && (id.repeated || client.bulk.may_come(id.producer));
    // Another key of the same says that there is nothing to touch.
    let claim = touches.then(|| keys.claim(id.producer));
    let claim = claim.as_ref().unwrap_or(&keys.known);
    // While a slot is moved, none of its nodes runs a script where some of the keys are there and others are not. So one
    // that most pipes do not have is named only where it is needed.
    let mut earlier = match in_cluster {
        true => &keys.known,
        false => &keys.earlier,
    };
    let largest = messages.iter().map(|message| message.len()).max();
    loop {
        let answer = client.run(
            &client.commands,
            || format!("pushing to {pipe}"),
            &scripts::PUSH,
            [&keys.stream, &keys.known, earlier, claim],
            batch.bytes(),
            |script| {
                script
                    .arg(id.producer.as_bytes())
                    .arg(format!("{:020}", id.seq))
                    .arg(batch.bytes())
                    .arg(largest.unwrap_or(0));
                for message in messages {
                    script.arg(&message[..]);
                }
            },
        );
        let answer = answer.await.map_err(|error| match error.kind() {
            Kind::Io if error.to_string().contains(USED_UP) => used_up(pipe, keys, error),
            // What a script fails for in its midst: some may be stored.
            Kind::Io => error.maybe_applied(),
            _ => error,
        })?;
        match text(&answer)? {
            // Nothing is stored before the script has them.
            "" if *earlier != keys.earlier => earlier = &keys.earlier,
            last => {
                if touches {
                    client.bulk.settle(id.producer);
                }
                return position(last);
            }
        }
    }
}

/// Ids only grow, also when the pipe is reset or removed.
fn used_up(pipe: &PipeName, keys: &Keys, error: Error) -> Error {
    let Keys { stream, known, .. } = keys;
    let why = format!(
        "{pipe}: there is no id behind the greatest, which somebody has used; the way out, also for its messages: DEL {stream} {known}"
    );
    Error::new(Kind::Io, why).caused_by(error).maybe_applied()
}
