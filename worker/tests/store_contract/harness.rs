//! One store under test, its clock, and its books as the database has them.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use atlas_shared::{
    Secret, TaskId, Tokens, UpstreamError, WorkerId,
    config::SupabaseConfig,
    ledger::{
        CallKind, Closing, GLOBAL_SCOPE, LedgerError, Limits, Reservation, ReserveOutcome, ReserveRequest,
        Usage,
    },
    message::{Answer, AnswerStatus, AnswerType},
    sqlite::Database,
};
use atlas_test_support::{skip, supabase::Supabase};
use atlas_worker::store::{
    Checkpoint, Claim, ClaimRequest, ClaimedRun, FinalStatus, Finish, Json, Lease, OUTBOX_HOLD, RunDetail,
    RunStore, Settlement, SqliteStore, SupabaseStore,
};
use jiff::Timestamp;
use serde_json::{Map, Value, json};
use tempfile::TempDir;
use uuid::Uuid;

/// Limits that no test runs into by accident.
pub(crate) const AMPLE: Limits = Limits { daily: Tokens(1_000_000), run: Tokens(100_000) };

/// How long the tests' leases last.
pub(crate) const LEASE: Duration = Duration::from_mins(1);

pub(crate) struct Harness {
    pub(crate) store: Arc<dyn RunStore>,
    backend: Backend,
    now: Mutex<Timestamp>,
}

enum Backend {
    Sqlite { db: Database, _dir: TempDir },
    Supabase { project: Box<Supabase>, sql: tokio_postgres::Client },
}

/// A row of `token_days`: limit, reserved, used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Account {
    pub(crate) limit: Option<i64>,
    pub(crate) reserved: i64,
    pub(crate) used: i64,
}

/// A row of `token_ledger`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) id: Uuid,
    pub(crate) day: String,
    pub(crate) scope: String,
    pub(crate) task_id: Option<TaskId>,
    pub(crate) reserved: i64,
    pub(crate) actual: i64,
    pub(crate) state: String,
}

/// The two tables that must agree.
#[derive(Debug)]
pub(crate) struct Books {
    pub(crate) days: BTreeMap<(String, String), Account>,
    pub(crate) ledger: Vec<Entry>,
}

impl Harness {
    pub(crate) async fn embedded() -> Self {
        Self::embedded_in(tempfile::tempdir().unwrap()).await
    }

    /// On the file that is, or will be, in `dir`.
    pub(crate) async fn embedded_in(dir: TempDir) -> Self {
        let db = Database::open(dir.path()).await.unwrap();
        let store = Arc::new(SqliteStore::new(db.clone()));
        Self::started(store, Backend::Sqlite { db, _dir: dir }).await
    }

    /// `None`: this machine has no Postgres, and the test was named as skipped.
    pub(crate) async fn supabase(test: &str) -> Option<Self> {
        let project = match Supabase::start().await {
            Ok(project) => project,
            Err(reason) => {
                skip(test, "Postgres", &reason);
                return None;
            }
        };
        let sql = project.database().await.unwrap();
        let store = Arc::new(supabase_store(&project.url, &project.service_role_key));
        Some(Self::started(store, Backend::Supabase { project: Box::new(project), sql }).await)
    }

    async fn started(store: Arc<dyn RunStore>, backend: Backend) -> Self {
        let noon: Timestamp = "2026-03-01T12:00:00Z".parse().unwrap();
        let harness = Self { store, backend, now: Mutex::new(noon) };
        harness.set_now(noon).await;
        harness
    }

    /// The SQLite file.
    pub(crate) fn file(&self) -> &std::path::Path {
        match &self.backend {
            Backend::Sqlite { db, .. } => db.path(),
            Backend::Supabase { .. } => panic!("not in a file"),
        }
    }

    pub(crate) fn project(&self) -> &Supabase {
        match &self.backend {
            Backend::Supabase { project, .. } => project,
            Backend::Sqlite { .. } => panic!("not on Supabase"),
        }
    }

    pub(crate) fn sql(&self) -> &tokio_postgres::Client {
        match &self.backend {
            Backend::Supabase { sql, .. } => sql,
            Backend::Sqlite { .. } => panic!("not on Supabase"),
        }
    }

    pub(crate) fn now(&self) -> Timestamp {
        *self.now.lock().unwrap()
    }

