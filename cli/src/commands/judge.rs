//! `atlas judge`: a score card for spec files, and a second opinion from a model.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use atlas_shared::{
    Config, TaskId, Tokens,
    config::OpenAiConfig,
    ledger::{self, CallKind, Closing, Ledger, ReserveOutcome, ReserveRequest, Usage},
    model::{Billed, ChatModel, ChatRequest},
    openai::{OpenAiChat, best_response_format},
};
use atlas_worker::agent::{
    judge::{self, Lookup, ScoreCard, Source},
    rubric::{self, CitedText, Mark, Opinion},
};
use serde::Serialize;

use crate::{
    context::Context,
    error::{CliError, Result},
    history::{History, Missing},
    request::read_any,
    ui::{BOLD, DIM, GREEN, RED, Ui, YELLOW, paint, print_error, thousands},
};

/// No spec is longer.
const MAX_FILE_BYTES: usize = 4 << 20;
/// No spec cites more; the others are not looked up.
const MAX_SOURCES: usize = 500;

/// Score spec files: complete, cited, weighed, readable?
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  atlas judge spec.md
  atlas judge specs/*.md --min 90
  atlas judge spec.md --repository ~/src/billing --repository ~/src/shop
  atlas ask \"Design a rate limiter\" | atlas judge - --json
  OPENAI_API_KEY=… atlas judge spec.md --model

Eleven checks without a model; the same file always gets the same card. They tell whether a
document is complete, honest about its sources and readable, not whether it is right:
docs/JUDGE.md explains each. A document that cites next to nothing, few of whose sources hold
or that is not safe scores less than 90, whatever else it has. Cited files and lines are looked
up with git in the commits that the sources name; a commit that is in no --repository costs
nothing, and the card says so.

--model asks OPENAI_MODEL for groundedness and usefulness by the rubric in docs/JUDGE.md. It reads
the cited lines in those commits too, or, where a commit is not at hand, in the files as they are
now, and says so. It costs tokens, and books them in the ledger that workers use, under the same
daily limit.")]
pub(crate) struct Judge {
    /// Markdown files; - reads standard input
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,

    /// Fail (exit code 1) when a file scores less, 0 to 100
    #[arg(long, value_name = "SCORE", value_parser = clap::value_parser!(u32).range(0..=100))]
    min: Option<u32>,

    /// In whose git repository to look for the cited files; may be given more than once
    #[arg(long, alias = "root", value_name = "DIR", default_value = ".")]
    repository: Vec<PathBuf>,

    /// Ask a model too; costs tokens
    #[arg(long)]
    model: bool,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// One file's result, as `--json` prints it.
#[derive(Debug, Serialize)]
struct Judged {
    file: String,
    score: u32,
    #[serde(flatten)]
    card: ScoreCard,
    /// Only with `--model`.
    #[serde(skip_serializing_if = "Option::is_none")]
    opinion: Option<Paid>,
}

/// An opinion and its price.
#[derive(Debug, Serialize)]
struct Paid {
    model: String,
    #[serde(flatten)]
    opinion: Opinion,
    /// What was booked.
    tokens: Tokens,
    /// Sources that the model did not see as they were cited, each with the reason.
    not_as_cited: Vec<String>,
}

impl Judge {
    pub(crate) async fn run(self, context: &Context) -> Result<()> {
        // Every file is read before a model is paid.
        let (mut texts, mut unreadable) = (Vec::new(), Vec::new());
        for path in &self.files {
            match read(path) {
                Ok(text) => texts.push((path.display().to_string(), text)),
                Err(error) => unreadable.push(error),
            }
        }
        for folder in &self.repository {
            if !folder.is_dir() {
                return Err(CliError::usage(format!("{} is no folder", folder.display()))
                    .fix("name a folder of the repository that the documents cite: --repository DIR"));
            }
        }
        let mut history = History::of(&self.repository);
        let court = if self.model { Some(Court::open(context).await?) } else { None };
        let mut results = Vec::new();
        for (file, text) in texts {
            let card = judge::judge_with_sources(&text, &looked_up(&text, &mut history));
            let opinion = match &court {
                Some(court) => Some(court.opinion(&text, &mut history).await?),
                None => None,
            };
            results.push(Judged { file, score: card.score(), card, opinion });
        }
        if self.json {
            context.ui.json(&results)?;
        } else {
            for judged in &results {
                show(context.ui, judged);
            }
        }
        // The others have their cards all the same.
        if let Some(last) = unreadable.pop() {
            unreadable.iter().for_each(print_error);
            return Err(last);
        }
        let Some(min) = self.min else { return Ok(()) };
        let below: Vec<String> = results
            .iter()
            .filter(|judged| judged.score < min)
            .map(|judged| format!("{} ({})", judged.file, judged.score))
            .collect();
        if below.is_empty() {
            return Ok(());
        }
        Err(CliError::failure(format!("below {min}: {}", below.join(", ")))
            .fix("the checks without full marks say what is missing"))
    }
}

/// The document in a file, or in standard input.
fn read(path: &Path) -> Result<String> {
    let stdin = path.as_os_str() == "-";
    let text = read_any(stdin.then_some("-"), (!stdin).then_some(path), MAX_FILE_BYTES)?;
    if text.trim().is_empty() {
        return Err(
            CliError::usage(format!("{} is empty", path.display())).fix("name a document in Markdown")
        );
    }
    Ok(text)
}

/// Whether the sources of a document are where they say.
fn looked_up(markdown: &str, history: &mut History) -> Vec<(Source, Lookup)> {
    let look = |(index, source): (usize, Source)| {
        let found = match lines(history, index, &source) {
            Ok(_) => Lookup::Found,
            Err(Missing::Wrong(why)) => Lookup::Wrong(why),
            Err(Missing::Unknown(why)) => Lookup::NotChecked(why),
        };
        (source, found)
    };
    judge::sources(markdown).into_iter().enumerate().map(look).collect()
}

/// The lines of a source, as its commit has them; `index` counts the document's sources from 0.
fn lines(history: &mut History, index: usize, source: &Source) -> Result<String, Missing> {
    if index < MAX_SOURCES {
        return history.lines(source);
    }
    Err(Missing::Unknown(format!("only the first {MAX_SOURCES} sources are looked up")))
}

fn show(ui: Ui, judged: &Judged) {
    let Judged { file, score, card, opinion } = judged;
    let passed = card.checks.iter().filter(|check| check.passed()).count();
    let color = match score {
        90.. => GREEN,
        70..90 => YELLOW,
        _ => RED,
    };
    ui.out(format_args!(
        "{}  {}  {}",
        paint(BOLD, file),
        paint(color, format_args!("{score} / 100")),
        paint(DIM, format_args!("({}, {passed} of {} checks passed)", card.kind.as_str(), card.checks.len()))
    ));
    for check in &card.checks {
        let mark = if check.passed() { paint(GREEN, "ok") } else { paint(YELLOW, "--") };
        ui.out(format_args!(
            "  {mark}  {:<12} {:>4.0} %  {}",
            check.name,
            (check.score * 100.0).floor(),
            check.detail
        ));
    }
    if let Some(Paid { model, opinion, tokens, not_as_cited }) = opinion {
        ui.out(format_args!("  {model} thinks ({} tokens):", thousands(tokens.0)));
        for (name, Mark { score, reason }) in
            [("groundedness", &opinion.groundedness), ("usefulness", &opinion.usefulness)]
        {
            ui.out(format_args!("      {name:<12}  {score} / 5  {reason}"));
        }
        for (name, list) in [
            ("unsupported", &opinion.unsupported),
            ("missing", &opinion.missing),
            ("not as cited", not_as_cited),
        ] {
            for text in list {
                ui.out(format_args!("      {name:<12}  {text}"));
            }
        }
    }
}

/// A judge model, and the ledger that it is booked in.
struct Court {
    config: Config,
    openai: OpenAiConfig,
    model: OpenAiChat,
    ledger: Arc<dyn Ledger>,
}

impl Court {
    async fn open(context: &Context) -> Result<Self> {
        let config = context.config()?;
        let openai = config.openai.clone().ok_or_else(|| {
            CliError::usage("there is no model to ask")
                .fix("set OPENAI_API_KEY, or OPENAI_BASE_URL for another server")
                .fix("or leave out --model: the score card needs none")
        })?;
        let (model, ledger) = (OpenAiChat::new(&openai)?, ledger::open(&config).await?);
        Ok(Self { config, openai, model, ledger })
    }

    /// Reserve, call, settle: as a worker does, without a run.
    async fn opinion(&self, markdown: &str, history: &mut History) -> Result<Paid> {
        let name = self.openai.models.first().cloned().unwrap_or_default();
        let format = best_response_format(&name, &self.openai.base_url, self.openai.response_format);
        let cited = cited(markdown, history);
        let request = rubric::request(markdown, &cited, format)
            .map_err(|error| CliError::failure("the judge's prompt does not render").because(error))?;
        let request =
            ChatRequest { model: name.clone(), request_id: "judge.1.opinion".to_owned(), ..request };
        let bound = self.model.prompt_tokens_upper_bound(&request.model, &request)
            + Tokens(u64::from(request.max_completion_tokens));
        let reserve = ReserveRequest {
            id: TaskId::random().0,
            task_id: None,
            attempt: None,
            tenant: None,
            model: name.clone(),
            kind: CallKind::Chat,
            tokens: bound,
            limits: self.config.limits,
        };
        let reservation = match self.ledger.reserve(&reserve).await? {
            ReserveOutcome::Granted(reservation) => reservation,
            ReserveOutcome::Denied(denial) => {
                return Err(CliError::failure(format!(
                    "{} of the day's {} tokens are left, and an opinion may cost {}",
                    denial.available, denial.limit, denial.requested
                ))
                .fix("try again after midnight UTC, raise the limit (atlas budget), or leave out --model"));
            }
        };
        let tokens = reservation.tokens;
        let booked = |usage: Option<Usage>| match usage {
            Some(usage) => (Closing::Settled { usage }, usage.total()),
            None => (Closing::Assumed, tokens),
        };
        match self.model.complete(&request).await {
            Ok(answer) => {
                let (closing, cost) = booked(answer.usage);
                self.ledger.close(reservation, closing).await?;
                let opinion =
                    rubric::read(answer.content.as_deref().unwrap_or_default()).ok_or_else(|| {
                        CliError::failure(format!(
                            "{name} gave no marks (it cost {} tokens)",
                            thousands(cost.0)
                        ))
                        .fix("try again, or another OPENAI_MODEL or OPENAI_RESPONSE_FORMAT")
                    })?;
                let not_as_cited = cited.iter().filter_map(not_as_cited).collect();
                Ok(Paid { model: name, opinion, tokens: cost, not_as_cited })
            }
            Err(failure) => {
                let closing = match failure.billed {
                    Billed::Nothing => Closing::Released,
                    Billed::Known(usage) => Closing::Settled { usage },
                    Billed::Unknown => Closing::Assumed,
                };
                self.ledger.close(reservation, closing).await?;
                Err(failure.error.into())
            }
        }
    }
}

/// The lines that the document cites, as its commits have them. Of a commit that is not at hand, as the files
/// have them now: most lines stay where they are, and the model is told.
fn cited(markdown: &str, history: &mut History) -> Vec<CitedText> {
    let read = |(index, source): (usize, Source)| {
        let (text, caveat) = match lines(history, index, &source) {
            Ok(text) => (Some(text), None),
            Err(Missing::Wrong(why)) => (None, Some(why)),
            Err(Missing::Unknown(why)) => (history.lines_now(&source), Some(why)),
        };
        let place = format!("{}:{}-{}", source.path, source.start, source.end);
        CitedText { n: source.n, place, text: text.filter(|text| !text.is_empty()), caveat }
    };
    judge::sources(markdown).into_iter().enumerate().map(read).collect()
}

/// What is to be said of a passage that is not known to be the one that was cited.
fn not_as_cited(cited: &CitedText) -> Option<String> {
    let CitedText { n, place, text, caveat } = cited;
    let why = caveat.as_ref()?;
    let read = if text.is_some() { "read as the file is now" } else { "not read" };
    Some(format!("[{n}] {place}: {read} ({why})"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use std::fs;

    use atlas_test_support::git;

    use super::*;

    #[test]
    fn the_model_reads_what_the_commit_has_and_is_told_where_it_does_not() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("a.md"), "one\ntwo\nthree\n").unwrap();
        git(dir.path(), &["init", "--quiet"]);
        git(dir.path(), &["add", "."]);
        git(dir.path(), &["commit", "--quiet", "-m", "first"]);
        git(dir.path(), &["tag", "first"]);
        let packed = fs::read_to_string(dir.path().join(".git/refs/tags/first")).unwrap();
        let commit = &packed[..12];
        fs::write(dir.path().join("a.md"), "uno\ndue\ntre\n").unwrap();
        let markdown = format!(
            "# T\n\n## Sources\n\n- [1] `a.md:2-3` (x at {commit}…)\n- [2] `a.md:2-3` (x at 0123456789ab…)\n\
             - [3] `a.md:3-3`\n- [4] `a.md:9-9` (x at {commit}…)\n- [5] `../b.md:1-1`\n- [6] nonsense\n"
        );
        let cited = cited(&markdown, &mut History::of(&[dir.path().to_owned()]));
        let texts: Vec<Option<&str>> = cited.iter().map(|cited| cited.text.as_deref()).collect();
        assert_eq!(texts, [Some("two\nthree"), Some("due\ntre"), Some("tre"), None, None]);
        let told: Vec<String> = cited.iter().filter_map(not_as_cited).collect();
        assert_eq!(
            told,
            [
                "[2] a.md:2-3: read as the file is now (commit 0123456789ab is not here)".to_owned(),
                "[3] a.md:3-3: read as the file is now (it names no commit)".to_owned(),
                format!("[4] a.md:9-9: not read (the file has only 3 lines at {commit})"),
                "[5] ../b.md:1-1: not read (it names no commit)".to_owned(),
            ]
        );
    }
}
