//! What operators ask of the store, and what it answers: filters, dead letters, accounts, retention.

use std::time::Duration;

use atlas_shared::{
    TaskId, Tokens,
    config::RetentionConfig,
    ledger::CallKind,
    message::{Answer, AnswerStatus, AnswerType},
};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use uuid::Uuid;

use super::{FinalStatus, RunDetail, RunStatus, RunStore, StoreError};

/// `error_code` of a run that somebody cancelled.
pub const CANCELLED: &str = "cancelled";

/// How long a cancel of a task without a run is remembered: Pub/Sub keeps a message for 31 days at most.
pub(super) const EARLY_CANCEL_KEPT: Duration = Duration::from_hours(32 * 24);
/// Older ones that each new one clears away, so that there are never many.
pub(super) const EARLY_CANCELS_CLEARED: usize = 100;

/// What became of the wish to stop a task.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cancelled {
    /// It is failed, code `cancelled`: just now, or by an earlier wish.
    Ended,
    /// Its worker, named here, is told at its next renewal.
    Stopping(Option<String>),
    /// It has no run yet: its message, when it comes, is answered as cancelled and costs nothing.
    Awaited,
    /// It ended before, and not so.
    Final(FinalStatus),
}

impl Cancelled {
    /// The stable word for it.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Ended => CANCELLED,
            Self::Stopping(_) => "stopping",
            Self::Awaited => "awaited",
            Self::Final(_) => "final",
        }
    }
}

/// Stops a task for good, wherever it is. Idempotent. The answer to its requester carries the request's
/// metadata and goes to its `reply_to`, or to `topic`, as every other answer does.
pub async fn cancel(store: &dyn RunStore, task_id: TaskId, topic: &str) -> Result<Cancelled, StoreError> {
    let request = store.get_run(task_id).await?.map(|detail| detail.request);
    let metadata = request.as_ref().and_then(|request| request.get("metadata")?.as_object());
    let topic = metadata.and_then(|metadata| metadata.get("reply_to")?.as_str()).unwrap_or(topic);
    let mut metadata = metadata.cloned().unwrap_or_else(Map::new);
    metadata.insert("error_code".to_owned(), json!(CANCELLED));
    let answer =
        Answer::bare(task_id, AnswerType::Error, AnswerStatus::Error, "The request was cancelled.", metadata);
    store.cancel_run(task_id, topic, &answer).await?;
    let Some(RunDetail { run, .. }) = store.get_run(task_id).await? else { return Ok(Cancelled::Awaited) };
    Ok(match run.status {
        RunStatus::Failed if run.error_code.as_deref() == Some(CANCELLED) => Cancelled::Ended,
        RunStatus::Failed => Cancelled::Final(FinalStatus::Failed),
        RunStatus::Done => Cancelled::Final(FinalStatus::Done),
        // Not running: it came, or was given back, in this very moment, and its next claim is told.
        RunStatus::Running | RunStatus::Queued | RunStatus::Deferred => Cancelled::Stopping(run.lease_owner),
    })
}

/// Which runs to list; `None` lets everything through.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RunFilter {
    /// Only in this state.
    pub status: Option<RunStatus>,
    /// Only this tenant's.
    pub tenant: Option<String>,
    /// Only with this `error_code`.
    pub error_code: Option<String>,
    /// Only those that ended (or, where they have not, were accepted) at or after this.
    pub since: Option<Timestamp>,
    /// How many at most.
    pub limit: usize,
}

/// What became of the wish to run now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Wake {
    /// The next sweep of any worker takes it, unless the fleet is paused.
    Due,
    /// A worker is at it.
    Running,
    /// It is done or failed, for ever.
    Final,
    /// There is no such run.
    Unknown,
}

/// A row of `token_ledger`: one model call of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LedgerEntry {
    /// Its id.
    pub id: Uuid,
    /// The UTC day that it counts for, `YYYY-MM-DD`.
    pub day: String,
    /// The attempt that reserved it.
    pub attempt: Option<u32>,
    /// The model.
    pub model: String,
    /// What was called.
    pub kind: CallKind,
    /// How it ended, or that it has not.
    pub state: EntryState,
    /// The upper bound that was granted.
    pub reserved: Tokens,
    /// What is booked as spent.
    pub actual: Tokens,
    /// When it was granted.
    pub created_at: Timestamp,
    /// When it ended.
    pub closed_at: Option<Timestamp>,
}

