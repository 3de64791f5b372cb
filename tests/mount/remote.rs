//! Mounts that share the pipes of one gateway, and what comes between them and it.

use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::gateway::{Gateway, free_port};
use crate::load::{Work, Writers, assert_complete, follow, read_lines};
use crate::network::Hosts;
use crate::support::{Mount, Running, Store, finish, wait_for};

/// What a store holds and a gateway does not hand on is said, with its position.
#[test]
fn a_message_that_is_too_long_for_a_gateway_is_told_as_such() {
    let store = Store::new();
    let push = "dnpipes push topic@file";
    store.out(&format!(
        "dnpipes push topic first; head -c 70000000 /dev/zero | {push}; echo after | {push}"
    ));
    let gateway = Gateway::start(&store.url(), &[]);
    let mount = Mount::new(gateway.url(), &[]);
    let read = mount.python(
        "
        fd = os.open('topic@snapshot', os.O_RDONLY)
        print(os.read(fd, 100), why(os.read, fd, 100))
        ",
    );
    assert_eq!(read, "b'first\\n' EMSGSIZE\n", "{}", mount.log());
    assert!(mount.log().contains("hands on 67108864"), "{}", mount.log());
}

#[test]
fn what_one_mount_writes_another_reads() {
    let gateway = Gateway::start("memory:", &[]);
    let (one, two) = (
        Mount::new(gateway.url(), &[]),
        Mount::new(gateway.url(), &[]),
    );
    one.out("echo a > topic; printf b > topic; printf 'c\\nd\\n' >> topic");
    assert_eq!(two.out("cat topic"), "a\nb\nc\nd\n");
    assert_eq!(
        two.out("ls; stat -c %s topic; wc -l < topic"),
        "topic\n8\n4\n"
    );
    let reader = two.spawn("exec head -n 6 topic@follow");
    one.out("echo e > topic; echo f > topic");
    assert_eq!(read_lines(reader), ["a", "b", "c", "d", "e", "f"]);
    two.out("truncate -s 0 topic; echo new > topic");
    assert_eq!(one.out("cat topic"), "new\n");
}

#[test]
fn a_reset_on_one_mount_reaches_a_reader_that_waits_on_another() {
    let store = Store::new();
    let gateway = Gateway::start(&store.fast_url(), &[]);
    let (one, two) = (
        Mount::new(gateway.url(), &[]),
        Mount::new(gateway.url(), &[]),
    );
    one.out("seq 1000 > topic");
    // It holds most of the pipe in its buffer when the reset comes.
    let mut reader = two.spawn_python(
        "
        import sys
        fd = os.open('topic@follow', os.O_RDONLY)
        print(os.read(fd, 2).decode(), end='', flush=True)
        sys.stdin.readline()
        while open('topic@snapshot').read() != 'after\\n':
            pass
        print(os.read(fd, 1000).decode(), end='', flush=True)
        ",
    );
    assert_eq!(reader.line(), "1");
    one.out("truncate -s 0 topic; echo after > topic");
    assert_eq!(reader.line(), "after");
}

#[test]
fn a_gateway_that_is_killed_under_load_loses_and_doubles_nothing() {
    const LINES: usize = 250;
    const WORK: Work = Work::single(LINES);
    let store = Store::new();
    let source = store.url();
    let mut gateway = Gateway::start(&source, &[]);
    // One that keeps its port for its successor.
    gateway = gateway.crash_and_restart();
    let mounts: Vec<Mount> = (0..4).map(|_| Mount::new(gateway.url(), &[])).collect();
    mounts[0].out("touch topic");
    let readers: Vec<Running> = mounts
        .iter()
        .map(|mount| follow(mount, 4 * LINES))
        .collect();
    let all: Vec<&Mount> = mounts.iter().collect();
    let writers = Writers::start(&store, &all, WORK);
    for kill in 1..=4 {
        writers.await_acknowledged(kill * LINES / 6);
        gateway = gateway.crash_and_restart();
    }
    writers.finish();
    let stored = mounts[0].lines("topic");
    assert_complete(&stored, 4, WORK);
    for reader in readers {
        assert_eq!(read_lines(reader), stored);
    }
}

#[test]
fn a_follower_of_a_store_in_memory_goes_on_with_the_next_one_after_a_crash() {
    let gateway = Gateway::start("memory:", &[]).crash_and_restart();
    let mount = Mount::new(gateway.url(), &[]);
    mount.out("seq 100 > topic");
    let reader = mount.spawn("exec head -n 101 topic@follow");
    let mut first = mount.spawn("exec head -n 1 topic@follow");
    assert_eq!(first.line(), "1");
    wait_for("the reader", || {
        let metrics = mount.sh(&format!("curl -s {}metrics", gateway.url()));
        let text = String::from_utf8_lossy(&metrics.stdout).into_owned();
        let pulled = text
            .lines()
            .find_map(|line| line.strip_prefix("dnpipes_pulled_messages_total "));
        (pulled?.parse::<u32>().ok()? >= 200).then_some(())
    });
    let _gateway = gateway.crash_and_restart();
    mount.out("echo after > topic");
    let lines = read_lines(reader);
    assert_eq!((lines.len(), lines[100].as_str()), (101, "after"));
}

