//! The store in Supabase: one SQL function a method (`migrations/`), one round trip and one transaction
//! each. What the functions guarantee, and under which locks, is said beside them.

use std::time::Duration;

use async_trait::async_trait;
use atlas_shared::{
    Dependency, Ledger, TaskId, Tokens, UpstreamError, WorkerId,
    config::{RetentionConfig, SupabaseConfig},
    ledger::{
        BudgetState, Closing, LedgerError, Limits, Reservation, ReserveOutcome, ReserveRequest,
        SupabaseLedger,
    },
    message::{Answer, AnswerStatus, AnswerType},
    postgrest::{RpcClient, RpcError},
};
use serde::{Deserialize, de::IgnoredAny};
use serde_json::{Map, Value, json};
use uuid::Uuid;

use super::{
    CancelledRun, Checkpoint, Claim, ClaimRequest, ClaimedRun, DayAccount, DeadLetter, DeadLetterDetail,
    DeadLetterFilter, DeadLetterPurge, DeadLetterRecord, Finish, FleetChange, FleetState, Lease, OUTBOX_HOLD,
    OutboxRow, Published, Purged, Renewal, RunDetail, RunFilter, RunRecord, RunStore, Settlement, StoreError,
    Wake, operator,
};

/// The oldest schema that this release works with: what `store_check` must answer at least.
const REQUIRED_SCHEMA: u64 = 6;

/// The run store on Supabase.
#[derive(Clone, Debug)]
pub struct SupabaseStore {
    rpc: RpcClient,
    ledger: SupabaseLedger,
}

impl SupabaseStore {
    /// A store in the project that `config` names. Connects with the first call.
    pub fn new(config: &SupabaseConfig) -> Result<Self, UpstreamError> {
        let rpc = RpcClient::new(config)?;
        Ok(Self { ledger: SupabaseLedger::new(rpc.clone()), rpc })
    }
}

/// The answers of functions that book something even for a stale lease: there `fenced` is a value,
/// because an error would roll the booking back.
#[derive(Deserialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
enum Outcome {
    Stored,
    Finished { outbox: OutboxRow },
    Fenced,
}

#[async_trait]
impl Ledger for SupabaseStore {
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
impl RunStore for SupabaseStore {
    async fn claim_run(&self, request: &ClaimRequest) -> Result<Claim, StoreError> {
        let args = json!({
            "task_id": request.task_id,
            "claim_id": request.claim_id,
            "message": request.message,
            "tenant": request.tenant,
            "requester": request.requester,
            "worker": request.worker,
            "lease_ms": millis(request.lease),
        });
        Ok(self.rpc.call("claim_run", &args).await?)
    }

    async fn claim_due(
        &self,
        worker: &WorkerId,
        limit: usize,
        lease: Duration,
        limits: Limits,
    ) -> Result<Vec<ClaimedRun>, StoreError> {
        let args = json!({"worker": worker, "limit": limit, "lease_ms": millis(lease), "limits": limits});
        Ok(self.rpc.call("claim_due", &args).await?)
    }

    async fn renew_lease(&self, lease: &Lease, duration: Duration) -> Result<Renewal, StoreError> {
        let args = json!({"task_id": lease.task_id, "attempt": lease.attempt, "lease_ms": millis(duration)});
        Ok(self.rpc.call("renew_lease", &args).await?)
    }

    async fn settle_step(
        &self,
        lease: &Lease,
        settlement: &Settlement,
        checkpoint: &Checkpoint,
    ) -> Result<(), StoreError> {
        let args = json!({
            "task_id": lease.task_id,
            "attempt": lease.attempt,
            "settlement": settlement,
            "checkpoint": checkpoint,
        });
        match self.rpc.call("settle_step", &args).await? {
            Outcome::Stored => Ok(()),
            Outcome::Fenced => Err(StoreError::Fenced { attempt: lease.attempt }),
            Outcome::Finished { .. } => Err(unexpected("settle_step")),
        }
    }

