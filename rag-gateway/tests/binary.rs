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

/// A gateway process on a folder, killed when dropped.
fn gateway(dir: &std::path::Path, listen: &str) -> Guarded {
    let settings = [("ATLAS_DATA_DIR", dir.to_str().unwrap()), ("GATEWAY_LISTEN", listen)];
    Guarded::spawn(BINARY, Vec::<&str>::new(), |command| {
        command.envs(settings).stdout(Stdio::null()).stderr(Stdio::null());
    })
    .unwrap()
}

/// Asks until the answer is what is waited for.
async fn until(url: &str, wanted: impl Fn(&serde_json::Value) -> bool) -> serde_json::Value {
    tokio::time::timeout(Duration::from_secs(180), async {
        loop {
            if let Ok(response) = reqwest::get(url).await
                && let Ok(answer) = response.json::<serde_json::Value>().await
                && wanted(&answer)
            {
                return answer;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await
    .expect("in time")
}

#[tokio::test]
async fn a_killed_gateways_jobs_are_done_by_the_next_one() {
    let dir = tempfile::tempdir().unwrap();
    let listen = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let url = |path: &str| format!("http://{listen}{path}");
    let first = gateway(dir.path(), &listen);
    until(&url("/health/ready"), |answer| answer["status"] == "ready").await;
    let mut jobs = Vec::new();
    for job in 0..3 {
        let batch: Vec<serde_json::Value> = (0..200)
            .map(|n| serde_json::json!({"source": format!("{job}-{n}.md"), "text": format!("# {job}\n\nAbout {n}.\n")}))
            .collect();
        let answer = reqwest::Client::new().post(url("/v1/embed_batch")).json(&batch).send().await.unwrap();
        let created: serde_json::Value = answer.json().await.unwrap();
        jobs.push(created["job_id"].as_str().unwrap().to_owned());
    }
    // SIGKILL: with the first one at work, or done, or not begun.
    drop(first);

    let _second = gateway(dir.path(), &listen);
    for job in jobs {
        let status = until(&url(&format!("/v1/jobs/{job}")), |status| {
            status["state"] == "done" || status["state"] == "failed"
        })
        .await;
        assert_eq!((&status["state"], &status["documents_done"]), (&"done".into(), &200.into()), "{status}");
    }
    let list = until(&url("/v1/documents"), |_| true).await;
    assert_eq!(list["documents"].as_array().unwrap().len(), 600);
}

/// The clones in a folder.
fn clones(folder: &std::path::Path) -> Vec<std::path::PathBuf> {
    let entries = std::fs::read_dir(folder).unwrap().flatten().map(|entry| entry.path());
    entries.filter(|path| path.to_string_lossy().contains("atlas-clone-")).collect()
}

#[tokio::test]
async fn what_a_gateway_that_was_killed_over_a_clone_leaves_is_swept_by_the_next() {
    let [dir, scratch] = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    // A git server that says nothing: the clone waits for as long as it is awake.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let repo = format!("http://{}/team/shop", silent.local_addr().unwrap());
    let listen = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let start = || {
        Guarded::spawn(BINARY, Vec::<&str>::new(), |command| {
            command
                .env("ATLAS_DATA_DIR", dir.path())
                .env("TMPDIR", scratch.path())
                .env("GATEWAY_LISTEN", &listen)
                .env("INDEX_ALLOWED_URLS", &repo)
                .stdout(Stdio::null())
                .stderr(Stdio::null());
        })
        .unwrap()
    };
    let wait_for = async |what: &str, seen: &dyn Fn() -> bool| {
        let started = Instant::now();
        while !seen() {
            assert!(started.elapsed() < Duration::from_secs(120), "waited for {what}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };

    let first = start();
    until(&format!("http://{listen}/health/ready"), |answer| answer["status"] == "ready").await;
    let body = serde_json::json!({"repo": repo});
    let job =
        reqwest::Client::new().post(format!("http://{listen}/v1/index")).json(&body).send().await.unwrap();
    assert_eq!(job.status().as_u16(), 202, "{}", job.text().await.unwrap());
    wait_for("a clone", &|| clones(scratch.path()).iter().any(|folder| folder.join("repo").exists())).await;
    drop(first);
    let left = clones(scratch.path());
    assert_eq!(left.len(), 1, "{left:?}");

    // It resumes the job too, in a folder of its own.
    let _second = start();
    wait_for("the sweep", &|| !left[0].exists()).await;
}
