//! A SQLite file of every earlier schema, with rows in it, opened by this release: nothing is lost, and it is
//! then like a new one.
//!
//! `sqlite_versions/N.sql` is the schema as the release with `PRAGMA user_version = N` made it.

use std::{collections::BTreeMap, path::Path, time::Duration};

use atlas_shared::{TaskId, Tokens, ledger::CallKind, message::AnswerType, sqlite::FILE_NAME};
use atlas_worker::store::{EntryState, RunStatus, Wake};
use rusqlite::{Connection, types::Value as Cell};
use tempfile::TempDir;
use uuid::Uuid;

use crate::harness::{AMPLE, Harness, LEASE, answer, done};

/// The schemas, oldest first; the last one is this release's.
const VERSIONS: [&str; 4] = [
    include_str!("sqlite_versions/1.sql"),
    include_str!("sqlite_versions/2.sql"),
    include_str!("sqlite_versions/3.sql"),
    include_str!("sqlite_versions/4.sql"),
];

const DONE: &str = "00000000-0000-4000-8000-000000000001";
const FAILED: &str = "00000000-0000-4000-8000-000000000002";
const ABANDONED: &str = "00000000-0000-4000-8000-000000000003";
const DEFERRED: &str = "00000000-0000-4000-8000-000000000004";
const LETTER: &str = "00000000-0000-4000-8000-00000000000d";

/// What a day of work leaves in a file, in columns that every version has. `$T` is the tests' noon.
const ROWS: &str = r#"
INSERT INTO runs (task_id, status, attempt, finished_attempt, tenant, requester, model, tokens_prompt,
                  tokens_completion, created_at, started_at, ended_at)
VALUES ('$DONE', 'done', 1, 1, 'acme', 'ci', 'gpt-4.1', 30, 40, $T - 9000000, $T - 8000000, $T - 7000000);
INSERT INTO runs (task_id, status, attempt, finished_attempt, created_at, started_at, ended_at, error_code,
                  error_message)
VALUES ('$FAILED', 'failed', 2, 2, $T - 6000000, $T - 6000000, $T - 5000000, 'model_refused', 'No.');
INSERT INTO runs (task_id, status, attempt, claim_id, lease_owner, lease_until, tokens_prompt,
                  tokens_completion, created_at, started_at)
VALUES ('$ABANDONED', 'running', 1, 'c', 'worker-0', $T - 1000000, 3, 4, $T - 4000000, $T - 4000000);
INSERT INTO runs (task_id, status, attempt, not_before, tokens_needed, deferrals, created_at, started_at)
VALUES ('$DEFERRED', 'deferred', 1, $T + 43200000000, 50, 1, $T - 3000000, $T - 3000000);
INSERT INTO architect_in (id, data, created_at)
SELECT task_id, json_object('task_id', task_id, 'role', 'architect', 'msg_type', 'chat', 'content', 'Design a queue',
                            'metadata', json('{"team": "billing"}')), created_at
  FROM runs;
INSERT INTO architect_out (id, data, created_at)
VALUES ('$DONE', '{"content": "A queue", "task_id": "$DONE"}', $T - 7000000),
       ('$FAILED', '{"content": "No.", "task_id": "$FAILED"}', $T - 5000000);
INSERT INTO run_steps (task_id, step, seq, input_hash, output, usage, created_at)
VALUES ('$ABANDONED', 'draft.0', 0, 'abc', '{"text": "half"}', '{"prompt": 3, "completion": 4}', $T - 2000000);
INSERT INTO token_days (day, scope, limit_tokens, reserved, used)
VALUES ('2026-02-28', 'tenant:acme', 900, 0, 0),
       ('2026-03-01', 'global', 777, 60, 77),
       ('2026-03-01', 'tenant:acme', 900, 0, 70);
INSERT INTO token_ledger (id, day, scope, task_id, attempt, model, kind, reserved, actual, tokens_prompt,
                          tokens_completion, state, created_at, closed_at)
VALUES ('00000000-0000-4000-8000-0000000000a1', '2026-03-01', 'tenant:acme', '$DONE', 1, 'gpt-4.1', 'chat', 100, 70,
        30, 40, 'settled', $T - 8000000, $T - 7500000),
       ('00000000-0000-4000-8000-0000000000a2', '2026-03-01', 'global', '$ABANDONED', 1, 'gpt-4.1', 'chat', 20, 7, 3,
        4, 'settled', $T - 4000000, $T - 3000000),
       ('00000000-0000-4000-8000-0000000000a3', '2026-03-01', 'global', '$ABANDONED', 1, 'gpt-4.1', 'chat', 60, 0, 0,
        0, 'reserved', $T - 2000000, NULL);
