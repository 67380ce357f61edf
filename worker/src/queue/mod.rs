//! Where requests come from and where answers go: the ports and their adapters.
//!
//! Nothing outside this folder names an adapter; [`open`] picks one by configuration.

use std::{fmt, sync::Arc, time::Duration};

use async_trait::async_trait;
use atlas_shared::{
    Config, Dependency, TaskId, UpstreamError,
    config::QueueConfig,
    message::{Answer, is_name},
};
use bytes::Bytes;

mod embedded;
mod pubsub;

/// The largest message that is published, attributes included. Pub/Sub's own limit is 10 MB; its
/// client waits for ever on a larger one, so the size is checked here, for both adapters.
pub const MAX_PUBLISH_BYTES: usize = 9_500_000;

/// How a delivery ends at the queue. Dropping the handle without a word is a nack.
#[async_trait]
pub trait AckHandle: Send + Sync {
    /// The message is durable in the store (or answered): never deliver it again.
    async fn ack(self: Box<Self>) -> Result<(), UpstreamError>;

    /// Deliver it again, by the subscription's retry policy.
    async fn nack(self: Box<Self>) -> Result<(), UpstreamError>;
}

/// One message as it was delivered. The queue keeps its lease while this value lives.
pub struct Delivery {
    /// The queue's id: the same for every delivery of the message.
    pub message_id: String,
    /// The message, unchecked.
    pub data: Bytes,
    /// Its attributes.
    pub attributes: Vec<(String, String)>,
    /// Which delivery this is, counted from 1; `None` where the queue does not count.
    pub delivery_attempt: Option<u32>,
    /// How it ends.
    pub handle: Box<dyn AckHandle>,
}

impl fmt::Debug for Delivery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Delivery")
            .field("message_id", &self.message_id)
            .field("bytes", &self.data.len())
            .field("delivery_attempt", &self.delivery_attempt)
            .finish_non_exhaustive()
    }
}

/// Pulls messages. Adapters rebuild broken streams themselves; what comes out of `pull` as an error
/// is what a person must look at.
#[async_trait]
pub trait RequestQueue: Send + Sync {
    /// The next message, when there is one; `None` once [`RequestQueue::drain`] was called. Safe to
    /// cancel: a message is either returned or not taken.
    ///
    /// The adapter holds at most the number of undecided deliveries it was opened with.
    async fn pull(&self) -> Result<Option<Delivery>, UpstreamError>;

    /// Stops pulling: messages that were not returned yet go back at once. Deliveries that were
    /// returned can still be acked and nacked.
    async fn drain(&self);

    /// Waits until all acks and nacks so far have reached the queue, at most `bound`.
    async fn flush(&self, bound: Duration) -> Result<(), UpstreamError>;

    /// Is the queue reachable and set up as it must be? For readiness and `atlas doctor`.
    async fn check(&self) -> Result<(), UpstreamError>;

    /// What is set up otherwise than Atlas would set it, in words that say how to change it: somebody's
    /// choice, or an oversight. For `atlas doctor`; a worker logs it when it starts.
    async fn differences(&self) -> Result<Vec<String>, UpstreamError> {
        Ok(Vec::new())
    }

    /// How much waits, for `pubsub_unacknowledged_messages`.
    async fn backlog(&self) -> Result<Backlog, UpstreamError>;
}

/// What is known of the messages that were not acked yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backlog {
    /// The subscription's short name: the label of the metric.
    pub subscription: String,
    /// How many messages.
    pub unacknowledged: u64,
    /// How long the oldest of them has waited.
    pub oldest: Option<Duration>,
    /// What was counted.
    pub scope: BacklogScope,
}

/// What a [`Backlog`] counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BacklogScope {
    /// The whole subscription.
    Subscription,
    /// The deliveries that this process holds undecided. Pub/Sub tells a subscriber no more; the
    /// whole number is in Cloud Monitoring (`subscription/num_undelivered_messages`).
    Process,
}

/// Publishes messages, at least once.
#[async_trait]
pub trait ResultPublisher: Send + Sync {
    /// Publishes one message and returns its id once the queue has it. `topic` is a short name.
    async fn publish(
        &self,
        topic: &str,
        data: Bytes,
        attributes: Vec<(String, String)>,
    ) -> Result<String, UpstreamError>;
}

/// The answers to one task, as they are published.
#[async_trait]
pub trait AnswerStream: Send {
    /// The next answer; waits for it as long as it takes. Safe to cancel.
    async fn next(&mut self) -> Result<Answer, UpstreamError>;

    /// Stops watching and removes what was set up for it.
    async fn close(self: Box<Self>);
}

/// All that a worker needs of the queue.
pub struct Queues {
    /// Requests. Nothing is taken before the first [`RequestQueue::pull`].
    pub requests: Arc<dyn RequestQueue>,
    /// What reached the dead-letter topic.
    pub dead_letters: Option<Arc<dyn RequestQueue>>,
    /// `docs_added`, where this worker reads it (`INDEX_ON_DOCS_ADDED`).
    pub documents: Option<Arc<dyn RequestQueue>>,
    /// Answers, progress, errors.
    pub publisher: Arc<dyn ResultPublisher>,
}

