//! What operators ask: filters, runs made due, dead letters and their replay, history, retention.

use std::time::Duration;

use atlas_shared::{
    TaskId, Tokens,
    config::RetentionConfig,
    ledger::{CallKind, Closing, NewLimit, ReserveRequest},
    message::AnswerType,
};
use atlas_worker::store::{
    Claim, ClaimRequest, DeadLetter, DeadLetterFilter, DeadLetterPurge, EntryState, FinalStatus, Finish,
    FleetChange, Purged, RunFilter, RunStatus, TenantLimit, Wake,
};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::harness::{
    AMPLE, Harness, LEASE, answer, ask, ask_for_index, billed, checkpoint, done, request, result, settlement,
};

crate::contract! {
    runs_are_found_by_state_tenant_error_and_time,
    a_run_is_shown_with_its_calls_and_what_it_waits_for,
    a_list_of_runs_tells_what_was_booked_for_each,
    a_waiting_run_is_made_due_now,
    a_run_at_work_and_a_final_one_are_not_woken,
    a_woken_run_that_still_does_not_fit_is_deferred_again,
    dead_letters_are_listed_and_shown_byte_for_byte,
    a_replayed_letter_says_when_and_as_what,
    a_purge_of_dead_letters_spares_what_nobody_replayed,
    the_history_tells_days_scopes_and_kinds,
    old_rows_go_and_runs_results_and_accounts_stay,
    nothing_of_an_open_run_is_purged,
    a_redelivered_message_of_a_purged_run_does_not_run_again,
    eight_purges_at_once_delete_each_row_once,
}

const DAY: Duration = Duration::from_hours(24);

/// Everything older than a day goes.
const ONE_DAY: RetentionConfig = RetentionConfig {
    outbox: Some(DAY),
    steps: Some(DAY),
    requests: Some(DAY),
    ledger: Some(DAY),
    dead_letters: Some(DAY),
};

fn of_tenant(task: TaskId, tenant: &str) -> ClaimRequest {
    ClaimRequest { tenant: Some(tenant.to_owned()), requester: Some("ci".to_owned()), ..request(task) }
}

fn failed(task: TaskId, code: &str) -> Finish {
    Finish {
        status: FinalStatus::Failed,
        answer: result(task, AnswerType::Error, "no"),
        error_code: Some(code.to_owned()),
        error_message: Some("no".to_owned()),
        ..done(task)
    }
}

async fn runs_are_found_by_state_tenant_error_and_time(h: Harness) {
    let old = h.claim_new().await;
    let old_task = old.lease.task_id;
    h.store.finish_run(old.lease, &failed(old_task, "cancelled")).await.unwrap();
    h.advance(Duration::from_hours(1)).await;
    let since = h.now();
    let Claim::Claimed(acme) = h.store.claim_run(&of_tenant(TaskId::random(), "acme")).await.unwrap() else {
        panic!("not claimed");
    };
    let acme_task = acme.lease.task_id;
    h.store.finish_run(acme.lease, &failed(acme_task, "too_many_attempts")).await.unwrap();
    let open = h.claim_new().await.lease.task_id;

    let find = async |filter: RunFilter| -> Vec<TaskId> {
        let filter = RunFilter { limit: 10, ..filter };
        h.store.find_runs(&filter).await.unwrap().into_iter().map(|run| run.task_id).collect()
    };
    let failed = RunFilter { status: Some(RunStatus::Failed), ..RunFilter::default() };
    assert_eq!(find(failed.clone()).await, [acme_task, old_task]);
    assert_eq!(find(RunFilter { since: Some(since), ..failed.clone() }).await, [acme_task]);
    assert_eq!(
        find(RunFilter { tenant: Some("acme".to_owned()), ..RunFilter::default() }).await,
        [acme_task]
    );
    assert_eq!(find(RunFilter { error_code: Some("cancelled".to_owned()), ..failed }).await, [old_task]);
    let recent = find(RunFilter { since: Some(since), ..RunFilter::default() }).await;
    assert_eq!(recent.len(), 2);
    assert!(recent.contains(&open) && recent.contains(&acme_task));
    assert_eq!(h.store.list_runs(Some(RunStatus::Running), 10).await.unwrap()[0].task_id, open);
}

