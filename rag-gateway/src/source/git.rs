//! A repository by its URL: a shallow clone with the `git` command, in a folder that goes away.
//!
//! The URL may carry credentials: they go to git and nowhere else. Every message about a URL shows
//! [`RepoUrl::shown`], and what git prints is searched for them before it is quoted.

use std::{path::PathBuf, process::Stdio, time::Duration};

use tokio::{io::AsyncReadExt as _, process::Command};

use super::{
    clones::{self, CloneFolder},
    repo::name_of,
};

/// Most that is quoted of git's complaint.
const MAX_COMPLAINT_BYTES: usize = 4096;

/// The address of a repository, with the branch or tag after `#`.
#[derive(Clone, PartialEq, Eq)]
pub struct RepoUrl {
    /// As git takes it.
    address: String,
    /// A branch or a tag; `None`: the repository's default.
    branch: Option<String>,
    /// Parts of the address that nobody may see.
    secrets: Vec<String>,
}

impl std::fmt::Debug for RepoUrl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("RepoUrl").field(&self.shown()).finish()
    }
}

/// Why there is no checkout.
#[derive(Debug, thiserror::Error)]
pub enum CloneError {
    /// There is no `git` command, or no folder to work in.
    #[error("git cannot be run: {0}")]
    NoGit(std::io::Error),
    /// git said no.
    #[error("git cannot clone {url}: {complaint}")]
    Refused {
        /// Without credentials.
        url: String,
        /// What git said, without credentials.
        complaint: String,
    },
    /// It took too long.
    #[error("cloning {url} took longer than {} s", .after.as_secs())]
    TimedOut {
        /// Without credentials.
        url: String,
        /// The bound.
        after: Duration,
    },
}

impl RepoUrl {
    /// Reads `https://…`, `http://…`, `ssh://…`, `git://…`, `file://…` or `git@host:path`, each with an
    /// optional `#branch`; `None`: this is a path.
    pub fn parse(text: &str) -> Option<Self> {
        let (address, branch) = match text.split_once('#') {
            Some((address, branch)) => (address, Some(branch.to_owned()).filter(|branch| !branch.is_empty())),
            None => (text, None),
        };
        if address.chars().any(char::is_control) || branch.as_ref().is_some_and(|name| name.starts_with('-'))
        {
            return None;
        }
        let secrets = match address.split_once("://") {
            Some((scheme, rest)) if ["https", "http", "ssh", "git", "file"].contains(&scheme) => {
                let authority = rest.split('/').next().unwrap_or_default();
                let user = authority.rsplit_once('@').map(|(user, _)| user).unwrap_or_default();
                // A user name alone is a token as often as it is a name.
                user.splitn(2, ':').chain([user]).filter(|part| !part.is_empty()).map(str::to_owned).collect()
            }
            // `git@host:path`, but not `C:\path` or `./a:b`.
            None if address.split_once(':').is_some_and(|(host, path)| {
                host.contains('@') && !host.contains('/') && !host.starts_with('-') && !path.is_empty()
            }) =>
            {
                Vec::new()
            }
            _ => return None,
        };
        Some(Self { address: address.to_owned(), branch, secrets })
    }

    /// The URL as it may be shown, stored and logged: without credentials.
    pub fn shown(&self) -> String {
        match (self.address.split_once("://"), self.secrets.is_empty()) {
            (Some((scheme, rest)), false) => {
                let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
                let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
                format!("{scheme}://{host}{path}")
            }
            _ => self.address.clone(),
        }
    }

    /// True when the address names a user or a password.
    pub(crate) fn has_credentials(&self) -> bool {
        !self.secrets.is_empty()
    }

    /// The folder of a `file://` URL.
    pub fn local_folder(&self) -> Option<PathBuf> {
        self.address.strip_prefix("file://").map(PathBuf::from)
    }

    /// A name for the repository: the last part of its path, without `.git`.
    pub fn name(&self) -> Option<String> {
        let path = self.address.trim_end_matches('/');
        let last = path.rsplit(['/', ':']).next()?;
        name_of(last.strip_suffix(".git").unwrap_or(last))
    }

    fn without_secrets(&self, text: &str) -> String {
        let mut text = text.to_owned();
        // The longest first: `user:password` before `user`.
        let mut secrets = self.secrets.clone();
        secrets.sort_by_key(|secret| std::cmp::Reverse(secret.len()));
        for secret in secrets {
            text = text.replace(&secret, "***");
        }
        text
    }
}

/// A shallow clone. The folder is deleted when this is dropped.
#[derive(Debug)]
pub struct Checkout {
    path: PathBuf,
    _folder: CloneFolder,
}

