//! `atlas search`: what the worker would find, as it would find it.

use atlas_shared::{
    gateway_api::{Passage, QueryChatRequest, QueryFilter, SearchMode, words_only},
    gateway_client::QueryAnswer,
};

use crate::{
    context::Context,
    error::{CliError, Result},
    stack::GatewayAccess,
    ui::{BOLD, DIM, paint},
};

/// Lines of a passage that are shown without `--full`.
const PREVIEW_LINES: usize = 6;

/// Find passages in the index: what the worker would be given
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  atlas search \"how are retries configured\"
  atlas search \"token budget\" --top-k 3 --full
  atlas search timeouts --filter 'docs/**' --lang markdown
  atlas search timeouts --json | jq -r '.[] | \"\\(.source):\\(.start_line)\"'

Asks the gateway at RAG_URL, else the running `atlas dev`, else opens the embedded index itself.")]
pub(crate) struct Search {
    /// What to look for, in words
    query: String,

    /// How many passages at most
    #[arg(short = 'k', long, value_name = "N", default_value_t = 5)]
    top_k: usize,

    /// Collection to search [env: RAG_COLLECTION] [default: atlas]
    #[arg(short, long, value_name = "NAME")]
    collection: Option<String>,

    /// Only files whose path matches this glob; `!tests/**`: all but these
    #[arg(short, long, value_name = "GLOB")]
    filter: Option<String>,

    /// Only this language, such as rust or markdown
    #[arg(long, value_name = "LANG")]
    lang: Option<String>,

    /// Only this repository, by the name it was indexed with
    #[arg(long, value_name = "NAME")]
    repo: Option<String>,

    /// Several collections at once, ranked together
    #[arg(long, value_name = "NAMES", value_delimiter = ',', conflicts_with = "collection")]
    collections: Vec<String>,

    /// How to search [default: hybrid]
    #[arg(long, value_name = "MODE", value_enum)]
    mode: Option<Mode>,

    /// Drop passages whose cosine is lower, from 0 to 1 [env: RELEVANCY_THRESHOLD]
    #[arg(long, value_name = "COSINE")]
    threshold: Option<f32>,

    /// Prefer passages that do not repeat each other, from 0 (as ranked) to 1
    #[arg(long, value_name = "SHARE")]
    diversity: Option<f32>,

    /// Leave the order to the search, although the gateway has a reranker
    #[arg(long)]
    no_rerank: bool,

    /// Join passages with their neighbours up to so many tokens; 0 shows single chunks
    #[arg(long, value_name = "N")]
    passage_tokens: Option<usize>,

    /// Only what belongs to this tenant, or to nobody
    #[arg(long, value_name = "NAME")]
    tenant: Option<String>,

    /// At most one passage a file
    #[arg(long)]
    one_per_file: bool,

    /// Show whole passages
    #[arg(long)]
    full: bool,

    /// Print the gateway's answer as JSON
    #[arg(long)]
    json: bool,
}

/// How to search.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Mode {
    /// Words and meaning, fused
    Hybrid,
    /// Words alone (BM25)
    Lexical,
    /// Meaning alone (cosine of embeddings)
    Dense,
}

impl From<Mode> for SearchMode {
    fn from(mode: Mode) -> Self {
        match mode {
            Mode::Hybrid => Self::Hybrid,
            Mode::Lexical => Self::Lexical,
            Mode::Dense => Self::Dense,
        }
    }
}

impl Search {
    pub(crate) async fn run(self, context: &Context) -> Result<()> {
        if self.query.trim().is_empty() {
            return Err(CliError::usage("there is nothing to look for").fix("atlas search \"some words\""));
        }
        let access = GatewayAccess::open(context, "search").await?;
        let found = self.search(context, &access).await;
        access.close().await;
        found
    }

    async fn search(&self, context: &Context, access: &GatewayAccess) -> Result<()> {
        let collections = match (&self.collection, self.collections.is_empty()) {
            (Some(one), _) => vec![one.clone()],
            (None, true) => vec![access.config.rag.collection.clone()],
            (None, false) => self.collections.clone(),
        };
        let filter = QueryFilter {
            path: self.filter.clone(),
            lang: self.lang.clone(),
            repo: self.repo.clone(),
            tenant: self.tenant.clone(),
        };
        let request = QueryChatRequest {
            query: self.query.clone(),
            top_k: Some(self.top_k),
            collections: Some(collections.clone()),
            mode: self.mode.map(SearchMode::from),
            relevancy_threshold: self.threshold.or(access.config.rag.relevancy_threshold),
            diversity: self.diversity,
            rerank: self.no_rerank.then_some(false),
            passage_tokens: self.passage_tokens,
            collapse_by_file: self.one_per_file.then_some(true),
            filter: (filter != QueryFilter::default()).then_some(filter),
            ..QueryChatRequest::default()
        };
        let QueryAnswer { passages, degraded } = access.client.query_chat(&request).await?;
        if let Some(how) = degraded {
            context.ui.detail(format_args!("The gateway says its answer is {how}."));
            warn_of_words_only(context, access, &collections).await;
        }
        if self.json {
            return context.ui.json(&passages);
        }
        if passages.is_empty() {
            context.ui.note(format_args!(
                "Nothing found in collection {} ({}).",
                collections.join(", "),
                access.place
            ));
            context.ui.note("Is it indexed? `atlas index PATH` does it; a second run costs nothing.");
            return Ok(());
        }
        for (at, passage) in passages.iter().enumerate() {
            if at > 0 {
                context.ui.out("");
            }
            self.show(context, passage);
        }
        Ok(())
    }

    fn show(&self, context: &Context, passage: &Passage) {
        let Passage { source, start_line, end_line, .. } = passage;
        let mut place = paint(BOLD, format_args!("{source}:{start_line}-{end_line}"));
        if let Some(heading) = passage.heading.as_deref().filter(|heading| !heading.is_empty()) {
            place = format!("{place}  {heading}");
        }
        let similarity =
            passage.similarity.map_or_else(String::new, |cosine| format!(", similarity {cosine:.2}"));
        context.ui.out(format_args!(
            "{place}  {}",
            paint(DIM, format_args!("score {:.4}{similarity}", passage.score))
        ));
        let limit = if self.full { usize::MAX } else { PREVIEW_LINES };
        for line in passage.text.lines().take(limit) {
            context.ui.out(format_args!("  {line}"));
        }
        let more = passage.text.lines().count().saturating_sub(limit);
        if more > 0 {
            context.ui.out(paint(DIM, format_args!("  … {more} more (--full shows them)")));
        }
    }
}

/// Names the collections that have words only although an embedding model is configured: their answers look like others.
async fn warn_of_words_only(context: &Context, access: &GatewayAccess, collections: &[String]) {
    let model = access.config.openai.as_ref().and_then(|openai| openai.embedding_model.as_deref());
    if model.is_none() {
        return;
    }
    // It only tells more: where it cannot be had, the answer stands.
    let Ok(known) = access.client.collections().await else { return };
    for known in known.iter().filter(|known| collections.contains(&known.name)) {
        if let Some(why) = words_only(&known.name, known.embedding_model.as_deref(), model) {
            context.ui.warn(format_args!("Warning: {why}."));
        }
    }
}
