//! The gateway's HTTP contract (DESIGN section 7): the types of requests and answers.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Response header that says how an answer is less than it could be: `lexical`, `unreranked`, `stale`,
/// or several of them, separated by `, `.
pub const DEGRADED_HEADER: &str = "x-atlas-degraded";

/// Longest query, in bytes, without blanks around it: a task's whole text may be one.
pub const MAX_QUERY_BYTES: usize = 32 * 1024;

/// `POST /v1/query_chat`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct QueryChatRequest {
    /// What to look for, in words.
    #[schema(min_length = 1, max_length = 32768, pattern = r"\S")]
    pub query: String,
    /// How many passages at most, 1 to `MAX_TOP_K` (100 unless set otherwise); the gateway's default when missing.
    #[schema(minimum = 1, maximum = 1000)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub top_k: Option<usize>,
    /// Which collection; the gateway's default when missing.
    #[schema(pattern = r"^[A-Za-z0-9_-][A-Za-z0-9._-]*(@[1-9][0-9]{0,17})?$")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub collection: Option<String>,
    /// Several collections, up to 16, searched as one, and with `collection` where that is given too.
    #[schema(min_items = 1, max_items = 16)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub collections: Option<Vec<String>>,
    /// Which lists are searched; `hybrid` when missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<SearchMode>,
    /// Drop passages whose cosine is below this, 0 to 1. Ignored for passages without a cosine.
    /// The default depends on the embedding model.
    #[schema(minimum = 0, maximum = 1)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub relevancy_threshold: Option<f32>,
    /// At most one passage a file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub collapse_by_file: Option<bool>,
    /// Reorder the best candidates with the reranker (`RERANK_URL`). True when missing and there is one;
    /// where true is asked for and there is none, the answer is marked `unreranked`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rerank: Option<bool>,
    /// Maximal marginal relevance: from 0 (relevance alone, the default) to 1 (passages that repeat
    /// what is there already come last).
    #[schema(minimum = 0, maximum = 1)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub diversity: Option<f32>,
    /// Join passages with their neighbours in the file, up to this many tokens each; 0: never. The
    /// gateway's default (`PASSAGE_TOKENS`) when missing.
    #[schema(maximum = 100_000)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub passage_tokens: Option<usize>,
    /// Only passages that match.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub filter: Option<QueryFilter>,
}

/// Which lists of a collection a query searches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum SearchMode {
    /// Both, fused.
    #[default]
    Hybrid,
    /// BM25 alone: no embedding is asked for.
    Lexical,
    /// Cosine alone. Where there are no embeddings it is BM25, and the answer says so.
    Dense,
}

/// Which passages may be found.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct QueryFilter {
    /// A glob over `source`, such as `docs/**/*.md`; `*.md` is Markdown at any depth, `docs` all below such folders,
    /// `!tests/**` all but these.
    #[schema(max_length = 1024)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// A language, such as `rust`.
    #[schema(max_length = 1024)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lang: Option<String>,
    /// A repository name, as it was indexed.
    #[schema(max_length = 1024)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub repo: Option<String>,
    /// A tenant: its passages, and those that belong to nobody. Without it: only the latter.
    #[schema(max_length = 1024)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tenant: Option<String>,
}

/// One passage of an answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Passage {
    /// The passage, exactly the lines it names.
    pub text: String,
    /// Cosine in [0, 1]; null where there is none (lexical search).
    pub similarity: Option<f32>,
    /// Path of the file inside its repository, or the name given at indexing.
    pub source: String,
    /// First line, counted from 1.
    pub start_line: u32,
    /// Last line, included.
    pub end_line: u32,
    /// Heading path or symbol, such as `Guide › Install`.
    pub heading: Option<String>,
    /// The reranker's score, or the fused one: only its order within one answer means something.
    pub score: f32,
    /// Where it was found.
    pub collection: String,
    /// Language, when known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lang: Option<String>,
    /// Repository, when known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub repo: Option<String>,
    /// Commit, when known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub commit: Option<String>,
}

impl Passage {
    /// These lines of a file, and nothing else known about them.
    pub fn of_lines(collection: &str, source: &str, start_line: u32, text: &str) -> Self {
        let more = u32::try_from(text.lines().count().saturating_sub(1)).unwrap_or(u32::MAX);
        Self {
            text: text.to_owned(),
            similarity: None,
            source: source.to_owned(),
            start_line,
            end_line: start_line.saturating_add(more),
            heading: None,
            score: 0.0,
            collection: collection.to_owned(),
            lang: None,
            repo: None,
            commit: None,
        }
    }
}

