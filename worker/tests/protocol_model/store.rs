//! The store of the model: what survives every crash.
//!
//! One function here is one transaction of the store port (`worker/src/store`, `shared/src/ledger`), with
//! the same name and the same order of checks. What a transaction may never do is not asked here: the
//! properties watch from outside, so that a transaction broken by a [`Mutation`] cannot hide itself.

use crate::config::{Config, DAYS, Mutation, RESERVED, TASKS};

/// The state of a run: `RunStatus`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Status {
    Queued,
    Running,
    Deferred,
    Done,
    Failed,
}

/// A row of `runs`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Run {
    pub(crate) status: Status,
    /// The fencing token: grows with every claim.
    pub(crate) attempt: u8,
    /// `lease_until` has passed.
    pub(crate) lapsed: bool,
    pub(crate) deferrals: u8,
    /// The attempt that finished it; 0 while nobody did.
    pub(crate) finished_attempt: u8,
}

impl Run {
    pub(crate) fn is_final(self) -> bool {
        matches!(self.status, Status::Done | Status::Failed)
    }
}

/// The final row of a task in `outbox`. The `deferred` answers that also go through it are left out:
/// they are news, no results.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Outbox {
    None,
    /// Not sent, and not held by anybody.
    Unsent,
    /// Not sent; `held_until` is in the future: who wrote or took it is going to send it.
    Held,
    Sent,
}

/// A row of `token_ledger` that can still change. It always stands for [`RESERVED`] tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Row {
    /// Whose: an attempt has at most one call open.
    pub(crate) attempt: u8,
    /// The day on which it was granted: there it is booked, whenever it is closed.
    pub(crate) day: u8,
    /// False: `reserved`. True: `assumed` by a takeover, while the worker that it was taken from may
    /// still come back and say what it really billed.
    pub(crate) assumed: bool,
}

/// How a reservation ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Closing {
    /// With what was billed.
    Settled(u8),
    /// Certainly nothing was billed.
    Released,
    /// Nobody can know.
    Assumed,
}

/// A stale fencing token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fenced;

/// The right to work on one run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Lease {
    pub(crate) task: u8,
    pub(crate) attempt: u8,
}

/// The answer to a claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Claim {
    Claimed {
        lease: Lease,
        /// Finished steps: work goes on from here.
        steps: u8,
        /// Another worker's lease on it had expired.
        taken_over: bool,
    },
    /// Another worker is at it, it waits for its time, or it is final: the message can be acked.
    Elsewhere,
}

/// The answer to a reservation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reserve {
    Granted,
    DeniedByRun,
    DeniedByDay,
}

/// Everything that is stored of one task.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Stored {
    pub(crate) run: Option<Run>,
    /// Rows in `run_steps`: the first so many steps are checkpointed.
    pub(crate) steps: u8,
    /// Rows in `architect_out`.
    pub(crate) results: u8,
    pub(crate) outbox: Outbox,
    /// A row in `dead_letters`.
    pub(crate) dead_letter: bool,
    /// Rows of the ledger that can still change, oldest attempt first.
    pub(crate) rows: [Option<Row>; 4],
    /// What is settled or assumed for good, by the day of its grant.
    pub(crate) used: [u8; DAYS],
    /// The same, of days whose books are closed.
    pub(crate) earlier: u8,
}

/// The database.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Store {
    pub(crate) tasks: [Stored; TASKS],
    /// Today.
    pub(crate) day: u8,
    /// The daily limit in force.
    pub(crate) daily_limit: u8,
}

impl Stored {
    pub(crate) const EMPTY: Self = Self {
        run: None,
        steps: 0,
        results: 0,
        outbox: Outbox::None,
        dead_letter: false,
        rows: [None; 4],
        used: [0; DAYS],
        earlier: 0,
    };

    /// What the ledger says of this task on one day: settled, assumed, and open at their upper bound.
    pub(crate) fn committed_on(&self, day: usize) -> u8 {
        let open = self.rows.iter().flatten().filter(|row| usize::from(row.day) == day).count();
        self.used[day] + u8::try_from(open).unwrap() * RESERVED
    }

