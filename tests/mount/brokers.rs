//! Mounts of brokers, and what becomes of their pipes when those are killed, paused or cut off: the same tests
//! for each.

use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::gateway::{Gateway, free_port};
use crate::load::{Work, Writers, assert_complete, follow, read_lines};
use crate::network::Hosts;
use crate::services::Services;
use crate::support::{DNPIPES, Mount, Running, Store, finish, wait_for};

const SINGLE: Work = Work::single(2000);
const LARGE: Work = Work::large(40);

/// Two writers and two readers on each of two mounts.
struct Load<'a> {
    work: Work,
    mounts: &'a [Mount; 2],
    readers: Vec<Running>,
    writers: Writers<'a>,
}

impl<'a> Load<'a> {
    fn start(store: &'a Store, mounts: &'a [Mount; 2], work: Work) -> Self {
        // Whoever has just been started may not have found its leader yet.
        wait_for("the pipe", || {
            mounts[0].sh("touch topic").status.success().then_some(())
        });
        let [one, two] = mounts;
        let four = [one, two, one, two];
        let reader = |mount: &&Mount| follow(mount, 4 * work.lines);
        Load {
            work,
            mounts,
            readers: four.iter().map(reader).collect(),
            writers: Writers::start(store, &four, work),
        }
    }

    /// All writers go on to their end without an error, and all readers have seen all of it, once and in
    /// one order.
    fn finish(self) {
        self.writers.finish();
        let stored = self.mounts[0].lines("topic");
        assert_complete(&stored, 4, self.work);
        for reader in self.readers {
            assert_eq!(read_lines(reader), stored);
        }
    }

    /// Waits until both mounts have given a push up and try it again.
    fn await_repeated_pushes(&self) {
        self.writers.release();
        for mount in self.mounts {
            wait_for("a repeated push", || {
                mount.log().contains("pushing to topic").then_some(())
            });
        }
    }
}

fn two_mounts(source: &str, flags: &[&str]) -> [Mount; 2] {
    [Mount::new(source, flags), Mount::new(source, flags)]
}

fn share_a_pipe(kind: &str) {
    let services = Services::start(&[kind]);
    let [one, two] = two_mounts(&services.url(), &[]);
    one.out("echo a > topic; printf b > topic; printf 'c\\nd\\n' >> topic");
    assert_eq!(two.out("cat topic"), "a\nb\nc\nd\n");
    assert_eq!(
        two.out("ls; wc -l < topic; tail -n 1 topic"),
        "topic\n4\nd\n"
    );
    for mount in [&one, &two] {
        assert_eq!(mount.out("stat -c %s topic"), "8\n");
    }
    let reader = two.spawn("exec head -n 6 topic@follow");
    one.out("echo e > topic; echo f > topic");
    assert_eq!(read_lines(reader), ["a", "b", "c", "d", "e", "f"]);
    two.out("truncate -s 0 topic; echo new > topic");
    assert_eq!(one.out("cat topic"), "new\n");
    one.out("seq 100000 > many");
    assert_eq!(
        two.out("cat many | sha256sum"),
        one.out("seq 100000 | sha256sum")
    );
}

/// What a look-up told of a pipe holds for a moment; another mount may remove it in that, and yet who writes makes it.
fn made_again(kind: &str) {
    let services = Services::start(&[kind]);
    let [one, two] = two_mounts(&services.url(), &["--allow-delete"]);
    let made = one.python(&format!(
        "
        there = os.path.join({:?}, 'topic')
        for _ in range(60):
            file = os.open('topic', os.O_RDWR | os.O_CREAT)
            os.write(file, b'line\\n')
            os.close(file)
            os.stat('topic')
            os.unlink(there)
        print('made')
        ",
        two.dir()
    ));
    assert_eq!(made, "made\n");
    wait_for("the news of the last removal", || {
        one.out("ls").is_empty().then_some(())
    });
}

