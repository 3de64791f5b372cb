//! The connection that writes, and its transactions.
//!
//! The greater part of what a small commit costs is locks (fcntl(2)) and the look at where the pipe ends. So
//! between the pushes of a busy process a read transaction stays open. The next transaction then may write
//! only if nobody else has committed since (sqlite.org/rescode.html, SQLITE_BUSY_SNAPSHOT); where it may, what
//! is known of the pipes is still so, and most of the locks are held already. While it is open, a checkpoint
//! gets no further than to where it began, so an idle process does not keep it: see [`Pen::rest`].

use std::collections::HashMap;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rusqlite::{Connection, ffi};

use super::file::{self, Disk};
use super::{Durability, Log};
use crate::error::Result;
use crate::name::PipeName;

const CACHE_KIB: u32 = 4096;

/// Commits that follow each other within this time make a process busy.
const BUSY: Duration = Duration::from_millis(5);

/// Commits until a process looks again whether it is the only one that writes.
const SHY: u32 = 32;

/// The commit after which a process looks whether the log is long enough, and how many lie between two looks.
const FIRST_LOOK: u64 = 8;
const LOOKS: u64 = 256;

/// Pipes that are known between two transactions.
const KNOWN: usize = 64;

pub(super) struct Pen {
    /// Before the connection, of which it is.
    hold: Hold,
    connection: Connection,
    /// The pipes as the last transaction left them, while the hold lasts.
    known: HashMap<PipeName, Log>,
    /// Pages in the write-ahead log after the last commit, and those at which they are moved.
    log_pages: Arc<AtomicU64>,
    checkpoint_pages: u64,
    /// When pushes were committed last, and how often.
    committed: Option<Instant>,
    commits: u64,
    shy: u32,
    /// Whether somebody will call [`Pen::rest`].
    is_watched: bool,
}

impl Pen {
    pub(super) fn open(path: &Path, durability: Durability) -> Result<Self> {
        let mut connection = file::connect(path, durability, CACHE_KIB, Duration::ZERO)?;
        let log_pages = Arc::new(AtomicU64::new(0));
        let told = Arc::clone(&log_pages);
        // In place of SQLite's own, which would move pages while the hold keeps most of them back.
        let count = move |_: &mut rusqlite::hooks::Wal, pages| {
            told.store(u64::try_from(pages).unwrap_or(0), Ordering::Relaxed);
            Ok(())
        };
        let hold = connection
            .wal_hook(Some(count))
            .and_then(|()| Hold::new(&connection));
        Ok(Pen {
            hold: hold.map_err(|error| {
                file::sqlite(format!("opening the store {}", path.display()), error)
            })?,
            connection,
            known: HashMap::new(),
            log_pages,
            checkpoint_pages: Disk::of(path)?.checkpoint_pages(),
            committed: None,
            commits: 0,
            shy: 0,
            is_watched: false,
        })
    }

    /// The connection between transactions, with nothing held.
    pub(super) fn idle(&mut self) -> &Connection {
        self.let_go();
        &self.connection
    }

    /// Lets go unless there was a commit since the last one that was `seen`; true when nothing is held.
    pub(super) fn rest(&mut self, seen: &mut Option<Instant>) -> bool {
        if std::mem::replace(seen, self.committed) == self.committed {
            self.let_go();
        }
        self.is_watched = self.hold.is_held;
        !self.is_watched
    }

    pub(super) fn let_go(&mut self) {
        self.known.clear();
        self.hold.end();
    }

    /// Begins a transaction that writes, which [`Pen::changes`] then takes care of.
    ///
    /// # Errors
    /// SQLite's, `SQLITE_BUSY` when another process is writing.
    pub(super) fn begin(&mut self) -> rusqlite::Result<()> {
        let mut begun = self.run("BEGIN IMMEDIATE");
        if begun.is_err() && self.hold.is_held {
            // Somebody else writes, too. What is held is of no use, and only keeps the log from shrinking.
            self.let_go();
            self.shy = SHY;
            begun = self.run("BEGIN IMMEDIATE");
        }
        begun
    }

