//! Daemons that are killed, and daemons that end: what was acknowledged is there, and the mountpoint is free.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::gateway::Gateway;
use crate::support::{DNPIPES, Mount, PYTHON, Process, Running, Store, finish, wait_for};

/// Pushes numbered lines and notes each that was acknowledged, until the daemon is gone.
const ACKNOWLEDGED: &str = "
import errno, os, sys
name, number, acks = sys.argv[1], int(sys.argv[2]), sys.argv[3]
acks = os.open(acks, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
fd = os.open('topic', os.O_WRONLY)
while True:
    line = ('%s %d %s\\n' % (name, number, 'x' * (number * 37 % 3000))).encode()
    try:
        written = os.write(fd, line)
    except OSError as error:
        sys.exit(0 if error.errno in (errno.ECONNABORTED, errno.ENOTCONN) else str(error))
    if written != len(line):
        sys.exit('a short write')
    os.write(acks, b'%d\\n' % number)
    number += 1
";

/// The same by a shell that opens the pipe for each line.
const ACKNOWLEDGED_SHELL: &str = r#"
while echo "$name $number" 2> /dev/null >> topic; do
    echo "$number" >> "$acks"
    number=$((number + 1))
done"#;

fn acknowledged(path: &Path) -> Vec<u64> {
    let text = fs::read_to_string(path).unwrap_or_default();
    text.lines()
        .map(|line| line.parse().expect("a number"))
        .collect()
}

/// Kills the daemon a few times while writers write, and checks what is there after each.
fn kill_in_mid_load(url: &str, store: &Store) {
    const KILLS: usize = 4;
    const WRITERS: usize = 4;
    let mut mount = Mount::new(url, &[]);
    mount.out("touch topic");
    let acks = |writer: usize| store.folder().join(format!("acks{writer}"));
    for kill in 1..=KILLS {
        let mut writers = Vec::new();
        let mut before = Vec::new();
        for writer in 0..WRITERS {
            let last = acknowledged(&acks(writer)).last().copied().unwrap_or(0);
            before.push(acknowledged(&acks(writer)).len());
            // One number is left out: the line that was under way may be there or not.
            let (next, file) = (last + 2, acks(writer));
            let file = file.display();
            writers.push(mount.spawn(&if writer == 0 {
                format!("name=w0 number={next} acks={file}\n{ACKNOWLEDGED_SHELL}")
            } else {
                format!("exec {PYTHON} -c \"{ACKNOWLEDGED}\" w{writer} {next} {file}")
            }));
        }
        for (writer, before) in before.into_iter().enumerate() {
            wait_for("acknowledged lines", || {
                (acknowledged(&acks(writer)).len() >= before + 20 * kill).then_some(())
            });
        }
        mount = mount.crash_and_restart(url, &[]);
        for writer in writers {
            let output = writer.finish();
            assert!(output.status.code().is_some(), "{output:?}");
            assert!(output.stderr.is_empty(), "{output:?}");
        }
        let mut stored = BTreeMap::<String, Vec<u64>>::new();
        for line in mount.lines("topic") {
            let mut words = line.split(' ');
            let name = words.next().expect("a name").to_owned();
            let number: u64 = words.next().expect("a number").parse().expect("a number");
            if let Some(filler) = words.next() {
                assert_eq!(filler.len() as u64, number * 37 % 3000, "{name} {number}");
            }
            stored.entry(name).or_default().push(number);
        }
        for writer in 0..WRITERS {
            let acked = acknowledged(&acks(writer));
            let stored = stored.remove(&format!("w{writer}")).unwrap_or_default();
            assert!(
                stored.is_sorted_by(|a, b| a < b),
                "writer {writer}: out of order or twice: {stored:?}"
            );
            let there: HashSet<u64> = stored.iter().copied().collect();
            let lost: Vec<_> = acked.iter().filter(|n| !there.contains(n)).collect();
            assert!(lost.is_empty(), "writer {writer}: lost {lost:?}");
            assert!(
                stored.len() <= acked.len() + kill,
                "writer {writer}: more lines than were written"
            );
        }
        assert!(stored.is_empty(), "lines of nobody: {stored:?}");
    }
}

/// "once the backend has acknowledged all of them: then they are available to every participant", also after
/// kill -9, and the next mount needs no umount before.
#[test]
fn a_killed_daemon_loses_nothing_acknowledged() {
    let store = Store::new();
    kill_in_mid_load(&store.url(), &store);
}

/// The same with `durability=process`, which promises it for the end of every process.
#[test]
fn a_killed_daemon_loses_nothing_acknowledged_with_durability_process() {
    let store = Store::new();
    kill_in_mid_load(&store.fast_url(), &store);
}

/// A reader or poller that waits does not wait for ever when the daemon is killed: it gets an error.
#[test]
fn blocked_readers_of_a_killed_daemon_end() {
    let mut mount = Mount::memory(&[]);
    mount.out("touch topic");
    let mut readers: Vec<Running> = ["cat topic", "cat topic@follow", "head -n 1 topic"]
        .map(|reader| mount.spawn(&format!("exec {reader}")))
        .into();
    let poll = "import os, select
poll = select.poll()
poll.register(os.open('topic@follow', os.O_RDONLY), select.POLLIN)
print(poll.poll()[0][1] & select.POLLERR)";
    let mut poller = mount.spawn(&format!("exec {PYTHON} -c \"{poll}\""));
    for reader in &mut readers {
        reader.wait_until_blocked();
    }
    poller.polling();
    mount.signal(libc::SIGKILL);
    assert_eq!(mount.wait().signal(), Some(libc::SIGKILL));
    for reader in readers {
        let output = reader.finish();
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        assert!(errors.contains("connection abort"), "{errors}");
    }
    assert_eq!(poller.finish().stdout, b"8\n");
    let later = finish(Command::new("ls").arg(mount.dir()));
    assert!(!later.status.success(), "{later:?}");
}

/// Mounting where killed daemons have left several mounts, one above the other, just works.
#[test]
fn stacked_dead_mounts_are_cleaned() {
    let store = Store::new();
    let mut lower = Mount::new(&store.url(), &[]);
    let mut upper = Mount::memory(&[]);
    let points = [upper.dir(), lower.dir()];
    let bound = finish(Command::new("mount").arg("--bind").args(points));
    assert!(bound.status.success(), "{bound:?}");
    for mount in [&mut lower, &mut upper] {
        mount.signal(libc::SIGKILL);
        mount.wait();
    }
    assert_eq!(mounts_on(lower.dir()), 2);
    let mount = lower.again(&store.url(), &[]);
    assert_eq!(mounts_on(mount.dir()), 1);
    assert_eq!(mount.out("echo works > topic; cat topic"), "works\n");
}

fn mounts_on(path: &Path) -> usize {
    let table = fs::read_to_string("/proc/self/mountinfo").expect("mountinfo");
    let path = path.to_str().expect("text");
    let on_it = |line: &&str| line.split(' ').nth(4) == Some(path);
    table.lines().filter(on_it).count()
}

/// Pushes lines from outside the mount, and notes each that was pushed; it does not care whether anything is mounted.
const TIRELESS: &str = r#"
number=0
while :; do
    if echo "$name $number" 2> /dev/null >> "$topic"; then
        echo "$name $number" >> "$acks"
    fi
    number=$((number + 1))
done"#;

/// The bare directory is never seen between the dead mount and the next: in it writers would make plain files, which
/// loses their lines and keeps the next daemon from mounting.
#[test]
fn writers_that_go_on_while_a_killed_daemon_is_replaced_write_into_pipes_only() {
    const KILLS: usize = 6;
    const WRITERS: usize = 4;
    let store = Store::new();
    let mut mount = Mount::new(&store.fast_url(), &[]);
    let acks = |writer: usize| store.folder().join(format!("acks{writer}"));
    let pushed = |writer| fs::read_to_string(acks(writer)).unwrap_or_default();
    let writers: Vec<Running> = (0..WRITERS)
        .map(|writer| {
            let mut bash = Command::new("bash");
            bash.arg("-c").arg(TIRELESS);
            bash.env("name", writer.to_string());
            bash.env("acks", acks(writer));
            Running::start(bash.env("topic", mount.file("topic")))
        })
        .collect();
    for kill in 0..=KILLS {
        if kill > 0 {
            mount = mount.crash_and_restart(&store.fast_url(), &[]);
            assert_eq!(mounts_on(mount.dir()), 1);
        }
        let before: Vec<_> = (0..WRITERS).map(|writer| pushed(writer).len()).collect();
        for (writer, before) in before.into_iter().enumerate() {
            wait_for("pushed lines", || {
                (pushed(writer).len() > before + 50).then_some(())
            });
        }
    }
    for writer in writers {
        writer.signal(libc::SIGKILL);
        writer.finish();
    }
    let stored = mount.lines("topic");
    let there: HashSet<&str> = stored.iter().map(String::as_str).collect();
    assert_eq!(there.len(), stored.len(), "twice");
    for writer in 0..WRITERS {
        let pushed = pushed(writer);
        let lost: Vec<_> = pushed
            .lines()
            .filter(|line| !there.contains(line))
            .collect();
        assert!(lost.is_empty(), "writer {writer}: lost {lost:?}");
    }
    assert_eq!(mount.stop().code(), Some(0), "{}", mount.log());
    let plain = fs::read_dir(mount.dir()).expect("the bare directory");
    assert_eq!(plain.count(), 0, "plain files");
}

/// What replaces a dead mount is mounted as it was, on an ordinary directory and on another mount.
#[test]
fn a_mount_that_replaces_a_dead_one_has_the_same_options() {
    for flags in [&[][..], &["--read-only", "--allow-other"]] {
        let store = Store::new();
        store.out("dnpipes push topic <<< hello");
        for is_on_mount in [false, true] {
            let place = Background::new();
            if is_on_mount {
                let empty = store.folder().join("empty");
                fs::create_dir(&empty).expect("a folder");
                let mut bind = Command::new("mount");
                let bound = finish(bind.arg("--bind").args([&empty, &place.mountpoint]));
                assert!(bound.status.success(), "{bound:?}");
            }
            let mut seen = Vec::new();
            for _ in 0..2 {
                let mut command = Command::new(DNPIPES);
                command.args(["mount", "--daemon"]).args(flags);
                let output = finish(command.arg(store.url()).arg(&place.mountpoint));
                assert!(output.status.success(), "{output:?}");
                assert_eq!(mounts_on(&place.mountpoint), 1 + usize::from(is_on_mount));
                assert_eq!(place.out("cat topic@snapshot"), "hello\n");
                seen.push(options_of(&place.mountpoint));
                for daemon in place.daemons() {
                    daemon.signal(libc::SIGKILL);
                    assert!(daemon.ends_within(Duration::from_secs(5)));
                }
            }
            assert_eq!(seen[0], seen[1]);
            for option in ["nosuid", "nodev", "noexec", "noatime"] {
                assert!(seen[0].contains(option), "{}", seen[0]);
            }
            let unmounted = finish(Command::new("umount").arg("-l").arg(&place.mountpoint));
            assert!(unmounted.status.success(), "{unmounted:?}");
        }
    }
}

/// What the table of mounts says of the dnpipes on `path`, without its number, its device's, and how it is shared.
fn options_of(path: &Path) -> String {
    let table = fs::read_to_string("/proc/self/mountinfo").expect("mountinfo");
    let path = format!(" {} ", path.display());
    let mut lines = table.lines().filter(|line| line.contains("fuse.dnpipes"));
    let line = lines.find_map(|line| line.split_once(&path));
    let (options, rest) = line.expect("the mount").1.split_once(' ').expect("options");
    let (_shared, rest) = rest.split_once("- ").expect("the file system");
    format!("{options} {rest}")
}

/// A dead mount does not hide what is in the directory from the next daemon.
#[test]
fn a_directory_that_is_not_empty_beneath_a_dead_mount_is_refused() {
    let mut mount = Mount::memory(&[]);
    let folder = mount.dir().parent().expect("a folder").to_owned();
    let view = Background::new();
    let mut bind = Command::new("mount");
    let bound = finish(bind.arg("--bind").args([&folder, &view.mountpoint]));
    assert!(bound.status.success(), "{bound:?}");
    fs::write(view.mountpoint.join("mnt/file"), "").expect("a plain file");
    mount.signal(libc::SIGKILL);
    mount.wait();
    let mut command = Command::new(DNPIPES);
    let refused = finish(command.args(["mount", "memory:"]).arg(mount.dir()));
    let errors = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(1), "{errors}");
    assert!(errors.contains("is not empty beneath"), "{errors}");
    fs::remove_file(view.mountpoint.join("mnt/file")).expect("the plain file");
    assert!(mount.again("memory:", &[]).is_live());
}

