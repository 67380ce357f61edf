//! Probes and metrics over HTTP, for every process: `/health/live`, `/health/ready`, `/health`,
//! `/healthz`, `/metrics`.
//!
//! *Live* means the process works; an orchestrator restarts it when it does not. *Ready* means its
//! dependencies do too: while one is red the process gets no traffic, and `checks` says which one,
//! since when, and which variable to look at. A dependency's failure never makes a process not live:
//! a restart would not mend it.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use axum::{
    Json, Router,
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use jiff::Timestamp;
use serde::Serialize;

use crate::{
    Dependency, UpstreamError,
    metrics::{self, Registry},
};

/// Bound of one [`probe_ready`].
const PROBE_TIMEOUT: Duration = Duration::from_secs(3);

/// The state of everything this process needs. Clones share the state.
#[derive(Clone, Debug, Default)]
pub struct Checks {
    state: Arc<Mutex<ChecksState>>,
}

#[derive(Debug, Default)]
struct ChecksState {
    checks: BTreeMap<String, Check>,
    /// Why the process must be restarted.
    dead: Option<String>,
}

/// One line of the `checks` map.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// Does it work?
    pub ok: bool,
    /// What is wrong and which variable to look at; or what is right.
    pub message: String,
    /// Since when it is as it is.
    pub since: Timestamp,
    /// False: readiness does not depend on it (Atlas does without it, and says so).
    pub required: bool,
}

impl Checks {
    /// No checks: ready.
    pub fn new() -> Self {
        Self::default()
    }

    /// Makes readiness wait for a check that was not made yet.
    pub fn expect(&self, name: impl Into<String>) {
        self.set(name.into(), false, "not checked yet".to_owned(), true);
    }

    /// It works.
    pub fn ok(&self, name: impl Into<String>, message: impl Into<String>) {
        self.set(name.into(), true, message.into(), true);
    }

    /// It does not work: not ready. The message names the variable to look at.
    pub fn failed(&self, name: impl Into<String>, message: impl Into<String>) {
        self.set(name.into(), false, message.into(), true);
    }

    /// It does not work, and Atlas goes on without it.
    pub fn degraded(&self, name: impl Into<String>, message: impl Into<String>) {
        self.set(name.into(), false, message.into(), false);
    }

    /// How the last call to a dependency ended. A refused request says that the dependency is well.
    pub fn report(&self, dependency: Dependency, result: &Result<(), UpstreamError>) {
        match result {
            Ok(()) | Err(UpstreamError::Permanent { .. }) => self.ok(dependency.as_str(), "ok"),
            Err(error) => self.failed(dependency.as_str(), advice(error)),
        }
    }

    /// Takes a check off the list.
    pub fn remove(&self, name: &str) {
        self.lock().checks.remove(name);
    }

    /// The process cannot work any more (a task that must run has ended): it asks to be restarted.
    pub fn dead(&self, reason: impl Into<String>) {
        self.lock().dead = Some(reason.into());
    }

    /// Is everything well that must be?
    pub fn is_ready(&self) -> bool {
        let state = self.lock();
        state.dead.is_none() && state.checks.values().all(|check| check.ok || !check.required)
    }

    /// All checks by name.
    pub fn snapshot(&self) -> BTreeMap<String, Check> {
        self.lock().checks.clone()
    }

    fn set(&self, name: String, ok: bool, message: String, required: bool) {
        let mut state = self.lock();
        let since = state
            .checks
            .get(&name)
            .filter(|check| check.ok == ok)
            .map_or_else(Timestamp::now, |check| check.since);
        match (state.checks.get(&name).map(|check| check.ok), ok) {
            (Some(true), false) => tracing::warn!(check = name, reason = message, "check turned red"),
            (Some(false), true) => tracing::info!(check = name, "check turned green"),
            _ => {}
        }
        state.checks.insert(name, Check { ok, message, since, required });
    }

    fn lock(&self) -> MutexGuard<'_, ChecksState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The error in words, with the variable to look at: the error's own, or the dependency's address.
fn advice(error: &UpstreamError) -> String {
    match error {
        UpstreamError::Transient { dependency, .. } => {
            format!("{error}. Is it running? Its address is in {}", address_variable(*dependency))
        }
        other => other.to_string(),
    }
}

/// The variable that says where a dependency is.
pub fn address_variable(dependency: Dependency) -> &'static str {
    match dependency {
        Dependency::Queue => "PUBSUB_EMULATOR_HOST or PUBSUB_PROJECT_ID (embedded: ATLAS_DATA_DIR)",
        Dependency::Store => "SUPABASE_URL (embedded: ATLAS_DATA_DIR)",
        Dependency::Gateway => "RAG_URL",
        Dependency::Model | Dependency::Embedder => "OPENAI_BASE_URL",
        Dependency::VectorIndex => "QDRANT_URL (embedded: ATLAS_DATA_DIR)",
        Dependency::Cache => "REDIS_URL",
        Dependency::Reranker => "RERANK_URL",
    }
}

#[derive(Serialize)]
struct Report {
    status: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    checks: BTreeMap<String, Check>,
}

#[derive(Clone)]
struct Ops {
    checks: Checks,
    registry: Registry,
}

/// The routes. `/healthz` is an alias of `/health/live`, `/health` of `/health/ready`.
pub fn router(checks: Checks, registry: Registry) -> Router {
    Router::new()
        .route("/health/live", get(live))
        .route("/healthz", get(live))
        .route("/health/ready", get(ready))
        .route("/health", get(ready))
        .route("/metrics", get(render))
        .with_state(Ops { checks, registry })
}

