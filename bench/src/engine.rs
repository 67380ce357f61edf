//! The embedded engine without a gateway: what a query costs that nobody serves over HTTP.

use std::{
    collections::HashSet,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, anyhow};
use qdrant_edge::{
    Condition, EdgeShard, Filter, HasIdCondition, NamedQuery, PointId, QueryEnum, SearchRequest,
    VectorInternal, WithPayloadInterface,
    bm25_embed::{EdgeBm25, EdgeBm25Config},
};
use serde_json::json;

use crate::process;

/// Candidates of each list, as the gateway asks for them with its default `top_k`.
const LIMIT: usize = 64;

/// Times of searches that the engine is asked for directly.
pub(crate) struct Times {
    pub(crate) each: Vec<Duration>,
    /// CPU time of a search, in seconds.
    pub(crate) cpu: f64,
}

/// What the gateway needs of the engine for the same queries, one after the other: `LIMIT` candidates with their
/// payloads from the lexical list, or where there are vectors from both, and the cosine of what only the lexical one
/// has. `filtered`: only what belongs to nobody, which is what a caller without a tenant sees. `dir` is the gateway's
/// data folder; no gateway may have it open.
pub(crate) fn times(
    dir: &Path,
    queries: &[(String, Option<Vec<f32>>)],
    filtered: bool,
) -> anyhow::Result<Times> {
    let shard =
        EdgeShard::load(&collection(&dir.join("vectors"))?, None).map_err(|error| anyhow!("{error}"))?;
    let bm25 = EdgeBm25::new(EdgeBm25Config::default()).map_err(|error| anyhow!("{error}"))?;
    let tenants: Filter =
        serde_json::from_value(json!({"must": [{"key": "tenant", "match": {"any": [""]}}]}))?;
    let tenants = filtered.then_some(tenants);
    let search = |query: VectorInternal, using: &str, filter: Option<Filter>, payload: bool| {
        shard
            .search(SearchRequest {
                query: QueryEnum::Nearest(NamedQuery::new(query, using)),
                filter,
                params: None,
                limit: LIMIT,
                offset: 0,
                with_payload: Some(WithPayloadInterface::Bool(payload)),
                with_vector: None,
                score_threshold: None,
            })
            .map_err(|error| anyhow!("{error}"))
    };
    let all = || -> anyhow::Result<Vec<Duration>> {
        let mut times = Vec::with_capacity(queries.len());
        for (text, vector) in queries {
            let began = Instant::now();
            let sparse = VectorInternal::Sparse(bm25.embed_query(text));
            let lexical = search(sparse, "bm25", tenants.clone(), true)?;
            if let Some(vector) = vector {
                let dense = || VectorInternal::Dense(vector.clone());
                let near: HashSet<PointId> = search(dense(), "text", tenants.clone(), true)?
                    .into_iter()
                    .map(|point| point.id)
                    .collect();
                let others = lexical.iter().map(|point| point.id).filter(|id| !near.contains(id));
                let others = Filter::new_must(Condition::HasId(others.collect::<HasIdCondition>()));
                search(dense(), "text", Some(others), false)?;
            }
            times.push(began.elapsed());
        }
        Ok(times)
    };
    // The gateway had its files in memory when it was asked: so has this, the second time.
    all()?;
    let own = std::process::id();
    let before = process::stat(own)?.cpu_seconds;
    let each = all()?;
    let cpu = (process::stat(own)?.cpu_seconds - before) / queries.len().max(1) as f64;
    Ok(Times { each, cpu })
}

/// The folder of the only collection.
fn collection(dir: &Path) -> anyhow::Result<PathBuf> {
    let mut folders = std::fs::read_dir(dir)?.filter_map(|entry| Some(entry.ok()?.path()));
    folders.find(|path| path.join("atlas.json").is_file()).context("no collection was made")
}
