//! One function a route.

use std::sync::Arc;

use atlas_shared::gateway_api::{
    self, CollectionInfo, DEGRADED_HEADER, DeleteDocuments, DeleteDocumentsResult, Document, DocumentList,
    EmbedItem, JobCreated, JobStatus, Passage, PutDocuments, PutDocumentsResult, QueryChatRequest,
    content_hash,
};
use axum::{
    Json as Answer,
    extract::State,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse as _, Response},
};
use serde::Deserialize;

use super::{
    App, Problem,
    auth::Caller,
    body::{Json, JsonArray, Query, Segment},
    visible,
};
use crate::{error::GatewayError, index::CollectionMeta, jobs::store::Work, search::check_collection_name};

/// The content type of errors.
pub(super) const PROBLEM: &str = "application/problem+json";

/// Documents in one request.
pub(super) const MAX_DOCUMENTS: usize = 10_000;

/// The query string of routes that have no body, or an array as a body.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Scope {
    collection: Option<String>,
    repo: Option<String>,
    tenant: Option<String>,
}

/// Finds passages.
///
/// Hybrid search: BM25 and, where the collection has embeddings, cosine. Equal queries get equal answers.
/// Of one collection or several; passages stand next to their neighbours where there is room.
#[utoipa::path(
    post,
    path = "/v1/query_chat",
    tag = "search",
    request_body = QueryChatRequest,
    responses(
        (status = 200, description = "Passages, best first. `X-Atlas-Degraded` says how the answer is less than it could be: `lexical` (without embeddings), `unreranked`, `stale` (from the cache, because the index does not answer).", body = Vec<Passage>),
        (status = 403, description = "`forbidden`: the key belongs to another tenant.", body = gateway_api::Problem, content_type = PROBLEM),
        (status = 404, description = "`unknown_collection`", body = gateway_api::Problem, content_type = PROBLEM),
        (status = 409, description = "`embedding_mismatch`: the collection was built with another embedding model.", body = gateway_api::Problem, content_type = PROBLEM),
        (status = 503, description = "`upstream_unavailable`: the index does not answer; see `Retry-After`.", body = gateway_api::Problem, content_type = PROBLEM),
    )
)]
pub(super) async fn query_chat(
    State(app): State<Arc<App>>,
    caller: Caller,
    Json(mut request): Json<QueryChatRequest>,
) -> Result<Response, Problem> {
    let mut filter = request.filter.take().unwrap_or_default();
    filter.tenant = caller.tenant(filter.tenant)?;
    request.filter = Some(filter);
    for name in request.collection.iter().chain(request.collections.iter().flatten()) {
        // The default one may be missing.
        if *name != app.default_collection {
            visible::check(&app, &caller, name).await?;
        }
    }
    let answer = app.searcher.query(request).await?;
    let mut response = ([(header::CONTENT_TYPE, "application/json")], answer.body).into_response();
    if !answer.degraded.is_empty() {
        let reasons: Vec<&str> = answer.degraded.iter().map(|reason| reason.as_str()).collect();
        if let Ok(reasons) = HeaderValue::from_str(&reasons.join(", ")) {
            response.headers_mut().insert(DEGRADED_HEADER, reasons);
        }
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
    params(("collection" = Option<String>, Query, pattern = r"^[A-Za-z0-9_-][A-Za-z0-9._-]*(@[1-9][0-9]{0,17})?$", description = "Which collection; the default when missing.")),
    request_body = Vec<EmbedItem>,
    responses(
        (status = 202, description = "Queued.", body = JobCreated),
        (status = 404, description = "`unknown_collection`: a generation that is not there; a collection is made.", body = gateway_api::Problem, content_type = PROBLEM),
        (status = 429, description = "`too_many_jobs`; see `Retry-After`.", body = gateway_api::Problem, content_type = PROBLEM),
    )
)]
pub(super) async fn embed_batch(
    State(app): State<Arc<App>>,
    caller: Caller,
    Query(scope): Query<Scope>,
    JsonArray(items): JsonArray<EmbedItem>,
) -> Result<(StatusCode, Answer<JobCreated>), Problem> {
    let collection = collection(&app, scope.collection)?;
    writable(&app, &caller, &collection).await?;
    let documents: Vec<Document> = items.into_iter().map(named).collect();
    let documents = owned(&caller, documents)?;
    check_count(documents.len())?;
    // A job is stored with all that it is to write.
    let (documents, refused) = app.indexer.without_credentials(documents).await?;
    let work = Work::Documents { collection, documents, refused };
    let job_id = app.jobs.submit(work, caller.tenant.as_deref()).await?;
    Ok((StatusCode::ACCEPTED, Answer(JobCreated { job_id })))
}

