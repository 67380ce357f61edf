//! Search with embeddings, against the simulator of the API: what is found, what is booked, and what
//! happens when the API, the budget or the model is not what it should be.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use atlas_openai_sim::{RunningSim, Sim, SimOptions};
use atlas_rag_gateway::Gateway;
use atlas_shared::{
    Tokens, ledger,
    model::{Embedder, Embeddings, ModelError},
};
use serde_json::{Value, json};
use support::{Stand, config, sources};

/// Bounds the wait for a job that has much to do.
const LONG: Duration = Duration::from_secs(120);

const FAST: [(&str, &str); 2] = [("RETRY_BASE_MILLISECONDS", "1"), ("RETRY_MAX_ATTEMPTS", "2")];

async fn sim() -> (RunningSim, String) {
    let sim = Sim::start(SimOptions::default()).await.expect("a simulator");
    let url = sim.base_url();
    (sim, url)
}

async fn stand(url: &str, more: &[(&str, &str)]) -> Stand {
    stand_in(Arc::new(tempfile::tempdir().unwrap()), url, more).await
}

async fn stand_in(dir: Arc<tempfile::TempDir>, url: &str, more: &[(&str, &str)]) -> Stand {
    let settings: Vec<_> =
        [("OPENAI_BASE_URL", url)].into_iter().chain(FAST).chain(more.iter().copied()).collect();
    Stand::start_in(dir, &settings).await
}

fn documents() -> Value {
    json!([
        {"source": "budget.md", "text": "Tokens are reserved before every call and settled after it.\n"},
        {"source": "queue.md", "text": "Messages are pulled from the subscription and acknowledged.\n"},
        {"source": "store.md", "text": "Runs and results are stored in Postgres.\n"},
    ])
}

/// Tokens that the ledger holds as used and as reserved today.
async fn booked(stand: &Stand) -> (u64, u64) {
    let config = config(&stand.dir, &[]);
    let state = ledger::open(&config).await.unwrap().budget(config.limits).await.unwrap();
    (state.used.0, state.reserved.0)
}

#[tokio::test]
async fn hybrid_search_gives_cosines_and_books_what_was_billed() {
    let (sim, url) = sim().await;
    let stand = stand(&url, &[]).await;
    let put = stand.put(documents()).await.ok();
    let billed = sim.meter().total_tokens();
    assert!(billed > 0);
    assert_eq!(put["tokens"], billed);
    assert_eq!(booked(&stand).await, (billed, 0));

    let reply = stand.query("how are tokens reserved and settled").await;
    assert_eq!(reply.header("x-atlas-degraded"), None);
    let passages = reply.ok();
    assert_eq!(sources(&passages)[0], "budget.md");
    for passage in passages.as_array().unwrap() {
        let cosine = passage["similarity"].as_f64().expect("every passage has a cosine");
        assert!((0.0..=1.0).contains(&cosine));
    }
    assert_eq!(booked(&stand).await, (sim.meter().total_tokens(), 0), "the query was booked too");

    // A threshold above every cosine leaves nothing; one of zero leaves all.
    let with = |threshold: f64| json!({"query": "tokens", "relevancy_threshold": threshold});
    assert_eq!(stand.post("/v1/query_chat", with(1.0)).await.ok(), json!([]));
    assert_eq!(sources(&stand.post("/v1/query_chat", with(0.0)).await.ok()).len(), 3);

    let collections = stand.get("/v1/collections").await.ok();
    assert_eq!(collections[0]["embedding_model"], "text-embedding-3-small");
    assert!(collections[0]["embedding_size"].as_u64().unwrap() > 0);
    stand.gateway.shutdown().await;
}

#[tokio::test]
async fn unchanged_documents_and_repeated_queries_cost_nothing() {
    let (sim, url) = sim().await;
    let stand = stand(&url, &[]).await;
    stand.put(documents()).await.ok();
    stand.query("tokens").await.ok();
    let billed = sim.meter().total_tokens();
    let again = stand.put(documents()).await.ok();
    assert_eq!(again["tokens"], 0);
    stand.query("tokens").await.ok();
    stand.post("/v1/query_chat", json!({"query": "tokens", "top_k": 1})).await.ok();
    assert_eq!(sim.meter().total_tokens(), billed);
    stand.gateway.shutdown().await;
}

