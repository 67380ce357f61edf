//! Every way in which the simulator answers, through a whole worker: the best honest result within the
//! run's budget, and a ledger that agrees with the simulator's meter. One test an answer.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::needless_pass_by_value,
    reason = "tests"
)]

mod support;

use std::sync::Arc;

use atlas_shared::{
    gateway_api::{Passage, QueryChatRequest},
    message::{Answer, AnswerType},
};
use pulldown_cmark::{Event, Options, Parser, Tag};
use serde_json::{Value, json};
use support::Stack;

const REQUEST: &str = "Design the event bus of our billing platform. No event may be lost.";
/// `TOKEN_BUDGET_PER_RUN`'s default.
const RUN_LIMIT: u64 = 24_000;

/// What came of a request, after the checks that every scenario has in common.
struct Outcome {
    answer: Answer,
    /// What the simulator billed.
    billed: u64,
    metrics: String,
}

impl Outcome {
    fn markdown(&self) -> &str {
        assert_eq!(self.answer.msg_type, AnswerType::Spec, "{:?}", self.answer);
        self.answer.content.as_str().unwrap()
    }

    fn error_code(&self) -> &str {
        assert_eq!(self.answer.msg_type, AnswerType::Error, "{:?}", self.answer);
        self.answer.metadata["error_code"].as_str().unwrap()
    }

    fn meta(&self, name: &str) -> &Value {
        &self.answer.metadata[name]
    }
}

/// The books agree to the token, and within the run's limit.
async fn exactly(stack: Stack) -> Outcome {
    within(stack, |ledger, billed| {
        assert_eq!(ledger, billed, "ledger and meter");
        assert!(ledger <= RUN_LIMIT, "{ledger} tokens for one run");
    })
    .await
}

/// The server did not say what it billed: the ledger may say more, never less.
async fn at_most(stack: Stack) -> Outcome {
    within(stack, |ledger, billed| {
        assert!(ledger >= billed, "the ledger says {ledger}, {billed} were billed");
    })
    .await
}

async fn within(stack: Stack, check: impl Fn(u64, u64)) -> Outcome {
    let worker = stack.worker().await;
    let answer = stack.ask(REQUEST, json!({})).await;
    stack.assert_final(&answer).await;
    let (ledger, billed) = stack.books().await;
    check(ledger, billed);
    let metrics = worker.registry.render().unwrap();
    worker.drain().await;
    assert_eq!(answer.metadata["tokens"], ledger, "the answer says what the run cost");
    assert_eq!(accounted(&answer), ledger, "and where it went: {:?}", answer.metadata.get("token_use"));
    if answer.msg_type == AnswerType::Spec && answer.metadata.get("fallbacks").is_none() {
        let paid = steps(&answer).iter().any(|step| step.starts_with("repair"));
        assert_eq!(answer.metadata["repaired"], paid, "{:?}", steps(&answer));
    }
    Outcome { answer, billed, metrics }
}

/// What `token_use` adds up to.
fn accounted(answer: &Answer) -> u64 {
    let Some(token_use) = answer.metadata.get("token_use") else { return 0 };
    let tokens = |call: &Value| {
        let billed = call["prompt"].as_u64().unwrap() + call["completion"].as_u64().unwrap();
        billed + call["tokens"].as_u64().unwrap_or(0)
    };
    let calls: u64 = token_use["calls"].as_array().into_iter().flatten().map(tokens).sum();
    calls + token_use["lost"].as_u64().unwrap_or(0)
}

/// The calls that were answered.
fn steps(answer: &Answer) -> Vec<&str> {
    let calls = answer.metadata.get("token_use").and_then(|token_use| token_use["calls"].as_array());
    calls.into_iter().flatten().map(|call| call["step"].as_str().unwrap()).collect()
}

/// The fault strikes the first `times` calls.
fn fault(name: &str, times: u32) -> Value {
    json!([{"fault": name, "times": times}])
}

const ALWAYS: u32 = 1_000;