async fn a_run_is_shown_with_its_calls_and_what_it_waits_for(h: Harness) {
    let task = TaskId::random();
    let Claim::Claimed(run) = h.store.claim_run(&of_tenant(task, "acme")).await.unwrap() else {
        panic!("not claimed");
    };
    let first = h.reserve(&ask(&run.lease, 50)).await;
    h.store
        .settle_step(&run.lease, &settlement(&first, billed(10, 5)), &checkpoint("draft.0", "a"))
        .await
        .unwrap();
    h.advance(Duration::from_secs(1)).await;
    let open = h.reserve(&ask(&run.lease, 70)).await;

    let shown = h.run(task).await;
    assert_eq!((shown.run.requester.as_deref(), shown.unsent), (Some("ci"), false));
    let calls: Vec<_> =
        shown.ledger.iter().map(|call| (call.id, call.state, call.reserved, call.actual)).collect();
    assert_eq!(
        calls,
        [
            (first.id, EntryState::Settled, Tokens(50), Tokens(15)),
            (open.id, EntryState::Reserved, Tokens(70), Tokens(0)),
        ]
    );
    assert_eq!((shown.ledger[0].kind, shown.ledger[0].attempt), (CallKind::Chat, Some(1)));
    assert!(shown.ledger[0].closed_at.is_some() && shown.ledger[1].closed_at.is_none());

    let waiting = answer(task, AnswerType::Progress, "waiting");
    h.store.defer_run(run.lease, Tokens(900), "architect_out", &waiting, &[]).await.unwrap();
    let shown = h.run(task).await;
    assert_eq!((shown.run.tokens_needed, shown.run.deferrals, shown.unsent), (Some(Tokens(900)), 1, true));
    assert!(!shown.run.cancel_requested);
}

async fn a_list_of_runs_tells_what_was_booked_for_each(h: Harness) {
    let booked = async |task: TaskId| {
        let runs = h.store.find_runs(&RunFilter { limit: 10, ..RunFilter::default() }).await.unwrap();
        let listed = runs.into_iter().find(|run| run.task_id == task).unwrap();
        assert_eq!(listed, h.run(task).await.run, "a list tells what the run itself tells");
        (listed.tokens_prompt + listed.tokens_completion, listed.tokens_booked)
    };
    let run = h.claim_new().await;
    let task = run.lease.task_id;
    assert_eq!(booked(task).await, (Tokens(0), Tokens(0)));
    let lost = h.reserve(&ask(&run.lease, 100)).await;
    assert_eq!(booked(task).await, (Tokens(0), Tokens(0)), "what is only reserved is not booked");
    h.store.close(lost, Closing::Assumed).await.unwrap();
    assert_eq!(booked(task).await, (Tokens(0), Tokens(100)), "a lost answer is booked in full");
    let billed_call = h.reserve(&ask(&run.lease, 50)).await;
    h.store
        .settle_step(&run.lease, &settlement(&billed_call, billed(10, 5)), &checkpoint("draft.0", "a"))
        .await
        .unwrap();
    let unused = h.reserve(&ask(&run.lease, 70)).await;
    h.store.close(unused, Closing::Released).await.unwrap();
    assert_eq!(booked(task).await, (Tokens(15), Tokens(115)));
    h.store.finish_run(run.lease, &done(task)).await.unwrap();
    assert_eq!(booked(task).await, (Tokens(15), Tokens(115)));

    h.advance(DAY * 3).await;
    h.store.purge_old(&ONE_DAY, 100).await.unwrap();
    assert_eq!(booked(task).await, (Tokens(15), Tokens(15)), "what was billed outlives the ledger's rows");
    let other = h.claim_new().await.lease.task_id;
    assert_eq!(booked(other).await, (Tokens(0), Tokens(0)), "each run has its own");
}

