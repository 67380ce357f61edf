//! The HTTP API: routes, and the layers that every request passes.
//!
//! From the outside in: request id and log line → panics become 500 → key → rate limit → concurrency
//! → time. Probes, metrics, the API document and its page pass none of the last four. Handlers are thin: they
//! read, call, and answer; every failure is an `application/problem+json`.

use std::{sync::Arc, time::Duration};

use atlas_shared::{config::GatewayConfig, ops};
use axum::{
    Router,
    extract::DefaultBodyLimit,
    middleware,
    routing::{get, post},
};
use tokio::sync::Semaphore;
use tower_http::catch_panic::CatchPanicLayer;

use crate::{
    index::VectorIndex, indexing::Indexer, jobs::Jobs, metrics::Metrics, repository::Sources,
    search::Searcher,
};

mod auth;
mod body;
mod collections;
mod docs;
mod handlers;
mod layers;
mod openapi;
mod problem;
mod visible;

use auth::Keys;
use layers::RateLimit;
use problem::Problem;
use visible::Visible;

/// What handlers and layers share.
pub(crate) struct App {
    pub(crate) index: Arc<dyn VectorIndex>,
    pub(crate) searcher: Arc<Searcher>,
    pub(crate) indexer: Arc<Indexer>,
    pub(crate) jobs: Jobs,
    pub(crate) sources: Arc<Sources>,
    pub(crate) metrics: Metrics,
    pub(crate) default_collection: String,
    keys: Keys,
    visible: Visible,
    rate_limit: RateLimit,
    slots: Semaphore,
    /// Writes that clients wait for; like jobs, at most `MAX_INDEX_JOBS`.
    write_slots: Arc<Semaphore>,
    max_writes: usize,
    timeout: Duration,
    max_body_bytes: usize,
}

impl App {
    #[expect(clippy::too_many_arguments, reason = "the parts of a gateway, put together in one place")]
    pub(crate) fn new(
        config: &GatewayConfig,
        default_collection: String,
        index: Arc<dyn VectorIndex>,
        searcher: Arc<Searcher>,
        indexer: Arc<Indexer>,
        jobs: Jobs,
        sources: Arc<Sources>,
        metrics: Metrics,
    ) -> Self {
        Self {
            index,
            searcher,
            indexer,
            jobs,
            sources,
            metrics,
            default_collection,
            keys: Keys::new(&config.api_keys),
            visible: Visible::new(),
            rate_limit: RateLimit::new(config.rate_limit_requests, config.rate_limit_window),
            slots: Semaphore::new(config.max_concurrency),
            write_slots: Arc::new(Semaphore::new(config.max_index_jobs)),
            max_writes: config.max_index_jobs,
            timeout: config.timeout,
            max_body_bytes: config.max_body_bytes,
        }
    }
}

/// The whole API.
pub(crate) fn router(app: Arc<App>, checks: ops::Checks) -> Router {
    let registry = app.metrics.registry.clone();
    let api = Router::new()
        .route("/v1/query_chat", post(handlers::query_chat))
        .route("/v1/embed_batch", post(handlers::embed_batch))
        .route("/v1/jobs/{id}", get(handlers::job))
        .route(
            "/v1/documents",
            get(handlers::list_documents).put(handlers::put_documents).delete(handlers::delete_documents),
        )
        .route("/v1/index", post(collections::index_repository))
        .route("/v1/collections", get(handlers::collections))
        .route("/v1/collections/{name}", axum::routing::delete(collections::drop_collection))
        .route("/v1/collections/{name}/rebuild", post(collections::rebuild))
        .route("/v1/collections/{name}/generation", axum::routing::put(collections::use_generation))
        .route("/v1/admin/cache/clear", post(handlers::clear_cache))
        .route_layer(middleware::from_fn_with_state(Arc::clone(&app), layers::limit_time))
        .route_layer(middleware::from_fn_with_state(Arc::clone(&app), layers::limit_concurrency))
        .route_layer(middleware::from_fn_with_state(Arc::clone(&app), layers::limit_rate))
        .route_layer(middleware::from_fn_with_state(Arc::clone(&app), auth::authenticate))
        // Bodies are bounded where they are read, with an answer of ours.
        .layer(DefaultBodyLimit::disable())
        .with_state(Arc::clone(&app));
    api.merge(ops::router(checks, registry))
        .route("/openapi.json", get(openapi::document))
        .route("/docs", get(docs::page))
        .route("/docs/", get(docs::index))
        .route("/docs/{*file}", get(docs::file))
        .fallback(layers::no_such_route)
        .method_not_allowed_fallback(layers::no_such_method)
        .layer(CatchPanicLayer::custom(layers::panicked))
        .layer(middleware::from_fn_with_state(app, layers::observe))
}
