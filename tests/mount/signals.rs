//! "A blocked read ends at once with EINTR on any signal that the caller takes, SIGKILL and Ctrl-C included,
//! from any PID namespace, and the message is still there for the next reader."

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::services::Services;
use crate::support::{DNPIPES, Mount, PYTHON, Process, Running, Store, finish, wait_for};

const SIGNALS: [i32; 3] = [libc::SIGINT, libc::SIGTERM, libc::SIGKILL];

/// Any single one, on a machine that is busy with the other tests.
const AT_MOST: Duration = Duration::from_secs(1);

/// The median of several.
const USUALLY: Duration = Duration::from_millis(100);

// Without quotes, as these stand in quotes of two kinds.
const READER: &str = "import os, sys; os.read(os.open(sys.argv[1], os.O_RDONLY), 100)";
const POLLER: &str = "import os, select, sys
poll = select.poll()
poll.register(os.open(sys.argv[1], os.O_RDONLY), select.POLLIN)
poll.poll()";

type Wait = fn(&mut Running) -> Process;

/// Programs that block on an empty pipe, and how that shows.
fn readers() -> Vec<(String, Wait)> {
    let python = |code: &str| format!("{PYTHON} -c \"{code}\" topic@follow");
    vec![
        ("cat topic".to_owned(), Running::blocked),
        ("head -n 1 topic@follow".to_owned(), Running::blocked),
        ("sed -n p topic@follow".to_owned(), Running::blocked),
        (python(READER), Running::blocked),
        (python(POLLER), Running::polling),
    ]
}

/// Sends the signal and returns how long the process took to end.
fn kill(process: &Process, signal: i32) -> Duration {
    let start = Instant::now();
    process.signal(signal);
    let ended = process.ends_within(10 * AT_MOST);
    let took = start.elapsed();
    assert!(
        ended && took < AT_MOST,
        "signal {signal}: it took {took:?} (ended: {ended})"
    );
    took
}

fn assert_usual(what: &str, mut took: Vec<Duration>) {
    took.sort();
    assert!(took[took.len() / 2] < USUALLY, "{what}: {took:?}");
}

/// The kernel looks once more at what is polled when a signal comes: with nothing to read that is no event, and what comes
/// later is one.
#[test]
fn a_signal_during_a_poll_is_no_event() {
    let store = Store::new();
    let broker = Services::start(&["redis"]);
    for source in ["memory:", &store.url(), &broker.url()] {
        let mount = Mount::new(source, &[]);
        let said = mount.python(
            "
            import select, signal
            os.close(os.open('topic', os.O_WRONLY | os.O_CREAT))
            fd = os.open('topic@follow', os.O_RDONLY | os.O_NONBLOCK)
            level, edge, poll = select.epoll(), select.epoll(), select.poll()
            level.register(fd, select.EPOLLIN)
            edge.register(fd, select.EPOLLIN | select.EPOLLET)
            poll.register(fd, select.POLLIN)
            waits = [
                lambda: poll.poll(30),
                lambda: select.select([fd], [], [], 0.03)[0],
                lambda: level.poll(0.03),
                lambda: edge.poll(0.03),
            ]
            signal.signal(signal.SIGALRM, lambda *_: None)
            signal.setitimer(signal.ITIMER_REAL, 0.005, 0.005)
            print([wait() for _ in range(5) for wait in waits if wait()])
            signal.setitimer(signal.ITIMER_REAL, 0)
            with open('topic', 'w') as topic:
                print('hello', file=topic)
            print([len(wait) for wait in (poll.poll(20000), level.poll(20), edge.poll(20))])
            ",
        );
        assert_eq!(said, "[]\n[1, 1, 1]\n", "{source}");
    }
}

