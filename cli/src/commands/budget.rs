//! `atlas budget`: the tokens of today, of the last days, and their limits.

use atlas_shared::{
    Tokens,
    ledger::{GLOBAL_SCOPE, Limits, NewLimit, tenant_scope},
    message,
};
use atlas_worker::store::{DayAccount, FleetChange, FleetState, RunFilter, RunStatus, RunStore, TenantLimit};
use serde_json::json;

use crate::{
    commands::runs::open_store,
    context::Context,
    error::{CliError, Result},
    ui::{BOLD, Ui, count, paint, table, thousands},
};

/// Days back in which a tenant's limit is looked for: a new day begins with the last one set.
const TENANT_DAYS: u32 = 31;
/// Waiting runs that `set` names.
const NAMED_RUNS: usize = 5;
/// As in the configuration: `DAILY_TOKEN_BUDGET` and `TOKEN_BUDGET_PER_RUN`.
const MOST_DAILY: i64 = 1_000_000_000_000;
const MOST_PER_RUN: i64 = 1_000_000_000;

/// Look at the token budget, and set it
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  atlas budget show
  atlas budget show --json | jq .budget.used
  atlas budget set --daily 500000 --per-run 20000
  atlas budget set --tenant acme --daily 50000
  atlas budget reset
  atlas budget history --days 30

The limits are DAILY_TOKEN_BUDGET and TOKEN_BUDGET_PER_RUN unless the fleet was told others
(`atlas budget set`, control command set_budget). The day is UTC, by the store's clock.")]
pub(crate) struct Budget {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, clap::Subcommand)]
enum Action {
    /// Today's limit, what is used and reserved, and what waits
    Show {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Set limits for the whole fleet, at once and until they are set anew or reset
    #[command(after_help = "Examples:
  atlas budget set --daily 500000                runs that waited go on within SWEEP_INTERVAL_SECONDS
  atlas budget set --per-run 20000
  atlas budget set --tenant acme --daily 50000
  atlas budget set --tenant acme --no-limit

Kept in the store: it holds for every worker and gateway from their next call on, wins over the settings
of each process, and outlives restarts. Lowering a limit takes nothing back that is granted.")]
    Set {
        /// Tokens a UTC day, of the fleet or (with --tenant) of the tenant
        #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(i64).range(0..=MOST_DAILY))]
        daily: Option<i64>,
        /// Tokens one run may bill, all its calls together
        #[arg(
            long,
            value_name = "TOKENS",
            value_parser = clap::value_parser!(i64).range(1..=MOST_PER_RUN),
            conflicts_with = "tenant"
        )]
        per_run: Option<i64>,
        /// Set this tenant's limit (metadata.tenant of its requests), not the fleet's
        #[arg(long, value_name = "NAME")]
        tenant: Option<String>,
        /// With --tenant: no limit of its own any more
        #[arg(long, requires = "tenant", conflicts_with = "daily")]
        no_limit: bool,
        /// Print JSON: the state before and after
        #[arg(long)]
        json: bool,
    },
    /// Go back to the configured limits, or remove a tenant's
    #[command(after_help = "Examples:
  atlas budget reset                  both limits of the fleet
  atlas budget reset --daily
  atlas budget reset --tenant acme    no limit of its own any more, as before one was set

