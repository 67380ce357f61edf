//! The whole way on a laptop: everything embedded, no key, no network.

#![cfg(feature = "embedded")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::{fs, time::Duration};

use atlas_openai_sim::{RunningSim, Sim, SimOptions};
use serde_json::{Value, json};
use support::{Sandbox, assert_citations_hold, wait};

const RETRIES: &str = "# Retries\n\nA call that fails with a timeout is retried three times.\n\
    The delay doubles with every attempt, and jitter keeps clients apart.\n\n\
    ## Circuit breaker\n\nAfter five failures in a row the circuit opens for 15 seconds.\n";
const QUEUE: &str = "# Queue\n\nRequests wait in a queue until a worker pulls them.\n\
    A worker acknowledges a request once its result is stored.\n";
const CODE: &str = "/// Retries a call with exponential backoff.\npub fn retry(attempts: u32) {\n    \
    for attempt in 0..attempts {\n        wait(backoff(attempt));\n    }\n}\n";

fn project() -> Sandbox {
    Sandbox::new(&[("docs/retries.md", RETRIES), ("docs/queue.md", QUEUE), ("src/retry.rs", CODE)])
}

#[test]
fn a_folder_is_indexed_searched_and_asked_about_and_every_citation_holds() {
    let sandbox = project();
    let first = sandbox.atlas(&["index", "."]).ok();
    assert!(first.stdout.starts_with("Indexed 3 files"), "{}", first.stdout);
    let second = sandbox.atlas(&["index", "."]).ok();
    assert_eq!(second.stdout, "Nothing to do: all 3 files are indexed already.\n");

    let found = sandbox.atlas(&["search", "how often is a call retried", "--json"]).ok().json();
    let best = &found[0];
    assert!(best["source"].as_str().unwrap().contains("retr"), "{found}");
    let shown = sandbox.atlas(&["search", "circuit breaker"]).ok();
    assert!(shown.stdout.contains("docs/retries.md:"), "{}", shown.stdout);

    let asked = sandbox.atlas(&["ask", "Design the retry policy of our clients", "--json"]).ok();
    let answer = asked.json();
    assert_eq!(answer["msg_type"], "spec");
    assert_eq!(answer["metadata"]["model"], "offline-extractive");
    assert!(assert_citations_hold(&sandbox.path(), &answer) > 0, "{answer:#}");
    assert!(asked.stderr.contains("published as"), "{}", asked.stderr);

    let id = answer["task_id"].as_str().unwrap();
    let runs = sandbox.atlas(&["runs", "list", "--json"]).ok().json();
    assert_eq!(runs.as_array().unwrap().len(), 1);
    assert_eq!(runs[0]["task_id"], id);
    assert_eq!(runs[0]["status"], "done");
    assert!(sandbox.atlas(&["runs", "list"]).ok().stdout.contains(id));
    let shown = sandbox.atlas(&["runs", "show", id]).ok();
    assert!(shown.stdout.contains("Design the retry policy of our clients"), "{}", shown.stdout);
    let spec = sandbox.atlas(&["runs", "show", id, "--spec"]).ok();
    assert_eq!(spec.stdout.trim_end(), answer["content"].as_str().unwrap().trim_end());

    let unknown = sandbox.atlas(&["runs", "show", "67e55044-10b1-426f-9247-bb680e5fe0c8"]);
    assert_eq!(unknown.code, Some(1));
    assert!(unknown.stderr.contains("there is no run"), "{}", unknown.stderr);

    let budget = sandbox.atlas(&["budget", "show", "--json"]).ok().json();
    assert_eq!(budget["budget"]["used"], 0);
    sandbox.atlas(&["doctor"]).ok();
}

#[test]
fn a_script_gets_the_answer_that_says_why_there_is_no_spec() {
    let sandbox = project();
    let parent = "67e55044-10b1-426f-9247-bb680e5fe0c8";
    let asked = sandbox.atlas(&["ask", "Now with two queues", "--parent", parent, "--json"]);
    assert_eq!(asked.code, Some(1), "{}", asked.stderr);
    let answer = asked.json();
    assert_eq!((&answer["msg_type"], &answer["metadata"]["status"]), (&json!("error"), &json!("error")));
    assert_eq!(answer["metadata"]["error_code"], "parent_not_found");
    assert!(asked.stderr.contains("the request failed (parent_not_found)"), "{}", asked.stderr);

    let file = ["ask", "Now with two queues", "--parent", parent, "--out", "spec.md"];
    let asked = sandbox.atlas(&file);
    assert_eq!((asked.code, asked.stdout.as_str()), (Some(1), ""));
    assert!(!sandbox.path().join("spec.md").exists(), "no spec, no file");
}

