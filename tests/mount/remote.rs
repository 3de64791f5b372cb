//! Mounts that share the pipes of one gateway, and what comes between them and it.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use crate::gateway::{Gateway, free_port};
use crate::support::{Mount, PYTHON, Running, Store, finish, wait_for};

/// Writes numbered lines, one a write(2), and notes how many were acknowledged.
const NUMBERED: &str = "
import os, sys
name, count, acks = sys.argv[1], int(sys.argv[2]), sys.argv[3]
fd = os.open('topic', os.O_WRONLY)
for number in range(count):
    line = ('%s %d %s\\n' % (name, number, 'x' * (number * 37 % 3000))).encode()
    if os.write(fd, line) != len(line):
        sys.exit('a short write')
    with open(acks, 'w') as file:
        print(number + 1, file=file)
";

fn acknowledged(path: &Path) -> usize {
    let text = fs::read_to_string(path).unwrap_or_default();
    text.trim().parse().unwrap_or(0)
}

/// Writers that number their lines.
struct Writers<'a> {
    store: &'a Store,
    running: Vec<Running>,
}

impl<'a> Writers<'a> {
    fn start(store: &'a Store, mounts: &[&Mount], lines: usize) -> Self {
        let acks = |writer: usize| store.folder().join(format!("acks{writer}"));
        let running = mounts.iter().enumerate().map(|(writer, mount)| {
            let acks = acks(writer);
            mount.spawn(&format!(
                "exec {PYTHON} -c \"{NUMBERED}\" w{writer} {lines} {}",
                acks.display()
            ))
        });
        Writers {
            store,
            running: running.collect(),
        }
    }

    /// Waits until each has `count` lines acknowledged.
    fn await_acknowledged(&self, count: usize) {
        for writer in 0..self.running.len() {
            let acks = self.store.folder().join(format!("acks{writer}"));
            wait_for("acknowledged lines", || {
                (acknowledged(&acks) >= count).then_some(())
            });
        }
    }

    /// Waits for their end; none may have seen an error.
    fn finish(self) {
        for writer in self.running {
            let output = writer.finish();
            assert!(output.status.success(), "{output:?}");
        }
    }
}

/// Each writer's lines are there once and in order, and no others.
fn assert_complete(lines: &[String], writers: usize, count: usize) {
    let mut next = vec![0; writers];
    for line in lines {
        let mut words = line.split(' ');
        let writer: usize = words.next().expect("a name")[1..]
            .parse()
            .expect("a number");
        let number: usize = words.next().expect("a number").parse().expect("a number");
        assert_eq!(number, next[writer], "writer {writer}");
        assert_eq!(words.next().expect("a rest").len(), number * 37 % 3000);
        next[writer] += 1;
    }
    assert_eq!(next, vec![count; writers]);
}

/// A reader that ends after `lines` lines, and what it has read.
fn follow(mount: &Mount, lines: usize) -> Running {
    mount.spawn(&format!("exec head -n {lines} topic@follow"))
}

fn read_lines(reader: Running) -> Vec<String> {
    let output = reader.finish();
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stdout).expect("text");
    text.lines().map(str::to_owned).collect()
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
    one.out("echo e > topic; sleep 0; echo f > topic");
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
    let writers = Writers::start(&store, &all, LINES);
    for kill in 1..=4 {
        writers.await_acknowledged(kill * LINES / 6);
        gateway = gateway.crash_and_restart();
    }
    writers.finish();
    let stored = mounts[0].lines("topic");
    assert_complete(&stored, 4, LINES);
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

/// Two hosts: network namespaces joined by a cable.
struct Hosts {
    near: String,
    far: String,
}

fn ip(words: &str) {
    let output = finish(Command::new("ip").args(words.split(' ')));
    assert!(output.status.success(), "ip {words}: {output:?}");
}

impl Hosts {
    /// The address of the far host.
    const FAR: &'static str = "10.77.0.1";

    fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let id = format!("dnp{}x{count}", std::process::id());
        let hosts = Hosts {
            near: format!("{id}n"),
            far: format!("{id}f"),
        };
        let Hosts { near, far } = &hosts;
        for host in [near, far] {
            ip(&format!("netns add {host}"));
            ip(&format!("-n {host} link set lo up"));
        }
        ip(&format!(
            "-n {near} link add v0 type veth peer name v0 netns {far}"
        ));
        ip(&format!("-n {far} addr add {}/24 dev v0", Self::FAR));
        ip(&format!("-n {near} addr add 10.77.0.2/24 dev v0"));
        for host in [near, far] {
            ip(&format!("-n {host} link set v0 up"));
        }
        hosts
    }

    /// A program in front of one that runs on a host: in its network, with everybody's mounts.
    fn on(host: &str) -> [String; 2] {
        ["nsenter".to_owned(), format!("--net=/run/netns/{host}")]
    }

    /// Cuts the cable: what arrives on the near host is dropped, or refused.
    fn cut(&self, target: &str) {
        self.rule("-A", target);
    }

    fn heal(&self, target: &str) {
        self.rule("-D", target);
    }

    fn rule(&self, action: &str, target: &str) {
        for (host, chain) in [(&self.near, "INPUT"), (&self.near, "OUTPUT")] {
            let [nsenter, net] = Self::on(host);
            let mut command = Command::new(nsenter);
            command
                .arg(net)
                .args(["iptables", "-w", action, chain, "-p", "tcp", "-j"])
                .args(target.split(' '));
            let output = finish(&mut command);
            assert!(output.status.success(), "{output:?}");
        }
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        for host in [&self.near, &self.far] {
            Command::new("ip")
                .args(["netns", "del", host])
                .stderr(Stdio::null())
                .status()
                .ok();
        }
    }
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
    let store = Store::new();
    let (mounts, _gateway, hosts) = apart(&store, &[]);
    mounts[0].out("touch topic");
    let readers: Vec<Running> = mounts
        .iter()
        .map(|mount| follow(mount, 2 * LINES))
        .collect();
    let all: Vec<&Mount> = mounts.iter().collect();
    let writers = Writers::start(&store, &all, LINES);
    writers.await_acknowledged(LINES / 4);
    hosts.cut(target);
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
    assert_complete(&stored, 2, LINES);
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

#[test]
fn behind_nginx_with_the_lines_of_the_readme_large_and_streamed_pushes_work() {
    let readme = include_str!("../../README.md");
    let lines: Vec<&str> = readme
        .lines()
        .map(str::trim)
        .filter(|line| line.starts_with("client_max_body_size") || line.starts_with("proxy_"))
        .filter(|line| line.ends_with(';') && !line.starts_with("proxy_pass"))
        .collect();
    assert_eq!(lines.len(), 3, "{lines:?}");
    let store = Store::new();
    let gateway = Gateway::start(&store.fast_url(), &[]);
    let proxy = Proxy::start(&gateway, &lines.join(" "));
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
