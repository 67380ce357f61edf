//! The files that a document cites, as the commits that it names have them.
//!
//! What is looked up was written by others, so git is only asked for objects: nothing is checked out, no
//! program that a repository names is run, nothing is fetched, and no path leads out of a commit. One
//! `git cat-file --batch` answers for each repository.

use std::{
    collections::HashMap,
    fs,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    path::{Component, Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
};

use atlas_rag_gateway::source::decode::decode;
use atlas_worker::agent::judge::Source;

/// Longer files are not read.
const MAX_FILE_BYTES: u64 = 4 << 20;
/// Files that are kept for the next source of the same file.
const MAX_FILES: usize = 64;
/// How a file begins that stands for another one, which is not in the repository.
const LFS_POINTER: &[u8] = b"version https://git-lfs.github.com/spec/";
/// What git says about one object in a line: a longer answer is none.
const MAX_HEADER_BYTES: u64 = 16 << 10;

/// Why there are no lines.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Missing {
    /// The source is wrong: its commit has no such file, or the file no such lines.
    Wrong(String),
    /// Nobody can tell here.
    Unknown(String),
}

/// Repositories in which cited files are looked up.
pub(crate) struct History {
    repositories: Vec<Repository>,
}

struct Repository {
    folder: PathBuf,
    /// `None`: git does not answer for this folder.
    objects: Option<Objects>,
}

impl History {
    /// The repositories around these folders; one that is in none knows nothing.
    pub(crate) fn of(folders: &[PathBuf]) -> Self {
        let repositories = folders
            .iter()
            .map(|folder| Repository { folder: folder.clone(), objects: Objects::open(folder) });
        Self { repositories: repositories.collect() }
    }

    /// The lines of a source, as its commit has them.
    pub(crate) fn lines(&mut self, source: &Source) -> Result<String, Missing> {
        let Some(commit) = &source.commit else {
            return Err(Missing::Unknown("it names no commit".to_owned()));
        };
        if self.repositories.iter().all(|repository| repository.objects.is_none()) {
            return Err(Missing::Unknown("no git repository is at hand".to_owned()));
        }
        let found = self.repositories.iter_mut().find_map(|repository| {
            let objects = repository.objects.as_mut()?;
            objects.commit(commit).map(|commit| (&repository.folder, objects, commit))
        });
        let Some((folder, objects, full)) = found else {
            return Err(Missing::Unknown(format!("commit {} is not here", short(commit))));
        };
        let text = objects.file(folder, &full, &source.path)?;
        lines(&text, source).map_err(|why| Missing::Wrong(format!("{why} at {}", short(commit))))
    }

    /// The lines of a source as the file has them now.
    pub(crate) fn lines_now(&self, source: &Source) -> Option<String> {
        self.repositories.iter().find_map(|repository| {
            let folder = repository.folder.canonicalize().ok()?;
            // Sources are named relative to the repository; outside of one, to the folder.
            let root = folder.ancestors().find(|folder| folder.join(".git").exists()).unwrap_or(&folder);
            let path = root.join(&source.path).canonicalize().ok().filter(|path| path.starts_with(root))?;
            let meta = fs::metadata(&path).ok().filter(|meta| meta.is_file() && meta.len() <= MAX_FILE_BYTES);
            let text = decode(meta.and_then(|_| fs::read(path).ok())?).ok()?.text;
            lines(&text, source).ok()
        })
    }
}

fn short(commit: &str) -> &str {
    commit.get(..12).unwrap_or(commit)
}

/// The lines of a source. The error says what is wrong with the file.
fn lines(text: &str, source: &Source) -> Result<String, String> {
    let lines: Vec<&str> = text.lines().collect();
    match lines.get((source.start as usize).saturating_sub(1)..source.end as usize) {
        Some(cited) => Ok(cited.join("\n")),
        None => Err(match lines.len() {
            1 => "the file has only 1 line".to_owned(),
            count => format!("the file has only {count} lines"),
        }),
    }
}

/// A repository's objects.
struct Objects {
    git: Child,
    questions: ChildStdin,
    answers: BufReader<ChildStdout>,
    /// Full names of commits; `None`: not here.
    commits: HashMap<String, Option<String>>,
    /// By commit and path.
    files: HashMap<(String, String), Result<String, Missing>>,
}

