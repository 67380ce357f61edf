//! Failures of what is outside our process, as decisions rather than causes.

use std::{fmt, time::Duration};

/// Something Atlas depends on. The label of metrics, breakers and probes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Dependency {
    /// Google Pub/Sub, or the embedded queue.
    Queue,
    /// Supabase, or the embedded SQLite file.
    Store,
    /// The rag-gateway.
    Gateway,
    /// The chat completions API.
    Model,
    /// The embeddings API.
    Embedder,
    /// Qdrant, or the embedded engine.
    VectorIndex,
    /// Redis.
    Cache,
    /// The reranker's API.
    Reranker,
}

impl Dependency {
    /// The value of the metric label `dependency`, and the key in the probes' `checks` map.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Queue => "queue",
            Self::Store => "store",
            Self::Gateway => "gateway",
            Self::Model => "model",
            Self::Embedder => "embedder",
            Self::VectorIndex => "vector_index",
            Self::Cache => "cache",
            Self::Reranker => "reranker",
        }
    }
}

impl fmt::Display for Dependency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A failed call to a dependency. Each variant is what the caller must do next.
#[derive(Clone, Debug, thiserror::Error)]
pub enum UpstreamError {
    /// Try again later, not before `retry_after` when the server named one.
    #[error("{dependency}: {message}")]
    Transient {
        /// Who failed.
        dependency: Dependency,
        /// What happened, for a log line.
        message: String,
        /// What the server asked for in `Retry-After`.
        retry_after: Option<Duration>,
    },
    /// The same call will never succeed.
    #[error("{dependency} refused the request ({code}): {message}")]
    Permanent {
        /// Who refused.
        dependency: Dependency,
        /// A stable code in snake case, stored as `error_code`.
        code: String,
        /// What happened.
        message: String,
    },
    /// No call will succeed until a person changes a setting: stop, go red, keep the messages.
    #[error("{dependency}: {message}. Check {variable}: {fix}")]
    Misconfigured {
        /// Who refused.
        dependency: Dependency,
        /// The environment variable to look at.
        variable: &'static str,
        /// What happened.
        message: String,
        /// What to do about it.
        fix: String,
    },
}

/// The code of a [permanent](UpstreamError::Permanent) refusal that lies in the data: the store is well, and will
/// never hold them.
pub const UNSTORABLE: &str = "unstorable";

impl UpstreamError {
    /// A transient failure without a `Retry-After`.
    pub fn transient(dependency: Dependency, message: impl fmt::Display) -> Self {
        Self::Transient { dependency, message: message.to_string(), retry_after: None }
    }

    /// A permanent failure.
    pub fn permanent(dependency: Dependency, code: &str, message: impl fmt::Display) -> Self {
        Self::Permanent { dependency, code: code.to_owned(), message: message.to_string() }
    }

    /// A failure that only a change of configuration can mend.
    pub fn misconfigured(
        dependency: Dependency,
        variable: &'static str,
        message: impl fmt::Display,
        fix: impl Into<String>,
    ) -> Self {
        Self::Misconfigured { dependency, variable, message: message.to_string(), fix: fix.into() }
    }

    /// Who failed.
    pub fn dependency(&self) -> Dependency {
        match self {
            Self::Transient { dependency, .. }
            | Self::Permanent { dependency, .. }
            | Self::Misconfigured { dependency, .. } => *dependency,
        }
    }

    /// True where trying again can help.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Transient { .. })
    }

    /// The stable code for logs, run rows and answers.
    pub fn code(&self) -> &str {
        match self {
            Self::Transient { .. } => "upstream_unavailable",
            Self::Permanent { code, .. } => code,
            Self::Misconfigured { .. } => "misconfigured",
        }
    }
}
