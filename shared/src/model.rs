//! The model ports: chat and embeddings, in the terms of the OpenAI API.

use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{
    UpstreamError,
    ledger::{Tokens, Usage},
};

/// Who speaks in a chat.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "role", rename_all = "snake_case")]
pub enum ChatMessage {
    /// Our rules.
    System {
        /// Text.
        content: String,
    },
    /// The request, and passages as data.
    User {
        /// Text.
        content: String,
    },
    /// An earlier answer of the model.
    Assistant {
        /// Text, if any.
        content: Option<String>,
        /// Tools it asked for.
        tool_calls: Vec<ToolCall>,
    },
    /// What a tool gave.
    Tool {
        /// Which call this answers.
        tool_call_id: String,
        /// Text.
        content: String,
    },
}

/// A tool the model may call.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ToolSpec {
    /// Function name.
    pub name: String,
    /// What it does, for the model.
    pub description: String,
    /// JSON schema of the arguments.
    pub parameters: Value,
}

/// A tool call the model made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ToolCall {
    /// Server-given id.
    pub id: String,
    /// Function name.
    pub name: String,
    /// Arguments, JSON in a string, unchecked.
    pub arguments: String,
}

/// How the answer must look (`OPENAI_RESPONSE_FORMAT`).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ResponseFormat {
    /// Plain text.
    Text,
    /// Any JSON object.
    JsonObject,
    /// A strict JSON schema.
    JsonSchema {
        /// Schema name.
        name: String,
        /// The schema: one for many requests.
        schema: JsonSchema,
    },
}

/// A JSON schema that many requests share. Its text is made once, because each request needs it several times.
#[derive(Clone, Debug)]
pub struct JsonSchema(Arc<(Value, OnceLock<String>)>);

impl JsonSchema {
    /// The schema itself.
    pub fn value(&self) -> &Value {
        &self.0.0
    }

    /// As JSON text.
    pub fn text(&self) -> &str {
        self.0.1.get_or_init(|| self.0.0.to_string())
    }
}

impl From<Value> for JsonSchema {
    fn from(schema: Value) -> Self {
        Self(Arc::new((schema, OnceLock::new())))
    }
}

impl PartialEq for JsonSchema {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0) || self.value() == other.value()
    }
}

impl Serialize for JsonSchema {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.value().serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for JsonSchema {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Value::deserialize(deserializer).map(Self::from)
    }
}

/// One call of `/v1/chat/completions`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ChatRequest {
    /// Model name.
    pub model: String,
    /// The conversation.
    pub messages: Vec<ChatMessage>,
    /// The completion cap that the API enforces.
    pub max_completion_tokens: u32,
    /// How the answer must look.
    pub response_format: ResponseFormat,
    /// Tools on offer.
    pub tools: Vec<ToolSpec>,
    /// Sent as `X-Client-Request-Id`, so that a call can be found in the provider's log and in the
    /// simulator's meter: `<task id>.<attempt>.<step>`.
    pub request_id: String,
}

/// Why the model stopped.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// By itself.
    Stop,
    /// At the completion cap.
    Length,
    /// To call tools.
    ToolCalls,
    /// By a content filter.
    ContentFilter,
    /// Something this version does not know.
    Other,
}

/// One answer of the model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ChatAnswer {
    /// The model that answered, as the server names it.
    pub model: String,
    /// Text, if any.
    pub content: Option<String>,
    /// A refusal in words, if the model refused.
    pub refusal: Option<String>,
    /// Tools it wants called.
    pub tool_calls: Vec<ToolCall>,
    /// Why it stopped.
    pub finish_reason: FinishReason,
    /// What was billed; `None` when the server does not say (then the reservation is assumed spent).
    pub usage: Option<Usage>,
}

/// What a failed call may have cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Billed {
    /// Nothing: it was refused or never arrived.
    Nothing,
    /// Nobody can know (timeout, cut connection, unreadable answer).
    Unknown,
    /// The answer was useless, but it said what it cost: book exactly this.
    Known(Usage),
}

/// A failed model call.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{error}")]
pub struct ModelError {
    /// What to do.
    #[source]
    pub error: UpstreamError,
    /// What to book.
    pub billed: Billed,
}

/// Hears what a model writes, while it writes it. What was heard is a preview: only the answer that
/// the call returns counts.
pub trait Listener: Send + Sync {
    /// An attempt begins: what was heard of an earlier one is void.
    fn begins(&self);

    /// The next piece of the answer's text. Called in order; must not block.
    fn wrote(&self, piece: &str);
}

/// A chat model behind an OpenAI-compatible API. One attempt a call: retries, fallback and booking
/// belong to the caller.
#[async_trait]
pub trait ChatModel: Send + Sync {
    /// Calls the model once.
    async fn complete(&self, request: &ChatRequest) -> Result<ChatAnswer, ModelError>;

    /// As [`complete`](Self::complete), and drops the request as soon as it is on its way: many calls wait
    /// at once, and long.
    async fn complete_and_forget(&self, request: ChatRequest) -> Result<ChatAnswer, ModelError> {
        self.complete(&request).await
    }

    /// As [`complete`](Self::complete), and tells `listener` what is written as it is written. The
    /// answer and what it billed are the same. A model that cannot stream tells it all at the end.
    async fn stream(&self, request: &ChatRequest, listener: &dyn Listener) -> Result<ChatAnswer, ModelError> {
        let answer = self.complete(request).await?;
        if let Some(content) = &answer.content {
            listener.wrote(content);
        }
        Ok(answer)
    }

    /// An upper bound of the prompt tokens this request can bill when it is sent to `model`, whichever
    /// it names itself: the whole serialised request counted with the model's tokenizer plus a margin, or
    /// its bytes where the tokenizer is unknown.
    fn prompt_tokens_upper_bound(&self, model: &str, request: &ChatRequest) -> Tokens;

    /// The answer to `request` billed more than was reserved: raises its model's margin for a while.
    fn note_overrun(&self, request: &ChatRequest, reserved: Tokens, billed: Usage);

    /// How long a call of that many tokens (prompt and cap) must wait for the API's rate limit, as far
    /// as its answers told. Zero: go ahead; the call is counted as sent, so that the next one, asking
    /// before any answer, knows of it. Whoever waited asks again.
    fn pace(&self, _model: &str, _tokens: Tokens) -> Duration {
        Duration::ZERO
    }

    /// Is the API reachable, is the key right, does it know the first configured model? Costs no
    /// tokens (`GET /models`); a server without that route counts as well.
    async fn check(&self) -> Result<(), UpstreamError>;
}

/// Turns texts into vectors. One attempt a call, as for [`ChatModel`].
#[async_trait]
pub trait Embedder: Send + Sync {
    /// One vector a text, in order, with what was billed.
    async fn embed(&self, texts: &[String], request_id: &str) -> Result<Embeddings, ModelError>;

    /// The model's name, recorded in collections.
    fn model(&self) -> &str;

    /// An upper bound of what embedding these texts can bill.
    fn tokens_upper_bound(&self, texts: &[String]) -> Tokens;

    /// How long a call of that many tokens must wait for the API's rate limit; see [`ChatModel::pace`].
    fn pace(&self, _tokens: Tokens) -> Duration {
        Duration::ZERO
    }
}

/// The answer of an [`Embedder`].
#[derive(Clone, Debug, PartialEq)]
pub struct Embeddings {
    /// One vector a text, all of one length.
    pub vectors: Vec<Vec<f32>>,
    /// What was billed; `None` when the server does not say.
    pub usage: Option<Usage>,
}
