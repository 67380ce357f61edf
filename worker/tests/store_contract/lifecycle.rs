//! Claim, lease, fence, checkpoint, finish.

use std::time::Duration;

use atlas_shared::{
    TaskId, Tokens, WorkerId,
    ledger::Closing,
    message::{AnswerType, Task},
};
use atlas_worker::store::{
    self, Cancelled, CancelledRun, Claim, ClaimRequest, FinalStatus, FleetChange, OUTBOX_HOLD, RunStatus,
};
use serde_json::json;
use uuid::Uuid;

use crate::harness::{
    AMPLE, Harness, LEASE, answer, ask, assert_fenced, billed, checkpoint, done, message, request, result,
    settlement, stale_copy,
};

crate::contract! {
    a_new_request_is_stored_and_claimed,
    a_run_with_one_model_call_takes_three_calls,
    a_claim_that_is_retried_gets_the_same_attempt,
    a_live_lease_holds_others_off,
    sixteen_workers_claim_a_task_and_one_gets_it,
    sixteen_sweepers_never_get_the_same_run,
    an_expired_lease_is_taken_over_with_a_higher_attempt,
    an_expired_lease_that_nobody_took_is_renewed,
    a_dead_workers_reservation_is_booked_as_spent,
    a_stale_worker_is_fenced_off_and_changes_nothing,
    a_stale_finish_books_what_was_billed_and_nothing_else,
    a_finished_step_survives_its_worker,
    a_step_is_stored_once,
    a_finished_run_is_never_claimed_again,
    a_finished_run_never_changes,
    a_finish_that_is_retried_gives_the_same_outbox_row,
    finishing_books_what_was_left_open_as_spent,
    a_released_run_waits_for_sweeps_but_not_for_its_message,
    a_run_given_back_twice_is_given_back_once,
    due_runs_come_oldest_first,
    a_refinement_gets_its_parents_spec,
    a_refinement_never_gets_another_tenants_spec,
    an_idle_run_is_cancelled_at_once,
    a_cancelled_worker_is_told_at_its_next_renewal,
    a_worker_is_told_of_its_own_cancelled_runs,
    a_cancel_that_comes_before_its_request_waits_for_it,
    a_cancel_and_a_claim_of_one_moment_never_miss_each_other,
    a_cancel_of_a_task_that_never_comes_is_forgotten_in_time,
    a_cancel_is_answered_like_any_other_end_of_the_run,
    any_text_is_stored,
    runs_are_listed_newest_first,
}

async fn a_new_request_is_stored_and_claimed(h: Harness) {
    let task = TaskId::random();
    let wanted = ClaimRequest {
        tenant: Some("acme".to_owned()),
        message: message(task, &json!({"tenant": "acme", "x-unknown": [1, 2.5, null]})),
        ..request(task)
    };
    let Claim::Claimed(run) = h.store.claim_run(&wanted).await.unwrap() else { panic!("not claimed") };

    assert_eq!(run.lease.task_id, task);
    assert_eq!(run.lease.attempt, 1);
    assert_eq!(
        run.lease.lease_until,
        h.now().checked_add(jiff::SignedDuration::try_from(LEASE).unwrap()).unwrap()
    );
    assert_eq!(run.message, wanted.message);
    assert!(run.steps.is_empty() && run.parent.is_none() && !run.taken_over && !run.cancel_requested);
    assert_eq!((run.spent, run.deferrals), (Tokens(0), 0));
    assert!(Task::from_stored(run.message).is_ok());

    let stored = h.run(task).await;
    assert_eq!(stored.request, wanted.message);
    assert_eq!(stored.run.status, RunStatus::Running);
    assert_eq!(stored.run.tenant.as_deref(), Some("acme"));
    assert_eq!(stored.run.lease_owner.as_deref(), Some("worker-1"));
    assert_eq!(stored.run.started_at, Some(h.now()));
    assert_eq!(stored.answer, None);
}

