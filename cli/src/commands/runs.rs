//! `atlas runs`: what the store knows of requests.

use std::sync::Arc;

use atlas_shared::{TaskId, config::StoreConfig};
use atlas_worker::store::{self, RunDetail, RunRecord, RunStatus, RunStore};
use jiff::{Timestamp, Unit};

use crate::{
    context::Context,
    error::{CliError, Result},
    ui::{BOLD, DIM, GREEN, RED, Ui, YELLOW, paint, table, thousands},
};

/// Look at requests and their specs
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  atlas runs list                             the newest runs
  atlas runs list --status failed --json
  atlas runs show 67e55044-10b1-426f-9247-bb680e5fe0c8
  atlas runs show 67e55044-10b1-426f-9247-bb680e5fe0c8 --spec > spec.md

Reads the store at SUPABASE_URL, else the embedded one in the data folder.")]
pub(crate) struct Runs {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, clap::Subcommand)]
enum Action {
    /// The newest runs first
    #[command(after_help = "Example:\n  atlas runs list --status running --limit 50")]
    List {
        /// Only runs in this state
        #[arg(short, long, value_enum)]
        status: Option<Status>,
        /// How many at most
        #[arg(short = 'n', long, value_name = "N", default_value_t = 20)]
        limit: usize,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// One run: its request, its state, its spec
    #[command(
        after_help = "Example:\n  atlas runs show 67e55044-10b1-426f-9247-bb680e5fe0c8 --spec > spec.md"
    )]
    Show {
        /// The task id, as `atlas publish` and `atlas ask` print it
        #[arg(value_name = "ID")]
        task_id: TaskId,
        /// Print the spec only, as Markdown
        #[arg(long, conflicts_with = "json")]
        spec: bool,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

/// The states of a run, as words.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Status {
    Queued,
    Running,
    Deferred,
    Done,
    Failed,
}

impl From<Status> for RunStatus {
    fn from(status: Status) -> Self {
        match status {
            Status::Queued => Self::Queued,
            Status::Running => Self::Running,
            Status::Deferred => Self::Deferred,
            Status::Done => Self::Done,
            Status::Failed => Self::Failed,
        }
    }
}

impl Runs {
    pub(crate) async fn run(self, context: &Context) -> Result<()> {
        let store = open_store(context).await?;
        match self.action {
            Action::List { status, limit, json } => {
                let runs = store.list_runs(status.map(Into::into), limit).await?;
                if json {
                    return context.ui.json(&runs);
                }
                list(context.ui, &runs);
            }
            Action::Show { task_id, spec, json } => {
                let Some(detail) = store.get_run(task_id).await? else {
                    return Err(CliError::failure(format!("there is no run {task_id} in the store"))
                        .because("no worker has taken the request yet, or it went to another store")
                        .fix(
                            "is a worker running? (`atlas dev`, `atlas doctor`); `atlas runs list` lists all",
                        ));
                };
                if json {
                    return context.ui.json(&detail);
                }
                if spec { show_spec(context.ui, &detail)? } else { show(context.ui, &detail) }
            }
        }
        Ok(())
    }
}

/// The configured store. An embedded one that was never used is an error, not an empty one.
pub(crate) async fn open_store(context: &Context) -> Result<Arc<dyn RunStore>> {
    let config = context.config()?;
    if let StoreConfig::Embedded(dir) = &config.store
        && !dir.is_dir()
    {
        return Err(CliError::failure(format!("there is no store in {}", dir.display()))
            .because("nothing was asked in this folder yet, and SUPABASE_URL is not set")
            .fix("go to the folder you work in, name another one with --data-dir, or set SUPABASE_URL"));
    }
    Ok(store::open(&config).await?)
}