#[test]
fn a_mount_that_could_never_work_says_why_and_one_of_a_gateway_to_come_works_later() {
    let store = Store::new();
    let tokens = store.folder().join("tokens");
    fs::write(&tokens, "a-token-that-is-known\n").expect("the tokens");
    let gateway = Gateway::start("memory:", &["--token-file", tokens.to_str().expect("text")]);
    let folder = tempfile::tempdir().expect("a mountpoint");
    let mut command = Command::new(crate::support::DNPIPES);
    command
        .args(["mount", "--daemon", gateway.url()])
        .arg(folder.path())
        .env("DNPIPES_TOKEN", "some-other-token-here");
    let output = finish(&mut command);
    assert_eq!(output.status.code(), Some(1));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(errors.contains("a known token is needed"), "{errors}");
    // A port that is known, and not served yet.
    let listen = format!("127.0.0.1:{}", free_port());
    let mount = Mount::new(&format!("http://{listen}/"), &[]);
    assert!(mount.log().contains("cannot be reached yet"));
    let _gateway = Gateway::start_at("memory:", &[], &listen, &[]);
    mount.out("echo hello > topic; cat topic");
}

/// A gateway on the far host, and mounts of it on the near one.
fn apart(store: &Store, flags: &[&str]) -> (Vec<Mount>, Gateway, Hosts) {
    let hosts = Hosts::new();
    let [nsenter, far] = Hosts::on(&hosts.far);
    let listen = format!("{}:{}", Hosts::FAR, free_port());
    let gateway = Gateway::start_at(&store.url(), &["--insecure"], &listen, &[&nsenter, &far]);
    let [nsenter, near] = Hosts::on(&hosts.near);
    let mounts = (0..2).map(|_| Mount::within(&[&nsenter, &near], gateway.url(), flags));
    (mounts.collect(), gateway, hosts)
}

fn cut_and_heal(target: &str) {
    const LINES: usize = 300;
    const WORK: Work = Work::single(LINES);
    let store = Store::new();
    let (mounts, _gateway, hosts) = apart(&store, &[]);
    mounts[0].out("touch topic");
    let readers: Vec<Running> = mounts
        .iter()
        .map(|mount| follow(mount, 2 * LINES))
        .collect();
    let all: Vec<&Mount> = mounts.iter().collect();
    let writers = Writers::start(&store, &all, WORK);
    writers.await_acknowledged(LINES / 4);
    hosts.cut(target);
    writers.release();
    // Until both have given a request up and repeat it: the first one may still arrive when all is well
    // again.
    for mount in &mounts {
        wait_for("a repeated push", || {
            mount.log().contains("pushing to topic").then_some(())
        });
    }
    hosts.heal(target);
    writers.finish();
    let stored = mounts[0].lines("topic");
    assert_complete(&stored, 2, WORK);
    for reader in readers {
        assert_eq!(read_lines(reader), stored);
    }
}

#[test]
fn hosts_that_are_cut_off_and_come_back_lose_and_double_nothing() {
    cut_and_heal("DROP");
}

#[test]
fn hosts_that_are_refused_and_come_back_lose_and_double_nothing() {
    cut_and_heal("REJECT");
}

#[test]
fn a_writer_that_is_cut_off_gets_its_errno_within_the_timeout() {
    for target in ["DROP", "REJECT"] {
        let store = Store::new();
        let (mounts, _gateway, hosts) = apart(&store, &["--timeout", "2s"]);
        mounts[0].out("echo first > topic");
        let mut blocked = mounts[1].spawn("exec tail -n +2 topic@follow");
        hosts.cut(target);
        let since = Instant::now();
        let written = mounts[0].python(
            "
            print(why(lambda: os.write(os.open('topic', os.O_WRONLY), b'second\\n')))
            ",
        );
        assert_eq!(written, "ETIMEDOUT\n", "{target}: {}", mounts[0].log());
        assert!(
            since.elapsed() < Duration::from_secs(6),
            "{target}: {:?}",
            since.elapsed()
        );
        // Whoever is blocked can be killed all the same.
        blocked.signal(libc::SIGKILL);
        wait_for("the end of a reader", || {
            (!blocked.is_running()).then_some(())
        });
        hosts.heal(target);
        wait_for("the pipe's return", || {
            mounts[0]
                .sh("echo third > topic")
                .status
                .success()
                .then_some(())
        });
        let lines = mounts[1].lines("topic");
        // What timed out may have arrived, once.
        let second = lines.iter().filter(|line| *line == "second").count();
        assert!(
            second <= 1 && lines.first().is_some_and(|line| line == "first"),
            "{lines:?}"
        );
        assert_eq!(lines.last().map(String::as_str), Some("third"));
    }
}

/// nginx in front of a gateway.
struct Proxy {
    _running: Running,
    port: u16,
    _folder: tempfile::TempDir,
}

