//! Topics and subscriptions: created where that is allowed, otherwise looked at, with the command that
//! mends what is wrong.

use std::time::Duration;

use atlas_shared::{Dependency, UpstreamError, config::PubSubConfig};
use google_cloud_gax::error::rpc::Code;
use google_cloud_pubsub::{
    client::{SubscriptionAdmin, TopicAdmin},
    model::{DeadLetterPolicy, ExpirationPolicy, RetryPolicy, Subscription},
};
use google_cloud_wkt as wkt;
use tracing::{info, warn};

use super::{Connection, bounded, code_of, upstream};
use crate::queue::Tuning;

/// What a subscription must look like.
#[derive(Clone, Debug)]
pub(super) struct SubscriptionSpec {
    pub(super) name: String,
    pub(super) topic: String,
    /// The setting that names it.
    pub(super) variable: &'static str,
    /// Where a message goes after how many deliveries.
    pub(super) dead_letters: Option<(String, u32)>,
    /// Delay of redelivery after a nack, from and to; `None`: at once.
    pub(super) backoff: Option<(Duration, Duration)>,
    pub(super) ack_deadline: Duration,
    pub(super) retention: Duration,
    /// Only messages that fit it, in Pub/Sub's filter language.
    pub(super) filter: String,
    /// Removed by Pub/Sub when nobody used it for so long; `None`: never.
    pub(super) expires: Option<Duration>,
}

impl SubscriptionSpec {
    pub(super) fn of_requests(config: &PubSubConfig, tuning: &Tuning) -> Self {
        Self {
            name: config.subscription.clone(),
            topic: config.topic_in.clone(),
            variable: "PUBSUB_SUBSCRIPTION",
            dead_letters: Some((config.topic_dlq.clone(), config.max_delivery_attempts)),
            backoff: Some((tuning.min_backoff, tuning.max_backoff)),
            ack_deadline: tuning.lease,
            retention: Duration::from_hours(7 * 24),
            filter: String::new(),
            expires: None,
        }
    }

    pub(super) fn of_dead_letters(config: &PubSubConfig, tuning: &Tuning) -> Self {
        Self {
            name: config.dlq_subscription.clone(),
            topic: config.topic_dlq.clone(),
            variable: "PUBSUB_DLQ_SUBSCRIPTION",
            dead_letters: None,
            ..Self::of_requests(config, tuning)
        }
    }

    pub(super) fn of_documents(config: &PubSubConfig, tuning: &Tuning) -> Self {
        Self {
            name: config.docs_subscription.clone(),
            topic: config.topic_docs.clone(),
            variable: "PUBSUB_DOCS_SUBSCRIPTION",
            ..Self::of_requests(config, tuning)
        }
    }

    fn gcloud_create(&self, project: &str) -> String {
        let mut command = format!(
            "gcloud pubsub subscriptions create {} --topic={} --project={project} --ack-deadline={} --expiration-period=never",
            self.name,
            self.topic,
            self.ack_deadline.as_secs()
        );
        for options in [self.gcloud_backoff(), self.gcloud_dead_letters()].into_iter().flatten() {
            command.push(' ');
            command.push_str(&options);
        }
        command
    }

    /// What is set otherwise than Atlas would set it, and the options that would.
    fn remarks(&self, found: &Subscription) -> Vec<(String, String)> {
        let mut remarks = Vec::new();
        if let Some(ttl) = found.expiration_policy.as_ref().and_then(|policy| policy.ttl.as_ref())
            && self.expires.is_none()
        {
            let days = ttl.seconds() / 86_400;
            remarks.push((
                format!("is removed by Pub/Sub, with all its messages, when nobody pulls for {days} days"),
                "--expiration-period=never".to_owned(),
            ));
        }
        if let (Some((min, max)), Some(policy), Some(options)) =
            (self.backoff, &found.retry_policy, self.gcloud_backoff())
        {
            let is = |said: &Option<wkt::Duration>, wanted: Duration| {
                said.as_ref().is_none_or(|said| *said == duration(wanted))
            };
            if !is(&policy.minimum_backoff, min) || !is(&policy.maximum_backoff, max) {
                let seconds = |said: &Option<wkt::Duration>| said.as_ref().map_or(0, wkt::Duration::seconds);
                remarks.push((
                    format!(
                        "delivers again after {} to {} s, where {} to {} s are meant",
                        seconds(&policy.minimum_backoff),
                        seconds(&policy.maximum_backoff),
                        min.as_secs(),
                        max.as_secs()
                    ),
                    options,
                ));
            }
        }
        if let Some(kept) = &found.message_retention_duration
            && *kept < duration(self.retention)
        {
            remarks.push((
                format!(
                    "loses messages that nobody pulled for {} h, where {} h are meant",
                    kept.seconds() / 3600,
                    self.retention.as_secs() / 3600
                ),
                format!("--message-retention-duration={}s", self.retention.as_secs()),
            ));
        }
        remarks
    }

