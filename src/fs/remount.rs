//! A new mount in the place of one whose daemon is gone, without a moment in which the directory beneath can be seen:
//! what others write there meanwhile would be plain files, and lost.
//!
//! The new mount is made without a place, put beneath the dead one, and then the dead one is taken off. It takes
//! the system calls of mount(2)'s successor, and the right to use them.

use std::ffi::{CStr, CString};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::table;

/// What a mount is made with.
pub(super) struct Wanted<'a> {
    pub(super) source: &'a str,
    pub(super) read_only: bool,
    pub(super) allow_other: bool,
}

/// A mount that nobody serves yet: who uses it waits.
pub(super) struct Fresh {
    /// The FUSE device.
    pub(super) device: OwnedFd,
    /// The kernel's number of the mount.
    pub(super) number: u64,
}

/// Whether there is nothing in the directory at `path`, on which something is mounted.
pub(super) fn is_empty_beneath(path: &Path) -> io::Result<bool> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    // A copy of the parent's mount, on which nothing is mounted.
    let bare = open_tree(parent)?;
    let inside = Path::new("/proc/self/fd").join(bare.as_raw_fd().to_string());
    Ok(fs::read_dir(inside.join(name))?.next().is_none())
}

/// Mounts in the place of the dead mount on `path`, whose root is `dead`.
pub(super) fn replace(path: &Path, dead: BorrowedFd<'_>, wanted: &Wanted<'_>) -> io::Result<Fresh> {
    let device = OwnedFd::from(File::options().read(true).write(true).open("/dev/fuse")?);
    let mount = create(&device, wanted)?;
    let number = table::number_of(mount.as_fd())?;
    if let Err(error) = move_mount(&mount, Target::Beneath(dead)) {
        log::debug!("{}: mounting beneath: {error}", path.display());
        if table::root_of(path, table::number_of(dead)?)?.is_none() {
            return Err(io::Error::other("another process has replaced it"));
        }
        // Linux before 6.5. What is left of the time in which the directory can be seen is that between two
        // system calls.
        table::detach_opened(path, dead)?;
        move_mount(&mount, Target::On(path))?;
    } else {
        table::detach_opened(path, dead)?;
    }
    Ok(Fresh { device, number })
}

/// A mount that has no place yet, and goes away with its descriptor as long as it has none.
fn create(device: &OwnedFd, wanted: &Wanted<'_>) -> io::Result<OwnedFd> {
    const CLOEXEC: libc::c_uint = 1;
    const NOSUID: libc::c_uint = 0x2;
    const NODEV: libc::c_uint = 0x4;
    const NOEXEC: libc::c_uint = 0x8;
    const NOATIME: libc::c_uint = 0x10;
    const READ_ONLY: libc::c_uint = 0x1;
    // SAFETY: neither call can fail.
    let (uid, gid) = unsafe { (libc::getuid(), libc::getgid()) };
    // SAFETY: the name ends with NUL; what comes is checked to be a descriptor, which nobody else has.
    let context =
        unsafe { descriptor(libc::syscall(libc::SYS_fsopen, c"fuse".as_ptr(), CLOEXEC)) }?;
    let [device, uid, gid] = [
        device.as_raw_fd().to_string(),
        uid.to_string(),
        gid.to_string(),
    ];
    let settings = [
        (c"source", shortened(wanted.source)),
        (c"subtype", "dnpipes"),
        (c"fd", device.as_str()),
        (c"rootmode", "40000"),
        (c"user_id", uid.as_str()),
        (c"group_id", gid.as_str()),
    ];
    for (key, value) in settings {
        configure(&context, Setting::Text(key, &CString::new(value)?))?;
    }
    configure(&context, Setting::Flag(c"default_permissions"))?;
    let mut attributes = NOSUID | NODEV | NOEXEC | NOATIME;
    if wanted.allow_other {
        configure(&context, Setting::Flag(c"allow_other"))?;
    }
    if wanted.read_only {
        configure(&context, Setting::Flag(c"ro"))?;
        attributes |= READ_ONLY;
    }
    configure(&context, Setting::Done)?;
    // SAFETY: the descriptor is open; what comes is checked to be one, which nobody else has.
    unsafe {
        descriptor(libc::syscall(
            libc::SYS_fsmount,
            context.as_raw_fd(),
            CLOEXEC,
            attributes,
        ))
    }
}

/// As much of a text as fsconfig(2) takes. The source is for show.
fn shortened(text: &str) -> &str {
    const MOST: usize = 255;
    let end = (0..=MOST).rev().find(|end| text.is_char_boundary(*end));
    &text[..end.unwrap_or_default()]
}

enum Setting<'a> {
    Flag(&'a CStr),
    Text(&'a CStr, &'a CStr),
    /// All is said.
    Done,
}

fn configure(context: &OwnedFd, setting: Setting<'_>) -> io::Result<()> {
    let (command, key, value) = match setting {
        Setting::Flag(key) => (0, key.as_ptr(), std::ptr::null()),
        Setting::Text(key, value) => (1, key.as_ptr(), value.as_ptr()),
        Setting::Done => (6, std::ptr::null(), std::ptr::null()),
    };
    // SAFETY: the descriptor is open, and each text ends with NUL and outlives the call.
    done(unsafe {
        libc::syscall(
            libc::SYS_fsconfig,
            context.as_raw_fd(),
            command,
            key,
            value,
            0,
        )
    })
}

/// A copy of the mount in which `path` is, from there on, without what is mounted on it.
fn open_tree(path: &Path) -> io::Result<OwnedFd> {
    const CLONE: libc::c_uint = 1;
    let path = CString::new(path.as_os_str().as_bytes())?;
    let flags = CLONE | libc::O_CLOEXEC as libc::c_uint;
    // SAFETY: the path ends with NUL; what comes is checked to be a descriptor, which nobody else has.
    unsafe {
        descriptor(libc::syscall(
            libc::SYS_open_tree,
            libc::AT_FDCWD,
            path.as_ptr(),
            flags,
        ))
    }
}

enum Target<'a> {
    /// Beneath the mount of which this is the root.
    Beneath(BorrowedFd<'a>),
    On(&'a Path),
}

fn move_mount(mount: &OwnedFd, target: Target<'_>) -> io::Result<()> {
    const FROM_DESCRIPTOR: libc::c_uint = 0x4;
    const TO_DESCRIPTOR: libc::c_uint = 0x40;
    const BENEATH: libc::c_uint = 0x200;
    let (fd, path, flags) = match target {
        Target::Beneath(dead) => (dead.as_raw_fd(), c"".into(), TO_DESCRIPTOR | BENEATH),
        Target::On(path) => (
            libc::AT_FDCWD,
            CString::new(path.as_os_str().as_bytes())?,
            0,
        ),
    };
    // SAFETY: the descriptors are open, and the paths end with NUL and outlive the call.
    done(unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            mount.as_raw_fd(),
            c"".as_ptr(),
            fd,
            path.as_ptr(),
            FROM_DESCRIPTOR | flags,
        )
    })
}

fn done(result: libc::c_long) -> io::Result<()> {
    match result {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// # Safety
/// Where it is not negative, `result` is a descriptor of which nobody else knows.
unsafe fn descriptor(result: libc::c_long) -> io::Result<OwnedFd> {
    done(result)?;
    // SAFETY: the caller's promise.
    Ok(unsafe { OwnedFd::from_raw_fd(result as libc::c_int) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_source_is_shortened_between_characters() {
        assert_eq!(shortened("memory:"), "memory:");
        assert_eq!(shortened(&"ä".repeat(200)), "ä".repeat(127));
    }
}
