//! The queue of the embedded stack: tables in `atlas.db`, with the semantics of Pub/Sub in miniature.
//!
//! Any number of processes may use the file: `atlas dev` serves while `atlas ask` publishes. Inside a
//! process a publisher wakes consumers at once; over processes they look at the tables every
//! [`POLL`], one index lookup a time.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, Weak},
    time::Duration,
};

use async_trait::async_trait;
use atlas_shared::{Dependency, TaskId, UpstreamError, config::WorkerConfig, message::Answer};
use bytes::Bytes;
use jiff::Timestamp;
use rusqlite::{Connection, ErrorCode};
use tokio::{
    sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc, oneshot},
    time::{MissedTickBehavior, interval, sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use self::tables::{Claimed, Policy, TableError};
use super::{
    AckHandle, AnswerStream, Backlog, BacklogScope, Delivery, Queues, RequestQueue, ResultPublisher, Topics,
    Tuning, check_publishable,
};

mod tables;

/// How soon a consumer sees what another process published.
const POLL: Duration = Duration::from_millis(100);

/// The file in the data folder that store and queue share.
const FILE: &str = "atlas.db";

const SUBSCRIPTION: &str = "architect_in-atlas";
const DLQ_SUBSCRIPTION: &str = "architect_dlq-atlas";

pub(super) fn topics() -> Topics {
    Topics {
        requests: "architect_in".to_owned(),
        answers: "architect_out".to_owned(),
        dead_letters: "architect_dlq".to_owned(),
    }
}

pub(super) async fn open(
    dir: &Path,
    worker: &WorkerConfig,
    tuning: &Tuning,
) -> Result<Queues, UpstreamError> {
    let in_flight = worker.max_in_flight;
    let database = Database::open(dir).await?;
    let policy = |subscription: &str, dead_letters| Policy {
        subscription: subscription.to_owned(),
        min_backoff: tuning.min_backoff,
        max_backoff: tuning.max_backoff,
        lease: tuning.lease,
        dead_letters,
    };
    let dead_letters = Some((topics().dead_letters, tuning.max_delivery_attempts));
    Ok(Queues {
        requests: Arc::new(EmbeddedQueue::new(
            database.clone(),
            policy(SUBSCRIPTION, dead_letters),
            in_flight,
        )),
        dead_letters: Some(Arc::new(EmbeddedQueue::new(
            database.clone(),
            policy(DLQ_SUBSCRIPTION, None),
            in_flight,
        ))),
        publisher: Arc::new(EmbeddedPublisher { database }),
    })
}

pub(super) async fn open_publisher(dir: &Path) -> Result<Arc<dyn ResultPublisher>, UpstreamError> {
    Ok(Arc::new(EmbeddedPublisher { database: Database::open(dir).await? }))
}

pub(super) async fn watch_answers(
    dir: &Path,
    task_id: TaskId,
) -> Result<Box<dyn AnswerStream>, UpstreamError> {
    let database = Database::open(dir).await?;
    let after = database.run(|connection| Ok(tables::newest(connection)?)).await?;
    Ok(Box::new(EmbeddedAnswers { database, task_id: task_id.to_string(), after }))
}

/// The file, and the bell that rings in this process when something was written to it.
#[derive(Clone)]
struct Database {
    connection: Arc<Mutex<Connection>>,
    bell: Arc<Notify>,
}

impl Database {
    async fn open(dir: &Path) -> Result<Self, UpstreamError> {
        let dir = dir.to_owned();
        blocking(move || {
            std::fs::create_dir_all(&dir).map_err(|error| {
                UpstreamError::misconfigured(
                    Dependency::Queue,
                    "ATLAS_DATA_DIR",
                    format!("cannot create {}: {error}", dir.display()),
                    "set it to a folder that this user may write to",
                )
            })?;
            let file = dir.join(FILE);
            let mut connection = tables::connect(&file).map_err(|error| failure(&error))?;
            tables::create(&mut connection).map_err(|error| failure(&error))?;
            let topics = topics();
            for (subscription, topic) in
                [(SUBSCRIPTION, topics.requests), (DLQ_SUBSCRIPTION, topics.dead_letters)]
            {
                tables::subscribe(&mut connection, subscription, &topic).map_err(|error| failure(&error))?;
            }
            // Two spellings of one folder are one queue.
            let bell = bell(file.canonicalize().unwrap_or(file));
            Ok(Self { connection: Arc::new(Mutex::new(connection)), bell })
        })
        .await
    }

    /// Runs `work` on a thread that may block.
    async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Connection) -> Result<T, TableError> + Send + 'static,
    ) -> Result<T, UpstreamError> {
        let connection = self.connection.clone();
        blocking(move || {
            // A panic while the lock was held rolled its transaction back: the connection is sound.
            let mut connection = connection.lock().unwrap_or_else(PoisonError::into_inner);
            work(&mut connection).map_err(|error| match error {
                TableError::Full(_) => UpstreamError::transient(Dependency::Queue, error),
                TableError::Sqlite(error) => failure(&error),
            })
        })
        .await
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, UpstreamError> + Send + 'static,
) -> Result<T, UpstreamError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(UpstreamError::transient(Dependency::Queue, error)),
    }
}

