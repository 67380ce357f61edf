//! `docs_added`: from a message on the topic to an index job in the gateway, on both queues.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use atlas_shared::{Config, Env, config::Process, gateway_api::IndexRepository};
use atlas_test_support::emulator::Emulator;
use atlas_worker::{Worker, queue, store};
use axum::{
    Json, Router,
    extract::State,
    http::StatusCode,
    response::{IntoResponse as _, Response},
    routing::{get, post},
};
use serde_json::{Value, json};
use uuid::Uuid;

/// Nothing here takes this long; a test that does has failed.
const BOUND: Duration = Duration::from_secs(120);

/// What the gateway was asked, and how often it refused before it took anything.
#[derive(Default)]
struct Gateway {
    taken: Mutex<Vec<IndexRepository>>,
    busy: Mutex<u32>,
}

/// A gateway that is busy twice, takes what is below `/srv` and refuses the rest.
async fn gateway() -> (Arc<Gateway>, String) {
    async fn index(State(gateway): State<Arc<Gateway>>, Json(request): Json<IndexRepository>) -> Response {
        let problem = |status: u16, kind: &str| {
            let body = json!({"type": kind, "title": "t", "status": status, "detail": "INDEX_ALLOWED_ROOTS says which"});
            let headers = [("content-type", "application/problem+json")];
            (StatusCode::from_u16(status).unwrap(), headers, body.to_string()).into_response()
        };
        let mut busy = gateway.busy.lock().unwrap();
        if *busy < 2 {
            *busy += 1;
            return problem(503, "upstream_unavailable");
        }
        if !request.repo.starts_with("/srv/") {
            return problem(422, "source_not_allowed");
        }
        gateway.taken.lock().unwrap().push(request);
        (StatusCode::ACCEPTED, Json(json!({"job_id": "j-1"}))).into_response()
    }
    let gateway = Arc::<Gateway>::default();
    let app = Router::new()
        .route("/v1/index", post(index))
        .route("/health/ready", get(|| async { Json(json!({"status": "ready"})) }))
        .with_state(Arc::clone(&gateway));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, app).await });
    (gateway, url)
}

/// Messages become jobs; what the gateway refuses, or nobody can read, becomes a dead letter.
async fn messages_become_jobs(env: Env) {
    let (gateway, url) = gateway().await;
    let env = env
        .with("WORKER_LISTEN", "127.0.0.1:0")
        .with("RAG_URL", url)
        .with("RETRY_BASE_MILLISECONDS", "1")
        .with("CIRCUIT_OPEN_SECONDS", "1")
        .with("INDEX_ON_DOCS_ADDED", "true");
    let config = Config::load(&env, Process::Worker).unwrap();
    let worker = Worker::start(&config).await.unwrap();
    let publisher = queue::open_publisher(&config).await.unwrap();
    let topic = queue::Topics::of(&config).documents;
    for message in [
        json!({"repo": "/srv/shop", "path": "docs"}),
        json!({"repo": "/etc"}),
        json!(["nonsense"]),
        json!({"repo": "/srv/door", "collection": "doors", "by": "ci"}),
    ] {
        publisher.publish(&topic, message.to_string().into(), Vec::new()).await.unwrap();
    }
    let store = store::open(&config).await.unwrap();
    let letters = async || -> i64 {
        let text = reqwest_metrics(&worker.addr.to_string()).await;
        text.lines()
            .filter_map(|line| line.strip_prefix("atlas_dead_letters_total{reason=\"docs_added_refused\"} "))
            .filter_map(|count| count.parse::<i64>().ok())
            .sum()
    };
    tokio::time::timeout(BOUND, async {
        while gateway.taken.lock().unwrap().len() < 2 || letters().await < 2 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await
    .expect("all four are done");
    let mut taken = gateway.taken.lock().unwrap().clone();
    taken.sort_by(|a, b| a.repo.cmp(&b.repo));
    let of = |repo: &str, path: Option<&str>, collection: Option<&str>| IndexRepository {
        repo: repo.to_owned(),
        path: path.map(str::to_owned),
        collection: collection.map(str::to_owned),
    };
    assert_eq!(taken, [of("/srv/door", None, Some("doors")), of("/srv/shop", Some("docs"), None)]);
    store.check().await.unwrap();
    worker.drain().await;
}

/// The worker's own metrics, over HTTP.
async fn reqwest_metrics(addr: &str) -> String {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let mut stream = tokio::net::TcpStream::connect(addr).await.unwrap();
    stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    text
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_become_jobs_on_the_embedded_queue() {
    let dir = tempfile::tempdir().unwrap();
    messages_become_jobs(Env::default().with("ATLAS_DATA_DIR", dir.path().display().to_string())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_become_jobs_on_pubsub() {
    let emulator = match Emulator::start().await {
        Ok(emulator) => emulator,
        Err(reason) => {
            return atlas_test_support::skip(
                "messages_become_jobs_on_pubsub",
                "the Pub/Sub emulator",
                &reason,
            );
        }
    };
    let dir = tempfile::tempdir().unwrap();
    let env = Env::default()
        .with("ATLAS_DATA_DIR", dir.path().display().to_string())
        .with("PUBSUB_EMULATOR_HOST", emulator.host.clone())
        .with("PUBSUB_PROJECT_ID", format!("docs-{}", Uuid::new_v4().simple()));
    messages_become_jobs(env).await;
}

#[tokio::test]
async fn without_the_flag_nobody_reads_the_topic() {
    let dir = tempfile::tempdir().unwrap();
    let env = Env::default().with("ATLAS_DATA_DIR", dir.path().display().to_string());
    let config = Config::load(&env, Process::Cli).unwrap();
    let queues = queue::open(&config).await.unwrap();
    assert!(queues.documents.is_none());
    // And a message to it is no error: there is a topic, without a subscription.
    let message: Value = json!({"repo": "/srv/shop"});
    queues.publisher.publish("docs_added", message.to_string().into(), Vec::new()).await.unwrap();
}
