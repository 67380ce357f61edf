//! What is going to happen, all of it from the seed.

use serde_json::{Value, json};
use uuid::Uuid;

use crate::proxy::Cut;

/// Workers of the fleet.
pub(super) const WORKERS: usize = 4;

/// How often which fault strikes a model call: 20 % together.
pub(super) const FAULTS: &str = "429=0.03,429_html=0.01,500=0.03,502=0.02,503=0.02,504=0.01,hang=0.004,\
    cut=0.01,drop=0.01,truncated=0.01,malformed=0.005,no_choices=0.005,no_usage=0.005,wrong_schema=0.005,\
    not_json=0.004,empty=0.003,refusal=0.002,length=0.003,bad_citations=0.003,overbill=0.002,slow=0.003,\
    400=0.001,404=0.002,content_filter=0.001,context_length=0.001,401=0.0005,insufficient_quota=0.0005";

/// `SplitMix64`: small, and the same everywhere.
#[derive(Clone, Debug)]
pub(super) struct Dice(u64);

impl Dice {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let value = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        value ^ (value >> 31)
    }

    /// From 0 to `bound` - 1.
    pub(super) fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() % bound.max(1) as u64).unwrap_or(0)
    }

    fn between(&mut self, from: u64, to: u64) -> u64 {
        from + self.next() % (to - from + 1)
    }

    fn percent(&mut self, percent: u64) -> bool {
        self.next() % 100 < percent
    }

    fn uuid(&mut self) -> Uuid {
        let bits = (u128::from(self.next()) << 64) | u128::from(self.next());
        uuid::Builder::from_u128(bits)
            .with_version(uuid::Version::Random)
            .with_variant(uuid::Variant::RFC4122)
            .into_uuid()
    }
}

/// One message.
#[derive(Clone, Debug)]
pub(super) enum Item {
    /// A request: its place in [`Plan::tasks`].
    Request(usize),
    /// The same request again, right away.
    Duplicate(usize),
    /// The same request again, once it is final.
    LateDuplicate(usize),
    /// Bytes that nobody can work on; `marker` is somewhere in them.
    Malformed { marker: String, kind: &'static str, data: Vec<u8> },
    /// A message for somebody else.
    OtherRole(Vec<u8>),
}

/// Something that breaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Blow {
    KillWorker { worker: usize, back_ms: u64 },
    DrainWorker { worker: usize },
    FreezeWorker { worker: usize, seconds: u64 },
    CrashPostgres { back_ms: u64 },
    RestartPostgres { back_ms: u64 },
    KillPostgrest { back_ms: u64 },
    KillGateway { back_ms: u64 },
    CutAll(Cut),
    CutSome { how: Cut, percent: u64, dice: u64 },
    QueueGone { back_ms: u64 },
    QueueSilent { back_ms: u64 },
}

impl Blow {
    /// For the report's list.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::KillWorker { .. } => "worker: kill -9, restart",
            Self::DrainWorker { .. } => "worker: SIGTERM, restart",
            Self::FreezeWorker { .. } => "worker: frozen for longer than its lease",
            Self::CrashPostgres { .. } => "Postgres: kill -9, restart",
            Self::RestartPostgres { .. } => "Postgres: fast shutdown, restart",
            Self::KillPostgrest { .. } => "REST server: kill -9, restart",
            Self::KillGateway { .. } => "gateway: kill -9, restart",
            Self::CutAll(Cut::Reset) => "Pub/Sub: all connections reset",
            Self::CutAll(Cut::Finish) => "Pub/Sub: all connections closed",
            Self::CutSome { .. } => "Pub/Sub: some connections cut",
            Self::QueueGone { .. } => "Pub/Sub: refuses connections for a while",
            Self::QueueSilent { .. } => "Pub/Sub: silent for a while",
        }
    }
}

/// The plan of a run.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub(super) seed: u64,
    /// The requests' ids.
    pub(super) tasks: Vec<Uuid>,
    /// What is published, in this order.
    pub(super) items: Vec<Item>,
    /// What breaks, each after so many finished requests.
    pub(super) blows: Vec<(usize, Blow)>,
    /// After so many finished requests the day's limit is lowered to what is nearly used up.
    pub(super) limits: Vec<usize>,
    /// So many deferred requests, and it is raised.
    pub(super) raise_at: usize,
}

impl Plan {
    pub(super) fn new(seed: u64, requests: usize) -> Self {
        let mut dice = Dice::new(seed);
        let tasks: Vec<Uuid> = (0..requests).map(|_| dice.uuid()).collect();
        let mut items = Vec::new();
        for task in 0..requests {
            items.push(Item::Request(task));
            if dice.percent(5) {
                items.push(Item::Duplicate(dice.below(task + 1)));
            }
            if dice.percent(5) {
                items.push(Item::LateDuplicate(dice.below(task + 1)));
            }
            if dice.percent(4) || task < MALFORMED.len() {
                // Each kind once, then at random.
                let kind = if task < MALFORMED.len() { task } else { dice.below(MALFORMED.len()) };
                items.push(malformed(&mut dice, MALFORMED[kind]));
            }
            if dice.percent(2) {
                let other = json!({"role": "translator", "msg_type": "chat", "content": dice.uuid()});
                items.push(Item::OtherRole(other.to_string().into_bytes()));
            }
        }
        Self {
            seed,
            blows: blows(&mut dice, requests),
            tasks,
            items,
            limits: [30, 65].map(|percent| requests * percent / 100).to_vec(),
            raise_at: (requests / 25).max(4),
        }
    }

