//! The token ledger: a port of its own, because workers (chat) and the gateway (embeddings)
//! book under the same daily limit.
//!
//! Protocol: **reserve** an upper bound before a call, then **settle** it with what was billed,
//! **release** it when the call was certainly not billed, or **assume** it spent when nobody can
//! know (a timeout, a cut connection, a dead process). A grant is atomic against the day's, the
//! tenant's and the run's limit, so the sum of what is billed can never exceed a limit, however
//! many callers race (DESIGN section 5, step 4).

use std::{fmt, ops, sync::Arc, time::Duration};

use async_trait::async_trait;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{
    Config, TaskId, UNSTORABLE, UpstreamError, config::StoreConfig, postgrest::RpcClient, sqlite::Database,
};

pub mod sqlite;
pub mod supabase;

pub use sqlite::SqliteLedger;
pub use supabase::SupabaseLedger;

/// Scope of the row in `token_days` that counts everything. A tenant's row has [`tenant_scope`].
pub const GLOBAL_SCOPE: &str = "global";

/// A reservation that is open for so long, and of no running run, has lost its holder.
pub const ORPHAN_AGE: Duration = Duration::from_hours(1);

/// The scope of one tenant's row in `token_days`.
pub fn tenant_scope(tenant: &str) -> String {
    format!("tenant:{tenant}")
}

/// A number of model tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Tokens(pub u64);

impl Tokens {
    /// The largest number a store books; sums of thousands of these still fit a `bigint`. Larger ones
    /// are stored as this one, which is above any limit.
    pub const MAX_STORED: Self = Self(1_000_000_000_000_000);

    /// The number as a store keeps it.
    #[must_use]
    pub fn to_stored(self) -> i64 {
        i64::try_from(self.0.min(Self::MAX_STORED.0)).unwrap_or(i64::MAX)
    }

    /// A stored number.
    #[must_use]
    pub fn from_stored(stored: i64) -> Self {
        Self(u64::try_from(stored).unwrap_or(0))
    }

    /// `self - other`, or 0.
    #[must_use]
    pub fn saturating_sub(self, other: Self) -> Self {
        Self(self.0.saturating_sub(other.0))
    }
}

impl ops::Add for Tokens {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self(self.0.saturating_add(other.0))
    }
}

impl ops::AddAssign for Tokens {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

impl std::iter::Sum for Tokens {
    fn sum<I: Iterator<Item = Self>>(iter: I) -> Self {
        iter.fold(Self::default(), ops::Add::add)
    }
}

impl fmt::Display for Tokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What the API said it billed for one call.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Tokens of the request.
    pub prompt: Tokens,
    /// Tokens of the answer, reasoning tokens included.
    pub completion: Tokens,
}

impl Usage {
    /// What counts against the budget.
    pub fn total(self) -> Tokens {
        self.prompt + self.completion
    }
}

impl ops::AddAssign for Usage {
    fn add_assign(&mut self, other: Self) {
        self.prompt += other.prompt;
        self.completion += other.completion;
    }
}

/// What kind of call a ledger row stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CallKind {
    /// `/v1/chat/completions`.
    Chat,
    /// `/v1/embeddings`.
    Embedding,
}

/// The limits of this process's configuration. A limit that an operator set for the fleet
/// (`set_budget`) wins over them, in the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// `DAILY_TOKEN_BUDGET`.
    pub daily: Tokens,
    /// `TOKEN_BUDGET_PER_RUN`.
    pub run: Tokens,
}

/// Asks for tokens before a call.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ReserveRequest {
    /// Id of the reservation, chosen by the caller (a fresh UUID a call): a retry of a `reserve` that
    /// timed out gets the same grant back instead of a second one.
    pub id: Uuid,
    /// The run that calls: its limit is checked too. `None` for calls outside a run (index jobs).
    pub task_id: Option<TaskId>,
    /// The fencing token of the run's lease. A stale one gets [`LedgerError::Fenced`].
    pub attempt: Option<u32>,
    /// Whose optional tenant limit applies too.
    pub tenant: Option<String>,
    /// The model that will be called.
    pub model: String,
    /// What is called.
    pub kind: CallKind,
    /// An upper bound of what the call can bill.
    pub tokens: Tokens,
    /// Limits of the caller's configuration.
    pub limits: Limits,
}

