//! What an index run and a rebuild make of documents that have lost chunks, and of what other gateways write meanwhile.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]
#![cfg(feature = "embedded")]

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use atlas_shared::{
    Config, Env, Tokens,
    config::Process,
    gateway_api::{DeleteDocuments, Document, DocumentOutcome, JobState, JobStatus},
    ledger,
    model::{Embedder, Embeddings, ModelError},
};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use super::{Indexer, PutError};
use crate::{
    chunk::Chunker,
    embed::BookedEmbedder,
    error::GatewayError,
    index::{self, ChunkRecord, Selection, VectorIndex, Weighing},
    jobs::Progress,
    metrics::Metrics,
};

struct Stand {
    index: Arc<dyn VectorIndex>,
    indexer: Arc<Indexer>,
    config: Config,
    _dir: tempfile::TempDir,
}

impl Stand {
    async fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let env = Env::default().with("ATLAS_DATA_DIR", dir.path().display().to_string());
        let config = Config::load(&env, Process::Gateway).unwrap();
        let index = index::open(&config.gateway).await.unwrap();
        let indexer = Arc::new(indexer(&index, None));
        Self { index, indexer, config, _dir: dir }
    }

    /// Another gateway on the same index, with a model of its own.
    async fn gateway(&self, model: &Arc<Model>) -> Arc<Indexer> {
        let embedder = BookedEmbedder::new(
            Arc::clone(model) as Arc<dyn Embedder>,
            ledger::open(&self.config).await.unwrap(),
            self.config.limits,
            &self.config.resilience,
            &Metrics::new().unwrap(),
            CancellationToken::new(),
        );
        Arc::new(indexer(&self.index, Some(Arc::new(embedder))))
    }

    /// Sends documents, and says which ones were indexed.
    async fn put(&self, sources: &[&str]) -> Vec<String> {
        put(&self.indexer, "c", sources).await.unwrap()
    }

    /// How near each chunk of a generation is to the vectors of a model.
    async fn cosines(&self, generation: &str, model: &Model) -> Vec<f32> {
        let all = self.index.scroll(generation, &Selection::default(), None, 1000, false).await.unwrap();
        let ids: Vec<_> = all.records.into_iter().map(|(id, _)| id).collect();
        let number = ids.len();
        let cosines = self.index.cosines(generation, model.vector.to_vec(), ids).await.unwrap();
        assert_eq!(cosines.len(), number);
        cosines.into_values().collect()
    }

    async fn sources(&self, collection: &str) -> Vec<String> {
        let all = self.index.documents(collection, &Selection::default()).await.unwrap();
        let mut sources: Vec<String> = all.into_iter().map(|document| document.source).collect();
        sources.sort_unstable();
        sources
    }

    async fn chunks(&self, collection: &str, source: &str) -> Vec<(uuid::Uuid, ChunkRecord)> {
        let all = self.index.scroll(collection, &Selection::default(), None, 1000, false).await.unwrap();
        all.records.into_iter().filter(|(_, record)| record.source == source).collect()
    }

    /// Takes all chunks but the first from a document.
    async fn damage(&self, source: &str) {
        let chunks = self.chunks("c", source).await;
        let ids: Vec<_> = chunks.into_iter().filter(|(_, record)| record.n > 0).map(|(id, _)| id).collect();
        assert!(ids.len() > 3);
        let lost = Selection { ids: Some(ids), ..Selection::default() };
        self.index.delete("c", lost).await.unwrap();
    }

    /// Sources without a hash in the list that an index run compares its files with.
    async fn without_hash(&self) -> Vec<String> {
        let list = self.indexer.list("c", Some("shop"), None).await.unwrap().documents;
        list.into_iter().filter(|it| it.content_hash.is_empty()).map(|it| it.source).collect()
    }
}

fn indexer(index: &Arc<dyn VectorIndex>, embedder: Option<Arc<BookedEmbedder>>) -> Indexer {
    let (chunker, metrics) = (Chunker::new(32, 0), Metrics::new().unwrap());
    Indexer::new(Arc::clone(index), embedder, chunker, Weighing::unrecorded(), metrics)
}

/// Sends documents to a gateway, and says which ones were indexed.
async fn put(indexer: &Indexer, collection: &str, sources: &[&str]) -> Result<Vec<String>, PutError> {
    let documents = sources.iter().map(|source| Document {
        source: (*source).to_owned(),
        text: format!("A line of {source}, and some words more for it.\n\n").repeat(20),
        repo: Some("shop".to_owned()),
        ..Document::default()
    });
    let done = indexer.put(collection, documents.collect(), |_, _| {}).await?;
    let indexed = done.results.into_iter().filter(|result| result.outcome == DocumentOutcome::Indexed);
    Ok(indexed.map(|result| result.source).collect())
}

