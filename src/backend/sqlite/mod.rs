//! The embedded default: one SQLite file (write-ahead log) that several processes of one host share.
//!
//! - [`file`]: the file, its schema, connections; [`chunk`]: messages in a row.
//! - [`writer`]: pushes, gathered into transactions; [`changes`]: what else changes the store; [`rows`]: their
//!   statements; [`pen`]: the connection that writes.
//! - [`cursor`]: subscribers; [`bell`]: turns at writing, and waking readers in other processes; [`shared`]: what they have
//!   in memory for that; [`recent`]: the newest pushes there; [`presence`]: whether the files are still there.
//!
//! Calls run where they are made, without a task switch: reads always, a push when nobody else is
//! writing. What has to wait for another process goes to the runtime's blocking threads.

mod bell;
mod changes;
mod chunk;
mod cursor;
mod file;
mod pen;
mod presence;
mod recent;
mod rows;
mod shared;
mod writer;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use rusqlite::{Connection, OptionalExtension, Row};
use tokio::task::AbortHandle;

use super::{Backend, Caps, Fut, PipeInfo, Source, Start, not_found};
use crate::error::{Error, Kind, Result};
use crate::message::{Batch, Position, PushId, time_from_micros};
use crate::name::PipeName;
use bell::Bell;
use chunk::Key;
use cursor::Cursor;
use presence::{FileId, Looks};
use writer::Writer;

/// What an acknowledged push survives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// A power cut: the disk has it.
    Full,
    /// The end of every process, but not of the operating system; fsync(2) on the pipe makes it `Full`.
    Process,
}

/// A row holds at most 1,000,000,000 bytes (sqlite.org/limits.html); this stays well below.
const MAX_MESSAGE: usize = 512 << 20;

/// Connections for reading that are kept open.
const READERS: usize = 4;
const READER_CACHE_KIB: u32 = 1024;
const WATCH_CACHE_KIB: u32 = 64;

/// How long the making of a store waits for another process that is at it.
const OPENING: Duration = Duration::from_secs(5);

/// A reader waits for nobody but a recovery after a crash; longer than this is an outage.
const READ_BUSY: Duration = Duration::from_millis(200);

/// How long a reset waits for the room of its messages to be free again.
const SWEEP_WAIT: Duration = Duration::from_secs(1);

/// How often a waiting process looks for commits of which nobody told it.
const SLOW_LOOK: Duration = Duration::from_secs(1);

/// The embedded store.
pub struct Sqlite {
    store: Arc<Store>,
}

struct Store {
    path: PathBuf,
    durability: Durability,
    bell: Arc<Bell>,
    database: FileId,
    /// SQLite's write-ahead log and its index, once they are in use.
    logs: OnceLock<[FileId; 2]>,
    looks: Looks,
    writer: Writer,
    readers: Mutex<Vec<Connection>>,
    listener: OnceLock<AbortHandle>,
    /// Whether messages that a reset has dropped still take room, as the disk was too full to delete them.
    unswept: AtomicBool,
}

impl Sqlite {
    /// Opens the store at `path` and makes it if there is none.
    ///
    /// # Errors
    /// The directory is missing (`NotFound`), not writable (`Denied`) or on a network file system
    /// (`Unsupported`); the file is damaged or another program's (`Damaged`).
    pub fn open(path: &Path, durability: Durability) -> Result<Self> {
        // Connections are opened later too, and a daemon changes its directory.
        let path = &file::resolved(path)
            .map_err(|error| Error::io(format!("the store's path {}", path.display()), error))?;
        file::prepare(path)?;
        let is_store = file::is_store(path)?;
        let bell = Arc::new(Bell::of(path)?);
        if !is_store {
            // One after the other, so that the tables are laid out once.
            let since = Instant::now();
            let Some(_turn) = bell.turn(|| since.elapsed() < OPENING)? else {
                let why = format!(
                    "{}: another process keeps the turn to write",
                    path.display()
                );
                return Err(Error::new(Kind::Unreachable, why));
            };
            file::lay_out(path)?;
        }
        let writer = Writer::open(path, durability)?;
        let told = std::fs::metadata(path)
            .map_err(|error| Error::io(format!("the store {}", path.display()), error))?;
        let logs = OnceLock::new();
        // Once it has read, the connection has them open. What is wrong with the store is said when it is used.
        let read = |row: &Row<'_>| row.get::<_, i64>(0);
        let has_read = writer.pen().idle().query_row(
            "SELECT count(*) FROM (SELECT 1 FROM pipe LIMIT 1)",
            [],
            read,
        );
        if has_read.is_ok()
            && let Ok(found) = find_logs(path)
        {
            logs.get_or_init(|| found);
        }
        Ok(Sqlite {
            store: Arc::new(Store {
                path: path.to_owned(),
                durability,
                bell,
                database: FileId::of(path, &told),
                logs,
                looks: Looks::new(),
                writer,
                readers: Mutex::default(),
                listener: OnceLock::new(),
                // By an earlier process, perhaps.
                unswept: AtomicBool::new(true),
            }),
        })
    }

