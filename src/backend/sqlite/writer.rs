//! Pushes, gathered into transactions.
//!
//! Callers queue their pushes; one of them leads: it takes all that wait, stores them in one transaction,
//! and tells each its result. So a commit, and its fdatasync, serves all who waited meanwhile.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant, SystemTime};

use rusqlite::{ErrorCode, ffi};
use tokio::sync::oneshot;

use super::bell::{self, Pause};
use super::chunk::{self, HEADER, Key, Row};
use super::file::Disk;
use super::pen::{Changes, Pen};
use super::recent::Cell;
use super::{Durability, Store, Tail, file, rows};
use crate::error::{Error, Kind, Result};
use crate::message::{Batch, Position, PushId, micros_from_time};
use crate::name::PipeName;

/// Transactions that a caller leads for others before the blocking threads take over.
const ROUNDS: usize = 4;

/// How long another may keep SQLite's lock before the store counts as unreachable: longer than a transaction
/// that is under way takes on a disk with much to do.
pub(super) const BUSY: Duration = Duration::from_secs(2);

/// How long after the last push a process lets go of what it holds for the next one.
const REST: Duration = Duration::from_millis(20);

/// Room that a row takes beside its messages, at most, in bytes.
const ROW: u64 = 16 << 10;

pub(super) struct Writer {
    pen: Mutex<Pen>,
    queue: Mutex<Queue>,
    /// Bytes that may be pushed before the disk is looked at again.
    allowance: AtomicU64,
}

#[derive(Default)]
struct Queue {
    jobs: Vec<Job>,
    /// Whether somebody is leading, and will look at `jobs` again before he stops.
    led: bool,
}

impl Queue {
    /// Drops the jobs whose callers have given up: they are not stored.
    fn drop_unwanted(&mut self) {
        self.jobs.retain(|job| !job.done.is_closed());
    }
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
    /// Its messages, where a [`Cell`] holds them.
    row: Option<Row>,
}

impl Writer {
    pub(super) fn open(path: &Path, durability: Durability) -> Result<Self> {
        Ok(Writer {
            pen: Mutex::new(Pen::open(path, durability)?),
            queue: Mutex::default(),
            allowance: AtomicU64::new(0),
        })
    }

    /// Refuses `bytes` more on a disk that is nearly full: one full to the brim could not even be reset.
    fn check_room(&self, path: &Path, pipe: &PipeName, bytes: u64) -> Result<()> {
        let cost = bytes + ROW;
        let spent = |allowance: u64| allowance.checked_sub(cost);
        if self
            .allowance
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, spent)
            .is_ok()
        {
            return Ok(());
        }
        let room = Disk::of(path)?.room();
        if room < cost {
            let path = path.display();
            let why =
                format!("pushing to {pipe}: the disk of {path} has no room; a reset makes some");
            return Err(Error::new(Kind::Full, why));
        }
        // Others fill the disk too.
        self.allowance.store((room - cost) / 16, Ordering::Relaxed);
        Ok(())
    }

    pub(super) fn pen(&self) -> MutexGuard<'_, Pen> {
        self.pen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The pen, if nobody writes with it.
    fn free_pen(&self) -> Option<MutexGuard<'_, Pen>> {
        match self.pen.try_lock() {
            Ok(pen) => Some(pen),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues a job; true if the caller has to lead.
    fn enqueue(&self, job: Job) -> bool {
        let mut queue = self.queue();
        if queue.jobs.len() >= 64 {
            // While another process keeps the turn, callers give up and new ones come.
            queue.drop_unwanted();
        }
        queue.jobs.push(job);
        !std::mem::replace(&mut queue.led, true)
    }

    /// Takes what waits.
    fn waiting(&self) -> Vec<Job> {
        let mut queue = self.queue();
        queue.drop_unwanted();
        std::mem::take(&mut queue.jobs)
    }

    /// Whether anybody waits for his push.
    fn is_wanted(&self) -> bool {
        self.queue().jobs.iter().any(|job| !job.done.is_closed())
    }

    /// Stops leading, unless something has come meanwhile.
    fn is_done(&self) -> bool {
        let mut queue = self.queue();
        queue.drop_unwanted();
        queue.led = !queue.jobs.is_empty();
        !queue.led
    }
}

