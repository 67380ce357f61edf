//! Answers that are kept: in this process, and in front of a Redis that replicas share.
//!
//! **An answer is served only under the version of the index that was current before it was searched
//! for** ([`Version`]), and the version is read from the index itself before every look into the cache.
//! So no cache, here or in Redis, can outlive a change: whatever happens to Redis, an answer is at
//! most slower, never older. While the index is down there is no version to ask for; an answer of any
//! version may then be given, if it is not too old, marked as stale.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use atlas_shared::UpstreamError;
use bytes::Bytes;
use futures::{
    FutureExt as _,
    future::{BoxFuture, Shared, WeakShared},
};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{
    error::GatewayError,
    index::Version,
    metrics::Metrics,
    search::{Answer, Found, Key},
};

mod redis;

pub(crate) use redis::RedisCache;

/// Searches under way that are remembered before those that nobody waits for are swept out.
const MANY_FLIGHTS: usize = 1024;

/// How an answer is less than it could be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Degraded {
    /// BM25 alone.
    Lexical,
    /// The reranker did not answer.
    Unreranked,
    /// From the cache, because the index does not answer.
    Stale,
}

impl Degraded {
    /// Every reason, for metrics.
    pub(crate) const ALL: [Self; 3] = [Self::Lexical, Self::Unreranked, Self::Stale];

    /// The word in header and metric.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Lexical => "lexical",
            Self::Unreranked => "unreranked",
            Self::Stale => "stale",
        }
    }
}

/// A kept answer.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Entry {
    /// Numbers of the collections ([`Version::numbers`]).
    pub(crate) numbers: Vec<Uuid>,
    pub(crate) epoch: Uuid,
    /// When it was searched, in milliseconds since 1970.
    pub(crate) at: i64,
    pub(crate) degraded: Vec<Degraded>,
    pub(crate) body: Bytes,
}

impl Entry {
    fn is_of(&self, version: &Version) -> bool {
        self.epoch == version.epoch && self.numbers == version.numbers
    }

    fn age(&self) -> Duration {
        let age = Timestamp::now().as_millisecond().saturating_sub(self.at);
        Duration::from_millis(u64::try_from(age).unwrap_or_default())
    }
}

/// How long answers are kept, and how many.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CacheConfig {
    /// `CACHE_TTL`; never zero.
    pub(crate) ttl: Duration,
    /// `CACHE_STALE_SECONDS`.
    pub(crate) stale: Duration,
    /// `CACHE_MAX_ENTRIES`.
    pub(crate) max_entries: u64,
}

/// A search under way.
type Flight = BoxFuture<'static, Result<Found, GatewayError>>;

/// Searches under way, by query and version.
type Flights = HashMap<(Key, Vec<Uuid>), WeakShared<Flight>>;

/// The cache of one gateway.
pub(crate) struct AnswerCache {
    entries: moka::future::Cache<Key, Arc<Entry>>,
    shared: Option<Arc<RedisCache>>,
    /// Equal queries wait for one of them.
    flights: Mutex<Flights>,
    /// The epoch that was seen last; `None`: not yet.
    epoch: Mutex<Option<Uuid>>,
    config: CacheConfig,
    metrics: Metrics,
}

impl AnswerCache {
    pub(crate) fn new(config: CacheConfig, shared: Option<Arc<RedisCache>>, metrics: Metrics) -> Self {
        let entries = moka::future::Cache::builder()
            .max_capacity(config.max_entries)
            .time_to_live(config.ttl.max(config.stale))
            .build();
        Self { entries, shared, flights: Mutex::default(), epoch: Mutex::default(), config, metrics }
    }

    /// The index is in this epoch: answers of another one are forgotten.
    pub(crate) fn epoch(&self, epoch: Uuid) {
        let mut seen = self.epoch.lock().unwrap_or_else(PoisonError::into_inner);
        if seen.replace(epoch).is_some_and(|before| before != epoch) {
            self.entries.invalidate_all();
        }
    }

    /// The answer under this version, if one is kept.
    pub(crate) async fn fresh(&self, key: Key, version: &Version) -> Option<Arc<Entry>> {
        let fits = |entry: &Arc<Entry>| entry.is_of(version) && entry.age() <= self.config.ttl;
        if let Some(entry) = self.entries.get(&key).await.filter(fits) {
            self.metrics.cache_hits.inc();
            return Some(entry);
        }
        let entry = self.shared.as_ref()?.get(version.epoch, key).await.map(Arc::new).filter(fits)?;
        self.metrics.cache_hits.inc();
        self.metrics.cache_shared_hits.inc();
        self.entries.insert(key, Arc::clone(&entry)).await;
        Some(entry)
    }

    /// An answer of any version that is not too old.
    pub(crate) async fn stale(&self, key: Key) -> Option<Arc<Entry>> {
        let epoch = (*self.epoch.lock().unwrap_or_else(PoisonError::into_inner))?;
        let fits = |entry: &Arc<Entry>| entry.epoch == epoch && entry.age() <= self.config.stale;
        if let Some(entry) = self.entries.get(&key).await.filter(fits) {
            return Some(entry);
        }
        self.shared.as_ref()?.get(epoch, key).await.map(Arc::new).filter(fits)
    }

    /// Keeps an answer that was searched for after this version was read.
    pub(crate) async fn insert(&self, key: Key, version: &Version, answer: &Answer) {
        let entry = Arc::new(Entry {
            numbers: version.numbers.clone(),
            epoch: version.epoch,
            at: Timestamp::now().as_millisecond(),
            degraded: answer.degraded.clone(),
            body: answer.body.clone(),
        });
        if let Some(shared) = &self.shared {
            shared.put(key, Arc::clone(&entry), self.config.ttl.max(self.config.stale));
        }
        self.entries.insert(key, entry).await;
    }

    /// Searches once for all who ask the same of the same version at the same time. The search goes on
    /// as long as one of them waits.
    pub(crate) async fn one_flight(
        &self,
        key: Key,
        version: &Version,
        search: impl Future<Output = Result<Found, GatewayError>> + Send + 'static,
    ) -> Result<Found, GatewayError> {
        let id = (key, version.numbers.clone());
        let flight: Shared<Flight> = {
            let mut flights = self.flights.lock().unwrap_or_else(PoisonError::into_inner);
            // One that has come to its end is no flight any more.
            let under_way =
                flights.get(&id).and_then(WeakShared::upgrade).filter(|flight| flight.peek().is_none());
            if let Some(flight) = under_way {
                self.metrics.cache_joined.inc();
                flight
            } else {
                if flights.len() >= MANY_FLIGHTS {
                    flights.retain(|_, flight| flight.upgrade().is_some());
                }
                let flight = search.boxed().shared();
                if let Some(weak) = flight.downgrade() {
                    flights.insert(id.clone(), weak);
                }
                flight
            }
        };
        let result = flight.await;
        let mut flights = self.flights.lock().unwrap_or_else(PoisonError::into_inner);
        if flights
            .get(&id)
            .is_some_and(|flight| flight.upgrade().is_none_or(|flight| flight.peek().is_some()))
        {
            flights.remove(&id);
        }
        drop(flights);
        result
    }

    /// Forgets what is kept in this process.
    pub(crate) fn forget(&self) {
        self.entries.invalidate_all();
    }

    /// `None` without a shared cache.
    pub(crate) async fn check_shared(&self) -> Option<Result<(), UpstreamError>> {
        Some(self.shared.as_ref()?.check().await)
    }
}

#[cfg(test)]
mod tests;
