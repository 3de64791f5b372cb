//! The source's URL: `http[s]://host[:port][/path][?ca=FILE&cert=FILE&key=FILE]`.

use std::fmt;
use std::path::PathBuf;

use reqwest::Url;

use crate::backend::broker::decoded;

/// Where a gateway is, and how to trust it.
#[derive(Clone, PartialEq, Eq)]
pub struct HttpUrl {
    /// Without user, password and query.
    pub(super) base: Url,
    /// The password in the URL: a token.
    pub(super) token: Option<String>,
    /// Certificates of authorities to trust, instead of the system's (PEM).
    pub(super) ca: Option<PathBuf>,
    /// This client's certificate chain (PEM); needs `key`.
    pub(super) cert: Option<PathBuf>,
    /// The certificate's key (PEM).
    pub(super) key: Option<PathBuf>,
}

impl HttpUrl {
    /// Parses the URL.
    ///
    /// # Errors
    /// What is wrong with it, in words that hold no secret.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut base = Url::parse(text).map_err(|error| error.to_string())?;
        if base.fragment().is_some() {
            return Err("it has a fragment (#)".to_owned());
        }
        let token = base.password().or(Some(base.username()));
        let token = token.filter(|token| !token.is_empty());
        let token = token.map(|token| decoded(token, "the token")).transpose()?;
        let (mut ca, mut cert, mut key) = (None, None, None);
        for (name, value) in base.query_pairs() {
            let known = match name.as_ref() {
                "ca" => &mut ca,
                "cert" => &mut cert,
                "key" => &mut key,
                _ => {
                    return Err(format!("unknown key {name:?}; there are: ca cert key"));
                }
            };
            if value.is_empty() || known.replace(PathBuf::from(value.as_ref())).is_some() {
                return Err(format!("{name} needs one file"));
            }
        }
        if cert.is_some() != key.is_some() {
            return Err("cert and key need each other".to_owned());
        }
        if ca.is_some() && base.scheme() != "https" || cert.is_some() && base.scheme() != "https" {
            return Err("certificates need https".to_owned());
        }
        base.set_query(None);
        // Neither can fail for a URL with a host, which http and https have.
        if base.set_username("").is_err() || base.set_password(None).is_err() {
            return Err("it has no host".to_owned());
        }
        Ok(HttpUrl {
            base,
            token,
            ca,
            cert,
            key,
        })
    }
}

impl fmt::Display for HttpUrl {
    /// Without the token.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.base.fmt(f)
    }
}

impl fmt::Debug for HttpUrl {
    /// Without the token.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HttpUrl({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_is_taken_apart_and_shows_no_secret() {
        let url = HttpUrl::parse("https://:s3cret@host:7070/base/?ca=/a.pem&cert=/c&key=/k");
        let url = url.expect("legal");
        assert_eq!(url.base.as_str(), "https://host:7070/base/");
        assert_eq!(url.token.as_deref(), Some("s3cret"));
        assert_eq!(url.ca, Some("/a.pem".into()));
        assert!(!format!("{url} {url:?}").contains("s3cret"));
    }

    #[test]
    fn a_token_is_written_as_parts_of_a_url_are() {
        let token = |url| HttpUrl::parse(url).map(|url| url.token);
        let padded = Ok(Some("Zm9v==".to_owned()));
        assert_eq!(token("http://:Zm9v%3D%3D@host/"), padded);
        assert_eq!(token("http://Zm9v==@host/"), padded);
        assert_eq!(
            token("http://:%FF@host/"),
            Err("the token is not text".to_owned())
        );
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for (text, why) in [
            ("http://", "empty host"),
            ("http://h/?retries=3", "retries"),
            ("http://h/?ca=/a", "https"),
            ("https://h/?cert=/a", "each other"),
            ("https://h/?ca=", "one file"),
            ("https://h/?ca=/a&ca=/b", "one file"),
            ("https://h/#x", "fragment"),
        ] {
            let error = HttpUrl::parse(text).expect_err(text);
            assert!(error.contains(why), "{text}: {error}");
        }
    }
}
