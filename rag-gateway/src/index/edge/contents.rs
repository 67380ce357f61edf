//! Which documents a collection holds, without asking the engine.
//!
//! The engine answers that by reading, unpacking and parsing the first chunk of every document, and only once it has
//! opened all of its segments. So the answer is kept: in memory while a collection is open, in a file beside the
//! segments while it is not. Then `atlas index` over files that did not change needs no engine at all.
//!
//! The file is true or it is not there: it is written when everything is on disk and the writer has ended, and removed,
//! with a sync, **before** the first write of the next process. A process that dies leaves none, and the engine is
//! asked again. An older version of this program does not know the file and would leave it where it is: so it names the
//! segments and the note that every version's writer leaves after a write, and is nothing where they are others.

use std::{
    collections::HashMap,
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::SystemTime,
};

use atlas_shared::gateway_api::content_hash;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{Change, WRITTEN_FILE, kept, replace_file};
use crate::index::{NewChunk, Provenance, Selection, StoredDocument};

/// Our file beside the engine's.
const FILE: &str = "atlas.contents";

/// Changes when the file is written in another way.
const FORMAT: u32 = 1;

/// A collection of more documents is asked for them each time: this is about 25 MB of memory.
const MAX_DOCUMENTS: usize = 100_000;

/// What is kept of a document, by its key.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    /// Of its first chunk.
    id: Uuid,
    source: Box<str>,
    hash: Box<str>,
    rev: i64,
    chunks: u32,
    /// Most documents have these in common with the one before.
    names: Arc<Names>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Names {
    repo: String,
    tenant: String,
    cut: String,
    commit: Option<String>,
    origin: Option<String>,
}

type Documents = HashMap<Box<str>, Entry>;

/// A line of the file, for one document.
#[derive(Serialize, Deserialize)]
pub(super) struct Line(Uuid, StoredDocument);

/// The first line of the file has this, with the checksum of the others: what the collection is when the file is true.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Head {
    format: u32,
    segments: Vec<String>,
    /// Text and time of the note that the writer leaves.
    written: Option<(String, SystemTime)>,
}

#[derive(Debug)]
enum State {
    /// In the file, if it is there and true.
    Kept,
    Known(Documents),
    /// The engine knows.
    Unknown,
    TooMany,
}

/// What a collection holds, for the process that owns it.
#[derive(Debug)]
pub(super) struct Contents {
    dir: PathBuf,
    shared: Mutex<Shared>,
}

#[derive(Debug)]
struct Shared {
    state: State,
    /// The file is not there, or says less.
    is_ahead: bool,
    /// The writer is at work: what the engine says meanwhile may be half of a change.
    writing: bool,
    /// Changes that began.
    changes: u64,
}

/// Nothing had changed since this was given out, where it is still the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Unchanged(u64);

/// What a change does to the documents of a collection.
pub(super) enum Effect {
    Puts(Vec<Line>, Option<Selection>),
    Restates(Vec<String>, Provenance),
    Deletes(Selection),
    Nothing,
}

impl Effect {
    pub(super) fn of(change: &Change) -> Self {
        match change {
            Change::Upsert(chunks, obsolete) => {
                let first = chunks.iter().filter(|chunk| chunk.record.n == 0);
                Self::Puts(first.map(line).collect(), obsolete.clone())
            }
            Change::Restate(docs, provenance) => Self::Restates(docs.clone(), provenance.clone()),
            Change::Delete(selection) => Self::Deletes(selection.clone()),
            Change::Reweigh(_) => Self::Nothing,
        }
    }
}

impl Contents {
    /// Of a collection that was made just now.
    pub(super) fn of_new(dir: &Path) -> Self {
        Self::new(dir, State::Known(Documents::new()), true)
    }

    /// Of a collection that was there.
    pub(super) fn of_existing(dir: &Path) -> Self {
        Self::new(dir, State::Kept, false)
    }

    fn new(dir: &Path, state: State, is_ahead: bool) -> Self {
        let shared = Shared { state, is_ahead, writing: false, changes: 0 };
        Self { dir: dir.to_owned(), shared: Mutex::new(shared) }
    }

