//! An OpenAI-compatible server for tests and benchmarks: deterministic answers, faults on demand,
//! and a **meter** that counts every token it "sold". Never a default of the product.
//!
//! - `POST /v1/chat/completions`: text, `json_object`, strict `json_schema` (the answer is an instance
//!   of whatever schema was sent), tools, streaming with `include_usage`.
//! - `POST /v1/embeddings`: deterministic vectors; similar texts are near each other.
//! - `POST /v1/rerank`, `/v2/rerank` (Jina, Cohere) and `/rerank` (Text Embeddings Inference):
//!   deterministic scores, with the scripted faults. Nothing of it is on the meter.
//! - `GET /v1/models`, `GET /v1/models/{model}`.
//! - `GET /sim/meter`, `DELETE /sim/meter`: what was billed, by model, task and kind.
//! - `GET /sim/calls`: every billed call, in order ([`BilledCall`]).
//! - `GET /sim/strikes`: every fault that struck, in order ([`Strike`]).
//! - `PUT /sim/faults`: other rates of faults from now on, as `--fault` takes them.
//! - `GET`, `PUT`, `DELETE /sim/script`: answers and faults for the next calls ([`Step`]).
//! - `GET /health`.
//!
//! # What is billed
//!
//! A call is billed when generation starts, as a provider does, whether or not the client is still
//! there when it ends. So faults *before* generation cost nothing (`401`, `429`, `5xx`,
//! `insufficient_quota`, `context_length`, `content_filter`, an unknown model), and faults after it
//! cost the full call (`504`, `hang`, `cut`, `drop`, `malformed`, `no_choices`, `no_usage`, `wrong_schema`, …).
//! [`Fault`] says it for each.
//!
//! # Determinism
//!
//! Answers depend on the request alone; a repair also on the answer that a fault spoilt. Whether a fault strikes depends on the seed, the client's
//! request id and how often that id was seen, so it does not depend on the order in which concurrent
//! requests arrive.

mod author;
mod chat;
mod embed;
mod fault;
mod generate;
mod meter;
mod prompt;
mod rerank;
mod script;
mod server;
mod tokens;

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

pub use fault::{Fault, FaultRates};
pub use meter::{Bill, BilledCall, Meter, Strike};
pub use script::{Script, Step};

use tokio::{net::TcpListener, task::JoinHandle};

/// How the simulator behaves.
#[derive(Clone, Debug)]
pub struct SimOptions {
    /// Port on 127.0.0.1; 0 picks a free one.
    pub port: u16,
    /// Seed of the faults.
    pub seed: u64,
    /// How long every call takes at least.
    pub latency: Duration,
    /// How much longer, for each completion token.
    pub latency_per_token: Duration,
    /// Faults by rate.
    pub faults: FaultRates,
    /// Answers and faults for the first calls; see `PUT /sim/script` for later ones.
    pub script: Vec<Step>,
    /// The only key that is accepted; `None`: any, or none.
    pub require_key: Option<String>,
    /// The models that are served, by exact name. Empty: every name of a known family (`gpt-`, `o1`,
    /// `o3`, `o4`, `text-embedding-`, `sim-`).
    pub models: Vec<String>,
    /// How often a call that offers tools is answered with a tool call, 0 to 1.
    pub tool_rate: f64,
    /// Prompt and completion cap together may not be larger.
    pub context_tokens: u64,
    /// Requests in a minute and model, above which 429 is answered; `None`: no limit.
    pub requests_per_minute: Option<u64>,
    /// Tokens in a minute and model, above which 429 is answered; `None`: no limit.
    pub tokens_per_minute: Option<u64>,
    /// Make the answer to each request body only once: a benchmark's simulator must cost little. Faults
    /// and scripts then strike only the first call of each body.
    pub remember_answers: bool,
    /// How long that minute is; shorter in tests.
    pub rate_window: Duration,
}

impl Default for SimOptions {
    fn default() -> Self {
        Self {
            port: 0,
            seed: 1,
            latency: Duration::ZERO,
            latency_per_token: Duration::ZERO,
            faults: FaultRates::default(),
            script: Vec::new(),
            require_key: None,
            models: Vec::new(),
            tool_rate: 0.0,
            context_tokens: 128_000,
            requests_per_minute: None,
            tokens_per_minute: None,
            remember_answers: false,
            rate_window: Duration::from_mins(1),
        }
    }
}

