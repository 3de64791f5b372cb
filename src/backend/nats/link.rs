//! Connections, requests on them, and what their failures mean.
//!
//! A connection is used until it breaks, and never again: the client's own way of connecting anew would
//! hide an outage, and would send what was given up long ago once a server is back.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_nats::connection::State;
use async_nats::{
    Client, ConnectError, ConnectErrorKind, ConnectOptions, Event, HeaderMap, Message, Request,
    RequestError, RequestErrorKind, ServerAddr, Subscriber,
};
use bytes::Bytes;
use tokio::sync::broadcast;

use super::options::NatsUrl;
use crate::backend::broker::made_to_its_end;
use crate::backend::tls::tls_error;
use crate::backend::{hosts, secret};
use crate::error::{Error, Kind, Result};

/// How long one server may take to welcome a client.
const CONNECT: Duration = Duration::from_secs(3);

/// How long an answer may take.
pub(super) const ANSWER: Duration = Duration::from_secs(6);

/// The slowest line that a long message is given time for, in bytes a second.
const SLOWEST: u64 = 64 << 10;

/// How many messages may wait in a subscription: more than are ever asked for at a time.
const WAITING: usize = 128 << 10;

/// How often something is asked again that should be there, but for which nobody listens.
pub(super) const MISSES: u32 = 8;

/// How long the servers of a cluster may need to tell each other of something new; doubled each time.
pub(super) const SETTLE: Duration = Duration::from_millis(5);

/// How often a silent server is asked for a sign of life. When it owes three it is gone.
const PING: Duration = Duration::from_secs(3);

/// Room for headers beside the longest message, in bytes: a message's identity, its place in a batch, and
/// twice the longest name of a stream.
const HEADERS: usize = 1024;

/// Refusals that are kept for a request that is slow to look.
const REFUSALS: usize = 64;

/// The first server that knows atomic batches.
const ATOMIC: (u32, u32) = (2, 12);

/// What may help against a server with TLS that says nothing.
const FIRST_HINT: &str = "; one with handshake_first needs ?tls_first=yes";

/// A connection to one server.
pub(super) struct Link {
    client: Client,
    /// What the server says is not permitted; no answer says which request it means.
    refusals: broadcast::Sender<Arc<str>>,
    /// Whether an answer did not come, or cannot come, or nobody is left to ask.
    dead: Arc<AtomicBool>,
    /// Whether JetStream has ever answered, on this connection or on one before.
    has_answered: Arc<AtomicBool>,
}

impl Link {
    async fn connect(url: &NatsUrl, has_answered: &Arc<AtomicBool>) -> Result<Self> {
        // Who set another provider before keeps it.
        drop(rustls::crypto::ring::default_provider().install_default());
        let hosts = url.broker.hosts.resolve().await?;
        // Clients spread over a cluster's servers, unless DNS has drawn already.
        let first = match url.broker.hosts {
            hosts::Hosts::Named(_) => getrandom::u32().unwrap_or(0) as usize,
            hosts::Hosts::Service { .. } => 0,
        };
        let mut failed = None;
        for at in 0..hosts.len() {
            let host = &hosts[(first + at) % hosts.len()];
            match Link::connect_to(url, has_answered, host).await {
                Ok(link) => return Ok(link),
                Err(error) if error.kind() == Kind::Unreachable => failed = Some(error),
                // No other server will say otherwise.
                Err(error) => return Err(error),
            }
        }
        Err(failed.unwrap_or_else(|| Error::new(Kind::Unreachable, format!("{url}: no server"))))
    }

    async fn connect_to(
        url: &NatsUrl,
        has_answered: &Arc<AtomicBool>,
        (host, port): &hosts::Host,
    ) -> Result<Self> {
        let scheme = if url.broker.tls.is_some() {
            "tls"
        } else {
            "nats"
        };
        let shown = match host.contains(':') {
            true => format!("{scheme}://[{host}]:{port}"),
            false => format!("{scheme}://{host}:{port}"),
        };
        let address: ServerAddr = shown.parse().map_err(|error: std::io::Error| {
            Error::new(Kind::InvalidInput, shown.clone()).caused_by(error)
        })?;
        let (refusals, _) = broadcast::channel(REFUSALS);
        let told = refusals.clone();
        let dead = Arc::new(AtomicBool::new(false));
        let deaf = Arc::clone(&dead);
        let options = options(url)?.event_callback(move |event| {
            if let Event::ServerError(error) = event {
                let error = error.to_string();
                // It stays so, although the right may be given back.
                if keeps_answers_away(&error) {
                    deaf.store(true, Ordering::Relaxed);
                }
                // Nobody need be listening.
                drop(told.send(error.into()));
            }
            std::future::ready(())
        });
        let connecting = tokio::time::timeout(CONNECT, options.connect(address));
        let client = match connecting.await {
            Ok(connected) => connected.map_err(|error| failed_to_connect(url, &shown, error))?,
            Err(_) => {
                let hint = if may_wait_for_us(url) { FIRST_HINT } else { "" };
                let why = format!("{shown} does not answer within {CONNECT:?}{hint}");
                return Err(Error::new(Kind::Unreachable, why));
            }
        };
        // Once the connection breaks the client finds nobody, and gives up with all that it has queued.
        let nowhere: ServerAddr = "nats://127.0.0.1:0"
            .parse()
            .map_err(|error: std::io::Error| Error::io("an address", error))?;
        client.set_server_pool(nowhere).await.map_err(|error| {
            Error::new(Kind::Unreachable, format!("{shown}: cut at once")).caused_by(error)
        })?;
        Ok(Link {
            client,
            refusals,
            dead,
            has_answered: Arc::clone(has_answered),
        })
    }

