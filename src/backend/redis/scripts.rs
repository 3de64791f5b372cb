//! What the server runs: each script happens as a whole.

use std::sync::LazyLock;

use redis::Script;

/// A script, and the hash by which the server knows it once it has seen it.
pub(super) struct Lua {
    pub(super) code: &'static str,
    pub(super) hash: LazyLock<String>,
}

macro_rules! script {
    ($($file:literal)+) => {
        Lua {
            code: concat!($(include_str!($file)),+),
            hash: LazyLock::new(|| {
                Script::new(concat!($(include_str!($file)),+)).get_hash().to_owned()
            }),
        }
    };
}

// A push has only what it needs: each function of a script is made anew whenever it runs.
pub(super) static PUSH: Lua =
    script!("demand.lua" "count.lua" "known.lua" "producers.lua" "push.lua");
pub(super) static BEGIN: Lua =
    script!("demand.lua" "count.lua" "known.lua" "producers.lua" "begin.lua");
pub(super) static MARK: Lua = script!("mark.lua");
pub(super) static END: Lua = script!("count.lua" "producers.lua" "end.lua");
pub(super) static STAT: Lua = script!("count.lua" "look.lua" "stat.lua");
pub(super) static CREATE: Lua = script!("demand.lua" "count.lua" "known.lua" "create.lua");
pub(super) static RESET: Lua =
    script!("demand.lua" "count.lua" "known.lua" "look.lua" "behind.lua" "reset.lua");
pub(super) static REMOVE: Lua =
    script!("demand.lua" "count.lua" "known.lua" "look.lua" "behind.lua" "remove.lua");
pub(super) static FETCH: Lua = script!("fetch.lua");
pub(super) static ABLE: Lua = script!("able.lua");
