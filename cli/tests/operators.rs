//! What an operator does on the embedded stack: retry, cancel, replay, purge, set the budget.

#![cfg(feature = "embedded")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use std::{fs, time::Duration};

use atlas_shared::{
    TaskId, Tokens, WorkerId,
    message::{Answer, AnswerStatus, AnswerType},
    sqlite::Database,
};
use atlas_worker::store::{
    Claim, ClaimRequest, ClaimedRun, DeadLetter, FinalStatus, Finish, Json, RunStore as _, SqliteStore,
};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use serde_json::{Map, Value, json};
use support::{Sandbox, wait};
use uuid::Uuid;

/// A sandbox and the store that its commands use.
async fn sandbox() -> (Sandbox, SqliteStore) {
    let sandbox = Sandbox::new(&[("docs/queue.md", "# Queue\n\nRequests wait in a queue.\n")]);
    let store = SqliteStore::new(Database::open(&sandbox.path().join(".atlas")).await.unwrap());
    (sandbox, store)
}

fn request(task: TaskId) -> Value {
    json!({"task_id": task, "role": "architect", "msg_type": "chat", "content": "Design the queue", "metadata": {"team": "billing"}})
}

fn claim(task: TaskId) -> ClaimRequest {
    ClaimRequest {
        task_id: task,
        claim_id: Uuid::new_v4(),
        message: request(task),
        tenant: None,
        requester: Some("ci".to_owned()),
        worker: WorkerId("worker-1".to_owned()),
        lease: Duration::from_hours(1),
    }
}

async fn claimed(store: &SqliteStore, task: TaskId) -> ClaimedRun {
    match store.claim_run(&claim(task)).await.unwrap() {
        Claim::Claimed(run) => run,
        other => panic!("{other:?}"),
    }
}

fn answer(task: TaskId, text: &str) -> Answer {
    Answer::bare(task, AnswerType::Error, AnswerStatus::Error, text, Map::new())
}

async fn ended(store: &SqliteStore, status: FinalStatus, code: Option<&str>) -> TaskId {
    let task = TaskId::random();
    let finish = Finish {
        status,
        answer: Json::of(&answer(task, "no")).unwrap(),
        topic: "architect_out".to_owned(),
        attributes: Vec::new(),
        model: None,
        error_code: code.map(str::to_owned),
        error_message: code.map(|_| "no".to_owned()),
        settlement: None,
        checkpoint: None,
    };
    let run = claimed(store, task).await;
    store.finish_run(run.lease, &finish).await.unwrap();
    task
}

async fn failed(store: &SqliteStore) -> TaskId {
    ended(store, FinalStatus::Failed, Some("too_many_attempts")).await
}

