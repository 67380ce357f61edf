//! One attempt over HTTP, and what its failure means.
//!
//! The service sees what `async-openai` hides: status, headers and raw body. A failure leaves it as a
//! [`Failure`], finished: what to do, and what to book. Only successful answers reach the crate.
//!
//! What is booked: nothing when the request was refused (4xx), never arrived (no connection), or the API
//! itself failed (a 5xx in JSON); *unknown* when the server may have generated (timeout, a connection cut
//! after sending, a 5xx of a proxy).

use std::{
    fmt::Write as _,
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use async_openai::{error::OpenAIError, middleware::HttpRequestFactory};
use http::{HeaderMap, HeaderValue, StatusCode, header};
use serde_json::Value;

use super::Endpoint;
use crate::{
    Secret, UpstreamError, http_client,
    model::{Billed, ModelError},
};

/// Carried to the provider's log, and to the simulator's meter.
const REQUEST_ID_HEADER: &str = "x-client-request-id";
/// OpenAI refuses longer ones.
const MAX_REQUEST_ID: usize = 512;
/// Enough of an error's body to know what it says.
const MAX_ERROR_BYTES: usize = 64 << 10;
/// Enough of an untrusted text for a log line.
const MAX_EXCERPT: usize = 500;

/// A failed call, on its way through `async-openai`.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub(super) struct Failure(pub(super) ModelError);

impl From<Failure> for OpenAIError {
    fn from(failure: Failure) -> Self {
        Self::Boxed(Box::new(failure))
    }
}

/// Sends one request, once.
#[derive(Clone, Debug)]
pub(super) struct OneAttempt {
    pub(super) endpoint: Arc<Endpoint>,
    pub(super) model: String,
    pub(super) request_id: String,
    pub(super) max_answer_bytes: usize,
}

impl tower::Service<HttpRequestFactory> for OneAttempt {
    type Response = reqwest::Response;
    type Error = Failure;
    type Future = Pin<Box<dyn Future<Output = Result<reqwest::Response, Failure>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Failure>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: HttpRequestFactory) -> Self::Future {
        let this = self.clone();
        Box::pin(async move { this.attempt(request).await.map_err(Failure) })
    }
}

impl OneAttempt {
    async fn attempt(&self, factory: HttpRequestFactory) -> Result<reqwest::Response, ModelError> {
        let endpoint = &self.endpoint;
        let mut request = factory.build().await.map_err(|error| ModelError {
            error: UpstreamError::permanent(
                endpoint.dependency,
                "invalid_request",
                endpoint.sanitised(&error.to_string()),
            ),
            billed: Billed::Nothing,
        })?;
        drop(factory);
        // Many calls wait at once. A body that cannot be sent again, which it never is, is let go of as soon as
        // it is sent; its length is said all the same.
        if let Some(body) = request.body_mut() {
            *body = reqwest::Body::wrap(std::mem::take(body));
        }
        let response = self.send(request).await?;
        let (status, headers) = (response.status(), response.headers().clone());
        let body =
            http_client::bounded_body(response, self.max_answer_bytes).await.map_err(|error| ModelError {
                error: UpstreamError::transient(endpoint.dependency, error),
                billed: Billed::Unknown,
            })?;
        let mut whole = http::Response::new(reqwest::Body::from(body));
        *whole.status_mut() = status;
        *whole.headers_mut() = headers;
        Ok(whole.into())
    }

    /// Sends a request, once, and gives the answer if its status says success; its body is not read.
    pub(super) async fn send(&self, mut request: reqwest::Request) -> Result<reqwest::Response, ModelError> {
        let endpoint = &self.endpoint;
        set_headers(endpoint, &self.request_id, request.headers_mut())
            .map_err(|error| ModelError { error, billed: Billed::Nothing })?;
        let response = endpoint.http.execute(request).await.map_err(|error| {
            // Without a connection nothing was sent; after that nobody can know.
            let billed =
                if error.is_connect() || error.is_builder() { Billed::Nothing } else { Billed::Unknown };
            ModelError { error: unreachable(endpoint, &error), billed }
        })?;
        let (status, headers) = (response.status(), response.headers().clone());
        endpoint.limits.note(&self.model, &headers, status == StatusCode::TOO_MANY_REQUESTS);
        if status.is_success() {
            return Ok(response);
        }
        let body = http_client::bounded_body(response, MAX_ERROR_BYTES).await.unwrap_or_default();
        Err(self.refusal(status, &headers, &ErrorBody::read(&body)))
    }

