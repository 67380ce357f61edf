//! Rerankers: the port, and the HTTP APIs that Jina, Cohere and Text Embeddings Inference speak.
//!
//! The three differ in the request; every answer is read in any of their forms, because servers that
//! claim one of them mix the details. Rerankers bill in units of their own (searches, documents), so
//! nothing of it is in the token ledger.

use std::time::Duration;

use async_trait::async_trait;
use http::StatusCode;
use serde_json::{Value, json};

use crate::{
    Dependency, UpstreamError,
    config::{RerankApi, RerankConfig},
    http_client,
};

/// No answer is larger: a number for each text, and whatever a server adds.
const MAX_ANSWER_BYTES: usize = 8 << 20;

/// Orders texts by how well they answer a query.
#[async_trait]
pub trait Reranker: Send + Sync {
    /// Its model, for cache keys and logs.
    fn model(&self) -> &str;

    /// One score a text, in their order; higher is better. Scores of one query can be compared with
    /// each other and with nothing else.
    async fn scores(&self, query: &str, texts: &[&str]) -> Result<Vec<f32>, UpstreamError>;
}

/// A reranker behind HTTP. One attempt a call.
#[derive(Debug)]
pub struct HttpReranker {
    http: reqwest::Client,
    config: RerankConfig,
    model: String,
}

impl HttpReranker {
    /// By `RERANK_URL` and its companions.
    pub fn new(config: &RerankConfig) -> Result<Self, UpstreamError> {
        let http = http_client::client(config.timeout).map_err(|error| {
            UpstreamError::misconfigured(
                Dependency::Reranker,
                "RERANK_URL",
                format!("no HTTP client could be made: {error}"),
                "check the system's TLS certificates",
            )
        })?;
        // Where the server has only one model, its address tells it from others.
        let model = config.model.clone().unwrap_or_else(|| config.url.to_string());
        Ok(Self { http, config: config.clone(), model })
    }

    fn body(&self, query: &str, texts: &[&str]) -> Value {
        let mut body = match self.config.api {
            RerankApi::Jina => json!({
                "query": query, "documents": texts, "top_n": texts.len(), "return_documents": false,
            }),
            RerankApi::Cohere => json!({"query": query, "documents": texts, "top_n": texts.len()}),
            RerankApi::Tei => json!({"query": query, "texts": texts, "truncate": true, "return_text": false}),
        };
        if let (Some(model), Some(object)) = (&self.config.model, body.as_object_mut()) {
            object.insert("model".to_owned(), json!(model));
        }
        body
    }
}

#[async_trait]
impl Reranker for HttpReranker {
    fn model(&self) -> &str {
        &self.model
    }

    async fn scores(&self, query: &str, texts: &[&str]) -> Result<Vec<f32>, UpstreamError> {
        let mut request = self.http.post(self.config.url.clone()).json(&self.body(query, texts));
        if let Some(key) = &self.config.api_key {
            request = request.bearer_auth(key.expose());
        }
        let response = request.send().await.map_err(|error| {
            if error.is_builder() {
                misconfigured(
                    "RERANK_API_KEY",
                    "the request could not be built",
                    "copy the key again, on one line",
                )
            } else {
                transient(http_client::describe(&error), None)
            }
        })?;
        let status = response.status();
        let retry_after = http_client::retry_after(response.headers());
        let body = http_client::bounded_body(response, MAX_ANSWER_BYTES)
            .await
            .map_err(|error| transient(error.to_string(), None))?;
        if status.is_success() {
            return read(&body, texts.len())
                .ok_or_else(|| transient(format!("the answer does not score {} texts", texts.len()), None));
        }
        Err(refusal(status, retry_after, &body))
    }
}

/// The score of every text; `None` where one is missing, named twice, or no number.
///
/// Jina and Cohere say `results`, some of their kin `data`, Text Embeddings Inference gives the list.
fn read(body: &[u8], count: usize) -> Option<Vec<f32>> {
    let answer: Value = serde_json::from_slice(body).ok()?;
    let list = [&answer["results"], &answer["data"], &answer].into_iter().find_map(Value::as_array)?;
    let mut scores = vec![None; count];
    for scored in list {
        let index = usize::try_from(scored["index"].as_u64()?).ok()?;
        let score = scored["relevance_score"].as_f64().or_else(|| scored["score"].as_f64())?;
        #[expect(clippy::cast_possible_truncation, reason = "only the order of scores means something")]
        let score = score as f32;
        if !score.is_finite() || scores.get_mut(index)?.replace(score).is_some() {
            return None;
        }
    }
    scores.into_iter().collect()
}

fn refusal(status: StatusCode, retry_after: Option<Duration>, body: &[u8]) -> UpstreamError {
    let message = format!("{status}: {}", http_client::excerpt(&String::from_utf8_lossy(body), 300));
    match status {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
            misconfigured("RERANK_API_KEY", &message, "set a valid key")
        }
        StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED => misconfigured(
            "RERANK_URL",
            &message,
            "set it to the endpoint itself, such as http://tei:8080/rerank",
        ),
        StatusCode::BAD_REQUEST | StatusCode::UNPROCESSABLE_ENTITY => misconfigured(
            "RERANK_API",
            &message,
            "set what the server speaks (jina, cohere or tei), and RERANK_MODEL to a model that it has",
        ),
        _ => transient(message, retry_after),
    }
}

fn transient(message: String, retry_after: Option<Duration>) -> UpstreamError {
    UpstreamError::Transient { dependency: Dependency::Reranker, message, retry_after }
}

fn misconfigured(variable: &'static str, message: &str, fix: &str) -> UpstreamError {
    UpstreamError::misconfigured(Dependency::Reranker, variable, message, fix)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn every_form_of_answer_is_read() {
        for body in [
            json!({"model": "m", "usage": {"total_tokens": 9}, "results": [
                {"index": 1, "relevance_score": 0.9, "document": {"text": "b"}}, {"index": 0, "relevance_score": 0.1}]}),
            json!({"id": "x", "meta": {}, "results": [{"index": 0, "relevance_score": 0.1}, {"index": 1, "relevance_score": 0.9}]}),
            json!([{"index": 1, "score": 0.9}, {"index": 0, "score": 0.1}]),
            json!({"object": "list", "data": [{"index": 0, "relevance_score": 0.1}, {"index": 1, "relevance_score": 0.9}]}),
        ] {
            assert_eq!(read(body.to_string().as_bytes(), 2), Some(vec![0.1, 0.9]), "{body}");
        }
    }

    #[test]
    fn an_answer_that_leaves_a_text_out_is_none() {
        for body in [
            json!([{"index": 0, "score": 0.1}]),
            json!([{"index": 0, "score": 0.1}, {"index": 0, "score": 0.2}]),
            json!([{"index": 0, "score": 0.1}, {"index": 2, "score": 0.2}]),
            json!([{"index": 0, "score": 0.1}, {"index": 1, "score": null}]),
            json!({"error": "no"}),
        ] {
            assert_eq!(read(body.to_string().as_bytes(), 2), None, "{body}");
        }
    }

    proptest! {
        #[test]
        fn no_answer_panics(body in prop::collection::vec(any::<u8>(), 0..200), count in 0_usize..5) {
            read(&body, count);
        }
    }
}