/// What a limit of the fleet becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NewLimit {
    /// What each process's own configuration says: the fleet has no other word on it any more. In JSON
    /// the string `default`.
    Default,
    /// So many tokens, whatever the configuration says. In JSON the number.
    #[serde(untagged)]
    Tokens(Tokens),
}

impl NewLimit {
    /// What the store keeps: `None` leaves it to the configuration.
    pub fn to_stored(self) -> Option<i64> {
        match self {
            Self::Default => None,
            Self::Tokens(tokens) => Some(tokens.to_stored()),
        }
    }
}

/// Tokens that were granted and must be settled, released or assumed. Not `Clone`: a model call
/// takes it by value, so one grant is never spent twice by our own code.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reservation {
    /// Row in `token_ledger`: the id of the request.
    pub id: Uuid,
    /// How much was granted.
    pub tokens: Tokens,
    /// The model it was granted for.
    pub model: String,
}

/// Which limit said no.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeniedBy {
    /// The run's own limit: ask for less, or give up.
    Run,
    /// The day's limit: defer.
    Day,
    /// The tenant's limit for the day: defer.
    Tenant,
}

/// A reservation that was not granted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Denial {
    /// Which limit said no.
    pub denied_by: DeniedBy,
    /// What was asked for.
    pub requested: Tokens,
    /// What that limit would have granted at that moment. Another limit may grant less.
    pub available: Tokens,
    /// The limit itself.
    pub limit: Tokens,
    /// When the limit starts anew (next UTC midnight); `None` for the run's limit.
    pub resets_at: Option<Timestamp>,
}

/// The answer to a [`ReserveRequest`]. A denial is an answer, not an error.
#[derive(Debug)]
pub enum ReserveOutcome {
    /// Go ahead.
    Granted(Reservation),
    /// Do not call.
    Denied(Denial),
}

/// How a reservation ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum Closing {
    /// The API said what it billed. Booked in full, even above the reservation.
    Settled {
        /// What was billed.
        usage: Usage,
    },
    /// Certainly not billed: refused, or never sent.
    Released,
    /// Nobody can know: the whole reservation is booked as spent.
    Assumed,
}

/// One day's account of one scope.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BudgetState {
    /// The UTC day, `YYYY-MM-DD`, by the store's clock.
    pub day: String,
    /// The limit in force.
    pub limit: Tokens,
    /// Settled and assumed.
    pub used: Tokens,
    /// Granted and open.
    pub reserved: Tokens,
    /// Next UTC midnight.
    pub resets_at: Timestamp,
}

impl BudgetState {
    /// What a reservation could get now.
    pub fn available(&self) -> Tokens {
        self.limit.saturating_sub(self.used + self.reserved)
    }
}

/// Why the ledger did not answer.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    /// The lease is no longer ours: stop at once, write nothing.
    #[error("the run was taken over by another worker (attempt {attempt} is stale)")]
    Fenced {
        /// The stale fencing token.
        attempt: u32,
    },
    /// The store failed.
    #[error(transparent)]
    Upstream(#[from] UpstreamError),
}

impl LedgerError {
    /// True where the store is well and will never hold what it was given.
    pub fn is_unstorable(&self) -> bool {
        matches!(self, Self::Upstream(error) if error.code() == UNSTORABLE)
    }
}

/// Books tokens. Implemented by every store; one contract suite for all.
#[async_trait]
pub trait Ledger: Send + Sync {
    /// Grants or denies tokens, atomically against every limit that applies.
    async fn reserve(&self, request: &ReserveRequest) -> Result<ReserveOutcome, LedgerError>;

    /// Ends a reservation. Idempotent: a second call with the same id changes nothing, except that
    /// an *assumed* one may be corrected by what was really billed.
    async fn close(&self, reservation: Reservation, closing: Closing) -> Result<(), LedgerError>;

    /// Today's account of the whole fleet.
    async fn budget(&self, limits: Limits) -> Result<BudgetState, LedgerError>;
}

/// The ledger that the configuration names.
pub async fn open(config: &Config) -> Result<Arc<dyn Ledger>, UpstreamError> {
    match &config.store {
        StoreConfig::Embedded(dir) => Ok(Arc::new(SqliteLedger::new(Database::open(dir).await?))),
        StoreConfig::Supabase(config) => Ok(Arc::new(SupabaseLedger::new(RpcClient::new(config)?))),
    }
}