/// On SIGTERM, SIGINT and SIGHUP waiting readers get end of file, the mountpoint is free at once, and the
/// daemon ends with exit code 0.
#[test]
fn a_daemon_that_ends_gives_its_readers_end_of_file() {
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
        let mut mount = Mount::memory(&[]);
        mount.out("touch topic; echo before > other");
        let readers = ["cat topic", "cat other@follow", "wc -l topic"];
        let mut readers = readers.map(|reader| mount.spawn(&format!("exec {reader}")));
        for reader in &mut readers {
            reader.wait_until_blocked();
        }
        let start = Instant::now();
        mount.signal(signal);
        let read = readers.map(|reader| {
            let output = reader.finish();
            assert!(output.status.success(), "{output:?}");
            assert!(output.stderr.is_empty(), "{output:?}");
            output.stdout
        });
        assert_eq!(read, [&b""[..], b"before\n", b"0 topic\n"]);
        assert_eq!(mount.wait().code(), Some(0), "{}", mount.log());
        assert!(start.elapsed() < Duration::from_secs(2), "nothing was open");
        fs::remove_dir(mount.dir()).expect("the mountpoint is an ordinary folder again");
    }
}

/// An ordinary end with many readers leaves no complaint in the log: the kernel takes the mount away while the
/// daemon still answers the last closes, for which nobody waits.
#[test]
fn a_daemon_that_ends_complains_of_nothing() {
    for _ in 0..8 {
        let mut mount = Mount::memory(&[]);
        mount.out("touch topic");
        // Not in the mountpoint: the last file that is closed is the last use of the mount.
        let topic = mount.file("topic@follow");
        let mut readers: Vec<Running> = (0..16)
            .map(|_| Running::start(Command::new("cat").arg(&topic)))
            .collect();
        readers.iter_mut().for_each(Running::wait_until_blocked);
        assert_eq!(mount.stop().code(), Some(0), "{}", mount.log());
        let log = mount.log();
        for level in ["WARN", "ERROR"] {
            assert!(!log.contains(level), "{log}");
        }
    }
}

