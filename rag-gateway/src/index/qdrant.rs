//! A Qdrant server, over gRPC (`qdrant-client` 1.20).
//!
//! The server weighs BM25 itself (`qdrant/bm25`, from 1.15.2) and keeps our meta in the collection's
//! metadata (from 1.16), and has aliases, which make a collection stand for one of its generations. So
//! replicas of the gateway share nothing but the server. Writes wait until
//! they are applied. The crate's own version check prints to standard output and blocks, so
//! [`QdrantIndex::check`] does ours.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use ::qdrant_client::{
    Payload, Qdrant, QdrantError,
    qdrant::{
        CollectionInfo, Condition, CountPointsBuilder, CreateAlias, CreateCollectionBuilder,
        CreateFieldIndexCollectionBuilder, DeletePointsBuilder, Distance, Document, FieldType, Filter,
        GetPointsBuilder, KeywordIndexParamsBuilder, Modifier, NamedVectors, PayloadExcludeSelector, PointId,
        PointStruct, PointVectors, PointsIdsList, Query, QueryBatchPointsBuilder, QueryPoints,
        QueryPointsBuilder, Range, RecommendInputBuilder, RecommendStrategy, ScoredPoint,
        ScrollPointsBuilder, SetPayloadPointsBuilder, SparseVectorParamsBuilder, SparseVectorsConfigBuilder,
        UpdateCollectionBuilder, UpdatePointVectorsBuilder, UpsertPointsBuilder, Value, Vector, VectorInput,
        VectorParamsBuilder, VectorsConfigBuilder, point_id::PointIdOptions,
    },
};
use async_trait::async_trait;
use atlas_shared::{Dependency, Secret, UpstreamError};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use jiff::Timestamp;
use moka::future::Cache;
use url::Url;
use uuid::Uuid;

use super::{
    ChangeId, ChunkRecord, CollectionMeta, CollectionState, DENSE, Hit, INTEGER_FIELDS, KEPT_VECTORS_DAYS,
    KEYWORD_FIELDS, Lists, NewChunk, Page, Provenance, Resolved, SPARSE, Search, Selection, VectorIndex,
    Version, Weighing, failed, names, payload, record, vector_bytes, vector_from,
};

/// The server's BM25.
const BM25_MODEL: &str = "qdrant/bm25";

/// The key of our meta in a collection's metadata.
const META_KEY: &str = "atlas";

/// Stands for all collections there: its number is the epoch. No collection can have this name.
const ALL: &str = "*";

/// Names the namespace of the points there.
const VERSION_NAMESPACE: Uuid = Uuid::from_u128(0x6f0c_7f5e_2d1b_4f6a_9a53_0d0e_41b8_77c2);

/// Points that are read there: one a collection, one a change under way.
const MAX_VERSION_POINTS: u32 = 1000;

/// A change that began so long ago has ended with its writer.
const ABANDONED: Duration = Duration::from_secs(24 * 3600);

/// The oldest server that has all we need: collection metadata.
const OLDEST: (u64, u64) = (1, 16);

/// Points in one request.
const BATCH: usize = 256;

/// How old a look at a collection may be when it is searched: another replica may have dropped it and made it anew.
const RESOLVED_TTL: Duration = Duration::from_secs(5);

/// Collections that are remembered.
const MAX_RESOLVED: u64 = 1000;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a collection is looked for that the server says is there.
const MAKE_BOUND: Duration = Duration::from_secs(10);

/// Between two looks.
const MAKE_PAUSE: Duration = Duration::from_millis(20);

/// All collections of one server.
pub(super) struct QdrantIndex {
    client: Qdrant,
    url: Url,
    /// Collections that were searched lately.
    resolved: Cache<String, Resolved>,
    /// Their numbers when they were last asked for: with another one they are looked at again.
    numbers: Cache<String, Uuid>,
}

impl QdrantIndex {
    /// Prepares the client. Nothing is sent before the first call.
    pub(super) fn connect(
        url: &Url,
        api_key: Option<&Secret>,
        timeout: Duration,
    ) -> Result<Self, UpstreamError> {
        let mut address = url.clone();
        if address.port().is_none() && address.set_port(Some(6334)).is_err() {
            return Err(misconfigured(url, "it cannot carry a port"));
        }
        let client = Qdrant::from_url(address.as_str())
            .api_key(api_key.map(|key| key.expose().to_owned()))
            .timeout(timeout)
            .connect_timeout(CONNECT_TIMEOUT.min(timeout))
            .skip_compatibility_check()
            .build()
            .map_err(|error| misconfigured(url, &error.to_string()))?;
        let resolved = Cache::builder().max_capacity(MAX_RESOLVED).time_to_live(RESOLVED_TTL).build();
        let numbers = Cache::builder().max_capacity(MAX_RESOLVED).build();
        Ok(Self { client, url: address, resolved, numbers })
    }

    /// `Ok(None)` where the server says that there is no such collection.
    fn found<T>(&self, result: Result<T, QdrantError>) -> Result<Option<T>, UpstreamError> {
        match result {
            Ok(value) => Ok(Some(value)),
            Err(QdrantError::ResponseError { status }) if status.code() as i32 == NOT_FOUND => Ok(None),
            Err(error) => Err(self.upstream(error)),
        }
    }

