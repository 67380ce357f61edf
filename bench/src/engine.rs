//! The embedded engine without a gateway: what a query costs that nobody serves over HTTP.

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, anyhow};
use qdrant_edge::{
    EdgeShard, NamedQuery, QueryEnum, SearchRequest, VectorInternal, WithPayloadInterface,
    bm25_embed::{EdgeBm25, EdgeBm25Config},
};

/// Candidates of each list, as the gateway asks for them with its default `top_k`.
const LIMIT: usize = 64;

/// Times of the same searches that the gateway makes, one after the other: lexical, or both lists where
/// there are vectors. `dir` is the gateway's data folder; no gateway may have it open.
pub(crate) fn times(dir: &Path, queries: &[(String, Option<Vec<f32>>)]) -> anyhow::Result<Vec<Duration>> {
    let shard =
        EdgeShard::load(&collection(&dir.join("vectors"))?, None).map_err(|error| anyhow!("{error}"))?;
    let bm25 = EdgeBm25::new(EdgeBm25Config::default()).map_err(|error| anyhow!("{error}"))?;
    let search = |query: VectorInternal, using: &str| {
        shard
            .search(SearchRequest {
                query: QueryEnum::Nearest(NamedQuery::new(query, using)),
                filter: None,
                params: None,
                limit: LIMIT,
                offset: 0,
                with_payload: Some(WithPayloadInterface::Bool(true)),
                with_vector: None,
                score_threshold: None,
            })
            .map_err(|error| anyhow!("{error}"))
    };
    let all = || -> anyhow::Result<Vec<Duration>> {
        let mut times = Vec::with_capacity(queries.len());
        for (text, vector) in queries {
            let began = Instant::now();
            if let Some(vector) = vector {
                search(VectorInternal::Dense(vector.clone()), "text")?;
            }
            search(VectorInternal::Sparse(bm25.embed_query(text)), "bm25")?;
            times.push(began.elapsed());
        }
        Ok(times)
    };
    // The gateway had its files in memory when it was asked: so has this, the second time.
    all()?;
    all()
}

/// The folder of the only collection.
fn collection(dir: &Path) -> anyhow::Result<PathBuf> {
    let mut folders = std::fs::read_dir(dir)?.filter_map(|entry| Some(entry.ok()?.path()));
    folders.find(|path| path.join("atlas.json").is_file()).context("no collection was made")
}
