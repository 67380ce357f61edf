//! The life cycle of requests, through a whole worker on the embedded store and queue, a real HTTP
//! gateway (of canned passages) and the simulator of the model API.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::needless_pass_by_value,
    reason = "tests"
)]

mod crash_points;
mod fleet;
#[path = "../support/gateway.rs"]
mod gateway;
mod guarantees;
mod link;
mod stack;

use std::time::Duration;

use atlas_openai_sim::{Sim, SimOptions};
use atlas_shared::{TaskId, message::AnswerType};
use atlas_worker::{StartError, Worker, store::RunStatus};
use axum::http::StatusCode;
use serde_json::{Value, json};

use link::Link;
use stack::{Stack, bounded, command, eventually, request};

#[tokio::test]
async fn without_a_model_the_offline_drafter_answers_and_says_so() {
    let stack = Stack::offline().await;
    let worker = stack.worker().await;

    let answer = stack.ask("Design the event bus", json!({"team": "billing"})).await;

    assert_eq!(answer.msg_type, AnswerType::Spec);
    assert_eq!(answer.metadata["status"], "done");
    assert_eq!(answer.metadata["model"], "offline-extractive");
    assert_eq!(answer.metadata["tokens"], 0);
    assert_eq!(answer.metadata["team"], "billing", "the request's own metadata comes back");
    let markdown = answer.content.as_str().unwrap();
    assert!(markdown.lines().take(3).any(|line| line.contains("No language model")), "{markdown}");
    assert!(markdown.contains("docs/queue.md"), "{markdown}");

    let detail = stack.until(answer.task_id, RunStatus::Done).await;
    assert_eq!(detail.answer.unwrap()["content"], answer.content, "stored as it was published");
    worker.drain().await;
}

#[tokio::test]
async fn a_model_writes_a_grounded_spec_and_the_ledger_equals_the_meter() {
    let stack = Stack::simulated().await;
    let worker = stack.worker().await;

    let answer = stack.ask("Design the event bus", json!({})).await;

    assert_eq!(answer.msg_type, AnswerType::Spec, "{answer:?}");
    assert_eq!(answer.metadata["model"], "gpt-4.1");
    let citations = answer.metadata["citations"].as_array().unwrap();
    assert!(!citations.is_empty());
    for citation in citations {
        assert!(["docs/queue.md", "docs/store.md"].contains(&citation["source"].as_str().unwrap()));
    }
    let (ledger, meter) = stack.books().await;
    assert!(meter > 0);
    assert_eq!(ledger, meter);
    assert_eq!(answer.metadata["tokens"], meter);
    worker.drain().await;
}

