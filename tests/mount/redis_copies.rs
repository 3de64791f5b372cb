//! Redis with replicas that have what is acknowledged (`?replicas=`).

use crate::load::{Work, Writers, assert_complete};
use crate::redis::{cli, start};
use crate::services::{Server, Services};
use crate::support::{Mount, Store, wait_for};

const WORK: Work = Work::large(60);

#[test]
fn a_failover_loses_nothing_that_a_replica_was_waited_for() {
    let services = Services::start(&["redis-sentinel"]);
    let sentinel = services.named("redis-sentinel").url;
    let source = format!("{sentinel}?sentinel=main&replicas=1");
    let (store, mounts) = (Store::new(), [(); 2].map(|()| Mount::new(&source, &[])));
    mounts[0].out("touch topic");
    let writers = [&mounts[0], &mounts[1], &mounts[0], &mounts[1]];
    let load = Writers::start(&store, &writers, WORK);
    load.await_acknowledged(WORK.lines / 4);
    services.tell("kill", "redis-master");
    let replica = services.named("redis-replica");
    wait_for("the failover", || {
        (cli(&replica, "redis ROLE | head -n 1") == "master\n").then_some(())
    });
    // Nothing is acknowledged until the other one has a replica again.
    services.tell("start", "redis-master");
    let port = replica.port;
    let master = services.named("redis-master");
    cli(&master, &format!("redis REPLICAOF 127.0.0.1 {port}"));
    load.finish();
    assert_complete(&mounts[0].lines("topic"), writers.len(), WORK);
}

/// A wait that the server breaks off is no answer.
#[test]
fn who_waits_for_replicas_of_a_master_that_is_none_any_more_tries_again() {
    let (_services, server) = start(&[]);
    let mount = Mount::new(&format!("{}?replicas=1", server.url), &["--timeout", "3s"]);
    let waiting = mount.spawn("echo waits > topic");
    wait_for("somebody who waits", || {
        let clients = cli(&server, "redis INFO clients");
        clients.contains("blocked_clients:1").then_some(())
    });
    cli(&server, "redis REPLICAOF 127.0.0.1 1");
    let errors = waiting.finish().stderr;
    let errors = String::from_utf8_lossy(&errors);
    assert!(errors.contains("Connection timed out"), "{errors}");
}

#[test]
fn a_push_waits_for_replicas_that_are_missing() {
    let services = Services::start(&["redis-sentinel"]);
    let master = services.named("redis-master").url;
    let mount = Mount::new(&format!("{master}?replicas=1"), &["--timeout", "3s"]);
    mount.out("echo before > topic; truncate -s 0 topic");
    services.tell("stop", "redis-replica");
    let late = mount.sh("echo late > topic");
    assert!(!late.status.success(), "{late:?}");
    let log = mount.log();
    assert!(log.contains("0 of 1 have it"), "{log}");
    let waiting = mount.spawn("echo waits > topic && echo stored");
    wait_for("the push on the server", || {
        (mount.out("cat topic@snapshot") == "late\nwaits\n").then_some(())
    });
    services.tell("cont", "redis-replica");
    assert_eq!(waiting.finish().stdout, b"stored\n");
    assert_eq!(mount.out("cat topic"), "late\nwaits\n");
}

/// What the old master has stored behind a failover is not on the replicas of the new one.
#[test]
fn a_push_to_a_master_that_is_none_any_more_waits_for_the_new_one() {
    let services = Services::start(&["redis-sentinel"]);
    let [master, replica, sentinel] =
        ["redis-master", "redis-replica", "redis-sentinel"].map(|name| services.named(name));
    // The new master has a replica as well.
    let third = Services::start(&["redis"]);
    let port = replica.port;
    cli(
        &third.server(),
        &format!("redis REPLICAOF 127.0.0.1 {port}"),
    );
    let is_so = |server: &Server, script: &str| {
        cli(server, &format!("{script} && echo yes || true")) == "yes\n"
    };
    wait_for("its replica", || {
        let up = "redis INFO replication | grep -q master_link_status:up";
        is_so(&third.server(), up).then_some(())
    });
    let source = format!("{}?sentinel=main&replicas=1", sentinel.url);
    let mount = Mount::new(&source, &[]);
    mount.out("echo before > topic");
    cli(&master, "redis CLIENT PAUSE 60000 WRITE");
    let writer = mount.spawn("echo late > topic && echo stored");
    wait_for("the push at the old master", || {
        let waits = "redis INFO clients | grep -q blocked_clients:1";
        is_so(&master, waits).then_some(())
    });
    wait_for("a failover", || {
        let begun = "redis SENTINEL FAILOVER main > /dev/null 2>&1";
        is_so(&sentinel, begun).then_some(())
    });
    wait_for("another master", || {
        let named = "redis SENTINEL GET-MASTER-ADDR-BY-NAME main | grep -qx";
        is_so(&sentinel, &format!("{named} {port}")).then_some(())
    });
    wait_for("the mount's news of it", || {
        mount
            .log()
            .contains("another server is the master now")
            .then_some(())
    });
    cli(&master, "redis CLIENT UNPAUSE");
    assert_eq!(writer.finish().stdout, b"stored\n");
    let there = cli(
        &replica,
        "redis XRANGE dnpipes:topic - + | grep -cx late || true",
    );
    assert_eq!(there, "1\n");
}
