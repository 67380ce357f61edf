//! Fills another generation of a collection from the one in use, and switches over.
//!
//! The chunks themselves are copied and embedded anew, with the model that is configured now: neither
//! files nor repositories are needed, and every repository and tenant in the collection comes along.
//! The copy is a comparison that is repeated until nothing differs, so it can be stopped at any moment
//! and goes on where it was; what is written to the old generation meanwhile is seen by the next round.
//! For the last round writers wait (those of this gateway). Readers wait for nothing.
//!
//! Writers of other gateways wait for nobody. They look at what the collection stands for *after* they have written
//! (`Indexer::write_complete`), and the old generation is compared once more *after* the switch: whoever still found
//! the old one had written before that comparison, and whoever did not sends its documents again.
//!
//! A document that has lost chunks is not copied: it would look sound. Whoever indexes its repository next finds that
//! it is not there.

use std::collections::{HashMap, HashSet};

use crate::{
    embed::{Embedding, Texts},
    error::GatewayError,
    index::{ChunkRecord, CollectionMeta, NewChunk, Selection, StoredDocument, names, read_documents},
    jobs::Progress,
};

use super::{Change, Indexer, PAGE, mean_terms};

/// Documents that are copied together.
const BATCH: usize = 32;

/// Rounds before the last one: each is shorter, unless somebody writes faster than we copy.
const MAX_ROUNDS: usize = 10;

/// What has to be done.
pub(super) struct Difference {
    /// In the old generation, not or differently in the new one.
    missing: Vec<String>,
    /// In the new generation only.
    gone: Vec<String>,
    /// Documents of the old generation.
    total: usize,
    /// Their chunks.
    chunks: usize,
    /// Revisions of the documents in the old generation that have lost no chunks.
    pub(super) before: HashMap<String, i64>,
    /// Revisions of the documents in the new generation.
    after: HashMap<String, i64>,
    /// Keys of those in the old generation that have lost chunks, or are being written.
    partial: HashSet<String>,
    /// Documents of the old generation that have lost chunks, as they are told of. They are left out.
    incomplete: Vec<String>,
}

/// Whether a generation is searched, and written to by others, while it is copied to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Readers {
    None,
    Some,
}

/// What was done of it.
#[derive(Default)]
struct Copied {
    documents: usize,
    chunks: usize,
    tokens: u64,
}

impl Indexer {
    /// The generation that a rebuild would fill, and the one that is in use.
    pub(crate) async fn next_generation(&self, collection: &str) -> Result<(String, String), GatewayError> {
        let state = self.index.info(collection).await?;
        let Some(state) = state else { return Err(GatewayError::UnknownCollection(collection.to_owned())) };
        let Some(used) = state.generation else {
            return Err(GatewayError::Invalid(format!(
                "{collection:?} is not a collection that can be rebuilt; name it without its generation"
            )));
        };
        let all = self.index.collections().await?;
        let taken = all.iter().flat_map(|(name, state)| [Some(name.as_str()), state.generation.as_deref()]);
        let number = names::next(collection, taken.flatten());
        Ok((names::generation(collection, number), used))
    }

    /// Fills `generation`, checks it, and makes `collection` stand for it.
    pub(crate) async fn rebuild(
        &self,
        collection: &str,
        generation: &str,
        progress: Progress<'_>,
    ) -> Result<(), GatewayError> {
        let Some(old) = self.index.info(collection).await? else {
            return Err(GatewayError::UnknownCollection(collection.to_owned()));
        };
        // Never the name: it may stand for another generation by the time it is read.
        let used = old.generation.clone().unwrap_or_else(|| collection.to_owned());
        if used == generation {
            // An earlier attempt got this far.
            return Ok(());
        }
        if old.chunks == 0 {
            return Err(GatewayError::Invalid(format!(
                "collection {collection:?} is empty: there is nothing to rebuild"
            )));
        }
        for _ in 0..MAX_ROUNDS {
            let difference = self.difference(&used, generation).await?;
            if difference.missing.is_empty() && difference.gone.is_empty() {
                break;
            }
            progress.begin(difference.total);
            progress.copied(difference.total - difference.missing.len(), 0, 0);
            self.copy(&used, generation, &difference, &old.meta, progress).await?;
        }
        let lock = self.lock_of(collection);
        let _writing = lock.lock().await;
        let last = self.difference(&used, generation).await?;
        self.copy(&used, generation, &last, &old.meta, progress).await?;
        self.check(&used, generation).await?;
        if !last.incomplete.is_empty() {
            tracing::warn!(
                collection,
                documents = last.incomplete.len(),
                "documents with lost chunks are left out"
            );
            progress.fault(&left_out(last.incomplete));
        }
        self.switch(collection, generation).await?;
        tracing::info!(collection, generation, "a rebuilt collection is in use");
        if let Err(error) = self.catch_up(collection, &used, generation, &last.before, &old.meta).await {
            tracing::warn!(collection, generation, error = %error, "late writes were not brought over");
            progress.fault(&format!(
                "{generation} is in use, but what other gateways wrote to {used} at the moment of the switch could \
                 not be brought over ({error}); run `atlas index` on what they indexed"
            ));
        }
        Ok(())
    }

