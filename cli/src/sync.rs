//! Brings the index in line with a folder: sends what changed, deletes what vanished.
//!
//! The gateway's manifest (`GET /v1/documents`) says what is indexed, so a second run sends nothing,
//! and an interrupted run goes on where it stopped: there is no state on this side. Batches are
//! bounded and find their own size: a slow embedder gets small ones, so that no request runs into
//! the gateway's time limit.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::{Mutex, MutexGuard},
    time::{Duration, Instant},
};

use atlas_rag_gateway::source::{
    repo::Repository,
    walk::{self, Candidate, WalkOptions},
};
use atlas_shared::{
    UpstreamError,
    gateway_api::{
        DeleteDocuments, Document, DocumentOutcome, IndexedDocument, PutDocuments, PutDocumentsResult,
    },
    gateway_client::{GatewayClient, PutFailure},
};
use futures::future::join_all;
use tokio_util::sync::CancellationToken;

use crate::{
    error::{CliError, Result},
    ui::count,
};

/// Requests at once: one is written while another is chunked and the next one is read and sent.
const SENDERS: usize = 3;
/// A request that took longer than this makes the next ones smaller.
const SLOW: Duration = Duration::from_secs(8);
/// A request that took less than this lets the next ones grow.
const FAST: Duration = Duration::from_secs(2);
/// Transient failures in a row, of one sender, that end the run.
const MAX_FAILURES: u32 = 6;
/// A `Retry-After` longer than this is not waited for: the user runs the command again.
const LONGEST_WAIT: Duration = Duration::from_mins(1);
/// Sources in one delete request.
const DELETE_BATCH: usize = 500;

/// Where documents go.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    /// The collection.
    pub(crate) collection: String,
    /// The repository that documents belong to.
    pub(crate) repo: String,
    /// What git says of it.
    pub(crate) repository: Repository,
    /// False where the gateway is known to embed nothing.
    pub(crate) may_embed: bool,
}

/// What has to be done.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    /// New or changed: to send.
    pub(crate) changed: Vec<Candidate>,
    /// As indexed.
    pub(crate) unchanged: usize,
    /// Indexed, but no longer there: to delete.
    pub(crate) vanished: Vec<String>,
}

impl Plan {
    /// Compares files with the manifest. `in_scope` says which indexed sources this run may judge:
    /// what was not looked at has not vanished.
    pub(crate) fn new(
        files: Vec<Candidate>,
        manifest: &[IndexedDocument],
        repository: &Repository,
        in_scope: impl Fn(&str) -> bool,
    ) -> Self {
        let mut indexed: BTreeMap<&str, &IndexedDocument> =
            manifest.iter().map(|document| (document.source.as_str(), document)).collect();
        let mut plan = Self::default();
        let gone = repository.gone(manifest);
        for file in files {
            match indexed.remove(file.source.as_str()) {
                Some(known) if repository.is_indexed(&file, known, &gone) => plan.unchanged += 1,
                _ => plan.changed.push(file),
            }
        }
        // Shuffled, in the same way every time: the first ones are a fair sample, so the lengths that the collection
        // is weighed with at its beginning still hold at its end.
        plan.changed.sort_by(|a, b| a.hash.cmp(&b.hash));
        plan.vanished = indexed.into_keys().filter(|source| in_scope(source)).map(str::to_owned).collect();
        plan
    }
}

/// What was done.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    /// Documents that are searchable now and were not before.
    pub(crate) indexed: usize,
    /// Their chunks.
    pub(crate) chunks: usize,
    /// Tokens billed for embeddings.
    pub(crate) tokens: u64,
    /// Documents deleted.
    pub(crate) deleted: usize,
    /// Documents that could not be indexed, and why.
    pub(crate) failed: Vec<(String, String)>,
    /// Documents that were not sent because the user, or a failure, stopped the run.
    pub(crate) left: usize,
}

