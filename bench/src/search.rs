//! The gateway's searches: how long, how many a second, how much of it is the gateway's, what they hold
//! in memory, and how soon a gateway is ready.
//!
//! The load generator and the gateway share the machine. Every query is another one, so that the cache
//! answers none, except where the cache is what is measured.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use atlas_test_support::free_port;
use futures::future::try_join_all;
use serde_json::{Value, json};

use crate::{corpus, engine, machine, process::Process, prometheus::Scrape};

/// Documents of one request.
const BATCH: u64 = 200;
/// Queries that are asked again and again where the cache is measured.
const HOT: u64 = 32;
/// Queries of the comparison with the engine.
const COMPARED: u64 = 300;
/// A model of the simulator with 256 dimensions.
const MODEL: &str = "sim-embedding";

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Sizes of the index.
    #[arg(long, value_delimiter = ',', default_values_t = [10_000_u64, 100_000])]
    chunks: Vec<u64>,
    /// Clients at once, each with one query under way.
    #[arg(long, value_delimiter = ',', default_values_t = [1_usize, 16, 64])]
    clients: Vec<usize>,
    /// How long each combination is asked.
    #[arg(long, default_value_t = 5)]
    seconds: u64,
    /// Without embeddings: lexical searches only.
    #[arg(long)]
    lexical_only: bool,
}

/// What is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    CacheHit,
    Lexical,
    Hybrid,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::CacheHit => "cache hit",
            Self::Lexical => "lexical",
            Self::Hybrid => "hybrid",
        }
    }

    fn mode(self) -> &'static str {
        if self == Self::Hybrid { "hybrid" } else { "lexical" }
    }
}

/// The processes of one measurement.
struct Bed {
    dir: tempfile::TempDir,
    sim_url: String,
    _sim: Process,
    http: reqwest::Client,
    lexical_only: bool,
}

pub(crate) async fn measure(arguments: &Arguments) -> anyhow::Result<()> {
    println!("### Search, embedded engine\n");
    println!("{} · load before: {:.1}\n", machine::describe(), machine::load());
    for chunks in &arguments.chunks {
        measure_size(arguments, *chunks).await?;
    }
    Ok(())
}

async fn measure_size(arguments: &Arguments, chunks: u64) -> anyhow::Result<()> {
    let bed = Bed::new(arguments.lexical_only).await?;
    let (gateway, url, empty_start) = bed.gateway().await?;
    let began = Instant::now();
    bed.fill(&url, chunks).await?;
    let filling = began.elapsed();
    let filled = gateway.peak_resident_mib()?;
    gateway.stop().await?;

    let (gateway, url, start) = bed.gateway().await?;
    let loaded = gateway.resident_mib()?;
    println!("#### {chunks} chunks\n");
    println!("| Query | Clients | p50 | p99 | Queries/s |\n|---|---|---|---|---|");
    // Numbers of queries: none is asked twice.
    let next = AtomicU64::new(HOT + COMPARED);
    let kinds = [Kind::CacheHit, Kind::Lexical, Kind::Hybrid];
    let kinds = kinds.into_iter().filter(|kind| !(arguments.lexical_only && *kind == Kind::Hybrid));
    for kind in kinds.clone() {
        for clients in &arguments.clients {
            let until = Duration::from_secs(arguments.seconds);
            let (mut times, wall) = bed.ask(&url, kind, chunks, *clients, until, &next).await?;
            let rate = times.len() as f64 / wall.as_secs_f64();
            println!(
                "| {} | {clients} | {} | {} | {rate:.0} |",
                kind.name(),
                quantile(&mut times, 0.5),
                quantile(&mut times, 0.99)
            );
        }
    }
    println!();

    let mut shares = Vec::new();
    for kind in kinds.filter(|kind| *kind != Kind::CacheHit) {
        shares.push((kind, bed.compared(&url, &gateway, kind, chunks).await?));
    }
    let searched = gateway.resident_mib()?;
    gateway.stop().await?;
    println!("| Measure | Value |\n|---|---|");
    for (kind, compared) in shares {
        print_share(&bed, kind, compared)?;
    }
    println!("| Filling it, embeddings by the simulator included | {:.0} s |", filling.as_secs_f64());
    println!("| Resident memory: opened / after these searches | {loaded:.0} / {searched:.0} MiB |");
    println!("| Resident memory while it was filled, peak | {filled:.0} MiB |");
    println!(
        "| Start to ready: empty / with these chunks | {:.0} / {:.0} ms |\n",
        empty_start.as_secs_f64() * 1000.0,
        start.as_secs_f64() * 1000.0
    );
    Ok(())
}

