//! Upper bounds of what a call can bill for its prompt: what is reserved must never be less.
//!
//! With a known tokenizer: every text of the request, the schema and the tools, counted exactly, plus
//! what the API adds around messages, plus a margin for what it does not publish (how it words
//! schemas and tools). Without: bytes instead of tokens.
//!
//! The margin starts small and is per model. A model that once billed more than its bound gets a
//! margin under which it would not have, so that the same surprise does not come twice. It shrinks again
//! with time: one odd answer must not make every later request too dear for its budget.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

use crate::{
    Tokens,
    ledger::Usage,
    model::{ChatMessage, ChatRequest, ResponseFormat, ToolCall},
    tokenizer,
};

/// Around each message: start, role, separators (three or four, by OpenAI's cookbook), rounded up.
const PER_MESSAGE: u64 = 5;
/// Around each tool, schema or tool call: wording that the API adds.
const PER_PART: u64 = 16;
/// The start of the answer, and a system message that some servers put in front of their own.
const PER_REQUEST: u64 = 8;
const PER_REQUEST_UNKNOWN: u64 = 96;
/// The margin of a model that never surprised us, in thousandths.
const FIRST_MARGIN: u64 = 30;
/// Added to what a surprise shows to be needed.
const EXTRA_MARGIN: u64 = 20;
/// Ten times the count: something else is wrong then.
const LAST_MARGIN: u64 = 9_000;
/// The most that an answer longer than its cap adds. No count of the prompt can foresee such a server, and a
/// larger margin would only leave no room for any prompt.
const LAST_MARGIN_FOR_ANSWERS: u64 = 1_000;
/// After so long without a surprise the margin is half of what it was.
const HALVED_AFTER: Duration = Duration::from_mins(10);
/// Requests may name any model, so what is remembered is bounded.
const MAX_MODELS: usize = 256;

/// The margins of models that billed more than their bound.
#[derive(Debug, Default)]
pub(super) struct Margins(Mutex<HashMap<String, Margin>>);

#[derive(Clone, Copy, Debug)]
struct Margin {
    /// In thousandths of the count.
    permille: u64,
    /// When it was raised.
    at: Instant,
}

impl Margins {
    pub(super) fn prompt_tokens(&self, model: &str, request: &ChatRequest) -> Tokens {
        Tokens(with_margin(counted(model, request), self.margin(model)))
    }

    /// A call billed more than was reserved: its prompt's bound and its cap. What the prompt billed says by
    /// how much its bound was too small; doubling makes sure that few surprises are enough. A longer
    /// answer than the cap allows says little about the next one.
    pub(super) fn note_overrun(&self, request: &ChatRequest, reserved: Tokens, billed: Usage) {
        if billed.total() <= reserved {
            return;
        }
        let model = &request.model;
        let old = self.margin(model);
        let needed = |billed: Tokens, bound: Tokens| {
            (1000 + old).saturating_mul(billed.0).div_ceil(bound.0.max(1)).saturating_sub(1000) + EXTRA_MARGIN
        };
        let bound = reserved.saturating_sub(Tokens(u64::from(request.max_completion_tokens)));
        let for_the_answer = needed(billed.total(), reserved).min(LAST_MARGIN_FOR_ANSWERS);
        let for_the_prompt =
            if billed.prompt > bound { needed(billed.prompt, bound).max(old * 2) } else { 0 };
        let new = for_the_prompt.max(for_the_answer).max(old).min(LAST_MARGIN);
        tracing::warn!(
            model,
            billed_tokens = billed.total().0,
            billed_prompt_tokens = billed.prompt.0,
            reserved_tokens = reserved.0,
            margin_permille = new,
            "a call billed more than was reserved; the model's margin is raised"
        );
        let mut margins = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if margins.len() < MAX_MODELS || margins.contains_key(model) {
            margins.insert(model.clone(), Margin { permille: new, at: Instant::now() });
        }
    }

    fn margin(&self, model: &str) -> u64 {
        let margins = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(Margin { permille, at }) = margins.get(model) else { return FIRST_MARGIN };
        let halvings = at.elapsed().as_secs() / HALVED_AFTER.as_secs();
        u32::try_from(halvings)
            .ok()
            .and_then(|times| permille.checked_shr(times))
            .unwrap_or(0)
            .max(FIRST_MARGIN)
    }
}

fn with_margin(counted: u64, permille: u64) -> u64 {
    counted.saturating_add(counted.saturating_mul(permille).div_ceil(1000))
}

/// The request without its margin.
fn counted(model: &str, request: &ChatRequest) -> u64 {
    let count = |text: &str| tokenizer::count(model, text).tokens;
    let call =
        |ToolCall { id, name, arguments }: &ToolCall| PER_PART + count(id) + count(name) + count(arguments);
    let messages: u64 = request
        .messages
        .iter()
        .map(|message| {
            PER_MESSAGE
                + match message {
                    ChatMessage::System { content } | ChatMessage::User { content } => count(content),
                    ChatMessage::Assistant { content, tool_calls } => {
                        content.as_deref().map_or(0, count) + tool_calls.iter().map(call).sum::<u64>()
                    }
                    ChatMessage::Tool { tool_call_id, content } => {
                        PER_PART + count(tool_call_id) + count(content)
                    }
                }
        })
        .sum();
    let format = match &request.response_format {
        ResponseFormat::Text => 0,
        ResponseFormat::JsonObject => PER_PART,
        ResponseFormat::JsonSchema { name, schema } => 2 * PER_PART + count(name) + count(schema.text()),
    };
    let tools: u64 = request
        .tools
        .iter()
        .map(|tool| {
            PER_PART + count(&tool.name) + count(&tool.description) + count(&tool.parameters.to_string())
        })
        .sum();
    let around = if tokenizer::is_known(model) { PER_REQUEST } else { PER_REQUEST_UNKNOWN };
    around + messages + format + tools
}

