//! Which files of a folder are worth indexing, and why the others are not.
//!
//! `.gitignore` and `.atlasignore` are obeyed (also outside a git repository); what they hide is not
//! even reported. Everything else that is left out is reported with a [`Skip`]. Files that look like
//! secrets never leave this module: neither their text nor the secret is in any result.

use std::{
    fs::{self, File},
    io::Read as _,
    num::NonZeroUsize,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, mpsc},
    thread,
    time::SystemTime,
};

use atlas_shared::{
    gateway_api::{content_hash, source_fault},
    secrets,
};
use globset::{GlobBuilder, GlobSet, GlobSetBuilder};
use ignore::WalkBuilder;
use serde::{Deserialize, Serialize};

use super::{
    decode::{Decoded, decode},
    extract,
    seen::{Decision, Seen, Stat},
};

/// Larger files are data, not prose or code.
pub const DEFAULT_MAX_FILE_BYTES: u64 = 1024 * 1024;

/// Lines longer than this on average are written by machines.
const MINIFIED_AVERAGE_LINE: usize = 400;

/// Threads that read files, however many cores there are.
const MAX_READERS: usize = 8;

/// Fewer files are not worth a thread of their own.
const FILES_A_READER: usize = 32;

/// The source of a [`Skipped`] whose name is not known: a folder could not be listed.
pub const UNKNOWN: &str = "?";

/// A file to index.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Where it is.
    pub path: PathBuf,
    /// Its name in the index: the path below the root, with `/`.
    pub source: String,
    /// [`content_hash`] of its text.
    pub hash: String,
    /// Its size, in UTF-8.
    pub bytes: u64,
    /// The encoding that its text was in; `None` for UTF-8 and for documents such as PDF.
    pub encoding: Option<&'static str>,
}

/// A file that is left out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Skipped {
    /// Its name, as for [`Candidate::source`].
    pub source: String,
    /// Why.
    pub reason: Skip,
    /// More about it, for `--verbose`; never the secret itself.
    pub detail: Option<String>,
}

/// Why a file is left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Skip {
    /// It looks like a secret, or holds one.
    Secret,
    /// Not text.
    Binary,
    /// Versions of dependencies, written by a package manager.
    LockFile,
    /// Minified code, source maps.
    Minified,
    /// Says that a program wrote it.
    Generated,
    /// Larger than the limit.
    TooLarge,
    /// Nothing in it.
    Empty,
    /// A symbolic link: its target is indexed where it is.
    Link,
    /// A PDF or DOCX file whose text cannot be had.
    NoText,
    /// The system did not let us read it.
    Unreadable,
    /// Its name cannot be that of a document.
    BadName,
}

impl Skip {
    /// For the summary.
    pub fn describe(self) -> &'static str {
        match self {
            Self::Secret => "looks like a secret",
            Self::Binary => "binary",
            Self::LockFile => "lock file",
            Self::Minified => "minified",
            Self::Generated => "generated",
            Self::TooLarge => "too large",
            Self::Empty => "empty",
            Self::Link => "symbolic link",
            Self::NoText => "no text to be had",
            Self::Unreadable => "not readable",
            Self::BadName => "name cannot be indexed",
        }
    }
}

/// What to look at.
#[derive(Clone, Debug)]
pub struct WalkOptions {
    /// Sources are named relative to this folder.
    pub root: PathBuf,
    /// The folder or file to look at: the root, or below it.
    pub start: PathBuf,
    /// Only sources that match; empty: all.
    pub include: GlobSet,
    /// Not sources that match.
    pub exclude: GlobSet,
    /// Sources that are indexed although they look like secrets.
    pub not_secret: GlobSet,
    /// Larger files are skipped.
    pub max_file_bytes: u64,
    /// A folder that is never looked into: our own data.
    pub data_dir: Option<PathBuf>,
    /// What was decided before about files that are as they were then; `None`: every file is read.
    pub seen: Option<Arc<Seen>>,
}

