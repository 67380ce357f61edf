//! What every queue adapter promises, tried on both: the embedded one and Pub/Sub on the real emulator.
//!
//! Each promise is a function in [`contract`]; `contract!` runs it on both. Every test has a project
//! (or a folder) of its own. Below that: what only one adapter can show.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use atlas_shared::{
    Config, Env, TaskId, UpstreamError,
    config::{Process, PubSubConfig, QueueConfig},
    message::{Answer, AnswerStatus, AnswerType},
};
use atlas_test_support::{
    emulator::Emulator,
    proxy::{Cut, Proxy},
};
use atlas_worker::queue::{
    self, BacklogScope, Delivery, MAX_PUBLISH_BYTES, Queues, RequestQueue, Topics, Tuning,
};
use bytes::Bytes;
use tokio::{sync::OnceCell, task::JoinHandle, time::timeout};
use uuid::Uuid;

/// Longer than any of this takes, shorter than anybody's patience.
const BOUND: Duration = Duration::from_secs(30);

/// The smallest that Pub/Sub takes.
const MAX_DELIVERY_ATTEMPTS: u32 = 5;

/// A queue of a test's own.
struct Rig {
    config: Config,
    tuning: Tuning,
    folder: Option<tempfile::TempDir>,
}

impl Rig {
    fn embedded() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let env = Env::default().with("ATLAS_DATA_DIR", folder.path().display().to_string());
        Self {
            config: load(env),
            // An embedded lease may be short; Pub/Sub takes no less than ten seconds.
            tuning: Tuning { lease: Duration::from_secs(2), ..tuning() },
            folder: Some(folder),
        }
    }

    /// `None`: no emulator here, and the skip was reported.
    async fn pubsub(test: &str) -> Option<Self> {
        let emulator = emulator(test).await?;
        Some(Self::on(&emulator.host, &format!("test-{}", Uuid::new_v4().simple())))
    }

    fn on(host: &str, project: &str) -> Self {
        let env = Env::default().with("PUBSUB_EMULATOR_HOST", host).with("PUBSUB_PROJECT_ID", project);
        Self { config: load(env), tuning: tuning(), folder: None }
    }

    fn pubsub_config(&self) -> &PubSubConfig {
        let QueueConfig::PubSub(pubsub) = &self.config.queue else { panic!("an embedded rig") };
        pubsub
    }

    async fn open(&self) -> Queues {
        queue::open_with(&self.config, &self.tuning).await.unwrap()
    }

    fn topics(&self) -> Topics {
        Topics::of(&self.config)
    }

    async fn publish(&self, queues: &Queues, data: &'static [u8]) -> String {
        self.publish_with(queues, data, &[]).await
    }

    async fn publish_with(
        &self,
        queues: &Queues,
        data: &'static [u8],
        attributes: &[(&str, &str)],
    ) -> String {
        let attributes =
            attributes.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        timeout(BOUND, queues.publisher.publish(&self.topics().requests, data.into(), attributes))
            .await
            .expect("published in time")
            .unwrap()
    }
}

fn load(env: Env) -> Config {
    let env = env
        .with("PUBSUB_MAX_DELIVERY_ATTEMPTS", MAX_DELIVERY_ATTEMPTS.to_string())
        .with("MAX_IN_FLIGHT", "4")
        .with_default("ATLAS_DATA_DIR", ".");
    Config::load(&env, Process::Cli).unwrap()
}

fn tuning() -> Tuning {
    Tuning {
        min_backoff: Duration::from_millis(50),
        max_backoff: Duration::from_millis(200),
        lease: Duration::from_secs(10),
        max_delivery_attempts: MAX_DELIVERY_ATTEMPTS,
    }
}

/// One emulator for all tests of this binary.
async fn emulator(test: &str) -> Option<&'static Emulator> {
    static EMULATOR: OnceCell<Result<Emulator, String>> = OnceCell::const_new();
    match EMULATOR.get_or_init(Emulator::start).await {
        Ok(emulator) => Some(emulator),
        Err(reason) => {
            atlas_test_support::skip(test, "the Pub/Sub emulator", reason);
            None
        }
    }
}

async fn pull(queue: &Arc<dyn RequestQueue>) -> Delivery {
    timeout(BOUND, queue.pull()).await.expect("a message in time").unwrap().expect("not draining")
}

/// The id that publishing returned. On the emulator, whose ids begin again at 1 after a restart, the
/// adapter adds the time of publishing.
fn published_id(delivery: &Delivery) -> String {
    delivery.message_id.split('@').next().unwrap_or_default().to_owned()
}

