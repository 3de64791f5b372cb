//! The table of mounts, and taking mounts off.

use std::ffi::{CString, OsString};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::error::{Error, Kind, Result};

/// The file system type, as mount(8) and /proc/self/mountinfo show it.
pub(super) const TYPE: &str = "fuse.dnpipes";

/// A line of the table of mounts (proc(5), mountinfo).
pub(super) struct Mounted {
    /// Unique while it is mounted in this namespace.
    pub(super) number: u64,
    /// The file system's device, unique as long as that is mounted anywhere, or used.
    pub(super) device: String,
    /// The number of what it is mounted on.
    parent: u64,
    place: PathBuf,
    /// The file system's type.
    pub(super) kind: String,
}

impl Mounted {
    fn all() -> io::Result<Vec<Mounted>> {
        let table = fs::read("/proc/self/mountinfo")?;
        let lines = table.split(|byte| *byte == b'\n');
        Ok(lines.filter_map(Mounted::parse).collect())
    }

    fn parse(line: &[u8]) -> Option<Mounted> {
        let number = |at| str::from_utf8(field(line, at)?).ok()?.parse().ok();
        let mut tail = line
            .split(|byte| *byte == b' ')
            .skip_while(|field| *field != b"-");
        Some(Mounted {
            number: number(0)?,
            parent: number(1)?,
            device: str::from_utf8(field(line, 2)?).ok()?.to_owned(),
            place: PathBuf::from(OsString::from_vec(unescape(field(line, 4)?))),
            kind: String::from_utf8_lossy(tail.nth(1)?).into_owned(),
        })
    }

    /// The topmost one on `path` and what is right beneath that; `None` where nothing is mounted.
    pub(super) fn on(path: &Path) -> io::Result<(Option<Mounted>, Option<Mounted>)> {
        let mut stack: Vec<_> = Mounted::all()?
            .into_iter()
            .filter(|mounted| mounted.place == path)
            .collect();
        let top = top(&stack).map(|top| top.number);
        let top = stack.iter().position(|mounted| Some(mounted.number) == top);
        let top = top.map(|at| stack.swap_remove(at));
        let parent = top.as_ref().map(|top| top.parent);
        let beneath = stack.into_iter().find(|one| Some(one.number) == parent);
        Ok((top, beneath))
    }
}

