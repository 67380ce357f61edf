//! Routes, and what all calls go through before they are answered: key, model, script, faults, rates.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    Json, Router,
    body::Body,
    extract::{DefaultBodyLimit, Path, State},
    http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
    routing::{get, post, put},
};
use bytes::Bytes;
use futures::StreamExt as _;
use serde_json::{Value, json};

use crate::{
    BilledCall, Fault, FaultRates, Meter, Shared, SimOptions, Strike, chat, embed,
    fault::{hash, mix},
    rerank,
    script::{Kind, Script, Step},
};

/// Bodies larger than this are refused.
const MAX_BODY_BYTES: usize = 64 << 20;
/// A hanging answer comes after this long, if anybody is still there.
const HANG: Duration = Duration::from_mins(30);
/// How much longer a `slow` call takes, unless a step says.
const SLOW: Duration = Duration::from_secs(2);

/// What every handler gets.
pub(crate) type Sim = Arc<Shared>;

pub(crate) fn router(shared: Sim) -> Router {
    Router::new()
        .route("/v1/chat/completions", post(chat::complete))
        .route("/v1/embeddings", post(embed::embed))
        .route("/v1/rerank", post(rerank::documents))
        .route("/v2/rerank", post(rerank::documents))
        .route("/rerank", post(rerank::texts))
        .route("/v1/models", get(models))
        .route("/v1/models/{model}", get(model))
        .route("/sim/meter", get(meter).delete(reset_meter))
        .route("/sim/calls", get(calls))
        .route("/sim/strikes", get(strikes))
        .route("/sim/faults", put(put_faults))
        .route("/sim/script", get(script).put(put_script).delete(clear_script))
        .route("/health", get(|| async { "ok" }))
        .fallback(|| async {
            error(StatusCode::NOT_FOUND, "unknown_url", "The simulator has no such route.")
        })
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
        .with_state(shared)
}

async fn meter(State(sim): State<Sim>) -> Json<Meter> {
    Json(sim.books().meter.clone())
}

async fn reset_meter(State(sim): State<Sim>) -> StatusCode {
    sim.books().forget();
    StatusCode::NO_CONTENT
}

async fn calls(State(sim): State<Sim>) -> Json<Vec<BilledCall>> {
    Json(sim.books().billed.clone())
}

async fn strikes(State(sim): State<Sim>) -> Json<Vec<Strike>> {
    Json(sim.books().strikes.clone())
}

async fn put_faults(State(sim): State<Sim>, body: String) -> Response {
    match body.parse::<FaultRates>() {
        Ok(rates) => {
            sim.books().faults = rates;
            StatusCode::NO_CONTENT.into_response()
        }
        Err(why) => error(StatusCode::BAD_REQUEST, "invalid_rates", &why),
    }
}

async fn script(State(sim): State<Sim>) -> Json<Vec<Step>> {
    Json(sim.books().script.steps().to_vec())
}

async fn put_script(State(sim): State<Sim>, body: Bytes) -> Response {
    match serde_json::from_slice::<Vec<Step>>(&body) {
        Ok(steps) => {
            sim.books().script = Script::new(steps);
            StatusCode::NO_CONTENT.into_response()
        }
        Err(why) => error(
            StatusCode::BAD_REQUEST,
            "invalid_script",
            &format!("Not a script: {why}. Send a JSON array of steps, such as [{{\"fault\": \"429\"}}]."),
        ),
    }
}

async fn clear_script(State(sim): State<Sim>) -> StatusCode {
    sim.books().script = Script::default();
    StatusCode::NO_CONTENT
}

/// Listed when every model of a known family is served.
const LISTED: &[&str] = &[
    "gpt-4.1",
    "gpt-4.1-mini",
    "gpt-4o",
    "gpt-5",
    "o4-mini",
    "text-embedding-3-small",
    "text-embedding-3-large",
];
const FAMILIES: &[&str] = &["gpt-", "o1", "o3", "o4", "text-embedding-", "sim-"];

