//! The main job on the real services, as separate processes. 200 requests go in through the emulator's
//! REST API with curl, as any client would send them. At the end four books must agree: what was
//! published, what is stored, what was answered, and what the simulator billed.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Mutex,
};

use atlas_test_support::{
    fleet::{Fleet, FleetError, FleetOptions, PROJECT, curl_json},
    skip,
};
use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use serde_json::{Value, json};
use uuid::Uuid;

const REQUESTS: usize = 200;
/// Messages in one curl call.
const BATCH: usize = 20;

#[tokio::test(flavor = "multi_thread")]
async fn two_hundred_requests_are_each_answered_once_and_the_ledger_equals_the_meter() {
    let fleet = match Fleet::start(FleetOptions::default()).await {
        Ok(fleet) => fleet,
        Err(FleetError::Missing { service, reason }) => {
            return skip(
                "two_hundred_requests_are_each_answered_once_and_the_ledger_equals_the_meter",
                service,
                &reason,
            );
        }
        Err(FleetError::Broken(error)) => panic!("{error:#}"),
    };

    // A consumer of our own, there before the first request.
    let topic = format!("projects/{PROJECT}/topics/architect_out");
    curl_json("PUT", &fleet.emulator_url("subscriptions/e2e-consumer"), &json!({ "topic": topic })).unwrap();

    let tasks: Vec<Uuid> = (0..REQUESTS).map(|_| Uuid::new_v4()).collect();
    for batch in tasks.chunks(BATCH) {
        let messages: Vec<Value> = batch.iter().map(|task| message(*task)).collect();
        let topic = fleet.emulator_url("topics/architect_in:publish");
        let answer = curl_json("POST", &topic, &json!({ "messages": messages })).unwrap();
        assert_eq!(answer["messageIds"].as_array().map(Vec::len), Some(batch.len()), "{answer}");
    }

    let database = fleet.database().await.unwrap();
    let requests = i64::try_from(REQUESTS).unwrap();
    fleet
        .eventually("every request has its row in architect_out", || async {
            (count(&database, "select count(*) from architect_out").await == requests).then_some(())
        })
        .await
        .unwrap();

    // What is stored.
    let failures = database
        .query(
            "select status::text, error_code, error_message, count(*) from runs where status <> 'done' group by 1, 2, 3",
            &[],
        )
        .await
        .unwrap();
    assert!(failures.is_empty(), "not all are done: {failures:?}\n{}", fleet.logs());
    let rows = database.query("select id from architect_out", &[]).await.unwrap();
    let stored: BTreeSet<Uuid> = rows.iter().map(|row| row.get(0)).collect();
    assert_eq!(stored, tasks.iter().copied().collect(), "exactly the published tasks");

    // What was answered.
    let answered = collect_specs(&fleet, &tasks).await;
    for task in &tasks {
        assert!(answered.contains_key(task), "no answer for {task}");
    }

    // What was billed. Embeddings of the index and of queries are in both books too.
    let meter = fleet.meter().await.unwrap();
    let billed = meter["total_tokens"].as_i64().unwrap();
    assert!(billed > 0, "{meter}");
    assert_eq!(count(&database, "select count(*) from token_ledger where state = 'reserved'").await, 0);
    let ledger = count(&database, "select coalesce(sum(actual), 0)::bigint from token_ledger").await;
    assert_eq!(ledger, billed, "the ledger equals the meter: {meter}");
    let day = count(&database, "select sum(used)::bigint from token_days where scope = 'global'").await;
    assert_eq!(day, billed, "the day's account equals the meter");
    for task in &tasks {
        let row = database
            .query_one(
                "select coalesce(sum(actual), 0)::bigint from token_ledger where task_id = $1",
                &[task],
            )
            .await
            .unwrap();
        let ledger: i64 = row.get(0);
        assert_eq!(Some(ledger), meter["by_task"][task.to_string()]["total_tokens"].as_i64(), "task {task}");
    }

    // What an operator runs against the same services.
    for (args, wanted) in [
        (&["doctor"][..], "ok"),
        (&["runs", "list"], "done"),
        (&["budget", "show"], "100,000,000"),
        (&["ask", "Design the cache of the gateway"], "## Sources"),
    ] {
        let output = fleet.atlas(args).unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && said.contains(wanted), "atlas {args:?}: {said}\n{errors}");
    }
    println!(
        "{REQUESTS} published, {} stored, {} answered ({} messages), {billed} tokens billed and booked",
        stored.len(),
        answered.len(),
        answered.values().sum::<usize>(),
    );
}

fn message(task: Uuid) -> Value {
    let request = json!({
        "task_id": task,
        "role": "architect",
        "msg_type": "chat",
        "content": format!("Design how the worker and the gateway talk, variant {task}"),
        "metadata": {},
    });
    json!({ "data": BASE64.encode(request.to_string()) })
}

/// Pulls answers until every task has its spec, and counts copies.
async fn collect_specs(fleet: &Fleet, tasks: &[Uuid]) -> BTreeMap<Uuid, usize> {
    let subscription = fleet.emulator_url("subscriptions/e2e-consumer");
    let wanted: BTreeSet<Uuid> = tasks.iter().copied().collect();
    let specs = Mutex::new(BTreeMap::new());
    fleet
        .eventually("every answer was published", || async {
            let pulled =
                curl_json("POST", &format!("{subscription}:pull"), &json!({ "maxMessages": 500 })).unwrap();
            let received = pulled["receivedMessages"].as_array().cloned().unwrap_or_default();
            let mut specs = specs.lock().unwrap();
            for message in &received {
                let data = BASE64.decode(message["message"]["data"].as_str().unwrap()).unwrap();
                let answer: Value = serde_json::from_slice(&data).unwrap();
                assert_eq!(message["message"]["attributes"]["task_id"], answer["task_id"]);
                if answer["msg_type"] == "spec" {
                    let task: Uuid = answer["task_id"].as_str().unwrap().parse().unwrap();
                    assert!(wanted.contains(&task), "an answer nobody asked for: {task}");
                    assert_eq!(answer["metadata"]["status"], "done");
                    *specs.entry(task).or_insert(0) += 1;
                }
            }
            if !received.is_empty() {
                let acks: Vec<&Value> = received.iter().map(|message| &message["ackId"]).collect();
                curl_json("POST", &format!("{subscription}:acknowledge"), &json!({ "ackIds": acks }))
                    .unwrap();
            }
            (specs.len() == wanted.len()).then_some(())
        })
        .await
        .unwrap();
    specs.into_inner().unwrap()
}

async fn count(database: &tokio_postgres::Client, query: &str) -> i64 {
    database.query_one(query, &[]).await.unwrap().get(0)
}
