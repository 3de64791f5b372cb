//! Real mounts for the tests: each makes and reaps its own daemons, folders and processes.

use std::fs;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// The program under test.
pub(crate) const DNPIPES: &str = env!("CARGO_BIN_EXE_dnpipes");

/// Debian's; a shim of another name would only start it later.
pub(crate) const PYTHON: &str = "/usr/bin/python3";

/// Long enough for a loaded machine; a test that needs it has failed.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

/// Waits until `condition` gives something, and panics after [`DEADLINE`].
pub(crate) fn wait_for<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(start.elapsed() < DEADLINE, "waited in vain for: {what}");
        thread::sleep(Duration::from_millis(2));
    }
}

/// A folder with a database of its own.
pub(crate) struct Store {
    folder: TempDir,
}

impl Store {
    pub(crate) fn new() -> Self {
        Store {
            folder: tempfile::tempdir().expect("a temporary folder"),
        }
    }

    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub(crate) fn database(&self) -> PathBuf {
        self.folder.path().join("pipes.db")
    }

    /// Its URL, with the default durability.
    pub(crate) fn url(&self) -> String {
        format!("sqlite:{}", self.database().display())
    }

    /// Its URL, with durability `process`, which spares the disk.
    pub(crate) fn fast_url(&self) -> String {
        format!("{}?durability=process", self.url())
    }

    /// Takes the right to write, as a process does that is stuck while it has it (see
    /// backend/sqlite/bell.rs). Given back when dropped.
    pub(crate) fn hold(&self) -> HeldStore {
        let bell = format!("{}-bell", self.database().display());
        let bell = fs::File::options()
            .read(true)
            .write(true)
            .open(bell)
            .expect("the store's bell");
        let held = HeldStore { bell };
        held.lock(PRESENCE, libc::F_RDLCK);
        let mut queued = [0; 8];
        // The file of a store that is being made is empty yet.
        let read = held.bell.read_at(&mut queued, QUEUED);
        read.expect("the bell is readable");
        let queued = u64::from_ne_bytes(queued) + 1;
        let written = held.bell.write_all_at(&queued.to_ne_bytes(), QUEUED);
        written.expect("the bell is writable");
        held.lock(TURN, libc::F_WRLCK);
        held
    }

    /// Runs a command of dnpipes on this store, without a mount.
    pub(crate) fn run(&self, args: &[&str]) -> Output {
        let mut command = Command::new(DNPIPES);
        command.args(args).env("DNPIPES_SOURCE", self.url());
        finish(command.stdin(Stdio::null()))
    }

    /// Runs a script with bash in the store's folder; `dnpipes` is the program, on this store.
    pub(crate) fn sh(&self, script: &str) -> Output {
        self.spawn(script).finish()
    }

    /// What such a script prints; it must succeed and print no error.
    pub(crate) fn out(&self, script: &str) -> String {
        text_of(script, self.sh(script), "")
    }

    /// Starts such a script.
    pub(crate) fn spawn(&self, script: &str) -> Running {
        let mut command = Command::new("bash");
        command
            .arg("-c")
            .arg(format!("dnpipes() {{ {DNPIPES:?} \"$@\"; }}\n{script}"))
            .env("DNPIPES_SOURCE", self.url())
            .current_dir(self.folder());
        Running::start(&mut command)
    }
}

/// The right to write to a store. That somebody has it or queues for it is still counted when it is given back:
/// the others may be counting, too.
pub(crate) struct HeldStore {
    bell: fs::File,
}

/// Places in the bell: the locks of who has the turn and of who is there, and the count of those who queue.
const TURN: i64 = 1 << 20;
const PRESENCE: i64 = TURN + 1;
const QUEUED: u64 = 514 * 8;

impl HeldStore {
    fn lock(&self, byte: i64, kind: libc::c_int) {
        // SAFETY: `flock` is plain data, for which all zeros is a valid value.
        let mut range: libc::flock = unsafe { std::mem::zeroed() };
        range.l_type = kind as libc::c_short;
        range.l_start = byte;
        range.l_len = 1;
        // SAFETY: the descriptor is open, and `range` outlives the call.
        let done = unsafe { libc::fcntl(self.bell.as_raw_fd(), libc::F_OFD_SETLKW, &range) };
        assert_eq!(done, 0, "{}", io::Error::last_os_error());
    }
}

impl Drop for HeldStore {
    fn drop(&mut self) {
        // A process that is just being started may have a copy of the descriptor for a moment.
        self.lock(TURN, libc::F_UNLCK);
    }
}

/// The output of a program that must have succeeded without a word of complaint.
fn text_of(program: &str, output: Output, log: &str) -> String {
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        output.status.success() && errors.is_empty(),
        "{program}: {}\n{errors}\nlog: {log}",
        output.status
    );
    String::from_utf8(output.stdout).expect("text")
}

