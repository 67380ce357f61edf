//! Sends what the store says must be sent, at least once.
//!
//! A row is written in the transaction that makes its run final. Whoever wrote it publishes it at
//! once; a sweeper sends what a crash left behind. Marking rows as sent is batched, so that it costs
//! a run no round trip of its own; a crash before the mark means a second copy, which `task_id` +
//! `msg_type` lets consumers drop.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use atlas_shared::{UpstreamError, resilience::RetryPolicy};
use bytes::Bytes;
use futures::{StreamExt as _, stream};
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
        let data = Bytes::copy_from_slice(row.message.text().as_bytes());
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

    /// Publishes rows of at most `at_once` tasks at the same time; those of one task one after the
    /// other, as they were written. False: the queue is away, and what was not sent stays for the next
    /// sweep after its hold.
    pub(crate) async fn send_all(&self, rows: Vec<OutboxRow>, at_once: usize) -> bool {
        let away = AtomicBool::new(false);
        stream::iter(by_task(rows))
            .for_each_concurrent(at_once, async |rows| {
                for row in rows {
                    // A queue that is away takes none of them; one that refuses an answer takes the next.
                    if away.load(Ordering::Relaxed) {
                        return;
                    }
                    crash_point!("outbox_taken");
                    if let Err(error) = self.send(&row).await {
                        tracing::warn!(
                            task_id = %row.task_id, error = %error,
                            "an answer could not be sent; it stays in the outbox"
                        );
                        away.fetch_or(error.is_transient(), Ordering::Relaxed);
                    }
                }
            })
            .await;
        !away.into_inner()
    }
}

/// The rows of each task, in their order; the tasks in the order of their first rows.
fn by_task(rows: Vec<OutboxRow>) -> Vec<Vec<OutboxRow>> {
    let mut places = HashMap::new();
    let mut tasks: Vec<Vec<OutboxRow>> = Vec::new();
    for row in rows {
        let place = *places.entry(row.task_id).or_insert(tasks.len());
        match tasks.get_mut(place) {
            Some(task) => task.push(row),
            None => tasks.push(vec![row]),
        }
    }
    tasks
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

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::sync::Mutex;

    use async_trait::async_trait;
    use atlas_shared::{Dependency, TaskId};
    use serde_json::json;
    use tokio::sync::Semaphore;

    use super::*;

    /// A queue that takes a message when the test lets it, and refuses what says so.
    struct Gated {
        /// One permit lets one message through.
        let_through: Semaphore,
        /// Names of messages that are at the gate, in the order in which they came.
        came: Mutex<Vec<String>>,
    }

    #[async_trait]
    impl ResultPublisher for Gated {
        async fn publish(
            &self,
            _topic: &str,
            data: Bytes,
            _attributes: Vec<(String, String)>,
        ) -> Result<String, UpstreamError> {
            let name: String = serde_json::from_slice(&data).unwrap();
            self.came.lock().unwrap().push(name.clone());
            self.let_through.acquire().await.unwrap().forget();
            match name.split_once(' ') {
                Some(("refused", _)) => Err(UpstreamError::permanent(Dependency::Queue, "no", "refused")),
                Some(("away", _)) => Err(UpstreamError::transient(Dependency::Queue, "away")),
                _ => Ok(name),
            }
        }
    }

    struct Rig {
        queue: Arc<Gated>,
        outbox: Outbox,
        marks: mpsc::Receiver<Uuid>,
    }

    fn rig(let_through: usize) -> Rig {
        let queue = Arc::new(Gated { let_through: Semaphore::new(let_through), came: Mutex::default() });
        let (sender, marks) = mpsc::channel(100);
        let publisher: Arc<dyn ResultPublisher> = queue.clone();
        Rig { queue, outbox: Outbox { publisher, topic_out: "out".to_owned(), marks: sender }, marks }
    }

    impl Rig {
        fn came(&self) -> Vec<String> {
            self.queue.came.lock().unwrap().clone()
        }

        async fn until_came(&self, number: usize) {
            let all = async {
                while self.came().len() < number {
                    tokio::task::yield_now().await;
                }
            };
            tokio::time::timeout(Duration::from_secs(30), all).await.unwrap();
        }

        fn marked(&mut self) -> Vec<Uuid> {
            std::iter::from_fn(|| self.marks.try_recv().ok()).collect()
        }
    }

    fn row(task_id: TaskId, name: &str) -> OutboxRow {
        OutboxRow {
            id: Uuid::new_v4(),
            task_id,
            topic: "out".to_owned(),
            message: json!(name).into(),
            attributes: Vec::new(),
        }
    }

    #[tokio::test]
    async fn answers_of_several_tasks_are_sent_at_once_and_not_more_than_allowed() {
        let mut rig = rig(0);
        let rows: Vec<OutboxRow> = (0..10).map(|n| row(TaskId::random(), &format!("ok {n}"))).collect();
        let mut ids: Vec<Uuid> = rows.iter().map(|row| row.id).collect();
        let sending = tokio::spawn({
            let outbox = rig.outbox.clone();
            async move { outbox.send_all(rows, 4).await }
        });
        // Nobody is let through, and four are at the gate.
        rig.until_came(4).await;
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        assert_eq!(rig.came().len(), 4);
        rig.queue.let_through.add_permits(1);
        rig.until_came(5).await;
        rig.queue.let_through.add_permits(100);
        assert!(sending.await.unwrap());
        let mut marked = rig.marked();
        marked.sort_unstable();
        ids.sort_unstable();
        assert_eq!(marked, ids, "each is marked once");
    }

    #[tokio::test]
    async fn answers_of_one_task_keep_their_order() {
        let rig = rig(100);
        let (a, b) = (TaskId::random(), TaskId::random());
        let rows = vec![row(a, "a 1"), row(b, "b 1"), row(a, "a 2"), row(a, "a 3"), row(b, "b 2")];
        assert!(rig.outbox.send_all(rows, 8).await);
        let came = rig.came();
        let of = |task: &str| came.iter().filter(|name| name.starts_with(task)).cloned().collect::<Vec<_>>();
        assert_eq!(
            (of("a"), of("b")),
            (vec!["a 1".into(), "a 2".into(), "a 3".into()], vec!["b 1".into(), "b 2".into()])
        );
    }

    #[tokio::test]
    async fn a_refused_answer_holds_up_no_other_not_even_of_its_task() {
        let mut rig = rig(100);
        let task = TaskId::random();
        let rows = vec![row(task, "refused 1"), row(task, "ok 2"), row(TaskId::random(), "ok 3")];
        let sent: Vec<Uuid> = rows[1..].iter().map(|row| row.id).collect();
        assert!(rig.outbox.send_all(rows, 1).await);
        assert_eq!(rig.marked(), sent);
    }

    #[tokio::test]
    async fn a_queue_that_is_away_is_not_asked_again_and_again() {
        let mut rig = rig(100);
        let mut rows = vec![row(TaskId::random(), "ok 1"), row(TaskId::random(), "away 2")];
        rows.extend((3..30).map(|n| row(TaskId::random(), &format!("ok {n}"))));
        assert!(!rig.outbox.send_all(rows, 2).await);
        assert!(rig.came().len() <= 4, "{:?}", rig.came());
        assert!(rig.marked().len() <= 3);
    }
}
