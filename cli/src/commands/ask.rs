//! `atlas ask`: publishes a request, shows the stages as they happen, prints the spec.

use std::{
    fs,
    io::IsTerminal as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use atlas_shared::{
    Config, TaskId,
    message::{Answer, AnswerStatus, AnswerType},
};
use atlas_worker::queue::{self, AnswerStream};
use serde_json::{Map, Value, json};

use crate::{
    commands::publish::queue_config,
    context::Context,
    error::{CliError, Result},
    live::LiveText,
    request::{Request, read_text},
    signals::Stop,
    stack::{Parts, Stack, running_dev},
    ui::{DIM, GREEN, Ui, paint, thousands},
};

/// How long a stack of our own may take to give a request back after Ctrl-C.
const GIVE_BACK: Duration = Duration::from_secs(1);

/// Ask for an architecture spec and wait for it
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  atlas ask \"Design a rate limiter for our public API\"
  atlas ask \"Design a rate limiter\" --out rate-limiter.md
  cat request.md | atlas ask -
  atlas ask \"Use Redis instead\" --parent 67e55044-10b1-426f-9247-bb680e5fe0c8
  atlas ask \"Caching in the gateway\" --kind adr

Without --kind and --parent the request's first sentences decide what kind of document is written
(\"Design …\": a spec, \"Kafka or NATS?\": a decision record, \"Review our …\": a review); the first
stages say which.

The spec goes to standard output, the stages to standard error. Citations come from what
`atlas index` has indexed. On a terminal the text is shown while it is written (--live). With PUBSUB_PROJECT_ID the request goes to the fleet; else the running
`atlas dev` serves it; else this command starts the embedded stack for this one question.
Ctrl-C leaves the request in place: `atlas runs show ID` gives the answer later.")]
pub(crate) struct Ask {
    /// What to design, in words; - reads standard input
    request: String,

    /// Write the spec to FILE instead of standard output
    #[arg(short, long, value_name = "FILE")]
    out: Option<PathBuf>,

    /// Collection to search [env: RAG_COLLECTION] [default: atlas]
    #[arg(short, long, value_name = "NAME")]
    collection: Option<String>,

    /// Refine the spec of this earlier task, which must be done
    #[arg(long, value_name = "ID")]
    parent: Option<TaskId>,

    /// What kind: spec, adr, review, refine [default: chosen from the request]
    #[arg(long, value_name = "KIND")]
    kind: Option<String>,

    /// Model to use instead of OPENAI_MODEL
    #[arg(long, value_name = "NAME")]
    model: Option<String>,

    /// Give up waiting after this many seconds; the request stays
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    timeout: u64,

    /// Print the whole answer message as JSON, also one that says why there is no spec
    #[arg(long)]
    json: bool,

    /// Show the text while it is written, on standard error: auto (on a terminal), always, never
    #[arg(long, value_enum, default_value_t, value_name = "WHEN", hide_possible_values = true)]
    live: Live,
}

/// When to show text while it is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
enum Live {
    /// When a person looks at standard error.
    #[default]
    Auto,
    /// Always.
    Always,
    /// Never.
    Never,
}

impl Live {
    fn wanted(self, ui: Ui) -> bool {
        match self {
            Self::Auto => !ui.quiet && std::io::stderr().is_terminal(),
            Self::Always => true,
            Self::Never => false,
        }
    }
}

impl Ask {
    pub(crate) async fn run(self, context: &Context) -> Result<()> {
        let config = queue_config(context)?;
        let content = read_text(Some(&self.request), None, config.worker.max_message_bytes)?;
        if let Some(path) = &self.out {
            check_writable(path)?;
        }
        let request = Request::chat(&content, self.metadata(context.ui));
        let mut stop = Stop::listen()?;
        let stack = stop.unless_stopped(self.stack(context)).await?;
        let answer = self.ask(&config, &request, context, &mut stop).await;
        if let Some(stack) = stack {
            stack.stop().await;
        }
        let answer = answer?;
        let failure = failure(&answer);
        if failure.is_none() || self.json {
            self.deliver(context.ui, &answer)?;
        }
        failure.map_or(Ok(()), Err)
    }

    /// A stack for this question, where nothing else serves it.
    async fn stack(&self, context: &Context) -> Result<Option<Stack>> {
        if context.is_set("PUBSUB_PROJECT_ID") || running_dev(context).await.is_some() {
            return Ok(None);
        }
        context.ui.detail("Nothing runs here: starting the embedded stack for this question.");
        let stack = own_stack(context).await?;
        warn_if_nothing_is_indexed(context.ui, &stack, self.collection.as_deref()).await;
        Ok(Some(stack))
    }

    async fn ask(
        &self,
        config: &Config,
        request: &Request,
        context: &Context,
        stop: &mut Stop,
    ) -> Result<Answer> {
        let mut waiter = stop.unless_stopped(Waiter::publish(config, request, context.ui)).await?;
        let answer = waiter.wait(stop, Duration::from_secs(self.timeout)).await;
        waiter.close().await;
        answer
    }

    fn metadata(&self, ui: Ui) -> Map<String, Value> {
        let mut metadata = Map::new();
        if self.live.wanted(ui) {
            metadata.insert("stream".to_owned(), json!(true));
        }
        let parent = self.parent.map(|parent| parent.to_string());
        for (name, value) in [
            ("collection", self.collection.as_ref()),
            ("parent_id", parent.as_ref()),
            ("kind", self.kind.as_ref()),
            ("model", self.model.as_ref()),
        ] {
            if let Some(value) = value {
                metadata.insert(name.to_owned(), json!(value));
            }
        }
        metadata
    }

    fn deliver(&self, ui: Ui, answer: &Answer) -> Result<()> {
        let text = if self.json {
            serde_json::to_string_pretty(answer)
                .map_err(|error| CliError::failure("cannot write the answer as JSON").because(error))?
        } else {
            spec_text(answer).trim_end().to_owned()
        };
        match &self.out {
            Some(path) => {
                fs::write(path, format!("{text}\n")).map_err(|error| {
                    CliError::failure(format!("cannot write {}", path.display()))
                        .because(error)
                        .fix(format!("the spec is stored: atlas runs show {} --spec", answer.task_id))
                })?;
                ui.note(format_args!("Written to {}", path.display()));
            }
            None => ui.out(text),
        }
        if answer.msg_type == AnswerType::Spec {
            summarise(ui, answer);
        }
        Ok(())
    }
}

/// Why an answer is no spec.
pub(crate) fn failure(answer: &Answer) -> Option<CliError> {
    let id = answer.task_id;
    match answer.msg_type {
        AnswerType::Spec => None,
        AnswerType::Error => {
            let code = answer.metadata.get("error_code").and_then(Value::as_str).unwrap_or("error");
            Some(
                CliError::failure(format!("the request failed ({code})"))
                    .because(spec_text(answer))
                    .fix(format!("the whole story: atlas runs show {id}")),
            )
        }
        AnswerType::Progress | AnswerType::Control => Some(
            CliError::failure("today's token budget is used up; the request waits for more")
                .because(spec_text(answer))
                .fix("see it: atlas budget show")
                .fix(format!("get it later: atlas runs show {id}")),
        ),
    }
}

/// A stack in this process for one question. It must not hold the user up after Ctrl-C.
async fn own_stack(context: &Context) -> Result<Stack> {
    let mut config = context.embedded_config(&[])?;
    config.gateway.listen = ([127, 0, 0, 1], 0).into();
    config.worker.listen = ([127, 0, 0, 1], 0).into();
    config.worker.drain_timeout = config.worker.drain_timeout.min(GIVE_BACK);
    Box::pin(Stack::start(config, Parts::All, "ask", context.ui)).await
}

/// The text of an answer.
pub(crate) fn spec_text(answer: &Answer) -> &str {
    answer.content.as_str().unwrap_or_default()
}

/// A spec without passages is worth less: say so before it is written.
async fn warn_if_nothing_is_indexed(ui: Ui, stack: &Stack, collection: Option<&str>) {
    let Ok(client) = stack.client() else { return };
    let name = collection.unwrap_or(&stack.config.rag.collection);
    if let Ok(collections) = client.collections().await
        && !collections.iter().any(|info| info.name == name && info.chunks > 0)
    {
        ui.note(format_args!(
            "Nothing is indexed in collection {name}: the spec will have no citations. First: atlas index ."
        ));
    }
}

fn check_writable(path: &Path) -> Result<()> {
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    if folder.is_dir() && !path.is_dir() {
        return Ok(());
    }
    Err(CliError::usage(format!("cannot write to {}", path.display()))
        .because(if path.is_dir() { "it is a folder" } else { "its folder does not exist" })
        .fix("name a file in a folder that exists"))
}

/// Waits for the answer to one published request and shows what happens meanwhile.
pub(crate) struct Waiter {
    task_id: TaskId,
    answers: Box<dyn AnswerStream>,
    started: Instant,
    live: LiveText,
    /// Whether it was told what kind of document is written.
    told_kind: bool,
    ui: Ui,
}

impl Waiter {
    /// Watches, then publishes: no answer can be missed.
    pub(crate) async fn publish(config: &Config, request: &Request, ui: Ui) -> Result<Self> {
        let Some(task_id) = request.task_id else {
            return Err(CliError::usage("the request names no task, so its answer cannot be recognised"));
        };
        let answers = Box::pin(queue::watch_answers(config, task_id)).await?;
        let started = Instant::now();
        let waiter = Self { task_id, answers, started, live: LiveText::default(), told_kind: false, ui };
        if let Err(error) = Box::pin(request.publish(config)).await {
            waiter.close().await;
            return Err(error);
        }
        waiter.stage(&format!("published as {task_id}"));
        Ok(waiter)
    }

    /// The message that ends the waiting: the spec, or [why there is none](failure) (yet).
    pub(crate) async fn wait(&mut self, stop: &mut Stop, bound: Duration) -> Result<Answer> {
        let later = format!("get it later: atlas runs show {}", self.task_id);
        let deadline = tokio::time::sleep(bound);
        tokio::pin!(deadline);
        loop {
            let answer = tokio::select! {
                answer = self.answers.next() => {
                    answer.map_err(|error| CliError::from(error).fix(&later))?
                }
                () = stop.requested() => {
                    return Err(CliError::interrupted("stopped waiting; the request stays in the queue")
                        .fix(later)
                        .fix("if no fleet serves the queue, `atlas dev` does"));
                }
                () = &mut deadline => {
                    return Err(CliError::failure(format!("no spec after {} s; the request stays in the queue", bound.as_secs()))
                        .because("the work takes longer, or no worker pulls (`atlas doctor` says)")
                        .fix(later));
                }
            };
            if answer.msg_type == AnswerType::Progress
                && answer.metadata.get("stage").and_then(Value::as_str) == Some("text")
            {
                if let Some(printed) = self.live.take(&answer.metadata, spec_text(&answer)) {
                    if printed.starts_anew {
                        self.ui.note("");
                        self.stage("written anew");
                    }
                    self.ui.write(paint(DIM, printed.text));
                }
                continue;
            }
            if self.live.shown {
                self.ui.note("");
            }
            if !self.told_kind
                && let Some(line) = kind_line(&answer.metadata)
            {
                self.stage(&line);
                self.told_kind = true;
            }
            match (answer.msg_type, status(&answer)) {
                (AnswerType::Spec, _) => {
                    if self.live.shown {
                        self.stage("finished; what counts is the checked document, with its sources");
                    }
                    return Ok(answer);
                }
                (AnswerType::Error, _) | (AnswerType::Progress, Some(AnswerStatus::Deferred)) => {
                    return Ok(answer);
                }
                (AnswerType::Progress | AnswerType::Control, _) => self.stage(spec_text(&answer)),
            }
        }
    }

    /// Stops watching.
    pub(crate) async fn close(self) {
        self.answers.close().await;
    }

    fn stage(&self, text: &str) {
        let at = format!("{:>6.1} s", self.started.elapsed().as_secs_f64());
        self.ui.note(format_args!("{}  {text}", paint(DIM, at)));
    }
}

fn status(answer: &Answer) -> Option<AnswerStatus> {
    serde_json::from_value(answer.metadata.get("status")?.clone()).ok()
}

/// What kind of document is written, and who chose it. A guess is told, so that a wrong one can be stopped
/// before it is paid.
fn kind_line(metadata: &Map<String, Value>) -> Option<String> {
    let [kind, from] = ["kind", "kind_from"].map(|name| metadata.get(name).and_then(Value::as_str));
    let (kind, from) = (kind?, from?);
    let document = match kind {
        "spec" => "an architecture spec",
        "adr" => "a decision record",
        "review" => "a review",
        "refine" => "a refinement of the parent's spec",
        other => other,
    };
    Some(if from == "request" {
        format!("writing {document} ({kind}, chosen from the request; `atlas ask --kind` sets another)")
    } else {
        format!("writing {document} ({kind}, as set)")
    })
}

/// One line about what it cost and how far it can be trusted.
pub(crate) fn summarise(ui: Ui, answer: &Answer) {
    let metadata = &answer.metadata;
    let mut facts = Vec::new();
    if let Some(model) = metadata.get("model").and_then(Value::as_str) {
        facts.push(model.to_owned());
    }
    if let Some(tokens) = metadata.get("tokens").and_then(Value::as_u64) {
        facts.push(format!("{} tokens", thousands(tokens)));
    }
    if let Some(citations) = metadata.get("citations").and_then(Value::as_array) {
        facts.push(format!("{} citations", citations.len()));
    }
    ui.note(format_args!("{} {}  ({})", paint(GREEN, "done"), answer.task_id, facts.join(", ")));
    if metadata.get("context_degraded").is_some_and(|degraded| *degraded == true) {
        let why = metadata.get("context_degraded_reason").and_then(Value::as_str).unwrap_or_default();
        ui.warn(format_args!("The passages are less than they could be. {why}"));
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn what_is_written_is_told_with_who_chose_it() {
        let line = |metadata: Value| kind_line(metadata.as_object().unwrap());
        assert_eq!(
            line(json!({"kind": "adr", "kind_from": "request"})).unwrap(),
            "writing a decision record (adr, chosen from the request; `atlas ask --kind` sets another)"
        );
        assert_eq!(
            line(json!({"kind": "review", "kind_from": "metadata"})).unwrap(),
            "writing a review (review, as set)"
        );
        assert_eq!(
            line(json!({"kind": "refine", "kind_from": "metadata"})).unwrap(),
            "writing a refinement of the parent's spec (refine, as set)"
        );
        // The request's own metadata comes back with every message; a worker that knows says who chose.
        assert_eq!(line(json!({"kind": "adr"})), None);
        assert_eq!(line(json!({})), None);
    }

    #[test]
    fn a_file_that_cannot_be_written_is_found_before_the_question_is_asked() {
        let dir = tempfile::tempdir().unwrap();
        assert!(check_writable(&dir.path().join("spec.md")).is_ok());
        assert!(check_writable(Path::new("spec.md")).is_ok());
        assert!(check_writable(dir.path()).unwrap_err().to_string().contains("it is a folder"));
        let missing = check_writable(&dir.path().join("no/spec.md")).unwrap_err();
        assert!(missing.to_string().contains("does not exist"));
    }
}