/// stat(2) and access(2) have no EINTR, and few programs expect one of open(2).
#[test]
fn signals_fail_no_calls_that_a_broker_answers_soon() {
    let broker = Services::start(&["redis"]);
    let mount = Mount::new(&broker.url(), &[]);
    let said = mount.python(
        "
        import ctypes, errno, signal
        libc = ctypes.CDLL(None, use_errno=True)
        os.close(os.open('topic', os.O_WRONLY | os.O_CREAT))
        hits = []
        signal.signal(signal.SIGALRM, lambda *_: hits.append(None))
        # It fires within calls: each takes some 100 us.
        signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
        failed = []
        for _ in range(4000):
            fd = libc.open(b'topic', os.O_RDONLY)
            if fd < 0:
                failed.append(ctypes.get_errno())
            else:
                os.close(fd)
        signal.setitimer(signal.ITIMER_REAL, 0)
        # A machine that is stopped for longer than a signal is put off may show in one.
        print(len(hits) > 400, len(failed) < 40, set(failed) <= {errno.EINTR})
        ",
    );
    assert_eq!(said, "True True True\n");
}

/// Kills readers that a script runs as `before READER after`, each a few times by each signal.
fn kill_readers(mount: &Mount, before: &str, after: &str, rounds: usize) {
    mount.out("touch topic");
    for (reader, wait) in readers() {
        for signal in SIGNALS {
            let took = (0..rounds).map(|_| {
                let mut running = mount.spawn(&format!("{before}{reader}{after}"));
                let process = wait(&mut running);
                let took = kill(&process, signal);
                let output = running.finish();
                assert!(output.stdout.is_empty(), "{reader} has read: {output:?}");
                if before == "exec " {
                    assert_eq!(output.status.signal(), Some(signal), "{reader}: {output:?}");
                }
                took
            });
            assert_usual(&format!("{reader}, signal {signal}"), took.collect());
        }
    }
    assert_works(mount);
}

/// Push, pull, and a new blocked reader that is woken.
fn assert_works(mount: &Mount) {
    mount.out("touch works; truncate -s 0 works");
    let mut blocked = mount.spawn("cat works");
    blocked.wait_until_blocked();
    mount.out("echo hello > works");
    assert_eq!(blocked.finish().stdout, b"hello\n");
    assert_eq!(mount.out("cat works"), "hello\n");
}

/// "A blocked read ends at once with EINTR on any signal that the caller takes, SIGKILL and Ctrl-C included".
#[test]
fn blocked_readers_end_at_any_signal() {
    kill_readers(&Mount::memory(&[]), "exec ", "", 5);
    let store = Store::new();
    kill_readers(&Mount::new(&store.url(), &[]), "exec ", "", 3);
}

/// "from any PID namespace": the reader is in another one.
#[test]
fn readers_in_another_pid_namespace_end_at_any_signal() {
    let mount = Mount::memory(&[]);
    // The first process of a namespace takes no SIGTERM; so the reader is the second.
    kill_readers(&mount, "unshare -pf --kill-child sh -c '", "; :'", 3);
}

/// "from any PID namespace": the reader is in another one, with a /proc of its own.
#[test]
fn readers_in_a_container_end_at_any_signal() {
    let mount = Mount::memory(&[]);
    let wrapper = "unshare -pf --kill-child --mount-proc sh -c '";
    kill_readers(&mount, wrapper, "; :'", 3);
}

/// "from any PID namespace": the daemon is in another one, so that the kernel tells it no number for the
/// reader; then both, in two of them.
#[test]
fn a_daemon_in_another_pid_namespace_ends_blocked_readers() {
    let mount = Mount::within(&["unshare", "-pf", "--kill-child"], "memory:", &[]);
    kill_readers(&mount, "exec ", "", 3);
    kill_readers(&mount, "unshare -pf --kill-child sh -c '", "; :'", 1);
}

/// Writes its arguments to `topic`, each by one write(2), and prints how each went.
const WRITER: &str = "
import errno, os, sys
fd = os.open('topic', os.O_WRONLY)
for text in sys.argv[1:]:
    try:
        print(os.write(fd, text.encode() + b'\\n'))
    except OSError as error:
        print(errno.errorcode[error.errno])
";

fn write(texts: &str) -> String {
    format!("exec {PYTHON} -c \"{WRITER}\" {texts}")
}

