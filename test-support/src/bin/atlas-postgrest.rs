//! A PostgREST-compatible server at `/rest/v1`, as Supabase has it, for tests that need it as a process of
//! its own. Not for production: run PostgREST there.

use std::net::SocketAddr;

use atlas_test_support::supabase;
use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(about = "A PostgREST-compatible server for tests")]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serves the REST API until it is killed.
    Serve {
        /// The database, as role `authenticator`.
        #[arg(long, env = "PGRST_DB_URI")]
        db_url: String,
        /// The HS256 secret of the keys.
        #[arg(long, env = "PGRST_JWT_SECRET")]
        jwt_secret: String,
        /// Where to listen.
        #[arg(long, default_value = "127.0.0.1:54321")]
        listen: SocketAddr,
    },
    /// Prints a key for a role (`service_role`, `anon`, `authenticated`).
    Key {
        /// The HS256 secret of the keys.
        #[arg(long, env = "PGRST_JWT_SECRET")]
        jwt_secret: String,
        /// The role.
        #[arg(default_value = "service_role")]
        role: String,
    },
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    match Args::parse().command {
        Command::Serve { db_url, jwt_secret, listen } => {
            eprintln!("serving http://{listen}/rest/v1");
            supabase::serve_rest(&db_url, &jwt_secret, listen).await
        }
        Command::Key { jwt_secret, role } => {
            println!("{}", supabase::sign_key(&jwt_secret, &role));
            Ok(())
        }
    }
}
