//! `POST /v1/embeddings`: deterministic vectors, similar texts near each other.
//!
//! A text is a bag of words and of character trigrams; each of them points in a pseudo-random
//! direction that depends on it alone, and the text's vector is their weighted sum, normalised. Texts
//! that share words are near each other, and texts that share word stems a little.

use axum::{extract::State, http::HeaderMap, response::Response};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use bytes::Bytes;
use serde_json::{Value, json};

use crate::{
    BilledCall, Fault,
    fault::{hash, mix},
    script::Kind,
    server::{self, Sim, bad_request},
    tokens,
};

/// OpenAI's limits.
const MAX_INPUTS: usize = 2048;
const MAX_INPUT_TOKENS: u64 = 8192;

pub(crate) async fn embed(State(sim): State<Sim>, headers: HeaderMap, body: Bytes) -> Response {
    let request: Value = match serde_json::from_slice(&body) {
        Ok(request) => request,
        Err(why) => return bad_request("invalid_json", &format!("The body is not JSON: {why}")),
    };
    let Some(model) = request["model"].as_str() else {
        return bad_request("missing_parameter", "you must provide a model parameter");
    };
    let texts = match inputs(&request["input"]) {
        Ok(texts) => texts,
        Err(refused) => return refused,
    };
    let counts: Vec<u64> = texts.iter().map(|text| tokens::count(model, text)).collect();
    let prompt_tokens: u64 = counts.iter().sum();
    let admitted =
        match server::admit(&sim, &headers, Kind::Embedding, model, &texts.join("\n"), prompt_tokens) {
            Ok(admitted) => admitted,
            Err(refused) => return refused,
        };
    if counts.iter().any(|count| *count > MAX_INPUT_TOKENS) {
        return bad_request(
            "context_length_exceeded",
            &format!(
                "This model's maximum context length is {MAX_INPUT_TOKENS} tokens, however you requested more."
            ),
        );
    }
    let most = match model {
        "text-embedding-3-large" => 3072,
        model if model.starts_with("text-embedding-") => 1536,
        _ => 256,
    };
    let size = request["dimensions"].as_u64().and_then(|size| usize::try_from(size).ok()).unwrap_or(most);
    if size == 0 || size > 4096 {
        return bad_request("invalid_value", "'dimensions' must be from 1 to 4096.");
    }
    let billed = if admitted.is(Fault::Overbill) { prompt_tokens * 2 } else { prompt_tokens };
    sim.books().bill(BilledCall {
        request_id: admitted.request_id.clone(),
        kind: "embedding".to_owned(),
        model: model.to_owned(),
        prompt_tokens: billed,
        completion_tokens: 0,
        fault: admitted.fault,
    });
    admitted.take_time(&sim, 0).await;
    if let Some(lost) = server::lost(admitted.fault) {
        return lost;
    }

    let data: Vec<Value> = if admitted.is(Fault::Empty) {
        Vec::new()
    } else {
        texts
            .iter()
            .enumerate()
            .map(|(index, text)| {
                // A vector of the wrong length is what a wrong schema is for embeddings.
                let size = if admitted.is(Fault::WrongSchema) && index > 0 { size + 1 } else { size };
                let vector = vector(text, size);
                let embedding = if request["encoding_format"] == "base64" {
                    let bytes: Vec<u8> = vector.iter().flat_map(|number| number.to_le_bytes()).collect();
                    json!(BASE64_STANDARD.encode(bytes))
                } else {
                    json!(vector)
                };
                json!({"object": "embedding", "index": index, "embedding": embedding})
            })
            .collect()
    };
    let mut body = json!({"object": "list", "data": data, "model": model});
    if !admitted.is(Fault::NoUsage) {
        body["usage"] = json!({"prompt_tokens": billed, "total_tokens": billed});
    }
    let mut response = server::send(&admitted, &body);
    server::rate_headers(&sim, model, &mut response);
    response
}

