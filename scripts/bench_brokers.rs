//! Rows of brokers: each against the broker's own tools and the client's crate, on the same server.

use std::path::Path;
use std::time::{Duration, Instant};

use super::{
    Bench, Kind, LINE, Measure, Op, Result, Row, at, cat, child, rate, same_bytes, write_op,
};

#[path = "bench_nats.rs"]
mod nats;
#[path = "bench_redis.rs"]
mod redis;
#[path = "../tests/support/services.rs"]
mod services;

/// All of them.
pub(super) fn rows() -> impl Iterator<Item = &'static (&'static str, Measure)> {
    redis::ROWS.iter().chain(&nats::ROWS)
}

/// Runs a loop in bash, to its end.
fn time_of(script: &str, directory: &Path) -> Result<Duration> {
    let start = Instant::now();
    let mut bash = child(Path::new("bash"));
    let status = bash.arg("-c").arg(script).current_dir(directory).status()?;
    match status.success() {
        true => Ok(start.elapsed()),
        false => Err(format!("{script}: {status}").into()),
    }
}
