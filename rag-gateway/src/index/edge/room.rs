//! Room on the disk.
//!
//! The engine writes through memory maps. Where the disk is full, the kernel has no page for such a write and ends the
//! process (SIGBUS), and with it all that runs beside. No error can be caught then, so we look before.

use std::{
    fs,
    path::{Path, PathBuf},
};

use atlas_shared::{Dependency, UpstreamError};

use super::{super::DISK_FULL, Change, NewChunk};

/// What a chunk takes beside its text and its vector: payload, terms, and their entries in the engine's log.
const CHUNK_BYTES: u64 = 4096;

/// The engine rebuilds segments of bounded size, so also of a huge index no more than this is written anew at a time.
const MAX_REBUILD_BYTES: u64 = 512 * 1024 * 1024;

/// The file system of an index.
#[derive(Clone, Debug)]
pub(super) struct Room {
    dir: PathBuf,
    /// Stays free whatever is written, in bytes.
    margin: u64,
}

impl Room {
    pub(super) fn new(dir: &Path, margin: u64) -> Self {
        Self { dir: dir.to_owned(), margin }
    }

    /// Refuses what does not fit with the margin.
    pub(super) fn check(&self, needed: u64) -> Result<(), UpstreamError> {
        self.check_beside(self.margin, needed)
    }

    /// The same, where a part of the margin may be used: for what makes room, or must end.
    pub(super) fn check_somewhat(&self, needed: u64) -> Result<(), UpstreamError> {
        self.check_beside(self.margin / 2, needed)
    }

    fn check_beside(&self, margin: u64, needed: u64) -> Result<(), UpstreamError> {
        // A file system that does not say is one that we cannot judge.
        let Some(free) = free(&self.dir) else { return Ok(()) };
        let wanted = margin.saturating_add(needed);
        if free >= wanted {
            return Ok(());
        }
        let mib = |bytes: u64| bytes.div_ceil(1024 * 1024);
        Err(UpstreamError::permanent(
            Dependency::VectorIndex,
            DISK_FULL,
            format!(
                "the disk of {} is full: {} MiB are free, and {} MiB are needed. Nothing is written; searches go on. \
                 Make room there, or set ATLAS_DATA_DIR to a folder on another disk (INDEX_MIN_FREE_BYTES says what \
                 stays free)",
                self.dir.display(),
                free / (1024 * 1024),
                mib(wanted)
            ),
        ))
    }
}

/// An upper bound of what a change writes, in bytes, where the collection has so many chunks.
pub(super) fn needed(change: &Change, chunks: u64) -> u64 {
    match change {
        Change::Upsert(chunks, _) => chunks.iter().map(needed_for).sum(),
        Change::Reweigh(_) => chunks.saturating_mul(CHUNK_BYTES),
        Change::Delete(_) | Change::Restate(..) => 0,
    }
}

/// Twice: in the log and where it stays. The text is a payload and its terms.
fn needed_for(chunk: &NewChunk) -> u64 {
    let vector = chunk.dense.as_deref().map_or(0, size_of_val);
    CHUNK_BYTES + 4 * chunk.record.text.len() as u64 + 2 * vector as u64
}

/// What rebuilding takes at most: the old segments are there until the new ones are.
pub(super) fn needed_to_rebuild(segments: &Path) -> u64 {
    allocated(segments).min(MAX_REBUILD_BYTES)
}

/// Bytes on disk below a folder; what vanishes meanwhile takes none.
fn allocated(dir: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt as _;

    let Ok(entries) = fs::read_dir(dir) else { return 0 };
    let size = |entry: fs::DirEntry| match entry.metadata() {
        Ok(metadata) if metadata.is_dir() => allocated(&entry.path()),
        Ok(metadata) => metadata.blocks() * 512,
        Err(_) => 0,
    };
    entries.flatten().map(size).sum()
}

/// Bytes that this user may still write there.
fn free(dir: &Path) -> Option<u64> {
    let stat = rustix::fs::statvfs(dir).ok()?;
    stat.f_bavail.checked_mul(stat.f_frsize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_fit_is_refused_with_its_reason() {
        let dir = std::env::temp_dir();
        Room::new(&dir, 0).check(0).unwrap_or_else(|error| unreachable!("{error}"));
        let Err(error) = Room::new(&dir, u64::MAX).check(1) else { unreachable!("no disk is so large") };
        assert_eq!(error.code(), DISK_FULL);
        let text = error.to_string();
        assert!(text.contains("ATLAS_DATA_DIR") && text.contains("INDEX_MIN_FREE_BYTES"), "{text}");
    }
}
