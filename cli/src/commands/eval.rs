//! `atlas eval`: how good is the search, in the measures of the field.

use std::{
    collections::{BTreeMap, HashMap},
    path::PathBuf,
    time::Duration,
};

use atlas_shared::{
    UpstreamError,
    config::Bm25Config,
    gateway_api::{
        DeleteDocuments, Document, DocumentOutcome, PutDocuments, QueryChatRequest, SearchMode, content_hash,
    },
    gateway_client::QueryAnswer,
};
use futures::{StreamExt as _, TryStreamExt as _};
use url::Url;

use crate::{
    context::Context,
    error::{CliError, Result},
    eval::{
        dataset::{CorpusDocument, Dataset},
        measure::{Measures, measure},
        report::{Mode, Run},
    },
    signals::Stop,
    stack::GatewayAccess,
    ui::count,
};

/// Documents of one request to the gateway, and the bytes they may have together.
const BATCH_DOCUMENTS: usize = 100;
const BATCH_BYTES: usize = 1 << 20;
/// Queries under way at once.
const CONCURRENT_QUERIES: usize = 8;
/// Documents that are ranked: recall@100 looks no further.
const RANKED: usize = 100;
/// How often a call is tried again, and the pause where the gateway names none.
const RETRIES: usize = 30;
const PAUSE: Duration = Duration::from_secs(1);
const BAR: &str = "{msg:10} {bar:40} {pos}/{len} {left}";

/// Measure the search on a test collection (BEIR layout)
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  atlas eval --dataset cranfield
  atlas eval --dataset cranfield --save before.json
  atlas eval --dataset cranfield --compare before.json
  atlas eval --compare before.json after.json

The folder holds corpus.jsonl, queries.jsonl and qrels/test.tsv, as the BEIR benchmark has them. The
corpus is indexed through the gateway, into a collection of its own that is kept: the next run indexes
nothing again (--drop empties it). Embeddings cost tokens, as any indexing does. A mode that the
gateway cannot serve (no embedding model, no reranker) is named and not measured.

Asks the gateway at --gateway or RAG_URL, else the running `atlas dev`, else starts one of its own
on the embedded index.

Every measure has its 95 % bootstrap interval over the queries. Differences between the modes, and to
the run that --compare names, are tested with Fisher's paired randomisation test; below p = 0.05 they
are called significant.")]
pub(crate) struct Eval {
    /// Folder of the test collection
    #[arg(long, value_name = "DIR", required_unless_present = "compare")]
    dataset: Option<PathBuf>,

    /// Which judgements: qrels/SPLIT.tsv
    #[arg(long, value_name = "SPLIT", default_value = "test")]
    split: String,

    /// Ask the gateway at this address instead of RAG_URL
    #[arg(long, value_name = "URL")]
    gateway: Option<Url>,

    /// Which ways of searching. Without it: all that the gateway can
    #[arg(long = "mode", value_name = "MODES", value_delimiter = ',', value_enum)]
    modes: Vec<Mode>,

    /// Leave out documents that have the query's own id (for collections that ask with documents)
    #[arg(long)]
    ignore_same_id: bool,

    /// Measure only the first N queries
    #[arg(long, value_name = "N")]
    limit: Option<usize>,

    /// Write the measures of every query to FILE
    #[arg(long, value_name = "FILE")]
    save: Option<PathBuf>,

    /// Compare with a saved run; without --dataset, the second one with the first
    #[arg(long, value_name = "FILE", num_args = 1..=2)]
    compare: Vec<PathBuf>,

    /// Empty the collection afterwards
    #[arg(long)]
    drop: bool,

    /// Print the run as JSON
    #[arg(long)]
    json: bool,
}

/// What a mode asks the gateway for.
fn search_mode(mode: Mode) -> SearchMode {
    match mode {
        Mode::Lexical => SearchMode::Lexical,
        Mode::Dense => SearchMode::Dense,
        Mode::Hybrid | Mode::Rerank => SearchMode::Hybrid,
    }
}

