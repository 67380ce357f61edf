//! One worker: how many runs a second, what it adds to the time of its upstreams, what it costs.
//!
//! All requests are published before the worker starts, so that it never waits for one. The clock runs
//! from the worker's first readiness to the last final run.

use std::{
    collections::BTreeMap,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use atlas_shared::{Config, Env, config, message::ROLE};
use atlas_test_support::{
    fleet::{Fleet, FleetError, FleetOptions, workspace},
    free_port,
};
use bytes::Bytes;
use clap::ValueEnum;
use futures::{StreamExt as _, TryStreamExt as _};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::{machine, process::Process, prometheus::Scrape};

/// Nothing here takes longer.
const BOUND: Duration = Duration::from_mins(15);
/// Different requests, asked in turn: a fleet sees questions again, but not one question only.
const QUESTIONS: &[&str] = &[
    "Design a logging system for our microservices",
    "Design the event bus for our billing platform, we are on GCP, PCI applies",
    "How should workers share a daily token budget without a race?",
    "Design the retry and dead-letter strategy of a message consumer",
    "Plan the migration of our vector index to a new embedding model",
    "Design the on-call alerting for a fleet of stateless workers",
    "Design tenant isolation for a retrieval service",
    "How should we cache search results that must never be stale?",
];

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Services {
    /// SQLite file, in-process queue: what `atlas dev` runs on.
    Embedded,
    /// Pub/Sub emulator, Postgres, PostgREST-compatible server.
    Real,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// What the worker works on.
    #[arg(long, value_enum, default_value_t = Services::Embedded)]
    services: Services,
    /// Requests.
    #[arg(long, default_value_t = 2000)]
    runs: usize,
    /// Runs at once in the worker (MAX_IN_FLIGHT).
    #[arg(long, default_value_t = 64)]
    in_flight: usize,
    /// How long the simulator takes for each call.
    #[arg(long, value_name = "MILLISECONDS", default_value_t = 0)]
    latency_ms: u64,
}

/// What a benchmark needs to know about the services of a worker.
struct Bed {
    dir: tempfile::TempDir,
    /// Settings of the worker.
    env: BTreeMap<String, String>,
    sim_url: String,
    fleet: Option<Fleet>,
    /// The simulator and the gateway, where no fleet has them.
    _others: Vec<Process>,
}

pub(crate) async fn measure(arguments: &Arguments) -> anyhow::Result<()> {
    let load = machine::load();
    let bed = match arguments.services {
        Services::Embedded => embedded(arguments).await?,
        Services::Real => real(arguments).await?,
    };
    publish(&bed.env, arguments.runs).await?;
    if let Some(fleet) = &bed.fleet {
        reset_function_counts(fleet).await?;
    }

    let port = free_port()?;
    let url = format!("http://127.0.0.1:{port}");
    let env = bed.env.clone().into_iter().chain([("WORKER_LISTEN".to_owned(), format!("127.0.0.1:{port}"))]);
    let mut worker = Process::start("atlas-worker", &[], env, bed.dir.path())?;
    worker.ready(&format!("{url}/health/live")).await?;
    let began = Instant::now();
    let cpu_before = worker.cpu_seconds()?;
    let (scrape, wall) = watch(&worker, &format!("{url}/metrics"), arguments.runs, began).await?;
    let cpu = worker.cpu_seconds()? - cpu_before;
    let memory = worker.peak_resident_mib()?;

    let meter: Value = reqwest::get(format!("{}/sim/meter", bed.sim_url)).await?.json().await?;
    check(&bed, arguments.runs, &meter).await?;

    let runs = arguments.runs as f64;
    let rate = runs / wall.as_secs_f64();
    let ideal = if arguments.latency_ms == 0 {
        None
    } else {
        Some(arguments.in_flight as f64 / Duration::from_millis(arguments.latency_ms).as_secs_f64())
    };
    let quantile = |quantile| match scrape.quantile("atlas_overhead_seconds", quantile) {
        Some((bound, share)) => format!("≤ {} ms ({:.1} % of runs)", bound * 1000.0, share * 100.0),
        None => "none observed".to_owned(),
    };
    println!(
        "### One worker, {} services, {} ms a call, {} in flight\n",
        name(arguments.services),
        arguments.latency_ms,
        arguments.in_flight
    );
    println!("{} · load before: {load:.1}\n", machine::describe());
    println!("| Measure | Value |\n|---|---|");
    println!(
        "| Runs | {} done, none failed; ledger = meter ({} tokens) |",
        arguments.runs, meter["total_tokens"]
    );
    println!("| Wall time | {:.2} s |", wall.as_secs_f64());
    println!("| Throughput | {rate:.1} runs/s |");
    if let Some(ideal) = ideal {
        println!("| Ideal (in flight / latency) | {ideal:.1} runs/s: {:.1} % of it |", rate / ideal * 100.0);
    }
    println!("| `atlas_overhead_seconds` p50 | {} |", quantile(0.5));
    println!("| `atlas_overhead_seconds` p99 | {} |", quantile(0.99));
    println!(
        "| Overhead, mean | {:.2} ms |",
        scrape.sum("atlas_overhead_seconds_sum") / scrape.sum("atlas_overhead_seconds_count").max(1.0)
            * 1000.0
    );
    println!("| CPU of the worker | {:.2} ms a run |", cpu / runs * 1000.0);
    println!("| Resident memory, peak | {memory:.0} MiB |");
    if let Some(fleet) = &bed.fleet {
        for (label, count) in function_counts(fleet).await? {
            println!("| `{label}` | {:.3} calls a run |", count / runs);
        }
    }
    println!();
    Ok(())
}

fn name(services: Services) -> &'static str {
    match services {
        Services::Embedded => "embedded",
        Services::Real => "real",
    }
}

