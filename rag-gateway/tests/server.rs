//! The gateway on a real Qdrant server: that its answers are those of the embedded engine, and what
//! happens when the server dies, comes back, or wants a key.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use std::{fs, path::Path, time::Duration};

use atlas_openai_sim::{Sim, SimOptions};
use atlas_test_support::{fleet::workspace, qdrant::Qdrant};
use reqwest::Method;
use serde_json::{Value, json};
use support::{Stand, sources};

/// Nothing is waited for longer: readiness looks every 10 s.
const BOUND: Duration = Duration::from_secs(60);

/// Many small chunks, no answer from a cache.
const SMALL_CHUNKS: [(&str, &str); 3] =
    [("CHUNK_TOKENS", "64"), ("CHUNK_OVERLAP_TOKENS", "0"), ("CACHE_TTL", "0")];

const QUERIES: [&str; 15] = [
    "docs/MODELS.md",
    "what does OPERATIONS.md say about a rebuild",
    "how is the daily token budget enforced?",
    "what happens when the vector index is down",
    "RUN_TIMEOUT_SECONDS",
    "claim a run with a fencing token",
    "dead letters",
    "qdrant",
    "the of and",
    "zebra crossing",
    "支払期限",
    "請求書の番号",
    "订单 退款",
    "결제 기한",
    "ใบแจ้งหนี้",
];

/// Of languages without spaces between words, whose runs of letters are weighed in pairs: name, text, and what
/// finds it.
const UNSPACED: [(&str, &str, &str); 4] = [
    ("docs/ja.md", "# 請求書\n\n請求書の支払期限は月末です。番号は発行順です。\n", "支払期限"),
    ("docs/zh.md", "# 退款\n\n订单取消后七天内退款到原账户。\n", "取消退款"),
    ("docs/ko.md", "# 결제\n\n결제기한은 매월 말일입니다.\n", "결제기한"),
    ("docs/th.md", "# การชำระเงิน\n\nกำหนดชำระใบแจ้งหนี้คือสิ้นเดือน\n", "ใบแจ้งหนี้"),
];

async fn server(test: &str, settings: &[(&str, &str)]) -> Option<Qdrant> {
    match Qdrant::start_with(settings).await {
        Ok(server) => Some(server),
        Err(reason) => {
            atlas_test_support::skip_everywhere(test, "a Qdrant server", &reason);
            None
        }
    }
}

async fn on(server: &Qdrant, more: &[(&str, &str)]) -> Stand {
    let url = server.url();
    let settings: Vec<_> = [("QDRANT_URL", url.as_str()), ("RETRY_MAX_ATTEMPTS", "1")]
        .into_iter()
        .chain(more.iter().copied())
        .collect();
    Stand::start(&settings).await
}

/// Looks until `look` sees what it wants; bounded.
async fn eventually<T>(what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    tokio::time::timeout(BOUND, async {
        let mut ticks = tokio::time::interval(Duration::from_millis(100));
        loop {
            ticks.tick().await;
            if let Some(seen) = look().await {
                return seen;
            }
        }
    })
    .await
    .unwrap_or_else(|_| panic!("waited {BOUND:?} for: {what}"))
}

/// Our own documentation, and some in other scripts.
fn corpus() -> Vec<Value> {
    let mut documents = Vec::new();
    for folder in ["docs", "migrations"] {
        for entry in fs::read_dir(workspace().join(folder)).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|extension| extension == "md") {
                documents.push(document(&path));
            }
        }
    }
    documents
        .extend(UNSPACED.map(|(source, text, _)| json!({"source": source, "text": text, "repo": "atlas"})));
    documents.sort_by_key(|document| document["source"].as_str().unwrap().to_owned());
    documents
}

fn document(path: &Path) -> Value {
    let source = path.strip_prefix(workspace()).unwrap().display().to_string();
    json!({"source": source, "text": fs::read_to_string(path).unwrap(), "repo": "atlas"})
}

/// The same question to both: the same passages in the same order, and scores that differ in rounding only.
async fn assert_equal_answers(embedded: &Stand, server: &Stand) {
    for query in QUERIES {
        for filter in [json!({}), json!({"path": "docs/**"}), json!({"repo": "atlas", "lang": "markdown"})] {
            let body = json!({"query": query, "filter": filter});
            let [left, right] = [
                embedded.post("/v1/query_chat", body.clone()).await.ok(),
                server.post("/v1/query_chat", body).await.ok(),
            ];
            let [left, right] = [left, right].map(|answer| answer.as_array().unwrap().clone());
            assert_eq!(places(&left), places(&right), "{query} {filter}");
            for (left, right) in left.iter().zip(&right) {
                for number in ["similarity", "score"] {
                    let [a, b] = [left, right].map(|passage| passage[number].as_f64());
                    let near = a.zip(b).map_or(a == b, |(a, b)| (a - b).abs() < 1e-4);
                    assert!(near, "{query} {filter}: {number} {a:?} and {b:?}");
                }
                assert_eq!(left["text"], right["text"]);
                assert_eq!(left["heading"], right["heading"]);
            }
        }
    }
}

