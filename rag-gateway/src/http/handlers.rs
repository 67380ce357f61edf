//! One function a route.

use std::sync::Arc;

use atlas_shared::gateway_api::{
    CollectionInfo, DEGRADED_HEADER, DeleteDocuments, DeleteDocumentsResult, Document, DocumentList,
    EmbedItem, JobCreated, JobStatus, PutDocuments, PutDocumentsResult, QueryChatRequest, content_hash,
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

/// Documents in one request.
const MAX_DOCUMENTS: usize = 10_000;

/// The query string of routes that have no body, or an array as a body.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Scope {
    collection: Option<String>,
    repo: Option<String>,
}

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

pub(super) async fn job(
    State(app): State<Arc<App>>,
    Path(id): Path<String>,
) -> Result<Answer<JobStatus>, Problem> {
    Ok(Answer(app.jobs.status(&id)?))
}

pub(super) async fn put_documents(
    State(app): State<Arc<App>>,
    Json(request): Json<PutDocuments>,
) -> Result<Answer<PutDocumentsResult>, Problem> {
    let collection = collection(&app, request.collection)?;
    check_count(request.documents.len())?;
    Ok(Answer(app.indexer.put(&collection, request.documents, |_, _| {}).await?))
}

pub(super) async fn delete_documents(
    State(app): State<Arc<App>>,
    Json(request): Json<DeleteDocuments>,
) -> Result<Answer<DeleteDocumentsResult>, Problem> {
    let collection = collection(&app, request.collection.clone())?;
    check_count(request.sources.len())?;
    Ok(Answer(app.indexer.delete(&collection, &request).await?))
}

pub(super) async fn list_documents(
    State(app): State<Arc<App>>,
    Query(scope): Query<Scope>,
) -> Result<Answer<DocumentList>, Problem> {
    let collection = collection(&app, scope.collection)?;
    Ok(Answer(app.indexer.list(&collection, scope.repo.as_deref()).await?))
}

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

pub(super) async fn clear_cache(State(app): State<Arc<App>>) -> StatusCode {
    app.searcher.clear_cache();
    StatusCode::NO_CONTENT
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