    pub(crate) async fn set_now(&self, at: Timestamp) {
        *self.now.lock().unwrap() = at;
        match &self.backend {
            Backend::Sqlite { db, .. } => db.clock().stop_at(at),
            Backend::Supabase { sql, .. } => sql
                .batch_execute(&format!(
                    "create or replace function public.atlas_now() returns timestamptz
                     language sql stable as $$ select timestamptz '{at}' $$"
                ))
                .await
                .unwrap(),
        }
    }

    pub(crate) async fn advance(&self, by: Duration) {
        let at = self.now().checked_add(jiff::SignedDuration::try_from(by).unwrap()).unwrap();
        self.set_now(at).await;
    }

    /// The first second of the next UTC day.
    pub(crate) async fn pass_midnight(&self) {
        let midnight = atlas_shared::sqlite::next_utc_midnight(self.now());
        self.set_now(midnight).await;
    }

    pub(crate) async fn books(&self) -> Books {
        match &self.backend {
            Backend::Sqlite { db, .. } => {
                db.read(|tx, _now| Ok::<_, UpstreamError>(sqlite_books(tx)?)).await.unwrap()
            }
            Backend::Supabase { sql, .. } => postgres_books(sql).await,
        }
    }

    pub(crate) async fn account(&self, day: &str, scope: &str) -> Account {
        self.books().await.days.get(&(day.to_owned(), scope.to_owned())).copied().unwrap_or_default()
    }

    /// Today's account of the fleet.
    pub(crate) async fn global(&self) -> Account {
        self.account(&atlas_shared::sqlite::utc_day(self.now()), GLOBAL_SCOPE).await
    }

    pub(crate) async fn entry(&self, id: Uuid) -> Entry {
        self.books().await.ledger.into_iter().find(|entry| entry.id == id).expect("no such ledger row")
    }

    /// Rows in `architect_out` for a task: 0 or 1, by primary key; and in the outbox as its final answer.
    pub(crate) async fn results_of(&self, task: TaskId) -> (i64, i64) {
        match &self.backend {
            Backend::Sqlite { db, .. } => db
                .read(move |tx, _now| {
                    let count = |sql: &str| tx.query_row(sql, [task.to_string()], |row| row.get(0));
                    Ok::<_, UpstreamError>((
                        count("SELECT count(*) FROM architect_out WHERE id = ?1")?,
                        count("SELECT count(*) FROM outbox WHERE task_id = ?1 AND final")?,
                    ))
                })
                .await
                .unwrap(),
            Backend::Supabase { sql, .. } => {
                let count =
                    async |text: &str| sql.query_one(text, &[&task.0]).await.unwrap().get::<_, i64>(0);
                (
                    count("select count(*) from architect_out where id = $1").await,
                    count("select count(*) from outbox where task_id = $1 and final").await,
                )
            }
        }
    }

    /// Rows in `early_cancels`.
    pub(crate) async fn early_cancels(&self) -> i64 {
        const COUNT: &str = "select count(*) from early_cancels";
        match &self.backend {
            Backend::Sqlite { db, .. } => db
                .read(|tx, _now| Ok::<_, UpstreamError>(tx.query_row(COUNT, [], |row| row.get(0))?))
                .await
                .unwrap(),
            Backend::Supabase { sql, .. } => sql.query_one(COUNT, &[]).await.unwrap().get(0),
        }
    }

    /// Everything that the outbox holds; their writers' holds are over with this.
    pub(crate) async fn outbox_ids(&self) -> Vec<Uuid> {
        self.advance(OUTBOX_HOLD).await;
        let rows = self.store.outbox_take(1000, Duration::ZERO).await.unwrap();
        rows.into_iter().map(|row| row.id).collect()
    }

    /// DESIGN section 6, at every commit: the sums of the ledger are the accounts.
    pub(crate) async fn assert_books_agree(&self) -> Books {
        let books = self.books().await;
        let mut sums: BTreeMap<(String, String), (i64, i64)> = BTreeMap::new();
        for entry in &books.ledger {
            let open = if entry.state == "reserved" { entry.reserved } else { 0 };
            let mut scopes = vec![GLOBAL_SCOPE.to_owned()];
            if entry.scope != GLOBAL_SCOPE {
                scopes.push(entry.scope.clone());
            }
            for scope in scopes {
                let sum = sums.entry((entry.day.clone(), scope)).or_default();
                sum.0 += open;
                sum.1 += entry.actual;
            }
            match entry.state.as_str() {
                "reserved" | "released" => assert_eq!(entry.actual, 0, "{entry:?}"),
                "assumed" => assert_eq!(entry.actual, entry.reserved, "{entry:?}"),
                "settled" => {}
                other => panic!("unknown state {other}"),
            }
        }
        for (key, account) in &books.days {
            let sum = sums.remove(key).unwrap_or_default();
            assert_eq!((account.reserved, account.used), sum, "account {key:?} and ledger differ");
        }
        assert!(sums.is_empty(), "booked without an account: {sums:?}");
        books
    }

