//! One function a route.

use std::sync::Arc;

use atlas_shared::gateway_api::{
    self, CollectionInfo, DEGRADED_HEADER, DeleteDocuments, DeleteDocumentsResult, Document, DocumentList,
    EmbedItem, JobCreated, JobStatus, Passage, PutDocuments, PutDocumentsResult, QueryChatRequest,
    content_hash,
};
use axum::{
    Json as Answer,
    extract::{Path, State},
    http::StatusCode,
    response::{IntoResponse as _, Response},
};
use serde::Deserialize;

use super::{
    App, Problem,
    body::{Json, JsonArray, Query},
};
use crate::{error::GatewayError, search::check_collection_name};

/// The content type of errors.
const PROBLEM: &str = "application/problem+json";

/// Documents in one request.
const MAX_DOCUMENTS: usize = 10_000;

/// The query string of routes that have no body, or an array as a body.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Scope {
    collection: Option<String>,
    repo: Option<String>,
}

/// Finds passages.
///
/// Hybrid search: BM25 and, where the collection has embeddings, cosine. Equal queries get equal answers.
#[utoipa::path(
    post,
    path = "/v1/query_chat",
    tag = "search",
    request_body = QueryChatRequest,
    responses(
        (status = 200, description = "Passages, best first. `X-Atlas-Degraded` says how the answer is less than it could be (`lexical`).", body = Vec<Passage>),
        (status = 404, description = "`unknown_collection`", body = gateway_api::Problem, content_type = PROBLEM),
        (status = 409, description = "`embedding_mismatch`: the collection was built with another embedding model.", body = gateway_api::Problem, content_type = PROBLEM),
        (status = 503, description = "`upstream_unavailable`: the index does not answer; see `Retry-After`.", body = gateway_api::Problem, content_type = PROBLEM),
    )
)]
pub(super) async fn query_chat(
    State(app): State<Arc<App>>,
    Json(request): Json<QueryChatRequest>,
) -> Result<Response, Problem> {
    let answer = app.searcher.query(request).await?;
    let mut response = Answer(&*answer.passages).into_response();
    if let Some(reason) = answer.degraded {
        response.headers_mut().insert(DEGRADED_HEADER, axum::http::HeaderValue::from_static(reason));
    }
    Ok(response)
}

/// Indexes in the background.
///
/// Texts, or documents with a name. A text is named by its hash. Ask `/v1/jobs/{id}` how it goes.
#[utoipa::path(
    post,
    path = "/v1/embed_batch",
    tag = "index",
    params(("collection" = Option<String>, Query, description = "Which collection; the default when missing.")),
    request_body = Vec<EmbedItem>,
    responses(
        (status = 202, description = "Queued.", body = JobCreated),
        (status = 429, description = "`too_many_jobs`; see `Retry-After`.", body = gateway_api::Problem, content_type = PROBLEM),
    )
)]
pub(super) async fn embed_batch(
    State(app): State<Arc<App>>,
    Query(scope): Query<Scope>,
    JsonArray(items): JsonArray<EmbedItem>,
) -> Result<(StatusCode, Answer<JobCreated>), Problem> {
    let collection = collection(&app, scope.collection)?;
    let documents: Vec<Document> = items.into_iter().map(named).collect();
    check_count(documents.len())?;
    let job_id = app.jobs.submit(collection, documents)?;
    Ok((StatusCode::ACCEPTED, Answer(JobCreated { job_id })))
}

/// Where an index job is.
#[utoipa::path(
    get,
    path = "/v1/jobs/{id}",
    tag = "index",
    params(("id" = String, Path, description = "From `POST /v1/embed_batch`.")),
    responses(
        (status = 200, description = "Where the job is.", body = JobStatus),
        (status = 404, description = "`unknown_job`", body = gateway_api::Problem, content_type = PROBLEM),
    )
)]
pub(super) async fn job(
    State(app): State<Arc<App>>,
    Path(id): Path<String>,
) -> Result<Answer<JobStatus>, Problem> {
    Ok(Answer(app.jobs.status(&id)?))
}

/// Indexes documents.
///
/// Idempotent by tenant, repository, source and content hash: unchanged documents cost no embedding and no write.
#[utoipa::path(
    put,
    path = "/v1/documents",
    tag = "index",
    request_body = PutDocuments,
    responses(
        (status = 200, description = "One result a document, in order. What is `indexed` is searchable now.", body = PutDocumentsResult),
        (status = 409, description = "`embedding_mismatch`", body = gateway_api::Problem, content_type = PROBLEM),
        (status = 429, description = "`budget_exhausted`: the day's tokens are spent; or `too_many_jobs`. See `Retry-After`. What was indexed so far stays.", body = gateway_api::Problem, content_type = PROBLEM),
        (status = 503, description = "`upstream_unavailable`; see `Retry-After`.", body = gateway_api::Problem, content_type = PROBLEM),
    )
)]
pub(super) async fn put_documents(
    State(app): State<Arc<App>>,
    Json(request): Json<PutDocuments>,
) -> Result<Answer<PutDocumentsResult>, Problem> {
    let collection = collection(&app, request.collection)?;
    check_count(request.documents.len())?;
    let indexer = Arc::clone(&app.indexer);
    let put = async move { indexer.put(&collection, request.documents, |_, _| {}).await };
    Ok(Answer(to_its_end(&app, put).await?))
}

