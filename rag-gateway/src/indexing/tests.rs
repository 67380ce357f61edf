//! What an index run and a rebuild make of documents that have lost chunks.

#![allow(clippy::unwrap_used, reason = "tests")]
#![cfg(feature = "embedded")]

use std::sync::{Arc, Mutex};

use atlas_shared::{
    Config, Env,
    config::Process,
    gateway_api::{Document, DocumentOutcome, JobState, JobStatus},
};

use super::Indexer;
use crate::{
    chunk::Chunker,
    index::{self, ChunkRecord, Selection, VectorIndex, Weighing},
    jobs::Progress,
    metrics::Metrics,
};

struct Stand {
    index: Arc<dyn VectorIndex>,
    indexer: Indexer,
    _dir: tempfile::TempDir,
}

impl Stand {
    async fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let env = Env::default().with("ATLAS_DATA_DIR", dir.path().display().to_string());
        let config = Config::load(&env, Process::Gateway).unwrap();
        let index = index::open(&config.gateway).await.unwrap();
        let indexer = Indexer::new(
            Arc::clone(&index),
            None,
            Chunker::new(32, 0),
            Weighing::unrecorded(),
            Metrics::new().unwrap(),
        );
        Self { index, indexer, _dir: dir }
    }

    /// Sends documents, and says which ones were indexed.
    async fn put(&self, sources: &[&str]) -> Vec<String> {
        let documents = sources.iter().map(|source| Document {
            source: (*source).to_owned(),
            text: format!("A line of {source}, and some words more for it.\n\n").repeat(20),
            repo: Some("shop".to_owned()),
            ..Document::default()
        });
        let done = self.indexer.put("c", documents.collect(), |_, _| {}).await.unwrap();
        let indexed = done.results.into_iter().filter(|result| result.outcome == DocumentOutcome::Indexed);
        indexed.map(|result| result.source).collect()
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
    let status = Mutex::new(JobStatus {
        job_id: String::new(),
        state: JobState::Running,
        documents: 0,
        documents_done: 0,
        chunks: 0,
        tokens: 0,
        errors: Vec::new(),
        note: None,
    });
    stand.indexer.rebuild("c", &generation, Progress::of(&status)).await.unwrap();
    let told = status.into_inner().unwrap().errors;
    assert_eq!(
        told,
        ["left out, because chunks of them are lost: shop/b.md; run `atlas index` on their repositories"]
    );
    assert!(stand.chunks("c", "b.md").await.is_empty());
    assert_eq!(stand.put(&["a.md", "b.md"]).await, ["b.md"], "the next run brings it back");
}