    /// What an answer with an error status means.
    fn refusal(&self, status: StatusCode, headers: &HeaderMap, body: &ErrorBody) -> ModelError {
        let endpoint = &self.endpoint;
        let dependency = endpoint.dependency;
        let message = format!("{} ({status})", endpoint.sanitised(&body.message));
        let retry_after = http_client::retry_after(headers);
        let transient = |message: String| UpstreamError::Transient { dependency, message, retry_after };
        let permanent = |code: &str, message: String| UpstreamError::permanent(dependency, code, message);
        let misconfigured = |variable, message: String, fix: &str| {
            UpstreamError::misconfigured(dependency, variable, message, fix)
        };
        let error = match status {
            // What a server in trouble says is no more than that.
            status if status.is_server_error() => transient(message),
            _ if body.is_quota() => misconfigured(
                "OPENAI_API_KEY",
                message,
                "the account behind the key has no quota left: add credit or raise its limit, or use another key",
            ),
            _ if body.is_context_length() => permanent("context_length_exceeded", message),
            _ if body.is_content_policy() => permanent("content_policy", message),
            // A model that a request asked for is that request's fault, not the fleet's.
            _ if body.is_unknown_model(status) && !endpoint.is_configured(&self.model) => {
                permanent("unknown_model", message)
            }
            _ if body.is_unknown_model(status) => misconfigured(
                endpoint.model_variable(),
                message,
                &format!(
                    "{:?} is not served at OPENAI_BASE_URL, or not for this key: name one that is",
                    self.model
                ),
            ),
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => misconfigured(
                "OPENAI_API_KEY",
                message,
                match endpoint.config.api_key {
                    Some(_) => "set a valid key that may use this model",
                    None => "this server wants a key: set one",
                },
            ),
            StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED => misconfigured(
                "OPENAI_BASE_URL",
                message,
                "set it to the address of an OpenAI-compatible API, with its version, such as https://api.openai.com/v1",
            ),
            status if status.is_redirection() => misconfigured(
                "OPENAI_BASE_URL",
                message,
                "the server redirects: set the address it redirects to",
            ),
            StatusCode::TOO_MANY_REQUESTS if body.is_too_large_for_rate() => {
                permanent("request_too_large", message)
            }
            StatusCode::TOO_MANY_REQUESTS | StatusCode::CONFLICT | StatusCode::REQUEST_TIMEOUT => {
                transient(message)
            }
            StatusCode::PAYLOAD_TOO_LARGE => permanent("request_too_large", message),
            StatusCode::BAD_REQUEST | StatusCode::UNPROCESSABLE_ENTITY if body.is_format_unsupported() => {
                misconfigured(
                    "OPENAI_RESPONSE_FORMAT",
                    message,
                    "this server cannot do what was asked for: set json_object or text",
                )
            }
            _ => permanent("invalid_request", message),
        };
        // Below 500 a server refused before it generated; a 5xx in which the API itself speaks JSON is
        // its own failure, which it does not bill. A 408, 502 or 504, or the HTML of a proxy, may hide a
        // generation. Booking the API's own failures as spent would let an outage eat the day's budget.
        let hides = matches!(
            status,
            StatusCode::REQUEST_TIMEOUT | StatusCode::BAD_GATEWAY | StatusCode::GATEWAY_TIMEOUT
        );
        let refused = !hides && (!status.is_server_error() || body.is_json);
        ModelError { error, billed: if refused { Billed::Nothing } else { Billed::Unknown } }
    }
}

