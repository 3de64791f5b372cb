//! The database file: making it, recognising it, connecting to it.

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::config::DbConfig;
use rusqlite::{Connection, ErrorCode, OpenFlags, ffi};

use super::Durability;
use crate::error::{Error, Kind, Result};

/// "DNPI", the application id in a store's header (SQLite file format, offset 68).
const APPLICATION_ID: i64 = 0x444e_5049;
const SCHEMA_VERSION: i64 = 1;

/// - `pipe.id` is never used twice (AUTOINCREMENT), so it serves as the epoch of positions; `slot` is used
///   again after a removal. The first message retained is `start`, and `start_total` the sum before it.
/// - `chunk.key` is the pipe's slot and the number of the row's last message, see [`super::chunk::Key`];
///   `total` is the sum of the lengths of all messages of the pipe that were ever pushed up to there;
///   `producer` and `push` are the identity of the push that the row is of, for finding a repeated one.
/// - `garbage` names rows that a reset or a removal has left to be deleted: those of the slot up to `last`.
const SCHEMA: &str = "
    CREATE TABLE pipe (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        slot INTEGER NOT NULL UNIQUE,
        name TEXT NOT NULL UNIQUE,
        start INTEGER NOT NULL,
        start_total INTEGER NOT NULL,
        modified INTEGER NOT NULL
    );
    CREATE TABLE chunk (
        key INTEGER PRIMARY KEY,
        count INTEGER NOT NULL,
        total INTEGER NOT NULL,
        time INTEGER NOT NULL,
        producer BLOB NOT NULL,
        push INTEGER NOT NULL,
        checksum INTEGER NOT NULL,
        data BLOB NOT NULL
    );
    CREATE TABLE garbage (slot INTEGER NOT NULL, last INTEGER NOT NULL);
";

/// While a connection is opened, others may be opening, recovering or closing the last one.
const OPENING: Duration = Duration::from_secs(5);

/// Pages in the write-ahead log before a commit moves them into the database file, where the disk has
/// room for that.
const CHECKPOINT_PAGES: u64 = 1000;
const PAGE: u64 = 4096;

/// As many symbolic links are followed as the kernel follows (path_resolution(7)).
const MOST_LINKS: usize = 40;

/// The name of a file beside the database.
pub(super) fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// The path without symbolic links, as SQLite takes it for the files beside; what is missing is made there.
pub(super) fn resolved(path: &Path) -> io::Result<PathBuf> {
    let mut path = std::path::absolute(path)?;
    for _ in 0..MOST_LINKS {
        let Ok(target) = fs::read_link(&path) else {
            break;
        };
        path = match path.parent() {
            Some(folder) => folder.join(target),
            None => target,
        };
    }
    Ok(
        match (path.parent().map(fs::canonicalize), path.file_name()) {
            (Some(Ok(folder)), Some(name)) => folder.join(name),
            // Then it will be said what is wrong with it.
            _ => path,
        },
    )
}

/// Refuses what cannot hold a database, with the reason, and makes an empty file, readable by its owner
/// only, where there is none.
pub(super) fn prepare(path: &Path) -> Result<()> {
    // SQLite would make the file, and then fail for those beside it.
    let longest = libc::NAME_MAX as usize - "-journal".len();
    if path.file_name().is_some_and(|name| name.len() > longest) {
        let why = format!(
            "the store's name is too long, of more than {longest} bytes: {}",
            path.display()
        );
        return Err(Error::new(Kind::InvalidInput, why));
    }
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    match fs::metadata(folder) {
        Ok(meta) if meta.is_dir() => {}
        Ok(_) => {
            return Err(Error::new(
                Kind::InvalidInput,
                format!("{} is not a directory", folder.display()),
            ));
        }
        Err(error) => {
            let context = format!("the store's directory {}", folder.display());
            return Err(Error::io(context, error));
        }
    }
    refuse_network(folder)?;
    may_write(path, folder)?;
    match fs::metadata(path) {
        Ok(meta) if !meta.is_file() => Err(Error::new(
            Kind::InvalidInput,
            format!("{} is not a regular file", path.display()),
        )),
        Ok(_) => may_write(path, path),
        Err(_) => {
            // A file that exists is not opened here: closing it would drop the locks that SQLite holds
            // on it in this process (fcntl(2), POSIX locks).
            let made = File::options()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(path);
            match made {
                Ok(_) => Ok(()),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
                Err(error) => Err(Error::io(
                    format!("making the store {}", path.display()),
                    error,
                )),
            }
        }
    }
}