fn places(answer: &[Value]) -> Vec<String> {
    let place = |passage: &Value| format!("{}:{}", passage["source"], passage["start_line"]);
    answer.iter().map(place).collect()
}

async fn compare_engines(test: &str, more: &[(&str, &str)]) {
    let Some(server) = server(test, &[]).await else { return };
    let settings: Vec<_> = SMALL_CHUNKS.into_iter().chain(more.iter().copied()).collect();
    let stands = [Stand::start(&settings).await, on(&server, &settings).await];
    let [embedded, remote] = &stands;
    let corpus = corpus();
    for stand in &stands {
        let put = stand.put(json!(corpus)).await.ok();
        assert!(put["results"].as_array().unwrap().iter().all(|result| result["outcome"] == "indexed"));
    }
    let chunks = remote.get("/v1/collections").await.ok()[0]["chunks"].as_u64().unwrap();
    assert!(chunks > 300, "more than one request's worth: {chunks}");
    assert_eq!(embedded.get("/v1/collections").await.ok(), remote.get("/v1/collections").await.ok());
    assert_eq!(embedded.get("/v1/documents").await.ok(), remote.get("/v1/documents").await.ok());
    assert_equal_answers(embedded, remote).await;
    for stand in &stands {
        for (source, _, query) in UNSPACED {
            let found = stand.query(query).await.ok();
            let at = sources(&found).iter().position(|found| *found == source);
            // The simulator's vectors know no languages, and have their say in what comes first.
            assert!(if more.is_empty() { at == Some(0) } else { at.is_some() }, "{query}: {found}");
        }
        let again = stand.put(json!(corpus)).await.ok();
        assert!(again["results"].as_array().unwrap().iter().all(|result| result["outcome"] == "unchanged"));
        assert_eq!(again["tokens"], 0);
    }

    // A file is changed, one is deleted, the others are sent again unchanged.
    let mut changed = corpus.clone();
    let gone = changed.remove(0);
    changed[0]["text"] = json!("# Zebras\n\nA zebra crossing is where a zebra crosses.\n");
    for stand in &stands {
        let put = stand.put(json!(changed)).await.ok();
        let indexed =
            put["results"].as_array().unwrap().iter().filter(|result| result["outcome"] == "indexed").count();
        assert_eq!(indexed, 1, "{put}");
        let delete = stand
            .request(Method::DELETE, "/v1/documents")
            .json(&json!({"repo": "atlas", "sources": [gone["source"]]}));
        assert_eq!(stand.send(delete).await.ok(), json!({"deleted": 1}));
        let found = stand.query("zebra crossing").await.ok();
        assert_eq!(sources(&found)[0], changed[0]["source"].as_str().unwrap());
    }
    assert_eq!(embedded.get("/v1/documents").await.ok(), remote.get("/v1/documents").await.ok());
    assert_equal_answers(embedded, remote).await;

    // Rebuilt into another generation, which is put into use; then the old one again, which was kept.
    for stand in &stands {
        let started = stand.post("/v1/collections/atlas/rebuild", json!({})).await.ok();
        assert_eq!((&started["generation"], &started["old"]), (&json!("atlas@2"), &json!("atlas@1")));
        let job = format!("/v1/jobs/{}", started["job_id"].as_str().unwrap());
        let status = eventually("the rebuild to end", async || {
            let found = stand.query("zebra crossing").await.ok();
            assert_eq!(sources(&found)[0], changed[0]["source"].as_str().unwrap(), "all the time");
            let status = stand.get(&job).await.ok();
            (status["state"] == "done" || status["state"] == "failed").then_some(status)
        })
        .await;
        assert_eq!(status["state"], "done", "{status}");
    }
    assert_eq!(embedded.get("/v1/collections").await.ok(), remote.get("/v1/collections").await.ok());
    assert_equal_answers(embedded, remote).await;
    for stand in &stands {
        assert_eq!(stand.get("/v1/collections").await.ok()[0]["generation"], "atlas@2");
        let uses = stand
            .request(Method::PUT, "/v1/collections/atlas/generation")
            .json(&json!({"generation": "atlas@1"}));
        assert_eq!(stand.send(uses).await.status.as_u16(), 204);
        assert_eq!(stand.get("/v1/collections").await.ok()[0]["generation"], "atlas@1");
    }
    assert_equal_answers(embedded, remote).await;
    for stand in stands {
        stand.gateway.shutdown().await;
    }
}

