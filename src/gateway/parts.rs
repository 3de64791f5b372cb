//! What requests are taken apart into, and answers made of.

use axum::extract::rejection::{PathRejection, QueryRejection};
use axum::extract::{FromRequestParts, Path, Query};
use axum::http::header;
use axum::http::request::Parts;
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::access::{Grant, Right};
use super::problem::Failed;
use crate::error::{Error, Kind, Result};
use crate::name::PipeName;

/// The pipe that a path names, and what the caller may do.
pub(super) struct Pipe {
    pub(super) name: PipeName,
    grant: Grant,
}

impl Pipe {
    /// Lets the caller do it, or not.
    ///
    /// # Errors
    /// `Denied`.
    pub(super) fn check(&self, right: Right) -> Result<()> {
        self.grant.check(right, &self.name)
    }
}

impl<S: Send + Sync> FromRequestParts<S> for Pipe {
    type Rejection = Failed;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Failed> {
        let refuse = |why: PathRejection| Error::new(Kind::InvalidName, why.body_text());
        let Path(name) = Path::<String>::from_request_parts(parts, state)
            .await
            .map_err(refuse)?;
        let grant = parts.extensions.get::<Grant>().cloned();
        Ok(Pipe {
            name: PipeName::new(&name)?,
            grant: grant.ok_or_else(|| Error::new(Kind::Denied, "nobody has let this in"))?,
        })
    }
}

/// An answer in JSON, a line for people too.
pub(super) struct Document<T>(pub(super) T);

impl<T: Serialize> IntoResponse for Document<T> {
    fn into_response(self) -> Response {
        match serde_json::to_vec(&self.0) {
            Ok(mut body) => {
                body.push(b'\n');
                ([(header::CONTENT_TYPE, "application/json")], body).into_response()
            }
            Err(error) => {
                let error = Error::new(Kind::Io, "writing JSON").caused_by(error);
                Failed::from(error).into_response()
            }
        }
    }
}

/// A query's parameters; unknown ones are refused.
pub(super) struct Parameters<T>(pub(super) T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for Parameters<T> {
    type Rejection = Failed;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Failed> {
        let refuse = |why: QueryRejection| Error::new(Kind::InvalidInput, why.body_text());
        let Query(value) = Query::<T>::from_request_parts(parts, state)
            .await
            .map_err(refuse)?;
        Ok(Parameters(value))
    }
}
