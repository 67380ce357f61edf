//! Where chunks live: the [`VectorIndex`] port and its adapters.
//!
//! Every adapter keeps two vectors a chunk: `text` (dense, cosine; only in collections with an
//! embedding model) and `bm25` (sparse, weighed by the engine's own BM25 and its IDF). Ranking lists
//! are fused above this port, so adapters only have to agree on what they return, not on how they
//! order ties. Nothing outside this folder names an adapter; [`open`] picks one by configuration.

use std::{borrow::Cow, collections::HashMap, sync::Arc};

use async_trait::async_trait;
use atlas_shared::{
    Dependency, UpstreamError,
    config::{GatewayConfig, IndexConfig},
};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::chunk::{NOTEBOOK, said_in_notebook};

#[cfg(test)]
mod contract;
#[cfg(feature = "embedded")]
mod edge;
mod lexical;
pub(crate) mod names;
mod qdrant;
mod version;

pub(crate) use lexical::Weighing;
pub(crate) use version::{ChangeId, Version};

/// The code of what is refused because it does not fit onto the disk.
pub(crate) const DISK_FULL: &str = "disk_full";

/// Name of the dense vector.
const DENSE: &str = "text";

/// Name of the sparse vector.
const SPARSE: &str = "bm25";

/// How long vectors are kept that were paid for and not written: whoever was refused by one day's budget comes back
/// on another day.
const KEPT_VECTORS_DAYS: u32 = 30;
/// Records of one page when documents are listed.
const PAGE: usize = 1000;

/// Payload fields that filters use.
const KEYWORD_FIELDS: [&str; 4] = ["doc", "repo", "lang", "tenant"];

/// Payload fields that are compared as numbers.
const INTEGER_FIELDS: [&str; 2] = ["n", "rev"];

/// What is decided when a collection is made, and recorded in it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct CollectionMeta {
    /// Embedding model; `None`: lexical.
    pub(crate) embedding_model: Option<String>,
    /// Length of its vectors.
    pub(crate) embedding_size: Option<usize>,
    /// Average length of a chunk in BM25 terms: every chunk of the collection is weighed with it.
    pub(crate) avg_len: f64,
    /// The other parameters of BM25.
    #[serde(default = "Weighing::unrecorded")]
    pub(crate) weighing: Weighing,
}

/// A collection as it is now.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct CollectionState {
    pub(crate) meta: CollectionMeta,
    /// Chunks in it.
    pub(crate) chunks: u64,
    /// The generation that the name stands for; `None` for the name of a generation itself.
    pub(crate) generation: Option<String>,
}

/// A collection that is searched: what it stands for, and what that was made with.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Resolved {
    pub(crate) generation: String,
    pub(crate) meta: CollectionMeta,
}

/// A chunk as it is stored: the payload of a point. Field names are short: they are in every point.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct ChunkRecord {
    /// Key of its document: a hash of tenant, repository and source.
    pub(crate) doc: String,
    /// Revision of its document, in microseconds since 1970: where two revisions are found at the
    /// same moment, the newer one counts.
    pub(crate) rev: i64,
    /// Content hash of its document.
    pub(crate) hash: String,
    /// How it was cut ([`crate::chunk::Chunker::fingerprint`]).
    pub(crate) cut: String,
    /// Position in its document, from 0. Chunk 0 is written last: where it is, the others are.
    pub(crate) n: u32,
    /// Chunks of its document.
    pub(crate) of: u32,
    /// Path or name of its document.
    pub(crate) source: String,
    /// First line, from 1.
    pub(crate) start: u32,
    /// Last line, included.
    pub(crate) end: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) heading: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) lang: Option<String>,
    /// Empty: none.
    #[serde(default)]
    pub(crate) repo: String,
    /// Empty: everybody's.
    #[serde(default)]
    pub(crate) tenant: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) commit: Option<String>,
    /// Where its repository lies.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) origin: Option<String>,
    /// Length in BM25 terms.
    #[serde(default)]
    pub(crate) terms: u32,
    /// An upper bound of the text's tokens; 0: not known.
    #[serde(default)]
    pub(crate) tokens: u32,
    /// What stands between the chunk before and this one, where both can be joined.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) glue: Option<String>,
    /// The quoted lines. Left out where a scroll does not ask for it.
    #[serde(default)]
    pub(crate) text: String,
}

impl ChunkRecord {
    /// What is embedded: where it stands, then the text. Only the text is ever quoted.
    pub(crate) fn contextual_text(&self) -> String {
        let text = self.said();
        match &self.heading {
            Some(heading) => format!("{} › {heading}\n{text}", self.source),
            None => format!("{}\n{text}", self.source),
        }
    }

