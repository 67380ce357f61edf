//! Outbox, dead letters, pause and resume, what operators see.

use std::time::Duration;

use atlas_shared::{
    TaskId, Tokens,
    ledger::{NewLimit, ReserveOutcome},
    message::AnswerType,
};
use atlas_worker::store::{Claim, DeadLetter, FleetChange, OUTBOX_HOLD, RunStatus};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use uuid::Uuid;

use crate::harness::{AMPLE, Harness, LEASE, answer, ask, assert_fenced, done, request, stale_copy};

crate::contract! {
    an_unsent_answer_is_lent_to_one_sweeper_at_a_time,
    sixteen_sweepers_never_send_the_same_row,
    a_sent_answer_stays_sent,
    a_paused_fleet_stores_requests_and_starts_none,
    what_is_not_named_stays_as_it_is,
    a_limit_that_is_reset_is_the_configured_one_again,
    a_dead_letter_is_recorded_once,
    a_dead_letter_fails_the_run_that_will_never_finish,
    a_dead_letter_leaves_a_finished_run_alone,
    a_dead_letter_without_announcement_still_gives_a_result,
    the_fleets_state_counts_what_there_is,
    the_store_is_ready,
}

fn letter(task: Option<TaskId>) -> DeadLetter {
    DeadLetter {
        id: Uuid::new_v4(),
        source: "architect_in-atlas".to_owned(),
        reason: "not_json".to_owned(),
        detail: "The message is not JSON.".to_owned(),
        raw_base64: BASE64_STANDARD.encode([0, 159, 146, 150, 255]),
        attributes: vec![("key".to_owned(), "value".to_owned())],
        task_id: task,
        fails_run: false,
        announce: Vec::new(),
    }
}

async fn finish_some(h: &Harness, count: usize) -> Vec<Uuid> {
    let mut ids = Vec::new();
    for _ in 0..count {
        let run = h.claim_new().await;
        let task = run.lease.task_id;
        ids.push(h.store.finish_run(run.lease, &done(task)).await.unwrap().outbox.id);
    }
    ids
}

async fn an_unsent_answer_is_lent_to_one_sweeper_at_a_time(h: Harness) {
    let ids = finish_some(&h, 3).await;
    // Their writers are about to send them.
    assert!(h.store.outbox_take(10, LEASE).await.unwrap().is_empty());
    h.advance(OUTBOX_HOLD).await;
    let take = async |limit| -> Vec<Uuid> {
        h.store.outbox_take(limit, LEASE).await.unwrap().into_iter().map(|row| row.id).collect()
    };
    assert_eq!(take(2).await, ids[..2]);
    assert_eq!(take(10).await, ids[2..]);
    assert!(take(10).await.is_empty());
    h.store.outbox_mark_sent(&ids[..1]).await.unwrap();
    h.advance(LEASE).await;
    assert_eq!(take(10).await, ids[1..]);
}

async fn sixteen_sweepers_never_send_the_same_row(h: Harness) {
    let mut ids = finish_some(&h, 40).await;
    h.advance(OUTBOX_HOLD).await;
    let sweepers = (0..16).map(|_| {
        let store = h.store.clone();
        tokio::spawn(async move {
            let mut got = Vec::new();
            loop {
                let rows = store.outbox_take(3, LEASE).await.unwrap();
                if rows.is_empty() {
                    return got;
                }
                let mut batch: Vec<Uuid> = rows.into_iter().map(|row| row.id).collect();
                batch.reverse();
                store.outbox_mark_sent(&batch).await.unwrap();
                got.extend(batch);
            }
        })
    });
    let mut sent = Vec::new();
    for sweeper in sweepers.collect::<Vec<_>>() {
        sent.extend(sweeper.await.unwrap());
    }
    sent.sort_unstable();
    ids.sort_unstable();
    assert_eq!(sent, ids);
}

async fn a_sent_answer_stays_sent(h: Harness) {
    let ids = finish_some(&h, 2).await;
    for _ in 0..2 {
        h.store.outbox_mark_sent(&ids).await.unwrap();
    }
    h.store.outbox_mark_sent(&[]).await.unwrap();
    h.store.outbox_mark_sent(&[Uuid::new_v4()]).await.unwrap();
    h.advance(LEASE * 10).await;
    assert!(h.store.outbox_take(10, LEASE).await.unwrap().is_empty());
    assert_eq!(h.store.fleet_state(AMPLE).await.unwrap().outbox_unsent, 0);
}

