//! What operators ask, on the embedded file.

use std::time::Duration;

use atlas_shared::{
    TaskId, Tokens,
    config::RetentionConfig,
    ledger::{GLOBAL_SCOPE, Limits, sqlite as books},
    sqlite::{from_micros, to_micros, utc_day},
};
use jiff::{SignedDuration, Timestamp};
use rusqlite::{OptionalExtension as _, Row, Transaction, params};
use serde_json::Value;
use uuid::Uuid;

use super::{RUN_COLUMNS, RawRun, count, from_json, raw_run, run_state, sql_limit, unreadable};
use crate::store::{
    DayAccount, DeadLetterDetail, DeadLetterFilter, DeadLetterPurge, DeadLetterRecord, LedgerEntry, Purged,
    RunFilter, RunRecord, RunStatus, StoreError, Wake,
    operator::{EARLY_CANCEL_KEPT, EARLY_CANCELS_CLEARED},
};

pub(super) fn find_runs(tx: &Transaction<'_>, filter: &RunFilter) -> Result<Vec<RunRecord>, StoreError> {
    let mut statement = tx.prepare_cached(&format!(
        "SELECT {RUN_COLUMNS} FROM runs
          WHERE (?1 IS NULL OR status = ?1) AND (?2 IS NULL OR tenant = ?2)
            AND (?3 IS NULL OR error_code = ?3)
            AND (?4 IS NULL OR coalesce(ended_at, created_at) >= ?4)
          ORDER BY created_at DESC, task_id LIMIT ?5"
    ))?;
    let rows = statement
        .query_map(
            params![
                filter.status.map(RunStatus::as_str),
                filter.tenant,
                filter.error_code,
                filter.since.map(to_micros),
                sql_limit(filter.limit)
            ],
            raw_run,
        )?
        .collect::<rusqlite::Result<Vec<_>>>()?;
    rows.into_iter().map(RawRun::read).collect()
}

/// The newest calls of a run, oldest first.
pub(super) fn ledger_of(tx: &Transaction<'_>, task_id: TaskId) -> Result<Vec<LedgerEntry>, StoreError> {
    let mut statement = tx.prepare_cached(
        "SELECT id, day, attempt, model, kind, state, reserved, actual, created_at, closed_at
           FROM token_ledger WHERE task_id = ?1 ORDER BY created_at DESC, id DESC LIMIT 200",
    )?;
    let mut rows = statement.query([task_id.to_string()])?;
    let mut entries = Vec::new();
    while let Some(row) = rows.next()? {
        let word = |index| Ok::<_, StoreError>(Value::String(row.get::<_, String>(index)?));
        entries.push(LedgerEntry {
            id: row.get::<_, String>(0)?.parse().map_err(unreadable)?,
            day: row.get(1)?,
            attempt: row.get(2)?,
            model: row.get(3)?,
            kind: serde_json::from_value(word(4)?).map_err(unreadable)?,
            state: serde_json::from_value(word(5)?).map_err(unreadable)?,
            reserved: Tokens::from_stored(row.get(6)?),
            actual: Tokens::from_stored(row.get(7)?),
            created_at: from_micros(row.get(8)?),
            closed_at: row.get::<_, Option<i64>>(9)?.map(from_micros),
        });
    }
    entries.reverse();
    Ok(entries)
}

pub(super) fn wake_run(tx: &Transaction<'_>, now: Timestamp, task_id: TaskId) -> Result<Wake, StoreError> {
    let Some(run) = run_state(tx, task_id)? else { return Ok(Wake::Unknown) };
    if run.is_final() {
        return Ok(Wake::Final);
    }
    if run.status == RunStatus::Running {
        // A sweep takes an expired lease by itself.
        return Ok(if run.is_leased(now) { Wake::Running } else { Wake::Due });
    }
    tx.prepare_cached(
        "UPDATE runs SET status = 'queued', not_before = NULL, tokens_needed = NULL WHERE task_id = ?1",
    )?
    .execute([task_id.to_string()])?;
    Ok(Wake::Due)
}

/// Remembers the cancel of a task that has no run, and clears away what no message can meet any more.
pub(super) fn cancel_early(tx: &Transaction<'_>, now: Timestamp, task_id: TaskId) -> Result<(), StoreError> {
    tx.prepare_cached("INSERT OR IGNORE INTO early_cancels (task_id, created_at) VALUES (?1, ?2)")?
        .execute(params![task_id.to_string(), to_micros(now)])?;
    tx.prepare_cached(
        "DELETE FROM early_cancels WHERE task_id IN (
             SELECT task_id FROM early_cancels WHERE created_at < ?1 ORDER BY created_at LIMIT ?2)",
    )?
    .execute(params![to_micros(before(now, EARLY_CANCEL_KEPT)), sql_limit(EARLY_CANCELS_CLEARED)])?;
    Ok(())
}

