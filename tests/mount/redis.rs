//! What is Redis's own: other programs' streams, its settings, its ways to connect.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use dnpipes::backend::redis::{Redis, RedisUrl};
use dnpipes::backend::{Backend, Limit, Start};
use dnpipes::message::{Batch, Position, Producer, PushId};
use dnpipes::name::PipeName;
use futures_util::{StreamExt, stream};

use crate::brokers::{a_reset_reaches_buffers, works_without_a_complaint};
use crate::gateway::{Certificates, free_port, text};
use crate::load::read_lines;
use crate::network::Hosts;
use crate::services::{Server, Services};
use crate::support::{DNPIPES, Mount, Process, Running, Store, finish, wait_for};

/// What `redis-cli` says to a script of commands, with the server's address in front of each.
pub(crate) fn cli(server: &Server, script: &str) -> String {
    let output = finish(Command::new("bash").arg("-c").arg(format!(
        "set -e; redis() {{ redis-cli -e -p {} \"$@\"; }}\n{script}",
        server.port
    )));
    assert!(output.status.success(), "{script}: {output:?}");
    String::from_utf8(output.stdout).expect("text")
}

pub(crate) fn start(settings: &[&str]) -> (Services, Server) {
    let mut words = vec!["redis"];
    words.extend(settings.iter().flat_map(|line| ["--set", line]));
    let services = Services::start(&words);
    let server = services.server();
    (services, server)
}

/// `dnpipes ls` of a source, with variables of the environment.
fn list(source: &str, variables: &[(&str, &str)]) -> Output {
    let mut command = Command::new(DNPIPES);
    command
        .args(["ls", "--source", source])
        .envs(variables.iter().copied());
    finish(&mut command)
}

fn complaint(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    String::from_utf8(output.stderr.clone()).expect("text")
}

#[test]
fn streams_that_other_programs_made_are_read_and_pushed_to() {
    let (_services, server) = start(&[]);
    cli(
        &server,
        "redis XADD orders '*' item apple; redis XADD orders '*' item pear; redis SET other 1",
    );
    let mount = Mount::new(&format!("{}?prefix=", server.url), &[]);
    assert_eq!(mount.out("ls"), "orders\n");
    assert_eq!(
        mount.out("cat orders; grep -c pear orders; stat -c %s orders"),
        "apple\npear\n1\n11\n"
    );
    // A blocked reader hears of them, and they of it.
    let mut reader = mount.spawn("exec cat orders@follow");
    assert_eq!([reader.line(), reader.line()], ["apple", "pear"]);
    cli(&server, "redis XADD orders '*' item plum");
    assert_eq!(reader.line(), "plum");
    mount.out("echo cherry > orders");
    assert_eq!(reader.line(), "cherry");
    let entries = cli(&server, "redis XRANGE orders - +");
    let values: Vec<&str> = entries.lines().skip(2).step_by(3).collect();
    assert_eq!(values, ["apple", "pear", "plum", "cherry"]);
    // So is one that has this program's prefix.
    cli(&server, "redis XADD dnpipes:made '*' '' hello");
    let usual = Mount::new(&server.url, &[]);
    assert_eq!(usual.out("ls; cat made"), "made\nhello\n");
    usual.out("truncate -s 0 made; echo after > made");
    assert_eq!(
        cli(&server, "redis XLEN dnpipes:made; redis XLEN orders"),
        "1\n4\n"
    );
}

#[test]
fn an_entry_of_several_fields_is_a_line_of_json() {
    let (_services, server) = start(&[]);
    cli(
        &server,
        r#"redis XADD dnpipes:sensor '*' temp 21.5 place 'the "attic"' empty ''"#,
    );
    let mount = Mount::new(&server.url, &[]);
    let line = r#"{"temp":"21.5","place":"the \"attic\"","empty":""}"#;
    assert_eq!(mount.out("cat sensor"), format!("{line}\n"));
    assert_eq!(mount.out("jq -r .place sensor"), "the \"attic\"\n");
    // The size of what is not counted is not made up.
    assert_eq!(
        mount.out("stat -c %s sensor; getfattr --only-values -n user.dnpipes.count sensor"),
        "1\n1"
    );
}

#[test]
fn a_key_that_is_no_stream_is_not_listed_and_an_error_that_names_it() {
    let (_services, server) = start(&[]);
    cli(
        &server,
        "redis SET dnpipes:text hello; redis XADD dnpipes:pipe '*' a b",
    );
    let mount = Mount::new(&server.url, &[]);
    assert_eq!(mount.out("ls"), "pipe\n");
    let written = mount.python(
        "
        print(why(os.open, 'text', os.O_WRONLY | os.O_CREAT))
        ",
    );
    assert!(written == "EIO\n", "{written}");
    assert!(
        mount.log().contains("wrong kind of value"),
        "{}",
        mount.log()
    );
    assert_eq!(cli(&server, "redis GET dnpipes:text"), "hello\n");
}

#[test]
fn a_full_memory_is_enospc_and_a_reset_makes_room() {
    let (_services, server) = start(&["maxmemory 8mb", "maxmemory-policy noeviction"]);
    let mount = Mount::new(&server.url, &[]);
    let filled = mount.python(
        "
        fd = os.open('topic', os.O_WRONLY | os.O_CREAT)
        count, line = 0, b'x' * 9999 + b'\\n'
        while why(os.write, fd, line) == 'ok':
            count += 1
        print(count, why(os.write, fd, line))
        ",
    );
    let (count, error) = filled.trim().split_once(' ').expect("two words");
    assert_eq!(error, "ENOSPC");
    // Nothing that was acknowledged is missing, and nothing of what was refused is there.
    assert_eq!(mount.out("cat topic@snapshot | wc -l").trim(), count);
    mount.out("truncate -s 0 topic; echo room > topic");
    assert_eq!(mount.out("cat topic"), "room\n");
}

