//! The list of all pipes, page by page.
//!
//! In a cluster the server that answers asks those that have the streams, and waits four seconds for any that is down. It
//! then says the names of the streams that are there alone.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::time::SystemTime;

use futures_util::{StreamExt, TryStreamExt, stream};
use serde::Deserialize;
use serde_json::json;

use super::api::{ApiError, Info};
use super::link::{ANSWER, Link};
use super::{Shared, lock};
use crate::backend::PipeInfo;
use crate::error::Result;
use crate::name::PipeName;

/// How many pipes' messages are counted together.
const TOGETHER: usize = 16;

/// A page of the list.
#[derive(Deserialize)]
struct Page {
    /// How many there are on all pages, those that are missing too.
    #[serde(default)]
    total: usize,
    /// `null` where there is none.
    streams: Option<Vec<Info>>,
    /// Those on servers that are down. Some may be among the streams all the same, with nothing in them.
    missing: Option<Vec<String>>,
}

/// What is said of a pipe of which nothing but its name is known.
const UNKNOWN: PipeInfo = PipeInfo {
    count: 0,
    bytes: None,
    first: None,
    last: None,
    modified: SystemTime::UNIX_EPOCH,
};

impl Shared {
    /// All pipes. Of those on servers that are down is said what was known of them.
    ///
    /// # Errors
    /// As for [`Link::api`].
    pub(super) async fn list(&self, link: &Link) -> Result<Vec<(PipeName, PipeInfo)>> {
        // Streams that come and go move between the pages.
        let mut there = BTreeMap::new();
        let mut missing = BTreeSet::new();
        let mut offset = 0;
        loop {
            let ask = json!({ "offset": offset });
            // Asked again it would begin to wait for the same servers again.
            let page = link.api_patiently::<Page>(&[ANSWER], "STREAM.LIST", &ask);
            let page = page.await?.map_err(ApiError::typed)?;
            let missed: HashSet<_> = page.missing.into_iter().flatten().collect();
            let before = offset;
            for info in page.streams.unwrap_or_default() {
                let name = &info.config.name;
                offset += usize::from(!missed.contains(name));
                if let Some(pipe) = self.url.naming.pipe(name) {
                    there.insert(pipe, info);
                }
            }
            offset += missed.len();
            missing.extend(missed.iter().filter_map(|name| self.url.naming.pipe(name)));
            if offset == before || offset >= page.total {
                break;
            }
        }
        there.retain(|pipe, _| !missing.contains(pipe));
        let described = stream::iter(there).map(|(pipe, info)| async move {
            let described = self.describe(&pipe, &info).await?;
            Ok((pipe, described))
        });
        let described = described.buffered(TOGETHER).try_collect::<Vec<_>>();
        let mut listed: BTreeMap<_, _> = described.await?.into_iter().collect();
        self.warn_of_missing(&missing);
        let mut last = lock(&self.listed);
        for pipe in missing {
            let known = last.get(&pipe).copied().unwrap_or(UNKNOWN);
            listed.insert(pipe, known);
        }
        last.clone_from(&listed);
        Ok(listed.into_iter().collect())
    }

    /// Says once of each pipe that the servers which have it are down.
    fn warn_of_missing(&self, pipes: &BTreeSet<PipeName>) {
        let mut names = Vec::new();
        {
            let mut warned = lock(&self.warned);
            for pipe in pipes {
                if warned.insert(format!("{pipe} is missing")) {
                    names.push(pipe.as_str());
                }
            }
        }
        if !names.is_empty() {
            log::warn!(
                "the servers are down that have these pipes, so lists take longer and show what was known of them: {}",
                names.join(" ")
            );
        }
    }
}
