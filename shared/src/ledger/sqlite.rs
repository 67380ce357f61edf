//! The ledger in the embedded SQLite file.
//!
//! The functions take an open transaction, so that the worker's store can book in the same transaction
//! in which it finishes a run. Every caller holds `BEGIN IMMEDIATE`, the file's only write lock, so a
//! limit that was read cannot change before the grant is written.

use async_trait::async_trait;
use jiff::Timestamp;
use rusqlite::{OptionalExtension as _, Transaction, params};
use uuid::Uuid;

use super::{
    BudgetState, CallKind, Closing, Denial, DeniedBy, GLOBAL_SCOPE, Ledger, LedgerError, Limits, ORPHAN_AGE,
    Reservation, ReserveOutcome, ReserveRequest, Tokens, Usage, tenant_scope,
};
use crate::{
    Dependency, TaskId, UpstreamError,
    sqlite::{Database, next_utc_midnight, to_micros, utc_day},
};

/// The ledger port on the embedded file.
#[derive(Clone, Debug)]
pub struct SqliteLedger {
    db: Database,
}

impl SqliteLedger {
    /// Books in `db`, whose tables [`Database::open`] has made.
    pub fn new(db: Database) -> Self {
        Self { db }
    }
}

#[async_trait]
impl Ledger for SqliteLedger {
    async fn reserve(&self, request: &ReserveRequest) -> Result<ReserveOutcome, LedgerError> {
        let request = request.clone();
        self.db.write(move |tx, now| reserve(tx, now, &request)).await
    }

    async fn close(&self, reservation: Reservation, closing: Closing) -> Result<(), LedgerError> {
        self.db.write(move |tx, now| close(tx, now, reservation.id, closing)).await
    }

    async fn budget(&self, limits: Limits) -> Result<BudgetState, LedgerError> {
        self.db.read(move |tx, now| budget(tx, now, limits)).await
    }
}

impl From<rusqlite::Error> for LedgerError {
    fn from(error: rusqlite::Error) -> Self {
        Self::Upstream(error.into())
    }
}

/// The fleet's settings: `None` where nobody set one.
#[derive(Clone, Copy, Debug)]
pub struct FleetSettings {
    /// Wins over `DAILY_TOKEN_BUDGET`.
    pub daily_limit: Option<Tokens>,
    /// Wins over `TOKEN_BUDGET_PER_RUN`.
    pub run_limit: Option<Tokens>,
    /// Nobody starts runs.
    pub paused: bool,
    /// Grows with every flush.
    pub cache_generation: u64,
}

/// Reads the fleet's settings.
pub fn fleet_settings(tx: &Transaction<'_>) -> rusqlite::Result<FleetSettings> {
    tx.prepare_cached("SELECT daily_limit, run_limit, paused, cache_generation FROM fleet_settings")?
        .query_row([], |row| {
            Ok(FleetSettings {
                daily_limit: row.get::<_, Option<i64>>(0)?.map(Tokens::from_stored),
                run_limit: row.get::<_, Option<i64>>(1)?.map(Tokens::from_stored),
                paused: row.get(2)?,
                cache_generation: u64::try_from(row.get::<_, i64>(3)?).unwrap_or(0),
            })
        })
}

/// One row of `token_days`.
#[derive(Clone, Copy, Debug)]
pub struct Account {
    /// The row's limit; of a tenant: `None` when nobody set one.
    pub limit: Option<Tokens>,
    /// Granted and open.
    pub reserved: Tokens,
    /// Settled and assumed.
    pub used: Tokens,
}

impl Account {
    /// What fits under `limit`.
    pub fn available(&self, limit: Tokens) -> Tokens {
        limit.saturating_sub(self.used + self.reserved)
    }
}

