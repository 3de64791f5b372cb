//! The cases. Each is a sentence of the contract in `dnpipes::backend`.

use std::collections::HashMap;
use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use dnpipes::backend::{Backend, Limit, Source, Start};
use dnpipes::error::Kind;
use dnpipes::message::{Batch, Message, Position, Producer, PushId};
use dnpipes::name::PipeName;
use futures_util::FutureExt;

use crate::Store;

/// Runs every case on a store, each as a test of its own.
macro_rules! conformance {
    ($module:ident, $store:ty) => {
        mod $module {
            use super::*;
            $crate::suite::cases!($store:
                order_within_and_across_batches
                order_across_writers_is_one_order_for_all
                the_messages_of_a_batch_stay_together
                the_empty_message
                every_byte_value
                a_message_of_sixteen_mebibytes
                a_message_over_the_limit
                two_readers_each_see_all
                pull_removes_nothing
                a_waiting_reader_is_woken_by_another_client
                a_reader_of_a_pipe_that_does_not_exist_yet_is_woken
                dropping_a_wait_loses_nothing
                a_bound_is_kept_and_nothing_is_skipped
                a_limit_before_a_position_never_waits
                the_end_is_behind_all_that_was_acknowledged
                a_subscription_resumes_behind_a_position
                nothing_stands_behind_the_greatest_number
                positions_never_repeat_after_a_reset
                positions_never_repeat_after_removal
                a_reset_is_seen_by_other_clients
                a_reset_while_a_reader_waits
                a_reset_while_a_reader_is_half_way
                a_reset_and_a_removal_of_nothing_is_an_error
                the_same_push_is_stored_once
                a_repeated_push_is_known_to_other_clients
                the_same_identity_in_another_pipe_is_another_push
                a_push_that_is_repeated_behind_a_reset_is_stored_or_known_to_be_gone
                names_come_back_as_they_were
                create_says_whether_it_made_the_pipe
                stat_counts_messages_and_bytes
                concurrent_pushes_and_resets_leave_a_gap_free_tail
                a_dropped_push_is_stored_whole_or_not_at_all
                sync_returns
            );
        }
    };
}

macro_rules! cases {
    ($store:ty: $($case:ident)+) => {
        $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $case() {
                $crate::suite::in_time($crate::suite::$case(<$store as $crate::Store>::new())).await;
            }
        )+
    };
}

pub(crate) use {cases, conformance};

/// A case that hangs has failed.
pub(crate) async fn in_time(case: impl Future<Output = ()>) {
    tokio::time::timeout(Duration::from_secs(60), case)
        .await
        .expect("the case ends in time");
}

const ANY: usize = 1 << 20;

/// What there is now.
const NOW: Limit = Limit {
    max_bytes: ANY,
    before: Some(Position::MAX),
};

/// The next, whenever it comes.
const NEXT: Limit = Limit {
    max_bytes: ANY,
    before: None,
};

fn name(text: &str) -> PipeName {
    PipeName::new(text).expect("a legal name")
}

fn topic() -> PipeName {
    name("topic")
}

/// A writer that numbers its pushes.
struct Pusher {
    client: Arc<dyn Backend>,
    pipe: PipeName,
    producer: Producer,
    pushes: u64,
}

impl Pusher {
    fn new(client: Arc<dyn Backend>) -> Self {
        Pusher {
            client,
            pipe: topic(),
            producer: Producer::random().expect("randomness"),
            pushes: 0,
        }
    }

    async fn push<T: AsRef<[u8]>>(&mut self, messages: &[T]) -> Position {
        self.pushes += 1;
        let id = PushId::first(self.producer, self.pushes);
        let pushed = self.client.push(&self.pipe, id, batch(messages)).await;
        pushed.expect("the push is acknowledged")
    }
}

fn batch<T: AsRef<[u8]>>(messages: &[T]) -> Batch {
    let copy = |message: &T| Bytes::copy_from_slice(message.as_ref());
    Batch::new(messages.iter().map(copy).collect()).expect("not empty")
}

