//! Rows of Redis: against redis-cli and the client's crate, on the same server.

use std::fs;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::process::Stdio;
use std::time::Instant;

use redis::AsyncCommands;
use redis::aio::MultiplexedConnection;
use redis::streams::StreamRangeReply;
use tokio::runtime::Runtime;

use super::services::Services;
use super::{
    Bench, Kind, LINE, Measure, Op, Result, Row, cat, child, rate, same_bytes, time_of, write_op,
};

pub(super) const ROWS: [(&str, Measure); 4] = [
    ("redis-write", redis_write),
    ("redis-echo", redis_echo),
    ("redis-cat-in", redis_cat_in),
    ("redis-cat-out", redis_cat_out),
];

/// How many of a batch the crate's loop asks for.
const COUNT: usize = 1000;

/// A server that writes its file before it answers, as both sides find it; it is not rewritten meanwhile.
fn redis() -> Services {
    Services::start(&[
        "redis",
        "--set",
        "appendfsync everysec",
        "--set",
        "auto-aof-rewrite-percentage 0",
    ])
}

/// What a program of its own would have.
fn connect(url: &str) -> Result<(Runtime, MultiplexedConnection)> {
    let runtime = Runtime::new()?;
    let client = redis::Client::open(url)?;
    let link = runtime.block_on(client.get_multiplexed_async_connection())?;
    Ok((runtime, link))
}

fn redis_write(bench: &Bench) -> Result<Row> {
    let server = redis();
    let mount = bench.mount(&server.url())?;
    let (runtime, mut link) = connect(&server.url())?;
    let floor: Op = Box::new(move || {
        let start = Instant::now();
        let entry = [("data", &LINE[..99])];
        let added = link.xadd::<_, _, _, _, String>("floor", "*", &entry);
        runtime.block_on(added)?;
        Ok(start.elapsed())
    });
    let rounds = bench.alternate(91, 100, vec![(1.0, floor)], write_op(&mount.path("pipe"))?)?;
    Ok(Row::of_rounds(
        Kind::Latency,
        1.5,
        "XADD by the crate",
        &rounds,
    ))
}

fn redis_echo(bench: &Bench) -> Result<Row> {
    let server = redis();
    let mount = bench.mount(&server.url())?;
    let port = server.server().port;
    let count = bench.scaled(1000);
    let each = |command: &str| format!("for i in $(seq {count}); do {command}; done");
    let theirs = each(&format!(
        "redis-cli -p {port} XADD floor '*' data message > /dev/null"
    ));
    let (ours, root) = (each("echo message > pipe"), mount.path("."));
    let mut rounds = Vec::new();
    for _ in 0..5 {
        let floor = time_of(&theirs, &root)?;
        let measured = time_of(&ours, &root)?;
        rounds.push((rate(count, floor), rate(count, measured)));
    }
    Ok(Row::of_rounds(
        Kind::Relative,
        10.0,
        "as many redis-cli XADD",
        &rounds,
    ))
}

fn redis_cat_in(bench: &Bench) -> Result<Row> {
    let lines = bench.scaled(1_000_000);
    let file = bench.lines_file(lines)?;
    let data = fs::read(&file)?;
    let server = redis();
    let port = server.server().port;
    let mount = bench.mount(&server.url())?;
    let mut rounds = Vec::new();
    for round in 0..7 {
        // What redis-cli would send for XADD floor * data LINE.
        let commands = bench.path("commands");
        let mut out = BufWriter::new(fs::File::create(&commands)?);
        let length = LINE.len() - 1;
        for line in data.chunks(LINE.len()) {
            write!(
                out,
                "*5\r\n$4\r\nXADD\r\n$6\r\nfloor{round}\r\n$1\r\n*\r\n$4\r\ndata\r\n${length}\r\n"
            )?;
            out.write_all(&line[..length])?;
            out.write_all(b"\r\n")?;
        }
        out.into_inner()?.sync_all()?;
        let piped = format!(
            "redis-cli -p {port} --pipe < {} > /dev/null",
            commands.display()
        );
        let pipe = format!("pipe{round}");
        let floor = || time_of(&piped, bench.dir.path());
        let ours = || cat(&[&file], &mount.path(&pipe));
        // Whoever is second has the first one's dirty pages to contend with.
        let (floor, measured) = if round % 2 == 0 {
            (floor()?, ours()?)
        } else {
            let measured = ours()?;
            (floor()?, measured)
        };
        same_bytes(&mount.path(&format!("{pipe}@snapshot")), &data)?;
        rounds.push((rate(lines, floor), rate(lines, measured)));
        let mut unlink = child(Path::new("redis-cli"));
        unlink.args(["-p", &port.to_string(), "UNLINK"]);
        unlink.args([format!("floor{round}"), format!("dnpipes:{pipe}")]);
        unlink.stdout(Stdio::null()).status()?;
    }
    Ok(Row::of_rounds(
        Kind::Relative,
        1.0,
        "redis-cli --pipe of XADDs",
        &rounds,
    ))
}

fn redis_cat_out(bench: &Bench) -> Result<Row> {
    let lines = bench.scaled(1_000_000);
    let file = bench.lines_file(lines)?;
    let server = redis();
    let mount = bench.mount(&server.url())?;
    cat(&[&file], &mount.path("pipe"))?;
    same_bytes(&mount.path("pipe@snapshot"), &fs::read(&file)?)?;
    let (runtime, mut link) = connect(&server.url())?;
    let mut rounds = Vec::new();
    for _ in 0..5 {
        let start = Instant::now();
        let found = runtime.block_on(read_all(&mut link))?;
        let floor = start.elapsed();
        if found != lines {
            return Err(format!("{found} entries, not {lines}").into());
        }
        let measured = cat(&[&mount.path("pipe@snapshot")], Path::new("/dev/null"))?;
        rounds.push((rate(lines, floor), rate(lines, measured)));
    }
    let floor = "the crate's loop of XRANGE COUNT 1000";
    Ok(Row::of_rounds(Kind::Relative, 0.8, floor, &rounds))
}

async fn read_all(link: &mut MultiplexedConnection) -> Result<usize> {
    let (mut from, mut found) = ("-".to_owned(), 0);
    loop {
        let reply: StreamRangeReply = link.xrange_count("dnpipes:pipe", &from, "+", COUNT).await?;
        let Some(last) = reply.ids.last() else {
            return Ok(found);
        };
        found += reply.ids.len();
        from = format!("({}", last.id);
    }
}