/// One bell for each file and process, so that a publisher wakes consumers of the same file.
fn bell(file: PathBuf) -> Arc<Notify> {
    static BELLS: Mutex<Option<HashMap<PathBuf, Weak<Notify>>>> = Mutex::new(None);
    let mut bells = BELLS.lock().unwrap_or_else(PoisonError::into_inner);
    let bells = bells.get_or_insert_default();
    bells.retain(|_, bell| bell.strong_count() > 0);
    if let Some(bell) = bells.get(&file).and_then(Weak::upgrade) {
        return bell;
    }
    let bell = Arc::new(Notify::new());
    bells.insert(file, Arc::downgrade(&bell));
    bell
}

fn failure(error: &rusqlite::Error) -> UpstreamError {
    let fix = match error.sqlite_error_code() {
        Some(ErrorCode::CannotOpen | ErrorCode::PermissionDenied | ErrorCode::ReadOnly) => {
            "let this user read and write the folder and its files"
        }
        Some(ErrorCode::DiskFull) => "make room on its disk",
        Some(ErrorCode::NotADatabase | ErrorCode::DatabaseCorrupt) => {
            "its atlas.db is damaged: restore it from a backup, or move it away to start anew"
        }
        _ => return UpstreamError::transient(Dependency::Queue, error),
    };
    UpstreamError::misconfigured(Dependency::Queue, "ATLAS_DATA_DIR", error, fix)
}

fn now() -> i64 {
    Timestamp::now().as_millisecond()
}

struct EmbeddedQueue {
    database: Database,
    policy: Arc<Policy>,
    /// One permit for each delivery that may be undecided at once.
    slots: Arc<Semaphore>,
    draining: CancellationToken,
    /// To [`keep_leases`], which ends when the last sender is gone.
    keeper: mpsc::UnboundedSender<Keeper>,
}

/// What the keeper of leases is told. At most two notes wait for each delivery, and deliveries are
/// bounded by `slots`, so the channel needs no bound of its own.
enum Keeper {
    Claimed {
        message: i64,
        lease: String,
    },
    Decided {
        lease: String,
    },
    /// The handle was dropped without a word.
    Dropped {
        message: i64,
        lease: String,
        /// False: the claim never left `pull`.
        seen: bool,
    },
    Flush(oneshot::Sender<()>),
}

impl EmbeddedQueue {
    fn new(database: Database, policy: Policy, in_flight: usize) -> Self {
        let policy = Arc::new(policy);
        let (keeper, notes) = mpsc::unbounded_channel();
        tokio::spawn(keep_leases(database.clone(), policy.clone(), notes));
        Self {
            database,
            policy,
            slots: Arc::new(Semaphore::new(in_flight)),
            draining: CancellationToken::new(),
            keeper,
        }
    }

    /// Claims what is due, or says how long to wait for the next delivery.
    async fn claim(
        &self,
        slot: &mut Option<OwnedSemaphorePermit>,
    ) -> Result<Option<Delivery>, UpstreamError> {
        let (database, policy, keeper) = (self.database.clone(), self.policy.clone(), self.keeper.clone());
        let claimed = self
            .database
            .run(move |connection| {
                let Some(claimed) = tables::claim(connection, &policy, now())? else { return Ok(None) };
                // From here on a cancelled `pull` drops the handle, and dropping it undoes the claim.
                Ok(Some(EmbeddedHandle::wrap(claimed, database, policy, keeper)))
            })
            .await?;
        Ok(claimed.map(|(mut handle, claimed)| {
            handle.seen = true;
            handle.slot = slot.take();
            Delivery {
                message_id: claimed.message_id,
                data: claimed.data.into(),
                attributes: claimed.attributes,
                delivery_attempt: Some(claimed.attempt),
                handle: Box::new(handle),
            }
        }))
    }

