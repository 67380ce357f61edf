//! The stages between finding and answering: reranking, diversity, neighbours, several collections.

use std::fmt::Write as _;

use crate::support::{Stand, sources};
use atlas_openai_sim::{RunningSim, Sim, SimOptions};
use reqwest::Method;
use serde_json::{Value, json};

async fn sim() -> (RunningSim, String) {
    let sim = Sim::start(SimOptions::default()).await.expect("a simulator");
    let url = format!("http://{}", sim.addr);
    (sim, url)
}

/// The third has all the words of "how are tokens reserved", the first ones have "tokens" more often.
fn documents() -> Value {
    json!([
        {"source": "a.md", "text": "Tokens tokens tokens.\n"},
        {"source": "b.md", "text": "Tokens, tokens everywhere, reserved or not.\n"},
        {"source": "c.md", "text": "Here is told how tokens are reserved, in a long text about many other things that lowers its weight in the lexical list, such as weather, music and the price of bread in the city.\n"},
    ])
}

const QUERY: &str = "how are tokens reserved";

#[tokio::test]
async fn every_rerankers_api_reorders_the_answer() {
    let (_sim, url) = sim().await;
    for (api, path, model) in [
        ("jina", "/v1/rerank", "jina-reranker-v2-base-multilingual"),
        ("cohere", "/v2/rerank", "rerank-v3.5"),
        ("tei", "/rerank", ""),
    ] {
        let endpoint = format!("{url}{path}");
        let settings = [("RERANK_URL", endpoint.as_str()), ("RERANK_API", api), ("RERANK_MODEL", model)];
        let stand = Stand::start(&settings).await;
        stand.put(documents()).await.ok();
        let plain = stand.post("/v1/query_chat", json!({"query": QUERY, "rerank": false})).await.ok();
        assert_ne!(sources(&plain)[0], "c.md", "else this test shows nothing");
        let reply = stand.query(QUERY).await;
        assert_eq!(reply.header("x-atlas-degraded"), Some("lexical"));
        let passages = reply.ok();
        assert_eq!(sources(&passages)[0], "c.md", "{api}");
        let scores: Vec<f64> =
            passages.as_array().unwrap().iter().map(|passage| passage["score"].as_f64().unwrap()).collect();
        assert!(scores.is_sorted_by(|a, b| a >= b), "{scores:?}");
        let ready = stand.get("/health/ready").await.ok();
        assert_eq!(ready["checks"]["reranker"]["ok"], true);
        stand.gateway.shutdown().await;
    }
}

#[tokio::test]
async fn more_candidates_than_one_call_takes_are_reranked_in_several() {
    let (_sim, url) = sim().await;
    let endpoint = format!("{url}/rerank");
    let stand = Stand::start(&[("RERANK_URL", &endpoint), ("RERANK_API", "tei")]).await;
    let mut many: Vec<Value> = (0..90)
        .map(|number| json!({"source": format!("{number:02}.md"), "text": "Tokens are reserved and reserved.\n"}))
        .collect();
    many.extend(documents().as_array().unwrap().clone());
    stand.put(json!(many)).await.ok();
    let reply = stand.post("/v1/query_chat", json!({"query": QUERY, "top_k": 100})).await;
    assert_eq!(reply.header("x-atlas-degraded"), Some("lexical"), "the server takes 32 at a time");
    let passages = reply.ok();
    assert_eq!(passages.as_array().unwrap().len(), 93);
    assert_eq!(sources(&passages)[0], "c.md");
    assert_eq!(
        &sources(&passages)[1..91],
        (0..90).map(|number| format!("{number:02}.md")).collect::<Vec<_>>()
    );
    stand.gateway.shutdown().await;
}

