//! Pipes behind a gateway (`dnpipes serve`), over HTTP or HTTPS.
//!
//! - [`options`]: the source's URL; [`client`]: requests and what their failures mean.
//! - [`source`]: subscribers; [`wire`]: what travels, shared with the gateway.
//!
//! A request is made once: [`super::retry::Retry`] repeats it. A push bears its identity, so that the
//! gateway stores a repeated one once.

mod client;
mod options;
mod source;
pub mod wire;

use std::sync::Arc;

use reqwest::Method;

pub use options::HttpUrl;

use super::floor::Floors;
use super::{Backend, Caps, Fut, PipeInfo, Source, Start};
use crate::error::{Error, Kind, Result};
use crate::message::{Batch, Position, PushId};
use crate::name::PipeName;
use client::Client;
use source::Subscriber;

/// The client of a gateway.
pub struct Http {
    shared: Arc<Shared>,
}

struct Shared {
    client: Client,
    /// What is known of the pipes that somebody here reads.
    floors: Floors,
}

impl Shared {
    /// Drops messages by `DELETE`, and lets the readers here know.
    async fn drop_messages(&self, pipe: &PipeName, below: &[&str]) -> Result<()> {
        let request = self.client.request(Method::DELETE, pipe, below);
        let dropped: wire::Dropped = self.client.json(request).await?;
        self.floors.of(pipe).raise(dropped.floor);
        Ok(())
    }
}

impl Http {
    /// A client of the gateway at `url`. Connects when it is first used.
    ///
    /// # Errors
    /// `NotFound`, `Denied` or `InvalidInput` for the files with certificates or the token.
    pub fn open(url: &HttpUrl) -> Result<Self> {
        Ok(Http {
            shared: Arc::new(Shared {
                client: Client::new(url)?,
                floors: Floors::default(),
            }),
        })
    }
}

impl Backend for Http {
    fn caps(&self) -> Caps {
        Caps {
            name: "http",
            durable: true,
            remote: true,
            max_message: wire::MAX_MESSAGE,
            whole_batches: true,
        }
    }

    fn push<'a>(&'a self, pipe: &'a PipeName, id: PushId, batch: Batch) -> Fut<'a, Position> {
        Box::pin(async move {
            batch.check(wire::MAX_MESSAGE)?;
            self.shared.client.push(pipe, id, &batch).await
        })
    }

    fn subscribe<'a>(&'a self, pipe: &'a PipeName, start: Start) -> Fut<'a, Box<dyn Source>> {
        Box::pin(async move {
            let subscriber = Subscriber::new(Arc::clone(&self.shared), pipe.clone(), start);
            Ok(Box::new(subscriber) as Box<dyn Source>)
        })
    }

    fn stat<'a>(&'a self, pipe: &'a PipeName) -> Fut<'a, PipeInfo> {
        Box::pin(async move {
            let client = &self.shared.client;
            let found: wire::Pipe = client.json(client.request(Method::GET, pipe, &[])).await?;
            Ok(found.info())
        })
    }

    fn list(&self) -> Fut<'_, Vec<(PipeName, PipeInfo)>> {
        Box::pin(async move {
            let client = &self.shared.client;
            let found: Vec<wire::Pipe> = client.json(client.list()).await?;
            let named = |pipe: &wire::Pipe| {
                let name = PipeName::new(&pipe.name);
                let name = name.map_err(|error| not_a_gateway(&error.to_string()))?;
                Ok((name, pipe.info()))
            };
            found.iter().map(named).collect()
        })
    }

    fn create<'a>(&'a self, pipe: &'a PipeName) -> Fut<'a, bool> {
        Box::pin(async move {
            let client = &self.shared.client;
            let answer = client.send(client.request(Method::PUT, pipe, &[])).await?;
            Ok(answer.status() == reqwest::StatusCode::CREATED)
        })
    }

    fn reset<'a>(&'a self, pipe: &'a PipeName) -> Fut<'a, ()> {
        Box::pin(async move { self.shared.drop_messages(pipe, &["messages"]).await })
    }

    fn remove<'a>(&'a self, pipe: &'a PipeName) -> Fut<'a, ()> {
        Box::pin(async move { self.shared.drop_messages(pipe, &[]).await })
    }

    fn sync<'a>(&'a self, pipe: &'a PipeName) -> Fut<'a, ()> {
        Box::pin(async move {
            let client = &self.shared.client;
            let request = client.request(Method::POST, pipe, &["sync"]);
            client.send(request).await.map(drop)
        })
    }
}

/// What an answer lacks that a gateway's has.
fn not_a_gateway(why: &str) -> Error {
    Error::new(
        Kind::Io,
        format!("what answers there is not a dnpipes gateway: {why}"),
    )
}
