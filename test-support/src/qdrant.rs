//! A Qdrant server for tests: one of the test's own, where the program is installed.
//!
//! `QDRANT_BIN` names the program; else `qdrant` is looked for in `PATH`. It listens on loopback only,
//! sends no telemetry, and keeps its data in a temporary folder for as long as the value lives, so
//! that it can be killed and started again with everything it had answered for.

use std::{
    env,
    fs::OpenOptions,
    path::PathBuf,
    process::Stdio,
    time::{Duration, Instant},
};

use tokio::net::TcpStream;

use crate::{free_port, guard::Guarded};

/// How long a server may take until it is ready.
const START_TIMEOUT: Duration = Duration::from_mins(1);

/// A server that runs, or was killed. It ends when this is dropped, or with the test process.
#[derive(Debug)]
pub struct Qdrant {
    program: PathBuf,
    grpc_port: u16,
    http_port: u16,
    settings: Vec<(String, String)>,
    // Before the folder, so that nobody writes into it while it is removed.
    process: Option<Guarded>,
    folder: tempfile::TempDir,
}

impl Qdrant {
    /// Starts one and waits until it is ready. The error says what this machine lacks.
    pub async fn start() -> Result<Self, String> {
        Self::start_with(&[]).await
    }

    /// The same with settings of its own, such as `QDRANT__SERVICE__API_KEY`.
    pub async fn start_with(settings: &[(&str, &str)]) -> Result<Self, String> {
        let program = program()?;
        let port = || free_port().map_err(|error| error.to_string());
        let folder = tempfile::Builder::new()
            .prefix("atlas-qdrant-")
            .tempdir()
            .map_err(|error| format!("a folder for the server: {error}"))?;
        let settings =
            settings.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let mut server =
            Self { program, grpc_port: port()?, http_port: port()?, settings, process: None, folder };
        server.resume().await?;
        Ok(server)
    }

    /// Its gRPC address, for `QDRANT_URL`.
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.grpc_port)
    }

    /// Its REST address.
    pub fn rest_url(&self) -> String {
        format!("http://127.0.0.1:{}", self.http_port)
    }

    /// `SIGKILL`, as a crash or an out-of-memory kill would.
    pub fn kill(&mut self) {
        self.process = None;
    }

    /// Starts it again, on the same ports and the same data, and waits until it is ready.
    pub async fn resume(&mut self) -> Result<(), String> {
        let text = |error: std::io::Error| format!("{}: {error}", self.program.display());
        let dir = self.folder.path();
        let log = OpenOptions::new().create(true).append(true).open(dir.join("log")).map_err(text)?;
        let errors = log.try_clone().map_err(text)?;
        let process = Guarded::spawn(&self.program, ["--disable-telemetry"], |command| {
            command
                .current_dir(dir)
                .env("QDRANT__TELEMETRY_DISABLED", "true")
                .env("QDRANT__SERVICE__HOST", "127.0.0.1")
                .env("QDRANT__SERVICE__HTTP_PORT", self.http_port.to_string())
                .env("QDRANT__SERVICE__GRPC_PORT", self.grpc_port.to_string())
                .env("QDRANT__SERVICE__ENABLE_STATIC_CONTENT", "false")
                .env("QDRANT__STORAGE__STORAGE_PATH", dir.join("storage"))
                .env("QDRANT__STORAGE__SNAPSHOTS_PATH", dir.join("snapshots"))
                // Each collection's log is allocated in advance.
                .env("QDRANT__STORAGE__WAL__WAL_CAPACITY_MB", "1")
                .envs(self.settings.iter().map(|(name, value)| (name, value)))
                .stdout(log)
                .stderr(errors)
                .stdin(Stdio::null());
        })
        .map_err(text)?;
        self.process = Some(process);
        let client = reqwest::Client::new();
        let started = Instant::now();
        let mut ticks = tokio::time::interval(Duration::from_millis(50));
        while started.elapsed() < START_TIMEOUT {
            ticks.tick().await;
            let answer =
                client.get(format!("{}/readyz", self.rest_url())).timeout(Duration::from_secs(2)).send();
            let ready = answer.await.is_ok_and(|answer| answer.status().is_success());
            // The two ports are opened one after the other.
            if ready && TcpStream::connect(("127.0.0.1", self.grpc_port)).await.is_ok() {
                return Ok(());
            }
        }
        Err(format!("the server was not ready within {START_TIMEOUT:?}; its log:\n{}", self.log()))
    }

    /// What it wrote so far.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }
}

/// The program, or what to do to have it.
fn program() -> Result<PathBuf, String> {
    if let Some(program) = env::var_os("QDRANT_BIN").filter(|program| !program.is_empty()) {
        let program = PathBuf::from(program);
        return if program.is_file() {
            Ok(program)
        } else {
            Err(format!("QDRANT_BIN is {}, which is no file", program.display()))
        };
    }
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .map(|folder| folder.join("qdrant"))
        .find(|program| program.is_file())
        .ok_or_else(|| "`qdrant` is not in PATH (QDRANT_BIN names it elsewhere)".to_owned())
}