async fn a_waiting_run_is_made_due_now(h: Harness) {
    let queued = h.claim_new().await;
    let task = queued.lease.task_id;
    h.store.release_run(queued.lease, Duration::from_hours(3)).await.unwrap();
    assert!(h.due(10).await.is_empty());
    for _ in 0..2 {
        assert_eq!(h.store.wake_run(task).await.unwrap(), Wake::Due);
    }
    let [run] = h.due(10).await.try_into().unwrap();
    assert_eq!((run.lease.task_id, run.lease.attempt), (task, 2));
}

async fn a_run_at_work_and_a_final_one_are_not_woken(h: Harness) {
    assert_eq!(h.store.wake_run(TaskId::random()).await.unwrap(), Wake::Unknown);
    let run = h.claim_new().await;
    let task = run.lease.task_id;
    assert_eq!(h.store.wake_run(task).await.unwrap(), Wake::Running);
    h.advance(LEASE * 2).await;
    assert_eq!(h.store.wake_run(task).await.unwrap(), Wake::Due, "its worker is dead, a sweep takes it");
    assert!(h.store.renew_lease(&run.lease, LEASE).await.unwrap().held, "and it took nothing from nobody");
    h.store.finish_run(run.lease, &done(task)).await.unwrap();
    let before = h.run(task).await;
    assert_eq!(h.store.wake_run(task).await.unwrap(), Wake::Final);
    assert_eq!(h.run(task).await, before);
}

async fn a_woken_run_that_still_does_not_fit_is_deferred_again(h: Harness) {
    let small = atlas_shared::ledger::Limits { daily: Tokens(100), ..AMPLE };
    let run = h.claim_new().await;
    let task = run.lease.task_id;
    let waiting = answer(task, AnswerType::Progress, "waiting");
    h.store.defer_run(run.lease, Tokens(500), "architect_out", &waiting, &[]).await.unwrap();
    assert!(h.due_under(10, small).await.is_empty());
    assert_eq!(h.store.wake_run(task).await.unwrap(), Wake::Due);
    let [again] = h.due_under(10, small).await.try_into().unwrap();
    h.store.defer_run(again.lease, Tokens(500), "architect_out", &waiting, &[]).await.unwrap();
    let shown = h.run(task).await.run;
    assert_eq!((shown.status, shown.deferrals), (RunStatus::Deferred, 2));
}

fn letter(reason: &str, raw: &[u8], task: Option<TaskId>) -> DeadLetter {
    DeadLetter {
        id: Uuid::new_v4(),
        source: "architect_in-atlas".to_owned(),
        reason: reason.to_owned(),
        detail: "In words.".to_owned(),
        raw_base64: BASE64_STANDARD.encode(raw),
        attributes: vec![("b".to_owned(), "2".to_owned()), ("a".to_owned(), "1".to_owned())],
        task_id: task,
        fails_run: false,
        announce: Vec::new(),
    }
}

async fn record(h: &Harness, reason: &str, raw: &[u8]) -> Uuid {
    let letter = letter(reason, raw, None);
    assert!(h.store.record_dead_letter(&letter).await.unwrap());
    h.advance(Duration::from_secs(1)).await;
    letter.id
}