    /// The transaction that has begun.
    pub(super) fn changes(&mut self) -> Changes<'_> {
        Changes {
            pen: self,
            is_committed: false,
        }
    }

    fn run(&self, statement: &str) -> rusqlite::Result<()> {
        self.connection
            .prepare_cached(statement)?
            .execute([])
            .map(drop)
    }

    /// Moves the log into the database file when it has grown long enough.
    fn checkpoint(&mut self) {
        if self.log_pages.load(Ordering::Relaxed) < self.checkpoint_pages {
            return;
        }
        self.let_go();
        let moved = self
            .connection
            .prepare_cached("PRAGMA wal_checkpoint(PASSIVE)")
            .and_then(|mut statement| statement.query_row([], |_| Ok(())));
        if let Err(error) = moved {
            // Nothing is lost: the log only grows, and the next commit tries again.
            log::debug!("moving the log into the database: {error}");
        }
    }
}

/// What has to be done after a commit of pushes.
pub(super) struct Followup {
    /// [`Pen::rest`], again and again until it is true.
    pub(super) rest: bool,
    /// [`file::extend_log`].
    pub(super) extend: bool,
}

/// A transaction that writes; dropped, it is rolled back.
pub(super) struct Changes<'a> {
    pen: &'a mut Pen,
    is_committed: bool,
}

impl Changes<'_> {
    pub(super) fn connection(&self) -> &Connection {
        &self.pen.connection
    }

    /// The pipe, as this transaction sees it.
    pub(super) fn log(&mut self, pipe: &PipeName) -> rusqlite::Result<Option<Log>> {
        match self.pen.known.remove(pipe) {
            Some(log) => Ok(Some(log)),
            None => Log::find(&self.pen.connection, pipe),
        }
    }

    /// Notes what became of the pipe in this transaction.
    pub(super) fn note(&mut self, pipe: &PipeName, log: Log) {
        if self.pen.known.len() >= KNOWN {
            self.pen.known.clear();
        }
        self.pen.known.insert(pipe.clone(), log);
    }

    /// Commits pushes; what is known of their pipes then may be held for the next ones.
    pub(super) fn commit_pushes(mut self) -> rusqlite::Result<Followup> {
        let pen = &mut *self.pen;
        let now = Instant::now();
        let last = pen.committed.replace(now);
        let is_busy = last.is_some_and(|last| now.duration_since(last) < BUSY);
        if is_busy && pen.shy == 0 && !pen.hold.is_held {
            // Within the transaction, so that nobody commits in between.
            pen.hold.begin()?;
        }
        self.end()?;
        let pen = &mut *self.pen;
        pen.shy = pen.shy.saturating_sub(1);
        if !pen.hold.is_held {
            pen.known.clear();
        }
        pen.commits += 1;
        let was_watched = pen.is_watched;
        pen.is_watched |= pen.hold.is_held;
        Ok(Followup {
            rest: pen.is_watched && !was_watched,
            extend: pen.commits % LOOKS == FIRST_LOOK,
        })
    }

    /// Commits what is no push, for which nothing is held.
    pub(super) fn commit(mut self) -> rusqlite::Result<()> {
        self.end()
    }

    fn end(&mut self) -> rusqlite::Result<()> {
        self.pen.run("COMMIT")?;
        self.is_committed = true;
        self.pen.checkpoint();
        Ok(())
    }
}

impl Drop for Changes<'_> {
    fn drop(&mut self) {
        if self.is_committed {
            return;
        }
        self.pen.let_go();
        // After failures for which SQLite rolls back by itself there is nothing to do.
        if !self.pen.connection.is_autocommit()
            && let Err(error) = self.pen.connection.execute_batch("ROLLBACK")
        {
            log::error!("rolling back: {error}");
        }
    }
}