    /// How long until the next look at the tables is worth it.
    async fn patience(&self) -> Result<Duration, UpstreamError> {
        let policy = self.policy.clone();
        let due = self.database.run(move |connection| Ok(tables::next_due(connection, &policy)?)).await?;
        let until = due.map_or(POLL, |due| Duration::from_millis(u64::try_from(due - now()).unwrap_or(0)));
        Ok(until.clamp(Duration::from_millis(1), POLL))
    }
}

#[async_trait]
impl RequestQueue for EmbeddedQueue {
    async fn pull(&self) -> Result<Option<Delivery>, UpstreamError> {
        let work = async {
            let mut slot = Some(
                self.slots
                    .clone()
                    .acquire_owned()
                    .await
                    .map_err(|error| UpstreamError::transient(Dependency::Queue, error))?,
            );
            loop {
                // Listen before looking: what is published in between rings.
                let rung = self.database.bell.notified();
                tokio::pin!(rung);
                rung.as_mut().enable();
                if let Some(delivery) = self.claim(&mut slot).await? {
                    return Ok(Some(delivery));
                }
                let patience = self.patience().await?;
                tokio::select! {
                    () = rung => {}
                    () = sleep(patience) => {}
                }
            }
        };
        tokio::select! {
            biased;
            () = self.draining.cancelled() => Ok(None),
            delivery = work => delivery,
        }
    }

    async fn drain(&self) {
        self.draining.cancel();
    }

    async fn flush(&self, bound: Duration) -> Result<(), UpstreamError> {
        let (done, all_done) = oneshot::channel();
        // The keeper works its notes off in order, so all earlier ones are done when it answers.
        if self.keeper.send(Keeper::Flush(done)).is_err() {
            return Ok(());
        }
        match timeout(bound, all_done).await {
            Ok(_) => Ok(()),
            Err(_) => Err(UpstreamError::transient(
                Dependency::Queue,
                format!("acks were not written within {} ms", bound.as_millis()),
            )),
        }
    }

    async fn check(&self) -> Result<(), UpstreamError> {
        let subscription = self.policy.subscription.clone();
        let there = self
            .database
            .run(move |connection| Ok(tables::is_subscribed(connection, &subscription)?))
            .await?;
        if there {
            return Ok(());
        }
        Err(UpstreamError::misconfigured(
            Dependency::Queue,
            "ATLAS_DATA_DIR",
            format!("{FILE} lost subscription {}", self.policy.subscription),
            "restart this process; it creates what is missing",
        ))
    }

    async fn backlog(&self) -> Result<Backlog, UpstreamError> {
        let subscription = self.policy.subscription.clone();
        let (unacknowledged, oldest) = self
            .database
            .run({
                let subscription = subscription.clone();
                move |connection| Ok(tables::backlog(connection, &subscription)?)
            })
            .await?;
        let oldest = oldest.map(|at| Duration::from_millis(u64::try_from(now() - at).unwrap_or(0)));
        Ok(Backlog { subscription, unacknowledged, oldest, scope: BacklogScope::Subscription })
    }
}

/// Renews the leases of this process's deliveries, and gives back those whose handle was dropped.
async fn keep_leases(database: Database, policy: Arc<Policy>, mut notes: mpsc::UnboundedReceiver<Keeper>) {
    let mut leases = HashMap::<String, i64>::new();
    let mut tick = interval((policy.lease / 3).max(Duration::from_millis(10)));
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let note = tokio::select! {
            biased;
            note = notes.recv() => note,
            _ = tick.tick(), if !leases.is_empty() => {
                let held: Vec<_> = leases.iter().map(|(lease, message)| (*message, lease.clone())).collect();
                let policy = policy.clone();
                let renewed =
                    database.run(move |connection| Ok(tables::renew(connection, &policy, &held, now())?)).await;
                if let Err(error) = renewed {
                    warn!(%error, "leases were not renewed; messages may be delivered twice");
                }
                continue;
            }
        };
        match note {
            None => return,
            Some(Keeper::Claimed { message, lease }) => {
                leases.insert(lease, message);
            }
            Some(Keeper::Decided { lease }) => {
                leases.remove(&lease);
            }
            Some(Keeper::Dropped { message, lease, seen }) => {
                leases.remove(&lease);
                let policy = policy.clone();
                let returned = database
                    .run(move |connection| {
                        let done = if seen {
                            tables::nack(connection, &policy, message, &lease, now())
                        } else {
                            tables::unclaim(connection, &policy, message, &lease, now())
                        };
                        Ok(done?)
                    })
                    .await;
                match returned {
                    Ok(()) => database.bell.notify_waiters(),
                    Err(error) => warn!(%error, "a message comes again only when its lease ends"),
                }
            }
            Some(Keeper::Flush(done)) => {
                // Whoever asked may have stopped waiting.
                let _ = done.send(());
            }
        }
    }
}

