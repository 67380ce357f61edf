//! A Google Pub/Sub emulator for tests: the real one, with the cure for its ghost streams.

use std::{
    fs::File,
    net::{Ipv4Addr, TcpListener},
    path::PathBuf,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use crate::guard::Guarded;

/// A running emulator; ends when this is dropped, or with the test process. Everything it holds is in
/// its memory.
#[derive(Debug)]
pub struct Emulator {
    /// `127.0.0.1:port`, for `PUBSUB_EMULATOR_HOST`.
    pub host: String,
    port: u16,
    folder: tempfile::TempDir,
    _process: Guarded,
}

impl Emulator {
    /// Starts one on a free port and waits until it answers. The error says what this machine lacks.
    pub async fn start() -> Result<Self, String> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).map_err(|error| error.to_string())?;
        let port = listener.local_addr().map_err(|error| error.to_string())?.port();
        drop(listener);
        Self::start_on(port).await
    }

    /// Starts one on `port`: an emulator that comes back after it was killed.
    pub async fn start_on(port: u16) -> Result<Self, String> {
        tokio::task::spawn_blocking(prepare).await.map_err(|error| error.to_string())??;

        let folder = tempfile::tempdir().map_err(|error| error.to_string())?;
        let log = folder.path().join("emulator.log");
        let errors = File::create(&log).map_err(|error| error.to_string())?;
        let process = Guarded::spawn(script(), [format!("--port={port}")], |command| {
            command.stdout(Stdio::null()).stderr(errors);
        })
        .map_err(|error| format!("the emulator did not start: {error}"))?;

        let host = format!("127.0.0.1:{port}");
        let emulator = Self { host, port, folder, _process: process };
        let client = reqwest::Client::new();
        let deadline = Instant::now() + Duration::from_mins(1);
        while Instant::now() < deadline {
            let answer =
                client.get(format!("http://{}/", emulator.host)).timeout(Duration::from_secs(2)).send().await;
            if answer.is_ok_and(|answer| answer.status().is_success()) {
                return Ok(emulator);
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Err(format!("the emulator did not answer within a minute; its log:\n{}", emulator.log()))
    }

    /// The port it listens on.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// What it wrote so far.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("emulator.log")).unwrap_or_default()
    }
}

/// The start script, which the compose stack uses too.
fn script() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../deploy/pubsub-emulator/start.sh")
}

/// Finds the jar and compiles the cure, so that what is missing is known before anything starts.
fn prepare() -> Result<(), String> {
    let java = Command::new("java").arg("-version").output();
    if !java.is_ok_and(|output| output.status.success()) {
        return Err("java is missing".to_owned());
    }
    let output =
        Command::new(script()).arg("--compile").output().map_err(|error| format!("start.sh: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(String::from_utf8_lossy(&output.stderr).trim().to_owned())
}