/// True for server-sent events.
pub(super) fn is_event_stream(headers: &HeaderMap) -> bool {
    headers
        .get(header::CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .is_some_and(|kind| kind.trim_start().to_ascii_lowercase().starts_with("text/event-stream"))
}

/// Sets the key (or none) and the request id.
fn set_headers(endpoint: &Endpoint, request_id: &str, headers: &mut HeaderMap) -> Result<(), UpstreamError> {
    match &endpoint.config.api_key {
        Some(key) => {
            let mut value = HeaderValue::try_from(format!("Bearer {}", key.expose())).map_err(|_| {
                UpstreamError::misconfigured(
                    endpoint.dependency,
                    "OPENAI_API_KEY",
                    "the key has characters that no key has",
                    "copy it again, on one line, without quotes",
                )
            })?;
            value.set_sensitive(true);
            headers.insert(header::AUTHORIZATION, value);
        }
        None => {
            headers.remove(header::AUTHORIZATION);
        }
    }
    let id: String = request_id.chars().filter(char::is_ascii_graphic).take(MAX_REQUEST_ID).collect();
    if let Ok(value) = HeaderValue::try_from(id) {
        headers.insert(REQUEST_ID_HEADER, value);
    }
    Ok(())
}

/// No answer at all.
fn unreachable(endpoint: &Endpoint, error: &reqwest::Error) -> UpstreamError {
    let mut message = http_client::describe(error);
    if error.is_connect() {
        let _ = write!(message, " (OPENAI_BASE_URL is {})", address(&endpoint.config.base_url));
    } else if error.is_timeout() {
        let _ = write!(message, " (OPENAI_TIMEOUT_SECONDS is {})", endpoint.config.timeout.as_secs());
    }
    UpstreamError::transient(endpoint.dependency, message)
}

/// A URL without what may be secret in it.
fn address(url: &url::Url) -> String {
    let port = url.port().map(|port| format!(":{port}")).unwrap_or_default();
    format!("{}://{}{port}", url.scheme(), url.host_str().unwrap_or_default())
}

/// Asks the server whether it knows a model. Costs no tokens. Servers that have no such route are
/// taken at their word: the first call will tell.
pub(super) async fn check_model(endpoint: &Arc<Endpoint>, model: &str) -> Result<(), UpstreamError> {
    let mut url = endpoint.config.base_url.clone();
    if let Ok(mut path) = url.path_segments_mut() {
        path.pop_if_empty().push("models").push(model);
    }
    let mut request = reqwest::Request::new(http::Method::GET, url);
    *request.timeout_mut() = Some(endpoint.config.timeout.min(Duration::from_secs(15)));
    set_headers(endpoint, "check", request.headers_mut())?;
    let response = endpoint.http.execute(request).await.map_err(|error| unreachable(endpoint, &error))?;
    let (status, headers) = (response.status(), response.headers().clone());
    if status.is_success() {
        return Ok(());
    }
    let body =
        ErrorBody::read(&http_client::bounded_body(response, MAX_ERROR_BYTES).await.unwrap_or_default());
    if matches!(status, StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED | StatusCode::NOT_IMPLEMENTED)
        && !body.is_unknown_model(status)
    {
        return Ok(());
    }
    let attempt = OneAttempt {
        endpoint: Arc::clone(endpoint),
        model: model.to_owned(),
        request_id: String::new(),
        max_answer_bytes: 0,
    };
    Err(attempt.refusal(status, &headers, &body).error)
}

/// What the body of a refusal says, in whichever of the common shapes.
#[derive(Debug, Default, PartialEq)]
struct ErrorBody {
    message: String,
    /// `code` and `type`, lower case.
    codes: Vec<String>,
    param: String,
    /// The API itself speaks, not a proxy before it.
    is_json: bool,
}

impl ErrorBody {
    fn read(body: &[u8]) -> Self {
        let text = String::from_utf8_lossy(body);
        let Ok(value) = serde_json::from_str::<Value>(&text) else {
            return Self { message: text.into_owned(), ..Self::default() };
        };
        // OpenAI: {"error": {…}}; some servers send an array of that, {"error": "…"}, or the fields bare.
        let value = value.get(0).unwrap_or(&value);
        let error = value.get("error").filter(|error| !error.is_null()).unwrap_or(value);
        let word = |field: &str| match error.get(field) {
            Some(Value::String(text)) => Some(text.to_ascii_lowercase()),
            _ => None,
        };
        let message = match (error, ["message", "detail", "msg"].iter().find_map(|field| error.get(field))) {
            (Value::String(text), _) | (_, Some(Value::String(text))) => text.clone(),
            _ => text.into_owned(),
        };
        let inner = error.get("innererror").and_then(|inner| inner.get("code")).and_then(Value::as_str);
        Self {
            is_json: true,
            message,
            codes: [word("code"), word("type"), inner.map(str::to_ascii_lowercase)]
                .into_iter()
                .flatten()
                .collect(),
            param: word("param").unwrap_or_default(),
        }
    }

    fn has_code(&self, codes: &[&str]) -> bool {
        self.codes.iter().any(|code| codes.contains(&code.as_str()))
    }

    fn says(&self, words: &[&str]) -> bool {
        let message = self.message.to_ascii_lowercase();
        words.iter().any(|word| message.contains(word))
    }

    fn is_quota(&self) -> bool {
        self.has_code(&[
            "insufficient_quota",
            "billing_hard_limit_reached",
            "billing_not_active",
            "account_deactivated",
            "access_terminated",
        ])
    }

    fn is_context_length(&self) -> bool {
        self.has_code(&["context_length_exceeded", "exceed_context_size_error", "string_above_max_length"])
            || self.says(&[
                "maximum context length",
                "context window",
                "context size",
                "maximum input length",
            ])
    }

    fn is_content_policy(&self) -> bool {
        self.has_code(&[
            "content_filter",
            "content_policy_violation",
            "responsibleaipolicyviolation",
            "invalid_prompt",
        ])
    }

    fn is_unknown_model(&self, status: StatusCode) -> bool {
        self.has_code(&["model_not_found", "deploymentnotfound", "model_not_available", "unknown_model"])
            || (matches!(status, StatusCode::NOT_FOUND | StatusCode::BAD_REQUEST)
                && self.says(&["model"])
                && self.says(&[
                    "does not exist",
                    "not found",
                    "unknown model",
                    "no such model",
                    "not available",
                ]))
    }

    /// One request above the account's tokens a minute: it will never pass.
    fn is_too_large_for_rate(&self) -> bool {
        self.says(&["request too large"])
    }

    fn is_format_unsupported(&self) -> bool {
        (self.param.starts_with("response_format") || self.says(&["response_format", "json_schema"]))
            // Our schema is at fault then, not the setting.
            && !self.says(&["invalid schema"])
    }
}

/// An untrusted text for a message: short, on one line, without anything like a key.
pub(super) fn sanitise(text: &str, key: Option<&Secret>) -> String {
    let mut text = text.to_owned();
    if let Some(key) = key {
        text = text.replace(key.expose(), "***");
    }
    // Servers quote (parts of) the key they were given; other keys may be in there too.
    for prefix in ["sk-", "Bearer "] {
        let mut clean = String::with_capacity(text.len());
        let mut rest = text.as_str();
        while let Some(at) = rest.find(prefix) {
            let (before, found) = rest.split_at(at + prefix.len());
            clean.push_str(before);
            clean.push_str("***");
            rest = found.trim_start_matches(|c: char| {
                c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '*' | '.')
            });
        }
        clean.push_str(rest);
        text = clean;
    }
    http_client::excerpt(&text, MAX_EXCERPT)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(body: &str) -> ErrorBody {
        ErrorBody::read(body.as_bytes())
    }

    #[test]
    fn errors_are_read_in_every_common_shape() {
        let openai = read(
            r#"{"error":{"message":"too long","type":"invalid_request_error","param":"messages","code":"context_length_exceeded"}}"#,
        );
        assert_eq!(openai.message, "too long");
        assert!(openai.is_context_length());
        assert!(
            read(r#"{"error":{"code":400,"message":"x","type":"exceed_context_size_error"}}"#)
                .is_context_length()
        );
        assert!(
            read(r#"{"detail":"This model's maximum context length is 4096 tokens."}"#).is_context_length()
        );
        assert_eq!(read(r#"{"error":"model 'x' not found"}"#).message, "model 'x' not found");
        assert_eq!(read(r#"[{"error":{"message":"m"}}]"#).message, "m");
        assert_eq!(read("<html>502</html>").message, "<html>502</html>");
        assert_eq!(read("null").message, "null");
        assert_eq!(ErrorBody::read(&[0xff, 0xfe]).codes, Vec::<String>::new());
        assert!(
            read(
                r#"{"error":{"code":"content_filter","innererror":{"code":"ResponsibleAIPolicyViolation"}}}"#
            )
            .is_content_policy()
        );
    }

    #[test]
    fn no_key_is_ever_in_a_message() {
        let key = Secret::new("my-odd-key.1");
        let text = "key my-odd-key.1, sk-proj-abc_DEF-123*****xyz. and 'Bearer eyJhbGciOi.J9' end";
        assert_eq!(sanitise(text, Some(&key)), "key ***, sk-*** and 'Bearer ***' end");
        assert_eq!(sanitise("a\nb", None), "a b");
        assert!(sanitise(&"long ".repeat(1000), None).len() < 600);
    }
}
