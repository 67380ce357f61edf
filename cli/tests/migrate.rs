//! `atlas migrate` on a real database.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use atlas_test_support::{skip, supabase::Postgres};
use support::Sandbox;

/// The URL of an empty database, or a named skip.
async fn empty_database(test: &str) -> Option<String> {
    let made = match Postgres::shared().await {
        Ok(server) => server.create_empty_database().await.map(|name| server.url(&name)),
        Err(reason) => Err(reason),
    };
    made.map_err(|reason| skip(test, "Postgres", &reason)).ok()
}

fn states(sandbox: &Sandbox) -> Vec<String> {
    let rows = sandbox.atlas(&["migrate", "status", "--json"]).ok().json();
    rows.as_array().unwrap().iter().map(|row| row["state"].as_str().unwrap().to_owned()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_goes_up_step_by_step_and_down_only_when_told_twice() {
    let test = "a_database_goes_up_step_by_step_and_down_only_when_told_twice";
    let Some(url) = empty_database(test).await else { return };
    let sandbox = Sandbox::new(&[]).with_env("SUPABASE_DB_URL", url);
    let all = states(&sandbox).len();
    assert!(states(&sandbox).iter().all(|state| state == "pending"));

    let dry = sandbox.atlas(&["migrate", "up", "--dry-run"]).ok();
    assert_eq!(dry.stdout.lines().count(), all, "{}", dry.stdout);
    assert!(states(&sandbox).iter().all(|state| state == "pending"), "a dry run changes nothing");

    let one = sandbox.atlas(&["migrate", "up", "--steps", "1"]).ok();
    assert!(one.stdout.starts_with("applied 0001_"), "{}", one.stdout);
    sandbox.atlas(&["migrate", "up"]).ok();
    assert!(states(&sandbox).iter().all(|state| state == "applied"));
    let again = sandbox.atlas(&["migrate", "up"]).ok();
    assert_eq!(again.stdout, "Nothing to do: the database is as it should be.\n");

    let asked = sandbox.atlas(&["migrate", "down"]);
    assert_eq!(asked.code, Some(2));
    assert!(asked.stderr.contains("--yes"), "{}", asked.stderr);
    assert!(states(&sandbox).iter().all(|state| state == "applied"), "nothing without --yes");
    sandbox.atlas(&["migrate", "down", "--to", "0", "--yes"]).ok();
    assert!(states(&sandbox).iter().all(|state| state == "pending"));

    let unknown = sandbox.atlas(&["migrate", "up", "--to", "999"]);
    assert_eq!(unknown.code, Some(1));
    assert!(unknown.stderr.contains("there is no migration 999"), "{}", unknown.stderr);
}
