//! A broker's URL: `scheme[+srv]://[user[:password]@]host[:port][,host:port…]/[path][?key=value…]`.

use std::fmt;
use std::path::PathBuf;

use percent_encoding::percent_decode_str;

use super::hosts::Hosts;
use super::secret;
use crate::error::{Error, Kind, Result};

/// Makes something by a task of its own, which goes on although a caller stops waiting: a connection may take longer
/// than any of them waits.
///
/// # Errors
/// Those of `making`.
pub(super) async fn made_to_its_end<T: Send + 'static>(
    making: impl Future<Output = Result<T>> + Send + 'static,
) -> Result<T> {
    tokio::spawn(making)
        .await
        .map_err(|error| Error::new(Kind::Io, "a task ended early").caused_by(error))?
}

/// The two schemes of a broker. SRV records call both as the plain one.
pub(super) struct Schemes {
    /// Without TLS.
    pub(super) plain: &'static str,
    /// With TLS.
    pub(super) tls: &'static str,
    /// The port of a host without one.
    pub(super) port: u16,
}

/// A broker's URL, taken apart. Shown, it has neither user nor password nor query.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct BrokerUrl {
    scheme: String,
    pub(super) hosts: Hosts,
    user: Option<String>,
    password: Option<String>,
    /// Without its first slash.
    pub(super) path: String,
    pub(super) tls: Option<TlsFiles>,
    query: Vec<(String, String)>,
}

/// Whom to trust, and who this client is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct TlsFiles {
    /// Certificates of authorities to trust, instead of the system's (PEM).
    pub(super) ca: Option<PathBuf>,
    /// This client's certificate chain and its key (PEM).
    pub(super) identity: Option<(PathBuf, PathBuf)>,
}

/// Who this client is.
pub(super) struct Credentials {
    pub(super) user: Option<String>,
    pub(super) password: Option<String>,
}

impl BrokerUrl {
    /// Takes `text` apart; its scheme is one of the two, perhaps with `+srv`.
    ///
    /// # Errors
    /// What is wrong with it, in words that hold no secret.
    pub(super) fn parse(text: &str, schemes: &Schemes) -> Result<Self, String> {
        let (scheme, rest) = text.split_once("://").ok_or("it has no //")?;
        if rest.contains('#') {
            return Err("it has a fragment (#)".to_owned());
        }
        let (plain, srv) = match scheme.strip_suffix("+srv") {
            Some(plain) => (plain, true),
            None => (scheme, false),
        };
        if plain != schemes.plain && plain != schemes.tls {
            return Err(format!("there is no scheme {scheme:?}"));
        }
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        let (who, hosts) = match authority.rsplit_once('@') {
            Some((who, hosts)) => (who, hosts),
            None => ("", authority),
        };
        let service = srv.then_some(schemes.plain);
        let hosts = Hosts::parse(hosts, schemes.port, service);
        // A slash in a password cuts it: what follows would be shown as what is wrong with the rest.
        let mut parts = [path, query.split('=').next().unwrap_or_default()].into_iter();
        if !authority.contains('@')
            && (parts.any(|part| part.contains('@')) || hosts.is_err() && query.contains('@'))
        {
            return Err("/ ? # @ of a user or password are written %2F %3F %23 %40".to_owned());
        }
        let (user, password) = who.split_once(':').unwrap_or((who, ""));
        let some = |text: &str, what| {
            decoded(text, what).map(|text| Some(text).filter(|text| !text.is_empty()))
        };
        let mut url = BrokerUrl {
            scheme: scheme.to_owned(),
            hosts: hosts?,
            user: some(user, "the user")?,
            password: some(password, "the password")?,
            path: decoded(path, "the path")?,
            tls: (plain == schemes.tls).then(TlsFiles::default),
            query: Vec::new(),
        };
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            let (key, value) = (decoded(key, "a key")?, decoded(value, "a value")?);
            if url.query.iter().any(|(other, _)| *other == key) {
                return Err(format!("{key} stands there twice"));
            }
            url.query.push((key, value));
        }
        url.take_tls()?;
        Ok(url)
    }

    fn take_tls(&mut self) -> Result<(), String> {
        let mut file = |key| match self.take(key) {
            Some(path) if path.is_empty() => Err(format!("{key} needs a file")),
            path => Ok(path.map(PathBuf::from)),
        };
        let (ca, cert, key) = (file("ca")?, file("cert")?, file("key")?);
        let identity = match (cert, key) {
            (Some(cert), Some(key)) => Some((cert, key)),
            (None, None) => None,
            _ => return Err("cert and key need each other".to_owned()),
        };
        match &mut self.tls {
            Some(files) => *files = TlsFiles { ca, identity },
            None if ca.is_some() || identity.is_some() => {
                return Err("certificates need a scheme with TLS".to_owned());
            }
            None => {}
        }
        Ok(())
    }

    /// Takes the value of `key` out of the query.
    pub(super) fn take(&mut self, key: &str) -> Option<String> {
        let at = self.query.iter().position(|(known, _)| known == key)?;
        Some(self.query.remove(at).1)
    }

    /// Takes a switch out of the query: `key`, `key=true` or `key=false`.
    ///
    /// # Errors
    /// For any other value.
    pub(super) fn take_switch(&mut self, key: &str) -> Result<bool, String> {
        match self.take(key).as_deref() {
            None | Some("false") => Ok(false),
            Some("" | "true") => Ok(true),
            Some(_) => Err(format!("{key} is true or false")),
        }
    }

    /// Refuses what is left in the query; `known` are the keys that would not have been.
    ///
    /// # Errors
    /// Names the first key.
    pub(super) fn refuse_rest(&self, known: &str) -> Result<(), String> {
        match self.query.first() {
            None => Ok(()),
            Some((key, _)) => Err(format!(
                "unknown key {key:?}; there are: {known} ca cert key"
            )),
        }
    }

    /// User and password: of the environment (`DNPIPES_USER`, `DNPIPES_PASSWORD`, or the files that those
    /// with `_FILE` name), else of the URL.
    ///
    /// # Errors
    /// `NotFound`, `Denied` or `InvalidInput` for the files.
    pub(super) fn credentials(&self) -> Result<Credentials> {
        let user = secret::from_environment("DNPIPES_USER")?;
        let password = secret::from_environment("DNPIPES_PASSWORD")?;
        Ok(Credentials {
            user: user.or_else(|| self.user.clone()),
            password: password.or_else(|| self.password.clone()),
        })
    }
}