fn is_served(sim: &Shared, model: &str) -> bool {
    if sim.options.models.is_empty() {
        FAMILIES.iter().any(|family| model.starts_with(family))
    } else {
        sim.options.models.iter().any(|served| served == model)
    }
}

fn model_card(model: &str) -> Value {
    json!({"id": model, "object": "model", "created": 0, "owned_by": "openai-sim"})
}

async fn models(State(sim): State<Sim>, headers: HeaderMap) -> Response {
    if let Some(refused) = wrong_key(&sim, &headers) {
        return refused;
    }
    let served: Vec<Value> = if sim.options.models.is_empty() {
        LISTED.iter().map(|model| model_card(model)).collect()
    } else {
        sim.options.models.iter().map(|model| model_card(model)).collect()
    };
    Json(json!({"object": "list", "data": served})).into_response()
}

async fn model(State(sim): State<Sim>, headers: HeaderMap, Path(model): Path<String>) -> Response {
    if let Some(refused) = wrong_key(&sim, &headers) {
        return refused;
    }
    if is_served(&sim, &model) { Json(model_card(&model)).into_response() } else { unknown_model(&model) }
}

/// An error in OpenAI's shape.
pub(crate) fn error(status: StatusCode, code: &str, message: &str) -> Response {
    let kind = match status.as_u16() {
        429 => "rate_limit_error",
        500.. => "server_error",
        _ => "invalid_request_error",
    };
    (status, Json(json!({"error": {"message": message, "type": kind, "param": null, "code": code}})))
        .into_response()
}

pub(crate) fn bad_request(code: &str, message: &str) -> Response {
    error(StatusCode::BAD_REQUEST, code, message)
}

fn unknown_model(model: &str) -> Response {
    error(
        StatusCode::NOT_FOUND,
        "model_not_found",
        &format!("The model `{model}` does not exist or you do not have access to it."),
    )
}

fn wrong_key(sim: &Shared, headers: &HeaderMap) -> Option<Response> {
    let required = sim.options.require_key.as_deref()?;
    let given = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let given = given.strip_prefix("Bearer ").unwrap_or_default();
    (given != required).then(|| {
        // As careless as a server can be: the client must not pass the key on.
        error(StatusCode::UNAUTHORIZED, "invalid_api_key", &format!("Incorrect API key provided: {given}."))
    })
}

/// A call that may be answered.
#[derive(Debug)]
pub(crate) struct Admitted {
    pub(crate) request_id: String,
    pub(crate) step: Step,
    pub(crate) fault: Option<Fault>,
}

impl Admitted {
    pub(crate) fn is(&self, fault: Fault) -> bool {
        self.fault == Some(fault)
    }

    /// An id for the answer, the same for the same call.
    pub(crate) fn answer_id(&self, prefix: &str) -> String {
        format!("{prefix}-{:016x}", mix(hash(self.request_id.as_bytes())))
    }

    /// Takes as long as it was told to.
    pub(crate) async fn take_time(&self, sim: &Shared, completion_tokens: u64) {
        let tokens = u32::try_from(completion_tokens).unwrap_or(u32::MAX);
        let mut time = sim.options.latency + sim.options.latency_per_token.saturating_mul(tokens);
        match self.step.delay_ms {
            Some(delay) => time += Duration::from_millis(delay),
            None if self.is(Fault::Slow) => time += SLOW,
            None => {}
        }
        if self.is(Fault::Hang) {
            time = HANG;
        }
        if !time.is_zero() {
            tokio::time::sleep(time).await;
        }
    }
}

