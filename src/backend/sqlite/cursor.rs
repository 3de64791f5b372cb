//! A subscriber's place in a pipe of the store.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use rusqlite::{Connection, OptionalExtension};

use super::chunk::{self, Key};
use super::{Log, Store, bell};
use crate::backend::{Floor, Fut, Limit, Source, Start, weight};
use crate::error::{Error, Kind, Result};
use crate::message::{Message, Position, time_from_micros};
use crate::name::PipeName;

pub(super) struct Cursor {
    store: Arc<Store>,
    pipe: PipeName,
    /// The pipe at the last look, and [`bell::Bell::resets`] before it.
    row: Option<Log>,
    looked: Option<u64>,
    /// The incarnation, and the number of the next message to fetch.
    epoch: u64,
    next: u64,
    /// Fetched, but not yet wanted: the rest of a row.
    held: VecDeque<Message>,
}

/// A row of messages as it lies in the store.
struct Row {
    key: u64,
    count: u64,
    time: u64,
    checksum: u32,
    data: Bytes,
}

impl Row {
    fn first(&self) -> u64 {
        let last = Key::parse(self.key).last;
        last + 1 - self.count.min(last)
    }
}

impl Cursor {
    pub(super) fn new(store: Arc<Store>, pipe: PipeName, start: Start) -> Self {
        let (epoch, next) = match start {
            Start::Oldest => (0, 0),
            Start::After(position) => (position.epoch(), position.seq().saturating_add(1)),
        };
        Cursor {
            store,
            pipe,
            row: None,
            looked: None,
            epoch,
            next,
            held: VecDeque::new(),
        }
    }

    /// Looks whether it can go on where it is to.
    ///
    /// # Errors
    /// `Damaged` where the pipe ends before that.
    pub(super) fn check(&mut self) -> Result<()> {
        let nothing = Limit {
            max_bytes: 1,
            before: Some(Position::MIN),
        };
        self.fetch(nothing).map(drop)
    }

    /// Looks where the pipe starts now.
    fn look(&mut self, connection: &Connection) -> rusqlite::Result<()> {
        // Before the look: what comes after it changes the number.
        self.looked = self.store.bell.resets();
        self.row = connection
            .prepare_cached(Log::BY_NAME)?
            .query_row([self.pipe.as_str()], Log::from_row)
            .optional()?;
        let Some(log) = &self.row else {
            self.held.clear();
            return Ok(());
        };
        if log.id != self.epoch {
            self.epoch = log.id;
            self.next = log.start;
            self.held.clear();
        }
        self.next = self.next.max(log.start);
        let dropped = |held: &Message| held.position.seq() < log.start;
        while self.held.front().is_some_and(dropped) {
            self.held.pop_front();
        }
        Ok(())
    }

    /// What to wait for: the pipe, or that some pipe is made.
    fn slot(&self) -> u64 {
        self.row.as_ref().map_or(bell::NEW_PIPE, |log| log.id)
    }

    fn fetch(&mut self, limit: Limit) -> Result<Vec<Message>> {
        let Some(rows) = self.fetch_rows(limit)? else {
            let why = format!(
                "it ends before message {}, behind which it was to go on: the store was set back; begin anew",
                self.next - 1
            );
            return Err(self.damaged(why));
        };
        for row in rows {
            self.hold(row)?;
        }
        Ok(self.take(limit))
    }

    /// The next rows; `None` where the pipe ends before them.
    fn fetch_rows(&mut self, limit: Limit) -> Result<Option<Vec<Row>>> {
        let store = Arc::clone(&self.store);
        store.read("reading", |connection| {
            if self.row.is_some() && self.is_current() {
                let rows = self.rows(connection, limit)?;
                let is_true = !rows.is_empty() || self.is_within(connection)?;
                // Still: then no other pipe has got the slot, and nothing was swept.
                if is_true && self.store.bell.check().is_ok() && self.is_current() {
                    return Ok(Some(rows));
                }
            }
            // All of one moment.
            let moment = connection.unchecked_transaction()?;
            self.look(&moment)?;
            let rows = self.rows(&moment, limit)?;
            let is_true = !rows.is_empty() || self.is_within(&moment)?;
            Ok(is_true.then_some(rows))
        })
    }