#[tokio::test]
async fn an_answer_that_was_to_be_reranked_says_that_there_is_no_reranker() {
    let stand = Stand::start(&[]).await;
    stand.put(documents()).await.ok();
    let ask = async |more: Value| {
        let mut body = json!({"query": QUERY});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let reply = stand.post("/v1/query_chat", body).await;
        let degraded = reply.header("x-atlas-degraded").map(str::to_owned);
        reply.ok();
        degraded
    };
    let (plain, asked) = (Some("lexical".to_owned()), Some("lexical, unreranked".to_owned()));
    for _ in 0..2 {
        // The second time from the cache.
        assert_eq!(ask(json!({})).await, plain);
        assert_eq!(ask(json!({"rerank": false})).await, plain);
        assert_eq!(ask(json!({"rerank": true})).await, asked);
    }
    stand.gateway.shutdown().await;
}

#[tokio::test]
async fn without_its_reranker_the_answer_is_unreranked_and_says_so() {
    let (sim, url) = sim().await;
    let endpoint = format!("{url}/rerank");
    let stand = Stand::start(&[
        ("RERANK_URL", endpoint.as_str()),
        ("RERANK_API", "tei"),
        ("RERANK_TIMEOUT_MILLISECONDS", "2000"),
        ("CIRCUIT_FAILURES", "5"),
        ("CIRCUIT_OPEN_SECONDS", "3600"),
    ])
    .await;
    stand.put(documents()).await.ok();
    let plain = stand.post("/v1/query_chat", json!({"query": QUERY, "rerank": false})).await.ok();
    for fault in ["500", "malformed", "wrong_schema", "hang"] {
        sim.script(json!([{"kind": "rerank", "fault": fault}])).unwrap();
        let reply = stand.query(QUERY).await;
        assert_eq!(reply.header("x-atlas-degraded"), Some("lexical, unreranked"), "{fault}");
        assert_eq!(reply.ok(), plain, "{fault}");
        assert_eq!(sim.steps_left(), 0, "{fault}");
    }
    assert_eq!(stand.metric("rag_degraded_total{reason=\"unreranked\"}").await, 4);
    let reply = stand.query(QUERY).await;
    assert_eq!(reply.header("x-atlas-degraded"), Some("lexical"), "the degraded answer was not kept");
    assert_eq!(sources(&reply.ok())[0], "c.md");

    // Once the circuit is open nobody waits for it.
    sim.script(json!([{"kind": "rerank", "fault": "500", "times": 100}])).unwrap();
    for number in 0..8 {
        let reply = stand.query(&format!("{QUERY} {number}")).await;
        assert_eq!(reply.header("x-atlas-degraded"), Some("lexical, unreranked"));
    }
    assert_eq!(sim.steps_left(), 1);
    assert_eq!(stand.metric("atlas_circuit_open{dependency=\"reranker\"}").await, 1);
    stand.gateway.shutdown().await;
}

/// A file of sections that are a chunk each.
fn sections() -> String {
    let fruits = ["apple", "banana", "cherry", "damson", "elderberry", "fig"];
    fruits.iter().fold("# Fruits\n".to_owned(), |mut text, fruit| {
        let _ = write!(text, "\n## The {fruit}\n\nAll that is known about the {fruit} is written here, line by line.\n\nIt is round.\n");
        text
    })
}

const SMALL: [(&str, &str); 2] = [("CHUNK_TOKENS", "32"), ("CHUNK_OVERLAP_TOKENS", "0")];

#[tokio::test]
async fn a_passage_is_joined_with_its_neighbours_up_to_a_bound() {
    let stand = Stand::start(&SMALL).await;
    stand.put(json!([{"source": "fruits.md", "text": sections()}])).await.ok();
    let ask = async |tokens: usize| {
        let body = json!({"query": "cherry", "passage_tokens": tokens, "top_k": 1});
        let passages = stand.post("/v1/query_chat", body).await.ok();
        let passage = passages[0].clone();
        let lines: Vec<String> = sections().lines().map(str::to_owned).collect();
        let number = |name: &str| usize::try_from(passage[name].as_u64().unwrap()).unwrap();
        assert_eq!(
            passage["text"].as_str().unwrap(),
            lines[number("start_line") - 1..number("end_line")].join("\n"),
            "exactly the lines it names"
        );
        passage
    };
    let alone = ask(0).await;
    assert!(alone["text"].as_str().unwrap().contains("cherry") && !alone.to_string().contains("damson"));
    assert_eq!(ask(20).await, alone, "there is no room");
    let wide = ask(512).await;
    assert!(wide.to_string().contains("banana") && wide.to_string().contains("damson"), "{wide}");
    assert_eq!(wide["heading"], alone["heading"]);
    stand.gateway.shutdown().await;
}

