//! The Qdrant engine in this process (`qdrant-edge` 0.7).
//!
//! One folder a generation: the engine's files, and our `atlas.json` with the meta. `aliases.json` says
//! which generation each collection stands for. What the engine demands of us:
//!
//! - It does not replay its log on load, so every write is flushed before it is answered.
//! - Its `flush` panics when it meets a concurrent update, so **one thread a collection** owns all
//!   updates and flushes. It takes all that is waiting, applies it, flushes once and answers all.
//! - Readers are free: they run on the blocking pool, beside the writer.
//! - A search reads the payload of every candidate of every segment, and parses it: so it is asked for ids, and what
//!   [`records`] does not remember is read after it.
//! - A filter costs more than what it leaves out is worth where it leaves out nothing: see [`Collection::search`].
//! - New points go to a segment whose posting lists are changed in place, and each change of one touches all that
//!   is in it: time that grows with its square. So a segment that has [`SEGMENT_CHUNKS`] is **rebuilt**, by the
//!   writer, into one that is only read (and mapped, not loaded, when the index is opened), and writing begins anew.
//!   What a rebuilding that is cut short would leave behind is undone: see [`kept`].
//! - One process at a time can open a folder.
//! - It writes through memory maps, so a full disk kills: see [`room`].

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fs::{self, File},
    io, mem,
    panic::{self, AssertUnwindSafe},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError, RwLock,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Instant,
};

use async_trait::async_trait;
use atlas_shared::{Dependency, UpstreamError};
use qdrant_edge::{
    Condition, CountRequest, CreateIndex, Distance, EdgeConfig, EdgeOptimizersConfig, EdgeShard,
    EdgeSparseVectorParams, EdgeVectorParams, FieldIndexOperations, Filter, HasIdCondition, HnswIndexConfig,
    IntegerIndexParams, KeywordIndexParams, Modifier, NamedQuery, PayloadFieldSchema, PayloadOps,
    PayloadSchemaParams, PayloadSelector, PayloadSelectorExclude, PointId, PointInsertOperations,
    PointOperations, PointStruct, PointStructPersisted, PointVectorsPersisted, QueryEnum, ScoredPoint,
    ScrollRequest, SearchRequest, SetPayloadOp, SparseVector, UpdateOperation, UpdateVectorsOp, Vector,
    VectorInternal, VectorOperations, VectorPersisted, VectorStructPersisted, Vectors, WalOptions,
    WithPayloadInterface, WithVector,
    bm25_embed::{EdgeBm25, EdgeBm25Config},
};
use serde_json::{Value, json};
use tokio::sync::{mpsc, oneshot};
use uuid::Uuid;

use super::{
    ChangeId, ChunkRecord, CollectionMeta, CollectionState, DENSE, Hit, INTEGER_FIELDS, KEYWORD_FIELDS,
    Lists, NewChunk, PAGE, Page, Provenance, Resolved, SPARSE, Search, Selection, StoredDocument,
    VectorIndex, Version, Weighing, failed, keep_newest, names, payload, record, version::LocalVersions,
};

mod contents;
mod kept;
mod paid;
mod records;
mod room;

use contents::{Contents, Effect};
use paid::PaidVectors;
use records::{CollectionRecords, Records};
use room::Room;

/// Our file beside the engine's.
const META_FILE: &str = "atlas.json";

/// Held by the process that has the collection open.
const LOCK_FILE: &str = "atlas.lock";

/// How many chunks were written since the engine last rebuilt a segment.
const WRITTEN_FILE: &str = "atlas.written";

/// Which generation each collection stands for.
const ALIASES_FILE: &str = "aliases.json";

/// Writes that may wait for the writer of a collection.
const WRITE_QUEUE: usize = 16;

/// Log files of the engine: it never shortens its log by itself, so they are small and pruned on open.
const WAL_SEGMENT_BYTES: usize = 4 * 1024 * 1024;

/// About so many chunks are in one segment of the engine before it is rebuilt for reading. Smaller: less CPU time for
/// posting lists, more files to sync for each flush and to open. The tests of this crate rebuild all the time.
const SEGMENT_CHUNKS: usize = if cfg!(test) { 4 } else { 8 * 1024 };

/// The engine is asked to rebuild when [`SEGMENT_CHUNKS`] were written since it last did: before that no segment is
/// full, and for asking all segments are kept aside, which costs more than writing a thousand chunks. Where some of
/// what was written is gone again, it is asked after so many more.
const REBUILD_CHUNKS: usize = SEGMENT_CHUNKS.div_ceil(8);

/// Segments of a collection, before the engine merges small ones.
const SEGMENTS: usize = 32;

/// Bytes that the engine counts for the terms of a chunk.
const SPARSE_BYTES: usize = 512;

/// Where the engine builds segments; nothing in it is needed after a crash.
const UNFINISHED_SEGMENTS: &str = "temp_segments";

/// Words whose terms are remembered: about 4 MiB.
const KEPT_WORDS: usize = 64 * 1024;

/// Longer words are not remembered, in bytes.
const LONGEST_KEPT_WORD: usize = 32;

/// About so many chunks are given to the engine at a time, while the next ones are weighed.
const UPSERT_CHUNKS: usize = 256;

/// Chunks that are weighed anew at a time.
const REWEIGH_PAGE: usize = 512;

/// Searches before what they find is read in the same breath: one is nearly always enough.
const TWO_STEP_SEARCHES: usize = 2;

/// All collections of one folder.
pub(super) struct EdgeIndex {
    dir: PathBuf,
    /// By the names of their folders: generations.
    collections: Arc<RwLock<BTreeMap<String, Arc<Collection>>>>,
    /// Collections with their generations, as in [`ALIASES_FILE`].
    aliases: Arc<Aliases>,
    /// Held while a collection is made or dropped, to the end of it: also where nobody waits for that any more.
    changing: Arc<tokio::sync::Mutex<()>>,
    /// One process at a time has the folder open, so they need not be on disk.
    versions: LocalVersions,
    records: Records,
    /// Beside the collections, and of no interest to them.
    paid: Arc<PaidVectors>,
    room: Room,
}

/// Collections with their generations.
type Aliases = RwLock<BTreeMap<String, String>>;

/// One open collection.
struct Collection {
    dir: PathBuf,
    /// Its destructor flushes, and panics when that fails: see `drop`.
    shard: Arc<EdgeShard>,
    meta: RwLock<CollectionMeta>,
    /// To the writer thread; `None` once closed.
    writes: Mutex<Option<mpsc::Sender<Write>>>,
    writer: Mutex<Option<thread::JoinHandle<()>>>,
    bm25: EdgeBm25,
    /// Weighs chunks. The writer's.
    weigher: Mutex<Weigher>,
    /// What was read lately.
    records: CollectionRecords,
    /// Which documents are in it.
    contents: Contents,
    /// Chunks of tenants may be in it: set before the first one is written, and never unset.
    has_tenants: AtomicBool,
    room: Room,
    /// The kernel lets go of it when the process dies. The last field: it is held until the engine has closed.
    _lock: File,
}

/// What the engine found, with nothing of what it is.
#[derive(Default)]
struct Found {
    dense: Vec<ScoredPoint>,
    lexical: Vec<ScoredPoint>,
    /// Of what only the lexical list has.
    cosines: HashMap<Uuid, f32>,
}

/// Work for the writer thread.
struct Write {
    change: Change,
    done: oneshot::Sender<Result<(), UpstreamError>>,
}

enum Change {
    Upsert(Vec<NewChunk>, Option<Selection>),
    Restate(Vec<String>, Provenance),
    Delete(Selection),
    Reweigh(f64),
}

impl Change {
    /// Chunks that it changes, or more: nobody knows what a deletion finds.
    fn chunks(&self) -> usize {
        match self {
            Self::Upsert(chunks, _) => chunks.len(),
            Self::Restate(..) | Self::Delete(_) | Self::Reweigh(_) => REBUILD_CHUNKS,
        }
    }
}

impl EdgeIndex {
    /// Opens every collection in the folder, so that a locked or damaged one is told at start.
    ///
    /// `min_free`: bytes of the disk that no write takes.
    pub(super) async fn open(dir: &Path, min_free: u64) -> Result<Self, UpstreamError> {
        let dir = dir.to_owned();
        blocking(move || {
            fs::create_dir_all(&dir).map_err(|error| cannot_use(&dir, &error))?;
            let room = Room::new(&dir, min_free);
            let mut collections = BTreeMap::new();
            let records = Records::default();
            for entry in fs::read_dir(&dir).map_err(|error| cannot_use(&dir, &error))? {
                let path = entry.map_err(|error| cannot_use(&dir, &error))?.path();
                // A folder without our file is a collection whose creation was cut short.
                let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
                if path.join(META_FILE).is_file() {
                    collections.insert(name.to_owned(), Collection::load(&path, &records, room.clone())?);
                }
            }
            let mut aliases = load_aliases(&dir)?;
            // A deletion that was cut short.
            aliases.retain(|_, generation| collections.contains_key(generation));
            let paid = PaidVectors::open(&dir).map_err(|error| cannot_use(&dir, &error))?;
            Ok(Self {
                paid: Arc::new(paid),
                room,
                dir,
                collections: Arc::new(RwLock::new(collections)),
                aliases: Arc::new(RwLock::new(aliases)),
                changing: Arc::default(),
                versions: LocalVersions::new(),
                records,
            })
        })
        .await
    }

