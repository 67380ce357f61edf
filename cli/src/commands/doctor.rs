//! `atlas doctor`: checks everything Atlas depends on and says how to mend it. Changes nothing.

use std::{path::Path, time::Duration};

use atlas_shared::{
    Config, UpstreamError,
    config::{QueueConfig, StoreConfig},
    openai::{OpenAiChat, OpenAiEmbedder},
};
use atlas_worker::{queue, store};
use serde::Serialize;

use crate::{
    context::Context,
    error::{CliError, Result},
    lock,
    stack::client,
    ui::{GREEN, RED, Ui, YELLOW, bytes, count, paint, thousands},
};

/// How long one check may take.
const BOUND: Duration = Duration::from_secs(15);
/// Less free space than this is a warning.
const LOW_DISK: u64 = 1 << 30;
/// Less than this is a failure.
const NO_DISK: u64 = 64 << 20;

/// Check everything Atlas depends on and say how to mend what is wrong
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  atlas doctor
  atlas --env-file prod.env doctor
  atlas doctor --json | jq '.[] | select(.level == \"fail\")'

Checks the configuration, the data folder, queue, store, gateway (and with it Qdrant), the model API
and today's budget. Changes nothing and costs no tokens. Exits with 1 if a check fails.")]
pub(crate) struct Doctor {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// How a check went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Level {
    Ok,
    Warn,
    Fail,
}

/// One line of the report.
#[derive(Clone, Debug, Serialize)]
struct Finding {
    check: &'static str,
    level: Level,
    detail: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    fix: Option<String>,
}

impl Finding {
    fn ok(check: &'static str, detail: impl Into<String>) -> Self {
        Self { check, level: Level::Ok, detail: detail.into(), fix: None }
    }

    fn warn(check: &'static str, detail: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { check, level: Level::Warn, detail: detail.into(), fix: Some(fix.into()) }
    }

    fn fail(check: &'static str, detail: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { check, level: Level::Fail, detail: detail.into(), fix: Some(fix.into()) }
    }

    /// What an upstream said, as a finding.
    fn of(check: &'static str, error: UpstreamError) -> Self {
        match error {
            UpstreamError::Misconfigured { variable, message, fix, .. } => {
                Self::fail(check, message, format!("{variable}: {fix}"))
            }
            UpstreamError::Transient { message, .. } => {
                Self::fail(check, message, "check that it runs and can be reached from here, then try again")
            }
            UpstreamError::Permanent { code, message, .. } => {
                Self::fail(check, format!("{message} ({code})"), "check that it is the version Atlas expects")
            }
        }
    }
}

impl Doctor {
    pub(crate) async fn run(self, context: &Context) -> Result<()> {
        let findings = Box::pin(examine(context)).await;
        let count_of = |level| findings.iter().filter(|finding| finding.level == level).count();
        let (failed, warned) = (count_of(Level::Fail), count_of(Level::Warn));
        if self.json {
            context.ui.json(&findings)?;
        } else {
            for finding in &findings {
                show(context.ui, finding);
            }
        }
        if failed > 0 {
            return Err(CliError::failure(format!("{} failed", count(failed, "check"))));
        }
        let remark = if warned > 0 { format!(" ({})", count(warned, "warning")) } else { String::new() };
        context.ui.note(format_args!("All is well{remark}."));
        Ok(())
    }
}

fn show(ui: Ui, Finding { check, level, detail, fix }: &Finding) {
    let level = match level {
        Level::Ok => paint(GREEN, "ok  "),
        Level::Warn => paint(YELLOW, "warn"),
        Level::Fail => paint(RED, "FAIL"),
    };
    ui.out(format_args!("{level}  {check:<14} {}", detail.trim().replace('\n', "\n                     ")));
    if let Some(fix) = fix {
        ui.out(format_args!("                     fix: {fix}"));
    }
}

async fn examine(context: &Context) -> Vec<Finding> {
    let mut findings = Vec::new();
    let config = match context.load() {
        Ok(config) => config,
        Err(errors) => {
            for error in errors.0 {
                findings.push(Finding::fail(
                    "configuration",
                    format!("{}: {}", error.variable, error.problem),
                    error.fix,
                ));
            }
            findings.push(disk(context.data_dir()));
            findings.push(Finding::warn(
                "other checks",
                "not made, because the configuration is not valid",
                "mend it, then run `atlas doctor` again",
            ));
            return findings;
        }
    };
    findings.push(Finding::ok("configuration", "valid"));
    findings.extend(mixed(context));
    findings.push(disk(context.data_dir()));
    findings.push(data_folder(context));
    let (queue, (store, budget), gateway, (model, embeddings)) = tokio::join!(
        queue_check(&config),
        store_check(&config),
        gateway_check(context, &config),
        model_check(&config)
    );
    findings.extend([queue, store, budget, gateway, model, embeddings].into_iter().flatten());
    findings
}

