//! Text while it is written, from the model's stream to the topic of answers: readable, bounded, only
//! for who asks, and billed to the token like any other answer.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::needless_pass_by_value,
    reason = "tests"
)]

mod support;

use atlas_shared::message::{Answer, AnswerType};
use serde_json::json;
use support::Stack;

const REQUEST: &str = "Design the event bus of our billing platform";

/// The messages with text.
fn chunks(messages: &[Answer]) -> Vec<&Answer> {
    messages.iter().filter(|message| message.metadata.get("stage") == Some(&json!("text"))).collect()
}

fn text(messages: &[Answer]) -> String {
    chunks(messages).iter().map(|chunk| chunk.content.as_str().unwrap()).collect()
}

#[tokio::test]
async fn who_asks_for_it_sees_the_text_while_it_is_written() {
    let stack = Stack::start().await;
    let worker = stack.worker().await;
    let messages = stack.messages(REQUEST, json!({"stream": true})).await;
    let answer = messages.last().unwrap();
    assert_eq!(answer.msg_type, AnswerType::Spec, "{answer:?}");
    let (ledger, meter) = stack.books().await;
    assert_eq!(ledger, meter, "usage comes with the stream's last chunk");
    assert_eq!(answer.metadata["tokens"], meter);
    worker.drain().await;

    let text = text(&messages);
    assert!(text.starts_with("# Event bus of our billing platform"), "{text}");
    assert!(!text.contains("\"title\"") && !text.contains('{'), "no JSON: {text}");
    let first = chunks(&messages)[0];
    assert_eq!(first.metadata["stream"], json!({"step": "draft.0", "call": 1, "part": 0}));
}

#[tokio::test]
async fn nobody_else_gets_text_and_nothing_is_streamed() {
    let stack = Stack::start().await;
    let worker = stack.worker().await;
    for metadata in [json!({}), json!({"stream": false}), json!({"stream": "yes"})] {
        let messages = stack.messages(REQUEST, metadata).await;
        assert!(chunks(&messages).is_empty());
        let stages: Vec<&str> =
            messages.iter().filter_map(|message| message.metadata.get("stage")?.as_str()).collect();
        assert!(stages.contains(&"retrieving") && stages.contains(&"writing"), "{stages:?}");
        let percent: Vec<u64> =
            messages.iter().filter_map(|message| message.metadata.get("percent")?.as_u64()).collect();
        assert!(percent.contains(&5) && percent.contains(&20), "{percent:?}");
    }
    worker.drain().await;
}

#[tokio::test]
async fn an_operator_can_forbid_it_and_bound_it() {
    for (limit, most) in [("0", 0), ("1", 1)] {
        let stack = Stack::start().await.with("STREAM_CHUNKS", limit);
        let worker = stack.worker().await;
        let messages = stack.messages(REQUEST, json!({"stream": true})).await;
        assert_eq!(messages.last().unwrap().msg_type, AnswerType::Spec);
        assert!(chunks(&messages).len() <= most, "{limit}: {}", chunks(&messages).len());
        let (ledger, meter) = stack.books().await;
        assert_eq!(ledger, meter);
        worker.drain().await;
    }
}

#[tokio::test]
async fn a_server_that_refuses_to_stream_is_asked_without() {
    let stack = Stack::start().await.script(json!([{"fault": "no_stream", "times": 1}]));
    let worker = stack.worker().await;
    let messages = stack.messages(REQUEST, json!({"stream": true})).await;
    assert_eq!(messages.last().unwrap().msg_type, AnswerType::Spec, "{messages:?}");
    assert!(text(&messages).starts_with("# Event bus"), "the whole text comes at the end of the call");
    let (ledger, meter) = stack.books().await;
    assert_eq!(ledger, meter, "the refusal was not billed");
    worker.drain().await;
}

#[tokio::test]
async fn with_openai_stream_off_the_text_comes_at_the_end_of_the_call() {
    let stack = Stack::start().await.with("OPENAI_STREAM", "false");
    let worker = stack.worker().await;
    let messages = stack.messages(REQUEST, json!({"stream": true})).await;
    assert_eq!(messages.last().unwrap().msg_type, AnswerType::Spec);
    assert!(text(&messages).starts_with("# Event bus"));
    worker.drain().await;
}

#[tokio::test]
async fn a_cut_stream_is_booked_as_spent_and_the_text_starts_anew() {
    let stack = Stack::start()
        .await
        .with("TOKEN_BUDGET_PER_RUN", "40000")
        .script(json!([{"fault": "cut", "times": 1}]));
    let worker = stack.worker().await;
    let messages = stack.messages(REQUEST, json!({"stream": true})).await;
    assert_eq!(messages.last().unwrap().msg_type, AnswerType::Spec, "{messages:?}");
    let (ledger, meter) = stack.books().await;
    assert!(ledger > meter, "what the cut call billed is unknown: {ledger} and {meter}");
    let last = chunks(&messages).last().unwrap().metadata["stream"]["call"].clone();
    assert_eq!(last, 2, "the second attempt of the call");
    worker.drain().await;
}

#[tokio::test]
async fn a_stream_without_usage_is_booked_at_its_bound() {
    let stack = Stack::start().await.script(json!([{"fault": "no_usage", "times": 1}]));
    let worker = stack.worker().await;
    let messages = stack.messages(REQUEST, json!({"stream": true})).await;
    assert_eq!(messages.last().unwrap().msg_type, AnswerType::Spec);
    let (ledger, meter) = stack.books().await;
    assert!(ledger >= meter);
    worker.drain().await;
}

#[tokio::test]
async fn searches_and_repairs_stream_too_and_the_books_agree() {
    let steps = json!([{"tool_calls": [{}]}, {"fault": "broken_mermaid"}]);
    let stack = Stack::start().await.script(steps);
    let worker = stack.worker().await;
    let messages = stack.messages(REQUEST, json!({"stream": true})).await;
    let answer = messages.last().unwrap();
    assert_eq!(answer.msg_type, AnswerType::Spec, "{answer:?}");
    assert_eq!((&answer.metadata["searches"], &answer.metadata["repaired"]), (&json!(1), &json!(true)));
    let steps: Vec<&str> =
        chunks(&messages).iter().filter_map(|chunk| chunk.metadata["stream"]["step"].as_str()).collect();
    assert!(steps.contains(&"draft.1") && !steps.contains(&"draft.0"), "{steps:?}");
    let searching =
        messages.iter().find(|message| message.metadata.get("stage") == Some(&json!("searching")));
    let searching = &searching.unwrap().metadata;
    assert_eq!(searching["searches"], 1);
    assert_eq!((&searching["kind"], &searching["kind_from"]), (&json!("spec"), &json!("request")));
    let (ledger, meter) = stack.books().await;
    assert_eq!(ledger, meter);
    worker.drain().await;
}
