//! FUSE operations, each a few lines: what they do stands in [`super::files`].

use std::ffi::OsStr;
use std::future::Future;
use std::io;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use fuser::{
    BsdFileFlags, CopyFileRangeFlags, Errno, FileHandle, FileType, Filesystem, FopenFlags,
    Generation, INodeNo, InitFlags, IoctlFlags, KernelConfig, LockOwner, OpenAccMode, OpenFlags,
    PollEvents, PollFlags, PollNotifier, RenameFlags, ReplyAttr, ReplyCreate, ReplyData,
    ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyLseek, ReplyOpen,
    ReplyPoll, ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};
use scopeguard::ScopeGuard;
use tokio::runtime::Handle;

use super::errno;
use super::files::{Files, OpenFile};
use super::interrupt::Interrupts;
use super::pump::Pump;
use crate::error::{Error, Kind, Result};

/// Nothing is cached by the kernel: changes made elsewhere show at once.
const TTL: Duration = Duration::ZERO;

/// How long what a look-up told of a remote pipe holds: for the open that follows, which would ask again, and for
/// the next ones of a loop.
const REMOTE_TTL: Duration = Duration::from_millis(10);

/// What was interrupted is waited for so long, because its result is the truth: a push may have arrived, and of many
/// calls programs do not expect an EINTR (stat(2) has none). Then it is EINTR. Reads and polls have no such time.
const GRACE: Duration = Duration::from_millis(50);

/// Why these: see "Opening" in the README's design notes.
const OPEN: FopenFlags = FopenFlags::FOPEN_DIRECT_IO
    .union(FopenFlags::FOPEN_NONSEEKABLE)
    .union(FopenFlags::FOPEN_STREAM)
    .union(FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES);

/// What libfuse gives for an inode that readdir need not know (FUSE_UNKNOWN_INO).
const UNKNOWN_INODE: INodeNo = INodeNo(0xffff_ffff);

pub(super) struct Adapter {
    pub(super) files: Arc<Files>,
    pub(super) interrupts: Arc<Interrupts>,
    pub(super) runtime: Handle,
    /// Runs the runtime, where the thread that reads requests does.
    pub(super) pump: Option<Arc<Pump>>,
    /// What to do when the mount has ended.
    pub(super) ended: Option<Box<dyn FnOnce() + Send + Sync>>,
}

impl Adapter {
    /// Runs `work` and replies. What is ready at once is answered on this thread; the rest is parked on
    /// the runtime, where a signal to the caller ends it after `grace`. What asks a remote backend is
    /// parked at once, as it is never ready.
    fn answer<T: Send + 'static>(
        &self,
        request: &Request,
        grace: Duration,
        work: impl Future<Output = Result<T>> + Send + 'static,
        reply: impl FnOnce(Result<T>) + Send + 'static,
    ) {
        let work = Box::pin(work);
        if self.files.is_remote() {
            return self.park(request.unique().0, grace, work, reply);
        }
        self.answer_here(request, grace, work, reply);
    }

    /// The same for what needs no backend, as a rule.
    fn answer_here<T: Send + 'static>(
        &self,
        request: &Request,
        grace: Duration,
        mut work: Pin<Box<impl Future<Output = Result<T>> + Send + 'static>>,
        reply: impl FnOnce(Result<T>) + Send + 'static,
    ) {
        let _context = self.runtime.enter();
        let mut context = Context::from_waker(Waker::noop());
        if let Poll::Ready(result) = work.as_mut().poll(&mut context) {
            return reply(result);
        }
        self.park(request.unique().0, grace, work, reply);
    }

    fn park<T: Send + 'static>(
        &self,
        unique: u64,
        grace: Duration,
        mut work: Pin<Box<impl Future<Output = Result<T>> + Send + 'static>>,
        reply: impl FnOnce(Result<T>) + Send + 'static,
    ) {
        let mut parked = self.interrupts.park(unique);
        let work = async move {
            let finished = tokio::select! {
                biased;
                result = &mut work => Some(result),
                () = parked.interrupted() => None,
            };
            let result = match finished {
                Some(result) => result,
                None if grace.is_zero() => Err(interrupted()),
                None => tokio::time::timeout(grace, work)
                    .await
                    .unwrap_or_else(|_| Err(interrupted())),
            };
            reply(result);
        };
        match &self.pump {
            Some(pump) => pump.begin(work),
            None => drop(self.runtime.spawn(work)),
        }
    }

    /// Runs `work` on an open file, which has at hand what it needs, as a rule.
    fn with_file<T: Send + 'static, F>(
        &self,
        request: &Request,
        handle: FileHandle,
        grace: Duration,
        work: impl FnOnce(Arc<OpenFile>) -> F,
        reply: impl FnOnce(Result<T>) + Send + 'static,
    ) where
        F: Future<Output = Result<T>> + Send + 'static,
    {
        match self.files.file(handle.0) {
            Ok(file) => self.answer_here(request, grace, Box::pin(work(file)), reply),
            Err(error) => reply(Err(error)),
        }
    }
}