/// What every Python program of the tests starts with: `why` gives a call's errno by name, or `ok`.
const PRELUDE: &str = "
import errno, os
def why(call, *args):
    try:
        call(*args)
    except OSError as error:
        return errno.errorcode[error.errno]
    return 'ok'
";

/// A mounted daemon; dropped, it is killed, unmounted and reaped.
pub(crate) struct Mount {
    daemon: Child,
    folder: TempDir,
    mountpoint: PathBuf,
}

impl Mount {
    /// Mounts `source` on a new folder.
    pub(crate) fn new(source: &str, flags: &[&str]) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mountpoint = folder.path().join("mnt");
        fs::create_dir(&mountpoint).expect("a mountpoint");
        Mount::start(&[DNPIPES], source, flags, folder, mountpoint)
    }

    /// Mounts by a program in front of dnpipes, as `unshare`.
    pub(crate) fn within(wrapper: &[&str], source: &str, flags: &[&str]) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mountpoint = folder.path().join("mnt");
        fs::create_dir(&mountpoint).expect("a mountpoint");
        let program = [wrapper, &[DNPIPES]].concat();
        Mount::start(&program, source, flags, folder, mountpoint)
    }

    /// Another daemon on the mountpoint of this one, which must have left it. Drop it before this one.
    pub(crate) fn again(&self, source: &str, flags: &[&str]) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        Mount::start(&[DNPIPES], source, flags, folder, self.mountpoint.clone())
    }

    /// Mounts a store of its own in memory.
    pub(crate) fn memory(flags: &[&str]) -> Self {
        Mount::new("memory:", flags)
    }

    fn start(
        program: &[&str],
        source: &str,
        flags: &[&str],
        folder: TempDir,
        mountpoint: PathBuf,
    ) -> Self {
        let log = fs::File::options()
            .create(true)
            .append(true)
            .open(folder.path().join("log"))
            .expect("a log");
        let mut daemon = Command::new(program[0]);
        with_usual_signals(&mut daemon);
        let daemon = daemon
            .args(&program[1..])
            .arg("mount")
            .args(flags)
            .arg(source)
            .arg(&mountpoint)
            .env("DNPIPES_LOG", "info")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("dnpipes starts");
        let mut mount = Mount {
            daemon,
            folder,
            mountpoint,
        };
        wait_for("the mount", || {
            if let Some(status) = mount.daemon.try_wait().expect("wait") {
                panic!("the daemon ended with {status}: {}", mount.log());
            }
            mount.is_live().then_some(())
        });
        mount
    }

    /// Whether the mountpoint answers as a mount.
    pub(crate) fn is_live(&self) -> bool {
        let device = |path: &Path| fs::metadata(path).map(|meta| meta.dev());
        match (device(&self.mountpoint), device(self.folder.path())) {
            (Ok(mount), Ok(folder)) => mount != folder,
            _ => false,
        }
    }

    /// The mountpoint.
    pub(crate) fn dir(&self) -> &Path {
        &self.mountpoint
    }

    /// A file in it.
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.mountpoint.join(name)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.daemon.id()
    }

    /// What the daemon's memory comes to, in KiB, by one of the words of proc(5): `VmRSS` now, `VmHWM` at the most.
    pub(crate) fn kib_of(&self, word: &str) -> u64 {
        let status = format!("/proc/{}/status", self.pid());
        let status = fs::read_to_string(status).expect("its status");
        let mut lines = status.lines();
        let line = lines.find_map(|line| line.strip_prefix(word)?.strip_prefix(':'));
        let size = line.expect("the word").trim().trim_end_matches(" kB");
        size.parse().expect("a number")
    }

    /// What the daemon has logged.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }

    /// Runs a script with bash, in the mountpoint.
    pub(crate) fn sh(&self, script: &str) -> Output {
        self.shell("bash", script)
    }

    /// Runs a script with a shell (`bash`, `dash`, `busybox sh`), in the mountpoint.
    pub(crate) fn shell(&self, shell: &str, script: &str) -> Output {
        let mut words = shell.split(' ');
        let mut command = Command::new(words.next().expect("a shell"));
        command
            .args(words)
            .arg("-c")
            .arg(script)
            .current_dir(&self.mountpoint);
        finish(command.stdin(Stdio::null()))
    }

    /// What a script prints; it must succeed and print no error.
    pub(crate) fn out(&self, script: &str) -> String {
        text_of(script, self.sh(script), &self.log())
    }

    /// What a Python program prints; it runs in the mountpoint and must succeed. It may be indented, and
    /// begins on a line of its own.
    pub(crate) fn python(&self, program: &str) -> String {
        text_of(program, self.spawn_python(program).finish(), &self.log())
    }

    /// Starts such a program.
    pub(crate) fn spawn_python(&self, program: &str) -> Running {
        let mut command = Command::new("python3");
        command
            .arg("-c")
            .arg(format!("{PRELUDE}if True:{program}"))
            .current_dir(&self.mountpoint);
        Running::start(&mut command)
    }

    /// Starts a process in the mountpoint, its output piped; reaped when dropped.
    pub(crate) fn spawn(&self, script: &str) -> Running {
        let mut command = Command::new("bash");
        command.arg("-c").arg(script).current_dir(&self.mountpoint);
        Running::start(&mut command)
    }

    /// What a pipe, or a selector of one, holds now.
    pub(crate) fn bytes(&self, pipe: &str) -> Vec<u8> {
        let mark = if pipe.contains('@') { ',' } else { '@' };
        fs::read(self.file(&format!("{pipe}{mark}snapshot"))).expect("a snapshot")
    }

    /// All messages of a pipe, as lines.
    pub(crate) fn lines(&self, pipe: &str) -> Vec<String> {
        let bytes = fs::read(self.file(&format!("{pipe}@snapshot,line"))).expect("a snapshot");
        let text = String::from_utf8(bytes).expect("text");
        text.lines().map(str::to_owned).collect()
    }

    /// Sends the daemon a signal.
    pub(crate) fn signal(&self, signal: i32) {
        // SAFETY: the daemon is our child and not yet reaped, so the number is its own.
        assert_eq!(unsafe { libc::kill(self.pid() as i32, signal) }, 0);
    }

    /// SIGTERM, and how the daemon ended.
    pub(crate) fn stop(&mut self) -> ExitStatus {
        self.signal(libc::SIGTERM);
        self.wait()
    }

    /// Waits for the daemon to end.
    pub(crate) fn wait(&mut self) -> ExitStatus {
        wait_for("the daemon's end", || self.daemon.try_wait().expect("wait"))
    }

    /// kill -9, and a new daemon on the same mountpoint.
    pub(crate) fn crash_and_restart(mut self, source: &str, flags: &[&str]) -> Mount {
        self.daemon.kill().expect("kill");
        self.daemon.wait().expect("wait");
        let folder = std::mem::replace(&mut self.folder, tempfile::tempdir().expect("folder"));
        let mountpoint = std::mem::replace(&mut self.mountpoint, self.folder.path().to_owned());
        Mount::start(&[DNPIPES], source, flags, folder, mountpoint)
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("{} has logged:\n{}", self.mountpoint.display(), self.log());
        }
        // A test that failed leaves it running; one that passed may have ended it already.
        if matches!(self.daemon.try_wait(), Ok(None)) {
            self.daemon.kill().ok();
            self.daemon.wait().ok();
        }
        Command::new("umount")
            .args(["-q", "-l"])
            .arg(&self.mountpoint)
            .stderr(Stdio::null())
            .status()
            .ok();
    }
}