    /// What its lines say: the text, but for notebooks, whose lines are JSON.
    pub(crate) fn said(&self) -> Cow<'_, str> {
        match self.lang.as_deref() {
            Some(NOTEBOOK) => Cow::Owned(said_in_notebook(&self.text)),
            _ => Cow::Borrowed(&self.text),
        }
    }
}

/// Where documents come from: fields of their records that say nothing about their text.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize)]
pub(crate) struct Provenance {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) commit: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) origin: Option<String>,
}

/// A document as its first chunk tells of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct StoredDocument {
    /// Its key.
    pub(crate) doc: String,
    pub(crate) source: String,
    /// Empty: none.
    pub(crate) repo: String,
    /// Empty: everybody's.
    pub(crate) tenant: String,
    /// Its content hash.
    pub(crate) hash: String,
    /// How it was cut.
    pub(crate) cut: String,
    pub(crate) rev: i64,
    /// How many chunks it has.
    pub(crate) chunks: u32,
    pub(crate) commit: Option<String>,
    pub(crate) origin: Option<String>,
}

impl StoredDocument {
    /// Is this content in the index, cut in this way?
    pub(crate) fn has(&self, hash: &str, cut: &str) -> bool {
        self.hash == hash && self.cut == cut
    }

    fn of(first: &ChunkRecord) -> Self {
        let ChunkRecord { doc, rev, hash, cut, of, source, repo, tenant, commit, origin, .. } = first.clone();
        Self { doc, source, repo, tenant, hash, cut, rev, chunks: of, commit, origin }
    }
}

/// A chunk on its way into an index.
#[derive(Clone, Debug)]
pub(crate) struct NewChunk {
    pub(crate) id: Uuid,
    pub(crate) record: ChunkRecord,
    /// Its embedding, in collections that have a model.
    pub(crate) dense: Option<Vec<f32>>,
}

/// Which chunks; an empty selection is all of them.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Selection {
    pub(crate) ids: Option<Vec<Uuid>>,
    pub(crate) docs: Option<Vec<String>>,
    pub(crate) tenants: Option<Vec<String>>,
    pub(crate) lang: Option<String>,
    pub(crate) repo: Option<String>,
    /// Only revisions older than this.
    pub(crate) rev_below: Option<i64>,
    /// Only the first chunk of each document.
    pub(crate) first_chunks: bool,
}

/// One search: both lists are asked for at once.
#[derive(Clone, Debug)]
pub(crate) struct Search {
    /// Query embedding; `None`: no dense list.
    pub(crate) dense: Option<Vec<f32>>,
    /// Query as [`Weighing::query`], whose scores are added up; empty: no lexical list.
    pub(crate) lexical: Vec<String>,
    pub(crate) selection: Selection,
    /// Length of each list.
    pub(crate) limit: usize,
}

/// A found chunk.
#[derive(Clone, Debug)]
pub(crate) struct Hit {
    pub(crate) id: Uuid,
    /// Cosine in the dense list, BM25 in the lexical one.
    pub(crate) score: f32,
    /// Shared with whatever remembers it.
    pub(crate) record: Arc<ChunkRecord>,
}

/// Best first, ties in any order.
#[derive(Clone, Debug, Default)]
pub(crate) struct Lists {
    pub(crate) dense: Vec<Hit>,
    pub(crate) lexical: Vec<Hit>,
    /// Cosines of what only the lexical list has, where the adapter has them without another call.
    pub(crate) cosines: HashMap<Uuid, f32>,
}

/// One page of a scroll, by id.
#[derive(Clone, Debug)]
pub(crate) struct Page {
    pub(crate) records: Vec<(Uuid, ChunkRecord)>,
    /// Where the next page begins.
    pub(crate) next: Option<Uuid>,
}

/// The index port. Writes are durable and visible when they return.
///
/// A name may be that of a collection, which stands for one of its generations (see [`names`]), or that of
/// a generation. Every method takes both.
#[async_trait]
pub(crate) trait VectorIndex: Send + Sync {
    /// Makes the collection unless it exists, as the first of its generations. Returns what it is: an
    /// existing one keeps its meta.
    async fn ensure(&self, collection: &str, meta: &CollectionMeta) -> Result<CollectionMeta, UpstreamError>;

    /// The generation that a name stands for and what it was made with; `None` when there is none of that name.
    /// Cheap: asked for before every search, and may be some seconds old, though not older than what the last
    /// [`VectorIndex::version`] says. Who searches the generation it names, and not the name, gets what fits the meta
    /// whatever happens meanwhile.
    async fn resolve(&self, collection: &str) -> Result<Option<Resolved>, UpstreamError>;

    /// The generation that a name stands for now, and never some seconds ago; the name itself where it stands for
    /// none. Who has written to a generation asks, because another process may have switched the collection over.
    async fn generation(&self, collection: &str) -> Result<String, UpstreamError>;