/// Pushes; see [`crate::backend::Backend::push`].
pub(super) async fn push(
    store: &Arc<Store>,
    pipe: &PipeName,
    id: PushId,
    batch: Batch,
) -> Result<Position> {
    let bytes = (batch.bytes() + batch.messages().len() * HEADER) as u64;
    store.writer.check_room(&store.path, pipe, bytes)?;
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
    fn lead_here(self: &Arc<Self>) -> bool {
        for _ in 0..ROUNDS {
            let Some(mut pen) = self.writer.free_pen() else {
                return false;
            };
            let Some(changes) = self.try_begin(&mut pen) else {
                return false;
            };
            let left = self.commit(changes, self.writer.waiting());
            self.commit_each(&mut pen, left);
            if self.writer.is_done() {
                return true;
            }
        }
        false
    }

    /// Leads until nothing waits.
    fn lead(self: &Arc<Self>) {
        while !self.writer.is_done() {
            let mut pen = self.writer.pen();
            let left = match self.begin(&mut pen, || self.writer.is_wanted()) {
                Ok(Some(changes)) => self.commit(changes, self.writer.waiting()),
                Ok(None) => Vec::new(),
                Err(error) => {
                    for job in self.writer.waiting() {
                        answer(job, Err(Error::new(error.kind(), error.to_string())));
                    }
                    Vec::new()
                }
            };
            self.commit_each(&mut pen, left);
        }
    }

    /// Begins a transaction if nobody else is writing or waits to.
    fn try_begin<'a>(&self, pen: &'a mut Pen) -> Option<Changes<'a>> {
        if self.bell.is_turn_taken() {
            return None;
        }
        // If something else is wrong than that it is taken, `begin` will say what.
        pen.begin().is_ok().then(|| pen.changes())
    }

    /// Begins a transaction when the turn has come; `None` if it is not wanted any more.
    pub(super) fn begin<'a>(
        &self,
        pen: &'a mut Pen,
        wanted: impl Fn() -> bool,
    ) -> Result<Option<Changes<'a>>> {
        let Some(_turn) = self.bell.turn(&wanted)? else {
            return Ok(None);
        };
        let since = Instant::now();
        let mut pause = Pause::default();
        while let Err(error) = pen.begin() {
            let error = self.error("writing", error);
            if error.kind() != Kind::Unreachable || since.elapsed() > BUSY {
                return Err(error);
            }
            if !wanted() {
                return Ok(None);
            }
            // Who has the turn is next: only the transaction that is under way stands before.
            pause.rest();
        }
        let changes = pen.changes();
        // Looked at again behind the lock: nothing that comes later is changed unwanted.
        Ok(wanted().then_some(changes))
    }

    pub(super) fn error(&self, what: &str, error: rusqlite::Error) -> Error {
        file::sqlite(format!("{what} in {}", self.path.display()), error)
    }

    /// Stores the jobs' pushes in the transaction that has begun, and answers them; returns those that have to
    /// be tried one by one.
    #[must_use]
    fn commit(self: &Arc<Self>, changes: Changes<'_>, jobs: Vec<Job>) -> Vec<Job> {
        match self.store(changes, &jobs) {
            Ok(stored) => {
                for (job, stored) in jobs.into_iter().zip(stored) {
                    self.bell.ring(stored.position.epoch(), stored.row.as_ref());
                    if stored.made_pipe {
                        self.bell.ring(bell::NEW_PIPE, None);
                    }
                    answer(job, Ok(stored.position));
                }
            }
            // One push that cannot be stored must not take the others with it. Nothing of a transaction that failed is
            // there, so each of them is a first try still.
            Err(_) if jobs.len() > 1 => return jobs,
            Err(error) => {
                if let Some(job) = jobs.into_iter().next() {
                    answer(job, Err(error));
                }
            }
        }
        Vec::new()
    }

    fn commit_each(self: &Arc<Self>, pen: &mut Pen, jobs: Vec<Job>) {
        for job in jobs {
            match self.begin(pen, || !job.done.is_closed()) {
                Ok(Some(changes)) => {
                    let left = self.commit(changes, vec![job]);
                    debug_assert!(left.is_empty());
                }
                Ok(None) => {}
                Err(error) => answer(job, Err(error)),
            }
        }
    }

    fn store(self: &Arc<Self>, mut changes: Changes<'_>, jobs: &[Job]) -> Result<Vec<Stored>> {
        // It may have taken long until the turn came.
        self.looks.now_and_then(|| self.check_files())?;
        self.bell.end_reset();
        let now = micros_from_time(SystemTime::now());
        let stored = jobs
            .iter()
            .map(|job| append(&mut changes, job, now))
            .collect::<rusqlite::Result<Vec<Stored>>>()
            .map_err(|error| self.error("pushing", error))?;
        let followup = changes.commit_pushes().map_err(|error| {
            // Rolled back: SQLite takes these back as a whole.
            let is_taken_back = matches!(
                error.sqlite_error_code(),
                Some(ErrorCode::DiskFull | ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked)
            );
            let error = self.error("pushing", error);
            match is_taken_back {
                true => error,
                false => error.maybe_applied(),
            }
        })?;
        if followup.rest {
            self.rest_later();
        }
        if followup.extend {
            let store = Arc::clone(self);
            tokio::task::spawn_blocking(move || store.extend_log());
        }
        Ok(stored)
    }

    /// Lets go of what the pen holds once nobody has pushed for a while.
    fn rest_later(self: &Arc<Self>) {
        let store = Arc::downgrade(self);
        tokio::spawn(async move {
            let mut seen = None;
            loop {
                tokio::time::sleep(REST).await;
                let Some(store) = store.upgrade() else {
                    return;
                };
                // Where it is taken, somebody writes.
                let pen = store.writer.free_pen();
                if pen.is_some_and(|mut pen| pen.rest(&mut seen)) {
                    return;
                }
            }
        });
    }
}

