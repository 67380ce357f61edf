//! From documents to chunks in the index.
//!
//! Idempotent by tenant, repository, source and content hash: an unchanged document costs no
//! embedding and no write. A changed one is written first and its older revision deleted after, and
//! searches keep only the newest revision they see, so readers never get both. Work goes in groups
//! of documents; where they are embedded, each is written as soon as its vectors are there. What is written stays,
//! and so does what was paid for and could not be written yet (see [`crate::embed::Embedding`]): whoever was stopped
//! by a budget, an outage or a restart sends the same again and pays only for the rest.

use std::{
    collections::{HashMap, HashSet},
    mem,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicI64, Ordering},
    },
};

use atlas_shared::{
    Dependency, UpstreamError,
    gateway_api::{
        DeleteDocuments, DeleteDocumentsResult, Document, DocumentList, DocumentOutcome, DocumentResult,
        IndexedDocument, MAX_SOURCE_BYTES, PutDocumentsResult, content_hash, source_fault, words_only,
    },
    secrets,
};
use futures::{StreamExt as _, future::try_join_all, stream};
use jiff::Timestamp;
use sha2::{Digest as _, Sha256};
use uuid::Uuid;

use crate::{
    chunk::{self, Chunker},
    embed::{BookedEmbedder, Complete, Embedding, Paid, Texts},
    error::GatewayError,
    index::{
        ChangeId, ChunkRecord, CollectionMeta, NewChunk, Provenance, Resolved, Selection, StoredDocument,
        VectorIndex, Weighing, names,
    },
    metrics::Metrics,
};

mod rebuild;
#[cfg(test)]
mod tests;

/// Bytes of documents that are chunked together, and written together where nothing is embedded.
const GROUP_BYTES: usize = 512 * 1024;

/// Documents in such a group.
const GROUP_DOCUMENTS: usize = 64;

/// Where nothing is embedded, groups are so many times larger: each costs one flush to disk.
const LEXICAL_GROUPS: usize = 8;

/// Parts of a group that are chunked at once.
const CHUNKERS: usize = 4;

/// Groups that are chunked ahead.
const CHUNK_AHEAD: usize = 2;

/// Records of one page when the index is listed.
const PAGE: usize = 1000;

/// Chunks that are looked at to see whether the average length still holds. Ids are hashes, so the
/// first ones are a fair sample.
const SAMPLE: usize = 1000;

/// How far the average length may drift before the collection is weighed anew.
const TOLERATED_DRIFT: f64 = 0.15;

/// Names the namespace of chunk ids.
const CHUNK_NAMESPACE: Uuid = Uuid::from_u128(0x0d4b_57a2_93c4_4b0e_8f5e_52f1_7c1d_20a6);

/// Longest of the other names.
const MAX_NAME_BYTES: usize = 256;

/// Writes documents. One a gateway.
pub(crate) struct Indexer {
    index: Arc<dyn VectorIndex>,
    embedder: Option<Arc<BookedEmbedder>>,
    paid: Arc<Paid>,
    chunker: Chunker,
    /// How new collections are weighed.
    weighing: Weighing,
    metrics: Metrics,
    /// Held by whoever embeds and writes: with the other end of it one waits until nobody does.
    under_way: tokio::sync::RwLock<()>,
    /// One writer a collection in this process.
    locks: Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>,
    /// Chunks in each collection when its average length was last looked at.
    weighed_at: Mutex<HashMap<String, u64>>,
    /// The last revision that was given out.
    last_rev: AtomicI64,
}

/// A group after it was chunked.
#[derive(Default)]
struct Group {
    /// In the order of the documents.
    results: Vec<DocumentResult>,
    /// What must be written.
    prepared: Vec<Prepared>,
    /// Keys of the documents that come from somewhere else now.
    restated: HashMap<Provenance, Vec<String>>,
}

/// Why documents were not all indexed, and those that were.
#[derive(Clone, Debug)]
pub(crate) struct PutError {
    pub(crate) error: GatewayError,
    /// Finished before, with all tokens that were billed.
    pub(crate) done: PutDocumentsResult,
}

impl From<PutError> for GatewayError {
    fn from(PutError { error, .. }: PutError) -> Self {
        error
    }
}

/// What became of a group.
#[derive(Default)]
struct Written {
    /// Tokens that were booked.
    tokens: u64,
    /// Positions of the documents that are not written.
    left: HashSet<usize>,
}

impl Group {
    fn writes(&self) -> bool {
        !self.prepared.is_empty() || !self.restated.is_empty()
    }
}

/// A document that must be written, chunked.
struct Prepared {
    position: usize,
    doc: String,
    source: String,
    tenant: Option<String>,
    records: Vec<ChunkRecord>,
}

