//! The `atlas` command: one process for a laptop, one tool for operators.
//!
//! One command is one file in [`commands`]; its clap struct is its documentation. What they share:
//! [`context`] (settings), [`ui`] (how to talk), [`error`] (how to fail), [`stack`] (gateway and
//! worker in this process, or the ones that run already), [`sync`] (indexing; what is worth indexing is
//! decided by [`atlas_rag_gateway::source`]).
//!
//! Architecture invariant: nothing depends on this crate, and it holds no logic that a service needs.

use std::{path::PathBuf, process::ExitCode};

use clap::{Parser, Subcommand};

mod again;
mod citations;
mod commands;
mod context;
mod error;
mod eval;
mod history;
mod live;
mod lock;
mod metrics;
mod migrations;
mod request;
mod signals;
mod stack;
mod sync;
mod times;
mod ui;
mod watch;

use context::Context;
use error::Result;
use ui::{Color, Ui};

/// Architecture specs from your own code and documents, with citations, within a token budget.
#[derive(Debug, Parser)]
#[command(
    name = "atlas",
    version,
    disable_help_subcommand = true,
    max_term_width = 100,
    after_help = "First steps:
  atlas demo                            see it work on the folder you are in
  atlas dev                             run everything in this terminal, then in another one:
  atlas index .                         index this folder
  atlas ask \"Design a rate limiter\"     get a spec with citations

When something is wrong:
  atlas doctor                          checks every dependency and says how to mend it

Exit codes: 0 done; 1 tried and failed; 2 wrong usage or configuration; 130 stopped by Ctrl-C.
Settings come from flags, the environment, then --env-file. All of them: atlas config docs"
)]
struct Cli {
    #[command(flatten)]
    global: Global,

    #[command(subcommand)]
    command: Command,
}

/// Flags of every command.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Global options")]
struct Global {
    /// Folder of the embedded store, queue and index [env: ATLAS_DATA_DIR] [default: .atlas]
    #[arg(long, global = true, value_name = "DIR")]
    data_dir: Option<PathBuf>,

    /// Read settings from FILE too; the environment wins. A `.env` here is never read unasked
    #[arg(long, global = true, value_name = "FILE", env = "ATLAS_ENV_FILE", hide_env_values = true)]
    env_file: Option<PathBuf>,

    /// Say more
    #[arg(short, long, global = true)]
    verbose: bool,

    /// Say nothing but results and errors
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    quiet: bool,

    /// When to use colours
    #[arg(
        long,
        global = true,
        value_enum,
        default_value_t,
        value_name = "WHEN",
        hide_possible_values = true
    )]
    color: Color,
}

/// All commands. Each variant's fields and help are in its own file.
#[derive(Debug, Subcommand)]
enum Command {
    Demo(commands::demo::Demo),
    Dev(commands::dev::Dev),
    Ask(commands::ask::Ask),
    Judge(commands::judge::Judge),
    Publish(commands::publish::Publish),
    Index(commands::index::Index),
    Search(commands::search::Search),
    Eval(commands::eval::Eval),
    Collections(commands::collections::Collections),
    Runs(commands::runs::Runs),
    Dlq(commands::dlq::Dlq),
    Budget(commands::budget::Budget),
    Migrate(commands::migrate::Migrate),
    Doctor(commands::doctor::Doctor),
    Key(commands::key::Key),
    #[command(name = "config")]
    ConfigDocs(commands::config::ConfigDocs),
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let Global { data_dir, env_file, verbose, quiet, color } = cli.global;
    let ui = Ui::new(color, quiet, verbose);
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            ui.warn(format_args!("cannot start: {error}"));
            return ExitCode::FAILURE;
        }
    };
    let result = Context::new(ui, env_file.as_deref(), data_dir)
        .and_then(|context| runtime.block_on(run(cli.command, &context)));
    // Blocking reads (standard input, a walk) must not keep a finished command alive.
    runtime.shutdown_background();
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            ui::print_error(&error);
            error.exit().into()
        }
    }
}

async fn run(command: Command, context: &Context) -> Result<()> {
    match command {
        Command::Demo(command) => Box::pin(command.run(context)).await,
        Command::Dev(command) => Box::pin(command.run(context)).await,
        Command::Ask(command) => Box::pin(command.run(context)).await,
        Command::Judge(command) => Box::pin(command.run(context)).await,
        Command::Publish(command) => Box::pin(command.run(context)).await,
        Command::Index(command) => Box::pin(command.run(context)).await,
        Command::Search(command) => Box::pin(command.run(context)).await,
        Command::Collections(command) => Box::pin(command.run(context)).await,
        Command::Eval(command) => Box::pin(command.run(context)).await,
        Command::Runs(command) => Box::pin(command.run(context)).await,
        Command::Dlq(command) => Box::pin(command.run(context)).await,
        Command::Budget(command) => Box::pin(command.run(context)).await,
        Command::Migrate(command) => Box::pin(command.run(context)).await,
        Command::Doctor(command) => Box::pin(command.run(context)).await,
        Command::Key(command) => command.run(context),
        Command::ConfigDocs(command) => command.run(context),
    }
}