#[tokio::test]
async fn neighbours_that_are_found_both_become_one_passage() {
    let stand = Stand::start(&SMALL).await;
    stand.put(json!([{"source": "fruits.md", "text": sections()}, {"source": "other.md", "text": "round things\n"}])).await.ok();
    let ask = async |tokens: usize| {
        let body = json!({"query": "round known fruits", "passage_tokens": tokens, "top_k": 100});
        stand.post("/v1/query_chat", body).await.ok()
    };
    assert!(ask(0).await.as_array().unwrap().len() >= 7);
    let joined = ask(2000).await;
    assert_eq!(sources(&joined).len(), 2, "{joined}");
    let whole = joined.as_array().unwrap().iter().find(|passage| passage["source"] == "fruits.md").unwrap();
    assert_eq!(whole["text"], sections().trim_end());
    assert_eq!(ask(2000).await, joined);
    stand.gateway.shutdown().await;
}

#[tokio::test]
async fn diversity_puts_what_repeats_behind() {
    let stand = Stand::start(&[]).await;
    stand
        .put(json!([
            {"source": "1.md", "text": "Tokens are reserved before each call of the model.\n"},
            {"source": "2.md", "text": "Tokens are reserved before every call of the model.\n"},
            {"source": "3.md", "text": "Tokens are reserved before a call of the model.\n"},
            {"source": "4.md", "text": "The dashboard draws how many tokens a tenant spent yesterday, and what it cost in the end.\n"},
        ]))
        .await
        .ok();
    let ask = async |diversity: f64| {
        let body = json!({"query": "tokens reserved before call", "diversity": diversity, "top_k": 2});
        stand.post("/v1/query_chat", body).await.ok()
    };
    assert!(!sources(&ask(0.0).await).contains(&"4.md"));
    assert_eq!(sources(&ask(0.8).await)[1], "4.md");
    stand.gateway.shutdown().await;
}

#[tokio::test]
async fn several_collections_are_searched_as_one() {
    let (_sim, url) = sim().await;
    let base = format!("{url}/v1");
    let stand = Stand::start(&[("OPENAI_BASE_URL", &base)]).await;
    let put = async |collection: &str, documents: Value| {
        let request = stand.request(Method::PUT, "/v1/documents");
        stand.send(request.json(&json!({"collection": collection, "documents": documents}))).await.ok();
    };
    put(
        "one",
        json!([{"source": "a.md", "text": "An apple a day.\n"}, {"source": "x.md", "text": "Nothing.\n"}]),
    )
    .await;
    put(
        "two",
        json!([{"source": "a.md", "text": "An apple a day.\n"}, {"source": "b.md", "text": "Apple pie.\n"}]),
    )
    .await;
    let ask = async |collections: &[&str]| {
        let body = json!({"query": "apple", "collections": collections});
        stand.post("/v1/query_chat", body).await
    };
    let both = ask(&["one", "two"]).await.ok();
    let places: Vec<(&str, &str)> = both
        .as_array()
        .unwrap()
        .iter()
        .map(|passage| (passage["collection"].as_str().unwrap(), passage["source"].as_str().unwrap()))
        .collect();
    assert!(places.contains(&("one", "a.md")) && places.contains(&("two", "a.md")), "{places:?}");
    assert!(places.contains(&("two", "b.md")));
    assert_eq!(ask(&["two", "one", "two"]).await.ok(), both, "their order does not matter");
    assert_eq!(ask(&["one"]).await.ok(), {
        let body = json!({"query": "apple", "collection": "one"});
        stand.post("/v1/query_chat", body).await.ok()
    });
    ask(&["one", "nowhere"]).await.problem(404, "unknown_collection");
    ask(&[]).await.problem(422, "invalid_request");
    let both_fields = json!({"query": "x", "collection": "one", "collections": ["two"]});
    let of_both = stand.post("/v1/query_chat", both_fields).await;
    let of_several = stand.post("/v1/query_chat", json!({"query": "x", "collections": ["one", "two"]})).await;
    assert_eq!(of_both.ok(), of_several.ok());
    // A change of either is seen.
    put("two", json!([{"source": "c.md", "text": "One more apple.\n"}])).await;
    assert!(sources(&ask(&["one", "two"]).await.ok()).contains(&"c.md"));
    stand.gateway.shutdown().await;
}