    fn shared(&self) -> MutexGuard<'_, Shared> {
        // A panic in between can only leave the engine ahead, and then the writer has ended without a file.
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn known(&self) -> MutexGuard<'_, Shared> {
        let mut shared = self.shared();
        if matches!(shared.state, State::Kept) {
            shared.state = read(&self.dir).map_or(State::Unknown, State::Known);
        }
        shared
    }

    /// The selected documents; `None`: the engine knows. Blocking, the first time.
    pub(super) fn documents(&self, selection: &Selection) -> Option<Vec<StoredDocument>> {
        match &self.known().state {
            State::Known(documents) => select(documents, selection),
            State::Kept | State::Unknown | State::TooMany => None,
        }
    }

    /// Where all documents shall be told to [`Contents::learn`].
    pub(super) fn is_asked_for(&self) -> Option<Unchanged> {
        let shared = self.known();
        (matches!(shared.state, State::Unknown) && !shared.writing).then_some(Unchanged(shared.changes))
    }

    /// These are all documents, with the ids of their first chunks, as long as nothing changed.
    pub(super) fn learn(&self, unchanged: Unchanged, all: Option<Vec<(Uuid, StoredDocument)>>) {
        let mut shared = self.shared();
        if shared.writing || unchanged != Unchanged(shared.changes) {
            return;
        }
        shared.is_ahead = true;
        shared.state = match all {
            Some(all) => {
                let mut documents = Documents::new();
                for (id, document) in all {
                    put(&mut documents, Line(id, document));
                }
                State::Known(documents)
            }
            None => State::TooMany,
        };
    }

    /// Most documents that can be learned.
    pub(super) fn bound() -> usize {
        MAX_DOCUMENTS
    }

    /// A write begins: from here on the file is not there. After an error nothing may be written.
    pub(super) fn begin(&self) -> io::Result<()> {
        let mut shared = self.known();
        if !shared.is_ahead {
            forget(&self.dir)?;
            shared.is_ahead = true;
        }
        shared.writing = true;
        shared.changes += 1;
        Ok(())
    }

    /// A change was made, or failed.
    pub(super) fn note(&self, effect: Effect, succeeded: bool) {
        let mut shared = self.shared();
        let State::Known(documents) = &mut shared.state else { return };
        let is_told = succeeded
            && match effect {
                Effect::Puts(lines, obsolete) => {
                    for line in lines {
                        put(documents, line);
                    }
                    obsolete.is_none_or(|obsolete| delete(documents, &obsolete))
                }
                Effect::Restates(docs, provenance) => {
                    restate(documents, &docs, &provenance);
                    true
                }
                Effect::Deletes(selection) => delete(documents, &selection),
                Effect::Nothing => true,
            };
        if documents.len() > MAX_DOCUMENTS {
            shared.state = State::TooMany;
        } else if !is_told {
            shared.state = State::Unknown;
        }
    }

    /// What was begun has ended.
    pub(super) fn end(&self) {
        self.shared().writing = false;
    }

    /// Keeps what is known. Only once the writer has ended well.
    pub(super) fn save(&self) {
        let mut shared = self.shared();
        let State::Known(documents) = &shared.state else { return };
        if !shared.is_ahead || shared.writing {
            return;
        }
        match write(&self.dir, documents) {
            Ok(()) => shared.is_ahead = false,
            Err(error) => {
                tracing::debug!(dir = %self.dir.display(), error = %error, "the engine will be asked what is in it");
            }
        }
    }
}

/// What is in a collection that this process owns and has not opened; `None`: the engine must be asked.
pub(super) fn read_unopened(dir: &Path) -> Option<Vec<StoredDocument>> {
    select(&read(dir)?, &Selection::default())
}

fn line(chunk: &NewChunk) -> Line {
    Line(chunk.id, StoredDocument::of(&chunk.record))
}

