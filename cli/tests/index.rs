//! `atlas index` against a gateway that remembers what it was told, so that it can be stopped at a
//! chosen moment.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
};

use atlas_shared::gateway_api::{
    DeleteDocuments, DeleteDocumentsResult, Document, DocumentList, DocumentOutcome, DocumentResult,
    IndexedDocument, PutDocuments, PutDocumentsResult, content_hash,
};
use atlas_test_support::git;
use axum::{
    Json, Router,
    extract::{Query, State},
    http::StatusCode,
    response::IntoResponse as _,
    routing::get,
};
use support::Sandbox;
use tokio::sync::{Notify, Semaphore};

/// A gateway in memory.
#[derive(Default)]
struct FakeGateway {
    documents: Mutex<BTreeMap<String, Document>>,
    /// Documents that were sent, again and again.
    sent: Mutex<Vec<String>>,
    deleted: Mutex<Vec<String>>,
    /// Told when a request with documents has come.
    came: Notify,
    /// A request with documents waits for a permit when this is set.
    gate: Option<Semaphore>,
    /// Sources that are refused, with their whole request.
    poison: Option<&'static str>,
    /// What it says of the collection and the configured embedding model.
    mismatch: Option<&'static str>,
    words_only: Option<&'static str>,
}

impl FakeGateway {
    /// Listens on a port of its own, on a runtime of its own.
    fn listen(self) -> (Arc<Self>, String, tokio::runtime::Runtime) {
        let gateway = Arc::new(self);
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let router = Router::new()
            .route("/v1/documents", get(list).put(put).delete(delete))
            .with_state(Arc::clone(&gateway));
        runtime.spawn(async move { axum::serve(listener, router).await });
        (gateway, url, runtime)
    }

    fn sources(&self) -> Vec<String> {
        self.documents.lock().unwrap().keys().cloned().collect()
    }

    fn take_sent(&self) -> Vec<String> {
        let mut sent = std::mem::take(&mut *self.sent.lock().unwrap());
        sent.sort();
        sent
    }
}

async fn list(
    State(gateway): State<Arc<FakeGateway>>,
    Query(query): Query<BTreeMap<String, String>>,
) -> axum::response::Response {
    let documents = gateway.documents.lock().unwrap();
    if documents.is_empty() {
        return (
            StatusCode::NOT_FOUND,
            [("content-type", "application/problem+json")],
            r#"{"type":"unknown_collection","title":"x","status":404,"detail":"no such collection"}"#,
        )
            .into_response();
    }
    Json(DocumentList {
        documents: documents
            .values()
            .filter(|document| {
                query.get("repo").is_none_or(|repo| document.repo.as_ref().is_none_or(|it| it == repo))
            })
            .map(|document| IndexedDocument {
                source: document.source.clone(),
                content_hash: content_hash(&document.text),
                chunks: 1,
                commit: document.commit.clone(),
                origin: document.origin.clone(),
                repo: document.repo.clone(),
            })
            .collect(),
        mismatch: gateway.mismatch.map(str::to_owned),
        words_only: gateway.words_only.map(str::to_owned),
    })
    .into_response()
}

async fn put(
    State(gateway): State<Arc<FakeGateway>>,
    Json(request): Json<PutDocuments>,
) -> axum::response::Response {
    gateway.came.notify_one();
    if let Some(gate) = &gateway.gate {
        gate.acquire().await.unwrap().forget();
    }
    if let Some(poison) = gateway.poison
        && request.documents.iter().any(|document| document.source == poison)
    {
        return (StatusCode::UNPROCESSABLE_ENTITY, "poison").into_response();
    }
    let mut documents = gateway.documents.lock().unwrap();
    let mut results = Vec::new();
    for document in request.documents {
        gateway.sent.lock().unwrap().push(document.source.clone());
        results.push(DocumentResult {
            source: document.source.clone(),
            outcome: DocumentOutcome::Indexed,
            chunks: 1,
            error: None,
        });
        documents.insert(document.source.clone(), document);
    }
    Json(PutDocumentsResult { results, tokens: 0 }).into_response()
}

