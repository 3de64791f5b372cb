//! Source URLs: `memory:[?limit=SIZE]`, `sqlite:/path/file.db[?durability=full|process]`, and those of
//! [`HttpUrl`], [`NatsUrl`] and [`RedisUrl`].

use std::borrow::Cow;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use super::http::HttpUrl;
use super::nats::NatsUrl;
use super::redis::RedisUrl;
use super::sqlite::Durability;
use crate::error::{Error, Kind, Result};
use crate::selector::parse_size;

/// Bytes that `memory:` holds unless its URL says otherwise.
const MEMORY_LIMIT: u64 = 1 << 30;

/// A parsed source URL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BackendUrl {
    /// Messages live in this process.
    Memory {
        /// Bytes of messages it may hold.
        limit: u64,
    },
    /// Messages live in a SQLite file.
    Sqlite {
        /// The database file.
        path: PathBuf,
        /// What an acknowledged push survives.
        durability: Durability,
    },
    /// Messages live behind a gateway (`dnpipes serve`).
    Http(HttpUrl),
    /// Messages live in NATS JetStream.
    Nats(NatsUrl),
    /// Messages live in streams of a Redis.
    Redis(RedisUrl),
}

impl FromStr for BackendUrl {
    type Err = Error;

    /// # Errors
    /// [`Kind::InvalidInput`] for an unknown scheme, key or value.
    fn from_str(text: &str) -> Result<Self> {
        let shown = without_secret(text);
        let refuse =
            |why: String| Error::new(Kind::InvalidInput, format!("source {shown:?}: {why}"));
        let Some((scheme, rest)) = text.split_once(':') else {
            let file = match text.contains('/') || text.ends_with(".db") {
                true => text,
                false => "/path/file.db",
            };
            return Err(refuse(format!(
                "it has no scheme, as sqlite:{file}, https://host:7070/, redis://host/ or nats://host/"
            )));
        };
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        let pairs = query.split('&').filter(|pair| !pair.is_empty());
        let pairs = pairs.map(|pair| pair.split_once('=').unwrap_or((pair, "")));
        match scheme {
            "memory" => {
                if !path.is_empty() {
                    return Err(refuse("memory: takes no path".to_owned()));
                }
                let mut limit = MEMORY_LIMIT;
                for (key, value) in pairs {
                    match (key, parse_size(value)) {
                        ("limit", Some(bytes)) => limit = bytes,
                        ("limit", None) => {
                            let why = format!("limit={value} is no size, as 4096, 64MiB or 2GiB");
                            return Err(refuse(why));
                        }
                        _ => return Err(refuse(unknown_key(key, "limit"))),
                    }
                }
                Ok(BackendUrl::Memory { limit })
            }
            "sqlite" => {
                if path.is_empty() {
                    return Err(refuse("sqlite: needs a path".to_owned()));
                }
                let mut durability = Durability::Full;
                for (key, value) in pairs {
                    durability = match (key, value) {
                        ("durability", "full") => Durability::Full,
                        ("durability", "process") => Durability::Process,
                        ("durability", _) => {
                            return Err(refuse(format!(
                                "durability={value} is neither full nor process"
                            )));
                        }
                        _ => return Err(refuse(unknown_key(key, "durability"))),
                    };
                }
                Ok(BackendUrl::Sqlite {
                    path: path.into(),
                    durability,
                })
            }
            "http" | "https" => HttpUrl::parse(text).map(BackendUrl::Http).map_err(refuse),
            "nats" | "nats+srv" | "tls" | "tls+srv" => {
                NatsUrl::parse(text).map(BackendUrl::Nats).map_err(refuse)
            }
            "redis" | "rediss" | "redis+srv" | "rediss+srv" => {
                RedisUrl::parse(text).map(BackendUrl::Redis).map_err(refuse)
            }
            _ => Err(refuse(format!(
                "there is no backend {scheme:?}; there are: sqlite memory http https nats tls redis rediss, and with +srv the last four"
            ))),
        }
    }
}

/// The URL without what stands before the host's name, and without its query, where somebody may have put a secret. One may
/// hold what should have been written otherwise, as a slash: it ends at the last @.
fn without_secret(text: &str) -> Cow<'_, str> {
    let (head, rest) = match text.split_once(':') {
        Some(("sqlite" | "memory", _)) | None => return Cow::Borrowed(text),
        Some((scheme, rest)) if rest.starts_with("//") => text.split_at(scheme.len() + 3),
        Some((scheme, _)) => text.split_at(scheme.len() + 1),
    };
    let (hidden, rest) = match rest.rfind('@') {
        Some(at) => ("…", &rest[at..]),
        None => ("", rest),
    };
    match rest.split_once('?') {
        Some((rest, _)) => Cow::Owned(format!("{head}{hidden}{rest}?…")),
        None => Cow::Owned(format!("{head}{hidden}{rest}")),
    }
}

fn unknown_key(key: &str, known: &str) -> String {
    format!("unknown key {key:?}; there is: {known}")
}

impl fmt::Display for BackendUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            BackendUrl::Memory { .. } => f.write_str("memory:"),
            BackendUrl::Sqlite { path, .. } => write!(f, "sqlite:{}", path.display()),
            BackendUrl::Http(url) => url.fmt(f),
            BackendUrl::Nats(url) => url.fmt(f),
            BackendUrl::Redis(url) => url.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_urls_parse() {
        assert_eq!(
            "memory:".parse::<BackendUrl>().expect("memory"),
            BackendUrl::Memory { limit: 1 << 30 }
        );
        assert_eq!(
            "memory:?limit=2GiB".parse::<BackendUrl>().expect("a size"),
            BackendUrl::Memory { limit: 2 << 30 }
        );
        assert_eq!(
            "sqlite:/a/b.db?durability=process"
                .parse::<BackendUrl>()
                .expect("sqlite"),
            BackendUrl::Sqlite {
                path: "/a/b.db".into(),
                durability: Durability::Process
            }
        );
    }

    #[test]
    fn a_refused_url_shows_no_secret() {
        for text in [
            "https://u:s3cret@h/?x=1",
            "ftp://s3cret@h/",
            "http://:s3cret@/",
            "redis://:s3cret/@h",
            "redis://u:s3cret/@h",
            "redis://u:1/s3cret@h",
            "redis://:a?s3cret@h",
            "redis://u:a#s3cret@h",
            "nats://u:s3cret?@h",
            "redis:u:s3cret@h",
            "redis:/u:s3cret@h",
            "u:s3cret@h",
            "redis://h/?password=s3cret",
            "http://h/?token=s3cret",
            "nats://u:other@h/?key=s3cret",
        ] {
            let error = text.parse::<BackendUrl>().expect_err(text);
            assert!(!error.to_string().contains("s3cret"), "{error}");
        }
    }

    #[test]
    fn what_is_unknown_is_refused_by_name() {
        for (text, why) in [
            ("pipes.db", "scheme"),
            ("sqlite:", "path"),
            ("sqlite:/a?sync=1", "\"sync\""),
            ("sqlite:/a?durability=none", "durability=none"),
            ("memory:/x", "no path"),
            ("memory:?limit=lots", "limit=lots"),
            ("gopher://x", "gopher"),
        ] {
            let error = text.parse::<BackendUrl>().expect_err(text);
            assert_eq!(error.kind(), Kind::InvalidInput);
            assert!(error.to_string().contains(why), "{error}");
        }
    }
}
