//! Every setting of every process, in one place.
//!
//! [`SETTINGS`] is the one table: `docs/CONFIGURATION.md` and `.env.example` are generated from it
//! (`atlas config docs`), and a test fails when they differ. [`Config::load`] reads all of it at
//! start and reports *every* fault at once, each with the variable and the fix.

use std::{
    collections::BTreeMap,
    fmt,
    net::SocketAddr,
    ops::RangeInclusive,
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use url::Url;

use crate::{
    Secret,
    ledger::{Limits, Tokens},
    serve::ConnectionBounds,
};

mod api_key;
pub mod docs;
mod settings;
mod source_urls;

pub use api_key::ApiKey;
pub use settings::{Group, SETTINGS, Setting};
pub use source_urls::{SourceLines, SourceUrls};

/// A source of settings: the process environment, or a map in tests. `NAME_FILE` is read for every
/// secret, so that Docker and Kubernetes secrets need no environment variable.
#[derive(Clone, Debug, Default)]
pub struct Env {
    values: BTreeMap<String, String>,
}

impl Env {
    /// The environment of this process.
    pub fn process() -> Self {
        // Only our own names are taken: no other process's secrets are kept in memory.
        let mut values = BTreeMap::new();
        for setting in SETTINGS {
            for name in [setting.name.to_owned(), format!("{}_FILE", setting.name)] {
                if let Ok(value) = std::env::var(&name) {
                    values.insert(name, value);
                }
            }
        }
        Self { values }
    }

    /// Sets a value unless there is one: the embedded defaults of `atlas dev`.
    #[must_use]
    pub fn with_default(mut self, name: &str, value: impl Into<String>) -> Self {
        let file = format!("{name}_FILE");
        if !self.values.contains_key(name) && !self.values.contains_key(&file) {
            self.values.insert(name.to_owned(), value.into());
        }
        self
    }

    /// Sets a value: a command line flag wins over the environment.
    #[must_use]
    pub fn with(mut self, name: &str, value: impl Into<String>) -> Self {
        self.values.insert(name.to_owned(), value.into());
        self
    }

    /// The value as it is, if set and not blank.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.values.get(name).map(|value| value.trim()).filter(|value| !value.is_empty())
    }
}

impl<const N: usize> From<[(&str, &str); N]> for Env {
    fn from(pairs: [(&str, &str); N]) -> Self {
        Self { values: pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect() }
    }
}

/// Which process reads its settings: decides what must be set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Process {
    /// `atlas-worker`.
    Worker,
    /// `atlas-rag-gateway`.
    Gateway,
    /// `atlas`, which brings embedded defaults.
    Cli,
}

/// All settings, valid.
#[derive(Clone, Debug)]
pub struct Config {
    /// Folder of the embedded store, queue and index; set when any embedded adapter may be used.
    pub data_dir: Option<PathBuf>,
    /// Where requests come from and answers go.
    pub queue: QueueConfig,
    /// Where the truth is.
    pub store: StoreConfig,
    /// The OpenAI-compatible API; `None` means the offline drafter and lexical search.
    pub openai: Option<OpenAiConfig>,
    /// How the worker asks the gateway.
    pub rag: RagConfig,
    /// Token limits.
    pub limits: Limits,
    /// How the worker works.
    pub worker: WorkerConfig,
    /// How retries and breakers behave, everywhere.
    pub resilience: ResilienceConfig,
    /// The gateway's own settings.
    pub gateway: GatewayConfig,
    /// Logs.
    pub log: LogConfig,
}

/// `RequestQueue` adapter.
#[expect(clippy::large_enum_variant, reason = "there is one in a process")]
#[derive(Clone, Debug)]
pub enum QueueConfig {
    /// A table in the SQLite file of this folder.
    Embedded(PathBuf),
    /// Google Pub/Sub.
    PubSub(PubSubConfig),
}

/// Google Pub/Sub.
#[derive(Clone, Debug)]
pub struct PubSubConfig {
    /// `PUBSUB_PROJECT_ID`.
    pub project_id: String,
    /// `PUBSUB_TOPIC_IN`, short name.
    pub topic_in: String,
    /// `PUBSUB_TOPIC_OUT`, short name.
    pub topic_out: String,
    /// `PUBSUB_TOPIC_DLQ`, short name.
    pub topic_dlq: String,
    /// `PUBSUB_SUBSCRIPTION`, short name.
    pub subscription: String,
    /// `PUBSUB_DLQ_SUBSCRIPTION`, short name.
    pub dlq_subscription: String,
    /// `PUBSUB_TOPIC_DOCS`, short name.
    pub topic_docs: String,
    /// `PUBSUB_DOCS_SUBSCRIPTION`, short name.
    pub docs_subscription: String,
    /// `PUBSUB_EMULATOR_HOST` as a URL with its scheme.
    pub emulator: Option<Url>,
    /// Create what is missing (development); otherwise only check and report.
    pub create_missing: bool,
    /// `PUBSUB_MAX_DELIVERY_ATTEMPTS`, 5 to 100, used when a subscription is created.
    pub max_delivery_attempts: u32,
    /// `PUBSUB_TIMEOUT_SECONDS`: bound of one publish or admin call.
    pub timeout: Duration,
}

/// `RunStore` adapter.
#[derive(Clone, Debug)]
pub enum StoreConfig {
    /// The SQLite file of this folder.
    Embedded(PathBuf),
    /// Supabase.
    Supabase(SupabaseConfig),
}

/// Supabase: Postgres behind PostgREST.
#[derive(Clone, Debug)]
pub struct SupabaseConfig {
    /// `SUPABASE_URL`, without `/rest/v1`.
    pub url: Url,
    /// `SUPABASE_SERVICE_ROLE_KEY`, a JWT.
    pub service_role_key: Secret,
    /// `STORE_TIMEOUT_SECONDS`: bound of one call.
    pub timeout: Duration,
}

