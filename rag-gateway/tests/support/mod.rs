//! A gateway on a port of its own, on the embedded engine, spoken to over real HTTP.

#![allow(
    unreachable_pub,
    dead_code,
    clippy::expect_used,
    reason = "shared by several test programs; a test fails by panicking"
)]

use std::{sync::Arc, time::Duration};

use atlas_rag_gateway::{Gateway, RunningGateway};
use atlas_shared::{Config, Env, config::Process, ledger};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

/// A running gateway and the folder it works in.
pub struct Stand {
    pub gateway: RunningGateway,
    pub http: reqwest::Client,
    pub dir: Arc<tempfile::TempDir>,
}

/// An answer, read.
#[derive(Debug)]
pub struct Reply {
    pub status: StatusCode,
    pub headers: reqwest::header::HeaderMap,
    pub body: Value,
    pub text: String,
}

impl Reply {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).and_then(|value| value.to_str().ok())
    }

    /// Asserts that this is a problem of this status and type, and gives its detail.
    #[track_caller]
    pub fn problem(&self, status: u16, kind: &str) -> String {
        assert_eq!(self.status.as_u16(), status, "{}", self.text);
        assert_eq!(self.header("content-type"), Some("application/problem+json"), "{}", self.text);
        assert_eq!(self.body["type"], kind, "{}", self.text);
        assert_eq!(self.body["status"], status);
        assert!(self.header("x-request-id").is_some());
        self.body["detail"].as_str().expect("a detail").to_owned()
    }

    #[track_caller]
    pub fn ok(self) -> Value {
        assert!(self.status.is_success(), "{}: {}", self.status, self.text);
        self.body
    }
}

/// The embedded configuration in a folder, with what a test changes.
pub fn config(dir: &tempfile::TempDir, settings: &[(&str, &str)]) -> Config {
    let mut env = Env::default()
        .with("ATLAS_DATA_DIR", dir.path().display().to_string())
        .with("GATEWAY_LISTEN", "127.0.0.1:0")
        // Tests ask as fast as they can until something has happened.
        .with("RATE_LIMIT_REQUESTS", "10000000");
    for (name, value) in settings {
        env = env.with(name, *value);
    }
    Config::load(&env, Process::Gateway).expect("a valid configuration")
}

impl Stand {
    pub async fn start(settings: &[(&str, &str)]) -> Self {
        Self::start_in(Arc::new(tempfile::tempdir().expect("a folder")), settings).await
    }

    pub async fn start_in(dir: Arc<tempfile::TempDir>, settings: &[(&str, &str)]) -> Self {
        let config = config(&dir, settings);
        let ledger = ledger::open(&config).await.expect("a ledger");
        let gateway = Gateway::start(&config, ledger).await.expect("a gateway");
        let http = reqwest::Client::builder().timeout(Duration::from_secs(60)).build().expect("a client");
        Self { gateway, http, dir }
    }

    pub fn request(&self, method: Method, path: &str) -> reqwest::RequestBuilder {
        self.http.request(method, format!("http://{}{path}", self.gateway.addr))
    }

    pub async fn send(&self, request: reqwest::RequestBuilder) -> Reply {
        let response = request.send().await.expect("an answer");
        let (status, headers) = (response.status(), response.headers().clone());
        let text = response.text().await.expect("a body");
        Reply { status, headers, body: serde_json::from_str(&text).unwrap_or(Value::Null), text }
    }

    pub async fn get(&self, path: &str) -> Reply {
        self.send(self.request(Method::GET, path)).await
    }

    pub async fn post(&self, path: &str, body: Value) -> Reply {
        self.send(self.request(Method::POST, path).json(&body)).await
    }

    pub async fn put(&self, documents: Value) -> Reply {
        self.send(self.request(Method::PUT, "/v1/documents").json(&json!({"documents": documents}))).await
    }

    pub async fn query(&self, query: &str) -> Reply {
        self.post("/v1/query_chat", json!({"query": query})).await
    }

    /// The value of one metric series, such as `rag_cache_hits_total`.
    /// The status of a job, as soon as it is so; `within` bounds the wait.
    pub async fn job_until(&self, id: &str, within: Duration, is_so: impl Fn(&Value) -> bool) -> Value {
        let status = async {
            loop {
                let status = self.get(&format!("/v1/jobs/{id}")).await.ok();
                if is_so(&status) {
                    return status;
                }
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(within, status).await.expect("the job gets there")
    }

    pub async fn metric(&self, series: &str) -> u64 {
        let text = self.get("/metrics").await.text;
        text.lines()
            .find_map(|line| line.strip_prefix(series)?.strip_prefix(' ')?.parse().ok())
            .unwrap_or_default()
    }
}

/// The sources of an answer's passages, in order.
pub fn sources(passages: &Value) -> Vec<&str> {
    let passages = passages.as_array().expect("an array of passages");
    passages.iter().map(|passage| passage["source"].as_str().expect("a source")).collect()
}
