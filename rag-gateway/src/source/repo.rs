//! What git says about a folder. Git is asked, never required: without it nothing is recorded.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use atlas_shared::gateway_api::IndexedDocument;

use super::{place, walk::Candidate};

/// Commits that are looked up at once: what a command line holds anywhere. The next run looks up the others.
const MAX_COMMITS: usize = 256;

/// The repository that a folder is in.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Repository {
    /// Sources are named relative to this folder.
    pub root: PathBuf,
    /// Where it lies, by which it is told from others of its name: the address of its remote `origin` without
    /// credentials, so that all clones of it are one, and its folder.
    pub origin: String,
    /// Why git says less of it than it could, and what to do.
    pub trouble: Option<String>,
    /// The commit that is checked out.
    commit: Option<String>,
    /// Paths below the root that are as the commit has them. As bytes: names need not be UTF-8, and one that is not
    /// must not hide the others.
    committed: HashSet<Vec<u8>>,
}

impl Repository {
    /// The repository around `path`, or `path` itself (its folder, if it is a file).
    pub fn around(path: &Path) -> Self {
        Self::read(path, true)
    }

    /// The repository in a folder that it was cloned to for now.
    pub fn cloned(path: &Path) -> Self {
        Self::read(path, false)
    }

    /// `is_here`: it will be in this folder the next time, too.
    fn read(path: &Path, is_here: bool) -> Self {
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
        let trouble = status.as_ref().err().or(tracked.as_ref().err()).map(|trouble| trouble.told(root));
        let (commit, committed) = match (status, tracked) {
            (Ok(status), Ok(tracked)) => as_committed(&status, &tracked),
            _ => Default::default(),
        };
        // As git resolves it (`insteadOf`). It runs nothing that a configuration names, so the address may be had of
        // another user's repository, too.
        let remote =
            git(root, &["-c", "safe.directory=*", "remote", "get-url", "origin"]).unwrap_or_default();
        let remote = String::from_utf8_lossy(&remote);
        // A remote without an address is called by its name.
        let remote = Some(remote.trim_end_matches(['\n', '\r'])).filter(|remote| *remote != "origin");
        let origin = place::origin(remote.unwrap_or_default(), root, is_here);
        Self { root: root.to_owned(), origin, trouble, commit, committed }
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

    /// Its address; its folder where it has none.
    pub fn address(&self) -> &str {
        place::address(&self.origin)
    }

    /// Need this file not be sent again, because its content is indexed, and all that is known of where it comes from?
    /// `gone`: commits of which nothing is left, by [`Self::gone`].
    pub fn is_indexed(&self, file: &Candidate, known: &IndexedDocument, gone: &HashSet<String>) -> bool {
        let has_commit = known.commit.as_ref().is_some_and(|commit| !gone.contains(commit));
        known.content_hash == file.hash
            && (has_commit || self.commit_of(&file.source).is_none())
            && known.origin.as_deref().is_none_or(|origin| self.is_at(origin))
    }

    /// Which commits of these documents are in no branch, tag or remote branch any more, because they were squashed,
    /// amended or rebased: who follows a citation to one finds nothing. None where git cannot know it: a shallow clone
    /// has not all of history.
    pub fn gone(&self, documents: &[IndexedDocument]) -> HashSet<String> {
        let Some(head) = &self.commit else { return HashSet::new() };
        let is_hash =
            |text: &str| matches!(text.len(), 40 | 64) && text.bytes().all(|b| b.is_ascii_hexdigit());
        let known: BTreeSet<&str> = documents
            .iter()
            .filter_map(|document| document.commit.as_deref())
            .filter(|commit| commit != head && is_hash(commit))
            .collect();
        if known.is_empty() {
            return HashSet::new();
        }
        let list = |before: &[&str], after: &[&str]| -> Option<HashSet<String>> {
            let commits = known.iter().copied().take(MAX_COMMITS);
            let args: Vec<&str> =
                before.iter().copied().chain(commits).chain(after.iter().copied()).collect();
            let answer = String::from_utf8(git(&self.root, &args).ok()?).ok()?;
            Some(answer.lines().map(str::to_owned).collect())
        };
        let find = || {
            let shallow = git(&self.root, &["rev-parse", "--is-shallow-repository"]).ok()?;
            if shallow.trim_ascii() != b"false" {
                return None;
            }
            let here = list(&["rev-list", "--no-walk=unsorted", "--ignore-missing"], &[])?;
            let nowhere = list(&["rev-list", "--ignore-missing"], &["--not", "HEAD", "--all"])?;
            let looked_at = known.iter().take(MAX_COMMITS).map(|commit| (*commit).to_owned());
            Some(looked_at.filter(|commit| !here.contains(commit) || nowhere.contains(commit)).collect())
        };
        find().unwrap_or_default()
    }

    /// Where else documents of this repository's name come from: their origin, and how many they are.
    pub fn rival<'d>(&self, documents: &'d [IndexedDocument]) -> Option<(&'d str, usize)> {
        let others = documents.iter().filter_map(|document| document.origin.as_deref());
        let mut others = others.filter(|origin| !self.is_at(origin)).peekable();
        let first = *others.peek()?;
        Some((first, others.filter(|origin| *origin == first).count()))
    }

