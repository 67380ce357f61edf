//! Reranking the best candidates of a query, within a bound of time, and doing without.

use std::{sync::Arc, time::Duration};

use atlas_shared::{
    Dependency, UpstreamError,
    config::{RerankConfig, ResilienceConfig},
    rerank::Reranker,
    resilience::CircuitBreaker,
    secrets,
};
use futures::future::try_join_all;

use crate::{fusion::Fused, metrics::Metrics};

/// Texts in one call: what Text Embeddings Inference takes without being told otherwise.
const BATCH: usize = 32;

/// Calls at once, for one query.
const CONCURRENCY: usize = 4;

/// A reranker with its bounds.
pub(crate) struct QueryReranker {
    reranker: Arc<dyn Reranker>,
    breaker: CircuitBreaker,
    candidates: usize,
    timeout: Duration,
}

impl QueryReranker {
    pub(crate) fn new(
        reranker: Arc<dyn Reranker>,
        config: &RerankConfig,
        resilience: &ResilienceConfig,
        metrics: &Metrics,
    ) -> Self {
        Self {
            reranker,
            breaker: CircuitBreaker::new(Dependency::Reranker, resilience).with_metrics(&metrics.upstream),
            candidates: config.candidates,
            timeout: config.timeout,
        }
    }

    pub(crate) fn model(&self) -> &str {
        self.reranker.model()
    }

    /// Why calls are not made at the moment; `None`: they are.
    pub(crate) fn trouble(&self) -> Option<UpstreamError> {
        self.breaker.cause()
    }

    /// Orders the first candidates by the reranker's scores, which become theirs; the rest follows as it
    /// was. Equal scores keep their order. After a failure nothing has changed.
    pub(crate) async fn rerank(
        &self,
        query: &str,
        top_k: usize,
        fused: &mut [Fused],
    ) -> Result<(), UpstreamError> {
        let count = fused.len().min(self.candidates.max(top_k));
        if count == 0 {
            return Ok(());
        }
        // They leave for somebody else's server.
        let harmless = |text: &str| secrets::redact(text).into_owned();
        let texts: Vec<String> =
            fused[..count].iter().map(|fused| harmless(&fused.hit.record.contextual_text())).collect();
        let query = &*harmless(query);
        let permit = self.breaker.try_acquire()?;
        let result =
            tokio::time::timeout(self.timeout, self.scores(query, &texts)).await.unwrap_or_else(|_| {
                let millis = self.timeout.as_millis();
                Err(UpstreamError::transient(
                    Dependency::Reranker,
                    format!("no answer in {millis} ms (RERANK_TIMEOUT_MILLISECONDS)"),
                ))
            });
        let scores = permit.done(result)?;
        let worst = scores.iter().copied().fold(f32::INFINITY, f32::min);
        for (fused, score) in fused.iter_mut().zip(&scores) {
            fused.score = f64::from(*score);
        }
        fused[..count].sort_by(|a, b| b.score.total_cmp(&a.score));
        for rest in &mut fused[count..] {
            // Fused scores are below 1: all of these come after all of those.
            rest.score += f64::from(worst) - 1.0;
        }
        Ok(())
    }

    async fn scores(&self, query: &str, texts: &[String]) -> Result<Vec<f32>, UpstreamError> {
        let mut scores = Vec::with_capacity(texts.len());
        for round in texts.chunks(BATCH * CONCURRENCY) {
            let batches: Vec<Vec<&str>> =
                round.chunks(BATCH).map(|batch| batch.iter().map(String::as_str).collect()).collect();
            let calls: Vec<_> = batches.iter().map(|batch| self.reranker.scores(query, batch)).collect();
            scores.extend(try_join_all(calls).await?);
        }
        Ok(scores.concat())
    }
}