    /// What a failure means for the caller.
    fn upstream(&self, error: QdrantError) -> UpstreamError {
        match error {
            QdrantError::ResourceExhaustedError { status, retry_after_seconds } => UpstreamError::Transient {
                dependency: Dependency::VectorIndex,
                message: status.message().to_owned(),
                retry_after: Some(Duration::from_secs(retry_after_seconds)),
            },
            QdrantError::ResponseError { status } => match status.code() as i32 {
                UNAUTHENTICATED | PERMISSION_DENIED => UpstreamError::misconfigured(
                    Dependency::VectorIndex,
                    "QDRANT_API_KEY",
                    format!("{} refused the key: {}", self.url, status.message()),
                    "set it to the key that the server was started with (QDRANT__SERVICE__API_KEY)",
                ),
                INVALID_ARGUMENT | NOT_FOUND | FAILED_PRECONDITION | UNIMPLEMENTED => {
                    UpstreamError::permanent(Dependency::VectorIndex, "refused_by_qdrant", status.message())
                }
                _ => failed(self.url.as_str(), status.message()),
            },
            other => failed(self.url.as_str(), other),
        }
    }

    async fn described(&self, name: &str) -> Result<Option<CollectionInfo>, UpstreamError> {
        let answer = self.found(self.client.collection_info(name).await)?;
        Ok(answer.and_then(|answer| answer.result))
    }

    async fn state(&self, name: &str) -> Result<Option<CollectionState>, UpstreamError> {
        self.described(name).await?.map_or(Ok(None), |info| state_of(name, &info))
    }

    /// One step towards a collection; `None`: a generation is there now, look again.
    ///
    /// There is no lock and no owner. The server makes each generation once, whoever asks; all later steps
    /// may be done by anybody and any number of times. So a gateway that finds a collection half made, by one
    /// that is at it or by one that has died, finishes it, and all end with the same generation.
    async fn make(&self, name: &str, meta: &CollectionMeta) -> Result<Option<CollectionMeta>, UpstreamError> {
        if let Some(info) = self.described(name).await? {
            let Some(state) = state_of(name, &info)? else {
                return Err(UpstreamError::permanent(
                    Dependency::VectorIndex,
                    "foreign_collection",
                    format!("collection {name:?} was not made by Atlas; name another one"),
                ));
            };
            self.index_fields(name, &info).await?;
            return Ok(Some(state.meta));
        }
        if names::parse(name).is_some() {
            self.create(name, meta).await?;
            // What it is, whoever made it, is seen with the next look.
            return Ok(None);
        }
        let taken = self.generations().await?;
        let next = names::next(name, taken.iter().map(String::as_str));
        if let Some(newest) = next.checked_sub(1).filter(|newest| *newest > 0) {
            let newest = names::generation(name, newest);
            if let Some(info) = self.described(&newest).await?
                && let Some(state) = state_of(&newest, &info)?
                && self.count(&newest, &Selection::default()).await? == 0
            {
                self.index_fields(&newest, &info).await?;
                if self.described(name).await?.is_none() {
                    self.point(name, &newest).await?;
                }
                return Ok(Some(state.meta));
            }
            // It has chunks: the rest of a collection that was dropped, or it was finished and filled just now.
            if self.described(name).await?.is_some() {
                return Ok(None);
            }
        }
        self.create(&names::generation(name, next), meta).await?;
        Ok(None)
    }

    /// Makes a generation, unless it is there.
    async fn create(&self, generation: &str, meta: &CollectionMeta) -> Result<(), UpstreamError> {
        let mut sparse = SparseVectorsConfigBuilder::default();
        sparse.add_named_vector_params(SPARSE, SparseVectorParamsBuilder::default().modifier(Modifier::Idf));
        let mut create = CreateCollectionBuilder::new(generation)
            .sparse_vectors_config(sparse)
            .metadata(HashMap::from([(META_KEY.to_owned(), meta_json(meta)?)]));
        if let Some(size) = meta.embedding_size {
            let mut dense = VectorsConfigBuilder::default();
            dense.add_named_vector_params(DENSE, VectorParamsBuilder::new(size as u64, Distance::Cosine));
            create = create.vectors_config(dense);
        }
        let Err(error) = self.client.create_collection(create).await else { return Ok(()) };
        // The server has no answer of its own for "it is there already".
        if self.generations().await?.iter().any(|taken| taken == generation) {
            return Ok(());
        }
        Err(self.upstream(error))
    }

    /// Makes the payload indexes that a collection lacks: whoever made it may have died before them, or be an
    /// older release that had fewer.
    async fn index_fields(&self, name: &str, info: &CollectionInfo) -> Result<(), UpstreamError> {
        let keywords = KEYWORD_FIELDS.map(|field| (field, FieldType::Keyword));
        let integers = INTEGER_FIELDS.map(|field| (field, FieldType::Integer));
        for (field, kind) in keywords.into_iter().chain(integers) {
            if info.payload_schema.contains_key(field) {
                continue;
            }
            let mut request = CreateFieldIndexCollectionBuilder::new(name, field, kind).wait(true);
            if kind == FieldType::Keyword {
                let tenant = field == "tenant";
                request = request.field_index_params(KeywordIndexParamsBuilder::default().is_tenant(tenant));
            }
            self.client.create_field_index(request).await.map_err(|error| self.upstream(error))?;
        }
        Ok(())
    }