#[test]
fn settings_that_lose_messages_are_warned_of_at_the_mount() {
    let (_services, server) = start(&[
        "maxmemory 1gb",
        "maxmemory-policy allkeys-lru",
        "appendonly no",
    ]);
    let mount = Mount::new(&server.url, &[]);
    for word in ["allkeys-lru", "append-only"] {
        assert!(mount.log().contains(word), "{}", mount.log());
    }
    let (_services, server) = start(&[]);
    let mount = Mount::new(&server.url, &[]);
    assert!(!mount.log().contains("WARN"), "{}", mount.log());
}

/// Adds entries to `dnpipes:topic`, that begin with their number; `words` stand before the id.
fn add(server: &Server, numbers: std::ops::RangeInclusive<usize>, words: &str) {
    let (first, last) = numbers.into_inner();
    cli(
        server,
        &format!(
            "redis EVAL \"for i = {first}, {last} do \
             redis.call('XADD', 'dnpipes:topic', {words} '*', 'data', i .. ' ' .. ('x'):rep(10000)) end\" 0"
        ),
    );
}

/// The sum of what the mount says that readers have missed.
fn missed(mount: &Mount) -> usize {
    let log = mount.log();
    let counts = log.lines().filter_map(|line| {
        let (_, rest) = line.split_once("topic: a reader fell behind: ")?;
        rest.split(' ').next()?.parse::<usize>().ok()
    });
    counts.sum()
}

#[test]
fn a_reader_that_falls_behind_trimming_is_told_of_and_goes_on() {
    let (_services, server) = start(&[]);
    add(&server, 1..=2000, "");
    let mount = Mount::new(&server.url, &[]);
    let mut reader = BufReader::new(File::open(mount.file("topic@follow")).expect("a pipe"));
    let mut next = || -> usize {
        let mut line = String::new();
        reader.read_line(&mut line).expect("a line");
        let (number, _) = line.split_once(' ').expect("two words");
        number.parse().expect("a number")
    };
    assert_eq!(next(), 1);
    cli(&server, "redis XTRIM dnpipes:topic MAXLEN 10");
    let mut read = 1;
    while next() < 2000 {
        read += 1;
    }
    read += 1;
    assert!(read < 2000);
    wait_for("the log", || (missed(&mount) > 0).then_some(()));
    assert_eq!(read + missed(&mount), 2000);
    let missed_before = missed(&mount);
    // Also where a connection breaks in between.
    add(&server, 2001..=4000, "");
    assert_eq!(next(), 2001);
    cli(
        &server,
        "redis XTRIM dnpipes:topic MAXLEN 10; redis CLIENT KILL TYPE normal SKIPME yes",
    );
    let mut read = 1;
    while next() < 4000 {
        read += 1;
    }
    read += 1;
    assert!(read < 2000);
    wait_for("the log", || (missed(&mount) > missed_before).then_some(()));
    assert_eq!(read + missed(&mount), 2000 + missed_before);
    let missed_before = missed(&mount);
    // Who keeps up misses nothing, however short the stream is.
    for number in 4001..=4200 {
        add(&server, number..=number, "'MAXLEN', 1,");
        assert_eq!(next(), number);
    }
    // Nor does one who is overtaken by a reset.
    add(&server, 4201..=5000, "");
    assert_eq!(next(), 4201);
    mount.out("truncate -s 0 topic");
    add(&server, 5001..=5100, "");
    let mut last = 0;
    while last < 5100 {
        last = next();
    }
    assert_eq!(missed(&mount), missed_before);
}

#[test]
fn a_reset_reaches_readers_whose_mount_was_cut_off_from_such_news() {
    let (services, server) = start(&[]);
    a_reset_reaches_buffers(&services, || {
        cli(&server, "redis CLIENT KILL TYPE pubsub");
    });
}

#[test]
fn a_reset_leaves_nothing_pending_for_other_programs_groups() {
    let (_services, server) = start(&[]);
    let mount = Mount::new(&server.url, &[]);
    mount.out("seq 2500 > jobs");
    cli(
        &server,
        "redis XGROUP CREATE dnpipes:jobs workers 0
         redis XGROUP CREATE dnpipes:jobs others 0
         redis XREADGROUP GROUP workers one COUNT 2200 STREAMS dnpipes:jobs '>' > /dev/null
         redis XREADGROUP GROUP others two COUNT 3 STREAMS dnpipes:jobs '>' > /dev/null",
    );
    mount.out("truncate -s 0 jobs");
    assert_eq!(
        cli(
            &server,
            "for group in workers others; do redis XPENDING dnpipes:jobs $group | head -n 1; done"
        ),
        "0\n0\n"
    );
    // The groups go on with what comes.
    mount.out("echo next > jobs");
    let got = cli(
        &server,
        "redis XREADGROUP GROUP workers one STREAMS dnpipes:jobs '>'",
    );
    assert!(got.ends_with("next\n"), "{got}");
    // What is taken after the reset's look stays pending.
    let pending = cli(&server, "redis XPENDING dnpipes:jobs workers | head -n 1");
    assert_eq!(pending, "1\n");
}