/// What git says an object is.
enum Object {
    /// Its full name, its type, and its content where that is not too long.
    Is(String, String, Option<Vec<u8>>),
    /// There is none of this name.
    Missing,
}

impl Objects {
    /// `None` without git, and outside of repositories.
    fn open(folder: &Path) -> Option<Self> {
        let mut git = git(folder)
            .args(["cat-file", "--batch"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .ok()?;
        let (questions, answers) = (git.stdin.take()?, BufReader::new(git.stdout.take()?));
        let mut objects = Self { git, questions, answers, commits: HashMap::new(), files: HashMap::new() };
        // Where there is no repository git has ended without an answer to anything.
        objects.ask("HEAD").map(|_| objects)
    }

    /// `None`: git answers no more.
    fn ask(&mut self, name: &str) -> Option<Object> {
        if name.contains(['\n', '\0']) {
            return Some(Object::Missing);
        }
        writeln!(self.questions, "{name}").and_then(|()| self.questions.flush()).ok()?;
        let mut header = String::new();
        (&mut self.answers).take(MAX_HEADER_BYTES).read_line(&mut header).ok().filter(|read| *read > 0)?;
        let header = header.strip_suffix('\n')?;
        // `NAME missing`, `NAME ambiguous`: a name may have blanks, an object's has none.
        let words: Vec<&str> = header.split(' ').collect();
        let &[full, kind, size] = words.as_slice() else { return Some(Object::Missing) };
        let Ok(size) = size.parse::<u64>() else { return Some(Object::Missing) };
        let mut content = Vec::new();
        let mut all = (&mut self.answers).take(size + 1);
        if size <= MAX_FILE_BYTES {
            all.read_to_end(&mut content).ok()?;
            content.pop();
        } else {
            std::io::copy(&mut all, &mut std::io::sink()).ok()?;
        }
        let content = (size <= MAX_FILE_BYTES).then_some(content);
        Some(Object::Is(full.to_owned(), kind.to_owned(), content))
    }

    /// The full name of a commit, from its beginning.
    fn commit(&mut self, begin: &str) -> Option<String> {
        if let Some(known) = self.commits.get(begin) {
            return known.clone();
        }
        let found = match self.ask(&format!("{begin}^{{commit}}")) {
            // A branch may have this name too.
            Some(Object::Is(full, kind, _)) if kind == "commit" && full.starts_with(begin) => Some(full),
            _ => None,
        };
        self.commits.insert(begin.to_owned(), found.clone());
        found
    }

    /// The text of a file in a commit.
    fn file(&mut self, folder: &Path, commit: &str, path: &str) -> Result<String, Missing> {
        let key = (commit.to_owned(), path.to_owned());
        if let Some(known) = self.files.get(&key) {
            return known.clone();
        }
        let found = self.read(folder, commit, path);
        if self.files.len() >= MAX_FILES {
            self.files.clear();
        }
        self.files.insert(key, found.clone());
        found
    }

    fn read(&mut self, folder: &Path, commit: &str, path: &str) -> Result<String, Missing> {
        let wrong = |why: &str| Err(Missing::Wrong(format!("{why} at {}", short(commit))));
        let unknown = |why: &str| Err(Missing::Unknown(why.to_owned()));
        // Git reads `COMMIT:./PATH` relative to the folder.
        if !Path::new(path).components().all(|part| matches!(part, Component::Normal(_))) {
            return Err(Missing::Wrong("this is no path within a repository".to_owned()));
        }
        match self.ask(&format!("{commit}:{path}")) {
            None => unknown("git does not answer"),
            Some(Object::Missing) => match listed(folder, commit, path) {
                Some(Listed::No) => wrong("there is no such file"),
                // In a partial clone a file can be known and not here.
                Some(Listed::File) => unknown("this clone does not have the file's content"),
                Some(Listed::Elsewhere) => unknown("it is in a submodule"),
                None => unknown("this clone does not have the commit's list of files"),
            },
            Some(Object::Is(_, kind, _)) if kind != "blob" => wrong("this is no file"),
            Some(Object::Is(_, _, None)) => unknown("the file is too long"),
            Some(Object::Is(..)) if is_document(path) => unknown("pages of PDF and DOCX are not read"),
            Some(Object::Is(_, _, Some(content))) if content.starts_with(LFS_POINTER) => {
                unknown("the file is kept by Git LFS")
            }
            Some(Object::Is(_, _, Some(content))) => match decode(content) {
                Ok(decoded) => Ok(decoded.text),
                Err(_) => wrong("this is no text"),
            },
        }
    }
}

impl Drop for Objects {
    fn drop(&mut self) {
        // It only reads; nothing is lost with it.
        let _ = self.git.kill().and_then(|()| self.git.wait());
    }
}

/// The lines of these are what was taken out of them.
fn is_document(path: &str) -> bool {
    Path::new(path)
        .extension()
        .is_some_and(|end| ["pdf", "docx"].iter().any(|known| end.eq_ignore_ascii_case(known)))
}

/// What a commit's lists of files say of a path.
enum Listed {
    /// Nothing.
    No,
    /// It is there.
    File,
    /// It is below a submodule, which is another repository.
    Elsewhere,
}

/// Looks a path up in a commit's lists of files; `None`: nobody can tell here.
fn listed(folder: &Path, commit: &str, path: &str) -> Option<Listed> {
    let above = path.match_indices('/').map(|(end, _)| &path[..end]);
    let listed = git(folder)
        .args(["--literal-pathspecs", "ls-tree", "--full-tree", "-z", commit, "--", path])
        .args(above)
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()
        .ok()
        .filter(|listed| listed.status.success())?;
    let entries = String::from_utf8_lossy(&listed.stdout);
    // `MODE TYPE NAME<tab>PATH`; of a folder above also what else is in it.
    let mut found = Listed::No;
    for (what, at) in entries.split('\0').filter_map(|entry| entry.split_once('\t')) {
        let is_above = path.strip_prefix(at).is_some_and(|rest| rest.starts_with('/'));
        if what.contains(" commit ") && is_above {
            return Some(Listed::Elsewhere);
        }
        if at == path {
            found = Listed::File;
        }
    }
    Some(found)
}

/// Git in the repository around a folder, for looking only.
fn git(folder: &Path) -> Command {
    let mut git = Command::new("git");
    git.args(["--no-optional-locks", "--no-replace-objects", "-c", "core.fsmonitor=false"])
        .args(["-c", "core.hooksPath=/dev/null", "-C"])
        .arg(folder)
        .env("GIT_NO_LAZY_FETCH", "1")
        .env("GIT_TERMINAL_PROMPT", "0");
    // A hook that runs us has them set for its own repository.
    for name in ["GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY", "GIT_PREFIX"] {
        git.env_remove(name);
    }
    git
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use atlas_test_support::git;

    use super::*;

    fn source(path: &str, start: u32, end: u32, commit: Option<&str>) -> Source {
        Source { n: 1, path: path.to_owned(), start, end, commit: commit.map(str::to_owned) }
    }

    fn head(folder: &Path) -> String {
        let said = super::git(folder).args(["rev-parse", "HEAD"]).output().unwrap();
        String::from_utf8(said.stdout).unwrap().trim().to_owned()
    }

    /// A repository with two commits of `docs/a.md`, and a file that is not committed.
    fn repository() -> (tempfile::TempDir, [String; 2]) {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        fs::create_dir_all(root.join("docs")).unwrap();
        git(&root, &["init", "--quiet"]);
        let commits = ["one\ntwo\r\nthree\n", "uno\n"].map(|text| {
            fs::write(root.join("docs/a.md"), text).unwrap();
            fs::write(root.join("picture.png"), [0, 1, 2]).unwrap();
            fs::write(root.join("plan.PDF"), "%PDF").unwrap();
            fs::write(root.join("large.md"), "version https://git-lfs.github.com/spec/v1\nsize 9\n").unwrap();
            git(&root, &["add", "."]);
            let of_another = "160000,0123456789012345678901234567890123456789,lib/other";
            git(&root, &["update-index", "--add", "--cacheinfo", of_another]);
            git(&root, &["commit", "--quiet", "-m", "next"]);
            head(&root)
        });
        fs::write(root.join("docs/new.md"), "new\nlines\n").unwrap();
        fs::write(dir.path().join("outside.md"), "secret\n").unwrap();
        (dir, commits)
    }

    #[test]
    fn lines_are_those_of_the_commit_that_is_named() {
        let (dir, [first, second]) = repository();
        for folder in ["root", "root/docs"] {
            let mut history = History::of(&[dir.path().join(folder)]);
            let mut lines =
                |path: &str, start, end, commit: &str| history.lines(&source(path, start, end, Some(commit)));
            let wrong = |why: &str, commit: &str| Err(Missing::Wrong(format!("{why} at {}", short(commit))));
            assert_eq!(lines("docs/a.md", 2, 3, &first[..12]), Ok("two\nthree".to_owned()));
            assert_eq!(lines("docs/a.md", 1, 1, &second), Ok("uno".to_owned()));
            assert_eq!(lines("docs/a.md", 1, 2, &second), wrong("the file has only 1 line", &second));
            assert_eq!(lines("docs/a.md", 3, 9, &first), wrong("the file has only 3 lines", &first));
            assert_eq!(lines("docs/new.md", 1, 1, &second), wrong("there is no such file", &second));
            assert_eq!(lines("docs/b c.md", 1, 1, &second), wrong("there is no such file", &second));
            assert_eq!(lines("docs", 1, 1, &second), wrong("this is no file", &second));
            assert_eq!(lines("picture.png", 1, 1, &second), wrong("this is no text", &second));
            let no_path = Err(Missing::Wrong("this is no path within a repository".to_owned()));
            for path in ["../outside.md", "./docs/a.md", "/etc/passwd", "docs/../docs/a.md"] {
                assert_eq!(lines(path, 1, 1, &second), no_path, "{path}");
            }
            let unknown = |why: &str| Err(Missing::Unknown(why.to_owned()));
            assert_eq!(lines("plan.PDF", 1, 1, &second), unknown("pages of PDF and DOCX are not read"));
            assert_eq!(lines("large.md", 7, 9, &second), unknown("the file is kept by Git LFS"));
            assert_eq!(lines("lib/other/a.md", 1, 1, &second), unknown("it is in a submodule"));
            assert_eq!(lines("lib/a.md", 1, 1, &second), wrong("there is no such file", &second));
            assert_eq!(lines("docs/a.md", 1, 1, "0123456789ab"), unknown("commit 0123456789ab is not here"));
            assert_eq!(history.lines(&source("docs/a.md", 1, 1, None)), unknown("it names no commit"));
        }
    }

    #[test]
    fn a_commit_is_found_in_any_of_the_repositories_and_nowhere_else() {
        let ((one, [first, _]), other) = (repository(), tempfile::tempdir().unwrap());
        let root = one.path().join("root");
        // A name is no commit.
        git(&root, &["branch", "abcdef012345"]);
        let asked = source("docs/a.md", 1, 1, Some(&first));
        let mut both = History::of(&[other.path().to_owned(), root.clone()]);
        assert_eq!(both.lines(&asked), Ok("one".to_owned()));
        let named = source("docs/a.md", 1, 1, Some("abcdef012345"));
        assert!(matches!(both.lines(&named), Err(Missing::Unknown(_))));
        let mut nowhere = History::of(&[other.path().to_owned(), other.path().join("gone")]);
        let why = Missing::Unknown("no git repository is at hand".to_owned());
        assert_eq!(nowhere.lines(&asked), Err(why));
    }

    #[test]
    fn only_cited_lines_within_the_root_are_read_of_files_as_they_are_now() {
        let (dir, _) = repository();
        let now = |folder: &str, path: &str, start, end| {
            History::of(&[dir.path().join(folder)]).lines_now(&source(path, start, end, None))
        };
        assert_eq!(now("root/docs", "docs/new.md", 2, 2).as_deref(), Some("lines"));
        assert_eq!(now("root", "docs/new.md", 2, 3), None);
        assert_eq!(now("root", "../outside.md", 1, 1), None);
        assert_eq!(now("root", "gone.md", 1, 1), None);
        assert_eq!(now("root", "docs", 1, 1), None);
    }
}
