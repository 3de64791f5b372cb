//! Requests to a gateway, and what it means when they fail.

use std::path::Path;
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use reqwest::header::{CONTENT_TYPE, HeaderValue};
use reqwest::{Certificate, Identity, Method, RequestBuilder, Response, StatusCode, Url};
use serde::de::DeserializeOwned;

use super::options::HttpUrl;
use super::{not_a_gateway, wire};
use crate::backend::secret::{self, read};
use crate::backend::tls::tls_error;
use crate::error::{Error, Kind, Result};
use crate::message::{Batch, Position, PushId};
use crate::name::PipeName;

/// How long a connection may take to be made.
const CONNECT: Duration = Duration::from_secs(5);

/// How long an answer may take after the request is sent, and how long sent data may stay without an
/// acknowledgement of the other side's system. Longer than a gateway waits for its store.
const ANSWER: Duration = Duration::from_secs(10);

/// The slowest line that a long push is given time for, in bytes a second, where the mount's deadline leaves as much.
const SLOWEST: u64 = 64 << 10;

/// How long a stream may be silent: two signs of life may be late.
const SILENCE: Duration = Duration::from_secs(3 * wire::HEARTBEAT);

/// Answers that are documents, in bytes: beyond it is no gateway's.
const MOST: usize = 64 << 20;

/// The same of those that tell of a failure.
const MOST_OF_PROBLEM: usize = 64 << 10;

pub(super) struct Client {
    http: reqwest::Client,
    base: Url,
}

impl Client {
    pub(super) fn new(url: &HttpUrl) -> Result<Self> {
        // Who set another provider before keeps it.
        drop(rustls::crypto::ring::default_provider().install_default());
        let mut builder = reqwest::Client::builder()
            .user_agent(concat!("dnpipes/", env!("CARGO_PKG_VERSION")))
            .http1_only()
            .no_proxy()
            // A redirected push could become a GET; who moves a gateway changes the source.
            .redirect(reqwest::redirect::Policy::none())
            .retry(reqwest::retry::never())
            .connect_timeout(CONNECT)
            .tcp_user_timeout(ANSWER)
            .pool_idle_timeout(Duration::from_secs(30));
        if let Some(ca) = &url.ca {
            let certificates =
                Certificate::from_pem_bundle(&read(ca)?).map_err(|error| bad_file(ca, error))?;
            if certificates.is_empty() {
                let why = format!("{}: there is no certificate in it", ca.display());
                return Err(Error::new(Kind::InvalidInput, why));
            }
            builder = builder.tls_certs_only(certificates);
        }
        if let (Some(cert), Some(key)) = (&url.cert, &url.key) {
            let mut pem = read(cert)?;
            pem.push(b'\n');
            pem.extend(read(key)?);
            let identity = Identity::from_pem(&pem).map_err(|error| bad_file(cert, error))?;
            builder = builder.identity(identity);
        }
        if let Some(token) = token(url)? {
            let mut header = HeaderValue::try_from(format!("Bearer {token}"))
                .map_err(|_| Error::new(Kind::InvalidInput, "the token is no HTTP header"))?;
            header.set_sensitive(true);
            let headers = [(reqwest::header::AUTHORIZATION, header)];
            builder = builder.default_headers(headers.into_iter().collect());
        }
        let http = builder.build().map_err(|error| {
            Error::new(Kind::InvalidInput, "setting up HTTP").caused_by(error.without_url())
        })?;
        Ok(Client {
            http,
            base: url.base.clone(),
        })
    }

    fn url(&self, path: &[&str]) -> Url {
        let mut url = self.base.clone();
        // Every http URL has a path.
        if let Ok(mut segments) = url.path_segments_mut() {
            segments.pop_if_empty().extend(["v1", "pipes"]).extend(path);
        }
        url
    }

    /// A request about `pipe`, or what stands below it.
    pub(super) fn request(
        &self,
        method: Method,
        pipe: &PipeName,
        below: &[&str],
    ) -> RequestBuilder {
        let path: Vec<&str> = [pipe.as_str()]
            .into_iter()
            .chain(below.iter().copied())
            .collect();
        self.http.request(method, self.url(&path))
    }

    pub(super) fn list(&self) -> RequestBuilder {
        self.http.get(self.url(&[]))
    }

    /// Pushes the batch under its identity.
    pub(super) async fn push(
        &self,
        pipe: &PipeName,
        id: PushId,
        batch: &Batch,
    ) -> Result<Position> {
        let messages = batch.messages();
        let mut body = BytesMut::with_capacity(batch.bytes() + 4 * messages.len());
        for message in messages {
            body.put_u32(message.len() as u32);
            body.put_slice(message);
        }
        let patience = ANSWER + Duration::from_secs(body.len() as u64 / SLOWEST);
        let mut request = self
            .request(Method::POST, pipe, &["messages"])
            .header(CONTENT_TYPE, wire::LEN)
            .header(wire::KEY, wire::key(id));
        if !id.repeated {
            request = request.header(wire::ATTEMPT, wire::FIRST);
        }
        let response = self.within(patience, request.body(body.freeze())).await?;
        let pushed: wire::Pushed = parse(response, MOST).await.map_err(Error::maybe_applied)?;
        pushed
            .position
            .ok_or_else(|| not_a_gateway("a push without a position").maybe_applied())
    }

    /// Sends; an answer that is no success is an error.
    pub(super) async fn send(&self, request: RequestBuilder) -> Result<Response> {
        self.within(ANSWER, request).await
    }