async fn source(client: &Arc<dyn Backend>, start: Start) -> Box<dyn Source> {
    client.subscribe(&topic(), start).await.expect("a source")
}

/// All that a source has now.
async fn rest(source: &mut dyn Source) -> Vec<Message> {
    let mut all = Vec::new();
    loop {
        let more = source.next(NOW).await.expect("messages");
        if more.is_empty() {
            return all;
        }
        all.extend(more);
    }
}

async fn all(client: &Arc<dyn Backend>) -> Vec<Message> {
    rest(&mut *source(client, Start::Oldest).await).await
}

fn texts(messages: &[Message]) -> Vec<String> {
    let text = |message: &Message| String::from_utf8_lossy(&message.data).into_owned();
    messages.iter().map(text).collect()
}

fn assert_rising(messages: &[Message]) {
    assert!(
        messages
            .windows(2)
            .all(|pair| pair[0].position < pair[1].position)
    );
}

pub(crate) async fn order_within_and_across_batches<S: Store>(store: S) {
    let client = store.client();
    let mut pusher = Pusher::new(Arc::clone(&client));
    let mut expected = Vec::new();
    for size in [1, 5, 1000, 1, 3] {
        let first = expected.len();
        let numbered = (first..first + size).map(|number| number.to_string());
        let messages: Vec<String> = numbered.collect();
        let last = pusher.push(&messages).await;
        expected.extend(messages);
        assert_eq!(all(&client).await.last().expect("some").position, last);
    }
    let messages = all(&store.client()).await;
    assert_eq!(texts(&messages), expected);
    assert_rising(&messages);
}

/// Four writers at once, each with a client of its own, to their end.
async fn four_writers<S: Store, F>(store: &S, write: impl Fn(Pusher, usize) -> F)
where
    F: Future<Output = ()> + Send + 'static,
{
    let start = |writer| tokio::spawn(write(Pusher::new(store.client()), writer));
    let writers: Vec<_> = (0..4).map(start).collect();
    for writer in writers {
        writer.await.expect("the writer");
    }
}

pub(crate) async fn order_across_writers_is_one_order_for_all<S: Store>(store: S) {
    four_writers(&store, |mut pusher, writer| async move {
        for number in 0..100 {
            pusher.push(&[format!("{writer} {number}")]).await;
        }
    })
    .await;
    let (one, two) = (all(&store.client()).await, all(&store.client()).await);
    assert_eq!(one, two);
    assert_rising(&one);
    assert_each_writers_order(&texts(&one), 4, 100);
}

/// Messages `WRITER NUMBER`: each writer's numbers are there, in order, once.
fn assert_each_writers_order(messages: &[String], writers: usize, count: usize) {
    let mut next = HashMap::new();
    for message in messages {
        let (writer, number) = message.split_once(' ').expect("two words");
        let expected = next.entry(writer.to_owned()).or_insert(0);
        assert_eq!(number.parse(), Ok(*expected), "of writer {writer}");
        *expected += 1;
    }
    assert_eq!(next.len(), writers);
    assert!(next.values().all(|next| *next == count));
}

pub(crate) async fn the_messages_of_a_batch_stay_together<S: Store>(store: S) {
    four_writers(&store, |mut pusher, writer| async move {
        for number in 0..20 {
            pusher.push(&vec![format!("{writer} {number}"); 50]).await;
        }
    })
    .await;
    let client = store.client();
    let messages = texts(&all(&client).await);
    assert_eq!(messages.len(), 4 * 20 * 50);
    if client.caps().whole_batches {
        for together in messages.chunks(50) {
            assert!(together.iter().all(|message| *message == together[0]));
        }
        return;
    }
    // Those of others may come between; the order of each writer's is kept.
    let mut counts = HashMap::new();
    for message in messages {
        let (writer, number) = message.split_once(' ').expect("two words");
        let count: &mut usize = counts.entry(writer.to_owned()).or_default();
        assert_eq!(number.parse(), Ok(*count / 50), "of writer {writer}");
        *count += 1;
    }
    assert!(counts.values().all(|count| *count == 20 * 50));
}

