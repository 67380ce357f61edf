//! Index jobs: `POST /v1/embed_batch` answers at once, one task works through the queue.
//!
//! Jobs live in this process: a restart forgets them, and what they had written stays, so sending the
//! same documents again does only what is left. The queue is bounded (`MAX_INDEX_JOBS`). A job that
//! meets an empty budget waits for tokens and goes on by itself.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use atlas_shared::{
    gateway_api::{Document, DocumentOutcome, DocumentResult, JobState, JobStatus},
    resilience::RetryPolicy,
};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::{error::GatewayError, indexing::Indexer};

/// Ended jobs that are remembered.
const REMEMBERED: usize = 1000;

/// Errors that are kept of a job.
const MAX_ERRORS: usize = 10;

/// How often a job that waits for tokens asks again: a limit may have been raised.
const BUDGET_POLL: Duration = Duration::from_secs(30);

/// The queue of one gateway.
pub(crate) struct Jobs {
    table: Arc<Mutex<Table>>,
    queue: mpsc::Sender<Job>,
    max_active: usize,
}

#[derive(Default)]
struct Table {
    jobs: HashMap<String, JobStatus>,
    /// Ids of ended jobs, oldest first.
    ended: VecDeque<String>,
    active: usize,
}

struct Job {
    id: String,
    collection: String,
    documents: Vec<Document>,
}

/// Works through the queue. Ends when it is told to stop, after the group of documents at hand.
pub(crate) struct Runner {
    table: Arc<Mutex<Table>>,
    queue: mpsc::Receiver<Job>,
    indexer: Arc<Indexer>,
    policy: RetryPolicy,
    stop: CancellationToken,
}

impl Jobs {
    /// The queue and the task that must be run with it.
    pub(crate) fn new(
        max_active: usize,
        indexer: Arc<Indexer>,
        policy: RetryPolicy,
        stop: CancellationToken,
    ) -> (Self, Runner) {
        let table = Arc::<Mutex<Table>>::default();
        let (sender, receiver) = mpsc::channel(max_active);
        let runner = Runner { table: Arc::clone(&table), queue: receiver, indexer, policy, stop };
        (Self { table, queue: sender, max_active }, runner)
    }

    /// Queues a job and returns its id.
    pub(crate) fn submit(
        &self,
        collection: String,
        documents: Vec<Document>,
    ) -> Result<String, GatewayError> {
        let id = Uuid::now_v7().to_string();
        let mut table = lock(&self.table);
        if table.active >= self.max_active {
            return Err(GatewayError::TooManyJobs(table.active));
        }
        let status = JobStatus {
            job_id: id.clone(),
            state: JobState::Queued,
            documents: documents.len(),
            documents_done: 0,
            chunks: 0,
            tokens: 0,
            errors: Vec::new(),
            note: None,
        };
        // The channel has room for as many as may be active.
        self.queue
            .try_send(Job { id: id.clone(), collection, documents })
            .map_err(|_| GatewayError::TooManyJobs(table.active))?;
        table.active += 1;
        table.jobs.insert(id.clone(), status);
        Ok(id)
    }

    pub(crate) fn status(&self, id: &str) -> Result<JobStatus, GatewayError> {
        lock(&self.table).jobs.get(id).cloned().ok_or_else(|| GatewayError::UnknownJob(id.to_owned()))
    }
}

impl Runner {
    pub(crate) async fn run(mut self) {
        loop {
            let job = tokio::select! {
                biased;
                () = self.stop.cancelled() => return,
                job = self.queue.recv() => job,
            };
            let Some(job) = job else { return };
            self.work(job).await;
        }
    }

    async fn work(&self, job: Job) {
        let Job { id, collection, documents } = job;
        self.change(&id, |status| status.state = JobState::Running);
        let mut attempt = 0;
        let failure = loop {
            self.change(&id, |status| status.documents_done = 0);
            let progress = |results: &[DocumentResult], tokens: u64| {
                self.change(&id, |status| advance(status, results, tokens));
            };
            let result = tokio::select! {
                result = self.indexer.put(&collection, documents.clone(), progress) => result,
                () = self.stop.cancelled() => return,
            };
            let Err(error) = result else { break None };
            let wait = match &error {
                GatewayError::BudgetExhausted(_) => {
                    tracing::info!(job_id = id, reason = %error, "index job waits for tokens");
                    error.retry_after().unwrap_or(BUDGET_POLL).min(BUDGET_POLL)
                }
                GatewayError::Upstream(upstream) => {
                    attempt += 1;
                    match self.policy.next_delay(attempt, upstream) {
                        Some(delay) => delay,
                        None => break Some(error),
                    }
                }
                _ => break Some(error),
            };
            self.change(&id, |status| status.note = Some(error.to_string()));
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = self.stop.cancelled() => return,
            }
            self.change(&id, |status| status.note = None);
        };
        if let Some(error) = &failure {
            tracing::error!(job_id = id, error_code = error.code(), error = %error, "index job failed");
        }
        self.end(&id, failure);
    }

    fn change(&self, id: &str, change: impl FnOnce(&mut JobStatus)) {
        if let Some(status) = lock(&self.table).jobs.get_mut(id) {
            change(status);
        }
    }

    fn end(&self, id: &str, failure: Option<GatewayError>) {
        let mut table = lock(&self.table);
        table.active = table.active.saturating_sub(1);
        if let Some(status) = table.jobs.get_mut(id) {
            status.state = if failure.is_some() { JobState::Failed } else { JobState::Done };
            status.errors.extend(failure.map(|error| error.to_string()));
        }
        table.ended.push_back(id.to_owned());
        while table.ended.len() > REMEMBERED
            && let Some(oldest) = table.ended.pop_front()
        {
            table.jobs.remove(&oldest);
        }
    }
}

fn advance(status: &mut JobStatus, results: &[DocumentResult], tokens: u64) {
    status.documents_done += results.len();
    status.tokens += tokens;
    for result in results {
        if result.outcome == DocumentOutcome::Indexed {
            status.chunks += result.chunks;
        }
        if let Some(error) = &result.error
            && status.errors.len() < MAX_ERRORS
        {
            status.errors.push(format!("{}: {error}", result.source));
        }
    }
}

fn lock(table: &Mutex<Table>) -> MutexGuard<'_, Table> {
    table.lock().unwrap_or_else(PoisonError::into_inner)
}