/// The topmost one of those on one place. It may be older than what is beneath it, so the order does not tell.
fn top(stack: &[Mounted]) -> Option<&Mounted> {
    // The root of all says that it is its own parent.
    let covers = |other: &Mounted, one: u64| other.parent == one && other.number != one;
    let is_covered = |one: &Mounted| stack.iter().any(|other| covers(other, one.number));
    stack.iter().rev().find(|one| !is_covered(one))
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

/// The number of the mount in which `file` is, also of one that is not in the table.
pub(super) fn number_of(file: BorrowedFd<'_>) -> io::Result<u64> {
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", file.as_raw_fd()))?;
    let number = info.lines().find_map(|line| line.strip_prefix("mnt_id:"));
    number
        .and_then(|number| number.trim().parse().ok())
        .ok_or_else(|| io::Error::other("a file without the number of its mount"))
}

/// Takes the topmost mount off `path` at once; what is open stays open until it is closed.
pub(super) fn detach(path: &Path) -> Result<()> {
    let context = || format!("unmounting {}", path.display());
    let error = match unmount(path, libc::MNT_DETACH | libc::UMOUNT_NOFOLLOW) {
        Ok(()) => return Ok(()),
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => error,
        Err(error) => return Err(Error::io(context(), error)),
    };
    log::debug!("{}: {error}; by fusermount3", context());
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

/// The root of the mount of this number, if that is the topmost one on `path`. By it nothing is taken off that another
/// process has mounted there meanwhile.
pub(super) fn root_of(path: &Path, number: u64) -> io::Result<Option<OwnedFd>> {
    let root = File::options()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_DIRECTORY | libc::O_NOFOLLOW)
        .open(path)?;
    let is_it = number_of(root.as_fd())? == number;
    Ok(is_it.then(|| root.into()))
}

/// Takes the mount whose root `root` is off `path`, unless somebody has done so already.
pub(super) fn detach_opened(path: &Path, root: BorrowedFd<'_>) -> io::Result<()> {
    let link = format!("/proc/self/fd/{}", root.as_raw_fd());
    let Err(error) = unmount(Path::new(&link), libc::MNT_DETACH) else {
        return Ok(());
    };
    // It says so of one that is off, and of one that may not be taken off in this namespace.
    if error.raw_os_error() == Some(libc::EINVAL) && root_of(path, number_of(root)?)?.is_none() {
        return Ok(());
    }
    Err(error)
}

fn unmount(path: &Path, flags: libc::c_int) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: the path ends with NUL.
    match unsafe { libc::umount2(path.as_ptr(), flags) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// All mounts, and where that of this number is now. The kernel may give the number to another one once it is off: so `device`
/// is to be the same, where it is known.
fn all_and_place_of(
    number: Option<u64>,
    device: Option<&str>,
) -> Result<(Vec<Mounted>, Option<PathBuf>)> {
    let all = Mounted::all().map_err(|error| Error::io("looking at the table of mounts", error))?;
    let is_own = |one: &&Mounted| {
        Some(one.number) == number && device.is_none_or(|device| one.device == device)
    };
    let place = all.iter().find(is_own).map(|own| own.place.clone());
    Ok((all, place))
}

/// Where the mount of this number is now, if it is still mounted.
pub(super) fn place_of(number: Option<u64>, device: Option<&str>) -> Result<Option<PathBuf>> {
    all_and_place_of(number, device).map(|(_, place)| place)
}

/// Takes the mount of this number off, wherever it was moved to, but nothing else that is mounted there now.
pub(super) fn detach_numbered(number: Option<u64>, device: Option<&str>) -> Result<()> {
    let (mut all, Some(place)) = all_and_place_of(number, device)? else {
        // Somebody has taken it off already.
        return Ok(());
    };
    all.retain(|one| one.place == place);
    if top(&all).is_some_and(|top| Some(top.number) != number) {
        let why = format!("something else was mounted on {}", place.display());
        return Err(Error::new(Kind::AlreadyExists, why));
    }
    detach(&place)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mountinfo_is_unescaped() {
        assert_eq!(unescape(br"/a\040b\134c\011"), b"/a b\\c\t");
        assert_eq!(unescape(br"/plain\04"), br"/plain\04");
    }

    #[test]
    fn the_root_is_mounted_and_an_ordinary_folder_is_not() {
        let folder = tempfile::tempdir().expect("folder");
        let path = folder.path().canonicalize().expect("path");
        assert!(Mounted::on(Path::new("/")).expect("table").0.is_some());
        assert!(Mounted::on(&path).expect("table").0.is_none());
    }

    #[test]
    fn the_topmost_may_be_the_oldest() {
        let line = |line: &str| Mounted::parse(line.as_bytes()).expect("a line");
        let stack = [
            line("30 31 0:40 / /m rw - fuse.dnpipes memory: rw"),
            line("31 20 0:41 / /m rw - fuse.dnpipes memory: rw"),
        ];
        assert_eq!(top(&stack).map(|top| top.number), Some(30));
        let root = [line("1 1 0:2 / / rw - rootfs rootfs rw")];
        assert_eq!(top(&root).map(|top| top.number), Some(1));
    }

    #[test]
    fn an_open_file_tells_the_number_of_its_mount() {
        let root = fs::File::open("/").expect("the root");
        let top = Mounted::on(Path::new("/")).expect("table").0;
        let number = number_of(root.as_fd()).expect("a number");
        assert_eq!(top.map(|top| top.number), Some(number));
    }
}