async fn a_run_with_one_model_call_takes_three_calls(h: Harness) {
    let run = h.claim_new().await;
    let task = run.lease.task_id;
    let reservation = h.reserve(&ask(&run.lease, 500)).await;
    let mut finish = done(task);
    finish.settlement = Some(settlement(&reservation, billed(300, 100)));
    finish.checkpoint = Some(checkpoint("draft.0", "the spec"));
    let published = h.store.finish_run(run.lease, &finish).await.unwrap();

    assert_eq!(published.outbox.message, serde_json::to_value(&finish.answer).unwrap());
    assert_eq!(published.outbox.topic, "architect_out");
    assert_eq!(published.outbox.attributes, finish.attributes);
    let stored = h.run(task).await;
    assert_eq!(stored.run.status, RunStatus::Done);
    assert_eq!((stored.run.tokens_prompt, stored.run.tokens_completion), (Tokens(300), Tokens(100)));
    assert_eq!(stored.run.model.as_deref(), Some("gpt-4.1"));
    assert_eq!((stored.run.lease_owner, stored.run.lease_until), (None, None));
    assert_eq!(stored.run.ended_at, Some(h.now()));
    assert_eq!(stored.answer, Some(published.outbox.message.value()));
    assert_eq!(stored.steps, vec![checkpoint("draft.0", "the spec")]);
    assert_eq!(h.results_of(task).await, (1, 1));
    let global = h.global().await;
    assert_eq!((global.reserved, global.used), (0, 400));
    h.assert_books_agree().await;
    // Should its writer die now, a sweeper sends the very same.
    h.advance(OUTBOX_HOLD).await;
    assert_eq!(h.store.outbox_take(10, LEASE).await.unwrap(), [published.outbox]);
}

async fn a_claim_that_is_retried_gets_the_same_attempt(h: Harness) {
    let wanted = request(TaskId::random());
    let Claim::Claimed(first) = h.store.claim_run(&wanted).await.unwrap() else { panic!("not claimed") };
    let Claim::Claimed(again) = h.store.claim_run(&wanted).await.unwrap() else { panic!("not claimed") };
    assert_eq!((first.lease.attempt, again.lease.attempt), (1, 1));

    // Another delivery of the same message is another claim.
    let other = ClaimRequest { claim_id: Uuid::new_v4(), ..wanted };
    assert!(matches!(h.store.claim_run(&other).await.unwrap(), Claim::Held));
}

async fn a_live_lease_holds_others_off(h: Harness) {
    let run = h.claim_new().await;
    assert!(matches!(h.store.claim_run(&request(run.lease.task_id)).await.unwrap(), Claim::Held));
    assert!(h.due(10).await.is_empty());

    h.advance(LEASE.checked_sub(Duration::from_millis(1)).unwrap()).await;
    assert!(matches!(h.store.claim_run(&request(run.lease.task_id)).await.unwrap(), Claim::Held));
    assert!(h.due(10).await.is_empty());
}

async fn sixteen_workers_claim_a_task_and_one_gets_it(h: Harness) {
    for _ in 0..5 {
        let task = TaskId::random();
        let claims = (0..16).map(|_| {
            let store = h.store.clone();
            tokio::spawn(async move { store.claim_run(&request(task)).await.unwrap() })
        });
        let mut claimed = 0;
        for claim in claims.collect::<Vec<_>>() {
            match claim.await.unwrap() {
                Claim::Claimed(run) => {
                    assert_eq!(run.lease.attempt, 1);
                    claimed += 1;
                }
                Claim::Held => {}
                Claim::Finished { .. } => panic!("nobody finished it"),
            }
        }
        assert_eq!(claimed, 1);
    }
}