    async fn finish_run(&self, lease: Lease, finish: &Finish) -> Result<Published, StoreError> {
        let args = json!({
            "task_id": lease.task_id,
            "attempt": lease.attempt,
            "status": finish.status,
            "answer": finish.answer,
            "topic": finish.topic,
            "attributes": finish.attributes,
            "model": finish.model,
            "error_code": finish.error_code,
            "error_message": finish.error_message,
            "settlement": finish.settlement,
            "checkpoint": finish.checkpoint,
            "hold_ms": millis(OUTBOX_HOLD),
        });
        match self.rpc.call("finish_run", &args).await? {
            Outcome::Finished { outbox } => Ok(Published { outbox }),
            Outcome::Fenced => Err(StoreError::Fenced { attempt: lease.attempt }),
            Outcome::Stored => Err(unexpected("finish_run")),
        }
    }

    async fn defer_run(
        &self,
        lease: Lease,
        needed: Tokens,
        topic: &str,
        answer: &Answer,
        attributes: &[(String, String)],
    ) -> Result<Published, StoreError> {
        let args = json!({
            "task_id": lease.task_id,
            "attempt": lease.attempt,
            "tokens_needed": needed,
            "topic": topic,
            "answer": answer,
            "attributes": attributes,
            "hold_ms": millis(OUTBOX_HOLD),
        });
        let outbox = self.call_fenced("defer_run", &args, lease.attempt).await?;
        Ok(Published { outbox })
    }

    async fn release_run(&self, lease: Lease, retry_in: Duration) -> Result<(), StoreError> {
        let args = json!({"task_id": lease.task_id, "attempt": lease.attempt, "retry_ms": millis(retry_in)});
        let _: IgnoredAny = self.call_fenced("release_run", &args, lease.attempt).await?;
        Ok(())
    }

    async fn outbox_take(&self, limit: usize, hold: Duration) -> Result<Vec<OutboxRow>, StoreError> {
        Ok(self.rpc.call("outbox_take", &json!({"limit": limit, "hold_ms": millis(hold)})).await?)
    }

    async fn outbox_mark_sent(&self, ids: &[Uuid]) -> Result<(), StoreError> {
        let _: IgnoredAny = self.rpc.call("outbox_mark_sent", &json!({"ids": ids})).await?;
        Ok(())
    }

    async fn record_dead_letter(&self, letter: &DeadLetter) -> Result<bool, StoreError> {
        let announce: Vec<Value> = letter
            .announce
            .iter()
            .map(|(topic, answer)| json!({"topic": topic, "answer": answer, "attributes": answer.attributes()}))
            .collect();
        // The result row of a failed run when nothing is announced for it.
        let fallback = letter.task_id.map(|task_id| {
            Answer::bare(task_id, AnswerType::Error, AnswerStatus::Error, letter.detail.clone(), Map::new())
        });
        let args = json!({
            "id": letter.id,
            "source": letter.source,
            "reason": letter.reason,
            "detail": letter.detail,
            "raw_base64": letter.raw_base64,
            "attributes": letter.attributes,
            "task_id": letter.task_id,
            "fails_run": letter.fails_run,
            "announce": announce,
            "fallback": fallback,
        });
        Ok(self.rpc.call("record_dead_letter", &args).await?)
    }

    async fn cancelled_runs(&self, worker: &WorkerId) -> Result<Vec<CancelledRun>, StoreError> {
        Ok(self.rpc.call("cancelled_runs", &json!({"worker": worker})).await?)
    }

    async fn fleet_state(&self, limits: Limits) -> Result<FleetState, StoreError> {
        Ok(self.rpc.call("fleet_state", &json!({"limits": limits})).await?)
    }

    async fn change_fleet(&self, change: &FleetChange, limits: Limits) -> Result<FleetState, StoreError> {
        Ok(self.rpc.call("change_fleet", &json!({"change": change, "limits": limits})).await?)
    }

    async fn cancel_run(&self, task_id: TaskId, topic: &str, answer: &Answer) -> Result<bool, StoreError> {
        let args = json!({
            "task_id": task_id,
            "topic": topic,
            "answer": answer,
            "attributes": answer.attributes(),
        });
        Ok(self.rpc.call("cancel_run", &args).await?)
    }

