//! From a mountpoint to a running mount, and back.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use fuser::{Config, MountOption, Session, SessionACL};
use scopeguard::ScopeGuard;
use tokio::runtime::{Runtime, RuntimeFlavor};

use super::adapter::Adapter;
use super::device;
use super::files::Files;
pub use super::files::Options;
use super::interrupt::Interrupts;
pub use super::place::Place;
use super::place::{self, Prepared};
use super::pump::Pump;
use super::table::{self, Mounted, TYPE};
use crate::backend::Backend;
use crate::error::{Error, Kind, Result};

/// Threads that read requests. Two cores: more gains nothing, one costs a wake-up across them.
const THREADS: usize = 4;

/// How long the end of a mount waits for unfinished lines: less than container engines wait for a program's end (10 s).
const LAST_LINES: Duration = Duration::from_secs(5);

/// A running mount.
pub struct Mount {
    files: Arc<Files>,
    mountpoint: PathBuf,
    /// The kernel's number of it, and its device (proc(5), mountinfo).
    number: Option<u64>,
    device: Option<String>,
}

/// Mounts and serves; `ended` is called, on another thread, when the mount has ended. Returns once the mount
/// answers. A runtime of the current thread is run by the thread that reads requests.
///
/// # Errors
/// `NotFound`, `InvalidInput` or `Denied` for the mountpoint or the FUSE device; `AlreadyExists` where a
/// dnpipes is mounted already; `Unsupported` where the thread that reads requests cannot run the runtime.
pub fn mount(
    place: &Place,
    options: Options,
    backend: Arc<dyn Backend>,
    runtime: &Arc<Runtime>,
    ended: impl FnOnce() + Send + Sync + 'static,
) -> Result<Mount> {
    let Prepared {
        path: mountpoint,
        fresh,
        turn: _turn,
    } = place::prepare(place)?;
    let number = fresh.as_ref().map(|fresh| fresh.number);
    // A start that fails must not leave a mount that keeps its users waiting. One of fuser's own it takes off itself.
    let unserved = scopeguard::guard(number, |number| {
        if let Err(stays) = table::detach_numbered(number, None) {
            log::error!("{stays}");
        }
    });
    let files = Arc::new(Files::new(backend, options));
    let interrupts = Arc::<Interrupts>::default();
    let pump = match runtime.handle().runtime_flavor() {
        RuntimeFlavor::CurrentThread => Some(Arc::new(Pump::new(runtime))),
        _ => None,
    };
    let adapter = Adapter {
        files: Arc::clone(&files),
        interrupts: Arc::clone(&interrupts),
        runtime: runtime.handle().clone(),
        pump: pump.clone(),
        ended: Some(Box::new(move || {
            device::unwatch();
            ended();
        })),
    };
    let threads = pump.as_ref().map_or(THREADS, |_| 1);
    let config = config(place, threads);
    let session = match fresh {
        Some(fresh) => Session::from_fd(adapter, fresh.device, config.acl, config),
        None => Session::new(adapter, &mountpoint, &config),
    };
    let session = session.map_err(|error| explain(&mountpoint, error))?;
    if let Some(pump) = &pump {
        pump.watch(session.as_fd())
            .map_err(|error| Error::io("watching the FUSE device", error))?;
    }
    let is_pumped = pump.is_some();
    device::watch(session.as_fd(), interrupts, pump);
    let serving = session
        .spawn()
        .map_err(|error| Error::io("starting a thread", error))?;
    // Dropped, it would unmount whatever is mounted there at that time: perhaps the next daemon's mount,
    // where this one was detached while files were open. `Mount::end` unmounts.
    std::mem::forget(serving);
    let (top, _) = Mounted::on(&mountpoint)
        .map_err(|error| Error::io("looking at the table of mounts", error))?;
    let top = top.filter(|top| top.kind == TYPE);
    let top_number = top.as_ref().map(|top| top.number);
    let number = ScopeGuard::into_inner(unserved).or(top_number);
    let mount = Mount {
        files,
        mountpoint,
        number,
        device: top
            .filter(|top| Some(top.number) == number)
            .map(|top| top.device),
    };
    let works = mount.check(top_number).and_then(|()| {
        let why = "requests pass by this program's read(2)";
        match device::works() {
            true => Ok(()),
            false if is_pumped => Err(Error::new(Kind::Unsupported, why)),
            false => {
                log::error!("{why}: blocked readers cannot be interrupted");
                Ok(())
            }
        }
    });
    if let Err(error) = works {
        // Nobody would answer there.
        if let Err(stays) = mount.detach() {
            log::error!("{stays}");
        }
        return Err(error);
    }
    Ok(mount)
}

fn config(place: &Place, threads: usize) -> Config {
    let mut config = Config::default();
    config.mount_options = vec![
        MountOption::FSName(place.shown_source()),
        MountOption::CUSTOM("subtype=dnpipes".to_owned()),
        MountOption::DefaultPermissions,
        MountOption::NoSuid,
        MountOption::NoDev,
        MountOption::NoExec,
        MountOption::NoAtime,
    ];
    if place.read_only {
        config.mount_options.push(MountOption::RO);
    }
    config.acl = if place.allow_other {
        SessionACL::All
    } else {
        SessionACL::Owner
    };
    config.n_threads = Some(threads);
    config
}

