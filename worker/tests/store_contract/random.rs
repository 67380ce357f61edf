//! Random histories: reserve, settle, release, crash, defer, finish, midnight, over and over. After each
//! step the books must agree, no grant may exceed a limit, nothing billed may be missing, and no finished
//! run may have changed.
//!
//! `ATLAS_PROPERTY_STEPS` sets the number of steps (default 300), `ATLAS_PROPERTY_SEED` the history.

use std::{collections::BTreeMap, time::Duration};

use atlas_shared::{
    TaskId, Tokens, WorkerId,
    ledger::{Closing, LedgerError, Limits, NewLimit, Reservation, ReserveOutcome, ReserveRequest},
    message::AnswerType,
};
use atlas_worker::store::{Claim, ClaimRequest, FleetChange, Lease, RunDetail, TenantLimit};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng, seq::IndexedRandom as _};

use crate::harness::{
    AMPLE, Harness, LEASE, answer, ask, billed, checkpoint, done, request, settlement, stale_copy,
};

crate::contract! {
    random_histories_keep_every_promise,
    sixteen_clients_with_random_histories_keep_the_books,
}

const LIMITS: Limits = Limits { daily: Tokens(5_000), run: Tokens(1_200) };

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// A call whose answer is still out, held by a worker that may have been declared dead long ago.
struct Call {
    lease: Option<Lease>,
    reservation: Reservation,
}

#[derive(Default)]
struct World {
    leases: Vec<Lease>,
    calls: Vec<Call>,
    /// What the model's API has billed, by reservation.
    billed: BTreeMap<uuid::Uuid, u64>,
    finished: BTreeMap<TaskId, RunDetail>,
    tasks: Vec<(TaskId, Option<String>)>,
}

