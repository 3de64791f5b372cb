//! Requests to the server: over connections that are made anew when they break, and by scripts.

use std::collections::HashSet;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use redis::cluster_routing::{RoutingInfo, SingleNodeRoutingInfo};
use redis::{Cmd, ErrorKind, RedisError, ServerErrorKind, Value};
use tokio::sync::{OnceCell, watch};

use super::bulk::Bulk;
use super::entry::{strange, text};
use super::keys::{Keys, pattern};
use super::link::{
    ANSWER, Connector, Link, Server, is_broken, is_redirected, patience, translated,
};
use super::options::{RedisUrl, Topology};
use super::progress::Places;
use super::scripts::Lua;
use crate::backend::broker::made_to_its_end;
use crate::backend::floor::Floors;
use crate::error::{Error, Kind, Result};
use crate::name::PipeName;

/// Of so many pipes it is said that they expire: a database may be full of such.
const EXPIRING: usize = 64;

/// How long a connection that seems to be dead is asked whether it is.
const PING: Duration = Duration::from_secs(1);

/// Keys that one request of a listing looks at.
const SCAN: usize = 1000;

/// A connection that is made when it is needed, and again when it broke.
#[derive(Default)]
pub(super) struct Lane {
    current: Mutex<Current>,
    /// Held by the one that connects.
    connecting: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct Current {
    /// How many connections there were.
    generation: u64,
    /// The newest one, unless it broke.
    link: Option<Link>,
    /// Since when nothing is answered on it, although something was asked.
    silent_since: Option<Instant>,
}

impl Lane {
    fn current(&self) -> MutexGuard<'_, Current> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn usable(&self) -> Option<(u64, Link)> {
        let current = self.current();
        Some((current.generation, current.link.clone()?))
    }

    /// The connection, if it is silent for long; those who asked may have stopped waiting before that.
    fn silent(&self) -> Option<(u64, Link)> {
        let since = self.current().silent_since?;
        self.usable().filter(|_| since.elapsed() > ANSWER)
    }

    fn take(&self, link: Link) -> u64 {
        let mut current = self.current();
        *current = Current {
            generation: current.generation + 1,
            link: Some(link),
            silent_since: None,
        };
        current.generation
    }

    /// Has the next request connect anew.
    fn renew(&self) {
        self.current().link = None;
    }

    /// Has the next request connect anew, unless that was done since.
    fn forget(&self, generation: u64) {
        let mut current = self.current();
        if current.generation == generation {
            current.link = None;
        }
    }

    fn is_asked(&self, generation: u64) {
        let mut current = self.current();
        if current.generation == generation {
            current.silent_since.get_or_insert_with(Instant::now);
        }
    }

    fn has_answered(&self, generation: u64) {
        let mut current = self.current();
        if current.generation == generation {
            current.silent_since = None;
        }
    }
}

pub(super) struct Client {
    pub(super) connector: Connector,
    pub(super) url: RedisUrl,
    /// What readers know of resets.
    pub(super) floors: Arc<Floors>,
    /// Pushes, and whatever else is short.
    pub(super) commands: Arc<Lane>,
    pub(super) places: Arc<Places>,
    /// Large pushes.
    pub(super) bulk: Arc<Bulk>,
    /// What may bring large answers, behind which no push should have to wait.
    pub(super) fetches: Arc<Lane>,
    /// What waits for replicas.
    pub(super) copies: Arc<Lane>,
    /// Whether somebody asks which server it is, and how often it was another one.
    pub(super) is_watched: AtomicBool,
    pub(super) failovers: watch::Sender<u64>,
    /// Whether the server's settings were looked at.
    checked: OnceCell<()>,
    /// Pipes of which it was said that they expire.
    expiring: Mutex<HashSet<PipeName>>,
}

impl Client {
    pub(super) fn new(url: &RedisUrl) -> Result<Self> {
        Ok(Client {
            connector: Connector::new(url)?,
            url: url.clone(),
            floors: Arc::default(),
            commands: Arc::default(),
            places: Arc::default(),
            bulk: Arc::default(),
            fetches: Arc::default(),
            copies: Arc::default(),
            is_watched: AtomicBool::new(false),
            failovers: watch::Sender::new(0),
            checked: OnceCell::new(),
            expiring: Mutex::default(),
        })
    }

    pub(super) fn keys(&self, pipe: &PipeName) -> Result<Keys> {
        let cluster = self.url.topology == Topology::Cluster;
        Keys::new(&self.url.prefix, pipe, cluster)
    }

    /// The channel on which resets are told. The same key in another database is another pipe.
    pub(super) fn channel(&self) -> String {
        format!("dnpipes-resets-{}", self.url.database)
    }

    /// The server, where there is only one and it was connected to.
    pub(super) fn server(&self) -> Option<Server> {
        self.connector.server()
    }