/// The states of a reservation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EntryState {
    /// Open: the call may be under way.
    Reserved,
    /// Booked as the API billed it.
    Settled,
    /// Not billed.
    Released,
    /// Booked in full, because nobody knows what was billed.
    Assumed,
}

impl EntryState {
    /// The word in the database.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Reserved => "reserved",
            Self::Settled => "settled",
            Self::Released => "released",
            Self::Assumed => "assumed",
        }
    }
}

/// Which dead letters to list; `None` lets everything through.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DeadLetterFilter {
    /// Only with this reason.
    pub reason: Option<String>,
    /// Only those that went back to the queue, or only those that did not.
    pub replayed: Option<bool>,
    /// Only those that were received at or after this.
    pub since: Option<Timestamp>,
    /// How many at most.
    pub limit: usize,
}

/// A dead letter without its bytes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DeadLetterRecord {
    /// Id of the row.
    pub id: Uuid,
    /// Name of the subscription that it came from.
    pub source: String,
    /// Stable reason in snake case.
    pub reason: String,
    /// What is wrong, in words.
    pub detail: String,
    /// Size of the message.
    pub bytes: u64,
    /// Its task, where it names one.
    pub task_id: Option<TaskId>,
    /// When it was stored.
    pub received_at: Timestamp,
    /// When it went back to the queue.
    pub replayed_at: Option<Timestamp>,
    /// The task it went back as, where the message could say so.
    pub replayed_as: Option<TaskId>,
}

/// A dead letter with everything.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DeadLetterDetail {
    /// The row.
    pub letter: DeadLetterRecord,
    /// The message, byte for byte, base64.
    pub raw_base64: String,
    /// Its attributes.
    pub attributes: Vec<(String, String)>,
}

/// Which dead letters to delete; every filter must fit, `None` fits all.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct DeadLetterPurge {
    /// Only these.
    pub ids: Option<Vec<Uuid>>,
    /// Only with this reason.
    pub reason: Option<String>,
    /// Only those that were received longer ago than this.
    pub older_than: Option<Duration>,
    /// Also those that were never replayed.
    pub unreplayed: bool,
    /// Count, delete nothing.
    pub dry_run: bool,
}

/// One scope's account of one day.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DayAccount {
    /// The UTC day, `YYYY-MM-DD`.
    pub day: String,
    /// `global`, or `tenant:NAME`.
    pub scope: String,
    /// The limit of the day's last grant (today's: the one in force); `None`: the tenant has none.
    pub limit: Option<Tokens>,
    /// Settled and assumed.
    pub used: Tokens,
    /// Granted and open.
    pub reserved: Tokens,
    /// The assumed part of `used`; `None` where the ledger of that day is purged.
    pub assumed: Option<Tokens>,
    /// The part of chat calls; `None` likewise.
    pub chat: Option<Tokens>,
    /// The part of embedding calls; `None` likewise.
    pub embedding: Option<Tokens>,
}

/// How many rows of each kind one call of `purge_old` deleted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Purged {
    /// Sent answers in the outbox.
    pub outbox: u64,
    /// Checkpoints of final runs.
    pub steps: u64,
    /// Requests of final runs.
    pub requests: u64,
    /// Closed ledger rows.
    pub ledger: u64,
    /// Dead letters that were replayed.
    pub dead_letters: u64,
}

impl Purged {
    /// The rows by kind, as metrics name them.
    pub fn by_kind(self) -> [(&'static str, u64); 5] {
        [
            ("outbox", self.outbox),
            ("steps", self.steps),
            ("requests", self.requests),
            ("ledger", self.ledger),
            ("dead_letters", self.dead_letters),
        ]
    }
}

/// The ages of [`RetentionConfig`] as `purge_old` takes them: milliseconds, or null for "for ever".
pub(super) fn ages(keep: &RetentionConfig) -> Value {
    let ms = |age: Option<Duration>| age.map(|age| u64::try_from(age.as_millis()).unwrap_or(u64::MAX));
    json!({
        "outbox_ms": ms(keep.outbox),
        "steps_ms": ms(keep.steps),
        "requests_ms": ms(keep.requests),
        "ledger_ms": ms(keep.ledger),
        "dead_letters_ms": ms(keep.dead_letters),
    })
}