#[tokio::test]
async fn a_query_that_cannot_be_embedded_is_answered_lexically_and_only_until_the_api_is_back() {
    let (sim, url) = sim().await;
    let stand = stand(&url, &[]).await;
    stand.put(documents()).await.ok();
    sim.script(json!([{"kind": "embedding", "fault": "500"}])).unwrap();
    let reply = stand.query("tokens reserved").await;
    assert_eq!(reply.header("x-atlas-degraded"), Some("lexical"));
    let passages = reply.ok();
    assert_eq!(sources(&passages), ["budget.md"]);
    assert_eq!(passages[0]["similarity"], Value::Null);
    assert_eq!(stand.metric("rag_degraded_total{reason=\"lexical\"}").await, 1);
    let reply = stand.query("tokens reserved").await;
    assert_eq!(reply.header("x-atlas-degraded"), None, "the degraded answer was not kept");
    let (used, reserved) = booked(&stand).await;
    assert!(used >= sim.meter().total_tokens(), "a 500 may have been billed, so it is assumed to be");
    assert_eq!(reserved, 0);
    stand.gateway.shutdown().await;
}

/// Waits until readiness says of the embedder that it works, or that it does not, and gives its words.
async fn embedder_turns(stand: &Stand, ok: bool) -> String {
    let said = async {
        loop {
            let ready = stand.get("/health/ready").await.ok();
            let check = &ready["checks"]["embedder"];
            assert_eq!(check["required"].as_bool().unwrap(), check["ok"].as_bool().unwrap());
            if check["ok"] == ok {
                return check["message"].as_str().unwrap().to_owned();
            }
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), said).await.expect("readiness follows")
}

#[tokio::test]
async fn readiness_says_that_queries_get_no_vectors() {
    let (sim, url) = sim().await;
    let stand = stand(&url, &[]).await;
    stand.put(documents()).await.ok();
    assert_eq!(embedder_turns(&stand, true).await, "ok");

    sim.script(json!([{"kind": "embedding", "fault": "500"}])).unwrap();
    stand.query("tokens reserved").await.ok();
    let said = embedder_turns(&stand, false).await;
    assert!(said.contains("search is lexical") && said.contains("500"), "{said}");
    stand.query("runs stored").await.ok();
    embedder_turns(&stand, true).await;

    // The day's tokens are spent elsewhere, and no query comes.
    let config = config(&stand.dir, &[]);
    let fleet = ledger::open(&config).await.unwrap();
    let left = fleet.budget(config.limits).await.unwrap().available();
    let all = ledger::ReserveRequest {
        id: uuid::Uuid::now_v7(),
        task_id: None,
        attempt: None,
        tenant: None,
        model: "another".to_owned(),
        kind: ledger::CallKind::Chat,
        tokens: left,
        limits: config.limits,
    };
    let ledger::ReserveOutcome::Granted(granted) = fleet.reserve(&all).await.unwrap() else {
        panic!("that is what was left");
    };
    let said = embedder_turns(&stand, false).await;
    assert!(said.contains("budget") && said.contains("DAILY_TOKEN_BUDGET"), "{said}");
    assert_eq!(stand.query("messages pulled").await.header("x-atlas-degraded"), Some("lexical"));
    embedder_turns(&stand, false).await;
    fleet.close(granted, ledger::Closing::Released).await.unwrap();
    embedder_turns(&stand, true).await;
    stand.gateway.shutdown().await;
}

/// Found with a real model on a busy machine: each try of a client that had given up waiting was paid for.
#[tokio::test]
async fn documents_that_are_sent_twice_at_the_same_time_are_paid_for_once() {
    let (sim, url) = sim().await;
    let once = stand(&url, &[]).await;
    let price = once.put(documents()).await.ok()["tokens"].as_u64().unwrap();
    once.gateway.shutdown().await;

    let stand = stand(&url, &[]).await;
    stand.put(json!([{"source": "other.md", "text": "The collection is there.\n"}])).await.ok();
    let before = sim.meter().total_tokens();
    sim.script(json!([{"kind": "embedding", "delay_ms": 500, "times": 1}])).unwrap();
    let answers = tokio::join!(stand.put(documents()), stand.put(documents()), stand.put(documents()));
    let mut outcomes = Vec::new();
    for put in [answers.0.ok(), answers.1.ok(), answers.2.ok()] {
        assert_eq!(put["results"][0]["chunks"], 1, "{put}");
        outcomes.push(put["results"][0]["outcome"].as_str().unwrap().to_owned());
    }
    outcomes.sort();
    assert_eq!(outcomes, ["indexed", "unchanged", "unchanged"]);
    assert_eq!(sim.meter().total_tokens() - before, price);
    assert_eq!(sources(&stand.query("how are tokens reserved").await.ok())[0], "budget.md");
    stand.gateway.shutdown().await;
}

