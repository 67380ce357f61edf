//! Where the truth is: runs, results, ledger, outbox and dead letters (DESIGN section 6).
//!
//! Every method is one round trip and one transaction. The store's clock decides leases, days and
//! due times; a worker's clock decides nothing. Nothing outside this folder names an adapter;
//! [`open`] picks one by configuration.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use atlas_shared::{
    Config, Ledger, TaskId, Tokens, UpstreamError, WorkerId,
    config::{RetentionConfig, StoreConfig},
    ledger::{BudgetState, Closing, LedgerError, Limits, NewLimit, Usage},
    message::Answer,
    sqlite::Database,
};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use uuid::Uuid;

mod operator;
mod sqlite;
mod supabase;

pub use operator::{
    CANCELLED, Cancelled, DayAccount, DeadLetterDetail, DeadLetterFilter, DeadLetterPurge, DeadLetterRecord,
    EntryState, LedgerEntry, Purged, RunFilter, Wake, cancel,
};
pub use sqlite::SqliteStore;
pub use supabase::SupabaseStore;

/// How long a row that `finish_run` or `defer_run` wrote is left to its writer before sweepers see it.
pub const OUTBOX_HOLD: Duration = Duration::from_secs(30);

/// The store that the configuration names.
pub async fn open(config: &Config) -> Result<Arc<dyn RunStore>, UpstreamError> {
    match &config.store {
        StoreConfig::Embedded(dir) => Ok(Arc::new(SqliteStore::new(Database::open(dir).await?))),
        StoreConfig::Supabase(config) => Ok(Arc::new(SupabaseStore::new(config)?)),
    }
}

/// A JSON document as text: made once, by the run it belongs to, then stored and sent as it is. What is in
/// it counts, not how it is written.
#[derive(Clone, Debug)]
pub struct Json(Arc<str>);

impl Json {
    /// The document that `value` is.
    pub fn of<T: Serialize + ?Sized>(value: &T) -> Result<Self, serde_json::Error> {
        Ok(Self(serde_json::to_string(value)?.into()))
    }

    /// As text.
    pub fn text(&self) -> &str {
        &self.0
    }

    /// As a value; null where it is no JSON, which only a store that somebody wrote into can hold.
    pub fn value(&self) -> Value {
        serde_json::from_str(&self.0).unwrap_or(Value::Null)
    }
}

impl From<String> for Json {
    fn from(text: String) -> Self {
        Self(text.into())
    }
}

impl From<Value> for Json {
    fn from(value: Value) -> Self {
        Self(value.to_string().into())
    }
}

impl PartialEq for Json {
    fn eq(&self, other: &Self) -> bool {
        self.0 == other.0 || self.value() == other.value()
    }
}

impl PartialEq<Value> for Json {
    fn eq(&self, other: &Value) -> bool {
        self.value() == *other
    }
}

impl Serialize for Json {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.value().serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Json {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Value::deserialize(deserializer).map(Self::from)
    }
}

/// Why a store call did not do what was asked.
pub type StoreError = LedgerError;

/// The right to work on one run, until it expires. A worker that claims a run *holds* this value;
/// `finish`, `defer` and `release` take it by value, so a run ends once.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// Whose run.
    pub task_id: TaskId,
    /// The fencing token: grows by one with every claim. Every write names it, and a write with a
    /// stale one is refused.
    pub attempt: u32,
    /// Until when, by the store's clock.
    pub lease_until: Timestamp,
}

impl Lease {
    /// The same lease again, for a retry of a call that takes it: the store knows the call by its
    /// attempt and carries it out once.
    pub(crate) fn again(&self) -> Self {
        Self { task_id: self.task_id, attempt: self.attempt, lease_until: self.lease_until }
    }
}

/// Asks for a run by message.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ClaimRequest {
    /// Which run.
    pub task_id: TaskId,
    /// Chosen by the caller, a fresh UUID a delivery: a retry of a claim that timed out gets the same
    /// lease back instead of [`Claim::Held`].
    pub claim_id: Uuid,
    /// The request as it came, with `task_id`: stored in `architect_in.data` by the first claim.
    pub message: Value,
    /// Whose budget, if any.
    pub tenant: Option<String>,
    /// Who asked: attribute `requester`, if any.
    pub requester: Option<String>,
    /// Who claims.
    pub worker: WorkerId,
    /// How long the lease lasts.
    #[serde(with = "millis")]
    pub lease: Duration,
}

