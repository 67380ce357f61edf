//! The message contract (DESIGN section 4): what comes in, what goes out, byte for byte.
//!
//! [`parse`] is total: any bytes give either an [`Inbound`] or a [`Rejection`] that says why and
//! whom to answer. Unknown fields are kept and passed through to the answer.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::TaskId;

/// The contract version this code speaks.
pub const SCHEMA_VERSION: u64 = 1;

/// The role this fleet serves. Messages for other roles are acknowledged and counted.
pub const ROLE: &str = "architect";

/// The commands that `msg_type: control` knows.
pub const CONTROL_COMMANDS: &[&str] =
    &["heartbeat", "flush_cache", "set_budget", "pause", "resume", "cancel"];

/// A message that fits the contract.
#[derive(Clone, Debug, PartialEq)]
pub enum Inbound {
    /// A request for a spec.
    Chat(Task),
    /// A command for the fleet.
    Control(Control),
    /// Another role's message: acknowledge, count, do nothing.
    OtherRole {
        /// Whose it is.
        role: String,
    },
}

/// A request for a spec, as published and as stored in `architect_in.data`.
#[derive(Clone, Debug, PartialEq)]
pub struct Task {
    /// Given, or derived from the message id.
    pub task_id: TaskId,
    /// The request in words; never empty.
    pub content: String,
    /// The fields of `metadata` that Atlas reads.
    pub options: TaskOptions,
    /// The whole message as it came, with `task_id` filled in: unknown fields included.
    pub raw: Map<String, Value>,
}

/// What `metadata` may ask for. Every field is optional.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TaskOptions {
    /// Asks for one model instead of the configured one.
    pub model: Option<String>,
    /// An earlier task whose spec this request refines.
    pub parent_id: Option<TaskId>,
    /// Whose budget and whose documents apply.
    pub tenant: Option<String>,
    /// The collection to search instead of `RAG_COLLECTION`.
    pub collection: Option<String>,
    /// Work after this instant is useless to the publisher.
    pub deadline: Option<Timestamp>,
    /// Another topic for the answer.
    pub reply_to: Option<String>,
    /// What kind of document is wanted.
    pub kind: Option<String>,
}

/// A command for the whole fleet.
#[derive(Clone, Debug, PartialEq)]
pub struct Control {
    /// Given, or derived from the message id.
    pub task_id: TaskId,
    /// What to do.
    pub command: Command,
    /// The whole message as it came.
    pub raw: Map<String, Value>,
}

/// The commands of DESIGN section 4.
#[derive(Clone, Debug, PartialEq)]
pub enum Command {
    /// Answer with the fleet's state.
    Heartbeat,
    /// Empty the gateway's caches.
    FlushCache,
    /// Change the fleet's limits, in the store.
    SetBudget {
        /// New daily limit in tokens, if given.
        daily: Option<u64>,
        /// New limit a run in tokens, if given.
        per_run: Option<u64>,
    },
    /// Stop starting runs.
    Pause,
    /// Start runs again.
    Resume,
    /// Stop a task.
    Cancel {
        /// Which one.
        task_id: TaskId,
    },
}

/// A message that does not fit the contract. Permanent: it goes to `dead_letters`.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{message}")]
pub struct Rejection {
    /// A stable reason in snake case: the label of `atlas_dead_letters_total`.
    pub reason: &'static str,
    /// What is wrong and how to mend it.
    pub message: String,
    /// Whom to answer. `None` where the bytes name no task (not JSON, not an object).
    pub answer_to: Option<TaskId>,
    /// The request's metadata as far as it could be read, for the answer.
    pub metadata: Map<String, Value>,
}