/// Found with a real server that was stopped: the query waited for it until the gateway gave up, and got nothing.
#[tokio::test]
async fn a_query_whose_embedding_hangs_is_answered_lexically_within_its_bound() {
    let (sim, url) = sim().await;
    let settings = [("QUERY_EMBEDDING_TIMEOUT_MILLISECONDS", "200"), ("GATEWAY_TIMEOUT_SECONDS", "5")];
    let circuit = [("CIRCUIT_FAILURES", "3"), ("CIRCUIT_OPEN_SECONDS", "3600")];
    let stand = stand(&url, &[settings, circuit].concat()).await;
    stand.put(documents()).await.ok();
    sim.script(json!([{"kind": "embedding", "fault": "hang", "times": 100}])).unwrap();
    for number in 0..6 {
        let reply = stand.query(&format!("tokens reserved {number}")).await;
        assert_eq!(reply.header("x-atlas-degraded"), Some("lexical"));
        assert_eq!(sources(&reply.ok())[0], "budget.md");
    }
    assert_eq!(sim.steps_left(), 1, "the step is there still");
    assert_eq!(stand.metric("rag_embedding_query_calls_total").await, 3, "then nobody waits for it");
    assert_eq!(stand.metric("atlas_circuit_open{dependency=\"embedder\"}").await, 1);
    stand.gateway.shutdown().await;
}

#[tokio::test]
async fn a_failed_embedding_is_tried_again_and_nothing_half_done_is_left() {
    let (sim, url) = sim().await;
    let stand = stand(&url, &[]).await;
    sim.script(json!([{"kind": "embedding", "fault": "500"}])).unwrap();
    assert_eq!(stand.put(documents()).await.ok()["results"][0]["outcome"], "indexed");
    sim.script(json!([{"kind": "embedding", "fault": "500", "times": 9}])).unwrap();
    let more = json!([{"source": "more.md", "text": "One more document about volcanoes.\n"}]);
    let refused = stand.put(more.clone()).await;
    refused.problem(503, "upstream_unavailable");
    assert!(refused.header("retry-after").is_some());
    sim.script(json!([])).unwrap();
    assert!(!sources(&stand.query("volcanoes").await.ok()).contains(&"more.md"));
    assert_eq!(stand.put(more).await.ok()["results"][0]["outcome"], "indexed");
    assert_eq!(booked(&stand).await.1, 0, "no reservation is left open");
    stand.gateway.shutdown().await;
}

/// 300 chunks of one document: four calls of the embeddings API.
fn sections() -> Value {
    let sections = (0..300).map(|number| {
        format!("## Section {number}\n\n{}\n\n", format!("Word {number} of the volcano. ").repeat(4))
    });
    json!([{"source": "long.md", "text": sections.collect::<String>()}])
}

const SMALL: [(&str, &str); 2] = [("CHUNK_TOKENS", "32"), ("CHUNK_OVERLAP_TOKENS", "0")];

#[tokio::test]
async fn what_was_paid_for_is_not_paid_again_when_another_call_of_the_group_fails() {
    let (sim, url) = sim().await;
    let once = stand(&url, &SMALL).await;
    once.put(sections()).await.ok();
    let price = sim.meter().total_tokens();
    once.gateway.shutdown().await;

    let stand = stand(&url, &SMALL).await;
    sim.script(json!([{"kind": "embedding", "match": "Section 290", "fault": "500", "times": 9}])).unwrap();
    stand.put(sections()).await.problem(503, "upstream_unavailable");
    assert!(!sources(&stand.query("volcano").await.ok()).contains(&"long.md"), "all of it or nothing");
    sim.script(json!([])).unwrap();
    let put = stand.put(sections()).await.ok();
    assert_eq!(put["results"][0]["outcome"], "indexed");
    assert!(put["tokens"].as_u64().unwrap() < price / 2, "only what was missing: {put}");
    assert_eq!(sim.meter().total_tokens() - price, price, "each chunk was paid for once");
    assert!(stand.query("volcano").await.ok()[0]["similarity"].as_f64().unwrap() > 0.0);

    // What is written is not kept: a change of the text and back is paid for like any other.
    let before = sim.meter().total_tokens();
    stand.put(json!([{"source": "long.md", "text": "Nothing is left.\n"}])).await.ok();
    let short = sim.meter().total_tokens() - before;
    stand.put(sections()).await.ok();
    assert_eq!(sim.meter().total_tokens() - before, short + price);
    stand.gateway.shutdown().await;
}

