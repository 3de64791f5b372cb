//! What the answers to pushed messages say.

use async_nats::{Message, Subscriber};
use futures_util::StreamExt;

use super::api::{self, ApiError, Stored};
use super::link::{ANSWER, Link, Refusals};
use crate::error::{Error, Result};

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

    pub(super) async fn next(&mut self, link: &Link, subject: &str) -> Result<Message> {
        tokio::select! {
            biased;
            answer = tokio::time::timeout(ANSWER, self.subscriber.next()) => match answer {
                Ok(Some(answer)) => Ok(answer),
                Ok(None) => Err(link.ended()),
                Err(_) => Err(link.silence()),
            },
            refused = self.refusals.of(subject) => Err(refused),
        }
    }
}
