//! What git says about a folder. Git is asked, never required: without it nothing is recorded.

use std::{
    collections::HashSet,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use atlas_shared::gateway_api::IndexedDocument;

use super::git::RepoUrl;

/// The repository that a folder is in.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Repository {
    /// Sources are named relative to this folder.
    pub root: PathBuf,
    /// Where it lies, by which it is told from others of its name: the address of its remote `origin` without
    /// credentials, so that all clones of it are one; without a remote its folder.
    pub origin: String,
    /// The commit that is checked out.
    commit: Option<String>,
    /// Paths below the root that are as the commit has them. As bytes: names need not be UTF-8, and one that is not
    /// must not hide the others.
    committed: HashSet<Vec<u8>>,
}

impl Repository {
    /// The repository around `path`, or `path` itself (its folder, if it is a file).
    pub fn around(path: &Path) -> Self {
        let folder = if path.is_dir() { path } else { path.parent().unwrap_or(path) };
        let Some(root) = folder.ancestors().find(|folder| folder.join(".git").exists()) else {
            return Self::without_git(folder);
        };
        // Without both lists nothing is known to be as committed.
        let status = git(
            root,
            &[
                "status",
                "--porcelain=v2",
                "--branch",
                "-z",
                "--untracked-files=no",
                "--no-renames",
                // Their files are in commits of their own.
                "--ignore-submodules=all",
            ],
        );
        let tracked = git(root, &["ls-files", "-v", "-z"]);
        let (commit, committed) = match (status, tracked) {
            (Some(status), Some(tracked)) => as_committed(&status, &tracked),
            _ => Default::default(),
        };
        let remote = git(root, &["config", "--get", "remote.origin.url"]).unwrap_or_default();
        let remote = String::from_utf8_lossy(&remote);
        let origin = origin(remote.trim_end_matches(['\n', '\r']), root);
        Self { root: root.to_owned(), origin, commit, committed }
    }

    /// A folder of which git knows nothing.
    pub fn without_git(root: &Path) -> Self {
        Self { root: root.to_owned(), origin: root.display().to_string(), ..Self::default() }
    }

    /// A name for the repository: that of its folder.
    pub fn name(&self) -> Option<String> {
        name_of(&self.root.file_name()?.to_string_lossy())
    }

    /// The commit that has this source as it is now.
    pub fn commit_of(&self, source: &str) -> Option<&str> {
        self.commit.as_deref().filter(|_| self.committed.contains(source.as_bytes()))
    }

    /// Where else documents of this repository's name come from: their origin, and how many they are.
    pub fn rival<'d>(&self, documents: &'d [IndexedDocument]) -> Option<(&'d str, usize)> {
        let others = documents.iter().filter_map(|document| document.origin.as_deref());
        let mut others = others.filter(|origin| *origin != self.origin).peekable();
        let first = *others.peek()?;
        Some((first, others.filter(|origin| *origin == first).count()))
    }
}

/// A text as the name of a repository, if anything of it is left.
pub fn name_of(text: &str) -> Option<String> {
    let letter = |c: char| if c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-') { c } else { '-' };
    let name: String = text.chars().map(letter).take(128).collect();
    (!name.is_empty()).then_some(name)
}

/// Where a repository lies, by the address of its remote (may be empty, or a path).
fn origin(remote: &str, root: &Path) -> String {
    if let Some(url) = RepoUrl::parse(remote) {
        return url.place();
    }
    // Relative ones are relative to the folder; an absolute one stays what it is.
    let folder = if remote.is_empty() { root.to_owned() } else { root.join(remote) };
    let folder = folder.canonicalize().unwrap_or(folder).display().to_string();
    folder.strip_suffix(".git").map(|folder| folder.trim_end_matches('/').to_owned()).unwrap_or(folder)
}