/// "unterminated last line … pushed": also when the daemon ends while a writer has it open; and the mountpoint
/// is free though the file is still open.
#[test]
fn a_daemon_that_ends_pushes_unfinished_lines() {
    for signal in [libc::SIGTERM, libc::SIGINT] {
        let store = Store::new();
        let mut mount = Mount::new(&store.url(), &[]);
        let script = "import os, time
os.write(os.open('topic', os.O_WRONLY | os.O_CREAT), b'whole\\npart')
print('ok', flush=True)
time.sleep(1000)";
        let mut writer = mount.spawn(&format!("exec {PYTHON} -c \"{script}\""));
        assert_eq!(writer.line(), "ok");
        assert_eq!(mount.lines("topic"), ["whole"]);
        mount.signal(signal);
        let start = Instant::now();
        wait_for("the mountpoint", || fs::remove_dir(mount.dir()).ok());
        assert!(start.elapsed() < Duration::from_secs(2), "not free at once");
        assert_eq!(mount.wait().code(), Some(0), "{}", mount.log());
        assert!(writer.is_running());
        let pulled = store.run(&["pull", "topic@snapshot"]);
        assert_eq!(pulled.stdout, b"whole\npart\n");
    }
}

/// The mountpoint can be mounted again at once, and the new mount stays when the last file of the old one is
/// closed: while the old daemon still waits for that, and after it has ended.
#[test]
fn a_file_left_open_does_not_disturb_the_next_mount() {
    let store = Store::new();
    for old_daemon_waits in [true, false] {
        let mut old = Mount::new(&store.url(), &[]);
        old.out("touch topic");
        let mut holder = old.spawn("exec 3<> topic; echo open; exec sleep 1000");
        assert_eq!(holder.line(), "open");
        old.signal(libc::SIGTERM);
        wait_for("the mountpoint", || (!old.is_live()).then_some(()));
        let new = old.again(&store.url(), &[]);
        if old_daemon_waits {
            drop(holder);
            assert_eq!(old.wait().code(), Some(0), "{}", old.log());
        } else {
            assert_eq!(old.wait().code(), Some(0), "{}", old.log());
            drop(holder);
        }
        assert!(new.is_live());
        assert_eq!(mounts_on(new.dir()), 1);
        assert_eq!(new.out("echo new > other; tail -n 1 other"), "new\n");
        assert_eq!(fs::metadata(new.dir()).expect("the mount").ino(), 1);
    }
}

