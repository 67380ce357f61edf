//! The whole fleet as separate processes on real services: Pub/Sub emulator, Postgres,
//! PostgREST-compatible server, model simulator, gateway, workers. For end-to-end and chaos runs.
//!
//! Processes can be killed (`SIGKILL`, as a crash) and started again, each with its own log file.

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    fmt::Write as _,
    future::Future,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    time::Duration,
};

use anyhow::{Context as _, bail, ensure};
use serde_json::Value;
use tokio::task::JoinHandle;

use crate::{
    emulator::Emulator,
    free_port,
    guard::Guarded,
    proxy::Proxy,
    supabase::{Postgres, sign_key},
};

/// Project of all topics.
pub const PROJECT: &str = "atlas-e2e";
/// Nothing a fleet is waited for takes this long.
pub const BOUND: Duration = Duration::from_secs(300);
/// The HS256 secret of the fleet's keys.
const JWT_SECRET: &str = "another-secret-for-tests-only-of-32-bytes";

/// What a fleet is made of.
#[derive(Clone, Debug)]
pub struct FleetOptions {
    /// Worker processes.
    pub workers: usize,
    /// Extra arguments of the simulator: faults, latency.
    pub sim: Vec<String>,
    /// Settings of every process, over the defaults here.
    pub env: Vec<(String, String)>,
    /// A folder to index before workers start.
    pub index: Option<PathBuf>,
    /// A Postgres of the fleet's own that keeps what was committed, so that it can be killed.
    pub durable: bool,
    /// A [`Proxy`] between workers and emulator.
    pub proxied: bool,
}

impl Default for FleetOptions {
    fn default() -> Self {
        Self {
            workers: 2,
            sim: Vec::new(),
            env: Vec::new(),
            index: Some(workspace().join("docs")),
            durable: false,
            proxied: false,
        }
    }
}

/// Why there is no fleet.
#[derive(Debug)]
pub enum FleetError {
    /// This machine lacks a service: a named skip.
    Missing {
        /// Which one.
        service: &'static str,
        /// Why.
        reason: String,
    },
    /// Something is broken.
    Broken(anyhow::Error),
}

impl From<anyhow::Error> for FleetError {
    fn from(error: anyhow::Error) -> Self {
        Self::Broken(error)
    }
}

/// A running fleet. Everything ends when it is dropped, or with the test process.
pub struct Fleet {
    /// The emulator.
    pub emulator: Emulator,
    /// Address of the simulator.
    pub sim_url: String,
    /// The database, as superuser.
    pub db_url: String,
    /// The PostgREST-compatible server.
    pub postgrest: Process,
    /// The simulator.
    pub sim: Process,
    /// The gateway.
    pub gateway: Process,
    /// The workers.
    pub workers: Vec<Process>,
    /// The fleet's own database server, if it is to be durable.
    pub postgres: Option<Postgres>,
    /// Between workers and emulator, if there is to be one.
    pub proxy: Option<Proxy>,
    /// Settings that all processes share; what `atlas` needs to work on this fleet.
    pub env: BTreeMap<String, String>,
    dir: tempfile::TempDir,
}

/// One process of the fleet.
#[derive(Debug)]
pub struct Process {
    name: String,
    binary: &'static str,
    args: Vec<String>,
    env: BTreeMap<String, String>,
    log: PathBuf,
    /// Answers 200 once the process is ready; the REST server, which has no probe, answers at all.
    ready_url: String,
    running: Option<Guarded>,
}

impl Fleet {
    /// Starts everything and waits until it is ready.
    pub async fn start(options: FleetOptions) -> Result<Self, FleetError> {
        let emulator = Emulator::start()
            .await
            .map_err(|reason| FleetError::Missing { service: "the Pub/Sub emulator", reason })?;
        let missing = |reason| FleetError::Missing { service: "Postgres", reason };
        let (own, database) = if options.durable {
            let own = Postgres::durable().await.map_err(missing)?;
            let database = own.create_empty_database().await.map_err(anyhow::Error::msg)?;
            let url = own.url(&database);
            (Some(own), url)
        } else {
            let shared = Postgres::shared().await.map_err(missing)?;
            let database = shared.create_empty_database().await.map_err(anyhow::Error::msg)?;
            (None, shared.url(&database))
        };
        if Command::new("curl").arg("--version").output().is_err() {
            let reason = "it is not installed (Debian package `curl`)".to_owned();
            return Err(FleetError::Missing { service: "curl", reason });
        }
        Ok(Self::start_on(emulator, own, database, options).await?)
    }

