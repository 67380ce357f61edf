//! Google Pub/Sub, through the official client.
//!
//! What this folder adds to the client: bounded time on every call, an error for what the client would
//! wait on for ever, a stream that is rebuilt within seconds of an outage, a limit on undecided
//! deliveries that holds where the server's flow control does not (the emulator's), and subscriptions
//! that are set up as the life cycle of a run needs them, or a message that says how to do it.

use std::{sync::Arc, time::Duration};

use atlas_shared::{
    Dependency, TaskId, UpstreamError,
    config::{PubSubConfig, WorkerConfig},
};
use google_cloud_auth::credentials::{Credentials, anonymous};
use google_cloud_gax::{error::rpc::Code, retry_policy::RetryPolicyExt as _};
use google_cloud_pubsub::{
    Error,
    client::{BasePublisher, Subscriber, SubscriptionAdmin, TopicAdmin},
    retry_policy::RetryableErrors,
};
use tokio::time::timeout;

use self::{
    admin::{Admin, SubscriptionSpec},
    answers::PubSubAnswers,
    publisher::PubSubPublisher,
    subscription::{PubSubQueue, StreamOptions},
};
use super::{AnswerStream, Queues, ResultPublisher, Tuning};

mod admin;
mod answers;
mod publisher;
mod subscription;

pub(super) async fn open(
    config: &PubSubConfig,
    worker: &WorkerConfig,
    tuning: &Tuning,
) -> Result<Queues, UpstreamError> {
    let connection = Connection::new(config);
    let admin = Arc::new(Admin::connect(&connection).await?);
    for (topic, variable) in [
        (&config.topic_in, "PUBSUB_TOPIC_IN"),
        (&config.topic_out, "PUBSUB_TOPIC_OUT"),
        (&config.topic_dlq, "PUBSUB_TOPIC_DLQ"),
    ] {
        admin.ensure_topic(topic, variable).await?;
    }
    let requests = SubscriptionSpec::of_requests(config, tuning);
    let dead_letters = SubscriptionSpec::of_dead_letters(config, tuning);
    for spec in [&requests, &dead_letters] {
        admin.ensure_subscription(spec).await?;
    }

    let documents = if worker.index_on_docs_added {
        admin.ensure_topic(&config.topic_docs, "PUBSUB_TOPIC_DOCS").await?;
        let spec = SubscriptionSpec::of_documents(config, tuning);
        admin.ensure_subscription(&spec).await?;
        Some(spec)
    } else {
        None
    };

    let subscriber = connection.subscriber().await?;
    let options = StreamOptions {
        in_flight: worker.max_in_flight,
        ack_deadline: tuning.lease,
        // A leaked handle must not hold its message for ever, a long run must not lose its own.
        max_lease: worker.run_timeout + Duration::from_mins(10),
    };
    let publisher = PubSubPublisher::connect(&connection, config, admin.clone()).await?;
    let documents = documents.map(|spec| {
        let queue = PubSubQueue::new(subscriber.clone(), admin.clone(), spec, options);
        Arc::new(queue) as Arc<dyn super::RequestQueue>
    });
    Ok(Queues {
        documents,
        requests: Arc::new(PubSubQueue::new(subscriber.clone(), admin.clone(), requests, options)),
        dead_letters: Some(Arc::new(PubSubQueue::new(subscriber, admin, dead_letters, options))),
        publisher: Arc::new(publisher),
    })
}

pub(super) async fn open_publisher(config: &PubSubConfig) -> Result<Arc<dyn ResultPublisher>, UpstreamError> {
    let connection = Connection::new(config);
    let admin = Arc::new(Admin::connect(&connection).await?);
    admin.ensure_topic(&config.topic_in, "PUBSUB_TOPIC_IN").await?;
    if config.create_missing {
        // A topic without a subscription forgets what is published to it: in development the first
        // request may well come before the first worker.
        admin.ensure_topic(&config.topic_dlq, "PUBSUB_TOPIC_DLQ").await?;
        admin.ensure_subscription(&SubscriptionSpec::of_requests(config, &Tuning::default())).await?;
    }
    Ok(Arc::new(PubSubPublisher::connect(&connection, config, admin).await?))
}

