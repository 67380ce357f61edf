//! The HTTP API, on the embedded engine, without embeddings.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use std::{sync::Arc, time::Duration};

use reqwest::Method;
use serde_json::{Value, json};
use support::{Stand, sources};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

const GUIDE: &str = "# Guide\n\nHow to run the service.\n\n## Budget\n\nTokens are reserved before every call.\n\n## Queue\n\nMessages are pulled and acked.\n";

fn documents() -> Value {
    json!([
        {"source": "docs/guide.md", "text": GUIDE, "repo": "demo", "commit": "abc"},
        {"source": "src/lease.rs", "text": "//! Leases.\n\n/// Renews the lease while the run lives.\nfn renew_lease() {}\n", "repo": "demo"},
    ])
}

fn line(value: &Value) -> usize {
    usize::try_from(value.as_u64().unwrap()).unwrap()
}

#[tokio::test]
async fn what_is_put_is_found_with_its_exact_lines() {
    let stand = Stand::start(&[("CHUNK_TOKENS", "32"), ("CHUNK_OVERLAP_TOKENS", "0")]).await;
    let put = stand.put(documents()).await.ok();
    assert_eq!(put["results"][0]["outcome"], "indexed");
    assert_eq!(put["tokens"], 0);
    let reply = stand.query("when are tokens reserved?").await;
    assert_eq!(reply.header("x-atlas-degraded"), Some("lexical"));
    let passages = reply.ok();
    let best = &passages[0];
    assert_eq!(best["source"], "docs/guide.md");
    assert_eq!(best["similarity"], Value::Null, "there is no cosine without embeddings");
    assert_eq!(best["heading"], "Guide › Budget");
    assert_eq!(
        (best["lang"].as_str(), best["repo"].as_str(), best["commit"].as_str()),
        (Some("markdown"), Some("demo"), Some("abc"))
    );
    let (start, end) = (line(&best["start_line"]), line(&best["end_line"]));
    let lines: Vec<&str> = GUIDE.lines().collect();
    assert_eq!(best["text"], lines[start - 1..end].join("\n"));
    assert_eq!(sources(&stand.query("renew lease").await.ok())[0], "src/lease.rs");
    stand.gateway.shutdown().await;
}

#[tokio::test]
async fn an_unchanged_document_is_not_written_again_and_a_changed_one_is_replaced() {
    let stand = Stand::start(&[]).await;
    stand.put(documents()).await.ok();
    let written = stand.metric("rag_index_chunks_total").await;
    let again = stand.put(documents()).await.ok();
    assert!(
        again["results"].as_array().unwrap().iter().all(|result| result["outcome"] == "unchanged"),
        "{again}"
    );
    assert_eq!(stand.metric("rag_index_chunks_total").await, written);

    let changed =
        json!([{"source": "docs/guide.md", "text": "# Guide\n\nNow about volcanoes.\n", "repo": "demo"}]);
    assert_eq!(stand.put(changed).await.ok()["results"][0]["outcome"], "indexed");
    assert_eq!(sources(&stand.query("volcanoes").await.ok()), ["docs/guide.md"]);
    assert!(sources(&stand.query("messages pulled acked").await.ok()).is_empty(), "the old text is gone");
    let list = stand.get("/v1/documents?repo=demo").await.ok();
    assert_eq!(list["documents"].as_array().unwrap().len(), 2);

    let emptied = json!([{"source": "docs/guide.md", "text": "\n", "repo": "demo"}]);
    assert_eq!(stand.put(emptied).await.ok()["results"][0]["chunks"], 0);
    assert!(sources(&stand.query("volcanoes").await.ok()).is_empty());
    stand.gateway.shutdown().await;
}

#[tokio::test]
async fn a_document_that_was_indexed_before_it_was_committed_gets_its_commit() {
    let stand = Stand::start(&[]).await;
    stand.put(documents()).await.ok();
    let written = stand.metric("rag_index_chunks_total").await;
    let passage = async || stand.query("renew lease").await.ok()[0].clone();
    assert_eq!(passage().await["commit"], Value::Null);

    let mut committed = documents();
    for document in committed.as_array_mut().unwrap() {
        document["commit"] = json!("def");
        document["origin"] = json!("example.org/demo");
    }
    let again = stand.put(committed).await.ok();
    for result in again["results"].as_array().unwrap() {
        assert_eq!((&result["outcome"], &result["chunks"]), (&json!("unchanged"), &json!(1)), "{again}");
    }
    assert_eq!(stand.metric("rag_index_chunks_total").await, written, "no chunk is written again");
    let found = passage().await;
    assert_eq!((&found["source"], &found["commit"]), (&json!("src/lease.rs"), &json!("def")));
    let list = stand.get("/v1/documents?repo=demo").await.ok();
    let of = |n: usize| (list["documents"][n]["commit"].clone(), list["documents"][n]["origin"].clone());
    assert_eq!(of(0), (json!("abc"), json!("example.org/demo")), "an earlier commit has the same text");
    assert_eq!(of(1), (json!("def"), json!("example.org/demo")));
    stand.gateway.shutdown().await;
}

