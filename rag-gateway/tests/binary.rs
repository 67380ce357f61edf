//! The binary: what it says when it is started wrongly, and its health check.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use std::{
    net::TcpListener,
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

use atlas_test_support::guard::Guarded;

const BINARY: &str = env!("CARGO_BIN_EXE_atlas-rag-gateway");

fn run(arguments: &[&str], settings: &[(&str, &str)]) -> Output {
    Command::new(BINARY).args(arguments).env_clear().envs(settings.iter().copied()).output().expect("it runs")
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_missing_setting_is_named_with_its_fix() {
    let output = run(&[], &[("RAG_TOP_K", "many")]);
    assert_eq!(output.status.code(), Some(2));
    let text = stderr(&output);
    assert!(text.contains("QDRANT_URL") && text.contains("ATLAS_DATA_DIR"), "{text}");
    assert!(text.contains("RAG_TOP_K"), "every fault is told at once: {text}");
}

#[test]
fn a_configuration_can_be_checked_without_starting() {
    let output = run(&["--check-config"], &[("QDRANT_URL", "http://localhost:6334")]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
}

#[test]
fn help_says_what_it_needs_and_shows_examples() {
    let output = run(&["--help"], &[]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    for word in ["QDRANT_URL", "ATLAS_DATA_DIR", "/v1/query_chat", "--healthcheck", "Exit codes"] {
        assert!(text.contains(word), "{word} is missing from: {text}");
    }
}

#[test]
fn the_health_check_fails_until_a_gateway_is_ready() {
    let dir = tempfile::tempdir().unwrap();
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let settings = [("ATLAS_DATA_DIR", dir.path().to_str().unwrap()), ("GATEWAY_LISTEN", free.as_str())];
    let healthy = || run(&["--healthcheck"], &settings);
    assert_eq!(healthy().status.code(), Some(1), "nobody listens yet");

    let _gateway = Guarded::spawn(BINARY, Vec::<&str>::new(), |command| {
        command.envs(settings).stdout(Stdio::null()).stderr(Stdio::null());
    })
    .unwrap();
    let started = Instant::now();
    loop {
        let output = healthy();
        if output.status.success() {
            break;
        }
        assert!(started.elapsed() < Duration::from_secs(60), "never ready: {}", stderr(&output));
    }
}
