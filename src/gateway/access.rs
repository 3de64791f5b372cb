//! Who may do what: bearer tokens (RFC 6750), each with its rights.

use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use super::Gateway;
use super::problem::Failed;
use crate::error::{Error, Kind, Result};
use crate::name::PipeName;

/// Shortest token, in bytes: what could be guessed is none.
const SHORTEST: usize = 16;

/// What a request wants to do with a pipe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Right {
    /// Know that it is there.
    Look,
    Read,
    Push,
    /// Reset, remove.
    Drop,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rights {
    Full,
    Read,
    Push,
}

/// What a caller may do.
#[derive(Debug, Clone)]
pub(super) struct Grant {
    rights: Rights,
    prefix: String,
}

impl Grant {
    const ALL: Grant = Grant {
        rights: Rights::Full,
        prefix: String::new(),
    };

    /// Lets the caller do it, or not.
    ///
    /// # Errors
    /// `Denied`.
    pub(super) fn check(&self, right: Right, pipe: &PipeName) -> Result<()> {
        let allowed = match self.rights {
            Rights::Full => true,
            Rights::Read => matches!(right, Right::Look | Right::Read),
            Rights::Push => matches!(right, Right::Look | Right::Push),
        };
        if allowed && self.sees(pipe) {
            return Ok(());
        }
        let what = match right {
            Right::Look => "look at",
            Right::Read => "read",
            Right::Push => "push to",
            Right::Drop => "reset or remove",
        };
        Err(Error::new(
            Kind::Denied,
            format!("the token does not allow to {what} {pipe}"),
        ))
    }

    /// Whether the pipe is one of those that the token is for.
    pub(super) fn sees(&self, pipe: &PipeName) -> bool {
        pipe.as_str().starts_with(&self.prefix)
    }

    /// Whether the caller may look at things that concern all pipes.
    ///
    /// # Errors
    /// `Denied`.
    pub(super) fn check_all(&self) -> Result<()> {
        match self.rights != Rights::Push && self.prefix.is_empty() {
            true => Ok(()),
            false => Err(Error::new(Kind::Denied, "the token is not for all pipes")),
        }
    }
}

struct Token {
    digest: [u8; 32],
    grant: Grant,
}

/// The tokens; none lets everybody do everything.
#[derive(Default)]
pub struct Access {
    tokens: Vec<Token>,
    pages: Pages,
}

/// Which web pages may have a browser ask, where no token is needed that only programs know.
#[derive(Default)]
enum Pages {
    #[default]
    All,
    /// None of other sites.
    Own,
    /// Nor one that has this host go by another name (DNS rebinding).
    Local,
}

impl Access {
    /// Everybody may do everything.
    pub fn open() -> Self {
        Access::default()
    }

    /// Every program on this host may do everything, but no web page that a browser on it shows.
    pub fn local() -> Self {
        Access {
            pages: Pages::Local,
            ..Access::default()
        }
    }

    /// Everybody who has come by a certificate of his own may do everything, but no web page that his browser shows.
    /// By which name the gateway is called needs no look: its own certificate says it.
    pub fn certified() -> Self {
        Access {
            pages: Pages::Own,
            ..Access::default()
        }
    }

