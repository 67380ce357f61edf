//! The six guarantees of `docs/GUARANTEES.md`, each under its own name, through whole workers.
//!
//! Guarantee 1 at every step of a dying worker, and guarantee 4, are in `crash_points.rs`.

use std::{
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use atlas_openai_sim::{FaultRates, SimOptions};
use atlas_shared::{TaskId, Tokens, ledger::NewLimit, message::AnswerType, sqlite::next_utc_midnight};
use atlas_test_support::{emulator::Emulator, skip, supabase::Supabase};
use atlas_worker::{
    RunningWorker, queue,
    store::{FleetChange, RunStatus, TenantLimit},
};
use jiff::Timestamp;
use serde_json::{Value, json};

use crate::{
    fleet::shows,
    link::Link,
    stack::{Stack, bounded, command, eventually, request},
};

/// A minute that is far from any midnight.
const NOON: &str = "2026-03-01T12:00:00Z";

fn metric(worker: &RunningWorker, line: &str) -> bool {
    worker.registry.render().unwrap().lines().any(|rendered| rendered == line)
}

async fn blocked(worker: &RunningWorker, reason: &str) {
    let line = format!("atlas_work_blocked{{reason=\"{reason}\"}} 1");
    eventually(&line, || async { metric(worker, &line).then_some(()) }).await;
}

/// The check of this name in the readiness answer, and whether the worker is ready at all.
async fn readiness(worker: &RunningWorker, check: &str) -> (bool, bool) {
    let response = reqwest::get(format!("http://{}/health/ready", worker.addr)).await.unwrap();
    let ready = response.status().is_success();
    let body: Value = response.json().await.unwrap();
    (ready, body["checks"][check]["ok"] == true)
}

impl Stack {
    async fn request(&self, metadata: Value) -> TaskId {
        let task = TaskId::random();
        self.publish(request(task, "Design the event bus", metadata).to_string()).await;
        task
    }

    async fn change(&self, change: FleetChange) {
        self.store().await.change_fleet(&change, self.config().limits).await.unwrap();
    }

    async fn limit_day(&self, tokens: u64) {
        self.change(FleetChange {
            daily_limit: Some(NewLimit::Tokens(Tokens(tokens))),
            ..FleetChange::default()
        })
        .await;
    }

    async fn limit_tenant(&self, tenant: &str, tokens: u64) {
        let limit = TenantLimit { tenant: tenant.to_owned(), limit: Some(Tokens(tokens)) };
        self.change(FleetChange { tenant_limit: Some(limit), ..FleetChange::default() }).await;
    }

    fn stop_clock(&self, at: &str) -> Timestamp {
        let at = at.parse().unwrap();
        self.db.clock().stop_at(at);
        at
    }

    /// Waits until every delivery is ended and every run is final or waits for tokens. The clock is
    /// pushed on meanwhile, past the waits of runs that failed and will be tried again.
    async fn until_final_or_deferred(&self, runs: usize) {
        let runs = u64::try_from(runs).unwrap();
        eventually("every run is final or deferred", || async {
            let settled = self
                .count("SELECT count(*) FROM runs WHERE ended_at IS NOT NULL OR status = 'deferred'")
                .await;
            let undecided = self.count("SELECT count(*) FROM queue_deliveries").await;
            let waiting = self.count("SELECT count(*) FROM runs WHERE status = 'queued'").await;
            if waiting > 0 {
                self.db.clock().advance(Duration::from_secs(10));
            }
            (settled == runs && undecided == 0).then_some(())
        })
        .await;
    }

    async fn runs_in(&self, status: RunStatus) -> u64 {
        self.count(&format!("SELECT count(*) FROM runs WHERE status = '{}'", status.as_str())).await
    }

    /// What the simulator billed for these tasks together.
    fn billed(&self, tasks: &[TaskId]) -> u64 {
        let meter = self.sim().meter();
        tasks.iter().map(|task| meter.task(&task.to_string()).total_tokens).sum()
    }
}

#[tokio::test]
async fn g1_every_accepted_message_reaches_exactly_one_final_state() {
    let stack = Stack::simulated().await.with("TOKEN_BUDGET_PER_RUN", "12000");
    let workers = [stack.worker().await, stack.worker().await];

    let mut accepted = Vec::new();
    for _ in 0..5 {
        accepted.push(stack.request(json!({})).await);
    }
    // Again, at the same time: the same task.
    for task in &accepted {
        stack.publish(request(*task, "Design the event bus", json!({})).to_string()).await;
    }
    // One that will fail, two that cannot be read, one that Pub/Sub gave up, and one that is not for us.
    let hopeless = stack.request(json!({"deadline": "2020-01-01T00:00:00Z"})).await;
    stack.publish("not json").await;
    stack.publish(json!({"role": "architect", "msg_type": "poem", "content": "x"}).to_string()).await;
    stack.publish(json!({"role": "chef", "msg_type": "chat", "content": "Cook"}).to_string()).await;
    let given_up = request(TaskId::random(), "Design a cache", json!({})).to_string();
    let publisher = stack.queues().await.publisher;
    publisher.publish("architect_dlq", given_up.into(), Vec::new()).await.unwrap();
    eventually("the dead letters are stored", || async {
        (stack.count("SELECT count(*) FROM dead_letters").await == 3).then_some(())
    })
    .await;
    stack.until_rest().await;
    for worker in workers {
        worker.drain().await;
    }

    stack.reconciled().await;
    assert_eq!(stack.count("SELECT count(*) FROM runs").await, 6, "one a task");
    for task in accepted {
        assert_eq!(stack.run(task).await.unwrap().run.status, RunStatus::Done);
        assert!(!stack.answers(task).await.is_empty());
    }
    assert_eq!(stack.run(hopeless).await.unwrap().run.status, RunStatus::Failed);
    assert_eq!(stack.count("SELECT count(*) FROM dead_letters").await, 3, "and nothing twice");
}

#[tokio::test]
async fn g2_a_worker_that_wakes_up_after_its_lease_is_fenced_off_and_changes_nothing() {
    // The first worker must not take its own run up again, neither by its sweep nor by the message.
    let stack = Stack::simulated()
        .await
        .with("SWEEP_INTERVAL_SECONDS", "3600")
        .with("MAX_IN_FLIGHT", "1")
        .with("LEASE_SECONDS", "3600");
    let link = Link::to(stack.sim().addr).await;
    let direct = stack.settings["OPENAI_BASE_URL"].clone();
    let stack = stack.with("OPENAI_BASE_URL", &format!("http://{}/v1", link.addr));
    let sleeper = stack.worker().await;
    link.hold_answers(true);
    let task = stack.request(json!({})).await;
    eventually("it is in its call", || async { (stack.sim().meter().calls() == 1).then_some(()) }).await;

    stack.db.clock().advance(Duration::from_secs(3601));
    let stack = stack.with("OPENAI_BASE_URL", &direct);
    let successor = stack.worker().await;
    let done = stack.until(task, RunStatus::Done).await;
    assert_eq!(done.run.attempt, 2);
    link.hold_answers(false);
    eventually("the sleeper sees it", || async {
        metric(&sleeper, "atlas_runs_total{status=\"fenced\"} 1").then_some(())
    })
    .await;
    sleeper.drain().await;
    successor.drain().await;

    let books = stack.reconciled().await;
    let mut after = stack.run(task).await.unwrap();
    // The ledger's sum, which had its whole reservation until it brought what was billed.
    assert!(after.run.tokens_booked < done.run.tokens_booked);
    after.run.tokens_booked = done.run.tokens_booked;
    assert_eq!(
        (&after.run, &after.answer, &after.steps),
        (&done.run, &done.answer, &done.steps),
        "what it brought changed nothing"
    );
    assert_eq!(stack.sim().meter().calls(), 2);
    assert_eq!(books.ledger, books.billed, "but what it was billed is booked: no longer assumed");
    let answers = stack.answers(task).await;
    assert_eq!(answers, vec![done.answer.unwrap()], "one result row, one answer");
}

#[tokio::test]
async fn g3_billed_tokens_never_exceed_the_days_limit_and_the_ledger_never_says_less() {
    const LIMIT: u64 = 40_000;
    let faults: FaultRates = "500=0.1,429=0.05,cut=0.1,no_usage=0.1,wrong_schema=0.1".parse().unwrap();
    let stack = Stack::simulated_by(SimOptions { faults, seed: 7, ..SimOptions::default() })
        .await
        .with("DAILY_TOKEN_BUDGET", &LIMIT.to_string())
        .with("TOKEN_BUDGET_PER_RUN", "12000")
        .with("CIRCUIT_FAILURES", "1000")
        .with("RETRY_MAX_DELAY_SECONDS", "1")
        .with("LEASE_SECONDS", "3600");
    stack.stop_clock(NOON);
    let workers = [stack.worker().await, stack.worker().await, stack.worker().await];
    let mut tasks = Vec::new();
    for _ in 0..24 {
        tasks.push(stack.request(json!({})).await);
    }

    stack.until_final_or_deferred(tasks.len()).await;
    assert!(stack.runs_in(RunStatus::Deferred).await > 0, "the day's limit was met");
    let spent = stack.sim().meter().total_tokens();
    assert!(spent <= LIMIT, "{spent} billed");

    stack.limit_day(10_000_000).await;
    stack.until_final_or_deferred(tasks.len()).await;
    eventually("every run is final", || async {
        (stack.runs_in(RunStatus::Deferred).await == 0).then_some(())
    })
    .await;
    stack.until_final_or_deferred(tasks.len()).await;
    for worker in workers {
        worker.drain().await;
    }
    let books = stack.reconciled().await;
    assert!(books.billed > LIMIT, "the limit was what held it back");
    for task in tasks {
        assert!(stack.billed(&[task]) <= 12_000, "the run's limit");
    }
}

#[tokio::test]
async fn g3_a_tenants_limit_holds_under_concurrency_and_can_be_lowered_and_raised() {
    const LIMIT: u64 = 12_000;
    let stack = Stack::simulated().await.with("DAILY_TOKEN_BUDGET", "10000000");
    stack.stop_clock(NOON);
    stack.limit_tenant("small", LIMIT).await;
    let workers = [stack.worker().await, stack.worker().await];
    let (mut small, mut other) = (Vec::new(), Vec::new());
    for _ in 0..8 {
        small.push(stack.request(json!({"tenant": "small"})).await);
        other.push(stack.request(json!({"tenant": "other"})).await);
    }

    for task in &other {
        stack.until(*task, RunStatus::Done).await;
    }
    stack.until_final_or_deferred(16).await;
    assert!(stack.runs_in(RunStatus::Deferred).await > 0, "the tenant's limit was met");
    let spent = stack.billed(&small);
    assert!(spent > 0 && spent <= LIMIT, "{spent} billed");

    // Below what is spent: nothing is taken back, and nothing more is given.
    stack.limit_tenant("small", 100).await;
    let late = stack.request(json!({"tenant": "small"})).await;
    stack.until(late, RunStatus::Deferred).await;
    small.push(late);
    assert!(stack.billed(&small) <= LIMIT);
    assert_eq!(stack.billed(&[late]), 0);

    stack.limit_tenant("small", 1_000_000).await;
    for task in &small {
        stack.until(*task, RunStatus::Done).await;
    }
    for worker in workers {
        worker.drain().await;
    }
    let books = stack.reconciled().await;
    assert_eq!(books.ledger, books.billed);
}

#[tokio::test]
async fn g5_an_exhausted_budget_loses_nothing_and_burns_nothing_until_the_limit_is_raised() {
    // Enough for one request, squeezed into what a day may bill, and not for a second one.
    let stack = Stack::simulated().await.with("DAILY_TOKEN_BUDGET", "4000");
    let worker = stack.worker().await;
    let first = stack.request(json!({})).await;
    stack.until(first, RunStatus::Done).await;
    let before = stack.books().await;

    let second = stack.request(json!({})).await;
    let deferred = stack.until(second, RunStatus::Deferred).await;
    assert!(deferred.run.not_before.is_some());
    assert_eq!(stack.books().await, before, "nothing was called, nothing is open");
    blocked(&worker, "budget").await;
    let third = stack.request(json!({})).await;
    stack.until(third, RunStatus::Deferred).await;
    eventually("its message is acked", || async {
        (stack.count("SELECT count(*) FROM queue_deliveries").await == 0).then_some(())
    })
    .await;
    assert!(metric(&worker, "atlas_messages_total{outcome=\"chat\"} 3"), "no message came twice");
    let told = stack.published(third).await;
    assert!(told.iter().any(|message| message["metadata"]["status"] == "deferred"), "{told:?}");

    // The command that ends it comes through the same queue.
    let (command_id, message) = command(json!({"command": "set_budget", "daily": 1_000_000}));
    stack.ask_as(command_id, &message).await;

    stack.until(second, RunStatus::Done).await;
    stack.until(third, RunStatus::Done).await;
    let (ledger, meter) = stack.books().await;
    assert_eq!(ledger, meter);
    worker.drain().await;
}

#[tokio::test]
async fn g5_deferred_work_resumes_by_itself_at_utc_midnight_oldest_first() {
    let stack = Stack::simulated().await.with("DAILY_TOKEN_BUDGET", "4000");
    let noon = stack.stop_clock(NOON);
    let worker = stack.worker().await;
    let mut tasks = Vec::new();
    for status in [RunStatus::Done, RunStatus::Deferred, RunStatus::Deferred] {
        let task = stack.request(json!({})).await;
        stack.until(task, status).await;
        tasks.push(task);
        stack.db.clock().advance(Duration::from_secs(1));
    }

    // A day has room for one: the older one goes first, the other waits for the day after.
    let midnight = next_utc_midnight(noon);
    stack.db.clock().stop_at(midnight);
    stack.until(tasks[1], RunStatus::Done).await;
    assert_eq!(stack.run(tasks[2]).await.unwrap().run.status, RunStatus::Deferred);
    stack.db.clock().stop_at(next_utc_midnight(midnight));
    stack.until(tasks[2], RunStatus::Done).await;
    worker.drain().await;

    let books = stack.reconciled().await;
    assert_eq!(books.ledger, books.billed);
    assert!(stack.count("SELECT max(used) FROM token_days").await <= 4000, "on any day");
}

#[tokio::test]
async fn g6_a_broken_model_api_pauses_and_recovers_with_one_probe_at_a_time() {
    // The first run waits for its second try until the other one has failed too: then both wait for the circuit.
    let stack =
        Stack::simulated().await.with("CIRCUIT_FAILURES", "2").with("RETRY_BASE_MILLISECONDS", "2000");
    let mut link = Link::to(stack.sim().addr).await;
    let stack = stack.with("OPENAI_BASE_URL", &format!("http://{}/v1", link.addr));
    let worker = stack.worker().await;
    link.cut().await;
    let mut tasks = vec![stack.request(json!({})).await, stack.request(json!({})).await];
    let open = "atlas_circuit_open{dependency=\"model\"} 1";
    eventually("the circuit opens", || async { metric(&worker, open).then_some(()) }).await;
    blocked(&worker, "model").await;
    assert_eq!(readiness(&worker, "model").await, (false, false));

    // Pulling has stopped: later messages stay in the queue, untouched.
    tasks.push(stack.request(json!({})).await);
    tasks.push(stack.request(json!({})).await);
    assert_eq!(stack.count("SELECT count(*) FROM queue_deliveries").await, 4);
    let untouched = stack.count("SELECT count(*) FROM queue_deliveries WHERE attempt = 0").await;
    assert_eq!(untouched, 2);

    // The first call after the outage takes its time, longer than the other run waits before it asks again; until
    // it is answered it is the only one. A step is taken when a call comes in.
    stack.sim().script(json!([{"delay_ms": 3000}, {"delay_ms": 1000}])).unwrap();
    link.mend().await;
    eventually("the circuit closes", || async {
        // In this order: while it is still open after the steps were counted, the probe was under way.
        let left = stack.sim().steps_left();
        if metric(&worker, open) {
            assert!(left >= 1, "a second call through a half-open circuit");
            return None;
        }
        Some(())
    })
    .await;
    for task in &tasks {
        assert_eq!(stack.until(*task, RunStatus::Done).await.run.attempt, 1, "it waited in its place");
    }
    stack.until_rest().await;
    worker.drain().await;
    stack.reconciled().await;
    assert_eq!(stack.sim().meter().task(&tasks[0].to_string()).calls, 1);
}

#[tokio::test]
async fn g6_a_broken_gateway_pauses_where_specs_must_be_grounded() {
    let stack = Stack::simulated()
        .await
        .with("RAG_FAIL_OPEN", "false")
        .with("CIRCUIT_FAILURES", "2")
        .with("MAX_RUN_ATTEMPTS", "1");
    let gateway = stack.settings["RAG_URL"].strip_prefix("http://").unwrap().parse().unwrap();
    let mut link = Link::to(gateway).await;
    let stack = stack.with("RAG_URL", &format!("http://{}", link.addr));
    let worker = stack.worker().await;
    link.cut().await;
    blocked(&worker, "gateway").await;

    let task = stack.request(json!({})).await;
    assert_eq!(readiness(&worker, "gateway").await, (false, false));
    assert_eq!(stack.count("SELECT count(*) FROM queue_deliveries WHERE attempt = 0").await, 1, "it stays");
    link.mend().await;
    let done = stack.until(task, RunStatus::Done).await;
    assert_eq!(done.answer.unwrap()["metadata"]["context_degraded"], false);
    stack.until_rest().await;
    worker.drain().await;
    stack.reconciled().await;
}

/// A stack whose store is Supabase, behind a link.
async fn on_supabase(test: &str) -> Option<(Supabase, Link, Stack)> {
    let project = match Supabase::start().await {
        Ok(project) => project,
        Err(reason) => {
            skip(test, "Postgres", &reason);
            return None;
        }
    };
    let link = Link::to(project.url.strip_prefix("http://").unwrap().parse().unwrap()).await;
    let stack = Stack::simulated()
        .await
        .with("SUPABASE_URL", &format!("http://{}", link.addr))
        .with("SUPABASE_SERVICE_ROLE_KEY", &project.service_role_key);
    Some((project, link, stack))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn g6_a_broken_store_pauses_and_messages_are_held_without_spending_attempts() {
    let name = "g6_a_broken_store_pauses_and_messages_are_held_without_spending_attempts";
    let Some((project, mut link, stack)) = on_supabase(name).await else { return };
    let worker = stack.worker().await;
    let before = stack.request(json!({})).await;
    stack.until(before, RunStatus::Done).await;
    let sql = project.database().await.unwrap();
    let count = async |text: &str| sql.query_one(text, &[]).await.unwrap().get::<_, i64>(0);
    let unsent = "select count(*) from outbox where sent_at is null";
    eventually("its answer is marked as sent", || async { (count(unsent).await == 0).then_some(()) }).await;

    link.cut().await;
    let held = stack.request(json!({})).await;
    blocked(&worker, "store").await;
    eventually("not ready", || async { (!readiness(&worker, "store").await.0).then_some(()) }).await;
    let untouched = stack.request(json!({})).await;
    assert_eq!(stack.count("SELECT count(*) FROM queue_deliveries").await, 2, "both stay");
    assert!(stack.count("SELECT max(attempt) FROM queue_deliveries").await <= 1);

    link.mend().await;
    for task in [held, untouched] {
        assert_eq!(stack.until(task, RunStatus::Done).await.run.attempt, 1);
    }
    eventually("every delivery is ended", || async {
        (stack.count("SELECT count(*) FROM queue_deliveries").await == 0).then_some(())
    })
    .await;
    worker.drain().await;
    assert_eq!(count("select count(*) from architect_out").await, 3);
    assert_eq!(count(unsent).await, 0);
    let ledger = count("select coalesce(sum(actual), 0)::bigint from token_ledger").await;
    assert_eq!(u64::try_from(ledger).unwrap(), stack.sim().meter().total_tokens());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn g1_a_command_that_meets_a_broken_store_is_held_and_carried_out() {
    let name = "g1_a_command_that_meets_a_broken_store_is_held_and_carried_out";
    let Some((_project, mut link, stack)) = on_supabase(name).await else { return };
    let worker = stack.worker().await;
    let before = stack.request(json!({})).await;
    stack.until(before, RunStatus::Done).await;

    link.cut().await;
    let (_, message) = command(json!({"command": "set_budget", "per_run": 31_313}));
    stack.publish(message.to_string()).await;
    blocked(&worker, "store").await;
    link.mend().await;
    eventually("its delivery is ended", || async {
        (stack.count("SELECT count(*) FROM queue_deliveries").await == 0).then_some(())
    })
    .await;
    let fleet = stack.store().await.fleet_state(stack.config().limits).await.unwrap();
    assert_eq!(fleet.run_limit, Tokens(31_313));
    worker.drain().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn g1_a_message_too_large_for_the_store_is_put_aside_without_its_bytes() {
    let name = "g1_a_message_too_large_for_the_store_is_put_aside_without_its_bytes";
    let Some((project, _link, stack)) = on_supabase(name).await else { return };
    // One place: a delivery that never ended would hold up everything.
    let stack = stack.with("MAX_IN_FLIGHT", "1");
    let worker = stack.worker().await;
    stack.publish(vec![b'x'; 8_000_000]).await;
    let behind = stack.request(json!({})).await;
    stack.until(behind, RunStatus::Done).await;
    worker.drain().await;

    let sql = project.database().await.unwrap();
    let row = sql.query_one("select reason, detail, raw from dead_letters", &[]).await.unwrap();
    let (reason, detail): (&str, &str) = (row.get(0), row.get(1));
    assert_eq!(reason, "too_large");
    assert!(detail.contains("Its 8000001 bytes are not kept: "), "{detail}");
    assert_eq!(stack.count("SELECT count(*) FROM queue_deliveries").await, 0);
}

/// What a store answers that cannot hold what it was given: here it does not want to.
async fn refuse(project: &Supabase, table: &str, when: &str) {
    let sql = format!(
        "create or replace function refuse() returns trigger language plpgsql as
           $$ begin raise exception 'cannot be held' using errcode = '22023'; end $$;
         create trigger refused before insert on {table} for each row when ({when}) execute function refuse()"
    );
    project.database().await.unwrap().batch_execute(&sql).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn g1_a_request_that_the_store_cannot_hold_is_put_aside() {
    let name = "g1_a_request_that_the_store_cannot_hold_is_put_aside";
    let Some((project, _link, stack)) = on_supabase(name).await else { return };
    refuse(&project, "architect_in", "new.data->>'content' = 'refused'").await;
    // One place: a delivery that never ended would hold up everything.
    let stack = stack.with("MAX_IN_FLIGHT", "1");
    let worker = stack.worker().await;
    let refused = stack.ask("refused", json!({})).await;
    assert_eq!(refused.metadata["error_code"], "unstorable");
    let behind = stack.request(json!({})).await;
    stack.until(behind, RunStatus::Done).await;
    worker.drain().await;

    let sql = project.database().await.unwrap();
    let row = sql.query_one("select reason, task_id from dead_letters", &[]).await.unwrap();
    assert_eq!(row.get::<_, &str>(0), "unstorable");
    assert_eq!(row.get::<_, Option<uuid::Uuid>>(1).unwrap().to_string(), refused.task_id.to_string());
    assert_eq!(stack.count("SELECT count(*) FROM queue_deliveries").await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn g1_what_a_run_brought_and_the_store_cannot_hold_ends_it() {
    let name = "g1_what_a_run_brought_and_the_store_cannot_hold_ends_it";
    for (table, when) in [
        ("architect_out", "new.data->>'msg_type' = 'spec'"),
        // The checkpoint of an answer after which more is asked. Asked again, it would be paid again.
        ("run_steps", "not new.output ? 'ended'"),
    ] {
        let Some((project, _link, stack)) = on_supabase(name).await else { return };
        refuse(&project, table, when).await;
        if table == "run_steps" {
            let search = json!({"name": "search_knowledge", "arguments": {"query": "leases"}});
            let script = json!([{"match": "draft.0", "times": 9, "tool_calls": [search]}]);
            stack.sim().script(script).unwrap();
        }
        let worker = stack.worker().await;
        let answer = stack.ask("Design the event bus", json!({})).await;
        assert_eq!(answer.metadata["error_code"], "unstorable", "{table}: {answer:?}");
        let run = stack.until(answer.task_id, RunStatus::Failed).await.run;
        worker.drain().await;
        assert_eq!(run.attempt, 1, "{table}");
        let (billed, booked) = stack.books().await;
        assert_eq!(billed, booked, "{table}");
        assert_eq!(stack.sim().billed_calls().len(), 1, "{table}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn g2_an_answer_that_the_queue_refuses_holds_up_no_other() {
    let stack = Stack::offline().await;
    let worker = stack.worker().await;
    let refused = stack.request(json!({})).await;
    stack.until(refused, RunStatus::Done).await;
    let behind = stack.request(json!({})).await;
    stack.until(behind, RunStatus::Done).await;
    let unsent = "SELECT count(*) FROM outbox WHERE sent_at IS NULL";
    eventually("both are sent", || async { (stack.count(unsent).await == 0).then_some(()) }).await;
    worker.drain().await;

    // The older one is larger than any queue takes.
    stack
        .execute(&format!(
            "UPDATE outbox SET sent_at = NULL, held_until = 0;
             UPDATE outbox SET message = json_object('content', printf('%.*c', 11000000, 'x'))
              WHERE task_id = '{refused}'"
        ))
        .await;
    let worker = stack.worker().await;
    eventually("the one behind it is sent", || async {
        let open = format!("{unsent} AND task_id = '{behind}'");
        (stack.count(&open).await == 0).then_some(())
    })
    .await;
    assert_eq!(stack.count(unsent).await, 1, "the refused one stays");
    worker.drain().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn g6_a_broken_queue_pauses_and_answers_wait_in_the_outbox() {
    let name = "g6_a_broken_queue_pauses_and_answers_wait_in_the_outbox";
    let emulator = match Emulator::start().await {
        Ok(emulator) => emulator,
        Err(reason) => return skip(name, "the Pub/Sub emulator", &reason),
    };
    let mut link = Link::to(emulator.host.parse().unwrap()).await;
    let stack = Stack::simulated()
        .await
        .with("PUBSUB_PROJECT_ID", "g6-queue")
        .with("PUBSUB_TIMEOUT_SECONDS", "2")
        .with("RETRY_MAX_ATTEMPTS", "1")
        .with("PUBSUB_EMULATOR_HOST", &link.addr.to_string());
    let worker = stack.worker().await;
    // A publisher that the cut does not touch.
    let elsewhere = Stack::offline()
        .await
        .with("PUBSUB_PROJECT_ID", "g6-queue")
        .with("PUBSUB_EMULATOR_HOST", &emulator.host);
    let publisher = queue::open_publisher(&elsewhere.config()).await.unwrap();
    let publish = async |task: TaskId| {
        let message = request(task, "Design the event bus", json!({})).to_string();
        publisher.publish("architect_in", message.into(), Vec::new()).await.unwrap();
    };

    // In its call when the queue goes.
    stack.sim().script(json!([{"delay_ms": 1000}])).unwrap();
    let working = TaskId::random();
    let mut answers = queue::watch_answers(&elsewhere.config(), working).await.unwrap();
    publish(working).await;
    eventually("it is in its call", || async { (stack.sim().meter().calls() == 1).then_some(()) }).await;
    link.cut().await;
    stack.until(working, RunStatus::Done).await;
    assert_eq!(stack.count("SELECT count(*) FROM outbox WHERE sent_at IS NULL").await, 1, "it waits");
    eventually("not ready", || async { (!readiness(&worker, "queue").await.0).then_some(()) }).await;
    shows(&worker, "atlas_work_blocked{reason=\"queue\"} 1").await;
    let waiting = TaskId::random();
    publish(waiting).await;
    // What is in the store needs no queue: a dead worker's run is taken up and done meanwhile.
    let abandoned = TaskId::random();
    stack.claimed(abandoned, Duration::ZERO).await;
    stack.until(abandoned, RunStatus::Done).await;

    link.mend().await;
    stack.until(waiting, RunStatus::Done).await;
    stack.db.clock().advance(Duration::from_mins(10));
    eventually("every answer is sent", || async {
        (stack.count("SELECT count(*) FROM outbox WHERE sent_at IS NULL").await == 0).then_some(())
    })
    .await;
    let answer = bounded("the answer that waited", async {
        loop {
            let answer = answers.next().await.unwrap();
            if answer.msg_type != AnswerType::Progress {
                return answer;
            }
        }
    })
    .await;
    assert_eq!(answer.msg_type, AnswerType::Spec);
    eventually("ready again", || async { readiness(&worker, "queue").await.1.then_some(()) }).await;
    shows(&worker, "atlas_work_blocked{reason=\"queue\"} 0").await;
    worker.drain().await;
    let books = stack.reconciled().await;
    assert_eq!(stack.sim().meter().calls(), 3, "nothing was paid twice");
    assert_eq!(books.ledger, books.billed);
}

/// The dead-letter queue is checked after the request queue, on one line of the answer.
#[tokio::test]
async fn g6_no_healthy_queue_hides_a_broken_one_from_readiness() {
    const LOOKS: u32 = 100;
    let stack = Stack::offline().await;
    let worker = stack.worker().await;
    eventually("ready", || async { readiness(&worker, "queue").await.0.then_some(()) }).await;

    for broken in ["architect_in-atlas", "architect_dlq-atlas"] {
        stack
            .execute(&format!(
                "CREATE TABLE IF NOT EXISTS lost AS SELECT * FROM queue_subscriptions WHERE false;
                 INSERT INTO lost SELECT * FROM queue_subscriptions WHERE name = '{broken}';
                 DELETE FROM queue_subscriptions WHERE name = '{broken}';"
            ))
            .await;
        let in_a_row = AtomicU32::new(0);
        eventually(&format!("{broken} keeps it red over several probes"), || async {
            if readiness(&worker, "queue").await == (false, false) {
                in_a_row.fetch_add(1, Ordering::Relaxed);
            } else {
                in_a_row.store(0, Ordering::Relaxed);
            }
            (in_a_row.load(Ordering::Relaxed) == LOOKS).then_some(())
        })
        .await;
        stack.execute("INSERT INTO queue_subscriptions SELECT * FROM lost; DELETE FROM lost;").await;
        eventually("ready again", || async { readiness(&worker, "queue").await.0.then_some(()) }).await;
    }
    worker.drain().await;
}
