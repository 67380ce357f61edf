//! Reserve, settle, release, assume: never over a limit, never less than was billed.

use std::time::Duration;

use atlas_shared::{
    TaskId, Tokens, UpstreamError,
    ledger::{
        CallKind, Closing, Denial, DeniedBy, LedgerError, Limits, NewLimit, ReserveOutcome, ReserveRequest,
    },
};
use atlas_worker::store::{FleetChange, TenantLimit};

use crate::harness::{AMPLE, Harness, LEASE, ask, ask_for_index, billed, done};

crate::contract! {
    tokens_are_granted_up_to_the_days_limit_and_not_beyond,
    a_run_is_granted_up_to_its_limit_and_not_beyond,
    a_tenant_is_granted_up_to_its_limit_and_not_beyond,
    a_tenants_limit_holds_until_it_is_changed,
    a_reservation_that_is_retried_is_granted_once,
    a_closed_reservation_is_not_granted_again,
    a_released_reservation_can_be_reserved_again,
    a_bill_above_the_reservation_is_booked_in_full,
    closing_twice_changes_nothing,
    an_assumed_reservation_is_corrected_by_what_was_billed,
    settling_an_unknown_reservation_is_an_error,
    a_reservation_keeps_its_day_across_midnight,
    a_limit_of_the_fleet_wins_over_configuration,
    index_jobs_share_the_days_limit,
    a_lost_index_jobs_reservation_is_booked_as_spent,
    absurd_numbers_are_denied,
    sixteen_clients_racing_never_exceed_the_days_limit,
    sixteen_clients_racing_never_exceed_a_runs_limit,
    sixteen_clients_racing_never_exceed_a_tenants_limit,
}

async fn denial(h: &Harness, ask: &ReserveRequest) -> Denial {
    match h.store.reserve(ask).await.unwrap() {
        ReserveOutcome::Denied(denial) => denial,
        ReserveOutcome::Granted(granted) => panic!("granted: {granted:?}"),
    }
}

fn under(limits: Limits, ask: ReserveRequest) -> ReserveRequest {
    ReserveRequest { limits, ..ask }
}

fn of_tenant(tenant: &str, ask: ReserveRequest) -> ReserveRequest {
    ReserveRequest { tenant: Some(tenant.to_owned()), ..ask }
}

async fn limit_tenant(h: &Harness, tenant: &str, limit: Option<u64>) {
    let tenant_limit = TenantLimit { tenant: tenant.to_owned(), limit: limit.map(Tokens) };
    let change = FleetChange { tenant_limit: Some(tenant_limit), ..FleetChange::default() };
    h.store.change_fleet(&change, AMPLE).await.unwrap();
}

async fn tokens_are_granted_up_to_the_days_limit_and_not_beyond(h: Harness) {
    let limits = Limits { daily: Tokens(1000), ..AMPLE };
    let run = h.claim_new().await;
    h.reserve(&under(limits, ask(&run.lease, 600))).await;
    let said = denial(&h, &under(limits, ask(&run.lease, 401))).await;
    assert_eq!(
        said,
        Denial {
            denied_by: DeniedBy::Day,
            requested: Tokens(401),
            available: Tokens(400),
            limit: Tokens(1000),
            resets_at: Some("2026-03-02T00:00:00Z".parse().unwrap()),
        }
    );
    h.reserve(&under(limits, ask(&run.lease, 400))).await;
    assert_eq!(denial(&h, &under(limits, ask(&run.lease, 1))).await.available, Tokens(0));

    let budget = h.store.budget(limits).await.unwrap();
    assert_eq!((budget.limit, budget.used, budget.reserved), (Tokens(1000), Tokens(0), Tokens(1000)));
    assert_eq!((budget.day.as_str(), budget.available()), ("2026-03-01", Tokens(0)));
    assert_eq!(h.global().await.limit, Some(1000));
    h.assert_books_agree().await;
}

async fn a_run_is_granted_up_to_its_limit_and_not_beyond(h: Harness) {
    let limits = Limits { run: Tokens(1000), ..AMPLE };
    let run = h.claim_new().await;
    // Settled, assumed and open ones count; released ones do not.
    let settled = h.reserve(&under(limits, ask(&run.lease, 300))).await;
    h.store.close(settled, billed(100, 100)).await.unwrap();
    let assumed = h.reserve(&under(limits, ask(&run.lease, 100))).await;
    h.store.close(assumed, Closing::Assumed).await.unwrap();
    let released = h.reserve(&under(limits, ask(&run.lease, 700))).await;
    h.store.close(released, Closing::Released).await.unwrap();
    h.reserve(&under(limits, ask(&run.lease, 400))).await;

    let said = denial(&h, &under(limits, ask(&run.lease, 301))).await;
    assert_eq!(
        (said.denied_by, said.available, said.limit, said.resets_at),
        (DeniedBy::Run, Tokens(300), Tokens(1000), None)
    );
    h.reserve(&under(limits, ask(&run.lease, 300))).await;

    // Another run has a limit of its own.
    let other = h.claim_new().await;
    h.reserve(&under(limits, ask(&other.lease, 1000))).await;
}