#[tokio::test]
async fn the_list_says_what_a_client_need_not_send() {
    let stand = Stand::start(&[]).await;
    assert_eq!(stand.get("/v1/documents").await.ok(), json!({"documents": []}));
    stand.put(documents()).await.ok();
    let list = stand.get("/v1/documents?repo=demo").await.ok();
    assert_eq!(list["documents"][0]["source"], "docs/guide.md");
    assert_eq!(list["documents"][0]["content_hash"], atlas_shared::gateway_api::content_hash(GUIDE));
    let dir = std::sync::Arc::clone(&stand.dir);
    stand.gateway.shutdown().await;

    // Other chunks would come out today: everything should be sent again.
    let stand = Stand::start_in(dir, &[("CHUNK_TOKENS", "64")]).await;
    let list = stand.get("/v1/documents?repo=demo").await.ok();
    assert_eq!(list["documents"][0]["content_hash"], "");
    assert_eq!(stand.put(documents()).await.ok()["results"][0]["outcome"], "indexed");
    stand.gateway.shutdown().await;
}

#[tokio::test]
async fn deleted_documents_are_gone() {
    let stand = Stand::start(&[]).await;
    stand.put(documents()).await.ok();
    let delete = |sources: Value| {
        stand.request(Method::DELETE, "/v1/documents").json(&json!({"repo": "demo", "sources": sources}))
    };
    let deleted = stand.send(delete(json!(["docs/guide.md", "never.md"]))).await.ok();
    assert_eq!(deleted, json!({"deleted": 1}));
    assert!(sources(&stand.query("tokens reserved").await.ok()).is_empty());
    assert_eq!(sources(&stand.query("renew lease").await.ok()), ["src/lease.rs"]);
    stand.gateway.shutdown().await;
}

#[tokio::test]
async fn filters_narrow_and_collapse_keeps_one_passage_a_file() {
    let stand = Stand::start(&[("CHUNK_TOKENS", "32"), ("CHUNK_OVERLAP_TOKENS", "0")]).await;
    let long = format!("# Apples\n\n{}", "An apple a day keeps the doctor away.\n\n".repeat(12));
    stand
        .put(json!([
            {"source": "docs/a.md", "text": long, "repo": "one"},
            {"source": "src/b.rs", "text": "// An apple.\nfn apple() {}\n", "repo": "two"},
            {"source": "docs/deep/c.md", "text": "An apple tree.\n", "tenant": "acme"},
        ]))
        .await
        .ok();
    let query = async |body: Value| {
        let mut request = json!({"query": "apple", "collapse_by_file": true});
        request.as_object_mut().unwrap().extend(body.as_object().unwrap().clone());
        let passages = stand.post("/v1/query_chat", request).await.ok();
        let mut found: Vec<String> = sources(&passages).into_iter().map(str::to_owned).collect();
        found.sort();
        found
    };
    assert_eq!(query(json!({})).await, ["docs/a.md", "src/b.rs"], "a tenant's passages are not everybody's");
    assert!(query(json!({"collapse_by_file": false, "passage_tokens": 0})).await.len() > 2);
    assert_eq!(query(json!({"filter": {"lang": "rust"}})).await, ["src/b.rs"]);
    assert_eq!(query(json!({"filter": {"lang": "Rust"}})).await, ["src/b.rs"], "without case");
    assert_eq!(query(json!({"filter": {"repo": "one"}})).await, ["docs/a.md"]);
    assert_eq!(query(json!({"filter": {"path": "docs/*.md"}})).await, ["docs/a.md"]);
    assert_eq!(query(json!({"filter": {"path": "**/*.rs"}})).await, ["src/b.rs"]);
    assert_eq!(query(json!({"filter": {"path": "nowhere/**"}})).await, Vec::<String>::new());
    assert_eq!(
        query(json!({"filter": {"tenant": "acme", "path": "docs/**"}})).await,
        ["docs/a.md", "docs/deep/c.md"]
    );
    assert_eq!(query(json!({"filter": {"tenant": "other"}})).await, ["docs/a.md", "src/b.rs"]);
    assert_eq!(query(json!({"top_k": 1})).await.len(), 1);
    stand.gateway.shutdown().await;
}