/// What a caller sees while documents are sent.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Progress {
    /// Documents finished, failed ones included.
    pub(crate) documents: usize,
    /// Chunks written.
    pub(crate) chunks: usize,
    /// Tokens billed.
    pub(crate) tokens: u64,
}

/// How much one request may carry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct BatchSize {
    documents: usize,
    bytes: u64,
}

impl BatchSize {
    /// Where each document may have to be embedded, at a speed that is not known yet.
    const CAREFUL: Self = Self { documents: 16, bytes: 256 * 1024 };
    /// Where nothing is embedded. A new collection is weighed by the average length of its first chunks, and weighing
    /// it anew later costs as much as writing it, so the first ones are many.
    const LEXICAL: Self = Self { documents: 128, bytes: 1024 * 1024 };
    const LARGEST: Self = Self { documents: 512, bytes: 4 * 1024 * 1024 };

    fn first(may_embed: bool) -> Self {
        if may_embed { Self::CAREFUL } else { Self::LEXICAL }
    }

    fn grown(self) -> Self {
        Self {
            documents: (self.documents * 2).min(Self::LARGEST.documents),
            bytes: (self.bytes * 2).min(Self::LARGEST.bytes),
        }
    }

    fn shrunk(self) -> Self {
        Self { documents: (self.documents / 2).max(1), bytes: (self.bytes / 2).max(16 * 1024) }
    }
}

/// What the senders share.
struct Shared {
    state: Mutex<State>,
    /// Nothing more is taken from the queue, nobody waits any longer.
    stopped: CancellationToken,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // A panic elsewhere leaves whole batches in or out of the queue: it can be used.
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

struct State {
    queue: VecDeque<Candidate>,
    size: BatchSize,
    outcome: Outcome,
    /// The failure that ended the run.
    fatal: Option<UpstreamError>,
}

impl State {
    /// The next batch; at least one document, however large.
    fn take(&mut self) -> Vec<Candidate> {
        let mut batch = Vec::new();
        let mut bytes = 0;
        while batch.len() < self.size.documents {
            let Some(next) = self.queue.front() else { break };
            if !batch.is_empty() && bytes + next.bytes > self.size.bytes {
                break;
            }
            bytes += next.bytes;
            batch.extend(self.queue.pop_front());
        }
        batch
    }

    fn give_back(&mut self, batch: Vec<Candidate>) {
        for file in batch.into_iter().rev() {
            self.queue.push_front(file);
        }
    }

    fn retry_smaller(&mut self, batch: Vec<Candidate>) {
        self.size = BatchSize { documents: batch.len().div_ceil(2), ..self.size.shrunk() };
        self.give_back(batch);
    }

    fn add(&mut self, answer: PutDocumentsResult) {
        self.outcome.tokens += answer.tokens;
        for result in answer.results {
            match result.outcome {
                DocumentOutcome::Indexed | DocumentOutcome::Unchanged => {
                    self.outcome.indexed += 1;
                    self.outcome.chunks += result.chunks;
                }
                DocumentOutcome::Failed => {
                    let why = result.error.unwrap_or_else(|| "no reason given".to_owned());
                    self.outcome.failed.push((result.source, why));
                }
            }
        }
    }

    fn book(&mut self, answer: PutDocumentsResult, took: Duration) {
        self.add(answer);
        if took > SLOW {
            self.size = self.size.shrunk();
        } else if took < FAST {
            self.size = self.size.grown();
        }
    }

    /// Books what was done before a failure. What is left of the batch.
    fn book_some(&mut self, done: PutDocumentsResult, mut batch: Vec<Candidate>) -> Vec<Candidate> {
        let sources: BTreeSet<String> = done.results.iter().map(|result| result.source.clone()).collect();
        batch.retain(|file| !sources.contains(&file.source));
        self.add(done);
        batch
    }

