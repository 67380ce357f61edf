//! The stack in this process: gateway and worker on embedded adapters, or one of them.
//!
//! A stack owns its data folder (see [`crate::lock`]) from before its first part starts until after
//! its last part has stopped.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use atlas_rag_gateway::{Gateway, RunningGateway};
use atlas_shared::{
    Config, Secret,
    config::{ApiKey, IndexConfig},
    gateway_client::GatewayClient,
    ledger, telemetry,
};
use atlas_worker::{RunningWorker, Worker};
use url::Url;

use crate::{
    context::Context,
    error::{CliError, Result},
    lock::{self, DataDirLock, Owner},
    ui::Ui,
};

/// How long a short command waits for another short command to give the data folder back.
const PATIENCE: Duration = Duration::from_secs(30);

/// How long a command waits for an `atlas dev` that is just starting.
const START_PATIENCE: Duration = Duration::from_secs(20);

/// Parts of the stack in this process.
pub(crate) struct Stack {
    /// The settings it runs with: `rag.url` names its gateway.
    pub(crate) config: Config,
    gateway: Option<RunningGateway>,
    worker: Option<RunningWorker>,
    // Last: fields are dropped in order, and the folder is ours until everything has stopped.
    lock: Option<DataDirLock>,
}

/// What runs in this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Parts {
    /// The gateway only: `index`, `search`.
    Gateway,
    /// Gateway and worker.
    All,
}

impl Stack {
    /// Starts the parts for `command`. `config` says which adapters.
    pub(crate) async fn start(mut config: Config, parts: Parts, command: &str, ui: Ui) -> Result<Self> {
        telemetry::init(&config.log)?;
        check_built_in(&config)?;
        let lock = match embedded_dir(&config) {
            Some(dir) => Some(acquire(&dir, command, ui).await?),
            None => None,
        };
        if config.rag.api_key.is_none() && known_key(&config).is_none() && !config.gateway.api_keys.is_empty()
        {
            // The gateway's keys are hashed: our own worker gets one for the life of this process.
            let key = ApiKey::generate();
            config.gateway.api_keys.push(ApiKey::new("atlas", key.expose(), None));
        }
        let mut stack = Self { config: config.clone(), gateway: None, worker: None, lock };
        let ledger = ledger::open(&config).await?;
        let gateway = Box::pin(Gateway::start(&config, ledger)).await.map_err(|error| {
            start_error("gateway", "GATEWAY_LISTEN", "--port", config.gateway.listen, &error)
        })?;
        let addr = gateway.addr;
        stack.gateway = Some(gateway);
        point_at_gateway(&mut config, addr);
        stack.config = config.clone();
        if parts == Parts::All {
            match Box::pin(Worker::start(&config)).await {
                Ok(worker) => stack.worker = Some(worker),
                Err(error) => {
                    let error =
                        start_error("worker", "WORKER_LISTEN", "--worker-port", config.worker.listen, &error);
                    stack.stop().await;
                    return Err(error);
                }
            }
        }
        let (gateway, worker) = (stack.gateway_url(), stack.worker_url());
        if let Some(lock) = &mut stack.lock {
            lock.announce(gateway, worker)?;
        }
        Ok(stack)
    }

    /// Where the gateway listens.
    pub(crate) fn gateway_url(&self) -> Option<Url> {
        self.gateway.as_ref().and_then(|gateway| http_url(gateway.addr))
    }

    /// Where the worker's probes and metrics are.
    pub(crate) fn worker_url(&self) -> Option<Url> {
        self.worker.as_ref().and_then(|worker| http_url(worker.addr))
    }

    /// A client of this stack's gateway.
    pub(crate) fn client(&self) -> Result<GatewayClient> {
        client(&self.config)
    }

    /// Stops the parts: the worker finishes or gives back what it has, then the gateway goes.
    pub(crate) async fn stop(mut self) {
        if let Some(worker) = self.worker.take() {
            worker.drain().await;
        }
        if let Some(gateway) = self.gateway.take() {
            gateway.shutdown().await;
        }
        // The folder is given back here.
        drop(self.lock.take());
    }
}

