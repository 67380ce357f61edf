//! `atlas runs`: what the store knows of requests, and what an operator does about them.

use std::{collections::HashSet, fmt::Write as _, sync::Arc};

use atlas_shared::{TaskId, config::StoreConfig};
use atlas_worker::{
    queue::Topics,
    store::{
        self, CANCELLED, Cancelled, EntryState, FinalStatus, RunDetail, RunFilter, RunRecord, RunStatus,
        RunStore, Wake,
    },
};
use clap::builder::RangedI64ValueParser;
use jiff::Timestamp;
use serde::Serialize;
use serde_json::Value;

use crate::{
    again::{self, Again, Requests},
    commands::budget,
    context::Context,
    error::{CliError, Result},
    times::{ago, parse_since, seconds},
    ui::{BOLD, DIM, GREEN, RED, Ui, YELLOW, count, paint, table, thousands},
};

/// Rows that one call asks the store for at most, and no store gives more. A command is to be called again for them.
pub(crate) const MOST_ROWS: usize = 10_000;

/// Reads how many rows a list shall have.
pub(crate) fn rows() -> RangedI64ValueParser<usize> {
    RangedI64ValueParser::new().range(1..=i64::try_from(MOST_ROWS).unwrap_or(i64::MAX))
}

/// Look at requests and their specs, run them again, stop them
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  atlas runs list                             the newest runs
  atlas runs list --status failed --since 24h --json
  atlas runs show 67e55044-10b1-426f-9247-bb680e5fe0c8
  atlas runs show 67e55044-10b1-426f-9247-bb680e5fe0c8 --spec > spec.md
  atlas runs retry 67e55044-10b1-426f-9247-bb680e5fe0c8
  atlas runs cancel 67e55044-10b1-426f-9247-bb680e5fe0c8

