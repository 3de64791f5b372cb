//! What changes the store beside pushes: pipes are made, reset and removed, room is freed.

use std::fs::File;
use std::sync::atomic::Ordering;
use std::time::{Instant, SystemTime};

use rusqlite::Connection;

use super::writer::BUSY;
use super::{Log, Store, Wanted, bell, file, not_found, rows};
use crate::error::{Error, Kind, Result};
use crate::message::micros_from_time;
use crate::name::PipeName;

impl Store {
    /// Makes the log as long as it gets, where it is not yet.
    pub(super) fn extend_log(&self) {
        match self.try_extend_log() {
            Ok(Some(log)) => {
                // Behind everybody's back; the next commit would have to wait for it.
                if let Err(error) = log.sync_data() {
                    log::warn!("syncing the log of {}: {error}", self.path.display());
                }
            }
            Ok(None) => {}
            Err(error) => {
                log::warn!("{error}; pushes take longer until the log has grown by itself")
            }
        }
    }

    fn try_extend_log(&self) -> Result<Option<File>> {
        let Some(length) = file::missing_log(&self.path)? else {
            return Ok(None);
        };
        let since = Instant::now();
        let wanted = || since.elapsed() < BUSY;
        self.change("extending the log", wanted, |_| {
            Ok(file::extend_log(&self.path, length))
        })?
    }

    /// Runs `change` in a transaction of its own.
    fn change<T>(
        &self,
        what: &str,
        wanted: impl Fn() -> bool,
        change: impl FnOnce(&Connection) -> rusqlite::Result<T>,
    ) -> Result<T> {
        let mut pen = self.writer.pen();
        pen.let_go();
        let Some(changes) = self.begin(&mut pen, wanted)? else {
            return Err(Error::new(Kind::Interrupted, format!("{what}: given up")));
        };
        self.check_files()?;
        let value = change(changes.connection()).map_err(|error| self.error(what, error))?;
        changes.commit().map_err(|error| self.error(what, error))?;
        Ok(value)
    }

    pub(super) fn create(&self, pipe: &PipeName, wanted: &Wanted) -> Result<bool> {
        let now = micros_from_time(SystemTime::now());
        let created = self.change(
            "creating a pipe",
            || wanted.still(),
            |connection| {
                let found = Log::find(connection, pipe)?.is_some();
                if !found {
                    rows::insert_pipe(connection, pipe, now)?;
                }
                Ok(!found)
            },
        )?;
        if created {
            self.bell.ring(bell::NEW_PIPE, None);
        }
        Ok(created)
    }

    pub(super) fn reset(&self, pipe: &PipeName, wanted: &Wanted) -> Result<()> {
        let now = micros_from_time(SystemTime::now());
        self.drop_messages("resetting a pipe", pipe, wanted, |connection, log| {
            connection.execute(
                "UPDATE pipe SET start = ?2, start_total = ?3, modified = ?4 WHERE id = ?1",
                [log.id, log.next(), log.total(), now],
            )
        })
    }

    pub(super) fn remove(&self, pipe: &PipeName, wanted: &Wanted) -> Result<()> {
        self.drop_messages("removing a pipe", pipe, wanted, |connection, log| {
            connection.execute("DELETE FROM pipe WHERE id = ?1", [log.id])
        })
    }

    /// Changes a pipe's row so that its messages are gone, leaves their rows to [`Store::sweep`], and tells
    /// the readers.
    fn drop_messages(
        &self,
        what: &str,
        pipe: &PipeName,
        wanted: &Wanted,
        change: impl FnOnce(&Connection, &Log) -> rusqlite::Result<usize>,
    ) -> Result<()> {
        let mut resetting = None;
        let dropped = self.change(
            what,
            || wanted.still(),
            |connection| {
                let Some(log) = Log::find(connection, pipe)? else {
                    return Ok(None);
                };
                resetting = Some(self.bell.reset());
                change(connection, &log)?;
                rows::discard(connection, log.slot, log.next() - 1)?;
                Ok(Some(log.id))
            },
        );
        // Committed or not.
        drop(resetting);
        let id = dropped?.ok_or_else(|| not_found(pipe))?;
        self.bell.ring(id, None);
        Ok(())
    }

    /// Deletes the rows that resets and removals have left, and gives their room back to the disk.
    pub(super) fn sweep(&self) {
        let swept = self.try_sweep();
        self.unswept.store(swept.is_err(), Ordering::Relaxed);
        if let Err(error) = swept {
            log::warn!(
                "{error}; it will be tried again when a push finds no room, and at the next reset"
            );
        }
    }

    fn try_sweep(&self) -> Result<()> {
        while self.change("freeing room", || true, rows::sweep)? {}
        let mut shrunk = false;
        while self.change("freeing room", || true, rows::shrink)? {
            shrunk = true;
        }
        if shrunk {
            // The file gets shorter when the log is moved into it. Readers may keep a part of it back; then
            // a later commit does the rest.
            self.writer
                .pen()
                .idle()
                .query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()))
                .map_err(|error| self.error("freeing room", error))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Backend;
    use crate::backend::sqlite::chunk::Key;
    use crate::backend::sqlite::testing::{open, push};
    use crate::error::{Applied, Kind};
    use crate::message::{Batch, Producer, PushId};

    #[tokio::test]
    async fn the_removal_of_one_pipe_takes_nothing_of_the_next_one() {
        let folder = tempfile::tempdir().expect("a folder");
        let store = open(&folder);
        let [pipe, another] = ["topic", "another"].map(|name| PipeName::new(name).expect("legal"));
        push(&store, &pipe, &["a", "b", "c"]).await;
        // Nothing of it is left when it is removed, so the next one begins where it began.
        store.reset(&pipe).await.expect("reset");
        let removed = store.write(move |store, wanted| store.remove(&pipe, wanted));
        removed.await.expect("removed");
        push(&store, &another, &["d", "e"]).await;
        store.sweep().await;
        let info = store.stat(&another).await.expect("there");
        assert_eq!(info.count, 2);
        assert_eq!(info.last.map(|last| last.seq()), Some(2));
        let position = push(&store, &another, &["f"]).await;
        assert_eq!(position.seq(), 3);
    }

    #[tokio::test]
    async fn a_pipe_whose_numbers_are_used_up_takes_no_more_and_loses_none() {
        let folder = tempfile::tempdir().expect("a folder");
        let store = open(&folder);
        let pipe = PipeName::new("topic").expect("legal");
        store.create(&pipe).await.expect("made");
        drop(store);
        let file = rusqlite::Connection::open(folder.path().join("pipes.db")).expect("a database");
        file.execute("UPDATE pipe SET start = ?1", [Key::LAST - 1])
            .expect("nearly all used");
        drop(file);
        let store = open(&folder);
        push(&store, &pipe, &["a"]).await;
        let messages = ["b", "c"].map(bytes::Bytes::from).to_vec();
        let id = PushId::first(Producer::random().expect("randomness"), 1);
        let batch = Batch::new(messages).expect("not empty");
        let error = store.push(&pipe, id, batch).await.expect_err("no room");
        assert_eq!(error.kind(), Kind::Full);
        assert_eq!(error.applied(), Applied::No);
        assert!(error.to_string().contains("used up"), "{error}");
        push(&store, &pipe, &["d"]).await;
        assert_eq!(store.stat(&pipe).await.expect("there").count, 2);
    }
}