/// What readers on one mount have in their buffers is gone once the other has reset the pipe. `meanwhile` is done
/// before that.
pub(crate) fn a_reset_reaches_buffers(services: &Services, meanwhile: impl FnOnce()) {
    let [one, two] = two_mounts(&services.url(), &[]);
    one.out("touch go; seq 1000 > topic");
    // They hold most of the pipe when the reset comes. Nobody looks at it by that mount then; they look by
    // themselves only after 5 seconds.
    let mut readers = two.spawn_python(
        "
        import time
        readers = [os.open('topic@follow', os.O_RDONLY) for _ in range(60)]
        for reader in readers:
            while os.read(reader, 2) != b'9\\n':
                pass
        go = open('go')
        print('ready', flush=True)
        go.readline()
        for reader in readers:
            told = os.read(reader, 6) == b'after\\n'
            if told:
                break
            time.sleep(0.05)
        print('told' if told else 'not told', flush=True)
        ",
    );
    assert_eq!(readers.line(), "ready");
    meanwhile();
    one.out("truncate -s 0 topic; echo after > topic; echo go > go");
    assert_eq!(readers.line(), "told");
}

/// All that is done to pipes is done on two mounts, and their logs have nothing to say.
pub(crate) fn works_without_a_complaint(source: &str) {
    let mount = Mount::new(source, &["--allow-delete"]);
    let other = Mount::new(source, &[]);
    mount.out("touch topic");
    let reader = other.spawn("exec grep -m 1 after topic@follow");
    mount.out("seq 3000 > topic; sync topic; cat topic > /dev/null; truncate -s 0 topic");
    mount.out("echo after > topic");
    assert_eq!(reader.finish().stdout, b"after\n");
    mount.out("ls -l > /dev/null; rm topic; echo again > topic");
    assert_eq!(mount.out("cat topic"), "again\n");
    for log in [mount.log(), other.log()] {
        assert!(
            !log.contains("ERROR") && !log.contains("WARN") && !log.contains("no word"),
            "{log}"
        );
    }
}

fn needs_no_more_rights_than_the_readme_says(kind: &str) {
    let readme = include_str!("../../README.md");
    let rights = readme.split_once("\n  permissions: {\n");
    let rights = rights.and_then(|(_, rest)| rest.split_once("\n  }\n"));
    let (rights, _) = rights.expect("the rights of a user");
    let users = format!(
        "authorization {{ users: [ {{ user: pipes, password: s3cret, permissions: {{\n{rights}\n}} }} ] }}"
    );
    let services = Services::start(&[kind, "--set", &users]);
    let server = services.server();
    works_without_a_complaint(&server.url.replace("//", "//pipes:s3cret@"));
    let log = fs::read_to_string(server.folder.join("log")).expect("the server's log");
    assert!(!log.contains("Violation"), "{log}");
}

fn killed_under_load(kind: &str, work: Work) {
    let store = Store::new();
    let services = Services::start(&[kind]);
    let name = services.server().name;
    let mounts = two_mounts(&services.url(), &[]);
    let load = Load::start(&store, &mounts, work);
    for kill in 1..=4 {
        load.writers.await_acknowledged(kill * work.lines / 6);
        services.tell("kill", &name);
        services.tell("start", &name);
    }
    load.finish();
}

fn paused_under_load(kind: &str, work: Work) {
    let store = Store::new();
    let services = Services::start(&[kind]);
    let name = services.server().name;
    let mounts = two_mounts(&services.url(), &[]);
    let load = Load::start(&store, &mounts, work);
    load.writers.await_acknowledged(work.lines / 4);
    services.tell("stop", &name);
    // Ten seconds: then the pushes under way are given up and sent again, and both may arrive.
    load.await_repeated_pushes();
    services.tell("cont", &name);
    load.finish();
}

/// A write of which nobody knew what became of it, then a reset, by the writer or by others, and then the same write: it
/// is there.
fn written_again_after_a_reset(kind: &str) {
    let services = Services::start(&[kind]);
    let (server, url) = (services.server().name, services.url());
    for by_others in [false, true] {
        let mount = Mount::new(&url, &["--timeout", "1s", "--allow-delete"]);
        mount.out("echo first > topic");
        let mut writer = mount.spawn_python(
            r"
            import signal
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1, signal.SIGUSR2])
            fd = os.open('topic', os.O_WRONLY)
            print('open', flush=True)
            signal.sigwait([signal.SIGUSR1])
            print(why(os.write, fd, b'line\n'), flush=True)
            if signal.sigwait([signal.SIGUSR1, signal.SIGUSR2]) == signal.SIGUSR1:
                os.ftruncate(fd, 0)
            print(why(os.write, fd, b'line\n'), flush=True)
            ",
        );
        assert_eq!(writer.line(), "open");
        services.tell("stop", &server);
        writer.signal(libc::SIGUSR1);
        assert_eq!(writer.line(), "ETIMEDOUT");
        services.tell("cont", &server);
        wait_for("what was written", || {
            let read = mount.sh("cat topic@snapshot");
            (read.stdout == b"first\nline\n").then_some(())
        });
        if by_others {
            let mut reset = Command::new(DNPIPES);
            let reset = finish(reset.args(["reset", "--source", &url, "topic"]));
            assert!(reset.status.success(), "{reset:?}");
        }
        writer.signal(if by_others {
            libc::SIGUSR2
        } else {
            libc::SIGUSR1
        });
        assert_eq!(writer.line(), "ok");
        assert_eq!(mount.lines("topic"), ["line"], "by others: {by_others}");
        mount.out("rm topic");
    }
}

