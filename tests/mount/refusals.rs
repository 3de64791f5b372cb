//! What cannot be done is refused with a clear error, and nothing is lost or damaged by it.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::gateway::Gateway;
use crate::support::{DNPIPES, Mount, PYTHON, Store, finish, wait_for};

/// A folder with an empty one in it to mount on; what a test mounts below it is unmounted when dropped.
struct Place {
    folder: TempDir,
}

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        fs::create_dir(folder.path().join("mnt")).expect("a mountpoint");
        Place { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A store in it.
    fn source(&self) -> String {
        format!("sqlite:{}", self.path("pipes.db").display())
    }

    /// `dnpipes mount` with these arguments, which must be refused: what it says.
    fn refused(&self, code: i32, args: &[&str]) -> String {
        refusal(code, Command::new(DNPIPES).arg("mount").args(args))
    }

    /// The same for a source, on the empty folder.
    fn refused_source(&self, code: i32, source: &str) -> String {
        let mountpoint = self.path("mnt");
        self.refused(code, &[source, mountpoint.to_str().expect("text")])
    }

    /// Mounts a tmpfs on a folder of this name.
    fn disk(&self, name: &str, options: &str) -> PathBuf {
        let path = self.path(name);
        fs::create_dir_all(&path).expect("a folder");
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", options, "tmpfs"]);
        let output = finish(mount.arg(&path));
        assert!(output.status.success(), "{output:?}");
        path
    }

    /// Runs a bash script in a mount namespace of its own, where it may mount what it likes. `$T` is this
    /// folder, open to all, and `$T/dnpipes` the program.
    fn in_private(&self, script: &str) -> Output {
        let all = fs::Permissions::from_mode(0o755);
        fs::set_permissions(self.folder.path(), all).expect("permissions");
        fs::copy(DNPIPES, self.path("dnpipes")).expect("a copy of dnpipes");
        let mut command = Command::new("unshare");
        command.args(["-m", "bash", "-ec", script]);
        finish(command.env("T", self.folder.path()).current_dir("/"))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let Ok(table) = fs::read_to_string("/proc/self/mountinfo") else {
            return;
        };
        let points = table
            .lines()
            .rev()
            .filter_map(|line| line.split(' ').nth(4));
        for point in points.filter(|point| Path::new(point).starts_with(self.folder.path())) {
            let mut umount = Command::new("umount");
            umount.args(["-q", "-l", point]);
            umount.stderr(Stdio::null()).status().ok();
        }
    }
}

/// Runs what must fail with this exit code, and returns what it says: without having printed anything, and
/// without a panic.
fn refusal(code: i32, command: &mut Command) -> String {
    let output = finish(command);
    said(code, &output)
}

fn said(code: i32, output: &Output) -> String {
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{output:?}");
    assert!(output.stdout.is_empty(), "{output:?}");
    assert!(!said.is_empty() && !said.contains("panicked"), "{said}");
    said
}

fn assert_says(said: &str, words: &[&str]) {
    for word in words {
        assert!(said.contains(word), "{word:?} is not in: {said}");
    }
}

/// Everything in a folder, with its bytes.
fn contents(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let entries = fs::read_dir(folder).expect("a folder").flatten();
    let mut found: Vec<_> = entries
        .filter(|entry| entry.path().is_file())
        .map(|entry| (entry.path(), fs::read(entry.path()).expect("a file")))
        .collect();
    found.sort();
    found
}

fn python(script: &str, args: &[&Path]) {
    let output = finish(Command::new(PYTHON).arg("-c").arg(script).args(args));
    assert!(output.status.success(), "{output:?}");
}

/// Pushes numbered lines of 10 KB until that fails, and prints the errno and how many went well.
const FILL: &str = "
import errno, os, sys
fd = os.open('topic', os.O_WRONLY | os.O_CREAT)
number = 0
try:
    while True:
        os.write(fd, (str(number) + ' ' + 'x' * 10000 + '\\n').encode())
        number += 1
except OSError as error:
    print(errno.errorcode[error.errno], number)
";

