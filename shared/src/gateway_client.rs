//! The client of the gateway's HTTP API ([`crate::gateway_api`]), for the worker and the CLI.
//!
//! One attempt a call, bounded in time and size; failures come back as decisions
//! ([`UpstreamError`]) for [`crate::resilience`].

use std::time::Duration;

use http::{Method, StatusCode, header};
use reqwest::RequestBuilder;
use serde::de::DeserializeOwned;
use url::Url;

use crate::{
    Dependency, Secret, UpstreamError,
    gateway_api::{
        CollectionInfo, DEGRADED_HEADER, DeleteDocuments, DeleteDocumentsResult, DocumentList, EmbedItem,
        IndexRepository, JobCreated, JobStatus, Passage, Problem, PutDocuments, PutDocumentsResult,
        QueryChatRequest, RebuildStarted, UseGeneration,
    },
    http_client,
    trace_context::{TRACEPARENT, TraceParent},
};

/// No answer of the gateway is larger: `MAX_TOP_K` passages, or the list of a big collection.
const MAX_ANSWER_BYTES: usize = 64 << 20;

/// No error is larger: one may name the documents that were done before it.
const MAX_PROBLEM_BYTES: usize = 4 << 20;

/// Talks to one gateway. Clones share connections.
#[derive(Clone, Debug)]
pub struct GatewayClient {
    http: reqwest::Client,
    base: Url,
    api_key: Option<Secret>,
    trace: Option<TraceParent>,
}

/// The answer to a query.
#[derive(Clone, Debug, PartialEq)]
pub struct QueryAnswer {
    /// Best first.
    pub passages: Vec<Passage>,
    /// How the answer is less than it could be (`lexical`, `stale`); `None`: it is not.
    pub degraded: Option<String>,
}

/// Why documents were not all indexed, and those that were.
#[derive(Clone, Debug)]
pub struct PutFailure {
    /// What happened.
    pub error: UpstreamError,
    /// Documents that were finished before, and all tokens that were billed.
    pub done: PutDocumentsResult,
}

impl From<PutFailure> for UpstreamError {
    fn from(PutFailure { error, .. }: PutFailure) -> Self {
        error
    }
}

impl GatewayClient {
    /// A client of the gateway at `url` (`RAG_URL`), with the caller's key (`RAG_API_KEY`). No call
    /// takes longer than `timeout`.
    pub fn new(url: &Url, api_key: Option<Secret>, timeout: Duration) -> Result<Self, UpstreamError> {
        let http = http_client::client(timeout).map_err(|error| {
            UpstreamError::misconfigured(
                Dependency::Gateway,
                "RAG_URL",
                format!("no HTTP client could be made: {error}"),
                "check the system's TLS certificates",
            )
        })?;
        Ok(Self { http, base: url.clone(), api_key, trace: None })
    }

    /// The same client, whose calls belong to this trace.
    #[must_use]
    pub fn traced(&self, trace: TraceParent) -> Self {
        Self { trace: Some(trace), ..self.clone() }
    }

    /// Finds passages.
    pub async fn query_chat(&self, request: &QueryChatRequest) -> Result<QueryAnswer, UpstreamError> {
        let response = self.send(self.request(Method::POST, "v1/query_chat")?.json(request)).await?;
        let degraded =
            response.headers().get(DEGRADED_HEADER).and_then(|value| value.to_str().ok()).map(str::to_owned);
        Ok(QueryAnswer { passages: read(response).await?, degraded })
    }

    /// Indexes documents, and returns when they are searchable.
    pub async fn put_documents(&self, request: &PutDocuments) -> Result<PutDocumentsResult, PutFailure> {
        let nothing = |error| PutFailure { error, done: PutDocumentsResult::default() };
        let request = self.request(Method::PUT, "v1/documents").map_err(nothing)?.json(request);
        let response = attempt(request).await.map_err(nothing)?;
        if response.status().is_success() {
            return read(response).await.map_err(nothing);
        }
        let (error, done) = refusal(response).await;
        Err(PutFailure { error, done: done.unwrap_or_default() })
    }

    /// Removes documents.
    pub async fn delete_documents(
        &self,
        request: &DeleteDocuments,
    ) -> Result<DeleteDocumentsResult, UpstreamError> {
        self.call(self.request(Method::DELETE, "v1/documents")?.json(request)).await
    }