/// The commit that is checked out and the files that are as it has them: those that git keeps (`git ls-files -v -z`)
/// and that have not changed (`git status --porcelain=v2 --branch -z`). What git ignores, or knows nothing of, is in
/// neither list.
fn as_committed(status: &[u8], tracked: &[u8]) -> (Option<String>, HashSet<Vec<u8>>) {
    let lines = |list| <[u8]>::split(list, |byte| *byte == 0);
    // `H`: kept, and looked at. Changes of others (`h`: assume-unchanged, `S`: skip-worktree) are not told.
    let mut committed: HashSet<Vec<u8>> =
        lines(tracked).filter_map(|line| line.strip_prefix(b"H ")).map(<[u8]>::to_vec).collect();
    let mut commit = None;
    for line in lines(status) {
        // The path is the last field, and may hold spaces.
        let fields = match line.first() {
            Some(b'#') => {
                // From the same call as the changes: between two of them somebody may commit.
                let hash = line.strip_prefix(b"# branch.oid ").and_then(|hash| str::from_utf8(hash).ok());
                commit = commit.or(hash.filter(|hash| is_hash(hash)).map(str::to_owned));
                continue;
            }
            Some(b'1') => 9,
            Some(b'u') => 11,
            Some(_) => 2,
            None => continue,
        };
        if let Some(path) = line.splitn(fields, |byte| *byte == b' ').nth(fields - 1) {
            committed.remove(path);
        }
    }
    (commit, committed)
}