/// Why the simulator could not do what it was told.
#[derive(Debug, thiserror::Error)]
pub enum SimError {
    /// The port could not be opened.
    #[error("cannot listen on 127.0.0.1:{port}: {source}. Choose another port, or 0 for a free one")]
    Listen {
        /// Which one.
        port: u16,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A script that is not a list of steps.
    #[error("not a script: {0}. Send a JSON array of steps, such as [{{\"fault\": \"429\"}}]")]
    Script(#[from] serde_json::Error),
}

/// The simulator.
#[derive(Debug)]
pub struct Sim;

impl Sim {
    /// Starts serving on 127.0.0.1 and returns once the port is open.
    pub async fn start(options: SimOptions) -> Result<RunningSim, SimError> {
        let port = options.port;
        let listen = |source| SimError::Listen { port, source };
        let listener = TcpListener::bind(("127.0.0.1", port)).await.map_err(listen)?;
        let addr = listener.local_addr().map_err(listen)?;
        let shared = Arc::new(Shared {
            books: Mutex::new(Books {
                script: Script::new(options.script.clone()),
                faults: options.faults.clone(),
                ..Books::default()
            }),
            options,
        });
        let app = server::router(Arc::clone(&shared));
        let server = tokio::spawn(async move {
            // Serving ends only with the task; accept errors are retried by axum.
            let _ = axum::serve(listener, app).await;
        });
        Ok(RunningSim { addr, shared, server })
    }
}

/// A simulator that serves until it is dropped.
#[derive(Debug)]
pub struct RunningSim {
    /// Where it listens.
    pub addr: SocketAddr,
    shared: Arc<Shared>,
    server: JoinHandle<()>,
}

impl RunningSim {
    /// For `OPENAI_BASE_URL`.
    pub fn base_url(&self) -> String {
        format!("http://{}/v1", self.addr)
    }

    /// What was billed so far.
    pub fn meter(&self) -> Meter {
        self.shared.books().meter.clone()
    }

    /// Forgets what was billed.
    pub fn reset_meter(&self) {
        self.shared.books().forget();
    }

    /// Every call that was billed so far, in order.
    pub fn billed_calls(&self) -> Vec<BilledCall> {
        self.shared.books().billed.clone()
    }

    /// Sets the script for the next calls, as `PUT /sim/script` does.
    pub fn script(&self, steps: serde_json::Value) -> Result<(), SimError> {
        self.shared.books().script = Script::new(serde_json::from_value(steps)?);
        Ok(())
    }

    /// How many steps of the script are left.
    pub fn steps_left(&self) -> usize {
        self.shared.books().script.left()
    }

    /// Serves until the process ends.
    pub async fn serve(mut self) {
        let _ = (&mut self.server).await;
    }
}

impl Drop for RunningSim {
    fn drop(&mut self) {
        self.server.abort();
    }
}

/// What all requests share.
#[derive(Debug)]
struct Shared {
    options: SimOptions,
    books: Mutex<Books>,
}

/// What changes with every request. Held for moments only, never across an await.
#[derive(Debug, Default)]
struct Books {
    meter: Meter,
    /// What `meter` adds up, call by call.
    billed: Vec<BilledCall>,
    /// What `meter.faults` adds up.
    strikes: Vec<Strike>,
    /// Rates as they are now.
    faults: FaultRates,
    script: Script,
    seen: fault::Seen,
    windows: server::Windows,
    remembered: HashMap<u64, Arc<chat::Remembered>>,
    /// By task: the document that a fault spoilt.
    meant: HashMap<String, serde_json::Value>,
}

/// Spoilt documents that are kept, for when they are to be mended.
const MEANT: usize = 1024;

impl Books {
    fn bill(&mut self, call: BilledCall) {
        self.meter.bill(&call);
        self.billed.push(call);
    }

    fn struck(&mut self, request_id: &str, fault: Fault) {
        self.meter.struck(fault);
        self.strikes.push(Strike { request_id: request_id.to_owned(), fault });
    }

    /// Keeps what a call meant to say, if it says something else.
    fn means(&mut self, request_id: &str, fault: Option<Fault>, good: &str) {
        // Citations of nothing are what was meant.
        if matches!(fault, None | Some(Fault::BadCitations)) || self.meant.len() >= MEANT {
            return;
        }
        let task = meter::task_of(request_id);
        if let Ok(document @ serde_json::Value::Object(_)) = serde_json::from_str(good)
            && !task.is_empty()
            // A part of it that was spoilt again is no whole document.
            && !self.meant.contains_key(task)
        {
            self.meant.insert(task.to_owned(), document);
        }
    }

    /// What an earlier call of the same task meant to say.
    fn meant(&self, request_id: &str) -> Option<serde_json::Value> {
        self.meant.get(meter::task_of(request_id)).cloned()
    }

    fn forget(&mut self) {
        self.meter = Meter::default();
        self.billed = Vec::new();
        self.strikes = Vec::new();
    }
}

impl Shared {
    fn books(&self) -> MutexGuard<'_, Books> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
