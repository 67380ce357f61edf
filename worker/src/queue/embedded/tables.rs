//! The embedded queue's tables and what is done to them. The caller runs each function in one
//! transaction: what writes, in one that holds the file's write lock (`Database::write`).
//!
//! Topics, subscriptions and deliveries as in Pub/Sub: a message is stored once; every subscription
//! of its topic has a row in `queue_deliveries` for it until it is acked. A message without any
//! delivery is kept for watchers, bounded by time and number, and then removed.
//!
//! A claim writes a random lease and a time until which nobody else sees the delivery; whoever decides
//! it must still hold that lease. Times are milliseconds since the epoch by the database's clock.

use std::time::Duration;

use atlas_shared::{Dependency, UpstreamError};
use rusqlite::{Connection, OptionalExtension as _, Params, Row, params};
use uuid::Uuid;

/// Kept messages: those that no subscription waits for.
const KEEP_FOR: Duration = Duration::from_secs(24 * 60 * 60);
const KEEP_AT_MOST: i64 = 10_000;

/// As long as Pub/Sub keeps a message that nobody acks.
const DELIVER_FOR: Duration = Duration::from_secs(7 * 24 * 60 * 60);

/// What is too old or too much is removed with every so manieth message, up to [`REMOVED_AT_ONCE`] rows.
const REMOVE_EVERY: i64 = 16;
const REMOVED_AT_ONCE: i64 = 100;

/// Messages that wait in one subscription before publishing is refused.
const BACKLOG_AT_MOST: i64 = 100_000;