/// The answer to a [`ClaimRequest`].
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
#[expect(clippy::large_enum_variant, reason = "matched at once, never kept")]
pub enum Claim {
    /// Ours now: work.
    Claimed(ClaimedRun),
    /// Finished before. `unsent` says that its answer still waits in the outbox.
    Finished {
        /// True when the outbox holds an unsent answer of this run.
        unsent: bool,
    },
    /// Another worker is at it, or it waits in the store for its time (deferred, retry, fleet
    /// paused): it is safe there, so the message can be acked.
    Held,
}

/// A run that is ours.
#[derive(Debug, Serialize, Deserialize)]
pub struct ClaimedRun {
    /// The right to work on it.
    pub lease: Lease,
    /// The stored request.
    pub message: Value,
    /// What earlier attempts finished, by step name: never paid again.
    pub steps: Vec<Checkpoint>,
    /// The finished spec that `metadata.parent_id` names (its `architect_out.data`), if there is one.
    pub parent: Option<Value>,
    /// What the run's calls have billed so far (settled and assumed).
    pub spent: Tokens,
    /// True when another worker's lease on it had expired.
    pub taken_over: bool,
    /// How many earlier attempts ended as `deferred`: these are no failures, so an attempt limit
    /// does not count them.
    pub deferrals: u32,
    /// True: somebody cancelled it while nobody could be told, or before its message came. Finish it as
    /// failed, code `cancelled`.
    pub cancel_requested: bool,
}

/// A finished step of a run (`run_steps`).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Checkpoint {
    /// Step name, unique in the run: `draft.0`, `repair.0`, ….
    pub step: String,
    /// Hash of what went in, for the reader of a trace.
    pub input_hash: String,
    /// What came out, with all that is needed to go on from here without calling again. In the last step of a
    /// finished run only a mark: the answer says what came out.
    pub output: Json,
    /// What it billed.
    pub usage: Usage,
}

/// The end of a reservation, in the same transaction as what the call brought.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Settlement {
    /// Row in `token_ledger`.
    pub reservation_id: Uuid,
    /// How it ends.
    pub closing: Closing,
}

/// The final state of a run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Finish {
    /// Done or failed.
    pub status: FinalStatus,
    /// The [`Answer`]: a row in `architect_out`, and a row in the outbox, in this transaction. Written down by
    /// whoever finishes, once: calls of the embedded store share one thread.
    pub answer: Json,
    /// Topic of the answer, short name.
    pub topic: String,
    /// Attributes of the message (`traceparent` included).
    pub attributes: Vec<(String, String)>,
    /// The model that wrote it.
    pub model: Option<String>,
    /// `error_code` of a failed run.
    pub error_code: Option<String>,
    /// `error_message` of a failed run.
    pub error_message: Option<String>,
    /// The last call's settlement, so that a run with one call costs three round trips.
    pub settlement: Option<Settlement>,
    /// The last call's checkpoint.
    pub checkpoint: Option<Checkpoint>,
}

/// The two final states of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinalStatus {
    /// With a spec.
    Done,
    /// With an error answer.
    Failed,
}

/// Any state of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunStatus {
    /// Accepted, no lease: waits for a worker.
    Queued,
    /// Leased.
    Running,
    /// The day's budget is gone; waits for `not_before` or for tokens.
    Deferred,
    /// Final.
    Done,
    /// Final.
    Failed,
}

impl std::str::FromStr for RunStatus {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        [Self::Queued, Self::Running, Self::Deferred, Self::Done, Self::Failed]
            .into_iter()
            .find(|status| status.as_str() == text)
            .ok_or_else(|| {
                format!("{text:?} is no state of a run: use queued, running, deferred, done or failed")
            })
    }
}

impl RunStatus {
    /// The word in the database and in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Running => "running",
            Self::Deferred => "deferred",
            Self::Done => "done",
            Self::Failed => "failed",
        }
    }
}

/// The answer to a renewal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Renewal {
    /// False: the run is another worker's now. Stop, write nothing.
    pub held: bool,
    /// True: somebody cancelled it. Stop, and finish it as failed with code `cancelled`.
    pub cancel_requested: bool,
}

