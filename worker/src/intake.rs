//! From a delivery to its end: parse, then claim and run, obey, or put aside.
//!
//! A delivery is acked only when what it asks for is durable: the run final, deferred or given back
//! *in the store*; the command carried out; the bad message in `dead_letters`. While the store is
//! down a delivery is held (the queue keeps its lease), not nacked: no delivery attempt is spent.

use std::sync::Arc;

use atlas_shared::{
    Dependency, TaskId, UNSTORABLE, UpstreamError,
    ledger::LedgerError,
    message::{self, Answer, AnswerStatus, AnswerType, Inbound, Rejection, Task},
    trace_context::TraceParent,
};
use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use serde_json::{Map, Value, json};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use uuid::Uuid;

use crate::{
    context::Context,
    control,
    crash::crash_point,
    gate::Reason,
    limiter::Permit,
    queue::{AckHandle, Delivery, RequestQueue},
    resilient,
    run::{self, Ending},
    store::{Claim, ClaimRequest, DeadLetter},
};

/// Names the namespace in which a message's bytes or id become the id of its dead letter.
const DEAD_LETTER_NAMESPACE: Uuid = Uuid::from_u128(0x2d1f_9c70_7f3e_4a0e_8a51_9a4e_2c6b_b0d4);

/// More bytes than this may be what a store that is well cannot take in its time, or hangs up on.
const LARGE: usize = 1024 * 1024;

/// What to do with a delivery in the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Durable: never again.
    Ack,
    /// Another worker shall have it now.
    Nack,
}

impl Verdict {
    /// Ends a delivery. Where the queue does not take it the message comes again, and is found done.
    pub(crate) async fn carry_out(self, handle: Box<dyn AckHandle>, message_id: &str, attempt: Option<u32>) {
        let ended = match self {
            Self::Ack => handle.ack().await,
            Self::Nack => handle.nack().await,
        };
        if let Err(error) = ended {
            tracing::warn!(message_id, delivery_attempt = attempt, error = %error, "the delivery could not be ended");
        }
    }
}

/// Pulls and works until told to stop. Returns once the queue has nothing more for us.
pub(crate) async fn run(
    context: Arc<Context>,
    queue: Arc<dyn RequestQueue>,
    source: String,
    tasks: TaskTracker,
    stop: CancellationToken,
    kill: CancellationToken,
) {
    loop {
        let permit = tokio::select! {
            () = stop.cancelled() => break,
            permit = async {
                context.gate.open().await;
                let permit = context.limiter.acquire().await;
                context.busy.room().await;
                permit
            } => permit,
        };
        let delivery = tokio::select! {
            // What closes the gate while we wait must be seen before the next message is taken.
            () = context.gate.closed() => continue,
            next = next_delivery(&context, queue.as_ref(), "requests", &stop) => next,
        };
        let Some(delivery) = delivery else { break };
        let context = Arc::clone(&context);
        let source = source.clone();
        let kill = kill.clone();
        let at_work = context.busy.begin();
        tasks.spawn(async move {
            handle(&context, &source, delivery, permit, &kill).await;
            drop(at_work);
        });
    }
}

/// The next delivery of the queue that holds `what`; `None` when told to stop, or when there are no more.
pub(crate) async fn next_delivery(
    context: &Context,
    queue: &dyn RequestQueue,
    what: &str,
    stop: &CancellationToken,
) -> Option<Delivery> {
    loop {
        let pulled = tokio::select! {
            () = stop.cancelled() => return None,
            pulled = queue.pull() => pulled,
        };
        let error = match pulled {
            Ok(delivery) => return delivery,
            Err(error) => error,
        };
        tracing::error!(error = %error, error_code = error.code(), "cannot pull {what}");
        // The adapter rebuilds its stream by itself; an error here needs a person, or time.
        tokio::select! {
            () = stop.cancelled() => return None,
            () = tokio::time::sleep(context.config.resilience.circuit_open) => {}
        }
    }
}

