//! Puts a worker together, keeps its parts running, and takes it down without losing anything.

use std::{future::Future, net::SocketAddr, sync::Arc, sync::atomic::AtomicU64, time::Duration};

use atlas_shared::{
    Config, ConfigErrors, Dependency, UpstreamError, WorkerId,
    config::QueueConfig,
    gateway_client::GatewayClient,
    metrics::{MetricsError, Registry, UpstreamMetrics},
    model::ChatModel,
    openai::OpenAiChat,
    ops::{self, Checks},
    resilience::{CircuitBreaker, CircuitState, RetryPolicy},
    serve::{self, ConnectionBounds},
};
use tokio::{
    net::TcpListener,
    sync::{Notify, Semaphore},
    task::JoinHandle,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    busy::Busy,
    call::ModelCalls,
    cancels::{self, Running},
    context::{Context, MAX_AT_THE_DESK, MAX_PROGRESS},
    crash::crash_point,
    documents,
    gate::{Gate, Reason},
    intake,
    limiter::Limiter,
    metrics::Metrics,
    outbox,
    queue::{self, Queues, RequestQueue, Topics},
    store, sweep,
};

/// How long acks, marks and the probes' server may take to finish once all work has ended.
const FLUSH_BOUND: Duration = Duration::from_secs(10);
/// Pause between attempts to reach a dependency at the start.
const CONNECT_PAUSE: Duration = Duration::from_secs(1);

/// Why a worker did not start. Each message says what to change.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A setting is wrong.
    #[error(transparent)]
    Config(#[from] ConfigErrors),
    /// A dependency refuses us, and only a person can change that.
    #[error(transparent)]
    Upstream(#[from] UpstreamError),
    /// The address of probes and metrics is not to be had.
    #[error("cannot listen on {address}: {source}. Change WORKER_LISTEN, or stop what uses the port")]
    Listen {
        /// `WORKER_LISTEN`.
        address: SocketAddr,
        /// Why.
        source: std::io::Error,
    },
    /// A mistake of this build.
    #[error(transparent)]
    Metrics(#[from] MetricsError),
}

/// Starts workers.
#[derive(Debug)]
pub struct Worker;

/// A worker at work.
pub struct RunningWorker {
    /// Where probes and metrics are.
    pub addr: SocketAddr,
    /// Its metrics.
    pub registry: Registry,
    /// Its probes.
    pub checks: Checks,
    context: Arc<Context>,
    queues: Queues,
    /// Runs and deliveries.
    tasks: TaskTracker,
    /// Intake, sweeps, prober.
    loops: TaskTracker,
    marker: JoinHandle<()>,
    server: JoinHandle<()>,
    /// No new work.
    stop: CancellationToken,
    /// Running work ends now.
    kill: CancellationToken,
    /// The probes' server ends.
    close: CancellationToken,
}

impl std::fmt::Debug for RunningWorker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RunningWorker").field("addr", &self.addr).finish_non_exhaustive()
    }
}

