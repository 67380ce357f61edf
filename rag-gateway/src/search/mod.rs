//! The search pipeline (DESIGN section 7): cache → embed the query → one search of each collection for
//! both lists, and in files that the question names → weigh kinds of files → fuse → threshold → rerank → diversify → collapse by file → join neighbours → answer.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use atlas_shared::{
    Dependency, UpstreamError,
    gateway_api::{Passage, QueryChatRequest, SearchMode},
    resilience::CircuitBreaker,
};
use bytes::Bytes;
use futures::future::try_join_all;
use tokio::time::Instant;
use uuid::Uuid;

use crate::{
    cache::{AnswerCache, Degraded, Entry},
    embed::QueryEmbedder,
    error::GatewayError,
    fusion::{Found as Candidates, Fused, Weights, fuse},
    index::{CollectionMeta, Hit, Resolved, Search, Selection, VectorIndex, Version},
    indexing::mismatch,
    metrics::Metrics,
    rerank::QueryReranker,
};

mod candidates;
mod diversity;
mod kinds;
mod named;
mod passages;
mod query;
mod thresholds;

use passages::Draft;
use query::Query;
pub(crate) use query::{Key, check_collection_name};

/// Candidates of each list, for each passage asked for, and at least.
const CANDIDATES_PER_PASSAGE: usize = 4;
const MIN_CANDIDATES: usize = 64;

/// Records of one page when paths are matched.
const PAGE: usize = 1000;

/// Bound of asking for the index's version: without it a query goes on, uncached.
const VERSION_TIMEOUT: Duration = Duration::from_secs(2);

/// What the search needs to know of the configuration.
#[derive(Clone, Debug)]
pub(crate) struct SearchConfig {
    pub(crate) default_collection: String,
    pub(crate) default_top_k: usize,
    pub(crate) max_top_k: usize,
    pub(crate) default_threshold: Option<f32>,
    /// `PASSAGE_TOKENS`.
    pub(crate) passage_tokens: usize,
    /// `SECONDARY_WEIGHT`.
    pub(crate) secondary_weight: f32,
    /// Bound of one call of the index.
    pub(crate) timeout: Duration,
}

/// Answers queries. One a gateway.
pub(crate) struct Searcher {
    inner: Arc<Inner>,
    /// `None` with `CACHE_TTL=0`.
    cache: Option<AnswerCache>,
}

/// Everything but the cache: what a search that several callers wait for holds on to.
struct Inner {
    index: Arc<dyn VectorIndex>,
    /// Guards searches: while the index is down nobody waits for it.
    breaker: CircuitBreaker,
    embedder: Option<QueryEmbedder>,
    reranker: Option<QueryReranker>,
    metrics: Metrics,
    config: SearchConfig,
    /// Collections that were found to fit the embedding model.
    fitted: Mutex<HashSet<String>>,
}

/// The answer to a query.
#[derive(Clone, Debug)]
pub(crate) struct Answer {
    /// The passages as JSON: what is cached is not serialised again.
    pub(crate) body: Bytes,
    /// How it is less than it could be.
    pub(crate) degraded: Vec<Degraded>,
}

/// What a search came to.
#[derive(Clone, Debug)]
pub(crate) struct Found {
    pub(crate) answer: Answer,
    /// It may be cached: one that is degraded because something failed must not outlive the failure.
    pub(crate) lasting: bool,
}

/// A collection that is searched.
struct Target<'a> {
    name: &'a str,
    /// What is searched: the name may stand for another one before the search has ended.
    generation: String,
    meta: CollectionMeta,
    /// Its vectors can be compared with ours.
    is_comparable: bool,
}

impl Searcher {
    pub(crate) fn new(
        index: Arc<dyn VectorIndex>,
        breaker: CircuitBreaker,
        embedder: Option<QueryEmbedder>,
        reranker: Option<QueryReranker>,
        cache: Option<AnswerCache>,
        metrics: Metrics,
        config: SearchConfig,
    ) -> Self {
        let fitted = Mutex::default();
        Self { inner: Arc::new(Inner { index, breaker, embedder, reranker, metrics, config, fitted }), cache }
    }