/// Everything that may refuse a call before it costs anything. `tokens`: prompt and cap.
pub(crate) fn admit(
    sim: &Shared,
    headers: &HeaderMap,
    kind: Kind,
    model: &str,
    prompt: &str,
    tokens: u64,
) -> Result<Admitted, Response> {
    let request_id = headers
        .get("x-client-request-id")
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default()
        .to_owned();
    let (step, fault) = {
        let mut books = sim.books();
        books.meter.arrived();
        let step = books.script.take(kind, &request_id, prompt);
        let draw = books.seen.draw(sim.options.seed, &request_id, "fault");
        // A scripted call is exactly as the script says.
        let fault = match &step {
            Some(step) => step.fault,
            None => books.faults.pick(draw),
        };
        if let Some(fault) = fault {
            books.struck(&request_id, fault);
        }
        (step.unwrap_or_default(), fault)
    };
    if let Some(refused) = wrong_key(sim, headers) {
        return Err(refused);
    }
    if !is_served(sim, model) {
        return Err(unknown_model(model));
    }
    if let Some((fault, status)) = fault.and_then(|fault| Some((fault, fault.refusal_status()?))) {
        let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        return Err(refusal(fault, status, model, step.retry_after));
    }
    sim.books().windows.take(sim, model, tokens)?;
    Ok(Admitted { request_id, step, fault })
}

fn refusal(fault: Fault, status: StatusCode, model: &str, retry_after: Option<f64>) -> Response {
    let mut response = match fault {
        Fault::Unauthorized => {
            error(status, "invalid_api_key", "Incorrect API key provided: sk-sim*****1234.")
        }
        Fault::RateLimitedHtml => html(status, "429 Too Many Requests"),
        Fault::BadGateway => html(status, "502 Bad Gateway"),
        Fault::InsufficientQuota => error(
            status,
            "insufficient_quota",
            "You exceeded your current quota, please check your plan and billing details.",
        ),
        Fault::ContextLength => error(
            status,
            "context_length_exceeded",
            "This model's maximum context length is 8192 tokens. However, your messages resulted in more.",
        ),
        Fault::ContentFilter => {
            error(status, "content_filter", "The response was filtered by the content management policy.")
        }
        Fault::BadRequest => error(status, "invalid_value", "Invalid value for a parameter."),
        Fault::ModelNotFound => unknown_model(model),
        Fault::RateLimited => error(status, "rate_limit_exceeded", "Rate limit reached for requests."),
        _ => error(status, "server_error", "The server had an error while processing your request."),
    };
    let named = matches!(fault, Fault::RateLimited | Fault::RateLimitedHtml | Fault::Overloaded);
    if let Some(seconds) = retry_after.or(named.then_some(1.0))
        && let Ok(value) = HeaderValue::try_from(seconds.to_string())
    {
        response.headers_mut().insert(header::RETRY_AFTER, value);
    }
    response
}

/// Requests and tokens of the current minute, by model.
#[derive(Debug, Default)]
pub(crate) struct Windows(HashMap<String, Window>);

#[derive(Debug)]
struct Window {
    began: Instant,
    requests: u64,
    tokens: u64,
}

impl Windows {
    fn take(&mut self, sim: &Shared, model: &str, tokens: u64) -> Result<(), Response> {
        let (requests, limit) = (sim.options.requests_per_minute, sim.options.tokens_per_minute);
        if requests.is_none() && limit.is_none() {
            return Ok(());
        }
        let now = Instant::now();
        let length = sim.options.rate_window;
        let window = self
            .0
            .entry(model.to_owned())
            .and_modify(|window| {
                if now.duration_since(window.began) >= length {
                    *window = Window { began: now, requests: 0, tokens: 0 };
                }
            })
            .or_insert(Window { began: now, requests: 0, tokens: 0 });
        let fits = requests.is_none_or(|limit| window.requests < limit)
            && limit.is_none_or(|limit| window.tokens + tokens <= limit);
        if !fits {
            let mut response =
                error(StatusCode::TOO_MANY_REQUESTS, "rate_limit_exceeded", "Rate limit reached.");
            let wait =
                (length.saturating_sub(now.duration_since(window.began))).as_secs_f64().ceil().max(1.0);
            insert(response.headers_mut(), "retry-after", &wait.to_string());
            window.headers(&sim.options, now, response.headers_mut());
            return Err(response);
        }
        window.requests += 1;
        window.tokens += tokens;
        Ok(())
    }
}