    /// Reads tokens from a file: on each line a token, then `full` (the default), `read` or `push`, then a
    /// prefix of the pipes' names it is for. Lines that begin with `#` are passed over.
    ///
    /// # Errors
    /// `NotFound`, `Denied`, or `InvalidInput` with the line's number, never with its text.
    pub fn from_file(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path)
            .map_err(|error| Error::io(path.display().to_string(), error))?;
        Access::parse(&text)
            .map_err(|error| Error::new(error.kind(), format!("{}: {error}", path.display())))
    }

    fn parse(text: &str) -> Result<Self> {
        let mut tokens = Vec::new();
        for (line, number) in text.lines().zip(1..) {
            let mut words = line.split_whitespace();
            let Some(token) = words.next().filter(|token| !token.starts_with('#')) else {
                continue;
            };
            let refuse = |why: &str| {
                Err(Error::new(
                    Kind::InvalidInput,
                    format!("line {number}: {why}"),
                ))
            };
            if token.len() < SHORTEST {
                return refuse(&format!("a token has at least {SHORTEST} characters"));
            }
            let rights = match words.next() {
                None | Some("full") => Rights::Full,
                Some("read") => Rights::Read,
                Some("push") => Rights::Push,
                Some(_) => return refuse("behind the token stands full, read or push"),
            };
            let prefix = words.next().unwrap_or_default().to_owned();
            if words.next().is_some() {
                return refuse("there is a word too many");
            }
            let digest = digest(token.as_bytes());
            if tokens.iter().any(|other: &Token| other.digest == digest) {
                return refuse("the token stands on an earlier line too");
            }
            tokens.push(Token {
                digest,
                grant: Grant { rights, prefix },
            });
        }
        if tokens.is_empty() {
            return Err(Error::new(Kind::InvalidInput, "there is no token in it"));
        }
        Ok(Access {
            tokens,
            pages: Pages::All,
        })
    }

    /// Whether this is sent for a web page that may not.
    fn keeps_out(&self, headers: &HeaderMap) -> bool {
        match self.pages {
            Pages::All => false,
            Pages::Own => is_foreign(headers),
            Pages::Local => is_foreign(headers) || !is_local(host(headers)),
        }
    }

    /// What the caller may do who sent these headers; `None` if he is not let in.
    fn grant(&self, headers: &HeaderMap) -> Option<Grant> {
        if self.tokens.is_empty() {
            return Some(Grant::ALL);
        }
        let value = headers.get(header::AUTHORIZATION)?.as_bytes();
        let (scheme, token) = value.split_at_checked("Bearer ".len())?;
        if !scheme.eq_ignore_ascii_case(b"Bearer ") {
            return None;
        }
        // Of the digests every one is compared to its end: time tells neither a token's beginning, nor its
        // length, nor its place in the file.
        let sent = digest(token);
        let mut grant = None;
        for token in &self.tokens {
            if bool::from(token.digest.ct_eq(&sent)) {
                grant = Some(token.grant.clone());
            }
        }
        grant
    }
}

/// Whether a browser sends this for a page of another site: it says so itself (W3C Fetch Metadata), or by a foreign
/// origin.
fn is_foreign(headers: &HeaderMap) -> bool {
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
    match (text("sec-fetch-site"), text(header::ORIGIN.as_str())) {
        (Some(site), _) => site == "cross-site" || site == "same-site",
        (None, Some(origin)) => origin
            .split_once("://")
            .is_none_or(|(_, from)| from != host(headers)),
        (None, None) => false,
    }
}

fn host(headers: &HeaderMap) -> &str {
    let host = headers.get(header::HOST);
    host.and_then(|host| host.to_str().ok()).unwrap_or_default()
}

/// Whether a Host header names this host by address, or by a name that no DNS server gives.
fn is_local(host: &str) -> bool {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    };
    let address = name.trim_start_matches('[').trim_end_matches(']');
    name.is_empty() || name == "localhost" || address.parse::<IpAddr>().is_ok()
}

fn digest(token: &[u8]) -> [u8; 32] {
    Sha256::digest(token).into()
}

