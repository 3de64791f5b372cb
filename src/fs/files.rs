//! What the mount's operations do, without the protocol around them: names to inodes, inodes to pipes,
//! open files to readers and writers.

use std::ffi::OsStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use fuser::{FileAttr, FileType, INodeNo, OpenAccMode, OpenFlags};

use super::directory::{Directory, List};
use super::handles::Handles;
use super::known::Known;
use super::queue::{Place, Queues};
use super::tree::{ROOT, Tree};
use crate::backend::{Backend, PipeInfo};
use crate::error::{Error, Kind, Result};
use crate::name::PipeName;
use crate::pipe::framing::framed_total;
use crate::pipe::reader::Reader;
use crate::pipe::silence::Silence;
use crate::pipe::writer::Writer;
use crate::selector::{Frame, Mode, Selector};

/// How the mount shows its pipes.
#[derive(Debug, Clone)]
pub struct Options {
    /// The read mode where no selector names one.
    pub mode: Mode,
    /// The framing where no selector names one.
    pub frame: Frame,
    /// Longest message, in bytes.
    pub max_message: usize,
    /// How long a write may wait, also for others; `None` is for ever.
    pub timeout: Option<Duration>,
    /// Whether `rm` removes a pipe for everyone.
    pub allow_delete: bool,
    /// Owner of the files.
    pub uid: u32,
    /// Group of the files.
    pub gid: u32,
    /// Permission bits of the files; the directory has the search bits that go with them.
    pub file_mode: u16,
}

/// What the kernel cuts a write(2) into is at least so long, in bytes: as many pages as a request has, each of which may be a
/// buffer of its own (writev(2)).
const LEAST_CUT: usize = 256;

/// The size of an empty pipe where reading means to wait, as nobody knows what will come. Tools that trust a size of 0 would
/// not read at all, and those that trust a smaller one would read less; wc(1) trusts none that is whole pages, as those of
/// the files in /sys are.
const UNKNOWN: u64 = 4096;

/// The mount's state.
pub(super) struct Files {
    backend: Arc<dyn Backend>,
    options: Options,
    tree: Tree,
    open: Handles<OpenFile>,
    directories: Handles<Directory>,
    known: Arc<Known>,
    queues: Queues,
    silence: Arc<Silence>,
    /// The mount ends: readers get end of file.
    ended: AtomicBool,
}

/// An open pipe.
pub(super) struct OpenFile {
    pub(super) reader: Option<Reader>,
    pub(super) writer: Option<Writer>,
    /// The writer's place among the writes to the pipe.
    place: Option<Place>,
    /// Where the last piece that was written ended, by the kernel's count, if it may have a later part.
    written_to: AtomicU64,
    /// Whether somebody is to be told when it becomes readable.
    pub(super) polled: AtomicBool,
}

impl OpenFile {
    /// See [`Reader::read`].
    pub(super) async fn read(&self, size: usize, nonblock: bool) -> Result<Vec<u8>> {
        match &self.reader {
            Some(reader) => reader.read(size, nonblock).await,
            None => Err(Error::new(
                Kind::NotAllowed,
                "the file is not open for reading",
            )),
        }
    }

    /// See [`Writer::write`]. The kernel counts on within one write(2), so a piece that begins where the last one ended is a
    /// later part of it; with O_APPEND it counts on behind each, so there one that cannot have been cut tells.
    pub(super) async fn write(&self, owner: u64, offset: u64, piece: Bytes) -> Result<usize> {
        let (Some(writer), Some(place)) = (&self.writer, &self.place) else {
            return Err(Error::new(
                Kind::NotAllowed,
                "the file is not open for writing",
            ));
        };
        let end = match piece.len() {
            ..LEAST_CUT => 0,
            length => offset.saturating_add(length as u64),
        };
        let continued = self.written_to.swap(end, Ordering::Relaxed) == offset && offset > 0;
        let write = writer.write(owner, piece, continued);
        place.write(write, || writer.answers()).await
    }

    /// `owner` closes one of its descriptors.
    pub(super) async fn close(&self, owner: u64) -> Result<()> {
        match &self.writer {
            Some(writer) => writer.close(owner).await,
            None => Ok(()),
        }
    }
}

impl Files {
    pub(super) fn new(backend: Arc<dyn Backend>, options: Options) -> Self {
        Files {
            known: Arc::new(Known::new(Arc::clone(&backend))),
            backend,
            queues: Queues::new(options.timeout),
            options,
            tree: Tree::default(),
            open: Handles::default(),
            directories: Handles::default(),
            silence: Arc::default(),
            ended: AtomicBool::new(false),
        }
    }

