//! Index jobs: asked for by one request, done by whichever gateway of the fleet takes them.
//!
//! Jobs are kept in the [store](store): a restart forgets none. One task in each gateway works, one job
//! at a time; while it does, it renews its lease and notes how far it is. The number of jobs that wait
//! or run is bounded (`MAX_INDEX_JOBS`). A job that meets an empty budget or a full disk waits and goes on
//! by itself.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use atlas_shared::{
    UpstreamError,
    gateway_api::{DocumentOutcome, DocumentResult, JobState, JobStatus},
    resilience::RetryPolicy,
};
use tokio::{
    sync::Notify,
    time::{Instant, MissedTickBehavior, interval},
};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::{error::GatewayError, index::DISK_FULL, indexing::Indexer, repository::Sources};

#[cfg(test)]
mod contract;
mod memory;
mod sqlite;
pub(crate) mod store;
mod supabase;

use store::{Claimed, JobStore, Leave, Reported, Work};

/// Errors that are kept of a job.
const MAX_ERRORS: usize = 10;

/// Longest error that is kept.
const MAX_ERROR_CHARS: usize = 500;

/// How often a job that waits for tokens, or for room on the disk, asks again: a limit may have been raised.
const BUDGET_POLL: Duration = Duration::from_secs(30);

/// How long the job of a dead gateway waits for another one.
const LEASE: Duration = Duration::from_secs(20);

/// How often a running job is noted in the store.
const HEARTBEAT: Duration = Duration::from_secs(3);

/// How long a gateway that stops waits for the calls of its job that are under way: they are paid for.
const SETTLING: Duration = Duration::from_secs(12);

/// How soon jobs are seen that another gateway took in, or left.
const POLL: Duration = Duration::from_secs(3);

/// The same while the store does not answer.
const POLL_AFTER_FAILURE: Duration = Duration::from_secs(15);

/// The jobs, as requests see them.
pub(crate) struct Jobs {
    store: Arc<dyn JobStore>,
    max_active: usize,
    shared: Arc<Shared>,
}

/// What requests and the task share.
#[derive(Default)]
struct Shared {
    /// Jobs that this gateway works on: newer than what the store knows.
    live: Mutex<HashMap<Uuid, Live>>,
    /// Rings when a job was queued here.
    bell: Notify,
}

/// A job that is worked on here.
struct Live {
    /// Whose it is; see [`Reported`].
    tenant: Option<String>,
    status: Arc<Mutex<JobStatus>>,
}

/// Works. Ends when it is told to stop, and gives back what it holds.
pub(crate) struct Runner {
    store: Arc<dyn JobStore>,
    shared: Arc<Shared>,
    indexer: Arc<Indexer>,
    sources: Arc<Sources>,
    policy: RetryPolicy,
    /// How long a job goes on trying with nothing done.
    patience: Duration,
    stop: CancellationToken,
}

/// How far a job is.
#[derive(Clone, Copy)]
pub(crate) struct Progress<'a>(&'a Mutex<JobStatus>);

#[cfg(test)]
impl<'a> Progress<'a> {
    pub(crate) fn of(status: &'a Mutex<JobStatus>) -> Self {
        Self(status)
    }
}

impl Progress<'_> {
    /// The work begins, from the start or again: `documents` are to be done.
    pub(crate) fn begin(self, documents: usize) {
        let mut status = lock(self.0);
        status.documents = documents;
        status.documents_done = 0;
    }

    /// Documents that are indexed as they are.
    pub(crate) fn unchanged(self, documents: usize) {
        lock(self.0).documents_done += documents;
    }

    /// Some more are done.
    pub(crate) fn advance(self, results: &[DocumentResult], tokens: u64) {
        let mut status = lock(self.0);
        status.documents_done += results.len();
        status.tokens += tokens;
        for result in results {
            if result.outcome == DocumentOutcome::Indexed {
                status.chunks += result.chunks;
            }
            if let Some(error) = &result.error {
                keep_error(&mut status, &format!("{}: {error}", result.source));
            }
        }
    }

    /// Documents that were copied: they have no outcome of their own.
    pub(crate) fn copied(self, documents: usize, chunks: usize, tokens: u64) {
        let mut status = lock(self.0);
        status.documents_done += documents;
        status.chunks += chunks;
        status.tokens += tokens;
    }

    /// Something failed that stops nothing.
    pub(crate) fn fault(self, error: &str) {
        keep_error(&mut lock(self.0), error);
    }
}

