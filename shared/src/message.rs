//! The message contract (DESIGN section 4): what comes in, what goes out, byte for byte.
//!
//! [`parse`] is total: any bytes give either an [`Inbound`] or a [`Rejection`] that says why and
//! whom to answer. Unknown fields are kept and passed through to the answer.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::{
    TaskId,
    ledger::{NewLimit, Tokens},
};

/// The contract version this code speaks.
pub const SCHEMA_VERSION: u64 = 1;

/// The role this fleet serves. Messages for other roles are acknowledged and counted.
pub const ROLE: &str = "architect";

/// The commands that `msg_type: control` knows.
pub const CONTROL_COMMANDS: &[&str] =
    &["heartbeat", "flush_cache", "set_budget", "pause", "resume", "cancel"];

/// Arrays and objects may be nested this deep. Stores and queues wrap a message in more of both, and
/// every JSON reader on its way has a limit (serde_json: 128): a message near that limit would be
/// accepted here and then break the reading of whole batches it is part of.
pub const MAX_DEPTH: usize = 64;

/// How much of an odd value is quoted in an answer.
const MAX_QUOTED_CHARS: usize = 80;

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
    /// An earlier task whose spec this request refines; where that cannot be read, the answer is an error.
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
    /// The sender watches: text may be sent while it is written. Anything but `true` is no.
    pub stream: bool,
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
        /// New daily limit, if given.
        daily: Option<NewLimit>,
        /// New limit a run, if given.
        per_run: Option<NewLimit>,
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
    // Some Windows tools put a byte order mark in front of everything they write.
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let value: Value = serde_json::from_str(text).map_err(|error| match error.to_string() {
        why if why.starts_with("recursion limit") => bare("too_deep", too_deep()),
        why => bare("not_json", format!("The message is not JSON this service reads: {why}.")),
    })?;
    let Value::Object(raw) = value else {
        return Err(bare(
            "not_an_object",
            "The message is JSON but not an object. Send {\"role\":…}.".to_owned(),
        ));
    };
    parse_object(raw, message_id)
}

fn too_deep() -> String {
    format!("The message nests arrays or objects deeper than {MAX_DEPTH} levels. Send a flatter one.")
}

/// What no store can hold: (reason, message).
fn unstorable(raw: &Map<String, Value>) -> Option<(&'static str, String)> {
    fn walk(value: &Value, depth: usize) -> Option<&'static str> {
        match value {
            Value::Array(_) | Value::Object(_) if depth > MAX_DEPTH => Some("too_deep"),
            Value::Array(items) => items.iter().find_map(|item| walk(item, depth + 1)),
            Value::Object(map) => map.iter().find_map(|(key, value)| {
                if key.contains('\0') { Some("nul_character") } else { walk(value, depth + 1) }
            }),
            Value::String(text) if text.contains('\0') => Some("nul_character"),
            _ => None,
        }
    }
    let reason = raw
        .iter()
        .find_map(|(key, value)| if key.contains('\0') { Some("nul_character") } else { walk(value, 2) })?;
    let message = if reason == "too_deep" {
        too_deep()
    } else {
        "The message has a NUL character (\\u0000) in a text, which Postgres cannot store. Leave it out."
            .to_owned()
    };
    Some((reason, message))
}