fn status() -> Mutex<JobStatus> {
    Mutex::new(JobStatus {
        job_id: String::new(),
        state: JobState::Running,
        documents: 0,
        documents_done: 0,
        chunks: 0,
        tokens: 0,
        errors: Vec::new(),
        note: None,
    })
}

/// A model whose vectors tell it from others.
struct Model {
    name: &'static str,
    vector: [f32; 2],
    /// Calls that came in.
    called: Semaphore,
    /// Calls that may be answered.
    may_answer: Semaphore,
}

impl Model {
    fn new(name: &'static str, vector: [f32; 2]) -> Arc<Self> {
        let (called, may_answer) = (Semaphore::new(0), Semaphore::new(Semaphore::MAX_PERMITS));
        Arc::new(Self { name, vector, called, may_answer })
    }
}

#[async_trait::async_trait]
impl Embedder for Model {
    async fn embed(&self, texts: &[String], _: &str) -> Result<Embeddings, ModelError> {
        self.called.add_permits(1);
        let _pass = self.may_answer.acquire().await;
        Ok(Embeddings { vectors: vec![self.vector.to_vec(); texts.len()], usage: None })
    }

    fn model(&self) -> &str {
        self.name
    }

    fn tokens_upper_bound(&self, texts: &[String]) -> Tokens {
        Tokens(texts.len() as u64)
    }
}

#[tokio::test]
async fn a_commit_that_is_gone_is_replaced_where_the_sender_says_so() {
    let stand = Stand::start().await;
    let put = async |commit: Option<&str>, restate: bool| {
        let document = Document {
            source: "a.md".to_owned(),
            text: "A line.\n".to_owned(),
            commit: commit.map(str::to_owned),
            restate,
            ..Document::default()
        };
        let done = stand.indexer.put("c", vec![document], |_, _| {}).await.unwrap();
        let [(_, record)] = &stand.chunks("c", "a.md").await[..] else { panic!("one chunk") };
        (done.results[0].outcome, record.commit.clone(), record.rev)
    };
    let (_, commit, rev) = put(Some("one"), true).await;
    assert_eq!(commit.as_deref(), Some("one"));
    for (sent, restate, expected) in [
        (Some("two"), false, "one"),
        (None, true, "one"),
        (Some("two"), true, "two"),
        (Some("two"), true, "two"),
    ] {
        let (outcome, commit, now) = put(sent, restate).await;
        assert_eq!((outcome, commit.as_deref(), now), (DocumentOutcome::Unchanged, Some(expected), rev));
    }
}

#[tokio::test]
async fn what_a_gateway_of_the_old_model_writes_never_gets_into_the_rebuilt_generation() {
    let stand = Stand::start().await;
    let (old, new) = (Model::new("old", [1.0, 0.0]), Model::new("new", [0.0, 1.0]));
    let (a, b) = (stand.gateway(&old).await, stand.gateway(&new).await);
    put(&a, "c", &["a.md"]).await.unwrap();

    // A call for b.md is under way while the other gateway rebuilds.
    old.called.forget_permits(usize::MAX);
    old.may_answer.forget_permits(usize::MAX);
    let writer = tokio::spawn({
        let a = Arc::clone(&a);
        async move { put(&a, "c", &["b.md"]).await }
    });
    let came_in = tokio::time::timeout(Duration::from_secs(60), old.called.acquire()).await;
    came_in.unwrap().unwrap().forget();
    b.rebuild("c", "c@2", Progress::of(&status())).await.unwrap();
    old.may_answer.add_permits(1000);
    let overtaken = writer.await.unwrap().unwrap_err().error;
    assert!(
        matches!(&overtaken, GatewayError::Upstream(error) if error.is_transient()),
        "it is sent again: {overtaken}"
    );
    assert!(overtaken.to_string().contains("c@2"), "{overtaken}");

    assert_eq!(stand.sources("c").await, ["a.md"]);
    let again = put(&a, "c", &["b.md"]).await.unwrap_err().error;
    assert!(matches!(again, GatewayError::EmbeddingMismatch { .. }), "{again}");
    assert_eq!(put(&b, "c", &["a.md", "b.md"]).await.unwrap(), ["b.md"]);
    assert_eq!(stand.sources("c").await, ["a.md", "b.md"]);
    assert!(stand.cosines("c@2", &new).await.into_iter().all(|cosine| cosine > 0.999));
}

