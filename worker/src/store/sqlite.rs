//! The store in the embedded SQLite file.
//!
//! Every method is one `BEGIN IMMEDIATE` transaction: it holds the file's only write lock, so nothing
//! it read can change before it commits. What each call guarantees is said on the port; the SQL
//! functions in `migrations/` do the same under Postgres's row locks, and one contract suite
//! (`tests/store_contract.rs`) holds both to it.

use std::{collections::HashMap, time::Duration};

use async_trait::async_trait;
use atlas_shared::{
    Dependency, Ledger, TaskId, Tokens, UpstreamError, WorkerId,
    config::RetentionConfig,
    ledger::{
        BudgetState, Closing, GLOBAL_SCOPE, LedgerError, Limits, NewLimit, Reservation, ReserveOutcome,
        ReserveRequest, SqliteLedger, sqlite as books, tenant_scope,
    },
    message::{Answer, AnswerStatus, AnswerType},
    sqlite::{Database, after, from_micros, next_utc_midnight, to_micros, utc_day},
};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use jiff::Timestamp;
use rusqlite::{OptionalExtension as _, Row, Transaction, params};
use serde::de::DeserializeOwned;
use serde_json::Value;
use uuid::Uuid;

use super::{
    CancelledRun, Checkpoint, Claim, ClaimRequest, ClaimedRun, DayAccount, DeadLetter, DeadLetterDetail,
    DeadLetterFilter, DeadLetterPurge, DeadLetterRecord, FinalStatus, Finish, FleetChange, FleetState, Json,
    Lease, OUTBOX_HOLD, OutboxRow, Published, Purged, Renewal, RunDetail, RunFilter, RunRecord, RunStatus,
    RunStore, Settlement, StoreError, Wake,
};

mod operator;

/// The run store on the embedded file.
#[derive(Clone, Debug)]
pub struct SqliteStore {
    db: Database,
    ledger: SqliteLedger,
}

impl SqliteStore {
    /// Keeps runs in `db`, whose tables [`Database::open`] has made.
    pub fn new(db: Database) -> Self {
        Self { ledger: SqliteLedger::new(db.clone()), db }
    }
}

#[async_trait]
impl Ledger for SqliteStore {
    async fn reserve(&self, request: &ReserveRequest) -> Result<ReserveOutcome, LedgerError> {
        self.ledger.reserve(request).await
    }

    async fn close(&self, reservation: Reservation, closing: Closing) -> Result<(), LedgerError> {
        self.ledger.close(reservation, closing).await
    }

    async fn budget(&self, limits: Limits) -> Result<BudgetState, LedgerError> {
        self.ledger.budget(limits).await
    }
}

#[async_trait]
impl RunStore for SqliteStore {
    async fn claim_run(&self, request: &ClaimRequest) -> Result<Claim, StoreError> {
        let request = request.clone();
        self.db.write(move |tx, now| claim_run(tx, now, &request)).await
    }

    async fn claim_due(
        &self,
        worker: &WorkerId,
        limit: usize,
        lease: Duration,
        limits: Limits,
    ) -> Result<Vec<ClaimedRun>, StoreError> {
        let worker = worker.clone();
        self.db.write(move |tx, now| claim_due(tx, now, &worker, limit, lease, limits)).await
    }

    async fn renew_lease(&self, lease: &Lease, duration: Duration) -> Result<Renewal, StoreError> {
        let (task_id, attempt) = (lease.task_id.to_string(), lease.attempt);
        self.db
            .write(move |tx, now| {
                let cancel: Option<bool> = tx
                    .prepare_cached(
                        "UPDATE runs SET lease_until = ?3
                          WHERE task_id = ?1 AND attempt = ?2 AND status = 'running'
                      RETURNING cancel_requested",
                    )?
                    .query_row(params![task_id, attempt, to_micros(after(now, duration))], |row| row.get(0))
                    .optional()?;
                Ok(Renewal { held: cancel.is_some(), cancel_requested: cancel.unwrap_or(false) })
            })
            .await
    }

    async fn settle_step(
        &self,
        lease: &Lease,
        settlement: &Settlement,
        checkpoint: &Checkpoint,
    ) -> Result<(), StoreError> {
        let (task_id, attempt) = (lease.task_id, lease.attempt);
        let (settlement, checkpoint) = (settlement.clone(), checkpoint.clone());
        // The booking must survive a stale lease, so that is a value here, not an error that rolls back.
        self.db
            .write(move |tx, now| {
                books::close(tx, now, settlement.reservation_id, settlement.closing)?;
                let fenced = fenced_as_value(books::fence(tx, task_id, attempt))?;
                if fenced.is_none() {
                    store_checkpoint(tx, now, task_id, &checkpoint)?;
                }
                Ok::<_, StoreError>(fenced)
            })
            .await?
            .map_or(Ok(()), Err)
    }

    async fn finish_run(&self, lease: Lease, finish: &Finish) -> Result<Published, StoreError> {
        let finish = finish.clone();
        self.db.write(move |tx, now| finish_run(tx, now, &lease, &finish)).await?
    }

