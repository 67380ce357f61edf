//! Two gateways on one index and one Redis, as replicas are: what one writes, the other never misses.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use async_trait::async_trait;
use atlas_shared::{
    Config, Dependency, Env, Secret,
    config::Process,
    gateway_api::{DeleteDocuments, Document, Passage, QueryChatRequest},
    resilience::CircuitBreaker,
};
use atlas_test_support::redis::Redis;
use tokio::sync::Semaphore;

use super::*;
use crate::{
    chunk::Chunker,
    index::{
        self, ChangeId, CollectionMeta, CollectionState, Lists, NewChunk, Page, Provenance, Resolved, Search,
        Selection, VectorIndex,
    },
    indexing::Indexer,
    search::{SearchConfig, Searcher},
};

/// The embedded engine, counted, and down or slow when a test wants it.
struct Watched {
    inner: Arc<dyn VectorIndex>,
    searches: AtomicUsize,
    down: AtomicBool,
    /// Searches wait for a permit of it.
    gate: Semaphore,
}

impl Watched {
    fn up(&self) -> Result<(), UpstreamError> {
        if self.down.load(Ordering::SeqCst) {
            return Err(UpstreamError::transient(Dependency::VectorIndex, "connection refused"));
        }
        Ok(())
    }

    fn searches(&self) -> usize {
        self.searches.load(Ordering::SeqCst)
    }
}

#[async_trait]
impl VectorIndex for Watched {
    async fn ensure(&self, name: &str, meta: &CollectionMeta) -> Result<CollectionMeta, UpstreamError> {
        self.inner.ensure(name, meta).await
    }
    async fn resolve(&self, name: &str) -> Result<Option<Resolved>, UpstreamError> {
        self.up()?;
        self.inner.resolve(name).await
    }
    async fn generation(&self, name: &str) -> Result<String, UpstreamError> {
        self.inner.generation(name).await
    }
    async fn info(&self, name: &str) -> Result<Option<CollectionState>, UpstreamError> {
        self.inner.info(name).await
    }
    async fn collections(&self) -> Result<Vec<(String, CollectionState)>, UpstreamError> {
        self.inner.collections().await
    }
    async fn upsert(
        &self,
        name: &str,
        chunks: Vec<NewChunk>,
        obsolete: Option<Selection>,
    ) -> Result<(), UpstreamError> {
        self.up()?;
        self.inner.upsert(name, chunks, obsolete).await
    }
    async fn restate(
        &self,
        name: &str,
        docs: Vec<String>,
        provenance: Provenance,
    ) -> Result<(), UpstreamError> {
        self.inner.restate(name, docs, provenance).await
    }
    async fn delete(&self, name: &str, selection: Selection) -> Result<(), UpstreamError> {
        self.inner.delete(name, selection).await
    }
    async fn cosines(
        &self,
        collection: &str,
        vector: Vec<f32>,
        ids: Vec<Uuid>,
    ) -> Result<HashMap<Uuid, f32>, UpstreamError> {
        self.inner.cosines(collection, vector, ids).await
    }

    async fn search(&self, name: &str, search: Search) -> Result<Lists, UpstreamError> {
        self.searches.fetch_add(1, Ordering::SeqCst);
        self.up()?;
        let _pass = self.gate.acquire().await.unwrap();
        self.inner.search(name, search).await
    }
    async fn count(&self, name: &str, selection: &Selection) -> Result<u64, UpstreamError> {
        self.inner.count(name, selection).await
    }
    async fn scroll(
        &self,
        name: &str,
        selection: &Selection,
        from: Option<Uuid>,
        limit: usize,
        with_text: bool,
    ) -> Result<Page, UpstreamError> {
        self.inner.scroll(name, selection, from, limit, with_text).await
    }
    async fn reweigh(&self, name: &str, avg_len: f64) -> Result<(), UpstreamError> {
        self.inner.reweigh(name, avg_len).await
    }
    async fn use_generation(&self, name: &str, generation: &str) -> Result<(), UpstreamError> {
        self.inner.use_generation(name, generation).await
    }
    async fn drop_collection(&self, name: &str) -> Result<bool, UpstreamError> {
        self.inner.drop_collection(name).await
    }
    async fn keep_vectors(&self, vectors: Vec<(Uuid, Vec<f32>)>) -> Result<(), UpstreamError> {
        self.inner.keep_vectors(vectors).await
    }
    async fn kept_vectors(&self, ids: &[Uuid]) -> Result<HashMap<Uuid, Vec<f32>>, UpstreamError> {
        self.inner.kept_vectors(ids).await
    }
    async fn forget_vectors(&self, ids: Vec<Uuid>) -> Result<(), UpstreamError> {
        self.inner.forget_vectors(ids).await
    }
    async fn version(&self, names: &[String]) -> Result<Version, UpstreamError> {
        self.up()?;
        self.inner.version(names).await
    }
    async fn begin_change(&self, name: &str) -> Result<ChangeId, UpstreamError> {
        self.inner.begin_change(name).await
    }
    async fn changed(&self, name: &str) -> Result<(), UpstreamError> {
        self.inner.changed(name).await
    }
    async fn end_change(&self, name: &str, change: ChangeId) -> Result<(), UpstreamError> {
        self.inner.end_change(name, change).await
    }
    async fn new_epoch(&self) -> Result<(), UpstreamError> {
        self.inner.new_epoch().await
    }
    async fn check(&self) -> Result<(), UpstreamError> {
        self.inner.check().await
    }
    async fn close(&self) {
        self.inner.close().await;
    }
}