/// What keeps FUSE from mounting, in words that say what to do.
fn explain(mountpoint: &Path, error: io::Error) -> Error {
    let context = format!("mounting on {}", mountpoint.display());
    let hint = match error.kind() {
        io::ErrorKind::NotFound if !Path::new("/dev/fuse").exists() => Some(
            "there is no /dev/fuse; load the kernel's module with `modprobe fuse`, or give the container `--device /dev/fuse`",
        ),
        // fuser runs fusermount3 where mount(2) is not permitted.
        io::ErrorKind::NotFound => {
            Some("a user who is not root needs fusermount3, from the package fuse3")
        }
        io::ErrorKind::PermissionDenied if fs::File::open("/dev/fuse").is_err() => {
            Some("no permission to open /dev/fuse")
        }
        _ => None,
    };
    match hint {
        Some(hint) => Error::io(format!("{context}: {hint}"), error),
        None => Error::io(context, error),
    }
}

/// Whether another process sees this mount's root at `path`. This process must not ask its own
/// mount: killed meanwhile, it could not end before it had the answer, nor answer.
fn ask(path: &Path) -> io::Result<bool> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: the child makes system calls only, on memory that it has a copy of, and ends.
    let child = unsafe { libc::fork() };
    match child {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            // SAFETY: `stat` is plain data; the path ends with NUL; the child uses no descriptor. The mount's
            // would keep it alive for as long as the child waits for it.
            unsafe {
                libc::syscall(libc::SYS_close_range, 0, libc::c_uint::MAX, 0);
                let mut stat = std::mem::zeroed::<libc::stat>();
                let code = match libc::stat(path.as_ptr(), &mut stat) {
                    0 if stat.st_ino == super::tree::ROOT => 0,
                    0 => -1,
                    _ => *libc::__errno_location(),
                };
                libc::_exit(code);
            }
        }
        _ => {
            let mut status = 0;
            // SAFETY: the child is ours, and `status` outlives the call.
            while unsafe { libc::waitpid(child, &mut status, 0) } < 0 {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
            match libc::WIFEXITED(status).then(|| libc::WEXITSTATUS(status)) {
                Some(0) => Ok(true),
                Some(255) | None => Ok(false),
                Some(error) => Err(io::Error::from_raw_os_error(error)),
            }
        }
    }
}

impl Mount {
    /// Asks the mount something, by way of the kernel; `top` is the number of the dnpipes that can be seen there. Another
    /// process may have replaced the same dead mount.
    fn check(&self, top: Option<u64>) -> Result<()> {
        let failed = |error| {
            Error::io(
                format!("{} does not answer", self.mountpoint.display()),
                error,
            )
        };
        if self.number != top || !ask(&self.mountpoint).map_err(failed)? {
            let place = self.mountpoint.display();
            let why = format!("something else was mounted on {place} meanwhile");
            return Err(Error::new(Kind::AlreadyExists, why));
        }
        Ok(())
    }

    /// Ends the mount: readers get end of file, the mountpoint is free, and unfinished lines are pushed, as far as that is
    /// done within 5 seconds.
    ///
    /// # Errors
    /// Where it cannot be unmounted.
    pub fn end(&self, runtime: &Runtime) -> Result<()> {
        self.files.end();
        let detached = self.detach();
        self.finish(runtime);
        detached
    }

    /// Does what is left to do where the kernel has ended the mount, as [`Mount::end`] does. By force (umount2(2), MNT_FORCE)
    /// it is ended and stays: nobody would answer there any more.
    ///
    /// # Errors
    /// Where that cannot be unmounted.
    pub fn end_ended(&self, runtime: &Runtime) -> Result<()> {
        let detached = self.detach_dead();
        self.finish(runtime);
        detached
    }

    fn detach_dead(&self) -> Result<()> {
        // By now its numbers may be those of another mount, which answers.
        let is_dead =
            |place: PathBuf| matches!(ask(&place), Err(error) if place::is_of_the_dead(&error));
        if table::place_of(self.number, self.device.as_deref())?.is_some_and(is_dead) {
            log::warn!("the mount was ended by force; it is taken off");
            self.detach()?;
        }
        Ok(())
    }

    /// Has unfinished lines pushed, as far as that is done within 5 seconds.
    fn finish(&self, runtime: &Runtime) {
        runtime.block_on(self.files.finish(LAST_LINES));
    }

    fn detach(&self) -> Result<()> {
        table::detach_numbered(self.number, self.device.as_deref())
    }

    /// Whether any of its files is open.
    pub fn in_use(&self) -> bool {
        self.files.in_use()
    }
}

/// Whether fuser's complaint is of an answer that the kernel does not take, because it has forgotten the
/// request (ENOENT). That is every-day at the end of a mount: the kernel tells of the last close, does not wait
/// for the answer, and takes the mount away meanwhile.
pub fn is_late_answer(complaint: &log::Record<'_>) -> bool {
    complaint.target() == "fuser::reply" && complaint.args().to_string().ends_with("(os error 2)")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_answer_that_came_too_late_is_one() {
        let late = |target, error| {
            let error = io::Error::from_raw_os_error(error);
            is_late_answer(
                &log::Record::builder()
                    .target(target)
                    .args(format_args!("Failed to send FUSE reply: {error}"))
                    .build(),
            )
        };
        assert!(late("fuser::reply", libc::ENOENT));
        assert!(!late("fuser::reply", libc::EINVAL));
        assert!(!late("dnpipes::fs::errno", libc::ENOENT));
    }
}
