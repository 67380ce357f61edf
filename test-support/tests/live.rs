//! Text while it is written, over the real Pub/Sub protocol and separate processes: it comes before the
//! answer does, whole, in order and bounded, starts anew after a crash, and is billed like any other.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use std::collections::BTreeMap;

use atlas_test_support::{
    fleet::{Fleet, FleetError, FleetOptions, PROJECT, curl_json},
    skip,
};
use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use serde_json::{Value, json};

const REQUEST: &str = "Design how requests wait until a worker pulls them";
/// `STREAM_CHUNKS` of the fleet, and the most that one message may hold (worker/src/live.rs).
const MOST_CHUNKS: usize = 300;
const MOST_BYTES: usize = 8 << 10;

/// Who speaks: the run's attempt, the step, the attempt of its call.
type Speaker = (u64, String, u64);

/// A consumer of `architect_out` that is not Atlas.
struct Consumer {
    subscription: String,
    messages: Vec<Value>,
}

impl Consumer {
    fn start(fleet: &Fleet) -> Self {
        let subscription = fleet.emulator_url("subscriptions/live-consumer");
        let topic = format!("projects/{PROJECT}/topics/architect_out");
        curl_json("PUT", &subscription, &json!({ "topic": topic })).unwrap();
        Self { subscription, messages: Vec::new() }
    }

    /// Takes what is there, and acknowledges it.
    fn pull(&mut self) {
        let pull = json!({ "maxMessages": 500, "returnImmediately": true });
        let pulled = curl_json("POST", &format!("{}:pull", self.subscription), &pull).unwrap();
        let received = pulled["receivedMessages"].as_array().cloned().unwrap_or_default();
        if received.is_empty() {
            return;
        }
        let acks: Vec<&Value> = received.iter().map(|message| &message["ackId"]).collect();
        let url = format!("{}:acknowledge", self.subscription);
        curl_json("POST", &url, &json!({ "ackIds": acks })).unwrap();
        for message in &received {
            let data = BASE64.decode(message["message"]["data"].as_str().unwrap()).unwrap();
            self.messages.push(serde_json::from_slice(&data).unwrap());
        }
    }

    /// Pulls until a message is there that fits.
    async fn until(&mut self, fleet: &Fleet, what: &str, fits: impl Fn(&Value) -> bool) {
        let consumer = std::sync::Mutex::new(self);
        fleet
            .eventually(what, || async {
                let mut consumer = consumer.lock().unwrap();
                consumer.pull();
                consumer.messages.iter().any(&fits).then_some(())
            })
            .await
            .unwrap();
    }

    /// The pieces of a task, by speaker and part. A piece that came twice must say the same.
    fn pieces(&self, task: &str) -> BTreeMap<Speaker, BTreeMap<u64, String>> {
        let mut pieces: BTreeMap<Speaker, BTreeMap<u64, String>> = BTreeMap::new();
        for message in self.messages.iter().filter(|message| is_text(message) && message["task_id"] == task) {
            let stream = &message["metadata"]["stream"];
            let speaker = (
                message["metadata"]["attempt"].as_u64().unwrap(),
                stream["step"].as_str().unwrap().to_owned(),
                stream["call"].as_u64().unwrap(),
            );
            let text = message["content"].as_str().unwrap().to_owned();
            assert!(!text.is_empty() && text.len() <= MOST_BYTES, "{} bytes", text.len());
            let before =
                pieces.entry(speaker).or_default().insert(stream["part"].as_u64().unwrap(), text.clone());
            assert!(before.is_none_or(|before| before == text), "one part, two texts");
        }
        pieces
    }
}

fn is_text(message: &Value) -> bool {
    message["metadata"]["stage"] == "text"
}

fn is_last(message: &Value) -> bool {
    message["msg_type"] == "spec" || message["msg_type"] == "error"
}

/// The parts of one call, which must be all there.
fn joined(parts: &BTreeMap<u64, String>) -> String {
    let numbers: Vec<u64> = parts.keys().copied().collect();
    assert_eq!(numbers, (0..parts.len() as u64).collect::<Vec<_>>(), "every part");
    parts.values().map(String::as_str).collect()
}