/// The OpenAI-compatible API.
#[derive(Clone, Debug)]
pub struct OpenAiConfig {
    /// `OPENAI_API_KEY`; `None` for servers that need none.
    pub api_key: Option<Secret>,
    /// `OPENAI_BASE_URL`.
    pub base_url: Url,
    /// `OPENAI_MODEL`, then `OPENAI_FALLBACK_MODELS`: never empty.
    pub models: Vec<String>,
    /// `OPENAI_EMBEDDING_MODEL`; `None` when set to `none`: lexical search only.
    pub embedding_model: Option<String>,
    /// `OPENAI_RESPONSE_FORMAT`.
    pub response_format: ResponseFormatSetting,
    /// `OPENAI_TIMEOUT_SECONDS`: bound of one model call.
    pub timeout: Duration,
    /// `OPENAI_MAX_COMPLETION_TOKENS`: the cap of one answer.
    pub max_completion_tokens: u32,
    /// `OPENAI_MIN_COMPLETION_TOKENS`: below this an answer is not worth asking for.
    pub min_completion_tokens: u32,
    /// Answers are streamed when somebody listens.
    pub stream: bool,
}

/// `OPENAI_RESPONSE_FORMAT`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ResponseFormatSetting {
    /// Strict JSON schema.
    JsonSchema,
    /// Any JSON object, schema in the prompt.
    JsonObject,
    /// No format asked for, schema in the prompt.
    Text,
}

impl FromStr for ResponseFormatSetting {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "json_schema" => Ok(Self::JsonSchema),
            "json_object" => Ok(Self::JsonObject),
            "text" => Ok(Self::Text),
            _ => Err("use json_schema, json_object or text".to_owned()),
        }
    }
}

/// How the worker asks the gateway.
#[derive(Clone, Debug)]
pub struct RagConfig {
    /// `RAG_URL`; `None` in the embedded stack, which fills it in once its gateway listens.
    pub url: Option<Url>,
    /// `RAG_API_KEY`.
    pub api_key: Option<Secret>,
    /// `RAG_COLLECTION`.
    pub collection: String,
    /// `RAG_TOP_K`.
    pub top_k: usize,
    /// `RELEVANCY_THRESHOLD`; `None`: the gateway decides by embedding model.
    pub relevancy_threshold: Option<f32>,
    /// `RAG_FAIL_OPEN`: go on without passages when the gateway is down, and say so.
    pub fail_open: bool,
    /// `RAG_TIMEOUT_SECONDS`: bound of one query.
    pub timeout: Duration,
}

/// How the worker works.
#[derive(Clone, Debug)]
pub struct WorkerConfig {
    /// `WORKER_LISTEN`: probes and metrics.
    pub listen: SocketAddr,
    /// `MAX_IN_FLIGHT`: runs at once.
    pub max_in_flight: usize,
    /// `MAX_MESSAGE_BYTES`.
    pub max_message_bytes: usize,
    /// `LEASE_SECONDS`: how long a dead worker's run stays untouched.
    pub lease: Duration,
    /// `RUN_TIMEOUT_SECONDS`: bound of one attempt of a run.
    pub run_timeout: Duration,
    /// `MAX_RUN_ATTEMPTS`: a run that failed transiently this often is failed for good.
    pub max_run_attempts: u32,
    /// `SWEEP_INTERVAL_SECONDS`: expired leases, outbox, deferred runs; jittered.
    pub sweep_interval: Duration,
    /// How often runs at work are checked for cancels.
    pub cancel_interval: Duration,
    /// `OUTBOX_CONCURRENCY`: answers that a sweep sends at once.
    pub outbox_concurrency: usize,
    /// `DRAIN_TIMEOUT_SECONDS`: how long running work may go on after SIGTERM.
    pub drain_timeout: Duration,
    /// `INDEX_ON_DOCS_ADDED`: read `docs_added` and have the gateway index what it names.
    pub index_on_docs_added: bool,
    /// `AGENT_MAX_SEARCHES`: rounds of `search_knowledge` a run.
    pub max_searches: u32,
    /// How long old rows are kept.
    pub retention: RetentionConfig,
    /// Messages with text while it is written, for runs that ask for them (`metadata.stream`); 0: none.
    pub stream_chunks: u32,
    /// The shortest time between two of them.
    pub stream_interval: Duration,
    /// Where cited files can be read.
    pub source_urls: SourceUrls,
}

/// How long old rows of the store are kept; `None`: for ever. Runs, results and day accounts always are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RetentionConfig {
    /// `RETENTION_OUTBOX_DAYS`: answers that were sent.
    pub outbox: Option<Duration>,
    /// `RETENTION_STEPS_DAYS`: checkpoints of final runs.
    pub steps: Option<Duration>,
    /// `RETENTION_REQUESTS_DAYS`: requests of final runs, `architect_in`.
    pub requests: Option<Duration>,
    /// `RETENTION_LEDGER_DAYS`: closed rows of `token_ledger`.
    pub ledger: Option<Duration>,
    /// `RETENTION_DEAD_LETTERS_DAYS`: dead letters that were replayed.
    pub dead_letters: Option<Duration>,
}

/// Retries and circuit breakers.
#[derive(Clone, Debug)]
pub struct ResilienceConfig {
    /// `RETRY_MAX_ATTEMPTS`: attempts of one call, the first included.
    pub max_attempts: u32,
    /// `RETRY_BASE_MILLISECONDS`: first delay, before jitter.
    pub base_delay: Duration,
    /// `RETRY_MAX_DELAY_SECONDS`: cap of a delay and of an honoured `Retry-After`.
    pub max_delay: Duration,
    /// `CIRCUIT_FAILURES`: failures in a row that open a circuit.
    pub circuit_failures: u32,
    /// `CIRCUIT_OPEN_SECONDS`: how long before a probe.
    pub circuit_open: Duration,
}

