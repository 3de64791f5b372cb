//! Connections: taken, bounded, encrypted, served, ended.

use std::net::SocketAddr;
use std::pin::pin;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use rustls::ServerConfig;
use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio_rustls::TlsAcceptor;

use super::{Gateway, routes};
use crate::error::{Error, Result};
use crate::metrics;

/// How long a TLS handshake may take, and a request's head.
const HEAD: Duration = Duration::from_secs(30);

/// Most that a head may take, and what is kept of a body that is sent faster than it is read, in bytes.
const BUFFER: usize = 64 << 10;

/// How often a silent client's system is asked whether it is still there.
const KEEPALIVE: Duration = Duration::from_secs(15);

/// How long requests may go on once the gateway is ending.
const GRACE: Duration = Duration::from_secs(5);

/// A gateway that listens.
pub struct Server {
    gateway: Arc<Gateway>,
    listener: TcpListener,
    tls: Option<RwLock<Arc<ServerConfig>>>,
    connections: Arc<Semaphore>,
}

impl Server {
    /// Listens at `address` for at most `connections` at a time, with TLS if there is a configuration.
    ///
    /// # Errors
    /// Where the address cannot be had.
    pub async fn listen(
        gateway: Arc<Gateway>,
        address: SocketAddr,
        tls: Option<Arc<ServerConfig>>,
        connections: usize,
    ) -> Result<Self> {
        let listener = TcpListener::bind(address)
            .await
            .map_err(|error| Error::io(format!("listening on {address}"), error))?;
        Ok(Server {
            gateway,
            listener,
            tls: tls.map(RwLock::new),
            connections: Arc::new(Semaphore::new(connections)),
        })
    }

    /// Where it can be reached.
    ///
    /// # Errors
    /// If the system does not tell.
    pub fn url(&self) -> Result<String> {
        let address = self
            .listener
            .local_addr()
            .map_err(|error| Error::io("looking at the listener", error))?;
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        Ok(format!("{scheme}://{address}/"))
    }

    /// The certificate of connections that come from now on.
    pub fn set_tls(&self, config: Arc<ServerConfig>) {
        if let Some(tls) = &self.tls {
            *tls.write().unwrap_or_else(PoisonError::into_inner) = config;
        }
    }

    /// Serves until `end` is over; then no new request is taken, streams end, and pushes that have come are
    /// answered.
    pub async fn serve(&self, end: impl Future<Output = ()>) {
        let router = routes::router(Arc::clone(&self.gateway));
        let (closing, closed) = watch::channel(());
        let mut end = pin!(end);
        loop {
            let connection = tokio::select! {
                biased;
                () = &mut end => break,
                connection = self.accept() => connection,
            };
            let router = router.clone();
            let gateway = Arc::clone(&self.gateway);
            let closed = closed.clone();
            tokio::spawn(async move {
                connection.serve(router, &gateway).await;
                drop(closed);
            });
        }
        self.gateway.ending.send_replace(true);
        drop(closed);
        if tokio::time::timeout(GRACE, closing.closed()).await.is_err() {
            log::warn!("leaving requests that are still under way");
        }
    }

    /// The next connection, as soon as there may be one more.
    async fn accept(&self) -> Connection {
        loop {
            // It is never closed.
            let permit = Arc::clone(&self.connections).acquire_owned().await;
            match self.listener.accept().await {
                Ok((stream, peer)) => {
                    return Connection {
                        stream,
                        peer,
                        acceptor: self.tls.as_ref().map(|tls| {
                            let config = tls.read().unwrap_or_else(PoisonError::into_inner);
                            TlsAcceptor::from(Arc::clone(&config))
                        }),
                        _held: (permit.ok(), metrics::CONNECTIONS.held()),
                    };
                }
                // Of this connection, or of all: too many open files pass, too.
                Err(error) => {
                    log::warn!("taking a connection: {error}");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
        }
    }
}

struct Connection {
    stream: TcpStream,
    peer: SocketAddr,
    acceptor: Option<TlsAcceptor>,
    _held: (Option<tokio::sync::OwnedSemaphorePermit>, metrics::Held),
}

impl Connection {
    async fn serve(self, router: Router, gateway: &Gateway) {
        let keepalive = TcpKeepalive::new()
            .with_time(KEEPALIVE)
            .with_interval(KEEPALIVE);
        let set = self.stream.set_nodelay(true).and_then(|()| {
            // A host that is gone without a word, in the middle of an upload, must not keep its place.
            SockRef::from(&self.stream).set_tcp_keepalive(&keepalive)
        });
        if let Err(error) = set {
            log::debug!("{}: {error}", self.peer);
        }
        match self.acceptor {
            None => serve(self.stream, self.peer, router, gateway).await,
            Some(acceptor) => {
                match tokio::time::timeout(HEAD, acceptor.accept(self.stream)).await {
                    Ok(Ok(stream)) => serve(stream, self.peer, router, gateway).await,
                    Ok(Err(error)) => log::debug!("{}: no TLS: {error}", self.peer),
                    Err(_) => log::debug!("{}: no TLS in time", self.peer),
                }
            }
        }
    }
}

async fn serve(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    peer: SocketAddr,
    router: Router,
    gateway: &Gateway,
) {
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD)
        // Without this, a head that comes in large pieces may be twice as long as the buffer.
        .max_header_size(BUFFER)
        .max_buf_size(BUFFER)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    let mut connection = pin!(connection);
    let served = tokio::select! {
        biased;
        served = &mut connection => served,
        () = gateway.end() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = served {
        log::debug!("{peer}: {error}");
    }
}