impl Indexer {
    pub(crate) fn new(
        index: Arc<dyn VectorIndex>,
        embedder: Option<Arc<BookedEmbedder>>,
        chunker: Chunker,
        weighing: Weighing,
        metrics: Metrics,
    ) -> Self {
        Self {
            paid: Arc::new(Paid::new(Arc::clone(&index))),
            under_way: tokio::sync::RwLock::default(),
            index,
            embedder,
            chunker,
            weighing,
            metrics,
            locks: Mutex::default(),
            weighed_at: Mutex::default(),
            last_rev: AtomicI64::new(0),
        }
    }

    /// Indexes documents; they are searchable when this returns. `progress` is told about every
    /// finished group, and about what was finished of one that failed.
    pub(crate) async fn put(
        &self,
        collection: &str,
        documents: Vec<Document>,
        progress: impl FnMut(&[DocumentResult], u64) + Send,
    ) -> Result<PutDocumentsResult, PutError> {
        let mut done = PutDocumentsResult { results: Vec::with_capacity(documents.len()), tokens: 0 };
        let result = async {
            let mut change = Change::of(&self.index, collection).await?;
            let result = self.put_groups(collection, documents, progress, &mut change, &mut done).await;
            // What was written before a failure stays, so it is announced all the same.
            let ended = change.end().await;
            result.and(ended)
        };
        match result.await {
            Ok(()) => Ok(done),
            Err(error) => Err(PutError { error, done }),
        }
    }

    /// Returns when what is being embedded or written now is written. Whoever wants nothing to follow stops the
    /// embedder before.
    pub(crate) async fn settled(&self) {
        drop(self.under_way.write().await);
    }

    async fn put_groups(
        &self,
        collection: &str,
        documents: Vec<Document>,
        mut progress: impl FnMut(&[DocumentResult], u64) + Send,
        change: &mut Change,
        done: &mut PutDocumentsResult,
    ) -> Result<(), GatewayError> {
        // Only a rebuild makes generations: one that a writer made would be taken for the newest by the next rebuild.
        if names::parse(collection).is_some() && self.index.meta(collection).await?.is_none() {
            return Err(GatewayError::UnknownCollection(collection.to_owned()));
        }
        let lock = self.lock_of(collection);
        let embeds = self.embedder.is_some();
        let mut groups = stream::iter(groups(documents, if embeds { 1 } else { LEXICAL_GROUPS }))
            .map(|group| self.prepare(collection, group))
            .buffered(CHUNK_AHEAD)
            .boxed();
        while let Some(group) = groups.next().await {
            let mut group = group?;
            let mut written = Written::default();
            let mut outcome = Ok(());
            if group.writes() {
                // What others write while this group was chunked, and after, makes no difference: the revision is
                // given here, so whoever comes last replaces what was before.
                let _writing = lock.lock().await;
                let _under_way = self.under_way.read().await;
                if embeds {
                    self.leave_out_written(collection, &mut group).await?;
                }
                if group.writes() {
                    outcome = self.write_group(collection, &mut group, change, &mut written).await;
                }
            }
            let results = group.results.into_iter().enumerate();
            let finished = results.filter(|(position, _)| !written.left.contains(position));
            let results: Vec<DocumentResult> = finished.map(|(_, result)| result).collect();
            for result in &results {
                let outcome = match result.outcome {
                    DocumentOutcome::Unchanged => "unchanged",
                    DocumentOutcome::Indexed => "indexed",
                    DocumentOutcome::Failed => "failed",
                };
                self.metrics.index_documents.with_label_values(&[outcome]).inc();
            }
            progress(&results, written.tokens);
            done.tokens += written.tokens;
            done.results.extend(results);
            outcome?;
        }
        if change.has_begun() && self.has_drifted(collection).await?.is_some() {
            let _writing = lock.lock().await;
            self.keep_weights(collection).await?;
        }
        Ok(())
    }

    /// Writes a group. Called with the lock.
    async fn write_group(
        &self,
        collection: &str,
        group: &mut Group,
        change: &mut Change,
        written: &mut Written,
    ) -> Result<(), GatewayError> {
        let Group { results, prepared, restated } = group;
        written.left = prepared.iter().map(|document| document.position).collect();
        self.index.has_room().await?;
        change.begin().await?;
        for (provenance, docs) in mem::take(restated) {
            self.index.restate(collection, docs, provenance).await?;
        }
        let mut outcome = Ok(());
        if !prepared.is_empty() {
            outcome = self.write(collection, mem::take(prepared), self.next_rev(), results, written).await;
        }
        // Each group is searchable from here on, also for those who asked before.
        outcome.and(change.announce().await)
    }