/// "backend full ENOSPC": what was acknowledged is there, a reset works on the full disk, and then pushes do.
#[test]
fn a_full_disk_is_enospc_and_a_reset_makes_room() {
    for durability in ["full", "process"] {
        let place = Place::new();
        let disk = place.disk("disk", "size=3m");
        let source = format!("sqlite:{}/pipes.db?durability={durability}", disk.display());
        let mount = Mount::new(&source, &["--timeout", "5s"]);
        for round in 0..3 {
            let filled = mount.out(&format!("{PYTHON} -c \"{FILL}\""));
            let (error, count) = filled.trim().split_once(' ').expect("two words");
            let count: usize = count.parse().expect("a number");
            assert_eq!(error, "ENOSPC", "round {round}");
            assert!(count >= 40, "round {round}: room for {count} messages only");
            let output = mount.sh("printf '%0100000d\\n' 0 > topic");
            let errors = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(errors.contains("No space left on device"), "{errors}");
            let numbers = |lines: Vec<String>| -> Vec<String> {
                let number = |line: &String| line.split(' ').next().map(str::to_owned);
                lines.iter().filter_map(number).collect()
            };
            let expected: Vec<String> = (0..count).map(|number| number.to_string()).collect();
            assert_eq!(numbers(mount.lines("topic")), expected, "round {round}");
            mount.out("truncate -s 0 topic");
            assert!(mount.lines("topic").is_empty());
            mount.out("echo works > topic");
            assert_eq!(mount.lines("topic"), ["works"]);
            mount.out("truncate -s 0 topic");
        }
    }
}

/// Where even a reset found no room to delete what it dropped, a push tries again once there is some.
#[test]
fn a_reset_on_a_disk_that_others_have_filled_makes_room_later() {
    for by_another in [false, true] {
        let place = Place::new();
        let disk = place.disk("disk", "size=12m");
        let source = format!("sqlite:{}/pipes.db", disk.display());
        let mut mount = Mount::new(&source, &["--timeout", "5s"]);
        let other = disk.join("other");
        mount.sh(&format!(
            "head -c 20000000 /dev/urandom | base64 > topic; dd if=/dev/zero of={} bs=4k; truncate -s 0 topic",
            other.display()
        ));
        fs::remove_file(&other).expect("gone");
        if by_another {
            mount = mount.crash_and_restart(&source, &["--timeout", "5s"]);
        }
        mount.out("echo works > topic");
        assert_eq!(mount.lines("topic"), ["works"]);
    }
}

/// Who opens a store on a disk where nothing has room any more is told so.
#[test]
fn a_store_on_a_full_disk_that_nobody_has_open_says_what_is_wrong() {
    let place = Place::new();
    let disk = place.disk("disk", "size=4m");
    let source = format!("sqlite:{}/pipes.db", disk.display());
    let mut push = Command::new(DNPIPES);
    let pushed = finish(push.args(["push", "--source", &source, "topic", "message"]));
    assert!(pushed.status.success(), "{pushed:?}");
    let file = format!("of={}/other", disk.display());
    finish(Command::new("dd").args(["if=/dev/zero", "bs=4k", &file]));
    let mut pull = Command::new(DNPIPES);
    let said = refusal(
        1,
        pull.args(["pull", "--source", &source, "topic@snapshot"]),
    );
    assert_says(&said, &["pipes.db", "the disk is full"]);
}

fn delete_store(database: &Path) {
    for suffix in ["", "-wal", "-shm", "-bell"] {
        fs::remove_file(format!("{}{suffix}", database.display())).expect("gone");
    }
}

/// A store that is deleted while it is mounted takes no more: what went into it would be gone with the mount.
#[test]
fn a_store_that_was_deleted_takes_no_more_pushes() {
    let place = Place::new();
    let source = place.source();
    let mount = Mount::new(&source, &[]);
    mount.out("echo one > topic");
    delete_store(&place.path("pipes.db"));
    let errors = wait_for("a push that is refused", || {
        let output = mount.sh("echo two > topic");
        (!output.status.success()).then(|| String::from_utf8_lossy(&output.stderr).into_owned())
    });
    assert!(errors.contains("Input/output error"), "{errors}");
    // Nor where another one stands in its place.
    let mut push = Command::new(DNPIPES);
    finish(push.args(["push", "--source", &source, "topic", "another"]));
    assert!(!mount.sh("echo three > topic").status.success());
    assert!(
        mount.log().contains("was deleted while it was open"),
        "{}",
        mount.log()
    );
}

/// Nor does one of which SQLite's own files are gone, as what is written to those is gone with the mount.
#[test]
fn a_store_without_its_write_ahead_log_takes_no_more_pushes() {
    for suffix in ["-wal", "-shm"] {
        let store = Store::new();
        let mount = Mount::new(&store.url(), &[]);
        mount.out("echo one > topic");
        fs::remove_file(format!("{}{suffix}", store.database().display())).expect("gone");
        wait_for("a push that is refused", || {
            (!mount.sh("echo two > topic").status.success()).then_some(())
        });
        assert!(!mount.sh("truncate -s 0 topic").status.success());
        let log = mount.log();
        assert!(log.contains(&format!("{suffix} was deleted")), "{log}");
    }
}