/// Settings that are valid one by one but hardly meant together.
fn mixed(context: &Context) -> Vec<Finding> {
    let set = |name| context.is_set(name);
    let mut findings = Vec::new();
    if set("PUBSUB_PROJECT_ID") != set("SUPABASE_URL") {
        let (named, missing) = if set("PUBSUB_PROJECT_ID") {
            ("PUBSUB_PROJECT_ID", "SUPABASE_URL")
        } else {
            ("SUPABASE_URL", "PUBSUB_PROJECT_ID")
        };
        findings.push(Finding::warn(
            "configuration",
            format!("{named} is set but {missing} is not: one half is a service, the other is embedded"),
            "set both for the fleet, or none for a laptop",
        ));
    }
    if context.env_file().is_none() && Path::new(".env").is_file() {
        findings.push(Finding::warn(
            "configuration",
            "there is a .env here; it is not read unless you name it",
            "if it is yours: atlas --env-file .env …",
        ));
    }
    findings
}

/// Room where the embedded store and index grow.
fn disk(data_dir: &Path) -> Finding {
    let existing = data_dir.ancestors().find(|folder| folder.is_dir()).unwrap_or(Path::new("."));
    match rustix::fs::statvfs(existing) {
        Ok(stat) => {
            let free = stat.f_bavail.saturating_mul(stat.f_frsize);
            let detail = format!("{} free for {}", bytes(free), data_dir.display());
            if free < NO_DISK {
                Finding::fail("disk", detail, "free some space, or name another folder with --data-dir")
            } else if free < LOW_DISK {
                Finding::warn("disk", detail, "free some space before it runs out")
            } else {
                Finding::ok("disk", detail)
            }
        }
        Err(error) => Finding::warn(
            "disk",
            format!("free space of {} is not known: {error}", existing.display()),
            "check it by hand",
        ),
    }
}

/// Can the data folder be used, and who has it?
fn data_folder(context: &Context) -> Finding {
    const CHECK: &str = "data folder";
    let dir = context.data_dir();
    if let Some(owner) = lock::owner_of(dir) {
        let at = owner.gateway.map_or_else(String::new, |url| format!(", gateway at {url}"));
        return Finding::ok(CHECK, format!("`atlas {}` runs (process {}){at}", owner.command, owner.pid));
    }
    if !dir.exists() {
        return Finding::ok(CHECK, format!("{} will be made when it is needed", dir.display()));
    }
    match tempfile::tempfile_in(dir) {
        Ok(_) => Finding::ok(CHECK, format!("{} can be written; no `atlas dev` runs here", dir.display())),
        Err(error) => Finding::fail(
            CHECK,
            format!("{} cannot be written: {error}", dir.display()),
            "mend its owner or permissions, or name another folder with --data-dir",
        ),
    }
}

async fn queue_check(config: &Config) -> Option<Finding> {
    const CHECK: &str = "queue";
    let mut config = config.clone();
    let mut creates = false;
    let place = match &mut config.queue {
        QueueConfig::Embedded(dir) if !dir.is_dir() => {
            return Some(Finding::ok(CHECK, "embedded; made when it is needed"));
        }
        QueueConfig::Embedded(_) => "embedded".to_owned(),
        QueueConfig::PubSub(pubsub) => {
            // A check makes nothing.
            creates = std::mem::replace(&mut pubsub.create_missing, false);
            match &pubsub.emulator {
                Some(url) => format!("Pub/Sub emulator at {url}"),
                None => format!("Pub/Sub, project {}", pubsub.project_id),
            }
        }
    };
    let checked = bounded(CHECK, async {
        let queues = Box::pin(queue::open(&config)).await?;
        queues.requests.check().await?;
        let mut differences = queues.requests.differences().await?;
        if let Some(dead_letters) = &queues.dead_letters {
            differences.extend(dead_letters.differences().await?);
        }
        Ok(differences)
    })
    .await;
    Some(match checked {
        Ok(differences) if differences.is_empty() => Finding::ok(CHECK, place),
        Ok(differences) => Finding::warn(
            CHECK,
            format!("{place}\n{}", differences.join("\n")),
            "nothing, if it is meant so; otherwise the commands above",
        ),
        Err(finding) if creates && !unreachable(&finding) => Finding::warn(
            CHECK,
            format!("{place}: {}", finding.detail),
            "nothing to do: a worker makes what is missing when it starts (PUBSUB_CREATE)",
        ),
        Err(finding) => finding,
    })
}

/// True for a finding about a service that did not answer at all.
fn unreachable(finding: &Finding) -> bool {
    finding.fix.as_deref().is_some_and(|fix| fix.starts_with("check that it runs"))
}