pub(crate) async fn the_empty_message<S: Store>(store: S) {
    let client = store.client();
    Pusher::new(Arc::clone(&client))
        .push(&["", "a", "", ""])
        .await;
    assert_eq!(texts(&all(&client).await), ["", "a", "", ""]);
}

pub(crate) async fn every_byte_value<S: Store>(store: S) {
    let client = store.client();
    let mut messages: Vec<Vec<u8>> = (0..=255).map(|byte| vec![byte]).collect();
    messages.push((0..=255).collect());
    Pusher::new(Arc::clone(&client)).push(&messages).await;
    let found: Vec<Bytes> = all(&client)
        .await
        .into_iter()
        .map(|message| message.data)
        .collect();
    assert_eq!(found, messages);
}

pub(crate) async fn a_message_of_sixteen_mebibytes<S: Store>(store: S) {
    let client = store.client();
    let big: Vec<u8> = (0..16 << 20).map(|at| (at % 251) as u8).collect();
    Pusher::new(Arc::clone(&client))
        .push(&[&b"before"[..], &big, b"after"])
        .await;
    let found = all(&client).await;
    assert_eq!(found.len(), 3);
    assert!(found[1].data == big);
}

pub(crate) async fn a_message_over_the_limit<S: Store>(store: S) {
    let client = store.client();
    let limit = client.caps().max_message;
    let mut pusher = Pusher::new(Arc::clone(&client));
    // A larger one than 16 MiB is more than a test should hold.
    pusher.push(&[vec![b'x'; limit.min(16 << 20)]]).await;
    if limit == usize::MAX {
        return;
    }
    // Zeros that nobody looks at take no memory.
    let over = Batch::new(vec![Bytes::from(vec![0; limit + 1])]).expect("a batch");
    let id = PushId::first(Producer::random().expect("randomness"), 1);
    let refused = client
        .push(&topic(), id, over)
        .await
        .expect_err("over the limit");
    assert_eq!(refused.kind(), Kind::TooLong);
    assert_eq!(client.stat(&topic()).await.expect("stat").count, 1);
}

pub(crate) async fn two_readers_each_see_all<S: Store>(store: S) {
    let (one, two) = (store.client(), store.client());
    let mut first = source(&one, Start::Oldest).await;
    let mut second = source(&two, Start::Oldest).await;
    let mut pusher = Pusher::new(Arc::clone(&one));
    pusher.push(&["a"]).await;
    assert_eq!(texts(&rest(&mut *first).await), ["a"]);
    pusher.push(&["b", "c"]).await;
    assert_eq!(texts(&rest(&mut *first).await), ["b", "c"]);
    assert_eq!(texts(&rest(&mut *second).await), ["a", "b", "c"]);
}

pub(crate) async fn pull_removes_nothing<S: Store>(store: S) {
    let client = store.client();
    Pusher::new(Arc::clone(&client)).push(&["a", "b"]).await;
    for _ in 0..3 {
        assert_eq!(texts(&all(&client).await), ["a", "b"]);
    }
    assert_eq!(client.stat(&topic()).await.expect("stat").count, 2);
}

/// Waits in a task of its own; the answer is what came.
fn waiting(mut source: Box<dyn Source>) -> tokio::task::JoinHandle<Vec<Message>> {
    tokio::spawn(async move { source.next(NEXT).await.expect("messages") })
}

pub(crate) async fn a_waiting_reader_is_woken_by_another_client<S: Store>(store: S) {
    let (reader, writer) = (store.client(), store.client());
    let mut pusher = Pusher::new(writer);
    pusher.push(&["old"]).await;
    let mut source = source(&reader, Start::Oldest).await;
    assert_eq!(texts(&rest(&mut *source).await), ["old"]);
    for round in 0..50 {
        let text = round.to_string();
        let (woken, _) = tokio::join!(source.next(NEXT), async {
            // Sometimes before the other side waits, sometimes after.
            tokio::task::yield_now().await;
            pusher.push(&[&text]).await
        });
        assert_eq!(texts(&woken.expect("messages")), [text]);
    }
}