    /// Finds passages.
    pub(crate) async fn query(&self, request: QueryChatRequest) -> Result<Answer, GatewayError> {
        let started = Instant::now();
        let query = Query::new(request, &self.inner.config)?;
        let answer = self.answer(query).await?;
        for reason in &answer.degraded {
            self.inner.metrics.degraded.with_label_values(&[reason.as_str()]).inc();
        }
        self.inner.observe("total", started);
        Ok(answer)
    }

    async fn answer(&self, query: Query) -> Result<Answer, GatewayError> {
        let inner = &self.inner;
        let Some(cache) = &self.cache else { return Ok(inner.search(&query).await?.answer) };
        let model = inner.embedder.as_ref().map(QueryEmbedder::model);
        let reranker = inner.reranker.as_ref().filter(|_| query.rerank).map(QueryReranker::model);
        let key = query.key(model, reranker);
        // Read before anything is searched: what is written from here on gives another one.
        let version = self.version(&query).await;
        if let Some(version) = &version {
            cache.epoch(version.epoch);
            if let Some(entry) = cache.fresh(key, version).await {
                return Ok(entry.answer());
            }
        }
        inner.metrics.cache_misses.inc();
        let found = match &version {
            Some(version) => {
                let (inner, query) = (Arc::clone(inner), query);
                cache.one_flight(key, version, async move { inner.search(&query).await }).await
            }
            // Without a version nobody can say whether two searches see the same index.
            None => inner.search(&query).await,
        };
        match (found, version) {
            (Ok(Found { answer, lasting: true }), Some(version)) => {
                cache.insert(key, &version, &answer).await;
                Ok(answer)
            }
            (Ok(found), _) => Ok(found.answer),
            (Err(error), _) if error.is_index_down() => match cache.stale(key).await {
                Some(entry) => {
                    tracing::debug!(error = %error, "the index is down: a cached answer is given");
                    let mut answer = entry.answer();
                    answer.degraded.push(Degraded::Stale);
                    Ok(answer)
                }
                None => Err(error),
            },
            (Err(error), _) => Err(error),
        }
    }

    /// `None` where the index does not say: the query is then searched, whatever is cached.
    async fn version(&self, query: &Query) -> Option<Version> {
        // While the circuit is open the search itself is what probes.
        if self.inner.breaker.cause().is_some() {
            return None;
        }
        let asked = self.inner.index.version(&query.collections);
        match tokio::time::timeout(VERSION_TIMEOUT, asked).await {
            Ok(Ok(version)) => Some(version),
            Ok(Err(error)) => {
                tracing::debug!(error = %error, "no version: the cache is not used");
                None
            }
            Err(_) => None,
        }
    }

    /// Forgets all answers, on every replica.
    pub(crate) async fn clear_cache(&self) -> Result<(), GatewayError> {
        if let Some(embedder) = &self.inner.embedder {
            embedder.forget();
        }
        if let Some(cache) = &self.cache {
            cache.forget();
            self.inner.index.new_epoch().await?;
        }
        Ok(())
    }

    /// Looks for a new epoch, so that a replica that nobody asks anything forgets in time too.
    pub(crate) async fn follow_epoch(&self) {
        if let Some(cache) = &self.cache
            && let Ok(Ok(version)) =
                tokio::time::timeout(VERSION_TIMEOUT, self.inner.index.version(&[])).await
        {
            cache.epoch(version.epoch);
        }
    }

    /// The reranker: `None` without one, else why it is not asked at the moment.
    pub(crate) fn check_reranker(&self) -> Option<Result<(), UpstreamError>> {
        let reranker = self.inner.reranker.as_ref()?;
        Some(reranker.trouble().map_or(Ok(()), Err))
    }

    #[cfg(test)]
    pub(crate) fn cache_for_tests(&self) -> &AnswerCache {
        self.cache.as_ref().unwrap_or_else(|| unreachable!("these tests have a cache"))
    }

    /// The shared cache: `None` without one, else whether it answers.
    pub(crate) async fn check_shared_cache(&self) -> Option<Result<(), UpstreamError>> {
        self.cache.as_ref()?.check_shared().await
    }
}

impl Entry {
    fn answer(&self) -> Answer {
        Answer { body: self.body.clone(), degraded: self.degraded.clone() }
    }
}

