//! The search pipeline (DESIGN section 7): cache → embed the query → one search for both lists →
//! fuse → threshold → collapse by file → passages.

use std::{sync::Arc, time::Duration};

use atlas_shared::gateway_api::{Passage, QueryChatRequest, QueryFilter};
use globset::GlobBuilder;
use moka::future::Cache;
use tokio::time::Instant;
use uuid::Uuid;

use crate::{
    embed::BookedEmbedder,
    error::GatewayError,
    fusion::{Fused, Weights, fuse},
    index::{Hit, Search, Selection, VectorIndex, lexical_text},
    indexing::mismatch,
    metrics::Metrics,
    versions::Versions,
};

/// Longest query: a task's whole text may be one.
const MAX_QUERY_BYTES: usize = 32 * 1024;

/// Candidates of each list, for each passage asked for, and at least.
const CANDIDATES_PER_PASSAGE: usize = 4;
const MIN_CANDIDATES: usize = 64;

/// Records of one page when paths are matched.
const PAGE: usize = 1000;

/// What the search needs to know of the configuration.
#[derive(Clone, Debug)]
pub(crate) struct SearchConfig {
    pub(crate) default_collection: String,
    pub(crate) default_top_k: usize,
    pub(crate) max_top_k: usize,
    pub(crate) default_threshold: Option<f32>,
    pub(crate) cache_ttl: Duration,
    pub(crate) cache_max_entries: u64,
}

/// Answers queries. One a gateway.
pub(crate) struct Searcher {
    index: Arc<dyn VectorIndex>,
    embedder: Option<Arc<BookedEmbedder>>,
    versions: Arc<Versions>,
    metrics: Metrics,
    config: SearchConfig,
    /// `None` with `CACHE_TTL=0`.
    answers: Option<Cache<Key, Answer>>,
    /// Vectors of queries; they do not depend on any collection.
    vectors: Option<Cache<String, Arc<Vec<f32>>>>,
}

/// The answer to a query.
#[derive(Clone, Debug)]
pub(crate) struct Answer {
    pub(crate) passages: Arc<Vec<Passage>>,
    /// How it is less than it could be.
    pub(crate) degraded: Option<&'static str>,
}

/// A valid query with its defaults filled in; with the collection's version, the key of its answer.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Key {
    version: u64,
    query: Query,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Query {
    text: String,
    top_k: usize,
    collection: String,
    /// Bits of the `f32`, which is never NaN.
    threshold: Option<u32>,
    collapse_by_file: bool,
    path: Option<String>,
    lang: Option<String>,
    repo: Option<String>,
    tenant: Option<String>,
}

impl Searcher {
    pub(crate) fn new(
        index: Arc<dyn VectorIndex>,
        embedder: Option<Arc<BookedEmbedder>>,
        versions: Arc<Versions>,
        metrics: Metrics,
        config: SearchConfig,
    ) -> Self {
        let caching = !config.cache_ttl.is_zero();
        let (ttl, entries) = (config.cache_ttl, config.cache_max_entries);
        Self {
            index,
            embedder,
            versions,
            metrics,
            answers: caching.then(|| Cache::builder().max_capacity(entries).time_to_live(ttl).build()),
            vectors: caching.then(|| Cache::builder().max_capacity(entries).time_to_live(ttl).build()),
            config,
        }
    }

    /// Finds passages.
    pub(crate) async fn query(&self, request: QueryChatRequest) -> Result<Answer, GatewayError> {
        let started = Instant::now();
        let query = self.validate(request)?;
        let key = Key { version: self.versions.of(&query.collection), query };
        if let Some(answers) = &self.answers
            && let Some(answer) = answers.get(&key).await
        {
            self.metrics.cache_hits.inc();
            return Ok(self.counted(answer, started));
        }
        self.metrics.cache_misses.inc();
        let (answer, lasting) = self.search(&key.query).await?;
        if let Some(answers) = &self.answers
            && lasting
        {
            answers.insert(key, answer.clone()).await;
        }
        Ok(self.counted(answer, started))
    }

    /// Forgets all answers.
    pub(crate) fn clear_cache(&self) {
        if let Some(answers) = &self.answers {
            answers.invalidate_all();
        }
        if let Some(vectors) = &self.vectors {
            vectors.invalidate_all();
        }
    }

    fn counted(&self, answer: Answer, started: Instant) -> Answer {
        if let Some(reason) = answer.degraded {
            self.metrics.degraded.with_label_values(&[reason]).inc();
        }
        self.observe("total", started);
        answer
    }