pub(super) const SCHEMA: &str = "
CREATE TABLE IF NOT EXISTS queue_messages (
    id           INTEGER PRIMARY KEY AUTOINCREMENT,
    message_id   TEXT    NOT NULL,
    topic        TEXT    NOT NULL,
    task_id      TEXT,
    data         BLOB    NOT NULL,
    attributes   TEXT    NOT NULL,
    published_at INTEGER NOT NULL,
    -- 1: no subscription waits for it; it is there for watchers.
    kept         INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE INDEX IF NOT EXISTS queue_messages_by_task ON queue_messages (topic, task_id, id);
CREATE INDEX IF NOT EXISTS queue_messages_kept ON queue_messages (id) WHERE kept = 1;
-- Of earlier versions. Ids are given in the order of publishing, so they tell the age too.
DROP INDEX IF EXISTS queue_messages_by_age;
DROP INDEX IF EXISTS queue_messages_kept_by_age;
CREATE TABLE IF NOT EXISTS queue_subscriptions (
    name  TEXT PRIMARY KEY,
    topic TEXT NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS queue_deliveries (
    subscription TEXT    NOT NULL,
    message      INTEGER NOT NULL REFERENCES queue_messages (id) ON DELETE CASCADE,
    attempt      INTEGER NOT NULL DEFAULT 0,
    visible_at   INTEGER NOT NULL,
    lease        TEXT,
    PRIMARY KEY (subscription, message)
) STRICT, WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS queue_deliveries_due ON queue_deliveries (subscription, visible_at, message);
CREATE INDEX IF NOT EXISTS queue_deliveries_by_message ON queue_deliveries (message);
";

/// How one subscription redelivers.
#[derive(Clone, Debug)]
pub(super) struct Policy {
    pub(super) subscription: String,
    pub(super) min_backoff: Duration,
    pub(super) max_backoff: Duration,
    pub(super) lease: Duration,
    /// Where a message goes after how many deliveries.
    pub(super) dead_letters: Option<(String, u32)>,
}

/// A claimed delivery.
#[derive(Debug)]
pub(super) struct Claimed {
    pub(super) message: i64,
    pub(super) lease: String,
    pub(super) message_id: String,
    pub(super) data: Vec<u8>,
    pub(super) attributes: Vec<(String, String)>,
    pub(super) attempt: u32,
}

/// A message as a watcher reads it.
pub(super) struct Kept {
    pub(super) id: i64,
    pub(super) data: Vec<u8>,
}

pub(super) fn subscribe(connection: &Connection, name: &str, topic: &str) -> rusqlite::Result<()> {
    execute(
        connection,
        "INSERT INTO queue_subscriptions (name, topic) VALUES (?1, ?2)
         ON CONFLICT (name) DO UPDATE SET topic = excluded.topic WHERE topic <> excluded.topic",
        params![name, topic],
    )?;
    Ok(())
}

pub(super) fn is_subscribed(connection: &Connection, name: &str) -> rusqlite::Result<bool> {
    query_row(connection, "SELECT 1 FROM queue_subscriptions WHERE name = ?1", [name], |_| Ok(()))
        .optional()
        .map(|row| row.is_some())
}

/// A message that was stored.
#[derive(Debug)]
pub(super) struct Stored {
    pub(super) message_id: String,
    /// True when a subscription waits for it; otherwise it is kept for watchers.
    pub(super) delivered: bool,
}

/// Stores a message for every subscription of `topic`, and for watchers.
pub(super) fn publish(
    connection: &Connection,
    topic: &str,
    data: &[u8],
    attributes: &[(String, String)],
    now: i64,
) -> Result<Stored, UpstreamError> {
    let full: Option<String> = query_row(
        connection,
        "SELECT name FROM queue_subscriptions s WHERE topic = ?1 AND EXISTS (
                 SELECT 1 FROM queue_deliveries d WHERE d.subscription = s.name LIMIT 1 OFFSET ?2)",
        params![topic, BACKLOG_AT_MOST - 1],
        |row| row.get(0),
    )
    .optional()?;
    if let Some(subscription) = full {
        return Err(UpstreamError::transient(
            Dependency::Queue,
            format!("{BACKLOG_AT_MOST} messages wait already in subscription {subscription}"),
        ));
    }
    let message_id = Uuid::now_v7().to_string();
    let delivered = insert(connection, topic, &message_id, data, attributes, now)?;
    if connection.last_insert_rowid() % REMOVE_EVERY == 0 {
        remove_old(connection, now)?;
    }
    Ok(Stored { message_id, delivered })
}

/// Whether [`claim`] would find something, so that an idle consumer, which looks often, does not take
/// the write lock for it; otherwise when the next delivery is due.
pub(super) fn look(connection: &Connection, policy: &Policy, now: i64) -> rusqlite::Result<Look> {
    let next: Option<i64> = query_row(
        connection,
        "SELECT min(visible_at) FROM queue_deliveries WHERE subscription = ?1",
        [&policy.subscription],
        |row| row.get(0),
    )?;
    Ok(match next {
        Some(at) if at <= now => Look::Due,
        Some(at) => Look::In(Duration::from_millis(u64::try_from(at - now).unwrap_or(0))),
        None => Look::Empty,
    })
}

/// What [`look`] saw.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Look {
    /// Something can be claimed.
    Due,
    /// Something can be claimed after so long.
    In(Duration),
    /// Nothing waits.
    Empty,
}

/// Takes the oldest delivery that is due, if there is one.
pub(super) fn claim(connection: &Connection, policy: &Policy, now: i64) -> rusqlite::Result<Option<Claimed>> {
    let claimed = loop {
        let Some((message, attempt)) = due(connection, policy, now)? else { break None };
        // Its last consumer died with it: no consumer is left to say so, so it is noticed here.
        if let Some((topic, max)) = &policy.dead_letters
            && attempt >= *max
        {
            dead_letter(connection, policy, message, topic, attempt, now)?;
            continue;
        }
        let lease = Uuid::new_v4().to_string();
        execute(
            connection,
            "UPDATE queue_deliveries SET attempt = attempt + 1, lease = ?3, visible_at = ?4
             WHERE subscription = ?1 AND message = ?2",
            params![policy.subscription, message, lease, now + millis(policy.lease)],
        )?;
        let (message_id, data, attributes) = query_row(
            connection,
            "SELECT message_id, data, attributes FROM queue_messages WHERE id = ?1",
            [message],
            |row| Ok((row.get(0)?, row.get(1)?, row.get::<_, String>(2)?)),
        )?;
        let attributes = decode(&attributes);
        break Some(Claimed { message, lease, message_id, data, attributes, attempt: attempt + 1 });
    };
    Ok(claimed)
}