    /// Whether it can still be used.
    pub(super) fn is_alive(&self) -> bool {
        self.client.connection_state() == State::Connected && !self.dead.load(Ordering::Relaxed)
    }

    /// The client has ended, and is not used again. Its state need not tell: what makes no sense to it may have stopped it
    /// in the midst of its work.
    pub(super) fn ended(&self) -> Error {
        self.dead.store(true, Ordering::Relaxed);
        Error::new(Kind::Unreachable, "the connection broke")
    }

    /// The longest message that the server takes, in bytes.
    pub(super) fn max_message(&self) -> usize {
        self.client.max_payload().saturating_sub(HEADERS)
    }

    /// Whether the server stores a batch as a whole.
    pub(super) fn knows_batches(&self) -> bool {
        let version = self.client.server_info().version;
        let mut numbers = version.split('.').map(|number| number.parse().unwrap_or(0));
        (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) >= ATOMIC
    }

    /// Whether the server, or one behind it, has JetStream, as far as is known: a leaf node need not have it.
    pub(super) fn has_jetstream(&self) -> bool {
        self.client.server_info().jetstream || self.has_answered.load(Ordering::Relaxed)
    }

    /// Notes that JetStream has answered.
    pub(super) fn jetstream_answered(&self) {
        self.has_answered.store(true, Ordering::Relaxed);
    }

    /// A subject on which only this client is answered.
    pub(super) fn inbox(&self) -> String {
        self.client.new_inbox()
    }

    /// Asks and waits for the answer; `None` where nobody listens on `subject`.
    ///
    /// # Errors
    /// `TooLong`, `Denied`; `Unreachable` where the answer does not come: what was asked may have happened.
    pub(super) async fn ask(
        &self,
        subject: &str,
        headers: Option<HeaderMap>,
        payload: Bytes,
    ) -> Result<Option<Message>> {
        let patience = ANSWER + Duration::from_secs(payload.len() as u64 / SLOWEST);
        match self.ask_within(patience, subject, headers, payload).await? {
            Reply::Message(message) => Ok(Some(message)),
            Reply::Nobody => Ok(None),
            Reply::Silence => Err(self.silence()),
        }
    }

    /// Asks, and waits for the answer no longer than `patience`.
    ///
    /// # Errors
    /// As for [`Link::ask`].
    pub(super) async fn ask_within(
        &self,
        patience: Duration,
        subject: &str,
        headers: Option<HeaderMap>,
        payload: Bytes,
    ) -> Result<Reply> {
        let mut request = Request::new().payload(payload).timeout(Some(patience));
        if let Some(headers) = headers {
            request = request.headers(headers);
        }
        let mut refusals = self.refusals();
        tokio::select! {
            biased;
            answer = self.client.send_request(subject.to_owned(), request) => match answer {
                Ok(message) => Ok(Reply::Message(message)),
                Err(error) => match error.kind() {
                    RequestErrorKind::NoResponders => Ok(Reply::Nobody),
                    RequestErrorKind::TimedOut => Ok(Reply::Silence),
                    _ => Err(self.unanswered(subject, error)),
                },
            },
            refused = refusals.of(subject) => Err(refused),
        }
    }

    /// Sends without waiting for an answer.
    ///
    /// # Errors
    /// `TooLong`; `Unreachable` where the connection is broken.
    pub(super) async fn send(
        &self,
        subject: &str,
        reply: Option<String>,
        headers: Option<HeaderMap>,
        payload: Bytes,
    ) -> Result<()> {
        let subject = subject.to_owned();
        let client = &self.client;
        let sent = match (reply, headers) {
            (Some(reply), Some(headers)) => {
                let sent = client.publish_with_reply_and_headers(subject, reply, headers, payload);
                sent.await
            }
            (Some(reply), None) => client.publish_with_reply(subject, reply, payload).await,
            (None, Some(headers)) => client.publish_with_headers(subject, headers, payload).await,
            (None, None) => client.publish(subject, payload).await,
        };
        sent.map_err(|error| {
            let kind = match error.kind() {
                async_nats::PublishErrorKind::MaxPayloadExceeded => Kind::TooLong,
                async_nats::PublishErrorKind::Send => return self.ended().caused_by(error),
                async_nats::PublishErrorKind::InvalidSubject => Kind::Io,
            };
            Error::new(kind, "sending to the server").caused_by(error)
        })
    }