/// Where an index job is.
///
/// A key that belongs to a tenant is told of the jobs that keys of this tenant asked for.
#[utoipa::path(
    get,
    path = "/v1/jobs/{id}",
    tag = "index",
    params(("id" = String, Path, description = "From the request that made the job.")),
    responses(
        (status = 200, description = "Where the job is.", body = JobStatus),
        (status = 404, description = "`unknown_job`", body = gateway_api::Problem, content_type = PROBLEM),
    )
)]
pub(super) async fn job(
    State(app): State<Arc<App>>,
    caller: Caller,
    Segment(id): Segment,
) -> Result<Answer<JobStatus>, Problem> {
    Ok(Answer(app.jobs.status(&id, caller.tenant.as_deref()).await?))
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
        (status = 404, description = "`unknown_collection`: a generation that is not there; a collection is made.", body = gateway_api::Problem, content_type = PROBLEM),
        (status = 409, description = "`embedding_mismatch`", body = gateway_api::Problem, content_type = PROBLEM),
        (status = 429, description = "`budget_exhausted`: the day's tokens are spent; or `too_many_jobs`. See `Retry-After`. What was indexed so far stays, and `done` says what it is; what was paid for is not paid again.", body = gateway_api::Problem, content_type = PROBLEM),
        (status = 503, description = "`upstream_unavailable`; see `Retry-After`.", body = gateway_api::Problem, content_type = PROBLEM),
        (status = 507, description = "`disk_full`: the embedded index has no room. Nothing that was not finished before is written; searches go on.", body = gateway_api::Problem, content_type = PROBLEM),
    )
)]
pub(super) async fn put_documents(
    State(app): State<Arc<App>>,
    caller: Caller,
    Json(request): Json<PutDocuments>,
) -> Result<Answer<PutDocumentsResult>, Problem> {
    let collection = collection(&app, request.collection)?;
    writable(&app, &caller, &collection).await?;
    check_count(request.documents.len())?;
    let documents = owned(&caller, request.documents)?;
    let indexer = Arc::clone(&app.indexer);
    let put = async move { indexer.put(&collection, documents, |_, _| {}).await };
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
    caller: Caller,
    Json(mut request): Json<DeleteDocuments>,
) -> Result<Answer<DeleteDocumentsResult>, Problem> {
    request.tenant = caller.tenant(request.tenant)?;
    let collection = collection(&app, request.collection.clone())?;
    visible::check(&app, &caller, &collection).await?;
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
        ("collection" = Option<String>, Query, pattern = r"^[A-Za-z0-9_-][A-Za-z0-9._-]*(@[1-9][0-9]{0,17})?$", description = "Which collection; the default when missing."),
        ("repo" = Option<String>, Query, description = "Only this repository."),
        ("tenant" = Option<String>, Query, description = "What is this tenant's; what is nobody's when missing.")
    ),
    responses((status = 200, description = "What is indexed, by source.", body = DocumentList))
)]
pub(super) async fn list_documents(
    State(app): State<Arc<App>>,
    caller: Caller,
    Query(scope): Query<Scope>,
) -> Result<Answer<DocumentList>, Problem> {
    let collection = collection(&app, scope.collection)?;
    let tenant = caller.tenant(scope.tenant)?;
    match visible::check(&app, &caller, &collection).await {
        Err(GatewayError::UnknownCollection(_)) => return Ok(Answer(DocumentList::default())),
        checked => checked?,
    }
    Ok(Answer(app.indexer.list(&collection, scope.repo.as_deref(), tenant.as_deref()).await?))
}

