//! What the command says about itself and about wrong settings.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use insta::assert_snapshot;
use support::Sandbox;

const COMMANDS: [&[&str]; 38] = [
    &[],
    &["demo"],
    &["dev"],
    &["ask"],
    &["publish"],
    &["index"],
    &["judge"],
    &["search"],
    &["collections"],
    &["collections", "list"],
    &["collections", "use"],
    &["collections", "drop"],
    &["eval"],
    &["runs"],
    &["runs", "list"],
    &["runs", "show"],
    &["runs", "retry"],
    &["runs", "cancel"],
    &["dlq"],
    &["dlq", "list"],
    &["dlq", "show"],
    &["dlq", "replay"],
    &["dlq", "purge"],
    &["budget"],
    &["budget", "show"],
    &["budget", "set"],
    &["budget", "reset"],
    &["budget", "history"],
    &["migrate"],
    &["migrate", "status"],
    &["migrate", "up"],
    &["migrate", "down"],
    &["doctor"],
    &["key"],
    &["key", "new"],
    &["key", "hash"],
    &["config"],
    &["config", "env"],
];

#[test]
fn help_teaches() {
    let sandbox = Sandbox::new(&[]);
    for command in COMMANDS {
        let mut args = command.to_vec();
        args.push("--help");
        let help = sandbox.atlas(&args).ok();
        assert_eq!(help.stderr, "");
        let name = if command.is_empty() { "atlas".to_owned() } else { command.join("_") };
        assert_snapshot!(format!("help_{name}"), help.stdout);
    }
}

#[test]
fn every_top_level_command_has_examples() {
    let sandbox = Sandbox::new(&[]);
    for command in COMMANDS.iter().filter(|command| command.len() == 1) {
        let help = sandbox.atlas(&[command[0], "--help"]).ok();
        assert!(help.stdout.contains("Example"), "{command:?} has no examples");
    }
}

#[test]
fn wrong_settings_are_named_all_at_once_and_nothing_is_tried() {
    let sandbox = Sandbox::new(&[("a.md", "# A")])
        .with_env("RAG_TOP_K", "many")
        .with_env("SUPABASE_URL", "not a url")
        .with_env("OPENAI_API_KEY_FILE", "/nowhere/key")
        .with_env("GATEWAY_LISTEN", "8501");
    let ran = sandbox.atlas(&["index", "."]);
    assert_eq!(ran.code, Some(2));
    assert_eq!(ran.stdout, "");
    assert_snapshot!(ran.stderr);
    assert!(!sandbox.path().join(".atlas").exists());
}

#[test]
fn a_collection_is_named_by_one_rule_everywhere() {
    let with = |name: &str| Sandbox::new(&[]).with_env("RAG_COLLECTION", name).atlas(&["runs", "list"]);
    // There is no store yet, but the settings are right.
    assert_eq!(with("t").code, Some(1));
    for wrong in [".t", "a b"] {
        let told = with(wrong);
        assert_eq!(told.code, Some(2), "{wrong}");
        assert!(
            told.stderr.contains("RAG_COLLECTION") && told.stderr.contains("1 to 128"),
            "{}",
            told.stderr
        );
    }
}

#[test]
fn a_new_key_and_its_line_belong_together() {
    let sandbox = Sandbox::new(&[]);
    let made = sandbox.atlas(&["--quiet", "key", "new", "ci", "--tenant", "acme"]).ok();
    let (key, line) = (made.stderr.trim(), made.stdout.trim());
    assert!(key.starts_with("atlas_") && key.len() == 70, "{key}");
    assert!(!line.contains(key));
    assert_eq!(line, atlas_shared::config::ApiKey::new("ci", key, Some("acme")).line());
    assert_ne!(sandbox.atlas(&["key", "new", "ci"]).ok().stderr.trim(), key, "each is another one");
    assert_eq!(sandbox.atlas(&["key", "new", "two words"]).code, Some(2));
    assert_eq!(sandbox.atlas(&["key", "hash", "ci"]).code, Some(2), "nothing on standard input");
}

#[test]
fn a_wrong_command_line_ends_with_2() {
    let sandbox = Sandbox::new(&[]);
    assert_eq!(sandbox.atlas(&["indx"]).code, Some(2));
    assert_eq!(sandbox.atlas(&["runs", "show", "no-uuid"]).code, Some(2));
    assert_eq!(sandbox.atlas(&["ask", "  "]).code, Some(2));
    assert_eq!(sandbox.atlas(&["index", "missing"]).code, Some(2));
    for number in ["0", "-1"] {
        for list in ["runs", "dlq"] {
            let wrong = sandbox.atlas(&[list, "list", "-n", number]);
            assert_eq!(wrong.code, Some(2));
            assert!(
                wrong.stderr.contains("--limit <N>") && wrong.stderr.contains("1..=10000"),
                "{}",
                wrong.stderr
            );
        }
    }
    let wrong = sandbox.atlas(&["migrate", "resolve", "5"]);
    assert!(wrong.code == Some(2) && wrong.stderr.contains("<--applied|--pending>"), "{}", wrong.stderr);
}