/// A part of a URL as it is meant.
///
/// # Errors
/// That `what` is not text.
pub(super) fn decoded(text: &str, what: &str) -> Result<String, String> {
    let text = percent_decode_str(text).decode_utf8();
    text.map(String::from)
        .map_err(|_| format!("{what} is not text"))
}

impl fmt::Display for BrokerUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}/{}", self.scheme, self.hosts, self.path)
    }
}

impl fmt::Debug for BrokerUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BrokerUrl({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SCHEMES: Schemes = Schemes {
        plain: "nats",
        tls: "tls",
        port: 4222,
    };

    #[test]
    fn a_url_is_taken_apart_and_shows_no_secret() {
        let text =
            "tls://me:s3%40cret@one,two:5000/p%20q?prefix=a%26b&fast&ca=/a.pem&cert=/c&key=/k";
        let mut url = BrokerUrl::parse(text, &SCHEMES).expect("legal");
        assert_eq!(url.to_string(), "tls://one:4222,two:5000/p q");
        assert!(!format!("{url:?}").contains("s3"));
        assert_eq!(url.password.as_deref(), Some("s3@cret"));
        assert_eq!(url.take("prefix").as_deref(), Some("a&b"));
        assert_eq!(url.take_switch("fast"), Ok(true));
        assert_eq!(url.refuse_rest("prefix"), Ok(()));
        let files = url.tls.expect("TLS");
        assert_eq!(files.ca, Some("/a.pem".into()));
        assert_eq!(files.identity, Some(("/c".into(), "/k".into())));
        let srv = BrokerUrl::parse("nats+srv://example.com", &SCHEMES).expect("legal");
        assert_eq!(srv.to_string(), "nats+srv://example.com/");
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for (text, why) in [
            ("nats:one", "//"),
            ("nats://", "no host"),
            ("redis://one", "scheme"),
            ("nats://one?ca=/a", "TLS"),
            ("tls://one?cert=/a", "each other"),
            ("tls://one?ca=", "a file"),
            ("tls://one?x=1&x=2", "twice"),
            ("nats://one#x", "fragment"),
            ("nats://one/%ff", "text"),
            ("nats+srv://one:1", "no port"),
        ] {
            let error = BrokerUrl::parse(text, &SCHEMES).expect_err(text);
            assert!(error.contains(why), "{text}: {error}");
        }
        let url = BrokerUrl::parse("nats://one?retries=3", &SCHEMES).expect("legal");
        assert!(
            url.refuse_rest("prefix")
                .expect_err("unknown")
                .contains("retries")
        );
    }
}
