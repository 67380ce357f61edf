//! Watching the answers to one task through a subscription of its own.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use atlas_shared::{Dependency, TaskId, UpstreamError, config::PubSubConfig, message::Answer};
use google_cloud_pubsub::client::Subscriber;
use tracing::{debug, warn};
use uuid::Uuid;

use super::{
    admin::{Admin, SubscriptionSpec},
    subscription::{PubSubQueue, StreamOptions},
};
use crate::queue::{AnswerStream, RequestQueue as _};

/// The shortest that Pub/Sub takes, for a subscription that nobody was left to delete.
const EXPIRES: Duration = Duration::from_hours(24);
const RETENTION: Duration = Duration::from_mins(10);

pub(super) struct PubSubAnswers {
    queue: PubSubQueue,
    admin: Arc<Admin>,
    task_id: TaskId,
    /// Taken when it is deleted.
    subscription: Option<String>,
}

impl PubSubAnswers {
    pub(super) async fn start(
        config: &PubSubConfig,
        subscriber: Subscriber,
        admin: Arc<Admin>,
        task_id: TaskId,
    ) -> Result<Self, UpstreamError> {
        // Two who watch one task do not share its answers.
        let name = format!("atlas-ask-{task_id}-{}", Uuid::new_v4().simple());
        let spec = SubscriptionSpec {
            name: name.clone(),
            topic: config.topic_out.clone(),
            variable: "PUBSUB_TOPIC_OUT",
            dead_letters: None,
            backoff: None,
            ack_deadline: Duration::from_secs(10),
            retention: RETENTION,
            filter: format!("attributes.task_id = \"{task_id}\""),
            expires: Some(EXPIRES),
        };
        admin.create_subscription(&spec).await?;
        let options = StreamOptions {
            in_flight: 16,
            ack_deadline: spec.ack_deadline,
            max_lease: Duration::from_mins(10),
        };
        let queue = PubSubQueue::new(subscriber, admin.clone(), spec, options);
        Ok(Self { queue, admin, task_id, subscription: Some(name) })
    }
}

#[async_trait]
impl AnswerStream for PubSubAnswers {
    async fn next(&mut self) -> Result<Answer, UpstreamError> {
        loop {
            let Some(delivery) = self.queue.pull().await? else {
                return Err(UpstreamError::transient(
                    Dependency::Queue,
                    "the answers are not watched any more",
                ));
            };
            let answer = serde_json::from_slice::<Answer>(&delivery.data);
            // Read means done: an answer that is lost from here on was lost with its reader.
            delivery.handle.ack().await?;
            match answer {
                // The filter is the server's; a server that ignores it must not confuse a user.
                Ok(answer) if answer.task_id == self.task_id => return Ok(answer),
                Ok(answer) => debug!(task_id = %answer.task_id, "another task's answer"),
                Err(error) => debug!(%error, "a message on the answers' topic is no answer"),
            }
        }
    }

    async fn close(mut self: Box<Self>) {
        self.queue.drain().await;
        let Some(subscription) = self.subscription.take() else { return };
        if let Err(error) = self.admin.delete_subscription(&subscription).await {
            warn!(%error, subscription, "the temporary subscription stays until it expires in a day");
        }
    }
}

impl Drop for PubSubAnswers {
    fn drop(&mut self) {
        // Not closed, as on Ctrl-C: tidy up if there is still a runtime to do it, else it expires.
        if let Some(subscription) = self.subscription.take()
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            let admin = self.admin.clone();
            runtime.spawn(async move {
                // It expires anyway.
                let _ = admin.delete_subscription(&subscription).await;
            });
        }
    }
}