/// Also where they were gone before it changed anything, and another process has made new ones.
#[test]
fn a_store_whose_write_ahead_log_is_anothers_takes_no_pushes() {
    let store = Store::new();
    store.out("dnpipes push topic zero");
    let mount = Mount::new(&store.url(), &[]);
    assert_eq!(mount.out("cat topic"), "zero\n");
    for suffix in ["-wal", "-shm"] {
        fs::remove_file(format!("{}{suffix}", store.database().display())).expect("gone");
    }
    store.out("dnpipes push topic theirs");
    assert!(!mount.sh("echo ours > topic").status.success());
    drop(mount);
    assert_eq!(store.out("dnpipes pull topic@snapshot"), "zero\ntheirs\n");
}

/// Also where it was there when the writer began to wait.
#[test]
fn a_store_that_is_deleted_while_a_push_waits_does_not_take_it() {
    let store = Store::new();
    let mount = Mount::new(&store.url(), &[]);
    mount.out("echo one > topic");
    let held = store.hold();
    let mut writer = mount.spawn("exec 3> topic; echo two >&3");
    writer.wait_until_blocked();
    let begun = Instant::now();
    delete_store(&store.database());
    // Whoever has looked just before the end need not look again.
    wait_for("the next look", || {
        (begun.elapsed() > Duration::from_millis(150)).then_some(())
    });
    drop(held);
    assert!(!writer.finish().status.success());
}

/// Whoever comes then makes another one, of which the mount hears nothing.
#[test]
fn without_its_bell_a_store_is_read_rightly_and_not_changed() {
    let place = Place::new();
    let source = place.source();
    let mount = Mount::new(&source, &[]);
    mount.out("seq 3 > topic; seq 3 > kept");
    // One that has much in its buffer, and fetches nothing.
    mount.out("seq 200000 > long");
    let mut full = mount.spawn_python(
        "
        import signal
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
        fd = os.open('long@follow', os.O_RDONLY)
        print(os.read(fd, 2).decode(), end='', flush=True)
        signal.sigwait([signal.SIGUSR1])
        print(os.read(fd, 4096).decode(), end='', flush=True)
        ",
    );
    assert_eq!(full.line(), "1");
    let readers = ["topic", "kept"].map(|pipe| {
        let mut reader = mount.spawn(&format!("exec cat {pipe}@follow"));
        let lines = [reader.line(), reader.line(), reader.line()];
        assert_eq!(lines, ["1", "2", "3"]);
        reader
    });
    fs::remove_file(place.path("pipes.db-bell")).expect("gone");
    let dnpipes = |args: &[&str]| {
        let output = finish(Command::new(DNPIPES).args(args).args(["--source", &source]));
        assert!(output.status.success(), "{output:?}");
    };
    // It gets the place of the one that was removed.
    dnpipes(&["rm", "topic"]);
    dnpipes(&["push", "other", "a", "b", "c", "d", "e"]);
    dnpipes(&["push", "kept", "4"]);
    dnpipes(&["reset", "long"]);
    dnpipes(&["push", "long", "after"]);
    full.signal(libc::SIGUSR1);
    assert_eq!(full.line(), "after");
    dnpipes(&["push", "topic", "new"]);
    let [mut topic, mut kept] = readers;
    assert_eq!((topic.line(), kept.line()), ("new".into(), "4".into()));
    assert_eq!(mount.out("cat topic@snapshot"), "new\n");
    dnpipes(&["reset", "kept"]);
    assert_eq!(mount.out("cat kept@snapshot"), "");
    for change in ["truncate -s 0 topic", "touch made"] {
        assert!(!mount.sh(change).status.success(), "{change}");
    }
    wait_for("a push that is refused", || {
        (!mount.sh("echo two > topic").status.success()).then_some(())
    });
    let log = mount.log();
    assert!(log.contains("-bell was replaced"), "{log}");
}

/// A file that is no store is refused, by `mount` and by the other commands, and not touched.
#[test]
fn a_file_that_is_no_store_is_refused_and_left_as_it_is() {
    let place = Place::new();
    let text = "This is a text file, and quite long enough to be taken for something else.\n";
    for content in [
        text.repeat(200).into_bytes(),
        b"short\n".to_vec(),
        b"x".to_vec(),
        [b"SQLite format 3\0".to_vec(), vec![0xa5; 8192 - 16]].concat(),
        vec![0; 8192],
    ] {
        let file = place.path("pipes.db");
        fs::write(&file, &content).expect("a file");
        let source = format!("sqlite:{}", file.display());
        let begins = String::from_utf8_lossy(&content[..content.len().min(6)]).into_owned();
        for said in [
            place.refused_source(1, &source),
            refusal(
                1,
                Command::new(DNPIPES).args(["push", "--source", &source, "topic", "message"]),
            ),
        ] {
            assert_says(&said, &["dnpipes: ", "pipes.db", "not a database"]);
        }
        assert!(fs::read(&file).expect("the file") == content, "{begins:?}");
    }
}