#[test]
fn who_may_not_come_in_is_told_and_no_secret_is_shown() {
    let (_services, server) = start(&[
        "requirepass main-s3cret",
        "user reader on >r3ad-s3cret ~dnpipes:* +@read +info +eval +evalsha +script",
    ]);
    let store = Store::new();
    let file = store.folder().join("password");
    fs::write(&file, "main-s3cret\n").expect("a file");
    let source = &server.url;
    let file = file.to_str().expect("text");
    for (variables, exit) in [
        (vec![("DNPIPES_PASSWORD", "main-s3cret")], 0),
        (vec![("DNPIPES_PASSWORD_FILE", file)], 0),
        (
            vec![
                ("DNPIPES_USER", "default"),
                ("DNPIPES_PASSWORD", "main-s3cret"),
            ],
            0,
        ),
        (vec![("DNPIPES_PASSWORD", "wr0ng-s3cret")], 1),
        (
            vec![
                ("DNPIPES_USER", "nobody"),
                ("DNPIPES_PASSWORD", "main-s3cret"),
            ],
            1,
        ),
        (vec![], 1),
    ] {
        let output = list(source, &variables);
        assert_eq!(
            output.status.code(),
            Some(exit),
            "{variables:?}: {output:?}"
        );
        assert!(!format!("{output:?}").contains("s3cret"), "{output:?}");
    }
    let with = source.replace("//", "//:main-s3cret@");
    assert_eq!(list(&with, &[]).status.code(), Some(0));
    // Who may only read is denied a push.
    let mut push = Command::new(DNPIPES);
    push.args(["push", "--source", source, "topic", "x"]);
    push.env("DNPIPES_USER", "reader")
        .env("DNPIPES_PASSWORD", "r3ad-s3cret");
    let denied = complaint(&finish(&mut push));
    assert!(
        denied.contains("NOPERM") || denied.contains("permissions"),
        "{denied}"
    );
}

#[test]
fn with_tls_a_private_authority_is_trusted_when_it_is_named() {
    let certificates = Certificates::new();
    let folder = text(certificates.ca().parent().expect("a folder"));
    let services = Services::start(&["redis", "--certs", &folder]);
    let source = services.url();
    let named = format!("{source}?ca={}", text(&certificates.ca()));
    let mount = Mount::new(&named, &[]);
    mount.out("echo hello > topic");
    assert_eq!(mount.out("cat topic"), "hello\n");
    // With a certificate of its own.
    let file = |name: &str| text(&certificates.file(name));
    let own = format!(
        "{named}&cert={}&key={}",
        file("client.pem"),
        file("client.key")
    );
    assert_eq!(list(&own, &[]).stdout, b"topic\n");
    for wrong in [
        source.clone(),
        format!("{source}?ca={}", file("client.pem")),
    ] {
        let why = complaint(&list(&wrong, &[]));
        assert!(why.contains("certificate"), "{why}");
    }
    // One that wants a certificate is not waited for to want none.
    let port = services.server().port.to_string();
    let mut set = Command::new("redis-cli");
    set.args(["--tls", "-p", &port, "--cacert", &text(&certificates.ca())]);
    set.args(["CONFIG", "SET", "tls-auth-clients", "yes"]);
    assert_eq!(finish(&mut set).stdout, b"OK\n");
    let why = complaint(&list(&named, &[]));
    assert!(
        why.contains("CertificateRequired") && !why.contains("no answer"),
        "{why}"
    );
    assert_eq!(list(&own, &[]).stdout, b"topic\n");
}

#[test]
fn a_sentinel_says_who_is_master_and_a_failover_is_followed() {
    let services = Services::start(&["redis-sentinel"]);
    let source = format!("{}?sentinel=main", services.named("redis-sentinel").url);
    let mount = Mount::new(&source, &[]);
    mount.out("seq 100 > topic");
    let replica = services.named("redis-replica");
    wait_for("the replica", || {
        (cli(&replica, "redis XLEN dnpipes:topic") == "100\n").then_some(())
    });
    let reader = mount.spawn("exec head -n 102 topic@follow");
    services.tell("kill", "redis-master");
    mount.out("echo after > topic; echo more > topic");
    let output = reader.finish();
    let lines = String::from_utf8(output.stdout).expect("text");
    let lines: Vec<&str> = lines.lines().collect();
    assert_eq!(lines.len(), 102);
    assert_eq!(lines[99..], ["100", "after", "more"]);
    assert_eq!(cli(&replica, "redis XLEN dnpipes:topic"), "102\n");
}

/// The old master goes on acknowledging for ten seconds more, of which nothing is left.
#[test]
fn a_failover_is_followed_as_soon_as_the_sentinel_names_another_master() {
    let services = Services::start(&["redis-sentinel"]);
    let sentinel = services.named("redis-sentinel");
    let mount = Mount::new(&format!("{}?sentinel=main", sentinel.url), &[]);
    mount.out("echo before > topic");
    let mut reader = mount.spawn("exec cat topic@follow");
    assert_eq!(reader.line(), "before");
    let replica = services.named("redis-replica");
    wait_for("the replica", || {
        (cli(&replica, "redis XLEN dnpipes:topic") == "1\n").then_some(())
    });
    let is_so = |script: &str| cli(&sentinel, &format!("{script} && echo yes || true"));
    wait_for("a failover", || {
        // Not before the Sentinel has heard enough of the replica.
        let begun = is_so("redis SENTINEL FAILOVER main > /dev/null 2>&1");
        (begun == "yes\n").then_some(())
    });
    let port = replica.port;
    let named = format!("redis SENTINEL GET-MASTER-ADDR-BY-NAME main | grep -qx {port}");
    wait_for("another master", || {
        (is_so(&named) == "yes\n").then_some(())
    });
    let since = Instant::now();
    // A reader that connects to it must not keep the others from going over.
    mount.sh("timeout 0.2 cat topic@follow");
    wait_for("a push to it", || {
        mount.out("echo after >> topic");
        let there = cli(
            &replica,
            "redis XRANGE dnpipes:topic - + | grep -cx after || true",
        );
        (there != "0\n").then_some(())
    });
    let pushed = since.elapsed();
    wait_for("ears for what it tells of resets", || {
        let channels = cli(&replica, "redis PUBSUB CHANNELS 'dnpipes*'");
        channels.starts_with("dnpipes").then_some(())
    });
    let heard = since.elapsed();
    assert!(heard < Duration::from_secs(5), "{pushed:?}, {heard:?}");
    assert_eq!(reader.line(), "after");
}