    /// The attributes of the file `name`, counting one look-up.
    pub(super) async fn look_up(&self, name: &OsStr) -> Result<FileAttr> {
        let selector = parse(name)?;
        let info = self.known.info(&selector.pipe).await?;
        let number = self.tree.look_up(&selector);
        Ok(self.file_attr(number, &selector, &info))
    }

    pub(super) fn forget(&self, inode: u64, count: u64) {
        self.tree.forget(inode, count);
    }

    pub(super) async fn attr(&self, inode: u64) -> Result<FileAttr> {
        if inode == ROOT {
            return Ok(self.root_attr());
        }
        let selector = self.selector(inode)?;
        let info = self.known.info(&selector.pipe).await?;
        Ok(self.file_attr(inode, &selector, &info))
    }

    fn selector(&self, inode: u64) -> Result<Selector> {
        self.tree
            .selector(inode)
            .ok_or_else(|| Error::new(Kind::NotFound, format!("there is no inode {inode}")))
    }

    fn file_attr(&self, inode: u64, selector: &Selector, info: &PipeInfo) -> FileAttr {
        let (mode, frame) = self.effective(selector);
        let stored = framed_total(frame, info.count, info.bytes.unwrap_or(0));
        let size = match stored {
            0 if mode != Mode::Snapshot => UNKNOWN,
            stored => stored,
        };
        self.node_attr(inode, FileType::RegularFile, size, info.modified)
    }

    fn root_attr(&self) -> FileAttr {
        let newest = self.known.newest();
        let mut attr = self.node_attr(ROOT, FileType::Directory, 0, newest.unwrap_or(UNIX_EPOCH));
        // Who may read or write pipes may look names up.
        attr.perm |= (attr.perm & 0o444) >> 2 | (attr.perm & 0o222) >> 1;
        attr.nlink = 2;
        attr
    }

    fn node_attr(&self, inode: u64, kind: FileType, size: u64, modified: SystemTime) -> FileAttr {
        FileAttr {
            ino: INodeNo(inode),
            size,
            // As many as the size needs: with fewer, cp(1) looks for holes.
            blocks: size.div_ceil(512),
            atime: modified,
            mtime: modified,
            ctime: modified,
            crtime: modified,
            kind,
            perm: self.options.file_mode,
            nlink: 1,
            uid: self.options.uid,
            gid: self.options.gid,
            rdev: 0,
            blksize: 128 * 1024,
            flags: 0,
        }
    }

    fn effective(&self, selector: &Selector) -> (Mode, Frame) {
        (
            selector.options.mode.unwrap_or(self.options.mode),
            selector.options.frame.unwrap_or(self.options.frame),
        )
    }

    /// Makes the pipe `name`, if it is not there yet; with `exclusive` that is an error. Counts one
    /// look-up.
    pub(super) async fn create(&self, name: &OsStr, exclusive: bool) -> Result<FileAttr> {
        let selector = parse_new(name)?;
        let created = match self.backend.create(&selector.pipe).await {
            // Whoever takes it for a lock must not be told that somebody else has it, nor that he has.
            Err(error) if error.kind() == Kind::AlreadyExists && exclusive => {
                return Err(Error::new(Kind::Io, error.to_string()));
            }
            Err(error) if error.kind() == Kind::AlreadyExists => false,
            created => created?,
        };
        if exclusive && !created {
            return Err(Error::new(
                Kind::AlreadyExists,
                format!("{} exists", selector.pipe),
            ));
        }
        let info = match created {
            true => self.known.made(&selector.pipe).await?,
            false => self.known.info(&selector.pipe).await?,
        };
        let number = self.tree.look_up(&selector);
        Ok(self.file_attr(number, &selector, &info))
    }

    /// Makes the pipe `name` for mkfifo(1). The kernel insists on being shown a FIFO, and would handle it
    /// alone; so it is shown one that it finds to be a pipe at the next look-up.
    pub(super) async fn create_fifo(&self, name: &OsStr) -> Result<FileAttr> {
        let created = self.create(name, true).await?;
        self.tree.forget(created.ino.0, 1);
        Ok(FileAttr {
            ino: INodeNo(self.tree.stranger()),
            kind: FileType::NamedPipe,
            ..created
        })
    }

