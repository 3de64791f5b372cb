//! File systems that do next to nothing: what a FUSE request costs whatever a daemon does.
//!
//! In the empty one a write is taken and forgotten. Of two that belong together a write to one is appended to a file, and
//! once it is on the disk, a thread wakes who reads the other.

use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;
use std::sync::mpsc::{self, Sender};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, UNIX_EPOCH};

use fuser::{
    BackgroundSession, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation,
    INodeNo, InitFlags, KernelConfig, LockOwner, MountOption, OpenFlags, ReplyAttr, ReplyData,
    ReplyEntry, ReplyOpen, ReplyWrite, Request, WriteFlags,
};

use super::{DEADLINE, Result, at, await_signal, block_signals, detach};

/// What becomes of a write.
enum Bare {
    /// Nothing.
    Empty,
    /// It goes to the disk, and then to who wakes the reader.
    Near(Mutex<File>, Sender<Vec<u8>>),
    /// There are none here: reads wait, for who wakes them.
    Far(Sender<ReplyData>),
}

const OPEN_FLAGS: FopenFlags = FopenFlags::FOPEN_DIRECT_IO
    .union(FopenFlags::FOPEN_NONSEEKABLE)
    .union(FopenFlags::FOPEN_STREAM)
    .union(FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES);

fn attr(ino: INodeNo) -> FileAttr {
    let (kind, perm) = match ino {
        INodeNo::ROOT => (FileType::Directory, 0o755),
        _ => (FileType::RegularFile, 0o644),
    };
    FileAttr {
        ino,
        size: 0,
        blocks: 0,
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind,
        perm,
        nlink: 1,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}

impl Filesystem for Bare {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> io::Result<()> {
        config
            .add_capabilities(InitFlags::FUSE_ATOMIC_O_TRUNC)
            .map_err(|missing| io::Error::other(format!("the kernel lacks {missing:?}")))
    }

    /// Every name is there, so that nothing needs to be created.
    fn lookup(&self, _req: &Request, _parent: INodeNo, _name: &OsStr, reply: ReplyEntry) {
        reply.entry(&Duration::ZERO, &attr(INodeNo(2)), Generation(0));
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&Duration::ZERO, &attr(ino));
    }

    fn open(&self, _req: &Request, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(0), OPEN_FLAGS);
    }

    fn read(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _offset: u64,
        _size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        match self {
            // Who wakes it is there as long as the mount.
            Bare::Far(readers) => drop(readers.send(reply)),
            _ => reply.error(Errno::EINVAL),
        }
    }

    fn write(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let taken = match self {
            Bare::Empty => Ok(()),
            Bare::Near(file, waker) => {
                let mut file = file.lock().unwrap_or_else(PoisonError::into_inner);
                let written = file.write_all(data).and_then(|()| file.sync_data());
                written.and_then(|()| waker.send(data.to_vec()).map_err(io::Error::other))
            }
            Bare::Far(_) => Err(io::ErrorKind::Unsupported.into()),
        };
        match (taken, u32::try_from(data.len())) {
            (Ok(()), Ok(written)) => reply.written(written),
            (Err(error), _) => reply.error(error.into()),
            (_, Err(_)) => reply.error(Errno::EINVAL),
        }
    }
}

fn mount(bare: Bare, mountpoint: &Path) -> Result<BackgroundSession> {
    let mut config = fuser::Config::default();
    config.n_threads = Some(4);
    config.mount_options = vec![MountOption::FSName("noop".into())];
    at(mountpoint, fuser::spawn_mount(bare, mountpoint, &config))
}

/// Serves the empty file system until SIGTERM.
pub(super) fn serve(mountpoint: &Path) -> Result<()> {
    let set = block_signals();
    let session = mount(Bare::Empty, mountpoint)?;
    while !await_signal(&set, DEADLINE) {}
    session.umount_and_join()?;
    Ok(())
}

/// Serves one whose writes go to `file` and wake the reader of another, until SIGTERM.
pub(super) fn serve_two(near: &Path, far: &Path, file: &Path) -> Result<()> {
    let set = block_signals();
    let (waker, written) = mpsc::channel::<Vec<u8>>();
    let (reader, readers) = mpsc::channel::<ReplyData>();
    let options = OpenOptions::new().append(true).create(true).clone();
    let file = at(file, options.open(file))?;
    let _far = mount(Bare::Far(reader), far)?;
    // Who waits for the mounts looks at the near one.
    let session = mount(Bare::Near(Mutex::new(file), waker), near)?;
    thread::spawn(move || {
        for (line, reader) in written.iter().zip(readers) {
            reader.data(&line);
        }
    });
    while !await_signal(&set, DEADLINE) {}
    session.umount_and_join()?;
    // Somebody reads there until this process ends.
    detach(far);
    Ok(())
}