    fn progress(&self) -> Progress {
        Progress {
            documents: self.outcome.indexed + self.outcome.failed.len(),
            chunks: self.outcome.chunks,
            tokens: self.outcome.tokens,
        }
    }
}

/// Sends and deletes. Stops early, in a state from which the next run goes on, when `stop` resolves.
/// The outcome says what was done even when the run failed.
pub(crate) async fn run(
    client: &GatewayClient,
    target: &Target,
    plan: Plan,
    options: &WalkOptions,
    stop: impl Future<Output = ()>,
    progress: impl Fn(Progress),
) -> (Outcome, Result<()>) {
    let shared = Shared {
        state: Mutex::new(State {
            queue: plan.changed.into(),
            size: BatchSize::first(target.may_embed),
            outcome: Outcome::default(),
            fatal: None,
        }),
        stopped: CancellationToken::new(),
    };
    {
        let senders = join_all((0..SENDERS).map(|_| send(client, target, options, &shared, &progress)));
        tokio::pin!(senders, stop);
        tokio::select! {
            _ = &mut senders => {}
            () = &mut stop => {
                shared.stopped.cancel();
                // What is under way is finished: its answer says what was indexed.
                senders.await;
            }
        }
    }
    let stopped = shared.stopped.is_cancelled();
    let State { queue, mut outcome, fatal, .. } =
        shared.state.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    outcome.left = queue.len();
    if let Some(error) = fatal {
        let left = outcome.left;
        return (outcome, Err(explain(error, left)));
    }
    if stopped {
        return (outcome, Ok(()));
    }
    for sources in plan.vanished.chunks(DELETE_BATCH) {
        let request = DeleteDocuments {
            collection: Some(target.collection.clone()),
            repo: Some(target.repo.clone()),
            tenant: None,
            sources: sources.to_vec(),
        };
        if let Err(error) = client.delete_documents(&request).await {
            return (outcome, Err(error.into()));
        }
        outcome.deleted += sources.len();
    }
    (outcome, Ok(()))
}

/// A server that wants to be left alone for hours is not broken: the day's tokens are used up.
fn explain(error: UpstreamError, left: usize) -> CliError {
    match error {
        UpstreamError::Transient { message, retry_after: Some(after), .. } if after > LONGEST_WAIT => {
            let minutes = after.as_secs().div_ceil(60);
            CliError::failure(format!(
                "the gateway asks to come back in {} h {} min; {} left",
                minutes / 60,
                minutes % 60,
                count(left, "file")
            ))
            .because(message)
        }
        other => other.into(),
    }
}

/// One sender: takes batches until there are none, or until the run is stopped.
async fn send(
    client: &GatewayClient,
    target: &Target,
    options: &WalkOptions,
    shared: &Shared,
    progress: &impl Fn(Progress),
) {
    let mut failures = 0;
    while !shared.stopped.is_cancelled() {
        let batch = shared.state().take();
        if batch.is_empty() {
            return;
        }
        let documents = read_batch(&batch, target, options, shared);
        if documents.is_empty() {
            continue;
        }
        let request = PutDocuments { collection: Some(target.collection.clone()), documents };
        let started = Instant::now();
        match client.put_documents(&request).await {
            Ok(answer) => {
                failures = 0;
                shared.state().book(answer, started.elapsed());
            }
            Err(PutFailure { error, done }) => {
                failures = if done.results.is_empty() { failures + 1 } else { 1 };
                let batch = shared.state().book_some(done, batch);
                match next_step(&error, batch.len(), failures) {
                    Next::FailDocument => {
                        let mut state = shared.state();
                        for file in batch {
                            state.outcome.failed.push((file.source, error.to_string()));
                        }
                    }
                    Next::Retry(delay) => {
                        shared.state().retry_smaller(batch);
                        tokio::select! {
                            () = tokio::time::sleep(delay) => {}
                            () = shared.stopped.cancelled() => {}
                        }
                    }
                    Next::GiveUp => {
                        let mut state = shared.state();
                        state.give_back(batch);
                        state.fatal.get_or_insert(error);
                        shared.stopped.cancel();
                    }
                }
            }
        }
        progress(shared.state().progress());
    }
}

/// Reads the files of a batch again: what is sent is what is there now, and a file that has become
/// a secret since the walk is not sent.
fn read_batch(batch: &[Candidate], target: &Target, options: &WalkOptions, shared: &Shared) -> Vec<Document> {
    let mut documents = Vec::with_capacity(batch.len());
    for file in batch {
        match walk::read_again(file, options) {
            Ok(text) => documents.push(Document {
                source: file.source.clone(),
                text,
                repo: Some(target.repo.clone()),
                commit: target.repository.commit_of(&file.source).map(str::to_owned),
                origin: Some(target.repository.origin.clone()),
                // The walk has looked, or was told not to.
                restate: true,
                not_secret: true,
                ..Document::default()
            }),
            Err((reason, detail)) => {
                let why = detail.map_or_else(String::new, |detail| format!(": {detail}"));
                let why = format!("it changed while it was indexed ({}{why})", reason.describe());
                shared.state().outcome.failed.push((file.source.clone(), why));
            }
        }
    }
    documents
}

/// What to do after a failed request.
#[derive(Debug, PartialEq, Eq)]
enum Next {
    /// The gateway will never take this document.
    FailDocument,
    /// Again, with smaller batches, after a while.
    Retry(Duration),
    /// End the run.
    GiveUp,
}

fn next_step(error: &UpstreamError, documents: usize, failures: u32) -> Next {
    match error {
        UpstreamError::Misconfigured { .. } => Next::GiveUp,
        // About the collection or its disk, not about a document: the next one would fail in the same way.
        UpstreamError::Permanent { code, .. } if code == "embedding_mismatch" || code == "disk_full" => {
            Next::GiveUp
        }
        // One bad document must not fail its batch: halves find it.
        UpstreamError::Permanent { .. } if documents > 1 => Next::Retry(Duration::ZERO),
        UpstreamError::Permanent { .. } => Next::FailDocument,
        UpstreamError::Transient { .. } if failures >= MAX_FAILURES => Next::GiveUp,
        UpstreamError::Transient { retry_after: Some(after), .. } if *after > LONGEST_WAIT => Next::GiveUp,
        UpstreamError::Transient { retry_after, .. } => {
            let backoff = Duration::from_millis(250) * 2_u32.pow(failures.min(6));
            Next::Retry(retry_after.unwrap_or(backoff))
        }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use atlas_shared::Dependency;
    use atlas_test_support::git;

    use super::*;

    fn file(source: &str, hash: &str, bytes: u64) -> Candidate {
        Candidate {
            path: source.into(),
            source: source.to_owned(),
            hash: hash.to_owned(),
            bytes,
            encoding: None,
        }
    }

    #[test]
    fn what_came_from_elsewhere_or_had_no_commit_is_sent_again() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("a.md"), "a").unwrap();
        git(dir.path(), &["init", "--quiet"]);
        git(dir.path(), &["add", "."]);
        git(dir.path(), &["commit", "--quiet", "-m", "first"]);
        let here = Repository::around(dir.path());
        let origin = Some(here.origin.clone());
        let known = |commit: Option<&str>, origin: Option<String>| IndexedDocument {
            commit: commit.map(str::to_owned),
            origin,
            ..indexed("a.md", "1")
        };
        for (document, is_unchanged) in [
            (known(Some("older"), origin.clone()), true),
            (known(Some("older"), None), true),
            (known(None, origin), false),
            (known(Some("older"), Some("example.org/other".to_owned())), false),
        ] {
            let plan =
                Plan::new(vec![file("a.md", "1", 1)], std::slice::from_ref(&document), &here, |_| true);
            assert_eq!(plan.unchanged == 1, is_unchanged, "{document:?}");
        }
    }