impl WalkOptions {
    /// Everything below `root`.
    pub fn of(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
            start: root.to_owned(),
            include: GlobSet::empty(),
            exclude: GlobSet::empty(),
            not_secret: GlobSet::empty(),
            max_file_bytes: DEFAULT_MAX_FILE_BYTES,
            data_dir: None,
            seen: None,
        }
    }

    /// True where every file of the root is looked at.
    fn selects_all(&self) -> bool {
        self.start == self.root && self.include.is_empty() && self.exclude.is_empty()
    }

    /// True for sources that `--include` and `--exclude` leave in.
    pub fn selects(&self, source: &str) -> bool {
        (self.include.is_empty() || self.include.is_match(source)) && !self.exclude.is_match(source)
    }
}

/// A pattern that is no glob.
#[derive(Debug, thiserror::Error)]
#[error("{pattern:?} is not a glob: {problem}")]
pub struct GlobFault {
    /// The pattern.
    pub pattern: String,
    /// What is wrong with it.
    pub problem: String,
}

/// A set of globs. As in `.gitignore`, `*.md` means Markdown files at any depth, `docs/` and `src` all below folders of
/// that name, and `/README.md` only the one at the top.
pub fn globs(patterns: &[String]) -> Result<GlobSet, GlobFault> {
    let mut set = GlobSetBuilder::new();
    for pattern in patterns {
        let fault =
            |error: globset::Error| GlobFault { pattern: pattern.clone(), problem: error.kind().to_string() };
        let named = pattern.trim_start_matches("./").trim_end_matches('/');
        let place = match named.strip_prefix('/') {
            Some(anchored) => anchored.to_owned(),
            None if named.contains('/') => named.to_owned(),
            None => format!("**/{named}"),
        };
        let below = format!("{place}/**");
        // What callers name themselves may begin with a slash. `docs/` is no file.
        let alternatives =
            if pattern.ends_with('/') { vec![below] } else { vec![place, below, pattern.clone()] };
        for alternative in alternatives {
            set.add(GlobBuilder::new(&alternative).literal_separator(true).build().map_err(fault)?);
        }
    }
    set.build().map_err(|error| GlobFault { pattern: patterns.join(", "), problem: error.to_string() })
}

/// What a walk found.
#[derive(Clone, Debug, Default)]
pub struct Walked {
    /// To index, by source.
    pub files: Vec<Candidate>,
    /// Left out, by source.
    pub skipped: Vec<Skipped>,
}