    fn get(&self, name: &str) -> Option<Arc<Collection>> {
        // The alias is read under the lock of the folders: what it names cannot be dropped in between.
        let collections = self.collections.read().unwrap_or_else(PoisonError::into_inner);
        let generation = self.generation_of(name);
        collections.get(generation.as_deref().unwrap_or(name)).cloned()
    }

    fn generation_of(&self, name: &str) -> Option<String> {
        self.aliases.read().unwrap_or_else(PoisonError::into_inner).get(name).cloned()
    }

    fn existing(&self, name: &str) -> Result<Arc<Collection>, UpstreamError> {
        self.get(name).ok_or_else(|| {
            UpstreamError::permanent(
                Dependency::VectorIndex,
                "unknown_collection",
                format!("there is no collection {name:?}"),
            )
        })
    }
}

/// What is in the collection of this name, as long as that is known without the engine and nobody has it open.
pub(super) fn unopened(dir: &Path, name: &str) -> Option<(CollectionMeta, Vec<StoredDocument>)> {
    let aliases = load_aliases(dir).ok()?;
    let dir = dir.join(aliases.get(name).map_or(name, String::as_str));
    let meta = serde_json::from_str(&fs::read_to_string(dir.join(META_FILE)).ok()?).ok()?;
    let _lock = lock(&dir).ok()?;
    Some((meta, contents::read_unopened(&dir)?))
}

/// Writes the aliases to disk, then uses them.
fn set_aliases(
    dir: &Path,
    shared: &Aliases,
    change: impl FnOnce(&mut BTreeMap<String, String>),
) -> Result<(), UpstreamError> {
    let mut aliases = shared.read().unwrap_or_else(PoisonError::into_inner).clone();
    change(&mut aliases);
    let text = serde_json::to_string_pretty(&aliases).map_err(|error| failed("aliases", error))?;
    replace_file(dir, ALIASES_FILE, &text)?;
    *shared.write().unwrap_or_else(PoisonError::into_inner) = aliases;
    Ok(())
}

#[async_trait]
impl VectorIndex for EdgeIndex {
    async fn ensure(&self, name: &str, meta: &CollectionMeta) -> Result<CollectionMeta, UpstreamError> {
        let changing = Arc::clone(&self.changing).lock_owned().await;
        if let Some(collection) = self.get(name) {
            return Ok(collection.meta());
        }
        let generation = if names::parse(name).is_some() {
            name.to_owned()
        } else {
            let taken = self.collections.read().unwrap_or_else(PoisonError::into_inner);
            names::generation(name, names::next(name, taken.keys().map(String::as_str)))
        };
        let (dir, name, meta) = (self.dir.clone(), name.to_owned(), meta.clone());
        let (collections, aliases) = (Arc::clone(&self.collections), Arc::clone(&self.aliases));
        let (records, room) = (self.records.clone(), self.room.clone());
        blocking(move || {
            let _changing = changing;
            room.check(0)?;
            let collection = Collection::create(&dir.join(&generation), meta, &records, room)?;
            let meta = collection.meta();
            collections
                .write()
                .unwrap_or_else(PoisonError::into_inner)
                .insert(generation.clone(), collection);
            if generation != name {
                set_aliases(&dir, &aliases, |aliases| drop(aliases.insert(name, generation)))?;
            }
            Ok(meta)
        })
        .await
    }

    async fn resolve(&self, name: &str) -> Result<Option<Resolved>, UpstreamError> {
        let generation = self.generation_of(name).unwrap_or_else(|| name.to_owned());
        Ok(self.get(&generation).map(|collection| Resolved { generation, meta: collection.meta() }))
    }

    async fn generation(&self, name: &str) -> Result<String, UpstreamError> {
        Ok(self.generation_of(name).unwrap_or_else(|| name.to_owned()))
    }

    async fn info(&self, name: &str) -> Result<Option<CollectionState>, UpstreamError> {
        let Some(collection) = self.get(name) else { return Ok(None) };
        let state = blocking(move || collection.state()).await?;
        Ok(Some(CollectionState { generation: self.generation_of(name), ..state }))
    }

    async fn collections(&self) -> Result<Vec<(String, CollectionState)>, UpstreamError> {
        let all = self.collections.read().unwrap_or_else(PoisonError::into_inner).clone();
        let aliases = self.aliases.read().unwrap_or_else(PoisonError::into_inner).clone();
        blocking(move || {
            let mut listed = Vec::with_capacity(all.len());
            for (generation, collection) in all {
                let state = collection.state()?;
                let alias = aliases.iter().find(|(_, used)| **used == generation);
                listed.push(match alias {
                    Some((name, _)) => {
                        (name.clone(), CollectionState { generation: Some(generation), ..state })
                    }
                    None => (generation, state),
                });
            }
            listed.sort_by(|(a, _), (b, _)| a.cmp(b));
            Ok(listed)
        })
        .await
    }

    async fn upsert(
        &self,
        name: &str,
        chunks: Vec<NewChunk>,
        obsolete: Option<Selection>,
    ) -> Result<(), UpstreamError> {
        self.existing(name)?.write(Change::Upsert(chunks, obsolete)).await
    }

    async fn restate(
        &self,
        name: &str,
        docs: Vec<String>,
        provenance: Provenance,
    ) -> Result<(), UpstreamError> {
        self.existing(name)?.write(Change::Restate(docs, provenance)).await
    }

    async fn delete(&self, name: &str, selection: Selection) -> Result<(), UpstreamError> {
        self.existing(name)?.write(Change::Delete(selection)).await
    }

    async fn search(&self, name: &str, search: Search) -> Result<Lists, UpstreamError> {
        let Some(collection) = self.get(name) else { return Ok(Lists::default()) };
        blocking(move || collection.search(search)).await
    }

    async fn cosines(
        &self,
        name: &str,
        vector: Vec<f32>,
        ids: Vec<Uuid>,
    ) -> Result<HashMap<Uuid, f32>, UpstreamError> {
        let Some(collection) = self.get(name) else { return Ok(HashMap::new()) };
        blocking(move || collection.cosines(vector, ids)).await
    }

    async fn count(&self, name: &str, selection: &Selection) -> Result<u64, UpstreamError> {
        let Some(collection) = self.get(name) else { return Ok(0) };
        let selection = selection.clone();
        blocking(move || collection.count(&selection)).await
    }

    async fn scroll(
        &self,
        name: &str,
        selection: &Selection,
        from: Option<Uuid>,
        limit: usize,
        with_text: bool,
    ) -> Result<Page, UpstreamError> {
        let Some(collection) = self.get(name) else { return Ok(Page { records: Vec::new(), next: None }) };
        let selection = selection.clone();
        blocking(move || collection.scroll(&selection, from, limit, with_text)).await
    }

    async fn documents(
        &self,
        name: &str,
        selection: &Selection,
    ) -> Result<Vec<StoredDocument>, UpstreamError> {
        let Some(collection) = self.get(name) else { return Ok(Vec::new()) };
        let selection = selection.clone();
        blocking(move || collection.documents(&selection)).await
    }

    async fn reweigh(&self, name: &str, avg_len: f64) -> Result<(), UpstreamError> {
        self.existing(name)?.write(Change::Reweigh(avg_len)).await
    }

    async fn use_generation(&self, name: &str, generation: &str) -> Result<(), UpstreamError> {
        let _changing = self.changing.lock().await;
        self.existing(generation)?;
        set_aliases(&self.dir, &self.aliases, |aliases| {
            aliases.insert(name.to_owned(), generation.to_owned());
        })
    }