pub(crate) async fn a_reader_of_a_pipe_that_does_not_exist_yet_is_woken<S: Store>(store: S) {
    let reader = waiting(source(&store.client(), Start::Oldest).await);
    let writer = store.client();
    writer.create(&topic()).await.expect("created");
    Pusher::new(writer).push(&["first"]).await;
    assert_eq!(texts(&reader.await.expect("the reader")), ["first"]);
}

pub(crate) async fn dropping_a_wait_loses_nothing<S: Store>(store: S) {
    let (reader, writer) = (store.client(), store.client());
    let mut source = source(&reader, Start::Oldest).await;
    let pushing = tokio::spawn(async move {
        let mut pusher = Pusher::new(writer);
        for number in 0..300 {
            pusher.push(&[number.to_string()]).await;
        }
    });
    let mut found = Vec::new();
    let mut step = 0;
    while found.len() < 300 {
        step += 1;
        let patience = Duration::from_micros(step * 37 % 500);
        if let Ok(messages) = tokio::time::timeout(patience, source.next(NEXT)).await {
            found.extend(texts(&messages.expect("messages")));
        }
    }
    pushing.await.expect("the writer");
    assert_eq!(
        found,
        (0..300)
            .map(|number| number.to_string())
            .collect::<Vec<_>>()
    );
}