#[tokio::test]
async fn a_valid_answer_becomes_a_grounded_spec_in_one_call() {
    let done = exactly(Stack::start().await).await;
    assert!(done.markdown().starts_with("# Event bus of our billing platform\n"), "{}", done.markdown());
    assert_eq!(done.meta("repaired"), false);
    assert_eq!(done.meta("citations_invalid"), 0);
    assert_eq!(done.meta("citations").as_array().unwrap().len(), 2);
    let calls = done.meta("token_use")["calls"].as_array().unwrap();
    assert_eq!(calls.len(), 1);
    let prompt: u64 = done.meta("token_use")["prompt"]
        .as_object()
        .unwrap()
        .values()
        .map(|tokens| tokens.as_u64().unwrap())
        .sum();
    assert_eq!(calls[0]["prompt"], prompt, "the parts add up to the prompt");
    assert_eq!(calls[0]["prompt"].as_u64().unwrap() + calls[0]["completion"].as_u64().unwrap(), done.billed);
}

#[tokio::test]
async fn invalid_json_is_mended_in_the_repair_round() {
    let done = exactly(Stack::start().await.script(fault("invalid_json", 1))).await;
    assert_eq!(done.meta("repaired"), true);
    assert_eq!(done.meta("incomplete"), false, "{}", done.markdown());
}

#[tokio::test]
async fn invalid_json_twice_gives_what_could_be_read_and_says_so() {
    let done = exactly(Stack::start().await.script(fault("invalid_json", ALWAYS))).await;
    if done.answer.msg_type == AnswerType::Error {
        assert_eq!(done.error_code(), "invalid_answer");
    } else {
        assert_eq!(done.meta("incomplete"), true);
        assert!(done.markdown().starts_with("> **Note:**"), "{}", done.markdown());
    }
}

#[tokio::test]
async fn prose_instead_of_json_is_mended_in_the_repair_round() {
    let done = exactly(Stack::start().await.script(fault("not_json", 1))).await;
    assert_eq!(done.meta("repaired"), true);
    assert!(done.markdown().contains("## Decisions"));
}

#[tokio::test]
async fn prose_only_fails_and_names_the_settings_to_change() {
    let done = exactly(Stack::start().await.script(fault("not_json", ALWAYS))).await;
    assert_eq!(done.error_code(), "invalid_answer");
    assert!(done.answer.content.as_str().unwrap().contains("OPENAI_RESPONSE_FORMAT"));
}

#[tokio::test]
async fn a_wrong_schema_is_mended_or_fails() {
    let done = exactly(Stack::start().await.script(fault("wrong_schema", 1))).await;
    assert_eq!(done.meta("incomplete"), false, "{}", done.markdown());
    let done = exactly(Stack::start().await.script(fault("wrong_schema", ALWAYS))).await;
    assert_eq!(done.error_code(), "invalid_answer");
}

/// What a model without memory can mend: the simulator writes a field anew only where the prompt of the
/// repair holds the request, and cites only passages that it shows.
#[tokio::test]
async fn prose_of_which_nothing_can_be_used_is_written_anew_from_request_and_passages() {
    let done = exactly(Stack::start().await.script(json!([{"content": "Sure! Use Redis."}]))).await;
    assert_eq!(done.meta("repaired"), true);
    assert_eq!(done.meta("incomplete"), false, "{}", done.markdown());
    assert!(done.markdown().starts_with("# Event bus of our billing platform\n"), "{}", done.markdown());
    assert_eq!(done.meta("citations").as_array().unwrap().len(), 2);
    assert!(done.meta("token_use")["prompt"]["passages"].as_u64().unwrap() > 0);
}

#[tokio::test]
async fn missing_sections_are_written_from_request_and_passages() {
    let whole = exactly(Stack::start().await).await.answer.extra["spec"].clone();
    let mut thin = whole.clone();
    for field in ["decisions", "security"] {
        thin.as_object_mut().unwrap().remove(field).unwrap();
    }
    let done = exactly(Stack::start().await.script(json!([{"content": thin}]))).await;
    assert_eq!(done.meta("incomplete"), false, "{}", done.markdown());
    let spec = &done.answer.extra["spec"];
    assert!(
        !spec["decisions"].as_array().unwrap().is_empty() && !spec["security"].as_array().unwrap().is_empty()
    );
    assert_eq!(spec["context"], whole["context"], "what was right is kept");
}

#[tokio::test]
async fn changes_that_were_not_listed_are_listed_from_request_and_parent() {
    let stack = Stack::start().await;
    let worker = stack.worker().await;
    let parent = stack.ask(REQUEST, json!({})).await;
    let good = stack.ask("Use one topic per tenant", json!({"parent_id": parent.task_id})).await;
    let mut silent = good.extra["spec"].clone();
    silent["changes"] = json!([]);
    stack.sim.script(json!([{"content": silent}])).unwrap();
    let done = stack.ask("Use one topic per tenant", json!({"parent_id": parent.task_id})).await;
    assert_eq!(done.metadata["repaired"], true, "{done:?}");
    assert_eq!(done.metadata["incomplete"], false, "{done:?}");
    assert!(!done.extra["spec"]["changes"].as_array().unwrap().is_empty());
    worker.drain().await;
}