    /// Whether the pipe, which has no more rows, ends where this reader stands, and not before: as in a store that was set
    /// back to a backup. What is pushed then would have numbers that were read before, and be passed over.
    fn is_within(&self, connection: &Connection) -> rusqlite::Result<bool> {
        match &self.row {
            Some(log) if self.held.is_empty() => {
                let log = log.clone().with_tail(connection)?;
                // Nobody has read a message of the greatest number: it stands for the end of an incarnation.
                Ok(self.next <= log.next() || self.next == u64::MAX)
            }
            _ => Ok(true),
        }
    }

    /// Whether no pipe was reset or removed since the last look.
    fn is_current(&self) -> bool {
        self.looked.is_some() && self.looked == self.store.bell.resets()
    }

    fn rows(&self, connection: &Connection, limit: Limit) -> rusqlite::Result<Vec<Row>> {
        match &self.row {
            Some(log) if self.held.is_empty() => rows(connection, log.keys(self.next), limit),
            _ => Ok(Vec::new()),
        }
    }

    fn hold(&mut self, row: Row) -> Result<()> {
        let Row {
            key, count, time, ..
        } = row;
        let last = Key::parse(key).last;
        if chunk::checksum(key, count, &row.data) != row.checksum {
            return Err(self.damaged(format!("the messages up to {last} are damaged")));
        }
        let first = row.first();
        // Resets move `next` on by themselves, so it is no reset that has left a gap.
        if first > self.next {
            let gap = format!("the messages {} to {} are missing", self.next, first - 1);
            return Err(self.damaged(gap));
        }
        let time = time_from_micros(time);
        for (seq, data) in (first..).zip(chunk::decode(&row.data, count)?) {
            if seq >= self.next {
                let position = Position::new(self.epoch, seq);
                self.held.push_back(Message {
                    position,
                    time,
                    data,
                });
            }
        }
        self.next = last + 1;
        Ok(())
    }

    fn damaged(&self, what: String) -> Error {
        let place = self.store.path.display();
        Error::new(
            Kind::Damaged,
            format!("pipe {} in {place}: {what}", self.pipe),
        )
    }

    fn take(&mut self, limit: Limit) -> Vec<Message> {
        let before = limit.before.unwrap_or(Position::MAX);
        let mut gathered = 0;
        let wanted = |held: &&Message| {
            let wanted = held.position < before && gathered < limit.max_bytes.max(1);
            gathered += weight(&held.data);
            wanted
        };
        let count = self.held.iter().take_while(wanted).count();
        self.held.drain(..count).collect()
    }
}

/// The rows of these keys, about as many as `limit` allows.
fn rows(connection: &Connection, keys: [u64; 2], limit: Limit) -> rusqlite::Result<Vec<Row>> {
    let mut statement = connection.prepare_cached(
        "SELECT key, count, time, checksum, data FROM chunk WHERE key BETWEEN ?1 AND ?2 ORDER BY key",
    )?;
    let mut cursor = statement.query(keys)?;
    let mut rows = Vec::new();
    let mut gathered = 0;
    while gathered < limit.max_bytes.max(1) {
        let Some(row) = cursor.next()? else {
            break;
        };
        let data = Bytes::copy_from_slice(row.get_ref(4)?.as_bytes()?);
        let count: u64 = row.get(1)?;
        gathered += data.len() + count as usize * weight(&[]);
        rows.push(Row {
            key: row.get(0)?,
            count,
            time: row.get(2)?,
            checksum: row.get(3)?,
            data,
        });
    }
    Ok(rows)
}

impl Source for Cursor {
    fn next(&mut self, limit: Limit) -> Fut<'_, Vec<Message>> {
        Box::pin(async move {
            if limit.before.is_some() {
                return self.fetch(limit);
            }
            let store = Arc::clone(&self.store);
            store.listen();
            loop {
                let slot = self.slot();
                let waiter = store.bell.waiter(slot);
                // Taken before the look, so that a push in between rings it.
                let rung = waiter.rung();
                let messages = self.fetch(limit)?;
                if !messages.is_empty() {
                    return Ok(messages);
                }
                if slot == self.slot() {
                    rung.await;
                }
            }
        })
    }

    fn floor(&self) -> Arc<dyn Floor> {
        Arc::new(PipeFloor {
            store: Arc::clone(&self.store),
            pipe: self.pipe.clone(),
            known: Mutex::new((None, Position::MIN)),
        })
    }

    fn end(&mut self) -> Fut<'_, Position> {
        Box::pin(async move {
            let log = self
                .store
                .read("looking", |connection| Log::find(connection, &self.pipe))?;
            Ok(log.map_or(Position::MIN, |log| Position::new(log.id, log.next())))
        })
    }
}

