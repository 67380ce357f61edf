//! Vectors that were paid for and are not written yet: a file each, in a folder beside the collections.
//!
//! They are few: parts of documents that are larger than one call, and what could not be written. So a file each is
//! simple, and its name is all that has to be remembered.

use std::{
    collections::{HashMap, HashSet},
    fs, io,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use uuid::Uuid;

use super::super::{KEPT_VECTORS_DAYS, vector_bytes, vector_from};

/// No generation has this name: there is no number in it.
const FOLDER: &str = "paid.vectors";

/// What a write that was cut short leaves.
const UNFINISHED: &str = "new";

/// Some hundred megabytes: whoever has so many unfinished documents has another problem.
const MAX_KEPT: usize = 50_000;

/// The folder.
pub(super) struct PaidVectors {
    dir: PathBuf,
    /// What is in it: one process at a time has the index open.
    ids: Mutex<HashSet<Uuid>>,
}

impl PaidVectors {
    /// Looks what is there, and removes what is too old.
    pub(super) fn open(index: &Path) -> io::Result<Self> {
        let dir = index.join(FOLDER);
        let mut ids = HashSet::new();
        let entries = match fs::read_dir(&dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Ok(Self { dir, ids: Mutex::new(ids) });
            }
            entries => entries?,
        };
        let oldest = SystemTime::now().checked_sub(Duration::from_hours(24) * KEPT_VECTORS_DAYS);
        for entry in entries {
            let entry = entry?;
            let id = entry.file_name().to_str().and_then(|name| name.parse::<Uuid>().ok());
            let written = entry.metadata()?.modified()?;
            match id {
                Some(id) if oldest.is_none_or(|oldest| written > oldest) => drop(ids.insert(id)),
                _ => fs::remove_file(entry.path())?,
            }
        }
        Ok(Self { dir, ids: Mutex::new(ids) })
    }

    pub(super) fn keep(&self, vectors: Vec<(Uuid, Vec<f32>)>) -> io::Result<()> {
        fs::create_dir_all(&self.dir)?;
        let unfinished = self.dir.join(UNFINISHED);
        for (id, vector) in vectors {
            // The lock also makes that name ours.
            let mut ids = self.ids();
            if ids.len() >= MAX_KEPT {
                return Err(io::Error::other(format!("{} has {MAX_KEPT} files already", self.dir.display())));
            }
            fs::write(&unfinished, vector_bytes(&vector))?;
            fs::rename(&unfinished, self.path(id))?;
            ids.insert(id);
        }
        Ok(())
    }

    /// What cannot be read is not there: it is paid for again.
    pub(super) fn kept(&self, ids: &[Uuid]) -> HashMap<Uuid, Vec<f32>> {
        let there: Vec<Uuid> = {
            let known = self.ids();
            ids.iter().copied().filter(|id| known.contains(id)).collect()
        };
        let read = |id| Some((id, vector_from(&fs::read(self.path(id)).ok()?)?));
        there.into_iter().filter_map(read).collect()
    }

    pub(super) fn forget(&self, forgotten: &[Uuid]) -> io::Result<()> {
        for id in forgotten {
            if self.ids().remove(id) {
                match fs::remove_file(self.path(*id)) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                    _ => {}
                }
            }
        }
        Ok(())
    }

    fn path(&self, id: Uuid) -> PathBuf {
        self.dir.join(id.simple().to_string())
    }

    fn ids(&self) -> MutexGuard<'_, HashSet<Uuid>> {
        self.ids.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
