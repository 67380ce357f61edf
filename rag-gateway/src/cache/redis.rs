//! The cache that replicas share: Redis.
//!
//! Nothing depends on it: every call is bounded by a fraction of a second and guarded by a breaker,
//! what cannot be read is a miss, and what cannot be written is not kept. Entries carry the version
//! they were searched under, so a Redis that comes back with old ones does no harm. Keys hold a hash
//! of the query and the index's epoch, which differs between indexes, so several deployments may
//! share one Redis.

use std::{sync::Arc, time::Duration};

use ::redis::{
    AsyncCommands as _, Client, RedisError,
    aio::{ConnectionManager, ConnectionManagerConfig},
};
use atlas_shared::{Dependency, Secret, UpstreamError, config::ResilienceConfig, resilience::CircuitBreaker};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tokio::sync::Semaphore;
use uuid::Uuid;

use super::{Degraded, Entry};
use crate::{metrics::Metrics, search::Key};

/// Bound of one call: a search takes a few milliseconds, so more would not be worth waiting for.
const CALL_TIMEOUT: Duration = Duration::from_millis(250);

/// Bound of one attempt to connect.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// Answers larger than this are not shared.
const MAX_ENTRY_BYTES: usize = 1 << 20;

/// Writes under way; more are left out.
const MAX_WRITES: usize = 64;

/// One connection to Redis, which mends itself.
pub(crate) struct RedisCache {
    connection: ConnectionManager,
    breaker: CircuitBreaker,
    writes: Arc<Semaphore>,
    metrics: Metrics,
}

/// What stands before the body of an entry, on one line.
#[derive(Serialize, Deserialize)]
struct Head {
    numbers: Vec<Uuid>,
    at: i64,
    degraded: Vec<Degraded>,
}

impl RedisCache {
    /// Prepares the connection; it is made when it is first needed, and again whenever it breaks.
    pub(crate) fn connect(
        url: &Secret,
        resilience: &ResilienceConfig,
        metrics: &Metrics,
    ) -> Result<Self, UpstreamError> {
        // A TLS connection needs to know which of the linked cryptography it shall use.
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let wrong = |error: RedisError| {
            UpstreamError::misconfigured(
                Dependency::Cache,
                "REDIS_URL",
                // The URL may carry a password: the error's kind is all that is told.
                format!("is no address of a Redis server ({:?})", error.kind()),
                "set it to, say, redis://redis:6379/0, or rediss:// for TLS",
            )
        };
        let client = Client::open(url.expose()).map_err(wrong)?;
        let config = ConnectionManagerConfig::new()
            .set_connection_timeout(Some(CONNECT_TIMEOUT))
            .set_response_timeout(Some(CALL_TIMEOUT))
            .set_number_of_retries(1)
            .set_pipeline_buffer_size(256);
        let connection = ConnectionManager::new_lazy_with_config(client, config).map_err(wrong)?;
        let breaker = CircuitBreaker::new(Dependency::Cache, resilience).with_metrics(&metrics.upstream);
        Ok(Self {
            connection,
            breaker,
            writes: Arc::new(Semaphore::new(MAX_WRITES)),
            metrics: metrics.clone(),
        })
    }

    /// What is kept under a key; `None` also where Redis does not answer.
    pub(super) async fn get(&self, epoch: Uuid, key: Key) -> Option<Entry> {
        let mut connection = self.connection.clone();
        let name = name(epoch, key);
        let value: Option<Vec<u8>> = self.call(async move { connection.get(name).await }).await?;
        decode(epoch, &value?)
    }

    /// Keeps an entry, in the background.
    pub(super) fn put(self: &Arc<Self>, key: Key, entry: Arc<Entry>, ttl: Duration) {
        let (Some(value), Ok(slot)) = (encode(&entry), Arc::clone(&self.writes).try_acquire_owned()) else {
            return;
        };
        let this = Arc::clone(self);
        tokio::spawn(async move {
            let _slot = slot;
            let mut connection = this.connection.clone();
            let name = name(entry.epoch, key);
            let seconds = ttl.as_secs().max(1);
            let _: Option<()> = this.call(async move { connection.set_ex(name, value, seconds).await }).await;
        });
    }

