//! Crash points on the real services: workers die at ten places of the life cycle at once, each in a
//! process of its own, and one that comes after them finishes everything.
//!
//! `worker/tests/lifecycle/crash_points.rs` has every point by itself, on the embedded adapters; there it
//! is also said what each of them may cost.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, BTreeSet},
};

use atlas_test_support::{
    fleet::{Fleet, FleetError, FleetOptions, PROJECT, curl_json},
    skip,
};
use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use serde_json::{Value, json};
use uuid::Uuid;

/// Where the victims die.
const POINTS: [&str; 10] = [
    "pulled",
    "claimed",
    "reserved",
    "answered",
    "settled",
    "before_finish",
    "finished",
    "published",
    "dead_letter_recorded",
    "command_stored",
];
/// Calls that are made again: one whose answer died with its worker, once before its step was settled and
/// once before the finish that settles the last one.
const PAID_AGAIN: u64 = 2;
/// Those two, and the one that was reserved and never made.
const ASSUMED: i64 = 3;

#[tokio::test(flavor = "multi_thread")]
async fn workers_that_die_at_every_step_on_the_real_services_lose_nothing() {
    let name = "workers_that_die_at_every_step_on_the_real_services_lose_nothing";
    let options = FleetOptions {
        workers: 0,
        index: None,
        env: vec![
            ("MAX_IN_FLIGHT".to_owned(), "1".to_owned()),
            ("SWEEP_INTERVAL_SECONDS".to_owned(), "1".to_owned()),
        ],
        ..FleetOptions::default()
    };
    let mut fleet = match Fleet::start(options).await {
        Ok(fleet) => fleet,
        Err(FleetError::Missing { service, reason }) => return skip(name, service, &reason),
        Err(FleetError::Broken(error)) => panic!("{error:#}"),
    };
    // Every run takes two calls, so that there is something between them.
    let search = json!({"name": "search_knowledge", "arguments": {"query": "dead letters"}});
    let script = json!([{"match": "draft.0", "times": 10_000, "tool_calls": [search]}]);
    let put = reqwest::Client::new().put(format!("{}/sim/script", fleet.sim_url)).body(script.to_string());
    assert!(put.send().await.unwrap().status().is_success());

    for point in POINTS {
        fleet.add_worker(&[("ATLAS_TEST_CRASH", point)]).unwrap().start().await.unwrap();
    }
    let topic = format!("projects/{PROJECT}/topics/architect_out");
    curl_json("PUT", &fleet.emulator_url("subscriptions/consumer"), &json!({ "topic": topic })).unwrap();

    // Each of them gets something of each kind sooner or later.
    let (tasks, looks) = (RefCell::new(BTreeSet::new()), Cell::new(0));
    fleet
        .eventually("every victim died at its point", || async {
            looks.set(looks.get() + 1);
            if looks.get() % 5 == 1 {
                publish(&fleet, &tasks);
            }
            fleet
                .workers
                .iter()
                .zip(POINTS)
                .all(|(worker, point)| {
                    worker.log().contains(&format!("crash point {point} reached: dying\n"))
                })
                .then_some(())
        })
        .await
        .unwrap();
    let tasks: BTreeSet<Uuid> = tasks.into_inner();

    // Past every lease and hold of the store; the emulator's own deadline is waited for.
    let database = fleet.database().await.unwrap();
    database
        .batch_execute(
            "create or replace function public.atlas_now() returns timestamptz
             language sql stable as $$ select pg_catalog.now() + interval '10 minutes' $$",
        )
        .await
        .unwrap();
    fleet.add_worker(&[("MAX_IN_FLIGHT", "8")]).unwrap().start().await.unwrap();
    let count = async |query: &str| -> i64 { database.query_one(query, &[]).await.unwrap().get(0) };
    let wanted = i64::try_from(tasks.len()).unwrap();
    fleet
        .eventually("everything is finished, recorded and sent", || async {
            let done = count("select count(*) from runs where status = 'done'").await;
            let letters = count("select count(*) from dead_letters").await;
            let unsent = count("select count(*) from outbox where sent_at is null").await;
            (done == wanted && letters == wanted && unsent == 0).then_some(())
        })
        .await
        .unwrap();

    // One result row a task, and an answer.
    let rows = database.query("select id from architect_out", &[]).await.unwrap();
    assert_eq!(rows.iter().map(|row| row.get(0)).collect::<BTreeSet<Uuid>>(), tasks);
    let answers = specs(&fleet, &tasks).await;

    // What was paid and what is booked.
    let meter = fleet.meter().await.unwrap();
    let calls = meter["by_kind"]["chat"]["calls"].as_u64().unwrap();
    assert_eq!(calls, 2 * u64::try_from(tasks.len()).unwrap() + PAID_AGAIN, "{meter}");
    assert_eq!(count("select count(*) from token_ledger where state = 'reserved'").await, 0);
    assert_eq!(count("select count(*) from token_ledger where state = 'assumed'").await, ASSUMED);
    let ledger = count("select coalesce(sum(actual), 0)::bigint from token_ledger").await;
    let accounts = count("select sum(used)::bigint from token_days where scope = 'global'").await;
    assert_eq!(ledger, accounts, "the accounts are the sum of the ledger");
    assert!(
        meter["total_tokens"].as_i64().unwrap() <= ledger,
        "the ledger says less than was billed: {meter}"
    );
    println!("{} tasks, {} answers, {calls} calls, {} deaths", tasks.len(), answers, POINTS.len());
}