async fn delete(
    State(gateway): State<Arc<FakeGateway>>,
    Json(request): Json<DeleteDocuments>,
) -> Json<DeleteDocumentsResult> {
    let mut documents = gateway.documents.lock().unwrap();
    for source in &request.sources {
        documents.remove(source);
    }
    let deleted = request.sources.len();
    gateway.deleted.lock().unwrap().extend(request.sources);
    Json(DeleteDocumentsResult { deleted })
}

#[test]
fn a_second_run_sends_nothing_a_change_sends_one_file_and_what_vanished_is_deleted() {
    let (gateway, url, _runtime) = FakeGateway::default().listen();
    let files = [(".git/HEAD", ""), ("a.md", "# A\n"), ("docs/b.md", "# B\n"), ("c.rs", "fn c() {}\n")];
    let sandbox = Sandbox::new(&files).with_env("RAG_URL", &url);

    let first = sandbox.atlas(&["index", "."]).ok();
    assert!(first.stdout.starts_with("Indexed 3 files (3 chunks)"), "{}", first.stdout);
    assert_eq!(gateway.take_sent(), ["a.md", "c.rs", "docs/b.md"]);

    let second = sandbox.atlas(&["index", "."]).ok();
    assert_eq!(second.stdout, "Nothing to do: all 3 files are indexed already.\n");
    assert_eq!(gateway.take_sent(), [] as [&str; 0]);

    sandbox.write("a.md", "# A changed\n");
    sandbox.remove("c.rs");
    // A part of the folder is no reason to delete the rest.
    sandbox.atlas(&["index", "docs"]).ok();
    sandbox.atlas(&["index", ".", "--include", "docs/**"]).ok();
    assert_eq!(gateway.sources(), ["a.md", "c.rs", "docs/b.md"]);

    let dry = sandbox.atlas(&["index", ".", "--dry-run"]).ok();
    assert_eq!(dry.stdout, "index  a.md\ndelete c.rs\n");
    assert_eq!(gateway.take_sent(), [] as [&str; 0]);

    let third = sandbox.atlas(&["index", "."]).ok();
    assert!(third.stdout.contains("1 unchanged, 1 deleted"), "{}", third.stdout);
    assert_eq!(gateway.take_sent(), ["a.md"]);
    assert_eq!(*gateway.deleted.lock().unwrap(), ["c.rs"]);
}

#[test]
fn what_does_not_fit_the_embedding_model_is_told_although_nothing_is_to_be_sent() {
    let document = Document { source: "a.md".to_owned(), text: "# A\n".to_owned(), ..Document::default() };
    let documents = || Mutex::new([("a.md".to_owned(), document.clone())].into());
    let other = "collection \"c\" was built with embedding model small, but large is configured";
    let (gateway, url, _runtime) =
        FakeGateway { documents: documents(), mismatch: Some(other), ..FakeGateway::default() }.listen();
    let sandbox = Sandbox::new(&[(".git/HEAD", ""), ("a.md", "# A\n")]).with_env("RAG_URL", &url);
    for arguments in [&["index", "."][..], &["index", ".", "--dry-run"]] {
        let told = sandbox.atlas(arguments);
        assert_eq!(told.code, Some(1), "{arguments:?}");
        assert!(told.stderr.contains(other) && told.stdout.is_empty(), "{}", told.stderr);
    }
    assert_eq!(gateway.take_sent(), [] as [&str; 0]);

    let words = "collection \"c\" is searched by words only: `atlas index --rebuild`";
    let (_gateway, url, _runtime) =
        FakeGateway { documents: documents(), words_only: Some(words), ..FakeGateway::default() }.listen();
    let warned = sandbox.with_env("RAG_URL", &url).atlas(&["index", "."]).ok();
    assert_eq!(warned.stdout, "Nothing to do: all 1 file are indexed already.\n");
    assert!(warned.stderr.contains(words), "{}", warned.stderr);
}

