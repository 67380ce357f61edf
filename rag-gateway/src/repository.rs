//! Repositories that the gateway reads by itself: `POST /v1/index`, and so `docs_added`.
//!
//! A caller names a folder of *this* machine or a URL, so what may be named is a setting:
//! `INDEX_ALLOWED_ROOTS` and `INDEX_ALLOWED_URLS`, both empty by default. Links cannot lead out of a
//! root: paths are compared after they are resolved, and the walk follows none.

use std::{
    collections::{BTreeMap, HashSet},
    path::{Component, Path, PathBuf},
    time::Duration,
};

use atlas_shared::{
    config::GatewayConfig,
    gateway_api::{DeleteDocuments, Document, IndexedDocument},
};

use crate::{
    error::GatewayError,
    indexing::Indexer,
    jobs::Progress,
    source::{
        git::{Checkout, CloneError, RepoUrl},
        repo::{Repository, is_bare},
        walk::{self, Candidate, Skip, WalkOptions, Walked},
    },
};

/// Documents, and bytes of them, that are read and indexed together.
const BATCH_DOCUMENTS: usize = 512;
const BATCH_BYTES: u64 = 4 * 1024 * 1024;

/// Longest time that a clone may take.
const CLONE_BOUND: Duration = Duration::from_mins(15);

/// Where the gateway may read from.
pub(crate) struct Sources {
    roots: Vec<PathBuf>,
    urls: Vec<String>,
    data_dir: Option<PathBuf>,
}

/// A place that may be read.
#[derive(Debug)]
enum Place {
    Folder(PathBuf),
    Url(RepoUrl),
}

impl Sources {
    pub(crate) fn new(config: &GatewayConfig, data_dir: Option<PathBuf>) -> Self {
        Self { roots: config.index_allowed_roots.clone(), urls: config.index_allowed_urls.clone(), data_dir }
    }

    /// Refuses what may not be read, before a job is made of it.
    pub(crate) fn check(&self, repo: &str, path: Option<&str>) -> Result<(), GatewayError> {
        if let Some(path) = path {
            below(path)?;
        }
        self.place(repo).map(drop)
    }

    fn place(&self, repo: &str) -> Result<Place, GatewayError> {
        if repo.trim().is_empty() {
            return Err(GatewayError::Invalid("`repo` is empty; name a folder or a git URL".to_owned()));
        }
        let Some(url) = RepoUrl::parse(repo) else { return self.folder(Path::new(repo)).map(Place::Folder) };
        if url.has_credentials() {
            return Err(GatewayError::Invalid(
                "`repo` carries credentials; leave them out, and give the gateway's git a credential helper"
                    .to_owned(),
            ));
        }
        if let Some(folder) = url.local_folder() {
            self.folder(&folder)?;
            return Ok(Place::Url(url));
        }
        let shown = url.shown();
        if shown.contains("..") || shown.contains('%') || shown.contains('\\') {
            return Err(GatewayError::Invalid(
                "`repo` is a URL with `..`, `%` or `\\`; write it plainly".to_owned(),
            ));
        }
        if self.urls.iter().any(|allowed| is_below(&shown, allowed)) {
            return Ok(Place::Url(url));
        }
        Err(GatewayError::NotAllowed { what: shown, variable: "INDEX_ALLOWED_URLS" })
    }

    fn folder(&self, folder: &Path) -> Result<PathBuf, GatewayError> {
        let refused = || GatewayError::NotAllowed {
            what: folder.display().to_string(),
            variable: "INDEX_ALLOWED_ROOTS",
        };
        // One answer for what is not allowed and what is not there: nobody learns what this machine has.
        let resolved = if folder.is_absolute() {
            folder.canonicalize().map_err(|_| refused())?
        } else {
            // A name means the folder of that name in one of the roots.
            let name = below(&folder.to_string_lossy()).map_err(|_| refused())?;
            self.roots.iter().find_map(|root| root.join(&name).canonicalize().ok()).ok_or_else(refused)?
        };
        let allowed = self
            .roots
            .iter()
            .filter_map(|root| root.canonicalize().ok())
            .any(|root| resolved.starts_with(root));
        if allowed && resolved.is_dir() { Ok(resolved) } else { Err(refused()) }
    }

