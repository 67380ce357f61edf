//! Chat and embeddings over the OpenAI API, or any server that speaks it.
//!
//! Each call is **one attempt**: `async-openai` builds the request and reads the answer, our own
//! HTTP service ([`service`]) sends it once and turns every failure into a decision that says what
//! it cost. (The crate alone would retry by itself, hide the response headers, and lose the status
//! of an error whose body is not JSON.) Retries, fallback and booking belong to the caller.
//!
//! - [`params`]: what each family of models accepts, in one table.
//! - [`bound`]: upper bounds of prompt tokens, for reservations.
//! - [`stream`]: reads answers while they are written.
//! - [`answer`]: reads answers, also those of servers that bend the format.
//! - [`rate`]: what `x-ratelimit-*` headers said last.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use async_openai::{
    Client,
    config::OpenAIConfig,
    error::OpenAIError,
    types::{
        chat::{CreateChatCompletionRequest, CreateChatCompletionResponse},
        embeddings::EmbeddingInput,
    },
};
use async_trait::async_trait;
use url::Url;

use crate::{
    Dependency, Tokens, UpstreamError,
    config::OpenAiConfig,
    http_client,
    ledger::Usage,
    model::{Billed, ChatAnswer, ChatModel, ChatRequest, Embedder, Embeddings, Listener, ModelError},
};

mod answer;
mod bound;
mod params;
mod rate;
mod service;
mod stream;

pub use params::best_response_format;
pub use rate::{RateLimitState, RateLimits};

use service::{Failure, OneAttempt};

/// No chat answer is larger.
const MAX_CHAT_ANSWER_BYTES: usize = 16 << 20;
/// A batch of 2048 vectors of 3072 numbers, as text.
const MAX_EMBEDDINGS_ANSWER_BYTES: usize = 192 << 20;

/// What the chat model and the embedder share.
#[derive(Debug)]
struct Endpoint {
    http: reqwest::Client,
    /// Without a slash at its end.
    base_url: String,
    config: OpenAiConfig,
    dependency: Dependency,
    limits: RateLimitState,
}

impl Endpoint {
    fn new(config: &OpenAiConfig, dependency: Dependency) -> Result<Self, UpstreamError> {
        let http = http_client::client(config.timeout).map_err(|error| {
            UpstreamError::misconfigured(
                dependency,
                "OPENAI_BASE_URL",
                format!("no HTTP client could be made: {error}"),
                "check the system's TLS certificates",
            )
        })?;
        Ok(Self {
            http,
            base_url: config.base_url.as_str().trim_end_matches('/').to_owned(),
            config: config.clone(),
            dependency,
            limits: RateLimitState::default(),
        })
    }

    /// A client for one call: making one is cheap, and the service knows whose call it is.
    fn client(
        self: &Arc<Self>,
        model: &str,
        request_id: &str,
        max_answer_bytes: usize,
    ) -> Client<OpenAIConfig> {
        // Organisation and project are not read from the environment behind our configuration's back;
        // the service sets the key.
        let config = OpenAIConfig::new()
            .with_api_base(&self.base_url)
            .with_api_key("")
            .with_org_id("")
            .with_project_id("");
        Client::build(self.http.clone(), config).with_http_service(OneAttempt {
            endpoint: Arc::clone(self),
            model: model.to_owned(),
            request_id: request_id.to_owned(),
            max_answer_bytes,
        })
    }

    /// The variable in which this endpoint's model is set.
    fn model_variable(&self) -> &'static str {
        if self.dependency == Dependency::Embedder { "OPENAI_EMBEDDING_MODEL" } else { "OPENAI_MODEL" }
    }

    /// True when the configuration names the model, false when a request's metadata did.
    fn is_configured(&self, model: &str) -> bool {
        self.config.models.iter().any(|known| known == model)
            || self.config.embedding_model.as_deref() == Some(model)
    }

    /// A failure behind the transport: the answer arrived and is of no use.
    fn unreadable(&self, message: impl std::fmt::Display, usage: Option<Usage>) -> ModelError {
        ModelError {
            error: UpstreamError::transient(self.dependency, format!("the answer is unreadable: {message}")),
            billed: usage.map_or(Billed::Unknown, Billed::Known),
        }
    }

    /// What `async-openai` made of a failed call.
    fn failure(&self, error: OpenAIError) -> ModelError {
        match error {
            OpenAIError::Boxed(inner) => match inner.downcast::<Failure>() {
                Ok(failure) => failure.0,
                Err(other) => self.unreadable(self.sanitised(&other.to_string()), None),
            },
            // Only successful answers reach the crate, so what fails now was billed.
            other => self.unreadable(self.sanitised(&other.to_string()), None),
        }
    }

    /// An untrusted text for a message: short, on one line, without anything like a key.
    fn sanitised(&self, text: &str) -> String {
        service::sanitise(text, self.config.api_key.as_ref())
    }
}

/// The chat model of `OPENAI_BASE_URL`.
#[derive(Clone, Debug)]
pub struct OpenAiChat {
    endpoint: Arc<Endpoint>,
    margins: Arc<bound::Margins>,
    /// Set once the server refused to stream: it is not asked again.
    no_streams: Arc<AtomicBool>,
}

impl OpenAiChat {
    /// Makes the client; connects on first use.
    pub fn new(config: &OpenAiConfig) -> Result<Self, UpstreamError> {
        Ok(Self {
            endpoint: Arc::new(Endpoint::new(config, Dependency::Model)?),
            margins: Arc::default(),
            no_streams: Arc::default(),
        })
    }

    /// What the API said last about its rate limits.
    pub fn rate_limits(&self) -> &RateLimitState {
        &self.endpoint.limits
    }