pub(super) async fn watch_answers(
    config: &PubSubConfig,
    task_id: TaskId,
) -> Result<Box<dyn AnswerStream>, UpstreamError> {
    let connection = Connection::new(config);
    let admin = Arc::new(Admin::connect(&connection).await?);
    admin.ensure_topic(&config.topic_out, "PUBSUB_TOPIC_OUT").await?;
    let subscriber = connection.subscriber().await?;
    Ok(Box::new(PubSubAnswers::start(config, subscriber, admin, task_id).await?))
}

/// Where and as whom the clients connect.
struct Connection {
    project: String,
    endpoint: Option<String>,
    timeout: Duration,
    create_missing: bool,
}

impl Connection {
    fn new(config: &PubSubConfig) -> Self {
        Self {
            project: config.project_id.clone(),
            endpoint: config.emulator.as_ref().map(|url| url.as_str().trim_end_matches('/').to_owned()),
            timeout: config.timeout,
            create_missing: config.create_missing,
        }
    }

    /// The emulator has no accounts, and a client with real credentials would send them to it.
    fn credentials(&self) -> Option<Credentials> {
        self.endpoint.as_ref().map(|_| anonymous::Builder::new().build())
    }

    async fn topic_admin(&self) -> Result<TopicAdmin, UpstreamError> {
        let mut builder = TopicAdmin::builder()
            .with_retry_policy(RetryableErrors.with_attempt_limit(3).with_time_limit(self.timeout));
        if let (Some(endpoint), Some(credentials)) = (&self.endpoint, self.credentials()) {
            builder = builder.with_endpoint(endpoint).with_credentials(credentials);
        }
        self.built(builder.build().await)
    }

    async fn subscription_admin(&self) -> Result<SubscriptionAdmin, UpstreamError> {
        let mut builder = SubscriptionAdmin::builder()
            .with_retry_policy(RetryableErrors.with_attempt_limit(3).with_time_limit(self.timeout));
        if let (Some(endpoint), Some(credentials)) = (&self.endpoint, self.credentials()) {
            builder = builder.with_endpoint(endpoint).with_credentials(credentials);
        }
        self.built(builder.build().await)
    }

    async fn subscriber(&self) -> Result<Subscriber, UpstreamError> {
        let mut builder = Subscriber::builder();
        if let (Some(endpoint), Some(credentials)) = (&self.endpoint, self.credentials()) {
            builder = builder.with_endpoint(endpoint).with_credentials(credentials);
        }
        self.built(builder.build().await)
    }

    async fn publisher(&self) -> Result<BasePublisher, UpstreamError> {
        let mut builder =
            BasePublisher::builder().with_retry_policy(RetryableErrors.with_time_limit(self.timeout));
        if let (Some(endpoint), Some(credentials)) = (&self.endpoint, self.credentials()) {
            builder = builder.with_endpoint(endpoint).with_credentials(credentials);
        }
        self.built(builder.build().await)
    }

    /// A client that cannot be built has no credentials or no valid endpoint.
    fn built<T>(
        &self,
        client: Result<T, google_cloud_gax::client_builder::Error>,
    ) -> Result<T, UpstreamError> {
        client.map_err(|error| {
            let (variable, fix) = if self.endpoint.is_some() {
                ("PUBSUB_EMULATOR_HOST", "set it to host:port of a running emulator")
            } else {
                (
                    "GOOGLE_APPLICATION_CREDENTIALS",
                    "run `gcloud auth application-default login`, or set it to the key file of a service account",
                )
            };
            UpstreamError::misconfigured(Dependency::Queue, variable, describe(&error), fix)
        })
    }
}

/// Bounds a call that the client itself might retry for longer.
async fn bounded<T>(
    bound: Duration,
    what: &str,
    call: impl Future<Output = Result<T, Error>>,
) -> Result<Result<T, Error>, UpstreamError> {
    timeout(bound, call).await.map_err(|_| {
        UpstreamError::transient(
            Dependency::Queue,
            format!("{what} took longer than {} ms", bound.as_millis()),
        )
    })
}