    /// What the collection was made with, as [`VectorIndex::resolve`] says it.
    async fn meta(&self, collection: &str) -> Result<Option<CollectionMeta>, UpstreamError> {
        Ok(self.resolve(collection).await?.map(|resolved| resolved.meta))
    }

    /// The collection as it is now; `None` when there is none of that name.
    async fn info(&self, collection: &str) -> Result<Option<CollectionState>, UpstreamError>;

    /// All collections, and the generations that none of them stands for, by name.
    async fn collections(&self) -> Result<Vec<(String, CollectionState)>, UpstreamError>;

    /// Writes chunks, replacing those of the same id, then deletes what they make obsolete. A chunk that is
    /// first in its document becomes visible after the others of it that stand beside it here.
    ///
    /// Where several processes write one index, whoever has the newest revision of a document wins, in whatever
    /// order they write: chunks of an older one replace none of it, and are gone when the last call returns.
    async fn upsert(
        &self,
        collection: &str,
        chunks: Vec<NewChunk>,
        obsolete: Option<Selection>,
    ) -> Result<(), UpstreamError>;

    /// Says anew where documents come from, by their keys. What is `None` stays as it is, as do text and vectors.
    async fn restate(
        &self,
        collection: &str,
        docs: Vec<String>,
        provenance: Provenance,
    ) -> Result<(), UpstreamError>;

    /// Deletes what is selected. An empty selection is refused.
    async fn delete(&self, collection: &str, selection: Selection) -> Result<(), UpstreamError>;

    /// Searches. An unknown collection gives empty lists.
    async fn search(&self, collection: &str, search: Search) -> Result<Lists, UpstreamError>;

    /// The cosine of each of these chunks with a vector, without reading anything else of them. What is not
    /// there, or has no vector, is left out.
    async fn cosines(
        &self,
        collection: &str,
        vector: Vec<f32>,
        ids: Vec<Uuid>,
    ) -> Result<HashMap<Uuid, f32>, UpstreamError>;

    /// How many chunks are selected. An unknown collection has none.
    async fn count(&self, collection: &str, selection: &Selection) -> Result<u64, UpstreamError>;

    /// Reads `limit` chunks in the order of their ids, from `from` on. `with_text`: their text too.
    async fn scroll(
        &self,
        collection: &str,
        selection: &Selection,
        from: Option<Uuid>,
        limit: usize,
        with_text: bool,
    ) -> Result<Page, UpstreamError>;

    /// The documents of which chunks are selected, each at its newest revision. An unknown collection has none.
    async fn documents(
        &self,
        collection: &str,
        selection: &Selection,
    ) -> Result<Vec<StoredDocument>, UpstreamError> {
        read_documents(self, collection, selection).await
    }

    /// Weighs every chunk anew with another average length, and records it.
    async fn reweigh(&self, collection: &str, avg_len: f64) -> Result<(), UpstreamError>;

    /// Makes a collection stand for one of its generations from now on: readers see the old one or the
    /// new one, never none. The generation must exist.
    async fn use_generation(&self, collection: &str, generation: &str) -> Result<(), UpstreamError>;

    /// Deletes a collection with the generation that it stands for, or a generation. True when there was
    /// one.
    async fn drop_collection(&self, collection: &str) -> Result<bool, UpstreamError>;

    /// Is there room for what is to be written? Asked before anything is paid for. An engine that refuses by itself
    /// what it has no room for says yes.
    async fn has_room(&self) -> Result<(), UpstreamError> {
        Ok(())
    }

    /// Keeps vectors that were paid for and cannot be written yet, under ids of the caller's. No reader sees them.
    /// What nobody has forgotten after [`KEPT_VECTORS_DAYS`] goes by itself.
    async fn keep_vectors(&self, vectors: Vec<(Uuid, Vec<f32>)>) -> Result<(), UpstreamError>;

    /// Those of them that are kept.
    async fn kept_vectors(&self, ids: &[Uuid]) -> Result<HashMap<Uuid, Vec<f32>>, UpstreamError>;

    /// They are written, or of no use.
    async fn forget_vectors(&self, ids: Vec<Uuid>) -> Result<(), UpstreamError>;

    /// What answers from these collections may be kept under. It is another one once a change of any
    /// replica was announced, and what was announced before this call began is in it.
    async fn version(&self, collections: &[String]) -> Result<Version, UpstreamError>;

    /// Says that a change of a collection begins: until it ends, [`Version::unfinished`] is true. So
    /// whoever comes after a writer that died half-way announces what that one could not.
    async fn begin_change(&self, collection: &str) -> Result<ChangeId, UpstreamError>;

    /// Announces what was written so far.
    async fn changed(&self, collection: &str) -> Result<(), UpstreamError>;

    /// Announces, and says that the change has ended.
    async fn end_change(&self, collection: &str, change: ChangeId) -> Result<(), UpstreamError>;