    /// All aliases of the server: collections with their generations.
    async fn aliases(&self) -> Result<Vec<(String, String)>, UpstreamError> {
        let answer = self.client.list_aliases().await.map_err(|error| self.upstream(error))?;
        Ok(answer.aliases.into_iter().map(|alias| (alias.alias_name, alias.collection_name)).collect())
    }

    async fn generation_of(&self, name: &str) -> Result<Option<String>, UpstreamError> {
        let aliases = self.aliases().await?;
        Ok(aliases.into_iter().find(|(alias, _)| alias == name).map(|(_, generation)| generation))
    }

    /// Points an alias, whether it exists or not: the server replaces it in one step.
    async fn point(&self, name: &str, generation: &str) -> Result<(), UpstreamError> {
        let alias = CreateAlias { collection_name: generation.to_owned(), alias_name: name.to_owned() };
        self.client.create_alias(alias).await.map_err(|error| self.upstream(error))?;
        Ok(())
    }

    /// The names of all collections, ours and others', without aliases.
    async fn generations(&self) -> Result<Vec<String>, UpstreamError> {
        let answer = self.client.list_collections().await.map_err(|error| self.upstream(error))?;
        Ok(answer.collections.into_iter().map(|collection| collection.name).collect())
    }
}

#[async_trait]
impl VectorIndex for QdrantIndex {
    async fn ensure(&self, name: &str, meta: &CollectionMeta) -> Result<CollectionMeta, UpstreamError> {
        let started = Instant::now();
        let mut attempts = 0_u32;
        loop {
            if let Some(made) = self.make(name, meta).await? {
                return Ok(made);
            }
            // The first attempt made a part, or another gateway did; the second sees it and does the rest. Only
            // a cluster may need more, until each of its nodes shows what is there.
            attempts += 1;
            if started.elapsed() > MAKE_BOUND {
                let message = "the server says that there is such a collection, and does not show it";
                return Err(failed(name, message));
            }
            if attempts > 1 {
                tokio::time::sleep(MAKE_PAUSE).await;
            }
        }
    }

    async fn resolve(&self, name: &str) -> Result<Option<Resolved>, UpstreamError> {
        if let Some(resolved) = self.resolved.get(name).await {
            return Ok(Some(resolved));
        }
        let generation = self.generation_of(name).await?.unwrap_or_else(|| name.to_owned());
        let state = self.state(&generation).await?;
        let resolved = state.map(|state| Resolved { generation, meta: state.meta });
        if let Some(resolved) = &resolved {
            self.resolved.insert(name.to_owned(), resolved.clone()).await;
        }
        Ok(resolved)
    }

    async fn generation(&self, name: &str) -> Result<String, UpstreamError> {
        let generation = self.generation_of(name).await?.unwrap_or_else(|| name.to_owned());
        if self.resolved.get(name).await.is_some_and(|known| known.generation != generation) {
            self.resolved.invalidate(name).await;
        }
        Ok(generation)
    }

    async fn info(&self, name: &str) -> Result<Option<CollectionState>, UpstreamError> {
        let Some(state) = self.state(name).await? else { return Ok(None) };
        // The count in the collection's info is an estimate.
        let generation = self.generation_of(name).await?;
        let chunks = self.count(name, &Selection::default()).await?;
        Ok(Some(CollectionState { chunks, generation, ..state }))
    }

    async fn collections(&self) -> Result<Vec<(String, CollectionState)>, UpstreamError> {
        let aliases = self.aliases().await?;
        let mut ours = Vec::new();
        for generation in self.generations().await? {
            // Collections of others on the same server are none of our business.
            let Some(state) = self.state(&generation).await? else { continue };
            match aliases.iter().find(|(_, used)| *used == generation) {
                Some((name, _)) => {
                    ours.push((name.clone(), CollectionState { generation: Some(generation), ..state }));
                }
                None => ours.push((generation, state)),
            }
        }
        ours.sort_by(|(a, _), (b, _)| a.cmp(b));
        Ok(ours)
    }

    async fn upsert(
        &self,
        name: &str,
        chunks: Vec<NewChunk>,
        obsolete: Option<Selection>,
    ) -> Result<(), UpstreamError> {
        let Some(info) = self.described(name).await? else { return Err(unknown(name)) };
        let meta = state_of(name, &info)?.ok_or_else(|| unknown(name))?.meta;
        self.index_fields(name, &info).await?;
        // The same text has the same ids, whoever writes it. Without this, a gateway that is slower than another one
        // would put its older revision in the place of chunks that the other one then deletes as obsolete.
        let newest = chunks.iter().map(|chunk| chunk.record.rev).max();
        let replaceable =
            newest.map(|rev| Filter::must([revision(rev, |lte| Range { lte, ..Range::default() })]));
        let (first, others): (Vec<_>, Vec<_>) = chunks.into_iter().partition(|chunk| chunk.record.n == 0);
        for chunks in [others, first] {
            let mut points = Vec::with_capacity(chunks.len());
            for chunk in chunks {
                let mut vectors = NamedVectors::default().add_vector(SPARSE, weighed(&chunk.record, &meta));
                if let Some(dense) = chunk.dense {
                    vectors = vectors.add_vector(DENSE, dense);
                }
                let payload =
                    Payload::try_from(payload(&chunk.record)?).map_err(|error| self.upstream(error))?;
                points.push(PointStruct::new(chunk.id.to_string(), vectors, payload));
            }
            while !points.is_empty() {
                let rest = points.split_off(points.len().min(BATCH));
                let mut request = UpsertPointsBuilder::new(name, points).wait(true);
                if let Some(replaceable) = &replaceable {
                    request = request.update_filter(replaceable.clone());
                }
                self.client.upsert_points(request).await.map_err(|error| self.upstream(error))?;
                points = rest;
            }
        }
        let Some(obsolete) = obsolete else { return Ok(()) };
        let Selection { docs, rev_below, .. } = obsolete.clone();
        self.delete(name, obsolete).await?;
        match (docs, rev_below) {
            (Some(docs), Some(rev)) => self.yield_to_newer(name, docs, rev).await,
            _ => Ok(()),
        }
    }

