//! The life cycle of a run, top to bottom: **claim** (in [`crate::intake`] and [`crate::sweep`]),
//! **retrieve**, **reserve**, **generate**, **settle**, **finish**, **publish**, ack.
//!
//! What is durable when a stage returns:
//!
//! | stage | durable |
//! |---|---|
//! | claim | the request and our lease |
//! | retrieve | nothing: passages are kept with the first model call |
//! | reserve | the grant, against the day's and the run's limit |
//! | generate | nothing yet: the answer is in memory |
//! | settle | what the call billed *and* everything needed to go on from it |
//! | finish | result, state, ledger and outbox row, in one transaction; the last call settles here |
//! | publish | the message; its mark follows in a batch |
//!
//! A run ends in exactly one [`Ending`]. Each of them leaves it in a state that another worker, or
//! the next sweep, can go on from.

use std::{
    sync::{
        Arc, LazyLock,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use atlas_shared::{
    Dependency, Tokens, UNSTORABLE, UpstreamError,
    gateway_api::{Passage, QueryChatRequest, QueryFilter},
    ledger::{Closing, Denial, DeniedBy, LedgerError},
    message::{Answer, AnswerStatus, AnswerType, Task},
    model::{ChatRequest, Listener, ResponseFormat},
    resilience,
    trace_context::TraceParent,
};
use serde_json::{Map, Value, json};
use tokio::sync::OwnedSemaphorePermit;
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

use crate::{
    agent::{
        self, AgentOptions, Draft, DraftInput, Failure, Finished, Fitted, Kind, Lookup, Next, PromptParts,
        lookup, offline,
    },
    call::{Answered, CallEnd, Caller},
    context::{Context, attributes},
    crash::crash_point,
    limiter::Permit,
    live::{Live, Rest, Speaker},
    resilient,
    stop::{Stop, StopReason},
    store::{Checkpoint, ClaimedRun, FinalStatus, Finish, Json, Lease, Published, Settlement},
};

/// Shortest and longest wait before a run that failed transiently is tried again.
const RETRY_FIRST: Duration = Duration::from_secs(10);
const RETRY_LONGEST: Duration = Duration::from_mins(10);

/// What the last step of a run brought is in its answer, which is stored in the same transaction: nobody goes on
/// from there.
static ENDED: LazyLock<Json> = LazyLock::new(|| json!({"ended": true}).into());

/// How one attempt of a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// Done or failed, for ever.
    Final,
    /// Waits in the store for tokens.
    Deferred,
    /// Waits in the store for another try.
    Released,
    /// Given back because this worker shuts down: another one may start it at once.
    Drained,
    /// Another worker has it.
    Fenced,
    /// The store did not answer; the lease will expire.
    StoreLost,
}

impl Ending {
    fn as_str(self) -> &'static str {
        match self {
            Self::Final => "final",
            Self::Deferred => "deferred",
            Self::Released => "released",
            Self::Drained => "drained",
            Self::Fenced => "fenced",
            Self::StoreLost => "store_lost",
        }
    }
}

/// Works on a claimed run until it ends. `permit` is its place in the limiter; `kill` says that the
/// drain is over.
pub(crate) async fn execute(
    context: &Arc<Context>,
    claimed: ClaimedRun,
    trace: TraceParent,
    mut permit: Permit,
    kill: &CancellationToken,
) -> Ending {
    let began = Instant::now();
    let ClaimedRun { lease, message, steps, parent, spent, taken_over, deferrals, cancel_requested } =
        claimed;
    let task = match Task::from_stored(message) {
        Ok(task) => task,
        Err(rejection) => {
            // Only a row that somebody else wrote can be so; it has no contents to answer with.
            tracing::error!(task_id = %lease.task_id, error = %rejection, error_code = rejection.reason, "stored request is unreadable");
            return release(context, &lease, RETRY_LONGEST, Ending::Released).await;
        }
    };
    let stop = Stop::default();
    let _place = context.running.enter(&lease, &stop);
    let _watch = watch(context, &lease, &task, &stop, kill);
    let mut run = Run {
        context,
        task,
        lease,
        spent,
        trace,
        stop,
        waited: Duration::ZERO,
        began,
        kind: None,
        model: None,
        fallbacks: Vec::new(),
        token_use: Value::Null,
        stages: Map::new(),
        chunks: Arc::new(AtomicU32::new(context.config.worker.stream_chunks)),
        rest: None,
        readable: Tokens(u64::MAX),
        desk: None,
    };

    let ending = if cancel_requested {
        run.fail("cancelled", "The request was cancelled.", None).await
    } else if taken_over && run.failures(deferrals) > context.config.worker.max_run_attempts {
        run.fail(
            "too_many_attempts",
            "Worker after worker died on this request. Look at their logs with its task_id.",
            None,
        )
        .await
    } else {
        Box::pin(run.live(steps, parent, deferrals, &mut permit)).await
    };

    let elapsed = began.elapsed();
    context.metrics.overhead_seconds.observe(elapsed.saturating_sub(run.waited).as_secs_f64());
    if ending != Ending::Final {
        // A final run was observed with its status when it was finished.
        context.metrics.run_seconds.with_label_values(&[ending.as_str()]).observe(elapsed.as_secs_f64());
        context.metrics.runs.with_label_values(&[ending.as_str()]).inc();
    }
    tracing::info!(
        task_id = %run.task.task_id,
        trace_id = run.trace.trace_id(),
        attempt = run.lease.attempt,
        ending = ending.as_str(),
        tokens = run.spent.0,
        duration_ms = u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX),
        "run ended"
    );
    ending
}