    /// What the run's calls cost so far, at most: what the run's limit is held against.
    pub(crate) fn committed(&self) -> u8 {
        self.earlier + (0..DAYS).map(|day| self.committed_on(day)).sum::<u8>()
    }

    pub(crate) fn row(&self, attempt: u8) -> Option<Row> {
        self.rows.iter().flatten().find(|row| row.attempt == attempt).copied()
    }

    fn insert(&mut self, row: Row) {
        let free = self.rows.iter_mut().find(|slot| slot.is_none()).expect("four rows are enough");
        *free = Some(row);
        self.rows.sort_by_key(|slot| slot.map_or(u8::MAX, |row| row.attempt));
    }

    fn remove(&mut self, attempt: u8) {
        for slot in &mut self.rows {
            if slot.is_some_and(|row| row.attempt == attempt) {
                *slot = None;
            }
        }
        self.rows.sort_by_key(|slot| slot.map_or(u8::MAX, |row| row.attempt));
    }

    /// Counts an assumed row as used for good, once nobody is left who could correct it. Changes no
    /// sum: it only keeps the state small.
    pub(crate) fn forget(&mut self, attempt: u8) {
        if let Some(row) = self.row(attempt) {
            self.used[usize::from(row.day)] += RESERVED;
            self.remove(attempt);
        }
    }

    /// Books every open reservation as spent: whoever held them is gone. `assume_open`.
    fn assume_open(&mut self, config: &Config) {
        match config.mutation {
            Some(Mutation::TakeoverForgetsOpenReservations) => {}
            Some(Mutation::TakeoverReleasesOpenReservations) => {
                for slot in &mut self.rows {
                    if slot.is_some_and(|row| !row.assumed) {
                        *slot = None;
                    }
                }
                self.rows.sort_by_key(|slot| slot.map_or(u8::MAX, |row| row.attempt));
            }
            _ => {
                for row in self.rows.iter_mut().flatten() {
                    row.assumed = true;
                }
            }
        }
    }

    /// Refuses a stale lease: the run must be running, in exactly this attempt. `fence`.
    fn fence(&self, config: &Config, lease: Lease) -> Result<(), Fenced> {
        if self.holds(lease) || config.mutation == Some(Mutation::NoFenceCheck) {
            Ok(())
        } else {
            Err(Fenced)
        }
    }

    /// True while `lease` is the run's lease, expired or not.
    pub(crate) fn holds(&self, lease: Lease) -> bool {
        self.run.is_some_and(|run| run.status == Status::Running && run.attempt == lease.attempt)
    }

    /// Makes the run final and stores its one result row. `end_run`.
    fn end_run(&mut self, config: &Config, status: Status, finished_attempt: u8) {
        self.assume_open(config);
        self.results += 1;
        if let Some(run) = &mut self.run {
            *run = Run { status, lapsed: false, finished_attempt, ..*run };
        }
    }
}

impl Store {
    pub(crate) fn task(&self, task: u8) -> &Stored {
        &self.tasks[usize::from(task)]
    }

    fn task_mut(&mut self, task: u8) -> &mut Stored {
        &mut self.tasks[usize::from(task)]
    }

    /// What fits under today's limit.
    pub(crate) fn available(&self) -> u8 {
        let day = usize::from(self.day);
        self.daily_limit.saturating_sub(self.tasks.iter().map(|task| task.committed_on(day)).sum())
    }

    /// Stores the request if it is new, and takes the run's lease if it is free.
    pub(crate) fn claim_run(&mut self, config: &Config, task: u8) -> Claim {
        let new =
            Run { status: Status::Queued, attempt: 0, lapsed: false, deferrals: 0, finished_attempt: 0 };
        let run = *self.task_mut(task).run.get_or_insert(new);
        let leased = run.status == Status::Running && !run.lapsed;
        let is_final = run.is_final() && config.mutation != Some(Mutation::ClaimTakesFinishedRuns);
        if is_final || leased || run.status == Status::Deferred {
            return Claim::Elsewhere;
        }
        self.take(config, task)
    }