/// The gRPC code of an error, whichever protocol it came by.
fn code_of(error: &Error) -> Option<Code> {
    if let Some(status) = error.status() {
        return Some(status.code);
    }
    match error.http_status_code()? {
        400 => Some(Code::InvalidArgument),
        401 => Some(Code::Unauthenticated),
        403 => Some(Code::PermissionDenied),
        404 => Some(Code::NotFound),
        409 => Some(Code::AlreadyExists),
        _ => None,
    }
}

/// What a failed call means. `role` is the role that would have allowed it.
fn upstream(error: &Error, what: &str, project: &str, role: &str) -> UpstreamError {
    let message = format!("{what}: {}", describe(error));
    match code_of(error) {
        Some(Code::PermissionDenied) => UpstreamError::misconfigured(
            Dependency::Queue,
            "GOOGLE_APPLICATION_CREDENTIALS",
            message,
            format!(
                "allow it: `gcloud projects add-iam-policy-binding {project} \
                 --member=serviceAccount:YOUR-ACCOUNT --role={role}`"
            ),
        ),
        Some(Code::Unauthenticated) => no_credentials(message),
        Some(Code::InvalidArgument) => {
            UpstreamError::permanent(Dependency::Queue, "rejected_by_queue", message)
        }
        _ if error.is_authentication() => no_credentials(message),
        _ => UpstreamError::transient(Dependency::Queue, message),
    }
}

fn no_credentials(message: String) -> UpstreamError {
    UpstreamError::misconfigured(
        Dependency::Queue,
        "GOOGLE_APPLICATION_CREDENTIALS",
        message,
        "run `gcloud auth application-default login`, or set it to the key file of a service account",
    )
}

/// An error with its causes: the client's own text often says only "cannot connect".
fn describe(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}

#[cfg(test)]
#[expect(clippy::unwrap_used, clippy::panic, reason = "tests")]
mod tests {
    use google_cloud_gax::error::rpc::Status;

    use super::*;

    fn refused(code: Code) -> UpstreamError {
        let error = Error::service(Status::default().set_code(code).set_message("no"));
        upstream(&error, "pulling from s", "my-project", "roles/pubsub.subscriber")
    }

    #[test]
    fn a_missing_right_names_the_role_and_the_command() {
        let UpstreamError::Misconfigured { variable, message, fix, .. } = refused(Code::PermissionDenied)
        else {
            panic!("a person must grant it");
        };
        assert_eq!(variable, "GOOGLE_APPLICATION_CREDENTIALS");
        assert!(message.starts_with("pulling from s: "), "{message}");
        assert!(fix.contains("gcloud projects add-iam-policy-binding my-project"), "{fix}");
        assert!(fix.contains("--role=roles/pubsub.subscriber"), "{fix}");
    }

    #[test]
    fn what_passes_is_transient_and_what_never_will_is_not() {
        for code in [Code::Unavailable, Code::DeadlineExceeded, Code::Internal, Code::ResourceExhausted] {
            assert!(refused(code).is_transient(), "{code:?}");
        }
        assert_eq!(refused(Code::InvalidArgument).code(), "rejected_by_queue");
        assert_eq!(refused(Code::Unauthenticated).code(), "misconfigured");
    }

    #[test]
    fn a_bare_http_status_means_what_its_grpc_code_means() {
        let error = Error::http(403, http::HeaderMap::new(), bytes::Bytes::new());
        assert_eq!(code_of(&error), Some(Code::PermissionDenied));
    }

    /// Two TLS providers are linked into `atlas`; a client that cannot choose between them panics.
    #[tokio::test]
    async fn tls_is_set_up_without_a_panic() {
        let connection = Connection {
            project: "p".to_owned(),
            endpoint: Some("https://127.0.0.1:9".to_owned()),
            timeout: Duration::from_secs(2),
            create_missing: false,
        };
        let admin = Admin::connect(&connection).await.unwrap();
        let by_http = admin.ensure_topic("topic", "PUBSUB_TOPIC_IN").await.unwrap_err();
        assert!(by_http.is_transient(), "{by_http}");
        let publisher = connection.publisher().await.unwrap().publisher(admin.topic_path("topic")).build();
        let message = google_cloud_pubsub::model::Message::new().set_data("x");
        let by_grpc = timeout(Duration::from_secs(30), publisher.publish(message)).await.unwrap();
        assert!(by_grpc.is_err());
    }
}