    async fn find_runs(&self, filter: &RunFilter) -> Result<Vec<RunRecord>, StoreError> {
        let runs: Vec<RunRecord> = self.rpc.call("list_runs", filter).await?;
        Ok(runs.into_iter().map(RunRecord::with_all_billed).collect())
    }

    async fn get_run(&self, task_id: TaskId) -> Result<Option<RunDetail>, StoreError> {
        let detail: Option<RunDetail> = self.rpc.call("get_run", &json!({"task_id": task_id})).await?;
        Ok(detail.map(|detail| RunDetail { run: detail.run.with_all_billed(), ..detail }))
    }

    async fn wake_run(&self, task_id: TaskId) -> Result<Wake, StoreError> {
        Ok(self.rpc.call("wake_run", &json!({"task_id": task_id})).await?)
    }

    async fn list_dead_letters(
        &self,
        filter: &DeadLetterFilter,
    ) -> Result<Vec<DeadLetterRecord>, StoreError> {
        Ok(self.rpc.call("list_dead_letters", filter).await?)
    }

    async fn get_dead_letter(&self, id: Uuid) -> Result<Option<DeadLetterDetail>, StoreError> {
        Ok(self.rpc.call("get_dead_letter", &json!({"id": id})).await?)
    }

    async fn mark_replayed(&self, id: Uuid, replayed_as: Option<TaskId>) -> Result<bool, StoreError> {
        Ok(self.rpc.call("mark_replayed", &json!({"id": id, "replayed_as": replayed_as})).await?)
    }

    async fn purge_dead_letters(&self, purge: &DeadLetterPurge, limit: usize) -> Result<u64, StoreError> {
        let args = json!({
            "ids": purge.ids,
            "reason": purge.reason,
            "older_than_ms": purge.older_than.map(millis),
            "unreplayed": purge.unreplayed,
            "dry_run": purge.dry_run,
            "limit": limit,
        });
        Ok(self.rpc.call("purge_dead_letters", &args).await?)
    }

    async fn budget_history(&self, days: u32, limits: Limits) -> Result<Vec<DayAccount>, StoreError> {
        Ok(self.rpc.call("budget_history", &json!({"days": days, "limits": limits})).await?)
    }

    async fn purge_old(&self, keep: &RetentionConfig, limit: usize) -> Result<Purged, StoreError> {
        let mut args = operator::ages(keep);
        args["limit"] = json!(limit);
        Ok(self.rpc.call("purge_old", &args).await?)
    }

    async fn check(&self) -> Result<(), UpstreamError> {
        #[derive(Deserialize)]
        struct Schema {
            schema_version: u64,
        }
        let schema: Schema = match self.rpc.call("store_check", &json!({})).await {
            Ok(schema) => schema,
            Err(RpcError::Upstream(error)) => return Err(error),
            Err(RpcError::Fenced) => {
                return Err(UpstreamError::permanent(
                    Dependency::Store,
                    "store_bug",
                    "store_check was fenced",
                ));
            }
        };
        if schema.schema_version < REQUIRED_SCHEMA {
            return Err(UpstreamError::misconfigured(
                Dependency::Store,
                "SUPABASE_URL",
                format!(
                    "its database has schema version {}, this release needs {REQUIRED_SCHEMA}",
                    schema.schema_version
                ),
                "run `atlas migrate up` before this release starts",
            ));
        }
        Ok(())
    }
}

impl SupabaseStore {
    async fn call_fenced<T: serde::de::DeserializeOwned>(
        &self,
        function: &str,
        args: &Value,
        attempt: u32,
    ) -> Result<T, StoreError> {
        self.rpc.call(function, args).await.map_err(|error| error.for_attempt(attempt))
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn unexpected(function: &str) -> StoreError {
    UpstreamError::permanent(
        Dependency::Store,
        "store_bug",
        format!("{function} gave another function's answer"),
    )
    .into()
}