/// What replicas share.
struct Fleet {
    config: Config,
    index: Arc<Watched>,
    _dir: tempfile::TempDir,
}

/// One gateway's search and indexing.
struct Replica {
    searcher: Searcher,
    indexer: Indexer,
    metrics: Metrics,
}

async fn fleet(settings: &[(&str, &str)]) -> Fleet {
    let dir = tempfile::tempdir().unwrap();
    let mut env = Env::default().with("ATLAS_DATA_DIR", dir.path().display().to_string());
    for (name, value) in settings {
        env = env.with(name, *value);
    }
    let config = Config::load(&env, Process::Gateway).unwrap();
    let index = Arc::new(Watched {
        inner: index::open(&config.gateway).await.unwrap(),
        searches: AtomicUsize::new(0),
        down: AtomicBool::new(false),
        gate: Semaphore::new(Semaphore::MAX_PERMITS),
    });
    Fleet { config, index, _dir: dir }
}

impl Fleet {
    fn replica(&self, redis: Option<&str>) -> Replica {
        let metrics = Metrics::new().unwrap();
        let gateway = &self.config.gateway;
        let shared = redis.map(|url| {
            let url = Secret::new(url);
            Arc::new(RedisCache::connect(&url, &self.config.resilience, &metrics).unwrap())
        });
        let cache = CacheConfig { ttl: gateway.cache_ttl, stale: gateway.cache_stale, max_entries: 1000 };
        let index = Arc::clone(&self.index) as Arc<dyn VectorIndex>;
        Replica {
            searcher: Searcher::new(
                Arc::clone(&index),
                CircuitBreaker::new(Dependency::VectorIndex, &self.config.resilience),
                None,
                None,
                Some(AnswerCache::new(cache, shared, metrics.clone())),
                metrics.clone(),
                SearchConfig {
                    default_collection: "atlas".to_owned(),
                    default_top_k: 15,
                    max_top_k: 100,
                    default_threshold: None,
                    passage_tokens: 512,
                    secondary_weight: 0.7,
                    timeout: Duration::from_secs(5),
                },
            ),
            indexer: Indexer::new(
                index,
                None,
                Chunker::new(320, 32),
                crate::index::Weighing::unrecorded(),
                metrics.clone(),
            ),
            metrics,
        }
    }
}

impl Replica {
    async fn put(&self, source: &str, text: &str) {
        let document = Document { source: source.to_owned(), text: text.to_owned(), ..Document::default() };
        self.indexer.put("atlas", vec![document], |_, _| {}).await.unwrap();
    }

    async fn delete(&self, source: &str) {
        let request =
            DeleteDocuments { collection: None, repo: None, tenant: None, sources: vec![source.to_owned()] };
        self.indexer.delete("atlas", &request).await.unwrap();
    }

    async fn ask(&self, query: &str) -> Result<(Vec<String>, Vec<Degraded>), GatewayError> {
        let request = QueryChatRequest { query: query.to_owned(), ..QueryChatRequest::default() };
        let answer = self.searcher.query(request).await?;
        let passages: Vec<Passage> = serde_json::from_slice(&answer.body).unwrap();
        Ok((passages.into_iter().map(|passage| passage.source).collect(), answer.degraded))
    }

    async fn sources(&self, query: &str) -> Vec<String> {
        self.ask(query).await.unwrap().0
    }
}