/// "the call can be interrupted (EINTR) at any moment": a push behind a store that another process keeps for
/// itself; what was interrupted is not stored later, and the next push is.
#[test]
fn a_writer_behind_a_stuck_store_ends_at_any_signal() {
    let store = Store::new();
    let mount = Mount::new(&store.fast_url(), &[]);
    mount.out("touch topic; echo readable > other");
    let mut pushed = Vec::new();
    let mut took = Vec::new();
    for signal in SIGNALS {
        for round in 0..5 {
            let held = store.hold();
            let mut writer = mount.spawn(&write("interrupted"));
            let process = writer.blocked();
            assert_eq!(mount.out("cat other"), "readable\n");
            took.push(kill(&process, signal));
            let output = writer.finish();
            assert_eq!(output.status.signal(), Some(signal), "{output:?}");
            drop(held);
            let next = format!("{signal}.{round}");
            assert_eq!(
                mount.out(&write(&next)).trim(),
                (next.len() + 1).to_string()
            );
            pushed.push(next);
        }
    }
    assert_eq!(mount.lines("topic"), pushed);
    assert_usual("a blocked writer", took);
    assert_works(&mount);
}

/// "retried with backoff until `--timeout`, then ETIMEDOUT": and what timed out is not stored later.
#[test]
fn a_writer_behind_a_stuck_store_times_out() {
    let store = Store::new();
    let mount = Mount::new(&store.fast_url(), &["--timeout", "1s"]);
    mount.out("touch topic");
    let held = store.hold();
    let start = Instant::now();
    assert_eq!(mount.out(&write("late later")), "ETIMEDOUT\nETIMEDOUT\n");
    let took = start.elapsed();
    assert!(
        (2..10).contains(&took.as_secs()),
        "two pushes of 1s each took {took:?}"
    );
    let output = mount.sh("echo refused > topic");
    assert!(!output.status.success());
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("Connection timed out"), "{said}");
    drop(held);
    assert_eq!(mount.out(&write("next")), "5\n");
    assert_eq!(mount.lines("topic"), ["next"]);
    assert!(
        mount.log().contains("no answer within 1s"),
        "{}",
        mount.log()
    );
}

/// While it was stopped (SIGSTOP, a paused machine) it has not tried.
#[test]
fn a_daemon_that_was_stopped_until_behind_the_deadline_tries_again() {
    let store = Store::new();
    let mount = Mount::new(&store.url(), &["--timeout", "1s"]);
    mount.out("touch topic");
    let held = store.hold();
    let mut writer = mount.spawn("echo line > topic && echo stored");
    writer.wait_until_blocked();
    let begun = Instant::now();
    mount.signal(libc::SIGSTOP);
    wait_for("the deadline", || {
        (begun.elapsed() > Duration::from_secs(2)).then_some(())
    });
    drop(held);
    mount.signal(libc::SIGCONT);
    let output = writer.finish();
    assert_eq!(output.stdout, b"stored\n", "{output:?}");
    assert_eq!(mount.lines("topic"), ["line"]);
}

/// "truncate to 0: reset; returns when it has completed": one that was interrupted, or failed with ETIMEDOUT,
/// drops nothing later, least of all what was pushed after its failure.
#[test]
fn a_reset_that_failed_is_not_done_later() {
    let store = Store::new();
    let mount = Mount::new(&store.fast_url(), &["--timeout", "1s"]);
    mount.out("echo kept > topic");
    let held = store.hold();
    let output = mount.sh("truncate -s 0 topic");
    assert!(!output.status.success());
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("Connection timed out"), "{said}");
    let mut interrupted = mount.spawn("exec truncate -s 0 topic");
    let process = interrupted.blocked();
    kill(&process, libc::SIGTERM);
    interrupted.finish();
    drop(held);
    mount.out("echo next > topic");
    assert_eq!(mount.lines("topic"), ["kept", "next"]);
}