/// Reads the folder. Blocking. `seen` is told the number of files so far.
pub fn walk(options: &WalkOptions, mut seen: impl FnMut(usize)) -> Walked {
    let mut walked = Walked::default();
    let mut found = Vec::new();
    let data_dir = options.data_dir.as_deref().and_then(|dir| dir.canonicalize().ok());
    let entries = WalkBuilder::new(&options.start)
        // `.github/` and the like are worth reading; what must not be read is skipped by name.
        .hidden(false)
        .require_git(false)
        .add_custom_ignore_filename(".atlasignore")
        .filter_entry(move |entry| {
            let name = entry.file_name();
            let folder = entry.file_type().is_some_and(|kind| kind.is_dir());
            // `.git` is a file in a worktree.
            if name == ".git" || (folder && (name == ".hg" || name == ".svn" || name == ".atlas")) {
                return false;
            }
            !(folder
                && data_dir.as_deref().is_some_and(|dir| {
                    Some(name) == dir.file_name() && entry.path().canonicalize().is_ok_and(|path| path == dir)
                }))
        })
        .build();
    for entry in entries {
        let entry = match entry {
            Ok(entry) => entry,
            Err(error) => {
                walked.skipped.push(Skipped {
                    source: UNKNOWN.to_owned(),
                    reason: Skip::Unreadable,
                    detail: Some(error.to_string()),
                });
                continue;
            }
        };
        let Some(kind) = entry.file_type() else { continue };
        if kind.is_dir() {
            continue;
        }
        let Some(source) = source_name(&options.root, entry.path()) else {
            walked.skipped.push(Skipped {
                source: entry.path().display().to_string(),
                reason: Skip::BadName,
                detail: Some("it is not UTF-8".to_owned()),
            });
            continue;
        };
        if let Some(fault) = source_fault(&source) {
            // Shown to somebody.
            let source = source.escape_debug().to_string();
            walked.skipped.push(Skipped {
                source,
                reason: Skip::BadName,
                detail: Some(format!("it {fault}")),
            });
            continue;
        }
        if !options.selects(&source) {
            continue;
        }
        if kind.is_symlink() {
            walked.skipped.push(Skipped { source, reason: Skip::Link, detail: None });
            continue;
        }
        if !kind.is_file() {
            // Sockets, pipes, devices: reading one could block for ever.
            continue;
        }
        found.push((entry.into_path(), source));
    }
    let skipped = walked.skipped.len();
    judge(found, options, |verdict| {
        match verdict {
            Ok(file) => walked.files.push(file),
            Err(skip) => walked.skipped.push(skip),
        }
        seen(walked.files.len() + walked.skipped.len() - skipped);
    });
    walked.files.sort_by(|a, b| a.source.cmp(&b.source));
    walked.skipped.sort_by(|a, b| a.source.cmp(&b.source));
    if let Some(seen) = options.seen.as_ref().filter(|_| options.selects_all()) {
        let files = walked.files.iter().map(|file| file.source.as_str());
        seen.retain(&files.chain(walked.skipped.iter().map(|file| file.source.as_str())).collect());
    }
    walked
}

/// Reads files on all cores and tells the verdict of each, in any order.
fn judge(
    files: Vec<(PathBuf, String)>,
    options: &WalkOptions,
    mut told: impl FnMut(std::result::Result<Candidate, Skipped>),
) {
    let cores = thread::available_parallelism().map_or(1, NonZeroUsize::get);
    let readers = cores.min(MAX_READERS).min(files.len() / FILES_A_READER).max(1);
    let one = |(path, source)| judge_file(path, source, options);
    if readers == 1 {
        return files.into_iter().map(one).for_each(told);
    }
    let left = Mutex::new(files.into_iter());
    let next = || left.lock().unwrap_or_else(PoisonError::into_inner).next();
    let (verdicts, all) = mpsc::sync_channel(FILES_A_READER);
    thread::scope(|scope| {
        for _ in 0..readers {
            let verdicts = verdicts.clone();
            scope.spawn(move || {
                while let Some(file) = next() {
                    if verdicts.send(one(file)).is_err() {
                        return;
                    }
                }
            });
        }
        drop(verdicts);
        all.into_iter().for_each(&mut told);
    });
}

/// The name of a file in the index; `None` where it is not UTF-8.
pub fn source_name(root: &Path, path: &Path) -> Option<String> {
    let below = path.strip_prefix(root).unwrap_or(path);
    let parts: Option<Vec<&str>> = below.components().map(|part| part.as_os_str().to_str()).collect();
    parts.map(|parts| parts.join("/"))
}

/// Why a file is left out, and more about it.
type Verdict = (Skip, Option<String>);

/// Decides about one file, and reads it unless it is as it was when it was read before.
fn judge_file(
    path: PathBuf,
    source: String,
    options: &WalkOptions,
) -> std::result::Result<Candidate, Skipped> {
    let decided = judge_name(&source, options).and_then(|()| {
        let known = options.seen.as_ref().and_then(|seen| {
            let stat = Stat::of(&fs::symlink_metadata(&path).ok()?)?;
            seen.decision(&source, &stat, options.not_secret.is_match(&source))
        });
        match known {
            Some(Decision::Index { hash, bytes, encoding }) => {
                Ok((hash, bytes, Decision::static_encoding(encoding.as_deref())))
            }
            Some(Decision::Skip { reason, detail }) => Err((reason, detail)),
            None => read_and_judge(&path, &source, None, options)
                .map(|(Decoded { text, from }, hash)| (hash, text.len() as u64, from)),
        }
    });
    match decided {
        Ok((hash, bytes, encoding)) => Ok(Candidate { path, source, hash, bytes, encoding }),
        Err((reason, detail)) => Err(Skipped { source, reason, detail }),
    }
}