async fn sixteen_sweepers_never_get_the_same_run(h: Harness) {
    for _ in 0..60 {
        let run = h.claim_new().await;
        h.reserve(&ask(&run.lease, 10)).await;
    }
    h.advance(LEASE).await;
    let sweepers = (0..16).map(|nr| {
        let store = h.store.clone();
        tokio::spawn(async move {
            let mut got = Vec::new();
            loop {
                let worker = WorkerId(format!("sweeper-{nr}"));
                let runs = store.claim_due(&worker, 3, LEASE, AMPLE).await.unwrap();
                if runs.is_empty() {
                    return got;
                }
                got.extend(runs.into_iter().map(|run| (run.lease.task_id, run.lease.attempt)));
            }
        })
    });
    let mut all = Vec::new();
    for sweeper in sweepers.collect::<Vec<_>>() {
        all.extend(sweeper.await.unwrap());
    }
    assert!(all.iter().all(|(_, attempt)| *attempt == 2), "{all:?}");
    all.sort_unstable();
    all.dedup();
    // A sweeper that found only rows another one held at that moment may have left early, but every
    // run was taken by somebody.
    assert_eq!(all.len(), 60);
    let global = h.global().await;
    assert_eq!((global.reserved, global.used), (0, 600));
    h.assert_books_agree().await;
}

async fn an_expired_lease_is_taken_over_with_a_higher_attempt(h: Harness) {
    let dead = h.claim_new().await;
    h.advance(LEASE).await;
    let by_message = h.claim(dead.lease.task_id).await;
    assert_eq!(by_message.lease.attempt, 2);
    assert!(by_message.taken_over);

    h.advance(LEASE).await;
    let [by_sweep] = h.due(10).await.try_into().unwrap();
    assert_eq!(by_sweep.lease.task_id, dead.lease.task_id);
    assert_eq!(by_sweep.lease.attempt, 3);
    assert!(by_sweep.taken_over);
    assert_eq!(by_sweep.message, dead.message);
}

async fn an_expired_lease_that_nobody_took_is_renewed(h: Harness) {
    let run = h.claim_new().await;
    h.advance(LEASE * 2).await;
    let renewal = h.store.renew_lease(&run.lease, LEASE).await.unwrap();
    assert!(renewal.held && !renewal.cancel_requested);
    assert!(h.due(10).await.is_empty());
    h.store
        .finish_run(run.lease, &done(run.message["task_id"].as_str().unwrap().parse().unwrap()))
        .await
        .unwrap();
}

async fn a_dead_workers_reservation_is_booked_as_spent(h: Harness) {
    let dead = h.claim_new().await;
    let reservation = h.reserve(&ask(&dead.lease, 700)).await;
    h.advance(LEASE).await;
    let next = h.claim(dead.lease.task_id).await;

    assert_eq!(next.spent, Tokens(700));
    assert_eq!(h.entry(reservation.id).await.state, "assumed");
    let global = h.global().await;
    assert_eq!((global.reserved, global.used), (0, 700));

    // It was not dead, only slow: what it really paid corrects the books.
    h.store.close(reservation, billed(100, 50)).await.unwrap();
    let global = h.global().await;
    assert_eq!((global.reserved, global.used), (0, 150));
    h.assert_books_agree().await;
}

async fn a_stale_worker_is_fenced_off_and_changes_nothing(h: Harness) {
    let stale = h.claim_new().await.lease;
    let task = stale.task_id;
    h.advance(LEASE).await;
    let current = h.claim(task).await.lease;

    assert_fenced(h.store.reserve(&ask(&stale, 10)).await, 1);
    assert!(!h.store.renew_lease(&stale, LEASE).await.unwrap().held);
    assert_fenced(h.store.release_run(stale_copy(&stale), Duration::ZERO).await, 1);
    let progress = answer(task, AnswerType::Progress, "waiting");
    assert_fenced(h.store.defer_run(stale_copy(&stale), Tokens(1), "architect_out", &progress, &[]).await, 1);
    assert_fenced(h.store.finish_run(stale_copy(&stale), &done(task)).await, 1);

    let run = h.run(task).await;
    assert_eq!((run.run.status, run.run.attempt), (RunStatus::Running, 2));
    assert_eq!(h.results_of(task).await, (0, 0));
    assert!(h.store.outbox_take(10, LEASE).await.unwrap().is_empty());
    h.store.finish_run(current, &done(task)).await.unwrap();
    assert_eq!(h.results_of(task).await, (1, 1));
}