fn interrupted() -> Error {
    Error::new(Kind::Interrupted, "interrupted by a signal")
}

macro_rules! empty_reply {
    ($reply:ident, $operation:literal) => {
        move |result| match result {
            Ok(()) => $reply.ok(),
            Err(error) => $reply.error(errno::answer($operation, &error)),
        }
    };
}

macro_rules! entry_reply {
    ($reply:ident, $operation:literal) => {
        move |result| match result {
            Ok(attr) => $reply.entry(&TTL, &attr, Generation(0)),
            Err(error) => $reply.error(errno::answer($operation, &error)),
        }
    };
}

impl Filesystem for Adapter {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // Without it the kernel sends O_TRUNC as a truncation, and `echo msg > topic` would reset.
        config
            .add_capabilities(InitFlags::FUSE_ATOMIC_O_TRUNC)
            .map_err(|_| io::Error::other("the kernel's FUSE cannot open with O_TRUNC at once"))?;
        let listing = InitFlags::FUSE_DO_READDIRPLUS | InitFlags::FUSE_READDIRPLUS_AUTO;
        if config.add_capabilities(listing).is_err() {
            log::debug!("the kernel lists without attributes");
        }
        if let Err(most) = config.set_max_write(1 << 20) {
            log::debug!("requests are at most {most} bytes");
        }
        Ok(())
    }

    fn destroy(&mut self) {
        if let Some(ended) = self.ended.take() {
            ended();
        }
    }

    fn lookup(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if parent != INodeNo::ROOT {
            return reply.error(Errno::ENOTDIR);
        }
        let (files, name) = (Arc::clone(&self.files), name.to_owned());
        let work = async move { files.look_up(&name).await };
        let ttl = match self.files.is_remote() {
            true => REMOTE_TTL,
            false => TTL,
        };
        self.answer(request, GRACE, work, move |result| match result {
            Ok(attr) => reply.entry(&ttl, &attr, Generation(0)),
            Err(error) => reply.error(errno::answer("lookup", &error)),
        });
    }

    fn forget(&self, _request: &Request, inode: INodeNo, count: u64) {
        self.files.forget(inode.0, count);
    }

    fn getattr(
        &self,
        request: &Request,
        inode: INodeNo,
        _handle: Option<FileHandle>,
        reply: ReplyAttr,
    ) {
        let files = Arc::clone(&self.files);
        let is_remote = files.is_remote();
        let work = async move { files.attr(inode.0).await };
        let reply = move |result| match result {
            Ok(attr) => reply.attr(&TTL, &attr),
            Err(error) => reply.error(errno::answer_by_inode("stat", &error, is_remote)),
        };
        match inode {
            INodeNo::ROOT => self.answer_here(request, GRACE, Box::pin(work), reply),
            _ => self.answer(request, GRACE, work, reply),
        }
    }

    fn setattr(
        &self,
        request: &Request,
        inode: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _handle: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        if mode.is_some() || uid.is_some() || gid.is_some() {
            return reply.error(Errno::EPERM);
        }
        // Setting times is accepted without effect: `touch old` is a no-op.
        let files = Arc::clone(&self.files);
        let work = async move {
            if let Some(size) = size {
                files.truncate(inode.0, size).await?;
            }
            files.attr(inode.0).await
        };
        self.answer(request, GRACE, work, move |result| match result {
            Ok(attr) => reply.attr(&TTL, &attr),
            Err(error) => reply.error(errno::answer("truncate", &error)),
        });
    }

    fn mknod(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        _rdev: u32,
        reply: ReplyEntry,
    ) {
        if parent != INodeNo::ROOT {
            return reply.error(Errno::ENOTDIR);
        }
        let (files, name) = (Arc::clone(&self.files), name.to_owned());
        let reply = entry_reply!(reply, "mknod");
        match mode & libc::S_IFMT {
            libc::S_IFREG | 0 => {
                let work = async move { files.create(&name, true).await };
                self.answer(request, GRACE, work, reply);
            }
            libc::S_IFIFO => {
                let work = async move { files.create_fifo(&name).await };
                self.answer(request, GRACE, work, reply);
            }
            _ => reply(Err(Error::new(
                Kind::NotAllowed,
                "a pipe is made as a regular file or as a FIFO",
            ))),
        }
    }

    fn mkdir(
        &self,
        _request: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _mode: u32,
        _umask: u32,
        reply: ReplyEntry,
    ) {
        reply.error(Errno::EPERM);
    }

    fn unlink(&self, request: &Request, _parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let (files, name) = (Arc::clone(&self.files), name.to_owned());
        let work = async move { files.remove(&name).await };
        self.answer(request, GRACE, work, empty_reply!(reply, "unlink"));
    }

    fn rmdir(&self, _request: &Request, _parent: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EPERM);
    }

    fn symlink(
        &self,
        _request: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _target: &Path,
        reply: ReplyEntry,
    ) {
        reply.error(Errno::EPERM);
    }

    fn rename(
        &self,
        _request: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _new_parent: INodeNo,
        _new_name: &OsStr,
        _flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::EPERM);
    }

    fn link(
        &self,
        _request: &Request,
        _inode: INodeNo,
        _new_parent: INodeNo,
        _new_name: &OsStr,
        reply: ReplyEntry,
    ) {
        reply.error(Errno::EPERM);
    }

    fn create(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        _mode: u32,
        _umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        if parent != INodeNo::ROOT {
            return reply.error(Errno::ENOTDIR);
        }
        let (files, name) = (Arc::clone(&self.files), name.to_owned());
        let work = async move {
            let attr = files.create(&name, flags & libc::O_EXCL != 0).await?;
            // Also where the caller stops waiting.
            let looked_up = scopeguard::guard((), |()| files.forget(attr.ino.0, 1));
            let handle = files.open_at_once(attr.ino.0, OpenFlags(flags)).await?;
            ScopeGuard::into_inner(looked_up);
            Ok((attr, handle))
        };
        self.answer(request, GRACE, work, move |result| match result {
            Ok((attr, handle)) => {
                reply.created(&TTL, &attr, Generation(0), FileHandle(handle), OPEN);
            }
            Err(error) => reply.error(errno::answer("create", &error)),
        });
    }

    fn open(&self, request: &Request, inode: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let files = Arc::clone(&self.files);
        let is_remote = files.is_remote();
        let work = async move { files.open(inode.0, flags).await };
        let reply = move |result| match result {
            Ok(handle) => reply.opened(FileHandle(handle), OPEN),
            Err(error) => reply.error(errno::answer_by_inode("open", &error, is_remote)),
        };
        match flags.acc_mode() {
            OpenAccMode::O_WRONLY => {
                self.answer_here(request, GRACE, Box::pin(work), reply);
            }
            _ => self.answer(request, GRACE, work, reply),
        }
    }

    fn read(
        &self,
        request: &Request,
        _inode: INodeNo,
        handle: FileHandle,
        _offset: u64,
        size: u32,
        flags: OpenFlags,
        owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        if owner.is_none() {
            // A page cache read (splice, sendfile); the caller falls back to read(2).
            return reply.error(Errno::EINVAL);
        }
        let nonblock = flags.0 & libc::O_NONBLOCK != 0;
        self.with_file(
            request,
            handle,
            Duration::ZERO,
            |file| async move { file.read(size as usize, nonblock).await },
            move |result| match result {
                Ok(bytes) => reply.data(&bytes),
                Err(error) => reply.error(errno::answer("read", &error)),
            },
        );
    }

    fn write(
        &self,
        request: &Request,
        _inode: INodeNo,
        handle: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let piece = Bytes::copy_from_slice(data);
        let owner = owner.map_or(0, |owner| owner.0);
        let file = match self.files.file(handle.0) {
            Ok(file) => file,
            Err(error) => return reply.error(errno::answer("write", &error)),
        };
        let work = async move { file.write(owner, offset, piece).await };
        let reply = move |result| match result {
            Ok(taken) => reply.written(taken as u32),
            Err(error) => reply.error(errno::answer("write", &error)),
        };
        self.answer(request, GRACE, work, reply);
    }

    fn flush(
        &self,
        request: &Request,
        _inode: INodeNo,
        handle: FileHandle,
        owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        self.with_file(
            request,
            handle,
            GRACE,
            |file| async move { file.close(owner.0).await },
            empty_reply!(reply, "close"),
        );
    }

    fn release(
        &self,
        request: &Request,
        _inode: INodeNo,
        handle: FileHandle,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        let files = Arc::clone(&self.files);
        let work = Box::pin(async move { files.release(handle.0).await });
        self.answer_here(request, Duration::MAX, work, empty_reply!(reply, "release"));
    }

    fn fsync(
        &self,
        request: &Request,
        inode: INodeNo,
        _handle: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        let files = Arc::clone(&self.files);
        let work = async move { files.sync(inode.0).await };
        self.answer(request, GRACE, work, empty_reply!(reply, "fsync"));
    }

    fn fsyncdir(
        &self,
        _request: &Request,
        _inode: INodeNo,
        _handle: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        // What a pipe's name stands for is as safe as the pipe.
        reply.ok();
    }

    fn opendir(&self, request: &Request, _inode: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        let files = Arc::clone(&self.files);
        let work = async move { files.open_directory().await };
        self.answer(request, GRACE, work, move |result| match result {
            Ok(handle) => reply.opened(FileHandle(handle), FopenFlags::empty()),
            Err(error) => reply.error(errno::answer("list", &error)),
        });
    }

    fn readdir(
        &self,
        request: &Request,
        _inode: INodeNo,
        handle: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let files = Arc::clone(&self.files);
        let work = async move { files.directory(handle.0, offset).await };
        self.answer(request, GRACE, work, move |list| {
            let pipes = match list {
                Ok(pipes) => pipes,
                Err(error) => return reply.error(errno::answer("list", &error)),
            };
            let dots = [".", ".."].map(|name| (INodeNo::ROOT, FileType::Directory, name));
            let names = pipes
                .iter()
                .map(|(name, _)| (UNKNOWN_INODE, FileType::RegularFile, name.as_str()));
            let entries = dots.into_iter().chain(names).zip(1..);
            for ((inode, kind, name), next) in entries.skip(offset as usize) {
                if reply.add(inode, next, kind, name) {
                    break;
                }
            }
            reply.ok();
        });
    }

    fn readdirplus(
        &self,
        request: &Request,
        _inode: INodeNo,
        handle: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        let files = Arc::clone(&self.files);
        let work = async move {
            let root = files.attr(INodeNo::ROOT.0).await?;
            Ok((root, files.directory(handle.0, offset).await?))
        };
        let files = Arc::clone(&self.files);
        self.answer(request, GRACE, work, move |found| {
            let (root, pipes) = match found {
                Ok(found) => found,
                Err(error) => return reply.error(errno::answer("list", &error)),
            };
            // The kernel counts no look-up for these two.
            for (name, next) in [".", ".."].into_iter().zip(1..).skip(offset as usize) {
                if reply.add(root.ino, next, name, &TTL, &root, Generation(0)) {
                    return reply.ok();
                }
            }
            for ((name, info), next) in pipes
                .iter()
                .zip(3..)
                .skip(offset.saturating_sub(2) as usize)
            {
                let attr = files.entry_attr(name, info);
                if reply.add(attr.ino, next, name.as_str(), &TTL, &attr, Generation(0)) {
                    files.forget(attr.ino.0, 1);
                    break;
                }
            }
            reply.ok();
        });
    }

    fn releasedir(
        &self,
        _request: &Request,
        _inode: INodeNo,
        handle: FileHandle,
        _flags: OpenFlags,
        reply: ReplyEmpty,
    ) {
        self.files.close_directory(handle.0);
        reply.ok();
    }

    fn statfs(&self, _request: &Request, _inode: INodeNo, reply: ReplyStatfs) {
        // Sizes that mean nothing, but make df(1) show the mount: 1 TiB, all free.
        let blocks = 1 << 28;
        reply.statfs(blocks, blocks, blocks, 1 << 20, 1 << 20, 4096, 255, 4096);
    }

    fn setxattr(
        &self,
        _request: &Request,
        _inode: INodeNo,
        _name: &OsStr,
        _value: &[u8],
        _flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::EOPNOTSUPP);
    }

    fn removexattr(&self, _request: &Request, _inode: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EOPNOTSUPP);
    }

    fn getxattr(
        &self,
        request: &Request,
        inode: INodeNo,
        name: &OsStr,
        size: u32,
        reply: ReplyXattr,
    ) {
        let (files, name) = (Arc::clone(&self.files), name.to_owned());
        let work = async move { files.xattr(inode.0, &name).await };
        self.answer(request, GRACE, work, move |result| match result {
            Ok(Some(value)) => sized(reply, value.as_bytes(), size),
            Ok(None) => reply.error(Errno::ENODATA),
            Err(error) => reply.error(errno::answer("getxattr", &error)),
        });
    }

    fn listxattr(&self, request: &Request, inode: INodeNo, size: u32, reply: ReplyXattr) {
        let files = Arc::clone(&self.files);
        let work = async move { files.xattrs(inode.0).await };
        self.answer(request, GRACE, work, move |result| match result {
            Ok(names) => sized(reply, &names, size),
            Err(error) => reply.error(errno::answer("listxattr", &error)),
        });
    }

    fn ioctl(
        &self,
        _request: &Request,
        _inode: INodeNo,
        _handle: FileHandle,
        _flags: IoctlFlags,
        _command: u32,
        _input: &[u8],
        _output_size: u32,
        reply: ReplyIoctl,
    ) {
        reply.error(Errno::ENOTTY);
    }

    fn poll(
        &self,
        request: &Request,
        _inode: INodeNo,
        handle: FileHandle,
        notifier: PollNotifier,
        events: PollEvents,
        flags: PollFlags,
        reply: ReplyPoll,
    ) {
        let file = match self.files.file(handle.0) {
            Ok(file) => file,
            Err(error) => return reply.error(errno::answer("poll", &error)),
        };
        let notify = flags.contains(PollFlags::FUSE_POLL_SCHEDULE_NOTIFY);
        let writable = PollEvents::POLLOUT | PollEvents::POLLWRNORM;
        let readable = PollEvents::POLLIN | PollEvents::POLLRDNORM;
        let ready = move |is_readable| match is_readable {
            true => events & (writable | readable),
            false => events & writable,
        };
        let (polled, runtime) = (Arc::clone(&file), self.runtime.clone());
        let work = async move {
            let Some(reader) = &polled.reader else {
                return Ok(false);
            };
            // Before it is looked at, so that whoever is interrupted meanwhile is told all the same.
            let seen = reader.looks_readable().1;
            if notify && !polled.polled.swap(true, Ordering::SeqCst) {
                runtime.spawn(notify_of_news(Arc::clone(&polled), notifier, seen));
            }
            Ok(reader.is_readable().await)
        };
        self.answer(request, Duration::ZERO, work, move |result| match result {
            Ok(is_readable) => reply.poll(ready(is_readable)),
            // The kernel looks once more when a signal comes, and an error is an event to it: POLLERR.
            Err(error) if error.kind() == Kind::Interrupted => {
                let reader = file.reader.as_ref();
                reply.poll(ready(
                    reader.is_some_and(|reader| reader.looks_readable().0),
                ));
            }
            Err(error) => reply.error(errno::answer("poll", &error)),
        });
    }

    fn fallocate(
        &self,
        _request: &Request,
        _inode: INodeNo,
        _handle: FileHandle,
        _offset: u64,
        _length: u64,
        _mode: i32,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::EOPNOTSUPP);
    }

    fn lseek(
        &self,
        _request: &Request,
        _inode: INodeNo,
        _handle: FileHandle,
        _offset: i64,
        _whence: i32,
        reply: ReplyLseek,
    ) {
        reply.error(Errno::ESPIPE);
    }

    fn copy_file_range(
        &self,
        _request: &Request,
        _inode_in: INodeNo,
        _handle_in: FileHandle,
        _offset_in: u64,
        _inode_out: INodeNo,
        _handle_out: FileHandle,
        _offset_out: u64,
        _length: u64,
        _flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        // The caller falls back to reading and writing.
        reply.error(Errno::EOPNOTSUPP);
    }
}

/// getxattr(2): a size of 0 asks for the size.
fn sized(reply: ReplyXattr, value: &[u8], size: u32) {
    if size == 0 {
        reply.size(value.len() as u32);
    } else if value.len() > size as usize {
        reply.error(Errno::ERANGE);
    } else {
        reply.data(value);
    }
}

async fn notify_of_news(file: Arc<OpenFile>, notifier: PollNotifier, seen: u64) {
    if let Some(reader) = &file.reader {
        reader.news(seen).await;
    }
    file.polled.store(false, Ordering::SeqCst);
    if let Err(error) = notifier.notify() {
        // The file was closed meanwhile.
        log::debug!("telling a poller: {error}");
    }
}
