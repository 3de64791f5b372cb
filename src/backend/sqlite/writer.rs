//! Changing the store: pushes, gathered into transactions, and the rare rest.
//!
//! Callers queue their pushes; one of them leads: it takes all that wait, stores them in one transaction,
//! and tells each its result. So a commit, and its fsync, serves all who waited meanwhile.

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::SystemTime;

use rusqlite::{Connection, OptionalExtension, Transaction, TransactionBehavior};
use tokio::sync::oneshot;

use super::bell::{self, Pass};
use super::{Durability, Log, Store, chunk, file, not_found};
use crate::error::{Error, Kind, Result};
use crate::message::{Batch, Position, PushId, micros_from_time};
use crate::name::PipeName;

const CACHE_KIB: u32 = 4096;

/// Transactions that a caller leads for others before the blocking threads take over.
const ROUNDS: usize = 4;

/// Producers that are remembered at least, to store a repeated push once.
const PRODUCERS: u32 = 32_768;

/// One new producer in so many, by its random id, clears away the old ones.
const PRUNE_EVERY: u16 = 4096;

/// Rows deleted in one transaction, so that pushes get their turn.
const SWEEP_ROWS: u32 = 64;

pub(super) struct Writer {
    connection: Mutex<Connection>,
    queue: Mutex<Queue>,
}

#[derive(Default)]
struct Queue {
    jobs: Vec<Job>,
    /// Whether somebody is leading, and will look at `jobs` again before he stops.
    led: bool,
}

struct Job {
    pipe: PipeName,
    id: PushId,
    batch: Batch,
    done: oneshot::Sender<Result<Position>>,
}

/// What became of a push.
struct Stored {
    position: Position,
    made_pipe: bool,
}

/// The connection for writing, with the right to write.
struct Turn<'a> {
    connection: MutexGuard<'a, Connection>,
    _pass: Pass<'a>,
}

impl Writer {
    pub(super) fn open(path: &Path, durability: Durability) -> Result<Self> {
        Ok(Writer {
            connection: Mutex::new(file::connect(path, durability, CACHE_KIB)?),
            queue: Mutex::default(),
        })
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues a job; true if the caller has to lead.
    fn enqueue(&self, job: Job) -> bool {
        let mut queue = self.queue();
        if queue.jobs.len() >= 64 {
            // While another process keeps the turn, callers give up and new ones come.
            queue.jobs.retain(|job| !job.done.is_closed());
        }
        queue.jobs.push(job);
        !std::mem::replace(&mut queue.led, true)
    }

    /// What waits. Nothing: then the leader has stopped leading.
    fn waiting(&self) -> Vec<Job> {
        let mut queue = self.queue();
        queue.jobs.retain(|job| !job.done.is_closed());
        queue.led = !queue.jobs.is_empty();
        std::mem::take(&mut queue.jobs)
    }
}

/// Pushes; see [`crate::backend::Backend::push`].
pub(super) async fn push(
    store: &Arc<Store>,
    pipe: &PipeName,
    id: PushId,
    batch: Batch,
) -> Result<Position> {
    let (done, result) = oneshot::channel();
    let job = Job {
        pipe: pipe.clone(),
        id,
        batch,
        done,
    };
    if store.writer.enqueue(job) && !store.lead_here() {
        let store = Arc::clone(store);
        tokio::task::spawn_blocking(move || store.lead());
    }
    result.await.unwrap_or_else(|_| {
        Err(Error::new(Kind::Io, "the store's writer has stopped").maybe_applied())
    })
}

impl Store {
    /// Leads without waiting for anybody; false if that cannot finish the work.
    fn lead_here(&self) -> bool {
        for _ in 0..ROUNDS {
            let Some(mut turn) = self.try_turn() else {
                return false;
            };
            let jobs = self.writer.waiting();
            if jobs.is_empty() {
                return true;
            }
            self.commit(&mut turn.connection, jobs);
            drop(turn);
            // Mostly nobody else waits, and that is seen without taking the turn again.
            let mut queue = self.writer.queue();
            if queue.jobs.is_empty() {
                queue.led = false;
                return true;
            }
        }
        false
    }

    /// Leads until nothing waits.
    fn lead(&self) {
        loop {
            let turn = self.turn();
            let jobs = self.writer.waiting();
            if jobs.is_empty() {
                return;
            }
            match turn {
                Ok(mut turn) => self.commit(&mut turn.connection, jobs),
                Err(error) => {
                    for job in jobs {
                        answer(job, Err(Error::new(error.kind(), error.to_string())));
                    }
                }
            }
        }
    }