    /// Drops what somebody else has written since it was looked up, and would be paid for again. That is what a client
    /// meets that gave up waiting for a slow embeddings API and sends the same once more. Called with the lock.
    async fn leave_out_written(&self, collection: &str, group: &mut Group) -> Result<(), GatewayError> {
        let docs: Vec<String> = group.prepared.iter().map(|document| document.doc.clone()).collect();
        if docs.is_empty() {
            return Ok(());
        }
        let stored = self.stored(collection, &docs).await?;
        let Group { results, prepared, restated } = group;
        prepared.retain(|document| {
            let Some((known, first)) = stored.get(&document.doc).zip(document.records.first()) else {
                return true;
            };
            if !known.has(&first.hash, &first.cut) {
                return true;
            }
            results[document.position].outcome = DocumentOutcome::Unchanged;
            results[document.position].chunks = known.chunks as usize;
            if let Some(provenance) = restated_by(known, first.commit.as_ref(), first.origin.as_ref(), false)
            {
                restated.entry(provenance).or_default().push(document.doc.clone());
            }
            false
        });
        Ok(())
    }

    /// Documents that may be kept until they are indexed, and what is to be said of the others.
    pub(crate) async fn without_credentials(
        &self,
        documents: Vec<Document>,
    ) -> Result<(Vec<Document>, Vec<DocumentResult>), GatewayError> {
        let look = move || {
            let mut refused = Vec::new();
            let kept = documents.into_iter().filter_map(|document| {
                let Some(why) = secret(&document) else { return Some(document) };
                refused.push(DocumentResult {
                    source: document.source,
                    outcome: DocumentOutcome::Failed,
                    chunks: 0,
                    error: Some(why),
                });
                None
            });
            (kept.collect(), refused)
        };
        let (kept, refused): (Vec<Document>, Vec<_>) =
            tokio::task::spawn_blocking(look).await.map_err(|error| {
                UpstreamError::transient(
                    Dependency::VectorIndex,
                    format!("looking for credentials stopped: {error}"),
                )
            })?;
        self.metrics.index_documents.with_label_values(&["failed"]).inc_by(refused.len() as u64);
        Ok((kept, refused))
    }

    /// Deletes documents.
    pub(crate) async fn delete(
        &self,
        collection: &str,
        request: &DeleteDocuments,
    ) -> Result<DeleteDocumentsResult, GatewayError> {
        let lock = self.lock_of(collection);
        let _writing = lock.lock().await;
        if self.index.meta(collection).await?.is_none() {
            return Err(GatewayError::UnknownCollection(collection.to_owned()));
        }
        let name = |name: &Option<String>| name.clone().unwrap_or_default();
        let (repo, tenant) = (name(&request.repo), name(&request.tenant));
        let names = request.sources.iter().chain([&repo, &tenant]);
        if names.into_iter().any(|name| name.chars().any(char::is_control)) {
            let detail = "`sources`, `repo` and `tenant` have no control characters";
            return Err(GatewayError::Invalid(detail.to_owned()));
        }
        let docs: Vec<String> = request
            .sources
            .iter()
            .map(|source| doc_key(&tenant, &repo, source))
            .collect::<HashSet<_>>()
            .into_iter()
            .collect();
        let mut change = Change::of(&self.index, collection).await?;
        change.begin().await?;
        let result = self.delete_docs(collection, &tenant, &docs).await;
        change.end().await?;
        result
    }

    async fn delete_docs(
        &self,
        collection: &str,
        tenant: &str,
        docs: &[String],
    ) -> Result<DeleteDocumentsResult, GatewayError> {
        let mut deleted = 0;
        for docs in docs.chunks(PAGE) {
            deleted += self.stored(collection, docs).await?.len();
            // The keys say whose they are already; two locks hold better than one.
            let selection = Selection {
                docs: Some(docs.to_vec()),
                tenants: Some(vec![tenant.to_owned()]),
                ..Selection::default()
            };
            self.index.delete(collection, selection).await?;
        }
        Ok(DeleteDocumentsResult { deleted })
    }

    /// What is indexed, by source.
    pub(crate) async fn list(
        &self,
        collection: &str,
        repo: Option<&str>,
        tenant: Option<&str>,
    ) -> Result<DocumentList, GatewayError> {
        let selection = Selection {
            repo: repo.map(str::to_owned),
            tenants: Some(vec![tenant.unwrap_or_default().to_owned()]),
            ..Selection::default()
        };
        let documents = self.documents(collection, &selection).await?;
        let meta = self.index.meta(collection).await?;
        let model = self.embedder.as_ref().map(|embedder| embedder.model());
        Ok(document_list(collection, documents, meta.as_ref(), self.chunker, model))
    }