/// What both beds set.
fn common(arguments: &Arguments) -> Vec<(String, String)> {
    [
        ("MAX_IN_FLIGHT", arguments.in_flight.to_string()),
        ("DAILY_TOKEN_BUDGET", "900000000000".to_owned()),
        ("RATE_LIMIT_REQUESTS", "1000000".to_owned()),
        ("LOG_LEVEL", "warn".to_owned()),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .to_vec()
}

fn sim_args(arguments: &Arguments) -> Vec<String> {
    // Answers are made once for each different prompt: the simulator must not be what is measured.
    ["--remember-answers".to_owned(), "--latency-ms".to_owned(), arguments.latency_ms.to_string()].to_vec()
}

async fn embedded(arguments: &Arguments) -> anyhow::Result<Bed> {
    let dir = tempfile::Builder::new().prefix("atlas-bench-").tempdir()?;
    let [sim_port, gateway_port] = [free_port()?, free_port()?];
    let sim_url = format!("http://127.0.0.1:{sim_port}");
    let gateway_url = format!("http://127.0.0.1:{gateway_port}");
    let data = |name: &str| dir.path().join(name).display().to_string();
    let mut env: BTreeMap<String, String> = [
        ("ATLAS_DATA_DIR", data("worker")),
        ("OPENAI_BASE_URL", format!("{sim_url}/v1")),
        ("OPENAI_API_KEY", "sk-simulated-key".to_owned()),
        ("RAG_URL", gateway_url.clone()),
    ]
    .into_iter()
    .map(|(name, value)| (name.to_owned(), value))
    .collect();
    env.extend(common(arguments));

    let mut args = sim_args(arguments);
    args.extend(["--port".to_owned(), sim_port.to_string()]);
    let mut sim = Process::start("openai-sim", &args, [], dir.path())?;
    sim.ready(&format!("{sim_url}/health")).await?;
    let gateway_env = [
        ("ATLAS_DATA_DIR".to_owned(), data("gateway")),
        ("GATEWAY_LISTEN".to_owned(), format!("127.0.0.1:{gateway_port}")),
        ("RATE_LIMIT_REQUESTS".to_owned(), "1000000".to_owned()),
        ("LOG_LEVEL".to_owned(), "warn".to_owned()),
    ];
    let mut gateway = Process::start("atlas-rag-gateway", &[], gateway_env, dir.path())?;
    gateway.ready(&format!("{gateway_url}/health/ready")).await?;
    index(&env, dir.path()).await?;
    Ok(Bed { dir, env, sim_url, fleet: None, _others: vec![sim, gateway] })
}

/// Indexes this repository's documents through the gateway.
async fn index(env: &BTreeMap<String, String>, dir: &Path) -> anyhow::Result<()> {
    let own = std::env::current_exe()?;
    let atlas = own.parent().context("this program's folder")?.join("atlas");
    let output = tokio::process::Command::new(atlas)
        .arg("index")
        .arg(workspace().join("docs"))
        .envs(env)
        // Only the gateway is spoken to; its folder is not ours.
        .env("ATLAS_DATA_DIR", dir.join("index"))
        .output()
        .await?;
    ensure!(output.status.success(), "atlas index: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

async fn real(arguments: &Arguments) -> anyhow::Result<Bed> {
    let options = FleetOptions {
        workers: 0,
        sim: sim_args(arguments),
        env: common(arguments),
        ..FleetOptions::default()
    };
    let fleet = match Fleet::start(options).await {
        Ok(fleet) => fleet,
        Err(FleetError::Missing { service, reason }) => bail!("{service} is missing: {reason}"),
        Err(FleetError::Broken(error)) => return Err(error),
    };
    let dir = tempfile::Builder::new().prefix("atlas-bench-").tempdir()?;
    Ok(Bed {
        dir,
        env: fleet.env.clone(),
        sim_url: fleet.sim_url.clone(),
        fleet: Some(fleet),
        _others: Vec::new(),
    })
}

/// Publishes all requests.
async fn publish(env: &BTreeMap<String, String>, runs: usize) -> anyhow::Result<()> {
    let mut settings = Env::default();
    for (name, value) in env {
        settings = settings.with(name, value.clone());
    }
    let config = Config::load(&settings, config::Process::Worker)?;
    // Opening the whole queue creates topic and subscription: a message without one is lost.
    let queues = atlas_worker::queue::open(&config).await?;
    let topic = atlas_worker::queue::Topics::of(&config).requests;
    let publisher = &queues.publisher;
    futures::stream::iter(0..runs)
        .map(|number| {
            let message = json!({
                "task_id": Uuid::new_v4(),
                "role": ROLE,
                "msg_type": "chat",
                "content": QUESTIONS[number % QUESTIONS.len()],
            });
            publisher.publish(&topic, Bytes::from(message.to_string()), Vec::new())
        })
        .buffer_unordered(64)
        .try_collect::<Vec<_>>()
        .await?;
    queues.requests.drain().await;
    Ok(())
}

/// Waits until all runs are final. Any other ending fails.
async fn watch(
    worker: &Process,
    url: &str,
    runs: usize,
    began: Instant,
) -> anyhow::Result<(Scrape, Duration)> {
    let mut ticks = tokio::time::interval(Duration::from_millis(50));
    let mut said = Instant::now();
    loop {
        ticks.tick().await;
        let scrape = Scrape::of(url).await;
        let done = scrape.sum_of("atlas_runs_total", "status=\"done\"");
        if done >= runs as f64 {
            ensure!(scrape.sum("atlas_runs_total") <= done, "some attempts did not end as done");
            return Ok((scrape, began.elapsed()));
        }
        if said.elapsed() > Duration::from_secs(5) {
            said = Instant::now();
            eprintln!("{done} of {runs} runs done after {:.0} s", began.elapsed().as_secs_f64());
        }
        ensure!(began.elapsed() < BOUND, "only {done} of {runs} runs are done:\n{}", worker.log_tail());
    }
}

/// The work was done, and paid once: results, ledger and meter agree.
async fn check(bed: &Bed, runs: usize, meter: &Value) -> anyhow::Result<()> {
    let (results, booked): (i64, i64) = if let Some(fleet) = &bed.fleet {
        let row = fleet
            .database()
            .await?
            .query_one(
                "select (select count(*) from architect_out), (select coalesce(sum(actual), 0)::bigint from token_ledger where scope = 'global')",
                &[],
            )
            .await?;
        (row.get(0), row.get(1))
    } else {
        let file = Path::new(&bed.env["ATLAS_DATA_DIR"]).join(atlas_shared::sqlite::FILE_NAME);
        let connection =
            rusqlite::Connection::open_with_flags(file, rusqlite::OpenFlags::SQLITE_OPEN_READ_ONLY)?;
        connection.query_row(
            "select (select count(*) from architect_out), (select coalesce(sum(actual), 0) from token_ledger where scope = 'global')",
            [],
            |row| Ok((row.get(0)?, row.get(1)?)),
        )?
    };
    ensure!(usize::try_from(results)? == runs, "{results} results for {runs} requests");
    let billed = meter["total_tokens"].as_i64().context("the meter's total")?;
    ensure!(booked == billed, "{booked} tokens booked, {billed} billed");
    Ok(())
}

/// Makes Postgres count the calls of SQL functions: an independent witness of round trips.
async fn reset_function_counts(fleet: &Fleet) -> anyhow::Result<()> {
    let database = fleet.database().await?;
    let name: String = database.query_one("select current_database()::text", &[]).await?.get(0);
    database.batch_execute(&format!("alter database {name} set track_functions = 'all'")).await?;
    // Open connections keep their old setting.
    database
        .batch_execute(
            "select pg_terminate_backend(pid) from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid(); select pg_stat_reset()",
        )
        .await?;
    Ok(())
}

/// Calls of each function that the API serves.
async fn function_counts(fleet: &Fleet) -> anyhow::Result<Vec<(String, f64)>> {
    let rows = fleet
        .database()
        .await?
        .query(
            "select funcname::text, calls::float8 from pg_stat_user_functions where funcname not like 'atlas\\_%' order by calls desc, funcname",
            &[],
        )
        .await?;
    Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
}
