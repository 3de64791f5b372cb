//! Errors as documents (RFC 9457), the only place that knows their status codes.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};

use crate::backend::http::wire::{PROBLEM, Problem};
use crate::error::{Applied, Error, Kind};
use crate::metrics;

/// A request that failed.
pub(super) struct Failed {
    status: StatusCode,
    error: Error,
    /// Messages that are stored all the same.
    stored: Option<u64>,
}

impl Failed {
    /// A failure with a status of its own.
    pub(super) fn with(status: StatusCode, error: Error) -> Self {
        let stored = match error.applied() {
            Applied::Part(messages) => Some(messages as u64),
            Applied::No | Applied::Unknown => None,
        };
        Failed {
            status,
            error,
            stored,
        }
    }

    /// Some of a streamed push was stored.
    pub(super) fn after(error: Error, stored: u64) -> Self {
        Failed::from(error).having_stored(stored)
    }

    /// So many messages of a streamed push were stored before.
    pub(super) fn having_stored(self, stored: u64) -> Self {
        Failed {
            stored: Some(stored.saturating_add(self.stored.unwrap_or(0))),
            ..self
        }
    }
}

impl From<Error> for Failed {
    fn from(error: Error) -> Self {
        Failed::with(status(error.kind()), error)
    }
}

fn status(kind: Kind) -> StatusCode {
    match kind {
        Kind::InvalidName | Kind::InvalidSelector | Kind::InvalidInput => StatusCode::BAD_REQUEST,
        Kind::NotFound => StatusCode::NOT_FOUND,
        Kind::AlreadyExists | Kind::Interrupted | Kind::WouldBlock => StatusCode::CONFLICT,
        Kind::TooLong => StatusCode::PAYLOAD_TOO_LARGE,
        Kind::Full => StatusCode::INSUFFICIENT_STORAGE,
        Kind::Denied | Kind::NotAllowed | Kind::ReadOnly => StatusCode::FORBIDDEN,
        Kind::Unsupported => StatusCode::NOT_IMPLEMENTED,
        Kind::Unreachable => StatusCode::SERVICE_UNAVAILABLE,
        Kind::TimedOut => StatusCode::GATEWAY_TIMEOUT,
        Kind::Damaged | Kind::Io => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

/// The document for an error.
pub(super) fn document(error: &Error) -> Vec<u8> {
    // Strings and numbers always become JSON.
    serde_json::to_vec(&Problem::new(error, status(error.kind()).as_u16())).unwrap_or_default()
}

impl IntoResponse for Failed {
    fn into_response(self) -> Response {
        let Failed {
            status,
            error,
            stored,
        } = self;
        if status.is_server_error() {
            metrics::FAILED.add(1);
            log::warn!("answering {}: {error}", status.as_u16());
        } else {
            metrics::REFUSED.add(1);
            log::debug!("answering {}: {error}", status.as_u16());
        }
        let problem = Problem {
            stored,
            ..Problem::new(&error, status.as_u16())
        };
        let mut body = serde_json::to_vec(&problem).unwrap_or_default();
        body.push(b'\n');
        let mut response = (status, body).into_response();
        response
            .headers_mut()
            .insert(header::CONTENT_TYPE, HeaderValue::from_static(PROBLEM));
        response
    }
}
