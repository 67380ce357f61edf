//! Tells when something changes below a folder (`atlas index --watch`).
//!
//! It only rings a bell: what changed is found by the next walk, which costs little and misses
//! nothing, not even what happened while events were lost. Changes of ignored files, and of ours, ring
//! no bell, or writing the index would; of git's own files only those do that tell of a commit.

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use atlas_rag_gateway::source::walk::WalkOptions;
use ignore::gitignore::{Gitignore, GitignoreBuilder};
use notify::{Event, EventKind, RecommendedWatcher, RecursiveMode, Watcher as _, event::ModifyKind};
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
        let mut filter = Filter::of(options);
        let beside = filter.beside();
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
        for folder in beside {
            // What is there only now and then is not missed.
            let _ = watcher.watch(&folder, RecursiveMode::NonRecursive);
        }
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

/// Files that name what is ignored, those that win first. The walk obeys more (of the user, `info/exclude`), which
/// only ignore more.
const IGNORE_FILES: [&str; 3] = [".atlasignore", ".ignore", ".gitignore"];

/// Which events matter. What it takes for ignored the walk ignores, too.
struct Filter {
    root: PathBuf,
    start: PathBuf,
    /// Where git keeps what is checked out; elsewhere in a worktree.
    git: Option<PathBuf>,
    data_dir: Option<PathBuf>,
    /// What folders say, until one of their files changes.
    folders: HashMap<PathBuf, Folder>,
}

/// What a folder says is ignored.
struct Folder {
    /// As [`IGNORE_FILES`].
    ignored: [Gitignore; 3],
    /// It is a repository: `.gitignore` above it says nothing of what is in it.
    is_repository: bool,
}

impl Folder {
    fn read(folder: &Path) -> Self {
        let ignored = IGNORE_FILES.map(|name| {
            let mut lines = GitignoreBuilder::new(folder);
            // Without it nothing is ignored here, and the walk looks for itself.
            let _ = lines.add(folder.join(name));
            lines.build().unwrap_or_else(|_| Gitignore::empty())
        });
        Self { ignored, is_repository: folder.join(".git").exists() }
    }
}

impl Filter {
    fn of(options: &WalkOptions) -> Self {
        Self {
            root: options.root.clone(),
            start: options.start.clone(),
            git: git_dir(&options.root),
            data_dir: options.data_dir.as_ref().and_then(|dir| dir.canonicalize().ok()),
            folders: HashMap::new(),
        }
    }

    /// Folders to be watched that are not below the start.
    fn beside(&self) -> Vec<PathBuf> {
        let above = self.start.ancestors().skip(1).take_while(|folder| folder.starts_with(&self.root));
        let git = self.git.iter().flat_map(|git| [git.clone(), git.join("logs")]);
        let all = above.map(Path::to_owned).chain(git);
        all.filter(|folder| !folder.starts_with(&self.start)).collect()
    }

    fn matters(&mut self, event: &Event) -> bool {
        if matches!(event.kind, EventKind::Access(_)) {
            return false;
        }
        if event.need_rescan() || event.paths.is_empty() {
            self.folders.clear();
            return true;
        }
        let names_ignored = |path: &PathBuf| {
            path.file_name()
                .is_some_and(|name| name == ".git" || IGNORE_FILES.iter().any(|file| name == *file))
        };
        if event.paths.iter().any(names_ignored) {
            self.folders.clear();
        }
        let is_worth = event.paths.iter().any(|path| self.is_worth(path));
        // A whole folder may have come, or gone, with what it ignores.
        let moved = !matches!(event.kind, EventKind::Modify(ModifyKind::Data(_) | ModifyKind::Metadata(_)));
        if is_worth && moved {
            self.folders.clear();
        }
        is_worth
    }

    fn is_worth(&mut self, path: &Path) -> bool {
        if let Some(below) = self.git.as_ref().and_then(|git| path.strip_prefix(git).ok()) {
            return is_of_commit(below);
        }
        let below = path.strip_prefix(&self.root).unwrap_or(path);
        let ours = below
            .components()
            .any(|part| [".git", ".hg", ".svn", ".atlas"].iter().any(|name| part.as_os_str() == *name));
        if ours || self.data_dir.as_deref().is_some_and(|dir| path.starts_with(dir)) {
            return false;
        }
        let Ok(below) = path.strip_prefix(&self.start) else {
            // Above the start only what says what is ignored.
            return path.file_name().is_some_and(|name| IGNORE_FILES.iter().any(|file| name == *file));
        };
        let mut place = self.start.clone();
        let mut parts = below.components().peekable();
        while let Some(part) = parts.next() {
            place.push(part);
            // What is not there any more may have been a file or a folder: `target/` is not for files.
            if self.is_ignored(&place, parts.peek().is_some()) {
                return false;
            }
        }
        true
    }

