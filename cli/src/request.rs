//! Builds and publishes request messages (DESIGN section 4).

use std::{io::Read as _, path::Path, sync::Arc};

use atlas_shared::{
    Config, TaskId,
    message::{ROLE, SCHEMA_VERSION},
};
use atlas_worker::queue::{self, ResultPublisher, Topics};
use bytes::Bytes;
use serde_json::{Map, Value, json};

use crate::error::{CliError, Result};

/// A message that is about to be published.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Request {
    /// The task, where the message names one.
    pub(crate) task_id: Option<TaskId>,
    /// The message, byte for byte.
    pub(crate) data: Bytes,
}

impl Request {
    /// A chat message with a new task id.
    pub(crate) fn chat(content: &str, mut metadata: Map<String, Value>) -> Self {
        let task_id = TaskId::random();
        metadata.insert("schema_ver".to_owned(), json!(SCHEMA_VERSION));
        let message = json!({
            "task_id": task_id,
            "role": ROLE,
            "msg_type": "chat",
            "content": content,
            "metadata": metadata,
        });
        Self { task_id: Some(task_id), data: Bytes::from(message.to_string()) }
    }

    /// Bytes as they are; a message that leaves its name to the queue gets one here.
    pub(crate) fn raw(data: impl Into<Bytes>) -> Self {
        let data = data.into();
        if let Some(task_id) = named(&data) {
            return Self { task_id: Some(task_id), data };
        }
        let task_id = TaskId::random();
        match name(&data, task_id) {
            Some(data) => Self { task_id: Some(task_id), data },
            None => Self { task_id: None, data },
        }
    }

    /// Publishes it and returns the task it will be served as; `None`: it can be none.
    pub(crate) async fn publish(&self, config: &Config) -> Result<Option<TaskId>> {
        let publisher: Arc<dyn ResultPublisher> = queue::open_publisher(config).await?;
        let mut attributes =
            vec![("role".to_owned(), ROLE.to_owned()), ("requester".to_owned(), "atlas-cli".to_owned())];
        if let Some(task_id) = self.task_id {
            attributes.push(("task_id".to_owned(), task_id.to_string()));
        }
        publisher.publish(&Topics::of(config).requests, self.data.clone(), attributes).await?;
        Ok(self.task_id)
    }
}

/// The task that a message names itself.
pub(crate) fn named(data: &[u8]) -> Option<TaskId> {
    serde_json::from_slice::<Value>(data).ok()?.get("task_id")?.as_str()?.parse().ok()
}

/// The same message with a task id, all else byte for byte; `None` where it has one or is no object. Whoever
/// publishes must name it: a worker would name it by the queue's id for it, and where ids begin anew (the
/// emulator's do) also by the time of publishing, which only the worker is told.
pub(crate) fn name(data: &[u8], task_id: TaskId) -> Option<Bytes> {
    let message: Map<String, Value> = serde_json::from_slice(data).ok()?;
    if message.get("task_id").is_some_and(|named| !named.is_null()) {
        return None;
    }
    let body = data.trim_ascii_end().strip_suffix(b"}")?;
    let comma = if message.is_empty() { "" } else { "," };
    // At the end: of two fields of one name (there may be a null) the last one counts.
    let field = format!("{comma}\"task_id\":\"{task_id}\"}}");
    Some([body, field.as_bytes()].concat().into())
}

/// The request text of a command: an argument, `-` for standard input, or a file. Bounded by
/// `MAX_MESSAGE_BYTES`, because no worker takes more.
pub(crate) fn read_text(text: Option<&str>, file: Option<&Path>, max_bytes: usize) -> Result<String> {
    let text = read_any(text, file, max_bytes)?;
    if text.trim().is_empty() {
        return Err(CliError::usage("the request is empty").fix("say what to design, in a sentence or more"));
    }
    Ok(text)
}

