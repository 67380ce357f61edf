//! `atlas-worker`: one process of the fleet.

use std::process::ExitCode;

use atlas_shared::{Config, Env, config::Process, telemetry};
use atlas_worker::Worker;
use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};

/// Pulls architecture requests, writes grounded specs within the token budget, publishes them.
///
/// All settings come from environment variables: docs/CONFIGURATION.md lists them, every secret can
/// come from a file (NAME_FILE). SIGTERM or Ctrl-C drains: no new work, running work may finish within
/// DRAIN_TIMEOUT_SECONDS, the rest is given back to the fleet. A second signal exits at once.
#[derive(Parser)]
#[command(
    name = "atlas-worker",
    version,
    after_help = "Exit codes: 0 drained, 1 failed, 2 wrong configuration.\n\n\
                  Try it on a laptop, with nothing else installed: atlas dev"
)]
struct Arguments {
    /// Ask the running worker on WORKER_LISTEN whether it is ready; exit 0 if it is. For container
    /// health checks.
    #[arg(long)]
    healthcheck: bool,
    /// Read and check the configuration, then exit.
    #[arg(long)]
    check_config: bool,
}

#[tokio::main]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let config = match Config::load(&Env::process(), Process::Worker) {
        Ok(config) => config,
        Err(errors) => {
            eprintln!("atlas-worker: {errors}");
            return ExitCode::from(2);
        }
    };
    if arguments.check_config {
        println!("The configuration is valid.");
        return ExitCode::SUCCESS;
    }
    if arguments.healthcheck {
        return healthcheck(&config).await;
    }
    if let Err(errors) = telemetry::init(&config.log) {
        eprintln!("atlas-worker: {errors}");
        return ExitCode::from(2);
    }
    match work(&config).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(
                error = format!("{error:#}"),
                error_code = "start_failed",
                "the worker did not start"
            );
            eprintln!("atlas-worker: {error:#}");
            match error.downcast_ref::<atlas_worker::StartError>() {
                Some(atlas_worker::StartError::Config(_)) => ExitCode::from(2),
                _ => ExitCode::FAILURE,
            }
        }
    }
}

async fn work(config: &Config) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let worker = tokio::select! {
        started = Worker::start(config) => started?,
        _ = terminate.recv() => return Ok(()),
        _ = interrupt.recv() => return Ok(()),
    };
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tokio::select! {
        () = worker.drain() => Ok(()),
        _ = terminate.recv() => anyhow::bail!("second signal: exiting without draining"),
        _ = interrupt.recv() => anyhow::bail!("second signal: exiting without draining"),
    }
}

async fn healthcheck(config: &Config) -> ExitCode {
    match atlas_shared::ops::probe_ready(config.worker.listen).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("not ready: {why}");
            ExitCode::FAILURE
        }
    }
}