/// Asks before SQLite does, which would not say why it cannot.
fn may_write(store: &Path, place: &Path) -> Result<()> {
    let context = || {
        format!(
            "the store {} needs to write to {}",
            store.display(),
            place.display()
        )
    };
    let c_path = c_path(place, context)?;
    // SAFETY: the path ends with NUL.
    match unsafe { libc::access(c_path.as_ptr(), libc::R_OK | libc::W_OK) } {
        0 => Ok(()),
        _ => Err(Error::io(context(), io::Error::last_os_error())),
    }
}

fn c_path(path: &Path, context: impl Fn() -> String) -> Result<CString> {
    CString::new(path.as_os_str().as_bytes())
        .map_err(|error| Error::new(Kind::InvalidInput, context()).caused_by(error))
}

/// SQLite's shared memory and locks need one kernel (sqlite.org/wal.html, "All processes using a
/// database must be on the same host").
fn refuse_network(folder: &Path) -> Result<()> {
    // The numbers are those of statfs(2).
    const NETWORK: [(i64, &str); 11] = [
        (0x6969, "nfs"),
        (0x517b, "smb"),
        (0xff53_4d42, "cifs"),
        (0xfe53_4d42, "smb2"),
        (0x0102_1997, "9p"),
        (0x5346_414f, "afs"),
        (0x6b41_4653, "kafs"),
        (0x00c3_6400, "ceph"),
        (0x7375_7245, "coda"),
        (0x0bd0_0bd0, "lustre"),
        (0x564c, "ncp"),
    ];
    let context = || format!("looking at {}", folder.display());
    let c_path = c_path(folder, context)?;
    // SAFETY: `statfs` is plain data, for which all zeros is a valid value.
    let mut info: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: the path ends with NUL, and `info` outlives the call.
    if unsafe { libc::statfs(c_path.as_ptr(), &mut info) } != 0 {
        return Err(Error::io(context(), io::Error::last_os_error()));
    }
    match NETWORK
        .iter()
        .find(|(magic, _)| *magic == info.f_type as i64)
    {
        None => Ok(()),
        Some((_, name)) => Err(Error::new(
            Kind::Unsupported,
            format!(
                "{} is on a network file system ({name}), where several hosts would damage the store; \
                 keep it on a local disk",
                folder.display()
            ),
        )),
    }
}

/// Room on the disk that pushes leave free, in bytes: what a reset needs, which makes room, and what the
/// log needs to be moved into the database. On a small disk a quarter of it.
const RESERVE: u64 = 4 * CHECKPOINT_PAGES * PAGE;

/// A disk's size and what is free on it, in bytes (statvfs(3)).
pub(super) struct Disk {
    size: u64,
    free: u64,
}

impl Disk {
    pub(super) fn of(path: &Path) -> Result<Self> {
        let context = || format!("looking at the disk of {}", path.display());
        let c_path = c_path(path, context)?;
        // SAFETY: `statvfs` is plain data, for which all zeros is a valid value.
        let mut info: libc::statvfs = unsafe { std::mem::zeroed() };
        // SAFETY: the path ends with NUL, and `info` outlives the call.
        if unsafe { libc::statvfs(c_path.as_ptr(), &mut info) } != 0 {
            let error = io::Error::last_os_error();
            return Err(match error.kind() {
                // It was there when it was opened.
                io::ErrorKind::NotFound => Error::new(Kind::Io, context()).caused_by(error),
                _ => Error::io(context(), error),
            });
        }
        Ok(Disk {
            size: info.f_blocks.saturating_mul(info.f_frsize),
            free: info.f_bavail.saturating_mul(info.f_frsize),
        })
    }

    fn reserve(&self) -> u64 {
        RESERVE.min(self.size / 4)
    }

    /// Bytes of messages that still fit: each is once in the log and once in the database.
    pub(super) fn room(&self) -> u64 {
        self.free.saturating_sub(self.reserve()) / 2
    }

    /// The log's length at which it is moved into the database, in pages.
    pub(super) fn checkpoint_pages(&self) -> u64 {
        (self.reserve() / 4 / PAGE).clamp(16, CHECKPOINT_PAGES)
    }
}