/// The gateway's own settings.
#[derive(Clone, Debug)]
pub struct GatewayConfig {
    /// `GATEWAY_LISTEN`.
    pub listen: SocketAddr,
    /// Where vectors live.
    pub index: IndexConfig,
    /// `REDIS_URL`.
    pub redis_url: Option<Secret>,
    /// `CACHE_TTL`, seconds; zero switches the cache off.
    pub cache_ttl: Duration,
    /// `CACHE_STALE_SECONDS`: how old an answer may be that is given while the index is down.
    pub cache_stale: Duration,
    /// `CACHE_MAX_ENTRIES`.
    pub cache_max_entries: u64,
    /// `API_KEYS`; empty means open to whoever reaches the port.
    pub api_keys: Vec<ApiKey>,
    /// `RATE_LIMIT_REQUESTS` in each window, a caller.
    pub rate_limit_requests: u32,
    /// `RATE_LIMIT_WINDOW_SECONDS`.
    pub rate_limit_window: Duration,
    /// `MAX_BODY_BYTES`.
    pub max_body_bytes: usize,
    /// `MAX_TOP_K`.
    pub max_top_k: usize,
    /// `PASSAGE_TOKENS`: bound of a passage that is joined with its neighbours; zero: none is.
    pub passage_tokens: usize,
    /// `SECONDARY_WEIGHT`: what counts of the lexical score of tests, changelogs and the like, from 0.1 to 1.
    pub secondary_weight: f32,
    /// `QUERY_EMBEDDING_TIMEOUT_MILLISECONDS`: bound of one query's embedding.
    pub query_embedding_timeout: Duration,
    /// `RERANK_URL` and its companions.
    pub rerank: Option<RerankConfig>,
    /// `GATEWAY_TIMEOUT_SECONDS`: bound of one request.
    pub timeout: Duration,
    /// `GATEWAY_MAX_CONCURRENCY`: requests at once; more get 503.
    pub max_concurrency: usize,
    /// `GATEWAY_MAX_CONNECTIONS`, `GATEWAY_HEADER_TIMEOUT_SECONDS`, `GATEWAY_IDLE_TIMEOUT_SECONDS`.
    pub connections: ConnectionBounds,
    /// `MAX_INDEX_JOBS`: jobs waiting or running; more get 429.
    pub max_index_jobs: usize,
    /// `INDEX_JOB_PATIENCE_SECONDS`: how long a job goes on trying with nothing done.
    pub index_job_patience: Duration,
    /// `INDEX_ALLOWED_ROOTS`: folders below which the gateway may read by itself; empty: none.
    pub index_allowed_roots: Vec<PathBuf>,
    /// `INDEX_ALLOWED_URLS`: beginnings of git URLs that it may clone; empty: none.
    pub index_allowed_urls: Vec<String>,
    /// `INDEX_MIN_FREE_BYTES`: of the embedded index's disk, what no write takes.
    pub index_min_free_bytes: u64,
    /// `CHUNK_TOKENS`: upper bound of a chunk.
    pub chunk_tokens: usize,
    /// `CHUNK_OVERLAP_TOKENS`.
    pub chunk_overlap_tokens: usize,
    /// How new collections are weighed.
    pub bm25: Bm25Config,
}

/// Parameters of the lexical ranking, BM25 (Robertson and Zaragoza, 2009).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bm25Config {
    /// `BM25_K1`: how slowly repetitions of a word stop counting.
    pub k1: f64,
    /// `BM25_B`: how much long chunks are held back, from 0 to 1.
    pub b: f64,
    /// `BM25_HEADING_WEIGHT`: how often a word of the heading counts.
    pub heading_weight: u32,
}

/// A reranker's API.
#[derive(Clone, Debug)]
pub struct RerankConfig {
    /// `RERANK_URL`: the endpoint itself.
    pub url: Url,
    /// `RERANK_API`.
    pub api: RerankApi,
    /// `RERANK_API_KEY`.
    pub api_key: Option<Secret>,
    /// `RERANK_MODEL`.
    pub model: Option<String>,
    /// `RERANK_CANDIDATES`.
    pub candidates: usize,
    /// `RERANK_TIMEOUT_MILLISECONDS`: bound of one query's reranking.
    pub timeout: Duration,
}

/// What a reranker speaks: `RERANK_API`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RerankApi {
    /// `documents` in, `results[].relevance_score` out.
    Jina,
    /// The same without `return_documents`.
    Cohere,
    /// `texts` in, a list of `score` out.
    Tei,
}

impl FromStr for RerankApi {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "jina" => Ok(Self::Jina),
            "cohere" => Ok(Self::Cohere),
            "tei" => Ok(Self::Tei),
            _ => Err("use jina, cohere or tei".to_owned()),
        }
    }
}

/// `VectorIndex` adapter.
#[derive(Clone, Debug)]
pub enum IndexConfig {
    /// `qdrant-edge` in this folder.
    Embedded(PathBuf),
    /// A Qdrant server.
    Qdrant {
        /// `QDRANT_URL`, the gRPC port (6334).
        url: Url,
        /// `QDRANT_API_KEY`.
        api_key: Option<Secret>,
    },
}

/// Logs.
#[derive(Clone, Debug)]
pub struct LogConfig {
    /// `LOG_LEVEL`: a `tracing` filter.
    pub filter: String,
    /// `LOG_FORMAT=json|text`.
    pub json: bool,
}

/// One wrong setting.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError {
    /// The variable.
    pub variable: &'static str,
    /// What is wrong with it.
    pub problem: String,
    /// What to do.
    pub fix: String,
}

/// Everything that is wrong with the settings.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct ConfigErrors(pub Vec<ConfigError>);

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "the configuration is not valid:")?;
        for ConfigError { variable, problem, fix } in &self.0 {
            writeln!(f, "  {variable}: {problem}")?;
            writeln!(f, "      fix: {fix}")?;
        }
        f.write_str("All variables: docs/CONFIGURATION.md")
    }
}

impl Config {
    /// Reads and validates all settings. Reports every fault, not just the first.
    pub fn load(env: &Env, process: Process) -> Result<Self, ConfigErrors> {
        let mut reader = Reader { env, errors: Vec::new() };
        let config = reader.config(process);
        if reader.errors.is_empty() { Ok(config) } else { Err(ConfigErrors(reader.errors)) }
    }
}

/// Reads typed values and collects faults; returns a harmless stand-in after a fault, so that
/// reading goes on and the user sees everything at once.
struct Reader<'a> {
    env: &'a Env,
    errors: Vec<ConfigError>,
}

