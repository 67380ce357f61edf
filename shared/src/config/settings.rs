//! The table of settings: the one source of names, defaults and explanations.

/// A section of `docs/CONFIGURATION.md`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Group {
    /// Where the embedded stack keeps its files.
    Embedded,
    /// Google Pub/Sub.
    Queue,
    /// Supabase.
    Store,
    /// The OpenAI-compatible API.
    Model,
    /// Token limits.
    Budget,
    /// The worker.
    Worker,
    /// How long old rows are kept.
    Retention,
    /// How the worker asks the gateway.
    Retrieval,
    /// The gateway.
    Gateway,
    /// Retries and circuit breakers.
    Resilience,
    /// Logs.
    Logs,
}

impl Group {
    /// The section's heading.
    pub fn title(self) -> &'static str {
        match self {
            Self::Embedded => "Embedded stack",
            Self::Queue => "Queue (Google Pub/Sub)",
            Self::Store => "Store (Supabase)",
            Self::Model => "Model (OpenAI-compatible API)",
            Self::Budget => "Budget",
            Self::Worker => "Worker",
            Self::Retention => "Retention (days in the store; 0: for ever)",
            Self::Retrieval => "Retrieval (worker to gateway)",
            Self::Gateway => "Gateway",
            Self::Resilience => "Retries and circuit breakers",
            Self::Logs => "Logs",
        }
    }
}

/// One environment variable.
#[derive(Clone, Copy, Debug)]
pub struct Setting {
    /// Its name.
    pub name: &'static str,
    /// Its default as text; `None`: unset.
    pub default: Option<&'static str>,
    /// Where it belongs.
    pub group: Group,
    /// True for secrets: `NAME_FILE` works too, and no log shows the value.
    pub secret: bool,
    /// What it does.
    pub doc: &'static str,
}

const fn setting(
    name: &'static str,
    default: Option<&'static str>,
    group: Group,
    doc: &'static str,
) -> Setting {
    Setting { name, default, group, secret: false, doc }
}

const fn secret(name: &'static str, group: Group, doc: &'static str) -> Setting {
    Setting { name, default: None, group, secret: true, doc }
}