    /// Brings over what other gateways did to the old generation between the last comparison, which saw `known`, and
    /// the switch. By now the new one has writers of its own, and theirs is newer.
    pub(super) async fn catch_up(
        &self,
        collection: &str,
        old: &str,
        new: &str,
        known: &HashMap<String, i64>,
        meta: &CollectionMeta,
    ) -> Result<(), GatewayError> {
        let late = self.difference(old, new).await?;
        let is_late = |doc: &String| {
            let written = late.before.get(doc);
            written != known.get(doc) && written > late.after.get(doc)
        };
        let written: Vec<String> = late.missing.iter().filter(|doc| is_late(doc)).cloned().collect();
        let deleted: Vec<(&String, i64)> = known
            .iter()
            .filter(|(doc, _)| !late.before.contains_key(*doc) && !late.partial.contains(*doc))
            .map(|(doc, rev)| (doc, *rev))
            .collect();
        if written.is_empty() && deleted.is_empty() {
            return Ok(());
        }
        tracing::info!(
            collection,
            written = written.len(),
            deleted = deleted.len(),
            "bringing late writes over"
        );
        let mut change = Change::of(&self.index, collection).await?;
        change.begin().await?;
        let result = self.bring_over(old, new, &written, &deleted, meta).await;
        let ended = change.end().await;
        result.and(ended)
    }

    async fn bring_over(
        &self,
        old: &str,
        new: &str,
        written: &[String],
        deleted: &[(&String, i64)],
        meta: &CollectionMeta,
    ) -> Result<(), GatewayError> {
        for (doc, rev) in deleted {
            let selection = Selection {
                docs: Some(vec![(*doc).clone()]),
                rev_below: Some(rev + 1),
                ..Selection::default()
            };
            self.index.delete(new, selection).await?;
        }
        for docs in written.chunks(BATCH) {
            let documents = self.newest(old, docs).await?;
            let _under_way = self.under_way.read().await;
            self.write_copy(new, documents, meta, Readers::Some, &mut Copied::default()).await?;
        }
        Ok(())
    }

    /// Makes a collection stand for another generation that is there.
    pub(crate) async fn use_generation(
        &self,
        collection: &str,
        generation: &str,
    ) -> Result<(), GatewayError> {
        let Some((of, _)) = names::parse(generation) else {
            return Err(GatewayError::Invalid(format!(
                "{generation:?} is not a generation; `GET /v1/collections` lists them"
            )));
        };
        // Another's is none of this collection's.
        if of != collection || self.index.meta(generation).await?.is_none() {
            return Err(GatewayError::UnknownCollection(generation.to_owned()));
        }
        let lock = self.lock_of(collection);
        let _writing = lock.lock().await;
        self.switch(collection, generation).await
    }

    /// Readers see the old generation until here and the new one from here on, from no cache either.
    async fn switch(&self, collection: &str, generation: &str) -> Result<(), GatewayError> {
        let mut change = Change::of(&self.index, collection).await?;
        change.begin().await?;
        self.index.use_generation(collection, generation).await?;
        change.end().await
    }

    /// Deletes a generation that no collection stands for, or a collection with all its generations.
    pub(crate) async fn drop_collection(&self, name: &str) -> Result<(), GatewayError> {
        let all = self.index.collections().await?;
        if let Some((user, _)) = all.iter().find(|(_, state)| state.generation.as_deref() == Some(name)) {
            return Err(GatewayError::InUse { generation: name.to_owned(), collection: user.clone() });
        }
        let lock = self.lock_of(name);
        let _writing = lock.lock().await;
        let mut change = Change::of(&self.index, name).await?;
        change.begin().await?;
        // The name first: from then on nobody finds half of it.
        let mut dropped = self.index.drop_collection(name).await?;
        for (other, _) in &all {
            if names::parse(other).is_some_and(|(of, _)| of == name) {
                dropped |= self.index.drop_collection(other).await?;
            }
        }
        change.end().await?;
        if dropped { Ok(()) } else { Err(GatewayError::UnknownCollection(name.to_owned())) }
    }

