//! The simulator over plain HTTP: what Atlas's own client does not use.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use atlas_openai_sim::{Fault, Meter, RunningSim, Sim, SimOptions};
use serde_json::{Value, json};

struct Client {
    sim: RunningSim,
    http: reqwest::Client,
}

impl Client {
    async fn start(options: SimOptions) -> Self {
        Self { sim: Sim::start(options).await.unwrap(), http: reqwest::Client::new() }
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.sim.addr)
    }

    async fn chat(&self, id: &str, body: &Value) -> reqwest::Response {
        let request = self.http.post(self.url("/v1/chat/completions")).header("X-Client-Request-Id", id);
        request.json(body).send().await.unwrap()
    }

    async fn meter(&self) -> Meter {
        self.http.get(self.url("/sim/meter")).send().await.unwrap().json().await.unwrap()
    }
}

fn hello(extra: &Value) -> Value {
    let mut body =
        json!({"model": "gpt-4.1", "messages": [{"role": "user", "content": "Design a durable queue"}]});
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    body
}

fn events(text: &str) -> Vec<Value> {
    text.lines()
        .filter_map(|line| line.strip_prefix("data: "))
        .filter_map(|data| serde_json::from_str(data).ok())
        .collect()
}

#[tokio::test]
async fn a_stream_says_the_same_as_a_whole_answer_and_ends_with_the_usage() {
    let client = Client::start(SimOptions::default()).await;
    let whole: Value = client.chat("a.1", &hello(&json!({}))).await.json().await.unwrap();
    let body = hello(&json!({"stream": true, "stream_options": {"include_usage": true}}));
    let text = client.chat("a.2", &body).await.text().await.unwrap();
    assert!(text.ends_with("data: [DONE]\n\n"));
    let events = events(&text);
    let said: String =
        events.iter().filter_map(|event| event["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(said, whole["choices"][0]["message"]["content"]);
    let last = events.last().unwrap();
    assert_eq!((&last["choices"], &last["usage"]), (&json!([]), &whole["usage"]));
    let meter = client.meter().await;
    assert_eq!(meter.by_task["a"].calls, 2);
    assert_eq!(meter.total_tokens, 2 * whole["usage"]["total_tokens"].as_u64().unwrap());
}

#[tokio::test]
async fn a_cut_stream_is_billed_and_breaks_off() {
    let client = Client::start(SimOptions::default()).await;
    client.sim.script(json!([{"fault": "cut"}])).unwrap();
    let response = client.chat("a.1", &hello(&json!({"stream": true}))).await;
    assert!(response.status().is_success());
    assert!(response.text().await.is_err());
    assert!(client.meter().await.total_tokens > 0);
}

#[tokio::test]
async fn every_billed_call_is_listed_and_rates_can_be_changed_at_any_time() {
    let client = Client::start(SimOptions::default()).await;
    client.chat("task-a.1.draft", &hello(&json!({}))).await;
    let put = |rates: &'static str| client.http.put(client.url("/sim/faults")).body(rates).send();
    assert!(put("drop=1").await.unwrap().status().is_success());
    let dropped = client
        .http
        .post(client.url("/v1/chat/completions"))
        .header("X-Client-Request-Id", "task-a.2.draft")
        .json(&hello(&json!({})));
    assert!(dropped.send().await.is_err(), "not a byte of an answer");
    assert!(put("504=1").await.unwrap().status().is_success());
    assert_eq!(client.chat("task-b.1.draft", &hello(&json!({}))).await.status(), 504);
    assert_eq!(put("boom=1").await.unwrap().status(), 400);
    assert!(put("").await.unwrap().status().is_success());
    assert_eq!(client.chat("task-b.2.draft", &hello(&json!({}))).await.status(), 200);

    let calls = client.sim.billed_calls();
    let listed: Vec<(&str, Option<Fault>)> =
        calls.iter().map(|call| (call.request_id.as_str(), call.fault)).collect();
    let expected = [
        ("task-a.1.draft", None),
        ("task-a.2.draft", Some(Fault::Drop)),
        ("task-b.1.draft", Some(Fault::GatewayTimeout)),
        ("task-b.2.draft", None),
    ];
    assert_eq!(listed, expected);
    let sum: u64 = calls.iter().map(|call| call.prompt_tokens + call.completion_tokens).sum();
    assert_eq!(sum, client.meter().await.total_tokens);
}

#[tokio::test]
async fn the_meter_tells_models_tasks_kinds_and_faults_apart_and_can_be_reset() {
    let client = Client::start(SimOptions::default()).await;
    let script = json!([{"match": "task-b", "fault": "429"}]);
    let put = client.http.put(client.url("/sim/script")).json(&script).send().await.unwrap();
    assert!(put.status().is_success());
    client.chat("task-a.1.draft", &hello(&json!({}))).await;
    assert_eq!(client.chat("task-b.1.draft", &hello(&json!({}))).await.status(), 429);
    client.chat("task-b.1.draft", &hello(&json!({"model": "gpt-4.1-mini"}))).await;
    let embed = json!({"model": "text-embedding-3-small", "input": "hello", "encoding_format": "base64", "dimensions": 8});
    let embedded: Value = client
        .http
        .post(client.url("/v1/embeddings"))
        .json(&embed)
        .send()
        .await
        .unwrap()
        .json()
        .await
        .unwrap();
    assert_eq!(embedded["data"][0]["embedding"].as_str().unwrap().len(), 44, "8 floats in base64");

    let meter = client.meter().await;
    assert_eq!(meter.calls, 4);
    assert_eq!(meter.by_model.len(), 3);
    assert_eq!((meter.by_task["task-a"].calls, meter.by_task["task-b"].calls), (1, 1));
    assert_eq!(meter.by_task["unknown"].calls, 1, "calls without an id are billed too");
    assert_eq!((meter.by_kind["chat"].calls, meter.by_kind["embedding"].calls), (2, 1));
    assert_eq!(meter.faults["429"], 1);
    let sum: u64 = meter.by_task.values().map(|bill| bill.total_tokens).sum();
    assert_eq!(sum, meter.total_tokens);

    client.http.delete(client.url("/sim/meter")).send().await.unwrap();
    assert_eq!(client.meter().await, Meter::default());
}

#[tokio::test]
async fn faults_by_rate_do_not_depend_on_the_order_of_arrival() {
    let strikes = async |ids: Vec<u32>| {
        let client =
            Client::start(SimOptions { faults: "429=0.5".parse().unwrap(), ..SimOptions::default() }).await;
        let mut refused = Vec::new();
        for id in ids {
            if client.chat(&format!("task-{id}.1"), &hello(&json!({}))).await.status() == 429 {
                refused.push(id);
            }
        }
        refused.sort_unstable();
        refused
    };
    let forwards = strikes((0..40).collect()).await;
    assert_eq!(forwards, strikes((0..40).rev().collect()).await);
    assert!((8..32).contains(&forwards.len()), "{forwards:?}");
}

#[tokio::test]
async fn offered_tools_are_called_at_the_rate() {
    let client = Client::start(SimOptions { tool_rate: 1.0, ..SimOptions::default() }).await;
    let tools = json!({"tools": [{"type": "function", "function": {"name": "search", "description": "Finds.",
        "parameters": {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]}}}]});
    let answer: Value = client.chat("a.1", &hello(&tools)).await.json().await.unwrap();
    assert_eq!(answer["choices"][0]["finish_reason"], "tool_calls");
    let call = &answer["choices"][0]["message"]["tool_calls"][0]["function"];
    assert_eq!(call["name"], "search");
    let plain: Value = client.chat("a.2", &hello(&json!({}))).await.json().await.unwrap();
    assert_eq!(plain["choices"][0]["finish_reason"], "stop", "no tools on offer, no call");
}

#[tokio::test]
async fn what_openai_refuses_is_refused() {
    let client = Client::start(SimOptions { context_tokens: 1000, ..SimOptions::default() }).await;
    for (body, code) in [
        (json!({"model": "gpt-5", "temperature": 0.2}), "unsupported_value"),
        (json!({"model": "o4-mini", "max_tokens": 10}), "unsupported_parameter"),
        (json!({"messages": []}), "empty_array"),
        (json!({"max_completion_tokens": 5000}), "context_length_exceeded"),
    ] {
        let response = client.chat("a.1", &hello(&body)).await;
        assert_eq!(response.status(), 400);
        let error: Value = response.json().await.unwrap();
        assert_eq!(error["error"]["code"], code);
    }
    let response = client.http.post(client.url("/v1/chat/completions")).body("{").send().await.unwrap();
    assert_eq!(response.status(), 400);
    for input in [json!(""), json!([]), json!({"a": 1}), json!([1.5, {}])] {
        let body = json!({"model": "text-embedding-3-small", "input": input});
        let response = client.http.post(client.url("/v1/embeddings")).json(&body).send().await.unwrap();
        assert_eq!(response.status(), 400, "{body}");
    }
    assert_eq!(client.meter().await.total_tokens, 0);
}

#[tokio::test]
async fn models_are_listed_and_only_those_of_the_list_served() {
    let client =
        Client::start(SimOptions { models: vec!["my-model".to_owned()], ..SimOptions::default() }).await;
    let list: Value = client.http.get(client.url("/v1/models")).send().await.unwrap().json().await.unwrap();
    assert_eq!(list["data"][0]["id"], "my-model");
    assert_eq!(client.http.get(client.url("/v1/models/my-model")).send().await.unwrap().status(), 200);
    assert_eq!(client.http.get(client.url("/v1/models/gpt-4.1")).send().await.unwrap().status(), 404);
    assert_eq!(client.chat("a", &hello(&json!({}))).await.status(), 404);
    assert_eq!(client.chat("a", &hello(&json!({"model": "my-model"}))).await.status(), 200);
}

#[tokio::test]
async fn a_wrong_script_is_refused_in_words() {
    let client = Client::start(SimOptions::default()).await;
    let response =
        client.http.put(client.url("/sim/script")).json(&json!([{"falut": "429"}])).send().await.unwrap();
    assert_eq!(response.status(), 400);
    assert!(response.text().await.unwrap().contains("falut"));
    assert!(client.sim.script(json!({"fault": "429"})).is_err());
}