async fn a_stale_finish_books_what_was_billed_and_nothing_else(h: Harness) {
    let stale = h.claim_new().await.lease;
    let task = stale.task_id;
    let step = h.reserve(&ask(&stale, 300)).await;
    let last = h.reserve(&ask(&stale, 500)).await;
    h.advance(LEASE).await;
    let current = h.claim(task).await.lease;

    assert_fenced(
        h.store
            .settle_step(&stale, &settlement(&step, billed(200, 20)), &checkpoint("draft.0", "stale"))
            .await,
        1,
    );
    let mut finish = done(task);
    finish.settlement = Some(settlement(&last, billed(400, 40)));
    finish.checkpoint = Some(checkpoint("repair.0", "stale"));
    assert_fenced(h.store.finish_run(stale, &finish).await, 1);

    assert_eq!(h.entry(step.id).await.actual, 220);
    assert_eq!(h.entry(last.id).await.actual, 440);
    let run = h.run(task).await;
    assert!(run.steps.is_empty());
    assert_eq!(run.answer, None);
    assert_eq!(run.run.attempt, current.attempt);
    assert_eq!((run.run.tokens_prompt, run.run.tokens_completion), (Tokens(600), Tokens(60)));
    h.assert_books_agree().await;
}

async fn a_finished_step_survives_its_worker(h: Harness) {
    let dead = h.claim_new().await;
    for (nr, step) in ["search.0", "draft.0", "repair.0"].into_iter().enumerate() {
        let reservation = h.reserve(&ask(&dead.lease, 100)).await;
        let paid = settlement(&reservation, billed(10, nr as u64));
        h.store.settle_step(&dead.lease, &paid, &checkpoint(step, step)).await.unwrap();
    }
    h.advance(LEASE).await;
    let next = h.claim(dead.lease.task_id).await;
    let steps: Vec<&str> = next.steps.iter().map(|step| step.step.as_str()).collect();
    assert_eq!(steps, ["search.0", "draft.0", "repair.0"]);
    assert_eq!(next.steps[1], checkpoint("draft.0", "draft.0"));
    assert_eq!(next.spent, Tokens(33));
    h.assert_books_agree().await;
}

async fn a_step_is_stored_once(h: Harness) {
    let run = h.claim_new().await;
    let reservation = h.reserve(&ask(&run.lease, 100)).await;
    let paid = settlement(&reservation, billed(10, 1));
    for text in ["first", "a retry of the same call"] {
        h.store.settle_step(&run.lease, &paid, &checkpoint("draft.0", text)).await.unwrap();
    }
    assert_eq!(h.run(run.lease.task_id).await.steps, vec![checkpoint("draft.0", "first")]);
    assert_eq!(h.global().await.used, 11);
}

async fn a_finished_run_is_never_claimed_again(h: Harness) {
    let run = h.claim_new().await;
    let task = run.lease.task_id;
    let published = h.store.finish_run(run.lease, &done(task)).await.unwrap();
    h.advance(LEASE * 3).await;

    assert!(matches!(h.store.claim_run(&request(task)).await.unwrap(), Claim::Finished { unsent: true }));
    h.store.outbox_mark_sent(&[published.outbox.id]).await.unwrap();
    assert!(matches!(h.store.claim_run(&request(task)).await.unwrap(), Claim::Finished { unsent: false }));
    assert!(h.due(10).await.is_empty());
}

async fn a_finished_run_never_changes(h: Harness) {
    let run = h.claim_new().await;
    let task = run.lease.task_id;
    let (late, later) = (h.reserve(&ask(&run.lease, 100)).await, h.reserve(&ask(&run.lease, 100)).await);
    let lease = stale_copy(&run.lease);
    h.store.finish_run(run.lease, &done(task)).await.unwrap();
    let (before, unchanged) = (h.run(task).await, h.without_ledger(task).await);

    h.advance(LEASE * 3).await;
    h.store.close(late, billed(5, 5)).await.unwrap();
    let paid = settlement(&later, billed(6, 6));
    assert_fenced(h.store.settle_step(&lease, &paid, &checkpoint("draft.1", "late")).await, 1);
    assert_fenced(h.store.reserve(&ask(&lease, 10)).await, 1);
    assert!(!h.store.renew_lease(&lease, LEASE).await.unwrap().held);
    assert_fenced(h.store.release_run(stale_copy(&lease), Duration::ZERO).await, 1);
    let cancelled = answer(task, AnswerType::Error, "cancelled");
    assert!(!h.store.cancel_run(task, "architect_out", &cancelled).await.unwrap());
    let mut other = done(task);
    other.answer = result(task, AnswerType::Spec, "# Something else");
    h.store.finish_run(lease, &other).await.unwrap();

    let after = h.run(task).await;
    // The books know of the late bills all the same, and nothing else does.
    assert_ne!(after.ledger, before.ledger);
    assert_eq!((before.run.tokens_booked, after.run.tokens_booked), (Tokens(200), Tokens(22)));
    assert_eq!(h.without_ledger(task).await, unchanged);
    assert_eq!(h.results_of(task).await, (1, 1));
    assert_eq!(h.account("2026-03-01", "global").await.used, 22);
    h.assert_books_agree().await;
}

