//! The small file beside the database by which processes share it: who may write, and who is told.
//!
//! - **Turns**: SQLite's own lock lets one writer in at a time, but nobody queues for it: a process that
//!   pushes all the time starves the others. So whoever finds it taken queues for the turn (a byte-range
//!   lock, fcntl(2), of the open file description), and nobody overtakes while somebody has the turn. How many
//!   queue stands in shared memory, so that nobody has to ask for the lock while none does.
//! - **Telling**: after a commit the writer puts a new number into the pipe's slot, and inotify(7) wakes
//!   the other processes. Watching the write-ahead log instead would not do: its event comes before the
//!   commit is visible.
//!   What was pushed is shown beside that, if it is small ([`super::recent`]).
//! - **Resets**: counted in shared memory behind the slots, so that a reader sees at once, without a
//!   system call, that what it holds may have been dropped. The number is odd from before the commit until
//!   after it. A process that dies in between leaves it odd; then readers look each time, until somebody
//!   who may write makes it even.
//! - **Presence**: each process keeps a lock while it has the file open. Who opens it and finds nobody else
//!   takes back what processes that died have left in the counts, and what was shown.

use std::fs::{File, Metadata, Permissions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use inotify::{Inotify, WatchMask};
use tokio::io::unix::AsyncFd;
use tokio::sync::Notify;
use tokio::sync::futures::Notified;
use tokio::time::Instant;

use super::chunk::Row;
use super::presence::FileId;
use super::recent::{self, Cell};
use super::shared::{LISTENERS, QUEUED, RESETS, SLOT, SLOTS, Shared};
use crate::error::{Error, Kind, Result};

/// What rings when a pipe is made; no pipe has this id.
pub(super) const NEW_PIPE: u64 = 0;

/// The locks' bytes lie far behind the numbers.
const TURN: i64 = 1 << 20;
const PRESENCE: i64 = TURN + 1;

/// How long another process may be looking whether it is alone.
const LOOKING: Duration = Duration::from_secs(5);

/// How often to look without having been told, where inotify is not to be had.
const POLL: Duration = Duration::from_millis(50);

pub(super) struct Bell {
    file: File,
    shared: Shared,
    path: PathBuf,
    file_id: FileId,
    /// Whether the file is not there for others any more: then nothing that they tell is seen here.
    lost: AtomicBool,
    slots: [Notify; SLOTS],
    /// How many wait in this process; while nobody does, nobody needs to listen.
    waiters: AtomicUsize,
    wanted: Notify,
    /// The numbers that the waiters of this process have been told of.
    told: Mutex<[u64; SLOTS]>,
    /// Numbers of this process's own: a random start, then counting.
    number: AtomicU64,
}

/// Makes the file where there is none, for those who may write to the database. One that is there belongs to whoever
/// made it: whoever may write to the folder could have put anything there.
fn make(path: &Path, database: &Path) -> io::Result<()> {
    let made = File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path);
    let file = match made {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(()),
        made => made?,
    };
    let model = std::fs::symlink_metadata(database)?;
    if !model.is_file() {
        return Ok(());
    }
    // SAFETY: it has no preconditions.
    let is_root = unsafe { libc::geteuid() } == 0;
    let owner = is_root.then_some(model.uid());
    let has_group = fchown(&file, owner, Some(model.gid())).is_ok();
    file.set_permissions(permissions(&model, has_group))
}

/// Those of the database, for a file that has its group or another one: that is not to come in for it.
fn permissions(database: &Metadata, has_group: bool) -> Permissions {
    let bits = if has_group { 0o666 } else { 0o606 };
    Permissions::from_mode(database.mode() & bits)
}

/// Whether the file is of somebody who may write to the database: whoever shortens it ends all processes that have it in
/// memory.
fn is_of_the_same(database: &Metadata, bell: &Metadata) -> bool {
    // SAFETY: it has no preconditions.
    let own = unsafe { libc::geteuid() };
    let is_shared = database.mode() & 0o020 != 0 && bell.gid() == database.gid();
    [0, own, database.uid()].contains(&bell.uid()) || is_shared || database.mode() & 0o002 != 0
}

/// Rests between two tries: short ones first, for what is mostly free at once.
pub(super) struct Pause(Duration);

impl Default for Pause {
    fn default() -> Self {
        Pause(Duration::from_micros(20))
    }
}

impl Pause {
    pub(super) fn rest(&mut self) {
        std::thread::sleep(self.0);
        self.0 = (self.0 * 2).min(Duration::from_millis(1));
    }
}

