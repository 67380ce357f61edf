//! `atlas migrate`: brings a Supabase database to the schema of this release.

use serde_json::json;

use crate::{
    context::Context,
    error::{CliError, Result},
    migrations::{self, Direction, MIGRATIONS, MigrateError, State, StatusRow, Step, Target},
    signals::Stop,
    ui::{DIM, GREEN, Ui, YELLOW, count, paint, table},
};

/// Create or change the tables and functions in a Supabase database
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  export SUPABASE_DB_URL='postgres://postgres:…@db.YOUR-PROJECT.supabase.co:5432/postgres'
  atlas migrate status
  atlas migrate up --dry-run -v               what would run, with its SQL
  atlas migrate up
  atlas migrate up --to 3
  atlas migrate down --steps 1 --yes          undoes the newest; its data is gone

Safe to run while workers of the previous release are up, and by two at once (one waits). Each
migration is one transaction. The embedded store needs none of this.")]
pub(crate) struct Migrate {
    #[command(subcommand)]
    action: Action,
}

#[derive(Clone, Copy, Debug, clap::Subcommand)]
enum Action {
    /// Which migrations are applied
    Status {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Apply what is pending
    #[command(after_help = "Example:\n  atlas migrate up --dry-run -v")]
    Up {
        /// Up to and including this version
        #[arg(long, value_name = "VERSION", conflicts_with = "steps")]
        to: Option<i32>,
        /// At most so many
        #[arg(long, value_name = "N")]
        steps: Option<usize>,
        /// Say what would run (-v: with its SQL), change nothing
        #[arg(short = 'n', long)]
        dry_run: bool,
    },
    /// Undo migrations, newest first; what is in their tables is gone
    #[command(
        after_help = "Examples:\n  atlas migrate down --dry-run\n  atlas migrate down --steps 1 --yes\n  \
                            atlas migrate down --to 0 --yes             everything"
    )]
    Down {
        /// Until this version is the newest; 0 undoes all
        #[arg(long, value_name = "VERSION", conflicts_with = "steps")]
        to: Option<i32>,
        /// So many
        #[arg(long, value_name = "N", default_value_t = 1)]
        steps: usize,
        /// Say what would run (-v: with its SQL), change nothing
        #[arg(short = 'n', long)]
        dry_run: bool,
        /// Yes, delete the data
        #[arg(long)]
        yes: bool,
    },
    /// After a migration was left half done and you have looked: say what is true now
    #[command(
        after_help = "Example:\n  atlas migrate resolve 7 --applied",
        group = clap::ArgGroup::new("state").required(true).args(["applied", "pending"])
    )]
    Resolve {
        /// The dirty version
        version: i32,
        /// It is complete
        #[arg(long)]
        applied: bool,
        /// Nothing of it is left
        #[arg(long)]
        pending: bool,
    },
}

impl Migrate {
    pub(crate) async fn run(self, context: &Context) -> Result<()> {
        let Some(url) = context.secret("SUPABASE_DB_URL")? else {
            return Err(CliError::usage("SUPABASE_DB_URL is not set, so there is no database to migrate")
                .fix("set it to the project's Postgres connection string (Supabase: project settings, Database)")
                .fix("or SUPABASE_DB_URL_FILE to a file that holds it. The embedded store needs no migration"));
        };
        // Ctrl-C ends the connection, and with it the transaction: nothing is left half done.
        Stop::listen()?.unless_stopped(Box::pin(self.act(context, url.expose()))).await
    }

