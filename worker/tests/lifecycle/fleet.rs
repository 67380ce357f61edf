//! Commands hold for the whole fleet, not for the worker that happened to get the message; and a fleet
//! paces itself by the API's rate limits. Two workers each.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use atlas_openai_sim::SimOptions;
use atlas_shared::TaskId;
use atlas_worker::{RunningWorker, store::RunStatus};
use axum::{Router, http::StatusCode, routing::post};
use serde_json::{Value, json};

use crate::stack::{Stack, command, eventually, request, serve};

/// Two workers that have both read the fleet's state.
async fn two(stack: &Stack) -> [RunningWorker; 2] {
    let workers = [stack.worker().await, stack.worker().await];
    for worker in &workers {
        shows(worker, "atlas_work_blocked{reason=\"starting\"} 0").await;
    }
    workers
}

/// Waits until the worker's metrics have this line.
pub(crate) async fn shows(worker: &RunningWorker, line: &str) {
    eventually(line, || async { worker.registry.render().unwrap().contains(line).then_some(()) }).await;
}

async fn drain(workers: [RunningWorker; 2]) {
    for worker in workers {
        worker.drain().await;
    }
}

/// Sends a command through the queue, to whichever worker, and gives its answer's content.
async fn send(stack: &Stack, content: Value) -> Value {
    let (task, message) = command(content);
    stack.ask_as(task, &message).await.content
}

#[tokio::test]
async fn pause_and_resume_hold_for_every_worker() {
    let stack = Stack::offline().await;
    let workers = two(&stack).await;
    assert_eq!(send(&stack, json!({"command": "pause"})).await["fleet"]["paused"], true);
    for worker in &workers {
        shows(worker, "atlas_fleet_paused 1").await;
        shows(worker, "atlas_work_blocked{reason=\"paused\"} 1").await;
    }
    let tasks: Vec<TaskId> = (0..6).map(|_| TaskId::random()).collect();
    for task in &tasks {
        stack.publish(request(*task, "Design the event bus", json!({})).to_string()).await;
    }
    for task in &tasks {
        assert_eq!(stack.until(*task, RunStatus::Queued).await.run.attempt, 0, "nobody worked on it");
    }
    assert_eq!(send(&stack, json!({"command": "resume"})).await["fleet"]["paused"], false);
    for task in &tasks {
        stack.until(*task, RunStatus::Done).await;
    }
    for worker in &workers {
        shows(worker, "atlas_fleet_paused 0").await;
    }
    drain(workers).await;
}

#[tokio::test]
async fn a_budget_holds_for_every_worker() {
    let stack = Stack::simulated().await.with("DAILY_TOKEN_BUDGET", "1000000");
    let workers = two(&stack).await;
    send(&stack, json!({"command": "set_budget", "daily": 50})).await;
    for worker in &workers {
        shows(worker, "atlas_budget_limit_tokens 50").await;
    }
    // More requests than one worker would take alone.
    let tasks: Vec<TaskId> = (0..6).map(|_| TaskId::random()).collect();
    for task in &tasks {
        stack.publish(request(*task, "Design the event bus", json!({})).to_string()).await;
    }
    for task in &tasks {
        stack.until(*task, RunStatus::Deferred).await;
    }
    assert_eq!(stack.books().await, (0, 0), "no worker called");
    send(&stack, json!({"command": "set_budget", "daily": 1_000_000})).await;
    for task in &tasks {
        stack.until(*task, RunStatus::Done).await;
    }
    let (ledger, billed) = stack.books().await;
    assert_eq!(ledger, billed);
    drain(workers).await;
}

#[tokio::test]
async fn a_cancel_stops_the_run_on_the_worker_that_has_it() {
    // Its lease is renewed long after: no renewal tells of the cancel.
    let stack = Stack::simulated().await.with("MAX_IN_FLIGHT", "1").with("LEASE_SECONDS", "3600");
    stack.sim().script(json!([{"fault": "hang"}])).unwrap();
    let busy = stack.worker().await;
    let task = TaskId::random();
    stack.publish(request(task, "Design the event bus", json!({"ticket": 7})).to_string()).await;
    eventually("the call is in flight", || async { (stack.sim().meter().calls() > 0).then_some(()) }).await;

    // The busy one has no room for another message: this one gets the command.
    let idle = stack.worker().await;
    let said = send(&stack, json!({"command": "cancel", "task_id": task})).await;
    assert_eq!((&said["cancelled"], &said["outcome"]), (&json!(true), &json!("stopping")));
    shows(&idle, "atlas_messages_total{outcome=\"control\"} 1").await;

    let failed = stack.until(task, RunStatus::Failed).await;
    assert_eq!(failed.run.error_code.as_deref(), Some("cancelled"));
    assert!(!busy.registry.render().unwrap().contains("atlas_messages_total{outcome=\"control\"}"));
    shows(&busy, "atlas_runs_total{status=\"failed\"} 1").await;
    stack.until_rest().await;
    let [answer] = stack.answers(task).await.try_into().unwrap();
    assert_eq!(
        (&answer["metadata"]["error_code"], &answer["metadata"]["ticket"]),
        (&json!("cancelled"), &json!(7))
    );
    assert_eq!(stack.reconciled().await.assumed, 1, "the call that was cut off is booked as spent");
    drain([busy, idle]).await;
}