#[tokio::test]
async fn lexical_answers_are_those_of_the_embedded_engine() {
    compare_engines("lexical_answers_are_those_of_the_embedded_engine", &[]).await;
}

#[tokio::test]
async fn hybrid_answers_are_those_of_the_embedded_engine() {
    let sim = Sim::start(SimOptions::default()).await.unwrap();
    let url = sim.base_url();
    let settings = [("OPENAI_BASE_URL", url.as_str()), ("DAILY_TOKEN_BUDGET", "100000000")];
    compare_engines("hybrid_answers_are_those_of_the_embedded_engine", &settings).await;
}

#[tokio::test]
async fn an_outage_is_told_and_ends_by_itself() {
    let Some(mut server) = server("an_outage_is_told_and_ends_by_itself", &[]).await else { return };
    let stand = on(&server, &[]).await;
    let kept = json!([{"source": "kept.md", "text": "An apple a day.\n"}]);
    stand.put(kept.clone()).await.ok();
    let answer = stand.query("apple").await.ok();
    assert_eq!(sources(&answer), ["kept.md"]);

    server.kill();
    let refused = stand.query("another question").await;
    refused.problem(503, "upstream_unavailable");
    assert!(refused.header("retry-after").is_some());
    assert_eq!(stand.query("apple").await.ok(), answer, "what is cached is still answered");
    stand.put(json!([{"source": "new.md", "text": "A pear.\n"}])).await.problem(503, "upstream_unavailable");
    let ready = eventually("readiness to tell", async || {
        let ready = stand.get("/health/ready").await;
        (ready.status.as_u16() == 503).then_some(ready)
    })
    .await;
    assert_eq!(ready.body["checks"]["vector_index"]["ok"], false);
    assert_eq!(stand.get("/health/live").await.status.as_u16(), 200);

    server.resume().await.unwrap();
    eventually("answers to come back", async || {
        let reply = stand.query("an apple").await;
        reply.status.is_success().then_some(reply)
    })
    .await;
    assert_eq!(sources(&stand.query("apples").await.ok()), ["kept.md"], "nothing that was answered is lost");
    assert_eq!(stand.put(kept).await.ok()["results"][0]["outcome"], "unchanged");
    stand.put(json!([{"source": "new.md", "text": "A pear.\n"}])).await.ok();
    assert_eq!(sources(&stand.query("pear").await.ok()), ["new.md"]);
    eventually("readiness to recover", async || {
        stand.get("/health/ready").await.status.is_success().then_some(())
    })
    .await;
    stand.gateway.shutdown().await;
}

#[tokio::test]
async fn a_server_that_wants_a_key_gets_it_and_a_wrong_one_is_named() {
    let settings = [("QDRANT__SERVICE__API_KEY", "key-of-the-server")];
    let Some(server) = server("a_server_that_wants_a_key_gets_it_and_a_wrong_one_is_named", &settings).await
    else {
        return;
    };
    for wrong in [&[][..], &[("QDRANT_API_KEY", "another-key-entirely")]] {
        let stand = on(&server, wrong).await;
        // The first look, at start, may have met a server that was too busy to refuse.
        eventually("the key to be named", async || {
            let ready = stand.get("/health/ready").await;
            assert_eq!(ready.status.as_u16(), 503, "{}", ready.text);
            let message = ready.body["checks"]["vector_index"]["message"].as_str().unwrap();
            assert!(!message.contains("another-key"), "{message}");
            message.contains("QDRANT_API_KEY").then_some(())
        })
        .await;
        assert_eq!(stand.query("apple").await.status.as_u16(), 503);
        stand.gateway.shutdown().await;
    }
    let stand = on(&server, &[("QDRANT_API_KEY", "key-of-the-server")]).await;
    eventually("readiness", async || stand.get("/health/ready").await.status.is_success().then_some(()))
        .await;
    stand.put(json!([{"source": "a.md", "text": "An apple.\n"}])).await.ok();
    assert_eq!(sources(&stand.query("apple").await.ok()), ["a.md"]);
    stand.gateway.shutdown().await;
}

