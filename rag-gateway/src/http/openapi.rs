//! The API document, generated from the types and from what stands above each handler.
//!
//! `docs/openapi.json` is a copy of it for readers and generators; a test keeps them equal.

use std::sync::LazyLock;

use axum::{http::header, response::IntoResponse};
use utoipa::{
    Modify, OpenApi,
    openapi::security::{ApiKey, ApiKeyValue, HttpAuthScheme, HttpBuilder, SecurityScheme},
};

use super::{collections, handlers};

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Atlas RAG gateway",
        description = "Indexes documents and finds their passages: hybrid search with exact file and line references.\n\nEvery error is an `application/problem+json` (RFC 9457) whose `type` is a stable code and whose `detail` says what happened, why, and what to do. Errors that any route may give: 400 `invalid_json`, 401 `unauthorized`, 403 `forbidden` (a key that belongs to a tenant), 413 `body_too_large`, 415 `unsupported_media_type`, 422 `invalid_request`, 429 `rate_limited` and 503 `overloaded` (both with `Retry-After`), 504 `timeout`. Every answer carries `X-Request-Id`.",
        license(name = "Apache-2.0", identifier = "Apache-2.0")
    ),
    paths(
        handlers::query_chat,
        handlers::embed_batch,
        handlers::job,
        handlers::put_documents,
        handlers::delete_documents,
        handlers::list_documents,
        handlers::collections,
        collections::index_repository,
        collections::rebuild,
        collections::use_generation,
        collections::drop_collection,
        handlers::clear_cache,
    ),
    components(schemas(atlas_shared::gateway_api::Problem)),
    modifiers(&Keys),
    security(("bearer" = []), ("key" = []), ()),
    tags(
        (name = "search", description = "Find passages."),
        (name = "index", description = "Put documents in and out."),
        (name = "admin", description = "Operate the gateway."),
    )
)]
struct Api;

/// How callers show their key.
struct Keys;

impl Modify for Keys {
    fn modify(&self, api: &mut utoipa::openapi::OpenApi) {
        let components = api.components.get_or_insert_default();
        let bearer = HttpBuilder::new().scheme(HttpAuthScheme::Bearer).build();
        components.add_security_scheme("bearer", SecurityScheme::Http(bearer));
        let key = ApiKey::Header(ApiKeyValue::new("X-API-Key"));
        components.add_security_scheme("key", SecurityScheme::ApiKey(key));
    }
}

static DOCUMENT: LazyLock<String> = LazyLock::new(|| {
    // Generated from types that serialise: it cannot fail, and a test reads it.
    let mut text = Api::openapi().to_pretty_json().unwrap_or_default();
    text.push('\n');
    text
});

/// `GET /openapi.json`.
pub(super) async fn document() -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "application/json")], DOCUMENT.as_str())
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use super::*;

    #[test]
    fn the_committed_document_is_the_generated_one() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/openapi.json");
        if std::env::var_os("UPDATE_OPENAPI").is_some() {
            fs::write(&path, &*DOCUMENT).unwrap_or_else(|error| unreachable!("{error}"));
        }
        let committed = fs::read_to_string(&path).unwrap_or_default();
        assert!(
            committed == *DOCUMENT,
            "docs/openapi.json is out of date: UPDATE_OPENAPI=1 cargo test -p atlas-rag-gateway openapi"
        );
    }

    #[test]
    fn every_route_is_described() {
        let document: serde_json::Value = serde_json::from_str(&DOCUMENT).unwrap_or_default();
        for (path, method) in [
            ("/v1/query_chat", "post"),
            ("/v1/embed_batch", "post"),
            ("/v1/jobs/{id}", "get"),
            ("/v1/documents", "put"),
            ("/v1/documents", "delete"),
            ("/v1/documents", "get"),
            ("/v1/index", "post"),
            ("/v1/collections", "get"),
            ("/v1/collections/{name}", "delete"),
            ("/v1/collections/{name}/rebuild", "post"),
            ("/v1/collections/{name}/generation", "put"),
            ("/v1/admin/cache/clear", "post"),
        ] {
            assert!(document["paths"][path][method].is_object(), "{method} {path}");
        }
        assert!(document["components"]["schemas"]["Passage"]["properties"]["start_line"].is_object());
    }
}