    /// A connection for one alone, as requests that wait keep others from it.
    pub(super) async fn own_link(&self) -> Result<Link> {
        self.connector.connect(None).await
    }

    /// The lane's connection; another one if it broke.
    async fn link(self: &Arc<Self>, lane: &Arc<Lane>) -> Result<(u64, Link)> {
        if let Some((generation, mut link)) = lane.silent() {
            // Who asked may have stopped waiting just before the answer.
            let asked = one_node(&mut link, redis::cmd("PING"));
            match tokio::time::timeout(PING, asked).await {
                Ok(Ok(_)) => lane.has_answered(generation),
                Ok(Err(_)) | Err(_) => self.renew(),
            }
        }
        if let Some(usable) = lane.usable() {
            return Ok(usable);
        }
        let (client, lane) = (Arc::clone(self), Arc::clone(lane));
        made_to_its_end(async move { client.connect(&lane).await }).await
    }

    /// Has whoever asks next connect anew: to another server.
    pub(super) fn connect_anew(&self) {
        self.connector.forget_server();
        // Before the lanes are made anew: whoever is connecting looks at it last.
        self.failovers.send_modify(|count| *count += 1);
        self.renew();
    }

    fn renew(&self) {
        self.connector.forget_server();
        for lane in [&self.commands, &self.fetches, &self.copies] {
            lane.renew();
        }
    }

    async fn connect(&self, lane: &Lane) -> Result<(u64, Link)> {
        let _turn = lane.connecting.lock().await;
        if let Some(usable) = lane.usable() {
            return Ok(usable);
        }
        let failovers = *self.failovers.borrow();
        let mut link = self.connector.connect(None).await?;
        let check = async || within("asking for its settings", self.check(&mut link)).await?;
        self.checked.get_or_try_init(check).await?;
        let generation = lane.take(link.clone());
        if *self.failovers.borrow() != failovers {
            // It may be to the old one.
            lane.renew();
            let why = format!("connecting to {}", self.url);
            return Err(
                Error::new(Kind::Unreachable, why).caused_by("another server is the master")
            );
        }
        Ok((generation, link))
    }

    /// Says once that another program has set an end to a pipe.
    pub(super) fn warn_of_expiry(&self, pipe: &PipeName, stream: &str, milliseconds: u64) {
        let mut expiring = self.expiring.lock().unwrap_or_else(PoisonError::into_inner);
        if expiring.len() < EXPIRING && expiring.insert(pipe.clone()) {
            let left = Duration::from_millis(milliseconds);
            log::warn!(
                "{pipe}: its stream expires in {left:?}, and its messages with it; to keep them: PERSIST {stream}"
            );
        }
    }

    /// A request. What is not answered in time may have arrived; `bytes` that are under way with it, or with its
    /// answer, take theirs.
    pub(super) async fn call(
        self: &Arc<Self>,
        lane: &Arc<Lane>,
        what: impl Fn() -> String,
        bytes: usize,
        command: &Cmd,
    ) -> Result<Value> {
        let ask = async |link: &mut Link| command.query_async(link).await;
        let answer = self.asked(lane, &what, bytes, ask).await?;
        answer.map_err(|error| self.failed(what(), error))
    }

    pub(super) fn is_node(&self) -> Error {
        let why = format!(
            "{} is a node of a cluster; add ?cluster to the URL",
            self.url
        );
        Error::new(Kind::InvalidInput, why)
    }

    fn failed(&self, what: String, error: RedisError) -> Error {
        match is_redirected(&error) && self.url.topology != Topology::Cluster {
            // It did not say so when it was asked.
            true => self.is_node(),
            false => translated(what, error),
        }
    }

    /// Runs a script; `bytes` as for [`Client::call`].
    pub(super) async fn run<const KEYS: usize>(
        self: &Arc<Self>,
        lane: &Arc<Lane>,
        what: impl Fn() -> String,
        script: &Lua,
        keys: [&str; KEYS],
        bytes: usize,
        arguments: impl Fn(&mut Cmd),
    ) -> Result<Value> {
        let command = |name: &str, what: &str| {
            let mut command = redis::cmd(name);
            command.arg(what).arg(KEYS).arg(&keys);
            arguments(&mut command);
            command
        };
        let known = command("EVALSHA", &script.hash);
        let ask = async |link: &mut Link| known.query_async(link).await;
        match self.asked(lane, &what, bytes, ask).await? {
            Err(error) if error.kind() == ErrorKind::Server(ServerErrorKind::NoScript) => {
                let whole = command("EVAL", script.code);
                self.call(lane, what, bytes, &whole).await
            }
            answer => answer.map_err(|error| self.failed(what(), error)),
        }
    }

