//! `atlas config`: the settings as documents.

use atlas_shared::config::docs;

use crate::{context::Context, error::Result};

/// Print the documentation of all settings
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  atlas config docs                       all settings, as Markdown
  atlas config env > .env                 a template; then: atlas --env-file .env …

`atlas doctor` says which of them are wrong.")]
pub(crate) struct ConfigDocs {
    #[command(subcommand)]
    what: What,
}

#[derive(Clone, Copy, Debug, clap::Subcommand)]
enum What {
    /// All settings as Markdown: docs/CONFIGURATION.md
    Docs,
    /// A template for an env file: .env.example
    Env,
}

impl ConfigDocs {
    // The same shape as every other command.
    #[expect(clippy::unnecessary_wraps, reason = "printing cannot fail, other commands can")]
    pub(crate) fn run(self, context: &Context) -> Result<()> {
        let text = match self.what {
            What::Docs => docs::markdown(),
            What::Env => docs::env_example(),
        };
        context.ui.out(text.trim_end());
        Ok(())
    }
}