/// Was the task, whose run is made right now, cancelled before? Its run must remember it from here on.
pub(super) fn take_early_cancel(tx: &Transaction<'_>, task_id: TaskId) -> Result<bool, StoreError> {
    let known =
        tx.prepare_cached("DELETE FROM early_cancels WHERE task_id = ?1")?.execute([task_id.to_string()])?;
    Ok(known > 0)
}

/// A dead letter's columns; `raw` is base64, so its size is computed from its length and padding.
const LETTER_COLUMNS: &str = "id, source, reason, detail, \
     length(raw) / 4 * 3 - (length(raw) - length(rtrim(raw, '='))), task_id, received_at, replayed_at, replayed_as";

struct RawLetter {
    id: String,
    task_id: Option<String>,
    replayed_as: Option<String>,
    record: DeadLetterRecord,
}

fn raw_letter(row: &Row<'_>) -> rusqlite::Result<RawLetter> {
    Ok(RawLetter {
        id: row.get(0)?,
        task_id: row.get(5)?,
        replayed_as: row.get(8)?,
        record: DeadLetterRecord {
            // Ids are read from the strings above, where a fault can be reported.
            id: Uuid::nil(),
            source: row.get(1)?,
            reason: row.get(2)?,
            detail: row.get(3)?,
            bytes: count(row, 4)?,
            task_id: None,
            received_at: from_micros(row.get(6)?),
            replayed_at: row.get::<_, Option<i64>>(7)?.map(from_micros),
            replayed_as: None,
        },
    })
}

impl RawLetter {
    fn read(self) -> Result<DeadLetterRecord, StoreError> {
        let task = |id: Option<String>| id.map(|id| id.parse().map_err(unreadable)).transpose();
        Ok(DeadLetterRecord {
            id: self.id.parse().map_err(unreadable)?,
            task_id: task(self.task_id)?,
            replayed_as: task(self.replayed_as)?,
            ..self.record
        })
    }
}

pub(super) fn list_dead_letters(
    tx: &Transaction<'_>,
    filter: &DeadLetterFilter,
) -> Result<Vec<DeadLetterRecord>, StoreError> {
    let mut statement = tx.prepare_cached(&format!(
        "SELECT {LETTER_COLUMNS} FROM dead_letters
          WHERE (?1 IS NULL OR reason = ?1) AND (?2 IS NULL OR (replayed_at IS NOT NULL) = ?2)
            AND (?3 IS NULL OR received_at >= ?3)
          ORDER BY received_at DESC, id LIMIT ?4"
    ))?;
    let rows = statement
        .query_map(
            params![filter.reason, filter.replayed, filter.since.map(to_micros), sql_limit(filter.limit)],
            raw_letter,
        )?
        .collect::<rusqlite::Result<Vec<_>>>()?;
    rows.into_iter().map(RawLetter::read).collect()
}

pub(super) fn get_dead_letter(
    tx: &Transaction<'_>,
    id: Uuid,
) -> Result<Option<DeadLetterDetail>, StoreError> {
    let found = tx
        .prepare_cached(&format!("SELECT {LETTER_COLUMNS}, raw, attributes FROM dead_letters WHERE id = ?1"))?
        .query_row([id.to_string()], |row| {
            Ok((raw_letter(row)?, row.get::<_, String>(9)?, row.get::<_, String>(10)?))
        })
        .optional()?;
    let Some((letter, raw_base64, attributes)) = found else { return Ok(None) };
    Ok(Some(DeadLetterDetail { letter: letter.read()?, raw_base64, attributes: from_json(&attributes)? }))
}

pub(super) fn mark_replayed(
    tx: &Transaction<'_>,
    now: Timestamp,
    id: Uuid,
    replayed_as: Option<TaskId>,
) -> Result<bool, StoreError> {
    let changed = tx
        .prepare_cached("UPDATE dead_letters SET replayed_at = ?2, replayed_as = ?3 WHERE id = ?1")?
        .execute(params![id.to_string(), to_micros(now), replayed_as.map(|id| id.to_string())])?;
    Ok(changed > 0)
}

pub(super) fn purge_dead_letters(
    tx: &Transaction<'_>,
    now: Timestamp,
    purge: &DeadLetterPurge,
    limit: usize,
) -> Result<u64, StoreError> {
    let ids = purge.ids.as_ref().map(|ids| serde_json::to_string(ids).map_err(unreadable)).transpose()?;
    let fitting = "SELECT id FROM dead_letters
          WHERE (?1 IS NULL OR id IN (SELECT value FROM json_each(?1))) AND (?2 IS NULL OR reason = ?2)
            AND (?3 IS NULL OR received_at < ?3) AND (replayed_at IS NOT NULL OR ?4)
          ORDER BY received_at, id LIMIT ?5";
    let params = params![
        ids,
        purge.reason,
        purge.older_than.map(|age| to_micros(before(now, age))),
        purge.unreplayed,
        sql_limit(limit)
    ];
    if purge.dry_run {
        let sql = format!("SELECT count(*) FROM ({fitting})");
        return Ok(tx.prepare_cached(&sql)?.query_row(params, |row| count(row, 0))?);
    }
    let sql = format!("DELETE FROM dead_letters WHERE id IN ({fitting})");
    Ok(tx.prepare_cached(&sql)?.execute(params)? as u64)
}