    /// Runs `change` on a blocking thread. If the future is dropped before the change's turn has come, it is
    /// not made: what was reported as failed must not happen later.
    async fn write<T: Send + 'static>(
        &self,
        change: impl FnOnce(&Store, &Wanted) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let store = Arc::clone(&self.store);
        let wanted = Arc::new(());
        let asks = Wanted(Arc::downgrade(&wanted));
        let changed = tokio::task::spawn_blocking(move || change(&store, &asks)).await;
        drop(wanted);
        changed.map_err(|error| Error::new(Kind::Io, "changing the store").caused_by(error))?
    }

    /// Deletes what resets and removals have left, for a moment; the rest goes on behind.
    async fn sweep(&self) {
        let store = Arc::clone(&self.store);
        let sweep = tokio::task::spawn_blocking(move || store.sweep());
        // Nobody finds the messages any more; only their room on the disk is not free yet.
        if tokio::time::timeout(SWEEP_WAIT, sweep).await.is_err() {
            log::info!("still freeing the room of dropped messages");
        }
    }
}

/// Whether somebody still waits for a change.
struct Wanted(Weak<()>);

impl Wanted {
    fn still(&self) -> bool {
        self.0.strong_count() > 0
    }
}

impl Store {
    /// Runs `read` on one of the connections for reading.
    fn read<T>(
        &self,
        what: &str,
        read: impl FnOnce(&Connection) -> rusqlite::Result<T>,
    ) -> Result<T> {
        let pooled = self
            .readers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop();
        let connection = match pooled {
            Some(connection) => connection,
            None => file::connect(&self.path, self.durability, READER_CACHE_KIB, READ_BUSY)?,
        };
        let result = read(&connection)
            .map_err(|error| file::sqlite(format!("{what} in {}", self.path.display()), error));
        let mut pool = self.readers.lock().unwrap_or_else(PoisonError::into_inner);
        if pool.len() < READERS {
            pool.push(connection);
        }
        result
    }

    /// Refuses to change what is not there for others. To be called in a transaction.
    fn check_files(&self) -> Result<()> {
        self.database.check()?;
        match self.logs.get() {
            Some(logs) => logs.iter().try_for_each(FileId::check)?,
            None => {
                let found = find_logs(&self.path)?;
                self.logs.get_or_init(|| found);
            }
        }
        self.bell.check()
    }

    /// Starts to listen to other processes, on the first call.
    fn listen(self: &Arc<Self>) {
        self.listener.get_or_init(|| {
            let watch = file::connect(&self.path, self.durability, WATCH_CACHE_KIB, READ_BUSY);
            if let Err(error) = &watch {
                log::warn!("watching for commits: {error}");
            }
            let mut seen = None;
            let look = move || {
                // Grows when any other connection commits (sqlite.org/pragma.html#pragma_data_version).
                let version = watch.as_ref().ok().and_then(|watch| {
                    watch
                        .query_row("PRAGMA data_version", [], |row| row.get::<_, i64>(0))
                        .ok()
                });
                seen.replace(version) != Some(version)
            };
            tokio::spawn(bell::listen(Arc::clone(&self.bell), SLOW_LOOK, look)).abort_handle()
        });
    }
}