Reads the store at SUPABASE_URL, else the embedded one in the data folder.")]
pub(crate) struct Runs {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, clap::Subcommand)]
enum Action {
    /// The newest runs first
    #[command(after_help = "Examples:
  atlas runs list --status running --limit 50
  atlas runs list --status failed --error too_many_attempts --since 2h
  atlas runs list --tenant acme")]
    List {
        /// Only runs in this state
        #[arg(short, long, value_enum)]
        status: Option<Status>,
        /// Only this tenant's
        #[arg(long, value_name = "NAME")]
        tenant: Option<String>,
        /// Only those that failed with this code
        #[arg(long, value_name = "CODE")]
        error: Option<String>,
        /// Only those that ended (or were accepted, if they have not) since then: an age (2h, 7d), a day
        /// or a time
        #[arg(long, value_name = "WHEN", value_parser = parse_since)]
        since: Option<Timestamp>,
        /// How many at most
        #[arg(short = 'n', long, value_name = "N", default_value_t = 20, value_parser = rows(), allow_negative_numbers = true)]
        limit: usize,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// One run: its state, calls and request, what to do next, its spec
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
    /// Run again what failed, and run now what waits
    #[command(after_help = "Examples:
  atlas runs retry 67e55044-10b1-426f-9247-bb680e5fe0c8
  atlas runs retry --all-failed --since 2h                            says what it would do
  atlas runs retry --all-failed --since 2h --error too_many_attempts --yes

A failed run is final. Its request is published again as another task, always the same one for the same
run: retrying twice makes one run. The new id is printed, metadata.retry_of names the old one. A run that
waits (queued for a later try, or deferred) is made due now; one that still does not fit its budget is
deferred again. --all-failed leaves out what was cancelled, unless --error names it.

Exit code 1 if one of them cannot be run again; the others are all the same.")]
    Retry {
        /// Task ids
        #[arg(value_name = "ID", required_unless_present = "all_failed", conflicts_with = "all_failed")]
        task_ids: Vec<TaskId>,
        /// Every failed run
        #[arg(long)]
        all_failed: bool,
        /// With --all-failed: only those that failed since then: an age (2h, 7d), a day or a time
        #[arg(long, value_name = "WHEN", value_parser = parse_since, requires = "all_failed")]
        since: Option<Timestamp>,
        /// With --all-failed: only this tenant's
        #[arg(long, value_name = "NAME", requires = "all_failed")]
        tenant: Option<String>,
        /// With --all-failed: only those that failed with this code
        #[arg(long, value_name = "CODE", requires = "all_failed")]
        error: Option<String>,
        /// With --all-failed: do it; without it says what would be done
        #[arg(long, requires = "all_failed")]
        yes: bool,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Stop runs for good
    #[command(after_help = "Example:
  atlas runs cancel 67e55044-10b1-426f-9247-bb680e5fe0c8

A run that waits fails at once, code `cancelled`, and its requester is told. The worker of a running one
is told when it next renews its lease (a third of LEASE_SECONDS at most), whichever worker that is; it
stops in the middle of a call, which is then booked as spent. A request that no worker has taken from
the queue yet is cancelled when its message comes, whichever worker gets it: that is remembered for
32 days, longer than Pub/Sub keeps a message.

Exit code 1 if one of them was final before.")]
    Cancel {
        /// Task ids
        #[arg(value_name = "ID", required = true)]
        task_ids: Vec<TaskId>,
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
            Action::List { status, tenant, error, since, limit, json } => {
                let filter =
                    RunFilter { status: status.map(Into::into), tenant, error_code: error, since, limit };
                let runs = store.find_runs(&filter).await?;
                if json {
                    return context.ui.json(&runs);
                }
                let everything = RunFilter { limit, ..RunFilter::default() };
                list(context.ui, &runs, filter != everything);
            }
            Action::Show { task_id, spec, json } => {
                let Some(detail) = store.get_run(task_id).await? else {
                    return Err(CliError::failure(format!("there is no run {task_id} in the store"))
                        .because(UNKNOWN)
                        .fix(
                            "is a worker running? (`atlas dev`, `atlas doctor`); `atlas runs list` lists all",
                        ));
                };
                if json {
                    return context.ui.json(&detail);
                }
                if spec {
                    show_spec(context.ui, &detail)?;
                } else {
                    let short = short_of(context, store.as_ref(), &detail.run).await?;
                    show(context.ui, &detail, short);
                }
            }
            Action::Retry { task_ids, all_failed, since, tenant, error, yes, json } => {
                let mut task_ids = task_ids;
                let filtered = since.is_some() || tenant.is_some() || error.is_some();
                if all_failed {
                    let cancelled_too = error.is_some();
                    let filter = RunFilter {
                        status: Some(RunStatus::Failed),
                        tenant,
                        error_code: error,
                        since,
                        limit: MOST_ROWS,
                    };
                    let failed = store.find_runs(&filter).await?;
                    if failed.len() == MOST_ROWS {
                        context
                            .ui
                            .warn(format_args!("Only the newest {MOST_ROWS} failed runs are looked at."));
                    }
                    // The oldest first, as they were asked for.
                    task_ids = failed
                        .iter()
                        .rev()
                        .filter(|run| cancelled_too || run.error_code.as_deref() != Some(CANCELLED))
                        .map(|run| run.task_id)
                        .collect();
                }
                let act = !all_failed || yes;
                let outcomes = retry(context, store.as_ref(), &task_ids, act).await?;
                report(context.ui, &outcomes, json)?;
                if outcomes.is_empty() {
                    context.ui.note(if filtered {
                        "No failed run matches the filter."
                    } else {
                        "No failed runs."
                    });
                } else if !act {
                    let again = outcomes.iter().filter(|outcome| outcome.outcome == "retried").count();
                    context.ui.note(format_args!(
                        "Nothing was published: add --yes to run {} again.",
                        count(again, "request")
                    ));
                }
            }
            Action::Cancel { task_ids, json } => {
                let config = context.config()?;
                let mut outcomes = Vec::new();
                for task_id in task_ids {
                    outcomes.push(cancel(store.as_ref(), task_id, &Topics::of(&config).answers).await?);
                }
                report(context.ui, &outcomes, json)?;
            }
        }
        Ok(())
    }
}

const UNKNOWN: &str = "no worker has taken the request yet, or it went to another store";

/// What became of one run: one line, or one JSON object.
#[derive(Debug, Serialize)]
struct Told {
    task_id: TaskId,
    /// Stable word.
    outcome: &'static str,
    /// The task it runs again as.
    new_task_id: Option<TaskId>,
    detail: String,
    /// True: what was asked for was not done.
    failed: bool,
}

/// Prints the outcomes; fails if one of them did.
fn report(ui: Ui, outcomes: &[Told], json: bool) -> Result<()> {
    if json {
        ui.json(&outcomes)?;
    } else {
        for Told { task_id, detail, .. } in outcomes {
            ui.out(format_args!("{task_id}  {detail}"));
        }
    }
    let failed = outcomes.iter().filter(|outcome| outcome.failed).count();
    if failed > 0 {
        return Err(CliError::failure(format!(
            "{failed} of {} could not be done",
            count(outcomes.len(), "run")
        ))
        .because("each line above says why"));
    }
    Ok(())
}

async fn retry(context: &Context, store: &dyn RunStore, task_ids: &[TaskId], act: bool) -> Result<Vec<Told>> {
    let config = context.config()?;
    // Opened before the first run is looked at: without a queue nothing is tried.
    let requests = Requests::open(&config).await?;
    let paused = store.fleet_state(config.limits).await?.paused;
    let mut outcomes = Vec::new();
    let mut published = HashSet::new();
    for task_id in task_ids {
        let outcome = |outcome, new_task_id, failed, detail| Told {
            task_id: *task_id,
            outcome,
            new_task_id,
            detail,
            failed,
        };
        let Some(detail) = store.get_run(*task_id).await? else {
            outcomes.push(outcome("unknown", None, true, format!("there is no such run: {UNKNOWN}")));
            continue;
        };
        outcomes.push(match detail.run.status {
            RunStatus::Done => outcome(
                "done",
                None,
                true,
                format!(
                    "is done: atlas runs show {task_id} --spec; to refine it: atlas ask --parent {task_id}"
                ),
            ),
            RunStatus::Queued | RunStatus::Running | RunStatus::Deferred => {
                match store.wake_run(*task_id).await? {
                    Wake::Due if paused => outcome(
                        "due",
                        None,
                        false,
                        "is due, but the fleet is paused: send `resume`".to_owned(),
                    ),
                    Wake::Due => {
                        outcome("due", None, false, "is due now: the next sweep takes it".to_owned())
                    }
                    Wake::Running => {
                        let owner = detail.run.lease_owner.as_deref().unwrap_or("a worker");
                        outcome("running", None, false, format!("is being worked on by {owner}"))
                    }
                    Wake::Final | Wake::Unknown => {
                        outcome("ended", None, false, format!("has just ended: atlas runs show {task_id}"))
                    }
                }
            }
            RunStatus::Failed => match again::follow(store, detail).await? {
                Again::Already(run) => outcome(
                    "retried_before",
                    Some(run.task_id),
                    false,
                    format!("was retried as {}, which is {}", run.task_id, run.status.as_str()),
                ),
                Again::Publish { task_id: new, of } => match &of.request {
                    Value::Object(request) => {
                        let first = published.insert(new);
                        if first && act {
                            let data = again::renamed(request.clone(), new, Some(of.run.task_id));
                            requests.publish(data, &again::attributes_of(&of.run), Some(new)).await?;
                        }
                        let text = match (act, first) {
                            (true, true) => format!("is retried as {new}: atlas runs show {new}"),
                            (true, false) => format!("is retried as {new} already"),
                            (false, true) => format!("would be retried as {new}"),
                            (false, false) => format!("would be retried as {new}, as another one"),
                        };
                        outcome("retried", Some(new), false, text)
                    }
                    _ => outcome(
                        "purged",
                        None,
                        true,
                        "its request is purged (RETENTION_REQUESTS_DAYS): publish it anew".to_owned(),
                    ),
                },
            },
        });
    }
    Ok(outcomes)
}

async fn cancel(store: &dyn RunStore, task_id: TaskId, topic: &str) -> Result<Told> {
    let outcome = store::cancel(store, task_id, topic).await?;
    let (failed, detail) = match &outcome {
        Cancelled::Ended => (false, "is cancelled, and its requester is told".to_owned()),
        Cancelled::Stopping(owner) => {
            let owner = owner.as_deref().unwrap_or("its worker");
            (false, format!("stops: {owner} is told at its next renewal"))
        }
        Cancelled::Awaited => {
            (false, "is not known here yet: it will be cancelled when its message comes".to_owned())
        }
        Cancelled::Final(status) => {
            let status = match status {
                FinalStatus::Done => "done",
                FinalStatus::Failed => "failed",
            };
            (true, format!("is {status} already: a final run never changes"))
        }
    };
    Ok(Told { task_id, outcome: outcome.as_str(), new_task_id: None, detail, failed })
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

fn list(ui: Ui, runs: &[RunRecord], filtered: bool) {
    if runs.is_empty() {
        ui.note(if filtered {
            "No run matches the filter: `atlas runs list` shows all."
        } else {
            "No runs. `atlas ask \"…\"` makes one."
        });
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
                thousands(run.tokens_booked.0),
                run.model.clone().unwrap_or_default(),
                run.error_code.clone().unwrap_or_default(),
            ]
        })
        .collect();
    ui.out(table(&["TASK", "STATUS", "CREATED", "TOOK", "TOKENS", "MODEL", "ERROR"], &rows));
}

