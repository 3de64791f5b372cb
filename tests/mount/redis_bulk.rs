//! Large pushes to Redis, which go by a transaction: whatever comes in between, they are stored whole, once, and in
//! their order.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use dnpipes::backend::redis::{Redis, RedisUrl};
use dnpipes::backend::{Backend, Limit, Start};
use dnpipes::error::{Applied, Kind};
use dnpipes::message::{Batch, Position, Producer, PushId};
use dnpipes::name::PipeName;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use crate::load::{Work, Writers, assert_complete};
use crate::redis::{cli, start};
use crate::services::Server;
use crate::support::{Mount, Store};

/// Messages of a push that certainly is a large one.
const MANY: usize = 1000;

const DEADLINE: Duration = Duration::from_secs(20);

fn topic() -> PipeName {
    PipeName::new("topic").expect("legal")
}

fn new_id() -> PushId {
    PushId::first(Producer::random().expect("randomness"), 1)
}

fn texts(of: &str, count: usize) -> Vec<String> {
    (0..count).map(|number| format!("{of} {number}")).collect()
}

fn batch(texts: &[String]) -> Batch {
    let copy = |text: &String| Bytes::copy_from_slice(text.as_bytes());
    Batch::new(texts.iter().map(copy).collect()).expect("not empty")
}

async fn client(port: u16) -> Redis {
    let url = RedisUrl::parse(&format!("redis://127.0.0.1:{port}/")).expect("a URL");
    let redis = Redis::open(&url).expect("a client");
    // Connected: only then is it known which server large pushes go to.
    redis.list().await.expect("a listing");
    redis
}

async fn contents(redis: &Redis) -> Vec<String> {
    let source = redis.subscribe(&topic(), Start::Oldest).await;
    let mut source = source.expect("a source");
    let limit = Limit {
        max_bytes: 1 << 20,
        before: Some(Position::MAX),
    };
    let mut all = Vec::new();
    loop {
        let some = source.next(limit).await.expect("messages");
        if some.is_empty() {
            return all;
        }
        let text = |data: &[u8]| String::from_utf8(data.to_vec()).expect("text");
        all.extend(some.iter().map(|message| text(&message.data)));
    }
}

/// How often the server was told to do something.
fn calls(server: &Server, command: &str) -> usize {
    let stats = cli(server, "redis INFO commandstats");
    let calls = stats
        .split_once(&format!("cmdstat_{command}:calls="))
        .and_then(|(_, rest)| rest.split_once(','));
    calls.map_or(0, |(calls, _)| calls.parse().expect("a number"))
}

/// How many transactions the server was told to run.
fn runs(server: &Server) -> usize {
    calls(server, "exec")
}

