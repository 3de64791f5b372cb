//! What a process counts: one static table of names, units and help, and its text for Prometheus.

use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};

/// A number that others may look at.
pub struct Metric {
    name: &'static str,
    help: &'static str,
    kind: &'static str,
    value: AtomicU64,
}

impl Metric {
    const fn counter(name: &'static str, help: &'static str) -> Self {
        Metric {
            name,
            help,
            kind: "counter",
            value: AtomicU64::new(0),
        }
    }

    const fn gauge(name: &'static str, help: &'static str) -> Self {
        Metric {
            kind: "gauge",
            ..Metric::counter(name, help)
        }
    }

    /// Counts `more`.
    pub fn add(&self, more: u64) {
        self.value.fetch_add(more, Ordering::Relaxed);
    }

    /// Counts one as long as what is returned lives; for gauges.
    pub fn held(&'static self) -> Held {
        self.add(1);
        Held(self)
    }
}

/// One in a gauge.
pub struct Held(&'static Metric);

impl Drop for Held {
    fn drop(&mut self) {
        self.0.value.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Messages that were pushed and acknowledged.
pub static PUSHED: Metric = Metric::counter(
    "dnpipes_pushed_messages_total",
    "Messages that were pushed and acknowledged.",
);
/// Their bytes.
pub static PUSHED_BYTES: Metric = Metric::counter(
    "dnpipes_pushed_bytes_total",
    "Bytes of the messages that were pushed, without framing.",
);
/// Messages delivered to readers.
pub static PULLED: Metric = Metric::counter(
    "dnpipes_pulled_messages_total",
    "Messages that were delivered to readers.",
);
/// Their bytes.
pub static PULLED_BYTES: Metric = Metric::counter(
    "dnpipes_pulled_bytes_total",
    "Bytes of the messages that were delivered, without framing.",
);
/// Messages that a broker dropped before a reader came to them.
pub static MISSED: Metric = Metric::counter(
    "dnpipes_missed_messages_total",
    "Messages that a broker dropped before a reader of this process came to them.",
);
/// Resets and removals.
pub static RESETS: Metric =
    Metric::counter("dnpipes_resets_total", "Resets and removals of pipes.");
/// Pushes that may have come before.
pub static SEARCHED: Metric = Metric::counter(
    "dnpipes_searched_pushes_total",
    "Pushes under an identity that may have come before, which were searched for.",
);
/// Requests that failed by the caller's fault.
pub static REFUSED: Metric = Metric::counter(
    "dnpipes_refused_requests_total",
    "Requests that were refused (4xx).",
);
/// Requests that failed by this side's fault.
pub static FAILED: Metric = Metric::counter(
    "dnpipes_failed_requests_total",
    "Requests that failed here or in the backend (5xx).",
);
/// Open connections.
pub static CONNECTIONS: Metric =
    Metric::gauge("dnpipes_connections", "Connections that are open now.");
/// Open pulls.
pub static READERS: Metric = Metric::gauge("dnpipes_readers", "Pulls that are being answered now.");

const ALL: [&Metric; 11] = [
    &PUSHED,
    &PUSHED_BYTES,
    &PULLED,
    &PULLED_BYTES,
    &MISSED,
    &RESETS,
    &SEARCHED,
    &REFUSED,
    &FAILED,
    &CONNECTIONS,
    &READERS,
];

/// All of them, in Prometheus's text format (version 0.0.4).
pub fn text() -> String {
    let mut text = String::new();
    for metric in ALL {
        let Metric {
            name, help, kind, ..
        } = metric;
        let value = metric.value.load(Ordering::Relaxed);
        // Writing to a string cannot fail.
        let _ = write!(
            text,
            "# HELP {name} {help}\n# TYPE {name} {kind}\n{name} {value}\n"
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gauge_falls_when_what_it_counts_is_gone() {
        static OPEN: Metric = Metric::gauge("open", "Open things.");
        let (one, two) = (OPEN.held(), OPEN.held());
        drop(one);
        assert_eq!(OPEN.value.load(Ordering::Relaxed), 1);
        drop(two);
        assert_eq!(OPEN.value.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn every_name_is_there_once() {
        let text = text();
        for metric in ALL {
            let line = format!("\n{} ", metric.name);
            assert_eq!(text.matches(&line).count(), 1, "{}", metric.name);
        }
    }
}