    /// Looks the group up and chunks what changed. Results are in the order of the documents.
    async fn prepare(
        &self,
        collection: &str,
        group: Vec<(Document, Option<String>)>,
    ) -> Result<Group, GatewayError> {
        let keys: Vec<String> = group.iter().map(|(document, _)| key_of(document)).collect();
        let stored = self.stored(collection, &keys).await?;
        let weighing = self.index.meta(collection).await?.map_or(self.weighing, |meta| meta.weighing);
        let how = (self.chunker, weighing);
        let stored = Arc::new(stored);
        let parts = parts(group.into_iter().zip(keys).collect()).into_iter().map(|(first, part)| {
            let stored = Arc::clone(&stored);
            tokio::task::spawn_blocking(move || prepare_blocking(how, first, part, &stored))
        });
        let mut whole = Group::default();
        for part in try_join_all(parts).await.map_err(|error| {
            UpstreamError::transient(Dependency::VectorIndex, format!("chunking stopped: {error}"))
        })? {
            whole.results.extend(part.results);
            whole.prepared.extend(part.prepared);
            for (provenance, docs) in part.restated {
                whole.restated.entry(provenance).or_default().extend(docs);
            }
        }
        Ok(whole)
    }

    /// Embeds and writes one group: each document as soon as it is complete.
    async fn write(
        &self,
        collection: &str,
        prepared: Vec<Prepared>,
        rev: i64,
        results: &mut [DocumentResult],
        written: &mut Written,
    ) -> Result<(), GatewayError> {
        let mut target = self.index.resolve(collection).await?;
        let embedder = self.embedder_for(collection, target.as_ref().map(|target| &target.meta))?;
        let texts = prepared.iter().map(|document| Texts {
            tenant: document.tenant.clone(),
            texts: match embedder {
                Some(_) => document.records.iter().map(ChunkRecord::contextual_text).collect(),
                None => Vec::new(),
            },
        });
        let mut embedding = Embedding::begin(embedder.as_ref(), &self.paid, texts.collect()).await?;
        // A new collection is weighed by the whole group: the first documents of it are no fair sample.
        let mean = mean_terms(prepared.iter().flat_map(|document| &document.records)).unwrap_or(1.0);
        let mut prepared: Vec<Option<Prepared>> = prepared.into_iter().map(Some).collect();
        while let Some(complete) = embedding.next().await {
            let taken: Vec<usize> = complete.iter().map(|(at, _)| *at).collect();
            let documents: Vec<(Prepared, Complete)> = complete
                .into_iter()
                .filter_map(|complete| Some((prepared[complete.0].take()?, complete)))
                .collect();
            let lines: Vec<(usize, usize)> =
                documents.iter().map(|(document, _)| (document.position, document.records.len())).collect();
            let model = embedder.as_deref();
            match self.write_complete(collection, &mut target, model, mean, documents, rev).await {
                Ok(()) => {
                    embedding.written(taken).await;
                    for (position, chunks) in lines {
                        results[position].chunks = chunks;
                        written.left.remove(&position);
                    }
                }
                Err(error) => embedding.not_written(error),
            }
        }
        let (tokens, error) = embedding.end().await;
        written.tokens = tokens;
        error.map_or(Ok(()), Err)
    }

    /// Writes documents with their vectors, and deletes their older revisions.
    ///
    /// They go to the generation that the vectors were made for, whatever the collection stands for by now: embedding
    /// takes its time, and another gateway may rebuild the collection meanwhile, with another model. One that did is
    /// told of, so that the documents are sent again; one that does after this returns copies what was written here.
    async fn write_complete(
        &self,
        collection: &str,
        target: &mut Option<Resolved>,
        embedder: Option<&BookedEmbedder>,
        mean: f64,
        documents: Vec<(Prepared, Complete)>,
        rev: i64,
    ) -> Result<(), GatewayError> {
        if documents.iter().any(|(document, _)| !document.records.is_empty()) {
            let size = documents.iter().find_map(|(_, (_, vectors))| vectors.first().map(Vec::len));
            self.ensure(collection, target, embedder, size, mean).await?;
        }
        let Some(Resolved { generation, .. }) = target else { return Ok(()) };
        let docs = documents.iter().map(|(document, _)| document.doc.clone()).collect();
        let obsolete = Selection { docs: Some(docs), rev_below: Some(rev), ..Selection::default() };
        let mut chunks = Vec::new();
        for (document, (_, vectors)) in documents {
            tracing::debug!(source = document.source, chunks = document.records.len(), "document indexed");
            let mut vectors = vectors.into_iter();
            for mut record in document.records {
                record.rev = rev;
                let id = chunk_id(&record);
                chunks.push(NewChunk { id, record, dense: vectors.next() });
            }
        }
        self.metrics.index_chunks.inc_by(chunks.len() as u64);
        self.index.upsert(generation, chunks, Some(obsolete)).await?;
        let current = self.index.generation(collection).await?;
        if current == *generation {
            return Ok(());
        }
        let message = format!(
            "{collection} was rebuilt while documents were written: it stands for {current} now, and they are in \
             {generation}; send them again"
        );
        Err(UpstreamError::transient(Dependency::VectorIndex, message).into())
    }