    /// Brings the index in line with a repository, or with a part of it.
    pub(crate) async fn index(
        &self,
        indexer: &Indexer,
        collection: &str,
        repo: &str,
        path: Option<&str>,
        progress: Progress<'_>,
    ) -> Result<(), GatewayError> {
        let path = path.map(below).transpose()?;
        let (root, shown, name, checkout) = match self.place(repo)? {
            Place::Folder(root) if is_bare(&root) => {
                return Err(GatewayError::Invalid(format!(
                    "`repo` is a repository without a work tree; name it as file://{}",
                    root.display()
                )));
            }
            Place::Folder(root) => (root, format!("{repo:?}"), None, None),
            Place::Url(url) => {
                let checkout = Checkout::of(&url, CLONE_BOUND).await.map_err(clone_failed)?;
                (checkout.path().to_owned(), format!("{:?}", url.shown()), url.name(), Some(checkout))
            }
        };
        let (asked, real) = match &path {
            Some(path) => (sources_below(path), blocking(behind_links(&root, path)).await?),
            None => (String::new(), Some(PathBuf::new())),
        };
        let start = root.join(real.as_deref().unwrap_or(Path::new("")));
        let options = WalkOptions { start, data_dir: self.data_dir.clone(), ..WalkOptions::of(&root) };
        let repository = blocking({
            let (root, is_clone) = (root.clone(), checkout.is_some());
            move || {
                let around = if is_clone { Repository::cloned(&root) } else { Repository::around(&root) };
                // Nothing is read, and nothing named, above the folder that was allowed.
                if around.root == root { around } else { Repository::without_git(&root) }
            }
        })
        .await?;
        let name = name.or_else(|| repository.name()).unwrap_or_else(|| "files".to_owned());
        let documents = match indexer.list(collection, Some(&name), None).await {
            Ok(list) => list.documents,
            Err(GatewayError::UnknownCollection(_)) => Vec::new(),
            Err(error) => return Err(error),
        };
        if let Some(trouble) = &repository.trouble {
            progress.fault(trouble);
        }
        if let Some((origin, number)) = repository.rival(&documents)
            && !has_moved(&repository, &documents, &options).await?
        {
            return Err(GatewayError::Invalid(format!(
                "the name {name:?} stands for the repository at {origin} in collection {collection:?} ({number} \
                 documents), and this one is at {}; index it under another name with `atlas index --repo NAME`, or into \
                 another collection",
                repository.origin
            )));
        }
        // What is indexed below a link is there twice; the walk of the whole repository follows none either.
        if real.as_deref().map(sources_below).as_deref() != Some(asked.as_str()) {
            let gone = vanished(&documents, &asked, &HashSet::new());
            if real.is_none() && gone.is_empty() {
                return Err(GatewayError::Invalid(format!(
                    "`path` {asked:?} is not in {shown}, and nothing of it is indexed"
                )));
            }
            forget(indexer, collection, &name, gone).await?;
        }
        // It was deleted: what was indexed below it has gone.
        let Some(prefix) = real.as_deref().map(sources_below) else { return Ok(()) };
        let Walked { files, skipped } = blocking({
            let options = options.clone();
            move || walk::walk(&options, |_| {})
        })
        .await?;
        let unsure = skipped.iter().any(|skipped| skipped.reason == Skip::Unreadable);
        for skipped in skipped
            .iter()
            .filter(|skipped| matches!(skipped.reason, Skip::Unreadable | Skip::NoText | Skip::BadName))
        {
            let detail = skipped.detail.as_deref().unwrap_or_default();
            progress.fault(&format!("{}: {} ({detail})", skipped.source, skipped.reason.describe()));
        }
        let known: BTreeMap<&str, &IndexedDocument> =
            documents.iter().map(|document| (document.source.as_str(), document)).collect();
        let present: HashSet<String> = files.iter().map(|file| file.source.clone()).collect();
        let gone = {
            let (repository, documents) = (repository.clone(), documents.clone());
            blocking(move || repository.gone(&documents)).await?
        };
        let as_indexed = |file: &Candidate| {
            known.get(file.source.as_str()).is_some_and(|it| repository.is_indexed(file, it, &gone))
        };
        let mut changed: Vec<_> = files.into_iter().filter(|file| !as_indexed(file)).collect();
        // Shuffled, in the same way every time: the first ones are a fair sample of their lengths, which the
        // collection is weighed with.
        changed.sort_by(|a, b| a.hash.cmp(&b.hash));
        progress.begin(present.len());
        progress.unchanged(present.len() - changed.len());
        let mut rest = changed.as_slice();
        while !rest.is_empty() {
            let mut bytes = 0;
            let fits = rest
                .iter()
                .take(BATCH_DOCUMENTS)
                .take_while(|file| {
                    let first = bytes == 0;
                    bytes += file.bytes.max(1);
                    first || bytes <= BATCH_BYTES
                })
                .count();
            let (batch, after) = rest.split_at(fits);
            rest = after;
            let read = blocking({
                let (batch, options) = (batch.to_vec(), options.clone());
                move || -> Vec<_> {
                    batch.into_iter().map(|file| (walk::read_again(&file, &options), file.source)).collect()
                }
            })
            .await?;
            let mut documents = Vec::with_capacity(read.len());
            for (text, source) in read {
                match text {
                    Ok(text) => documents.push(Document {
                        commit: repository.commit_of(&source).map(str::to_owned),
                        origin: Some(repository.origin.clone()),
                        source,
                        text,
                        repo: Some(name.clone()),
                        // The walk has looked, or was told not to.
                        restate: true,
                        not_secret: true,
                        ..Document::default()
                    }),
                    Err((reason, _)) => progress.fault(&format!("{source}: {}", reason.describe())),
                }
            }
            if !documents.is_empty() {
                indexer
                    .put(collection, documents, |results, tokens| progress.advance(results, tokens))
                    .await?;
            }
        }
        if unsure {
            return Ok(());
        }
        let gone = vanished(&documents, &prefix, &present);
        // As `atlas index` has it: an empty folder is more likely a mistake than a wish to delete everything.
        if present.is_empty() && (prefix.is_empty() || gone.is_empty()) {
            let what = if prefix.is_empty() { shown } else { format!("{prefix:?} of {shown}") };
            let stay = match gone.len() {
                0 => "is something there, and does no ignore file name it?".to_owned(),
                number => format!(
                    "{number} documents of it are indexed, and stay so; `atlas index --allow-empty` deletes them"
                ),
            };
            return Err(GatewayError::Invalid(format!("there is nothing to index in {what}: {stay}")));
        }
        forget(indexer, collection, &name, gone).await
    }
}