/// Where the pipe starts; looked up anew only after some pipe of the store was reset.
struct PipeFloor {
    store: Arc<Store>,
    pipe: PipeName,
    /// [`bell::Bell::resets`] before the last look, and what it found.
    known: Mutex<(Option<u64>, Position)>,
}

impl Floor for PipeFloor {
    fn position(&self) -> Position {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        // Where it fails the number is none.
        drop(self.store.bell.check());
        let resets = self.store.bell.resets();
        if known.0.is_none() || known.0 != resets {
            match self
                .store
                .read("looking", |connection| self.look(connection))
            {
                Ok(floor) => *known = (resets, floor),
                Err(error) => log::warn!("{error}"),
            }
        }
        known.1
    }
}

impl PipeFloor {
    fn look(&self, connection: &Connection) -> rusqlite::Result<Position> {
        // All of one moment: it may be made again meanwhile.
        let moment = connection.unchecked_transaction()?;
        if let Some(log) = Log::find(&moment, &self.pipe)? {
            return Ok(Position::new(log.id, log.start));
        }
        // Removed: all that there was is gone. If it is made again, it gets a greater id.
        let last = moment
            .query_row(
                "SELECT seq FROM sqlite_sequence WHERE name = 'pipe'",
                [],
                |row| row.get(0),
            )
            .optional()?;
        Ok(Position::new(last.unwrap_or(0), u64::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Backend;
    use crate::backend::sqlite::Sqlite;
    use crate::backend::sqlite::testing::{open, push};

    const NOW: Limit = Limit {
        max_bytes: 1,
        before: Some(Position::MAX),
    };

    async fn next(source: &mut dyn Source) -> Vec<Bytes> {
        let messages = source.next(NOW).await.expect("messages");
        messages.into_iter().map(|message| message.data).collect()
    }

    /// Does what a reset or a removal does, up to where the process is killed: its change is committed. The
    /// reader looks once in the middle, when the change is told of but not there yet.
    fn die_after(store: &Sqlite, change: &str, reader: &dyn Floor) {
        let connection = Connection::open(&store.store.path).expect("a connection");
        connection.execute_batch("BEGIN IMMEDIATE").expect("begun");
        std::mem::forget(store.store.bell.reset());
        reader.position();
        connection.execute_batch(change).expect("changed");
        connection.execute_batch("COMMIT").expect("committed");
    }

    const RESET: &str = "UPDATE pipe SET start = start + 3, start_total = start_total + 3";

    #[tokio::test]
    async fn the_reset_of_a_process_that_died_is_seen_by_open_readers() {
        let folder = tempfile::tempdir().expect("a folder");
        let (reader, other) = (open(&folder), open(&folder));
        let pipe = PipeName::new("topic").expect("legal");
        let last = push(&reader, &pipe, &["a", "b", "c"]).await;
        let mut source = reader
            .subscribe(&pipe, Start::Oldest)
            .await
            .expect("source");
        let floor = source.floor();
        assert_eq!(next(&mut *source).await, ["a"]);
        assert!(floor.position() < last);
        die_after(&other, RESET, &*floor);
        assert!(floor.position() > last);
        assert!(next(&mut *source).await.is_empty());
        push(&other, &pipe, &["d"]).await;
        assert_eq!(next(&mut *source).await, ["d"]);
    }

    #[tokio::test]
    async fn the_removal_of_a_process_that_died_gives_no_reader_another_pipes_messages() {
        let folder = tempfile::tempdir().expect("a folder");
        let (reader, other) = (open(&folder), open(&folder));
        let [pipe, another] = ["topic", "another"].map(|name| PipeName::new(name).expect("legal"));
        let last = push(&reader, &pipe, &["a"]).await;
        let mut source = reader
            .subscribe(&pipe, Start::Oldest)
            .await
            .expect("source");
        let floor = source.floor();
        assert_eq!(next(&mut *source).await, ["a"]);
        die_after(&other, "DELETE FROM pipe", &*floor);
        // It gets the slot of the one that is gone, behind whose messages its own begin.
        push(&other, &another, &["b"]).await;
        assert!(next(&mut *source).await.is_empty());
        assert!(floor.position() > last);
        push(&other, &pipe, &["c"]).await;
        assert_eq!(next(&mut *source).await, ["c"]);
    }
}