    /// A request that is made once, by `ask`; a connection that it breaks is not used again.
    pub(super) async fn asked(
        self: &Arc<Self>,
        lane: &Arc<Lane>,
        what: &impl Fn() -> String,
        bytes: usize,
        ask: impl AsyncFnOnce(&mut Link) -> Result<Value, RedisError>,
    ) -> Result<Result<Value, RedisError>> {
        let (generation, mut link) = self.link(lane).await?;
        let patience = patience(bytes);
        lane.is_asked(generation);
        let answer = tokio::time::timeout(patience, ask(&mut link)).await;
        if answer.is_ok() {
            lane.has_answered(generation);
        }
        let broken = match &answer {
            Err(_) => true,
            Ok(Err(error)) => is_broken(error),
            Ok(Ok(_)) => false,
        };
        if broken {
            lane.forget(generation);
        }
        match answer {
            Ok(answer) => Ok(answer),
            Err(_) => Err(no_answer(what(), patience).maybe_applied()),
        }
    }

    /// The pipes there are, in no order, each perhaps more than once.
    pub(super) async fn names(self: &Arc<Self>) -> Result<Vec<PipeName>> {
        let (generation, mut link) = self.link(&self.fetches).await?;
        let names = self.scan(&mut link).await;
        if let Err(error) = &names
            && matches!(error.kind(), Kind::Unreachable | Kind::Io)
        {
            self.fetches.forget(generation);
        }
        names
    }

    async fn scan(&self, link: &mut Link) -> Result<Vec<PipeName>> {
        let mut names = Vec::new();
        for node in nodes(link).await? {
            let mut cursor = "0".to_owned();
            loop {
                let mut scan = redis::cmd("SCAN");
                scan.arg(&cursor)
                    .arg("MATCH")
                    .arg(pattern(&self.url.prefix));
                scan.arg("COUNT").arg(SCAN).arg("TYPE").arg("stream");
                let answer = match (&mut *link, &node) {
                    (Link::Cluster(link), Some(node)) => {
                        let node = RoutingInfo::SingleNode(node.clone());
                        within("listing", link.route_command(scan, node)).await?
                    }
                    (link, _) => within("listing", scan.query_async(link)).await?,
                };
                let answer = answer.map_err(|error| translated("listing", error))?;
                let Value::Array(parts) = answer else {
                    return Err(strange("no page of SCAN"));
                };
                let [next, Value::Array(keys)] = parts.as_slice() else {
                    return Err(strange("no page of SCAN"));
                };
                names.extend(keys.iter().filter_map(|key| self.name(key)));
                cursor = text(next)?.to_owned();
                if cursor == "0" {
                    break;
                }
            }
        }
        Ok(names)
    }

    fn name(&self, key: &Value) -> Option<PipeName> {
        let name = text(key).ok()?.strip_prefix(&self.url.prefix)?;
        match PipeName::new(name) {
            Ok(name) => Some(name),
            Err(error) => {
                log::debug!("a stream that cannot be shown: {error}");
                None
            }
        }
    }
}

/// Makes an answer that does not come an error.
pub(super) async fn within<T>(what: &str, answer: impl Future<Output = T>) -> Result<T> {
    tokio::time::timeout(ANSWER, answer)
        .await
        .map_err(|_| no_answer(what.to_owned(), ANSWER))
}

pub(super) fn no_answer(what: String, patience: Duration) -> Error {
    Error::new(Kind::Unreachable, what).caused_by(format!("no answer within {patience:?}"))
}

/// Asks any one master.
pub(super) async fn one_node(link: &mut Link, command: Cmd) -> Result<Value, RedisError> {
    match link {
        Link::Single(link) => command.query_async(link).await,
        Link::Cluster(link) => {
            let node = RoutingInfo::SingleNode(SingleNodeRoutingInfo::RandomPrimary);
            link.route_command(command, node).await?.extract_error()
        }
    }
}

/// The masters of a cluster; else the one server.
async fn nodes(link: &mut Link) -> Result<Vec<Option<SingleNodeRoutingInfo>>> {
    if matches!(link, Link::Single(_)) {
        return Ok(vec![None]);
    }
    let mut slots = redis::cmd("CLUSTER");
    slots.arg("SLOTS");
    let slots = within("asking for its nodes", one_node(link, slots)).await?;
    let slots = slots.map_err(|error| translated("asking for its nodes", error))?;
    let Value::Array(ranges) = slots else {
        return Err(strange("no slots"));
    };
    let mut nodes = std::collections::BTreeSet::new();
    for range in &ranges {
        let Value::Array(range) = range else {
            return Err(strange("no slots"));
        };
        if let Some(Value::Array(master)) = range.get(2)
            && let [host, Value::Int(port), ..] = master.as_slice()
            && let Ok(port) = u16::try_from(*port)
        {
            nodes.insert((text(host)?.to_owned(), port));
        }
    }
    let node = |(host, port)| Some(SingleNodeRoutingInfo::ByAddress { host, port });
    Ok(nodes.into_iter().map(node).collect())
}