/// Starts the stack and waits until these tasks are done.
fn serve(sandbox: &Sandbox, tasks: &[String]) {
    let dev = sandbox.start("dev", &["dev", "--port", "0", "--worker-port", "0"]);
    for task in tasks {
        wait(&format!("{task} to be done"), || {
            let ran = sandbox.atlas(&["runs", "show", task, "--json"]);
            (ran.code == Some(0) && ran.json()["run"]["status"] == "done").then_some(())
        });
    }
    dev.signal("TERM");
    assert_eq!(dev.exit_code(), 0, "{}", dev.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_run_is_retried_as_one_other_task() {
    let (sandbox, store) = sandbox().await;
    let task = failed(&store).await;
    let cancelled = ended(&store, FinalStatus::Failed, Some("cancelled")).await;
    let id = task.to_string();

    let would = sandbox.atlas(&["runs", "retry", "--all-failed", "--since", "1h"]).ok();
    assert!(would.stdout.contains(&id) && !would.stdout.contains(&cancelled.to_string()), "{}", would.stdout);
    assert!(would.stderr.contains("add --yes"), "{}", would.stderr);
    assert!(
        would.stdout.contains("would be retried as") && !would.stdout.contains("is retried"),
        "{}",
        would.stdout
    );
    let first = sandbox.atlas(&["runs", "retry", &id, "--json"]).ok().json();
    assert_eq!(first[0]["outcome"], "retried");
    let new = first[0]["new_task_id"].as_str().unwrap().to_owned();
    // Twice before any worker has seen it: one task all the same.
    let second = sandbox.atlas(&["runs", "retry", "--all-failed", "--yes", "--json"]).ok().json();
    assert_eq!(second[0]["new_task_id"], new.as_str());

    serve(&sandbox, std::slice::from_ref(&new));
    let runs = sandbox.atlas(&["runs", "list", "--status", "done", "--json"]).ok().json();
    assert_eq!(runs.as_array().unwrap().len(), 1, "one run of two retries");
    let shown = sandbox.atlas(&["runs", "show", &new, "--json"]).ok().json();
    assert_eq!(shown["request"]["metadata"], json!({"team": "billing", "retry_of": id}));
    assert_eq!(shown["run"]["requester"], "ci");
    assert_eq!(
        store.get_run(task).await.unwrap().unwrap().run.error_code.as_deref(),
        Some("too_many_attempts")
    );

    let third = sandbox.atlas(&["runs", "retry", &id, "--json"]).ok().json();
    assert_eq!((&third[0]["outcome"], &third[0]["new_task_id"]), (&json!("retried_before"), &json!(new)));
    let done = sandbox.atlas(&["runs", "retry", &new]);
    assert_eq!(done.code, Some(1));
    assert!(done.stdout.contains("is done"), "{}", done.stdout);
    let unknown = sandbox.atlas(&["runs", "retry", "67e55044-10b1-426f-9247-bb680e5fe0c8"]);
    assert_eq!(unknown.code, Some(1));
    assert!(unknown.stdout.contains("there is no such run"), "{}", unknown.stdout);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_waiting_run_is_made_due_and_a_running_one_left_alone() {
    let (sandbox, store) = sandbox().await;
    let (waiting, running) = (TaskId::random(), TaskId::random());
    let run = claimed(&store, waiting).await;
    store.release_run(run.lease, Duration::from_hours(9)).await.unwrap();
    claimed(&store, running).await;

    let shown = sandbox.atlas(&["runs", "show", &waiting.to_string()]).ok();
    assert!(shown.stdout.contains(&format!("atlas runs retry {waiting}")), "{}", shown.stdout);
    let ran =
        sandbox.atlas(&["runs", "retry", &waiting.to_string(), &running.to_string(), "--json"]).ok().json();
    assert_eq!((&ran[0]["outcome"], &ran[1]["outcome"]), (&json!("due"), &json!("running")));
    let detail = store.get_run(waiting).await.unwrap().unwrap();
    assert_eq!(detail.run.not_before, None);
    serve(&sandbox, &[waiting.to_string()]);
}

#[tokio::test(flavor = "multi_thread")]
async fn runs_are_cancelled_where_they_are_and_final_ones_stay() {
    let (sandbox, store) = sandbox().await;
    let (waiting, running) = (TaskId::random(), TaskId::random());
    let run = claimed(&store, waiting).await;
    store.release_run(run.lease, Duration::from_hours(9)).await.unwrap();
    claimed(&store, running).await;
    let done = ended(&store, FinalStatus::Done, None).await;

    let ran = sandbox.atlas(&["runs", "cancel", &waiting.to_string(), &running.to_string()]).ok();
    assert!(ran.stdout.contains("is cancelled"), "{}", ran.stdout);
    assert!(ran.stdout.contains("worker-1 is told at its next renewal"), "{}", ran.stdout);
    sandbox.atlas(&["runs", "cancel", &waiting.to_string()]).ok();
    let shown = sandbox.atlas(&["runs", "show", &waiting.to_string(), "--json"]).ok().json();
    assert_eq!(shown["run"]["error_code"], "cancelled");
    assert_eq!(shown["answer"]["metadata"]["team"], "billing", "the requester knows its own request");
    assert!(store.get_run(running).await.unwrap().unwrap().run.cancel_requested);

    let final_one = sandbox.atlas(&["runs", "cancel", &done.to_string(), "--json"]);
    assert_eq!(final_one.code, Some(1));
    assert_eq!(final_one.json()[0]["outcome"], "final");
    assert!(final_one.stderr.contains("could not be done"), "{}", final_one.stderr);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_nobody_has_taken_yet_can_be_cancelled() {
    let (sandbox, store) = sandbox().await;
    let task = TaskId::random();
    let said = sandbox.atlas(&["runs", "cancel", &task.to_string(), "--json"]).ok().json();
    assert_eq!(said[0]["outcome"], "awaited", "{said}");

    // Its message comes.
    assert!(claimed(&store, task).await.cancel_requested);
}

async fn dead(store: &SqliteStore, raw: &[u8], task: Option<TaskId>, reason: &str) -> String {
    let letter = DeadLetter {
        id: Uuid::new_v4(),
        source: "architect_dlq-atlas".to_owned(),
        reason: reason.to_owned(),
        detail: "In words.".to_owned(),
        raw_base64: BASE64_STANDARD.encode(raw),
        attributes: vec![
            ("requester".to_owned(), "ci".to_owned()),
            ("CloudPubSubDeadLetterSourceDeliveryCount".to_owned(), "10".to_owned()),
            ("googclient_schemaid".to_owned(), "1".to_owned()),
        ],
        task_id: task,
        fails_run: reason == "delivery_attempts_exhausted",
        announce: Vec::new(),
    };
    assert!(store.record_dead_letter(&letter).await.unwrap());
    letter.id.to_string()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_letter_is_shown_and_replayed_so_that_it_really_runs_again() {
    const EXHAUSTED: &str = "delivery_attempts_exhausted";
    let (sandbox, store) = sandbox().await;
    let (never_ran, was_running) = (TaskId::random(), TaskId::random());
    claimed(&store, was_running).await;
    let bad = dead(&store, b"\xff no json", None, "invalid_utf8").await;
    let fresh = dead(&store, request(never_ran).to_string().as_bytes(), Some(never_ran), EXHAUSTED).await;
    let killed =
        dead(&store, request(was_running).to_string().as_bytes(), Some(was_running), EXHAUSTED).await;
    let nameless = dead(
        &store,
        br#"{"role":"architect","msg_type":"chat","content":"Design the queue"}"#,
        Some(TaskId::from_message_id("m-1")),
        EXHAUSTED,
    )
    .await;
    let shown = sandbox.atlas(&["runs", "show", &was_running.to_string(), "--json"]).ok().json();
    assert_eq!(shown["run"]["status"], "failed", "its dead letter has failed it");

    let listed = sandbox.atlas(&["dlq", "list"]).ok().stdout;
    for id in [&bad, &fresh, &killed, &nameless] {
        assert!(listed.contains(id.as_str()), "{listed}");
    }
    let shown = sandbox.atlas(&["dlq", "show", &bad]).ok().stdout;
    assert!(shown.contains("ff 20 6e 6f") && shown.contains("publisher must mend"), "{shown}");
    let raw = sandbox.atlas(&["dlq", "show", &killed, "--raw"]).ok().stdout;
    assert_eq!(raw, request(was_running).to_string(), "byte for byte");

    let would = sandbox.atlas(&["dlq", "replay", "--all", "--json"]).ok().json();
    let outcomes: Vec<&str> =
        would.as_array().unwrap().iter().map(|line| line["outcome"].as_str().unwrap()).collect();
    assert_eq!(outcomes, ["refused", "replayed", "replayed", "replayed"]);
    assert_eq!(store.list_dead_letters(&waiting()).await.unwrap().len(), 4, "a dry run marks nothing");

    let ran = sandbox.atlas(&["dlq", "replay", &fresh, &killed, &nameless, "--json"]).ok().json();
    let tasks: Vec<String> =
        ran.as_array().unwrap().iter().map(|line| line["task_id"].as_str().unwrap().to_owned()).collect();
    assert_eq!(tasks[0], never_ran.to_string(), "the task it always was");
    assert_ne!(tasks[1], was_running.to_string(), "a failed run is final: another task");
    assert_eq!(tasks[2], TaskId::from_message_id("m-1").to_string(), "as it would have been named");
    let again = sandbox.atlas(&["dlq", "replay", &killed]).ok().stdout;
    assert!(again.contains("was replayed at") && again.contains(&tasks[1]), "{again}");
    let refused = sandbox.atlas(&["dlq", "replay", &bad]);
    assert_eq!(refused.code, Some(1));
    assert!(refused.stderr.contains("--force"), "{}", refused.stderr);

    serve(&sandbox, &tasks);
    let shown = sandbox.atlas(&["runs", "show", &tasks[1], "--json"]).ok().json();
    assert_eq!(shown["request"]["metadata"]["retry_of"], was_running.to_string());
    assert_eq!(shown["run"]["requester"], "ci", "attributes go back too");
    // A crash between publishing and marking: the second replay finds the task served.
    let forced = sandbox.atlas(&["dlq", "replay", &killed, "--force", "--json"]).ok().json();
    assert_eq!((&forced[0]["outcome"], &forced[0]["task_id"]), (&json!("served"), &json!(tasks[1])));

    for yes in [&["--yes"][..], &[]] {
        let unknown = Uuid::new_v4().to_string();
        let arguments = [&["dlq", "purge", "--id", unknown.as_str()], yes].concat();
        let told = sandbox.atlas(&arguments);
        assert_eq!(told.code, Some(1));
        assert!(told.stderr.contains(&unknown) && told.stdout.is_empty(), "{}", told.stderr);
    }
    let dry = sandbox.atlas(&["dlq", "purge"]).ok();
    assert_eq!(dry.stdout, "Would delete 3 dead letters.\n");
    assert_eq!(sandbox.atlas(&["dlq", "purge", "--yes"]).ok().stdout, "Deleted 3 dead letters.\n");
    assert_eq!(
        sandbox.atlas(&["dlq", "purge", "--yes", "--older-than", "1h", "--unreplayed"]).ok().stdout,
        "Deleted 0 dead letters.\n"
    );
    let [left] = store.list_dead_letters(&waiting()).await.unwrap().try_into().unwrap();
    assert_eq!(left.id.to_string(), bad, "nobody replayed it");
    assert_eq!(
        sandbox.atlas(&["dlq", "purge", "--id", &bad, "--yes"]).ok().stdout,
        "Deleted 1 dead letter.\n"
    );
    assert_eq!(sandbox.atlas(&["dlq", "show", &bad]).code, Some(1));
}

fn waiting() -> atlas_worker::store::DeadLetterFilter {
    atlas_worker::store::DeadLetterFilter { replayed: Some(false), limit: 10, ..Default::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_budget_is_set_for_the_fleet_and_its_history_kept() {
    let (sandbox, store) = sandbox().await;
    let waiting = TaskId::random();
    let run = claimed(&store, waiting).await;
    store.defer_run(run.lease, Tokens(9000), "architect_out", &answer(waiting, "wait"), &[]).await.unwrap();

    let set = sandbox.atlas(&["budget", "set", "--daily", "500000", "--per-run", "20000"]).ok();
    assert_eq!(set.stdout, "daily limit: 250,000 -> 500,000\nlimit a run: 24,000 -> 20,000\n");
    assert!(set.stderr.contains(&waiting.to_string()) && set.stderr.contains("9,000"), "{}", set.stderr);
    let tenant = sandbox.atlas(&["budget", "set", "--tenant", "acme", "--daily", "50000"]).ok();
    assert_eq!(tenant.stdout, "daily limit of tenant acme: none -> 50,000\n");
    let none = sandbox.atlas(&["budget", "set", "--daily", "0", "--json"]).ok().json();
    assert_eq!(
        (&none["before"]["budget"]["limit"], &none["after"]["budget"]["limit"]),
        (&json!(500_000), &json!(0))
    );
    let shown = sandbox.atlas(&["budget", "show"]).ok().stdout;
    assert!(
        shown.contains("0 a day, 20,000 a run") && shown.contains("tenant:acme 0 used of 50,000"),
        "{shown}"
    );
    let history = sandbox.atlas(&["budget", "history", "--json"]).ok().json();
    assert_eq!((&history[0]["scope"], &history[0]["limit"]), (&json!("tenant:acme"), &json!(50_000)));
    let table = sandbox.atlas(&["budget", "history", "--days", "3"]).ok().stdout;
    assert!(table.starts_with("DAY") && table.contains("EMBEDDING"), "{table}");
    assert_eq!(
        sandbox.atlas(&["budget", "set", "--tenant", "acme", "--no-limit"]).ok().stdout,
        "daily limit of tenant acme: 50,000 -> none\n"
    );

    // Back to what is configured: one limit, then both, then a tenant's.
    let daily = sandbox.atlas(&["budget", "reset", "--daily"]).ok();
    assert_eq!(daily.stdout, "daily limit: 0 -> 250,000\n");
    assert!(daily.stderr.contains(&waiting.to_string()), "{}", daily.stderr);
    sandbox.atlas(&["budget", "set", "--daily", "7"]).ok();
    let both = sandbox.atlas(&["budget", "reset"]).ok().stdout;
    assert_eq!(both, "daily limit: 7 -> 250,000\nlimit a run: 20,000 -> 24,000\n");
    let again = sandbox.atlas(&["budget", "reset", "--json"]).ok().json();
    assert_eq!(again["before"], again["after"]);
    sandbox.atlas(&["budget", "set", "--tenant", "acme", "--daily", "5"]).ok();
    assert_eq!(
        sandbox.atlas(&["budget", "reset", "--tenant", "acme"]).ok().stdout,
        "daily limit of tenant acme: 5 -> none\n"
    );

    for wrong in [
        &["budget", "set"][..],
        &["budget", "set", "--daily", "-1"],
        &["budget", "set", "--per-run", "0"],
        &["budget", "set", "--tenant", "acme"],
        &["budget", "set", "--tenant", " ", "--daily", "5"],
        &["budget", "set", "--tenant", "ac me", "--daily", "5"],
        &["budget", "set", "--tenant", "acme", "--per-run", "5"],
        &["budget", "reset", "--tenant", " "],
        &["budget", "reset", "--tenant", "acme", "--daily"],
        &["budget", "history", "--days", "0"],
        &["runs", "retry"],
        &["runs", "list", "--since", "yesterday"],
        &["dlq", "replay"],
        &["dlq", "purge", "--older-than", "soon"],
    ] {
        assert_eq!(sandbox.atlas(wrong).code, Some(2), "{wrong:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_waits_for_its_tenants_tokens_says_whose_limit_to_raise() {
    let (sandbox, store) = sandbox().await;
    let (of_tenant, of_nobody) = (TaskId::random(), TaskId::random());
    for (task, tenant) in [(of_tenant, Some("acme")), (of_nobody, None)] {
        let claim = ClaimRequest { tenant: tenant.map(str::to_owned), ..claim(task) };
        let Claim::Claimed(run) = store.claim_run(&claim).await.unwrap() else { panic!("not claimed") };
        store.defer_run(run.lease, Tokens(9000), "architect_out", &answer(task, "wait"), &[]).await.unwrap();
    }
    let next = |task: TaskId| {
        let shown = sandbox.atlas(&["runs", "show", &task.to_string()]).ok().stdout;
        shown.lines().find(|line| line.starts_with("next")).unwrap().to_owned()
    };
    sandbox.atlas(&["budget", "set", "--tenant", "acme", "--daily", "5000"]).ok();
    assert!(next(of_tenant).ends_with("budget show, atlas budget set --tenant acme --daily N"));
    assert!(next(of_nobody).ends_with("budget show, atlas budget set --daily N"));
    let waiting = sandbox.atlas(&["budget", "show"]).ok().stderr;
    assert!(waiting.contains(&format!("{of_tenant} needs 9,000, tenant acme\n")), "{waiting}");
    assert!(waiting.contains(&format!("{of_nobody} needs 9,000\n")), "{waiting}");

    sandbox.atlas(&["budget", "set", "--daily", "100"]).ok();
    assert!(
        next(of_tenant).ends_with("set --tenant acme --daily N, atlas budget set --daily N"),
        "both are short"
    );
    sandbox.atlas(&["budget", "set", "--tenant", "acme", "--no-limit"]).ok();
    assert!(next(of_tenant).ends_with("budget show, atlas budget set --daily N"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_list_that_a_filter_empties_says_so() {
    let (sandbox, store) = sandbox().await;
    let none = sandbox.atlas(&["runs", "list"]).ok().stderr;
    assert!(none.starts_with("No runs."), "{none}");
    failed(&store).await;
    let bad = dead(&store, b"no json", None, "not_json").await;
    for (filter, told) in [
        (&["runs", "list", "--tenant", "nobody"][..], "No run matches the filter"),
        (&["runs", "list", "--status", "deferred"], "No run matches the filter"),
        (&["runs", "list", "--since", "2099-01-01"], "No run matches the filter"),
        (&["runs", "retry", "--all-failed", "--tenant", "nobody"], "No failed run matches the filter"),
        (&["dlq", "list", "--reason", "bogus"], "No dead letter that waits matches the filter"),
        (&["dlq", "list", "--reason", "bogus", "--all"], "No dead letter matches the filter"),
        (&["dlq", "replay", "--all", "--reason", "bogus"], "No dead letter that waits matches the filter"),
    ] {
        let ran = sandbox.atlas(filter).ok();
        assert!(ran.stdout.is_empty() && ran.stderr.contains(told), "{filter:?}: {}", ran.stderr);
    }
    // A replay that sends nothing does not ask to be confirmed.
    let dry = sandbox.atlas(&["dlq", "replay", "--all"]).ok();
    assert!(dry.stdout.contains(&bad), "{}", dry.stdout);
    assert!(dry.stderr.contains("--yes would send nothing either"), "{}", dry.stderr);
    assert!(dry.stderr.contains("1 message would be refused again") && !dry.stderr.contains("error:"));
    dead(&store, request(TaskId::random()).to_string().as_bytes(), None, "delivery_attempts_exhausted").await;
    let dry = sandbox.atlas(&["dlq", "replay", "--all"]).ok();
    assert!(dry.stderr.contains("add --yes to replay 1 dead letter."), "{}", dry.stderr);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_without_a_task_is_named_before_it_is_sent() {
    let (sandbox, store) = sandbox().await;
    let chat = r#"{"role":"architect","msg_type":"chat","content":"Design the queue"}"#;
    let published = sandbox.atlas(&["publish", "--raw", chat]).ok().stdout.trim().to_owned();
    // A letter that workers refuse, sent again all the same, goes under the id that is printed.
    let refused = r#"{"role":"architect","msg_type":"chat","content":"  "}"#;
    let letter =
        dead(&store, refused.as_bytes(), Some(TaskId::from_message_id("m-1")), "empty_content").await;
    let forced = sandbox.atlas(&["dlq", "replay", &letter, "--force", "--json"]).ok().json();
    assert_eq!(forced[0]["task_id"], TaskId::from_message_id("m-1").to_string());
    serve(&sandbox, &[published]);
}

#[test]
fn a_store_without_its_queue_is_said_before_anything_is_tried() {
    let sandbox = Sandbox::new(&[])
        .with_env("SUPABASE_URL", "http://127.0.0.1:9")
        .with_env("SUPABASE_SERVICE_ROLE_KEY", "key");
    let ran = sandbox.atlas(&["runs", "retry", "67e55044-10b1-426f-9247-bb680e5fe0c8"]);
    assert_eq!(ran.code, Some(2));
    assert!(ran.stderr.contains("PUBSUB_PROJECT_ID"), "{}", ran.stderr);
    assert!(!fs::exists(sandbox.path().join(".atlas")).unwrap());
}