/// A daemon that ends takes its own mount off, and nothing else.
#[test]
fn a_daemon_that_ends_takes_nothing_off_but_its_own_mount() {
    let store = Store::new();
    let lazily = |mount: &Mount| {
        let done = finish(Command::new("umount").arg("--lazy").arg(mount.dir()));
        assert!(done.status.success(), "{done:?}");
    };
    let mut old = Mount::new(&store.url(), &[]);
    old.out("touch topic");
    let mut holder = old.spawn("exec 3> topic; printf unfinished >&3; echo open; exec sleep 1000");
    assert_eq!(holder.line(), "open");
    lazily(&old);
    let new = old.again(&store.url(), &[]);
    old.signal(libc::SIGTERM);
    assert_eq!(old.wait().code(), Some(0), "{}", old.log());
    assert!(new.is_live());
    assert_eq!(new.out("cat topic"), "unfinished\n");
}

/// Unmounting from outside, by umount(8), ends the daemon with exit code 0.
#[test]
fn umount_ends_the_daemon() {
    is_ended_by_umount(Mount::memory(&[]));
}

/// The same where one thread waits for requests and for the gateway.
#[test]
fn umount_ends_the_daemon_of_a_remote_source() {
    let gateway = Gateway::start("memory:", &[]);
    is_ended_by_umount(Mount::new(gateway.url(), &[]));
}

