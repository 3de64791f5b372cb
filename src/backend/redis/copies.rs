//! Waiting until what was pushed is where it outlives the server's memory: on its disk, on its replicas.

use std::sync::Arc;
use std::time::Duration;

use redis::cluster_routing::{MultipleNodeRoutingInfo, RoutingInfo};
use redis::{Pipeline, Value};

use super::client::{Client, within};
use super::entry::strange;
use super::keys::Keys;
use super::link::{ANSWER, Link, is_broken, translated};
use crate::error::{Error, Kind, Result};

/// How long the server waits for replicas; what others want behind it on the same connection waits, too.
const ROUND: Duration = Duration::from_millis(500);

/// How long a mark stays, in seconds.
const MARKED: u64 = 60;

/// Something to write: whoever waits on a connection waits for what that one wrote, and so for all that was written before.
fn mark(keys: &Keys) -> Pipeline {
    let mut mark = redis::pipe();
    let key = format!("{}:synced", keys.known);
    mark.cmd("HSET").arg(&key).arg("at").arg(1).ignore();
    mark.cmd("EXPIRE").arg(&key).arg(MARKED).ignore();
    mark
}

impl Client {
    /// Waits until the server's disk has what was pushed, where the server can tell (Redis 7.2, with an
    /// append-only file).
    pub(super) async fn sync(&self, keys: &Keys) -> Result<()> {
        // On its own connection, as it keeps others waiting.
        let mut link = self.own_link().await?;
        let mut wait = redis::cmd("WAITAOF");
        wait.arg(1).arg(0).arg(ANSWER.as_millis() as u64 / 2);
        let waited = async {
            mark(keys).exec_async(&mut link).await?;
            match &mut link {
                Link::Single(link) => wait.query_async(link).await,
                // Those that this connection wrote nothing to do not wait.
                Link::Cluster(link) => {
                    let masters = (MultipleNodeRoutingInfo::AllMasters, None);
                    link.route_command(wait, RoutingInfo::MultiNode(masters))
                        .await
                }
            }
        };
        match within("syncing", waited).await? {
            Ok(Value::Array(done)) if done.first() == Some(&Value::Int(0)) => {
                Err(Error::new(Kind::Unreachable, "syncing").caused_by("the disk is behind"))
            }
            Ok(_) => Ok(()),
            Err(error) if is_broken(&error) || error.code() != Some("ERR") => {
                Err(translated("syncing", error))
            }
            // It has no such command, or no such file.
            Err(_) => Ok(()),
        }
    }

    /// Waits until as many replicas as the URL asks for have all that was written to the pipe (redis.io, "WAIT").
    ///
    /// # Errors
    /// `Unreachable`, as well where replicas are missing or too far behind; what was written is on the server.
    pub(super) async fn copied(self: &Arc<Self>, keys: &Keys) -> Result<()> {
        if self.url.replicas == 0 {
            return Ok(());
        }
        let what = || format!("waiting for replicas of {}", keys.stream);
        let mut wait = mark(keys);
        // Of a cluster it goes where the mark goes.
        wait.cmd("WAIT")
            .arg(self.url.replicas)
            .arg(ROUND.as_millis() as u64);
        let ask = async |link: &mut Link| wait.query_async(link).await;
        let answer = self.asked(&self.copies, &what, 0, ask).await?;
        let failed = match answer.map(count) {
            Ok(Some(have)) if have >= i64::from(self.url.replicas) => return Ok(()),
            Ok(Some(have)) => {
                let why = format!("{have} of {} have it", self.url.replicas);
                Error::new(Kind::Unreachable, what()).caused_by(why)
            }
            Ok(None) => strange("no answer to WAIT"),
            Err(error) => translated(what(), error),
        };
        // What they are to have is on the server.
        Err(failed.maybe_applied())
    }
}

/// How many replicas it is that the answer tells of.
fn count(answer: Value) -> Option<i64> {
    match answer {
        Value::Array(answers) => match answers.as_slice() {
            [Value::Int(count)] => Some(*count),
            _ => None,
        },
        _ => None,
    }
}
