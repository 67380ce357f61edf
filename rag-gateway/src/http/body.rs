//! Bounded JSON bodies and query strings, with errors that say what is wrong.

use std::sync::Arc;

use axum::{
    extract::{FromRequest, FromRequestParts, Request},
    http::{StatusCode, header, request::Parts},
};
use serde::de::DeserializeOwned;

use super::{App, Problem};

/// A JSON object of at most `MAX_BODY_BYTES`. A content type other than JSON is refused: a page on
/// another site can make a browser send forms and plain text anywhere, but not JSON.
pub(super) struct Json<T>(pub(super) T);

/// A JSON array, otherwise the same.
pub(super) struct JsonArray<T>(pub(super) Vec<T>);

impl<T: DeserializeOwned> FromRequest<Arc<App>> for Json<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, app: &Arc<App>) -> Result<Self, Problem> {
        read(request, app, b'{').await.map(Self)
    }
}

impl<T: DeserializeOwned> FromRequest<Arc<App>> for JsonArray<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, app: &Arc<App>) -> Result<Self, Problem> {
        read(request, app, b'[').await.map(Self)
    }
}

async fn read<T: DeserializeOwned>(request: Request, app: &App, opening: u8) -> Result<T, Problem> {
    let limit = app.max_body_bytes;
    let too_large = || {
        let detail =
            format!("The body has more than {limit} bytes (MAX_BODY_BYTES). Send fewer documents at a time.");
        Problem::new(StatusCode::PAYLOAD_TOO_LARGE, "body_too_large", detail)
    };
    let unfit = |error: &dyn std::fmt::Display| {
        let detail = format!("The body is JSON, but not what this route takes: {error}. See /openapi.json.");
        Problem::new(StatusCode::UNPROCESSABLE_ENTITY, "invalid_request", detail)
    };
    if let Some(kind) = request.headers().get(header::CONTENT_TYPE)
        && !is_json(kind.as_bytes())
    {
        let detail = "Send JSON, with `content-type: application/json` (curl: `--json` instead of `-d`).";
        return Err(Problem::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type", detail));
    }
    let announced = request
        .headers()
        .get(header::CONTENT_LENGTH)
        .and_then(|value| value.to_str().ok()?.parse::<u64>().ok())
        .unwrap_or_default();
    if announced > limit as u64 {
        return Err(too_large());
    }
    // The limit is the only failure that the caller can still be told about.
    let body = axum::body::to_bytes(request.into_body(), limit).await.map_err(|_| too_large())?;
    // serde takes an array for an object whose fields are in order; we do not.
    let wrong_kind = body.trim_ascii_start().first().is_some_and(|first| *first != opening);
    match serde_json::from_slice::<T>(&body) {
        Ok(_) if wrong_kind => {
            Err(unfit(&if opening == b'{' { "expected an object" } else { "expected an array" }))
        }
        Ok(value) => Ok(value),
        Err(error) if error.is_data() => Err(unfit(&error)),
        Err(error) => {
            let detail = format!("The body is not JSON: {error}.");
            Err(Problem::new(StatusCode::BAD_REQUEST, "invalid_json", detail))
        }
    }
}

/// `application/json` or `application/anything+json`, whatever parameters follow.
fn is_json(kind: &[u8]) -> bool {
    let kind = kind.split(|byte| *byte == b';').next().unwrap_or_default().trim_ascii().to_ascii_lowercase();
    kind == b"application/json" || (kind.starts_with(b"application/") && kind.ends_with(b"+json"))
}

/// A segment of the path.
pub(super) struct Segment(pub(super) String);

impl FromRequestParts<Arc<App>> for Segment {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, app: &Arc<App>) -> Result<Self, Problem> {
        axum::extract::Path::<String>::from_request_parts(parts, app).await.map(|path| Self(path.0)).map_err(
            |error| {
                let detail = format!("The path: {}.", error.body_text());
                Problem::new(StatusCode::BAD_REQUEST, "invalid_path", detail)
            },
        )
    }
}

/// A query string.
pub(super) struct Query<T>(pub(super) T);

impl<T: DeserializeOwned> FromRequestParts<Arc<App>> for Query<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, app: &Arc<App>) -> Result<Self, Problem> {
        axum::extract::Query::<T>::from_request_parts(parts, app).await.map(|query| Self(query.0)).map_err(
            |error| {
                Problem::new(
                    StatusCode::UNPROCESSABLE_ENTITY,
                    "invalid_request",
                    format!("The query string: {}.", error.body_text()),
                )
            },
        )
    }
}
