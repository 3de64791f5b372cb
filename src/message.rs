//! Messages, batches, positions and the identity of a push.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;

use crate::error::{Error, Kind, Result};

/// The last microsecond of the year 9999.
const LATEST: u64 = 253_402_300_799_999_999;

/// Where a message stands in its pipe. Positions of one pipe only ever grow: a later message has a
/// greater one, also across a reset, and also when the pipe was removed and made again (then the epoch
/// has grown). They are not dense, and those of different pipes say nothing to each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Position {
    epoch: u64,
    seq: u64,
}

impl Position {
    /// Before every message.
    pub const MIN: Position = Position { epoch: 0, seq: 0 };
    /// After every message.
    pub const MAX: Position = Position {
        epoch: u64::MAX,
        seq: u64::MAX,
    };

    /// For backends: message `seq` of incarnation `epoch`.
    pub fn new(epoch: u64, seq: u64) -> Self {
        Position { epoch, seq }
    }

    /// The incarnation of the pipe.
    pub fn epoch(self) -> u64 {
        self.epoch
    }

    /// The number within the incarnation.
    pub fn seq(self) -> u64 {
        self.seq
    }

    /// The greatest position before this one; `MIN` has none and gives itself.
    pub fn before(self) -> Self {
        match (self.epoch, self.seq) {
            (0, 0) => Position::MIN,
            (epoch, 0) => Position::new(epoch - 1, u64::MAX),
            (epoch, seq) => Position::new(epoch, seq - 1),
        }
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.epoch, self.seq)
    }
}

impl FromStr for Position {
    type Err = Error;

    /// What [`fmt::Display`] writes.
    ///
    /// # Errors
    /// [`Kind::InvalidInput`].
    fn from_str(text: &str) -> Result<Self> {
        let number = |digits: &str| match digits.bytes().all(|byte| byte.is_ascii_digit()) {
            true => digits.parse().ok(),
            false => None,
        };
        text.split_once('-')
            .and_then(|(epoch, seq)| Some(Position::new(number(epoch)?, number(seq)?)))
            .ok_or_else(|| {
                Error::new(
                    Kind::InvalidInput,
                    format!("{text:?} is not a position, as 1-42"),
                )
            })
    }
}

/// A stored message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// Where it stands.
    pub position: Position,
    /// When the backend took it, to the backend's own precision.
    pub time: SystemTime,
    /// Its bytes, without framing.
    pub data: Bytes,
}

/// The messages of one push, in order. Cheap to clone: a repeated push shares them.
#[derive(Debug, Clone)]
pub struct Batch {
    messages: Arc<Vec<Bytes>>,
    bytes: usize,
}

impl Batch {
    /// A batch of at least one message.
    ///
    /// # Errors
    /// [`Kind::InvalidInput`] if there is none.
    pub fn new(messages: Vec<Bytes>) -> Result<Self> {
        if messages.is_empty() {
            return Err(Error::new(Kind::InvalidInput, "a push without a message"));
        }
        let bytes = messages.iter().map(Bytes::len).sum();
        Ok(Batch {
            messages: Arc::new(messages),
            bytes,
        })
    }

    /// The messages.
    pub fn messages(&self) -> &[Bytes] {
        &self.messages
    }

    /// Refuses a message of more than `limit` bytes.
    ///
    /// # Errors
    /// [`Kind::TooLong`].
    pub fn check(&self, limit: usize) -> Result<()> {
        match self.messages.iter().find(|message| message.len() > limit) {
            None => Ok(()),
            Some(message) => Err(Error::new(
                Kind::TooLong,
                format!(
                    "a message of {} bytes is over the limit of {limit}",
                    message.len()
                ),
            )),
        }
    }

    /// The sum of their lengths.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

/// Who pushes, drawn at random: a process that writes to an open file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Producer([u8; 16]);

impl Producer {
    /// A new producer, unlike any other.
    ///
    /// # Errors
    /// [`Kind::Io`] if the system has no randomness to give.
    pub fn random() -> Result<Self> {
        let mut id = [0; 16];
        getrandom::fill(&mut id).map_err(|error| {
            Error::new(Kind::Io, "drawing a random producer id").caused_by(error.to_string())
        })?;
        Ok(Producer(id))
    }

    /// A producer known from elsewhere.
    pub fn from_bytes(id: [u8; 16]) -> Self {
        Producer(id)
    }

