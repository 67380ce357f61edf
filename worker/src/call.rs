//! One logical model call: reserve, call, retry, fall back. The only place that spends tokens.
//!
//! What always holds, whatever happens in between:
//! - no call without a reservation that covers all it can bill;
//! - every reservation is closed: settled with what was billed, released when certainly nothing was,
//!   assumed spent when nobody can know. The successful call's settlement is returned *open*, so that
//!   the caller books it in the same transaction as what the call brought;
//! - retries, fallback and circuit breaker are here and nowhere else.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use atlas_shared::{
    Dependency, UpstreamError,
    ledger::{
        CallKind, Closing, Denial, LedgerError, Limits, Reservation, ReserveOutcome, ReserveRequest, Tokens,
        Usage,
    },
    model::{Billed, ChatAnswer, ChatModel, ChatRequest, Listener, ModelError},
    resilience::{self, CircuitBreaker, CircuitState, RetryPolicy},
};
use uuid::Uuid;

use crate::{
    busy::Busy,
    crash::crash_point,
    gate::{Gate, Reason},
    metrics::Metrics,
    resilient,
    stop::{Stop, StopReason},
    store::{Lease, RunStore, Settlement},
};

/// Calls the model within budget.
#[derive(Clone)]
pub(crate) struct ModelCalls {
    /// The model API.
    pub(crate) model: Arc<dyn ChatModel>,
    /// Where tokens are reserved and booked.
    pub(crate) store: Arc<dyn RunStore>,
    /// `OPENAI_MODEL`, then the fallbacks; never empty.
    pub(crate) chain: Vec<String>,
    /// When to try again.
    pub(crate) retry: RetryPolicy,
    /// Shared by all runs of this worker.
    pub(crate) breaker: Arc<CircuitBreaker>,
    /// Limits of this worker's configuration.
    pub(crate) limits: Limits,
    /// Counters.
    pub(crate) metrics: Arc<Metrics>,
    /// Closed while the circuit is open, so that no more runs are started.
    pub(crate) gate: Gate,
    /// Told that a run waits for a model.
    pub(crate) busy: Busy,
}

/// How often a run that waits for an open circuit looks again.
const SHORTEST_WAIT: Duration = Duration::from_millis(50);
const LONGEST_WAIT: Duration = Duration::from_secs(1);

/// A wait for the API's rate limit up to this long is spent in place; it covers a window of a minute.
const LONGEST_PACE: Duration = Duration::from_secs(90);
/// A reservation is not kept open for a longer wait: others may use its tokens meanwhile.
const LONGEST_HOLD: Duration = Duration::from_secs(1);

/// For whom a call is made.
pub(crate) struct Caller<'a> {
    /// The run's lease.
    pub(crate) lease: &'a Lease,
    /// Whose budget.
    pub(crate) tenant: Option<&'a str>,
    /// `metadata.model`: asked before the configured chain.
    pub(crate) preferred: Option<&'a str>,
    /// Models that are not asked: they refused this document.
    pub(crate) except: &'a [String],
    /// Step name, for the request id.
    pub(crate) step: &'a str,
    /// Stops the call.
    pub(crate) stop: &'a Stop,
    /// Hears what is written while it is written; then the answer is streamed.
    pub(crate) listener: Option<&'a dyn Listener>,
    /// Grows by what is booked for attempts that brought no answer.
    pub(crate) lost: &'a AtomicU64,
}

/// How a call ended.
#[derive(Debug)]
pub(crate) enum CallEnd {
    /// The model answered.
    Answered(Answered),
    /// A limit said no; nothing is open.
    Denied(Denial),
    /// No model of the chain answered; nothing is open.
    Failed {
        /// The last error.
        error: UpstreamError,
        /// True when a 429 was among the failures.
        throttled: bool,
    },
    /// Stopped; what was in flight is booked as assumed.
    Stopped(StopReason),
    /// The store failed, or fenced us off.
    Store(LedgerError),
}

/// An answer, with its reservation still to be closed by the caller.
#[derive(Debug)]
pub(crate) struct Answered {
    /// The answer.
    pub(crate) answer: ChatAnswer,
    /// The model that was asked.
    pub(crate) model: String,
    /// To be stored together with what the answer brought.
    pub(crate) settlement: Settlement,
    /// What it billed; the whole reservation where the server did not say.
    pub(crate) usage: Usage,
    /// Why earlier models of the chain were given up, in order.
    pub(crate) fallbacks: Vec<String>,
    /// Time spent waiting for the model, all attempts together.
    pub(crate) waited: Duration,
    /// True when a 429 was met on the way.
    pub(crate) throttled: bool,
}

