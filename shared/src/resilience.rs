//! One layer of retries and circuit breakers, for every call to a dependency.
//!
//! Adapters make **one attempt** and classify its failure ([`UpstreamError`]); whether and when to
//! try again is decided here and nowhere else, so that attempts never multiply across layers.
//!
//! The `backoff` crate is named in this module only (it is not maintained any more; replacing it
//! touches one function).

use std::{
    future::Future,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use backoff::{ExponentialBackoffBuilder, backoff::Backoff as _};
use prometheus::{IntCounter, IntGauge};
use tokio::time::Instant;

use crate::{Dependency, UpstreamError, config::ResilienceConfig, metrics::UpstreamMetrics};

/// How far the jitter may move a delay up or down: ±50 %, so that a fleet that failed together does
/// not come back together.
const JITTER: f64 = 0.5;

/// When a failed call may be tried again.
#[derive(Clone, Debug)]
pub struct RetryPolicy {
    max_attempts: u32,
    base_delay: Duration,
    max_delay: Duration,
}

impl RetryPolicy {
    /// By `RETRY_MAX_ATTEMPTS`, `RETRY_BASE_MILLISECONDS` and `RETRY_MAX_DELAY_SECONDS`.
    pub fn new(config: &ResilienceConfig) -> Self {
        Self { max_attempts: config.max_attempts, base_delay: config.base_delay, max_delay: config.max_delay }
    }

    /// How long to wait before the next attempt, after `attempt` attempts (counted from 1) the last
    /// of which failed with `error`. `None`: do not try again here.
    ///
    /// A `Retry-After` is a floor that is kept; one above the cap ends the attempts *here*, because
    /// waiting less than the server asked for would only be refused again. The caller passes it on
    /// to whoever schedules the work.
    pub fn next_delay(&self, attempt: u32, error: &UpstreamError) -> Option<Duration> {
        let UpstreamError::Transient { retry_after, .. } = error else { return None };
        if attempt >= self.max_attempts {
            return None;
        }
        let floor = retry_after.unwrap_or_default();
        if floor > self.max_delay {
            return None;
        }
        Some(self.backoff(attempt).max(floor).min(self.max_delay))
    }

    /// The jittered exponential delay after `attempt` attempts (counted from 1), within the cap: for work that is
    /// bounded by something else than a number of attempts.
    pub fn backoff(&self, attempt: u32) -> Duration {
        let doubled =
            self.base_delay.saturating_mul(1_u32.checked_shl(attempt.saturating_sub(1)).unwrap_or(u32::MAX));
        ExponentialBackoffBuilder::new()
            .with_initial_interval(doubled.min(self.max_delay))
            .with_randomization_factor(JITTER)
            .with_max_interval(self.max_delay)
            .with_max_elapsed_time(None)
            .build()
            .next_backoff()
            .unwrap_or(self.max_delay)
            .min(self.max_delay)
    }
}

/// What a breaker does with the next call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CircuitState {
    /// Lets calls through.
    Closed,
    /// Refuses calls.
    Open,
    /// Lets one call through, to see whether the dependency is back.
    HalfOpen,
}

/// Stops calling a dependency that fails, and looks now and then whether it is back.
///
/// Opens after `CIRCUIT_FAILURES` failures in a row, or at once when the configuration is wrong.
/// While it is open, calls are refused with the error that opened it, so that readiness and logs
/// name the real cause. After `CIRCUIT_OPEN_SECONDS` one call is let through as a probe.
#[derive(Debug)]
pub struct CircuitBreaker {
    dependency: Dependency,
    failures_to_open: u32,
    open_for: Duration,
    state: Mutex<State>,
    metrics: Option<(IntGauge, IntCounter)>,
}

#[derive(Debug)]
enum State {
    Closed {
        failures: u32,
    },
    Open {
        until: Instant,
        cause: UpstreamError,
    },
    /// `probe_started`: when the one call was let through; `None`: the next caller probes.
    HalfOpen {
        probe_started: Option<Instant>,
        cause: UpstreamError,
    },
}

impl CircuitBreaker {
    /// A closed breaker, by `CIRCUIT_FAILURES` and `CIRCUIT_OPEN_SECONDS`.
    pub fn new(dependency: Dependency, config: &ResilienceConfig) -> Self {
        Self {
            dependency,
            failures_to_open: config.circuit_failures,
            open_for: config.circuit_open,
            state: Mutex::new(State::Closed { failures: 0 }),
            metrics: None,
        }
    }

    /// Reports to `atlas_circuit_open` and `atlas_retries_total`.
    #[must_use]
    pub fn with_metrics(mut self, metrics: &UpstreamMetrics) -> Self {
        let gauge = metrics.circuit_open(self.dependency);
        gauge.set(0);
        self.metrics = Some((gauge, metrics.retries(self.dependency)));
        self
    }