#[test]
fn text_in_other_encodings_is_indexed_and_v_says_so() {
    let (gateway, url, _runtime) = FakeGateway::default().listen();
    let sandbox = Sandbox::new(&[(".git/HEAD", "")]).with_env("RAG_URL", &url);
    std::fs::write(sandbox.path().join("latin-1.txt"), b"Gr\xf6\xdfe\n").unwrap();
    let told = sandbox.atlas(&["index", ".", "-v"]).ok();
    assert!(told.stderr.contains("latin-1.txt (decoded from windows-1252)"), "{}", told.stderr);
    assert_eq!(gateway.documents.lock().unwrap()["latin-1.txt"].text, "Größe\n");
    assert!(sandbox.atlas(&["index", "."]).ok().stdout.starts_with("Nothing to do"));
}

#[test]
fn ctrl_c_stops_between_batches_and_the_next_run_goes_on() {
    let files: Vec<(String, String)> =
        (0..60).map(|n| (format!("f{n:02}.md"), format!("# File {n}\n"))).collect();
    let files: Vec<(&str, &str)> = files.iter().map(|(name, text)| (name.as_str(), text.as_str())).collect();
    let (gateway, url, runtime) =
        FakeGateway { gate: Some(Semaphore::new(0)), ..FakeGateway::default() }.listen();
    let sandbox = Sandbox::new(&files).with_env("RAG_URL", &url);

    let index = sandbox.start("index", &["index", ".", "--exclude", ".index.*"]);
    // Both senders wait inside the gateway: nothing is indexed yet.
    runtime.block_on(async {
        gateway.came.notified().await;
    });
    index.signal("INT");
    index.wait_for("Stopping");
    let gate = gateway.gate.as_ref().unwrap();
    gate.add_permits(1000);
    assert_eq!(index.exit_code(), 130, "{}", index.log());
    assert!(index.log().contains("run the same command again"), "{}", index.log());
    let first = gateway.take_sent();
    assert!(!first.is_empty() && first.len() < 60, "{} files were sent", first.len());

    let resumed = sandbox.atlas(&["index", ".", "--exclude", ".index.*"]).ok();
    assert!(resumed.stdout.contains(&format!("{} unchanged", first.len())), "{}", resumed.stdout);
    let second = gateway.take_sent();
    assert_eq!(first.len() + second.len(), 60, "no file was sent twice");
    assert_eq!(gateway.sources().len(), 60);
}

#[test]
fn one_document_that_is_refused_does_not_hold_up_the_others() {
    let files: Vec<(String, String)> =
        (0..20).map(|n| (format!("f{n:02}.md"), format!("# File {n}\n"))).collect();
    let files: Vec<(&str, &str)> = files.iter().map(|(name, text)| (name.as_str(), text.as_str())).collect();
    let (gateway, url, _runtime) = FakeGateway { poison: Some("f07.md"), ..FakeGateway::default() }.listen();
    let sandbox = Sandbox::new(&files).with_env("RAG_URL", &url);
    let ran = sandbox.atlas(&["index", "."]);
    assert_eq!(ran.code, Some(1));
    assert!(ran.stderr.contains("f07.md"), "{}", ran.stderr);
    assert_eq!(gateway.sources().len(), 19);
}

#[test]
fn secrets_never_leave_the_machine_and_the_user_is_told() {
    let key = format!("sk-{}", "a1b2c3d4e5".repeat(4));
    let (gateway, url, _runtime) = FakeGateway::default().listen();
    let sandbox = Sandbox::new(&[
        ("README.md", "# Shop\n"),
        (".env", "OPENAI_API_KEY=x\n"),
        ("deploy/tls.pem", "x\n"),
        ("notes.md", &format!("my key is {key}\n")),
    ])
    .with_env("RAG_URL", &url);
    // Not only with -v: who looks for the file must learn where it is.
    let ran = sandbox.atlas(&["index", "."]).ok();
    assert_eq!(gateway.sources(), ["README.md"]);
    assert!(ran.stderr.contains("3 looks like a secret"), "{}", ran.stderr);
    assert!(ran.stderr.contains("notes.md (looks like a secret: an API key in line 1)"), "{}", ran.stderr);
    assert!(!format!("{}{}", ran.stdout, ran.stderr).contains(&key));
}

