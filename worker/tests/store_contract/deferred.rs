//! An exhausted budget loses nothing and burns nothing.

use std::time::Duration;

use atlas_shared::{
    TaskId, Tokens,
    ledger::{Limits, NewLimit, ReserveRequest},
    message::AnswerType,
};
use atlas_worker::store::{Claim, ClaimRequest, FleetChange, Lease, OUTBOX_HOLD, RunStatus, TenantLimit};

use crate::harness::{AMPLE, Harness, LEASE, answer, ask_for_index, billed, done, request, stale_copy};

crate::contract! {
    a_deferred_run_waits_for_midnight,
    a_deferred_run_goes_on_when_the_limit_is_raised,
    a_deferred_run_goes_on_when_reserved_tokens_come_free,
    a_deferred_run_is_not_claimed_by_its_message,
    a_deferral_that_is_retried_gives_the_same_outbox_row,
    a_run_that_fits_no_day_is_handed_out_at_midnight,
    no_more_deferred_runs_are_taken_than_fit_together,
    a_tenant_without_tokens_does_not_hold_the_others_up,
    deferred_runs_go_on_oldest_first,
}

const TIGHT: Limits = Limits { daily: Tokens(1000), run: Tokens(100_000) };

/// Uses the day's budget up to `left`.
async fn spend_all_but(h: &Harness, left: u64) {
    let wanted = ReserveRequest { limits: TIGHT, ..ask_for_index(TIGHT.daily.0 - left) };
    let reservation = h.reserve(&wanted).await;
    h.store.close(reservation, billed(TIGHT.daily.0 - left, 0)).await.unwrap();
}

async fn defer(h: &Harness, lease: Lease, needed: u64) -> TaskId {
    let task = lease.task_id;
    let waiting = answer(task, AnswerType::Progress, "the day's budget is gone");
    h.store.defer_run(lease, Tokens(needed), "architect_out", &waiting, &waiting.attributes()).await.unwrap();
    task
}

async fn due_tasks(h: &Harness, limit: usize) -> Vec<TaskId> {
    h.due_under(limit, TIGHT).await.into_iter().map(|run| run.lease.task_id).collect()
}

async fn a_deferred_run_waits_for_midnight(h: Harness) {
    spend_all_but(&h, 99).await;
    let task = defer(&h, h.claim_new().await.lease, 100).await;
    let run = h.run(task).await.run;
    assert_eq!(run.status, RunStatus::Deferred);
    assert_eq!(run.not_before, Some("2026-03-02T00:00:00Z".parse().unwrap()));
    assert_eq!((run.lease_owner, run.lease_until, run.ended_at), (None, None, None));

    assert!(due_tasks(&h, 10).await.is_empty());
    h.set_now("2026-03-01T23:59:59.999999Z".parse().unwrap()).await;
    assert!(due_tasks(&h, 10).await.is_empty());
    h.pass_midnight().await;
    let [run] = h.due_under(10, TIGHT).await.try_into().unwrap();
    assert_eq!((run.lease.task_id, run.lease.attempt, run.deferrals), (task, 2, 1));
    assert!(!run.taken_over);
    h.store.finish_run(run.lease, &done(task)).await.unwrap();
}

async fn a_deferred_run_goes_on_when_the_limit_is_raised(h: Harness) {
    spend_all_but(&h, 0).await;
    let task = defer(&h, h.claim_new().await.lease, 100).await;
    let raise = async |limit| {
        let change =
            FleetChange { daily_limit: Some(NewLimit::Tokens(Tokens(limit))), ..FleetChange::default() };
        h.store.change_fleet(&change, TIGHT).await.unwrap()
    };
    assert_eq!(raise(1099).await.deferred_runs, 1);
    assert!(due_tasks(&h, 10).await.is_empty());
    raise(1100).await;
    assert_eq!(due_tasks(&h, 10).await, [task]);
}

async fn a_deferred_run_goes_on_when_reserved_tokens_come_free(h: Harness) {
    let held = h.reserve(&ReserveRequest { limits: TIGHT, ..ask_for_index(950) }).await;
    let task = defer(&h, h.claim_new().await.lease, 100).await;
    assert!(due_tasks(&h, 10).await.is_empty());
    h.store.close(held, billed(500, 0)).await.unwrap();
    assert_eq!(due_tasks(&h, 10).await, [task]);
}

