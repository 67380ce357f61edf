//! Prometheus metrics without globals: every component owns a [`Registry`] and serves it through
//! [`crate::ops::router`].
//!
//! Constructors return errors instead of panicking, because a name that is registered twice is a
//! mistake of the start, to be reported there. The metrics that every process shares
//! ([`UpstreamMetrics`]) are defined here once, so that names and labels agree everywhere.

use std::collections::HashMap;

use prometheus::{
    Encoder as _, Gauge, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge,
    IntGaugeVec, Opts, TextEncoder, core::Collector,
};

use crate::Dependency;

/// The content type of [`Registry::render`].
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Buckets for calls that take milliseconds: 1 ms to 10 s.
pub const CALL_BUCKETS: &[f64] =
    &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];

/// Buckets for runs and model calls, which take seconds: 50 ms to 300 s.
pub const RUN_BUCKETS: &[f64] =
    &[0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 7.5, 10.0, 15.0, 20.0, 30.0, 45.0, 60.0, 120.0, 300.0];

/// A metric could not be defined or rendered.
#[derive(Debug, thiserror::Error)]
#[error("metric {name}: {source}")]
pub struct MetricsError {
    /// Which metric.
    pub name: String,
    /// Why.
    #[source]
    pub source: prometheus::Error,
}

/// The metrics of one component. Clones share the same metrics.
#[derive(Clone, Debug, Default)]
pub struct Registry(prometheus::Registry);

impl Registry {
    /// An empty registry.
    pub fn new() -> Self {
        Self::default()
    }

    /// A registry whose metrics all carry these labels, such as `service="worker"`.
    pub fn with_labels<const N: usize>(labels: [(&str, &str); N]) -> Result<Self, MetricsError> {
        let labels: HashMap<String, String> =
            labels.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        prometheus::Registry::new_custom(None, Some(labels))
            .map(Self)
            .map_err(|source| MetricsError { name: "registry".to_owned(), source })
    }

    /// A counter.
    pub fn counter(&self, name: &str, help: &str) -> Result<IntCounter, MetricsError> {
        self.register(name, IntCounter::new(name, help))
    }

    /// A counter with labels.
    pub fn counters(&self, name: &str, help: &str, labels: &[&str]) -> Result<IntCounterVec, MetricsError> {
        self.register(name, IntCounterVec::new(Opts::new(name, help), labels))
    }

    /// A gauge of whole numbers.
    pub fn gauge(&self, name: &str, help: &str) -> Result<IntGauge, MetricsError> {
        self.register(name, IntGauge::new(name, help))
    }

    /// A gauge of fractions, such as seconds.
    pub fn float_gauge(&self, name: &str, help: &str) -> Result<Gauge, MetricsError> {
        self.register(name, Gauge::new(name, help))
    }

    /// A gauge of whole numbers with labels.
    pub fn gauges(&self, name: &str, help: &str, labels: &[&str]) -> Result<IntGaugeVec, MetricsError> {
        self.register(name, IntGaugeVec::new(Opts::new(name, help), labels))
    }

    /// A histogram; see [`CALL_BUCKETS`] and [`RUN_BUCKETS`].
    pub fn histogram(&self, name: &str, help: &str, buckets: &[f64]) -> Result<Histogram, MetricsError> {
        let options = HistogramOpts::new(name, help).buckets(buckets.to_vec());
        self.register(name, Histogram::with_opts(options))
    }

    /// A histogram with labels.
    pub fn histograms(
        &self,
        name: &str,
        help: &str,
        labels: &[&str],
        buckets: &[f64],
    ) -> Result<HistogramVec, MetricsError> {
        let options = HistogramOpts::new(name, help).buckets(buckets.to_vec());
        self.register(name, HistogramVec::new(options, labels))
    }

    /// Everything in the Prometheus text format.
    pub fn render(&self) -> Result<String, MetricsError> {
        let mut text = Vec::new();
        TextEncoder::new()
            .encode(&self.0.gather(), &mut text)
            .map_err(|source| MetricsError { name: "all".to_owned(), source })?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    }

    fn register<M: Collector + Clone + 'static>(
        &self,
        name: &str,
        metric: prometheus::Result<M>,
    ) -> Result<M, MetricsError> {
        metric
            .and_then(|metric| self.0.register(Box::new(metric.clone())).map(|()| metric))
            .map_err(|source| MetricsError { name: name.to_owned(), source })
    }
}

/// What every process tells about its dependencies.
#[derive(Clone, Debug)]
pub struct UpstreamMetrics {
    /// `atlas_retries_total{dependency}`.
    retries: IntCounterVec,
    /// `atlas_circuit_open{dependency}`.
    circuit_open: IntGaugeVec,
}

impl UpstreamMetrics {
    /// Registers them.
    pub fn new(registry: &Registry) -> Result<Self, MetricsError> {
        Ok(Self {
            retries: registry.counters(
                "atlas_retries_total",
                "Calls that were tried again after a transient failure.",
                &["dependency"],
            )?,
            circuit_open: registry.gauges(
                "atlas_circuit_open",
                "1 while the circuit breaker of a dependency is open or probing, 0 while it is closed.",
                &["dependency"],
            )?,
        })
    }

    /// The retries of one dependency. Asking creates the series at 0, so that alerts see it from the start.
    pub fn retries(&self, dependency: Dependency) -> IntCounter {
        self.retries.with_label_values(&[dependency.as_str()])
    }

    /// The breaker of one dependency.
    pub fn circuit_open(&self, dependency: Dependency) -> IntGauge {
        self.circuit_open.with_label_values(&[dependency.as_str()])
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn a_registry_renders_what_was_counted() {
        let registry = Registry::with_labels([("service", "worker")]).unwrap();
        registry
            .counters("atlas_runs_total", "Runs.", &["status"])
            .unwrap()
            .with_label_values(&["done"])
            .inc();
        registry.histogram("atlas_run_seconds", "Run time.", RUN_BUCKETS).unwrap().observe(1.5);
        let text = registry.render().unwrap();
        assert!(text.contains(r#"atlas_runs_total{status="done",service="worker"} 1"#), "{text}");
        assert!(text.contains(r#"atlas_run_seconds_bucket{service="worker",le="2.5"} 1"#), "{text}");
    }

    #[test]
    fn a_name_that_is_taken_is_an_error_that_names_it() {
        let registry = Registry::new();
        registry.counter("atlas_x_total", "X.").unwrap();
        let error = registry.counter("atlas_x_total", "X.").unwrap_err();
        assert!(error.to_string().starts_with("metric atlas_x_total: "), "{error}");
    }

    #[test]
    fn registries_do_not_share_metrics() {
        let (worker, gateway) = (Registry::new(), Registry::new());
        UpstreamMetrics::new(&worker).unwrap().retries(Dependency::Store).inc();
        UpstreamMetrics::new(&gateway).unwrap().retries(Dependency::Store);
        assert!(worker.render().unwrap().contains(r#"atlas_retries_total{dependency="store"} 1"#));
        assert!(gateway.render().unwrap().contains(r#"atlas_retries_total{dependency="store"} 0"#));
    }
}