/// A message that waits to be published.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OutboxRow {
    /// Row id.
    pub id: Uuid,
    /// Whose answer.
    pub task_id: TaskId,
    /// Short name of the topic.
    pub topic: String,
    /// The answer.
    pub message: Json,
    /// Attributes.
    pub attributes: Vec<(String, String)>,
}

/// What a finished or deferred run left to do: publish this row, then mark it sent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Published {
    /// The outbox row that the transaction wrote, leased to the caller for a short while so that a
    /// sweeper does not send it at the same moment.
    pub outbox: OutboxRow,
}

/// A message that cannot be worked on.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DeadLetter {
    /// Id of the row: the same for every delivery of the message, so that a redelivery adds none.
    pub id: Uuid,
    /// Where it came from: a subscription's name.
    pub source: String,
    /// Stable reason in snake case.
    pub reason: String,
    /// What is wrong, in words.
    pub detail: String,
    /// The raw bytes, base64.
    pub raw_base64: String,
    /// Its attributes.
    pub attributes: Vec<(String, String)>,
    /// Its task, where it names one. A run of that task that is not finished is failed with it when
    /// `fails_run` is set.
    pub task_id: Option<TaskId>,
    /// True for messages that came from the dead-letter topic: their run will never finish.
    pub fails_run: bool,
    /// Messages to publish (an `error` answer, an `escalate`), put into the outbox in the same
    /// transaction, only when the row is new: (topic, answer).
    pub announce: Vec<(String, Answer)>,
}

/// The fleet's shared state: settings that control messages change, and today's account.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FleetState {
    /// True: nobody starts runs.
    pub paused: bool,
    /// Today's account of the whole fleet.
    pub budget: BudgetState,
    /// The limit a run in force.
    pub run_limit: Tokens,
    /// Runs that wait for tokens.
    pub deferred_runs: u64,
    /// Runs that wait for a worker.
    pub queued_runs: u64,
    /// Runs that are leased.
    pub running_runs: u64,
    /// Outbox rows that were not sent yet.
    pub outbox_unsent: u64,
    /// Seconds the oldest unsent outbox row has waited.
    pub outbox_oldest_seconds: u64,
    /// Rows in `dead_letters` that were not replayed.
    pub dead_letters: u64,
    /// Grows whenever somebody asks to flush the caches.
    pub cache_generation: u64,
}

/// A run at work that somebody cancelled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct CancelledRun {
    /// Its task.
    pub task_id: TaskId,
    /// The attempt that is at work.
    pub attempt: u32,
}

/// A change of the fleet's settings. `None` leaves a setting as it is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct FleetChange {
    /// New daily limit.
    pub daily_limit: Option<NewLimit>,
    /// New limit a run.
    pub run_limit: Option<NewLimit>,
    /// Pause or resume.
    pub paused: Option<bool>,
    /// Ask every gateway to flush its caches.
    pub flush_cache: bool,
    /// New limit of one tenant, from today on.
    pub tenant_limit: Option<TenantLimit>,
}

/// What one tenant may use a day. Kept in `token_days`; each new day starts with the last one set.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TenantLimit {
    /// Whose.
    pub tenant: String,
    /// Tokens a day; `None` removes the limit.
    pub limit: Option<Tokens>,
}

/// A run as `atlas runs` shows it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunRecord {
    /// Its task.
    pub task_id: TaskId,
    /// Its state.
    pub status: RunStatus,
    /// Claims so far.
    pub attempt: u32,
    /// Who holds it.
    pub lease_owner: Option<String>,
    /// Until when.
    pub lease_until: Option<Timestamp>,
    /// Not before.
    pub not_before: Option<Timestamp>,
    /// Whose budget.
    pub tenant: Option<String>,
    /// The model that wrote it.
    pub model: Option<String>,
    /// Prompt tokens billed.
    pub tokens_prompt: Tokens,
    /// Completion tokens billed.
    pub tokens_completion: Tokens,
    /// What it has cost: all that the ledger booked for it, billed and assumed. What was only assumed is
    /// missing once its rows are purged, or where a database older than this release tells nothing of it.
    #[serde(default)]
    pub tokens_booked: Tokens,
    /// When it was accepted.
    pub created_at: Timestamp,
    /// When work first began.
    pub started_at: Option<Timestamp>,
    /// When it became final.
    pub ended_at: Option<Timestamp>,
    /// Stable code of a failure.
    pub error_code: Option<String>,
    /// The failure in words.
    pub error_message: Option<String>,
    /// Who asked: attribute `requester` of the message, if it had one.
    #[serde(default)]
    pub requester: Option<String>,
    /// Attempts that ended as deferred: no failures.
    #[serde(default)]
    pub deferrals: u32,
    /// What a deferred run was denied.
    #[serde(default)]
    pub tokens_needed: Option<Tokens>,
    /// True: its worker is told to stop at its next renewal.
    #[serde(default)]
    pub cancel_requested: bool,
}