    async fn restate(
        &self,
        name: &str,
        docs: Vec<String>,
        provenance: Provenance,
    ) -> Result<(), UpstreamError> {
        let chunks = Selection { docs: Some(docs), ..Selection::default() };
        let Some(filter) = filter(&chunks) else { return Ok(()) };
        let fields: Payload = payload(&provenance)?.try_into().map_err(|error| failed("restate", error))?;
        let request = SetPayloadPointsBuilder::new(name, fields).points_selector(filter).wait(true);
        self.client.set_payload(request).await.map_err(|error| self.upstream(error))?;
        Ok(())
    }

    async fn delete(&self, name: &str, selection: Selection) -> Result<(), UpstreamError> {
        let Some(filter) = filter(&selection) else {
            return Err(UpstreamError::permanent(
                Dependency::VectorIndex,
                "empty_selection",
                "refusing to delete everything",
            ));
        };
        let request = DeletePointsBuilder::new(name).points(filter).wait(true);
        self.client.delete_points(request).await.map_err(|error| self.upstream(error))?;
        Ok(())
    }

    async fn search(&self, name: &str, search: Search) -> Result<Lists, UpstreamError> {
        let filter = filter(&search.selection);
        let query = |query: Query, using: &str| -> QueryPoints {
            let mut points = QueryPointsBuilder::new(name)
                .query(query)
                .using(using)
                .limit(search.limit as u64)
                .with_payload(true);
            if let Some(filter) = &filter {
                points = points.filter(filter.clone());
            }
            points.build()
        };
        let has_dense = search.dense.is_some();
        let mut queries = Vec::new();
        queries.extend(search.dense.map(|dense| query(Query::new_nearest(dense), DENSE)));
        let texts = search.lexical.len();
        queries.extend(bm25(search.lexical).map(|lexical| query(lexical, SPARSE)));
        if queries.is_empty() {
            return Ok(Lists::default());
        }
        let answer = self.client.query_batch(QueryBatchPointsBuilder::new(name, queries)).await;
        let Some(answer) = self.found(answer)? else { return Ok(Lists::default()) };
        let mut lists = answer.result.into_iter().map(|list| list.result.into_iter().map(hit).collect());
        let dense = if has_dense { lists.next().unwrap_or_else(|| Ok(Vec::new()))? } else { Vec::new() };
        let mut lexical = lists.next().unwrap_or_else(|| Ok(Vec::new()))?;
        for hit in &mut lexical {
            // The server takes the mean of the texts, BM25 is their sum.
            hit.score *= texts as f32;
        }
        Ok(Lists { dense, lexical, cosines: HashMap::new() })
    }

    async fn cosines(
        &self,
        name: &str,
        vector: Vec<f32>,
        ids: Vec<Uuid>,
    ) -> Result<HashMap<Uuid, f32>, UpstreamError> {
        if ids.is_empty() {
            return Ok(HashMap::new());
        }
        let limit = ids.len() as u64;
        let these = Condition::has_id(ids.into_iter().map(|id| id.to_string()));
        let query = QueryPointsBuilder::new(name)
            .query(Query::new_nearest(vector))
            .using(DENSE)
            .filter(Filter::must([these]))
            .limit(limit)
            .with_payload(false);
        let Some(answer) = self.found(self.client.query(query).await)? else { return Ok(HashMap::new()) };
        answer.result.into_iter().map(|point| Ok((uuid(point.id)?, point.score))).collect()
    }

    async fn count(&self, name: &str, selection: &Selection) -> Result<u64, UpstreamError> {
        let mut request = CountPointsBuilder::new(name).exact(true);
        if let Some(filter) = filter(selection) {
            request = request.filter(filter);
        }
        let Some(answer) = self.found(self.client.count(request).await)? else { return Ok(0) };
        Ok(answer.result.map_or(0, |result| result.count))
    }

    async fn scroll(
        &self,
        name: &str,
        selection: &Selection,
        from: Option<Uuid>,
        limit: usize,
        with_text: bool,
    ) -> Result<Page, UpstreamError> {
        let mut request = ScrollPointsBuilder::new(name).limit(u32::try_from(limit).unwrap_or(u32::MAX));
        request = if with_text { request.with_payload(true) } else { request.with_payload(without_text()) };
        if let Some(filter) = filter(selection) {
            request = request.filter(filter);
        }
        if let Some(from) = from {
            request = request.offset(from.to_string());
        }
        let Some(answer) = self.found(self.client.scroll(request).await)? else {
            return Ok(Page { records: Vec::new(), next: None });
        };
        let records = answer
            .result
            .into_iter()
            .map(|point| Ok((uuid(point.id)?, record(json(point.payload))?)))
            .collect::<Result<_, UpstreamError>>()?;
        let next = answer.next_page_offset.map(|id| uuid(Some(id))).transpose()?;
        Ok(Page { records, next })
    }