    async fn defer_run(
        &self,
        lease: Lease,
        needed: Tokens,
        topic: &str,
        answer: &Answer,
        attributes: &[(String, String)],
    ) -> Result<Published, StoreError> {
        let (topic, answer, attributes) = (topic.to_owned(), json(answer)?, attributes.to_vec());
        self.db
            .write(move |tx, now| {
                let task_id = lease.task_id.to_string();
                let before = run_state(tx, lease.task_id)?;
                if before.is_some_and(|run| run.status == RunStatus::Deferred && run.attempt == lease.attempt)
                    && let Some(row) = outbox_of(tx, lease.task_id, Some(lease.attempt))?
                {
                    // A retry of a call whose answer was lost.
                    return Ok(Published { outbox: row });
                }
                books::fence(tx, lease.task_id, lease.attempt)?;
                books::assume_open(tx, now, lease.task_id)?;
                tx.prepare_cached(
                    "UPDATE runs
                        SET status = 'deferred', not_before = ?2, tokens_needed = ?3,
                            deferrals = deferrals + 1, lease_owner = NULL, lease_until = NULL
                      WHERE task_id = ?1",
                )?
                .execute(params![
                    task_id,
                    to_micros(next_utc_midnight(now)),
                    needed.to_stored().max(1)
                ])?;
                let new = NewOutbox {
                    task_id: lease.task_id,
                    attempt: Some(lease.attempt),
                    is_final: false,
                    topic: &topic,
                    message: &answer,
                    attributes: &attributes,
                    held: true,
                };
                Ok(Published { outbox: put_outbox(tx, now, &new)? })
            })
            .await
    }

    async fn release_run(&self, lease: Lease, retry_in: Duration) -> Result<(), StoreError> {
        self.db
            .write(move |tx, now| {
                if run_state(tx, lease.task_id)?
                    .is_some_and(|run| run.status == RunStatus::Queued && run.attempt == lease.attempt)
                {
                    return Ok(());
                }
                books::fence(tx, lease.task_id, lease.attempt)?;
                books::assume_open(tx, now, lease.task_id)?;
                tx.prepare_cached(
                    "UPDATE runs
                        SET status = 'queued', not_before = ?2, lease_owner = NULL, lease_until = NULL
                      WHERE task_id = ?1",
                )?
                .execute(params![lease.task_id.to_string(), to_micros(after(now, retry_in))])?;
                Ok(())
            })
            .await
    }

    async fn outbox_take(&self, limit: usize, hold: Duration) -> Result<Vec<OutboxRow>, StoreError> {
        self.db
            .write(move |tx, now| {
                let mut statement = tx.prepare_cached(&format!(
                    "SELECT {OUTBOX_COLUMNS} FROM outbox
                          WHERE sent_at IS NULL AND coalesce(held_until, 0) <= ?1
                          ORDER BY seq LIMIT ?2"
                ))?;
                let rows = statement
                    .query_map(params![to_micros(now), sql_limit(limit)], raw_outbox)?
                    .collect::<rusqlite::Result<Vec<_>>>()?;
                let mut taken = Vec::with_capacity(rows.len());
                for raw in rows {
                    let row = raw.read()?;
                    tx.prepare_cached("UPDATE outbox SET held_until = ?2 WHERE id = ?1")?
                        .execute(params![row.id.to_string(), to_micros(after(now, hold))])?;
                    taken.push(row);
                }
                Ok(taken)
            })
            .await
    }

    async fn outbox_mark_sent(&self, ids: &[Uuid]) -> Result<(), StoreError> {
        let ids = ids.to_vec();
        self.db
            .write(move |tx, now| {
                for id in ids {
                    tx.prepare_cached("UPDATE outbox SET sent_at = ?2 WHERE id = ?1 AND sent_at IS NULL")?
                        .execute(params![id.to_string(), to_micros(now)])?;
                }
                Ok(())
            })
            .await
    }

    async fn record_dead_letter(&self, letter: &DeadLetter) -> Result<bool, StoreError> {
        let letter = letter.clone();
        self.db.write(move |tx, now| record_dead_letter(tx, now, &letter)).await
    }

    async fn cancelled_runs(&self, worker: &WorkerId) -> Result<Vec<CancelledRun>, StoreError> {
        let worker = worker.to_string();
        self.db.read(move |tx, _| cancelled_runs(tx, &worker)).await
    }

    async fn fleet_state(&self, limits: Limits) -> Result<FleetState, StoreError> {
        self.db.read(move |tx, now| fleet_state(tx, now, limits)).await
    }

    async fn change_fleet(&self, change: &FleetChange, limits: Limits) -> Result<FleetState, StoreError> {
        let change = change.clone();
        self.db
            .write(move |tx, now| {
                tx.execute(
                    "UPDATE fleet_settings
                        SET daily_limit = CASE WHEN ?1 THEN ?2 ELSE daily_limit END,
                            run_limit = CASE WHEN ?3 THEN ?4 ELSE run_limit END,
                            paused = coalesce(?5, paused), cache_generation = cache_generation + ?6",
                    params![
                        change.daily_limit.is_some(),
                        change.daily_limit.and_then(NewLimit::to_stored),
                        change.run_limit.is_some(),
                        change.run_limit.and_then(NewLimit::to_stored),
                        change.paused,
                        change.flush_cache
                    ],
                )?;
                if let Some(tenant) = &change.tenant_limit {
                    tx.execute(
                        "INSERT INTO token_days (day, scope, limit_tokens) VALUES (?1, ?2, ?3)
                         ON CONFLICT (day, scope) DO UPDATE SET limit_tokens = excluded.limit_tokens",
                        params![
                            utc_day(now),
                            tenant_scope(&tenant.tenant),
                            tenant.limit.map(Tokens::to_stored)
                        ],
                    )?;
                }
                fleet_state(tx, now, limits)
            })
            .await
    }

