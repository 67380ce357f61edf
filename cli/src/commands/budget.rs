//! `atlas budget`: today's tokens.

use crate::{
    commands::runs::open_store,
    context::Context,
    error::Result,
    ui::{BOLD, paint, thousands},
};

/// Look at the token budget
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  atlas budget show
  atlas budget show --json | jq .budget.used

The limits are DAILY_TOKEN_BUDGET and TOKEN_BUDGET_PER_RUN unless the fleet was told others
(control command set_budget). The day is UTC, by the store's clock.")]
pub(crate) struct Budget {
    #[command(subcommand)]
    action: Action,
}

#[derive(Clone, Copy, Debug, clap::Subcommand)]
enum Action {
    /// Today's limit, what is used and reserved, and what waits
    Show {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

impl Budget {
    pub(crate) async fn run(self, context: &Context) -> Result<()> {
        let Action::Show { json } = self.action;
        let limits = context.config()?.limits;
        let fleet = open_store(context).await?.fleet_state(limits).await?;
        if json {
            return context.ui.json(&fleet);
        }
        let budget = &fleet.budget;
        let percent = (budget.used.0 * 100).checked_div(budget.limit.0).unwrap_or(100);
        for (name, value) in [
            ("day", format!("{} (UTC), new tokens at {}", budget.day, budget.resets_at)),
            ("limit", format!("{} a day, {} a run", thousands(budget.limit.0), thousands(fleet.run_limit.0))),
            ("used", format!("{} ({percent} %)", thousands(budget.used.0))),
            ("reserved", thousands(budget.reserved.0)),
            ("available", thousands(budget.available().0)),
            (
                "runs",
                format!(
                    "{} running, {} queued, {} waiting for tokens",
                    fleet.running_runs, fleet.queued_runs, fleet.deferred_runs
                ),
            ),
            ("fleet", (if fleet.paused { "paused" } else { "working" }).to_owned()),
        ] {
            context.ui.out(format_args!("{} {value}", paint(BOLD, format_args!("{name:<10}"))));
        }
        Ok(())
    }
}