    async fn reweigh(&self, name: &str, avg_len: f64) -> Result<(), UpstreamError> {
        let meta = CollectionMeta { avg_len, ..self.existing(name).await? };
        let mut from = None;
        loop {
            let page = self.scroll(name, &Selection::default(), from, BATCH, true).await?;
            let points: Vec<PointVectors> = page
                .records
                .into_iter()
                .map(|(id, record)| PointVectors {
                    id: Some(PointId::from(id.to_string())),
                    vectors: Some(NamedVectors::default().add_vector(SPARSE, weighed(&record, &meta)).into()),
                })
                .collect();
            if !points.is_empty() {
                let request = UpdatePointVectorsBuilder::new(name, points).wait(true);
                self.client.update_vectors(request).await.map_err(|error| self.upstream(error))?;
            }
            from = page.next;
            if from.is_none() {
                break;
            }
        }
        let request = UpdateCollectionBuilder::new(name)
            .metadata(HashMap::from([(META_KEY.to_owned(), meta_json(&meta)?)]));
        self.client.update_collection(request).await.map_err(|error| self.upstream(error))?;
        Ok(())
    }

    async fn use_generation(&self, name: &str, generation: &str) -> Result<(), UpstreamError> {
        self.existing(generation).await?;
        self.point(name, generation).await?;
        self.resolved.invalidate(name).await;
        Ok(())
    }

    async fn drop_collection(&self, name: &str) -> Result<bool, UpstreamError> {
        self.resolved.invalidate(name).await;
        let aliases = self.aliases().await?;
        let generation = aliases
            .iter()
            .find(|(alias, _)| alias == name)
            .map_or_else(|| name.to_owned(), |(_, generation)| generation.clone());
        for (alias, _) in aliases.into_iter().filter(|(_, used)| *used == generation) {
            self.client.delete_alias(alias).await.map_err(|error| self.upstream(error))?;
        }
        let answer =
            self.client.delete_collection(&generation).await.map_err(|error| self.upstream(error))?;
        if answer.result {
            self.changed(name).await?;
        }
        Ok(answer.result)
    }

    async fn keep_vectors(&self, vectors: Vec<(Uuid, Vec<f32>)>) -> Result<(), UpstreamError> {
        let now = Timestamp::now().as_second();
        let points = vectors.into_iter().map(|(id, vector)| {
            let vector = BASE64_STANDARD.encode(vector_bytes(&vector));
            mark(id, serde_json::json!({"vector": vector, "since": now}))
        });
        let mut points = points.collect::<Result<Vec<_>, _>>()?;
        while !points.is_empty() {
            let rest = points.split_off(points.len().min(BATCH));
            self.set_marks(names::PAID, points).await?;
            points = rest;
        }
        #[expect(clippy::cast_precision_loss, reason = "seconds since 1970 fit into 53 bits")]
        let oldest = (now - i64::from(KEPT_VECTORS_DAYS) * 24 * 3600) as f64;
        let old = Filter::must([Condition::range("since", Range { lt: Some(oldest), ..Range::default() })]);
        let request = DeletePointsBuilder::new(names::PAID).points(old).wait(true);
        self.client.delete_points(request).await.map_err(|error| self.upstream(error))?;
        Ok(())
    }

    async fn kept_vectors(&self, ids: &[Uuid]) -> Result<HashMap<Uuid, Vec<f32>>, UpstreamError> {
        let mut kept = HashMap::new();
        for ids in ids.chunks(BATCH) {
            let ids: Vec<PointId> = ids.iter().map(|id| PointId::from(id.to_string())).collect();
            let request = GetPointsBuilder::new(names::PAID, ids).with_payload(true);
            let Some(answer) = self.found(self.client.get_points(request).await)? else { break };
            for point in answer.result {
                let id = uuid(point.id)?;
                let payload = json(point.payload);
                let vector = payload["vector"].as_str().and_then(|text| BASE64_STANDARD.decode(text).ok());
                kept.extend(vector.and_then(|bytes| vector_from(&bytes)).map(|vector| (id, vector)));
            }
        }
        Ok(kept)
    }

    async fn forget_vectors(&self, ids: Vec<Uuid>) -> Result<(), UpstreamError> {
        let ids: Vec<PointId> = ids.into_iter().map(|id| PointId::from(id.to_string())).collect();
        let request = DeletePointsBuilder::new(names::PAID).points(PointsIdsList { ids }).wait(true);
        self.found(self.client.delete_points(request).await).map(drop)
    }

    async fn version(&self, collections: &[String]) -> Result<Version, UpstreamError> {
        let mut version =
            Version { epoch: Uuid::nil(), numbers: vec![Uuid::nil(); collections.len()], unfinished: false };
        for mark in self.marks(collections).await? {
            match mark {
                Mark::Number { of, number } if of == ALL => version.epoch = number,
                Mark::Number { of, number } => {
                    for (slot, _) in version
                        .numbers
                        .iter_mut()
                        .zip(collections)
                        .filter(|(_, name)| names::plain(name) == of)
                    {
                        *slot = number;
                    }
                }
                Mark::Change { .. } => version.unfinished = true,
            }
        }
        for (name, number) in collections.iter().zip(&version.numbers) {
            if self.numbers.get(name).await != Some(*number) {
                self.resolved.invalidate(name).await;
                self.numbers.insert(name.clone(), *number).await;
            }
        }
        if version.epoch.is_nil() {
            // Nobody has cached anything yet: the first one makes the epoch, and the last one that did counts.
            version.epoch = self.set_number(ALL).await?;
        }
        Ok(version)
    }