/// The account of one scope on one day. A day without a row starts with the scope's last limit.
pub fn account(tx: &Transaction<'_>, day: &str, scope: &str) -> rusqlite::Result<Account> {
    let row = tx
        .prepare_cached("SELECT limit_tokens, reserved, used FROM token_days WHERE day = ?1 AND scope = ?2")?
        .query_row(params![day, scope], |row| {
            Ok(Account {
                limit: row.get::<_, Option<i64>>(0)?.map(Tokens::from_stored),
                reserved: Tokens::from_stored(row.get(1)?),
                used: Tokens::from_stored(row.get(2)?),
            })
        })
        .optional()?;
    if let Some(account) = row {
        return Ok(account);
    }
    let limit: Option<i64> = tx
        .prepare_cached(
            "SELECT limit_tokens FROM token_days WHERE scope = ?1 AND day < ?2 ORDER BY day DESC LIMIT 1",
        )?
        .query_row(params![scope, day], |row| row.get(0))
        .optional()?
        .flatten();
    Ok(Account { limit: limit.map(Tokens::from_stored), reserved: Tokens(0), used: Tokens(0) })
}

/// What the run's calls cost so far: settled, assumed, and open at their upper bound.
fn committed(tx: &Transaction<'_>, task_id: TaskId) -> rusqlite::Result<Tokens> {
    tx.prepare_cached(
        "SELECT coalesce(sum(CASE state WHEN 'reserved' THEN reserved ELSE actual END), 0)
           FROM token_ledger WHERE task_id = ?1",
    )?
    .query_row([task_id.to_string()], |row| row.get(0).map(Tokens::from_stored))
}

/// What the run's calls have billed: settled and assumed.
pub fn spent(tx: &Transaction<'_>, task_id: TaskId) -> rusqlite::Result<Tokens> {
    tx.prepare_cached("SELECT coalesce(sum(actual), 0) FROM token_ledger WHERE task_id = ?1")?
        .query_row([task_id.to_string()], |row| row.get(0).map(Tokens::from_stored))
}

/// Refuses a stale lease: the run must be running, in exactly this attempt.
pub fn fence(tx: &Transaction<'_>, task_id: TaskId, attempt: u32) -> Result<(), LedgerError> {
    let holds: Option<bool> = tx
        .prepare_cached("SELECT status = 'running' AND attempt = ?2 FROM runs WHERE task_id = ?1")?
        .query_row(params![task_id.to_string(), attempt], |row| row.get(0))
        .optional()?;
    if holds == Some(true) { Ok(()) } else { Err(LedgerError::Fenced { attempt }) }
}

