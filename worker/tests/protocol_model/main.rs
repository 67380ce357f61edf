//! A model of the protocol: claim, lease, reserve, call, settle, finish, outbox, defer, dead letters, with
//! crashes, stalls, lost answers and duplicates between any two steps.
//!
//! [`stateright`] walks through *every* interleaving within the bounds of a [`Config`] and holds each state
//! against the guarantees ([`properties`]). docs/GUARANTEES.md says which code each action stands for,
//! what the model leaves out, and which mutation each property caught.
//!
//! Three kinds of tests:
//! - **explorations** show that the protocol keeps its guarantees under one kind of fault, and (their
//!   *sights*) that the exploration really met what it is about;
//! - **liveness**: without further faults, every way on from every state ends with all answers sent;
//! - **mutations** break the protocol on purpose and show that the model sees it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test may fail loudly")]

mod config;
mod model;
mod properties;
mod store;

use std::collections::{BTreeSet, HashMap};

use stateright::{Checker as _, HasDiscoveries, Model as _};

use crate::{
    config::{CRASHES, Config, Faults, Mutation},
    model::{Action, At, Protocol, Sight, State},
    properties::{
        DAY_LIMIT, DURABLE_BEFORE_ACK, FINAL_NEVER_CHANGES, LEDGER_COVERS, NEVER_PAID_AGAIN,
        NO_DELIVERY_BURNT, ONE_RESULT, PUBLISHED_IS_FINAL, REST_IS_BOOKED, REST_IS_FINAL, RUN_LIMIT,
        STALE_CHANGES_NOTHING, at_rest, is_finished,
    },
    store::{Run, Status},
};

const NO_FAULTS: Faults = Faults { crashes: 0, ..CRASHES };

/// Visits every state, once for all states that differ only in names. Every guarantee must hold in each,
/// and every sight must be met in one.
fn explore(config: Config, sights: &'static [Sight]) {
    let mut protocol = Protocol::new(config);
    protocol.sights = sights;
    let tasks_alike = config.tasks == 2 && !config.malformed;
    let representative: fn(&State) -> State =
        if tasks_alike { |state| state.representative(true) } else { |state| state.representative(false) };
    let checker = protocol.checker().symmetry_fn(representative).spawn_dfs().join();
    println!("{} states, paths of up to {} steps", checker.unique_state_count(), checker.max_depth());
    checker.assert_properties();
}

// ---------------------------------------------------------------------------------------- sights

fn all_done(protocol: &Protocol, state: &State) -> bool {
    at_rest(protocol, state)
        && state
            .store
            .tasks
            .iter()
            .take(protocol.config.tasks)
            .all(|task| task.run.is_some_and(|run| run.status == Status::Done))
}

const ALL_DONE: Sight = ("all tasks get done", all_done);
const ALL_CRASHED_AND_DONE: Sight = ("every worker has crashed and all tasks get done", |protocol, state| {
    all_done(protocol, state) && state.workers.iter().all(|worker| worker.crashes == 0)
});
const ASSUMED: Sight = ("a dead attempt's call is booked although it billed nothing", |protocol, state| {
    all_done(protocol, state)
        && state
            .store
            .tasks
            .iter()
            .zip(&state.books)
            .any(|(task, book)| task.committed() > book.earlier + book.billed.iter().sum::<u8>())
});
const OUTLIVED: Sight = ("a stale worker meets the fence of a finished run", |_, state| {
    state.workers.iter().any(|worker| {
        matches!(worker.at, At::Answered(work, _)
            if state.store.task(work.lease.task).run.is_some_and(Run::is_final))
    })
});
const DEFERRED_THEN_DONE: Sight = ("a deferred run gets done", |_, state| {
    state
        .store
        .tasks
        .iter()
        .any(|task| task.run.is_some_and(|run| run.status == Status::Done && run.deferrals > 0))
});
const OUT_OF_RUN_BUDGET: Sight = ("a run fails because its own limit is used up", |_, state| {
    state.workers.iter().any(|worker| matches!(worker.at, At::Failing(_)))
});
const RETRIED_THEN_DONE: Sight = ("a run that was given back gets done", |_, state| {
    state
        .store
        .tasks
        .iter()
        .any(|task| task.run.is_some_and(|run| run.status == Status::Done && run.attempt > 1))
});
const FAILED: Sight = ("a run fails for good", |_, state| {
    state.store.tasks.iter().any(|task| task.run.is_some_and(|run| run.status == Status::Failed))
});
const ONLY_DEAD_LETTER: Sight =
    ("a message that nobody could claim ends in dead_letters", |protocol, state| {
        at_rest(protocol, state) && state.store.tasks[0].dead_letter && state.store.tasks[0].run.is_none()
    });