#[test]
fn a_cluster_is_mounted_from_any_of_its_nodes() {
    let services = Services::start(&["redis-cluster"]);
    for server in services.servers() {
        let mount = Mount::new(&format!("{}?cluster", server.url), &[]);
        let name = server.name;
        mount.out(&format!(
            "for i in 1 2 3 4 5 6 7 8; do echo {name} >> pipe$i; done"
        ));
    }
    let server = services.server();
    let mount = Mount::new(&format!("{}?cluster", server.url), &[]);
    assert_eq!(
        mount.out("ls | wc -l; cat pipe* | sort | uniq -c | tr -s ' '"),
        "8\n 8 redis-1\n 8 redis-2\n 8 redis-3\n"
    );
    mount.out("truncate -s 0 pipe1; echo last > pipe1");
    assert_eq!(mount.out("cat pipe1"), "last\n");
    // Who does not say that it is one is told.
    let why = complaint(&list(&server.url, &[]));
    assert!(why.contains("?cluster"), "{why}");
}

/// Eight pipes, more than a cluster has nodes, and a follower of each that has read what is there.
fn followed_pipes(services: &Services) -> (Mount, Vec<Running>) {
    let mount = Mount::new(&format!("{}?cluster", services.url()), &[]);
    mount.out("for i in 1 2 3 4 5 6 7 8; do echo before > pipe$i; done");
    let follow = |pipe| {
        let mut reader = mount.spawn(&format!("exec cat pipe{pipe}@follow"));
        assert_eq!(reader.line(), "before");
        reader
    };
    let readers = (1..=8).map(follow).collect();
    (mount, readers)
}

#[test]
fn followers_of_a_cluster_survive_a_node_that_is_killed() {
    let services = Services::start(&["redis-cluster"]);
    let (mount, readers) = followed_pipes(&services);
    services.tell("kill", "redis-2");
    services.tell("start", "redis-2");
    mount.out("for i in 1 2 3 4 5 6 7 8; do echo after > pipe$i; done");
    for mut reader in readers {
        assert_eq!(reader.line(), "after");
    }
}

#[test]
fn a_cluster_is_waited_for_while_a_slot_has_no_master() {
    let services = Services::start(&["redis-cluster"]);
    let (mount, readers) = followed_pipes(&services);
    services.tell("kill", "redis-2");
    let writers: Vec<Running> = (1..=8)
        .map(|pipe| mount.spawn(&format!("echo after > pipe{pipe}")))
        .collect();
    // By now the others have sent whoever asked them to the one that is dead.
    wait_for("the others to miss it", || {
        let nodes = cli(&services.named("redis-1"), "redis CLUSTER NODES");
        nodes.contains("master,fail ").then_some(())
    });
    services.tell("start", "redis-2");
    for writer in writers {
        let output = writer.finish();
        assert!(output.status.success(), "{output:?} {}", mount.log());
    }
    for mut reader in readers {
        assert_eq!(reader.line(), "after", "{}", mount.log());
    }
}

#[test]
fn a_stream_that_expires_is_warned_of() {
    let (_services, server) = start(&[]);
    let mount = Mount::new(&server.url, &[]);
    cli(
        &server,
        "redis XADD dnpipes:short '*' data x; redis EXPIRE dnpipes:short 1000",
    );
    mount.out("echo y > short; cat short; echo z > long; cat long");
    let log = mount.log();
    assert_eq!(
        log.matches("short: its stream expires in").count(),
        1,
        "{log}"
    );
    assert!(!log.contains("long: its"), "{log}");
}

#[test]
fn the_last_65536_pushes_are_known_and_no_more_than_twice_as_many_are_kept() {
    const PUSHES: u64 = 140_000;
    let (_services, server) = start(&["appendfsync no"]);
    let url = RedisUrl::parse(&server.url).expect("its URL");
    let redis = Redis::open(&url).expect("a client");
    let pipe = PipeName::new("topic").expect("legal");
    let push = async |number: u64| {
        let producer = Producer::from_bytes(u128::from(number).to_be_bytes());
        let batch = Batch::new(vec![number.to_string().into()]).expect("one");
        let pushed = redis.push(&pipe, PushId::first(producer, 7), batch);
        pushed.await.expect("acknowledged")
    };
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let again: Vec<u64> = (1..=65_536)
        .map(|back| PUSHES - back)
        .step_by(997)
        .collect();
    runtime.block_on(async {
        let all = stream::iter(0..PUSHES).map(&push).buffered(64);
        let positions: Vec<Position> = all.collect().await;
        for number in again {
            assert_eq!(push(number).await, positions[number as usize], "{number}");
        }
    });
    let counts = cli(
        &server,
        "redis XLEN dnpipes:topic
         for key in known earlier; do redis HLEN \"dnpipes-$key:{dnpipes:topic}\"; done",
    );
    let counts: Vec<u64> = counts
        .lines()
        .map(|line| line.parse().expect("a number"))
        .collect();
    assert_eq!(counts[0], PUSHES);
    assert!(
        counts[1..].iter().all(|count| *count < 65_536 + 20),
        "{counts:?}"
    );
}

#[test]
fn many_large_entries_are_read_in_little_memory() {
    let (_services, server) = start(&["appendonly no"]);
    // Of another program, so that nobody knows how large they are.
    cli(
        &server,
        "redis EVAL \"for i = 1, 200 do redis.call('XADD', 'dnpipes:big', '*', 'blob', string.rep('x', 4 * 1024 * 1024)) end\" 0",
    );
    let mount = Mount::new(&server.url, &[]);
    assert_eq!(
        mount.out("cat big | wc -c").trim(),
        (200 * (4 * 1024 * 1024 + 1)).to_string()
    );
    let peak = mount.kib_of("VmHWM");
    assert!(peak < 128 << 10, "{peak} KiB");
}