/// Reads a file that a walk with the same options found, and decides again if it has changed since. The text that
/// comes out is what is indexed, byte for byte.
pub fn read_again(file: &Candidate, options: &WalkOptions) -> std::result::Result<String, Verdict> {
    judge_name(&file.source, options)?;
    let (Decoded { text, .. }, _) = read_and_judge(&file.path, &file.source, Some(&file.hash), options)?;
    Ok(text)
}

/// Reads a file, decides by its text unless a text of this hash was judged before, and remembers what was decided.
/// The text and its hash.
fn read_and_judge(
    path: &Path,
    source: &str,
    judged: Option<&str>,
    options: &WalkOptions,
) -> std::result::Result<(Decoded, String), Verdict> {
    let before = SystemTime::now();
    let mut stat = None;
    let decided = text_of(path, source, options, &mut stat).and_then(|decoded| {
        let hash = content_hash(&decoded.text);
        if judged != Some(&hash) {
            judge_text(source, &decoded.text, options)?;
        }
        Ok((decoded, hash))
    });
    if let Some(seen) = &options.seen {
        let decision = match &decided {
            Ok((Decoded { text, from }, hash)) => Decision::Index {
                hash: hash.clone(),
                bytes: text.len() as u64,
                encoding: from.map(str::to_owned),
            },
            Err((reason, detail)) => Decision::Skip { reason: *reason, detail: detail.clone() },
        };
        seen.learn((path, source), stat, before, options.not_secret.is_match(source), decision);
    }
    decided
}

fn judge_name(source: &str, options: &WalkOptions) -> std::result::Result<(), Verdict> {
    let name = file_name(source);
    if !options.not_secret.is_match(source) && is_secret_name(name) {
        return Err((Skip::Secret, Some("by its name".to_owned())));
    }
    if is_lock_file(name) {
        return Err((Skip::LockFile, None));
    }
    if is_minified_name(name) {
        return Err((Skip::Minified, None));
    }
    Ok(())
}

/// The text of a file. `stat` is what the file was before anything of it was read.
fn text_of(
    path: &Path,
    source: &str,
    options: &WalkOptions,
    stat: &mut Option<Stat>,
) -> std::result::Result<Decoded, Verdict> {
    let unreadable = |error: std::io::Error| (Skip::Unreadable, Some(error.to_string()));
    let format = extract::Format::of(file_name(source));
    // Documents carry fonts and pictures besides their text.
    let limit = match format {
        Some(_) => options.max_file_bytes.max(extract::MAX_FILE_BYTES),
        None => options.max_file_bytes,
    };
    let file = File::open(path).map_err(unreadable)?;
    let metadata = file.metadata().map_err(unreadable)?;
    *stat = Stat::of(&metadata);
    let size = metadata.len();
    if size > limit {
        return Err((Skip::TooLarge, Some(format!("{} KiB", size.div_ceil(1024)))));
    }
    // Bounded even when the file grows while it is read.
    let mut data = Vec::with_capacity(usize::try_from(size).unwrap_or_default());
    file.take(limit + 1).read_to_end(&mut data).map_err(unreadable)?;
    if data.len() as u64 > limit {
        return Err((Skip::TooLarge, Some("it grows".to_owned())));
    }
    match format {
        Some(format) => extract::text(format, data)
            .map(|text| Decoded { text, from: None })
            .map_err(|why| (Skip::NoText, Some(why))),
        None => decode(data).map_err(|why| (Skip::Binary, why)),
    }
}