    /// Is the run due without a message? A part of `claim_due`'s query.
    pub(crate) fn is_due(&self, config: &Config, task: u8) -> bool {
        let Some(run) = self.task(task).run else { return false };
        match run.status {
            Status::Running => run.lapsed && config.mutation != Some(Mutation::NoExpiredLeaseSweep),
            // `not_before` has passed: time is not what the model is about.
            Status::Queued => true,
            Status::Deferred => {
                self.available() >= RESERVED && config.mutation != Some(Mutation::NoDeferredSweep)
            }
            Status::Done | Status::Failed => false,
        }
    }

    /// Takes up a run that is due without a message. `limit` is 1: a batch is several of these.
    pub(crate) fn claim_due(&mut self, config: &Config, task: u8) -> Claim {
        if self.is_due(config, task) { self.take(config, task) } else { Claim::Elsewhere }
    }

    /// Gives the lease to a new attempt. What a former one left open is booked as spent. `take`.
    fn take(&mut self, config: &Config, task: u8) -> Claim {
        let stored = self.task_mut(task);
        stored.assume_open(config);
        let steps = stored.steps;
        let Some(run) = &mut stored.run else { return Claim::Elsewhere };
        let taken_over = run.status == Status::Running;
        *run = Run { status: Status::Running, attempt: run.attempt + 1, lapsed: false, ..*run };
        Claim::Claimed { lease: Lease { task, attempt: run.attempt }, steps, taken_over }
    }

    /// The lease's time is over, by the store's clock.
    pub(crate) fn lease_expires(&mut self, task: u8) {
        if let Some(run) = &mut self.task_mut(task).run {
            run.lapsed = true;
        }
    }

    /// Extends a lease that is still ours, even if it has expired and nobody took it.
    pub(crate) fn renew_lease(&mut self, lease: Lease) -> Result<(), Fenced> {
        let stored = self.task_mut(lease.task);
        if !stored.holds(lease) {
            return Err(Fenced);
        }
        if let Some(run) = &mut stored.run {
            run.lapsed = false;
        }
        Ok(())
    }

    /// What `reserve` looks at: the fence, the run's limit, the day's limit.
    pub(crate) fn reserve_check(&self, config: &Config, lease: Lease) -> Result<Reserve, Fenced> {
        let stored = self.task(lease.task);
        stored.fence(config, lease)?;
        // A retry of a call whose answer was lost: the same id.
        if stored.row(lease.attempt).is_some_and(|row| !row.assumed) {
            return Ok(Reserve::Granted);
        }
        let committed = if config.mutation == Some(Mutation::RunLimitForgetsEarlierAttempts) {
            stored.row(lease.attempt).map_or(0, |_| RESERVED)
        } else {
            stored.committed()
        };
        if committed + RESERVED > config.run_limit {
            return Ok(Reserve::DeniedByRun);
        }
        Ok(if self.available() < RESERVED { Reserve::DeniedByDay } else { Reserve::Granted })
    }

    /// What `reserve` writes when it grants.
    pub(crate) fn reserve_add(&mut self, lease: Lease) {
        let row = Row { attempt: lease.attempt, day: self.day, assumed: false };
        let stored = self.task_mut(lease.task);
        if stored.row(lease.attempt).is_none() {
            stored.insert(row);
        }
    }

    /// Grants or denies: check and add are one transaction.
    pub(crate) fn reserve(&mut self, config: &Config, lease: Lease) -> Result<Reserve, Fenced> {
        let outcome = self.reserve_check(config, lease)?;
        if outcome == Reserve::Granted {
            self.reserve_add(lease);
        }
        Ok(outcome)
    }

    /// Ends a reservation on the day it was granted for. What was closed before stays as it is; what was
    /// assumed is corrected.
    pub(crate) fn close(&mut self, config: &Config, lease: Lease, closing: Closing) {
        let today = self.day;
        let stored = self.task_mut(lease.task);
        let Some(row) = stored.row(lease.attempt) else { return };
        let day = if config.mutation == Some(Mutation::SettleOnToday) { today } else { row.day };
        stored.used[usize::from(day)] += match closing {
            Closing::Settled(billed) => billed,
            Closing::Assumed => RESERVED,
            Closing::Released => 0,
        };
        stored.remove(lease.attempt);
    }