    fn gcloud_backoff(&self) -> Option<String> {
        let (min, max) = self.backoff?;
        Some(format!("--min-retry-delay={}s --max-retry-delay={}s", min.as_secs(), max.as_secs()))
    }

    fn gcloud_dead_letters(&self) -> Option<String> {
        let (topic, attempts) = self.dead_letters.as_ref()?;
        Some(format!("--dead-letter-topic={topic} --max-delivery-attempts={attempts}"))
    }
}

/// The administrative half of Pub/Sub, with bounded time.
#[derive(Debug)]
pub(super) struct Admin {
    topics: TopicAdmin,
    subscriptions: SubscriptionAdmin,
    project: String,
    create_missing: bool,
    emulator: bool,
    timeout: Duration,
}

impl Admin {
    pub(super) async fn connect(connection: &Connection) -> Result<Self, UpstreamError> {
        Ok(Self {
            topics: connection.topic_admin().await?,
            subscriptions: connection.subscription_admin().await?,
            project: connection.project.clone(),
            create_missing: connection.create_missing,
            emulator: connection.endpoint.is_some(),
            timeout: connection.timeout,
        })
    }

    pub(super) fn project(&self) -> &str {
        &self.project
    }

    pub(super) fn timeout(&self) -> Duration {
        self.timeout
    }

    pub(super) fn creates_missing(&self) -> bool {
        self.create_missing
    }

    pub(super) fn is_emulator(&self) -> bool {
        self.emulator
    }

    pub(super) fn topic_path(&self, topic: &str) -> String {
        format!("projects/{}/topics/{topic}", self.project)
    }

    pub(super) fn subscription_path(&self, subscription: &str) -> String {
        format!("projects/{}/subscriptions/{subscription}", self.project)
    }

    /// Sees to it that the topic that `variable` names is there.
    pub(super) async fn ensure_topic(
        &self,
        topic: &str,
        variable: &'static str,
    ) -> Result<(), UpstreamError> {
        let path = self.topic_path(topic);
        let what = format!("looking at topic {topic}");
        match bounded(self.timeout, &what, self.topics.get_topic().set_topic(&path).send()).await? {
            Ok(_) => return Ok(()),
            Err(error) => match code_of(&error) {
                Some(Code::NotFound) => {}
                Some(Code::PermissionDenied) => {
                    // A publisher needs no right to look at its topic.
                    warn!(topic, "this account may not look at the topic, so it was not checked");
                    return Ok(());
                }
                _ => return Err(upstream(&error, &what, &self.project, "roles/pubsub.viewer")),
            },
        }
        if !self.create_missing {
            return Err(UpstreamError::misconfigured(
                Dependency::Queue,
                variable,
                format!("project {} has no topic {topic}", self.project),
                format!(
                    "`gcloud pubsub topics create {topic} --project={}`, or set PUBSUB_CREATE=true",
                    self.project
                ),
            ));
        }
        let what = format!("creating topic {topic}");
        match bounded(self.timeout, &what, self.topics.create_topic().set_name(&path).send()).await? {
            Ok(_) => {
                info!(topic, "topic created");
                Ok(())
            }
            // Another worker was quicker.
            Err(error) if code_of(&error) == Some(Code::AlreadyExists) => Ok(()),
            Err(error) => Err(upstream(&error, &what, &self.project, "roles/pubsub.editor")),
        }
    }