/// Works on one delivery and ends it.
async fn handle(
    context: &Arc<Context>,
    source: &str,
    delivery: Delivery,
    permit: Permit,
    kill: &CancellationToken,
) {
    let Delivery { message_id, data, attributes, delivery_attempt, handle } = delivery;
    let trace =
        TraceParent::from_attributes(attributes.iter().map(|(name, value)| (name.as_str(), value.as_str())));
    crash_point!("pulled");
    let origin = Origin { source, message_id: &message_id, attributes };
    let verdict = match message::parse(&data, &message_id, context.config.worker.max_message_bytes) {
        Ok(Inbound::Chat(task)) => {
            context.metrics.messages.with_label_values(&["chat"]).inc();
            let task_id = task.task_id;
            match claim(context, task, data.len(), &origin, kill).await {
                Ok(claim) => {
                    // A run waits long: it holds what it needs, not the room that other stages would.
                    drop((data, origin));
                    Box::pin(pursue(context, claim, trace, permit, kill)).await
                }
                Err(given_up) => given_up.end(context, &origin, &data, task_id, kill).await,
            }
        }
        Ok(Inbound::Control(control)) => {
            context.metrics.messages.with_label_values(&["control"]).inc();
            // However long it takes: carried out twice it is the same.
            match insist(context, data.len(), kill, || control::obey(context, &control, trace)).await {
                Ok(()) => Verdict::Ack,
                Err(given_up) => given_up.end(context, &origin, &data, control.task_id, kill).await,
            }
        }
        Ok(Inbound::OtherRole { role }) => {
            context.metrics.messages.with_label_values(&["other_role"]).inc();
            tracing::debug!(role, message_id, "a message for another role");
            Verdict::Ack
        }
        Err(rejection) => {
            context.metrics.messages.with_label_values(&["rejected"]).inc();
            let letter = rejected(context, &origin, &data, rejection);
            put_aside(context, letter, kill).await
        }
    };
    crash_point!("before_ack");
    verdict.carry_out(handle, &message_id, delivery_attempt).await;
    crash_point!("acked");
}

/// Claims the run of a request, whose message had this many bytes.
async fn claim(
    context: &Context,
    task: Task,
    bytes: usize,
    origin: &Origin<'_>,
    kill: &CancellationToken,
) -> Result<Claim, GivenUp> {
    let request = ClaimRequest {
        task_id: task.task_id,
        claim_id: Uuid::now_v7(),
        message: Value::Object(task.raw),
        tenant: task.options.tenant,
        requester: attribute(&origin.attributes, "requester").map(|name| name.replace('\0', "")),
        worker: context.worker.clone(),
        lease: context.config.worker.lease,
    };
    insist(context, bytes, kill, || resilient::store(&context.retry, || context.store.claim_run(&request)))
        .await
}

/// Runs what was claimed.
async fn pursue(
    context: &Arc<Context>,
    claim: Claim,
    trace: TraceParent,
    permit: Permit,
    kill: &CancellationToken,
) -> Verdict {
    match claim {
        Claim::Claimed(claimed) => {
            crash_point!("claimed");
            match Box::pin(run::execute(context, claimed, trace, permit, kill)).await {
                // The lease was given back with the store's knowledge; the nack only makes it quicker.
                Ending::Drained => Verdict::Nack,
                // Also when the store was lost on the way: the run is in it since the claim, its lease
                // will expire, and a sweep takes it.
                Ending::Final | Ending::Deferred | Ending::Released | Ending::Fenced | Ending::StoreLost => {
                    Verdict::Ack
                }
            }
        }
        Claim::Finished { unsent } => {
            context.metrics.messages.with_label_values(&["duplicate"]).inc();
            if unsent {
                context.sweep_now.notify_one();
            }
            Verdict::Ack
        }
        Claim::Held => {
            context.metrics.messages.with_label_values(&["duplicate"]).inc();
            Verdict::Ack
        }
    }
}

/// Why a message was not brought into the store.
enum GivenUp {
    /// The worker is killed: what it holds must be nacked.
    Killed,
    /// The store will never hold it.
    Unstorable(LedgerError),
}