/// The same, which may be empty.
pub(crate) fn read_any(text: Option<&str>, file: Option<&Path>, max_bytes: usize) -> Result<String> {
    let read = |what: String, input: &mut dyn std::io::Read| {
        let mut bytes = Vec::new();
        input
            .take(max_bytes as u64 + 1)
            .read_to_end(&mut bytes)
            .map_err(|error| CliError::usage(format!("cannot read {what}")).because(error))?;
        if bytes.len() > max_bytes {
            return Err(CliError::usage(format!("{what} has more than {max_bytes} bytes"))
                .because("no worker takes a larger message (MAX_MESSAGE_BYTES)")
                .fix("index long documents (`atlas index`) and ask about them"));
        }
        String::from_utf8(bytes)
            .map_err(|error| CliError::usage(format!("{what} is not UTF-8")).because(error))
    };
    match (text, file) {
        (_, Some(path)) => {
            let what = path.display().to_string();
            let mut file = std::fs::File::open(path)
                .map_err(|error| CliError::usage(format!("cannot read {what}")).because(error))?;
            read(what, &mut file)
        }
        (Some("-"), None) => read("standard input".to_owned(), &mut std::io::stdin().lock()),
        (Some(text), None) => Ok(text.to_owned()),
        (None, None) => Ok(String::new()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

    use atlas_shared::message::{self, Inbound};

    use super::*;

    #[test]
    fn a_chat_request_fits_the_contract() {
        let metadata = Map::from_iter([("collection".to_owned(), json!("docs"))]);
        let request = Request::chat("Design a cache", metadata);
        let Inbound::Chat(task) = message::parse(&request.data, "1", 1 << 20).unwrap() else {
            panic!("not a chat");
        };
        assert_eq!(Some(task.task_id), request.task_id);
        assert_eq!(task.content, "Design a cache");
        assert_eq!(task.options.collection.as_deref(), Some("docs"));
    }

    #[test]
    fn a_raw_message_keeps_its_bytes_and_its_task() {
        let request = Request::raw(r#"{"task_id":"67e55044-10b1-426f-9247-bb680e5fe0c8",  "role":"chef"}"#);
        assert_eq!(request.task_id.unwrap().to_string(), "67e55044-10b1-426f-9247-bb680e5fe0c8");
        for nameless in ["not json", "[]", r#"{"task_id":7}"#, r#"{"task_id":"no uuid"}"#] {
            assert_eq!(Request::raw(nameless), Request { task_id: None, data: nameless.into() });
        }
    }

    #[test]
    fn a_raw_message_without_a_task_is_named_before_it_is_published() {
        let chat = r#"{"role":"architect",  "msg_type":"chat","content":"Design it","task_id":null} "#;
        let control = r#"{"role":"architect","msg_type":"control","content":{"command":"heartbeat"}}"#;
        for text in [chat, control, "{}", "{ }\n"] {
            let request = Request::raw(text);
            let body = text.trim_end().strip_suffix('}').unwrap();
            assert!(request.data.starts_with(body.as_bytes()), "{request:?}");
            assert_eq!(named(&request.data), request.task_id);
            assert!(request.task_id.is_some(), "{text}");
        }
        // As every queue would deliver it: under an id of its own.
        let Inbound::Chat(task) = message::parse(&Request::raw(chat).data, "1@2.3", 1 << 20).unwrap() else {
            panic!("not a chat");
        };
        assert_eq!(task.content, "Design it");
        assert_ne!(task.task_id, TaskId::from_message_id("1@2.3"));
    }

    #[test]
    fn text_is_bounded_and_not_empty() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "x".repeat(2000)).unwrap();
        assert!(read_text(None, Some(file.path()), 1024).unwrap_err().to_string().contains("more than 1024"));
        assert_eq!(read_text(None, Some(file.path()), 4096).unwrap().len(), 2000);
        assert!(read_text(Some("  \n"), None, 1024).is_err());
        assert_eq!(read_text(Some("hello"), None, 1024).unwrap(), "hello");
    }
}