    /// What is indexed, so that only what changed is sent.
    pub async fn list_documents(
        &self,
        collection: Option<&str>,
        repo: Option<&str>,
    ) -> Result<DocumentList, UpstreamError> {
        let query: Vec<(&str, &str)> = [("collection", collection), ("repo", repo)]
            .into_iter()
            .filter_map(|(name, value)| value.map(|value| (name, value)))
            .collect();
        self.call(self.request(Method::GET, "v1/documents")?.query(&query)).await
    }

    /// Indexes in the background; see [`GatewayClient::job`].
    pub async fn embed_batch(
        &self,
        collection: Option<&str>,
        items: &[EmbedItem],
    ) -> Result<JobCreated, UpstreamError> {
        let query: Vec<(&str, &str)> = collection.map(|name| ("collection", name)).into_iter().collect();
        self.call(self.request(Method::POST, "v1/embed_batch")?.query(&query).json(items)).await
    }

    /// Where an index job is.
    pub async fn job(&self, id: &str) -> Result<JobStatus, UpstreamError> {
        if !crate::message::is_name(id) {
            return Err(UpstreamError::permanent(
                Dependency::Gateway,
                "unknown_job",
                format!("{id:?} is no job id"),
            ));
        }
        self.call(self.request(Method::GET, &format!("v1/jobs/{id}"))?).await
    }

    /// All collections.
    pub async fn collections(&self) -> Result<Vec<CollectionInfo>, UpstreamError> {
        self.call(self.request(Method::GET, "v1/collections")?).await
    }

    /// Starts to index a folder or a repository that the gateway reads by itself; see [`GatewayClient::job`].
    pub async fn index_repository(&self, request: &IndexRepository) -> Result<JobCreated, UpstreamError> {
        self.call(self.request(Method::POST, "v1/index")?.json(request)).await
    }

    /// Starts to fill a new generation of a collection; see [`GatewayClient::job`].
    pub async fn rebuild_collection(&self, name: &str) -> Result<RebuildStarted, UpstreamError> {
        self.call(self.request(Method::POST, &format!("v1/collections/{}/rebuild", collection(name)?))?).await
    }

    /// Makes a collection stand for another generation of it.
    pub async fn use_generation(&self, name: &str, generation: &str) -> Result<(), UpstreamError> {
        let body = UseGeneration { generation: generation.to_owned() };
        let path = format!("v1/collections/{}/generation", collection(name)?);
        self.send(self.request(Method::PUT, &path)?.json(&body)).await.map(drop)
    }

    /// Deletes a generation that is not in use, or a collection with all its generations.
    pub async fn drop_collection(&self, name: &str) -> Result<(), UpstreamError> {
        let path = format!("v1/collections/{}", collection(name)?);
        self.send(self.request(Method::DELETE, &path)?).await.map(drop)
    }

    /// Empties the gateway's caches.
    pub async fn clear_cache(&self) -> Result<(), UpstreamError> {
        self.send(self.request(Method::POST, "v1/admin/cache/clear")?).await.map(drop)
    }

    /// Is the gateway reachable and well? For readiness and `atlas doctor`.
    pub async fn ready(&self) -> Result<(), UpstreamError> {
        self.send(self.request(Method::GET, "health/ready")?).await.map(drop)
    }

    fn request(&self, method: Method, path: &str) -> Result<RequestBuilder, UpstreamError> {
        // `join` would drop a last path segment without a slash; the base may have a prefix.
        let base = self.base.as_str().trim_end_matches('/');
        let url = Url::parse(&format!("{base}/{path}")).map_err(|error| {
            UpstreamError::misconfigured(
                Dependency::Gateway,
                "RAG_URL",
                error,
                "set it to the gateway's address, such as http://rag-gateway:8501",
            )
        })?;
        let mut request = self.http.request(method, url);
        if let Some(key) = &self.api_key {
            request = request.bearer_auth(key.expose());
        }
        if let Some(trace) = self.trace {
            request = request.header(TRACEPARENT, trace.child().to_string());
        }
        Ok(request)
    }

    async fn call<T: DeserializeOwned>(&self, request: RequestBuilder) -> Result<T, UpstreamError> {
        read(self.send(request).await?).await
    }

    async fn send(&self, request: RequestBuilder) -> Result<reqwest::Response, UpstreamError> {
        let response = attempt(request).await?;
        if response.status().is_success() { Ok(response) } else { Err(refusal(response).await.0) }
    }
}