impl Eval {
    pub(crate) async fn run(self, context: &Context) -> Result<()> {
        let before = self.compare.first().map(|path| Run::load(path)).transpose()?;
        let run = match (&self.dataset, self.compare.get(1)) {
            (Some(_), Some(_)) => {
                return Err(CliError::usage("--compare takes one file where a dataset is measured"));
            }
            (Some(dir), None) => {
                let dataset = Dataset::read(dir, &self.split)?;
                let mut stop = Stop::listen()?;
                let access = GatewayAccess::open_at(context, "eval", self.gateway.clone()).await?;
                let measured = stop.unless_stopped(self.measure(context, &access, dataset)).await;
                access.close().await;
                measured?
            }
            (None, Some(after)) => Run::load(after)?,
            (None, None) => {
                return Err(CliError::usage("there is nothing to compare with")
                    .fix("atlas eval --compare BEFORE.json AFTER.json, or name a --dataset"));
            }
        };
        if run.modes.is_empty() {
            let why: Vec<String> = run.left_out.iter().map(|(mode, why)| format!("{mode}: {why}")).collect();
            return Err(CliError::failure("nothing was measured").because(why.join("; ")));
        }
        if let Some(path) = &self.save {
            run.save(path)?;
        }
        if self.json {
            return context.ui.json(&run);
        }
        context.ui.out(format_args!(
            "{}: {}, embeddings: {}",
            run.dataset,
            count(run.documents, "document"),
            run.embedding_model.as_deref().unwrap_or("none")
        ));
        context.ui.out(run.table());
        if let Some(table) = run.modes_compared() {
            context.ui.out("");
            context.ui.out(table);
        }
        for (mode, why) in &run.left_out {
            context.ui.out(format_args!("{mode}: not measured, {why}"));
        }
        if let Some(before) = before {
            context.ui.out("");
            context.ui.out(run.compared_with(&before)?);
        }
        Ok(())
    }

    async fn measure(&self, context: &Context, access: &GatewayAccess, mut dataset: Dataset) -> Result<Run> {
        dataset.queries.truncate(self.limit.unwrap_or(usize::MAX));
        let collection = collection_name(&dataset, access.config.gateway.bm25);
        self.index(context, access, &dataset, &collection).await?;
        let embedding_model = access
            .client
            .collections()
            .await?
            .into_iter()
            .find(|known| known.name == collection)
            .and_then(|known| known.embedding_model);

        let (mut modes, mut left_out) = (BTreeMap::new(), BTreeMap::new());
        for mode in self.modes() {
            let found = if mode != Mode::Lexical && embedding_model.is_none() {
                Err("the gateway has no embedding model (OPENAI_EMBEDDING_MODEL, OPENAI_API_KEY)".to_owned())
            } else {
                self.search(context, access, &dataset, &collection, mode).await?
            };
            match found {
                Ok(measures) => drop(modes.insert(mode, measures)),
                Err(why) => drop(left_out.insert(mode, why)),
            }
        }
        if self.drop {
            let sources = (0..dataset.corpus.len()).map(source).collect::<Vec<_>>();
            for sources in sources.chunks(1000) {
                let request = DeleteDocuments {
                    collection: Some(collection.clone()),
                    sources: sources.to_vec(),
                    repo: None,
                    tenant: None,
                };
                patiently(|| access.client.delete_documents(&request)).await?;
            }
        }
        Ok(Run {
            dataset: dataset.name,
            documents: dataset.corpus.len(),
            atlas: env!("CARGO_PKG_VERSION").to_owned(),
            embedding_model,
            modes,
            left_out,
        })
    }

    fn modes(&self) -> Vec<Mode> {
        Mode::ALL.into_iter().filter(|mode| self.modes.is_empty() || self.modes.contains(mode)).collect()
    }

    async fn index(
        &self,
        context: &Context,
        access: &GatewayAccess,
        dataset: &Dataset,
        collection: &str,
    ) -> Result<()> {
        let bar = context.ui.bar(dataset.corpus.len() as u64, BAR).with_message("indexing");
        let mut at = 0;
        while at < dataset.corpus.len() {
            let mut documents = Vec::new();
            let mut bytes = 0;
            while let Some(document) = dataset.corpus.get(at)
                && documents.len() < BATCH_DOCUMENTS
                && (documents.is_empty() || bytes + document.text.len() < BATCH_BYTES)
            {
                let text = text(document);
                bytes += text.len();
                documents.push(Document {
                    source: source(at),
                    text,
                    lang: Some("markdown".to_owned()),
                    // A public dataset, all of which must be there.
                    not_secret: true,
                    ..Document::default()
                });
                at += 1;
            }
            let request = PutDocuments { collection: Some(collection.to_owned()), documents };
            let put = async || access.client.put_documents(&request).await.map_err(UpstreamError::from);
            let answer = patiently(put).await?;
            if let Some(failed) =
                answer.results.iter().find(|result| result.outcome == DocumentOutcome::Failed)
            {
                return Err(CliError::failure(format!("document {} was not indexed", failed.source))
                    .because(failed.error.as_deref().unwrap_or("the gateway did not say why")));
            }
            bar.set_position(at as u64);
        }
        bar.finish_and_clear();
        Ok(())
    }