fn is_ended_by_umount(mut mount: Mount) {
    mount.out("echo hello > topic; cat topic");
    let done = finish(Command::new("umount").arg(mount.dir()));
    assert!(done.status.success(), "{done:?}");
    assert!(!mount.is_live());
    assert_eq!(mount.wait().code(), Some(0), "{}", mount.log());
}

/// `umount -f` of a mount that is in use says that it is busy, and ends its connection all the same.
#[test]
fn a_forced_umount_leaves_no_dead_mount() {
    let store = Store::new();
    let mut mount = Mount::new(&store.url(), &[]);
    let mut open = mount.spawn("exec 7> topic; printf 'a part' >&7; echo ready; exec sleep 100");
    assert_eq!(open.line(), "ready");
    // It says that it is busy, or that the daemon was faster.
    let done = finish(Command::new("umount").arg("-f").arg(mount.dir()));
    assert!(!done.status.success(), "{done:?}");
    assert_eq!(mount.wait().code(), Some(0), "{}", mount.log());
    assert_eq!(mounts_on(mount.dir()), 0);
    assert!(mount.log().contains("ended by force"));
    assert_eq!(store.out("dnpipes pull topic@snapshot"), "a part\n");
    open.signal(libc::SIGKILL);
    open.finish();
}

/// The kernel may give the numbers of a mount that was taken off to the next one, before the first daemon has noticed.
#[test]
fn a_daemon_that_notices_late_leaves_the_next_mount_alone() {
    let mut old = Mount::memory(&[]);
    // umount(8) would ask the daemon. Somebody may be asking it just then: who looks through all mounts, for one.
    let umount = "import ctypes, sys; sys.exit(ctypes.CDLL(None).umount2(sys.argv[1].encode(), 0))";
    wait_for("the mount to be taken off", || {
        old.signal(libc::SIGSTOP);
        let done = finish(Command::new(PYTHON).args(["-c", umount]).arg(old.dir()));
        if !done.status.success() {
            old.signal(libc::SIGCONT);
        }
        done.status.success().then_some(())
    });
    let new = old.again("memory:", &[]);
    new.out("echo kept > topic");
    old.signal(libc::SIGCONT);
    assert_eq!(old.wait().code(), Some(0), "{}", old.log());
    assert!(new.is_live());
    assert_eq!(new.out("cat topic"), "kept\n");
}

/// As some supervisors start their programs.
#[test]
fn a_mount_works_where_its_starter_ignores_the_end_of_its_children() {
    let mount = Mount::within(&["env", "--ignore-signal=CHLD"], "memory:", &[]);
    assert_eq!(mount.out("echo hello > topic; cat topic"), "hello\n");
}

/// Who fails again and again fills no disk with the log of it.
#[test]
fn the_log_says_the_same_a_few_times_only() {
    let mount = Mount::memory(&[]);
    mount.python(
        r"
        for number in range(2000):
            for name in 'T@wrong', 'T@nonsense':
                try:
                    os.stat(name)
                except FileNotFoundError:
                    pass
        ",
    );
    let log = mount.log();
    for selector in ["wrong", "nonsense"] {
        // Ten times within ten seconds, and it may have taken longer.
        let said = log.matches(selector).count();
        assert!((10..=60).contains(&said), "{said} times: {log}");
    }
}

/// After `umount -l` what is open goes on; the daemon ends with exit code 0 when the last file is closed.
#[test]
fn lazy_umount_ends_the_daemon_with_the_last_file() {
    is_ended_by_the_last_file(Mount::memory(&[]));
}

#[test]
fn lazy_umount_ends_the_daemon_of_a_remote_source_with_the_last_file() {
    let gateway = Gateway::start("memory:", &[]);
    is_ended_by_the_last_file(Mount::new(gateway.url(), &[]));
}

fn is_ended_by_the_last_file(mut mount: Mount) {
    mount.out("touch topic");
    let script = "exec 3< topic 4> topic; cd /; cat <&3; echo hello >&4; exec cat <&3";
    let mut reader = mount.spawn(script);
    let cat = reader.blocked();
    let done = finish(Command::new("umount").arg("-l").arg(mount.dir()));
    assert!(done.status.success(), "{done:?}");
    assert!(!mount.is_live());
    cat.signal(libc::SIGTERM);
    assert_eq!(reader.finish().stdout, b"hello\n");
    assert_eq!(mount.wait().code(), Some(0), "{}", mount.log());
}

