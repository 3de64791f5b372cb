//! Waiting until what was pushed is where it outlives the server's memory: on its disk, on its replicas.

use std::sync::Arc;
use std::time::Duration;

use redis::cluster_routing::{MultipleNodeRoutingInfo, RoutingInfo};
use redis::{Pipeline, Value};

use super::client::{Client, within};
use super::entry::{position, strange, text};
use super::keys::Keys;
use super::link::{ANSWER, Link, is_broken, translated};
use crate::error::{Error, Kind, Result};
use crate::message::{Position, PushId};

/// How long the server waits for replicas; what others want behind it on the same connection waits, too.
const ROUND: Duration = Duration::from_millis(500);

/// How long a mark stays, in seconds.
const MARKED: u64 = 60;

/// Something to write: whoever waits on a connection waits for what that one wrote, and so for all that was written before.
fn mark(keys: &Keys) -> Pipeline {
    let mut mark = redis::pipe();
    let key = keys.mark();
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
    pub(super) async fn copied(self: &Arc<Self>, keys: &Keys, proof: Proof) -> Result<()> {
        if self.url.replicas == 0 {
            return Ok(());
        }
        let what = || format!("waiting for replicas of {}", keys.stream);
        let mut wait = mark(keys);
        let producer: &[u8] = match &proof {
            Proof::Push(id) => id.producer.as_bytes(),
            Proof::Floor(_) | Proof::None => b"",
        };
        wait.cmd("HMGET")
            .arg(&keys.known)
            .arg(producer)
            .arg(".floor");
        wait.cmd("HGET").arg(&keys.earlier).arg(producer);
        // Of a cluster it goes where the mark goes.
        wait.cmd("WAIT")
            .arg(self.url.replicas)
            .arg(ROUND.as_millis() as u64);
        let ask = async |link: &mut Link| wait.query_async(link).await;
        let answer = self.asked(&self.copies, &what, 0, ask).await?;
        let answer = answer.map_err(|error| translated(what(), error).maybe_applied())?;
        let failed = match told(&answer) {
            None => strange("no answer to WAIT"),
            Some((_, found)) if !proof.is_in(&found) => {
                // One that became the master meanwhile: its replicas know nothing of it either.
                Error::new(Kind::Unreachable, what()).caused_by("another server is asked now")
            }
            Some((have, _)) if have >= i64::from(self.url.replicas) => return Ok(()),
            Some((have, _)) => {
                let why = format!("{have} of {} have it", self.url.replicas);
                Error::new(Kind::Unreachable, what()).caused_by(why)
            }
        };
        // What they are to have is on the server.
        Err(failed.maybe_applied())
    }
}

/// By what it is known that the server whose replicas are waited for is the one that has done it.
pub(super) enum Proof {
    /// It remembers the push.
    Push(PushId),
    /// It knows that the pipe starts there, or later.
    Floor(Position),
    /// Nothing was done that needs one.
    None,
}

/// What a server remembers: the producer's last push, among the last or among earlier ones, and the floor.
type Remembered<'a> = [&'a Value; 3];

impl Proof {
    fn is_in(&self, [last, earlier, floor]: &Remembered<'_>) -> bool {
        match self {
            Proof::Push(id) => [last, earlier].iter().any(|found| {
                let number = text(found).ok().and_then(|found| found.get(..20));
                number.is_some_and(|number| number.parse::<u64>().is_ok_and(|last| last >= id.seq))
            }),
            Proof::Floor(expected) => text(floor)
                .and_then(position)
                .is_ok_and(|floor| floor >= *expected),
            Proof::None => true,
        }
    }
}

/// How many replicas it is that the answer tells of, and what the server remembers.
fn told(answer: &Value) -> Option<(i64, Remembered<'_>)> {
    let Value::Array(answers) = answer else {
        return None;
    };
    match answers.as_slice() {
        [Value::Array(known), earlier, Value::Int(count)] => match known.as_slice() {
            [last, floor] => Some((*count, [last, earlier, floor])),
            _ => None,
        },
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::Producer;

    #[test]
    fn only_the_server_that_has_done_it_can_prove_it() {
        let id = PushId::first(Producer::from_bytes([7; 16]), 12);
        let push = |seq: u64| Value::BulkString(format!("{seq:020}1-5").into_bytes());
        let (none, floor) = (Value::Nil, Value::BulkString(b"1-5".to_vec()));
        for (found, is_there) in [
            ([&push(12), &none, &none], true),
            ([&none, &push(12), &none], true),
            ([&push(13), &none, &none], true),
            ([&push(11), &push(9), &none], false),
            ([&none, &none, &floor], false),
        ] {
            assert_eq!(Proof::Push(id).is_in(&found), is_there, "{found:?}");
        }
        let known = [&none, &none, &floor];
        assert!(Proof::Floor(Position::new(1, 5)).is_in(&known));
        assert!(!Proof::Floor(Position::new(1, 6)).is_in(&known));
        assert!(!Proof::Floor(Position::new(1, 5)).is_in(&[&none, &none, &none]));
        assert!(Proof::None.is_in(&[&none, &none, &none]));
    }
}
