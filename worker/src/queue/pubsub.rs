//! Google Pub/Sub, through the official client.

use std::sync::Arc;

use atlas_shared::{Dependency, TaskId, UpstreamError, config::PubSubConfig};

use super::{AnswerStream, Queues, ResultPublisher, Tuning};

pub(super) async fn open(_: &PubSubConfig, _: &Tuning, _: usize) -> Result<Queues, UpstreamError> {
    Err(pending())
}

pub(super) async fn open_publisher(_: &PubSubConfig) -> Result<Arc<dyn ResultPublisher>, UpstreamError> {
    Err(pending())
}

pub(super) async fn watch_answers(
    _: &PubSubConfig,
    _: TaskId,
) -> Result<Box<dyn AnswerStream>, UpstreamError> {
    Err(pending())
}

fn pending() -> UpstreamError {
    UpstreamError::permanent(Dependency::Queue, "not_built", "the Pub/Sub adapter is not in this build yet")
}