const DEAD_LETTER_OF_DONE: Sight = ("the message of a done run goes to the dead letters", |_, state| {
    state
        .store
        .tasks
        .iter()
        .any(|task| task.dead_letter && task.run.is_some_and(|run| run.status == Status::Done))
});

// ---------------------------------------------------------------------------------- explorations

#[test]
fn three_workers_that_crash_once_each_lose_nothing_and_pay_no_settled_call_again() {
    explore(
        Config { calls: 2, faults: CRASHES, ..Config::default() },
        &[ALL_DONE, ALL_CRASHED_AND_DONE, ASSUMED],
    );
}

#[test]
fn a_message_delivered_again_gives_no_second_result() {
    explore(
        Config { faults: Faults { duplicates: 1, ..CRASHES }, ..Config::default() },
        &[ALL_CRASHED_AND_DONE],
    );
}

#[test]
fn a_worker_that_outlives_its_lease_is_fenced_off() {
    explore(
        Config {
            tasks: 1,
            calls: 2,
            faults: Faults { stalls: 1, duplicates: 1, ..CRASHES },
            ..Config::default()
        },
        &[ALL_CRASHED_AND_DONE, OUTLIVED],
    );
}

#[test]
fn two_tasks_whose_workers_outlive_their_leases_do_not_disturb_each_other() {
    explore(
        Config { workers: 2, faults: Faults { stalls: 1, ..CRASHES }, ..Config::default() },
        &[ALL_CRASHED_AND_DONE, OUTLIVED],
    );
}

#[test]
fn an_exhausted_day_defers_and_resumes_at_midnight() {
    explore(
        Config {
            workers: 2,
            daily_limit: 3,
            bills: &[1, 2],
            faults: Faults { midnights: 1, ..CRASHES },
            ..Config::default()
        },
        &[ALL_CRASHED_AND_DONE, DEFERRED_THEN_DONE],
    );
}

#[test]
fn an_exhausted_day_defers_and_resumes_when_the_limit_is_raised() {
    explore(
        Config { daily_limit: 2, raised_limit: Some(4), faults: CRASHES, ..Config::default() },
        &[ALL_CRASHED_AND_DONE, DEFERRED_THEN_DONE],
    );
}

#[test]
fn failed_and_timed_out_calls_stay_within_the_runs_limit() {
    explore(
        Config {
            workers: 2,
            run_limit: 4,
            max_run_attempts: 2,
            faults: Faults { failures: 1, timeouts: 1, ..CRASHES },
            ..Config::default()
        },
        &[ALL_DONE, OUT_OF_RUN_BUDGET, RETRIED_THEN_DONE, FAILED],
    );
}

#[test]
fn a_store_call_whose_answer_was_lost_can_be_made_again() {
    explore(
        Config { workers: 2, calls: 2, faults: Faults { lost_answers: 1, ..CRASHES }, ..Config::default() },
        &[ALL_CRASHED_AND_DONE, RETRIED_THEN_DONE],
    );
}

#[test]
fn a_draining_worker_hands_its_run_over() {
    explore(
        Config { workers: 2, faults: Faults { drains: 1, duplicates: 1, ..CRASHES }, ..Config::default() },
        &[ALL_CRASHED_AND_DONE, RETRIED_THEN_DONE],
    );
}

#[test]
fn what_cannot_be_delivered_or_read_ends_in_the_dead_letters() {
    explore(
        Config {
            max_deliveries: 2,
            malformed: true,
            faults: Faults { duplicates: 1, ..CRASHES },
            ..Config::default()
        },
        &[ONLY_DEAD_LETTER, DEAD_LETTER_OF_DONE, FAILED],
    );
}