/// The accounts that have no room for what a run waits for.
#[derive(Clone, Copy, Debug, Default)]
struct Short {
    /// The fleet's day.
    fleet: bool,
    /// Its tenant's day.
    tenant: bool,
}

/// What keeps a deferred run waiting now; that may have changed since it was deferred.
async fn short_of(context: &Context, store: &dyn RunStore, run: &RunRecord) -> Result<Short> {
    let (RunStatus::Deferred, Some(needed)) = (run.status, run.tokens_needed) else {
        return Ok(Short::default());
    };
    let limits = context.config()?.limits;
    let budget = store.fleet_state(limits).await?.budget;
    let of_tenant = match &run.tenant {
        Some(tenant) => budget::tenant_left(store, limits, tenant, &budget.day).await?,
        None => None,
    };
    Ok(Short { fleet: budget.available() < needed, tenant: of_tenant.is_some_and(|left| left < needed) })
}

fn show(ui: Ui, detail: &RunDetail, short: Short) {
    let RunRecord { task_id, status, attempt, .. } = &detail.run;
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
    let assumed = detail.ledger.iter().filter(|call| call.state == EntryState::Assumed);
    let assumed = assumed.map(|call| call.actual.0).sum::<u64>();
    field("tokens", &tokens(&detail.run, assumed));
    if let Some(code) = &detail.run.error_code {
        field("error", &format!("{code}: {}", detail.run.error_message.as_deref().unwrap_or_default()));
    }
    if let Some(tenant) = &detail.run.tenant {
        field("tenant", tenant);
    }
    if let Some(requester) = &detail.run.requester {
        field("asked by", requester);
    }
    for step in &detail.steps {
        field("step", &format!("{} ({} tokens)", step.step, thousands(step.usage.total().0)));
    }
    for call in &detail.ledger {
        let tokens = match call.state {
            EntryState::Reserved => format!("{} reserved", thousands(call.reserved.0)),
            _ => format!("{} tokens", thousands(call.actual.0)),
        };
        let attempt = call.attempt.unwrap_or_default();
        let line = format!("{} attempt {attempt}, {}, {tokens}", call.model, call.state.as_str());
        // What ended as it should is for --verbose; what is open or assumed explains a bill.
        if matches!(call.state, EntryState::Reserved | EntryState::Assumed) {
            field("call", &line);
        } else {
            ui.detail(paint(DIM, format_args!("call      {line}")));
        }
    }
    field("next", &next_step(detail, short));
    if let Some(request) = detail.request.get("content").and_then(|content| content.as_str()) {
        field("request", request);
    }
    if let Some(content) = content(detail) {
        ui.out("");
        ui.out(content);
    }
}