/// What is indexed below a prefix and not there any more.
fn vanished(documents: &[IndexedDocument], prefix: &str, present: &HashSet<String>) -> Vec<String> {
    let below = |source: &str| {
        let rest = source.strip_prefix(prefix);
        prefix.is_empty() || rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    };
    let sources = documents.iter().map(|document| &document.source);
    sources.filter(|source| below(source) && !present.contains(*source)).cloned().collect()
}

/// Is it the repository whose name it has, with another remote? All of it is read for that, but seldom.
async fn has_moved(
    repository: &Repository,
    documents: &[IndexedDocument],
    options: &WalkOptions,
) -> Result<bool, GatewayError> {
    let (repository, documents) = (repository.clone(), documents.to_vec());
    let options = WalkOptions { start: options.root.clone(), ..options.clone() };
    blocking(move || repository.has_moved(&documents, &walk::walk(&options, |_| {}).files, |_| true)).await
}

async fn forget(
    indexer: &Indexer,
    collection: &str,
    repo: &str,
    sources: Vec<String>,
) -> Result<(), GatewayError> {
    if sources.is_empty() {
        return Ok(());
    }
    let request = DeleteDocuments { repo: Some(repo.to_owned()), sources, ..DeleteDocuments::default() };
    indexer.delete(collection, &request).await.map(drop)
}