/// Grants or denies, against the run's, the tenant's and the day's limit, in this order.
pub fn reserve(
    tx: &Transaction<'_>,
    now: Timestamp,
    request: &ReserveRequest,
) -> Result<ReserveOutcome, LedgerError> {
    if let (Some(task_id), Some(attempt)) = (request.task_id, request.attempt) {
        fence(tx, task_id, attempt)?;
    }
    let granted = || Reservation { id: request.id, tokens: request.tokens, model: request.model.clone() };
    let known: Option<String> = tx
        .prepare_cached("SELECT state FROM token_ledger WHERE id = ?1")?
        .query_row([request.id.to_string()], |row| row.get(0))
        .optional()?;
    match known.as_deref() {
        // A retry of a call whose answer was lost.
        Some("reserved") => return Ok(ReserveOutcome::Granted(granted())),
        Some(_) => return Err(closed_already(request.id)),
        None => {}
    }

    let day = utc_day(now);
    let settings = fleet_settings(tx)?;
    let denied = |denied_by, available, limit| {
        Ok(ReserveOutcome::Denied(Denial {
            denied_by,
            requested: request.tokens,
            available,
            limit,
            resets_at: (denied_by != DeniedBy::Run).then(|| next_utc_midnight(now)),
        }))
    };
    if let Some(task_id) = request.task_id {
        let limit = settings.run_limit.unwrap_or(request.limits.run).min(Tokens::MAX_STORED);
        let available = limit.saturating_sub(committed(tx, task_id)?);
        if request.tokens > available {
            return denied(DeniedBy::Run, available, limit);
        }
    }
    let tenant = request.tenant.as_deref().map(tenant_scope);
    if let Some(scope) = &tenant {
        let account = account(tx, &day, scope)?;
        if let Some(limit) = account.limit
            && request.tokens > account.available(limit)
        {
            return denied(DeniedBy::Tenant, account.available(limit), limit);
        }
    }
    let limit = settings.daily_limit.unwrap_or(request.limits.daily).min(Tokens::MAX_STORED);
    let global = account(tx, &day, GLOBAL_SCOPE)?;
    if request.tokens > global.available(limit) {
        return denied(DeniedBy::Day, global.available(limit), limit);
    }

    let tokens = request.tokens.to_stored();
    tx.prepare_cached(
        "INSERT INTO token_ledger (id, day, scope, task_id, attempt, model, kind, reserved, state, created_at)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, 'reserved', ?9)",
    )?
    .execute(params![
        request.id.to_string(),
        day,
        tenant.as_deref().unwrap_or(GLOBAL_SCOPE),
        request.task_id.map(|id| id.to_string()),
        request.attempt,
        request.model,
        match request.kind {
            CallKind::Chat => "chat",
            CallKind::Embedding => "embedding",
        },
        tokens,
        to_micros(now),
    ])?;
    if let Some(scope) = &tenant {
        book(tx, &day, scope, tokens, 0)?;
    }
    book(tx, &day, GLOBAL_SCOPE, tokens, 0)?;
    tx.prepare_cached("UPDATE token_days SET limit_tokens = ?3 WHERE day = ?1 AND scope = ?2")?
        .execute(params![day, GLOBAL_SCOPE, limit.to_stored()])?;
    Ok(ReserveOutcome::Granted(granted()))
}

fn closed_already(id: Uuid) -> LedgerError {
    UpstreamError::permanent(
        Dependency::Store,
        "reservation_closed",
        format!("reservation {id} was closed before; ask with a fresh id"),
    )
    .into()
}

/// Adds to one account, creating its row with the scope's last limit.
fn book(tx: &Transaction<'_>, day: &str, scope: &str, reserved: i64, used: i64) -> rusqlite::Result<()> {
    let changed = tx
        .prepare_cached(
            "UPDATE token_days SET reserved = reserved + ?3, used = used + ?4 WHERE day = ?1 AND scope = ?2",
        )?
        .execute(params![day, scope, reserved, used])?;
    if changed == 0 {
        let limit = account(tx, day, scope)?.limit.map(Tokens::to_stored);
        tx.prepare_cached(
            "INSERT INTO token_days (day, scope, limit_tokens, reserved, used) VALUES (?1, ?2, ?3, ?4, ?5)",
        )?
        .execute(params![day, scope, limit, reserved, used])?;
    }
    Ok(())
}

