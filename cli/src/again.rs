//! Running a request again. A final run never changes, so it runs as another task: always the same
//! one for the same run, so that doing it twice, or after a crash in the middle, makes one run.

use std::sync::Arc;

use atlas_shared::{
    Config, TaskId,
    config::{QueueConfig, StoreConfig},
    message::ROLE,
};
use atlas_worker::{
    queue::{self, ResultPublisher, Topics},
    store::{RunDetail, RunRecord, RunStatus, RunStore},
};
use bytes::Bytes;
use jiff::Timestamp;
use serde_json::{Map, Value, json};
use uuid::Uuid;

use crate::error::{CliError, Result};

/// Names the namespace in which a failed task becomes the task that tries it again.
const AGAIN_NAMESPACE: Uuid = Uuid::from_u128(0x91b3_04d6_2a7c_4c1b_a0f5_7d0e_5c38_e2a6);
/// Nobody tries a request so often; a longer chain is a loop by design of whoever made it.
const LONGEST_CHAIN: usize = 1000;

/// What is to be done about a run that failed.
#[derive(Debug)]
pub(crate) enum Again {
    /// Publish it under this id; the last failed attempt at it is `of`, with its request.
    Publish {
        /// The new task.
        task_id: TaskId,
        /// The failed one.
        of: Box<RunDetail>,
    },
    /// Somebody did before, and it has not failed.
    Already(Box<RunRecord>),
}

/// Follows the tasks that tried this failed run again.
pub(crate) async fn follow(store: &dyn RunStore, failed: RunDetail) -> Result<Again> {
    let mut of = failed;
    for _ in 0..LONGEST_CHAIN {
        let task_id = next(of.run.task_id);
        match store.get_run(task_id).await? {
            None => return Ok(Again::Publish { task_id, of: Box::new(of) }),
            Some(later) if later.run.status == RunStatus::Failed => of = later,
            Some(later) => return Ok(Again::Already(Box::new(later.run))),
        }
    }
    Err(CliError::failure(format!("{} was tried again {LONGEST_CHAIN} times", of.run.task_id))
        .fix("publish the request anew: atlas publish"))
}

/// The task as which a final one runs again.
pub(crate) fn next(task: TaskId) -> TaskId {
    TaskId(Uuid::new_v5(&AGAIN_NAMESPACE, task.0.as_bytes()))
}

/// The request as another task. A deadline that has passed is left out: it would only fail again.
pub(crate) fn renamed(mut request: Map<String, Value>, task_id: TaskId, retry_of: Option<TaskId>) -> Bytes {
    request.insert("task_id".to_owned(), json!(task_id));
    let metadata = request.entry("metadata").or_insert_with(|| json!({}));
    if !metadata.is_object() {
        *metadata = json!({});
    }
    if let (Some(metadata), Some(retry_of)) = (metadata.as_object_mut(), retry_of) {
        metadata.insert("retry_of".to_owned(), json!(retry_of));
        let passed = metadata
            .get("deadline")
            .and_then(|deadline| deadline.as_str()?.parse::<Timestamp>().ok())
            .is_some_and(|deadline| deadline <= Timestamp::now());
        if passed {
            metadata.remove("deadline");
        }
    }
    Bytes::from(Value::Object(request).to_string())
}

/// Puts requests on the configured queue.
pub(crate) struct Requests {
    publisher: Arc<dyn ResultPublisher>,
    topic: String,
}

impl Requests {
    /// Opens the queue that the store's workers pull from.
    pub(crate) async fn open(config: &Config) -> Result<Self> {
        if matches!((&config.store, &config.queue), (StoreConfig::Supabase(_), QueueConfig::Embedded(_))) {
            return Err(CliError::usage("there is no queue to publish to")
                .because(
                    "SUPABASE_URL is set, PUBSUB_PROJECT_ID is not: the fleet would never see the message",
                )
                .fix(
                    "set PUBSUB_PROJECT_ID (and PUBSUB_EMULATOR_HOST for an emulator) as the workers have it",
                ));
        }
        Ok(Self { publisher: queue::open_publisher(config).await?, topic: Topics::of(config).requests })
    }

    /// Publishes bytes as they are. Attributes that the queue itself has added are left out.
    pub(crate) async fn publish(
        &self,
        data: Bytes,
        attributes: &[(String, String)],
        task_id: Option<TaskId>,
    ) -> Result<()> {
        let mut attributes: Vec<(String, String)> = attributes
            .iter()
            .filter(|(name, _)| {
                let queues_own = name.starts_with("CloudPubSubDeadLetter") || name.starts_with("goog");
                let replaced = name == "task_id" && task_id.is_some();
                !queues_own && !replaced
            })
            .cloned()
            .collect();
        if let Some(task_id) = task_id {
            attributes.push(("task_id".to_owned(), task_id.to_string()));
        }
        self.publisher.publish(&self.topic, data, attributes).await?;
        Ok(())
    }
}

/// The attributes of a stored request, as far as they are stored.
pub(crate) fn attributes_of(run: &RunRecord) -> Vec<(String, String)> {
    let requester = run.requester.clone().unwrap_or_else(|| "atlas-cli".to_owned());
    vec![("role".to_owned(), ROLE.to_owned()), ("requester".to_owned(), requester)]
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    fn request(metadata: &Value) -> Map<String, Value> {
        let message = json!({"task_id": TaskId::random(), "role": ROLE, "msg_type": "chat", "content": "x", "metadata": metadata});
        message.as_object().unwrap().clone()
    }

    #[test]
    fn the_same_run_is_always_tried_again_as_the_same_task() {
        let task = TaskId::random();
        assert_eq!(next(task), next(task));
        assert_ne!(next(task), task);
        assert_ne!(next(next(task)), task);
    }

    #[test]
    fn a_renamed_request_says_what_it_repeats_and_drops_a_deadline_that_has_passed() {
        let (new, old) = (TaskId::random(), TaskId::random());
        let read = |bytes: Bytes| serde_json::from_slice::<Value>(&bytes).unwrap();
        let late = request(&json!({"deadline": "2020-01-01T00:00:00Z", "team": "billing"}));
        let message = read(renamed(late, new, Some(old)));
        assert_eq!(message["task_id"], json!(new));
        assert_eq!(message["metadata"], json!({"team": "billing", "retry_of": old}));
        let early = read(renamed(request(&json!({"deadline": "2999-01-01T00:00:00Z"})), new, Some(old)));
        assert_eq!(early["metadata"]["deadline"], "2999-01-01T00:00:00Z");
        let none = read(renamed(request(&Value::Null), new, None));
        assert_eq!(none["metadata"], json!({}));
    }
}
