//! The `openai-sim` binary. See the library's documentation for what it does.

use std::{path::PathBuf, time::Duration};

use anyhow::Context as _;
use atlas_openai_sim::{FaultRates, Sim, SimOptions, Step};
use clap::Parser;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const AFTER_HELP: &str = r#"Examples:
  openai-sim --port 8600
      then: OPENAI_BASE_URL=http://127.0.0.1:8600/v1 OPENAI_API_KEY=any atlas ask "Design a queue"
  openai-sim --fault 429=0.1,500=0.05,hang=0.01 --latency-ms 300 --seed 7
  curl http://127.0.0.1:8600/sim/meter                 what was billed, by model, task and kind
  curl http://127.0.0.1:8600/sim/calls                 every billed call, in order
  curl http://127.0.0.1:8600/sim/strikes               every fault that struck, in order
  curl -X DELETE http://127.0.0.1:8600/sim/meter       forget all of that
  curl -X PUT http://127.0.0.1:8600/sim/faults -d '429=0.1,cut=0.02'    other rates from now on
  curl -X PUT http://127.0.0.1:8600/sim/script -d '[{"fault": "429", "times": 2}, {"match": "task-7", "fault": "cut"}]'

Faults that are not billed: 400, 401, 404, 429, 429_html, 500, 502, 503, insufficient_quota,
  context_length, content_filter.
Faults that are billed: 504, hang, cut, drop, truncated, malformed, no_choices, no_usage,
  wrong_schema, not_json, empty, refusal, length, bad_citations, sloppy, hostile, invalid_json,
  broken_mermaid, endless, ignores_cap, tool_loop, filtered, overbill, slow.
  Only where the client wants a stream, and not billed: no_stream.

A step of a script: match (part of X-Client-Request-Id or of the prompt), kind (chat, embedding, any),
  times, fault, retry_after, delay_ms, content (the answer; in JSON a citation may name its passage by place,
  "docs/a.md: some of its words"), tool_calls ([{"name", "arguments"}]), finish_reason. The first step that matches a call is used up by it."#;

/// An OpenAI-compatible server with faults and a billing meter. For tests and benchmarks only: its
/// answers are made of the prompt's own words.
#[derive(Debug, Parser)]
#[command(name = "openai-sim", version, after_help = AFTER_HELP)]
struct Arguments {
    /// Port on 127.0.0.1; 0 picks a free one.
    #[arg(long, default_value_t = 8600)]
    port: u16,
    /// How long every call takes at least.
    #[arg(long, value_name = "MILLISECONDS", default_value_t = 0)]
    latency_ms: u64,
    /// How much longer a call takes for each completion token; a stream comes at this pace.
    #[arg(long, value_name = "MICROSECONDS", default_value_t = 0)]
    token_latency_us: u64,
    /// How often which fault strikes: FAULT=RATE,… with rates from 0 to 1.
    #[arg(long = "fault", value_name = "RATES", default_value = "", hide_default_value = true)]
    faults: FaultRates,
    /// Seed of the faults: the same seed and requests give the same faults.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// A JSON file with the steps for the first calls.
    #[arg(long, value_name = "FILE")]
    script: Option<PathBuf>,
    /// Refuse every other key with 401.
    #[arg(long, value_name = "KEY")]
    require_key: Option<String>,
    /// Serve only these models; others get 404. Default: gpt-*, o1*, o3*, o4*, text-embedding-*, sim-*.
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    models: Vec<String>,
    /// How often a call that offers tools is answered with a tool call, 0 to 1.
    #[arg(long, value_name = "RATE", default_value_t = 0.0)]
    tool_rate: f64,
    /// Prompt and completion cap together may not be larger.
    #[arg(long, value_name = "TOKENS", default_value_t = 128_000)]
    context_tokens: u64,
    /// Requests in a minute and model; more get 429.
    #[arg(long, value_name = "N")]
    rpm: Option<u64>,
    /// Tokens in a minute and model; more get 429.
    #[arg(long, value_name = "N")]
    tpm: Option<u64>,
    /// Make the answer to each request body only once and repeat it: for benchmarks.
    #[arg(long, conflicts_with_all = ["faults", "script"])]
    remember_answers: bool,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let script: Vec<Step> = match &arguments.script {
        Some(path) => {
            let text = std::fs::read_to_string(path)
                .with_context(|| format!("the script {} cannot be read", path.display()))?;
            serde_json::from_str(&text).with_context(|| format!("{} is not a script", path.display()))?
        }
        None => Vec::new(),
    };
    let sim = Sim::start(SimOptions {
        port: arguments.port,
        seed: arguments.seed,
        latency: Duration::from_millis(arguments.latency_ms),
        latency_per_token: Duration::from_micros(arguments.token_latency_us),
        faults: arguments.faults,
        script,
        require_key: arguments.require_key,
        models: arguments.models,
        tool_rate: arguments.tool_rate,
        context_tokens: arguments.context_tokens,
        requests_per_minute: arguments.rpm,
        tokens_per_minute: arguments.tpm,
        remember_answers: arguments.remember_answers,
        ..SimOptions::default()
    })
    .await?;
    println!(
        "openai-sim listens on {} (simulated answers, no model). Meter: http://{}/sim/meter",
        sim.base_url(),
        sim.addr
    );
    tokio::select! {
        () = sim.serve() => {}
        result = tokio::signal::ctrl_c() => result?,
    }
    Ok(())
}
