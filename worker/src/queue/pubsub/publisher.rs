//! Publishing: batched by the client, bounded and explained by us.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use atlas_shared::{Dependency, UpstreamError, config::PubSubConfig};
use bytes::Bytes;
use google_cloud_gax::error::rpc::Code;
use google_cloud_pubsub::{
    client::{BasePublisher, Publisher},
    error::PublishError,
    model::Message,
};
use tokio::time::timeout;

use super::{Connection, admin::Admin, code_of, describe, upstream};
use crate::queue::{ResultPublisher, check_publishable};

/// How long a message waits for others to share its request.
const BATCH_DELAY: Duration = Duration::from_millis(5);

/// Topics with a publisher of their own at once. `reply_to` lets requests name topics, so their number
/// is not ours.
const PUBLISHERS: usize = 64;

pub(super) struct PubSubPublisher {
    base: BasePublisher,
    admin: Arc<Admin>,
    /// The configured topics, and the setting that names each.
    configured: [(String, &'static str); 3],
    /// A publisher is a task of the client's that batches for one topic; it ends when dropped.
    publishers: Mutex<HashMap<String, Publisher>>,
}

impl PubSubPublisher {
    pub(super) async fn connect(
        connection: &Connection,
        config: &PubSubConfig,
        admin: Arc<Admin>,
    ) -> Result<Self, UpstreamError> {
        Ok(Self {
            base: connection.publisher().await?,
            admin,
            configured: [
                (config.topic_in.clone(), "PUBSUB_TOPIC_IN"),
                (config.topic_out.clone(), "PUBSUB_TOPIC_OUT"),
                (config.topic_dlq.clone(), "PUBSUB_TOPIC_DLQ"),
            ],
            publishers: Mutex::default(),
        })
    }

    fn publisher(&self, topic: &str) -> Publisher {
        let mut publishers = self.publishers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(publisher) = publishers.get(topic) {
            return publisher.clone();
        }
        if publishers.len() >= PUBLISHERS {
            publishers.retain(|name, _| self.variable(name).is_some());
        }
        let publisher =
            self.base.publisher(self.admin.topic_path(topic)).set_delay_threshold(BATCH_DELAY).build();
        publishers.insert(topic.to_owned(), publisher.clone());
        publisher
    }

    /// The setting that names `topic`, if one does.
    fn variable(&self, topic: &str) -> Option<&'static str> {
        self.configured.iter().find(|(name, _)| name == topic).map(|(_, variable)| *variable)
    }

    async fn attempt(&self, topic: &str, message: Message) -> Result<String, Failure> {
        // The client's own bound covers its retries; this one also covers waiting for a batch.
        let bound = self.admin.timeout() + Duration::from_secs(1);
        match timeout(bound, self.publisher(topic).publish(message)).await {
            Ok(Ok(id)) => Ok(id),
            Ok(Err(PublishError::Rpc(error))) if code_of(&error) == Some(Code::NotFound) => {
                Err(Failure::NoTopic)
            }
            Ok(Err(PublishError::Rpc(error))) => Err(Failure::Other(upstream(
                &error,
                &format!("publishing to {topic}"),
                self.admin.project(),
                "roles/pubsub.publisher",
            ))),
            Ok(Err(error)) => {
                Err(Failure::Other(UpstreamError::transient(Dependency::Queue, describe(&error))))
            }
            Err(_) => Err(Failure::Other(UpstreamError::transient(
                Dependency::Queue,
                format!("publishing to {topic} took longer than {} ms", bound.as_millis()),
            ))),
        }
    }
}

enum Failure {
    NoTopic,
    Other(UpstreamError),
}

#[async_trait]
impl ResultPublisher for PubSubPublisher {
    async fn publish(
        &self,
        topic: &str,
        data: Bytes,
        attributes: Vec<(String, String)>,
    ) -> Result<String, UpstreamError> {
        check_publishable(topic, &data, &attributes)?;
        let message = Message::new().set_data(data).set_attributes(attributes);
        let failure = match self.attempt(topic, message.clone()).await {
            Ok(id) => return Ok(id),
            Err(failure) => failure,
        };
        let retried = match (failure, self.variable(topic)) {
            (Failure::Other(error), _) => return Err(error),
            // A restarted emulator has forgotten its topics.
            (Failure::NoTopic, Some(variable)) => {
                self.admin.ensure_topic(topic, variable).await?;
                self.attempt(topic, message).await
            }
            // A message named it: nothing is created on a message's word.
            (Failure::NoTopic, None) => Err(Failure::NoTopic),
        };
        retried.map_err(|failure| match failure {
            Failure::Other(error) => error,
            Failure::NoTopic => UpstreamError::permanent(
                Dependency::Queue,
                "unknown_topic",
                format!("project {} has no topic {topic}", self.admin.project()),
            ),
        })
    }
}