    pub(super) async fn difference(&self, old: &str, new: &str) -> Result<Difference, GatewayError> {
        // Both are read, whatever the index remembers: this is also the check of what was copied.
        let all = async |generation: &str| -> Result<HashMap<String, StoredDocument>, GatewayError> {
            let read = read_documents(&*self.index, generation, &Selection::default()).await?;
            Ok(read.into_iter().map(|document| (document.doc.clone(), document)).collect())
        };
        let (mut before, after) = (all(old).await?, all(new).await?);
        let stored: Vec<StoredDocument> = before.values().cloned().collect();
        let partial = self.incomplete(old, &Selection::default(), &stored).await?;
        before.retain(|doc, _| !partial.contains(doc));
        let incomplete =
            stored.into_iter().filter(|stored| partial.contains(&stored.doc)).map(told).collect();
        let same = |a: &StoredDocument, b: &StoredDocument| a.rev == b.rev && a.has(&b.hash, &b.cut);
        let missing = before
            .iter()
            .filter(|(doc, stored)| after.get(*doc).is_none_or(|copied| !same(stored, copied)))
            .map(|(doc, _)| doc.clone())
            .collect();
        let gone = after.keys().filter(|doc| !before.contains_key(*doc)).cloned().collect();
        let chunks = before.values().map(|stored| stored.chunks as usize).sum();
        let total = before.len();
        let revisions = |documents: HashMap<String, StoredDocument>| {
            documents.into_iter().map(|(doc, stored)| (doc, stored.rev)).collect()
        };
        let (before, after) = (revisions(before), revisions(after));
        Ok(Difference { missing, gone, total, chunks, before, after, partial, incomplete })
    }

    async fn copy(
        &self,
        old: &str,
        new: &str,
        difference: &Difference,
        meta: &CollectionMeta,
        progress: Progress<'_>,
    ) -> Result<(), GatewayError> {
        for docs in difference.gone.chunks(PAGE) {
            let selection = Selection { docs: Some(docs.to_vec()), ..Selection::default() };
            self.index.delete(new, selection).await?;
        }
        for docs in difference.missing.chunks(BATCH) {
            let documents = self.newest(old, docs).await?;
            let mut copied = Copied::default();
            let result = {
                let _under_way = self.under_way.read().await;
                self.index.has_room().await?;
                self.write_copy(new, documents, meta, Readers::None, &mut copied).await
            };
            let Copied { documents, chunks, tokens } = copied;
            progress.copied(if result.is_ok() { docs.len() } else { documents }, chunks, tokens);
            result?;
        }
        Ok(())
    }

    /// The chunks of documents, of the newest revision of each.
    async fn newest(
        &self,
        collection: &str,
        docs: &[String],
    ) -> Result<HashMap<String, Vec<ChunkRecord>>, GatewayError> {
        let selection = Selection { docs: Some(docs.to_vec()), ..Selection::default() };
        let mut documents: HashMap<String, Vec<ChunkRecord>> = HashMap::new();
        let mut from = None;
        loop {
            let page = self.index.scroll(collection, &selection, from, PAGE, true).await?;
            for (_, record) in page.records {
                let chunks = documents.entry(record.doc.clone()).or_default();
                match chunks.first().map(|other| other.rev) {
                    Some(rev) if rev > record.rev => {}
                    Some(rev) if rev < record.rev => *chunks = vec![record],
                    _ => chunks.push(record),
                }
            }
            from = page.next;
            if from.is_none() {
                return Ok(documents);
            }
        }
    }

    /// Embeds and writes, each document as soon as it is complete: what is written before a failure is not missing
    /// any more when the rebuild goes on.
    async fn write_copy(
        &self,
        generation: &str,
        documents: HashMap<String, Vec<ChunkRecord>>,
        meta: &CollectionMeta,
        readers: Readers,
        copied: &mut Copied,
    ) -> Result<(), GatewayError> {
        let mut documents: Vec<Vec<ChunkRecord>> = documents
            .into_values()
            // A document that is being written has no first chunk yet: the next round sees it.
            .filter(|records| records.iter().any(|record| record.n == 0))
            .collect();
        // Each tenant pays for its own, in calls of its own.
        documents.sort_by(|a, b| a[0].tenant.cmp(&b[0].tenant));
        for record in documents.iter_mut().flatten() {
            record.terms = self.weighing.terms(record);
        }
        let texts = documents.iter().map(|records| Texts {
            tenant: Some(records[0].tenant.clone()).filter(|tenant| !tenant.is_empty()),
            texts: match &self.embedder {
                Some(_) => records.iter().map(ChunkRecord::contextual_text).collect(),
                None => Vec::new(),
            },
        });
        let mut embedding = Embedding::begin(self.embedder.as_ref(), &self.paid, texts.collect()).await?;
        let mean = mean_terms(documents.iter().flatten()).unwrap_or(meta.avg_len);
        while let Some(complete) = embedding.next().await {
            let taken: Vec<usize> = complete.iter().map(|(at, _)| *at).collect();
            let part: Vec<_> = complete
                .into_iter()
                .map(|(at, vectors)| (std::mem::take(&mut documents[at]), vectors))
                .collect();
            let chunks = part.iter().map(|(records, _)| records.len()).sum::<usize>();
            match self.write_complete_copy(generation, part, readers, mean).await {
                Ok(()) => {
                    copied.documents += taken.len();
                    copied.chunks += chunks;
                    embedding.written(taken).await;
                }
                Err(error) => embedding.not_written(error),
            }
        }
        let (tokens, error) = embedding.end().await;
        copied.tokens = tokens;
        error.map_or(Ok(()), Err)
    }

