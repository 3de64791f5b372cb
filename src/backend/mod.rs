//! What a backend must do. The docs of [`Backend`] and [`Source`] are the contract; the conformance suite
//! in `tests/conformance` holds every backend to them.

mod behind;
mod broker;
mod ear;
mod floor;
mod hosts;
pub mod http;
pub mod memory;
pub mod nats;
pub mod redis;
pub mod retry;
mod secret;
pub mod sqlite;
mod tls;
mod url;

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::SystemTime;

use crate::error::{Error, Kind, Result};
use crate::message::{Batch, Message, Position, PushId};
use crate::name::PipeName;

pub use url::BackendUrl;

/// A boxed future, so that backends can stand behind `dyn`.
pub type Fut<'a, T> = Pin<Box<dyn Future<Output = Result<T>> + Send + 'a>>;

/// What differs between backends, as data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Caps {
    /// The backend's name, as in its URL's scheme.
    pub name: &'static str,
    /// Whether messages outlive the process.
    pub durable: bool,
    /// Whether its calls cross a network, so that none answers at once.
    pub remote: bool,
    /// The longest message it can hold, in bytes.
    pub max_message: usize,
    /// Whether the messages of one push stay together, whoever else pushes. Otherwise only their order is
    /// kept, and those of others may come between.
    pub whole_batches: bool,
}

/// Where a subscription starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// At the oldest message that is retained.
    Oldest,
    /// Behind this position: with the first message whose position is greater.
    After(Position),
}

/// How much one [`Source::next`] may return, and whether it may wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limit {
    /// Stop once this many bytes are gathered (counted by [`weight`]); at least one message is returned
    /// even if it alone is larger.
    pub max_bytes: usize,
    /// `None`: wait for a message. `Some(p)`: never wait for a push; return what is retained before `p`,
    /// or nothing when nothing is. `Some(Position::MAX)` returns what there is now.
    pub before: Option<Position>,
}

/// Memory that a message is taken to need: its bytes and a constant, so that empty messages count too.
pub fn weight(data: &[u8]) -> usize {
    data.len() + 64
}

/// What is known of a pipe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PipeInfo {
    /// Messages retained.
    pub count: u64,
    /// Their bytes, without framing; `None` where the backend cannot tell.
    pub bytes: Option<u64>,
    /// The oldest retained message.
    pub first: Option<Position>,
    /// The newest retained message.
    pub last: Option<Position>,
    /// The last push or reset, or the creation.
    pub modified: SystemTime,
}

/// A store of pipes.
///
/// Every future may be dropped at any time. A dropped push has either happened as a whole or not at all.
/// Calls from several tasks run at once. Errors are typed: a backend that cannot be reached says
/// [`crate::error::Kind::Unreachable`] and does not retry by itself; [`retry::Retry`] does.
pub trait Backend: Send + Sync {
    /// What this backend can do.
    fn caps(&self) -> Caps;

    /// Appends the batch and returns the position of its last message, once it is acknowledged: from then
    /// on every participant MUST find it until a reset. The batch MUST be stored as a whole, its messages
    /// together and in order, or not at all. A push repeated with the same `id`, marked by
    /// [`PushId::again`], MUST NOT be stored twice: the earlier position is returned. That holds at least for
    /// the last 65,536 pushes to the pipe, until a reset, and for each producer's last one: a lower number of its may be
    /// taken for stored. A pipe that does not exist is created.
    ///
    /// # Errors
    /// `TooLong` over [`Caps::max_message`], `Full`, `Denied`, `Unreachable`, `Damaged`, `Io`. Where
    /// [`crate::error::Error::applied`] is `Unknown`, the push may be repeated with the same `id` only.
    fn push<'a>(&'a self, pipe: &'a PipeName, id: PushId, batch: Batch) -> Fut<'a, Position>;

    /// A subscriber of its own. The pipe need not exist yet.
    ///
    /// # Errors
    /// `Denied`, `Unreachable`, `Damaged`, `Io`.
    fn subscribe<'a>(&'a self, pipe: &'a PipeName, start: Start) -> Fut<'a, Box<dyn Source>>;