/// The log's length before it is moved into the database, in bytes, where it is shorter and the disk has room for
/// that.
///
/// # Errors
/// Those of looking at the files.
pub(super) fn missing_log(path: &Path) -> Result<Option<u64>> {
    let disk = Disk::of(path)?;
    // A frame is a page and 24 bytes; before them stand 32 (SQLite file format, 4.1).
    let wanted = 32 + disk.checkpoint_pages() * (PAGE + 24);
    let log = beside(path, "-wal");
    let length = fs::metadata(&log)
        .map_err(|error| Error::io(format!("looking at {}", log.display()), error))?
        .len();
    Ok((length < wanted && disk.room() > wanted).then_some(wanted))
}

/// Fills the log up with zeros, to `wanted` bytes: a push that makes the file longer waits for the file system's journal, too. What
/// stands behind the last commit is nothing to SQLite, whatever it is. To be called in a transaction that writes,
/// as nobody else makes the log longer meanwhile; the caller then syncs what it gets.
///
/// # Errors
/// Those of writing; then the log is as it was.
pub(super) fn extend_log(path: &Path, wanted: u64) -> Result<Option<File>> {
    static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
    let log = beside(path, "-wal");
    let context = || format!("extending {}", log.display());
    let extend = || -> io::Result<Option<File>> {
        let file = File::options().write(true).open(&log)?;
        let length = file.metadata()?.len();
        let mut at = length;
        while at < wanted {
            let some = ZEROS.len().min((wanted - at) as usize);
            if let Err(error) = file.write_all_at(&ZEROS[..some], at) {
                file.set_len(length)?;
                return Err(error);
            }
            at += some as u64;
        }
        Ok((length < wanted).then_some(file))
    };
    extend().map_err(|error| Error::io(context(), error))
}

/// Whether the file is a store already, or empty yet. Another program's file is left as it is.
///
/// # Errors
/// `Damaged` and `Unsupported` for what is neither, and for a file that has another name.
pub(super) fn is_store(path: &Path) -> Result<bool> {
    let context = || format!("opening the store {}", path.display());
    check_name(path)?;
    match fs::metadata(path).map_or(0, |meta| meta.len()) {
        0 => return Ok(false),
        // SQLite takes one of a single byte for an empty one, and overwrites it.
        1 => return Err(Error::new(Kind::Damaged, context()).caused_by("file is not a database")),
        _ => {}
    }
    let connection = open(path).map_err(|error| sqlite(context(), error))?;
    let found = Found::look(&connection).map_err(|error| sqlite(context(), error))?;
    if found == Found::EMPTY {
        Ok(false)
    } else if found.application_id == APPLICATION_ID && found.version == SCHEMA_VERSION {
        // A copy made by VACUUM INTO has no write-ahead log.
        let log = || {
            let mode: String =
                connection.pragma_query_value(None, "journal_mode", |row| row.get(0))?;
            match mode.as_str() {
                "wal" => Ok(()),
                _ => connection.pragma_update(None, "journal_mode", "WAL"),
            }
        };
        log().map_err(|error| sqlite(context(), error))?;
        Ok(true)
    } else {
        Err(found.refusal(path))
    }
}

/// Refuses a file that others may reach by another path: the files beside it are named after the path, and who has others
/// knows nothing of what the first ones write (sqlite.org/howtocorrupt.html, 2.5).
fn check_name(path: &Path) -> Result<()> {
    let context = || format!("looking at the store {}", path.display());
    let c_path = c_path(path, context)?;
    // SAFETY: `statx` is plain data, for which all zeros is a valid value.
    let mut found: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: the path ends with NUL, and `found` outlives the call.
    let looked = unsafe {
        let at = libc::AT_FDCWD;
        libc::statx(at, c_path.as_ptr(), 0, libc::STATX_NLINK, &mut found)
    };
    let why = match looked {
        0 if found.stx_attributes & libc::STATX_ATTR_MOUNT_ROOT as u64 != 0 => {
            "the file itself is mounted there; mount the directory that it is in"
        }
        0 if found.stx_nlink > 1 => "the file has another name (a hard link)",
        0 => return Ok(()),
        _ => return Err(Error::io(context(), io::Error::last_os_error())),
    };
    let why = format!(
        "{}: {why}: two paths to one store damage it",
        path.display()
    );
    Err(Error::new(Kind::Unsupported, why))
}

fn open(path: &Path) -> rusqlite::Result<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags)?;
    connection.busy_timeout(OPENING)?;
    // Until it is known to be ours, even closing it must not change it.
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)?;
    Ok(connection)
}

