//! Where index jobs are kept: the [`JobStore`] port.
//!
//! A job is in the store from before its id is given out until some time after it has ended, with
//! all that is needed to do it. Any gateway on the same store takes a job that nobody works on: one
//! that waits, or whose gateway stopped renewing its lease. What a dead gateway had written stays, so
//! whoever goes on pays only for the rest.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use atlas_shared::{
    Config, UpstreamError,
    config::StoreConfig,
    gateway_api::{Document, DocumentResult, JobStatus},
};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{memory::MemoryJobs, sqlite::SqliteJobs, supabase::SupabaseJobs};

/// Ended jobs that are remembered.
pub(super) const REMEMBERED: usize = 1000;

/// What a job does. Stored as JSON: variants and fields may be added, not changed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub(crate) enum Work {
    /// Index these documents.
    Documents {
        collection: String,
        documents: Vec<Document>,
        /// Those that were asked for and are not in the list, because what they say must not be stored.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        refused: Vec<DocumentResult>,
    },
    /// Read a repository and bring the index in line with it.
    Repository { collection: String, repo: String, path: Option<String> },
    /// Fill another generation of a collection, and use it.
    Rebuild { collection: String, generation: String },
}

/// Where a job is, and whose it is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Reported {
    /// Of the caller that asked for it; `None`: of one that speaks for all of them.
    pub(crate) tenant: Option<String>,
    pub(crate) status: JobStatus,
}

/// A job that somebody works on. Whoever holds it may report, until its lease is over and another
/// takes the job: then the attempt is another one.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Claimed {
    pub(crate) id: Uuid,
    /// Counted from 1; names the holder in every report.
    pub(crate) attempt: u32,
    pub(crate) work: Work,
    /// Whose it is; see [`Reported`].
    pub(crate) tenant: Option<String>,
    /// As it was reported last.
    pub(crate) status: JobStatus,
}

/// How a job is left.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Leave {
    /// It goes on: the lease is renewed.
    Hold,
    /// It goes on elsewhere, or later.
    Release,
    /// It has ended; its work is forgotten.
    End,
}

/// The port. Every call is safe to make again.
#[async_trait]
pub(crate) trait JobStore: Send + Sync {
    /// Queues a job under an id that the caller made up. The number of jobs that wait or run, this one
    /// included; `None`: there were `max_active` already, and it was not queued.
    async fn submit(
        &self,
        id: Uuid,
        work: &Work,
        job: &Reported,
        max_active: usize,
    ) -> Result<Option<usize>, UpstreamError>;

    /// Takes the oldest job that nobody holds.
    async fn claim(&self, lease: Duration) -> Result<Option<Claimed>, UpstreamError>;

    /// Notes how far a job is, if this attempt still holds it.
    async fn report(
        &self,
        id: Uuid,
        attempt: u32,
        status: &JobStatus,
        lease: Duration,
        leave: Leave,
    ) -> Result<bool, UpstreamError>;

    /// A job as it was reported last.
    async fn status(&self, id: Uuid) -> Result<Option<Reported>, UpstreamError>;
}

/// The store that the configuration names: that of runs and tokens, where there is one.
pub(crate) async fn open(config: &Config) -> Result<Arc<dyn JobStore>, UpstreamError> {
    match (&config.store, &config.data_dir) {
        (StoreConfig::Supabase(supabase), _) => Ok(Arc::new(SupabaseJobs::new(supabase)?)),
        (StoreConfig::Embedded(_), Some(dir)) => Ok(Arc::new(SqliteJobs::open(dir).await?)),
        (StoreConfig::Embedded(_), None) => {
            tracing::warn!(
                "index jobs are kept in memory: set SUPABASE_URL, or ATLAS_DATA_DIR, for jobs that outlive a restart"
            );
            Ok(Arc::<MemoryJobs>::default())
        }
    }
}