async fn random_histories_keep_every_promise(h: Harness) {
    let seed = setting("ATLAS_PROPERTY_SEED", rand::rng().random());
    println!("ATLAS_PROPERTY_SEED={seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    let mut world = World::default();
    for step in 0..setting("ATLAS_PROPERTY_STEPS", 300) {
        let did = act(&h, &mut rng, &mut world).await;
        // Looking at every finished run each time would make long histories quadratic.
        let sample: Vec<TaskId> = world.finished.keys().copied().collect();
        let sample: Vec<TaskId> = sample.choose_multiple(&mut rng, 3).copied().collect();
        check(&h, &world, &sample)
            .await
            .unwrap_or_else(|fault| panic!("seed {seed}, step {step} ({did}): {fault}"));
    }
    let all: Vec<TaskId> = world.finished.keys().copied().collect();
    check(&h, &world, &all).await.unwrap_or_else(|fault| panic!("seed {seed}, at the end: {fault}"));
    assert!(!world.finished.is_empty(), "seed {seed}: a history in which nothing happened");
}

/// One random step; returns its name.
async fn act(h: &Harness, rng: &mut StdRng, world: &mut World) -> &'static str {
    match rng.random_range(0..100) {
        0..12 => {
            let tenant = [None, Some("acme"), Some("rival")].choose(rng).unwrap().map(str::to_owned);
            let (task, tenant) = if world.tasks.is_empty() || rng.random_bool(0.5) {
                (TaskId::random(), tenant)
            } else {
                world.tasks.choose(rng).unwrap().clone()
            };
            let wanted = ClaimRequest { tenant: tenant.clone(), ..request(task) };
            if let Claim::Claimed(run) = h.store.claim_run(&wanted).await.unwrap() {
                world.leases.push(run.lease);
            }
            world.tasks.push((task, tenant));
            "claim"
        }
        12..45 => {
            let tokens = rng.random_range(1..600);
            let (wanted, lease) = match world.leases.choose(rng) {
                Some(lease) if rng.random_bool(0.9) => {
                    let tenant =
                        world.tasks.iter().find(|(task, _)| *task == lease.task_id).unwrap().1.clone();
                    (ReserveRequest { tenant, limits: LIMITS, ..ask(lease, tokens) }, Some(stale_copy(lease)))
                }
                _ => (ReserveRequest { limits: LIMITS, ..crate::harness::ask_for_index(tokens) }, None),
            };
            let before = h.store.fleet_state(LIMITS).await.unwrap();
            match h.store.reserve(&wanted).await {
                Ok(ReserveOutcome::Granted(reservation)) => {
                    // Nobody else is about, so the grant is exactly what was added.
                    let now = h.store.fleet_state(LIMITS).await.unwrap();
                    assert_eq!(now.budget.reserved, before.budget.reserved + wanted.tokens);
                    assert!(
                        now.budget.used + now.budget.reserved <= now.budget.limit,
                        "over the limit: {now:?}"
                    );
                    world.calls.push(Call { lease, reservation });
                }
                Ok(ReserveOutcome::Denied(denial)) => {
                    assert!(denial.available < denial.requested, "{denial:?}");
                }
                Err(LedgerError::Fenced { .. }) => {
                    world.leases.retain(|held| Some(held) != lease.as_ref());
                }
                Err(other) => panic!("{other}"),
            }
            "reserve"
        }
        45..70 if !world.calls.is_empty() => {
            let call = world.calls.swap_remove(rng.random_range(0..world.calls.len()));
            let id = call.reservation.id;
            // Now and then a server bills more than was asked for.
            let cap =
                if rng.random_bool(0.05) { call.reservation.tokens.0 * 2 } else { call.reservation.tokens.0 };
            let (prompt, completion) = (rng.random_range(0..=cap / 2), rng.random_range(0..=cap / 2));
            match rng.random_range(0..10) {
                0 => h.store.close(call.reservation, Closing::Released).await.unwrap(),
                1 => h.store.close(call.reservation, Closing::Assumed).await.unwrap(),
                _ => {
                    world.billed.insert(id, prompt + completion);
                    let closing = billed(prompt, completion);
                    match call.lease {
                        Some(lease) => {
                            let paid = settlement(&call.reservation, closing);
                            let step = checkpoint(&format!("step.{}", rng.random_range(0..5)), "text");
                            match h.store.settle_step(&lease, &paid, &step).await {
                                Ok(()) | Err(LedgerError::Fenced { .. }) => {}
                                Err(other) => panic!("{other}"),
                            }
                        }
                        None => h.store.close(call.reservation, closing).await.unwrap(),
                    }
                }
            }
            "close"
        }
        70..78 if !world.leases.is_empty() => {
            let lease = world.leases.swap_remove(rng.random_range(0..world.leases.len()));
            let task = lease.task_id;
            match h.store.finish_run(lease, &done(task)).await {
                Ok(_) => {
                    world.finished.insert(task, h.without_ledger(task).await);
                }
                Err(LedgerError::Fenced { .. }) => {}
                Err(other) => panic!("{other}"),
            }
            "finish"
        }
        78..82 if !world.leases.is_empty() => {
            let lease = world.leases.swap_remove(rng.random_range(0..world.leases.len()));
            let waiting = answer(lease.task_id, AnswerType::Progress, "waiting");
            let needed = Tokens(rng.random_range(1..6_000));
            match h.store.defer_run(lease, needed, "architect_out", &waiting, &[]).await {
                Ok(_) | Err(LedgerError::Fenced { .. }) => {}
                Err(other) => panic!("{other}"),
            }
            "defer"
        }
        82..84 if !world.leases.is_empty() => {
            let lease = world.leases.swap_remove(rng.random_range(0..world.leases.len()));
            match h.store.release_run(lease, Duration::from_secs(5)).await {
                Ok(()) | Err(LedgerError::Fenced { .. }) => {}
                Err(other) => panic!("{other}"),
            }
            "release"
        }
        // A crash: the lease is forgotten, the calls are still out.
        84..87 if !world.leases.is_empty() => {
            world.leases.swap_remove(rng.random_range(0..world.leases.len()));
            "crash"
        }
        87..92 => {
            let runs = h.due_under(rng.random_range(1..5), LIMITS).await;
            world.leases.extend(runs.into_iter().map(|run| run.lease));
            "sweep"
        }
        92..96 => {
            h.advance(Duration::from_secs(rng.random_range(1..90))).await;
            "time passes"
        }
        96..97 => {
            h.pass_midnight().await;
            "midnight"
        }
        97..99 => {
            let change = FleetChange {
                daily_limit: Some(NewLimit::Tokens(Tokens(rng.random_range(3_000..8_000)))),
                tenant_limit: Some(TenantLimit {
                    tenant: "acme".to_owned(),
                    limit: Some(Tokens(rng.random_range(500..3_000))),
                }),
                ..FleetChange::default()
            };
            h.store.change_fleet(&change, LIMITS).await.unwrap();
            "set_budget"
        }
        _ => {
            if let Some(lease) = world.leases.choose(rng) {
                h.store.renew_lease(lease, LEASE).await.unwrap();
            }
            "renew"
        }
    }
}

async fn check(h: &Harness, world: &World, finished: &[TaskId]) -> Result<(), String> {
    let books = h.assert_books_agree().await;
    for entry in &books.ledger {
        if let Some(billed) = world.billed.get(&entry.id)
            && entry.actual != i64::try_from(*billed).unwrap()
        {
            return Err(format!("{billed} tokens were billed, the ledger says {entry:?}"));
        }
    }
    for task in finished {
        if world.finished.get(task) != Some(&h.without_ledger(*task).await) {
            return Err(format!("finished run {task} changed"));
        }
        if h.results_of(*task).await != (1, 1) {
            return Err(format!("finished run {task} has not exactly one result"));
        }
    }
    Ok(())
}