/// Short names of the topics.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Topics {
    /// Requests.
    pub requests: String,
    /// Answers.
    pub answers: String,
    /// Dead letters.
    pub dead_letters: String,
    /// What is new in the documents.
    pub documents: String,
}

impl Topics {
    /// The topics that `config` names; the embedded queue always has the default names.
    pub fn of(config: &Config) -> Self {
        match &config.queue {
            QueueConfig::Embedded(_) => embedded::topics(),
            QueueConfig::PubSub(pubsub) => Self {
                requests: pubsub.topic_in.clone(),
                answers: pubsub.topic_out.clone(),
                dead_letters: pubsub.topic_dlq.clone(),
                documents: pubsub.topic_docs.clone(),
            },
        }
    }
}

/// How deliveries behave. The embedded queue follows it; Pub/Sub subscriptions get it when Atlas
/// creates them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tuning {
    /// Delay of the first redelivery after a nack; doubles with every delivery.
    pub min_backoff: Duration,
    /// Longest delay of a redelivery.
    pub max_backoff: Duration,
    /// How long a dead process's delivery stays with it. Pub/Sub wants 10 to 600 seconds.
    pub lease: Duration,
    /// Deliveries before a message is a dead letter, in the embedded queue
    /// (`PUBSUB_MAX_DELIVERY_ATTEMPTS` says it for Pub/Sub).
    pub max_delivery_attempts: u32,
}

impl Default for Tuning {
    fn default() -> Self {
        Self {
            min_backoff: Duration::from_secs(2),
            max_backoff: Duration::from_secs(120),
            lease: Duration::from_secs(30),
            max_delivery_attempts: 10,
        }
    }
}

/// Opens the configured queue: creates what is missing where that is allowed, checks the rest.
pub async fn open(config: &Config) -> Result<Queues, UpstreamError> {
    open_with(config, &Tuning::default()).await
}

/// [`open`] with other times than the usual, for tests.
pub async fn open_with(config: &Config, tuning: &Tuning) -> Result<Queues, UpstreamError> {
    match &config.queue {
        QueueConfig::Embedded(dir) => embedded::open(dir, &config.worker, tuning).await,
        QueueConfig::PubSub(pubsub) => pubsub::open(pubsub, &config.worker, tuning).await,
    }
}

/// Opens only the publishing side: needs no right to pull.
pub async fn open_publisher(config: &Config) -> Result<Arc<dyn ResultPublisher>, UpstreamError> {
    match &config.queue {
        QueueConfig::Embedded(dir) => embedded::open_publisher(dir).await,
        QueueConfig::PubSub(pubsub) => pubsub::open_publisher(pubsub).await,
    }
}

/// Watches the answers to one task. Sees every answer that is published after it returned, so call
/// it *before* the request is published.
pub async fn watch_answers(config: &Config, task_id: TaskId) -> Result<Box<dyn AnswerStream>, UpstreamError> {
    match &config.queue {
        QueueConfig::Embedded(dir) => embedded::watch_answers(dir, task_id).await,
        QueueConfig::PubSub(pubsub) => pubsub::watch_answers(pubsub, task_id).await,
    }
}

/// Refuses what Pub/Sub would refuse, or worse, hang on. Same limits for both adapters, so that what
/// works on a laptop works in production.
fn check_publishable(topic: &str, data: &[u8], attributes: &[(String, String)]) -> Result<(), UpstreamError> {
    let permanent = |code, message: String| Err(UpstreamError::permanent(Dependency::Queue, code, message));
    if !is_name(topic) || topic.len() < 3 {
        return permanent("invalid_topic", format!("{topic:?} is not a topic's name"));
    }
    // https://cloud.google.com/pubsub/quotas#resource_limits
    if attributes.len() > 100 {
        return permanent("too_many_attributes", format!("{} attributes; at most 100", attributes.len()));
    }
    for (key, value) in attributes {
        if key.is_empty() || key.len() > 256 || value.len() > 1024 || key.starts_with("goog") {
            return permanent(
                "invalid_attribute",
                format!(
                    "attribute {key:?} must have 1 to 256 bytes, not start with \"goog\", and its value at most 1024"
                ),
            );
        }
    }
    let bytes = data.len() + attributes.iter().map(|(key, value)| key.len() + value.len()).sum::<usize>();
    if bytes > MAX_PUBLISH_BYTES {
        return permanent(
            "message_too_large",
            format!("the message has {bytes} bytes; the queue takes at most {MAX_PUBLISH_BYTES}"),
        );
    }
    if data.is_empty() && attributes.is_empty() {
        return permanent("empty_message", "a message needs data or an attribute".to_owned());
    }
    Ok(())
}