/// Reads one message.
///
/// `message_id` is the queue's id for it; it names the task when the message does not.
/// `max_bytes` is `MAX_MESSAGE_BYTES`.
pub fn parse(data: &[u8], message_id: &str, max_bytes: usize) -> Result<Inbound, Rejection> {
    let bare = |reason, message: String| Rejection { reason, message, answer_to: None, metadata: Map::new() };

    if data.len() > max_bytes {
        return Err(Rejection {
            answer_to: Some(TaskId::from_message_id(message_id)),
            ..bare(
                "too_large",
                format!(
                    "The message has {} bytes; at most {max_bytes} are accepted (MAX_MESSAGE_BYTES). \
                     Index long documents instead of sending them.",
                    data.len()
                ),
            )
        });
    }
    let text = std::str::from_utf8(data).map_err(|error| {
        bare("invalid_utf8", format!("The message is not UTF-8: {error}. Send UTF-8 JSON."))
    })?;
    let value: Value = serde_json::from_str(text)
        .map_err(|error| bare("not_json", format!("The message is not JSON this service reads: {error}.")))?;
    let Value::Object(raw) = value else {
        return Err(bare(
            "not_an_object",
            "The message is JSON but not an object. Send {\"role\":…}.".to_owned(),
        ));
    };
    parse_object(raw, message_id)
}

fn parse_object(mut raw: Map<String, Value>, message_id: &str) -> Result<Inbound, Rejection> {
    let derived = TaskId::from_message_id(message_id);
    let metadata = match raw.get("metadata") {
        Some(Value::Object(map)) => map.clone(),
        _ => Map::new(),
    };
    let (task_id, task_id_fault) = match raw.get("task_id") {
        None | Some(Value::Null) => (derived, None),
        Some(Value::String(text)) => match text.parse() {
            Ok(id) => (id, None),
            Err(_) => (derived, Some(format!("`task_id` is {text:?}, which is not a UUID."))),
        },
        Some(other) => {
            (derived, Some(format!("`task_id` must be a UUID in a string, not {}.", kind_of(other))))
        }
    };
    let reject = |reason, message: String| {
        Err(Rejection { reason, message, answer_to: Some(task_id), metadata: metadata.clone() })
    };

    let role = match raw.get("role") {
        Some(Value::String(role)) => role.clone(),
        None | Some(Value::Null) => {
            return reject("missing_role", "`role` is missing. Send \"role\": \"architect\".".to_owned());
        }
        Some(other) => {
            return reject("invalid_role", format!("`role` must be a string, not {}.", kind_of(other)));
        }
    };
    if role != ROLE {
        return Ok(Inbound::OtherRole { role });
    }
    if let Some(fault) = task_id_fault {
        return reject(
            "invalid_task_id",
            format!("{fault} Leave it out to have one made, or send one such as {}.", TaskId::random()),
        );
    }
    if !matches!(raw.get("metadata"), None | Some(Value::Null | Value::Object(_))) {
        return reject("invalid_metadata", "`metadata` must be an object.".to_owned());
    }
    raw.insert("task_id".to_owned(), json!(task_id));

    match raw.get("msg_type").and_then(Value::as_str) {
        Some("chat") => {
            let content = match raw.get("content") {
                Some(Value::String(content)) if !content.trim().is_empty() => content.clone(),
                Some(Value::String(_) | Value::Null) | None => {
                    return reject(
                        "empty_content",
                        "`content` is empty. Say what to design, in a sentence or more.".to_owned(),
                    );
                }
                Some(other) => {
                    return reject(
                        "invalid_content",
                        format!("`content` of a chat message must be a string, not {}.", kind_of(other)),
                    );
                }
            };
            match TaskOptions::from_metadata(&metadata) {
                Ok(options) => Ok(Inbound::Chat(Task { task_id, content, options, raw })),
                Err(message) => reject("invalid_metadata", message),
            }
        }
        Some("control") => match parse_command(raw.get("content")) {
            Ok(command) => Ok(Inbound::Control(Control { task_id, command, raw })),
            Err(message) => reject("invalid_command", message),
        },
        Some(other) => reject(
            "unknown_msg_type",
            format!("`msg_type` is {other:?}. Known types: \"chat\", \"control\"."),
        ),
        None => reject("missing_msg_type", "`msg_type` is missing. Send \"chat\" or \"control\".".to_owned()),
    }
}

