//! From a mountpoint to a running mount, and back.

use std::ffi::{CString, OsString};
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use fuser::{Config, MountOption, Session, SessionACL};
use tokio::runtime::{Runtime, RuntimeFlavor};

use super::adapter::Adapter;
use super::device;
use super::files::Files;
pub use super::files::Options;
use super::interrupt::Interrupts;
use super::pump::Pump;
use crate::backend::Backend;
use crate::error::{Error, Kind, Result};

/// Threads that read requests. Two cores: more gains nothing, one costs a wake-up across them.
const THREADS: usize = 4;

/// How long the end of a mount waits for unfinished lines: less than container engines wait for a program's end (10 s).
const LAST_LINES: Duration = Duration::from_secs(5);

/// The file system type, as mount(8) and /proc/self/mountinfo show it.
const TYPE: &str = "fuse.dnpipes";

/// Where and how to mount.
#[derive(Debug, Clone)]
pub struct Place {
    /// The directory.
    pub mountpoint: PathBuf,
    /// What mount(8) shows as the source.
    pub source: String,
    /// Whether pushes and resets are refused.
    pub read_only: bool,
    /// Whether other users may use the mount.
    pub allow_other: bool,
}

/// A running mount.
pub struct Mount {
    files: Arc<Files>,
    mountpoint: PathBuf,
    /// The kernel's number of it (proc(5), mountinfo).
    number: Option<u64>,
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
    let mountpoint = prepare(&place.mountpoint)?;
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
    let session = Session::new(adapter, &mountpoint, &config(place, threads))
        .map_err(|error| explain(&mountpoint, error))?;
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
    let top = Mounted::on(&mountpoint);
    let top = top.map_err(|error| Error::io("looking at the table of mounts", error))?;
    let mount = Mount {
        files,
        mountpoint,
        number: top.filter(|top| top.kind == TYPE).map(|top| top.number),
    };
    let works = mount.check().and_then(|()| {
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
        // A comma would end the option.
        MountOption::FSName(place.source.replace(',', "_")),
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

/// The mountpoint's absolute path, free to be mounted on: what a killed daemon left there is detached.
fn prepare(mountpoint: &Path) -> Result<PathBuf> {
    let named = |error| Error::io(format!("the mountpoint {}", mountpoint.display()), error);
    let path = resolve(mountpoint).map_err(named)?;
    while let Some(Mounted { kind, .. }) = Mounted::on(&path).map_err(named)? {
        match fs::metadata(&path) {
            // What the kernel answers for a mount whose daemon is gone.
            Err(error) if kind == TYPE && error.raw_os_error() == Some(libc::ENOTCONN) => {
                log::warn!(
                    "{}: detaching what a daemon that is gone has left",
                    path.display()
                );
                detach(&path)?;
            }
            Ok(_) if kind == TYPE => {
                return Err(Error::new(
                    Kind::AlreadyExists,
                    format!("{}: a dnpipes is mounted there already", path.display()),
                ));
            }
            _ => break,
        }
    }
    if !fs::metadata(&path).map_err(named)?.is_dir() {
        return Err(Error::new(
            Kind::InvalidInput,
            format!("the mountpoint {} is not a directory", path.display()),
        ));
    }
    if fs::read_dir(&path).map_err(named)?.next().is_some() {
        return Err(Error::new(
            Kind::InvalidInput,
            format!(
                "the mountpoint {} is not empty; the mount would hide what is in it",
                path.display()
            ),
        ));
    }
    Ok(path)
}

/// Like canonicalize, but also where the last directory is a dead mount, which cannot be looked at.
fn resolve(path: &Path) -> io::Result<PathBuf> {
    match path.canonicalize() {
        Err(error) if error.raw_os_error() == Some(libc::ENOTCONN) => {
            let path = std::path::absolute(path)?;
            match (path.parent(), path.file_name()) {
                (Some(parent), Some(name)) => Ok(parent.canonicalize()?.join(name)),
                _ => Err(error),
            }
        }
        other => other,
    }
}

/// A line of the table of mounts (proc(5), mountinfo).
struct Mounted {
    /// Unique while it is mounted.
    number: u64,
    place: PathBuf,
    /// The file system's type.
    kind: String,
}

impl Mounted {
    fn all() -> io::Result<Vec<Mounted>> {
        let table = fs::read("/proc/self/mountinfo")?;
        let lines = table.split(|byte| *byte == b'\n');
        Ok(lines.filter_map(Mounted::parse).collect())
    }

    fn parse(line: &[u8]) -> Option<Mounted> {
        let mut tail = line
            .split(|byte| *byte == b' ')
            .skip_while(|field| *field != b"-");
        Some(Mounted {
            number: str::from_utf8(field(line, 0)?).ok()?.parse().ok()?,
            place: PathBuf::from(OsString::from_vec(unescape(field(line, 4)?))),
            kind: String::from_utf8_lossy(tail.nth(1)?).into_owned(),
        })
    }

    /// The topmost one on `path`; `None` if nothing is mounted there.
    fn on(path: &Path) -> io::Result<Option<Mounted>> {
        let mut all = Mounted::all()?.into_iter().rev();
        Ok(all.find(|mounted| mounted.place == path))
    }
}

fn field(line: &[u8], number: usize) -> Option<&[u8]> {
    line.split(|byte| *byte == b' ').nth(number)
}

/// mountinfo writes space, tab, newline and backslash as a backslash and three octal digits.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((byte, tail)) = rest.split_first() {
        let octal = (*byte == b'\\').then(|| tail.get(..3)).flatten();
        match octal.and_then(|digits| u8::from_str_radix(str::from_utf8(digits).ok()?, 8).ok()) {
            Some(value) => {
                out.push(value);
                rest = &tail[3..];
            }
            None => {
                out.push(*byte);
                rest = tail;
            }
        }
    }
    out
}

/// Takes the topmost mount off `path` at once; what is open stays open until it is closed.
fn detach(path: &Path) -> Result<()> {
    let context = || format!("unmounting {}", path.display());
    let c_path = CString::new(path.as_os_str().as_bytes())
        .map_err(|error| Error::new(Kind::InvalidInput, context()).caused_by(error))?;
    // SAFETY: the path ends with NUL.
    if unsafe { libc::umount2(c_path.as_ptr(), libc::MNT_DETACH | libc::UMOUNT_NOFOLLOW) } == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    if error.raw_os_error() != Some(libc::EPERM) {
        return Err(Error::io(context(), error));
    }
    // A user who is not root unmounts by the set-user-id helper.
    let helper = Command::new("fusermount3")
        .args(["-u", "-z", "--"])
        .arg(path)
        .output();
    match helper {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            Err(Error::new(Kind::Io, format!("{}: {said}", context())))
        }
        Err(error) => Err(Error::io(format!("{}: fusermount3", context()), error)),
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
    /// Asks the mount something, by way of the kernel.
    fn check(&self) -> Result<()> {
        let failed = |error| {
            Error::io(
                format!("{} does not answer", self.mountpoint.display()),
                error,
            )
        };
        if !ask(&self.mountpoint).map_err(failed)? {
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

    /// Has unfinished lines pushed, as far as that is done within 5 seconds.
    pub fn finish(&self, runtime: &Runtime) {
        runtime.block_on(self.files.finish(LAST_LINES));
    }

    /// Takes the mount off, wherever it was moved to, but nothing else that is mounted there now.
    fn detach(&self) -> Result<()> {
        let failed = |error| Error::io("looking at the table of mounts", error);
        let all = Mounted::all().map_err(failed)?;
        let is_own = |mounted: &&Mounted| Some(mounted.number) == self.number;
        let Some(own) = all.iter().find(is_own) else {
            // Somebody has taken it off already.
            return Ok(());
        };
        let top = all.iter().rev().find(|mounted| mounted.place == own.place);
        if top.is_some_and(|top| top.number != own.number) {
            let why = format!("something else was mounted on {}", own.place.display());
            return Err(Error::new(Kind::AlreadyExists, why));
        }
        detach(&own.place)
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

    #[test]
    fn mountinfo_is_unescaped() {
        assert_eq!(unescape(br"/a\040b\134c\011"), b"/a b\\c\t");
        assert_eq!(unescape(br"/plain\04"), br"/plain\04");
    }

    #[test]
    fn the_root_is_mounted_and_an_ordinary_folder_is_not() {
        let folder = tempfile::tempdir().expect("folder");
        let path = folder.path().canonicalize().expect("path");
        assert!(Mounted::on(Path::new("/")).expect("table").is_some());
        assert!(Mounted::on(&path).expect("table").is_none());
    }
}