#[tokio::test]
async fn what_another_gateway_did_to_the_old_generation_before_the_switch_is_brought_over_after_it() {
    let stand = Stand::start().await;
    let (old, new) = (Model::new("old", [1.0, 0.0]), Model::new("new", [0.0, 1.0]));
    let (a, b) = (stand.gateway(&old).await, stand.gateway(&new).await);
    put(&a, "c", &["deleted-after.md", "deleted-before.md", "kept.md"]).await.unwrap();
    b.rebuild("c", "c@2", Progress::of(&status())).await.unwrap();
    let known = b.difference("c@1", "c@2").await.unwrap().before;
    assert_eq!(known.len(), 3);

    // As if it had been done between the last comparison and the switch ...
    put(&a, "c@1", &["late.md", "newer.md"]).await.unwrap();
    let delete = async |indexer: &Indexer, collection: &str, source: &str| {
        let sources = vec![source.to_owned()];
        let request =
            DeleteDocuments { collection: None, repo: Some("shop".to_owned()), tenant: None, sources };
        assert_eq!(indexer.delete(collection, &request).await.unwrap().deleted, 1);
    };
    delete(&a, "c@1", "deleted-before.md").await;
    // ... and this after it.
    put(&b, "c", &["newer.md", "new.md"]).await.unwrap();
    delete(&b, "c", "deleted-after.md").await;
    let newer = stand.chunks("c", "newer.md").await;

    let meta = stand.index.meta("c@1").await.unwrap().unwrap();
    b.catch_up("c", "c@1", "c@2", &known, &meta).await.unwrap();
    assert_eq!(stand.sources("c").await, ["kept.md", "late.md", "new.md", "newer.md"]);
    assert_eq!(stand.chunks("c", "newer.md").await, newer, "the newer revision stays");
    assert!(stand.cosines("c@2", &new).await.into_iter().all(|cosine| cosine > 0.999));
    b.catch_up("c", "c@1", "c@2", &known, &meta).await.unwrap();
    assert_eq!(stand.sources("c").await, ["kept.md", "late.md", "new.md", "newer.md"]);
}

#[tokio::test]
async fn a_document_that_has_lost_chunks_is_indexed_again() {
    let stand = Stand::start().await;
    assert_eq!(stand.put(&["a.md", "b.md"]).await, ["a.md", "b.md"]);
    let whole = stand.chunks("c", "b.md").await.len();
    assert!(stand.without_hash().await.is_empty());
    stand.damage("b.md").await;
    assert_eq!(stand.without_hash().await, ["b.md"]);
    assert_eq!(stand.put(&["a.md", "b.md"]).await, ["b.md"]);
    assert_eq!(stand.chunks("c", "b.md").await.len(), whole);
    assert!(stand.without_hash().await.is_empty());
    assert!(stand.put(&["a.md", "b.md"]).await.is_empty());
}

#[tokio::test]
async fn chunks_of_another_revision_are_not_taken_for_those_that_are_lost() {
    let stand = Stand::start().await;
    stand.put(&["a.md"]).await;
    let chunks = stand.chunks("c", "a.md").await;
    let others: Vec<_> = chunks.into_iter().filter(|(_, record)| record.n > 0).collect();
    let mixed = others.iter().map(|(id, record)| index::NewChunk {
        id: *id,
        record: ChunkRecord { rev: record.rev - 1, ..record.clone() },
        dense: None,
    });
    // The index replaces nothing newer, so they go first.
    let ids = others.iter().map(|(id, _)| *id).collect();
    stand.index.delete("c", Selection { ids: Some(ids), ..Selection::default() }).await.unwrap();
    stand.index.upsert("c", mixed.collect(), None).await.unwrap();
    // As many as there should be; only one more thing in the collection makes the run look closer.
    assert_eq!(stand.index.count("c", &Selection::default()).await.unwrap(), 1 + others.len() as u64);
    stand.put(&["b.md"]).await;
    stand.damage("b.md").await;
    assert_eq!(stand.without_hash().await, ["a.md", "b.md"]);
}

#[tokio::test]
async fn a_rebuild_leaves_out_what_has_lost_chunks_and_says_so() {
    let stand = Stand::start().await;
    stand.put(&["a.md", "b.md"]).await;
    stand.damage("b.md").await;
    let (generation, _) = stand.indexer.next_generation("c").await.unwrap();
    let status = status();
    stand.indexer.rebuild("c", &generation, Progress::of(&status)).await.unwrap();
    let told = status.into_inner().unwrap().errors;
    assert_eq!(
        told,
        ["left out, because chunks of them are lost: shop/b.md; run `atlas index` on their repositories"]
    );
    assert!(stand.chunks("c", "b.md").await.is_empty());
    assert_eq!(stand.put(&["a.md", "b.md"]).await, ["b.md"], "the next run brings it back");
}
