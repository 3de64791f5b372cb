//! Connections: how they are made, and what their failures mean.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use redis::aio::{AsyncPushSender, ConnectionLike, MultiplexedConnection};
use redis::cluster::ClusterClient;
use redis::cluster_async::ClusterConnection;
use redis::io::tcp::TcpSettings;
use redis::io::tcp::socket2::TcpKeepalive;
use redis::sentinel::{SentinelClientBuilder, SentinelServerType};
use redis::{
    AsyncConnectionConfig, Client, ClientTlsConfig, Cmd, Connection, ConnectionAddr, ErrorKind,
    IntoConnectionInfo, Pipeline, ProtocolVersion, RedisError, RedisFuture, ServerErrorKind,
    TlsCertificates, TlsMode, Value,
};

use super::login::Login;
use super::options::{RedisUrl, Topology};
use crate::backend::hosts::Host;
use crate::backend::secret::read;
use crate::error::{Error, Kind, Result};

/// How long a connection may take to be made.
pub(super) const CONNECT: Duration = Duration::from_secs(5);

/// How much earlier than the next one a host of several is tried.
const HEAD_START: Duration = Duration::from_millis(300);

/// How long an answer may take, and how long sent data may stay without an acknowledgement of the other
/// side's system.
pub(super) const ANSWER: Duration = Duration::from_secs(10);

/// Bytes a second that even a slow connection takes.
const SLOWEST: usize = 128 << 10;

/// How long an answer may take with which, or with whose question, `bytes` are under way.
pub(super) fn patience(bytes: usize) -> Duration {
    ANSWER + Duration::from_secs((bytes / SLOWEST) as u64)
}

/// A connection that many requests share. Closed when its last clone is dropped.
#[derive(Clone)]
pub(super) enum Link {
    Single(MultiplexedConnection),
    Cluster(ClusterConnection),
}

impl ConnectionLike for Link {
    fn req_packed_command<'a>(&'a mut self, cmd: &'a Cmd) -> RedisFuture<'a, Value> {
        match self {
            Link::Single(link) => link.req_packed_command(cmd),
            Link::Cluster(link) => link.req_packed_command(cmd),
        }
    }

    fn req_packed_commands<'a>(
        &'a mut self,
        pipeline: &'a Pipeline,
        offset: usize,
        count: usize,
    ) -> RedisFuture<'a, Vec<Value>> {
        match self {
            Link::Single(link) => link.req_packed_commands(pipeline, offset, count),
            Link::Cluster(link) => link.req_packed_commands(pipeline, offset, count),
        }
    }

    fn get_db(&self) -> i64 {
        match self {
            Link::Single(link) => link.get_db(),
            Link::Cluster(link) => link.get_db(),
        }
    }
}

/// Makes connections.
pub(super) struct Connector {
    url: RedisUrl,
    login: Login,
    certificates: Option<TlsCertificates>,
    /// The server that was connected to last; none of a cluster's.
    server: Mutex<Option<Server>>,
}

/// One server, to which more connections can be made.
#[derive(Clone)]
pub(super) struct Server {
    pub(super) client: Client,
}

impl Server {
    /// A connection whose calls block.
    pub(super) fn connect(&self) -> Result<Connection, RedisError> {
        self.client.get_connection_with_timeout(CONNECT)
    }

    pub(super) fn is(&self, other: &Server) -> bool {
        self.client.get_connection_info().addr() == other.client.get_connection_info().addr()
    }
}

impl Connector {
    /// # Errors
    /// `NotFound`, `Denied` or `InvalidInput` for the files with certificates or the password.
    pub(super) fn new(url: &RedisUrl) -> Result<Self> {
        let login = Login::new(url)?;
        let certificates = match &url.broker.tls {
            None => None,
            Some(files) => {
                // Who set another provider before keeps it.
                drop(rustls::crypto::ring::default_provider().install_default());
                let client_tls = match &files.identity {
                    None => None,
                    Some((cert, key)) => Some(ClientTlsConfig {
                        client_cert: read(cert)?,
                        client_key: read(key)?,
                    }),
                };
                let root_cert = files.ca.as_ref().map(|ca| read(ca)).transpose()?;
                Some(TlsCertificates {
                    client_tls,
                    root_cert,
                })
            }
        };
        Ok(Connector {
            url: url.clone(),
            login,
            certificates,
            server: Mutex::default(),
        })
    }

