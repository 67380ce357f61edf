//! `atlas dlq`: messages that nobody could work on.

use std::{fmt::Write as _, io::Write as _};

use atlas_shared::{
    TaskId,
    message::{self, Inbound},
};
use atlas_worker::store::{
    DeadLetterDetail, DeadLetterFilter, DeadLetterPurge, DeadLetterRecord, RunDetail, RunStatus, RunStore,
};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use bytes::Bytes;
use jiff::Timestamp;
use serde::Serialize;
use serde_json::Value;
use uuid::Uuid;

use crate::{
    again::{self, Again, Requests},
    commands::runs::{MOST_ROWS, open_store, rows},
    context::Context,
    error::{CliError, Result},
    request,
    times::{ago, parse_age, parse_since, seconds},
    ui::{BOLD, Ui, bytes, count, paint, table},
};

/// Of a message so much is shown; `--raw` prints all of it.
const SHOWN_BYTES: usize = 8 << 10;

/// Bytes of a message that is no text, as `show` prints them.
const HEX_BYTES: usize = 512;
/// Rows that one call deletes.
const PURGE_BATCH: usize = 1000;

/// Look at messages that nobody could work on, send them back, delete them
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  atlas dlq list                                     the newest that wait for somebody
  atlas dlq list --reason not_json --json
  atlas dlq show 0190c7e2-3b1f-5a66-9d3e-1c2f7f6a9b10
  atlas dlq show 0190c7e2-3b1f-5a66-9d3e-1c2f7f6a9b10 --raw > message.json
  atlas dlq replay 0190c7e2-3b1f-5a66-9d3e-1c2f7f6a9b10
  atlas dlq replay --all --reason delivery_attempts_exhausted --yes
  atlas dlq purge --older-than 30d                   says what it would delete
  atlas dlq purge --older-than 30d --yes

