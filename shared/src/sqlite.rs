//! The embedded database: one SQLite file that a laptop's worker, gateway, queue and CLI share.
//!
//! One connection lives on a thread of its own; callers send closures to it through a bounded
//! channel and await the answer, so no async task ever blocks on the disk. Every closure runs in a
//! transaction: [`Database::write`] in `BEGIN IMMEDIATE` (it holds the file's only write lock from its
//! first statement, so what it reads cannot change under it), [`Database::read`] in a snapshot.
//!
//! **Group commit.** Closures that wait together share one transaction, each in a savepoint of its own:
//! a page that all of them change is written once. To a caller nothing is different. One that fails rolls
//! back to its own savepoint; nobody is answered before the commit; and when the commit itself fails,
//! every caller hears that nothing of its own was kept.
//!
//! Several processes may open the file at once (`atlas dev` and `atlas runs list`): WAL lets readers go
//! on while one writes, and `busy_timeout` makes writers wait for each other. With
//! `synchronous = NORMAL` a killed process loses nothing; a power cut may lose the last moments, but
//! never leaves half a transaction.

use std::{
    collections::HashMap,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::{
        Arc, LazyLock,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use jiff::{SignedDuration, Timestamp, tz::TimeZone};
use rusqlite::{Connection, ErrorCode, Transaction, TransactionBehavior};
use tokio::sync::{mpsc, oneshot};

use crate::{Dependency, UNSTORABLE, UpstreamError};

/// Name of the file in `ATLAS_DATA_DIR`.
pub const FILE_NAME: &str = "atlas.db";

/// The store's tables. Written so that running it again changes nothing.
const SCHEMA: &str = include_str!("sqlite/schema.sql");

/// `PRAGMA user_version` of [`SCHEMA`]. A file with a higher one was written by a newer Atlas.
const SCHEMA_VERSION: i64 = 4;

/// What [`SCHEMA`] cannot add to a table of version 1, because the table is there.
const FROM_VERSION_1: &str = "ALTER TABLE dead_letters ADD COLUMN replayed_as TEXT";

/// How long a writer waits for another process's transaction.
const BUSY_TIMEOUT: Duration = Duration::from_secs(10);

/// Closures that may wait for the connection; more callers wait for a place.
const WAITING_JOBS: usize = 1024;

/// Closures that share one transaction: some milliseconds of work, for which other processes wait.
const BATCH: usize = 64;

/// Pages in the log before they are copied into the file: 16 MB, so that a page that many transactions
/// change is copied seldom.
const CHECKPOINT_PAGES: u32 = 4096;

/// One caller's closure, on its way to the connection and back.
trait Job: Send {
    /// Does it want to keep what it writes?
    fn writes(&self) -> bool;

    /// Runs it. True: what it wrote is to be kept.
    fn run(&mut self, transaction: &Transaction<'_>) -> bool;

    /// Answers the caller. The error says why the transaction was not committed, or never began.
    fn answer(self: Box<Self>, committed: Result<(), UpstreamError>);
}

/// The files that this process has open. Worker, gateway and queue of one process share a connection:
/// they take turns in its channel, which is quicker and fairer than waiting for each other's file locks.
static OPEN: LazyLock<tokio::sync::Mutex<HashMap<PathBuf, WeakDatabase>>> = LazyLock::new(Default::default);

struct WeakDatabase {
    jobs: mpsc::WeakSender<Box<dyn Job>>,
    clock: Clock,
}

/// A handle on the file; all handles of one process share the connection. Its thread ends with the last.
#[derive(Clone, Debug)]
pub struct Database {
    jobs: mpsc::Sender<Box<dyn Job>>,
    clock: Clock,
    path: Arc<PathBuf>,
}

/// The store's clock: the system's, which a test can move. All handles on one [`Database`] share it.
#[derive(Clone, Debug, Default)]
pub struct Clock {
    /// How far the clock is ahead of the system's, in microseconds.
    ahead: Arc<AtomicI64>,
    /// Where the clock stands still, in microseconds since the epoch; 0 while it runs.
    fixed: Arc<AtomicI64>,
}

impl Clock {
    /// The time by which leases, days and due times are decided, in whole microseconds, as Postgres has it.
    pub fn now(&self) -> Timestamp {
        let fixed = self.fixed.load(Ordering::SeqCst);
        let base = if fixed == 0 { Timestamp::now().as_microsecond() } else { fixed };
        from_micros(base.saturating_add(self.ahead.load(Ordering::SeqCst)))
    }

    /// Tests: stops the clock at `at`.
    pub fn stop_at(&self, at: Timestamp) {
        self.ahead.store(0, Ordering::SeqCst);
        self.fixed.store(at.as_microsecond(), Ordering::SeqCst);
    }

    /// Tests: moves the clock forward.
    pub fn advance(&self, by: Duration) {
        self.ahead.fetch_add(i64::try_from(by.as_micros()).unwrap_or(i64::MAX), Ordering::SeqCst);
    }
}

impl Database {
    /// Opens `atlas.db` in `dir`, creating folder, file and tables where they are missing. A file that
    /// this process has open already gives another handle on the same connection.
    pub async fn open(dir: &Path) -> Result<Self, UpstreamError> {
        let created = std::fs::create_dir_all(dir).and_then(|()| dir.canonicalize());
        let dir = created.map_err(|error| unusable(dir, "cannot create the folder", &error))?;
        let mut open = OPEN.lock().await;
        if let Some(known) = open.get(&dir)
            && let Some(jobs) = known.jobs.upgrade()
        {
            return Ok(Self { jobs, clock: known.clock.clone(), path: Arc::new(dir.join(FILE_NAME)) });
        }
        let database = Self::open_connection_to(&dir).await?;
        open.retain(|_, known| known.jobs.strong_count() > 0);
        open.insert(dir, WeakDatabase { jobs: database.jobs.downgrade(), clock: database.clock.clone() });
        Ok(database)
    }

    async fn open_connection_to(dir: &Path) -> Result<Self, UpstreamError> {
        let path = dir.join(FILE_NAME);
        let opened = path.clone();
        let (ready, opening) = oneshot::channel();
        let (jobs, mut queue) = mpsc::channel::<Box<dyn Job>>(WAITING_JOBS);
        std::thread::Builder::new()
            .name("atlas-sqlite".to_owned())
            .spawn(move || {
                let mut connection = match open_connection(&opened) {
                    Ok(connection) => connection,
                    Err(error) => {
                        // Nobody waiting means the opener was cancelled: nothing left to do.
                        let _ = ready.send(Err(error));
                        return;
                    }
                };
                if ready.send(Ok(())).is_err() {
                    return;
                }
                let mut batch = Vec::with_capacity(BATCH);
                while queue.blocking_recv_many(&mut batch, BATCH) > 0 {
                    let committed = run(&mut connection, &mut batch);
                    for job in batch.drain(..) {
                        job.answer(committed.clone());
                    }
                }
            })
            .map_err(|error| {
                UpstreamError::transient(
                    Dependency::Store,
                    format!("no thread for the embedded database: {error}"),
                )
            })?;
        opening.await.map_err(|_| stopped())??;
        Ok(Self { jobs, clock: Clock::default(), path: Arc::new(path) })
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The time, by this store's clock.
    pub fn now(&self) -> Timestamp {
        self.clock.now()
    }

    /// The clock itself, for tests that move it.
    pub fn clock(&self) -> &Clock {
        &self.clock
    }

    /// Creates another component's tables in the same file (the embedded queue's). `sql` must change
    /// nothing when it runs again: `CREATE TABLE IF NOT EXISTS …`.
    pub async fn execute_schema(&self, sql: &str) -> Result<(), UpstreamError> {
        let sql = sql.to_owned();
        self.write(move |transaction, _now| {
            transaction.execute_batch(&sql)?;
            Ok(())
        })
        .await
    }

    /// Runs `work` in one `BEGIN IMMEDIATE` transaction: commits what it returns as `Ok`, rolls back on
    /// `Err`. The second argument is the transaction's one and only idea of the time.
    pub async fn write<T, E>(
        &self,
        work: impl FnOnce(&Transaction<'_>, Timestamp) -> Result<T, E> + Send + 'static,
    ) -> Result<T, E>
    where
        T: Send + 'static,
        E: From<UpstreamError> + Send + 'static,
    {
        self.run(TransactionBehavior::Immediate, work).await
    }

    /// Runs `work` on a snapshot. What it might write is rolled back.
    pub async fn read<T, E>(
        &self,
        work: impl FnOnce(&Transaction<'_>, Timestamp) -> Result<T, E> + Send + 'static,
    ) -> Result<T, E>
    where
        T: Send + 'static,
        E: From<UpstreamError> + Send + 'static,
    {
        self.run(TransactionBehavior::Deferred, work).await
    }

    async fn run<T, E>(
        &self,
        behavior: TransactionBehavior,
        work: impl FnOnce(&Transaction<'_>, Timestamp) -> Result<T, E> + Send + 'static,
    ) -> Result<T, E>
    where
        T: Send + 'static,
        E: From<UpstreamError> + Send + 'static,
    {
        let (reply, answer) = oneshot::channel();
        let job = Call {
            work: Some(work),
            writes: matches!(behavior, TransactionBehavior::Immediate),
            clock: self.clock.clone(),
            result: None,
            reply,
        };
        self.jobs.send(Box::new(job)).await.map_err(|_| stopped())?;
        // The caller may be cancelled here; what was committed stays, as with any database.
        answer.await.map_err(|_| stopped())?
    }
}

/// A closure and where its result goes.
struct Call<W, T, E> {
    /// Taken when it runs.
    work: Option<W>,
    writes: bool,
    clock: Clock,
    /// Set when it has run.
    result: Option<Result<T, E>>,
    reply: oneshot::Sender<Result<T, E>>,
}

impl<W, T, E> Job for Call<W, T, E>
where
    W: FnOnce(&Transaction<'_>, Timestamp) -> Result<T, E> + Send,
    T: Send,
    E: From<UpstreamError> + Send,
{
    fn writes(&self) -> bool {
        self.writes
    }

    fn run(&mut self, transaction: &Transaction<'_>) -> bool {
        let Some(work) = self.work.take() else { return false };
        let now = self.clock.now();
        // A panic in a closure is a bug, but it must not take the connection from everybody else:
        // its writes are rolled back, and the caller gets an error.
        let result = catch_unwind(AssertUnwindSafe(|| work(transaction, now))).unwrap_or_else(|_panic| {
            Err(UpstreamError::permanent(
                Dependency::Store,
                "store_bug",
                "a transaction on the embedded database panicked and was rolled back",
            )
            .into())
        });
        let keep = self.writes && result.is_ok();
        self.result = Some(result);
        keep
    }

    fn answer(self: Box<Self>, committed: Result<(), UpstreamError>) {
        let result = match (self.result, committed) {
            // Its own failure says more than that of the transaction.
            (Some(Err(error)), _) => Err(error),
            (_, Err(error)) => Err(error.into()),
            (Some(result), Ok(())) => result,
            (None, Ok(())) => Err(stopped().into()),
        };
        let _ = self.reply.send(result);
    }
}

/// Runs all of `batch` in one transaction, and commits it.
fn run(connection: &mut Connection, batch: &mut [Box<dyn Job>]) -> Result<(), UpstreamError> {
    let writes = batch.iter().any(|job| job.writes());
    let behavior = if writes { TransactionBehavior::Immediate } else { TransactionBehavior::Deferred };
    let transaction = connection.transaction_with_behavior(behavior).map_err(upstream)?;
    if let [only] = batch {
        // Alone, it needs no savepoint: dropping the transaction rolls it back.
        return if only.run(&transaction) { transaction.commit().map_err(upstream) } else { Ok(()) };
    }
    for job in batch {
        let savepoint = |sql: &str| -> Result<(), UpstreamError> {
            transaction.prepare_cached(sql)?.execute([])?;
            Ok(())
        };
        savepoint("SAVEPOINT job")?;
        let keep = job.run(&transaction);
        // A full disk, for one, makes SQLite roll back all of the transaction by itself.
        if transaction.is_autocommit() {
            return Err(UpstreamError::transient(
                Dependency::Store,
                "the embedded database rolled a transaction back; it may be tried again",
            ));
        }
        if !keep {
            savepoint("ROLLBACK TO job")?;
        }
        savepoint("RELEASE job")?;
    }
    if writes { transaction.commit().map_err(upstream) } else { Ok(()) }
}

fn stopped() -> UpstreamError {
    UpstreamError::transient(Dependency::Store, "the embedded database's thread has ended")
}

fn unusable(path: &Path, what: &str, error: &dyn std::fmt::Display) -> UpstreamError {
    UpstreamError::misconfigured(
        Dependency::Store,
        "ATLAS_DATA_DIR",
        format!("{what} {}: {error}", path.display()),
        "point it at a folder on a local disk that this user may write to",
    )
}

fn open_connection(path: &Path) -> Result<Connection, UpstreamError> {
    let mut connection = Connection::open(path).map_err(|error| unusable(path, "cannot open", &error))?;
    let prepared = prepare(&mut connection).map_err(|error| match upstream(error) {
        busy @ UpstreamError::Transient { .. } => busy,
        _ => unusable(path, "cannot use", &"it is not a database, is damaged, or may not be written"),
    })?;
    if prepared > SCHEMA_VERSION {
        return Err(UpstreamError::misconfigured(
            Dependency::Store,
            "ATLAS_DATA_DIR",
            format!(
                "{} was written by a newer Atlas (schema {prepared}, this one knows {SCHEMA_VERSION})",
                path.display()
            ),
            "update Atlas, or use another folder",
        ));
    }
    Ok(connection)
}

/// Sets the connection up and creates what is missing; returns the file's schema version.
fn prepare(connection: &mut Connection) -> rusqlite::Result<i64> {
    connection.busy_timeout(BUSY_TIMEOUT)?;
    connection.set_prepared_statement_cache_capacity(128);
    // Answers with the mode in force, so it is read as a query.
    connection.query_row("PRAGMA journal_mode = WAL", [], |row| row.get::<_, String>(0))?;
    // 16 MiB of pages: the default of 2 MiB reads the tables of a busy day again and again. What savepoints keep
    // to go back to, a page each, stays in memory: a batch has more of them than SQLite would hold there.
    connection.execute_batch(
        "PRAGMA synchronous = NORMAL; PRAGMA foreign_keys = ON; PRAGMA journal_size_limit = 67108864;
         PRAGMA cache_size = -16384; PRAGMA temp_store = MEMORY;",
    )?;
    connection.pragma_update(None, "wal_autocheckpoint", CHECKPOINT_PAGES)?;
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let version: i64 = transaction.query_row("PRAGMA user_version", [], |row| row.get(0))?;
    if version < SCHEMA_VERSION {
        transaction.execute_batch(SCHEMA)?;
        if version == 1 {
            transaction.execute_batch(FROM_VERSION_1)?;
        }
        transaction.pragma_update(None, "user_version", SCHEMA_VERSION)?;
    }
    transaction.commit()?;
    Ok(version)
}

/// What a failure of SQLite means to the caller.
pub fn upstream(error: rusqlite::Error) -> UpstreamError {
    match error.sqlite_error_code() {
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked | ErrorCode::OperationInterrupted) => {
            UpstreamError::transient(Dependency::Store, format!("the embedded database is busy: {error}"))
        }
        Some(ErrorCode::DiskFull | ErrorCode::SystemIoFailure) => UpstreamError::transient(
            Dependency::Store,
            format!("the embedded database's disk failed: {error}"),
        ),
        Some(
            ErrorCode::CannotOpen
            | ErrorCode::ReadOnly
            | ErrorCode::PermissionDenied
            | ErrorCode::NotADatabase
            | ErrorCode::DatabaseCorrupt,
        ) => UpstreamError::misconfigured(
            Dependency::Store,
            "ATLAS_DATA_DIR",
            format!("the embedded database cannot be used: {error}"),
            "point it at a folder on a local disk that this user may write to, or restore the file from a backup",
        ),
        Some(ErrorCode::TooBig) => UpstreamError::permanent(Dependency::Store, UNSTORABLE, error),
        _ => UpstreamError::permanent(Dependency::Store, "store_bug", error),
    }
}

impl From<rusqlite::Error> for UpstreamError {
    fn from(error: rusqlite::Error) -> Self {
        upstream(error)
    }
}

/// A time as it is stored: microseconds since the epoch.
pub fn to_micros(at: Timestamp) -> i64 {
    at.as_microsecond()
}

/// A stored time. Out of range (impossible for what we wrote) becomes the nearest end.
pub fn from_micros(micros: i64) -> Timestamp {
    Timestamp::from_microsecond(micros).unwrap_or(if micros < 0 { Timestamp::MIN } else { Timestamp::MAX })
}

/// `at + duration`, or the end of time.
pub fn after(at: Timestamp, duration: Duration) -> Timestamp {
    SignedDuration::try_from(duration).ok().and_then(|d| at.checked_add(d).ok()).unwrap_or(Timestamp::MAX)
}

/// The UTC day of `at`, `YYYY-MM-DD`.
pub fn utc_day(at: Timestamp) -> String {
    at.to_zoned(TimeZone::UTC).date().to_string()
}

/// The first instant of the next UTC day.
pub fn next_utc_midnight(at: Timestamp) -> Timestamp {
    at.to_zoned(TimeZone::UTC)
        .date()
        .tomorrow()
        .and_then(|day| day.to_zoned(TimeZone::UTC))
        .map_or(Timestamp::MAX, |midnight| midnight.timestamp())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]
    use super::*;

    #[tokio::test]
    async fn a_failed_transaction_leaves_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        let db = Database::open(dir.path()).await.unwrap();
        db.execute_schema("CREATE TABLE IF NOT EXISTS t(x)").await.unwrap();

        let failed: Result<(), UpstreamError> = db
            .write(|tx, _| {
                tx.execute("INSERT INTO t VALUES (1)", [])?;
                Err(UpstreamError::permanent(Dependency::Store, "no", "changed my mind"))
            })
            .await;
        assert!(failed.is_err());
        let panicked: Result<(), UpstreamError> = db
            .write(|tx, _| {
                tx.execute("INSERT INTO t VALUES (1)", [])?;
                panic!("a bug")
            })
            .await;
        assert_eq!(panicked.unwrap_err().code(), "store_bug");

        let rows: Result<i64, UpstreamError> =
            db.read(|tx, _| Ok(tx.query_row("SELECT count(*) FROM t", [], |row| row.get(0))?)).await;
        assert_eq!(rows.unwrap(), 0);
    }

    /// Keeps the connection busy until told to go on, so that the next calls wait together.
    async fn hold(
        db: &Database,
    ) -> (tokio::task::JoinHandle<Result<(), UpstreamError>>, std::sync::mpsc::Sender<()>) {
        let (go, wait) = std::sync::mpsc::channel::<()>();
        let (begun, begins) = oneshot::channel();
        let db = db.clone();
        let held = tokio::spawn(async move {
            db.write(move |_, _| {
                let _ = begun.send(());
                let _ = wait.recv();
                Ok(())
            })
            .await
        });
        begins.await.unwrap();
        (held, go)
    }

    #[tokio::test]
    async fn calls_that_share_a_transaction_fail_each_for_itself() {
        let dir = tempfile::tempdir().unwrap();
        let db = Database::open(dir.path()).await.unwrap();
        db.execute_schema("CREATE TABLE IF NOT EXISTS t(x UNIQUE)").await.unwrap();
        let (first, go) = hold(&db).await;
        let insert = |x: i64| {
            db.write::<i64, UpstreamError>(move |tx, _| {
                tx.execute("INSERT INTO t VALUES (100 + ?1)", [x])?;
                tx.execute("INSERT INTO t VALUES (?1)", [x % 10])?;
                assert!(x != 7, "a bug");
                Ok(x)
            })
        };
        // 10 fails at its second statement, because 0 is there; 7 panics.
        let reads = db.read::<i64, UpstreamError>(|tx, _| {
            tx.execute("INSERT INTO t VALUES ('a read keeps nothing')", [])?;
            Ok(tx.query_row("SELECT count(*) FROM t", [], |row| row.get(0))?)
        });
        let waiting = async {
            while db.jobs.capacity() > WAITING_JOBS - 5 {
                tokio::task::yield_now().await;
            }
            go.send(()).unwrap();
        };
        let (zero, seven, ten, seen, twelve, ()) =
            tokio::join!(insert(0), insert(7), insert(10), reads, insert(12), waiting);
        first.await.unwrap().unwrap();
        assert_eq!((zero.unwrap(), twelve.unwrap()), (0, 12));
        assert_eq!(seven.unwrap_err().code(), "store_bug");
        assert_eq!(ten.unwrap_err().code(), "store_bug");
        assert_eq!(seen.unwrap(), 2 + 1, "two of the first call, and its own");

        let rows: Result<Vec<i64>, UpstreamError> = db
            .read(|tx, _| {
                let mut rows = tx.prepare("SELECT x FROM t ORDER BY x")?;
                Ok(rows.query_map([], |row| row.get(0))?.collect::<Result<_, _>>()?)
            })
            .await;
        assert_eq!(rows.unwrap(), [0, 2, 100, 112]);
    }

    #[tokio::test]
    async fn nobody_is_told_ok_when_the_shared_transaction_is_lost() {
        let dir = tempfile::tempdir().unwrap();
        let db = Database::open(dir.path()).await.unwrap();
        db.execute_schema("CREATE TABLE IF NOT EXISTS t(x)").await.unwrap();
        let (first, go) = hold(&db).await;
        let insert = || {
            db.write::<(), UpstreamError>(|tx, _| {
                tx.execute("INSERT INTO t VALUES (1)", [])?;
                Ok(())
            })
        };
        // As SQLite does by itself when the disk is full.
        let lose = db.write::<(), UpstreamError>(|tx, _| {
            tx.execute_batch("ROLLBACK")?;
            Ok(())
        });
        let waiting = async {
            while db.jobs.capacity() > WAITING_JOBS - 3 {
                tokio::task::yield_now().await;
            }
            go.send(()).unwrap();
        };
        let (before, lost, after, ()) = tokio::join!(insert(), lose, insert(), waiting);
        first.await.unwrap().unwrap();
        for result in [before, lost, after] {
            assert!(result.unwrap_err().is_transient());
        }
        let rows: Result<i64, UpstreamError> =
            db.read(|tx, _| Ok(tx.query_row("SELECT count(*) FROM t", [], |row| row.get(0))?)).await;
        assert_eq!(rows.unwrap(), 0);
        insert().await.unwrap();
    }

    #[tokio::test]
    async fn two_connections_to_one_file_write_in_turn() {
        let dir = tempfile::tempdir().unwrap();
        let first = Database::open_connection_to(dir.path()).await.unwrap();
        let second = Database::open_connection_to(dir.path()).await.unwrap();
        first.execute_schema("CREATE TABLE IF NOT EXISTS t(x)").await.unwrap();

        // Read-modify-write: any lost update would show in the sum.
        let add = |db: Database| async move {
            for _ in 0..100 {
                db.write::<_, UpstreamError>(|tx, _| {
                    let n: i64 = tx.query_row("SELECT count(*) FROM t", [], |row| row.get(0))?;
                    tx.execute("INSERT INTO t VALUES (?1)", [n])?;
                    Ok(())
                })
                .await
                .unwrap();
            }
        };
        tokio::join!(add(first.clone()), add(second));
        let distinct: Result<i64, UpstreamError> = first
            .read(|tx, _| Ok(tx.query_row("SELECT count(DISTINCT x) FROM t", [], |row| row.get(0))?))
            .await;
        assert_eq!(distinct.unwrap(), 200);
    }

    #[tokio::test]
    async fn handles_of_one_process_share_connection_and_clock() {
        let dir = tempfile::tempdir().unwrap();
        let first = Database::open(dir.path()).await.unwrap();
        first.clock().stop_at("2026-03-01T12:00:00Z".parse().unwrap());
        let second = Database::open(&dir.path().join(".")).await.unwrap();
        assert_eq!(second.now().to_string(), "2026-03-01T12:00:00Z");
    }

    #[tokio::test]
    async fn a_folder_that_cannot_be_written_names_the_variable() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("not-a-folder");
        std::fs::write(&file, "x").unwrap();
        let error = Database::open(&file).await.unwrap_err();
        assert!(error.to_string().contains("ATLAS_DATA_DIR"), "{error}");
    }

    #[tokio::test]
    async fn a_file_that_is_no_database_names_the_variable() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(FILE_NAME), "this is a diary, not a database".repeat(100)).unwrap();
        let error = Database::open(dir.path()).await.unwrap_err();
        assert!(error.to_string().contains("ATLAS_DATA_DIR"), "{error}");
    }

    #[test]
    fn days_are_utc_days() {
        let late: Timestamp = "2026-02-28T23:59:59.999999Z".parse().unwrap();
        assert_eq!(utc_day(late), "2026-02-28");
        assert_eq!(next_utc_midnight(late).to_string(), "2026-03-01T00:00:00Z");
        assert_eq!(
            next_utc_midnight("2026-03-01T00:00:00Z".parse().unwrap()).to_string(),
            "2026-03-02T00:00:00Z"
        );
    }
}
