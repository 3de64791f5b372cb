//! One suite that every backend passes unchanged; a backend adds a line, and how to open it.

#[path = "../support/gateway.rs"]
mod gateway;
#[path = "../support/services.rs"]
mod services;
mod suite;

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use dnpipes::backend::Backend;
use dnpipes::backend::http::{Http, HttpUrl};
use dnpipes::backend::memory::Memory;
use dnpipes::backend::nats::{Nats, NatsUrl};
use dnpipes::backend::redis::{Redis, RedisUrl};
use dnpipes::backend::retry::Retry;
use dnpipes::backend::sqlite::{Durability, Sqlite};
use tempfile::TempDir;

use gateway::{Certificates, Gateway};
use services::Services;

/// A store of a test's own, and clients to it.
trait Store: Send + Sync {
    /// An empty store.
    fn new() -> Self;
    /// Another participant's client.
    fn client(&self) -> Arc<dyn Backend>;
}

struct MemoryStore(Memory);

impl Store for MemoryStore {
    fn new() -> Self {
        MemoryStore(Memory::new(1 << 30))
    }

    fn client(&self) -> Arc<dyn Backend> {
        Arc::new(self.0.clone())
    }
}

struct SqliteStore(TempDir);

impl SqliteStore {
    fn open(&self, durability: Durability) -> Arc<dyn Backend> {
        let path = self.0.path().join("pipes.db");
        Arc::new(Sqlite::open(&path, durability).expect("the store opens"))
    }
}

impl Store for SqliteStore {
    fn new() -> Self {
        SqliteStore(tempfile::tempdir().expect("a folder"))
    }

    fn client(&self) -> Arc<dyn Backend> {
        self.open(Durability::Full)
    }
}

/// The same file, acknowledged without waiting for the disk.
struct SqliteProcessStore(SqliteStore);

impl Store for SqliteProcessStore {
    fn new() -> Self {
        SqliteProcessStore(SqliteStore::new())
    }

    fn client(&self) -> Arc<dyn Backend> {
        self.0.open(Durability::Process)
    }
}

/// The same stores behind a gateway of the test's own.
struct HttpStore<const SQLITE: bool, const TLS: bool> {
    gateway: Gateway,
    certificates: Option<Certificates>,
    _folder: TempDir,
}

impl<const SQLITE: bool, const TLS: bool> Store for HttpStore<SQLITE, TLS> {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let source = match SQLITE {
            true => format!("sqlite:{}/pipes.db", folder.path().display()),
            false => "memory:".to_owned(),
        };
        let certificates = TLS.then(Certificates::new);
        let flags = certificates
            .as_ref()
            .map(Certificates::flags)
            .unwrap_or_default();
        let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
        HttpStore {
            gateway: Gateway::start(&source, &flags),
            certificates,
            _folder: folder,
        }
    }

    fn client(&self) -> Arc<dyn Backend> {
        let mut url = self.gateway.url().to_owned();
        if let Some(certificates) = &self.certificates {
            url += &format!("?ca={}", certificates.ca().display());
        }
        let url = HttpUrl::parse(&url).expect("the gateway's URL");
        Arc::new(Http::open(&url).expect("a client"))
    }
}

/// Numbers the stores that share a server.
static STORES: AtomicU32 = AtomicU32::new(0);

/// The streams of a prefix of the test's own, on a server that all tests share.
struct NatsStore<const NEW: bool>(String);

impl<const NEW: bool> Store for NatsStore<NEW> {
    fn new() -> Self {
        static SERVERS: [OnceLock<Services>; 2] = [OnceLock::new(), OnceLock::new()];
        let kind = if NEW { "nats-new" } else { "nats" };
        let server = SERVERS[usize::from(NEW)].get_or_init(|| Services::start(&[kind]));
        let number = STORES.fetch_add(1, Ordering::Relaxed);
        NatsStore(format!("{}/?prefix={number}-", server.url()))
    }

    fn client(&self) -> Arc<dyn Backend> {
        nats_client(&self.0)
    }
}

fn nats_client(url: &str) -> Arc<dyn Backend> {
    let url = NatsUrl::parse(url).expect("the server's URL");
    let client = Arc::new(Nats::open(&url).expect("a client"));
    // What it can do it knows once it is connected. A cluster on a busy machine may be between two leaders.
    let patient = Retry::new(client.clone(), Some(Duration::from_secs(30)));
    let connect = || tokio::runtime::Handle::current().block_on(patient.list());
    tokio::task::block_in_place(connect).expect("a list");
    client
}

/// The same on each of three servers, by any of which they are read and written.
struct NatsClusterStore(String);

impl Store for NatsClusterStore {
    fn new() -> Self {
        static SERVERS: OnceLock<Services> = OnceLock::new();
        let servers = SERVERS.get_or_init(|| Services::start(&["nats-cluster"]));
        let servers = servers.servers().into_iter();
        let hosts: Vec<String> = servers
            .map(|server| format!("127.0.0.1:{}", server.port))
            .collect();
        let number = STORES.fetch_add(1, Ordering::Relaxed);
        let hosts = hosts.join(",");
        NatsClusterStore(format!("nats://{hosts}/?replicas=3&prefix={number}-"))
    }

    fn client(&self) -> Arc<dyn Backend> {
        nats_client(&self.0)
    }
}

/// Streams under a prefix of the test's own, in a server that all tests share.
struct RedisStore {
    url: String,
}

impl RedisStore {
    fn of(servers: &Services, options: &str) -> Self {
        let store = STORES.fetch_add(1, Ordering::Relaxed);
        let url = format!("{}?prefix=store*[{store}]:{options}", servers.url());
        RedisStore { url }
    }
}

impl Store for RedisStore {
    fn new() -> Self {
        static SERVERS: OnceLock<Services> = OnceLock::new();
        RedisStore::of(SERVERS.get_or_init(|| Services::start(&["redis"])), "")
    }

    fn client(&self) -> Arc<dyn Backend> {
        let url = RedisUrl::parse(&self.url).expect("the server's URL");
        Arc::new(Redis::open(&url).expect("a client"))
    }
}

/// The same in a cluster of three nodes.
struct RedisClusterStore(RedisStore);

impl Store for RedisClusterStore {
    fn new() -> Self {
        static SERVERS: OnceLock<Services> = OnceLock::new();
        let servers = SERVERS.get_or_init(|| Services::start(&["redis-cluster"]));
        RedisClusterStore(RedisStore::of(servers, "&cluster"))
    }

    fn client(&self) -> Arc<dyn Backend> {
        self.0.client()
    }
}

suite::conformance!(memory, MemoryStore);
suite::conformance!(sqlite, SqliteStore);
suite::conformance!(sqlite_process, SqliteProcessStore);
suite::conformance!(http_memory, HttpStore<false, false>);
suite::conformance!(http_sqlite, HttpStore<true, false>);
suite::conformance!(https_memory, HttpStore<false, true>);
suite::conformance!(https_sqlite, HttpStore<true, true>);
suite::conformance!(nats_2_9, NatsStore<false>);
suite::conformance!(nats_2_15, NatsStore<true>);
suite::conformance!(nats_cluster, NatsClusterStore);
suite::conformance!(redis, RedisStore);
suite::conformance!(redis_cluster, RedisClusterStore);

mod redis_interrupted {
    use super::*;
    suite::cases!(RedisStore: a_reader_that_looks_only_once_each_time_gets_on);
}
