//! Calls of Supabase's SQL functions, through PostgREST.
//!
//! The `postgrest` crate is the request builder that it is, and never opens a socket: its HTTP stack
//! (reqwest 0.11) has advisories without a fix. [`RpcClient`] takes what it built and sends it with our
//! own reqwest 0.13 client, which brings bounded time, bounded bodies and connection reuse.
//!
//! Every function takes one argument, `args jsonb`, so every call is a POST of `{"args": …}`. Nothing is
//! retried here: retries live in one layer ([`crate::resilience`]), and the functions are idempotent.

use std::{fmt, time::Duration};

use http::StatusCode;
use reqwest::header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::Value;

use crate::{
    Dependency, UNSTORABLE, UpstreamError, config::SupabaseConfig, http_client, ledger::LedgerError,
};

/// Most that is read of an answer: `get_run` of a long run, or a batch of claimed runs.
const MAX_ANSWER_BYTES: usize = 64 * 1024 * 1024;

/// Most that is quoted of an answer that is not what it should be.
const MAX_QUOTE_CHARS: usize = 200;

const KEY_FIX: &str = "copy the service_role key (not the anon key) from the project's API settings";
const MIGRATE_FIX: &str = "run `atlas migrate up` against the project's database; if that has been done, check that the URL is that project's";
const URL_FIX: &str = "set it to the project's URL without a path, such as https://YOUR-PROJECT.supabase.co";

/// Calls SQL functions as `service_role`.
#[derive(Clone)]
pub struct RpcClient {
    builder: postgrest::Postgrest,
    http: reqwest::Client,
    host: String,
}

impl fmt::Debug for RpcClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RpcClient").field("host", &self.host).finish_non_exhaustive()
    }
}

/// Why a call brought nothing.
#[derive(Debug, thiserror::Error)]
pub enum RpcError {
    /// The function refused a stale lease.
    #[error("the lease is stale")]
    Fenced,
    /// Anything else.
    #[error(transparent)]
    Upstream(#[from] UpstreamError),
}

impl RpcError {
    /// The same for callers that know which attempt they spoke for.
    pub fn for_attempt(self, attempt: u32) -> LedgerError {
        match self {
            Self::Fenced => LedgerError::Fenced { attempt },
            Self::Upstream(error) => LedgerError::Upstream(error),
        }
    }
}

/// Calls that name no attempt are never fenced by the functions.
impl From<RpcError> for LedgerError {
    fn from(error: RpcError) -> Self {
        error.for_attempt(0)
    }
}

/// What PostgREST says of a failure.
#[derive(Debug, Default, Deserialize)]
struct Fault {
    #[serde(default)]
    code: Option<String>,
    #[serde(default)]
    message: Option<String>,
    #[serde(default)]
    details: Option<Value>,
}

impl RpcClient {
    /// A client for one project.
    pub fn new(config: &SupabaseConfig) -> Result<Self, UpstreamError> {
        let invalid = |_| {
            UpstreamError::misconfigured(
                Dependency::Store,
                "SUPABASE_SERVICE_ROLE_KEY",
                "has characters that no key has",
                KEY_FIX,
            )
        };
        let key = config.service_role_key.expose();
        let mut api_key = HeaderValue::from_str(key).map_err(invalid)?;
        let mut bearer = HeaderValue::from_str(&format!("Bearer {key}")).map_err(invalid)?;
        api_key.set_sensitive(true);
        bearer.set_sensitive(true);
        let mut headers = HeaderMap::new();
        headers.insert("apikey", api_key);
        headers.insert(AUTHORIZATION, bearer);
        let http =
            http_client::builder(config.timeout).default_headers(headers).build().map_err(|error| {
                UpstreamError::permanent(Dependency::Store, "no_http_client", http_client::describe(&error))
            })?;
        let base = format!("{}/rest/v1", config.url.as_str().trim_end_matches('/'));
        Ok(Self {
            builder: postgrest::Postgrest::new(base),
            http,
            host: config.url.host_str().unwrap_or("?").to_owned(),
        })
    }