/// The tests may run in the background of a shell, which has its children ignore some signals.
fn with_usual_signals(command: &mut Command) {
    let usual = || {
        for signal in [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT] {
            // SAFETY: a signal that exists, and no handler of ours.
            if unsafe { libc::signal(signal, libc::SIG_DFL) } == libc::SIG_ERR {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    };
    // SAFETY: between fork and exec it makes system calls only.
    unsafe { command.pre_exec(usual) };
}

/// A process with its output piped, in a process group of its own; killed and reaped when dropped.
pub(crate) struct Running {
    child: Child,
}

impl Running {
    pub(crate) fn start(command: &mut Command) -> Self {
        with_usual_signals(command);
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .spawn()
            .expect("the process starts");
        Running { child }
    }

    pub(crate) fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// Signals the process and what it has started.
    pub(crate) fn signal(&self, signal: i32) {
        // SAFETY: the group's leader is our child and not yet reaped.
        assert_eq!(unsafe { libc::kill(-self.pid(), signal) }, 0);
    }

    pub(crate) fn is_running(&mut self) -> bool {
        self.child.try_wait().expect("wait").is_none()
    }

    /// Waits until the process, or one that it started, is blocked in a request to the mount.
    pub(crate) fn wait_until_blocked(&mut self) {
        self.blocked();
    }

    /// Which process is blocked in a request to the mount, as soon as one is: this one, or one that it
    /// started.
    pub(crate) fn blocked(&mut self) -> Process {
        self.waiting("a blocked request", |pid| is_blocked_in_fuse(pid, &LONG))
    }

    /// Waits until the process, or one that it started, is about to open a file and has to wait for the mount.
    pub(crate) fn wait_until_opening(&mut self) {
        self.waiting("an open that waits", |pid| {
            is_blocked_in_fuse(pid, &[libc::SYS_openat])
        });
    }

    /// The same for poll(2).
    pub(crate) fn polling(&mut self) -> Process {
        self.asleep_in("poll")
    }

    fn asleep_in(&mut self, place: &str) -> Process {
        self.waiting(place, |pid| {
            fs::read_to_string(format!("/proc/{pid}/wchan"))
                .is_ok_and(|function| function.contains(place))
        })
    }

    fn waiting(&mut self, what: &str, waits: impl Fn(i32) -> bool) -> Process {
        wait_for(what, || {
            if !self.is_running() {
                let mut errors = String::new();
                if let Some(mut stream) = self.child.stderr.take() {
                    stream.read_to_string(&mut errors).ok();
                }
                panic!("the process has ended instead of blocking: {errors}");
            }
            let pid = descendants(self.pid())
                .into_iter()
                .find(|pid| waits(*pid))?;
            Process::open(pid)
        })
    }

    /// Waits until the process has written a line to its standard output, and returns it.
    pub(crate) fn line(&mut self) -> String {
        let out = self.child.stdout.as_mut().expect("piped");
        let mut line = Vec::new();
        let mut byte = [0];
        while out.read(&mut byte).expect("output") == 1 && byte != *b"\n" {
            line.extend(byte);
        }
        String::from_utf8(line).expect("text")
    }

    /// Waits until the process, or one that it started, sleeps in a system call whose name in the kernel
    /// contains `place`.
    pub(crate) fn wait_until_asleep_in(&mut self, place: &str) {
        self.asleep_in(place);
    }

    /// Waits for the end and collects the output. Killed at the deadline, which fails the test.
    pub(crate) fn finish(mut self) -> Output {
        let out = collect(self.child.stdout.take().expect("piped"));
        let err = collect(self.child.stderr.take().expect("piped"));
        let start = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("wait") {
                break status;
            }
            if start.elapsed() > DEADLINE {
                self.signal(libc::SIGKILL);
                panic!("the process did not end in time");
            }
            thread::sleep(Duration::from_millis(1));
        };
        Output {
            status,
            stdout: out.join().expect("stdout"),
            stderr: err.join().expect("stderr"),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            self.signal(libc::SIGKILL);
            self.child.wait().ok();
        }
    }
}

/// A process that need not be our child, by a descriptor: its number cannot become another's.
pub(crate) struct Process {
    handle: OwnedFd,
}

impl Process {
    /// `None` if there is no such process.
    pub(crate) fn open(pid: i32) -> Option<Self> {
        // SAFETY: the call takes two numbers.
        let handle = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        if handle < 0 {
            return None;
        }
        // SAFETY: a descriptor that was just made is nobody else's.
        let handle = unsafe { OwnedFd::from_raw_fd(handle as i32) };
        Some(Process { handle })
    }

    pub(crate) fn signal(&self, signal: i32) {
        let handle = self.handle.as_raw_fd();
        let none = std::ptr::null::<libc::siginfo_t>();
        // SAFETY: the descriptor is open; a null info is what kill(2) sends.
        let done = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, handle, signal, none, 0) };
        assert_eq!(done, 0, "{}", io::Error::last_os_error());
    }

    /// Waits for its end; false if it did not come in time.
    pub(crate) fn ends_within(&self, time: Duration) -> bool {
        let mut poll = libc::pollfd {
            fd: self.handle.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one entry, as announced.
        unsafe { libc::poll(&mut poll, 1, time.as_millis() as i32) == 1 }
    }
}