/// One attempt of one run.
struct Run<'a> {
    context: &'a Arc<Context>,
    task: Task,
    lease: Lease,
    /// What its calls have billed so far, all attempts together.
    spent: Tokens,
    trace: TraceParent,
    stop: Stop,
    /// Time spent waiting for gateway and model.
    waited: Duration,
    began: Instant,
    /// What kind of document it writes, once that is known.
    kind: Option<Kind>,
    /// The model of the last answer.
    model: Option<String>,
    /// Why models of the chain were given up.
    fallbacks: Vec<String>,
    /// What the answered calls billed, and for what.
    token_use: Value,
    /// Milliseconds a stage, for the answer's metadata.
    stages: Map<String, Value>,
    /// Messages with text that may still be sent.
    chunks: Arc<AtomicU32>,
    /// Text of the last call that may still be on its way.
    rest: Option<Rest>,
    /// What the model can read at once, as far as its refusals showed.
    readable: Tokens,
    /// Its place at the desk, from an answer until that is stored.
    desk: Option<OwnedSemaphorePermit>,
}

/// What is kept of a request that was sent.
struct Sent {
    /// Of all of it, for the checkpoint.
    hash: String,
    parts: PromptParts,
}

/// A model call that was answered and is not stored yet.
struct Unsettled {
    settlement: Settlement,
    checkpoint: Checkpoint,
}

