//! Builders for the agent's tests.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

use std::fmt::Write as _;

use atlas_shared::{
    Tokens,
    config::{ResponseFormatSetting, SourceUrls},
    gateway_api::Passage,
    message::{Inbound, Task},
    model::{ChatAnswer, ChatMessage, ChatRequest, FinishReason, ToolCall},
};
use serde_json::{Value, json};

use super::{
    draft::{AgentOptions, Call, Draft, DraftInput, Failure, Next, Search},
    finish::Finished,
    passages::tests::passage,
};

/// A request with metadata.
pub(super) fn task(content: &str, metadata: &Value) -> Task {
    let message = json!({
        "task_id": "0198c5a4-6f6e-7c3a-9b1e-000000000001", "role": "architect", "msg_type": "chat",
        "content": content, "metadata": metadata,
    });
    match atlas_shared::message::parse(message.to_string().as_bytes(), "1", 1 << 20).unwrap() {
        Inbound::Chat(task) => task,
        other => panic!("{other:?}"),
    }
}

/// Passages as a gateway would give them.
pub(super) fn passages() -> Vec<Passage> {
    let mut leases = passage(
        "docs/leases.md",
        12,
        "A worker that claims a run holds a lease of 60 seconds.\nThe lease is renewed while the run lives, \
         so that a dead worker's run\nis taken over by another worker at most one lease later.",
    );
    leases.heading = Some("Runs › Leases".to_owned());
    let budget = passage(
        "worker/src/budget.rs",
        40,
        "/// Tokens are reserved before a model call and settled after it, because a limit\n/// that is checked after the call is no limit.\npub async fn reserve(&self, tokens: Tokens) -> Result<Reservation, BudgetError> {",
    );
    let deploy = passage(
        "deploy/README.md",
        1,
        "Workers run as a Kubernetes deployment with three replicas.\nSecrets are mounted as files; no secret is an environment variable in the manifest.",
    );
    vec![leases, budget, deploy]
}

/// The options of the defaults.
pub(super) fn options() -> AgentOptions {
    AgentOptions {
        response_format: ResponseFormatSetting::JsonSchema,
        max_searches: 3,
        max_completion_tokens: 4000,
        min_completion_tokens: 800,
        source_urls: SourceUrls::default(),
    }
}

/// What a draft starts from.
pub(super) fn input() -> DraftInput {
    DraftInput {
        task: task("Design how workers share runs, so that no run is lost when a worker dies.", &json!({})),
        passages: passages(),
        parent: None,
        options: options(),
        date: Some(jiff::civil::date(2026, 1, 31)),
        degraded: None,
    }
}

/// A good answer of kind `spec`.
pub(super) fn good_spec() -> Value {
    json!({
        "title": "Run leases",
        "summary": "Workers claim runs in the store under a lease. A dead worker's run is taken over after one lease.",
        "context": [
            {"text": "A worker that claims a run holds a lease of 60 seconds", "citations": [1]},
            {"text": "Tokens are reserved before a model call", "citations": [2]}
        ],
        "requirements": {
            "functional": [{"text": "No run is lost when a worker dies", "citations": []}],
            "non_functional": [{"text": "A dead worker's run is taken over within one lease", "citations": [1]}]
        },
        "components": [
            {"name": "Worker", "responsibility": "Claims runs and renews their lease", "technology": "Rust",
             "interfaces": "`claim_run`, `renew_lease`", "citations": [1]},
            {"name": "Store", "responsibility": "Decides who holds a lease, by its own clock", "technology": "Postgres",
             "interfaces": "RPC", "citations": []}
        ],
        "decisions": [
            {"title": "Leases in the store", "decision": "The store grants leases of 60 seconds",
             "rationale": "Its clock is the only one all workers share",
             "alternatives": [
                {"name": "Leases in the queue", "why_not": "A redelivery says nothing about the dead worker"},
                {"name": "A lock service", "why_not": "One more thing to run"}],
             "consequences": ["A dead worker's run waits up to 60 seconds"], "citations": [1]}
        ],
        "diagrams": [{"title": "Parts", "mermaid": "flowchart LR\n  worker[\"Worker\"] -->|\"claims\"| store[(\"Store\")]"}],
        "deployment": [{"text": "Three replicas as a Kubernetes deployment", "citations": [3]}],
        "scaling": [{"text": "Workers are added without coordination", "citations": []}],
        "security": [{"text": "Secrets are mounted as files", "citations": [3]}],
        "observability": [{"text": "Count takeovers", "citations": []}],
        "risks": [{"risk": "A slow worker loses its lease", "severity": "medium", "mitigation": "Writes are fenced", "citations": []}],
        "open_questions": ["How long may a run take?"]
    })
}

/// An answer with this text.
#[expect(clippy::needless_pass_by_value, reason = "reads better at the call")]
pub(super) fn says(content: impl ToString) -> ChatAnswer {
    ChatAnswer {
        model: "test".to_owned(),
        content: Some(content.to_string()),
        refusal: None,
        tool_calls: Vec::new(),
        finish_reason: FinishReason::Stop,
        usage: None,
    }
}

/// An answer that was cut at its cap.
pub(super) fn cut(content: impl ToString) -> ChatAnswer {
    ChatAnswer { finish_reason: FinishReason::Length, ..says(content) }
}

