//! One suite that every backend passes unchanged; a backend adds a line, and how to open it.

mod suite;

use std::sync::Arc;

use dnpipes::backend::Backend;
use dnpipes::backend::memory::Memory;
use dnpipes::backend::sqlite::{Durability, Sqlite};
use tempfile::TempDir;

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

suite::conformance!(memory, MemoryStore);
suite::conformance!(sqlite, SqliteStore);
suite::conformance!(sqlite_process, SqliteProcessStore);
