//! Where requests come from and where answers go: the ports and their adapters.
//!
//! Nothing outside this folder names an adapter; [`open`] picks one by configuration.

use std::{fmt, time::Duration};

use async_trait::async_trait;
use atlas_shared::UpstreamError;
use bytes::Bytes;

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