async fn dead_letters_are_listed_and_shown_byte_for_byte(h: Harness) {
    // Longer than a line of base64 as Postgres breaks them, of every length modulo 3, and empty.
    let mut ids = Vec::new();
    for length in [0, 1, 100, 200, 300] {
        ids.push(record(&h, "not_json", &vec![0xfe; length]).await);
    }
    let since = h.now();
    let other = record(&h, "too_large", b"x").await;
    let list = async |filter: DeadLetterFilter| {
        let filter = DeadLetterFilter { limit: 50, ..filter };
        h.store.list_dead_letters(&filter).await.unwrap()
    };
    let all = list(DeadLetterFilter::default()).await;
    let newest_first: Vec<Uuid> = ids.iter().copied().chain([other]).rev().collect();
    assert_eq!(all.iter().map(|letter| letter.id).collect::<Vec<_>>(), newest_first);
    assert_eq!(all.iter().map(|letter| letter.bytes).collect::<Vec<_>>(), [1, 300, 200, 100, 1, 0]);
    let large =
        list(DeadLetterFilter { reason: Some("too_large".to_owned()), ..DeadLetterFilter::default() }).await;
    assert_eq!(large.len(), 1);
    assert_eq!(list(DeadLetterFilter { since: Some(since), ..DeadLetterFilter::default() }).await, large);

    for (id, length) in ids.into_iter().zip([0, 1, 100, 200, 300]) {
        let shown = h.store.get_dead_letter(id).await.unwrap().unwrap();
        assert_eq!(BASE64_STANDARD.decode(&shown.raw_base64).unwrap(), vec![0xfe; length]);
        assert_eq!(shown.attributes, letter("", b"", None).attributes, "in their order");
        assert_eq!((shown.letter.detail.as_str(), shown.letter.replayed_at), ("In words.", None));
    }
    assert!(h.store.get_dead_letter(Uuid::new_v4()).await.unwrap().is_none());
}

async fn a_replayed_letter_says_when_and_as_what(h: Harness) {
    let id = record(&h, "delivery_attempts_exhausted", b"{}").await;
    let waiting = record(&h, "not_json", b"{").await;
    let task = TaskId::random();
    assert!(h.store.mark_replayed(id, Some(task)).await.unwrap());
    assert!(h.store.mark_replayed(id, Some(task)).await.unwrap(), "a retry says the same");
    assert!(!h.store.mark_replayed(Uuid::new_v4(), None).await.unwrap());

    let shown = h.store.get_dead_letter(id).await.unwrap().unwrap().letter;
    assert_eq!((shown.replayed_at, shown.replayed_as), (Some(h.now()), Some(task)));
    let of = async |replayed| {
        let filter = DeadLetterFilter { replayed: Some(replayed), limit: 9, ..DeadLetterFilter::default() };
        h.store.list_dead_letters(&filter).await.unwrap().iter().map(|letter| letter.id).collect::<Vec<_>>()
    };
    assert_eq!((of(true).await, of(false).await), (vec![id], vec![waiting]));
    assert_eq!(h.store.fleet_state(AMPLE).await.unwrap().dead_letters, 1);
}

async fn a_purge_of_dead_letters_spares_what_nobody_replayed(h: Harness) {
    let replayed = record(&h, "not_json", b"1").await;
    h.store.mark_replayed(replayed, None).await.unwrap();
    let waiting = record(&h, "not_json", b"2").await;
    h.advance(DAY).await;
    let young = record(&h, "not_json", b"3").await;
    h.store.mark_replayed(young, None).await.unwrap();

    let old = DeadLetterPurge { older_than: Some(Duration::from_hours(2)), ..DeadLetterPurge::default() };
    let dry = DeadLetterPurge { dry_run: true, unreplayed: true, ..old.clone() };
    assert_eq!(h.store.purge_dead_letters(&dry, 10).await.unwrap(), 2);
    assert_eq!(h.store.purge_dead_letters(&old, 10).await.unwrap(), 1);
    assert!(h.store.get_dead_letter(replayed).await.unwrap().is_none());
    assert!(h.store.get_dead_letter(waiting).await.unwrap().is_some());
    let other = DeadLetterPurge { reason: Some("too_large".to_owned()), unreplayed: true, ..old.clone() };
    assert_eq!(h.store.purge_dead_letters(&other, 10).await.unwrap(), 0);
    let none = DeadLetterPurge { ids: Some(Vec::new()), unreplayed: true, ..DeadLetterPurge::default() };
    assert_eq!(h.store.purge_dead_letters(&none, 10).await.unwrap(), 0, "no id is not every id");
    let named = DeadLetterPurge { ids: Some(vec![waiting]), unreplayed: true, ..DeadLetterPurge::default() };
    assert_eq!(h.store.purge_dead_letters(&named, 10).await.unwrap(), 1);
    let rest = DeadLetterPurge { unreplayed: true, ..DeadLetterPurge::default() };
    assert_eq!(h.store.purge_dead_letters(&rest, 0).await.unwrap(), 0, "no more than the limit");
    assert_eq!(h.store.purge_dead_letters(&rest, 10).await.unwrap(), 1);
}

