//! `atlas index`: brings the index in line with a folder.

use std::{
    collections::BTreeMap,
    io::IsTerminal as _,
    path::{Path, PathBuf},
    sync::Mutex,
    time::{Duration, Instant},
};

use atlas_rag_gateway::{
    documents_without_gateway,
    source::{
        git::{Checkout, RepoUrl},
        repo::{Repository, is_bare, name_of},
        seen::Seen,
        walk::{self, GlobFault, Skip, Skipped, WalkOptions, Walked},
    },
};
use atlas_shared::{
    Dependency, UpstreamError,
    config::IndexConfig,
    gateway_api::{DocumentList, IndexedDocument, JobState},
    message::is_name,
};
use globset::GlobSet;

use crate::{
    context::Context,
    error::{CliError, Exit, Result},
    lock::DataDirLock,
    signals::Stop,
    stack::{GatewayAccess, embedded_place, running_dev},
    sync::{self, Outcome, Plan, Progress, Target},
    ui::{DIM, GREEN, Ui, YELLOW, bytes, count, paint, thousands},
    watch::Changes,
};

/// Failed documents, and skipped ones that somebody may miss, that are listed without `--verbose`.
const LISTED: usize = 10;

/// How often progress is told where nobody sees a bar.
const LOG_EVERY: Duration = Duration::from_secs(10);

/// Longest time that a clone may take.
const CLONE_BOUND: Duration = Duration::from_mins(30);

/// While watching, a failed round is tried again after so long, or at the next change.
const TRY_AGAIN: Duration = Duration::from_secs(30);

/// How often a rebuild is asked how far it is.
const REBUILD_POLL: Duration = Duration::from_millis(500);

/// Index a folder or a git repository: what changed is sent, what vanished is deleted
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  atlas index .                               this folder
  atlas index ~/src/shop --collection shop    another one, into its own collection
  atlas index . --include '*.md' --include 'docs/**'
  atlas index . --exclude 'vendor/**' --dry-run -v
  atlas index . --not-secret 'tests/keys/**'  index files that only look like secrets
  atlas index https://example.org/shop.git    a repository by its URL, at its newest commit
  atlas index https://example.org/shop.git#v2 … at a branch or a tag
  atlas index . --watch                       go on: index what changes, until Ctrl-C
  atlas index . --rebuild                     with another embedding model, without downtime

.gitignore and .atlasignore are obeyed. Binaries, lock files, minified and generated files, files
over --max-file-bytes and files that look like secrets are skipped. The summary says how many, and
names those that somebody may miss (secrets, too large, unreadable); -v names all, and why. Text is
UTF-8, UTF-16 with a byte order mark, or Windows-1252. Of PDF and DOCX files the text is indexed;
their lines are pages and paragraphs. --include and --exclude limit what this run looks at; what is
outside stays as it is in the index. To take files out of it, name them in .atlasignore.

Ctrl-C is safe: run the same command again and it goes on. A second run touches nothing,
and reads no file that is as it was by its size and times; --rebuild reads all.
Uses the gateway at RAG_URL, else the running `atlas dev`, else opens the embedded index itself.")]
pub(crate) struct Index {
    /// Folder, file or git URL to index; a URL may end in #BRANCH or #TAG
    #[arg(value_name = "PATH", default_value = ".")]
    path: PathBuf,

    /// Collection to index into [env: RAG_COLLECTION] [default: atlas]
    #[arg(short, long, value_name = "NAME")]
    collection: Option<String>,

    /// Name of the repository [default: name of the folder that holds .git, or of PATH]; who gives it
    /// says that this is what was indexed under it, wherever it lies now
    #[arg(long, value_name = "NAME")]
    repo: Option<String>,

    /// Only files that match; may be given again
    #[arg(short, long, value_name = "GLOB")]
    include: Vec<String>,

    /// Not files that match; may be given again
    #[arg(short = 'x', long, value_name = "GLOB")]
    exclude: Vec<String>,

    /// Index files that match although they look like secrets
    #[arg(long, value_name = "GLOB")]
    not_secret: Vec<String>,

    /// Skip larger files
    #[arg(long, value_name = "N", default_value_t = walk::DEFAULT_MAX_FILE_BYTES)]
    max_file_bytes: u64,

    /// Delete all that is indexed of PATH if nothing is left in it
    #[arg(long)]
    allow_empty: bool,