#[tokio::test]
async fn equal_queries_get_equal_answers_and_the_second_comes_from_the_cache() {
    let stand = Stand::start(&[]).await;
    let twins: Vec<Value> = (0..30)
        .map(|number| json!({"source": format!("{number:02}.md"), "text": "the very same apple\n"}))
        .collect();
    stand.put(json!(twins)).await.ok();
    let first = stand.query("apple").await.ok();
    assert_eq!(sources(&first), (0..15).map(|number| format!("{number:02}.md")).collect::<Vec<_>>());
    assert_eq!(stand.metric("rag_cache_hits_total").await, 0);
    assert_eq!(stand.query("  apple ").await.ok(), first);
    assert_eq!(stand.metric("rag_cache_hits_total").await, 1);
    assert_eq!(stand.post("/v1/admin/cache/clear", json!({})).await.status.as_u16(), 204);
    assert_eq!(stand.query("apple").await.ok(), first);
    assert_eq!(stand.metric("rag_cache_hits_total").await, 1);
    // A change of the index is seen at once, cache or not.
    stand.put(json!([{"source": "00.md", "text": "a pear\n"}])).await.ok();
    assert_eq!(sources(&stand.query("apple").await.ok())[0], "01.md");
    stand.gateway.shutdown().await;
}

#[tokio::test]
async fn a_batch_becomes_a_job() {
    let stand = Stand::start(&[]).await;
    let reply = stand
        .post(
            "/v1/embed_batch?collection=texts",
            json!(["Hello apple.", {"source": "a.md", "text": "A pear."}, {"source": " ", "text": "x"}]),
        )
        .await;
    assert_eq!(reply.status.as_u16(), 202);
    let id = reply.ok()["job_id"].as_str().unwrap().to_owned();
    let status = stand.job_until(&id, Duration::from_secs(30), |job| job["state"] == "done").await;
    assert_eq!(
        (&status["documents"], &status["documents_done"], &status["chunks"]),
        (&json!(3), &json!(3), &json!(2))
    );
    assert!(status["errors"][0].as_str().unwrap().contains("`source` is empty"), "{status}");
    let query = json!({"query": "apple", "collection": "texts"});
    let passages = stand.post("/v1/query_chat", query).await.ok();
    assert!(sources(&passages)[0].starts_with("text-"));
    let collections = stand.get("/v1/collections").await.ok();
    assert_eq!(
        collections,
        json!([{"name": "texts", "chunks": 2, "embedding_model": null, "embedding_size": null, "generation": "texts@1"}])
    );
    stand.gateway.shutdown().await;
}