    /// A request as it is published.
    pub(super) fn request(&self, task: usize) -> Vec<u8> {
        let id = self.tasks[task];
        let mut metadata = json!({});
        if task % 3 == 1 {
            metadata["tenant"] = json!(format!("team-{}", task % 2));
        }
        json!({
            "task_id": id,
            "role": "architect",
            "msg_type": "chat",
            "content": format!("Design how the worker and the gateway talk, variant {id}"),
            "metadata": metadata,
        })
        .to_string()
        .into_bytes()
    }
}

/// When what breaks: each kind at least once, and more often the longer the run.
fn blows(dice: &mut Dice, requests: usize) -> Vec<(usize, Blow)> {
    let times = |short: usize, per_thousand: usize| short + requests * per_thousand / 1000;
    let mut kinds = Vec::new();
    // (in any run, and so many more in a thousand requests)
    for (kind, count) in [times(5, 6), times(1, 1), times(1, 1), times(1, 1), times(1, 1), times(1, 1)]
        .into_iter()
        .chain([times(1, 2), times(1, 1), times(1, 1), times(2, 2), times(1, 1), times(1, 1)])
        .enumerate()
    {
        kinds.extend(std::iter::repeat_n(kind, count));
    }
    let mut blows: Vec<(usize, Blow)> = kinds
        .into_iter()
        .map(|kind| {
            let worker = dice.below(WORKERS);
            let back_ms = dice.between(100, 2500);
            let blow = match kind {
                0 => Blow::KillWorker { worker, back_ms },
                1 => Blow::DrainWorker { worker },
                2 => Blow::FreezeWorker { worker, seconds: dice.between(11, 14) },
                3 => Blow::CrashPostgres { back_ms },
                4 => Blow::RestartPostgres { back_ms },
                5 => Blow::KillPostgrest { back_ms },
                6 => Blow::KillGateway { back_ms },
                7 => Blow::CutAll(Cut::Reset),
                8 => Blow::CutAll(Cut::Finish),
                9 => {
                    let how = if dice.percent(50) { Cut::Reset } else { Cut::Finish };
                    Blow::CutSome { how, percent: dice.between(20, 70), dice: dice.next() }
                }
                10 => Blow::QueueGone { back_ms },
                _ => Blow::QueueSilent { back_ms },
            };
            // Nothing breaks before anything works, and the last ones find something to break.
            (dice.between(requests as u64 / 50, requests as u64 * 95 / 100), blow)
        })
        .map(|(after, blow)| (usize::try_from(after).unwrap_or(0), blow))
        .collect();
    blows.sort_by_key(|(after, _)| *after);
    blows
}

/// Kinds of bad messages, by the reason they must be put aside for.
pub(super) const MALFORMED: &[&str] = &[
    "not_json",
    "invalid_utf8",
    "not_an_object",
    "missing_role",
    "invalid_task_id",
    "invalid_metadata",
    "empty_content",
    "invalid_content",
    "unknown_msg_type",
    "invalid_command",
    "nul_character",
    "too_large",
];

fn malformed(dice: &mut Dice, kind: &'static str) -> Item {
    let marker = format!("chaos-{}", dice.uuid().simple());
    // An id of its own: what is wrong with it must not touch a request.
    let mut message = json!({
        "task_id": dice.uuid(),
        "role": "architect",
        "msg_type": "chat",
        "content": "Design a queue",
        "marker": marker,
    });
    let mut set = |name: &str, value: Value| message[name] = value;
    match kind {
        "missing_role" => set("role", Value::Null),
        "invalid_task_id" => set("task_id", json!("forty-two")),
        "invalid_metadata" => set("metadata", json!("none")),
        "empty_content" => set("content", json!(" \n")),
        "invalid_content" => set("content", json!(["a", "list"])),
        "unknown_msg_type" => set("msg_type", json!("telegram")),
        "invalid_command" => {
            set("msg_type", json!("control"));
            set("content", json!({"command": "explode"}));
        }
        "nul_character" => set("content", json!("a\0b")),
        "too_large" => set("content", json!("x".repeat(1 << 20))),
        _ => {}
    }
    let text = message.to_string();
    let data = match kind {
        "not_json" => text.as_bytes()[..text.len() - 1].to_vec(),
        "invalid_utf8" => [text.as_bytes(), b"\xff\xfe"].concat(),
        "not_an_object" => format!("[{text}]").into_bytes(),
        _ => text.into_bytes(),
    };
    Item::Malformed { marker, kind, data }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_is_the_same_plan_and_another_is_another() {
        let plan = |seed| format!("{:?}", Plan::new(seed, 300));
        assert_eq!(plan(7), plan(7));
        assert_ne!(plan(7), plan(8));
    }

    #[test]
    fn even_a_short_plan_has_every_blow_and_every_malformed_kind() {
        let plan = Plan::new(1, 150);
        let names: std::collections::BTreeSet<&str> =
            plan.blows.iter().map(|(_, blow)| blow.name()).collect();
        assert_eq!(names.len(), 12, "{names:?}");
        for wanted in MALFORMED {
            assert!(
                plan.items.iter().any(|item| matches!(item, Item::Malformed { kind, .. } if kind == wanted)),
                "{wanted}"
            );
        }
        assert!(plan.blows.iter().all(|(after, _)| *after < 150));
    }
}