#[tokio::test]
async fn without_budget_indexing_waits_and_queries_go_on_lexically() {
    let (sim, url) = sim().await;
    let dir = Arc::new(tempfile::tempdir().unwrap());
    let rich = stand_in(Arc::clone(&dir), &url, &[]).await;
    rich.put(documents()).await.ok();
    rich.gateway.shutdown().await;
    let spent = sim.meter().total_tokens();

    let poor = stand_in(dir, &url, &[("DAILY_TOKEN_BUDGET", "0")]).await;
    let reply = poor.query("tokens reserved").await;
    assert_eq!(reply.header("x-atlas-degraded"), Some("lexical"));
    assert_eq!(sources(&reply.ok()), ["budget.md"]);
    let more = json!([{"source": "more.md", "text": "One more document.\n"}]);
    let refused = poor.put(more.clone()).await;
    let detail = refused.problem(429, "budget_exhausted");
    assert!(detail.contains("DAILY_TOKEN_BUDGET"), "{detail}");
    assert!(refused.header("retry-after").is_some());
    let id = poor.post("/v1/embed_batch", more).await.ok()["job_id"].as_str().unwrap().to_owned();
    let status = poor.job_until(&id, Duration::from_secs(30), |job| job["note"].is_string()).await;
    assert_eq!(status["state"], "running");
    assert!(status["note"].as_str().unwrap().contains("token budget"), "{status}");
    assert_eq!(sim.meter().total_tokens(), spent, "nothing was called");
    poor.gateway.shutdown().await;
}

#[tokio::test]
async fn a_collection_of_another_model_is_a_clear_error_and_turns_readiness_red() {
    let (_sim, url) = sim().await;
    let dir = Arc::new(tempfile::tempdir().unwrap());
    let stand = stand_in(Arc::clone(&dir), &url, &[]).await;
    stand.put(documents()).await.ok();
    stand.gateway.shutdown().await;

    let other =
        stand_in(Arc::clone(&dir), &url, &[("OPENAI_EMBEDDING_MODEL", "text-embedding-3-large")]).await;
    let detail = other.query("tokens").await.problem(409, "embedding_mismatch");
    assert!(
        detail.contains("OPENAI_EMBEDDING_MODEL") && detail.contains("text-embedding-3-small"),
        "{detail}"
    );
    other.put(json!([{"source": "x.md", "text": "x"}])).await.problem(409, "embedding_mismatch");
    let list = other.get("/v1/documents").await.ok();
    assert_eq!(list["mismatch"], detail.as_str(), "whoever lists them to send what changed is told");
    let ready = other.get("/health/ready").await;
    assert_eq!(ready.status.as_u16(), 503);
    assert!(
        ready.body["checks"]["collection"]["message"].as_str().unwrap().contains("OPENAI_EMBEDDING_MODEL")
    );
    // Words need no model.
    let words = json!({"query": "tokens reserved", "mode": "lexical"});
    assert_eq!(sources(&other.post("/v1/query_chat", words).await.ok()), ["budget.md"]);
    // Another collection takes the new model.
    let put = other.request(reqwest::Method::PUT, "/v1/documents");
    other.send(put.json(&json!({"collection": "large", "documents": documents()}))).await.ok();
    other.gateway.shutdown().await;

    // Without any model the old collection is still searched, lexically; but nothing may be added.
    let none = stand_in(dir, &url, &[("OPENAI_EMBEDDING_MODEL", "none")]).await;
    let reply = none.query("tokens reserved").await;
    assert_eq!(reply.header("x-atlas-degraded"), Some("lexical"));
    assert_eq!(sources(&reply.ok()), ["budget.md"]);
    none.put(json!([{"source": "x.md", "text": "x"}])).await.problem(409, "embedding_mismatch");
    assert_eq!(none.get("/health/ready").await.status.as_u16(), 200);
    let list = none.get("/v1/documents").await.ok();
    assert!(list["words_only"].as_str().unwrap().contains("OPENAI_EMBEDDING_MODEL"), "{list}");
    none.gateway.shutdown().await;
}

#[tokio::test]
async fn a_lexical_collection_stays_lexical_and_says_so() {
    let (sim, url) = sim().await;
    let dir = Arc::new(tempfile::tempdir().unwrap());
    let lexical = stand_in(Arc::clone(&dir), &url, &[("OPENAI_EMBEDDING_MODEL", "none")]).await;
    lexical.put(documents()).await.ok();
    lexical.gateway.shutdown().await;
    let later = stand_in(dir, &url, &[]).await;
    let reply = later.query("tokens reserved").await;
    assert_eq!(reply.header("x-atlas-degraded"), Some("lexical"));
    reply.ok();
    later.put(json!([{"source": "x.md", "text": "x"}])).await.ok();
    assert_eq!(sim.meter().total_tokens(), 0);
    let ready = later.get("/health/ready").await.ok();
    let message = ready["checks"]["collection"]["message"].as_str().unwrap();
    assert!(message.contains("without embeddings") && message.contains("--rebuild"), "{message}");
    let list = later.get("/v1/documents").await.ok();
    assert_eq!(list["words_only"], message);
    assert_eq!(list["mismatch"], json!(null));
    later.gateway.shutdown().await;
}

