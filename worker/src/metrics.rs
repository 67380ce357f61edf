//! The worker's metrics (DESIGN section 9). One struct, one registry, no globals.

use std::sync::Arc;

use atlas_shared::{
    ledger::{Tokens, Usage},
    metrics::{MetricsError, Registry},
};
use prometheus::{Histogram, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec};

use crate::{queue::Backlog, store::FleetState};

/// Upper bounds of run and stage histograms, in seconds: from embedded to a slow model, to 300 s.
const SECONDS: &[f64] =
    &[0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0];

/// Upper bounds of the overhead's histogram, in seconds: it is to be 10 ms or less on the embedded store.
const OVERHEAD_SECONDS: &[f64] =
    &[0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0];

/// All metrics of one worker.
#[derive(Clone, Debug)]
pub(crate) struct Metrics {
    /// `atlas_tokens_total{model,kind}`: billed tokens; kind is `prompt`, `completion` or `assumed`.
    pub(crate) tokens: IntCounterVec,
    /// `atlas_run_seconds{status}`: one attempt, from claim to its end.
    pub(crate) run_seconds: HistogramVec,
    /// `atlas_runs_total{status}`: attempts by how they ended.
    pub(crate) runs: IntCounterVec,
    /// `atlas_stage_seconds{stage}`.
    pub(crate) stage_seconds: HistogramVec,
    /// `atlas_overhead_seconds`: run time minus time spent waiting on gateway and model.
    pub(crate) overhead_seconds: Histogram,
    /// `atlas_in_flight`.
    pub(crate) in_flight: IntGauge,
    /// `atlas_budget_limit_tokens`, `…_used_tokens`, `…_reserved_tokens`.
    budget_limit: IntGauge,
    budget_used: IntGauge,
    budget_reserved: IntGauge,
    /// `atlas_deferred_runs`.
    deferred_runs: IntGauge,
    /// `atlas_queued_runs`.
    queued_runs: IntGauge,
    /// `atlas_outbox_unsent`, `atlas_outbox_oldest_seconds`.
    outbox_unsent: IntGauge,
    outbox_oldest: IntGauge,
    /// `atlas_fleet_paused`.
    paused: IntGauge,
    /// `atlas_dead_letters_total{reason}`.
    pub(crate) dead_letters: IntCounterVec,
    /// `atlas_messages_total{outcome}`: deliveries by what became of them.
    pub(crate) messages: IntCounterVec,
    /// `atlas_citations_invalid_total`.
    pub(crate) citations_invalid: IntCounter,
    /// `atlas_context_degraded_total`: runs that went on without passages.
    pub(crate) context_degraded: IntCounter,
    /// `atlas_reservation_overruns_total{model}`: answers that billed more than was reserved.
    pub(crate) overruns: IntCounterVec,
    /// `pubsub_unacknowledged_messages{subscription}`, `pubsub_oldest_unacknowledged_seconds{subscription}`:
    /// the whole subscription's where the queue can count it, else this process's own deliveries.
    unacknowledged: IntGaugeVec,
    oldest_unacknowledged: IntGaugeVec,
    /// `atlas_purged_rows_total{kind}`: old rows that this worker deleted.
    pub(crate) purged_rows: IntCounterVec,
    /// `atlas_rate_limit_wait_seconds`: how long a call waited for the API's rate limit, before it.
    pub(crate) rate_limit_wait: Histogram,
    /// `atlas_work_blocked{reason}`: 1 while this reason keeps the worker from working.
    pub(crate) work_blocked: IntGaugeVec,
}