    async fn start_on(
        emulator: Emulator,
        postgres: Option<Postgres>,
        db_url: String,
        options: FleetOptions,
    ) -> anyhow::Result<Self> {
        let dir = tempfile::Builder::new().prefix("atlas-fleet-").tempdir()?;
        let proxy = if options.proxied { Some(Proxy::start(&emulator.host).await?) } else { None };
        let [postgrest_port, sim_port, gateway_port] = [free_port()?, free_port()?, free_port()?];
        let sim_url = format!("http://127.0.0.1:{sim_port}");
        let gateway_url = format!("http://127.0.0.1:{gateway_port}");

        let mut env: BTreeMap<String, String> = [
            ("PUBSUB_PROJECT_ID", PROJECT.to_owned()),
            ("PUBSUB_EMULATOR_HOST", proxy.as_ref().map_or_else(|| emulator.host.clone(), Proxy::host)),
            ("SUPABASE_URL", format!("http://127.0.0.1:{postgrest_port}")),
            ("SUPABASE_SERVICE_ROLE_KEY", sign_key(JWT_SECRET, "service_role")),
            ("SUPABASE_DB_URL", db_url.clone()),
            ("OPENAI_BASE_URL", format!("{sim_url}/v1")),
            ("OPENAI_API_KEY", "sk-simulated-key".to_owned()),
            ("DAILY_TOKEN_BUDGET", "100000000".to_owned()),
            ("RAG_URL", gateway_url.clone()),
            ("SWEEP_INTERVAL_SECONDS", "2".to_owned()),
            ("RATE_LIMIT_REQUESTS", "1000000".to_owned()),
        ]
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value))
        .collect();
        env.extend(options.env.iter().cloned());

        let migrated = atlas(&env, &["migrate", "up"])?;
        ensure!(migrated.status.success(), "atlas migrate up: {}", String::from_utf8_lossy(&migrated.stderr));

        let process = |name: &str, binary, args: Vec<String>, extra: &[(&str, String)], ready_url| Process {
            name: name.to_owned(),
            binary,
            args,
            env: env
                .clone()
                .into_iter()
                .chain(extra.iter().map(|(name, value)| ((*name).to_owned(), value.clone())))
                .collect(),
            log: dir.path().join(format!("{name}.log")),
            ready_url,
            running: None,
        };
        let authenticator = db_url.replacen("postgres://postgres@", "postgres://authenticator@", 1);
        let mut postgrest = process(
            "postgrest",
            "atlas-postgrest",
            vec!["serve".to_owned(), "--listen".to_owned(), format!("127.0.0.1:{postgrest_port}")],
            &[("PGRST_DB_URI", authenticator), ("PGRST_JWT_SECRET", JWT_SECRET.to_owned())],
            format!("http://127.0.0.1:{postgrest_port}/rest/v1/"),
        );
        let mut sim_args = vec!["--port".to_owned(), sim_port.to_string()];
        sim_args.extend(options.sim);
        let mut sim = process("sim", "openai-sim", sim_args, &[], format!("{sim_url}/sim/meter"));
        let mut gateway = process(
            "gateway",
            "atlas-rag-gateway",
            Vec::new(),
            &[
                ("ATLAS_DATA_DIR", dir.path().join("gateway").display().to_string()),
                ("GATEWAY_LISTEN", format!("127.0.0.1:{gateway_port}")),
            ],
            format!("{gateway_url}/health/ready"),
        );
        postgrest.start().await?;
        sim.start().await?;
        gateway.start().await?;
        if let Some(folder) = &options.index {
            let indexed = atlas(&env, &["index", &folder.display().to_string()])?;
            ensure!(indexed.status.success(), "atlas index: {}", String::from_utf8_lossy(&indexed.stderr));
        }
        let workers = Vec::new();
        let mut fleet =
            Self { emulator, sim_url, db_url, postgrest, sim, gateway, workers, postgres, proxy, env, dir };
        for _ in 0..options.workers {
            fleet.add_worker(&[])?.start().await?;
        }
        Ok(fleet)
    }

    /// Where the emulator's REST API has this resource of the project.
    pub fn emulator_url(&self, resource: &str) -> String {
        format!("http://{}/v1/projects/{PROJECT}/{resource}", self.emulator.host)
    }

    /// A connection to the database, as superuser.
    pub async fn database(&self) -> anyhow::Result<tokio_postgres::Client> {
        let (client, connection) = tokio_postgres::connect(&self.db_url, tokio_postgres::NoTls).await?;
        tokio::spawn(connection);
        Ok(client)
    }

    /// What the simulator billed (`GET /sim/meter`).
    pub async fn meter(&self) -> anyhow::Result<Value> {
        Ok(reqwest::get(format!("{}/sim/meter", self.sim_url)).await?.json().await?)
    }

    /// Runs `atlas` with the fleet's settings.
    pub fn atlas(&self, args: &[&str]) -> anyhow::Result<Output> {
        atlas(&self.env, args)
    }

    /// Runs `atlas` with the fleet's settings beside the test.
    pub fn atlas_beside(&self, args: &[&str]) -> JoinHandle<anyhow::Result<Output>> {
        let env = self.env.clone();
        let args: Vec<String> = args.iter().map(|arg| (*arg).to_owned()).collect();
        tokio::task::spawn_blocking(move || atlas(&env, &args))
    }

    /// Looks until there is something to see, at most [`BOUND`]; then fails with all logs.
    pub async fn eventually<T, F, Fut>(&self, what: &str, mut look: F) -> anyhow::Result<T>
    where
        F: FnMut() -> Fut,
        Fut: Future<Output = Option<T>>,
    {
        let looking = async {
            let mut ticks = tokio::time::interval(Duration::from_millis(100));
            loop {
                ticks.tick().await;
                if let Some(seen) = look().await {
                    return seen;
                }
            }
        };
        match tokio::time::timeout(BOUND, looking).await {
            Ok(seen) => Ok(seen),
            Err(_) => bail!("waited {BOUND:?} for: {what}\n{}", self.logs()),
        }
    }

    /// The last lines of every process, for a failure's message.
    pub fn logs(&self) -> String {
        let mut logs = String::new();
        for process in [&self.postgrest, &self.sim, &self.gateway].into_iter().chain(&self.workers) {
            // Writing to a String cannot fail.
            let _ = writeln!(logs, "--- {}\n{}", process.name, process.log_tail());
        }
        logs
    }

    /// One more worker, with settings of its own over the fleet's. Not started.
    pub fn add_worker(&mut self, settings: &[(&str, &str)]) -> anyhow::Result<&mut Process> {
        let (name, port) = (format!("worker-{}", self.workers.len() + 1), free_port()?);
        let mut env = self.env.clone();
        env.insert("WORKER_LISTEN".to_owned(), format!("127.0.0.1:{port}"));
        env.extend(settings.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
        self.workers.push(Process {
            log: self.dir.path().join(format!("{name}.log")),
            name,
            binary: "atlas-worker",
            args: Vec::new(),
            env,
            ready_url: format!("http://127.0.0.1:{port}/health/ready"),
            running: None,
        });
        self.workers.last_mut().context("just added")
    }

    /// Where logs and data are.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }
}

