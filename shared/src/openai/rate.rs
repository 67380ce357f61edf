//! What the API's `x-ratelimit-*` headers said last, by model, for whoever paces the calls.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use http::HeaderMap;
use tokio::time::Instant;

use crate::{Tokens, http_client};

/// The window of the limits as OpenAI counts them; only used until the next answer says better.
const WINDOW: Duration = Duration::from_mins(1);
/// Requests may name any model, so what is remembered is bounded.
const MAX_MODELS: usize = 256;

/// The rate limits of one model, as of its last answer. `None`: the server does not say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RateLimits {
    /// Requests in a window.
    pub limit_requests: Option<u64>,
    /// Requests left in this window.
    pub remaining_requests: Option<u64>,
    /// When the requests are back at their limit.
    pub requests_reset: Option<Instant>,
    /// Tokens in a window.
    pub limit_tokens: Option<u64>,
    /// Tokens left in this window.
    pub remaining_tokens: Option<u64>,
    /// When the tokens are back at their limit.
    pub tokens_reset: Option<Instant>,
    /// Do not call before this instant (`Retry-After` of a 429).
    pub not_before: Option<Instant>,
}

impl RateLimits {
    /// How long a call of that many tokens (prompt and cap) should wait; zero: go ahead.
    pub fn wait(&self, tokens: Tokens) -> Duration {
        let now = Instant::now();
        let until = |at: Option<Instant>| at.map_or(Duration::ZERO, |at| at.saturating_duration_since(now));
        let mut wait = until(self.not_before);
        if self.remaining_requests == Some(0) {
            wait = wait.max(until(self.requests_reset));
        }
        if self.remaining_tokens.is_some_and(|left| left < tokens.0) {
            wait = wait.max(until(self.tokens_reset));
        }
        wait
    }

    /// Takes the call out of what is left, once it may go.
    fn take(&mut self, tokens: Tokens) {
        let now = Instant::now();
        let spend = |left: &mut Option<u64>, reset: &mut Option<Instant>, limit: Option<u64>, cost: u64| {
            if reset.is_some_and(|at| at <= now) {
                // A new window: what the last answer said about the old one is over.
                *left = limit;
                *reset = Some(now + WINDOW);
            }
            if let Some(left) = left {
                *left = left.saturating_sub(cost);
            }
        };
        spend(&mut self.remaining_requests, &mut self.requests_reset, self.limit_requests, 1);
        spend(&mut self.remaining_tokens, &mut self.tokens_reset, self.limit_tokens, tokens.0);
    }
}

/// The last known rate limits of all models. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct RateLimitState(Arc<Mutex<HashMap<String, RateLimits>>>);

impl RateLimitState {
    /// The limits of one model; `None` before its first answer, or when the server says nothing.
    pub fn get(&self, model: &str) -> Option<RateLimits> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(model).copied()
    }

    /// A token bucket for callers that race: how long a call of that many tokens must wait; zero: it
    /// may go, and is taken out of what is left, so that the next caller knows of it before any answer.
    pub fn take(&self, model: &str, tokens: Tokens) -> Duration {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(limits) = all.get_mut(model) else { return Duration::ZERO };
        let wait = limits.wait(tokens);
        if wait.is_zero() {
            limits.take(tokens);
        }
        wait
    }

    /// Takes the headers of an answer. `refused`: it was a 429.
    pub(super) fn note(&self, model: &str, headers: &HeaderMap, refused: bool) {
        let now = Instant::now();
        let number = |name: &str| headers.get(name)?.to_str().ok()?.trim().parse::<u64>().ok();
        let reset = |name: &str| Some(now + duration(headers.get(name)?.to_str().ok()?.trim())?);
        let limits = RateLimits {
            limit_requests: number("x-ratelimit-limit-requests"),
            remaining_requests: number("x-ratelimit-remaining-requests"),
            requests_reset: reset("x-ratelimit-reset-requests"),
            limit_tokens: number("x-ratelimit-limit-tokens"),
            remaining_tokens: number("x-ratelimit-remaining-tokens"),
            tokens_reset: reset("x-ratelimit-reset-tokens"),
            not_before: refused
                .then(|| http_client::retry_after(headers))
                .flatten()
                .and_then(|after| now.checked_add(after)),
        };
        let silent = limits.limit_requests.is_none()
            && limits.remaining_requests.is_none()
            && limits.remaining_tokens.is_none()
            && limits.not_before.is_none();
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if silent {
            // An answer without headers ends what an earlier refusal said.
            if !refused && let Some(known) = all.get_mut(model) {
                known.not_before = None;
            }
        } else if all.len() < MAX_MODELS || all.contains_key(model) {
            all.insert(model.to_owned(), limits);
        }
    }
}

/// A duration as the API writes it: `20ms`, `6m0s`, `1h2m3.5s`; plain numbers are seconds.
fn duration(text: &str) -> Option<Duration> {
    let seconds = text.parse::<f64>().ok().or_else(|| seconds(text))?;
    Duration::try_from_secs_f64(seconds).ok().map(|total| total.min(http_client::LONGEST_RETRY_AFTER))
}