#[tokio::test]
async fn bad_requests_are_told_what_is_wrong() {
    let stand = Stand::start(&[("MAX_BODY_BYTES", "4096")]).await;
    let query = async |body: Value| stand.post("/v1/query_chat", body).await;
    assert!(query(json!({"query": " "})).await.problem(422, "invalid_request").contains("`query`"));
    for top_k in [0, 101, 1000] {
        let detail = query(json!({"query": "x", "top_k": top_k})).await.problem(422, "invalid_request");
        assert!(detail.contains("1 to 100"), "{detail}");
    }
    query(json!({"query": "x", "top_k": -1})).await.problem(422, "invalid_request");
    query(json!({"query": "x", "relevancy_threshold": 1.5})).await.problem(422, "invalid_request");
    let detail = query(json!({"query": "x", "topk": 3})).await.problem(422, "invalid_request");
    assert!(detail.contains("unknown field `topk`"), "{detail}");
    query(json!({"top_k": 3})).await.problem(422, "invalid_request");
    query(json!(["x"])).await.problem(422, "invalid_request");
    query(json!({"query": "x", "collection": "../etc"})).await.problem(422, "invalid_request");
    query(json!({"query": "x", "collection": ".hidden"})).await.problem(422, "invalid_request");
    stand.put(json!([{"source": "a.md", "text": "x"}])).await.ok();
    query(json!({"query": "x", "filter": {"path": "[a"}})).await.problem(422, "invalid_request");
    query(json!({"query": "x", "collection": "nowhere"})).await.problem(404, "unknown_collection");
    for (body, status, kind) in [
        ("not json", 400, "invalid_json"),
        ("", 400, "invalid_json"),
        ("{\"query\": \"\u{0}", 400, "invalid_json"),
    ] {
        let request = stand.request(Method::POST, "/v1/query_chat").body(body);
        stand.send(request).await.problem(status, kind);
    }
    let deep = "[".repeat(2000);
    stand
        .send(stand.request(Method::POST, "/v1/query_chat").body(deep))
        .await
        .problem(422, "invalid_request");
    stand
        .send(stand.request(Method::POST, "/v1/query_chat").body(vec![0xff, 0xfe]))
        .await
        .problem(400, "invalid_json");
    let large = json!([{"source": "a", "text": "x".repeat(5000)}]);
    assert!(stand.put(large).await.problem(413, "body_too_large").contains("MAX_BODY_BYTES"));
    stand.put(json!([])).await.problem(422, "invalid_request");
    stand.post("/v1/embed_batch", json!([1])).await.problem(422, "invalid_request");
    stand.get("/v1/jobs/none").await.problem(404, "unknown_job");
    stand.get("/v1/documents?colection=x").await.problem(422, "invalid_request");
    stand.get("/v1/nowhere").await.problem(404, "not_found");
    stand.get("/v1/query_chat").await.problem(405, "method_not_allowed");
    let gone = stand
        .request(Method::DELETE, "/v1/documents")
        .json(&json!({"collection": "nowhere", "sources": ["a"]}));
    stand.send(gone).await.problem(404, "unknown_collection");
    // After all that it still works.
    stand.query("anything").await.ok();
    assert!(stand.metric("rag_errors_total{type=\"invalid_json\"}").await >= 4);
    stand.gateway.shutdown().await;
}

#[tokio::test]
async fn a_document_that_cannot_be_indexed_does_not_stop_the_others() {
    let stand = Stand::start(&[]).await;
    let put = stand
        .put(json!([
            {"source": "", "text": "x"},
            {"source": "a.md", "text": "apple"},
            {"source": "a.md", "text": "pear"},
            {"source": "nul\u{0}.md", "text": "x"},
            {"source": "ok.md", "text": "nul \u{0} inside"},
        ]))
        .await
        .ok();
    let outcomes: Vec<&str> =
        put["results"].as_array().unwrap().iter().map(|result| result["outcome"].as_str().unwrap()).collect();
    assert_eq!(outcomes, ["failed", "indexed", "failed", "failed", "indexed"]);
    assert_eq!(sources(&stand.query("apple").await.ok()), ["a.md"]);
    stand.gateway.shutdown().await;
}

#[tokio::test]
async fn an_empty_default_collection_finds_nothing_and_says_no_error() {
    let stand = Stand::start(&[]).await;
    assert_eq!(stand.query("anything").await.ok(), json!([]));
    stand.gateway.shutdown().await;
}

#[tokio::test]
async fn callers_need_a_key_and_probes_do_not() {
    let stand = Stand::start(&[("API_KEYS", "worker:key-of-the-worker,ci:key-of-the-ci")]).await;
    let with = |name: &str, value: &str| stand.request(Method::GET, "/v1/collections").header(name, value);
    stand.get("/v1/collections").await.problem(401, "unauthorized");
    stand.send(with("authorization", "Bearer wrong-key-entirely")).await.problem(401, "unauthorized");
    stand.send(with("authorization", "Basic key-of-the-worker")).await.problem(401, "unauthorized");
    stand.send(with("x-api-key", "key-of-the-worke")).await.problem(401, "unauthorized");
    stand.send(with("authorization", "Bearer key-of-the-worker")).await.ok();
    stand.send(with("authorization", "bearer key-of-the-ci")).await.ok();
    stand.send(with("x-api-key", "key-of-the-ci")).await.ok();
    for open in ["/health/live", "/health/ready", "/healthz", "/health", "/metrics", "/openapi.json"] {
        assert_eq!(stand.get(open).await.status.as_u16(), 200, "{open}");
    }
    stand.get("/v1/nowhere").await.problem(404, "not_found");
    stand.gateway.shutdown().await;
}