fn list(ui: Ui, runs: &[RunRecord]) {
    if runs.is_empty() {
        ui.note("No runs. `atlas ask \"…\"` makes one.");
        return;
    }
    let now = Timestamp::now();
    let rows: Vec<Vec<String>> = runs
        .iter()
        .map(|run| {
            vec![
                run.task_id.to_string(),
                run.status.as_str().to_owned(),
                ago(now, run.created_at),
                took(run).unwrap_or_default(),
                thousands(run.tokens_prompt.0 + run.tokens_completion.0),
                run.model.clone().unwrap_or_default(),
                run.error_code.clone().unwrap_or_default(),
            ]
        })
        .collect();
    ui.out(table(&["TASK", "STATUS", "CREATED", "TOOK", "TOKENS", "MODEL", "ERROR"], &rows));
}

fn show(ui: Ui, detail: &RunDetail) {
    let RunRecord { task_id, status, attempt, tokens_prompt, tokens_completion, .. } = &detail.run;
    let style = match status {
        RunStatus::Done => GREEN,
        RunStatus::Failed => RED,
        RunStatus::Queued | RunStatus::Running | RunStatus::Deferred => YELLOW,
    };
    let field =
        |name: &str, value: &str| ui.out(format_args!("{} {value}", paint(BOLD, format!("{name:<9}"))));
    field("task", &task_id.to_string());
    field("status", &format!("{} (attempt {attempt})", paint(style, status.as_str())));
    field("created", &seconds(detail.run.created_at));
    if let Some(took) = took(&detail.run) {
        field("took", &took);
    }
    if let Some(at) = detail.run.not_before {
        field("resumes", &seconds(at));
    }
    if let Some(owner) = &detail.run.lease_owner {
        field("worker", owner);
    }
    if let Some(model) = &detail.run.model {
        field("model", model);
    }
    field(
        "tokens",
        &format!("{} prompt, {} completion", thousands(tokens_prompt.0), thousands(tokens_completion.0)),
    );
    if let Some(code) = &detail.run.error_code {
        field("error", &format!("{code}: {}", detail.run.error_message.as_deref().unwrap_or_default()));
    }
    for step in &detail.steps {
        ui.detail(paint(
            DIM,
            format_args!("step      {} ({} tokens)", step.step, thousands(step.usage.total().0)),
        ));
    }
    if let Some(request) = detail.request.get("content").and_then(|content| content.as_str()) {
        field("request", request);
    }
    if let Some(content) = content(detail) {
        ui.out("");
        ui.out(content);
    }
}

fn show_spec(ui: Ui, detail: &RunDetail) -> Result<()> {
    match (&detail.run.status, content(detail)) {
        (RunStatus::Done, Some(spec)) => {
            ui.out(spec.trim_end());
            Ok(())
        }
        (RunStatus::Failed, _) => {
            Err(CliError::failure(format!("run {} failed, it has no spec", detail.run.task_id))
                .because(detail.run.error_message.as_deref().unwrap_or("no reason was stored")))
        }
        (status, _) => Err(CliError::failure(format!("run {} has no spec yet", detail.run.task_id))
            .because(format_args!("it is {}", status.as_str()))),
    }
}

fn content(detail: &RunDetail) -> Option<&str> {
    detail.answer.as_ref()?.get("content")?.as_str()
}

/// How long work on a finished run took.
fn took(run: &RunRecord) -> Option<String> {
    let end = run.ended_at?;
    let duration = end.duration_since(run.started_at?);
    Some(format!("{:.1} s", duration.as_secs_f64()))
}

fn ago(now: Timestamp, at: Timestamp) -> String {
    match now.duration_since(at).as_secs() {
        ..=0 => "now".to_owned(),
        seconds @ 1..=119 => format!("{seconds} s ago"),
        seconds @ 120..=7199 => format!("{} min ago", seconds / 60),
        seconds @ 7200..=172_799 => format!("{} h ago", seconds / 3600),
        seconds => format!("{} d ago", seconds / 86_400),
    }
}

/// An instant without its fractions.
fn seconds(at: Timestamp) -> String {
    at.round(Unit::Second).unwrap_or(at).to_string()
}