async fn a_finish_that_is_retried_gives_the_same_outbox_row(h: Harness) {
    let run = h.claim_new().await;
    let task = run.lease.task_id;
    let reservation = h.reserve(&ask(&run.lease, 100)).await;
    let mut finish = done(task);
    finish.settlement = Some(settlement(&reservation, billed(10, 10)));
    let retry = stale_copy(&run.lease);
    let first = h.store.finish_run(run.lease, &finish).await.unwrap();
    let second = h.store.finish_run(retry, &finish).await.unwrap();
    assert_eq!(first, second);
    assert_eq!(h.results_of(task).await, (1, 1));
    assert_eq!(h.global().await.used, 20);
}

async fn finishing_books_what_was_left_open_as_spent(h: Harness) {
    let run = h.claim_new().await;
    let forgotten = h.reserve(&ask(&run.lease, 30)).await;
    let settled = h.reserve(&ask(&run.lease, 50)).await;
    let mut finish = done(run.lease.task_id);
    finish.settlement = Some(settlement(&settled, billed(1, 1)));
    h.store.finish_run(run.lease, &finish).await.unwrap();
    assert_eq!(h.entry(forgotten.id).await.state, "assumed");
    let global = h.global().await;
    assert_eq!((global.reserved, global.used), (0, 32));
    h.assert_books_agree().await;
}

async fn a_released_run_waits_for_sweeps_but_not_for_its_message(h: Harness) {
    let run = h.claim_new().await;
    let task = run.lease.task_id;
    let cut = h.reserve(&ask(&run.lease, 40)).await;
    h.store.release_run(run.lease, Duration::from_secs(20)).await.unwrap();
    assert_eq!(h.run(task).await.run.status, RunStatus::Queued);
    assert_eq!(h.entry(cut.id).await.state, "assumed");
    assert!(h.due(10).await.is_empty());

    let again = h.claim(task).await;
    assert_eq!(again.lease.attempt, 2);
    assert!(!again.taken_over);
    h.store.release_run(again.lease, Duration::from_secs(20)).await.unwrap();
    h.advance(Duration::from_secs(20)).await;
    let [swept] = h.due(10).await.try_into().unwrap();
    assert_eq!(swept.lease.attempt, 3);
}

async fn a_run_given_back_twice_is_given_back_once(h: Harness) {
    let run = h.claim_new().await;
    let retry = stale_copy(&run.lease);
    h.store.release_run(run.lease, Duration::ZERO).await.unwrap();
    h.store.release_run(stale_copy(&retry), Duration::ZERO).await.unwrap();
    let next = h.claim(retry.task_id).await;
    assert_fenced(h.store.release_run(retry, Duration::ZERO).await, 1);
    assert!(h.store.renew_lease(&next.lease, LEASE).await.unwrap().held);
}

async fn due_runs_come_oldest_first(h: Harness) {
    let mut tasks = Vec::new();
    for _ in 0..5 {
        tasks.push(h.claim_new().await.lease.task_id);
        h.advance(Duration::from_secs(1)).await;
    }
    h.advance(LEASE).await;
    let first: Vec<_> = h.due(3).await.into_iter().map(|run| run.lease.task_id).collect();
    assert_eq!(first, tasks[..3]);
    let rest: Vec<_> = h.due(10).await.into_iter().map(|run| run.lease.task_id).collect();
    assert_eq!(rest, tasks[3..]);
}