/// A statement that reads, and is not finished while something is held.
struct Hold {
    statement: NonNull<ffi::sqlite3_stmt>,
    is_held: bool,
}

// SAFETY: a statement may go to another thread with its connection (sqlite.org/threadsafe.html, multi-thread);
// both are in one `Pen`.
unsafe impl Send for Hold {}

impl Hold {
    fn new(connection: &Connection) -> rusqlite::Result<Self> {
        let mut statement = std::ptr::null_mut();
        // The schema's table has a row for each table, so there is always more than one to come.
        let query = c"SELECT 1 FROM sqlite_schema";
        // SAFETY: an open connection, a text that ends with NUL, and a place for the statement.
        let code = unsafe {
            ffi::sqlite3_prepare_v2(
                connection.handle(),
                query.as_ptr(),
                -1,
                &mut statement,
                std::ptr::null_mut(),
            )
        };
        match NonNull::new(statement) {
            Some(statement) if code == ffi::SQLITE_OK => Ok(Hold {
                statement,
                is_held: false,
            }),
            _ => Err(failure(code)),
        }
    }

    fn begin(&mut self) -> rusqlite::Result<()> {
        // SAFETY: the statement is whole until it is dropped.
        match unsafe { ffi::sqlite3_step(self.statement.as_ptr()) } {
            ffi::SQLITE_ROW => {
                self.is_held = true;
                Ok(())
            }
            code => {
                self.end();
                Err(failure(code))
            }
        }
    }

    fn end(&mut self) {
        // SAFETY: as above. What it returns is how the last step went.
        unsafe { ffi::sqlite3_reset(self.statement.as_ptr()) };
        self.is_held = false;
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        // SAFETY: it is not used any more, and its connection is open: fields are dropped in their order.
        unsafe { ffi::sqlite3_finalize(self.statement.as_ptr()) };
    }
}

