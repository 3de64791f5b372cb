//! The source's URL: `redis[s][+srv]://[user[:password]@]host[:port][,…]/[database][?prefix=…&cluster&sentinel=…&replicas=…]`.

use std::fmt;

use crate::backend::broker::{BrokerUrl, Schemes};

const SCHEMES: Schemes = Schemes {
    plain: "redis",
    tls: "rediss",
    port: 6379,
};

/// What pipes' keys begin with, unless `?prefix=` says otherwise.
const PREFIX: &str = "dnpipes:";

/// How the servers of the URL belong together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Topology {
    /// The first that answers and is no replica.
    Single,
    /// Nodes of a Redis Cluster.
    Cluster,
    /// Sentinels, that know the master by this name.
    Sentinel(String),
}

/// Where a Redis is, and which of its streams are pipes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RedisUrl {
    pub(super) broker: BrokerUrl,
    /// The database's number.
    pub(super) database: i64,
    /// What the keys of pipes begin with.
    pub(super) prefix: String,
    pub(super) topology: Topology,
    /// How many replicas have what is acknowledged.
    pub(super) replicas: u8,
}

impl RedisUrl {
    /// Parses the URL.
    ///
    /// # Errors
    /// What is wrong with it, in words that hold no secret.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut broker = BrokerUrl::parse(text, &SCHEMES)?;
        let database = match broker.path.as_str() {
            "" => 0,
            digits => match digits.parse::<u16>() {
                Ok(number) => i64::from(number),
                Err(_) => return Err(format!("{digits:?} is not the number of a database")),
            },
        };
        let prefix = broker.take("prefix");
        let topology = match (broker.take_switch("cluster")?, broker.take("sentinel")) {
            (false, None) => Topology::Single,
            (true, None) if database == 0 => Topology::Cluster,
            (true, None) => return Err("a cluster has one database, 0".to_owned()),
            (false, Some(name)) if !name.is_empty() => Topology::Sentinel(name),
            (false, Some(_)) => return Err("sentinel needs the master's name".to_owned()),
            (true, Some(_)) => return Err("it is cluster or sentinel, not both".to_owned()),
        };
        let replicas = match broker.take("replicas") {
            None => 0,
            Some(digits) => digits
                .parse()
                .map_err(|_| format!("replicas is a number up to {}, not {digits:?}", u8::MAX))?,
        };
        broker.refuse_rest("prefix cluster sentinel replicas")?;
        Ok(RedisUrl {
            broker,
            database,
            prefix: prefix.unwrap_or_else(|| PREFIX.to_owned()),
            topology,
            replicas,
        })
    }
}

impl fmt::Display for RedisUrl {
    /// Without user, password and query.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.broker.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_says_which_streams_of_which_servers() {
        let url = RedisUrl::parse("redis://:pw@one/3?prefix=").expect("legal");
        assert_eq!((url.database, url.prefix.as_str()), (3, ""));
        assert_eq!(url.to_string(), "redis://one:6379/3");
        let url = RedisUrl::parse("rediss://one,two?cluster").expect("legal");
        assert_eq!(
            (url.topology, url.prefix.as_str()),
            (Topology::Cluster, PREFIX)
        );
        let url = RedisUrl::parse("redis+srv://sentinels.local/1?sentinel=main").expect("legal");
        assert_eq!(url.topology, Topology::Sentinel("main".to_owned()));
        assert_eq!(url.replicas, 0);
        let url = RedisUrl::parse("redis://one?replicas=2").expect("legal");
        assert_eq!(url.replicas, 2);
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for (text, why) in [
            ("redis://one/x", "database"),
            ("redis://one/1?cluster", "one database"),
            ("redis://one?sentinel=", "name"),
            ("redis://one?cluster&sentinel=a", "not both"),
            ("redis://one?cluster=maybe", "true or false"),
            ("redis://one?db=1", "\"db\""),
            ("redis://one?replicas=many", "number"),
            ("redis://one?replicas=256", "number"),
        ] {
            let error = RedisUrl::parse(text).expect_err(text);
            assert!(error.contains(why), "{text}: {error}");
        }
    }
}