async fn attempt(request: RequestBuilder) -> Result<reqwest::Response, UpstreamError> {
    request.send().await.map_err(|error| {
        if error.is_builder() {
            UpstreamError::misconfigured(
                Dependency::Gateway,
                "RAG_API_KEY",
                "the request could not be built",
                "copy the key again, on one line, without quotes",
            )
        } else {
            UpstreamError::transient(Dependency::Gateway, http_client::describe(&error))
        }
    })
}

/// A collection's name as a part of a path: it is either harmless there or no name.
fn collection(name: &str) -> Result<&str, UpstreamError> {
    let (plain, generation) = name.split_once('@').unwrap_or((name, "1"));
    if crate::message::is_name(plain) && generation.bytes().all(|byte| byte.is_ascii_digit()) {
        return Ok(name);
    }
    Err(UpstreamError::permanent(
        Dependency::Gateway,
        "unknown_collection",
        format!("{name:?} is no collection's name"),
    ))
}

async fn read<T: DeserializeOwned>(response: reqwest::Response) -> Result<T, UpstreamError> {
    let transient = |message: String| UpstreamError::transient(Dependency::Gateway, message);
    let body =
        http_client::bounded_body(response, MAX_ANSWER_BYTES).await.map_err(|e| transient(e.to_string()))?;
    serde_json::from_slice(&body).map_err(|error| {
        UpstreamError::misconfigured(
            Dependency::Gateway,
            "RAG_URL",
            format!("the answer is not what a gateway of this version gives: {error}"),
            "point it at an atlas-rag-gateway of the same release",
        )
    })
}