#[tokio::test]
async fn a_rich_draft_that_broke_off_is_kept_when_the_shorter_one_is_a_stub() {
    let whole = exactly(Stack::start().await).await.answer.extra["spec"].clone();
    let mut rich = serde_json::Map::new();
    for field in ["title", "summary", "context", "requirements", "components", "decisions", "deployment"] {
        rich.insert(field.to_owned(), whole[field].clone());
    }
    let text = Value::Object(rich).to_string();
    let cut = format!("{}, \"observability\": [{{\"text\": \"Count how", text.trim_end_matches('}'));
    let mut stub = whole.clone();
    for field in ["components", "decisions", "diagrams", "deployment", "scaling", "security"] {
        stub[field] = json!([]);
    }
    let script = json!([{"content": cut, "finish_reason": "length"}, {"content": stub}]);
    let done = exactly(Stack::start().await.script(script)).await;
    let spec = &done.answer.extra["spec"];
    assert_eq!(
        spec["decisions"].as_array().unwrap().len(),
        whole["decisions"].as_array().unwrap().len(),
        "{}",
        done.markdown()
    );
    assert!(done.markdown().contains("broke off at its length limit"), "{}", done.markdown());
}

#[tokio::test]
async fn a_truncated_answer_is_asked_for_again_shorter() {
    let done = exactly(Stack::start().await.script(fault("length", 1))).await;
    assert_eq!(done.meta("repair_reason"), "shorter");
    assert_eq!(done.meta("incomplete"), false, "{}", done.markdown());
}

#[tokio::test]
async fn an_answer_that_is_truncated_again_is_kept_as_far_as_it_goes() {
    let done = exactly(Stack::start().await.script(fault("length", ALWAYS))).await;
    assert!(done.markdown().contains("broke off at its length limit"), "{}", done.markdown());
    assert_eq!(done.meta("incomplete"), true);
}

#[tokio::test]
async fn citations_of_passages_that_were_not_given_are_removed_and_counted() {
    let done = exactly(Stack::start().await.script(fault("bad_citations", ALWAYS))).await;
    assert!(done.meta("citations_invalid").as_u64().unwrap() > 3);
    assert_eq!(done.meta("citations"), &json!([]));
    assert!(!done.markdown().contains("[9001]") && !done.markdown().contains("[9002]"));
    assert!(done.markdown().contains("*(general knowledge)*"));
    assert!(done.metrics.contains("atlas_citations_invalid_total"));
}

#[tokio::test]
async fn a_hostile_answer_is_made_harmless() {
    let done = exactly(Stack::start().await.script(fault("hostile", ALWAYS))).await;
    let markdown = done.markdown();
    for bad in ["<script", "<img", "<b>", "javascript:", "click a"] {
        assert!(!markdown.contains(bad), "{bad} in {markdown}");
    }
    for event in Parser::new_ext(markdown, Options::all()) {
        let foreign = matches!(
            event,
            Event::Html(_)
                | Event::InlineHtml(_)
                | Event::Start(Tag::Link { .. } | Tag::Image { .. } | Tag::HtmlBlock)
        );
        assert!(!foreign, "{event:?} in {markdown}");
    }
    assert_eq!(markdown.matches("\n## Sources\n").count(), 1, "the forged one is text");
    assert!(!markdown.contains("sk-test-key"));
}

#[tokio::test]
async fn a_refusal_fails_with_the_models_words() {
    let done = exactly(Stack::start().await.script(fault("refusal", ALWAYS))).await;
    assert_eq!(done.error_code(), "model_refused");
    assert!(done.answer.content.as_str().unwrap().contains("can't help"));
    assert!(done.billed > 0);
}