fn answer(job: Job, result: Result<Position>) {
    if job.done.send(result).is_err() {
        // Its caller was interrupted while the transaction ran.
        log::debug!("nobody wants to know what became of a push to {}", job.pipe);
    }
}

fn append(changes: &mut Changes<'_>, job: &Job, now: u64) -> rusqlite::Result<Stored> {
    if job.id.repeated
        && let Some(position) = rows::find(changes.connection(), &job.pipe, job.id)?
    {
        return Ok(Stored {
            position,
            made_pipe: false,
            row: None,
        });
    }
    let found = changes.log(&job.pipe)?;
    let made_pipe = found.is_none();
    let mut log = match found {
        Some(log) => log,
        None => rows::insert_pipe(changes.connection(), &job.pipe, now)?,
    };
    let mut insert = changes.connection().prepare_cached(
        "INSERT INTO chunk (key, count, total, time, producer, push, checksum, data)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)",
    )?;
    let mut only = None;
    for (at, run) in chunk::runs(job.batch.messages()).enumerate() {
        let last = log.next() - 1 + run.len() as u64;
        if last > Key::LAST {
            return Err(rusqlite::Error::SqliteFailure(
                ffi::Error::new(ffi::SQLITE_FULL),
                Some(format!(
                    "the numbers of {}'s messages are used up; remove that pipe, and make it anew",
                    job.pipe
                )),
            ));
        }
        let total = log.total() + run.iter().map(|message| message.len() as u64).sum::<u64>();
        let row = Row::new(Key::of(log.slot, last), run, now);
        insert.execute((
            row.key,
            row.count,
            total,
            row.time,
            job.id.producer.as_bytes(),
            job.id.seq,
            row.checksum,
            &row.data[..],
        ))?;
        only = (at == 0 && Cell::holds(&row)).then_some(row);
        log.tail = Some(Tail {
            last,
            total,
            time: now,
        });
    }
    drop(insert);
    let position = Position::new(log.id, log.next() - 1);
    changes.note(&job.pipe, log);
    Ok(Stored {
        position,
        made_pipe,
        row: only,
    })
}