#[tokio::test]
async fn an_address_that_is_taken_is_told_with_its_variable() {
    let stand = Stand::start(&[]).await;
    let dir = tempfile::tempdir().unwrap();
    let taken = stand.gateway.addr.to_string();
    let config = config(&dir, &[("GATEWAY_LISTEN", taken.as_str())]);
    let ledger = ledger::open(&config).await.unwrap();
    let error = Gateway::start(&config, ledger).await.expect_err("the port is taken").to_string();
    assert!(error.contains("GATEWAY_LISTEN"), "{error}");
    stand.gateway.shutdown().await;
}

/// Remembers what it was asked to embed.
#[derive(Default)]
struct Recorder(Mutex<Vec<String>>);

#[async_trait::async_trait]
impl Embedder for Recorder {
    async fn embed(&self, texts: &[String], _: &str) -> Result<Embeddings, ModelError> {
        self.0.lock().unwrap().extend(texts.iter().cloned());
        Ok(Embeddings {
            vectors: texts.iter().map(|text| vec![1.0, text.len() as f32]).collect(),
            usage: None,
        })
    }

    fn model(&self) -> &'static str {
        "recorder"
    }

    fn tokens_upper_bound(&self, texts: &[String]) -> Tokens {
        Tokens(texts.len() as u64)
    }
}

#[tokio::test]
async fn no_secret_leaves_for_the_embeddings_api_and_no_credential_is_stored() {
    let dir = Arc::new(tempfile::tempdir().unwrap());
    let config = config(&dir, &FAST);
    let recorder = Arc::new(Recorder::default());
    let embedder = Arc::clone(&recorder) as Arc<dyn Embedder>;
    let ledger = ledger::open(&config).await.unwrap();
    let gateway = Gateway::start_with(&config, ledger, Some(embedder)).await.unwrap();
    let stand = Stand { gateway, http: reqwest::Client::new(), dir };

    // Put together here, so that no scanner takes this file for a leak.
    let (aws, openai) = (format!("AKIA{}", "ABCDEFGHIJ234567"), format!("sk-proj-{}", "a1B2c3D4".repeat(5)));
    let documents = json!([
        {"source": "aws.md", "text": format!("one\nThe apple key is {aws}.\n")},
        {"source": "openai.md", "text": format!("The apple key is {openai}.\n"), "not_secret": true},
        {"source": "app.yml", "text": "apple:\n  password: letmein99\n"},
    ]);
    let put = stand.put(documents.clone()).await.ok();
    let outcomes: Vec<&str> =
        put["results"].as_array().unwrap().iter().map(|result| result["outcome"].as_str().unwrap()).collect();
    assert_eq!(outcomes, ["failed", "indexed", "indexed"]);
    let error = put["results"][0]["error"].as_str().unwrap();
    assert!(error.contains("an AWS access key in line 2") && error.contains("not_secret"), "{error}");
    assert!(!error.contains(&aws), "{error}");

    let batch = stand.post("/v1/embed_batch", json!([format!("apple {aws}")])).await.ok();
    let id = batch["job_id"].as_str().unwrap();
    let status = stand.job_until(id, Duration::from_secs(60), |job| job["state"] == "done").await;
    assert!(status["errors"][0].as_str().unwrap().contains("an AWS access key in line 1"), "{status}");
    assert_eq!((&status["documents"], &status["documents_done"]), (&json!(1), &json!(1)));
    let passages = stand.query(&format!("apple password: hunter22 {openai}")).await.ok();
    assert!(!passages.to_string().contains(&aws), "{passages}");
    let asked = recorder.0.lock().unwrap().join("\n");
    assert!(asked.contains("(redacted API key)") && asked.contains("password: (redacted)"), "{asked}");
    for secret in [&*aws, &openai, "letmein99", "hunter22"] {
        assert!(!asked.contains(secret), "{secret}: {asked}");
    }
    // What the job's row no longer says is in the log of the database for a while: it must never have been there.
    assert_eq!(files_with(stand.dir.path(), &aws), Vec::<std::path::PathBuf>::new());
    assert!(!files_with(stand.dir.path(), &openai).is_empty(), "what is stored is found in this way");
    stand.gateway.shutdown().await;
}