#[tokio::test]
async fn a_refusal_is_taken_to_the_next_model_with_the_reason() {
    for fault_name in ["refusal", "filtered"] {
        let stack = Stack::start().await.with("OPENAI_FALLBACK_MODELS", "gpt-4.1-mini");
        let done = exactly(stack.script(fault(fault_name, 1))).await;
        assert!(done.markdown().contains("## Decisions"));
        assert_eq!(done.meta("model"), "gpt-4.1-mini");
        let reasons = done.meta("fallbacks").as_array().unwrap();
        assert_eq!(reasons.len(), 1, "{reasons:?}");
        let why = if fault_name == "refusal" { "can't help" } else { "content filter" };
        assert!(reasons[0].as_str().unwrap().starts_with("gpt-4.1: "), "{reasons:?}");
        assert!(reasons[0].as_str().unwrap().contains(why), "{reasons:?}");
        let calls = done.meta("token_use")["calls"].as_array().unwrap();
        let steps: Vec<&str> = calls.iter().map(|call| call["step"].as_str().unwrap()).collect();
        assert_eq!(steps, ["draft.0", "draft.0.other.1"], "the refusal was paid, and is in the books");
    }
}

#[tokio::test]
async fn a_refused_repair_goes_to_the_next_model_too() {
    let stack = Stack::start().await.with("OPENAI_FALLBACK_MODELS", "gpt-4.1-mini");
    let done = exactly(stack.script(json!([{"fault": "broken_mermaid"}, {"fault": "refusal"}]))).await;
    assert_eq!(done.meta("diagrams_broken"), 0, "{}", done.markdown());
    assert_eq!(done.meta("token_use")["calls"][2]["step"], "repair.0.other.1");
}

#[tokio::test]
async fn a_document_that_every_model_refuses_fails_with_all_reasons() {
    let stack = Stack::start().await.with("OPENAI_FALLBACK_MODELS", "gpt-4.1-mini,gpt-4o");
    let done = exactly(stack.script(fault("refusal", ALWAYS))).await;
    assert_eq!(done.error_code(), "model_refused");
    assert_eq!(done.meta("fallbacks").as_array().unwrap().len(), 2);
    assert_eq!(done.meta("model"), "gpt-4o", "the last one that was asked");
}

#[tokio::test]
async fn a_fallback_whose_tokens_are_counted_otherwise_gets_a_prompt_that_fits() {
    // Nobody knows its tokenizer, so each byte may be a token: the first prompt is too large for it.
    let passages = |request: &QueryChatRequest| {
        let collection = request.collection.clone().unwrap_or_default();
        let text = |n: u32| (0..500).map(|word| format!("part{n}word{word}")).collect::<Vec<_>>().join(" ");
        (0..6).map(|n| Passage::of_lines(&collection, &format!("docs/{n}.md"), 1, &text(n))).collect()
    };
    let stack = Stack::with_search(Arc::new(passages)).await;
    let stack = stack.with("OPENAI_FALLBACK_MODELS", "sim-unknown").with("TOKEN_BUDGET_PER_RUN", "30000");
    let stack = stack.script(json!([{"fault": "404", "times": 2}]));
    let worker = stack.worker().await;
    let answer = stack.ask(REQUEST, json!({})).await;
    assert_eq!(answer.metadata["model"], "sim-unknown", "{answer:?}");
    assert!(answer.metadata["passages_left_out"].as_u64().unwrap() > 0, "{answer:?}");
    let (ledger, billed) = stack.books().await;
    assert_eq!(ledger, billed);
    worker.drain().await;
}

#[tokio::test]
async fn an_empty_answer_is_asked_for_once_more() {
    let done = exactly(Stack::start().await.script(fault("empty", 1))).await;
    assert_eq!(done.meta("repair_reason"), "empty");
    let done = exactly(Stack::start().await.script(fault("empty", ALWAYS))).await;
    assert_eq!(done.error_code(), "empty_answer");
}

/// Two fallbacks, and a first model whose answers are of no use, twice.
#[tokio::test]
async fn a_model_that_is_of_no_use_twice_is_given_up_for_the_next() {
    for (fault_name, times, steps_before, why) in [
        ("empty", 2, 2, "gave an empty answer, twice"),
        ("tool_loop", 5, 5, "asked for searches that were not on offer"),
        ("not_json", 2, 2, "did not give a document"),
    ] {
        let stack = Stack::start().await.with("OPENAI_FALLBACK_MODELS", "gpt-4.1-mini,gpt-4o");
        let stack = stack.with("TOKEN_BUDGET_PER_RUN", "60000");
        let done = within(stack.script(fault(fault_name, times)), |ledger, billed| {
            assert_eq!(ledger, billed);
        })
        .await;
        assert_eq!(done.meta("incomplete"), false, "{}", done.markdown());
        assert_eq!(done.meta("model"), "gpt-4.1-mini");
        let reasons = done.meta("fallbacks").as_array().unwrap();
        assert_eq!(reasons.len(), 1, "{reasons:?}");
        let reason = reasons[0].as_str().unwrap();
        assert!(reason.starts_with("gpt-4.1: ") && reason.contains(why), "{reason}");
        let token_use = &done.meta("token_use")["calls"];
        assert_eq!(token_use.as_array().unwrap().len(), steps_before + 1, "{token_use}");
    }
}