    /// Opens the file and returns its handle. O_TRUNC, O_APPEND and O_CREAT have no effect here. Waits for writes that are
    /// stuck.
    pub(super) async fn open(&self, inode: u64, flags: OpenFlags) -> Result<u64> {
        if flags.acc_mode() == OpenAccMode::O_WRONLY && flags.0 & libc::O_NONBLOCK == 0 {
            let place = self.queues.place(&self.selector(inode)?.pipe, flags.0);
            place.wait(|| self.known.is_silent()).await?;
            return self.open_in(inode, flags, Some(place)).await;
        }
        self.open_at_once(inode, flags).await
    }

    /// The same, without waiting for writes.
    pub(super) async fn open_at_once(&self, inode: u64, flags: OpenFlags) -> Result<u64> {
        let place = match flags.acc_mode() {
            OpenAccMode::O_RDONLY => None,
            _ => Some(self.queues.place(&self.selector(inode)?.pipe, flags.0)),
        };
        self.open_in(inode, flags, place).await
    }

    async fn open_in(&self, inode: u64, flags: OpenFlags, place: Option<Place>) -> Result<u64> {
        let selector = self.selector(inode)?;
        let (mut mode, frame) = self.effective(&selector);
        let access = flags.acc_mode();
        if access == OpenAccMode::O_RDWR && selector.options.mode.is_none() {
            mode = Mode::Follow;
        }
        let reader = match access {
            OpenAccMode::O_WRONLY => None,
            OpenAccMode::O_RDONLY | OpenAccMode::O_RDWR => {
                let (backend, silence) = (&*self.backend, &self.silence);
                Some(Reader::open(backend, &selector.pipe, mode, frame, silence).await?)
            }
        };
        let writer = (access != OpenAccMode::O_RDONLY).then(|| {
            let backend = Arc::clone(&self.backend);
            Writer::new(backend, selector.pipe, frame, self.options.max_message)
        });
        let handle = self.open.add(OpenFile {
            reader,
            writer,
            place,
            written_to: AtomicU64::new(0),
            polled: AtomicBool::new(false),
        });
        // Looked at after the file is in the table, where `end` may have passed by already.
        if self.ended.load(Ordering::SeqCst) {
            self.end_readers();
        }
        Ok(handle)
    }

    pub(super) fn file(&self, handle: u64) -> Result<Arc<OpenFile>> {
        self.open.get(handle).ok_or_else(|| {
            Error::new(
                Kind::InvalidInput,
                format!("there is no open file {handle}"),
            )
        })
    }

    /// The last close of an open file: what is left of its lines is pushed.
    pub(super) async fn release(&self, handle: u64) -> Result<()> {
        let Some(file) = self.open.get(handle) else {
            return Ok(());
        };
        if let Some(reader) = &file.reader {
            reader.end();
        }
        let finished = match &file.writer {
            Some(writer) => writer.finish().await,
            None => Ok(()),
        };
        // Not before: the end of the mount waits for the lines of those that are there.
        self.open.remove(handle);
        finished
    }

    /// truncate(2) to `size`: to 0 is a reset.
    pub(super) async fn truncate(&self, inode: u64, size: u64) -> Result<()> {
        let selector = self.selector(inode)?;
        if size != 0 {
            return Err(Error::new(
                Kind::InvalidInput,
                format!(
                    "{}: a pipe is truncated to 0, which resets it, or not at all",
                    selector.pipe
                ),
            ));
        }
        self.backend.reset(&selector.pipe).await
    }

    /// Everything that was pushed is as durable as the backend can make it.
    pub(super) async fn sync(&self, inode: u64) -> Result<()> {
        let selector = self.selector(inode)?;
        self.backend.sync(&selector.pipe).await
    }

    pub(super) async fn remove(&self, name: &OsStr) -> Result<()> {
        let selector = parse(name)?;
        if !self.options.allow_delete {
            return Err(Error::new(
                Kind::NotAllowed,
                format!(
                    "removing {}: the mount is without --allow-delete",
                    selector.pipe
                ),
            ));
        }
        if selector != Selector::plain(selector.pipe.clone()) {
            return Err(Error::new(
                Kind::NotAllowed,
                format!("removing {}: name the pipe without options", selector.pipe),
            ));
        }
        self.backend.remove(&selector.pipe).await?;
        self.known.forget(&selector.pipe);
        Ok(())
    }

    pub(super) async fn open_directory(&self) -> Result<u64> {
        Ok(self.directories.add(Directory::open(&self.known).await?))
    }