INSERT INTO outbox (id, task_id, attempt, final, topic, message, attributes, created_at, sent_at)
VALUES ('00000000-0000-4000-8000-0000000000b1', '$DONE', 1, 1, 'architect_out', '{"content": "A queue"}', '[]',
        $T - 7000000, $T - 6900000),
       ('00000000-0000-4000-8000-0000000000b2', '$FAILED', 2, 1, 'architect_out', '{"content": "No."}',
        '[["task_id", "$FAILED"]]', $T - 5000000, NULL);
INSERT INTO dead_letters (id, source, reason, detail, raw, attributes, task_id, received_at)
VALUES ('$LETTER', 'architect_in-atlas', 'not_json', 'The message is not JSON.', 'aGk=', '[["a", "b"]]', NULL,
        $T - 1000000);
UPDATE fleet_settings SET daily_limit = 777, run_limit = 99, cache_generation = 3;
"#;

/// Makes the file that a release with this schema left in `dir`.
fn old_file(dir: &Path, version: usize) -> Connection {
    const NOON_MICROSECONDS: &str = "1772366400000000";
    let connection = Connection::open(dir.join(FILE_NAME)).unwrap();
    connection.query_row("PRAGMA journal_mode = WAL", [], |row| row.get::<_, String>(0)).unwrap();
    connection.execute_batch(VERSIONS[version - 1]).unwrap();
    connection.pragma_update(None, "user_version", u32::try_from(version).unwrap()).unwrap();
    let rows = [
        ("$DONE", DONE),
        ("$FAILED", FAILED),
        ("$ABANDONED", ABANDONED),
        ("$DEFERRED", DEFERRED),
        ("$LETTER", LETTER),
        ("$T", NOON_MICROSECONDS),
    ]
    .into_iter()
    .fold(ROWS.to_owned(), |rows, (name, value)| rows.replace(name, value));
    connection.execute_batch(&rows).unwrap();
    connection
}

/// Columns of each table, and how each is declared.
type Tables = BTreeMap<String, BTreeMap<String, String>>;

fn tables(connection: &Connection) -> Tables {
    let mut statement = connection
        .prepare(
            "SELECT t.name, c.name, c.type || ' ' || c.\"notnull\" || ' ' || coalesce(c.dflt_value, '-') || ' ' || c.pk
               FROM sqlite_schema AS t, pragma_table_info(t.name) AS c
              WHERE t.type = 'table' AND t.name NOT LIKE 'sqlite%'",
        )
        .unwrap();
    let mut tables = Tables::new();
    let mut rows = statement.query([]).unwrap();
    while let Some(row) = rows.next().unwrap() {
        let (table, column, declared) = (row.get(0).unwrap(), row.get(1).unwrap(), row.get(2).unwrap());
        tables.entry(table).or_default().insert(column, declared);
    }
    tables
}

fn indexes(connection: &Connection) -> Vec<(String, Option<String>)> {
    let mut statement =
        connection.prepare("SELECT name, sql FROM sqlite_schema WHERE type = 'index' ORDER BY 1").unwrap();
    let rows = statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?))).unwrap();
    rows.collect::<Result<_, _>>().unwrap()
}

/// Everything in these columns.
fn contents(connection: &Connection, columns: &Tables) -> BTreeMap<String, Vec<Vec<Cell>>> {
    let read = |(table, columns): (&String, &BTreeMap<String, String>)| {
        let names = columns.keys().map(|name| format!("\"{name}\"")).collect::<Vec<_>>().join(", ");
        let mut statement =
            connection.prepare(&format!("SELECT {names} FROM {table} ORDER BY {names}")).unwrap();
        let rows =
            statement.query_map([], |row| (0..columns.len()).map(|index| row.get(index)).collect()).unwrap();
        (table.clone(), rows.collect::<Result<_, _>>().unwrap())
    };
    columns.iter().map(read).collect()
}

fn version(connection: &Connection) -> i64 {
    connection.query_row("PRAGMA user_version", [], |row| row.get(0)).unwrap()
}

fn id(text: &str) -> TaskId {
    text.parse().unwrap()
}