    /// The server that was connected to last, where there is only one of interest.
    pub(super) fn server(&self) -> Option<Server> {
        let server = self.server.lock().unwrap_or_else(PoisonError::into_inner);
        server.clone()
    }

    /// Nothing is known of a server until the next connection.
    pub(super) fn forget_server(&self) {
        let mut server = self.server.lock().unwrap_or_else(PoisonError::into_inner);
        *server = None;
    }

    fn use_server(&self, client: Client) {
        let mut server = self.server.lock().unwrap_or_else(PoisonError::into_inner);
        *server = Some(Server { client });
    }

    /// Connects, to servers that are looked up anew. `told` hears what the server sends by itself.
    ///
    /// # Errors
    /// `Unreachable`; `Denied` for credentials and certificates; `InvalidInput`.
    pub(super) async fn connect(&self, told: Option<Arc<dyn AsyncPushSender>>) -> Result<Link> {
        let hosts = self.url.broker.hosts.resolve().await?;
        let patience = match &self.url.topology {
            Topology::Single => CONNECT + head_start(hosts.len()),
            Topology::Cluster | Topology::Sentinel(_) => CONNECT,
        };
        let made = async {
            match &self.url.topology {
                Topology::Cluster => self.cluster(&hosts, told).await,
                Topology::Sentinel(name) => {
                    let client = self.master(&hosts, name).await?;
                    let link = single(&client, told).await?;
                    self.use_server(client);
                    Ok(link)
                }
                Topology::Single => self.first(&hosts, told).await,
            }
        };
        let what = || format!("connecting to {}", self.url);
        match tokio::time::timeout(patience, made).await {
            Ok(made) => made.map_err(|error| translated(what() + closed(&error), error)),
            Err(_) => Err(Error::new(Kind::Unreachable, what()).caused_by("no answer")),
        }
    }

    fn address(&self, (host, port): &Host) -> ConnectionAddr {
        match self.certificates {
            None => ConnectionAddr::Tcp(host.clone(), *port),
            Some(_) => ConnectionAddr::TcpTls {
                host: host.clone(),
                port: *port,
                insecure: false,
                tls_params: None,
            },
        }
    }

    fn client(&self, host: &Host) -> Result<Client, RedisError> {
        let info = self.address(host).into_connection_info()?;
        let info = info
            .set_tcp_settings(tcp())
            .set_redis_settings(self.login.read());
        match &self.certificates {
            None => Client::open(info),
            Some(certificates) => Client::build_with_tls(info, certificates.clone()),
        }
    }

    /// The first host that answers and can be written to; if none can, the first that answers. Each is given a
    /// head start, no more: one that is down without a word must not keep everybody from the others.
    async fn first(
        &self,
        hosts: &[Host],
        told: Option<Arc<dyn AsyncPushSender>>,
    ) -> Result<Link, RedisError> {
        let tries = hosts.iter().enumerate().map(|(place, host)| {
            let told = told.clone();
            let tried = async move {
                let client = self.client(host)?;
                let mut link = single(&client, told).await?;
                let is_master = match hosts.len() {
                    1 => true,
                    _ => match redis::cmd("ROLE").query_async(&mut link).await {
                        Ok(role) => is_master(&role),
                        Err(error) if is_broken(&error) => return Err(error),
                        // Who may not ask has to take what comes.
                        Err(_) => true,
                    },
                };
                Ok((link, client, is_master))
            };
            async move {
                tokio::time::sleep(head_start(place)).await;
                let tried = tokio::time::timeout(CONNECT, tried).await;
                tried.unwrap_or_else(|_| Err((ErrorKind::Io, "no answer").into()))
            }
        });
        let mut tries: FuturesUnordered<_> = tries.collect();
        let mut replica = None;
        let mut failed = None;
        while let Some(tried) = tries.next().await {
            match tried {
                Err(error) => failed = failed.or(Some(error)),
                Ok((link, client, true)) => {
                    self.use_server(client);
                    return Ok(link);
                }
                Ok((link, _, false)) => replica = replica.or(Some(link)),
            }
        }
        match (replica, failed) {
            (Some(link), _) => Ok(link),
            (None, Some(error)) => Err(error),
            (None, None) => Err((ErrorKind::InvalidClientConfig, "no host").into()),
        }
    }