    /// Calls `function` with `{"args": args}` and reads its answer.
    pub async fn call<A, T>(&self, function: &str, args: &A) -> Result<T, RpcError>
    where
        A: Serialize + Sync + ?Sized,
        T: DeserializeOwned,
    {
        let response = self.send(function, body_of(args)?).await?;
        let status = response.status();
        let is_json = response
            .headers()
            .get(CONTENT_TYPE)
            .and_then(|value| value.to_str().ok())
            .is_some_and(|kind| kind.contains("json"));
        let retry_after = http_client::retry_after(response.headers());
        let answer = http_client::bounded_body(response, MAX_ANSWER_BYTES)
            .await
            .map_err(|error| UpstreamError::transient(Dependency::Store, format!("{function}: {error}")))?;
        if !status.is_success() {
            return Err(self.fault(function, status, is_json, retry_after, &answer));
        }
        serde_json::from_slice(&answer).map_err(|error| {
            if is_json {
                // Both sides are ours: a newer or older schema than this process knows.
                UpstreamError::misconfigured(
                    Dependency::Store,
                    "SUPABASE_URL",
                    format!("{function} answered something this release does not know: {error}"),
                    MIGRATE_FIX,
                )
                .into()
            } else {
                self.not_postgrest(status, &answer)
            }
        })
    }

    async fn send(&self, function: &str, body: String) -> Result<reqwest::Response, UpstreamError> {
        let built = self.builder.rpc(function, body).build().build().map_err(|error| {
            UpstreamError::misconfigured(Dependency::Store, "SUPABASE_URL", error.without_url(), URL_FIX)
        })?;
        // The two reqwest versions share no types: what was built crosses over as text and bytes.
        let method = reqwest::Method::from_bytes(built.method().as_str().as_bytes())
            .map_err(|error| UpstreamError::permanent(Dependency::Store, "store_bug", error))?;
        let mut request = self.http.request(method, built.url().as_str());
        for (name, value) in built.headers() {
            request = request.header(name.as_str(), value.as_bytes());
        }
        if let Some(body) = built.body().and_then(|body| body.as_bytes()) {
            request = request.body(body.to_vec());
        }
        request.send().await.map_err(|error| {
            UpstreamError::transient(
                Dependency::Store,
                format!("{function} at {}: {}", self.host, http_client::describe(&error)),
            )
        })
    }