    /// Does it answer?
    pub(super) async fn check(&self) -> Result<(), UpstreamError> {
        let mut connection = self.connection.clone();
        let ping = async move { ::redis::cmd("PING").query_async::<()>(&mut connection).await };
        self.guarded(ping).await
    }

    /// A call whose failure is a miss.
    async fn call<T>(&self, call: impl Future<Output = Result<T, RedisError>>) -> Option<T> {
        match self.guarded(call).await {
            Ok(value) => Some(value),
            Err(error) => {
                self.metrics.cache_errors.inc();
                tracing::debug!(error = %error, "the shared cache is left out");
                None
            }
        }
    }

    async fn guarded<T>(
        &self,
        call: impl Future<Output = Result<T, RedisError>>,
    ) -> Result<T, UpstreamError> {
        let permit = self.breaker.try_acquire()?;
        let result = match tokio::time::timeout(CALL_TIMEOUT, call).await {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(error)) => Err(UpstreamError::transient(Dependency::Cache, describe(&error))),
            Err(_) => Err(UpstreamError::transient(Dependency::Cache, "no answer in time")),
        };
        permit.done(result)
    }
}

/// What happened, without anything of the URL.
fn describe(error: &RedisError) -> String {
    match error.code() {
        Some(code) => format!("Redis refused ({code})"),
        None => format!("{:?}", error.kind()),
    }
}

fn name(epoch: Uuid, Key(hash): Key) -> String {
    use std::fmt::Write as _;

    let mut name = format!("atlas:answer:{}:", epoch.simple());
    for byte in hash {
        // Writing to a String cannot fail.
        let _ = write!(name, "{byte:02x}");
    }
    name
}

fn encode(entry: &Entry) -> Option<Vec<u8>> {
    let Entry { numbers, at, degraded, body, .. } = entry;
    let head = Head { numbers: numbers.clone(), at: *at, degraded: degraded.clone() };
    let mut value = serde_json::to_vec(&head).ok()?;
    value.push(b'\n');
    value.extend_from_slice(body);
    (value.len() <= MAX_ENTRY_BYTES).then_some(value)
}

/// Anything that is not what [`encode`] makes is a miss.
fn decode(epoch: Uuid, value: &[u8]) -> Option<Entry> {
    let end = value.iter().position(|byte| *byte == b'\n')?;
    let Head { numbers, at, degraded } = serde_json::from_slice(&value[..end]).ok()?;
    let body = &value[end + 1..];
    // A cut value must not become half an answer.
    (body.first() == Some(&b'[') && body.last() == Some(&b']')).then(|| Entry {
        numbers,
        epoch,
        at,
        degraded,
        body: Bytes::copy_from_slice(body),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_entry_is_read_as_it_was_written() {
        let entry = Entry {
            numbers: vec![Uuid::new_v4()],
            epoch: Uuid::new_v4(),
            at: 7,
            degraded: vec![Degraded::Lexical],
            body: Bytes::from_static(b"[{\"text\":\"a\\nb\"}]"),
        };
        let value = encode(&entry).unwrap_or_default();
        assert_eq!(decode(entry.epoch, &value), Some(entry.clone()));
        assert_eq!(decode(entry.epoch, &value[..value.len() - 1]), None, "cut short");
        let large = Entry { body: vec![b' '; MAX_ENTRY_BYTES].into(), ..entry };
        assert_eq!(encode(&large), None);
    }

    proptest! {
        #[test]
        fn no_value_panics(value in prop::collection::vec(any::<u8>(), 0..200)) {
            decode(Uuid::nil(), &value);
        }
    }
}