async fn ack(delivery: Delivery) {
    timeout(BOUND, delivery.handle.ack()).await.expect("acked in time").unwrap();
}

mod contract {
    use super::*;

    pub(super) async fn an_acked_message_does_not_come_again(rig: &Rig) {
        let queues = rig.open().await;
        let id = rig.publish(&queues, b"once").await;
        let delivery = pull(&queues.requests).await;
        assert_eq!((published_id(&delivery), &delivery.data[..]), (id, &b"once"[..]));
        ack(delivery).await;
        queues.requests.drain().await;
        queues.requests.flush(BOUND).await.unwrap();

        // Longer than the lease: a lost ack would show.
        let later = rig.open().await;
        let again = timeout(rig.tuning.lease + Duration::from_secs(2), later.requests.pull()).await;
        assert!(again.is_err(), "it came again: {again:?}");
    }

    pub(super) async fn a_nacked_message_comes_again_and_is_counted(rig: &Rig) {
        let queues = rig.open().await;
        let id = rig.publish(&queues, b"twice").await;
        let mut seen = None;
        for attempt in 1..=3 {
            let delivery = pull(&queues.requests).await;
            assert_eq!(published_id(&delivery), id);
            assert_eq!(seen.get_or_insert_with(|| delivery.message_id.clone()), &delivery.message_id);
            assert_eq!(delivery.delivery_attempt, Some(attempt));
            delivery.handle.nack().await.unwrap();
        }
        ack(pull(&queues.requests).await).await;
    }

    pub(super) async fn a_dropped_delivery_comes_again(rig: &Rig) {
        let queues = rig.open().await;
        let id = rig.publish(&queues, b"dropped").await;
        drop(pull(&queues.requests).await);
        let again = pull(&queues.requests).await;
        assert_eq!(published_id(&again), id);
        ack(again).await;
    }

    pub(super) async fn after_the_last_attempt_it_is_a_dead_letter(rig: &Rig) {
        let queues = rig.open().await;
        rig.publish_with(&queues, b"poison", &[("k", "v")]).await;
        for _ in 0..MAX_DELIVERY_ATTEMPTS {
            pull(&queues.requests).await.handle.nack().await.unwrap();
        }
        let letters = queues.dead_letters.as_ref().unwrap();
        let letter = pull(letters).await;
        assert_eq!(&letter.data[..], b"poison");
        assert!(letter.attributes.contains(&("k".to_owned(), "v".to_owned())), "{:?}", letter.attributes);
        ack(letter).await;

        // The requests go on without it.
        rig.publish(&queues, b"healthy").await;
        let next = pull(&queues.requests).await;
        assert_eq!(&next.data[..], b"healthy");
        ack(next).await;
    }

    pub(super) async fn a_lease_lasts_as_long_as_its_delivery(rig: &Rig) {
        let queues = rig.open().await;
        rig.publish(&queues, b"slow").await;
        let slow = pull(&queues.requests).await;
        let other = rig.open().await;
        let stolen = timeout(rig.tuning.lease + Duration::from_secs(2), other.requests.pull()).await;
        assert!(stolen.is_err(), "it was delivered twice: {stolen:?}");
        ack(slow).await;
    }

    pub(super) async fn draining_stops_at_once_and_gives_messages_back(rig: &Rig) {
        let queues = rig.open().await;
        let mut published = BTreeSet::new();
        for _ in 0..6 {
            published.insert(rig.publish(&queues, b"x").await);
        }
        let working = pull(&queues.requests).await;
        let waiting = tokio::spawn({
            let requests = queues.requests.clone();
            async move {
                // Takes what is there until it is told to stop.
                let mut taken = Vec::new();
                while let Some(delivery) = requests.pull().await.unwrap() {
                    taken.push(delivery);
                    if taken.len() == 2 {
                        break;
                    }
                }
                taken
            }
        });
        let mut taken = timeout(BOUND, waiting).await.expect("in time").unwrap();
        timeout(BOUND, queues.requests.drain()).await.expect("drained in time");
        assert!(queues.requests.pull().await.unwrap().is_none());

        // What was returned can still be decided.
        let mut decided = BTreeSet::new();
        decided.insert(published_id(&working));
        ack(working).await;
        let acked = taken.pop().unwrap();
        decided.insert(published_id(&acked));
        ack(acked).await;
        taken.pop().unwrap().handle.nack().await.unwrap();
        queues.requests.flush(BOUND).await.unwrap();

        // Everything else is another worker's, at once.
        let other = rig.open().await;
        let mut rest = BTreeSet::new();
        while rest.len() < published.len() - decided.len() {
            let delivery = pull(&other.requests).await;
            assert!(rest.insert(published_id(&delivery)), "delivered twice");
            ack(delivery).await;
        }
        assert_eq!(rest, &published - &decided);
    }