    async fn drop_collection(&self, name: &str) -> Result<bool, UpstreamError> {
        let changing = Arc::clone(&self.changing).lock_owned().await;
        let generation = self.generation_of(name).unwrap_or_else(|| name.to_owned());
        // First the name, then what it stands for: a crash in between leaves a generation that can be dropped.
        set_aliases(&self.dir, &self.aliases, |aliases| aliases.retain(|_, used| *used != generation))?;
        let removed = self.collections.write().unwrap_or_else(PoisonError::into_inner).remove(&generation);
        let Some(collection) = removed else { return Ok(false) };
        self.versions.changed(name);
        blocking(move || {
            let _changing = changing;
            collection.stop();
            let dir = collection.dir.clone();
            drop(collection);
            // Without our file the folder is no collection any more, whatever happens next.
            fs::remove_file(dir.join(META_FILE)).map_err(|error| cannot_use(&dir, &error))?;
            fs::remove_dir_all(&dir).map_err(|error| cannot_use(&dir, &error))?;
            Ok(true)
        })
        .await
    }

    async fn has_room(&self) -> Result<(), UpstreamError> {
        let room = self.room.clone();
        blocking(move || room.check(0)).await
    }

    async fn keep_vectors(&self, vectors: Vec<(Uuid, Vec<f32>)>) -> Result<(), UpstreamError> {
        let (paid, dir) = (Arc::clone(&self.paid), self.dir.clone());
        blocking(move || paid.keep(vectors).map_err(|error| cannot_use(&dir, &error))).await
    }

    async fn kept_vectors(&self, ids: &[Uuid]) -> Result<HashMap<Uuid, Vec<f32>>, UpstreamError> {
        let (paid, ids) = (Arc::clone(&self.paid), ids.to_vec());
        blocking(move || Ok(paid.kept(&ids))).await
    }

    async fn forget_vectors(&self, ids: Vec<Uuid>) -> Result<(), UpstreamError> {
        let (paid, dir) = (Arc::clone(&self.paid), self.dir.clone());
        blocking(move || paid.forget(&ids).map_err(|error| cannot_use(&dir, &error))).await
    }

    async fn version(&self, collections: &[String]) -> Result<Version, UpstreamError> {
        Ok(self.versions.of(collections))
    }

    async fn begin_change(&self, _: &str) -> Result<ChangeId, UpstreamError> {
        Ok(ChangeId(Uuid::nil()))
    }

    async fn changed(&self, name: &str) -> Result<(), UpstreamError> {
        self.versions.changed(name);
        Ok(())
    }

    async fn end_change(&self, name: &str, _: ChangeId) -> Result<(), UpstreamError> {
        self.versions.changed(name);
        Ok(())
    }

    async fn new_epoch(&self) -> Result<(), UpstreamError> {
        self.versions.new_epoch();
        Ok(())
    }

    async fn check(&self) -> Result<(), UpstreamError> {
        let stopped = self
            .collections
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .iter()
            .find(|(_, collection)| collection.writer_is_gone())
            .map(|(name, _)| name.clone());
        match stopped {
            None => Ok(()),
            Some(name) => {
                Err(failed(&format!("collection {name:?}"), "its writer stopped; restart the gateway"))
            }
        }
    }

    async fn close(&self) {
        // Whoever opens the folder next must not meet a collection that is still being made.
        let _changing = self.changing.lock().await;
        let all = std::mem::take(&mut *self.collections.write().unwrap_or_else(PoisonError::into_inner));
        // Errors have nowhere to go: everything that was answered is on disk already.
        let _ = blocking(move || {
            for collection in all.values() {
                collection.stop();
            }
            Ok(())
        })
        .await;
    }
}

impl Drop for EdgeIndex {
    fn drop(&mut self) {
        // Each writer thread holds its collection: without this they would never end.
        for collection in self.collections.read().unwrap_or_else(PoisonError::into_inner).values() {
            drop(collection.writes.lock().unwrap_or_else(PoisonError::into_inner).take());
        }
    }
}

impl Drop for Collection {
    fn drop(&mut self) {
        // Everything that was answered is on disk. Where the engine's own flush could only panic (again),
        // it is left out by keeping its shard for ever.
        if thread::panicking() || !self.dir.join(META_FILE).exists() {
            mem::forget(Arc::clone(&self.shard));
        }
    }
}

impl Collection {
    fn create(
        dir: &Path,
        meta: CollectionMeta,
        records: &Records,
        room: Room,
    ) -> Result<Arc<Self>, UpstreamError> {
        if dir.exists() {
            // Left behind by a creation or a deletion that was cut short: there is no `atlas.json` in it.
            fs::remove_dir_all(dir).map_err(|error| cannot_use(dir, &error))?;
        }
        fs::create_dir_all(dir).map_err(|error| cannot_use(dir, &error))?;
        let lock = lock(dir)?;
        let shard = EdgeShard::new(dir, config(&meta)).map_err(|error| failed("create collection", error))?;
        for (field, schema) in KEYWORD_FIELDS
            .iter()
            .map(|field| (*field, keyword_index()))
            .chain(INTEGER_FIELDS.iter().map(|field| (*field, integer_index(field))))
        {
            let operation = FieldIndexOperations::CreateIndex(CreateIndex {
                field_name: field.parse().map_err(|()| failed("create index", field))?,
                field_schema: Some(PayloadFieldSchema::FieldParams(schema)),
            });
            shard
                .update(UpdateOperation::FieldIndexOperation(operation))
                .map_err(|error| failed("create index", error))?;
        }
        shard.flush();
        save_meta(dir, &meta)?;
        Self::start(Contents::of_new(dir), lock, shard, meta, records, dir, room)
    }

    fn load(dir: &Path, records: &Records, room: Room) -> Result<Arc<Self>, UpstreamError> {
        let text = fs::read_to_string(dir.join(META_FILE)).map_err(|error| cannot_use(dir, &error))?;
        let meta: CollectionMeta = serde_json::from_str(&text)
            .map_err(|error| failed(&format!("{} is damaged", dir.join(META_FILE).display()), error))?;
        // The engine's own lock comes too late: all of this is for the owner only.
        let lock = lock(dir)?;
        prune_log(&dir.join("wal")).map_err(|error| cannot_use(dir, &error))?;
        match fs::remove_dir_all(dir.join(UNFINISHED_SEGMENTS)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(cannot_use(dir, &error)),
            _ => {}
        }
        if kept::put_back(dir).map_err(|error| cannot_use(dir, &error))? {
            tracing::info!(dir = %dir.display(), "segments are as before a rebuilding that was cut short");
        }
        let shard = EdgeShard::load(dir, Some(config(&meta))).map_err(|error| not_opened(dir, error))?;
        Self::start(Contents::of_existing(dir), lock, shard, meta, records, dir, room)
    }

    fn start(
        contents: Contents,
        lock: File,
        shard: EdgeShard,
        meta: CollectionMeta,
        records: &Records,
        dir: &Path,
        room: Room,
    ) -> Result<Arc<Self>, UpstreamError> {
        let has_tenants = has_tenants(&shard)?;
        let (sender, receiver) = mpsc::channel(WRITE_QUEUE);
        let collection = Arc::new(Self {
            dir: dir.to_owned(),
            shard: Arc::new(shard),
            weigher: Mutex::new(Weigher::new(&meta)?),
            meta: RwLock::new(meta),
            writes: Mutex::new(Some(sender)),
            writer: Mutex::new(None),
            bm25: query_bm25()?,
            records: records.of_collection(),
            contents,
            has_tenants: AtomicBool::new(has_tenants),
            room,
            _lock: lock,
        });
        let writer = thread::Builder::new()
            .name("atlas-index".to_owned())
            .spawn({
                let collection = Arc::clone(&collection);
                move || {
                    if collection.run_writer(receiver) {
                        collection.contents.save();
                    }
                }
            })
            .map_err(|error| failed("start the writer", error))?;
        *collection.writer.lock().unwrap_or_else(PoisonError::into_inner) = Some(writer);
        Ok(collection)
    }

    /// The writer thread: ends when the last sender is gone, or where it broke: false.
    fn run_writer(&self, mut writes: mpsc::Receiver<Write>) -> bool {
        let file = self.dir.join(WRITTEN_FILE);
        let known = fs::read_to_string(&file).ok().and_then(|text| text.trim().parse().ok());
        let mut written = known.unwrap_or(SEGMENT_CHUNKS);
        while let Some(first) = writes.blocking_recv() {
            let mut batch = vec![first];
            while batch.len() < WRITE_QUEUE
                && let Ok(next) = writes.try_recv()
            {
                batch.push(next);
            }
            if let Err(error) = self.contents.begin() {
                for write in batch {
                    let _ = write.done.send(Err(cannot_use(&self.dir, &error)));
                }
                continue;
            }
            let mut done = Vec::with_capacity(batch.len());
            for write in batch {
                written = written.saturating_add(write.change.chunks());
                let effect = Effect::of(&write.change);
                let result = self.apply(write.change);
                self.contents.note(effect, result.is_ok());
                done.push((write.done, result));
            }
            // The engine panics where the disk is full: an error of these writes, and the end of this
            // writer, because what is in memory is now ahead of what is on disk.
            let flushed = panic::catch_unwind(AssertUnwindSafe(|| self.shard.flush()));
            for (answer, result) in done {
                let result = if flushed.is_ok() { result } else { Err(not_flushed(&self.dir)) };
                // The caller may have gone; the write is done all the same.
                let _ = answer.send(result);
            }
            if flushed.is_err() {
                return false;
            }
            self.contents.end();
            if written >= SEGMENT_CHUNKS {
                match self.rebuild_full_segments() {
                    Some(true) => written = 0,
                    Some(false) => written = SEGMENT_CHUNKS - REBUILD_CHUNKS,
                    None => return false,
                }
            }
            // Where it cannot be noted, or is cut short, the next process only asks too early.
            let _ = fs::write(&file, written.to_string());
        }
        true
    }

