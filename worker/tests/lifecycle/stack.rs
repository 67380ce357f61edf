//! What the tests of this binary share: one folder with the embedded store and queue, a gateway of canned
//! passages, the simulator of the model API, and the books to look into at the end.

use std::{collections::BTreeMap, future::Future, sync::Arc, time::Duration};

use atlas_openai_sim::{RunningSim, Sim, SimOptions};
use atlas_shared::{
    Config, Env, TaskId, Tokens, UpstreamError, WorkerId,
    config::Process,
    message::{Answer, AnswerType},
    sqlite::Database,
};
use atlas_worker::{
    RunningWorker, Worker,
    queue::{self, Queues},
    store::{self, Claim, ClaimRequest, Lease, RunDetail, RunStatus, RunStore},
};
use bytes::Bytes;
use serde_json::{Value, json};
use uuid::Uuid;

pub(crate) use crate::gateway::{BOUND, bounded, serve};
use crate::gateway::{gateway, two_passages};

/// One folder, one gateway, and optionally a simulator: all that workers of one test share.
pub(crate) struct Stack {
    pub(crate) dir: tempfile::TempDir,
    /// Settings of every worker.
    pub(crate) settings: BTreeMap<String, String>,
    pub(crate) sim: Option<RunningSim>,
    /// The file, and the clock of this process's workers.
    pub(crate) db: Database,
}

