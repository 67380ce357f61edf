//! `atlas-bench`: measures Atlas with real processes and says on what. Never part of the tests.
//!
//! Each benchmark starts the release binaries beside its own, gives them work, checks that the work was
//! done (a fast wrong answer is a failure) and prints Markdown for `docs/BENCHMARKS.md`.

mod corpus;
mod engine;
mod index;
mod machine;
mod process;
mod prometheus;
mod search;
mod worker;

use clap::{Parser, Subcommand};

/// Measures Atlas with real processes; prints Markdown.
///
/// Use a release build (`make bench` does): a debug build is five to twenty times slower.
#[derive(Debug, Parser)]
#[command(name = "atlas-bench", version)]
struct Arguments {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// One worker: runs a second, overhead, CPU, memory, store round trips.
    Worker(worker::Arguments),
    /// `atlas index` without embeddings: files, bytes and chunks a second, and a pipeline in Python beside it.
    Index(index::Arguments),
    /// Searches through the gateway: latency, rate, its share, memory, start-up.
    Search(search::Arguments),
    /// The machine's description.
    Machine,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    if cfg!(debug_assertions) {
        eprintln!("atlas-bench: this is a debug build; its numbers say nothing about Atlas");
    }
    match arguments.what {
        What::Worker(arguments) => worker::measure(&arguments).await,
        What::Index(arguments) => index::measure(&arguments),
        What::Search(arguments) => search::measure(&arguments).await,
        What::Machine => {
            println!("{}", machine::describe());
            Ok(())
        }
    }
}
