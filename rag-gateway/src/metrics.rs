//! What the gateway counts.

use atlas_shared::metrics::{CALL_BUCKETS, MetricsError, Registry, UpstreamMetrics};
use prometheus::{HistogramVec, IntCounter, IntCounterVec};

use crate::cache::Degraded;

/// Stages of a query.
const STAGES: [&str; 6] = ["embed", "search", "rank", "rerank", "join", "total"];

/// All metrics of one gateway.
#[derive(Clone, Debug)]
pub(crate) struct Metrics {
    pub(crate) registry: Registry,
    /// `rag_query_seconds{stage}`: [`STAGES`].
    pub(crate) query_seconds: HistogramVec,
    /// `rag_cache_hits_total`.
    pub(crate) cache_hits: IntCounter,
    /// `rag_cache_misses_total`.
    pub(crate) cache_misses: IntCounter,
    /// `rag_cache_shared_hits_total`: of the hits, those from Redis.
    pub(crate) cache_shared_hits: IntCounter,
    /// `rag_cache_joined_total`: queries that waited for an equal one.
    pub(crate) cache_joined: IntCounter,
    /// `rag_cache_errors_total`: calls of Redis that failed.
    pub(crate) cache_errors: IntCounter,
    /// `rag_embedding_queries_total`: queries that needed a vector.
    pub(crate) embedding_queries: IntCounter,
    /// `rag_embedding_query_calls_total`: calls that were made for them.
    pub(crate) embedding_query_calls: IntCounter,
    /// `rag_index_chunks_total`: chunks written.
    pub(crate) index_chunks: IntCounter,
    /// `rag_index_documents_total{outcome}`.
    pub(crate) index_documents: IntCounterVec,
    /// `rag_embedding_tokens_total`: tokens billed for embeddings.
    pub(crate) embedding_tokens: IntCounter,
    /// `rag_errors_total{type}`: requests that were answered with an error.
    pub(crate) errors: IntCounterVec,
    /// `rag_degraded_total{reason}`: answers that are less than they could be.
    pub(crate) degraded: IntCounterVec,
    /// `rag_requests_total{route,status}`.
    pub(crate) requests: IntCounterVec,
    /// `atlas_retries_total`, `atlas_circuit_open`.
    pub(crate) upstream: UpstreamMetrics,
}

impl Metrics {
    /// Registers them in a registry of their own.
    pub(crate) fn new() -> Result<Self, MetricsError> {
        let registry = Registry::new();
        let metrics = Self {
            query_seconds: registry.histograms(
                "rag_query_seconds",
                "Time of a query by stage.",
                &["stage"],
                CALL_BUCKETS,
            )?,
            cache_hits: registry.counter("rag_cache_hits_total", "Queries answered from the cache.")?,
            cache_misses: registry.counter("rag_cache_misses_total", "Queries that had to be searched.")?,
            cache_shared_hits: registry
                .counter("rag_cache_shared_hits_total", "Queries answered from Redis.")?,
            cache_joined: registry.counter(
                "rag_cache_joined_total",
                "Queries that waited for an equal one under way instead of being searched.",
            )?,
            cache_errors: registry
                .counter("rag_cache_errors_total", "Calls of Redis that failed or were left out.")?,
            embedding_queries: registry
                .counter("rag_embedding_queries_total", "Queries that needed their embedding.")?,
            embedding_query_calls: registry
                .counter("rag_embedding_query_calls_total", "Calls of the embeddings API for queries.")?,
            index_chunks: registry.counter("rag_index_chunks_total", "Chunks written to the index.")?,
            index_documents: registry.counters(
                "rag_index_documents_total",
                "Documents sent for indexing, by what happened to them.",
                &["outcome"],
            )?,
            embedding_tokens: registry
                .counter("rag_embedding_tokens_total", "Tokens billed for embeddings.")?,
            errors: registry.counters("rag_errors_total", "Requests answered with an error.", &["type"])?,
            degraded: registry.counters(
                "rag_degraded_total",
                "Answers that are less than they could be.",
                &["reason"],
            )?,
            requests: registry.counters("rag_requests_total", "Requests.", &["route", "status"])?,
            upstream: UpstreamMetrics::new(&registry)?,
            registry,
        };
        // Present from the start, so that rates and alerts see them.
        for reason in Degraded::ALL {
            metrics.degraded.with_label_values(&[reason.as_str()]);
        }
        for stage in STAGES {
            metrics.query_seconds.with_label_values(&[stage]);
        }
        Ok(metrics)
    }
}