/// The request of a call. A run that waits for a model shall hold little, so it is given away when it is
/// sent, and made anew for the next attempt.
struct Requests<'a> {
    next: Option<ChatRequest>,
    again: &'a (dyn Fn() -> Option<ChatRequest> + Send + Sync),
    /// `request_id`, the same for each attempt.
    id: String,
}

impl Requests<'_> {
    /// The request for `model`. `None`: it cannot be made, which a template that rendered before can not
    /// come to.
    fn peek(&mut self, model: &str) -> Option<&ChatRequest> {
        if self.next.is_none() {
            self.next = (self.again)();
        }
        let request = self.next.as_mut()?;
        model.clone_into(&mut request.model);
        request.request_id.clone_from(&self.id);
        Some(request)
    }

    /// The same, given away.
    fn take(&mut self, model: &str) -> Option<ChatRequest> {
        self.peek(model)?;
        self.next.take()
    }
}

/// A request that was made once cannot be made again.
fn unmade() -> UpstreamError {
    UpstreamError::permanent(Dependency::Model, "prompt_template", "the request cannot be made again")
}

/// What became of one model of the chain.
enum ModelEnd {
    End(CallEnd),
    Next(UpstreamError),
}

impl ModelCalls {
    /// Asks the models of the chain, one after the other, until one answers. `request` is sent first;
    /// `again` makes it anew where it must be sent again.
    pub(crate) async fn call(
        &self,
        caller: &Caller<'_>,
        request: ChatRequest,
        again: &(dyn Fn() -> Option<ChatRequest> + Send + Sync),
    ) -> CallEnd {
        let id = format!("{}.{}.{}", caller.lease.task_id, caller.lease.attempt, caller.step);
        let mut requests = Requests { next: Some(request), again, id };
        let mut fallbacks = Vec::new();
        let mut waited = Duration::ZERO;
        let mut throttled = false;
        let mut last = UpstreamError::transient(Dependency::Model, "no model is configured");
        for model in self.models(caller.preferred, caller.except) {
            match self.try_model(caller, &model, &mut requests, &mut waited, &mut throttled).await {
                ModelEnd::End(CallEnd::Answered(answered)) => {
                    return CallEnd::Answered(Answered { fallbacks, waited, throttled, ..answered });
                }
                ModelEnd::End(end) => return end,
                ModelEnd::Next(error) => {
                    tracing::warn!(model, error = %error, error_code = error.code(), "model given up");
                    fallbacks.push(format!("{model}: {error}"));
                    last = error;
                }
            }
        }
        CallEnd::Failed { error: last, throttled }
    }

    fn is_last(&self, model: &str) -> bool {
        self.chain.last().is_some_and(|last| last == model)
    }

    /// The models to ask, in order: the preferred one, then the chain; without those that refused.
    pub(crate) fn models(&self, preferred: Option<&str>, except: &[String]) -> Vec<String> {
        let mut models: Vec<String> = Vec::new();
        for model in preferred.into_iter().chain(self.chain.iter().map(String::as_str)) {
            if !models.iter().chain(except).any(|known| known == model) {
                models.push(model.to_owned());
            }
        }
        models
    }