/// Lets in who may come in, and notes what he may do. That the gateway lives, and how to talk to it,
/// everybody may know.
pub(super) async fn admit(
    State(gateway): State<Arc<Gateway>>,
    mut request: Request,
    next: Next,
) -> Response {
    let access = gateway.access();
    let grant = match request.uri().path() {
        "/healthz" | "/openapi.json" => Some(Grant::ALL),
        _ if access.keeps_out(request.headers()) => {
            let why = "this looks like a web page's request; a gateway without tokens takes none \
                       (--token-file lets in who knows one, --insecure everybody)";
            return Failed::from(Error::new(Kind::Denied, why)).into_response();
        }
        _ => access.grant(request.headers()),
    };
    match grant {
        Some(grant) => {
            request.extensions_mut().insert(grant);
            next.run(request).await
        }
        None => {
            let error = Error::new(
                Kind::Denied,
                "a known token is needed: Authorization: Bearer TOKEN",
            );
            let mut response = Failed::with(StatusCode::UNAUTHORIZED, error).into_response();
            let challenge = HeaderValue::from_static("Bearer realm=\"dnpipes\"");
            response
                .headers_mut()
                .insert(header::WWW_AUTHENTICATE, challenge);
            response
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = "\
# who\n\
fullfullfullfull\n\
readreadreadread read\n\n\
pushpushpushpush push app-\n";

    fn grant(value: &str) -> Option<Grant> {
        let mut headers = HeaderMap::new();
        headers.insert(header::AUTHORIZATION, value.parse().expect("a value"));
        Access::parse(FILE).expect("legal").grant(&headers)
    }

    #[test]
    fn each_token_has_its_rights() {
        let (app, other) = (
            PipeName::new("app-log").expect("a name"),
            PipeName::new("other").expect("a name"),
        );
        let may = |grant: &Grant, right, pipe| grant.check(right, pipe).is_ok();
        let full = grant("Bearer fullfullfullfull").expect("known");
        assert!(may(&full, Right::Drop, &other) && full.check_all().is_ok());
        let read = grant("bearer readreadreadread").expect("known");
        assert!(may(&read, Right::Read, &other) && !may(&read, Right::Push, &other));
        assert!(!may(&read, Right::Drop, &other));
        let push = grant("Bearer pushpushpushpush").expect("known");
        assert!(may(&push, Right::Push, &app) && !may(&push, Right::Push, &other));
        assert!(!may(&push, Right::Read, &app) && push.check_all().is_err());
    }

    #[test]
    fn nobody_else_is_let_in() {
        for value in [
            "Bearer x",
            "Bearer ",
            "fullfullfullfull",
            "Basic fullfullfullfull",
        ] {
            assert!(grant(value).is_none(), "{value}");
        }
        assert!(
            Access::parse(FILE)
                .expect("legal")
                .grant(&HeaderMap::new())
                .is_none()
        );
        assert!(Access::open().grant(&HeaderMap::new()).is_some());
    }

    #[test]
    fn a_page_of_another_site_is_told_from_a_program() {
        let of_a_page = |pairs: &[(&'static str, &str)]| {
            let mut headers = HeaderMap::new();
            for (name, value) in pairs {
                headers.insert(*name, value.parse().expect("a value"));
            }
            Access::local().keeps_out(&headers)
        };
        for host in [
            "127.0.0.1:7070",
            "localhost:7070",
            "[::1]:7070",
            "localhost",
            "",
        ] {
            assert!(!of_a_page(&[("host", host)]), "{host}");
        }
        assert!(of_a_page(&[("host", "evil.example:7070")]));
        let here = ("host", "127.0.0.1:7070");
        assert!(of_a_page(&[here, ("origin", "http://evil.example")]));
        assert!(of_a_page(&[here, ("origin", "null")]));
        assert!(of_a_page(&[here, ("sec-fetch-site", "cross-site")]));
        assert!(!of_a_page(&[here, ("origin", "http://127.0.0.1:7070")]));
        assert!(!of_a_page(&[here, ("sec-fetch-site", "none")]));
    }

    #[test]
    fn a_bad_file_is_refused_without_telling_the_token() {
        for text in [
            "",
            "# none\n",
            "short\n",
            "s3crets3crets3cret all\n",
            "s3crets3crets3cret read a b\n",
            "s3crets3crets3cret read\ns3crets3crets3cret push\n",
        ] {
            let error = Access::parse(text).map(|_| ()).expect_err(text);
            assert!(!error.to_string().contains("s3cret"), "{error}");
        }
    }
}