#[tokio::test]
async fn a_caller_that_asks_too_often_is_told_to_wait() {
    let stand = Stand::start(&[
        ("API_KEYS", "one:key-of-caller-one,two:key-of-caller-two"),
        ("RATE_LIMIT_REQUESTS", "3"),
        ("RATE_LIMIT_WINDOW_SECONDS", "3600"),
    ])
    .await;
    let ask =
        async |key: &str| stand.send(stand.request(Method::GET, "/v1/collections").bearer_auth(key)).await;
    for _ in 0..3 {
        ask("key-of-caller-one").await.ok();
    }
    let refused = ask("key-of-caller-one").await;
    refused.problem(429, "rate_limited");
    let wait: u64 = refused.header("retry-after").unwrap().parse().unwrap();
    assert!((1..=1200).contains(&wait), "{wait}");
    ask("key-of-caller-two").await.ok();
    stand.gateway.shutdown().await;
}

#[tokio::test]
async fn who_sends_half_a_request_is_not_waited_for() {
    let stand = Stand::start(&[("GATEWAY_HEADER_TIMEOUT_SECONDS", "1")]).await;
    let mut stream = tokio::net::TcpStream::connect(stand.gateway.addr).await.unwrap();
    stream.write_all(b"GET /v1/coll").await.unwrap();
    let mut answer = Vec::new();
    tokio::time::timeout(Duration::from_secs(30), stream.read_to_end(&mut answer))
        .await
        .expect("the gateway closes the connection")
        .unwrap();
    stand.query("anything").await.ok();
    stand.gateway.shutdown().await;
}

#[tokio::test]
async fn readiness_tells_what_is_well_and_what_is_missing() {
    let stand = Stand::start(&[]).await;
    let ready = stand.get("/health/ready").await.ok();
    assert_eq!(ready["checks"]["vector_index"]["ok"], true);
    assert_eq!(ready["checks"]["embedder"]["ok"], false);
    assert_eq!(ready["checks"]["embedder"]["required"], false);
    assert!(ready["checks"]["embedder"]["message"].as_str().unwrap().contains("OPENAI_API_KEY"));
    stand.gateway.shutdown().await;
}

#[tokio::test]
async fn the_index_outlives_the_gateway() {
    let stand = Stand::start(&[]).await;
    stand.put(documents()).await.ok();
    let dir = std::sync::Arc::clone(&stand.dir);
    stand.gateway.shutdown().await;
    let stand = Stand::start_in(dir, &[]).await;
    assert_eq!(sources(&stand.query("renew lease").await.ok()), ["src/lease.rs"]);
    let again = stand.put(documents()).await.ok();
    assert_eq!(again["results"][0]["outcome"], "unchanged");
    stand.gateway.shutdown().await;
}

#[tokio::test]
async fn a_request_id_is_kept_and_nonsense_is_replaced() {
    let stand = Stand::start(&[]).await;
    let ask = |id: &str| stand.request(Method::GET, "/health/live").header("x-request-id", id);
    assert_eq!(stand.send(ask("run-17.1")).await.header("x-request-id"), Some("run-17.1"));
    let replaced = stand.send(ask("with spaces")).await;
    assert_ne!(replaced.header("x-request-id"), Some("with spaces"));
    stand.gateway.shutdown().await;
}

/// While a file is replaced again and again, every answer holds passages of one revision of it only,
/// and never none.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_never_sees_two_revisions_of_a_file_and_never_none() {
    let stand =
        Stand::start(&[("CHUNK_TOKENS", "32"), ("CHUNK_OVERLAP_TOKENS", "0"), ("CACHE_TTL", "0")]).await;
    let revision = |number: u32| {
        let text =
            format!("An apple of revision{number}, which is one of many apples in this file.\n\n").repeat(8);
        json!([{"source": "apples.md", "text": text}])
    };
    stand.put(revision(0)).await.ok();
    let writing = async {
        for number in 1..15 {
            stand.put(revision(number)).await.ok();
        }
    };
    let reading = async {
        for _ in 0..40 {
            let passages = stand.query("apple").await.ok();
            let revisions: std::collections::BTreeSet<String> = passages
                .as_array()
                .unwrap()
                .iter()
                .map(|passage| {
                    let text = passage["text"].as_str().unwrap();
                    let from = text.find("revision").unwrap();
                    text[from..].chars().take_while(char::is_ascii_alphanumeric).collect()
                })
                .collect();
            assert_eq!(revisions.len(), 1, "{revisions:?}");
        }
    };
    tokio::join!(writing, reading);
    stand.gateway.shutdown().await;
}

