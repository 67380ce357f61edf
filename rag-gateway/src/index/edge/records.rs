//! Chunks that were read lately, as records.
//!
//! The engine keeps a chunk as JSON in a file and parses all of it whenever it is read, and a search reads four
//! candidates for each passage it shows. So what was read is remembered, by id **and version**: the engine gives a
//! point the number of the operation that wrote it last, and every search says which one it met. Nothing has to be
//! forgotten when something is written, and what is remembered can never be older than what was found.

use std::{
    collections::HashMap,
    mem,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use uuid::Uuid;

use crate::index::ChunkRecord;

/// What all records of one folder may take, in bytes: some ten thousand chunks.
const MAX_BYTES: usize = 32 * 1024 * 1024;

/// What an entry needs beside its record, about, in bytes.
const ENTRY_BYTES: usize = 100;

/// A chunk as one operation wrote it, in one open collection.
type Key = (u64, Uuid, u64);

/// The records of all collections of a folder, within one bound.
#[derive(Clone, Debug, Default)]
pub(super) struct Records(Arc<Mutex<Generations>>);

/// What was not asked for while half the bound was filled anew is forgotten. A search looks for a hundred records
/// at a time, so a look must cost next to nothing.
#[derive(Debug, Default)]
struct Generations {
    young: HashMap<Key, Arc<ChunkRecord>>,
    young_bytes: usize,
    old: HashMap<Key, Arc<ChunkRecord>>,
}

impl Generations {
    fn get(&mut self, key: &Key) -> Option<Arc<ChunkRecord>> {
        if let Some(record) = self.young.get(key) {
            return Some(Arc::clone(record));
        }
        let record = self.old.remove(key)?;
        self.insert(*key, Arc::clone(&record), MAX_BYTES);
        Some(record)
    }

    fn insert(&mut self, key: Key, record: Arc<ChunkRecord>, max_bytes: usize) {
        let more = ENTRY_BYTES + bytes(&record);
        if self.young_bytes + more > max_bytes / 2 {
            self.old = mem::take(&mut self.young);
            self.young_bytes = 0;
        }
        if self.young.insert(key, record).is_none() {
            self.young_bytes += more;
        }
    }
}

impl Records {
    /// Those of a collection that was opened just now: none yet.
    pub(super) fn of_collection(&self) -> CollectionRecords {
        // A collection that is dropped and made again counts its operations anew.
        static COLLECTIONS: AtomicU64 = AtomicU64::new(0);
        CollectionRecords { collection: COLLECTIONS.fetch_add(1, Ordering::Relaxed), all: self.clone() }
    }
}

/// The records of one open collection.
#[derive(Debug)]
pub(super) struct CollectionRecords {
    collection: u64,
    all: Records,
}

impl CollectionRecords {
    /// The records of these points and versions, in their order, where they are remembered.
    pub(super) fn get(&self, points: impl Iterator<Item = (Uuid, u64)>) -> Vec<Option<Arc<ChunkRecord>>> {
        let mut all = self.all.0.lock().unwrap_or_else(PoisonError::into_inner);
        points.map(|(id, version)| all.get(&(self.collection, id, version))).collect()
    }

    pub(super) fn insert(&self, records: impl Iterator<Item = (Uuid, u64, Arc<ChunkRecord>)>) {
        let mut all = self.all.0.lock().unwrap_or_else(PoisonError::into_inner);
        for (id, version, record) in records {
            all.insert((self.collection, id, version), record, MAX_BYTES);
        }
    }
}

/// What a record takes in memory.
fn bytes(record: &ChunkRecord) -> usize {
    let ChunkRecord {
        doc,
        rev: _,
        hash,
        cut,
        n: _,
        of: _,
        source,
        start: _,
        end: _,
        heading,
        lang,
        repo,
        tenant,
        commit,
        origin,
        terms: _,
        tokens: _,
        glue,
        text,
    } = record;
    let required = [doc, hash, cut, source, repo, tenant, text];
    let optional = [heading, lang, commit, origin, glue];
    let strings = required.into_iter().chain(optional.into_iter().flatten()).map(String::capacity);
    mem::size_of::<ChunkRecord>() + strings.sum::<usize>()
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    fn record(rev: i64) -> Arc<ChunkRecord> {
        Arc::new(ChunkRecord { rev, text: "word ".repeat(20), ..ChunkRecord::default() })
    }

    #[test]
    fn a_record_is_that_of_its_version_and_of_its_collection() {
        let all = Records::default();
        let (one, other) = (all.of_collection(), all.of_collection());
        let id = Uuid::from_u128(7);
        one.insert([(id, 1, record(1)), (id, 2, record(2))].into_iter());
        let revs = |records: &CollectionRecords| -> Vec<Option<i64>> {
            let found = records.get((1..=3).map(|version| (id, version)));
            found.into_iter().map(|record| record.map(|record| record.rev)).collect()
        };
        assert_eq!(revs(&one), [Some(1), Some(2), None]);
        assert_eq!(revs(&other), [None; 3]);
    }

    #[test]
    fn the_bound_holds_and_what_is_asked_for_again_is_kept() {
        let each = ENTRY_BYTES + bytes(&record(0));
        let max_bytes = 20 * each;
        let mut all = Generations::default();
        for number in 0..200_u64 {
            let key = (0, Uuid::from_u128(u128::from(number)), number);
            all.insert(key, record(i64::try_from(number).unwrap()), max_bytes);
            assert!(all.young.len() <= 10 && all.old.len() <= 10);
            assert_eq!(all.young_bytes, all.young.len() * each);
            assert_eq!(all.get(&(0, Uuid::nil(), 0)).unwrap().rev, 0, "after {number}");
        }
        assert!(all.get(&(0, Uuid::from_u128(100), 100)).is_none());
    }
}
