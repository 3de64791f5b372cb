//! What the answers to pushed messages say.

use std::time::Duration;

use async_nats::{Message, Subscriber};
use futures_util::StreamExt;

use super::api::{self, ApiError, Stored};
use super::link::{ANSWER, Link, Refusals};
use super::target::Stream;
use crate::error::{Error, Kind, Result};

/// After so long without an answer it is looked whether the stream is still there.
const LOOK: Duration = Duration::from_secs(1);

/// What became of messages.
pub(super) enum Outcome {
    /// They are stored, the last one as this number.
    Stored(u64),
    /// They were stored before; the server does not say where.
    Before,
    /// There is no such stream, or it has other subjects, or takes no batches: nothing is stored.
    Elsewhere,
}

/// An answer, or none where nobody listens.
pub(super) fn taken(answer: Message) -> Option<Message> {
    (answer.status != Some(async_nats::StatusCode::NO_RESPONDERS)).then_some(answer)
}

/// What the answer to a message says; an empty one stands for no stream.
pub(super) fn understood(answer: Option<Message>) -> Result<Result<Option<Stored>, ApiError>> {
    match answer {
        None => Ok(Ok(None)),
        Some(answer) => {
            let stored = api::parse::<Stored>(&answer.payload);
            Ok(stored.map_err(Error::maybe_applied)?.map(Some))
        }
    }
}

/// What that means for the message.
pub(super) fn outcome(answer: Result<Option<Stored>, ApiError>) -> Result<Outcome> {
    match answer {
        Ok(Some(stored)) => Ok(Outcome::Stored(stored.seq)),
        Ok(None) => Ok(Outcome::Elsewhere),
        Err(error) if error.is(api::STORED_BEFORE) => Ok(Outcome::Before),
        // Its settings were changed since it was looked at.
        Err(error) if error.is(api::OTHER_STREAM) || error.is(api::NO_BATCHES) => {
            Ok(Outcome::Elsewhere)
        }
        Err(error) => Err(error.typed()),
    }
}

/// The stream is not there any more: nothing of some messages is stored if it was so from the first on. Else those
/// that were sent already may have come to a stream that was made meanwhile.
pub(super) fn went_away(stream: &Stream, from_the_first: bool) -> Result<Outcome> {
    if from_the_first {
        return Ok(Outcome::Elsewhere);
    }
    let why = format!("stream {} went away", stream.name);
    Err(Error::new(Kind::Unreachable, why).maybe_applied())
}

/// Waits for an answer of the stream, as long as that is there: nobody answers for what has come to one that is removed.
///
/// # Errors
/// Those of `answer`; `Unreachable` if the stream is removed.
pub(super) async fn unless_removed<T>(
    link: &Link,
    stream: &Stream,
    answer: impl Future<Output = Result<T>>,
) -> Result<T> {
    tokio::select! {
        biased;
        answer = answer => answer,
        () = is_removed(link, stream) => {
            let why = format!("stream {} was removed meanwhile", stream.name);
            Err(Error::new(Kind::Unreachable, why).maybe_applied())
        }
    }
}

async fn is_removed(link: &Link, stream: &Stream) {
    loop {
        tokio::time::sleep(LOOK).await;
        match link.info(&stream.name).await {
            Ok(Some(info)) if info.epoch().ok() == Some(stream.epoch) => {}
            Ok(_) => return,
            // It is not known; who waits for the answer gives up by itself.
            Err(_) => std::future::pending().await,
        }
    }
}

/// Answers to many messages, in their order.
pub(super) struct Acks {
    inbox: String,
    asked: u64,
    subscriber: Subscriber,
    refusals: Refusals,
}

impl Acks {
    pub(super) async fn listen(link: &Link) -> Result<Self> {
        let inbox = link.inbox();
        let subscriber = link.listen(format!("{inbox}.*")).await?;
        Ok(Acks {
            inbox,
            asked: 0,
            subscriber,
            refusals: link.refusals(),
        })
    }

    /// Where the next message is to be answered.
    pub(super) fn reply(&mut self) -> String {
        self.asked += 1;
        format!("{}.{}", self.inbox, self.asked)
    }

    /// The next answer of `stream`.
    pub(super) async fn next(&mut self, link: &Link, stream: &Stream) -> Result<Message> {
        let next = async {
            tokio::select! {
                biased;
                answer = tokio::time::timeout(ANSWER, self.subscriber.next()) => match answer {
                    Ok(Some(answer)) => Ok(answer),
                    Ok(None) => Err(link.ended()),
                    Err(_) => Err(link.silence()),
                },
                refused = self.refusals.of(&stream.subject) => Err(refused),
            }
        };
        unless_removed(link, stream, next).await
    }
}
