//! What every request passes on its way in and out.

use std::{any::Any, num::NonZeroU32, sync::Arc, time::Duration};

use atlas_shared::trace_context::{TRACEPARENT, TraceParent};
use axum::{
    extract::{MatchedPath, Request, State},
    http::{HeaderName, HeaderValue, Method, StatusCode, Uri},
    middleware::Next,
    response::{IntoResponse as _, Response},
};
use governor::{DefaultKeyedRateLimiter, Quota, RateLimiter, clock::Clock as _};
use tokio::time::Instant;
use tracing::Instrument as _;
use uuid::Uuid;

use super::{App, Problem, auth::Caller, problem::ProblemKind};

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Longest request id that is taken over from the caller.
const MAX_REQUEST_ID: usize = 128;

/// Callers that are remembered before idle ones are forgotten.
const MANY_CALLERS: usize = 10_000;

/// A number of requests in a window, a caller; unused requests are not saved up beyond one window.
pub(super) struct RateLimit {
    limiter: DefaultKeyedRateLimiter<Caller>,
    requests: u32,
    window: Duration,
}

impl RateLimit {
    pub(super) fn new(requests: u32, window: Duration) -> Self {
        let burst = NonZeroU32::new(requests).unwrap_or(NonZeroU32::MIN);
        let period = (window / burst.get()).max(Duration::from_nanos(1));
        let quota = Quota::with_period(period).unwrap_or_else(|| Quota::per_second(burst)).allow_burst(burst);
        Self { limiter: RateLimiter::keyed(quota), requests, window }
    }

    /// How long the caller must wait, if it must.
    fn check(&self, caller: &Caller) -> Result<(), Duration> {
        if self.limiter.len() > MANY_CALLERS {
            self.limiter.retain_recent();
        }
        self.limiter
            .check_key(caller)
            .map_err(|not_until| not_until.wait_time_from(self.limiter.clock().now()))
    }
}

/// Request id, trace, log line and counters. A failure is logged once, here.
pub(super) async fn observe(State(app): State<Arc<App>>, mut request: Request, next: Next) -> Response {
    let started = Instant::now();
    let id = request_id(&request);
    request.headers_mut().insert(REQUEST_ID, id.clone());
    let trace =
        TraceParent::from_incoming(request.headers().get(TRACEPARENT).and_then(|value| value.to_str().ok()));
    let method = request.method().clone();
    let route = request
        .extensions()
        .get::<MatchedPath>()
        .map_or_else(|| "other".to_owned(), |path| path.as_str().to_owned());
    let span = tracing::info_span!(
        "request",
        request_id = id.to_str().unwrap_or_default(),
        trace_id = trace.trace_id(),
        route,
    );
    let mut response = next.run(request).instrument(span.clone()).await;
    let status = response.status();
    app.metrics.requests.with_label_values(&[route.as_str(), status.as_str()]).inc();
    let duration_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
    let kind = response.extensions().get::<ProblemKind>().map(|kind| kind.0.clone());
    span.in_scope(|| match &kind {
        Some(kind) => {
            app.metrics.errors.with_label_values(&[kind.as_str()]).inc();
            if status.is_server_error() {
                tracing::error!(%method, status = status.as_u16(), duration_ms, error_code = kind, "request failed");
            } else {
                tracing::info!(%method, status = status.as_u16(), duration_ms, error_code = kind, "request refused");
            }
        }
        None => tracing::debug!(%method, status = status.as_u16(), duration_ms, "request served"),
    });
    response.headers_mut().insert(REQUEST_ID, id);
    response
}

/// The caller's own id where it is harmless in a log, or a new one.
fn request_id(request: &Request) -> HeaderValue {
    request
        .headers()
        .get(REQUEST_ID)
        .filter(|id| {
            (1..=MAX_REQUEST_ID).contains(&id.len()) && id.as_bytes().iter().all(u8::is_ascii_graphic)
        })
        .cloned()
        .unwrap_or_else(|| {
            HeaderValue::from_str(&Uuid::now_v7().to_string()).unwrap_or(HeaderValue::from_static("none"))
        })
}

pub(super) async fn limit_rate(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    if let Some(caller) = request.extensions().get::<Caller>()
        && let Err(wait) = app.rate_limit.check(caller)
    {
        let RateLimit { requests, window, .. } = &app.rate_limit;
        let detail = format!(
            "A caller may make {requests} requests in {} seconds (RATE_LIMIT_REQUESTS, RATE_LIMIT_WINDOW_SECONDS). Wait as long as Retry-After says.",
            window.as_secs()
        );
        return Problem::new(StatusCode::TOO_MANY_REQUESTS, "rate_limited", detail)
            .retry_after(wait)
            .into_response();
    }
    next.run(request).await
}

pub(super) async fn limit_concurrency(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let Ok(_slot) = app.slots.try_acquire() else {
        let detail = "As many requests as GATEWAY_MAX_CONCURRENCY allows are under way. Try again shortly.";
        return Problem::new(StatusCode::SERVICE_UNAVAILABLE, "overloaded", detail)
            .retry_after(Duration::from_secs(1))
            .into_response();
    };
    next.run(request).await
}

pub(super) async fn limit_time(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    match tokio::time::timeout(app.timeout, next.run(request)).await {
        Ok(response) => response,
        Err(_) => {
            let detail = format!(
                "The request took longer than {} seconds (GATEWAY_TIMEOUT_SECONDS). Send fewer documents at a time, or use /v1/embed_batch.",
                app.timeout.as_secs()
            );
            Problem::new(StatusCode::GATEWAY_TIMEOUT, "timeout", detail)
                .retry_after(Duration::from_secs(1))
                .into_response()
        }
    }
}

#[expect(clippy::needless_pass_by_value, reason = "the signature that the layer wants")]
pub(super) fn panicked(cause: Box<dyn Any + Send>) -> Response {
    let text = cause
        .downcast_ref::<&str>()
        .map(|text| (*text).to_owned())
        .or_else(|| cause.downcast_ref::<String>().cloned())
        .unwrap_or_default();
    tracing::error!(error_code = "panic", cause = text, "a handler panicked");
    Problem::internal().into_response()
}

pub(super) async fn no_such_route(uri: Uri) -> Response {
    let detail = format!("There is nothing at {}. The API is described at /openapi.json.", uri.path());
    Problem::new(StatusCode::NOT_FOUND, "not_found", detail).into_response()
}

pub(super) async fn no_such_method(method: Method, uri: Uri) -> Response {
    let detail = format!("{} does not take {method}. The API is described at /openapi.json.", uri.path());
    Problem::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", detail).into_response()
}