    fn turn(&self) -> Result<Turn<'_>> {
        // The mutex first: the file lock does not hold threads of one process apart.
        let connection = self
            .writer
            .connection
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        Ok(Turn {
            connection,
            _pass: self.bell.enter()?,
        })
    }

    fn try_turn(&self) -> Option<Turn<'_>> {
        let connection = match self.writer.connection.try_lock() {
            Ok(connection) => connection,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return None,
        };
        Some(Turn {
            connection,
            _pass: self.bell.try_enter()?,
        })
    }

    fn commit(&self, connection: &mut Connection, jobs: Vec<Job>) {
        match self.store(connection, &jobs) {
            Ok(stored) => {
                for (job, stored) in jobs.into_iter().zip(stored) {
                    self.bell.ring(stored.position.epoch());
                    if stored.made_pipe {
                        self.bell.ring(bell::NEW_PIPE);
                    }
                    answer(job, Ok(stored.position));
                }
            }
            // One push that cannot be stored must not take the others with it.
            Err(_) if jobs.len() > 1 => {
                for job in jobs {
                    self.commit(connection, vec![job]);
                }
            }
            Err(error) => {
                if let Some(job) = jobs.into_iter().next() {
                    answer(job, Err(error));
                }
            }
        }
    }

    fn store(&self, connection: &mut Connection, jobs: &[Job]) -> Result<Vec<Stored>> {
        let now = micros_from_time(SystemTime::now());
        let context = || format!("pushing to {}", self.path.display());
        let transaction = connection
            .transaction_with_behavior(TransactionBehavior::Immediate)
            .map_err(|error| file::sqlite(context(), error))?;
        let stored = jobs
            .iter()
            .map(|job| append(&transaction, job, now))
            .collect::<rusqlite::Result<Vec<Stored>>>()
            .map_err(|error| file::sqlite(context(), error))?;
        transaction.commit().map_err(|error| {
            let error = file::sqlite(context(), error);
            match error.kind() {
                // Rolled back: SQLite takes these back as a whole.
                Kind::Full | Kind::Unreachable => error,
                _ => error.maybe_applied(),
            }
        })?;
        Ok(stored)
    }

    /// Runs `change` in a transaction of its own.
    fn change<T>(
        &self,
        what: &str,
        change: impl FnOnce(&Transaction<'_>) -> rusqlite::Result<T>,
    ) -> Result<T> {
        let mut turn = self.turn()?;
        let result = (|| {
            let transaction = turn
                .connection
                .transaction_with_behavior(TransactionBehavior::Immediate)?;
            let value = change(&transaction)?;
            transaction.commit()?;
            Ok(value)
        })();
        result.map_err(|error| file::sqlite(format!("{what} in {}", self.path.display()), error))
    }

    pub(super) fn create(&self, pipe: &PipeName) -> Result<bool> {
        let now = micros_from_time(SystemTime::now());
        let created = self.change("creating a pipe", |transaction| {
            let found = Log::find(transaction, pipe)?.is_some();
            if !found {
                insert_pipe(transaction, pipe, now)?;
            }
            Ok(!found)
        })?;
        if created {
            self.bell.ring(bell::NEW_PIPE);
        }
        Ok(created)
    }

    pub(super) fn reset(&self, pipe: &PipeName) -> Result<()> {
        let now = micros_from_time(SystemTime::now());
        let reset = self.change("resetting a pipe", |transaction| {
            let Some(log) = Log::find(transaction, pipe)? else {
                return Ok(None);
            };
            transaction.execute(
                "UPDATE pipe SET start = ?2, start_total = ?3, modified = ?4 WHERE id = ?1",
                [log.id, log.next(), log.total(), now],
            )?;
            discard(transaction, log.id, log.next() - 1)?;
            Ok(Some(log.id))
        })?;
        self.bell.ring(reset.ok_or_else(|| not_found(pipe))?);
        Ok(())
    }

    pub(super) fn remove(&self, pipe: &PipeName) -> Result<()> {
        let removed = self.change("removing a pipe", |transaction| {
            let Some(log) = Log::find(transaction, pipe)? else {
                return Ok(None);
            };
            transaction.execute("DELETE FROM pipe WHERE id = ?1", [log.id])?;
            discard(transaction, log.id, i64::MAX as u64)?;
            Ok(Some(log.id))
        })?;
        self.bell.ring(removed.ok_or_else(|| not_found(pipe))?);
        Ok(())
    }

    /// Deletes the rows that resets and removals have left.
    pub(super) fn sweep(&self) {
        let mut rows = SWEEP_ROWS;
        loop {
            match self.change("freeing room", |transaction| sweep(transaction, rows)) {
                Ok(true) => {}
                Ok(false) => return,
                // On a full disk the deletion itself needs a little room in the log.
                Err(error) if error.kind() == Kind::Full && rows > 1 => rows = 1,
                Err(error) => {
                    log::warn!("{error}; it will be tried at the next reset");
                    return;
                }
            }
        }
    }
}