async fn a_paused_fleet_stores_requests_and_starts_none(h: Harness) {
    let pause = |paused| FleetChange { paused: Some(paused), ..FleetChange::default() };
    let at_work = h.claim_new().await;
    assert!(h.store.change_fleet(&pause(true), AMPLE).await.unwrap().paused);

    let task = TaskId::random();
    assert!(matches!(h.store.claim_run(&request(task)).await.unwrap(), Claim::Held));
    assert_eq!(h.run(task).await.run.status, RunStatus::Queued);
    assert!(h.due(10).await.is_empty());
    // What runs may go on and finish.
    h.reserve(&ask(&at_work.lease, 10)).await;
    let busy = at_work.lease.task_id;
    h.store.finish_run(at_work.lease, &done(busy)).await.unwrap();

    assert!(!h.store.change_fleet(&pause(false), AMPLE).await.unwrap().paused);
    let [run] = h.due(10).await.try_into().unwrap();
    assert_eq!((run.lease.task_id, run.lease.attempt), (task, 1));
}

async fn what_is_not_named_stays_as_it_is(h: Harness) {
    let all = FleetChange {
        daily_limit: Some(NewLimit::Tokens(Tokens(5))),
        run_limit: Some(NewLimit::Tokens(Tokens(4))),
        paused: Some(true),
        flush_cache: true,
        tenant_limit: None,
    };
    let first = h.store.change_fleet(&all, AMPLE).await.unwrap();
    assert_eq!((first.budget.limit, first.run_limit, first.paused), (Tokens(5), Tokens(4), true));
    let second = h.store.change_fleet(&FleetChange::default(), AMPLE).await.unwrap();
    assert_eq!(second, first);
    let flush = FleetChange { flush_cache: true, ..FleetChange::default() };
    let third = h.store.change_fleet(&flush, AMPLE).await.unwrap();
    assert_eq!(third.cache_generation, first.cache_generation + 1);
    assert_eq!(h.store.fleet_state(AMPLE).await.unwrap(), third);
}

async fn a_limit_that_is_reset_is_the_configured_one_again(h: Harness) {
    let limits = async |change: FleetChange| {
        let state = h.store.change_fleet(&change, AMPLE).await.unwrap();
        assert_eq!(h.store.fleet_state(AMPLE).await.unwrap(), state);
        (state.budget.limit, state.run_limit)
    };
    let none = FleetChange::default();
    let set = FleetChange {
        daily_limit: Some(NewLimit::Tokens(Tokens(5))),
        run_limit: Some(NewLimit::Tokens(Tokens(4))),
        ..none.clone()
    };
    assert_eq!(limits(set.clone()).await, (Tokens(5), Tokens(4)));
    let daily = FleetChange { daily_limit: Some(NewLimit::Default), ..none.clone() };
    assert_eq!(limits(daily.clone()).await, (AMPLE.daily, Tokens(4)));
    assert_eq!(limits(daily.clone()).await, (AMPLE.daily, Tokens(4)), "a second time");
    assert_eq!(
        limits(FleetChange { run_limit: Some(NewLimit::Default), ..none.clone() }).await,
        (AMPLE.daily, AMPLE.run)
    );

    // What is granted goes by it: nothing under a limit of 5, 100 under the configured one.
    limits(set).await;
    let run = h.claim_new().await;
    let wanted = ask(&run.lease, 100);
    assert!(matches!(h.store.reserve(&wanted).await.unwrap(), ReserveOutcome::Denied(_)));
    limits(FleetChange { run_limit: Some(NewLimit::Default), ..daily }).await;
    h.reserve(&wanted).await;
}

async fn a_dead_letter_is_recorded_once(h: Harness) {
    let task = TaskId::random();
    let wrong = answer(task, AnswerType::Error, "not JSON");
    let letter =
        DeadLetter { announce: vec![("architect_out".to_owned(), wrong.clone())], ..letter(Some(task)) };
    assert!(h.store.record_dead_letter(&letter).await.unwrap());
    assert!(!h.store.record_dead_letter(&letter).await.unwrap());

    let [row] = h.store.outbox_take(10, LEASE).await.unwrap().try_into().unwrap();
    assert_eq!(row.message, serde_json::to_value(&wrong).unwrap());
    assert_eq!((row.topic.as_str(), row.attributes), ("architect_out", wrong.attributes()));
    assert_eq!(h.store.fleet_state(AMPLE).await.unwrap().dead_letters, 1);
    // It never was a run: a corrected message with the same task is served.
    assert_eq!(h.results_of(task).await, (0, 0));
    h.claim(task).await;
}