    fn indexed(source: &str, hash: &str) -> IndexedDocument {
        IndexedDocument {
            source: source.to_owned(),
            content_hash: hash.to_owned(),
            chunks: 1,
            commit: None,
            origin: None,
            repo: None,
        }
    }

    fn state(files: impl IntoIterator<Item = Candidate>, size: BatchSize) -> State {
        State { queue: files.into_iter().collect(), size, outcome: Outcome::default(), fatal: None }
    }

    #[test]
    fn only_what_differs_is_sent_and_only_what_was_looked_at_can_vanish() {
        let plan = Plan::new(
            vec![file("docs/new.md", "1", 1), file("docs/changed.md", "2", 1), file("docs/same.md", "3", 1)],
            &[
                indexed("docs/changed.md", "old"),
                indexed("docs/gone.md", "4"),
                indexed("docs/same.md", "3"),
                indexed("src/not-looked-at.rs", "5"),
            ],
            &Repository::default(),
            |source| source.starts_with("docs/"),
        );
        let sources: Vec<_> = plan.changed.iter().map(|file| file.source.as_str()).collect();
        assert_eq!(sources, ["docs/new.md", "docs/changed.md"]);
        assert_eq!(plan.unchanged, 1);
        assert_eq!(plan.vanished, ["docs/gone.md"]);
    }