    /// Rebuilds what has grown large for reading; readers go on meanwhile. Nobody waits for this: whoever writes
    /// next waits until it is done. True where something was rebuilt, `None` when nothing may be written any more.
    fn rebuild_full_segments(&self) -> Option<bool> {
        let began = Instant::now();
        if let Err(error) = self.room.check(room::needed_to_rebuild(&self.dir.join("segments"))) {
            tracing::warn!(dir = %self.dir.display(), error = %error, "segments are not rebuilt");
            return Some(false);
        }
        let rebuilt = match kept::keep(&self.dir) {
            Ok(()) => self.optimize(began),
            Err(error) => {
                tracing::warn!(dir = %self.dir.display(), error = %error, "segments are not rebuilt; is the disk full?");
                Some(false)
            }
        };
        // After a panic nobody knows what is on disk: it is put back when the collection is opened.
        let rebuilt = rebuilt?;
        match kept::let_go(&self.dir) {
            Ok(()) => Some(rebuilt),
            Err(error) => {
                tracing::error!(dir = %self.dir.display(), error = %error, "writing stops; restart the gateway");
                None
            }
        }
    }

    /// True where something was rebuilt, `None` when the engine broke.
    fn optimize(&self, began: Instant) -> Option<bool> {
        match panic::catch_unwind(AssertUnwindSafe(|| self.shard.optimize())) {
            Ok(Ok(rebuilt)) => {
                if rebuilt {
                    let duration_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
                    tracing::debug!(dir = %self.dir.display(), duration_ms, "segments rebuilt");
                }
                Some(rebuilt)
            }
            // What was written is on disk and searched where it is: only slower.
            Ok(Err(error)) => {
                tracing::warn!(dir = %self.dir.display(), error = %error, "segments are not rebuilt; is the disk full?");
                Some(false)
            }
            Err(_) => None,
        }
    }

    async fn write(&self, change: Change) -> Result<(), UpstreamError> {
        let gone = || failed("write", "the index is closed");
        let sender = self.writes.lock().unwrap_or_else(PoisonError::into_inner).clone().ok_or_else(gone)?;
        let (done, answer) = oneshot::channel();
        sender.send(Write { change, done }).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }

    fn writer_is_gone(&self) -> bool {
        self.writer
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .as_ref()
            .is_none_or(thread::JoinHandle::is_finished)
    }

    /// Lets the writer finish what it has, then waits for it.
    fn stop(&self) {
        drop(self.writes.lock().unwrap_or_else(PoisonError::into_inner).take());
        let writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(writer) = writer {
            // A writer that panicked has said so on standard error.
            let _ = writer.join();
        }
    }