    // What the tests do, in the words of the port.

    pub(crate) async fn claim(&self, task: TaskId) -> ClaimedRun {
        match self.store.claim_run(&request(task)).await.unwrap() {
            Claim::Claimed(run) => run,
            other => panic!("not claimed: {other:?}"),
        }
    }

    pub(crate) async fn claim_new(&self) -> ClaimedRun {
        self.claim(TaskId::random()).await
    }

    pub(crate) async fn due(&self, limit: usize) -> Vec<ClaimedRun> {
        self.due_under(limit, AMPLE).await
    }

    pub(crate) async fn due_under(&self, limit: usize, limits: Limits) -> Vec<ClaimedRun> {
        self.store.claim_due(&WorkerId("sweeper".to_owned()), limit, LEASE, limits).await.unwrap()
    }

    pub(crate) async fn reserve(&self, ask: &ReserveRequest) -> Reservation {
        match self.store.reserve(ask).await.unwrap() {
            ReserveOutcome::Granted(reservation) => reservation,
            ReserveOutcome::Denied(denial) => panic!("denied: {denial:?}"),
        }
    }

    pub(crate) async fn run(&self, task: TaskId) -> RunDetail {
        self.store.get_run(task).await.unwrap().expect("no such run")
    }

    /// A run without its calls and its outbox: late bills and sent answers may still change those.
    pub(crate) async fn without_ledger(&self, task: TaskId) -> RunDetail {
        let mut detail = RunDetail { ledger: Vec::new(), unsent: false, ..self.run(task).await };
        // The ledger's sum, not the run's.
        detail.run.tokens_booked = Tokens(0);
        detail
    }
}

pub(crate) fn supabase_store(url: &str, key: &str) -> SupabaseStore {
    SupabaseStore::new(&SupabaseConfig {
        url: url.parse().unwrap(),
        service_role_key: Secret::new(key),
        timeout: Duration::from_secs(30),
    })
    .unwrap()
}

/// The same lease once more: what a worker that hangs still believes to hold.
pub(crate) fn stale_copy(lease: &Lease) -> Lease {
    Lease { task_id: lease.task_id, attempt: lease.attempt, lease_until: lease.lease_until }
}

pub(crate) fn message(task: TaskId, metadata: &Value) -> Value {
    json!({"task_id": task, "role": "architect", "msg_type": "chat", "content": "Design a queue", "metadata": metadata})
}

pub(crate) fn request(task: TaskId) -> ClaimRequest {
    ClaimRequest {
        task_id: task,
        claim_id: Uuid::new_v4(),
        message: message(task, &json!({})),
        tenant: None,
        requester: None,
        worker: WorkerId("worker-1".to_owned()),
        lease: LEASE,
    }
}

/// Asks for tokens for the run of `lease`.
pub(crate) fn ask(lease: &Lease, tokens: u64) -> ReserveRequest {
    ReserveRequest { task_id: Some(lease.task_id), attempt: Some(lease.attempt), ..ask_for_index(tokens) }
}

/// Asks for tokens outside any run.
pub(crate) fn ask_for_index(tokens: u64) -> ReserveRequest {
    ReserveRequest {
        id: Uuid::new_v4(),
        task_id: None,
        attempt: None,
        tenant: None,
        model: "gpt-4.1".to_owned(),
        kind: CallKind::Chat,
        tokens: Tokens(tokens),
        limits: AMPLE,
    }
}

pub(crate) fn billed(prompt: u64, completion: u64) -> Closing {
    Closing::Settled { usage: Usage { prompt: Tokens(prompt), completion: Tokens(completion) } }
}

pub(crate) fn settlement(reservation: &Reservation, closing: Closing) -> Settlement {
    Settlement { reservation_id: reservation.id, closing }
}