#[test]
fn a_spec_goes_into_a_file_and_can_be_refined() {
    let sandbox = project();
    sandbox.atlas(&["index", ".", "-q"]).ok();
    let asked = sandbox.atlas(&["ask", "Design the queue", "--out", "spec.md"]).ok();
    let told = asked.stderr.matches("writing an architecture spec (spec, chosen from the request").count();
    assert_eq!(told, 1, "{}", asked.stderr);
    assert_eq!(asked.stdout, "");
    let spec = fs::read_to_string(sandbox.path().join("spec.md")).unwrap();
    assert!(spec.starts_with('#') || spec.starts_with('>'), "{spec}");
    let runs = sandbox.atlas(&["runs", "list", "--json"]).ok().json();
    let parent = runs[0]["task_id"].as_str().unwrap();
    let refined = sandbox.atlas(&["ask", "Now with two queues", "--parent", parent, "--json"]).ok().json();
    assert_eq!(refined["metadata"]["parent_id"], parent);
}

#[test]
fn dev_indexes_what_docs_added_names() {
    let sandbox = project();
    let root = sandbox.path().display().to_string();
    let sandbox =
        sandbox.with_env("INDEX_ON_DOCS_ADDED", "true").with_env("INDEX_ALLOWED_ROOTS", root.clone());
    let dev = sandbox.start("dev", &["dev", "--port", "0", "--worker-port", "0"]);
    dev.wait_for("Ctrl-C stops it.");
    assert!(dev.log().contains("docs_added is read"), "{}", dev.log());
    let published = sandbox.atlas(&["publish", "--docs-added", &root, "--path", "docs"]).ok();
    assert!(published.stderr.contains("INDEX_ON_DOCS_ADDED"), "{}", published.stderr);
    wait("what the message names to be found", || {
        let found = sandbox.atlas(&["search", "how often is a call retried", "--json"]).ok().json();
        (found[0]["source"] == "docs/retries.md").then_some(())
    });
    dev.signal("TERM");
    assert_eq!(dev.exit_code(), 0, "{}", dev.log());
}

#[test]
fn dev_serves_the_other_commands_and_drains() {
    let sandbox = project();
    // Published before anything runs: it waits.
    let early = sandbox.atlas(&["publish", "Design the circuit breaker"]).ok();
    let early_id = early.stdout.trim().to_owned();
    assert!(early.stderr.contains("atlas dev"), "{}", early.stderr);

    let dev = sandbox.start("dev", &["dev", "--port", "0", "--worker-port", "0"]);
    dev.wait_for("Ctrl-C stops it.");
    let lock: Value =
        serde_json::from_str(&fs::read_to_string(sandbox.path().join(".atlas/dev.lock")).unwrap()).unwrap();
    assert!(lock["gateway"].as_str().unwrap().starts_with("http://127.0.0.1:"), "{lock}");

    let second = sandbox.atlas(&["dev", "--port", "0", "--worker-port", "0"]);
    assert_eq!(second.code, Some(1));
    assert!(second.stderr.contains("is in use") && second.stderr.contains("atlas dev"), "{}", second.stderr);

    let indexed = sandbox.atlas(&["index", "docs", "--exclude", ".dev.*"]).ok();
    assert!(indexed.stderr.contains("the gateway at http://127.0.0.1:"), "{}", indexed.stderr);
    let answer = sandbox.atlas(&["ask", "Design the retry policy", "--json"]).ok().json();
    assert!(assert_citations_hold(&sandbox.path().join("docs"), &answer) > 0);

    let status = || {
        let ran = sandbox.atlas(&["runs", "show", &early_id, "--json"]);
        (ran.code == Some(0) && ran.json()["run"]["status"] == "done").then_some(())
    };
    wait("the early request to be served", status);

    let doctor = sandbox.atlas(&["doctor"]).ok();
    assert!(doctor.stdout.contains("ready at http://127.0.0.1:"), "{}", doctor.stdout);

    dev.signal("TERM");
    assert_eq!(dev.exit_code(), 0, "{}", dev.log());
    assert!(dev.log().contains("Stopped."), "{}", dev.log());
    // The folder is free again, and nothing was lost.
    let runs = sandbox.atlas(&["runs", "list", "--json"]).ok().json();
    assert_eq!(runs.as_array().unwrap().len(), 2);
    sandbox.atlas(&["search", "retries"]).ok();
}