impl RunRecord {
    /// The same, booked with no less than was billed: that outlives the ledger's rows.
    fn with_all_billed(self) -> Self {
        let billed = self.tokens_prompt + self.tokens_completion;
        Self { tokens_booked: self.tokens_booked.max(billed), ..self }
    }
}

/// A run with everything that is stored of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunDetail {
    /// The row.
    pub run: RunRecord,
    /// The request; null once it is purged (`RETENTION_REQUESTS_DAYS`).
    pub request: Value,
    /// The answer (`architect_out.data`), once it is final.
    pub answer: Option<Value>,
    /// Its finished steps, as long as they are kept (`RETENTION_STEPS_DAYS`).
    pub steps: Vec<Checkpoint>,
    /// Its model calls, oldest first, as long as they are kept (`RETENTION_LEDGER_DAYS`); the last 200.
    #[serde(default)]
    pub ledger: Vec<LedgerEntry>,
    /// True while an answer of it waits in the outbox.
    #[serde(default)]
    pub unsent: bool,
}

/// The store port. Fenced calls give [`StoreError::Fenced`] when the lease is stale.
#[async_trait]
pub trait RunStore: Ledger {
    /// Stores the request if it is new and takes the run's lease if it is free, expired, or waits in
    /// state `queued`. When another attempt died with open reservations they are booked as assumed.
    async fn claim_run(&self, request: &ClaimRequest) -> Result<Claim, StoreError>;

    /// Takes up to `limit` runs that are due without a message: expired leases, `queued` past their
    /// `not_before`, and `deferred` ones when what they were denied fits now (at midnight the new day's
    /// account is empty, so it does). A deferred run that no day's limit can ever fit is due at its
    /// `not_before`, so that the worker decides. Oldest first; takes no more deferred runs than fit
    /// together; skips what another worker is claiming. Takes none while the fleet is paused.
    async fn claim_due(
        &self,
        worker: &WorkerId,
        limit: usize,
        lease: Duration,
        limits: Limits,
    ) -> Result<Vec<ClaimedRun>, StoreError>;

    /// Extends a lease that is still ours, even if it has expired and nobody took it.
    async fn renew_lease(&self, lease: &Lease, duration: Duration) -> Result<Renewal, StoreError>;

    /// Ends a reservation and stores what the call brought, in one transaction. With a stale lease
    /// the tokens are booked all the same (they were billed), the checkpoint is refused. Idempotent:
    /// the first checkpoint of a step stays.
    async fn settle_step(
        &self,
        lease: &Lease,
        settlement: &Settlement,
        checkpoint: &Checkpoint,
    ) -> Result<(), StoreError>;

    /// Makes the run final: result, state, ledger and outbox in one transaction. With a stale lease the
    /// settlement is booked and everything else refused. A retry by the attempt that finished the run
    /// gets the same outbox row back. Reservations that the attempt left open are booked as assumed.
    async fn finish_run(&self, lease: Lease, finish: &Finish) -> Result<Published, StoreError>;

    /// Puts the run aside until `needed` tokens are available: next UTC midnight, or earlier when a
    /// limit is raised. The answer (`deferred`) goes to the outbox.
    async fn defer_run(
        &self,
        lease: Lease,
        needed: Tokens,
        topic: &str,
        answer: &Answer,
        attributes: &[(String, String)],
    ) -> Result<Published, StoreError>;

    /// Gives the run back: `queued`, not before `retry_in` from now for sweeps; a redelivered
    /// message may claim it at once.
    async fn release_run(&self, lease: Lease, retry_in: Duration) -> Result<(), StoreError>;