/// "a database of another program … is left as it is": byte for byte, also one whose last changes are still
/// in its write-ahead log, as a program leaves it that was killed.
#[test]
fn a_database_of_another_program_is_refused_and_left_as_it_is() {
    const MAKE: &str = "
import os, sqlite3, sys
db = sqlite3.connect(sys.argv[1])
db.execute('PRAGMA journal_mode = ' + sys.argv[2])
db.execute('CREATE TABLE pipe (id INTEGER PRIMARY KEY, name TEXT)')
db.execute(\"INSERT INTO pipe (name) VALUES ('theirs')\")
db.commit()
os._exit(0)
";
    for journal in ["delete", "wal"] {
        let place = Place::new();
        let folder = place.path("theirs");
        fs::create_dir(&folder).expect("a folder");
        let file = folder.join("app.db");
        python(MAKE, &[&file, Path::new(journal)]);
        let before = contents(&folder);
        assert_eq!(before.len(), if journal == "wal" { 3 } else { 1 });
        let source = format!("sqlite:{}", file.display());
        for said in [
            place.refused_source(1, &source),
            refusal(1, Command::new(DNPIPES).args(["ls", "--source", &source])),
        ] {
            assert_says(
                &said,
                &["app.db is a database of another program", "left as it is"],
            );
        }
        for (path, bytes) in &before {
            // The shared memory is no data; SQLite makes it anew.
            if !path.to_string_lossy().ends_with("-shm") {
                let after = fs::read(path).unwrap_or_default();
                assert!(after == *bytes, "{} has changed", path.display());
            }
        }
    }
}

/// "is left as it is": nothing is put beside what was refused.
#[test]
fn a_refused_file_gets_no_company() {
    let place = Place::new();
    let folder = place.path("theirs");
    fs::create_dir(&folder).expect("a folder");
    let file = folder.join("notes.txt");
    fs::write(&file, "notes\n".repeat(2000)).expect("a file");
    place.refused_source(1, &format!("sqlite:{}", file.display()));
    let names: Vec<PathBuf> = contents(&folder).into_iter().map(|found| found.0).collect();
    assert_eq!(names, [file]);
}

/// The files beside a store are named after its path: by another one it would be another store, and both be damaged.
#[test]
fn a_store_that_has_two_paths_is_refused() {
    let place = Place::new();
    let folder = place.path("one");
    let other = place.path("other");
    for folder in [&folder, &other] {
        fs::create_dir(folder).expect("a folder");
    }
    let [file, bound, link] = [&folder, &other, &folder]
        .map(|folder| folder.join("pipes.db"))
        .map(|path| path.display().to_string());
    let link = format!("{link}-2");
    let source = format!("sqlite:{file}");
    let push = |source: &str| {
        let mut push = Command::new(DNPIPES);
        finish(push.args(["push", "--source", source, "topic", "message"]))
    };
    assert!(push(&source).status.success());
    fs::write(&bound, "").expect("a file");
    let bind = finish(Command::new("mount").args(["--bind", &file, &bound]));
    assert!(bind.status.success(), "{bind:?}");
    let said = place.refused_source(1, &format!("sqlite:{bound}"));
    let unbind = finish(Command::new("umount").arg(&bound));
    assert!(unbind.status.success(), "{unbind:?}");
    assert!(said.contains("mount the directory"), "{said}");
    fs::hard_link(&file, &link).expect("a link");
    for path in [&link, &file] {
        let said = place.refused_source(1, &format!("sqlite:{path}"));
        assert!(said.contains("hard link"), "{said}");
    }
    fs::remove_file(&link).expect("no link");
    assert!(push(&source).status.success());
}

/// A mount that was moved is taken off where it is; one above it is left, and said.
#[test]
fn a_mount_that_was_moved_is_taken_off_where_it_is() {
    let place = Place::new();
    fs::create_dir(place.path("there")).expect("a folder");
    let output = place.in_private(
        r#"
        start() {
            $T/dnpipes mount memory: $T/mnt & p=$!
            until mountpoint -q $T/mnt; do sleep 0.05; done
        }
        start
        mount --move $T/mnt $T/there
        kill $p; wait $p; echo $?
        mountpoint -q $T/there || echo free
        start
        mount -t tmpfs tmpfs $T/mnt
        kill $p; wait $p || echo $?
        mountpoint -q $T/mnt && echo stays
        "#,
    );
    let [said, complaint] =
        [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
    assert_eq!(said, "0\nfree\n1\nstays\n", "{complaint}");
    assert!(
        complaint.contains("something else was mounted"),
        "{complaint}"
    );
}

/// An empty file is a store to be.
#[test]
fn an_empty_file_becomes_a_store() {
    let store = Store::new();
    fs::write(store.database(), "").expect("a file");
    let mount = Mount::new(&store.url(), &[]);
    assert_eq!(mount.out("echo hello > topic; cat topic"), "hello\n");
    assert_eq!(store.run(&["pull", "topic"]).stdout, b"hello\n");
}

/// A backup as the README says, while somebody pushes.
#[test]
fn a_copy_by_vacuum_into_is_a_store() {
    let store = Store::new();
    let mount = Mount::new(&store.url(), &[]);
    mount.out("seq 1000 > topic");
    let writer = mount.spawn("while echo more >> other; do :; done");
    wait_for("pushes", || mount.file("other").exists().then_some(()));
    let copy = store.folder().join("copy.db");
    let program =
        "import sqlite3, sys; sqlite3.connect(sys.argv[1]).execute('VACUUM INTO ?', sys.argv[2:])";
    let mut vacuum = Command::new(PYTHON);
    vacuum.args(["-c", program]);
    let copied = finish(vacuum.args([&store.database(), &copy]));
    assert!(copied.status.success(), "{copied:?}");
    drop(writer);
    let copied = Mount::new(&format!("sqlite:{}", copy.display()), &[]);
    let more = copied
        .out("echo more > topic; wc -l < topic; truncate -s 0 topic; echo new > topic; cat topic");
    assert_eq!(more, "1001\nnew\n");
    assert_eq!(mount.out("wc -l < topic"), "1000\n");
}

/// What is pushed to a store that was set back has numbers that its readers have seen: they must not pass it over in
/// silence. Nor must those of a gateway, which begin behind what they have got.
#[test]
fn a_reader_of_a_store_that_was_set_back_is_told() {
    let store = Store::new();
    let mut gateway = Gateway::start(&store.url(), &[]);
    let mount = Mount::new(gateway.url(), &[]);
    mount.out("seq 3 > topic");
    let copy = store.folder().join("copy.db");
    fs::copy(store.database(), &copy).expect("a copy");
    let program = "
import sqlite3, sys
source, target = map(sqlite3.connect, sys.argv[1:])
source.backup(target)
";
    python(program, &[&store.database(), &copy]);
    mount.out("echo 4 > topic");
    let mut local = store.spawn("dnpipes pull topic@follow");
    let mut remote = mount.spawn("exec cat topic@follow");
    for reader in [&mut local, &mut remote] {
        for number in 1..=4 {
            assert_eq!(reader.line(), number.to_string());
        }
    }
    python(program, &[&copy, &store.database()]);
    // The local one looks when something is pushed; the gateway's when it is asked anew.
    gateway = gateway.crash_and_restart();
    assert_eq!(local.finish().status.code(), Some(1));
    let failed = remote.finish();
    let errors = String::from_utf8_lossy(&failed.stderr).into_owned();
    assert!(errors.contains("Input/output error"), "{errors}");
    assert!(
        mount.log().contains("the store was set back"),
        "{}",
        mount.log()
    );
    store.out("dnpipes push topic new");
    assert_eq!(mount.out("cat topic"), "1\n2\n3\nnew\n");
    drop(gateway);
}

/// A store of a later version is refused by its number, and kept.
#[test]
fn a_newer_schema_is_refused() {
    let place = Place::new();
    let store = Store::new();
    assert!(store.run(&["push", "topic", "kept"]).status.success());
    let set = "
import sqlite3, sys
db = sqlite3.connect(sys.argv[1], isolation_level=None)
db.execute('PRAGMA user_version = ' + sys.argv[2])
";
    python(set, &[&store.database(), Path::new("2")]);
    let said = place.refused_source(1, &store.url());
    assert_says(&said, &["schema version 2", "knows version 1"]);
    python(set, &[&store.database(), Path::new("1")]);
    assert_eq!(store.run(&["pull", "topic"]).stdout, b"kept\n");
}

/// "damaged data EIO": garbage in the middle of a store gives an error, and what was read before it is right;
/// it never gives wrong messages, skips some in silence, or hangs.
#[test]
fn a_damaged_store_is_an_error_and_never_wrong_messages() {
    let store = Store::new();
    let url = store.url();
    // Short messages, many in a row, and long ones, which have rows and pages of their own.
    let mut expected = Vec::new();
    for push in 0..40 {
        let mut lines = Vec::new();
        for line in 0..100 {
            lines.extend(format!("{push} {line} {}\n", "y".repeat(line * 7)).bytes());
        }
        if push % 8 == 0 {
            lines.extend(format!("{push} {}\n", "z".repeat(200_000)).bytes());
        }
        let file = store.folder().join("lines");
        fs::write(&file, &lines).expect("lines");
        let input = fs::File::open(&file).expect("lines");
        let mut push = Command::new(DNPIPES);
        push.args(["push", "--source", &url, "topic"]).stdin(input);
        assert!(push.status().expect("push").success());
        expected.extend(lines);
    }
    let sound = fs::read(store.database()).expect("the store");
    assert!(sound.len() > 2_000_000, "it is all in the one file");
    let pages = sound.len() as u64 / 4096;
    let mut noticed = 0;
    let mut problems = Vec::new();
    for at in (1..10).chain((1..16).map(|part| pages * part / 16)) {
        fs::write(store.database(), &sound).expect("the store");
        let file = fs::File::options().write(true).open(store.database());
        let file = file.expect("the store");
        file.write_all_at(&[0xa5; 4096], at * 4096)
            .expect("garbage");
        drop(file);
        let mut pull = Command::new(DNPIPES);
        let pulled = finish(pull.args(["pull", "--source", &url, "topic@snapshot"]));
        let errors = String::from_utf8_lossy(&pulled.stderr).into_owned();
        let right = expected.starts_with(&pulled.stdout);
        match pulled.status.code() {
            // The page may be one that is not in use.
            Some(0) if pulled.stdout == expected => {}
            Some(1) if right && errors.contains("pipes.db") => noticed += 1,
            code => problems.push(format!("page {at}: pull: {code:?}, {right}, {errors}")),
        }
        // A mount may find it out at once, or where it is read.
        let mut tried = Command::new(DNPIPES);
        let place = Place::new();
        tried
            .args(["mount", "--daemon", &url])
            .arg(place.path("mnt"));
        let tried = finish(&mut tried);
        let errors = String::from_utf8_lossy(&tried.stderr).into_owned();
        if tried.status.code() == Some(1) && errors.contains("pipes.db") {
            continue;
        }
        let umount = finish(Command::new("umount").arg(place.path("mnt")));
        assert!(umount.status.success(), "{umount:?}");
        let mount = Mount::new(&url, &["--timeout", "2s"]);
        let read = mount.sh("cat topic@snapshot");
        let errors = String::from_utf8_lossy(&read.stderr).into_owned();
        let right = expected.starts_with(&read.stdout);
        match read.status.code() {
            Some(0) if read.stdout == expected => {}
            Some(1) if right && errors.contains("Input/output error") => noticed += 1,
            code => problems.push(format!("page {at}: cat: {code:?}, {right}, {errors}")),
        }
    }
    assert!(noticed > 0, "all the pages were ones that are not in use");
    assert!(problems.is_empty(), "{problems:#?}");
}

/// "damaged data EIO": a row that is gone from the middle is not passed over as if nothing were missing.
#[test]
fn missing_messages_are_an_error() {
    let store = Store::new();
    for message in ["one", "two", "three"] {
        assert!(store.run(&["push", "topic", message]).status.success());
    }
    let delete = "
import sqlite3, sys
db = sqlite3.connect(sys.argv[1], isolation_level=None)
assert db.execute('DELETE FROM chunk WHERE key & ((1 << 42) - 1) = 2').rowcount == 1
";
    python(delete, &[&store.database()]);
    let mount = Mount::new(&store.url(), &[]);
    let read = mount.sh("cat topic@snapshot");
    let errors = String::from_utf8_lossy(&read.stderr).into_owned();
    assert!(b"one\n".starts_with(&read.stdout[..]), "{read:?}");
    assert!(!read.status.success(), "{read:?}");
    assert_says(&errors, &["Input/output error"]);
}

/// A place where no database can be is refused by its path and the reason.
#[test]
fn impossible_database_paths_are_refused() {
    let place = Place::new();
    let at = |path: &str| format!("sqlite:{}", place.path(path).display());
    let said = place.refused_source(1, &at("missing/pipes.db"));
    assert_says(&said, &["/missing", "No such file or directory"]);
    fs::create_dir(place.path("folder")).expect("a folder");
    let said = place.refused_source(1, &at("folder"));
    assert_says(&said, &["/folder", "not a regular file"]);
    fs::write(place.path("file"), "").expect("a file");
    let said = place.refused_source(1, &at("file/pipes.db"));
    assert_says(&said, &["/file", "not a directory"]);
    let said = place.refused_source(1, &at(&"x".repeat(248)));
    assert_says(&said, &["too long", "247 bytes"]);
    assert!(!place.path(&"x".repeat(248)).exists());
    let disk = place.disk("disk", "size=1m,ro");
    let said = place.refused_source(1, &at("disk/pipes.db"));
    assert_says(&said, &["disk/pipes.db", "Read-only file system"]);
    // One that was made before.
    let mut remount = Command::new("mount");
    for (options, expected) in [("remount,rw", 0), ("remount,ro", 1)] {
        let mut remount = Command::new("mount");
        assert!(
            finish(remount.args(["-o", options]).arg(&disk))
                .status
                .success()
        );
        let source = at("disk/pipes.db");
        let push = ["push", "--source", &source, "topic", "kept"];
        let output = finish(Command::new(DNPIPES).args(push));
        assert_eq!(output.status.code(), Some(expected), "{output:?}");
    }
    let said = place.refused_source(1, &at("disk/pipes.db"));
    assert_says(&said, &["disk/pipes.db", "Read-only file system"]);
    let remounted = finish(remount.args(["-o", "remount,rw"]).arg(&disk));
    assert!(remounted.status.success());
    let pull = ["pull", "--source", &at("disk/pipes.db"), "topic"];
    let pulled = finish(Command::new(DNPIPES).args(pull));
    assert_eq!(pulled.stdout, b"kept\n");
}

/// A mountpoint that is missing, not empty or not a directory is refused, with the reason.
#[test]
fn impossible_mountpoints_are_refused() {
    let place = Place::new();
    let on = |name: &str| {
        let path = place.path(name);
        place.refused(1, &["memory:", path.to_str().expect("text")])
    };
    assert_says(&on("missing"), &["/missing", "No such file or directory"]);
    fs::write(place.path("file"), "kept").expect("a file");
    assert_says(&on("file"), &["/file", "not a directory"]);
    fs::create_dir(place.path("full")).expect("a folder");
    fs::write(place.path("full/file"), "kept").expect("a file");
    assert_says(&on("full"), &["/full", "is not empty"]);
    assert_eq!(fs::read(place.path("full/file")).expect("a file"), b"kept");
}

/// Unknown schemes, keys and flags are refused by their name, with exit code 2 and what there is instead.
#[test]
fn command_lines_that_make_no_sense_are_refused() {
    let place = Place::new();
    for (source, words) in [
        ("gopher://host/topic", &["gopher", "sqlite memory"][..]),
        ("pipes.db", &["no scheme", "sqlite:pipes.db"]),
        ("sqlite:", &["needs a path"]),
        ("sqlite:/a.db?sync=1", &["\"sync\"", "durability"]),
        ("sqlite:/a.db?durability=some", &["durability=some"]),
        ("memory:/a", &["takes no path"]),
        ("memory:?limit=lots", &["limit=lots"]),
        ("memory:?size=1", &["\"size\"", "limit"]),
    ] {
        assert_says(&place.refused_source(2, source), words);
    }
    let mountpoint = place.path("mnt");
    let mountpoint = mountpoint.to_str().expect("text");
    for (flags, words) in [
        (&["--bogus"][..], &["--bogus"][..]),
        (
            &["--mode", "sideways"],
            &["sideways", "drain follow snapshot"],
        ),
        (&["--frame", "xml"], &["xml", "line nul file len"]),
        (&["--timeout", "soon"], &["soon", "not a time"]),
        (&["--max-message-size", "0"], &["a size"]),
        (&["-o", "bogus"], &["bogus"]),
        (&["-o", "mode=sideways"], &["sideways"]),
        (&["--daemon", "-o", "bogus"], &["bogus"]),
    ] {
        let args = [flags, &["memory:", mountpoint]].concat();
        assert_says(&place.refused(2, &args), words);
    }
    for args in [
        &["push", "--source", "memory:"][..],
        &["pull", "--source", "sqlite:/a.db", "topic@bogus"],
        &["reset", "--source", "sqlite:/a.db", "a/b"],
        &["dance"],
    ] {
        refusal(2, Command::new(DNPIPES).args(args));
    }
    // Without a command, help is what is wanted.
    assert_eq!(finish(&mut Command::new(DNPIPES)).status.code(), Some(2));
}

/// A /dev that has next to nothing, for a script that runs in a namespace of its own.
const BARE_DEV: &str = r#"
mkdir "$T/dev"
mount -t tmpfs -o mode=755 tmpfs "$T/dev"
for name in null zero urandom; do
    touch "$T/dev/$name"
    mount --bind "/dev/$name" "$T/dev/$name"
done
"#;

const AS_NOBODY: &str = "setpriv --reuid=65534 --regid=65534 --clear-groups";

/// Without /dev/fuse it says so, and what to do.
#[test]
fn without_the_fuse_device_it_says_so() {
    let place = Place::new();
    let output = place.in_private(&format!(
        "{BARE_DEV} mount --rbind $T/dev /dev; exec $T/dnpipes mount memory: $T/mnt"
    ));
    assert_says(
        &said(1, &output),
        &["there is no /dev/fuse", "modprobe fuse"],
    );
}

/// A user who may not open /dev/fuse is told so.
#[test]
fn without_permission_for_the_fuse_device_it_says_so() {
    let place = Place::new();
    let output = place.in_private(&format!(
        "{BARE_DEV} mknod -m 600 $T/dev/fuse c 10 229; mount --rbind $T/dev /dev
         chown 65534:65534 $T/mnt
         exec {AS_NOBODY} $T/dnpipes mount memory: $T/mnt"
    ));
    assert_says(&said(1, &output), &["no permission to open /dev/fuse"]);
}

/// A user who is not root needs fusermount3; without it he is told which package has it.
#[test]
fn a_plain_user_without_fusermount_is_told_so() {
    let place = Place::new();
    let output = place.in_private(&format!(
        "{BARE_DEV} mknod -m 666 $T/dev/fuse c 10 229; mount --rbind $T/dev /dev
         chown 65534:65534 $T/mnt
         mkdir $T/empty
         cp $(command -v setpriv) $(command -v mount) $T
         for folder in /usr/local/bin /usr/local/sbin /usr/sbin /sbin /usr/bin /bin; do
             $T/mount --bind $T/empty $folder
         done
         PATH=$T/empty exec $T/{AS_NOBODY} $T/dnpipes mount memory: $T/mnt"
    ));
    assert_says(&said(1, &output), &["fusermount3", "package fuse3"]);
}

/// A mount answers its own user only, dead or alive: not even root, who is told so.
#[test]
fn another_users_mount_is_named() {
    let place = Place::new();
    let output = place.in_private(&format!(
        "{BARE_DEV} mknod -m 666 $T/dev/fuse c 10 229; mount --bind $T/dev/fuse /dev/fuse
         chown 65534:65534 $T/mnt
         {AS_NOBODY} $T/dnpipes mount memory: $T/mnt 2> /dev/null &
         daemon=$!
         until grep -q $T/mnt /proc/self/mountinfo; do
             [ $SECONDS -lt 20 ] || exit 9
             sleep 0.01
         done
         $T/dnpipes mount memory: $T/mnt || code=$?
         kill -KILL $daemon
         exit $code"
    ));
    assert_says(&said(1, &output), &["another user's dnpipes", "umount"]);
}

/// A user who is not root mounts by fusermount3, pushes, pulls and unmounts.
#[test]
fn a_plain_user_mounts_by_fusermount() {
    let place = Place::new();
    let user = r#"
start() {
    $T/dnpipes mount sqlite:$T/user/pipes.db $T/mnt 2>> $T/user/log &
    daemon=$!
    until [ "$(stat -c %i $T/mnt 2> /dev/null)" = 1 ]; do
        [ $SECONDS -lt 20 ] || exit 9
        kill -0 $daemon || { cat $T/user/log >&2; exit 8; }
        sleep 0.01
    done
}
stop() {
    kill -$1 $daemon
    code=0
    wait $daemon || code=$?
    echo "code $code"
    if [ $1 != KILL ] && grep -q "$T/mnt" /proc/self/mountinfo; then echo still mounted; fi
}
start
echo hello > $T/mnt/topic
cat $T/mnt/topic
stat -c %u $T/mnt/topic
stop TERM
start
stop KILL
start
cat $T/mnt/topic
stop INT
"#;
    let mut file = fs::File::create(place.path("user.sh")).expect("a script");
    file.write_all(user.as_bytes()).expect("a script");
    drop(file);
    let output = place.in_private(&format!(
        "{BARE_DEV} mknod -m 666 $T/dev/fuse c 10 229; mount --bind $T/dev/fuse /dev/fuse
         mkdir $T/user; chown 65534:65534 $T/mnt $T/user
         exec unshare -pf --kill-child {AS_NOBODY} bash -e $T/user.sh"
    ));
    let out = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(
        out, "hello\n65534\ncode 0\ncode 137\nhello\ncode 0\n",
        "{output:?}"
    );
    assert!(output.status.success(), "{output:?}");
}