pub(crate) fn checkpoint(step: &str, text: &str) -> Checkpoint {
    Checkpoint {
        step: step.to_owned(),
        input_hash: "abc".to_owned(),
        output: json!({"text": text}).into(),
        usage: Usage { prompt: Tokens(3), completion: Tokens(4) },
    }
}

pub(crate) fn answer(task: TaskId, msg_type: AnswerType, text: &str) -> Answer {
    let status = match msg_type {
        AnswerType::Spec => AnswerStatus::Done,
        AnswerType::Error => AnswerStatus::Error,
        AnswerType::Progress | AnswerType::Control => AnswerStatus::InProgress,
    };
    Answer::bare(task, msg_type, status, text, Map::new())
}

/// An [`answer`] as a run is finished with it.
pub(crate) fn result(task: TaskId, msg_type: AnswerType, text: &str) -> Json {
    Json::of(&answer(task, msg_type, text)).unwrap()
}

pub(crate) fn done(task: TaskId) -> Finish {
    Finish {
        status: FinalStatus::Done,
        answer: result(task, AnswerType::Spec, "# A queue"),
        topic: "architect_out".to_owned(),
        attributes: vec![("task_id".to_owned(), task.to_string())],
        model: Some("gpt-4.1".to_owned()),
        error_code: None,
        error_message: None,
        settlement: None,
        checkpoint: None,
    }
}

#[track_caller]
pub(crate) fn assert_fenced<T: std::fmt::Debug>(result: Result<T, LedgerError>, attempt: u32) {
    match result {
        Err(LedgerError::Fenced { attempt: said }) => assert_eq!(said, attempt),
        other => panic!("not fenced: {other:?}"),
    }
}

fn sqlite_books(tx: &rusqlite::Transaction<'_>) -> rusqlite::Result<Books> {
    let mut days = BTreeMap::new();
    let mut statement = tx.prepare("SELECT day, scope, limit_tokens, reserved, used FROM token_days")?;
    let mut rows = statement.query([])?;
    while let Some(row) = rows.next()? {
        let account = Account { limit: row.get(2)?, reserved: row.get(3)?, used: row.get(4)? };
        days.insert((row.get(0)?, row.get(1)?), account);
    }
    let mut ledger = Vec::new();
    let mut statement =
        tx.prepare("SELECT id, day, scope, task_id, reserved, actual, state FROM token_ledger ORDER BY id")?;
    let mut rows = statement.query([])?;
    while let Some(row) = rows.next()? {
        ledger.push(Entry {
            id: row.get::<_, String>(0)?.parse().unwrap(),
            day: row.get(1)?,
            scope: row.get(2)?,
            task_id: row.get::<_, Option<String>>(3)?.map(|id| id.parse().unwrap()),
            reserved: row.get(4)?,
            actual: row.get(5)?,
            state: row.get(6)?,
        });
    }
    Ok(Books { days, ledger })
}

async fn postgres_books(sql: &tokio_postgres::Client) -> Books {
    // One statement, so that both tables are of the same moment.
    let row = sql
        .query_one(
            "select (select coalesce(jsonb_agg(to_jsonb(d)), '[]') from token_days d),
                    (select coalesce(jsonb_agg(to_jsonb(l) order by l.id), '[]') from token_ledger l)",
            &[],
        )
        .await
        .unwrap();
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let number = |value: &Value| value.as_i64().unwrap();
    let rows = |index: usize| match row.get::<_, Value>(index) {
        Value::Array(rows) => rows,
        other => panic!("{other}"),
    };
    Books {
        days: rows(0)
            .iter()
            .map(|d| {
                let account = Account {
                    limit: d["limit_tokens"].as_i64(),
                    reserved: number(&d["reserved"]),
                    used: number(&d["used"]),
                };
                ((text(&d["day"]), text(&d["scope"])), account)
            })
            .collect(),
        ledger: rows(1)
            .iter()
            .map(|l| Entry {
                id: text(&l["id"]).parse().unwrap(),
                day: text(&l["day"]),
                scope: text(&l["scope"]),
                task_id: l["task_id"].as_str().map(|id| id.parse().unwrap()),
                reserved: number(&l["reserved"]),
                actual: number(&l["actual"]),
                state: text(&l["state"]),
            })
            .collect(),
    }
}