/// The same actions from sixteen clients at once: whatever the interleaving, no call fails (a deadlock
/// would be one), no limit is exceeded and the books agree.
async fn sixteen_clients_with_random_histories_keep_the_books(h: Harness) {
    let seed = setting("ATLAS_PROPERTY_SEED", rand::rng().random());
    println!("ATLAS_PROPERTY_SEED={seed}");
    let each = setting("ATLAS_PROPERTY_STEPS", 300) / 10;
    let limits = Limits { daily: Tokens(4_000), run: Tokens(1_500) };
    let tasks: Vec<TaskId> = (0..12).map(|_| TaskId::random()).collect();
    // Two days in one history: what is open from yesterday is closed beside today's grants.
    for round in 0..2 {
        let clients = (0..16).map(|nr| {
            let (store, tasks) = (h.store.clone(), tasks.clone());
            let mut rng = StdRng::seed_from_u64(seed.wrapping_add(nr + 100 * round));
            tokio::spawn(async move {
                let worker = WorkerId(format!("client-{nr}"));
                let mut leases: Vec<Lease> = Vec::new();
                let mut open: Vec<(Option<Lease>, Reservation)> = Vec::new();
                for _ in 0..each {
                    let tenant =
                        [None, Some("acme"), Some("rival")].choose(&mut rng).unwrap().map(str::to_owned);
                    match rng.random_range(0..10) {
                        0..2 => {
                            let task = *tasks.choose(&mut rng).unwrap();
                            let wanted = ClaimRequest {
                                tenant,
                                worker: worker.clone(),
                                // Some leases are over at once, so that runs are taken over all the time.
                                lease: if rng.random_bool(0.5) { Duration::ZERO } else { LEASE },
                                ..request(task)
                            };
                            if let Claim::Claimed(run) = store.claim_run(&wanted).await.unwrap() {
                                leases.push(run.lease);
                            }
                        }
                        2 => {
                            let lease = if rng.random_bool(0.5) { Duration::ZERO } else { LEASE };
                            let runs = store.claim_due(&worker, 4, lease, limits).await.unwrap();
                            leases.extend(runs.into_iter().map(|run| run.lease));
                        }
                        3..6 => {
                            let lease =
                                leases.choose(&mut rng).filter(|_| rng.random_bool(0.8)).map(stale_copy);
                            let base = lease
                                .as_ref()
                                .map_or_else(|| crate::harness::ask_for_index(100), |lease| ask(lease, 100));
                            match store.reserve(&ReserveRequest { tenant, limits, ..base }).await {
                                Ok(ReserveOutcome::Granted(reservation)) => open.push((lease, reservation)),
                                Ok(ReserveOutcome::Denied(_)) => {}
                                Err(LedgerError::Fenced { .. }) => {
                                    leases.retain(|held| Some(held) != lease.as_ref());
                                }
                                Err(other) => panic!("{other}"),
                            }
                        }
                        6..8 => {
                            let Some((lease, reservation)) = open.pop() else { continue };
                            let closing = billed(rng.random_range(0..60), rng.random_range(0..40));
                            let Some(lease) = lease else {
                                store.close(reservation, closing).await.unwrap();
                                continue;
                            };
                            let paid = settlement(&reservation, closing);
                            match store.settle_step(&lease, &paid, &checkpoint("draft", "text")).await {
                                Ok(()) | Err(LedgerError::Fenced { .. }) => {}
                                Err(other) => panic!("{other}"),
                            }
                        }
                        8 => {
                            let Some(lease) = leases.pop() else { continue };
                            let waiting = answer(lease.task_id, AnswerType::Progress, "waiting");
                            match store.defer_run(lease, Tokens(50), "architect_out", &waiting, &[]).await {
                                Ok(_) | Err(LedgerError::Fenced { .. }) => {}
                                Err(other) => panic!("{other}"),
                            }
                        }
                        _ => {
                            let rows = store.outbox_take(3, Duration::ZERO).await.unwrap();
                            let ids: Vec<_> = rows.iter().map(|row| row.id).collect();
                            store.outbox_mark_sent(&ids).await.unwrap();
                        }
                    }
                }
            })
        });
        for client in clients.collect::<Vec<_>>() {
            client.await.unwrap();
        }
        let books = h.assert_books_agree().await;
        for ((day, scope), account) in &books.days {
            // Every bill stayed within its reservation here, so the limit holds for what was billed too.
            assert!(account.used + account.reserved <= 4_000, "{day} {scope}: {account:?}");
        }
        h.pass_midnight().await;
    }
    // Whatever state the runs are in, they can all be finished, once.
    h.advance(LEASE * 2).await;
    for run in h.due_under(100, AMPLE).await {
        let task = run.lease.task_id;
        h.store.finish_run(run.lease, &done(task)).await.unwrap();
        assert_eq!(h.results_of(task).await, (1, 1));
    }
    h.assert_books_agree().await;
}