/// The files in a folder, at any depth, that have this text in them.
fn files_with(dir: &std::path::Path, text: &str) -> Vec<std::path::PathBuf> {
    let mut found = Vec::new();
    // The gateway is at work: what vanishes meanwhile is passed by.
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            found.extend(files_with(&path, text));
        } else if std::fs::read(&path)
            .unwrap_or_default()
            .windows(text.len())
            .any(|bytes| bytes == text.as_bytes())
        {
            found.push(path);
        }
    }
    found
}

/// A document of so many tokens, about, that no other has the words of.
fn long_document(number: usize, tokens: usize) -> Value {
    let words: Vec<String> = (0..tokens / 4).map(|word| format!("w{number}x{word}")).collect();
    let lines: Vec<String> = words.chunks(12).map(|words| format!("{}.\n", words.join(" "))).collect();
    json!({"source": format!("{number:02}.md"), "text": format!("# Part {number}\n\n{}", lines.concat())})
}

/// Some calls' worth of them.
fn many_documents() -> Value {
    (0..40).map(|number| long_document(number, 1500)).collect()
}

fn indexed_sources(list: &Value) -> Vec<&str> {
    let documents = list["documents"].as_array().unwrap();
    documents.iter().map(|document| document["source"].as_str().unwrap()).collect()
}

/// What indexing these costs when nothing goes wrong.
async fn cost_of(documents: &Value) -> u64 {
    let (sim, url) = sim().await;
    let stand = stand(&url, &[]).await;
    stand.put(documents.clone()).await.ok();
    stand.gateway.shutdown().await;
    sim.meter().total_tokens()
}

/// A job that met the end of the budget waits with what it has paid for, and a gateway with more budget finishes it
/// without paying for any of it again.
async fn job_ends_on_a_larger_budget(
    dir: Arc<tempfile::TempDir>,
    sim: &RunningSim,
    url: &str,
    cost: u64,
    begin: impl AsyncFnOnce(&Stand) -> Value,
) {
    let half = (cost / 2).to_string();
    let poor = stand_in(Arc::clone(&dir), url, &[("DAILY_TOKEN_BUDGET", half.as_str())]).await;
    let id = begin(&poor).await["job_id"].as_str().unwrap().to_owned();
    let waiting = poor.job_until(&id, LONG, |job| job["note"].is_string()).await;
    let paid = sim.meter().total_tokens();
    let done = waiting["documents_done"].as_u64().unwrap();
    assert!(done > 0 && done < 40 && paid > 0, "{waiting}");
    assert_eq!((waiting["tokens"].as_u64(), booked(&poor).await), (Some(paid), (paid, 0)));
    poor.gateway.shutdown().await;

    let rich = stand_in(dir, url, &[]).await;
    let ended = rich.job_until(&id, LONG, |job| job["state"] == "done").await;
    assert_eq!((&ended["documents_done"], ended["tokens"].as_u64()), (&json!(40), Some(cost)));
    assert_eq!((sim.meter().total_tokens(), booked(&rich).await), (cost, (cost, 0)));
    rich.gateway.shutdown().await;
}

#[tokio::test]
async fn what_was_paid_for_when_the_budget_ends_is_indexed_and_never_paid_again() {
    let documents = many_documents();
    let cost = cost_of(&documents).await;
    let (sim, url) = sim().await;
    let dir = Arc::new(tempfile::tempdir().unwrap());
    let half = (cost / 2).to_string();
    let poor = stand_in(Arc::clone(&dir), &url, &[("DAILY_TOKEN_BUDGET", half.as_str())]).await;
    let refused = poor.put(documents.clone()).await;
    let detail = refused.problem(429, "budget_exhausted");
    let paid = sim.meter().total_tokens();
    assert!(paid > 0);
    assert_eq!(booked(&poor).await, (paid, 0));
    let done = &refused.body["done"];
    assert_eq!(done["tokens"], paid);
    let finished: Vec<&str> =
        done["results"].as_array().unwrap().iter().map(|result| result["source"].as_str().unwrap()).collect();
    assert!(!finished.is_empty() && finished.len() < 40, "{detail}");
    assert!(detail.contains(&format!("finished before: {}", finished.len())), "{detail}");
    assert_eq!(indexed_sources(&poor.get("/v1/documents").await.ok()), finished, "in their order");
    poor.gateway.shutdown().await;

    let rich = stand_in(dir, &url, &[]).await;
    assert_eq!(rich.put(documents).await.ok()["tokens"], cost - paid);
    assert_eq!((sim.meter().total_tokens(), booked(&rich).await), (cost, (cost, 0)));
    assert_eq!(indexed_sources(&rich.get("/v1/documents").await.ok()).len(), 40);
    rich.gateway.shutdown().await;
}

