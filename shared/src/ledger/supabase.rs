//! The ledger in Supabase: the SQL functions of `migrations/0003_ledger.up.sql`, one round trip each.

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{
    BudgetState, Closing, Denial, Ledger, LedgerError, Limits, Reservation, ReserveOutcome, ReserveRequest,
};
use crate::postgrest::RpcClient;

/// The ledger port on Supabase.
#[derive(Clone, Debug)]
pub struct SupabaseLedger {
    rpc: RpcClient,
}

impl SupabaseLedger {
    /// Books through `rpc`.
    pub fn new(rpc: RpcClient) -> Self {
        Self { rpc }
    }
}

/// The answer of `reserve_tokens`.
#[derive(Deserialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
enum Reserved {
    Granted,
    Denied(Denial),
}

#[derive(Serialize)]
struct CloseArgs {
    reservation_id: Uuid,
    closing: Closing,
}

#[derive(Serialize)]
struct LimitsArgs {
    limits: Limits,
}

#[async_trait]
impl Ledger for SupabaseLedger {
    async fn reserve(&self, request: &ReserveRequest) -> Result<ReserveOutcome, LedgerError> {
        let reserved: Reserved = self
            .rpc
            .call("reserve_tokens", request)
            .await
            .map_err(|error| error.for_attempt(request.attempt.unwrap_or(0)))?;
        Ok(match reserved {
            Reserved::Granted => ReserveOutcome::Granted(Reservation {
                id: request.id,
                tokens: request.tokens,
                model: request.model.clone(),
            }),
            Reserved::Denied(denial) => ReserveOutcome::Denied(denial),
        })
    }

    async fn close(&self, reservation: Reservation, closing: Closing) -> Result<(), LedgerError> {
        let args = CloseArgs { reservation_id: reservation.id, closing };
        let _: serde_json::Value = self.rpc.call("close_reservation", &args).await?;
        Ok(())
    }

    async fn budget(&self, limits: Limits) -> Result<BudgetState, LedgerError> {
        Ok(self.rpc.call("budget_today", &LimitsArgs { limits }).await?)
    }
}
