//! What a check explores: how many workers, which faults, and how the protocol is broken, if at all.

/// Tasks: one message each. The second can be switched off.
pub(crate) const TASKS: usize = 2;
/// Workers at most. One of them does one thing at a time: a worker process that works on n runs at
/// once behaves like n of these, whose crash together is a crash of each in a row.
pub(crate) const WORKERS: usize = 3;
/// Days that are told apart: one midnight can come while somebody is at work. Midnights at rest are not
/// counted; there the books of the day are closed (see `Store::midnight_at_rest`).
pub(crate) const DAYS: usize = 2;
/// What every model call reserves.
pub(crate) const RESERVED: u8 = 2;
/// Model calls of a run at most.
pub(crate) const CALLS: usize = 2;

/// One exploration. `Default` has no fault but crashes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Config {
    /// 1 or 2.
    pub(crate) tasks: usize,
    /// 1 to 3.
    pub(crate) workers: usize,
    /// Model calls that a run needs.
    pub(crate) calls: u8,
    /// What a call can bill: any of these, all at most [`RESERVED`].
    pub(crate) bills: &'static [u8],
    /// `DAILY_TOKEN_BUDGET`.
    pub(crate) daily_limit: u8,
    /// The limit that a `set_budget` command can raise it to.
    pub(crate) raised_limit: Option<u8>,
    /// `TOKEN_BUDGET_PER_RUN`.
    pub(crate) run_limit: u8,
    /// `MAX_RUN_ATTEMPTS`.
    pub(crate) max_run_attempts: u8,
    /// The subscription's `max_delivery_attempts`; 0: no dead-letter policy.
    pub(crate) max_deliveries: u8,
    /// The last task's message is no request.
    pub(crate) malformed: bool,
    /// What may go wrong, and how often.
    pub(crate) faults: Faults,
    /// How the protocol is broken.
    pub(crate) mutation: Option<Mutation>,
}

/// How often each thing may still go wrong.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Faults {
    /// A worker process dies and starts again: so often each.
    pub(crate) crashes: u8,
    /// A lease or a hold expires although its worker lives (a pause, a partition).
    pub(crate) stalls: u8,
    /// A model call fails and has billed nothing.
    pub(crate) failures: u8,
    /// A model call fails and nobody knows what it billed.
    pub(crate) timeouts: u8,
    /// A message is delivered again, acked or not: Pub/Sub, or a publisher that sends twice.
    pub(crate) duplicates: u8,
    /// A store call is carried out and its answer is lost, so that it is made again.
    pub(crate) lost_answers: u8,
    /// A worker is told to stop and gives its run back.
    pub(crate) drains: u8,
    /// A midnight that comes while somebody is at work.
    pub(crate) midnights: u8,
}

/// One crash each, and nothing else.
pub(crate) const CRASHES: Faults = Faults {
    crashes: 1,
    stalls: 0,
    failures: 0,
    timeouts: 0,
    duplicates: 0,
    lost_answers: 0,
    drains: 0,
    midnights: 0,
};

impl Default for Config {
    fn default() -> Self {
        Self::BASE
    }
}

impl Config {
    /// As many tasks and workers as a state can hold, limits that nobody meets, one crash of each worker.
    pub(crate) const BASE: Self = Self {
        tasks: TASKS,
        workers: WORKERS,
        calls: 1,
        bills: &[1],
        daily_limit: 100,
        raised_limit: None,
        run_limit: 100,
        max_run_attempts: 100,
        max_deliveries: 0,
        malformed: false,
        faults: CRASHES,
        mutation: None,
    };

    pub(crate) fn is_malformed(&self, task: u8) -> bool {
        self.malformed && usize::from(task) + 1 == self.tasks
    }
}

/// One way to break the protocol on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mutation {
    /// No write looks at the fencing token.
    NoFenceCheck,
    /// `reserve` reads the balance in one transaction and writes in another.
    CheckThenAdd,
    /// A message is acked when it is pulled, before `claim_run` has stored it.
    AckBeforeClaim,
    /// `claim_run` takes a run that is final.
    ClaimTakesFinishedRuns,
    /// `finish_run` writes the result in one transaction and the state in another.
    FinishInTwoTransactions,
    /// `finish_run` writes no outbox row: the worker publishes from memory.
    FinishWithoutOutboxRow,
    /// The answer is published, then the run is finished.
    PublishBeforeFinish,
    /// Nobody sends what a crash left in the outbox.
    NoOutboxSweep,
    /// A row is marked as sent before it is.
    MarkBeforePublish,
    /// `claim_due` does not look for expired leases.
    NoExpiredLeaseSweep,
    /// `claim_due` does not look for deferred runs.
    NoDeferredSweep,
    /// `settle_step` books the tokens and stores no checkpoint.
    SettleWithoutCheckpoint,
    /// A takeover leaves a dead attempt's reservation open.
    TakeoverForgetsOpenReservations,
    /// A takeover gives a dead attempt's reservation back.
    TakeoverReleasesOpenReservations,
    /// A call of which nobody knows what it billed is closed as released.
    TimeoutReleases,
    /// The run's limit is held against this attempt's calls only.
    RunLimitForgetsEarlierAttempts,
    /// A settlement is booked on the day it is made, not on the day of its grant.
    SettleOnToday,
    /// A run that is denied by the day's limit is nacked instead of deferred.
    NackInsteadOfDefer,
    /// A message from the dead-letter topic is acked before it is in `dead_letters`.
    AckBeforeDeadLetter,
}
