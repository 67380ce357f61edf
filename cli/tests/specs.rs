//! What people see: text while it is written, score cards, the examples in `docs/`.

#![cfg(feature = "embedded")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use std::{collections::BTreeSet, fmt::Write as _, fs, path::Path, process::Command};

use atlas_openai_sim::{RunningSim, Sim, SimOptions};
use atlas_worker::agent::judge::{judge, sources};
use serde_json::json;
use support::Sandbox;

const DOCUMENT: &str = "# Queue\n\nRequests wait in a queue until a worker pulls them.\n\
    A worker acknowledges a request once its result is stored, because a crash before that must lose nothing.\n";

/// A sandbox whose model API is the simulator. It serves as long as the runtime lives.
fn simulated(runtime: &tokio::runtime::Runtime) -> (Sandbox, RunningSim) {
    let sim = runtime.block_on(Sim::start(SimOptions::default())).unwrap();
    let sandbox = Sandbox::new(&[("docs/queue.md", DOCUMENT)])
        .with_env("OPENAI_BASE_URL", sim.base_url())
        .with_env("OPENAI_API_KEY", "sk-test-key")
        .with_env("OPENAI_EMBEDDING_MODEL", "none")
        .with_env("SOURCE_URL_TEMPLATE", "https://git.example.com/app/{path}#L{start}-L{end}")
        .with_env("STREAM_INTERVAL_MILLISECONDS", "20");
    (sandbox, sim)
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
}

#[test]
fn a_spec_is_shown_while_it_is_written_then_judged() {
    let runtime = runtime();
    let (sandbox, sim) = simulated(&runtime);
    sandbox.atlas(&["index", ".", "-q"]).ok();
    let ask = ["ask", "Design the queue of requests", "--live", "always", "--out", "spec.md"];
    let asked = sandbox.atlas(&ask).ok();
    assert!(asked.stderr.contains("# Queue of requests\n\n## Summary"), "{}", asked.stderr);
    assert!(!asked.stderr.contains("\"summary\""), "no JSON: {}", asked.stderr);
    let spec = fs::read_to_string(sandbox.path().join("spec.md")).unwrap();
    assert!(spec.contains("[open](<https://git.example.com/app/docs/queue.md#L1-L4>)"), "{spec}");
    let used = sandbox.atlas(&["budget", "show", "--json"]).ok().json()["budget"]["used"].as_u64().unwrap();
    assert_eq!(used, sim.meter().total_tokens(), "streamed, and billed to the token");

    let quiet = sandbox.atlas(&["ask", "Design the queue of requests"]).ok();
    assert!(!quiet.stderr.contains("## Summary"), "nobody watches: {}", quiet.stderr);

    let card = sandbox.atlas(&["judge", "spec.md"]).ok();
    assert!(card.stdout.contains("citations") && card.stdout.contains("/ 100"), "{}", card.stdout);
    let json = sandbox.atlas(&["judge", "spec.md", "--json"]).ok().json();
    assert_eq!(json[0]["kind"], "spec");
    assert_eq!(json[0]["checks"].as_array().unwrap().len(), 11);

    // A judge model: booked in the same ledger.
    let marks = json!({"groundedness": {"score": 4, "reason": "Close to its passage."},
        "usefulness": {"score": 3, "reason": "An outline."}, "unsupported": [], "missing": ["The load."]});
    sim.script(json!([{"content": marks}])).unwrap();
    let judged = sandbox.atlas(&["judge", "spec.md", "--model", "--json"]).ok().json();
    assert_eq!(judged[0]["opinion"]["groundedness"]["score"], 4);
    assert_eq!(judged[0]["opinion"]["missing"], json!(["The load."]));
    let now = "[1] docs/queue.md:1-4: read as the file is now (it names no commit)";
    assert_eq!(judged[0]["opinion"]["not_as_cited"], json!([now]));
    let used = sandbox.atlas(&["budget", "show", "--json"]).ok().json()["budget"]["used"].as_u64().unwrap();
    assert_eq!(used, sim.meter().total_tokens());
    sim.script(json!([{"fault": "not_json"}])).unwrap();
    let failed = sandbox.atlas(&["judge", "spec.md", "--model"]);
    assert_eq!(failed.code, Some(1));
    assert!(failed.stderr.contains("gave no marks"), "{}", failed.stderr);
    let used = sandbox.atlas(&["budget", "show", "--json"]).ok().json()["budget"]["used"].as_u64().unwrap();
    assert_eq!(used, sim.meter().total_tokens(), "what was paid for nothing is booked too");
}