/// Each that is looked at by itself keeps the server from others for as long as a push does.
#[test]
fn who_begins_to_follow_a_long_pipe_keeps_nobody_waiting() {
    let (_services, server) = start(&[]);
    let mount = Mount::new(&server.url, &[]);
    mount.out("seq 5000 > topic");
    cli(&server, "redis CONFIG RESETSTAT");
    let read = read_lines(mount.spawn("exec head -n 5000 topic@follow"));
    assert_eq!(read.last().map(String::as_str), Some("5000"));
    let stats = cli(&server, "redis INFO commandstats");
    let calls = stats
        .lines()
        .find_map(|line| line.strip_prefix("cmdstat_xrange:calls="))
        .and_then(|rest| rest.split(',').next()?.parse::<usize>().ok());
    let calls = calls.expect("it was read by XRANGE");
    assert!(calls < 200, "{calls} for 5000 entries");
}

#[test]
fn large_entries_behind_small_ones_are_followed_in_little_memory() {
    let (_services, server) = start(&["appendonly no"]);
    let mount = Mount::new(&server.url, &[]);
    mount.out("seq 2000 > big");
    let mut reader = mount.spawn_python(
        "
        fd = os.open('big@follow', os.O_RDONLY)
        end = b''
        while not end.endswith(b'\\n2000\\n'):
            end = os.read(fd, 1 << 16)
        print('ready', flush=True)
        left = 60 * ((4 << 20) + 1)
        while left > 0:
            left -= len(os.read(fd, 1 << 20))
        print(left, flush=True)
        ",
    );
    assert_eq!(reader.line(), "ready");
    cli(
        &server,
        "redis EVAL \"for i = 1, 60 do redis.call('XADD', 'dnpipes:big', '*', 'data', string.rep('x', 4 * 1024 * 1024)) end\" 0",
    );
    assert_eq!(reader.line(), "0");
    let peak = mount.kib_of("VmHWM");
    assert!(peak < 128 << 10, "{peak} KiB");
}

#[test]
fn a_user_needs_no_more_rights_than_the_readme_says() {
    let readme = include_str!("../../README.md");
    let rights: Vec<&str> = readme
        .lines()
        .map(str::trim)
        .filter_map(|line| {
            line.strip_prefix('`')?
                .split_once('`')
                .map(|(rights, _)| rights)
        })
        .filter(|rights| rights.starts_with("~dnpipes:") || rights.starts_with("+exists"))
        .collect();
    assert_eq!(rights.len(), 2, "{rights:?}");
    let user = format!("user pipes on >s3cret {}", rights.join(" "));
    let (_services, server) = start(&[&user]);
    let source = server.url.replace("//", "//pipes:s3cret@");
    works_without_a_complaint(&source);
}

#[test]
fn readers_that_need_not_wait_for_a_push_keep_to_the_timeout() {
    let (services, server) = start(&[]);
    let mount = Mount::new(&server.url, &["--timeout", "2s"]);
    mount.out("echo hello > topic");
    services.tell("stop", &server.name);
    for (open, expected) in [
        ("'topic@snapshot', os.O_RDONLY", "ETIMEDOUT\n"),
        ("'topic@follow', os.O_RDONLY | os.O_NONBLOCK", "EAGAIN\n"),
    ] {
        let since = Instant::now();
        let read = mount.python(&format!(
            "
            print(why(lambda: os.read(os.open({open}), 100)))
            "
        ));
        assert_eq!(read, expected, "{}", mount.log());
        let waited = since.elapsed();
        assert!(waited < Duration::from_secs(6), "{open}: {waited:?}");
    }
}

/// A port at which connections are taken, and nothing is ever said.
fn mute() -> (TcpListener, u16) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("its address").port();
    (listener, port)
}

#[test]
fn a_host_that_says_nothing_keeps_nobody_from_the_next() {
    let (_services, server) = start(&[]);
    let (_mute, port) = mute();
    let source = format!("redis://127.0.0.1:{port},127.0.0.1:{}", server.port);
    let since = Instant::now();
    let mount = Mount::new(&source, &["--timeout", "3s"]);
    mount.out("echo hello > topic");
    assert_eq!(mount.out("cat topic"), "hello\n");
    assert!(since.elapsed() < Duration::from_secs(10));
}

#[test]
fn a_first_listing_may_take_longer_than_others() {
    let (services, server) = start(&[]);
    cli(&server, "redis XADD dnpipes:topic '*' data message");
    let mount = Mount::new(&services.url(), &[]);
    // Its answers wait so long, in milliseconds.
    cli(&server, "redis CLIENT PAUSE 2500 ALL");
    assert_eq!(mount.out("ls"), "topic\n");
    cli(
        &server,
        "redis XADD dnpipes:another '*' data message; redis CLIENT PAUSE 8000 ALL",
    );
    // From then on what is known is told; the list goes on meanwhile, and serves those who come later.
    assert_eq!(mount.out("ls"), "topic\n");
    wait_for("the other pipe", || {
        (mount.out("ls") == "another\ntopic\n").then_some(())
    });
}

#[test]
fn who_may_not_write_is_told_so() {
    let (services, server) = start(&[]);
    cli(
        &server,
        "redis ACL SETUSER reader on '>word' '~*' '&*' +@all -xadd; redis XADD dnpipes:topic '*' data one",
    );
    let source = services.url().replace("://", "://reader:word@");
    let mount = Mount::new(&source, &[]);
    let read = mount.python(
        "
        print(open('topic@snapshot').read(), end='')
        print(why(lambda: os.write(os.open('topic', os.O_WRONLY), b'two\\n')))
        ",
    );
    assert_eq!(read, "one\nEACCES\n", "{}", mount.log());
}