async fn a_tenant_is_granted_up_to_its_limit_and_not_beyond(h: Harness) {
    let run = h.claim_new().await;
    // Used before anybody set a limit, and counted all the same.
    h.reserve(&of_tenant("acme", ask(&run.lease, 300))).await;
    limit_tenant(&h, "acme", Some(1000)).await;
    let said = denial(&h, &of_tenant("acme", ask(&run.lease, 701))).await;
    assert_eq!((said.denied_by, said.available, said.limit), (DeniedBy::Tenant, Tokens(700), Tokens(1000)));
    assert_eq!(said.resets_at, Some("2026-03-02T00:00:00Z".parse().unwrap()));
    h.reserve(&of_tenant("acme", ask(&run.lease, 700))).await;
    h.reserve(&of_tenant("rival", ask(&run.lease, 5000))).await;
    h.reserve(&ask(&run.lease, 5000)).await;

    assert_eq!(h.account("2026-03-01", "tenant:acme").await.reserved, 1000);
    assert_eq!(h.global().await.reserved, 11_000);
    h.assert_books_agree().await;
}

async fn a_tenants_limit_holds_until_it_is_changed(h: Harness) {
    limit_tenant(&h, "acme", Some(100)).await;
    h.reserve(&of_tenant("acme", ask_for_index(100))).await;
    for _ in 0..3 {
        h.pass_midnight().await;
        assert_eq!(denial(&h, &of_tenant("acme", ask_for_index(101))).await.limit, Tokens(100));
        h.reserve(&of_tenant("acme", ask_for_index(100))).await;
    }
    h.pass_midnight().await;
    limit_tenant(&h, "acme", None).await;
    h.reserve(&of_tenant("acme", ask_for_index(5000))).await;
    h.assert_books_agree().await;
}

async fn a_reservation_that_is_retried_is_granted_once(h: Harness) {
    let run = h.claim_new().await;
    let wanted = ask(&run.lease, 100);
    let (first, again) = (h.reserve(&wanted).await, h.reserve(&wanted).await);
    assert_eq!(first, again);
    assert_eq!(h.global().await.reserved, 100);
    h.assert_books_agree().await;
}

async fn a_closed_reservation_is_not_granted_again(h: Harness) {
    let wanted = ask_for_index(100);
    let reservation = h.reserve(&wanted).await;
    h.store.close(reservation, billed(100, 0)).await.unwrap();
    let error = h.store.reserve(&wanted).await.unwrap_err();
    assert!(
        matches!(&error, LedgerError::Upstream(UpstreamError::Permanent { code, .. }) if code == "reservation_closed"),
        "{error:?}"
    );
}

async fn a_released_reservation_can_be_reserved_again(h: Harness) {
    let limits = Limits { daily: Tokens(100), ..AMPLE };
    for _ in 0..3 {
        let reservation = h.reserve(&under(limits, ask_for_index(100))).await;
        h.store.close(reservation, Closing::Released).await.unwrap();
    }
    let global = h.global().await;
    assert_eq!((global.reserved, global.used), (0, 0));
    h.assert_books_agree().await;
}

async fn a_bill_above_the_reservation_is_booked_in_full(h: Harness) {
    let limits = Limits { daily: Tokens(100), ..AMPLE };
    let reservation = h.reserve(&under(limits, ask_for_index(100))).await;
    h.store.close(reservation, billed(90, 60)).await.unwrap();
    let budget = h.store.budget(limits).await.unwrap();
    assert_eq!((budget.used, budget.available()), (Tokens(150), Tokens(0)));
    assert_eq!(denial(&h, &under(limits, ask_for_index(1))).await.available, Tokens(0));
    h.assert_books_agree().await;
}

async fn closing_twice_changes_nothing(h: Harness) {
    for first in [billed(10, 5), Closing::Released] {
        let wanted = ask_for_index(100);
        let reservation = h.reserve(&wanted).await;
        h.store.close(copy_of(&wanted), first).await.unwrap();
        let before = (h.global().await, h.entry(reservation.id).await);
        for second in [billed(10, 5), billed(99, 99), Closing::Released, Closing::Assumed] {
            h.store.close(copy_of(&wanted), second).await.unwrap();
            assert_eq!((h.global().await, h.entry(reservation.id).await), before);
        }
    }
    h.assert_books_agree().await;
}

