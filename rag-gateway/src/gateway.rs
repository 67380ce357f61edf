//! Starts and stops a gateway.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use atlas_shared::{
    Config, Dependency, Ledger, UpstreamError,
    gateway_api::{DocumentList, words_only},
    metrics::MetricsError,
    model::Embedder,
    openai::OpenAiEmbedder,
    ops::Checks,
    rerank::HttpReranker,
    resilience::{CircuitBreaker, RetryPolicy},
    serve::{self, ConnectionBounds},
};
use tokio::{net::TcpListener, task::JoinHandle, time::MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use crate::{
    cache::{AnswerCache, CacheConfig, RedisCache},
    chunk::Chunker,
    embed::{BookedEmbedder, QueryEmbedder},
    http::{self, App},
    index::{self, VectorIndex},
    indexing::{Indexer, document_list, mismatch},
    jobs::{self, Jobs},
    metrics::Metrics,
    repository::Sources,
    rerank::QueryReranker,
    search::{SearchConfig, Searcher},
    source::clones,
};

/// How often readiness looks at what the gateway depends on.
const CHECK_INTERVAL: Duration = Duration::from_secs(10);

/// Bound of one such look.
const CHECK_TIMEOUT: Duration = Duration::from_secs(5);

/// Bound of one call of the index for a query.
const INDEX_TIMEOUT: Duration = Duration::from_secs(15);

/// How long requests and jobs may go on after shutdown began.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(15);

/// Names of the checks that are no dependency.
const COLLECTION_CHECK: &str = "collection";

/// Why a gateway did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The address is taken, or not ours.
    #[error("cannot listen on {address}: {source}. Set GATEWAY_LISTEN to a free address of this machine")]
    Listen {
        /// `GATEWAY_LISTEN`.
        address: SocketAddr,
        /// What the system said.
        source: std::io::Error,
    },
    /// Something it needs is not there.
    #[error(transparent)]
    Upstream(#[from] UpstreamError),
    /// A mistake in our own metrics.
    #[error(transparent)]
    Metrics(#[from] MetricsError),
}

/// Finds the passages that matter; see [`Gateway::start`].
#[derive(Clone, Copy, Debug)]
pub struct Gateway;

/// A gateway that listens. Dropping it stops it roughly; [`RunningGateway::shutdown`] does it well.
#[must_use = "a gateway ends when this is dropped"]
#[derive(Debug)]
pub struct RunningGateway {
    /// Where it listens, with the port that was chosen.
    pub addr: SocketAddr,
    stop: CancellationToken,
    server: JoinHandle<()>,
    jobs: JoinHandle<()>,
    checks: JoinHandle<()>,
    index: IndexHandle,
}

/// Keeps the index for closing it.
struct IndexHandle(Arc<dyn VectorIndex>);

impl std::fmt::Debug for IndexHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("VectorIndex")
    }
}

impl Gateway {
    /// Opens the index, and listens. A Qdrant server or an embeddings API that is down does not stop
    /// the start: readiness is red, or search lexical, until it is back.
    pub async fn start(config: &Config, ledger: Arc<dyn Ledger>) -> Result<RunningGateway, StartError> {
        let embedder = match &config.openai {
            Some(openai) => {
                OpenAiEmbedder::new(openai)?.map(|embedder| Arc::new(embedder) as Arc<dyn Embedder>)
            }
            None => None,
        };
        Self::start_with(config, ledger, embedder).await
    }