/// `(initial)` is none.
fn is_hash(text: &str) -> bool {
    text.len() >= 40 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// Is this folder a repository without a work tree? What it holds are git's own files.
pub fn is_bare(folder: &Path) -> bool {
    folder.join("HEAD").is_file() && folder.join("objects").is_dir() && folder.join("refs").is_dir()
}

/// Runs git; `None` when it is missing or fails. Read-only, and without the programs that a
/// stranger's repository may name in its configuration.
fn git(root: &Path, args: &[&str]) -> Option<Vec<u8>> {
    let output = Command::new("git")
        .args(["--no-optional-locks", "-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null", "-C"])
        .arg(root)
        .args(args)
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()
        .ok()?;
    output.status.success().then_some(output.stdout)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use std::fs;

    use atlas_test_support::git;

    use super::*;

    #[test]
    fn a_plain_folder_is_its_own_root() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("my notes");
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join("a.md"), "a").unwrap();
        let repository = Repository::around(&folder.join("a.md"));
        assert_eq!(repository.root, folder);
        assert_eq!(repository.commit_of("a.md"), None);
        assert_eq!(repository.name().unwrap(), "my-notes");
    }

    #[test]
    fn a_commit_stands_only_for_files_that_are_as_committed() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        fs::create_dir(root.join("docs")).unwrap();
        fs::write(root.join("docs/a.md"), "a").unwrap();
        fs::write(root.join("docs/b.md"), "b").unwrap();
        git(root, &["init", "--quiet"]);
        git(root, &["add", "."]);
        git(root, &["commit", "--quiet", "-m", "first"]);
        fs::write(root.join("docs/b.md"), "changed").unwrap();
        fs::write(root.join("new file.md"), "new").unwrap();
        let inner = root.join("inner");
        fs::create_dir(&inner).unwrap();
        fs::write(inner.join("c.md"), "c").unwrap();

        git(&inner, &["init", "--quiet"]);
        git(root, &["config", "--file", ".gitmodules", "submodule.lib.path", "lib"]);

        let repository = Repository::around(&root.join("docs"));
        assert_eq!(repository.root, root);
        assert_eq!(repository.commit_of("docs/a.md").unwrap().len(), 40);
        for source in ["docs/b.md", "new file.md", "inner/c.md", "lib/d.md"] {
            assert_eq!(repository.commit_of(source), None, "{source}");
        }
    }

    #[cfg(unix)]
    #[test]
    fn a_name_that_is_not_utf8_makes_no_change_a_commit() {
        use std::os::unix::ffi::OsStrExt as _;

        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        for name in ["a.md", "b.md"] {
            fs::write(root.join(name), "as committed").unwrap();
        }
        let odd = root.join(std::ffi::OsStr::from_bytes(b"caf\xe9.txt"));
        // Some file systems refuse such names.
        if fs::write(&odd, "odd").is_err() {
            return;
        }
        git(root, &["init", "--quiet"]);
        git(root, &["add", "."]);
        git(root, &["commit", "--quiet", "-m", "first"]);
        fs::write(odd, "changed").unwrap();
        fs::write(root.join("b.md"), "changed").unwrap();
        fs::write(root.join("new.md"), "new").unwrap();

        let repository = Repository::around(root);
        assert!(repository.commit_of("a.md").is_some());
        assert_eq!(repository.commit_of("b.md"), None);
        assert_eq!(repository.commit_of("new.md"), None);
    }

    #[test]
    fn where_git_cannot_tell_what_changed_there_is_no_commit() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        fs::write(root.join("a.md"), "a").unwrap();
        git(root, &["init", "--quiet"]);
        git(root, &["add", "."]);
        git(root, &["commit", "--quiet", "-m", "first"]);
        fs::write(root.join(".git/index"), "broken").unwrap();
        assert_eq!(Repository::around(root).commit_of("a.md"), None);
    }

    #[test]
    fn a_file_that_git_does_not_keep_has_no_commit() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        fs::create_dir(root.join("gen")).unwrap();
        for (name, text) in
            [("a.md", "a"), ("gen/x.md", "x"), (".gitignore", "gen/"), (".atlasignore", "!gen/")]
        {
            fs::write(root.join(name), text).unwrap();
        }
        for name in ["assumed.md", "skipped.md"] {
            fs::write(root.join(name), "committed").unwrap();
        }
        git(root, &["init", "--quiet"]);
        git(root, &["add", "."]);
        git(root, &["commit", "--quiet", "-m", "first"]);
        git(root, &["update-index", "--assume-unchanged", "assumed.md"]);
        git(root, &["update-index", "--skip-worktree", "skipped.md"]);
        for name in ["assumed.md", "skipped.md"] {
            fs::write(root.join(name), "changed").unwrap();
        }

        let repository = Repository::around(root);
        assert!(repository.commit_of("a.md").is_some());
        for source in ["gen/x.md", "assumed.md", "skipped.md"] {
            assert_eq!(repository.commit_of(source), None, "{source}");
        }
    }

    #[test]
    fn clones_of_one_repository_have_one_origin() {
        let dir = tempfile::tempdir().unwrap();
        let (root, other) = (dir.path().join("api"), dir.path().join("client/api"));
        let origin_with = |remote: &str| {
            git(&root, &["config", "remote.origin.url", remote]);
            Repository::around(&root).origin
        };
        fs::create_dir_all(&root).unwrap();
        fs::create_dir_all(&other).unwrap();
        git(&root, &["init", "--quiet"]);
        let folder = |path: &Path| path.canonicalize().unwrap().display().to_string();
        assert_eq!(Repository::around(&root).origin, root.display().to_string());
        for remote in [
            "https://example.org/team/api.git",
            "https://me:hunter2@Example.org/team/api",
            "git@example.org:team/api.git",
            "ssh://git@example.org/team/api/",
        ] {
            assert_eq!(origin_with(remote), "example.org/team/api", "{remote}");
        }
        assert_eq!(origin_with("../client/api"), folder(&other));
        assert_eq!(origin_with(&format!("file://{}", folder(&other))), folder(&other));
        assert_eq!(
            origin_with(&format!("{}/gone.git", dir.path().display())),
            format!("{}/gone", dir.path().display())
        );
        assert_eq!(Repository::around(&other).origin, other.display().to_string());
    }

    #[test]
    fn documents_of_another_origin_are_noticed() {
        let document = |origin: Option<&str>| IndexedDocument {
            source: "a.md".to_owned(),
            content_hash: String::new(),
            chunks: 1,
            commit: None,
            origin: origin.map(str::to_owned),
        };
        let mine = Repository { origin: "example.org/api".to_owned(), ..Repository::default() };
        assert_eq!(mine.rival(&[]), None);
        assert_eq!(
            mine.rival(&[document(None), document(Some("example.org/api"))]),
            None,
            "old ones say nothing"
        );
        let theirs = Some("/client/api");
        assert_eq!(
            mine.rival(&[document(None), document(theirs), document(theirs)]),
            Some(("/client/api", 2))
        );
    }
}