impl Run<'_> {
    /// Retrieve, then generate until the agent is done or something ends the attempt. Stages are boxed: a run that
    /// waits for a model shall not hold the room of all the others.
    async fn live(
        &mut self,
        steps: Vec<Checkpoint>,
        parent: Option<Value>,
        deferrals: u32,
        permit: &mut Permit,
    ) -> Ending {
        if let Some(denial) = self.out_of_budget().await {
            return self.defer(denial).await;
        }
        let mut draft = match restore(&self.task, steps) {
            Some(draft) => {
                self.kind = Some(draft.kind());
                self.fallbacks.extend(draft.refusals());
                self.token_use = draft.token_use();
                draft
            }
            None => {
                let admitted = match agent::admit(&self.task, parent.as_ref()) {
                    Ok(admitted) => admitted,
                    Err(failure) => return self.fail(&failure.code, &failure.message, None).await,
                };
                self.kind = Some(admitted.kind);
                self.progress("retrieving", 5, "Searching the team's documents.");
                let (passages, degraded) = match Box::pin(self.look_up(parent.as_ref())).await {
                    Ok(found) => found,
                    Err(Interrupted::Stop(reason)) => return self.stopped(reason, deferrals).await,
                    Err(Interrupted::Failed(failure)) => {
                        return self.fail(&failure.code, &failure.message, None).await;
                    }
                    Err(Interrupted::Upstream(error)) => return self.try_later(&error, deferrals).await,
                };
                crash_point!("retrieved");
                self.progress("writing", 20, &format!("{} passages found, writing.", passages.len()));
                let input = DraftInput {
                    task: self.task.clone(),
                    passages,
                    parent,
                    options: AgentOptions::from_config(&self.context.config),
                    date: Some(jiff::Timestamp::now().to_zoned(jiff::tz::TimeZone::UTC).date()),
                    degraded,
                };
                if self.context.calls.is_none() {
                    self.model = Some(offline::MODEL.to_owned());
                    return self.finish(offline::of_kind(&input, admitted.kind), None).await;
                }
                Draft::admitted(input, admitted)
            }
        };

        loop {
            let mut unsettled = None;
            if let Err(reason) = self.stop.check() {
                return self.stopped(reason, deferrals).await;
            }
            if let Some(step) = draft.pending_call() {
                match Box::pin(self.generate(&mut draft, &step, permit)).await {
                    Ok(answered) => unsettled = answered,
                    Err(CallEnd::Denied(denial)) => return self.defer(denial).await,
                    Err(CallEnd::Failed { error, .. }) if error.is_transient() => {
                        return self.try_later(&error, deferrals).await;
                    }
                    Err(CallEnd::Failed { error: error @ UpstreamError::Misconfigured { .. }, .. }) => {
                        self.progress("paused", draft.percent(), &error.to_string());
                        return self.release(self.context.config.resilience.circuit_open).await;
                    }
                    Err(CallEnd::Failed { error, .. }) => {
                        draft.cannot_call(error.code(), &error.to_string());
                    }
                    Err(CallEnd::Stopped(reason)) => return self.stopped(reason, deferrals).await,
                    Err(CallEnd::Store(error)) => return self.lost(&error),
                    // `generate` turns an answer into `Ok`.
                    Err(CallEnd::Answered(_)) => {}
                }
            }
            match draft.next() {
                Next::Finished(finished) => return Box::pin(self.finish(*finished, unsettled)).await,
                Next::Failed(failure) => {
                    return Box::pin(self.fail(&failure.code, &failure.message, unsettled)).await;
                }
                next @ (Next::Call(_) | Next::Search(_)) => {
                    if let Some(mut unsettled) = unsettled {
                        unsettled.checkpoint.output = draft.checkpoint().into();
                        if let Err(error) = Box::pin(self.settle(&unsettled)).await {
                            if error.is_unstorable() {
                                unsettled.checkpoint.output = ENDED.clone();
                                return Box::pin(self.unstorable(&error, Some(unsettled))).await;
                            }
                            return self.lost(&error);
                        }
                        crash_point!("settled");
                    }
                    self.desk = None;
                    let Next::Search(search) = next else { continue };
                    let (percent, number) = (draft.percent(), draft.searches() + 1);
                    self.searches(percent, number, &search.query);
                    match Box::pin(self.retrieve(&Lookup { query: search.query.clone(), path: None })).await {
                        Ok((_, Some(_))) | Err(Interrupted::Failed(_) | Interrupted::Upstream(_)) => {
                            draft.search_failed();
                        }
                        Ok((passages, None)) => draft.found(passages),
                        Err(Interrupted::Stop(reason)) => return self.stopped(reason, deferrals).await,
                    }
                }
            }
        }
    }

    /// While the day's budget is known to be gone, a request is put aside before any work is done.
    async fn out_of_budget(&self) -> Option<Denial> {
        let needed = self.context.gate.budget_needed()?;
        // Where the store does not say, the reservation will.
        let budget = self.context.store.budget(self.context.config.limits).await.ok()?;
        self.context.gate.budget_available(budget.available());
        (budget.available() < needed).then(|| Denial {
            denied_by: DeniedBy::Day,
            requested: needed,
            available: budget.available(),
            limit: budget.limit,
            resets_at: Some(budget.resets_at),
        })
    }

    /// The passages to begin with: those for the request, and those that its parent stood on.
    async fn look_up(
        &mut self,
        parent: Option<&Value>,
    ) -> Result<(Vec<Passage>, Option<String>), Interrupted> {
        let request = self.task.content.clone();
        let (found, degraded) = self.retrieve(&lookup::first(&request, parent)).await?;
        let Some(parent) = parent.filter(|_| degraded.is_none()) else { return Ok((found, degraded)) };
        let mut cited = Vec::new();
        for lookup in lookup::again(&request, parent) {
            // The request's own passages are there: what fails here makes them no worse.
            match self.retrieve(&lookup).await {
                Ok((passages, _)) => cited.extend(passages),
                Err(stop @ Interrupted::Stop(_)) => return Err(stop),
                Err(Interrupted::Failed(_) | Interrupted::Upstream(_)) => break,
            }
        }
        Ok((lookup::merge(found, cited, parent), None))
    }

    /// Asks the gateway. With `RAG_FAIL_OPEN` a dead gateway gives no passages and a reason.
    async fn retrieve(&mut self, lookup: &Lookup) -> Result<(Vec<Passage>, Option<String>), Interrupted> {
        let began = Instant::now();
        let rag = &self.context.config.rag;
        let request = QueryChatRequest {
            query: lookup.query.clone(),
            top_k: Some(rag.top_k),
            collection: Some(self.task.options.collection.clone().unwrap_or_else(|| rag.collection.clone())),
            relevancy_threshold: rag.relevancy_threshold,
            filter: (lookup.path.is_some() || self.task.options.tenant.is_some()).then(|| QueryFilter {
                path: lookup.path.clone(),
                tenant: self.task.options.tenant.clone(),
                ..QueryFilter::default()
            }),
            ..QueryChatRequest::default()
        };
        let gateway = self.context.gateway.traced(self.trace.child());
        let away = self.context.busy.away();
        let result = tokio::select! {
            result = resilience::retry(&self.context.retry, &self.context.gateway_breaker, || {
                gateway.query_chat(&request)
            }) => result,
            reason = self.stop.stopped() => return Err(Interrupted::Stop(reason)),
        };
        drop(away);
        self.observe("retrieve", began.elapsed());
        self.waited += began.elapsed();
        match result {
            Ok(found) => {
                // Lexical search is how a gateway without embeddings works, not a failure of this run.
                let degraded = found.degraded.filter(|how| how != "lexical");
                Ok((found.passages, degraded.map(|how| format!("The search was degraded ({how})."))))
            }
            Err(error) => self.without_passages(error),
        }
    }

    /// What a search that failed means: no passages, and why, or no document now, or none at all.
    fn without_passages(&self, error: UpstreamError) -> Result<(Vec<Passage>, Option<String>), Interrupted> {
        let rag = &self.context.config.rag;
        let unknown = error.code() == "unknown_collection";
        // Whoever names a collection wants its documents: nothing is paid for a document without them.
        if let Some(name) = self.task.options.collection.as_ref().filter(|_| unknown) {
            return Err(Interrupted::Failed(Failure {
                code: error.code().to_owned(),
                message: format!(
                    "The gateway has no collection {name:?}, which metadata.collection names. Name another one \
                     (atlas collections list), or index into it (atlas index PATH --collection {name})."
                ),
            }));
        }
        if !rag.fail_open {
            return Err(match error {
                // The same search will never be taken.
                UpstreamError::Permanent { code, message, .. } => Interrupted::Failed(Failure {
                    message: format!(
                        "The knowledge base refused the search ({message}), and RAG_FAIL_OPEN=false wants no \
                         document without passages."
                    ),
                    code,
                }),
                error => Interrupted::Upstream(error),
            });
        }
        tracing::warn!(task_id = %self.task.task_id, error = %error, error_code = error.code(), "going on without passages");
        self.context.metrics.context_degraded.inc();
        let why = match error {
            UpstreamError::Permanent { .. } if unknown => {
                format!("Nothing is indexed: there is no collection {:?} yet.", rag.collection)
            }
            UpstreamError::Permanent { message, .. } => {
                format!("The knowledge base refused the search ({message}).")
            }
            UpstreamError::Misconfigured { variable, .. } => {
                format!("The knowledge base cannot be used before its operator looks at {variable}.")
            }
            UpstreamError::Transient { .. } => "The knowledge base could not be reached.".to_owned(),
        };
        Ok((Vec::new(), Some(why)))
    }

    /// Makes the pending call: fits it into what the run may still spend, reserves, calls, and feeds
    /// the answer to the draft. `Ok(None)`: no call could be made, and the draft knows.
    async fn generate(
        &mut self,
        draft: &mut Draft,
        step: &str,
        permit: &mut Permit,
    ) -> Result<Option<Unsettled>, CallEnd> {
        let Some(calls) = &self.context.calls else {
            // A run that another worker began with a model: this one has none.
            let error = UpstreamError::misconfigured(
                Dependency::Model,
                "OPENAI_API_KEY",
                "this run was begun with a model, but this worker has none",
                "configure all workers of a fleet alike",
            );
            return Err(CallEnd::Failed { error, throttled: false });
        };
        let run_limit = self.context.run_limit();
        let mut available = run_limit.saturating_sub(self.spent).min(self.readable);
        // Counted for the model that is asked first; the reservation counts for the one that is asked.
        let refused_by = draft.refused_by();
        let mut counted = calls.models(self.task.options.model.as_deref(), &refused_by);
        if counted.is_empty() {
            // Another worker's chain was longer.
            draft.cannot_call("model_refused", "no other one is configured.");
            return Ok(None);
        }
        let mut others = counted.split_off(1);
        let count = |request: &ChatRequest, models: &[String]| {
            let bound = |model: &String| calls.model.prompt_tokens_upper_bound(model, request);
            models.iter().map(bound).max().unwrap_or_default()
        };
        if let Some((_, told)) = draft.repair_round() {
            self.progress("repairing", draft.percent(), told);
        }
        // Set once a whole day's limit is less than the call wants.
        let mut too_large_for_any_day = None;
        // Set once the model said that the call is more than it can read.
        let mut too_large_for_the_model = None;
        let lost = AtomicU64::new(0);
        loop {
            let fits = draft.squeeze(available, |request| count(request, &counted));
            if let Err(does_not_fit) = fits {
                if let Some(denial) = too_large_for_any_day {
                    // It waits for a higher limit; nothing is lost because somebody set a low one.
                    return Err(CallEnd::Denied(denial));
                }
                if let Some(error) = too_large_for_the_model {
                    draft.cannot_call(
                        "context_length_exceeded",
                        &format!("Not even the shortest prompt fits into the model's context: {error}"),
                    );
                    return Ok(None);
                }
                draft.cannot_call(
                    "run_budget_exhausted",
                    &format!(
                        "{does_not_fit} (limit {run_limit}, {} spent). Raise TOKEN_BUDGET_PER_RUN, or ask for less.",
                        self.spent
                    ),
                );
                return Ok(None);
            }
            let Ok(Some(Fitted { request, prompt })) = fits else { return Ok(None) };
            let asked = prompt + Tokens(u64::from(request.max_completion_tokens));
            // What is wanted of the request later, so that it need not be kept while the call is made.
            let sent = Sent { hash: hash(&request), parts: draft.prompt_parts(&request) };
            let live = self.listen(draft, step);
            let caller = Caller {
                lease: &self.lease,
                tenant: self.task.options.tenant.as_deref(),
                preferred: self.task.options.model.as_deref(),
                except: &refused_by,
                step,
                stop: &self.stop,
                listener: live.as_ref().map(|live| live as &dyn Listener),
                lost: &lost,
            };
            let began = Instant::now();
            let made = &*draft;
            let again = || match made.next() {
                Next::Call(call) => Some(call.request),
                Next::Search(_) | Next::Finished(_) | Next::Failed(_) => None,
            };
            let end = calls.call(&caller, request, &again).await;
            self.spent += Tokens(lost.swap(0, Ordering::Relaxed));
            self.rest = live.and_then(Live::end);
            self.observe("generate", began.elapsed());
            let answered = match end {
                CallEnd::Answered(answered) => answered,
                CallEnd::Denied(denial)
                    if denial.denied_by != DeniedBy::Run
                        && denial.requested > denial.limit
                        && denial.limit < available =>
                {
                    available = denial.limit;
                    too_large_for_any_day = Some(denial);
                    continue;
                }
                // Another count than ours (an earlier attempt's assumed tokens, a fleet limit): fit
                // into what the store says is left. It must shrink, or this would never end.
                CallEnd::Denied(Denial { denied_by: DeniedBy::Run, available: left, .. })
                    if left < available =>
                {
                    available = left;
                    continue;
                }
                // It fits the first model, but not one that was asked after it, whose tokens are counted
                // otherwise: once more, with room for each of them.
                CallEnd::Denied(Denial { denied_by: DeniedBy::Run, .. }) if !others.is_empty() => {
                    counted.append(&mut others);
                    continue;
                }
                CallEnd::Denied(denial @ Denial { denied_by: DeniedBy::Run, .. }) => {
                    draft.cannot_call(
                        "run_budget_exhausted",
                        &format!(
                            "The run's limit of {} tokens leaves {}. Raise TOKEN_BUDGET_PER_RUN, or ask for less.",
                            denial.limit, denial.available
                        ),
                    );
                    return Ok(None);
                }
                // Nothing was billed: a smaller call, until one fits or none is left.
                CallEnd::Failed { error, .. } if error.code() == "context_length_exceeded" => {
                    available = Tokens(asked.min(available).0 * 3 / 4);
                    self.readable = available;
                    self.fallbacks.push(format!("{error}; tried again with at most {available} tokens"));
                    too_large_for_the_model = Some(error);
                    continue;
                }
                end => {
                    if matches!(end, CallEnd::Failed { throttled: true, .. }) {
                        permit.throttled();
                    }
                    return Err(end);
                }
            };
            if answered.throttled {
                permit.throttled();
            } else {
                permit.succeeded();
            }
            // Closed never: the context owns it.
            self.desk = Arc::clone(&self.context.desk).acquire_owned().await.ok();
            return Ok(Some(self.take(draft, step, sent, answered)));
        }
    }

    /// Tells what the next call writes, where the request asks for it.
    fn listen(&self, draft: &Draft, step: &str) -> Option<Live> {
        if !self.task.options.stream {
            return None;
        }
        let speaker = Speaker {
            task_id: self.task.task_id,
            run_attempt: self.lease.attempt,
            step: step.to_owned(),
            kind: draft.kind(),
            trace: self.trace,
        };
        Live::start(self.context, speaker, &self.chunks)
    }

    /// Feeds an answer to the draft and packs what must be stored of it.
    fn take(&mut self, draft: &mut Draft, step: &str, sent: Sent, answered: Answered) -> Unsettled {
        let Answered { answer, model, settlement, usage, fallbacks, waited, .. } = answered;
        self.waited += waited;
        self.spent += usage.total();
        draft.billed(&sent.parts, &model, usage, matches!(settlement.closing, Closing::Assumed));
        self.token_use = draft.token_use();
        self.fallbacks.extend(fallbacks);
        if !self.has_others(draft, &model) {
            draft.answered(&answer);
        } else if draft.refused(&model, &answer) || draft.answered_by(&model, &answer) {
            tracing::warn!(task_id = %self.task.task_id, model, error_code = "model_given_up", "asking the next model");
            self.fallbacks.extend(draft.refusals().last());
        }
        self.model = Some(model);
        let checkpoint =
            Checkpoint { step: step.to_owned(), input_hash: sent.hash, output: ENDED.clone(), usage };
        Unsettled { settlement, checkpoint }
    }

    /// True while the chain has a model that did not refuse, besides this one.
    fn has_others(&self, draft: &Draft, model: &str) -> bool {
        let mut except = draft.refused_by();
        except.push(model.to_owned());
        let preferred = self.task.options.model.as_deref();
        self.context.calls.as_ref().is_some_and(|calls| !calls.models(preferred, &except).is_empty())
    }

    /// Books a finished call and stores what it brought: it is never paid again.
    async fn settle(&self, unsettled: &Unsettled) -> Result<(), LedgerError> {
        let began = Instant::now();
        let result = resilient::store(&self.context.retry, || {
            self.context.store.settle_step(&self.lease, &unsettled.settlement, &unsettled.checkpoint)
        })
        .await;
        self.context
            .metrics
            .stage_seconds
            .with_label_values(&["settle"])
            .observe(began.elapsed().as_secs_f64());
        result
    }

    /// Makes the run done: the spec is final from here on.
    async fn finish(&mut self, finished: Finished, unsettled: Option<Unsettled>) -> Ending {
        let Finished { markdown, spec, metadata, .. } = finished;
        let invalid = metadata.get("citations_invalid").and_then(Value::as_u64).unwrap_or(0);
        self.context.metrics.citations_invalid.inc_by(invalid);
        let mut answer = Answer::to_task(&self.task, AnswerType::Spec, AnswerStatus::Done, markdown);
        answer.metadata.extend(metadata);
        answer.metadata.insert("kind_from".to_owned(), json!(Kind::chosen_by(&self.task)));
        // Plain data: it serialises.
        answer.extra.insert("spec".to_owned(), serde_json::to_value(spec).unwrap_or(Value::Null));
        let finish = Finish {
            status: FinalStatus::Done,
            model: self.model.clone(),
            error_code: None,
            error_message: None,
            ..self.ending(answer, unsettled)
        };
        self.seal(finish).await
    }

    /// Makes the run failed, with an answer that says why.
    async fn fail(&mut self, code: &str, message: &str, unsettled: Option<Unsettled>) -> Ending {
        let mut answer = Answer::to_task(&self.task, AnswerType::Error, AnswerStatus::Error, message);
        answer.metadata.insert("error_code".to_owned(), json!(code));
        let finish = Finish {
            status: FinalStatus::Failed,
            model: self.model.clone(),
            error_code: Some(code.to_owned()),
            error_message: Some(message.to_owned()),
            ..self.ending(answer, unsettled)
        };
        tracing::warn!(task_id = %self.task.task_id, error_code = code, message, "run failed");
        self.seal(finish).await
    }

    /// The store will never hold what this run brought: it fails, and what it was billed is booked.
    async fn unstorable(&mut self, error: &LedgerError, unsettled: Option<Unsettled>) -> Ending {
        let message = format!("The store cannot hold what this run brought: {error}");
        self.fail(UNSTORABLE, &message, unsettled).await
    }

    /// What done and failed have in common.
    fn ending(&self, mut answer: Answer, unsettled: Option<Unsettled>) -> Finish {
        answer.metadata.insert("tokens".to_owned(), json!(self.spent));
        answer.metadata.insert("attempt".to_owned(), json!(self.lease.attempt));
        if let Some(model) = &self.model {
            answer.metadata.insert("model".to_owned(), json!(model));
        }
        if !self.fallbacks.is_empty() {
            answer.metadata.insert("fallbacks".to_owned(), json!(self.fallbacks));
        }
        let answered = answer.metadata.remove("token_use").unwrap_or_else(|| self.token_use.clone());
        if let Some(token_use) = token_use(answered, self.spent) {
            answer.metadata.insert("token_use".to_owned(), token_use);
        }
        let mut timings = self.stages.clone();
        timings.insert("total".to_owned(), json!(millis(self.began.elapsed())));
        answer.metadata.insert("timings_ms".to_owned(), Value::Object(timings));
        let (settlement, checkpoint) =
            unsettled.map_or((None, None), |it| (Some(it.settlement), Some(it.checkpoint)));
        Finish {
            status: FinalStatus::Failed,
            attributes: attributes(&answer, self.trace),
            topic: self.task.options.reply_to.clone().unwrap_or_else(|| self.context.topic_out.clone()),
            // Plain data: it serialises.
            answer: Json::of(&answer).unwrap_or_else(|_| Value::Null.into()),
            model: None,
            error_code: None,
            error_message: None,
            settlement,
            checkpoint,
        }
    }

    /// Finish and publish.
    async fn seal(&mut self, finish: Finish) -> Ending {
        crash_point!("before_finish");
        let began = Instant::now();
        let stored = resilient::store(&self.context.retry, || {
            self.context.store.finish_run(self.lease.again(), &finish)
        })
        .await;
        self.desk = None;
        self.observe("finish", began.elapsed());
        let Published { outbox } = match stored {
            Ok(published) => published,
            Err(error) if error.is_unstorable() && finish.error_code.as_deref() != Some(UNSTORABLE) => {
                let unsettled = finish.settlement.zip(finish.checkpoint);
                let unsettled =
                    unsettled.map(|(settlement, checkpoint)| Unsettled { settlement, checkpoint });
                return Box::pin(self.unstorable(&error, unsettled)).await;
            }
            Err(error) => return self.lost(&error),
        };
        crash_point!("finished");
        let status = match finish.status {
            FinalStatus::Done => "done",
            FinalStatus::Failed => "failed",
        };
        if let Some(rest) = self.rest.take() {
            rest.sent().await;
        }
        self.publish(&outbox).await;
        let metrics = &self.context.metrics;
        metrics.run_seconds.with_label_values(&[status]).observe(self.began.elapsed().as_secs_f64());
        metrics.runs.with_label_values(&[status]).inc();
        Ending::Final
    }

    /// Sends the outbox row. What cannot be sent now stays there for the sweep.
    async fn publish(&mut self, row: &crate::store::OutboxRow) {
        let began = Instant::now();
        if let Err(error) = self.context.outbox.send(row).await {
            tracing::warn!(task_id = %row.task_id, error = %error, "the answer could not be sent; it stays in the outbox");
        }
        self.observe("publish", began.elapsed());
    }

    /// A limit of the day said no: the run waits in the store, and those after it wait there too.
    async fn defer(&mut self, denial: Denial) -> Ending {
        let whose = match denial.denied_by {
            DeniedBy::Tenant => "the tenant's",
            DeniedBy::Day | DeniedBy::Run => "the day's",
        };
        let message = format!(
            "Deferred: {} of {whose} {} tokens are left and {} are needed. Work resumes by itself{} or when the limit is raised.",
            denial.available,
            denial.limit,
            denial.requested,
            denial.resets_at.map(|at| format!(" at {at}")).unwrap_or_default(),
        );
        let mut answer = Answer::to_task(&self.task, AnswerType::Progress, AnswerStatus::Deferred, message);
        answer.metadata.insert("attempt".to_owned(), json!(self.lease.attempt));
        if let Some(at) = denial.resets_at {
            answer.metadata.insert("resumes_at".to_owned(), json!(at));
        }
        let attributes = attributes(&answer, self.trace);
        // A call that no day can fit says nothing about the others.
        if denial.denied_by == DeniedBy::Day && denial.requested <= denial.limit {
            self.context.gate.out_of_budget(denial.requested);
        }
        crash_point!("before_defer");
        let deferred = resilient::store(&self.context.retry, || {
            self.context.store.defer_run(
                self.lease.again(),
                denial.requested,
                &self.context.topic_out,
                &answer,
                &attributes,
            )
        })
        .await;
        match deferred {
            Ok(Published { outbox }) => {
                crash_point!("deferred");
                self.publish(&outbox).await;
                Ending::Deferred
            }
            Err(error) => self.lost(&error),
        }
    }

    /// Somebody said stop.
    async fn stopped(&mut self, reason: StopReason, deferrals: u32) -> Ending {
        match reason {
            StopReason::Fenced => Ending::Fenced,
            StopReason::Cancelled => self.fail("cancelled", "The request was cancelled.", None).await,
            StopReason::Deadline => {
                self.fail("deadline_exceeded", "metadata.deadline has passed.", None).await
            }
            StopReason::TimedOut => {
                let error = UpstreamError::transient(
                    Dependency::Model,
                    format!(
                        "the attempt took longer than RUN_TIMEOUT_SECONDS ({} s)",
                        self.context.config.worker.run_timeout.as_secs()
                    ),
                );
                self.try_later(&error, deferrals).await
            }
            StopReason::Drained => release(self.context, &self.lease, Duration::ZERO, Ending::Drained).await,
        }
    }

    /// A transient failure that retries did not cure: the run waits in the store for another try, or
    /// fails for good when it alone keeps failing. While a circuit is open it is not the run's fault.
    async fn try_later(&mut self, error: &UpstreamError, deferrals: u32) -> Ending {
        let failures = self.failures(deferrals);
        let outage = self.context.outage();
        if failures >= self.context.config.worker.max_run_attempts && !outage {
            return self
                .fail(
                    error.code(),
                    &format!("Given up after {failures} attempts. The last one: {error}"),
                    None,
                )
                .await;
        }
        let doubled =
            RETRY_FIRST.saturating_mul(1_u32.checked_shl(failures.saturating_sub(1)).unwrap_or(u32::MAX));
        let asked = match error {
            UpstreamError::Transient { retry_after, .. } => retry_after.unwrap_or_default(),
            _ => Duration::ZERO,
        };
        let retry_in = doubled.min(RETRY_LONGEST).max(asked);
        tracing::warn!(
            task_id = %self.task.task_id, error = %error, error_code = error.code(), retry_in_s = retry_in.as_secs(),
            "run put back"
        );
        self.progress("waiting", 0, &format!("{error}. Trying again in {} s.", retry_in.as_secs()));
        self.release(retry_in).await
    }

    async fn release(&self, retry_in: Duration) -> Ending {
        release(self.context, &self.lease, retry_in, Ending::Released).await
    }

    /// The store failed or fenced us off: nothing more can be written.
    fn lost(&self, error: &LedgerError) -> Ending {
        match error {
            LedgerError::Fenced { .. } => Ending::Fenced,
            LedgerError::Upstream(error) => {
                tracing::error!(
                    task_id = %self.task.task_id, error = %error, error_code = error.code(),
                    "the store does not answer; the lease will expire and the run will be taken up again"
                );
                Ending::StoreLost
            }
        }
    }

    /// Attempts so far that were not deferrals, this one included.
    fn failures(&self, deferrals: u32) -> u32 {
        self.lease.attempt.saturating_sub(deferrals)
    }

    fn observe(&mut self, stage: &str, elapsed: Duration) {
        self.context.metrics.stage_seconds.with_label_values(&[stage]).observe(elapsed.as_secs_f64());
        let before = self.stages.get(stage).and_then(Value::as_u64).unwrap_or(0);
        self.stages.insert(stage.to_owned(), json!(before + millis(elapsed)));
    }

    /// Tells whoever watches. Best effort: a lost progress message loses nothing.
    fn progress(&self, stage: &str, percent: u32, message: &str) {
        self.context.publish_soon(self.stage(stage, percent, message), self.trace);
    }

    /// Tells that the model asked for a search, the `number`th.
    fn searches(&self, percent: u32, number: u32, query: &str) {
        let mut answer = self.stage("searching", percent, &format!("Searching for {query:?}."));
        answer.metadata.insert("searches".to_owned(), json!(number));
        self.context.publish_soon(answer, self.trace);
    }

    fn stage(&self, stage: &str, percent: u32, message: &str) -> Answer {
        let mut answer = Answer::to_task(&self.task, AnswerType::Progress, AnswerStatus::InProgress, message);
        answer.metadata.insert("stage".to_owned(), json!(stage));
        answer.metadata.insert("percent".to_owned(), json!(percent));
        if let Some(kind) = self.kind {
            answer.metadata.insert("kind".to_owned(), json!(kind));
            answer.metadata.insert("kind_from".to_owned(), json!(Kind::chosen_by(&self.task)));
        }
        answer.metadata.insert("attempt".to_owned(), json!(self.lease.attempt));
        answer
    }
}