fn put(documents: &mut Documents, Line(id, document): Line) {
    let StoredDocument { doc, source, repo, tenant, hash, cut, rev, chunks, commit, origin } = document;
    // Of two revisions the newer one counts; a chunk that is written again is replaced.
    if documents.get(doc.as_str()).is_some_and(|other| other.rev > rev && other.id != id) {
        return;
    }
    let names = Names { repo, tenant, cut, commit, origin };
    let same = documents.values().next().map(|other| &other.names).filter(|other| ***other == names);
    let names = same.map_or_else(|| Arc::new(names), Arc::clone);
    let entry = Entry { id, source: source.into(), hash: hash.into(), rev, chunks, names };
    documents.insert(doc.into(), entry);
}

fn restate(documents: &mut Documents, docs: &[String], provenance: &Provenance) {
    for doc in docs {
        if let Some(entry) = documents.get_mut(doc.as_str()) {
            let names = Arc::make_mut(&mut entry.names);
            let Provenance { commit, origin } = provenance.clone();
            names.commit = commit.or(names.commit.take());
            names.origin = origin.or(names.origin.take());
        }
    }
}

/// False where what is deleted cannot be told from what is known.
fn delete(documents: &mut Documents, selection: &Selection) -> bool {
    if selection.ids.is_some() || selection.lang.is_some() {
        return false;
    }
    match &selection.docs {
        Some(docs) => {
            for doc in docs {
                if documents.get(doc.as_str()).is_some_and(|entry| selects(selection, entry)) {
                    documents.remove(doc.as_str());
                }
            }
        }
        None => documents.retain(|_, entry| !selects(selection, entry)),
    }
    true
}

/// Whatever it says of keys, ids and languages.
fn selects(selection: &Selection, entry: &Entry) -> bool {
    let Names { repo, tenant, .. } = &*entry.names;
    selection.tenants.as_ref().is_none_or(|tenants| tenants.contains(tenant))
        && selection.repo.as_ref().is_none_or(|selected| selected == repo)
        && selection.rev_below.is_none_or(|rev| entry.rev < rev)
}

fn select(documents: &Documents, selection: &Selection) -> Option<Vec<StoredDocument>> {
    if selection.ids.is_some() || selection.lang.is_some() {
        return None;
    }
    let stored = |doc: &str, entry: &Entry| selects(selection, entry).then(|| stored_document(doc, entry));
    Some(match &selection.docs {
        Some(docs) => docs.iter().filter_map(|doc| stored(doc, documents.get(doc.as_str())?)).collect(),
        None => documents.iter().filter_map(|(doc, entry)| stored(doc, entry)).collect(),
    })
}

fn stored_document(doc: &str, entry: &Entry) -> StoredDocument {
    let Names { repo, tenant, cut, commit, origin } = &*entry.names;
    StoredDocument {
        doc: doc.to_owned(),
        source: entry.source.to_string(),
        repo: repo.clone(),
        tenant: tenant.clone(),
        hash: entry.hash.to_string(),
        cut: cut.clone(),
        rev: entry.rev,
        chunks: entry.chunks,
        commit: commit.clone(),
        origin: origin.clone(),
    }
}

/// The file is not there any more, also after a power cut.
fn forget(dir: &Path) -> io::Result<()> {
    match fs::remove_file(dir.join(FILE)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => {
            removed?;
            fs::File::open(dir)?.sync_all()
        }
    }
}

fn write(dir: &Path, documents: &Documents) -> Result<(), Box<dyn std::error::Error>> {
    let mut lines = String::new();
    for (doc, entry) in documents {
        lines.push_str(&serde_json::to_string(&Line(entry.id, stored_document(doc, entry)))?);
        lines.push('\n');
    }
    let head = serde_json::to_string(&(head(dir)?, content_hash(&lines)))?;
    Ok(replace_file(dir, FILE, &format!("{head}\n{lines}"))?)
}

fn read(dir: &Path) -> Option<Documents> {
    let text = fs::read_to_string(dir.join(FILE)).ok()?;
    let (first, lines) = text.split_once('\n')?;
    let (known, checksum): (Head, String) = serde_json::from_str(first).ok()?;
    if known != head(dir).ok()? || checksum != content_hash(lines) || kept::is_unfinished(dir) {
        return None;
    }
    let mut documents = Documents::new();
    for line in lines.lines() {
        put(&mut documents, serde_json::from_str(line).ok()?);
    }
    Some(documents)
}