/// Somebody who waits for a pipe, until it is dropped.
pub(super) struct Waiter {
    bell: Arc<Bell>,
    slot: usize,
}

impl Waiter {
    /// Rings at the next change; take it before looking, so that nothing is missed.
    pub(super) fn rung(&self) -> Notified<'_> {
        self.bell.slots[self.slot].notified()
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        self.bell.waiters.fetch_sub(1, Ordering::SeqCst);
        let listeners = self.bell.shared.number(LISTENERS);
        listeners.fetch_sub(1, Ordering::SeqCst);
    }
}

/// The turn, until it is dropped.
pub(super) struct Turn<'a>(Place<'a>);

/// A place in the queue for the turn, until it is dropped.
struct Place<'a>(&'a Bell);

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let queued = self.0.shared.number(QUEUED);
        queued.fetch_sub(1, Ordering::SeqCst);
    }
}

/// A reset, until it is dropped: with the number that it has made odd.
pub(super) struct Resetting<'a>(&'a Bell, u64);

impl Drop for Resetting<'_> {
    fn drop(&mut self) {
        let Resetting(bell, number) = *self;
        let (order, failed) = (Ordering::SeqCst, Ordering::Relaxed);
        // Fails where the next one has begun already: that one ends it.
        let resets = bell.shared.number(RESETS);
        resets
            .compare_exchange(number, number + 1, order, failed)
            .ok();
    }
}

impl Bell {
    /// The bell of a database.
    ///
    /// # Errors
    /// `Denied`, or what else the file system says.
    pub(super) fn of(database: &Path) -> Result<Self> {
        let path = super::file::beside(database, "-bell");
        let context = || format!("making {}", path.display());
        make(&path, database).map_err(|error| Error::io(context(), error))?;
        let models = std::fs::metadata(database).and_then(|database| {
            let bell = std::fs::symlink_metadata(&path)?;
            Ok((database, bell))
        });
        let (database, bell) = models.map_err(|error| Error::io(context(), error))?;
        if !is_of_the_same(&database, &bell) {
            let why = format!("{} belongs to a stranger", path.display());
            return Err(Error::new(Kind::Denied, why));
        }
        let bell = Bell::open(path)?;
        bell.follow(&database)?;
        Ok(bell)
    }

    /// Gives it the group and the mode of the database, as far as this user may, and takes it from all who may not use that any
    /// more: it tells what was pushed.
    fn follow(&self, database: &Metadata) -> Result<()> {
        let context = || format!("{} is open to more than the database", self.path.display());
        let told = self
            .file
            .metadata()
            .map_err(|error| Error::io(context(), error))?;
        let has_group =
            told.gid() == database.gid() || fchown(&self.file, None, Some(database.gid())).is_ok();
        let wanted = permissions(database, has_group);
        let bits = told.mode() & 0o777;
        if bits == wanted.mode() {
            return Ok(());
        }
        match self.file.set_permissions(wanted.clone()) {
            Err(error) if bits & !wanted.mode() != 0 => {
                let why = format!(
                    "{}; its owner or root can give it the same group and mode",
                    context()
                );
                Err(Error::io(why, error))
            }
            _ => Ok(()),
        }
    }

    fn open(path: PathBuf) -> Result<Self> {
        let context = || format!("opening {}", path.display());
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            // Whoever may write to the folder could have it lead elsewhere.
            .custom_flags(libc::O_NOFOLLOW)
            .open(&path)
            .map_err(|error| Error::io(context(), error))?;
        let told = file
            .metadata()
            .map_err(|error| Error::io(context(), error))?;
        if !told.is_file() {
            return Err(Error::new(
                Kind::InvalidInput,
                format!("{}: not a file", context()),
            ));
        }
        let file_id = FileId::of(&path, &told);
        let mut start = [0; SLOT];
        getrandom::fill(&mut start)
            .map_err(|error| Error::io(context(), io::Error::other(error.to_string())))?;
        let shared = Shared::map(&file).map_err(|error| Error::io(context(), error))?;
        let bell = Bell {
            file,
            shared,
            path,
            file_id,
            lost: AtomicBool::new(false),
            slots: std::array::from_fn(|_| Notify::new()),
            waiters: AtomicUsize::new(0),
            wanted: Notify::new(),
            told: Mutex::new([0; SLOTS]),
            number: AtomicU64::new(u64::from_ne_bytes(start)),
        };
        bell.show_presence()?;
        bell.changed();
        Ok(bell)
    }