#[test]
fn a_gateway_that_does_not_answer_is_said_clearly() {
    let sandbox = Sandbox::new(&[("a.md", "# A\n")]).with_env("RAG_URL", "http://127.0.0.1:9/");
    let ran = sandbox.atlas(&["index", "."]);
    assert_eq!(ran.code, Some(1));
    assert!(ran.stderr.contains("error: gateway does not answer"), "{}", ran.stderr);
    assert!(ran.stderr.contains("why:") && ran.stderr.contains("fix:"), "{}", ran.stderr);
}

#[test]
fn another_repository_of_the_same_name_replaces_nothing() {
    let (gateway, url, _runtime) = FakeGateway::default().listen();
    let sandbox =
        Sandbox::new(&[("one/docs/a.md", "# A\n"), ("two/docs/b.md", "# B\n")]).with_env("RAG_URL", &url);
    sandbox.atlas(&["index", "one/docs"]).ok();
    for arguments in [&["index", "two/docs"][..], &["index", "two/docs", "--dry-run"]] {
        let refused = sandbox.atlas(arguments);
        assert_eq!(refused.code, Some(1), "{}", refused.stderr);
        for words in
            ["the name docs stands for another repository", "1 file of", "one/docs", "--repo two-docs"]
        {
            assert!(refused.stderr.contains(words), "{}", refused.stderr);
        }
        assert_eq!(gateway.sources(), ["a.md"]);
    }
    // It was moved, says who names it.
    let moved = sandbox.atlas(&["index", "two/docs", "--repo", "docs"]).ok();
    assert!(moved.stdout.contains("1 deleted"), "{}", moved.stdout);
    assert_eq!(gateway.sources(), ["b.md"]);
    assert!(sandbox.atlas(&["index", "two/docs"]).ok().stdout.starts_with("Nothing to do"));
}

#[test]
fn a_repository_that_gets_a_remote_or_another_one_stays_the_same() {
    let (gateway, url, _runtime) = FakeGateway::default().listen();
    let sandbox = Sandbox::new(&[("api/a.md", "# A\n"), ("api/b.md", "# B\n")]).with_env("RAG_URL", &url);
    let api = sandbox.path().join("api");
    git(&api, &["init", "--quiet"]);
    sandbox.atlas(&["index", "api"]).ok();
    for remote in ["git@example.org:team/api.git", "git@example.org:renamed/api.git"] {
        git(&api, &["config", "remote.origin.url", remote]);
        sandbox.atlas(&["index", "api"]).ok();
        assert!(sandbox.atlas(&["index", "api"]).ok().stdout.starts_with("Nothing to do"));
    }
    let origin = gateway.documents.lock().unwrap()["a.md"].origin.clone().unwrap();
    assert!(origin.starts_with("example.org/renamed/api in ") && origin.ends_with("/api"), "{origin}");
    // Another way to write it is no other repository, and nothing is sent for it.
    git(&api, &["config", "remote.origin.url", "https://example.org/renamed/api"]);
    assert!(sandbox.atlas(&["index", "api"]).ok().stdout.starts_with("Nothing to do"));
    // Other files at the same place are.
    sandbox.write("api/a.md", "# C\n");
    sandbox.write("api/b.md", "# D\n");
    git(&api, &["config", "remote.origin.url", "https://example.org/other/api"]);
    let refused = sandbox.atlas(&["index", "api"]);
    assert!(refused.stderr.contains("stands for another repository"), "{}", refused.stderr);
    assert!(refused.stderr.contains("--repo other-api"), "{}", refused.stderr);
}