    /// The embedder that a collection needs: none for a lexical one, its own for another.
    fn embedder_for(
        &self,
        collection: &str,
        meta: Option<&CollectionMeta>,
    ) -> Result<Option<Arc<BookedEmbedder>>, GatewayError> {
        let Some(meta) = meta else { return Ok(self.embedder.clone()) };
        match (&meta.embedding_model, &self.embedder) {
            (None, _) => Ok(None),
            (Some(_), Some(embedder)) => mismatch(collection, meta, Some(embedder.model()))
                .map_or_else(|| Ok(Some(Arc::clone(embedder))), Err),
            (Some(model), None) => Err(GatewayError::EmbeddingMismatch {
                collection: collection.to_owned(),
                built_with: model.clone(),
                configured: "no embedding model is configured".to_owned(),
            }),
        }
    }

    /// The collection exists after this, and takes vectors of this size.
    async fn ensure(
        &self,
        collection: &str,
        target: &mut Option<Resolved>,
        embedder: Option<&BookedEmbedder>,
        size: Option<usize>,
        mean: f64,
    ) -> Result<(), GatewayError> {
        let Resolved { meta, .. } = match target {
            Some(target) => target,
            None => {
                let new = CollectionMeta {
                    embedding_model: embedder.map(|embedder| embedder.model().to_owned()),
                    embedding_size: size,
                    avg_len: mean,
                    weighing: self.weighing,
                };
                let meta = self.index.ensure(collection, &new).await?;
                target.insert(Resolved { generation: self.index.generation(collection).await?, meta })
            }
        };
        if meta.embedding_size == size {
            return Ok(());
        }
        let words =
            |size: Option<usize>| size.map_or("no vectors".to_owned(), |size| format!("{size} dimensions"));
        Err(GatewayError::EmbeddingMismatch {
            collection: collection.to_owned(),
            built_with: format!(
                "{} ({})",
                meta.embedding_model.clone().unwrap_or_default(),
                words(meta.embedding_size)
            ),
            configured: format!("the server gives vectors of {}", words(size)),
        })
    }

    /// Weighs the collection anew when it has grown or shrunk by half and its chunks are now longer or
    /// shorter than those it was weighed with. Whoever calls this holds the collection's lock.
    async fn keep_weights(&self, collection: &str) -> Result<(), GatewayError> {
        // Whoever held the lock before may have done it.
        if let Some((chunks, mean)) = self.has_drifted(collection).await? {
            tracing::info!(collection, chunks, avg_len = mean, "weighing the collection anew");
            self.index.reweigh(collection, mean).await?;
            self.weights_hold(collection, chunks);
        }
        Ok(())
    }

    /// The chunks of a collection and their average length, where it must be weighed anew. Asked without its lock:
    /// the next documents are written meanwhile.
    async fn has_drifted(&self, collection: &str) -> Result<Option<(u64, f64)>, GatewayError> {
        let Some(state) = self.index.info(collection).await? else { return Ok(None) };
        let last = self.weighed_at.lock().unwrap_or_else(PoisonError::into_inner).get(collection).copied();
        if last.is_some_and(|last| state.chunks < last + last / 2 && state.chunks > last / 2)
            || state.chunks == 0
        {
            return Ok(None);
        }
        let sample = self.index.scroll(collection, &Selection::default(), None, SAMPLE, false).await?;
        if let Some(mean) = mean_terms(sample.records.iter().map(|(_, record)| record))
            && (mean / state.meta.avg_len - 1.0).abs() > TOLERATED_DRIFT
        {
            return Ok(Some((state.chunks, mean)));
        }
        self.weights_hold(collection, state.chunks);
        Ok(None)
    }

    fn weights_hold(&self, collection: &str, chunks: u64) {
        self.weighed_at.lock().unwrap_or_else(PoisonError::into_inner).insert(collection.to_owned(), chunks);
    }

    async fn stored(
        &self,
        collection: &str,
        docs: &[String],
    ) -> Result<HashMap<String, StoredDocument>, GatewayError> {
        let selection = Selection { docs: Some(docs.to_vec()), ..Selection::default() };
        let stored = self.documents(collection, &selection).await?.into_iter();
        Ok(stored.map(|document| (document.doc.clone(), document)).collect())
    }

