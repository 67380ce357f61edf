//! Errors as `application/problem+json` (RFC 9457).

use std::time::Duration;

use atlas_shared::{
    UpstreamError,
    gateway_api::{self, PutDocumentsResult},
};
use axum::{
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};

use crate::{error::GatewayError, index::DISK_FULL, indexing::PutError};

/// An error answer. Its code is left in the response's extensions, for the log line and the metric.
#[derive(Clone, Debug)]
pub(super) struct Problem {
    status: StatusCode,
    kind: String,
    detail: String,
    retry_after: Option<Duration>,
    /// Of documents, before it failed.
    done: Option<PutDocumentsResult>,
}

/// The code of an error answer, in its extensions.
#[derive(Clone, Debug)]
pub(super) struct ProblemKind(pub(super) String);

impl Problem {
    /// What happened, why, and what to do: `detail` says it.
    pub(super) fn new(status: StatusCode, kind: &str, detail: impl Into<String>) -> Self {
        Self { status, kind: kind.to_owned(), detail: detail.into(), retry_after: None, done: None }
    }

    /// A mistake of ours.
    pub(super) fn internal() -> Self {
        let detail = "The gateway made a mistake. It is in its log, under the request id of this answer.";
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal_error", detail)
    }

    /// Says when to come back.
    pub(super) fn retry_after(mut self, wait: Duration) -> Self {
        self.retry_after = Some(wait);
        self
    }
}

impl From<GatewayError> for Problem {
    fn from(error: GatewayError) -> Self {
        let status = match &error {
            GatewayError::Invalid(_) | GatewayError::NotAllowed { .. } => StatusCode::UNPROCESSABLE_ENTITY,
            GatewayError::UnknownCollection(_) | GatewayError::UnknownJob(_) => StatusCode::NOT_FOUND,
            GatewayError::Forbidden(_) => StatusCode::FORBIDDEN,
            GatewayError::EmbeddingMismatch { .. } | GatewayError::InUse { .. } => StatusCode::CONFLICT,
            GatewayError::BudgetExhausted(_) | GatewayError::TooManyJobs(_) => StatusCode::TOO_MANY_REQUESTS,
            GatewayError::Upstream(UpstreamError::Permanent { code, .. }) if code == "unknown_collection" => {
                StatusCode::NOT_FOUND
            }
            GatewayError::Upstream(UpstreamError::Permanent { code, .. }) if code == DISK_FULL => {
                StatusCode::INSUFFICIENT_STORAGE
            }
            GatewayError::Upstream(UpstreamError::Permanent { .. }) => StatusCode::BAD_GATEWAY,
            GatewayError::Upstream(_) => StatusCode::SERVICE_UNAVAILABLE,
        };
        let retry_after = error.retry_after();
        Self { status, kind: error.code().to_owned(), detail: error.to_string(), retry_after, done: None }
    }
}

impl From<PutError> for Problem {
    fn from(PutError { error, done }: PutError) -> Self {
        let problem = Self::from(error);
        if done.results.is_empty() && done.tokens == 0 {
            return problem;
        }
        let finished = done.results.len();
        let detail = format!("{} (documents that were finished before: {finished})", problem.detail);
        Self { detail, done: Some(done), ..problem }
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let body = gateway_api::Problem {
            title: self.status.canonical_reason().unwrap_or("Error").to_owned(),
            status: self.status.as_u16(),
            detail: self.detail,
            kind: self.kind.clone(),
            done: self.done,
        };
        // Strings and numbers: serialising cannot fail.
        let body = serde_json::to_vec(&body).unwrap_or_default();
        let mut response =
            (self.status, [(header::CONTENT_TYPE, "application/problem+json")], body).into_response();
        if let Some(wait) = self.retry_after {
            let seconds = wait.as_secs() + u64::from(wait.subsec_nanos() > 0);
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds.max(1)));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response.extensions_mut().insert(ProblemKind(self.kind));
        response
    }
}
