//! Workers, queue and store as one transition system.
//!
//! An [`Action`] is one step that the rest of the world can see: one transaction of the store, one
//! message, one call, one fault. Between any two of them anything else may happen.

use stateright::{Model, Property};

use crate::{
    config::{CALLS, Config, DAYS, Faults, Mutation, RESERVED, TASKS, WORKERS},
    properties::{self, Book, Wrong},
    store::{Claim, Closing, Fenced, Lease, Outbox, Reserve, Status, Store, Stored},
};

/// An attempt at work: what a worker has in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Work {
    pub(crate) lease: Lease,
    /// The model call it is at.
    pub(crate) step: u8,
}

/// Why a run is given back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Because {
    /// The model cannot be reached: try later. The message is acked.
    Failure,
    /// This worker shuts down. The message is nacked, so that another one starts at once.
    Drain,
    /// Only with `NackInsteadOfDefer`: no tokens. The message is nacked.
    Denial,
}

/// Where a worker is, named after what it does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum At {
    /// This check has fewer workers.
    Absent,
    Idle,
    /// Has a message: claims.
    Pulled {
        task: u8,
    },
    /// Has a lease: reserves.
    Claimed(Work),
    /// Only with `CheckThenAdd`: saw enough tokens, adds.
    Checked(Work),
    /// Has a reservation: calls the model.
    Reserved(Work),
    /// The model answered and billed so much: settles the step, or finishes.
    Answered(Work, u8),
    /// The call failed and billed nothing: gives the reservation back.
    CallFailed(Work),
    /// The call failed, who knows what it billed: books it as assumed, then tries again.
    CallTimedOut(Work),
    /// The day's limit said no: defers.
    Denied(Work),
    /// Gives the run back.
    GivingBack {
        work: Work,
        because: Because,
    },
    /// Cannot be done: finishes as failed.
    Failing(Work),
    /// Only with `FinishInTwoTransactions` and `PublishBeforeFinish`: did the one, does the other.
    HalfFinished(Work),
    /// Holds an outbox row: publishes it.
    Publishing {
        task: u8,
    },
    /// Marks the row as sent (if `mark`) and acks the message (if there is one), in any order.
    Ending {
        task: u8,
        mark: bool,
    },
    /// Has a message of the dead-letter subscription: records it.
    PulledDead {
        task: u8,
    },
    /// Recorded it: acks.
    EndingDead {
        task: u8,
    },
}

impl At {
    /// The attempt it works on.
    pub(crate) fn work(self) -> Option<Work> {
        match self {
            Self::Claimed(work)
            | Self::Checked(work)
            | Self::Reserved(work)
            | Self::Answered(work, _)
            | Self::CallFailed(work)
            | Self::CallTimedOut(work)
            | Self::Denied(work)
            | Self::GivingBack { work, .. }
            | Self::Failing(work)
            | Self::HalfFinished(work) => Some(work),
            _ => None,
        }
    }

    fn swap_tasks(self) -> Self {
        let swap = |task: u8| 1 - task;
        let swapped =
            |work: Work| Work { lease: Lease { task: swap(work.lease.task), ..work.lease }, ..work };
        match self {
            Self::Absent | Self::Idle => self,
            Self::Pulled { task } => Self::Pulled { task: swap(task) },
            Self::Claimed(work) => Self::Claimed(swapped(work)),
            Self::Checked(work) => Self::Checked(swapped(work)),
            Self::Reserved(work) => Self::Reserved(swapped(work)),
            Self::Answered(work, billed) => Self::Answered(swapped(work), billed),
            Self::CallFailed(work) => Self::CallFailed(swapped(work)),
            Self::CallTimedOut(work) => Self::CallTimedOut(swapped(work)),
            Self::Denied(work) => Self::Denied(swapped(work)),
            Self::GivingBack { work, because } => Self::GivingBack { work: swapped(work), because },
            Self::Failing(work) => Self::Failing(swapped(work)),
            Self::HalfFinished(work) => Self::HalfFinished(swapped(work)),
            Self::Publishing { task } => Self::Publishing { task: swap(task) },
            Self::Ending { task, mark } => Self::Ending { task: swap(task), mark },
            Self::PulledDead { task } => Self::PulledDead { task: swap(task) },
            Self::EndingDead { task } => Self::EndingDead { task: swap(task) },
        }
    }
}