    async fn cancel_run(&self, task_id: TaskId, topic: &str, answer: &Answer) -> Result<bool, StoreError> {
        let (topic, message, attributes) = (topic.to_owned(), json(answer)?, answer.attributes());
        let why = answer.content.as_str().map(str::to_owned);
        self.db
            .write(move |tx, now| {
                let Some(run) = run_state(tx, task_id)? else {
                    operator::cancel_early(tx, now, task_id)?;
                    return Ok(true);
                };
                if run.is_final() {
                    return Ok(false);
                }
                if run.is_leased(now) {
                    tx.prepare_cached("UPDATE runs SET cancel_requested = 1 WHERE task_id = ?1")?
                        .execute([task_id.to_string()])?;
                    return Ok(true);
                }
                let end = End {
                    status: FinalStatus::Failed,
                    model: None,
                    error_code: Some("cancelled"),
                    error_message: why.as_deref(),
                    finished_attempt: None,
                };
                end_run(tx, now, task_id, &end, &message)?;
                let new = NewOutbox {
                    task_id,
                    attempt: None,
                    is_final: true,
                    topic: &topic,
                    message: &message,
                    attributes: &attributes,
                    held: false,
                };
                put_outbox(tx, now, &new)?;
                Ok(true)
            })
            .await
    }

    async fn find_runs(&self, filter: &RunFilter) -> Result<Vec<RunRecord>, StoreError> {
        let filter = filter.clone();
        self.db.read(move |tx, _now| operator::find_runs(tx, &filter)).await
    }

    async fn get_run(&self, task_id: TaskId) -> Result<Option<RunDetail>, StoreError> {
        self.db
            .read(move |tx, _now| {
                let run = tx
                    .prepare_cached(&format!("SELECT {RUN_COLUMNS} FROM runs WHERE task_id = ?1"))?
                    .query_row([task_id.to_string()], raw_run)
                    .optional()?;
                let Some(run) = run else { return Ok(None) };
                Ok(Some(RunDetail {
                    run: run.read()?,
                    request: stored_message(tx, task_id)?.unwrap_or(Value::Null),
                    answer: stored_answer(tx, task_id)?,
                    steps: steps(tx, task_id)?,
                    ledger: operator::ledger_of(tx, task_id)?,
                    unsent: unsent(tx, task_id)?,
                }))
            })
            .await
    }

    async fn wake_run(&self, task_id: TaskId) -> Result<Wake, StoreError> {
        self.db.write(move |tx, now| operator::wake_run(tx, now, task_id)).await
    }

    async fn list_dead_letters(
        &self,
        filter: &DeadLetterFilter,
    ) -> Result<Vec<DeadLetterRecord>, StoreError> {
        let filter = filter.clone();
        self.db.read(move |tx, _now| operator::list_dead_letters(tx, &filter)).await
    }

    async fn get_dead_letter(&self, id: Uuid) -> Result<Option<DeadLetterDetail>, StoreError> {
        self.db.read(move |tx, _now| operator::get_dead_letter(tx, id)).await
    }

    async fn mark_replayed(&self, id: Uuid, replayed_as: Option<TaskId>) -> Result<bool, StoreError> {
        self.db.write(move |tx, now| operator::mark_replayed(tx, now, id, replayed_as)).await
    }

    async fn purge_dead_letters(&self, purge: &DeadLetterPurge, limit: usize) -> Result<u64, StoreError> {
        let purge = purge.clone();
        self.db.write(move |tx, now| operator::purge_dead_letters(tx, now, &purge, limit)).await
    }

    async fn budget_history(&self, days: u32, limits: Limits) -> Result<Vec<DayAccount>, StoreError> {
        self.db.read(move |tx, now| operator::budget_history(tx, now, days, limits)).await
    }

    async fn purge_old(&self, keep: &RetentionConfig, limit: usize) -> Result<Purged, StoreError> {
        let keep = *keep;
        self.db.write(move |tx, now| operator::purge_old(tx, now, &keep, limit)).await
    }

    async fn check(&self) -> Result<(), UpstreamError> {
        self.db
            .read(|tx, _now| {
                tx.query_row("SELECT count(*) FROM fleet_settings", [], |row| row.get::<_, i64>(0))?;
                Ok(())
            })
            .await
    }
}

/// What decides about a run's next state.
#[derive(Clone, Copy)]
struct RunState {
    status: RunStatus,
    attempt: u32,
    lease_until: Option<Timestamp>,
    claim_id: Option<Uuid>,
    finished_attempt: Option<u32>,
    cancel_requested: bool,
}

impl RunState {
    fn is_final(self) -> bool {
        matches!(self.status, RunStatus::Done | RunStatus::Failed)
    }

    fn is_leased(self, now: Timestamp) -> bool {
        self.status == RunStatus::Running && self.lease_until.is_some_and(|until| until > now)
    }
}

