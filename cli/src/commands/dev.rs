//! `atlas dev`: everything in one process.

use std::net::{Ipv4Addr, SocketAddr};

use crate::{
    context::Context,
    error::{CliError, Result},
    signals::Stop,
    stack::{Parts, Stack},
    ui::{BOLD, GREEN, paint},
};

/// Run everything in this terminal: queue, store, search engine, gateway and worker
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  atlas dev
  atlas dev --port 0 --worker-port 0          free ports; the other commands find them
  OPENAI_API_KEY=sk-… atlas dev               with a model; without one the offline drafter writes
  OPENAI_BASE_URL=http://localhost:8080/v1 OPENAI_EMBEDDING_MODEL=none atlas dev

Always embedded: PUBSUB_PROJECT_ID, SUPABASE_URL, QDRANT_URL and REDIS_URL are ignored. Data stays in
the data folder. Ctrl-C drains: running requests may finish (DRAIN_TIMEOUT_SECONDS), the others wait
for the next start. A second Ctrl-C stops at once; nothing is lost then either.")]
pub(crate) struct Dev {
    /// Port of the gateway on 127.0.0.1; 0 picks a free one [env: GATEWAY_LISTEN] [default: 8501]
    #[arg(short, long, value_name = "PORT")]
    port: Option<u16>,

    /// Port of the worker's probes and metrics; 0 picks a free one [env: WORKER_LISTEN] [default: 8000]
    #[arg(long, value_name = "PORT")]
    worker_port: Option<u16>,
}

impl Dev {
    pub(crate) async fn run(self, context: &Context) -> Result<()> {
        let ui = context.ui;
        let mut config = context.embedded_config(&[("RAG_URL", String::new())])?;
        if !context.is_set("LOG_LEVEL") {
            "info".clone_into(&mut config.log.filter);
        }
        if let Some(port) = self.port {
            config.gateway.listen = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        }
        if let Some(port) = self.worker_port {
            config.worker.listen = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        }
        for name in context.ignored_services() {
            ui.warn(format_args!("{name} is ignored: `atlas dev` is always embedded."));
        }
        let drain_timeout = config.worker.drain_timeout;
        let mut stop = Stop::listen()?;
        let stack = tokio::select! {
            stack = Stack::start(config, Parts::All, "dev", ui) => stack?,
            () = stop.requested() => return Err(CliError::interrupted("stopped before it was up")),
        };
        announce(context, &stack);
        stop.requested().await;
        ui.note(format_args!(
            "\nDraining: running requests have {} s. Ctrl-C again stops at once.",
            drain_timeout.as_secs()
        ));
        tokio::select! {
            () = stack.stop() => {
                ui.note("Stopped.");
                Ok(())
            }
            () = stop.requested() => Err(CliError::interrupted(
                "stopped without draining; running requests go on at the next start",
            )),
        }
    }
}

fn announce(context: &Context, stack: &Stack) {
    let ui = context.ui;
    let address = |url: Option<url::Url>| {
        url.map_or_else(|| "not running".to_owned(), |url| url.as_str().trim_end_matches('/').to_owned())
    };
    let model = match &stack.config.openai {
        Some(openai) => format!("{} at {}", openai.models.join(", then "), openai.base_url),
        None => {
            "none: the offline drafter writes (set OPENAI_API_KEY or OPENAI_BASE_URL for a model)".to_owned()
        }
    };
    let search = match stack.config.openai.as_ref().and_then(|openai| openai.embedding_model.as_deref()) {
        Some(model) => format!("words (BM25) and meaning ({model})"),
        None => "words (BM25); meaning needs an embedding model".to_owned(),
    };
    ui.out(format_args!(
        "{} Everything is embedded, data in {}",
        paint(GREEN, "Atlas is up."),
        context.data_dir().display()
    ));
    let gateway = address(stack.gateway_url());
    let worker = address(stack.worker_url());
    for (name, text) in [
        ("gateway", format!("{gateway}  (/v1/query_chat, /health/ready, /metrics)")),
        ("worker", format!("{worker}  (/health/ready, /metrics)")),
        ("model", model),
        ("search", search),
        ("budget", format!("{} tokens a day, {} a run", stack.config.limits.daily, stack.config.limits.run)),
    ] {
        ui.out(format_args!("  {} {text}", paint(BOLD, format_args!("{name:<8}"))));
    }
    if stack.config.worker.index_on_docs_added {
        let gateway = &stack.config.gateway;
        let folders = gateway.index_allowed_roots.iter().map(|root| root.display().to_string());
        let places: Vec<_> = folders.chain(gateway.index_allowed_urls.iter().cloned()).collect();
        let text = match places.as_slice() {
            [] => "docs_added is read, but nothing may be indexed by it: set INDEX_ALLOWED_ROOTS or INDEX_ALLOWED_URLS".to_owned(),
            places => format!("docs_added is read (atlas publish --docs-added REPO), below {}", places.join(", ")),
        };
        ui.out(format_args!("  {} {text}", paint(BOLD, format_args!("{:<8}", "docs"))));
    }
    // Commands elsewhere need the folder only if it is not the usual one.
    let folder = if context.data_dir() == std::path::Path::new(".atlas") {
        String::new()
    } else {
        format!(" --data-dir {}", context.data_dir().display())
    };
    ui.out("Next, in another terminal in this folder:");
    for (command, meaning) in [
        ("index .", "index this folder"),
        ("search \"retries\"", "see what is found"),
        ("ask \"Design a rate limiter\"", "get a spec with citations"),
        ("runs list", "see all requests"),
    ] {
        ui.out(format_args!("  atlas{folder} {command:<30} {meaning}"));
    }
    ui.out("Ctrl-C stops it.");
}