    /// Whom it guards.
    pub fn dependency(&self) -> Dependency {
        self.dependency
    }

    /// What it would do with a call now.
    pub fn state(&self) -> CircuitState {
        match &*self.lock() {
            State::Closed { .. } => CircuitState::Closed,
            State::Open { until, .. } if Instant::now() < *until => CircuitState::Open,
            State::Open { .. } | State::HalfOpen { .. } => CircuitState::HalfOpen,
        }
    }

    /// Why it is not closed; `None` when it is.
    pub fn cause(&self) -> Option<UpstreamError> {
        match &*self.lock() {
            State::Closed { .. } => None,
            State::Open { cause, .. } | State::HalfOpen { cause, .. } => Some(cause.clone()),
        }
    }

    /// How long until a call may be tried: zero unless it is open.
    pub fn wait(&self) -> Duration {
        match &*self.lock() {
            State::Open { until, .. } => until.saturating_duration_since(Instant::now()),
            State::Closed { .. } | State::HalfOpen { .. } => Duration::ZERO,
        }
    }

    /// Asks for permission to call. The permit must be told how the call ended; one that is dropped
    /// without a word (a cancelled call) counts neither way.
    pub fn try_acquire(&self) -> Result<Permit<'_>, UpstreamError> {
        let now = Instant::now();
        let mut state = self.lock();
        match &mut *state {
            State::Closed { .. } => Ok(Permit { breaker: self, probe: false, told: false }),
            State::Open { until, cause } if now < *until => Err(refusal(cause, *until - now)),
            State::Open { cause, .. } => {
                let cause = cause.clone();
                *state = State::HalfOpen { probe_started: Some(now), cause };
                Ok(Permit { breaker: self, probe: true, told: false })
            }
            State::HalfOpen { probe_started: probe_started @ None, .. } => {
                *probe_started = Some(now);
                Ok(Permit { breaker: self, probe: true, told: false })
            }
            State::HalfOpen { cause, .. } => Err(refusal(cause, self.open_for)),
        }
    }

    /// Counts one retry of this dependency in `atlas_retries_total`.
    pub fn count_retry(&self) {
        if let Some((_, retries)) = &self.metrics {
            retries.inc();
        }
    }

    fn succeeded(&self) {
        *self.lock() = State::Closed { failures: 0 };
        self.gauge(0);
    }

    fn failed(&self, error: &UpstreamError, probe: bool) {
        let mut state = self.lock();
        let opens = match (&mut *state, error) {
            // The dependency answered, so it is well; this one call will never succeed.
            (_, UpstreamError::Permanent { .. }) => {
                drop(state);
                return self.succeeded();
            }
            (_, UpstreamError::Misconfigured { .. }) => true,
            // A server that names a time is alive and speaks for itself; opening would only add to it.
            (_, UpstreamError::Transient { retry_after: Some(_), .. }) if !probe => false,
            (State::Closed { failures }, UpstreamError::Transient { .. }) => {
                *failures = failures.saturating_add(1);
                *failures >= self.failures_to_open
            }
            // Calls that were under way when it opened say nothing new; only the probe decides.
            (State::Open { .. } | State::HalfOpen { .. }, UpstreamError::Transient { .. }) => probe,
        };
        if opens {
            let asked = match error {
                UpstreamError::Transient { retry_after: Some(asked), .. } => *asked,
                _ => Duration::ZERO,
            };
            let until = Instant::now() + self.open_for.max(asked.min(self.open_for * 4));
            *state = State::Open { until, cause: error.clone() };
            self.gauge(1);
        }
    }

    fn forget_probe(&self) {
        if let State::HalfOpen { probe_started, .. } = &mut *self.lock() {
            *probe_started = None;
        }
    }

    fn gauge(&self, open: i64) {
        if let Some((gauge, _)) = &self.metrics {
            gauge.set(open);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // The state is replaced in one piece, so a panic elsewhere cannot leave it half written.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The refusal of an open breaker: the cause, to be tried again once a probe is due.
fn refusal(cause: &UpstreamError, wait: Duration) -> UpstreamError {
    match cause {
        UpstreamError::Transient { dependency, message, .. } => UpstreamError::Transient {
            dependency: *dependency,
            message: format!("not called, the circuit is open: {message}"),
            retry_after: Some(wait),
        },
        other => other.clone(),
    }
}

/// Permission for one call.
#[derive(Debug)]
#[must_use = "tell the breaker how the call ended"]
pub struct Permit<'a> {
    breaker: &'a CircuitBreaker,
    probe: bool,
    told: bool,
}

impl Permit<'_> {
    /// The call succeeded.
    pub fn succeeded(mut self) {
        self.told = true;
        self.breaker.succeeded();
    }

    /// The call failed. A permanent failure counts as a success: the dependency answered.
    pub fn failed(mut self, error: &UpstreamError) {
        self.told = true;
        self.breaker.failed(error, self.probe);
    }

    /// Tells the breaker by the call's result, and hands the result on.
    pub fn done<T>(self, result: Result<T, UpstreamError>) -> Result<T, UpstreamError> {
        match &result {
            Ok(_) => self.succeeded(),
            Err(error) => self.failed(error),
        }
        result
    }
}

