//! `atlas-rag-gateway`: one process that indexes and searches.

use std::{process::ExitCode, sync::Arc};

use async_trait::async_trait;
use atlas_rag_gateway::{Gateway, RunningGateway};
use atlas_shared::{
    Config, Dependency, Ledger, UpstreamError,
    config::Process,
    ledger::{self, BudgetState, Closing, LedgerError, Limits, Reservation, ReserveOutcome, ReserveRequest},
    process::{self, Failure, Start},
};
use clap::Parser;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Indexes documents and finds their passages, over HTTP: hybrid search (BM25 and embeddings) with
/// exact file and line references.
///
/// All settings come from environment variables: docs/CONFIGURATION.md lists them, every secret can
/// come from a file (NAME_FILE). It needs QDRANT_URL (the gRPC port, 6334), or ATLAS_DATA_DIR with a
/// build that has the embedded engine. Without an embedding model search is lexical, and says so.
/// SIGTERM or Ctrl-C finishes what is under way; a second signal exits at once.
#[derive(Parser)]
#[command(
    name = "atlas-rag-gateway",
    version,
    after_help = "Examples:\n  \
                  ATLAS_DATA_DIR=.atlas atlas-rag-gateway\n  \
                  curl -s localhost:8501/v1/query_chat --json '{\"query\":\"how are tokens reserved?\"}'\n\n\
                  The API can be tried at /docs and is described at /openapi.json; metrics are at /metrics.\n\
                  Exit codes: 0 stopped, 1 failed, 2 wrong configuration."
)]
struct Arguments {
    /// Ask the running gateway on GATEWAY_LISTEN whether it is ready; exit 0 if it is. For container
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
    let start = Start { name: "atlas-rag-gateway", process: Process::Gateway, healthcheck, check_config };
    process::run(start, serve).await
}

async fn serve(config: Config) -> Result<(), Failure> {
    let start = async {
        let ledger = open_ledger(&config).await.map_err(Failure::failed)?;
        Gateway::start(&config, ledger).await.map_err(Failure::failed)
    };
    process::serve(start, RunningGateway::shutdown).await
}

/// The ledger books embeddings: without an embedding model there is nothing to book, and no store is needed.
async fn open_ledger(config: &Config) -> Result<Arc<dyn Ledger>, UpstreamError> {
    if config.openai.as_ref().is_some_and(|openai| openai.embedding_model.is_some()) {
        return ledger::open(config).await;
    }
    Ok(Arc::new(NoLedger))
}

/// Stands where nothing is ever booked, and refuses to.
struct NoLedger;

impl NoLedger {
    fn refusal() -> LedgerError {
        LedgerError::Upstream(UpstreamError::misconfigured(
            Dependency::Store,
            "OPENAI_EMBEDDING_MODEL",
            "this gateway was started without an embedding model, so it has no token ledger",
            "set it, and SUPABASE_URL or ATLAS_DATA_DIR for the ledger",
        ))
    }
}

#[async_trait]
impl Ledger for NoLedger {
    async fn reserve(&self, _: &ReserveRequest) -> Result<ReserveOutcome, LedgerError> {
        Err(Self::refusal())
    }

    async fn close(&self, _: Reservation, _: Closing) -> Result<(), LedgerError> {
        Err(Self::refusal())
    }

    async fn budget(&self, _: Limits) -> Result<BudgetState, LedgerError> {
        Err(Self::refusal())
    }
}