fn keep_error(status: &mut JobStatus, error: &str) {
    if status.errors.len() < MAX_ERRORS {
        status.errors.push(error.chars().take(MAX_ERROR_CHARS).collect());
    }
}

impl Jobs {
    /// The jobs and the task that must be run with them.
    pub(crate) fn new(
        store: Arc<dyn JobStore>,
        max_active: usize,
        indexer: Arc<Indexer>,
        sources: Arc<Sources>,
        (policy, patience): (RetryPolicy, Duration),
        stop: CancellationToken,
    ) -> (Self, Runner) {
        let shared = Arc::<Shared>::default();
        let runner = Runner {
            store: Arc::clone(&store),
            shared: Arc::clone(&shared),
            indexer,
            sources,
            policy,
            patience,
            stop,
        };
        (Self { store, max_active, shared }, runner)
    }

    /// Queues a job and returns its id. From then on no restart forgets it. `tenant`: whose the caller is.
    pub(crate) async fn submit(&self, work: Work, tenant: Option<&str>) -> Result<String, GatewayError> {
        let id = Uuid::now_v7();
        let status = JobStatus {
            job_id: id.to_string(),
            state: JobState::Queued,
            documents: match &work {
                Work::Documents { documents, refused, .. } => documents.len() + refused.len(),
                Work::Repository { .. } | Work::Rebuild { .. } => 0,
            },
            documents_done: 0,
            chunks: 0,
            tokens: 0,
            errors: Vec::new(),
            note: None,
        };
        let job = Reported { tenant: tenant.map(str::to_owned), status };
        match self.store.submit(id, &work, &job, self.max_active).await? {
            Some(_) => {
                self.shared.bell.notify_one();
                Ok(job.status.job_id)
            }
            None => Err(GatewayError::TooManyJobs(self.max_active)),
        }
    }

    /// Where a job is. `tenant`: whose the caller is. To one that belongs to a tenant no other job exists:
    /// errors name documents.
    pub(crate) async fn status(&self, id: &str, tenant: Option<&str>) -> Result<JobStatus, GatewayError> {
        let unknown = || GatewayError::UnknownJob(id.to_owned());
        let key: Uuid = id.parse().map_err(|_| unknown())?;
        let live = lock(&self.shared.live)
            .get(&key)
            .map(|live| Reported { tenant: live.tenant.clone(), status: lock(&live.status).clone() });
        let job = match live {
            Some(job) => job,
            None => self.store.status(key).await?.ok_or_else(unknown)?,
        };
        if tenant.is_some() && job.tenant.as_deref() != tenant {
            return Err(unknown());
        }
        Ok(job.status)
    }
}