/// A daemon in the background, by its mountpoint; killed and unmounted when dropped.
struct Background {
    _folder: tempfile::TempDir,
    mountpoint: PathBuf,
}

impl Background {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mountpoint = folder.path().join("mnt");
        fs::create_dir(&mountpoint).expect("a mountpoint");
        Background {
            _folder: folder,
            mountpoint,
        }
    }

    fn start(&self, source: &str) -> std::process::Output {
        let mut command = Command::new(DNPIPES);
        command.args(["mount", "--daemon", source]);
        finish(command.arg(&self.mountpoint))
    }

    /// The processes that were started with this mountpoint.
    fn daemons(&self) -> Vec<Process> {
        let wanted = self.mountpoint.to_str().expect("text");
        let processes = fs::read_dir("/proc").expect("/proc").flatten();
        processes
            .filter_map(|entry| {
                let words = fs::read_to_string(entry.path().join("cmdline")).ok()?;
                words.split('\0').any(|word| word == wanted).then_some(())?;
                Process::open(entry.file_name().to_str()?.parse().ok()?)
            })
            .collect()
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        for daemon in self.daemons() {
            daemon.signal(libc::SIGKILL);
            daemon.ends_within(Duration::from_secs(5));
        }
        let mut umount = Command::new("umount");
        umount.args(["-q", "-l"]).arg(&self.mountpoint);
        umount.stderr(Stdio::null()).status().ok();
    }
}

/// `--daemon` returns 0 once the mount answers; SIGTERM ends the daemon and frees the mountpoint.
#[test]
fn a_daemon_in_the_background_answers_when_it_is_ready() {
    let place = Background::new();
    let output = place.start("memory:");
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    // At once: nothing is waited for.
    assert_eq!(
        fs::metadata(&place.mountpoint).expect("the mount").ino(),
        1,
        "it does not answer yet"
    );
    fs::write(place.mountpoint.join("topic"), "hello\n").expect("a push");
    let read = fs::read(place.mountpoint.join("topic")).expect("a pull");
    assert_eq!(read, b"hello\n");
    let daemons = place.daemons();
    assert_eq!(daemons.len(), 1);
    daemons[0].signal(libc::SIGTERM);
    assert!(daemons[0].ends_within(Duration::from_secs(10)));
    fs::remove_dir(&place.mountpoint).expect("the mountpoint is free");
}

/// Of daemons that start at once on one mountpoint, a free one or where a killed daemon has left its mount, one mounts,
/// and nothing stays of the others.
#[test]
fn of_daemons_that_start_at_once_one_mounts() {
    const ROUNDS: usize = 5;
    const STARTS: usize = 4;
    let place = Background::new();
    for round in 0..ROUNDS {
        let starts: Vec<Running> = (0..STARTS)
            .map(|_| {
                let mut command = Command::new(DNPIPES);
                command.args(["mount", "--daemon", "memory:"]);
                Running::start(command.arg(&place.mountpoint))
            })
            .collect();
        let outputs = starts.into_iter().map(Running::finish);
        let (mounted, refused): (Vec<_>, Vec<_>) =
            outputs.partition(|output| output.status.success());
        assert_eq!(mounted.len(), 1, "round {round}: {mounted:?} {refused:?}");
        for output in refused {
            let errors = String::from_utf8_lossy(&output.stderr);
            assert!(errors.contains("mounted there already"), "{errors}");
        }
        assert_eq!(mounts_on(&place.mountpoint), 1, "round {round}");
        assert_eq!(place.out("echo works > topic; cat topic"), "works\n");
        let last = match round == ROUNDS - 1 {
            true => libc::SIGTERM,
            false => libc::SIGKILL,
        };
        let daemons = place.daemons();
        assert_eq!(daemons.len(), 1, "round {round}");
        daemons[0].signal(last);
        assert!(daemons[0].ends_within(Duration::from_secs(10)));
    }
    fs::remove_dir(&place.mountpoint).expect("the mountpoint is free");
}

/// The daemon keeps nothing open that the starter had: whoever waits for its end, or for its lock, does not wait for the
/// daemon.
#[test]
fn a_daemon_in_the_background_lets_go_of_what_the_starter_has_open() {
    let place = Background::new();
    let lock = place.mountpoint.with_file_name("lock");
    let mut bash = Command::new("bash");
    bash.arg("-ec").arg(format!(
        "exec 9> '{0}'; flock 9; {DNPIPES} mount --daemon memory: '{1}' 3>&1 | cat; exec 9>&-; flock -n '{0}' echo free",
        lock.display(),
        place.mountpoint.display()
    ));
    let output = finish(&mut bash);
    assert_eq!(output.stdout, b"free\n", "{output:?}");
    fs::write(place.mountpoint.join("topic"), "hello\n").expect("a push");
}