    async fn begin_change(&self, name: &str) -> Result<ChangeId, UpstreamError> {
        let id = Uuid::new_v4();
        let payload = serde_json::json!({"c": names::plain(name), "since": Timestamp::now().as_second()});
        self.set_mark(id, payload).await?;
        Ok(ChangeId(id))
    }

    async fn changed(&self, name: &str) -> Result<(), UpstreamError> {
        self.set_number(names::plain(name)).await.map(drop)
    }

    async fn end_change(&self, name: &str, change: ChangeId) -> Result<(), UpstreamError> {
        self.changed(name).await?;
        let now = Timestamp::now().as_second();
        let abandoned = self.marks(&[name.to_owned()]).await?.into_iter().filter_map(|mark| match mark {
            Mark::Change { id, since } if now - since > ABANDONED.as_secs().cast_signed() => Some(id),
            _ => None,
        });
        let ids: Vec<PointId> = abandoned.chain([change.0]).map(|id| PointId::from(id.to_string())).collect();
        let request = DeletePointsBuilder::new(names::VERSIONS).points(PointsIdsList { ids }).wait(true);
        self.client.delete_points(request).await.map_err(|error| self.upstream(error))?;
        Ok(())
    }

    async fn new_epoch(&self) -> Result<(), UpstreamError> {
        self.changed(ALL).await
    }

    async fn check(&self) -> Result<(), UpstreamError> {
        let health = self.client.health_check().await.map_err(|error| {
            let error = self.upstream(error);
            if error.is_transient() {
                failed(self.url.as_str(), format!("no answer ({error}); is QDRANT_URL the gRPC port, 6334?"))
            } else {
                error
            }
        })?;
        if version(&health.version).is_some_and(|version| version < OLDEST) {
            return Err(UpstreamError::misconfigured(
                Dependency::VectorIndex,
                "QDRANT_URL",
                format!("{} runs Qdrant {}", self.url, health.version),
                format!("run Qdrant {}.{} or newer", OLDEST.0, OLDEST.1),
            ));
        }
        // The health check needs no key; this does.
        self.client.list_collections().await.map_err(|error| self.upstream(error))?;
        Ok(())
    }

    async fn close(&self) {}
}

/// A point of [`names::VERSIONS`].
enum Mark {
    /// The number of a collection.
    Number { of: String, number: Uuid },
    /// A change that has begun, in seconds since 1970.
    Change { id: Uuid, since: i64 },
}

impl QdrantIndex {
    /// Deletes chunks of documents of which another process has written a newer revision meanwhile: it could not
    /// delete what was not there yet.
    async fn yield_to_newer(&self, name: &str, docs: Vec<String>, rev: i64) -> Result<(), UpstreamError> {
        let limit = u32::try_from(docs.len()).unwrap_or(u32::MAX);
        let first = Selection { docs: Some(docs), first_chunks: true, ..Selection::default() };
        let mut newer = filter(&first).unwrap_or_default();
        newer.must.push(revision(rev, |gt| Range { gt, ..Range::default() }));
        let request = ScrollPointsBuilder::new(name).filter(newer).limit(limit).with_payload(without_text());
        let answer = self.client.scroll(request).await.map_err(|error| self.upstream(error))?;
        for point in answer.result {
            let ChunkRecord { doc, rev, .. } = record(json(point.payload))?;
            let older = Selection { docs: Some(vec![doc]), rev_below: Some(rev), ..Selection::default() };
            self.delete(name, older).await?;
        }
        Ok(())
    }

    /// What is known of these collections, and of all.
    async fn marks(&self, collections: &[String]) -> Result<Vec<Mark>, UpstreamError> {
        let mut names: Vec<String> = collections.iter().map(|name| names::plain(name).to_owned()).collect();
        names.push(ALL.to_owned());
        let request = ScrollPointsBuilder::new(names::VERSIONS)
            .filter(Filter::must([Condition::matches("c", names)]))
            .limit(MAX_VERSION_POINTS)
            .with_payload(true);
        let Some(answer) = self.found(self.client.scroll(request).await)? else { return Ok(Vec::new()) };
        let mut marks = Vec::with_capacity(answer.result.len());
        for point in answer.result {
            let id = uuid(point.id)?;
            let payload = json(point.payload);
            let of = payload["c"].as_str().unwrap_or_default().to_owned();
            match payload["v"].as_str().and_then(|number| number.parse().ok()) {
                Some(number) => marks.push(Mark::Number { of, number }),
                None => marks.push(Mark::Change { id, since: payload["since"].as_i64().unwrap_or_default() }),
            }
        }
        Ok(marks)
    }

    /// Gives a collection a new number.
    async fn set_number(&self, name: &str) -> Result<Uuid, UpstreamError> {
        let number = Uuid::new_v4();
        let id = Uuid::new_v5(&VERSION_NAMESPACE, name.as_bytes());
        self.set_mark(id, serde_json::json!({"c": name, "v": number.to_string()})).await?;
        Ok(number)
    }