async fn a_deferred_run_is_not_claimed_by_its_message(h: Harness) {
    spend_all_but(&h, 0).await;
    let task = defer(&h, h.claim_new().await.lease, 100).await;
    assert!(matches!(h.store.claim_run(&request(task)).await.unwrap(), Claim::Held));
    assert_eq!(h.run(task).await.run.attempt, 1);
}

async fn a_deferral_that_is_retried_gives_the_same_outbox_row(h: Harness) {
    let lease = h.claim_new().await.lease;
    let task = lease.task_id;
    let waiting = answer(task, AnswerType::Progress, "waiting");
    let retry = stale_copy(&lease);
    let first = h.store.defer_run(lease, Tokens(5), "architect_out", &waiting, &[]).await.unwrap();
    let second = h.store.defer_run(retry, Tokens(5), "architect_out", &waiting, &[]).await.unwrap();
    assert_eq!(first, second);
    // Left to its writer for a while, then anybody's.
    assert!(h.store.outbox_take(10, LEASE).await.unwrap().is_empty());
    h.advance(OUTBOX_HOLD).await;
    assert_eq!(h.store.outbox_take(10, LEASE).await.unwrap(), vec![first.outbox]);
}

async fn a_run_that_fits_no_day_is_handed_out_at_midnight(h: Harness) {
    let task = defer(&h, h.claim_new().await.lease, 1001).await;
    assert!(due_tasks(&h, 10).await.is_empty());
    h.pass_midnight().await;
    assert_eq!(due_tasks(&h, 10).await, [task]);
}

async fn no_more_deferred_runs_are_taken_than_fit_together(h: Harness) {
    spend_all_but(&h, 0).await;
    let mut tasks = Vec::new();
    for needed in [400, 500, 300, 100] {
        tasks.push(defer(&h, h.claim_new().await.lease, needed).await);
        h.advance(Duration::from_secs(1)).await;
    }
    h.pass_midnight().await;
    // 400 + 500 fit in 1000, 300 does not beside them, 100 does.
    assert_eq!(due_tasks(&h, 10).await, [tasks[0], tasks[1], tasks[3]]);
}

async fn a_tenant_without_tokens_does_not_hold_the_others_up(h: Harness) {
    let tenant_limit = Some(TenantLimit { tenant: "acme".to_owned(), limit: Some(Tokens(50)) });
    h.store.change_fleet(&FleetChange { tenant_limit, ..FleetChange::default() }, TIGHT).await.unwrap();
    let wanted = ReserveRequest { tenant: Some("acme".to_owned()), limits: TIGHT, ..ask_for_index(40) };
    h.reserve(&wanted).await;

    let mut tasks = Vec::new();
    for (tenant, needed) in [(Some("acme"), 20), (Some("acme"), 10), (Some("rival"), 20), (None, 20)] {
        let wanted = ClaimRequest { tenant: tenant.map(str::to_owned), ..request(TaskId::random()) };
        let Claim::Claimed(run) = h.store.claim_run(&wanted).await.unwrap() else { panic!("not claimed") };
        tasks.push(defer(&h, run.lease, needed).await);
        h.advance(Duration::from_secs(1)).await;
    }
    assert_eq!(due_tasks(&h, 2).await, [tasks[1], tasks[2]]);
    assert_eq!(due_tasks(&h, 2).await, [tasks[3]]);
    h.pass_midnight().await;
    // The three that were taken expired meanwhile; the fourth fits the tenant's new day.
    assert_eq!(due_tasks(&h, 10).await, tasks);
}

async fn deferred_runs_go_on_oldest_first(h: Harness) {
    let mut tasks = Vec::new();
    for _ in 0..4 {
        tasks.push(defer(&h, h.claim_new().await.lease, 10).await);
        h.advance(Duration::from_secs(1)).await;
    }
    h.pass_midnight().await;
    assert_eq!(due_tasks(&h, 2).await, tasks[..2]);
    assert_eq!(h.due_under(10, AMPLE).await.len(), 2);
}