fn collect(mut stream: impl Read + Send + 'static) -> thread::JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).expect("output");
        bytes
    })
}

/// Runs a command to its end, killed at the deadline.
pub(crate) fn finish(command: &mut Command) -> Output {
    Running::start(command).finish()
}

/// The process and all that it has started.
fn descendants(pid: i32) -> Vec<i32> {
    let mut found = vec![pid];
    let mut at = 0;
    while at < found.len() {
        let path = format!("/proc/{0}/task/{0}/children", found[at]);
        let children = fs::read_to_string(path).unwrap_or_default();
        found.extend(
            children
                .split_whitespace()
                .filter_map(|pid| pid.parse::<i32>().ok()),
        );
        at += 1;
    }
    found
}

/// The calls that can wait for long, once a file is open. The others, as a shell's look at its folder, only pass.
const LONG: [libc::c_long; 4] = [
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_ftruncate,
    libc::SYS_close,
];

/// Whether the kernel has the process wait for a FUSE answer (proc(5), wchan and stack) to one of these calls.
fn is_blocked_in_fuse(pid: i32, calls: &[libc::c_long]) -> bool {
    let look = |file| fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default();
    let call = look("syscall");
    let call = call.split(' ').next().and_then(|call| call.parse().ok());
    call.is_some_and(|call| calls.contains(&call))
        && ["wchan", "stack"].iter().any(|file| {
            let text = look(file);
            text.contains("request_wait_answer") || text.contains("fuse")
        })
}