    /// Takes up to `limit` unsent outbox rows, oldest first, for `hold`: no other caller gets them
    /// meanwhile.
    async fn outbox_take(&self, limit: usize, hold: Duration) -> Result<Vec<OutboxRow>, StoreError>;

    /// Marks rows as sent. Idempotent.
    async fn outbox_mark_sent(&self, ids: &[Uuid]) -> Result<(), StoreError>;

    /// Stores a message that cannot be worked on. Returns false when its row was there already.
    async fn record_dead_letter(&self, letter: &DeadLetter) -> Result<bool, StoreError>;

    /// The runs at work on this worker that somebody cancelled.
    async fn cancelled_runs(&self, worker: &WorkerId) -> Result<Vec<CancelledRun>, StoreError>;

    /// The fleet's shared state.
    async fn fleet_state(&self, limits: Limits) -> Result<FleetState, StoreError>;

    /// Changes the fleet's settings and returns the state after it.
    async fn change_fleet(&self, change: &FleetChange, limits: Limits) -> Result<FleetState, StoreError>;

    /// Asks for a run to be stopped. A run that nobody works on is failed at once with `answer`
    /// (code `cancelled`); the worker of a leased one reads it in [`cancelled_runs`](Self::cancelled_runs) and at its next renewal; a task that has no run yet is
    /// remembered for 32 days, longer than a queue keeps a message, and its claim says
    /// [`cancel_requested`](ClaimedRun::cancel_requested), also while the fleet is paused. False: final.
    /// [`cancel`] writes the answer and says which of these it was.
    async fn cancel_run(&self, task_id: TaskId, topic: &str, answer: &Answer) -> Result<bool, StoreError>;

    /// The newest runs first; `status` filters.
    async fn list_runs(&self, status: Option<RunStatus>, limit: usize) -> Result<Vec<RunRecord>, StoreError> {
        self.find_runs(&RunFilter { status, limit, ..RunFilter::default() }).await
    }

    /// The newest runs first, of those that fit the filter.
    async fn find_runs(&self, filter: &RunFilter) -> Result<Vec<RunRecord>, StoreError>;

    /// One run with everything.
    async fn get_run(&self, task_id: TaskId) -> Result<Option<RunDetail>, StoreError>;

    /// Makes a waiting run due now: a deferred one asks for its tokens again, a queued one need not wait
    /// for its time. A run at work and a final one stay as they are.
    async fn wake_run(&self, task_id: TaskId) -> Result<Wake, StoreError>;

    /// The newest dead letters first, without their bytes.
    async fn list_dead_letters(&self, filter: &DeadLetterFilter)
    -> Result<Vec<DeadLetterRecord>, StoreError>;

    /// One dead letter with its bytes.
    async fn get_dead_letter(&self, id: Uuid) -> Result<Option<DeadLetterDetail>, StoreError>;

    /// Notes that a dead letter went back to the queue, after it did. False: there is none. Idempotent.
    async fn mark_replayed(&self, id: Uuid, replayed_as: Option<TaskId>) -> Result<bool, StoreError>;

    /// Deletes (or counts) up to `limit` dead letters, the oldest first, and says how many.
    async fn purge_dead_letters(&self, purge: &DeadLetterPurge, limit: usize) -> Result<u64, StoreError>;

    /// The accounts of the last `days` days, today's included: newest first, the fleet's before its
    /// tenants'. Scopes that nobody used on a day have no account of it.
    async fn budget_history(&self, days: u32, limits: Limits) -> Result<Vec<DayAccount>, StoreError>;

    /// Deletes what is older than it must be kept, at most `limit` rows of each kind. Runs, results and
    /// day accounts stay for ever, so a final run stays final however late its message comes again;
    /// nothing goes of a run that is not final, no unsent answer, no open reservation, no dead letter
    /// that was not replayed. Safe in all workers at once.
    async fn purge_old(&self, keep: &RetentionConfig, limit: usize) -> Result<Purged, StoreError>;

    /// Is the store reachable, is the key right, are the tables there? For readiness and `doctor`.
    async fn check(&self) -> Result<(), UpstreamError>;
}

/// Durations as whole milliseconds on the wire.
mod millis {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(u64::try_from(duration.as_millis()).unwrap_or(u64::MAX))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
        u64::deserialize(deserializer).map(Duration::from_millis)
    }
}