From then on DAILY_TOKEN_BUDGET and TOKEN_BUDGET_PER_RUN hold again, as each worker and gateway is
configured: what is printed is by the settings of this shell.")]
    Reset {
        /// Only the limit of a day
        #[arg(long)]
        daily: bool,
        /// Only the limit of a run
        #[arg(long)]
        per_run: bool,
        /// This tenant's limit, not the fleet's
        #[arg(long, value_name = "NAME", conflicts_with_all = ["daily", "per_run"])]
        tenant: Option<String>,
        /// Print JSON: the state before and after
        #[arg(long)]
        json: bool,
    },
    /// The accounts of the last days, by tenant and by kind of call
    #[command(after_help = "Example:\n  atlas budget history --days 30 --json")]
    History {
        /// How many days, today included
        #[arg(long, value_name = "N", default_value_t = 14, value_parser = clap::value_parser!(u32).range(1..=3660))]
        days: u32,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

impl Budget {
    pub(crate) async fn run(self, context: &Context) -> Result<()> {
        let limits = context.config()?.limits;
        let store = open_store(context).await?;
        let ui = context.ui;
        match self.action {
            Action::Show { json } => {
                let fleet = store.fleet_state(limits).await?;
                if json {
                    return ui.json(&fleet);
                }
                let tenants = store.budget_history(TENANT_DAYS, limits).await?;
                show(ui, &fleet, &tenants);
                waiting(ui, store.as_ref(), &fleet).await
            }
            Action::Set { daily, per_run, tenant, no_limit, json } => {
                let tokens = |number: Option<i64>| number.map(|n| Tokens(n.unsigned_abs()));
                let (daily, per_run) = (tokens(daily), tokens(per_run));
                let wanted = match tenant {
                    None if daily.is_none() && per_run.is_none() => {
                        return Err(CliError::usage("there is nothing to set")
                            .fix("say --daily TOKENS, --per-run TOKENS, or both"));
                    }
                    None => FleetChange {
                        daily_limit: daily.map(NewLimit::Tokens),
                        run_limit: per_run.map(NewLimit::Tokens),
                        ..FleetChange::default()
                    },
                    Some(_) if daily.is_none() && !no_limit => {
                        return Err(CliError::usage("there is nothing to set for the tenant")
                            .fix("say --daily TOKENS, or --no-limit"));
                    }
                    Some(tenant) => of_tenant(tenant, daily)?,
                };
                change(ui, store.as_ref(), limits, &wanted, json).await
            }
            Action::Reset { daily, per_run, tenant, json } => {
                let both = !daily && !per_run;
                let wanted = match tenant {
                    Some(tenant) => of_tenant(tenant, None)?,
                    None => FleetChange {
                        daily_limit: (daily || both).then_some(NewLimit::Default),
                        run_limit: (per_run || both).then_some(NewLimit::Default),
                        ..FleetChange::default()
                    },
                };
                change(ui, store.as_ref(), limits, &wanted, json).await
            }
            Action::History { days, json } => {
                let history = store.budget_history(days, limits).await?;
                if json {
                    return ui.json(&history);
                }
                if history.is_empty() {
                    ui.note(format_args!("Nothing was booked in the last {}.", count(days as usize, "day")));
                    return Ok(());
                }
                ui.out(history_table(&history));
                Ok(())
            }
        }
    }
}

fn of_tenant(tenant: String, limit: Option<Tokens>) -> Result<FleetChange> {
    // What somebody has set under any name can be removed.
    if tenant.trim().is_empty() || (limit.is_some() && !message::is_name(&tenant)) {
        return Err(CliError::usage(format!("--tenant is {tenant:?}, which no request can name"))
            .because("a tenant's name is 1 to 128 letters, digits, '.', '_' or '-'")
            .fix("name it as metadata.tenant of its requests does"));
    }
    Ok(FleetChange { tenant_limit: Some(TenantLimit { tenant, limit }), ..FleetChange::default() })
}

/// Changes limits, and says what they were, what they are, and who waits.
async fn change(
    ui: Ui,
    store: &dyn RunStore,
    limits: Limits,
    wanted: &FleetChange,
    json: bool,
) -> Result<()> {
    let before = (store.fleet_state(limits).await?, store.budget_history(TENANT_DAYS, limits).await?);
    let after = (store.change_fleet(wanted, limits).await?, store.budget_history(TENANT_DAYS, limits).await?);
    if json {
        return ui.json(&json!({
            "before": before.0,
            "after": after.0,
            "tenants": tenants(&after.1, &after.0.budget.day),
        }));
    }
    changed(ui, wanted, (&before.0, &before.1), (&after.0, &after.1));
    waiting(ui, store, &after.0).await
}

/// Names runs that wait for tokens, and whose tokens those may be.
async fn waiting(ui: Ui, store: &dyn RunStore, fleet: &FleetState) -> Result<()> {
    let filter = RunFilter { status: Some(RunStatus::Deferred), limit: NAMED_RUNS, ..RunFilter::default() };
    let waiting = store.find_runs(&filter).await?;
    if !waiting.is_empty() {
        let number = usize::try_from(fleet.deferred_runs).unwrap_or(usize::MAX);
        ui.note(format_args!(
            "{} waiting for tokens; what fits goes on by itself, the oldest first. The newest of them:",
            count(number, "run")
        ));
        let others = number.saturating_sub(waiting.len());
        for run in waiting {
            let needs = thousands(run.tokens_needed.unwrap_or_default().0);
            let whose = run.tenant.map(|tenant| format!(", tenant {tenant}")).unwrap_or_default();
            ui.note(format_args!("  {} needs {needs}{whose}", run.task_id));
        }
        if others > 0 {
            ui.note(format_args!("  … and {others} more: atlas runs list --status deferred -n {number}"));
        }
    }
    Ok(())
}

/// The newest account of each tenant; one of an earlier day has nothing used of today.
fn tenants(accounts: &[DayAccount], today: &str) -> Vec<DayAccount> {
    let mut tenants: Vec<DayAccount> = Vec::new();
    for account in accounts {
        // The newest comes first.
        if account.scope != GLOBAL_SCOPE && tenants.iter().all(|known| known.scope != account.scope) {
            let mut account = account.clone();
            if account.day != today {
                account = DayAccount {
                    day: today.to_owned(),
                    used: Tokens(0),
                    reserved: Tokens(0),
                    assumed: None,
                    chat: None,
                    embedding: None,
                    ..account
                };
            }
            tenants.push(account);
        }
    }
    tenants
}

/// What a tenant may still use today; `None`: as much as the fleet.
pub(crate) async fn tenant_left(
    store: &dyn RunStore,
    limits: Limits,
    tenant: &str,
    today: &str,
) -> Result<Option<Tokens>> {
    let scope = tenant_scope(tenant);
    let accounts = tenants(&store.budget_history(TENANT_DAYS, limits).await?, today);
    Ok(accounts
        .into_iter()
        .find(|account| account.scope == scope)
        .and_then(|account| Some(account.limit?.saturating_sub(account.used + account.reserved))))
}

fn show(ui: Ui, fleet: &FleetState, accounts: &[DayAccount]) {
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
        ui.out(format_args!("{} {value}", paint(BOLD, format_args!("{name:<10}"))));
    }
    for account in tenants(accounts, &budget.day) {
        let limit = account.limit.map_or_else(|| "no limit".to_owned(), |limit| thousands(limit.0));
        ui.out(format_args!(
            "{} {} used of {limit}",
            paint(BOLD, format_args!("{:<10}", account.scope)),
            thousands(account.used.0)
        ));
    }
}