/// A request, a message that cannot be read, and a command.
fn publish(fleet: &Fleet, tasks: &RefCell<BTreeSet<Uuid>>) {
    let task = Uuid::new_v4();
    let chat = json!({
        "task_id": task, "role": "architect", "msg_type": "chat", "content": "Design a bus", "metadata": {},
    });
    let malformed = json!({"role": "architect", "msg_type": "poem", "content": task});
    let command = json!({
        "task_id": Uuid::new_v4(), "role": "architect", "msg_type": "control", "content": {"command": "heartbeat"},
    });
    let messages = [chat, malformed, command].map(|it| json!({"data": BASE64.encode(it.to_string())}));
    let topic = fleet.emulator_url("topics/architect_in:publish");
    curl_json("POST", &topic, &json!({"messages": messages})).unwrap();
    tasks.borrow_mut().insert(task);
}

/// Pulls answers until every task has its spec; how many there were, copies included.
async fn specs(fleet: &Fleet, tasks: &BTreeSet<Uuid>) -> usize {
    let subscription = fleet.emulator_url("subscriptions/consumer");
    let specs = RefCell::new(BTreeMap::<Uuid, usize>::new());
    fleet
        .eventually("every answer was published", || async {
            let pulled =
                curl_json("POST", &format!("{subscription}:pull"), &json!({"maxMessages": 500})).unwrap();
            let received = pulled["receivedMessages"].as_array().cloned().unwrap_or_default();
            let mut specs = specs.borrow_mut();
            for message in &received {
                let data = BASE64.decode(message["message"]["data"].as_str().unwrap()).unwrap();
                let answer: Value = serde_json::from_slice(&data).unwrap();
                if answer["msg_type"] == "spec" {
                    *specs.entry(answer["task_id"].as_str().unwrap().parse().unwrap()).or_default() += 1;
                }
            }
            if !received.is_empty() {
                let acks: Vec<&Value> = received.iter().map(|message| &message["ackId"]).collect();
                curl_json("POST", &format!("{subscription}:acknowledge"), &json!({"ackIds": acks})).unwrap();
            }
            tasks.iter().all(|task| specs.contains_key(task)).then_some(())
        })
        .await
        .unwrap();
    specs.into_inner().values().sum()
}