    /// Sees to it that a subscription is there and as it must be; logs what differs.
    pub(super) async fn ensure_subscription(&self, spec: &SubscriptionSpec) -> Result<(), UpstreamError> {
        match self.look_at(&spec.name).await? {
            Look::Found(found) => {
                for difference in self.compare(spec, &found)? {
                    warn!(subscription = spec.name, "{difference}");
                }
                Ok(())
            }
            Look::Forbidden => {
                warn!(
                    subscription = spec.name,
                    "this account may not look at the subscription, so its policies were not checked; \
                     roles/pubsub.viewer allows it"
                );
                Ok(())
            }
            Look::Missing if self.create_missing => self.create_subscription(spec).await,
            Look::Missing => Err(self.missing_subscription(spec)),
        }
    }

    /// The same without creating or logging anything.
    pub(super) async fn check_subscription(&self, spec: &SubscriptionSpec) -> Result<(), UpstreamError> {
        match self.look_at(&spec.name).await? {
            Look::Found(found) => self.compare(spec, &found).map(|_| ()),
            Look::Forbidden => Ok(()),
            Look::Missing => Err(self.missing_subscription(spec)),
        }
    }

    /// What is not as Atlas would set it, in words, with the command that would.
    pub(super) async fn differences(&self, spec: &SubscriptionSpec) -> Result<Vec<String>, UpstreamError> {
        match self.look_at(&spec.name).await? {
            Look::Found(found) => self.compare(spec, &found),
            Look::Forbidden | Look::Missing => Ok(Vec::new()),
        }
    }

    /// Only whether it is there.
    pub(super) async fn has_subscription(&self, name: &str) -> Result<bool, UpstreamError> {
        Ok(!matches!(self.look_at(name).await?, Look::Missing))
    }

    async fn look_at(&self, subscription: &str) -> Result<Look, UpstreamError> {
        let what = format!("looking at subscription {subscription}");
        let call =
            self.subscriptions.get_subscription().set_subscription(self.subscription_path(subscription));
        match bounded(self.timeout, &what, call.send()).await? {
            Ok(found) => Ok(Look::Found(Box::new(found))),
            Err(error) => match code_of(&error) {
                Some(Code::NotFound) => Ok(Look::Missing),
                // `roles/pubsub.subscriber` may pull but not look.
                Some(Code::PermissionDenied) => Ok(Look::Forbidden),
                _ => Err(upstream(&error, &what, &self.project, "roles/pubsub.viewer")),
            },
        }
    }

    pub(super) fn missing_subscription(&self, spec: &SubscriptionSpec) -> UpstreamError {
        UpstreamError::misconfigured(
            Dependency::Queue,
            spec.variable,
            format!("project {} has no subscription {}", self.project, spec.name),
            format!("`{}`, or set PUBSUB_CREATE=true", spec.gcloud_create(&self.project)),
        )
    }

    pub(super) async fn create_subscription(&self, spec: &SubscriptionSpec) -> Result<(), UpstreamError> {
        let mut wanted = Subscription::new()
            .set_name(self.subscription_path(&spec.name))
            .set_topic(self.topic_path(&spec.topic))
            .set_ack_deadline_seconds(
                i32::try_from(spec.ack_deadline.as_secs()).unwrap_or(600).clamp(10, 600),
            )
            .set_message_retention_duration(duration(spec.retention))
            .set_filter(&spec.filter)
            // Without a time to live: never. The default would remove it after 31 quiet days.
            .set_expiration_policy(match spec.expires {
                Some(after) => ExpirationPolicy::new().set_ttl(duration(after)),
                None => ExpirationPolicy::new(),
            });
        if let Some((min, max)) = spec.backoff {
            wanted = wanted.set_retry_policy(
                RetryPolicy::new().set_minimum_backoff(duration(min)).set_maximum_backoff(duration(max)),
            );
        }
        if let Some((topic, attempts)) = &spec.dead_letters {
            wanted = wanted.set_dead_letter_policy(
                DeadLetterPolicy::new()
                    .set_dead_letter_topic(self.topic_path(topic))
                    .set_max_delivery_attempts(i32::try_from(*attempts).unwrap_or(100)),
            );
        }
        let what = format!("creating subscription {}", spec.name);
        let call = self.subscriptions.create_subscription().with_request(wanted);
        match bounded(self.timeout, &what, call.send()).await? {
            Ok(_) => {
                info!(subscription = spec.name, topic = spec.topic, "subscription created");
                Ok(())
            }
            Err(error) if code_of(&error) == Some(Code::AlreadyExists) => Ok(()),
            Err(error) => Err(upstream(&error, &what, &self.project, "roles/pubsub.editor")),
        }
    }