/// A document to index. A bare string in `/v1/embed_batch` is a document named by its hash.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Document {
    /// Path of the file inside its repository, or any stable name. A document without one fails, the others do not.
    pub source: String,
    /// The whole text, UTF-8.
    pub text: String,
    /// Language; guessed from `source` when missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lang: Option<String>,
    /// Repository name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub repo: Option<String>,
    /// Commit it was read at. One that was indexed without a commit gets it, though its text is the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub commit: Option<String>,
    /// The sender has seen that the commit which is known for it may be in no history any more (squashed, amended,
    /// rebased): `commit` takes its place, though the text is the same.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub restate: bool,
    /// Where its repository lies: the address of its remote without credentials, its folder, or `ADDRESS in FOLDER`.
    /// Senders compare it, so that two repositories of one name do not replace each other.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub origin: Option<String>,
    /// Tenant it belongs to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tenant: Option<String>,
    /// The sender has looked for credentials itself, or knows that these are none. Without it a document that
    /// holds what an issuer of credentials gives out (an AWS access key, a private key, a token) is not indexed.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub not_secret: bool,
}

/// `POST /v1/embed_batch?collection=…`: an array of these.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(untagged)]
pub enum EmbedItem {
    /// A text without a name.
    Text(String),
    /// A named document.
    Document(Document),
}

/// The answer to `POST /v1/embed_batch`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct JobCreated {
    /// For `GET /v1/jobs/{id}`.
    pub job_id: String,
}

/// Where an index job is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum JobState {
    /// Waiting.
    Queued,
    /// At work.
    Running,
    /// Finished; single documents may have failed.
    Done,
    /// Stopped by an error.
    Failed,
}

/// `GET /v1/jobs/{id}`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct JobStatus {
    /// Its id.
    pub job_id: String,
    /// Where it is.
    pub state: JobState,
    /// Documents in the job.
    pub documents: usize,
    /// Documents finished, unchanged ones included.
    pub documents_done: usize,
    /// Chunks written.
    pub chunks: usize,
    /// Tokens billed for embeddings.
    pub tokens: u64,
    /// The first errors, in words.
    pub errors: Vec<String>,
    /// What it waits for, in words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
}

/// `PUT /v1/documents`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PutDocuments {
    /// Which collection; the gateway's default when missing. Created when it does not exist.
    #[schema(pattern = r"^[A-Za-z0-9_-][A-Za-z0-9._-]*(@[1-9][0-9]{0,17})?$")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub collection: Option<String>,
    /// What to index, bounded by `MAX_BODY_BYTES`.
    #[schema(min_items = 1)]
    pub documents: Vec<Document>,
}

/// What happened to one document.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum DocumentOutcome {
    /// Same content as indexed: nothing was written, nothing was embedded.
    Unchanged,
    /// Its chunks are searchable.
    Indexed,
    /// It was not indexed; see `error`.
    Failed,
}

/// One line of the answer to `PUT /v1/documents`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct DocumentResult {
    /// Which document.
    pub source: String,
    /// What happened.
    pub outcome: DocumentOutcome,
    /// How many chunks it has now.
    pub chunks: usize,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// The answer to `PUT /v1/documents`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PutDocumentsResult {
    /// One a document, in order.
    pub results: Vec<DocumentResult>,
    /// Tokens billed for embeddings.
    pub tokens: u64,
}

/// `DELETE /v1/documents`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DeleteDocuments {
    /// Which collection; the gateway's default when missing.
    #[schema(pattern = r"^[A-Za-z0-9_-][A-Za-z0-9._-]*(@[1-9][0-9]{0,17})?$")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub collection: Option<String>,
    /// Repository the sources belong to, when they were indexed with one.
    #[schema(pattern = r"^[^\x00-\x1f\x7f-\x9f]*$")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub repo: Option<String>,
    /// Tenant the sources belong to, when they were indexed with one.
    #[schema(pattern = r"^[^\x00-\x1f\x7f-\x9f]*$")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tenant: Option<String>,
    /// Sources to delete.
    #[schema(min_items = 1)]
    pub sources: Vec<String>,
}

/// The answer to `DELETE /v1/documents`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DeleteDocumentsResult {
    /// How many of the sources were there.
    pub deleted: usize,
}

/// `GET /v1/documents?collection=…&repo=…&tenant=…`: what is indexed, so that a client sends only what changed.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct DocumentList {
    /// One a document, by source.
    pub documents: Vec<IndexedDocument>,
    /// Why nothing can be found or added with the embedding model that is configured, as a search says it
    /// (`embedding_mismatch`); missing where the collection fits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mismatch: Option<String>,
    /// Why the collection is searched by words only, although it need not be, and what to do; missing where it is not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub words_only: Option<String>,
}

