//! A gateway of given passages, over HTTP, and what else every stack needs.

use std::{future::Future, net::SocketAddr, sync::Arc, time::Duration};

use atlas_shared::gateway_api::{Passage, QueryChatRequest};
use axum::{Json, Router, extract::State, routing::post};
use serde_json::json;

/// Nothing here takes this long; a test that does has failed.
pub(crate) const BOUND: Duration = Duration::from_secs(120);

/// Finds passages for a query.
pub(crate) type Search = Arc<dyn Fn(&QueryChatRequest) -> Vec<Passage> + Send + Sync>;

/// The same two passages whatever is asked.
pub(crate) fn two_passages(request: &QueryChatRequest) -> Vec<Passage> {
    let collection = request.collection.clone().unwrap_or_default();
    let passage = |source, start, text| Passage::of_lines(&collection, source, start, text);
    vec![
        passage(
            "docs/queue.md",
            3,
            "The event bus is Google Pub/Sub, because the team runs on Google Cloud.\nEvery topic has a dead-letter topic.",
        ),
        passage(
            "docs/store.md",
            10,
            "Results are stored in Postgres.\nWrites go through SQL functions, so that each is one transaction.",
        ),
    ]
}

/// A gateway that finds what `search` finds.
pub(crate) async fn gateway(search: Search) -> SocketAddr {
    async fn query(
        State(search): State<Search>,
        Json(request): Json<QueryChatRequest>,
    ) -> Json<Vec<Passage>> {
        Json(search(&request))
    }
    let app = Router::new()
        .route("/v1/query_chat", post(query))
        .route("/health/ready", axum::routing::get(|| async { Json(json!({"status": "ready"})) }))
        .with_state(search);
    serve(app).await
}

/// Serves on a free port for as long as the runtime lives.
pub(crate) async fn serve(app: Router) -> SocketAddr {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
    addr
}

pub(crate) async fn bounded<T>(what: &str, work: impl Future<Output = T>) -> T {
    tokio::time::timeout(BOUND, work).await.unwrap_or_else(|_| panic!("waited {BOUND:?} for {what}"))
}