fn judge_text(source: &str, text: &str, options: &WalkOptions) -> std::result::Result<(), Verdict> {
    if text.trim().is_empty() {
        return Err((Skip::Empty, None));
    }
    if !options.not_secret.is_match(source)
        && let Some((what, line)) = secrets::find(text)
    {
        return Err((Skip::Secret, Some(format!("{what} in line {line}"))));
    }
    if says_it_is_generated(text) {
        return Err((Skip::Generated, None));
    }
    if is_minified_text(file_name(source), text) {
        return Err((Skip::Minified, None));
    }
    Ok(())
}

fn file_name(source: &str) -> &str {
    source.rsplit('/').next().unwrap_or(source)
}

fn is_secret_name(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    let template =
        [".example", ".sample", ".template", ".dist", ".tmpl"].iter().any(|end| name.ends_with(end));
    let env = name == ".env" || name.starts_with(".env.") || has_extension(&name, &["env"]);
    (env && !template)
        || matches!(
            name.as_str(),
            ".netrc"
                | "_netrc"
                | ".pgpass"
                | ".my.cnf"
                | ".pypirc"
                | ".git-credentials"
                | ".htpasswd"
                | ".dockercfg"
                | ".npmrc"
                | ".vault-token"
                | "credentials"
                | "credentials.json"
                | "client_secret.json"
                | "application_default_credentials.json"
                | "kubeconfig"
                | "terraform.tfstate"
                | "terraform.tfstate.backup"
        )
        || ["id_rsa", "id_dsa", "id_ecdsa", "id_ed25519"].contains(&name.as_str())
        || (name.starts_with("service-account") || name.starts_with("service_account"))
            && has_extension(&name, &["json"])
        || has_extension(
            &name,
            &[
                "pem", "key", "p12", "pfx", "p8", "jks", "keystore", "kdbx", "ppk", "tfvars", "tfstate",
                "ovpn", "agekey",
            ],
        )
}

fn has_extension(name: &str, extensions: &[&str]) -> bool {
    name.rsplit_once('.').is_some_and(|(_, end)| extensions.contains(&end))
}

fn is_lock_file(name: &str) -> bool {
    matches!(
        name,
        "Cargo.lock"
            | "package-lock.json"
            | "npm-shrinkwrap.json"
            | "yarn.lock"
            | "pnpm-lock.yaml"
            | "bun.lock"
            | "bun.lockb"
            | "deno.lock"
            | "poetry.lock"
            | "Pipfile.lock"
            | "pdm.lock"
            | "uv.lock"
            | "Gemfile.lock"
            | "composer.lock"
            | "go.sum"
            | "go.work.sum"
            | "flake.lock"
            | "mix.lock"
            | "pubspec.lock"
            | "Podfile.lock"
            | "Package.resolved"
            | "packages.lock.json"
            | "gradle.lockfile"
            | "conan.lock"
            | "MODULE.bazel.lock"
            | ".terraform.lock.hcl"
    )
}

fn is_minified_name(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    [".min.js", ".min.css", ".min.mjs", ".js.map", ".css.map", ".mjs.map", ".bundle.js", ".chunk.js"]
        .iter()
        .any(|end| name.ends_with(end))
}

/// Code whose lines no person would write. Prose is exempt: a paragraph may be one long line.
fn is_minified_text(name: &str, text: &str) -> bool {
    let code = has_extension(
        &name.to_ascii_lowercase(),
        &["js", "mjs", "cjs", "css", "html", "htm", "svg", "json", "xml", "ts", "jsonl"],
    );
    code && text.len() > 4096 && text.len() / text.lines().count().max(1) > MINIFIED_AVERAGE_LINE
}