/// What one client's queries take, and the engine without a gateway for the same.
fn print_share(bed: &Bed, kind: Kind, compared: Compared) -> anyhow::Result<()> {
    let dir = bed.dir.path().join("gateway");
    let Compared { mut times, cpu, embedding, queries } = compared;
    let gateway = seconds(&mut times, 0.5);
    let ms = |seconds: f64| format!("{:.2} ms", seconds * 1000.0);
    let name = format!("{}, one client", kind.name());
    let embedding_part =
        if embedding > 0.0 { format!(", {} of it the embeddings API", ms(embedding)) } else { String::new() };
    println!("| {name}: through the gateway over HTTP, p50 | {}{embedding_part} |", ms(gateway));
    let mut cpu_times = vec![format!("through the gateway {}", ms(cpu))];
    for (filtered, how) in [(false, "without a filter"), (true, "with the tenants' filter")] {
        let engine::Times { mut each, cpu } = engine::times(&dir, &queries, filtered)?;
        let engine = seconds(&mut each, 0.5);
        let own = gateway - embedding - engine;
        println!(
            "| {name}: the engine called directly {how}, p50; the gateway's share of it | {}; {}, {:.2} × |",
            ms(engine),
            ms(own),
            (gateway - embedding) / engine
        );
        cpu_times.push(format!("the engine {how} {}", ms(cpu)));
    }
    println!("| {name}: CPU time of a query | {} |", cpu_times.join("; "));
    Ok(())
}

/// One client's times, and what the engine needs to do the same.
struct Compared {
    times: Vec<Duration>,
    /// CPU time of the gateway's process a query, in seconds: embedding it is in it.
    cpu: f64,
    /// Mean time of the embeddings API in it, in seconds.
    embedding: f64,
    queries: Vec<(String, Option<Vec<f32>>)>,
}

impl Bed {
    async fn new(lexical_only: bool) -> anyhow::Result<Self> {
        let dir = tempfile::Builder::new().prefix("atlas-bench-").tempdir()?;
        let port = free_port()?;
        let sim_url = format!("http://127.0.0.1:{port}");
        let args = ["--port".to_owned(), port.to_string()];
        let mut sim = Process::start("openai-sim", &args, [], dir.path())?;
        sim.ready(&format!("{sim_url}/health")).await?;
        Ok(Self { dir, sim_url, _sim: sim, http: reqwest::Client::new(), lexical_only })
    }

    /// Starts the gateway on the same folder as before; how long it took to be ready.
    async fn gateway(&self) -> anyhow::Result<(Process, String, Duration)> {
        let port = free_port()?;
        let url = format!("http://127.0.0.1:{port}");
        let model = if self.lexical_only { "none" } else { MODEL };
        let env = [
            ("ATLAS_DATA_DIR", self.dir.path().join("gateway").display().to_string()),
            ("GATEWAY_LISTEN", format!("127.0.0.1:{port}")),
            ("RATE_LIMIT_REQUESTS", "10000000".to_owned()),
            ("DAILY_TOKEN_BUDGET", "900000000000".to_owned()),
            ("OPENAI_BASE_URL", format!("{}/v1", self.sim_url)),
            ("OPENAI_API_KEY", "sk-simulated-key".to_owned()),
            ("OPENAI_EMBEDDING_MODEL", model.to_owned()),
            // Made-up words are many tokens: one chunk a document all the same.
            ("CHUNK_TOKENS", "2000".to_owned()),
            ("LOG_LEVEL", "warn".to_owned()),
        ]
        .map(|(name, value)| (name.to_owned(), value));
        let began = Instant::now();
        let mut gateway = Process::start("atlas-rag-gateway", &[], env, self.dir.path())?;
        gateway.ready(&format!("{url}/health/ready")).await?;
        Ok((gateway, url, began.elapsed()))
    }

