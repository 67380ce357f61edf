//! What every [`JobStore`] promises, run against each adapter.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use std::{sync::Arc, time::Duration};

use atlas_shared::gateway_api::{Document, JobState, JobStatus};
use uuid::Uuid;

use super::{
    memory::MemoryJobs,
    sqlite::SqliteJobs,
    store::{JobStore, Leave, Reported, Work},
    supabase::SupabaseJobs,
};

const LONG: Duration = Duration::from_secs(600);

fn status(id: Uuid) -> JobStatus {
    JobStatus {
        job_id: id.to_string(),
        state: JobState::Queued,
        documents: 1,
        documents_done: 0,
        chunks: 0,
        tokens: 0,
        errors: vec!["first\0error".to_owned()],
        note: None,
    }
}

/// As a caller of tenant `acme` asks for it.
fn asked(id: Uuid) -> Reported {
    Reported { tenant: Some("acme".to_owned()), status: status(id) }
}

fn work(text: &str) -> Work {
    let document = Document { source: "a.md".to_owned(), text: text.to_owned(), ..Document::default() };
    Work::Documents { collection: "docs".to_owned(), documents: vec![document], refused: Vec::new() }
}

async fn run(store: &dyn JobStore) {
    // A job is done once, by whoever holds it.
    let first = Uuid::now_v7();
    assert_eq!(store.status(first).await.unwrap(), None);
    assert_eq!(store.submit(first, &work("with NUL: \0 and ✓"), &asked(first), 2).await.unwrap(), Some(1));
    assert_eq!(
        store.submit(first, &work("again"), &asked(first), 2).await.unwrap(),
        Some(1),
        "a retry queues nothing"
    );
    let second = Uuid::now_v7();
    assert_eq!(store.submit(second, &work("second"), &asked(second), 2).await.unwrap(), Some(2));
    let third = Uuid::now_v7();
    assert_eq!(store.submit(third, &work("third"), &asked(third), 2).await.unwrap(), None, "it is full");
    assert_eq!(store.status(third).await.unwrap(), None);

    let held = store.claim(LONG).await.unwrap().unwrap();
    assert_eq!((held.id, held.attempt), (first, 1), "the oldest comes first");
    assert_eq!(held.work, work("with NUL: \0 and ✓"));
    assert_eq!(held.tenant.as_deref(), Some("acme"));
    let other = store.claim(LONG).await.unwrap().unwrap();
    assert_eq!(other.id, second);
    assert_eq!(store.claim(LONG).await.unwrap(), None, "both are held");

    // Progress is seen by everybody, and only the holder may tell it.
    let mut running = status(first);
    running.state = JobState::Running;
    running.documents_done = 1;
    running.errors.clear();
    assert!(store.report(first, 1, &running, LONG, Leave::Hold).await.unwrap());
    assert_eq!(store.status(first).await.unwrap().unwrap().status, running);
    assert!(!store.report(first, 2, &status(first), LONG, Leave::End).await.unwrap());
    assert_eq!(store.status(first).await.unwrap().unwrap().status, running);

    // A job that is given back, or whose lease is over, goes on with what was known of it.
    assert!(store.report(first, 1, &running, LONG, Leave::Release).await.unwrap());
    let again = store.claim(Duration::ZERO).await.unwrap().unwrap();
    assert_eq!((again.id, again.attempt, &again.status), (first, 2, &running));
    let taken = store.claim(LONG).await.unwrap().unwrap();
    assert_eq!((taken.id, taken.attempt), (first, 3), "a lease that is over holds nobody up");
    assert!(!store.report(first, 2, &running, LONG, Leave::Hold).await.unwrap(), "the late one is told");

    // What has ended stays known, and makes room.
    let done = JobStatus { state: JobState::Done, ..running };
    assert!(store.report(first, 3, &done, LONG, Leave::End).await.unwrap());
    assert!(!store.report(first, 3, &done, LONG, Leave::End).await.unwrap(), "it has ended");
    let known = Reported { tenant: Some("acme".to_owned()), status: done };
    assert_eq!(store.status(first).await.unwrap().unwrap(), known, "whose it was, too");
    assert_eq!(store.claim(LONG).await.unwrap(), None);
    assert_eq!(store.submit(third, &work("third"), &asked(third), 2).await.unwrap(), Some(2));
    let failed = JobStatus { state: JobState::Failed, ..status(second) };
    assert!(store.report(second, 1, &failed, LONG, Leave::End).await.unwrap());
    assert_eq!(store.status(second).await.unwrap().unwrap().status.state, JobState::Failed);
}