    /// A client for this call, and what it sends.
    fn call(&self, request: &ChatRequest) -> (Client<OpenAIConfig>, CreateChatCompletionRequest) {
        let endpoint = &self.endpoint;
        let body = params::request_body(request, &endpoint.config.base_url);
        (endpoint.client(&request.model, &request.request_id, MAX_CHAT_ANSWER_BYTES), body)
    }

    fn answer(
        &self,
        result: Result<CreateChatCompletionResponse, OpenAIError>,
    ) -> Result<ChatAnswer, ModelError> {
        let endpoint = &self.endpoint;
        match result {
            Ok(response) => answer::typed(response).map_err(|(why, usage)| endpoint.unreadable(why, usage)),
            Err(OpenAIError::JSONDeserialize(error, raw)) => answer::lenient(&raw)
                .map_err(|usage| endpoint.unreadable(endpoint.sanitised(&error.to_string()), usage)),
            Err(error) => Err(endpoint.failure(error)),
        }
    }

    /// As [`ChatModel::check`], for one of the models.
    pub async fn check_model(&self, model: &str) -> Result<(), UpstreamError> {
        service::check_model(&self.endpoint, model).await
    }
}

#[async_trait]
impl ChatModel for OpenAiChat {
    async fn complete(&self, request: &ChatRequest) -> Result<ChatAnswer, ModelError> {
        let (client, body) = self.call(request);
        self.answer(client.chat().create(body).await)
    }

    async fn complete_and_forget(&self, request: ChatRequest) -> Result<ChatAnswer, ModelError> {
        let (client, body) = self.call(&request);
        drop(request);
        self.answer(client.chat().create(body).await)
    }

    async fn stream(&self, request: &ChatRequest, listener: &dyn Listener) -> Result<ChatAnswer, ModelError> {
        if self.endpoint.config.stream && !self.no_streams.load(Ordering::Relaxed) {
            match stream::complete(&self.endpoint, request, listener).await {
                // It was refused, so nothing was billed: ask as if nobody listened.
                Err(refused) if stream::is_unsupported(&refused) => {
                    self.no_streams.store(true, Ordering::Relaxed);
                    tracing::warn!(error = %refused, "the server does not stream; answers come whole from here on");
                }
                result => return result,
            }
        }
        let answer = self.complete(request).await?;
        if let Some(content) = &answer.content {
            listener.wrote(content);
        }
        Ok(answer)
    }

    fn prompt_tokens_upper_bound(&self, model: &str, request: &ChatRequest) -> Tokens {
        self.margins.prompt_tokens(model, request)
    }

    fn note_overrun(&self, request: &ChatRequest, reserved: Tokens, billed: Usage) {
        self.margins.note_overrun(request, reserved, billed);
    }

    fn pace(&self, model: &str, tokens: Tokens) -> Duration {
        self.endpoint.limits.take(model, tokens)
    }

    async fn check(&self) -> Result<(), UpstreamError> {
        match self.endpoint.config.models.first() {
            Some(model) => service::check_model(&self.endpoint, model).await,
            None => Ok(()),
        }
    }
}

/// The embedding model of `OPENAI_BASE_URL`.
#[derive(Clone, Debug)]
pub struct OpenAiEmbedder {
    endpoint: Arc<Endpoint>,
    model: String,
}

impl OpenAiEmbedder {
    /// Makes the client; connects on first use. `None` with `OPENAI_EMBEDDING_MODEL=none`.
    pub fn new(config: &OpenAiConfig) -> Result<Option<Self>, UpstreamError> {
        let Some(model) = config.embedding_model.clone() else { return Ok(None) };
        Ok(Some(Self { endpoint: Arc::new(Endpoint::new(config, Dependency::Embedder)?), model }))
    }

    /// What the API said last about its rate limits.
    pub fn rate_limits(&self) -> &RateLimitState {
        &self.endpoint.limits
    }

    /// Is the server reachable, the key right, and does it know the model? Costs no tokens.
    pub async fn check(&self) -> Result<(), UpstreamError> {
        service::check_model(&self.endpoint, &self.model).await
    }
}

#[async_trait]
impl Embedder for OpenAiEmbedder {
    async fn embed(&self, texts: &[String], request_id: &str) -> Result<Embeddings, ModelError> {
        if texts.is_empty() {
            return Ok(Embeddings { vectors: Vec::new(), usage: Some(Usage::default()) });
        }
        let endpoint = &self.endpoint;
        let client = endpoint.client(&self.model, request_id, MAX_EMBEDDINGS_ANSWER_BYTES);
        let body = async_openai::types::embeddings::CreateEmbeddingRequest {
            model: self.model.clone(),
            input: EmbeddingInput::StringArray(texts.to_vec()),
            ..Default::default()
        };
        let embeddings = match client.embeddings().create(body).await {
            Ok(response) => answer::typed_embeddings(response, texts.len()),
            Err(OpenAIError::JSONDeserialize(_, raw)) => answer::lenient_embeddings(&raw, texts.len()),
            Err(error) => return Err(endpoint.failure(error)),
        };
        embeddings.map_err(|(why, usage)| endpoint.unreadable(why, usage))
    }

    fn model(&self) -> &str {
        &self.model
    }

    fn tokens_upper_bound(&self, texts: &[String]) -> Tokens {
        bound::embedding_tokens(&self.model, texts)
    }

    fn pace(&self, tokens: Tokens) -> Duration {
        self.endpoint.limits.take(&self.model, tokens)
    }
}

/// True for OpenAI's own API, which knows parameters that others do not.
fn is_openai(base_url: &Url) -> bool {
    base_url.host_str() == Some("api.openai.com")
}