    fn observe(&self, stage: &str, started: Instant) {
        self.metrics.query_seconds.with_label_values(&[stage]).observe(started.elapsed().as_secs_f64());
    }

    fn validate(&self, request: QueryChatRequest) -> Result<Query, GatewayError> {
        let QueryChatRequest { query, top_k, collection, relevancy_threshold, collapse_by_file, filter } =
            request;
        let text = query.trim().to_owned();
        if text.is_empty() {
            return Err(GatewayError::Invalid("`query` is empty; say in words what to look for".to_owned()));
        }
        if text.len() > MAX_QUERY_BYTES {
            return Err(GatewayError::Invalid(format!(
                "`query` has {} bytes; at most {MAX_QUERY_BYTES} are allowed",
                text.len()
            )));
        }
        let top_k = top_k.unwrap_or_else(|| self.config.default_top_k.min(self.config.max_top_k));
        if !(1..=self.config.max_top_k).contains(&top_k) {
            return Err(GatewayError::Invalid(format!(
                "`top_k` is {top_k}; it must be from 1 to {} (MAX_TOP_K)",
                self.config.max_top_k
            )));
        }
        let threshold = relevancy_threshold.or(self.config.default_threshold);
        if threshold.is_some_and(|value| !(0.0..=1.0).contains(&value)) {
            return Err(GatewayError::Invalid("`relevancy_threshold` must be from 0 to 1".to_owned()));
        }
        let collection = collection.unwrap_or_else(|| self.config.default_collection.clone());
        check_collection_name(&collection)?;
        let QueryFilter { path, lang, repo, tenant } = filter.unwrap_or_default();
        Ok(Query {
            text,
            top_k,
            collection,
            threshold: threshold.map(f32::to_bits),
            collapse_by_file: collapse_by_file.unwrap_or_default(),
            path,
            lang,
            repo,
            tenant: tenant.filter(|tenant| !tenant.is_empty()),
        })
    }

    /// The pipeline. The flag says whether the answer may be cached: one that is degraded because
    /// something failed must not outlive the failure.
    async fn search(&self, query: &Query) -> Result<(Answer, bool), GatewayError> {
        let Some(meta) = self.index.meta(&query.collection).await? else {
            if query.collection == self.config.default_collection {
                // Nothing was indexed yet: nothing is found, and asking is no mistake.
                return Ok((Answer { passages: Arc::default(), degraded: None }, false));
            }
            return Err(GatewayError::UnknownCollection(query.collection.clone()));
        };
        if let Some(error) = mismatch(&query.collection, &meta, self.embedder.as_ref().map(|e| e.model())) {
            return Err(error);
        }
        let (vector, degraded, lasting) = match (&meta.embedding_model, &self.embedder) {
            (Some(_), Some(embedder)) => match self.embed(embedder, query).await {
                Ok(vector) => (Some(vector), None, true),
                Err(error) => {
                    tracing::warn!(error = %error, error_code = error.code(), "query not embedded, searching lexically");
                    (None, Some("lexical"), false)
                }
            },
            _ => (None, Some("lexical"), true),
        };
        if let (Some(vector), Some(size)) = (&vector, meta.embedding_size)
            && vector.len() != size
        {
            return Err(GatewayError::EmbeddingMismatch {
                collection: query.collection.clone(),
                built_with: format!("{} ({size} dimensions)", meta.embedding_model.unwrap_or_default()),
                configured: format!("the server gives vectors of {} dimensions", vector.len()),
            });
        }

        let searching = Instant::now();
        let Some(selection) = self.selection(query).await? else {
            return Ok((Answer { passages: Arc::default(), degraded }, lasting));
        };
        let lists = self
            .index
            .search(
                &query.collection,
                Search {
                    dense: vector.as_deref().cloned(),
                    lexical: Some(lexical_text(&query.text)),
                    selection,
                    limit: (query.top_k * CANDIDATES_PER_PASSAGE).max(MIN_CANDIDATES),
                },
            )
            .await?;
        self.observe("search", searching);

        let ranking = Instant::now();
        let mut fused = fuse(lists, Weights::default());
        if let Some(vector) = vector {
            self.fill_cosines(query, &vector, &mut fused).await?;
        }
        let passages = select(fused, query);
        self.observe("rank", ranking);
        Ok((Answer { passages: Arc::new(passages), degraded }, lasting))
    }

