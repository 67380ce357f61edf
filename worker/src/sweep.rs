//! What every worker does from time to time, jittered, safe to run in all of them at once:
//! takes up runs that are due (expired leases, given-back and deferred runs), sends what is left in
//! the outbox, and reads the fleet's state into gauges and the gate.

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use atlas_shared::{Dependency, trace_context::TraceParent};
use rand::Rng as _;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{context::Context, crash::crash_point, gate::Reason, resilient, run, store::StoreError};

/// Outbox rows taken at once.
const OUTBOX_BATCH: usize = 50;
/// Old rows of one kind that are deleted at once: a transaction of some milliseconds.
const PURGE_BATCH: usize = 500;
/// Batches in a row, so that a purge of a long backlog does not hold up the sweep.
const PURGE_BATCHES: usize = 20;
/// How often each worker looks for old rows; jittered.
const PURGE_INTERVAL: Duration = Duration::from_mins(10);
/// How long taken rows are ours: longer than sending them can take.
const OUTBOX_HOLD: Duration = Duration::from_secs(60);

/// Sweeps until told to stop.
pub(crate) async fn run(
    context: Arc<Context>,
    tasks: TaskTracker,
    stop: CancellationToken,
    kill: CancellationToken,
) {
    let mut cache_generation = None;
    // Not at once: a fleet that restarts has better things to do.
    let mut purge_at = Instant::now() + jittered(PURGE_INTERVAL);
    loop {
        if Instant::now() >= purge_at {
            purge_at = Instant::now() + jittered(PURGE_INTERVAL);
            if let Err(error) = purge(&context).await {
                tracing::warn!(error = %error, "old rows were not purged");
            }
        }
        if let Err(error) = sweep(&context, &tasks, &kill, &mut cache_generation).await {
            tracing::warn!(error = %error, "sweep failed");
            context.gate.set(Reason::Dependency(Dependency::Store), true);
        }
        let pause = jittered(context.config.worker.sweep_interval);
        tokio::select! {
            () = stop.cancelled() => return,
            () = context.sweep_now.notified() => {}
            () = tokio::time::sleep(pause) => {}
        }
    }
}

async fn sweep(
    context: &Arc<Context>,
    tasks: &TaskTracker,
    kill: &CancellationToken,
    cache_generation: &mut Option<u64>,
) -> Result<(), StoreError> {
    let limits = context.config.limits;
    let fleet = resilient::store(&context.retry, || context.store.fleet_state(limits)).await?;
    context.gate.set(Reason::Dependency(Dependency::Store), false);
    context.gate.set(Reason::Paused, fleet.paused);
    context.gate.set(Reason::Starting, false);
    context.run_limit.store(fleet.run_limit.0, Ordering::Relaxed);
    context.metrics.fleet(&fleet);

    let flush = cache_generation.is_some_and(|seen| seen < fleet.cache_generation);
    match if flush { context.gateway.clear_cache().await } else { Ok(()) } {
        Ok(()) => *cache_generation = Some(fleet.cache_generation),
        // Not noted as seen, so the next sweep tries again.
        Err(error) => tracing::warn!(error = %error, "the gateway's cache could not be flushed"),
    }

    send_outbox(context).await?;
    // Deferred runs first, then the intake: oldest first.
    take_due(context, tasks, kill).await?;
    context.gate.budget_available(fleet.budget.available());
    Ok(())
}

/// Sends unsent rows until there are none, or sending fails.
async fn send_outbox(context: &Context) -> Result<(), StoreError> {
    loop {
        let rows =
            resilient::store(&context.retry, || context.store.outbox_take(OUTBOX_BATCH, OUTBOX_HOLD)).await?;
        let last = rows.len() < OUTBOX_BATCH;
        let sent = context.outbox.send_all(rows, context.config.worker.outbox_concurrency).await;
        if last || !sent {
            return Ok(());
        }
    }
}

/// Deletes what is older than it must be kept, in small transactions.
async fn purge(context: &Context) -> Result<(), StoreError> {
    for _ in 0..PURGE_BATCHES {
        let purged = context.store.purge_old(&context.config.worker.retention, PURGE_BATCH).await?;
        for (kind, rows) in purged.by_kind() {
            context.metrics.purged_rows.with_label_values(&[kind]).inc_by(rows);
        }
        if purged.by_kind().iter().all(|(_, rows)| *rows < PURGE_BATCH as u64) {
            break;
        }
    }
    Ok(())
}

/// Takes up due runs, as many as there is room for.
async fn take_due(
    context: &Arc<Context>,
    tasks: &TaskTracker,
    kill: &CancellationToken,
) -> Result<(), StoreError> {
    // What stops pulling keeps due runs waiting too. Pause and budget need no look here: the store
    // gives nothing while paused, and knows which deferred runs fit.
    if !context.gate.is_open() {
        return Ok(());
    }
    let mut permits = Vec::new();
    while let Some(permit) = context.limiter.try_acquire() {
        permits.push(permit);
    }
    if permits.is_empty() {
        return Ok(());
    }
    let claimed = context
        .store
        .claim_due(&context.worker, permits.len(), context.config.worker.lease, context.config.limits)
        .await?;
    for (run, permit) in claimed.into_iter().zip(permits) {
        crash_point!("due_claimed");
        tracing::info!(task_id = %run.lease.task_id, attempt = run.lease.attempt, taken_over = run.taken_over, "run taken up");
        let context = Arc::clone(context);
        let kill = kill.clone();
        let at_work = context.busy.begin();
        tasks.spawn(async move {
            let ending = run::execute(&context, run, TraceParent::generate(), permit, &kill).await;
            drop(at_work);
            ending
        });
    }
    Ok(())
}

/// ±25 %, so that a fleet does not sweep in step.
fn jittered(interval: Duration) -> Duration {
    interval.mul_f64(rand::rng().random_range(0.75..1.25))
}