    async fn act(&self, context: &Context, url: &str) -> Result<()> {
        let ui = context.ui;
        let mut client = migrations::connect(url).await?;
        let (direction, target, dry_run) = match self.action {
            Action::Status { json } => {
                let rows = migrations::status(&client, MIGRATIONS).await?;
                if json {
                    status_json(ui, &rows)?;
                } else {
                    status(ui, &rows);
                }
                return sound(&rows);
            }
            Action::Resolve { version, applied, .. } => {
                migrations::resolve(&client, version, applied).await?;
                let state = if applied { "applied" } else { "pending" };
                ui.out(format_args!("Migration {version:04} counts as {state} now."));
                return Ok(());
            }
            Action::Up { to, steps, dry_run } => {
                (Direction::Up, to.map_or(steps.map_or(Target::All, Target::Steps), Target::Version), dry_run)
            }
            Action::Down { to, steps, dry_run, yes } => {
                let target = to.map_or(Target::Steps(steps), Target::Version);
                if !dry_run && !yes {
                    let plan = migrations::plan(&client, MIGRATIONS, Direction::Down, target).await?;
                    let names: Vec<String> = plan.iter().map(name).collect();
                    return Err(CliError::usage("this deletes data, and --yes was not given")
                        .because(format_args!("it would undo: {}", names.join(", ")))
                        .fix("make a backup, then add --yes"));
                }
                (Direction::Down, target, dry_run)
            }
        };
        if dry_run {
            let plan = migrations::plan(&client, MIGRATIONS, direction, target).await?;
            for step in &plan {
                show(ui, step, "would ");
                ui.detail(paint(DIM, step.sql()));
            }
            ui.note(format_args!("Dry run: {}. Nothing was changed.", count(plan.len(), "migration")));
            return Ok(());
        }
        let done =
            migrations::run(&mut client, MIGRATIONS, direction, target, |step| show(ui, step, "")).await?;
        if done.is_empty() {
            ui.out("Nothing to do: the database is as it should be.");
        }
        Ok(())
    }
}

fn name(step: &Step) -> String {
    format!("{:04}_{}", step.migration.version, step.migration.name)
}

fn show(ui: Ui, step: &Step, would: &str) {
    let verb = match (step.direction, would.is_empty()) {
        (Direction::Up, true) => "applied",
        (Direction::Up, false) => "apply",
        (Direction::Down, true) => "undone",
        (Direction::Down, false) => "undo",
    };
    ui.out(format_args!("{would}{verb} {}", name(step)));
}

fn words(state: &State) -> (&'static str, Option<String>) {
    match state {
        State::Pending => ("pending", None),
        State::Missing => ("missing", None),
        State::Applied { at } => ("applied", Some(at.to_string())),
        State::Changed { at } => ("changed", Some(at.to_string())),
        State::Dirty { at } => ("dirty", Some(at.to_string())),
        State::Unknown { at } => ("unknown", Some(at.to_string())),
    }
}

fn status_json(ui: Ui, rows: &[StatusRow]) -> Result<()> {
    let rows: Vec<_> = rows
        .iter()
        .map(|StatusRow { version, name, state }| {
            let (state, at) = words(state);
            json!({ "version": version, "name": name, "state": state, "at": at })
        })
        .collect();
    ui.json(&rows)
}

fn status(ui: Ui, rows: &[StatusRow]) {
    let cells: Vec<Vec<String>> = rows
        .iter()
        .map(|StatusRow { version, name, state }| {
            let (word, at) = words(state);
            vec![format!("{version:04}"), name.clone(), word.to_owned(), at.unwrap_or_default()]
        })
        .collect();
    ui.out(table(&["VERSION", "NAME", "STATE", "SINCE"], &cells));
    let pending = rows.iter().filter(|row| row.state == State::Pending).count();
    if rows.iter().any(is_broken) {
        // Told as the error.
    } else if pending > 0 {
        ui.note(paint(YELLOW, format_args!("{} pending: atlas migrate up", count(pending, "migration"))));
    } else {
        ui.note(paint(GREEN, "Up to date."));
    }
}

/// True where `atlas migrate up` refuses to go on.
fn is_broken(row: &StatusRow) -> bool {
    matches!(row.state, State::Dirty { .. } | State::Changed { .. } | State::Missing)
}

/// A database that a person must look at is no success, for scripts either.
fn sound(rows: &[StatusRow]) -> Result<()> {
    let broken: Vec<String> = rows
        .iter()
        .filter(|row| is_broken(row))
        .map(|row| format!("{:04}_{} is {}", row.version, row.name, words(&row.state).0))
        .collect();
    if broken.is_empty() {
        return Ok(());
    }
    Err(CliError::failure("the database's migrations are not sound")
        .because(broken.join("; "))
        .fix("`atlas migrate up` says what to do; it changes nothing as long as this is so"))
}

impl From<MigrateError> for CliError {
    fn from(error: MigrateError) -> Self {
        match error {
            MigrateError::Url(_) => {
                Self::usage("cannot use the database that SUPABASE_DB_URL names").because(error)
            }
            MigrateError::Connect(..) => {
                Self::failure("cannot use the database that SUPABASE_DB_URL names").because(error)
            }
            other => Self::failure("the database was not migrated").because(other),
        }
    }
}