    #[test]
    fn a_batch_is_bounded_in_documents_and_bytes_but_never_empty() {
        let size = BatchSize { documents: 2, bytes: 100 };
        let mut state = state(
            [file("huge", "", 500), file("a", "", 60), file("b", "", 60), file("c", "", 1), file("d", "", 1)],
            size,
        );
        let mut batches = Vec::new();
        loop {
            let batch = state.take();
            if batch.is_empty() {
                break;
            }
            batches.push(batch.into_iter().map(|file| file.source).collect::<Vec<_>>());
        }
        assert_eq!(batches, [vec!["huge"], vec!["a"], vec!["b", "c"], vec!["d"]]);
    }

    #[test]
    fn a_failed_batch_is_halved_until_the_bad_document_is_alone() {
        let permanent = UpstreamError::permanent(Dependency::Gateway, "bad", "no");
        let mut state = state(["a", "b", "c", "d"].map(|name| file(name, "", 1)), BatchSize::CAREFUL);
        let batch = state.take();
        assert_eq!(next_step(&permanent, batch.len(), 1), Next::Retry(Duration::ZERO));
        state.retry_smaller(batch);
        let batch = state.take();
        assert_eq!(batch.len(), 2, "half of four");
        state.retry_smaller(batch);
        let batch = state.take();
        assert_eq!(batch.len(), 1);
        assert_eq!(next_step(&permanent, batch.len(), 3), Next::FailDocument);
        assert_eq!(state.queue.len(), 3, "the others are still to be sent");
    }

    #[test]
    fn waiting_is_bounded_and_a_wrong_key_is_not_retried() {
        let wait = |seconds| UpstreamError::Transient {
            dependency: Dependency::Gateway,
            message: "later".to_owned(),
            retry_after: Some(Duration::from_secs(seconds)),
        };
        assert_eq!(next_step(&wait(5), 8, 1), Next::Retry(Duration::from_secs(5)));
        assert_eq!(next_step(&wait(36_000), 8, 1), Next::GiveUp);
        assert_eq!(next_step(&wait(5), 8, MAX_FAILURES), Next::GiveUp);
        let explained = explain(wait(36_000), 3).to_string();
        assert_eq!(explained, "the gateway asks to come back in 10 h 0 min; 3 files left\n  why: later");
        let key = UpstreamError::misconfigured(Dependency::Gateway, "RAG_API_KEY", "401", "set it");
        assert_eq!(next_step(&key, 8, 1), Next::GiveUp);
    }
}