/// Lists the collections.
///
/// A key that belongs to a tenant sees those that hold something it may read, and counts only that.
#[utoipa::path(
    get,
    path = "/v1/collections",
    tag = "index",
    responses((status = 200, description = "All collections, by name.", body = Vec<CollectionInfo>))
)]
pub(super) async fn collections(
    State(app): State<Arc<App>>,
    caller: Caller,
) -> Result<Answer<Vec<CollectionInfo>>, Problem> {
    let all = app.index.collections().await.map_err(GatewayError::from)?;
    let mut lines = Vec::with_capacity(all.len());
    for (name, state) in all {
        let mut chunks = state.chunks;
        if let Some(tenant) = &caller.tenant {
            let readable = visible::readable(tenant);
            chunks = app.index.count(&name, &readable).await.map_err(GatewayError::from)?;
            if chunks == 0 {
                continue;
            }
        }
        let CollectionMeta { embedding_model, embedding_size, .. } = state.meta;
        lines.push(CollectionInfo {
            name,
            chunks,
            embedding_model,
            embedding_size,
            generation: state.generation,
        });
    }
    Ok(Answer(lines))
}

/// Empties the caches of all gateways on this index.
///
/// This one's at once, the others' before they answer the next query.
#[utoipa::path(
    post,
    path = "/v1/admin/cache/clear",
    tag = "admin",
    responses(
        (status = 204, description = "Empty."),
        (status = 403, description = "`forbidden`: the key belongs to a tenant.", body = gateway_api::Problem, content_type = PROBLEM),
        (status = 503, description = "`upstream_unavailable`: this gateway's caches are empty; the index, through which the others are told, does not answer.", body = gateway_api::Problem, content_type = PROBLEM),
    )
)]
pub(super) async fn clear_cache(State(app): State<Arc<App>>, caller: Caller) -> Result<StatusCode, Problem> {
    caller.is_everybodys()?;
    app.searcher.clear_cache().await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Runs a write in a task of its own: whoever hangs up or runs out of time does not stop it half-way.
/// As many may run as index jobs may.
pub(super) async fn to_its_end<T: Send + 'static, E: Into<Problem> + Send + 'static>(
    app: &App,
    work: impl Future<Output = Result<T, E>> + Send + 'static,
) -> Result<T, Problem> {
    let Ok(slot) = Arc::clone(&app.write_slots).try_acquire_owned() else {
        return Err(GatewayError::TooManyJobs(app.max_writes).into());
    };
    let task = tokio::spawn(async move {
        let _slot = slot;
        work.await
    });
    match task.await {
        Ok(result) => result.map_err(Into::into),
        Err(error) => {
            tracing::error!(error_code = "panic", error = %error, "a write stopped");
            Err(Problem::internal())
        }
    }
}

pub(super) fn collection(app: &App, name: Option<String>) -> Result<String, Problem> {
    let name = name.unwrap_or_else(|| app.default_collection.clone());
    check_collection_name(&name)?;
    Ok(name)
}

/// A write makes the collection where there is none, but no generation: that would tell which there are.
async fn writable(app: &App, caller: &Caller, collection: &str) -> Result<(), GatewayError> {
    if collection.contains('@') { visible::check(app, caller, collection).await } else { Ok(()) }
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

/// Documents as the caller may write them: its own tenant's.
fn owned(caller: &Caller, mut documents: Vec<Document>) -> Result<Vec<Document>, Problem> {
    if caller.tenant.is_some() {
        for document in &mut documents {
            document.tenant = caller.tenant(document.tenant.take())?;
        }
    }
    Ok(documents)
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