    /// Sends what nobody answers, and waits until it is on its way.
    ///
    /// # Errors
    /// As for [`Link::send`].
    pub(super) async fn tell(&self, subject: &str, payload: Bytes) -> Result<()> {
        self.send(subject, None, None, payload).await?;
        match tokio::time::timeout(ANSWER, self.client.flush()).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(self.ended().caused_by(error)),
            Err(_) => Err(self.silence()),
        }
    }

    /// Listens on `subject`.
    ///
    /// # Errors
    /// `Unreachable` where the connection is broken.
    pub(super) async fn listen(&self, subject: String) -> Result<Subscriber> {
        let listening = self.client.subscribe(subject).await;
        listening.map_err(|error| self.ended().caused_by(error))
    }

    /// What the server refuses from now on.
    pub(super) fn refusals(&self) -> Refusals {
        Refusals(self.refusals.subscribe())
    }

    fn unanswered(&self, subject: &str, error: RequestError) -> Error {
        match error.kind() {
            RequestErrorKind::MaxPayloadExceeded => {
                Error::new(Kind::TooLong, "the server's max_payload").caused_by(error)
            }
            RequestErrorKind::InvalidSubject => {
                Error::new(Kind::Io, format!("asking {subject}")).caused_by(error)
            }
            _ => self.ended().maybe_applied(),
        }
    }

    /// The answer is overdue: the next one who needs a connection makes another.
    pub(super) fn silence(&self) -> Error {
        self.dead.store(true, Ordering::Relaxed);
        Error::new(Kind::Unreachable, "the server does not answer").maybe_applied()
    }
}

/// What comes of asking.
pub(super) enum Reply {
    Message(Message),
    /// Nobody listens.
    Nobody,
    /// No answer in time.
    Silence,
}

/// What a server does not permit.
pub(super) struct Refusals(broadcast::Receiver<Arc<str>>);

impl Refusals {
    /// Waits for one that keeps `subject` from being answered.
    pub(super) async fn of(&mut self, subject: &str) -> Error {
        let why = loop {
            match self.0.recv().await {
                Ok(why) if is_about(&why, subject) => break why,
                Ok(_) | Err(broadcast::error::RecvError::Lagged(_)) => {}
                // Only where the connection is gone, which whoever waits finds out.
                Err(broadcast::error::RecvError::Closed) => std::future::pending().await,
            }
        };
        Error::new(Kind::Denied, format!("the server refuses: {why}"))
    }
}

/// Whether the refusal names `subject`, or where answers come.
fn is_about(why: &str, subject: &str) -> bool {
    keeps_answers_away(why)
        || why
            .split('"')
            .nth(1)
            .is_some_and(|quoted| quoted == subject)
}

/// Whether a refusal names where answers come.
fn keeps_answers_away(why: &str) -> bool {
    why.contains("Subscription to \"_INBOX.")
}

fn options(url: &NatsUrl) -> Result<ConnectOptions> {
    let mut options = ConnectOptions::new()
        .name(concat!("dnpipes/", env!("CARGO_PKG_VERSION")))
        .connection_timeout(CONNECT)
        .request_timeout(Some(ANSWER))
        .ping_interval(PING)
        .subscription_capacity(WAITING)
        .max_reconnects(1)
        .ignore_discovered_servers();
    if let Some(files) = &url.broker.tls {
        options = options.require_tls(true);
        if url.tls_first {
            options = options.tls_first();
        }
        if let Some(ca) = &files.ca {
            options = options.add_root_certificates(ca.clone());
        }
        if let Some((cert, key)) = &files.identity {
            options = options.add_client_certificate(cert.clone(), key.clone());
        }
    }
    if let Some(path) = &url.creds {
        let bad = |why: &str| Error::new(Kind::InvalidInput, format!("{}: {why}", path.display()));
        let text = String::from_utf8(secret::read(path)?).map_err(|_| bad("it is not text"))?;
        return options
            .credentials(&text)
            .map_err(|error| bad("it holds no user's JWT and key").caused_by(error));
    }
    if let Some(token) = secret::from_environment("DNPIPES_TOKEN")? {
        return Ok(options.token(token));
    }
    let who = url.broker.credentials()?;
    Ok(match (who.user, who.password) {
        (Some(user), Some(password)) => options.user_and_password(user, password),
        // As in every NATS client: what stands alone is a token.
        (Some(token), None) | (None, Some(token)) => options.token(token),
        (None, None) => options,
    })
}