async fn until(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let since = Instant::now();
    while !is_so().await {
        assert!(since.elapsed() < DEADLINE, "waited in vain for: {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// A way to the server on which a word is held back, but for the first ones of each connection.
struct Held {
    port: u16,
    /// How many are held.
    held: watch::Receiver<usize>,
    release: watch::Sender<bool>,
    /// Ends the connections for the client, not for the server.
    cut: watch::Sender<bool>,
}

impl Held {
    /// Holds back the word to run a transaction; the first one is a rehearsal.
    async fn new(server: &Server) -> Self {
        Self::holding(server, "EXEC", 1).await
    }

    /// Holds back `word`, but for so many first ones.
    async fn holding(server: &Server, word: &str, first: usize) -> Self {
        let word = format!("${}\r\n{word}\r\n", word.len());
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let port = listener.local_addr().expect("its address").port();
        let (count, held) = watch::channel(0);
        let (release, released) = watch::channel(false);
        let (cut, was_cut) = watch::channel(false);
        let (count, server) = (Arc::new(count), server.port);
        tokio::spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                let far = TcpStream::connect(("127.0.0.1", server)).await;
                let (mut from_near, mut to_near) = near.into_split();
                let (mut from_far, mut to_far) = far.expect("the server").into_split();
                let mut was_cut = was_cut.clone();
                tokio::spawn(async move {
                    tokio::select! {
                        _ = tokio::io::copy(&mut from_far, &mut to_near) => {}
                        () = async { drop(was_cut.wait_for(|is| *is).await) } => {}
                    }
                    drop(to_near.shutdown().await);
                });
                let (count, mut released) = (Arc::clone(&count), released.clone());
                let word = word.clone();
                tokio::spawn(async move {
                    let mut piece = vec![0; 1 << 20];
                    let mut said = 0;
                    loop {
                        let Ok(length @ 1..) = from_near.read(&mut piece).await else {
                            return;
                        };
                        // It is not sent behind what is long, and so is not cut.
                        said += memchr::memmem::find_iter(&piece[..length], &word).count();
                        if said > first {
                            count.send_modify(|count| *count += 1);
                            released.wait_for(|is| *is).await.expect("the test goes on");
                        }
                        if to_far.write_all(&piece[..length]).await.is_err() {
                            return;
                        }
                    }
                });
            }
        });
        Held {
            port,
            held,
            release,
            cut,
        }
    }

    /// Waits until one is held.
    async fn hold(&mut self) {
        let held = self.held.wait_for(|count| *count > 0);
        let held = tokio::time::timeout(DEADLINE, held).await;
        held.expect("a transaction in time")
            .expect("the way is there");
    }

    /// Pushes by a transaction that is held, and stops to wait for it.
    async fn hold_push(&mut self, client: &Redis, id: PushId, texts: &[String]) {
        let topic = topic();
        tokio::select! {
            pushed = client.push(&topic, id, batch(texts)) => panic!("it is held: {pushed:?}"),
            () = self.hold() => {}
        }
    }

    async fn release(&self, server: &Server) {
        let before = runs(server);
        self.release.send(true).expect("the way is there");
        until("the transaction", async || runs(server) > before).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn large_pushes_of_many_are_stored_whole_and_in_order() {
    const WRITERS: usize = 8;
    const PUSHES: usize = 10;
    let (_services, server) = start(&[]);
    let clients = [client(server.port).await, client(server.port).await].map(Arc::new);
    let writers = (0..WRITERS).map(|writer| {
        let client = Arc::clone(&clients[writer % 2]);
        tokio::spawn(async move {
            let producer = Producer::random().expect("randomness");
            let mut last = Position::MIN;
            for push in 0..PUSHES {
                // Every other one a small one.
                let count = [MANY, 3][push % 2];
                let texts = texts(&format!("{writer} {push}"), count);
                let id = PushId::first(producer, push as u64 + 1);
                let pushed = client.push(&topic(), id, batch(&texts)).await;
                let position = pushed.expect("stored");
                assert!(position > last);
                last = position;
                // Also known when it is repeated.
                let again = client.push(&topic(), id.again(), batch(&texts)).await;
                assert_eq!(again.expect("known"), position);
            }
        })
    });
    for writer in writers.collect::<Vec<_>>() {
        writer.await.expect("a writer");
    }
    let found = contents(&clients[0]).await;
    let mut next = [0; WRITERS];
    let mut rest = found.as_slice();
    while let Some(first) = rest.first() {
        let writer: usize = first[..1].parse().expect("a number");
        let push = next[writer];
        next[writer] += 1;
        let whole = texts(&format!("{writer} {push}"), [MANY, 3][push % 2]);
        assert!(rest.starts_with(&whole), "{first}");
        rest = &rest[whole.len()..];
    }
    assert_eq!(next, [PUSHES; WRITERS]);
    assert!(runs(&server) > WRITERS, "they went another way");
    let info = clients[0].stat(&topic()).await.expect("stat");
    let bytes: usize = found.iter().map(String::len).sum();
    assert_eq!(
        (info.count, info.bytes),
        (found.len() as u64, Some(bytes as u64))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_that_comes_behind_its_repeat_is_not_run() {
    let (_services, server) = start(&[]);
    let mut way = Held::new(&server).await;
    let late = Arc::new(client(way.port).await);
    let (id, texts) = (new_id(), texts("push", MANY));
    way.hold_push(&late, id, &texts).await;
    // Nobody waits any more. Also another process may be the one that repeats it.
    let again = client(server.port).await;
    let position = again.push(&topic(), id.again(), batch(&texts)).await;
    let position = position.expect("stored");
    way.release(&server).await;
    assert_eq!(contents(&again).await, texts);
    let third = late.push(&topic(), id.again(), batch(&texts)).await;
    assert_eq!(third.expect("known"), position);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_that_was_run_is_known_to_its_repeat() {
    let (_services, server) = start(&[]);
    let mut way = Held::new(&server).await;
    let late = client(way.port).await;
    let (id, texts) = (new_id(), texts("push", MANY));
    way.hold_push(&late, id, &texts).await;
    way.release(&server).await;
    late.push(&topic(), id.again(), batch(&texts))
        .await
        .expect("known");
    assert_eq!(contents(&late).await, texts);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_of_which_nobody_waits_to_hear_is_not_run_behind_the_next_push() {
    let (_services, server) = start(&[]);
    let mut way = Held::new(&server).await;
    let client = client(way.port).await;
    let producer = Producer::random().expect("randomness");
    way.hold_push(&client, PushId::first(producer, 1), &texts("one", MANY))
        .await;
    let next = texts("two", MANY);
    client
        .push(&topic(), PushId::first(producer, 2), batch(&next))
        .await
        .expect("stored");
    way.release(&server).await;
    assert_eq!(contents(&client).await, next);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_whose_end_is_not_known_is_not_run_behind_the_next_push() {
    let (_services, server) = start(&[]);
    let mut way = Held::new(&server).await;
    let late = Arc::new(client(way.port).await);
    let producer = Producer::random().expect("randomness");
    let pushing = tokio::spawn({
        let late = Arc::clone(&late);
        async move {
            let one = batch(&texts("one", MANY));
            late.push(&topic(), PushId::first(producer, 1), one).await
        }
    });
    way.hold().await;
    way.cut.send(true).expect("the way is there");
    let failed = pushing.await.expect("an end").expect_err("it is cut");
    assert_eq!(failed.kind(), Kind::Unreachable);
    assert_eq!(failed.applied(), Applied::Unknown);
    // It is not repeated: whoever wrote it gave up.
    way.cut.send(false).expect("the way is there");
    let next = texts("two", 1);
    let mut id = PushId::first(producer, 2);
    // The other connection was cut, too, as it may have to find out.
    while let Err(error) = late.push(&topic(), id, batch(&next)).await {
        assert_eq!(error.kind(), Kind::Unreachable);
        id = id.again();
    }
    way.release(&server).await;
    assert_eq!(contents(&client(server.port).await).await, next);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_forgets_its_scripts_meanwhile_stores_a_push_once() {
    let (_services, server) = start(&[]);
    let mut way = Held::new(&server).await;
    let late = Arc::new(client(way.port).await);
    let (id, texts) = (new_id(), texts("push", MANY));
    let pushing = tokio::spawn({
        let (late, batch) = (Arc::clone(&late), batch(&texts));
        async move { late.push(&topic(), id, batch).await }
    });
    way.hold().await;
    cli(&server, "redis SCRIPT FLUSH");
    way.release(&server).await;
    let position = pushing.await.expect("pushed").expect("stored");
    let again = late.push(&topic(), id.again(), batch(&texts)).await;
    assert_eq!(again.expect("known"), position);
    assert_eq!(contents(&late).await, texts);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_known_of_a_pipe_may_make_no_sense() {
    let (_services, server) = start(&[]);
    let redis = client(server.port).await;
    let mut stored = Vec::new();
    for (round, count) in ["x", "1 2 3", "-1 0 0 0 0 ", ""].iter().enumerate() {
        cli(
            &server,
            &format!("redis HSET dnpipes-known:'{{dnpipes:topic}}' .count '{count}'"),
        );
        for many in [1, MANY] {
            let texts = texts(&format!("{round} {many}"), many);
            redis
                .push(&topic(), new_id(), batch(&texts))
                .await
                .expect("stored");
            stored.extend(texts);
        }
        let info = redis.stat(&topic()).await.expect("stat");
        assert_eq!(info.count, stored.len() as u64);
    }
    assert_eq!(contents(&redis).await, stored);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pipe_that_is_removed_meanwhile_is_made_again() {
    let (_services, server) = start(&[]);
    let mut way = Held::new(&server).await;
    let late = Arc::new(client(way.port).await);
    let other = client(server.port).await;
    let before = other
        .push(&topic(), new_id(), batch(&texts("before", 1)))
        .await
        .expect("stored");
    let texts = texts("push", MANY);
    let pushing = tokio::spawn({
        let (late, batch) = (Arc::clone(&late), batch(&texts));
        async move { late.push(&topic(), new_id(), batch).await }
    });
    way.hold().await;
    other.remove(&topic()).await.expect("removed");
    way.release(&server).await;
    let position = pushing.await.expect("pushed").expect("stored");
    assert!(position > before);
    assert_eq!(contents(&other).await, texts);
    let known = "dnpipes-known:'{dnpipes:topic}'";
    assert_eq!(cli(&server, &format!("redis TTL {known}")), "-1\n");
    assert_ne!(cli(&server, &format!("redis HGET {known} .made")), "\n");
}

/// Once a push is stored the server is asked for the producer's next one.
#[tokio::test(flavor = "multi_thread")]
async fn who_pushes_again_at_once_has_been_asked_for() {
    let (_services, server) = start(&[]);
    let redis = client(server.port).await;
    let producer = Producer::random().expect("randomness");
    let (mut seq, mut all) = (0, Vec::new());
    until("a push that was asked for", async || {
        let (ran, taken_back) = (runs(&server), calls(&server, "discard"));
        for _ in 0..2 {
            seq += 1;
            let texts = texts(&seq.to_string(), MANY);
            let id = PushId::first(producer, seq);
            let pushed = redis.push(&topic(), id, batch(&texts)).await;
            pushed.expect("stored");
            all.extend(texts);
        }
        // A question is not waited for for long. Of the first connection's transactions one is a rehearsal.
        let is_new = seq == 2;
        let more = usize::from(is_new);
        assert_eq!(runs(&server), ran + 2 + more);
        !is_new && calls(&server, "discard") <= taken_back + 1
    })
    .await;
    // Each of which the keys were watched was run or taken back; nobody has pushed the last one.
    let is_asked = async || {
        let ended = runs(&server) + calls(&server, "discard");
        calls(&server, "watch") == ended + 1
    };
    until("the question for a push that is not there yet", is_asked).await;
    assert_eq!(contents(&redis).await, all);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_pushes_instead_of_who_was_asked_for_goes_by_a_transaction_too() {
    let (_services, server) = start(&[]);
    let redis = client(server.port).await;
    let producers = [(); 2].map(|()| Producer::random().expect("randomness"));
    let mut all = Vec::new();
    for seq in 1..=5 {
        for producer in producers {
            let texts = texts(&format!("{producer} {seq}"), MANY);
            let id = PushId::first(producer, seq);
            let pushed = redis.push(&topic(), id, batch(&texts)).await;
            let position = pushed.expect("stored");
            let again = redis.push(&topic(), id.again(), batch(&texts)).await;
            assert_eq!(again.expect("known"), position);
            all.extend(texts);
        }
    }
    assert_eq!(contents(&redis).await, all);
    // With those of the rehearsal.
    assert_eq!((runs(&server), calls(&server, "discard")), (11, 10));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_asked_for_and_is_stored_meanwhile_is_not_stored_again() {
    let (_services, server) = start(&[]);
    let (here, there) = (client(server.port).await, client(server.port).await);
    let mut all = Vec::new();
    for round in 0..20 {
        let producer = Producer::random().expect("randomness");
        let [one, two] = ["one", "two"].map(|push| texts(&format!("{round} {push}"), MANY));
        let ids = [1, 2].map(|seq| PushId::first(producer, seq));
        let first = here.push(&topic(), ids[0], batch(&one)).await;
        first.expect("stored");
        let second = there.push(&topic(), ids[1].again(), batch(&two)).await;
        let late = here.push(&topic(), ids[1], batch(&two)).await;
        assert_eq!(late.expect("known"), second.expect("stored"));
        all.extend(one);
        all.extend(two);
    }
    assert_eq!(contents(&here).await, all);
}

#[tokio::test(flavor = "multi_thread")]
async fn asking_for_a_push_makes_no_pipe() {
    let (_services, server) = start(&[]);
    // Of the rehearsal, which does it twice, and of the first push.
    let mut way = Held::holding(&server, "WATCH", 3).await;
    let (late, other) = (client(way.port).await, client(server.port).await);
    let producer = Producer::random().expect("randomness");
    let one = batch(&texts("one", MANY));
    let id = PushId::first(producer, 1);
    late.push(&topic(), id, one).await.expect("stored");
    way.hold().await;
    other.remove(&topic()).await.expect("removed");
    let before = calls(&server, "watch");
    way.release.send(true).expect("the way is there");
    until("the question", async || calls(&server, "watch") > before).await;
    assert_eq!(cli(&server, "redis EXISTS dnpipes:topic"), "0\n");
    let two = texts("two", MANY);
    let id = PushId::first(producer, 2);
    late.push(&topic(), id, batch(&two)).await.expect("stored");
    assert_eq!(contents(&other).await, two);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_keeps_a_large_push_from_being_stored_is_named() {
    let (_services, server) = start(&["maxmemory 8mb", "maxmemory-policy noeviction"]);
    let redis = client(server.port).await;
    let producer = Producer::random().expect("randomness");
    let mut stored = Vec::new();
    let failed = loop {
        let number = stored.len() as u64 / MANY as u64 + 1;
        let texts = texts(&format!("{number} {}", "x".repeat(500)), MANY);
        let id = PushId::first(producer, number);
        match redis.push(&topic(), id, batch(&texts)).await {
            Ok(_) => stored.extend(texts),
            Err(error) => break error,
        }
        assert!(number < 100, "it is never full");
    };
    assert_eq!(failed.kind(), Kind::Full, "{failed}");
    assert_eq!(contents(&redis).await, stored);
    // Also a removal makes room.
    redis.remove(&topic()).await.expect("removed");
    cli(&server, "redis SET dnpipes:other text");
    let other = PipeName::new("other").expect("legal");
    let failed = redis.push(&other, new_id(), batch(&texts("x", MANY))).await;
    assert_eq!(failed.expect_err("no stream").kind(), Kind::Damaged);
    let after = texts("after", MANY);
    redis
        .push(&topic(), new_id(), batch(&after))
        .await
        .expect("stored");
    assert_eq!(contents(&redis).await, after);
}

#[test]
fn where_transactions_are_not_allowed_large_writes_go_by_scripts() {
    for rights in ["-watch", "-exec", "-discard", "-client|reply", "-script"] {
        let user = format!("user pipes on >s3cret ~* &* +@all {rights}");
        let (_services, server) = start(&[&user]);
        let mount = Mount::new(&server.url.replace("//", "//pipes:s3cret@"), &[]);
        for _ in 0..3 {
            mount.out("seq 10000 > topic");
        }
        assert_eq!(mount.out("cat topic | wc -l"), "30000\n", "{rights}");
        assert_eq!(
            mount.out("cat topic | sort -n | uniq -c | awk '$1 != 3' | wc -l"),
            "0\n"
        );
        let log = mount.log();
        assert!(!log.contains("ERROR") && !log.contains("WARN"), "{log}");
        assert!(
            log.contains("large pushes go by a script"),
            "{rights}: {log}"
        );
    }
}

#[test]
fn connections_and_scripts_that_the_server_drops_are_made_anew() {
    let (_services, server) = start(&[]);
    let mount = Mount::new(&server.url, &[]);
    for drop in ["CLIENT KILL TYPE normal SKIPME yes", "SCRIPT FLUSH", "PING"] {
        mount.out("seq 10000 > topic");
        cli(&server, &format!("redis {drop}"));
    }
    mount.out("seq 10000 > topic");
    assert_eq!(
        mount.out("cat topic | sha256sum"),
        mount.out("for i in 1 2 3 4; do seq 10000; done | sha256sum")
    );
    assert!(runs(&server) > 8, "they went another way");
}

/// A way to the server that ends behind so many bytes of answers.
async fn short_way(server: &Server, bytes: u64) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let port = listener.local_addr().expect("its address").port();
    let server = server.port;
    tokio::spawn(async move {
        while let Ok((near, _)) = listener.accept().await {
            let far = TcpStream::connect(("127.0.0.1", server)).await;
            let (mut from_near, mut to_near) = near.into_split();
            let (from_far, mut to_far) = far.expect("the server").into_split();
            tokio::spawn(async move { tokio::io::copy(&mut from_near, &mut to_far).await });
            tokio::spawn(async move {
                let sent = tokio::io::copy(&mut from_far.take(bytes), &mut to_near).await;
                drop(to_near.shutdown().await);
                sent
            });
        }
    });
    port
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_is_cut_in_its_midst_is_an_outage() {
    let (_services, server) = start(&[]);
    let texts = texts("message", 10_000);
    client(server.port)
        .await
        .push(&topic(), new_id(), batch(&texts))
        .await
        .expect("stored");
    // Enough for the server's settings, and not for the messages.
    let port = short_way(&server, 50_000).await;
    let limit = Limit {
        max_bytes: 8 << 20,
        before: Some(Position::MAX),
    };
    // What the client's crate says of it depends on what it finds out first.
    for _ in 0..20 {
        let far = client(port).await;
        let source = far.subscribe(&topic(), Start::Oldest).await;
        let mut source = source.expect("a source");
        let mut read = 0;
        let failed = loop {
            match source.next(limit).await {
                Ok(some) => read += some.len(),
                Err(error) => break error,
            }
            assert!(read < texts.len(), "it is not cut");
        };
        assert_eq!(failed.kind(), Kind::Unreachable, "{failed}");
    }
}

/// Nobody hears that a transaction is refused: what should have been in it must not be done at once, and again.
#[test]
fn a_right_that_is_taken_away_meanwhile_doubles_nothing() {
    const WORK: Work = Work::large(60);
    let (_services, server) = start(&[]);
    cli(
        &server,
        "redis ACL SETUSER pipes on '>s3cret' '~*' '&*' +@all",
    );
    let source = server.url.replace("//", "//pipes:s3cret@");
    let (store, mounts) = (Store::new(), [(); 2].map(|()| Mount::new(&source, &[])));
    mounts[0].out("touch topic");
    let four = [&mounts[0], &mounts[1], &mounts[0], &mounts[1]];
    let load = Writers::start(&store, &four, WORK);
    load.await_acknowledged(WORK.lines / 4);
    assert!(runs(&server) > 0, "they go by transactions");
    for right in ["-multi", "+multi", "-exec", "+exec", "-multi"] {
        cli(
            &server,
            &format!("redis ACL SETUSER pipes {right}; sleep 0.1"),
        );
    }
    load.finish();
    assert_complete(&mounts[0].lines("topic"), four.len(), WORK);
}