fn run_state(tx: &Transaction<'_>, task_id: TaskId) -> Result<Option<RunState>, StoreError> {
    let raw = tx
        .prepare_cached(
            "SELECT status, attempt, lease_until, claim_id, finished_attempt, cancel_requested
               FROM runs WHERE task_id = ?1",
        )?
        .query_row([task_id.to_string()], |row| {
            Ok((
                row.get::<_, String>(0)?,
                row.get(1)?,
                row.get::<_, Option<i64>>(2)?,
                row.get::<_, Option<String>>(3)?,
                row.get(4)?,
                row.get(5)?,
            ))
        })
        .optional()?;
    let Some((status, attempt, lease_until, claim_id, finished_attempt, cancel_requested)) = raw else {
        return Ok(None);
    };
    Ok(Some(RunState {
        status: status.parse().map_err(unreadable)?,
        attempt,
        lease_until: lease_until.map(from_micros),
        claim_id: claim_id.and_then(|id| Uuid::parse_str(&id).ok()),
        finished_attempt,
        cancel_requested,
    }))
}

fn claim_run(tx: &Transaction<'_>, now: Timestamp, request: &ClaimRequest) -> Result<Claim, StoreError> {
    let Some(state) = run_state(tx, request.task_id)? else { return claim_new(tx, now, request) };
    let id = request.task_id.to_string();
    if state.is_final() {
        return Ok(Claim::Finished { unsent: unsent(tx, request.task_id)? });
    }
    if state.status == RunStatus::Running && state.claim_id == Some(request.claim_id) {
        // A retry of a claim whose answer was lost: the same attempt, with a fresh lease.
        let until = after(now, request.lease);
        tx.prepare_cached("UPDATE runs SET lease_until = ?2 WHERE task_id = ?1")?
            .execute(params![id, to_micros(until)])?;
        return Ok(Claim::Claimed(claimed(tx, request.task_id, state.attempt, until, false)?));
    }
    // What is only to be answered as cancelled need not wait for `resume`.
    let paused = !state.cancel_requested && books::fleet_settings(tx)?.paused;
    if state.is_leased(now) || state.status == RunStatus::Deferred || paused {
        return Ok(Claim::Held);
    }
    let run = take(tx, now, request.task_id, state, Some(request.claim_id), &request.worker, request.lease)?;
    Ok(Claim::Claimed(run))
}

/// Stores a run that nobody knew, and claims it. Nearly every run is claimed like this: it has no steps, has
/// spent nothing, and no attempt of it left anything open.
fn claim_new(tx: &Transaction<'_>, now: Timestamp, request: &ClaimRequest) -> Result<Claim, StoreError> {
    let id = request.task_id.to_string();
    let cancel_requested = operator::take_early_cancel(tx, request.task_id)?;
    // What is only to be answered as cancelled need not wait for `resume`.
    let paused = !cancel_requested && books::fleet_settings(tx)?.paused;
    let lease_until = after(now, request.lease);
    tx.prepare_cached(
        "INSERT INTO runs (task_id, status, attempt, claim_id, lease_owner, lease_until, started_at, tenant,
                           requester, created_at, cancel_requested)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11)",
    )?
    .execute(params![
        id,
        if paused { "queued" } else { "running" },
        u32::from(!paused),
        (!paused).then(|| request.claim_id.to_string()),
        (!paused).then_some(&request.worker.0),
        (!paused).then(|| to_micros(lease_until)),
        (!paused).then(|| to_micros(now)),
        request.tenant,
        request.requester,
        to_micros(now),
        cancel_requested
    ])?;
    let stored = tx
        .prepare_cached("INSERT OR IGNORE INTO architect_in (id, data, created_at) VALUES (?1, ?2, ?3)")?
        .execute(params![id, request.message.to_string(), to_micros(now)])?;
    if paused {
        return Ok(Claim::Held);
    }
    // Somebody may have stored a request of this name before: then it is the one that counts.
    let known = if stored == 0 { stored_message(tx, request.task_id)? } else { None };
    let message = known.unwrap_or_else(|| request.message.clone());
    Ok(Claim::Claimed(ClaimedRun {
        lease: Lease { task_id: request.task_id, attempt: 1, lease_until },
        parent: parent(tx, &message, request.tenant.as_deref())?,
        message,
        steps: Vec::new(),
        spent: Tokens(0),
        taken_over: false,
        deferrals: 0,
        cancel_requested,
    }))
}

/// Gives the lease to `worker` as a new attempt. What a former attempt left open is booked as spent.
fn take(
    tx: &Transaction<'_>,
    now: Timestamp,
    task_id: TaskId,
    state: RunState,
    claim_id: Option<Uuid>,
    worker: &WorkerId,
    lease: Duration,
) -> Result<ClaimedRun, StoreError> {
    books::assume_open(tx, now, task_id)?;
    let (attempt, until) = (state.attempt + 1, after(now, lease));
    tx.prepare_cached(
        "UPDATE runs
            SET status = 'running', attempt = ?2, claim_id = ?3, lease_owner = ?4, lease_until = ?5,
                not_before = NULL, tokens_needed = NULL, started_at = coalesce(started_at, ?6)
          WHERE task_id = ?1",
    )?
    .execute(params![
        task_id.to_string(),
        attempt,
        claim_id.map(|id| id.to_string()),
        worker.0,
        to_micros(until),
        to_micros(now)
    ])?;
    claimed(tx, task_id, attempt, until, state.status == RunStatus::Running)
}

