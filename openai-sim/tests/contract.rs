//! The contract between `atlas_shared::openai` and an OpenAI-compatible server: what every kind of
//! answer and failure becomes, and what it costs. Atlas's client against the simulator.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::time::Duration;

use atlas_openai_sim::{RunningSim, Sim, SimOptions};
use atlas_shared::{
    Config, Dependency, Env, Tokens, UpstreamError,
    config::{OpenAiConfig, Process},
    ledger::Usage,
    model::{
        Billed, ChatAnswer, ChatMessage, ChatModel, ChatRequest, Embedder, FinishReason, ModelError,
        ResponseFormat, ToolSpec,
    },
    openai::{OpenAiChat, OpenAiEmbedder},
};
use serde_json::{Value, json};

const KEY: &str = "sk-test-0123456789";

async fn simulator() -> RunningSim {
    Sim::start(SimOptions { require_key: Some(KEY.to_owned()), ..SimOptions::default() }).await.unwrap()
}

fn config(base_url: &str) -> OpenAiConfig {
    let env = Env::from([
        ("ATLAS_DATA_DIR", "unused"),
        ("OPENAI_BASE_URL", base_url),
        ("OPENAI_API_KEY", KEY),
        ("OPENAI_FALLBACK_MODELS", "gpt-5-nano"),
    ]);
    Config::load(&env, Process::Cli).unwrap().openai.unwrap()
}

/// Long enough for an answer, short enough to wait for where none comes.
fn impatient(base_url: &str) -> OpenAiConfig {
    // Long enough for a loaded machine; only the hanging answer waits for it.
    OpenAiConfig { timeout: Duration::from_secs(5), ..config(base_url) }
}

fn chat(sim: &RunningSim) -> OpenAiChat {
    OpenAiChat::new(&config(&sim.base_url())).unwrap()
}

fn schema() -> Value {
    json!({
        "type": "object",
        "additionalProperties": false,
        "required": ["title", "claims"],
        "properties": {
            "title": {"type": "string"},
            "claims": {"type": "array", "items": {
                "type": "object",
                "additionalProperties": false,
                "required": ["text", "citations"],
                "properties": {"text": {"type": "string"}, "citations": {"type": "array", "items": {"type": "integer"}}},
            }},
        },
    })
}

fn request() -> ChatRequest {
    ChatRequest {
        model: "gpt-4.1".to_owned(),
        messages: vec![
            ChatMessage::System { content: "You are Atlas, a software architect.".to_owned() },
            ChatMessage::User {
                content: "Design a durable queue.\n[1] docs/queue.md:1-4\nMessages are kept until they are acked.\n\
                          [2] src/pull.rs:10-20\nWorkers pull with a lease."
                    .to_owned(),
            },
        ],
        max_completion_tokens: 400,
        response_format: ResponseFormat::JsonSchema { name: "spec".to_owned(), schema: schema().into() },
        tools: Vec::new(),
        request_id: "task-1.1.draft".to_owned(),
    }
}

async fn fails_with(fault: &str) -> (ModelError, RunningSim) {
    fails_with_step(json!({"fault": fault})).await
}

async fn fails_with_step(step: Value) -> (ModelError, RunningSim) {
    let sim = simulator().await;
    sim.script(json!([step])).unwrap();
    let error = OpenAiChat::new(&impatient(&sim.base_url())).unwrap().complete(&request()).await.unwrap_err();
    assert_eq!(sim.meter().calls(), 1, "one attempt, no more");
    assert!(!format!("{error:?}").contains(KEY), "the key shows in {error:?}");
    (error, sim)
}

fn billed_by(sim: &RunningSim) -> Usage {
    let meter = sim.meter();
    Usage { prompt: Tokens(meter.prompt_tokens), completion: Tokens(meter.completion_tokens) }
}

fn text(answer: &ChatAnswer) -> Value {
    serde_json::from_str(answer.content.as_deref().unwrap()).unwrap()
}

#[tokio::test]
async fn a_strict_answer_fits_the_schema_and_cites_the_passages() {
    let sim = simulator().await;
    let answer = chat(&sim).complete(&request()).await.unwrap();

    assert_eq!((answer.model.as_str(), &answer.finish_reason), ("gpt-4.1", &FinishReason::Stop));
    let claims = text(&answer)["claims"].as_array().unwrap().clone();
    assert!(!claims.is_empty());
    for claim in claims {
        let cited = claim["citations"][0].as_u64().unwrap();
        assert!([1, 2].contains(&cited), "{claim}");
    }
    assert_eq!(answer.usage, Some(billed_by(&sim)), "the answer's usage is what was billed");
    assert_eq!(
        sim.meter().task("task-1").total_tokens,
        answer.usage.unwrap().total().0,
        "booked on the task"
    );
    let again = chat(&sim).complete(&request()).await.unwrap();
    assert_eq!(again.content, answer.content, "the same prompt gives the same answer");
}