impl Runner {
    pub(crate) async fn run(self) {
        loop {
            let claimed = tokio::select! {
                biased;
                () = self.stop.cancelled() => return,
                claimed = self.store.claim(LEASE) => claimed,
            };
            let pause = match claimed {
                Ok(Some(job)) => {
                    self.work(job).await;
                    continue;
                }
                Ok(None) => POLL,
                Err(error) => {
                    tracing::warn!(error_code = error.code(), error = %error, "cannot look for index jobs");
                    POLL_AFTER_FAILURE
                }
            };
            tokio::select! {
                () = self.stop.cancelled() => return,
                () = self.shared.bell.notified() => {}
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    /// Works on one job to its end, or until it is lost or the gateway stops.
    async fn work(&self, job: Claimed) {
        if job.attempt > 1 {
            tracing::info!(job_id = %job.id, attempt = job.attempt, "an index job goes on");
        }
        // What an earlier attempt wrote is written, and unchanged now: its chunks and tokens count.
        let live = Arc::new(Mutex::new(JobStatus {
            state: JobState::Running,
            documents_done: 0,
            errors: Vec::new(),
            note: None,
            ..job.status.clone()
        }));
        let entry = Live { tenant: job.tenant.clone(), status: Arc::clone(&live) };
        lock(&self.shared.live).insert(job.id, entry);
        let leave = self.work_while_held(&job, &live).await;
        if let Some(leave) = leave {
            self.note(&job, &live, leave).await;
        }
        lock(&self.shared.live).remove(&job.id);
    }

    /// How to leave the job; `None`: it is not ours any more.
    async fn work_while_held(&self, job: &Claimed, live: &Mutex<JobStatus>) -> Option<Leave> {
        let work = self.attempt(&job.work, live);
        tokio::pin!(work);
        let mut heartbeat = interval(HEARTBEAT);
        heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                () = self.stop.cancelled() => {
                    // What was paid for is written; no other call begins.
                    let settled = async {
                        tokio::select! {
                            _ = &mut work => {}
                            () = self.indexer.settled() => {}
                        }
                    };
                    if tokio::time::timeout(SETTLING, settled).await.is_err() {
                        tracing::warn!(job_id = %job.id, "an index job is given back before its calls have ended");
                    }
                    lock(live).state = JobState::Queued;
                    return Some(Leave::Release);
                }
                done = &mut work => {
                    let mut status = lock(live);
                    match done {
                        Ok(()) => status.state = JobState::Done,
                        Err(error) => {
                            tracing::error!(
                                job_id = %job.id, error_code = error.code(), error = %error, "index job failed"
                            );
                            status.state = JobState::Failed;
                            // The reason comes first, whatever else went wrong.
                            status.errors.insert(0, error.to_string());
                            status.errors.truncate(MAX_ERRORS);
                        }
                    }
                    return Some(Leave::End);
                }
                _ = heartbeat.tick() => {
                    if !self.note(job, live, Leave::Hold).await {
                        tracing::warn!(job_id = %job.id, "another gateway has taken this index job");
                        return None;
                    }
                }
            }
        }
    }

    /// Writes to the store how far the job is. False: another attempt has it. While the store does not
    /// answer the work goes on: writing the same documents twice does no harm.
    async fn note(&self, job: &Claimed, live: &Mutex<JobStatus>, leave: Leave) -> bool {
        let status = lock(live).clone();
        let mut attempt = 0;
        loop {
            match self.store.report(job.id, job.attempt, &status, LEASE, leave).await {
                Ok(held) => return held,
                Err(error) => {
                    tracing::warn!(job_id = %job.id, error = %error, "an index job could not be noted");
                    attempt += 1;
                    // The end of a job is worth some patience; the next heartbeat comes by itself.
                    let delay =
                        (leave == Leave::End).then(|| self.policy.next_delay(attempt, &error)).flatten();
                    match delay {
                        Some(delay) => tokio::time::sleep(delay).await,
                        None => return true,
                    }
                }
            }
        }
    }

    /// Does the work, again and again where waiting helps.
    async fn attempt(&self, work: &Work, live: &Mutex<JobStatus>) -> Result<(), GatewayError> {
        let mut attempt = 0;
        let mut fails_since = Instant::now();
        let mut reached = None;
        loop {
            let Err(error) = self.once(work, Progress(live)).await else { return Ok(()) };
            let wait = match &error {
                GatewayError::BudgetExhausted(_) => {
                    tracing::info!(reason = %error, "an index job waits for tokens");
                    error.retry_after().unwrap_or(BUDGET_POLL).min(BUDGET_POLL)
                }
                GatewayError::Upstream(UpstreamError::Permanent { code, .. }) if code == DISK_FULL => {
                    tracing::warn!(reason = %error, "an index job waits for room on the disk");
                    BUDGET_POLL
                }
                // An outage ends, and whoever sent the job is gone: what was done would be paid for again.
                GatewayError::Upstream(UpstreamError::Transient { retry_after, .. }) => {
                    let now = {
                        let status = lock(live);
                        (status.chunks, status.tokens)
                    };
                    if reached.replace(now) != Some(now) {
                        (attempt, fails_since) = (0, Instant::now());
                    }
                    attempt += 1;
                    let delay = self.policy.backoff(attempt).max(retry_after.unwrap_or_default());
                    if fails_since.elapsed() + delay > self.patience {
                        return Err(error);
                    }
                    tracing::warn!(reason = %error, "an index job tries again");
                    delay
                }
                _ => return Err(error),
            };
            lock(live).note = Some(error.to_string());
            tokio::time::sleep(wait).await;
            lock(live).note = None;
        }
    }

    async fn once(&self, work: &Work, progress: Progress<'_>) -> Result<(), GatewayError> {
        match work {
            Work::Documents { collection, documents, refused } => {
                progress.begin(documents.len() + refused.len());
                progress.advance(refused, 0);
                let advance = |results: &[DocumentResult], tokens: u64| progress.advance(results, tokens);
                self.indexer.put(collection, documents.clone(), advance).await?;
                Ok(())
            }
            Work::Repository { collection, repo, path } => {
                self.sources.index(&self.indexer, collection, repo, path.as_deref(), progress).await
            }
            Work::Rebuild { collection, generation } => {
                self.indexer.rebuild(collection, generation, progress).await
            }
        }
    }
}

fn lock<T>(value: &Mutex<T>) -> MutexGuard<'_, T> {
    value.lock().unwrap_or_else(PoisonError::into_inner)
}