/// The reservation once more: what a caller that retries still holds.
fn copy_of(ask: &ReserveRequest) -> atlas_shared::ledger::Reservation {
    atlas_shared::ledger::Reservation { id: ask.id, tokens: ask.tokens, model: ask.model.clone() }
}

async fn an_assumed_reservation_is_corrected_by_what_was_billed(h: Harness) {
    for (truth, used) in [(billed(10, 5), 15), (Closing::Released, 0)] {
        let before = h.global().await.used;
        let wanted = of_tenant("acme", ask_for_index(100));
        let reservation = h.reserve(&wanted).await;
        h.store.close(copy_of(&wanted), Closing::Assumed).await.unwrap();
        h.store.close(copy_of(&wanted), Closing::Assumed).await.unwrap();
        assert_eq!(h.global().await.used, before + 100);
        h.store.close(reservation, truth).await.unwrap();
        assert_eq!(h.global().await.used, before + used);
        h.assert_books_agree().await;
    }
}

async fn settling_an_unknown_reservation_is_an_error(h: Harness) {
    let never_granted = ask_for_index(100);
    for closing in [Closing::Released, Closing::Assumed] {
        h.store.close(copy_of(&never_granted), closing).await.unwrap();
    }
    let error = h.store.close(copy_of(&never_granted), billed(1, 1)).await.unwrap_err();
    assert!(
        matches!(&error, LedgerError::Upstream(UpstreamError::Permanent { code, .. }) if code == "unknown_reservation"),
        "{error:?}"
    );
    assert!(h.books().await.ledger.is_empty());
}

async fn a_reservation_keeps_its_day_across_midnight(h: Harness) {
    let limits = Limits { daily: Tokens(100), ..AMPLE };
    h.set_now("2026-03-01T23:59:59.999999Z".parse().unwrap()).await;
    let reservation = h.reserve(&under(limits, of_tenant("acme", ask_for_index(100)))).await;
    h.advance(Duration::from_micros(1)).await;
    assert_eq!(h.store.budget(limits).await.unwrap().available(), Tokens(100));
    h.store.close(reservation, billed(70, 7)).await.unwrap();

    for scope in ["global", "tenant:acme"] {
        assert_eq!(h.account("2026-03-01", scope).await.used, 77);
        assert_eq!(h.account("2026-03-02", scope).await.used, 0);
    }
    let today = h.store.budget(limits).await.unwrap();
    assert_eq!((today.day.as_str(), today.used), ("2026-03-02", Tokens(0)));
    h.assert_books_agree().await;
}

async fn a_limit_of_the_fleet_wins_over_configuration(h: Harness) {
    let change = FleetChange {
        daily_limit: Some(NewLimit::Tokens(Tokens(500))),
        run_limit: Some(NewLimit::Tokens(Tokens(50))),
        ..FleetChange::default()
    };
    let state = h.store.change_fleet(&change, AMPLE).await.unwrap();
    assert_eq!((state.budget.limit, state.run_limit), (Tokens(500), Tokens(50)));
    let run = h.claim_new().await;
    assert_eq!(denial(&h, &ask(&run.lease, 51)).await.limit, Tokens(50));
    assert_eq!(denial(&h, &ask_for_index(501)).await.limit, Tokens(500));
    h.reserve(&ask_for_index(450)).await;
    h.reserve(&ask(&run.lease, 50)).await;
    assert_eq!(denial(&h, &ask_for_index(1)).await.denied_by, DeniedBy::Day);
    assert_eq!(h.store.budget(AMPLE).await.unwrap().limit, Tokens(500));

    // Lowered below what is granted: nothing is taken back, nothing more is granted.
    let change = FleetChange { daily_limit: Some(NewLimit::Tokens(Tokens(100))), ..FleetChange::default() };
    h.store.change_fleet(&change, AMPLE).await.unwrap();
    let said = denial(&h, &ask_for_index(1)).await;
    assert_eq!((said.available, said.limit), (Tokens(0), Tokens(100)));
}

