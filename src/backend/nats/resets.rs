//! Resets, told by who does them to those who read elsewhere. JetStream itself tells of them only by way of the stream,
//! where a reader sees them with the next message.

use std::sync::Arc;

use bytes::Bytes;
use futures_util::StreamExt;

use super::link::Link;
use super::{Shared, lock};
use crate::backend::Fut;
use crate::backend::ear::{Ear, Hearing, Hints};
use crate::backend::floor::Floors;
use crate::error::{Error, Result};
use crate::message::Position;
use crate::name::PipeName;

/// Where they are told. A message says where the pipe starts, and its stream's name.
const SUBJECT: &str = "dnpipes.resets";

impl Shared {
    /// Lets the readers know, here and elsewhere, that `pipe` starts at `floor` now.
    pub(super) async fn dropped(
        &self,
        link: &Link,
        pipe: &PipeName,
        floor: Position,
    ) -> Result<()> {
        self.floors.of(pipe).raise(floor);
        let told = format!("{floor} {}", self.url.naming.stream(pipe)?);
        if let Err(error) = link.tell(SUBJECT, Bytes::from(told)).await {
            // It is done. Whose connection breaks looks again.
            log::debug!("telling of the reset of {pipe}: {error}");
        }
        Ok(())
    }

    fn hear(&self, told: &[u8], hints: &Hints) {
        if let Ok(told) = str::from_utf8(told)
            && let Some((floor, stream)) = told.split_once(' ')
            && let Ok(floor) = floor.parse()
            && let Some(pipe) = self.url.naming.pipe(stream)
        {
            hints.note(&self.floors, pipe, floor);
        }
    }

    fn warn_of_deafness(&self, why: &Error) {
        if lock(&self.warned).insert(SUBJECT.to_owned()) {
            log::warn!(
                "{}: no word of others' resets: {why}; readers may still get what they have fetched before one",
                self.url
            );
        }
    }
}

impl Ear for Shared {
    fn floors(&self) -> &Floors {
        &self.floors
    }

    fn listen(self: Arc<Self>) -> Fut<'static, Hearing> {
        Box::pin(async move {
            let link = self.asking.link().await?;
            let mut refusals = link.refusals();
            let mut told = link.listen(SUBJECT.to_owned()).await?;
            let shared = Arc::downgrade(&self);
            let hearing = async move {
                let mut refused = Box::pin(async move { refusals.of(SUBJECT).await });
                let mut is_refused = false;
                let hints = Hints::default();
                let mut followed = Box::pin(hints.follow(&shared));
                loop {
                    let message = tokio::select! {
                        () = &mut followed => return,
                        message = told.next() => message,
                        why = &mut refused, if !is_refused => {
                            is_refused = true;
                            if let Some(shared) = shared.upgrade() {
                                shared.warn_of_deafness(&why);
                            }
                            continue;
                        }
                    };
                    let (Some(message), Some(shared)) = (message, shared.upgrade()) else {
                        return;
                    };
                    shared.hear(&message.payload, &hints);
                }
            };
            Ok(Box::pin(hearing) as Hearing)
        })
    }

    fn look_at(self: Arc<Self>, pipe: PipeName) -> Fut<'static, ()> {
        Box::pin(async move {
            // Of one that is gone its readers find out.
            self.look_by(&self.asking, &pipe).await.map(drop)
        })
    }
}
