//! Counting and cutting in tokens.

use std::collections::HashSet;

use serde_json::Value;
use tiktoken_rs::CoreBPE;

/// The model's own encoding where it is known, `o200k_base` otherwise.
fn encoder(model: &str) -> &'static CoreBPE {
    tiktoken_rs::bpe_for_model(model).unwrap_or_else(|_| tiktoken_rs::o200k_base_singleton())
}

/// The tokens of a text. A text that the encoder gives up on counts by bytes.
pub(crate) fn count(model: &str, text: &str) -> u64 {
    match encoder(model).encode(text, &HashSet::new()) {
        Ok((tokens, _)) => tokens.len() as u64,
        Err(_) => text.len() as u64 / 4 + 1,
    }
}

/// The first `max` tokens of a text, or `None` when it has no more than that.
pub(crate) fn cut(model: &str, text: &str, max: u64) -> Option<String> {
    let encoder = encoder(model);
    let (tokens, _) = encoder.encode(text, &HashSet::new()).ok()?;
    let max = usize::try_from(max).unwrap_or(usize::MAX);
    if tokens.len() <= max {
        return None;
    }
    let bytes = encoder.decode_bytes(&tokens[..max]).ok()?;
    // A token may end inside a character.
    Some(match std::str::from_utf8(&bytes) {
        Ok(text) => text.to_owned(),
        Err(error) => String::from_utf8_lossy(&bytes[..error.valid_up_to()]).into_owned(),
    })
}

/// What a chat prompt bills: messages as OpenAI's cookbook counts them, schema and tools by their JSON.
pub(crate) fn prompt(model: &str, request: &Value) -> u64 {
    let count = |text: &str| count(model, text);
    let messages = request["messages"].as_array().map_or(&[][..], Vec::as_slice);
    let mut total = 3;
    for message in messages {
        total += 3 + count(message["role"].as_str().unwrap_or_default());
        total += count(&content_text(&message["content"]));
        for call in message["tool_calls"].as_array().into_iter().flatten() {
            total += 3 + count(call["function"]["name"].as_str().unwrap_or_default());
            total += count(call["function"]["arguments"].as_str().unwrap_or_default());
        }
    }
    if let Some(schema) = request.pointer("/response_format/json_schema/schema") {
        total += 8 + count(&schema.to_string());
    }
    for tool in request["tools"].as_array().into_iter().flatten() {
        let function = &tool["function"];
        total += 8 + count(function["name"].as_str().unwrap_or_default());
        total += count(function["description"].as_str().unwrap_or_default());
        total += count(&function["parameters"].to_string());
    }
    total
}

/// The text of a message's content: a string, or parts.
pub(crate) fn content_text(content: &Value) -> String {
    match content {
        Value::String(text) => text.clone(),
        Value::Array(parts) => {
            parts.iter().filter_map(|part| part["text"].as_str()).collect::<Vec<_>>().join("\n")
        }
        _ => String::new(),
    }
}