/// Removes documents.
#[utoipa::path(
    delete,
    path = "/v1/documents",
    tag = "index",
    request_body = DeleteDocuments,
    responses(
        (status = 200, description = "Gone.", body = DeleteDocumentsResult),
        (status = 404, description = "`unknown_collection`", body = gateway_api::Problem, content_type = PROBLEM),
    )
)]
pub(super) async fn delete_documents(
    State(app): State<Arc<App>>,
    Json(request): Json<DeleteDocuments>,
) -> Result<Answer<DeleteDocumentsResult>, Problem> {
    let collection = collection(&app, request.collection.clone())?;
    check_count(request.sources.len())?;
    let indexer = Arc::clone(&app.indexer);
    let delete = async move { indexer.delete(&collection, &request).await };
    Ok(Answer(to_its_end(&app, delete).await?))
}

/// Lists what is indexed, so that a client sends only what changed.
#[utoipa::path(
    get,
    path = "/v1/documents",
    tag = "index",
    params(
        ("collection" = Option<String>, Query, description = "Which collection; the default when missing."),
        ("repo" = Option<String>, Query, description = "Only this repository.")
    ),
    responses((status = 200, description = "What is indexed, by source.", body = DocumentList))
)]
pub(super) async fn list_documents(
    State(app): State<Arc<App>>,
    Query(scope): Query<Scope>,
) -> Result<Answer<DocumentList>, Problem> {
    let collection = collection(&app, scope.collection)?;
    Ok(Answer(app.indexer.list(&collection, scope.repo.as_deref()).await?))
}

/// Lists the collections.
#[utoipa::path(
    get,
    path = "/v1/collections",
    tag = "index",
    responses((status = 200, description = "All collections, by name.", body = Vec<CollectionInfo>))
)]
pub(super) async fn collections(State(app): State<Arc<App>>) -> Result<Answer<Vec<CollectionInfo>>, Problem> {
    let all = app.index.collections().await.map_err(GatewayError::from)?;
    let line = |(name, state): (String, crate::index::CollectionState)| CollectionInfo {
        name,
        chunks: state.chunks,
        embedding_model: state.meta.embedding_model,
        embedding_size: state.meta.embedding_size,
    };
    Ok(Answer(all.into_iter().map(line).collect()))
}

/// Empties this gateway's caches.
#[utoipa::path(
    post,
    path = "/v1/admin/cache/clear",
    tag = "admin",
    responses((status = 204, description = "Empty."))
)]
pub(super) async fn clear_cache(State(app): State<Arc<App>>) -> StatusCode {
    app.searcher.clear_cache();
    StatusCode::NO_CONTENT
}

/// Runs a write in a task of its own: whoever hangs up or runs out of time does not stop it half-way.
/// As many may run as index jobs may.
async fn to_its_end<T: Send + 'static>(
    app: &App,
    work: impl Future<Output = Result<T, GatewayError>> + Send + 'static,
) -> Result<T, Problem> {
    let Ok(slot) = Arc::clone(&app.write_slots).try_acquire_owned() else {
        return Err(GatewayError::TooManyJobs(app.max_writes).into());
    };
    let task = tokio::spawn(async move {
        let _slot = slot;
        work.await
    });
    match task.await {
        Ok(result) => Ok(result?),
        Err(error) => {
            tracing::error!(error_code = "panic", error = %error, "a write stopped");
            Err(Problem::internal())
        }
    }
}

fn collection(app: &App, name: Option<String>) -> Result<String, Problem> {
    let name = name.unwrap_or_else(|| app.default_collection.clone());
    check_collection_name(&name)?;
    Ok(name)
}

fn check_count(count: usize) -> Result<(), Problem> {
    match count {
        0 => Err(GatewayError::Invalid("the list is empty; send at least one".to_owned()).into()),
        1..=MAX_DOCUMENTS => Ok(()),
        _ => Err(GatewayError::Invalid(format!(
            "{count} are too many; send at most {MAX_DOCUMENTS} at a time"
        ))
        .into()),
    }
}

/// A text without a name is named by its hash, so that sending it again changes nothing.
fn named(item: EmbedItem) -> Document {
    match item {
        EmbedItem::Document(document) => document,
        EmbedItem::Text(text) => {
            let hash = content_hash(&text);
            Document { source: format!("text-{}", &hash[..16]), text, ..Document::default() }
        }
    }
}
