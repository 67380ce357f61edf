//! Jobs of the embedded stack: a table in `atlas.db`.

use std::{path::Path, time::Duration};

use async_trait::async_trait;
use atlas_shared::{
    Dependency, UpstreamError,
    gateway_api::JobStatus,
    sqlite::{Database, after, to_micros},
};
use serde::{Serialize, de::DeserializeOwned};
use uuid::Uuid;

use super::store::{Claimed, JobStore, Leave, REMEMBERED, Reported, Work};

const SCHEMA: &str = "
CREATE TABLE IF NOT EXISTS index_jobs (
    id         TEXT PRIMARY KEY,
    -- Of the caller; NULL: of one that speaks for all tenants.
    tenant     TEXT,
    status     TEXT NOT NULL,
    -- NULL once the job has ended.
    work       TEXT,
    attempt    INTEGER NOT NULL DEFAULT 0,
    held_until INTEGER,
    created_at INTEGER NOT NULL,
    ended_at   INTEGER
) STRICT;
CREATE INDEX IF NOT EXISTS index_jobs_open ON index_jobs (created_at, id) WHERE work IS NOT NULL;
CREATE INDEX IF NOT EXISTS index_jobs_ended ON index_jobs (ended_at) WHERE ended_at IS NOT NULL;
";

/// What [`SCHEMA`] cannot add to a table of the first release, because the table is there.
const TENANT: &str = "ALTER TABLE index_jobs ADD COLUMN tenant TEXT";

pub(super) struct SqliteJobs(Database);

impl SqliteJobs {
    pub(super) async fn open(dir: &Path) -> Result<Self, UpstreamError> {
        let database = Database::open(dir).await?;
        database
            .write(|tx, _now| -> Result<(), UpstreamError> {
                tx.execute_batch(SCHEMA)?;
                let known: bool = tx.query_row(
                    "SELECT EXISTS (SELECT 1 FROM pragma_table_info('index_jobs') WHERE name = 'tenant')",
                    [],
                    |row| row.get(0),
                )?;
                if !known {
                    tx.execute_batch(TENANT)?;
                }
                Ok(())
            })
            .await?;
        Ok(Self(database))
    }
}

#[async_trait]
impl JobStore for SqliteJobs {
    async fn submit(
        &self,
        id: Uuid,
        work: &Work,
        job: &Reported,
        max_active: usize,
    ) -> Result<Option<usize>, UpstreamError> {
        let (id, work, status) = (id.to_string(), text(work)?, text(&job.status)?);
        let tenant = job.tenant.clone();
        self.0
            .write(move |tx, now| {
                let active: i64 =
                    tx.query_row("SELECT count(*) FROM index_jobs WHERE work IS NOT NULL", [], |row| {
                        row.get(0)
                    })?;
                let known: bool =
                    tx.query_row("SELECT EXISTS (SELECT 1 FROM index_jobs WHERE id = ?1)", [&id], |row| {
                        row.get(0)
                    })?;
                let active = usize::try_from(active).unwrap_or(usize::MAX);
                if known {
                    return Ok(Some(active));
                }
                if active >= max_active {
                    return Ok(None);
                }
                tx.execute(
                    "INSERT INTO index_jobs (id, tenant, status, work, created_at) VALUES (?1, ?2, ?3, ?4, ?5)",
                    (&id, &tenant, &status, &work, to_micros(now)),
                )?;
                Ok(Some(active + 1))
            })
            .await
    }

    async fn claim(&self, lease: Duration) -> Result<Option<Claimed>, UpstreamError> {
        self.0
            .write(move |tx, now| {
                let mut claim = tx.prepare_cached(
                    "UPDATE index_jobs SET attempt = attempt + 1, held_until = ?2
                      WHERE id = (SELECT id FROM index_jobs
                                   WHERE work IS NOT NULL AND coalesce(held_until, 0) <= ?1
                                   ORDER BY created_at, id LIMIT 1)
                     RETURNING id, attempt, work, tenant, status",
                )?;
                let mut rows = claim.query((to_micros(now), to_micros(after(now, lease))))?;
                let Some(row) = rows.next()? else { return Ok(None) };
                let id: String = row.get(0)?;
                Ok(Some(Claimed {
                    id: id.parse().map_err(|error| damaged(&error))?,
                    attempt: row.get(1)?,
                    work: value(&row.get::<_, String>(2)?)?,
                    tenant: row.get(3)?,
                    status: value(&row.get::<_, String>(4)?)?,
                }))
            })
            .await
    }

    async fn report(
        &self,
        id: Uuid,
        attempt: u32,
        status: &JobStatus,
        lease: Duration,
        leave: Leave,
    ) -> Result<bool, UpstreamError> {
        let (id, status) = (id.to_string(), text(status)?);
        self.0
            .write(move |tx, now| {
                let held_until = (leave == Leave::Hold).then(|| to_micros(after(now, lease)));
                let ended_at = (leave == Leave::End).then(|| to_micros(now));
                let changed = tx.execute(
                    "UPDATE index_jobs
                        SET status = ?3, held_until = ?4, ended_at = ?5,
                            work = CASE WHEN ?5 IS NULL THEN work END
                      WHERE id = ?1 AND attempt = ?2 AND work IS NOT NULL",
                    (&id, attempt, &status, held_until, ended_at),
                )?;
                if ended_at.is_some() {
                    tx.execute(
                        "DELETE FROM index_jobs WHERE id IN (
                             SELECT id FROM index_jobs WHERE ended_at IS NOT NULL
                              ORDER BY ended_at DESC LIMIT -1 OFFSET ?1)",
                        [i64::try_from(REMEMBERED).unwrap_or(i64::MAX)],
                    )?;
                }
                Ok(changed > 0)
            })
            .await
    }

    async fn status(&self, id: Uuid) -> Result<Option<Reported>, UpstreamError> {
        let id = id.to_string();
        self.0
            .read(move |tx, _| {
                let mut select = tx.prepare_cached("SELECT tenant, status FROM index_jobs WHERE id = ?1")?;
                let mut rows = select.query([id])?;
                let Some(row) = rows.next()? else { return Ok(None) };
                Ok(Some(Reported { tenant: row.get(0)?, status: value(&row.get::<_, String>(1)?)? }))
            })
            .await
    }
}

fn text<T: Serialize>(value: &T) -> Result<String, UpstreamError> {
    serde_json::to_string(value).map_err(|error| damaged(&error))
}

fn value<T: DeserializeOwned>(text: &str) -> Result<T, UpstreamError> {
    serde_json::from_str(text).map_err(|error| damaged(&error))
}

fn damaged(error: &dyn std::fmt::Display) -> UpstreamError {
    UpstreamError::permanent(
        Dependency::Store,
        "unreadable_job",
        format!("an index job in atlas.db: {error}"),
    )
}