/// One indexed document.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct IndexedDocument {
    /// Its name.
    pub source: String,
    /// [`content_hash`] of the text it was indexed from; empty when it should be sent again although
    /// it did not change (the gateway would cut it into other chunks today).
    pub content_hash: String,
    /// How many chunks it has.
    pub chunks: usize,
    /// The commit it was read at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub commit: Option<String>,
    /// Where its repository lies, as its sender said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub origin: Option<String>,
    /// Repository it belongs to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub repo: Option<String>,
}

/// Longest `source` (and `origin`) of a document, in bytes.
pub const MAX_SOURCE_BYTES: usize = 1024;

/// What is wrong with the name of a document, if anything.
pub fn source_fault(source: &str) -> Option<String> {
    if source.trim().is_empty() {
        return Some("is empty".to_owned());
    }
    (source.len() > MAX_SOURCE_BYTES || source.chars().any(char::is_control))
        .then(|| format!("is longer than {MAX_SOURCE_BYTES} bytes or has control characters"))
}

/// The hash by which the gateway and its clients see whether a document changed: SHA-256 in hex.
pub fn content_hash(text: &str) -> String {
    use sha2::{Digest, Sha256};
    use std::fmt::Write as _;

    Sha256::digest(text.as_bytes()).iter().fold(String::with_capacity(64), |mut hex, byte| {
        // Writing to a String cannot fail.
        let _ = write!(hex, "{byte:02x}");
        hex
    })
}

/// The hash by which anybody can check a citation against the file it names: [`content_hash`] of its
/// lines, joined by `\n`, without line ends of another kind and without one at the end.
pub fn quote_hash(text: &str) -> String {
    content_hash(&text.lines().collect::<Vec<_>>().join("\n"))
}

/// One line of `GET /v1/collections`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct CollectionInfo {
    /// Its name.
    pub name: String,
    /// Chunks in it.
    pub chunks: u64,
    /// Embedding model it was built with; null for lexical collections.
    pub embedding_model: Option<String>,
    /// Length of its vectors.
    pub embedding_size: Option<usize>,
    /// The generation that the name stands for, such as `docs@2`; null for a generation itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generation: Option<String>,
}

/// Why a collection is searched by words only, although it need not be, and what to do, by the embedding models
/// that it was built with and that is configured; `None`: it is not, or there is no model for anything else.
pub fn words_only(collection: &str, built_with: Option<&str>, configured: Option<&str>) -> Option<String> {
    match (built_with, configured) {
        (None, Some(configured)) => Some(format!(
            "collection {collection:?} is searched by words only: it was built without embeddings, and {configured} is \
             configured. `atlas index --rebuild` embeds what is in it; or index into another collection (RAG_COLLECTION)"
        )),
        (Some(built_with), None) => Some(format!(
            "collection {collection:?} is searched by words only, and nothing can be added to it: it was built with \
             embedding model {built_with}, and none is configured. Set OPENAI_EMBEDDING_MODEL and its key, or make it \
             one of words only (`atlas index --rebuild`)"
        )),
        (None, None) | (Some(_), Some(_)) => None,
    }
}

/// The answer to `POST /v1/collections/{name}/rebuild`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct RebuildStarted {
    /// For `GET /v1/jobs/{id}`.
    pub job_id: String,
    /// The generation that is filled.
    pub generation: String,
    /// The generation that is in use until the new one is, and kept afterwards.
    pub old: String,
}

/// `PUT /v1/collections/{name}/generation`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct UseGeneration {
    /// The generation that the name shall stand for.
    #[schema(pattern = r"^[A-Za-z0-9_-][A-Za-z0-9._-]*@[1-9][0-9]{0,17}$")]
    pub generation: String,
}

/// `POST /v1/index`: a folder or a git repository that the gateway reads by itself. It must be below one of
/// `INDEX_ALLOWED_ROOTS` or `INDEX_ALLOWED_URLS`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct IndexRepository {
    /// A git URL (with `#branch`), or a folder on the gateway's machine.
    #[schema(min_length = 1, pattern = r"\S")]
    pub repo: String,
    /// Only this file or folder of it. Of one that was deleted the documents go; one that is not there, and of which
    /// nothing is indexed, fails the job.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// Which collection; the gateway's default when missing.
    #[schema(pattern = r"^[A-Za-z0-9_-][A-Za-z0-9._-]*(@[1-9][0-9]{0,17})?$")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub collection: Option<String>,
}

/// An `application/problem+json` error (RFC 9457).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Problem {
    /// A stable code in snake case.
    #[serde(rename = "type")]
    pub kind: String,
    /// What happened, in a few words.
    pub title: String,
    /// HTTP status.
    pub status: u16,
    /// What happened, why, and what to do.
    pub detail: String,
    /// Of a request with documents: what was done of it before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub done: Option<PutDocumentsResult>,
}
