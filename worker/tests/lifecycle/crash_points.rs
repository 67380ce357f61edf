//! One test a crash point (`worker/src/crash.rs`): a worker of its own process dies there, another one
//! finishes, and the books agree.
//!
//! Each line of the table says what the death may cost: how many calls the simulator billed for the task in
//! the end, exactly, and how many of the ledger's rows are *assumed*. A call is paid again only when its
//! worker died between making it and storing what it brought; one is assumed without having been made
//! when its worker died between reservation and call.
//!
//! The survivor's clock is ahead of the dead worker's by more than every lease and hold, so nothing is waited
//! for.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use atlas_shared::{TaskId, Tokens, ledger::NewLimit};
use atlas_test_support::guard::Guarded;
use atlas_worker::store::{FleetChange, RunStatus};
use serde_json::{Value, json};

use crate::stack::{BOUND, Stack, command, eventually, request};

/// Longer than every lease and hold: the ones of a run (60 s), of a delivery (30 s), of the outbox (60 s).
const PAST_ALL_LEASES: Duration = Duration::from_mins(10);

/// What the victim is given to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Work {
    /// A request that takes one call.
    Request,
    /// A request that takes two calls, with a search between them.
    Search,
    /// A request that takes two calls, the second to mend the first.
    Repair,
    /// A request that no token is left for; then the limit is raised.
    Deferral,
    /// A request whose first call fails, on a worker that does not try again.
    Failure,
    /// A request that is being worked on when the worker is told to go.
    Drain,
    /// A run of a dead worker, without a message.
    Overdue,
    /// An answer that was never sent.
    Unsent,
    /// A message that cannot be read.
    Malformed,
    /// A message that Pub/Sub gave up, of a run that is not finished.
    GivenUp,
    /// `set_budget`.
    SetBudget,
    /// `cancel`, for a run that nobody works on.
    Cancel,
}

macro_rules! crash_points {
    ($($name:ident: $work:ident dies at $at:literal, pays $paid:literal, assumes $assumed:literal;)*) => {
        $(
            #[tokio::test]
            async fn $name() {
                die_at($at, Work::$work, $paid, $assumed).await;
            }
        )*

        /// The points of the table.
        const TRIED: &[&str] = &[$($at),*];
    };
}

