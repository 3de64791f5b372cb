//! Reading is pulling: what ordinary programs get, and when they wait.

use std::fs;
use std::os::unix::process::ExitStatusExt;

use crate::gateway::Gateway;
use crate::support::{Mount, Running, Store, wait_for};

/// Three messages that every program below can make something of.
const MESSAGES: [&str; 3] = [r#"{"n":3}"#, r#"{"n":1}"#, r#"{"n":2}"#];

/// Programs that read the pipe T, and what they print.
fn readers() -> Vec<(&'static str, String)> {
    let [three, one, two] = MESSAGES;
    let all = format!("{three}\n{one}\n{two}\n");
    let numbered = format!("1 {three}\n2 {one}\n3 {two}\n");
    let sorted = format!("{one}\n{two}\n{three}\n");
    let line = |text: &str| format!("{text}\n");
    vec![
        ("cat T", all.clone()),
        ("cat < T", all.clone()),
        ("cat T | cat", all.clone()),
        ("busybox cat T", all.clone()),
        ("busybox cat < T | cat", all.clone()),
        // head(1) wants to seek back on what it takes for a file, and says that it cannot.
        ("head -n1 T 2> /dev/null", line(three)),
        ("head -n 2 < T 2> /dev/null", format!("{three}\n{one}\n")),
        ("busybox head -n 1 T", line(three)),
        ("head -c 7 T", three.to_owned()),
        ("grep -m 1 n T", line(three)),
        ("sed 1q T", line(three)),
        ("tail -n 2 T", format!("{one}\n{two}\n")),
        ("tail -n 1 < T", line(two)),
        ("tail -n +2 T", format!("{one}\n{two}\n")),
        ("busybox tail -n 2 T", format!("{one}\n{two}\n")),
        ("tail -c 8 T", line(two)),
        ("tac T", format!("{two}\n{one}\n{three}\n")),
        ("grep 1 T", line(one)),
        ("grep -c n T", line("3")),
        ("grep -n 2 < T", format!("3:{two}\n")),
        ("rg 1 T", line(one)),
        ("rg -c n < T", line("3")),
        ("sed -n 2p T", line(one)),
        ("sed 1d T", format!("{one}\n{two}\n")),
        ("sed '$!d' T", line(two)),
        ("gawk '{ print NR, $0 }' T", numbered.clone()),
        ("mawk '{ print NR, $0 }' T", numbered.clone()),
        ("busybox awk 'END { print NR }' T", line("3")),
        ("wc -l < T", line("3")),
        ("wc -l T", line("3 T")),
        ("cat T | wc -c", line("24")),
        ("busybox wc -c < T", line("24")),
        ("sort T", sorted.clone()),
        ("sort -r < T", format!("{three}\n{two}\n{one}\n")),
        ("uniq -c T | wc -l", line("3")),
        ("cut -c 6 T", "3\n1\n2\n".to_owned()),
        ("tr -dc 0-9 < T", "312".to_owned()),
        ("od -An -c -N 3 T", line("   {   \"   n")),
        ("paste -sd+ T", format!("{three}+{one}+{two}\n")),
        ("cut -d: -f2 T | paste -sd ' '", line("3} 1} 2}")),
        ("nl -ba -w1 -s' ' T", numbered.clone()),
        (
            "n=0; while read -r line; do n=$((n + 1)); echo \"$n $line\"; done < T",
            numbered.clone(),
        ),
        (
            "dash -c 'n=0; while read -r line; do n=$((n + 1)); echo \"$n $line\"; done < T'",
            numbered.clone(),
        ),
        (
            "busybox sh -c 'n=0; while read -r line; do n=$((n + 1)); echo \"$n $line\"; done < T'",
            numbered,
        ),
        (
            "mapfile -t all < T; echo \"${#all[@]} ${all[1]}\"",
            format!("3 {one}\n"),
        ),
        (
            "mapfile -d '' -t all < T@nul; echo \"${#all[@]} ${all[2]}\"",
            format!("3 {two}\n"),
        ),
        ("echo \"$(<T)\"", all.clone()),
        ("read -r first < T; echo \"$first\"", line(three)),
        ("cp T $OUT/out; cat $OUT/out", all.clone()),
        ("cat T > $OUT/out; cat $OUT/out", all.clone()),
        ("busybox cp T $OUT/out; cat $OUT/out", all.clone()),
        ("sha256sum T | diff - $OUT/sum && echo same", line("same")),
        (
            "[ \"$(sha256sum < T)\" = \"$(sha256sum < $OUT/all)\" ] && echo same",
            line("same"),
        ),
        ("cmp T $OUT/all && echo same", line("same")),
        ("diff T $OUT/all && echo same", line("same")),
        ("jq -c .n T", "3\n1\n2\n".to_owned()),
        ("jq -cs 'map(.n)' < T", line("[3,1,2]")),
        (
            "python3 -c \"for line in open('T'): print(line, end='')\"",
            all.clone(),
        ),
        (
            "python3 -c \"print(open('T').readline(), end='')\"",
            line(three),
        ),
        (
            "python3 -c \"print(open('T').read(), end='')\"",
            all.clone(),
        ),
        (
            "python3 -c \"print(len(open('T', 'rb').readlines()))\"",
            line("3"),
        ),
        (
            "python3 -c \"import pathlib; print(pathlib.Path('T').read_text(), end='')\"",
            all.clone(),
        ),
        (
            "python3 -c \"import sys; print(len(list(sys.stdin)))\" < T",
            line("3"),
        ),
        (
            "python3 -c \"import shutil; shutil.copyfile('T', '$OUT/out')\"; cat $OUT/out",
            all.clone(),
        ),
        ("perl -ne print T", all.clone()),
        ("dd if=T status=none", all.clone()),
        ("dd if=T bs=1 status=none", all.clone()),
        ("dd if=T bs=2M status=none", all.clone()),
        (
            "xargs -0 -n1 echo got < T@nul",
            format!("got {three}\ngot {one}\ngot {two}\n"),
        ),
        ("xargs -d '\\n' -n1 echo < T", all.clone()),
        ("base64 T | base64 -d", all),
    ]
}

/// Where the programs may write, and what they compare with.
fn scratch() -> Store {
    let scratch = Store::new();
    let all = MESSAGES.map(|message| format!("{message}\n")).concat();
    fs::write(scratch.folder().join("all"), all).expect("a file");
    scratch
}

/// The name of a pipe of its own, and the script that runs the program on it.
fn program(number: usize, program: &str, scratch: &Store) -> (String, String) {
    let pipe = format!("T{number}");
    let folder = scratch.folder().display();
    let mut program = program.to_owned();
    for before in [" ", "'", "<", "="] {
        program = program.replace(&format!("{before}T"), &format!("{before}{pipe}"));
    }
    let script = format!(
        "export OUT='{folder}/{pipe}'; mkdir $OUT; cp '{folder}/all' $OUT/
        (cd $OUT; sha256sum all | sed 's/all/{pipe}/' > sum)
        {program}"
    );
    (pipe, script)
}

/// Each open for reading starts at the oldest message, reading removes nothing, and at the end that was there
/// at the open comes end of file: every program reads a pipe as it reads a file.
#[test]
fn programs_read_a_full_pipe() {
    let (mount, scratch) = (Mount::memory(&[]), scratch());
    for (number, (reader, expected)) in readers().into_iter().enumerate() {
        let (pipe, script) = program(number, reader, &scratch);
        for message in MESSAGES {
            mount.out(&format!("echo '{message}' > {pipe}"));
        }
        let expected = expected.replace(" T\n", &format!(" {pipe}\n"));
        assert_eq!(mount.out(&script), expected, "{reader}");
        assert_eq!(mount.lines(&pipe), MESSAGES, "{reader}");
    }
}

/// The size that stat(2) gives is what a fresh open reads: `wc -c` does not read at all.
#[test]
fn wc_believes_the_size() {
    let mount = Mount::memory(&[]);
    mount.out("printf 'a\\nbcd\\n\\n' > T");
    let said = mount.out("wc -c T T@snapshot T@nul T@file T@len");
    let words: Vec<&str> = said.split_whitespace().step_by(2).collect();
    assert_eq!(words, ["7", "7", "7", "4", "16", "41"], "{said}");
}

/// A drain of a pipe that is empty at the open waits for the first message, delivers what is there, and then
/// ends: also for programs that trust a size of 0.
#[test]
fn programs_wait_on_an_empty_pipe() {
    let (mount, scratch) = (Mount::memory(&[]), scratch());
    for (number, (reader, expected)) in readers().into_iter().enumerate() {
        let (pipe, script) = program(number, reader, &scratch);
        mount.out(&format!("touch {pipe}"));
        let mut running = mount.spawn(&script);
        // The busybox shell polls before it reads.
        match reader.starts_with("busybox sh") {
            true => running.wait_until_asleep_in("poll"),
            false => running.wait_until_blocked(),
        }
        // One write, so that all of it is there when the reader is woken.
        mount.out(&format!(
            "cat '{}/all' > {pipe}",
            scratch.folder().display()
        ));
        let output = running.finish();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success() && errors.is_empty(),
            "{reader}: {errors}"
        );
        let expected = expected.replace(" T\n", &format!(" {pipe}\n"));
        assert_eq!(
            String::from_utf8_lossy(&output.stdout),
            expected,
            "{reader}"
        );
    }
}