    /// Somebody who waits for pipe `id`.
    pub(super) fn waiter(self: &Arc<Self>, id: u64) -> Waiter {
        // Before the waiter looks: whoever commits after its look sees it, and rings.
        self.shared.number(LISTENERS).fetch_add(1, Ordering::SeqCst);
        if self.waiters.fetch_add(1, Ordering::SeqCst) == 0 {
            self.wanted.notify_one();
        }
        Waiter {
            bell: Arc::clone(self),
            slot: id as usize % SLOTS,
        }
    }

    /// Whether others use the same file still. Once they do not, it counts as lost for ever: nobody knows what was told
    /// meanwhile.
    ///
    /// # Errors
    /// `Io` where they do not.
    pub(super) fn check(&self) -> Result<()> {
        let found = self.file_id.check();
        if let Err(error) = &found
            && !self.lost.swap(true, Ordering::Relaxed)
        {
            log::warn!("{error}; until then readers wake late, and nothing can be changed");
        }
        match self.lost.load(Ordering::Relaxed) {
            true => found.and_then(|()| {
                let path = self.path.display();
                let why = format!("{path} was away while it was open; mount the store anew");
                Err(Error::new(Kind::Io, why))
            }),
            false => Ok(()),
        }
    }

    /// A number that another reset or removal changes before it is committed; `None` while one may be under
    /// way, or nothing is heard of others.
    pub(super) fn resets(&self) -> Option<u64> {
        let number = self.shared.number(RESETS).load(Ordering::SeqCst);
        (number & 1 == 0 && !self.lost.load(Ordering::Relaxed)).then_some(number)
    }

