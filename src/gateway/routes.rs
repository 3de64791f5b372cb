//! The paths, and the answers that are not streams.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::{get, post};
use axum::{Extension, Router, middleware};
use serde::Deserialize;

use super::access::{Grant, Right, admit};
use super::parts::{Document, Parameters, Pipe};
use super::problem::Failed;
use super::{Gateway, pull, push};
use crate::backend::http::wire;
use crate::backend::{Fut, Limit, Start};
use crate::error::{Error, Kind, Result};
use crate::message::Position;
use crate::metrics;
use crate::name::PipeName;

/// What [`router`] answers, for programs: OpenAPI 3.1.
const OPENAPI: &str = include_str!("openapi.json");

/// How long the backend may take to show that it lives.
const HEALTHY: Duration = Duration::from_secs(2);

pub(super) fn router(gateway: Arc<Gateway>) -> Router {
    Router::new()
        .route("/v1/pipes", get(list))
        .route("/v1/pipes/{pipe}", get(stat).put(create).delete(remove))
        .route(
            "/v1/pipes/{pipe}/messages",
            get(pull::pull)
                .post(push::push)
                .put(push::push)
                .delete(reset),
        )
        .route("/v1/pipes/{pipe}/bounds", get(bounds))
        .route("/v1/pipes/{pipe}/sync", post(sync))
        .route("/healthz", get(health))
        .route("/metrics", get(show_metrics))
        .route("/openapi.json", get(openapi))
        .fallback(nowhere)
        .method_not_allowed_fallback(not_so)
        .layer(middleware::from_fn_with_state(Arc::clone(&gateway), admit))
        .with_state(gateway)
}

async fn nowhere() -> Failed {
    let why = "there is nothing at this path; /openapi.json says what there is";
    Error::new(Kind::NotFound, why).into()
}

async fn not_so() -> Failed {
    let error = Error::new(Kind::NotAllowed, "this path has no such method");
    Failed::with(StatusCode::METHOD_NOT_ALLOWED, error)
}

async fn list(
    State(gateway): State<Arc<Gateway>>,
    Extension(grant): Extension<Grant>,
) -> Result<Document<Vec<wire::Pipe>>, Failed> {
    let pipes = gateway.backend.list().await?;
    let seen = pipes.iter().filter(|(name, _)| grant.sees(name));
    Ok(Document(
        seen.map(|(name, info)| wire::Pipe::new(name, info))
            .collect(),
    ))
}

async fn stat(
    State(gateway): State<Arc<Gateway>>,
    pipe: Pipe,
) -> Result<Document<wire::Pipe>, Failed> {
    pipe.check(Right::Look)?;
    let info = gateway.backend.stat(&pipe.name).await?;
    Ok(Document(wire::Pipe::new(&pipe.name, &info)))
}

async fn create(State(gateway): State<Arc<Gateway>>, pipe: Pipe) -> Result<StatusCode, Failed> {
    pipe.check(Right::Push)?;
    match gateway.backend.create(&pipe.name).await {
        Ok(true) => Ok(StatusCode::CREATED),
        Ok(false) => Ok(StatusCode::NO_CONTENT),
        Err(error) if error.kind() == Kind::AlreadyExists => Ok(StatusCode::NO_CONTENT),
        Err(error) => Err(error.into()),
    }
}

async fn remove(
    State(gateway): State<Arc<Gateway>>,
    pipe: Pipe,
) -> Result<Document<wire::Dropped>, Failed> {
    pipe.check(Right::Drop)?;
    let remove = gateway.backend.remove(&pipe.name);
    gateway.dropped(&pipe.name, remove).await
}

async fn reset(
    State(gateway): State<Arc<Gateway>>,
    pipe: Pipe,
) -> Result<Document<wire::Dropped>, Failed> {
    pipe.check(Right::Drop)?;
    let reset = gateway.backend.reset(&pipe.name);
    gateway.dropped(&pipe.name, reset).await
}

impl Gateway {
    /// Has messages dropped by `drop`, tells who follows, and says to who drops them up to where.
    async fn dropped(
        &self,
        pipe: &PipeName,
        drop: Fut<'_, ()>,
    ) -> Result<Document<wire::Dropped>, Failed> {
        // A backend that learns of floors from a server knows those of the pipes that somebody reads.
        let source = self.backend.subscribe(pipe, Start::Oldest).await?;
        drop.await?;
        metrics::RESETS.add(1);
        self.resets.send_modify(|count| *count += 1);
        Ok(Document(wire::Dropped {
            floor: source.floor().position(),
        }))
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Range {
    after: Option<String>,
    before: Option<String>,
}

async fn bounds(
    State(gateway): State<Arc<Gateway>>,
    pipe: Pipe,
    Parameters(range): Parameters<Range>,
) -> Result<Document<wire::Bounds>, Failed> {
    pipe.check(Right::Look)?;
    let position = |text: Option<&str>| text.map(str::parse::<Position>).transpose();
    let start = match position(range.after.as_deref())? {
        Some(after) => Start::After(after),
        None => Start::Oldest,
    };
    let mut source = gateway.backend.subscribe(&pipe.name, start).await?;
    let more = match position(range.before.as_deref())? {
        None => false,
        before => {
            let one = Limit {
                max_bytes: 1,
                before,
            };
            !source.next(one).await?.is_empty()
        }
    };
    Ok(Document(wire::Bounds {
        end: source.end().await?,
        floor: source.floor().position(),
        more,
    }))
}

async fn sync(State(gateway): State<Arc<Gateway>>, pipe: Pipe) -> Result<StatusCode, Failed> {
    pipe.check(Right::Push)?;
    gateway.backend.sync(&pipe.name).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn health(State(gateway): State<Arc<Gateway>>) -> Result<&'static str, Failed> {
    let any = PipeName::new("healthz")?;
    match tokio::time::timeout(HEALTHY, gateway.backend.stat(&any)).await {
        Ok(Ok(_)) => Ok("ok\n"),
        Ok(Err(error)) if error.kind() == Kind::NotFound => Ok("ok\n"),
        Ok(Err(error)) => Err(Failed::with(StatusCode::SERVICE_UNAVAILABLE, error)),
        Err(_) => Err(Error::new(Kind::Unreachable, "the backend does not answer").into()),
    }
}

async fn show_metrics(Extension(grant): Extension<Grant>) -> Result<impl IntoResponse, Failed> {
    grant.check_all()?;
    let headers = [(header::CONTENT_TYPE, "text/plain; version=0.0.4")];
    Ok((headers, metrics::text()))
}

async fn openapi() -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "application/json")], OPENAPI)
}