impl Drop for Permit<'_> {
    fn drop(&mut self) {
        if self.probe && !self.told {
            self.breaker.forget_probe();
        }
    }
}

/// Calls `op` until it succeeds, fails for good, or the policy or the breaker says stop. The error is
/// that of the last attempt; the breaker's own refusal only where no attempt was made.
pub async fn retry<T, F, Fut>(
    policy: &RetryPolicy,
    breaker: &CircuitBreaker,
    mut op: F,
) -> Result<T, UpstreamError>
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Result<T, UpstreamError>>,
{
    let mut last: Option<UpstreamError> = None;
    let mut attempt = 0;
    loop {
        let permit = match breaker.try_acquire() {
            Ok(permit) => permit,
            Err(refused) => return Err(last.unwrap_or(refused)),
        };
        if last.is_some() {
            breaker.count_retry();
        }
        attempt += 1;
        match permit.done(op().await) {
            Ok(value) => return Ok(value),
            Err(error) => match policy.next_delay(attempt, &error) {
                Some(delay) => {
                    tracing::debug!(
                        dependency = error.dependency().as_str(),
                        attempt,
                        delay_ms = u64::try_from(delay.as_millis()).unwrap_or(u64::MAX),
                        error = %error,
                        "call failed, trying again"
                    );
                    tokio::time::sleep(delay).await;
                    last = Some(error);
                }
                None => return Err(error),
            },
        }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use std::{cell::Cell, time::Duration};

    use proptest::prelude::*;

    use super::*;
    use crate::metrics::Registry;

    fn config() -> ResilienceConfig {
        ResilienceConfig {
            max_attempts: 4,
            base_delay: Duration::from_millis(250),
            max_delay: Duration::from_secs(20),
            circuit_failures: 3,
            circuit_open: Duration::from_secs(15),
        }
    }

    fn down() -> UpstreamError {
        UpstreamError::transient(Dependency::Store, "connection refused")
    }

    fn busy(seconds: u64) -> UpstreamError {
        UpstreamError::Transient {
            dependency: Dependency::Model,
            message: "429".to_owned(),
            retry_after: Some(Duration::from_secs(seconds)),
        }
    }

    fn bad_key() -> UpstreamError {
        UpstreamError::misconfigured(Dependency::Model, "OPENAI_API_KEY", "401", "set a valid key")
    }

    proptest! {
        #[test]
        fn delays_grow_jittered_and_capped(attempt in 1_u32..4) {
            let policy = RetryPolicy::new(&config());
            let delay = policy.next_delay(attempt, &down()).unwrap();
            let middle = Duration::from_millis(250) * 2_u32.pow(attempt - 1);
            prop_assert!(delay >= middle / 2 && delay <= middle * 3 / 2 + Duration::from_millis(1), "{delay:?}");
        }

        #[test]
        fn no_delay_is_above_the_cap_or_panics(attempt in 1_u32.., base_ms in 1_u64..60_000, seconds in 0_u64..=20) {
            let config = ResilienceConfig {
                max_attempts: u32::MAX,
                base_delay: Duration::from_millis(base_ms),
                ..config()
            };
            let policy = RetryPolicy::new(&config);
            if let Some(delay) = policy.next_delay(attempt, &busy(seconds)) {
                prop_assert!(delay <= config.max_delay);
                prop_assert!(delay >= Duration::from_secs(seconds), "earlier than the server asked for");
            }
        }
    }

    #[test]
    fn a_retry_after_above_the_cap_ends_the_attempts_here() {
        let policy = RetryPolicy::new(&config());
        assert!(policy.next_delay(1, &busy(20)).is_some());
        assert_eq!(policy.next_delay(1, &busy(21)), None);
    }

    #[test]
    fn only_transient_failures_are_tried_again() {
        let policy = RetryPolicy::new(&config());
        assert_eq!(policy.next_delay(1, &bad_key()), None);
        assert_eq!(policy.next_delay(1, &UpstreamError::permanent(Dependency::Model, "x", "y")), None);
        assert_eq!(policy.next_delay(4, &down()), None, "RETRY_MAX_ATTEMPTS counts the first attempt");
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_is_tried_until_it_succeeds() {
        let registry = Registry::new();
        let metrics = UpstreamMetrics::new(&registry).unwrap();
        let breaker = CircuitBreaker::new(Dependency::Store, &config()).with_metrics(&metrics);
        let calls = Cell::new(0);
        let begun = Instant::now();
        let value = retry(&RetryPolicy::new(&config()), &breaker, || async {
            calls.set(calls.get() + 1);
            if calls.get() < 3 { Err(down()) } else { Ok(calls.get()) }
        })
        .await
        .unwrap();
        assert_eq!(value, 3);
        assert!(begun.elapsed() >= Duration::from_millis(125 + 250), "it waited between attempts");
        assert_eq!(metrics.retries(Dependency::Store).get(), 2);
        assert_eq!(breaker.state(), CircuitState::Closed);
    }

    #[tokio::test(start_paused = true)]
    async fn a_breaker_opens_after_failures_in_a_row_and_then_nobody_calls() {
        let registry = Registry::new();
        let metrics = UpstreamMetrics::new(&registry).unwrap();
        let breaker = CircuitBreaker::new(Dependency::Store, &config()).with_metrics(&metrics);
        let calls = Cell::new(0);
        let op = || async {
            calls.set(calls.get() + 1);
            Err::<(), _>(down())
        };
        let error = retry(&RetryPolicy::new(&config()), &breaker, op).await.unwrap_err();
        assert_eq!(calls.get(), 3, "CIRCUIT_FAILURES=3 ends it before RETRY_MAX_ATTEMPTS=4");
        assert_eq!(error.to_string(), "store: connection refused", "the real cause, not the refusal");
        assert_eq!(metrics.circuit_open(Dependency::Store).get(), 1);

        let refused = retry(&RetryPolicy::new(&config()), &breaker, op).await.unwrap_err();
        assert_eq!(calls.get(), 3);
        assert!(
            matches!(&refused, UpstreamError::Transient { retry_after: Some(wait), message, .. }
                if *wait <= Duration::from_secs(15) && message.contains("connection refused")),
            "{refused:?}"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn one_probe_decides_whether_it_closes() {
        let breaker = CircuitBreaker::new(Dependency::Store, &config());
        for _ in 0..3 {
            breaker.try_acquire().unwrap().failed(&down());
        }
        assert_eq!(breaker.state(), CircuitState::Open);
        tokio::time::advance(breaker.wait()).await;
        assert_eq!(breaker.state(), CircuitState::HalfOpen);

        let probe = breaker.try_acquire().unwrap();
        assert!(breaker.try_acquire().is_err(), "only one probe at a time");
        probe.failed(&down());
        assert_eq!(breaker.state(), CircuitState::Open, "the probe failed: it opens again");

        tokio::time::advance(breaker.wait()).await;
        breaker.try_acquire().unwrap().succeeded();
        assert_eq!(breaker.state(), CircuitState::Closed);
        assert!(breaker.cause().is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn a_cancelled_probe_makes_room_for_the_next() {
        let breaker = CircuitBreaker::new(Dependency::Store, &config());
        breaker.try_acquire().unwrap().failed(&bad_key());
        tokio::time::advance(breaker.wait()).await;
        drop(breaker.try_acquire().unwrap());
        assert!(breaker.try_acquire().is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn a_wrong_configuration_opens_at_once_and_is_what_callers_are_told() {
        let breaker = CircuitBreaker::new(Dependency::Model, &config());
        breaker.try_acquire().unwrap().failed(&bad_key());
        let refused = breaker.try_acquire().unwrap_err();
        assert!(matches!(refused, UpstreamError::Misconfigured { variable: "OPENAI_API_KEY", .. }));
    }

    #[test]
    fn a_success_or_a_refused_request_resets_the_count() {
        let breaker = CircuitBreaker::new(Dependency::Model, &config());
        for end in [None, Some(UpstreamError::permanent(Dependency::Model, "too_long", "x"))] {
            breaker.try_acquire().unwrap().failed(&down());
            breaker.try_acquire().unwrap().failed(&down());
            match end {
                None => breaker.try_acquire().unwrap().succeeded(),
                Some(error) => breaker.try_acquire().unwrap().failed(&error),
            }
        }
        breaker.try_acquire().unwrap().failed(&down());
        assert_eq!(breaker.state(), CircuitState::Closed);
    }

    #[test]
    fn a_server_that_says_when_to_come_back_does_not_open_it() {
        let breaker = CircuitBreaker::new(Dependency::Model, &config());
        for _ in 0..10 {
            breaker.try_acquire().unwrap().failed(&busy(2));
        }
        assert_eq!(breaker.state(), CircuitState::Closed);
    }
}
