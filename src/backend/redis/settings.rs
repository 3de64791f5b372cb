//! What a server can do, and what it keeps, as it says when it is connected to first.

use std::collections::HashMap;

use redis::Value;

use super::client::{Client, one_node};
use super::entry::text;
use super::link::{Link, is_broken, translated};
use super::options::Topology;
use super::scripts;
use crate::error::{Error, Kind, Result};

/// The first line of versions that will do: scripts may ask for the time before they write.
const OLDEST_VERSION: u32 = 7;

/// What Redis says to a command that it does not have, or that was renamed.
const NO_COMMAND: &str = "unknown command";

impl Client {
    /// Looks whether the server can do what is asked of it, and at the settings that decide on what is kept.
    ///
    /// # Errors
    /// `Unsupported` or `Denied` for a server that will never do; those of asking.
    pub(super) async fn check(&self, link: &mut Link) -> Result<()> {
        // Older servers cannot be asked for the rest.
        self.check_settings(link).await?;
        self.check_scripts(link).await
    }

    async fn check_settings(&self, link: &mut Link) -> Result<()> {
        let info = match one_node(link, redis::cmd("INFO")).await {
            Ok(info) => info,
            Err(error) if is_broken(&error) => return Err(translated("INFO", error)),
            Err(error) => {
                log::info!("{}: its settings are not known: {error}", self.url);
                return Ok(());
            }
        };
        let info = match &info {
            Value::VerbatimString { text, .. } => text,
            other => text(other)?,
        };
        let fields: HashMap<&str, &str> = info
            .lines()
            .filter_map(|line| line.split_once(':'))
            .collect();
        let field = |name| fields.get(name).copied().unwrap_or_default();
        let version = field("redis_version");
        let major = version
            .split('.')
            .next()
            .and_then(|major| major.parse().ok());
        if major.is_some_and(|major: u32| major < OLDEST_VERSION) {
            let why = format!("{} is Redis {version}; it takes 7.0 or later", self.url);
            return Err(Error::new(Kind::Unsupported, why));
        }
        if field("redis_mode") == "cluster" && self.url.topology != Topology::Cluster {
            return Err(self.is_node());
        }
        if field("role") == "slave" {
            log::warn!("{}: it is a replica, and takes no push", self.url);
        }
        let policy = field("maxmemory_policy");
        if policy.starts_with("allkeys") {
            log::warn!(
                "{}: it drops whole pipes when its memory is full (maxmemory-policy {policy}); noeviction keeps them",
                self.url
            );
        }
        if field("aof_enabled") == "0" {
            log::warn!(
                "{}: it has no append-only file: a crash takes what was pushed since its last snapshot; appendonly yes keeps it",
                self.url
            );
        }
        Ok(())
    }

    /// All that is done here takes scripts.
    async fn check_scripts(&self, link: &mut Link) -> Result<()> {
        let (whole, known) = (scripts::ABLE.code, scripts::ABLE.hash.as_str());
        for (name, script) in [("EVAL", whole), ("EVALSHA", known)] {
            let mut ask = redis::cmd(name);
            ask.arg(script).arg(0);
            let what = || format!("{}: it has to run scripts ({name})", self.url);
            match one_node(link, ask).await {
                Ok(missing) => match text(&missing)? {
                    "" => {}
                    missing => {
                        let why = format!("{}: it has no command {missing}", self.url);
                        return Err(Error::new(Kind::Unsupported, why));
                    }
                },
                Err(error) if error.to_string().contains(NO_COMMAND) => {
                    return Err(Error::new(Kind::Unsupported, what()).caused_by(error.to_string()));
                }
                Err(error) => {
                    let is_broken = is_broken(&error);
                    let error = translated(what(), error);
                    if is_broken || error.kind() == Kind::Denied {
                        return Err(error);
                    }
                    // It may be busy, or one of a cluster that has not heard of the script.
                    log::debug!("{error}");
                }
            }
        }
        Ok(())
    }
}