/// Every setting, in the order of the documentation.
pub static SETTINGS: &[Setting] = &[
    setting(
        "ATLAS_DATA_DIR",
        None,
        Group::Embedded,
        "Folder of the embedded store, queue and index. With it, an adapter whose own variable is unset is embedded. The `atlas` command defaults to `.atlas`.",
    ),
    setting(
        "PUBSUB_PROJECT_ID",
        None,
        Group::Queue,
        "Google Cloud project of topics and subscriptions. Set: Pub/Sub; unset: the embedded queue.",
    ),
    setting("PUBSUB_TOPIC_IN", Some("architect_in"), Group::Queue, "Topic that requests are published to."),
    setting("PUBSUB_TOPIC_OUT", Some("architect_out"), Group::Queue, "Topic of answers."),
    setting("PUBSUB_TOPIC_DLQ", Some("architect_dlq"), Group::Queue, "Dead-letter topic."),
    setting(
        "PUBSUB_SUBSCRIPTION",
        Some("architect_in-atlas"),
        Group::Queue,
        "Subscription that the fleet pulls from.",
    ),
    setting(
        "PUBSUB_DLQ_SUBSCRIPTION",
        Some("architect_dlq-atlas"),
        Group::Queue,
        "Subscription on the dead-letter topic, read by the fleet too.",
    ),
    setting(
        "PUBSUB_TOPIC_DOCS",
        Some("docs_added"),
        Group::Queue,
        "Topic of messages `{\"repo\": …, \"path\": …}` that start an index job (with `INDEX_ON_DOCS_ADDED`).",
    ),
    setting(
        "PUBSUB_DOCS_SUBSCRIPTION",
        Some("docs_added-atlas"),
        Group::Queue,
        "Subscription on that topic.",
    ),
    setting(
        "PUBSUB_EMULATOR_HOST",
        None,
        Group::Queue,
        "`host:port` of a Pub/Sub emulator. No credentials are used then.",
    ),
    setting(
        "PUBSUB_CREATE",
        None,
        Group::Queue,
        "Create missing topics and subscriptions. Default: true with an emulator, false otherwise (checked and reported).",
    ),
    setting(
        "PUBSUB_MAX_DELIVERY_ATTEMPTS",
        Some("10"),
        Group::Queue,
        "Dead-letter policy of a subscription that Atlas creates, 5 to 100.",
    ),
    setting("PUBSUB_TIMEOUT_SECONDS", Some("30"), Group::Queue, "Bound of one publish or admin call."),
    setting(
        "SUPABASE_URL",
        None,
        Group::Store,
        "Address of the Supabase project, without `/rest/v1`. Set: Supabase; unset: the embedded SQLite file.",
    ),
    secret("SUPABASE_SERVICE_ROLE_KEY", Group::Store, "Service-role key (a JWT)."),
    secret(
        "SUPABASE_DB_URL",
        Group::Store,
        "Postgres connection string, for `atlas migrate` only. No worker and no gateway reads it.",
    ),
    setting("STORE_TIMEOUT_SECONDS", Some("10"), Group::Store, "Bound of one store call."),
    secret(
        "OPENAI_API_KEY",
        Group::Model,
        "API key. Without it and without `OPENAI_BASE_URL`, the offline drafter writes (and says so) and search is lexical.",
    ),
    setting(
        "OPENAI_BASE_URL",
        Some("https://api.openai.com/v1"),
        Group::Model,
        "Any OpenAI-compatible server.",
    ),
    setting("OPENAI_MODEL", Some("gpt-4.1"), Group::Model, "Chat model."),
    setting(
        "OPENAI_FALLBACK_MODELS",
        None,
        Group::Model,
        "Comma-separated models to try when the first one fails.",
    ),
    setting(
        "OPENAI_EMBEDDING_MODEL",
        Some("text-embedding-3-small"),
        Group::Model,
        "Embedding model; `none`: lexical search only.",
    ),
    setting(
        "OPENAI_RESPONSE_FORMAT",
        Some("json_schema"),
        Group::Model,
        "`json_schema`, `json_object` or `text`, for servers that cannot do strict schemas.",
    ),
    setting("OPENAI_TIMEOUT_SECONDS", Some("120"), Group::Model, "Bound of one model call."),
    setting(
        "OPENAI_MAX_COMPLETION_TOKENS",
        Some("4000"),
        Group::Model,
        "Cap of one answer, reserved in full before the call.",
    ),
    setting(
        "OPENAI_MIN_COMPLETION_TOKENS",
        Some("800"),
        Group::Model,
        "An answer shorter than this is not worth asking for: the run fails with a clear error instead.",
    ),
    setting(
        "OPENAI_STREAM",
        Some("true"),
        Group::Model,
        "Stream answers for requests that somebody watches (`metadata.stream`). Others are never streamed. `false` for servers that stream badly or do not say `usage` in a stream.",
    ),
    setting(
        "TOKEN_BUDGET_PER_RUN",
        Some("24000"),
        Group::Budget,
        "Tokens one run may bill, all its calls together: a ceiling, with room for a search and a repair; most runs need half.",
    ),
    setting(
        "DAILY_TOKEN_BUDGET",
        Some("250000"),
        Group::Budget,
        "Tokens the whole fleet may bill in a UTC day, embeddings included. `set_budget` wins over it.",
    ),
    setting("WORKER_LISTEN", Some("127.0.0.1:8000"), Group::Worker, "Address of probes and metrics."),
    setting("MAX_IN_FLIGHT", Some("8"), Group::Worker, "Runs at once in one worker."),
    setting("MAX_MESSAGE_BYTES", Some("1048576"), Group::Worker, "Largest message that is accepted."),
    setting(
        "LEASE_SECONDS",
        Some("60"),
        Group::Worker,
        "How long a dead worker's run waits before another takes it. Renewed while a run lives.",
    ),
    setting("RUN_TIMEOUT_SECONDS", Some("600"), Group::Worker, "Bound of one attempt of a run."),
    setting("MAX_RUN_ATTEMPTS", Some("10"), Group::Worker, "Attempts of a run before it fails for good."),
    setting(
        "SWEEP_INTERVAL_SECONDS",
        Some("15"),
        Group::Worker,
        "How often expired leases, the outbox and deferred runs are looked at; jittered.",
    ),
    setting(
        "CANCEL_INTERVAL_SECONDS",
        Some("2"),
        Group::Worker,
        "How often a worker with runs at work asks whether one of them was cancelled.",
    ),
    setting(
        "OUTBOX_CONCURRENCY",
        Some("8"),
        Group::Worker,
        "Answers that a sweep sends at once; those of one task go one after the other.",
    ),
    setting(
        "DRAIN_TIMEOUT_SECONDS",
        Some("30"),
        Group::Worker,
        "How long running work may go on after SIGTERM; the rest is given back.",
    ),
    setting(
        "INDEX_ON_DOCS_ADDED",
        Some("false"),
        Group::Worker,
        "Read `docs_added` messages and have the gateway index what they name. The gateway says what it may read: `INDEX_ALLOWED_ROOTS`, `INDEX_ALLOWED_URLS`.",
    ),
    setting(
        "AGENT_MAX_SEARCHES",
        Some("3"),
        Group::Worker,
        "Rounds of `search_knowledge` the model may ask for in a run.",
    ),
    setting(
        "RETENTION_OUTBOX_DAYS",
        Some("7"),
        Group::Retention,
        "Answers in the outbox, counted from when they were sent. The results in `architect_out` stay.",
    ),
    setting(
        "RETENTION_STEPS_DAYS",
        Some("7"),
        Group::Retention,
        "Checkpoints (`run_steps`) of runs that are done or failed, counted from the run's end.",
    ),
    setting(
        "RETENTION_REQUESTS_DAYS",
        Some("90"),
        Group::Retention,
        "Requests (`architect_in`) of runs that are done or failed, counted from the run's end. Without its request a run cannot be retried.",
    ),
    setting(
        "RETENTION_LEDGER_DAYS",
        Some("90"),
        Group::Retention,
        "Rows of `token_ledger`, one a model call; at least 2. The day accounts in `token_days` stay.",
    ),
    setting(
        "RETENTION_DEAD_LETTERS_DAYS",
        Some("90"),
        Group::Retention,
        "Dead letters that were replayed. Others stay until somebody replays or purges them.",
    ),
    setting(
        "STREAM_CHUNKS",
        Some("400"),
        Group::Worker,
        "Messages on `architect_out` with text while it is written, at most, for one attempt of a run whose request asks for them (`metadata.stream: true`). 0: never, for nobody.",
    ),
    setting(
        "STREAM_INTERVAL_MILLISECONDS",
        Some("250"),
        Group::Worker,
        "The shortest time between two such messages of one run.",
    ),
    setting(
        "SOURCE_URL_TEMPLATE",
        None,
        Group::Worker,
        "Where cited files can be read: `https://…/blob/{commit}/{path}#L{start}-L{end}`; also `{repo}` and `{collection}`. Several, separated by spaces, as `COLLECTION=TEMPLATE`; one without a name is for all others. Unset: *Sources* has no links.",
    ),
    setting("RAG_URL", None, Group::Retrieval, "Address of the gateway."),
    secret("RAG_API_KEY", Group::Retrieval, "The worker's key for the gateway."),
    setting(
        "RAG_COLLECTION",
        Some("atlas"),
        Group::Retrieval,
        "Collection that is indexed and searched by default, by worker, gateway and CLI.",
    ),
    setting("RAG_TOP_K", Some("15"), Group::Retrieval, "Passages a query asks for."),
    setting(
        "RELEVANCY_THRESHOLD",
        None,
        Group::Retrieval,
        "Drop passages whose cosine is below this (0 to 1). Unset: by embedding model.",
    ),
    setting(
        "RAG_FAIL_OPEN",
        Some("true"),
        Group::Retrieval,
        "When the gateway is down: write without passages and say so (true), or wait for it (false).",
    ),
    setting("RAG_TIMEOUT_SECONDS", Some("15"), Group::Retrieval, "Bound of one query."),
    setting("GATEWAY_LISTEN", Some("127.0.0.1:8501"), Group::Gateway, "Address of the gateway's API."),
    setting(
        "QDRANT_URL",
        None,
        Group::Gateway,
        "gRPC address of Qdrant (port 6334). Unset: the embedded engine.",
    ),
    secret("QDRANT_API_KEY", Group::Gateway, "Qdrant's API key."),
    secret(
        "REDIS_URL",
        Group::Gateway,
        "Shared cache; unset: in-process only. A secret because it may carry a password.",
    ),
    setting(
        "CACHE_TTL",
        Some("300"),
        Group::Gateway,
        "Seconds that an answer may be cached; 0: no cache. A change of the index is seen at once all the same.",
    ),
    setting(
        "CACHE_STALE_SECONDS",
        Some("3600"),
        Group::Gateway,
        "While the index is down, answers up to this old are given, marked `stale`; 0: never.",
    ),
    setting("CACHE_MAX_ENTRIES", Some("10000"), Group::Gateway, "Cached answers in one process."),
    secret(
        "API_KEYS",
        Group::Gateway,
        "Callers of the gateway: `name:key,name:key:tenant`. A key with a tenant reads and writes only what is that tenant's (and reads what is nobody's). In a file (`API_KEYS_FILE`) keys are hashed, one a line: `name:sha256:HEX` or `name:sha256:HEX:tenant`; `atlas key new` makes them. Unset: open to whoever reaches the port.",
    ),
    setting("RATE_LIMIT_REQUESTS", Some("600"), Group::Gateway, "Requests a caller may make in a window."),
    setting("RATE_LIMIT_WINDOW_SECONDS", Some("60"), Group::Gateway, "Length of the window."),
    setting("MAX_BODY_BYTES", Some("16777216"), Group::Gateway, "Largest request body."),
    setting("MAX_TOP_K", Some("100"), Group::Gateway, "Largest `top_k`."),
    setting(
        "PASSAGE_TOKENS",
        Some("512"),
        Group::Gateway,
        "Passages are joined with their neighbours in the file, up to this many tokens each (`passage_tokens` of a query); 0: never.",
    ),
    setting(
        "SECONDARY_WEIGHT",
        Some("0.7"),
        Group::Gateway,
        "What counts of the lexical score of tests, benchmarks, changelogs, licences and vendored code (of examples: half way to 1), from 0.1 to 1. A question that asks for them gets them in full; 1: nothing is weighed so.",
    ),
    setting(
        "QUERY_EMBEDDING_TIMEOUT_MILLISECONDS",
        Some("5000"),
        Group::Gateway,
        "Bound of embedding one query; after it the answer is `lexical`.",
    ),
    setting(
        "RERANK_URL",
        None,
        Group::Gateway,
        "A reranker's endpoint, such as `http://tei:8080/rerank` or `https://api.jina.ai/v1/rerank`. Unset: none.",
    ),
    setting(
        "RERANK_API",
        Some("jina"),
        Group::Gateway,
        "What it speaks: `jina` (also vLLM, Infinity, llama.cpp), `cohere`, or `tei` (Hugging Face Text Embeddings Inference).",
    ),
    secret("RERANK_API_KEY", Group::Gateway, "The reranker's key."),
    setting(
        "RERANK_MODEL",
        None,
        Group::Gateway,
        "The reranker's model, such as `jina-reranker-v2-base-multilingual`; `tei` serves one and needs no name.",
    ),
    setting(
        "RERANK_CANDIDATES",
        Some("50"),
        Group::Gateway,
        "Candidates that are reranked; never fewer than `top_k`.",
    ),
    setting(
        "RERANK_TIMEOUT_MILLISECONDS",
        Some("3000"),
        Group::Gateway,
        "Bound of reranking one query; after it the answer is `unreranked`.",
    ),
    setting("GATEWAY_TIMEOUT_SECONDS", Some("60"), Group::Gateway, "Bound of one request."),
    setting(
        "GATEWAY_MAX_CONCURRENCY",
        Some("256"),
        Group::Gateway,
        "Requests at once; more get 503 and `Retry-After`.",
    ),
    setting(
        "GATEWAY_MAX_CONNECTIONS",
        Some("512"),
        Group::Gateway,
        "Connections at once, used or not; more wait. Each takes a file descriptor (`ulimit -n`).",
    ),
    setting(
        "GATEWAY_HEADER_TIMEOUT_SECONDS",
        Some("30"),
        Group::Gateway,
        "How long the head of a request may take to arrive; after it the connection is closed.",
    ),
    setting(
        "GATEWAY_IDLE_TIMEOUT_SECONDS",
        Some("650"),
        Group::Gateway,
        "How long a connection is kept without a request; where all are taken, no longer than a head. Longer than a load balancer keeps it (Google: 600, AWS: 60), so that none sends a request into a closed one.",
    ),
    setting("MAX_INDEX_JOBS", Some("64"), Group::Gateway, "Index jobs waiting or running; more get 429."),
    setting(
        "INDEX_JOB_PATIENCE_SECONDS",
        Some("3600"),
        Group::Gateway,
        "How long an index job or a rebuild goes on trying where Qdrant or the embeddings API is away and nothing gets done; then it fails. 0: at the first failure that calls do not survive by themselves.",
    ),
    setting(
        "INDEX_ALLOWED_ROOTS",
        None,
        Group::Gateway,
        "Folders, separated by commas, below which the gateway may read by itself (`POST /v1/index`, `docs_added`). Unset: none.",
    ),
    setting(
        "INDEX_ALLOWED_URLS",
        None,
        Group::Gateway,
        "Beginnings of git URLs, separated by commas, that the gateway may clone by itself, such as `https://github.com/your-team/`. Unset: none.",
    ),
    setting(
        "INDEX_MIN_FREE_BYTES",
        Some("67108864"),
        Group::Gateway,
        "Of the disk that the embedded index is on, so much stays free: writes that would take it are refused with 507 `disk_full`, because the engine dies where a disk is full. A Qdrant server looks by itself.",
    ),
    setting("CHUNK_TOKENS", Some("320"), Group::Gateway, "Upper bound of a chunk, in tokens of cl100k_base."),
    setting(
        "CHUNK_OVERLAP_TOKENS",
        Some("32"),
        Group::Gateway,
        "Upper bound of what neighbouring chunks share.",
    ),
    setting(
        "BM25_K1",
        Some("2.5"),
        Group::Gateway,
        "How slowly repetitions of a word stop counting, from 0 to 10. A collection keeps what it was made with.",
    ),
    setting(
        "BM25_B",
        Some("0.6"),
        Group::Gateway,
        "How much chunks longer than the average are held back, from 0 to 1. A collection keeps what it was made with.",
    ),
    setting(
        "BM25_HEADING_WEIGHT",
        Some("3"),
        Group::Gateway,
        "How often a word counts that stands in the headings above a chunk. A collection keeps what it was made with.",
    ),
    setting(
        "RETRY_MAX_ATTEMPTS",
        Some("4"),
        Group::Resilience,
        "Attempts of one upstream call, the first included.",
    ),
    setting(
        "RETRY_BASE_MILLISECONDS",
        Some("250"),
        Group::Resilience,
        "First delay; doubles each time, with jitter.",
    ),
    setting(
        "RETRY_MAX_DELAY_SECONDS",
        Some("20"),
        Group::Resilience,
        "Cap of a delay, and of a `Retry-After` that is honoured in place.",
    ),
    setting(
        "CIRCUIT_FAILURES",
        Some("5"),
        Group::Resilience,
        "Failures in a row that open a dependency's circuit.",
    ),
    setting(
        "CIRCUIT_OPEN_SECONDS",
        Some("15"),
        Group::Resilience,
        "How long an open circuit waits before it lets one probe through.",
    ),
    setting("LOG_LEVEL", Some("info"), Group::Logs, "A `tracing` filter, such as `info,atlas_worker=debug`."),
    setting("LOG_FORMAT", Some("json"), Group::Logs, "`json` or `text`."),
];

/// Settings that a command of the CLI reads by itself; no process takes them from [`super::Config`].
#[cfg(test)]
pub(super) const CLI_ONLY: &[&str] = &["SUPABASE_DB_URL"];

/// A setting by name. Names are literals in `config.rs`; a test there reads every one of them.
pub(super) fn find(name: &str) -> &'static Setting {
    static UNKNOWN: Setting = setting("", None, Group::Embedded, "");
    let found = SETTINGS.iter().find(|setting| setting.name == name);
    debug_assert!(found.is_some(), "{name} is not in SETTINGS");
    found.unwrap_or(&UNKNOWN)
}
