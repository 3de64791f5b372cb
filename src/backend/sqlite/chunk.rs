//! How messages lie in a row: each row holds a run of messages, one behind the other, each after its
//! length in 4 bytes, little-endian. A row for many messages makes bulk pushes and scans several times
//! faster than a row for each.

use bytes::{Buf, Bytes};

use crate::error::{Error, Kind, Result};

/// A row's key says which pipe it is of, by its slot, and the number of its last message. A plain integer,
/// because SQLite compares rows with any other key by reading them whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Key {
    pub(super) slot: u64,
    pub(super) last: u64,
}

/// Bits of the number in a key; the slot has the rest of 63.
const NUMBER_BITS: u32 = 42;

impl Key {
    /// The greatest number of a message, and of a slot.
    pub(super) const LAST: u64 = (1 << NUMBER_BITS) - 1;
    pub(super) const LAST_SLOT: u64 = (1 << (63 - NUMBER_BITS)) - 1;

    pub(super) fn of(slot: u64, last: u64) -> u64 {
        slot << NUMBER_BITS | last.min(Key::LAST)
    }

    pub(super) fn parse(key: u64) -> Self {
        Key {
            slot: key >> NUMBER_BITS,
            last: key & Key::LAST,
        }
    }
}

/// A row of messages as it lies in the store.
pub(super) struct Row {
    /// A [`Key`].
    pub(super) key: u64,
    pub(super) count: u64,
    /// When it was pushed, in microseconds since 1970.
    pub(super) time: u64,
    pub(super) checksum: u32,
    pub(super) data: Bytes,
}

impl Row {
    /// A run of messages, of which `key` numbers the last.
    pub(super) fn new(key: u64, run: &[Bytes], time: u64) -> Self {
        let (count, data) = (run.len() as u64, encode(run));
        Row {
            key,
            count,
            time,
            checksum: checksum(key, count, &data),
            data: data.into(),
        }
    }

    /// The number of its first message.
    pub(super) fn first(&self) -> u64 {
        let last = Key::parse(self.key).last;
        last + 1 - self.count.min(last)
    }

    /// Whether it is as it was made: then it holds at least one message.
    pub(super) fn is_sound(&self) -> bool {
        (1..=Key::parse(self.key).last).contains(&self.count)
            && checksum(self.key, self.count, &self.data) == self.checksum
    }
}

/// A row is closed once it holds this many bytes; a longer message has a row of its own.
pub(super) const TARGET: usize = 256 * 1024;

pub(super) const HEADER: usize = 4;

/// Cuts a batch into runs that each fit one row.
pub(super) fn runs(messages: &[Bytes]) -> impl Iterator<Item = &[Bytes]> {
    let mut rest = messages;
    std::iter::from_fn(move || {
        let mut size = 0;
        let fits = |message: &&Bytes| {
            let first = size == 0;
            size += HEADER + message.len();
            first || size <= TARGET
        };
        let (run, tail) = rest.split_at(rest.iter().take_while(fits).count());
        rest = tail;
        (!run.is_empty()).then_some(run)
    })
}

/// The row's bytes for a run of messages.
fn encode(run: &[Bytes]) -> Vec<u8> {
    let size = run.iter().map(|message| HEADER + message.len()).sum();
    let mut row = Vec::with_capacity(size);
    for message in run {
        row.extend_from_slice(&(message.len() as u32).to_le_bytes());
        row.extend_from_slice(message);
    }
    row
}

/// The checksum of a row: of its bytes, and of where they belong.
fn checksum(key: u64, count: u64, row: &[u8]) -> u32 {
    let mut sum = crc32fast::Hasher::new();
    for number in [key, count] {
        sum.update(&number.to_le_bytes());
    }
    sum.update(row);
    sum.finalize()
}

/// Messages of a row that were not given out yet. They lie in it as they are, as they may be many and short; each that is
/// given out shares its memory.
pub(super) struct Unread {
    /// The number of the next one.
    pub(super) seq: u64,
    /// When they were pushed, in microseconds since 1970.
    pub(super) time: u64,
    data: Bytes,
}