/// What sources below this path begin with.
fn sources_below(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// Where a path of a repository really is, relative to its root: links below the root are followed, so that one
/// file has one name. `None`: it is not there, or outside. Blocking.
fn behind_links(root: &Path, path: &Path) -> impl FnOnce() -> Option<PathBuf> + Send + use<> {
    let (root, place) = (root.to_owned(), root.join(path));
    move || {
        let (root, place) = (root.canonicalize().ok()?, place.canonicalize().ok()?);
        Some(place.strip_prefix(root).ok()?.to_owned())
    }
}

/// A path that stays below where it starts.
fn below(path: &str) -> Result<PathBuf, GatewayError> {
    let mut clean = PathBuf::new();
    for part in Path::new(path).components() {
        match part {
            Component::Normal(name) => clean.push(name),
            Component::CurDir => {}
            _ => {
                return Err(GatewayError::Invalid(
                    "`path` must be relative to the repository, without `..`".to_owned(),
                ));
            }
        }
    }
    Ok(clean)
}

/// `https://host/team/` allows everything below it, `https://host/team/repo.git` only itself.
fn is_below(url: &str, allowed: &str) -> bool {
    let folder = allowed.trim_end_matches('/');
    url.strip_prefix(folder).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        || (allowed.ends_with(':') && url.starts_with(allowed))
}

fn clone_failed(error: CloneError) -> GatewayError {
    GatewayError::Upstream(match &error {
        // The network, as often as not.
        CloneError::TimedOut { .. } | CloneError::Refused { .. } => {
            atlas_shared::UpstreamError::transient(atlas_shared::Dependency::Gateway, error)
        }
        CloneError::NoGit(_) => {
            atlas_shared::UpstreamError::permanent(atlas_shared::Dependency::Gateway, "no_git", error)
        }
    })
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, GatewayError> {
    tokio::task::spawn_blocking(work).await.map_err(|error| {
        GatewayError::Upstream(atlas_shared::UpstreamError::transient(
            atlas_shared::Dependency::Gateway,
            format!("reading the files stopped: {error}"),
        ))
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

    use std::fs;

    use super::*;

    fn sources(roots: &[&Path], urls: &[&str]) -> Sources {
        Sources {
            roots: roots.iter().map(|root| (*root).to_owned()).collect(),
            urls: urls.iter().map(|url| (*url).to_owned()).collect(),
            data_dir: None,
        }
    }

    #[test]
    fn only_what_was_allowed_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let allowed = dir.path().join("repos");
        fs::create_dir_all(allowed.join("shop")).unwrap();
        fs::create_dir_all(dir.path().join("private")).unwrap();
        std::os::unix::fs::symlink(dir.path().join("private"), allowed.join("link")).unwrap();
        let sources = sources(&[&allowed], &["https://example.org/team/", "git@example.org:team"]);
        let path = |name: &str| dir.path().join(name).display().to_string();
        for repo in [
            path("repos/shop"),
            "shop".to_owned(),
            format!("file://{}", path("repos/shop")),
            "https://example.org/team/shop.git".to_owned(),
            "https://example.org/team/shop#v1".to_owned(),
            "git@example.org:team/shop.git".to_owned(),
        ] {
            sources.check(&repo, Some("docs")).unwrap_or_else(|error| panic!("{repo}: {error}"));
        }
        for repo in [
            path("private"),
            path("repos/link"),
            path("repos/../private"),
            path("repos/nothing"),
            "../private".to_owned(),
            "link".to_owned(),
            "/etc".to_owned(),
            format!("file://{}", path("private")),
            "file:///etc".to_owned(),
            "https://example.org/team-of-others/shop".to_owned(),
            "https://example.org/team/../others/shop".to_owned(),
            "https://example.org/team/%2e%2e/others".to_owned(),
            "https://example.org@evil.example/team/shop".to_owned(),
            "https://me:secret@example.org/team/shop".to_owned(),
            "http://example.org/team/shop".to_owned(),
            "git@example.org:others/shop".to_owned(),
            "ext::sh -c id".to_owned(),
        ] {
            let error = sources.check(&repo, None).err().unwrap_or_else(|| panic!("{repo} is allowed"));
            assert!(!error.to_string().contains("secret@"), "{error}");
        }
        for path in ["../private", "/etc", "docs/../../x"] {
            assert!(sources.check("shop", Some(path)).is_err(), "{path}");
        }
    }

    #[test]
    fn nothing_is_allowed_unless_somebody_says_so() {
        let sources = sources(&[], &[]);
        for repo in [".", "/", "https://example.org/a", "file:///tmp"] {
            let error = sources.check(repo, None).unwrap_err();
            assert!(error.to_string().contains("INDEX_ALLOWED"), "{error}");
        }
    }
}