/// `--daemon` that cannot mount says why, with exit code 1, and leaves no process.
#[test]
fn a_daemon_in_the_background_that_fails_says_why() {
    let place = Background::new();
    let folder = tempfile::tempdir().expect("a folder");
    let missing = folder.path().join("missing/pipes.db");
    let output = place.start(&format!("sqlite:{}", missing.display()));
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(
        errors.starts_with("dnpipes: ") && errors.contains("missing: No such file or directory"),
        "{errors}"
    );
    assert_eq!(errors.matches("No such file").count(), 1, "{errors}");
    fs::write(place.mountpoint.join("file"), "").expect("a file");
    let output = place.start("memory:");
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(errors.contains("is not empty"), "{errors}");
    for daemon in place.daemons() {
        assert!(daemon.ends_within(Duration::from_secs(5)));
    }
}

/// Mounting twice on the same mountpoint is refused, and the first mount stays as it is.
#[test]
fn a_second_mount_on_the_same_mountpoint_is_refused() {
    let mount = Mount::memory(&[]);
    mount.out("echo first > topic");
    for flags in [&[][..], &["--daemon"]] {
        let mut second = Command::new(DNPIPES);
        second.arg("mount").args(flags).arg("memory:");
        let output = finish(second.arg(mount.dir()));
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        assert!(
            errors.contains("a dnpipes is mounted there already"),
            "{errors}"
        );
        assert_eq!(mount.out("cat topic"), "first\n");
    }
}

#[test]
fn a_daemon_that_is_killed_while_it_starts_ends_and_leaves_no_dead_mount() {
    let folder = tempfile::tempdir().expect("a folder");
    let mountpoint = folder.path().join("mnt");
    fs::create_dir(&mountpoint).expect("a mountpoint");
    let is_mounted = || {
        let table = fs::read_to_string("/proc/self/mounts").expect("the table");
        table.contains(mountpoint.to_str().expect("text"))
    };
    for _ in 0..30 {
        let mut command = Command::new(DNPIPES);
        command.args(["mount", "memory:"]).arg(&mountpoint);
        let mut daemon = Running::start(&mut command);
        wait_for("the mount", || is_mounted().then_some(()));
        daemon.signal(libc::SIGKILL);
        wait_for("its end", || (!daemon.is_running()).then_some(()));
        let detached = finish(Command::new("umount").arg("-l").arg(&mountpoint));
        assert!(detached.status.success(), "{detached:?}");
    }
}

impl Background {
    /// Mounts by a script of bash that ends with the mount, in a place of which nobody reads the log.
    fn mount_by(&self, before: &str, source: &str) -> Running {
        let mut bash = Command::new("bash");
        bash.arg("-ec").arg(format!(
            "{before}; exec {DNPIPES} mount '{source}' '{}'",
            self.mountpoint.display()
        ));
        let running = Running::start(&mut bash);
        wait_for("the mount", || {
            let root = fs::metadata(&self.mountpoint).ok()?;
            (root.ino() == 1).then_some(())
        });
        running
    }

    fn out(&self, script: &str) -> String {
        let mut bash = Command::new("bash");
        bash.arg("-c").arg(script).current_dir(&self.mountpoint);
        let output = finish(&mut bash);
        String::from_utf8(output.stdout).expect("text")
    }
}

/// As in a pipe to a program that has stopped reading.
#[test]
fn a_log_that_nobody_reads_keeps_nobody_waiting() {
    let place = Background::new();
    let daemon = place.mount_by(":", "memory:");
    let said = place
        .out("for i in {1..3000}; do [ -e topic@wrong$i ]; done; echo hello > topic; cat topic");
    assert_eq!(said, "hello\n");
    daemon.signal(libc::SIGTERM);
    let output = daemon.finish();
    assert!(output.status.success(), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("topic@wrong1"));
}