    /// Say what would be done, change nothing
    #[arg(short = 'n', long)]
    dry_run: bool,

    /// Stay, and index what changes until Ctrl-C
    #[arg(short, long, conflicts_with = "dry_run")]
    watch: bool,

    /// First fill a new generation of the collection (with the embedding model that is configured now)
    /// from what is indexed, check it, and use it from then on; the old one is kept
    #[arg(long, conflicts_with = "dry_run")]
    rebuild: bool,

    /// With --rebuild: delete the old generation once the new one is in use
    #[arg(long, requires = "rebuild")]
    drop_old: bool,
}

/// What a round says and does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Say what would be done.
    DryRun,
    /// Do it, and say so.
    Once,
    /// Do it, and say only what was done.
    Watch,
}

/// What to index, where to, and from where.
pub(crate) struct Job {
    options: WalkOptions,
    repository: Repository,
    repo: String,
    /// The user gave that name.
    is_named: bool,
    allow_empty: bool,
    collection: Option<String>,
    /// A clone that is deleted with the job.
    checkout: Option<Checkout>,
}

impl Index {
    pub(crate) async fn run(self, context: &Context) -> Result<()> {
        let mode = if self.dry_run { Mode::DryRun } else { Mode::Once };
        let (watch, rebuild, drop_old) = (self.watch, self.rebuild, self.drop_old);
        let mut stop = Stop::listen()?;
        let mut job = stop.unless_stopped(self.job(context)).await?;
        job.remember(context, rebuild);
        // From here on no change is missed.
        let changes = if watch { Some(Changes::of(&job.options)?) } else { None };
        let walked = stop.unless_stopped(job.walk(context.ui)).await?;
        if mode == Mode::Once && !watch && !rebuild && job.is_in_line(context, &walked).await? {
            job.keep_what_was_seen(context);
            return Ok(());
        }
        let access = stop.unless_stopped(GatewayAccess::open(context, "index")).await?;
        let mut done = Ok(Outcome::default());
        if rebuild {
            done = job.rebuild(context.ui, &access, drop_old, &mut stop).await.map(|()| Outcome::default());
        }
        // Who watches an empty folder waits for its first file.
        if done.is_ok() && !(watch && walked.files.is_empty()) {
            done = job.bring_in_line(context, &access, walked, mode, &mut stop).await;
        }
        let done = match changes {
            Some(changes) => job.watch(context, &access, changes, done, &mut stop).await,
            None => done.map(drop),
        };
        access.close().await;
        if mode != Mode::DryRun {
            job.keep_what_was_seen(context);
        }
        done
    }

    async fn job(self, context: &Context) -> Result<Job> {
        let bare = || {
            let folder = self.path.canonicalize().ok().filter(|folder| is_bare(folder))?;
            RepoUrl::parse(&format!("file://{}", folder.display()))
        };
        let Some(url) = self.path.to_str().and_then(RepoUrl::parse).or_else(bare) else {
            let path = self.path.clone();
            return self.local_job(&path, None, context);
        };
        if self.watch {
            return Err(CliError::usage("--watch needs a folder, not a URL")
                .fix("clone the repository and watch the clone, or run `atlas index URL` from a schedule"));
        }
        context.ui.note(format_args!("Cloning {}…", url.shown()));
        let checkout = Checkout::of(&url, CLONE_BOUND).await.map_err(|error| {
            CliError::failure(format!("cannot get {}", url.shown())).because(error).fix(
                "check the URL, and that git can reach it without asking: credential helper, ssh agent, or a token in the URL",
            )
        })?;
        let mut job = self.local_job(checkout.path(), url.name(), context)?;
        job.checkout = Some(checkout);
        Ok(job)
    }

    /// `called`: its name by the URL that it was cloned from.
    fn local_job(self, path: &Path, called: Option<String>, context: &Context) -> Result<Job> {
        let start = path.canonicalize().map_err(|error| {
            CliError::usage(format!("cannot index {}", path.display()))
                .because(error)
                .fix("name a folder or a file that exists, or a git URL")
        })?;
        let repository =
            if called.is_some() { Repository::cloned(&start) } else { Repository::around(&start) };
        let is_named = self.repo.is_some();
        let repo = match self.repo {
            Some(repo) if is_name(&repo) => repo,
            Some(repo) => {
                return Err(CliError::usage(format!("--repo {repo:?} is not a name"))
                    .fix("use 1 to 128 letters, digits, '.', '_' or '-'"));
            }
            None => called.or_else(|| repository.name()).unwrap_or_else(|| "files".to_owned()),
        };
        let options = WalkOptions {
            root: repository.root.clone(),
            start,
            include: globs("--include", &self.include)?,
            exclude: globs("--exclude", &self.exclude)?,
            not_secret: globs("--not-secret", &self.not_secret)?,
            max_file_bytes: self.max_file_bytes,
            data_dir: Some(context.data_dir().to_owned()),
            seen: None,
        };
        let Self { collection, allow_empty, .. } = self;
        Ok(Job { options, repository, repo, is_named, allow_empty, collection, checkout: None })
    }
}