/// Some programs read no more than what stat(2) has told, and nobody knows how much comes to an empty pipe.
#[test]
fn programs_that_trust_sizes_read_what_comes_to_an_empty_pipe() {
    let mount = Mount::memory(&[]);
    let line = "echo some words\n";
    let readers = [
        (r#"curl -s "file://$PWD/A""#, line),
        ("bash -c '. ./B'", "some words\n"),
        ("wc -c C", "16 C\n"),
        ("wc -c < D", "16\n"),
    ];
    for ((reader, expected), pipe) in readers.into_iter().zip(["A", "B", "C", "D"]) {
        mount.out(&format!("touch {pipe}"));
        let mut running = mount.spawn(reader);
        running.wait_until_blocked();
        mount.out(&format!("echo '{}' > {pipe}", line.trim_end()));
        let said = String::from_utf8_lossy(&running.finish().stdout).into_owned();
        assert_eq!(said, expected, "{reader}");
    }
}

fn contents(scratch: &Store, file: &str) -> String {
    fs::read_to_string(scratch.folder().join(file)).unwrap_or_default()
}

/// Waits until a file in the scratch folder holds this.
fn wait_for_contents(scratch: &Store, file: &str, expected: &str) {
    wait_for(expected, || {
        (contents(scratch, file) == expected).then_some(())
    });
}

/// Ends a process that would go on for ever.
fn kill(mut running: Running) {
    assert!(running.is_running(), "it has ended by itself");
    running.signal(libc::SIGKILL);
    let output = running.finish();
    assert_eq!(output.status.signal(), Some(libc::SIGKILL));
}

/// A read after end of file pins the end afresh, so `tail -f` goes on with what is pushed.
#[test]
fn tail_follows() {
    let (mount, scratch) = (Mount::memory(&[]), Store::new());
    mount.out("printf 'a\\nb\\n' > full; touch empty");
    for (pipe, start) in [("full", "a\nb\n"), ("empty", "")] {
        for tail in ["tail", "tail -s 0.02", "busybox tail -s 1"] {
            let out = format!("{pipe} {}", tail.replace(' ', ""));
            let mut running = mount.spawn(&format!(
                "exec {tail} -n 5 -f {pipe} > '{}'",
                scratch.folder().join(&out).display()
            ));
            if start.is_empty() {
                running.wait_until_blocked();
            }
            wait_for_contents(&scratch, &out, start);
            mount.out(&format!("echo c > {pipe}"));
            wait_for_contents(&scratch, &out, &format!("{start}c\n"));
            mount.out(&format!("echo d > {pipe}; echo e > {pipe}"));
            wait_for_contents(&scratch, &out, &format!("{start}c\nd\ne\n"));
            kill(running);
            mount.out(&format!("truncate -s 0 {pipe}; printf '{start}' > {pipe}"));
        }
    }
}

/// `drain` pins the end at the open: what is retained then is read, and then comes end of file, even while
/// others keep pushing.
#[test]
fn a_drain_ends_while_others_keep_pushing() {
    let mount = Mount::memory(&[]);
    let mut writer = mount.spawn("while :; do echo x; done > T");
    wait_for("the writer", || mount.file("T").exists().then_some(()));
    wait_for("messages", || (mount.lines("T").len() > 100).then_some(()));
    for reader in [
        "cat T",
        "cat T@snapshot",
        "grep x T",
        "while read -r l; do echo $l; done < T",
    ] {
        let before = mount.lines("T").len();
        let read = mount.out(&format!("({reader}) | uniq -c"));
        let words: Vec<&str> = read.split_whitespace().collect();
        assert_eq!(words.len(), 2, "{read}");
        let count: usize = words[0].parse().expect("a number");
        assert!(count >= before && words[1] == "x", "{read} after {before}");
        assert!(writer.is_running());
        writer.signal(libc::SIGSTOP);
        mount.out("truncate -s 0 T; yes x | head -n 200 > T");
        writer.signal(libc::SIGCONT);
    }
    writer.signal(libc::SIGKILL);
}

/// The end of a drain is pinned at the open, not at the first read.
#[test]
fn the_end_is_pinned_at_the_open() {
    let store = Store::new();
    for mount in [Mount::memory(&[]), Mount::new(&store.url(), &[])] {
        let said = mount.python(
            r#"
            def push(text):
                with open('T', 'w') as out:
                    out.write(text)
            push('a\n')
            fds = [os.open(name, os.O_RDONLY) for name in ['T', 'T@snapshot', 'T@follow']]
            push('b\n')
            print(*[os.read(fd, 100) for fd in fds])
            print(*[os.read(fd, 100) for fd in fds[:2]])
            print(*[os.read(fd, 100) for fd in fds[:2]])
            print(*[os.read(fd, 100) for fd in fds[:2]])
            "#,
        );
        let [first, end, again, end_again] = said.lines().collect::<Vec<_>>()[..] else {
            panic!("{said}");
        };
        assert!(
            [r"b'a\n' b'a\n' b'a\nb\n'", r"b'a\n' b'a\n' b'a\n'"].contains(&first),
            "{first}"
        );
        assert_eq!(end, "b'' b''");
        assert_eq!(
            again, r"b'b\n' b'b\n'",
            "a read after end of file pins the end afresh"
        );
        assert_eq!(end_again, "b'' b''");
    }
}

/// `follow` waits for the next message, for ever.
#[test]
fn follow_never_ends() {
    let (mount, scratch) = (Mount::memory(&[]), Store::new());
    let follower = Mount::memory(&["--mode", "follow"]);
    for (mount, pipe) in [(&mount, "T@follow"), (&follower, "T")] {
        mount.out("printf 'a\\nb\\n' > T");
        let out = scratch.folder().join("out");
        let mut running = mount.spawn(&format!("exec cat {pipe} > '{}'", out.display()));
        wait_for_contents(&scratch, "out", "a\nb\n");
        running.wait_until_blocked();
        mount.out("echo c > T");
        wait_for_contents(&scratch, "out", "a\nb\nc\n");
        running.wait_until_blocked();
        kill(running);
    }
}

/// `snapshot` never waits, also when the pipe is empty; `drain` by selector overrides the mount's mode.
#[test]
fn snapshot_never_waits() {
    let mount = Mount::memory(&[]);
    assert_eq!(
        mount.out("touch T; cat T@snapshot; busybox cat T@snapshot; wc -c < T@snapshot"),
        "0\n"
    );
    assert_eq!(
        mount.out("echo a > T; cat T@snapshot; tail -n 1 T@snapshot"),
        "a\na\n"
    );
    let mount = Mount::memory(&["--mode", "snapshot"]);
    assert_eq!(mount.out("touch T; cat T; echo a > T; cat T"), "a\n");
    let mount = Mount::memory(&["--mode", "follow"]);
    assert_eq!(mount.out("echo a > T; cat T@drain"), "a\n");
}

/// O_RDWR reads in `follow`, as `exec 3<>fifo` does.
#[test]
fn read_and_write_descriptors_follow() {
    let (mount, scratch) = (Mount::memory(&[]), Store::new());
    assert_eq!(
        mount.out("exec 3<>T; echo hello >&3; read -r line <&3; echo \"$line\"; echo more >&3; dd bs=5 count=1 status=none <&3"),
        "hello\nmore\n"
    );
    mount.out("printf 'a\\nb\\n' > U");
    let out = scratch.folder().join("out");
    let mut running = mount.spawn(&format!(
        "exec 3<>U; while read -r line <&3; do echo \"$line\" >> '{}'; [ \"$line\" = end ] && exit; done; echo EOF",
        out.display()
    ));
    wait_for_contents(&scratch, "out", "a\nb\n");
    running.wait_until_blocked();
    mount.out("echo c > U");
    wait_for_contents(&scratch, "out", "a\nb\nc\n");
    running.wait_until_blocked();
    mount.out("echo end > U");
    let output = running.finish();
    assert!(output.status.success() && output.stdout.is_empty());
}

/// O_NONBLOCK never waits: EAGAIN where it would, and what was pushed before is found at once.
#[test]
fn nonblocking_reads() {
    let store = Store::new();
    let url = format!("{}?durability=process", store.url());
    for mount in [Mount::memory(&[]), Mount::new(&url, &[])] {
        let said = mount.python(
            r#"
            import fcntl
            os.close(os.open('T', os.O_WRONLY | os.O_CREAT))
            drain = os.open('T', os.O_RDONLY | os.O_NONBLOCK)
            follow = os.open('T@follow', os.O_RDONLY)
            fcntl.fcntl(follow, fcntl.F_SETFL, os.O_NONBLOCK)
            snapshot = os.open('T@snapshot', os.O_RDONLY | os.O_NONBLOCK)
            print(why(os.read, drain, 10), why(os.read, follow, 10), os.read(snapshot, 10))
            both = os.open('T', os.O_RDWR | os.O_NONBLOCK)
            out = os.open('T', os.O_WRONLY)
            for number in range(300):
                line = b'%d\n' % number
                os.write(both if number % 2 else out, line)
                got = [os.read(both, 100), os.read(follow, 100)]
                assert got == [line, line], (number, got)
            print(why(os.read, both, 10), why(os.read, follow, 10))
            print(len(os.read(drain, 10000)), os.read(drain, 10), os.read(drain, 10))
            "#,
        );
        // The first read of the drain pins the end behind the first message that it finds.
        let [first, middle, last] = said.lines().collect::<Vec<_>>()[..] else {
            panic!("{said}");
        };
        assert_eq!(first, "EAGAIN EAGAIN b''");
        assert_eq!(middle, "EAGAIN EAGAIN");
        assert_eq!(last.split(' ').count(), 3, "{last}");
    }
}

/// A push that returned in another process, through another mount, is found by a poll and a
/// nonblocking read at once.
#[test]
fn nonblocking_reads_find_what_others_pushed() {
    let store = Store::new();
    let url = format!("{}?durability=process", store.url());
    let (one, two) = (Mount::new(&url, &[]), Mount::new(&url, &[]));
    one.out("touch T");
    let said = two.python(&format!(
        r#"
        import select
        fd = os.open('T@follow', os.O_RDONLY | os.O_NONBLOCK)
        out = os.open('{}', os.O_WRONLY)
        for number in range(300):
            line = b'%d\n' % number
            os.write(out, line)
            assert select.select([fd], [], [], 0)[0], number
            got = os.read(fd, 100)
            assert got == line, (number, got)
        print(select.select([fd], [], [], 0)[0], why(os.read, fd, 100))
        "#,
        one.file("T").display()
    ));
    assert_eq!(said, "[] EAGAIN\n");
}

/// `poll`, `select` and `epoll`: readable when a read would not wait, writable always.
#[test]
fn polling_tells_what_a_read_would_do() {
    let store = Store::new();
    for mount in [Mount::memory(&[]), Mount::new(&store.url(), &[])] {
        let said = mount.python(
            r#"
            import select
            os.close(os.open('T', os.O_WRONLY | os.O_CREAT))
            both = os.open('T', os.O_RDWR)
            names = ['T', 'T@follow', 'T@snapshot']
            def show():
                fds = [os.open(name, os.O_RDONLY) for name in names] + [both]
                readable, writable, _ = select.select(fds, [both], [], 0)
                p, e = select.poll(), select.epoll()
                for fd in fds:
                    p.register(fd, select.POLLIN)
                    e.register(fd, select.EPOLLIN)
                polled = sorted(fd for fd, _ in p.poll(0))
                epolled = sorted(fd for fd, _ in e.poll(0))
                assert sorted(readable) == polled == epolled, (readable, polled, epolled)
                print([name for name, fd in zip(names + ['both'], fds) if fd in readable], writable == [both])
            show()
            os.write(both, b'a\n')
            show()
            print(os.read(both, 10))
            show()
            "#,
        );
        let expected = "['T@snapshot'] True\n['T', 'T@follow', 'T@snapshot', 'both'] True\nb'a\\n'\n['T', 'T@follow', 'T@snapshot'] True\n";
        assert_eq!(said, expected);
    }
}

/// In the frame `file` an empty message would read as end of file: it is passed over, also by who polls.
#[test]
fn an_empty_message_is_nothing_to_read_in_the_frame_file() {
    let mount = Mount::memory(&[]);
    mount.out("echo > topic");
    let said = mount.python(
        r"
        import select
        fd = os.open('topic@file,follow', os.O_RDONLY | os.O_NONBLOCK)
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        print(poll.poll(0), why(os.read, fd, 10))
        with open('topic', 'w') as topic:
            print('next', file=topic)
        print(len(poll.poll()), os.read(fd, 10), poll.poll(0))
        ",
    );
    assert_eq!(said, "[] EAGAIN\n1 b'next' []\n");
    assert_eq!(
        mount.out("cat topic@file; truncate -s 0 topic; echo > topic; cat topic@file"),
        "next"
    );
}

/// A push from anywhere wakes the waiter, once: polling is no busy loop.
#[test]
fn a_push_through_another_mount_wakes_pollers() {
    wake_pollers(&[
        "p = select.poll(); p.register(fd, select.POLLIN); wait = lambda: p.poll(25000)",
        "wait = lambda: select.select([fd], [], [], 25)[0]",
        "e = select.epoll(); e.register(fd, select.EPOLLIN); wait = lambda: e.poll(25)",
    ]);
}

/// An edge-triggered `epoll`, as event loops use it, is woken by every push too.
#[test]
fn a_push_through_another_mount_wakes_edge_triggered_pollers() {
    wake_pollers(&[
        "e = select.epoll(); e.register(fd, select.EPOLLIN | select.EPOLLET); wait = lambda: e.poll(25)",
    ]);
}

fn wake_pollers(waits: &[&str]) {
    let store = Store::new();
    let (one, two) = (Mount::new(&store.url(), &[]), Mount::new(&store.url(), &[]));
    one.out("touch T other");
    let mut pollers: Vec<Running> = waits
        .iter()
        .enumerate()
        .map(|(number, wait)| {
            two.spawn_python(&format!(
                r#"
        import select
        fd = os.open('T@follow', os.O_RDONLY | os.O_NONBLOCK)
        {wait}
        out = open('{}', 'w')
        wakeups = rounds = 0
        while rounds < 10:
            ready = wait()
            assert ready, 'nobody woke it'
            wakeups += 1
            try:
                got = os.read(fd, 100)
            except BlockingIOError:
                continue
            rounds += 1
            print(got.decode(), end='', file=out, flush=True)
        print(wakeups)
                "#,
                store.folder().join(format!("out{number}")).display()
            ))
        })
        .collect();
    let mut expected = String::new();
    for round in 0..10 {
        for poller in &mut pollers {
            poller.wait_until_asleep_in("poll");
        }
        // What is pushed to another pipe wakes nobody.
        one.out("echo no > other");
        one.out(&format!("echo {round} > T"));
        expected += &format!("{round}\n");
        for number in 0..waits.len() {
            wait_for_contents(&store, &format!("out{number}"), &expected);
        }
    }
    for (poller, wait) in pollers.into_iter().zip(waits) {
        let output = poller.finish();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        let wakeups: usize = String::from_utf8_lossy(&output.stdout)
            .trim()
            .parse()
            .expect("a number");
        // One more a round where a wake-up overtakes the look before it.
        assert!(
            (10..=20).contains(&wakeups),
            "{wakeups} wake-ups in 10 rounds: {wait}"
        );
    }
}

/// No wake-up is lost: two processes answer each other, each blocked in a read while the other pushes.
#[test]
fn processes_answer_each_other() {
    let store = Store::new();
    let url = format!("{}?durability=process", store.url());
    let memory = Mount::memory(&[]);
    let (one, two) = (Mount::new(&url, &[]), Mount::new(&url, &[]));
    for (left, right) in [(&memory, &memory), (&one, &one), (&one, &two)] {
        left.out("truncate -s 0 -c A B 2> /dev/null; touch A B");
        let player = |reads: &str, writes: &str, serves: bool| {
            format!(
                r#"
                fd, out = os.open('{reads}@follow', os.O_RDONLY), os.open('{writes}', os.O_WRONLY)
                for number in range(500):
                    ball = b'%d\n' % number
                    if {}:
                        os.write(out, ball)
                    assert os.read(fd, 100) == ball
                    if not {}:
                        os.write(out, ball)
                "#,
                if serves { "True" } else { "False" },
                if serves { "True" } else { "False" },
            )
        };
        let players = [
            left.spawn_python(&player("A", "B", true)),
            right.spawn_python(&player("B", "A", false)),
        ];
        for output in players.map(Running::finish) {
            let errors = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{errors}");
        }
        let balls: Vec<String> = (0..500).map(|number| number.to_string()).collect();
        assert!(left.lines("A") == balls && right.lines("B") == balls);
    }
}

/// Each open for reading is a subscriber of its own: two readers each see all.
#[test]
fn readers_each_see_everything() {
    let store = Store::new();
    let (one, two) = (Mount::new(&store.url(), &[]), Mount::new(&store.url(), &[]));
    one.out("touch T");
    let mut readers: Vec<Running> = [&one, &one, &two, &two]
        .map(|mount| mount.spawn("head -n 3 T@follow"))
        .into();
    for reader in &mut readers {
        reader.wait_until_blocked();
    }
    one.out("printf 'a\\nb\\n' > T");
    two.out("echo c > T");
    for reader in readers {
        assert_eq!(reader.finish().stdout, b"a\nb\nc\n");
    }
    assert_eq!(
        two.out("exec 3< T; read -r a <&3; cat T; cat <&3"),
        "a\nb\nc\nb\nc\n"
    );
}

/// After a reset every reader continues with the first message pushed after it, whatever it had read before.
#[test]
fn a_reset_is_seen_by_readers_on_every_mount() {
    let store = Store::new();
    let memory = Mount::memory(&[]);
    let (one, two) = (Mount::new(&store.url(), &[]), Mount::new(&store.url(), &[]));
    for (writer, reader) in [(&memory, &memory), (&one, &one), (&one, &two)] {
        writer.out("printf 'a\\nb\\nc\\n' > T");
        for name in ["T", "T@follow"] {
            let said = reader.python(&format!(
                r#"
                fd = os.open('{name}', os.O_RDONLY)
                print(os.read(fd, 2))
                other = '{}'
                os.truncate(other, 0)
                open(other, 'w').write('new\n')
                got = os.read(fd, 100)
                print(got or os.read(fd, 100))
                "#,
                writer.file("T").display()
            ));
            assert_eq!(said, "b'a\\n'\nb'new\\n'\n", "{name}");
            writer.out("truncate -s 0 T; printf 'a\\nb\\nc\\n' > T");
        }
        writer.out("truncate -s 0 T");
    }
}

/// After a reset a waiting reader goes on waiting, for the first message pushed after it.
#[test]
fn a_reset_leaves_waiting_readers_waiting() {
    let (store, scratch) = (Store::new(), Store::new());
    let (one, two) = (Mount::new(&store.url(), &[]), Mount::new(&store.url(), &[]));
    one.out("touch empty; printf 'a\\nb\\n' > full");
    let out = scratch.folder().join("out");
    let mut empty = two.spawn("cat empty");
    let mut full = two.spawn(&format!("exec cat full@follow > '{}'", out.display()));
    empty.wait_until_blocked();
    wait_for_contents(&scratch, "out", "a\nb\n");
    full.wait_until_blocked();
    one.out("truncate -s 0 empty; truncate -s 0 full; truncate -s 0 full");
    empty.wait_until_blocked();
    full.wait_until_blocked();
    one.out("echo c > full; echo d > empty");
    assert_eq!(empty.finish().stdout, b"d\n");
    wait_for_contents(&scratch, "out", "a\nb\nc\n");
    kill(full);
}

/// So does one to whom a push came that a reset has dropped before it was read: that is no end of file.
#[test]
fn a_push_that_is_reset_at_once_does_not_end_who_waits() {
    const AT_ONCE: &str = "
        import os
        def push_and_reset(name):
            fd = os.open(name, os.O_WRONLY | os.O_CREAT)
            os.write(fd, b'gone\\n')
            os.ftruncate(fd, 0)
            os.close(fd)
    ";
    let store = Store::new();
    for url in ["memory:", &store.url()] {
        let mount = Mount::new(url, &[]);
        for round in 0..40 {
            mount.out(&format!("touch waits{round}"));
            let mut waits = mount.spawn(&format!("exec cat waits{round}"));
            waits.wait_until_blocked();
            mount.python(&format!(
                "{AT_ONCE}
        push_and_reset('waits{round}')
        os.write(os.open('waits{round}', os.O_WRONLY), b'came\\n')
            "
            ));
            let read = waits.finish().stdout;
            // Who was quick enough has read what is gone.
            assert!(
                [&b"came\n"[..], b"gone\n"].contains(&&read[..]),
                "{url}: {read:?}"
            );
        }
        let said = mount.python(&format!(
            "{AT_ONCE}
        os.close(os.open('T', os.O_WRONLY | os.O_CREAT))
        fd = os.open('T', os.O_RDONLY | os.O_NONBLOCK)
        push_and_reset('T')
        try:
            print(os.read(fd, 100))
        except BlockingIOError:
            print('EAGAIN')
        os.write(os.open('T', os.O_WRONLY), b'came\\n')
        print(os.read(fd, 100), os.read(fd, 100))
        "
        ));
        assert_eq!(said, "EAGAIN\nb'came\\n' b''\n", "{url}");
    }
}

/// An empty message is the first one, too, also in `@file`, where there is nothing of it to read.
#[test]
fn an_empty_message_ends_who_waits_for_a_first_one() {
    let mount = Mount::memory(&[]);
    for frame in ["@file", "@nul", ""] {
        mount.out("truncate -s 0 T");
        let mut waits = mount.spawn(&format!("exec cat T{frame}"));
        waits.wait_until_blocked();
        mount.out("echo > T");
        let expected: &[u8] = match frame {
            "@file" => b"",
            "@nul" => b"\0",
            _ => b"\n",
        };
        assert_eq!(waits.finish().stdout, expected, "{frame}");
    }
}

/// "A read after EOF pins the end afresh": that read, and not the one before.
#[test]
fn a_read_after_the_end_finds_what_came_since() {
    let store = Store::new();
    for url in ["memory:", &store.url()] {
        let mount = Mount::new(url, &[]);
        let said = mount.python(
            r"
        for name in 'T', 'T@snapshot':
            write = os.open('T', os.O_WRONLY | os.O_CREAT)
            os.ftruncate(write, 0)
            os.write(write, b'1\n')
            read = os.open(name, os.O_RDONLY)
            print(os.read(read, 100), os.read(read, 100))
            os.write(write, b'2\n')
            print(os.read(read, 100), os.read(read, 100), os.read(read, 100))
            os.write(write, b'3\n')
            print(os.read(read, 100))
        ",
        );
        let round = "b'1\\n' b''\nb'2\\n' b'' b''\nb'3\\n'\n";
        assert_eq!(said, round.repeat(2), "{url}");
    }
}

/// A read(2) of more than 1 MiB into a buffer that begins within a page, too, is answered with what there is.
#[test]
fn a_large_read_into_any_buffer_does_not_wait_for_more() {
    let mount = Mount::memory(&[]);
    let said = mount.python(
        r"
        import mmap, signal
        signal.alarm(20)
        buffer = memoryview(mmap.mmap(-1, 3 << 20))
        for offset in 0, 1, 48, 2048, 4095:
            for length in 1048528, (1 << 20) - 1, 1 << 20, (1 << 20) - offset:
                write = os.open('T', os.O_WRONLY | os.O_CREAT)
                os.ftruncate(write, 0)
                read = os.open('T@follow', os.O_RDONLY)
                os.write(write, b'x' * (length - 1) + b'\n')
                came = 0
                while came < length:
                    came += os.readv(read, [buffer[offset:offset + (2 << 20)]])
                assert came == length, (offset, length, came)
                os.close(read)
        print('done')
        ",
    );
    assert_eq!(said, "done\n");
}

/// A read returns whole messages, as many as fit; a message longer than the buffer continues in the next read.
#[test]
fn reads_return_whole_messages() {
    let mount = Mount::memory(&[]);
    let said = mount.python(
        r#"
        os.write(os.open('T', os.O_WRONLY | os.O_CREAT), b'a\nbb\nccc\nabcdefghij\n\nz\n')
        def reads(name, size):
            fd = os.open(name, os.O_RDONLY)
            return list(iter(lambda: os.read(fd, size), b''))
        print(reads('T', 4))
        print(reads('T', 5))
        print(reads('T', 11))
        print(reads('T', 1) == [bytes([byte]) for byte in b'a\nbb\nccc\nabcdefghij\n\nz\n'])
        print(reads('T@nul', 6))
        print(reads('T@len', 6))
        print(reads('T@file', 4))
        "#,
    );
    let expected = [
        r"[b'a\n', b'bb\n', b'ccc\n', b'abcd', b'efgh', b'ij\n\n', b'z\n']",
        r"[b'a\nbb\n', b'ccc\n', b'abcde', b'fghij', b'\n\nz\n']",
        r"[b'a\nbb\nccc\n', b'abcdefghij\n', b'\nz\n']",
        "True",
        r"[b'a\x00bb\x00', b'ccc\x00', b'abcdef', b'ghij\x00\x00', b'z\x00']",
        r"[b'\x00\x00\x00\x01a', b'\x00\x00\x00\x02bb', b'\x00\x00\x00\x03cc', b'c', b'\x00\x00\x00\nab', b'cdefgh', b'ij\x00\x00\x00\x00', b'\x00\x00\x00\x01z']",
        r"[b'a', b'bb', b'ccc', b'abcd', b'efgh', b'ij', b'z']",
    ];
    for (said, expected) in said.lines().zip(expected) {
        assert_eq!(said, expected);
    }
    assert_eq!(said.lines().count(), expected.len());
}

/// Some programs read a file of its size at once, and take a short read for its end. On a busy machine what is on its way may
/// come too late for one, but for most of them it does not.
#[test]
fn a_read_of_all_gets_all_of_it() {
    let store = Store::new();
    let gateway = Gateway::start("memory:", &[]);
    for source in ["memory:", &store.url(), gateway.url()] {
        let mount = Mount::new(source, &[]);
        mount.out(
            "lines() { seq -f 'n=$((n + 1)) # %080.0f' $1 $2; }
            for n in $(seq 100); do lines $n $n > T; done
            lines 101 8000 | cat > T",
        );
        let said = mount.python(
            r"
            size = os.stat('T').st_size
            opened = [os.open('T', os.O_RDONLY) for round in range(21)]
            print(sum(len(os.read(file, size)) == size for file in opened) > 10)
            ",
        );
        assert_eq!(said, "True\n", "{source}");
        let sourced = (0..5).filter(|_| mount.out("bash -c 'n=0; . ./T; echo $n'") == "8000\n");
        assert!(sourced.count() > 2, "{source}");
    }
}

/// A read of more than 1 MiB, which the kernel asks for in pieces, answers short where the log is exhausted,
/// and never waits for more than there is.
#[test]
fn reads_of_more_than_the_kernels_requests() {
    let mount = Mount::memory(&[]);
    let said = mount.python(
        r#"
        MIB = 1 << 20
        for number, length in enumerate([MIB - 2, MIB - 1, MIB, 2 * MIB - 1, 3 * MIB, 4 * MIB - 1]):
            name = 'T%d' % number
            data = os.urandom(length // 2).hex().encode().ljust(length, b'x') + b'\n'
            fd = os.open(name, os.O_WRONLY | os.O_CREAT)
            assert os.write(fd, data) == len(data)
            for size in MIB, 2 * MIB, 8 * MIB, MIB + 1:
                fd = os.open(name + '@follow', os.O_RDONLY)
                got = b''
                while len(got) < len(data):
                    piece = os.read(fd, size)
                    assert piece
                    got += piece
                assert got == data, (length, size)
                os.close(fd)
            assert open(name, 'rb').read() == data
        fd = os.open('lines', os.O_WRONLY | os.O_CREAT)
        data = b'%063d\n' % 7 * (3 * MIB // 64)
        assert os.write(fd, data) == len(data)
        fd = os.open('lines@follow', os.O_RDONLY)
        got = b''
        while len(got) < len(data):
            piece = os.read(fd, 4 * MIB)
            assert len(piece) % 64 == 0, len(piece)
            got += piece
        print(got == data)
        "#,
    );
    assert_eq!(said, "True\n");
}

/// Unknown, doubled or malformed options are ENOENT at look-up, with one log line that says what is allowed;
/// they make no pipe.
#[test]
fn bad_selectors_are_not_there() {
    let mount = Mount::memory(&[]);
    mount.out("echo a > T");
    let bad = [
        "T@",
        "T@,",
        "T@bogus",
        "T@follow,",
        "T@follow,follow",
        "T@follow,drain",
        "T@nul,len",
        "T@@nul",
        "T@FOLLOW",
        "T@ follow",
        "T@last=",
        "T@last=x",
        "T@from=",
        "T@since=yesterday",
        "T@group=",
        "T@follow@nul",
    ];
    for name in bad {
        assert_eq!(
            mount.python(&format!("\n        print(why(os.stat, '{name}'))")),
            "ENOENT\n",
            "{name}"
        );
        let log = mount.log();
        let told: Vec<&str> = log
            .lines()
            .filter(|line| line.contains(&format!("{name:?}")))
            .collect();
        let [told] = told[..] else {
            panic!("{name}: {told:?}");
        };
        for word in [
            "allowed", "drain", "follow", "snapshot", "line", "nul", "file", "len",
        ] {
            assert!(told.contains(word), "{word}: {told}");
        }
        let said = mount.python(&format!(
            "\n        print(why(os.open, '{name}', os.O_RDONLY))"
        ));
        assert_eq!(said, "ENOENT\n", "{name}");
    }
    assert_eq!(mount.out("ls"), "T\n");
}

/// Look-ups of names that cannot be a pipe's are not logged, whatever follows an `@` in them: rsync and editors
/// ask for many that start with a dot. A bad selector of a pipe is logged at each look-up.
#[test]
fn names_that_cannot_be_are_looked_up_in_silence() {
    let mount = Mount::memory(&[]);
    mount.out("echo a > topic");
    // The mount answers before it says so.
    let before = wait_for("the line of its start", || {
        let log = mount.log();
        log.contains("is mounted on").then_some(log)
    });
    let said = mount.python(
        r#"
        for name in [b'.foo', b'.foo@bar', b'.topic.Xy12@x', b'.topic@x.Xy12', b'.@', b'@bar', b'.\xff@bar']:
            print(why(os.stat, name), why(os.open, name, os.O_WRONLY), why(os.unlink, name))
        "#,
    );
    assert_eq!(said, "ENOENT ENOENT ENOENT\n".repeat(7));
    assert_eq!(mount.log(), before);
    mount.python("\n        print(why(os.stat, 'topic@bogus'))");
    let log = mount.log();
    let told: Vec<&str> = log[before.len()..].lines().collect();
    assert_eq!(told.len(), 1, "{told:?}");
    assert!(told[0].contains("topic@bogus"), "{told:?}");
}

/// A name that breaks the rules is EINVAL at create, with a log line that says which rule, and never there.
#[test]
fn bad_names_are_refused_at_create() {
    let mount = Mount::memory(&[]);
    let long = "x".repeat(201);
    for (name, rule) in [
        (".hidden", "starts with"),
        ("a\\x01b", "control"),
        ("tab\\tbed", "control"),
        ("new\\nline", "control"),
        (long.as_str(), "longer than 200"),
        ("@follow", "empty"),
        ("T@bogus", "allowed"),
        ("n\\xff", "UTF-8"),
    ] {
        let said = mount.python(&format!(
            r#"
        name = b'{name}'
        print(why(os.stat, name), why(os.open, name, os.O_WRONLY))
        print(why(os.open, name, os.O_WRONLY | os.O_CREAT), why(os.mkfifo, name), why(os.mknod, name))
            "#
        ));
        assert_eq!(said, "ENOENT ENOENT\nEINVAL EINVAL EINVAL\n", "{name}");
        assert!(mount.log().contains(rule), "{name}: {}", mount.log());
    }
    assert_eq!(mount.out("ls -A"), "");
}