/// Where a run's tokens went, so that it adds up to what it `spent`: what the `answered` calls billed, and
/// what was booked for calls that brought no answer.
fn token_use(mut answered: Value, spent: Tokens) -> Option<Value> {
    if spent == Tokens(0) {
        return None;
    }
    let tokens =
        |call: &Value| ["prompt", "completion", "tokens"].map(|name| call[name].as_u64().unwrap_or(0));
    let calls = answered["calls"].as_array();
    let billed: u64 = calls.into_iter().flatten().flat_map(tokens).sum();
    if answered.is_null() {
        answered = json!({"calls": [], "prompt": {}});
    }
    let lost = spent.saturating_sub(Tokens(billed));
    if lost > Tokens(0) {
        answered["lost"] = json!(lost);
    }
    Some(answered)
}

/// Why passages did not come.
enum Interrupted {
    Stop(StopReason),
    /// There will be no document.
    Failed(Failure),
    Upstream(UpstreamError),
}

/// Goes on from the last finished call, if there is one.
fn restore(task: &Task, steps: Vec<Checkpoint>) -> Option<Draft> {
    let last = steps.into_iter().next_back()?;
    match Draft::restore(last.output.text()) {
        Ok(draft) => Some(draft),
        Err(error) => {
            // Another version's checkpoint: the tokens are booked, the work is done again.
            tracing::error!(task_id = %task.task_id, step = last.step, error = %error, error_code = "checkpoint_unreadable", "starting afresh");
            None
        }
    }
}