pub(super) fn budget_history(
    tx: &Transaction<'_>,
    now: Timestamp,
    days: u32,
    limits: Limits,
) -> Result<Vec<DayAccount>, StoreError> {
    let today = utc_day(now);
    let first = utc_day(before(now, Duration::from_hours(24) * days.saturating_sub(1)));
    let in_force = books::fleet_settings(tx)?.daily_limit.unwrap_or(limits.daily);
    let mut statement = tx.prepare_cached(
        "SELECT d.day, d.scope, d.limit_tokens, d.used, d.reserved,
                coalesce(sum(l.actual), 0),
                coalesce(sum(l.actual) FILTER (WHERE l.state = 'assumed'), 0),
                coalesce(sum(l.actual) FILTER (WHERE l.kind = 'chat'), 0),
                coalesce(sum(l.actual) FILTER (WHERE l.kind = 'embedding'), 0)
           FROM token_days AS d
                LEFT JOIN token_ledger AS l
                  ON l.day = d.day AND (d.scope = 'global' OR l.scope = d.scope)
          WHERE d.day >= ?1
          GROUP BY d.day, d.scope
          ORDER BY d.day DESC, d.scope <> 'global', d.scope",
    )?;
    let rows = statement.query_map([first], |row| {
        let tokens = |index| row.get(index).map(Tokens::from_stored);
        let (day, scope): (String, String) = (row.get(0)?, row.get(1)?);
        let (used, booked) = (tokens(3)?, tokens(5)?);
        // Rows of that day are purged: parts of a sum that is no longer whole would mislead.
        let part = |index| if used == booked { tokens(index).map(Some) } else { Ok(None) };
        Ok(DayAccount {
            limit: if scope == GLOBAL_SCOPE && day == today {
                Some(in_force)
            } else {
                row.get::<_, Option<i64>>(2)?.map(Tokens::from_stored)
            },
            used,
            reserved: tokens(4)?,
            assumed: part(6)?,
            chat: part(7)?,
            embedding: part(8)?,
            day,
            scope,
        })
    })?;
    Ok(rows.collect::<rusqlite::Result<Vec<_>>>()?)
}

pub(super) fn purge_old(
    tx: &Transaction<'_>,
    now: Timestamp,
    keep: &RetentionConfig,
    limit: usize,
) -> Result<Purged, StoreError> {
    let limit = sql_limit(limit);
    let delete = |sql: &str, age: Option<Duration>| -> Result<u64, StoreError> {
        let Some(age) = age else { return Ok(0) };
        Ok(tx.prepare_cached(sql)?.execute(params![to_micros(before(now, age)), limit])? as u64)
    };
    let ledger = match keep.ledger {
        None => 0,
        Some(age) => tx
            .prepare_cached(
                "DELETE FROM token_ledger WHERE id IN (
                     SELECT l.id FROM token_ledger AS l
                      WHERE l.day < ?1 AND l.state <> 'reserved'
                        AND NOT EXISTS (
                          SELECT 1 FROM runs AS r WHERE r.task_id = l.task_id AND r.ended_at IS NULL)
                      ORDER BY l.day LIMIT ?2)",
            )?
            .execute(params![utc_day(before(now, age)), limit])? as u64,
    };
    Ok(Purged {
        outbox: delete(
            "DELETE FROM outbox WHERE seq IN (
                 SELECT seq FROM outbox WHERE sent_at < ?1 ORDER BY sent_at LIMIT ?2)",
            keep.outbox,
        )?,
        steps: delete(
            "DELETE FROM run_steps WHERE rowid IN (
                 SELECT s.rowid FROM run_steps AS s JOIN runs AS r ON r.task_id = s.task_id
                  WHERE s.created_at < ?1 AND r.ended_at < ?1 ORDER BY s.created_at LIMIT ?2)",
            keep.steps,
        )?,
        requests: delete(
            "DELETE FROM architect_in WHERE id IN (
                 SELECT i.id FROM architect_in AS i JOIN runs AS r ON r.task_id = i.id
                  WHERE i.created_at < ?1 AND r.ended_at < ?1 ORDER BY i.created_at LIMIT ?2)",
            keep.requests,
        )?,
        ledger,
        dead_letters: delete(
            "DELETE FROM dead_letters WHERE id IN (
                 SELECT id FROM dead_letters WHERE replayed_at < ?1 ORDER BY replayed_at LIMIT ?2)",
            keep.dead_letters,
        )?,
    })
}

/// `at - age`, or the beginning of time.
fn before(at: Timestamp, age: Duration) -> Timestamp {
    SignedDuration::try_from(age).ok().and_then(|age| at.checked_sub(age).ok()).unwrap_or(Timestamp::MIN)
}
