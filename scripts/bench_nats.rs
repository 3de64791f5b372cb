//! Rows of NATS JetStream: against the `nats` command and the client's crate, on the same server.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use async_nats::jetstream::consumer::{DeliverPolicy, pull};
use futures_util::StreamExt;
use tokio::runtime::Runtime;

use super::services::Services;
use super::{
    Bench, Kind, LINE, Measure, Op, Result, Row, at, cat, child, rate, same_bytes, time_of,
    write_op,
};

pub(super) const ROWS: [(&str, Measure); 5] = [
    ("nats-write", nats_write),
    ("nats-echo", nats_echo),
    ("nats-cat-in", |b| nats_cat_in(b, "nats-new")),
    ("nats-2.9-cat-in", |b| nats_cat_in(b, "nats")),
    ("nats-cat-out", nats_cat_out),
];

/// The command, built once, where Go is.
fn nats() -> Result<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let tools = root.join("target/tools");
    let program = tools.join("nats");
    if !program.exists() {
        let mut go = child(&root.join("scripts/go"));
        go.args(["install", "github.com/nats-io/natscli/nats@v0.5.0"]);
        let status = go.env("GOBIN", &tools).status()?;
        if !status.success() {
            return at(&program, Err(format!("go install: {status}")));
        }
    }
    Ok(program)
}

fn connect(url: &str) -> Result<(Runtime, async_nats::Client)> {
    let runtime = Runtime::new()?;
    let client = runtime.block_on(async_nats::connect(url))?;
    Ok((runtime, client))
}

/// Acknowledged by JetStream, in a stream like the other side's.
fn nats_write(bench: &Bench) -> Result<Row> {
    let server = Services::start(&["nats-new"]);
    let mount = bench.mount(&server.url())?;
    // Makes the stream.
    fs::write(mount.path("floor"), "first\n")?;
    let (runtime, client) = connect(&server.url())?;
    let jetstream = {
        let _context = runtime.enter();
        async_nats::jetstream::new(client)
    };
    let floor: Op = Box::new(move || {
        let start = Instant::now();
        runtime.block_on(async {
            let sent = jetstream.publish("dnpipes-floor", LINE[..99].into());
            sent.await?.await
        })?;
        Ok(start.elapsed())
    });
    let floors = vec![(1.0, floor)];
    let rounds = bench.alternate(91, 100, floors, write_op(&mount.path("pipe"))?)?;
    let floor = "publish by the crate, acknowledged";
    Ok(Row::of_rounds(Kind::Latency, 1.5, floor, &rounds))
}

fn nats_echo(bench: &Bench) -> Result<Row> {
    let server = Services::start(&["nats-new"]);
    let url = server.url();
    let mount = bench.mount(&url)?;
    fs::write(mount.path("floor"), "first\n")?;
    // The command takes so long to start that fewer will do.
    let (few, many) = (bench.scaled(100), bench.scaled(1000));
    let each = |count: usize, command: &str| format!("for i in $(seq {count}); do {command}; done");
    let nats = nats()?;
    let theirs = format!(
        "{} -s {url} pub dnpipes-floor message 2> /dev/null",
        nats.display()
    );
    let root = mount.path(".");
    let mut rounds = Vec::new();
    for _ in 0..5 {
        let floor = time_of(&each(few, &theirs), &root)?;
        let measured = time_of(&each(many, "echo message > pipe"), &root)?;
        rounds.push((rate(few, floor), rate(many, measured)));
    }
    Ok(Row::of_rounds(
        Kind::Relative,
        10.0,
        "as many nats pub",
        &rounds,
    ))
}

fn nats_cat_in(bench: &Bench, kind: &str) -> Result<Row> {
    let lines = bench.scaled(1_000_000);
    let file = bench.lines_file(lines)?;
    let data = fs::read(&file)?;
    let nats = nats()?;
    let mut rounds = Vec::new();
    for _ in 0..3 {
        // A new one each time, as both sides fill its disk.
        let server = Services::start(&[kind]);
        let url = server.url();
        let published = format!(
            "{} -s {url} bench js pub async floor --create --stream floor --purge --storage file \
             --size 99 --msgs {lines} --no-progress > /dev/null 2>&1",
            nats.display()
        );
        let floor = time_of(&published, bench.dir.path())?;
        let mount = bench.mount(&url)?;
        let measured = cat(&[&file], &mount.path("pipe"))?;
        same_bytes(&mount.path("pipe@snapshot"), &data)?;
        rounds.push((rate(lines, floor), rate(lines, measured)));
    }
    Ok(Row::of_rounds(
        Kind::Relative,
        1.0,
        "nats bench js pub async",
        &rounds,
    ))
}

fn nats_cat_out(bench: &Bench) -> Result<Row> {
    let lines = bench.scaled(1_000_000);
    let file = bench.lines_file(lines)?;
    let server = Services::start(&["nats-new"]);
    let mount = bench.mount(&server.url())?;
    cat(&[&file], &mount.path("pipe"))?;
    same_bytes(&mount.path("pipe@snapshot"), &fs::read(&file)?)?;
    let (runtime, client) = connect(&server.url())?;
    let jetstream = {
        let _context = runtime.enter();
        async_nats::jetstream::new(client)
    };
    let mut rounds = Vec::new();
    for _ in 0..5 {
        let start = Instant::now();
        runtime.block_on(read_all(&jetstream, lines))?;
        let floor = start.elapsed();
        let measured = cat(&[&mount.path("pipe@snapshot")], Path::new("/dev/null"))?;
        rounds.push((rate(lines, floor), rate(lines, measured)));
    }
    let floor = "the crate's loop of an ordered consumer";
    Ok(Row::of_rounds(Kind::Relative, 0.8, floor, &rounds))
}

async fn read_all(jetstream: &async_nats::jetstream::Context, lines: usize) -> Result<()> {
    let stream = jetstream.get_stream("dnpipes-pipe").await?;
    let consumer = stream
        .create_consumer(pull::OrderedConfig {
            deliver_policy: DeliverPolicy::All,
            ..Default::default()
        })
        .await?;
    let mut messages = consumer.messages().await?.take(lines);
    while let Some(message) = messages.next().await {
        message?;
    }
    Ok(())
}
