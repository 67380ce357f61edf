//! An answer that is read while it is written: server-sent events.
//!
//! The same answer comes out as without streaming, and the same is booked: `usage` is asked for
//! (`stream_options.include_usage`) and comes in the last chunk. What is booked otherwise:
//!
//! - a stream that ends without a reason to stop is a cut answer: its cost is unknown, unless the
//!   closing chunk with `usage` was seen;
//! - a whole answer without `usage` (servers that do not know `include_usage`) is unknown too.

use std::sync::Arc;

use http::header;
use serde_json::{Value, json};

use super::{
    Endpoint, MAX_CHAT_ANSWER_BYTES, answer, params,
    service::{OneAttempt, is_event_stream},
};
use crate::{
    UpstreamError, http_client,
    ledger::Usage,
    model::{Billed, ChatAnswer, ChatRequest, FinishReason, Listener, ModelError, ToolCall},
};

/// Every token comes in a chunk of some 300 bytes.
const MAX_STREAM_BYTES: usize = 8 * MAX_CHAT_ANSWER_BYTES;
/// No event of ours is longer: a tool call may come in one piece.
const MAX_EVENT_BYTES: usize = 4 << 20;
/// Tool calls of one answer that are kept.
const MAX_TOOL_CALLS: usize = 64;

/// Makes the call. The listener hears the text of the answer, piece by piece.
pub(super) async fn complete(
    endpoint: &Arc<Endpoint>,
    request: &ChatRequest,
    listener: &dyn Listener,
) -> Result<ChatAnswer, ModelError> {
    let unknown = |message: String| ModelError {
        error: UpstreamError::transient(endpoint.dependency, message),
        billed: Billed::Unknown,
    };
    let attempt = OneAttempt {
        endpoint: Arc::clone(endpoint),
        model: request.model.clone(),
        request_id: request.request_id.clone(),
        max_answer_bytes: MAX_CHAT_ANSWER_BYTES,
    };
    let mut response = attempt.send(http_request(endpoint, request)?).await?;
    if !is_event_stream(response.headers()) {
        // A server that does not stream, and does not say so either: its whole answer is here.
        let body = http_client::bounded_body(response, MAX_CHAT_ANSWER_BYTES)
            .await
            .map_err(|error| unknown(error.to_string()))?;
        let answer = answer::lenient(&String::from_utf8_lossy(&body))
            .map_err(|usage| endpoint.unreadable("it is no answer", usage))?;
        if let Some(content) = &answer.content {
            listener.wrote(content);
        }
        return Ok(answer);
    }

    let mut events = Events::default();
    let mut building = Building::default();
    let mut bytes = 0;
    let ended = loop {
        match response.chunk().await {
            Ok(Some(chunk)) => {
                bytes += chunk.len();
                if bytes > MAX_STREAM_BYTES || building.text.len() > MAX_CHAT_ANSWER_BYTES {
                    break Err("the answer is larger than any answer may be".to_owned());
                }
                match events.push(&chunk, &mut |event| building.take(event, listener)) {
                    Ok(()) if building.done => break Ok(()),
                    Ok(()) => {}
                    Err(why) => break Err(why),
                }
            }
            Ok(None) => {
                break events.finish(&mut |event| building.take(event, listener));
            }
            Err(error) => break Err(format!("the answer broke off: {}", http_client::describe(&error))),
        }
    };
    building.finish(ended).map_err(|(why, billed)| ModelError {
        error: UpstreamError::transient(endpoint.dependency, endpoint.sanitised(&why)),
        billed,
    })
}

/// The usual request, asked for as a stream.
fn http_request(endpoint: &Endpoint, request: &ChatRequest) -> Result<reqwest::Request, ModelError> {
    let not_sent = |why: String| ModelError {
        error: UpstreamError::permanent(endpoint.dependency, "invalid_request", endpoint.sanitised(&why)),
        billed: Billed::Nothing,
    };
    let mut body = serde_json::to_value(params::request_body(request, &endpoint.config.base_url))
        .map_err(|error| not_sent(error.to_string()))?;
    body["stream"] = json!(true);
    body["stream_options"] = json!({"include_usage": true});
    endpoint
        .http
        .post(format!("{}/chat/completions", endpoint.base_url))
        .header(header::ACCEPT, "text/event-stream")
        .json(&body)
        .build()
        .map_err(|error| not_sent(http_client::describe(&error)))
}