    pub(super) async fn a_waiting_pull_ends_when_draining_begins(rig: &Rig) {
        let queues = rig.open().await;
        let waiting = tokio::spawn({
            let requests = queues.requests.clone();
            async move { requests.pull().await }
        });
        queues.requests.drain().await;
        let pulled = timeout(BOUND, waiting).await.expect("ended in time").unwrap().unwrap();
        assert!(pulled.is_none());
        queues.requests.flush(BOUND).await.unwrap();
    }

    pub(super) async fn a_cancelled_pull_loses_nothing(rig: &Rig) {
        let queues = rig.open().await;
        let mut published = BTreeSet::new();
        for _ in 0..10 {
            published.insert(rig.publish(&queues, b"x").await);
        }
        // Impatient on purpose: most of these are cancelled somewhere in the middle.
        let mut seen = BTreeSet::new();
        let mut patience = Duration::from_micros(50);
        let all = async {
            while seen.len() < published.len() {
                match timeout(patience, queues.requests.pull()).await {
                    Ok(delivery) => {
                        let delivery = delivery.unwrap().unwrap();
                        // A delivery that was never seen does not count.
                        assert_eq!(delivery.delivery_attempt, Some(1));
                        assert!(seen.insert(published_id(&delivery)), "delivered twice");
                        ack(delivery).await;
                    }
                    Err(_) => patience = (patience * 2).min(Duration::from_millis(20)),
                }
            }
        };
        timeout(BOUND, all).await.expect("all in time");
        assert_eq!(seen, published);
    }

    pub(super) async fn undecided_deliveries_are_limited(rig: &Rig) {
        let queues = rig.open().await;
        for _ in 0..6 {
            rig.publish(&queues, b"x").await;
        }
        let mut held = Vec::new();
        for _ in 0..4 {
            held.push(pull(&queues.requests).await);
        }
        assert!(
            timeout(Duration::from_millis(500), queues.requests.pull()).await.is_err(),
            "MAX_IN_FLIGHT is 4"
        );
        let backlog = queues.requests.backlog().await.unwrap();
        assert_eq!(backlog.unacknowledged, if backlog.scope == BacklogScope::Process { 4 } else { 6 });
        assert!(backlog.oldest.is_some());
        ack(held.pop().unwrap()).await;
        held.push(pull(&queues.requests).await);
        for delivery in held {
            ack(delivery).await;
        }
    }

    pub(super) async fn two_consumers_share_the_work(rig: &Rig) {
        let queues = [rig.open().await, rig.open().await];
        let mut published = BTreeSet::new();
        for _ in 0..30 {
            published.insert(rig.publish(&queues[0], b"x").await);
        }
        let (done, mut ids) = tokio::sync::mpsc::channel(64);
        for queues in &queues {
            let (requests, done) = (queues.requests.clone(), done.clone());
            tokio::spawn(async move {
                while let Ok(Some(delivery)) = requests.pull().await {
                    let id = published_id(&delivery);
                    ack(delivery).await;
                    if done.send(id).await.is_err() {
                        return;
                    }
                }
            });
        }
        let mut seen = BTreeSet::new();
        while seen.len() < published.len() {
            let id = timeout(BOUND, ids.recv()).await.expect("in time").unwrap();
            assert!(seen.insert(id), "a live lease was broken");
        }
        assert_eq!(seen, published);
        for queues in &queues {
            queues.requests.drain().await;
        }
    }

    pub(super) async fn any_bytes_and_attributes_come_through(rig: &Rig) {
        let queues = rig.open().await;
        let mut attributes = vec![
            ("traceparent".to_owned(), "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".to_owned()),
            ("empty".to_owned(), String::new()),
            ("ünï \"q\"".to_owned(), "日本\n\t'".to_owned()),
        ];
        let not_utf8 = Bytes::from_static(&[0xff, 0xfe, 0x00, 0x80, b'{']);
        let topic = rig.topics().requests;
        queues.publisher.publish(&topic, not_utf8.clone(), attributes.clone()).await.unwrap();
        let delivery = pull(&queues.requests).await;
        assert_eq!(delivery.data, not_utf8);
        let mut got = delivery.attributes.clone();
        got.sort_unstable();
        attributes.sort_unstable();
        assert_eq!(got, attributes);
        ack(delivery).await;
    }