/// For stores that ask for messages by requests: their answers are kept for a caller that stopped waiting.
pub(crate) async fn a_reader_that_looks_only_once_each_time_gets_on<S: Store>(store: S) {
    let client = store.client();
    let numbers: Vec<String> = (0..300).map(|number| number.to_string()).collect();
    Pusher::new(Arc::clone(&client)).push(&numbers).await;
    let mut source = source(&client, Start::Oldest).await;
    let few = Limit {
        max_bytes: 1000,
        ..NEXT
    };
    let mut found = Vec::new();
    while found.len() < numbers.len() {
        // Dropped whenever it is not ready at once.
        if let Some(messages) = source.next(few).now_or_never() {
            found.extend(texts(&messages.expect("messages")));
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert_eq!(found, numbers);
}

pub(crate) async fn a_bound_is_kept_and_nothing_is_skipped<S: Store>(store: S) {
    let client = store.client();
    let sizes = [10, 5000, 0, 300_000, 20, 1, 70_000, 2];
    let messages: Vec<Vec<u8>> = sizes.iter().map(|size| vec![b'x'; *size]).collect();
    Pusher::new(Arc::clone(&client)).push(&messages).await;
    for max_bytes in [0, 1, 100, 6000, 400_000] {
        let mut source = source(&client, Start::Oldest).await;
        let mut found = Vec::new();
        while found.len() < sizes.len() {
            let limit = Limit { max_bytes, ..NOW };
            let some = source.next(limit).await.expect("messages");
            assert!(!some.is_empty());
            let but_the_last: usize = some[..some.len() - 1].iter().map(|m| m.data.len()).sum();
            assert!(but_the_last <= max_bytes, "{but_the_last} over {max_bytes}");
            found.extend(some.iter().map(|message| message.data.len()));
        }
        assert_eq!(found, sizes);
    }
}

pub(crate) async fn a_limit_before_a_position_never_waits<S: Store>(store: S) {
    let client = store.client();
    let mut source = source(&client, Start::Oldest).await;
    assert!(rest(&mut *source).await.is_empty());
    let mut pusher = Pusher::new(Arc::clone(&client));
    pusher.push(&["a", "b"]).await;
    let end = source.end().await.expect("the end");
    pusher.push(&["c"]).await;
    let before = Limit {
        before: Some(end),
        ..NOW
    };
    assert_eq!(
        texts(&source.next(before).await.expect("messages")),
        ["a", "b"]
    );
    assert!(source.next(before).await.expect("messages").is_empty());
    assert_eq!(texts(&rest(&mut *source).await), ["c"]);
}

pub(crate) async fn the_end_is_behind_all_that_was_acknowledged<S: Store>(store: S) {
    let client = store.client();
    let mut source = source(&client, Start::Oldest).await;
    let mut pusher = Pusher::new(store.client());
    let mut last = source.end().await.expect("the end");
    for _ in 0..3 {
        let position = pusher.push(&["x"]).await;
        let end = source.end().await.expect("the end");
        assert!(last <= position && position < end);
        last = end;
    }
    client.reset(&topic()).await.expect("reset");
    assert!(source.end().await.expect("the end") >= last);
}

pub(crate) async fn a_subscription_resumes_behind_a_position<S: Store>(store: S) {
    let client = store.client();
    let mut pusher = Pusher::new(Arc::clone(&client));
    pusher.push(&["a", "b", "c"]).await;
    pusher.push(&["d"]).await;
    let messages = all(&client).await;
    for (at, message) in messages.iter().enumerate() {
        let mut source = source(&store.client(), Start::After(message.position)).await;
        assert_eq!(rest(&mut *source).await, messages[at + 1..]);
    }
}

pub(crate) async fn nothing_stands_behind_the_greatest_number<S: Store>(store: S) {
    let client = store.client();
    let mut pusher = Pusher::new(Arc::clone(&client));
    let last = pusher.push(&["a", "b"]).await;
    let start = Start::After(Position::new(last.epoch(), u64::MAX));
    let mut behind = source(&client, start).await;
    assert!(rest(&mut *behind).await.is_empty());
    // The greatest position before another incarnation is of this form. (Redis may begin another one within a push.)
    let first = all(&client).await[0].position;
    let start = Start::After(Position::new(first.epoch(), 0).before());
    let mut source = source(&client, start).await;
    assert_eq!(texts(&rest(&mut *source).await), ["a", "b"]);
}

pub(crate) async fn positions_never_repeat_after_a_reset<S: Store>(store: S) {
    let client = store.client();
    let mut pusher = Pusher::new(Arc::clone(&client));
    let mut last = Position::MIN;
    for _ in 0..5 {
        let position = pusher.push(&["x", "y"]).await;
        assert!(position > last);
        last = position;
        client.reset(&topic()).await.expect("reset");
        let info = client.stat(&topic()).await.expect("stat");
        assert_eq!((info.count, info.first, info.last), (0, None, None));
    }
}

pub(crate) async fn positions_never_repeat_after_removal<S: Store>(store: S) {
    let client = store.client();
    let mut pusher = Pusher::new(Arc::clone(&client));
    let mut reader = source(&client, Start::Oldest).await;
    let mut last = Position::MIN;
    for round in 0..5 {
        let text = round.to_string();
        let position = pusher.push(&[&text]).await;
        assert!(position > last);
        last = position;
        // A reader goes on in the pipe that was made again.
        assert_eq!(texts(&rest(&mut *reader).await), [text]);
        client.remove(&topic()).await.expect("removed");
        let gone = client.stat(&topic()).await.expect_err("gone");
        assert_eq!(gone.kind(), Kind::NotFound);
    }
}

pub(crate) async fn a_reset_is_seen_by_other_clients<S: Store>(store: S) {
    let (one, two) = (store.client(), store.client());
    let mut pusher = Pusher::new(Arc::clone(&one));
    pusher.push(&["a", "b"]).await;
    let mut early = source(&two, Start::Oldest).await;
    one.reset(&topic()).await.expect("reset");
    assert!(all(&two).await.is_empty());
    assert!(rest(&mut *early).await.is_empty());
    assert_eq!(two.stat(&topic()).await.expect("stat").count, 0);
    pusher.push(&["c"]).await;
    assert_eq!(texts(&rest(&mut *early).await), ["c"]);
    assert_eq!(texts(&all(&two).await), ["c"]);
}

pub(crate) async fn a_reset_while_a_reader_waits<S: Store>(store: S) {
    let (one, two) = (store.client(), store.client());
    let mut pusher = Pusher::new(Arc::clone(&one));
    let before = pusher.push(&["a"]).await;
    let mut reader = source(&two, Start::After(before)).await;
    // It really waits when the reset comes, and goes on waiting.
    let waited = tokio::time::timeout(Duration::from_millis(50), reader.next(NEXT)).await;
    assert!(waited.is_err());
    let reader = waiting(reader);
    one.reset(&topic()).await.expect("reset");
    assert!(!reader.is_finished());
    pusher.push(&["b"]).await;
    assert_eq!(texts(&reader.await.expect("the reader")), ["b"]);
}

pub(crate) async fn a_reset_while_a_reader_is_half_way<S: Store>(store: S) {
    let (one, two) = (store.client(), store.client());
    let mut pusher = Pusher::new(Arc::clone(&one));
    pusher.push(&["a", "b", "c", "d"]).await;
    let mut reader = source(&two, Start::Oldest).await;
    let first = Limit {
        max_bytes: 1,
        ..NOW
    };
    assert_eq!(texts(&reader.next(first).await.expect("one")), ["a"]);
    one.reset(&topic()).await.expect("reset");
    pusher.push(&["e"]).await;
    assert_eq!(texts(&rest(&mut *reader).await), ["e"]);
}

pub(crate) async fn a_reset_and_a_removal_of_nothing_is_an_error<S: Store>(store: S) {
    let client = store.client();
    for result in [client.reset(&topic()).await, client.remove(&topic()).await] {
        assert_eq!(result.expect_err("nothing there").kind(), Kind::NotFound);
    }
    client.create(&topic()).await.expect("created");
    client
        .reset(&topic())
        .await
        .expect("an empty pipe can be reset");
}

pub(crate) async fn the_same_push_is_stored_once<S: Store>(store: S) {
    let client = store.client();
    let producer = Producer::random().expect("randomness");
    for seq in 1..=3 {
        let id = PushId::first(producer, seq);
        let messages = batch(&[format!("{seq} a"), format!("{seq} b")]);
        let first = client
            .push(&topic(), id, messages.clone())
            .await
            .expect("stored");
        let again = client
            .push(&topic(), id.again(), messages)
            .await
            .expect("known");
        assert_eq!(first, again);
    }
    let expected = ["1 a", "1 b", "2 a", "2 b", "3 a", "3 b"];
    assert_eq!(texts(&all(&client).await), expected);
}

pub(crate) async fn a_repeated_push_is_known_to_other_clients<S: Store>(store: S) {
    let id = PushId::first(Producer::random().expect("randomness"), 1);
    let first = store
        .client()
        .push(&topic(), id, batch(&["x"]))
        .await
        .expect("stored");
    // Many others push in between; a repeat comes late.
    let mut other = Pusher::new(store.client());
    for _ in 0..100 {
        other.push(&["y"]).await;
    }
    let again = store
        .client()
        .push(&topic(), id.again(), batch(&["x"]))
        .await
        .expect("known");
    assert_eq!(first, again);
    assert_eq!(
        store.client().stat(&topic()).await.expect("stat").count,
        101
    );
}

pub(crate) async fn the_same_identity_in_another_pipe_is_another_push<S: Store>(store: S) {
    let client = store.client();
    let id = PushId::first(Producer::random().expect("randomness"), 1);
    for id in [id, id.again()] {
        for pipe in ["one", "two"] {
            let pipe = name(pipe);
            let pushed = client.push(&pipe, id, batch(&["x"])).await;
            pushed.expect("stored");
        }
    }
    for pipe in ["one", "two"] {
        let info = client.stat(&name(pipe)).await.expect("stored");
        assert_eq!(info.count, 1, "{pipe}");
    }
}

pub(crate) async fn a_push_that_is_repeated_behind_a_reset_is_stored_or_known_to_be_gone<
    S: Store,
>(
    store: S,
) {
    let client = store.client();
    let id = PushId::first(Producer::random().expect("randomness"), 1);
    let pushed = client.push(&topic(), id, batch(&["x"])).await;
    pushed.expect("stored");
    client.reset(&topic()).await.expect("reset");
    let again = client.push(&topic(), id.again(), batch(&["x"])).await;
    let position = again.expect("stored or known");
    let mut source = client
        .subscribe(&topic(), Start::Oldest)
        .await
        .expect("there");
    source.end().await.expect("its end");
    match position < source.floor().position() {
        true => assert_eq!(client.stat(&topic()).await.expect("there").count, 0),
        false => assert_eq!(texts(&all(&client).await), ["x"]),
    }
}

pub(crate) async fn names_come_back_as_they_were<S: Store>(store: S) {
    let client = store.client();
    let longest = "n".repeat(200);
    let mut names = vec![
        "a",
        "A",
        "a.b",
        "a b",
        "-",
        "ünïcode-π",
        "%2F",
        "*",
        ">",
        "a:b",
        "q'uo\"te",
        "tr\\ack",
        "emoji😀",
        &longest,
    ];
    for text in &names {
        assert!(client.create(&name(text)).await.expect("created"));
        let mut pusher = Pusher::new(Arc::clone(&client));
        pusher.pipe = name(text);
        pusher.push(&[text]).await;
    }
    names.sort_unstable();
    let listed = store.client().list().await.expect("a list");
    let found: Vec<&str> = listed.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(found, names);
    for (pipe, info) in &listed {
        let mut source = client
            .subscribe(pipe, Start::Oldest)
            .await
            .expect("a source");
        assert_eq!(texts(&rest(&mut *source).await), [pipe.as_str()]);
        assert_eq!(
            (info.count, info.bytes.unwrap_or(pipe.as_str().len() as u64)),
            (1, pipe.as_str().len() as u64)
        );
    }
}

pub(crate) async fn create_says_whether_it_made_the_pipe<S: Store>(store: S) {
    let client = store.client();
    assert!(client.create(&topic()).await.expect("created"));
    Pusher::new(Arc::clone(&client)).push(&["kept"]).await;
    assert!(!store.client().create(&topic()).await.expect("there"));
    assert_eq!(texts(&all(&client).await), ["kept"]);
}

pub(crate) async fn stat_counts_messages_and_bytes<S: Store>(store: S) {
    let client = store.client();
    let missing = client.stat(&topic()).await.expect_err("missing");
    assert_eq!(missing.kind(), Kind::NotFound);
    let before = SystemTime::now() - Duration::from_secs(1);
    let mut pusher = Pusher::new(Arc::clone(&client));
    let first = pusher.push(&["four"]).await;
    let last = pusher.push(&["", "seven"]).await;
    let info = store.client().stat(&topic()).await.expect("stat");
    assert_eq!(
        (info.count, info.first, info.last),
        (3, Some(first), Some(last))
    );
    assert!(info.bytes.is_none_or(|bytes| bytes == 9));
    assert!(info.modified >= before && info.modified <= SystemTime::now() + Duration::from_secs(1));
    client.reset(&topic()).await.expect("reset");
    pusher.push(&["xy"]).await;
    let info = client.stat(&topic()).await.expect("stat");
    assert!(info.count == 1 && info.bytes.is_none_or(|bytes| bytes == 2));
}

pub(crate) async fn concurrent_pushes_and_resets_leave_a_gap_free_tail<S: Store>(store: S) {
    const PUSHES: usize = 300;
    let writers: Vec<_> = (0..3)
        .map(|writer| {
            let mut pusher = Pusher::new(store.client());
            tokio::spawn(async move {
                for number in 0..PUSHES {
                    pusher.push(&[format!("{writer} {number}")]).await;
                }
            })
        })
        .collect();
    let client = store.client();
    let mut resets = 0;
    while resets == 0 || writers.iter().any(|writer| !writer.is_finished()) {
        if resets < 20 && client.reset(&topic()).await.is_ok() {
            resets += 1;
        }
        // Whatever is there is each writer's tail so far, without a gap.
        assert_tails(&texts(&all(&client).await));
        tokio::task::yield_now().await;
    }
    for writer in writers {
        writer.await.expect("the writer");
    }
    assert!(resets > 0);
    let left = texts(&all(&client).await);
    assert_tails(&left);
    let last_of_all = format!(" {}", PUSHES - 1);
    let ends = left
        .iter()
        .filter(|message| message.ends_with(&last_of_all))
        .count();
    let counted = left
        .iter()
        .map(|message| message.split(' ').next())
        .collect::<std::collections::HashSet<_>>();
    assert_eq!(
        ends,
        counted.len(),
        "each writer that is there is there to its end"
    );
}

/// Each writer's numbers follow one another without a gap.
fn assert_tails(messages: &[String]) {
    let mut last: HashMap<&str, usize> = HashMap::new();
    for message in messages {
        let (writer, number) = message.split_once(' ').expect("two words");
        let number: usize = number.parse().expect("a number");
        if let Some(before) = last.insert(writer, number) {
            assert_eq!(number, before + 1, "of writer {writer}");
        }
    }
}

pub(crate) async fn a_dropped_push_is_stored_whole_or_not_at_all<S: Store>(store: S) {
    let client = store.client();
    let producer = Producer::random().expect("randomness");
    for seq in 1..=200 {
        let id = PushId::first(producer, seq);
        let messages = batch(&vec![seq.to_string(); 3]);
        let patience = Duration::from_micros(seq * 13 % 200);
        let pushed =
            tokio::time::timeout(patience, client.push(&topic(), id, messages.clone())).await;
        if pushed.is_err() && seq % 2 == 0 {
            // In doubt, it is repeated.
            client
                .push(&topic(), id.again(), messages)
                .await
                .expect("stored");
        }
    }
    let found = texts(&all(&client).await);
    let mut counts: HashMap<String, usize> = HashMap::new();
    for message in found {
        *counts.entry(message).or_default() += 1;
    }
    assert!(counts.values().all(|count| *count == 3), "{counts:?}");
    assert!(
        (2..=200)
            .step_by(2)
            .all(|seq| counts.contains_key(&seq.to_string()))
    );
}

pub(crate) async fn sync_returns<S: Store>(store: S) {
    let (client, other) = (store.client(), store.client());
    // There is nothing to sync of a pipe that does not exist: any answer but a wait will do.
    if let Err(error) = client.sync(&topic()).await {
        assert_eq!(error.kind(), Kind::NotFound);
    }
    assert!(client.list().await.expect("a list").is_empty());
    let mut pusher = Pusher::new(Arc::clone(&client));
    pusher.push(&["a", "b"]).await;
    client.sync(&topic()).await.expect("synced");
    other.sync(&topic()).await.expect("synced by another");
    assert_eq!(texts(&all(&other).await), ["a", "b"]);
    // While others push, neither keeps the other up.
    let pushing = tokio::spawn(async move {
        for number in 0..100 {
            pusher.push(&[number.to_string()]).await;
        }
    });
    let mut syncs = 0;
    while syncs < 10 || !pushing.is_finished() {
        other.sync(&topic()).await.expect("synced meanwhile");
        syncs += 1;
        tokio::task::yield_now().await;
    }
    pushing.await.expect("the writer");
    let expected = ["a", "b"].map(str::to_owned).into_iter();
    let expected: Vec<String> = expected.chain((0..100).map(|n| n.to_string())).collect();
    assert_eq!(texts(&all(&store.client()).await), expected);
    // Nor does it bring back what a reset has dropped.
    client.reset(&topic()).await.expect("reset");
    client.sync(&topic()).await.expect("synced");
    assert!(all(&store.client()).await.is_empty());
}