impl Process {
    /// What it is called.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Starts it; returns before it is ready.
    pub fn spawn(&mut self) -> anyhow::Result<()> {
        let log = std::fs::OpenOptions::new().create(true).append(true).open(&self.log)?;
        let errors = log.try_clone()?;
        let running = Guarded::spawn(binary(self.binary)?, &self.args, |command| {
            command.envs(&self.env).stdout(log).stderr(errors);
        })?;
        self.running = Some(running);
        Ok(())
    }

    /// Starts it and waits until it is ready.
    pub async fn start(&mut self) -> anyhow::Result<()> {
        self.spawn()?;
        let answers = async {
            let mut ticks = tokio::time::interval(Duration::from_millis(50));
            loop {
                ticks.tick().await;
                if self.is_ready().await {
                    return;
                }
            }
        };
        if tokio::time::timeout(Duration::from_secs(60), answers).await.is_err() {
            bail!("{} is not ready:\n{}", self.name, self.log_tail());
        }
        Ok(())
    }

    /// Does it say that it can work? The REST server, which has no probe: does it answer at all?
    pub async fn is_ready(&self) -> bool {
        match reqwest::get(&self.ready_url).await {
            Ok(response) => response.status().is_success() || self.binary == "atlas-postgrest",
            Err(_) => false,
        }
    }