    /// What is stored. Of a document that has lost chunks the hash is empty, so that nobody takes it for unchanged.
    async fn documents(
        &self,
        collection: &str,
        selection: &Selection,
    ) -> Result<Vec<StoredDocument>, GatewayError> {
        let mut documents = self.index.documents(collection, selection).await?;
        let incomplete = self.incomplete(collection, selection, &documents).await?;
        for document in documents.iter_mut().filter(|document| incomplete.contains(&document.doc)) {
            tracing::warn!(
                collection,
                repo = document.repo,
                source = document.source,
                "this document has lost chunks; it is indexed again when it is sent again"
            );
            document.hash.clear();
        }
        Ok(documents)
    }

    /// The keys of those documents that have fewer chunks than their first one says. Each chunk is only looked at where
    /// their number is not what it should be, so for sound ones it costs a count.
    ///
    /// Nothing that writes now leaves such documents, but gateways of an earlier release did that wrote the same
    /// documents to one server at once. A document that somebody is writing may be among them.
    async fn incomplete(
        &self,
        collection: &str,
        selection: &Selection,
        documents: &[StoredDocument],
    ) -> Result<HashSet<String>, GatewayError> {
        let told: u64 = documents.iter().map(|document| u64::from(document.chunks)).sum();
        if told == 0 || self.index.count(collection, selection).await? == told {
            return Ok(HashSet::new());
        }
        let mut left: HashMap<&str, (i64, u32)> = documents
            .iter()
            .map(|document| (document.doc.as_str(), (document.rev, document.chunks)))
            .collect();
        let mut from = None;
        loop {
            let page = self.index.scroll(collection, selection, from, PAGE, false).await?;
            for (_, record) in page.records {
                if let Some((_, left)) =
                    left.get_mut(record.doc.as_str()).filter(|(rev, _)| *rev == record.rev)
                {
                    *left = left.saturating_sub(1);
                }
            }
            from = page.next;
            if from.is_none() {
                break;
            }
        }
        Ok(left.into_iter().filter(|(_, (_, left))| *left > 0).map(|(doc, _)| doc.to_owned()).collect())
    }

    fn lock_of(&self, collection: &str) -> Arc<tokio::sync::Mutex<()>> {
        let mut locks = self.locks.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(locks.entry(collection.to_owned()).or_default())
    }

    /// Microseconds since 1970, and always more than the last one.
    fn next_rev(&self) -> i64 {
        let now = Timestamp::now().as_microsecond();
        let next = |last: i64| Some(now.max(last + 1));
        let update = self.last_rev.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next);
        now.max(update.unwrap_or_default() + 1)
    }
}

/// A change of a collection, from before its first write until it is announced.
struct Change {
    index: Arc<dyn VectorIndex>,
    collection: String,
    id: Option<ChangeId>,
    /// Another writer began one that has not ended, perhaps because that writer died.
    inherited: bool,
}

impl Change {
    async fn of(index: &Arc<dyn VectorIndex>, collection: &str) -> Result<Self, GatewayError> {
        let inherited = index.version(&[collection.to_owned()]).await?.unfinished;
        Ok(Self { index: Arc::clone(index), collection: collection.to_owned(), id: None, inherited })
    }

    async fn begin(&mut self) -> Result<(), GatewayError> {
        if self.id.is_none() {
            self.id = Some(self.index.begin_change(&self.collection).await?);
        }
        Ok(())
    }

    async fn announce(&self) -> Result<(), GatewayError> {
        Ok(self.index.changed(&self.collection).await?)
    }

    fn has_begun(&self) -> bool {
        self.id.is_some()
    }

    /// Where nothing was written but somebody else may have, that is announced instead.
    async fn end(mut self) -> Result<(), GatewayError> {
        if let Some(id) = self.id.take() {
            self.index.end_change(&self.collection, id).await?;
        } else if self.inherited {
            self.announce().await?;
        }
        Ok(())
    }
}

impl Drop for Change {
    /// A write that was given up half-way is announced in the background.
    fn drop(&mut self) {
        if let Some(id) = self.id.take()
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            let (index, collection) = (Arc::clone(&self.index), mem::take(&mut self.collection));
            runtime.spawn(async move {
                if let Err(error) = index.end_change(&collection, id).await {
                    tracing::warn!(collection, error = %error, "a change is announced by whoever writes next");
                }
            });
        }
    }
}

/// What a collection holds of a repository, for those who compare it with their files.
pub(crate) fn document_list(
    collection: &str,
    documents: Vec<StoredDocument>,
    meta: Option<&CollectionMeta>,
    chunker: Chunker,
    model: Option<&str>,
) -> DocumentList {
    let mut documents: Vec<IndexedDocument> = documents
        .into_iter()
        .map(|document| IndexedDocument {
            // Cut in another way than today's: the sender shall send it again.
            content_hash: if document.cut == chunker.fingerprint(&document.source) {
                document.hash
            } else {
                String::new()
            },
            source: document.source,
            chunks: document.chunks as usize,
            commit: document.commit,
            origin: document.origin,
            repo: Some(document.repo).filter(|repo| !repo.is_empty()),
        })
        .collect();
    documents.sort_by(|a, b| a.source.cmp(&b.source));
    DocumentList {
        documents,
        mismatch: meta.and_then(|meta| mismatch(collection, meta, model)).map(|error| error.to_string()),
        words_only: meta.and_then(|meta| words_only(collection, meta.embedding_model.as_deref(), model)),
    }
}