/// The globs of a flag.
fn globs(flag: &str, patterns: &[String]) -> Result<GlobSet> {
    walk::globs(patterns).map_err(|GlobFault { pattern, problem }| {
        CliError::usage(format!("{flag} {pattern:?} is not a glob"))
            .because(problem)
            .fix("quote it for the shell and write it like '*.md' or 'docs/**'")
    })
}

impl Job {
    /// All of the repository around `path`, under its own name, into the usual collection.
    pub(crate) fn whole(path: &Path, context: &Context) -> Result<Self> {
        Index {
            path: path.to_owned(),
            collection: None,
            repo: None,
            include: Vec::new(),
            exclude: Vec::new(),
            not_secret: Vec::new(),
            max_file_bytes: walk::DEFAULT_MAX_FILE_BYTES,
            allow_empty: false,
            dry_run: false,
            watch: false,
            rebuild: false,
            drop_old: false,
        }
        .local_job(path, None, context)
    }

    /// Lets files that are as they were not be read again. Of a clone, which is deleted, each is read.
    fn remember(&mut self, context: &Context, anew: bool) {
        if self.checkout.is_none()
            && let Ok(dir) = std::path::absolute(context.data_dir())
        {
            let WalkOptions { root, max_file_bytes, .. } = &self.options;
            let load = if anew { Seen::anew } else { Seen::load };
            self.options.seen = load(&dir, root, *max_file_bytes);
        }
    }

    /// Where there is no data folder, because the gateway is elsewhere, none is made for this.
    fn keep_what_was_seen(&self, context: &Context) {
        if let Some(seen) = self.options.seen.as_ref().filter(|_| context.data_dir().is_dir())
            && let Err(error) = seen.save()
        {
            context.ui.detail(format_args!("What was read is not remembered: {error}"));
        }
    }

    /// True where nothing is to be done, and that is known without a gateway: then it was said.
    async fn is_in_line(&self, context: &Context, walked: &Walked) -> Result<bool> {
        let config = context.config()?;
        let IndexConfig::Embedded(dir) = &config.gateway.index else { return Ok(false) };
        if config.rag.url.is_some() || running_dev(context).await.is_some() {
            return Ok(false);
        }
        // Whoever has the folder is waited for where the index is opened.
        let Ok(Ok(lock)) = DataDirLock::try_acquire(dir, "index") else { return Ok(false) };
        let collection = self.collection.as_deref().unwrap_or(&config.rag.collection);
        let Some(manifest) = documents_without_gateway(&config, collection, &self.repo) else {
            return Ok(false);
        };
        drop(lock);
        let Plan { changed, unchanged, vanished } = self.plan(walked.clone(), &manifest.documents);
        // What is wrong is told where the index is opened.
        if manifest.mismatch.is_some()
            || self.check_origin(&manifest, walked, collection).is_err()
            || !changed.is_empty()
            || !vanished.is_empty()
            || unchanged == 0
        {
            return Ok(false);
        }
        self.introduce(context.ui, collection, &embedded_place(context), walked);
        if let Some(why) = &manifest.words_only {
            warn_of_words_only(context.ui, why);
        }
        say_nothing_to_do(context.ui, unchanged);
        Ok(true)
    }

    /// What is read, into what.
    fn introduce(&self, ui: Ui, collection: &str, place: &str, Walked { files, skipped }: &Walked) {
        let number = count(files.len(), "file");
        ui.note(format_args!("{number} of {} into collection {collection} of {place}", self.repo));
        if let Some(trouble) = &self.repository.trouble {
            ui.warn(format_args!("Warning: {trouble}."));
        }
        summarise_skips(ui, skipped);
        for file in files {
            if let Some(encoding) = file.encoding {
                ui.detail(paint(DIM, format_args!("  {} (decoded from {encoding})", file.source)));
            }
        }
    }