impl Reader<'_> {
    fn config(&mut self, process: Process) -> Config {
        let data_dir = self.env.get("ATLAS_DATA_DIR").map(PathBuf::from);
        let openai = self.openai();
        let needs_store =
            process != Process::Gateway || openai.as_ref().is_some_and(|o| o.embedding_model.is_some());
        Config {
            queue: self.queue(data_dir.as_deref(), process),
            store: self.store(data_dir.as_deref(), needs_store),
            rag: self.rag(process),
            limits: Limits {
                daily: Tokens(self.number("DAILY_TOKEN_BUDGET", 0..=1_000_000_000_000)),
                run: Tokens(self.number("TOKEN_BUDGET_PER_RUN", 1..=1_000_000_000)),
            },
            worker: WorkerConfig {
                listen: self.parse(
                    "WORKER_LISTEN",
                    "an address and a port, such as 0.0.0.0:8000",
                    ([127, 0, 0, 1], 8000).into(),
                ),
                max_in_flight: self.size("MAX_IN_FLIGHT", 1..=100_000),
                max_message_bytes: self.size("MAX_MESSAGE_BYTES", 1024..=10_000_000),
                lease: self.seconds("LEASE_SECONDS", 5..=3600),
                run_timeout: self.seconds("RUN_TIMEOUT_SECONDS", 1..=86_400),
                max_run_attempts: self.small("MAX_RUN_ATTEMPTS", 1..=100),
                sweep_interval: self.seconds("SWEEP_INTERVAL_SECONDS", 1..=3600),
                cancel_interval: self.seconds("CANCEL_INTERVAL_SECONDS", 1..=3600),
                outbox_concurrency: self.size("OUTBOX_CONCURRENCY", 1..=256),
                drain_timeout: self.seconds("DRAIN_TIMEOUT_SECONDS", 0..=3600),
                index_on_docs_added: self.flag("INDEX_ON_DOCS_ADDED"),
                max_searches: self.small("AGENT_MAX_SEARCHES", 0..=20),
                retention: RetentionConfig {
                    outbox: self.days("RETENTION_OUTBOX_DAYS", 1),
                    steps: self.days("RETENTION_STEPS_DAYS", 1),
                    requests: self.days("RETENTION_REQUESTS_DAYS", 1),
                    // A call that is under way over midnight is booked on the day before.
                    ledger: self.days("RETENTION_LEDGER_DAYS", 2),
                    dead_letters: self.days("RETENTION_DEAD_LETTERS_DAYS", 1),
                },
                stream_chunks: self.small("STREAM_CHUNKS", 0..=10_000),
                stream_interval: Duration::from_millis(
                    self.number("STREAM_INTERVAL_MILLISECONDS", 20..=60_000),
                ),
                source_urls: self.source_urls(),
            },
            resilience: ResilienceConfig {
                max_attempts: self.small("RETRY_MAX_ATTEMPTS", 1..=20),
                base_delay: Duration::from_millis(self.number("RETRY_BASE_MILLISECONDS", 1..=60_000)),
                max_delay: self.seconds("RETRY_MAX_DELAY_SECONDS", 1..=600),
                circuit_failures: self.small("CIRCUIT_FAILURES", 1..=1000),
                circuit_open: self.seconds("CIRCUIT_OPEN_SECONDS", 1..=3600),
            },
            gateway: self.gateway(data_dir.as_deref(), process),
            log: LogConfig {
                filter: self.text("LOG_LEVEL").unwrap_or_default(),
                json: match self.text("LOG_FORMAT").as_deref() {
                    Some("text") => false,
                    Some("json") | None => true,
                    Some(other) => {
                        let problem = format!("{other:?} is not a log format");
                        self.fault("LOG_FORMAT", problem, "use json or text");
                        true
                    }
                },
            },
            openai,
            data_dir,
        }
    }

    fn queue(&mut self, data_dir: Option<&Path>, process: Process) -> QueueConfig {
        let Some(project_id) = self.text("PUBSUB_PROJECT_ID") else {
            if let Some(dir) = data_dir {
                return QueueConfig::Embedded(dir.to_owned());
            }
            if process != Process::Gateway {
                self.fault(
                    "PUBSUB_PROJECT_ID",
                    "is not set, so there is no queue to pull from".to_owned(),
                    "set it to your Google Cloud project, or set ATLAS_DATA_DIR to a folder to run embedded",
                );
            }
            return QueueConfig::Embedded(PathBuf::from(".atlas"));
        };
        let emulator = self.text("PUBSUB_EMULATOR_HOST").and_then(|host| {
            // The Pub/Sub convention is `host:port`; the client library panics without a scheme.
            let url = if host.contains("://") { host.clone() } else { format!("http://{host}") };
            match Url::parse(&url) {
                Ok(url) if url.host().is_some() && matches!(url.scheme(), "http" | "https") => Some(url),
                _ => {
                    self.fault(
                        "PUBSUB_EMULATOR_HOST",
                        format!("{host:?} is not host:port"),
                        "set it to, say, localhost:8085, or unset it for the real service",
                    );
                    None
                }
            }
        });
        let create_missing = match self.text("PUBSUB_CREATE") {
            Some(_) => self.flag("PUBSUB_CREATE"),
            None => emulator.is_some(),
        };
        QueueConfig::PubSub(PubSubConfig {
            project_id,
            topic_in: self.resource("PUBSUB_TOPIC_IN"),
            topic_out: self.resource("PUBSUB_TOPIC_OUT"),
            topic_dlq: self.resource("PUBSUB_TOPIC_DLQ"),
            subscription: self.resource("PUBSUB_SUBSCRIPTION"),
            dlq_subscription: self.resource("PUBSUB_DLQ_SUBSCRIPTION"),
            topic_docs: self.resource("PUBSUB_TOPIC_DOCS"),
            docs_subscription: self.resource("PUBSUB_DOCS_SUBSCRIPTION"),
            emulator,
            create_missing,
            max_delivery_attempts: self.small("PUBSUB_MAX_DELIVERY_ATTEMPTS", 5..=100),
            timeout: self.seconds("PUBSUB_TIMEOUT_SECONDS", 1..=600),
        })
    }

    fn store(&mut self, data_dir: Option<&Path>, needed: bool) -> StoreConfig {
        let embedded =
            StoreConfig::Embedded(data_dir.map_or_else(|| PathBuf::from(".atlas"), Path::to_owned));
        if self.text("SUPABASE_URL").is_none() {
            if data_dir.is_none() && needed {
                self.fault(
                    "SUPABASE_URL",
                    "is not set, so there is nowhere to store runs and book tokens".to_owned(),
                    "set it to https://YOUR-PROJECT.supabase.co, or set ATLAS_DATA_DIR to a folder to run embedded",
                );
            }
            return embedded;
        }
        let url = self.url("SUPABASE_URL", "https://YOUR-PROJECT.supabase.co");
        let key = self.secret("SUPABASE_SERVICE_ROLE_KEY");
        if key.is_none() {
            self.fault(
                "SUPABASE_SERVICE_ROLE_KEY",
                "is not set, but SUPABASE_URL is".to_owned(),
                "copy the service_role key from the project's API settings, or set SUPABASE_SERVICE_ROLE_KEY_FILE to a file that holds it",
            );
        }
        let timeout = self.seconds("STORE_TIMEOUT_SECONDS", 1..=600);
        match (url, key) {
            (Some(url), Some(service_role_key)) => {
                if !service_role_key.expose().bytes().all(|byte| byte.is_ascii_graphic()) {
                    self.fault(
                        "SUPABASE_SERVICE_ROLE_KEY",
                        "has characters that no key has".to_owned(),
                        "copy it again, on one line, without quotes",
                    );
                }
                StoreConfig::Supabase(SupabaseConfig { url, service_role_key, timeout })
            }
            _ => embedded,
        }
    }

    fn openai(&mut self) -> Option<OpenAiConfig> {
        let api_key = self.secret("OPENAI_API_KEY");
        let base_url_set = self.env.get("OPENAI_BASE_URL").is_some();
        let base_url = self.url("OPENAI_BASE_URL", "https://api.openai.com/v1");
        if let Some(key) = &api_key
            && !key.expose().bytes().all(|byte| byte.is_ascii_graphic())
        {
            self.fault(
                "OPENAI_API_KEY",
                "has characters that no key has".to_owned(),
                "copy it again, on one line, without quotes",
            );
        }
        let mut models = vec![self.text("OPENAI_MODEL").unwrap_or_default()];
        models.extend(self.list("OPENAI_FALLBACK_MODELS"));
        let embedding_model = self.text("OPENAI_EMBEDDING_MODEL").filter(|model| model != "none");
        let response_format = self.parse(
            "OPENAI_RESPONSE_FORMAT",
            "json_schema, json_object or text",
            ResponseFormatSetting::JsonSchema,
        );
        let timeout = self.seconds("OPENAI_TIMEOUT_SECONDS", 1..=3600);
        let max_completion_tokens = self.small("OPENAI_MAX_COMPLETION_TOKENS", 16..=1_000_000);
        let min_completion_tokens = self.small("OPENAI_MIN_COMPLETION_TOKENS", 1..=1_000_000);
        if min_completion_tokens > max_completion_tokens {
            self.fault(
                "OPENAI_MIN_COMPLETION_TOKENS",
                format!("{min_completion_tokens} is more than OPENAI_MAX_COMPLETION_TOKENS, {max_completion_tokens}"),
                "lower it, or raise OPENAI_MAX_COMPLETION_TOKENS",
            );
        }
        let stream = self.flag("OPENAI_STREAM");
        if api_key.is_none() && !base_url_set {
            return None;
        }
        Some(OpenAiConfig {
            api_key,
            base_url: base_url?,
            models,
            embedding_model,
            response_format,
            timeout,
            max_completion_tokens,
            min_completion_tokens,
            stream,
        })
    }

    fn rag(&mut self, process: Process) -> RagConfig {
        let url = match self.text("RAG_URL") {
            Some(_) => self.url("RAG_URL", "http://rag-gateway:8501"),
            None => None,
        };
        if url.is_none() && process == Process::Worker && self.env.get("RAG_URL").is_none() {
            self.fault(
                "RAG_URL",
                "is not set, so there is no gateway to ask".to_owned(),
                "set it to the gateway's address, such as http://rag-gateway:8501",
            );
        }
        let relevancy_threshold =
            self.text("RELEVANCY_THRESHOLD").and_then(|text| match text.parse::<f32>() {
                Ok(value) if (0.0..=1.0).contains(&value) => Some(value),
                _ => {
                    self.fault(
                        "RELEVANCY_THRESHOLD",
                        format!("{text:?} is not a number from 0 to 1"),
                        "set a cosine such as 0.35, or unset it",
                    );
                    None
                }
            });
        RagConfig {
            url,
            api_key: self.secret("RAG_API_KEY"),
            collection: self.collection("RAG_COLLECTION"),
            top_k: self.size("RAG_TOP_K", 1..=100),
            relevancy_threshold,
            fail_open: self.flag("RAG_FAIL_OPEN"),
            timeout: self.seconds("RAG_TIMEOUT_SECONDS", 1..=600),
        }
    }

    fn gateway(&mut self, data_dir: Option<&Path>, process: Process) -> GatewayConfig {
        let index = if self.text("QDRANT_URL").is_some() {
            let url = self.url("QDRANT_URL", "http://localhost:6334 (the gRPC port)");
            let api_key = self.secret("QDRANT_API_KEY");
            url.map(|url| IndexConfig::Qdrant { url, api_key })
        } else {
            if data_dir.is_none() && process == Process::Gateway {
                self.fault(
                    "QDRANT_URL",
                    "is not set, so there is nowhere to keep vectors".to_owned(),
                    "set it to Qdrant's gRPC address, such as http://qdrant:6334, or set ATLAS_DATA_DIR to a folder to use the embedded engine",
                );
            }
            None
        };
        let index = index.unwrap_or_else(|| {
            IndexConfig::Embedded(data_dir.map_or_else(|| PathBuf::from(".atlas"), Path::to_owned))
        });
        let chunk_tokens = self.size("CHUNK_TOKENS", 32..=4096);
        let chunk_overlap_tokens = self.size("CHUNK_OVERLAP_TOKENS", 0..=2048);
        if chunk_overlap_tokens * 2 > chunk_tokens {
            self.fault(
                "CHUNK_OVERLAP_TOKENS",
                format!("{chunk_overlap_tokens} is more than half of CHUNK_TOKENS, {chunk_tokens}"),
                "lower it, or raise CHUNK_TOKENS",
            );
        }
        GatewayConfig {
            listen: self.parse(
                "GATEWAY_LISTEN",
                "an address and a port, such as 0.0.0.0:8501",
                ([127, 0, 0, 1], 8501).into(),
            ),
            index,
            redis_url: self.secret("REDIS_URL"),
            cache_ttl: self.seconds("CACHE_TTL", 0..=604_800),
            cache_stale: self.seconds("CACHE_STALE_SECONDS", 0..=604_800),
            cache_max_entries: self.number("CACHE_MAX_ENTRIES", 1..=10_000_000),
            api_keys: self.api_keys(),
            rate_limit_requests: self.small("RATE_LIMIT_REQUESTS", 1..=10_000_000),
            rate_limit_window: self.seconds("RATE_LIMIT_WINDOW_SECONDS", 1..=86_400),
            max_body_bytes: self.size("MAX_BODY_BYTES", 1024..=1_073_741_824),
            max_top_k: self.size("MAX_TOP_K", 1..=1000),
            passage_tokens: self.size("PASSAGE_TOKENS", 0..=100_000),
            #[expect(clippy::cast_possible_truncation, reason = "scores are f32")]
            secondary_weight: self.decimal("SECONDARY_WEIGHT", 0.1..=1.0) as f32,
            query_embedding_timeout: Duration::from_millis(
                self.number("QUERY_EMBEDDING_TIMEOUT_MILLISECONDS", 1..=600_000),
            ),
            rerank: self.rerank(),
            timeout: self.seconds("GATEWAY_TIMEOUT_SECONDS", 1..=3600),
            max_concurrency: self.size("GATEWAY_MAX_CONCURRENCY", 1..=100_000),
            connections: ConnectionBounds {
                max: self.size("GATEWAY_MAX_CONNECTIONS", 16..=100_000),
                head: self.seconds("GATEWAY_HEADER_TIMEOUT_SECONDS", 1..=600),
                idle: self.seconds("GATEWAY_IDLE_TIMEOUT_SECONDS", 1..=86_400),
            },
            max_index_jobs: self.size("MAX_INDEX_JOBS", 1..=100_000),
            index_job_patience: self.seconds("INDEX_JOB_PATIENCE_SECONDS", 0..=604_800),
            index_allowed_roots: self.allowed_roots(),
            index_allowed_urls: self.allowed_urls(),
            index_min_free_bytes: self.number("INDEX_MIN_FREE_BYTES", 16_777_216..=u64::MAX),
            chunk_tokens,
            chunk_overlap_tokens,
            bm25: Bm25Config {
                k1: self.decimal("BM25_K1", 0.0..=10.0),
                b: self.decimal("BM25_B", 0.0..=1.0),
                heading_weight: self.small("BM25_HEADING_WEIGHT", 1..=10),
            },
        }
    }

    fn source_urls(&mut self) -> SourceUrls {
        let text = self.text("SOURCE_URL_TEMPLATE").unwrap_or_default();
        SourceUrls::parse(&text).unwrap_or_else(|problem| {
            self.fault(
                "SOURCE_URL_TEMPLATE",
                problem,
                "write https://git.example.com/team/app/blob/{commit}/{path}#L{start}-L{end}, or COLLECTION=TEMPLATE, separated by spaces",
            );
            SourceUrls::default()
        })
    }

    fn allowed_roots(&mut self) -> Vec<PathBuf> {
        let roots: Vec<PathBuf> = self.list("INDEX_ALLOWED_ROOTS").into_iter().map(PathBuf::from).collect();
        if let Some(root) = roots.iter().find(|root| !root.is_absolute()) {
            let problem = format!("{} is not an absolute path", root.display());
            self.fault(
                "INDEX_ALLOWED_ROOTS",
                problem,
                "write folders such as /srv/repos, separated by commas",
            );
        }
        roots
    }

    fn allowed_urls(&mut self) -> Vec<String> {
        let urls = self.list("INDEX_ALLOWED_URLS");
        // `git@host:team` is how git writes ssh; a host without a path would allow all of it.
        let fits = |url: &String| match url.split_once("://") {
            Some((scheme, rest)) => {
                ["https", "http", "ssh", "git"].contains(&scheme)
                    && !rest.is_empty()
                    && !rest.starts_with('/')
            }
            None => url.split_once(':').is_some_and(|(host, _)| host.contains('@')),
        };
        if let Some(url) = urls.iter().find(|url| !fits(url)) {
            let problem = format!("{url:?} is not the beginning of a git URL");
            self.fault(
                "INDEX_ALLOWED_URLS",
                problem,
                "write beginnings such as https://github.com/your-team/, separated by commas; for folders there is INDEX_ALLOWED_ROOTS",
            );
        }
        urls
    }

    fn rerank(&mut self) -> Option<RerankConfig> {
        let api = self.parse("RERANK_API", "one of jina, cohere and tei", RerankApi::Jina);
        let api_key = self.secret("RERANK_API_KEY");
        let model = self.text("RERANK_MODEL");
        let candidates = self.size("RERANK_CANDIDATES", 1..=1000);
        let timeout = Duration::from_millis(self.number("RERANK_TIMEOUT_MILLISECONDS", 1..=600_000));
        self.text("RERANK_URL")?;
        let url = self.url("RERANK_URL", "http://tei:8080/rerank")?;
        Some(RerankConfig { url, api, api_key, model, candidates, timeout })
    }

    fn api_keys(&mut self) -> Vec<ApiKey> {
        let hashed_only = self.env.get("API_KEYS").is_none();
        let Some(text) = self.secret("API_KEYS") else { return Vec::new() };
        let mut keys: Vec<ApiKey> = Vec::new();
        let entries = text.expose().lines().filter(|line| !line.trim_start().starts_with('#'));
        let entries = entries.flat_map(|line| line.split(',')).map(str::trim);
        let entries: Vec<&str> = entries.filter(|entry| !entry.is_empty()).collect();
        if entries.is_empty() {
            // Whoever set it did not mean to open the port to everybody.
            self.fault(
                "API_KEYS",
                "names no key".to_owned(),
                "`atlas key new NAME` makes one; without the variable, and its file, the gateway asks for none",
            );
        }
        for (position, entry) in entries.into_iter().enumerate() {
            match ApiKey::parse(entry, hashed_only) {
                Ok(key) => keys.push(key),
                // The entry itself is a secret: say which by position only.
                Err(problem) => self.fault(
                    "API_KEYS",
                    format!("entry {} {problem}", position + 1),
                    if hashed_only {
                        "`atlas key new NAME` makes a key and its line; `atlas key hash NAME` makes the line of a key you have"
                    } else {
                        "write worker:SOME-LONG-KEY,ci:ANOTHER-KEY:its-tenant"
                    },
                ),
            }
        }
        let mut tenants: BTreeMap<&str, &Option<String>> = BTreeMap::new();
        let torn = keys.iter().find(|key| {
            let first = tenants.entry(&key.name).or_insert(&key.tenant);
            **first != key.tenant
        });
        if let Some(name) = torn.map(|key| key.name.clone()) {
            self.fault(
                "API_KEYS",
                format!("caller {name} has keys of different tenants"),
                "give each tenant a caller name of its own",
            );
        }
        keys
    }

    fn fault(&mut self, variable: &'static str, problem: String, fix: &str) {
        self.errors.push(ConfigError { variable, problem, fix: fix.to_owned() });
    }

    /// The value, or the table's default.
    fn text(&self, name: &'static str) -> Option<String> {
        self.env.get(name).map(str::to_owned).or_else(|| settings::find(name).default.map(str::to_owned))
    }

    fn secret(&mut self, name: &'static str) -> Option<Secret> {
        debug_assert!(settings::find(name).secret, "{name} is read as a secret but not listed as one");
        if let Some(value) = self.env.get(name) {
            return Some(Secret::new(value));
        }
        let path = self.env.get(&format!("{name}_FILE"))?;
        match std::fs::read_to_string(path) {
            Ok(value) if value.trim().is_empty() => {
                self.fault(
                    name,
                    format!("{name}_FILE names {path}, which is empty"),
                    "put the secret into that file, or unset the variable",
                );
                None
            }
            Ok(value) => Some(Secret::new(value.trim())),
            Err(error) => {
                self.fault(
                    name,
                    format!("{name}_FILE names {path}, which cannot be read: {error}"),
                    "mount the file, or mend its permissions",
                );
                None
            }
        }
    }

    fn url(&mut self, name: &'static str, example: &str) -> Option<Url> {
        let text = self.text(name)?;
        match Url::parse(&text) {
            Ok(url) if matches!(url.scheme(), "http" | "https") && url.host().is_some() => Some(url),
            _ => {
                self.fault(
                    name,
                    format!("{text:?} is not an http(s) URL"),
                    &format!("set it to, say, {example}"),
                );
                None
            }
        }
    }

    fn number(&mut self, name: &'static str, range: RangeInclusive<u64>) -> u64 {
        let Some(text) = self.text(name) else { return *range.start() };
        match text.replace('_', "").parse::<u64>() {
            Ok(value) if range.contains(&value) => value,
            _ => {
                self.fault(
                    name,
                    format!("{text:?} is not a whole number from {} to {}", range.start(), range.end()),
                    &format!(
                        "set a number in that range, or unset it for the default, {}",
                        settings::find(name).default.unwrap_or("none")
                    ),
                );
                *range.start()
            }
        }
    }

    fn decimal(&mut self, name: &'static str, range: RangeInclusive<f64>) -> f64 {
        let Some(text) = self.text(name) else { return *range.start() };
        match text.parse::<f64>() {
            Ok(value) if range.contains(&value) => value,
            _ => {
                let problem = format!("{text:?} is not a number from {} to {}", range.start(), range.end());
                let default = settings::find(name).default.unwrap_or("none");
                let fix = format!("set a number in that range, or unset it for the default, {default}");
                self.fault(name, problem, &fix);
                *range.start()
            }
        }
    }

    fn size(&mut self, name: &'static str, range: RangeInclusive<u64>) -> usize {
        usize::try_from(self.number(name, range)).unwrap_or(usize::MAX)
    }

    fn small(&mut self, name: &'static str, range: RangeInclusive<u64>) -> u32 {
        u32::try_from(self.number(name, range)).unwrap_or(u32::MAX)
    }

    /// Days to keep something: 0 for ever, else at least `least`.
    fn days(&mut self, name: &'static str, least: u64) -> Option<Duration> {
        let days = self.number(name, 0..=36_500);
        if days > 0 && days < least {
            let problem = format!("{days} is less than {least}");
            self.fault(name, problem, "keep it longer, or for ever with 0");
        }
        (days > 0).then(|| Duration::from_hours(24 * days))
    }

    fn seconds(&mut self, name: &'static str, range: RangeInclusive<u64>) -> Duration {
        Duration::from_secs(self.number(name, range))
    }

    fn flag(&mut self, name: &'static str) -> bool {
        match self.text(name).as_deref() {
            Some("true" | "1" | "yes") => true,
            Some("false" | "0" | "no") | None => false,
            Some(other) => {
                let problem = format!("{other:?} is neither true nor false");
                self.fault(name, problem, "set true or false");
                false
            }
        }
    }

    fn list(&self, name: &'static str) -> Vec<String> {
        self.text(name)
            .map(|text| {
                text.split(',').map(str::trim).filter(|item| !item.is_empty()).map(str::to_owned).collect()
            })
            .unwrap_or_default()
    }

    fn resource(&mut self, name: &'static str) -> String {
        let text = self.text(name).unwrap_or_default();
        if text.len() < 3 || !crate::message::is_name(&text) {
            self.fault(
                name,
                format!("{text:?} is not a name"),
                "use 3 to 128 letters, digits, '.', '_' or '-'",
            );
        }
        text
    }

    /// By the rule of the gateway's API.
    fn collection(&mut self, name: &'static str) -> String {
        let text = self.text(name).unwrap_or_default();
        if !crate::message::is_name(&text) || text.starts_with('.') {
            self.fault(
                name,
                format!("{text:?} is not a name"),
                "use 1 to 128 letters, digits, '.', '_' or '-', and no dot at the start",
            );
        }
        text
    }

    fn parse<T: FromStr>(&mut self, name: &'static str, expected: &str, stand_in: T) -> T {
        let Some(text) = self.text(name) else { return stand_in };
        text.parse().unwrap_or_else(|_| {
            self.fault(name, format!("{text:?} is not {expected}"), &format!("set {expected}"));
            stand_in
        })
    }
}