/// Whoever resets by a gateway is told at once, also where nobody reads the pipe by that.
fn reset_by_a_gateway(kind: &str) {
    let services = Services::start(&[kind]);
    let gateway = Gateway::start(&services.url(), &[]);
    let mount = Mount::new(gateway.url(), &[]);
    mount.out(&format!("seq -f '%g {}' 3000 > topic", "x".repeat(1000)));
    let rest = mount.python(
        r"
        fd = os.open('topic@snapshot', os.O_RDONLY)
        os.read(fd, 20)
        os.truncate('topic', 0)
        print(os.read(fd, 2000).strip(b'x\n'))
        ",
    );
    // Of the line that was begun.
    assert_eq!(rest, "b''\n");
    let floor = mount.out(&format!(
        "echo again > topic; curl -fsS -X DELETE {}v1/pipes/topic/messages",
        gateway.url()
    ));
    assert!(!floor.contains("0-0"), "{floor}");
}

/// A broker on the far host, and mounts of it on the near one.
fn apart(kind: &str, flags: &[&str]) -> (Hosts, Services, [Mount; 2]) {
    let hosts = Hosts::new();
    let port = free_port().to_string();
    let far = Hosts::on(&hosts.far).join(" ");
    let services = Services::start(&[kind, "--bind", Hosts::FAR, "--port", &port, "--wrap", &far]);
    let [nsenter, near] = Hosts::on(&hosts.near);
    let mounts = [(); 2].map(|()| Mount::within(&[&nsenter, &near], &services.url(), flags));
    (hosts, services, mounts)
}

fn cut_off_under_load(kind: &str, target: &str, work: Work) {
    let store = Store::new();
    let (hosts, _services, mounts) = apart(kind, &[]);
    let load = Load::start(&store, &mounts, work);
    load.writers.await_acknowledged(work.lines / 4);
    hosts.cut(target);
    load.await_repeated_pushes();
    hosts.heal(target);
    load.finish();
}

/// Whoever waits for a message waits, however long nobody can be asked for one.
fn waits_for_ever(kind: &str) {
    let services = Services::start(&[kind]);
    let name = services.server().name;
    let mount = Mount::new(&services.url(), &["--timeout", "1s"]);
    mount.out("echo first > topic; touch empty");
    let mut follower = mount.spawn("exec cat topic@follow");
    assert_eq!(follower.line(), "first");
    let mut first = mount.spawn("exec cat empty");
    first.wait_until_blocked();
    let mut pull = Command::new(DNPIPES);
    pull.args(["pull", "--source", &services.url(), "topic@follow"]);
    let mut pull = Running::start(&mut pull);
    assert_eq!(pull.line(), "first");
    services.tell("kill", &name);
    for reading in ["reading topic", "reading empty"] {
        wait_for("the outage", || mount.log().contains(reading).then_some(()));
    }
    // Twice as long as a write is tried.
    for _ in 0..2 {
        assert!(!mount.sh("echo lost > topic").status.success());
    }
    services.tell("start", &name);
    mount.out("echo after > topic; echo after > empty");
    assert_eq!(follower.line(), "after");
    assert_eq!(pull.line(), "after");
    assert_eq!(first.finish().stdout, b"after\n");
}