/// An upper bound of what embedding `texts` bills. OpenAI bills exactly the tokens of the texts;
/// other models add a few around each.
pub(super) fn embedding_tokens(model: &str, texts: &[String]) -> Tokens {
    let around = if tokenizer::is_known(model) { 1 } else { PER_PART };
    Tokens(texts.iter().map(|text| around + tokenizer::count(model, text).tokens).sum())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn request(model: &str, text: &str) -> ChatRequest {
        ChatRequest {
            model: model.to_owned(),
            messages: vec![ChatMessage::User { content: text.to_owned() }],
            max_completion_tokens: 10,
            response_format: ResponseFormat::JsonSchema {
                name: "s".to_owned(),
                schema: json!({"type": "object"}).into(),
            },
            tools: Vec::new(),
            request_id: "r".to_owned(),
        }
    }

    #[test]
    fn a_bound_is_tight_for_known_models_and_bytes_for_others() {
        let text = "the quick brown fox ".repeat(500);
        let known = Margins::default().prompt_tokens("gpt-4.1", &request("gpt-4.1", &text)).0;
        let exact = tokenizer::count("gpt-4.1", &text).tokens;
        assert!(known > exact && known < exact * 11 / 10, "{known} for {exact} tokens");
        let unknown = Margins::default().prompt_tokens("llama-3", &request("llama-3", &text)).0;
        assert!(unknown > text.len() as u64);
    }

    /// What a call with this prompt's bound, and the cap of [`request`], billed.
    fn note(margins: &Margins, request: &ChatRequest, bound: Tokens, prompt: u64, completion: u64) {
        let reserved = bound + Tokens(u64::from(request.max_completion_tokens));
        let billed = Usage { prompt: Tokens(prompt), completion: Tokens(completion) };
        margins.note_overrun(request, reserved, billed);
    }

    #[test]
    fn a_surprise_does_not_come_twice() {
        let margins = Margins::default();
        let request = request("gpt-4.1", &"word ".repeat(1000));
        let before = margins.prompt_tokens(&request.model, &request);
        note(&margins, &request, before, before.0, 10);
        assert_eq!(
            margins.prompt_tokens(&request.model, &request),
            before,
            "exactly the reservation is no overrun"
        );
        let billed = before.0 * 3 / 2;
        note(&margins, &request, before, billed, 10);
        let after = margins.prompt_tokens(&request.model, &request);
        assert!(after.0 >= billed, "{after}");
        note(&margins, &request, after, after.0 + 1, 10);
        assert!(
            margins.prompt_tokens(&request.model, &request) >= after + Tokens(1),
            "a surprise never lowers it"
        );
        note(&margins, &request, Tokens(0), u64::MAX / 2, 10);
        assert!(
            margins.prompt_tokens(&request.model, &request).0 <= before.0 * 10,
            "nor does it grow without bound"
        );
        assert_eq!(
            Margins::default().prompt_tokens(&request.model, &request),
            before,
            "and is nobody else's"
        );
    }

    /// A server that ignored a cap once billed ten reservations. If prompts then counted ten times, none
    /// would fit into any run's budget, and every later request would fail.
    #[test]
    fn an_answer_that_ignores_its_cap_leaves_room_for_later_prompts() {
        let margins = Margins::default();
        let request = request("gpt-4.1", &"word ".repeat(1000));
        let before = margins.prompt_tokens(&request.model, &request);
        for _ in 0..5 {
            note(&margins, &request, margins.prompt_tokens(&request.model, &request), before.0, 100_000);
        }
        let after = margins.prompt_tokens(&request.model, &request);
        assert!(after > before && after.0 <= before.0 * 2, "{before} {after}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_margin_shrinks_again_when_nothing_more_surprises() {
        let margins = Margins::default();
        let request = request("gpt-4.1", &"word ".repeat(1000));
        let before = margins.prompt_tokens(&request.model, &request);
        note(&margins, &request, before, before.0 * 9, 10);
        let mut last = margins.prompt_tokens(&request.model, &request);
        assert!(last.0 >= before.0 * 9);
        while last > before {
            tokio::time::advance(HALVED_AFTER).await;
            let now = margins.prompt_tokens(&request.model, &request);
            assert!(now < last, "{now} {last}");
            last = now;
        }
        assert_eq!(last, before);
        tokio::time::advance(HALVED_AFTER * 1000).await;
        assert_eq!(margins.prompt_tokens(&request.model, &request), before);
    }

    #[test]
    fn embeddings_are_bounded() {
        let texts = vec!["hello world".to_owned(), "x".to_owned()];
        assert_eq!(embedding_tokens("text-embedding-3-small", &texts), Tokens(2 + 1 + 2));
        assert!(embedding_tokens("e5", &texts).0 > 12);
    }

    proptest! {
        #[test]
        fn the_bound_grows_with_the_request(text in "\\PC{0,100}", more in "\\PC{1,50}") {
            for model in ["gpt-4.1", "llama-3"] {
                let bound = |messages: Vec<ChatMessage>| {
                    Margins::default().prompt_tokens(model, &ChatRequest { messages, ..request(model, "") }).0
                };
                let one = ChatMessage::User { content: text.clone() };
                let two = ChatMessage::System { content: more.clone() };
                prop_assert!(bound(vec![one.clone(), two]) > bound(vec![one]));
            }
        }
    }
}