#[tokio::test]
async fn without_its_engine_the_gateway_starts_and_says_what_is_missing() {
    let settings = [
        ("QDRANT_URL", "http://127.0.0.1:9"),
        ("RETRY_MAX_ATTEMPTS", "1"),
        ("INDEX_JOB_PATIENCE_SECONDS", "0"),
    ];
    let stand = Stand::start(&settings).await;
    let ready = stand.get("/health/ready").await;
    assert_eq!(ready.status.as_u16(), 503);
    assert!(ready.body["checks"]["vector_index"]["message"].as_str().unwrap().contains("QDRANT_URL"));
    assert_eq!(stand.get("/health/live").await.status.as_u16(), 200);
    let refused = stand.query("anything").await;
    refused.problem(503, "upstream_unavailable");
    assert!(refused.header("retry-after").is_some());
    stand.put(documents()).await.problem(503, "upstream_unavailable");
    let id = stand.post("/v1/embed_batch", json!(["text"])).await.ok()["job_id"].as_str().unwrap().to_owned();
    let status = stand.job_until(&id, Duration::from_secs(30), |job| job["state"] == "failed").await;
    assert!(!status["errors"].as_array().unwrap().is_empty());
    stand.gateway.shutdown().await;
}

/// Waits until a job has ended, and gives its status.
async fn ended(stand: &Stand, id: &str) -> Value {
    stand
        .job_until(id, Duration::from_secs(120), |job| job["state"] == "done" || job["state"] == "failed")
        .await
}

#[tokio::test]
async fn jobs_outlive_the_gateway() {
    let stand = Stand::start(&[]).await;
    let batch: Vec<Value> = (0..900)
        .map(|n| json!({"source": format!("f{n}.md"), "text": format!("# File {n}\n\nAbout number {n}.\n")}))
        .collect();
    let mut ids = Vec::new();
    for part in batch.chunks(300) {
        let created = stand.post("/v1/embed_batch", json!(part)).await.ok();
        ids.push(created["job_id"].as_str().unwrap().to_owned());
    }
    let dir = Arc::clone(&stand.dir);
    // The first one may be at work, the last one cannot be done yet.
    stand.gateway.shutdown().await;

    let stand = Stand::start_in(dir, &[]).await;
    for id in &ids {
        let status = ended(&stand, id).await;
        assert_eq!(status["state"], "done", "{status}");
        assert_eq!(status["documents_done"], 300, "{status}");
    }
    let list = stand.get("/v1/documents").await.ok();
    assert_eq!(list["documents"].as_array().unwrap().len(), 900);
    let unknown = "018f0000-0000-7000-8000-000000000000";
    stand.get(&format!("/v1/jobs/{unknown}")).await.problem(404, "unknown_job");
    stand.gateway.shutdown().await;
}

#[tokio::test]
async fn a_collection_is_rebuilt_while_it_is_searched_and_its_old_generation_is_kept() {
    let stand = Stand::start(&[]).await;
    stand.put(documents()).await.ok();
    let before = stand.query("lease").await.ok();
    let started = stand.post("/v1/collections/atlas/rebuild", json!({})).await.ok();
    assert_eq!((&started["generation"], &started["old"]), (&json!("atlas@2"), &json!("atlas@1")));
    let id = started["job_id"].as_str().unwrap();
    loop {
        let found = stand.query("lease").await.ok();
        assert_eq!(sources(&found), sources(&before), "there is an answer at every moment");
        let status = stand.get(&format!("/v1/jobs/{id}")).await.ok();
        assert_ne!(status["state"], "failed", "{status}");
        if status["state"] == "done" {
            break;
        }
    }
    let collections = stand.get("/v1/collections").await.ok();
    let names: Vec<(&str, &Value)> = collections
        .as_array()
        .unwrap()
        .iter()
        .map(|line| (line["name"].as_str().unwrap(), &line["generation"]))
        .collect();
    assert_eq!(names, [("atlas", &json!("atlas@2")), ("atlas@1", &Value::Null)]);
    assert_eq!(collections[0]["chunks"], collections[1]["chunks"]);
    assert_eq!(sources(&stand.query("lease").await.ok()), sources(&before));

    // Back, and forth again, and then the old one goes.
    let uses = |generation: &str| {
        stand
            .request(Method::PUT, "/v1/collections/atlas/generation")
            .json(&json!({"generation": generation}))
    };
    assert_eq!(stand.send(uses("atlas@1")).await.status.as_u16(), 204);
    let delete = || stand.request(Method::DELETE, "/v1/collections/atlas@1");
    stand.send(delete()).await.problem(409, "generation_in_use");
    assert_eq!(stand.send(uses("atlas@2")).await.status.as_u16(), 204);
    stand.send(uses("atlas@7")).await.problem(404, "unknown_collection");
    stand.send(uses("other@1")).await.problem(404, "unknown_collection");
    stand.send(uses("atlas")).await.problem(422, "invalid_request");
    let dropped = stand.send(delete()).await;
    assert_eq!(dropped.status.as_u16(), 204, "{}", dropped.text);
    assert_eq!(sources(&stand.query("lease").await.ok()), sources(&before));
    // What is put from now on goes into the new one, and is known there.
    let again = stand.put(documents()).await.ok();
    let results = again["results"].as_array().unwrap();
    assert!(results.iter().all(|result| result["outcome"] == "unchanged"), "{again}");
    stand.post("/v1/collections/nothing/rebuild", json!({})).await.problem(404, "unknown_collection");
    stand.gateway.shutdown().await;
}

