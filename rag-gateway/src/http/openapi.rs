//! The API document, generated from the types and from what stands above each handler.
//!
//! `docs/openapi.json` is a copy of it for readers and generators; a test keeps them equal.

use std::sync::LazyLock;

use axum::{http::header, response::IntoResponse};
use serde_json::Value;
use utoipa::{
    Modify, OpenApi,
    openapi::{
        Content, Ref, ResponseBuilder,
        security::{ApiKey, ApiKeyValue, HttpAuthScheme, HttpBuilder, SecurityScheme},
    },
};

use super::{
    collections,
    handlers::{self, MAX_DOCUMENTS, PROBLEM},
};

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
    modifiers(&Keys, &CommonErrors),
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

/// What any route may answer, because of a layer around it or of a dependency behind it.
const COMMON: [(&str, &str); 7] = [
    ("401", "`unauthorized`: no key, or one that nobody has."),
    ("422", "`invalid_request`: what is wrong is said with the field's name."),
    ("429", "`rate_limited`, `budget_exhausted` or `too_many_jobs`; see `Retry-After`."),
    ("500", "`internal_error`: a fault of the gateway; its log has the request's id."),
    ("502", "A dependency refused what the gateway asked of it."),
    ("503", "`overloaded` or `upstream_unavailable`; see `Retry-After`."),
    ("504", "`timeout`: not done within GATEWAY_TIMEOUT_SECONDS."),
];

/// What a route with a body may answer besides.
const WITH_BODY: [(&str, &str); 3] = [
    ("400", "`invalid_json`: the body is not JSON."),
    ("413", "`body_too_large`: larger than MAX_BODY_BYTES."),
    ("415", "`unsupported_media_type`: send `application/json`."),
];

/// Says of every route what it may answer, where the route does not say it better.
struct CommonErrors;

impl Modify for CommonErrors {
    fn modify(&self, api: &mut utoipa::openapi::OpenApi) {
        for item in api.paths.paths.values_mut() {
            let operations = [&mut item.get, &mut item.put, &mut item.post, &mut item.delete];
            for operation in operations.into_iter().flatten() {
                let with_body = WITH_BODY.iter().filter(|_| operation.request_body.is_some());
                for (status, description) in COMMON.iter().chain(with_body) {
                    let response = ResponseBuilder::new()
                        .description(*description)
                        .content(PROBLEM, Content::new(Some(Ref::from_schema_name("Problem"))))
                        .build();
                    let responses = &mut operation.responses.responses;
                    responses.entry((*status).to_owned()).or_insert_with(|| response.into());
                }
            }
        }
    }
}

/// A collection, or a generation of one.
const COLLECTION: &str = r"^[A-Za-z0-9_-][A-Za-z0-9._-]*(@[1-9][0-9]{0,17})?$";

/// No control characters.
const PRINTABLE: &str = r"^[^\x00-\x1f\x7f-\x9f]*$";

/// What holds of the items of a list and of a body that is one: attributes have no word for it.
fn bounds() -> [(&'static str, &'static str, Value); 6] {
    let batch = "/paths/~1v1~1embed_batch/post/requestBody/content/application~1json/schema";
    let documents = "/components/schemas/PutDocuments/properties/documents";
    let sources = "/components/schemas/DeleteDocuments/properties/sources";
    [
        ("/components/schemas/QueryChatRequest/properties/collections/items", "pattern", COLLECTION.into()),
        ("/components/schemas/DeleteDocuments/properties/sources/items", "pattern", PRINTABLE.into()),
        (sources, "maxItems", MAX_DOCUMENTS.into()),
        (documents, "maxItems", MAX_DOCUMENTS.into()),
        (batch, "minItems", 1.into()),
        (batch, "maxItems", MAX_DOCUMENTS.into()),
    ]
}