#[tokio::test]
async fn every_response_format_is_answered() {
    let sim = simulator().await;
    let prose = ChatRequest { response_format: ResponseFormat::Text, ..request() };
    assert!(chat(&sim).complete(&prose).await.unwrap().content.unwrap().contains("[1]"));
    let object = ChatRequest { response_format: ResponseFormat::JsonObject, ..request() };
    assert!(text(&chat(&sim).complete(&object).await.unwrap()).is_object());
    // A model that cannot enforce a schema gets it in the prompt, and obeys.
    let old = ChatRequest { model: "gpt-4-turbo".to_owned(), ..request() };
    assert!(text(&chat(&sim).complete(&old).await.unwrap())["claims"].is_array());
}

#[tokio::test]
async fn no_reservation_is_smaller_than_the_bill() {
    let sim = simulator().await;
    let chat = chat(&sim);
    let tool = ToolSpec {
        name: "search_knowledge".to_owned(),
        description: "Finds passages in the indexed documents.".to_owned(),
        parameters: json!({"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]}),
    };
    let long: String = "Ein längerer Text — mit Zeichen 漢字 und `code`.\n".repeat(200);
    for model in ["gpt-4.1", "gpt-4-turbo", "gpt-5-nano", "sim-unknown"] {
        for content in ["x", &long, &"\n\t\"\\".repeat(300)] {
            let mut request = ChatRequest { model: model.to_owned(), ..request() };
            request.messages.push(ChatMessage::User { content: content.to_owned() });
            request.tools = vec![tool.clone()];
            let bound = chat.prompt_tokens_upper_bound(&request.model, &request);
            let usage = chat.complete(&request).await.unwrap().usage.unwrap();
            assert!(usage.prompt <= bound, "{model}: billed {} of {bound}", usage.prompt);
            assert!(usage.completion.0 <= u64::from(request.max_completion_tokens));
        }
    }
}

#[tokio::test]
async fn the_completion_cap_holds() {
    let sim = simulator().await;
    let answer = chat(&sim).complete(&ChatRequest { max_completion_tokens: 7, ..request() }).await.unwrap();
    assert_eq!(answer.finish_reason, FinishReason::Length);
    assert!(answer.usage.unwrap().completion.0 <= 7);
    sim.script(json!([{"fault": "length"}])).unwrap();
    assert_eq!(chat(&sim).complete(&request()).await.unwrap().finish_reason, FinishReason::Length);
}

#[tokio::test]
async fn tools_are_called_and_their_results_understood() {
    let sim = simulator().await;
    sim.script(json!([{"tool_calls": [{"name": "search_knowledge"}]}])).unwrap();
    let mut request = request();
    request.tools = vec![ToolSpec {
        name: "search_knowledge".to_owned(),
        description: "Finds passages.".to_owned(),
        parameters: json!({"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]}),
    }];
    let answer = chat(&sim).complete(&request).await.unwrap();
    assert_eq!(answer.finish_reason, FinishReason::ToolCalls);
    let call = answer.tool_calls[0].clone();
    let arguments: Value = serde_json::from_str(&call.arguments).unwrap();
    assert!(arguments["query"].as_str().unwrap().contains("queue"), "{arguments}");

    request.messages.push(ChatMessage::Assistant { content: answer.content, tool_calls: answer.tool_calls });
    request.messages.push(ChatMessage::Tool {
        tool_call_id: call.id,
        content: "[3] docs/lease.md:1-2\nA lease lasts a minute.".to_owned(),
    });
    let bound = chat(&sim).prompt_tokens_upper_bound(&request.model, &request);
    let answer = chat(&sim).complete(&request).await.unwrap();
    assert_eq!(answer.finish_reason, FinishReason::Stop);
    assert!(answer.usage.unwrap().prompt <= bound);
}

#[tokio::test]
async fn a_refusal_and_an_empty_answer_are_answers() {
    let sim = simulator().await;
    sim.script(
        json!([{"fault": "refusal"}, {"fault": "empty"}, {"fault": "not_json"}, {"fault": "wrong_schema"},
        {"content": "as told", "finish_reason": "content_filter"}]),
    )
    .unwrap();
    let chat = chat(&sim);
    assert!(chat.complete(&request()).await.unwrap().refusal.is_some());
    assert_eq!(chat.complete(&request()).await.unwrap().content.as_deref(), Some(""));
    let prose = chat.complete(&request()).await.unwrap().content.unwrap();
    assert!(serde_json::from_str::<Value>(&prose).is_err());
    assert!(text(&chat.complete(&request()).await.unwrap()).get("claims").is_none());
    let filtered = chat.complete(&request()).await.unwrap();
    assert_eq!(
        (filtered.content.as_deref(), filtered.finish_reason),
        (Some("as told"), FinishReason::ContentFilter)
    );
    assert_eq!(sim.steps_left(), 0);
}

#[tokio::test]
async fn a_wrong_key_is_a_matter_of_configuration_and_costs_nothing() {
    let sim = simulator().await;
    let wrong = "sk-wrong-key-987654";
    let config = OpenAiConfig { api_key: Some(atlas_shared::Secret::new(wrong)), ..config(&sim.base_url()) };
    let chat = OpenAiChat::new(&config).unwrap();
    for error in [chat.complete(&request()).await.unwrap_err().error, chat.check().await.unwrap_err()] {
        assert!(
            matches!(error, UpstreamError::Misconfigured { variable: "OPENAI_API_KEY", .. }),
            "{error:?}"
        );
        assert!(
            !format!("{error:?}").contains(wrong),
            "the simulator repeats the key, we must not: {error:?}"
        );
    }
    let keyless = OpenAiChat::new(&OpenAiConfig { api_key: None, ..config }).unwrap();
    let error = keyless.complete(&request()).await.unwrap_err();
    assert!(error.to_string().contains("this server wants a key"), "{error}");
    assert_eq!(error.billed, Billed::Nothing);
    assert_eq!(sim.meter().total_tokens(), 0);
    assert!(self::chat(&sim).check().await.is_ok());
}

#[tokio::test]
async fn an_empty_account_is_a_matter_of_configuration() {
    for fault in ["401", "insufficient_quota"] {
        let (error, sim) = fails_with(fault).await;
        assert!(
            matches!(error.error, UpstreamError::Misconfigured { variable: "OPENAI_API_KEY", .. }),
            "{error:?}"
        );
        assert_eq!((error.billed, sim.meter().total_tokens()), (Billed::Nothing, 0));
    }
}

#[tokio::test]
async fn an_unknown_model_is_the_settings_fault_or_the_requests() {
    let sim = simulator().await;
    let config = OpenAiConfig { models: vec!["no-such-model".to_owned()], ..config(&sim.base_url()) };
    let chat = OpenAiChat::new(&config).unwrap();
    let ours = ChatRequest { model: "no-such-model".to_owned(), ..request() };
    for error in [chat.complete(&ours).await.unwrap_err().error, chat.check().await.unwrap_err()] {
        assert!(matches!(error, UpstreamError::Misconfigured { variable: "OPENAI_MODEL", .. }), "{error:?}");
    }
    let theirs = ChatRequest { model: "not-even-this-one".to_owned(), ..request() };
    let error = chat.complete(&theirs).await.unwrap_err();
    assert!(
        matches!(&error.error, UpstreamError::Permanent { code, .. } if code == "unknown_model"),
        "{error:?}"
    );
    assert_eq!(error.billed, Billed::Nothing);
}

#[tokio::test]
async fn a_wrong_address_is_a_matter_of_configuration() {
    let sim = simulator().await;
    let wrong = format!("http://{}/nothing/here", sim.addr);
    let error = OpenAiChat::new(&config(&wrong)).unwrap().complete(&request()).await.unwrap_err();
    assert!(
        matches!(error.error, UpstreamError::Misconfigured { variable: "OPENAI_BASE_URL", .. }),
        "{error:?}"
    );
}

#[tokio::test]
async fn a_server_that_is_not_there_is_transient_and_costs_nothing() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/v1", listener.local_addr().unwrap());
    drop(listener);
    for url in [url.as_str(), "http://no-such-host.invalid/v1"] {
        let error = OpenAiChat::new(&config(url)).unwrap().complete(&request()).await.unwrap_err();
        assert!(error.error.is_transient() && error.error.dependency() == Dependency::Model, "{error:?}");
        assert_eq!(error.billed, Billed::Nothing);
        assert!(error.to_string().contains("OPENAI_BASE_URL"), "{error}");
    }
}

#[tokio::test]
async fn a_rate_limit_is_transient_says_when_and_costs_nothing() {
    for fault in ["429", "429_html"] {
        let (error, sim) = fails_with_step(json!({"fault": fault, "retry_after": 7})).await;
        let UpstreamError::Transient { retry_after, .. } = error.error else { panic!("{error:?}") };
        assert_eq!(retry_after, Some(Duration::from_secs(7)));
        assert_eq!((error.billed, sim.meter().total_tokens()), (Billed::Nothing, 0));
    }
}

#[tokio::test]
async fn a_server_in_trouble_is_transient_and_only_a_proxy_hides_what_was_billed() {
    for (fault, billed) in [("500", Billed::Nothing), ("503", Billed::Nothing), ("502", Billed::Unknown)] {
        let (error, _sim) = fails_with(fault).await;
        assert!(error.error.is_transient(), "{error:?}");
        assert_eq!(error.billed, billed, "{fault}");
    }
    let (error, _sim) = fails_with_step(json!({"fault": "503", "retry_after": 2})).await;
    assert!(matches!(error.error, UpstreamError::Transient { retry_after: Some(_), .. }), "{error:?}");
}

#[tokio::test]
async fn an_answer_that_never_comes_or_breaks_off_may_have_billed() {
    for fault in ["hang", "cut", "drop", "truncated", "504"] {
        let (error, sim) = fails_with(fault).await;
        assert!(error.error.is_transient(), "{error:?}");
        assert_eq!(error.billed, Billed::Unknown);
        assert!(sim.meter().total_tokens() > 0, "{fault} is billed");
    }
}

#[tokio::test]
async fn an_unreadable_answer_is_transient_and_its_cost_is_known_when_it_says_so() {
    let (error, _sim) = fails_with("malformed").await;
    assert!(error.error.is_transient(), "{error:?}");
    assert_eq!(error.billed, Billed::Unknown);

    let (error, sim) = fails_with("no_choices").await;
    assert!(error.error.is_transient(), "{error:?}");
    assert_eq!(error.billed, Billed::Known(billed_by(&sim)));
}

#[tokio::test]
async fn an_answer_without_usage_is_good_but_its_cost_is_unknown() {
    let sim = simulator().await;
    sim.script(json!([{"fault": "no_usage"}])).unwrap();
    let answer = chat(&sim).complete(&request()).await.unwrap();
    assert!(answer.content.is_some());
    assert_eq!(answer.usage, None);
}

#[tokio::test]
async fn a_request_that_can_never_succeed_is_permanent_and_costs_nothing() {
    for (fault, code) in [
        ("context_length", "context_length_exceeded"),
        ("content_filter", "content_policy"),
        ("400", "invalid_request"),
    ] {
        let (error, sim) = fails_with(fault).await;
        assert!(
            matches!(&error.error, UpstreamError::Permanent { code: found, .. } if found == code),
            "{error:?}"
        );
        assert_eq!((error.billed, sim.meter().total_tokens()), (Billed::Nothing, 0));
    }
}

#[tokio::test]
async fn a_schema_that_strict_mode_forbids_is_found_out() {
    let sim = simulator().await;
    let open = json!({"type": "object", "properties": {"a": {"type": "string"}}});
    let format = ResponseFormat::JsonSchema { name: "open".to_owned(), schema: open.into() };
    let error = chat(&sim).complete(&ChatRequest { response_format: format, ..request() }).await.unwrap_err();
    assert!(
        matches!(&error.error, UpstreamError::Permanent { code, .. } if code == "invalid_request"),
        "{error:?}"
    );
    assert!(error.to_string().contains("additionalProperties"), "{error}");
}

#[tokio::test]
async fn a_model_that_bills_more_than_reserved_gets_a_wider_bound() {
    let sim = simulator().await;
    sim.script(json!([{"fault": "overbill"}])).unwrap();
    let chat = chat(&sim);
    let request = request();
    let bound = chat.prompt_tokens_upper_bound(&request.model, &request);
    let billed = chat.complete(&request).await.unwrap().usage.unwrap();
    assert!(billed.prompt > bound, "{billed:?} {bound}");
    // As if the answer had been as long as it might be.
    let cap = u32::try_from(billed.completion.0).unwrap();
    let request = ChatRequest { max_completion_tokens: cap, ..request };
    chat.note_overrun(&request, bound + Tokens(u64::from(cap)), billed);
    assert!(chat.prompt_tokens_upper_bound(&request.model, &request) >= billed.prompt);
}

#[tokio::test]
async fn rate_limit_headers_are_kept() {
    let options = SimOptions {
        requests_per_minute: Some(2),
        tokens_per_minute: Some(100_000),
        ..SimOptions::default()
    };
    let sim = Sim::start(options).await.unwrap();
    let chat = chat(&sim);
    assert!(chat.rate_limits().get("gpt-4.1").is_none());
    chat.complete(&request()).await.unwrap();
    let limits = chat.rate_limits().get("gpt-4.1").unwrap();
    assert_eq!((limits.limit_requests, limits.remaining_requests), (Some(2), Some(1)));
    assert!(limits.remaining_tokens.unwrap() < 100_000);
    assert_eq!(limits.wait(Tokens(10)), Duration::ZERO);
    chat.complete(&request()).await.unwrap();
    let error = chat.complete(&request()).await.unwrap_err();
    assert!(matches!(error.error, UpstreamError::Transient { retry_after: Some(_), .. }), "{error:?}");
    assert!(chat.rate_limits().get("gpt-4.1").unwrap().wait(Tokens(10)) > Duration::from_secs(1));
}

fn embedder(config: &OpenAiConfig) -> OpenAiEmbedder {
    OpenAiEmbedder::new(config).unwrap().unwrap()
}

fn texts() -> Vec<String> {
    ["how are messages retried", "messages are retried with backoff", "dashboards are provisioned from files"]
        .map(str::to_owned)
        .to_vec()
}

#[tokio::test]
async fn embeddings_are_deterministic_ordered_and_booked() {
    let sim = simulator().await;
    let embedder = embedder(&config(&sim.base_url()));
    let embeddings = embedder.embed(&texts(), "index-7.1").await.unwrap();
    assert_eq!(embeddings.vectors.len(), 3);
    assert_eq!(embeddings.vectors[0].len(), 1536);
    let cosine = |a: usize, b: usize| -> f32 {
        embeddings.vectors[a].iter().zip(&embeddings.vectors[b]).map(|(x, y)| x * y).sum()
    };
    assert!(cosine(0, 1) > cosine(0, 2) + 0.1, "similar texts are nearer");
    assert_eq!(embedder.embed(&texts()[1..2], "x").await.unwrap().vectors[0], embeddings.vectors[1]);
    let usage = embeddings.usage.unwrap();
    assert_eq!(usage.total().0, sim.meter().task("index-7").total_tokens);
    assert!(usage.total() <= embedder.tokens_upper_bound(&texts()));
    assert_eq!(embedder.embed(&[], "x").await.unwrap().vectors.len(), 0, "nothing to do costs no call");
    assert_eq!(sim.meter().calls(), 2);
}

#[tokio::test]
async fn embedding_failures_are_decisions_too() {
    let sim = simulator().await;
    let embedder = embedder(&impatient(&sim.base_url()));
    let fails = async |fault: &str| {
        sim.reset_meter();
        sim.script(json!([{"kind": "embedding", "fault": fault}])).unwrap();
        let error = embedder.embed(&texts(), "t.1").await.unwrap_err();
        assert_eq!(error.error.dependency(), Dependency::Embedder);
        (error, billed_by(&sim))
    };
    for fault in ["429", "500", "hang", "cut", "malformed"] {
        let (error, _) = fails(fault).await;
        assert!(error.error.is_transient(), "{fault}: {error:?}");
        assert_eq!(error.billed == Billed::Nothing, ["429", "500"].contains(&fault), "{fault}: {error:?}");
    }
    for fault in ["empty", "wrong_schema", "no_choices"] {
        let (error, billed) = fails(fault).await;
        assert!(error.error.is_transient(), "{fault}: {error:?}");
        assert_eq!(error.billed, Billed::Known(billed), "{fault}");
    }
    let (error, _) = fails("404").await;
    assert!(
        matches!(error.error, UpstreamError::Misconfigured { variable: "OPENAI_EMBEDDING_MODEL", .. }),
        "{error:?}"
    );
    let (error, _) = fails("401").await;
    assert!(
        matches!(error.error, UpstreamError::Misconfigured { variable: "OPENAI_API_KEY", .. }),
        "{error:?}"
    );

    sim.script(json!([{"kind": "embedding", "fault": "no_usage"}])).unwrap();
    assert_eq!(embedder.embed(&texts(), "t.1").await.unwrap().usage, None);
}

#[tokio::test]
async fn embeddings_can_be_switched_off() {
    let config = OpenAiConfig { embedding_model: None, ..config("http://127.0.0.1:9/v1") };
    assert!(OpenAiEmbedder::new(&config).unwrap().is_none());
}