fn claimed(
    tx: &Transaction<'_>,
    task_id: TaskId,
    attempt: u32,
    lease_until: Timestamp,
    taken_over: bool,
) -> Result<ClaimedRun, StoreError> {
    let (deferrals, cancel_requested, tenant): (u32, bool, Option<String>) = tx
        .prepare_cached("SELECT deferrals, cancel_requested, tenant FROM runs WHERE task_id = ?1")?
        .query_row([task_id.to_string()], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?;
    let message = stored_message(tx, task_id)?
        .ok_or_else(|| unreadable(format!("run {task_id} is open and its request is not there")))?;
    let parent = parent(tx, &message, tenant.as_deref())?;
    Ok(ClaimedRun {
        lease: Lease { task_id, attempt, lease_until },
        message,
        steps: steps(tx, task_id)?,
        parent,
        spent: books::spent(tx, task_id)?,
        taken_over,
        deferrals,
        cancel_requested,
    })
}

/// The answer that a request refines: only a finished spec, and never another tenant's.
fn parent(tx: &Transaction<'_>, message: &Value, tenant: Option<&str>) -> Result<Option<Value>, StoreError> {
    let parent_id = message.pointer("/metadata/parent_id").and_then(Value::as_str);
    let Some(parent_id) = parent_id.and_then(|id| id.parse::<TaskId>().ok()) else { return Ok(None) };
    let readable: bool = tx
        .prepare_cached(
            "SELECT EXISTS (SELECT 1 FROM runs WHERE task_id = ?1 AND status = 'done' AND tenant IS ?2)",
        )?
        .query_row(params![parent_id.to_string(), tenant], |row| row.get(0))?;
    if readable { stored_answer(tx, parent_id) } else { Ok(None) }
}

fn claim_due(
    tx: &Transaction<'_>,
    now: Timestamp,
    worker: &WorkerId,
    limit: usize,
    lease: Duration,
    limits: Limits,
) -> Result<Vec<ClaimedRun>, StoreError> {
    struct Candidate {
        task_id: String,
        status: String,
        not_before: Option<i64>,
        needed: Tokens,
        tenant: Option<String>,
    }
    books::assume_orphans(tx, now)?;
    let settings = books::fleet_settings(tx)?;
    if settings.paused {
        return Ok(Vec::new());
    }
    let day = utc_day(now);
    let daily = settings.daily_limit.unwrap_or(limits.daily);
    let mut fits_day = books::account(tx, &day, GLOBAL_SCOPE)?.available(daily);
    // A tenant's limit and what is left of it.
    let mut fits_tenant: HashMap<String, Option<(Tokens, Tokens)>> = HashMap::new();

    let mut statement = tx.prepare_cached(
        "SELECT task_id, status, not_before, tokens_needed, tenant FROM runs
          WHERE ended_at IS NULL
            AND (status = 'running'  AND lease_until <= ?1
              OR status = 'queued'   AND coalesce(not_before, 0) <= ?1
              OR status = 'deferred')
          ORDER BY created_at, task_id",
    )?;
    let mut rows = statement.query([to_micros(now)])?;
    let mut due = Vec::new();
    while due.len() < limit
        && let Some(row) = rows.next()?
    {
        let run = Candidate {
            task_id: row.get(0)?,
            status: row.get(1)?,
            not_before: row.get(2)?,
            needed: Tokens::from_stored(row.get::<_, Option<i64>>(3)?.unwrap_or(0)),
            tenant: row.get(4)?,
        };
        if run.status == RunStatus::Deferred.as_str() {
            let tenant = match &run.tenant {
                None => None,
                Some(name) => {
                    let scope = tenant_scope(name);
                    if let Some(known) = fits_tenant.get(&scope) {
                        *known
                    } else {
                        let account = books::account(tx, &day, &scope)?;
                        let left = account.limit.map(|limit| (limit, account.available(limit)));
                        fits_tenant.insert(scope, left);
                        left
                    }
                }
            };
            let fits = run.needed <= fits_day && tenant.is_none_or(|(_, left)| run.needed <= left);
            let never_fits = run.needed > daily || tenant.is_some_and(|(limit, _)| run.needed > limit);
            let waited = run.not_before.is_none_or(|at| at <= to_micros(now));
            if fits {
                fits_day = fits_day.saturating_sub(run.needed);
                if let (Some(name), Some((limit, left))) = (&run.tenant, tenant) {
                    fits_tenant.insert(tenant_scope(name), Some((limit, left.saturating_sub(run.needed))));
                }
            } else if !(never_fits && waited) {
                continue;
            }
        }
        due.push(run.task_id.parse::<TaskId>().map_err(unreadable)?);
    }
    drop(rows);
    drop(statement);

    let mut runs = Vec::with_capacity(due.len());
    for task_id in due {
        if let Some(state) = run_state(tx, task_id)? {
            runs.push(take(tx, now, task_id, state, None, worker, lease)?);
        }
    }
    Ok(runs)
}

fn finish_run(
    tx: &Transaction<'_>,
    now: Timestamp,
    lease: &Lease,
    finish: &Finish,
) -> Result<Result<Published, StoreError>, StoreError> {
    if let Some(settlement) = &finish.settlement {
        books::close(tx, now, settlement.reservation_id, settlement.closing)?;
    }
    if run_state(tx, lease.task_id)?.is_some_and(|run| run.finished_attempt == Some(lease.attempt))
        && let Some(row) = outbox_of(tx, lease.task_id, None)?
    {
        // A retry of a call whose answer was lost.
        return Ok(Ok(Published { outbox: row }));
    }
    if let Some(fenced) = fenced_as_value(books::fence(tx, lease.task_id, lease.attempt))? {
        return Ok(Err(fenced));
    }
    if let Some(checkpoint) = &finish.checkpoint {
        store_checkpoint(tx, now, lease.task_id, checkpoint)?;
    }
    let end = End {
        status: finish.status,
        model: finish.model.as_deref(),
        error_code: finish.error_code.as_deref(),
        error_message: finish.error_message.as_deref(),
        finished_attempt: Some(lease.attempt),
    };
    end_run(tx, now, lease.task_id, &end, &finish.answer)?;
    let new = NewOutbox {
        task_id: lease.task_id,
        attempt: Some(lease.attempt),
        is_final: true,
        topic: &finish.topic,
        message: &finish.answer,
        attributes: &finish.attributes,
        held: true,
    };
    Ok(Ok(Published { outbox: put_outbox(tx, now, &new)? }))
}

/// How a run ends.
struct End<'a> {
    status: FinalStatus,
    model: Option<&'a str>,
    error_code: Option<&'a str>,
    error_message: Option<&'a str>,
    /// The attempt that ended it; `None` when somebody else did.
    finished_attempt: Option<u32>,
}