    /// What it says of itself to Prometheus; why not, if it does not.
    pub async fn metrics(&self) -> String {
        let url = self.ready_url.replace("/health/ready", "/metrics");
        let answer = async { reqwest::get(url).await?.text().await };
        match tokio::time::timeout(Duration::from_secs(5), answer).await {
            Ok(Ok(text)) => text,
            Ok(Err(error)) => error.to_string(),
            Err(_) => "no answer".to_owned(),
        }
    }

    /// Sends a signal, by its name without `SIG`.
    pub fn signal(&mut self, name: &str) -> anyhow::Result<()> {
        let running = self.running.as_mut().with_context(|| format!("{} does not run", self.name))?;
        Ok(running.signal(name)?)
    }

    /// Waits until it ends by itself, at most `bound`; returns its exit code.
    pub async fn exit_code(&mut self, bound: Duration) -> anyhow::Result<i32> {
        let running = self.running.as_mut().with_context(|| format!("{} does not run", self.name))?;
        let file = self.log.with_extension("exit");
        let _ = std::fs::remove_file(&file);
        running.report_exit(&file)?;
        let reported = async {
            loop {
                match std::fs::read_to_string(&file) {
                    Ok(text) if text.ends_with('\n') => return text,
                    _ => tokio::time::sleep(Duration::from_millis(20)).await,
                }
            }
        };
        let Ok(text) = tokio::time::timeout(bound, reported).await else {
            bail!("{} did not end within {bound:?}:\n{}", self.name, self.log_tail());
        };
        self.running = None;
        text.trim().parse().with_context(|| format!("exit code {text:?}"))
    }

    /// `SIGKILL`, as a crash or an out-of-memory kill would.
    pub fn kill(&mut self) {
        self.running = None;
    }

    /// Is it meant to run?
    pub fn is_running(&self) -> bool {
        self.running.is_some()
    }

    /// Everything it wrote so far.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    fn log_tail(&self) -> String {
        let text = self.log();
        let lines: Vec<&str> = text.lines().collect();
        lines.get(lines.len().saturating_sub(15)..).unwrap_or_default().join("\n")
    }
}

/// One curl call with a JSON body; the answer must be JSON and no error.
pub fn curl_json(method: &str, url: &str, body: &Value) -> anyhow::Result<Value> {
    let mut curl = Command::new("curl")
        .args(["--silent", "--show-error", "--fail-with-body", "--max-time", "60", "--request", method])
        .args(["--header", "Content-Type: application/json", "--data-binary", "@-", url])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("curl")?;
    curl.stdin.take().context("curl's standard input")?.write_all(body.to_string().as_bytes())?;
    let output = curl.wait_with_output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "curl {method} {url}: {text} {errors}");
    serde_json::from_str(&text).with_context(|| format!("{url}: {text}"))
}

/// The workspace's folder.
pub fn workspace() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_owned()
}

/// A binary of this workspace, of the same profile as the running program: beside it, or, when that is a
/// test, in the folder above. `scripts/test.sh` builds all of them first.
fn binary(name: &str) -> anyhow::Result<PathBuf> {
    let own = std::env::current_exe()?;
    let found = own.ancestors().skip(1).take(2).map(|dir| dir.join(name)).find(|path| path.is_file());
    found.with_context(|| {
        format!("{name} is not built; run `make e2e`, or `cargo build --workspace --bins --tests` first")
    })
}

fn atlas(env: &BTreeMap<String, String>, args: &[impl AsRef<OsStr>]) -> anyhow::Result<Output> {
    Ok(Command::new(binary("atlas")?).args(args).envs(env).stdin(Stdio::null()).output()?)
}
