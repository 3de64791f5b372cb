//! What is said, once for each of their settings, of streams that do not do what is promised of pipes.

use std::time::Duration;

use super::api::Info;
use super::link::Link;
use super::target::{LONG_ENOUGH, Stream};
use super::{Shared, lock};

impl Shared {
    /// Says what may become of messages in a stream that was not made here, and again when that has changed.
    pub(super) fn warn_of_limits(&self, info: &Info, link: &Link) {
        let config = &info.config;
        let mut why = Vec::new();
        let refuses = config.discard != "old";
        let refuses_of_subject = refuses && config.discard_new_per_subject;
        let limits = [
            (config.max_msgs, "max_msgs", refuses),
            (config.max_bytes, "max_bytes", refuses),
            (
                config.max_msgs_per_subject,
                "max_msgs_per_subject",
                refuses_of_subject,
            ),
        ];
        for (limit, name, refuses) in limits {
            if limit > 0 && !refuses {
                why.push(format!("the oldest are dropped over {name} {limit}"));
            } else if limit > 0 {
                why.push(format!("pushes are refused over {name} {limit}"));
                if name == "max_bytes" && !link.knows_batches() {
                    why.push("so old a server drops some of the oldest all the same".to_owned());
                }
            }
        }
        if config.max_age > 0 {
            let age = Duration::from_nanos(config.max_age as u64);
            why.push(format!("they are dropped after {age:?}"));
        }
        match config.retention.as_str() {
            "limits" => {}
            "interest" => why.push(
                "what all consumers have read, or there are none for, is dropped (interest retention)"
                    .to_owned(),
            ),
            retention => why.push(format!(
                "what others have read is dropped ({retention} retention)"
            )),
        }
        if config.storage != "file" {
            let storage = &config.storage;
            why.push(format!(
                "they are lost when the server ends ({storage} storage)"
            ));
        }
        if config.persist_mode == "async" {
            why.push(
                "those that it has acknowledged last are lost when the server is killed (persist_mode async; \
                 a stream keeps that, so make another one without it)"
                    .to_owned(),
            );
        }
        let why = why.join("; ");
        let mut limits = lock(&self.limits);
        if limits.get(&config.name).map_or("", String::as_str) != why {
            if !why.is_empty() {
                let name = &config.name;
                log::warn!("stream {name} does not keep messages until a reset: {why}");
            }
            limits.insert(config.name.clone(), why);
        }
    }

    /// Says once that a stream's server forgets identities sooner than an outage ends: a try that comes late is then
    /// stored beside its repetition.
    pub(super) fn warn_of_doubling(&self, stream: &Stream) {
        let (name, window) = (&stream.name, stream.window);
        if window < LONG_ENOUGH && lock(&self.warned).insert(format!("{name} window")) {
            log::warn!(
                "stream {name} remembers for {window:?} what it has stored (duplicate_window): pushes that are \
                 repeated later, as in an outage, may be stored twice; to have it remember longer: nats stream \
                 edit {name} --dupe-window=150s"
            );
        }
    }

    /// Says once that a stream of a server that has atomic batches does not take any.
    pub(super) fn warn_of_mixing(&self, stream: &Stream, link: &Link) {
        let name = &stream.name;
        let is_lacking = link.knows_batches() && !stream.atomic;
        if is_lacking && lock(&self.warned).insert(format!("{name} batches")) {
            log::warn!(
                "stream {name} takes no atomic batches: the messages of others may come between those of one \
                 write; to allow them: nats stream edit {name} --allow-batch"
            );
        }
    }
}
