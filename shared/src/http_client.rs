//! What our HTTP clients share: one way to build a client, bounded bodies, `Retry-After`.
//!
//! Every client is a reqwest 0.13 one with rustls, follows no redirects (a redirected POST would
//! become a GET, and credentials must not travel), and has a bound on every call.

use std::time::{Duration, SystemTime};

use http::HeaderMap;
use jiff::Timestamp;

/// How long connecting may take at most, within the bound of the whole call.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Connections to one server that are kept for later calls. A burst opens more, and each holds its buffers.
const IDLE_CONNECTIONS: usize = 64;

/// A client whose calls take at most `timeout`, bodies included.
pub(crate) fn client(timeout: Duration) -> Result<reqwest::Client, reqwest::Error> {
    builder(timeout).build()
}

/// The same, for clients that add something of their own.
pub(crate) fn builder(timeout: Duration) -> reqwest::ClientBuilder {
    reqwest::Client::builder()
        .timeout(timeout)
        .connect_timeout(CONNECT_TIMEOUT.min(timeout))
        .pool_max_idle_per_host(IDLE_CONNECTIONS)
        .redirect(reqwest::redirect::Policy::none())
        .user_agent(concat!("atlas/", env!("CARGO_PKG_VERSION")))
}

/// Why a body could not be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BodyError {
    #[error("the answer is larger than {limit} bytes")]
    TooLarge { limit: usize },
    #[error("the answer broke off: {0}")]
    Broken(String),
}

/// Reads a body of at most `limit` bytes.
pub(crate) async fn bounded_body(
    mut response: reqwest::Response,
    limit: usize,
) -> Result<Vec<u8>, BodyError> {
    let announced = usize::try_from(response.content_length().unwrap_or(0)).unwrap_or(usize::MAX);
    if announced > limit {
        return Err(BodyError::TooLarge { limit });
    }
    let mut body = Vec::with_capacity(announced);
    while let Some(chunk) = response.chunk().await.map_err(|error| BodyError::Broken(describe(&error)))? {
        if body.len() + chunk.len() > limit {
            return Err(BodyError::TooLarge { limit });
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body)
}

/// The error and its causes in one line, without the URL (which may carry credentials).
pub(crate) fn describe(error: &reqwest::Error) -> String {
    let mut text = if error.is_timeout() {
        "timed out".to_owned()
    } else if error.is_connect() {
        "could not connect".to_owned()
    } else {
        "the connection failed".to_owned()
    };
    // The outermost error repeats the URL; the causes carry what is worth knowing.
    let mut cause = std::error::Error::source(error);
    let mut last = String::new();
    while let Some(inner) = cause {
        last = inner.to_string();
        cause = inner.source();
    }
    if !last.is_empty() {
        text.push_str(": ");
        text.push_str(&last);
    }
    text
}

/// For how long a server is left alone on its word at most. Who asks for more is asked again after that: a
/// wrong clock or header must not put work off for ever.
pub(crate) const LONGEST_RETRY_AFTER: Duration = Duration::from_hours(1);

/// What the server asked for, up to [`LONGEST_RETRY_AFTER`]: `retry-after-ms` (OpenAI), `Retry-After` in
/// seconds or as a date.
pub(crate) fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    asked_for(headers).map(|asked| asked.min(LONGEST_RETRY_AFTER))
}

fn asked_for(headers: &HeaderMap) -> Option<Duration> {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok()).map(str::trim);
    if let Some(millis) = text("retry-after-ms").and_then(|text| text.parse::<f64>().ok()) {
        return Duration::try_from_secs_f64(millis / 1000.0).ok();
    }
    let value = text("retry-after")?;
    if let Ok(seconds) = value.parse::<f64>() {
        return Duration::try_from_secs_f64(seconds).ok();
    }
    let at = jiff::fmt::rfc2822::DateTimeParser::new().relaxed_weekday(true).parse_timestamp(value).ok()?;
    let now = Timestamp::try_from(SystemTime::now()).ok()?;
    Some(Duration::try_from(at.duration_since(now)).unwrap_or_default())
}

/// At most `max` bytes of an untrusted text, on one line, for a message.
pub(crate) fn excerpt(text: &str, max: usize) -> String {
    let flat = text.split_whitespace().collect::<Vec<_>>().join(" ");
    match flat.char_indices().map(|(at, _)| at).take_while(|at| *at <= max).last() {
        Some(end) if flat.len() > max => format!("{}…", &flat[..end]),
        _ => flat,
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    fn asked(name: &'static str, value: &str) -> Option<Duration> {
        let mut headers = HeaderMap::new();
        headers.insert(name, value.parse().unwrap());
        retry_after(&headers)
    }

    #[test]
    fn retry_after_is_read_in_every_form() {
        assert_eq!(asked("retry-after", "7"), Some(Duration::from_secs(7)));
        assert_eq!(asked("retry-after", "0.5"), Some(Duration::from_millis(500)));
        assert_eq!(asked("retry-after-ms", "250"), Some(Duration::from_millis(250)));
        assert_eq!(
            asked("retry-after", "Sun, 06 Nov 1994 08:49:37 GMT"),
            Some(Duration::ZERO),
            "in the past"
        );
        for longer in ["Tue, 31 Dec 2999 23:59:59 GMT", "86400", "1e15"] {
            assert_eq!(asked("retry-after", longer), Some(LONGEST_RETRY_AFTER), "{longer}");
        }
        for nonsense in ["", "soon", "-3", "NaN", "1e400"] {
            assert_eq!(asked("retry-after", nonsense), None, "{nonsense}");
        }
    }

    #[test]
    fn an_excerpt_is_short_and_on_one_line() {
        assert_eq!(excerpt("a\n b", 10), "a b");
        assert_eq!(excerpt("ääää", 3), "ä…");
        assert_eq!(excerpt("ää", 4), "ää");
    }
}