/// Removes a delivery for good. False: the lease was lost, and the message will come again.
pub(super) fn ack(
    connection: &Connection,
    policy: &Policy,
    message: i64,
    lease: &str,
) -> rusqlite::Result<bool> {
    let held = execute(
        connection,
        "DELETE FROM queue_deliveries WHERE subscription = ?1 AND message = ?2 AND lease = ?3",
        params![policy.subscription, message, lease],
    )? > 0;
    if held {
        remove_delivered(connection, message)?;
    }
    Ok(held)
}

/// Gives a delivery back: due again after the backoff, or a dead letter after the last attempt.
pub(super) fn nack(
    connection: &Connection,
    policy: &Policy,
    message: i64,
    lease: &str,
    now: i64,
) -> rusqlite::Result<()> {
    let attempt: Option<u32> = query_row(
        connection,
        "SELECT attempt FROM queue_deliveries WHERE subscription = ?1 AND message = ?2 AND lease = ?3",
        params![policy.subscription, message, lease],
        |row| row.get(0),
    )
    .optional()?;
    // Without the lease it is somebody else's to decide.
    if let Some(attempt) = attempt {
        match &policy.dead_letters {
            Some((topic, max)) if attempt >= *max => {
                dead_letter(connection, policy, message, topic, attempt, now)?;
            }
            _ => {
                execute(
                    connection,
                    "UPDATE queue_deliveries SET lease = NULL, visible_at = ?3
                     WHERE subscription = ?1 AND message = ?2",
                    params![policy.subscription, message, now + millis(backoff(policy, attempt))],
                )?;
            }
        }
    }
    Ok(())
}

/// Undoes a claim that nobody saw: due at once, and the attempt does not count.
pub(super) fn unclaim(
    connection: &Connection,
    policy: &Policy,
    message: i64,
    lease: &str,
    now: i64,
) -> rusqlite::Result<()> {
    execute(
        connection,
        "UPDATE queue_deliveries SET lease = NULL, attempt = attempt - 1, visible_at = ?4
         WHERE subscription = ?1 AND message = ?2 AND lease = ?3",
        params![policy.subscription, message, lease, now],
    )?;
    Ok(())
}

/// Extends leases that are still ours.
pub(super) fn renew(
    connection: &Connection,
    policy: &Policy,
    leases: &[(i64, String)],
    now: i64,
) -> rusqlite::Result<()> {
    for (message, lease) in leases {
        execute(
            connection,
            "UPDATE queue_deliveries SET visible_at = ?4
             WHERE subscription = ?1 AND message = ?2 AND lease = ?3",
            params![policy.subscription, message, lease, now + millis(policy.lease)],
        )?;
    }
    Ok(())
}

/// How many messages wait, and when the oldest was published.
pub(super) fn backlog(connection: &Connection, subscription: &str) -> rusqlite::Result<(u64, Option<i64>)> {
    query_row(
        connection,
        "SELECT count(*), min(m.published_at)
         FROM queue_deliveries d JOIN queue_messages m ON m.id = d.message WHERE d.subscription = ?1",
        [subscription],
        |row| Ok((u64::try_from(row.get::<_, i64>(0)?).unwrap_or(0), row.get(1)?)),
    )
}

/// The id of the newest message: watchers start behind it.
pub(super) fn newest(connection: &Connection) -> rusqlite::Result<i64> {
    query_row(connection, "SELECT coalesce(max(id), 0) FROM queue_messages", [], |row| row.get(0))
}

/// The first message of a task on `topic` behind `after`.
pub(super) fn next_of_task(
    connection: &Connection,
    topic: &str,
    task_id: &str,
    after: i64,
) -> rusqlite::Result<Option<Kept>> {
    query_row(
        connection,
        "SELECT id, data FROM queue_messages WHERE topic = ?1 AND task_id = ?2 AND id > ?3
             ORDER BY id LIMIT 1",
        params![topic, task_id, after],
        |row| Ok(Kept { id: row.get(0)?, data: row.get(1)? }),
    )
    .optional()
}