async fn a_refinement_gets_its_parents_spec(h: Harness) {
    let parent = h.claim_new().await;
    let parent_id = parent.lease.task_id;
    let refine = async |parent_id: &str| {
        let task = TaskId::random();
        let wanted =
            ClaimRequest { message: message(task, &json!({"parent_id": parent_id})), ..request(task) };
        let Claim::Claimed(run) = h.store.claim_run(&wanted).await.unwrap() else { panic!("not claimed") };
        run.parent
    };
    assert_eq!(refine(&parent_id.to_string()).await, None, "not finished yet");
    h.store.finish_run(parent.lease, &done(parent_id)).await.unwrap();
    let spec = refine(&parent_id.to_string().to_uppercase()).await.expect("the finished spec");
    assert_eq!(spec["content"], "# A queue");
    assert_eq!(refine("not-a-uuid").await, None);
}

async fn a_refinement_never_gets_another_tenants_spec(h: Harness) {
    let parent = TaskId::random();
    let of_acme = ClaimRequest { tenant: Some("acme".to_owned()), ..request(parent) };
    let Claim::Claimed(run) = h.store.claim_run(&of_acme).await.unwrap() else { panic!("not claimed") };
    h.store.finish_run(run.lease, &done(parent)).await.unwrap();
    for (tenant, sees) in [(Some("acme"), true), (Some("rival"), false), (None, false)] {
        let task = TaskId::random();
        let wanted = ClaimRequest {
            tenant: tenant.map(str::to_owned),
            message: message(task, &json!({"parent_id": parent})),
            ..request(task)
        };
        let Claim::Claimed(run) = h.store.claim_run(&wanted).await.unwrap() else { panic!("not claimed") };
        assert_eq!(run.parent.is_some(), sees, "{tenant:?}");
    }
}

async fn an_idle_run_is_cancelled_at_once(h: Harness) {
    let run = h.claim_new().await;
    let task = run.lease.task_id;
    h.store.release_run(run.lease, Duration::ZERO).await.unwrap();
    let cancelled = answer(task, AnswerType::Error, "cancelled by an operator");
    assert!(h.store.cancel_run(task, "architect_out", &cancelled).await.unwrap());

    let stored = h.run(task).await;
    assert_eq!(stored.run.status, RunStatus::Failed);
    assert_eq!(stored.run.error_code.as_deref(), Some("cancelled"));
    assert_eq!(stored.run.error_message.as_deref(), Some("cancelled by an operator"));
    assert_eq!(stored.answer, Some(serde_json::to_value(&cancelled).unwrap()));
    let [row] = h.store.outbox_take(10, LEASE).await.unwrap().try_into().unwrap();
    assert_eq!((row.task_id, row.topic.as_str()), (task, "architect_out"));
    assert_eq!(row.attributes, cancelled.attributes());
    assert_eq!(h.results_of(task).await, (1, 1));
    assert!(!h.store.cancel_run(task, "architect_out", &cancelled).await.unwrap(), "it is final");
}

async fn a_cancelled_worker_is_told_at_its_next_renewal(h: Harness) {
    let run = h.claim_new().await;
    let task = run.lease.task_id;
    let cancelled = answer(task, AnswerType::Error, "cancelled");
    assert!(h.store.cancel_run(task, "architect_out", &cancelled).await.unwrap());
    assert_eq!(h.run(task).await.run.status, RunStatus::Running);
    let renewal = h.store.renew_lease(&run.lease, LEASE).await.unwrap();
    assert!(renewal.held && renewal.cancel_requested);

    // Its worker dies before it hears of it: the next one is told with the claim.
    h.advance(LEASE).await;
    let next = h.claim(task).await;
    assert!(next.cancel_requested);
}