/// SQLite's write-ahead log and its index. As long as a connection that has read is open, nobody but a stranger deletes them.
fn find_logs(path: &Path) -> Result<[FileId; 2]> {
    let found = |end| {
        let path = file::beside(path, end);
        let context = || format!("the store's {}", path.display());
        let told = std::fs::metadata(&path).map_err(|error| Error::io(context(), error))?;
        Ok(FileId::of(&path, &told))
    };
    Ok([found("-wal")?, found("-shm")?])
}

impl Drop for Store {
    fn drop(&mut self) {
        if let Some(listener) = self.listener.get() {
            listener.abort();
        }
    }
}

/// A pipe's row, and the end of its log.
#[derive(Clone)]
struct Log {
    id: u64,
    slot: u64,
    start: u64,
    start_total: u64,
    modified: u64,
    /// The last row of messages.
    tail: Option<Tail>,
}

#[derive(Clone)]
struct Tail {
    last: u64,
    total: u64,
    time: u64,
}

impl Log {
    const BY_NAME: &'static str =
        "SELECT id, slot, start, start_total, modified FROM pipe WHERE name = ?1";

    /// The pipe's row and its tail. Inside a transaction both are of one moment; outside, a push may
    /// come between.
    fn find(connection: &Connection, name: &PipeName) -> rusqlite::Result<Option<Log>> {
        connection
            .prepare_cached(Log::BY_NAME)?
            .query_row([name.as_str()], Log::from_row)
            .optional()?
            .map(|log| log.with_tail(connection))
            .transpose()
    }

    fn from_row(row: &Row<'_>) -> rusqlite::Result<Log> {
        Ok(Log {
            id: row.get(0)?,
            slot: row.get(1)?,
            start: row.get(2)?,
            start_total: row.get(3)?,
            modified: row.get(4)?,
            tail: None,
        })
    }

    fn with_tail(mut self, connection: &Connection) -> rusqlite::Result<Log> {
        self.tail = connection
            .prepare_cached(
                "SELECT key, total, time FROM chunk WHERE key BETWEEN ?1 AND ?2
                 ORDER BY key DESC LIMIT 1",
            )?
            .query_row(self.keys(self.start), |row| {
                Ok(Tail {
                    last: Key::parse(row.get(0)?).last,
                    total: row.get(1)?,
                    time: row.get(2)?,
                })
            })
            .optional()?;
        Ok(self)
    }

    /// The keys of the rows from message `first` on.
    fn keys(&self, first: u64) -> [u64; 2] {
        [Key::of(self.slot, first), Key::of(self.slot, Key::LAST)]
    }

    /// The number that the next message gets.
    fn next(&self) -> u64 {
        self.tail.as_ref().map_or(self.start, |tail| tail.last + 1)
    }

    /// The bytes of all messages that were ever pushed.
    fn total(&self) -> u64 {
        self.tail
            .as_ref()
            .map_or(self.start_total, |tail| tail.total)
    }

    fn info(&self) -> PipeInfo {
        let count = self.next().saturating_sub(self.start);
        PipeInfo {
            count,
            bytes: Some(self.total().saturating_sub(self.start_total)),
            first: (count > 0).then(|| Position::new(self.id, self.start)),
            last: (count > 0).then(|| Position::new(self.id, self.next() - 1)),
            modified: time_from_micros(self.tail.as_ref().map_or(self.modified, |tail| tail.time)),
        }
    }
}

impl Backend for Sqlite {
    fn caps(&self) -> Caps {
        Caps {
            name: "sqlite",
            durable: true,
            remote: false,
            max_message: MAX_MESSAGE,
            whole_batches: true,
        }
    }