    /// The same with an embedder of one's own.
    pub async fn start_with(
        config: &Config,
        ledger: Arc<dyn Ledger>,
        embedder: Option<Arc<dyn Embedder>>,
    ) -> Result<RunningGateway, StartError> {
        let address = config.gateway.listen;
        let listener =
            TcpListener::bind(address).await.map_err(|source| StartError::Listen { address, source })?;
        let addr = listener.local_addr().map_err(|source| StartError::Listen { address, source })?;
        let metrics = Metrics::new()?;
        let index = index::open(&config.gateway).await?;
        let stop = CancellationToken::new();
        let embedder = embedder.map(|embedder| {
            let (limits, resilience) = (config.limits, &config.resilience);
            Arc::new(BookedEmbedder::new(embedder, ledger, limits, resilience, &metrics, stop.clone()))
        });
        let indexer = Arc::new(Indexer::new(
            Arc::clone(&index),
            embedder.clone(),
            Chunker::new(config.gateway.chunk_tokens, config.gateway.chunk_overlap_tokens),
            config.gateway.bm25.into(),
            metrics.clone(),
        ));
        let default_collection = config.rag.collection.clone();
        let searcher = Arc::new(searcher(config, &index, embedder.clone(), &metrics)?);
        let sources = Arc::new(Sources::new(&config.gateway, config.data_dir.clone()));
        let (jobs, runner) = Jobs::new(
            jobs::store::open(config).await?,
            config.gateway.max_index_jobs,
            Arc::clone(&indexer),
            Arc::clone(&sources),
            (RetryPolicy::new(&config.resilience), config.gateway.index_job_patience),
            stop.clone(),
        );
        // Of gateways that were killed over a clone; nothing waits for it.
        tokio::task::spawn_blocking(clones::sweep);
        let checks = Checks::new();
        let watcher = Watcher {
            checks: checks.clone(),
            index: Arc::clone(&index),
            embedder,
            searcher: Arc::clone(&searcher),
            collection: default_collection.clone(),
        };
        watcher.look().await;
        let app = App::new(
            &config.gateway,
            default_collection,
            Arc::clone(&index),
            searcher,
            indexer,
            jobs,
            sources,
            metrics,
        );
        if config.gateway.api_keys.is_empty() && !addr.ip().is_loopback() {
            tracing::warn!(%addr, "API_KEYS is not set: the gateway is open to whoever reaches its port");
        }
        tracing::info!(%addr, "gateway listens");
        Ok(RunningGateway {
            addr,
            server: tokio::spawn(listen(
                listener,
                http::router(Arc::new(app), checks),
                config.gateway.connections,
                stop.clone(),
            )),
            jobs: tokio::spawn(runner.run()),
            checks: tokio::spawn(watcher.run(stop.clone())),
            stop,
            index: IndexHandle(index),
        })
    }
}

/// What `GET /v1/documents` would say of a repository, without a gateway: as long as an embedded index need not be
/// opened for that. `None`: start a gateway and ask it. Blocking.
///
/// For the process that may use the index: what another one writes meanwhile is not in it.
pub fn documents_without_gateway(config: &Config, collection: &str, repo: &str) -> Option<DocumentList> {
    let (meta, mut documents) = index::unopened(&config.gateway, collection)?;
    documents.retain(|document| document.repo == repo && document.tenant.is_empty());
    let model = config.openai.as_ref().and_then(|openai| openai.embedding_model.as_deref());
    let chunker = Chunker::new(config.gateway.chunk_tokens, config.gateway.chunk_overlap_tokens);
    Some(document_list(collection, documents, Some(&meta), chunker, model))
}

/// The search pipeline with everything that this configuration gives it.
fn searcher(
    config: &Config,
    index: &Arc<dyn VectorIndex>,
    embedder: Option<Arc<BookedEmbedder>>,
    metrics: &Metrics,
) -> Result<Searcher, StartError> {
    let gateway = &config.gateway;
    let (ttl, max_entries) = (gateway.cache_ttl, gateway.cache_max_entries);
    let reranker = match &gateway.rerank {
        Some(rerank) => {
            let http = Arc::new(HttpReranker::new(rerank)?);
            Some(QueryReranker::new(http, rerank, &config.resilience, metrics))
        }
        None => None,
    };
    let redis = match &gateway.redis_url {
        Some(url) if !ttl.is_zero() => Some(Arc::new(RedisCache::connect(url, &config.resilience, metrics)?)),
        _ => None,
    };
    let cache = CacheConfig { ttl, stale: gateway.cache_stale, max_entries };
    Ok(Searcher::new(
        Arc::clone(index),
        CircuitBreaker::new(Dependency::VectorIndex, &config.resilience).with_metrics(&metrics.upstream),
        embedder.map(|embedder| {
            QueryEmbedder::new(embedder, gateway.query_embedding_timeout, ttl, max_entries, metrics)
        }),
        reranker,
        (!ttl.is_zero()).then(|| AnswerCache::new(cache, redis, metrics.clone())),
        metrics.clone(),
        SearchConfig {
            default_collection: config.rag.collection.clone(),
            default_top_k: config.rag.top_k,
            max_top_k: gateway.max_top_k,
            default_threshold: config.rag.relevancy_threshold,
            passage_tokens: gateway.passage_tokens,
            secondary_weight: gateway.secondary_weight,
            // A request must have time left for an answer from the cache.
            timeout: (gateway.timeout / 2).min(INDEX_TIMEOUT),
        },
    ))
}

impl RunningGateway {
    /// Takes no more requests, finishes those under way, and lets go of the index.
    pub async fn shutdown(mut self) {
        self.stop.cancel();
        for task in [&mut self.server, &mut self.jobs, &mut self.checks] {
            if tokio::time::timeout(DRAIN_TIMEOUT, &mut *task).await.is_err() {
                task.abort();
            }
        }
        self.index.0.close().await;
        tracing::info!("gateway stopped");
    }
}