/// The seconds of a duration with units.
fn seconds(text: &str) -> Option<f64> {
    let mut total = 0.0;
    let mut rest = text;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (number, tail) = rest.split_at(digits);
        let unit_len = tail.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(unit_len);
        let seconds = match unit {
            "ns" => 1e-9,
            "us" | "µs" => 1e-6,
            "ms" => 1e-3,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            "d" => 86_400.0,
            _ => return None,
        };
        total += number.parse::<f64>().ok()? * seconds;
        rest = tail;
    }
    Some(total)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| ((*name).parse().unwrap(), value.parse().unwrap())).collect()
    }

    #[test]
    fn durations_are_read_as_the_api_writes_them() {
        assert_eq!(duration("20ms"), Some(Duration::from_millis(20)));
        assert_eq!(duration("6m0s"), Some(Duration::from_mins(6)));
        assert_eq!(duration("59m3.5s"), Some(Duration::from_millis(3_543_500)));
        assert_eq!(duration("2"), Some(Duration::from_secs(2)));
        for longer in ["1h2m3.5s", "99999999999h"] {
            assert_eq!(duration(longer), Some(http_client::LONGEST_RETRY_AFTER), "{longer}");
        }
        for nonsense in ["soon", "1x", "s", "-1", "9e99", "1.2.3s"] {
            assert_eq!(duration(nonsense), None, "{nonsense}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_waits_only_when_it_does_not_fit() {
        let state = RateLimitState::default();
        assert_eq!(state.get("m"), None);
        state.note(
            "m",
            &headers(&[
                ("x-ratelimit-limit-requests", "100"),
                ("x-ratelimit-remaining-requests", "5"),
                ("x-ratelimit-reset-requests", "1s"),
                ("x-ratelimit-remaining-tokens", "1000"),
                ("x-ratelimit-reset-tokens", "6m0s"),
            ]),
            false,
        );
        let limits = state.get("m").unwrap();
        assert_eq!(limits.wait(Tokens(1000)), Duration::ZERO);
        assert_eq!(limits.wait(Tokens(1001)), Duration::from_mins(6));
        tokio::time::advance(Duration::from_mins(7)).await;
        assert_eq!(limits.wait(Tokens(1001)), Duration::ZERO, "the window is over");
    }

    #[tokio::test(start_paused = true)]
    async fn a_refusal_holds_until_its_retry_after_or_the_next_answer() {
        let state = RateLimitState::default();
        state.note("m", &headers(&[("retry-after", "3")]), true);
        assert_eq!(state.get("m").unwrap().wait(Tokens(1)), Duration::from_secs(3));
        state.note("m", &HeaderMap::new(), false);
        assert_eq!(state.get("m").unwrap().wait(Tokens(1)), Duration::ZERO);
    }

    /// A model must not be lost to a worker until its restart because one header was wrong.
    #[tokio::test(start_paused = true)]
    async fn no_header_puts_a_model_off_for_more_than_an_hour() {
        let state = RateLimitState::default();
        let hour = Duration::from_hours(1);
        state.note("m", &headers(&[("retry-after", "Tue, 31 Dec 2999 23:59:59 GMT")]), true);
        assert_eq!(state.get("m").unwrap().wait(Tokens(1)), hour);
        for reset in ["7200h", "900000s", "1e9"] {
            let told = [("x-ratelimit-remaining-requests", "0"), ("x-ratelimit-reset-requests", reset)];
            state.note("m", &headers(&told), false);
            assert_eq!(state.get("m").unwrap().wait(Tokens(1)), hour, "{reset}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn calls_that_race_take_from_one_bucket_until_the_window_is_over() {
        let state = RateLimitState::default();
        assert_eq!(state.take("m", Tokens(900)), Duration::ZERO, "nothing is known yet");
        let told = headers(&[
            ("x-ratelimit-limit-tokens", "1000"),
            ("x-ratelimit-remaining-tokens", "700"),
            ("x-ratelimit-reset-tokens", "20s"),
        ]);
        state.note("m", &told, false);
        assert_eq!(state.take("m", Tokens(400)), Duration::ZERO);
        assert_eq!(state.take("m", Tokens(400)), Duration::from_secs(20), "300 are left, without any answer");
        assert_eq!(state.take("m", Tokens(300)), Duration::ZERO);
        tokio::time::advance(Duration::from_secs(20)).await;
        assert_eq!(state.take("m", Tokens(800)), Duration::ZERO, "a new window");
        assert_eq!(state.take("m", Tokens(800)), WINDOW, "which is not without end");
        state.note("m", &told, false);
        assert_eq!(state.take("m", Tokens(700)), Duration::ZERO, "an answer knows better");
        tokio::time::advance(Duration::from_secs(20)).await;
        assert_eq!(state.take("m", Tokens(5000)), Duration::ZERO, "no window fits it: the API decides");
    }

    proptest! {
        #[test]
        fn any_header_is_read_or_ignored(text in "[ -~]{0,30}") {
            let state = RateLimitState::default();
            state.note("m", &headers(&[("x-ratelimit-reset-tokens", &text), ("retry-after", &text)]), true);
        }
    }
}