fn parse_object(mut raw: Map<String, Value>, message_id: &str) -> Result<Inbound, Rejection> {
    let derived = TaskId::from_message_id(message_id);
    let unstorable = unstorable(&raw);
    let metadata = match raw.get("metadata") {
        // The answer is stored too, so metadata that cannot be stored is not repeated in it.
        Some(Value::Object(map)) if unstorable.is_none() => map.clone(),
        _ => Map::new(),
    };
    let (task_id, task_id_fault) = match raw.get("task_id") {
        None | Some(Value::Null) => (derived, None),
        Some(Value::String(text)) => match text.parse() {
            Ok(id) => (id, None),
            Err(_) => (derived, Some(format!("`task_id` is {}, which is not a UUID.", quoted(text)))),
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
    if let Some((reason, message)) = unstorable {
        return reject(reason, message);
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
            format!("`msg_type` is {}. Known types: \"chat\", \"control\".", quoted(other)),
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
            && version.as_f64() != Some(SCHEMA_VERSION as f64)
        {
            let version = quoted(&version.to_string());
            return Err(format!("`metadata.schema_ver` is {version}; this service speaks {SCHEMA_VERSION}."));
        }
        Ok(Self {
            model: text(metadata, "model")?,
            parent_id: text(metadata, "parent_id")?
                .map(|id| {
                    id.parse()
                        .map_err(|_| format!("`metadata.parent_id` is {}, which is not a UUID.", quoted(&id)))
                })
                .transpose()?,
            tenant: name(metadata, "tenant")?,
            collection: name(metadata, "collection")?,
            deadline: text(metadata, "deadline")?
                .map(|at| {
                    at.parse().map_err(|_| {
                        format!(
                            "`metadata.deadline` is {}; send RFC 3339 in UTC, such as 2026-01-31T12:00:00Z.",
                            quoted(&at)
                        )
                    })
                })
                .transpose()?,
            reply_to: name(metadata, "reply_to")?,
            kind: name(metadata, "kind")?,
            stream: metadata.get("stream") == Some(&Value::Bool(true)),
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
            let name = quoted(&name);
            Err(format!("`metadata.{field}` is {name}; use 1 to 128 letters, digits, '.', '_' or '-'."))
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
    let limit = |field: &str| match object.get(field) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => match (value.as_u64(), value.as_str()) {
            (Some(tokens), _) => Ok(Some(NewLimit::Tokens(Tokens(tokens)))),
            (None, Some("default")) => Ok(Some(NewLimit::Default)),
            _ => Err(format!(
                "`content.{field}` must be a whole number of tokens, or \"default\" for what is configured, not {}.",
                quoted(&value.to_string())
            )),
        },
    };
    match object.get("command").and_then(Value::as_str) {
        Some("heartbeat") => Ok(Command::Heartbeat),
        Some("flush_cache") => Ok(Command::FlushCache),
        Some("set_budget") => match (limit("daily")?, limit("per_run")?) {
            (None, None) => {
                Err("`set_budget` needs `daily` or `per_run`, in tokens or \"default\".".to_owned())
            }
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
        Some(other) => Err(format!("Unknown command {}. {}", quoted(other), known())),
        None => Err(format!("`content.command` is missing. {}", known())),
    }
}

/// A value of the message for an answer: short, and with everything odd escaped.
fn quoted(text: &str) -> String {
    let short: String = text.chars().take(MAX_QUOTED_CHARS).collect();
    let more = if short.len() < text.len() { "…" } else { "" };
    format!("{short:?}{more}")
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
        // Atlas's own fields never come from the request: whoever knows better sets them afterwards.
        metadata.insert("tokens".to_owned(), json!(0));
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

#[cfg(test)]
#[expect(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MAX: usize = 1 << 20;

    fn read(message: &Value) -> Result<Inbound, Rejection> {
        parse(message.to_string().as_bytes(), "m-1", MAX)
    }

    fn task(message: &Value) -> Task {
        match read(message) {
            Ok(Inbound::Chat(task)) => task,
            other => panic!("{message} is {other:?}"),
        }
    }

    fn chat() -> Value {
        json!({"role": "architect", "msg_type": "chat", "content": "Design a queue", "metadata": {}})
    }

    /// The chat message with some fields set.
    fn chat_with(fields: &Value) -> Value {
        let mut message = chat();
        message.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        message
    }

    fn nested(levels: usize) -> Value {
        (0..levels).fold(json!(1), |inner, _| json!({ "a": inner }))
    }

    #[test]
    fn the_smallest_request_is_served() {
        let task = task(&chat());
        assert_eq!(task.task_id, TaskId::from_message_id("m-1"), "named by the message id");
        assert_eq!(task.raw["task_id"], json!(task.task_id), "and says so from now on");
        assert_eq!(task.options, TaskOptions::default());
        let given = TaskId::random();
        assert_eq!(self::task(&chat_with(&json!({"task_id": given, "metadata": null}))).task_id, given);
    }

    #[test]
    fn the_request_of_the_contract_is_read_in_full() {
        let parent = TaskId::random();
        let options = task(&chat_with(&json!({"metadata": {
            "tokens": 0, "model": "gpt-4.1-mini", "parent_id": parent, "status": "in_progress", "schema_ver": 1,
            "tenant": "acme", "collection": "docs", "priority": null, "deadline": "2026-01-31T12:00:00Z",
            "reply_to": "architect_out-acme", "kind": "adr"}})))
        .options;
        assert_eq!(options.model.as_deref(), Some("gpt-4.1-mini"));
        assert_eq!(options.parent_id, Some(parent));
        assert_eq!(options.tenant.as_deref(), Some("acme"));
        assert_eq!(options.collection.as_deref(), Some("docs"));
        assert_eq!(options.deadline, Some("2026-01-31T12:00:00Z".parse().unwrap()));
        assert_eq!(options.reply_to.as_deref(), Some("architect_out-acme"));
        assert_eq!(options.kind.as_deref(), Some("adr"));
    }

    #[test]
    fn bad_bytes_get_their_reason() {
        let two_mib = chat_with(&json!({"content": "x".repeat(2 << 20)})).to_string();
        let cases: Vec<(&str, Vec<u8>, bool)> = vec![
            ("not_json", b"hello".to_vec(), false),
            ("not_json", b"".to_vec(), false),
            ("not_json", b"{\"role\": \"architect\"".to_vec(), false),
            ("not_json", b"{\"role\": \"\\ud800\"}".to_vec(), false),
            ("not_an_object", b"[1, 2]".to_vec(), false),
            ("not_an_object", b"null".to_vec(), false),
            ("invalid_utf8", b"{\"role\": \"\xff\"}".to_vec(), false),
            ("too_deep", [b"[".repeat(100_000), b"]".repeat(100_000)].concat(), false),
            ("too_large", two_mib.into_bytes(), true),
        ];
        for (reason, bytes, answered) in cases {
            let rejection = parse(&bytes, "m-1", MAX).unwrap_err();
            assert_eq!(rejection.reason, reason, "{rejection}");
            assert_eq!(rejection.answer_to.is_some(), answered, "{rejection}");
        }
    }

    #[test]
    fn bad_fields_get_their_reason_and_somebody_to_answer() {
        let id = TaskId::random();
        let long = "x".repeat(100_000);
        let cases = [
            ("missing_role", json!({"role": null})),
            ("invalid_role", json!({"role": 7})),
            ("invalid_task_id", json!({"task_id": "42"})),
            ("invalid_task_id", json!({"task_id": 42})),
            ("invalid_task_id", json!({"task_id": long})),
            ("invalid_metadata", json!({"metadata": "none"})),
            ("invalid_metadata", json!({"metadata": {"schema_ver": 2}})),
            ("invalid_metadata", json!({"metadata": {"parent_id": "x"}})),
            ("invalid_metadata", json!({"metadata": {"parent_id": 1}})),
            ("invalid_metadata", json!({"metadata": {"deadline": "tomorrow"}})),
            ("invalid_metadata", json!({"metadata": {"tenant": "a/b"}})),
            ("invalid_metadata", json!({"metadata": {"collection": long}})),
            ("invalid_metadata", json!({"metadata": {"reply_to": "projects/x/topics/y"}})),
            ("invalid_metadata", json!({"metadata": {"model": {}}})),
            ("too_deep", json!({"metadata": nested(MAX_DEPTH)})),
            ("nul_character", json!({"content": "a\0b"})),
            ("nul_character", json!({"metadata": {"a\0": 1}})),
            ("nul_character", json!({"task_id": "a\0"})),
            ("empty_content", json!({"content": ""})),
            ("empty_content", json!({"content": " \n\t\u{a0}"})),
            ("empty_content", json!({"content": null})),
            ("invalid_content", json!({"content": {"text": "x"}})),
            ("missing_msg_type", json!({"msg_type": null})),
            ("unknown_msg_type", json!({"msg_type": "spec"})),
            ("unknown_msg_type", json!({"msg_type": long})),
            ("invalid_command", json!({"msg_type": "control"})),
            ("invalid_command", json!({"msg_type": "control", "content": {"command": "explode"}})),
            ("invalid_command", json!({"msg_type": "control", "content": {"command": "set_budget"}})),
            (
                "invalid_command",
                json!({"msg_type": "control", "content": {"command": "set_budget", "daily": -1}}),
            ),
            (
                "invalid_command",
                json!({"msg_type": "control", "content": {"command": "set_budget", "per_run": "none"}}),
            ),
            ("invalid_command", json!({"msg_type": "control", "content": {"command": "cancel"}})),
        ];
        for (reason, fields) in cases {
            let with_id = fields.get("task_id").is_none();
            let mut message = chat_with(&fields);
            if with_id {
                message["task_id"] = json!(id);
            }
            let rejection = read(&message).unwrap_err();
            assert_eq!(rejection.reason, reason, "{rejection}");
            let expected = if with_id { id } else { TaskId::from_message_id("m-1") };
            assert_eq!(rejection.answer_to, Some(expected), "{reason}");
            assert!(rejection.message.len() < 500, "an answer quotes, it does not repeat: {rejection}");
            let answer = serde_json::to_string(&rejection.metadata).unwrap();
            assert!(!answer.contains("\\u0000"), "an answer must be storable: {answer}");
        }
    }

    #[test]
    fn nesting_is_accepted_up_to_the_limit() {
        // The message and `metadata` are the first two levels.
        let deep = chat_with(&json!({"metadata": {"x": nested(MAX_DEPTH - 2)}}));
        assert!(read(&deep).is_ok());
        assert_eq!(
            read(&chat_with(&json!({"metadata": {"x": nested(MAX_DEPTH - 1)}}))).unwrap_err().reason,
            "too_deep"
        );
    }

    #[test]
    fn another_roles_message_is_not_ours_to_judge() {
        for message in [
            json!({"role": "chef"}),
            json!({"role": "chef", "task_id": "not a uuid", "metadata": 7, "content": "a\0b"}),
        ] {
            assert_eq!(read(&message), Ok(Inbound::OtherRole { role: "chef".to_owned() }));
        }
    }

    #[test]
    fn a_byte_order_mark_is_forgiven() {
        let bytes = format!("\u{feff}{}", chat());
        assert!(matches!(parse(bytes.as_bytes(), "m", MAX), Ok(Inbound::Chat(_))));
    }

    #[test]
    fn commands_are_read_as_objects_and_as_strings() {
        let id = TaskId::random();
        for (content, command) in [
            (json!({"command": "heartbeat"}), Command::Heartbeat),
            (json!("{\"command\": \"pause\"}"), Command::Pause),
            (json!({"command": "resume", "why": "over"}), Command::Resume),
            (json!({"command": "flush_cache"}), Command::FlushCache),
            (
                json!({"command": "set_budget", "daily": 5}),
                Command::SetBudget { daily: Some(NewLimit::Tokens(Tokens(5))), per_run: None },
            ),
            (
                json!({"command": "set_budget", "daily": "default", "per_run": 7}),
                Command::SetBudget {
                    daily: Some(NewLimit::Default),
                    per_run: Some(NewLimit::Tokens(Tokens(7))),
                },
            ),
            (json!({"command": "cancel", "task_id": id}), Command::Cancel { task_id: id }),
        ] {
            let message = chat_with(&json!({"msg_type": "control", "content": content}));
            assert!(
                matches!(read(&message), Ok(Inbound::Control(control)) if control.command == command),
                "{message}"
            );
        }
        let message = chat_with(&json!({"msg_type": "control", "content": "heartbeat"}));
        let rejection = read(&message).unwrap_err();
        for command in CONTROL_COMMANDS {
            assert!(rejection.message.contains(command), "{rejection}");
        }
    }

    #[test]
    fn a_stored_request_is_read_as_it_was_accepted() {
        let accepted =
            task(&chat_with(&json!({"x": [1, {"y": null}], "metadata": {"tenant": "acme", "z": 1.5}})));
        assert_eq!(Task::from_stored(Value::Object(accepted.raw.clone())), Ok(accepted));
        assert_eq!(Task::from_stored(json!([])).unwrap_err().reason, "not_an_object");
        let control = chat_with(&json!({"msg_type": "control", "content": {"command": "pause"}}));
        assert_eq!(Task::from_stored(control).unwrap_err().reason, "not_a_chat");
    }

    #[test]
    fn the_answer_on_the_wire() {
        let request = chat_with(&json!({
            "task_id": "9d7d71f9-9614-5f4b-9a22-ebbd54783bd1",
            "ticket": {"id": 7},
            "metadata": {"tokens": 999, "status": "mine", "model": null, "parent_id": null, "schema_ver": 1,
                "tenant": "acme", "colour": "blue"},
        }));
        let answer = Answer::to_task(&task(&request), AnswerType::Spec, AnswerStatus::Done, "# Queue");
        insta::assert_snapshot!(serde_json::to_string_pretty(&answer).unwrap());
        assert_eq!(
            answer.attributes(),
            [
                ("task_id", "9d7d71f9-9614-5f4b-9a22-ebbd54783bd1"),
                ("role", "architect"),
                ("msg_type", "spec")
            ]
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
        );
        let text = serde_json::to_string(&answer).unwrap();
        assert_eq!(serde_json::from_str::<Answer>(&text).unwrap(), answer, "and is read back");
    }

    #[test]
    fn an_answer_to_nobodys_request_has_the_fields_of_the_contract() {
        let rejection =
            read(&chat_with(&json!({"content": "", "metadata": {"colour": "blue"}}))).unwrap_err();
        let answer = Answer::bare(
            rejection.answer_to.unwrap(),
            AnswerType::Error,
            AnswerStatus::Error,
            rejection.message,
            rejection.metadata,
        );
        insta::assert_snapshot!(serde_json::to_string_pretty(&answer).unwrap());
    }

    fn json_value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            "\\PC{0,12}".prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 32, 5, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
                prop::collection::hash_map("[a-z]{1,6}", inner, 0..5)
                    .prop_map(|map| map.into_iter().collect()),
            ]
        })
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_rejected(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = parse(&bytes, "m-1", 200);
        }

        #[test]
        fn any_json_is_read_or_rejected_in_bounded_words(
            role in prop_oneof![Just(json!("architect")), json_value()],
            msg_type in prop_oneof![Just(json!("chat")), Just(json!("control")), json_value()],
            content in json_value(), metadata in json_value(), task_id in json_value(),
        ) {
            let message = json!({"role": role, "msg_type": msg_type, "content": content,
                "metadata": metadata, "task_id": task_id});
            if let Err(rejection) = read(&message) {
                prop_assert!(rejection.answer_to.is_some());
                prop_assert!(rejection.message.len() < 1000);
            }
        }

        #[test]
        fn answers_keep_what_they_do_not_know(
            fields in prop::collection::hash_map("x_[a-z]{1,6}", json_value(), 0..6),
            metadata in prop::collection::hash_map("y_[a-z]{1,6}", json_value(), 0..6),
        ) {
            let mut message = chat_with(&json!({"metadata": metadata}));
            message.as_object_mut().unwrap().extend(fields.clone());
            let answer = Answer::to_task(&task(&message), AnswerType::Error, AnswerStatus::Error, "no");
            let answer = serde_json::to_value(&answer).unwrap();
            for (name, value) in &fields {
                prop_assert_eq!(&answer[name], value);
            }
            for (name, value) in &metadata {
                prop_assert_eq!(&answer["metadata"][name], value);
            }
            prop_assert_eq!(&answer["metadata"]["status"], "error");
        }
    }
}