crash_points! {
    crash_after_pull_before_claim: Request dies at "pulled", pays 1, assumes 0;
    crash_after_claim_before_retrieve: Request dies at "claimed", pays 1, assumes 0;
    crash_after_retrieve_before_reserve: Request dies at "retrieved", pays 1, assumes 0;
    crash_after_reserve_before_call: Request dies at "reserved", pays 1, assumes 1;
    crash_after_answer_before_settle: Request dies at "answered", pays 2, assumes 1;
    crash_before_finish: Request dies at "before_finish", pays 2, assumes 1;
    crash_after_finish_before_publish: Request dies at "finished", pays 1, assumes 0;
    crash_after_publish_before_outbox_mark: Request dies at "published", pays 1, assumes 0;
    crash_before_the_marks_are_written: Request dies at "before_mark", pays 1, assumes 0;
    crash_after_mark_before_ack: Request dies at "hold.before_ack,marked", pays 1, assumes 0;
    crash_before_ack: Request dies at "before_ack", pays 1, assumes 0;
    crash_after_ack: Request dies at "acked", pays 1, assumes 0;

    crash_after_settle_between_two_calls: Search dies at "settled", pays 2, assumes 0;
    crash_after_settle_before_a_repair: Repair dies at "settled", pays 2, assumes 0;
    crash_after_the_first_answer_of_two: Search dies at "answered", pays 3, assumes 1;
    crash_after_the_second_reserve_of_two: Search dies at "reserved:2", pays 2, assumes 1;
    crash_after_the_second_answer_of_two: Search dies at "answered:2", pays 3, assumes 1;
    crash_before_finish_after_two_calls: Search dies at "before_finish", pays 3, assumes 1;

    crash_before_defer: Deferral dies at "before_defer", pays 1, assumes 0;
    crash_after_defer_before_publish: Deferral dies at "deferred", pays 1, assumes 0;
    crash_after_defer_before_ack: Deferral dies at "before_ack", pays 1, assumes 0;

    crash_after_a_failed_call_before_it_is_booked: Failure dies at "call_failed", pays 1, assumes 1;
    crash_before_release: Failure dies at "before_release", pays 1, assumes 0;
    crash_after_release_before_ack: Failure dies at "released", pays 1, assumes 0;

    crash_in_drain_with_a_call_in_flight: Drain dies at "draining", pays 2, assumes 1;
    crash_in_drain_before_release: Drain dies at "before_release", pays 2, assumes 1;
    crash_in_drain_after_release: Drain dies at "released", pays 2, assumes 1;
    crash_in_drain_after_nack: Drain dies at "acked", pays 2, assumes 1;
    crash_in_drain_before_acks_are_flushed: Drain dies at "drained", pays 2, assumes 1;

    crash_in_sweep_after_claim_due: Overdue dies at "due_claimed", pays 1, assumes 0;
    crash_in_sweep_after_outbox_take_before_publish: Unsent dies at "outbox_taken", pays 0, assumes 0;
    crash_in_sweep_after_publish_before_mark: Unsent dies at "published", pays 0, assumes 0;

    crash_before_a_malformed_message_is_recorded: Malformed dies at "before_dead_letter", pays 0, assumes 0;
    crash_after_a_malformed_message_is_recorded: Malformed dies at "dead_letter_recorded", pays 0, assumes 0;
    crash_before_the_ack_of_a_malformed_message: Malformed dies at "before_ack", pays 0, assumes 0;
    crash_before_a_dead_letter_is_recorded: GivenUp dies at "before_dead_letter", pays 0, assumes 0;
    crash_after_a_dead_letter_is_recorded_before_ack: GivenUp dies at "dead_letter_recorded", pays 0, assumes 0;
    crash_after_the_ack_of_a_dead_letter: GivenUp dies at "dead_letter_acked", pays 0, assumes 0;

    crash_before_a_command_is_stored: SetBudget dies at "before_command", pays 0, assumes 0;
    crash_after_a_command_is_stored_before_its_answer: SetBudget dies at "command_stored", pays 0, assumes 0;
    crash_after_a_commands_answer_before_ack: SetBudget dies at "before_ack", pays 0, assumes 0;
    crash_before_a_cancel_is_stored: Cancel dies at "before_command", pays 0, assumes 0;
    crash_after_a_cancel_is_stored_before_its_answer: Cancel dies at "command_stored", pays 0, assumes 0;
}

/// Request sent and billed, no answer yet: the one moment that is no place in the code.
#[tokio::test]
async fn crash_while_a_call_is_in_flight() {
    let (stack, subject) = Work::Drain.prepare().await;
    let victim = Victim::start(&stack, "");
    victim.until("its call is billed", || calls(&stack, subject) == 1).await;
    victim.signal("KILL");
    assert_eq!(victim.exit_code().await, 128 + 9);

    Work::Drain.aftermath(&stack, subject, 2, 1).await;
}

/// Dies at every settled step of a run of three calls: the three are paid once each.
#[tokio::test]
async fn g4_a_settled_call_is_never_paid_again_however_often_workers_die() {
    // Real processes take over from each other here, so their lease is the shortest one.
    let stack = Stack::simulated().await.with("LEASE_SECONDS", "5");
    let search = json!({"name": "search_knowledge", "arguments": {"query": "dead letters"}});
    let steps = ["draft.0", "draft.1"].map(|step| json!({"match": step, "times": 9, "tool_calls": [search]}));
    stack.sim().script(json!(steps)).unwrap();
    let task = TaskId::random();
    stack.publish(request(task, "Design the event bus", json!({})).to_string()).await;

    for deaths in 1..=2 {
        let victim = Victim::start(&stack, "settled");
        victim.dies_at("settled").await;
        assert_eq!(calls(&stack, task), deaths);
    }

    Work::Search.aftermath(&stack, task, 3, 0).await;
    assert_eq!(stack.run(task).await.unwrap().run.attempt, 3);
}

