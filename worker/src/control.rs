//! Commands: their effect is on the whole fleet, because it is in the store.

use atlas_shared::{
    ledger::LedgerError,
    message::{Answer, AnswerStatus, AnswerType, Command, Control},
    trace_context::TraceParent,
};
use serde_json::{Map, Value, json};

use crate::{
    context::Context,
    crash::crash_point,
    resilient,
    store::{self, Cancelled, FleetChange, FleetState},
};

/// Carries out a command and answers it. After an error nothing was answered, and the message must
/// come again: every command is idempotent.
pub(crate) async fn obey(
    context: &Context,
    control: &Control,
    trace: TraceParent,
) -> Result<(), LedgerError> {
    crash_point!("before_command");
    let (name, content) = match &control.command {
        Command::Heartbeat => ("heartbeat", fleet(change(context, FleetChange::default()).await?)),
        Command::FlushCache => (
            "flush_cache",
            fleet(change(context, FleetChange { flush_cache: true, ..FleetChange::default() }).await?),
        ),
        Command::SetBudget { daily, per_run } => {
            let wanted = FleetChange { daily_limit: *daily, run_limit: *per_run, ..FleetChange::default() };
            ("set_budget", fleet(change(context, wanted).await?))
        }
        Command::Pause => (
            "pause",
            fleet(change(context, FleetChange { paused: Some(true), ..FleetChange::default() }).await?),
        ),
        Command::Resume => (
            "resume",
            fleet(change(context, FleetChange { paused: Some(false), ..FleetChange::default() }).await?),
        ),
        Command::Cancel { task_id } => {
            let store = context.store.as_ref();
            let outcome =
                resilient::store(&context.retry, || store::cancel(store, *task_id, &context.topic_out))
                    .await?;
            let content = json!({
                "cancelled": !matches!(outcome, Cancelled::Final(_)),
                "outcome": outcome.as_str(),
                "cancelled_task_id": task_id,
            });
            ("cancel", content)
        }
    };
    crash_point!("command_stored");
    tracing::info!(command = name, task_id = %control.task_id, "command carried out");
    context.sweep_now.notify_one();

    let mut body = Map::from_iter([("command".to_owned(), json!(name))]);
    if let Value::Object(fields) = content {
        body.extend(fields);
    }
    let metadata = match control.raw.get("metadata") {
        Some(Value::Object(metadata)) => metadata.clone(),
        _ => Map::new(),
    };
    let answer =
        Answer::bare(control.task_id, AnswerType::Control, AnswerStatus::Done, Value::Object(body), metadata);
    context.publish(&answer, trace).await?;
    Ok(())
}

async fn change(context: &Context, change: FleetChange) -> Result<FleetState, LedgerError> {
    if change == FleetChange::default() {
        return resilient::store(&context.retry, || context.store.fleet_state(context.config.limits)).await;
    }
    resilient::store(&context.retry, || context.store.change_fleet(&change, context.config.limits)).await
}

fn fleet(state: FleetState) -> Value {
    // A state is numbers and booleans: it always serialises.
    json!({ "fleet": serde_json::to_value(state).unwrap_or(Value::Null) })
}
