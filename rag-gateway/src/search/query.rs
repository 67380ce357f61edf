//! A query, checked, with its defaults filled in.

use atlas_shared::gateway_api::{MAX_QUERY_BYTES, QueryChatRequest, QueryFilter, SearchMode};
use globset::GlobSet;
use serde::Serialize;
use sha2::{Digest as _, Sha256};

use super::SearchConfig;
use crate::{error::GatewayError, index::names, source::walk::globs};

/// Longest value of a filter: no name or path that can be indexed is longer.
const MAX_FILTER_BYTES: usize = 1024;

/// Collections in one query.
const MAX_COLLECTIONS: usize = 16;

/// Largest `passage_tokens`.
const MAX_PASSAGE_TOKENS: usize = 100_000;

/// Raised when the same query over the same index gives another answer than before: cached answers of
/// an older release are then void.
const PIPELINE: u32 = 4;

/// A valid query.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Query {
    pub(super) text: String,
    pub(super) top_k: usize,
    /// By name, each once.
    pub(super) collections: Vec<String>,
    pub(super) mode: SearchMode,
    /// `None`: by embedding model.
    pub(super) threshold: Option<f32>,
    pub(super) collapse_by_file: bool,
    pub(super) rerank: bool,
    /// It was asked for by name: an answer without it is less than that.
    pub(super) must_rerank: bool,
    pub(super) diversity: f32,
    pub(super) passage_tokens: usize,
    /// Not of the request, but replicas that are set otherwise must not share answers.
    pub(super) secondary_weight: f32,
    pub(super) path: Option<String>,
    pub(super) lang: Option<String>,
    pub(super) repo: Option<String>,
    pub(super) tenant: Option<String>,
}

/// Which sources may be found.
pub(super) struct PathFilter {
    globs: GlobSet,
    /// All but those that match.
    others: bool,
}

impl PathFilter {
    pub(super) fn is_match(&self, source: &str) -> bool {
        self.globs.is_match(source) != self.others
    }
}

/// What tells an answer from any other: a hash of the query and of everything that shapes its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Key(pub(crate) [u8; 32]);

impl Query {
    /// Checks a request. What is wrong is said with the field's name.
    pub(super) fn new(request: QueryChatRequest, config: &SearchConfig) -> Result<Self, GatewayError> {
        let QueryChatRequest {
            query,
            top_k,
            collection,
            collections,
            mode,
            relevancy_threshold,
            collapse_by_file,
            rerank,
            diversity,
            passage_tokens,
            filter,
        } = request;
        let text = query.trim().to_owned();
        if text.is_empty() {
            return Err(invalid("`query` is empty; say in words what to look for"));
        }
        if text.len() > MAX_QUERY_BYTES {
            let length = text.len();
            return Err(invalid(format!(
                "`query` has {length} bytes; at most {MAX_QUERY_BYTES} are allowed"
            )));
        }
        let top_k = top_k.unwrap_or_else(|| config.default_top_k.min(config.max_top_k));
        if !(1..=config.max_top_k).contains(&top_k) {
            return Err(invalid(format!(
                "`top_k` is {top_k}; it must be from 1 to {} (MAX_TOP_K)",
                config.max_top_k
            )));
        }
        let threshold = relevancy_threshold.or(config.default_threshold);
        for (name, value) in [("relevancy_threshold", threshold), ("diversity", diversity)] {
            if value.is_some_and(|value| !(0.0..=1.0).contains(&value)) {
                return Err(invalid(format!("`{name}` must be from 0 to 1")));
            }
        }
        let passage_tokens = passage_tokens.unwrap_or(config.passage_tokens);
        if passage_tokens > MAX_PASSAGE_TOKENS {
            return Err(invalid(format!("`passage_tokens` must be from 0 to {MAX_PASSAGE_TOKENS}")));
        }
        let QueryFilter { path, lang, repo, tenant } = filter.unwrap_or_default();
        for (name, value) in [("path", &path), ("lang", &lang), ("repo", &repo), ("tenant", &tenant)] {
            if value.as_ref().is_some_and(|value| value.len() > MAX_FILTER_BYTES) {
                return Err(invalid(format!("`filter.{name}` is longer than {MAX_FILTER_BYTES} bytes")));
            }
        }
        let query = Self {
            text,
            top_k,
            collections: collections_of(collection, collections, config)?,
            mode: mode.unwrap_or_default(),
            threshold,
            collapse_by_file: collapse_by_file.unwrap_or_default(),
            rerank: rerank.unwrap_or(true),
            must_rerank: rerank.unwrap_or(false),
            // -0.0 and 0.0 are one query.
            diversity: diversity.unwrap_or_default() + 0.0,
            passage_tokens,
            secondary_weight: config.secondary_weight,
            path,
            // As chunks have it.
            lang: lang.map(|lang| lang.to_lowercase()),
            repo,
            tenant: tenant.filter(|tenant| !tenant.is_empty()),
        };
        // A bad glob is told even when nothing is indexed yet.
        query.glob()?;
        Ok(query)
    }