/// The larger ones: minutes each in a debug build.
#[test]
#[ignore = "minutes: the same faults, with a third worker or all at once"]
fn the_guarantees_hold_in_the_large_explorations_too() {
    let stalls = Faults { stalls: 1, ..CRASHES };
    explore(Config { faults: stalls, ..Config::default() }, &[ALL_CRASHED_AND_DONE, OUTLIVED]);
    explore(
        Config { daily_limit: 3, faults: Faults { midnights: 1, ..CRASHES }, ..Config::default() },
        &[ALL_CRASHED_AND_DONE, DEFERRED_THEN_DONE],
    );
    explore(
        Config {
            workers: 2,
            run_limit: 4,
            max_run_attempts: 2,
            faults: Faults { failures: 1, timeouts: 1, ..stalls },
            ..Config::default()
        },
        &[ALL_DONE, OUT_OF_RUN_BUDGET, FAILED],
    );
    explore(
        Config { workers: 2, calls: 2, faults: Faults { lost_answers: 2, ..stalls }, ..Config::default() },
        &[ALL_CRASHED_AND_DONE],
    );
    explore(
        Config {
            workers: 2,
            calls: 2,
            daily_limit: 4,
            faults: Faults { lost_answers: 1, failures: 1, ..CRASHES },
            ..Config::default()
        },
        &[ALL_CRASHED_AND_DONE, DEFERRED_THEN_DONE, RETRIED_THEN_DONE],
    );
    explore(
        Config {
            tasks: 1,
            calls: 2,
            bills: &[1, 2],
            faults: Faults { duplicates: 1, ..stalls },
            ..Config::default()
        },
        &[ALL_CRASHED_AND_DONE, OUTLIVED],
    );
    explore(
        Config { workers: 2, faults: Faults { drains: 1, duplicates: 1, ..stalls }, ..Config::default() },
        &[ALL_CRASHED_AND_DONE],
    );
    explore(
        Config {
            workers: 2,
            max_deliveries: 2,
            faults: Faults { duplicates: 1, ..stalls },
            ..Config::default()
        },
        &[ALL_DONE, DEAD_LETTER_OF_DONE],
    );
}

// -------------------------------------------------------------------------------------- liveness

/// Collects all reachable states, then takes away, again and again, those from which every fault-free step
/// leads to one that was taken away before. What would be left are endless loops.
fn always_ends_well(config: Config) {
    let protocol = Protocol::new(config);
    let mut numbers: HashMap<State, usize> = HashMap::new();
    let mut states = Vec::new();
    for state in protocol.init_states() {
        numbers.insert(state, states.len());
        states.push(state);
    }
    let (mut before, mut ways_on) = (vec![Vec::new()], vec![0_usize]);
    let (mut steps, mut faultless): (Vec<Action>, Vec<Action>) = (Vec::new(), Vec::new());
    let mut visited = 0;
    while let Some(&state) = states.get(visited) {
        steps.clear();
        faultless.clear();
        protocol.actions(&state, &mut steps);
        protocol.progress(&state, &mut faultless);
        for &action in &steps {
            let Some(next) = protocol.next_state(&state, action) else { continue };
            let next = next.representative(true);
            let number = *numbers.entry(next).or_insert_with(|| {
                states.push(next);
                before.push(Vec::new());
                ways_on.push(0);
                states.len() - 1
            });
            if faultless.contains(&action) {
                before[number].push(visited);
                ways_on[visited] += 1;
            }
        }
        visited += 1;
    }

    let mut ended: Vec<usize> = (0..states.len()).filter(|&number| ways_on[number] == 0).collect();
    for &number in &ended {
        let state = &states[number];
        assert!((0..2).all(|task| is_finished(&protocol, state, task)), "stuck before the end: {state:?}");
    }
    let mut taken = 0;
    while let Some(number) = ended.pop() {
        taken += 1;
        for &former in &before[number] {
            ways_on[former] -= 1;
            if ways_on[former] == 0 {
                ended.push(former);
            }
        }
    }
    println!("{taken} of {} states lead to the end", states.len());
    assert_eq!(taken, states.len(), "some fault-free path never ends");
}

#[test]
fn without_further_faults_every_path_from_every_state_ends_with_all_answers_sent() {
    always_ends_well(Config {
        workers: 2,
        daily_limit: 3,
        faults: Faults { duplicates: 1, ..CRASHES },
        ..Config::default()
    });
}

#[test]
fn a_stalled_and_a_failing_attempt_lead_to_an_end_too() {
    always_ends_well(Config {
        workers: 2,
        max_run_attempts: 2,
        faults: Faults { stalls: 1, failures: 1, ..CRASHES },
        ..Config::default()
    });
}

// ------------------------------------------------------------------------------------- mutations

/// Breaks the protocol and looks for a path on which `property` does not hold. The same
/// configuration without the mutation must keep every guarantee.
fn is_caught(mutation: Mutation, config: Config, property: &'static str) {
    let broken = Config { mutation: Some(mutation), ..config };
    let checker = Protocol::new(broken)
        .checker()
        .finish_when(HasDiscoveries::AnyOf(BTreeSet::from([property])))
        .spawn_bfs()
        .join();
    let path = checker.assert_any_discovery(property);
    let steps: Vec<String> = path.into_actions().iter().map(|action| format!("{action:?}")).collect();
    println!("{mutation:?} breaks {property:?}:\n  {}", steps.join("\n  "));
    explore(config, &[]);
}

/// One task and two workers are enough for most.
const SMALL: Config = Config { tasks: 1, workers: 2, bills: &[2], ..Config::BASE };