/// Many gateways that look at the same time: each job goes to one.
async fn nobody_gets_a_job_twice(store: Arc<dyn JobStore>) {
    // The third job of `run` is left.
    let mut expected = vec![store.claim(LONG).await.unwrap().unwrap().id];
    for _ in 0..20 {
        let id = Uuid::now_v7();
        store.submit(id, &work("x"), &asked(id), 1000).await.unwrap().unwrap();
        expected.push(id);
    }
    let claims = (0..40).map(|_| {
        let store = Arc::clone(&store);
        tokio::spawn(async move { store.claim(LONG).await.unwrap().map(|job| job.id) })
    });
    let mut got = vec![expected[0]];
    for claim in claims.collect::<Vec<_>>() {
        got.extend(claim.await.unwrap());
    }
    got.sort();
    expected.sort();
    assert_eq!(got, expected);
}

#[tokio::test]
async fn memory_keeps_the_contract() {
    let store = Arc::<MemoryJobs>::default();
    run(&*store).await;
    nobody_gets_a_job_twice(store).await;
}

#[tokio::test]
async fn sqlite_keeps_the_contract_and_a_restart_forgets_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = Arc::new(SqliteJobs::open(dir.path()).await.unwrap());
    run(&*store).await;
    nobody_gets_a_job_twice(Arc::clone(&store) as _).await;

    let id = Uuid::now_v7();
    store.submit(id, &work("kept"), &asked(id), 1000).await.unwrap().unwrap();
    drop(store);
    let store = SqliteJobs::open(dir.path()).await.unwrap();
    let job = store.claim(LONG).await.unwrap().unwrap();
    assert_eq!((job.id, job.work), (id, work("kept")));
}

/// The table as the first release had it, with a job that waits.
const FIRST_SQLITE_TABLE: &str = r#"
CREATE TABLE index_jobs (
    id         TEXT PRIMARY KEY,
    status     TEXT NOT NULL,
    -- NULL once the job has ended.
    work       TEXT,
    attempt    INTEGER NOT NULL DEFAULT 0,
    held_until INTEGER,
    created_at INTEGER NOT NULL,
    ended_at   INTEGER
) STRICT;
CREATE INDEX index_jobs_open ON index_jobs (created_at, id) WHERE work IS NOT NULL;
CREATE INDEX index_jobs_ended ON index_jobs (ended_at) WHERE ended_at IS NOT NULL;
INSERT INTO index_jobs (id, status, work, created_at) VALUES (
    '01890a5d-ac96-774b-bcce-b302099a8057',
    '{"job_id":"01890a5d-ac96-774b-bcce-b302099a8057","state":"queued","documents":1,"documents_done":0,"chunks":0,"tokens":0,"errors":[]}',
    '{"kind":"documents","collection":"docs","documents":[{"source":"a.md","text":"old"}]}',
    1
);
"#;

#[tokio::test]
async fn a_sqlite_table_of_an_earlier_release_is_brought_up_to_date() {
    let dir = tempfile::tempdir().unwrap();
    let database = atlas_shared::sqlite::Database::open(dir.path()).await.unwrap();
    database.execute_schema(FIRST_SQLITE_TABLE).await.unwrap();
    drop(database);

    for _ in 0..2 {
        // The second time it is up to date.
        let store = SqliteJobs::open(dir.path()).await.unwrap();
        let waiting = Uuid::from_u128(0x0189_0a5d_ac96_774b_bcce_b302_099a_8057);
        let known = store.status(waiting).await.unwrap().unwrap();
        assert_eq!(known.tenant, None, "nobody knows whose it was, so no tenant is told of it");
        let job = store.claim(Duration::ZERO).await.unwrap().unwrap();
        assert_eq!((job.id, job.work), (waiting, work("old")));
    }
    let store = SqliteJobs::open(dir.path()).await.unwrap();
    let id = Uuid::now_v7();
    store.submit(id, &work("new"), &asked(id), 1000).await.unwrap().unwrap();
    assert_eq!(store.status(id).await.unwrap().unwrap(), asked(id));
}

#[tokio::test(flavor = "multi_thread")]
async fn supabase_keeps_the_contract() {
    let server = match atlas_test_support::supabase::Supabase::start().await {
        Ok(server) => server,
        Err(reason) => {
            let test = "jobs::contract::supabase_keeps_the_contract";
            return atlas_test_support::skip(test, "Supabase", &reason);
        }
    };
    let config = atlas_shared::config::SupabaseConfig {
        url: server.url.parse().unwrap(),
        service_role_key: atlas_shared::Secret::new(server.service_role_key.clone()),
        timeout: Duration::from_secs(30),
    };
    let store = Arc::new(SupabaseJobs::new(&config).unwrap());
    run(&*store).await;
    nobody_gets_a_job_twice(store).await;
}