    /// What has to be done.
    fn plan(&self, Walked { files, skipped }: Walked, manifest: &[IndexedDocument]) -> Plan {
        let prefix = self.prefix();
        let unsure: Vec<&str> = skipped
            .iter()
            .filter(|skipped| skipped.reason == Skip::Unreadable)
            .map(|skipped| skipped.source.as_str())
            .collect();
        Plan::new(files, manifest, &self.repository, |source| {
            // A file, or a whole folder, that could not be read has not vanished.
            below(&prefix, source)
                && self.options.selects(source)
                && !unsure.iter().any(|unread| *unread == walk::UNKNOWN || below(unread, source))
        })
    }

    /// Refuses to take an empty folder for a wish to delete all that is indexed of it: a mistake is more likely, or
    /// somebody who is switching branches. A part of a repository may become empty.
    fn check_emptiness(&self, plan: &Plan) -> Result<()> {
        // A clone's folder says nothing to anybody.
        let place = match self.checkout {
            Some(_) => self.repo.clone(),
            None => self.options.start.display().to_string(),
        };
        let nothing = format!("there is nothing to index in {place}");
        let check = "check the path, .gitignore, .atlasignore and --include; -v lists what was skipped";
        if plan.changed.is_empty() && plan.unchanged == 0 {
            if plan.vanished.is_empty() {
                return Err(CliError::failure(nothing).fix(check));
            }
            if self.prefix().is_empty() && !self.allow_empty {
                let indexed = count(plan.vanished.len(), "file");
                return Err(CliError::failure(nothing)
                    .because(format!("{indexed} of it are indexed, and stay so"))
                    .fix(format!("{check}; if they shall go, --allow-empty deletes them from the index")));
            }
        }
        Ok(())
    }

    /// Refuses to replace another repository that only has the same name.
    fn check_origin(&self, manifest: &DocumentList, walked: &Walked, collection: &str) -> Result<()> {
        let Some((origin, number)) = self.repository.rival(&manifest.documents).filter(|_| !self.is_named)
        else {
            return Ok(());
        };
        let prefix = self.prefix();
        let in_scope = |source: &str| below(&prefix, source) && self.options.selects(source);
        if self.repository.has_moved(&manifest.documents, &walked.files, in_scope) {
            return Ok(());
        }
        let (repo, mine) = (&self.repo, &self.repository.origin);
        let parts: Vec<&str> = self.repository.address().rsplit('/').take(2).collect();
        let other = name_of(&parts.into_iter().rev().collect::<Vec<_>>().join("-"));
        let other = other.as_deref().unwrap_or("NAME");
        Err(CliError::failure(format!("the name {repo} stands for another repository in collection {collection}"))
            .because(format!("{} of {origin} are indexed under it; this is {mine}", count(number, "file")))
            .fix(format!(
                "--repo {other} gives this one a name of its own, or put it into another --collection; if it is the \
                 same one at another place, --repo {repo} says so"
            )))
    }