impl Task {
    /// Reads a stored request (`architect_in.data`) again, when a run is taken over.
    pub fn from_stored(data: Value) -> Result<Self, Rejection> {
        let Value::Object(raw) = data else {
            return Err(Rejection {
                reason: "not_an_object",
                message: "The stored request is not an object.".to_owned(),
                answer_to: None,
                metadata: Map::new(),
            });
        };
        // A stored request always names its task, so the message id is never used.
        match parse_object(raw, "")? {
            Inbound::Chat(task) => Ok(task),
            Inbound::Control(_) | Inbound::OtherRole { .. } => Err(Rejection {
                reason: "not_a_chat",
                message: "The stored request is not a chat message.".to_owned(),
                answer_to: None,
                metadata: Map::new(),
            }),
        }
    }

    /// The request's own metadata, unknown fields included.
    pub fn metadata(&self) -> Map<String, Value> {
        match self.raw.get("metadata") {
            Some(Value::Object(map)) => map.clone(),
            _ => Map::new(),
        }
    }
}

impl TaskOptions {
    fn from_metadata(metadata: &Map<String, Value>) -> Result<Self, String> {
        if let Some(version) = metadata.get("schema_ver")
            && !version.is_null()
            && version.as_u64() != Some(SCHEMA_VERSION)
        {
            return Err(format!("`metadata.schema_ver` is {version}; this service speaks {SCHEMA_VERSION}."));
        }
        Ok(Self {
            model: text(metadata, "model")?,
            parent_id: text(metadata, "parent_id")?
                .map(|id| id.parse().map_err(|_| format!("`metadata.parent_id` is {id:?}, which is not a UUID.")))
                .transpose()?,
            tenant: name(metadata, "tenant")?,
            collection: name(metadata, "collection")?,
            deadline: text(metadata, "deadline")?
                .map(|at| {
                    at.parse().map_err(|_| {
                        format!("`metadata.deadline` is {at:?}; send RFC 3339 in UTC, such as 2026-01-31T12:00:00Z.")
                    })
                })
                .transpose()?,
            reply_to: name(metadata, "reply_to")?,
            kind: name(metadata, "kind")?,
        })
    }
}

fn text(metadata: &Map<String, Value>, field: &str) -> Result<Option<String>, String> {
    match metadata.get(field) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) if text.is_empty() => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(other) => Err(format!("`metadata.{field}` must be a string or null, not {}.", kind_of(other))),
    }
}

fn name(metadata: &Map<String, Value>, field: &str) -> Result<Option<String>, String> {
    match text(metadata, field)? {
        Some(name) if !is_name(&name) => {
            Err(format!("`metadata.{field}` is {name:?}; use 1 to 128 letters, digits, '.', '_' or '-'."))
        }
        name => Ok(name),
    }
}

/// True for names that are safe as tenant, collection and topic: no separators, no wildcards.
pub fn is_name(text: &str) -> bool {
    (1..=128).contains(&text.len())
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-'))
}