#[test]
fn a_score_below_the_minimum_fails() {
    let sandbox = Sandbox::new(&[("bad.md", "# Hello\n\nworld <script>\n"), ("empty.md", "")]);
    sandbox.atlas(&["judge", "bad.md"]).ok();
    let failed = sandbox.atlas(&["judge", "bad.md", "--min", "80"]);
    assert_eq!(failed.code, Some(1));
    assert!(failed.stderr.contains("below 80: bad.md"), "{}", failed.stderr);
    assert!(failed.stdout.contains("safety"), "the card is shown all the same: {}", failed.stdout);
    for wrong in
        [&["judge", "gone.md"][..], &["judge", "empty.md"], &["judge"], &["judge", "bad.md", "--min", "101"]]
    {
        assert_eq!(sandbox.atlas(wrong).code, Some(2), "{wrong:?}");
    }
    let some = sandbox.atlas(&["judge", "gone.md", "bad.md", "empty.md"]);
    assert_eq!(some.code, Some(2));
    assert!(some.stdout.contains("bad.md"), "one that can be read has its card: {}", some.stdout);
    for told in ["cannot read gone.md", "empty.md is empty"] {
        assert!(some.stderr.contains(told), "{}", some.stderr);
    }
    let no_model = sandbox.atlas(&["judge", "bad.md", "--model"]);
    assert_eq!(no_model.code, Some(2));
    assert!(no_model.stderr.contains("OPENAI_API_KEY"), "{}", no_model.stderr);
}

/// The score card's line about citations: score and detail.
fn citations(sandbox: &Sandbox, args: &[&str]) -> (f64, String) {
    let card = sandbox.atlas(&[&["judge", "--json"], args].concat()).ok().json();
    let checks = card[0]["checks"].as_array().unwrap();
    let check = checks.iter().find(|check| check["name"] == "citations").unwrap();
    (check["score"].as_f64().unwrap(), check["detail"].as_str().unwrap().to_owned())
}

#[test]
fn a_source_is_looked_up_in_the_commit_that_it_names() {
    let sandbox = Sandbox::new(&[("app/docs/queue.md", DOCUMENT), ("elsewhere/notes.md", "Notes.")]);
    let app = sandbox.path().join("app");
    atlas_test_support::git(&app, &["init", "--quiet"]);
    atlas_test_support::git(&app, &["add", "."]);
    atlas_test_support::git(&app, &["commit", "--quiet", "-m", "first"]);
    let commit = git(&app, &["rev-parse", "HEAD"]).unwrap();
    let commit = &commit[..12];
    // What the commit has counts, not what is there now.
    sandbox.remove("app/docs/queue.md");
    let spec = |lines: &str, file: &str, commit: &str| {
        format!(
            "# Queue\n\n## Context\n\n- It is durable. [1] [2]\n\n## Sources\n\n\
             - [1] `docs/queue.md:{lines}`, Queue (app at {commit}…)\n- [2] `{file}:1-2` (app at {commit}…)\n"
        )
    };
    sandbox.write("good.md", &spec("1-4", "docs/queue.md", commit));
    sandbox.write("wrong.md", &spec("3-9", "docs/made-up.md", commit));
    sandbox.write("other.md", &spec("3-9", "docs/made-up.md", "0123456789ab"));
    let fine = (1.0, "2 sources, each cited, none missing".to_owned());
    assert_eq!(citations(&sandbox, &["good.md", "--repository", "app"]), fine);
    assert_eq!(
        citations(&sandbox, &["good.md", "--repository", "elsewhere", "--repository", "app/docs"]),
        fine
    );
    let (score, detail) = citations(&sandbox, &["wrong.md", "--repository", "app"]);
    assert!(score < 0.01, "{score}");
    for told in [
        format!("wrong: [1] docs/queue.md:3-9 (the file has only 4 lines at {commit})"),
        format!("[2] docs/made-up.md:1-2 (there is no such file at {commit})"),
    ] {
        assert!(detail.contains(&told), "{detail}");
    }
    for (args, why) in [
        (&["other.md", "--repository", "app"][..], "commit 0123456789ab is not here"),
        (&["wrong.md", "--repository", "elsewhere"], "no git repository is at hand"),
    ] {
        let unchecked = format!("2 sources, each cited, none missing; not checked: [1] [2] ({why})");
        assert_eq!(citations(&sandbox, args), (1.0, unchecked));
    }
    let gone = sandbox.atlas(&["judge", "good.md", "--repository", "gone"]);
    assert_eq!(gone.code, Some(2), "{}", gone.stderr);
}