    /// The compiled `filter.path`. It is read as the globs are that choose what is indexed.
    pub(super) fn glob(&self) -> Result<Option<PathFilter>, GatewayError> {
        let Some(path) = &self.path else { return Ok(None) };
        let (pattern, others) = path.strip_prefix('!').map_or((path.as_str(), false), |rest| (rest, true));
        match globs(&[pattern.to_owned()]) {
            Ok(globs) => Ok(Some(PathFilter { globs, others })),
            Err(fault) => Err(invalid(format!("`filter.path` is not a glob: {}", fault.problem))),
        }
    }

    /// The key of its answer, given the models that have a part in it.
    pub(super) fn key(&self, embedder: Option<&str>, reranker: Option<&str>) -> Key {
        // Plain data: serialising cannot fail.
        let text = serde_json::to_vec(&(PIPELINE, embedder, reranker, self)).unwrap_or_default();
        Key(Sha256::digest(text).into())
    }
}

fn collections_of(
    one: Option<String>,
    several: Option<Vec<String>>,
    config: &SearchConfig,
) -> Result<Vec<String>, GatewayError> {
    if several.as_ref().is_some_and(|several| !(1..=MAX_COLLECTIONS).contains(&several.len())) {
        return Err(invalid(format!("`collections` must name 1 to {MAX_COLLECTIONS} of them")));
    }
    let mut names: Vec<String> = one.into_iter().chain(several.unwrap_or_default()).collect();
    if names.is_empty() {
        names.push(config.default_collection.clone());
    }
    for name in &names {
        check_collection_name(name)?;
    }
    // Their order must not matter for ties.
    names.sort_unstable();
    names.dedup();
    Ok(names)
}

/// Collections are folders and parts of URLs.
pub(crate) fn check_collection_name(name: &str) -> Result<(), GatewayError> {
    // A generation, such as `docs@2`, can be named wherever its collection can.
    let plain = names::plain(name);
    if [names::VERSIONS, names::PAID].contains(&plain) {
        return Err(invalid(format!("`collection` is {name:?}, which is Atlas' own; use another name")));
    }
    if atlas_shared::message::is_name(plain) && !plain.starts_with('.') {
        return Ok(());
    }
    Err(invalid(format!(
        "`collection` is {name:?}; use 1 to 128 letters, digits, '.', '_' or '-', and no dot at the start"
    )))
}

