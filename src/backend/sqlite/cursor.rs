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
    /// The pipe at the last look, and the number of resets then.
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
            Start::After(position) => (position.epoch(), position.seq() + 1),
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

    /// Looks where the pipe starts now, unless no pipe was reset or removed since the last look.
    fn look(&mut self, connection: &Connection) -> rusqlite::Result<()> {
        let resets = self.store.bell.resets();
        if self.row.is_some() && self.looked == Some(resets) {
            return Ok(());
        }
        self.row = connection
            .prepare_cached(Log::BY_NAME)?
            .query_row([self.pipe.as_str()], Log::from_row)
            .optional()?;
        self.looked = Some(resets);
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
        let rows = self.fetch_rows(limit)?;
        let gap = rows.first().is_some_and(|row| row.first() > self.next);
        let rows = if gap {
            // A process that died at once after a reset has not counted it.
            self.looked = None;
            self.fetch_rows(limit)?
        } else {
            rows
        };
        for row in rows {
            self.hold(row)?;
        }
        Ok(self.take(limit))
    }

    fn fetch_rows(&mut self, limit: Limit) -> Result<Vec<Row>> {
        let store = Arc::clone(&self.store);
        store.read("reading", |connection| {
            self.look(connection)?;
            match &self.row {
                Some(log) if self.held.is_empty() => rows(connection, log.keys(self.next), limit),
                _ => Ok(Vec::new()),
            }
        })
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
            known: Mutex::default(),
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
    /// The number of resets at the last look, and what it found.
    known: Mutex<Option<(u64, Position)>>,
}

impl Floor for PipeFloor {
    fn position(&self) -> Position {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let resets = self.store.bell.resets();
        if known.is_none_or(|(looked, _)| looked != resets) {
            match self
                .store
                .read("looking", |connection| self.look(connection))
            {
                Ok(floor) => *known = Some((resets, floor)),
                Err(error) => log::warn!("{error}"),
            }
        }
        known.map_or(Position::MIN, |(_, floor)| floor)
    }
}

impl PipeFloor {
    fn look(&self, connection: &Connection) -> rusqlite::Result<Position> {
        if let Some(log) = Log::find(connection, &self.pipe)? {
            return Ok(Position::new(log.id, log.start));
        }
        // Removed: all that there was is gone. If it is made again, it gets a greater id.
        let last = connection
            .query_row(
                "SELECT seq FROM sqlite_sequence WHERE name = 'pipe'",
                [],
                |row| row.get(0),
            )
            .optional()?;
        Ok(Position::new(last.unwrap_or(0), u64::MAX))
    }
}
