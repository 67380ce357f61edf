//! Text while it is written: what the model says, as messages on the topic of answers, for a request
//! whose sender watches (`metadata.stream: true`).
//!
//! A courtesy, bounded in every way: so many messages a run (`STREAM_CHUNKS`), so large, so often
//! (`STREAM_INTERVAL_MILLISECONDS`), one at a time. A message that cannot be sent is dropped. Nothing
//! here can slow down, fail or bill a run.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use atlas_shared::{
    TaskId,
    message::{Answer, AnswerStatus, AnswerType},
    model::Listener,
    trace_context::TraceParent,
};
use serde_json::{Map, json};
use tokio::{sync::Notify, task::JoinHandle};

use crate::{
    agent::{Kind, Sketch},
    context::Context,
};

/// Text of one message.
const MAX_CHUNK_BYTES: usize = 8 << 10;
/// How long a finished answer waits for the last of its text to be sent before it.
const PATIENCE: Duration = Duration::from_millis(500);

/// Tells what one model call writes, until it is dropped.
pub(crate) struct Live {
    heard: Arc<Heard>,
    task: Option<JoinHandle<()>>,
}

/// Text of a finished call that may still be on its way.
pub(crate) struct Rest(JoinHandle<()>);

impl Rest {
    /// Waits until it is sent, not long: it is of no use after the answer that counts.
    pub(crate) async fn sent(self) {
        let _ = tokio::time::timeout(PATIENCE, self.0).await;
    }
}

/// What was heard and not told yet.
struct Heard {
    state: Mutex<State>,
    /// Woken when the call has ended.
    ended: Notify,
}

struct State {
    kind: Kind,
    sketch: Sketch,
    /// Which attempt of the call speaks, counted from 1.
    attempt: u32,
    ended: bool,
}

/// Whose text it is.
pub(crate) struct Speaker {
    /// The task.
    pub(crate) task_id: TaskId,
    /// The run's attempt.
    pub(crate) run_attempt: u32,
    /// Step name of the call: a reader starts anew when it changes.
    pub(crate) step: String,
    /// What kind of document.
    pub(crate) kind: Kind,
    /// Trace of the run.
    pub(crate) trace: TraceParent,
}

impl Live {
    /// Starts telling. `left` counts down the messages that the run may still send. `None`: none, or
    /// too much is under way already.
    pub(crate) fn start(context: &Arc<Context>, speaker: Speaker, left: &Arc<AtomicU32>) -> Option<Self> {
        if left.load(Ordering::Relaxed) == 0 {
            return None;
        }
        let permit = Arc::clone(&context.progress).try_acquire_owned().ok()?;
        let heard = Arc::new(Heard {
            state: Mutex::new(State {
                kind: speaker.kind,
                sketch: Sketch::new(speaker.kind),
                attempt: 0,
                ended: false,
            }),
            ended: Notify::new(),
        });
        let (context, left, told) = (Arc::clone(context), Arc::clone(left), Arc::clone(&heard));
        let task = tokio::spawn(async move {
            tell(&context, &speaker, &told, &left).await;
            drop(permit);
        });
        Some(Self { heard, task: Some(task) })
    }

    /// The call has ended.
    pub(crate) fn end(mut self) -> Option<Rest> {
        self.task.take().map(Rest)
    }
}

impl Heard {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Listener for Live {
    fn begins(&self) {
        let mut state = self.heard.state();
        state.attempt += 1;
        state.sketch = Sketch::new(state.kind);
    }

    fn wrote(&self, piece: &str) {
        self.heard.state().sketch.push(piece);
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        self.heard.state().ended = true;
        self.heard.ended.notify_one();
    }
}

/// Publishes what is heard until the call has ended and all is told, or the run's messages are used up.
async fn tell(context: &Arc<Context>, speaker: &Speaker, heard: &Heard, left: &AtomicU32) {
    let interval = context.config.worker.stream_interval;
    let (mut call, mut part) = (0, 0_u32);
    loop {
        tokio::select! {
            () = tokio::time::sleep(interval) => {}
            () = heard.ended.notified() => {}
        }
        let (text, attempt, ended) = {
            let mut state = heard.state();
            let text = state.sketch.take(MAX_CHUNK_BYTES);
            (text, state.attempt, state.ended)
        };
        if text.is_empty() {
            if ended {
                return;
            }
            continue;
        }
        if ended {
            // What is left follows at once.
            heard.ended.notify_one();
        }
        if left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_err() {
            return;
        }
        if attempt != call {
            (call, part) = (attempt, 0);
        }
        let answer = message(speaker, &text, call, part);
        part += 1;
        if let Err(error) = context.publish(&answer, speaker.trace).await {
            tracing::debug!(task_id = %speaker.task_id, error = %error, "text was not published");
        }
    }
}

/// Small on purpose: the request's metadata comes with the answer that counts.
fn message(speaker: &Speaker, text: &str, call: u32, part: u32) -> Answer {
    let mut answer =
        Answer::bare(speaker.task_id, AnswerType::Progress, AnswerStatus::InProgress, text, Map::new());
    answer.metadata.insert("stage".to_owned(), json!("text"));
    answer.metadata.insert("attempt".to_owned(), json!(speaker.run_attempt));
    answer.metadata.insert("stream".to_owned(), json!({"step": speaker.step, "call": call, "part": part}));
    answer
}
