//! Real services for tests: a Pub/Sub emulator, Postgres behind a PostgREST-compatible server, and a
//! Qdrant server.
//!
//! A service that a machine lacks is a *named skip*: the test says so and returns. With
//! `ATLAS_REQUIRE_SERVICES=1` (set in CI) the same is a failure. See [`skip`].
//!
//! Child processes run under [`guard`]: they end when the test process ends, however it ends.

use std::{
    io::{self, Write as _},
    net::{Ipv4Addr, TcpListener},
    path::Path,
    process::Command,
};

pub mod chaos;
pub mod emulator;
pub mod fleet;
pub mod guard;
pub mod proxy;
pub mod qdrant;
pub mod redis;
pub mod supabase;

/// Reports that `test` cannot run here because `service` is missing, or fails when services are required.
///
/// The line goes to the real standard error, past the test harness's capture, and into the file that
/// `ATLAS_SKIP_LOG` names, so that `make test` can list all skips at its end.
pub fn skip(test: &str, service: &str, reason: &str) {
    assert!(
        !services_required(),
        "{test}: {service} is not available here: {reason} (ATLAS_REQUIRE_SERVICES=1 makes this a failure)"
    );
    skip_everywhere(test, service, reason);
}

/// The same for a service that CI cannot have either (the real Qdrant server, the Docker engine):
/// reported, never a failure.
pub fn skip_everywhere(test: &str, service: &str, reason: &str) {
    // In one write each: tests of several processes say it at once.
    let line = format!("SKIPPED {test}: {service} is not available here: {reason}\n");
    // A closed standard error is no reason to fail a test.
    let _ = io::stderr().write_all(line.as_bytes());
    if let Ok(path) = std::env::var("ATLAS_SKIP_LOG")
        && let Ok(mut file) = std::fs::OpenOptions::new().create(true).append(true).open(path)
    {
        let _ = file.write_all(line.as_bytes());
    }
}

/// Runs git in a folder, with a name to commit under and quietly.
///
/// # Panics
///
/// Where git is missing or refuses: the test cannot go on.
#[expect(clippy::panic, reason = "a test's own set-up")]
pub fn git(folder: &Path, arguments: &[&str]) {
    let ran = Command::new("git")
        .args(["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "init.defaultBranch=main"])
        .args(["-c", "commit.gpgSign=false", "-C"])
        .arg(folder)
        .args(arguments)
        .output();
    match ran {
        Ok(output) if output.status.success() => {}
        Ok(output) => panic!("git {arguments:?}: {}", String::from_utf8_lossy(&output.stderr)),
        Err(error) => panic!("git {arguments:?}: {error}"),
    }
}

/// A port of this machine on which nobody listens now.
///
/// # Errors
///
/// Where the system gives none.
pub fn free_port() -> io::Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port())
}

/// True when a missing service must fail the test (`ATLAS_REQUIRE_SERVICES=1`).
pub fn services_required() -> bool {
    std::env::var("ATLAS_REQUIRE_SERVICES").is_ok_and(|value| !matches!(value.as_str(), "" | "0" | "false"))
}
