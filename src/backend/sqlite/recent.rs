//! The newest push of a pipe, in memory that processes share: who waits for one need not look for it in the store.
//!
//! Each cell holds the newest of some pipes, if it is small. Nobody waits for a cell: where two show something in it at
//! once, or one that dies leaves it half written, what they would have shown is found in the store.

use std::sync::atomic::{AtomicU64, Ordering, fence};

use bytes::Bytes;

use super::chunk::Row;

/// Cells, and the numbers in each.
const CELLS: usize = 64;
const CELL: usize = 256;

/// All of them.
pub(super) const NUMBERS: usize = CELLS * CELL;

/// What stands in a cell: how often it was changed, twice, and odd while it is being; then the pipe's id, and its row.
const VERSION: usize = 0;
const PIPE: usize = 1;
const KEY: usize = 2;
const COUNT: usize = 3;
const TIME: usize = 4;
const CHECKSUM: usize = 5;
const LENGTH: usize = 6;
const DATA: usize = 7;

const WORD: usize = size_of::<u64>();
const LONGEST: usize = (CELL - DATA) * WORD;

/// Where the newest push of pipe `id` is shown.
pub(super) struct Cell<'a> {
    numbers: &'a [AtomicU64],
    id: u64,
}

impl<'a> Cell<'a> {
    /// One of these [`NUMBERS`].
    pub(super) fn of(id: u64, numbers: &'a [AtomicU64]) -> Self {
        let at = id as usize % CELLS * CELL;
        Cell {
            numbers: &numbers[at..at + CELL],
            id,
        }
    }

    /// Whether a row is small enough to be shown.
    pub(super) fn holds(row: &Row) -> bool {
        row.data.len() <= LONGEST
    }

    /// Changes whenever something is shown.
    pub(super) fn version(&self) -> u64 {
        self.numbers[VERSION].load(Ordering::Acquire)
    }

    /// Shows a row that is committed, and that it [`Cell::holds`].
    pub(super) fn show(&self, row: &Row) {
        debug_assert!(Cell::holds(row));
        let version = self.numbers[VERSION].load(Ordering::Relaxed);
        let (order, failed) = (Ordering::Acquire, Ordering::Relaxed);
        if version & 1 == 1
            || self.numbers[VERSION]
                .compare_exchange(version, version + 1, order, failed)
                .is_err()
        {
            return;
        }
        fence(Ordering::Release);
        let put = |at: usize, number| self.numbers[at].store(number, Ordering::Relaxed);
        put(PIPE, self.id);
        put(KEY, row.key);
        put(COUNT, row.count);
        put(TIME, row.time);
        put(CHECKSUM, row.checksum.into());
        put(LENGTH, row.data.len() as u64);
        for (at, bytes) in (DATA..).zip(row.data.chunks(WORD)) {
            let mut word = [0; WORD];
            word[..bytes.len()].copy_from_slice(bytes);
            put(at, u64::from_le_bytes(word));
        }
        self.numbers[VERSION].store(version.wrapping_add(2), Ordering::Release);
    }

    /// What was shown of the pipe after `version`, if it is whole.
    pub(super) fn shown_after(&self, version: u64) -> Option<Row> {
        let found = self.version();
        if found == version || found & 1 == 1 {
            return None;
        }
        let get = |at: usize| self.numbers[at].load(Ordering::Relaxed);
        let length = usize::try_from(get(LENGTH)).ok();
        let length = length.filter(|length| *length <= LONGEST)?;
        let is_of_pipe = get(PIPE) == self.id;
        let words = (DATA..DATA + length.div_ceil(WORD)).flat_map(|at| get(at).to_le_bytes());
        let row = Row {
            key: get(KEY),
            count: get(COUNT),
            time: get(TIME),
            checksum: u32::try_from(get(CHECKSUM)).ok()?,
            data: words.take(length).collect::<Bytes>(),
        };
        fence(Ordering::Acquire);
        let is_whole = self.numbers[VERSION].load(Ordering::Relaxed) == found;
        (is_whole && is_of_pipe && row.is_sound()).then_some(row)
    }
}