#[tokio::test]
async fn a_mode_searches_one_list() {
    let (sim, url) = sim().await;
    let base = format!("{url}/v1");
    let stand = Stand::start(&[("OPENAI_BASE_URL", &base)]).await;
    stand.put(documents()).await.ok();
    let ask = async |mode: &str| {
        let body = json!({"query": "tokens everywhere", "mode": mode});
        stand.post("/v1/query_chat", body).await
    };
    let billed = sim.meter().total_tokens();
    let lexical = ask("lexical").await;
    assert_eq!(lexical.header("x-atlas-degraded"), None, "it was asked for");
    assert!(lexical.ok().as_array().unwrap().iter().all(|passage| passage["similarity"].is_null()));
    assert_eq!(sim.meter().total_tokens(), billed, "no embedding was bought");
    let dense = ask("dense").await.ok();
    let cosines: Vec<f64> =
        dense.as_array().unwrap().iter().map(|passage| passage["similarity"].as_f64().unwrap()).collect();
    assert_eq!(cosines.len(), 3);
    assert!(cosines.is_sorted_by(|a, b| a >= b), "{cosines:?}");
    assert_eq!(ask("hybrid").await.ok().as_array().unwrap().len(), 3);
    ask("sparse").await.problem(422, "invalid_request");
    stand.gateway.shutdown().await;
}

#[tokio::test]
async fn queries_that_come_together_are_embedded_together() {
    let (sim, url) = sim().await;
    let base = format!("{url}/v1");
    let stand = std::sync::Arc::new(Stand::start(&[("OPENAI_BASE_URL", &base)]).await);
    stand.put(documents()).await.ok();
    sim.script(json!([{"kind": "embedding", "delay_ms": 300, "times": 2}])).unwrap();
    let before = sim.meter().total_tokens();
    let asking: Vec<_> = (0..30)
        .map(|number| {
            let stand = std::sync::Arc::clone(&stand);
            // Half of them ask the same words for another number of passages.
            let body = json!({"query": format!("tokens {}", number % 15), "top_k": 1 + number / 15});
            tokio::spawn(async move { stand.post("/v1/query_chat", body).await })
        })
        .collect();
    for asked in asking {
        let reply = asked.await.unwrap();
        assert_eq!(reply.header("x-atlas-degraded"), None);
        reply.ok();
    }
    let calls = stand.metric("rag_embedding_query_calls_total").await;
    assert_eq!(stand.metric("rag_embedding_queries_total").await, 30);
    assert!(calls < 10, "{calls} calls for 30 queries");
    let billed = sim.meter().total_tokens() - before;
    assert!(billed > 0);
    let config = crate::support::config(&stand.dir, &[]);
    let state = atlas_shared::ledger::open(&config).await.unwrap().budget(config.limits).await.unwrap();
    assert_eq!((state.used.0, state.reserved.0), (sim.meter().total_tokens(), 0), "all of it is booked");
    let stand = std::sync::Arc::into_inner(stand).unwrap();
    stand.gateway.shutdown().await;
}