fn answer(job: Job, result: Result<Position>) {
    if job.done.send(result).is_err() {
        // Its caller was interrupted while the transaction ran.
        log::debug!(
            "the result of a push to {} is not wanted any more",
            job.pipe
        );
    }
}

fn append(transaction: &Transaction<'_>, job: &Job, now: u64) -> rusqlite::Result<Stored> {
    let known = transaction
        .prepare_cached("SELECT seq, pipe, last FROM producer WHERE id = ?1")?
        .query_row([job.id.producer.as_bytes()], |row| {
            Ok((
                row.get::<_, u64>(0)?,
                Position::new(row.get(1)?, row.get(2)?),
            ))
        })
        .optional()?;
    if let Some((seq, position)) = known
        && job.id.seq <= seq
    {
        return Ok(Stored {
            position,
            made_pipe: false,
        });
    }
    let found = Log::find(transaction, &job.pipe)?;
    let made_pipe = found.is_none();
    let log = match found {
        Some(log) => log,
        None => insert_pipe(transaction, &job.pipe, now)?,
    };
    let mut last = log.next() - 1;
    let mut total = log.total();
    for run in chunk::runs(job.batch.messages()) {
        last += run.len() as u64;
        total += run.iter().map(|message| message.len() as u64).sum::<u64>();
        transaction
            .prepare_cached(
                "INSERT INTO chunk (pipe, last, count, total, time, data) VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
            )?
            .execute((log.id, last, run.len(), total, now, chunk::encode(run)))?;
    }
    transaction
        .prepare_cached(
            "REPLACE INTO producer (id, seq, pipe, last, time) VALUES (?1, ?2, ?3, ?4, ?5)",
        )?
        .execute((job.id.producer.as_bytes(), job.id.seq, log.id, last, now))?;
    let [a, b, ..] = *job.id.producer.as_bytes();
    if known.is_none() && u16::from_le_bytes([a, b]) % PRUNE_EVERY == 0 {
        prune(transaction)?;
    }
    Ok(Stored {
        position: Position::new(log.id, last),
        made_pipe,
    })
}

fn insert_pipe(transaction: &Transaction<'_>, pipe: &PipeName, now: u64) -> rusqlite::Result<Log> {
    transaction
        .prepare_cached(
            "INSERT INTO pipe (name, start, start_total, modified) VALUES (?1, 1, 0, ?2)
             RETURNING id, start, start_total, modified",
        )?
        .query_row((pipe.as_str(), now), Log::from_row)
}

fn discard(transaction: &Transaction<'_>, pipe: u64, last: u64) -> rusqlite::Result<usize> {
    transaction.execute(
        "INSERT INTO garbage (pipe, last) VALUES (?1, ?2)",
        [pipe, last],
    )
}

/// Deletes up to `rows` rows; false when there is nothing left to delete.
fn sweep(transaction: &Transaction<'_>, rows: u32) -> rusqlite::Result<bool> {
    let oldest = transaction
        .query_row("SELECT rowid, pipe, last FROM garbage LIMIT 1", [], |row| {
            Ok((
                row.get::<_, i64>(0)?,
                row.get::<_, u64>(1)?,
                row.get::<_, u64>(2)?,
            ))
        })
        .optional()?;
    let Some((rowid, pipe, last)) = oldest else {
        return Ok(false);
    };
    let deleted = transaction.execute(
        "DELETE FROM chunk WHERE pipe = ?1 AND last IN
         (SELECT last FROM chunk WHERE pipe = ?1 AND last <= ?2 ORDER BY last LIMIT ?3)",
        (pipe, last, rows),
    )?;
    if deleted < rows as usize {
        transaction.execute("DELETE FROM garbage WHERE rowid = ?1", [rowid])?;
    }
    Ok(true)
}

fn prune(transaction: &Transaction<'_>) -> rusqlite::Result<usize> {
    transaction.execute(
        "DELETE FROM producer WHERE time <
         (SELECT time FROM producer ORDER BY time DESC LIMIT 1 OFFSET ?1)",
        [PRODUCERS],
    )
}
