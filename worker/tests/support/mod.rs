//! A whole worker on the embedded store and queue, a real HTTP gateway of given passages, and the
//! simulator of the model API.

#![allow(dead_code, reason = "each test file uses a part of it")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod gateway;

use std::sync::Arc;

use atlas_openai_sim::{RunningSim, Sim, SimOptions};
use atlas_shared::{
    Config, Env, TaskId, Tokens,
    config::Process,
    message::{Answer, AnswerType},
};
use atlas_worker::{
    RunningWorker, Worker,
    queue::{self, Queues},
    store::{self, RunDetail, RunStatus, RunStore},
};
use serde_json::{Value, json};

pub(crate) use gateway::{Search, bounded};
use gateway::{gateway, two_passages};

/// One folder, one gateway, one simulator.
pub(crate) struct Stack {
    _dir: tempfile::TempDir,
    env: Env,
    pub(crate) sim: RunningSim,
}

impl Stack {
    /// With the simulator as the model API and two passages for every question.
    pub(crate) async fn start() -> Self {
        Self::with_search(Arc::new(two_passages)).await
    }

    /// With these passages.
    pub(crate) async fn with_search(search: Search) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let gateway = gateway(search).await;
        let sim = Sim::start(SimOptions::default()).await.unwrap();
        let env = Env::default()
            .with("ATLAS_DATA_DIR", dir.path().display().to_string())
            .with("WORKER_LISTEN", "127.0.0.1:0")
            .with("RAG_URL", format!("http://{gateway}"))
            .with("OPENAI_BASE_URL", sim.base_url())
            .with("OPENAI_API_KEY", "sk-test-key")
            .with("SWEEP_INTERVAL_SECONDS", "1")
            .with("RETRY_BASE_MILLISECONDS", "1")
            .with("CIRCUIT_OPEN_SECONDS", "1")
            .with("STREAM_INTERVAL_MILLISECONDS", "20")
            .with("LOG_LEVEL", "warn");
        Self { _dir: dir, env, sim }
    }

    pub(crate) fn with(mut self, name: &str, value: &str) -> Self {
        self.env = self.env.with(name, value);
        self
    }

    /// The simulator's next answers.
    pub(crate) fn script(self, steps: Value) -> Self {
        self.sim.script(steps).unwrap();
        self
    }

    pub(crate) fn config(&self) -> Config {
        Config::load(&self.env, Process::Worker).unwrap()
    }

    pub(crate) async fn worker(&self) -> RunningWorker {
        Worker::start(&self.config()).await.unwrap()
    }

    pub(crate) async fn store(&self) -> Arc<dyn RunStore> {
        store::open(&self.config()).await.unwrap()
    }

    async fn queues(&self) -> Queues {
        queue::open(&self.config()).await.unwrap()
    }

    /// Publishes a message as it is.
    pub(crate) async fn publish(&self, message: &Value) {
        let publisher = self.queues().await.publisher;
        publisher.publish("architect_in", message.to_string().into(), Vec::new()).await.unwrap();
    }

    /// Publishes a request and gives every message about it, the last one last.
    pub(crate) async fn messages(&self, content: &str, metadata: Value) -> Vec<Answer> {
        self.messages_about(TaskId::random(), content, metadata).await
    }

    /// The same for a task with this id: the fence in its prompt comes from it, and so do its tokens.
    pub(crate) async fn messages_about(&self, task: TaskId, content: &str, metadata: Value) -> Vec<Answer> {
        let config = self.config();
        let mut answers = queue::watch_answers(&config, task).await.unwrap();
        let message = json!({"task_id": task, "role": "architect", "msg_type": "chat", "content": content, "metadata": metadata});
        let publisher = self.queues().await.publisher;
        publisher.publish("architect_in", message.to_string().into(), Vec::new()).await.unwrap();
        bounded("the last answer", async {
            let mut all = Vec::new();
            loop {
                let answer = answers.next().await.unwrap();
                let last = matches!(answer.msg_type, AnswerType::Spec | AnswerType::Error);
                all.push(answer);
                if last {
                    return all;
                }
            }
        })
        .await
    }

    /// Publishes a request and waits for its last answer.
    pub(crate) async fn ask(&self, content: &str, metadata: Value) -> Answer {
        self.messages(content, metadata).await.pop().unwrap()
    }

    pub(crate) async fn run(&self, task: TaskId) -> RunDetail {
        self.store().await.get_run(task).await.unwrap().unwrap()
    }

    /// What the ledger says was used today, and what the simulator billed. Nothing may be open.
    pub(crate) async fn books(&self) -> (u64, u64) {
        let budget = self.store().await.budget(self.config().limits).await.unwrap();
        assert_eq!(budget.reserved, Tokens(0), "nothing may be left open");
        (budget.used.0, self.sim.meter().total_tokens())
    }

    /// The run is final in the store, as it was answered.
    pub(crate) async fn assert_final(&self, answer: &Answer) {
        let detail = self.run(answer.task_id).await;
        let wanted = match answer.msg_type {
            AnswerType::Spec => RunStatus::Done,
            _ => RunStatus::Failed,
        };
        assert_eq!(detail.run.status, wanted, "{answer:?}");
    }
}