/// A worker. Everything here is lost when it crashes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Worker {
    pub(crate) at: At,
    /// It holds the delivery of its task's message, and will ack or nack it.
    pub(crate) delivery: bool,
    /// How often it may still crash.
    pub(crate) crashes: u8,
}

/// Pub/Sub's side of one task: its request's message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Message {
    /// Copies that wait to be delivered.
    pub(crate) waiting: u8,
    /// Deliveries so far (counted only with a dead-letter policy).
    pub(crate) deliveries: u8,
    /// Waits on the dead-letter subscription.
    pub(crate) dead: bool,
}

/// Everything.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct State {
    pub(crate) store: Store,
    pub(crate) queue: [Message; TASKS],
    pub(crate) workers: [Worker; WORKERS],
    /// What can still go wrong (crashes are counted at the workers).
    pub(crate) faults: Faults,
    /// What the checker alone knows.
    pub(crate) books: [Book; TASKS],
    /// Breaches that a state alone would not show.
    pub(crate) wrongs: Wrong,
}

/// One step. `w` is a worker, `t` a task. docs/GUARANTEES.md says which code each stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    // What workers do.
    Pull { w: usize, t: u8 },
    ClaimRun { w: usize },
    ClaimDue { w: usize, t: u8 },
    Reserve { w: usize },
    CallModel { w: usize, billed: u8 },
    CloseReleased { w: usize },
    CloseAssumed { w: usize },
    SettleStep { w: usize },
    FinishRun { w: usize },
    DeferRun { w: usize },
    ReleaseRun { w: usize },
    RenewLease { w: usize },
    OutboxTake { w: usize, t: u8 },
    Publish { w: usize },
    OutboxMarkSent { w: usize },
    Ack { w: usize },
    PullDead { w: usize, t: u8 },
    RecordDeadLetter { w: usize },
    // What time and the queue do by themselves.
    LeaseExpires { t: u8 },
    HoldExpires { t: u8 },
    ForwardToDeadLetters { t: u8 },
    MidnightAtRest,
    // Faults, and what people do.
    Crash { w: usize },
    StallLease { t: u8 },
    StallHold { t: u8 },
    CallFails { w: usize },
    CallTimesOut { w: usize, billed: u8 },
    AnswerLost { w: usize },
    Drain { w: usize },
    Redeliver { t: u8 },
    SetBudget,
    Midnight,
}