    /// Its bytes.
    pub fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

impl fmt::Display for Producer {
    /// In 32 hexadecimal digits.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

/// How many producers are remembered where a repeated push has to be known.
const PRODUCERS: usize = 65_536;

/// Something about each producer; of the oldest it is forgotten, once there are more than 65,536.
#[derive(Debug)]
pub struct Producers<T> {
    known: HashMap<Producer, T>,
    /// In the order of their first push.
    order: VecDeque<Producer>,
}

impl<T> Default for Producers<T> {
    fn default() -> Self {
        Producers {
            known: HashMap::new(),
            order: VecDeque::new(),
        }
    }
}

impl<T> Producers<T> {
    /// What is known of a producer.
    pub fn get(&self, producer: &Producer) -> Option<&T> {
        self.known.get(producer)
    }

    /// Of how many producers something is known.
    pub fn len(&self) -> usize {
        self.known.len()
    }

    /// Whether nothing is known of any.
    pub fn is_empty(&self) -> bool {
        self.known.is_empty()
    }

    /// Notes what is known of a producer from now on.
    pub fn set(&mut self, producer: Producer, what: T) {
        if self.known.insert(producer, what).is_none() {
            self.order.push_back(producer);
            if self.order.len() > PRODUCERS
                && let Some(oldest) = self.order.pop_front()
            {
                self.known.remove(&oldest);
            }
        }
    }
}

/// The identity of a push. A producer numbers its pushes upwards and has one under way at a time; a push
/// whose outcome is unknown is repeated with the same identity, before the producer's next one or never, and a backend
/// stores it once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PushId {
    /// Who pushes.
    pub producer: Producer,
    /// Its running number.
    pub seq: u64,
    /// Whether an earlier try may have arrived. Backends that have to search for it do so only then.
    pub repeated: bool,
}

impl PushId {
    /// The first try of a producer's push number `seq`.
    pub fn first(producer: Producer, seq: u64) -> Self {
        PushId {
            producer,
            seq,
            repeated: false,
        }
    }

    /// The same push, tried again.
    pub fn again(self) -> Self {
        PushId {
            repeated: true,
            ..self
        }
    }
}

/// A time from microseconds since 1970, as stores keep it; at the latest the end of the year 9999, as none
/// later can be written.
pub fn time_from_micros(micros: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_micros(micros.min(LATEST))
}

/// Microseconds since 1970; 0 for a clock that stands before that.
pub fn micros_from_time(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH)
        .map_or(0, |age| age.as_micros() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_epoch_is_later_than_any_number_of_the_old_one() {
        assert!(Position::new(2, 0) > Position::new(1, u64::MAX));
        assert!(Position::new(1, 2) > Position::new(1, 1));
        assert!(Position::MIN < Position::new(0, 1) && Position::new(7, 7) < Position::MAX);
    }

    #[test]
    fn a_position_comes_back_from_its_text() {
        for position in [Position::MIN, Position::MAX, Position::new(3, 42)] {
            assert_eq!(
                position.to_string().parse::<Position>().expect("its text"),
                position
            );
        }
        for text in [
            "",
            "1",
            "1-",
            "-1",
            "+1-2",
            "1-2-3",
            "1-18446744073709551616",
        ] {
            assert!(text.parse::<Position>().is_err(), "{text}");
        }
        assert_eq!(Position::new(1, 0).before(), Position::new(0, u64::MAX));
        assert_eq!(Position::new(1, 5).before(), Position::new(1, 4));
    }

    #[test]
    fn the_oldest_producers_are_forgotten() {
        let id = |number: u128| Producer::from_bytes(number.to_be_bytes());
        let mut producers = Producers::default();
        for number in 0..=PRODUCERS as u128 {
            producers.set(id(number), number);
        }
        assert_eq!(producers.len(), PRODUCERS);
        assert!(!producers.known.contains_key(&id(0)));
        assert_eq!(producers.get(&id(1)), Some(&1));
    }

    #[test]
    fn a_batch_has_at_least_one_message_and_knows_its_size() {
        assert!(Batch::new(Vec::new()).is_err());
        let batch = Batch::new(vec![Bytes::from_static(b"ab"), Bytes::new()]).expect("two");
        assert_eq!((batch.messages().len(), batch.bytes()), (2, 2));
    }
}