    fn meta(&self) -> CollectionMeta {
        self.meta.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn state(&self) -> Result<CollectionState, UpstreamError> {
        Ok(CollectionState {
            meta: self.meta(),
            chunks: self.count(&Selection::default())?,
            generation: None,
        })
    }

    fn count(&self, selection: &Selection) -> Result<u64, UpstreamError> {
        let filter = (*selection != Selection::default()).then(|| filter(selection)).transpose()?;
        // Of all chunks the engine has the number: counting exactly is reading each one's id.
        let exact = filter.is_some();
        let count =
            self.shard.count(CountRequest { filter, exact }).map_err(|error| failed("count", error))?;
        Ok(count as u64)
    }

    fn documents(&self, selection: &Selection) -> Result<Vec<StoredDocument>, UpstreamError> {
        if let Some(documents) = self.contents.documents(selection) {
            return Ok(documents);
        }
        // Where all of a repository is asked for, the next one may be answered from what is found out now.
        if selection.docs.is_none()
            && let Some(unchanged) = self.contents.is_asked_for()
        {
            let all = self.first_chunks(&Selection::default(), Contents::bound())?;
            self.contents.learn(unchanged, all);
            if let Some(documents) = self.contents.documents(selection) {
                return Ok(documents);
            }
        }
        let mut newest = HashMap::new();
        for (_, document) in self.first_chunks(selection, usize::MAX)?.unwrap_or_default() {
            keep_newest(&mut newest, document);
        }
        Ok(newest.into_values().collect())
    }

    /// The selected documents, each revision of them, with the ids of their first chunks; `None`: more than `limit`.
    fn first_chunks(
        &self,
        selection: &Selection,
        limit: usize,
    ) -> Result<Option<Vec<(Uuid, StoredDocument)>>, UpstreamError> {
        let selection = Selection { first_chunks: true, ..selection.clone() };
        let mut found = Vec::new();
        let mut from = None;
        loop {
            let page = self.scroll(&selection, from, PAGE, false)?;
            found.extend(page.records.iter().map(|(id, record)| (*id, StoredDocument::of(record))));
            from = page.next;
            if found.len() > limit {
                return Ok(None);
            }
            if from.is_none() {
                return Ok(Some(found));
            }
        }
    }

    fn apply(&self, change: Change) -> Result<(), UpstreamError> {
        match change {
            // Little, or what makes room in the end.
            Change::Delete(_) | Change::Restate(..) => self.room.check_somewhat(0)?,
            _ => self.room.check(room::needed(&change, self.count(&Selection::default())?))?,
        }
        match change {
            Change::Upsert(chunks, obsolete) => {
                self.upsert(chunks)?;
                obsolete.map_or(Ok(()), |obsolete| self.delete(&obsolete))
            }
            Change::Restate(docs, provenance) => self.restate(docs, &provenance),
            Change::Delete(selection) => self.delete(&selection),
            Change::Reweigh(avg_len) => self.reweigh(avg_len),
        }
    }

    fn upsert(&self, chunks: Vec<NewChunk>) -> Result<(), UpstreamError> {
        if chunks.iter().any(|chunk| !chunk.record.tenant.is_empty()) {
            self.has_tenants.store(true, Ordering::Release);
        }
        // One thread weighs, this one writes what was weighed.
        thread::scope(|scope| {
            let (weighed, points) = std::sync::mpsc::sync_channel(2);
            scope.spawn(move || {
                let mut weigher = self.weigher.lock().unwrap_or_else(PoisonError::into_inner);
                for batch in batches(chunks) {
                    let batch: Result<Vec<_>, _> =
                        batch.into_iter().map(|chunk| point(&mut weigher, chunk)).collect();
                    // The writer has gone only where it failed.
                    if weighed.send(batch).is_err() {
                        return;
                    }
                }
            });
            points.into_iter().try_for_each(|points| {
                // Others fill the disk too.
                self.room.check_somewhat(0)?;
                let operation = PointOperations::UpsertPoints(PointInsertOperations::PointsList(points?));
                self.update(UpdateOperation::PointOperation(operation))
            })
        })
    }

    fn delete(&self, selection: &Selection) -> Result<(), UpstreamError> {
        if *selection == Selection::default() {
            return Err(UpstreamError::permanent(
                Dependency::VectorIndex,
                "empty_selection",
                "refusing to delete everything",
            ));
        }
        let operation = PointOperations::DeletePointsByFilter(filter(selection)?);
        self.update(UpdateOperation::PointOperation(operation))
    }

    fn restate(&self, docs: Vec<String>, provenance: &Provenance) -> Result<(), UpstreamError> {
        let Value::Object(fields) = payload(provenance)? else { return Ok(()) };
        let chunks = Selection { docs: Some(docs), ..Selection::default() };
        let operation = PayloadOps::SetPayload(SetPayloadOp {
            payload: fields.into(),
            points: None,
            filter: Some(filter(&chunks)?),
            key: None,
        });
        self.update(UpdateOperation::PayloadOperation(operation))
    }

    fn reweigh(&self, avg_len: f64) -> Result<(), UpstreamError> {
        let meta = CollectionMeta { avg_len, ..self.meta() };
        let mut weigher = Weigher::new(&meta)?;
        let mut from = None;
        loop {
            self.room.check_somewhat(0)?;
            let page = self.scroll(&Selection::default(), from, REWEIGH_PAGE, true)?;
            let points = page
                .records
                .iter()
                .map(|(id, record)| PointVectorsPersisted {
                    id: PointId::Uuid(*id),
                    vector: VectorStructPersisted::Named(
                        [(SPARSE.to_owned(), VectorPersisted::Sparse(weigher.weigh(record)))].into(),
                    ),
                })
                .collect();
            let operation = VectorOperations::UpdateVectors(UpdateVectorsOp { points, update_filter: None });
            self.update(UpdateOperation::VectorOperation(operation))?;
            from = page.next;
            if from.is_none() {
                break;
            }
        }
        save_meta(&self.dir, &meta)?;
        *self.weigher.lock().unwrap_or_else(PoisonError::into_inner) = weigher;
        *self.meta.write().unwrap_or_else(PoisonError::into_inner) = meta;
        Ok(())
    }

    fn update(&self, operation: UpdateOperation) -> Result<(), UpstreamError> {
        self.shard.update(operation).map_err(|error| failed("write", error))
    }

    /// Chunks that belong to nobody are seen by all who ask for them. So where nothing belongs to anybody, the
    /// engine is not asked to leave out what is others'. Should such a chunk be found all the same, because its
    /// writing began meanwhile, the engine is asked to.
    fn search(&self, mut search: Search) -> Result<Lists, UpstreamError> {
        if let Some(visible) = &search.selection.tenants
            && visible.iter().any(String::is_empty)
            && !self.has_tenants.load(Ordering::Acquire)
        {
            let all = Selection { tenants: None, ..search.selection.clone() };
            let lists = self.lists(&search, &all)?;
            let mut hits = lists.dense.iter().chain(&lists.lexical);
            if hits.all(|hit| visible.contains(&hit.record.tenant)) {
                return Ok(lists);
            }
        }
        let selection = mem::take(&mut search.selection);
        self.lists(&search, &selection)
    }

    /// Searches for ids, then reads what is not remembered. What was found and is gone when it is read was replaced
    /// meanwhile: then what took its place is searched for, at last in one step.
    fn lists(&self, search: &Search, selection: &Selection) -> Result<Lists, UpstreamError> {
        let filter = (*selection != Selection::default()).then(|| filter(selection)).transpose()?;
        for _ in 0..TWO_STEP_SEARCHES {
            let found = self.found(search, filter.as_ref(), false)?;
            if let Some(lists) = self.read(found)? {
                return Ok(lists);
            }
        }
        let Found { dense, lexical, cosines } = self.found(search, filter.as_ref(), true)?;
        let hits = |points: Vec<ScoredPoint>| points.into_iter().map(hit).collect::<Result<_, _>>();
        Ok(Lists { dense: hits(dense)?, lexical: hits(lexical)?, cosines })
    }

    /// What the engine finds: up to three calls of it.
    fn found(
        &self,
        search: &Search,
        filter: Option<&Filter>,
        with_payload: bool,
    ) -> Result<Found, UpstreamError> {
        let mut found = Found::default();
        let points = |query, using| self.points(query, using, filter.cloned(), search.limit, with_payload);
        let dense = search.dense.as_ref().filter(|_| self.has_embeddings());
        if let Some(dense) = dense {
            found.dense = points(VectorInternal::Dense(dense.clone()), DENSE)?;
        }
        let mut terms: BTreeMap<u32, f32> = BTreeMap::new();
        for text in &search.lexical {
            for term in self.bm25.embed_query(text).indices {
                *terms.entry(term).or_default() += 1.0;
            }
        }
        // A query of stop words only has no terms, and finds nothing.
        if !terms.is_empty() {
            let (indices, values) = terms.into_iter().unzip();
            found.lexical = points(VectorInternal::Sparse(SparseVector { indices, values }), SPARSE)?;
        }
        if let Some(dense) = dense {
            let near: HashSet<PointId> = found.dense.iter().map(|point| point.id).collect();
            let others = found.lexical.iter().map(|point| point.id).filter(|id| !near.contains(id));
            found.cosines = self.cosines(dense.clone(), others.map(uuid).collect())?;
        }
        Ok(found)
    }

    /// The chunks that were found, read where they are not remembered. `None`: some of them are gone.
    fn read(&self, found: Found) -> Result<Option<Lists>, UpstreamError> {
        let Found { dense, lexical, cosines } = found;
        let points = || dense.iter().chain(&lexical);
        let known = self.records.get(points().map(|point| (uuid(point.id), point.version)));
        let mut unknown: HashMap<PointId, u64> = HashMap::new();
        for (point, _) in points().zip(&known).filter(|(_, record)| record.is_none()) {
            unknown.insert(point.id, point.version);
        }
        let ids: Vec<PointId> = unknown.keys().copied().collect();
        let read: HashMap<PointId, Arc<ChunkRecord>> =
            self.retrieve(&ids)?.into_iter().map(|(id, record)| (id, Arc::new(record))).collect();
        self.records.insert(read.iter().map(|(id, record)| (uuid(*id), unknown[id], Arc::clone(record))));
        let mut known = known.into_iter();
        let mut hits = |points: Vec<ScoredPoint>| -> Option<Vec<Hit>> {
            let hit = |(point, known): (ScoredPoint, Option<Arc<ChunkRecord>>)| {
                let record = known.or_else(|| read.get(&point.id).cloned())?;
                Some(Hit { id: uuid(point.id), score: point.score, record })
            };
            points.into_iter().zip(known.by_ref()).map(hit).collect()
        };
        let Some(dense) = hits(dense) else { return Ok(None) };
        Ok(hits(lexical).map(|lexical| Lists { dense, lexical, cosines }))
    }

    fn has_embeddings(&self) -> bool {
        self.meta.read().unwrap_or_else(PoisonError::into_inner).embedding_size.is_some()
    }

    fn cosines(&self, vector: Vec<f32>, ids: Vec<Uuid>) -> Result<HashMap<Uuid, f32>, UpstreamError> {
        if !self.has_embeddings() || ids.is_empty() {
            return Ok(HashMap::new());
        }
        let limit = ids.len();
        let ids: HasIdCondition = ids.into_iter().map(PointId::Uuid).collect();
        let filter = Filter::new_must(Condition::HasId(ids));
        let points = self.points(VectorInternal::Dense(vector), DENSE, Some(filter), limit, false)?;
        Ok(points.into_iter().map(|point| (uuid(point.id), point.score)).collect())
    }

    fn points(
        &self,
        query: VectorInternal,
        using: &str,
        filter: Option<Filter>,
        limit: usize,
        with_payload: bool,
    ) -> Result<Vec<ScoredPoint>, UpstreamError> {
        self.shard
            .search(SearchRequest {
                query: QueryEnum::Nearest(NamedQuery::new(query, using)),
                filter,
                params: None,
                limit,
                offset: 0,
                with_payload: Some(WithPayloadInterface::Bool(with_payload)),
                with_vector: None,
                score_threshold: None,
            })
            .map_err(|error| failed("search", error))
    }

    /// Reads these chunks without a search for them, as far as they are there and seen by these tenants.
    fn chunks(&self, ids: &[Uuid], tenants: Option<&[String]>) -> Result<Page, UpstreamError> {
        let mut ids: Vec<PointId> = ids.iter().copied().map(PointId::Uuid).collect();
        ids.sort_unstable();
        ids.dedup();
        let mut records: Vec<_> =
            self.retrieve(&ids)?.into_iter().map(|(id, record)| (uuid(id), record)).collect();
        records.retain(|(_, record)| tenants.is_none_or(|tenants| tenants.contains(&record.tenant)));
        Ok(Page { records, next: None })
    }

    /// Reads these chunks, as far as they are there, in their order.
    fn retrieve(&self, ids: &[PointId]) -> Result<Vec<(PointId, ChunkRecord)>, UpstreamError> {
        if ids.is_empty() {
            return Ok(Vec::new());
        }
        let points = self
            .shard
            .retrieve(ids, Some(WithPayloadInterface::Bool(true)), None)
            .map_err(|error| failed("read", error))?;
        points
            .into_iter()
            .map(|point| {
                let payload = point.payload.map(|payload| payload.0).unwrap_or_default();
                Ok((point.id, record(Value::Object(payload))?))
            })
            .collect()
    }

    fn scroll(
        &self,
        selection: &Selection,
        from: Option<Uuid>,
        limit: usize,
        with_text: bool,
    ) -> Result<Page, UpstreamError> {
        let by_id = Selection { ids: None, tenants: None, ..selection.clone() } == Selection::default();
        if let (Some(ids), true, true, None) = (&selection.ids, by_id, with_text, from)
            && ids.len() <= limit
        {
            return self.chunks(ids, selection.tenants.as_deref());
        }
        let with_payload = if with_text {
            WithPayloadInterface::Bool(true)
        } else {
            let text = "text".parse().map_err(|()| failed("scroll", "field name"))?;
            WithPayloadInterface::Selector(PayloadSelector::Exclude(PayloadSelectorExclude {
                exclude: vec![text],
            }))
        };
        let (records, next) = self
            .shard
            .scroll(ScrollRequest {
                offset: from.map(PointId::Uuid),
                limit: Some(limit),
                filter: (*selection != Selection::default()).then(|| filter(selection)).transpose()?,
                with_payload: Some(with_payload),
                with_vector: WithVector::Bool(false),
                order_by: None,
            })
            .map_err(|error| failed("scroll", error))?;
        let records = records
            .into_iter()
            .map(|point| {
                let payload = point.payload.map(|payload| payload.0).unwrap_or_default();
                Ok((uuid(point.id), record(Value::Object(payload))?))
            })
            .collect::<Result<_, UpstreamError>>()?;
        Ok(Page { records, next: next.map(uuid) })
    }
}

/// The query side of BM25 depends on nothing that is set.
fn query_bm25() -> Result<EdgeBm25, UpstreamError> {
    EdgeBm25::new(EdgeBm25Config::default()).map_err(|error| failed("BM25 settings", error))
}

/// Chunks in batches of whole documents: first the others of some documents, then those that are first in them.
fn batches(chunks: Vec<NewChunk>) -> Vec<Vec<NewChunk>> {
    let mut batches = Vec::new();
    let (mut first, mut others) = (Vec::new(), Vec::new());
    let mut last_doc = String::new();
    for chunk in chunks {
        if chunk.record.doc != last_doc {
            if first.len() + others.len() >= UPSERT_CHUNKS {
                batches.extend([mem::take(&mut others), mem::take(&mut first)]);
            }
            last_doc.clone_from(&chunk.record.doc);
        }
        let batch = if chunk.record.n == 0 { &mut first } else { &mut others };
        batch.push(chunk);
    }
    batches.extend([others, first]);
    batches.retain(|batch| !batch.is_empty());
    batches
}

/// A chunk as the engine stores it.
fn point(weigher: &mut Weigher, chunk: NewChunk) -> Result<PointStructPersisted, UpstreamError> {
    let mut vectors = vec![(SPARSE.to_owned(), Vector::from(weigher.weigh(&chunk.record)))];
    vectors.extend(chunk.dense.map(|dense| (DENSE.to_owned(), Vector::from(dense))));
    Ok(PointStruct::new(PointId::Uuid(chunk.id), Vectors::from(vectors), payload(&chunk.record)?).into())
}

/// Weighs chunks for BM25 as the engine's own `embed_document` does, without stemming and hashing a word more than
/// once: a few thousand words are most of any repository.
struct Weigher {
    weighing: Weighing,
    avg_len: f64,
    /// Knows the engine's stop words, stems and hashes.
    bm25: EdgeBm25,
    /// The engine's term of a word; `None`: not counted, such as a stop word.
    terms: HashMap<Box<str>, Option<u32>>,
}

impl Weigher {
    fn new(meta: &CollectionMeta) -> Result<Self, UpstreamError> {
        Ok(Self {
            weighing: meta.weighing,
            avg_len: meta.avg_len,
            bm25: query_bm25()?,
            terms: HashMap::new(),
        })
    }