/// Asks the process on `listen` whether it is ready, for `--healthcheck` in containers that have no
/// curl. The error says why not.
pub async fn probe_ready(listen: SocketAddr) -> Result<(), String> {
    let ip = match listen.ip() {
        ip if !ip.is_unspecified() => ip,
        IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
    };
    let url = format!("http://{}/health/ready", SocketAddr::new(ip, listen.port()));
    let client = reqwest::Client::builder()
        .timeout(PROBE_TIMEOUT)
        .no_proxy()
        .build()
        .map_err(|error| error.to_string())?;
    let response = client.get(&url).send().await.map_err(|error| format!("{url}: {error}"))?;
    if response.status().is_success() {
        return Ok(());
    }
    let status = response.status();
    let body = response.text().await.unwrap_or_default();
    Err(format!("{status}: {body}"))
}

async fn live(State(Ops { checks, .. }): State<Ops>) -> Response {
    match checks.lock().dead.clone() {
        None => Json(Report { status: "live", reason: None, checks: BTreeMap::new() }).into_response(),
        reason => (
            StatusCode::SERVICE_UNAVAILABLE,
            Json(Report { status: "dead", reason, checks: BTreeMap::new() }),
        )
            .into_response(),
    }
}

async fn ready(State(Ops { checks, .. }): State<Ops>) -> Response {
    let (code, status) = if checks.is_ready() {
        (StatusCode::OK, "ready")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "not_ready")
    };
    let reason = checks.lock().dead.clone();
    (code, Json(Report { status, reason, checks: checks.snapshot() })).into_response()
}

async fn render(State(Ops { registry, .. }): State<Ops>) -> Response {
    match registry.render() {
        Ok(text) => ([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use axum::{body::Body, http::Request};
    use serde_json::Value;
    use tower::ServiceExt as _;

    use super::*;
    use crate::metrics::UpstreamMetrics;

    async fn ask(checks: &Checks, path: &str) -> (StatusCode, String) {
        let registry = Registry::new();
        UpstreamMetrics::new(&registry).unwrap().circuit_open(Dependency::Store).set(1);
        let response = router(checks.clone(), registry)
            .oneshot(Request::builder().uri(path).body(Body::empty()).unwrap())
            .await
            .unwrap();
        let status = response.status();
        let body = axum::body::to_bytes(response.into_body(), 1 << 20).await.unwrap();
        (status, String::from_utf8(body.to_vec()).unwrap())
    }

    #[tokio::test]
    async fn readiness_waits_for_what_is_expected() {
        let checks = Checks::new();
        assert!(checks.is_ready());
        checks.expect("store");
        assert_eq!(ask(&checks, "/health/ready").await.0, StatusCode::SERVICE_UNAVAILABLE);
        checks.ok("store", "ok");
        assert_eq!(ask(&checks, "/health").await.0, StatusCode::OK);
    }

    #[tokio::test]
    async fn a_red_check_names_the_variable_and_leaves_the_process_live() {
        let checks = Checks::new();
        checks.report(
            Dependency::Model,
            &Err(UpstreamError::misconfigured(Dependency::Model, "OPENAI_API_KEY", "401", "set a valid key")),
        );
        checks.report(Dependency::Store, &Err(UpstreamError::transient(Dependency::Store, "refused")));
        let (status, body) = ask(&checks, "/health/ready").await;
        assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
        let body: Value = serde_json::from_str(&body).unwrap();
        assert_eq!(body["status"], "not_ready");
        assert_eq!(body["checks"]["model"]["message"], "model: 401. Check OPENAI_API_KEY: set a valid key");
        assert!(body["checks"]["store"]["message"].as_str().unwrap().contains("SUPABASE_URL"));
        assert!(body["checks"]["store"]["since"].is_string());
        assert_eq!(ask(&checks, "/health/live").await.0, StatusCode::OK);
        assert_eq!(ask(&checks, "/healthz").await.0, StatusCode::OK);
    }

    #[tokio::test]
    async fn what_atlas_can_do_without_does_not_turn_readiness_red() {
        let checks = Checks::new();
        checks.degraded("embedder", "search is lexical: OPENAI_API_KEY is not set");
        let (status, body) = ask(&checks, "/health/ready").await;
        assert_eq!(status, StatusCode::OK);
        assert!(body.contains("search is lexical"));
    }

    #[test]
    fn since_changes_only_with_the_state() {
        let checks = Checks::new();
        checks.failed("store", "first");
        let first = checks.snapshot()["store"].since;
        checks.failed("store", "second");
        let second = checks.snapshot()["store"].clone();
        assert_eq!((second.since, second.message.as_str()), (first, "second"));
        checks.report(Dependency::Store, &Err(UpstreamError::permanent(Dependency::Store, "x", "y")));
        assert!(checks.snapshot()["store"].ok, "a refused request came from a dependency that works");
    }

    #[tokio::test]
    async fn a_dead_process_asks_to_be_restarted() {
        let checks = Checks::new();
        checks.dead("the supervisor ended");
        let (status, body) = ask(&checks, "/health/live").await;
        assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
        assert!(body.contains("the supervisor ended"));
        assert!(!checks.is_ready());
    }

    #[tokio::test]
    async fn metrics_are_in_the_prometheus_text_format() {
        let (status, body) = ask(&Checks::new(), "/metrics").await;
        assert_eq!(status, StatusCode::OK);
        assert!(body.contains(r#"atlas_circuit_open{dependency="store"} 1"#), "{body}");
    }
}