/// The same: what was pushed, and acknowledged, after the resets had failed stays.
#[test]
fn a_reset_that_failed_drops_no_later_push() {
    let store = Store::new();
    let mount = Mount::new(&store.fast_url(), &["--timeout", "1s"]);
    mount.out("touch topic");
    let held = store.hold();
    // Files of their own, as the kernel lets the truncations of one file wait for each other.
    let modes = ["drain", "follow", "snapshot"];
    let names = modes
        .map(|mode| ["line", "nul", "file", "len"].map(|frame| format!("topic@{mode},{frame}")));
    let resets: Vec<Running> = names
        .iter()
        .flatten()
        .map(|name| mount.spawn(&format!("exec truncate -s 0 {name}")))
        .collect();
    for reset in resets {
        assert!(!reset.finish().status.success());
    }
    let numbers: Vec<String> = (0..50).map(|number| number.to_string()).collect();
    let mut writer = mount.spawn(&write(&numbers.join(" ")));
    writer.wait_until_blocked();
    drop(held);
    let output = writer.finish();
    let acknowledged = String::from_utf8(output.stdout).expect("text");
    assert!(!acknowledged.contains('E'), "{acknowledged}");
    assert_eq!(mount.lines("topic"), numbers);
}

/// A store whose right to write another process keeps can still be mounted and read; only what writes waits,
/// until `--timeout`.
#[test]
fn a_stuck_store_can_be_mounted_and_read() {
    let store = Store::new();
    assert!(store.run(&["push", "topic", "first"]).status.success());
    let _held = store.hold();
    let mount = Mount::new(&store.url(), &["--timeout", "1s"]);
    assert_eq!(mount.out("cat topic; ls"), "first\ntopic\n");
    let output = mount.sh("echo second > topic");
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(errors.contains("timed out"), "{errors}");
    assert_eq!(mount.lines("topic"), ["first"]);
}

/// A store that another process is making and keeps for itself: a mount of it gives up in time, and SIGTERM
/// ends it before.
#[test]
fn mounting_a_store_that_is_being_made_ends_in_time() {
    let store = Store::new();
    for name in ["pipes.db", "pipes.db-bell"] {
        fs::write(store.folder().join(name), "").expect("a file");
    }
    let _held = store.hold();
    let folder = tempfile::tempdir().expect("a folder");
    let mount = || {
        let mut command = Command::new(DNPIPES);
        command.arg("mount").arg(store.url()).arg(folder.path());
        Running::start(&mut command)
    };
    let waiting = mount();
    let process = Process::open(waiting.pid()).expect("dnpipes");
    process.signal(libc::SIGTERM);
    assert!(process.ends_within(Duration::from_secs(2)), "by SIGTERM");
    drop(waiting);
    let output = mount().finish();
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        !output.status.success() && errors.contains("keeps the turn"),
        "{errors}"
    );
}

/// "the call can be interrupted at any moment": so a daemon behind a stuck store ends at SIGTERM, though an
/// open file has a line that it cannot push.
#[test]
fn a_daemon_behind_a_stuck_store_ends_at_sigterm() {
    let store = Store::new();
    let mut mount = Mount::new(&store.fast_url(), &["--timeout", "1s"]);
    mount.out("touch topic");
    // A shell would close a copy of the descriptor, and the line with it.
    let script = "import os, time
os.write(os.open('topic', os.O_WRONLY), b'partial')
print('written', flush=True)
time.sleep(1000)";
    let mut writer = mount.spawn(&format!("exec {PYTHON} -c \"{script}\""));
    assert_eq!(writer.line(), "written");
    let _held = store.hold();
    let start = Instant::now();
    assert_eq!(mount.stop().code(), Some(0), "{}", mount.log());
    assert!(start.elapsed() < Duration::from_secs(10));
    assert!(!mount.is_live());
}

const MESSAGES: usize = 10_000;

/// Reads by read(2) itself, because Python repeats an interrupted one, and prints what it read; on standard
/// error, how often it was interrupted.
const INTERRUPTED_READER: &str = "
import ctypes, errno, os, signal, sys
signal.signal(signal.SIGUSR1, lambda *_: None)
signal.siginterrupt(signal.SIGUSR1, True)
libc = ctypes.CDLL(None, use_errno=True)
fd = os.open('topic@follow', os.O_RDONLY)
buffer = ctypes.create_string_buffer(4096)
lines = interrupts = 0
print('ready', flush=True)
while lines < int(sys.argv[1]):
    count = libc.read(fd, buffer, len(buffer))
    if count < 0:
        if ctypes.get_errno() != errno.EINTR:
            sys.exit(os.strerror(ctypes.get_errno()))
        interrupts += 1
        continue
    lines += buffer.raw[:count].count(10)
    sys.stdout.buffer.write(buffer.raw[:count])