async fn a_dead_letter_fails_the_run_that_will_never_finish(h: Harness) {
    let run = h.claim_new().await;
    let task = run.lease.task_id;
    let open = h.reserve(&ask(&run.lease, 60)).await;
    let failed = answer(task, AnswerType::Error, "gave up");
    let escalated = answer(task, AnswerType::Control, "escalate");
    let letter = DeadLetter {
        reason: "max_delivery_attempts".to_owned(),
        fails_run: true,
        announce: vec![("architect_out".to_owned(), escalated), ("architect_out".to_owned(), failed.clone())],
        ..letter(Some(task))
    };
    assert!(h.store.record_dead_letter(&letter).await.unwrap());

    let stored = h.run(task).await;
    assert_eq!(stored.run.status, RunStatus::Failed);
    assert_eq!(stored.run.error_code.as_deref(), Some("max_delivery_attempts"));
    assert_eq!(stored.answer, Some(serde_json::to_value(&failed).unwrap()));
    assert_eq!(h.results_of(task).await, (1, 1));
    assert_eq!(h.entry(open.id).await.state, "assumed");
    assert_eq!(h.store.outbox_take(10, LEASE).await.unwrap().len(), 2);
    // Whoever still works on it is fenced off.
    assert_fenced(h.store.finish_run(stale_copy(&run.lease), &done(task)).await, 1);
    assert_eq!(h.results_of(task).await, (1, 1));
    h.assert_books_agree().await;
}

async fn a_dead_letter_leaves_a_finished_run_alone(h: Harness) {
    let run = h.claim_new().await;
    let task = run.lease.task_id;
    h.store.finish_run(run.lease, &done(task)).await.unwrap();
    let before = h.run(task).await;
    let letter = DeadLetter {
        fails_run: true,
        announce: vec![("architect_out".to_owned(), answer(task, AnswerType::Error, "gave up"))],
        ..letter(Some(task))
    };
    assert!(h.store.record_dead_letter(&letter).await.unwrap());
    assert_eq!(h.run(task).await, before);
    assert_eq!(h.results_of(task).await, (1, 1));
}

async fn a_dead_letter_without_announcement_still_gives_a_result(h: Harness) {
    let run = h.claim_new().await;
    let task = run.lease.task_id;
    let letter = DeadLetter { fails_run: true, ..letter(Some(task)) };
    assert!(h.store.record_dead_letter(&letter).await.unwrap());
    let stored = h.run(task).await;
    assert_eq!(stored.run.status, RunStatus::Failed);
    assert_eq!(stored.answer.unwrap()["content"], "The message is not JSON.");
}

async fn the_fleets_state_counts_what_there_is(h: Harness) {
    finish_some(&h, 2).await;
    let running = h.claim_new().await;
    h.reserve(&ask(&running.lease, 70)).await;
    let queued = h.claim_new().await;
    h.store.release_run(queued.lease, Duration::ZERO).await.unwrap();
    let deferred = h.claim_new().await;
    let waiting = answer(deferred.lease.task_id, AnswerType::Progress, "waiting");
    h.store.defer_run(deferred.lease, Tokens(9), "architect_out", &waiting, &[]).await.unwrap();
    h.store.record_dead_letter(&letter(None)).await.unwrap();
    h.advance(Duration::from_secs(90)).await;

    let state = h.store.fleet_state(AMPLE).await.unwrap();
    assert_eq!((state.running_runs, state.queued_runs, state.deferred_runs), (1, 1, 1));
    assert_eq!((state.outbox_unsent, state.outbox_oldest_seconds), (3, 90));
    assert_eq!((state.dead_letters, state.paused), (1, false));
    assert_eq!(
        (state.budget.limit, state.budget.reserved, state.run_limit),
        (AMPLE.daily, Tokens(70), AMPLE.run)
    );
    assert_eq!(state.budget, h.store.budget(AMPLE).await.unwrap());
}

async fn the_store_is_ready(h: Harness) {
    h.store.check().await.unwrap();
}