#[tokio::test]
async fn a_cancel_that_overtakes_its_request_holds_for_every_worker() {
    let stack = Stack::simulated().await;
    let workers = two(&stack).await;
    let tasks: Vec<TaskId> = (0..4).map(|_| TaskId::random()).collect();
    for task in &tasks {
        let said = send(&stack, json!({"command": "cancel", "task_id": task})).await;
        assert_eq!((&said["cancelled"], &said["outcome"]), (&json!(true), &json!("awaited")));
    }
    for task in &tasks {
        stack.publish(request(*task, "Design the event bus", json!({"ticket": 7})).to_string()).await;
    }
    for task in &tasks {
        let failed = stack.until(*task, RunStatus::Failed).await;
        assert_eq!(failed.run.error_code.as_deref(), Some("cancelled"));
    }
    // Once more, now that it is final.
    let said = send(&stack, json!({"command": "cancel", "task_id": tasks[0]})).await;
    assert_eq!((&said["cancelled"], &said["outcome"]), (&json!(true), &json!("cancelled")));
    stack.until_rest().await;
    for task in &tasks {
        let [answer] = stack.answers(*task).await.try_into().unwrap();
        assert_eq!(answer["msg_type"], "error");
        assert_eq!(
            (&answer["metadata"]["error_code"], &answer["metadata"]["ticket"]),
            (&json!("cancelled"), &json!(7))
        );
    }
    assert_eq!(stack.books().await, (0, 0), "nobody called");
    drain(workers).await;
}

#[tokio::test]
async fn a_heartbeat_is_answered_once_and_tells_of_the_fleet() {
    let stack = Stack::offline().await;
    let workers = two(&stack).await;
    let (task, message) = command(json!({"command": "heartbeat"}));
    let answer = stack.ask_as(task, &message).await;
    assert_eq!(answer.content["command"], "heartbeat");
    for field in ["paused", "budget", "run_limit", "running_runs", "outbox_unsent", "dead_letters"] {
        assert!(!answer.content["fleet"][field].is_null(), "{field} is missing: {}", answer.content);
    }
    stack.until_rest().await;
    assert_eq!(stack.answers(task).await.len(), 1);
    drain(workers).await;
}

#[tokio::test]
async fn every_worker_passes_a_flush_on_until_its_gateway_has_done_it() {
    let (calls, flushed) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let (seen, done) = (Arc::clone(&calls), Arc::clone(&flushed));
    let clear = move || {
        let (seen, done) = (Arc::clone(&seen), Arc::clone(&done));
        async move {
            // The first worker's attempts all fail: it must come again with its next sweep.
            if seen.fetch_add(1, Ordering::SeqCst) < 5 {
                return StatusCode::INTERNAL_SERVER_ERROR;
            }
            done.fetch_add(1, Ordering::SeqCst);
            StatusCode::NO_CONTENT
        }
    };
    let gateway = serve(Router::new().route("/v1/admin/cache/clear", post(clear))).await;
    let stack = Stack::offline().await.with("RAG_URL", &format!("http://{gateway}"));
    let workers = two(&stack).await;
    let said = send(&stack, json!({"command": "flush_cache"})).await;
    assert_eq!(said["fleet"]["cache_generation"], 1);
    eventually("both have flushed", || async { (flushed.load(Ordering::SeqCst) >= 2).then_some(()) }).await;
    drain(workers).await;
}

#[tokio::test]
async fn a_worker_waits_for_the_apis_rate_limit_instead_of_provoking_a_429() {
    // Room for one call in a window that is over soon.
    let options = SimOptions {
        tokens_per_minute: Some(8_000),
        rate_window: Duration::from_millis(500),
        ..SimOptions::default()
    };
    let stack = Stack::simulated_by(options).await.with("MAX_IN_FLIGHT", "1");
    let worker = stack.worker().await;
    let tasks: Vec<TaskId> = (0..4).map(|_| TaskId::random()).collect();
    for task in &tasks {
        stack.publish(request(*task, "Design the event bus", json!({})).to_string()).await;
    }
    for task in &tasks {
        assert_eq!(stack.until(*task, RunStatus::Done).await.run.attempt, 1);
    }
    let (ledger, billed) = stack.books().await;
    assert_eq!(ledger, billed);
    let metrics = worker.registry.render().unwrap();
    assert!(
        metrics.contains("atlas_retries_total{dependency=\"model\"} 0"),
        "a 429 was provoked:\n{metrics}"
    );
    assert!(metrics.contains("atlas_rate_limit_wait_seconds_count 4"), "{metrics}");
    assert_eq!(stack.sim().meter().calls(), 4);
    worker.drain().await;
}

#[tokio::test]
async fn a_rate_limit_without_room_for_long_gives_the_run_back_unharmed() {
    let options = SimOptions {
        tokens_per_minute: Some(8_000),
        rate_window: Duration::from_hours(1),
        ..SimOptions::default()
    };
    let stack = Stack::simulated_by(options).await.with("MAX_IN_FLIGHT", "1");
    let worker = stack.worker().await;
    stack.ask("Design the event bus", json!({})).await;

    let second = TaskId::random();
    stack.publish(request(second, "Design a cache", json!({})).to_string()).await;
    let waiting = eventually("it waits in the store", || async {
        let detail = stack.run(second).await?;
        (detail.run.status == RunStatus::Queued && detail.run.attempt == 1).then_some(detail)
    })
    .await;
    assert!(waiting.run.not_before.is_some(), "until the limit has room");
    let (ledger, billed) = stack.books().await;
    assert_eq!(ledger, billed, "nothing is reserved meanwhile");
    assert_eq!(stack.sim().meter().calls(), 1, "nothing was asked in vain");
    worker.drain().await;
}