#[tokio::test]
async fn when_no_model_is_of_use_the_error_says_what_happened() {
    let stack = Stack::start().await.with("OPENAI_FALLBACK_MODELS", "gpt-4.1-mini");
    let stack = stack.with("TOKEN_BUDGET_PER_RUN", "60000").script(fault("tool_loop", ALWAYS));
    let done = within(stack, |ledger, billed| assert_eq!(ledger, billed)).await;
    assert_eq!(done.error_code(), "empty_answer");
    let message = done.answer.content.as_str().unwrap();
    assert!(message.starts_with("None of the 2 models that were asked wrote a document"), "{message}");
    assert!(message.contains("searches that were not on offer") && !message.contains("empty"), "{message}");
    assert_eq!(done.meta("fallbacks").as_array().unwrap().len(), 1);
}

#[tokio::test]
async fn a_next_model_that_cannot_be_paid_is_named_besides_what_the_first_one_did() {
    let stack = Stack::start().await.with("OPENAI_FALLBACK_MODELS", "gpt-4.1-mini");
    let done = exactly(stack.with("TOKEN_BUDGET_PER_RUN", "5000").script(fault("empty", ALWAYS))).await;
    let message = done.answer.content.as_str().unwrap();
    assert_eq!(done.error_code(), "empty_answer", "{message}");
    assert!(
        message.contains("gave an empty answer, twice") && message.contains("Raise TOKEN_BUDGET_PER_RUN"),
        "{message}"
    );
}

#[tokio::test]
async fn a_repair_that_cannot_be_paid_is_not_called_one() {
    let stack = Stack::start().await.with("TOKEN_BUDGET_PER_RUN", "7000").script(fault("endless", ALWAYS));
    let done = exactly(stack).await;
    assert_eq!(steps(&done.answer), ["draft.0"]);
    assert_eq!(done.meta("repaired"), false);
    assert!(!done.markdown().contains("one repair"), "{}", done.markdown());
    assert!(done.markdown().contains("could not be made"), "{}", done.markdown());
}

/// Fifteen passages of the longest that the gateway gives (`RAG_TOP_K`, `PASSAGE_TOKENS`).
fn as_much_as_is_found(request: &QueryChatRequest) -> Vec<Passage> {
    let collection = request.collection.clone().unwrap_or_default();
    let text = |n: u32| (0..100).map(|word| format!("part{n}word{word}")).collect::<Vec<_>>().join(" ");
    (0..15).map(|n| Passage::of_lines(&collection, &format!("docs/{n}.md"), 1, &text(n))).collect()
}

#[tokio::test]
async fn the_default_limit_leaves_room_for_a_search_beside_all_that_was_found() {
    let search = json!([{"tool_calls": [{"arguments": {"query": "dead letters"}}]}]);
    let stack = Stack::with_search(Arc::new(as_much_as_is_found)).await.script(search.clone());
    let done = exactly(stack).await;
    assert_eq!(done.meta("searches"), 1, "{:?}", done.answer.metadata);
    assert_eq!(done.meta("passages_left_out"), 0);
    assert_eq!(done.meta("incomplete"), false);
    let why = done.meta("search_left_out").as_str().unwrap();
    assert!(why.contains("no room for another search"), "{why}");

    let stack = Stack::with_search(Arc::new(as_much_as_is_found)).await;
    let done = exactly(stack.with("TOKEN_BUDGET_PER_RUN", "12000")).await;
    assert_eq!(done.meta("searches"), 0);
    let why = done.meta("search_left_out").as_str().unwrap();
    assert!(why.contains("TOKEN_BUDGET_PER_RUN"), "{why}");
}

#[tokio::test]
async fn the_default_limit_leaves_room_for_a_second_try_after_a_lost_answer() {
    for lost in ["truncated", "drop"] {
        let stack = Stack::with_search(Arc::new(as_much_as_is_found)).await.script(fault(lost, 1));
        let done = at_most(stack).await;
        assert!(done.markdown().contains("## Decisions"));
        assert!(done.meta("token_use")["lost"].as_u64().unwrap() > 4_000, "{:?}", done.meta("token_use"));
    }
}