/// True when the server refused because it cannot stream, or does not know `stream_options`.
pub(super) fn is_unsupported(failure: &ModelError) -> bool {
    matches!(&failure.error, UpstreamError::Permanent { code, message, .. }
        if code == "invalid_request" && message.to_ascii_lowercase().contains("stream"))
        && failure.billed == Billed::Nothing
}

/// Takes bytes apart into events (`data:` lines up to an empty line).
#[derive(Debug, Default)]
struct Events {
    /// The line that is not whole yet.
    line: Vec<u8>,
    /// The data of the event that is not whole yet.
    data: Vec<u8>,
}

impl Events {
    fn push(&mut self, bytes: &[u8], take: &mut dyn FnMut(&str) -> Result<(), String>) -> Result<(), String> {
        for byte in bytes {
            if *byte != b'\n' {
                self.line.push(*byte);
                if self.line.len() + self.data.len() > MAX_EVENT_BYTES {
                    return Err("an event of the stream is too long".to_owned());
                }
                continue;
            }
            let mut line = std::mem::take(&mut self.line);
            if line.last() == Some(&b'\r') {
                line.pop();
            }
            self.take_line(&line, take)?;
        }
        Ok(())
    }

    fn take_line(
        &mut self,
        line: &[u8],
        take: &mut dyn FnMut(&str) -> Result<(), String>,
    ) -> Result<(), String> {
        if line.is_empty() {
            return self.dispatch(take);
        }
        // Comments (`: keep-alive`) and other fields (`event:`, `id:`) say nothing about the answer.
        if let Some(data) = line.strip_prefix(b"data:") {
            if !self.data.is_empty() {
                self.data.push(b'\n');
            }
            self.data.extend_from_slice(data.strip_prefix(b" ").unwrap_or(data));
        }
        Ok(())
    }

    fn dispatch(&mut self, take: &mut dyn FnMut(&str) -> Result<(), String>) -> Result<(), String> {
        if self.data.is_empty() {
            return Ok(());
        }
        let data = std::mem::take(&mut self.data);
        take(&String::from_utf8_lossy(&data))
    }

    /// The end of the body. Servers forget the last empty line.
    fn finish(&mut self, take: &mut dyn FnMut(&str) -> Result<(), String>) -> Result<(), String> {
        let line = std::mem::take(&mut self.line);
        self.take_line(&line, take)?;
        self.dispatch(take)
    }
}

/// The answer so far.
#[derive(Debug, Default)]
struct Building {
    model: String,
    text: String,
    said_text: bool,
    refusal: Option<String>,
    tool_calls: Vec<ToolCall>,
    finish_reason: Option<FinishReason>,
    /// What the last chunk that spoke of it said. Some servers count along in every chunk.
    usage: Option<Usage>,
    /// The chunk that closes the books: usage without choices, or after the reason to stop.
    usage_is_final: bool,
    /// `[DONE]` was seen.
    done: bool,
}

impl Building {
    fn take(&mut self, event: &str, listener: &dyn Listener) -> Result<(), String> {
        if event.trim() == "[DONE]" {
            self.done = true;
            return Ok(());
        }
        let chunk: Value =
            serde_json::from_str(event).map_err(|_| "a chunk of the stream is not JSON".to_owned())?;
        if let Some(error) = chunk.get("error").filter(|error| !error.is_null()) {
            let said = error.get("message").and_then(Value::as_str).unwrap_or("no reason given");
            return Err(format!("the API failed while it answered: {said}"));
        }
        if let Some(model) = chunk["model"].as_str()
            && self.model.is_empty()
        {
            model.clone_into(&mut self.model);
        }
        let choice = &chunk["choices"][0];
        let delta = &choice["delta"];
        if let Some(piece) = delta["content"].as_str() {
            self.said_text = true;
            if !piece.is_empty() {
                self.text.push_str(piece);
                listener.wrote(piece);
            }
        }
        if let Some(piece) = delta["refusal"].as_str() {
            self.refusal.get_or_insert_default().push_str(piece);
        }
        for call in delta["tool_calls"].as_array().into_iter().flatten() {
            self.take_call(call);
        }
        if let Some(reason) = choice["finish_reason"].as_str() {
            self.finish_reason = Some(answer::finish_reason(reason));
        }
        if let Some(usage) = answer::usage_of(&chunk) {
            self.usage = Some(usage);
            self.usage_is_final = choice.is_null() || self.finish_reason.is_some();
        }
        Ok(())
    }

