//! The statements that change rows, each within a transaction of the writer's.

use rusqlite::{Connection, OptionalExtension};

use super::Log;
use super::chunk::Key;
use crate::message::{Position, PushId};
use crate::name::PipeName;

/// The newest rows of a pipe, among which a repeated push is looked for.
const REMEMBERED: u32 = 65_536;

/// Rows deleted in one transaction, so that pushes get their turn.
const SWEEP_ROWS: u32 = 16;

/// Pages taken off the file in one transaction, and those that are left in it for the next pushes.
const SHRINK_PAGES: u32 = 64;
const SPARE_PAGES: u32 = 64;

/// Where an earlier try of the push was stored.
pub(super) fn find(
    connection: &Connection,
    pipe: &PipeName,
    id: PushId,
) -> rusqlite::Result<Option<Position>> {
    let Some(log) = Log::find(connection, pipe)? else {
        return Ok(None);
    };
    let [first, last] = log.keys(log.start);
    connection
        .prepare_cached(
            "SELECT key FROM (
                 SELECT key, producer, push FROM chunk WHERE key BETWEEN ?1 AND ?2
                 ORDER BY key DESC LIMIT ?3
             ) WHERE producer = ?4 AND push = ?5 ORDER BY key DESC LIMIT 1",
        )?
        .query_row(
            (first, last, REMEMBERED, id.producer.as_bytes(), id.seq),
            |row| Ok(Position::new(log.id, Key::parse(row.get(0)?).last)),
        )
        .optional()
}

pub(super) fn insert_pipe(
    connection: &Connection,
    pipe: &PipeName,
    now: u64,
) -> rusqlite::Result<Log> {
    let slot = free_slot(connection)?;
    // Behind what a pipe that was removed from the slot may have left there.
    let start = connection
        .prepare_cached("SELECT max(key) FROM chunk WHERE key BETWEEN ?1 AND ?2")?
        .query_row([Key::of(slot, 0), Key::of(slot, Key::LAST)], |row| {
            row.get::<_, Option<u64>>(0)
        })?
        .map_or(0, |key| Key::parse(key).last)
        + 1;
    connection
        .prepare_cached(
            "INSERT INTO pipe (slot, name, start, start_total, modified) VALUES (?1, ?2, ?3, 0, ?4)
             RETURNING id, slot, start, start_total, modified",
        )?
        .query_row((slot, pipe.as_str(), start, now), Log::from_row)
}

/// The slot behind the last one or, when those are used up, the first gap.
fn free_slot(connection: &Connection) -> rusqlite::Result<u64> {
    let last = connection.query_row("SELECT coalesce(max(slot), -1) FROM pipe", [], |row| {
        row.get::<_, i64>(0)
    })?;
    match u64::try_from(last + 1) {
        Ok(next) if next <= Key::LAST_SLOT => Ok(next),
        _ => connection.query_row(
            "SELECT min(slot) + 1 FROM (SELECT -1 AS slot UNION ALL SELECT slot FROM pipe)
             WHERE slot + 1 NOT IN (SELECT slot FROM pipe)",
            [],
            |row| row.get(0),
        ),
    }
}

pub(super) fn discard(connection: &Connection, slot: u64, last: u64) -> rusqlite::Result<usize> {
    connection.execute(
        "INSERT INTO garbage (slot, last) VALUES (?1, ?2)",
        [slot, last],
    )
}

/// Deletes some rows; false when there is nothing left to delete. What is behind the start of a pipe stays: one that was made
/// in the slot meanwhile begins behind the rows that it found there, and they may have been fewer than were discarded.
pub(super) fn sweep(connection: &Connection) -> rusqlite::Result<bool> {
    let oldest = connection
        .query_row(
            "SELECT garbage.rowid, slot, min(last, coalesce(start - 1, last))
             FROM garbage LEFT JOIN pipe USING (slot) LIMIT 1",
            [],
            |row| {
                Ok((
                    row.get::<_, i64>(0)?,
                    row.get::<_, u64>(1)?,
                    row.get::<_, u64>(2)?,
                ))
            },
        )
        .optional()?;
    let Some((rowid, slot, last)) = oldest else {
        return Ok(false);
    };
    let deleted = connection.execute(
        "DELETE FROM chunk WHERE key IN
         (SELECT key FROM chunk WHERE key BETWEEN ?1 AND ?2 ORDER BY key LIMIT ?3)",
        (Key::of(slot, 0), Key::of(slot, last), SWEEP_ROWS),
    )?;
    if deleted < SWEEP_ROWS as usize {
        connection.execute("DELETE FROM garbage WHERE rowid = ?1", [rowid])?;
    }
    Ok(true)
}

/// Takes some unused pages off the file; false when few enough are left.
pub(super) fn shrink(connection: &Connection) -> rusqlite::Result<bool> {
    let unused: u32 = connection.query_row("PRAGMA freelist_count", [], |row| row.get(0))?;
    if unused < SPARE_PAGES {
        return Ok(false);
    }
    let mut vacuum = connection.prepare(&format!("PRAGMA incremental_vacuum({SHRINK_PAGES})"))?;
    let mut steps = vacuum.query([])?;
    while steps.next()?.is_some() {}
    Ok(true)
}