/// A daemon in the background has no standard error: what goes wrong is in the system's log. One that does not take lines,
/// here behind ten, keeps nobody waiting either, and is told how many it did not take.
#[test]
fn a_daemon_in_the_background_tells_the_systems_log() {
    let place = Background::new();
    let script = format!(
        "
import os, re, signal, socket, subprocess, sys
mount = sys.argv[1]
log = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
log.bind('/dev/log')
log.settimeout(20)
def next_line():
    return log.recv(65536).decode()
subprocess.run(['{DNPIPES}', 'mount', '--daemon', 'memory:', mount], check=True, env=dict(os.environ, DNPIPES_LOG='info'))
os.path.exists(mount + '/topic@wrong')
first = next_line()
print(re.sub('[0-9]+', 'N', first))
for number in range(30):
    os.path.exists(mount + '/topic@wrong%d' % number)
with open(mount + '/topic', 'w') as topic:
    print('hello', file=topic)
print(open(mount + '/topic').read(), end='')
log.setblocking(False)
taken = 0
try:
    while '@wrong' in next_line():
        taken += 1
except BlockingIOError:
    pass
log.settimeout(20)
os.kill(int(re.search('[0-9]+(?=])', first)[0]), signal.SIGTERM)
dropped = next_line()
print(0 < taken < 30, taken + int(re.search('([0-9]+) lines', dropped)[1]))
print(re.sub('[0-9]+', 'N', next_line()))
"
    );
    let mut private = Command::new("unshare");
    // The other network has its own length of a socket's queue.
    private.args(["-mn", "bash", "-ec"]).arg(
        "mount -t tmpfs tmpfs /dev
         mknod -m 666 /dev/null c 1 3; mknod -m 666 /dev/fuse c 10 229
         exec \"$0\" -c \"$@\"",
    );
    private.args([PYTHON, &script]).arg(&place.mountpoint);
    let output = finish(&mut private);
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let lines: Vec<&str> = said.lines().collect();
    assert!(
        lines[0].starts_with("<N>dnpipes[N]: ") && lines[0].contains("topic@wrong"),
        "{output:?}"
    );
    let last = "<N>dnpipes[N]: signal N: unmounting";
    assert_eq!(lines[1..], ["hello", "True 30", last], "{output:?}");
}

/// As in a terminal whose window hangs.
#[test]
fn a_terminal_that_shows_nothing_keeps_nobody_waiting() {
    let place = Background::new();
    let script = format!(
        "
import os, pty, subprocess, sys, time
ours, theirs = pty.openpty()
mount = sys.argv[1]
daemon = subprocess.Popen(['{DNPIPES}', 'mount', 'memory:', mount], stderr=theirs, env=dict(os.environ, DNPIPES_LOG='debug'))
while os.stat(mount).st_ino != 1:
    time.sleep(0.01)
for number in range(1000):
    os.path.exists(mount + '/topic@wrong%d' % number)
with open(mount + '/topic', 'w') as topic:
    print('hello', file=topic)
print(open(mount + '/topic').read(), end='', flush=True)
daemon.terminate()
print(daemon.wait())
"
    );
    let mut python = Command::new(PYTHON);
    python.arg("-c").arg(script).arg(&place.mountpoint);
    let output = finish(&mut python);
    assert_eq!(output.stdout, b"hello\n0\n", "{output:?}");
}

/// What the starter has had a mount ignore it ignores, as nohup(1) wants.
#[test]
fn a_mount_under_nohup_outlives_a_hangup() {
    let place = Background::new();
    let daemon = place.mount_by("trap '' HUP", "memory:");
    place.out("echo hello > topic");
    daemon.signal(libc::SIGHUP);
    assert_eq!(place.out("cat topic"), "hello\n");
    daemon.signal(libc::SIGTERM);
    assert!(daemon.finish().status.success());
}

#[test]
fn a_store_over_the_limit_of_files_is_an_error_and_not_the_end() {
    let (place, store) = (Background::new(), Store::new());
    let mut daemon = place.mount_by("ulimit -f 8192", &store.url());
    let said = place.out(
        "echo first > topic; yes | head -c 40000000 | fold -w 1000 | cat > topic || echo failed; \
         head -n 1 topic",
    );
    assert_eq!(said, "failed\nfirst\n");
    assert!(daemon.is_running());
    daemon.signal(libc::SIGTERM);
    assert!(daemon.finish().status.success());
}

/// Units of systemd that come behind a mount must not write into the bare directory.
#[test]
fn a_mount_tells_the_service_manager_when_it_answers() {
    let place = Background::new();
    let path = place.mountpoint.with_file_name("notify");
    let manager = UnixDatagram::bind(&path).expect("a socket");
    let begun = format!("export NOTIFY_SOCKET='{}'", path.display());
    let daemon = place.mount_by(&begun, "memory:");
    let mut told = [0; 100];
    let deadline = Some(Duration::from_secs(10));
    manager.set_read_timeout(deadline).expect("a deadline");
    let count = manager.recv(&mut told).expect("a word");
    assert_eq!(&told[..count], b"READY=1\n");
    daemon.signal(libc::SIGTERM);
    assert!(daemon.finish().status.success());
}