#[cfg(test)]
#[expect(clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    fn errors(env: &Env, process: Process) -> Vec<&'static str> {
        match Config::load(env, process) {
            Ok(_) => Vec::new(),
            Err(errors) => errors.0.iter().map(|error| error.variable).collect(),
        }
    }

    #[test]
    fn a_folder_is_all_the_embedded_stack_needs() {
        let config = Config::load(&Env::from([("ATLAS_DATA_DIR", "/tmp/x")]), Process::Cli).expect("valid");
        assert!(matches!(config.queue, QueueConfig::Embedded(_)));
        assert!(matches!(config.store, StoreConfig::Embedded(_)));
        assert!(config.openai.is_none());
        assert_eq!(config.limits.daily, Tokens(250_000));
        assert_eq!(config.rag.top_k, 15);
    }

    #[test]
    fn every_fault_is_reported_at_once() {
        let env = Env::from([
            ("PUBSUB_PROJECT_ID", "demo"),
            ("SUPABASE_URL", "not a url"),
            ("RAG_TOP_K", "zero"),
            ("RAG_URL", "ftp://x"),
            ("OPENAI_RESPONSE_FORMAT", "xml"),
        ]);
        let found = errors(&env, Process::Worker);
        for variable in
            ["SUPABASE_URL", "SUPABASE_SERVICE_ROLE_KEY", "RAG_TOP_K", "RAG_URL", "OPENAI_RESPONSE_FORMAT"]
        {
            assert!(found.contains(&variable), "{variable} is missing from {found:?}");
        }
    }

    #[test]
    fn a_bare_worker_is_told_what_to_set() {
        let found = errors(&Env::default(), Process::Worker);
        assert_eq!(found, ["PUBSUB_PROJECT_ID", "SUPABASE_URL", "RAG_URL"]);
    }

    #[test]
    fn callers_are_read_from_the_environment_and_hashed_from_a_file() {
        let load = |name: &str, value: &str| {
            let env = Env::from([("ATLAS_DATA_DIR", "/tmp/x"), (name, value)]);
            Config::load(&env, Process::Gateway).map(|config| config.gateway.api_keys)
        };
        let keys = load("API_KEYS", "worker:a-long-key, ci:another-key:acme\nci:next-key-of-ci:acme")
            .expect("valid");
        let callers: Vec<_> = keys.iter().map(|key| (key.name.as_str(), key.tenant.as_deref())).collect();
        assert_eq!(callers, [("worker", None), ("ci", Some("acme")), ("ci", Some("acme"))]);
        for none in [" , ", "# the key is to come\n"] {
            let open = load("API_KEYS", none).expect_err("nobody's keys");
            assert!(open.to_string().contains("names no key"), "{open}");
        }
        let torn = load("API_KEYS", "ci:a-long-key:acme,ci:another-key").expect_err("two tenants, one name");
        assert!(torn.to_string().contains("different tenants"), "{torn}");
        let file = tempfile::NamedTempFile::new().expect("temp file");
        std::fs::write(file.path(), "worker:the-key-itself\n").expect("written");
        let plain = load("API_KEYS_FILE", &file.path().display().to_string()).expect_err("not hashed");
        let text = plain.to_string();
        assert!(text.contains("atlas key") && !text.contains("the-key-itself"), "{text}");
    }

    #[test]
    fn a_secret_can_come_from_a_file_and_never_shows() {
        let file = tempfile::NamedTempFile::new().expect("temp file");
        std::fs::write(file.path(), "sk-from-file\n").expect("written");
        let env = Env::default()
            .with("ATLAS_DATA_DIR", "/tmp/x")
            .with("OPENAI_API_KEY_FILE", file.path().display().to_string());
        let config = Config::load(&env, Process::Cli).expect("valid");
        let key = config.openai.as_ref().and_then(|openai| openai.api_key.clone()).expect("a key");
        assert_eq!(key.expose(), "sk-from-file");
        assert!(!format!("{config:?}").contains("sk-from-file"));
    }

    #[test]
    fn the_emulators_host_gets_a_scheme() {
        let env = Env::from([
            ("ATLAS_DATA_DIR", "/tmp/x"),
            ("PUBSUB_PROJECT_ID", "p"),
            ("PUBSUB_EMULATOR_HOST", "localhost:8085"),
        ]);
        let QueueConfig::PubSub(pubsub) = Config::load(&env, Process::Cli).expect("valid").queue else {
            panic!("expected Pub/Sub");
        };
        assert_eq!(pubsub.emulator.expect("emulator").as_str(), "http://localhost:8085/");
        assert!(pubsub.create_missing);
    }

    /// Every adapter that a variable can choose is chosen, so that all of its settings are read.
    fn everything() -> Env {
        Env::from([
            ("PUBSUB_PROJECT_ID", "demo"),
            ("PUBSUB_EMULATOR_HOST", "localhost:8085"),
            ("SUPABASE_URL", "http://localhost:3000"),
            ("SUPABASE_SERVICE_ROLE_KEY", "a.b.c"),
            ("OPENAI_API_KEY", "sk-x"),
            ("RAG_URL", "http://localhost:8501"),
            ("QDRANT_URL", "http://localhost:6334"),
            ("RERANK_URL", "http://localhost:8080/rerank"),
        ])
    }

    #[test]
    fn every_setting_is_read() {
        let outcome = |env: &Env| format!("{:?}", Config::load(env, Process::Worker));
        let before = outcome(&everything());
        assert!(before.starts_with("Ok"), "{before}");
        for setting in SETTINGS {
            // A blank value unsets; one of the others is valid or wrong for any kind of setting.
            let matters = [
                "",
                "7",
                "false",
                "true",
                "another-name",
                "http://127.0.0.1:1",
                "name:long-enough-key",
                "/some/folder",
                "(?)",
            ]
            .into_iter()
            .any(|value| outcome(&everything().with(setting.name, value)) != before);
            assert_eq!(matters, !settings::CLI_ONLY.contains(&setting.name), "{}", setting.name);
        }
    }

    #[test]
    fn every_default_is_valid_and_the_one_that_is_documented() {
        let unset = format!("{:?}", Config::load(&everything(), Process::Worker));
        for setting in SETTINGS {
            if let Some(default) = setting.default {
                let set = everything().with_default(setting.name, default);
                assert_eq!(format!("{:?}", Config::load(&set, Process::Worker)), unset, "{}", setting.name);
            }
        }
    }
}