/// Something that some path must show.
pub(crate) type Sight = (&'static str, fn(&Protocol, &State) -> bool);

/// The protocol, under one [`Config`].
#[derive(Clone, Debug)]
pub(crate) struct Protocol {
    pub(crate) config: Config,
    /// What this check must meet on its way, or it proves nothing.
    pub(crate) sights: &'static [Sight],
}

impl Protocol {
    pub(crate) fn new(config: Config) -> Self {
        assert!(usize::from(config.calls) <= CALLS && config.bills.iter().all(|bill| *bill <= RESERVED));
        Self { config, sights: &[] }
    }

    fn tasks(&self) -> impl Iterator<Item = u8> + use<> {
        (0_u8..).take(self.config.tasks)
    }

    fn init(&self) -> State {
        let config = &self.config;
        let worker = |w| Worker {
            at: if w < config.workers { At::Idle } else { At::Absent },
            delivery: false,
            crashes: if w < config.workers { config.faults.crashes } else { 0 },
        };
        let message = |t| Message { waiting: u8::from(t < config.tasks), deliveries: 0, dead: false };
        State {
            store: Store { tasks: [Stored::EMPTY; TASKS], day: 0, daily_limit: config.daily_limit },
            queue: std::array::from_fn(message),
            workers: std::array::from_fn(worker),
            faults: Faults { crashes: 0, ..config.faults },
            books: [Book::default(); TASKS],
            wrongs: Wrong::default(),
        }
    }

    /// What happens without any further fault. If there is nothing, the system is at rest.
    pub(crate) fn progress(&self, state: &State, actions: &mut Vec<Action>) {
        for (w, worker) in state.workers.into_iter().enumerate() {
            self.worker_actions(state, w, worker, actions);
        }
        for t in self.tasks() {
            let stored = state.store.task(t);
            if stored.run.is_some_and(|run| run.status == Status::Running && !run.lapsed)
                && !state.has_holder(t)
            {
                actions.push(Action::LeaseExpires { t });
            }
            if stored.outbox == Outbox::Held && !state.has_sender(t) {
                actions.push(Action::HoldExpires { t });
            }
            if state.queue[usize::from(t)].waiting > 0 && self.deliveries_used_up(state, t) {
                actions.push(Action::ForwardToDeadLetters { t });
            }
        }
        let deferred = |stored: &Stored| stored.run.is_some_and(|run| run.status == Status::Deferred);
        if actions.is_empty() && state.store.tasks.iter().any(deferred) {
            actions.push(Action::MidnightAtRest);
        }
    }

    fn worker_actions(&self, state: &State, w: usize, worker: Worker, actions: &mut Vec<Action>) {
        let config = &self.config;
        match worker.at {
            At::Absent => {}
            At::Idle => {
                for t in self.tasks() {
                    let message = state.queue[usize::from(t)];
                    if message.waiting > 0 && !self.deliveries_used_up(state, t) {
                        actions.push(Action::Pull { w, t });
                    }
                    if message.dead {
                        actions.push(Action::PullDead { w, t });
                    }
                    if state.store.is_due(config, t) {
                        actions.push(Action::ClaimDue { w, t });
                    }
                    if state.store.task(t).outbox == Outbox::Unsent
                        && config.mutation != Some(Mutation::NoOutboxSweep)
                    {
                        actions.push(Action::OutboxTake { w, t });
                    }
                }
            }
            At::Pulled { task } if config.is_malformed(task) => actions.push(Action::RecordDeadLetter { w }),
            At::Pulled { .. } => actions.push(Action::ClaimRun { w }),
            At::Claimed(_) | At::Checked(_) => actions.push(Action::Reserve { w }),
            At::Reserved(_) => {
                actions.extend(config.bills.iter().map(|&billed| Action::CallModel { w, billed }));
            }
            At::Answered(work, _) if work.step + 1 < config.calls => actions.push(Action::SettleStep { w }),
            At::Answered(..) | At::Failing(_) | At::HalfFinished(_) => actions.push(Action::FinishRun { w }),
            At::CallFailed(_) => actions.push(Action::CloseReleased { w }),
            At::CallTimedOut(_) => actions.push(Action::CloseAssumed { w }),
            At::Denied(_) => actions.push(Action::DeferRun { w }),
            At::GivingBack { .. } => actions.push(Action::ReleaseRun { w }),
            At::Publishing { .. } => actions.push(Action::Publish { w }),
            At::Ending { mark, .. } => {
                if worker.delivery {
                    actions.push(Action::Ack { w });
                }
                if mark {
                    actions.push(Action::OutboxMarkSent { w });
                }
            }
            At::PulledDead { .. } => actions.push(Action::RecordDeadLetter { w }),
            At::EndingDead { .. } => actions.push(Action::Ack { w }),
        }
        // The renewal comes now and then; it matters when the lease expired, or is another's.
        if let At::Claimed(work) | At::Reserved(work) = worker.at {
            let stored = state.store.task(work.lease.task);
            let lapsed = stored.run.is_some_and(|run| run.lapsed);
            if lapsed || !stored.holds(work.lease) {
                actions.push(Action::RenewLease { w });
            }
        }
    }

    fn faults(&self, state: &State, actions: &mut Vec<Action>) {
        let left = state.faults;
        for (w, worker) in state.workers.iter().enumerate() {
            // An idle worker that crashes loses nothing and changes nothing.
            if worker.crashes > 0 && !matches!(worker.at, At::Idle | At::Absent) {
                actions.push(Action::Crash { w });
            }
            if let At::Reserved(_) = worker.at {
                if left.failures > 0 {
                    actions.push(Action::CallFails { w });
                }
                if left.timeouts > 0 {
                    actions.push(Action::CallTimesOut { w, billed: 0 });
                    actions
                        .extend(self.config.bills.iter().map(|&billed| Action::CallTimesOut { w, billed }));
                }
            }
            let calls_store = matches!(
                worker.at,
                At::Claimed(_)
                    | At::Answered(..)
                    | At::CallFailed(_)
                    | At::CallTimedOut(_)
                    | At::Denied(_)
                    | At::GivingBack { .. }
                    | At::Failing(_)
            );
            if left.lost_answers > 0 && calls_store {
                actions.push(Action::AnswerLost { w });
            }
            if left.drains > 0 && matches!(worker.at, At::Claimed(_) | At::Reserved(_)) {
                actions.push(Action::Drain { w });
            }
        }
        for t in self.tasks() {
            let stored = state.store.task(t);
            if left.stalls > 0 {
                if stored.run.is_some_and(|run| run.status == Status::Running && !run.lapsed)
                    && state.has_holder(t)
                {
                    actions.push(Action::StallLease { t });
                }
                if stored.outbox == Outbox::Held && state.has_sender(t) {
                    actions.push(Action::StallHold { t });
                }
            }
            if left.duplicates > 0 {
                actions.push(Action::Redeliver { t });
            }
        }
        if self.config.raised_limit.is_some_and(|raised| raised != state.store.daily_limit) {
            actions.push(Action::SetBudget);
        }
        if left.midnights > 0 && usize::from(state.store.day) + 1 < DAYS {
            actions.push(Action::Midnight);
        }
    }

    fn deliveries_used_up(&self, state: &State, t: u8) -> bool {
        let limit = self.config.max_deliveries;
        limit > 0 && state.queue[usize::from(t)].deliveries >= limit
    }

    /// Carries out the store call that the worker is at. Gives where it is then.
    fn store_call(&self, state: &mut State, w: usize) -> At {
        let config = &self.config;
        let store = &mut state.store;
        let at = state.workers[w].at;
        let Some(work) = at.work() else { return at };
        let (lease, task) = (work.lease, work.lease.task);
        let fenced = At::Ending { task, mark: false };
        let went = match at {
            At::Claimed(_) if config.mutation == Some(Mutation::CheckThenAdd) => {
                store.reserve_check(config, lease).map(|outcome| match outcome {
                    Reserve::Granted => At::Checked(work),
                    Reserve::DeniedByRun => At::Failing(work),
                    Reserve::DeniedByDay => At::Denied(work),
                })
            }
            At::Checked(_) => {
                store.reserve_add(lease);
                Ok(At::Reserved(work))
            }
            At::Claimed(_) => store.reserve(config, lease).map(|outcome| match outcome {
                Reserve::Granted => At::Reserved(work),
                Reserve::DeniedByRun => At::Failing(work),
                Reserve::DeniedByDay if config.mutation == Some(Mutation::NackInsteadOfDefer) => {
                    At::GivingBack { work, because: Because::Denial }
                }
                Reserve::DeniedByDay => At::Denied(work),
            }),
            At::Answered(_, billed) if work.step + 1 < config.calls => {
                let settled = store.settle_step(config, lease, work.step, billed);
                if settled.is_ok() {
                    state.books[usize::from(task)].settled(work);
                }
                settled.map(|()| At::Claimed(Work { step: work.step + 1, ..work }))
            }
            At::Answered(..) if config.mutation == Some(Mutation::FinishInTwoTransactions) => {
                store.tasks[usize::from(task)].results += u8::from(store.task(task).holds(lease));
                Ok(At::HalfFinished(work))
            }
            At::Answered(..) if config.mutation == Some(Mutation::PublishBeforeFinish) => {
                state.books[usize::from(task)].published = true;
                Ok(At::HalfFinished(work))
            }
            At::HalfFinished(_) => {
                let results = store.task(task).results;
                let finished = store.finish_run(config, lease, Status::Done, None);
                if config.mutation == Some(Mutation::FinishInTwoTransactions) {
                    store.tasks[usize::from(task)].results = results;
                }
                finished.map(|()| At::Publishing { task })
            }
            At::Answered(_, billed) => {
                store.finish_run(config, lease, Status::Done, Some(billed)).map(|()| At::Publishing { task })
            }
            At::Failing(_) => {
                store.finish_run(config, lease, Status::Failed, None).map(|()| At::Publishing { task })
            }
            At::CallFailed(_) => {
                store.close(config, lease, Closing::Released);
                let failures = lease.attempt - store.task(task).run.map_or(0, |run| run.deferrals);
                Ok(if failures >= config.max_run_attempts {
                    At::Failing(work)
                } else {
                    At::GivingBack { work, because: Because::Failure }
                })
            }
            At::CallTimedOut(_) => {
                let released = config.mutation == Some(Mutation::TimeoutReleases);
                store.close(config, lease, if released { Closing::Released } else { Closing::Assumed });
                Ok(At::Claimed(work))
            }
            At::Denied(_) => store.defer_run(config, lease).map(|()| At::Ending { task, mark: false }),
            At::GivingBack { because, .. } => store.release_run(config, lease).map(|()| {
                if because != Because::Failure && state.workers[w].delivery {
                    state.workers[w].delivery = false;
                    state.queue[usize::from(task)].waiting += 1;
                    state.wrongs.delivery_burnt |= because == Because::Denial;
                }
                At::Ending { task, mark: false }
            }),
            _ => Ok(at),
        };
        went.unwrap_or(fenced)
    }

    fn claimed(&self, state: &State, task: u8, claim: Claim) -> At {
        let Claim::Claimed { lease, steps, taken_over } = claim else {
            return At::Ending { task, mark: false };
        };
        let work = Work { lease, step: steps.min(self.config.calls - 1) };
        let deferrals = state.store.task(task).run.map_or(0, |run| run.deferrals);
        if taken_over && lease.attempt - deferrals > self.config.max_run_attempts {
            At::Failing(work)
        } else {
            At::Claimed(work)
        }
    }

    fn step(&self, state: &mut State, action: Action) {
        let config = &self.config;
        match action {
            Action::Pull { w, t } => {
                let message = &mut state.queue[usize::from(t)];
                message.waiting -= 1;
                message.deliveries += u8::from(config.max_deliveries > 0);
                state.workers[w].at = At::Pulled { task: t };
                state.workers[w].delivery = true;
                if config.mutation == Some(Mutation::AckBeforeClaim) {
                    state.ack(w, t);
                }
            }
            Action::ClaimRun { w } => {
                if let At::Pulled { task } = state.workers[w].at {
                    let claim = state.store.claim_run(config, task);
                    state.workers[w].at = self.claimed(state, task, claim);
                }
            }
            Action::ClaimDue { w, t } => {
                let claim = state.store.claim_due(config, t);
                state.workers[w].at = self.claimed(state, t, claim);
            }
            Action::Reserve { w }
            | Action::CloseReleased { w }
            | Action::CloseAssumed { w }
            | Action::SettleStep { w }
            | Action::FinishRun { w }
            | Action::DeferRun { w }
            | Action::ReleaseRun { w } => state.workers[w].at = self.store_call(state, w),
            Action::AnswerLost { w } => {
                state.faults.lost_answers -= 1;
                self.store_call(state, w);
            }
            Action::CallModel { w, billed } => {
                if let At::Reserved(work) = state.workers[w].at {
                    state.bill(work, billed);
                    state.workers[w].at = At::Answered(work, billed);
                }
            }
            Action::CallFails { w } => {
                state.faults.failures -= 1;
                if let At::Reserved(work) = state.workers[w].at {
                    state.workers[w].at = At::CallFailed(work);
                }
            }
            Action::CallTimesOut { w, billed } => {
                state.faults.timeouts -= 1;
                if let At::Reserved(work) = state.workers[w].at {
                    state.bill(work, billed);
                    state.workers[w].at = At::CallTimedOut(work);
                }
            }
            Action::RenewLease { w } => {
                let at = state.workers[w].at;
                if let Some(work) = at.work()
                    && state.store.renew_lease(work.lease) == Err(Fenced)
                {
                    // Stopped before the call was sent: certainly nothing was billed.
                    state.store.close(config, work.lease, Closing::Released);
                    state.workers[w].at = At::Ending { task: work.lease.task, mark: false };
                }
            }
            Action::Drain { w } => {
                state.faults.drains -= 1;
                if let Some(work) = state.workers[w].at.work() {
                    state.workers[w].at = At::GivingBack { work, because: Because::Drain };
                }
            }
            Action::OutboxTake { w, t } => {
                state.store.outbox_take(t);
                state.workers[w].at = At::Publishing { task: t };
            }
            Action::Publish { w } => {
                if let At::Publishing { task } = state.workers[w].at {
                    let marks_first = config.mutation == Some(Mutation::MarkBeforePublish);
                    if marks_first && state.store.task(task).outbox != Outbox::Sent {
                        state.store.outbox_mark_sent(task);
                    } else {
                        state.books[usize::from(task)].published = true;
                        state.workers[w].at = At::Ending { task, mark: !marks_first };
                    }
                }
            }
            Action::OutboxMarkSent { w } => {
                if let At::Ending { task, .. } = state.workers[w].at {
                    state.store.outbox_mark_sent(task);
                    state.workers[w].at = At::Ending { task, mark: false };
                }
            }
            Action::Ack { w } => match state.workers[w].at {
                At::Ending { task, .. } => state.ack(w, task),
                At::EndingDead { .. } => state.workers[w].at = At::Idle,
                _ => {}
            },
            Action::PullDead { w, t } => {
                state.queue[usize::from(t)].dead = false;
                state.workers[w].at = At::PulledDead { task: t };
                if config.mutation == Some(Mutation::AckBeforeDeadLetter) {
                    state.wrongs.acked_early |= !state.store.task(t).dead_letter;
                }
            }
            Action::RecordDeadLetter { w } => match state.workers[w].at {
                At::Pulled { task } => {
                    state.store.record_dead_letter(config, task, false);
                    state.workers[w].at = At::Ending { task, mark: false };
                }
                At::PulledDead { task } => {
                    state.store.record_dead_letter(config, task, true);
                    state.workers[w].at = At::EndingDead { task };
                }
                _ => {}
            },
            Action::LeaseExpires { t } => state.store.lease_expires(t),
            Action::HoldExpires { t } => state.store.hold_expires(t),
            Action::StallLease { t } => {
                state.faults.stalls -= 1;
                state.store.lease_expires(t);
            }
            Action::StallHold { t } => {
                state.faults.stalls -= 1;
                state.store.hold_expires(t);
            }
            Action::ForwardToDeadLetters { t } => {
                let message = &mut state.queue[usize::from(t)];
                message.waiting -= 1;
                message.dead = true;
            }
            Action::Redeliver { t } => {
                state.faults.duplicates -= 1;
                state.queue[usize::from(t)].waiting += 1;
            }
            Action::Crash { w } => self.crash(state, w),
            Action::SetBudget => {
                state.store.daily_limit = config.raised_limit.unwrap_or(config.daily_limit);
            }
            Action::Midnight => {
                state.faults.midnights -= 1;
                state.store.day += 1;
            }
            Action::MidnightAtRest => {
                state.store.midnight_at_rest();
                state.books.iter_mut().for_each(Book::midnight_at_rest);
            }
        }
    }

    /// A process dies and starts again: memory is gone, what it had not acked will come again.
    fn crash(&self, state: &mut State, w: usize) {
        let Worker { at, delivery, crashes } = state.workers[w];
        let task = match at {
            At::Pulled { task } | At::Publishing { task } | At::Ending { task, .. } => Some(task),
            At::PulledDead { task } | At::EndingDead { task } => {
                let acked = self.config.mutation == Some(Mutation::AckBeforeDeadLetter);
                state.queue[usize::from(task)].dead = !acked;
                None
            }
            _ => at.work().map(|work| work.lease.task),
        };
        if let Some(task) = task
            && delivery
        {
            state.queue[usize::from(task)].waiting += 1;
        }
        state.workers[w] = Worker { at: At::Idle, delivery: false, crashes: crashes - 1 };
    }
}

impl State {
    /// Does a living worker believe that it holds the run's lease?
    fn has_holder(&self, t: u8) -> bool {
        let Some(run) = self.store.task(t).run else { return false };
        self.workers.iter().any(|worker| {
            worker.at.work().is_some_and(|work| work.lease == Lease { task: t, attempt: run.attempt })
        })
    }

    /// Is a living worker about to send the row, or to mark it?
    fn has_sender(&self, t: u8) -> bool {
        self.workers.iter().any(|worker| match worker.at {
            At::Publishing { task } | At::Ending { task, mark: true } => task == t,
            _ => false,
        })
    }

    fn ack(&mut self, w: usize, task: u8) {
        self.workers[w].delivery = false;
        let stored = self.store.task(task);
        self.wrongs.acked_early |= stored.run.is_none() && !stored.dead_letter;
    }

    /// The model API bills a call. It counts for the day on which it was reserved.
    fn bill(&mut self, work: Work, billed: u8) {
        let Work { lease, step } = work;
        let day = self.store.task(lease.task).row(lease.attempt).map_or(self.store.day, |row| row.day);
        let book = &mut self.books[usize::from(lease.task)];
        book.billed[usize::from(day)] += billed;
        self.wrongs.paid_again |= book.is_settled_before(lease.attempt, step);
    }

    /// Brings states that cannot be told apart into one form.
    fn normalise(&mut self) {
        for worker in &mut self.workers {
            if matches!(worker.at, At::Ending { mark: false, .. }) && !worker.delivery {
                worker.at = At::Idle;
            }
        }
        for task in 0..TASKS {
            for row in self.store.tasks[task].rows.into_iter().flatten().filter(|row| row.assumed) {
                let held = self.workers.iter().any(|worker| {
                    worker.at.work().is_some_and(|work| {
                        usize::from(work.lease.task) == task && work.lease.attempt == row.attempt
                    })
                });
                if !held {
                    self.store.tasks[task].forget(row.attempt);
                }
            }
        }
    }

    /// The same state with other names for workers and tasks: one for all its twins. Nothing in the
    /// protocol depends on which worker or (when both are alike) which task it is.
    pub(crate) fn representative(&self, tasks_alike: bool) -> Self {
        let mut first = *self;
        first.workers.sort_unstable();
        if !tasks_alike {
            return first;
        }
        let mut second = *self;
        second.store.tasks.swap(0, 1);
        second.queue.swap(0, 1);
        second.books.swap(0, 1);
        for worker in &mut second.workers {
            worker.at = worker.at.swap_tasks();
        }
        second.workers.sort_unstable();
        first.min(second)
    }
}

impl Model for Protocol {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        vec![self.init()]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        self.progress(state, actions);
        self.faults(state, actions);
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut next = *last;
        self.step(&mut next, action);
        properties::watch(last, action, &mut next);
        next.normalise();
        (next != *last).then_some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut all = properties::guarantees();
        all.extend(self.sights.iter().map(|&(name, seen)| Property::sometimes(name, seen)));
        all
    }
}
