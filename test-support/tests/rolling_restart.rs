//! A worker that is told to stop finishes what it has, or gives it back, and nobody notices: a rolling
//! restart of the whole fleet under load, in both orders, and a second signal.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use std::{collections::BTreeMap, time::Duration};

use atlas_test_support::{
    fleet::{Fleet, FleetError, FleetOptions, curl_json},
    skip,
};
use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use serde_json::{Value, json};
use uuid::Uuid;

/// What a worker may take for its last runs, and a margin for a loaded machine.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(30);
const MARGIN: Duration = Duration::from_secs(30);

async fn fleet(test: &str, workers: usize, latency_ms: u64, drain: Duration) -> Option<Fleet> {
    let drain = drain.as_secs().to_string();
    let options = FleetOptions {
        workers,
        sim: ["--latency-ms", &latency_ms.to_string()].map(str::to_owned).to_vec(),
        env: vec![("DRAIN_TIMEOUT_SECONDS".to_owned(), drain)],
        index: None,
        ..FleetOptions::default()
    };
    match Fleet::start(options).await {
        Ok(fleet) => Some(fleet),
        Err(FleetError::Missing { service, reason }) => {
            skip(test, service, &reason);
            None
        }
        Err(FleetError::Broken(error)) => panic!("{error:#}"),
    }
}

fn publish(fleet: &Fleet, count: usize) -> Vec<Uuid> {
    let tasks: Vec<Uuid> = (0..count).map(|_| Uuid::new_v4()).collect();
    let messages: Vec<Value> = tasks
        .iter()
        .map(|task| {
            let request = json!({
                "task_id": task, "role": "architect", "msg_type": "chat",
                "content": format!("Design how workers are restarted, variant {task}"),
            });
            json!({ "data": BASE64.encode(request.to_string()) })
        })
        .collect();
    let url = fleet.emulator_url("topics/architect_in:publish");
    curl_json("POST", &url, &json!({ "messages": messages })).unwrap();
    tasks
}

async fn count(database: &tokio_postgres::Client, query: &str) -> i64 {
    database.query_one(query, &[]).await.unwrap().get(0)
}

/// Waits until some runs are under way, so that a restart has something to disturb.
async fn under_way(fleet: &Fleet, database: &tokio_postgres::Client) {
    fleet
        .eventually("runs are under way", || async {
            (count(database, "select count(*) from runs where status = 'running'").await > 0).then_some(())
        })
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rolling_restart_under_load_loses_nothing_repeats_nothing_and_pays_nothing_twice() {
    let test = "a_rolling_restart_under_load_loses_nothing_repeats_nothing_and_pays_nothing_twice";
    let Some(mut fleet) = fleet(test, 2, 400, DRAIN_TIMEOUT).await else { return };
    let database = fleet.database().await.unwrap();
    let mut tasks = Vec::new();

    // As Kubernetes does it: the new one is ready before the old one is told to go.
    for old in 0..2 {
        tasks.extend(publish(&fleet, 40));
        fleet.add_worker(&[]).unwrap().start().await.unwrap();
        under_way(&fleet, &database).await;
        fleet.workers[old].signal("TERM").unwrap();
        let code = fleet.workers[old].exit_code(DRAIN_TIMEOUT + MARGIN).await.unwrap();
        assert_eq!(code, 0, "drained\n{}", fleet.workers[old].log());
    }
    // As systemd does it: the old one goes, then it starts again.
    for worker in 2..4 {
        tasks.extend(publish(&fleet, 40));
        under_way(&fleet, &database).await;
        fleet.workers[worker].signal("TERM").unwrap();
        let code = fleet.workers[worker].exit_code(DRAIN_TIMEOUT + MARGIN).await.unwrap();
        assert_eq!(code, 0, "drained\n{}", fleet.workers[worker].log());
        fleet.workers[worker].start().await.unwrap();
    }

    let wanted = i64::try_from(tasks.len()).unwrap();
    fleet
        .eventually("every request has its result row", || async {
            (count(&database, "select count(*) from architect_out").await == wanted).then_some(())
        })
        .await
        .unwrap();
    assert_eq!(count(&database, "select count(*) from runs where status = 'done'").await, wanted);
    assert_eq!(count(&database, "select count(*) from dead_letters").await, 0);
    assert_eq!(count(&database, "select count(*) from token_ledger where state = 'assumed'").await, 0);
    let twice =
        "select count(*) from (select task_id from outbox where final group by 1 having count(*) > 1) as t";
    assert_eq!(count(&database, twice).await, 0);

    // Each step that is stored was billed exactly once, and nothing else was.
    let calls: Value =
        reqwest::get(format!("{}/sim/calls", fleet.sim_url)).await.unwrap().json().await.unwrap();
    let mut billed: BTreeMap<(Uuid, String), u32> = BTreeMap::new();
    for call in calls.as_array().unwrap().iter().filter(|call| call["kind"] == "chat") {
        let mut id = call["request_id"].as_str().unwrap().splitn(3, '.');
        let task: Uuid = id.next().unwrap().parse().unwrap();
        *billed.entry((task, id.nth(1).unwrap().to_owned())).or_insert(0) += 1;
    }
    let steps = database.query("select task_id, step from run_steps", &[]).await.unwrap();
    let stored: BTreeMap<(Uuid, String), u32> =
        steps.iter().map(|row| ((row.get(0), row.get(1)), 1)).collect();
    assert_eq!(billed, stored, "a step was paid twice, or for nothing");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_signal_ends_a_worker_at_once_and_its_runs_are_taken_over() {
    let test = "a_second_signal_ends_a_worker_at_once_and_its_runs_are_taken_over";
    // The calls outlast the test's patience, and so does the drain: only the second signal can end it.
    let Some(mut fleet) = fleet(test, 1, 600_000, Duration::from_secs(3600)).await else { return };
    let database = fleet.database().await.unwrap();
    publish(&fleet, 1);
    under_way(&fleet, &database).await;
    let worker = &mut fleet.workers[0];
    worker.signal("TERM").unwrap();
    let draining = async {
        while !worker.log().contains("\"draining\"") && !worker.log().contains("draining") {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(MARGIN, draining).await.expect("it drains");
    worker.signal("TERM").unwrap();
    let code = worker.exit_code(MARGIN).await.unwrap();
    assert_eq!(code, 1, "it says that it did not drain");
    // Nothing was written off: the run is still in the store, for whoever sweeps next.
    assert_eq!(count(&database, "select count(*) from runs where ended_at is null").await, 1);
}