    fn push<'a>(&'a self, pipe: &'a PipeName, id: PushId, batch: Batch) -> Fut<'a, Position> {
        Box::pin(async move {
            batch.check(MAX_MESSAGE)?;
            let pushed = writer::push(&self.store, pipe, id, batch.clone()).await;
            let is_full = |error: &Error| error.kind() == Kind::Full;
            if pushed.as_ref().is_err_and(is_full)
                && self.store.unswept.swap(false, Ordering::Relaxed)
            {
                self.sweep().await;
                return writer::push(&self.store, pipe, id.again(), batch).await;
            }
            pushed
        })
    }

    fn subscribe<'a>(&'a self, pipe: &'a PipeName, start: Start) -> Fut<'a, Box<dyn Source>> {
        Box::pin(async move {
            let mut cursor = Cursor::new(Arc::clone(&self.store), pipe.clone(), start);
            if matches!(start, Start::After(_)) {
                // Told now: a gateway that has begun to answer can only break off.
                cursor.check()?;
            }
            Ok(Box::new(cursor) as Box<dyn Source>)
        })
    }

    fn stat<'a>(&'a self, pipe: &'a PipeName) -> Fut<'a, PipeInfo> {
        Box::pin(async move {
            let log = self
                .store
                .read("looking", |connection| Log::find(connection, pipe))?;
            log.map(|log| log.info()).ok_or_else(|| not_found(pipe))
        })
    }

    fn list(&self) -> Fut<'_, Vec<(PipeName, PipeInfo)>> {
        Box::pin(async move {
            let rows = self.store.read("listing", |connection| {
                connection
                    .prepare_cached(
                        "SELECT id, slot, start, start_total, modified, name FROM pipe ORDER BY name",
                    )?
                    .query_map([], |row| {
                        Ok((row.get::<_, String>(5)?, Log::from_row(row)?))
                    })?
                    .map(|row| row.and_then(|(name, log)| Ok((name, log.with_tail(connection)?))))
                    .collect::<rusqlite::Result<Vec<(String, Log)>>>()
            })?;
            rows.into_iter()
                .map(|(name, log)| Ok((PipeName::new(&name)?, log.info())))
                .collect()
        })
    }

    fn create<'a>(&'a self, pipe: &'a PipeName) -> Fut<'a, bool> {
        let pipe = pipe.clone();
        Box::pin(self.write(move |store, wanted| store.create(&pipe, wanted)))
    }

    fn reset<'a>(&'a self, pipe: &'a PipeName) -> Fut<'a, ()> {
        let pipe = pipe.clone();
        Box::pin(async move {
            self.write(move |store, wanted| store.reset(&pipe, wanted))
                .await?;
            self.sweep().await;
            Ok(())
        })
    }

    fn remove<'a>(&'a self, pipe: &'a PipeName) -> Fut<'a, ()> {
        let pipe = pipe.clone();
        Box::pin(async move {
            self.write(move |store, wanted| store.remove(&pipe, wanted))
                .await?;
            self.sweep().await;
            Ok(())
        })
    }

    fn sync<'a>(&'a self, _pipe: &'a PipeName) -> Fut<'a, ()> {
        Box::pin(async move {
            match self.store.durability {
                Durability::Full => Ok(()),
                Durability::Process => self.write(|store, _| store.sync()).await,
            }
        })
    }
}

impl Store {
    /// Forces the write-ahead log to the disk; what has left the log was forced when it left.
    fn sync(&self) -> Result<()> {
        let log = file::beside(&self.path, "-wal");
        match File::open(&log).and_then(|log| log.sync_data()) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::io(format!("syncing {}", log.display()), error))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod testing {
    use bytes::Bytes;
    use tempfile::TempDir;

    use super::*;
    use crate::message::Producer;

    pub(super) fn open(folder: &TempDir) -> Sqlite {
        Sqlite::open(&folder.path().join("pipes.db"), Durability::Process).expect("a store")
    }

    pub(super) async fn push(store: &Sqlite, pipe: &PipeName, messages: &[&str]) -> Position {
        let id = PushId::first(Producer::random().expect("randomness"), 1);
        let messages = messages.iter().map(|text| Bytes::from(text.to_string()));
        let batch = Batch::new(messages.collect()).expect("not empty");
        store.push(pipe, id, batch).await.expect("stored")
    }
}