/// An answer with an error status, as a decision, with what was done before.
async fn refusal(response: reqwest::Response) -> (UpstreamError, Option<PutDocumentsResult>) {
    let status = response.status();
    let retry_after = http_client::retry_after(response.headers());
    let is_problem = response
        .headers()
        .get(header::CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .is_some_and(|kind| kind.starts_with("application/problem+json"));
    let body = http_client::bounded_body(response, MAX_PROBLEM_BYTES).await.unwrap_or_default();
    let mut problem: Option<Problem> = serde_json::from_slice(&body).ok();
    let done = problem.as_mut().and_then(|problem| problem.done.take());
    let message = match &problem {
        Some(problem) => format!("{status}: {}", http_client::excerpt(&problem.detail, 1000)),
        None => format!("{status}: {}", http_client::excerpt(&String::from_utf8_lossy(&body), 600)),
    };
    let error = match status {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => UpstreamError::misconfigured(
            Dependency::Gateway,
            "RAG_API_KEY",
            message,
            "set it to one of the keys in the gateway's API_KEYS",
        ),
        StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT => {
            UpstreamError::Transient { dependency: Dependency::Gateway, message, retry_after }
        }
        // Waiting does not help: somebody must make room.
        status if status.is_server_error() && status != StatusCode::INSUFFICIENT_STORAGE => {
            UpstreamError::Transient { dependency: Dependency::Gateway, message, retry_after }
        }
        status if status.is_redirection() || (status == StatusCode::NOT_FOUND && !is_problem) => {
            UpstreamError::misconfigured(
                Dependency::Gateway,
                "RAG_URL",
                message,
                "set it to the gateway's address, such as http://rag-gateway:8501, without a path",
            )
        }
        _ => {
            let code = problem.map_or_else(|| format!("http_{}", status.as_u16()), |problem| problem.kind);
            UpstreamError::permanent(Dependency::Gateway, &code, message)
        }
    };
    (error, done)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use axum::{
        Json, Router,
        body::Bytes,
        extract::{RawQuery, Request},
        response::IntoResponse,
        routing::{any, get, post},
    };
    use serde_json::{Value, json};

    use super::*;

    /// A gateway that answers as told, on a port of its own.
    async fn gateway(router: Router) -> GatewayClient {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = Url::parse(&format!("http://{}", listener.local_addr().unwrap())).unwrap();
        tokio::spawn(async move { axum::serve(listener, router).await });
        GatewayClient::new(&url, Some(Secret::new("the-key-of-the-worker")), Duration::from_secs(5)).unwrap()
    }

    async fn refused_with(
        status: u16,
        headers: &'static [(&'static str, &'static str)],
        body: Value,
    ) -> UpstreamError {
        let answer = move || async move {
            let mut response = Json(body).into_response();
            *response.status_mut() = StatusCode::from_u16(status).unwrap();
            for (name, value) in headers {
                response.headers_mut().insert(*name, value.parse().unwrap());
            }
            response
        };
        gateway(Router::new().fallback(any(answer))).await.collections().await.unwrap_err()
    }

    const PROBLEM: &[(&str, &str)] = &[("content-type", "application/problem+json")];

    fn problem(kind: &str, status: u16) -> Value {
        json!({"type": kind, "title": "t", "status": status, "detail": "what, why and what to do"})
    }

    #[tokio::test]
    async fn a_query_gives_passages_and_says_when_it_is_degraded() {
        let router = Router::new().route(
            "/v1/query_chat",
            post(|request: Request| async move {
                assert_eq!(request.headers()["authorization"], "Bearer the-key-of-the-worker");
                let trace = request.headers()[TRACEPARENT].to_str().unwrap().to_owned();
                (
                    [(DEGRADED_HEADER, "lexical")],
                    Json(json!([{"text": trace, "similarity": null, "source": "a.md",
                    "start_line": 1, "end_line": 2, "heading": null, "score": 0.5, "collection": "c"}])),
                )
            }),
        );
        let trace = TraceParent::generate();
        let client = gateway(router).await.traced(trace);
        let answer = client
            .query_chat(&QueryChatRequest { query: "q".to_owned(), ..Default::default() })
            .await
            .unwrap();
        assert_eq!(answer.degraded.as_deref(), Some("lexical"));
        let seen: TraceParent = answer.passages[0].text.parse().unwrap();
        assert_eq!(seen.trace_id(), trace.trace_id());
        assert_ne!(seen.span_id(), trace.span_id());
    }

    #[tokio::test]
    async fn names_in_a_query_are_encoded() {
        let router = Router::new().route(
            "/v1/documents",
            get(|RawQuery(query): RawQuery| async move {
                assert_eq!(query.as_deref(), Some("collection=c&repo=a%26b"));
                Json(json!({"documents": []}))
            }),
        );
        let list = gateway(router).await.list_documents(Some("c"), Some("a&b")).await.unwrap();
        assert!(list.documents.is_empty());
    }

    #[tokio::test]
    async fn a_batch_is_an_array() {
        let router = Router::new().route(
            "/v1/embed_batch",
            post(|body: Bytes| async move {
                assert_eq!(&body[..], br#"["a"]"#);
                (StatusCode::ACCEPTED, Json(json!({"job_id": "j-1"})))
            }),
        );
        let job = gateway(router).await.embed_batch(None, &[EmbedItem::Text("a".to_owned())]).await.unwrap();
        assert_eq!(job.job_id, "j-1");
    }

    #[tokio::test]
    async fn every_refusal_is_a_decision() {
        for status in [401, 403] {
            let error = refused_with(status, PROBLEM, problem("unauthorized", status)).await;
            assert!(
                matches!(&error, UpstreamError::Misconfigured { variable: "RAG_API_KEY", message, .. }
                if message.contains("what, why and what to do")),
                "{error:?}"
            );
        }
        for status in [429, 503] {
            let headers = &[("content-type", "application/problem+json"), ("retry-after", "3")];
            let error = refused_with(status, headers, problem("busy", status)).await;
            assert!(
                matches!(&error, UpstreamError::Transient { retry_after: Some(after), .. }
                if *after == Duration::from_secs(3)),
                "{error:?}"
            );
        }
        for (status, kind) in
            [(400, "invalid_query"), (404, "unknown_collection"), (409, "embedding_size_mismatch")]
        {
            let error = refused_with(status, PROBLEM, problem(kind, status)).await;
            assert!(matches!(&error, UpstreamError::Permanent { code, .. } if code == kind), "{error:?}");
        }
        let error = refused_with(404, &[], json!("another server")).await;
        assert!(matches!(error, UpstreamError::Misconfigured { variable: "RAG_URL", .. }), "{error:?}");
        let error = refused_with(200, &[], json!({"not": "a list"})).await;
        assert!(matches!(error, UpstreamError::Misconfigured { variable: "RAG_URL", .. }), "{error:?}");
    }

    #[tokio::test]
    async fn a_gateway_that_is_down_is_transient_and_no_key_shows() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = Url::parse(&format!("http://user:secret@{}", listener.local_addr().unwrap())).unwrap();
        drop(listener);
        let client = GatewayClient::new(&url, Some(Secret::new("the-key")), Duration::from_secs(5)).unwrap();
        let error = client.ready().await.unwrap_err();
        assert!(error.is_transient(), "{error:?}");
        let text = format!("{error:?}");
        assert!(!text.contains("secret") && !text.contains("the-key"), "{text}");
    }
}