    /// Measures one mode, or says why the gateway did not search so.
    async fn search(
        &self,
        context: &Context,
        access: &GatewayAccess,
        dataset: &Dataset,
        collection: &str,
        mode: Mode,
    ) -> Result<std::result::Result<BTreeMap<String, Measures>, String>> {
        let ids: HashMap<String, &str> = dataset
            .corpus
            .iter()
            .enumerate()
            .map(|(at, document)| (source(at), document.id.as_str()))
            .collect();
        let bar = context.ui.bar(dataset.queries.len() as u64, BAR).with_message("searching");
        let answers: Vec<std::result::Result<_, String>> = futures::stream::iter(&dataset.queries)
            .map(|query| {
                let (ids, bar) = (&ids, &bar);
                async move {
                    let request = QueryChatRequest {
                        query: query.text.clone(),
                        top_k: Some(RANKED),
                        collection: Some(collection.to_owned()),
                        mode: Some(search_mode(mode)),
                        relevancy_threshold: Some(0.0),
                        collapse_by_file: Some(true),
                        rerank: Some(mode == Mode::Rerank),
                        passage_tokens: Some(0),
                        ..QueryChatRequest::default()
                    };
                    let QueryAnswer { passages, degraded } =
                        patiently(|| access.client.query_chat(&request)).await?;
                    bar.inc(1);
                    // What was not measured is not shown as if it had been.
                    if let Some(how) = degraded.filter(|_| mode != Mode::Lexical) {
                        let why = if how.contains("unreranked") {
                            "; the gateway has no reranker (RERANK_URL), or it did not answer in time"
                        } else {
                            ""
                        };
                        return Ok::<_, CliError>(Err(format!("an answer was {how}{why}")));
                    }
                    let ranking: Vec<String> = passages
                        .iter()
                        .filter_map(|passage| ids.get(&passage.source).map(|id| (*id).to_owned()))
                        .filter(|id| !(self.ignore_same_id && *id == query.id))
                        .collect();
                    let graded = dataset.judgements.get(&query.id).cloned().unwrap_or_default();
                    Ok(Ok((query.id.clone(), measure(&ranking, &graded))))
                }
            })
            .buffer_unordered(CONCURRENT_QUERIES)
            .try_collect()
            .await?;
        bar.finish_and_clear();
        Ok(answers.into_iter().collect())
    }
}

/// Named by what is in it and how it is weighed: another corpus or setting never mixes with it.
fn collection_name(dataset: &Dataset, bm25: Bm25Config) -> String {
    let mut all = format!("{} {bm25:?}", dataset.name);
    for document in &dataset.corpus {
        all.push_str(&content_hash(&format!("{}\n{}", document.id, text(document))));
    }
    format!("eval-{}", &content_hash(&all)[..16])
}

/// The name under which a document is indexed: the collection's own ids may be anything.
fn source(at: usize) -> String {
    format!("d{at}")
}

/// Title and text as Markdown, so that the title is the heading that it is.
fn text(document: &CorpusDocument) -> String {
    let title =
        document.title.as_deref().unwrap_or_default().split_whitespace().collect::<Vec<_>>().join(" ");
    if title.is_empty() { document.text.clone() } else { format!("# {title}\n\n{}", document.text) }
}

/// Tries again what may pass: rate limits, a gateway that restarts.
async fn patiently<T, F: Future<Output = Result<T, UpstreamError>>>(call: impl Fn() -> F) -> Result<T> {
    let mut tries = 0;
    loop {
        match call().await {
            Err(UpstreamError::Transient { retry_after, .. }) if tries < RETRIES => {
                tries += 1;
                tokio::time::sleep(retry_after.unwrap_or(PAUSE).min(Duration::from_secs(60))).await;
            }
            result => return Ok(result?),
        }
    }
}