#[test]
fn a_port_in_use_is_said_with_the_way_out() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let ran = Sandbox::new(&[]).atlas(&["dev", "--port", &port, "--worker-port", "0"]);
    assert_eq!(ran.code, Some(1));
    assert!(ran.stderr.contains(&format!("cannot listen on 127.0.0.1:{port}")), "{}", ran.stderr);
    assert!(ran.stderr.contains("--port (0 picks a free one)"), "{}", ran.stderr);
}

#[test]
fn the_demo_verifies_what_it_shows() {
    let sandbox = project();
    let ran = sandbox.atlas(&["demo", "--question", "How are calls retried?"]).ok();
    for expected in
        ["offline drafter", "Indexed 3 files", "Every", "hold.", "atlas_tokens_total", "atlas_run_seconds"]
    {
        let expected = if expected == "Every" { "does every one name" } else { expected };
        assert!(ran.stdout.contains(expected), "{expected:?} is missing:\n{}", ran.stdout);
    }
    assert!(!sandbox.path().join(".atlas").exists(), "the demo leaves nothing behind");
}

#[test]
fn an_interrupted_index_run_leaves_a_usable_index() {
    let files: Vec<(String, String)> = (0..300)
        .map(|n| (format!("f{n:03}.md"), format!("# File {n}\n\nIt is about subject{n}.\n")))
        .collect();
    let files: Vec<(&str, &str)> = files.iter().map(|(name, text)| (name.as_str(), text.as_str())).collect();
    let sandbox = Sandbox::new(&files);
    let index = sandbox.start("index", &["index", ".", "--exclude", ".index.*"]);
    index.wait_for("into collection");
    index.signal("KILL");
    assert_eq!(index.exit_code(), 137);
    sandbox.atlas(&["index", ".", "--exclude", ".index.*"]).ok();
    let again = sandbox.atlas(&["index", ".", "--exclude", ".index.*"]).ok();
    assert_eq!(again.stdout, "Nothing to do: all 300 files are indexed already.\n");
    let found = sandbox.atlas(&["search", "subject217", "--json", "-k", "1"]).ok().json();
    assert_eq!(found[0]["source"], "f217.md");
}

/// Files of about 1500 tokens each, whose embeddings a simulator counts. It serves as long as the runtime lives.
fn embedded_project(runtime: &tokio::runtime::Runtime, files: usize) -> (Sandbox, RunningSim) {
    let sim = runtime.block_on(Sim::start(SimOptions::default())).unwrap();
    let sandbox = Sandbox::new(&[])
        .with_env("OPENAI_BASE_URL", sim.base_url())
        .with_env("OPENAI_API_KEY", "sk-test-key")
        .with_env("DAILY_TOKEN_BUDGET", "1000000000");
    for file in 0..files {
        let words: Vec<String> = (0..360).map(|word| format!("w{file}x{word}")).collect();
        let lines: Vec<String> = words.chunks(12).map(|words| format!("{}.\n", words.join(" "))).collect();
        sandbox.write(&format!("docs/{file:02}.md"), &format!("# Part {file}\n\n{}", lines.concat()));
    }
    (sandbox, sim)
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
}

fn used(sandbox: &Sandbox) -> u64 {
    sandbox.atlas(&["budget", "show", "--json"]).ok().json()["budget"]["used"].as_u64().unwrap()
}

#[test]
fn an_index_run_that_the_budget_ends_pays_for_nothing_twice_and_says_where_it_is() {
    let runtime = runtime();
    let (sandbox, sim) = embedded_project(&runtime, 50);
    sandbox.atlas(&["index", "docs", "--collection", "whole"]).ok();
    let cost = sim.meter().total_tokens();
    sim.reset_meter();
    sandbox.atlas(&["budget", "set", "--daily", &(cost + cost / 2).to_string()]).ok();

    let refused = sandbox.atlas(&["index", "docs"]);
    assert_eq!(refused.code, Some(1), "{}", refused.stderr);
    let paid = sim.meter().total_tokens();
    assert!(paid > 0 && paid < cost, "{paid} of {cost}");
    assert_eq!(used(&sandbox), cost + paid);
    let words: Vec<&str> = refused.stdout.split_whitespace().collect();
    let indexed: usize = words[1].parse().unwrap();
    assert!(words.starts_with(&["Indexed"]) && indexed > 0 && indexed < 50, "{}", refused.stdout);
    let left = format!("; {} files left", 50 - indexed);
    assert!(refused.stderr.contains(&left) && refused.stderr.contains("token budget"), "{}", refused.stderr);

    sandbox.atlas(&["budget", "set", "--daily", "1000000000"]).ok();
    let rest = sandbox.atlas(&["index", "docs"]).ok();
    assert!(rest.stdout.starts_with(&format!("Indexed {} files", 50 - indexed)), "{}", rest.stdout);
    assert_eq!((sim.meter().total_tokens(), used(&sandbox)), (cost, 2 * cost));
}

