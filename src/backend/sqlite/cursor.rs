//! A subscriber's place in a pipe of the store.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use rusqlite::{Connection, OptionalExtension};

use super::chunk::{Key, Row, Unread};
use super::{Log, Store, bell};
use crate::backend::{Floor, Fut, Limit, Source, Start, weight};
use crate::error::{Error, Kind, Result};
use crate::message::{Message, Position, time_from_micros};
use crate::name::PipeName;

pub(super) struct Cursor {
    store: Arc<Store>,
    pipe: PipeName,
    /// The pipe at the last look, and [`bell::Bell::resets`] before it.
    log: Option<Log>,
    looked: Option<u64>,
    /// The incarnation, and the number of the next message to fetch.
    epoch: u64,
    next: u64,
    /// Fetched, but not yet wanted: the rest of a row, and rows behind it.
    held: VecDeque<Unread>,
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
            log: None,
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
        // Before the look: what comes after it changes the number. A look that fails was none.
        let resets = self.store.bell.resets();
        self.looked = None;
        self.log = connection
            .prepare_cached(Log::BY_NAME)?
            .query_row([self.pipe.as_str()], Log::from_row)
            .optional()?;
        self.looked = resets;
        let Some(log) = &self.log else {
            self.held.clear();
            return Ok(());
        };
        if log.id != self.epoch {
            self.epoch = log.id;
            self.next = log.start;
            self.held.clear();
        }
        self.next = self.next.max(log.start);
        let start = log.start;
        self.held.iter_mut().for_each(|row| row.skip_to(start));
        self.held.retain(|row| !row.is_empty());
        Ok(())
    }

    /// What to wait for: the pipe, or that some pipe is made.
    fn slot(&self) -> u64 {
        self.log.as_ref().map_or(bell::NEW_PIPE, |log| log.id)
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
            if self.log.is_some() && self.is_current() {
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
        match &self.log {
            Some(log) if self.held.is_empty() => {
                let log = log.clone().with_tail(connection)?;
                // Nobody has read a message of the greatest number: it stands for the end of an incarnation.
                Ok(self.next <= log.next() || self.next == u64::MAX)
            }
            _ => Ok(true),
        }
    }

    /// What was shown after `version`, if it comes next: so that it need not be looked for in the store.
    fn shown_after(&self, version: u64) -> Option<Row> {
        let log = self.log.as_ref()?;
        let row = self.store.bell.cell(log.id).shown_after(version)?;
        let is_next = Key::parse(row.key).slot == log.slot && row.first() == self.next;
        // As for those that are read in the store.
        (is_next && self.store.bell.check().is_ok() && self.is_current()).then_some(row)
    }

    /// Whether no pipe was reset or removed since the last look.
    fn is_current(&self) -> bool {
        self.looked.is_some() && self.looked == self.store.bell.resets()
    }

    fn rows(&self, connection: &Connection, limit: Limit) -> rusqlite::Result<Vec<Row>> {
        match &self.log {
            Some(log) if self.held.is_empty() => rows(connection, log.keys(self.next), limit),
            _ => Ok(Vec::new()),
        }
    }

    fn hold(&mut self, row: Row) -> Result<()> {
        let last = Key::parse(row.key).last;
        if !row.is_sound() {
            return Err(self.damaged(format!("the messages up to {last} are damaged")));
        }
        let first = row.first();
        // Resets move `next` on by themselves, so it is no reset that has left a gap.
        if first > self.next {
            let gap = format!("the messages {} to {} are missing", self.next, first - 1);
            return Err(self.damaged(gap));
        }
        let mut unread = Unread::of(&row)?;
        unread.skip_to(self.next);
        if !unread.is_empty() {
            self.held.push_back(unread);
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
        let mut taken = Vec::new();
        let mut gathered = 0;
        while let Some(row) = self.held.front_mut() {
            let time = time_from_micros(row.time);
            while Position::new(self.epoch, row.seq) < before && gathered < limit.max_bytes.max(1) {
                let Some((seq, data)) = row.take() else {
                    break;
                };
                gathered += weight(&data);
                taken.push(Message {
                    position: Position::new(self.epoch, seq),
                    time,
                    data,
                });
            }
            if !row.is_empty() {
                break;
            }
            self.held.pop_front();
        }
        taken
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
        // It is not known yet whether the row is as it was made.
        gathered += data
            .len()
            .saturating_add((count as usize).saturating_mul(weight(&[])));
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
                let version = store.bell.cell(slot).version();
                let messages = self.fetch(limit)?;
                if !messages.is_empty() {
                    return Ok(messages);
                }
                if slot == self.slot() {
                    rung.await;
                    if let Some(row) = self.shown_after(version) {
                        self.hold(row)?;
                        return Ok(self.take(limit));
                    }
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
    use std::time::Duration;

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
    async fn a_row_that_is_half_read_is_read_on_as_far_as_it_is_wanted_and_there() {
        let folder = tempfile::tempdir().expect("a folder");
        let store = open(&folder);
        let pipe = PipeName::new("topic").expect("legal");
        let last = push(&store, &pipe, &["a", "b", "c", "d"]).await;
        let mut source = store.subscribe(&pipe, Start::Oldest).await.expect("source");
        assert_eq!(next(&mut *source).await, ["a"]);
        let limit = Limit {
            max_bytes: 1 << 20,
            before: Some(Position::new(last.epoch(), last.seq() - 1)),
        };
        let messages = source.next(limit).await.expect("messages");
        assert_eq!(messages.len(), 1);
        assert_eq!(messages[0].position.seq(), last.seq() - 2);
        assert!(source.next(limit).await.expect("the bound").is_empty());
        // All but the last one of the row.
        let floor = source.floor();
        die_after(&store, RESET, &*floor);
        assert_eq!(next(&mut *source).await, ["d"]);
        push(&store, &pipe, &["e", "f"]).await;
        assert_eq!(next(&mut *source).await, ["e"]);
        store.reset(&pipe).await.expect("reset");
        assert!(next(&mut *source).await.is_empty());
        push(&store, &pipe, &["g"]).await;
        assert_eq!(next(&mut *source).await, ["g"]);
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

    const ANY: Limit = Limit {
        max_bytes: 1,
        before: None,
    };

    /// What is there at once, if anything is.
    async fn now(next: &mut Fut<'_, Vec<Message>>) -> Option<Vec<Message>> {
        let now = tokio::time::timeout(Duration::ZERO, next).await;
        now.ok().map(|messages| messages.expect("messages"))
    }

    #[tokio::test]
    async fn what_is_shown_is_delivered_only_where_it_comes_next() {
        let folder = tempfile::tempdir().expect("a folder");
        let store = open(&folder);
        let pipe = PipeName::new("topic").expect("legal");
        let last = push(&store, &pipe, &["a", "b"]).await;
        let bell = &store.store.bell;
        let after = |count| Key::of(0, last.seq() + count);
        let row = |key| Row::new(key, &[Bytes::from_static(b"c")], 0);
        let mut damaged = row(after(1));
        damaged.checksum += 1;
        let mut source = store.subscribe(&pipe, Start::After(last)).await;
        let source = source.as_mut().expect("a source");
        let mut waits = source.next(ANY);
        assert!(now(&mut waits).await.is_none());
        let other_slot = Key::of(1, last.seq() + 1);
        for wrong in [row(after(0)), row(after(2)), row(other_slot), damaged] {
            bell.ring(last.epoch(), Some(&wrong));
            assert!(now(&mut waits).await.is_none());
        }
        // It is not in the store: so it was not looked for there.
        bell.ring(last.epoch(), Some(&row(after(1))));
        let shown = now(&mut waits).await.expect("a message");
        assert_eq!(shown[0].data, "c");
        assert_eq!(shown[0].position.seq(), last.seq() + 1);
    }

    #[tokio::test]
    async fn what_is_shown_is_not_delivered_behind_a_reset_that_was_not_looked_at() {
        let folder = tempfile::tempdir().expect("a folder");
        let store = open(&folder);
        let pipe = PipeName::new("topic").expect("legal");
        let last = push(&store, &pipe, &["a"]).await;
        let mut source = store.subscribe(&pipe, Start::After(last)).await;
        let source = source.as_mut().expect("a source");
        let mut waits = source.next(ANY);
        assert!(now(&mut waits).await.is_none());
        let bell = &store.store.bell;
        let reset = bell.reset();
        let key = Key::of(0, last.seq() + 1);
        let row = Row::new(key, &[Bytes::from_static(b"b")], 0);
        bell.ring(last.epoch(), Some(&row));
        assert!(now(&mut waits).await.is_none());
        drop(reset);
        bell.ring(last.epoch(), Some(&row));
        assert!(now(&mut waits).await.is_none());
        // Looked at by now.
        bell.ring(last.epoch(), Some(&row));
        assert_eq!(now(&mut waits).await.expect("a message")[0].data, "b");
    }

    /// Two pipes that share a cell, two processes that push and read both, and messages that fit and that do not.
    #[tokio::test(flavor = "multi_thread")]
    async fn waiting_readers_get_all_that_others_push_once_and_in_order() {
        const COUNT: usize = 1500;
        let folder = tempfile::tempdir().expect("a folder");
        let stores = [open(&folder), open(&folder)].map(Arc::new);
        let name = |number: usize| PipeName::new(&format!("pipe{number}")).expect("legal");
        for number in 0..=64 {
            stores[0].create(&name(number)).await.expect("made");
        }
        let pipes = [name(0), name(64)];
        let id = async |pipe| stores[0].stat(pipe).await.expect("there").first;
        for pipe in &pipes {
            push(&stores[0], pipe, &["first"]).await;
        }
        let ids = [id(&pipes[0]).await, id(&pipes[1]).await].map(|at| at.expect("one").epoch());
        assert_eq!(ids[1] - ids[0], 64);
        let mut reads = Vec::new();
        let mut pushes = Vec::new();
        for (number, store) in stores.iter().enumerate() {
            for pipe in pipes.clone() {
                let (reader, pusher, topic) = (Arc::clone(store), Arc::clone(store), pipe.clone());
                reads.push(tokio::spawn(async move {
                    let mut source = reader.subscribe(&topic, Start::Oldest).await.expect("one");
                    let mut all = Vec::new();
                    while all.len() < 2 * COUNT + 1 {
                        all.extend(source.next(ANY).await.expect("messages"));
                    }
                    all
                }));
                pushes.push(tokio::spawn(async move {
                    for count in 0..COUNT {
                        let long = if count % 7 == 0 { 3000 } else { 0 };
                        let text = format!("{number} {count} {}", "x".repeat(long));
                        push(&pusher, &pipe, &[&text]).await;
                        if count % 3 == 0 {
                            tokio::time::sleep(Duration::from_micros(300)).await;
                        }
                    }
                }));
            }
        }
        for push in pushes {
            push.await.expect("pushed");
        }
        for read in reads {
            let read = tokio::time::timeout(Duration::from_secs(20), read).await;
            let all = read.expect("all").expect("read");
            assert!(all.is_sorted_by(|one, two| one.position < two.position));
            let mut counts = [0, 0];
            for message in &all[1..] {
                let text = String::from_utf8(message.data.to_vec()).expect("text");
                let mut words = text.split(' ').map(|word| word.parse::<usize>());
                let [Some(Ok(number)), Some(Ok(count))] = [words.next(), words.next()] else {
                    panic!("{text}");
                };
                assert_eq!(count, counts[number], "of {number}");
                counts[number] += 1;
            }
            assert_eq!(counts, [COUNT, COUNT]);
        }
    }
}