struct EmbeddedHandle {
    message: i64,
    lease: String,
    database: Database,
    policy: Arc<Policy>,
    keeper: mpsc::UnboundedSender<Keeper>,
    /// True once `pull` returned it.
    seen: bool,
    decided: bool,
    /// Given back when the delivery is decided.
    slot: Option<OwnedSemaphorePermit>,
}

impl EmbeddedHandle {
    fn wrap(
        claimed: Claimed,
        database: Database,
        policy: Arc<Policy>,
        keeper: mpsc::UnboundedSender<Keeper>,
    ) -> (Self, Claimed) {
        let (message, lease) = (claimed.message, claimed.lease.clone());
        // A closed channel means that the queue is being torn down; the lease then ends by itself.
        let _ = keeper.send(Keeper::Claimed { message, lease: lease.clone() });
        (Self { message, lease, database, policy, keeper, seen: false, decided: false, slot: None }, claimed)
    }
}

#[async_trait]
impl AckHandle for EmbeddedHandle {
    async fn ack(mut self: Box<Self>) -> Result<(), UpstreamError> {
        let (policy, message, lease) = (self.policy.clone(), self.message, self.lease.clone());
        let held = self
            .database
            .run(move |connection| Ok(tables::ack(connection, &policy, message, &lease)?))
            .await?;
        self.decided = true;
        if held {
            return Ok(());
        }
        Err(UpstreamError::transient(
            Dependency::Queue,
            "the ack came after the lease had ended; the message will be delivered again",
        ))
    }

    async fn nack(mut self: Box<Self>) -> Result<(), UpstreamError> {
        let (policy, message, lease) = (self.policy.clone(), self.message, self.lease.clone());
        self.database
            .run(move |connection| Ok(tables::nack(connection, &policy, message, &lease, now())?))
            .await?;
        self.decided = true;
        self.database.bell.notify_waiters();
        Ok(())
    }
}

impl Drop for EmbeddedHandle {
    fn drop(&mut self) {
        let lease = std::mem::take(&mut self.lease);
        let note = if self.decided {
            Keeper::Decided { lease }
        } else {
            Keeper::Dropped { message: self.message, lease, seen: self.seen }
        };
        let _ = self.keeper.send(note);
    }
}

struct EmbeddedPublisher {
    database: Database,
}

#[async_trait]
impl ResultPublisher for EmbeddedPublisher {
    async fn publish(
        &self,
        topic: &str,
        data: Bytes,
        attributes: Vec<(String, String)>,
    ) -> Result<String, UpstreamError> {
        check_publishable(topic, &data, &attributes)?;
        let topic = topic.to_owned();
        let id = self
            .database
            .run(move |connection| tables::publish(connection, &topic, &data, &attributes, now()))
            .await?;
        self.database.bell.notify_waiters();
        Ok(id)
    }
}

struct EmbeddedAnswers {
    database: Database,
    task_id: String,
    /// The last message that was looked at.
    after: i64,
}

#[async_trait]
impl AnswerStream for EmbeddedAnswers {
    async fn next(&mut self) -> Result<Answer, UpstreamError> {
        loop {
            let rung = self.database.bell.notified();
            tokio::pin!(rung);
            rung.as_mut().enable();
            let (task_id, after) = (self.task_id.clone(), self.after);
            let kept = self
                .database
                .run(move |connection| {
                    Ok(tables::next_of_task(connection, &topics().answers, &task_id, after)?)
                })
                .await?;
            if let Some(kept) = kept {
                self.after = kept.id;
                match serde_json::from_slice(&kept.data) {
                    Ok(answer) => return Ok(answer),
                    Err(error) => {
                        debug!(%error, "a message on the answers' topic is no answer");
                        continue;
                    }
                }
            }
            tokio::select! {
                () = rung => {}
                () = sleep(POLL) => {}
            }
        }
    }

    async fn close(self: Box<Self>) {}
}