#[test]
fn a_killed_index_run_pays_twice_for_no_more_than_four_calls() {
    /// Calls at once, and the most that each carries: what GUARANTEES names.
    const IN_FLIGHT: u64 = 4 * 16 * 1024;
    let runtime = runtime();
    let (sandbox, sim) = embedded_project(&runtime, 50);
    sandbox.atlas(&["index", "docs", "--collection", "whole"]).ok();
    let cost = sim.meter().total_tokens();
    sim.reset_meter();
    // The first calls are answered, all later ones hang.
    let slow =
        json!([{"kind": "embedding", "times": 3}, {"kind": "embedding", "delay_ms": 600_000, "times": 100}]);
    sim.script(slow).unwrap();
    let index = sandbox.start("index", &["index", "docs"]);
    let started = std::time::Instant::now();
    while sim.meter().calls() < 4 {
        assert!(started.elapsed() < support::BOUND, "{}", sim.meter().calls());
        std::thread::sleep(Duration::from_millis(20));
    }
    index.signal("KILL");
    assert_eq!(index.exit_code(), 137);
    sim.script(json!([])).unwrap();
    let before = sim.meter().total_tokens();
    let rest = sandbox.atlas(&["index", "docs"]).ok();
    let paid = sim.meter().total_tokens();
    assert!(paid - before < cost, "some were written before: {}", rest.stdout);
    assert!(paid <= cost + IN_FLIGHT, "{paid} for {cost}");
    let budget = sandbox.atlas(&["budget", "show", "--json"]).ok().json();
    let booked = ["used", "reserved"].map(|field| budget["budget"][field].as_u64().unwrap());
    assert!(booked[0] + booked[1] >= cost + paid, "never too little: {budget}");
}

#[test]
fn a_run_that_need_not_open_the_index_sees_every_change_that_one_that_does_would_see() {
    let sandbox = project();
    let index = |flags: &[&str]| sandbox.atlas(&[&["index", "."], flags].concat()).ok().stdout;
    let nothing = "Nothing to do: all 3 files are indexed already.\n";
    assert!(index(&[]).starts_with("Indexed 3 files"));
    let contents = || {
        let mut collections = fs::read_dir(sandbox.path().join(".atlas/vectors")).unwrap();
        collections.any(|entry| entry.unwrap().path().join("atlas.contents").exists())
    };
    assert!(contents(), "what is in the index is told without opening it");
    assert_eq!(index(&[]), nothing);

    // As long as before, and as old.
    let file = sandbox.path().join("docs/queue.md");
    let modified = fs::metadata(&file).unwrap().modified().unwrap();
    sandbox.write("docs/queue.md", &QUEUE.replace("worker", "helper"));
    fs::File::options().append(true).open(&file).unwrap().set_modified(modified).unwrap();
    assert!(index(&[]).starts_with("Indexed 1 file "));
    assert_eq!(index(&[]), nothing);
    let found = sandbox.atlas(&["search", "helper acknowledges", "--json", "-k", "1"]).ok().json();
    assert_eq!(found[0]["source"], "docs/queue.md");

    assert!(index(&["--collection", "other"]).starts_with("Indexed 3 files"));
    assert!(index(&["--repo", "another"]).starts_with("Indexed 3 files"));
    assert!(index(&["--rebuild"]).ends_with(nothing));
    assert_eq!(index(&[]), nothing);

    sandbox.remove("src/retry.rs");
    let gone = index(&[]);
    assert!(gone.contains("1 deleted"), "{gone}");
    assert_eq!(index(&[]), "Nothing to do: all 2 files are indexed already.\n");

    let sandbox = sandbox.with_env("CHUNK_TOKENS", "64");
    let cut_anew = sandbox.atlas(&["index", "."]).ok().stdout;
    assert!(cut_anew.starts_with("Indexed 2 files"), "{cut_anew}");
}