    pub(super) async fn a_message_too_big_is_refused_with_its_size(rig: &Rig) {
        let queues = rig.open().await;
        let topic = rig.topics().requests;
        let publish = |size: usize| {
            let (publisher, topic) = (queues.publisher.clone(), topic.clone());
            async move { timeout(BOUND, publisher.publish(&topic, vec![b'x'; size].into(), vec![])).await }
        };
        let refused = publish(MAX_PUBLISH_BYTES + 1).await.expect("refused in time").unwrap_err();
        assert_eq!(refused.code(), "message_too_large");
        assert!(refused.to_string().contains(&(MAX_PUBLISH_BYTES + 1).to_string()), "{refused}");

        // Twice what a worker accepts: it must reach the worker to be answered.
        publish(2 * 1024 * 1024).await.expect("published in time").unwrap();
        let delivery = pull(&queues.requests).await;
        assert_eq!(delivery.data.len(), 2 * 1024 * 1024);
        ack(delivery).await;
    }

    pub(super) async fn a_topic_that_is_no_name_is_refused(rig: &Rig) {
        let queues = rig.open().await;
        let error = queues.publisher.publish("../x", "x".into(), vec![]).await.unwrap_err();
        assert_eq!(error.code(), "invalid_topic");
    }

    pub(super) async fn a_watcher_sees_the_answers_of_its_task_only(rig: &Rig) {
        let (mine, other) = (TaskId::random(), TaskId::random());
        let mut answers = queue::watch_answers(&rig.config, mine).await.unwrap();
        let queues = rig.open().await;
        for (task, kind, text) in [
            (other, AnswerType::Spec, "not mine"),
            (mine, AnswerType::Progress, "retrieving"),
            (mine, AnswerType::Spec, "the spec"),
        ] {
            let answer = Answer::bare(task, kind, AnswerStatus::Done, text, serde_json::Map::new());
            let data = serde_json::to_vec(&answer).unwrap();
            queues.publisher.publish(&rig.topics().answers, data.into(), answer.attributes()).await.unwrap();
        }
        let mut texts = BTreeSet::new();
        for _ in 0..2 {
            let answer = timeout(BOUND, answers.next()).await.expect("an answer in time").unwrap();
            assert_eq!(answer.task_id, mine);
            texts.insert(answer.content.as_str().unwrap().to_owned());
        }
        assert_eq!(texts, BTreeSet::from(["retrieving".to_owned(), "the spec".to_owned()]));
        assert!(timeout(Duration::from_millis(300), answers.next()).await.is_err(), "there are no more");
        timeout(BOUND, answers.close()).await.expect("closed in time");
    }

    pub(super) async fn a_sound_queue_is_ready(rig: &Rig) {
        let queues = rig.open().await;
        queues.requests.check().await.unwrap();
        queues.dead_letters.as_ref().unwrap().check().await.unwrap();
    }

    pub(super) async fn what_is_published_before_any_consumer_waits(rig: &Rig) {
        let publisher = queue::open_publisher(&rig.config).await.unwrap();
        publisher.publish(&rig.topics().requests, "early".into(), vec![]).await.unwrap();
        drop(publisher);
        let queues = rig.open().await;
        let delivery = pull(&queues.requests).await;
        assert_eq!(&delivery.data[..], b"early");
        ack(delivery).await;
    }
}

macro_rules! contract {
    ($($promise:ident),+ $(,)?) => {
        mod embedded_queue {
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $promise() {
                super::contract::$promise(&super::Rig::embedded()).await;
            })+
        }
        mod pubsub {
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $promise() {
                let Some(rig) = super::Rig::pubsub(concat!("pubsub::", stringify!($promise))).await else { return };
                super::contract::$promise(&rig).await;
            })+
        }
    };
}

contract!(
    an_acked_message_does_not_come_again,
    a_nacked_message_comes_again_and_is_counted,
    a_dropped_delivery_comes_again,
    after_the_last_attempt_it_is_a_dead_letter,
    a_lease_lasts_as_long_as_its_delivery,
    draining_stops_at_once_and_gives_messages_back,
    a_waiting_pull_ends_when_draining_begins,
    a_cancelled_pull_loses_nothing,
    undecided_deliveries_are_limited,
    two_consumers_share_the_work,
    any_bytes_and_attributes_come_through,
    a_message_too_big_is_refused_with_its_size,
    a_topic_that_is_no_name_is_refused,
    a_watcher_sees_the_answers_of_its_task_only,
    a_sound_queue_is_ready,
    what_is_published_before_any_consumer_waits,
);

/// Another process, so that it can be killed, or share nothing but the file. It is this binary again,
/// told by the environment what to do.
mod child {
    use super::*;
    use atlas_test_support::guard::Guarded;