    /// As the walk judges what is in a folder that is not ignored itself: the first of the files decides that says
    /// anything, in the nearest folder.
    fn is_ignored(&mut self, path: &Path, is_dir: bool) -> bool {
        for (kind, name) in IGNORE_FILES.into_iter().enumerate() {
            for folder in path.ancestors().skip(1) {
                let folder =
                    self.folders.entry(folder.to_owned()).or_insert_with_key(|folder| Folder::read(folder));
                let matched = folder.ignored[kind].matched(path, is_dir);
                if !matched.is_none() {
                    return matched.is_ignore();
                }
                if name == ".gitignore" && folder.is_repository {
                    break;
                }
            }
        }
        false
    }
}

/// The folder of git for a work tree: `.git`, or what the file `.git` of a worktree names.
fn git_dir(root: &Path) -> Option<PathBuf> {
    let git = root.join(".git");
    if git.is_dir() {
        return Some(git);
    }
    let file = fs::read_to_string(&git).ok()?;
    root.join(file.strip_prefix("gitdir:")?.trim()).canonicalize().ok()
}

/// Does a file of git's own tell of another commit, or of what is ignored? Files that were indexed before they were
/// committed get their commit then. The index does not: it changes with each `git status`.
fn is_of_commit(path: &Path) -> bool {
    let is_lock = path.extension().is_some_and(|extension| extension == "lock");
    let told = ["HEAD", "logs/HEAD", "info/exclude", "reftable/tables.list"];
    !is_lock && (path.starts_with("refs/heads") || told.iter().any(|name| path == Path::new(name)))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use atlas_test_support::git;

    use super::*;

    #[test]
    fn only_what_could_be_indexed_rings_the_bell() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(".gitignore"), "target/\n").unwrap();
        fs::create_dir(dir.path().join(".git")).unwrap();
        let mut filter = Filter::of(&WalkOptions::of(dir.path()));
        for (path, worth) in [
            ("src/main.rs", true),
            (".github/workflows/ci.yml", true),
            ("target/debug/x", false),
            (".git/index", false),
            (".git/HEAD.lock", false),
            (".git/objects/ab/cd", false),
            (".git/logs/HEAD", true),
            (".git/refs/heads/main", true),
            (".git/info/exclude", true),
            (".atlas/vectors/atlas@1/segments/x", false),
        ] {
            assert_eq!(filter.is_worth(&dir.path().join(path)), worth, "{path}");
        }
        let read = Event::new(EventKind::Access(notify::event::AccessKind::Any));
        assert!(!filter.matters(&read.add_path(dir.path().join("src/main.rs"))));
    }

    #[test]
    fn what_nested_and_changed_ignore_files_let_in_rings_the_bell() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        for folder in ["docs", "lib/.git", "notes", "taken"] {
            fs::create_dir_all(root.join(folder)).unwrap();
        }
        fs::write(root.join(".gitignore"), "notes/\n*.txt\n/taken/\n").unwrap();
        fs::write(root.join(".atlasignore"), "!/taken/\n").unwrap();
        fs::write(root.join("docs/.gitignore"), "!*.txt\nout/\n").unwrap();
        let mut filter = Filter::of(&WalkOptions::of(root));
        for (path, worth) in [
            ("a.txt", false),
            ("docs/b.txt", true),
            ("docs/out/c.md", false),
            ("out/c.md", true),
            ("notes/a.md", false),
            ("taken/a.md", true),
            // Of a repository in it, `.gitignore` above says nothing.
            ("lib/a.txt", true),
        ] {
            assert_eq!(filter.is_worth(&root.join(path)), worth, "{path}");
        }
        fs::write(root.join(".gitignore"), "").unwrap();
        let changed = Event::new(EventKind::Modify(ModifyKind::Any));
        assert!(filter.matters(&changed.clone().add_path(root.join(".gitignore"))));
        assert!(filter.matters(&changed.add_path(root.join("notes/a.md"))));

        // A folder that was named itself is looked at although it is ignored.
        fs::write(root.join(".gitignore"), "notes/\n").unwrap();
        let mut part = Filter::of(&WalkOptions { start: root.join("notes"), ..WalkOptions::of(root) });
        assert!(part.is_worth(&root.join("notes/a.md")));
        assert!(!part.is_worth(&root.join("docs/a.md")));
        assert!(part.is_worth(&root.join(".gitignore")));
        assert_eq!(part.beside(), [root.to_owned()]);
    }

    #[tokio::test]
    async fn a_commit_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        let (main, other) = (root.join("main"), root.join("other"));
        fs::create_dir(&main).unwrap();
        git(&main, &["init", "--quiet"]);
        git(&main, &["commit", "--quiet", "--allow-empty", "-m", "first"]);
        git(&main, &["worktree", "add", "--quiet", "../other"]);
        fs::create_dir(main.join("docs")).unwrap();
        let part = WalkOptions { start: main.join("docs"), ..WalkOptions::of(&main) };
        for (folder, options) in
            [(&main, WalkOptions::of(&main)), (&main, part), (&other, WalkOptions::of(&other))]
        {
            let mut changes = Changes::of(&options).unwrap();
            git(folder, &["commit", "--quiet", "--allow-empty", "-m", "next"]);
            timeout(Duration::from_secs(30), changes.settled()).await.unwrap();
        }
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