impl Worker {
    /// Starts a worker. Probes answer at once; while a dependency is down this waits for it, red; a
    /// dependency that refuses us for a reason that only a person can change is an error.
    pub async fn start(config: &Config) -> Result<RunningWorker, StartError> {
        let registry = Registry::new();
        let metrics = Metrics::new(&registry)?;
        let upstream_metrics = UpstreamMetrics::new(&registry)?;
        let checks = Checks::new();
        for dependency in [Dependency::Queue, Dependency::Store, Dependency::Gateway, Dependency::Model] {
            checks.expect(dependency.as_str());
        }

        let close = CancellationToken::new();
        let address = config.worker.listen;
        let listener =
            TcpListener::bind(address).await.map_err(|source| StartError::Listen { address, source })?;
        let addr = listener.local_addr().map_err(|source| StartError::Listen { address, source })?;
        let server = tokio::spawn(probes(listener, checks.clone(), registry.clone(), close.clone()));
        // Whatever fails from here on must not leave the port taken.
        let server_guard = close.clone().drop_guard();

        let store = connect(&checks, Dependency::Store, || async {
            let store = store::open(config).await?;
            store.check().await?;
            Ok(store)
        })
        .await?;
        let queues = connect(&checks, Dependency::Queue, || async {
            let queues = queue::open(config).await?;
            queues.requests.check().await?;
            Ok(queues)
        })
        .await?;

        let retry = RetryPolicy::new(&config.resilience);
        let limiter = Limiter::new(config.worker.max_in_flight);
        let gate = Gate::new(Arc::clone(&metrics));
        let busy = Busy::new();
        let breaker = |dependency| {
            Arc::new(CircuitBreaker::new(dependency, &config.resilience).with_metrics(&upstream_metrics))
        };
        let rag_url = config.rag.url.clone().ok_or_else(|| {
            UpstreamError::misconfigured(
                Dependency::Gateway,
                "RAG_URL",
                "is not set",
                "set it to the gateway's address, such as http://rag-gateway:8501",
            )
        })?;
        let gateway = GatewayClient::new(&rag_url, config.rag.api_key.clone(), config.rag.timeout)?;

        let calls = match &config.openai {
            Some(openai) => {
                let model = OpenAiChat::new(openai)?;
                // A dead API is waited for later; a wrong key or an unknown model is not.
                match model.check().await {
                    Err(error) if !error.is_transient() => return Err(error.into()),
                    result => checks.report(Dependency::Model, &result),
                }
                Some(ModelCalls {
                    model: Arc::new(model),
                    store: Arc::clone(&store),
                    chain: openai.models.clone(),
                    retry: retry.clone(),
                    breaker: breaker(Dependency::Model),
                    limits: config.limits,
                    metrics: Arc::clone(&metrics),
                    gate: gate.clone(),
                    busy: busy.clone(),
                })
            }
            None => {
                checks.ok(
                    Dependency::Model.as_str(),
                    "no model is configured (OPENAI_API_KEY, OPENAI_BASE_URL): the offline drafter writes",
                );
                tracing::warn!("no language model is configured: the offline drafter writes specs");
                None
            }
        };

        let topic_out = Topics::of(config).answers;
        let (outbox, marker) =
            outbox::new(Arc::clone(&store), Arc::clone(&queues.publisher), topic_out.clone(), retry.clone());
        let context = Arc::new(Context {
            config: config.clone(),
            worker: WorkerId::of_this_process(),
            topic_out,
            store,
            publisher: Arc::clone(&queues.publisher),
            outbox,
            gateway,
            gateway_breaker: breaker(Dependency::Gateway),
            calls,
            retry,
            limiter,
            gate,
            sweep_now: Notify::new(),
            busy,
            running: Running::new(metrics.in_flight.clone()),
            desk: Arc::new(Semaphore::new(MAX_AT_THE_DESK)),
            metrics,
            run_limit: AtomicU64::new(config.limits.run.0),
            progress: Arc::new(Semaphore::new(MAX_PROGRESS)),
        });

        let running = RunningWorker {
            addr,
            registry,
            checks,
            context,
            queues,
            tasks: TaskTracker::new(),
            loops: TaskTracker::new(),
            marker: tokio::spawn(marker.run()),
            server,
            stop: CancellationToken::new(),
            kill: CancellationToken::new(),
            close,
        };
        running.spawn_loops();
        // From here on `drain` closes the server.
        let _ = server_guard.disarm();
        tracing::info!(worker = %running.context.worker, address = %addr, "worker started");
        Ok(running)
    }
}

impl RunningWorker {
    fn spawn_loops(&self) {
        let (requests_from, dead_letters_from, documents_from) = sources(&self.context.config);
        self.supervise(
            "intake",
            intake::run(
                Arc::clone(&self.context),
                Arc::clone(&self.queues.requests),
                requests_from,
                self.tasks.clone(),
                self.stop.clone(),
                self.kill.clone(),
            ),
        );
        if let Some(dead_letters) = &self.queues.dead_letters {
            self.supervise(
                "dead-letter reader",
                intake::read_dead_letters(
                    Arc::clone(&self.context),
                    Arc::clone(dead_letters),
                    dead_letters_from,
                    self.stop.clone(),
                    self.kill.clone(),
                ),
            );
        }
        if let Some(documents) = &self.queues.documents {
            self.supervise(
                "docs_added reader",
                documents::run(
                    Arc::clone(&self.context),
                    Arc::clone(documents),
                    documents_from,
                    self.stop.clone(),
                    self.kill.clone(),
                ),
            );
        }
        self.supervise(
            "sweep",
            sweep::run(Arc::clone(&self.context), self.tasks.clone(), self.stop.clone(), self.kill.clone()),
        );
        self.supervise("cancels", cancels::run(Arc::clone(&self.context), self.stop.clone()));
        self.supervise(
            "prober",
            probe(
                Arc::clone(&self.context),
                self.queues().cloned().collect(),
                self.checks.clone(),
                self.stop.clone(),
            ),
        );
    }

    /// All that this worker pulls from.
    fn queues(&self) -> impl Iterator<Item = &Arc<dyn RequestQueue>> {
        std::iter::once(&self.queues.requests).chain(&self.queues.dead_letters).chain(&self.queues.documents)
    }

    /// Runs a loop that must not end before the worker does: if it does, the process asks to be
    /// restarted.
    fn supervise(&self, name: &'static str, work: impl Future<Output = ()> + Send + 'static) {
        let (checks, stop) = (self.checks.clone(), self.stop.clone());
        self.loops.spawn(async move {
            let ended = tokio::spawn(work).await;
            if !stop.is_cancelled() {
                let why = ended.err().map_or_else(String::new, |error| format!(": {error}"));
                tracing::error!(part = name, error_code = "part_ended", "a part of the worker ended{why}");
                checks.dead(format!("the {name} ended{why}"));
            }
        });
    }

