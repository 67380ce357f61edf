//! Stops runs at work that somebody cancelled, on whatever worker a cancel arrived.
//!
//! A cancel is a mark in the store. Renewing a lease reads it too, but only each third of a lease time: long
//! enough for another call to be paid. So a worker with runs at work asks for the marks of all of them at once.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use prometheus::IntGauge;
use tokio_util::sync::CancellationToken;

use crate::{
    context::Context,
    stop::{Stop, StopReason},
    store::{CancelledRun, Lease},
};

/// The runs at work here, by what names an attempt in the store.
#[derive(Debug)]
pub(crate) struct Running {
    runs: Mutex<HashMap<CancelledRun, Stop>>,
    /// How many there are, for whoever watches.
    in_flight: IntGauge,
}

/// A run's place among those at work, until dropped.
#[derive(Debug)]
pub(crate) struct Place<'a> {
    running: &'a Running,
    run: CancelledRun,
}

impl Running {
    /// None yet.
    pub(crate) fn new(in_flight: IntGauge) -> Self {
        Self { runs: Mutex::default(), in_flight }
    }

    /// From now on this run is stopped when it is cancelled.
    pub(crate) fn enter(&self, lease: &Lease, stop: &Stop) -> Place<'_> {
        let run = CancelledRun { task_id: lease.task_id, attempt: lease.attempt };
        if self.lock().insert(run, stop.clone()).is_none() {
            self.in_flight.inc();
        }
        Place { running: self, run }
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.lock().len()
    }

    fn stop(&self, cancelled: &CancelledRun) {
        if let Some(stop) = self.lock().get(cancelled) {
            stop.stop(StopReason::Cancelled);
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<CancelledRun, Stop>> {
        self.runs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        if self.running.lock().remove(&self.run).is_some() {
            self.running.in_flight.dec();
        }
    }
}

/// Looks for cancels until told to stop; nothing is asked while no run is at work.
pub(crate) async fn run(context: Arc<Context>, stop: CancellationToken) {
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(context.config.worker.cancel_interval) => {}
        }
        if context.running.len() == 0 {
            continue;
        }
        match context.store.cancelled_runs(&context.worker).await {
            Ok(cancelled) => cancelled.iter().for_each(|run| context.running.stop(run)),
            // The sweep says so where people look; the renewal of a lease tells of a cancel too.
            Err(error) => tracing::debug!(error = %error, "cancels could not be read"),
        }
    }
}
