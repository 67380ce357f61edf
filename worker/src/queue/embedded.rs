//! The queue of the embedded stack: tables in `atlas.db`, with the semantics of Pub/Sub in miniature.
//!
//! Any number of processes may use the file: `atlas dev` serves while `atlas ask` publishes. Inside a
//! process a publisher wakes consumers at once; over processes they look at the tables every
//! [`POLL`], one index lookup a time. A backlog is claimed several messages at a time ([`GREED`]).

use std::{
    collections::{HashMap, VecDeque},
    path::{Path, PathBuf},
    pin::pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use async_trait::async_trait;
use atlas_shared::{
    Dependency, TaskId, UpstreamError, config::WorkerConfig, message::Answer, sqlite::Database,
};
use bytes::Bytes;
use rusqlite::Connection;
use tokio::{
    sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc, oneshot},
    time::{MissedTickBehavior, interval, sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use self::tables::{Claimed, Look, Policy, Stored};
use super::{
    AckHandle, AnswerStream, Backlog, BacklogScope, Delivery, Queues, RequestQueue, ResultPublisher, Topics,
    Tuning, check_publishable,
};

mod tables;

/// How soon a consumer sees what another process published.
const POLL: Duration = Duration::from_millis(100);

/// Messages that one claim takes at most, while a backlog is worked off: no more than there is room for in
/// this process.
const GREED: usize = 16;
/// A claimed message that nobody pulled for so long is given back: another process may have room.
const KEPT_READY: Duration = Duration::from_secs(1);

const SUBSCRIPTION: &str = "architect_in-atlas";
const DLQ_SUBSCRIPTION: &str = "architect_dlq-atlas";
const DOCS_SUBSCRIPTION: &str = "docs_added-atlas";

pub(super) fn topics() -> Topics {
    Topics {
        requests: "architect_in".to_owned(),
        answers: "architect_out".to_owned(),
        dead_letters: "architect_dlq".to_owned(),
        documents: "docs_added".to_owned(),
    }
}

pub(super) async fn open(
    dir: &Path,
    worker: &WorkerConfig,
    tuning: &Tuning,
) -> Result<Queues, UpstreamError> {
    let in_flight = worker.max_in_flight;
    let tables = Tables::open(dir).await?;
    let policy = |subscription: &str, dead_letters| Policy {
        subscription: subscription.to_owned(),
        min_backoff: tuning.min_backoff,
        max_backoff: tuning.max_backoff,
        lease: tuning.lease,
        dead_letters,
    };
    let dead_letters = Some((topics().dead_letters, tuning.max_delivery_attempts));
    let documents = if worker.index_on_docs_added {
        // Only where somebody reads it: messages without a reader would stay for ever.
        tables
            .write(|connection, _| Ok(tables::subscribe(connection, DOCS_SUBSCRIPTION, &topics().documents)?))
            .await?;
        let policy = policy(DOCS_SUBSCRIPTION, dead_letters.clone());
        Some(Arc::new(EmbeddedQueue::new(tables.clone(), policy, in_flight)) as Arc<dyn RequestQueue>)
    } else {
        None
    };
    Ok(Queues {
        documents,
        requests: Arc::new(EmbeddedQueue::new(tables.clone(), policy(SUBSCRIPTION, dead_letters), in_flight)),
        dead_letters: Some(Arc::new(EmbeddedQueue::new(
            tables.clone(),
            policy(DLQ_SUBSCRIPTION, None),
            in_flight,
        ))),
        publisher: Arc::new(EmbeddedPublisher { tables }),
    })
}

pub(super) async fn open_publisher(dir: &Path) -> Result<Arc<dyn ResultPublisher>, UpstreamError> {
    Ok(Arc::new(EmbeddedPublisher { tables: Tables::open(dir).await? }))
}

pub(super) async fn watch_answers(
    dir: &Path,
    task_id: TaskId,
) -> Result<Box<dyn AnswerStream>, UpstreamError> {
    let tables = Tables::open(dir).await?;
    let after = tables.read(|connection, _| Ok(tables::newest(connection)?)).await?;
    Ok(Box::new(EmbeddedAnswers { tables, task_id: task_id.to_string(), after }))
}

/// The file, and the bells that ring in this process when something was written to it.
#[derive(Clone)]
struct Tables {
    database: Database,
    bells: Arc<Bells>,
}

#[derive(Debug, Default)]
struct Bells {
    /// For consumers: something can be claimed.
    delivery: Notify,
    /// For watchers: something was published.
    message: Notify,
}

impl Tables {
    async fn open(dir: &Path) -> Result<Self, UpstreamError> {
        let database = Database::open(dir).await.map_err(of_queue)?;
        database.execute_schema(tables::SCHEMA).await.map_err(of_queue)?;
        let tables = Self { bells: bells(database.path()), database };
        tables
            .write(|connection, _| {
                let topics = topics();
                tables::subscribe(connection, SUBSCRIPTION, &topics.requests)?;
                tables::subscribe(connection, DLQ_SUBSCRIPTION, &topics.dead_letters)?;
                Ok(())
            })
            .await?;
        Ok(tables)
    }

    /// Runs `work` in a transaction that holds the write lock, with the time in milliseconds.
    async fn write<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Connection, i64) -> Result<T, UpstreamError> + Send + 'static,
    ) -> Result<T, UpstreamError> {
        self.database.write(move |tx, now| work(tx, now.as_millisecond())).await.map_err(of_queue)
    }

    /// Runs `work` on a snapshot.
    async fn read<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Connection, i64) -> Result<T, UpstreamError> + Send + 'static,
    ) -> Result<T, UpstreamError> {
        self.database.read(move |tx, now| work(tx, now.as_millisecond())).await.map_err(of_queue)
    }
}