#[tokio::test]
async fn only_a_rebuild_makes_generations_and_our_own_collection_is_nobodys() {
    let stand = Stand::start(&[]).await;
    stand.put(documents()).await.ok();
    let put = |name: &str| {
        let body = json!({"collection": name, "documents": documents()});
        stand.send(stand.request(Method::PUT, "/v1/documents").json(&body))
    };
    put("atlas@9").await.problem(404, "unknown_collection");
    for name in ["atlas@0", "atlas@007", "atlas@18446744073709551615", "atlas.versions"] {
        put(name).await.problem(422, "invalid_request");
    }
    put("atlas@1").await.ok();
    let drop = stand.request(Method::DELETE, "/v1/collections/atlas.versions");
    stand.send(drop).await.problem(422, "invalid_request");
    let started = stand.post("/v1/collections/atlas/rebuild", json!({})).await.ok();
    assert_eq!(started["generation"], "atlas@2");
    stand.gateway.shutdown().await;
}

#[tokio::test]
async fn no_name_of_a_collection_gives_answers_from_before_a_change() {
    let stand = Stand::start(&[]).await;
    let texts = async |name: &str| {
        let found = stand.post("/v1/query_chat", json!({"query": "apple", "collection": name})).await.ok();
        let texts: Vec<String> =
            found.as_array().unwrap().iter().map(|p| p["text"].as_str().unwrap().to_owned()).collect();
        texts.concat()
    };
    let put = |text: &str| stand.put(json!([{"source": "a.md", "text": format!("An apple, {text}.\n")}]));
    put("green").await.ok();
    assert!(texts("atlas").await.contains("green") && texts("atlas@1").await.contains("green"));
    put("red").await.ok();
    assert!(texts("atlas@1").await.contains("red"), "a generation is its collection by another name");

    let started = stand.post("/v1/collections/atlas/rebuild", json!({})).await.ok();
    assert_eq!(ended(&stand, started["job_id"].as_str().unwrap()).await["state"], "done");
    put("brown").await.ok();
    assert!(texts("atlas").await.contains("brown") && texts("atlas@1").await.contains("red"));
    let uses = json!({"generation": "atlas@1"});
    let back = stand.request(Method::PUT, "/v1/collections/atlas/generation").json(&uses);
    assert_eq!(stand.send(back).await.status.as_u16(), 204);
    assert!(texts("atlas").await.contains("red"), "the switch is seen at once, in spite of the cache");
    stand.gateway.shutdown().await;
}

