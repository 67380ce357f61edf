//! Pulling: one supervised stream for each subscription.
//!
//! A task of ours owns the client's stream, because reading it must not be cancelled while it opens;
//! `pull` takes what the task puts in a tray. The task reads only while somebody waits in `pull` and a
//! slot is free, so undecided deliveries never exceed the limit whatever the server sends. When nobody
//! has pulled for a while it gives back what the client holds and closes the stream: a worker that
//! waits for tomorrow's budget must not sit on messages and burn their delivery attempts.
//!
//! The client reconnects by itself but waits up to 60 s between attempts, and it says nothing
//! meanwhile. So while nothing comes the task asks the server for the subscription now and then, and
//! after an outage opens a new stream at once.

use std::{
    collections::{HashMap, VecDeque},
    pin::pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use atlas_shared::{Dependency, UpstreamError};
use futures::FutureExt as _;
use google_cloud_gax::error::rpc::Code;
use google_cloud_pubsub::{
    Error,
    client::Subscriber,
    error::AckError,
    model::Message,
    subscriber::{MessageStream, ShutdownBehavior, handler::Handler},
};
use tokio::{
    sync::{Notify, OwnedSemaphorePermit, Semaphore},
    task::unconstrained,
    time::{Instant, sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{debug, info, warn};

use super::{
    admin::{Admin, SubscriptionSpec},
    code_of, describe, upstream,
};
use crate::queue::{AckHandle, Backlog, BacklogScope, Delivery, RequestQueue};

/// Bytes of undecided deliveries in this process.
const MAX_BYTES: u32 = 64 * 1024 * 1024;

/// The client sends acks every 100 ms, and says nothing when it has.
const CLIENT_FLUSH: Duration = Duration::from_millis(300);

/// After so long without a pull the stream is closed.
const IDLE: Duration = Duration::from_secs(30);

/// How often the server is asked whether it is there, while nothing comes. An outage that fits in
/// between is short enough for the client's own reconnecting.
const PROBE: Duration = Duration::from_secs(10);
/// The same while the last answer was bad.
const PROBE_OUTAGE: Duration = Duration::from_secs(1);

const MIN_BACKOFF: Duration = Duration::from_millis(500);
const MAX_BACKOFF: Duration = Duration::from_secs(15);

/// How many messages the client may hold for us when its stream is closed: a bound for a loop that
/// otherwise trusts the server.
const MAX_HELD: usize = 10_000;

#[derive(Clone, Copy, Debug)]
pub(super) struct StreamOptions {
    pub(super) in_flight: usize,
    pub(super) ack_deadline: Duration,
    pub(super) max_lease: Duration,
}

pub(super) struct PubSubQueue {
    shared: Arc<Shared>,
}

impl PubSubQueue {
    /// Nothing is opened before the first pull: who only publishes must take nothing.
    pub(super) fn new(
        subscriber: Subscriber,
        admin: Arc<Admin>,
        spec: SubscriptionSpec,
        options: StreamOptions,
    ) -> Self {
        let shared = Arc::new(Shared {
            spec,
            options,
            admin,
            tray: Mutex::default(),
            filled: Notify::new(),
            waiting: AtomicUsize::new(0),
            wanted: Notify::new(),
            slots: Arc::new(Semaphore::new(options.in_flight)),
            bytes: Arc::new(Semaphore::new(MAX_BYTES as usize)),
            undecided: Ages::default(),
            trouble: Mutex::default(),
            closing: TaskTracker::new(),
            draining: CancellationToken::new(),
            drained: CancellationToken::new(),
        });
        tokio::spawn(supervise(shared.clone(), subscriber));
        Self { shared }
    }
}

impl Drop for PubSubQueue {
    fn drop(&mut self) {
        // Ends the supervisor; deliveries that are out there keep what they need.
        self.shared.draining.cancel();
    }
}

/// What `pull`, the supervisor and the handles share.
struct Shared {
    spec: SubscriptionSpec,
    options: StreamOptions,
    admin: Arc<Admin>,
    /// From the supervisor to `pull`. Holds no more than `waiting` asked for, and is emptied when the
    /// stream is closed.
    tray: Mutex<VecDeque<Result<Delivery, UpstreamError>>>,
    /// Rings when something was put in the tray.
    filled: Notify,
    /// How many wait in `pull`.
    waiting: AtomicUsize,
    /// Rings when `waiting` changed.
    wanted: Notify,
    /// One permit for each undecided delivery.
    slots: Arc<Semaphore>,
    /// One permit for each byte of undecided deliveries.
    bytes: Arc<Semaphore>,
    undecided: Ages,
    /// Why nothing comes at the moment.
    trouble: Mutex<Option<UpstreamError>>,
    /// Closed streams whose acks are still on their way.
    closing: TaskTracker,
    draining: CancellationToken,
    /// Cancelled once the supervisor has given everything back.
    drained: CancellationToken,
}

impl Shared {
    fn demand(&self) -> bool {
        self.waiting.load(Ordering::SeqCst) > lock(&self.tray).len()
    }

    /// Waits until somebody wants a message that is not in the tray yet.
    async fn until_wanted(&self) {
        loop {
            let mut wanted = pin!(self.wanted.notified());
            wanted.as_mut().enable();
            if self.demand() {
                return;
            }
            wanted.await;
        }
    }

    /// Waits until nobody has wanted anything for [`IDLE`].
    async fn until_idle(&self) {
        loop {
            let mut wanted = pin!(self.wanted.notified());
            wanted.as_mut().enable();
            if self.waiting.load(Ordering::SeqCst) > 0 {
                wanted.await;
            } else if timeout(IDLE, wanted).await.is_err() {
                return;
            }
        }
    }

    fn put(&self, item: Result<Delivery, UpstreamError>) {
        lock(&self.tray).push_back(item);
        self.filled.notify_waiters();
    }

    fn set_trouble(&self, trouble: Option<UpstreamError>) {
        *lock(&self.trouble) = trouble;
    }
}

/// A panic while a lock was held cannot leave these values half-changed.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Counts somebody who waits in `pull`.
struct Waiting<'a>(&'a Shared);

impl<'a> Waiting<'a> {
    fn new(shared: &'a Shared) -> Self {
        shared.waiting.fetch_add(1, Ordering::SeqCst);
        shared.wanted.notify_waiters();
        Self(shared)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::SeqCst);
        self.0.wanted.notify_waiters();
    }
}

#[async_trait]
impl RequestQueue for PubSubQueue {
    async fn pull(&self) -> Result<Option<Delivery>, UpstreamError> {
        let shared = &self.shared;
        let _waiting = Waiting::new(shared);
        loop {
            let mut filled = pin!(shared.filled.notified());
            filled.as_mut().enable();
            if shared.draining.is_cancelled() {
                return Ok(None);
            }
            if let Some(item) = lock(&shared.tray).pop_front() {
                return item.map(Some);
            }
            tokio::select! {
                () = filled => {}
                () = shared.draining.cancelled() => {}
            }
        }
    }

    async fn drain(&self) {
        self.shared.draining.cancel();
        self.shared.drained.cancelled().await;
    }

    /// Exact after [`RequestQueue::drain`] once every delivery is decided: then the client's streams
    /// are closed and each waits for its last ack. Before that the client cannot be asked, and this
    /// waits for as long as it takes to send.
    async fn flush(&self, bound: Duration) -> Result<(), UpstreamError> {
        let shared = &self.shared;
        if !shared.drained.is_cancelled() || shared.undecided.count() > 0 {
            sleep(CLIENT_FLUSH.min(bound)).await;
            return Ok(());
        }
        shared.closing.close();
        timeout(bound, shared.closing.wait()).await.map_err(|_| {
            UpstreamError::transient(
                Dependency::Queue,
                format!("acks were not sent within {} ms; their messages may come again", bound.as_millis()),
            )
        })
    }

    async fn check(&self) -> Result<(), UpstreamError> {
        let shared = &self.shared;
        let trouble = lock(&shared.trouble).clone();
        if let Some(trouble) = trouble {
            return Err(trouble);
        }
        shared.admin.check_subscription(&shared.spec).await
    }

    async fn differences(&self) -> Result<Vec<String>, UpstreamError> {
        self.shared.admin.differences(&self.shared.spec).await
    }

    async fn backlog(&self) -> Result<Backlog, UpstreamError> {
        let undecided = &self.shared.undecided;
        Ok(Backlog {
            subscription: self.shared.spec.name.clone(),
            unacknowledged: undecided.count() as u64,
            oldest: undecided.oldest(),
            scope: BacklogScope::Process,
        })
    }
}

/// Why the supervisor stopped waiting for a message.
enum Event {
    Message(Box<Message>, Handler),
    /// The stream is of no use any more.
    Broken(Option<Error>),
    /// The server was away and is back.
    Back,
    /// The server is there, but the subscription is not.
    Lost,
    /// Nobody pulls.
    Idle,
}

async fn supervise(shared: Arc<Shared>, subscriber: Subscriber) {
    let draining = shared.draining.clone();
    let mut stream = None;
    tokio::select! {
        biased;
        () = draining.cancelled() => {}
        () = pump(&shared, &subscriber, &mut stream) => {}
    }
    close(&shared, stream.take());
    shared.drained.cancel();
    // Nobody is left in `pull` for long: each sees the draining by itself.
    shared.filled.notify_waiters();
}

/// Moves messages from the stream to the tray; ends only by being dropped. `stream` is the caller's,
/// so that what it holds can be given back then.
async fn pump(shared: &Shared, subscriber: &Subscriber, stream: &mut Option<MessageStream>) {
    let mut backoff = MIN_BACKOFF;
    loop {
        // Nobody wants more, or all slots are taken, for so long: others may want what the stream holds.
        let slot = tokio::select! {
            slot = async {
                shared.until_wanted().await;
                shared.slots.clone().acquire_owned().await
            } => slot,
            () = sleep(IDLE), if stream.is_some() => {
                close(shared, stream.take());
                continue;
            }
        };
        // The semaphore is never closed.
        let Ok(slot) = slot else { return };

        let open = stream.get_or_insert_with(|| open(shared, subscriber));
        match next(shared, open).await {
            Event::Message(message, handler) => {
                backoff = MIN_BACKOFF;
                shared.set_trouble(None);
                deliver(shared, *message, handler, slot).await;
            }
            Event::Idle => close(shared, stream.take()),
            Event::Back => {
                info!(subscription = shared.spec.name, "the queue is back; opening a new stream");
                close(shared, stream.take());
                shared.set_trouble(None);
                backoff = MIN_BACKOFF;
            }
            Event::Lost => {
                close(shared, stream.take());
                restore(shared, &mut backoff).await;
            }
            Event::Broken(error) => {
                close(shared, stream.take());
                match error {
                    Some(error) if code_of(&error) == Some(Code::NotFound) => {
                        restore(shared, &mut backoff).await;
                    }
                    Some(error) => {
                        let what = format!("pulling from {}", shared.spec.name);
                        let error =
                            upstream(&error, &what, shared.admin.project(), "roles/pubsub.subscriber");
                        fail(shared, error, &mut backoff).await;
                    }
                    None => pause(&mut backoff).await,
                }
            }
        }
    }
}

fn open(shared: &Shared, subscriber: &Subscriber) -> MessageStream {
    debug!(subscription = shared.spec.name, "opening a stream");
    let in_flight = i64::try_from(shared.options.in_flight).unwrap_or(i64::MAX);
    subscriber
        .subscribe(shared.admin.subscription_path(&shared.spec.name))
        .set_max_outstanding_messages(in_flight)
        .set_max_outstanding_bytes(i64::from(MAX_BYTES))
        .set_max_lease_extension(shared.options.ack_deadline)
        .set_max_lease(shared.options.max_lease)
        // Closing a stream must not touch the deliveries that are being worked on.
        .set_shutdown_behavior(ShutdownBehavior::WaitForProcessing)
        .build()
}

/// Waits for the next message, and watches over the waiting.
async fn next(shared: &Shared, stream: &mut MessageStream) -> Event {
    // Polled until it is done, whatever else happens: dropping it early would abort a stream that is
    // just being opened, again and again.
    let mut message = pin!(stream.next());
    let mut idle = pin!(shared.until_idle());
    let mut probe = pin!(probe(shared));
    tokio::select! {
        biased;
        next = &mut message => match next {
            Some(Ok((message, handler))) => Event::Message(Box::new(message), handler),
            Some(Err(error)) => Event::Broken(Some(error)),
            None => Event::Broken(None),
        },
        event = &mut probe => event,
        () = &mut idle => Event::Idle,
    }
}

/// Asks the server for the subscription from time to time; returns when a new stream is needed.
async fn probe(shared: &Shared) -> Event {
    let mut away = lock(&shared.trouble).is_some();
    loop {
        sleep(if away { PROBE_OUTAGE } else { PROBE }).await;
        match timeout(PROBE, shared.admin.has_subscription(&shared.spec.name)).await {
            Ok(Ok(true)) if away => return Event::Back,
            Ok(Ok(true)) => {}
            Ok(Ok(false)) => return Event::Lost,
            Ok(Err(error)) => {
                if !away {
                    warn!(%error, subscription = shared.spec.name, "the queue does not answer");
                }
                away = true;
                shared.set_trouble(Some(error));
            }
            Err(_) => {
                away = true;
                shared.set_trouble(Some(UpstreamError::transient(
                    Dependency::Queue,
                    format!("no answer within {} ms", PROBE.as_millis()),
                )));
            }
        }
    }
}

async fn deliver(shared: &Shared, message: Message, handler: Handler, slot: OwnedSemaphorePermit) {
    let bytes = u32::try_from(message.data.len()).unwrap_or(MAX_BYTES).min(MAX_BYTES);
    // Waits for earlier deliveries to be decided; the client keeps this one's lease meanwhile.
    let Ok(bytes) = shared.bytes.clone().acquire_many_owned(bytes).await else { return };
    let delivery_attempt = handler.delivery_attempt().and_then(|attempt| u32::try_from(attempt).ok());
    let message_id = message_id(shared, &message);
    let Message { data, attributes, .. } = message;
    let mut attributes: Vec<_> = attributes.into_iter().collect();
    attributes.sort_unstable();
    shared.put(Ok(Delivery {
        message_id,
        data,
        attributes,
        delivery_attempt,
        handle: Box::new(PubSubHandle {
            handler: Some(handler),
            timeout: shared.admin.timeout(),
            _undecided: shared.undecided.enter(),
            _slot: slot,
            _bytes: bytes,
        }),
    }));
}

/// The id that every delivery of the message has. Pub/Sub's own, except on the emulator, which counts
/// from 1 again after a restart: there the time of publishing tells today's "1" from yesterday's, whose
/// task the store still knows.
fn message_id(shared: &Shared, message: &Message) -> String {
    match &message.publish_time {
        Some(at) if shared.admin.is_emulator() => {
            format!("{}@{}.{:09}", message.message_id, at.seconds(), at.nanos())
        }
        _ => message.message_id.clone(),
    }
}

/// The subscription is gone: makes it again where that is allowed, otherwise says how to.
async fn restore(shared: &Shared, backoff: &mut Duration) {
    let spec = &shared.spec;
    if !shared.admin.creates_missing() {
        fail(shared, shared.admin.missing_subscription(spec), backoff).await;
        return;
    }
    warn!(subscription = spec.name, "the subscription is gone; creating it again");
    let restored = async {
        shared.admin.ensure_topic(&spec.topic, spec.variable).await?;
        if let Some((topic, _)) = &spec.dead_letters {
            shared.admin.ensure_topic(topic, "PUBSUB_TOPIC_DLQ").await?;
        }
        shared.admin.ensure_subscription(spec).await
    };
    match restored.await {
        Ok(()) => {
            shared.set_trouble(None);
            pause(backoff).await;
        }
        Err(error) => fail(shared, error, backoff).await,
    }
}

/// Says what is wrong: to `check`, and to whoever pulls if a person must look at it.
async fn fail(shared: &Shared, error: UpstreamError, backoff: &mut Duration) {
    shared.set_trouble(Some(error.clone()));
    if error.is_transient() {
        warn!(%error, subscription = shared.spec.name, retry_ms = backoff.as_millis(), "the stream broke");
    } else {
        // Whoever pulls handles it, and so logs it.
        shared.put(Err(error));
    }
    pause(backoff).await;
}

async fn pause(backoff: &mut Duration) {
    sleep(*backoff).await;
    *backoff = (*backoff * 2).min(MAX_BACKOFF);
}

/// Gives back what was not returned by `pull`, and closes the stream. Deliveries that were returned
/// are decided through it all the same; it ends with the last of them.
fn close(shared: &Shared, stream: Option<MessageStream>) {
    let mut held = Vec::new();
    let mut kept = VecDeque::new();
    for item in std::mem::take(&mut *lock(&shared.tray)) {
        match item {
            Ok(delivery) => held.push(delivery.handle),
            // An error is for whoever pulls next, stream or no stream.
            Err(error) => kept.push_back(Err(error)),
        }
    }
    lock(&shared.tray).extend(kept);
    let Some(mut stream) = stream else { return };

    // What the client holds: it is given back only after the stream is closed, or the server would
    // push it into the closing stream again, where it would wait for its ack deadline. Unconstrained: a task
    // that has used up its turn would see an empty stream, and the client would hold what is left for ever.
    let mut handlers = Vec::new();
    while handlers.len() < MAX_HELD
        && let Some(Some(Ok((_, handler)))) = unconstrained(stream.next()).now_or_never()
    {
        handlers.push(handler);
    }
    let token = stream.shutdown_token();
    shared.closing.spawn(async move { token.shutdown().await });
    drop(stream);
    if !handlers.is_empty() || !held.is_empty() {
        debug!(
            subscription = shared.spec.name,
            messages = handlers.len() + held.len(),
            "giving back messages that nobody pulled"
        );
    }
    drop((handlers, held));
}

struct PubSubHandle {
    /// Taken when it is decided; dropping the client's handler is a nack.
    handler: Option<Handler>,
    timeout: Duration,
    _undecided: Undecided,
    _slot: OwnedSemaphorePermit,
    _bytes: OwnedSemaphorePermit,
}

#[async_trait]
impl AckHandle for PubSubHandle {
    async fn ack(mut self: Box<Self>) -> Result<(), UpstreamError> {
        match self.handler.take() {
            Some(Handler::ExactlyOnce(handler)) => {
                confirmed(timeout(self.timeout, handler.confirmed_ack()).await)
            }
            Some(handler) => {
                handler.ack();
                Ok(())
            }
            None => Ok(()),
        }
    }

    async fn nack(mut self: Box<Self>) -> Result<(), UpstreamError> {
        match self.handler.take() {
            Some(Handler::ExactlyOnce(handler)) => {
                confirmed(timeout(self.timeout, handler.confirmed_nack()).await)
            }
            Some(handler) => {
                handler.nack();
                Ok(())
            }
            None => Ok(()),
        }
    }
}

fn confirmed(answer: Result<Result<(), AckError>, tokio::time::error::Elapsed>) -> Result<(), UpstreamError> {
    match answer {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(UpstreamError::transient(Dependency::Queue, describe(&error))),
        Err(_) => Err(UpstreamError::transient(
            Dependency::Queue,
            "the queue did not confirm in time; the message may be delivered again",
        )),
    }
}

/// The deliveries that `pull` or the tray gave out, and since when.
#[derive(Clone, Default)]
struct Ages(Arc<Mutex<(u64, HashMap<u64, Instant>)>>);

impl Ages {
    fn enter(&self) -> Undecided {
        let mut ages = lock(&self.0);
        ages.0 += 1;
        let key = ages.0;
        ages.1.insert(key, Instant::now());
        Undecided { key, ages: self.clone() }
    }

    fn count(&self) -> usize {
        lock(&self.0).1.len()
    }

    fn oldest(&self) -> Option<Duration> {
        lock(&self.0).1.values().min().map(Instant::elapsed)
    }
}

/// An entry in [`Ages`], for as long as it lives.
struct Undecided {
    key: u64,
    ages: Ages,
}

impl Drop for Undecided {
    fn drop(&mut self) {
        lock(&self.ages.0).1.remove(&self.key);
    }
}