    /// The master that sentinels know.
    pub(super) async fn master(
        &self,
        sentinels: &[Host],
        name: &str,
    ) -> Result<Client, RedisError> {
        let addresses = sentinels.iter().map(|host| self.address(host));
        let mut builder = SentinelClientBuilder::new(addresses, name, SentinelServerType::Master)?
            .set_client_to_redis_db(self.url.database)
            .set_client_to_redis_protocol(ProtocolVersion::RESP3)
            .set_client_to_redis_tcp_settings(tcp())
            .set_client_to_sentinel_tcp_settings(tcp());
        let login = self.login.read();
        if let Some(user) = login.username() {
            builder = builder.set_client_to_redis_username(user);
        }
        if let Some(password) = login.password() {
            builder = builder.set_client_to_redis_password(password);
        }
        if let Some(certificates) = &self.certificates {
            builder = builder
                .set_client_to_redis_tls_mode(TlsMode::Secure)
                .set_client_to_redis_certificates(certificates.clone())
                .set_client_to_sentinel_tls_mode(TlsMode::Secure)
                .set_client_to_sentinel_certificates(certificates.clone());
        }
        builder.build()?.async_get_client().await
    }

    async fn cluster(
        &self,
        hosts: &[Host],
        told: Option<Arc<dyn AsyncPushSender>>,
    ) -> Result<Link, RedisError> {
        let nodes = hosts
            .iter()
            .map(|host| self.address(host).into_connection_info())
            .collect::<Result<Vec<_>, _>>()?;
        let mut builder = ClusterClient::builder(nodes)
            .use_protocol(ProtocolVersion::RESP3)
            // A node that says nothing must leave time for the others.
            .connection_timeout(CONNECT / 4)
            // Ours are shorter, and those that wait have none.
            .response_timeout(Duration::from_secs(3600))
            .tcp_settings(tcp())
            // For those that a redirection answers: the others are repeated elsewhere.
            .retries(3);
        let login = self.login.read();
        if let Some(user) = login.username() {
            builder = builder.username(user);
        }
        if let Some(password) = login.password() {
            builder = builder.password(password);
        }
        if let Some(certificates) = &self.certificates {
            builder = builder.tls(TlsMode::Secure).certs(certificates.clone());
        }
        if let Some(told) = told {
            builder = builder.push_sender(Told(told));
        }
        let link = builder.build()?.get_async_connection().await?;
        Ok(Link::Cluster(link))
    }
}

/// How long those before the `place`th host have it to themselves.
fn head_start(place: usize) -> Duration {
    HEAD_START.saturating_mul(u32::try_from(place).unwrap_or(u32::MAX))
}

/// A shared listener, where one of its own is asked for.
struct Told(Arc<dyn AsyncPushSender>);

impl AsyncPushSender for Told {
    fn send(&self, info: redis::PushInfo) -> Result<(), redis::aio::SendError> {
        self.0.send(info)
    }
}

fn tcp() -> TcpSettings {
    // For connections on which nothing is asked, and that only hear: their other end may be gone without a word.
    let keepalive = TcpKeepalive::new()
        .with_time(ANSWER)
        .with_interval(ANSWER / 4);
    TcpSettings::default()
        .set_nodelay(true)
        .set_keepalive(keepalive)
        .set_user_timeout(ANSWER)
}

async fn single(
    client: &Client,
    told: Option<Arc<dyn AsyncPushSender>>,
) -> Result<Link, RedisError> {
    let mut config = AsyncConnectionConfig::new()
        .set_connection_timeout(Some(CONNECT))
        // Requests that wait for a push have no deadline; the others have ours.
        .set_response_timeout(None);
    if let Some(told) = told {
        config = config.set_push_sender(Told(told));
    }
    let link = client
        .get_multiplexed_async_connection_with_config(&config)
        .await?;
    Ok(Link::Single(link))
}

fn is_master(role: &Value) -> bool {
    match role {
        Value::Array(fields) => match fields.first() {
            Some(Value::BulkString(role)) => role == b"master",
            Some(Value::SimpleString(role)) => role == "master",
            _ => false,
        },
        _ => false,
    }
}