/// Why a collection cannot be used with a model; `None`: it can.
pub(crate) fn mismatch(collection: &str, meta: &CollectionMeta, model: Option<&str>) -> Option<GatewayError> {
    match (&meta.embedding_model, model) {
        (Some(built_with), Some(configured)) if built_with != configured => {
            Some(GatewayError::EmbeddingMismatch {
                collection: collection.to_owned(),
                built_with: built_with.clone(),
                configured: format!("{configured} is configured"),
            })
        }
        _ => None,
    }
}

/// A document with what is wrong with it.
type Judged = (Document, Option<String>);

/// Documents in groups of bounded size, `times` as large as usual.
fn groups(documents: Vec<Document>, times: usize) -> Vec<Vec<Judged>> {
    let mut groups: Vec<Vec<Judged>> = Vec::new();
    let mut seen = HashSet::new();
    let mut bytes = 0;
    for document in documents {
        let fault = fault(&document, &mut seen);
        let size = document.text.len();
        match groups.last_mut() {
            Some(group) if group.len() < times * GROUP_DOCUMENTS && bytes + size <= times * GROUP_BYTES => {
                bytes += size;
                group.push((document, fault));
            }
            _ => {
                bytes = size;
                groups.push(vec![(document, fault)]);
            }
        }
    }
    groups
}

/// A group in parts of about the same size, to be chunked at once, each with the position of its first document.
fn parts(group: Vec<(Judged, String)>) -> Vec<(usize, Vec<(Judged, String)>)> {
    let bytes = |judged: &Judged| judged.0.text.len() + 1;
    let all: usize = group.iter().map(|(judged, _)| bytes(judged)).sum();
    let mut parts: Vec<(usize, Vec<_>)> = Vec::with_capacity(CHUNKERS);
    let (mut before, mut last) = (0, None);
    for (position, document) in group.into_iter().enumerate() {
        let part = Some(before * CHUNKERS / all);
        before += bytes(&document.0);
        match parts.last_mut() {
            Some((_, documents)) if part == last => documents.push(document),
            _ => parts.push((position, vec![document])),
        }
        last = part;
    }
    parts
}

/// What is wrong with a document, if anything.
fn fault(document: &Document, seen: &mut HashSet<String>) -> Option<String> {
    if let Some(fault) = source_fault(&document.source) {
        return Some(format!("`source` {fault}; give the path of the file, or any stable name"));
    }
    let names = [
        ("lang", &document.lang),
        ("repo", &document.repo),
        ("commit", &document.commit),
        ("tenant", &document.tenant),
        ("origin", &document.origin),
    ];
    for (field, value) in names {
        // A place, as a source is one.
        let max = if field == "origin" { MAX_SOURCE_BYTES } else { MAX_NAME_BYTES };
        if value.as_ref().is_some_and(|value| value.len() > max || value.chars().any(char::is_control)) {
            return Some(format!("`{field}` is longer than {max} bytes or has control characters"));
        }
    }
    (!seen.insert(key_of(document)))
        .then(|| "is named twice in this request; only the first one was taken".to_owned())
}

/// Chunks what changed of a part of a group whose first document has position `first`.
fn prepare_blocking(
    (chunker, weighing): (Chunker, Weighing),
    first: usize,
    part: Vec<(Judged, String)>,
    stored: &HashMap<String, StoredDocument>,
) -> Group {
    let mut results = Vec::with_capacity(part.len());
    let mut prepared = Vec::new();
    let mut restated: HashMap<Provenance, Vec<String>> = HashMap::new();
    for (position, ((document, fault), doc)) in (first..).zip(part) {
        let mut result = DocumentResult {
            source: document.source.clone(),
            outcome: DocumentOutcome::Indexed,
            chunks: 0,
            error: fault,
        };
        if result.error.is_some() {
            result.outcome = DocumentOutcome::Failed;
            results.push(result);
            continue;
        }
        let hash = content_hash(&document.text);
        let cut = chunker.fingerprint(&document.source);
        let known = stored.get(&doc);
        if let Some(known) = known.filter(|known| known.has(&hash, &cut)) {
            result.outcome = DocumentOutcome::Unchanged;
            result.chunks = known.chunks as usize;
            let (commit, origin) = (document.commit.as_ref(), document.origin.as_ref());
            if let Some(provenance) = restated_by(known, commit, origin, document.restate) {
                restated.entry(provenance).or_default().push(doc);
            }
            results.push(result);
            continue;
        }
        if let Some(why) = secret(&document) {
            result.outcome = DocumentOutcome::Failed;
            result.error = Some(why);
            results.push(result);
            continue;
        }
        let records = records((chunker, weighing), &document, &doc, &hash, &cut);
        if records.is_empty() && known.is_none() {
            // Nothing to quote, and nothing to forget.
            result.outcome = DocumentOutcome::Unchanged;
        } else {
            let Document { source, tenant, .. } = document;
            prepared.push(Prepared { position, doc, source, tenant, records });
        }
        results.push(result);
    }
    Group { results, prepared, restated }
}

