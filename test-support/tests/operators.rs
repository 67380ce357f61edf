//! An operator at work on the real services: a request whose message became a dead letter runs again.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use atlas_test_support::{
    fleet::{Fleet, FleetError, FleetOptions, curl_json},
    skip,
};
use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use serde_json::{Value, json};
use uuid::Uuid;

/// Runs a command that must succeed, and gives what it printed.
fn atlas(fleet: &Fleet, args: &[&str]) -> String {
    let output = fleet.atlas(args).unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "atlas {args:?}: {errors}\n{}", fleet.logs());
    String::from_utf8(output.stdout).unwrap()
}

fn atlas_json(fleet: &Fleet, args: &[&str]) -> Value {
    serde_json::from_str(&atlas(fleet, args)).unwrap()
}

fn command(fleet: &Fleet, name: &str) {
    let message = json!({"role": "architect", "msg_type": "control", "content": {"command": name}});
    atlas(fleet, &["publish", "--raw", &message.to_string()]);
}

/// Waits until the run is in this state.
async fn until(fleet: &Fleet, sql: &tokio_postgres::Client, task: Uuid, status: &str) {
    fleet
        .eventually(&format!("run {task} is {status}"), || async {
            let row = sql.query_opt("select status from runs where task_id = $1", &[&task]).await.unwrap();
            row.is_some_and(|row| row.get::<_, String>(0) == status).then_some(())
        })
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_letter_of_a_failed_run_is_replayed_and_served() {
    let test = "a_dead_letter_of_a_failed_run_is_replayed_and_served";
    let fleet = match Fleet::start(FleetOptions { index: None, ..FleetOptions::default() }).await {
        Ok(fleet) => fleet,
        Err(FleetError::Missing { service, reason }) => return skip(test, service, &reason),
        Err(FleetError::Broken(error)) => panic!("{error:#}"),
    };
    let sql = fleet.database().await.unwrap();

    // Its message is delivered too often while nobody works on it: Pub/Sub moves it to the dead letters.
    command(&fleet, "pause");
    fleet
        .eventually("the fleet is paused", || async {
            let row = sql.query_one("select paused from fleet_settings", &[]).await.unwrap();
            row.get::<_, bool>(0).then_some(())
        })
        .await
        .unwrap();
    let task = Uuid::new_v4();
    let request = json!({
        "task_id": task, "role": "architect", "msg_type": "chat", "content": "Design the queue", "metadata": {},
    });
    let message = json!({ "messages": [{ "data": BASE64.encode(request.to_string()) }] });
    curl_json("POST", &fleet.emulator_url("topics/architect_in:publish"), &message).unwrap();
    until(&fleet, &sql, task, "queued").await;
    curl_json("POST", &fleet.emulator_url("topics/architect_dlq:publish"), &message).unwrap();
    until(&fleet, &sql, task, "failed").await;
    command(&fleet, "resume");

    let letters = atlas_json(&fleet, &["dlq", "list", "--json"]);
    assert_eq!(letters[0]["reason"], "delivery_attempts_exhausted", "{letters}");
    let id = letters[0]["id"].as_str().unwrap();
    assert!(atlas(&fleet, &["dlq", "show", id]).contains("Design the queue"));
    let replayed = atlas_json(&fleet, &["dlq", "replay", id, "--json"]);
    let again: Uuid = replayed[0]["task_id"].as_str().unwrap().parse().unwrap();
    assert_ne!(again, task, "a failed run is final: {replayed}");
    until(&fleet, &sql, again, "done").await;
    until(&fleet, &sql, task, "failed").await;

    // The same request by the other way: it was tried again already.
    let retried = atlas_json(&fleet, &["runs", "retry", &task.to_string(), "--json"]);
    assert_eq!(retried[0]["outcome"], "retried_before", "{retried}");
    assert_eq!(retried[0]["new_task_id"], again.to_string());
    let shown = atlas_json(&fleet, &["runs", "show", &again.to_string(), "--json"]);
    assert_eq!(shown["request"]["metadata"]["retry_of"], task.to_string());
    assert_eq!(shown["ledger"][0]["state"], "settled", "{shown}");
    assert_eq!(fleet.atlas(&["runs", "cancel", &again.to_string()]).unwrap().status.code(), Some(1));

    let set = atlas(&fleet, &["budget", "set", "--daily", "90000000"]);
    assert_eq!(set, "daily limit: 100,000,000 -> 90,000,000\n");
    let history = atlas_json(&fleet, &["budget", "history", "--json"]);
    assert_eq!(history[0]["limit"], 90_000_000);
    assert_eq!(history[0]["used"], fleet.meter().await.unwrap()["total_tokens"]);
    assert_eq!(atlas(&fleet, &["dlq", "purge", "--yes"]), "Deleted 1 dead letter.\n");
}