/// An answer that asks for searches.
pub(super) fn searches(queries: &[&str]) -> ChatAnswer {
    let tool_calls = queries
        .iter()
        .enumerate()
        .map(|(index, query)| ToolCall {
            id: format!("c{index}"),
            name: "search_knowledge".to_owned(),
            arguments: json!({ "query": query }).to_string(),
        })
        .collect();
    ChatAnswer { content: None, tool_calls, finish_reason: FinishReason::ToolCalls, ..says("") }
}

/// A token for every four characters, as good as any for packing.
pub(super) fn count(request: &ChatRequest) -> Tokens {
    Tokens(serde_json::to_string(request).unwrap().len() as u64 / 4)
}

/// The call a draft wants, after a detour through its checkpoint: every state must survive one.
pub(super) fn call(draft: &mut Draft) -> Call {
    revive(draft);
    match draft.next() {
        Next::Call(call) => *call,
        other => panic!("{other:?}"),
    }
}

/// The search a draft wants.
pub(super) fn search(draft: &mut Draft) -> Search {
    revive(draft);
    match draft.next() {
        Next::Search(search) => search,
        other => panic!("{other:?}"),
    }
}

/// The finished document.
pub(super) fn finished(draft: &mut Draft) -> Finished {
    revive(draft);
    match draft.next() {
        Next::Finished(finished) => *finished,
        other => panic!("{other:?}"),
    }
}

/// Why there is none.
pub(super) fn failed(draft: &mut Draft) -> Failure {
    revive(draft);
    match draft.next() {
        Next::Failed(failure) => failure,
        other => panic!("{other:?}"),
    }
}

fn revive(draft: &mut Draft) {
    let revived = Draft::restore(&draft.checkpoint()).unwrap();
    assert_eq!(revived, *draft);
    *draft = revived;
}

/// The whole conversation as a person would read it.
pub(super) fn transcript(request: &ChatRequest) -> String {
    let mut out = String::new();
    for message in &request.messages {
        let (who, what) = match message {
            ChatMessage::System { content } => ("system", content.clone()),
            ChatMessage::User { content } => ("user", content.clone()),
            ChatMessage::Assistant { tool_calls, .. } => (
                "assistant",
                tool_calls
                    .iter()
                    .map(|call| format!("{}({})", call.name, call.arguments))
                    .collect::<Vec<_>>()
                    .join(
                        "
",
                    ),
            ),
            ChatMessage::Tool { tool_call_id, content } => ("tool", format!("({tool_call_id}) {content}")),
        };
        writeln!(out, "======== {who}\n{what}").unwrap();
    }
    let tools: Vec<&str> = request.tools.iter().map(|tool| tool.name.as_str()).collect();
    writeln!(out, "======== at most {} tokens, tools {tools:?}", request.max_completion_tokens).unwrap();
    out
}

/// A good answer of kind `adr`.
pub(super) fn adr() -> Value {
    json!({
        "title": "Keep leases in the store",
        "summary": "The store grants leases on runs. Its clock decides when they end.",
        "context": [{"text": "A worker that claims a run holds a lease of 60 seconds", "citations": [1]}],
        "drivers": [{"text": "No run may be lost when a worker dies", "citations": []}],
        "options": [
            {"name": "Leases in the store", "description": "A row says who holds the run", "pros": ["One clock"],
             "cons": ["One more write"], "citations": [1]},
            {"name": "Leases in the queue", "description": "The queue redelivers", "pros": ["Nothing to build"],
             "cons": ["Says nothing about the dead worker"], "citations": []}
        ],
        "outcome": {"chosen": "Leases in the store", "rationale": "Its clock is the only one all workers share", "citations": [1]},
        "consequences": {
            "good": [{"text": "A dead worker's run is taken over by another worker", "citations": [1]}],
            "bad": [{"text": "Every renewal is a write", "citations": []}]
        },
        "confirmation": [{"text": "A test kills a worker and counts results", "citations": []}],
        "diagrams": [],
        "open_questions": ["How long may a run take?"]
    })
}

/// A good answer of kind `review`.
pub(super) fn review() -> Value {
    json!({
        "title": "Review of run leases",
        "summary": "The design holds. Its weak spot is the length of a lease.",
        "context": [{"text": "A worker that claims a run holds a lease of 60 seconds", "citations": [1]}],
        "strengths": [{"text": "The lease is renewed while the run lives", "citations": [1]}],
        "findings": [
            {"title": "Long leases", "severity": "high", "finding": "A dead worker's run waits a whole lease",
             "recommendation": "Renew every 10 seconds and lease for 30", "citations": [1]}
        ],
        "risks": [{"risk": "A slow worker loses its lease", "severity": "low", "mitigation": "Writes are fenced", "citations": []}],
        "diagrams": [{"title": "As it is", "mermaid": "sequenceDiagram\n  Worker->>Store: claim\n  Store-->>Worker: lease"}],
        "open_questions": ["Who watches the store?"]
    })
}

/// A good answer of kind `refine`.
pub(super) fn refine() -> Value {
    let mut answer = good_spec();
    answer["changes"] = json!([
        {"section": "Decisions", "change": "Leases of 30 seconds", "reason": "The request asks for a faster takeover", "citations": []}
    ]);
    answer
}