    /// Attempts one model until it answers, is given up, or something ends the whole call.
    async fn try_model(
        &self,
        caller: &Caller<'_>,
        model: &str,
        requests: &mut Requests<'_>,
        waited: &mut Duration,
        throttled: &mut bool,
    ) -> ModelEnd {
        let bound = match requests.peek(model) {
            Some(request) => {
                let cap = Tokens(u64::from(request.max_completion_tokens));
                self.model.prompt_tokens_upper_bound(model, request) + cap
            }
            None => return ModelEnd::Next(unmade()),
        };
        // Kept across attempts that certainly billed nothing.
        let mut open: Option<Reservation> = None;
        let mut attempt = 0;
        loop {
            attempt += 1;
            if let Err(reason) = caller.stop.check() {
                return self.end(open, Closing::Released, CallEnd::Stopped(reason)).await;
            }
            match self.pace(caller, model, bound, &mut open, waited).await {
                Ok(()) => {}
                Err(end) => return end,
            }
            let permit = match self.circuit(caller.stop).await {
                Ok(permit) => permit,
                Err(end) => return self.end(open, Closing::Released, end).await,
            };
            let reservation = match open.take() {
                Some(reservation) => reservation,
                None => match self.reserve(caller, model, bound).await {
                    Ok(ReserveOutcome::Granted(reservation)) => reservation,
                    Ok(ReserveOutcome::Denied(denial)) => return ModelEnd::End(CallEnd::Denied(denial)),
                    Err(error) => return ModelEnd::End(CallEnd::Store(error)),
                },
            };
            crash_point!("reserved");
            let Some(request) = requests.take(model) else {
                return self
                    .end(
                        Some(reservation),
                        Closing::Released,
                        CallEnd::Failed { error: unmade(), throttled: *throttled },
                    )
                    .await;
            };
            let began = Instant::now();
            let result = tokio::select! {
                result = self.ask(caller, request) => result,
                reason = caller.stop.stopped() => {
                    // It was in flight: nobody can know what it billed.
                    *waited += began.elapsed();
                    self.metrics.assumed(model, reservation.tokens);
                    caller.lost.fetch_add(reservation.tokens.0, Ordering::Relaxed);
                    return self.end(Some(reservation), Closing::Assumed, CallEnd::Stopped(reason)).await;
                }
            };
            *waited += began.elapsed();
            let ModelError { error, billed } = match result {
                Ok(answer) => {
                    crash_point!("answered");
                    permit.succeeded();
                    self.gate.set(Reason::Dependency(Dependency::Model), false);
                    return ModelEnd::End(CallEnd::Answered(self.settle(
                        model,
                        requests,
                        answer,
                        &reservation,
                    )));
                }
                Err(failure) => failure,
            };
            if is_models_own(&error) && !self.is_last(model) {
                // The API is well; another model of the chain may be too.
                permit.succeeded();
            } else {
                permit.failed(&error);
            }
            if self.breaker.state() != CircuitState::Closed {
                self.gate.set(Reason::Dependency(Dependency::Model), true);
            }
            *throttled |= is_throttle(&error);
            crash_point!("call_failed");
            match self.book_failure(caller, model, reservation, billed).await {
                Ok(kept) => open = kept,
                Err(error) => return ModelEnd::End(CallEnd::Store(error)),
            }
            let Some(delay) = self.retry.next_delay(attempt, &error) else {
                return match self.close(open, Closing::Released).await {
                    Ok(()) => ModelEnd::Next(error),
                    Err(error) => ModelEnd::End(CallEnd::Store(error)),
                };
            };
            self.breaker.count_retry();
            tracing::info!(
                model,
                attempt,
                delay_ms = u64::try_from(delay.as_millis()).unwrap_or(u64::MAX),
                error = %error,
                "model call failed, trying again"
            );
            tokio::select! {
                () = tokio::time::sleep(delay) => {}
                reason = caller.stop.stopped() => {
                    return self.end(open, Closing::Released, CallEnd::Stopped(reason)).await;
                }
            }
        }
    }

