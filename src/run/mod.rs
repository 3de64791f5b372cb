//! The commands, wired together.

mod client;
mod daemon;
pub mod logging;
mod mount;
mod repeats;
mod serve;
mod syslog;

use std::env;
use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;
use std::time::Duration;

use tokio::runtime::Runtime;

use crate::backend::BackendUrl;
use crate::backend::sqlite::Durability;
use crate::cli::Command;
use crate::error::{Error, Kind, Result};

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It did what it was asked.
    Done,
    /// `pull --timeout` saw no message.
    GotNothing,
}

/// Runs a command to its end.
///
/// # Errors
/// Whatever keeps the command from doing what it was asked.
pub fn run(command: Command) -> Result<Outcome> {
    match command {
        Command::Mount(args) => mount::mount(*args),
        Command::Serve(args) => serve::serve(args),
        Command::Push(args) => client::push(args),
        Command::Pull(args) => client::pull(args),
        Command::Reset(args) => client::reset(args),
        Command::Ls(args) => client::ls(args),
        Command::Rm(args) => client::rm(args),
    }
}

/// Shorter than any deadline of a request.
const TICK: Duration = Duration::from_secs(4);

fn runtime(threads: usize) -> Result<Runtime> {
    built(tokio::runtime::Builder::new_multi_thread().worker_threads(threads))
}

/// A runtime that runs only while a thread waits in it.
fn runtime_of_one() -> Result<Runtime> {
    built(&mut tokio::runtime::Builder::new_current_thread())
}

fn built(builder: &mut tokio::runtime::Builder) -> Result<Runtime> {
    let runtime = builder
        .enable_all()
        .build()
        .map_err(|error| Error::io("starting the runtime", error))?;
    // A deadline that comes before all others makes the runtime wake a thread, to wait for less long. With
    // this one before it, a request's deadlines do not: they would cost each request two switches of task.
    runtime.spawn(async {
        loop {
            tokio::time::sleep(TICK).await;
        }
    });
    Ok(runtime)
}

/// So many files may be open, where it is not known.
const FILES: u64 = 1024;

/// Lets this process have as many open files as the system allows it: each reader of a gateway is a
/// connection. Returns how many that are.
fn raise_file_limit() -> u64 {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: `limit` outlives both calls.
    let known = unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) } == 0;
    let before = if known { limit.rlim_cur } else { FILES };
    limit.rlim_cur = limit.rlim_max;
    // SAFETY: as above.
    if known && unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) } == 0 {
        return limit.rlim_cur;
    }
    log::info!(
        "the limit of open files stays: {}",
        std::io::Error::last_os_error()
    );
    before
}

/// Tells the service manager that all is well, if there is one that wants to know (systemd.service(5), Type=notify).
fn tell_ready() {
    if let Err(error) = sd_notify::notify(&[sd_notify::NotifyState::Ready]) {
        log::warn!("telling the service manager: {error}");
    }
}

/// The source that was named, or this user's store; its directory is made on first use.
fn source_or_default(source: Option<BackendUrl>) -> Result<BackendUrl> {
    if let Some(source) = source {
        return Ok(source);
    }
    let folder = default_folder()?;
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&folder)
        .map_err(|error| Error::io(format!("making {}", folder.display()), error))?;
    Ok(BackendUrl::Sqlite {
        path: folder.join("pipes.db"),
        durability: Durability::Full,
    })
}

fn default_folder() -> Result<PathBuf> {
    // SAFETY: geteuid(2) cannot fail.
    if unsafe { libc::geteuid() } == 0 {
        return Ok("/var/lib/dnpipes".into());
    }
    let named = |name| {
        env::var_os(name)
            .map(PathBuf::from)
            .filter(|path| path.is_absolute())
    };
    match (named("XDG_DATA_HOME"), named("HOME")) {
        (Some(data), _) => Ok(data.join("dnpipes")),
        (None, Some(home)) => Ok(home.join(".local/share/dnpipes")),
        (None, None) => Err(Error::new(
            Kind::InvalidInput,
            "no source is named, and neither XDG_DATA_HOME nor HOME says where this user's store is",
        )),
    }
}