async fn eventually(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    for _ in 0..500 {
        if is_so().await {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("{what} did not happen in time");
}

/// Redis in the background: what a replica has put there is there when another one looks.
async fn settled(redis: &str, keys: usize) {
    let client = ::redis::Client::open(redis).unwrap();
    let mut connection = client.get_multiplexed_async_connection().await.unwrap();
    eventually("the entry in Redis", async || {
        let size: usize = ::redis::cmd("DBSIZE").query_async(&mut connection).await.unwrap();
        size >= keys
    })
    .await;
}

async fn redis(test: &str) -> Option<Redis> {
    Redis::start().await.map_err(|reason| atlas_test_support::skip(test, "Redis", &reason)).ok()
}

#[tokio::test]
async fn what_one_replica_writes_the_other_sees_before_the_write_returns() {
    for url in [None, Some(redis("cache::tests::replicas").await)] {
        let redis = match url {
            Some(None) => return,
            Some(Some(redis)) => Some(redis),
            None => None,
        };
        let url = redis.as_ref().map(Redis::url);
        let fleet = fleet(&[]).await;
        let (a, b) = (fleet.replica(url.as_deref()), fleet.replica(url.as_deref()));
        a.put("1.md", "an apple").await;
        for number in 2..12 {
            // Both have the answer in every cache there is.
            assert_eq!(b.sources("apple").await.len(), number - 1);
            assert_eq!(b.sources("apple").await.len(), number - 1);
            assert_eq!(a.sources("apple").await.len(), number - 1);
            a.put(&format!("{number}.md"), "an apple").await;
            assert_eq!(b.sources("apple").await.len(), number, "an old passage list was served");
        }
        a.delete("1.md").await;
        assert!(!b.sources("apple").await.contains(&"1.md".to_owned()));
        assert!(a.metrics.cache_hits.get() + b.metrics.cache_hits.get() > 0, "it was cached at all");
    }
}

#[tokio::test]
async fn an_answer_that_one_replica_has_searched_is_in_redis_for_the_other() {
    let Some(redis) = redis("cache::tests::an_answer_that_one_replica_has_searched").await else { return };
    let fleet = fleet(&[]).await;
    let (a, b) = (fleet.replica(Some(&redis.url())), fleet.replica(Some(&redis.url())));
    a.put("1.md", "an apple").await;
    let first = a.ask("apple").await.unwrap();
    settled(&redis.url(), 1).await;
    let searches = fleet.index.searches();
    assert_eq!(b.ask("apple").await.unwrap(), first);
    assert_eq!(fleet.index.searches(), searches, "nothing was searched");
    assert_eq!(b.metrics.cache_shared_hits.get(), 1);
    assert_eq!(b.ask("apple").await.unwrap(), first);
    assert_eq!(b.metrics.cache_shared_hits.get(), 1, "the second time it is in this process");
}

#[tokio::test]
async fn without_redis_everything_is_slower_and_nothing_is_wrong() {
    let Some(redis) = redis("cache::tests::without_redis").await else { return };
    let fleet = fleet(&[("CIRCUIT_FAILURES", "2")]).await;
    let (a, b) = (fleet.replica(Some(&redis.url())), fleet.replica(Some(&redis.url())));
    a.put("1.md", "an apple").await;
    a.sources("apple").await;
    settled(&redis.url(), 1).await;
    let port = redis.port();
    drop(redis);
    for number in 2..6 {
        a.put(&format!("{number}.md"), "an apple").await;
        assert_eq!(a.sources("apple").await.len(), number);
        assert_eq!(b.sources("apple").await.len(), number);
        assert_eq!(b.sources(&format!("apple {number}")).await.len(), number);
    }
    assert!(b.metrics.cache_errors.get() > 0);
    assert!(b.searcher.check_shared_cache().await.unwrap().is_err());
    // It comes back, empty.
    let _redis = Redis::start_on(port).await.unwrap();
    assert_eq!(b.sources("apple").await.len(), 5);
    // An address where nothing ever was.
    let c = fleet.replica(Some("redis://127.0.0.1:9/0"));
    assert_eq!(c.sources("apple").await.len(), 5);
}

#[tokio::test]
async fn what_is_not_an_entry_in_redis_is_a_miss() {
    let Some(redis) = redis("cache::tests::what_is_not_an_entry").await else { return };
    let fleet = fleet(&[]).await;
    let (a, b) = (fleet.replica(Some(&redis.url())), fleet.replica(Some(&redis.url())));
    a.put("1.md", "an apple").await;
    a.sources("apple").await;
    settled(&redis.url(), 1).await;
    let client = ::redis::Client::open(redis.url()).unwrap();
    let mut connection = client.get_multiplexed_async_connection().await.unwrap();
    let names: Vec<String> = ::redis::cmd("KEYS").arg("*").query_async(&mut connection).await.unwrap();
    assert!(names[0].starts_with("atlas:answer:"), "{names:?}");
    let ttl: i64 = ::redis::cmd("TTL").arg(&names[0]).query_async(&mut connection).await.unwrap();
    assert!(ttl > 0, "entries end by themselves");
    for poison in ["", "x", "{}\n[]", "{\"numbers\":[],\"at\":0,\"degraded\":[]}\n[{\"text\":\"poison\"}]"] {
        let _: () =
            ::redis::cmd("SET").arg(&names[0]).arg(poison).query_async(&mut connection).await.unwrap();
        assert_eq!(b.sources("apple").await, ["1.md"]);
        b.searcher.cache_for_tests().forget();
    }
}

#[tokio::test]
async fn equal_queries_at_the_same_time_are_searched_once() {
    let fleet = fleet(&[]).await;
    let a = Arc::new(fleet.replica(None));
    a.put("1.md", "an apple").await;
    let searches = fleet.index.searches();
    fleet.index.gate.forget_permits(usize::MAX);
    let asking: Vec<_> = (0..20)
        .map(|_| {
            let a = Arc::clone(&a);
            tokio::spawn(async move { a.sources("apple").await })
        })
        .collect();
    eventually("19 of them wait for the first", async || a.metrics.cache_joined.get() == 19).await;
    // Who asked first gives up: the others still get their answer.
    asking[0].abort();
    fleet.index.gate.add_permits(100);
    for asked in asking.into_iter().skip(1) {
        assert_eq!(asked.await.unwrap(), ["1.md"]);
    }
    assert_eq!(fleet.index.searches() - searches, 1);
}

#[tokio::test]
async fn a_query_does_not_join_a_search_that_began_before_a_write() {
    let fleet = fleet(&[]).await;
    let a = Arc::new(fleet.replica(None));
    a.put("1.md", "an apple").await;
    fleet.index.gate.forget_permits(usize::MAX);
    let before = tokio::spawn({
        let a = Arc::clone(&a);
        async move { a.sources("apple").await }
    });
    let searches = fleet.index.searches();
    eventually("the first search begins", async || fleet.index.searches() > searches || before.is_finished())
        .await;
    a.put("2.md", "an apple").await;
    let after = tokio::spawn({
        let a = Arc::clone(&a);
        async move { a.sources("apple").await }
    });
    eventually("a second search", async || fleet.index.searches() >= searches + 2).await;
    fleet.index.gate.add_permits(100);
    assert_eq!(after.await.unwrap().len(), 2);
    before.await.unwrap();
    assert_eq!(a.sources("apple").await.len(), 2, "and what the first one found is not kept for later");
}

#[tokio::test]
async fn while_the_index_is_down_kept_answers_are_given_and_marked() {
    let fleet = fleet(&[("CIRCUIT_FAILURES", "3")]).await;
    let a = fleet.replica(None);
    a.put("1.md", "an apple").await;
    let (sources, _) = a.ask("apple").await.unwrap();
    a.put("2.md", "an apple").await;
    fleet.index.down.store(true, Ordering::SeqCst);
    for _ in 0..10 {
        let (stale, degraded) = a.ask("apple").await.unwrap();
        assert_eq!(stale, sources, "what was kept, although the index has changed since");
        assert_eq!(degraded, [Degraded::Lexical, Degraded::Stale]);
    }
    assert_eq!(a.metrics.degraded.with_label_values(&["stale"]).get(), 10);
    let error = a.ask("pear").await.unwrap_err();
    assert!(error.retry_after().is_some(), "{error}");
    assert!(fleet.index.searches() < 10, "the circuit is open: nobody waits for the index");
    a.searcher.cache_for_tests().forget();
    assert!(a.ask("apple").await.is_err(), "what was forgotten is not given");
}

#[tokio::test]
async fn stale_answers_have_an_age_limit() {
    let fleet = fleet(&[("CACHE_STALE_SECONDS", "0")]).await;
    let a = fleet.replica(None);
    a.put("1.md", "an apple").await;
    a.ask("apple").await.unwrap();
    fleet.index.down.store(true, Ordering::SeqCst);
    eventually("an answer too old to give", async || a.ask("apple").await.is_err()).await;
}

#[tokio::test]
async fn a_flush_empties_every_replica_and_redis() {
    let Some(redis) = redis("cache::tests::a_flush").await else { return };
    let fleet = fleet(&[]).await;
    let (a, b) = (fleet.replica(Some(&redis.url())), fleet.replica(Some(&redis.url())));
    a.put("1.md", "an apple").await;
    b.sources("apple").await;
    settled(&redis.url(), 1).await;
    let searches = fleet.index.searches();
    b.sources("apple").await;
    assert_eq!(fleet.index.searches(), searches);
    a.searcher.clear_cache().await.unwrap();
    b.sources("apple").await;
    assert_eq!(fleet.index.searches(), searches + 1, "neither its own nor the shared entry was used");
    // A replica that nobody asks follows too, so that it has nothing stale to give.
    a.searcher.clear_cache().await.unwrap();
    b.searcher.follow_epoch().await;
    fleet.index.down.store(true, Ordering::SeqCst);
    assert!(b.ask("apple").await.is_err());
}