#[test]
fn migrate_says_what_it_needs_and_shows_no_password() {
    let without = Sandbox::new(&[]).atlas(&["migrate", "status"]);
    assert_eq!(without.code, Some(2));
    assert!(without.stderr.contains("SUPABASE_DB_URL"), "{}", without.stderr);
    let sandbox = Sandbox::new(&[("url", "postgres://u:very-secret@127.0.0.1:9/db\n")])
        .with_env("SUPABASE_DB_URL_FILE", "url");
    let unreachable = sandbox.atlas(&["migrate", "up"]);
    assert_eq!(unreachable.code, Some(1));
    assert!(unreachable.stderr.contains("cannot connect"), "{}", unreachable.stderr);
    assert!(!unreachable.stderr.contains("very-secret"), "{}", unreachable.stderr);
}

#[test]
fn doctor_names_the_variables_of_a_broken_configuration_and_shows_no_secret() {
    let sandbox = Sandbox::new(&[])
        .with_env("RAG_TOP_K", "many")
        .with_env("SUPABASE_URL", "https://example.supabase.co")
        .with_env("API_KEYS", "very-secret-key-without-a-name");
    let ran = sandbox.atlas(&["doctor"]);
    assert_eq!(ran.code, Some(1));
    for variable in ["RAG_TOP_K", "SUPABASE_SERVICE_ROLE_KEY", "API_KEYS"] {
        assert!(ran.stdout.contains(variable), "{variable} is missing:\n{}", ran.stdout);
    }
    assert!(!format!("{}{}", ran.stdout, ran.stderr).contains("very-secret"));
}

#[test]
fn doctor_is_content_with_a_bare_laptop() {
    let ran = Sandbox::new(&[]).atlas(&["doctor", "--json"]).ok();
    let findings = ran.json();
    let levels: Vec<(&str, &str)> = findings
        .as_array()
        .unwrap()
        .iter()
        .map(|finding| (finding["check"].as_str().unwrap(), finding["level"].as_str().unwrap()))
        .filter(|(check, _)| *check != "disk")
        .collect();
    assert_eq!(
        levels,
        [
            ("configuration", "ok"),
            ("data folder", "ok"),
            ("queue", "ok"),
            ("store", "ok"),
            ("gateway", "ok"),
            ("model", "warn"),
            ("embeddings", "ok"),
        ]
    );
}

#[test]
fn doctor_says_that_a_gateway_and_a_model_do_not_answer() {
    // Ports of the discard protocol: nobody listens.
    let sandbox = Sandbox::new(&[])
        .with_env("RAG_URL", "http://127.0.0.1:9/")
        .with_env("OPENAI_BASE_URL", "http://127.0.0.1:9/v1");
    let ran = sandbox.atlas(&["doctor", "--json"]);
    assert_eq!(ran.code, Some(1));
    let failed: Vec<String> = ran
        .json()
        .as_array()
        .unwrap()
        .iter()
        .filter(|finding| finding["level"] == "fail")
        .map(|finding| finding["check"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(failed, ["gateway", "model"]);
}

#[test]
fn an_env_file_is_read_when_it_is_named_and_only_then() {
    let sandbox = Sandbox::new(&[(".env", "RAG_TOP_K=many\n"), ("my.env", "RAG_COLLECTION='no name'\n")]);
    let named = sandbox.atlas(&["--env-file", "my.env", "doctor"]);
    assert!(named.stdout.contains("RAG_COLLECTION"), "{}", named.stdout);
    let unnamed = sandbox.atlas(&["doctor"]).ok();
    assert!(unnamed.stdout.contains("there is a .env here"), "{}", unnamed.stdout);
    assert!(!unnamed.stdout.contains("RAG_TOP_K"));
    assert_eq!(sandbox.atlas(&["--env-file", "missing.env", "doctor"]).code, Some(2));
}

#[test]
fn the_documents_of_the_settings_are_printed() {
    let sandbox = Sandbox::new(&[]);
    let docs = sandbox.atlas(&["config", "docs"]).ok().stdout;
    assert_eq!(docs, atlas_shared::config::docs::markdown());
    let env = sandbox.atlas(&["config", "env"]).ok().stdout;
    assert_eq!(env, atlas_shared::config::docs::env_example());
}
