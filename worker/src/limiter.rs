//! How many runs may be at work at once in this worker.
//!
//! Additive increase, multiplicative decrease (Chiu and Jain, 1989; as TCP does): a 429 from the
//! model API shrinks the limit, every run that ends well grows it back by a fraction, never past
//! `MAX_IN_FLIGHT`. Pub/Sub's emulator ignores flow control, so this limiter is what holds.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

/// Factor of one decrease.
const BACKOFF: f64 = 0.7;

/// The limiter. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Limiter {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    max: f64,
    state: Mutex<State>,
    /// Woken when a permit may be free.
    changed: Notify,
}

#[derive(Debug)]
struct State {
    /// Between 1 and `max`; only its whole part counts.
    limit: f64,
    in_flight: usize,
    /// Grows by one with each decrease: runs that started before one do not trigger another.
    epoch: u64,
}

/// The right to work on one run; gives its place back when dropped.
#[derive(Debug)]
pub(crate) struct Permit {
    shared: Arc<Shared>,
    epoch: u64,
}

impl Limiter {
    /// A limiter that starts at, and never exceeds, `max` runs.
    pub(crate) fn new(max: usize) -> Self {
        let max = max.max(1) as f64;
        Self {
            shared: Arc::new(Shared {
                max,
                state: Mutex::new(State { limit: max, in_flight: 0, epoch: 0 }),
                changed: Notify::new(),
            }),
        }
    }

    /// Waits for a place. Safe to cancel.
    pub(crate) async fn acquire(&self) -> Permit {
        loop {
            // Register before looking, so that a release in between is not missed.
            let changed = self.shared.changed.notified();
            if let Some(permit) = self.try_acquire() {
                return permit;
            }
            changed.await;
        }
    }

    /// A place, if there is one now.
    pub(crate) fn try_acquire(&self) -> Option<Permit> {
        let mut state = self.shared.state();
        if state.in_flight >= state.whole_limit() {
            return None;
        }
        state.in_flight += 1;
        let more = state.in_flight < state.whole_limit();
        let epoch = state.epoch;
        drop(state);
        if more {
            // One notification may stand for several free places: pass it on.
            self.shared.changed.notify_one();
        }
        Some(Permit { shared: Arc::clone(&self.shared), epoch })
    }

    /// How many places are free now.
    #[cfg(test)]
    pub(crate) fn free(&self) -> usize {
        let state = self.shared.state();
        state.whole_limit().saturating_sub(state.in_flight)
    }

    /// Places that are taken.
    #[cfg(test)]
    fn in_flight(&self) -> usize {
        self.shared.state().in_flight
    }
}

impl Permit {
    /// The model API said 429: fewer runs at once. Runs that were started before the last decrease
    /// do not count again, so one burst of 429 is one decrease.
    pub(crate) fn throttled(&mut self) {
        let mut state = self.shared.state();
        if self.epoch == state.epoch {
            state.limit = (state.limit * BACKOFF).max(1.0);
            state.epoch += 1;
        }
        self.epoch = state.epoch;
    }

    /// A run ended well: a little more room.
    pub(crate) fn succeeded(&self) {
        let mut state = self.shared.state();
        state.limit = (state.limit + 1.0 / state.limit).min(self.shared.max);
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.shared.state().in_flight -= 1;
        self.shared.changed.notify_waiters();
        self.shared.changed.notify_one();
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // Numbers are valid whatever a panicking holder did.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "between 1 and a usize")]
    fn whole_limit(&self) -> usize {
        self.limit as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn no_more_than_the_limit_at_once() {
        let limiter = Limiter::new(2);
        let first = limiter.acquire().await;
        let _second = limiter.acquire().await;
        assert!(limiter.try_acquire().is_none());
        drop(first);
        assert_eq!(limiter.free(), 1);
        let _third = limiter.acquire().await;
        assert_eq!(limiter.in_flight(), 2);
    }

    #[tokio::test]
    async fn a_burst_of_429_is_one_decrease_and_success_grows_it_back() {
        let limiter = Limiter::new(10);
        let mut permits = Vec::new();
        for _ in 0..10 {
            permits.push(limiter.acquire().await);
        }
        for permit in &mut permits {
            permit.throttled();
        }
        drop(permits);
        assert_eq!(limiter.free(), 7, "one decrease: 10 × 0.7");

        for _ in 0..100 {
            limiter.acquire().await.succeeded();
        }
        assert_eq!(limiter.free(), 10, "grown back, never past the maximum");
    }

    #[tokio::test]
    async fn the_limit_never_falls_below_one() {
        let limiter = Limiter::new(1);
        for _ in 0..5 {
            limiter.acquire().await.throttled();
        }
        assert_eq!(limiter.free(), 1);
    }
}