impl Inner {
    fn observe(&self, stage: &str, started: Instant) {
        self.metrics.query_seconds.with_label_values(&[stage]).observe(started.elapsed().as_secs_f64());
    }

    fn fitted(&self) -> MutexGuard<'_, HashSet<String>> {
        self.fitted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Calls the index within its bound, through the breaker.
    async fn guarded<T>(
        &self,
        call: impl Future<Output = Result<T, UpstreamError>> + Send,
    ) -> Result<T, UpstreamError> {
        let permit = self.breaker.try_acquire()?;
        let result = tokio::time::timeout(self.config.timeout, call).await.unwrap_or_else(|_| {
            let seconds = self.config.timeout.as_secs();
            Err(UpstreamError::transient(Dependency::VectorIndex, format!("no answer in {seconds} s")))
        });
        permit.done(result)
    }

    /// The pipeline.
    async fn search(&self, query: &Query) -> Result<Found, GatewayError> {
        let targets = self.targets(query).await?;
        if targets.is_empty() {
            // Nothing was indexed yet: nothing is found, and asking is no mistake.
            return Ok(Found { answer: answer(&[], Vec::new()), lasting: false });
        }
        let mut degraded = Vec::new();
        let mut lasting = true;
        let vector = match self.vector(query, &targets).await? {
            Vector::Not => None,
            Vector::Missing { for_now } => {
                degraded.push(Degraded::Lexical);
                lasting &= !for_now;
                None
            }
            Vector::Some { vector, everywhere } => {
                if !everywhere {
                    degraded.push(Degraded::Lexical);
                }
                Some(vector)
            }
        };

        let searching = Instant::now();
        let searches: Vec<_> =
            targets.iter().map(|target| self.lists(query, target, vector.as_deref())).collect();
        let mut found = try_join_all(searches).await?;
        self.observe("search", searching);

        let ranking = Instant::now();
        for Candidates { lists, .. } in &mut found {
            kinds::weigh(&query.text, query.secondary_weight, &mut lists.lexical);
        }
        let mut fused = fuse(found, Weights::default());
        if let Some(vector) = &vector {
            self.fill_cosines(&targets, vector, &mut fused).await?;
            let model = self.embedder.as_ref().map(QueryEmbedder::model).unwrap_or_default();
            if let Some(threshold) = query.threshold.or_else(|| thresholds::measured(model)) {
                fused.retain(|fused| fused.cosine.is_none_or(|cosine| cosine >= threshold));
            }
        }
        self.observe("rank", ranking);

        if let Some(reranker) = self.reranker.as_ref().filter(|_| query.rerank) {
            let reranking = Instant::now();
            if let Err(error) = reranker.rerank(&query.text, query.top_k, &mut fused).await {
                tracing::warn!(error = %error, error_code = error.code(), "not reranked");
                degraded.push(Degraded::Unreranked);
                lasting = false;
            }
            self.observe("rerank", reranking);
        } else if query.must_rerank {
            degraded.push(Degraded::Unreranked);
        }
        if query.diversity > 0.0 {
            diversity::diversify(&mut fused, query.diversity, query.top_k);
        }
        let mut drafts = passages::select(fused, query);
        if query.passage_tokens > 0 {
            let joining = Instant::now();
            self.join_neighbours(query, &targets, &mut drafts).await?;
            self.observe("join", joining);
        }
        let name = |draft: &Draft| targets[draft.collection()].name;
        let passages: Vec<Passage> = drafts
            .into_iter()
            .map(|draft| {
                let name = name(&draft);
                draft.passage(name)
            })
            .collect();
        Ok(Found { answer: answer(&passages, degraded), lasting })
    }

