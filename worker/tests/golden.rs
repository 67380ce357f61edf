//! The golden set: 12 requests over this repository, answered by the simulator in good, sloppy, broken
//! and hostile ways, through a whole worker. The score cards are held as a snapshot: they change when
//! the agent changes, and a reviewer sees how.
//!
//! The passages are frozen (`golden/passages.json`), so that editing a document of the repository
//! changes nothing here. To take new ones: `ATLAS_UPDATE_GOLDEN=1 cargo test --workspace --test golden`.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::needless_pass_by_value,
    reason = "tests"
)]

mod support;

use std::{collections::BTreeSet, fmt::Write as _, fs, path::Path, sync::Arc};

use atlas_shared::{
    TaskId,
    gateway_api::{Passage, QueryChatRequest},
    message::{Answer, AnswerType},
};
use atlas_worker::agent::judge::judge;
use serde_json::{Value, json};
use support::Stack;
use uuid::Uuid;

/// What the passages are taken from.
const FILES: &[&str] = &[
    "README.md",
    "docs/ARCHITECTURE.md",
    "docs/GUARANTEES.md",
    "docs/OPERATIONS.md",
    "migrations/0003_ledger.up.sql",
    "migrations/0004_runs.up.sql",
    "migrations/0005_fleet.up.sql",
    "migrations/README.md",
    "shared/src/ledger.rs",
    "shared/src/resilience.rs",
    "worker/src/call.rs",
    "worker/src/gate.rs",
    "worker/src/outbox.rs",
    "worker/src/run.rs",
    "worker/src/sweep.rs",
];
/// Code of which more than the opening comment is taken.
const WHOLE: &[&str] = &["worker/src/outbox.rs", "worker/src/sweep.rs"];
const TOP_K: usize = 10;

/// A request and how the simulator answers it.
struct Case {
    name: &'static str,
    request: &'static str,
    metadata: Value,
    /// Refines the answer to the first case.
    refines: bool,
    script: Value,
    /// The least that the score card must say; an error has none.
    least: Option<u32>,
}

fn case(name: &'static str, request: &'static str, script: Value, least: Option<u32>) -> Case {
    Case { name, request, metadata: json!({}), refines: false, script, least }
}

/// A good answer that a person wrote, as a model should (`golden/answers`): the examples in the
/// documentation are made of the same.
fn written(name: &str) -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/answers/{name}.json"));
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

/// The first answer as the refinement changes it: one thing, and it is named.
fn weekly() -> Value {
    let mut spec = written("tenant-budgets")[1]["content"].clone();
    spec["summary"] = json!(
        "Tenants get a limit for each week instead of each day, as a cap and not as a share set aside. \
         Everything else stays: the check is in the transaction that grants a reservation, and who is denied waits alone."
    );
    spec["changes"] = json!([{
        "section": "Requirements",
        "change": "A tenant's limit holds for a week that begins on Monday 00:00 UTC, not for a day",
        "reason": "The request asks for a weekly budget",
        "citations": [],
    }]);
    json!([{ "content": spec }])
}

fn cases() -> Vec<Case> {
    let always = |fault: &str| json!([{"fault": fault, "times": 100}]);
    let good = || json!([]);
    vec![
        case(
            "good",
            "Design token budgets for tenants, so that no tenant can use up the day of the others",
            written("tenant-budgets"),
            Some(95),
        ),
        case(
            "good, with a search",
            "Design how a second fleet takes over when the first one loses its store",
            json!([{"tool_calls": [{"arguments": {"query": "lease expires worker dies"}}]}]),
            Some(95),
        ),
        case("good, without passages", "Xylophone zebra quux", good(), Some(70)),
        case(
            "good record",
            "Write an ADR on where the lease of a run is kept",
            written("adr-leases"),
            Some(90),
        ),
        case(
            "good review",
            "Review how answers get from the outbox to the topic",
            written("review-outbox"),
            Some(90),
        ),
        Case {
            refines: true,
            ..case("good refinement", "Use a weekly budget instead of a daily one", weekly(), Some(95))
        },
        case("sloppy", "Design how the gateway answers while Qdrant is down", always("sloppy"), Some(50)),
        case(
            "broken diagram",
            "Design how a message that cannot be read is kept and sent again",
            always("broken_mermaid"),
            Some(80),
        ),
        case(
            "broken JSON, mended",
            "Design how circuits of all dependencies are shown on one dashboard",
            json!([{"fault": "invalid_json"}]),
            Some(90),
        ),
        case(
            "broken citations",
            "Design how the ledger is reconciled with the provider's bill",
            always("bad_citations"),
            Some(60),
        ),
        case(
            "broken off",
            "Design how runs are cancelled while a model call is under way",
            always("length"),
            Some(40),
        ),
        case("hostile", "Design how secrets are rotated without a restart", always("hostile"), Some(70)),
    ]
}