fn head(dir: &Path) -> io::Result<Head> {
    let mut segments = Vec::new();
    for entry in fs::read_dir(dir.join("segments"))? {
        segments.push(entry?.file_name().to_string_lossy().into_owned());
    }
    segments.sort_unstable();
    let note = dir.join(WRITTEN_FILE);
    let written = match fs::read_to_string(&note) {
        Ok(text) => Some((text, fs::metadata(&note)?.modified()?)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(error),
    };
    Ok(Head { format: FORMAT, segments, written })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use atlas_shared::UpstreamError;
    use proptest::prelude::*;

    use super::{
        super::{EdgeIndex, unopened},
        *,
    };
    use crate::index::{ChunkRecord, CollectionMeta, VectorIndex, Weighing, read_documents};

    fn meta() -> CollectionMeta {
        CollectionMeta {
            embedding_model: None,
            embedding_size: None,
            avg_len: 10.0,
            weighing: Weighing::unrecorded(),
        }
    }

    /// A chunk of one of six documents: two repositories, two tenants.
    fn chunk(doc: u8, rev: i64, n: u32) -> NewChunk {
        let record = ChunkRecord {
            doc: format!("doc{doc}"),
            source: format!("f{doc}.md"),
            repo: format!("repo{}", doc % 2),
            tenant: if doc < 4 { String::new() } else { "acme".to_owned() },
            hash: format!("hash{rev}"),
            cut: "1".to_owned(),
            rev,
            n,
            of: 2,
            text: format!("some words of {doc}"),
            ..ChunkRecord::default()
        };
        let id =
            Uuid::from_u128((u128::from(doc) << 64) + (u128::try_from(rev).unwrap() << 8) + u128::from(n));
        NewChunk { id, record, dense: None }
    }

    #[derive(Clone, Debug)]
    enum Step {
        /// Written anew, with its older revisions deleted or (as if cut short) not.
        Put(u8, i64, bool),
        /// Where it comes from is said anew.
        Restate(u8, Option<u8>, Option<u8>),
        Delete(u8),
        DeleteRepo(u8),
        DeleteTenant,
        DeleteOlder(i64),
        /// In a way that is not followed.
        DeleteLanguage,
        List,
        /// Closed and opened.
        Reopened,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            6 => (0..6_u8, 1..9_i64, any::<bool>()).prop_map(|(doc, rev, clean)| Step::Put(doc, rev, clean)),
            2 => (0..6_u8, prop::option::of(0..3_u8), prop::option::of(0..3_u8))
                .prop_map(|(doc, commit, origin)| Step::Restate(doc, commit, origin)),
            2 => (0..6_u8).prop_map(Step::Delete),
            1 => (0..2_u8).prop_map(Step::DeleteRepo),
            1 => Just(Step::DeleteTenant),
            1 => (1..9_i64).prop_map(Step::DeleteOlder),
            1 => Just(Step::DeleteLanguage),
            2 => Just(Step::List),
            2 => Just(Step::Reopened),
        ];
        prop::collection::vec(step, 1..14)
    }

    fn sorted(mut documents: Vec<StoredDocument>) -> Vec<StoredDocument> {
        documents.sort_by(|a, b| a.doc.cmp(&b.doc));
        documents
    }

    async fn apply(index: &EdgeIndex, step: &Step) -> Result<(), UpstreamError> {
        let docs = |doc: &u8| Some(vec![format!("doc{doc}")]);
        let all = Selection::default();
        match step {
            Step::Put(doc, rev, clean) => {
                let chunks = vec![chunk(*doc, *rev, 0), chunk(*doc, *rev, 1)];
                let older = Selection { docs: docs(doc), rev_below: Some(*rev), ..all };
                index.upsert("c", chunks, Some(older).filter(|_| *clean)).await
            }
            Step::Restate(doc, commit, origin) => {
                let text = |number: &Option<u8>| number.map(|number| number.to_string());
                let provenance = Provenance { commit: text(commit), origin: text(origin) };
                if provenance == Provenance::default() {
                    return Ok(());
                }
                index.restate("c", vec![format!("doc{doc}")], provenance).await
            }
            Step::Delete(doc) => index.delete("c", Selection { docs: docs(doc), ..all }).await,
            Step::DeleteRepo(repo) => {
                index.delete("c", Selection { repo: Some(format!("repo{repo}")), ..all }).await
            }
            Step::DeleteTenant => {
                index.delete("c", Selection { tenants: Some(vec!["acme".to_owned()]), ..all }).await
            }
            Step::DeleteOlder(rev) => index.delete("c", Selection { rev_below: Some(*rev), ..all }).await,
            Step::DeleteLanguage => {
                index.delete("c", Selection { lang: Some("cobol".to_owned()), ..all }).await
            }
            Step::List => index.documents("c", &Selection::default()).await.map(drop),
            Step::Reopened => Ok(()),
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(12))]

        #[test]
        fn what_is_known_of_documents_is_what_reading_them_says(steps in steps()) {
            tokio::runtime::Runtime::new().unwrap().block_on(async {
                let dir = tempfile::tempdir().unwrap();
                let file = dir.path().join("c@1").join(FILE);
                let mut index = EdgeIndex::open(dir.path(), 0).await.unwrap();
                index.ensure("c", &meta()).await.unwrap();
                for (number, step) in steps.iter().enumerate() {
                    apply(&index, step).await.unwrap();
                    let all = Selection::default();
                    if matches!(step, Step::Reopened) {
                        let read = sorted(read_documents(&index, "c", &all).await.unwrap());
                        index.close().await;
                        drop(index);
                        if let Some((_, known)) = unopened(dir.path(), "c") {
                            prop_assert_eq!(sorted(known), read, "unopened, after {}", number);
                        }
                        index = EdgeIndex::open(dir.path(), 0).await.unwrap();
                    } else if !matches!(step, Step::List | Step::Restate(_, None, None)) {
                        prop_assert!(!file.exists(), "whatever becomes of this process, after {}", number);
                    }
                    for selection in [
                        all.clone(),
                        Selection { docs: Some(vec!["doc1".to_owned(), "doc4".to_owned()]), ..all.clone() },
                        Selection {
                            repo: Some("repo0".to_owned()),
                            tenants: Some(vec![String::new()]),
                            ..all.clone()
                        },
                    ] {
                        let known = sorted(index.documents("c", &selection).await.unwrap());
                        let read = sorted(read_documents(&index, "c", &selection).await.unwrap());
                        prop_assert_eq!(known, read, "after {}", number);
                    }
                }
                index.close().await;
                Ok(())
            })?;
        }
    }

    #[tokio::test]
    async fn what_an_older_program_writes_makes_the_file_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let index = EdgeIndex::open(dir.path(), 0).await.unwrap();
        index.ensure("c", &meta()).await.unwrap();
        index.upsert("c", vec![chunk(0, 1, 0)], None).await.unwrap();
        let collection = dir.path().join("c@1");
        assert!(!collection.join(FILE).exists(), "only what nobody writes to has it");
        assert!(unopened(dir.path(), "c").is_none(), "it is open");
        index.close().await;
        drop(index);
        assert_eq!(unopened(dir.path(), "c").unwrap().1.len(), 1);
        assert!(unopened(dir.path(), "other").is_none());

        let kept = fs::read_to_string(collection.join(FILE)).unwrap();
        let note = fs::read_to_string(collection.join(WRITTEN_FILE)).unwrap();
        let after = SystemTime::now() + std::time::Duration::from_secs(5);
        fs::write(collection.join(WRITTEN_FILE), &note).unwrap();
        fs::File::options()
            .append(true)
            .open(collection.join(WRITTEN_FILE))
            .unwrap()
            .set_modified(after)
            .unwrap();
        assert!(unopened(dir.path(), "c").is_none(), "the writer's note is another one");

        let index = EdgeIndex::open(dir.path(), 0).await.unwrap();
        assert_eq!(index.documents("c", &Selection::default()).await.unwrap().len(), 1);
        index.close().await;
        drop(index);
        assert_eq!(unopened(dir.path(), "c").unwrap().1.len(), 1, "it was found out anew");
        fs::write(collection.join(FILE), kept.replace("f0.md", "f9.md")).unwrap();
        assert!(unopened(dir.path(), "c").is_none(), "damaged");
    }
}