/// What a failed connection means.
fn failed_to_connect(url: &NatsUrl, server: &str, error: ConnectError) -> Error {
    let (kind, why) = match error.kind() {
        ConnectErrorKind::AuthorizationViolation | ConnectErrorKind::Authentication => {
            (Kind::Denied, "it does not accept the credentials")
        }
        _ => match why_in_vain(&error) {
            Some(vain) => vain,
            None => (Kind::Unreachable, "cannot connect"),
        },
    };
    let is_silent = error.to_string().contains("expected INFO, got nothing");
    let hint = match is_silent && may_wait_for_us(url) {
        true => FIRST_HINT,
        false => "",
    };
    Error::new(kind, format!("{server}: {why}{hint}")).caused_by(error)
}

/// Whether a server that says nothing may wait for the handshake of TLS.
fn may_wait_for_us(url: &NatsUrl) -> bool {
    url.broker.tls.is_some() && !url.tls_first
}

/// What no further try helps against: the other side is not who it should be, a file is wrong, or a user
/// may not come in.
fn why_in_vain(error: &ConnectError) -> Option<(Kind, &'static str)> {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = cause {
        if let Some(tls) = tls_error(error) {
            return match tls {
                rustls::Error::InvalidCertificate(_) => Some((Kind::Denied, "no trust")),
                rustls::Error::AlertReceived(_) => Some((Kind::Denied, "refused by the server")),
                rustls::Error::InvalidMessage(_) => Some((Kind::Io, "does it speak TLS?")),
                _ => None,
            };
        }
        if let Some(async_nats::ServerError::Other(why)) = error.downcast_ref() {
            let why = why.to_lowercase();
            if why.contains("authentication") || why.contains("authorization") {
                return Some((Kind::Denied, "it does not accept the credentials"));
            }
        }
        cause = error.source();
    }
    match error.kind() {
        ConnectErrorKind::Tls => Some((Kind::InvalidInput, "setting up TLS")),
        _ => None,
    }
}

/// A connection for one purpose, made when it is needed.
#[derive(Clone)]
pub(super) struct Line {
    url: Arc<NatsUrl>,
    link: Arc<Mutex<Option<Arc<Link>>>>,
    /// Held by the one that connects.
    connecting: Arc<tokio::sync::Mutex<()>>,
    /// Whether JetStream has ever answered.
    has_answered: Arc<AtomicBool>,
}

impl Line {
    pub(super) fn new(url: Arc<NatsUrl>) -> Self {
        Line {
            url,
            link: Arc::default(),
            connecting: Arc::default(),
            has_answered: Arc::default(),
        }
    }

    /// Another line to the same servers.
    pub(super) fn apart(&self) -> Self {
        Line {
            has_answered: Arc::clone(&self.has_answered),
            ..Line::new(Arc::clone(&self.url))
        }
    }

    /// The last connection, which may be broken.
    pub(super) fn last(&self) -> Option<Arc<Link>> {
        let link = self.link.lock().unwrap_or_else(PoisonError::into_inner);
        link.clone()
    }

    fn alive(&self) -> Option<Arc<Link>> {
        self.last().filter(|link| link.is_alive())
    }

    /// The connection; another one if it is broken.
    ///
    /// # Errors
    /// `Unreachable`, `Denied`, `Io`, `InvalidInput`, and those of the files with credentials.
    pub(super) async fn link(&self) -> Result<Arc<Link>> {
        if let Some(link) = self.alive() {
            return Ok(link);
        }
        let line = self.clone();
        made_to_its_end(async move { line.connect().await }).await
    }

    async fn connect(&self) -> Result<Arc<Link>> {
        let _turn = self.connecting.lock().await;
        if let Some(link) = self.alive() {
            return Ok(link);
        }
        let link = Arc::new(Link::connect(&self.url, &self.has_answered).await?);
        let mut last = self.link.lock().unwrap_or_else(PoisonError::into_inner);
        *last = Some(Arc::clone(&link));
        Ok(link)
    }

    /// Asks once more where the connection breaks over what streams out on it meanwhile.
    ///
    /// # Errors
    /// As for [`Line::link`], and those of `ask`.
    pub(super) async fn ask<T, F>(&self, ask: impl Fn(Arc<Link>) -> F) -> Result<T>
    where
        F: Future<Output = Result<T>>,
    {
        let link = self.link().await?;
        match ask(Arc::clone(&link)).await {
            Err(error) if error.kind() == Kind::Unreachable && !link.is_alive() => {
                ask(self.link().await?).await
            }
            result => result,
        }
    }
}