impl Proxy {
    fn start(gateway: &Gateway, lines: &str) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let port = free_port();
        let path = folder.path().display();
        let config = format!(
            "daemon off; master_process off; pid {path}/pid; error_log {path}/error.log;
             events {{}}
             http {{
                 access_log off;
                 client_body_temp_path {path}/1; proxy_temp_path {path}/2; fastcgi_temp_path {path}/3;
                 uwsgi_temp_path {path}/4; scgi_temp_path {path}/5;
                 server {{
                     listen 127.0.0.1:{port};
                     location / {{ proxy_pass {}; {lines} }}
                 }}
             }}",
            gateway.url()
        );
        let file = folder.path().join("nginx.conf");
        fs::write(&file, config).expect("its configuration");
        let mut command = Command::new("nginx");
        command
            .arg("-e")
            .arg(folder.path().join("error.log"))
            .arg("-c")
            .arg(file);
        let proxy = Proxy {
            _running: Running::start(&mut command),
            port,
            _folder: folder,
        };
        wait_for("nginx", || {
            std::net::TcpStream::connect(("127.0.0.1", port)).ok()
        });
        proxy
    }

    fn url(&self) -> String {
        format!("http://127.0.0.1:{}/", self.port)
    }
}

#[test]
fn behind_nginx_as_it_comes_pushes_and_followers_work() {
    let store = Store::new();
    let gateway = Gateway::start(&store.fast_url(), &[]);
    let proxy = Proxy::start(&gateway, "");
    let (one, two) = (Mount::new(&proxy.url(), &[]), Mount::new(&proxy.url(), &[]));
    one.out("touch topic");
    let reader = follow(&two, 1000);
    one.out("seq 999 > topic; echo last > topic");
    assert_eq!(read_lines(reader).last().map(String::as_str), Some("last"));
    one.out("echo first > other");
    let url = proxy.url();
    let mut curl = one.spawn(&format!(
        "exec curl -sN '{url}v1/pipes/other/messages?follow'"
    ));
    assert_eq!(curl.line(), "first");
    one.out("echo more > other");
    assert_eq!(curl.line(), "more");
}

/// What the README has nginx be told.
fn lines_of_the_readme() -> String {
    let readme = include_str!("../../README.md");
    let lines: Vec<&str> = readme
        .lines()
        .map(str::trim)
        .filter(|line| line.starts_with("client_max_body_size") || line.starts_with("proxy_"))
        .filter(|line| line.ends_with(';') && !line.starts_with("proxy_pass"))
        .collect();
    assert_eq!(lines.len(), 3, "{lines:?}");
    lines.join(" ")
}

/// As it comes, it speaks HTTP/1.0 to the gateway, in which the end of a connection is that of a body.
#[test]
fn a_pull_that_is_cut_behind_nginx_is_told_from_one_that_is_complete() {
    let store = Store::new();
    let gateway = Gateway::start(&store.fast_url(), &[]);
    let push = "dnpipes push big@file";
    store.out(&format!(
        "for i in 1 2 3; do head -c 15000000 /dev/zero | {push}; done"
    ));
    let as_it_comes = Proxy::start(&gateway, "");
    let proxy = Proxy::start(&gateway, &lines_of_the_readme());
    let mount = Mount::new(&as_it_comes.url(), &[]);
    mount.out("echo before > topic; touch killed");
    let mut reader = mount.spawn("exec cat topic@follow");
    assert_eq!(reader.line(), "before");
    // It takes only what the system has room for until the gateway is killed.
    let url = proxy.url();
    let mut curl = mount.spawn(&format!(
        "curl -sN '{url}v1/pipes/big/messages' | {{ head -c 1 > /dev/null; echo begun; cat killed - > /dev/null; }}
         echo ${{PIPESTATUS[0]}}"
    ));
    assert_eq!(curl.line(), "begun");
    let _gateway = gateway.crash_and_restart();
    mount.out("echo yes > killed");
    assert_eq!(curl.line(), "18");
    mount.out("echo after > topic");
    assert_eq!(reader.line(), "after");
}

#[test]
fn behind_nginx_with_the_lines_of_the_readme_large_and_streamed_pushes_work() {
    let store = Store::new();
    let gateway = Gateway::start(&store.fast_url(), &[]);
    let proxy = Proxy::start(&gateway, &lines_of_the_readme());
    let mount = Mount::new(&proxy.url(), &[]);
    mount.out("head -c 5000000 /dev/zero > big@file; stat -c %s big@file,snapshot");
    assert_eq!(mount.out("stat -c %s big@file,snapshot"), "5000000\n");
    // Each line arrives before the next is sent.
    let url = proxy.url();
    mount.out(&format!(
        "touch topic
         {{ for i in 1 2 3; do
             echo $i; until [ \"$(tail -n 1 topic@snapshot)\" = $i ]; do :; done
         done; }} | curl -sS -T - {url}v1/pipes/topic/messages"
    ));
    assert_eq!(mount.lines("topic"), ["1", "2", "3"]);
}