/// Forgets all that was shown, and what processes that died have left half written. Nobody else may use it meanwhile.
pub(super) fn clear(numbers: &[AtomicU64]) {
    let is_used = |cell: &&[AtomicU64]| cell[VERSION].load(Ordering::Relaxed) != 0;
    for number in numbers.chunks(CELL).filter(is_used).flatten() {
        number.store(0, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Barrier;

    fn numbers() -> Vec<AtomicU64> {
        (0..NUMBERS).map(|_| AtomicU64::new(0)).collect()
    }

    fn row(key: u64, data: &[u8]) -> Row {
        Row::new(key, &[Bytes::copy_from_slice(data)], 7)
    }

    #[test]
    fn what_is_shown_is_seen_until_something_else_is() {
        let numbers = numbers();
        let (cell, other) = (Cell::of(3, &numbers), Cell::of(3 + CELLS as u64, &numbers));
        let before = cell.version();
        assert!(cell.shown_after(before).is_none());
        for data in [&b""[..], b"eight by", b"\0nine\xff\n.."] {
            let shown = row(5, data);
            cell.show(&shown);
            let seen = cell.shown_after(before).expect("shown");
            assert_eq!((seen.key, seen.count, seen.time), (5, 1, 7));
            assert!(seen.data == shown.data && seen.is_sound());
        }
        assert!(cell.shown_after(cell.version()).is_none());
        assert!(other.shown_after(before).is_none(), "not its own");
        other.show(&row(5, b"other"));
        assert!(cell.shown_after(before).is_none(), "not there any more");
    }

    #[test]
    fn what_does_not_fit_or_is_damaged_is_not_seen() {
        let numbers = numbers();
        let cell = Cell::of(0, &numbers);
        // Before each message its length stands in 4 bytes.
        let longest = row(1, &vec![b'x'; LONGEST - 4]);
        let longer = row(2, &vec![b'x'; LONGEST - 3]);
        assert!(Cell::holds(&longest) && !Cell::holds(&longer));
        cell.show(&longest);
        assert_eq!(cell.shown_after(0).expect("shown").key, 1);
        for at in [KEY, COUNT, CHECKSUM, LENGTH, DATA, CELL - 1] {
            let right = numbers[at].load(Ordering::Relaxed);
            for wrong in [right + 1, u64::MAX] {
                numbers[at].store(wrong, Ordering::Relaxed);
                assert!(cell.shown_after(0).is_none(), "{at}");
            }
            numbers[at].store(right, Ordering::Relaxed);
        }
        assert!(cell.shown_after(0).is_some());
    }

    #[test]
    fn who_dies_while_he_shows_something_leaves_nothing_to_see() {
        let numbers = numbers();
        let cell = Cell::of(0, &numbers);
        cell.show(&row(1, b"whole"));
        numbers[VERSION].fetch_add(1, Ordering::Relaxed);
        cell.show(&row(2, b"beside"));
        assert!(cell.shown_after(0).is_none());
        clear(&numbers);
        let version = cell.version();
        cell.show(&row(3, b"behind"));
        assert_eq!(cell.shown_after(version).expect("shown").key, 3);
    }

    #[test]
    fn what_several_show_at_once_is_seen_whole() {
        let numbers = numbers();
        let start = Barrier::new(3);
        // The checksum covers neither the pipe nor the time.
        let show = |pipe: u64| {
            start.wait();
            for length in (1..1000).cycle().take(100_000) {
                let text = [Bytes::from(vec![pipe as u8; length])];
                let key = length as u64;
                Cell::of(pipe, &numbers).show(&Row::new(key, &text, key + pipe));
            }
        };
        std::thread::scope(|scope| {
            let shows = [0, CELLS as u64].map(|pipe| scope.spawn(move || show(pipe)));
            start.wait();
            let mut seen = [0, 0];
            while !shows.iter().all(|show| show.is_finished()) {
                for (seen, pipe) in seen.iter_mut().zip([0, CELLS as u64]) {
                    let Some(row) = Cell::of(pipe, &numbers).shown_after(0) else {
                        continue;
                    };
                    *seen += 1;
                    let text = &row.data[4..];
                    assert_eq!((text.len() as u64, row.key + pipe), (row.key, row.time));
                    assert!(text.iter().all(|byte| u64::from(*byte) == pipe));
                }
            }
            assert!(seen.iter().all(|seen| *seen > 0));
        });
    }
}
