//! The guarantees, and what the checker has to remember to judge them.

use stateright::{Model as _, Property};

use crate::{
    config::{CALLS, DAYS, TASKS},
    model::{Action, At, Protocol, State, Work},
    store::{Outbox, Status},
};

pub(crate) const ONE_RESULT: &str = "a task has at most one result row";
pub(crate) const STALE_CHANGES_NOTHING: &str = "a stale worker changes nothing";
pub(crate) const FINAL_NEVER_CHANGES: &str = "a finished run never changes";
pub(crate) const DAY_LIMIT: &str = "billed tokens never exceed the day's limit";
pub(crate) const RUN_LIMIT: &str = "billed tokens never exceed the run's limit";
pub(crate) const LEDGER_COVERS: &str = "the ledger never says less than was billed";
pub(crate) const NEVER_PAID_AGAIN: &str = "a settled call is never paid again";
pub(crate) const DURABLE_BEFORE_ACK: &str = "no message is acked before it is stored";
pub(crate) const NO_DELIVERY_BURNT: &str = "a deferral burns no delivery attempt";
pub(crate) const PUBLISHED_IS_FINAL: &str = "only final results are published";
pub(crate) const REST_IS_FINAL: &str = "at rest every task is final and answered";
pub(crate) const REST_IS_BOOKED: &str = "at rest no reservation is open";

/// The guarantees of issue 3, as far as a state shows them.
pub(crate) fn guarantees() -> Vec<Property<Protocol>> {
    vec![
        Property::always(ONE_RESULT, |_, state: &State| {
            state.store.tasks.iter().all(|task| task.results <= 1)
        }),
        Property::always(STALE_CHANGES_NOTHING, |_, state: &State| !state.wrongs.stale_wrote),
        Property::always(FINAL_NEVER_CHANGES, |_, state: &State| !state.wrongs.final_changed),
        Property::always(DAY_LIMIT, |_, state: &State| {
            // A raised limit holds from then on; what was billed before was under the lower one.
            (0..DAYS).all(|day| {
                state.books.iter().map(|book| book.billed[day]).sum::<u8>() <= state.store.daily_limit
            })
        }),
        Property::always(RUN_LIMIT, |protocol: &Protocol, state: &State| {
            state
                .books
                .iter()
                .all(|book| book.earlier + book.billed.iter().sum::<u8>() <= protocol.config.run_limit)
        }),
        Property::always(LEDGER_COVERS, |_, state: &State| {
            (0..TASKS).all(|task| {
                let (book, stored) = (&state.books[task], &state.store.tasks[task]);
                book.earlier <= stored.earlier
                    && (0..DAYS).all(|day| book.billed[day] <= stored.committed_on(day))
            })
        }),
        Property::always(NEVER_PAID_AGAIN, |_, state: &State| !state.wrongs.paid_again),
        Property::always(DURABLE_BEFORE_ACK, |_, state: &State| !state.wrongs.acked_early),
        Property::always(NO_DELIVERY_BURNT, |_, state: &State| !state.wrongs.delivery_burnt),
        Property::always(PUBLISHED_IS_FINAL, |_, state: &State| {
            (0..TASKS).all(|task| !state.books[task].published || state.store.tasks[task].results == 1)
        }),
        Property::always(REST_IS_FINAL, |protocol: &Protocol, state: &State| {
            !at_rest(protocol, state)
                || (0_u8..).take(protocol.config.tasks).all(|task| is_finished(protocol, state, task))
        }),
        Property::always(REST_IS_BOOKED, |protocol: &Protocol, state: &State| {
            !at_rest(protocol, state)
                || state.store.tasks.iter().all(|task| task.rows.iter().all(Option::is_none))
        }),
    ]
}

/// Nothing will happen any more, unless something goes wrong.
pub(crate) fn at_rest(protocol: &Protocol, state: &State) -> bool {
    if state.workers.iter().any(|worker| !matches!(worker.at, At::Idle | At::Absent)) {
        return false;
    }
    let mut actions = Vec::new();
    protocol.progress(state, &mut actions);
    // A step that changes nothing is none: a message that nobody can take up, say.
    actions.into_iter().all(|action| protocol.next_state(state, action).is_none())
}

/// Has the task's message reached its one final state, and does the world know?
pub(crate) fn is_finished(protocol: &Protocol, state: &State, task: u8) -> bool {
    let (stored, message) = (state.store.task(task), state.queue[usize::from(task)]);
    if message.waiting > 0 || message.dead {
        return false;
    }
    match stored.run {
        None => stored.dead_letter,
        Some(run) => {
            !protocol.config.is_malformed(task)
                && run.is_final()
                && stored.results == 1
                && stored.outbox == Outbox::Sent
                && state.books[usize::from(task)].published
        }
    }
}

/// What the outside world and the checker know of one task.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Book {
    /// The API's meter, by the day for which the call was reserved.
    pub(crate) billed: [u8; DAYS],
    /// The same, of days whose books are closed.
    pub(crate) earlier: u8,
    /// The answer went out.
    pub(crate) published: bool,
    /// For each step, the attempt whose answer was settled; 0 for none.
    settled_by: [u8; CALLS],
}

impl Book {
    pub(crate) fn midnight_at_rest(&mut self) {
        self.earlier += self.billed.iter().sum::<u8>();
        self.billed = [0; DAYS];
    }

    pub(crate) fn settled(&mut self, work: Work) {
        let by = &mut self.settled_by[usize::from(work.step)];
        if *by == 0 {
            *by = work.lease.attempt;
        }
    }

    /// Was this step settled before this attempt could have begun it? An *earlier* attempt that lost its
    /// lease may still have a call under way, which its reservation covers.
    pub(crate) fn is_settled_before(self, attempt: u8, step: u8) -> bool {
        let by = self.settled_by[usize::from(step)];
        by != 0 && by <= attempt
    }
}

/// Breaches that a state alone would not show.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Wrong {
    pub(crate) acked_early: bool,
    pub(crate) paid_again: bool,
    pub(crate) stale_wrote: bool,
    pub(crate) final_changed: bool,
    pub(crate) delivery_burnt: bool,
}

/// Compares a step's two ends.
pub(crate) fn watch(last: &State, action: Action, next: &mut State) {
    for task in 0..TASKS {
        let (before, after) = (&last.store.tasks[task], &next.store.tasks[task]);
        if before.run.is_some_and(|run| matches!(run.status, Status::Done | Status::Failed)) {
            next.wrongs.final_changed |= (before.run, before.results) != (after.run, after.results);
        }
    }
    let (Action::Reserve { w }
    | Action::CloseReleased { w }
    | Action::CloseAssumed { w }
    | Action::SettleStep { w }
    | Action::FinishRun { w }
    | Action::DeferRun { w }
    | Action::ReleaseRun { w }
    | Action::RenewLease { w }
    | Action::AnswerLost { w }) = action
    else {
        return;
    };
    let Some(Work { lease, .. }) = last.workers[w].at.work() else { return };
    let (before, after) = (last.store.task(lease.task), next.store.task(lease.task));
    if !before.holds(lease) {
        next.wrongs.stale_wrote |= (before.run, before.steps, before.results, before.outbox)
            != (after.run, after.steps, after.results, after.outbox);
    }
}
