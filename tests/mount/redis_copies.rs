//! Redis with replicas that have what is acknowledged (`?replicas=`).

use crate::load::{Work, Writers, assert_complete};
use crate::redis::cli;
use crate::services::Services;
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
