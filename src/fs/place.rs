//! The mountpoint, and what may stand in the way there.

use std::fs::{self, File, TryLockError};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::remount::{self, Fresh, Wanted};
use super::table::{self, Mounted, TYPE, detach};
use crate::error::{Error, Kind, Result};

/// How long another daemon may be mounting in the same directory. Others may lock it, too, for whatever reason.
const TURN: Duration = Duration::from_secs(2);

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

impl Place {
    /// The source for where a comma would end it.
    pub(super) fn shown_source(&self) -> String {
        self.source.replace(',', "_")
    }
}

/// A mountpoint that is free to be mounted on.
pub(super) struct Prepared {
    /// Its absolute path.
    pub(super) path: PathBuf,
    /// What has been mounted there already.
    pub(super) fresh: Option<Fresh>,
    /// Of two daemons that start at once, one would mount over the other. To be held until the mount is served.
    pub(super) turn: Option<File>,
}

/// Makes the mountpoint free. Where a killed daemon has left its mount and this user may do so, it is replaced by a
/// fresh one; otherwise it is detached.
pub(super) fn prepare(place: &Place) -> Result<Prepared> {
    let mountpoint = &place.mountpoint;
    let path = resolve(mountpoint).map_err(|error| unusable(mountpoint, error))?;
    let turn = path.parent().and_then(turn);
    let fresh = make_free(place, &path)?;
    Ok(Prepared { path, fresh, turn })
}

/// The turn to mount in `directory`, until it is dropped; `None` where others keep it, or this user may not look into the
/// directory: that is no reason not to mount.
fn turn(directory: &Path) -> Option<File> {
    let start = Instant::now();
    let file = File::open(directory)
        .inspect_err(|error| log::debug!("opening {}: {error}", directory.display()))
        .ok()?;
    loop {
        match file.try_lock() {
            Ok(()) => return Some(file),
            Err(TryLockError::WouldBlock) if start.elapsed() < TURN => {
                std::thread::sleep(Duration::from_millis(1));
            }
            Err(error) => {
                log::info!("{}: mounting without a lock: {error}", directory.display());
                return None;
            }
        }
    }
}

/// Makes `path` free to be mounted on, or mounts there in the place of a dead mount.
fn make_free(place: &Place, path: &Path) -> Result<Option<Fresh>> {
    let named = |error| unusable(path, error);
    while let (Some(top), beneath) = Mounted::on(path).map_err(named)? {
        match fs::metadata(path) {
            Err(error) if top.kind == TYPE && is_of_the_dead(&error) => {
                let shown = path.display();
                log::warn!("{shown}: replacing what a daemon that is gone has left");
                // Another process may replace it meanwhile.
                let Some(dead) = table::root_of(path, top.number).map_err(named)? else {
                    continue;
                };
                match replace(place, path, dead.as_fd(), beneath.as_ref()) {
                    Ok(Some(fresh)) => return Ok(Some(fresh)),
                    Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => {
                        let why = format!(
                            "the mountpoint {shown} is not empty beneath what a daemon that is gone has left; \
                             the mount would hide what is in it, and `umount {shown}` shows it"
                        );
                        return Err(Error::new(Kind::InvalidInput, why));
                    }
                    Ok(None) => {}
                    Err(error) => log::info!("{shown}: detaching it first: {error}"),
                }
                match table::detach_opened(path, dead.as_fd()) {
                    Err(error) if error.raw_os_error() == Some(libc::EPERM) => detach(path)?,
                    done => done.map_err(named)?,
                }
            }
            Ok(_) if top.kind == TYPE => {
                return Err(Error::new(
                    Kind::AlreadyExists,
                    format!("{}: a dnpipes is mounted there already", path.display()),
                ));
            }
            _ => break,
        }
    }
    if !fs::metadata(path).map_err(named)?.is_dir() {
        return Err(Error::new(
            Kind::InvalidInput,
            format!("the mountpoint {} is not a directory", path.display()),
        ));
    }
    if fs::read_dir(path).map_err(named)?.next().is_some() {
        return Err(Error::new(
            Kind::InvalidInput,
            format!(
                "the mountpoint {} is not empty; the mount would hide what is in it",
                path.display()
            ),
        ));
    }
    Ok(None)
}

/// Why the mountpoint is of no use. Another user's mount answers nobody else, not even root.
fn unusable(path: &Path, error: io::Error) -> Error {
    let context = format!("the mountpoint {}", path.display());
    let top = || Mounted::on(&std::path::absolute(path)?);
    let is_covered = error.kind() == io::ErrorKind::PermissionDenied
        && top().is_ok_and(|(top, _)| top.is_some_and(|top| top.kind == TYPE));
    match is_covered {
        true => {
            let shown = path.display();
            let why = format!(
                "{context}: another user's dnpipes is mounted there, alive or dead; that user frees it by \
                 `fusermount3 -u {shown}`, and root by `umount {shown}`"
            );
            Error::new(Kind::Denied, why)
        }
        false => Error::io(context, error),
    }
}

/// What the kernel answers for a mount whose daemon is gone.
pub(super) fn is_of_the_dead(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::ENOTCONN)
}

/// Mounts in the place of the dead mount on `path`, unless that covers another dnpipes, which is to be looked at
/// first.
fn replace(
    place: &Place,
    path: &Path,
    dead: BorrowedFd<'_>,
    beneath: Option<&Mounted>,
) -> io::Result<Option<Fresh>> {
    match beneath {
        Some(beneath) if beneath.kind == TYPE => return Ok(None),
        // That cannot be looked into; but what is in it has been hidden before.
        Some(_) => {}
        None if remount::is_empty_beneath(path)? => {}
        None => return Err(io::ErrorKind::DirectoryNotEmpty.into()),
    }
    let wanted = Wanted {
        source: &place.shown_source(),
        read_only: place.read_only,
        allow_other: place.allow_other,
    };
    remount::replace(path, dead, &wanted).map(Some)
}

/// Like canonicalize, but also where the last directory is a dead mount, which cannot be looked at.
fn resolve(path: &Path) -> io::Result<PathBuf> {
    match path.canonicalize() {
        Err(error) if is_of_the_dead(&error) => {
            let path = std::path::absolute(path)?;
            match (path.parent(), path.file_name()) {
                (Some(parent), Some(name)) => Ok(parent.canonicalize()?.join(name)),
                _ => Err(error),
            }
        }
        other => other,
    }
}