/// Queue and store share the file; whose call failed decides which circuit opens.
fn of_queue(error: UpstreamError) -> UpstreamError {
    let dependency = Dependency::Queue;
    match error {
        UpstreamError::Transient { message, retry_after, .. } => {
            UpstreamError::Transient { dependency, message, retry_after }
        }
        UpstreamError::Permanent { code, message, .. } => {
            UpstreamError::Permanent { dependency, code, message }
        }
        UpstreamError::Misconfigured { variable, message, fix, .. } => {
            UpstreamError::Misconfigured { dependency, variable, message, fix }
        }
    }
}

/// The same bells for all of a file's users in a process, so that a publisher wakes consumers.
fn bells(file: &Path) -> Arc<Bells> {
    static OF_FILES: Mutex<Option<HashMap<PathBuf, Weak<Bells>>>> = Mutex::new(None);
    let mut of_files = OF_FILES.lock().unwrap_or_else(PoisonError::into_inner);
    let of_files = of_files.get_or_insert_default();
    of_files.retain(|_, bells| bells.strong_count() > 0);
    if let Some(bells) = of_files.get(file).and_then(Weak::upgrade) {
        return bells;
    }
    let bells = Arc::new(Bells::default());
    of_files.insert(file.to_owned(), Arc::downgrade(&bells));
    bells
}

struct EmbeddedQueue {
    tables: Tables,
    policy: Arc<Policy>,
    /// One permit for each delivery that may be undecided at once.
    slots: Arc<Semaphore>,
    draining: CancellationToken,
    /// To [`keep_leases`], which ends when the last sender is gone.
    keeper: mpsc::UnboundedSender<Keeper>,
    /// Claimed together with a message that was pulled.
    ready: Arc<Ready>,
    /// How many to claim next: doubles while claims find all they ask for, 1 when one finds less.
    greed: AtomicUsize,
}

/// What is claimed and has not been pulled, oldest first, and since when.
#[derive(Default)]
struct Ready(Mutex<VecDeque<(Instant, Claiming)>>);

impl Ready {
    fn queue(&self) -> MutexGuard<'_, VecDeque<(Instant, Claiming)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Undoes the claims of this age.
    fn give_back(&self, old_enough: impl Fn(Duration) -> bool) {
        let mut queue = self.queue();
        let unwanted = queue.partition_point(|(since, _)| old_enough(since.elapsed()));
        let unwanted: Vec<_> = queue.drain(..unwanted).collect();
        // Dropping one tells the keeper, not under the lock.
        drop(queue);
        drop(unwanted);
    }
}

/// A claimed message that nobody has seen: dropping it undoes the claim.
struct Claiming {
    claimed: Claimed,
    handle: EmbeddedHandle,
}