/// The usual marks, in a comment at the very top (golang.org/s/generatedcode, `@generated` of
/// Phabricator). A document that only talks about them further down is left alone.
fn says_it_is_generated(text: &str) -> bool {
    text.lines().take(5).any(|line| {
        let line = line.trim_start();
        let comment = ["//", "#", "/*", "*", "--", "<!--", ";", "%", "\"\"\""]
            .iter()
            .any(|mark| line.starts_with(mark));
        comment
            && (line.contains("@generated")
                || (line.contains("DO NOT EDIT") && line.to_ascii_lowercase().contains("generated")))
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use std::fs;

    use super::*;

    /// A folder with files, deleted at the end.
    struct Tree(tempfile::TempDir);

    impl Tree {
        fn with(files: &[(&str, &str)]) -> Self {
            let tree = Self(tempfile::tempdir().unwrap());
            for (name, text) in files {
                let path = tree.0.path().join(name);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, text).unwrap();
            }
            tree
        }

        fn walk(&self) -> Walked {
            walk(&WalkOptions::of(self.0.path()), |_| {})
        }
    }

    fn sources(walked: &Walked) -> Vec<&str> {
        walked.files.iter().map(|file| file.source.as_str()).collect()
    }

    fn skipped(walked: &Walked) -> Vec<(&str, Skip)> {
        walked.skipped.iter().map(|skipped| (skipped.source.as_str(), skipped.reason)).collect()
    }

    #[test]
    fn ignore_files_are_obeyed_without_git_and_hidden_folders_are_read() {
        let tree = Tree::with(&[
            (".gitignore", "target/\n"),
            (".atlasignore", "notes/\n"),
            ("target/out.txt", "built"),
            ("notes/private.md", "mine"),
            (".github/workflows/ci.yml", "on: push"),
            (".git/config", "[core]"),
            (".atlas/dev.lock", "{}"),
            ("src/main.rs", "fn main() {}"),
        ]);
        let walked = tree.walk();
        assert_eq!(
            sources(&walked),
            [".atlasignore", ".github/workflows/ci.yml", ".gitignore", "src/main.rs"]
        );
        assert_eq!(walked.skipped, []);
    }

    #[test]
    fn what_is_not_worth_reading_is_skipped_with_its_reason() {
        let minified = "a=1;".repeat(3000);
        let tree = Tree::with(&[
            ("Cargo.lock", "[[package]]"),
            ("app.min.js", "x"),
            ("bundle/app.js", &minified),
            ("prose.md", &"a long paragraph ".repeat(1000)),
            ("empty.txt", " \n\n"),
            ("image.png", "\u{0}PNG"),
            ("api.pb.go", "// Code generated by protoc-gen-go. DO NOT EDIT.\npackage api"),
            ("about.md", "We mark files with `@generated`.\n"),
        ]);
        let walked = tree.walk();
        assert_eq!(sources(&walked), ["about.md", "prose.md"]);
        assert_eq!(
            skipped(&walked),
            [
                ("Cargo.lock", Skip::LockFile),
                ("api.pb.go", Skip::Generated),
                ("app.min.js", Skip::Minified),
                ("bundle/app.js", Skip::Minified),
                ("empty.txt", Skip::Empty),
                ("image.png", Skip::Binary),
            ]
        );
    }

    #[test]
    fn secrets_are_skipped_by_name_and_by_content_and_never_quoted() {
        // Put together here, so that this file is not one that it warns of.
        let aws = format!("AKIA{}", "ABCDEFGHIJKLMNOP");
        let openai = format!("sk-{}", "a1b2c3d4e5".repeat(4));
        let key = format!("-----BEGIN RSA {}-----\nMIIEowIBAAKCAQEA1234567890\n", "PRIVATE KEY");
        let tree = Tree::with(&[
            (".env", "OPENAI_API_KEY=x"),
            (".env.production", "A=b"),
            (".env.example", "OPENAI_API_KEY="),
            ("deploy/tls.key", "x"),
            ("id_ed25519", "x"),
            ("notes.md", &format!("one\ntwo {aws}\n")),
            ("config.py", &format!("KEY = '{openai}'\n")),
            ("README.md", "Keep your password and `sk-...` key secret. -----BEGIN PRIVATE KEY-----"),
            ("server.txt", &key),
        ]);
        let walked = tree.walk();
        assert_eq!(sources(&walked), [".env.example", "README.md"]);
        let details: Vec<_> =
            walked.skipped.iter().map(|s| (s.source.as_str(), s.detail.as_deref().unwrap())).collect();
        assert!(walked.skipped.iter().all(|skipped| skipped.reason == Skip::Secret), "{details:?}");
        assert_eq!(
            details,
            [
                (".env", "by its name"),
                (".env.production", "by its name"),
                ("config.py", "an API key in line 1"),
                ("deploy/tls.key", "by its name"),
                ("id_ed25519", "by its name"),
                ("notes.md", "an AWS access key in line 2"),
                ("server.txt", "a private key in line 1"),
            ]
        );
    }

    #[test]
    fn a_file_that_changed_since_the_walk_is_judged_anew() {
        let tree = Tree::with(&[("a.txt", "harmless"), ("b.txt", "as it was")]);
        let options = WalkOptions::of(tree.0.path());
        let files = tree.walk().files;
        fs::write(&files[0].path, format!("AKIA{}", "ABCDEFGHIJKLMNOP")).unwrap();
        assert_eq!(read_again(&files[0], &options).unwrap_err().0, Skip::Secret);
        assert_eq!(read_again(&files[1], &options).unwrap(), "as it was");
    }

    #[test]
    fn many_files_are_read_as_few_are() {
        let names: Vec<(String, String)> =
            (0..300).map(|n| (format!("d{}/f{n:03}.txt", n % 7), format!("text {n}"))).collect();
        let files: Vec<(&str, &str)> =
            names.iter().map(|(name, text)| (name.as_str(), text.as_str())).collect();
        let tree = Tree::with(&files);
        let mut counts = Vec::new();
        let walked = walk(&WalkOptions::of(tree.0.path()), |seen| counts.push(seen));
        assert_eq!(counts, (1..=300).collect::<Vec<_>>());
        let mut expected: Vec<&str> = files.iter().map(|(name, _)| *name).collect();
        expected.sort_unstable();
        assert_eq!(sources(&walked), expected);
        for file in &walked.files {
            assert_eq!(file.hash, content_hash(&fs::read_to_string(&file.path).unwrap()));
        }
    }

    #[test]
    fn text_in_other_encodings_is_read_and_its_secrets_are_found() {
        let tree = Tree::with(&[("utf-8.txt", "Größe")]);
        let path = |name: &str| tree.0.path().join(name);
        let utf_16 = |text: &str| -> Vec<u8> {
            "\u{feff}".encode_utf16().chain(text.encode_utf16()).flat_map(u16::to_le_bytes).collect()
        };
        fs::write(path("latin-1.txt"), b"eins\nGr\xf6\xdfe\n").unwrap();
        fs::write(path("utf-16.txt"), utf_16("eins\r\nGröße\r\n")).unwrap();
        fs::write(path("secret.txt"), utf_16(&format!("eins\nAKIA{}\n", "ABCDEFGHIJKLMNOP"))).unwrap();
        let walked = tree.walk();
        let found: Vec<_> = walked.files.iter().map(|file| (file.source.as_str(), file.encoding)).collect();
        assert_eq!(
            found,
            [("latin-1.txt", Some("windows-1252")), ("utf-16.txt", Some("UTF-16LE")), ("utf-8.txt", None)]
        );
        assert_eq!(skipped(&walked), [("secret.txt", Skip::Secret)]);
        assert_eq!(walked.skipped[0].detail.as_deref(), Some("an AWS access key in line 2"));
        let options = WalkOptions::of(tree.0.path());
        assert_eq!(read_again(&walked.files[0], &options).unwrap(), "eins\nGröße\n");
        assert_eq!(read_again(&walked.files[1], &options).unwrap(), "eins\r\nGröße\r\n");
        let again = tree.walk().files;
        assert_eq!(again, walked.files, "unchanged files stay so");
        assert_eq!(again[0].hash, content_hash("eins\nGröße\n"));
    }

    #[test]
    fn globs_choose_and_a_false_alarm_can_be_overruled() {
        let tree = Tree::with(&[
            ("docs/a.md", "a"),
            ("docs/deep/b.md", "b"),
            ("src/c.rs", "c"),
            ("src/d.md", "d"),
            ("fixtures/test.key", "not a key"),
        ]);
        let mut options = WalkOptions::of(tree.0.path());
        options.include = globs(&["*.md".to_owned(), "fixtures/".to_owned()]).unwrap();
        options.exclude = globs(&["./docs/deep/**".to_owned()]).unwrap();
        options.not_secret = globs(&["fixtures/**".to_owned()]).unwrap();
        let walked = walk(&options, |_| {});
        assert_eq!(sources(&walked), ["docs/a.md", "fixtures/test.key", "src/d.md"]);
        assert!(globs(&["[".to_owned()]).unwrap_err().to_string().contains("\"[\""));
    }

    #[test]
    fn globs_mean_what_they_do_in_gitignore() {
        let matches = |pattern: &str, source: &str| globs(&[pattern.to_owned()]).unwrap().is_match(source);
        for (pattern, source) in [
            ("*.md", "docs/deep/a.md"),
            ("src", "src/a.rs"),
            ("src", "crates/one/src/a.rs"),
            ("node_modules", "node_modules/x/index.js"),
            ("docs/", "docs/a.md"),
            ("./docs/*.md", "docs/a.md"),
            ("/README.md", "README.md"),
            ("docs/**", "docs/deep/a.md"),
            ("/srv/**", "/srv/a.md"),
        ] {
            assert!(matches(pattern, source), "{pattern} {source}");
        }
        for (pattern, source) in [
            ("/README.md", "docs/README.md"),
            ("docs/*.md", "docs/deep/a.md"),
            ("docs/", "docs"),
            ("src", "srcs/a.rs"),
        ] {
            assert!(!matches(pattern, source), "{pattern} {source}");
        }
    }

    #[test]
    fn sources_are_named_from_the_root_even_when_a_part_is_walked() {
        let tree = Tree::with(&[("docs/a.md", "a"), ("src/b.rs", "b")]);
        let mut options = WalkOptions::of(tree.0.path());
        options.start = tree.0.path().join("docs");
        assert_eq!(sources(&walk(&options, |_| {})), ["docs/a.md"]);
        options.start = tree.0.path().join("src/b.rs");
        assert_eq!(sources(&walk(&options, |_| {})), ["src/b.rs"]);
    }

    #[test]
    fn links_and_pipes_are_not_read() {
        let tree = Tree::with(&[("a.md", "a")]);
        std::os::unix::fs::symlink("a.md", tree.0.path().join("link.md")).unwrap();
        let made = std::process::Command::new("mkfifo").arg(tree.0.path().join("pipe.md")).status().unwrap();
        assert!(made.success());
        let walked = tree.walk();
        assert_eq!(sources(&walked), ["a.md"]);
        assert_eq!(skipped(&walked), [("link.md", Skip::Link)]);
    }

    #[test]
    fn large_files_are_skipped_with_their_size() {
        let tree = Tree::with(&[("big.txt", &"x".repeat(3000))]);
        let mut options = WalkOptions::of(tree.0.path());
        options.max_file_bytes = 2048;
        let walked = walk(&options, |_| {});
        assert_eq!(walked.skipped[0].reason, Skip::TooLarge);
        assert_eq!(walked.skipped[0].detail.as_deref(), Some("3 KiB"));
    }
}