/// Gives the run back.
async fn release(context: &Context, lease: &Lease, retry_in: Duration, ending: Ending) -> Ending {
    crash_point!("before_release");
    let released =
        resilient::store(&context.retry, || context.store.release_run(lease.again(), retry_in)).await;
    crash_point!("released");
    match released {
        Ok(()) => ending,
        Err(LedgerError::Fenced { .. }) => Ending::Fenced,
        Err(LedgerError::Upstream(error)) => {
            tracing::error!(task_id = %lease.task_id, error = %error, "the run could not be given back; its lease will expire");
            Ending::StoreLost
        }
    }
}

/// Keeps the lease while the run lives, and says stop when it must not go on. Ends when dropped.
fn watch(
    context: &Context,
    lease: &Lease,
    task: &Task,
    stop: &Stop,
    kill: &CancellationToken,
) -> AbortOnDropHandle<()> {
    let store = Arc::clone(&context.store);
    let duration = context.config.worker.lease;
    let timeout = context.config.worker.run_timeout;
    let until_deadline = task.options.deadline.map(|deadline| {
        // A deadline is the publisher's clock against ours: seconds matter, not more.
        Duration::try_from(deadline.duration_since(jiff::Timestamp::now())).unwrap_or_default()
    });
    let (lease, stop, kill) = (lease.again(), stop.clone(), kill.clone());
    AbortOnDropHandle::new(tokio::spawn(async move {
        let renewals = async {
            loop {
                tokio::time::sleep(duration / 3).await;
                match store.renew_lease(&lease, duration).await {
                    Ok(renewal) if !renewal.held => return StopReason::Fenced,
                    Ok(renewal) if renewal.cancel_requested => return StopReason::Cancelled,
                    Ok(_) => {}
                    Err(LedgerError::Fenced { .. }) => return StopReason::Fenced,
                    // Not renewed is not lost: whoever takes it fences us off.
                    Err(LedgerError::Upstream(error)) => {
                        tracing::warn!(task_id = %lease.task_id, error = %error, "lease not renewed");
                    }
                }
            }
        };
        let deadline = async {
            match until_deadline {
                Some(left) => tokio::time::sleep(left).await,
                None => std::future::pending().await,
            }
        };
        let reason = tokio::select! {
            reason = renewals => reason,
            () = deadline => StopReason::Deadline,
            () = tokio::time::sleep(timeout) => StopReason::TimedOut,
            () = kill.cancelled() => StopReason::Drained,
        };
        stop.stop(reason);
    }))
}

fn hash(request: &ChatRequest) -> String {
    // Plain data: it serialises; an empty hash would only be less useful to a reader.
    let said = (&request.messages, &request.tools, request.max_completion_tokens);
    let mut text = serde_json::to_string(&said).unwrap_or_default();
    if let ResponseFormat::JsonSchema { schema, .. } = &request.response_format {
        text.push_str(schema.text());
    }
    atlas_shared::gateway_api::content_hash(&text)
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