/// SIGTERM frees the mountpoint at once, whatever unfinished lines wait for, and the daemon gives those up in time.
fn ends_while_away(kind: &str) {
    let services = Services::start(&[kind]);
    let name = services.server().name;
    let mut mount = Mount::new(&services.url(), &["--timeout", "0"]);
    mount.out("touch a b c");
    let mut writer = mount.spawn_python(
        "
        import time
        files = [open(name, 'wb', buffering=0) for name in 'abc']
        for file in files:
            file.write(b'unfinished')
        print('written', flush=True)
        time.sleep(1000)
        ",
    );
    assert_eq!(writer.line(), "written");
    services.tell("stop", &name);
    let since = Instant::now();
    mount.signal(libc::SIGTERM);
    wait_for("the mountpoint", || {
        fs::remove_dir(mount.dir()).is_ok().then_some(())
    });
    let freed = since.elapsed();
    assert!(freed < Duration::from_secs(2), "{freed:?}");
    assert_eq!(mount.wait().code(), Some(0), "{}", mount.log());
    let ended = since.elapsed();
    assert!(ended < Duration::from_secs(9), "{ended:?}");
    assert_eq!(mount.log().matches("is given up").count(), 3);
}

/// Who did not wait for a broker while it was away hears of it no more when it is back.
fn is_forgiven(kind: &str) {
    let services = Services::start(&[kind]);
    let name = services.server().name;
    let mount = Mount::new(&services.url(), &["--timeout", "1500ms"]);
    mount.out("echo first > topic; touch p{1..8}");
    let mut reader = mount.spawn_python(
        "
        import select, signal, time
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
        fd = os.open('topic', os.O_RDONLY | os.O_NONBLOCK)
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        many = select.poll()
        for number in range(1, 9):
            many.register(os.open(f'p{number}@follow', os.O_RDONLY | os.O_NONBLOCK), select.POLLIN)
        def read():
            try:
                return os.read(fd, 100)
            except OSError as error:
                return errno.errorcode[error.errno]
        poll.poll()
        print(read(), read(), flush=True)
        signal.sigwait([signal.SIGUSR1])
        since, whys = time.monotonic(), set()
        while time.monotonic() - since < 6:
            whys.add(str(read()))
            whys.add(str(poll.poll(0)))
        since = time.monotonic()
        many.poll(0)
        whys.add(str(time.monotonic() - since < 4))
        print(*sorted(whys), flush=True)
        signal.sigwait([signal.SIGUSR1])
        while True:
            poll.poll()
            said = read()
            if said != 'EAGAIN':
                break
        print(said, flush=True)
        ",
    );
    assert_eq!(reader.line(), "b'first\\n' b''");
    services.tell("stop", &name);
    reader.signal(libc::SIGUSR1);
    // Nor does who asks many files wait for each of them.
    assert_eq!(reader.line(), "EAGAIN True []");
    services.tell("cont", &name);
    reader.signal(libc::SIGUSR1);
    assert_eq!(reader.line(), "b''");
}

/// Who asks not to wait does not wait for a broker either that does not answer.
fn does_not_wait(kind: &str) {
    let services = Services::start(&[kind]);
    let name = services.server().name;
    let mount = Mount::new(&services.url(), &[]);
    mount.out("echo first > topic");
    let mut reader = mount.spawn_python(
        "
        import select, signal, time
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
        fd = os.open('topic@follow', os.O_RDONLY | os.O_NONBLOCK)
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        poll.poll()
        print(os.read(fd, 100), flush=True)
        signal.sigwait([signal.SIGUSR1])
        since = time.monotonic()
        print([poll.poll(0), why(os.read, fd, 100), poll.poll(0), why(os.read, fd, 100)], flush=True)
        print(time.monotonic() - since < 3, flush=True)
        signal.sigwait([signal.SIGUSR1])
        while True:
            poll.poll()
            if why(lambda: print(os.read(fd, 100), flush=True)) == 'ok':
                break
        ",
    );
    assert_eq!(reader.line(), "b'first\\n'");
    services.tell("stop", &name);
    reader.signal(libc::SIGUSR1);
    assert_eq!(reader.line(), "[[], 'EAGAIN', [], 'EAGAIN']");
    assert_eq!(reader.line(), "True");
    services.tell("cont", &name);
    mount.out("echo after > topic");
    reader.signal(libc::SIGUSR1);
    assert_eq!(reader.line(), "b'after\\n'");
}