/// What a document whose content is the same says anew of where it comes from; `None`: nothing.
///
/// A commit stays valid when later ones have the same content, so only a missing one is added, or one that the sender
/// says is gone: otherwise every commit would write the whole repository.
fn restated_by(
    known: &StoredDocument,
    commit: Option<&String>,
    origin: Option<&String>,
    is_gone: bool,
) -> Option<Provenance> {
    let replaceable = known.commit.is_none() || (is_gone && known.commit.as_ref() != commit);
    let provenance = Provenance {
        commit: commit.filter(|_| replaceable).cloned(),
        origin: origin.filter(|origin| known.origin.as_ref() != Some(origin)).cloned(),
    };
    (provenance != Provenance::default()).then_some(provenance)
}

/// Why a document is not indexed although nothing is wrong with it: whoever searches would read a credential.
fn secret(document: &Document) -> Option<String> {
    if document.not_secret {
        return None;
    }
    let (what, line) = secrets::find(&document.text)?;
    Some(format!(
        "holds {what} in line {line}, so it was not indexed; take it out, or send `\"not_secret\": true` with it \
         if it is none"
    ))
}

fn records(
    (chunker, weighing): (Chunker, Weighing),
    document: &Document,
    doc: &str,
    hash: &str,
    cut: &str,
) -> Vec<ChunkRecord> {
    let lang = document
        .lang
        .as_ref()
        .map(|lang| lang.to_lowercase())
        .or_else(|| chunk::language_of(&document.source).map(str::to_owned));
    let chunks = chunker.chunk(lang.as_deref(), &document.text);
    let number = |value: usize| u32::try_from(value).unwrap_or(u32::MAX);
    let of = number(chunks.len());
    chunks
        .into_iter()
        .enumerate()
        .map(|(n, chunk)| {
            let mut record = ChunkRecord {
                doc: doc.to_owned(),
                // Given when it is written.
                rev: 0,
                hash: hash.to_owned(),
                cut: cut.to_owned(),
                n: number(n),
                of,
                source: document.source.clone(),
                start: chunk.start_line,
                end: chunk.end_line,
                heading: chunk.heading,
                lang: lang.clone(),
                repo: document.repo.clone().unwrap_or_default(),
                tenant: document.tenant.clone().unwrap_or_default(),
                commit: document.commit.clone(),
                origin: document.origin.clone(),
                terms: 0,
                tokens: number(chunk.tokens),
                glue: chunk.glue.map(str::to_owned),
                text: chunk.text.to_owned(),
            };
            record.terms = weighing.terms(&record);
            record
        })
        .collect()
}

fn key_of(document: &Document) -> String {
    let text = |value: &Option<String>| value.clone().unwrap_or_default();
    doc_key(&text(&document.tenant), &text(&document.repo), &document.source)
}

/// The key of a document: fields are separated by a character that none of them may have.
fn doc_key(tenant: &str, repo: &str, source: &str) -> String {
    let digest = Sha256::digest(format!("{tenant}\0{repo}\0{source}"));
    let head: [u8; 16] = std::array::from_fn(|at| digest[at]);
    Uuid::from_bytes(head).simple().to_string()
}

/// The same content gives the same ids: what an interrupted write left is overwritten, not doubled.
fn chunk_id(record: &ChunkRecord) -> Uuid {
    chunk_id_at(record, record.n)
}

/// The id of another chunk of the same document: of its neighbour, say.
pub(crate) fn chunk_id_at(record: &ChunkRecord, n: u32) -> Uuid {
    Uuid::new_v5(&CHUNK_NAMESPACE, format!("{}:{}:{n}", record.doc, record.hash).as_bytes())
}

fn mean_terms<'a>(records: impl Iterator<Item = &'a ChunkRecord>) -> Option<f64> {
    let (count, terms) =
        records.fold((0_u64, 0_u64), |(count, terms), record| (count + 1, terms + u64::from(record.terms)));
    (terms > 0).then(|| terms as f64 / count as f64)
}
