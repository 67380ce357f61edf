//! What a client of Atlas sees: every message on `architect_out`, read through a subscription of its own.

use std::{
    collections::{BTreeMap, HashMap},
    hash::{DefaultHasher, Hash as _, Hasher},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::ensure;
use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use serde_json::{Value, json};
use tokio::task::JoinHandle;
use uuid::Uuid;

/// What came.
#[derive(Clone, Debug, Default)]
pub(super) struct Answers {
    /// Final answers, by task.
    pub(super) finals: HashMap<Uuid, Final>,
    /// Messages by `msg_type/status`.
    pub(super) kinds: BTreeMap<String, u64>,
    /// What could not be read, which must be nothing.
    pub(super) unreadable: Vec<String>,
}

/// The final answers of one task.
#[derive(Clone, Debug)]
pub(super) struct Final {
    /// `spec` or `error`.
    pub(super) kind: String,
    /// Of the first copy.
    pub(super) hash: u64,
    pub(super) copies: u64,
    /// Copies that say something else.
    pub(super) different: u64,
}

/// Reads until it is dropped.
#[derive(Debug)]
pub(super) struct Consumer {
    answers: Arc<Mutex<Answers>>,
    reading: JoinHandle<()>,
}

impl Consumer {
    /// Creates the subscription `url` on `topic` and reads it.
    pub(super) async fn start(url: String, topic: &str) -> anyhow::Result<Self> {
        let http = reqwest::Client::new();
        let created = http.put(&url).json(&json!({"topic": topic, "ackDeadlineSeconds": 60})).send().await?;
        ensure!(created.status().is_success(), "{url}: {}", created.text().await?);
        let answers = Arc::new(Mutex::new(Answers::default()));
        let reading = tokio::spawn(read(http, url, Arc::clone(&answers)));
        Ok(Self { answers, reading })
    }

    pub(super) fn answers(&self) -> MutexGuard<'_, Answers> {
        lock(&self.answers)
    }
}

impl Drop for Consumer {
    fn drop(&mut self) {
        self.reading.abort();
    }
}

fn lock(answers: &Mutex<Answers>) -> MutexGuard<'_, Answers> {
    answers.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn read(http: reqwest::Client, url: String, answers: Arc<Mutex<Answers>>) {
    loop {
        match pull(&http, &url, &answers).await {
            Ok(0) | Err(_) => tokio::time::sleep(Duration::from_millis(200)).await,
            Ok(_) => {}
        }
    }
}

/// One pull; returns how many came. An ack that fails means that they come again, as copies.
async fn pull(http: &reqwest::Client, url: &str, answers: &Mutex<Answers>) -> anyhow::Result<usize> {
    let pulled: Value = http
        .post(format!("{url}:pull"))
        .json(&json!({"maxMessages": 200, "returnImmediately": true}))
        .timeout(Duration::from_secs(30))
        .send()
        .await?
        .error_for_status()?
        .json()
        .await?;
    let Some(received) = pulled["receivedMessages"].as_array().filter(|received| !received.is_empty()) else {
        return Ok(0);
    };
    {
        let mut answers = lock(answers);
        for message in received {
            answers.take(&message["message"]);
        }
    }
    let acks: Vec<&Value> = received.iter().map(|message| &message["ackId"]).collect();
    http.post(format!("{url}:acknowledge"))
        .json(&json!({"ackIds": acks}))
        .send()
        .await?
        .error_for_status()?;
    Ok(received.len())
}

impl Answers {
    fn take(&mut self, message: &Value) {
        let read = message["data"]
            .as_str()
            .and_then(|data| BASE64.decode(data).ok())
            .and_then(|data| serde_json::from_slice::<Value>(&data).ok());
        let (Some(answer), Some(task)) =
            (&read, read.as_ref().and_then(|answer| answer["task_id"].as_str()?.parse::<Uuid>().ok()))
        else {
            self.unreadable.push(message.to_string().chars().take(200).collect());
            return;
        };
        let kind = answer["msg_type"].as_str().unwrap_or("none").to_owned();
        let status = answer["metadata"]["status"].as_str().unwrap_or("none");
        *self.kinds.entry(format!("{kind}/{status}")).or_insert(0) += 1;
        if kind != "spec" && kind != "error" {
            return;
        }
        let hash = hash(answer);
        let seen = self.finals.entry(task).or_insert(Final { kind, hash, copies: 0, different: 0 });
        seen.copies += 1;
        if seen.hash != hash {
            seen.different += 1;
        }
    }
}

/// Of what a JSON value says, whatever the order of its fields.
pub(super) fn hash(value: &Value) -> u64 {
    fn feed(value: &Value, hasher: &mut DefaultHasher) {
        match value {
            Value::Object(fields) => {
                let mut names: Vec<&String> = fields.keys().collect();
                names.sort_unstable();
                for name in names {
                    name.hash(hasher);
                    feed(&fields[name], hasher);
                }
            }
            Value::Array(items) => items.iter().for_each(|item| feed(item, hasher)),
            other => other.to_string().hash(hasher),
        }
    }
    let mut hasher = DefaultHasher::new();
    feed(value, &mut hasher);
    hasher.finish()
}