#[tokio::test]
async fn an_answer_of_50_000_tokens_is_stopped_by_the_cap_and_asked_for_again_shorter() {
    let done = exactly(Stack::start().await.script(fault("endless", 1))).await;
    assert_eq!(done.meta("repair_reason"), "shorter");
    assert_eq!(done.meta("incomplete"), false, "{}", done.markdown());
}

#[tokio::test]
async fn a_model_that_never_comes_to_an_end_gives_what_fits_the_budget() {
    let done = exactly(Stack::start().await.script(fault("endless", ALWAYS))).await;
    assert!(done.markdown().contains("broke off at its length limit"), "{}", done.markdown());
}

#[tokio::test]
async fn a_server_that_ignores_the_cap_is_booked_in_full_and_counted() {
    // No reservation can foresee it. The run ends with what it got; nothing more is bought.
    let stack = Stack::start().await.script(fault("ignores_cap", ALWAYS));
    let done = within(stack, |ledger, billed| {
        assert_eq!(ledger, billed);
        assert!(billed > 50_000);
    })
    .await;
    assert!(done.markdown().starts_with("> **Note:**"), "{}", done.markdown());
    assert!(done.markdown().len() < 200_000, "the document is bounded");
    assert!(done.metrics.contains("overrun"), "{}", done.metrics);
}

/// What one odd bill teaches a worker must not make all that comes after it too dear.
#[tokio::test]
async fn requests_after_an_odd_bill_are_answered_all_the_same() {
    for odd in ["ignores_cap", "overbill"] {
        let stack = Stack::start().await.script(fault(odd, 1));
        let worker = stack.worker().await;
        let mut answers = Vec::new();
        for n in 0..3 {
            answers.push(stack.ask(&format!("{REQUEST} {n}"), json!({})).await);
        }
        for answer in answers {
            assert_eq!(answer.msg_type, AnswerType::Spec, "after {odd}: {answer:?}");
        }
        worker.drain().await;
    }
}

#[tokio::test]
async fn a_tool_loop_that_never_ends_is_ended() {
    let stack = Stack::start().await.script(fault("tool_loop", ALWAYS));
    let done = exactly(stack).await;
    assert_eq!(done.error_code(), "empty_answer");
}

#[tokio::test]
async fn a_model_that_searches_too_long_still_writes_when_it_is_told_to() {
    let done = exactly(Stack::start().await.script(fault("tool_loop", 4))).await;
    assert_eq!(done.meta("searches"), 3);
    assert_eq!(done.meta("repair_reason"), "no_tools");
    assert_eq!(done.meta("incomplete"), false);
}

#[tokio::test]
async fn a_broken_diagram_is_mended() {
    let done = exactly(Stack::start().await.script(fault("broken_mermaid", 1))).await;
    assert_eq!(done.meta("diagrams_broken"), 0);
    assert!(done.markdown().contains("```mermaid"));
}

#[tokio::test]
async fn a_diagram_that_stays_broken_is_shown_as_text_with_a_note() {
    let done = exactly(Stack::start().await.script(fault("broken_mermaid", ALWAYS))).await;
    assert_eq!(done.meta("diagrams_broken"), 1);
    assert!(
        done.markdown().contains("this diagram is outside the subset of Mermaid that Atlas checks (line "),
        "{}",
        done.markdown()
    );
    assert!(!done.markdown().contains("```mermaid"));
}

#[tokio::test]
async fn a_sloppy_answer_keeps_its_faults_in_sight() {
    let done = exactly(Stack::start().await.script(fault("sloppy", ALWAYS))).await;
    assert_eq!(done.meta("incomplete"), true);
    assert!(done.markdown().starts_with("> **Note:** The model's answer had faults"), "{}", done.markdown());
}

#[tokio::test]
async fn an_answer_stopped_by_a_content_filter_fails_with_that_reason() {
    let done = exactly(Stack::start().await.script(fault("filtered", ALWAYS))).await;
    assert_eq!(done.error_code(), "content_filter");
    assert!(done.billed > 0);
}

#[tokio::test]
async fn a_request_that_a_content_filter_refuses_costs_nothing() {
    let done = exactly(Stack::start().await.script(fault("content_filter", ALWAYS))).await;
    assert_eq!(done.error_code(), "content_policy");
    assert_eq!(done.billed, 0);
}

