//! What every part of a worker shares.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use atlas_shared::{
    Config, Tokens, UpstreamError, WorkerId,
    gateway_client::GatewayClient,
    message::Answer,
    resilience::{CircuitBreaker, CircuitState, RetryPolicy},
    trace_context::{TRACEPARENT, TraceParent},
};
use bytes::Bytes;
use tokio::sync::{Notify, Semaphore};

use crate::{
    busy::Busy, call::ModelCalls, cancels::Running, gate::Gate, limiter::Limiter, metrics::Metrics,
    outbox::Outbox, queue::ResultPublisher, store::RunStore,
};

/// What every part of a worker shares. One a worker, behind an `Arc`.
pub(crate) struct Context {
    /// All settings.
    pub(crate) config: Config,
    /// Who we are, in leases.
    pub(crate) worker: WorkerId,
    /// Short name of the topic of answers.
    pub(crate) topic_out: String,
    /// Where the truth is.
    pub(crate) store: Arc<dyn RunStore>,
    /// Where messages go out.
    pub(crate) publisher: Arc<dyn ResultPublisher>,
    /// Sends finished answers.
    pub(crate) outbox: Outbox,
    /// Where passages come from.
    pub(crate) gateway: GatewayClient,
    /// The gateway's circuit.
    pub(crate) gateway_breaker: Arc<CircuitBreaker>,
    /// The model; `None`: the offline drafter writes.
    pub(crate) calls: Option<ModelCalls>,
    /// When store and gateway calls are tried again.
    pub(crate) retry: RetryPolicy,
    /// How many runs at once.
    pub(crate) limiter: Limiter,
    /// Whether runs may start.
    pub(crate) gate: Gate,
    /// Woken when there may be something to sweep now (outbox, budget, due runs).
    pub(crate) sweep_now: Notify,
    /// How many runs are at work, so that not too many are started at once.
    pub(crate) busy: Busy,
    /// Which runs are at work, so that they can be stopped when they are cancelled.
    pub(crate) running: Running,
    /// Places for runs whose answer is there and not stored yet: see [`MAX_AT_THE_DESK`].
    pub(crate) desk: Arc<Semaphore>,
    /// Counters.
    pub(crate) metrics: Arc<Metrics>,
    /// The limit a run in force, as the last sweep read it.
    pub(crate) run_limit: AtomicU64,
    /// Progress messages on their way, bounded.
    pub(crate) progress: Arc<Semaphore>,
}

/// Answers that are read, rendered and stored at once. Work on an answer takes a hundred times its size; when
/// many come together, the others wait as they came.
pub(crate) const MAX_AT_THE_DESK: usize = 48;

/// Progress messages on their way at once; more are dropped, which loses nothing.
pub(crate) const MAX_PROGRESS: usize = 256;

impl Context {
    /// The limit a run in force: the fleet's, or the configured one.
    pub(crate) fn run_limit(&self) -> Tokens {
        Tokens(self.run_limit.load(Ordering::Relaxed))
    }

    /// True while a dependency that runs wait for is down for everybody.
    pub(crate) fn outage(&self) -> bool {
        let open = |breaker: &CircuitBreaker| breaker.state() != CircuitState::Closed;
        open(&self.gateway_breaker) || self.calls.as_ref().is_some_and(|calls| open(&calls.breaker))
    }

    /// Publishes a progress message without waiting for it.
    pub(crate) fn publish_soon(self: &Arc<Self>, answer: Answer, trace: TraceParent) {
        let Ok(permit) = Arc::clone(&self.progress).try_acquire_owned() else { return };
        let context = Arc::clone(self);
        tokio::spawn(async move {
            if let Err(error) = context.publish(&answer, trace).await {
                tracing::debug!(task_id = %answer.task_id, error = %error, "progress was not published");
            }
            drop(permit);
        });
    }

    /// Publishes a message that need not survive a crash (progress, answers to commands).
    pub(crate) async fn publish(&self, answer: &Answer, trace: TraceParent) -> Result<(), UpstreamError> {
        let data = serde_json::to_vec(answer).map_err(|error| {
            UpstreamError::permanent(atlas_shared::Dependency::Queue, "not_serialisable", error)
        })?;
        self.publisher
            .publish(&self.topic_out, Bytes::from(data), attributes(answer, trace))
            .await
            .map(|_| ())
    }
}

/// The attributes of a message, `traceparent` included.
pub(crate) fn attributes(answer: &Answer, trace: TraceParent) -> Vec<(String, String)> {
    let mut attributes = answer.attributes();
    attributes.push((TRACEPARENT.to_owned(), trace.child().to_string()));
    attributes
}
