//! Embeddings, booked.
//!
//! Every call reserves an upper bound in the token ledger first and settles what was billed, under
//! the same daily limit as the workers' chat calls (kind `embedding`). A call runs in a task of its
//! own: a client that hangs up cannot leave a reservation open.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use atlas_shared::{
    Dependency, Ledger, UpstreamError,
    config::ResilienceConfig,
    ledger::{
        CallKind, Closing, Denial, DeniedBy, LedgerError, Limits, ReserveOutcome, ReserveRequest, Tokens,
    },
    model::{Billed, Embedder},
    resilience::{self, CircuitBreaker, RetryPolicy},
    secrets,
};
use moka::future::Cache;
use tokio::sync::{Notify, Semaphore, mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::{error::GatewayError, metrics::Metrics};

mod documents;

pub(crate) use documents::{Complete, Embedding, Paid, Texts};

/// Texts in one call.
const MAX_BATCH_TEXTS: usize = 96;

/// Tokens in one call, by the model's own upper bound: far below what any server refuses, and little
/// enough that a call that nobody answers costs little of the day when it is booked as spent.
const MAX_BATCH_TOKENS: u64 = 16 * 1024;

/// Longest pause for a rate limit.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// Calls at once for documents of a collection. Together with what one call may carry it bounds what a gateway that
/// is killed has paid for and not written.
const CONCURRENCY: usize = 4;

/// Calls for queries at once: the next queries gather meanwhile.
const QUERY_CALLS: usize = 2;

/// Queries that may wait for their vectors.
const MAX_WAITING: usize = 4096;

/// An embedder that books what it spends.
pub(crate) struct BookedEmbedder {
    embedder: Arc<dyn Embedder>,
    ledger: Arc<dyn Ledger>,
    limits: Limits,
    policy: RetryPolicy,
    breaker: CircuitBreaker,
    metrics: Metrics,
    /// No call for documents begins any more.
    stop: CancellationToken,
    /// Why the last query had no vector.
    trouble: Mutex<Option<Trouble>>,
    /// That changed.
    changed: Notify,
}

/// Why queries are answered without vectors at the moment.
#[derive(Clone, Debug)]
enum Trouble {
    /// The day has no tokens for a query; each says how many it needs.
    Budget(Denial),
    /// The API, or the ledger, did not do what the last query needed.
    Failed(UpstreamError),
}

/// Vectors in the order of their texts.
#[derive(Debug, Default)]
pub(crate) struct Embedded {
    pub(crate) vectors: Vec<Vec<f32>>,
    /// Tokens booked for them.
    pub(crate) tokens: u64,
}

impl BookedEmbedder {
    pub(crate) fn new(
        embedder: Arc<dyn Embedder>,
        ledger: Arc<dyn Ledger>,
        limits: Limits,
        resilience: &ResilienceConfig,
        metrics: &Metrics,
        stop: CancellationToken,
    ) -> Self {
        Self {
            embedder,
            ledger,
            limits,
            policy: RetryPolicy::new(resilience),
            breaker: CircuitBreaker::new(Dependency::Embedder, resilience).with_metrics(&metrics.upstream),
            metrics: metrics.clone(),
            stop,
            trouble: Mutex::default(),
            changed: Notify::new(),
        }
    }

    /// The model's name.
    pub(crate) fn model(&self) -> &str {
        self.embedder.model()
    }

    /// Why queries have no vectors at the moment, as far as is known: the last one had none, or the day's tokens are
    /// spent. `None`: they have.
    pub(crate) async fn trouble(&self) -> Option<GatewayError> {
        if let Some(cause) = self.breaker.cause() {
            return Some(cause.into());
        }
        let last = self.last_trouble().clone();
        if let Some(Trouble::Failed(error)) = last {
            return Some(error.into());
        }
        // Asked, because the day may have ended or its limit been raised since, and no query came.
        let state = self.ledger.budget(self.limits).await.ok()?;
        let needed = match &last {
            Some(Trouble::Budget(denial)) => denial.requested,
            _ => Tokens(1),
        };
        let available = state.available();
        (available < needed).then_some(GatewayError::BudgetExhausted(Denial {
            denied_by: DeniedBy::Day,
            requested: needed,
            available,
            limit: state.limit,
            resets_at: Some(state.resets_at),
        }))
    }

    /// Ends when a query has got no vector and the one before had, or the other way round.
    pub(crate) async fn changed(&self) {
        self.changed.notified().await;
    }

    fn last_trouble(&self) -> MutexGuard<'_, Option<Trouble>> {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps how the last query's embedding ended.
    fn remember(&self, outcome: &Result<Result<Embedded, GatewayError>, UpstreamError>) {
        let trouble = match outcome {
            Ok(Ok(_)) => None,
            Ok(Err(GatewayError::BudgetExhausted(denial))) if denial.denied_by == DeniedBy::Day => {
                Some(Trouble::Budget(*denial))
            }
            Ok(Err(GatewayError::Upstream(error))) | Err(error) => match error {
                // This text was refused, others are not.
                UpstreamError::Permanent { .. } => return,
                error => Some(Trouble::Failed(error.clone())),
            },
            // Of one tenant, or of the request.
            Ok(Err(_)) => return,
        };
        let mut last = self.last_trouble();
        let turned = last.is_some() != trouble.is_some();
        *last = trouble;
        drop(last);
        if turned {
            self.changed.notify_one();
        }
    }

    /// Embeds queries: one attempt within a bound, because their answers can do without. What the call costs is
    /// booked when it ends, whoever waits for it.
    async fn embed_queries(
        self: &Arc<Self>,
        texts: Vec<String>,
        tenant: Option<&str>,
        timeout: Duration,
    ) -> Result<Vec<Vec<f32>>, GatewayError> {
        let permit = self.breaker.try_acquire()?;
        self.metrics.embedding_query_calls.inc();
        let attempt = tokio::time::timeout(timeout, self.attempt(texts, tenant)).await;
        let outcome = attempt.unwrap_or_else(|_| Err(too_slow(timeout)));
        self.remember(&outcome);
        match outcome {
            Ok(outcome) => {
                permit.succeeded();
                Ok(outcome?.vectors)
            }
            Err(error) => {
                permit.failed(&error);
                Err(error.into())
            }
        }
    }

    /// One call for documents, with retries.
    async fn embed_patiently(
        self: &Arc<Self>,
        texts: &[String],
        tenant: Option<&str>,
    ) -> Result<Embedded, GatewayError> {
        resilience::retry(&self.policy, &self.breaker, || self.attempt(texts.to_vec(), tenant)).await?
    }

    /// Waits for the API's rate limit, for a while: then the server may say no by itself.
    async fn pace(&self, batch: &[String]) {
        let tokens = self.embedder.tokens_upper_bound(batch);
        let mut waited = Duration::ZERO;
        while waited < LONGEST_PAUSE {
            let pause = self.embedder.pace(tokens).min(LONGEST_PAUSE.saturating_sub(waited));
            if pause.is_zero() {
                return;
            }
            tokio::time::sleep(pause).await;
            waited += pause;
        }
    }

    /// Reserve, call, settle. A denied budget is an answer (inner error), not a failure of the server.
    ///
    /// All that leaves for the API goes through here: documents, what a rebuild reads from the index, queries.
    async fn attempt(
        self: &Arc<Self>,
        mut texts: Vec<String>,
        tenant: Option<&str>,
    ) -> Result<Result<Embedded, GatewayError>, UpstreamError> {
        for text in &mut texts {
            if let Cow::Owned(redacted) = secrets::redact(text) {
                *text = redacted;
            }
        }
        let (this, tenant) = (Arc::clone(self), tenant.map(str::to_owned));
        tokio::spawn(async move { this.reserve_call_settle(&texts, tenant).await })
            .await
            .map_err(|error| unreadable(&error.to_string()))?
    }

    async fn reserve_call_settle(
        &self,
        texts: &[String],
        tenant: Option<String>,
    ) -> Result<Result<Embedded, GatewayError>, UpstreamError> {
        let request = ReserveRequest {
            id: Uuid::now_v7(),
            task_id: None,
            attempt: None,
            tenant,
            model: self.embedder.model().to_owned(),
            kind: CallKind::Embedding,
            tokens: self.embedder.tokens_upper_bound(texts),
            limits: self.limits,
        };
        let reservation = match self.ledger.reserve(&request).await {
            Ok(ReserveOutcome::Granted(reservation)) => reservation,
            Ok(ReserveOutcome::Denied(denial)) => return Ok(Err(GatewayError::BudgetExhausted(denial))),
            Err(error) => return Ok(Err(upstream(error).into())),
        };
        let reserved = reservation.tokens.0;
        let request_id = format!("embed.{}", Uuid::new_v4().simple());
        let answer = self.embedder.embed(texts, &request_id).await;
        let (closing, tokens) = match &answer {
            Ok(embeddings) => match embeddings.usage {
                Some(usage) => (Closing::Settled { usage }, usage.total().0),
                None => (Closing::Assumed, reserved),
            },
            Err(error) => match error.billed {
                Billed::Nothing => (Closing::Released, 0),
                Billed::Known(usage) => (Closing::Settled { usage }, usage.total().0),
                Billed::Unknown => (Closing::Assumed, reserved),
            },
        };
        self.metrics.embedding_tokens.inc_by(tokens);
        if let Err(error) = self.ledger.close(reservation, closing).await {
            // The reservation stays open and counts in full: never too little.
            tracing::error!(error = %error, tokens, "an embedding call could not be settled");
        }
        let vectors = answer.map_err(|error| error.error)?.vectors;
        let size = vectors.first().map(Vec::len).unwrap_or_default();
        let sound = |vector: &Vec<f32>| vector.len() == size && vector.iter().all(|value| value.is_finite());
        if vectors.len() != texts.len() || size == 0 || !vectors.iter().all(sound) {
            return Err(unreadable(&format!(
                "{} texts gave {} vectors of {size}",
                texts.len(),
                vectors.len()
            )));
        }
        Ok(Ok(Embedded { vectors, tokens }))
    }
}

/// Embeds queries: remembers their vectors, and puts those that come at the same time into one call.
///
/// A query that finds nobody ahead of it is sent at once. While calls are under way, others gather and
/// go together with the next one, so that no query waits for company, and many of them cost few calls.
pub(crate) struct QueryEmbedder {
    embedder: Arc<BookedEmbedder>,
    /// Vectors by text; they depend on no collection and no tenant. `None` with `CACHE_TTL=0`.
    vectors: Option<Cache<String, Arc<Vec<f32>>>>,
    waiting: mpsc::Sender<Waiting>,
    timeout: Duration,
    metrics: Metrics,
}

/// A query that waits for its vector.
struct Waiting {
    text: String,
    tenant: Option<String>,
    vector: oneshot::Sender<Result<Arc<Vec<f32>>, GatewayError>>,
}

impl QueryEmbedder {
    /// Starts the task that gathers queries; it ends with this.
    pub(crate) fn new(
        embedder: Arc<BookedEmbedder>,
        timeout: Duration,
        ttl: Duration,
        max_entries: u64,
        metrics: &Metrics,
    ) -> Self {
        let (waiting, queue) = mpsc::channel(MAX_WAITING);
        tokio::spawn(gather(Arc::clone(&embedder), timeout, queue));
        let vectors = || Cache::builder().max_capacity(max_entries).time_to_live(ttl).build();
        Self { embedder, vectors: (!ttl.is_zero()).then(vectors), waiting, timeout, metrics: metrics.clone() }
    }

    /// The model's name.
    pub(crate) fn model(&self) -> &str {
        self.embedder.model()
    }

    /// Forgets all vectors.
    pub(crate) fn forget(&self) {
        if let Some(vectors) = &self.vectors {
            vectors.invalidate_all();
        }
    }

    /// The vector of a query, paid for by the first tenant that asks for it.
    pub(crate) async fn embed(
        &self,
        text: &str,
        tenant: Option<&str>,
    ) -> Result<Arc<Vec<f32>>, GatewayError> {
        self.metrics.embedding_queries.inc();
        if let Some(vectors) = &self.vectors
            && let Some(vector) = vectors.get(text).await
        {
            return Ok(vector);
        }
        let (sender, vector) = oneshot::channel();
        let waiting = Waiting { text: text.to_owned(), tenant: tenant.map(str::to_owned), vector: sender };
        let busy =
            || UpstreamError::transient(Dependency::Embedder, "too many queries wait for their vectors");
        self.waiting.try_send(waiting).map_err(|_| busy())?;
        // It may wait for others' calls too.
        let vector = tokio::time::timeout(self.timeout, vector)
            .await
            .map_err(|_| too_slow(self.timeout))?
            .map_err(|_| unreadable("the embedding task ended"))??;
        if let Some(vectors) = &self.vectors {
            vectors.insert(text.to_owned(), Arc::clone(&vector)).await;
        }
        Ok(vector)
    }
}

async fn gather(embedder: Arc<BookedEmbedder>, timeout: Duration, mut queue: mpsc::Receiver<Waiting>) {
    let slots = Arc::new(Semaphore::new(QUERY_CALLS));
    let mut gathered = Vec::new();
    loop {
        // The slot first: what comes while all are taken goes together.
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
        if queue.recv_many(&mut gathered, MAX_BATCH_TEXTS).await == 0 {
            return;
        }
        let embedder = Arc::clone(&embedder);
        let batch = std::mem::take(&mut gathered);
        tokio::spawn(async move {
            let _slot = slot;
            for (tenant, batch) in by_tenant(batch) {
                embed_together(&embedder, tenant.as_deref(), timeout, batch).await;
            }
        });
    }
}

/// Each tenant pays for its own queries.
fn by_tenant(batch: Vec<Waiting>) -> BTreeMap<Option<String>, Vec<Waiting>> {
    let mut tenants: BTreeMap<Option<String>, Vec<Waiting>> = BTreeMap::new();
    for waiting in batch {
        // Who has gone needs no vector.
        if !waiting.vector.is_closed() {
            tenants.entry(waiting.tenant.clone()).or_default().push(waiting);
        }
    }
    tenants
}

async fn embed_together(
    embedder: &Arc<BookedEmbedder>,
    tenant: Option<&str>,
    timeout: Duration,
    batch: Vec<Waiting>,
) {
    let mut by_text: BTreeMap<String, Vec<Waiting>> = BTreeMap::new();
    for waiting in batch {
        by_text.entry(waiting.text.clone()).or_default().push(waiting);
    }
    let all: Vec<String> = by_text.keys().cloned().collect();
    let weigh = |text: &String| embedder.embedder.tokens_upper_bound(std::slice::from_ref(text)).0;
    for texts in batches(&all, weigh) {
        let result = embedder.embed_queries(texts.clone(), tenant, timeout).await;
        let mut vectors = result.map(|vectors| vectors.into_iter().map(Arc::new));
        for text in texts {
            let vector = match &mut vectors {
                Ok(vectors) => {
                    vectors.next().ok_or_else(|| GatewayError::from(unreadable("no vector for the query")))
                }
                Err(error) => Err(error.clone()),
            };
            for waiting in by_text.remove(&text).unwrap_or_default() {
                // Whoever waited may have gone.
                let _ = waiting.vector.send(vector.clone());
            }
        }
    }
}

/// Texts in the order they came, in calls of bounded size. A text that is too large goes alone.
fn batches(texts: &[String], weigh: impl Fn(&String) -> u64) -> Vec<Vec<String>> {
    let mut batches = Vec::new();
    let (mut start, mut tokens) = (0, 0);
    for (at, text) in texts.iter().enumerate() {
        let more = weigh(text);
        if at > start && (at - start == MAX_BATCH_TEXTS || tokens + more > MAX_BATCH_TOKENS) {
            batches.push(texts[start..at].to_vec());
            (start, tokens) = (at, 0);
        }
        tokens += more;
    }
    if start < texts.len() {
        batches.push(texts[start..].to_vec());
    }
    batches
}

fn upstream(error: LedgerError) -> UpstreamError {
    match error {
        LedgerError::Upstream(error) => error,
        // Fencing is for runs; an embedding call has none.
        LedgerError::Fenced { .. } => UpstreamError::transient(Dependency::Store, error),
    }
}

fn too_slow(timeout: Duration) -> UpstreamError {
    let millis = timeout.as_millis();
    UpstreamError::transient(
        Dependency::Embedder,
        format!("no answer in {millis} ms (QUERY_EMBEDDING_TIMEOUT_MILLISECONDS)"),
    )
}

fn unreadable(message: &str) -> UpstreamError {
    UpstreamError::transient(Dependency::Embedder, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_are_bounded_and_lose_nothing() {
        let texts: Vec<String> = (0..300_usize).map(|number| "x".repeat(number * 10)).collect();
        let weigh = |text: &String| text.len() as u64 * 20;
        let batches = batches(&texts, weigh);
        assert!(batches.iter().all(|batch| batch.len() <= MAX_BATCH_TEXTS));
        let fits = |batch: &Vec<String>| batch.iter().map(weigh).sum::<u64>() <= MAX_BATCH_TOKENS;
        assert!(batches.iter().all(|batch| batch.len() == 1 || fits(batch)));
        assert_eq!(batches.concat(), texts);
    }
}