#[tokio::test]
async fn a_context_overflow_is_answered_with_a_smaller_prompt() {
    let done = exactly(Stack::start().await.script(fault("context_length", 2))).await;
    assert!(done.markdown().contains("## Decisions"));
    let reasons = done.meta("fallbacks").as_array().unwrap();
    assert_eq!(reasons.len(), 2, "{reasons:?}");
    assert!(reasons[0].as_str().unwrap().contains("context"), "{reasons:?}");
}

#[tokio::test]
async fn a_context_too_small_for_any_prompt_fails_and_says_so() {
    let done = exactly(Stack::start().await.script(fault("context_length", ALWAYS))).await;
    assert_eq!(done.error_code(), "context_length_exceeded");
    assert_eq!(done.billed, 0);
}

#[tokio::test]
async fn an_answer_that_is_no_json_at_all_is_booked_as_spent_and_tried_again() {
    let done =
        at_most(Stack::start().await.with("TOKEN_BUDGET_PER_RUN", "40000").script(fault("malformed", 1)))
            .await;
    assert!(done.markdown().contains("## Decisions"));
}

#[tokio::test]
async fn an_answer_without_choices_says_what_it_cost_and_is_tried_again() {
    let done =
        at_most(Stack::start().await.with("TOKEN_BUDGET_PER_RUN", "40000").script(fault("no_choices", 1)))
            .await;
    assert!(done.markdown().contains("## Decisions"));
    let written = done.meta("token_use")["calls"].as_array().map(Vec::len);
    assert_eq!(written, Some(1), "the useless call is in the bill, not among those that wrote the document");
}

#[tokio::test]
async fn an_answer_that_does_not_say_what_it_cost_is_booked_at_its_bound() {
    let done = at_most(Stack::start().await.script(fault("no_usage", 1))).await;
    assert!(done.markdown().contains("## Decisions"));
    let token_use = done.meta("token_use");
    let call = &token_use["calls"][0];
    assert_eq!((&call["assumed"], &call["tokens"]), (&json!(true), done.meta("tokens")));
    assert_eq!((&call["prompt"], &call["completion"]), (&json!(0), &json!(0)), "nobody knows its parts");
    assert_eq!(token_use["prompt"], json!({}), "nor what they were spent on");
}

#[tokio::test]
async fn a_cut_answer_is_booked_as_spent_and_tried_again() {
    let done =
        at_most(Stack::start().await.with("TOKEN_BUDGET_PER_RUN", "40000").script(fault("cut", 1))).await;
    assert!(done.markdown().contains("## Decisions"));
}

#[tokio::test]
async fn a_bill_above_the_reservation_is_booked_in_full() {
    let stack = Stack::start().await.script(fault("overbill", 1));
    let done = within(stack, |ledger, billed| assert_eq!(ledger, billed)).await;
    assert!(done.markdown().contains("## Decisions"));
}

#[tokio::test]
async fn a_bad_request_fails_for_good_without_a_bill() {
    let done = exactly(Stack::start().await.script(fault("400", ALWAYS))).await;
    assert_eq!(done.error_code(), "invalid_request");
    assert_eq!(done.billed, 0);
}

#[tokio::test]
async fn throttling_and_server_errors_are_waited_out() {
    let steps = json!([{"fault": "429", "retry_after": 0.01}, {"fault": "500"}, {"fault": "503", "retry_after": 0.01}]);
    let done = exactly(Stack::start().await.with("CIRCUIT_FAILURES", "100").script(steps)).await;
    assert!(done.markdown().contains("## Decisions"));
}

#[tokio::test]
async fn long_requests_and_long_parents_are_squeezed_not_refused() {
    let stack = Stack::start().await;
    let worker = stack.worker().await;
    let long = format!("{REQUEST} {}", "It has many more wishes than fit. ".repeat(6_000));
    let parent = stack.ask(&long, json!({})).await;
    assert_eq!(parent.msg_type, AnswerType::Spec, "{parent:?}");
    assert!(parent.content.as_str().unwrap().contains("its middle was left out"));

    let child = stack.ask("Use one topic per tenant", json!({"parent_id": parent.task_id})).await;
    assert_eq!(child.msg_type, AnswerType::Spec, "{child:?}");
    assert_eq!(child.metadata["kind"], "refine");
    assert_eq!([&parent.metadata["kind_from"], &child.metadata["kind_from"]], ["request", "metadata"]);
    assert!(child.content.as_str().unwrap().contains("## What changed"));
    let (ledger, meter) = stack.books().await;
    assert_eq!(ledger, meter);
    assert!(child.metadata["token_use"]["prompt"]["parent"].as_u64().unwrap() > 0);
    worker.drain().await;
}

