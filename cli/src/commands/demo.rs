//! `atlas demo`: the whole way on the folder you are in, and a check of what came out.

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use atlas_shared::message::Answer;
use serde_json::Map;

use crate::{
    citations,
    commands::{
        ask::{Waiter, failure, spec_text, summarise},
        index::{Job, Mode},
    },
    context::Context,
    error::{CliError, Result},
    metrics::{self, Sample},
    request::Request,
    signals::Stop,
    stack::{GatewayAccess, Parts, Stack},
    ui::{BOLD, GREEN, RED, Ui, count, paint, thousands},
};

/// What is asked when nobody says what: questions that fit any repository of a service.
const QUESTIONS: [&str; 2] = [
    "Design the logging, metrics and alerts of the services in this repository",
    "How should the services in this repository handle retries, timeouts and failures of what they depend on?",
];

/// How long one answer may take. A model on a slow machine needs minutes.
const ANSWER_BOUND: Duration = Duration::from_mins(10);

/// See it work: index a folder, ask two questions, verify every citation
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  atlas demo
  atlas demo --path ~/src/shop --question \"Design a coupon service\"
  OPENAI_API_KEY=sk-… atlas demo              with a model

Without a key the offline drafter writes: real passages, no language model, 0 tokens. It says so.
With one, only the answers are billed: search is lexical unless OPENAI_EMBEDDING_MODEL is set.
Everything happens in a fresh temporary folder; nothing of yours is changed. Exits with 1 if a
citation does not name a file and lines that hold the passage.")]
pub(crate) struct Demo {
    /// Folder to index
    #[arg(long, value_name = "DIR", default_value = ".")]
    path: PathBuf,

    /// Ask this instead of the two usual questions; may be given again
    #[arg(long, value_name = "TEXT")]
    question: Vec<String>,
}

impl Demo {
    pub(crate) async fn run(self, context: &Context) -> Result<()> {
        let ui = context.ui;
        let mut stop = Stop::listen()?;
        let job = Job::whole(&self.path, context)?;
        let folder = tempfile::Builder::new().prefix("atlas-demo-").tempdir().map_err(|error| {
            CliError::failure("cannot make a temporary folder")
                .because(error)
                .fix("check TMPDIR and the disk")
        })?;
        let mut config = context.embedded_config(&[
            ("RAG_URL", String::new()),
            ("ATLAS_DATA_DIR", folder.path().display().to_string()),
        ])?;
        config.gateway.listen = ([127, 0, 0, 1], 0).into();
        config.worker.listen = ([127, 0, 0, 1], 0).into();
        config.worker.drain_timeout = Duration::from_secs(1);
        if !context.is_set("OPENAI_EMBEDDING_MODEL")
            && let Some(openai) = &mut config.openai
        {
            // Embedding a whole repository for two questions would cost more than the answers.
            openai.embedding_model = None;
        }
        match &config.openai {
            Some(openai) => {
                ui.out(format_args!("Model: {} at {}", openai.models.join(", "), openai.base_url));
                let search = openai.embedding_model.as_deref().map_or_else(
                    || "lexical, so that indexing bills nothing (OPENAI_EMBEDDING_MODEL changes that)".to_owned(),
                    |model| format!("lexical and {model}; every file is embedded, which bills tokens"),
                );
                ui.out(format_args!("Search: {search}"));
            }
            None => ui.out(
                "Model: none. The offline drafter writes, from real passages and without a language model.\n       \
                 Set OPENAI_API_KEY (or OPENAI_BASE_URL) to see a model's work.",
            ),
        }
        let stack = stop.unless_stopped(Box::pin(Stack::start(config, Parts::All, "demo", ui))).await?;
        let shown = show(ui, context, &stack, &job, self.questions(), &mut stop).await;
        stack.stop().await;
        shown
    }

    fn questions(self) -> Vec<String> {
        if self.question.is_empty() { QUESTIONS.map(str::to_owned).to_vec() } else { self.question }
    }
}