    /// Runs the ignored test `name` of this binary with `settings` until the value is dropped.
    pub(super) fn start(name: &str, settings: &[(&str, String)]) -> Guarded {
        Guarded::spawn(
            std::env::current_exe().unwrap(),
            [&format!("child::{name}"), "--exact", "--ignored", "--nocapture"],
            |command| {
                command.envs(settings.iter().map(|(key, value)| (*key, value.as_str())));
                command.stdout(std::process::Stdio::null());
            },
        )
        .unwrap()
    }

    fn setting(name: &str) -> String {
        std::env::var(name).expect("only started by another test")
    }

    #[tokio::test(flavor = "multi_thread")]
    #[ignore = "a part of the_queue_works_over_processes"]
    async fn publishes() {
        let config = load(Env::default().with("ATLAS_DATA_DIR", setting("CHILD_DATA_DIR")));
        let publisher = queue::open_publisher(&config).await.unwrap();
        publisher.publish(&Topics::of(&config).requests, "hello".into(), vec![]).await.unwrap();
    }

    #[tokio::test(flavor = "multi_thread")]
    #[ignore = "a part of a_killed_client_swallows_no_messages"]
    async fn pulls_until_it_is_killed() {
        let rig = Rig::on(&setting("CHILD_HOST"), &setting("CHILD_PROJECT"));
        let queues = rig.open().await;
        let held = pull(&queues.requests).await;
        std::fs::write(setting("CHILD_READY"), &held.message_id).unwrap();
        // The stream stays open and hungry; the parent kills us here.
        let _more = queues.requests.pull().await;
        std::future::pending::<()>().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_embedded_queue_works_over_processes() {
    let rig = Rig::embedded();
    let queues = rig.open().await;
    let waiting = tokio::spawn({
        let requests = queues.requests.clone();
        async move { pull(&requests).await }
    });
    let folder = rig.folder.as_ref().unwrap().path().display().to_string();
    let child = child::start("publishes", &[("CHILD_DATA_DIR", folder)]);
    let delivery = waiting.await.unwrap();
    assert_eq!(&delivery.data[..], b"hello");
    ack(delivery).await;
    drop(child);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_client_swallows_no_messages() {
    let Some(rig) = Rig::pubsub("a_killed_client_swallows_no_messages").await else { return };
    let pubsub = rig.pubsub_config();
    let queues = rig.open().await;
    rig.publish(&queues, b"first").await;

    let folder = tempfile::tempdir().unwrap();
    let ready = folder.path().join("ready");
    let host = pubsub.emulator.as_ref().unwrap().authority().to_owned();
    let child = child::start(
        "pulls_until_it_is_killed",
        &[
            ("CHILD_HOST", host),
            ("CHILD_PROJECT", pubsub.project_id.clone()),
            ("CHILD_READY", ready.display().to_string()),
        ],
    );
    timeout(BOUND, async {
        while !ready.exists() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await
    .expect("the child holds a message in time");
    drop(child);

    let mut published = BTreeSet::new();
    for _ in 0..20 {
        published.insert(rig.publish(&queues, b"later").await);
    }
    // What the dead client held comes when its ack deadline ends; nothing else may wait for that.
    let all = async {
        while !published.is_empty() {
            let delivery = pull(&queues.requests).await;
            published.remove(&published_id(&delivery));
            ack(delivery).await;
        }
    };
    let in_time = timeout(rig.tuning.lease / 2, all).await;
    assert!(in_time.is_ok(), "a ghost took {} messages", published.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn pulling_resumes_when_the_server_comes_back_empty() {
    let first = match Emulator::start().await {
        Ok(emulator) => emulator,
        Err(reason) => {
            atlas_test_support::skip(
                "pulling_resumes_when_the_server_comes_back_empty",
                "the Pub/Sub emulator",
                &reason,
            );
            return;
        }
    };
    let rig = Rig::on(&first.host, "phoenix");
    let queues = rig.open().await;
    rig.publish(&queues, b"before").await;
    ack(pull(&queues.requests).await).await;
    let waiting = tokio::spawn({
        let requests = queues.requests.clone();
        async move { pull(&requests).await }
    });

    let port = first.port();
    drop(first);
    let second = Emulator::start_on(port).await.unwrap();
    // Topics and subscriptions are gone: the publisher and the stream both have to make them anew, and
    // what is published to a topic without its subscription is lost, so publish until one arrives.
    let arrived = async {
        let mut waiting = waiting;
        loop {
            let published = queues.publisher.publish(&rig.topics().requests, "after".into(), vec![]).await;
            assert!(published.is_ok() || published.is_err_and(|error| error.is_transient()));
            if let Ok(delivery) = timeout(Duration::from_millis(200), &mut waiting).await {
                return delivery.unwrap();
            }
        }
    };
    let delivery = timeout(Duration::from_secs(20), arrived).await.expect("pulling resumes");
    assert_eq!(&delivery.data[..], b"after");
    ack(delivery).await;
    queues.requests.check().await.unwrap();
    drop(second);
}

#[tokio::test]
async fn without_permission_to_create_it_is_said_how_to() {
    let Some(rig) = Rig::pubsub("without_permission_to_create_it_is_said_how_to").await else { return };
    let mut strict = rig.config.clone();
    let QueueConfig::PubSub(pubsub) = &mut strict.queue else { unreachable!() };
    pubsub.create_missing = false;
    let error = queue::open(&strict).await.err().expect("there is no topic");
    let UpstreamError::Misconfigured { variable, fix, .. } = &error else { panic!("{error}") };
    assert_eq!(*variable, "PUBSUB_TOPIC_IN");
    assert!(fix.contains("gcloud pubsub topics create architect_in"), "{fix}");
}

/// What `gcloud` or a client library would do by hand: the emulator's REST API.
async fn rest(rig: &Rig, method: reqwest::Method, path: &str, body: serde_json::Value) -> serde_json::Value {
    let pubsub = rig.pubsub_config();
    let url =
        format!("{}v1/projects/{}/{path}", pubsub.emulator.as_ref().unwrap().as_str(), pubsub.project_id);
    let answer = reqwest::Client::new().request(method, url).json(&body).send().await.unwrap();
    let answer = answer.error_for_status().unwrap();
    answer.json().await.unwrap()
}

/// A rig whose subscription was made by hand, with `options`.
async fn rig_with_subscription(test: &str, options: serde_json::Value) -> Option<Rig> {
    let rig = Rig::pubsub(test).await?;
    let project = rig.pubsub_config().project_id.clone();
    for topic in ["architect_in", "architect_out", "architect_dlq"] {
        rest(&rig, reqwest::Method::PUT, &format!("topics/{topic}"), serde_json::json!({})).await;
    }
    let mut subscription = serde_json::json!({ "topic": format!("projects/{project}/topics/architect_in") });
    subscription.as_object_mut().unwrap().extend(options.as_object().unwrap().clone());
    rest(&rig, reqwest::Method::PUT, "subscriptions/architect_in-atlas", subscription).await;
    Some(rig)
}

#[tokio::test]
async fn a_subscription_without_policies_is_no_production_subscription() {
    let test = "a_subscription_without_policies_is_no_production_subscription";
    let Some(rig) = rig_with_subscription(test, serde_json::json!({})).await else { return };

    // In development it serves.
    let queues = rig.open().await;
    rig.publish(&queues, b"x").await;
    ack(pull(&queues.requests).await).await;

    let mut strict = rig.config.clone();
    let QueueConfig::PubSub(pubsub) = &mut strict.queue else { unreachable!() };
    pubsub.create_missing = false;
    let error = queue::open(&strict).await.err().expect("it has no retry policy");
    let UpstreamError::Misconfigured { variable, fix, .. } = &error else { panic!("{error}") };
    assert_eq!(*variable, "PUBSUB_SUBSCRIPTION");
    assert!(fix.contains("gcloud pubsub subscriptions update architect_in-atlas"), "{fix}");
    assert!(fix.contains("--min-retry-delay"), "{fix}");
}

/// What nobody would notice before it has done harm is said, and nothing of it is changed.
#[tokio::test]
async fn what_a_subscription_has_otherwise_is_said_with_the_command_that_changes_it() {
    let options = serde_json::json!({
        "retryPolicy": { "minimumBackoff": "1s", "maximumBackoff": "2s" },
        "expirationPolicy": { "ttl": "172800s" },
        "messageRetentionDuration": "3600s",
        "filter": "attributes.team = \"billing\"",
    });
    let test = "what_a_subscription_has_otherwise_is_said_with_the_command_that_changes_it";
    let Some(rig) = rig_with_subscription(test, options).await else { return };
    let queues = rig.open().await;
    queues.requests.check().await.unwrap();
    let said = queues.requests.differences().await.unwrap().join("\n");
    for (what, change) in [
        ("when nobody pulls for 2 days", "--expiration-period=never"),
        ("delivers again after 1 to 2 s", "--min-retry-delay="),
        ("loses messages that nobody pulled for 1 h", "--message-retention-duration="),
        ("filter `attributes.team = \"billing\"`", "delete the subscription"),
        ("no dead-letter policy", ""),
    ] {
        assert!(said.contains(what) && said.contains(change), "{what}: {said}");
    }

    // One that Atlas made is as it should be.
    let Some(rig) = Rig::pubsub(test).await else { return };
    let queues = rig.open().await;
    assert_eq!(queues.requests.differences().await.unwrap(), Vec::<String>::new());
    assert_eq!(queues.dead_letters.unwrap().differences().await.unwrap(), Vec::<String>::new());
}

#[tokio::test]
async fn a_subscription_of_another_topic_is_refused() {
    let Some(rig) = Rig::pubsub("a_subscription_of_another_topic_is_refused").await else { return };
    let project = rig.pubsub_config().project_id.clone();
    rest(&rig, reqwest::Method::PUT, "topics/other", serde_json::json!({})).await;
    let topic = serde_json::json!({ "topic": format!("projects/{project}/topics/other") });
    rest(&rig, reqwest::Method::PUT, "subscriptions/architect_in-atlas", topic).await;
    let error = queue::open(&rig.config).await.err().expect("it is another topic's");
    assert_eq!(error.code(), "misconfigured");
    assert!(error.to_string().contains("topics/other"), "{error}");
}

#[tokio::test]
async fn an_exactly_once_subscription_confirms_its_acks() {
    let options = serde_json::json!({ "enableExactlyOnceDelivery": true });
    let test = "an_exactly_once_subscription_confirms_its_acks";
    let Some(rig) = rig_with_subscription(test, options).await else { return };
    let queues = rig.open().await;
    let id = rig.publish(&queues, b"x").await;
    pull(&queues.requests).await.handle.nack().await.unwrap();
    let again = pull(&queues.requests).await;
    assert_eq!(published_id(&again), id);
    ack(again).await;
}

#[tokio::test]
async fn a_closed_watcher_leaves_no_subscription() {
    let Some(rig) = Rig::pubsub("a_closed_watcher_leaves_no_subscription").await else { return };
    let watchers = async || {
        let list = rest(&rig, reqwest::Method::GET, "subscriptions", serde_json::json!({})).await;
        list.to_string().matches("atlas-ask-").count()
    };
    let answers = queue::watch_answers(&rig.config, TaskId::random()).await.unwrap();
    assert_eq!(watchers().await, 1);
    answers.close().await;
    assert_eq!(watchers().await, 0);
}

#[tokio::test]
async fn a_message_cannot_name_a_topic_into_being() {
    let Some(rig) = Rig::pubsub("a_message_cannot_name_a_topic_into_being").await else { return };
    let queues = rig.open().await;
    let error = queues.publisher.publish("reply-to-me", "x".into(), vec![]).await.unwrap_err();
    assert_eq!(error.code(), "unknown_topic");
}

#[tokio::test]
async fn a_dead_server_is_a_transient_error_within_the_bound() {
    // Port 9 of loopback: nothing listens there.
    let env = Env::default()
        .with("PUBSUB_EMULATOR_HOST", "127.0.0.1:9")
        .with("PUBSUB_PROJECT_ID", "nobody")
        .with("PUBSUB_TIMEOUT_SECONDS", "2");
    let error = timeout(BOUND, queue::open(&load(env))).await.expect("bounded").err().expect("nobody there");
    assert!(error.is_transient(), "{error}");
}

/// A rig behind a proxy that can break its network.
async fn rig_behind_proxy(test: &str) -> Option<(Rig, Proxy)> {
    let emulator = emulator(test).await?;
    let proxy = Proxy::start(&emulator.host).await.unwrap();
    let rig = Rig::on(&proxy.host(), &format!("test-{}", Uuid::new_v4().simple()));
    Some((rig, proxy))
}

/// A publisher that the proxy does not disturb.
async fn undisturbed(rig: &Rig, test: &str) -> Option<Queues> {
    let direct = Rig::on(&emulator(test).await?.host, &rig.pubsub_config().project_id);
    Some(direct.open().await)
}

/// Somebody who waits for a message behind a proxy, after one has come through.
struct Waiting {
    rig: Rig,
    proxy: Proxy,
    queues: Queues,
    /// Publishes past the proxy.
    direct: Queues,
    /// The next message.
    next: JoinHandle<Delivery>,
}

async fn waiting_behind_proxy(test: &str) -> Option<Waiting> {
    let (rig, proxy) = rig_behind_proxy(test).await?;
    let queues = rig.open().await;
    let direct = undisturbed(&rig, test).await?;
    rig.publish(&direct, b"before").await;
    ack(pull(&queues.requests).await).await;
    // Or the ack may be lost with the connection, and the message come again.
    queues.requests.flush(BOUND).await.unwrap();
    let next = tokio::spawn({
        let requests = queues.requests.clone();
        async move { pull_within(&requests, Duration::from_mins(3)).await }
    });
    Some(Waiting { rig, proxy, queues, direct, next })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cut_connection_loses_nothing_and_pulling_goes_on() {
    let test = "a_cut_connection_loses_nothing_and_pulling_goes_on";
    let Some((rig, proxy)) = rig_behind_proxy(test).await else { return };
    let queues = rig.open().await;
    let Some(direct) = undisturbed(&rig, test).await else { return };
    let mut published = BTreeSet::new();
    for how in [Cut::Reset, Cut::Finish, Cut::Reset] {
        for _ in 0..5 {
            published.insert(rig.publish(&direct, b"x").await);
        }
        // One is held while the connection breaks; what became of its ack nobody knows.
        let held = pull(&queues.requests).await;
        // What it held before the last cut may come without a new connection.
        let connected = async {
            while proxy.connections() == 0 {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        timeout(BOUND, connected).await.expect("it connects again");
        assert!(proxy.cut_all(how) > 0, "there was a connection to cut");
        let id = published_id(&held);
        let _ = timeout(BOUND, held.handle.ack()).await.expect("it ends, acked or not");
        published.remove(&id);
    }
    let rest = async {
        while !published.is_empty() {
            let delivery = pull(&queues.requests).await;
            published.remove(&published_id(&delivery));
            ack(delivery).await;
        }
    };
    timeout(BOUND, rest).await.expect("everything else comes");
}

#[tokio::test(flavor = "multi_thread")]
async fn pulling_resumes_soon_after_the_server_is_back() {
    let test = "pulling_resumes_soon_after_the_server_is_back";
    let Some(Waiting { rig, proxy, queues, direct, next }) = waiting_behind_proxy(test).await else { return };

    // Long enough for the client's own backoff to have grown, and for our probe to have seen it.
    proxy.go_down();
    let noticed = async {
        while queues.requests.check().await.is_ok() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(BOUND, noticed).await.expect("the outage is reported");
    tokio::time::sleep(Duration::from_secs(10)).await;
    proxy.come_back();
    rig.publish(&direct, b"after").await;
    // The client alone may take a minute; the probe looks every second.
    let delivery = timeout(Duration::from_secs(20), next).await.expect("pulling resumes").unwrap();
    assert_eq!(&delivery.data[..], b"after");
    ack(delivery).await;
    queues.requests.check().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_network_that_goes_silent_is_noticed_and_pulling_resumes() {
    let test = "a_network_that_goes_silent_is_noticed_and_pulling_resumes";
    let Some(Waiting { rig, proxy, queues, direct, next }) = waiting_behind_proxy(test).await else { return };
    // Connections that nobody closes and nothing comes through: only a probe can tell.
    proxy.go_silent();
    let noticed = async {
        while timeout(Duration::from_secs(2), queues.requests.check()).await.is_ok_and(|check| check.is_ok())
        {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(BOUND, noticed).await.expect("the silence is reported");
    // The old connections never speak again.
    proxy.cut_all(Cut::Finish);
    proxy.come_back();
    rig.publish(&direct, b"after").await;
    let delivery = timeout(BOUND, next).await.expect("pulling resumes").unwrap();
    assert_eq!(&delivery.data[..], b"after");
    ack(delivery).await;
}

async fn pull_within(queue: &Arc<dyn RequestQueue>, bound: Duration) -> Delivery {
    timeout(bound, queue.pull()).await.expect("a message in time").unwrap().expect("not draining")
}

#[tokio::test]
async fn a_created_subscription_has_the_policies_that_a_run_needs() {
    let Some(rig) = Rig::pubsub("a_created_subscription_has_the_policies_that_a_run_needs").await else {
        return;
    };
    rig.open().await;
    let get = async |name: &str| {
        rest(&rig, reqwest::Method::GET, &format!("subscriptions/{name}"), serde_json::json!({})).await
    };
    let requests = get("architect_in-atlas").await;
    assert!(requests["retryPolicy"]["maximumBackoff"].is_string(), "{requests}");
    let policy = &requests["deadLetterPolicy"];
    assert_eq!(policy["maxDeliveryAttempts"], MAX_DELIVERY_ATTEMPTS, "{requests}");
    assert!(policy["deadLetterTopic"].as_str().unwrap().ends_with("/topics/architect_dlq"), "{requests}");
    let letters = get("architect_dlq-atlas").await;
    assert!(letters["topic"].as_str().unwrap().ends_with("/topics/architect_dlq"), "{letters}");
    assert!(letters.get("deadLetterPolicy").is_none(), "dead letters are the end of the road: {letters}");
}