    /// Books a call and stores what it brought. With a stale lease the tokens are booked all the same,
    /// the checkpoint is refused.
    pub(crate) fn settle_step(
        &mut self,
        config: &Config,
        lease: Lease,
        step: u8,
        billed: u8,
    ) -> Result<(), Fenced> {
        self.close(config, lease, Closing::Settled(billed));
        let stored = self.task_mut(lease.task);
        stored.fence(config, lease)?;
        if config.mutation != Some(Mutation::SettleWithoutCheckpoint) {
            stored.steps = stored.steps.max(step + 1);
        }
        Ok(())
    }

    /// Makes the run final: result, state, ledger and outbox in one transaction.
    pub(crate) fn finish_run(
        &mut self,
        config: &Config,
        lease: Lease,
        status: Status,
        settlement: Option<u8>,
    ) -> Result<(), Fenced> {
        if let Some(billed) = settlement {
            self.close(config, lease, Closing::Settled(billed));
        }
        let stored = self.task_mut(lease.task);
        // A retry of a call whose answer was lost.
        if stored.run.is_some_and(|run| run.finished_attempt == lease.attempt) {
            return Ok(());
        }
        stored.fence(config, lease)?;
        if settlement.is_some() {
            stored.steps = config.calls;
        }
        stored.end_run(config, status, lease.attempt);
        if config.mutation != Some(Mutation::FinishWithoutOutboxRow) {
            stored.outbox = Outbox::Held;
        }
        Ok(())
    }

    /// Puts the run aside until tokens are available.
    pub(crate) fn defer_run(&mut self, config: &Config, lease: Lease) -> Result<(), Fenced> {
        self.put_back(config, lease, Status::Deferred)
    }

    /// Gives the run back.
    pub(crate) fn release_run(&mut self, config: &Config, lease: Lease) -> Result<(), Fenced> {
        self.put_back(config, lease, Status::Queued)
    }

    fn put_back(&mut self, config: &Config, lease: Lease, status: Status) -> Result<(), Fenced> {
        let stored = self.task_mut(lease.task);
        // A retry of a call whose answer was lost.
        if stored.run.is_some_and(|run| run.status == status && run.attempt == lease.attempt) {
            return Ok(());
        }
        stored.fence(config, lease)?;
        stored.assume_open(config);
        if let Some(run) = &mut stored.run {
            let deferrals = run.deferrals + u8::from(status == Status::Deferred);
            *run = Run { status, deferrals, lapsed: false, ..*run };
        }
        Ok(())
    }

    /// Takes an unsent row that nobody holds.
    pub(crate) fn outbox_take(&mut self, task: u8) {
        self.task_mut(task).outbox = Outbox::Held;
    }

    /// The hold of a row is over, by the store's clock.
    pub(crate) fn hold_expires(&mut self, task: u8) {
        self.task_mut(task).outbox = Outbox::Unsent;
    }

    /// Marks a row as sent.
    pub(crate) fn outbox_mark_sent(&mut self, task: u8) {
        let stored = self.task_mut(task);
        if stored.outbox != Outbox::None {
            stored.outbox = Outbox::Sent;
        }
    }

    /// A new day, after work: no reservation is open, so the old days' books are closed.
    pub(crate) fn midnight_at_rest(&mut self) {
        self.day = 0;
        for stored in &mut self.tasks {
            stored.earlier += stored.used.iter().sum::<u8>();
            stored.used = [0; DAYS];
        }
    }

    /// Stores a message that cannot be worked on. One that came from the dead-letter topic fails its run,
    /// if that is not final, and puts its answer into the outbox.
    pub(crate) fn record_dead_letter(&mut self, config: &Config, task: u8, fails_run: bool) {
        let stored = self.task_mut(task);
        if stored.dead_letter {
            return;
        }
        stored.dead_letter = true;
        if fails_run && stored.run.is_some_and(|run| !run.is_final()) {
            stored.end_run(config, Status::Failed, 0);
            stored.outbox = Outbox::Unsent;
        }
    }
}