fn invalid(detail: impl Into<String>) -> GatewayError {
    GatewayError::Invalid(detail.into())
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    fn config() -> SearchConfig {
        SearchConfig {
            default_collection: "atlas".to_owned(),
            default_top_k: 15,
            max_top_k: 100,
            default_threshold: None,
            passage_tokens: 512,
            secondary_weight: 0.7,
            timeout: Duration::from_secs(5),
        }
    }

    fn request(query: &str) -> QueryChatRequest {
        QueryChatRequest { query: query.to_owned(), ..QueryChatRequest::default() }
    }

    fn key(request: QueryChatRequest) -> Key {
        Query::new(request, &config()).unwrap().key(Some("model"), None)
    }

    #[test]
    fn equal_queries_have_equal_keys_and_others_have_others() {
        let base = key(request(" apple "));
        assert_eq!(base, key(request("apple")));
        assert_eq!(base, key(QueryChatRequest { top_k: Some(15), ..request("apple") }));
        assert_eq!(
            base,
            key(QueryChatRequest { collections: Some(vec!["atlas".into()]), ..request("apple") })
        );
        let filter = |filter: QueryFilter| QueryChatRequest { filter: Some(filter), ..request("apple") };
        let some = || Some("x".to_owned());
        for other in [
            request("apples"),
            QueryChatRequest { top_k: Some(14), ..request("apple") },
            QueryChatRequest { collection: some(), ..request("apple") },
            QueryChatRequest { mode: Some(SearchMode::Lexical), ..request("apple") },
            QueryChatRequest { relevancy_threshold: Some(0.5), ..request("apple") },
            QueryChatRequest { collapse_by_file: Some(true), ..request("apple") },
            QueryChatRequest { rerank: Some(false), ..request("apple") },
            QueryChatRequest { diversity: Some(0.5), ..request("apple") },
            QueryChatRequest { passage_tokens: Some(0), ..request("apple") },
            filter(QueryFilter { path: some(), ..QueryFilter::default() }),
            filter(QueryFilter { lang: some(), ..QueryFilter::default() }),
            filter(QueryFilter { repo: some(), ..QueryFilter::default() }),
            filter(QueryFilter { tenant: some(), ..QueryFilter::default() }),
        ] {
            assert_ne!(key(other.clone()), base, "{other:?}");
        }
        let otherwise = SearchConfig { secondary_weight: 0.5, ..config() };
        assert_ne!(Query::new(request("apple"), &otherwise).unwrap().key(Some("model"), None), base);
        let query = Query::new(request("apple"), &config()).unwrap();
        assert_ne!(query.key(None, None), base, "without embeddings the answer is another");
        assert_ne!(query.key(Some("model"), Some("reranker")), base);
    }

    #[test]
    fn a_path_is_a_glob_and_an_exclamation_mark_turns_it_round() {
        let finds = |path: &str, source: &str| {
            let filter = Some(QueryFilter { path: Some(path.to_owned()), ..QueryFilter::default() });
            let request = QueryChatRequest { query: "x".to_owned(), filter, ..QueryChatRequest::default() };
            Query::new(request, &config()).unwrap().glob().unwrap().unwrap().is_match(source)
        };
        for path in ["docs/**", "docs/", "docs", "./docs/a.md", "*.md", "!tests/**", "!*.rs"] {
            assert!(finds(path, "docs/a.md"), "{path}");
        }
        for path in ["!docs/**", "!docs", "!*.md", "/a.md", "*.rs"] {
            assert!(!finds(path, "docs/a.md"), "{path}");
        }
    }

    #[test]
    fn collections_are_a_set() {
        let of = |names: &[&str]| {
            let names = names.iter().map(|name| (*name).to_owned()).collect();
            Query::new(QueryChatRequest { collections: Some(names), ..request("x") }, &config())
        };
        assert_eq!(of(&["b", "a", "b"]).unwrap().collections, ["a", "b"]);
        assert!(of(&[]).is_err());
        assert!(of(&["../x"]).is_err());
        assert!(of(&["a"; 17]).is_err());
        let both = QueryChatRequest {
            collection: Some("a".to_owned()),
            collections: Some(vec!["b".to_owned()]),
            ..request("x")
        };
        assert_eq!(Query::new(both, &config()).unwrap().collections, ["a", "b"]);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512.max(ProptestConfig::default().cases)))]

        /// Whatever a caller sends: a query within its bounds, or an error that says what is wrong.
        #[test]
        fn any_request_is_a_query_or_an_error(
            query in "\\PC{0,40}", top_k in any::<Option<usize>>(), collection in prop::option::of("\\PC{0,8}"),
            threshold in any::<Option<f32>>(), diversity in any::<Option<f32>>(), tokens in any::<Option<usize>>(),
            path in prop::option::of("[\\[\\]{}*?!,/\\\\a-z.-]{0,20}"), tenant in prop::option::of("\\PC{0,8}"),
        ) {
            let request = QueryChatRequest {
                top_k, collection, relevancy_threshold: threshold, diversity, passage_tokens: tokens,
                filter: Some(QueryFilter { path, tenant, ..QueryFilter::default() }), ..request(&query)
            };
            match Query::new(request, &config()) {
                Ok(query) => {
                    prop_assert!((1..=100).contains(&query.top_k));
                    prop_assert!(query.threshold.is_none_or(|value| (0.0..=1.0).contains(&value)));
                    prop_assert!((0.0..=1.0).contains(&query.diversity));
                    prop_assert!(query.tenant.as_deref() != Some(""));
                    if let Some(glob) = query.glob().unwrap() {
                        glob.is_match("docs/guide.md");
                    }
                }
                Err(error) => prop_assert!(error.to_string().contains('`'), "{error}"),
            }
        }
    }
}