    async fn set_mark(&self, id: Uuid, payload: serde_json::Value) -> Result<(), UpstreamError> {
        self.set_marks(names::VERSIONS, vec![mark(id, payload)?]).await
    }

    /// Writes to a collection of ours that holds no chunks, and makes it where it is not there.
    async fn set_marks(&self, collection: &str, marks: Vec<PointStruct>) -> Result<(), UpstreamError> {
        let write = UpsertPointsBuilder::new(collection, marks).wait(true);
        if self.found(self.client.upsert_points(write.clone()).await)?.is_none() {
            let mut sparse = SparseVectorsConfigBuilder::default();
            sparse.add_named_vector_params(SPARSE, SparseVectorParamsBuilder::default());
            let create = CreateCollectionBuilder::new(collection).sparse_vectors_config(sparse);
            // Another replica may be faster; then the second attempt tells.
            let created = self.client.create_collection(create).await;
            if let Err(error) = self.client.upsert_points(write).await {
                created.map_err(|error| self.upstream(error))?;
                return Err(self.upstream(error));
            }
        }
        Ok(())
    }

    async fn existing(&self, name: &str) -> Result<CollectionMeta, UpstreamError> {
        self.state(name).await?.map(|state| state.meta).ok_or_else(|| unknown(name))
    }
}

/// A point of a collection that holds no chunks.
fn mark(id: Uuid, payload: serde_json::Value) -> Result<PointStruct, UpstreamError> {
    let payload = Payload::try_from(payload).map_err(|error| failed("a mark", error))?;
    let vectors = NamedVectors::default().add_vector(SPARSE, Vector::new_sparse(vec![0], vec![1.0]));
    Ok(PointStruct::new(id.to_string(), vectors, payload))
}

/// What we keep about a collection; `None` for one that is not ours.
fn state_of(name: &str, info: &CollectionInfo) -> Result<Option<CollectionState>, UpstreamError> {
    let Some(meta) = info.config.as_ref().and_then(|config| config.metadata.get(META_KEY)) else {
        return Ok(None);
    };
    let meta: CollectionMeta = serde_json::from_value(meta.clone().into_json())
        .map_err(|error| failed(&format!("the metadata of collection {name:?}"), error))?;
    Ok(Some(CollectionState { meta, chunks: info.points_count.unwrap_or_default(), generation: None }))
}

fn unknown(name: &str) -> UpstreamError {
    UpstreamError::permanent(
        Dependency::VectorIndex,
        "unknown_collection",
        format!("there is no collection {name:?}"),
    )
}

// gRPC status codes (google.rpc.Code); the crate does not export tonic's type.
const INVALID_ARGUMENT: i32 = 3;
const NOT_FOUND: i32 = 5;
const PERMISSION_DENIED: i32 = 7;
const FAILED_PRECONDITION: i32 = 9;
const UNIMPLEMENTED: i32 = 12;
const UNAUTHENTICATED: i32 = 16;

/// `None` for a selection of everything.
fn filter(selection: &Selection) -> Option<Filter> {
    let Selection { ids, docs, tenants, lang, repo, rev_below, first_chunks } = selection.clone();
    let mut must = Vec::new();
    must.extend(ids.map(|ids| Condition::has_id(ids.into_iter().map(|id| id.to_string()))));
    must.extend(docs.map(|docs| Condition::matches("doc", docs)));
    must.extend(tenants.map(|tenants| Condition::matches("tenant", tenants)));
    must.extend(lang.map(|lang| Condition::matches("lang", lang)));
    must.extend(repo.map(|repo| Condition::matches("repo", repo)));
    must.extend(rev_below.map(|rev| revision(rev, |lt| Range { lt, ..Range::default() })));
    if first_chunks {
        must.push(Condition::matches("n", 0_i64));
    }
    (!must.is_empty()).then(|| Filter::must(must))
}

/// All of a record but its text.
fn without_text() -> PayloadExcludeSelector {
    PayloadExcludeSelector { fields: vec!["text".to_owned()] }
}

/// Revisions in a range. The server compares floating-point numbers.
#[expect(clippy::cast_precision_loss, reason = "microseconds since 1970 fit into 53 bits until 2255")]
fn revision(rev: i64, range: impl FnOnce(Option<f64>) -> Range) -> Condition {
    Condition::range("rev", range(Some(rev as f64)))
}

fn weighed(record: &ChunkRecord, meta: &CollectionMeta) -> Document {
    let Weighing { k1, b, .. } = meta.weighing;
    let mut document = Document::new(meta.weighing.text(record), BM25_MODEL);
    let options = [("k", k1), ("b", b), ("avg_len", meta.avg_len)];
    document.options.extend(options.map(|(name, value)| (name.to_owned(), Value::from(value))));
    document
}

/// The query that adds up what the texts find; `None` without texts.
fn bm25(texts: Vec<String>) -> Option<Query> {
    let mut documents: Vec<Document> =
        texts.into_iter().map(|text| Document::new(text, BM25_MODEL)).collect();
    if documents.len() < 2 {
        return documents.pop().map(Query::new_nearest);
    }
    let documents: Vec<VectorInput> = documents.into_iter().map(VectorInput::from).collect();
    let mean = RecommendInputBuilder::default()
        .positive(documents)
        .strategy(RecommendStrategy::AverageVector)
        .build();
    Some(Query::new_recommend(mean))
}