# Not ignored: Python complains of one that has arrived already.
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
print(interrupts, file=sys.stderr)
";

/// Pushes so many numbered messages, pausing now and then so that the reader comes to wait.
const NUMBERS: &str = "
import os, sys, time
fd = os.open('topic', os.O_WRONLY)
for number in range(int(sys.argv[1])):
    os.write(fd, b'%d\\n' % number)
    if number % 8 == 0:
        time.sleep(0.0003)
";

/// "and the message is still there for the next reader": a reader that is peppered with signals loses none of
/// 10,000 messages, gets none twice, and all in order.
#[test]
fn signals_lose_and_double_nothing() {
    let store = Store::new();
    for source in ["memory:", &store.fast_url()] {
        let mount = Mount::new(source, &[]);
        mount.out("touch topic");
        let mut reader = mount.spawn(&format!(
            "exec {PYTHON} -c \"{INTERRUPTED_READER}\" {MESSAGES}"
        ));
        assert_eq!(reader.line(), "ready");
        let process = Process::open(reader.pid()).expect("the reader");
        let mut writer = Command::new(PYTHON);
        writer
            .args(["-c", NUMBERS, &MESSAGES.to_string()])
            .current_dir(mount.dir())
            .stdout(Stdio::null());
        thread::scope(|scope| {
            let pushed = scope.spawn(move || finish(&mut writer));
            while !pushed.is_finished() {
                process.signal(libc::SIGUSR1);
                thread::sleep(Duration::from_micros(200));
            }
            let pushed = pushed.join().expect("the writer");
            assert!(pushed.status.success(), "{pushed:?}");
        });
        let output = reader.finish();
        assert!(output.status.success(), "{output:?}");
        let expected: String = (0..MESSAGES).map(|number| format!("{number}\n")).collect();
        assert!(
            output.stdout == expected.as_bytes(),
            "{source}: {} bytes read, {} expected",
            output.stdout.len(),
            expected.len()
        );
        let interrupts = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        let count: usize = interrupts.parse().expect("a count");
        assert!(count >= 10, "only {count} reads were interrupted");
    }
}

/// Pushes so many numbered messages by writes that Python repeats where a signal interrupts them (PEP 475).
const INTERRUPTED_WRITER: &str = "
import os, signal, sys
signal.signal(signal.SIGUSR1, lambda *_: None)
fd = os.open('topic', os.O_WRONLY)
print('ready', flush=True)
for number in range(int(sys.argv[1])):
    os.write(fd, b'%d\\n' % number)
signal.signal(signal.SIGUSR1, signal.SIG_IGN)
";

/// "A retry never makes a duplicate": a program that repeats a write that a signal interrupted, as most do,
/// has pushed once; also while another process keeps the store for itself time and again.
#[test]
fn a_write_that_is_repeated_after_a_signal_is_stored_once() {
    const COUNT: usize = 150;
    let store = Store::new();
    let mount = Mount::new(&store.url(), &[]);
    mount.out("touch topic");
    let mut writer = mount.spawn(&format!(
        "exec {PYTHON} -c \"{INTERRUPTED_WRITER}\" {COUNT}"
    ));
    assert_eq!(writer.line(), "ready");
    let process = Process::open(writer.pid()).expect("the writer");
    let mut round = 0;
    while !process.ends_within(Duration::ZERO) {
        let held = store.hold();
        round += 1;
        let until = Instant::now() + Duration::from_millis(45 + round % 15);
        while Instant::now() < until {
            process.signal(libc::SIGUSR1);
            thread::sleep(Duration::from_millis(1));
        }
        drop(held);
        thread::sleep(Duration::from_millis(1));
        assert!(round < 1000, "the writer does not get on");
    }
    let output = writer.finish();
    assert!(output.status.success(), "{output:?}");
    let mut stored = mount.lines("topic");
    let all = stored.clone();
    stored.dedup();
    let expected: Vec<String> = (0..COUNT).map(|number| number.to_string()).collect();
    assert_eq!(stored, expected, "lost or out of order");
    assert_eq!(
        all.len(),
        COUNT,
        "some of the {COUNT} messages are stored twice, after {round} rounds"
    );
}