async fn the_history_tells_days_scopes_and_kinds(h: Harness) {
    let limit = TenantLimit { tenant: "acme".to_owned(), limit: Some(Tokens(400)) };
    let change = FleetChange { tenant_limit: Some(limit), ..FleetChange::default() };
    h.store.change_fleet(&change, AMPLE).await.unwrap();
    let chat = h.reserve(&ReserveRequest { tenant: Some("acme".to_owned()), ..ask_for_index(100) }).await;
    h.store.close(chat, billed(60, 10)).await.unwrap();
    h.pass_midnight().await;
    let embed = h.reserve(&ReserveRequest { kind: CallKind::Embedding, ..ask_for_index(30) }).await;
    h.store.close(embed, Closing::Assumed).await.unwrap();
    let _open = h.reserve(&ask_for_index(7)).await;

    let history = h.store.budget_history(14, AMPLE).await.unwrap();
    let seen: Vec<Value> = history
        .iter()
        .map(|a| json!([a.day, a.scope, a.limit, a.used, a.reserved, a.assumed, a.chat, a.embedding]))
        .collect();
    assert_eq!(
        seen,
        [
            json!(["2026-03-02", "global", 1_000_000, 30, 7, 30, 0, 30]),
            json!(["2026-03-01", "global", 1_000_000, 70, 0, 0, 70, 0]),
            json!(["2026-03-01", "tenant:acme", 400, 70, 0, 0, 70, 0]),
        ]
    );
    assert_eq!(h.store.budget_history(1, AMPLE).await.unwrap().len(), 1, "today is the first of the days");
    let raise = FleetChange { daily_limit: Some(NewLimit::Tokens(Tokens(5))), ..FleetChange::default() };
    h.store.change_fleet(&raise, AMPLE).await.unwrap();
    assert_eq!(h.store.budget_history(1, AMPLE).await.unwrap()[0].limit, Some(Tokens(5)), "the one in force");

    // What the ledger no longer has is not made up.
    h.advance(DAY).await;
    h.store.purge_old(&ONE_DAY, 100).await.unwrap();
    let oldest = h.store.budget_history(14, AMPLE).await.unwrap().into_iter().find(|a| a.day == "2026-03-01");
    let oldest = oldest.unwrap();
    assert_eq!((oldest.used, oldest.chat, oldest.assumed), (Tokens(70), None, None));
}

/// A run with one settled call, done and sent.
async fn finished(h: &Harness) -> TaskId {
    let run = h.claim_new().await;
    let task = run.lease.task_id;
    let call = h.reserve(&ask(&run.lease, 50)).await;
    h.store
        .settle_step(&run.lease, &settlement(&call, billed(10, 5)), &checkpoint("draft.0", "a"))
        .await
        .unwrap();
    let sent = h.store.finish_run(run.lease, &done(task)).await.unwrap().outbox.id;
    h.store.outbox_mark_sent(&[sent]).await.unwrap();
    task
}