fn due(connection: &Connection, policy: &Policy, now: i64) -> rusqlite::Result<Option<(i64, u32)>> {
    query_row(
        connection,
        "SELECT message, attempt FROM queue_deliveries
             WHERE subscription = ?1 AND visible_at <= ?2 ORDER BY visible_at, message LIMIT 1",
        params![policy.subscription, now],
        |row| Ok((row.get(0)?, row.get(1)?)),
    )
    .optional()
}

/// True: a subscription waits for it.
fn insert(
    connection: &Connection,
    topic: &str,
    message_id: &str,
    data: &[u8],
    attributes: &[(String, String)],
    now: i64,
) -> rusqlite::Result<bool> {
    let delivered: bool = query_row(
        connection,
        "SELECT EXISTS (SELECT 1 FROM queue_subscriptions WHERE topic = ?1)",
        [topic],
        |row| row.get(0),
    )?;
    let task_id = attributes.iter().find(|(key, _)| key == "task_id").map(|(_, value)| value);
    execute(
        connection,
        "INSERT INTO queue_messages (message_id, topic, task_id, data, attributes, published_at, kept)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
        params![message_id, topic, task_id, data, encode(attributes), now, !delivered],
    )?;
    if delivered {
        // `last_insert_rowid` stays the message's: deliveries have no row id.
        let message = connection.last_insert_rowid();
        execute(
            connection,
            "INSERT INTO queue_deliveries (subscription, message, visible_at)
             SELECT name, ?1, ?2 FROM queue_subscriptions WHERE topic = ?3",
            params![message, now, topic],
        )?;
    }
    Ok(delivered)
}

/// Moves a message to the dead-letter topic, with the attributes that Pub/Sub adds. It keeps its
/// message id, so that a task without an id of its own is still recognised.
fn dead_letter(
    connection: &Connection,
    policy: &Policy,
    message: i64,
    topic: &str,
    attempts: u32,
    now: i64,
) -> rusqlite::Result<()> {
    let (message_id, data, attributes): (String, Vec<u8>, String) = query_row(
        connection,
        "SELECT message_id, data, attributes FROM queue_messages WHERE id = ?1",
        [message],
        |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)),
    )?;
    let mut attributes = decode(&attributes);
    attributes.push(("CloudPubSubDeadLetterSourceDeliveryCount".to_owned(), attempts.to_string()));
    attributes.push(("CloudPubSubDeadLetterSourceSubscription".to_owned(), policy.subscription.clone()));
    insert(connection, topic, &message_id, &data, &attributes, now)?;
    execute(
        connection,
        "DELETE FROM queue_deliveries WHERE subscription = ?1 AND message = ?2",
        params![policy.subscription, message],
    )?;
    remove_delivered(connection, message)
}

fn remove_delivered(connection: &Connection, message: i64) -> rusqlite::Result<()> {
    execute(
        connection,
        "DELETE FROM queue_messages WHERE id = ?1
         AND NOT EXISTS (SELECT 1 FROM queue_deliveries WHERE message = ?1)",
        [message],
    )?;
    Ok(())
}

/// Bounds what is kept. A few rows at a time, so that no publisher pays for all of a backlog. Each
/// statement looks at the oldest rows only: this runs while messages are published.
fn remove_old(connection: &Connection, now: i64) -> rusqlite::Result<()> {
    execute(
        connection,
        "DELETE FROM queue_messages WHERE published_at < ?1 AND id IN (
                 SELECT id FROM queue_messages ORDER BY id LIMIT ?2)",
        [now - millis(DELIVER_FOR), REMOVED_AT_ONCE],
    )?;
    execute(
        connection,
        "DELETE FROM queue_messages WHERE published_at < ?1 AND id IN (
                 SELECT id FROM queue_messages WHERE kept = 1 ORDER BY id LIMIT ?2)",
        [now - millis(KEEP_FOR), REMOVED_AT_ONCE],
    )?;
    execute(
        connection,
        "DELETE FROM queue_messages WHERE id IN (
                 SELECT id FROM queue_messages
                 WHERE kept = 1 AND id <= (SELECT max(id) FROM queue_messages) - ?1 ORDER BY id LIMIT ?2)",
        [KEEP_AT_MOST, REMOVED_AT_ONCE],
    )?;
    Ok(())
}