#[tokio::test]
async fn a_document_larger_than_what_is_left_is_paid_for_once_and_never_seen_in_part() {
    let documents = json!([long_document(0, 1500), long_document(1, 60_000)]);
    let cost = cost_of(&documents).await;
    let (sim, url) = sim().await;
    let dir = Arc::new(tempfile::tempdir().unwrap());
    let mut paid = 0;
    // As on two days, each too poor for all of it.
    for share in [3, 2] {
        let budget = (cost * 2 / share).max(paid + 20_000).min(cost - 5000).to_string();
        let poor = stand_in(Arc::clone(&dir), &url, &[("DAILY_TOKEN_BUDGET", budget.as_str())]).await;
        let refused = poor.put(documents.clone()).await;
        refused.problem(429, "budget_exhausted");
        let now = sim.meter().total_tokens();
        assert!(now > paid, "{now} after {paid} of {cost}");
        assert_eq!(
            (refused.body["done"]["tokens"].as_u64(), booked(&poor).await),
            (Some(now - paid), (now, 0))
        );
        paid = now;
        assert_eq!(indexed_sources(&poor.get("/v1/documents").await.ok()), ["00.md"]);
        let words = json!({"query": "w1x0 w1x1 w1x2 w1x500 w1x4000", "mode": "lexical"});
        assert_eq!(poor.post("/v1/query_chat", words).await.ok(), json!([]));
        assert!(dir.path().join("vectors/paid.vectors").read_dir().unwrap().next().is_some());
        poor.gateway.shutdown().await;
    }
    let rich = stand_in(Arc::clone(&dir), &url, &[]).await;
    assert_eq!(rich.put(documents).await.ok()["tokens"], cost - paid);
    assert_eq!((sim.meter().total_tokens(), booked(&rich).await), (cost, (cost, 0)));
    let left = dir.path().join("vectors/paid.vectors").read_dir().unwrap().count();
    assert_eq!(left, 0, "what is written is not kept any more");
    rich.gateway.shutdown().await;
}

#[tokio::test]
async fn an_outage_after_some_calls_loses_none_of_them() {
    let documents = json!([long_document(0, 1500), long_document(1, 60_000), long_document(2, 1500)]);
    let cost = cost_of(&documents).await;
    let (sim, url) = sim().await;
    let stand = stand(&url, &[]).await;
    // Refused without being billed; the words are in one of the later calls of the large document.
    sim.script(json!([{"kind": "embedding", "match": "w1x9000", "fault": "503", "times": 50}])).unwrap();
    stand.put(documents.clone()).await.problem(503, "upstream_unavailable");
    sim.script(json!([])).unwrap();
    let paid = sim.meter().total_tokens();
    assert!(paid > 0 && paid < cost, "{paid} of {cost}");
    assert_eq!(stand.put(documents).await.ok()["tokens"], cost - paid);
    assert_eq!(sim.meter().total_tokens(), cost);
    stand.gateway.shutdown().await;
}

#[tokio::test]
async fn an_index_job_goes_on_from_where_the_budget_ended() {
    let documents = many_documents();
    let cost = cost_of(&documents).await;
    let (sim, url) = sim().await;
    let dir = Arc::new(tempfile::tempdir().unwrap());
    let begin = async |poor: &Stand| poor.post("/v1/embed_batch", documents).await.ok();
    job_ends_on_a_larger_budget(dir, &sim, &url, cost, begin).await;
}

#[tokio::test]
async fn an_index_job_outlasts_an_outage_and_pays_for_nothing_twice() {
    let documents = many_documents();
    let cost = cost_of(&documents).await;
    let (sim, url) = sim().await;
    let settings = [("CIRCUIT_FAILURES", "100"), ("RETRY_MAX_DELAY_SECONDS", "1")];
    let stand = stand(&url, &settings).await;
    // Many times as often as one call, and one job, was tried before.
    sim.script(json!([{"kind": "embedding", "fault": "500", "times": 40}])).unwrap();
    let id = stand.post("/v1/embed_batch", documents).await.ok()["job_id"].as_str().unwrap().to_owned();
    stand.job_until(&id, LONG, |job| job["note"].is_string()).await;
    let ended = stand.job_until(&id, LONG, |job| job["state"] != "running").await;
    assert_eq!((&ended["state"], &ended["note"]), (&json!("done"), &Value::Null), "{ended}");
    assert_eq!((&ended["documents_done"], ended["tokens"].as_u64()), (&json!(40), Some(cost)));
    assert_eq!((sim.meter().total_tokens(), booked(&stand).await), (cost, (cost, 0)));
    stand.gateway.shutdown().await;
}