impl Drop for RunningGateway {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

async fn listen(
    listener: TcpListener,
    router: axum::Router,
    bounds: ConnectionBounds,
    stop: CancellationToken,
) {
    if let Err(error) = serve::serve(listener, router, bounds, stop.cancelled_owned()).await {
        tracing::error!(error = %error, error_code = "listener_failed", "the gateway's listener failed");
    }
}

/// Keeps readiness up to date.
struct Watcher {
    checks: Checks,
    index: Arc<dyn VectorIndex>,
    embedder: Option<Arc<BookedEmbedder>>,
    searcher: Arc<Searcher>,
    collection: String,
}

impl Watcher {
    async fn run(self, stop: CancellationToken) {
        let mut again = tokio::time::interval(CHECK_INTERVAL);
        again.set_missed_tick_behavior(MissedTickBehavior::Delay);
        again.reset();
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                _ = again.tick() => self.look().await,
                () = self.embedder_changed() => self.look_at_embedder().await,
            }
        }
    }

    /// Without an embedder: never.
    async fn embedder_changed(&self) {
        match &self.embedder {
            Some(embedder) => embedder.changed().await,
            None => std::future::pending().await,
        }
    }

    async fn look(&self) {
        let index = tokio::time::timeout(CHECK_TIMEOUT, self.index.check()).await.unwrap_or_else(|_| {
            Err(UpstreamError::transient(Dependency::VectorIndex, "no answer to the health check"))
        });
        self.checks.report(Dependency::VectorIndex, &index);
        if index.is_ok()
            && let Ok(Err(error)) = tokio::time::timeout(CHECK_TIMEOUT, self.index.has_room()).await
        {
            // Searches go on.
            self.checks.degraded(Dependency::VectorIndex.as_str(), error.to_string());
        }
        self.look_at_embedder().await;
        self.look_at_helpers().await;
        if index.is_ok() {
            self.searcher.follow_epoch().await;
            self.look_at_collection().await;
        }
    }

    /// Reranker and shared cache: answers are worse or slower without them, so never red.
    async fn look_at_helpers(&self) {
        match self.searcher.check_reranker() {
            Some(Err(error)) => self
                .checks
                .degraded(Dependency::Reranker.as_str(), format!("answers are unreranked for now: {error}")),
            Some(Ok(())) => self.checks.ok(Dependency::Reranker.as_str(), "ok"),
            None => {}
        }
        match self.searcher.check_shared_cache().await {
            Some(Err(error)) => self.checks.degraded(
                Dependency::Cache.as_str(),
                format!("each replica has its own cache only: {error}. Its address is in REDIS_URL"),
            ),
            Some(Ok(())) => self.checks.ok(Dependency::Cache.as_str(), "ok"),
            None => {}
        }
    }

    /// Search works without embeddings, lexically, and says so: never red.
    async fn look_at_embedder(&self) {
        let name = Dependency::Embedder.as_str();
        match &self.embedder {
            None => self.checks.degraded(
                name,
                "search is lexical: no embedding model is configured (OPENAI_API_KEY or OPENAI_BASE_URL, and OPENAI_EMBEDDING_MODEL)",
            ),
            Some(embedder) => match tokio::time::timeout(CHECK_TIMEOUT, embedder.trouble()).await {
                Ok(Some(error)) => {
                    self.checks.degraded(name, format!("search is lexical for now: {error}"));
                }
                // A ledger that hangs is no news: queries will tell.
                Ok(None) | Err(_) => self.checks.ok(name, "ok"),
            },
        }
    }

    /// The default collection must fit the configured model.
    async fn look_at_collection(&self) {
        match tokio::time::timeout(CHECK_TIMEOUT, self.index.info(&self.collection)).await {
            Ok(Ok(None)) => self
                .checks
                .ok(COLLECTION_CHECK, format!("{} is empty: run `atlas index PATH`", self.collection)),
            Ok(Ok(Some(state))) => {
                let model = self.embedder.as_ref().map(|embedder| embedder.model());
                // Where no model is configured, the embedder's own check tells.
                let built_with = state.meta.embedding_model.as_deref();
                let advice = model.and_then(|_| words_only(&self.collection, built_with, model));
                match (mismatch(&self.collection, &state.meta, model), advice) {
                    (Some(error), _) => self.checks.failed(COLLECTION_CHECK, error.to_string()),
                    (None, Some(advice)) => self.checks.degraded(COLLECTION_CHECK, advice),
                    (None, None) => self
                        .checks
                        .ok(COLLECTION_CHECK, format!("{} chunks in {}", state.chunks, self.collection)),
                }
            }
            // The index's own check tells.
            Ok(Err(_)) | Err(_) => {}
        }
    }
}