fn hit(point: ScoredPoint) -> Result<Hit, UpstreamError> {
    Ok(Hit { id: uuid(point.id)?, score: point.score, record: Arc::new(record(json(point.payload))?) })
}

fn json(payload: HashMap<String, Value>) -> serde_json::Value {
    serde_json::Value::Object(payload.into_iter().map(|(key, value)| (key, value.into_json())).collect())
}

fn uuid(id: Option<PointId>) -> Result<Uuid, UpstreamError> {
    match id.and_then(|id| id.point_id_options) {
        Some(PointIdOptions::Uuid(text)) => text.parse().map_err(|error| failed("a point's id", error)),
        Some(PointIdOptions::Num(number)) => Ok(Uuid::from_u128(u128::from(number))),
        None => Err(failed("a point", "it has no id")),
    }
}

fn meta_json(meta: &CollectionMeta) -> Result<serde_json::Value, UpstreamError> {
    serde_json::to_value(meta).map_err(|error| failed("collection meta", error))
}

fn version(text: &str) -> Option<(u64, u64)> {
    let mut parts = text.trim_start_matches('v').split('.').map(str::parse);
    Some((parts.next()?.ok()?, parts.next()?.ok()?))
}

fn misconfigured(url: &Url, problem: &str) -> UpstreamError {
    UpstreamError::misconfigured(
        Dependency::VectorIndex,
        "QDRANT_URL",
        format!("{url} cannot be used: {problem}"),
        "set it to Qdrant's gRPC address, such as http://qdrant:6334",
    )
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

    use std::collections::BTreeSet;

    use super::{
        super::contract::{a_real_server, chunk, fresh, meta},
        *,
    };

    async fn indexed_fields(index: &QdrantIndex, name: &str) -> BTreeSet<String> {
        index.described(name).await.unwrap().unwrap().payload_schema.into_keys().collect()
    }

    fn all_fields() -> BTreeSet<String> {
        KEYWORD_FIELDS.into_iter().chain(INTEGER_FIELDS).map(str::to_owned).collect()
    }

    #[tokio::test]
    async fn a_collection_that_its_maker_left_half_made_is_finished_by_the_next() {
        let test = "qdrant::tests::a_collection_that_its_maker_left_half_made_is_finished_by_the_next";
        let Some((index, _server)) = a_real_server(test).await else { return };
        let name = fresh("half");
        let first = names::generation(&name, 1);
        // The gateway died when the server had made the generation, and nothing else.
        index.create(&first, &meta(Some(3))).await.unwrap();
        assert_eq!(
            index.ensure(&name, &meta(None)).await.unwrap(),
            meta(Some(3)),
            "it is what it was made as"
        );
        assert_eq!(index.info(&name).await.unwrap().unwrap().generation, Some(first));
        assert_eq!(indexed_fields(&index, &name).await, all_fields());
        index.drop_collection(&name).await.unwrap();
    }

    #[tokio::test]
    async fn the_rest_of_a_dropped_collection_is_not_taken_for_a_half_made_one() {
        let test = "qdrant::tests::the_rest_of_a_dropped_collection_is_not_taken_for_a_half_made_one";
        let Some((index, _server)) = a_real_server(test).await else { return };
        let name = fresh("rest");
        let [first, second] = [1, 2].map(|number| names::generation(&name, number));
        index.ensure(&first, &meta(None)).await.unwrap();
        index.upsert(&first, vec![chunk("a.md", "apple").0], None).await.unwrap();
        index.ensure(&name, &meta(None)).await.unwrap();
        let state = index.info(&name).await.unwrap().unwrap();
        assert_eq!((state.generation, state.chunks), (Some(second), 0));
        index.drop_collection(&name).await.unwrap();
        index.drop_collection(&first).await.unwrap();
    }

    #[tokio::test]
    async fn a_generation_without_its_payload_indexes_gets_them_with_the_next_write() {
        let test = "qdrant::tests::a_generation_without_its_payload_indexes_gets_them_with_the_next_write";
        let Some((index, _server)) = a_real_server(test).await else { return };
        for by_ensuring in [true, false] {
            let generation = names::generation(&fresh("fields"), 2);
            index.create(&generation, &meta(None)).await.unwrap();
            assert_eq!(indexed_fields(&index, &generation).await, BTreeSet::new());
            if by_ensuring {
                index.ensure(&generation, &meta(None)).await.unwrap();
            } else {
                index.upsert(&generation, vec![chunk("a.md", "apple").0], None).await.unwrap();
            }
            assert_eq!(indexed_fields(&index, &generation).await, all_fields());
            index.drop_collection(&generation).await.unwrap();
        }
    }

    #[test]
    fn versions_are_compared_as_numbers() {
        assert_eq!(version("1.18.3"), Some((1, 18)));
        assert_eq!(version("v1.9.0-dev"), Some((1, 9)));
        assert!(version("1.9.0") < Some(OLDEST));
        assert_eq!(version("dev"), None);
    }

    #[test]
    fn everything_is_no_filter() {
        assert_eq!(filter(&Selection::default()), None);
        let some = Selection { first_chunks: true, lang: Some("rust".to_owned()), ..Selection::default() };
        assert_eq!(filter(&some).map(|filter| filter.must.len()), Some(2));
    }
}