#[tokio::test]
async fn a_repository_below_an_allowed_root_is_indexed_and_followed() {
    let repos = tempfile::tempdir().unwrap();
    let shop = repos.path().join("shop");
    std::fs::create_dir_all(shop.join("docs")).unwrap();
    std::fs::write(shop.join("docs/door.md"), "# Door\n\nHow the door is locked.\n").unwrap();
    std::fs::write(shop.join("README.md"), "# Shop\n\nSells apples.\n").unwrap();
    std::fs::write(shop.join(".env"), "KEY=secret\n").unwrap();
    let root = repos.path().display().to_string();
    let stand = Stand::start(&[("INDEX_ALLOWED_ROOTS", root.as_str())]).await;

    let index = async |body: Value| {
        let id = stand.post("/v1/index", body).await.ok()["job_id"].as_str().unwrap().to_owned();
        let status = ended(&stand, &id).await;
        assert_eq!(status["state"], "done", "{status}");
        status
    };
    let listed = async || -> Vec<String> {
        let list = stand.get("/v1/documents?repo=shop").await.ok();
        let documents = list["documents"].as_array().unwrap();
        documents.iter().map(|document| document["source"].as_str().unwrap().to_owned()).collect()
    };
    // A part by the folder's path, then all by its name.
    index(json!({"repo": shop, "path": "docs"})).await;
    assert_eq!(listed().await, ["docs/door.md"]);
    let counted = |status: &Value| {
        (status["documents"].clone(), status["documents_done"].clone(), status["chunks"].clone())
    };
    assert_eq!(counted(&index(json!({"repo": "shop"})).await), (json!(2), json!(2), json!(1)), "one is new");
    assert_eq!(listed().await, ["README.md", "docs/door.md"]);
    assert_eq!(
        counted(&index(json!({"repo": "shop"})).await),
        (json!(2), json!(2), json!(0)),
        "nothing changed"
    );

    std::fs::remove_file(shop.join("docs/door.md")).unwrap();
    index(json!({"repo": "shop", "path": "docs/door.md"})).await;
    assert_eq!(listed().await, ["README.md"]);

    for repo in ["/etc", "../etc", "https://example.org/shop.git"] {
        let detail = stand.post("/v1/index", json!({"repo": repo})).await.problem(422, "source_not_allowed");
        assert!(detail.contains("INDEX_ALLOWED"), "{detail}");
    }
    stand.post("/v1/index", json!({"repo": ""})).await.problem(422, "invalid_request");
    stand.post("/v1/index", json!({"repo": "shop", "path": "../x"})).await.problem(422, "invalid_request");
    stand.gateway.shutdown().await;
}

#[tokio::test]
async fn a_job_that_finds_nothing_where_it_was_sent_says_so() {
    let repos = tempfile::tempdir().unwrap();
    let shop = repos.path().join("shop");
    std::fs::create_dir_all(shop.join("docs")).unwrap();
    std::fs::create_dir_all(shop.join("empty")).unwrap();
    std::fs::write(shop.join("docs/door.md"), "# Door\n\nHow the door is locked.\n").unwrap();
    std::os::unix::fs::symlink("docs", shop.join("link")).unwrap();
    let root = repos.path().display().to_string();
    let stand = Stand::start(&[("INDEX_ALLOWED_ROOTS", root.as_str())]).await;
    let index = async |body: Value| {
        let id = stand.post("/v1/index", body).await.ok()["job_id"].as_str().unwrap().to_owned();
        ended(&stand, &id).await
    };
    let failed = async |body: Value| {
        let status = index(body).await;
        assert_eq!(status["state"], "failed", "{status}");
        status["errors"][0].as_str().unwrap().to_owned()
    };
    let listed = async || -> Vec<String> {
        let list = stand.get("/v1/documents?repo=shop").await.ok();
        let documents = list["documents"].as_array().unwrap();
        documents.iter().map(|document| document["source"].as_str().unwrap().to_owned()).collect()
    };
    let said = failed(json!({"repo": "shop", "path": "dosc"})).await;
    assert!(said.contains("\"dosc\" is not in \"shop\""), "{said}");
    let said = failed(json!({"repo": "shop", "path": "empty"})).await;
    assert!(said.contains("nothing to index in \"empty\" of \"shop\""), "{said}");

    // One file has one name, whichever way it was reached.
    assert_eq!(index(json!({"repo": "shop", "path": "link"})).await["documents"], 1);
    assert_eq!(listed().await, ["docs/door.md"]);
    assert_eq!(index(json!({"repo": "shop"})).await["documents_done"], 1);
    assert_eq!(listed().await, ["docs/door.md"]);
    // So too where it was indexed by the other name before.
    let doubled = json!([{"source": "link/door.md", "text": "# Door\n", "repo": "shop"}]);
    stand.put(doubled).await.ok();
    assert_eq!(index(json!({"repo": "shop", "path": "link"})).await["state"], "done");
    assert_eq!(listed().await, ["docs/door.md"]);

    std::fs::remove_file(shop.join("docs/door.md")).unwrap();
    let said = failed(json!({"repo": "shop"})).await;
    assert!(said.contains("1 documents of it are indexed, and stay so"), "{said}");
    assert_eq!(listed().await, ["docs/door.md"], "an empty repository is taken for a mistake");
    std::fs::remove_dir(shop.join("docs")).unwrap();
    assert_eq!(index(json!({"repo": "shop", "path": "docs"})).await["state"], "done");
    assert_eq!(listed().await, [""; 0], "a part of it may go");
    stand.gateway.shutdown().await;
}