/// What a terminal shows of it: the stages stand on lines of their own.
fn shown(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[tokio::test(flavor = "multi_thread")]
async fn text_is_shown_while_it_is_written_and_anew_after_a_crash() {
    let options = FleetOptions {
        workers: 1,
        // A document takes seconds, as with a real model.
        sim: vec!["--token-latency-us".to_owned(), "3000".to_owned()],
        env: vec![
            ("STREAM_INTERVAL_MILLISECONDS".to_owned(), "100".to_owned()),
            ("STREAM_CHUNKS".to_owned(), MOST_CHUNKS.to_string()),
            ("LEASE_SECONDS".to_owned(), "5".to_owned()),
            ("TOKEN_BUDGET_PER_RUN".to_owned(), "60000".to_owned()),
        ],
        ..FleetOptions::default()
    };
    let mut fleet = match Fleet::start(options).await {
        Ok(fleet) => fleet,
        Err(FleetError::Missing { service, reason }) => {
            return skip("text_is_shown_while_it_is_written_and_anew_after_a_crash", service, &reason);
        }
        Err(FleetError::Broken(error)) => panic!("{error:#}"),
    };
    let mut consumer = Consumer::start(&fleet);
    let ask = ["ask", REQUEST, "--live", "always", "--json"];

    // Nothing goes wrong.
    let asked = fleet.atlas_beside(&ask);
    consumer.until(&fleet, "the first text", is_text).await;
    assert!(!consumer.messages.iter().any(is_last), "text comes before the document is finished");
    let output = asked.await.unwrap().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{errors}\n{}", fleet.logs());
    let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
    let task = answer["task_id"].as_str().unwrap().to_owned();
    consumer.until(&fleet, "the answer", is_last).await;

    let pieces = consumer.pieces(&task);
    assert_eq!(pieces.len(), 1, "{:?}", pieces.keys());
    let parts = &pieces[&(1, "draft.0".to_owned(), 1)];
    assert!((5..=MOST_CHUNKS).contains(&parts.len()), "{} messages", parts.len());
    let text = joined(parts);
    for heading in ["# ", "\n## Summary\n", "\n## Decisions\n", "\n## Open questions\n"] {
        assert_eq!(text.matches(heading).count().min(1), 1, "{heading:?} in {text}");
    }
    let title = answer["spec"]["title"].as_str().unwrap();
    assert!(text.starts_with(&format!("# {title}\n")), "{text}");
    let last = answer["spec"]["open_questions"].as_array().unwrap().last().unwrap().as_str().unwrap();
    assert!(text.trim_end().ends_with(last), "to the end: {text}");
    assert!(shown(&errors).contains(&shown(&text)), "as it was written:\n{errors}\n\nnot:\n{text}");

    // Ordinary requests get no text, and the books agree.
    let quiet = fleet.atlas(&["ask", REQUEST, "--json"]).unwrap();
    let quiet: Value = serde_json::from_slice(&quiet.stdout).unwrap();
    let quiet = quiet["task_id"].as_str().unwrap().to_owned();
    consumer.until(&fleet, "the second answer", |it| is_last(it) && it["task_id"] == quiet.as_str()).await;
    assert!(consumer.pieces(&quiet).is_empty());
    let (ledger, billed) = books(&fleet).await;
    assert_eq!(ledger, billed, "streamed and not, to the token");

    // The worker dies in the middle of the text; another one takes the run over and writes it anew.
    let before = consumer.messages.len();
    let asked = fleet.atlas_beside(&ask);
    let fresh = |message: &Value| is_text(message) && message["task_id"] != task.as_str();
    consumer.until(&fleet, "text of the third request", fresh).await;
    fleet.workers[0].kill();
    assert!(!consumer.messages[before..].iter().any(is_last), "it was killed before the end");
    fleet.add_worker(&[]).unwrap().start().await.unwrap();
    let output = asked.await.unwrap().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{errors}\n{}", fleet.logs());
    assert_eq!(errors.matches("written anew").count(), 1, "{errors}");
    let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
    let task = answer["task_id"].as_str().unwrap().to_owned();
    consumer.until(&fleet, "the third answer", |it| is_last(it) && it["task_id"] == task.as_str()).await;
    let pieces = consumer.pieces(&task);
    let second = joined(&pieces[&(2, "draft.0".to_owned(), 1)]);
    let anew = errors.split("written anew").nth(1).unwrap();
    assert!(shown(anew).contains(&shown(&second)), "{anew}\n\nnot:\n{second}");
    let (ledger, billed) = books(&fleet).await;
    assert!(ledger >= billed, "the call that died is booked as spent: {ledger} and {billed}");
    println!("{} and {} messages with text", parts.len(), pieces.values().map(BTreeMap::len).sum::<usize>());
}

/// What the ledger says, and what the simulator billed. Nothing is open.
async fn books(fleet: &Fleet) -> (i64, i64) {
    let database = fleet.database().await.unwrap();
    let row = database
        .query_one(
            "select coalesce(sum(actual), 0)::bigint, count(*) filter (where state = 'reserved') from token_ledger",
            &[],
        )
        .await
        .unwrap();
    assert_eq!(row.get::<_, i64>(1), 0, "open reservations");
    (row.get(0), fleet.meter().await.unwrap()["total_tokens"].as_i64().unwrap())
}