    /// Waits until the API's rate limit has room for the call, as far as its headers tell: a 429 that is
    /// not provoked costs nobody anything. A wait that is too long for a run under way goes to the next
    /// model, or gives the run back until then.
    async fn pace(
        &self,
        caller: &Caller<'_>,
        model: &str,
        tokens: Tokens,
        open: &mut Option<Reservation>,
        waited: &mut Duration,
    ) -> Result<(), ModelEnd> {
        let began = Instant::now();
        loop {
            let wait = self.model.pace(model, tokens);
            if wait.is_zero() {
                let elapsed = began.elapsed();
                *waited += elapsed;
                self.metrics.rate_limit_wait.observe(elapsed.as_secs_f64());
                return Ok(());
            }
            if wait > LONGEST_HOLD {
                self.close(open.take(), Closing::Released)
                    .await
                    .map_err(|error| ModelEnd::End(CallEnd::Store(error)))?;
            }
            if wait > LONGEST_PACE {
                return Err(ModelEnd::Next(UpstreamError::Transient {
                    dependency: Dependency::Model,
                    message: format!("the rate limit of {model} has no room for {} s", wait.as_secs()),
                    retry_after: Some(wait),
                }));
            }
            tracing::debug!(
                model,
                wait_ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX),
                "waiting for the rate limit"
            );
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                reason = caller.stop.stopped() => {
                    *waited += began.elapsed();
                    return Err(self.end(open.take(), Closing::Released, CallEnd::Stopped(reason)).await);
                }
            }
        }
    }

    /// One attempt, streamed where somebody listens.
    async fn ask(&self, caller: &Caller<'_>, request: ChatRequest) -> Result<ChatAnswer, ModelError> {
        let _away = self.busy.away();
        let Some(listener) = caller.listener else { return self.model.complete_and_forget(request).await };
        listener.begins();
        self.model.stream(&request, listener).await
    }

    /// Waits until the circuit lets a call through. A run that is under way waits in place: an outage
    /// costs it neither its lease nor an attempt. A circuit that only a person can close fails at once.
    async fn circuit(&self, stop: &Stop) -> Result<resilience::Permit<'_>, CallEnd> {
        loop {
            let error = match self.breaker.try_acquire() {
                Ok(permit) => return Ok(permit),
                Err(error) => error,
            };
            self.gate.set(Reason::Dependency(Dependency::Model), true);
            if !error.is_transient() {
                return Err(CallEnd::Failed { error, throttled: false });
            }
            tokio::select! {
                () = tokio::time::sleep(self.breaker.wait().clamp(SHORTEST_WAIT, LONGEST_WAIT)) => {}
                reason = stop.stopped() => return Err(CallEnd::Stopped(reason)),
            }
        }
    }

    async fn reserve(
        &self,
        caller: &Caller<'_>,
        model: &str,
        tokens: Tokens,
    ) -> Result<ReserveOutcome, LedgerError> {
        let reserve = ReserveRequest {
            id: Uuid::now_v7(),
            task_id: Some(caller.lease.task_id),
            attempt: Some(caller.lease.attempt),
            tenant: caller.tenant.map(str::to_owned),
            model: model.to_owned(),
            kind: CallKind::Chat,
            tokens,
            limits: self.limits,
        };
        resilient::store(&self.retry, || self.store.reserve(&reserve)).await
    }

    /// Books a failed attempt. Gives the reservation back where it certainly billed nothing, so that
    /// the next attempt need not ask again.
    async fn book_failure(
        &self,
        caller: &Caller<'_>,
        model: &str,
        reservation: Reservation,
        billed: Billed,
    ) -> Result<Option<Reservation>, LedgerError> {
        let (closing, lost) = match billed {
            Billed::Nothing => return Ok(Some(reservation)),
            Billed::Unknown => {
                self.metrics.assumed(model, reservation.tokens);
                (Closing::Assumed, reservation.tokens)
            }
            Billed::Known(usage) => {
                self.metrics.billed(model, usage);
                (Closing::Settled { usage }, usage.total())
            }
        };
        caller.lost.fetch_add(lost.0, Ordering::Relaxed);
        self.close(Some(reservation), closing).await?;
        Ok(None)
    }

    fn settle(
        &self,
        model: &str,
        requests: &mut Requests<'_>,
        answer: ChatAnswer,
        reservation: &Reservation,
    ) -> Answered {
        let (closing, usage) = match answer.usage {
            Some(usage) => {
                self.metrics.billed(model, usage);
                if usage.total() > reservation.tokens {
                    self.metrics.overruns.with_label_values(&[model]).inc();
                    if let Some(request) = requests.peek(model) {
                        self.model.note_overrun(request, reservation.tokens, usage);
                    }
                    tracing::error!(
                        model,
                        reserved = reservation.tokens.0,
                        billed = usage.total().0,
                        error_code = "reservation_overrun",
                        "the API billed more than was reserved"
                    );
                }
                (Closing::Settled { usage }, usage)
            }
            // A server that does not say what it billed: the upper bound is what we book.
            None => {
                self.metrics.assumed(model, reservation.tokens);
                (Closing::Assumed, Usage { prompt: reservation.tokens, completion: Tokens(0) })
            }
        };
        Answered {
            model: model.to_owned(),
            settlement: Settlement { reservation_id: reservation.id, closing },
            usage,
            answer,
            fallbacks: Vec::new(),
            waited: Duration::ZERO,
            throttled: false,
        }
    }

    /// Closes what is open, then ends. A reservation that cannot be closed now stays open and is
    /// booked as assumed when the run is claimed again.
    async fn end(&self, open: Option<Reservation>, closing: Closing, end: CallEnd) -> ModelEnd {
        if let Err(error) = self.close(open, closing).await {
            tracing::warn!(error = %error, "a reservation could not be closed");
        }
        ModelEnd::End(end)
    }

    async fn close(&self, open: Option<Reservation>, closing: Closing) -> Result<(), LedgerError> {
        let Some(Reservation { id, tokens, model }) = open else { return Ok(()) };
        resilient::store(&self.retry, || {
            self.store.close(Reservation { id, tokens, model: model.clone() }, closing)
        })
        .await
    }
}

/// True when the model is wrong, not the API or the key.
fn is_models_own(error: &UpstreamError) -> bool {
    matches!(error, UpstreamError::Misconfigured { variable: "OPENAI_MODEL" | "OPENAI_FALLBACK_MODELS", .. })
}

/// True for a 429: the API asks for fewer calls at once.
fn is_throttle(error: &UpstreamError) -> bool {
    matches!(error, UpstreamError::Transient { retry_after: Some(_), .. })
}