    /// The collections of a query that are there. The default one may be missing.
    async fn targets<'q>(&self, query: &'q Query) -> Result<Vec<Target<'q>>, GatewayError> {
        let asked: Vec<_> =
            query.collections.iter().map(|name| self.guarded(self.index.resolve(name))).collect();
        let resolved = try_join_all(asked).await?;
        let mut targets = Vec::with_capacity(resolved.len());
        for (name, resolved) in query.collections.iter().zip(resolved) {
            let Some(Resolved { generation, meta }) = resolved else {
                if *name == self.config.default_collection {
                    continue;
                }
                return Err(GatewayError::UnknownCollection(name.clone()));
            };
            let model = self.embedder.as_ref().map(QueryEmbedder::model);
            if let Some(error) = mismatch(name, &meta, model) {
                // One that was rebuilt with another model while this gateway ran: until the gateway is replaced too,
                // words are better than nothing.
                let was_rebuilt = query.mode == SearchMode::Hybrid && self.fitted().contains(name);
                if query.mode != SearchMode::Lexical && !was_rebuilt {
                    return Err(error);
                }
            } else if !self.fitted().contains(name) {
                self.fitted().insert(name.clone());
            }
            let is_comparable = meta.embedding_model.is_some() && model == meta.embedding_model.as_deref();
            targets.push(Target { name, generation, meta, is_comparable });
        }
        Ok(targets)
    }

    /// The query's embedding, where it is wanted and can be had.
    async fn vector(&self, query: &Query, targets: &[Target<'_>]) -> Result<Vector, GatewayError> {
        if query.mode == SearchMode::Lexical {
            return Ok(Vector::Not);
        }
        let embedded = targets.iter().filter(|target| target.is_comparable).count();
        let Some(embedder) = self.embedder.as_ref().filter(|_| embedded > 0) else {
            return Ok(Vector::Missing { for_now: false });
        };
        let embedding = Instant::now();
        let vector = match embedder.embed(&query.text, query.tenant.as_deref()).await {
            Ok(vector) => vector,
            Err(error) => {
                tracing::warn!(error = %error, error_code = error.code(), "query not embedded, searching lexically");
                return Ok(Vector::Missing { for_now: true });
            }
        };
        self.observe("embed", embedding);
        for Target { name, meta, .. } in targets.iter().filter(|target| target.is_comparable) {
            if let Some(size) = meta.embedding_size
                && vector.len() != size
            {
                return Err(GatewayError::EmbeddingMismatch {
                    collection: (*name).to_owned(),
                    built_with: format!(
                        "{} ({size} dimensions)",
                        meta.embedding_model.as_deref().unwrap_or_default()
                    ),
                    configured: format!("the server gives vectors of {} dimensions", vector.len()),
                });
            }
        }
        Ok(Vector::Some { vector, everywhere: embedded == targets.len() })
    }

    /// Searches one collection.
    async fn lists(
        &self,
        query: &Query,
        target: &Target<'_>,
        vector: Option<&Vec<f32>>,
    ) -> Result<Candidates, GatewayError> {
        let Some(selection) = self.selection(query, &target.generation).await? else {
            return Ok(Candidates::default());
        };
        let named = self.named(query, target, &selection).await?;
        let dense = vector.filter(|_| target.is_comparable).cloned();
        let lexical = if query.mode != SearchMode::Dense || dense.is_none() {
            target.meta.weighing.query(&query.text)
        } else {
            Vec::new()
        };
        let needed = (query.top_k * CANDIDATES_PER_PASSAGE).max(MIN_CANDIDATES);
        let [first, then] = candidates::attempts(needed, query.top_k);
        let mut search = Search { dense, lexical, selection, limit: first.asked };
        let mut lists = self.guarded(self.index.search(&target.generation, search.clone())).await?;
        if !candidates::cut(&mut lists, needed, first) {
            search.limit = then.asked;
            lists = self.guarded(self.index.search(&target.generation, search)).await?;
            candidates::cut(&mut lists, needed, then);
        }
        Ok(Candidates { lists, named })
    }

    /// What goes first because it is in a file that the question names.
    async fn named(
        &self,
        query: &Query,
        target: &Target<'_>,
        selection: &Selection,
    ) -> Result<Vec<Hit>, GatewayError> {
        // Who wants vectors alone gets them.
        let Some(names) = named::Names::of(&query.text).filter(|_| query.mode != SearchMode::Dense) else {
            return Ok(Vec::new());
        };
        let search = async |text: &str, selection: Selection, limit: usize| {
            let lexical = target.meta.weighing.query(text);
            if lexical.is_empty() {
                return Ok(Vec::new());
            }
            let search = Search { dense: None, lexical, selection, limit };
            let lists = self.guarded(self.index.search(&target.generation, search)).await?;
            Ok::<_, GatewayError>(lists.lexical)
        };
        let first_chunks = Selection { first_chunks: true, ..selection.clone() };
        let files = names.files(search(&names.text(), first_chunks, named::LOOKED_AT).await?);
        if files.is_empty() {
            return Ok(files);
        }
        let within = named::within(&files, selection.clone());
        let found = search(&names.rest, within, named::length(&files)).await?;
        Ok(named::best(files, found))
    }

    /// Which chunks may be found; `None`: none at all.
    async fn selection(&self, query: &Query, collection: &str) -> Result<Option<Selection>, GatewayError> {
        let selection = Selection {
            tenants: Some(visible_to(query.tenant.as_deref())),
            lang: query.lang.clone(),
            repo: query.repo.clone(),
            ..Selection::default()
        };
        let Some(glob) = query.glob()? else { return Ok(Some(selection)) };
        // The engines know no globs: match the names of all documents, then ask for those documents.
        let mut docs = Vec::new();
        let first_chunks = Selection { first_chunks: true, ..selection.clone() };
        let mut from = None;
        loop {
            let page = self.index.scroll(collection, &first_chunks, from, PAGE, false);
            let page = self.guarded(page).await?;
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
    /// for all: one more search of each collection, over these few chunks only.
    async fn fill_cosines(
        &self,
        targets: &[Target<'_>],
        vector: &[f32],
        fused: &mut [Fused],
    ) -> Result<(), GatewayError> {
        for (number, target) in targets.iter().enumerate() {
            if !target.is_comparable {
                continue;
            }
            let is_missing = |fused: &Fused| fused.collection == number && fused.cosine.is_none();
            let missing: Vec<Uuid> =
                fused.iter().filter(|fused| is_missing(fused)).map(|fused| fused.hit.id).collect();
            if missing.is_empty() {
                continue;
            }
            let cosines =
                self.guarded(self.index.cosines(&target.generation, vector.to_vec(), missing)).await?;
            for fused in fused.iter_mut().filter(|fused| is_missing(fused)) {
                fused.cosine = cosines.get(&fused.hit.id).map(|cosine| cosine.clamp(0.0, 1.0));
            }
        }
        Ok(())
    }

    /// Joins passages with what stands before and after them, where there is room.
    async fn join_neighbours(
        &self,
        query: &Query,
        targets: &[Target<'_>],
        drafts: &mut [Draft],
    ) -> Result<(), GatewayError> {
        for (number, target) in targets.iter().enumerate() {
            let ids: Vec<Uuid> = drafts
                .iter()
                .filter(|draft| draft.collection() == number)
                .flat_map(|draft| draft.neighbours(query.passage_tokens))
                .collect();
            if ids.is_empty() {
                continue;
            }
            let limit = ids.len();
            // The ids belong to documents that were found; asking again whose they are costs nothing.
            let selection = Selection {
                ids: Some(ids),
                tenants: Some(visible_to(query.tenant.as_deref())),
                ..Selection::default()
            };
            let page =
                self.guarded(self.index.scroll(&target.generation, &selection, None, limit, true)).await?;
            passages::join(drafts, number, page.records, query.passage_tokens);
        }
        Ok(())
    }
}

/// A query's embedding.
enum Vector {
    /// Nobody wants it.
    Not,
    /// It cannot be had: `for_now`, or with this configuration.
    Missing { for_now: bool },
    /// Here it is. `everywhere`: all collections of the query have embeddings.
    Some { vector: Arc<Vec<f32>>, everywhere: bool },
}

/// What belongs to a tenant is found by that tenant only; what belongs to nobody, by all.
fn visible_to(tenant: Option<&str>) -> Vec<String> {
    std::iter::once(String::new()).chain(tenant.map(str::to_owned)).collect()
}

fn answer(passages: &[Passage], degraded: Vec<Degraded>) -> Answer {
    // Strings and finite numbers: serialising cannot fail.
    Answer { body: serde_json::to_vec(passages).unwrap_or_default().into(), degraded }
}
