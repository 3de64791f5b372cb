//! The gateway: any backend, offered over HTTP.
//!
//! - [`server`]: connections, TLS, limits, the end; [`access`]: who may do what.
//! - [`routes`]: the paths and the small answers; [`push`] and [`pull`]: messages in and out; [`parts`]: what they
//!   take requests apart into.
//! - [`room`]: memory for bodies; [`frames`]: messages as bytes; [`identity`]: pushes that come twice;
//!   [`problem`]: errors as documents.

pub mod access;
mod frames;
mod identity;
mod parts;
mod problem;
mod pull;
mod push;
mod room;
mod routes;
pub mod server;
pub mod tls;

use std::sync::{Arc, PoisonError, RwLock};

use tokio::sync::watch;

use crate::backend::Backend;
use access::Access;
use identity::Identities;
use room::Rooms;

/// What the gateway's requests share.
pub struct Gateway {
    backend: Arc<dyn Backend>,
    access: RwLock<Arc<Access>>,
    identities: Identities,
    rooms: Rooms,
    /// Changes at every reset made here, so that streams tell their readers at once.
    resets: watch::Sender<u64>,
    /// True once the gateway is ending: streams end.
    ending: watch::Sender<bool>,
}

impl Gateway {
    /// Offers `backend` to those whom `access` lets in.
    pub fn new(backend: Arc<dyn Backend>, access: Access) -> Self {
        Gateway {
            backend,
            access: RwLock::new(Arc::new(access)),
            identities: Identities::default(),
            rooms: Rooms::default(),
            resets: watch::Sender::new(0),
            ending: watch::Sender::new(false),
        }
    }

    /// Who is let in from now on.
    pub fn set_access(&self, access: Access) {
        *self.access.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(access);
    }

    /// Returns when the gateway is ending.
    async fn end(&self) {
        drop(self.ending.subscribe().wait_for(|ending| *ending).await);
    }

    fn access(&self) -> Arc<Access> {
        Arc::clone(&self.access.read().unwrap_or_else(PoisonError::into_inner))
    }
}