/// A schema that changes needs a number and a file here, or the next release's upgrade is untested.
#[tokio::test]
async fn the_last_version_kept_here_is_the_one_that_is_made() {
    let h = Harness::embedded().await;
    let made = Connection::open(h.file()).unwrap();
    assert_eq!(usize::try_from(version(&made)).unwrap(), VERSIONS.len(), "add sqlite_versions/N.sql");
    let kept = Connection::open_in_memory().unwrap();
    kept.execute_batch(VERSIONS[VERSIONS.len() - 1]).unwrap();
    let why = "schema.sql has changed: raise SCHEMA_VERSION, and add sqlite_versions/N.sql";
    assert_eq!(tables(&made), tables(&kept), "{why}");
    assert_eq!(indexes(&made), indexes(&kept), "{why}");
}

#[tokio::test]
async fn a_file_of_every_earlier_version_keeps_what_is_in_it_and_becomes_like_a_new_one() {
    let new = Harness::embedded().await;
    let new = Connection::open(new.file()).unwrap();
    for old in 1..=VERSIONS.len() {
        let dir = TempDir::new().unwrap();
        let before = old_file(dir.path(), old);
        let columns = tables(&before);
        let kept = contents(&before, &columns);
        assert!(kept.iter().all(|(table, rows)| !rows.is_empty() || table == "early_cancels"), "{kept:?}");
        drop(before);

        let path = dir.path().join(FILE_NAME);
        let h = Harness::embedded_in(dir).await;
        let after = Connection::open(path).unwrap();
        assert_eq!(contents(&after, &columns), kept, "version {old}");
        assert_eq!(tables(&after), tables(&new), "version {old}");
        assert_eq!(indexes(&after), indexes(&new), "version {old}");
        assert_eq!(version(&after), version(&new), "version {old}");
        drop(after);
        goes_on(&h).await;
    }
}

/// This release works with the rows as with its own.
async fn goes_on(h: &Harness) {
    h.assert_books_agree().await;
    let fleet = h.store.fleet_state(AMPLE).await.unwrap();
    assert_eq!((fleet.budget.limit, fleet.run_limit, fleet.cache_generation), (Tokens(777), Tokens(99), 3));
    assert_eq!((fleet.running_runs, fleet.deferred_runs, fleet.dead_letters), (1, 1, 1));

    let shown = h.run(id(DONE)).await;
    assert_eq!((shown.run.status, shown.run.tenant.as_deref()), (RunStatus::Done, Some("acme")));
    assert_eq!(shown.answer.unwrap()["content"], "A queue");
    assert_eq!((shown.ledger[0].state, shown.ledger[0].kind), (EntryState::Settled, CallKind::Chat));
    let history = h.store.budget_history(7, AMPLE).await.unwrap();
    assert_eq!((history[0].used, history.len()), (Tokens(77), 3));

    // The answer that was not sent is; that one, and no other.
    let [unsent] = h.store.outbox_take(10, LEASE).await.unwrap().try_into().unwrap();
    assert_eq!((unsent.task_id, unsent.message.value()["content"].as_str()), (id(FAILED), Some("No.")));
    h.store.outbox_mark_sent(&[unsent.id]).await.unwrap();

    // The dead worker's run goes on from its checkpoint; what it had open is booked as spent.
    assert_eq!(h.store.wake_run(id(DEFERRED)).await.unwrap(), Wake::Due);
    let [taken, deferred] = h.due(10).await.try_into().unwrap();
    assert_eq!((taken.lease.task_id, taken.lease.attempt, taken.taken_over), (id(ABANDONED), 2, true));
    assert_eq!((taken.steps[0].output.value()["text"].as_str(), taken.spent), (Some("half"), Tokens(67)));
    h.store.finish_run(taken.lease, &done(id(ABANDONED))).await.unwrap();
    assert_eq!((deferred.lease.task_id, deferred.deferrals), (id(DEFERRED), 1));
    assert_eq!(deferred.message["metadata"]["team"], "billing");
    h.store.release_run(deferred.lease, Duration::ZERO).await.unwrap();

    // What later versions added.
    let letter: Uuid = LETTER.parse().unwrap();
    assert!(h.store.mark_replayed(letter, Some(id(DEFERRED))).await.unwrap());
    let letter = h.store.get_dead_letter(letter).await.unwrap().unwrap();
    assert_eq!((letter.raw_base64.as_str(), letter.letter.replayed_as), ("aGk=", Some(id(DEFERRED))));
    let early = TaskId::random();
    let cancelled = answer(early, AnswerType::Error, "cancelled");
    assert!(h.store.cancel_run(early, "architect_out", &cancelled).await.unwrap());
    assert!(h.claim(early).await.cancel_requested);
    h.assert_books_agree().await;
}
