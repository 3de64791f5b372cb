//! `dnpipes mount`: start, readiness, signals, and the order in which things end.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use tokio::runtime::Runtime;

use super::daemon::{self, Side, Starter};
use super::{Outcome, raise_file_limit, runtime, runtime_of_one, source_or_default, tell_ready};
use crate::backend::{self, Backend, retry::Retry};
use crate::cli::MountArgs;
use crate::error::{Error, Kind, Result};
use crate::fs::session::{self, Mount, Options, Place};

/// Threads of the runtime: on two cores as many again, so that one that waits for a slow disk leaves some.
const THREADS: usize = 4;

/// How long open files are waited for after the mountpoint is free.
const GRACE: Duration = Duration::from_secs(2);

/// How long a remote backend is waited for before it is mounted all the same.
const ASK: Duration = Duration::from_secs(2);

/// What ends a mount.
enum Event {
    Signal(i32),
    /// It was unmounted.
    Unmounted,
}

pub(super) fn mount(mut args: MountArgs) -> Result<Outcome> {
    args.apply_options().map_err(Error::usage)?;
    let starter = if args.daemon {
        match daemon::detach()? {
            Side::Starter(result) => return result.map(|()| Outcome::Done),
            Side::Daemon(starter) => Some(starter),
        }
    } else {
        None
    };
    match start(args) {
        Ok(running) => running.until_the_end(starter),
        Err(error) => match starter {
            // The process that was started by hand reports it.
            Some(starter) => {
                starter.failed(&error);
                Ok(Outcome::Done)
            }
            None => Err(error),
        },
    }
}

struct Running {
    runtime: Arc<Runtime>,
    mount: Mount,
    events: Receiver<Event>,
}

fn start(args: MountArgs) -> Result<Running> {
    let source = source_or_default(args.place.source)?;
    raise_file_limit();
    let direct = backend::open(&source)?;
    let backend = Retry::new(Arc::clone(&direct), args.timeout).waiting_for_ever();
    // Only now, so that a signal ends a program that is still waiting for its store; and before any thread
    // is started, so that every thread leaves them to the one that waits for them.
    block_signals()?;
    let runtime = match direct.caps().remote {
        true => {
            // For one push it would take longer to wake another thread than to do all that is to be done.
            let runtime = runtime_of_one()?;
            runtime.block_on(ask(&*direct))?;
            runtime
        }
        false => runtime(THREADS)?,
    };
    let runtime = Arc::new(runtime);
    // SAFETY: neither call can fail.
    let (uid, gid) = unsafe { (libc::geteuid(), libc::getegid()) };
    let options = Options {
        mode: args.mode,
        frame: args.frame,
        max_message: args.max_message_size,
        timeout: args.timeout,
        allow_delete: args.allow_delete,
        uid: args.uid.unwrap_or(uid),
        gid: args.gid.unwrap_or(gid),
        file_mode: args.file_mode,
    };
    let place = Place {
        mountpoint: args.place.mountpoint,
        source: source.to_string(),
        read_only: args.read_only,
        allow_other: args.allow_other,
    };
    let (sender, events) = channel();
    wait_for_signals(sender.clone())?;
    let ended = move || {
        // Nobody listens any more once the program ends.
        drop(sender.send(Event::Unmounted));
    };
    let mount = session::mount(&place, options, Arc::new(backend), &runtime, ended)?;
    log::info!(
        "{} is mounted on {}",
        place.source,
        place.mountpoint.display()
    );
    Ok(Running {
        runtime,
        mount,
        events,
    })
}

/// Asks a remote backend something, so that what would keep every call from working is told now. One that
/// cannot be reached yet may be there later.
async fn ask(backend: &dyn Backend) -> Result<()> {
    let error = match tokio::time::timeout(ASK, backend.list()).await {
        Ok(Ok(_)) => return Ok(()),
        Ok(Err(error)) if error.kind() != Kind::Unreachable => return Err(error),
        Ok(Err(error)) => error.to_string(),
        Err(_) => format!("no answer within {ASK:?}"),
    };
    log::warn!("mounting what cannot be reached yet: {error}");
    Ok(())
}

impl Running {
    fn until_the_end(self, starter: Option<Starter>) -> Result<Outcome> {
        if let Some(starter) = starter
            && let Err(error) = starter.ready()
        {
            self.mount.end(&self.runtime)?;
            return Err(error);
        }
        super::logging::never_wait();
        tell_ready();
        let (outcome, has_ended) = match self.events.recv() {
            Ok(Event::Unmounted) | Err(_) => {
                log::info!("unmounted");
                (self.mount.end_ended(&self.runtime), true)
            }
            Ok(Event::Signal(signal)) => {
                log::info!("signal {signal}: unmounting");
                (self.mount.end(&self.runtime), self.wait_for_open_files())
            }
        };
        if !has_ended {
            // Threads go on answering, to the very end; they need it.
            std::mem::forget(self.runtime);
        } else if let Some(runtime) = Arc::into_inner(self.runtime) {
            // What still waits for a backend must not keep the program from ending.
            runtime.shutdown_background();
        }
        outcome.map(|()| Outcome::Done)
    }

    /// The kernel ends the session once the last file is closed; whether it has.
    fn wait_for_open_files(&self) -> bool {
        while let Ok(event) = self.events.recv_timeout(GRACE) {
            if matches!(event, Event::Unmounted) {
                return true;
            }
        }
        if self.mount.in_use() {
            log::warn!("leaving files that are still open; their next use fails with ENOTCONN");
        }
        false
    }
}

const SIGNALS: [i32; 3] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP];

/// The signals that end a mount. Not a hangup that its starter has had it ignore, as nohup(1) does; an interrupt is ignored
/// by whatever a script starts in the background, which is no wish of anybody.
fn signal_set() -> libc::sigset_t {
    // SAFETY: both structures are plain data, and all calls get valid ones and valid signals.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        for signal in SIGNALS {
            libc::sigaddset(&mut set, signal);
        }
        let mut hangup: libc::sigaction = std::mem::zeroed();
        if libc::sigaction(libc::SIGHUP, std::ptr::null(), &mut hangup) == 0
            && hangup.sa_sigaction == libc::SIG_IGN
        {
            libc::sigdelset(&mut set, libc::SIGHUP);
        }
        set
    }
}

fn block_signals() -> Result<()> {
    // SAFETY: the set is valid; the old one is not asked for.
    match unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &signal_set(), std::ptr::null_mut()) } {
        0 => Ok(()),
        error => Err(Error::io(
            "blocking signals",
            io::Error::from_raw_os_error(error),
        )),
    }
}

fn wait_for_signals(events: Sender<Event>) -> Result<()> {
    let wait = move || {
        loop {
            let mut signal = 0;
            // SAFETY: the set is valid, and `signal` outlives the call.
            if unsafe { libc::sigwait(&signal_set(), &mut signal) } != 0 {
                return;
            }
            if events.send(Event::Signal(signal)).is_err() {
                return;
            }
        }
    };
    std::thread::Builder::new()
        .name("signals".to_owned())
        .spawn(wait)
        .map(drop)
        .map_err(|error| Error::io("starting a thread", error))
}