fn failure(code: std::ffi::c_int) -> rusqlite::Error {
    rusqlite::Error::SqliteFailure(ffi::Error::new(code), None)
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::super::Sqlite;
    use super::super::testing::{self, open};
    use super::*;
    use crate::backend::{Backend, Limit, Start};
    use crate::message::Position;

    const DEADLINE: Duration = Duration::from_secs(20);

    fn topic() -> PipeName {
        PipeName::new("topic").expect("legal")
    }

    async fn push(store: &Sqlite, text: &str) -> Position {
        testing::push(store, &topic(), &[text]).await
    }

    /// Pushes until something is held: until two pushes were fast enough, that is.
    async fn push_until_held(store: &Sqlite) -> Vec<String> {
        let since = Instant::now();
        let mut pushed = Vec::new();
        while !store.store.writer.pen().hold.is_held {
            assert!(since.elapsed() < DEADLINE, "nothing is held");
            pushed.push(format!("m{}", pushed.len()));
            push(store, pushed.last().expect("pushed")).await;
        }
        pushed
    }

    async fn contents(store: &Sqlite) -> Vec<String> {
        let mut source = store
            .subscribe(&topic(), Start::Oldest)
            .await
            .expect("a source");
        let limit = Limit {
            max_bytes: 1 << 20,
            before: Some(Position::MAX),
        };
        let mut all = Vec::new();
        loop {
            let messages = source.next(limit).await.expect("messages");
            if messages.is_empty() {
                return all;
            }
            let text = |message: &Bytes| String::from_utf8(message.to_vec()).expect("UTF-8");
            all.extend(messages.iter().map(|message| text(&message.data)));
        }
    }

    #[tokio::test]
    async fn processes_that_push_in_turns_lose_nothing_and_agree_on_the_order() {
        let folder = tempfile::tempdir().expect("a folder");
        let stores = [open(&folder), open(&folder)];
        let mut pushed = Vec::new();
        let mut last = Position::MIN;
        let mut was_held = 0;
        for turn in 0..60 {
            let store = &stores[turn % 2];
            // Long enough now and then that something is held although another one has just written.
            for number in 0..[1, 2, 3, 50][turn % 4] {
                let text = format!("{turn}.{number}");
                let position = push(store, &text).await;
                assert!(position > last, "{text}");
                last = position;
                pushed.push(text);
                was_held += usize::from(store.store.writer.pen().hold.is_held);
            }
        }
        assert!(was_held > 0, "this shows nothing");
        for store in &stores {
            assert_eq!(contents(store).await, pushed);
        }
    }

    #[tokio::test]
    async fn what_is_known_of_a_pipe_is_forgotten_when_another_process_changes_it() {
        let folder = tempfile::tempdir().expect("a folder");
        let (one, two) = (open(&folder), open(&folder));
        let mut last = Position::MIN;
        for remove in [false, true, false, true] {
            // A fresh process, which is not shy.
            let held = open(&folder);
            push_until_held(&held).await;
            if remove {
                two.remove(&topic()).await.expect("removed");
            } else {
                two.reset(&topic()).await.expect("reset");
            }
            let position = push(&held, "after").await;
            assert!(position > last);
            last = position;
            assert_eq!(contents(&one).await, ["after"], "remove: {remove}");
        }
    }

    #[tokio::test]
    async fn what_changes_the_store_beside_pushes_holds_nothing() {
        let folder = tempfile::tempdir().expect("a folder");
        let store = open(&folder);
        push_until_held(&store).await;
        for number in 0..200 {
            let pipe = PipeName::new(&format!("pipe{number}")).expect("legal");
            store.create(&pipe).await.expect("made");
            assert!(!store.store.writer.pen().hold.is_held, "{number}");
        }
    }

    #[tokio::test]
    async fn the_log_stays_short_under_a_busy_process_and_beside_an_idle_one() {
        let folder = tempfile::tempdir().expect("a folder");
        let (busy, idle) = (open(&folder), open(&folder));
        let log = || {
            std::fs::metadata(folder.path().join("pipes.db-wal"))
                .expect("a log")
                .len()
        };
        let limit = 2 * busy.store.writer.pen().checkpoint_pages * 4096;
        push_until_held(&idle).await;
        let since = Instant::now();
        while idle.store.writer.pen().hold.is_held {
            assert!(since.elapsed() < DEADLINE, "it never lets go");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        for number in 0..5000 {
            push(&busy, &number.to_string()).await;
            assert!(log() < limit, "{} bytes after {number} pushes", log());
        }
    }

    #[tokio::test]
    async fn the_log_gets_its_length_early_and_keeps_what_it_holds() {
        let folder = tempfile::tempdir().expect("a folder");
        let (one, two) = (open(&folder), open(&folder));
        let log = folder.path().join("pipes.db-wal");
        let length = || std::fs::metadata(&log).expect("a log").len();
        let full = 32 + one.store.writer.pen().checkpoint_pages * (4096 + 24);
        let since = Instant::now();
        let mut pushed = Vec::new();
        while length() < full {
            assert!(
                since.elapsed() < DEADLINE && pushed.len() < 500,
                "{}",
                length()
            );
            for store in [&one, &two] {
                pushed.push(pushed.len().to_string());
                push(store, pushed.last().expect("pushed")).await;
            }
        }
        let before = length();
        for _ in 0..20 {
            pushed.push(pushed.len().to_string());
            push(&one, pushed.last().expect("pushed")).await;
        }
        assert_eq!(length(), before);
        assert_eq!(contents(&two).await, pushed);
        // As after the death of all: what stands in the files is all that there is.
        let copy = tempfile::tempdir().expect("a folder");
        for name in ["pipes.db", "pipes.db-wal"] {
            std::fs::copy(folder.path().join(name), copy.path().join(name)).expect("copied");
        }
        assert_eq!(contents(&open(&copy)).await, pushed);
    }
}