    fn weigh(&mut self, record: &ChunkRecord) -> SparseVector {
        let mut terms = Vec::with_capacity(256);
        self.weighing.words(record, |word| terms.extend(self.term(word)));
        let length = terms.len() as f64;
        terms.sort_unstable();
        let Weighing { k1, b, .. } = self.weighing;
        let length = 1.0 - b + b * length / self.avg_len;
        let mut vector = SparseVector { indices: Vec::new(), values: Vec::new() };
        for same in terms.chunk_by(|one, other| one == other) {
            let count = same.len() as f64;
            vector.indices.extend(same.first());
            #[expect(clippy::cast_possible_truncation, reason = "the engine's weights are f32")]
            vector.values.push((count * (k1 + 1.0) / k1.mul_add(length, count)) as f32);
        }
        vector
    }

    fn term(&mut self, word: &str) -> Option<u32> {
        if let Some(term) = self.terms.get(word) {
            return *term;
        }
        let term = self.bm25.embed_query(word).indices.first().copied();
        if word.len() <= LONGEST_KEPT_WORD {
            if self.terms.len() >= KEPT_WORDS {
                self.terms.clear();
            }
            self.terms.insert(word.into(), term);
        }
        term
    }
}

fn config(meta: &CollectionMeta) -> EdgeConfig {
    // A segment is measured by its largest vectors.
    let chunk_bytes = SPARSE_BYTES.max(meta.embedding_size.unwrap_or_default() * size_of::<f32>());
    let mut builder = EdgeConfig::builder()
        .wal_options(WalOptions { segment_capacity: WAL_SEGMENT_BYTES, ..WalOptions::default() })
        .optimizers(EdgeOptimizersConfig {
            indexing_threshold: Some((SEGMENT_CHUNKS * chunk_bytes).div_ceil(1024)),
            default_segment_number: Some(SEGMENTS),
            ..EdgeOptimizersConfig::default()
        })
        // No graph: what is nearest is found exactly.
        .hnsw_config(HnswIndexConfig { m: 0, ..HnswIndexConfig::default() });
    builder = builder.sparse_vector(
        SPARSE,
        EdgeSparseVectorParams { modifier: Some(Modifier::Idf), on_disk: Some(true), ..Default::default() },
    );
    if let Some(size) = meta.embedding_size {
        builder = builder.vector(
            DENSE,
            EdgeVectorParams {
                size,
                distance: Distance::Cosine,
                on_disk: None,
                multivector_config: None,
                datatype: None,
                quantization_config: None,
                hnsw_config: None,
            },
        );
    }
    builder.build()
}

/// Mapped, not loaded, once its segment is rebuilt: opening an index reads only what is asked for.
fn keyword_index() -> PayloadSchemaParams {
    PayloadSchemaParams::Keyword(KeywordIndexParams { on_disk: Some(true), ..KeywordIndexParams::default() })
}

/// As [`filter`] asks: positions are looked up, revisions compared.
fn integer_index(field: &str) -> PayloadSchemaParams {
    let is_compared = field == "rev";
    PayloadSchemaParams::Integer(IntegerIndexParams {
        lookup: Some(!is_compared),
        range: Some(is_compared),
        on_disk: Some(true),
        ..IntegerIndexParams::default()
    })
}

/// The engine's filters have a JSON form, the same as the server's REST API takes.
fn filter(selection: &Selection) -> Result<Filter, UpstreamError> {
    let Selection { ids, docs, tenants, lang, repo, rev_below, first_chunks } = selection;
    let mut must = Vec::new();
    if let Some(ids) = ids {
        must.push(json!({"has_id": ids}));
    }
    for (field, values) in [("doc", docs), ("tenant", tenants)] {
        match values.as_deref() {
            // The engine collects what matches any of several values in a set of its own.
            Some([value]) => must.push(json!({"key": field, "match": {"value": value}})),
            Some(values) => must.push(json!({"key": field, "match": {"any": values}})),
            None => {}
        }
    }
    for (field, value) in [("lang", lang), ("repo", repo)] {
        if let Some(value) = value {
            must.push(json!({"key": field, "match": {"value": value}}));
        }
    }
    if let Some(rev) = rev_below {
        must.push(json!({"key": "rev", "range": {"lt": rev}}));
    }
    if *first_chunks {
        must.push(json!({"key": "n", "match": {"value": 0}}));
    }
    serde_json::from_value(json!({"must": must})).map_err(|error| failed("filter", error))
}

fn hit(point: ScoredPoint) -> Result<Hit, UpstreamError> {
    let payload = point.payload.map(|payload| payload.0).unwrap_or_default();
    Ok(Hit { id: uuid(point.id), score: point.score, record: Arc::new(record(Value::Object(payload))?) })
}

/// Is there a chunk that is not everybody's?
fn has_tenants(shard: &EdgeShard) -> Result<bool, UpstreamError> {
    let filter = serde_json::from_value(json!({"must_not": [{"key": "tenant", "match": {"value": ""}}]}))
        .map_err(|error| failed("filter", error))?;
    let count = shard
        .count(CountRequest { filter: Some(filter), exact: true })
        .map_err(|error| failed("count", error))?;
    Ok(count > 0)
}

fn uuid(id: PointId) -> Uuid {
    match id {
        PointId::Uuid(id) => id,
        PointId::NumId(number) => Uuid::from_u128(u128::from(number)),
    }
}

/// The engine's log only ever grows, and nothing reads it again (see the module's head): all closed
/// files but the last go. The last one stays, because the engine counts operations from it, and an
/// operation with a lower number than a point's version would be ignored.
fn prune_log(dir: &Path) -> io::Result<()> {
    let mut closed: Vec<(u64, PathBuf)> = Vec::new();
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let path = entry?.path();
        let number = path
            .file_name()
            .and_then(|name| name.to_str())
            .and_then(|name| name.strip_prefix("closed-"))
            .and_then(|number| number.parse().ok());
        if let Some(number) = number {
            closed.push((number, path));
        }
    }
    closed.sort();
    closed.pop();
    for (_, path) in closed {
        fs::remove_file(path)?;
    }
    Ok(())
}