/// Says what a change did.
fn changed(
    ui: Ui,
    change: &FleetChange,
    (before, tenants_before): (&FleetState, &[DayAccount]),
    (after, tenants_after): (&FleetState, &[DayAccount]),
) {
    let line = |what: &str, from: String, to: String| ui.out(format_args!("{what}: {from} -> {to}"));
    if change.daily_limit.is_some() {
        line("daily limit", thousands(before.budget.limit.0), thousands(after.budget.limit.0));
        let spent = after.budget.used + after.budget.reserved;
        if after.budget.available() == Tokens(0) {
            ui.note(format_args!(
                "{} are used or reserved today: nothing is granted until {}. Requests wait in the store.",
                thousands(spent.0),
                after.budget.resets_at
            ));
        }
    }
    if change.run_limit.is_some() {
        line("limit a run", thousands(before.run_limit.0), thousands(after.run_limit.0));
        if after.run_limit > after.budget.limit {
            ui.note("A run may bill more than a whole day: it is squeezed into the day, or waits.");
        }
    }
    if let Some(TenantLimit { tenant, .. }) = &change.tenant_limit {
        let scope = tenant_scope(tenant);
        let limit = |accounts: &[DayAccount]| {
            accounts
                .iter()
                .find(|account| account.scope == scope)
                .and_then(|account| account.limit)
                .map_or_else(|| "none".to_owned(), |limit| thousands(limit.0))
        };
        line(&format!("daily limit of tenant {tenant}"), limit(tenants_before), limit(tenants_after));
    }
}

fn history_table(history: &[DayAccount]) -> String {
    let tokens = |number: Option<Tokens>| number.map_or_else(|| "-".to_owned(), |number| thousands(number.0));
    let rows: Vec<Vec<String>> = history
        .iter()
        .map(|account| {
            vec![
                account.day.clone(),
                account.scope.clone(),
                tokens(account.limit),
                tokens(Some(account.used)),
                tokens(Some(account.reserved)),
                tokens(account.assumed),
                tokens(account.chat),
                tokens(account.embedding),
            ]
        })
        .collect();
    table(&["DAY", "SCOPE", "LIMIT", "USED", "RESERVED", "ASSUMED", "CHAT", "EMBEDDING"], &rows)
}