/// Makes a run final and stores its one result row. The caller has checked that it is not final yet.
fn end_run(
    tx: &Transaction<'_>,
    now: Timestamp,
    task_id: TaskId,
    end: &End<'_>,
    answer: &Json,
) -> Result<(), StoreError> {
    // Before the run is final, because what is booked later does not change its row any more.
    books::assume_open(tx, now, task_id)?;
    tx.prepare_cached(
        "UPDATE runs
            SET status = ?2, ended_at = ?3, model = coalesce(?4, model), error_code = ?5, error_message = ?6,
                finished_attempt = ?7, lease_owner = NULL, lease_until = NULL, not_before = NULL,
                tokens_needed = NULL
          WHERE task_id = ?1",
    )?
    .execute(params![
        task_id.to_string(),
        match end.status {
            FinalStatus::Done => "done",
            FinalStatus::Failed => "failed",
        },
        to_micros(now),
        end.model,
        end.error_code,
        end.error_message,
        end.finished_attempt
    ])?;
    tx.prepare_cached("INSERT INTO architect_out (id, data, created_at) VALUES (?1, ?2, ?3)")?
        .execute(params![task_id.to_string(), answer.text(), to_micros(now)])?;
    Ok(())
}

fn store_checkpoint(
    tx: &Transaction<'_>,
    now: Timestamp,
    task_id: TaskId,
    checkpoint: &Checkpoint,
) -> Result<(), StoreError> {
    tx.prepare_cached(
        "INSERT INTO run_steps (task_id, step, seq, input_hash, output, usage, created_at)
         SELECT ?1, ?2, count(*), ?3, ?4, ?5, ?6 FROM run_steps WHERE task_id = ?1
         ON CONFLICT (task_id, step) DO NOTHING",
    )?
    .execute(params![
        task_id.to_string(),
        checkpoint.step,
        checkpoint.input_hash,
        checkpoint.output.text(),
        to_json(&checkpoint.usage)?,
        to_micros(now)
    ])?;
    Ok(())
}

fn record_dead_letter(tx: &Transaction<'_>, now: Timestamp, letter: &DeadLetter) -> Result<bool, StoreError> {
    // Checked here so that both adapters refuse the same: Postgres stores bytes.
    BASE64_STANDARD.decode(&letter.raw_base64).map_err(unreadable)?;
    let new = tx
        .prepare_cached(
            "INSERT INTO dead_letters (id, source, reason, detail, raw, attributes, task_id, received_at)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8) ON CONFLICT (id) DO NOTHING",
        )?
        .execute(params![
            letter.id.to_string(),
            letter.source,
            letter.reason,
            letter.detail,
            letter.raw_base64,
            to_json(&letter.attributes)?,
            letter.task_id.map(|id| id.to_string()),
            to_micros(now)
        ])?;
    if new == 0 {
        return Ok(false);
    }
    let mut result_of = None;
    if let Some(task_id) = letter.task_id.filter(|_| letter.fails_run)
        && run_state(tx, task_id)?.is_some_and(|run| !run.is_final())
    {
        let result = letter
            .announce
            .iter()
            .position(|(_, answer)| answer.task_id == task_id && answer.msg_type == AnswerType::Error);
        let bare;
        let answer = if let Some(index) = result {
            &letter.announce[index].1
        } else {
            bare = Answer::bare(
                task_id,
                AnswerType::Error,
                AnswerStatus::Error,
                letter.detail.clone(),
                serde_json::Map::new(),
            );
            &bare
        };
        let end = End {
            status: FinalStatus::Failed,
            model: None,
            error_code: Some(&letter.reason),
            error_message: Some(&letter.detail),
            finished_attempt: None,
        };
        end_run(tx, now, task_id, &end, &json(answer)?)?;
        result_of = result;
    }
    for (index, (topic, answer)) in letter.announce.iter().enumerate() {
        let new = NewOutbox {
            task_id: answer.task_id,
            attempt: None,
            is_final: result_of == Some(index),
            topic,
            message: &json(answer)?,
            attributes: &answer.attributes(),
            held: false,
        };
        put_outbox(tx, now, &new)?;
    }
    Ok(true)
}