/// Whether another node of a cluster is said to know.
pub(super) fn is_redirected(error: &RedisError) -> bool {
    matches!(
        error.kind(),
        ErrorKind::Server(ServerErrorKind::Moved | ServerErrorKind::Ask)
    )
}

/// Whether a connection that failed so must not be used again.
pub(super) fn is_broken(error: &RedisError) -> bool {
    error.is_io_error()
        || error.is_timeout()
        || error.is_unrecoverable_error()
        || is_redirected(error)
        || matches!(
            error.kind(),
            ErrorKind::Server(ServerErrorKind::ReadOnly | ServerErrorKind::MasterDown)
                | ErrorKind::Parse
                | ErrorKind::ClusterConnectionNotFound
        )
}

/// What to think of where a server hangs up on a new connection. Its reason is mostly lost in that.
fn closed(error: &RedisError) -> &'static str {
    match error.is_connection_dropped() && !error.is_connection_refusal() {
        true => " (closed at once; perhaps it has its maxclients, or wants TLS: rediss)",
        false => "",
    }
}

/// What a failure means to the caller.
pub(super) fn translated(context: impl Into<String>, error: RedisError) -> Error {
    let kind = kind(&error);
    // A cluster's client tries more than once by itself, and tells of the last try alone.
    let maybe = kind == Kind::Unreachable
        && (is_redirected(&error) || !matches!(error.kind(), ErrorKind::Server(_)));
    // As text, as that has its causes already.
    let failed = Error::new(kind, context).caused_by(error.to_string());
    if maybe {
        failed.maybe_applied()
    } else {
        failed
    }
}

fn kind(error: &RedisError) -> Kind {
    match error.kind() {
        ErrorKind::AuthenticationFailed => Kind::Denied,
        ErrorKind::InvalidClientConfig => Kind::InvalidInput,
        ErrorKind::RESP3NotSupported => Kind::Unsupported,
        ErrorKind::Server(server) => match server {
            ServerErrorKind::NoPerm => Kind::Denied,
            ServerErrorKind::CrossSlot => Kind::InvalidInput,
            // What a slot's nodes say while it has no master, or gets another one.
            ServerErrorKind::Moved
            | ServerErrorKind::Ask
            | ServerErrorKind::BusyLoading
            | ServerErrorKind::TryAgain
            | ServerErrorKind::ClusterDown
            | ServerErrorKind::MasterDown
            | ServerErrorKind::ReadOnly => Kind::Unreachable,
            _ => by_text(error),
        },
        // A certificate that is not trusted, here or there, stays so.
        _ if ["certificate", "received fatal alert"]
            .iter()
            .any(|said| error.to_string().contains(said)) =>
        {
            Kind::Denied
        }
        // An answer of which a part has come makes no sense to the parser once the connection is closed.
        ErrorKind::Parse
        | ErrorKind::Io
        | ErrorKind::ClusterConnectionNotFound
        | ErrorKind::MasterNameNotFoundBySentinel
        | ErrorKind::NoValidReplicasFoundBySentinel => Kind::Unreachable,
        _ => by_text(error),
    }
}

/// Redis's own errors begin with a word in capitals. Those of a pipeline are what its first command failed for.
fn by_text(error: &RedisError) -> Kind {
    let failed = error.clone().into_server_errors();
    let first = failed.as_ref().and_then(|failed| failed.first());
    match first.map(|(_, error)| error.code()).or(error.code()) {
        Some("OOM") => Kind::Full,
        // It cannot write its file; if that is for want of room, a reset may help.
        Some("MISCONF") if error.to_string().contains("No space left") => Kind::Full,
        Some("NOAUTH" | "WRONGPASS" | "DENIED") => Kind::Denied,
        // Within a script it is said otherwise.
        Some("ERR")
            if error
                .to_string()
                .contains("The user executing the script can't") =>
        {
            Kind::Denied
        }
        // Longer than its proto-max-bulk-len.
        Some("ERR") if error.to_string().contains("invalid bulk length") => Kind::TooLong,
        Some("BUSY" | "NOREPLICAS" | "UNBLOCKED") => Kind::Unreachable,
        Some("WRONGTYPE") => Kind::Damaged,
        _ => Kind::Io,
    }
}