impl GivenUp {
    /// Ends the delivery: what the store cannot hold is put aside, and whoever asked is told.
    async fn end(
        self,
        context: &Context,
        origin: &Origin<'_>,
        data: &[u8],
        task_id: TaskId,
        kill: &CancellationToken,
    ) -> Verdict {
        let Self::Unstorable(error) = self else { return Verdict::Nack };
        let rejection = Rejection {
            reason: UNSTORABLE,
            message: format!("The store cannot hold this message: {error}"),
            answer_to: Some(task_id),
            // What cannot be held may be in them.
            metadata: Map::new(),
        };
        put_aside(context, rejected(context, origin, data, rejection), kill).await
    }
}

/// Tries a call that gives the store this many bytes until it is carried out, or never can be.
async fn insist<T, F>(
    context: &Context,
    bytes: usize,
    kill: &CancellationToken,
    call: impl Fn() -> F,
) -> Result<T, GivenUp>
where
    F: Future<Output = Result<T, LedgerError>>,
{
    loop {
        match call().await {
            Ok(done) => return Ok(done),
            Err(error) if is_too_much(context, bytes, &error).await => {
                return Err(GivenUp::Unstorable(error));
            }
            Err(error) => held(context, &error, kill).await?,
        }
    }
}

/// The store did not take it. Holds the delivery for as long as a circuit is open, then it is time to try again.
async fn held(context: &Context, error: &LedgerError, kill: &CancellationToken) -> Result<(), GivenUp> {
    tracing::warn!(error = %error, "the store does not answer; the message is held");
    context.gate.set(Reason::Dependency(Dependency::Store), true);
    context.sweep_now.notify_one();
    let pause = context.config.resilience.circuit_open;
    tokio::select! {
        () = kill.cancelled() => Err(GivenUp::Killed),
        () = tokio::time::sleep(pause) => Ok(()),
    }
}

/// Stores a bad message, however long it takes. Where the store is well and does not take these bytes, the row
/// says so and goes without them: it would never be taken, and the place of the delivery never be free.
pub(crate) async fn put_aside(
    context: &Context,
    mut letter: DeadLetter,
    kill: &CancellationToken,
) -> Verdict {
    loop {
        crash_point!("before_dead_letter");
        match resilient::store(&context.retry, || context.store.record_dead_letter(&letter)).await {
            Ok(new) => {
                crash_point!("dead_letter_recorded");
                if new {
                    context.metrics.dead_letters.with_label_values(&[letter.reason.as_str()]).inc();
                    tracing::warn!(
                        reason = letter.reason,
                        detail = letter.detail,
                        task_id = letter.task_id.map(|id| id.to_string()),
                        error_code = letter.reason,
                        "message put into dead_letters"
                    );
                }
                context.sweep_now.notify_one();
                return Verdict::Ack;
            }
            Err(error)
                if !letter.raw_base64.is_empty()
                    && is_too_much(context, letter.raw_base64.len(), &error).await =>
            {
                let bytes = letter.raw_base64.len() / 4 * 3;
                let detail = format!("{} Its {bytes} bytes are not kept: {error}.", letter.detail);
                letter = DeadLetter { raw_base64: String::new(), detail, ..letter };
            }
            Err(error) => {
                if held(context, &error, kill).await.is_err() {
                    return Verdict::Nack;
                }
            }
        }
    }
}

/// True where the store answers, and will never hold these bytes, or cannot take them in its time.
async fn is_too_much(context: &Context, bytes: usize, error: &LedgerError) -> bool {
    let away = matches!(error, LedgerError::Upstream(UpstreamError::Transient { .. }));
    (error.is_unstorable() || (away && bytes > LARGE)) && context.store.check().await.is_ok()
}

