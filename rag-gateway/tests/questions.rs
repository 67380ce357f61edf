//! Does the search find what people ask about this repository? Thirty questions whose answer files are
//! known, over the repository's own files, lexically, with the defaults: a change of chunking, weighing
//! or ranking that loses answers is seen here.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
};

use atlas_rag_gateway::source::walk::{WalkOptions, walk};
use serde_json::{Value, json};
use support::{Stand, sources};

/// Share of the questions that must have an answer among the first five files.
const FLOOR: f64 = 0.9;

/// A question and the files that answer it.
struct Question {
    text: String,
    answers: Vec<String>,
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

fn questions() -> Vec<Question> {
    include_str!("questions.tsv")
        .lines()
        .filter(|line| !line.starts_with('#'))
        .map(|line| {
            let (text, answers) = line.split_once('\t').expect("a question, a tab, its files");
            Question { text: text.to_owned(), answers: answers.split(' ').map(str::to_owned).collect() }
        })
        .collect()
}

/// What `atlas index .` would index here, by path.
fn files() -> Vec<(String, String)> {
    let root = root();
    let walked = walk(&WalkOptions::of(&root), |_| {});
    let mut files: Vec<(String, String)> = walked
        .files
        .into_iter()
        .filter_map(|file| Some((file.source, fs::read_to_string(file.path).ok()?)))
        .collect();
    files.sort();
    files
}

#[tokio::test(flavor = "multi_thread")]
async fn questions_about_this_repository_find_their_files() {
    let stand = Stand::start(&[("OPENAI_EMBEDDING_MODEL", "none")]).await;
    let files = files();
    assert!(files.len() > 200, "{} files", files.len());
    for batch in files.chunks(50) {
        let documents: Vec<Value> =
            batch.iter().map(|(source, text)| json!({"source": source, "text": text})).collect();
        stand.put(json!(documents)).await.ok();
    }

    // A path, or enough of it, is the question for that file.
    for (path, expected) in [
        ("worker/src/outbox.rs", "worker/src/outbox.rs"),
        ("shared/src/resilience.rs", "shared/src/resilience.rs"),
        ("resilience.rs", "shared/src/resilience.rs"),
        ("docs/MODELS.md", "docs/MODELS.md"),
        ("intake.rs", "worker/src/intake.rs"),
        ("guess/tuned.tsv", "worker/src/agent/guess/tuned.tsv"),
        ("what does `cli/src/sync.rs` send again?", "cli/src/sync.rs"),
    ] {
        let request = json!({"query": path, "mode": "lexical"});
        let found = stand.post("/v1/query_chat", request).await.ok();
        assert_eq!(sources(&found)[0], expected, "{path}");
    }

    let questions = questions();
    assert_eq!(questions.len(), 30);
    let (mut hits, mut misses) = (0, String::new());
    for Question { text, answers } in &questions {
        for answer in answers.iter().filter(|answer| !root().join(answer).exists()) {
            // Files may move: at least one of those that are named must be there.
            assert!(answers.len() > 1, "{answer} is gone; name the file that answers {text:?} now");
        }
        let request = json!({"query": text, "top_k": 5, "mode": "lexical", "collapse_by_file": true});
        let found = stand.post("/v1/query_chat", request).await.ok();
        let found = sources(&found);
        if found.iter().any(|source| answers.iter().any(|answer| answer == source)) {
            hits += 1;
        } else {
            let _ = write!(misses, "\n{text}\n  found {found:?}");
        }
    }
    let share = f64::from(hits) / questions.len() as f64;
    println!("hit@5 {share:.3}{misses}");
    assert!(share >= FLOOR, "hit@5 is {share:.3}, not {FLOOR}:{misses}");
    stand.gateway.shutdown().await;
}