async fn a_worker_is_told_of_its_own_cancelled_runs(h: Harness) {
    let (run, other) = (h.claim_new().await, h.claim_new().await);
    let worker = request(run.lease.task_id).worker;
    assert_eq!(h.store.cancelled_runs(&worker).await.unwrap(), []);

    let cancelled = answer(run.lease.task_id, AnswerType::Error, "cancelled");
    assert!(h.store.cancel_run(run.lease.task_id, "architect_out", &cancelled).await.unwrap());
    let told = CancelledRun { task_id: run.lease.task_id, attempt: run.lease.attempt };
    assert_eq!(h.store.cancelled_runs(&worker).await.unwrap(), [told]);
    assert_eq!(h.store.cancelled_runs(&WorkerId("another".to_owned())).await.unwrap(), []);

    // Whoever gave it up is not told of it any more, and another run was never meant.
    h.store.release_run(run.lease, Duration::ZERO).await.unwrap();
    assert_eq!(h.store.cancelled_runs(&worker).await.unwrap(), []);
    assert!(!h.store.renew_lease(&other.lease, LEASE).await.unwrap().cancel_requested);
}

async fn a_cancel_that_comes_before_its_request_waits_for_it(h: Harness) {
    let task = TaskId::random();
    let cancelled = answer(task, AnswerType::Error, "cancelled");
    for _ in 0..2 {
        assert!(h.store.cancel_run(task, "architect_out", &cancelled).await.unwrap());
    }
    assert!(h.store.get_run(task).await.unwrap().is_none(), "there is no run, and no answer, yet");
    assert!(h.store.outbox_take(10, LEASE).await.unwrap().is_empty());
    assert!(!h.claim_new().await.cancel_requested, "another task is not meant");

    // It is only to be answered: a pause does not hold it up.
    let pause = FleetChange { paused: Some(true), ..FleetChange::default() };
    h.store.change_fleet(&pause, AMPLE).await.unwrap();
    let wanted = request(task);
    let Claim::Claimed(run) = h.store.claim_run(&wanted).await.unwrap() else { panic!("not claimed") };
    assert!(run.cancel_requested);
    // A lost answer, and a dead worker, change nothing about it.
    let Claim::Claimed(again) = h.store.claim_run(&wanted).await.unwrap() else { panic!("not claimed") };
    assert!(again.cancel_requested);
    h.advance(LEASE).await;
    assert!(h.claim(task).await.cancel_requested);
}

async fn a_cancel_and_a_claim_of_one_moment_never_miss_each_other(h: Harness) {
    let tasks: Vec<TaskId> = (0..40).map(|_| TaskId::random()).collect();
    let mut racers = Vec::new();
    for task in &tasks {
        let (task, claimer, canceller) = (*task, h.store.clone(), h.store.clone());
        racers.push(tokio::spawn(async move {
            let cancelled = answer(task, AnswerType::Error, "cancelled");
            let wanted = request(task);
            let (claim, stopped) = tokio::join!(
                claimer.claim_run(&wanted),
                canceller.cancel_run(task, "architect_out", &cancelled)
            );
            assert!(stopped.unwrap());
            let Claim::Claimed(run) = claim.unwrap() else { panic!("not claimed") };
            run
        }));
    }
    for racer in racers {
        let run = racer.await.unwrap();
        let told =
            run.cancel_requested || h.store.renew_lease(&run.lease, LEASE).await.unwrap().cancel_requested;
        assert!(told, "the cancel was lost");
    }
    assert_eq!(h.early_cancels().await, 0, "what a run remembers is not kept twice");
}

async fn a_cancel_of_a_task_that_never_comes_is_forgotten_in_time(h: Harness) {
    let cancel = async |task| {
        let cancelled = answer(task, AnswerType::Error, "cancelled");
        h.store.cancel_run(task, "architect_out", &cancelled).await.unwrap()
    };
    let (old, young) = (TaskId::random(), TaskId::random());
    for task in [old, TaskId::random(), TaskId::random()] {
        assert!(cancel(task).await);
    }
    h.advance(Duration::from_hours(24 * 31)).await;
    assert!(cancel(young).await);
    assert_eq!(h.early_cancels().await, 4, "the queue may still have their messages");
    h.advance(Duration::from_hours(24 * 2)).await;
    assert!(cancel(TaskId::random()).await);
    assert_eq!(h.early_cancels().await, 2);
    assert!(h.claim(young).await.cancel_requested);
    assert!(!h.claim(old).await.cancel_requested);
}

