//! Reads answers. First as the API defines them; failing that leniently, because many compatible
//! servers leave fields out or use words of their own, and their answer was paid for.
//!
//! Even an answer of no use is searched for its `usage`: then the exact cost is booked.

use async_openai::types::{
    chat::{ChatCompletionMessageToolCalls, CreateChatCompletionResponse, FinishReason as ApiFinishReason},
    embeddings::CreateEmbeddingResponse,
};
use serde_json::Value;

use crate::{
    Tokens,
    ledger::Usage,
    model::{ChatAnswer, Embeddings, FinishReason, ToolCall},
};

/// Why an answer is of no use, and what it cost if it says so.
pub(super) type Useless = (&'static str, Option<Usage>);

/// An answer as the API defines it.
pub(super) fn typed(response: CreateChatCompletionResponse) -> Result<ChatAnswer, Useless> {
    let usage = response
        .usage
        .as_ref()
        .and_then(|usage| said(usage.prompt_tokens.into(), usage.completion_tokens.into()));
    let Some(choice) = response.choices.into_iter().next() else { return Err(("it has no choices", usage)) };
    let tool_calls = choice.message.tool_calls.unwrap_or_default().into_iter().map(|call| match call {
        ChatCompletionMessageToolCalls::Function(call) => {
            ToolCall { id: call.id, name: call.function.name, arguments: call.function.arguments }
        }
        ChatCompletionMessageToolCalls::Custom(call) => {
            ToolCall { id: call.id, name: call.custom_tool.name, arguments: call.custom_tool.input }
        }
    });
    Ok(ChatAnswer {
        model: response.model,
        tool_calls: tool_calls.collect(),
        content: choice.message.content,
        refusal: choice.message.refusal,
        finish_reason: match choice.finish_reason {
            Some(ApiFinishReason::Stop) => FinishReason::Stop,
            Some(ApiFinishReason::Length) => FinishReason::Length,
            Some(ApiFinishReason::ToolCalls | ApiFinishReason::FunctionCall) => FinishReason::ToolCalls,
            Some(ApiFinishReason::ContentFilter) => FinishReason::ContentFilter,
            None => FinishReason::Other,
        },
        usage,
    })
}

/// An answer that bends the format, as far as it can be understood; else what it cost.
pub(super) fn lenient(raw: &str) -> Result<ChatAnswer, Option<Usage>> {
    let Ok(value) = serde_json::from_str::<Value>(raw) else { return Err(usage_in_fragment(raw)) };
    let usage = usage_of(&value);
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let Some(message) = value.pointer("/choices/0/message").filter(|message| message.is_object()) else {
        return Err(usage);
    };
    let tool_calls: Option<Vec<ToolCall>> = message
        .get("tool_calls")
        .and_then(Value::as_array)
        .map_or(&[][..], Vec::as_slice)
        .iter()
        .map(|call| {
            let arguments = call.pointer("/function/arguments")?;
            Some(ToolCall {
                id: call.get("id").and_then(text).unwrap_or_default(),
                name: call.pointer("/function/name").and_then(text)?,
                // Some servers send the arguments as an object.
                arguments: text(arguments).unwrap_or_else(|| arguments.to_string()),
            })
        })
        .collect();
    let (content, refusal) = (message.get("content").and_then(text), message.get("refusal").and_then(text));
    let tool_calls = tool_calls.ok_or(usage)?;
    if content.is_none() && refusal.is_none() && tool_calls.is_empty() {
        return Err(usage);
    }
    Ok(ChatAnswer {
        model: value.get("model").and_then(text).unwrap_or_default(),
        content,
        refusal,
        tool_calls,
        finish_reason: finish_reason(
            value.pointer("/choices/0/finish_reason").and_then(Value::as_str).unwrap_or_default(),
        ),
        usage,
    })
}

/// Why the model stopped, in the words of the API and in those of others.
pub(super) fn finish_reason(word: &str) -> FinishReason {
    match word {
        "stop" | "eos" | "end_turn" | "stop_sequence" => FinishReason::Stop,
        "length" | "max_tokens" => FinishReason::Length,
        "tool_calls" | "function_call" | "tool_use" => FinishReason::ToolCalls,
        "content_filter" => FinishReason::ContentFilter,
        _ => FinishReason::Other,
    }
}

/// Embeddings as the API defines them.
pub(super) fn typed_embeddings(
    response: CreateEmbeddingResponse,
    expected: usize,
) -> Result<Embeddings, Useless> {
    let usage = said(response.usage.prompt_tokens.into(), 0);
    let vectors = response.data.into_iter().map(|entry| (u64::from(entry.index), entry.embedding)).collect();
    checked(vectors, expected, usage)
}

/// Embeddings of servers that leave fields out.
pub(super) fn lenient_embeddings(raw: &str, expected: usize) -> Result<Embeddings, Useless> {
    let Ok(value) = serde_json::from_str::<Value>(raw) else {
        return Err(("it is not JSON", usage_in_fragment(raw)));
    };
    let usage = usage_of(&value);
    let Some(data) = value.get("data").and_then(Value::as_array) else {
        return Err(("it has no vectors", usage));
    };
    let vector = |(position, entry): (usize, &Value)| {
        #[expect(clippy::cast_possible_truncation, reason = "vectors are single precision")]
        let numbers: Option<Vec<f32>> = entry
            .get("embedding")?
            .as_array()?
            .iter()
            .map(|number| number.as_f64().map(|n| n as f32))
            .collect();
        Some((entry.get("index").and_then(Value::as_u64).unwrap_or(position as u64), numbers?))
    };
    match data.iter().enumerate().map(vector).collect() {
        Some(vectors) => checked(vectors, expected, usage),
        None => Err(("a vector is not a list of numbers", usage)),
    }
}

/// In order, as many as there were texts, all of one length, all finite.
fn checked(
    mut vectors: Vec<(u64, Vec<f32>)>,
    expected: usize,
    usage: Option<Usage>,
) -> Result<Embeddings, Useless> {
    vectors.sort_by_key(|(index, _)| *index);
    if vectors.len() != expected || vectors.iter().zip(0..).any(|((index, _), position)| *index != position) {
        return Err(("it does not have one vector for each text", usage));
    }
    let vectors: Vec<Vec<f32>> = vectors.into_iter().map(|(_, vector)| vector).collect();
    let size = vectors.first().map_or(0, Vec::len);
    if size == 0 || vectors.iter().any(|vector| vector.len() != size || !vector.iter().all(|n| n.is_finite()))
    {
        return Err(("its vectors are empty, of different lengths, or not numbers", usage));
    }
    Ok(Embeddings { vectors, usage })
}

pub(super) fn usage_of(value: &Value) -> Option<Usage> {
    let usage = value.get("usage")?;
    let completion = usage.get("completion_tokens").and_then(Value::as_u64).unwrap_or(0);
    said(usage.get("prompt_tokens")?.as_u64()?, completion)
}

/// The usage at the end of a broken text, if it is whole.
fn usage_in_fragment(raw: &str) -> Option<Usage> {
    let key = "\"usage\"";
    let rest = raw.get(raw.rfind(key)? + key.len()..)?.trim_start().strip_prefix(':')?;
    let usage: Value = serde_json::Deserializer::from_str(rest).into_iter().next()?.ok()?;
    usage_of(&serde_json::json!({ "usage": usage }))
}

/// Servers that do not count say zero; no prompt has no tokens.
fn said(prompt: u64, completion: u64) -> Option<Usage> {
    (prompt > 0).then_some(Usage { prompt: Tokens(prompt), completion: Tokens(completion) })
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn usage(prompt: u64, completion: u64) -> Usage {
        Usage { prompt: Tokens(prompt), completion: Tokens(completion) }
    }

    #[test]
    fn an_answer_with_words_of_its_own_is_still_an_answer() {
        let raw = json!({
            "choices": [{"finish_reason": "eos", "message": {"content": "hello",
                "tool_calls": [{"function": {"name": "search", "arguments": {"query": "x"}}}]}}],
            "usage": {"prompt_tokens": 7, "completion_tokens": 2},
        });
        let answer = lenient(&raw.to_string()).unwrap();
        assert_eq!(answer.content.as_deref(), Some("hello"));
        assert_eq!(answer.finish_reason, FinishReason::Stop);
        assert_eq!(answer.tool_calls[0].arguments, r#"{"query":"x"}"#);
        assert_eq!(answer.usage, Some(usage(7, 2)));
    }

    #[test]
    fn an_answer_of_no_use_still_says_what_it_cost() {
        let raw = r#"{"choices": "nonsense", "usage": {"prompt_tokens": 7, "completion_tokens": 2}}"#;
        assert_eq!(lenient(raw), Err(Some(usage(7, 2))));
        let broken =
            r#"{"choices": [{"message" {{{ , "usage": {"prompt_tokens": 7, "completion_tokens": 2}}"#;
        assert_eq!(lenient(broken), Err(Some(usage(7, 2))));
        assert_eq!(lenient(r#"{"choices": [], "usage": {"prompt_tok"#), Err(None));
        assert_eq!(lenient(r#"{"choices":[{"message":{}}],"usage":{"prompt_tokens":0}}"#), Err(None));
    }

    #[test]
    fn vectors_come_in_the_order_of_the_texts() {
        let raw =
            json!({"data": [{"index": 1, "embedding": [0.0, 1.0]}, {"index": 0, "embedding": [1.0, 0.0]}]});
        let embeddings = lenient_embeddings(&raw.to_string(), 2).unwrap();
        assert_eq!(embeddings.vectors, [[1.0, 0.0], [0.0, 1.0]]);
        assert_eq!(embeddings.usage, None);
    }

    #[test]
    fn vectors_that_do_not_fit_the_texts_are_refused() {
        for data in [
            json!([]),
            json!([{"index": 0, "embedding": [1.0]}]),
            json!([{"index": 0, "embedding": [1.0]}, {"index": 0, "embedding": [1.0]}]),
            json!([{"index": 0, "embedding": [1.0]}, {"index": 1, "embedding": [1.0, 2.0]}]),
            json!([{"index": 0, "embedding": []}, {"index": 1, "embedding": []}]),
            json!([{"index": 0, "embedding": [1e300]}, {"index": 1, "embedding": [1.0]}]),
            json!([{"index": 0, "embedding": "AAAA"}, {"index": 1, "embedding": "AAAA"}]),
        ] {
            let raw = json!({"data": data, "usage": {"prompt_tokens": 3}}).to_string();
            let (_, cost) = lenient_embeddings(&raw, 2).unwrap_err();
            assert_eq!(cost, Some(usage(3, 0)), "{raw}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_an_answer_or_not(raw in "\\PC*") {
            let _ = lenient(&raw);
            let _ = lenient(&format!("{{\"usage\":{raw}"));
            prop_assert!(lenient_embeddings(&raw, 1).is_err());
        }
    }
}
