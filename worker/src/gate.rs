//! What keeps this worker from working, and from pulling.
//!
//! A worker that cannot finish what it starts must not start it. While a dependency is down, pulling
//! stops and messages stay in the queue: no delivery attempt is spent, nothing is nacked in a hot
//! loop. While the fleet is paused or out of budget, pulling goes on, because the command that ends
//! it (`resume`, `set_budget`) comes through the same queue; requests are put aside *in the store*,
//! which spends no attempt either. A queue that is away is told here and stops nothing: to pull is how
//! it is found again, and what waits in the store can be done meanwhile.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use atlas_shared::{Dependency, Tokens};
use tokio::sync::Notify;

use crate::metrics::Metrics;

/// Why this worker does not work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Reason {
    /// A `pause` command.
    Paused,
    /// The day's budget is gone.
    Budget,
    /// A dependency's circuit is open, or it is set up wrongly.
    Dependency(Dependency),
    /// The store has not been read yet.
    Starting,
    /// The worker shuts down; never lifted.
    Draining,
}

impl Reason {
    /// True for what stops pulling, and taking up what is due.
    fn stops_pulling(self) -> bool {
        !matches!(self, Self::Paused | Self::Budget | Self::Dependency(Dependency::Queue))
    }

    fn as_str(self) -> &'static str {
        match self {
            Self::Paused => "paused",
            Self::Budget => "budget",
            Self::Dependency(dependency) => dependency.as_str(),
            Self::Starting => "starting",
            Self::Draining => "draining",
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The gate before the intake. Clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Gate {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    /// What closes it; for `Budget`, how many tokens must be available before it opens.
    reasons: Mutex<BTreeMap<Reason, Tokens>>,
    changed: Notify,
    metrics: Arc<Metrics>,
}

impl Gate {
    /// A gate that is closed until the store was read once.
    pub(crate) fn new(metrics: Arc<Metrics>) -> Self {
        let gate = Self {
            shared: Arc::new(Shared {
                reasons: Mutex::new(BTreeMap::new()),
                changed: Notify::new(),
                metrics,
            }),
        };
        gate.set(Reason::Starting, true);
        gate
    }

    /// Closes the gate for `reason`, or lifts that reason.
    pub(crate) fn set(&self, reason: Reason, blocked: bool) {
        let changed = if blocked {
            self.reasons().insert(reason, Tokens(0)).is_none()
        } else {
            self.reasons().remove(&reason).is_some()
        };
        if changed {
            self.announce(reason, blocked);
        }
    }

    /// Closes the gate until `needed` tokens are available.
    pub(crate) fn out_of_budget(&self, needed: Tokens) {
        if self.reasons().insert(Reason::Budget, needed).is_none() {
            self.announce(Reason::Budget, true);
        }
    }

    /// Opens the gate again if the budget gave it a reason and enough is available.
    pub(crate) fn budget_available(&self, available: Tokens) {
        let enough = self.reasons().get(&Reason::Budget).is_some_and(|needed| available >= *needed);
        if enough {
            self.set(Reason::Budget, false);
        }
    }

    /// The tokens that must be available before work goes on, while the day's budget is gone.
    pub(crate) fn budget_needed(&self) -> Option<Tokens> {
        self.reasons().get(&Reason::Budget).copied()
    }

    /// Waits until nothing stops pulling.
    pub(crate) async fn open(&self) {
        loop {
            let changed = self.shared.changed.notified();
            tokio::pin!(changed);
            // Register before looking, so that a change in between is not missed.
            changed.as_mut().enable();
            if self.is_open() {
                return;
            }
            changed.await;
        }
    }

    /// Waits until something stops pulling.
    pub(crate) async fn closed(&self) {
        loop {
            let changed = self.shared.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if !self.is_open() {
                return;
            }
            changed.await;
        }
    }

    /// True while nothing stops pulling.
    pub(crate) fn is_open(&self) -> bool {
        !self.reasons().keys().any(|reason| reason.stops_pulling())
    }

    fn announce(&self, reason: Reason, blocked: bool) {
        self.shared.metrics.work_blocked.with_label_values(&[reason.as_str()]).set(i64::from(blocked));
        if blocked {
            tracing::info!(%reason, "work is held up");
        } else {
            tracing::info!(%reason, "work is no longer held up by this");
        }
        self.shared.changed.notify_waiters();
    }

    fn reasons(&self) -> MutexGuard<'_, BTreeMap<Reason, Tokens>> {
        self.shared.reasons.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
#[expect(clippy::expect_used, reason = "a test fails by panicking")]
mod tests {
    use atlas_shared::metrics::Registry;

    use super::*;

    fn gate() -> Gate {
        let gate = Gate::new(Metrics::new(&Registry::new()).expect("fresh registry"));
        gate.set(Reason::Starting, false);
        gate
    }

    #[tokio::test]
    async fn every_reason_must_be_lifted() {
        let gate = gate();
        gate.set(Reason::Dependency(Dependency::Model), true);
        gate.set(Reason::Dependency(Dependency::Store), true);
        gate.set(Reason::Dependency(Dependency::Model), false);
        assert!(!gate.is_open());
        gate.set(Reason::Dependency(Dependency::Store), false);
        gate.open().await;
    }

    #[tokio::test]
    async fn a_pause_and_an_empty_budget_let_commands_through() {
        let gate = gate();
        gate.set(Reason::Paused, true);
        gate.out_of_budget(Tokens(1));
        gate.open().await;
    }

    #[tokio::test]
    async fn a_queue_that_is_away_is_told_and_stops_nothing() {
        let gate = gate();
        gate.set(Reason::Dependency(Dependency::Queue), true);
        assert_eq!(gate.shared.metrics.work_blocked.with_label_values(&["queue"]).get(), 1);
        gate.open().await;
    }

    #[tokio::test]
    async fn the_budget_is_back_only_with_enough_tokens() {
        let gate = gate();
        gate.out_of_budget(Tokens(5000));
        gate.budget_available(Tokens(4999));
        assert_eq!(gate.budget_needed(), Some(Tokens(5000)));
        gate.budget_available(Tokens(5000));
        assert_eq!(gate.budget_needed(), None);
    }

    #[tokio::test]
    async fn waiters_see_it_open_and_close() {
        let gate = gate();
        let closed = tokio::spawn({
            let gate = gate.clone();
            async move { gate.closed().await }
        });
        gate.set(Reason::Dependency(Dependency::Gateway), true);
        closed.await.expect("saw it close");
        let open = tokio::spawn({
            let gate = gate.clone();
            async move { gate.open().await }
        });
        gate.set(Reason::Dependency(Dependency::Gateway), false);
        open.await.expect("saw it open");
    }
}
