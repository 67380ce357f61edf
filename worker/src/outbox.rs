//! Sends what the store says must be sent, at least once.
//!
//! A row is written in the transaction that makes its run final. Whoever wrote it publishes it at
//! once; a sweeper sends what a crash left behind. Marking rows as sent is batched, so that it costs
//! a run no round trip of its own; a crash before the mark means a second copy, which `task_id` +
//! `msg_type` lets consumers drop.

use std::{sync::Arc, time::Duration};

use atlas_shared::{UpstreamError, resilience::RetryPolicy};
use bytes::Bytes;
use tokio::sync::mpsc;
use uuid::Uuid;

use crate::{
    crash::crash_point,
    queue::ResultPublisher,
    resilient,
    store::{OutboxRow, RunStore},
};

/// Marks written in one round trip at most.
const BATCH: usize = 256;
/// How long a mark may wait for company.
const LINGER: Duration = Duration::from_millis(200);

/// Publishes outbox rows. Clones share the batch of marks.
#[derive(Clone)]
pub(crate) struct Outbox {
    publisher: Arc<dyn ResultPublisher>,
    /// Where an answer goes when its `reply_to` cannot be reached.
    topic_out: String,
    marks: mpsc::Sender<Uuid>,
}

/// The task that writes marks; ends when all [`Outbox`] clones are gone, with nothing left unwritten
/// that could be written.
pub(crate) struct Marker {
    store: Arc<dyn RunStore>,
    retry: RetryPolicy,
    marks: mpsc::Receiver<Uuid>,
}

/// An outbox and its marker.
pub(crate) fn new(
    store: Arc<dyn RunStore>,
    publisher: Arc<dyn ResultPublisher>,
    topic_out: String,
    retry: RetryPolicy,
) -> (Outbox, Marker) {
    let (sender, marks) = mpsc::channel(4 * BATCH);
    (Outbox { publisher, topic_out, marks: sender }, Marker { store, retry, marks })
}

impl Outbox {
    /// Publishes one row and hands its mark over. After an error the row stays for the sweeper.
    pub(crate) async fn send(&self, row: &OutboxRow) -> Result<(), UpstreamError> {
        let data = Bytes::from(row.message.to_string());
        let sent = self.publisher.publish(&row.topic, data.clone(), row.attributes.clone()).await;
        match sent {
            Ok(_) => {}
            // A publisher's own `reply_to` must not keep its answer in the outbox for ever.
            Err(error) if !error.is_transient() && row.topic != self.topic_out => {
                tracing::warn!(
                    task_id = %row.task_id, topic = row.topic, error = %error,
                    "reply_to cannot be reached; the answer goes to the common topic"
                );
                self.publisher.publish(&self.topic_out, data, row.attributes.clone()).await?;
            }
            Err(error) => return Err(error),
        }
        crash_point!("published");
        // The marker lives as long as the worker; without it the row is sent twice, never lost.
        let _ = self.marks.send(row.id).await;
        Ok(())
    }
}

impl Marker {
    /// Writes marks in batches until every sender is gone.
    pub(crate) async fn run(mut self) {
        let mut batch = Vec::with_capacity(BATCH);
        while self.marks.recv_many(&mut batch, BATCH).await > 0 {
            let deadline = tokio::time::sleep(LINGER);
            tokio::pin!(deadline);
            while batch.len() < BATCH {
                tokio::select! {
                    () = &mut deadline => break,
                    mark = self.marks.recv() => match mark {
                        Some(id) => batch.push(id),
                        None => break,
                    },
                }
            }
            crash_point!("before_mark");
            let result = resilient::store(&self.retry, || self.store.outbox_mark_sent(&batch)).await;
            crash_point!("marked");
            if let Err(error) = result {
                tracing::warn!(rows = batch.len(), error = %error, "rows could not be marked as sent; they will be sent again");
            }
            batch.clear();
        }
    }
}