fn times_out(kind: &str) {
    for target in ["DROP", "REJECT"] {
        let (hosts, _services, mounts) = apart(kind, &["--timeout", "2s"]);
        mounts[0].out("echo first > topic; touch p{01..12}");
        let mut blocked = mounts[1].spawn("exec tail -n +2 topic@follow");
        blocked.wait_until_blocked();
        hosts.cut(target);
        let since = Instant::now();
        let written = mounts[0].python(
            "
            print(why(lambda: os.write(os.open('topic', os.O_WRONLY), b'second\\n')))
            ",
        );
        assert_eq!(written, "ETIMEDOUT\n", "{target}: {}", mounts[0].log());
        let waited = since.elapsed();
        assert!(waited < Duration::from_secs(10), "{target}: {waited:?}");
        // `ls` answers from what is known, and whoever is blocked can be killed.
        let since = Instant::now();
        assert_eq!(mounts[0].out("ls topic"), "topic\n");
        // Also of many: they do not wait one after the other.
        assert_eq!(mounts[0].out("ls -l | grep -c ' p'"), "12\n");
        assert!(since.elapsed() < Duration::from_secs(8));
        let mut writer = mounts[0].spawn("echo third > topic");
        writer.wait_until_blocked();
        for process in [&mut blocked, &mut writer] {
            process.signal(libc::SIGKILL);
            wait_for("its end", || (!process.is_running()).then_some(()));
        }
        hosts.heal(target);
        let mut tries = 0;
        let last = wait_for("the pipe's return", || {
            tries += 1;
            let last = format!("last {tries}");
            let pushed = mounts[0].sh(&format!("echo {last} > topic"));
            pushed.status.success().then_some(last)
        });
        // The other one finds out by itself that its connection is dead.
        let mut lines = wait_for("the pipe's return on the other mount", || {
            let read = mounts[1].sh("cat topic@snapshot");
            let text = String::from_utf8(read.stdout).expect("text");
            let lines: Vec<String> = text.lines().map(str::to_owned).collect();
            read.status.success().then_some(lines)
        });
        // What timed out may have arrived, once, and late: the kernel goes on sending what a closed connection holds.
        let told = lines.clone();
        lines.sort_unstable();
        lines.dedup();
        assert_eq!(lines.len(), told.len(), "{told:?}");
        assert_eq!(told.first().map(String::as_str), Some("first"));
        lines.retain(|line| line == "first" || *line == last);
        assert_eq!(lines, ["first", &last], "{told:?}");
    }
}