fn cancelled_runs(tx: &Transaction<'_>, worker: &str) -> Result<Vec<CancelledRun>, StoreError> {
    const SQL: &str = "SELECT task_id, attempt FROM runs
        WHERE ended_at IS NULL AND cancel_requested AND status = 'running' AND lease_owner = ?1";
    let mut cancelled = Vec::new();
    let mut statement = tx.prepare_cached(SQL)?;
    let mut rows = statement.query([worker])?;
    while let Some(row) = rows.next()? {
        let task_id: String = row.get(0)?;
        cancelled.push(CancelledRun { task_id: task_id.parse().map_err(unreadable)?, attempt: row.get(1)? });
    }
    Ok(cancelled)
}

fn fleet_state(tx: &Transaction<'_>, now: Timestamp, limits: Limits) -> Result<FleetState, StoreError> {
    let settings = books::fleet_settings(tx)?;
    let (mut queued, mut running, mut deferred) = (0, 0, 0);
    let mut statement =
        tx.prepare_cached("SELECT status, count(*) FROM runs WHERE ended_at IS NULL GROUP BY status")?;
    let mut rows = statement.query([])?;
    while let Some(row) = rows.next()? {
        let count = count(row, 1)?;
        match row.get::<_, String>(0)?.as_str() {
            "queued" => queued = count,
            "running" => running = count,
            "deferred" => deferred = count,
            _ => {}
        }
    }
    let (unsent, oldest): (u64, Option<i64>) = tx
        .prepare_cached("SELECT count(*), min(created_at) FROM outbox WHERE sent_at IS NULL")?
        .query_row([], |row| Ok((count(row, 0)?, row.get(1)?)))?;
    let dead_letters = tx
        .prepare_cached("SELECT count(*) FROM dead_letters WHERE replayed_at IS NULL")?
        .query_row([], |row| count(row, 0))?;
    let waited = oldest.map_or(0, |at| to_micros(now).saturating_sub(at) / 1_000_000);
    Ok(FleetState {
        paused: settings.paused,
        budget: books::budget(tx, now, limits)?,
        run_limit: settings.run_limit.unwrap_or(limits.run),
        deferred_runs: deferred,
        queued_runs: queued,
        running_runs: running,
        outbox_unsent: unsent,
        outbox_oldest_seconds: u64::try_from(waited).unwrap_or(0),
        dead_letters,
        cache_generation: settings.cache_generation,
    })
}

/// A message to enqueue.
struct NewOutbox<'a> {
    task_id: TaskId,
    attempt: Option<u32>,
    is_final: bool,
    topic: &'a str,
    message: &'a Json,
    attributes: &'a [(String, String)],
    /// True when the caller is going to publish it at once.
    held: bool,
}

fn put_outbox(tx: &Transaction<'_>, now: Timestamp, new: &NewOutbox<'_>) -> Result<OutboxRow, StoreError> {
    let row = OutboxRow {
        id: Uuid::now_v7(),
        task_id: new.task_id,
        topic: new.topic.to_owned(),
        message: new.message.clone(),
        attributes: new.attributes.to_vec(),
    };
    tx.prepare_cached(
        "INSERT INTO outbox (id, task_id, attempt, final, topic, message, attributes, created_at, held_until)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9)",
    )?
    .execute(params![
        row.id.to_string(),
        row.task_id.to_string(),
        new.attempt,
        new.is_final,
        row.topic,
        // The answer that ends a run is in `architect_out`, where it stays: once is enough.
        if new.is_final { "" } else { row.message.text() },
        to_json(&row.attributes)?,
        to_micros(now),
        new.held.then(|| to_micros(after(now, OUTBOX_HOLD)))
    ])?;
    Ok(row)
}

/// The final row of a run, or (`attempt` given) the one that this attempt wrote last.
fn outbox_of(
    tx: &Transaction<'_>,
    task_id: TaskId,
    attempt: Option<u32>,
) -> Result<Option<OutboxRow>, StoreError> {
    tx.prepare_cached(&format!(
        "SELECT {OUTBOX_COLUMNS} FROM outbox
          WHERE task_id = ?1 AND CASE WHEN ?2 IS NULL THEN final ELSE attempt = ?2 END
          ORDER BY seq DESC LIMIT 1"
    ))?
    .query_row(params![task_id.to_string(), attempt], raw_outbox)
    .optional()?
    .map(RawOutbox::read)
    .transpose()
}

/// What [`raw_outbox`] reads.
const OUTBOX_COLUMNS: &str = "id, task_id, topic, \
     coalesce(nullif(message, ''), (SELECT data FROM architect_out WHERE id = outbox.task_id)), attributes";

struct RawOutbox {
    id: String,
    task_id: String,
    topic: String,
    message: String,
    attributes: String,
}

fn raw_outbox(row: &Row<'_>) -> rusqlite::Result<RawOutbox> {
    Ok(RawOutbox {
        id: row.get(0)?,
        task_id: row.get(1)?,
        topic: row.get(2)?,
        message: row.get(3)?,
        attributes: row.get(4)?,
    })
}

impl RawOutbox {
    fn read(self) -> Result<OutboxRow, StoreError> {
        Ok(OutboxRow {
            id: self.id.parse().map_err(unreadable)?,
            task_id: self.task_id.parse().map_err(unreadable)?,
            topic: self.topic,
            message: self.message.into(),
            attributes: from_json(&self.attributes)?,
        })
    }
}