impl Checkout {
    /// Clones. Asks nobody for a password, runs no hook of the repository, leaves LFS files as they are.
    pub async fn of(url: &RepoUrl, bound: Duration) -> Result<Self, CloneError> {
        let folder = tokio::task::spawn_blocking(|| {
            clones::sweep();
            CloneFolder::new()
        })
        .await
        .unwrap_or_else(|error| Err(std::io::Error::other(error)))
        .map_err(CloneError::NoGit)?;
        let path = folder.checkout();
        let mut command = Command::new("git");
        command
            .args([
                "-c",
                "core.hooksPath=/dev/null",
                "-c",
                "core.fsmonitor=false",
                "-c",
                "submodule.recurse=false",
            ])
            .args(["clone", "--quiet", "--depth=1", "--single-branch", "--no-tags"]);
        if let Some(branch) = &url.branch {
            command.arg(format!("--branch={branch}"));
        }
        command
            .arg("--")
            .arg(&url.address)
            .arg(&path)
            .env("GIT_TERMINAL_PROMPT", "0")
            .env("GIT_ASKPASS", "true")
            .env("GIT_LFS_SKIP_SMUDGE", "1")
            .env("GIT_ALLOW_PROTOCOL", "https:http:ssh:git:file")
            .env("GIT_SSH_COMMAND", "ssh -o BatchMode=yes")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        let mut child = command.spawn().map_err(CloneError::NoGit)?;
        let stderr = child.stderr.take();
        let work = async {
            let mut complaint = Vec::new();
            if let Some(stderr) = stderr {
                let mut bounded = stderr.take(MAX_COMPLAINT_BYTES as u64);
                // What cannot be read is not quoted.
                let _ = bounded.read_to_end(&mut complaint).await;
                let _ = tokio::io::copy(&mut bounded.into_inner(), &mut tokio::io::sink()).await;
            }
            child.wait().await.map(|status| (status, complaint))
        };
        let (status, complaint) = tokio::time::timeout(bound, work)
            .await
            .map_err(|_| CloneError::TimedOut { url: url.shown(), after: bound })?
            .map_err(CloneError::NoGit)?;
        if status.success() {
            return Ok(Self { path, _folder: folder });
        }
        let complaint = url.without_secrets(String::from_utf8_lossy(&complaint).trim());
        let complaint = if complaint.is_empty() { status.to_string() } else { complaint };
        Err(CloneError::Refused { url: url.shown(), complaint })
    }

    /// Where it is.
    pub fn path(&self) -> &std::path::Path {
        &self.path
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

    use std::fs;

    use atlas_test_support::git;

    use super::*;
    use crate::source::repo::Repository;

    #[test]
    fn urls_are_told_from_paths_and_never_show_credentials() {
        for path in ["docs", "./a", "/srv/repo", "C:\\work", "ext::sh -c x", "-u@h:p", "ftp://x/y", "a#b"] {
            assert_eq!(RepoUrl::parse(path), None, "{path}");
        }
        for (text, shown, name) in [
            ("https://example.org/team/shop.git", "https://example.org/team/shop.git", "shop"),
            ("https://me:hunter2@example.org/shop/", "https://example.org/shop/", "shop"),
            ("https://ghp_token@example.org/shop#v1.2", "https://example.org/shop", "shop"),
            ("git@example.org:team/shop.git", "git@example.org:team/shop.git", "shop"),
            ("file:///srv/repos/shop", "file:///srv/repos/shop", "shop"),
        ] {
            let url = RepoUrl::parse(text).unwrap_or_else(|| panic!("{text}"));
            assert_eq!(url.shown(), shown);
            assert_eq!(url.name().as_deref(), Some(name));
            let debug = format!("{url:?}");
            assert!(!debug.contains("hunter2") && !debug.contains("ghp_token"), "{debug}");
        }
    }

    #[tokio::test]
    async fn a_branch_is_cloned_with_its_commit_and_the_folder_goes_away() {
        let origin = tempfile::tempdir().unwrap();
        git(origin.path(), &["init", "--quiet"]);
        fs::write(origin.path().join("a.md"), "main").unwrap();
        git(origin.path(), &["add", "."]);
        git(origin.path(), &["commit", "--quiet", "-m", "first"]);
        git(origin.path(), &["checkout", "--quiet", "-b", "next"]);
        fs::write(origin.path().join("a.md"), "next").unwrap();
        git(origin.path(), &["commit", "--quiet", "-am", "second"]);

        let url = RepoUrl::parse(&format!("file://{}#next", origin.path().display())).unwrap();
        let checkout = Checkout::of(&url, Duration::from_secs(60)).await.unwrap();
        assert_eq!(fs::read_to_string(checkout.path().join("a.md")).unwrap(), "next");
        let commit_of =
            |folder: &std::path::Path| Repository::around(folder).commit_of("a.md").map(str::to_owned);
        let commit = commit_of(checkout.path()).unwrap();
        assert_eq!(commit, commit_of(origin.path()).unwrap());
        let path = checkout.path().to_owned();
        drop(checkout);
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn a_refusal_is_quoted_without_the_password() {
        let url = RepoUrl::parse("http://me:hunter2@127.0.0.1:9/nothing.git").unwrap();
        let error = Checkout::of(&url, Duration::from_secs(60)).await.unwrap_err().to_string();
        assert!(error.contains("127.0.0.1:9/nothing.git"), "{error}");
        assert!(!error.contains("hunter2"), "{error}");
    }
}