async fn a_cancel_is_answered_like_any_other_end_of_the_run(h: Harness) {
    let (waiting, busy, unknown) = (TaskId::random(), TaskId::random(), TaskId::random());
    let metadata = json!({"ticket": 7, "reply_to": "architect_out-acme"});
    let wanted = ClaimRequest { message: message(waiting, &metadata), ..request(waiting) };
    let Claim::Claimed(run) = h.store.claim_run(&wanted).await.unwrap() else { panic!("not claimed") };
    h.store.release_run(run.lease, Duration::ZERO).await.unwrap();
    h.claim(busy).await;
    let done_before = h.claim_new().await;
    let final_one = done_before.lease.task_id;
    h.store.finish_run(done_before.lease, &done(final_one)).await.unwrap();
    h.store.outbox_mark_sent(&h.outbox_ids().await).await.unwrap();

    let store = h.store.as_ref();
    for _ in 0..2 {
        let outcomes = [
            (waiting, Cancelled::Ended),
            (busy, Cancelled::Stopping(Some("worker-1".to_owned()))),
            (unknown, Cancelled::Awaited),
            (final_one, Cancelled::Final(FinalStatus::Done)),
        ];
        for (task, expected) in outcomes {
            assert_eq!(store::cancel(store, task, "architect_out").await.unwrap(), expected);
        }
    }
    let [row] = h.store.outbox_take(10, LEASE).await.unwrap().try_into().unwrap();
    assert_eq!((row.task_id, row.topic.as_str()), (waiting, "architect_out-acme"));
    assert_eq!(row.message.value()["metadata"]["ticket"], 7);
    assert_eq!(row.message.value()["metadata"]["error_code"], "cancelled");
}

async fn any_text_is_stored(h: Harness) {
    let task = TaskId::random();
    let odd = "NUL \0, quote ' \" \\, emoji 🚀, RTL \u{202e}, \u{ffff}, $1, %s, {}";
    let mut body = message(task, &json!({"nested": {"deep": [[[[odd]]]]}}));
    body["content"] = json!(odd);
    let wanted = ClaimRequest { message: body, ..request(task) };
    let Claim::Claimed(run) = h.store.claim_run(&wanted).await.unwrap() else { panic!("not claimed") };
    let content = run.message["content"].as_str().unwrap();
    // Postgres's jsonb has no NUL: it comes back as the replacement character.
    assert!(content == odd || content == odd.replace('\0', "\u{fffd}"), "{content:?}");

    let mut finish = done(task);
    finish.answer = result(task, AnswerType::Spec, odd);
    let closing = Closing::Released;
    let reservation = h.reserve(&ask(&run.lease, 1)).await;
    finish.settlement = Some(settlement(&reservation, closing));
    h.store.finish_run(run.lease, &finish).await.unwrap();
    assert_eq!(h.results_of(task).await, (1, 1));
}

async fn runs_are_listed_newest_first(h: Harness) {
    let mut tasks = Vec::new();
    for _ in 0..3 {
        tasks.push(h.claim_new().await.lease);
        h.advance(Duration::from_secs(1)).await;
    }
    let finished = tasks.remove(1);
    let (oldest, newest) = (tasks[0].task_id, tasks[1].task_id);
    let middle = finished.task_id;
    h.store.finish_run(finished, &done(middle)).await.unwrap();

    let listed = async |status, limit| -> Vec<TaskId> {
        h.store.list_runs(status, limit).await.unwrap().into_iter().map(|run| run.task_id).collect()
    };
    assert_eq!(listed(None, 10).await, [newest, middle, oldest]);
    assert_eq!(listed(None, 1).await, [newest]);
    assert_eq!(listed(Some(RunStatus::Done), 10).await, [middle]);
    assert_eq!(listed(Some(RunStatus::Running), 10).await, [newest, oldest]);
    assert!(h.store.get_run(TaskId::random()).await.unwrap().is_none());
}