    /// See [`Directory::list`].
    pub(super) async fn directory(&self, handle: u64, offset: u64) -> Result<List> {
        match self.directories.get(handle) {
            Some(directory) => directory.list(&self.known, offset).await,
            None => Ok(List::default()),
        }
    }

    pub(super) fn close_directory(&self, handle: u64) {
        self.directories.remove(handle);
    }

    /// The attributes of a directory's entry, counting one look-up.
    pub(super) fn entry_attr(&self, pipe: &PipeName, info: &PipeInfo) -> FileAttr {
        let selector = Selector::plain(pipe.clone());
        let number = self.tree.look_up(&selector);
        self.file_attr(number, &selector, info)
    }

    /// The value of an extended attribute; `None` where there is no such attribute.
    pub(super) async fn xattr(&self, inode: u64, name: &OsStr) -> Result<Option<String>> {
        let Some(name) = name
            .to_str()
            .and_then(|name| name.strip_prefix(XATTR_PREFIX))
        else {
            return Ok(None);
        };
        if inode == ROOT || !XATTRS.contains(&name) {
            return Ok(None);
        }
        let selector = self.selector(inode)?;
        let info = self.known.info(&selector.pipe).await?;
        Ok(self.attribute(name, &selector, &info))
    }

    fn attribute(&self, name: &str, selector: &Selector, info: &PipeInfo) -> Option<String> {
        match name {
            "count" => Some(info.count.to_string()),
            "bytes" => info.bytes.map(|bytes| bytes.to_string()),
            "first" => info.first.map(|first| first.to_string()),
            "last" => info.last.map(|last| last.to_string()),
            "backend" => Some(self.backend.caps().name.to_owned()),
            _ => Some(self.effective(selector).1.to_string()),
        }
    }

    /// The names of a file's extended attributes, each with its NUL.
    pub(super) async fn xattrs(&self, inode: u64) -> Result<Vec<u8>> {
        if inode == ROOT {
            return Ok(Vec::new());
        }
        let selector = self.selector(inode)?;
        let info = self.known.info(&selector.pipe).await?;
        let names = XATTRS
            .iter()
            .filter(|name| self.attribute(name, &selector, &info).is_some());
        let names: String = names
            .map(|name| format!("{XATTR_PREFIX}{name}\0"))
            .collect();
        Ok(names.into_bytes())
    }

    fn end_readers(&self) {
        for file in self.open.all() {
            if let Some(reader) = &file.reader {
                reader.end();
            }
        }
    }

    /// The mount ends: readers get end of file.
    pub(super) fn end(&self) {
        self.ended.store(true, Ordering::SeqCst);
        self.end_readers();
    }

    /// Pushes the lines that have no end yet, each within `patience`.
    pub(super) async fn finish(&self, patience: Duration) {
        let open = self.open.all();
        let finishing = open.iter().filter_map(|file| file.writer.as_ref());
        let finishing = finishing.map(async |writer| {
            let why = match tokio::time::timeout(patience, writer.finish()).await {
                Ok(Ok(())) => return,
                Ok(Err(error)) => error.to_string(),
                Err(_) => format!("it was not stored within {patience:?}"),
            };
            log::error!("the last line of an open file is given up: {why}");
        });
        futures_util::future::join_all(finishing).await;
    }

    /// Whether the backend is somewhere else, so that no call of it answers at once.
    pub(super) fn is_remote(&self) -> bool {
        self.backend.caps().remote
    }

    /// Whether any file is open.
    pub(super) fn in_use(&self) -> bool {
        !self.open.all().is_empty()
    }
}

const XATTR_PREFIX: &str = "user.dnpipes.";
const XATTRS: [&str; 6] = ["count", "bytes", "first", "last", "backend", "frame"];

/// The selector that a file name stands for.
fn parse(name: &OsStr) -> Result<Selector> {
    let broken = || Error::new(Kind::NotFound, format!("{name:?} is not UTF-8"));
    match name.to_str().ok_or_else(broken)?.parse::<Selector>() {
        // A name that cannot be is a name that is not there.
        Err(error) if error.kind() == Kind::InvalidName => {
            Err(Error::new(Kind::NotFound, error.to_string()))
        }
        other => other,
    }
}

/// The selector that a file name to be made stands for.
fn parse_new(name: &OsStr) -> Result<Selector> {
    let broken = || Error::new(Kind::InvalidName, format!("{name:?} is not UTF-8"));
    let parsed = name.to_str().ok_or_else(broken)?.parse::<Selector>();
    parsed.map_err(|error| Error::new(Kind::InvalidName, error.to_string()))
}