/// Lays out the tables in a file that is empty yet.
pub(super) fn lay_out(path: &Path) -> Result<()> {
    let lay_out = || {
        let connection = open(path)?;
        if Found::look(&connection)? == Found::EMPTY {
            // So that a reset gives room on the disk back.
            connection.pragma_update(None, "auto_vacuum", "INCREMENTAL")?;
            connection.pragma_update(None, "journal_mode", "WAL")?;
            connection.execute_batch(&format!(
                "BEGIN IMMEDIATE; {SCHEMA}
                 PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {SCHEMA_VERSION}; COMMIT"
            ))?;
        }
        Ok(())
    };
    lay_out().map_err(|error| sqlite(format!("making the store {}", path.display()), error))
}

/// Connects to a store. `busy` is how long SQLite waits for its locks later.
pub(super) fn connect(
    path: &Path,
    durability: Durability,
    cache_kib: u32,
    busy: Duration,
) -> Result<Connection> {
    let pages = Disk::of(path)?.checkpoint_pages();
    let connect = || {
        let connection = open(path)?;
        connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, false)?;
        // Without it SQLite plans a statement anew for each new value that it compares with.
        connection.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_QPSG, true)?;
        connection.set_prepared_statement_cache_capacity(32);
        connection.execute_batch(&format!(
            "PRAGMA synchronous = {}; PRAGMA cache_size = -{cache_kib};
             PRAGMA wal_autocheckpoint = {pages}; PRAGMA journal_size_limit = {};
             PRAGMA temp_store = MEMORY",
            match durability {
                Durability::Full => "FULL",
                Durability::Process => "NORMAL",
            },
            2 * pages * PAGE,
        ))?;
        connection.busy_timeout(busy)?;
        Ok(connection)
    };
    connect().map_err(|error| sqlite(format!("opening the store {}", path.display()), error))
}

#[derive(PartialEq, Eq)]
struct Found {
    application_id: i64,
    version: i64,
    tables: i64,
}

impl Found {
    const EMPTY: Found = Found {
        application_id: 0,
        version: 0,
        tables: 0,
    };

    /// All of one moment: another process may be laying out the tables.
    fn look(connection: &Connection) -> rusqlite::Result<Found> {
        let moment = connection.unchecked_transaction()?;
        let number = |query: &str| moment.query_row(query, [], |row| row.get(0));
        Ok(Found {
            application_id: number("PRAGMA application_id")?,
            version: number("PRAGMA user_version")?,
            tables: number("SELECT count(*) FROM sqlite_schema")?,
        })
    }

    fn refusal(&self, path: &Path) -> Error {
        let path = path.display();
        if self.application_id == APPLICATION_ID {
            let made_by = format!("{path} has schema version {}", self.version);
            let known = format!("this dnpipes knows version {SCHEMA_VERSION}");
            Error::new(Kind::Unsupported, format!("{made_by}; {known}"))
        } else {
            Error::new(
                Kind::Damaged,
                format!(
                    "{path} is a database of another program, not a dnpipes store; it is left as it is"
                ),
            )
        }
    }
}

/// An error of SQLite's, met while doing `context`. Result codes: sqlite.org/rescode.html.
pub(super) fn sqlite(context: impl Into<String>, error: rusqlite::Error) -> Error {
    let kind = match &error {
        rusqlite::Error::SqliteFailure(failure, _) => match failure.code {
            ErrorCode::DiskFull => Kind::Full,
            // The shared memory file could not grow, which SQLite does not say.
            ErrorCode::SystemIoFailure if failure.extended_code == ffi::SQLITE_IOERR_SHMSIZE => {
                let context = format!("{}: the disk is full", context.into());
                return Error::new(Kind::Full, context).caused_by(error);
            }
            // The last is told of where others kept the locks too long for another try.
            ErrorCode::DatabaseBusy
            | ErrorCode::DatabaseLocked
            | ErrorCode::FileLockingProtocolFailed => Kind::Unreachable,
            ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase => Kind::Damaged,
            ErrorCode::ReadOnly | ErrorCode::PermissionDenied => Kind::Denied,
            ErrorCode::TooBig => Kind::TooLong,
            // The numbers of a pipe's messages, or the slots for pipes, are used up.
            ErrorCode::ConstraintViolation => Kind::Full,
            _ => Kind::Io,
        },
        // A row of another shape than the schema's.
        _ => Kind::Damaged,
    };
    Error::new(kind, context).caused_by(error)
}
