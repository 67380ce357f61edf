//! `docs_added`: messages that name what is new or changed in the documents.
//!
//! `{"repo": "https://…", "path": "docs"}` makes an index job in the gateway, which reads the place by
//! itself, if it may (`INDEX_ALLOWED_ROOTS`, `INDEX_ALLOWED_URLS`). A delivery is acked once the
//! gateway has the job; jobs outlive the gateway. While the gateway is down a delivery is held, not
//! nacked. What the gateway will never take goes to `dead_letters`.

use std::sync::Arc;

use atlas_shared::{
    UpstreamError,
    gateway_api::IndexRepository,
    message::{Rejection, is_name},
};
use serde::Deserialize;
use serde_json::Map;
use tokio_util::sync::CancellationToken;

use crate::{
    context::Context,
    intake::{self, Verdict},
    queue::{Delivery, RequestQueue},
};

/// Longest `repo` or `path`.
const MAX_NAME_BYTES: usize = 2048;

/// Reads messages until told to stop, one at a time: the gateway does one job at a time too.
pub(crate) async fn run(
    context: Arc<Context>,
    queue: Arc<dyn RequestQueue>,
    source: String,
    stop: CancellationToken,
    kill: CancellationToken,
) {
    while let Some(delivery) = intake::next_delivery(&context, queue.as_ref(), "docs_added", &stop).await {
        handle(&context, &source, delivery, &stop, &kill).await;
    }
}

async fn handle(
    context: &Context,
    source: &str,
    delivery: Delivery,
    stop: &CancellationToken,
    kill: &CancellationToken,
) {
    let Delivery { message_id, data, attributes, delivery_attempt, handle } = delivery;
    let asked = match read(&data, context.config.worker.max_message_bytes) {
        Ok(request) => ask(context, &request, stop).await,
        Err(problem) => Asked::Refused("invalid_docs_added".to_owned(), problem),
    };
    let verdict = match asked {
        Asked::Queued(job_id) => {
            context.metrics.messages.with_label_values(&["docs_added"]).inc();
            tracing::info!(message_id, job_id, "documents are being indexed");
            Verdict::Ack
        }
        Asked::Stopped => Verdict::Nack,
        Asked::Refused(reason, problem) => {
            context.metrics.messages.with_label_values(&["rejected"]).inc();
            let rejection = Rejection {
                reason: "docs_added_refused",
                message: format!("{reason}: {problem}"),
                answer_to: None,
                metadata: Map::new(),
            };
            let origin = intake::Origin { source, message_id: &message_id, attributes };
            let letter = intake::rejected(context, &origin, &data, rejection);
            intake::put_aside(context, letter, kill).await
        }
    };
    verdict.carry_out(handle, &message_id, delivery_attempt).await;
}

enum Asked {
    Queued(String),
    /// By a code and in words.
    Refused(String, String),
    Stopped,
}

/// Hands it to the gateway, however long that takes.
async fn ask(context: &Context, request: &IndexRepository, stop: &CancellationToken) -> Asked {
    let mut attempt = 0;
    loop {
        let error = match context.gateway.index_repository(request).await {
            Ok(created) => return Asked::Queued(created.job_id),
            Err(UpstreamError::Permanent { code, message, .. }) => return Asked::Refused(code, message),
            Err(error) => error,
        };
        attempt += 1;
        tracing::warn!(error = %error, error_code = error.code(), "the gateway does not take documents; the message is held");
        let pause =
            context.retry.next_delay(attempt, &error).unwrap_or(context.config.resilience.circuit_open);
        tokio::select! {
            () = stop.cancelled() => return Asked::Stopped,
            () = tokio::time::sleep(pause) => {}
        }
    }
}

/// [`IndexRepository`] as it comes from a queue: others may have put fields of their own into it.
#[derive(Deserialize)]
struct Message {
    repo: String,
    path: Option<String>,
    collection: Option<String>,
}

/// A message, or what is wrong with it.
fn read(data: &[u8], max_bytes: usize) -> Result<IndexRepository, String> {
    if data.len() > max_bytes {
        return Err(format!("the message has {} bytes; at most {max_bytes} are allowed", data.len()));
    }
    let Message { repo, path, collection } = serde_json::from_slice(data)
        .map_err(|error| format!("the message is not {{\"repo\": \"…\", \"path\": \"…\"}}: {error}"))?;
    if repo.trim().is_empty() {
        return Err("`repo` is empty; name a git URL or a folder".to_owned());
    }
    if repo.len() > MAX_NAME_BYTES || path.as_ref().is_some_and(|path| path.len() > MAX_NAME_BYTES) {
        return Err(format!("`repo` or `path` has more than {MAX_NAME_BYTES} bytes"));
    }
    if collection.as_ref().is_some_and(|name| !is_name(name)) {
        return Err("`collection` is not a name: 1 to 128 letters, digits, '.', '_' or '-'".to_owned());
    }
    Ok(IndexRepository { repo, path, collection })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn messages_are_read_with_fields_that_we_do_not_know() {
        let request =
            read(br#"{"repo": "https://example.org/a.git", "path": "docs", "by": "ci"}"#, 1000).unwrap();
        assert_eq!(
            (request.repo.as_str(), request.path.as_deref()),
            ("https://example.org/a.git", Some("docs"))
        );
        assert_eq!(read(br#"{"repo": "shop"}"#, 1000).unwrap().path, None);
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (data, words) in [
            (&b"not json"[..], "the message is not"),
            (br#"{"path": "docs"}"#, "repo"),
            (br#"{"repo": " "}"#, "empty"),
            (br#"{"repo": "a", "collection": "a/b"}"#, "collection"),
        ] {
            let problem = read(data, 1000).unwrap_err();
            assert!(problem.contains(words), "{problem}");
        }
        assert!(read(&[b' '; 2000], 1000).unwrap_err().contains("bytes"));
    }
}