    pub(super) async fn delete_subscription(&self, name: &str) -> Result<(), UpstreamError> {
        let what = format!("deleting subscription {name}");
        let call = self.subscriptions.delete_subscription().set_subscription(self.subscription_path(name));
        match bounded(self.timeout, &what, call.send()).await? {
            Ok(()) => Ok(()),
            Err(error) if code_of(&error) == Some(Code::NotFound) => Ok(()),
            Err(error) => Err(upstream(&error, &what, &self.project, "roles/pubsub.editor")),
        }
    }

    /// What is missing is an error; what only differs is somebody's choice, and is returned in words.
    fn compare(&self, spec: &SubscriptionSpec, found: &Subscription) -> Result<Vec<String>, UpstreamError> {
        let name = &spec.name;
        let create = format!("`{}`", spec.gcloud_create(&self.project));
        let update = |options: &str| {
            format!("`gcloud pubsub subscriptions update {name} --project={} {options}`", self.project)
        };
        let wrong = |message: String, fix: String| {
            UpstreamError::misconfigured(Dependency::Queue, spec.variable, message, fix)
        };
        let mut differences = Vec::new();
        // In development a subscription made by hand serves; it is only said what it lacks.
        let mut missing = |message: String, options: &str| {
            if self.create_missing {
                differences.push(message);
                return Ok(());
            }
            Err(wrong(message, update(options)))
        };

        if found.topic != self.topic_path(&spec.topic) {
            return Err(wrong(
                format!("subscription {name} belongs to {}, not to topic {}", found.topic, spec.topic),
                format!("name another subscription, or delete this one and create it anew: {create}"),
            ));
        }
        if found.detached {
            return Err(wrong(
                format!("subscription {name} was detached from its topic and gets no messages"),
                format!("delete it and create it anew: {create}"),
            ));
        }
        if found.push_config.as_ref().is_some_and(|push| !push.push_endpoint.is_empty()) {
            return Err(wrong(
                format!("subscription {name} pushes its messages to an endpoint; Atlas pulls"),
                update("--push-endpoint=\"\""),
            ));
        }
        if let (Some(options), None) = (spec.gcloud_backoff(), &found.retry_policy) {
            missing(
                format!(
                    "subscription {name} has no retry policy: what is given back comes again at once and burns its delivery attempts"
                ),
                &options,
            )?;
        }
        if let (Some(options), None) = (spec.gcloud_dead_letters(), &found.dead_letter_policy) {
            missing(
                format!(
                    "subscription {name} has no dead-letter policy: a message that crashes workers is delivered for ever"
                ),
                &options,
            )?;
        }
        if let (Some((topic, attempts)), Some(policy)) = (&spec.dead_letters, &found.dead_letter_policy)
            && (policy.dead_letter_topic != self.topic_path(topic)
                || u32::try_from(policy.max_delivery_attempts) != Ok(*attempts))
        {
            differences.push(format!(
                "subscription {name} sends dead letters to {} after {} deliveries; configured are {topic} and {attempts}",
                policy.dead_letter_topic, policy.max_delivery_attempts
            ));
        }
        if found.filter != spec.filter {
            differences.push(format!(
                "subscription {name} has the filter `{}`, so messages that do not fit it never come; a filter cannot be \
                 changed: delete the subscription and create it anew: {create}",
                found.filter
            ));
        }
        differences.extend(spec.remarks(found).into_iter().map(|(remark, options)| {
            format!("subscription {name} {remark}; to change it: {}", update(&options))
        }));
        Ok(differences)
    }
}

/// What came of looking at a subscription.
enum Look {
    Found(Box<Subscription>),
    Missing,
    /// This account may not look.
    Forbidden,
}

fn duration(duration: Duration) -> wkt::Duration {
    wkt::Duration::clamp(
        i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        i32::try_from(duration.subsec_nanos()).unwrap_or(0),
    )
}
