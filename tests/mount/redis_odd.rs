//! What others leave in a Redis, and what becomes of the pipes.

use std::fs;

use crate::redis::{cli, start};
use crate::services::Services;
use crate::support::{Mount, wait_for};

/// Names take as much memory as what they stand for.
#[test]
fn entries_with_huge_names_are_read_in_little_memory() {
    let (_services, server) = start(&["appendonly no"]);
    cli(
        &server,
        "redis EVAL \"for i = 1, 100 do redis.call('XADD', 'dnpipes:big', '*', string.rep('n', 4 * 1024 * 1024), 'v') end\" 0",
    );
    let mount = Mount::new(&server.url, &[]);
    assert_eq!(
        mount.out("cat big | sort | uniq -c | tr -s ' '"),
        " 100 v\n"
    );
    let peak = mount.kib_of("VmHWM");
    assert!(peak < 128 << 10, "{peak} KiB");
}

#[test]
fn where_a_pipe_starts_may_make_no_sense_until_it_is_reset_or_removed() {
    let (_services, server) = start(&[]);
    let mount = Mount::new(&server.url, &["--allow-delete"]);
    let known = "dnpipes-known:{dnpipes:topic}";
    let spoil = || {
        for pipe in ["topic", "other"] {
            mount.out(&format!("echo before > {pipe}"));
        }
        cli(&server, &format!("redis HSET '{known}' .floor nonsense"));
        assert_eq!(
            mount.out("ls; cat other@snapshot | tail -n 1"),
            "other\ntopic\nbefore\n"
        );
        let read = mount.python("\n        print(why(lambda: open('topic@snapshot').read()))\n");
        assert_eq!(read, "EIO\n");
        assert!(mount.log().contains(known), "{}", mount.log());
    };
    spoil();
    mount.out("truncate -s 0 topic; echo after > topic");
    assert_eq!(mount.out("cat topic"), "after\n");
    spoil();
    mount.out("rm topic; echo again > topic");
    assert_eq!(mount.out("cat topic"), "again\n");
}

#[test]
fn a_pipe_whose_ids_are_used_up_names_the_keys_to_delete() {
    let (_services, server) = start(&[]);
    let mount = Mount::new(&server.url, &["--allow-delete", "--timeout", "5s"]);
    mount.out("echo a > topic");
    let most = u64::MAX;
    cli(
        &server,
        &format!("redis XADD dnpipes:topic {most}-{most} data x"),
    );
    for (before, lines) in [("true", 1), ("truncate -s 0 topic", 500), ("rm topic", 1)] {
        mount.out(before);
        let pushed = mount.python(&format!(
            "
            print(why(lambda: os.write(os.open('topic', os.O_WRONLY | os.O_CREAT), b'y\\n' * {lines})))
            "
        ));
        assert_eq!(pushed, "EIO\n", "{before}");
    }
    let log = mount.log();
    let way_out = "DEL dnpipes:topic dnpipes-known:{dnpipes:topic}";
    assert_eq!(log.matches(way_out).count(), 3, "{log}");
    cli(
        &server,
        &format!("redis {}", way_out.replace('{', "'{").replace('}', "}'")),
    );
    let fresh = Mount::new(&server.url, &[]);
    fresh.out("echo z > topic");
    assert_eq!(fresh.out("cat topic"), "z\n");
}

#[test]
fn a_reader_that_is_cut_off_again_and_again_slows_down_and_says_so_once() {
    let (_services, server) = start(&[]);
    let mount = Mount::new(&server.url, &[]);
    mount.out("seq 200000 > topic");
    cli(
        &server,
        "redis CONFIG SET client-output-buffer-limit 'normal 200kb 0 0'",
    );
    let cuts = || {
        let log = fs::read_to_string(server.folder.join("log")).expect("its log");
        log.matches("overcoming of output buffer limits").count()
    };
    let reader = mount.spawn("exec cat topic@snapshot | sha256sum");
    wait_for("some cuts", || (cuts() > 5).then_some(()));
    cli(
        &server,
        "redis CONFIG SET client-output-buffer-limit 'normal 0 0 0'",
    );
    let read = String::from_utf8(reader.finish().stdout).expect("text");
    assert_eq!(read, mount.out("seq 200000 | sha256sum"));
    let log = mount.log();
    assert_eq!(log.matches("trying again").count(), 1, "{log}");
}

/// Where some of the keys that a request names are there and others are not, no node of a cluster takes it while they
/// are on their way (redis.io, "Redis cluster specification", TRYAGAIN).
#[test]
fn a_slot_that_is_to_be_moved_takes_pushes_until_its_keys_are_on_their_way() {
    let services = Services::start(&["redis-cluster"]);
    let mount = Mount::new(&format!("{}?cluster", services.url()), &["--timeout", "8s"]);
    mount.out("echo a > topic");
    let servers = services.servers();
    let first = &servers[0];
    let slot = cli(first, "redis CLUSTER KEYSLOT dnpipes:topic");
    let slot = slot.trim();
    let has = |server| cli(server, &format!("redis CLUSTER COUNTKEYSINSLOT {slot}")) != "0\n";
    let from = servers
        .iter()
        .find(|server| has(server))
        .expect("the pipe's node");
    let to = servers
        .iter()
        .find(|server| !has(server))
        .expect("another one");
    let [from_id, to_id] = [from, to].map(|server| cli(server, "redis CLUSTER MYID"));
    cli(
        to,
        &format!("redis CLUSTER SETSLOT {slot} IMPORTING {from_id}"),
    );
    cli(
        from,
        &format!("redis CLUSTER SETSLOT {slot} MIGRATING {to_id}"),
    );
    mount.out("echo b > topic; seq 500 > topic");
    // Also of a pipe that has had more producers than are remembered, and then has all keys.
    cli(
        from,
        "key='dnpipes-known:{dnpipes:topic}'
         read -r added length bytes largest producers last <<< \"$(redis HGET \"$key\" .count)\"
         redis HSET \"$key\" .count \"$added $length $bytes $largest 65536 $last\"",
    );
    let moved = format!(
        "for key in $(redis CLUSTER GETKEYSINSLOT {slot} 10); do
             redis MIGRATE 127.0.0.1 {} \"$key\" 0 5000
         done",
        to.port
    );
    cli(from, &moved);
    for node in [to, from] {
        cli(node, &format!("redis CLUSTER SETSLOT {slot} NODE {to_id}"));
    }
    mount.out("echo c > topic; echo d > topic");
    assert_eq!(
        mount.out("cat topic | sed '3,502d'"),
        "a\nb\nc\nd\n",
        "{}",
        mount.log()
    );
    let earlier = cli(to, "redis EXISTS 'dnpipes-earlier:{dnpipes:topic}'");
    assert_eq!(earlier, "1\n");
}

#[test]
fn a_reader_has_not_fallen_behind_in_a_stream_of_another_database() {
    let (_services, server) = start(&[]);
    let mount = Mount::new(&server.url, &[]);
    mount.out("seq 1000 > topic");
    let mut reader = mount.spawn("exec grep --line-buffered end topic@follow");
    for round in 0..3 {
        if round > 0 {
            cli(&server, "redis SWAPDB 0 5");
        }
        // It looks at the pipe after 64 entries.
        mount.out("seq 200 > topic; echo end > topic");
        assert_eq!(reader.line(), "end");
    }
    let log = mount.log();
    assert!(!log.contains("fell behind"), "{log}");
}