    fn fault(
        &self,
        function: &str,
        status: StatusCode,
        is_json: bool,
        retry_after: Option<Duration>,
        answer: &[u8],
    ) -> RpcError {
        let fault: Fault = serde_json::from_slice(answer).unwrap_or_default();
        let code = fault.code.as_deref().unwrap_or_default();
        let message = fault.message.clone().unwrap_or_default();
        let detail = match &fault.details {
            Some(Value::String(text)) => text.clone(),
            _ => message.clone(),
        };
        let misconfigured = |variable, text: String, fix: &str| {
            UpstreamError::misconfigured(Dependency::Store, variable, text, fix).into()
        };
        let told = || {
            let said = if message.is_empty() { quote(answer) } else { format!("{message} ({code})") };
            format!("{function}: HTTP {status}: {said}")
        };
        let transient = || {
            RpcError::Upstream(UpstreamError::Transient {
                dependency: Dependency::Store,
                message: told(),
                retry_after,
            })
        };
        let unstorable = || UpstreamError::permanent(Dependency::Store, UNSTORABLE, told()).into();
        let is_of = |classes: &[&str]| code.len() == 5 && classes.iter().any(|class| code.starts_with(class));
        match (status.as_u16(), code) {
            (_, "PT409") if message == "fenced" => RpcError::Fenced,
            (_, code) if code.starts_with("PT4") => {
                UpstreamError::permanent(Dependency::Store, &message, detail).into()
            }
            // 42501: this role may not execute the function. PGRST3xx: the JWT is not accepted.
            (401 | 403, _) | (_, "42501" | "PGRST300" | "PGRST301" | "PGRST302" | "PGRST303") => {
                let said = if message.is_empty() { quote(answer) } else { message };
                misconfigured(
                    "SUPABASE_SERVICE_ROLE_KEY",
                    format!("{} does not accept the key (HTTP {status}: {said})", self.host),
                    KEY_FIX,
                )
            }
            // A function or a table is not there, or not visible to PostgREST.
            (
                _,
                "PGRST202" | "PGRST203" | "PGRST205" | "PGRST106" | "42883" | "42P01" | "42703" | "3F000",
            ) => misconfigured(
                "SUPABASE_URL",
                format!("the database at {} lacks what `{function}` needs: {message}", self.host),
                MIGRATE_FIX,
            ),
            // Lock, statement and connection limits; serialization; shutdown and crash recovery.
            _ if is_of(&["40", "53", "55", "57", "58", "08"]) => transient(),
            // Larger than the server takes, or not read by it (ours is always JSON); class 22, data that no column
            // of the kind can hold; class 54, more than Postgres takes.
            (413, _) | (_, "PGRST102") => unstorable(),
            _ if is_of(&["22", "54"]) => unstorable(),
            (408 | 425 | 429 | 500..=599, _) => transient(),
            _ if !is_json || code.is_empty() => self.not_postgrest(status, answer),
            _ => UpstreamError::permanent(
                Dependency::Store,
                "store_refused",
                format!("{function}: HTTP {status}: {message} ({code})"),
            )
            .into(),
        }
    }

    fn not_postgrest(&self, status: StatusCode, answer: &[u8]) -> RpcError {
        UpstreamError::misconfigured(
            Dependency::Store,
            "SUPABASE_URL",
            format!(
                "what answers at {} is not a Supabase REST API (HTTP {status}: {})",
                self.host,
                quote(answer)
            ),
            URL_FIX,
        )
        .into()
    }
}

/// `{"args": …}` without NUL characters: JSON has them, Postgres's `jsonb` refuses them.
fn body_of<A: Serialize + ?Sized>(args: &A) -> Result<String, UpstreamError> {
    #[derive(Serialize)]
    struct Body<'a, A: ?Sized> {
        args: &'a A,
    }
    let unwritable =
        |error: serde_json::Error| UpstreamError::permanent(Dependency::Store, "store_bug", error);
    let body = serde_json::to_string(&Body { args }).map_err(unwritable)?;
    if !body.contains("\\u0000") {
        return Ok(body);
    }
    let mut value = serde_json::to_value(Body { args }).map_err(unwritable)?;
    replace_nul(&mut value);
    serde_json::to_string(&value).map_err(unwritable)
}

/// U+FFFD, the replacement character, stands where NUL was.
fn replace_nul(value: &mut Value) {
    match value {
        Value::String(text) if text.contains('\0') => *text = text.replace('\0', "\u{fffd}"),
        Value::Array(items) => items.iter_mut().for_each(replace_nul),
        Value::Object(map) => {
            if map.keys().any(|key| key.contains('\0')) {
                *map = std::mem::take(map)
                    .into_iter()
                    .map(|(key, value)| (key.replace('\0', "\u{fffd}"), value))
                    .collect();
            }
            map.values_mut().for_each(replace_nul);
        }
        _ => {}
    }
}