async fn old_rows_go_and_runs_results_and_accounts_stay(h: Harness) {
    let task = finished(&h).await;
    let replayed = record(&h, "not_json", b"1").await;
    h.store.mark_replayed(replayed, None).await.unwrap();
    let waiting = record(&h, "not_json", b"2").await;
    assert_eq!(h.store.purge_old(&ONE_DAY, 100).await.unwrap(), Purged::default(), "all of it is young");
    let before = h.run(task).await;
    h.advance(DAY * 2).await;
    let never =
        RetentionConfig { outbox: None, steps: None, requests: None, ledger: None, dead_letters: None };
    assert_eq!(h.store.purge_old(&never, 100).await.unwrap(), Purged::default(), "kept for ever");

    let purged = h.store.purge_old(&ONE_DAY, 100).await.unwrap();
    assert_eq!(purged, Purged { outbox: 1, steps: 1, requests: 1, ledger: 1, dead_letters: 1 });
    assert_eq!(h.store.purge_old(&ONE_DAY, 100).await.unwrap(), Purged::default());
    let after = h.run(task).await;
    assert_eq!((after.run, after.answer), (before.run, before.answer));
    assert_eq!((after.request, after.steps.len(), after.ledger.len()), (Value::Null, 0, 0));
    assert_eq!(h.results_of(task).await.0, 1);
    assert_eq!(h.account("2026-03-01", "global").await.used, 15);
    assert!(h.store.get_dead_letter(waiting).await.unwrap().is_some(), "nobody replayed it");
}

async fn nothing_of_an_open_run_is_purged(h: Harness) {
    let run = h.claim_new().await;
    let task = run.lease.task_id;
    let call = h.reserve(&ask(&run.lease, 50)).await;
    h.store
        .settle_step(&run.lease, &settlement(&call, billed(10, 5)), &checkpoint("draft.0", "a"))
        .await
        .unwrap();
    let waiting = answer(task, AnswerType::Progress, "waiting");
    h.store.defer_run(run.lease, Tokens(9), "architect_out", &waiting, &[]).await.unwrap();
    let open = h.reserve(&ask_for_index(7)).await;
    let before = h.run(task).await;
    h.advance(DAY * 30).await;
    assert_eq!(h.store.purge_old(&ONE_DAY, 100).await.unwrap(), Purged::default());
    assert_eq!(h.run(task).await, before);
    h.store.close(open, Closing::Released).await.unwrap();
    h.assert_books_agree().await;
    // The run goes on with what it had, within what it may still spend.
    let [resumed] = h.due(10).await.try_into().unwrap();
    assert_eq!((resumed.steps.len(), resumed.spent), (1, Tokens(15)));
}

async fn a_redelivered_message_of_a_purged_run_does_not_run_again(h: Harness) {
    let task = finished(&h).await;
    h.advance(DAY * 365).await;
    h.store.purge_old(&ONE_DAY, 100).await.unwrap();
    let again = h.store.claim_run(&request(task)).await.unwrap();
    assert!(matches!(again, Claim::Finished { unsent: false }), "{again:?}");
    assert!(h.due(10).await.is_empty());
    assert_eq!(h.run(task).await.request, Value::Null, "not even its request is stored again");
}

async fn eight_purges_at_once_delete_each_row_once(h: Harness) {
    for _ in 0..20 {
        finished(&h).await;
    }
    h.advance(DAY * 3).await;
    let purges = (0..8).map(|_| {
        let store = h.store.clone();
        tokio::spawn(async move {
            let mut sum = [0; 5];
            // Whoever finds everything locked by the others finds nothing: it may stop.
            loop {
                let purged = store.purge_old(&ONE_DAY, 3).await.unwrap();
                for (sum, (_, rows)) in sum.iter_mut().zip(purged.by_kind()) {
                    *sum += rows;
                }
                if purged == Purged::default() {
                    return sum;
                }
            }
        })
    });
    let mut sum = [0; 5];
    for purge in purges.collect::<Vec<_>>() {
        for (sum, rows) in sum.iter_mut().zip(purge.await.unwrap()) {
            *sum += rows;
        }
    }
    let rest = h.store.purge_old(&ONE_DAY, 1000).await.unwrap();
    for (sum, (_, rows)) in sum.iter_mut().zip(rest.by_kind()) {
        *sum += rows;
    }
    assert_eq!(sum, [20, 20, 20, 20, 0]);
}