async fn index_jobs_share_the_days_limit(h: Harness) {
    let limits = Limits { daily: Tokens(100), run: Tokens(10) };
    let embedding = ReserveRequest { kind: CallKind::Embedding, ..ask_for_index(90) };
    let reservation = h.reserve(&under(limits, embedding)).await;
    let run = h.claim_new().await;
    let said = denial(&h, &under(limits, ask(&run.lease, 11))).await;
    assert_eq!(said.denied_by, DeniedBy::Run);
    h.reserve(&under(limits, ask(&run.lease, 10))).await;
    assert_eq!(denial(&h, &under(limits, ask_for_index(1))).await.denied_by, DeniedBy::Day);
    h.store.close(reservation, billed(80, 0)).await.unwrap();
    assert_eq!(h.store.budget(limits).await.unwrap().available(), Tokens(10));
}

async fn a_lost_index_jobs_reservation_is_booked_as_spent(h: Harness) {
    let lost = h.reserve(&of_tenant("acme", ask_for_index(100))).await;
    let run = h.claim_new().await;
    let at_work = h.reserve(&ask(&run.lease, 10)).await;
    h.advance(Duration::from_mins(59)).await;
    h.store.renew_lease(&run.lease, LEASE * 60).await.unwrap();
    h.due(10).await;
    assert_eq!(h.entry(lost.id).await.state, "reserved");
    h.advance(Duration::from_mins(1)).await;
    h.due(10).await;
    assert_eq!(h.entry(lost.id).await.state, "assumed");
    assert_eq!(h.entry(at_work.id).await.state, "reserved");
    h.assert_books_agree().await;
}

async fn absurd_numbers_are_denied(h: Harness) {
    let run = h.claim_new().await;
    for tokens in [u64::MAX, i64::MAX.unsigned_abs(), Tokens::MAX_STORED.0 + 1] {
        assert_eq!(denial(&h, &ask_for_index(tokens)).await.denied_by, DeniedBy::Day);
        assert_eq!(denial(&h, &ask(&run.lease, tokens)).await.denied_by, DeniedBy::Run);
    }
    // A limit of "as much as there is" is one, and an absurd bill does not break the books.
    let limits = Limits { daily: Tokens(u64::MAX), run: Tokens(u64::MAX) };
    let reservation = h.reserve(&under(limits, ask(&run.lease, 1_000_000))).await;
    h.store.close(reservation, billed(u64::MAX, u64::MAX)).await.unwrap();
    assert_eq!(denial(&h, &under(limits, ask_for_index(1))).await.available, Tokens(0));
    h.assert_books_agree().await;
}

/// Sixteen clients ask for `each` until they are denied; returns how many grants there were.
async fn race(
    h: &Harness,
    each: u64,
    make: impl Fn() -> ReserveRequest + Send + Sync + Clone + 'static,
) -> u64 {
    let clients = (0..16).map(|_| {
        let (store, make) = (h.store.clone(), make.clone());
        tokio::spawn(async move {
            let mut granted = 0;
            loop {
                let wanted = ReserveRequest { id: uuid::Uuid::new_v4(), tokens: Tokens(each), ..make() };
                match store.reserve(&wanted).await.unwrap() {
                    ReserveOutcome::Granted(_) => granted += 1,
                    ReserveOutcome::Denied(_) => return granted,
                }
            }
        })
    });
    let mut granted = 0;
    for client in clients.collect::<Vec<_>>() {
        granted += client.await.unwrap();
    }
    h.assert_books_agree().await;
    granted
}

async fn sixteen_clients_racing_never_exceed_the_days_limit(h: Harness) {
    let limits = Limits { daily: Tokens(1030), ..AMPLE };
    let granted = race(&h, 25, move || under(limits, ask_for_index(0))).await;
    assert_eq!(granted, 41, "41 * 25 = 1025 <= 1030 < 1050");
    assert_eq!(h.global().await.reserved, 1025);
}

async fn sixteen_clients_racing_never_exceed_a_runs_limit(h: Harness) {
    let run = h.claim_new().await;
    let limits = Limits { run: Tokens(310), ..AMPLE };
    let task: TaskId = run.lease.task_id;
    let granted = race(&h, 10, move || ReserveRequest {
        task_id: Some(task),
        attempt: Some(1),
        ..under(limits, ask_for_index(0))
    })
    .await;
    assert_eq!(granted, 31);
    h.store.finish_run(run.lease, &done(task)).await.unwrap();
    assert_eq!(h.global().await.used, 310);
}

async fn sixteen_clients_racing_never_exceed_a_tenants_limit(h: Harness) {
    limit_tenant(&h, "acme", Some(400)).await;
    let granted = race(&h, 10, || of_tenant("acme", ask_for_index(0))).await;
    assert_eq!(granted, 40);
    assert_eq!(h.account("2026-03-01", "tenant:acme").await.reserved, 400);
}