impl Claiming {
    fn delivery(self) -> Delivery {
        let Self { claimed, mut handle } = self;
        handle.seen = true;
        Delivery {
            message_id: claimed.message_id,
            data: claimed.data.into(),
            attributes: claimed.attributes,
            delivery_attempt: Some(claimed.attempt),
            handle: Box::new(handle),
        }
    }
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
    fn new(tables: Tables, policy: Policy, in_flight: usize) -> Self {
        let policy = Arc::new(policy);
        let (keeper, notes) = mpsc::unbounded_channel();
        let ready = Arc::new(Ready::default());
        tokio::spawn(keep_leases(tables.clone(), policy.clone(), notes, Arc::downgrade(&ready)));
        Self {
            ready,
            greed: AtomicUsize::new(1),
            tables,
            policy,
            slots: Arc::new(Semaphore::new(in_flight)),
            draining: CancellationToken::new(),
            keeper,
        }
    }

    /// Claims the oldest deliveries that are due, if there are any: one for each slot.
    async fn claim(&self, slots: Vec<OwnedSemaphorePermit>) -> Result<VecDeque<Claiming>, UpstreamError> {
        let (tables, policy, keeper) = (self.tables.clone(), self.policy.clone(), self.keeper.clone());
        self.tables
            .write(move |connection, now| {
                let mut claiming = VecDeque::with_capacity(slots.len());
                for slot in slots {
                    let Some(claimed) = tables::claim(connection, &policy, now)? else { break };
                    // From here on a cancelled `pull` drops the handle, and dropping it undoes the claim.
                    let handle =
                        EmbeddedHandle::wrap(&claimed, slot, tables.clone(), policy.clone(), keeper.clone());
                    claiming.push_back(Claiming { claimed, handle });
                }
                Ok(claiming)
            })
            .await
    }

    /// Claims what is due, gives the first and keeps the others ready. `None`: nothing is due.
    async fn claim_some(&self, slot: OwnedSemaphorePermit) -> Result<Option<Delivery>, UpstreamError> {
        let greed = self.greed.load(Ordering::Relaxed);
        let mut slots = vec![slot];
        while slots.len() < greed
            && let Ok(another) = self.slots.clone().try_acquire_owned()
        {
            slots.push(another);
        }
        let wanted = slots.len();
        let mut found = self.claim(slots).await?;
        let next = if found.len() < wanted { 1 } else { (2 * wanted).min(GREED) };
        self.greed.store(next, Ordering::Relaxed);
        let first = found.pop_front();
        if !found.is_empty() {
            let now = Instant::now();
            self.ready.queue().extend(found.into_iter().map(|claiming| (now, claiming)));
            if self.draining.is_cancelled() {
                // Whoever drains may have given back before this was there.
                self.ready.give_back(|_| true);
            }
        }
        Ok(first.map(Claiming::delivery))
    }
}