/// What is stored without a note of it would be stored again by who writes it again.
#[test]
fn a_right_that_is_missing_within_a_push_stores_nothing() {
    let (services, server) = start(&[]);
    cli(
        &server,
        "redis ACL SETUSER pipes on '>word' '~*' '&*' +@all",
    );
    let source = services.url().replace("://", "://pipes:word@");
    let mount = Mount::new(&source, &[]);
    mount.out("echo one > topic; seq 500 > topic; echo two > topic");
    let mut writer = mount.spawn_python(
        "
        import signal
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
        fd = os.open('topic', os.O_WRONLY)
        print('open', flush=True)
        while True:
            signal.sigwait([signal.SIGUSR1])
            print(*[why(os.write, fd, text) for text in (b'three\\n', b'four\\n' * 500)], flush=True)
        ",
    );
    assert_eq!(writer.line(), "open");
    for (right, said) in [("-hset", "EACCES EACCES"), ("+hset", "ok ok")] {
        cli(&server, &format!("redis ACL SETUSER pipes {right}"));
        writer.signal(libc::SIGUSR1);
        assert_eq!(writer.line(), said, "{}", mount.log());
    }
    assert_eq!(mount.out("wc -l < topic"), "1003\n");
}

/// Also where whoever asks stops waiting before it is known that nothing comes.
#[test]
fn a_server_that_hangs_is_given_up_by_short_tries_as_well() {
    let services = Services::start(&["redis-sentinel"]);
    let [master, replica] = ["redis-master", "redis-replica"].map(|name| services.named(name));
    let ports = format!("127.0.0.1:{},127.0.0.1:{}", master.port, replica.port);
    let mount = Mount::new(&format!("redis://{ports}/"), &["--timeout", "3s"]);
    mount.out("echo one > topic");
    wait_for("the replica", || {
        (cli(&replica, "redis XLEN dnpipes:topic") == "1\n").then_some(())
    });
    services.tell("stop", "redis-master");
    cli(&replica, "redis REPLICAOF NO ONE");
    wait_for("a push to the other one", || {
        mount.sh("echo two > topic").status.success().then_some(())
    });
    assert_eq!(mount.out("tail -n 1 topic"), "two\n");
}

/// Two ends of one open file: the line before the first close is not the one behind it.
#[test]
fn what_is_written_behind_a_close_that_was_interrupted_is_pushed() {
    let (services, server) = start(&[]);
    let mount = Mount::new(&server.url, &[]);
    let mut writer = mount.spawn_python(
        "
        import signal
        signal.signal(signal.SIGUSR1, lambda *_: None)
        fd = os.open('topic', os.O_WRONLY | os.O_CREAT)
        os.write(fd, b'first\\n')
        os.write(fd, b'before')
        copy = os.dup(fd)
        print('open', flush=True)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
        signal.sigwait([signal.SIGUSR2])
        print(why(os.close, copy), flush=True)
        signal.sigwait([signal.SIGUSR2])
        os.write(fd, b'behind')
        os.close(fd)
        ",
    );
    assert_eq!(writer.line(), "open");
    services.tell("stop", &server.name);
    writer.signal(libc::SIGUSR2);
    writer.wait_until_blocked();
    writer.signal(libc::SIGUSR1);
    assert_eq!(writer.line(), "EINTR");
    services.tell("cont", &server.name);
    wait_for("the first line", || {
        (mount.out("cat topic@snapshot") == "first\nbefore\n").then_some(())
    });
    writer.signal(libc::SIGUSR2);
    assert!(writer.finish().status.success());
    assert_eq!(mount.out("cat topic"), "first\nbefore\nbehind\n");
}

/// Two processes on one open file: a push that is repeated behind another one is no older than that to the server.
#[test]
fn what_is_written_again_behind_another_process_s_push_is_stored() {
    let (services, server) = start(&[]);
    let mount = Mount::new(&server.url, &[]);
    let mut writers = mount.spawn_python(
        "
        import signal
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGHUP, signal.SIGUSR2])
        fd = os.open('topic', os.O_WRONLY | os.O_CREAT)
        os.write(fd, b'first\\n')
        child = os.fork()
        if child == 0:
            def interrupted(*_):
                raise InterruptedError(4, 'a signal')
            signal.signal(signal.SIGUSR1, interrupted)
            print(os.getpid(), flush=True)
            signal.sigwait([signal.SIGUSR2])
            print(why(os.write, fd, b'of the child\\n'), flush=True)
            signal.sigwait([signal.SIGUSR2])
            print(why(os.write, fd, b'of the child\\n'), flush=True)
            os._exit(0)
        signal.sigwait([signal.SIGHUP])
        print(why(os.write, fd, b'of the parent\\n'), flush=True)
        os.waitpid(child, 0)
        ",
    );
    let child = writers.line().parse().expect("a process");
    let child = Process::open(child).expect("the child");
    services.tell("kill", &server.name);
    child.signal(libc::SIGUSR2);
    writers.wait_until_blocked();
    child.signal(libc::SIGUSR1);
    assert_eq!(writers.line(), "EINTR");
    services.tell("start", &server.name);
    mount.out("cat topic@snapshot");
    writers.signal(libc::SIGHUP);
    assert_eq!(writers.line(), "ok");
    child.signal(libc::SIGUSR2);
    assert_eq!(writers.line(), "ok");
    assert!(writers.finish().status.success());
    let said = mount.out("sort topic");
    assert_eq!(said, "first\nof the child\nof the parent\n");
}

/// A store that held nothing when it was last asked is known to hold nothing.
#[test]
fn an_empty_list_is_known_while_the_server_is_away() {
    let (services, server) = start(&[]);
    let mount = Mount::new(&server.url, &[]);
    assert_eq!(mount.out("ls"), "");
    services.tell("kill", &server.name);
    assert_eq!(mount.out("ls && echo nothing"), "nothing\n");
}