/// The texts, from any form of `input`. Token arrays become a text that has as many words.
fn inputs(input: &Value) -> Result<Vec<String>, Response> {
    let invalid = |why: &str| bad_request("invalid_input", &format!("'$.input' is invalid: {why}."));
    let from_tokens =
        |tokens: &[Value]| tokens.iter().map(|token| format!("t{token}")).collect::<Vec<_>>().join(" ");
    let texts = match input {
        Value::String(text) => vec![text.clone()],
        Value::Array(items) if !items.is_empty() && items.iter().all(Value::is_u64) => {
            vec![from_tokens(items)]
        }
        Value::Array(items) => items
            .iter()
            .map(|item| match item {
                Value::String(text) => Some(text.clone()),
                Value::Array(tokens) if tokens.iter().all(Value::is_u64) => Some(from_tokens(tokens)),
                _ => None,
            })
            .collect::<Option<Vec<_>>>()
            .ok_or_else(|| invalid("it is neither texts nor tokens"))?,
        _ => return Err(invalid("it is missing")),
    };
    if texts.is_empty() || texts.len() > MAX_INPUTS {
        return Err(invalid(&format!("from 1 to {MAX_INPUTS} inputs are accepted")));
    }
    if texts.iter().any(String::is_empty) {
        return Err(invalid("an input is an empty string"));
    }
    Ok(texts)
}

/// A sparse random projection: each feature touches a few places with random signs.
fn add(vector: &mut [f32], feature: u64, weight: f32) {
    for place in 0..16_u64 {
        let bits = mix(feature ^ mix(place));
        let at = usize::try_from(bits >> 1).unwrap_or(usize::MAX >> 1) % vector.len();
        vector[at] += if bits & 1 == 0 { weight } else { -weight };
    }
}

/// The normalised vector of a text.
pub(crate) fn vector(text: &str, size: usize) -> Vec<f32> {
    let mut vector = vec![0.0_f32; size];
    for word in text.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty()) {
        let word = word.to_lowercase();
        // Short words say little.
        let weight = if word.chars().count() <= 3 { 0.3 } else { 1.0 };
        add(&mut vector, hash(word.as_bytes()), weight);
        let letters: Vec<char> = format!(" {word} ").chars().collect();
        for trigram in letters.windows(3) {
            let trigram: String = trigram.iter().collect();
            add(&mut vector, hash(trigram.as_bytes()) ^ 1, weight * 0.2);
        }
    }
    // Texts of punctuation alone still need a direction.
    if vector.iter().all(|number| *number == 0.0) {
        add(&mut vector, hash(text.as_bytes()), 1.0);
    }
    let length = vector.iter().map(|number| number * number).sum::<f32>().sqrt();
    if length > 0.0 {
        for number in &mut vector {
            *number /= length;
        }
    } else if let Some(first) = vector.first_mut() {
        *first = 1.0;
    }
    vector
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn cosine(a: &str, b: &str) -> f32 {
        vector(a, 256).iter().zip(vector(b, 256)).map(|(a, b)| a * b).sum()
    }

    #[test]
    fn similar_texts_are_near_each_other() {
        let query = "how are messages retried after a timeout";
        let near = "A message that timed out is retried by the queue; the timeout is configurable.";
        let far = "Grafana dashboards are provisioned from JSON files in this folder.";
        assert!(
            cosine(query, near) > cosine(query, far) + 0.1,
            "{} {}",
            cosine(query, near),
            cosine(query, far)
        );
        assert!((cosine(query, query) - 1.0).abs() < 1e-5);
        assert!(cosine("retry", "retries") > cosine("retry", "queue"), "stems are a little near");
    }

    proptest! {
        #[test]
        fn every_text_has_a_unit_vector(text in "\\PC{1,60}", size in 1_usize..600) {
            let vector = vector(&text, size);
            let length: f32 = vector.iter().map(|number| number * number).sum();
            prop_assert!((length - 1.0).abs() < 1e-3, "{length}");
        }
    }
}
