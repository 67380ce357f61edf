//! `/docs`: the API document as a page to try it on. Everything it needs is in the binary, and its
//! content security policy keeps it from asking anybody else.

use std::sync::{Arc, LazyLock};

use axum::{
    extract::{Path, rejection::PathRejection},
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::{IntoResponse as _, Redirect, Response},
};
use utoipa_swagger_ui::Config;

use super::Problem;

/// Scripts, styles and calls of this gateway only; the page's own icons are data URLs.
const POLICY: &str = "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'";

static CONFIG: LazyLock<Arc<Config<'static>>> =
    LazyLock::new(|| Arc::new(Config::from("../openapi.json").validator_url("none")));

/// `GET /docs`: its files are relative to `/docs/`.
pub(super) async fn page() -> Redirect {
    // Relative, so that it also works behind a proxy that puts a prefix in front.
    Redirect::permanent("docs/")
}

/// `GET /docs/…`.
pub(super) async fn file(path: Result<Path<String>, PathRejection>) -> Response {
    let Ok(Path(path)) = path else { return missing() };
    send(&path)
}

/// `GET /docs/`.
pub(super) async fn index() -> Response {
    send("index.html")
}

fn send(path: &str) -> Response {
    let file = match utoipa_swagger_ui::serve(path, Arc::clone(&CONFIG)) {
        Ok(Some(file)) => file,
        Ok(None) => return missing(),
        Err(error) => {
            tracing::error!(error = %error, error_code = "internal_error", path, "the API page was not made");
            return Problem::internal().into_response();
        }
    };
    let mut headers = HeaderMap::new();
    if let Ok(kind) = HeaderValue::from_str(&file.content_type) {
        headers.insert(header::CONTENT_TYPE, kind);
    }
    if file.gzpipped {
        headers.insert(header::CONTENT_ENCODING, HeaderValue::from_static("gzip"));
    }
    headers.insert(header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    (headers, file.bytes.into_owned()).into_response()
}

fn missing() -> Response {
    Problem::new(StatusCode::NOT_FOUND, "not_found", "There is no such file; the page is at /docs/.")
        .into_response()
}