impl Unread {
    /// All messages of the row.
    ///
    /// # Errors
    /// [`Kind::Damaged`] if it does not hold exactly as many as it says.
    pub(super) fn of(row: &Row) -> Result<Self> {
        let mut rest = &row.data[..];
        let mut count = 0;
        while let Some((_, behind)) = split(rest) {
            (rest, count) = (behind, count + 1);
        }
        if !rest.is_empty() || count != row.count {
            return Err(Error::new(Kind::Damaged, "a row of messages is damaged"));
        }
        Ok(Unread {
            seq: row.first(),
            time: row.time,
            data: row.data.clone(),
        })
    }

    pub(super) fn is_empty(&self) -> bool {
        self.data.is_empty()
    }

    /// Passes over the messages before number `seq`.
    pub(super) fn skip_to(&mut self, seq: u64) {
        while self.seq < seq && self.take().is_some() {}
    }

    /// The next message, with its number.
    pub(super) fn take(&mut self) -> Option<(u64, Bytes)> {
        let length = split(&self.data)?.0.len();
        self.data.advance(HEADER);
        let message = (self.seq, self.data.split_to(length));
        self.seq += 1;
        Some(message)
    }
}

/// The first message of a row, and what stands behind it.
fn split(row: &[u8]) -> Option<(&[u8], &[u8])> {
    let (header, rest) = row.split_first_chunk::<HEADER>()?;
    rest.split_at_checked(u32::from_le_bytes(*header) as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_ordered_by_slot_and_number() {
        let keys = [
            (0, 0),
            (0, 1),
            (0, Key::LAST),
            (1, 0),
            (Key::LAST_SLOT, Key::LAST),
        ];
        let packed = keys.map(|(slot, last)| Key::of(slot, last));
        assert!(packed.is_sorted() && packed[4] == i64::MAX as u64);
        for ((slot, last), key) in keys.into_iter().zip(packed) {
            assert_eq!(Key::parse(key), Key { slot, last });
        }
    }

    #[test]
    fn a_row_gives_back_what_it_was_made_of() {
        let messages = [&b""[..], b"a", &[0xff; 300], b"\n\0"].map(Bytes::copy_from_slice);
        let mut unread = Unread::of(&Row::new(Key::of(7, 12), &messages, 5)).expect("sound");
        for (seq, message) in (9..).zip(&messages) {
            assert!(!unread.is_empty());
            assert_eq!(unread.take(), Some((seq, message.clone())));
        }
        assert!(unread.is_empty() && unread.take().is_none());
        let mut unread = Unread::of(&Row::new(Key::of(7, 12), &messages, 5)).expect("sound");
        unread.skip_to(11);
        assert_eq!(unread.take(), Some((11, messages[2].clone())));
        unread.skip_to(20);
        assert!(unread.is_empty());
    }

    #[test]
    fn a_damaged_row_is_an_error_not_a_message() {
        let row = encode(&[Bytes::from_static(b"hello"), Bytes::from_static(b"world")]);
        for (row, count) in [
            (row.clone(), 1),
            (row.clone(), 3),
            (row[..row.len() - 1].to_vec(), 2),
            ([&row[..], b"x"].concat(), 2),
            (vec![0xff; 9], 1),
        ] {
            let mut whole = Row::new(Key::of(7, 12), &[], 5);
            (whole.count, whole.data) = (count, row.into());
            let error = Unread::of(&whole).map(drop).expect_err("damaged");
            assert_eq!(error.kind(), Kind::Damaged);
        }
    }

    #[test]
    fn runs_keep_every_message_and_stay_within_the_target() {
        let sizes = [0, TARGET / 2, TARGET / 2, 1, TARGET * 3, 5, 5];
        let messages = sizes.map(|size| Bytes::from(vec![b'x'; size]));
        let runs: Vec<&[Bytes]> = runs(&messages).collect();
        assert_eq!(runs.concat(), messages);
        assert!(
            runs.iter()
                .all(|run| run.len() == 1 || encode(run).len() <= TARGET)
        );
        assert_eq!(runs.len(), 4);
    }
}