/// Whoever unmounts need not know that a writer was killed in its line's midst.
#[test]
fn an_unmounted_daemon_pushes_the_lines_of_killed_writers() {
    let (services, server) = start(&[]);
    let mut mount = Mount::new(&server.url, &[]);
    let mut writer = mount.spawn_python(
        "
        import signal
        fd = os.open('topic', os.O_WRONLY | os.O_CREAT)
        os.write(fd, b'unfinished')
        print('open', flush=True)
        signal.pause()
        ",
    );
    assert_eq!(writer.line(), "open");
    services.tell("kill", &server.name);
    drop(writer);
    wait_for("a try to push it", || {
        mount.log().contains("pushing to topic").then_some(())
    });
    let done = finish(Command::new("umount").arg(mount.dir()));
    assert!(done.status.success(), "{done:?}");
    services.tell("start", &server.name);
    assert_eq!(mount.wait().code(), Some(0), "{}", mount.log());
    assert_eq!(
        cli(&server, "redis XRANGE dnpipes:topic - + | tail -n 1"),
        "unfinished\n"
    );
}

/// Whoever may publish there need not be one who may reset.
#[test]
fn a_made_up_word_of_a_reset_hides_nothing() {
    let (_services, server) = start(&[]);
    let mount = Mount::new(&server.url, &[]);
    mount.out("echo one > topic");
    let mut reader = mount.spawn("exec cat topic@follow");
    assert_eq!(reader.line(), "one");
    let tell = "redis PUBLISH dnpipes-resets-0 '99999999999999-0 dnpipes:topic'";
    wait_for("ears", || (cli(&server, tell) == "1\n").then_some(()));
    mount.out("echo two > topic");
    assert_eq!(reader.line(), "two");
    assert_eq!(mount.out("cat topic"), "one\ntwo\n");
}

/// A pipe that cannot be looked at concerns its own readers.
#[test]
fn resets_are_heard_of_although_one_pipe_cannot_be_looked_at() {
    let (_services, server) = start(&[]);
    let mount = Mount::new(&server.url, &[]);
    mount.out("echo one > good; echo one > bad");
    let mut holder = mount
        .spawn("exec 3< good@follow 4< bad@follow; head -n 1 <&3; head -n 1 <&4; exec sleep 1000");
    for _ in ["good", "bad"] {
        assert_eq!(holder.line(), "one");
    }
    cli(
        &server,
        "redis DEL dnpipes:bad; redis SET dnpipes:bad text; redis CLIENT KILL TYPE pubsub",
    );
    // Not for a moment only.
    let mut in_a_row = 0;
    wait_for("ears", || {
        let there = cli(&server, "redis PUBSUB NUMSUB dnpipes-resets-0 | tail -n 1");
        in_a_row = if there == "1\n" { in_a_row + 1 } else { 0 };
        (in_a_row == 30).then_some(())
    });
}

#[test]
fn a_server_with_all_clients_it_takes_is_waited_for_and_named() {
    let (_services, server) = start(&[]);
    let mount = Mount::new(&server.url, &[]);
    assert_eq!(
        mount.out("touch empty; echo one > topic; cat topic@snapshot"),
        "one\n"
    );
    let held = TcpStream::connect(("127.0.0.1", server.port)).expect("a connection");
    let mut answers = BufReader::new(held.try_clone().expect("a copy"));
    let mut set = |most: u32| {
        writeln!(&held, "CONFIG SET maxclients {most}").expect("sent");
        let mut answer = String::new();
        answers.read_line(&mut answer).expect("an answer");
        assert_eq!(answer, "+OK\r\n");
    };
    set(1);
    let mut reader = mount.spawn("exec cat empty");
    wait_for("word of it", || {
        mount.log().contains("maxclients").then_some(())
    });
    mount.out("echo two > empty");
    set(100);
    assert_eq!(reader.line(), "two");
}

#[test]
fn a_listing_survives_a_restart() {
    let (services, server) = start(&[]);
    let mount = Mount::new(&server.url, &[]);
    cli(&server, "redis XADD dnpipes:one '*' a b");
    assert_eq!(mount.out("ls"), "one\n");
    services.tell("kill", &server.name);
    services.tell("start", &server.name);
    cli(&server, "redis XADD dnpipes:two '*' a b");
    wait_for("the new pipe", || {
        (mount.out("ls") == "one\ntwo\n").then_some(())
    });
}

#[test]
fn who_may_look_at_some_pipes_is_shown_those() {
    let (_services, server) = start(&[
        "user some on >pw ~dnpipes:mine* ~dnpipes-*:mine* ~dnpipes-*:{dnpipes:mine* &* +@all",
    ]);
    cli(
        &server,
        "redis XADD dnpipes:mine '*' a b; redis XADD dnpipes:other '*' a b",
    );
    let as_some = [("DNPIPES_USER", "some"), ("DNPIPES_PASSWORD", "pw")];
    let output = list(&server.url, &as_some);
    assert_eq!(output.stdout, b"mine\n", "{output:?}");
    cli(&server, "redis DEL dnpipes:mine");
    let why = complaint(&list(&server.url, &as_some));
    assert_eq!(why.matches("no permissions").count(), 1, "{why}");
}

#[test]
fn a_stream_that_others_delete_and_make_again_is_another() {
    let (_services, server) = start(&[]);
    let mount = Mount::new(&server.url, &[]);
    mount.out("echo a > topic");
    cli(
        &server,
        "redis DEL dnpipes:topic; redis XADD dnpipes:topic '*' f 'hello world'",
    );
    wait_for("its new size", || {
        (mount.out("stat -c %s topic") == "12\n").then_some(())
    });
    // Where the old one started says nothing of where this one does.
    mount.out("truncate -s 0 topic");
    cli(
        &server,
        "redis DEL dnpipes:topic; redis XADD dnpipes:topic 1-1 f early",
    );
    let fresh = Mount::new(&server.url, &[]);
    assert_eq!(fresh.out("timeout 5 cat topic"), "early\n");
}