    /// Tells that the repository is indexed under another name: it is a worktree, or a second clone. What the user
    /// wants is not known: a branch beside the main line, or one of them only.
    async fn warn_of_other_name(&self, ui: Ui, access: &GatewayAccess, collection: &str) -> Result<()> {
        let all = match access.client.list_documents(Some(collection), None).await {
            Ok(all) => all.documents,
            Err(UpstreamError::Permanent { code, .. }) if code == "unknown_collection" => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        if let Some((name, number)) = self.repository.known_as(&all) {
            ui.warn(format_args!(
                "Warning: {} of this repository ({}) are indexed as {name} already, and searches find both. \
                 `--repo {name}` has this folder take their place instead; another --collection keeps them apart.",
                count(number, "file"),
                self.repository.address()
            ));
        }
        Ok(())
    }

    fn collection<'a>(&'a self, access: &'a GatewayAccess) -> &'a str {
        self.collection.as_deref().unwrap_or(&access.config.rag.collection)
    }

    /// Indexes what changes until Ctrl-C. A failed round is told and tried again.
    async fn watch(
        &mut self,
        context: &Context,
        access: &GatewayAccess,
        mut changes: Changes,
        first: Result<Outcome>,
        stop: &mut Stop,
    ) -> Result<()> {
        let ui = context.ui;
        let mut last = first.map(drop);
        ui.note(format_args!("Watching {}. Ctrl-C stops.", self.options.start.display()));
        loop {
            let again = match last {
                Ok(()) => None,
                Err(error) if error.exit() == Exit::Interrupted => return Err(error),
                Err(error) => {
                    crate::ui::print_error(&error);
                    ui.note(format_args!(
                        "Trying again in {} s, or when something changes.",
                        TRY_AGAIN.as_secs()
                    ));
                    Some(TRY_AGAIN)
                }
            };
            let pause = async {
                match again {
                    Some(pause) => tokio::time::sleep(pause).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = changes.settled() => {}
                () = pause => {}
                () = stop.requested() => {
                    ui.note("\nStopped watching. What is indexed stays indexed.");
                    return Ok(());
                }
            }
            // Another commit may be checked out by now.
            self.repository = Repository::around(&self.options.start);
            last = match stop.unless_stopped(self.walk(ui)).await {
                Ok(walked) => self.bring_in_line(context, access, walked, Mode::Watch, stop).await.map(drop),
                Err(error) => Err(error),
            };
            self.keep_what_was_seen(context);
        }
    }

    /// Fills a new generation of the collection, and waits until it is in use.
    async fn rebuild(&self, ui: Ui, access: &GatewayAccess, drop_old: bool, stop: &mut Stop) -> Result<()> {
        let collection = self.collection(access);
        let started = match access.client.rebuild_collection(collection).await {
            Ok(started) => started,
            Err(UpstreamError::Permanent { code, .. }) if code == "unknown_collection" => {
                ui.note(format_args!("Nothing to rebuild: there is no collection {collection} yet."));
                return Ok(());
            }
            Err(error) => return Err(error.into()),
        };
        ui.note(format_args!("Rebuilding {collection} as {}.", started.generation));
        let bar = ui.bar(0, "{bar:28} {pos}/{len} files  {msg}  {elapsed} gone  {left}");
        let follow = async {
            loop {
                let status = access.client.job(&started.job_id).await?;
                bar.set_length(status.documents as u64);
                bar.set_position(status.documents_done as u64);
                bar.set_message(status.note.clone().unwrap_or_default());
                match status.state {
                    JobState::Done => return Ok(status),
                    JobState::Failed => {
                        return Err(CliError::failure(format!("the rebuild of {collection} failed"))
                            .because(status.errors.join("; "))
                            .fix(format!("searches go on with the old generation; `atlas collections drop {}` removes what was filled", started.generation)));
                    }
                    JobState::Queued | JobState::Running => tokio::time::sleep(REBUILD_POLL).await,
                }
            }
        };
        let status = tokio::select! {
            status = follow => status?,
            () = stop.requested() => {
                return Err(CliError::interrupted("stopped waiting")
                    .because(format!("job {} goes on in the gateway", started.job_id)));
            }
        };
        bar.finish_and_clear();
        ui.out(format_args!(
            "Rebuilt {collection}: {} in {}, {} tokens.",
            count(status.chunks, "chunk"),
            started.generation,
            thousands(status.tokens)
        ));
        for fault in &status.errors {
            ui.warn(format_args!("{fault}"));
        }
        match (&started.old, drop_old) {
            (old, true) => {
                access.client.drop_collection(old).await?;
                ui.out(format_args!("Dropped the old generation, {old}."));
            }
            (old, false) => ui.note(format_args!(
                "The old generation is kept: `atlas collections use {old}` goes back, `atlas collections drop {old}` deletes it."
            )),
        }
        Ok(())
    }

    /// The folder that sources are named from.
    pub(crate) fn root(&self) -> &Path {
        &self.options.root
    }

    /// Reads the folder.
    pub(crate) async fn walk(&self, ui: Ui) -> Result<Walked> {
        let spinner = ui.bar(0, "{spinner} reading files: {pos}");
        let options = self.options.clone();
        let counter = spinner.clone();
        let walked = tokio::task::spawn_blocking(move || {
            walk::walk(&options, |seen| counter.set_position(seen as u64))
        })
        .await
        .map_err(|error| CliError::failure("reading the folder failed").because(error))?;
        spinner.finish_and_clear();
        Ok(walked)
    }

    /// Compares with the index, sends and deletes, and tells the user.
    pub(crate) async fn bring_in_line(
        &self,
        context: &Context,
        access: &GatewayAccess,
        walked: Walked,
        mode: Mode,
        stop: &mut Stop,
    ) -> Result<Outcome> {
        let ui = context.ui;
        let collection = self.collection(access).to_owned();
        if mode != Mode::Watch {
            self.introduce(ui, &collection, &access.place, &walked);
        }
        let manifest = stop.unless_stopped(self.manifest(access, &collection)).await?;
        // What cannot be searched is not up to date, even where nothing is to be sent.
        if let Some(mismatch) = manifest.mismatch {
            return Err(UpstreamError::permanent(Dependency::Gateway, "embedding_mismatch", mismatch).into());
        }
        self.check_origin(&manifest, &walked, &collection)?;
        // Asked once: from then on it has a name of its own.
        if manifest.documents.is_empty() && !self.is_named && mode != Mode::Watch {
            stop.unless_stopped(self.warn_of_other_name(ui, access, &collection)).await?;
        }
        if let Some(why) = manifest.words_only.as_deref().filter(|_| mode != Mode::Watch) {
            warn_of_words_only(ui, why);
        }
        let plan = self.plan(walked, &manifest.documents);
        self.check_emptiness(&plan)?;
        if mode == Mode::DryRun {
            show_plan(ui, &plan);
            return Ok(Outcome::default());
        }
        if plan.changed.is_empty() && plan.vanished.is_empty() {
            if mode == Mode::Watch {
                return Ok(Outcome::default());
            }
            say_nothing_to_do(ui, plan.unchanged);
            return Ok(Outcome::default());
        }

        let unchanged = plan.unchanged;
        let target = Target {
            collection,
            repo: self.repo.clone(),
            repository: self.repository.clone(),
            may_embed: access.may_embed(),
        };
        let reporter = Reporter::new(ui, plan.changed.len());
        let started = Instant::now();
        let stopped = async {
            stop.requested().await;
            ui.note("\nStopping: what is under way is finished first.");
        };
        let (outcome, result) =
            sync::run(&access.client, &target, plan, &self.options, stopped, |progress| {
                reporter.show(progress);
            })
            .await;
        reporter.finish();
        summarise(ui, &outcome, unchanged, started.elapsed());
        if let Err(error) = result {
            return Err(
                error.fix("once that is mended, run the same command again: what is indexed stays indexed")
            );
        }
        if outcome.left > 0 {
            return Err(CliError::interrupted(format!("stopped; {} left", count(outcome.left, "file")))
                .fix("run the same command again: it goes on from here"));
        }
        if !outcome.failed.is_empty() {
            return Err(CliError::failure(format!(
                "{} could not be indexed",
                count(outcome.failed.len(), "file")
            )));
        }
        Ok(outcome)
    }

    /// What is indexed.
    async fn manifest(&self, access: &GatewayAccess, collection: &str) -> Result<DocumentList> {
        match access.client.list_documents(Some(collection), Some(&self.repo)).await {
            Ok(manifest) => Ok(manifest),
            // It is made by the first document.
            Err(UpstreamError::Permanent { code, .. }) if code == "unknown_collection" => {
                Ok(DocumentList::default())
            }
            Err(error) => Err(error.into()),
        }
    }

    /// What this run looks at, as a source; empty for the whole repository.
    fn prefix(&self) -> String {
        walk::source_name(&self.options.root, &self.options.start).unwrap_or_default()
    }
}

/// True when `source` is `folder`, or below it. Everything is below the empty name.
fn below(folder: &str, source: &str) -> bool {
    folder.is_empty()
        || source.strip_prefix(folder).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

fn warn_of_words_only(ui: Ui, why: &str) {
    ui.warn(format_args!("Warning: {why}."));
}

fn say_nothing_to_do(ui: Ui, files: usize) {
    ui.out(format_args!("Nothing to do: all {} are indexed already.", count(files, "file")));
}

fn show_plan(ui: Ui, plan: &Plan) {
    for file in &plan.changed {
        ui.out(format_args!("{} {}", paint(GREEN, "index "), file.source));
    }
    for source in &plan.vanished {
        ui.out(format_args!("{} {source}", paint(YELLOW, "delete")));
    }
    let size = plan.changed.iter().map(|file| file.bytes).sum();
    ui.note(format_args!(
        "Dry run: {} to index ({}), {} to delete, {} as indexed. Nothing was changed.",
        thousands(plan.changed.len() as u64),
        bytes(size),
        thousands(plan.vanished.len() as u64),
        thousands(plan.unchanged as u64)
    ));
}

fn summarise_skips(ui: Ui, skipped: &[Skipped]) {
    if skipped.is_empty() {
        return;
    }
    let mut reasons: BTreeMap<Skip, usize> = BTreeMap::new();
    for file in skipped {
        *reasons.entry(file.reason).or_default() += 1;
    }
    let summary: Vec<String> = reasons
        .iter()
        .map(|(reason, number)| format!("{} {}", thousands(*number as u64), reason.describe()))
        .collect();
    let hint = if ui.verbose { "" } else { " (-v lists all)" };
    ui.note(format_args!("Skipped {}: {}{hint}", count(skipped.len(), "file"), summary.join(", ")));
    let line = |Skipped { source, reason, detail }: &Skipped| {
        let detail = detail.as_deref().map_or_else(String::new, |detail| format!(": {detail}"));
        paint(DIM, format!("  {source} ({}{detail})", reason.describe()))
    };
    let (missed, usual): (Vec<&Skipped>, Vec<&Skipped>) =
        skipped.iter().partition(|file| may_be_missed(file.reason));
    let listed = if ui.verbose { missed.len() } else { LISTED };
    for file in missed.iter().take(listed) {
        ui.note(line(file));
    }
    if missed.len() > listed {
        ui.note(format_args!("  … and {} more of these (-v lists them)", missed.len() - listed));
    }
    for file in usual {
        ui.detail(line(file));
    }
}

/// Would somebody look for such a file in the index? Nobody does for a lock file.
fn may_be_missed(reason: Skip) -> bool {
    matches!(reason, Skip::Secret | Skip::TooLarge | Skip::NoText | Skip::Unreadable | Skip::BadName)
}

fn summarise(ui: Ui, outcome: &Outcome, unchanged: usize, took: Duration) {
    let Outcome { indexed, chunks, tokens, deleted, failed, .. } = outcome;
    let billed = if *tokens > 0 { format!(", {} tokens", thousands(*tokens)) } else { String::new() };
    ui.out(format_args!(
        "Indexed {} ({}{billed}) in {:.1} s; {} unchanged, {} deleted.",
        count(*indexed, "file"),
        count(*chunks, "chunk"),
        took.as_secs_f64(),
        thousands(unchanged as u64),
        thousands(*deleted as u64)
    ));
    let listed = if ui.verbose { failed.len() } else { LISTED };
    for (source, why) in failed.iter().take(listed) {
        ui.warn(format_args!("  {source}: {why}"));
    }
    if failed.len() > listed {
        ui.warn(format_args!("  … and {} more (-v lists them)", failed.len() - listed));
    }
}

/// Shows how far it is: a bar on a terminal, now and then a line elsewhere.
struct Reporter {
    ui: Ui,
    bar: indicatif::ProgressBar,
    total: usize,
    started: Instant,
    last: Mutex<Instant>,
}

impl Reporter {
    fn new(ui: Ui, total: usize) -> Self {
        let bar = ui.bar(total as u64, "{bar:28} {pos}/{len} files  {msg}  {rate}  {elapsed} gone  {left}");
        Self { ui, bar, total, started: Instant::now(), last: Mutex::new(Instant::now()) }
    }

    fn show(&self, progress: Progress) {
        let tokens = if progress.tokens > 0 {
            format!("  {} tokens", thousands(progress.tokens))
        } else {
            String::new()
        };
        let text = format!("{} chunks{tokens}", thousands(progress.chunks as u64));
        self.bar.set_position(progress.documents as u64);
        if std::io::stderr().is_terminal() {
            self.bar.set_message(text);
            return;
        }
        let mut last = self.last.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if last.elapsed() >= LOG_EVERY {
            *last = Instant::now();
            let rate = progress.documents as f64 / self.started.elapsed().as_secs_f64().max(0.001);
            let left = (self.total.saturating_sub(progress.documents)) as f64 / rate.max(0.001);
            self.ui.note(format_args!(
                "{}/{} files, {text}, {rate:.1} files/s, {left:.0} s left",
                progress.documents, self.total
            ));
        }
    }

    fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use super::below;

    #[test]
    fn a_folder_is_not_below_one_whose_name_it_only_begins_with() {
        assert!(below("", "any/file"));
        assert!(below("docs", "docs/a.md"));
        assert!(below("docs/a.md", "docs/a.md"));
        assert!(!below("docs", "docs-old/a.md"));
        assert!(!below("docs/a.md", "docs"));
    }
}