    async fn write_complete_copy(
        &self,
        generation: &str,
        documents: Vec<(Vec<ChunkRecord>, Vec<Vec<f32>>)>,
        readers: Readers,
        mean: f64,
    ) -> Result<(), GatewayError> {
        let size = documents.iter().find_map(|(_, vectors)| vectors.first().map(Vec::len));
        let wanted = CollectionMeta {
            embedding_model: self.embedder.as_ref().map(|embedder| embedder.model().to_owned()),
            embedding_size: size,
            avg_len: mean,
            // A rebuild takes the settings of today.
            weighing: self.weighing,
        };
        let made = self.index.ensure(generation, &wanted).await?;
        if made.embedding_model != wanted.embedding_model || made.embedding_size != size {
            return Err(GatewayError::EmbeddingMismatch {
                collection: generation.to_owned(),
                built_with: made.embedding_model.unwrap_or_else(|| "no model".to_owned()),
                configured: "another one is configured by now; start the rebuild again".to_owned(),
            });
        }
        let mut docs = HashSet::new();
        let mut chunks = Vec::new();
        for (records, vectors) in documents {
            let Some((doc, rev)) = records.first().map(|record| (record.doc.clone(), record.rev)) else {
                continue;
            };
            let mut vectors = vectors.into_iter();
            let new = records.into_iter().map(|record| NewChunk {
                id: super::chunk_id(&record),
                record,
                dense: vectors.next(),
            });
            match readers {
                Readers::None => {
                    docs.insert(doc);
                    chunks.extend(new);
                }
                Readers::Some => {
                    let obsolete =
                        Selection { docs: Some(vec![doc]), rev_below: Some(rev), ..Selection::default() };
                    self.index.upsert(generation, new.collect(), Some(obsolete)).await?;
                }
            }
        }
        if readers == Readers::Some {
            return Ok(());
        }
        let ids: HashSet<_> = chunks.iter().map(|chunk| chunk.id).collect();
        self.metrics.index_chunks.inc_by(chunks.len() as u64);
        self.index.upsert(generation, chunks, None).await?;
        self.delete_others(generation, docs.into_iter().collect(), &ids).await
    }

    /// Deletes chunks of these documents that are not among these: nobody reads this generation yet.
    async fn delete_others(
        &self,
        generation: &str,
        docs: Vec<String>,
        keep: &HashSet<uuid::Uuid>,
    ) -> Result<(), GatewayError> {
        let selection = Selection { docs: Some(docs), ..Selection::default() };
        let mut stale = Vec::new();
        let mut from = None;
        loop {
            let page = self.index.scroll(generation, &selection, from, PAGE, false).await?;
            stale.extend(page.records.into_iter().map(|(id, _)| id).filter(|id| !keep.contains(id)));
            from = page.next;
            if from.is_none() {
                break;
            }
        }
        if !stale.is_empty() {
            self.index.delete(generation, Selection { ids: Some(stale), ..Selection::default() }).await?;
        }
        Ok(())
    }

    /// The new generation has every document, and every chunk of it.
    async fn check(&self, old: &str, new: &str) -> Result<(), GatewayError> {
        let difference = self.difference(old, new).await?;
        let chunks = self.index.info(new).await?.map(|state| state.chunks).unwrap_or_default();
        if difference.missing.is_empty() && difference.gone.is_empty() && chunks == difference.chunks as u64 {
            return Ok(());
        }
        Err(GatewayError::Upstream(atlas_shared::UpstreamError::permanent(
            atlas_shared::Dependency::VectorIndex,
            "rebuild_differs",
            format!(
                "{new} has {chunks} chunks, {} were copied; {} documents are missing. Searches go on with the old \
                 generation; drop {new} and rebuild again",
                difference.chunks,
                difference.missing.len()
            ),
        )))
    }
}

fn told(document: StoredDocument) -> String {
    match document.repo.as_str() {
        "" => document.source,
        repo => format!("{repo}/{}", document.source),
    }
}

fn left_out(mut documents: Vec<String>) -> String {
    const NAMED: usize = 3;
    documents.sort_unstable();
    let more = documents.len().saturating_sub(NAMED);
    let named = documents[..documents.len().min(NAMED)].join(", ");
    let more = if more == 0 { String::new() } else { format!(" and {more} more") };
    format!(
        "left out, because chunks of them are lost: {named}{more}; run `atlas index` on their repositories"
    )
}
