//! What git says about a folder. Git is asked, never required: without it nothing is recorded.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// The repository that a folder is in.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Repository {
    /// Sources are named relative to this folder.
    pub root: PathBuf,
    /// The commit that is checked out.
    pub commit: Option<String>,
    /// Paths below the root that are not as the commit has them.
    pub uncommitted: BTreeSet<String>,
}

impl Repository {
    /// The repository around `path`, or `path` itself (its folder, if it is a file).
    pub fn around(path: &Path) -> Self {
        let folder = if path.is_dir() { path } else { path.parent().unwrap_or(path) };
        let Some(root) = folder.ancestors().find(|folder| folder.join(".git").exists()) else {
            return Self { root: folder.to_owned(), ..Self::default() };
        };
        let commit = git(root, &["rev-parse", "--verify", "HEAD"])
            .map(|hash| hash.trim().to_owned())
            .filter(|hash| hash.len() >= 40 && hash.bytes().all(|byte| byte.is_ascii_hexdigit()));
        let uncommitted =
            git(root, &["status", "--porcelain=v1", "-z", "--untracked-files=all", "--no-renames"])
                .map(|status| {
                    status.split('\0').filter_map(|entry| entry.get(3..)).map(str::to_owned).collect()
                })
                .unwrap_or_default();
        Self { root: root.to_owned(), commit, uncommitted }
    }

    /// A name for the repository: that of its folder.
    pub fn name(&self) -> Option<String> {
        let name: String = self
            .root
            .file_name()?
            .to_string_lossy()
            .chars()
            .map(|c| if c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-') { c } else { '-' })
            .take(128)
            .collect();
        (!name.is_empty()).then_some(name)
    }
}

/// Runs git; `None` when it is missing or fails. Read-only, and without the programs that a
/// stranger's repository may name in its configuration.
fn git(root: &Path, args: &[&str]) -> Option<String> {
    let output = Command::new("git")
        .args(["--no-optional-locks", "-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null", "-C"])
        .arg(root)
        .args(args)
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()
        .ok()?;
    if output.status.success() { String::from_utf8(output.stdout).ok() } else { None }
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
        assert_eq!(repository.commit, None);
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

        let repository = Repository::around(&root.join("docs"));
        assert_eq!(repository.root, root);
        assert_eq!(repository.commit.unwrap().len(), 40);
        assert_eq!(
            repository.uncommitted.iter().map(String::as_str).collect::<Vec<_>>(),
            ["docs/b.md", "new file.md"]
        );
    }
}