    async fn within(&self, patience: Duration, request: RequestBuilder) -> Result<Response> {
        match tokio::time::timeout(patience, request.send()).await {
            Ok(Ok(response)) => checked(response).await,
            Ok(Err(error)) => Err(self.failed(error)),
            Err(_) => {
                let why = format!("{} does not answer within {patience:?}", self.base);
                Err(Error::new(Kind::Unreachable, why).maybe_applied())
            }
        }
    }

    /// Sends, and reads the answer's document.
    pub(super) async fn json<T: DeserializeOwned>(&self, request: RequestBuilder) -> Result<T> {
        let response = self.send(request).await?;
        // What was asked for is done, though it is not known what came of it.
        parse(response, MOST).await.map_err(Error::maybe_applied)
    }

    /// What a failed request means.
    fn failed(&self, error: reqwest::Error) -> Error {
        let connecting = error.is_connect();
        let (kind, context) = match why_in_vain(&error) {
            Some((kind, why)) => (kind, format!("{}: {why}", self.base)),
            None => (Kind::Unreachable, self.base.to_string()),
        };
        let failed = Error::new(kind, context).caused_by(error.without_url());
        match connecting {
            // Nothing was sent.
            true => failed,
            false => failed.maybe_applied(),
        }
    }
}

/// What no further try helps against: the other side is not who it should be, or speaks something else.
fn why_in_vain(error: &reqwest::Error) -> Option<(Kind, &'static str)> {
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        if let Some(tls) = tls_error(error) {
            return match tls {
                rustls::Error::InvalidCertificate(_) => Some((Kind::Denied, "no trust")),
                rustls::Error::AlertReceived(_) => Some((Kind::Denied, "refused by the gateway")),
                rustls::Error::InvalidMessage(_) => Some((Kind::Io, "is this an http port?")),
                _ => None,
            };
        }
        if error.to_string().starts_with("invalid HTTP") {
            return Some((Kind::Io, "is this an https port?"));
        }
        cause = error.source();
    }
    None
}

/// The answer's failure, typed.
async fn checked(response: Response) -> Result<Response> {
    let status = response.status();
    if status.is_success() {
        return Ok(response);
    }
    let typed = response
        .headers()
        .get(CONTENT_TYPE)
        .is_some_and(|value| value == wire::PROBLEM);
    if typed {
        match parse::<wire::Problem>(response, MOST_OF_PROBLEM).await {
            Ok(problem) => {
                if let Some(error) = problem.error() {
                    return Err(translated(error));
                }
            }
            // A gateway's, of which the reason is lost: asked again, it says it whole.
            Err(error) if error.kind() == Kind::Unreachable => {
                return Err(match status {
                    // There was nothing that could have been changed.
                    StatusCode::NOT_FOUND => error,
                    _ => error.maybe_applied(),
                });
            }
            // No gateway's.
            Err(_) => {}
        }
    }
    Err(match status {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
            Error::new(Kind::Denied, format!("the gateway answers {status}"))
        }
        // A proxy speaks for a gateway that it cannot reach, or does not want to be asked so often.
        StatusCode::BAD_GATEWAY
        | StatusCode::SERVICE_UNAVAILABLE
        | StatusCode::GATEWAY_TIMEOUT
        | StatusCode::REQUEST_TIMEOUT
        | StatusCode::TOO_MANY_REQUESTS => {
            Error::new(Kind::Unreachable, format!("the answer is {status}")).maybe_applied()
        }
        StatusCode::PAYLOAD_TOO_LARGE => Error::new(
            Kind::TooLong,
            "the push is larger than what stands before the gateway allows (nginx: client_max_body_size)",
        ),
        _ => not_a_gateway(&format!("it answers {status}")).maybe_applied(),
    })
}

/// What a gateway's failure means on this side, whose deadline counts: the gateway gave up on its store.
pub(super) fn translated(error: Error) -> Error {
    match error.kind() {
        Kind::TimedOut | Kind::Interrupted => {
            Error::new(Kind::Unreachable, error.to_string()).maybe_applied()
        }
        _ => error,
    }
}

/// The next piece of an answer; `None` at its end. reqwest's own limit would count from the start of a request, and end
/// long pushes on slow lines.
///
/// # Errors
/// `Unreachable` where it is cut, or silent for too long. Dropping the future loses nothing.
pub(super) async fn piece(response: &mut Response) -> Result<Option<Bytes>> {
    let cut = || Error::new(Kind::Unreachable, "the answer was cut");
    match tokio::time::timeout(SILENCE, response.chunk()).await {
        Ok(piece) => piece.map_err(|error| cut().caused_by(error.without_url())),
        Err(_) => Err(cut().caused_by(format!("nothing came for {SILENCE:?}"))),
    }
}

/// Reads an answer's document, of at most `most` bytes.
async fn parse<T: DeserializeOwned>(mut response: Response, most: usize) -> Result<T> {
    let mut body = Vec::new();
    while let Some(piece) = piece(&mut response).await? {
        if body.len() + piece.len() > most {
            let why = "the answer is longer than";
            let who = "it is of no dnpipes gateway, or lists too many pipes";
            return Err(Error::new(Kind::Io, format!("{why} {most} bytes: {who}")));
        }
        body.extend_from_slice(&piece);
    }
    serde_json::from_slice(&body).map_err(|error| not_a_gateway(&error.to_string()))
}

fn bad_file(path: &Path, error: reqwest::Error) -> Error {
    Error::new(Kind::InvalidInput, path.display().to_string()).caused_by(error)
}

/// The token: of the environment, of a file that it names, or of the URL.
fn token(url: &HttpUrl) -> Result<Option<String>> {
    Ok(secret::from_environment("DNPIPES_TOKEN")?.or_else(|| url.token.clone()))
}