#[test]
fn a_worktree_is_told_under_which_name_its_repository_is_indexed() {
    let (_gateway, url, _runtime) = FakeGateway::default().listen();
    let sandbox = Sandbox::new(&[("api/a.md", "# A\n")]).with_env("RAG_URL", &url);
    let api = sandbox.path().join("api");
    git(&api, &["init", "--quiet"]);
    git(&api, &["add", "."]);
    git(&api, &["commit", "--quiet", "-m", "first"]);
    git(&api, &["config", "remote.origin.url", "git@example.org:team/api.git"]);
    git(&api, &["worktree", "add", "--quiet", "../feature"]);
    let first = sandbox.atlas(&["index", "api"]).ok();
    assert!(!first.stderr.contains("Warning"), "{}", first.stderr);
    let told = sandbox.atlas(&["index", "feature", "--dry-run"]).ok();
    for words in ["1 file of this repository (example.org/team/api)", "indexed as api", "`--repo api`"] {
        assert!(told.stderr.contains(words), "{}", told.stderr);
    }
    let named = sandbox.atlas(&["index", "feature", "--repo", "api"]).ok();
    assert!(named.stdout.starts_with("Nothing to do"), "{}", named.stdout);
    assert!(!named.stderr.contains("Warning"), "{}", named.stderr);
}

#[test]
fn a_folder_that_became_empty_is_forgotten_and_a_repository_only_when_told() {
    let (gateway, url, _runtime) = FakeGateway::default().listen();
    let sandbox = Sandbox::new(&[("shop/.git/HEAD", ""), ("shop/src/a.md", "# A\n"), ("shop/b.md", "# B\n")])
        .with_env("RAG_URL", &url);
    sandbox.atlas(&["index", "shop"]).ok();
    sandbox.remove("shop/src/a.md");
    let emptied = sandbox.atlas(&["index", "shop/src"]).ok();
    assert!(emptied.stdout.contains("1 deleted"), "{}", emptied.stdout);
    assert_eq!(gateway.sources(), ["b.md"]);
    let again = sandbox.atlas(&["index", "shop/src"]);
    assert!(again.code == Some(1) && again.stderr.contains("there is nothing to index"), "{}", again.stderr);

    sandbox.remove("shop/b.md");
    let refused = sandbox.atlas(&["index", "shop"]);
    assert_eq!(refused.code, Some(1));
    assert!(refused.stderr.contains("1 file of it are indexed") && refused.stderr.contains("--allow-empty"));
    assert_eq!(gateway.sources(), ["b.md"]);
    sandbox.atlas(&["index", "shop", "--allow-empty"]).ok();
    assert_eq!(gateway.sources(), [] as [&str; 0]);
}

#[test]
fn a_name_that_no_document_can_have_is_skipped_and_told() {
    let (gateway, url, _runtime) = FakeGateway::default().listen();
    let sandbox = Sandbox::new(&[("a.md", "# A\n"), ("two\nlines.md", "# B\n")]).with_env("RAG_URL", &url);
    for arguments in [&["index", ".", "--dry-run"][..], &["index", "."]] {
        let ran = sandbox.atlas(arguments).ok();
        assert!(ran.stderr.contains(r"two\nlines.md (name cannot be indexed"), "{}", ran.stderr);
    }
    assert_eq!(gateway.sources(), ["a.md"]);
}

#[test]
fn a_repository_without_a_work_tree_is_read_as_one() {
    let (gateway, url, _runtime) = FakeGateway::default().listen();
    let sandbox = Sandbox::new(&[("shop/door.md", "# Door\n")]).with_env("RAG_URL", &url);
    let shop = sandbox.path().join("shop");
    git(&shop, &["init", "--quiet"]);
    git(&shop, &["add", "."]);
    git(&shop, &["commit", "--quiet", "-m", "first"]);
    git(&sandbox.path(), &["clone", "--quiet", "--bare", "shop", "bare.git"]);
    sandbox.atlas(&["index", "bare.git"]).ok();
    let documents = gateway.documents.lock().unwrap();
    assert_eq!(documents.keys().collect::<Vec<_>>(), ["door.md"]);
    assert_eq!(documents["door.md"].repo.as_deref(), Some("bare"));
}

