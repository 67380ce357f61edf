//! Rerankers: the share of a query's words that a text has, the same text always with the same score.
//!
//! Rerankers bill in units of their own, so they are not on the meter of tokens.

use axum::{
    extract::State,
    http::{HeaderMap, StatusCode},
    response::{IntoResponse as _, Response},
};
use bytes::Bytes;
use serde_json::{Value, json};

use crate::{
    Fault,
    script::Kind,
    server::{self, Sim, bad_request},
};

/// What Text Embeddings Inference takes in one call unless told otherwise.
const MAX_TEXTS: usize = 32;

/// Jina and Cohere: `documents` in, `results` with `relevance_score` out, best first.
pub(crate) async fn documents(State(sim): State<Sim>, headers: HeaderMap, body: Bytes) -> Response {
    answer(&sim, &headers, &body, "documents", |model, scored| {
        let results: Vec<Value> =
            scored.iter().map(|(index, score)| json!({"index": index, "relevance_score": score})).collect();
        json!({"model": model, "usage": {"total_tokens": 1}, "results": results})
    })
    .await
}

/// Text Embeddings Inference: `texts` in, a list with `score` out, best first.
pub(crate) async fn texts(State(sim): State<Sim>, headers: HeaderMap, body: Bytes) -> Response {
    answer(&sim, &headers, &body, "texts", |_, scored| {
        scored.iter().map(|(index, score)| json!({"index": index, "score": score})).collect()
    })
    .await
}

async fn answer(
    sim: &Sim,
    headers: &HeaderMap,
    body: &Bytes,
    field: &str,
    shape: impl Fn(&str, &[(usize, f64)]) -> Value,
) -> Response {
    let Ok(request) = serde_json::from_slice::<Value>(body) else {
        return bad_request("invalid_json", "The body is not JSON.");
    };
    let (Some(query), Some(texts)) = (request["query"].as_str(), request[field].as_array()) else {
        let message = format!("`query` and `{field}` are required.");
        return server::error(StatusCode::UNPROCESSABLE_ENTITY, "missing_field", &message);
    };
    if field == "documents" && request["model"].as_str().is_none() {
        return bad_request("missing_parameter", "`model` is required.");
    }
    if texts.is_empty() || texts.len() > MAX_TEXTS {
        let message = format!("batch size {} > maximum allowed batch size {MAX_TEXTS}", texts.len());
        return server::error(StatusCode::PAYLOAD_TOO_LARGE, "validation", &message);
    }
    // Reranking models have names of their own: any of them is served.
    let admitted = match server::admit(sim, headers, Kind::Rerank, "sim-reranker", query, 0) {
        Ok(admitted) => admitted,
        Err(refused) => return refused,
    };
    admitted.take_time(sim, 0).await;
    let mut scored: Vec<(usize, f64)> = texts
        .iter()
        .enumerate()
        .map(|(index, text)| (index, score(query, text.as_str().unwrap_or_default())))
        .collect();
    scored.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    if admitted.is(Fault::WrongSchema) {
        // One text is left out.
        scored.pop();
    }
    let model = request["model"].as_str().unwrap_or_default();
    let body = shape(model, &scored);
    if admitted.is(Fault::Malformed) {
        return "{\"results\": [".into_response();
    }
    axum::Json(body).into_response()
}

/// The share of the query's words that are in the text, a little less for longer texts.
fn score(query: &str, text: &str) -> f64 {
    let words = |text: &str| -> std::collections::BTreeSet<String> {
        text.split(|c: char| !c.is_alphanumeric())
            .filter(|word| !word.is_empty())
            .map(str::to_lowercase)
            .collect()
    };
    let (query, text) = (words(query), words(text));
    let shared = query.intersection(&text).count() as f64;
    shared / query.len().max(1) as f64 - text.len() as f64 * 1e-6
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_of_the_querys_words_score_higher() {
        let query = "how are tokens reserved";
        assert!(score(query, "tokens are reserved before a call") > score(query, "tokens are counted"));
        assert!(score(query, "nothing in common") < 0.001);
        assert!(score("", "text") <= 0.0);
    }
}