impl Window {
    fn headers(&self, options: &SimOptions, now: Instant, headers: &mut HeaderMap) {
        let left = options.rate_window.saturating_sub(now.duration_since(self.began));
        // Rounded up: a client that waits exactly so long must find the new window.
        let reset = format!("{}ms", left.as_millis() + 1);
        for (what, limit, used) in [
            ("requests", options.requests_per_minute, self.requests),
            ("tokens", options.tokens_per_minute, self.tokens),
        ] {
            if let Some(limit) = limit {
                insert(headers, &format!("x-ratelimit-limit-{what}"), &limit.to_string());
                let left = limit.saturating_sub(used);
                insert(headers, &format!("x-ratelimit-remaining-{what}"), &left.to_string());
                insert(headers, &format!("x-ratelimit-reset-{what}"), &reset);
            }
        }
    }
}

/// Adds what a successful answer says about the rate limits.
pub(crate) fn rate_headers(sim: &Shared, model: &str, response: &mut Response) {
    let books = sim.books();
    if let Some(window) = books.windows.0.get(model) {
        window.headers(&sim.options, Instant::now(), response.headers_mut());
    }
}

fn insert(headers: &mut HeaderMap, name: &str, value: &str) {
    if let (Ok(name), Ok(value)) = (HeaderName::try_from(name), HeaderValue::try_from(value)) {
        headers.insert(name, value);
    }
}

/// An answer that is lost whole, whether or not it would have been streamed.
pub(crate) fn lost(fault: Option<Fault>) -> Option<Response> {
    match fault? {
        Fault::GatewayTimeout => Some(html(StatusCode::GATEWAY_TIMEOUT, "504 Gateway Time-out")),
        // An answer that breaks before its first byte: hyper drops the connection without a head.
        Fault::Drop => Some(cut_at_once().into_response()),
        _ => None,
    }
}

fn html(status: StatusCode, title: &str) -> Response {
    (status, [(header::CONTENT_TYPE, "text/html")], format!("<html><h1>{title}</h1></html>")).into_response()
}

/// The end of an answer: whole, garbled or cut.
pub(crate) fn send(admitted: &Admitted, body: &Value) -> Response {
    let text = body.to_string();
    let json = [(header::CONTENT_TYPE, "application/json")];
    let half = text.floor_char_boundary(text.len() / 2);
    match admitted.fault {
        Some(Fault::Cut) => (json, cut_body(vec![Bytes::from(text[..half].to_owned())])).into_response(),
        Some(Fault::Truncated) => (json, text[..half].to_owned()).into_response(),
        Some(Fault::Malformed) => (json, format!("{{\"id\": \"sim\", oops {}", text.len())).into_response(),
        Some(Fault::NoChoices) => {
            let usage = &body["usage"];
            (json, json!({"id": "sim", "note": "no answer in here", "usage": usage}).to_string())
                .into_response()
        }
        _ => (json, text).into_response(),
    }
}

/// These chunks, then the connection breaks.
pub(crate) fn cut_body(chunks: Vec<Bytes>) -> Body {
    let broken = futures::stream::once(async {
        // Without a pause the server would drop the connection before it has sent anything.
        tokio::time::sleep(Duration::from_millis(20)).await;
        Err(std::io::Error::other("cut on demand"))
    });
    Body::from_stream(futures::stream::iter(chunks.into_iter().map(Ok)).chain(broken))
}

/// No chunk at all: the connection breaks before a head is sent.
fn cut_at_once() -> Body {
    Body::from_stream(futures::stream::once(async {
        Err::<Bytes, _>(std::io::Error::other("dropped on demand"))
    }))
}