#[async_trait]
impl RequestQueue for EmbeddedQueue {
    async fn pull(&self) -> Result<Option<Delivery>, UpstreamError> {
        let work = async {
            loop {
                if let Some((_, claiming)) = self.ready.queue().pop_front() {
                    return Ok(Some(claiming.delivery()));
                }
                let slot = self
                    .slots
                    .clone()
                    .acquire_owned()
                    .await
                    .map_err(|error| UpstreamError::transient(Dependency::Queue, error))?;
                // Listen before looking: what is published in between rings.
                let mut rung = pin!(self.tables.bells.delivery.notified());
                rung.as_mut().enable();
                let policy = self.policy.clone();
                let look = if self.greed.load(Ordering::Relaxed) > 1 {
                    // The last claim found all it asked for.
                    Look::Due
                } else {
                    self.tables
                        .read(move |connection, now| Ok(tables::look(connection, &policy, now)?))
                        .await?
                };
                let patience = match look {
                    // Another consumer may have been quicker: then look again.
                    Look::Due => match self.claim_some(slot).await? {
                        Some(delivery) => return Ok(Some(delivery)),
                        None => continue,
                    },
                    Look::In(wait) => wait.clamp(Duration::from_millis(1), POLL),
                    Look::Empty => POLL,
                };
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
        self.ready.give_back(|_| true);
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
            .tables
            .read(move |connection, _| Ok(tables::is_subscribed(connection, &subscription)?))
            .await?;
        if there {
            return Ok(());
        }
        Err(UpstreamError::misconfigured(
            Dependency::Queue,
            "ATLAS_DATA_DIR",
            format!("the embedded database lost subscription {}", self.policy.subscription),
            "restart this process; it creates what is missing",
        ))
    }

    async fn backlog(&self) -> Result<Backlog, UpstreamError> {
        let subscription = self.policy.subscription.clone();
        let (unacknowledged, oldest) = self
            .tables
            .read({
                let subscription = subscription.clone();
                move |connection, now| {
                    let (count, oldest) = tables::backlog(connection, &subscription)?;
                    let age = oldest.map(|at| Duration::from_millis(u64::try_from(now - at).unwrap_or(0)));
                    Ok((count, age))
                }
            })
            .await?;
        Ok(Backlog { subscription, unacknowledged, oldest, scope: BacklogScope::Subscription })
    }
}

/// Renews the leases of this process's deliveries, and gives back those whose handle was dropped.
async fn keep_leases(
    tables: Tables,
    policy: Arc<Policy>,
    mut notes: mpsc::UnboundedReceiver<Keeper>,
    // Weak, because what is ready holds senders of notes.
    ready: Weak<Ready>,
) {
    let mut leases = HashMap::<String, i64>::new();
    let mut tick = interval((policy.lease / 3).max(Duration::from_millis(10)));
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut stale = interval(KEPT_READY);
    stale.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let note = tokio::select! {
            biased;
            note = notes.recv() => note,
            _ = stale.tick(), if !leases.is_empty() => {
                if let Some(ready) = ready.upgrade() {
                    ready.give_back(|age| age >= KEPT_READY);
                }
                continue;
            }
            _ = tick.tick(), if !leases.is_empty() => {
                let held: Vec<_> = leases.iter().map(|(lease, message)| (*message, lease.clone())).collect();
                let policy = policy.clone();
                let renewed = tables
                    .write(move |connection, now| Ok(tables::renew(connection, &policy, &held, now)?))
                    .await;
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
                let returned = tables
                    .write(move |connection, now| {
                        let done = if seen {
                            tables::nack(connection, &policy, message, &lease, now)
                        } else {
                            tables::unclaim(connection, &policy, message, &lease, now)
                        };
                        Ok(done?)
                    })
                    .await;
                match returned {
                    Ok(()) => tables.bells.delivery.notify_waiters(),
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
    tables: Tables,
    policy: Arc<Policy>,
    keeper: mpsc::UnboundedSender<Keeper>,
    /// True once `pull` returned it.
    seen: bool,
    decided: bool,
    /// Given back when the delivery is decided.
    _slot: OwnedSemaphorePermit,
}

impl EmbeddedHandle {
    fn wrap(
        claimed: &Claimed,
        slot: OwnedSemaphorePermit,
        tables: Tables,
        policy: Arc<Policy>,
        keeper: mpsc::UnboundedSender<Keeper>,
    ) -> Self {
        let (message, lease) = (claimed.message, claimed.lease.clone());
        // A closed channel means that the queue is being torn down; the lease then ends by itself.
        let _ = keeper.send(Keeper::Claimed { message, lease: lease.clone() });
        Self { message, lease, tables, policy, keeper, seen: false, decided: false, _slot: slot }
    }
}

#[async_trait]
impl AckHandle for EmbeddedHandle {
    async fn ack(mut self: Box<Self>) -> Result<(), UpstreamError> {
        let (policy, message, lease) = (self.policy.clone(), self.message, self.lease.clone());
        let held = self
            .tables
            .write(move |connection, _| Ok(tables::ack(connection, &policy, message, &lease)?))
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
        self.tables
            .write(move |connection, now| Ok(tables::nack(connection, &policy, message, &lease, now)?))
            .await?;
        self.decided = true;
        self.tables.bells.delivery.notify_waiters();
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
    tables: Tables,
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
        let Stored { message_id, delivered } = self
            .tables
            .write(move |connection, now| tables::publish(connection, &topic, &data, &attributes, now))
            .await?;
        if delivered {
            self.tables.bells.delivery.notify_waiters();
        }
        self.tables.bells.message.notify_waiters();
        Ok(message_id)
    }
}

struct EmbeddedAnswers {
    tables: Tables,
    task_id: String,
    /// The last message that was looked at.
    after: i64,
}

#[async_trait]
impl AnswerStream for EmbeddedAnswers {
    async fn next(&mut self) -> Result<Answer, UpstreamError> {
        loop {
            let mut rung = pin!(self.tables.bells.message.notified());
            rung.as_mut().enable();
            let (task_id, after) = (self.task_id.clone(), self.after);
            let kept = self
                .tables
                .read(move |connection, _| {
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