    /// Takes the worker down: no new work at once; running work may go on up to
    /// `DRAIN_TIMEOUT_SECONDS`, then it is given back; acks and marks are flushed.
    pub async fn drain(self) {
        let config = &self.context.config.worker;
        tracing::info!(in_flight = self.context.running.len(), "draining");
        self.checks.failed("intake", "the worker is shutting down");
        self.context.gate.set(Reason::Draining, true);
        self.stop.cancel();
        for queue in self.queues() {
            queue.drain().await;
        }
        crash_point!("draining");
        self.tasks.close();
        if tokio::time::timeout(config.drain_timeout, self.tasks.wait()).await.is_err() {
            tracing::warn!(
                in_flight = self.context.running.len(),
                "the drain is over; what still runs is given back"
            );
            self.kill.cancel();
            let _ = tokio::time::timeout(FLUSH_BOUND, self.tasks.wait()).await;
        }
        self.loops.close();
        let _ = tokio::time::timeout(FLUSH_BOUND, self.loops.wait()).await;
        crash_point!("drained");
        for queue in self.queues() {
            if let Err(error) = queue.flush(FLUSH_BOUND).await {
                tracing::warn!(error = %error, "acks were not flushed; those messages will come again");
            }
        }
        // The marker ends with the last outbox handle.
        drop(self.context);
        if tokio::time::timeout(FLUSH_BOUND, self.marker).await.is_err() {
            tracing::warn!("marks were not flushed; those answers will be sent again");
        }
        self.close.cancel();
        let _ = tokio::time::timeout(FLUSH_BOUND, self.server).await;
        tracing::info!("drained");
    }
}

/// Reaches a dependency, however long it takes; only a refusal that a person must mend is an error.
async fn connect<T, F, Fut>(checks: &Checks, dependency: Dependency, mut open: F) -> Result<T, UpstreamError>
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Result<T, UpstreamError>>,
{
    loop {
        match open().await {
            Ok(opened) => {
                checks.report(dependency, &Ok(()));
                return Ok(opened);
            }
            Err(error) if error.is_transient() => {
                tracing::warn!(%dependency, error = %error, "not reachable yet, trying again");
                checks.report(dependency, &Err(error));
                tokio::time::sleep(CONNECT_PAUSE).await;
            }
            Err(error) => return Err(error),
        }
    }
}

async fn probes(listener: TcpListener, checks: Checks, registry: Registry, close: CancellationToken) {
    let served =
        serve::serve(listener, ops::router(checks, registry), ConnectionBounds::OPS, close.cancelled_owned())
            .await;
    if let Err(error) = served {
        tracing::error!(error = %error, error_code = "probes_ended", "probes and metrics ended");
    }
}

/// Looks at every dependency from time to time: readiness, and the way back from an open circuit.
async fn probe(
    context: Arc<Context>,
    queues: Vec<Arc<dyn RequestQueue>>,
    checks: Checks,
    stop: CancellationToken,
) {
    let interval = context.config.resilience.circuit_open;
    loop {
        checks.report(Dependency::Store, &context.store.check().await);
        let mut checked = Ok(());
        for queue in &queues {
            // One line for all: a healthy dead-letter queue must not hide a broken request queue.
            checked = checked.and(queue.check().await);
            match queue.backlog().await {
                Ok(backlog) => context.metrics.backlog(&backlog),
                Err(error) => tracing::debug!(error = %error, "the backlog could not be counted"),
            }
        }
        checks.report(Dependency::Queue, &checked);
        context.gate.set(Reason::Dependency(Dependency::Queue), checked.is_err());
        let gateway = context.gateway.ready().await;
        match (&gateway, context.config.rag.fail_open) {
            (Err(error), true) => checks.degraded(
                Dependency::Gateway.as_str(),
                format!("{error}; specs are written without passages (RAG_FAIL_OPEN=true)"),
            ),
            _ => checks.report(Dependency::Gateway, &gateway),
        }
        if !context.config.rag.fail_open {
            context.gate.set(Reason::Dependency(Dependency::Gateway), gateway.is_err());
        }
        if let Some(calls) = &context.calls {
            let result = calls.model.check().await;
            let circuit_may_close =
                calls.breaker.state() == CircuitState::Closed || calls.breaker.wait().is_zero();
            if result.is_ok() && circuit_may_close {
                // The next run is the probe that closes the circuit.
                context.gate.set(Reason::Dependency(Dependency::Model), false);
            }
            match calls.breaker.cause() {
                Some(cause) if calls.breaker.state() != CircuitState::Closed => {
                    checks.report(Dependency::Model, &Err(cause));
                }
                _ => checks.report(Dependency::Model, &result),
            }
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(interval) => {}
        }
    }
}

/// Names of where requests, dead letters and `docs_added` come from, for `dead_letters.source`.
fn sources(config: &Config) -> (String, String, String) {
    match &config.queue {
        QueueConfig::PubSub(pubsub) => {
            (pubsub.subscription.clone(), pubsub.dlq_subscription.clone(), pubsub.docs_subscription.clone())
        }
        QueueConfig::Embedded(_) => {
            ("architect_in-atlas".to_owned(), "architect_dlq-atlas".to_owned(), "docs_added-atlas".to_owned())
        }
    }
}