    async fn embed(
        &self,
        embedder: &Arc<BookedEmbedder>,
        query: &Query,
    ) -> Result<Arc<Vec<f32>>, GatewayError> {
        if let Some(vectors) = &self.vectors
            && let Some(vector) = vectors.get(&query.text).await
        {
            return Ok(vector);
        }
        let embedding = Instant::now();
        let vector = Arc::new(embedder.embed_query(&query.text, query.tenant.as_deref()).await?);
        self.observe("embed", embedding);
        if let Some(vectors) = &self.vectors {
            vectors.insert(query.text.clone(), Arc::clone(&vector)).await;
        }
        Ok(vector)
    }

    /// Which chunks may be found; `None`: none at all.
    async fn selection(&self, query: &Query) -> Result<Option<Selection>, GatewayError> {
        // What belongs to a tenant is found by that tenant only; what belongs to nobody, by all.
        let tenants = std::iter::once(String::new()).chain(query.tenant.clone()).collect();
        let selection = Selection {
            tenants: Some(tenants),
            lang: query.lang.clone(),
            repo: query.repo.clone(),
            ..Selection::default()
        };
        let Some(path) = &query.path else { return Ok(Some(selection)) };
        let glob = GlobBuilder::new(path)
            .literal_separator(true)
            .build()
            .map_err(|error| GatewayError::Invalid(format!("`filter.path` is not a glob: {error}")))?
            .compile_matcher();
        // The engines know no globs: match the names of all documents, then ask for those documents.
        let mut docs = Vec::new();
        let first_chunks = Selection { first_chunks: true, ..selection.clone() };
        let mut from = None;
        loop {
            let page = self.index.scroll(&query.collection, &first_chunks, from, PAGE, false).await?;
            docs.extend(
                page.records
                    .into_iter()
                    .filter(|(_, record)| glob.is_match(&record.source))
                    .map(|(_, record)| record.doc),
            );
            from = page.next;
            if from.is_none() {
                break;
            }
        }
        docs.sort_unstable();
        docs.dedup();
        Ok((!docs.is_empty()).then_some(Selection { docs: Some(docs), ..selection }))
    }

    /// Gives the cosine also to what only the lexical list found, so that a threshold means the same
    /// for all: one more search, over these few chunks only.
    async fn fill_cosines(
        &self,
        query: &Query,
        vector: &[f32],
        fused: &mut [Fused],
    ) -> Result<(), GatewayError> {
        let missing: Vec<Uuid> =
            fused.iter().filter(|fused| fused.cosine.is_none()).map(|fused| fused.hit.id).collect();
        if missing.is_empty() {
            return Ok(());
        }
        let search = Search {
            dense: Some(vector.to_vec()),
            lexical: None,
            limit: missing.len(),
            selection: Selection { ids: Some(missing), ..Selection::default() },
        };
        let found = self.index.search(&query.collection, search).await?.dense;
        for fused in fused.iter_mut().filter(|fused| fused.cosine.is_none()) {
            fused.cosine =
                found.iter().find(|hit| hit.id == fused.hit.id).map(|hit| hit.score.clamp(0.0, 1.0));
        }
        Ok(())
    }
}

/// Threshold, collapse by file, `top_k`.
fn select(fused: Vec<Fused>, query: &Query) -> Vec<Passage> {
    let threshold = query.threshold.map(f32::from_bits);
    let mut files = std::collections::HashSet::new();
    fused
        .into_iter()
        .filter(|fused| match (threshold, fused.cosine) {
            (Some(threshold), Some(cosine)) => cosine >= threshold,
            _ => true,
        })
        .filter(|fused| !query.collapse_by_file || files.insert(fused.hit.record.doc.clone()))
        .take(query.top_k)
        .map(|fused| passage(fused, &query.collection))
        .collect()
}

fn passage(fused: Fused, collection: &str) -> Passage {
    let Fused { hit: Hit { record, .. }, score, cosine } = fused;
    #[expect(clippy::cast_possible_truncation, reason = "only the order of scores means something")]
    let score = score as f32;
    Passage {
        text: record.text,
        similarity: cosine,
        source: record.source,
        start_line: record.start,
        end_line: record.end,
        heading: record.heading,
        score,
        collection: collection.to_owned(),
        lang: record.lang,
        repo: Some(record.repo).filter(|repo| !repo.is_empty()),
        commit: record.commit,
    }
}

/// Collections are folders and parts of URLs.
pub(crate) fn check_collection_name(name: &str) -> Result<(), GatewayError> {
    if atlas_shared::message::is_name(name) && !name.starts_with('.') {
        return Ok(());
    }
    Err(GatewayError::Invalid(format!(
        "`collection` is {name:?}; use 1 to 128 letters, digits, '.', '_' or '-', and no dot at the start"
    )))
}