#[test]
fn dropping_the_fence_check_is_caught() {
    let config = Config { faults: Faults { stalls: 1, ..NO_FAULTS }, ..SMALL };
    is_caught(Mutation::NoFenceCheck, config, STALE_CHANGES_NOTHING);
    is_caught(Mutation::NoFenceCheck, config, ONE_RESULT);
}

#[test]
fn checking_then_adding_instead_of_an_atomic_reserve_is_caught() {
    let config = Config { tasks: 2, daily_limit: 3, faults: NO_FAULTS, ..SMALL };
    is_caught(Mutation::CheckThenAdd, config, DAY_LIMIT);
}

#[test]
fn acking_before_the_claim_is_caught() {
    is_caught(Mutation::AckBeforeClaim, SMALL, DURABLE_BEFORE_ACK);
    is_caught(Mutation::AckBeforeClaim, SMALL, REST_IS_FINAL);
}

#[test]
fn claiming_a_finished_run_is_caught() {
    let config = Config { faults: Faults { duplicates: 1, ..NO_FAULTS }, ..SMALL };
    is_caught(Mutation::ClaimTakesFinishedRuns, config, FINAL_NEVER_CHANGES);
}

#[test]
fn finishing_in_two_transactions_is_caught() {
    is_caught(Mutation::FinishInTwoTransactions, SMALL, ONE_RESULT);
}

#[test]
fn finishing_without_an_outbox_row_is_caught() {
    is_caught(Mutation::FinishWithoutOutboxRow, SMALL, REST_IS_FINAL);
}

#[test]
fn publishing_before_the_finish_is_caught() {
    is_caught(Mutation::PublishBeforeFinish, SMALL, PUBLISHED_IS_FINAL);
}

#[test]
fn forgetting_the_outbox_sweep_is_caught() {
    is_caught(Mutation::NoOutboxSweep, SMALL, REST_IS_FINAL);
}

#[test]
fn marking_before_publishing_is_caught() {
    is_caught(Mutation::MarkBeforePublish, SMALL, REST_IS_FINAL);
}

#[test]
fn forgetting_the_sweep_of_expired_leases_is_caught() {
    is_caught(Mutation::NoExpiredLeaseSweep, SMALL, REST_IS_FINAL);
}

#[test]
fn forgetting_the_sweep_of_deferred_runs_is_caught() {
    let config = Config { tasks: 2, daily_limit: 3, faults: NO_FAULTS, ..SMALL };
    is_caught(Mutation::NoDeferredSweep, config, REST_IS_FINAL);
}

#[test]
fn settling_without_a_checkpoint_is_caught() {
    is_caught(Mutation::SettleWithoutCheckpoint, Config { calls: 2, ..SMALL }, NEVER_PAID_AGAIN);
}

#[test]
fn forgetting_to_book_a_dead_attempts_reservation_is_caught() {
    is_caught(Mutation::TakeoverForgetsOpenReservations, SMALL, REST_IS_BOOKED);
}

#[test]
fn giving_a_dead_attempts_reservation_back_is_caught() {
    is_caught(Mutation::TakeoverReleasesOpenReservations, SMALL, LEDGER_COVERS);
    let config = Config { daily_limit: 3, ..SMALL };
    is_caught(Mutation::TakeoverReleasesOpenReservations, config, DAY_LIMIT);
}

#[test]
fn releasing_a_call_that_timed_out_is_caught() {
    let config = Config { faults: Faults { timeouts: 1, ..NO_FAULTS }, ..SMALL };
    is_caught(Mutation::TimeoutReleases, config, LEDGER_COVERS);
}

#[test]
fn a_run_limit_that_forgets_earlier_attempts_is_caught() {
    let config = Config { run_limit: 3, ..SMALL };
    is_caught(Mutation::RunLimitForgetsEarlierAttempts, config, RUN_LIMIT);
}

#[test]
fn settling_on_todays_account_is_caught() {
    let config = Config { faults: Faults { midnights: 1, ..NO_FAULTS }, ..SMALL };
    is_caught(Mutation::SettleOnToday, config, LEDGER_COVERS);
}

#[test]
fn nacking_instead_of_deferring_is_caught() {
    let config = Config { tasks: 2, daily_limit: 3, faults: NO_FAULTS, ..SMALL };
    is_caught(Mutation::NackInsteadOfDefer, config, NO_DELIVERY_BURNT);
}

#[test]
fn acking_before_the_dead_letter_is_stored_is_caught() {
    let config = Config { max_deliveries: 1, ..SMALL };
    is_caught(Mutation::AckBeforeDeadLetter, config, DURABLE_BEFORE_ACK);
    is_caught(Mutation::AckBeforeDeadLetter, config, REST_IS_FINAL);
}
