//! `atlas key`: keys of the gateway's callers.

use std::io::{IsTerminal as _, Read as _};

use atlas_shared::{config::ApiKey, message::is_name};

use crate::{
    context::Context,
    error::{CliError, Result},
};

/// Longest key that is read.
const MAX_KEY_BYTES: u64 = 4096;

/// Make a key for a caller of the gateway, or hash one
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  atlas key new worker >> api_keys        the line into the file, the key on the terminal
  atlas key new acme-ci --tenant acme     a key that reads and writes only what is acme's
  atlas key hash worker < key.txt         the line of a key you have

The gateway reads the lines from the file that API_KEYS_FILE names, at its start. The key itself
is shown once and kept nowhere: give it to the caller, as RAG_API_KEY or in the header
`Authorization: Bearer KEY`.")]
pub(crate) struct Key {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// Make a random key: the line goes to standard output, the key to standard error
    New(Caller),
    /// Read a key from standard input and print its line
    Hash(Caller),
}

#[derive(Debug, clap::Args)]
struct Caller {
    /// The caller's name: rate limits go by it, and it is in no answer
    name: String,

    /// The only tenant that the key may read and write
    #[arg(long, value_name = "TENANT")]
    tenant: Option<String>,
}

impl Key {
    pub(crate) fn run(self, context: &Context) -> Result<()> {
        let (What::New(caller) | What::Hash(caller)) = &self.what;
        for name in std::iter::once(&caller.name).chain(&caller.tenant) {
            if !is_name(name) {
                return Err(CliError::usage(format!("{name:?} is not a name"))
                    .fix("use 1 to 128 letters, digits, '.', '_' or '-'"));
            }
        }
        let key = match self.what {
            What::New(_) => {
                let key = ApiKey::generate();
                // Even where nothing else is said: it can be had only now.
                context.ui.warn(key.expose());
                key.expose().to_owned()
            }
            What::Hash(_) => read_key()?,
        };
        context.ui.out(ApiKey::new(&caller.name, &key, caller.tenant.as_deref()).line());
        Ok(())
    }
}

fn read_key() -> Result<String> {
    let input = std::io::stdin();
    if input.is_terminal() {
        return Err(CliError::usage("the key is read from standard input, so that no history keeps it")
            .fix("atlas key hash NAME < FILE"));
    }
    let mut key = String::new();
    input
        .lock()
        .take(MAX_KEY_BYTES)
        .read_to_string(&mut key)
        .map_err(|error| CliError::usage(format!("the key cannot be read: {error}")))?;
    let key = key.trim();
    if key.len() < 16 || key.contains(char::is_whitespace) {
        return Err(CliError::usage(
            "a key has 16 characters or more and no white space: its hash is not salted",
        )
        .fix("atlas key new NAME makes a random one"));
    }
    Ok(key.to_owned())
}