#[test]
fn an_entry_below_what_was_reset_is_not_asked_for_again_and_again() {
    let (_services, server) = start(&[]);
    let mount = Mount::new(&server.url, &[]);
    mount.out("echo a > topic; truncate -s 0 topic");
    let mut reader = mount.spawn("exec cat topic@follow");
    reader.wait_until_blocked();
    mount.out("truncate -s 0 topic");
    cli(
        &server,
        "redis DEL dnpipes:topic; redis XADD dnpipes:topic 1-1 f early",
    );
    let reads = || {
        let stats = cli(&server, "redis INFO commandstats");
        let reads = stats
            .split_once("cmdstat_xread:calls=")
            .map(|(_, rest)| rest.split_once(',').expect("more").0.parse::<u64>());
        reads.map_or(0, |reads| reads.expect("a number"))
    };
    wait_for("its wake", || (reads() > 1).then_some(()));
    let before = reads();
    std::thread::sleep(Duration::from_secs(1));
    assert!(reads() < before + 5, "{before}, {}", reads());
    cli(&server, "redis XADD dnpipes:topic '*' f late");
    assert_eq!(reader.line(), "late");
}

#[test]
fn ids_at_the_end_of_what_there_can_be_are_read_shown_and_reset() {
    let (_services, server) = start(&[]);
    let most = u64::MAX;
    cli(
        &server,
        &format!(
            "redis XADD dnpipes:last {most}-1 f one
             redis XADD dnpipes:last {most}-{most} f two
             redis XADD dnpipes:odd 9999999999999-9007199254740993 f one"
        ),
    );
    let output = finish(Command::new(DNPIPES).args(["ls", "-l", "--source", &server.url]));
    let shown = String::from_utf8(output.stdout.clone()).expect("text");
    assert!(shown.contains("9999-12-31"), "{output:?}");
    let mount = Mount::new(&server.url, &[]);
    assert_eq!(mount.out("timeout 5 cat last"), "one\ntwo\n");
    mount.out("truncate -s 0 last");
    assert_eq!(cli(&server, "redis XLEN dnpipes:last"), "0\n");
    // What is pushed next has the id behind; it is not taken for dropped.
    mount.out("truncate -s 0 odd; echo next > odd");
    assert_eq!(mount.out("timeout 5 cat odd"), "next\n");
}

#[test]
fn a_node_that_says_nothing_keeps_nobody_from_a_cluster() {
    let services = Services::start(&["redis-cluster"]);
    let (_mute, port) = mute();
    let server = services.server();
    let source = format!("redis://127.0.0.1:{port},127.0.0.1:{}?cluster", server.port);
    let since = Instant::now();
    let output = list(&source, &[]);
    assert!(output.status.success(), "{output:?}");
    assert!(since.elapsed() < Duration::from_secs(4), "{output:?}");
}

#[test]
fn what_is_known_of_a_removed_pipe_stays_where_others_make_it_again() {
    let (_services, server) = start(&[]);
    let mount = Mount::new(&server.url, &["--allow-delete"]);
    mount.out("echo a > topic; rm topic");
    let lives = || cli(&server, "redis TTL 'dnpipes-known:{dnpipes:topic}'");
    assert_ne!(lives(), "-1\n");
    cli(&server, "redis XADD dnpipes:topic '*' f b");
    mount.out("echo c > topic");
    assert_eq!(mount.out("cat topic"), "b\nc\n");
    assert_eq!(lives(), "-1\n");
}

#[test]
fn a_message_may_take_its_time_on_a_slow_network() {
    let hosts = Hosts::new();
    for host in [&hosts.near, &hosts.far] {
        let [nsenter, net] = Hosts::on(host);
        let mut shape = Command::new(nsenter);
        shape
            .arg(net)
            .args(["tc", "qdisc", "add", "dev", "v0", "root"]);
        shape.args("tbf rate 1300kbit burst 16kb latency 100ms".split(' '));
        let output = finish(&mut shape);
        assert!(output.status.success(), "{output:?}");
    }
    let port = free_port().to_string();
    let far = Hosts::on(&hosts.far).join(" ");
    let services = Services::start(&[
        "redis",
        "--bind",
        Hosts::FAR,
        "--port",
        &port,
        "--wrap",
        &far,
    ]);
    let [nsenter, near] = Hosts::on(&hosts.near);
    let mount = Mount::within(&[&nsenter, &near], &services.url(), &[]);
    // Longer than an answer may take that has nothing to carry.
    mount.out("head -c 2000000 /dev/zero > topic@file");
    assert_eq!(mount.out("cat topic@file | wc -c"), "2000000\n");
    assert!(!mount.log().contains("trying again"), "{}", mount.log());
}

#[test]
fn a_connection_is_made_although_no_caller_waits_so_long() {
    let (_services, server) = start(&[]);
    cli(&server, "redis XADD dnpipes:topic '*' data hello");
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    runtime.block_on(async {
        let port = server.slow_way(Duration::from_millis(200)).await;
        let url = RedisUrl::parse(&format!("redis://127.0.0.1:{port}/")).expect("a URL");
        let redis = Redis::open(&url).expect("a client");
        let pipe = PipeName::new("topic").expect("legal");
        let source = redis.subscribe(&pipe, Start::Oldest);
        let mut source = source.await.expect("a source");
        let limit = Limit {
            max_bytes: 1,
            before: None,
        };
        let since = Instant::now();
        let found = loop {
            assert!(since.elapsed() < Duration::from_secs(20), "never");
            let next = tokio::time::timeout(Duration::from_millis(50), source.next(limit));
            if let Ok(found) = next.await {
                break found.expect("a message");
            }
        };
        assert_eq!(found[0].data, "hello");
        loop {
            assert!(since.elapsed() < Duration::from_secs(20), "never");
            let stat = tokio::time::timeout(Duration::from_millis(50), redis.stat(&pipe));
            if let Ok(info) = stat.await {
                assert_eq!(info.expect("a pipe").count, 1);
                break;
            }
        }
    });
}
