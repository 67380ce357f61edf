//! `atlas eval`: what it measures, what it says it cannot measure, and the floor of the search's quality.

#![cfg(feature = "embedded")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use std::path::Path;

use atlas_openai_sim::{Sim, SimOptions};
use atlas_test_support::skip_everywhere;
use serde_json::Value;
use support::Sandbox;

/// What lexical search must reach on the Cranfield collection (nDCG@10).
const CRANFIELD_FLOOR: f64 = 0.39;

const CORPUS: &str = r#"{"_id": "retry", "title": "Retries", "text": "A failed call is tried again after a pause that doubles."}
{"_id": "budget", "title": "Budget", "text": "Tokens are reserved before a call and settled after it."}
{"_id": "lease", "title": "Lease", "text": "A worker renews its lease while a run is under way."}
"#;
const QUERIES: &str = r#"{"_id": "q1", "text": "when is a failed call tried again?"}
{"_id": "q2", "text": "who renews a lease"}
{"_id": "q3", "text": "unjudged"}
"#;
const QRELS: &str = "query-id\tcorpus-id\tscore\nq1\tretry\t2\nq1\tbudget\t1\nq2\tlease\t1\n";

fn sandbox() -> Sandbox {
    Sandbox::new(&[
        ("small/corpus.jsonl", CORPUS),
        ("small/queries.jsonl", QUERIES),
        ("small/qrels/test.tsv", QRELS),
    ])
}

fn mean(run: &Value, mode: &str, measure: &str) -> f64 {
    let queries = run["modes"][mode].as_object().unwrap();
    queries.values().map(|query| query[measure].as_f64().unwrap()).sum::<f64>() / queries.len() as f64
}

#[test]
fn what_the_gateway_cannot_serve_is_said_and_not_measured() {
    let sandbox = sandbox().with_env("OPENAI_EMBEDDING_MODEL", "none");
    let run = sandbox.atlas(&["eval", "--dataset", "small", "--json", "--save", "run.json"]).ok().json();
    assert_eq!(run["modes"].as_object().unwrap().keys().collect::<Vec<_>>(), ["lexical"]);
    assert_eq!(run["modes"]["lexical"].as_object().unwrap().len(), 2, "judged queries only: {run}");
    assert!((mean(&run, "lexical", "mrr_10") - 1.0).abs() < 1e-9, "{run}");
    for mode in ["dense", "hybrid", "rerank"] {
        assert!(run["left_out"][mode].as_str().unwrap().contains("OPENAI_EMBEDDING_MODEL"), "{run}");
    }

    let nothing = sandbox.atlas(&["eval", "--dataset", "small", "--mode", "dense"]);
    assert_eq!(nothing.code, Some(1));
    assert!(nothing.stderr.contains("OPENAI_EMBEDDING_MODEL"), "{}", nothing.stderr);

    let table = sandbox.atlas(&["eval", "--dataset", "small", "--compare", "run.json"]).ok().stdout;
    assert!(table.contains("small: 3 documents, embeddings: none"), "{table}");
    assert!(table.contains("dense: not measured, the gateway has no embedding model"), "{table}");
    let compared = table.lines().rfind(|line| line.contains("nDCG@10")).unwrap();
    assert!(compared.contains("+0.000") && compared.contains("no"), "{table}");
    assert_eq!(sandbox.atlas(&["eval", "--compare", "run.json", "run.json"]).ok().code, Some(0));
}

#[test]
fn all_modes_are_measured_side_by_side() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let sim = runtime.block_on(Sim::start(SimOptions::default())).unwrap();
    let sandbox = sandbox()
        .with_env("OPENAI_BASE_URL", sim.base_url())
        .with_env("OPENAI_API_KEY", "sk-test-key")
        .with_env("RERANK_URL", format!("{}/rerank", sim.base_url()))
        .with_env("RERANK_MODEL", "overlap");
    let ran = sandbox.atlas(&["eval", "--dataset", "small", "--json"]).ok();
    let run = ran.json();
    let modes: Vec<&String> = run["modes"].as_object().unwrap().keys().collect();
    assert_eq!(modes, ["lexical", "dense", "hybrid", "rerank"], "{}", ran.stdout);
    assert!((mean(&run, "hybrid", "recall_100") - 1.0).abs() < 1e-9, "{run}");
    let table = sandbox.atlas(&["eval", "--dataset", "small", "--mode", "hybrid,rerank"]).ok().stdout;
    assert!(table.contains("hybrid + rerank") && !table.contains("lexical  "), "{table}");
    assert!(table.contains("hybrid + rerank over hybrid"), "{table}");

    let without = sandbox.with_env("RERANK_URL", "");
    let run = without.atlas(&["eval", "--dataset", "small", "--json"]).ok().json();
    assert_eq!(run["modes"].as_object().unwrap().keys().collect::<Vec<_>>(), ["lexical", "dense", "hybrid"]);
    let why = run["left_out"]["rerank"].as_str().unwrap();
    assert!(why.contains("unreranked") && why.contains("RERANK_URL"), "{why}");
    let ran = without.atlas(&["eval", "--dataset", "small", "--gateway", "http://127.0.0.1:9/", "-q"]);
    assert_eq!(ran.code, Some(1), "nobody listens there: {}", ran.stderr);
}

#[test]
fn a_broken_line_of_a_dataset_is_named() {
    let sandbox = sandbox();
    sandbox.write("small/queries.jsonl", "{\"_id\": \"q1\", \"text\": \"x\"}\n{\"_id\": \"q2\"\n");
    let ran = sandbox.atlas(&["eval", "--dataset", "small"]);
    assert_eq!(ran.code, Some(2), "{}", ran.stderr);
    assert!(ran.stderr.contains("queries.jsonl, line 2 cannot be read"), "{}", ran.stderr);
}

#[test]
fn cranfield_holds_its_floor() {
    let test = "cranfield_holds_its_floor";
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/eval/cranfield");
    let named = std::env::var_os("ATLAS_EVAL_CRANFIELD").map(Into::into);
    let Some(dataset) = named.into_iter().chain([beside]).find(|dir| dir.join("corpus.jsonl").is_file())
    else {
        skip_everywhere(test, "the Cranfield collection", "set ATLAS_EVAL_CRANFIELD to its folder");
        return;
    };
    let sandbox = Sandbox::new(&[]).with_env("OPENAI_EMBEDDING_MODEL", "none");
    let dataset = dataset.canonicalize().unwrap();
    let dataset = dataset.to_str().unwrap();
    let run = sandbox.atlas(&["eval", "--dataset", dataset, "--mode", "lexical", "--json"]).ok().json();
    let ndcg = mean(&run, "lexical", "ndcg_10");
    assert!(ndcg >= CRANFIELD_FLOOR, "nDCG@10 is {ndcg:.4}, not {CRANFIELD_FLOOR}");
}