/// What a run cost, of which this much is assumed: what a call billed that was cut off nobody knows, so its bound
/// counts. A worker that woke up too late books what it was billed after the run's end; the run does not change.
fn tokens(run: &RunRecord, assumed: u64) -> String {
    let RunRecord { tokens_prompt: prompt, tokens_completion: completion, tokens_booked: booked, .. } = run;
    let mut line = format!("{} prompt, {} completion", thousands(prompt.0), thousands(completion.0));
    for (tokens, what) in [
        (assumed, "assumed"),
        (booked.0.saturating_sub(prompt.0 + completion.0 + assumed), "billed after its end"),
    ] {
        if tokens > 0 {
            let _ = write!(line, ", {} {what}", thousands(tokens));
        }
    }
    line
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

/// What an operator can do, or what happens by itself.
fn next_step(detail: &RunDetail, short: Short) -> String {
    let RunRecord { task_id, status, not_before, tokens_needed, error_code, .. } = &detail.run;
    match status {
        RunStatus::Queued => match not_before {
            Some(at) if *at > Timestamp::now() => {
                format!("tries again at {}; now: atlas runs retry {task_id}", seconds(*at))
            }
            _ => "a worker takes it when it has room, unless the fleet is paused".to_owned(),
        },
        RunStatus::Running if detail.run.cancel_requested => {
            "its worker stops at its next renewal".to_owned()
        }
        RunStatus::Running => format!(
            "its worker has it until {}, and renews that; to stop it: atlas runs cancel {task_id}",
            detail.run.lease_until.map(seconds).unwrap_or_default()
        ),
        RunStatus::Deferred => {
            let fits = format!(
                "resumes when {} tokens fit: atlas budget show",
                thousands(tokens_needed.unwrap_or_default().0)
            );
            let of_tenant = match &detail.run.tenant {
                Some(tenant) if short.tenant => format!(", atlas budget set --tenant {tenant} --daily N"),
                _ => String::new(),
            };
            let of_fleet =
                if short.fleet || of_tenant.is_empty() { ", atlas budget set --daily N" } else { "" };
            format!("{fits}{of_tenant}{of_fleet}")
        }
        RunStatus::Done | RunStatus::Failed if detail.unsent => {
            "its answer waits to be published: is a worker running? atlas doctor".to_owned()
        }
        RunStatus::Done => {
            format!("atlas runs show {task_id} --spec; to refine it: atlas ask --parent {task_id}")
        }
        RunStatus::Failed if error_code.as_deref() == Some("run_budget_exhausted") => {
            format!("atlas budget set --per-run N, then atlas runs retry {task_id}")
        }
        RunStatus::Failed => format!("mend the cause, then: atlas runs retry {task_id}"),
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use serde_json::json;

    use super::*;

    #[test]
    fn the_tokens_of_a_run_add_up_to_what_is_booked() {
        let run = |booked: u64| -> RunRecord {
            serde_json::from_value(json!({
                "task_id": TaskId::random(), "status": "done", "attempt": 2, "created_at": "2026-01-01T00:00:00Z",
                "tokens_prompt": 7296, "tokens_completion": 1537, "tokens_booked": booked
            }))
            .unwrap()
        };
        assert_eq!(tokens(&run(8_833), 0), "7,296 prompt, 1,537 completion");
        assert_eq!(tokens(&run(10_833), 2_000), "7,296 prompt, 1,537 completion, 2,000 assumed");
        // Another worker's call, settled when it woke up: the run was done.
        assert_eq!(tokens(&run(17_744), 0), "7,296 prompt, 1,537 completion, 8,911 billed after its end");
    }
}
