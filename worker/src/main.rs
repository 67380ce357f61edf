//! `atlas-worker`: one process of the fleet.

use std::process::ExitCode;

use atlas_shared::{
    Config,
    config::Process,
    process::{self, Failure, Start},
};
use atlas_worker::{RunningWorker, StartError, Worker};
use clap::Parser;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

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
    let Arguments { healthcheck, check_config } = Arguments::parse();
    let start = Start { name: "atlas-worker", process: Process::Worker, healthcheck, check_config };
    Box::pin(process::run(start, work)).await
}

async fn work(config: Config) -> Result<(), Failure> {
    let start = async {
        Worker::start(&config).await.map_err(|error| match error {
            StartError::Config(_) => Failure::misconfigured(error),
            _ => Failure::failed(error),
        })
    };
    Box::pin(process::serve(start, RunningWorker::drain)).await
}