/// The kernel lets one writer at a time append, and whoever waits for that cannot be killed: they wait in the mount.
fn appends_while_away(kind: &str) {
    let services = Services::start(&[kind]);
    let name = services.server().name;
    let mount = |timeout| Mount::new(&services.url(), &["--timeout", timeout]);
    let (hasty, patient) = (mount("3s"), mount("60s"));
    hasty.out("touch topic");
    patient.out("touch other");
    let mut open = hasty.spawn_python(
        "
        import signal, threading
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        files = [os.open('topic', os.O_WRONLY | os.O_APPEND) for _ in range(12)]
        print('ready', flush=True)
        signal.sigwait({signal.SIGUSR1})
        whys = []
        append = lambda file, text: whys.append(why(lambda: os.write(file, text)))
        texts = [b'line\\n', b'line\\n', b'begun']
        threads = [threading.Thread(target=append, args=each) for each in zip(files, 4 * texts)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        print(*sorted(whys), flush=True)
        ",
    );
    assert_eq!(open.line(), "ready");
    services.tell("stop", &name);
    // Those that come together time out together, and not one after the other, whether their files were open already
    let since = Instant::now();
    open.signal(libc::SIGUSR1);
    assert_eq!(
        open.line(),
        [["ETIMEDOUT"; 8].join(" "), ["ok"; 4].join(" ")].join(" ")
    );
    let took = since.elapsed();
    assert!(took < Duration::from_secs(15), "{took:?}");
    // or not.
    let since = Instant::now();
    let writers: Vec<Running> = (0..8).map(|_| hasty.spawn("echo line >> topic")).collect();
    for writer in writers {
        let output = writer.finish();
        let why = String::from_utf8_lossy(&output.stderr);
        assert!(why.contains("Connection timed out"), "{why}");
    }
    let took = since.elapsed();
    assert!(took < Duration::from_secs(15), "{took:?}");
    // Those that come one by one can be killed.
    let mut late = [(); 4].map(|()| {
        let mut writer = patient.spawn("echo late >> other");
        writer.wait_until_opening();
        writer
    });
    let [killed, others @ ..] = &mut late;
    killed.signal(libc::SIGKILL);
    wait_for("its end", || (!killed.is_running()).then_some(()));
    services.tell("cont", &name);
    for writer in others {
        wait_for("the others' end", || (!writer.is_running()).then_some(()));
    }
    assert_eq!(patient.lines("other"), ["late"; 3]);
}

/// The servers are found by DNS, anew at each connection.
fn found_by_dns(kind: &str, scheme: &str) {
    let hosts = Hosts::new();
    let [nsenter, net] = Hosts::on(&hosts.far);
    let start = |port: &str| {
        let wrap = format!("{nsenter} {net}");
        Services::start(&[kind, "--bind", Hosts::FAR, "--port", port, "--wrap", &wrap])
    };
    let (first, second) = (free_port().to_string(), free_port().to_string());
    // What resolves names for whoever is on the far host.
    let folder = tempfile::tempdir().expect("a folder");
    let resolv = folder.path().join("resolv.conf");
    fs::write(&resolv, format!("nameserver {}\n", Hosts::FAR)).expect("its file");
    let dns = |port: &str| {
        let record = format!("--srv-host=_{scheme}._tcp.pipes.test,server.pipes.test,{port},10,1");
        let mut command = Command::new(&nsenter);
        command.args([
            &net,
            "dnsmasq",
            "--keep-in-foreground",
            "--no-hosts",
            "--no-resolv",
        ]);
        command.args([
            "--conf-file=/dev/null",
            "--pid-file=",
            "--user=root",
            "--bind-interfaces",
        ]);
        command
            .arg(format!("--listen-address={}", Hosts::FAR))
            .arg(record);
        command.arg(format!("--address=/server.pipes.test/{}", Hosts::FAR));
        Running::start(&mut command)
    };
    // Its own view of the one file that says whom to ask.
    let run = |args: &[&str]| {
        let mut command = Command::new(&nsenter);
        let bind = "mount --bind \"$0\" /etc/resolv.conf && exec \"$@\"";
        command.args([&net, "unshare", "--mount", "sh", "-c", bind]);
        command.arg(&resolv).arg(DNPIPES).args(args);
        finish(&mut command)
    };
    let source = format!("{scheme}+srv://pipes.test");
    let pushed = |text: &str| {
        wait_for("a push by way of DNS", || {
            let output = run(&["push", "--source", &source, "topic", text]);
            output.status.success().then_some(())
        });
    };
    let _one = start(&first);
    let name_server = dns(&first);
    pushed("to the first");
    let pulled = run(&["pull", "--source", &source, "topic"]);
    assert_eq!(pulled.stdout, b"to the first\n", "{pulled:?}");
    // Who connects now finds the server that is named now.
    drop(name_server);
    let _other = start(&second);
    let _name_server = dns(&second);
    pushed("to the second");
    let pulled = run(&["pull", "--source", &source, "topic"]);
    assert_eq!(pulled.stdout, b"to the second\n", "{pulled:?}");
}

/// The tests of a broker, each by its kind in `scripts/services`.
macro_rules! of {
    ($module:ident, $kind:literal, $scheme:literal) => {
        mod $module {
            #[test]
            fn mounts_share_its_pipes() {
                super::share_a_pipe($kind);
            }

            #[test]
            fn a_reset_on_one_mount_reaches_what_readers_of_another_have_in_their_buffers() {
                super::a_reset_reaches_buffers(&super::Services::start(&[$kind]), || ());
            }

            #[test]
            fn a_reset_reaches_what_readers_of_another_mount_have_in_their_buffers_since_a_restart()
            {
                let services = super::Services::start(&[$kind]);
                let name = services.server().name;
                super::a_reset_reaches_buffers(&services, || {
                    services.tell("kill", &name);
                    services.tell("start", &name);
                });
            }

            #[test]
            fn killed_under_load_it_loses_and_doubles_nothing() {
                super::killed_under_load($kind, super::SINGLE);
            }

            #[test]
            fn paused_under_load_it_loses_and_doubles_nothing() {
                super::paused_under_load($kind, super::SINGLE);
            }

            #[test]
            fn a_pipe_that_another_mount_has_just_removed_is_made_again() {
                super::made_again($kind);
            }

            #[test]
            fn what_is_written_again_after_a_reset_is_there() {
                super::written_again_after_a_reset($kind);
            }

            #[test]
            fn who_resets_by_a_gateway_reads_nothing_older() {
                super::reset_by_a_gateway($kind);
            }

            #[test]
            fn cut_off_under_load_it_loses_and_doubles_nothing() {
                super::cut_off_under_load($kind, "DROP", super::SINGLE);
            }

            #[test]
            fn refused_under_load_it_loses_and_doubles_nothing() {
                super::cut_off_under_load($kind, "REJECT", super::SINGLE);
            }

            #[test]
            fn killed_under_large_writes_it_loses_and_doubles_nothing() {
                super::killed_under_load($kind, super::LARGE);
            }

            #[test]
            fn paused_under_large_writes_it_loses_and_doubles_nothing() {
                super::paused_under_load($kind, super::LARGE);
            }

            #[test]
            fn cut_off_under_large_writes_it_loses_and_doubles_nothing() {
                super::cut_off_under_load($kind, "DROP", super::LARGE);
            }

            #[test]
            fn its_servers_are_found_by_dns() {
                super::found_by_dns($kind, $scheme);
            }

            #[test]
            fn while_it_is_away_whoever_waits_for_a_message_goes_on_waiting() {
                super::waits_for_ever($kind);
            }

            #[test]
            fn while_it_is_away_a_daemon_ends_in_time() {
                super::ends_while_away($kind);
            }

            #[test]
            fn while_it_is_away_who_asks_not_to_wait_does_not() {
                super::does_not_wait($kind);
            }

            #[test]
            fn when_it_is_back_nobody_is_told_that_it_was_away() {
                super::is_forgiven($kind);
            }

            #[test]
            fn while_it_is_away_writers_that_append_do_not_wait_one_after_the_other() {
                super::appends_while_away($kind);
            }

            #[test]
            fn while_it_is_away_writers_time_out_and_everybody_can_be_killed() {
                super::times_out($kind);
            }
        }
    };
}

of!(redis, "redis", "redis");
of!(nats, "nats", "nats");
of!(nats_new, "nats-new", "nats");

#[test]
fn a_user_of_nats_needs_no_more_rights_than_the_readme_says() {
    for kind in ["nats", "nats-new"] {
        needs_no_more_rights_than_the_readme_says(kind);
    }
}

/// Each of three servers in turn is taken away by one word and brought back by another, the pipe's leader among them.
fn in_turn(away: &str, back: &str, work: Work) {
    let store = Store::new();
    let services = Services::start(&["nats-cluster"]);
    let servers = services.servers();
    let hosts = servers
        .iter()
        .map(|server| format!("127.0.0.1:{}", server.port));
    let hosts = hosts.collect::<Vec<_>>().join(",");
    // Servers that are busy take their time to find a leader, and one after the other is taken away.
    let url = format!("nats://{hosts}/?replicas=3");
    let mounts = two_mounts(&url, &["--timeout", "120s"]);
    let load = Load::start(&store, &mounts, work);
    for (number, server) in servers.iter().enumerate() {
        load.writers
            .await_acknowledged((2 * number + 1) * work.lines / 8);
        services.tell(away, &server.name);
        // The others go on without it.
        load.writers
            .await_acknowledged((2 * number + 2) * work.lines / 8);
        services.tell(back, &server.name);
    }
    load.finish();
}

mod nats_cluster {
    use super::{LARGE, SINGLE, in_turn};

    #[test]
    fn killed_in_turn_its_servers_lose_and_double_nothing() {
        in_turn("kill", "start", SINGLE);
    }

    #[test]
    fn paused_in_turn_its_servers_lose_and_double_nothing() {
        in_turn("stop", "cont", SINGLE);
    }

    #[test]
    fn killed_in_turn_under_large_writes_its_servers_lose_and_double_nothing() {
        in_turn("kill", "start", LARGE);
    }

    #[test]
    fn paused_in_turn_under_large_writes_its_servers_lose_and_double_nothing() {
        in_turn("stop", "cont", LARGE);
    }
}