/// A point that the table forgets, or that the code has lost.
#[test]
fn every_crash_point_has_its_test() {
    let mut in_code = BTreeSet::new();
    for entry in std::fs::read_dir(source("")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "rs") {
            let text = std::fs::read_to_string(&path).unwrap();
            let after = text.split("crash_point!(\"").skip(1);
            in_code.extend(after.map(|rest| rest.split('"').next().unwrap().to_owned()));
        }
    }
    let tried: BTreeSet<String> = TRIED
        .iter()
        .flat_map(|plan| plan.split(','))
        .map(|point| point.trim_start_matches("hold.").split(':').next().unwrap().to_owned())
        .collect();
    assert_eq!(in_code, tried);
}

/// Compiles `crash.rs` with and without debug assertions, as `cargo build` and `cargo build --release` do,
/// and looks for names in the object code.
#[test]
fn a_release_build_has_no_crash_points() {
    let object = |debug_assertions: &str| {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("probe.rs");
        let program = format!(
            "#[path = {:?}] mod crash;
             async fn life() {{ crash::crash_point!(\"the_only_point\"); std::future::ready(()).await }}
             pub fn live() {{
                 let mut life = std::pin::pin!(life());
                 let mut context = std::task::Context::from_waker(std::task::Waker::noop());
                 let _ = std::future::Future::poll(life.as_mut(), &mut context);
             }}",
            source("crash.rs"),
        );
        std::fs::write(&root, program).unwrap();
        let compiled = Command::new("rustc")
            .args(["--edition", "2024", "--crate-type", "lib", "--emit", "obj", "-o", "probe.o"])
            .args(["-C", debug_assertions])
            .arg(&root)
            .current_dir(dir.path())
            .output()
            .unwrap();
        assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
        std::fs::read(dir.path().join("probe.o")).unwrap()
    };
    let has = |object: &[u8], name: &str| object.windows(name.len()).any(|part| part == name.as_bytes());

    let debug = object("debug-assertions=on");
    assert!(has(&debug, "the_only_point") && has(&debug, "ATLAS_TEST_CRASH"), "or this looks in vain");
    let release = object("debug-assertions=off");
    assert!(!has(&release, "the_only_point") && !has(&release, "ATLAS_TEST_CRASH"));

    // And that is what a release build of this workspace is.
    let manifest = std::fs::read_to_string(source("../../Cargo.toml")).unwrap();
    assert!(!manifest.contains("debug-assertions"), "a profile changes what is a release build");
}

fn source(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src").join(name)
}

async fn die_at(at: &str, work: Work, paid: u64, assumed: u64) {
    let (stack, subject) = work.prepare().await;
    let victim = Victim::start(&stack, at);
    if work == Work::Drain {
        victim.until("its call is in flight", || calls(&stack, subject) == 1).await;
        victim.signal("TERM");
    }
    victim.dies_at(at).await;
    work.aftermath(&stack, subject, paid, assumed).await;
}

/// Calls that the simulator billed for a task.
fn calls(stack: &Stack, task: TaskId) -> u64 {
    stack.sim().meter().task(&task.to_string()).calls
}

impl Work {
    /// Everything is there, and no worker yet.
    async fn prepare(self) -> (Stack, TaskId) {
        let mut stack = Stack::simulated().await;
        let task = TaskId::random();
        let chat = request(task, "Design the event bus", json!({}));
        match self {
            Self::Request => {}
            Self::Search => {
                let search = json!({"name": "search_knowledge", "arguments": {"query": "dead letters"}});
                // Also for whoever has to ask again.
                stack
                    .sim()
                    .script(json!([{"match": "draft.0", "times": 9, "tool_calls": [search]}]))
                    .unwrap();
            }
            Self::Repair => stack
                .sim()
                .script(json!([{"match": "draft.0", "times": 9, "fault": "wrong_schema"}]))
                .unwrap(),
            Self::Deferral => stack = stack.with("DAILY_TOKEN_BUDGET", "50"),
            Self::Failure => {
                stack = stack.with("RETRY_MAX_ATTEMPTS", "1").with("CIRCUIT_FAILURES", "100");
                stack.sim().script(json!([{"fault": "500"}])).unwrap();
            }
            Self::Drain => {
                stack = stack.with("DRAIN_TIMEOUT_SECONDS", "0");
                stack.sim().script(json!([{"fault": "hang"}])).unwrap();
            }
            Self::Overdue => {
                stack.claimed(task, Duration::ZERO).await;
                return (stack, task);
            }
            Self::Unsent => {
                stack.claimed(task, Duration::ZERO).await;
                stack.cancel(task).await;
                return (stack, task);
            }
            Self::Malformed => {
                let mut malformed = chat;
                malformed["msg_type"] = json!("poem");
                stack.publish(malformed.to_string()).await;
                return (stack, task);
            }
            Self::GivenUp => {
                stack.asleep(task).await;
                let publisher = stack.queues().await.publisher;
                publisher.publish("architect_dlq", chat.to_string().into(), Vec::new()).await.unwrap();
                return (stack, task);
            }
            Self::SetBudget => {
                let (id, message) = command(json!({"command": "set_budget", "daily": 777_777}));
                stack.publish(message.to_string()).await;
                return (stack, id);
            }
            Self::Cancel => {
                stack.asleep(task).await;
                let (_, message) = command(json!({"command": "cancel", "task_id": task}));
                stack.publish(message.to_string()).await;
                return (stack, task);
            }
        }
        stack.publish(chat.to_string()).await;
        (stack, task)
    }

    /// Another worker comes, and all must be well in the end.
    async fn aftermath(self, stack: &Stack, subject: TaskId, paid: u64, assumed: u64) {
        stack.db.clock().advance(PAST_ALL_LEASES);
        if self == Self::Deferral {
            let raised = FleetChange {
                daily_limit: Some(NewLimit::Tokens(Tokens(1_000_000))),
                ..FleetChange::default()
            };
            stack.store().await.change_fleet(&raised, stack.config().limits).await.unwrap();
        }
        let survivor = stack.worker().await;
        stack.until_rest().await;
        survivor.drain().await;

        let books = stack.reconciled().await;
        assert_eq!(calls(stack, subject), paid, "calls that were paid");
        assert_eq!(books.assumed, assumed, "calls that are assumed");
        if assumed == 0 {
            assert_eq!(books.ledger, books.billed, "every call's cost is known");
        }
        let answers = stack.answers(subject).await;
        assert!(!answers.is_empty(), "nothing was published");
        match self {
            Self::Malformed => {
                assert_eq!(stack.count("SELECT count(*) FROM dead_letters").await, 1);
                assert_eq!(stack.count("SELECT count(*) FROM runs").await, 0);
                assert_eq!(answers[0]["metadata"]["error_code"], "unknown_msg_type");
            }
            Self::SetBudget => {
                let fleet = stack.store().await.fleet_state(stack.config().limits).await.unwrap();
                assert_eq!(fleet.budget.limit, Tokens(777_777));
                assert_eq!(answers[0]["content"]["command"], "set_budget");
            }
            Self::GivenUp => {
                assert_eq!(stack.count("SELECT count(*) FROM dead_letters").await, 1);
                let run = stack.run(subject).await.unwrap().run;
                assert_eq!(run.status, RunStatus::Failed);
                assert_eq!(answers[0]["content"]["command"], "escalate");
            }
            Self::Cancel | Self::Unsent => {
                let detail = stack.run(subject).await.unwrap();
                assert_eq!(detail.run.error_code.as_deref(), Some("cancelled"));
                assert_only(&answers, &detail.answer.unwrap());
            }
            _ => {
                let detail = stack.run(subject).await.unwrap();
                assert_eq!(detail.run.status, RunStatus::Done, "{detail:?}");
                assert_only(&answers, &detail.answer.unwrap());
                assert_eq!(stack.count("SELECT count(*) FROM dead_letters").await, 0);
            }
        }
    }
}

/// Whatever was published as the task's end is what is stored, however often.
fn assert_only(answers: &[Value], stored: &Value) {
    for answer in answers {
        assert_eq!(answer, stored);
    }
}

/// A worker in a process of its own, that is going to die.
struct Victim {
    /// Its files, without extension.
    files: PathBuf,
    _process: Guarded,
}

impl Victim {
    /// Starts `atlas-worker` with `ATLAS_TEST_CRASH=plan`.
    fn start(stack: &Stack, plan: &str) -> Self {
        // Says who it is and how it ended; a core file of every victim would fill the disk.
        const SCRIPT: &str = r#"ulimit -c 0; "$@" & echo $! >"$0.pid"; wait $!; echo $? >"$0.exit""#;
        let files = stack.dir.path().join(format!("victim-{}", uuid::Uuid::new_v4()));
        let log = std::fs::File::create(files.with_extension("log")).unwrap();
        let args =
            ["-c".as_ref(), SCRIPT.as_ref(), files.as_os_str(), env!("CARGO_BIN_EXE_atlas-worker").as_ref()];
        let process = Guarded::spawn("sh", args, |command| {
            command.envs(&stack.settings).env("ATLAS_TEST_CRASH", plan);
            command.stdout(log.try_clone().unwrap()).stderr(log);
        })
        .unwrap();
        Self { files, _process: process }
    }

    fn read(&self, extension: &str) -> String {
        std::fs::read_to_string(self.files.with_extension(extension)).unwrap_or_default()
    }

    async fn until(&self, what: &str, seen: impl Fn() -> bool) {
        let looking = async {
            let mut ticks = tokio::time::interval(Duration::from_millis(20));
            while !seen() {
                ticks.tick().await;
            }
        };
        let waited = tokio::time::timeout(BOUND, looking).await;
        waited.unwrap_or_else(|_| panic!("waited {BOUND:?} for the victim: {what}\n{}", self.read("log")));
    }

    fn signal(&self, signal: &str) {
        let pid = self.read("pid");
        let sent = Command::new("kill").args(["-s", signal, pid.trim()]).status().unwrap();
        assert!(sent.success());
    }

    /// Waits until the process is gone; the code as a shell gives it.
    async fn exit_code(&self) -> i32 {
        self.until("its end", || self.read("exit").ends_with('\n')).await;
        self.read("exit").trim().parse().unwrap()
    }

    /// Waits until it died at the last point of `plan`, and of nothing else.
    async fn dies_at(&self, plan: &str) {
        let code = self.exit_code().await;
        let point = plan.split(',').next_back().unwrap().split(':').next().unwrap();
        let log = self.read("log");
        assert!(
            log.contains(&format!("crash point {point} reached: dying\n")),
            "{point} not reached:\n{log}"
        );
        assert_eq!(code, 128 + 6, "aborted:\n{log}");
    }
}

impl Stack {
    /// A run that was given back for an hour: nobody works on it.
    async fn asleep(&self, task: TaskId) {
        let lease = self.claimed(task, Duration::from_secs(60)).await;
        self.store().await.release_run(lease, Duration::from_secs(3600)).await.unwrap();
    }

    /// Fails a run that nobody works on; its answer waits in the outbox.
    async fn cancel(&self, task: TaskId) {
        use atlas_shared::message::{Answer, AnswerStatus, AnswerType};
        let answer =
            Answer::bare(task, AnswerType::Error, AnswerStatus::Error, "cancelled", serde_json::Map::new());
        assert!(self.store().await.cancel_run(task, "architect_out", &answer).await.unwrap());
        eventually("it is final", || async {
            self.run(task).await.filter(|detail| detail.run.status == RunStatus::Failed)
        })
        .await;
    }
}
