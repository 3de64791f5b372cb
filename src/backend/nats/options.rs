//! The source's URL: `nats[+srv]://[user[:password]@]host[:4222][,host…]/`, or `tls://` where the connection
//! has to be encrypted, with `?prefix=TEXT&replicas=1|3|5&creds=FILE`, and for TLS `ca=FILE&cert=FILE&key=FILE&tls_first=yes|no`.

use std::fmt;
use std::path::PathBuf;

use super::names::Naming;
use crate::backend::broker::{BrokerUrl, Schemes};

/// What stands in front of a pipe's name in its stream's, unless the URL says otherwise.
const PREFIX: &str = "dnpipes-";

const SCHEMES: Schemes = Schemes {
    plain: "nats",
    tls: "tls",
    port: 4222,
};

/// Where NATS servers are, and how to speak to them.
#[derive(Clone, PartialEq, Eq)]
pub struct NatsUrl {
    pub(super) broker: BrokerUrl,
    pub(super) naming: Naming,
    /// On how many servers of a cluster each message of a pipe made here is kept.
    pub(super) replicas: u8,
    /// A file with a user's JWT and key.
    pub(super) creds: Option<PathBuf>,
    /// Whether the server waits for the handshake of TLS before it says anything.
    pub(super) tls_first: bool,
}

impl NatsUrl {
    /// Parses the URL.
    ///
    /// # Errors
    /// What is wrong with it, in words that hold no secret.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut broker = BrokerUrl::parse(text, &SCHEMES)?;
        if !broker.path.is_empty() {
            return Err("it has a path; NATS has none".to_owned());
        }
        let prefix = broker.take("prefix").unwrap_or_else(|| PREFIX.to_owned());
        let replicas = match broker.take("replicas").as_deref() {
            None | Some("1") => 1,
            Some("3") => 3,
            Some("5") => 5,
            Some(other) => return Err(format!("replicas={other} is none of 1, 3 and 5")),
        };
        let creds = match broker.take("creds") {
            Some(path) if path.is_empty() => return Err("creds needs a file".to_owned()),
            path => path.map(PathBuf::from),
        };
        let tls_first = match broker.take("tls_first").as_deref() {
            None | Some("no") => false,
            Some("yes") if broker.tls.is_some() => true,
            Some("yes") => return Err("tls_first needs TLS: tls://".to_owned()),
            Some(other) => return Err(format!("tls_first={other} is neither yes nor no")),
        };
        broker.refuse_rest("prefix replicas creds tls_first")?;
        Ok(NatsUrl {
            broker,
            naming: Naming::new(prefix)?,
            replicas,
            creds,
            tls_first,
        })
    }
}

impl fmt::Display for NatsUrl {
    /// Without user, password and query.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.broker.fmt(f)
    }
}

impl fmt::Debug for NatsUrl {
    /// Without user, password and query.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NatsUrl({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_is_taken_apart_and_shows_no_secret() {
        let url = "nats://me:s3cret@one,two:5000/?prefix=ORDERS_&replicas=3&creds=/a.creds";
        let url = NatsUrl::parse(url).expect("legal");
        assert_eq!(url.to_string(), "nats://one:4222,two:5000/");
        assert!(!format!("{url:?}").contains("s3cret"));
        assert_eq!((url.replicas, url.creds), (3, Some("/a.creds".into())));
        assert_eq!(
            url.naming,
            Naming::new("ORDERS_".to_owned()).expect("legal")
        );
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for (text, why) in [
            ("nats://one/stream", "path"),
            ("nats://one/?replicas=2", "replicas"),
            ("nats://one/?prefix=a.b", "prefix"),
            ("nats://one/?creds=", "creds"),
            ("nats://one/?stream=x", "prefix replicas creds tls_first"),
            ("nats://one/?tls_first=yes", "tls://"),
            ("tls://one/?tls_first=1", "yes nor no"),
            ("nats://one/?ca=/a", "TLS"),
        ] {
            let error = NatsUrl::parse(text).expect_err(text);
            assert!(error.contains(why), "{text}: {error}");
        }
    }
}