#[test]
fn a_git_url_is_cloned_and_indexed_at_its_commit() {
    let origin = tempfile::tempdir().unwrap();
    let shop = origin.path().join("shop");
    std::fs::create_dir_all(shop.join("docs")).unwrap();
    std::fs::write(shop.join("docs/door.md"), "# Door\n").unwrap();
    git(&shop, &["init", "--quiet"]);
    git(&shop, &["add", "."]);
    git(&shop, &["commit", "--quiet", "-m", "first"]);
    let (gateway, url, _runtime) = FakeGateway::default().listen();
    let sandbox = Sandbox::new(&[]).with_env("RAG_URL", &url);
    let address = format!("file://{}", shop.display());
    let ran = sandbox.atlas(&["index", &address]).ok();
    assert!(ran.stdout.starts_with("Indexed 1 file"), "{}", ran.stdout);
    {
        let documents = gateway.documents.lock().unwrap();
        let door = &documents["docs/door.md"];
        assert_eq!(door.repo.as_deref(), Some("shop"));
        assert_eq!(door.commit.as_deref().map(str::len), Some(40));
    }
    // Nothing is left behind, and a second run finds nothing to do.
    let again = sandbox.atlas(&["index", &address]).ok();
    assert_eq!(again.stdout, "Nothing to do: all 1 file are indexed already.\n");

    let secret = "http://me:hunter2@127.0.0.1:9/shop.git";
    let refused = sandbox.atlas(&["index", secret]);
    assert_eq!(refused.code, Some(1));
    assert!(refused.stderr.contains("http://127.0.0.1:9/shop.git"), "{}", refused.stderr);
    assert!(!refused.stderr.contains("hunter2"), "{}", refused.stderr);
}

#[test]
fn watching_indexes_what_changes_survives_a_failure_and_stops_cleanly() {
    let (gateway, url, _runtime) =
        FakeGateway { poison: Some("poison.md"), ..FakeGateway::default() }.listen();
    let sandbox = Sandbox::new(&[("a.md", "# A\n"), (".gitignore", "target/\n")]).with_env("RAG_URL", &url);
    let watch = sandbox.start("watch", &["index", ".", "--watch", "--exclude", ".*"]);
    watch.wait_for("Watching");
    assert_eq!(gateway.sources(), ["a.md"]);
    sandbox.write("docs/new.md", "# New\n");
    support::wait("the new file", || gateway.sources().contains(&"docs/new.md".to_owned()).then_some(()));
    sandbox.write("poison.md", "# Poison\n");
    watch.wait_for("could not be indexed");
    sandbox.remove("poison.md");
    sandbox.remove("a.md");
    sandbox.write("docs/new.md", "# Newer\n");
    support::wait("the change after the failure", || {
        let documents = gateway.documents.lock().unwrap();
        let newer = documents.get("docs/new.md").is_some_and(|document| document.text == "# Newer\n");
        (newer && !documents.contains_key("a.md")).then_some(())
    });
    watch.signal("INT");
    assert_eq!(watch.exit_code(), 0, "{}", watch.log());
    assert!(watch.log().contains("Stopped watching"), "{}", watch.log());
}

#[test]
fn a_broken_pdf_is_named_and_holds_nothing_up() {
    let (gateway, url, _runtime) = FakeGateway::default().listen();
    let sandbox = Sandbox::new(&[("a.md", "# A\n"), ("broken.pdf", "%PDF-1.4\nnot really\n")])
        .with_env("RAG_URL", &url);
    let ran = sandbox.atlas(&["index", ".", "-v"]).ok();
    assert_eq!(gateway.sources(), ["a.md"]);
    assert!(ran.stderr.contains("broken.pdf (no text to be had"), "{}", ran.stderr);
}
