//! Folders that clones live in, and what processes that were killed left of them.
//!
//! A clone's folder goes away with its [`crate::source::git::Checkout`], unless the process is killed. So
//! each folder holds a file that its owner keeps locked. The kernel lets go of the lock when the process
//! ends, however it ends, and whoever clones or starts next deletes the folder.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    time::Duration,
};

/// How the folders are called: nothing else is ever looked at.
const PREFIX: &str = "atlas-clone-";

/// Locked for as long as the clone is in use.
const LOCK: &str = "owner.lock";

/// Folders without a lock (of an earlier release, or of a file system without locks) are in use for no
/// longer than this.
const UNLOCKED_BOUND: Duration = Duration::from_hours(24);

/// A folder of one's own, which goes away with this.
#[derive(Debug)]
pub(super) struct CloneFolder {
    folder: tempfile::TempDir,
    /// Held, never read. `None`: the file system has no locks.
    _lock: Option<File>,
}

impl CloneFolder {
    /// Makes one among the temporary files.
    pub(super) fn new() -> io::Result<Self> {
        Self::within(&std::env::temp_dir())
    }

    fn within(place: &Path) -> io::Result<Self> {
        let folder = tempfile::Builder::new().prefix(PREFIX).tempdir_in(place)?;
        // Under another name until it is locked, so that nobody finds it unlocked and deletes the folder.
        let early = folder.path().join("owner.new");
        let lock = File::create_new(&early)?;
        let locked = lock.try_lock().is_ok();
        if locked {
            fs::rename(&early, folder.path().join(LOCK))?;
        }
        Ok(Self { folder, _lock: locked.then_some(lock) })
    }

    /// Where to clone to; not there yet.
    pub(super) fn checkout(&self) -> PathBuf {
        self.folder.path().join("repo")
    }
}

/// Deletes the folders of processes that have ended; returns how many. Blocking.
///
/// What cannot be read or deleted is left: a later sweep tries again.
pub(crate) fn sweep() -> usize {
    sweep_within(&std::env::temp_dir())
}

fn sweep_within(place: &Path) -> usize {
    let Ok(entries) = fs::read_dir(place) else { return 0 };
    let ours = entries.flatten().filter(|entry| entry.file_name().to_string_lossy().starts_with(PREFIX));
    let mut swept = 0;
    for entry in ours {
        let folder = entry.path();
        match delete_if_abandoned(&folder) {
            Ok(true) => {
                tracing::info!(folder = %folder.display(), "deleted a clone that an ended process left behind");
                swept += 1;
            }
            Ok(false) => {}
            Err(error) => {
                tracing::debug!(folder = %folder.display(), %error, "an old clone cannot be deleted for now");
            }
        }
    }
    swept
}

fn delete_if_abandoned(folder: &Path) -> io::Result<bool> {
    // Links are not followed: the place is one that everybody may write to.
    let found = fs::symlink_metadata(folder)?;
    if !found.is_dir() || !is_mine(&found)? {
        return Ok(false);
    }
    let lock = folder.join(LOCK);
    match fs::symlink_metadata(&lock) {
        Ok(found) if found.is_file() => {
            let lock = File::open(&lock)?;
            if lock.try_lock().is_err() {
                return Ok(false);
            }
            // The lock goes last: a git that outlived its gateway can make the first attempt fail.
            match fs::remove_dir_all(folder.join("repo")) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            fs::remove_dir_all(folder)?;
            Ok(true)
        }
        Ok(_) => Ok(false),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let age = found.modified()?.elapsed().unwrap_or_default();
            if age < UNLOCKED_BOUND {
                return Ok(false);
            }
            fs::remove_dir_all(folder)?;
            Ok(true)
        }
        Err(error) => Err(error),
    }
}

/// Files of other users are not touched, even where that is allowed.
#[cfg(unix)]
fn is_mine(found: &fs::Metadata) -> io::Result<bool> {
    use std::os::unix::fs::MetadataExt as _;
    Ok(tempfile::tempfile()?.metadata()?.uid() == found.uid())
}

#[cfg(not(unix))]
fn is_mine(_: &fs::Metadata) -> io::Result<bool> {
    Ok(true)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use std::time::SystemTime;

    use super::*;

    fn age(folder: &Path, age: Duration) {
        File::open(folder).unwrap().set_modified(SystemTime::now() - age).unwrap();
    }

    #[test]
    fn what_has_an_owner_stays_and_what_a_killed_process_left_goes() {
        let place = tempfile::tempdir().unwrap();
        let owned = CloneFolder::within(place.path()).unwrap();
        fs::create_dir_all(owned.checkout().join("docs")).unwrap();
        age(owned.folder.path(), 2 * UNLOCKED_BOUND);
        let killed = CloneFolder::within(place.path()).unwrap();
        fs::create_dir_all(killed.checkout().join("docs")).unwrap();
        fs::write(killed.checkout().join("docs/a.md"), "apple").unwrap();
        let CloneFolder { folder, _lock: lock } = killed;
        let left = folder.keep();
        // A kill closes it.
        drop(lock);

        assert_eq!(sweep_within(place.path()), 1);
        assert!(!left.exists());
        assert!(owned.checkout().join("docs").exists());
        assert_eq!(sweep_within(place.path()), 0);
        let folder = owned.folder.path().to_owned();
        drop(owned);
        assert!(!folder.exists());
    }

    #[test]
    fn without_a_lock_only_what_is_old_goes() {
        let place = tempfile::tempdir().unwrap();
        let [new, old] = ["atlas-clone-new", "atlas-clone-old"].map(|name| place.path().join(name));
        for folder in [&new, &old] {
            fs::create_dir(folder).unwrap();
            fs::write(folder.join("a.md"), "apple").unwrap();
        }
        age(&old, UNLOCKED_BOUND + Duration::from_mins(1));
        assert_eq!(sweep_within(place.path()), 1);
        assert!(new.exists() && !old.exists());
    }

    #[cfg(unix)]
    #[test]
    fn nothing_else_is_touched_and_no_link_is_followed() {
        use std::os::unix::fs::symlink;

        let place = tempfile::tempdir().unwrap();
        let elsewhere = tempfile::tempdir().unwrap();
        fs::write(elsewhere.path().join(LOCK), "").unwrap();
        fs::write(elsewhere.path().join("kept.md"), "apple").unwrap();
        symlink(elsewhere.path(), place.path().join("atlas-clone-link")).unwrap();
        let other = place.path().join("somebody-elses");
        fs::create_dir(&other).unwrap();
        fs::write(other.join(LOCK), "").unwrap();
        fs::write(place.path().join("atlas-clone-file"), "").unwrap();
        // Its contents are a link: the link goes, what it names stays.
        let left = place.path().join("atlas-clone-left");
        fs::create_dir(&left).unwrap();
        fs::write(left.join(LOCK), "").unwrap();
        symlink(elsewhere.path(), left.join("docs")).unwrap();

        assert_eq!(sweep_within(place.path()), 1);
        assert!(other.exists() && place.path().join("atlas-clone-file").exists());
        assert!(elsewhere.path().join("kept.md").exists());
    }
}