async fn store_check(config: &Config) -> (Option<Finding>, Option<Finding>) {
    const CHECK: &str = "store";
    let place = match &config.store {
        StoreConfig::Embedded(dir) if !dir.is_dir() => {
            return (Some(Finding::ok(CHECK, "embedded; made when it is needed")), None);
        }
        StoreConfig::Embedded(dir) => format!("embedded, in {}", dir.display()),
        StoreConfig::Supabase(supabase) => format!("Supabase at {}", supabase.url),
    };
    let checked = bounded(CHECK, async {
        let store = store::open(config).await?;
        store.check().await?;
        Ok(store)
    })
    .await;
    let store = match checked {
        Ok(store) => store,
        Err(finding) => return (Some(finding), None),
    };
    let budget = match tokio::time::timeout(BOUND, store.fleet_state(config.limits)).await {
        Ok(Ok(fleet)) => {
            let used = fleet.budget.used + fleet.budget.reserved;
            let detail = format!(
                "{} of {} tokens used today, {} runs wait for tokens",
                thousands(used.0),
                thousands(fleet.budget.limit.0),
                thousands(fleet.deferred_runs)
            );
            if fleet.paused {
                Finding::warn(
                    "budget",
                    format!("{detail}; the fleet is paused"),
                    "send the control command resume",
                )
            } else if used.0.saturating_mul(5) >= fleet.budget.limit.0.saturating_mul(4) {
                Finding::warn("budget", detail, "raise DAILY_TOKEN_BUDGET, or wait for the next UTC day")
            } else {
                Finding::ok("budget", detail)
            }
        }
        Ok(Err(error)) => Finding::fail("budget", error.to_string(), "atlas migrate status"),
        Err(_) => no_answer("budget"),
    };
    (Some(Finding::ok(CHECK, place)), Some(budget))
}

async fn gateway_check(context: &Context, config: &Config) -> Option<Finding> {
    const CHECK: &str = "gateway";
    let mut config = config.clone();
    let mut place = "RAG_URL";
    if config.rag.url.is_none() {
        place = "atlas dev";
        config.rag.url =
            lock::owner_of(context.data_dir()).filter(lock::Owner::stays).and_then(|owner| owner.gateway);
    }
    let Some(url) = config.rag.url.clone() else {
        return Some(if context.is_set("PUBSUB_PROJECT_ID") {
            Finding::warn(
                CHECK,
                "RAG_URL is not set: the fleet's gateway cannot be asked from here",
                "set RAG_URL to its address",
            )
        } else {
            Finding::ok(CHECK, "none runs; commands start one of their own")
        });
    };
    let ready = bounded(CHECK, async {
        let client = client(&config).map_err(|error| {
            UpstreamError::misconfigured(
                atlas_shared::Dependency::Gateway,
                "RAG_URL",
                error,
                "set it to the gateway's address",
            )
        })?;
        client.ready().await?;
        // Readiness asks for no key; this does.
        client.collections().await
    })
    .await;
    Some(match ready {
        Ok(collections) => {
            let chunks: u64 = collections.iter().map(|collection| collection.chunks).sum();
            Finding::ok(
                CHECK,
                format!(
                    "ready at {url} ({place}); {}, {} chunks",
                    count(collections.len(), "collection"),
                    thousands(chunks)
                ),
            )
        }
        Err(finding) => Finding { detail: format!("{url} ({place}): {}", finding.detail), ..finding },
    })
}

async fn model_check(config: &Config) -> (Option<Finding>, Option<Finding>) {
    let Some(openai) = &config.openai else {
        return (
            Some(Finding::warn(
                "model",
                "no OPENAI_API_KEY and no OPENAI_BASE_URL: the offline drafter writes",
                "set OPENAI_API_KEY, or OPENAI_BASE_URL for a server of your own",
            )),
            Some(Finding::ok("embeddings", "none: search is lexical")),
        );
    };
    let mut model = Finding::ok("model", format!("{} at {}", openai.models.join(", then "), openai.base_url));
    for (at, name) in openai.models.iter().enumerate() {
        let checked = bounded("model", async { OpenAiChat::new(openai)?.check_model(name).await }).await;
        if let Err(finding) = checked {
            // A chain with a broken fallback still works.
            let level = if at == 0 { Level::Fail } else { Level::Warn };
            model = Finding { level, detail: format!("{name}: {}", finding.detail), ..finding };
            break;
        }
    }
    let embeddings = match &openai.embedding_model {
        None => Finding::ok("embeddings", "none (OPENAI_EMBEDDING_MODEL=none): search is lexical"),
        Some(_) if model.level == Level::Fail => {
            Finding::warn("embeddings", "not checked, because the model API is not well", "mend that first")
        }
        Some(name) => {
            let checked = bounded("embeddings", async {
                match OpenAiEmbedder::new(openai)? {
                    Some(embedder) => embedder.check().await,
                    None => Ok(()),
                }
            });
            match checked.await {
                Ok(()) => Finding::ok("embeddings", name.clone()),
                Err(finding) => finding,
            }
        }
    };
    (Some(model), Some(embeddings))
}

/// Runs a check, at most [`BOUND`].
async fn bounded<T>(
    check: &'static str,
    work: impl Future<Output = Result<T, UpstreamError>>,
) -> Result<T, Finding> {
    match tokio::time::timeout(BOUND, work).await {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(Finding::of(check, error)),
        Err(_) => Err(no_answer(check)),
    }
}

fn no_answer(check: &'static str) -> Finding {
    Finding::fail(
        check,
        format!("no answer within {} s", BOUND.as_secs()),
        "check that it runs and can be reached from here, then try again",
    )
}