static DOCUMENT: LazyLock<String> = LazyLock::new(|| {
    // Generated from types that serialise: it cannot fail, and a test reads it.
    let mut document = serde_json::to_value(Api::openapi()).unwrap_or_default();
    for (place, keyword, value) in bounds() {
        if let Some(Value::Object(schema)) = document.pointer_mut(place) {
            schema.insert(keyword.to_owned(), value);
        }
    }
    let mut text = serde_json::to_string_pretty(&document).unwrap_or_default();
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

    use regex::Regex;

    use super::*;
    use crate::{index::names, search::check_collection_name};

    #[test]
    fn the_committed_document_is_the_generated_one() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/openapi.json");
        if std::env::var_os("UPDATE_OPENAPI").is_some() {
            fs::write(&path, &*DOCUMENT).unwrap_or_else(|error| unreachable!("{error}"));
        }
        let committed = fs::read_to_string(&path).unwrap_or_default();
        assert!(
            committed == *DOCUMENT,
            "docs/openapi.json is out of date: UPDATE_OPENAPI=1 cargo test --workspace --lib openapi"
        );
    }

    /// The pattern stands in many attributes, which take nothing but a literal.
    #[test]
    fn the_pattern_of_a_collection_is_what_is_accepted() {
        let document: serde_json::Value = serde_json::from_str(&DOCUMENT).unwrap_or_default();
        let mut names = vec![String::new()];
        for length in 0..4 {
            let longer: Vec<String> = names
                .iter()
                .filter(|name| name.chars().count() == length)
                .flat_map(|name| "aZ01._-@/ é".chars().map(move |next| format!("{name}{next}")))
                .collect();
            names.extend(longer);
        }
        let agrees = |place: &str, schema: &Value, accepts: &dyn Fn(&str) -> bool| {
            let pattern = schema["pattern"].as_str().and_then(|text| Regex::new(text).ok());
            let pattern = pattern.unwrap_or_else(|| unreachable!("{place}: {schema}"));
            for name in &names {
                assert_eq!(pattern.is_match(name), accepts(name), "{place}: {name:?}");
            }
        };
        let accepted = |name: &str| check_collection_name(name).is_ok();
        let schemas = &document["components"]["schemas"];
        for request in ["QueryChatRequest", "PutDocuments", "DeleteDocuments", "IndexRepository"] {
            agrees(request, &schemas[request]["properties"]["collection"], &accepted);
        }
        let several = &schemas["QueryChatRequest"]["properties"]["collections"]["items"];
        agrees("collections", several, &accepted);
        let generation = &schemas["UseGeneration"]["properties"]["generation"];
        agrees("generation", generation, &|name| accepted(name) && names::parse(name).is_some());
        for (path, method, accepts) in [
            ("/v1/collections/{name}", "delete", &accepted as &dyn Fn(&str) -> bool),
            ("/v1/collections/{name}/rebuild", "post", &|name| accepted(name) && !name.contains('@')),
            ("/v1/collections/{name}/generation", "put", &|name| accepted(name) && !name.contains('@')),
            ("/v1/embed_batch", "post", &accepted),
            ("/v1/documents", "get", &accepted),
        ] {
            agrees(path, &document["paths"][path][method]["parameters"][0]["schema"], accepts);
        }
    }

    #[test]
    fn bounds_that_no_attribute_states_are_stated() {
        let document: Value = serde_json::from_str(&DOCUMENT).unwrap_or_default();
        for (place, keyword, value) in bounds() {
            let stated = document.pointer(place).map(|schema| &schema[keyword]);
            assert_eq!(stated, Some(&value), "{place}");
        }
    }

    #[test]
    fn the_pattern_of_printable_names_is_what_is_accepted() {
        let pattern = Regex::new(PRINTABLE).unwrap_or_else(|error| unreachable!("{error}"));
        for letter in (0..0x300).filter_map(char::from_u32) {
            assert_eq!(pattern.is_match(&letter.to_string()), !letter.is_control(), "{letter:?}");
        }
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
        for (path, method, status) in [
            ("/v1/query_chat", "post", "415"),
            ("/v1/jobs/{id}", "get", "429"),
            ("/v1/documents", "delete", "422"),
        ] {
            let response = &document["paths"][path][method]["responses"][status];
            assert!(response["content"][PROBLEM]["schema"].is_object(), "{status} of {method} {path}");
        }
        assert!(document["components"]["schemas"]["Passage"]["properties"]["start_line"].is_object());
    }
}