fn save_meta(dir: &Path, meta: &CollectionMeta) -> Result<(), UpstreamError> {
    let text = serde_json::to_string_pretty(meta).map_err(|error| failed("collection meta", error))?;
    replace_file(dir, META_FILE, &text)
}

fn load_aliases(dir: &Path) -> Result<BTreeMap<String, String>, UpstreamError> {
    let path = dir.join(ALIASES_FILE);
    match fs::read_to_string(&path) {
        Ok(text) => serde_json::from_str(&text)
            .map_err(|error| failed(&format!("{} is damaged", path.display()), error)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(BTreeMap::new()),
        Err(error) => Err(cannot_use(dir, &error)),
    }
}

/// Readers find the old file or the new one, also after a power cut.
fn replace_file(dir: &Path, name: &str, text: &str) -> Result<(), UpstreamError> {
    let new = dir.join(format!("{name}.new"));
    let save = || {
        fs::write(&new, text)?;
        fs::File::open(&new)?.sync_all()?;
        fs::rename(&new, dir.join(name))?;
        fs::File::open(dir)?.sync_all()
    };
    save().map_err(|error| cannot_use(dir, &error))
}

fn not_flushed(dir: &Path) -> UpstreamError {
    UpstreamError::misconfigured(
        Dependency::VectorIndex,
        "ATLAS_DATA_DIR",
        format!("the index in {} could not be written to disk", dir.display()),
        "make room on the disk, then restart the gateway and send the last documents again",
    )
}

/// The collection is this process's for as long as the file is open.
fn lock(dir: &Path) -> Result<File, UpstreamError> {
    let open = File::options().write(true).create(true).truncate(false).open(dir.join(LOCK_FILE));
    let file = open.map_err(|error| cannot_use(dir, &error))?;
    file.try_lock().map_err(|error| not_opened(dir, error))?;
    Ok(file)
}

fn not_opened(dir: &Path, error: impl std::fmt::Display) -> UpstreamError {
    failed(&format!("open collection in {} (is another gateway using it?)", dir.display()), error)
}

fn cannot_use(dir: &Path, error: &io::Error) -> UpstreamError {
    UpstreamError::misconfigured(
        Dependency::VectorIndex,
        "ATLAS_DATA_DIR",
        format!("{} cannot be used: {error}", dir.display()),
        "set it to a folder that this user may write to, on a disk with space left",
    )
}

/// Runs engine code off the async threads. A panic in it is an error of this one call.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, UpstreamError> + Send + 'static,
) -> Result<T, UpstreamError> {
    tokio::task::spawn_blocking(work).await.map_err(|error| failed("the engine stopped", error))?
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use std::time::Duration;

    use atlas_test_support::guard::Guarded;
    use proptest::prelude::*;
    use qdrant_edge::external::ordered_float::NotNan;

    use super::*;

    fn new_chunk(n: u128) -> NewChunk {
        let record = ChunkRecord {
            doc: format!("{:032x}", n / 3),
            source: format!("f{}.md", n / 3),
            n: u32::try_from(n % 3).unwrap(),
            of: 3,
            rev: i64::try_from(n / 90).unwrap(),
            text: format!("common words of chunk number{n} and more of them to be counted"),
            ..ChunkRecord::default()
        };
        NewChunk { id: Uuid::from_u128(n), record, dense: None }
    }

    #[tokio::test]
    async fn no_tenant_finds_anothers_chunk_that_was_not_expected() {
        let dir = tempfile::tempdir().unwrap();
        let index = EdgeIndex::open(dir.path(), 0).await.unwrap();
        index.ensure("c", &meta(Weighing::unrecorded(), 10.0)).await.unwrap();
        let of = |n: u128, tenant: &str| {
            let NewChunk { id, mut record, dense } = new_chunk(n);
            record.tenant = tenant.to_owned();
            NewChunk { id, record, dense }
        };
        let visible_to = |tenants: &[&str]| {
            let tenants = Some(tenants.iter().map(|tenant| (*tenant).to_owned()).collect());
            Selection { tenants, ..Selection::default() }
        };
        let found = async |index: &EdgeIndex, tenants: &[&str]| -> Vec<u128> {
            let lexical = vec!["common words".to_owned()];
            let search = Search { dense: None, lexical, selection: visible_to(tenants), limit: 2 };
            let mut ids: Vec<u128> =
                index.search("c", search).await.unwrap().lexical.iter().map(|hit| hit.id.as_u128()).collect();
            ids.sort_unstable();
            ids
        };
        let tenants = |index: &EdgeIndex| index.existing("c").unwrap().has_tenants.load(Ordering::Acquire);
        index.upsert("c", vec![of(1, ""), of(2, "")], None).await.unwrap();
        assert!(!tenants(&index));
        assert_eq!(found(&index, &[""]).await, [1, 2]);
        assert_eq!(found(&index, &["acme"]).await, [0_u128; 0]);

        index.upsert("c", vec![of(0, "acme"), of(3, "acme"), of(4, "other")], None).await.unwrap();
        assert!(tenants(&index));
        for known in [true, false] {
            // As a search that began before the first tenant's chunk was written.
            index.existing("c").unwrap().has_tenants.store(known, Ordering::Release);
            assert_eq!(found(&index, &[""]).await, [1, 2]);
            assert_eq!(found(&index, &["acme"]).await, [0, 3]);
            let ids = Some((0..5).map(Uuid::from_u128).collect());
            let all = Selection { ids, ..visible_to(&["", "acme"]) };
            let page = index.scroll("c", &all, None, 5, true).await.unwrap();
            let ids: Vec<u128> = page.records.iter().map(|(id, _)| id.as_u128()).collect();
            assert_eq!((ids, page.next), (vec![0, 1, 2, 3], None));
        }
        index.close().await;
        drop(index);
        let index = EdgeIndex::open(dir.path(), 0).await.unwrap();
        assert!(tenants(&index), "also after a restart");
        index.delete("c", visible_to(&["acme", "other"])).await.unwrap();
        index.close().await;
        drop(index);
        let index = EdgeIndex::open(dir.path(), 0).await.unwrap();
        assert!(!tenants(&index), "the last of their chunks are gone");
        index.close().await;
    }

    #[tokio::test]
    async fn what_is_remembered_is_never_older_than_what_was_written() {
        let dir = tempfile::tempdir().unwrap();
        let index = EdgeIndex::open(dir.path(), 0).await.unwrap();
        index.ensure("c", &meta(Weighing::unrecorded(), 10.0)).await.unwrap();
        let search = || Search {
            dense: None,
            lexical: vec!["common".to_owned()],
            selection: Selection::default(),
            limit: 50,
        };
        // Often enough that segments are rebuilt meanwhile.
        for rev in 1..=12 {
            let chunks = (0..5).map(|n| {
                let NewChunk { id, mut record, dense } = new_chunk(n);
                record.rev = rev;
                NewChunk { id, record, dense }
            });
            index.upsert("c", chunks.collect(), None).await.unwrap();
            for _ in 0..2 {
                let hits = index.search("c", search()).await.unwrap().lexical;
                let revs: Vec<i64> = hits.iter().map(|hit| hit.record.rev).collect();
                assert_eq!(revs, [rev; 5]);
            }
        }
        index.close().await;
    }

    #[tokio::test]
    async fn full_segments_are_rebuilt_and_nothing_is_lost_or_doubled() {
        let dir = tempfile::tempdir().unwrap();
        let index = EdgeIndex::open(dir.path(), 0).await.unwrap();
        index.ensure("c", &meta(Weighing::unrecorded(), 10.0)).await.unwrap();
        for from in [0, 90, 180] {
            // The second part twice: what is in a rebuilt segment is replaced.
            for _ in 0..if from == 90 { 2 } else { 1 } {
                index.upsert("c", (from..from + 90).map(new_chunk).collect(), None).await.unwrap();
            }
        }
        let oldest = Selection { rev_below: Some(1), ..Selection::default() };
        assert_eq!(index.count("c", &oldest).await.unwrap(), 90);
        index.delete("c", oldest).await.unwrap();
        let collection = index.existing("c").unwrap();
        // The last rebuilding may be under way.
        collection.stop();
        let segments = collection.shard.info().segments_count;
        assert!(segments > 2, "{segments} segments");
        drop(collection);
        index.close().await;
        drop(index);

        fs::create_dir_all(dir.path().join("c@1").join(UNFINISHED_SEGMENTS).join("segment")).unwrap();
        let index = EdgeIndex::open(dir.path(), 0).await.unwrap();
        assert!(!dir.path().join("c@1").join(UNFINISHED_SEGMENTS).join("segment").exists());
        assert_eq!(index.count("c", &Selection::default()).await.unwrap(), 180);
        let first = Selection { first_chunks: true, ..Selection::default() };
        let page = index.scroll("c", &first, None, 100, true).await.unwrap();
        assert_eq!(page.records.len(), 60);
        assert_eq!(page.records[0].1, new_chunk(90).record);
        for (number, hits) in [(100, 1), (269, 1), (50, 0)] {
            let search = Search {
                dense: None,
                lexical: vec![format!("number{number}")],
                selection: Selection::default(),
                limit: 5,
            };
            let found = index.search("c", search).await.unwrap().lexical;
            assert_eq!(found.len(), hits, "number{number}");
            assert!(found.iter().all(|hit| hit.id == Uuid::from_u128(number)));
        }
        index.close().await;
    }

    /// Every chunk from 0 on is there once, also for what counts without looking for doubles. How many.
    async fn chunks_that_are_there_once(dir: &Path) -> u128 {
        let index = EdgeIndex::open(dir, 0).await.unwrap();
        let stored = index.count("c", &Selection::default()).await.unwrap();
        let page = index.scroll("c", &Selection::default(), None, 100_000, true).await.unwrap();
        let mut ids: Vec<u128> = page.records.iter().map(|(id, _)| id.as_u128()).collect();
        ids.sort_unstable();
        assert_eq!(ids, (0..ids.len() as u128).collect::<Vec<_>>());
        assert_eq!(stored, ids.len() as u64, "some are there twice");
        index.close().await;
        stored.into()
    }

    fn segments(dir: &Path) -> HashSet<String> {
        let Ok(entries) = fs::read_dir(dir) else { return HashSet::new() };
        let names = entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
        // Without the file it is not complete, and the engine drops it by itself.
        names.filter(|name| dir.join(name).join("version.info").exists()).collect()
    }

    #[tokio::test]
    async fn each_chunk_is_there_once_wherever_a_rebuilding_was_cut_short() {
        for removed in 0..3 {
            let dir = tempfile::tempdir().unwrap();
            let folder = dir.path().join("c@1");
            let index = EdgeIndex::open(dir.path(), 0).await.unwrap();
            index.ensure("c", &meta(Weighing::unrecorded(), 10.0)).await.unwrap();
            for from in (0..60).step_by(6) {
                index.upsert("c", (from..from + 6).map(new_chunk).collect(), None).await.unwrap();
            }
            let collection = index.existing("c").unwrap();
            collection.stop();
            collection.upsert((60..160).map(new_chunk).collect()).unwrap();
            collection.shard.flush();
            let before = segments(&folder.join("segments"));
            kept::keep(&folder).unwrap();
            assert!(collection.shard.optimize().unwrap());
            drop(collection);
            index.close().await;
            drop(index);
            // As it was when only some of the old segments had been removed.
            let after = segments(&folder.join("segments"));
            let gone: Vec<&String> = before.difference(&after).collect();
            assert!(!gone.is_empty() && after.difference(&before).next().is_some());
            for name in gone.into_iter().skip(removed) {
                let (kept, old) =
                    (folder.join("segments.kept").join(name), folder.join("segments").join(name));
                kept::link_folder(&kept, &old).unwrap();
            }
            assert_eq!(chunks_that_are_there_once(dir.path()).await, 160, "{removed} removed");
        }
    }

    /// Names the folder to the process of this test that shall die, and when that is.
    const DIES: &str = "ATLAS_TEST_DIES_REBUILDING";

    /// Writes until a thread that watches the segments sees what it waits for, and aborts: nothing is flushed and no
    /// destructor runs, as with SIGKILL.
    async fn write_until_dead(dir: &Path, when: &str) {
        let (folder, when) = (dir.join("c@1"), when.to_owned());
        thread::spawn(move || {
            loop {
                let before = segments(&folder.join("segments.kept"));
                let now = segments(&folder.join("segments"));
                let begun = now.difference(&before).count() > 1;
                let removing = before.difference(&now).next().is_some();
                // Asked again at the end: all of it was seen during one rebuilding.
                if !before.is_empty()
                    && begun
                    && removing == (when == "removing")
                    && segments(&folder.join("segments.kept")) == before
                {
                    std::process::abort();
                }
            }
        });
        let index = EdgeIndex::open(dir, 0).await.unwrap();
        index.ensure("c", &meta(Weighing::unrecorded(), 10.0)).await.unwrap();
        let mut next = u128::from(index.count("c", &Selection::default()).await.unwrap());
        loop {
            index.upsert("c", (next..next + 7).map(new_chunk).collect(), None).await.unwrap();
            next += 7;
            replace_file(dir, "answered", &next.to_string()).unwrap();
        }
    }

    #[tokio::test]
    async fn each_chunk_is_there_once_after_processes_died_rebuilding() {
        if let Ok(plan) = std::env::var(DIES) {
            let (when, dir) = plan.split_once(' ').unwrap();
            return write_until_dead(Path::new(dir), when).await;
        }
        let dir = tempfile::tempdir().unwrap();
        let me = concat!(module_path!(), "::each_chunk_is_there_once_after_processes_died_rebuilding");
        let me = me.split_once("::").unwrap().1;
        for when in ["built", "removing", "built", "removing"] {
            let log = File::create(dir.path().join("log")).unwrap();
            let ended = dir.path().join("ended");
            let mut child =
                Guarded::spawn(std::env::current_exe().unwrap(), [me, "--exact", "--nocapture"], |command| {
                    command
                        .env(DIES, format!("{when} {}", dir.path().display()))
                        .stdout(log.try_clone().unwrap())
                        .stderr(log);
                })
                .unwrap();
            child.report_exit(&ended).unwrap();
            let told = || fs::read_to_string(dir.path().join("log")).unwrap();
            let died = tokio::time::timeout(Duration::from_secs(60), async {
                while fs::read_to_string(&ended).unwrap_or_default().is_empty() {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            });
            assert!(died.await.is_ok(), "it lives: {}", told());
            // 128 and SIGABRT.
            assert_eq!(fs::read_to_string(&ended).unwrap().trim(), "134", "{}", told());
            fs::remove_file(&ended).unwrap();
            assert!(dir.path().join("c@1").join("segments.kept").exists());
            let answered: u128 = fs::read_to_string(dir.path().join("answered")).unwrap().parse().unwrap();
            let there = chunks_that_are_there_once(dir.path()).await;
            assert!(there >= answered, "{answered} were answered, {there} are there");
        }
    }

    fn meta(weighing: Weighing, avg_len: f64) -> CollectionMeta {
        CollectionMeta { embedding_model: None, embedding_size: None, avg_len, weighing }
    }

    proptest! {
        #[test]
        fn chunks_are_weighed_as_the_engine_weighs_them(
            texts in prop::collection::vec("([A-Za-z]{1,12}[ _.]|the |[0-9]{1,3} |\\PC{0,6}|running |HTTPServer |請求書の|번호|résumés |thé |e\u{301}){0,40}", 1..6),
            heading in prop::option::of("[A-Za-z ]{0,20}"),
            weight in 0_u32..4,
            pairs in any::<bool>(),
            folds in any::<bool>(),
            avg_len in 1.0..300.0_f64,
        ) {
            let weighing = Weighing { heading: weight, pairs, folds, ..Weighing::unrecorded() };
            let engine = EdgeBm25::new(EdgeBm25Config {
                k: NotNan::new(weighing.k1).unwrap(),
                b: NotNan::new(weighing.b).unwrap(),
                avg_len: NotNan::new(avg_len).unwrap(),
                ..EdgeBm25Config::default()
            })
            .unwrap();
            let mut weigher = Weigher::new(&meta(weighing, avg_len)).unwrap();
            for text in texts {
                let record = ChunkRecord {
                    source: "src/http_server/ModRs.rs".to_owned(),
                    heading: heading.clone(),
                    text,
                    ..ChunkRecord::default()
                };
                prop_assert_eq!(weigher.weigh(&record), engine.embed_document(&weighing.text(&record)));
            }
        }
    }
}