    /// Tells all readers of all pipes, here and in other processes, that one is being reset. To be called in
    /// the transaction, and dropped after its end.
    pub(super) fn reset(&self) -> Resetting<'_> {
        let next = |number| number + 1 + (number & 1);
        let resets = self.shared.number(RESETS);
        let (Ok(before) | Err(before)) =
            resets.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| Some(next(n)));
        Resetting(self, next(before))
    }

    /// Ends what a process that died has left under way. To be called in a transaction: then nobody else is
    /// in one.
    pub(super) fn end_reset(&self) {
        let number = self.shared.number(RESETS).load(Ordering::SeqCst);
        if number & 1 == 1 {
            drop(Resetting(self, number));
        }
    }

    /// Where the newest push of pipe `id` is shown.
    pub(super) fn cell(&self, id: u64) -> Cell<'_> {
        Cell::of(id, self.shared.cells())
    }

    /// Tells everyone who waits for pipe `id`, here and in other processes, and shows what was pushed, if it is a small
    /// row.
    pub(super) fn ring(&self, id: u64, row: Option<&Row>) {
        let slot = id as usize % SLOTS;
        // The other half of what `waiter` does: the commit stands before this look.
        std::sync::atomic::fence(Ordering::SeqCst);
        if self.shared.number(LISTENERS).load(Ordering::SeqCst) == 0 {
            // A process that died while it waited leaves too great a number, never too small a one.
            return;
        }
        if let Some(row) = row {
            self.cell(id).show(row);
        }
        let number = self.number.fetch_add(1, Ordering::Relaxed);
        if let Err(error) = self
            .file
            .write_all_at(&number.to_ne_bytes(), (slot * SLOT) as u64)
        {
            // The others notice by their slow poll.
            log::warn!("ringing {}: {error}", self.path.display());
        }
        self.told.lock().unwrap_or_else(PoisonError::into_inner)[slot] = number;
        self.slots[slot].notify_waiters();
    }

    /// Tells everyone in this process.
    pub(super) fn ring_all(&self) {
        for slot in &self.slots {
            slot.notify_waiters();
        }
    }

    /// The slots that were rung by others since the last look.
    fn changed(&self) -> Vec<usize> {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let mut changed = Vec::new();
        for (slot, told) in told.iter_mut().enumerate() {
            let number = self.shared.number(slot).load(Ordering::Acquire);
            if *told != number {
                *told = number;
                changed.push(slot);
            }
        }
        changed
    }

    /// Wakes those whom other processes rang for.
    fn pass_on(&self) {
        for slot in self.changed() {
            self.slots[slot].notify_waiters();
        }
    }

    fn ear(&self) -> Option<AsyncFd<Inotify>> {
        let watch = |path: &Path| -> io::Result<AsyncFd<Inotify>> {
            let inotify = Inotify::init()?;
            inotify.watches().add(path, WatchMask::MODIFY)?;
            // SAFETY: the descriptor is the inotify object's own, open as long as that lives.
            unsafe { AsyncFd::register(inotify) }.map_err(io::Error::other)
        };
        match watch(&self.path) {
            Ok(ear) => Some(ear),
            Err(error) => {
                log::warn!(
                    "watching {}: {error}; looking every {POLL:?} instead",
                    self.path.display()
                );
                None
            }
        }
    }

    /// Takes a lock, if no other process has it. Threads of one process share it; they must queue before.
    fn try_lock(&self, byte: i64, kind: libc::c_int) -> Result<bool> {
        match self.lock(byte, libc::F_OFD_SETLK, kind) {
            Ok(_) => Ok(true),
            Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {
                Ok(false)
            }
            Err(error) => Err(Error::io(format!("locking {}", self.path.display()), error)),
        }
    }

    /// Shows that this process is there; if it is the only one, what others have left is taken back.
    fn show_presence(&self) -> Result<()> {
        if self.try_lock(PRESENCE, libc::F_WRLCK)? {
            for left in [LISTENERS, QUEUED] {
                self.shared.number(left).store(0, Ordering::SeqCst);
            }
            recent::clear(self.shared.cells());
        }
        let since = Instant::now();
        let mut pause = Pause::default();
        while !self.try_lock(PRESENCE, libc::F_RDLCK)? {
            if since.elapsed() > LOOKING {
                let why = format!("{}: another process keeps it locked", self.path.display());
                return Err(Error::new(Kind::Unreachable, why));
            }
            pause.rest();
        }
        Ok(())
    }

    /// Waits for the turn, which others have for a moment only; `None` when it is not wanted any more.
    pub(super) fn turn(&self, wanted: impl Fn() -> bool) -> Result<Option<Turn<'_>>> {
        let queued = self.shared.number(QUEUED);
        queued.fetch_add(1, Ordering::SeqCst);
        let place = Place(self);
        let mut pause = Pause::default();
        while wanted() {
            if self.try_lock(TURN, libc::F_WRLCK)? {
                return Ok(Some(Turn(place)));
            }
            pause.rest();
        }
        Ok(None)
    }

    /// Whether another process has the turn.
    pub(super) fn is_turn_taken(&self) -> bool {
        if self.shared.number(QUEUED).load(Ordering::SeqCst) == 0 {
            return false;
        }
        match self.lock(TURN, libc::F_OFD_GETLK, libc::F_WRLCK) {
            Ok(found) => found != libc::F_UNLCK,
            // Then queueing will say what is wrong.
            Err(_) => true,
        }
    }

    /// fcntl(2) on a byte; returns the kind of lock that the kernel wrote back.
    fn lock(&self, byte: i64, command: libc::c_int, kind: libc::c_int) -> io::Result<libc::c_int> {
        // SAFETY: `flock` is plain data, for which all zeros is a valid value.
        let mut range: libc::flock = unsafe { std::mem::zeroed() };
        range.l_type = kind as libc::c_short;
        range.l_whence = libc::SEEK_SET as libc::c_short;
        range.l_start = byte;
        range.l_len = 1;
        loop {
            // SAFETY: the descriptor is open as long as `self`, and `range` outlives the call.
            if unsafe { libc::fcntl(self.file.as_raw_fd(), command, &mut range) } == 0 {
                return Ok(libc::c_int::from(range.l_type));
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let bell = self.0.0;
        if let Err(error) = bell.lock(TURN, libc::F_OFD_SETLK, libc::F_UNLCK) {
            log::error!("unlocking {}: {error}", bell.path.display());
        }
    }
}

/// Passes on what other processes ring, while somebody waits, until it is aborted. Every `slow`, `look`
/// says whether something was committed of which nobody told: by a process that died before it rang.
pub(super) async fn listen(bell: Arc<Bell>, slow: Duration, mut look: impl FnMut() -> bool) {
    let mut ear = bell.ear();
    let mut looked = Instant::now();
    loop {
        while bell.waiters.load(Ordering::Acquire) == 0 {
            bell.wanted.notified().await;
        }
        bell.pass_on();
        if looked.elapsed() >= slow {
            looked = Instant::now();
            if look() {
                bell.ring_all();
            }
        }
        match &mut ear {
            None => tokio::time::sleep(POLL).await,
            Some(ear) => {
                if let Ok(Ok(mut ready)) = tokio::time::timeout(slow, ear.readable_mut()).await {
                    // What the events say is not needed, but nobody is woken by one that is like the last one that was not
                    // read (inotify(7)). So they are read first, and then it is looked what was rung.
                    let mut events = [0; 4096];
                    ready.get_inner_mut().read_events(&mut events).ok();
                    ready.clear_ready();
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_process_has_the_turn_and_the_others_see_it() {
        let folder = tempfile::tempdir().expect("folder");
        let path = folder.path().join("bell");
        let (one, two) = (
            Bell::open(path.clone()).expect("one"),
            Bell::open(path).expect("two"),
        );
        assert!(!two.is_turn_taken());
        let turn = one.turn(|| true).expect("a look").expect("the turn");
        assert!(two.is_turn_taken() && !one.is_turn_taken());
        assert!(!two.try_lock(TURN, libc::F_WRLCK).expect("a look"));
        assert!(two.turn(|| false).expect("a look").is_none());
        drop(turn);
        assert!(!two.is_turn_taken());
    }

    #[test]
    fn it_is_for_those_who_may_use_the_database() {
        let folder = tempfile::tempdir().expect("folder");
        let database = folder.path().join("pipes.db");
        std::fs::write(&database, "").expect("a file");
        for mode in [0o660, 0o640, 0o600, 0o666, 0o660] {
            let wanted = Permissions::from_mode(mode);
            std::fs::set_permissions(&database, wanted).expect("changed");
            let bell = Bell::of(&database).expect("a bell");
            let told = bell.file.metadata().expect("told");
            assert_eq!(told.mode() & 0o777, mode);
        }
    }

    #[test]
    fn counts_that_a_dead_process_has_left_are_taken_back_by_who_is_alone() {
        let folder = tempfile::tempdir().expect("folder");
        let path = folder.path().join("bell");
        let open = || Arc::new(Bell::open(path.clone()).expect("a bell"));
        let counts = |bell: &Bell| {
            [LISTENERS, QUEUED].map(|at| bell.shared.number(at).load(Ordering::SeqCst))
        };
        let (dead, alive) = (open(), open());
        let turn = dead.turn(|| true).expect("a look").expect("the turn");
        // A process that dies takes nothing back, but its locks end.
        std::mem::forget((dead.waiter(1), turn));
        dead.lock(TURN, libc::F_OFD_SETLK, libc::F_UNLCK)
            .and_then(|_| dead.lock(PRESENCE, libc::F_OFD_SETLK, libc::F_UNLCK))
            .expect("unlocked");
        assert_eq!(counts(&alive), [1, 1]);
        assert!(!alive.is_turn_taken(), "nobody has it");
        let late = open();
        assert_eq!(counts(&late), [1, 1], "another one is there");
        drop((alive, late));
        assert_eq!(counts(&open()), [0, 0]);
    }

    #[test]
    fn what_one_rings_the_other_sees_once() {
        let folder = tempfile::tempdir().expect("folder");
        let path = folder.path().join("bell");
        let (one, two) = (
            Bell::open(path.clone()).expect("one"),
            Bell::open(path).expect("two"),
        );
        let one = Arc::new(one);
        one.ring(5, None);
        assert!(two.changed().is_empty(), "nobody listens");
        let _waiter = one.waiter(9);
        one.ring(3, None);
        one.ring(3 + SLOTS as u64, None);
        one.ring(SLOTS as u64 - 1, None);
        assert!(one.changed().is_empty(), "it has told its own already");
        assert_eq!(two.changed(), [3, SLOTS - 1]);
        assert!(two.changed().is_empty());
    }

    #[test]
    fn a_reset_is_told_before_it_is_done_and_also_by_who_died_in_it() {
        let folder = tempfile::tempdir().expect("folder");
        let path = folder.path().join("bell");
        let (one, two) = (
            Bell::open(path.clone()).expect("one"),
            Bell::open(path).expect("two"),
        );
        let mut seen = vec![two.resets().expect("none is under way")];
        let mut changed = |resets: Option<u64>| {
            let resets = resets.expect("none is under way");
            assert!(!seen.contains(&resets));
            seen.push(resets);
        };
        let reset = one.reset();
        assert_eq!(two.resets(), None);
        drop(reset);
        changed(two.resets());
        // Committed, but not yet counted, when the next one begins.
        let first = one.reset();
        let second = two.reset();
        drop(first);
        assert_eq!(one.resets(), None);
        drop(second);
        changed(one.resets());
        // A process that dies drops nothing.
        std::mem::forget(one.reset());
        assert_eq!(two.resets(), None);
        drop(two.reset());
        changed(two.resets());
        std::mem::forget(one.reset());
        two.end_reset();
        changed(two.resets());
        let last = two.resets();
        two.end_reset();
        assert_eq!(two.resets(), last);
    }
}
