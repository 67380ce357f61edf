//! `atlas collections`: what is indexed, and which generation of it is in use.

use atlas_shared::UpstreamError;

use crate::{
    context::Context,
    error::{CliError, Result},
    stack::GatewayAccess,
    ui::{BOLD, paint, thousands},
};

/// Look at collections, go back to an older generation, or delete one
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  atlas collections list
  atlas collections use atlas@1        search the older generation again
  atlas collections drop atlas@1       delete a generation that is not in use
  atlas collections drop old-project   delete a collection with all its generations

A collection is a name for one of its generations. `atlas index --rebuild` fills a new one and then
switches the name over, so searches never see a half-filled one.")]
pub(crate) struct Collections {
    #[command(subcommand)]
    action: Action,
}

#[derive(Clone, Debug, clap::Subcommand)]
enum Action {
    /// All collections, and the generations that are kept
    List {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Use another generation from now on
    Use {
        /// Such as atlas@1
        generation: String,
    },
    /// Delete a generation that is not in use, or a whole collection
    Drop {
        /// Such as atlas@1, or atlas
        name: String,
    },
}

impl Collections {
    pub(crate) async fn run(self, context: &Context) -> Result<()> {
        let access = GatewayAccess::open(context, "collections").await?;
        let done = self.action.run(context, &access).await;
        access.close().await;
        done
    }
}

impl Action {
    async fn run(self, context: &Context, access: &GatewayAccess) -> Result<()> {
        let ui = context.ui;
        match self {
            Self::List { json } => {
                let all = access.client.collections().await?;
                if json {
                    return ui.json(&all);
                }
                if all.is_empty() {
                    ui.out("There are no collections yet: `atlas index PATH` makes one.");
                }
                for collection in all {
                    let model = collection.embedding_model.as_deref().unwrap_or("words only");
                    let generation = match &collection.generation {
                        Some(generation) => format!("is {generation}"),
                        None if collection.name.contains('@') => "kept, not in use".to_owned(),
                        None => String::new(),
                    };
                    ui.out(format_args!(
                        "{} {:>10} chunks  {model:<28} {generation}",
                        paint(BOLD, format_args!("{:<24}", collection.name)),
                        thousands(collection.chunks),
                    ));
                }
                Ok(())
            }
            Self::Use { generation } => {
                let Some((name, _)) = generation.split_once('@') else {
                    return Err(CliError::usage(format!("{generation:?} is not a generation"))
                        .fix("name one of `atlas collections list`, such as atlas@1"));
                };
                access.client.use_generation(name, &generation).await.map_err(unknown)?;
                ui.out(format_args!("{name} is {generation} from now on."));
                Ok(())
            }
            Self::Drop { name } => {
                access.client.drop_collection(&name).await.map_err(unknown)?;
                ui.out(format_args!("Dropped {name}."));
                Ok(())
            }
        }
    }
}

fn unknown(error: UpstreamError) -> CliError {
    CliError::from(error).fix("`atlas collections list` shows what there is")
}