/// The embedded engine is a build feature; without it a Qdrant server is needed.
fn check_built_in(config: &Config) -> Result<()> {
    if cfg!(feature = "embedded") || !matches!(config.gateway.index, IndexConfig::Embedded(_)) {
        return Ok(());
    }
    Err(CliError::usage("this atlas was built without the embedded search engine")
        .because("it was built with --no-default-features, as for production images")
        .fix("set RAG_URL to a running gateway, or QDRANT_URL to a Qdrant server")
        .fix("or build it with: cargo build -p atlas-cli --features embedded"))
}

/// The folder that must be ours for these settings, if any adapter is embedded.
fn embedded_dir(config: &Config) -> Option<PathBuf> {
    if let IndexConfig::Embedded(dir) = &config.gateway.index {
        return Some(dir.clone());
    }
    None
}

/// Makes the worker of this process use the gateway of this process.
fn point_at_gateway(config: &mut Config, addr: SocketAddr) {
    config.rag.url = http_url(addr);
    if config.rag.api_key.is_none() {
        // Both ends are ours: the worker is one of the gateway's callers.
        config.rag.api_key = known_key(config);
    }
}

/// A key that this process can show to a gateway of the same settings: those in a file are hashed.
fn known_key(config: &Config) -> Option<Secret> {
    let mut everybodys = config.gateway.api_keys.iter().filter(|key| key.tenant.is_none());
    everybodys.find_map(|key| key.plain.clone())
}

fn http_url(addr: SocketAddr) -> Option<Url> {
    let addr = if addr.ip().is_unspecified() {
        // "Everywhere" is no address to connect to.
        SocketAddr::new(std::net::Ipv4Addr::LOCALHOST.into(), addr.port())
    } else {
        addr
    };
    Url::parse(&format!("http://{addr}/")).ok()
}

/// The `atlas dev` that runs on this data folder, once it is up.
pub(crate) async fn running_dev(context: &Context) -> Option<Owner> {
    lock::ready_owner(context.data_dir(), START_PATIENCE)
        .await
        .filter(|owner| owner.stays() && owner.gateway.is_some())
}