    /// What is known of a pipe.
    ///
    /// # Errors
    /// `NotFound`; and as for `subscribe`.
    fn stat<'a>(&'a self, pipe: &'a PipeName) -> Fut<'a, PipeInfo>;

    /// All pipes, ordered by name.
    ///
    /// # Errors
    /// As for `subscribe`.
    fn list(&self) -> Fut<'_, Vec<(PipeName, PipeInfo)>>;

    /// Makes an empty pipe; `false` if it existed, which is no error and changes nothing.
    ///
    /// # Errors
    /// `AlreadyExists` where it exists, and an earlier try, of which nothing is known, may have made it;
    /// `InvalidName` where the backend cannot hold the name; and as for `push`.
    fn create<'a>(&'a self, pipe: &'a PipeName) -> Fut<'a, bool>;

    /// Drops every message that was acknowledged before the call. Once it returns no participant finds
    /// them; messages pushed meanwhile may stay. Positions go on rising. Waiting readers go on waiting.
    ///
    /// # Errors
    /// `NotFound`; and as for `push`.
    fn reset<'a>(&'a self, pipe: &'a PipeName) -> Fut<'a, ()>;

    /// Removes the pipe and its messages for everyone.
    ///
    /// # Errors
    /// `NotFound`; and as for `push`.
    fn remove<'a>(&'a self, pipe: &'a PipeName) -> Fut<'a, ()>;

    /// Returns when everything acknowledged so far is as durable as the backend can make it.
    ///
    /// # Errors
    /// `Io`, `Unreachable`.
    fn sync<'a>(&'a self, pipe: &'a PipeName) -> Fut<'a, ()>;
}

/// One subscriber's place in a pipe.
///
/// Dropping a future that waits MUST lose nothing: the next call returns what it would have returned.
/// After a reset it goes on with the first message pushed after it; so it does where the pipe was removed
/// and made again.
pub trait Source: Send {
    /// The next messages, in order; see [`Limit`] for how many and whether to wait. Without
    /// [`Limit::before`] never empty.
    ///
    /// # Errors
    /// As for [`Backend::subscribe`]; the source stays usable and has delivered nothing.
    fn next(&mut self, limit: Limit) -> Fut<'_, Vec<Message>>;

    /// Where the pipe starts, for discarding what was fetched before a reset.
    fn floor(&self) -> Arc<dyn Floor>;

    /// The end of the log now: every message acknowledged before the call stands before it, every later
    /// one does not.
    ///
    /// # Errors
    /// As for `next`.
    fn end(&mut self) -> Fut<'_, Position>;
}

/// Where a pipe starts.
pub trait Floor: Send + Sync {
    /// Messages before this position were dropped, by a reset or a removal that has completed. Called at
    /// every read: it MUST be cheap and MUST NOT wait. A backend that learns of other participants' resets
    /// only later says so in the README's table.
    fn position(&self) -> Position;
}

/// What is said of a pipe that is not there.
fn not_found(pipe: &PipeName) -> Error {
    Error::new(Kind::NotFound, format!("there is no pipe {pipe}"))
}

/// Opens the backend that `url` names.
///
/// # Errors
/// Whatever keeps it from opening, with the path or the option that is at fault.
pub fn open(url: &BackendUrl) -> Result<Arc<dyn Backend>> {
    match url {
        BackendUrl::Memory { limit } => Ok(Arc::new(memory::Memory::new(*limit))),
        BackendUrl::Sqlite { path, durability } => {
            Ok(Arc::new(sqlite::Sqlite::open(path, *durability)?))
        }
        BackendUrl::Http(url) => Ok(Arc::new(http::Http::open(url)?)),
        BackendUrl::Nats(url) => Ok(Arc::new(nats::Nats::open(url)?)),
        BackendUrl::Redis(url) => Ok(Arc::new(redis::Redis::open(url)?)),
    }
}