impl Metrics {
    /// Creates the metrics in `registry`.
    pub(crate) fn new(registry: &Registry) -> Result<Arc<Self>, MetricsError> {
        Ok(Arc::new(Self {
            tokens: registry.counters(
                "atlas_tokens_total",
                "Billed tokens by model and kind (prompt, completion, assumed).",
                &["model", "kind"],
            )?,
            run_seconds: registry.histograms(
                "atlas_run_seconds",
                "One attempt of a run, from claim to its end, by how it ended.",
                &["status"],
                SECONDS,
            )?,
            runs: registry.counters(
                "atlas_runs_total",
                "Attempts of runs by how they ended.",
                &["status"],
            )?,
            stage_seconds: registry.histograms(
                "atlas_stage_seconds",
                "Time in one stage of a run.",
                &["stage"],
                SECONDS,
            )?,
            overhead_seconds: registry.histogram(
                "atlas_overhead_seconds",
                "Run time minus time spent waiting on gateway and model.",
                OVERHEAD_SECONDS,
            )?,
            in_flight: registry.gauge("atlas_in_flight", "Runs at work in this worker.")?,
            budget_limit: registry.gauge("atlas_budget_limit_tokens", "The day's limit of the fleet.")?,
            budget_used: registry.gauge("atlas_budget_used_tokens", "Tokens booked today as spent.")?,
            budget_reserved: registry.gauge("atlas_budget_reserved_tokens", "Tokens granted and open.")?,
            deferred_runs: registry.gauge("atlas_deferred_runs", "Runs that wait for tokens.")?,
            queued_runs: registry.gauge("atlas_queued_runs", "Runs in the store that wait for a worker.")?,
            outbox_unsent: registry.gauge("atlas_outbox_unsent", "Answers that were not published yet.")?,
            outbox_oldest: registry
                .gauge("atlas_outbox_oldest_seconds", "Age of the oldest unsent answer.")?,
            paused: registry.gauge("atlas_fleet_paused", "1 while the fleet is paused.")?,
            dead_letters: registry.counters(
                "atlas_dead_letters_total",
                "Messages put into dead_letters, by reason.",
                &["reason"],
            )?,
            messages: registry.counters(
                "atlas_messages_total",
                "Deliveries by what became of them (chat, control, rejected, other_role, duplicate).",
                &["outcome"],
            )?,
            citations_invalid: registry.counter(
                "atlas_citations_invalid_total",
                "Citations of passages that were not given, removed from specs.",
            )?,
            context_degraded: registry.counter(
                "atlas_context_degraded_total",
                "Runs that went on without passages, or with fewer than could be.",
            )?,
            overruns: registry.counters(
                "atlas_reservation_overruns_total",
                "Answers that billed more than was reserved.",
                &["model"],
            )?,
            unacknowledged: registry.gauges(
                "pubsub_unacknowledged_messages",
                "Messages that were not acked yet: the subscription's where the queue can count them, else \
                 those this process holds.",
                &["subscription"],
            )?,
            oldest_unacknowledged: registry.gauges(
                "pubsub_oldest_unacknowledged_seconds",
                "How long the oldest of them has waited.",
                &["subscription"],
            )?,
            purged_rows: registry.counters(
                "atlas_purged_rows_total",
                "Old rows of the store that this worker deleted, by kind.",
                &["kind"],
            )?,
            rate_limit_wait: registry.histogram(
                "atlas_rate_limit_wait_seconds",
                "How long model calls waited beforehand for the API's rate limit.",
                SECONDS,
            )?,
            work_blocked: registry.gauges(
                "atlas_work_blocked",
                "1 while this reason keeps the worker from working.",
                &["reason"],
            )?,
        }))
    }

    /// Counts a reservation that is booked as spent because nobody can know what was billed.
    pub(crate) fn assumed(&self, model: &str, tokens: Tokens) {
        self.tokens.with_label_values(&[model, "assumed"]).inc_by(tokens.0);
    }

    /// Books what a call billed.
    pub(crate) fn billed(&self, model: &str, usage: Usage) {
        self.tokens.with_label_values(&[model, "prompt"]).inc_by(usage.prompt.0);
        self.tokens.with_label_values(&[model, "completion"]).inc_by(usage.completion.0);
    }

    /// Shows a queue's backlog.
    pub(crate) fn backlog(&self, backlog: &Backlog) {
        let labels = [backlog.subscription.as_str()];
        let gauge = |gauges: &IntGaugeVec, value: u64| {
            gauges.with_label_values(&labels).set(i64::try_from(value).unwrap_or(i64::MAX));
        };
        gauge(&self.unacknowledged, backlog.unacknowledged);
        gauge(&self.oldest_unacknowledged, backlog.oldest.unwrap_or_default().as_secs());
    }

    /// Shows the fleet's state.
    pub(crate) fn fleet(&self, state: &FleetState) {
        let gauge = |gauge: &IntGauge, value: u64| gauge.set(i64::try_from(value).unwrap_or(i64::MAX));
        gauge(&self.budget_limit, state.budget.limit.0);
        gauge(&self.budget_used, state.budget.used.0);
        gauge(&self.budget_reserved, state.budget.reserved.0);
        gauge(&self.deferred_runs, state.deferred_runs);
        gauge(&self.queued_runs, state.queued_runs);
        gauge(&self.outbox_unsent, state.outbox_unsent);
        gauge(&self.outbox_oldest, state.outbox_oldest_seconds);
        self.paused.set(i64::from(state.paused));
    }
}