    /// Gives every replica's cached answers up, of all collections.
    async fn new_epoch(&self) -> Result<(), UpstreamError>;

    /// Is the engine there and fit for us? For readiness.
    async fn check(&self) -> Result<(), UpstreamError>;

    /// Finishes what is under way, so that another process can open the index.
    async fn close(&self);
}

/// Opens the index that the configuration names.
#[cfg_attr(
    not(feature = "embedded"),
    expect(clippy::unused_async, reason = "the embedded engine is opened off-thread")
)]
pub(crate) async fn open(config: &GatewayConfig) -> Result<Arc<dyn VectorIndex>, UpstreamError> {
    match &config.index {
        IndexConfig::Qdrant { url, api_key } => {
            Ok(Arc::new(qdrant::QdrantIndex::connect(url, api_key.as_ref(), config.timeout)?))
        }
        #[cfg(feature = "embedded")]
        IndexConfig::Embedded(dir) => {
            Ok(Arc::new(edge::EdgeIndex::open(&dir.join("vectors"), config.index_min_free_bytes).await?))
        }
        #[cfg(not(feature = "embedded"))]
        IndexConfig::Embedded(_) => Err(UpstreamError::misconfigured(
            Dependency::VectorIndex,
            "QDRANT_URL",
            "is not set, and this binary was built without the embedded engine",
            "set it to Qdrant's gRPC address, such as http://qdrant:6334, or build with --features embedded",
        )),
    }
}

/// A vector as it is kept.
fn vector_bytes(vector: &[f32]) -> Vec<u8> {
    vector.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// Reads it back; `None` for what is none, such as a file that was cut short.
fn vector_from(bytes: &[u8]) -> Option<Vec<f32>> {
    let (values, rest) = bytes.as_chunks::<4>();
    let vector: Vec<f32> = values.iter().map(|value| f32::from_le_bytes(*value)).collect();
    (rest.is_empty() && !vector.is_empty() && vector.iter().all(|value| value.is_finite())).then_some(vector)
}

/// [`VectorIndex::documents`], by reading the first chunk of each.
pub(crate) async fn read_documents<I: VectorIndex + ?Sized>(
    index: &I,
    collection: &str,
    selection: &Selection,
) -> Result<Vec<StoredDocument>, UpstreamError> {
    let first = Selection { first_chunks: true, ..selection.clone() };
    let mut newest = HashMap::new();
    let mut from = None;
    loop {
        let page = index.scroll(collection, &first, from, PAGE, false).await?;
        for (_, record) in page.records {
            keep_newest(&mut newest, StoredDocument::of(&record));
        }
        from = page.next;
        if from.is_none() {
            return Ok(newest.into_values().collect());
        }
    }
}

/// An interrupted replacement leaves two revisions of a document: the newer one counts.
fn keep_newest(newest: &mut HashMap<String, StoredDocument>, document: StoredDocument) {
    if newest.get(&document.doc).is_none_or(|other| other.rev < document.rev) {
        newest.insert(document.doc.clone(), document);
    }
}

/// What is in an embedded index, as long as it need not be opened for that and nobody else has it; `None`: open it.
#[cfg(feature = "embedded")]
pub(crate) fn unopened(
    config: &GatewayConfig,
    collection: &str,
) -> Option<(CollectionMeta, Vec<StoredDocument>)> {
    match &config.index {
        IndexConfig::Embedded(dir) => edge::unopened(&dir.join("vectors"), collection),
        IndexConfig::Qdrant { .. } => None,
    }
}

#[cfg(not(feature = "embedded"))]
pub(crate) fn unopened(_: &GatewayConfig, _: &str) -> Option<(CollectionMeta, Vec<StoredDocument>)> {
    None
}

/// A failure of the engine that may pass.
fn failed(what: &str, error: impl std::fmt::Display) -> UpstreamError {
    UpstreamError::transient(Dependency::VectorIndex, format!("{what}: {error}"))
}

/// Both engines take JSON payloads; a record is always an object, and so is a part of it.
fn payload(record: &impl Serialize) -> Result<serde_json::Value, UpstreamError> {
    match serde_json::to_value(record) {
        Ok(value @ serde_json::Value::Object(_)) => Ok(value),
        Ok(_) | Err(_) => {
            Err(UpstreamError::permanent(Dependency::VectorIndex, "payload", "a chunk is not a JSON object"))
        }
    }
}

/// Reads a record back. One that was written by something else is an error, not a panic.
fn record(value: serde_json::Value) -> Result<ChunkRecord, UpstreamError> {
    serde_json::from_value(value).map_err(|error| {
        UpstreamError::permanent(
            Dependency::VectorIndex,
            "foreign_collection",
            format!("a point in this collection was not written by Atlas ({error}); name another collection"),
        )
    })
}