#[tokio::test]
async fn a_refinement_of_nothing_fails_before_anything_is_paid() {
    let stack = Stack::start().await;
    let worker = stack.worker().await;
    for (metadata, code) in [
        (json!({"parent_id": "11111111-1111-4111-8111-111111111111"}), "parent_not_found"),
        (json!({"kind": "refine"}), "parent_required"),
    ] {
        let answer = stack.ask(REQUEST, metadata).await;
        assert_eq!(answer.msg_type, AnswerType::Error, "{answer:?}");
        assert_eq!(answer.metadata["error_code"], code);
        stack.assert_final(&answer).await;
    }
    assert_eq!(stack.books().await, (0, 0));
    worker.drain().await;
}

#[tokio::test]
async fn a_deadline_stops_a_call_under_way_and_books_it() {
    let stack = Stack::start().await.script(fault("hang", 1));
    let worker = stack.worker().await;
    let deadline = jiff::Timestamp::now() + jiff::SignedDuration::from_secs(2);
    let answer = stack.ask(REQUEST, json!({"deadline": deadline.to_string()})).await;
    assert_eq!(answer.metadata["error_code"], "deadline_exceeded", "{answer:?}");
    stack.assert_final(&answer).await;
    let (ledger, billed) = stack.books().await;
    assert!(ledger >= billed && billed > 0, "the call that was in flight is booked as spent");
    assert_eq!(answer.metadata["tokens"], ledger, "and its requester is told");
    assert_eq!(accounted(&answer), ledger);
    worker.drain().await;
}

#[tokio::test]
async fn watchers_are_told_what_a_second_call_is_for() {
    for (script, told) in [
        (fault("empty", 1), "The answer was empty"),
        (fault("length", 1), "The answer was cut off"),
        (fault("tool_loop", 4), "The model asked for more searches"),
        (fault("broken_mermaid", 1), "The answer has faults"),
    ] {
        let stack = Stack::start().await.script(script);
        let worker = stack.worker().await;
        let messages = stack.messages(REQUEST, json!({})).await;
        let repairs: Vec<&str> = messages
            .iter()
            .filter(|message| message.metadata.get("stage").is_some_and(|stage| stage == "repairing"))
            .map(|message| message.content.as_str().unwrap())
            .collect();
        assert!(repairs.len() == 1 && repairs[0].starts_with(told), "{told}: {repairs:?}");
        worker.drain().await;
    }
}

#[tokio::test]
async fn a_cancelled_request_stops_during_its_call_and_books_it() {
    let stack = Stack::start().await.with("LEASE_SECONDS", "3600").script(fault("hang", 1));
    let worker = stack.worker().await;
    let task = atlas_shared::TaskId::random();
    let config = stack.config();
    let mut answers = atlas_worker::queue::watch_answers(&config, task).await.unwrap();
    stack
        .publish(&json!({"task_id": task, "role": "architect", "msg_type": "chat", "content": REQUEST, "metadata": {}}))
        .await;
    let last = support::bounded(
        "the end of a cancelled request",
        Box::pin(async {
            let mut asked = false;
            loop {
                // Once the call is in flight; looked at whenever something is said about the task.
                let answer = tokio::time::timeout(std::time::Duration::from_millis(50), answers.next()).await;
                if !asked && stack.sim.meter().calls() > 0 {
                    asked = true;
                    let command = json!({"command": "cancel", "task_id": task});
                    stack
                        .publish(&json!({"role": "architect", "msg_type": "control", "content": command}))
                        .await;
                }
                if let Ok(answer) = answer {
                    let answer = answer.unwrap();
                    if answer.msg_type == AnswerType::Error {
                        return answer;
                    }
                }
            }
        }),
    )
    .await;
    assert_eq!(last.metadata["error_code"], "cancelled", "{last:?}");
    let (ledger, billed) = stack.books().await;
    assert!(ledger >= billed && billed > 0, "the call that was in flight is booked as spent");
    assert_eq!(last.metadata["tokens"], ledger, "and its requester is told");
    worker.drain().await;
}