    async fn fill(&self, url: &str, chunks: u64) -> anyhow::Result<()> {
        let mut said = Instant::now();
        for first in (0..chunks).step_by(usize::try_from(BATCH)?) {
            let documents: Vec<Value> = (first..chunks.min(first + BATCH))
                .map(|number| {
                    let (source, text) = corpus::document(number);
                    json!({"source": source, "text": text})
                })
                .collect();
            let request = self.http.put(format!("{url}/v1/documents"));
            let answer = request.json(&json!({"documents": documents})).send().await?;
            ensure!(answer.status().is_success(), "{}", answer.text().await?);
            let answer: Value = answer.json().await?;
            let all = answer["results"].as_array().context("results")?;
            let wrong = all.iter().find(|one| one["outcome"] != "indexed" || one["chunks"] != 1);
            ensure!(wrong.is_none(), "{wrong:?}");
            if said.elapsed() > Duration::from_secs(10) {
                said = Instant::now();
                eprintln!("{first} of {chunks} chunks are in");
            }
        }
        Ok(())
    }

    /// Asks with so many clients for so long.
    async fn ask(
        &self,
        url: &str,
        kind: Kind,
        chunks: u64,
        clients: usize,
        span: Duration,
        next: &AtomicU64,
    ) -> anyhow::Result<(Vec<Duration>, Duration)> {
        let number = || {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if kind == Kind::CacheHit { number % HOT } else { number }
        };
        if kind == Kind::CacheHit {
            for number in 0..HOT {
                self.query(url, kind, number, chunks).await?;
            }
        }
        let began = Instant::now();
        let client = || async {
            let mut times = Vec::new();
            while began.elapsed() < span {
                times.push(self.query(url, kind, number(), chunks).await?);
            }
            anyhow::Ok(times)
        };
        let times = try_join_all((0..clients).map(|_| client())).await?;
        Ok((times.into_iter().flatten().collect(), began.elapsed()))
    }

    /// One query, checked: it finds something.
    async fn query(&self, url: &str, kind: Kind, number: u64, chunks: u64) -> anyhow::Result<Duration> {
        let query = corpus::query(number, chunks);
        let request = self
            .http
            .post(format!("{url}/v1/query_chat"))
            .json(&json!({"query": query, "mode": kind.mode(), "passage_tokens": 0}));
        let began = Instant::now();
        let answer = request.send().await?;
        let status = answer.status();
        let body = answer.bytes().await?;
        let took = began.elapsed();
        ensure!(status.is_success(), "{status}: {}", String::from_utf8_lossy(&body));
        ensure!(body.len() > 2, "nothing was found for {query:?}");
        Ok(took)
    }

    async fn compared(
        &self,
        url: &str,
        gateway: &Process,
        kind: Kind,
        chunks: u64,
    ) -> anyhow::Result<Compared> {
        let metrics = format!("{url}/metrics");
        let before = Scrape::of(&metrics).await;
        let mut times = Vec::new();
        let mut queries = Vec::new();
        let cpu = gateway.cpu_seconds()?;
        for number in HOT..HOT + COMPARED {
            times.push(self.query(url, kind, number, chunks).await?);
            queries.push((corpus::query(number, chunks), None));
        }
        let cpu = (gateway.cpu_seconds()? - cpu) / COMPARED as f64;
        let after = Scrape::of(&metrics).await;
        let mut embedding = 0.0;
        if kind == Kind::Hybrid {
            let grown =
                |name: &str| after.sum_of(name, "stage=\"embed\"") - before.sum_of(name, "stage=\"embed\"");
            embedding = grown("rag_query_seconds_sum") / grown("rag_query_seconds_count").max(1.0);
            for (text, vector) in &mut queries {
                *vector = Some(self.embed(text).await?);
            }
        }
        Ok(Compared { times, cpu, embedding, queries })
    }

    async fn embed(&self, text: &str) -> anyhow::Result<Vec<f32>> {
        let request = self.http.post(format!("{}/v1/embeddings", self.sim_url));
        let body = json!({"model": MODEL, "input": [text], "encoding_format": "float"});
        let answer: Value = request.json(&body).send().await?.json().await?;
        Ok(serde_json::from_value(answer["data"][0]["embedding"].clone())?)
    }
}

fn seconds(times: &mut [Duration], share: f64) -> f64 {
    times.sort_unstable();
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "an index of the list")]
    let at = (share * times.len().saturating_sub(1) as f64).round() as usize;
    times.get(at).map_or(0.0, Duration::as_secs_f64)
}

fn quantile(times: &mut [Duration], share: f64) -> String {
    format!("{:.2} ms", seconds(times, share) * 1000.0)
}