/// Ends a reservation on the day it was granted for. What was settled or released before stays as it
/// is; what was assumed is corrected.
pub fn close(tx: &Transaction<'_>, now: Timestamp, id: Uuid, closing: Closing) -> Result<(), LedgerError> {
    struct Row {
        day: String,
        scope: String,
        task_id: Option<String>,
        reserved: i64,
        actual: i64,
        state: String,
    }
    let row = tx
        .prepare_cached(
            "SELECT day, scope, task_id, reserved, actual, state FROM token_ledger WHERE id = ?1",
        )?
        .query_row([id.to_string()], |row| {
            Ok(Row {
                day: row.get(0)?,
                scope: row.get(1)?,
                task_id: row.get(2)?,
                reserved: row.get(3)?,
                actual: row.get(4)?,
                state: row.get(5)?,
            })
        })
        .optional()?;
    let Some(row) = row else {
        return match closing {
            // The grant never reached the store: nothing was booked, nothing is to be undone.
            Closing::Released | Closing::Assumed => Ok(()),
            Closing::Settled { .. } => Err(UpstreamError::permanent(
                Dependency::Store,
                "unknown_reservation",
                format!("there is no reservation {id} to settle"),
            )
            .into()),
        };
    };
    let (state, usage, actual) = match (row.state.as_str(), closing) {
        ("reserved" | "assumed", Closing::Settled { usage }) => ("settled", usage, usage.total().to_stored()),
        ("reserved" | "assumed", Closing::Released) => ("released", Usage::default(), 0),
        ("reserved", Closing::Assumed) => ("assumed", Usage::default(), row.reserved),
        _ => return Ok(()),
    };
    tx.prepare_cached(
        "UPDATE token_ledger
            SET state = ?2, actual = ?3, tokens_prompt = ?4, tokens_completion = ?5, closed_at = ?6
          WHERE id = ?1",
    )?
    .execute(params![
        id.to_string(),
        state,
        actual,
        usage.prompt.to_stored(),
        usage.completion.to_stored(),
        to_micros(now)
    ])?;
    let freed = if row.state == "reserved" { row.reserved } else { 0 };
    if row.scope != GLOBAL_SCOPE {
        book(tx, &row.day, &row.scope, -freed, actual - row.actual)?;
    }
    book(tx, &row.day, GLOBAL_SCOPE, -freed, actual - row.actual)?;
    if let Some(task_id) = row.task_id {
        // A finished run never changes: a correction that comes later is in the ledger only.
        tx.prepare_cached(
            "UPDATE runs
                SET tokens_prompt     = (SELECT sum(tokens_prompt)     FROM token_ledger WHERE task_id = ?1),
                    tokens_completion = (SELECT sum(tokens_completion) FROM token_ledger WHERE task_id = ?1)
              WHERE task_id = ?1 AND ended_at IS NULL",
        )?
        .execute([task_id])?;
    }
    Ok(())
}

/// Books every open reservation of a run as spent: whoever held them is gone.
pub fn assume_open(tx: &Transaction<'_>, now: Timestamp, task_id: TaskId) -> Result<(), LedgerError> {
    let open = ids(
        tx,
        "SELECT id FROM token_ledger WHERE task_id = ?1 AND state = 'reserved'",
        &task_id.to_string(),
    )?;
    for id in open {
        close(tx, now, id, Closing::Assumed)?;
    }
    Ok(())
}

/// Books what nobody will ever close: open for longer than any call can take, and of no run that is at
/// work (an index job whose process died).
pub fn assume_orphans(tx: &Transaction<'_>, now: Timestamp) -> Result<(), LedgerError> {
    let before = to_micros(now).saturating_sub(i64::try_from(ORPHAN_AGE.as_micros()).unwrap_or(i64::MAX));
    let orphans = ids(
        tx,
        "SELECT id FROM token_ledger AS l
          WHERE state = 'reserved' AND created_at <= ?1
            AND NOT EXISTS (SELECT 1 FROM runs WHERE task_id = l.task_id AND status = 'running')
          ORDER BY created_at LIMIT 100",
        &before,
    )?;
    for id in orphans {
        close(tx, now, id, Closing::Assumed)?;
    }
    Ok(())
}

fn ids(tx: &Transaction<'_>, sql: &str, parameter: &dyn rusqlite::ToSql) -> Result<Vec<Uuid>, LedgerError> {
    let mut statement = tx.prepare_cached(sql)?;
    let rows = statement.query_map([parameter], |row| row.get::<_, String>(0))?;
    let mut ids = Vec::new();
    for row in rows {
        if let Ok(id) = Uuid::parse_str(&row?) {
            ids.push(id);
        }
    }
    Ok(ids)
}

/// Today's account of the whole fleet.
pub fn budget(tx: &Transaction<'_>, now: Timestamp, limits: Limits) -> Result<BudgetState, LedgerError> {
    let day = utc_day(now);
    let account = account(tx, &day, GLOBAL_SCOPE)?;
    Ok(BudgetState {
        limit: fleet_settings(tx)?.daily_limit.unwrap_or(limits.daily),
        used: account.used,
        reserved: account.reserved,
        resets_at: next_utc_midnight(now),
        day,
    })
}
