//! Identifiers that must not be mixed up.

use std::fmt;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Names the namespace in which a Pub/Sub message id becomes a task id (UUID v5, RFC 9562 section 5.5).
const MESSAGE_ID_NAMESPACE: Uuid = Uuid::from_u128(0x6f2a_6c1e_5f0b_4c55_9b8e_61d0_0a71_a5e2);

/// One request and everything that is done for it. Chosen by the publisher, or derived from the message id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct TaskId(pub Uuid);

impl TaskId {
    /// A new random task id, for publishers.
    pub fn random() -> Self {
        Self(Uuid::new_v4())
    }

    /// The stable task id of a message that carries none: every redelivery of the message gives the same id.
    pub fn from_message_id(message_id: &str) -> Self {
        Self(Uuid::new_v5(&MESSAGE_ID_NAMESPACE, message_id.as_bytes()))
    }
}

impl fmt::Display for TaskId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl std::str::FromStr for TaskId {
    type Err = uuid::Error;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Uuid::parse_str(text).map(Self)
    }
}

/// One worker process, as it signs leases: host name, process id and a random part.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct WorkerId(pub String);

impl WorkerId {
    /// The id of this process. Unique even when containers share host name and process id.
    pub fn of_this_process() -> Self {
        let host = std::env::var("HOSTNAME").unwrap_or_else(|_| "worker".to_owned());
        let nonce = Uuid::new_v4().simple().to_string();
        Self(format!("{host}-{}-{}", std::process::id(), &nonce[..8]))
    }
}

impl fmt::Display for WorkerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_id_always_gives_the_same_task_id() {
        let first = TaskId::from_message_id("1234");
        assert_eq!(first, TaskId::from_message_id("1234"));
        assert_ne!(first, TaskId::from_message_id("1235"));
        assert_eq!(first.0.get_version_num(), 5);
        // Pinned: a change here would serve every message in flight twice across an upgrade.
        assert_eq!(first.to_string(), "9d7d71f9-9614-5f4b-9a22-ebbd54783bd1");
    }
}
