//! Routes about whole collections and repositories.

use std::sync::Arc;

use atlas_shared::gateway_api::{self, IndexRepository, JobCreated, RebuildStarted, UseGeneration};
use axum::{Json as Answer, extract::State, http::StatusCode};

use super::{
    App, Problem,
    auth::Caller,
    body::{Json, Segment},
    handlers::{PROBLEM, collection, to_its_end},
};
use crate::jobs::store::Work;

/// Indexes a folder or a git repository that the gateway reads by itself.
///
/// What changed is indexed, what vanished is deleted. It must be below one of `INDEX_ALLOWED_ROOTS` or
/// `INDEX_ALLOWED_URLS`. Ask `/v1/jobs/{id}` how it goes.
#[utoipa::path(
    post,
    path = "/v1/index",
    tag = "index",
    request_body = IndexRepository,
    responses(
        (status = 202, description = "Queued.", body = JobCreated),
        (status = 403, description = "`forbidden`: the key belongs to a tenant.", body = gateway_api::Problem, content_type = PROBLEM),
        (status = 422, description = "`source_not_allowed`: the gateway may not read this place.", body = gateway_api::Problem, content_type = PROBLEM),
        (status = 429, description = "`too_many_jobs`; see `Retry-After`.", body = gateway_api::Problem, content_type = PROBLEM),
    )
)]
pub(super) async fn index_repository(
    State(app): State<Arc<App>>,
    caller: Caller,
    Json(request): Json<IndexRepository>,
) -> Result<(StatusCode, Answer<JobCreated>), Problem> {
    caller.is_everybodys()?;
    let IndexRepository { repo, path, collection: name } = request;
    let collection = collection(&app, name)?;
    app.sources.check(&repo, path.as_deref())?;
    let job_id = app.jobs.submit(Work::Repository { collection, repo, path }, None).await?;
    Ok((StatusCode::ACCEPTED, Answer(JobCreated { job_id })))
}

/// Fills a new generation of a collection, and uses it from then on.
///
/// All its chunks are embedded with the model that is configured now; searches go on with the old
/// generation until the new one is complete and checked. The old one is kept until it is deleted.
#[utoipa::path(
    post,
    path = "/v1/collections/{name}/rebuild",
    tag = "index",
    params(("name" = String, Path, pattern = r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$", description = "Which collection, without a generation.")),
    responses(
        (status = 202, description = "Queued.", body = RebuildStarted),
        (status = 403, description = "`forbidden`: the key belongs to a tenant.", body = gateway_api::Problem, content_type = PROBLEM),
        (status = 404, description = "`unknown_collection`", body = gateway_api::Problem, content_type = PROBLEM),
        (status = 429, description = "`too_many_jobs`; see `Retry-After`.", body = gateway_api::Problem, content_type = PROBLEM),
    )
)]
pub(super) async fn rebuild(
    State(app): State<Arc<App>>,
    caller: Caller,
    Segment(name): Segment,
) -> Result<(StatusCode, Answer<RebuildStarted>), Problem> {
    caller.is_everybodys()?;
    let collection = collection(&app, Some(name))?;
    let (generation, old) = app.indexer.next_generation(&collection).await?;
    let work = Work::Rebuild { collection, generation: generation.clone() };
    let job_id = app.jobs.submit(work, None).await?;
    Ok((StatusCode::ACCEPTED, Answer(RebuildStarted { job_id, generation, old })))
}

/// Makes a collection stand for another of its generations.
#[utoipa::path(
    put,
    path = "/v1/collections/{name}/generation",
    tag = "index",
    params(("name" = String, Path, pattern = r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$", description = "Which collection, without a generation.")),
    request_body = UseGeneration,
    responses(
        (status = 204, description = "It is in use."),
        (status = 403, description = "`forbidden`: the key belongs to a tenant.", body = gateway_api::Problem, content_type = PROBLEM),
        (status = 404, description = "`unknown_collection`", body = gateway_api::Problem, content_type = PROBLEM),
    )
)]
pub(super) async fn use_generation(
    State(app): State<Arc<App>>,
    caller: Caller,
    Segment(name): Segment,
    Json(request): Json<UseGeneration>,
) -> Result<StatusCode, Problem> {
    caller.is_everybodys()?;
    let collection = collection(&app, Some(name))?;
    app.indexer.use_generation(&collection, &request.generation).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Deletes a generation that is not in use, or a collection with all its generations.
#[utoipa::path(
    delete,
    path = "/v1/collections/{name}",
    tag = "index",
    params(("name" = String, Path, pattern = r"^[A-Za-z0-9_-][A-Za-z0-9._-]*(@[1-9][0-9]{0,17})?$", description = "Such as `docs@1`, or `docs`.")),
    responses(
        (status = 204, description = "Gone."),
        (status = 403, description = "`forbidden`: the key belongs to a tenant.", body = gateway_api::Problem, content_type = PROBLEM),
        (status = 404, description = "`unknown_collection`", body = gateway_api::Problem, content_type = PROBLEM),
        (status = 409, description = "`generation_in_use`: a collection stands for it.", body = gateway_api::Problem, content_type = PROBLEM),
    )
)]
pub(super) async fn drop_collection(
    State(app): State<Arc<App>>,
    caller: Caller,
    Segment(name): Segment,
) -> Result<StatusCode, Problem> {
    caller.is_everybodys()?;
    let name = collection(&app, Some(name))?;
    let indexer = Arc::clone(&app.indexer);
    to_its_end(&app, async move { indexer.drop_collection(&name).await }).await?;
    Ok(StatusCode::NO_CONTENT)
}