#[tokio::test]
async fn a_message_without_task_id_and_without_optional_fields_is_served() {
    let stack = Stack::offline().await;
    let worker = stack.worker().await;

    stack.publish(r#"{"role":"architect","msg_type":"chat","content":"Design a cache","metadata":{}}"#).await;

    let store = stack.store().await;
    let run = eventually("one run is done", || async {
        store.list_runs(Some(RunStatus::Done), 10).await.unwrap().into_iter().next()
    })
    .await;
    assert_eq!(run.task_id.0.get_version_num(), 5, "derived from the message id");
    worker.drain().await;
}

#[tokio::test]
async fn bad_messages_are_answered_or_kept_and_never_stop_the_worker() {
    let stack = Stack::offline().await;
    let worker = stack.worker().await;
    let nested = format!("{}1{}", "[".repeat(400), "]".repeat(400));
    let bad: Vec<Vec<u8>> = vec![
        b"not json at all".to_vec(),
        b"[1, 2, 3]".to_vec(),
        b"\xff\xfe{}".to_vec(),
        json!({"role":"architect","msg_type":"chat","content":"  ","metadata":{}}).to_string().into_bytes(),
        json!({"role":"architect","msg_type":"chat","content":"x".repeat(2 << 20),"metadata":{}})
            .to_string()
            .into_bytes(),
        json!({"role":"architect","msg_type":"poem","content":"x","metadata":{}}).to_string().into_bytes(),
        json!({"role":"architect","msg_type":"chat","content":"x","task_id":"seven"})
            .to_string()
            .into_bytes(),
        format!(r#"{{"role":"architect","msg_type":"chat","content":"x","metadata":{{"deep":{nested}}}}}"#)
            .into_bytes(),
        json!({"role":"architect","msg_type":"control","content":{"command":"dance"}})
            .to_string()
            .into_bytes(),
    ];
    let count = u64::try_from(bad.len()).unwrap();
    stack.publish(json!({"role":"chef","msg_type":"chat","content":"Cook"}).to_string()).await;
    for message in bad {
        stack.publish(message).await;
    }

    let good = stack.ask("Design the event bus", json!({})).await;
    assert_eq!(good.msg_type, AnswerType::Spec, "the worker goes on");

    let store = stack.store().await;
    let limits = stack.config().limits;
    eventually("every bad message is kept", || async {
        let fleet = store.fleet_state(limits).await.unwrap();
        (fleet.dead_letters == count && fleet.outbox_unsent == 0).then_some(())
    })
    .await;
    let metrics = worker.registry.render().unwrap();
    for reason in [
        "not_json",
        "not_an_object",
        "invalid_utf8",
        "empty_content",
        "too_large",
        "unknown_msg_type",
        "invalid_task_id",
        "invalid_command",
    ] {
        assert!(metrics.contains(&format!("reason=\"{reason}\"")), "{reason} is not counted");
    }
    worker.drain().await;
}

#[tokio::test]
async fn a_rejected_message_gets_an_error_answer_that_says_what_to_mend() {
    let stack = Stack::offline().await;
    let worker = stack.worker().await;
    let task = TaskId::random();

    let message = json!({"task_id": task, "role": "architect", "msg_type": "poem", "content": "x", "metadata": {"ticket": 7}});
    let answer = stack.ask_as(task, &message).await;

    assert_eq!(answer.msg_type, AnswerType::Error);
    assert_eq!(answer.metadata["error_code"], "unknown_msg_type");
    assert_eq!(answer.metadata["ticket"], 7);
    assert!(answer.content.as_str().unwrap().contains("chat"), "{}", answer.content);
    worker.drain().await;
}

#[tokio::test]
async fn a_task_that_is_published_twice_is_done_once() {
    let stack = Stack::simulated().await;
    let worker = stack.worker().await;
    let task = TaskId::random();
    let message = request(task, "Design the event bus", json!({}));

    let first = stack.ask_as(task, &message).await;
    stack.publish(message.to_string()).await;
    // A later request is served after the copy was.
    let metrics = eventually("the copy is counted", || async {
        let metrics = worker.registry.render().unwrap();
        metrics.contains("atlas_messages_total{outcome=\"duplicate\"} 1").then_some(metrics)
    })
    .await;

    assert!(metrics.contains("atlas_runs_total{status=\"done\"} 1"), "{metrics}");
    let detail = stack.run(task).await.unwrap();
    assert_eq!(detail.run.attempt, 1);
    assert_eq!(detail.answer.unwrap()["content"], first.content);
    let (ledger, meter) = stack.books().await;
    assert_eq!(ledger, meter);
    assert_eq!(first.metadata["tokens"], meter, "paid once");
    worker.drain().await;
}

#[tokio::test]
async fn a_limit_below_any_call_defers_and_holds_up_nobody_else() {
    let stack = Stack::simulated().await.with("DAILY_TOKEN_BUDGET", "50");
    let worker = stack.worker().await;
    let task = TaskId::random();

    stack.publish(request(task, "Design the event bus", json!({})).to_string()).await;
    stack.until(task, RunStatus::Deferred).await;

    assert_eq!(stack.books().await, (0, 0));
    let metrics = worker.registry.render().unwrap();
    assert!(!metrics.contains("atlas_work_blocked{reason=\"budget\"} 1"), "{metrics}");
    let (command_id, message) = command(json!({"command": "set_budget", "daily": 1_000_000}));
    stack.ask_as(command_id, &message).await;
    stack.until(task, RunStatus::Done).await;
    worker.drain().await;
}

#[tokio::test]
async fn a_run_that_cannot_fit_its_own_limit_fails_with_a_clear_error() {
    let stack = Stack::simulated().await.with("TOKEN_BUDGET_PER_RUN", "500");
    let worker = stack.worker().await;

    let answer = stack.ask("Design the event bus", json!({})).await;

    assert_eq!(answer.msg_type, AnswerType::Error);
    assert_eq!(answer.metadata["error_code"], "run_budget_exhausted");
    assert!(answer.content.as_str().unwrap().contains("TOKEN_BUDGET_PER_RUN"), "{}", answer.content);
    assert_eq!(stack.books().await, (0, 0));
    worker.drain().await;
}

#[tokio::test]
async fn the_fallback_model_answers_when_the_first_one_fails() {
    let stack = Stack::simulated()
        .await
        .with("OPENAI_FALLBACK_MODELS", "gpt-4.1-mini")
        .with("RETRY_MAX_ATTEMPTS", "2")
        .with("CIRCUIT_FAILURES", "100");
    stack
        .sim
        .as_ref()
        .unwrap()
        .script(json!([
            {"fault": "500"}, {"fault": "500"}
        ]))
        .unwrap();
    let worker = stack.worker().await;

    let answer = stack.ask("Design the event bus", json!({})).await;

    assert_eq!(answer.msg_type, AnswerType::Spec, "{answer:?}");
    assert_eq!(answer.metadata["model"], "gpt-4.1-mini");
    assert_eq!(answer.metadata["fallbacks"].as_array().unwrap().len(), 1);
    let (ledger, meter) = stack.books().await;
    assert_eq!(ledger, meter, "the API's own failures are not billed");
    worker.drain().await;
}

#[tokio::test]
async fn a_call_whose_cost_nobody_can_know_is_booked_as_spent() {
    let stack = Stack::simulated().await.with("TOKEN_BUDGET_PER_RUN", "40000");
    stack.sim.as_ref().unwrap().script(json!([{"fault": "cut"}])).unwrap();
    let worker = stack.worker().await;

    let answer = stack.ask("Design the event bus", json!({})).await;

    assert_eq!(answer.msg_type, AnswerType::Spec, "{answer:?}");
    let (ledger, meter) = stack.books().await;
    assert!(ledger > meter, "the whole reservation of the cut call is booked: {ledger} <= {meter}");
    worker.drain().await;
}

#[tokio::test]
async fn a_dead_gateway_is_said_in_the_spec() {
    let dead = {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        listener.local_addr().unwrap()
    };
    let stack = Stack::offline().await.with("RAG_URL", &format!("http://{dead}"));
    let worker = stack.worker().await;

    let answer = stack.ask("Design the event bus", json!({})).await;

    assert_eq!(answer.msg_type, AnswerType::Spec);
    assert_eq!(answer.metadata["context_degraded"], true, "{:?}", answer.metadata);
    assert_eq!(answer.metadata["citations"], json!([]));
    worker.drain().await;
}

#[tokio::test]
async fn a_dead_workers_run_is_taken_up_by_the_sweep() {
    let stack = Stack::simulated().await;
    let task = TaskId::random();
    // A worker that claims and is never heard of again.
    stack.claimed(task, Duration::ZERO).await;

    let worker = stack.worker().await;
    let detail = stack.until(task, RunStatus::Done).await;

    assert_eq!(detail.run.attempt, 2);
    worker.drain().await;
}

#[tokio::test]
async fn a_drain_gives_running_work_back_and_another_worker_finishes_it() {
    let stack = Stack::simulated().await.with("DRAIN_TIMEOUT_SECONDS", "0");
    let sim = stack.sim.as_ref().unwrap();
    sim.script(json!([{"fault": "hang"}])).unwrap();
    let first = stack.worker().await;
    let task = TaskId::random();
    stack.publish(request(task, "Design the event bus", json!({})).to_string()).await;
    eventually("the call is in flight", || async { (sim.meter().calls() > 0).then_some(()) }).await;

    bounded("the drain", first.drain()).await;
    let released = stack.run(task).await.unwrap();
    assert_eq!(released.run.status, RunStatus::Queued, "given back");

    let second = stack.worker().await;
    let detail = stack.until(task, RunStatus::Done).await;
    assert_eq!(detail.run.attempt, 2);
    let (ledger, meter) = stack.books().await;
    assert!(ledger >= meter, "the call that was in flight is booked as spent");
    second.drain().await;
}

#[tokio::test]
async fn commands_change_the_fleet_and_are_answered() {
    let stack = Stack::offline().await;
    let worker = stack.worker().await;
    let (task, message) = command(json!({"command": "set_budget", "daily": 777, "per_run": 55}));
    let answer = stack.ask_as(task, &message).await;
    assert_eq!(answer.msg_type, AnswerType::Control);
    assert_eq!(answer.content["fleet"]["budget"]["limit"], 777);
    assert_eq!(answer.content["fleet"]["run_limit"], 55);

    let (task, message) = command(json!({"command": "heartbeat"}));
    let answer = stack.ask_as(task, &message).await;
    assert_eq!(answer.content["command"], "heartbeat");
    assert_eq!(answer.content["fleet"]["budget"]["limit"], 777, "it is in the store");

    let (task, message) = command(json!({"command": "set_budget", "daily": "default", "per_run": 99}));
    let answer = stack.ask_as(task, &message).await;
    assert_eq!(answer.content["fleet"]["budget"]["limit"], stack.config().limits.daily.0);
    assert_eq!(answer.content["fleet"]["run_limit"], 99);

    let (task, message) = command(json!({"command": "cancel", "task_id": TaskId::random()}));
    let said = stack.ask_as(task, &message).await.content;
    assert_eq!((&said["cancelled"], &said["outcome"]), (&json!(true), &json!("awaited")), "an unknown task");
    worker.drain().await;
}

#[tokio::test]
async fn a_paused_fleet_keeps_requests_in_the_store_until_it_is_resumed() {
    let stack = Stack::offline().await;
    let worker = stack.worker().await;
    let (task, message) = command(json!({"command": "pause"}));
    assert_eq!(stack.ask_as(task, &message).await.content["fleet"]["paused"], true);

    let task = TaskId::random();
    stack.publish(request(task, "Design the event bus", json!({})).to_string()).await;
    let waiting = stack.until(task, RunStatus::Queued).await;
    assert_eq!(waiting.run.attempt, 0, "nobody worked on it");

    let (command_id, message) = command(json!({"command": "resume"}));
    stack.ask_as(command_id, &message).await;
    stack.until(task, RunStatus::Done).await;
    worker.drain().await;
}

/// A gateway that has no collection at all.
async fn without_collections() -> std::net::SocketAddr {
    let refuse = || async {
        let problem = json!({"type": "unknown_collection", "title": "Not Found", "status": 404,
            "detail": "there is no such collection"});
        (StatusCode::NOT_FOUND, [("content-type", "application/problem+json")], problem.to_string())
    };
    let ready = || async { axum::Json(json!({"status": "ready"})) };
    gateway::serve(
        axum::Router::new()
            .route("/v1/query_chat", axum::routing::post(refuse))
            .route("/health/ready", axum::routing::get(ready)),
    )
    .await
}

#[tokio::test]
async fn an_unknown_collection_is_said_to_be_one_and_costs_nothing_where_it_was_asked_for() {
    let gateway = without_collections().await;
    let stack = Stack::simulated().await.with("RAG_URL", &format!("http://{gateway}"));
    let worker = stack.worker().await;

    let named = stack.ask("Design the event bus", json!({"collection": "handbok"})).await;
    assert_eq!(named.metadata["error_code"], "unknown_collection");
    assert!(named.content.as_str().unwrap().contains("no collection \"handbok\""), "{named:?}");
    assert_eq!(stack.sim().billed_calls().len(), 0);

    let default = stack.ask("Design the event bus", json!({})).await;
    assert_eq!(default.msg_type, AnswerType::Spec);
    assert_eq!(default.metadata["context_degraded"], true);
    let why = default.metadata["context_degraded_reason"].as_str().unwrap();
    assert!(why.contains("Nothing is indexed"), "{why}");
    worker.drain().await;

    let strict = stack.with("RAG_FAIL_OPEN", "false");
    let worker = strict.worker().await;
    let refused = strict.ask("Design the event bus", json!({})).await;
    assert_eq!(refused.metadata["error_code"], "unknown_collection");
    worker.drain().await;
}

#[tokio::test]
async fn readiness_has_a_checks_map() {
    let stack = Stack::offline().await;
    let worker = stack.worker().await;
    let client = reqwest::Client::new();
    let url = format!("http://{}/health/ready", worker.addr);

    let body = eventually("ready", || async {
        let response = client.get(&url).send().await.unwrap();
        let ready = response.status() == StatusCode::OK.as_u16();
        let body: Value = response.json().await.unwrap();
        ready.then_some(body)
    })
    .await;

    for check in ["store", "queue", "gateway", "model"] {
        assert_eq!(body["checks"][check]["ok"], true, "{body}");
    }
    let metrics =
        client.get(format!("http://{}/metrics", worker.addr)).send().await.unwrap().text().await.unwrap();
    assert!(metrics.contains("\natlas_in_flight 0\n"), "an idle worker works on nothing: {metrics}");
    worker.drain().await;
}

#[tokio::test]
async fn a_wrong_key_or_an_unknown_model_stops_the_start_and_names_the_variable() {
    let options = SimOptions { require_key: Some("sk-right-key".to_owned()), ..SimOptions::default() };
    let sim = Sim::start(options).await.unwrap();
    let stack = Stack::offline().await.with("OPENAI_BASE_URL", &sim.base_url());

    let wrong_key = stack.with("OPENAI_API_KEY", "sk-wrong-key");
    let error = Worker::start(&wrong_key.config()).await.expect_err("must not start");
    assert!(matches!(error, StartError::Upstream(_)));
    assert!(error.to_string().contains("OPENAI_API_KEY"), "{error}");
    assert!(!error.to_string().contains("sk-wrong-key"), "{error}");

    let unknown_model =
        wrong_key.with("OPENAI_API_KEY", "sk-right-key").with("OPENAI_MODEL", "no-such-model");
    let error = Worker::start(&unknown_model.config()).await.expect_err("must not start");
    assert!(error.to_string().contains("OPENAI_MODEL"), "{error}");
}

/// A worker with one run in its call, whose answer does not come until the link lets it.
async fn a_run_at_work() -> (Stack, Link, atlas_worker::RunningWorker, TaskId) {
    // Only a renewal tells of a cancel; for the other way see `fleet.rs`.
    let stack = Stack::simulated().await.with("LEASE_SECONDS", "5").with("CANCEL_INTERVAL_SECONDS", "3600");
    let link = Link::to(stack.sim().addr).await;
    let stack = stack.with("OPENAI_BASE_URL", &format!("http://{}/v1", link.addr));
    let worker = stack.worker().await;
    link.hold_answers(true);
    let task = TaskId::random();
    stack.publish(request(task, "Design the event bus", json!({})).to_string()).await;
    eventually("it is in its call", || async { (stack.sim().meter().calls() == 1).then_some(()) }).await;
    (stack, link, worker, task)
}

#[tokio::test]
async fn a_lease_is_renewed_while_its_run_is_at_work() {
    let (stack, link, worker, task) = a_run_at_work().await;
    let first = stack.run(task).await.unwrap().run.lease_until;
    eventually("a later lease", || async {
        (stack.run(task).await.unwrap().run.lease_until > first).then_some(())
    })
    .await;
    link.hold_answers(false);
    assert_eq!(stack.until(task, RunStatus::Done).await.run.attempt, 1);
    worker.drain().await;
}

#[tokio::test]
async fn a_cancelled_run_at_work_is_stopped_and_its_call_booked_as_spent() {
    let (stack, _link, worker, task) = a_run_at_work().await;
    let (command_id, message) = command(json!({"command": "cancel", "task_id": task}));
    assert_eq!(stack.ask_as(command_id, &message).await.content["cancelled"], true);

    let failed = stack.until(task, RunStatus::Failed).await;
    assert_eq!(failed.run.error_code.as_deref(), Some("cancelled"));
    stack.until_rest().await;
    worker.drain().await;
    assert_eq!(stack.reconciled().await.assumed, 1);
}