A message is a dead letter when it breaks the contract (then its publisher must mend it), or when it
was delivered too often (then workers died on it: mend the cause first). It stays in the store until
somebody replays or purges it. Reads the store at SUPABASE_URL, else the embedded one.")]
pub(crate) struct Dlq {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, clap::Subcommand)]
enum Action {
    /// The newest first
    #[command(after_help = "Example:\n  atlas dlq list --since 24h --all")]
    List {
        /// Only with this reason
        #[arg(long, value_name = "REASON")]
        reason: Option<String>,
        /// Only those received since then: an age (2h, 7d), a day or a time
        #[arg(long, value_name = "WHEN", value_parser = parse_since)]
        since: Option<Timestamp>,
        /// Also those that were replayed
        #[arg(short, long)]
        all: bool,
        /// How many at most
        #[arg(short = 'n', long, value_name = "N", default_value_t = 50, value_parser = rows(), allow_negative_numbers = true)]
        limit: usize,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// One dead letter: why it is one, its attributes, its bytes
    Show {
        /// Its id, as `atlas dlq list` prints it
        #[arg(value_name = "ID")]
        id: Uuid,
        /// Print the message only, byte for byte
        #[arg(long, conflicts_with = "json")]
        raw: bool,
        /// Print JSON; the message is base64
        #[arg(long)]
        json: bool,
    },
    /// Send messages back to the request topic
    #[command(after_help = "Examples:
  atlas dlq replay 0190c7e2-3b1f-5a66-9d3e-1c2f7f6a9b10
  atlas dlq replay --all --since 2h              says what it would do
  atlas dlq replay --all --since 2h --yes

The bytes and attributes go back as they came. Only if the message's task has failed meanwhile (a dead
letter fails its run, and a failed run is final), or it names none, the same request goes back as
another task; its id is printed, and metadata.retry_of names the old one. Published first, then marked:
a crash in between sends it twice at worst, which makes one run.")]
    Replay {
        /// Ids, as `atlas dlq list` prints them
        #[arg(value_name = "ID", required_unless_present = "all", conflicts_with = "all")]
        ids: Vec<Uuid>,
        /// All that were not replayed yet
        #[arg(long)]
        all: bool,
        /// With --all: only with this reason
        #[arg(long, value_name = "REASON", requires = "all")]
        reason: Option<String>,
        /// With --all: only those received since then
        #[arg(long, value_name = "WHEN", value_parser = parse_since, requires = "all")]
        since: Option<Timestamp>,
        /// With --all: do it; without it says what would be done
        #[arg(long, requires = "all")]
        yes: bool,
        /// Also what was replayed before, is done, or will be refused again
        #[arg(long, conflicts_with = "all")]
        force: bool,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Delete dead letters for good
    #[command(after_help = "Examples:
  atlas dlq purge --older-than 30d               replayed ones; says how many, deletes nothing
  atlas dlq purge --older-than 30d --yes
  atlas dlq purge --reason not_json --unreplayed --yes
  atlas dlq purge --id 0190c7e2-3b1f-5a66-9d3e-1c2f7f6a9b10 --yes")]
    Purge {
        /// Only these; also if they were never replayed
        #[arg(long = "id", value_name = "ID")]
        ids: Vec<Uuid>,
        /// Only with this reason
        #[arg(long, value_name = "REASON")]
        reason: Option<String>,
        /// Only those received longer ago: 12h, 30d
        #[arg(long, value_name = "AGE", value_parser = parse_age)]
        older_than: Option<std::time::Duration>,
        /// Also those that were never replayed: nobody has them but this table
        #[arg(long)]
        unreplayed: bool,
        /// Delete; without it says how many there are
        #[arg(long)]
        yes: bool,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

impl Dlq {
    pub(crate) async fn run(self, context: &Context) -> Result<()> {
        let store = open_store(context).await?;
        let store = store.as_ref();
        let ui = context.ui;
        match self.action {
            Action::List { reason, since, all, limit, json } => {
                let filter = DeadLetterFilter { reason, replayed: (!all).then_some(false), since, limit };
                let letters = store.list_dead_letters(&filter).await?;
                if json {
                    return ui.json(&letters);
                }
                let filtered = filter.reason.is_some() || filter.since.is_some();
                list(ui, &letters, all, filtered);
                Ok(())
            }
            Action::Show { id, raw, json } => {
                let detail = find(store, id).await?;
                if json {
                    return ui.json(&detail);
                }
                let data = decode(&detail)?;
                if raw {
                    // A closed pipe is the reader's choice.
                    let _ = std::io::stdout().lock().write_all(&data);
                    return Ok(());
                }
                let run = match detail.letter.task_id {
                    Some(task_id) => store.get_run(task_id).await?,
                    None => None,
                };
                show(ui, &detail, &data, run.as_ref());
                Ok(())
            }
            Action::Replay { ids, all, reason, since, yes, force, json } => {
                let filtered = reason.is_some() || since.is_some();
                let ids = if all {
                    let filter = DeadLetterFilter { reason, replayed: Some(false), since, limit: MOST_ROWS };
                    // The oldest first, as they would have been served.
                    store.list_dead_letters(&filter).await?.iter().rev().map(|letter| letter.id).collect()
                } else {
                    ids
                };
                replay(context, store, &ids, Mode { act: !all || yes, force, json, filtered }).await
            }
            Action::Purge { ids, reason, older_than, unreplayed, yes, json } => {
                let named = !ids.is_empty();
                // A mistyped id is told before anything is deleted.
                for id in &ids {
                    find(store, *id).await?;
                }
                let purge = DeadLetterPurge {
                    ids: named.then_some(ids),
                    reason,
                    older_than,
                    unreplayed: unreplayed || named,
                    dry_run: !yes,
                };
                let purged = purge_all(store, &purge).await?;
                if json {
                    return ui.json(&serde_json::json!({ "deleted": yes, "dead_letters": purged }));
                }
                let number = count(usize::try_from(purged).unwrap_or(usize::MAX), "dead letter");
                if yes {
                    ui.out(format_args!("Deleted {number}."));
                } else {
                    ui.out(format_args!("Would delete {number}."));
                    ui.note("Nothing was deleted: add --yes. Deleted is deleted, there is no copy.");
                    if !purge.unreplayed {
                        ui.note("Those that were never replayed are not counted: --unreplayed adds them.");
                    }
                }
                Ok(())
            }
        }
    }
}

/// Deletes in small transactions, or counts in one.
async fn purge_all(store: &dyn RunStore, purge: &DeadLetterPurge) -> Result<u64> {
    if purge.dry_run {
        return Ok(store.purge_dead_letters(purge, MOST_ROWS).await?);
    }
    let mut purged = 0;
    loop {
        let batch = store.purge_dead_letters(purge, PURGE_BATCH).await?;
        purged += batch;
        if batch < PURGE_BATCH as u64 {
            return Ok(purged);
        }
    }
}

async fn find(store: &dyn RunStore, id: Uuid) -> Result<DeadLetterDetail> {
    store.get_dead_letter(id).await?.ok_or_else(|| {
        CliError::failure(format!("there is no dead letter {id} in the store"))
            .because("it was purged, or it is in another store")
            .fix("`atlas dlq list --all` lists what there is")
    })
}

fn decode(detail: &DeadLetterDetail) -> Result<Bytes> {
    let data = BASE64_STANDARD
        .decode(&detail.raw_base64)
        .map_err(|error| CliError::failure("the stored bytes are unreadable").because(error))?;
    Ok(Bytes::from(data))
}

fn list(ui: Ui, letters: &[DeadLetterRecord], all: bool, filtered: bool) {
    if letters.is_empty() {
        ui.note(match (all, filtered) {
            (true, false) => "No dead letters.",
            (false, false) => "No dead letters wait. --all shows replayed ones too.",
            (true, true) => "No dead letter matches the filter: atlas dlq list --all",
            (false, true) => "No dead letter that waits matches the filter. --all shows replayed ones too.",
        });
        return;
    }
    let now = Timestamp::now();
    let rows: Vec<Vec<String>> = letters
        .iter()
        .map(|letter| {
            vec![
                letter.id.to_string(),
                letter.reason.clone(),
                ago(now, letter.received_at),
                bytes(letter.bytes),
                letter.task_id.map(|id| id.to_string()).unwrap_or_default(),
                letter.replayed_at.map(|at| ago(now, at)).unwrap_or_default(),
            ]
        })
        .collect();
    ui.out(table(&["ID", "REASON", "RECEIVED", "SIZE", "TASK", "REPLAYED"], &rows));
}

fn show(ui: Ui, detail: &DeadLetterDetail, data: &[u8], run: Option<&RunDetail>) {
    let DeadLetterRecord { id, source, reason, detail: why, received_at, replayed_at, replayed_as, .. } =
        &detail.letter;
    let field =
        |name: &str, value: &str| ui.out(format_args!("{} {value}", paint(BOLD, format!("{name:<10}"))));
    field("id", &id.to_string());
    field("reason", &format!("{reason}: {}", printable(why)));
    field("source", source);
    field("received", &seconds(*received_at));
    if let Some(task_id) = detail.letter.task_id {
        let state = run.map_or("no run", |run| run.run.status.as_str());
        field("task", &format!("{task_id} ({state})"));
    }
    if let Some(at) = replayed_at {
        let named = replayed_as.map(|task| format!(" as task {task}")).unwrap_or_default();
        field("replayed", &format!("{}{named}", seconds(*at)));
    }
    for (name, value) in &detail.attributes {
        field("attribute", &printable(&format!("{name}={value}")));
    }
    field("size", &bytes(data.len() as u64));
    field("next", &next_step(detail, run));
    ui.out("");
    ui.out(shortened(readable(data), id));
}

/// What a person reads of a message; a broken one can be megabytes.
fn shortened(mut text: String, id: &Uuid) -> String {
    let all = text.len();
    if all > SHOWN_BYTES {
        text.truncate(text.floor_char_boundary(SHOWN_BYTES));
        let left = bytes((all - text.len()) as u64);
        // Writing to a String cannot fail.
        let _ = write!(text, "\n… {left} more: atlas dlq show {id} --raw (or --json)");
    }
    text
}

/// What an operator does about it.
fn next_step(detail: &DeadLetterDetail, run: Option<&RunDetail>) -> String {
    let DeadLetterRecord { id, replayed_at, replayed_as, reason, .. } = &detail.letter;
    if replayed_at.is_some() {
        return match replayed_as {
            Some(task) => format!("atlas runs show {task}"),
            None => "nothing: it went back to the queue".to_owned(),
        };
    }
    match run.map(|run| run.run.status) {
        Some(RunStatus::Done) => {
            format!("nothing is lost: its task is done. atlas dlq purge --id {id} --yes")
        }
        Some(RunStatus::Queued | RunStatus::Running | RunStatus::Deferred) => {
            "nothing: its task is at work".to_owned()
        }
        _ if reason == "delivery_attempts_exhausted" => {
            format!("mend what the workers died of, then: atlas dlq replay {id}")
        }
        _ => format!("its publisher must mend it and publish it anew, then: atlas dlq purge --id {id} --yes"),
    }
}

/// The message for a person: JSON indented, text without control characters, other bytes as hex.
fn readable(data: &[u8]) -> String {
    let Ok(text) = std::str::from_utf8(data) else {
        let mut lines = String::new();
        for (number, line) in data.chunks(16).take(HEX_BYTES / 16).enumerate() {
            let hex: Vec<String> = line.iter().map(|byte| format!("{byte:02x}")).collect();
            let letters: String = line
                .iter()
                .map(|byte| if byte.is_ascii_graphic() || *byte == b' ' { char::from(*byte) } else { '.' })
                .collect();
            // Writing to a String cannot fail.
            let _ = writeln!(lines, "{:08x}  {:<47}  {letters}", number * 16, hex.join(" "));
        }
        if data.len() > HEX_BYTES {
            lines.push_str("… (--raw prints all of it)");
        }
        return lines.trim_end().to_owned();
    };
    match serde_json::from_str::<Value>(text) {
        // Indented JSON escapes control characters itself.
        Ok(value) => serde_json::to_string_pretty(&value).unwrap_or_else(|_| printable(text)),
        Err(_) => printable(text),
    }
}

/// Text that cannot drive a terminal: whoever wrote the message is not trusted.
fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && c != '\n' && c != '\t' { '\u{fffd}' } else { c }).collect()
}

/// How `replay` is done.
#[derive(Clone, Copy)]
struct Mode {
    /// False: say what would be done.
    act: bool,
    force: bool,
    json: bool,
    /// Some of those that wait were not asked for.
    filtered: bool,
}

/// What is to be done about one dead letter.
#[derive(Debug)]
enum Plan {
    /// The bytes as they came.
    AsItCame { task_id: Option<TaskId> },
    /// The same request as another task.
    As { task_id: TaskId, data: Bytes, retry_of: Option<TaskId> },
    /// Nothing: its task was served, or is being served.
    Served { task_id: TaskId, status: RunStatus },
    /// Nothing: it was replayed.
    Replayed { at: Timestamp, task_id: Option<TaskId> },
    /// It would only come back.
    Refused { why: String },
}

/// One line of the result.
#[derive(Debug, Serialize)]
struct Told {
    id: Uuid,
    outcome: &'static str,
    task_id: Option<TaskId>,
    detail: String,
}

async fn replay(context: &Context, store: &dyn RunStore, ids: &[Uuid], mode: Mode) -> Result<()> {
    let ui = context.ui;
    let config = context.config()?;
    // Opened before the first message is looked at: without a queue nothing is tried.
    let requests = Requests::open(&config).await?;
    let mut outcomes = Vec::new();
    for id in ids {
        let detail = find(store, *id).await?;
        let data = decode(&detail)?;
        let plan = plan(store, &detail, &data, config.worker.max_message_bytes, mode.force).await?;
        let outcome = outcome(*id, &plan);
        if mode.act {
            match plan {
                Plan::AsItCame { task_id } => {
                    requests.publish(data, &detail.attributes, None).await?;
                    store.mark_replayed(*id, task_id).await?;
                }
                Plan::As { task_id, data, .. } => {
                    requests.publish(data, &detail.attributes, Some(task_id)).await?;
                    store.mark_replayed(*id, Some(task_id)).await?;
                }
                Plan::Served { task_id, .. } => {
                    store.mark_replayed(*id, Some(task_id)).await?;
                }
                Plan::Replayed { .. } | Plan::Refused { .. } => {}
            }
        }
        if !mode.json {
            let would = if !mode.act && outcome.outcome == "replayed" { "would be " } else { "" };
            ui.out(format_args!("{id}  {would}{}", outcome.detail));
        }
        outcomes.push(outcome);
    }
    if mode.json {
        ui.json(&outcomes)?;
    }
    if ids.is_empty() {
        ui.note(if mode.filtered {
            "No dead letter that waits matches the filter."
        } else {
            "No dead letters wait."
        });
    }
    let number = |word| outcomes.iter().filter(|told| told.outcome == word).count();
    let refused = number("refused");
    if !mode.act && !ids.is_empty() {
        let (sent, served) = (number("replayed"), number("served"));
        let mut would = Vec::new();
        if sent > 0 {
            would.push(format!("replay {}", count(sent, "dead letter")));
        }
        if served > 0 {
            would
                .push(format!("put down {} as replayed, with nothing to send", count(served, "dead letter")));
        }
        ui.note(match would.as_slice() {
            [] => "Nothing was sent, and --yes would send nothing either.".to_owned(),
            would => format!("Nothing was sent: add --yes to {}.", would.join(", and ")),
        });
        if refused > 0 {
            ui.note(format_args!(
                "{} would be refused again and stay here: mend the publisher and publish anew. If the workers have \
                 changed since: atlas dlq replay ID --force",
                count(refused, "message")
            ));
        }
    }
    if refused > 0 && mode.act {
        return Err(CliError::failure(format!("{} would be refused again", count(refused, "message")))
            .because("workers would put it back into the dead letters")
            .fix("mend the publisher and publish it anew; `atlas dlq show ID --raw` gives the bytes")
            .fix("if the workers have changed since: atlas dlq replay ID --force"));
    }
    Ok(())
}

async fn plan(
    store: &dyn RunStore,
    detail: &DeadLetterDetail,
    data: &Bytes,
    max_bytes: usize,
    force: bool,
) -> Result<Plan> {
    let letter = &detail.letter;
    if let (Some(at), false) = (letter.replayed_at, force) {
        return Ok(Plan::Replayed { at, task_id: letter.replayed_as });
    }
    let (task, named) = match (message::parse(data, "1", max_bytes), message::parse(data, "2", max_bytes)) {
        // A message that names no task is named by its id in the queue, which is another one each time.
        (Ok(Inbound::Chat(task)), Ok(Inbound::Chat(same))) => {
            let named = task.task_id == same.task_id;
            (task, named)
        }
        (Ok(_), _) => return Ok(Plan::AsItCame { task_id: None }),
        (Err(_), _) if force => {
            // Named here, because the queue would name it anew: by the letter's own id, so that doing it
            // twice makes one run.
            let task_id = letter.task_id.unwrap_or(TaskId(letter.id));
            return Ok(match request::name(data, task_id) {
                Some(data) => Plan::As { task_id, data, retry_of: None },
                None => Plan::AsItCame { task_id: request::named(data) },
            });
        }
        (Err(rejection), _) => return Ok(Plan::Refused { why: rejection.to_string() }),
    };
    // Without an id in the message a second replay would be a second task: the letter's own id names it.
    let task_id = if named { task.task_id } else { letter.task_id.unwrap_or(TaskId(letter.id)) };
    let renamed = |task_id, retry_of| Plan::As {
        task_id,
        data: again::renamed(task.raw.clone(), task_id, retry_of),
        retry_of,
    };
    match store.get_run(task_id).await? {
        None if named => Ok(Plan::AsItCame { task_id: Some(task_id) }),
        None => Ok(renamed(task_id, None)),
        Some(failed) if failed.run.status == RunStatus::Failed => match again::follow(store, failed).await? {
            Again::Publish { task_id, of } => Ok(renamed(task_id, Some(of.run.task_id))),
            Again::Already(run) => Ok(Plan::Served { task_id: run.task_id, status: run.status }),
        },
        Some(done) if force && done.run.status == RunStatus::Done => {
            Ok(renamed(TaskId::random(), Some(task_id)))
        }
        Some(run) => Ok(Plan::Served { task_id, status: run.run.status }),
    }
}

fn outcome(id: Uuid, plan: &Plan) -> Told {
    let (outcome, task_id, detail) = match plan {
        Plan::AsItCame { task_id: Some(task_id) } => {
            ("replayed", Some(*task_id), format!("replayed as it came: atlas runs show {task_id}"))
        }
        Plan::AsItCame { task_id: None } => ("replayed", None, "replayed as it came".to_owned()),
        Plan::As { task_id, retry_of: Some(of), .. } => (
            "replayed",
            Some(*task_id),
            format!("replayed as task {task_id}, because {of} has ended: atlas runs show {task_id}"),
        ),
        Plan::As { task_id, retry_of: None, .. } => {
            ("replayed", Some(*task_id), format!("replayed as task {task_id}: atlas runs show {task_id}"))
        }
        Plan::Served { task_id, status } => (
            "served",
            Some(*task_id),
            format!("nothing to send: task {task_id} is {}; put down as replayed", status.as_str()),
        ),
        Plan::Replayed { at, task_id } => (
            "replayed_before",
            *task_id,
            format!(
                "was replayed at {}{}; --force sends it again",
                seconds(*at),
                task_id.map(|id| format!(" as task {id}")).unwrap_or_default()
            ),
        ),
        Plan::Refused { why } => {
            ("refused", None, format!("not sent, it would be refused again: {}", printable(why)))
        }
    };
    Told { id, outcome, task_id, detail }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_large_message_does_not_flood_the_terminal() {
        let id = Uuid::nil();
        assert_eq!(shortened("short".to_owned(), &id), "short");
        let shown = shortened("é".repeat(1 << 20), &id);
        assert!(shown.len() < SHOWN_BYTES + 200, "{}", shown.len());
        assert!(
            shown.ends_with(&format!("more: atlas dlq show {id} --raw (or --json)")),
            "{}",
            &shown[SHOWN_BYTES..]
        );
    }

    #[test]
    fn a_message_cannot_drive_the_terminal() {
        assert_eq!(readable(b"\x1b[2Jno json"), "\u{fffd}[2Jno json");
        assert_eq!(readable(br#"{"a":"\u001b[2J"}"#), "{\n  \"a\": \"\\u001b[2J\"\n}");
        assert_eq!(
            readable(b"\xff\x00ab"),
            "00000000  ff 00 61 62                                      ..ab"
        );
        assert!(readable(&[0xff; 2000]).ends_with("(--raw prints all of it)"));
    }
}