#[tokio::test]
async fn the_score_cards_of_the_golden_set_hold() {
    let passages = Arc::new(passages());
    let stack = Stack::with_search(Arc::new(move |request| search(&passages, request))).await;
    // Room for a round of searches and a whole document after it.
    let stack = stack.with("TOKEN_BUDGET_PER_RUN", "24000");
    let worker = stack.worker().await;
    let cases = cases();
    assert_eq!(cases.len(), 12);
    let mut cards = String::new();
    let mut first: Option<Answer> = None;
    for case in cases {
        stack.sim.script(case.script).unwrap();
        let mut metadata = case.metadata;
        if case.refines {
            metadata["parent_id"] = json!(first.as_ref().unwrap().task_id);
        }
        let task = TaskId(Uuid::new_v5(&Uuid::NAMESPACE_OID, case.name.as_bytes()));
        let answer = stack.messages_about(task, case.request, metadata).await.pop().unwrap();
        assert_eq!(answer.msg_type, AnswerType::Spec, "{}: {answer:?}", case.name);
        let markdown = answer.content.as_str().unwrap();
        let card = judge(markdown);
        let meta = |name: &str| answer.metadata[name].to_string();
        writeln!(cards, "{}\n  {:?}\n{card}", case.name, case.request).unwrap();
        writeln!(
            cards,
            "  calls {}, repaired {}, incomplete {}, invalid citations {}, weak {}, general knowledge {}\n",
            answer.metadata["token_use"]["calls"].as_array().map_or(0, Vec::len),
            meta("repaired"),
            meta("incomplete"),
            meta("citations_invalid"),
            meta("citations_weak"),
            meta("general_knowledge"),
        )
        .unwrap();
        if case.refines {
            let sources = |answer: &Answer| -> BTreeSet<String> {
                let citations = answer.metadata["citations"].as_array().unwrap().clone();
                citations.iter().map(|citation| citation["source"].as_str().unwrap().to_owned()).collect()
            };
            let parents = sources(first.as_ref().unwrap());
            assert!(!parents.is_disjoint(&sources(&answer)), "what the parent stood on is found again");
        }
        if let Some(least) = case.least {
            assert!(card.score() >= least, "{}: {card}\n{markdown}", case.name);
        }
        first.get_or_insert(answer);
    }
    let (ledger, meter) = stack.books().await;
    assert_eq!(ledger, meter, "ledger and meter over the whole set");
    worker.drain().await;
    insta::assert_snapshot!("score_cards", cards);
    insta::assert_snapshot!("good_spec", first.unwrap().content.as_str().unwrap());
}

/// The passages that share the most words with the query; ties in the order of the files.
fn search(passages: &[Passage], request: &QueryChatRequest) -> Vec<Passage> {
    let words = |text: &str| -> BTreeSet<String> {
        text.split(|c: char| !c.is_alphanumeric())
            .filter(|word| word.len() > 3)
            .map(|word| word.to_lowercase().trim_end_matches('s').to_owned())
            .collect()
    };
    let asked = words(&request.query);
    let path = request.filter.as_ref().and_then(|filter| filter.path.as_deref());
    let mut found: Vec<(usize, &Passage)> = passages
        .iter()
        .filter(|passage| path.is_none_or(|path| path == passage.source))
        .map(|passage| (words(&passage.text).intersection(&asked).count(), passage))
        .filter(|(shared, _)| *shared > 0)
        .collect();
    found.sort_by_key(|(shared, _)| std::cmp::Reverse(*shared));
    found.into_iter().take(TOP_K).map(|(_, passage)| passage.clone()).collect()
}

fn passages() -> Vec<Passage> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let path = here.join("tests/golden/passages.json");
    if std::env::var("ATLAS_UPDATE_GOLDEN").is_ok_and(|value| value == "1") {
        let root = here.parent().unwrap();
        let all: Vec<Passage> = FILES
            .iter()
            .flat_map(|file| chunks(file, &fs::read_to_string(root.join(file)).unwrap()))
            .collect();
        fs::write(&path, serde_json::to_string_pretty(&all).unwrap() + "\n").unwrap();
    }
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

/// Sections of Markdown; the opening comment of code; pieces of anything else.
fn chunks(file: &str, text: &str) -> Vec<Passage> {
    let is_code =
        Path::new(file).extension().is_some_and(|extension| extension == "rs") && !WHOLE.contains(&file);
    let lines: Vec<&str> = text.lines().collect();
    let mut chunks = Vec::new();
    let mut push = |start: usize, end: usize, heading: Option<String>| {
        let body = lines[start..end].join("\n");
        let trimmed = body.trim_end();
        if trimmed.split_whitespace().count() > 12 {
            let first = u32::try_from(start + 1).unwrap();
            chunks.push(Passage { heading, ..Passage::of_lines("atlas", file, first, trimmed) });
        }
    };
    if is_code {
        let end = lines.iter().position(|line| !line.starts_with("//!")).unwrap_or(lines.len());
        push(0, end, None);
        return chunks;
    }
    let mut start = 0;
    let mut heading = None;
    for (at, line) in lines.iter().enumerate() {
        if line.starts_with('#') || at - start >= 24 {
            push(start, at, heading.clone());
            start = at;
            if line.starts_with('#') {
                heading = Some(line.trim_start_matches('#').trim().to_owned());
            }
        }
    }
    push(start, lines.len(), heading);
    chunks
}