/// Takes the data folder. A running `dev` is told at once, a short command is waited for.
async fn acquire(dir: &Path, command: &str, ui: Ui) -> Result<DataDirLock> {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    let mut told = false;
    let mut seen_dev = 0;
    loop {
        let owner = match DataDirLock::try_acquire(dir, command)? {
            Ok(lock) => return Ok(lock),
            Err(owner) => owner,
        };
        // A command that only looks holds the lock for an instant, and the file still names a dead
        // owner then: believe what is seen twice.
        seen_dev += u32::from(owner.as_ref().is_some_and(Owner::stays));
        if seen_dev > 2 || tokio::time::Instant::now() >= deadline {
            return Err(taken(dir, owner.as_ref()));
        }
        if !told && seen_dev == 0 {
            told = true;
            if let Some(owner) = &owner {
                ui.note(format_args!(
                    "Waiting for `atlas {}` (process {}), which uses {}…",
                    owner.command,
                    owner.pid,
                    dir.display()
                ));
            }
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

fn taken(dir: &Path, owner: Option<&Owner>) -> CliError {
    let error = CliError::failure(format!("the data folder {} is in use", dir.display()));
    match owner {
        Some(owner) => {
            let at = owner.gateway.as_ref().map_or_else(String::new, |url| format!(", gateway at {url}"));
            error
                .because(format_args!("`atlas {}` (process {}) has it{at}", owner.command, owner.pid))
                .fix("stop that one, or name another folder with --data-dir")
        }
        None => error
            .because("another atlas command has it")
            .fix("wait for that one, or name another folder with --data-dir"),
    }
}

/// Why a part did not start, with the way out where it is the usual one.
fn start_error(
    part: &str,
    variable: &str,
    flag: &str,
    listen: SocketAddr,
    error: &(dyn std::error::Error + 'static),
) -> CliError {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    let mut in_use = false;
    while let Some(error) = cause {
        in_use |= error
            .downcast_ref::<std::io::Error>()
            .is_some_and(|error| error.kind() == std::io::ErrorKind::AddrInUse);
        cause = error.source();
    }
    in_use |= error.to_string().contains("in use");
    if in_use {
        return CliError::failure(format!("the {part} cannot listen on {listen}"))
            .because("another program listens there (is `atlas dev` running already?)")
            .fix(format!("choose a port with {flag} (0 picks a free one) or {variable}"));
    }
    CliError::failure(format!("the {part} does not start")).because(error).fix("atlas doctor")
}

/// A client of the gateway that `config` names. Its calls may take as long as the gateway allows
/// itself, indexing included.
pub(crate) fn client(config: &Config) -> Result<GatewayClient> {
    let Some(url) = &config.rag.url else {
        return Err(CliError::usage("there is no gateway to ask").fix("set RAG_URL, or start `atlas dev`"));
    };
    let timeout = config.gateway.timeout + Duration::from_secs(5);
    Ok(GatewayClient::new(url, config.rag.api_key.clone(), timeout)?)
}

/// Where an embedded index is, for a note.
pub(crate) fn embedded_place(context: &Context) -> String {
    format!("the embedded index in {}", context.data_dir().display())
}

/// A gateway to talk to: one that runs, or one in this process for as long as this lives.
pub(crate) struct GatewayAccess {
    /// How to call it.
    pub(crate) client: GatewayClient,
    /// The settings that are used with it.
    pub(crate) config: Config,
    /// Where it is, for a note.
    pub(crate) place: String,
    stack: Option<Stack>,
}

impl GatewayAccess {
    /// `RAG_URL`, else the running `atlas dev`, else one in this process.
    pub(crate) async fn open(context: &Context, command: &str) -> Result<Self> {
        Self::open_at(context, command, None).await
    }

    /// The gateway at `url`, or the one that [`Self::open`] finds.
    pub(crate) async fn open_at(context: &Context, command: &str, url: Option<Url>) -> Result<Self> {
        let mut config = context.config()?;
        config.rag.url = url.or(config.rag.url);
        if config.rag.url.is_none()
            && let Some(owner) = running_dev(context).await
        {
            config.rag.url = owner.gateway;
            if config.rag.api_key.is_none() {
                config.rag.api_key = known_key(&config);
            }
        }
        if let Some(url) = &config.rag.url {
            let place = format!("the gateway at {url}");
            return Ok(Self { client: client(&config)?, config, place, stack: None });
        }
        config.gateway.listen = ([127, 0, 0, 1], 0).into();
        // Only this command calls it.
        config.gateway.rate_limit_requests = u32::MAX;
        let stack = Box::pin(Stack::start(config, Parts::Gateway, command, context.ui)).await?;
        Ok(Self {
            client: stack.client()?,
            config: stack.config.clone(),
            place: embedded_place(context),
            stack: Some(stack),
        })
    }

    /// The gateway of a stack that somebody else stops.
    pub(crate) fn of(stack: &Stack) -> Result<Self> {
        Ok(Self {
            client: stack.client()?,
            config: stack.config.clone(),
            place: "this demo's own index".to_owned(),
            stack: None,
        })
    }

    /// False where it is known to embed nothing: it is in this process, and has no embedding model.
    pub(crate) fn may_embed(&self) -> bool {
        let has_model = self.config.openai.as_ref().is_some_and(|openai| openai.embedding_model.is_some());
        self.stack.is_none() || has_model
    }

    /// Stops what was started for it.
    pub(crate) async fn close(self) {
        if let Some(stack) = self.stack {
            stack.stop().await;
        }
    }
}