    /// Another name under which it is indexed, and how many documents are.
    pub fn known_as<'d>(&self, documents: &'d [IndexedDocument]) -> Option<(&'d str, usize)> {
        let mine =
            documents.iter().filter(|it| it.origin.as_deref().is_some_and(|origin| self.is_at(origin)));
        let mut names: BTreeMap<&str, usize> = BTreeMap::new();
        for name in mine.filter_map(|document| document.repo.as_deref()) {
            *names.entry(name).or_default() += 1;
        }
        names.into_iter().max_by_key(|(_, number)| *number)
    }

    /// Is it the repository of [`Self::rival`] all the same, with another remote by now? It is where documents of it
    /// were indexed from this folder and at least half of all its documents are here as they are indexed. Its folder
    /// alone says little: in containers many are mounted at one place. `in_scope`: sources that were looked for.
    pub fn has_moved(
        &self,
        documents: &[IndexedDocument],
        files: &[Candidate],
        in_scope: impl Fn(&str) -> bool,
    ) -> bool {
        let Some(folder) = place::folder(&self.origin) else { return false };
        let others = documents.iter().filter_map(|document| Some((document, document.origin.as_deref()?)));
        let others: Vec<_> = others.filter(|(_, origin)| !self.is_at(origin)).collect();
        let from_here: Vec<&str> = others
            .iter()
            .map(|(_, origin)| *origin)
            .filter(|origin| place::folder(origin) == Some(folder))
            .collect();
        if !others.iter().all(|(_, origin)| from_here.iter().any(|here| place::is_same(here, origin))) {
            return false;
        }
        let here: HashSet<(&str, &str)> =
            files.iter().map(|file| (file.source.as_str(), file.hash.as_str())).collect();
        let (mut all, mut same) = (0, 0);
        for (document, _) in others.into_iter().filter(|(document, _)| in_scope(&document.source)) {
            all += 1;
            same += usize::from(here.contains(&(document.source.as_str(), document.content_hash.as_str())));
        }
        same > 0 && 2 * same >= all
    }

    fn is_at(&self, origin: &str) -> bool {
        place::is_same(&self.origin, origin)
    }
}