/// A message that no worker can read, and what is said about it.
pub(crate) fn rejected(
    context: &Context,
    origin: &Origin<'_>,
    data: &[u8],
    rejection: Rejection,
) -> DeadLetter {
    let Rejection { reason, message, answer_to, mut metadata } = rejection;
    let announce = answer_to.map(|task_id| {
        metadata.insert("error_code".to_owned(), json!(reason));
        Answer::bare(task_id, AnswerType::Error, AnswerStatus::Error, message.clone(), metadata)
    });
    let letter = origin.letter(context, data, reason, message, announce);
    DeadLetter { task_id: answer_to, ..letter }
}

/// Where a dead letter comes from.
pub(crate) struct Origin<'a> {
    /// The subscription's name.
    pub(crate) source: &'a str,
    pub(crate) message_id: &'a str,
    pub(crate) attributes: Vec<(String, String)>,
}

impl Origin<'_> {
    /// The row's id: the same for every delivery of the message.
    fn id(&self) -> Uuid {
        Uuid::new_v5(&DEAD_LETTER_NAMESPACE, format!("{}/{}", self.source, self.message_id).as_bytes())
    }

    /// The row of a bad message.
    fn letter(
        &self,
        context: &Context,
        data: &[u8],
        reason: &str,
        detail: String,
        announce: Option<Answer>,
    ) -> DeadLetter {
        DeadLetter {
            id: self.id(),
            source: self.source.to_owned(),
            reason: reason.to_owned(),
            detail,
            raw_base64: BASE64.encode(data),
            attributes: storable(&self.attributes),
            task_id: None,
            fails_run: false,
            announce: announce.map(|answer| (context.topic_out.clone(), answer)).into_iter().collect(),
        }
    }
}

/// Reads the dead-letter subscription: what arrives there is stored and announced with `escalate`.
pub(crate) async fn read_dead_letters(
    context: Arc<Context>,
    queue: Arc<dyn RequestQueue>,
    source: String,
    stop: CancellationToken,
    kill: CancellationToken,
) {
    while let Some(delivery) = next_delivery(&context, queue.as_ref(), "dead letters", &stop).await {
        escalate(&context, &source, delivery, &kill).await;
    }
}

async fn escalate(context: &Context, source: &str, delivery: Delivery, kill: &CancellationToken) {
    let Delivery { message_id, data, attributes, delivery_attempt, handle } = delivery;
    let max_bytes = context.config.worker.max_message_bytes;
    let (task_id, metadata): (Option<TaskId>, Map<String, Value>) =
        match message::parse(&data, &message_id, max_bytes) {
            Ok(Inbound::Chat(task)) => (Some(task.task_id), task.metadata()),
            Ok(Inbound::Control(control)) => (Some(control.task_id), Map::new()),
            Ok(Inbound::OtherRole { .. }) => (None, Map::new()),
            Err(rejection) => (rejection.answer_to, rejection.metadata),
        };
    let detail = "No worker could finish this message in as many deliveries as the subscription allows.";
    let origin = Origin { source, message_id: &message_id, attributes };
    let announce = task_id.map(|task_id| {
        let content = json!({
            "command": "escalate",
            "task_id": task_id,
            "reason": "delivery_attempts_exhausted",
            "detail": detail,
            "next": format!("atlas dlq show {0}, mend the cause, then atlas dlq replay {0}", origin.id()),
        });
        Answer::bare(task_id, AnswerType::Control, AnswerStatus::Error, content, metadata)
    });
    let letter = origin.letter(context, &data, "delivery_attempts_exhausted", detail.to_owned(), announce);
    let letter = DeadLetter { task_id, fails_run: true, ..letter };
    let verdict = put_aside(context, letter, kill).await;
    verdict.carry_out(handle, &message_id, delivery_attempt).await;
    crash_point!("dead_letter_acked");
}

/// Attributes without NUL, which Postgres cannot store as text. The message itself is kept as base64.
fn storable(attributes: &[(String, String)]) -> Vec<(String, String)> {
    attributes.iter().map(|(name, value)| (name.replace('\0', ""), value.replace('\0', ""))).collect()
}

fn attribute(attributes: &[(String, String)], name: &str) -> Option<String> {
    attributes.iter().find(|(key, _)| key == name).map(|(_, value)| value.clone())
}
