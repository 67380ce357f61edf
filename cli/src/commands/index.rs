//! `atlas index`: brings the index in line with a folder.

use std::{
    collections::BTreeMap,
    io::IsTerminal as _,
    path::{Path, PathBuf},
    sync::Mutex,
    time::{Duration, Instant},
};

use atlas_shared::{UpstreamError, gateway_api::IndexedDocument, message::is_name};

use crate::{
    context::Context,
    error::{CliError, Result},
    repo::Repository,
    signals::Stop,
    stack::GatewayAccess,
    sync::{self, Outcome, Plan, Progress, Target},
    ui::{DIM, GREEN, Ui, YELLOW, bytes, count, paint, thousands},
    walk::{self, Skip, Skipped, WalkOptions, Walked},
};

/// Failed documents that are listed without `--verbose`.
const LISTED_FAILURES: usize = 10;

/// How often progress is told where nobody sees a bar.
const LOG_EVERY: Duration = Duration::from_secs(10);

/// Index a folder: what changed is sent, what vanished is deleted
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  atlas index .                               this folder
  atlas index ~/src/shop --collection shop    another one, into its own collection
  atlas index . --include '*.md' --include 'docs/**'
  atlas index . --exclude 'vendor/**' --dry-run -v
  atlas index . --not-secret 'tests/keys/**'  index files that only look like secrets

.gitignore and .atlasignore are obeyed. Binaries, lock files, minified and generated files, files
over --max-file-bytes and files that look like secrets are skipped; the summary says how many, -v
says which and why. --include and --exclude limit what this run looks at; what is outside stays as
it is in the index. To take files out of it, name them in .atlasignore.

Ctrl-C is safe: run the same command again and it goes on. A second run touches nothing.
Uses the gateway at RAG_URL, else the running `atlas dev`, else opens the embedded index itself.")]
pub(crate) struct Index {
    /// Folder or file to index
    #[arg(value_name = "PATH", default_value = ".")]
    path: PathBuf,

    /// Collection to index into [env: RAG_COLLECTION] [default: atlas]
    #[arg(short, long, value_name = "NAME")]
    collection: Option<String>,

    /// Name of the repository [default: name of the folder that holds .git, or of PATH]
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

    /// Say what would be done, change nothing
    #[arg(short = 'n', long)]
    dry_run: bool,
}

/// What to index, where to, and from where.
pub(crate) struct Job {
    options: WalkOptions,
    repository: Repository,
    repo: String,
    collection: Option<String>,
}

impl Index {
    pub(crate) async fn run(self, context: &Context) -> Result<()> {
        let dry_run = self.dry_run;
        let job = self.job(context)?;
        let mut stop = Stop::listen()?;
        let walked = stop.unless_stopped(job.walk(context.ui)).await?;
        if walked.files.is_empty() {
            summarise_skips(context.ui, &walked.skipped);
            // An empty folder is more likely a mistake than a wish to delete everything.
            return Err(CliError::failure(format!(
                "there is nothing to index in {}",
                job.options.start.display()
            ))
            .fix("check the path, .gitignore, .atlasignore and --include; -v lists what was skipped"));
        }
        let access = stop.unless_stopped(GatewayAccess::open(context, "index")).await?;
        let done = job.bring_in_line(context, &access, walked, dry_run, &mut stop).await;
        access.close().await;
        done.map(drop)
    }

    fn job(self, context: &Context) -> Result<Job> {
        let start = self.path.canonicalize().map_err(|error| {
            CliError::usage(format!("cannot index {}", self.path.display()))
                .because(error)
                .fix("name a folder or a file that exists")
        })?;
        let repository = Repository::around(&start);
        let repo = match self.repo {
            Some(repo) if is_name(&repo) => repo,
            Some(repo) => {
                return Err(CliError::usage(format!("--repo {repo:?} is not a name"))
                    .fix("use 1 to 128 letters, digits, '.', '_' or '-'"));
            }
            None => repository.name().unwrap_or_else(|| "files".to_owned()),
        };
        let options = WalkOptions {
            root: repository.root.clone(),
            start,
            include: walk::globs("--include", &self.include)?,
            exclude: walk::globs("--exclude", &self.exclude)?,
            not_secret: walk::globs("--not-secret", &self.not_secret)?,
            max_file_bytes: self.max_file_bytes,
            data_dir: Some(context.data_dir().to_owned()),
        };
        Ok(Job { options, repository, repo, collection: self.collection })
    }
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
            dry_run: false,
        }
        .job(context)
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
        dry_run: bool,
        stop: &mut Stop,
    ) -> Result<Outcome> {
        let ui = context.ui;
        let Walked { files, skipped } = walked;
        let total = files.len();
        let collection = self.collection.clone().unwrap_or_else(|| access.config.rag.collection.clone());
        ui.note(format_args!(
            "{} of {} into collection {collection} of {}",
            count(total, "file"),
            self.repo,
            access.place
        ));
        summarise_skips(ui, &skipped);

        let manifest = stop.unless_stopped(self.manifest(access, &collection)).await?;
        let prefix = self.prefix();
        let unsure: Vec<&str> = skipped
            .iter()
            .filter(|skipped| skipped.reason == Skip::Unreadable)
            .map(|skipped| skipped.source.as_str())
            .collect();
        let plan = Plan::new(files, &manifest, |source| {
            // A file, or a whole folder, that could not be read has not vanished.
            below(&prefix, source)
                && self.options.selects(source)
                && !unsure.iter().any(|unread| *unread == walk::UNKNOWN || below(unread, source))
        });
        if dry_run {
            show_plan(ui, &plan);
            return Ok(Outcome::default());
        }
        if plan.changed.is_empty() && plan.vanished.is_empty() {
            ui.out(format_args!("Nothing to do: all {} are indexed already.", count(total, "file")));
            return Ok(Outcome::default());
        }

        let unchanged = plan.unchanged;
        let target = Target {
            collection,
            repo: self.repo.clone(),
            commit: self.repository.commit.clone(),
            uncommitted: self.repository.uncommitted.clone(),
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
            return Err(error.fix("run the same command again: what is indexed stays indexed"));
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
    async fn manifest(&self, access: &GatewayAccess, collection: &str) -> Result<Vec<IndexedDocument>> {
        match access.client.list_documents(Some(collection), Some(&self.repo)).await {
            Ok(manifest) => Ok(manifest.documents),
            // It is made by the first document.
            Err(UpstreamError::Permanent { code, .. }) if code == "unknown_collection" => Ok(Vec::new()),
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
    let hint = if ui.verbose { "" } else { " (-v lists them)" };
    ui.note(format_args!("Skipped {}: {}{hint}", count(skipped.len(), "file"), summary.join(", ")));
    for Skipped { source, reason, detail } in skipped {
        let detail = detail.as_deref().map_or_else(String::new, |detail| format!(": {detail}"));
        ui.detail(paint(DIM, format_args!("  {source} ({}{detail})", reason.describe())));
    }
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
    let listed = if ui.verbose { failed.len() } else { LISTED_FAILURES };
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
    last: Mutex<Instant>,
}

impl Reporter {
    fn new(ui: Ui, total: usize) -> Self {
        let bar =
            ui.bar(total as u64, "{bar:28} {pos}/{len} files  {msg}  {per_sec}  {elapsed} gone, {eta} left");
        Self { ui, bar, total, last: Mutex::new(Instant::now()) }
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
            self.ui.note(format_args!("{}/{} files, {text}", progress.documents, self.total));
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