async fn show(
    ui: Ui,
    context: &Context,
    stack: &Stack,
    job: &Job,
    questions: Vec<String>,
    stop: &mut Stop,
) -> Result<()> {
    heading(ui, "1. Index");
    let walked = stop.unless_stopped(job.walk(ui)).await?;
    if walked.files.is_empty() {
        return Err(CliError::failure(format!("there is nothing to index in {}", job.root().display()))
            .fix("run it inside a repository, or name one with --path"));
    }
    let access = GatewayAccess::of(stack)?;
    job.bring_in_line(context, &access, walked, Mode::Once, stop).await?;

    let mut answers = Vec::new();
    for (at, question) in questions.iter().enumerate() {
        heading(ui, &format!("{}. Ask: {question}", at + 2));
        let started = Instant::now();
        let mut waiter = Waiter::publish(&stack.config, &Request::chat(question, Map::new()), ui).await?;
        let answer = waiter.wait(stop, ANSWER_BOUND).await;
        waiter.close().await;
        let answer = answer?;
        if let Some(failure) = failure(&answer) {
            return Err(failure);
        }
        ui.out("");
        ui.out(spec_text(&answer).trim_end());
        ui.out("");
        summarise(ui, &answer);
        answers.push((answer, started.elapsed()));
    }

    heading(ui, "Citations: does every one name a file and lines that hold the passage?");
    let verified = verify(ui, job, answers.iter().map(|(answer, _)| answer));
    heading(ui, "What it cost");
    show_metrics(ui, stack).await?;
    for ((answer, took), question) in answers.iter().zip(&questions) {
        ui.out(format_args!(
            "  {:.2} s from question to spec {}: {question}",
            took.as_secs_f64(),
            answer.task_id
        ));
    }
    verified
}

fn heading(ui: Ui, text: &str) {
    ui.out("");
    ui.out(paint(BOLD, text));
}

/// Checks all citations against the files on disk.
fn verify<'a>(ui: Ui, job: &Job, answers: impl Iterator<Item = &'a Answer>) -> Result<()> {
    let mut checked = 0;
    let mut faults = Vec::new();
    for answer in answers {
        let cited = citations::of_metadata(answer.metadata.get("citations"))
            .map_err(|why| CliError::failure("the answer's citations cannot be read").because(why))?;
        if cited.is_empty() {
            return Err(CliError::failure(format!("spec {} cites nothing", answer.task_id))
                .because("no passage of the folder fits the question, or the gateway gave none")
                .fix("ask about something the folder is about: --question \"…\""));
        }
        checked += cited.len();
        let wrong = citations::check(job.root(), &cited);
        for citation in &cited {
            match wrong.iter().find(|(fault, _)| fault == citation) {
                None => ui.out(format_args!("  {} {citation}", paint(GREEN, "ok   "))),
                Some((_, why)) => ui.out(format_args!("  {} {citation}: {why}", paint(RED, "WRONG"))),
            }
        }
        faults.extend(wrong);
    }
    if faults.is_empty() {
        ui.out(format_args!("  All {} hold.", count(checked, "citation")));
        return Ok(());
    }
    Err(CliError::failure(format!("{} of {} do not hold", faults.len(), count(checked, "citation")))
        .fix("if you did not edit the files meanwhile, this is a bug of Atlas: please report it"))
}

/// Tokens and latencies from the worker's own metrics page.
async fn show_metrics(ui: Ui, stack: &Stack) -> Result<()> {
    let unreadable = |error: &dyn std::fmt::Display| {
        CliError::failure("the worker's metrics cannot be read").because(error)
    };
    let url = stack
        .worker_url()
        .and_then(|url| url.join("metrics").ok())
        .ok_or_else(|| CliError::failure("the worker's metrics cannot be read"))?;
    let response = reqwest::get(url).await.and_then(reqwest::Response::error_for_status);
    let page = match response {
        Ok(response) => response.text().await.map_err(|error| unreadable(&error))?,
        Err(error) => return Err(unreadable(&error)),
    };
    let samples = metrics::parse(&page);
    let of = |name: &str| samples.iter().filter(|sample| sample.name == name).collect::<Vec<_>>();
    let tokens = of("atlas_tokens_total");
    if tokens.iter().all(|sample| sample.value == 0.0) {
        ui.out("  atlas_tokens_total: 0 (no model was called)");
    }
    for sample in tokens.iter().filter(|sample| sample.value > 0.0) {
        ui.out(format_args!("  atlas_tokens_total{}: {}", labels(sample), thousands(whole(sample.value))));
    }
    let counts = of("atlas_run_seconds_count");
    for (sum, runs) in of("atlas_run_seconds_sum").iter().zip(&counts) {
        if runs.value > 0.0 {
            ui.out(format_args!(
                "  atlas_run_seconds{}: {} runs, {:.2} s on average",
                labels(sum),
                runs.value,
                sum.value / runs.value
            ));
        }
    }
    Ok(())
}

fn labels(sample: &Sample) -> String {
    let labels: Vec<String> = sample.labels.iter().map(|(name, value)| format!("{name}={value}")).collect();
    if labels.is_empty() { String::new() } else { format!("{{{}}}", labels.join(",")) }
}

/// A counter's value: whole, and never negative.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped to what fits")]
fn whole(value: f64) -> u64 {
    value.clamp(0.0, 9e15).round() as u64
}