fn quote(answer: &[u8]) -> String {
    let text = String::from_utf8_lossy(answer);
    let line: String = text.split_whitespace().collect::<Vec<_>>().join(" ");
    if line.is_empty() { "no text".to_owned() } else { line.chars().take(MAX_QUOTE_CHARS).collect() }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]
    use serde_json::json;

    use super::*;
    use crate::Secret;

    fn client(url: &str) -> RpcClient {
        RpcClient::new(&SupabaseConfig {
            url: url.parse().unwrap(),
            service_role_key: Secret::new("key"),
            timeout: Duration::from_secs(5),
        })
        .unwrap()
    }

    fn fault(status: u16, body: &Value) -> RpcError {
        client("http://db.example").fault(
            "claim_run",
            StatusCode::from_u16(status).unwrap(),
            true,
            None,
            body.to_string().as_bytes(),
        )
    }

    #[test]
    fn every_failure_says_what_to_do_next() {
        let said = |status, code: &str, message: &str| match fault(
            status,
            &json!({"code": code, "message": message, "details": "why", "hint": null}),
        ) {
            RpcError::Fenced => "fenced".to_owned(),
            RpcError::Upstream(UpstreamError::Transient { .. }) => "transient".to_owned(),
            RpcError::Upstream(UpstreamError::Permanent { code, .. }) => code,
            RpcError::Upstream(UpstreamError::Misconfigured { variable, .. }) => variable.to_owned(),
        };
        assert_eq!(said(409, "PT409", "fenced"), "fenced");
        assert_eq!(said(404, "PT404", "unknown_reservation"), "unknown_reservation");
        assert_eq!(said(401, "PGRST301", "JWSError"), "SUPABASE_SERVICE_ROLE_KEY");
        assert_eq!(said(403, "42501", "permission denied"), "SUPABASE_SERVICE_ROLE_KEY");
        assert_eq!(said(404, "PGRST202", "no function"), "SUPABASE_URL");
        assert_eq!(said(404, "42P01", "no table"), "SUPABASE_URL");
        assert_eq!(said(500, "55P03", "lock timeout"), "transient");
        assert_eq!(said(400, "40P01", "deadlock"), "transient");
        assert_eq!(said(503, "PGRST002", "no schema cache"), "transient");
        assert_eq!(said(429, "", "slow down"), "transient");
        assert_eq!(said(400, "22P02", "not a uuid"), "unstorable");
        assert_eq!(said(500, "54000", "index row size exceeds the maximum"), "unstorable");
        assert_eq!(said(400, "PGRST102", "length limit exceeded"), "unstorable");
        assert_eq!(said(413, "", "length limit exceeded"), "unstorable");
        assert_eq!(said(400, "23514", "violates check constraint"), "store_refused");
        assert_eq!(said(404, "", "page not found"), "SUPABASE_URL");
    }

    #[test]
    fn nul_characters_never_reach_postgres() {
        let body = body_of(&json!({"a\0": ["x\0y", {"b": "\0"}], "c": "kept \\u0000"})).unwrap();
        let sent: Value = serde_json::from_str(&body).unwrap();
        assert_eq!(
            sent,
            json!({"args": {"a\u{fffd}": ["x\u{fffd}y", {"b": "\u{fffd}"}], "c": "kept \\u0000"}})
        );
    }

    #[test]
    fn the_query_builder_never_opens_a_socket() {
        // `postgrest` brings reqwest 0.11, whose advisories have no fix: deny.toml ignores them because of
        // this. `execute()` is the only way it sends anything.
        let root = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
        let mut users = Vec::new();
        for crate_dir in ["shared", "worker", "rag-gateway", "cli"] {
            let mut folders = vec![std::path::PathBuf::from(root).join(crate_dir).join("src")];
            while let Some(folder) = folders.pop() {
                for entry in std::fs::read_dir(folder).unwrap() {
                    let path = entry.unwrap().path();
                    if path.is_dir() {
                        folders.push(path);
                    } else if path.extension().is_some_and(|kind| kind == "rs") {
                        let code = std::fs::read_to_string(&path).unwrap();
                        if code.contains("postgrest::Postgrest") || code.contains("use postgrest") {
                            users.push((path, code));
                        }
                    }
                }
            }
        }
        let [(path, code)] = users.as_slice() else { panic!("only this file may use the crate: {users:?}") };
        assert!(path.ends_with("shared/src/postgrest.rs"), "{}", path.display());
        assert!(!code.contains(concat!(".exec", "ute(")), "sent by the query builder");
    }
}