/// `docs/examples` are what `scripts/examples.sh` makes: their cards hold, and every file that they
/// cite is there.
#[test]
fn the_examples_in_the_documentation_hold() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let mut cards = String::new();
    let mut kinds = BTreeSet::new();
    let mut files: Vec<_> =
        fs::read_dir(root.join("docs/examples")).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    for path in files.iter().filter(|path| path.file_name().is_none_or(|name| name != "README.md")) {
        let name = path.file_name().unwrap().to_str().unwrap();
        let markdown = fs::read_to_string(path).unwrap();
        let card = judge(&markdown);
        assert!(card.score() >= 95, "{name}: {card}");
        let cited = sources(&markdown);
        assert!(!cited.is_empty(), "{name} cites nothing");
        for source in cited {
            assert!(
                root.join(&source.path).is_file(),
                "{name} cites {}, which is gone: run scripts/examples.sh",
                source.path
            );
        }
        kinds.insert(card.kind.as_str());
        let _ = writeln!(cards, "{name}: {card}");
    }
    assert_eq!(kinds.into_iter().collect::<Vec<_>>(), ["adr", "review", "spec"]);
    insta::assert_snapshot!("examples", cards);
}

fn git(root: &Path, arguments: &[&str]) -> Option<String> {
    let output = Command::new("git").arg("-C").arg(root).args(arguments).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The lines behind each citation of an example are in the commit that it names, which is part of this
/// history.
#[test]
fn the_examples_cite_lines_that_their_commit_has() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    if git(root, &["rev-parse", "--is-shallow-repository"]).is_none_or(|answer| answer.trim() != "false") {
        return atlas_test_support::skip(
            "the_examples_cite_lines_that_their_commit_has",
            "the git history",
            "this is no git repository, or a shallow one",
        );
    }
    let sandbox = Sandbox::new(&[]);
    for name in ["tenant-budgets.md", "adr-leases.md", "review-outbox.md"] {
        let markdown = fs::read_to_string(root.join("docs/examples").join(name)).unwrap();
        let links: Vec<(&str, &str)> = markdown
            .lines()
            .filter_map(|line| line.split_once("/blob/")?.1.split_once('/'))
            .map(|(commit, rest)| (commit, rest.trim_end_matches([')', '>'])))
            .collect();
        let cited = sources(&markdown);
        assert_eq!(links.len(), cited.len(), "{name}: every source has a link to its commit");
        for ((commit, link), source) in links.into_iter().zip(cited) {
            assert!(
                git(root, &["merge-base", "--is-ancestor", commit, "HEAD"]).is_some(),
                "{name} names {commit}, which is not in this history: run scripts/examples.sh on main"
            );
            assert!(
                link.starts_with(&format!("{}#L{}-L{}", source.path, source.start, source.end)),
                "{name}: {link}"
            );
        }
        let (file, root) = (root.join("docs/examples").join(name), root.to_str().unwrap());
        let (_, told) = citations(&sandbox, &[file.to_str().unwrap(), "--repository", root]);
        assert!(!told.contains("wrong") && !told.contains("not checked"), "{name}: {told}");
    }
}