#[tokio::test]
async fn a_gateway_that_stops_writes_what_its_jobs_have_paid_for() {
    // More calls than are made at once.
    let documents: Value = (0..60).map(|number| long_document(number, 1500)).collect();
    let cost = cost_of(&documents).await;
    let (sim, url) = sim().await;
    let dir = Arc::new(tempfile::tempdir().unwrap());
    let first = stand_in(Arc::clone(&dir), &url, &[]).await;
    sim.script(json!([{"kind": "embedding", "delay_ms": 500, "times": 50}])).unwrap();
    let id = first.post("/v1/embed_batch", documents).await.ok()["job_id"].as_str().unwrap().to_owned();
    // The meter counts when a call comes in.
    first.job_until(&id, LONG, |_| sim.meter().total_tokens() > 0).await;
    first.gateway.shutdown().await;
    let paid = sim.meter().total_tokens();
    assert!(paid > 0 && paid < cost, "{paid} of {cost}");
    sim.script(json!([])).unwrap();

    let second = stand_in(dir, &url, &[]).await;
    let ended = second.job_until(&id, LONG, |job| job["state"] == "done").await;
    assert_eq!(ended["tokens"].as_u64(), Some(cost));
    assert_eq!((sim.meter().total_tokens(), booked(&second).await), (cost, (cost, 0)));
    second.gateway.shutdown().await;
}

#[tokio::test]
async fn a_rebuild_goes_on_from_where_the_budget_ended() {
    let documents = many_documents();
    let cost = cost_of(&documents).await;
    let (sim, url) = sim().await;
    let dir = Arc::new(tempfile::tempdir().unwrap());
    let lexical = stand_in(Arc::clone(&dir), &url, &[("OPENAI_EMBEDDING_MODEL", "none")]).await;
    lexical.put(documents).await.ok();
    lexical.gateway.shutdown().await;

    let begin = async |poor: &Stand| poor.post("/v1/collections/atlas/rebuild", json!({})).await.ok();
    job_ends_on_a_larger_budget(dir, &sim, &url, cost, begin).await;
}

#[tokio::test]
async fn on_a_full_disk_nothing_is_written_or_paid_for_and_searches_go_on() {
    let (sim, url) = sim().await;
    let dir = Arc::new(tempfile::tempdir().unwrap());
    let stand = stand_in(Arc::clone(&dir), &url, &[]).await;
    stand.put(documents()).await.ok();
    stand.gateway.shutdown().await;
    let paid = sim.meter().total_tokens();

    // No disk is so large.
    let full = stand_in(Arc::clone(&dir), &url, &[("INDEX_MIN_FREE_BYTES", "18446744073709551615")]).await;
    let more = json!([{"source": "more.md", "text": "One more document.\n"}]);
    let refused = full.put(more.clone()).await;
    let detail = refused.problem(507, "disk_full");
    assert!(detail.contains("ATLAS_DATA_DIR") && detail.contains("MiB are free"), "{detail}");
    assert_eq!(refused.header("retry-after"), None, "somebody must make room");
    let new = full.request(reqwest::Method::PUT, "/v1/documents");
    full.send(new.json(&json!({"collection": "new", "documents": more.clone()})))
        .await
        .problem(507, "disk_full");
    assert_eq!(sim.meter().total_tokens(), paid, "nothing is paid for that could not be written");
    assert_eq!(sources(&full.query("how are tokens reserved and settled").await.ok())[0], "budget.md");
    assert_eq!(indexed_sources(&full.get("/v1/documents").await.ok()).len(), 3);
    let ready = full.get("/health/ready").await.ok();
    assert_eq!(ready["checks"]["vector_index"]["ok"], false);
    assert!(
        ready["checks"]["vector_index"]["message"].as_str().unwrap().contains("INDEX_MIN_FREE_BYTES"),
        "{ready}"
    );
    let id = full.post("/v1/embed_batch", more).await.ok()["job_id"].as_str().unwrap().to_owned();
    let waiting = full.job_until(&id, LONG, |job| job["note"].is_string()).await;
    assert!(waiting["note"].as_str().unwrap().contains("is full"), "{waiting}");
    full.gateway.shutdown().await;

    let roomy = stand_in(dir, &url, &[]).await;
    roomy.job_until(&id, LONG, |job| job["state"] == "done").await;
    assert_eq!(indexed_sources(&roomy.get("/v1/documents").await.ok()).len(), 4);
    roomy.gateway.shutdown().await;
}