/// A text as the name of a repository, if anything of it is left.
pub fn name_of(text: &str) -> Option<String> {
    let letter = |c: char| if c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-') { c } else { '-' };
    let name: String = text.chars().map(letter).take(128).collect();
    (!name.is_empty()).then_some(name)
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

/// Why git said nothing.
#[derive(Debug)]
enum Trouble {
    /// There is no such command.
    Missing,
    /// The folder belongs to another user, whose configuration could name programs to be run.
    NotOurs,
    /// What it complained of.
    Other(String),
}

impl Trouble {
    fn told(&self, root: &Path) -> String {
        let root = root.display();
        let why = match self {
            Self::Missing => "there is no `git` command here".to_owned(),
            Self::NotOurs => format!(
                "{root} belongs to another user, and git looks into it only once you have said that you trust it: \
                 `git config --global --add safe.directory {root}`"
            ),
            Self::Other(complaint) => format!("git cannot tell what has changed in {root} ({complaint})"),
        };
        format!("files are indexed without their commit, so nothing links to them: {why}")
    }
}

/// Runs git. Read-only, and without the programs that a stranger's repository may name in its configuration.
fn git(root: &Path, args: &[&str]) -> Result<Vec<u8>, Trouble> {
    let mut command = Command::new("git");
    // Of the repository whose hook runs us, if one does.
    for variable in ["GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR", "GIT_PREFIX"] {
        command.env_remove(variable);
    }
    // What is wrong with this one is not made good by another around it.
    if let Some(above) = root.parent() {
        command.env("GIT_CEILING_DIRECTORIES", above);
    }
    let output = command
        .args(["--no-optional-locks", "-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null", "-C"])
        .arg(root)
        .args(args)
        .env("LC_ALL", "C")
        // Nothing is fetched: what is not here is not known.
        .env("GIT_NO_LAZY_FETCH", "1")
        .stdin(Stdio::null())
        .output()
        .map_err(|_| Trouble::Missing)?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let complaint = String::from_utf8_lossy(&output.stderr);
    if complaint.contains("dubious ownership") || complaint.contains("unsafe repository") {
        return Err(Trouble::NotOurs);
    }
    let first: String = complaint.lines().next().unwrap_or_default().chars().take(300).collect();
    Err(Trouble::Other(if first.is_empty() { output.status.to_string() } else { first }))
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
        git(&root, &["config", "url.git@Example.org:.insteadOf", "ex:"]);
        for remote in [
            "ex:team/api",
            "https://example.org/team/api.git",
            "https://me:hunter2@Example.org/team/api",
            "git@example.org:team/api.git",
            "ssh://git@example.org/team/api/",
        ] {
            let origin = format!("example.org/team/api in {}", root.display());
            assert_eq!(origin_with(remote), origin, "{remote}");
            assert_eq!(Repository::cloned(&root).origin, "example.org/team/api");
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
        let document = |origin| indexed("a.md", origin);
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

    #[test]
    fn commits_that_are_in_no_history_any_more_are_gone() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("api");
        fs::create_dir(&root).unwrap();
        git(&root, &["init", "--quiet", "--initial-branch", "main"]);
        let commit = |file: &str, more: &[&str]| {
            fs::write(root.join(file), file).unwrap();
            git(&root, &["add", "."]);
            git(&root, &[&["commit", "--quiet", "-m", file], more].concat());
            Repository::around(&root).commit.unwrap()
        };
        let first = commit("a.md", &[]);
        let amended = commit("b.md", &[]);
        commit("b.md", &["--amend", "-m", "better"]);
        git(&root, &["checkout", "--quiet", "-b", "feature"]);
        let squashed = commit("c.md", &[]);
        git(&root, &["checkout", "--quiet", "main"]);
        git(&root, &["merge", "--quiet", "--squash", "feature"]);
        git(&root, &["commit", "--quiet", "-m", "squashed"]);
        let never = "0123456789abcdef0123456789abcdef01234567".to_owned();

        let documents: Vec<IndexedDocument> = [&first, &amended, &squashed, &never, &"v1.2".to_owned()]
            .into_iter()
            .map(|commit| IndexedDocument { commit: Some(commit.clone()), ..indexed("c.md", None) })
            .collect();
        let repository = Repository::around(&root);
        let gone = |repository: &Repository| repository.gone(&documents);
        assert_eq!(
            gone(&repository),
            HashSet::from([amended.clone(), never.clone()]),
            "a branch has the other"
        );
        git(&root, &["branch", "--quiet", "-D", "feature"]);
        assert_eq!(gone(&repository), HashSet::from([amended, squashed.clone(), never]));
        let is_indexed = |at: usize| {
            let known = IndexedDocument { origin: Some(repository.origin.clone()), ..documents[at].clone() };
            repository.is_indexed(&file("c.md", "1"), &known, &gone(&repository))
        };
        assert_eq!([0, 1, 2, 3, 4].map(is_indexed), [true, false, false, false, true]);
        git(&root, &["update-ref", "refs/remotes/origin/feature", &squashed]);
        assert!(!gone(&repository).contains(&squashed));

        git(
            dir.path(),
            &["clone", "--quiet", "--depth", "1", &format!("file://{}", root.display()), "shallow"],
        );
        let shallow = Repository::around(&dir.path().join("shallow"));
        assert_eq!((shallow.commit == repository.commit, gone(&shallow)), (true, HashSet::new()));
    }

    #[test]
    fn another_remote_in_the_same_folder_with_the_same_files_is_the_same_repository() {
        let documents = |origin: &str| -> Vec<IndexedDocument> {
            ["a", "b", "c", "d"].map(|source| indexed(source, Some(origin))).into()
        };
        let files = |hashes: [&str; 4]| -> Vec<Candidate> {
            ["a", "b", "c", "d"].into_iter().zip(hashes).map(|(source, hash)| file(source, hash)).collect()
        };
        let at = |origin: &str| Repository { origin: origin.to_owned(), ..Repository::default() };
        let as_indexed = files(["1"; 4]);
        let half = files(["1", "1", "2", "2"]);
        let new = at("example.org/new in /srv/api");
        for known in ["/srv/api", "example.org/old in /srv/api"] {
            let documents = documents(known);
            assert!(new.rival(&documents).is_some());
            assert!(new.has_moved(&documents, &half, |_| true), "{known}");
            assert!(!new.has_moved(&documents, &files(["1", "2", "2", "2"]), |_| true), "{known}");
            assert!(new.has_moved(&documents, &half[..1], |source| source == "a"), "a part was looked at");
        }
        for known in ["/srv/other/api", "example.org/old in /home/api", "example.org/old"] {
            assert!(!new.has_moved(&documents(known), &as_indexed, |_| true), "{known}");
        }
        assert!(at("/srv/api").has_moved(&documents("example.org/old in /srv/api"), &half, |_| true));
        // One of them is from elsewhere: its clone, or another repository.
        let mut documents = documents("example.org/old in /srv/api");
        documents[0].origin = Some("git.example.org/other in /srv/api/x".to_owned());
        assert!(!new.has_moved(&documents, &as_indexed, |_| true));
        documents[0].origin = Some("example.org/old in /home/api".to_owned());
        assert!(new.has_moved(&documents, &as_indexed, |_| true));
    }

    #[cfg(unix)]
    #[test]
    fn a_folder_of_another_user_is_told_and_known_by_its_remote() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        fs::write(root.join("a.md"), "a").unwrap();
        git(root, &["init", "--quiet"]);
        git(root, &["config", "remote.origin.url", "https://example.org/api"]);
        git(root, &["add", "."]);
        git(root, &["commit", "--quiet", "-m", "first"]);
        assert_eq!(Repository::around(root).trouble, None);
        // Only root may give files away.
        let Ok(()) = std::os::unix::fs::chown(root, Some(4711), None) else { return };
        std::os::unix::fs::chown(root.join(".git"), Some(4711), None).unwrap();
        let repository = Repository::around(root);
        assert_eq!(repository.address(), "example.org/api");
        assert_eq!(repository.commit_of("a.md"), None);
        let told = repository.trouble.unwrap();
        assert!(told.contains("another user") && told.contains("safe.directory"), "{told}");
    }

    fn indexed(source: &str, origin: Option<&str>) -> IndexedDocument {
        IndexedDocument {
            source: source.to_owned(),
            content_hash: "1".to_owned(),
            chunks: 1,
            commit: None,
            origin: origin.map(str::to_owned),
            repo: None,
        }
    }

    fn file(source: &str, hash: &str) -> Candidate {
        Candidate {
            path: source.into(),
            source: source.to_owned(),
            hash: hash.to_owned(),
            bytes: 1,
            encoding: None,
        }
    }
}
