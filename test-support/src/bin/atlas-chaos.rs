//! `make chaos`: see the library's `chaos` module.

use std::{path::PathBuf, process::ExitCode};

use atlas_test_support::chaos::{self, ChaosOptions, FleetError};
use clap::Parser;

/// Breaks a whole fleet on purpose, all the time, and reconciles four books at the end.
///
/// Starts a Pub/Sub emulator, Postgres, a PostgREST-compatible server, the model simulator, the gateway
/// and four workers as processes of their own; publishes requests, duplicates and malformed messages;
/// kills, freezes, drains and restarts all of them; cuts connections; lets the day's limit run out; and
/// lets 20 % of all model calls fail. Then it compares what was published, stored, answered and billed.
#[derive(Parser)]
#[command(
    name = "atlas-chaos",
    after_help = "The seed fixes the plan: the messages and their order, which blow falls after how many finished \
                  requests, how long what is broken stays so, and which fault which attempt of a call meets. It does \
                  not fix how the processes interleave: which call comes first, on which instruction a worker is \
                  killed. The same seed is the same storm, not the same history.\n\n\
                  Exit codes: 0 all books agree, 1 they differ or the run got stuck, 2 a service is missing."
)]
struct Arguments {
    /// What everything is derived from; printed first. Default: from the clock.
    #[arg(long)]
    seed: Option<u64>,
    /// Requests to publish; duplicates and malformed messages come on top.
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u64).range(100..=1_000_000))]
    requests: u64,
    /// Where the report is kept, and the logs if the books differ.
    #[arg(long, default_value = "target/chaos")]
    folder: PathBuf,
}

#[tokio::main]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let seed = arguments.seed.unwrap_or_else(|| {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        now.as_secs() % 1_000_000
    });
    let requests = usize::try_from(arguments.requests).unwrap_or(10_000);
    match chaos::run(ChaosOptions { seed, requests, folder: arguments.folder }).await {
        Ok(outcome) => {
            println!("\n{}\nKept in {}", outcome.report, outcome.file.display());
            if outcome.differences.is_empty() {
                return ExitCode::SUCCESS;
            }
            eprintln!(
                "chaos: the books differ; again with the same plan: make chaos SEED={seed} REQUESTS={requests}"
            );
            ExitCode::FAILURE
        }
        Err(FleetError::Missing { service, reason }) => {
            eprintln!(
                "chaos: {service} is missing: {reason}.\nIt needs Postgres 15 or newer (Debian package postgresql), a JDK \
                 17 or newer (default-jdk-headless), the Pub/Sub emulator (google-cloud-cli-pubsub-emulator, or gcloud \
                 components install pubsub-emulator beta) and curl."
            );
            ExitCode::from(2)
        }
        Err(FleetError::Broken(error)) => {
            eprintln!(
                "chaos: {error:#}\nAgain with the same plan: make chaos SEED={seed} REQUESTS={requests}"
            );
            ExitCode::FAILURE
        }
    }
}
