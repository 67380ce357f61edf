//! Tells when something changes below a folder (`atlas index --watch`).
//!
//! It only rings a bell: what changed is found by the next walk, which costs little and misses
//! nothing, not even what happened while events were lost. Changes of ignored files, of git's own
//! and of ours ring no bell, or writing the index would.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use atlas_rag_gateway::source::walk::WalkOptions;
use ignore::gitignore::{Gitignore, GitignoreBuilder};
use notify::{Event, EventKind, RecommendedWatcher, RecursiveMode, Watcher as _};
use tokio::{
    sync::mpsc,
    time::{Instant, timeout, timeout_at},
};

use crate::error::{CliError, Result};

/// A save is several events: nothing is done until it was quiet for so long.
const QUIET: Duration = Duration::from_millis(400);

/// Something that writes all the time is indexed all the same, this often.
const LONGEST_WAIT: Duration = Duration::from_secs(5);

/// Events below one folder.
pub(crate) struct Changes {
    /// Watches until it is dropped.
    _watcher: RecommendedWatcher,
    bell: mpsc::Receiver<()>,
}

impl Changes {
    /// Starts to watch what these options look at.
    pub(crate) fn of(options: &WalkOptions) -> Result<Self> {
        // One place is enough: a bell that rings already need not ring again.
        let (ring, bell) = mpsc::channel(1);
        let filter = Filter::of(options);
        let cannot = |error: notify::Error| {
            let full = matches!(error.kind, notify::ErrorKind::MaxFilesWatch);
            let failure =
                CliError::failure(format!("cannot watch {}", options.start.display())).because(error);
            if full {
                failure.fix("raise the limit: sudo sysctl fs.inotify.max_user_watches=1048576")
            } else {
                failure.fix("check the folder, or run `atlas index` now and then instead")
            }
        };
        let mut watcher = notify::recommended_watcher(move |event: notify::Result<Event>| {
            // An error is a lost event: the next walk sees what it was about.
            if event.as_ref().map_or(true, |event| filter.matters(event)) {
                let _ = ring.try_send(());
            }
        })
        .map_err(cannot)?;
        // Editors replace files: a watch on the file itself would end with its first change.
        let (folder, mode) = if options.start.is_dir() {
            (options.start.as_path(), RecursiveMode::Recursive)
        } else {
            (options.start.parent().unwrap_or(&options.root), RecursiveMode::NonRecursive)
        };
        watcher.watch(folder, mode).map_err(cannot)?;
        Ok(Self { _watcher: watcher, bell })
    }

    /// Waits for a change, then for a quiet moment. Safe to cancel.
    pub(crate) async fn settled(&mut self) {
        if self.bell.recv().await.is_none() {
            // The watcher never drops its end while this lives.
            return std::future::pending().await;
        }
        let end = Instant::now() + LONGEST_WAIT;
        while let Ok(Ok(Some(()))) = timeout_at(end, timeout(QUIET, self.bell.recv())).await {}
    }
}

/// Which events matter.
struct Filter {
    root: PathBuf,
    ignored: Gitignore,
    data_dir: Option<PathBuf>,
}

impl Filter {
    fn of(options: &WalkOptions) -> Self {
        let mut ignored = GitignoreBuilder::new(&options.root);
        for name in [".gitignore", ".atlasignore"] {
            // Without it nothing is ignored here, and the walk looks for itself.
            let _ = ignored.add(options.root.join(name));
        }
        Self {
            root: options.root.clone(),
            ignored: ignored.build().unwrap_or_else(|_| Gitignore::empty()),
            data_dir: options.data_dir.as_ref().and_then(|dir| dir.canonicalize().ok()),
        }
    }

    fn matters(&self, event: &Event) -> bool {
        if matches!(event.kind, EventKind::Access(_)) {
            return false;
        }
        event.need_rescan() || event.paths.is_empty() || event.paths.iter().any(|path| self.is_worth(path))
    }

    fn is_worth(&self, path: &Path) -> bool {
        let Ok(below) = path.strip_prefix(&self.root) else { return true };
        let ours = below
            .components()
            .any(|part| [".git", ".hg", ".svn", ".atlas"].iter().any(|name| part.as_os_str() == *name));
        let data = self.data_dir.as_deref().is_some_and(|dir| path.starts_with(dir));
        // `.git/HEAD` says that another commit is checked out; its files say so too.
        !ours && !data && !self.ignored.matched_path_or_any_parents(below, false).is_ignore()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use std::fs;

    use super::*;

    #[test]
    fn only_what_could_be_indexed_rings_the_bell() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(".gitignore"), "target/\n").unwrap();
        let filter = Filter::of(&WalkOptions::of(dir.path()));
        for (path, worth) in [
            ("src/main.rs", true),
            (".github/workflows/ci.yml", true),
            ("target/debug/x", false),
            (".git/index", false),
            (".atlas/vectors/atlas@1/segments/x", false),
        ] {
            assert_eq!(filter.is_worth(&dir.path().join(path)), worth, "{path}");
        }
        let read = Event::new(EventKind::Access(notify::event::AccessKind::Any));
        assert!(!filter.matters(&read.add_path(dir.path().join("src/main.rs"))));
    }

    #[tokio::test]
    async fn a_change_is_told_once_it_is_quiet() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        let mut changes = Changes::of(&WalkOptions::of(&root)).unwrap();
        fs::create_dir(root.join("docs")).unwrap();
        fs::write(root.join("docs/a.md"), "a").unwrap();
        timeout(Duration::from_secs(30), changes.settled()).await.unwrap();
        fs::write(root.join("docs/a.md"), "b").unwrap();
        timeout(Duration::from_secs(30), changes.settled()).await.unwrap();
    }
}
