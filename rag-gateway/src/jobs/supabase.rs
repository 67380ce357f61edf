//! Jobs of a fleet: table `index_jobs` in Supabase (migration 0007).
//!
//! The work goes as text in base64: documents may hold NUL, which Postgres stores in no JSON and no text.

use std::time::Duration;

use async_trait::async_trait;
use atlas_shared::{
    Dependency, UpstreamError,
    config::SupabaseConfig,
    gateway_api::JobStatus,
    postgrest::{RpcClient, RpcError},
};
use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use serde::Deserialize;
use serde_json::{Value, json};
use uuid::Uuid;

use super::store::{Claimed, JobStore, Leave, REMEMBERED, Reported, Work};

pub(super) struct SupabaseJobs(RpcClient);

impl SupabaseJobs {
    pub(super) fn new(config: &SupabaseConfig) -> Result<Self, UpstreamError> {
        Ok(Self(RpcClient::new(config)?))
    }
}

#[derive(Deserialize)]
struct Row {
    id: Uuid,
    attempt: u32,
    work_base64: String,
    tenant: Option<String>,
    status: JobStatus,
}

#[async_trait]
impl JobStore for SupabaseJobs {
    async fn submit(
        &self,
        id: Uuid,
        work: &Work,
        job: &Reported,
        max_active: usize,
    ) -> Result<Option<usize>, UpstreamError> {
        let work = serde_json::to_vec(work).map_err(|error| damaged(&error))?;
        let args = json!({
            "id": id,
            "work_base64": BASE64.encode(work),
            "tenant": job.tenant,
            "status": storable(&job.status)?,
            "max_active": max_active,
        });
        self.0.call("submit_index_job", &args).await.map_err(upstream)
    }

    async fn claim(&self, lease: Duration) -> Result<Option<Claimed>, UpstreamError> {
        let args = json!({"lease_ms": millis(lease)});
        let row: Option<Row> = self.0.call("claim_index_job", &args).await.map_err(upstream)?;
        let Some(Row { id, attempt, work_base64, tenant, status }) = row else { return Ok(None) };
        // Postgres breaks lines in its base64.
        let compact: String = work_base64.split_ascii_whitespace().collect();
        let work = BASE64.decode(compact).map_err(|error| damaged(&error))?;
        let work = serde_json::from_slice(&work).map_err(|error| damaged(&error))?;
        Ok(Some(Claimed { id, attempt, work, tenant, status }))
    }

    async fn report(
        &self,
        id: Uuid,
        attempt: u32,
        status: &JobStatus,
        lease: Duration,
        leave: Leave,
    ) -> Result<bool, UpstreamError> {
        let args = json!({
            "id": id,
            "attempt": attempt,
            "status": storable(status)?,
            "lease_ms": millis(lease),
            "leave": leave,
            "remember": REMEMBERED,
        });
        self.0.call("report_index_job", &args).await.map_err(upstream)
    }

    async fn status(&self, id: Uuid) -> Result<Option<Reported>, UpstreamError> {
        self.0.call("get_index_job", &json!({"id": id})).await.map_err(upstream)
    }
}

/// A status without NUL: its errors quote names of documents.
fn storable(status: &JobStatus) -> Result<Value, UpstreamError> {
    let text = serde_json::to_string(status).map_err(|error| damaged(&error))?;
    serde_json::from_str(&text.replace("\\u0000", "\\ufffd")).map_err(|error| damaged(&error))
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn upstream(error: RpcError) -> UpstreamError {
    match error {
        RpcError::Upstream(error) => error,
        // Jobs tell a lost lease as an answer.
        RpcError::Fenced => UpstreamError::transient(Dependency::Store, error),
    }
}

fn damaged(error: &dyn std::fmt::Display) -> UpstreamError {
    UpstreamError::permanent(Dependency::Store, "unreadable_job", format!("an index job: {error}"))
}