    /// A tool call comes in pieces that name its place; servers that send it whole may leave that out.
    fn take_call(&mut self, piece: &Value) {
        let at =
            piece["index"].as_u64().and_then(|at| usize::try_from(at).ok()).unwrap_or(self.tool_calls.len());
        if at >= MAX_TOOL_CALLS {
            return;
        }
        while self.tool_calls.len() <= at {
            let empty = ToolCall { id: String::new(), name: String::new(), arguments: String::new() };
            self.tool_calls.push(empty);
        }
        let call = &mut self.tool_calls[at];
        if let Some(id) = piece["id"].as_str() {
            id.clone_into(&mut call.id);
        }
        if let Some(name) = piece["function"]["name"].as_str() {
            call.name.push_str(name);
        }
        match &piece["function"]["arguments"] {
            Value::String(text) => call.arguments.push_str(text),
            Value::Null => {}
            whole => call.arguments = whole.to_string(),
        }
    }

    /// The answer, or why there is none and what to book.
    fn finish(self, ended: Result<(), String>) -> Result<ChatAnswer, (String, Billed)> {
        let closing = self.usage.filter(|_| self.usage_is_final);
        let failed = |why: String| Err((why, closing.map_or(Billed::Unknown, Billed::Known)));
        let stopped = self.finish_reason.is_some() || self.done;
        match ended {
            // A connection that breaks after the last word takes only `usage` with it.
            Err(why) if self.finish_reason.is_none() => return failed(why),
            Ok(()) if !stopped => return failed("the answer broke off: the stream has no end".to_owned()),
            _ => {}
        }
        if !self.said_text && self.refusal.is_none() && self.tool_calls.is_empty() {
            return failed("the answer is unreadable: the stream holds nothing".to_owned());
        }
        Ok(ChatAnswer {
            model: self.model,
            content: self.said_text.then_some(self.text),
            refusal: self.refusal,
            tool_calls: self.tool_calls,
            finish_reason: self.finish_reason.unwrap_or(FinishReason::Other),
            // Counted along and ended properly: the last count is the count.
            usage: self.usage.filter(|_| self.done || self.usage_is_final),
        })
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use std::sync::Mutex;

    use proptest::prelude::*;

    use super::*;
    use crate::Tokens;

    #[derive(Default)]
    struct Heard(Mutex<String>);

    impl Listener for Heard {
        fn begins(&self) {}
        fn wrote(&self, piece: &str) {
            self.0.lock().unwrap().push_str(piece);
        }
    }

    /// Reads a stream that comes in pieces of `size` bytes.
    fn read(stream: &str, size: usize) -> (Result<ChatAnswer, (String, Billed)>, String) {
        let (heard, mut events, mut building) = (Heard::default(), Events::default(), Building::default());
        let mut ended = Ok(());
        for piece in stream.as_bytes().chunks(size.max(1)) {
            if ended.is_ok() {
                ended = events.push(piece, &mut |event| building.take(event, &heard));
            }
        }
        if ended.is_ok() {
            ended = events.finish(&mut |event| building.take(event, &heard));
        }
        let text = heard.0.lock().unwrap().clone();
        (building.finish(ended), text)
    }

    const WHOLE: &str = concat!(
        ": keep-alive\r\n\r\n",
        "data: {\"model\":\"m\",\"choices\":[{\"delta\":{\"role\":\"assistant\",\"content\":\"\"}}]}\n\n",
        "data: {\"choices\":[{\"delta\":{\"content\":\"{\\\"a\\\": \"}}]}\n\n",
        "data: {\"choices\":[{\"delta\":{\"content\":\"\u{e4}}\"}}]}\n\n",
        "data: {\"choices\":[{\"delta\":{},\"finish_reason\":\"stop\"}]}\n\n",
        "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":7,\"completion_tokens\":2}}\n\n",
        "data: [DONE]\n\n",
    );

    fn usage(prompt: u64, completion: u64) -> Usage {
        Usage { prompt: Tokens(prompt), completion: Tokens(completion) }
    }

    #[test]
    fn a_stream_gives_the_answer_however_it_is_cut_into_packets() {
        for size in [1, 2, 3, 7, 64, 10_000] {
            let (answer, heard) = read(WHOLE, size);
            let answer = answer.unwrap();
            assert_eq!(answer.content.as_deref(), Some("{\"a\": \u{e4}}"));
            assert_eq!(heard, "{\"a\": \u{e4}}");
            assert_eq!(answer.finish_reason, FinishReason::Stop);
            assert_eq!((answer.model.as_str(), answer.usage), ("m", Some(usage(7, 2))));
        }
    }

    #[test]
    fn tool_calls_come_in_pieces() {
        let stream = [
            r#"{"choices":[{"delta":{"tool_calls":[{"index":0,"id":"c1","function":{"name":"search","arguments":""}}]}}]}"#,
            r#"{"choices":[{"delta":{"tool_calls":[{"index":0,"function":{"arguments":"{\"query\":"}}]}}]}"#,
            r#"{"choices":[{"delta":{"tool_calls":[{"index":0,"function":{"arguments":"\"x\"}"}},{"index":1,"id":"c2","function":{"name":"search","arguments":{"query":"y"}}}]}}]}"#,
            r#"{"choices":[{"delta":{},"finish_reason":"tool_calls"}]}"#,
        ]
        .map(|event| format!("data: {event}\n\n"))
        .concat();
        let answer = read(&stream, 5).0.unwrap();
        assert_eq!(answer.tool_calls[0].arguments, r#"{"query":"x"}"#);
        assert_eq!((answer.tool_calls[1].id.as_str(), answer.tool_calls.len()), ("c2", 2));
        assert_eq!(answer.usage, None, "it did not say");
    }

    #[test]
    fn a_cut_stream_is_no_answer_and_its_cost_is_unknown() {
        let cut = &WHOLE[..WHOLE.find("data: {\"choices\":[{\"delta\":{},").unwrap()];
        let (why, billed) = read(cut, 9).0.unwrap_err();
        assert!(why.contains("broke off"), "{why}");
        assert_eq!(billed, Billed::Unknown);
        let counted = format!(
            "{cut}data: {{\"choices\":[{{\"delta\":{{\"content\":\"x\"}}}}],\"usage\":{{\"prompt_tokens\":7,\"completion_tokens\":1}}}}\n\n"
        );
        assert_eq!(read(&counted, 9).0.unwrap_err().1, Billed::Unknown, "a count along the way is no bill");
    }

    #[test]
    fn an_answer_that_lost_only_its_usage_is_an_answer() {
        let cut = &WHOLE[..WHOLE.find("data: {\"choices\":[],").unwrap()];
        let answer = read(cut, 100).0.unwrap();
        assert_eq!((answer.content.as_deref(), answer.usage), (Some("{\"a\": \u{e4}}"), None));
    }

    #[test]
    fn an_error_within_the_stream_is_a_failure() {
        let stream = format!(
            "{}data: {{\"error\":{{\"message\":\"overloaded\"}}}}\n\n",
            &WHOLE[..WHOLE.find("data: {\"choices\":[{\"delta\":{},").unwrap()]
        );
        let (why, billed) = read(&stream, 50).0.unwrap_err();
        assert!(why.contains("overloaded") && billed == Billed::Unknown, "{why}");
        assert!(read("data: {oops\n\n", 50).0.unwrap_err().0.contains("not JSON"));
        assert!(read("data: [DONE]\n\n", 50).0.unwrap_err().0.contains("nothing"));
    }

    proptest! {
        #[test]
        fn any_stream_is_an_answer_or_not(text in "(data: |\\{|\\}|\n|\"choices\"|:|\\[|\\]|[a-z ])*", size in 1_usize..9) {
            let _ = read(&text, size);
        }
    }
}
