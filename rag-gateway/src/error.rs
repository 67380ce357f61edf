//! Why the gateway did not do what was asked: each variant is what the caller must do next.

use std::time::Duration;

use atlas_shared::{Dependency, UpstreamError, ledger::Denial};
use jiff::Timestamp;

/// A failed request or job.
#[derive(Clone, Debug, thiserror::Error)]
pub(crate) enum GatewayError {
    /// Change the request.
    #[error("{0}")]
    Invalid(String),
    /// Name another collection, or index something into this one.
    #[error(
        "there is no collection {0:?}; `GET /v1/collections` lists them, and `PUT /v1/documents` makes one"
    )]
    UnknownCollection(String),
    /// The id is wrong, or the job is long gone.
    #[error("there is no job {0:?}; jobs are forgotten some time after they end")]
    UnknownJob(String),
    /// Name another one, or use another generation first.
    #[error(
        "{generation:?} is what collection {collection:?} stands for now; use another generation first, or drop {collection:?}"
    )]
    InUse {
        /// What was to be deleted.
        generation: String,
        /// Who stands for it.
        collection: String,
    },
    /// Ask whoever runs the gateway.
    #[error("{what} is not a place that this gateway may read, or is not there; {variable} says which are")]
    NotAllowed {
        /// The folder or URL.
        what: String,
        /// The setting.
        variable: &'static str,
    },
    /// Vectors of different models cannot be compared.
    #[error(
        "collection {collection:?} was built with embedding model {built_with}, but {configured}. Set OPENAI_EMBEDDING_MODEL \
         to the collection's model, rebuild it for the new one (`atlas index --rebuild`), or index into another collection (RAG_COLLECTION)"
    )]
    EmbeddingMismatch {
        /// Which collection.
        collection: String,
        /// Its model and size, in words.
        built_with: String,
        /// What is configured, in words.
        configured: String,
    },
    /// Come back after midnight UTC, or raise the limit.
    #[error(
        "the daily token budget is spent: {} tokens were asked for, {} of {} are left. Embeddings go on at {}; raise \
         DAILY_TOKEN_BUDGET or send set_budget to go on now",
        .0.requested, .0.available, .0.limit, .0.resets_at.map_or_else(|| "midnight UTC".to_owned(), |at| at.to_string())
    )]
    BudgetExhausted(Denial),
    /// Come back when some have ended.
    #[error(
        "{0} index jobs are waiting or running, as many as MAX_INDEX_JOBS allows; send this one again later"
    )]
    TooManyJobs(usize),
    /// Use a key that may, or leave the other tenant alone.
    #[error("{0}")]
    Forbidden(String),
    /// Something that the gateway needs failed.
    #[error(transparent)]
    Upstream(#[from] UpstreamError),
}

impl GatewayError {
    /// The stable code: `type` of a problem, label of `rag_errors_total`.
    pub(crate) fn code(&self) -> &str {
        match self {
            Self::Invalid(_) => "invalid_request",
            Self::UnknownCollection(_) => "unknown_collection",
            Self::UnknownJob(_) => "unknown_job",
            Self::InUse { .. } => "generation_in_use",
            Self::NotAllowed { .. } => "source_not_allowed",
            Self::EmbeddingMismatch { .. } => "embedding_mismatch",
            Self::BudgetExhausted(_) => "budget_exhausted",
            Self::TooManyJobs(_) => "too_many_jobs",
            Self::Forbidden(_) => "forbidden",
            Self::Upstream(error) => error.code(),
        }
    }

    /// The index does not answer: a cached answer is better than none.
    pub(crate) fn is_index_down(&self) -> bool {
        matches!(self, Self::Upstream(UpstreamError::Transient { dependency: Dependency::VectorIndex, .. }))
    }

    /// When trying again may help.
    pub(crate) fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::BudgetExhausted(denial) => Some(until(denial.resets_at)),
            Self::TooManyJobs(_) => Some(Duration::from_secs(5)),
            Self::Upstream(UpstreamError::Transient { retry_after, .. }) => {
                Some(retry_after.unwrap_or(Duration::from_secs(2)))
            }
            _ => None,
        }
    }
}

/// From now until then; an hour where nobody knows.
fn until(at: Option<Timestamp>) -> Duration {
    at.and_then(|at| Duration::try_from(at - Timestamp::now()).ok()).unwrap_or(Duration::from_secs(3600))
}