#[tokio::test]
async fn replicas_share_nothing_but_the_server() {
    let Some(server) = server("replicas_share_nothing_but_the_server", &[]).await else { return };
    let (left, right) = tokio::join!(on(&server, &SMALL_CHUNKS), on(&server, &SMALL_CHUNKS));
    let document =
        |number: usize| json!({"source": format!("{number}.md"), "text": format!("Apple {number}.\n")});
    // Both find that there is no collection yet, and make it.
    let (one, two) =
        tokio::join!(left.put((0..10).map(document).collect()), right.put((10..20).map(document).collect()),);
    one.ok();
    two.ok();
    for stand in [&left, &right] {
        let body = json!({"query": "apple", "top_k": 50});
        assert_eq!(sources(&stand.post("/v1/query_chat", body).await.ok()).len(), 20);
    }
    // What one deletes the other does not find.
    let delete = left.request(Method::DELETE, "/v1/documents").json(&json!({"sources": ["15.md"]}));
    assert_eq!(left.send(delete).await.ok(), json!({"deleted": 1}));
    let body = json!({"query": "apple", "top_k": 50});
    assert_eq!(sources(&right.post("/v1/query_chat", body).await.ok()).len(), 19);
    left.gateway.shutdown().await;
    right.gateway.shutdown().await;
}

#[tokio::test]
async fn gateways_that_make_one_collection_at_once_make_it_once_and_lose_nothing() {
    const TEST: &str = "gateways_that_make_one_collection_at_once_make_it_once_and_lose_nothing";
    let Some(server) = server(TEST, &[]).await else { return };
    let mut stands = Vec::new();
    for _ in 0..4 {
        stands.push(on(&server, &SMALL_CHUNKS).await);
    }
    for round in 0..5 {
        let name = format!("round-{round}");
        let puts = stands.iter().enumerate().map(|(number, stand)| {
            let document = json!({"source": format!("{number}.md"), "text": format!("Apple {number}.\n")});
            let body = json!({"collection": name, "documents": [document]});
            stand.send(stand.request(Method::PUT, "/v1/documents").json(&body))
        });
        for reply in futures::future::join_all(puts).await {
            assert_eq!(reply.ok()["results"][0]["outcome"], "indexed");
        }
        for stand in &stands {
            let found =
                stand.post("/v1/query_chat", json!({"query": "apple", "collection": name})).await.ok();
            assert_eq!(sources(&found).len(), stands.len(), "{found}");
        }
    }
    let listed = stands[0].get("/v1/collections").await.ok();
    let generations: Vec<_> =
        listed.as_array().unwrap().iter().map(|one| (&one["name"], &one["generation"])).collect();
    let expected: Vec<_> =
        (0..5).map(|round| (json!(format!("round-{round}")), json!(format!("round-{round}@1")))).collect();
    assert_eq!(generations, expected.iter().map(|(name, generation)| (name, generation)).collect::<Vec<_>>());
    for stand in stands {
        stand.gateway.shutdown().await;
    }
}

#[tokio::test]
async fn gateways_that_index_the_same_files_at_once_lose_no_chunk() {
    let Some(server) = server("gateways_that_index_the_same_files_at_once_lose_no_chunk", &[]).await else {
        return;
    };
    let (left, right) = tokio::join!(on(&server, &SMALL_CHUNKS), on(&server, &SMALL_CHUNKS));
    let files = |round: usize| -> Value {
        let line = |file: usize, n: usize| format!("Apple {round} of tree {file}, the {n}th.\n\n");
        let lines = |file: usize| (0..120).map(|n| line(file, n)).collect::<Vec<_>>().concat();
        (0..12).map(|file| json!({"source": format!("{file}.md"), "text": lines(file)})).collect()
    };
    for round in 0..4 {
        let (one, two) = tokio::join!(left.put(files(round)), right.put(files(round)));
        let told: usize =
            one.ok()["results"].as_array().unwrap().iter().map(|it| number(&it["chunks"])).sum();
        two.ok();
        let listed = left.get("/v1/collections").await.ok();
        assert_eq!(number(&listed[0]["chunks"]), told, "round {round}: {listed}");
    }
    left.gateway.shutdown().await;
    right.gateway.shutdown().await;
}

fn number(value: &Value) -> usize {
    usize::try_from(value.as_u64().unwrap()).unwrap()
}

