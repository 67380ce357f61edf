//! The segments of a collection as they were before the engine rebuilds some, kept until it is done.
//!
//! The engine puts a rebuilt segment beside those that it was made of and then removes them, one after another. A
//! process that dies in between leaves chunks twice, and nothing tells which copies are the leftovers: one call may
//! rebuild several times, and also what it has just rebuilt. So before the call all segments are linked into another
//! folder (copied where the file system knows no links), and whoever opens a collection that has this folder puts it
//! back: then nothing was rebuilt. Links cost no room, and nobody writes to the collection meanwhile, so what is put
//! back is all that was there.
//!
//! The folder gets its name when it is complete, and loses it before the next write. A kill leaves what was done; in
//! a power cut journals keep the order of what is done to folders, so one sync at the end is enough.

use std::{fs, io, path::Path};

/// Where the engine keeps its segments.
const SEGMENTS: &str = "segments";

/// The segments as they were before the rebuilding that is under way.
const KEPT: &str = "segments.kept";

/// The same, not complete yet or not needed any more.
const UNNAMED: &str = "segments.kept.part";

/// Keeps the segments. They must be flushed, and not be written to until they are let go.
pub(super) fn keep(dir: &Path) -> io::Result<()> {
    let unnamed = dir.join(UNNAMED);
    remove(&unnamed)?;
    link_folder(&dir.join(SEGMENTS), &unnamed)?;
    fs::rename(&unnamed, dir.join(KEPT))?;
    sync(dir)
}

/// The segments are as they shall be: nothing is put back any more. After an error nothing may be written.
pub(super) fn let_go(dir: &Path) -> io::Result<()> {
    match fs::rename(dir.join(KEPT), dir.join(UNNAMED)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        renamed => renamed?,
    }
    sync(dir)?;
    // What is left of it has no name, and goes with the next one or when the collection is opened.
    let _ = remove(&dir.join(UNNAMED));
    Ok(())
}

/// Puts back what a rebuilding that was cut short had found. True where there was one.
///
/// Only for the one process that owns the collection, before the engine opens it.
pub(super) fn put_back(dir: &Path) -> io::Result<bool> {
    remove(&dir.join(UNNAMED))?;
    let kept = dir.join(KEPT);
    if !kept.try_exists()? {
        return Ok(false);
    }
    // Cut short here, it begins again the next time: what is kept is whole until it has its old name.
    remove(&dir.join(SEGMENTS))?;
    fs::rename(&kept, dir.join(SEGMENTS))?;
    sync(dir)?;
    Ok(true)
}

/// True where [`put_back`] will find segments to put back.
pub(super) fn is_unfinished(dir: &Path) -> bool {
    // What cannot be looked at is not known to be finished.
    dir.join(KEPT).try_exists().unwrap_or(true)
}

/// Links the files of a folder into a new one, or copies them.
pub(super) fn link_folder(from: &Path, to: &Path) -> io::Result<()> {
    fs::create_dir(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let new = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            link_folder(&entry.path(), &new)?;
        } else if fs::hard_link(entry.path(), &new).is_err() {
            // Without links, or with too many of them. A disk that is full says so again.
            fs::copy(entry.path(), &new)?;
            sync(&new)?;
        }
    }
    Ok(())
}

fn remove(dir: &Path) -> io::Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

fn sync(path: &Path) -> io::Result<()> {
    fs::File::open(path)?.sync_all()
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    /// A collection with two segments, flushed.
    fn collection() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for segment in ["one", "two"] {
            let storage = dir.path().join(SEGMENTS).join(segment).join("storage");
            fs::create_dir_all(&storage).unwrap();
            fs::write(storage.join("data"), segment).unwrap();
            fs::write(dir.path().join(SEGMENTS).join(segment).join("version.info"), "1").unwrap();
        }
        dir
    }

    /// What the engine leaves when it is killed after it has removed the first of two segments.
    fn rebuild_half(dir: &Path) {
        let segments = dir.join(SEGMENTS);
        fs::create_dir(segments.join("both")).unwrap();
        fs::write(segments.join("both").join("data"), "one and two").unwrap();
        fs::remove_dir_all(segments.join("one")).unwrap();
    }

    fn files(dir: &Path) -> BTreeMap<String, String> {
        let mut files = BTreeMap::new();
        let mut folders = vec![dir.to_owned()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    folders.push(path);
                } else {
                    let name = path.strip_prefix(dir).unwrap().display().to_string();
                    files.insert(name, fs::read_to_string(path).unwrap());
                }
            }
        }
        files
    }

    #[test]
    fn what_was_kept_is_put_back_whole_whenever_it_was_cut_short() {
        let dir = collection();
        let dir = dir.path();
        let before = files(dir);
        assert!(!put_back(dir).unwrap());
        assert_eq!(files(dir), before);

        keep(dir).unwrap();
        rebuild_half(dir);
        assert!(put_back(dir).unwrap());
        assert_eq!(files(dir), before);

        // Cut short while it was put back.
        keep(dir).unwrap();
        rebuild_half(dir);
        fs::remove_dir_all(dir.join(SEGMENTS).join("two")).unwrap();
        assert!(put_back(dir).unwrap());
        assert_eq!(files(dir), before);
        keep(dir).unwrap();
        fs::remove_dir_all(dir.join(SEGMENTS)).unwrap();
        assert!(put_back(dir).unwrap());
        assert_eq!(files(dir), before);
    }

    #[test]
    fn what_was_not_kept_whole_or_was_let_go_is_not_put_back() {
        let dir = collection();
        let dir = dir.path();
        // Cut short before it had its name.
        fs::create_dir_all(dir.join(UNNAMED).join("one")).unwrap();
        let all = files(dir);
        assert!(!put_back(dir).unwrap());
        assert_eq!(files(dir), all);

        keep(dir).unwrap();
        rebuild_half(dir);
        let rebuilt = files(&dir.join(SEGMENTS));
        let_go(dir).unwrap();
        let_go(dir).unwrap();
        assert!(!put_back(dir).unwrap());
        assert_eq!(files(&dir.join(SEGMENTS)), rebuilt);
        assert!(!dir.join(UNNAMED).exists());
    }

    #[test]
    fn links_take_no_room() {
        use std::os::unix::fs::MetadataExt as _;

        let dir = collection();
        keep(dir.path()).unwrap();
        let inode = |folder: &str| {
            fs::metadata(dir.path().join(folder).join("one").join("storage").join("data")).unwrap().ino()
        };
        assert_eq!(inode(SEGMENTS), inode(KEPT));
    }
}