fn parse_command(content: Option<&Value>) -> Result<Command, String> {
    let known = || format!("Known commands: {}.", CONTROL_COMMANDS.join(", "));
    let parsed: Value;
    // Some clients can only send strings: a JSON object in a string is accepted too.
    let object = match content {
        Some(Value::Object(object)) => object,
        Some(Value::String(text)) => {
            parsed = serde_json::from_str(text).unwrap_or(Value::Null);
            parsed.as_object().ok_or_else(|| {
                format!("`content` of a control message must be {{\"command\": …}}. {}", known())
            })?
        }
        _ => return Err(format!("`content` of a control message must be {{\"command\": …}}. {}", known())),
    };
    let number = |field: &str| match object.get(field) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => value
            .as_u64()
            .map(Some)
            .ok_or_else(|| format!("`content.{field}` must be a whole number of tokens, not {value}.")),
    };
    match object.get("command").and_then(Value::as_str) {
        Some("heartbeat") => Ok(Command::Heartbeat),
        Some("flush_cache") => Ok(Command::FlushCache),
        Some("set_budget") => match (number("daily")?, number("per_run")?) {
            (None, None) => Err("`set_budget` needs `daily` or `per_run`, in tokens.".to_owned()),
            (daily, per_run) => Ok(Command::SetBudget { daily, per_run }),
        },
        Some("pause") => Ok(Command::Pause),
        Some("resume") => Ok(Command::Resume),
        Some("cancel") => object
            .get("task_id")
            .and_then(Value::as_str)
            .and_then(|id| id.parse().ok())
            .map(|task_id| Command::Cancel { task_id })
            .ok_or_else(|| "`cancel` needs `task_id`, a UUID.".to_owned()),
        Some(other) => Err(format!("Unknown command {other:?}. {}", known())),
        None => Err(format!("`content.command` is missing. {}", known())),
    }
}

fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

/// `metadata.status` of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AnswerStatus {
    /// Work goes on.
    InProgress,
    /// The spec is in this message.
    Done,
    /// No spec will come.
    Error,
    /// The day's budget is gone; work resumes by itself.
    Deferred,
}

/// `msg_type` of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AnswerType {
    /// A finished spec.
    Spec,
    /// A stage was reached, or the run is deferred.
    Progress,
    /// The request failed.
    Error,
    /// The answer to a control message, or an announcement (`escalate`).
    Control,
}

impl AnswerType {
    /// The value on the wire and of the attribute `msg_type`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Spec => "spec",
            Self::Progress => "progress",
            Self::Error => "error",
            Self::Control => "control",
        }
    }
}

/// A message on `architect_out`, and a row's `data` in table `architect_out`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Answer {
    /// Whose answer this is.
    pub task_id: TaskId,
    /// Always [`ROLE`].
    pub role: String,
    /// What kind of answer.
    pub msg_type: AnswerType,
    /// Markdown for a spec, a sentence for an error or a progress, an object for control.
    pub content: Value,
    /// The request's metadata with Atlas's fields set over it.
    pub metadata: Map<String, Value>,
    /// Unknown top-level fields of the request, passed through; and `spec`, the structured form.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

impl Answer {
    /// An answer to `task`: its metadata and unknown fields carried over, `status` and `schema_ver` set.
    pub fn to_task(
        task: &Task,
        msg_type: AnswerType,
        status: AnswerStatus,
        content: impl Into<Value>,
    ) -> Self {
        let extra = task
            .raw
            .iter()
            .filter(|(key, _)| {
                !["task_id", "role", "msg_type", "content", "metadata"].contains(&key.as_str())
            })
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect();
        Self { extra, ..Self::bare(task.task_id, msg_type, status, content, task.metadata()) }
    }

    /// An answer where there is no valid task to take fields from.
    pub fn bare(
        task_id: TaskId,
        msg_type: AnswerType,
        status: AnswerStatus,
        content: impl Into<Value>,
        mut metadata: Map<String, Value>,
    ) -> Self {
        metadata.insert("status".to_owned(), json!(status));
        metadata.insert("schema_ver".to_owned(), json!(SCHEMA_VERSION));
        metadata.entry("tokens").or_insert(json!(0));
        metadata.entry("model").or_insert(Value::Null);
        Self {
            task_id,
            role: ROLE.to_owned(),
            msg_type,
            content: content.into(),
            metadata,
            extra: Map::new(),
        }
    }

    /// The attributes of the message, without `traceparent`.
    pub fn attributes(&self) -> Vec<(String, String)> {
        vec![
            ("task_id".to_owned(), self.task_id.to_string()),
            ("role".to_owned(), self.role.clone()),
            ("msg_type".to_owned(), self.msg_type.as_str().to_owned()),
        ]
    }
}