const RUN_COLUMNS: &str = "task_id, status, attempt, lease_owner, lease_until, not_before, tenant, model, \
                           tokens_prompt, tokens_completion, created_at, started_at, ended_at, error_code, \
                           error_message, requester, deferrals, tokens_needed, cancel_requested, \
                           (SELECT coalesce(sum(actual), 0) FROM token_ledger WHERE task_id = runs.task_id)";

struct RawRun {
    task_id: String,
    status: String,
    record: RunRecord,
}

fn raw_run(row: &Row<'_>) -> rusqlite::Result<RawRun> {
    let at = |index| row.get::<_, Option<i64>>(index).map(|micros| micros.map(from_micros));
    Ok(RawRun {
        task_id: row.get(0)?,
        status: row.get(1)?,
        record: RunRecord {
            // Both are read from the strings above, where a fault can be reported.
            task_id: TaskId(Uuid::nil()),
            status: RunStatus::Queued,
            attempt: row.get(2)?,
            lease_owner: row.get(3)?,
            lease_until: at(4)?,
            not_before: at(5)?,
            tenant: row.get(6)?,
            model: row.get(7)?,
            tokens_prompt: Tokens::from_stored(row.get(8)?),
            tokens_completion: Tokens::from_stored(row.get(9)?),
            created_at: from_micros(row.get(10)?),
            started_at: at(11)?,
            ended_at: at(12)?,
            error_code: row.get(13)?,
            error_message: row.get(14)?,
            requester: row.get(15)?,
            deferrals: row.get(16)?,
            tokens_needed: row.get::<_, Option<i64>>(17)?.map(Tokens::from_stored),
            cancel_requested: row.get(18)?,
            tokens_booked: Tokens::from_stored(row.get(19)?),
        },
    })
}

impl RawRun {
    fn read(self) -> Result<RunRecord, StoreError> {
        Ok(RunRecord {
            task_id: self.task_id.parse().map_err(unreadable)?,
            status: self.status.parse().map_err(unreadable)?,
            ..self.record
        }
        .with_all_billed())
    }
}

fn stored_message(tx: &Transaction<'_>, task_id: TaskId) -> Result<Option<Value>, StoreError> {
    tx.prepare_cached("SELECT data FROM architect_in WHERE id = ?1")?
        .query_row([task_id.to_string()], |row| row.get::<_, String>(0))
        .optional()?
        .map(|text| from_json(&text))
        .transpose()
}

/// Does an answer of this run wait in the outbox?
fn unsent(tx: &Transaction<'_>, task_id: TaskId) -> Result<bool, StoreError> {
    Ok(tx
        .prepare_cached("SELECT EXISTS (SELECT 1 FROM outbox WHERE task_id = ?1 AND sent_at IS NULL)")?
        .query_row([task_id.to_string()], |row| row.get(0))?)
}

fn stored_answer(tx: &Transaction<'_>, task_id: TaskId) -> Result<Option<Value>, StoreError> {
    tx.prepare_cached("SELECT data FROM architect_out WHERE id = ?1")?
        .query_row([task_id.to_string()], |row| row.get::<_, String>(0))
        .optional()?
        .map(|text| from_json(&text))
        .transpose()
}

fn steps(tx: &Transaction<'_>, task_id: TaskId) -> Result<Vec<Checkpoint>, StoreError> {
    let mut statement = tx.prepare_cached(
        "SELECT step, input_hash, output, usage FROM run_steps WHERE task_id = ?1 ORDER BY seq",
    )?;
    let rows = statement.query_map([task_id.to_string()], |row| {
        Ok((row.get(0)?, row.get(1)?, row.get::<_, String>(2)?, row.get::<_, String>(3)?))
    })?;
    let mut steps = Vec::new();
    for row in rows {
        let (step, input_hash, output, usage) = row?;
        steps.push(Checkpoint { step, input_hash, output: output.into(), usage: from_json(&usage)? });
    }
    Ok(steps)
}

fn count(row: &Row<'_>, index: usize) -> rusqlite::Result<u64> {
    row.get::<_, i64>(index).map(|count| u64::try_from(count).unwrap_or(0))
}

fn sql_limit(limit: usize) -> i64 {
    i64::try_from(limit).unwrap_or(i64::MAX)
}

/// Turns a refusal into a value, so that the transaction commits what was booked before it.
fn fenced_as_value(result: Result<(), StoreError>) -> Result<Option<StoreError>, StoreError> {
    match result {
        Ok(()) => Ok(None),
        Err(fenced @ LedgerError::Fenced { .. }) => Ok(Some(fenced)),
        Err(other) => Err(other),
    }
}

fn json(answer: &Answer) -> Result<Json, StoreError> {
    Json::of(answer).map_err(unreadable)
}

fn to_json<T: serde::Serialize>(value: &T) -> Result<String, StoreError> {
    serde_json::to_string(value).map_err(unreadable)
}

fn from_json<T: DeserializeOwned>(text: &str) -> Result<T, StoreError> {
    serde_json::from_str(text).map_err(unreadable)
}

/// A stored value that does not read back: somebody wrote into the file by hand.
fn unreadable(error: impl std::fmt::Display) -> StoreError {
    UpstreamError::permanent(Dependency::Store, "store_unreadable", error).into()
}