/// Both run often: their statements are prepared once.
fn execute(connection: &Connection, sql: &str, params: impl Params) -> rusqlite::Result<usize> {
    connection.prepare_cached(sql)?.execute(params)
}

fn query_row<T>(
    connection: &Connection,
    sql: &str,
    params: impl Params,
    read: impl FnOnce(&Row<'_>) -> rusqlite::Result<T>,
) -> rusqlite::Result<T> {
    connection.prepare_cached(sql)?.query_row(params, read)
}

fn backoff(policy: &Policy, attempt: u32) -> Duration {
    let doublings = attempt.saturating_sub(1).min(20);
    policy.min_backoff.saturating_mul(1 << doublings).min(policy.max_backoff)
}

fn millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX / 4)
}

fn encode(attributes: &[(String, String)]) -> String {
    serde_json::Value::from(
        attributes.iter().map(|(key, value)| serde_json::json!([key, value])).collect::<Vec<_>>(),
    )
    .to_string()
}

/// We wrote it ourselves; a row that somebody edited by hand only loses its attributes.
fn decode(attributes: &str) -> Vec<(String, String)> {
    serde_json::from_str(attributes).unwrap_or_default()
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn database() -> Connection {
        let connection = Connection::open_in_memory().unwrap();
        connection.execute_batch(SCHEMA).unwrap();
        subscribe(&connection, "in-atlas", "in").unwrap();
        subscribe(&connection, "dlq-atlas", "dlq").unwrap();
        connection
    }

    fn policy() -> Policy {
        Policy {
            subscription: "in-atlas".to_owned(),
            min_backoff: Duration::from_secs(1),
            max_backoff: Duration::from_secs(5),
            lease: Duration::from_secs(30),
            dead_letters: Some(("dlq".to_owned(), 3)),
        }
    }

    fn dead() -> Policy {
        Policy { subscription: "dlq-atlas".to_owned(), dead_letters: None, ..policy() }
    }

    #[test]
    fn a_dead_consumers_delivery_comes_again_when_its_lease_ends() {
        let db = database();
        publish(&db, "in", b"x", &[], 0).unwrap();
        let first = claim(&db, &policy(), 0).unwrap().unwrap();
        assert!(claim(&db, &policy(), 29_999).unwrap().is_none());
        let second = claim(&db, &policy(), 30_000).unwrap().unwrap();
        assert_eq!((first.attempt, second.attempt), (1, 2));
        assert_eq!(first.message_id, second.message_id);
        assert!(!ack(&db, &policy(), first.message, &first.lease).unwrap(), "the lease was lost");
        assert!(ack(&db, &policy(), second.message, &second.lease).unwrap());
    }

    #[test]
    fn a_renewed_lease_holds() {
        let db = database();
        publish(&db, "in", b"x", &[], 0).unwrap();
        let held = claim(&db, &policy(), 0).unwrap().unwrap();
        renew(&db, &policy(), &[(held.message, held.lease.clone())], 20_000).unwrap();
        assert!(claim(&db, &policy(), 49_999).unwrap().is_none());
        assert!(ack(&db, &policy(), held.message, &held.lease).unwrap());
    }

    #[test]
    fn redelivery_backs_off_and_ends_in_the_dead_letters() {
        let db = database();
        publish(&db, "in", b"x", &[("k".to_owned(), "v".to_owned())], 0).unwrap();
        let mut now = 0;
        for delay in [1000, 2000] {
            let taken = claim(&db, &policy(), now).unwrap().unwrap();
            nack(&db, &policy(), taken.message, &taken.lease, now).unwrap();
            assert!(claim(&db, &policy(), now + delay - 1).unwrap().is_none());
            now += delay;
        }
        let last = claim(&db, &policy(), now).unwrap().unwrap();
        assert_eq!(last.attempt, 3);
        nack(&db, &policy(), last.message, &last.lease, now).unwrap();

        assert!(claim(&db, &policy(), now + 3_600_000).unwrap().is_none());
        let letter = claim(&db, &dead(), now).unwrap().unwrap();
        assert_eq!(letter.data, b"x");
        assert_eq!(letter.message_id, last.message_id);
        assert!(letter.attributes.contains(&("k".to_owned(), "v".to_owned())));
        assert!(
            letter
                .attributes
                .iter()
                .any(|(key, value)| { key == "CloudPubSubDeadLetterSourceDeliveryCount" && value == "3" })
        );
    }

    #[test]
    fn a_message_that_kills_its_consumers_ends_in_the_dead_letters_too() {
        let db = database();
        publish(&db, "in", b"x", &[], 0).unwrap();
        for crash in 0..3 {
            assert!(claim(&db, &policy(), crash * 30_000).unwrap().is_some());
        }
        assert!(claim(&db, &policy(), 90_000).unwrap().is_none());
        assert!(claim(&db, &dead(), 90_000).unwrap().is_some());
    }

    #[test]
    fn a_claim_that_nobody_saw_does_not_count() {
        let db = database();
        publish(&db, "in", b"x", &[], 0).unwrap();
        let unseen = claim(&db, &policy(), 0).unwrap().unwrap();
        unclaim(&db, &policy(), unseen.message, &unseen.lease, 0).unwrap();
        assert_eq!(claim(&db, &policy(), 0).unwrap().unwrap().attempt, 1);
    }

    #[test]
    fn an_acked_message_leaves_nothing_behind() {
        let db = database();
        publish(&db, "in", b"x", &[], 0).unwrap();
        assert_eq!(backlog(&db, "in-atlas").unwrap(), (1, Some(0)));
        let taken = claim(&db, &policy(), 0).unwrap().unwrap();
        ack(&db, &policy(), taken.message, &taken.lease).unwrap();
        assert_eq!(backlog(&db, "in-atlas").unwrap(), (0, None));
        let rows: i64 = db.query_row("SELECT count(*) FROM queue_messages", [], |row| row.get(0)).unwrap();
        assert_eq!(rows, 0);
    }

    #[test]
    fn answers_are_kept_for_watchers_but_not_for_ever() {
        let db = database();
        let task = [("task_id".to_owned(), "t1".to_owned())];
        publish(&db, "out", b"first", &task, 0).unwrap();
        publish(&db, "out", b"second", &task, 1).unwrap();
        let first = next_of_task(&db, "out", "t1", 0).unwrap().unwrap();
        let second = next_of_task(&db, "out", "t1", first.id).unwrap().unwrap();
        assert_eq!((first.data.as_slice(), second.data.as_slice()), (&b"first"[..], &b"second"[..]));
        assert!(next_of_task(&db, "out", "t1", second.id).unwrap().is_none());

        for _ in 0..REMOVE_EVERY {
            publish(&db, "out", b"later", &[], millis(KEEP_FOR) + 2).unwrap();
        }
        assert!(next_of_task(&db, "out", "t1", 0).unwrap().is_none());
    }

    #[test]
    fn only_so_many_messages_are_kept_for_watchers() {
        let db = database();
        let kept = || -> i64 {
            db.query_row("SELECT count(*) FROM queue_messages WHERE topic = 'out'", [], |row| row.get(0))
                .unwrap()
        };
        publish(&db, "in", b"waits", &[], 0).unwrap();
        for _ in 0..KEEP_AT_MOST + 5 * REMOVE_EVERY {
            publish(&db, "out", b"x", &[], 0).unwrap();
        }
        assert!((KEEP_AT_MOST - 1..KEEP_AT_MOST + REMOVE_EVERY).contains(&kept()), "{}", kept());
        assert!(claim(&db, &policy(), 0).unwrap().is_some(), "what somebody waits for stays");
    }

    #[test]
    fn the_oldest_message_comes_first() {
        let db = database();
        for text in ["a", "b", "c"] {
            publish(&db, "in", text.as_bytes(), &[], 0).unwrap();
        }
        let order: Vec<_> = std::iter::from_fn(|| claim(&db, &policy(), 0).unwrap())
            .map(|taken| String::from_utf8(taken.data).unwrap())
            .collect();
        assert_eq!(order, ["a", "b", "c"]);
    }
}