#[tokio::test]
async fn a_gateway_of_the_old_model_goes_on_by_words_after_another_one_has_rebuilt() {
    const TEST: &str = "a_gateway_of_the_old_model_goes_on_by_words_after_another_one_has_rebuilt";
    let Some(server) = server(TEST, &[]).await else { return };
    let sim = Sim::start(SimOptions::default()).await.unwrap();
    let base = sim.base_url();
    let with = |model: &'static str| {
        [("OPENAI_BASE_URL", base.clone()), ("OPENAI_EMBEDDING_MODEL", model.to_owned())]
    };
    let start = async |model: &'static str| {
        let settings = with(model);
        let settings: Vec<(&str, &str)> =
            settings.iter().map(|(name, value)| (*name, value.as_str())).collect();
        on(&server, &settings).await
    };
    let (old, new) = (start("text-embedding-3-small").await, start("text-embedding-3-large").await);
    let documents =
        json!([{"source": "a.md", "text": "An apple a day.\n"}, {"source": "b.md", "text": "A pear.\n"}]);
    old.put(documents).await.ok();
    let found = old.query("apple").await;
    assert_eq!(found.header("x-atlas-degraded"), None);
    new.query("apple").await.problem(409, "embedding_mismatch");

    let started = new.post("/v1/collections/atlas/rebuild", json!({})).await.ok();
    let job = format!("/v1/jobs/{}", started["job_id"].as_str().unwrap());
    let mut asked = 0;
    eventually("the rebuild", async || {
        // Never an error, never nothing: with its own vectors before, by words after.
        let body = json!({"query": format!("apple {asked}")});
        assert_eq!(sources(&old.post("/v1/query_chat", body).await.ok())[0], "a.md");
        asked += 1;
        (new.get(&job).await.ok()["state"] == "done").then_some(())
    })
    .await;
    let by_words = old.query("apple day").await;
    assert_eq!(by_words.header("x-atlas-degraded"), Some("lexical"));
    assert_eq!(sources(&by_words.ok()), ["a.md"]);
    old.post("/v1/query_chat", json!({"query": "apple", "mode": "dense"}))
        .await
        .problem(409, "embedding_mismatch");
    assert_eq!(new.query("apple day").await.header("x-atlas-degraded"), None);
    old.gateway.shutdown().await;
    new.gateway.shutdown().await;
}

#[tokio::test]
async fn what_a_gateway_of_the_old_model_embeds_during_a_rebuild_never_gets_into_it() {
    const TEST: &str = "what_a_gateway_of_the_old_model_embeds_during_a_rebuild_never_gets_into_it";
    let Some(server) = server(TEST, &[]).await else { return };
    let sim = Sim::start(SimOptions::default()).await.unwrap();
    let base = sim.base_url();
    let start = async |model: &str| {
        on(&server, &[("OPENAI_BASE_URL", &base), ("OPENAI_EMBEDDING_MODEL", model)]).await
    };
    // Vectors of one length, so that the server could not tell them apart.
    let (old, new) = (start("text-embedding-3-small").await, start("text-embedding-ada-002").await);
    let document = |source: &str| json!({"source": source, "text": format!("What {source} says.\n")});
    old.put(json!([document("a.md")])).await.ok();

    let billed = sim.meter().total_tokens();
    sim.script(json!([{"kind": "embedding", "delay_ms": 10_000, "times": 1}])).unwrap();
    let rebuild = async {
        // The meter counts when a call comes in.
        eventually("the call for b.md", async || (sim.meter().total_tokens() > billed).then_some(())).await;
        let started = new.post("/v1/collections/atlas/rebuild", json!({})).await.ok();
        let id = started["job_id"].as_str().unwrap();
        let ended = new.job_until(id, Duration::from_secs(60), |job| job["state"] == "done").await;
        assert_eq!(ended["errors"], json!([]), "{ended}");
    };
    let (late, ()) = tokio::join!(old.put(json!([document("b.md")])), rebuild);
    let detail = late.problem(503, "upstream_unavailable");
    assert!(detail.contains("atlas@2") && late.header("retry-after").is_some(), "{detail}");
    old.put(json!([document("b.md")])).await.problem(409, "embedding_mismatch");
    let listed = new.get("/v1/documents").await.ok();
    assert_eq!(listed["documents"].as_array().unwrap().len(), 1, "{listed}");

    let put = new.put(json!([document("a.md"), document("b.md")])).await.ok();
    assert_eq!(
        (&put["results"][0]["outcome"], &put["results"][1]["outcome"]),
        (&json!("unchanged"), &json!("indexed"))
    );
    let found = new.query("what b.md says").await;
    assert_eq!(found.header("x-atlas-degraded"), None);
    assert_eq!(sources(&found.ok())[0], "b.md");
    old.gateway.shutdown().await;
    new.gateway.shutdown().await;
}