impl Stack {
    /// Without a model: the offline drafter writes.
    pub(crate) async fn offline() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let db = Database::open(dir.path()).await.unwrap();
        let stack = Self { dir, settings: BTreeMap::new(), sim: None, db };
        let (folder, gateway) =
            (stack.dir.path().display().to_string(), gateway(Arc::new(two_passages)).await);
        stack
            .with("ATLAS_DATA_DIR", &folder)
            .with("WORKER_LISTEN", "127.0.0.1:0")
            .with("RAG_URL", &format!("http://{gateway}"))
            .with("SWEEP_INTERVAL_SECONDS", "1")
            .with("RETRY_BASE_MILLISECONDS", "1")
            .with("CIRCUIT_OPEN_SECONDS", "1")
            .with("LOG_LEVEL", "warn")
    }

    /// With the simulator as the model API.
    pub(crate) async fn simulated() -> Self {
        Self::simulated_by(SimOptions::default()).await
    }

    pub(crate) async fn simulated_by(options: SimOptions) -> Self {
        let sim = Sim::start(options).await.unwrap();
        let mut stack = Self::offline()
            .await
            .with("OPENAI_BASE_URL", &sim.base_url())
            .with("OPENAI_API_KEY", "sk-test-key");
        stack.sim = Some(sim);
        stack
    }

    pub(crate) fn with(mut self, name: &str, value: &str) -> Self {
        self.settings.insert(name.to_owned(), value.to_owned());
        self
    }

    pub(crate) fn config(&self) -> Config {
        let env = self.settings.iter().fold(Env::default(), |env, (name, value)| env.with(name, value));
        Config::load(&env, Process::Worker).unwrap()
    }

    pub(crate) async fn worker(&self) -> RunningWorker {
        Worker::start(&self.config()).await.unwrap()
    }

    pub(crate) async fn store(&self) -> std::sync::Arc<dyn RunStore> {
        store::open(&self.config()).await.unwrap()
    }

    pub(crate) async fn queues(&self) -> Queues {
        queue::open(&self.config()).await.unwrap()
    }

    pub(crate) async fn publish(&self, message: impl Into<Bytes>) {
        self.queues().await.publisher.publish("architect_in", message.into(), Vec::new()).await.unwrap();
    }

    /// Publishes a request and waits for its last answer.
    pub(crate) async fn ask(&self, content: &str, metadata: Value) -> Answer {
        let task = TaskId::random();
        self.ask_as(task, &request(task, content, metadata)).await
    }

    pub(crate) async fn ask_as(&self, task: TaskId, message: &Value) -> Answer {
        let config = self.config();
        let mut answers = queue::watch_answers(&config, task).await.unwrap();
        self.publish(message.to_string()).await;
        bounded("an answer", async {
            loop {
                let answer = answers.next().await.unwrap();
                if matches!(answer.msg_type, AnswerType::Spec | AnswerType::Error | AnswerType::Control) {
                    return answer;
                }
            }
        })
        .await
    }

    pub(crate) async fn run(&self, task: TaskId) -> Option<RunDetail> {
        self.store().await.get_run(task).await.unwrap()
    }

    /// Waits until the run is in this state.
    pub(crate) async fn until(&self, task: TaskId, status: RunStatus) -> RunDetail {
        let store = self.store().await;
        eventually(&format!("run {task} is {}", status.as_str()), || async {
            store.get_run(task).await.unwrap().filter(|detail| detail.run.status == status)
        })
        .await
    }

    /// What the ledger says was used today, and what the simulator billed.
    pub(crate) async fn books(&self) -> (u64, u64) {
        let budget = self.store().await.budget(self.config().limits).await.unwrap();
        assert_eq!(budget.reserved, Tokens(0), "nothing may be left open");
        (budget.used.0, self.sim.as_ref().unwrap().meter().total_tokens())
    }
    pub(crate) fn sim(&self) -> &RunningSim {
        self.sim.as_ref().unwrap()
    }

    /// A run that a worker claimed once, with a lease of `lease`.
    pub(crate) async fn claimed(&self, task: TaskId, lease: Duration) -> Lease {
        let claim = ClaimRequest {
            task_id: task,
            claim_id: Uuid::now_v7(),
            message: request(task, "Design the event bus", json!({})),
            tenant: None,
            requester: None,
            worker: WorkerId("dead".to_owned()),
            lease,
        };
        match self.store().await.claim_run(&claim).await.unwrap() {
            Claim::Claimed(run) => run.lease,
            other => panic!("not claimed: {other:?}"),
        }
    }

    /// One number from the file.
    pub(crate) async fn count(&self, sql: &str) -> u64 {
        let sql = sql.to_owned();
        let counted: Result<i64, UpstreamError> =
            self.db.read(move |tx, _| Ok(tx.query_row(&sql, [], |row| row.get(0))?)).await;
        u64::try_from(counted.unwrap()).unwrap()
    }

    /// Changes the file behind everybody's back.
    pub(crate) async fn execute(&self, sql: &str) {
        let sql = sql.to_owned();
        let done: Result<(), UpstreamError> = self.db.write(move |tx, _| Ok(tx.execute_batch(&sql)?)).await;
        done.unwrap();
    }

    /// Messages of a task on `architect_out`, oldest first.
    pub(crate) async fn published(&self, task: TaskId) -> Vec<Value> {
        let messages: Result<Vec<Vec<u8>>, UpstreamError> = self
            .db
            .read(move |tx, _| {
                let mut statement = tx.prepare(
                    "SELECT data FROM queue_messages WHERE topic = 'architect_out' AND task_id = ?1 ORDER BY id",
                )?;
                let rows = statement.query_map([task.to_string()], |row| row.get(0))?;
                Ok(rows.collect::<Result<_, _>>()?)
            })
            .await;
        messages.unwrap().iter().map(|data| serde_json::from_slice(data).unwrap()).collect()
    }

    /// What is published of a task's end: not its progress.
    pub(crate) async fn answers(&self, task: TaskId) -> Vec<Value> {
        let mut messages = self.published(task).await;
        messages.retain(|message| message["msg_type"] != "progress");
        messages
    }

    /// Waits until nothing is left to do: every delivery ended, every run final, every answer sent.
    pub(crate) async fn until_rest(&self) {
        eventually("rest", || async {
            let left = self
                .count(
                    "SELECT (SELECT count(*) FROM queue_deliveries)
                          + (SELECT count(*) FROM runs WHERE ended_at IS NULL)
                          + (SELECT count(*) FROM outbox WHERE sent_at IS NULL)",
                )
                .await;
            (left == 0).then_some(())
        })
        .await;
    }

    /// The books at rest, after checking all that must hold in them whatever happened: nothing open, the
    /// accounts are the sums of the ledger, and the ledger covers what the simulator billed.
    pub(crate) async fn reconciled(&self) -> Reconciled {
        assert_eq!(self.count("SELECT count(*) FROM token_ledger WHERE state = 'reserved'").await, 0);
        let differing = self
            .count(
                "SELECT count(*) FROM token_days AS d WHERE reserved <> 0 OR used <> (
                     SELECT coalesce(sum(actual), 0) FROM token_ledger AS l
                      WHERE l.day = d.day AND (d.scope = 'global' OR l.scope = d.scope))",
            )
            .await;
        assert_eq!(differing, 0, "an account is not the sum of its ledger");
        let ledger = self.count("SELECT coalesce(sum(actual), 0) FROM token_ledger").await;
        let accounts =
            self.count("SELECT coalesce(sum(used), 0) FROM token_days WHERE scope = 'global'").await;
        assert_eq!(ledger, accounts, "booked without an account");
        let billed = self.sim.as_ref().map_or(0, |sim| sim.meter().total_tokens());
        assert!(billed <= ledger, "the ledger says less ({ledger}) than was billed ({billed})");
        let unanswered = self
            .count(
                "SELECT count(*) FROM runs AS r WHERE ended_at IS NOT NULL
                    AND (SELECT count(*) FROM architect_out WHERE id = r.task_id) <> 1",
            )
            .await;
        assert_eq!(unanswered, 0, "a final run without its one result row");
        assert_eq!(
            self.count("SELECT count(*) FROM architect_out").await,
            self.count("SELECT count(*) FROM runs WHERE ended_at IS NOT NULL").await,
            "a result row without a final run"
        );
        Reconciled {
            ledger,
            billed,
            assumed: self.count("SELECT count(*) FROM token_ledger WHERE state = 'assumed'").await,
        }
    }
}

/// Books that agree.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reconciled {
    /// Tokens in the ledger.
    pub(crate) ledger: u64,
    /// Tokens that the simulator billed.
    pub(crate) billed: u64,
    /// Calls whose cost nobody could know.
    pub(crate) assumed: u64,
}

pub(crate) fn request(task: TaskId, content: &str, metadata: Value) -> Value {
    json!({"task_id": task, "role": "architect", "msg_type": "chat", "content": content, "metadata": metadata})
}

pub(crate) fn command(content: Value) -> (TaskId, Value) {
    let task = TaskId::random();
    (task, json!({"task_id": task, "role": "architect", "msg_type": "control", "content": content}))
}

/// Looks until there is something to see.
pub(crate) async fn eventually<T, F, Fut>(what: &str, mut look: F) -> T
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Option<T>>,
{
    bounded(what, async {
        let mut ticks = tokio::time::interval(Duration::from_millis(20));
        loop {
            ticks.tick().await;
            if let Some(seen) = look().await {
                return seen;
            }
        }
    })
    .await
}
