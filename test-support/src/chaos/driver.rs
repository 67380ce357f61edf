//! Carries out the plan: publishes, breaks, mends, and waits until nothing moves any more.

use std::{
    collections::{BTreeMap, VecDeque},
    fmt::Write as _,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use serde_json::{Value, json};

use super::{
    FleetError, audit,
    consumer::{Answers, Consumer},
    plan::{Blow, Dice, FAULTS, Item, Plan, WORKERS},
};
use crate::fleet::{Fleet, FleetOptions, PROJECT};

/// Requests under way at once; what is deferred does not count.
const WINDOW: usize = 250;
/// Messages in one publish call.
const BATCH: usize = 20;
/// How often the driver looks.
const TICK: Duration = Duration::from_millis(150);
/// The run fails when nothing has changed for so long although something should.
const STUCK: Duration = Duration::from_secs(180);
/// A limit that nothing of a run reaches.
const NO_LIMIT: i64 = 1_000_000_000_000;

/// A run that came to rest.
pub(super) struct Ran {
    pub(super) fleet: Fleet,
    /// The ids of all requests.
    pub(super) tasks: Vec<uuid::Uuid>,
    pub(super) published: Published,
    /// How often each blow fell.
    pub(super) blows: BTreeMap<&'static str, u64>,
    /// Connections to the emulator that were cut.
    pub(super) cut: u64,
    /// Times the day's limit ran out and was raised, and the most runs that waited for it.
    pub(super) exhausted: u64,
    pub(super) most_deferred: i64,
    pub(super) answers: Answers,
    /// From the first message to the last final state, and until everything was at rest.
    pub(super) working: Duration,
    pub(super) resting: Duration,
    /// Looks at the day's account while the run went on, and what they saw above a limit.
    pub(super) looks: u64,
    pub(super) above: Vec<String>,
    /// Reservations that killed gateways left open; booked once they are an hour old.
    pub(super) orphans: i64,
}

/// What was published, by kind.
#[derive(Clone, Debug, Default)]
pub(super) struct Published {
    pub(super) requests: u64,
    pub(super) duplicates: u64,
    pub(super) late_duplicates: u64,
    /// Marker and expected reason.
    pub(super) malformed: Vec<(String, &'static str)>,
    pub(super) other_roles: u64,
    pub(super) controls: u64,
}

/// What is mended, and when.
#[derive(Clone, Copy, Debug)]
enum Mend {
    StartWorker(usize),
    WakeWorker(usize),
    StartPostgres,
    StartPostgrest,
    StartGateway,
    QueueBack,
}

/// What the store says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Look {
    finished: usize,
    failed: i64,
    deferred: i64,
    running: i64,
    dead: i64,
    unsent: i64,
    open_of_runs: i64,
    used: i64,
    reserved: i64,
    limit: i64,
    /// What calls of the day billed above their reservations.
    excess: i64,
}

impl Look {
    /// Says that the day's account is above its limit. The account names the limit of its last grant, and what a
    /// call billed above its reservation is the one excess that no limit can prevent ("GUARANTEES", 3): the
    /// books say whether it was the API's doing.
    fn above(&self) -> Option<String> {
        let Self { used, reserved, limit, excess, .. } = self;
        (used + reserved > limit + excess)
            .then(|| format!("{used} + {reserved} > {limit}, and {excess} above reservations"))
    }
}

struct Driver<'a> {
    plan: &'a Plan,
    fleet: Fleet,
    http: reqwest::Client,
    consumer: Consumer,
    database: Option<tokio_postgres::Client>,
    look: Look,
    published: Published,
    waiting: VecDeque<Item>,
    /// Late duplicates whose request is not known to be final yet.
    late: Vec<usize>,
    blows: VecDeque<(usize, Blow)>,
    limits: VecDeque<usize>,
    mends: Vec<(Instant, Mend)>,
    thrown: BTreeMap<&'static str, u64>,
    cut: u64,
    lowered: bool,
    exhausted: u64,
    most_deferred: i64,
    looks: u64,
    above: Vec<String>,
    began: Instant,
    said: Instant,
    moved: Instant,
}

/// Runs the plan until everything is at rest.
pub(super) async fn run(plan: &Plan, folder: &std::path::Path) -> Result<Ran, FleetError> {
    let began = Instant::now();
    let fleet = Fleet::start(FleetOptions {
        workers: WORKERS,
        sim: ["--seed", &plan.seed.to_string(), "--latency-ms", "20"].map(str::to_owned).to_vec(),
        env: settings(),
        durable: true,
        proxied: true,
        ..FleetOptions::default()
    })
    .await?;
    eprintln!("chaos: the fleet is up after {} s", began.elapsed().as_secs());
    let mut driver = Driver::new(plan, fleet).await?;
    let worked = async {
        while !driver.is_done() {
            driver.tick().await?;
        }
        let working = driver.began.elapsed();
        driver.rest().await?;
        anyhow::Ok(working)
    };
    match worked.await {
        Ok(working) => Ok(driver.finish(working).await?),
        Err(error) => {
            super::keep_logs(&driver.fleet, folder);
            Err(FleetError::Broken(error.context(format!("seed {}\n{}", plan.seed, driver.fleet.logs()))))
        }
    }
}

/// Short times, so that a short run sees every recovery; a wide run limit, because what a fault may have
/// billed counts against it.
fn settings() -> Vec<(String, String)> {
    [
        ("DAILY_TOKEN_BUDGET", NO_LIMIT.to_string().as_str()),
        ("TOKEN_BUDGET_PER_RUN", "60000"),
        ("OPENAI_FALLBACK_MODELS", "gpt-4.1-mini"),
        ("OPENAI_TIMEOUT_SECONDS", "4"),
        ("RAG_TIMEOUT_SECONDS", "5"),
        ("STORE_TIMEOUT_SECONDS", "5"),
        ("PUBSUB_TIMEOUT_SECONDS", "5"),
        ("LEASE_SECONDS", "10"),
        ("SWEEP_INTERVAL_SECONDS", "1"),
        ("DRAIN_TIMEOUT_SECONDS", "10"),
        ("RUN_TIMEOUT_SECONDS", "60"),
        ("CIRCUIT_OPEN_SECONDS", "1"),
        ("RETRY_BASE_MILLISECONDS", "100"),
        ("RETRY_MAX_DELAY_SECONDS", "3"),
        ("LOG_LEVEL", "info,atlas_worker::queue=debug"),
    ]
    .map(|(name, value)| (name.to_owned(), value.to_owned()))
    .to_vec()
}

impl<'a> Driver<'a> {
    async fn new(plan: &'a Plan, fleet: Fleet) -> anyhow::Result<Self> {
        let database = fleet.database().await?;
        audit::install(&database).await?;
        let topic = format!("projects/{PROJECT}/topics/architect_out");
        let consumer = Consumer::start(fleet.emulator_url("subscriptions/chaos-consumer"), &topic).await?;
        let http = reqwest::Client::new();
        let faults = http.put(format!("{}/sim/faults", fleet.sim_url)).body(FAULTS).send().await?;
        ensure!(faults.status().is_success(), "faults: {}", faults.text().await?);
        let now = Instant::now();
        Ok(Self {
            plan,
            fleet,
            http,
            consumer,
            database: Some(database),
            look: Look { limit: NO_LIMIT, ..Look::default() },
            published: Published::default(),
            waiting: plan.items.iter().cloned().collect(),
            late: Vec::new(),
            blows: plan.blows.iter().copied().collect(),
            limits: plan.limits.iter().copied().collect(),
            mends: Vec::new(),
            thrown: BTreeMap::new(),
            cut: 0,
            lowered: false,
            exhausted: 0,
            most_deferred: 0,
            looks: 0,
            above: Vec::new(),
            began: now,
            said: now,
            moved: now,
        })
    }

    fn is_done(&self) -> bool {
        self.waiting.is_empty()
            && self.late.is_empty()
            && self.blows.is_empty()
            && self.mends.is_empty()
            && self.limits.is_empty()
            && !self.lowered
            && self.look.finished >= self.plan.tasks.len()
    }

    async fn tick(&mut self) -> anyhow::Result<()> {
        tokio::time::sleep(TICK).await;
        self.mend().await?;
        self.look_around().await;
        self.publish_more().await?;
        self.publish_late().await?;
        while let Some(blow) = self.blows.pop_front_if(|(after, _)| *after <= self.look.finished) {
            self.strike(blow.1).await?;
        }
        self.play_the_operator().await?;
        if self.said.elapsed() > Duration::from_secs(5) {
            self.said = Instant::now();
            self.say();
        }
        if self.moved.elapsed() > STUCK {
            let held = self.who_holds_the_messages().await;
            bail!(
                "nothing has changed for {STUCK:?}: {:?}, {} messages not published, {} duplicates not sent. {held}",
                self.look,
                self.waiting.len(),
                self.late.len(),
            );
        }
        Ok(())
    }

    fn say(&self) {
        let Look { finished, failed, deferred, dead, used, .. } = self.look;
        let all = self.plan.tasks.len();
        let done = finished * 30 / all.max(1);
        eprintln!(
            "chaos [{}{}] {:>4} s  {finished}/{all} final ({failed} failed), {deferred} deferred, {dead} dead letters, \
             {used} tokens, {} blows, {} connections cut",
            "#".repeat(done),
            ".".repeat(30_usize.saturating_sub(done)),
            self.began.elapsed().as_secs(),
            self.thrown.values().sum::<u64>(),
            self.cut,
        );
    }

    // --- What is seen ----------------------------------------------------------------------------

    /// Reads the books, if the database is there.
    async fn look_around(&mut self) {
        if self.database.is_none() {
            self.database = self.fleet.database().await.ok();
        }
        let Some(database) = &self.database else { return };
        let looking = tokio::time::timeout(Duration::from_secs(10), look(database));
        let Ok(Ok(look)) = looking.await else {
            self.database = None;
            return;
        };
        self.looks += 1;
        self.most_deferred = self.most_deferred.max(look.deferred);
        if !self.lowered {
            self.above.extend(look.above());
        }
        if look != self.look {
            self.moved = Instant::now();
        }
        self.look = look;
    }

    // --- What is published -----------------------------------------------------------------------

    async fn publish_more(&mut self) -> anyhow::Result<()> {
        let deferred = usize::try_from(self.look.deferred).unwrap_or(0);
        let requests = usize::try_from(self.published.requests).unwrap_or(0);
        let window = WINDOW.min(self.plan.tasks.len() / 3);
        let mut room = (window + self.look.finished + deferred).saturating_sub(requests);
        while room > 0 && !self.waiting.is_empty() {
            let mut batch = Vec::new();
            while batch.len() < BATCH
                && let Some(item) = self.waiting.pop_front()
            {
                match item {
                    Item::Request(task) => {
                        self.published.requests += 1;
                        room = room.saturating_sub(1);
                        batch.push(self.plan.request(task));
                    }
                    Item::Duplicate(task) => {
                        self.published.duplicates += 1;
                        batch.push(self.plan.request(task));
                    }
                    Item::LateDuplicate(task) => self.late.push(task),
                    Item::Malformed { marker, kind, data } => {
                        self.published.malformed.push((marker, kind));
                        batch.push(data);
                    }
                    Item::OtherRole(data) => {
                        self.published.other_roles += 1;
                        batch.push(data);
                    }
                }
            }
            self.publish(&batch).await?;
        }
        Ok(())
    }

    /// Past the proxy: what is published is certain, so that "published" is a book.
    async fn publish(&self, batch: &[Vec<u8>]) -> anyhow::Result<()> {
        if batch.is_empty() {
            return Ok(());
        }
        let messages: Vec<Value> = batch.iter().map(|data| json!({"data": BASE64.encode(data)})).collect();
        let url = self.fleet.emulator_url("topics/architect_in:publish");
        let answer: Value = self
            .http
            .post(url)
            .json(&json!({ "messages": messages }))
            .send()
            .await
            .context("publishing")?
            .error_for_status()?
            .json()
            .await?;
        let ids = answer["messageIds"].as_array().map_or(0, Vec::len);
        ensure!(ids == batch.len(), "{ids} of {} messages were published: {answer}", batch.len());
        Ok(())
    }

    /// Duplicates of what is final by now.
    async fn publish_late(&mut self) -> anyhow::Result<()> {
        let Some(database) = self.database.as_ref().filter(|_| !self.late.is_empty()) else { return Ok(()) };
        let wanted: Vec<uuid::Uuid> = self.late.iter().map(|task| self.plan.tasks[*task]).collect();
        let query = "select task_id from runs where task_id = any($1) and ended_at is not null";
        let Ok(rows) = database.query(query, &[&wanted]).await else { return Ok(()) };
        let ended: std::collections::HashSet<uuid::Uuid> = rows.iter().map(|row| row.get(0)).collect();
        let (ready, late): (Vec<usize>, Vec<usize>) =
            self.late.iter().partition(|task| ended.contains(&self.plan.tasks[**task]));
        self.late = late;
        let batch: Vec<Vec<u8>> = ready.iter().map(|task| self.plan.request(*task)).collect();
        self.published.late_duplicates += batch.len() as u64;
        for batch in batch.chunks(BATCH) {
            self.publish(batch).await?;
        }
        Ok(())
    }

    // --- What is broken --------------------------------------------------------------------------

    async fn strike(&mut self, blow: Blow) -> anyhow::Result<()> {
        let now = Instant::now();
        let after = |ms: u64| now + Duration::from_millis(ms);
        let mend = match blow {
            Blow::KillWorker { worker, back_ms } => {
                self.fleet.workers[worker].kill();
                Some((after(back_ms), Mend::StartWorker(worker)))
            }
            Blow::DrainWorker { worker } => {
                if self.fleet.workers[worker].is_running() {
                    self.fleet.workers[worker].signal("TERM")?;
                }
                // Killed if it takes longer than it may.
                Some((after(15_000), Mend::StartWorker(worker)))
            }
            Blow::FreezeWorker { worker, seconds } => {
                if self.fleet.workers[worker].is_running() {
                    self.fleet.workers[worker].signal("STOP")?;
                }
                Some((after(seconds * 1000), Mend::WakeWorker(worker)))
            }
            Blow::CrashPostgres { back_ms } => {
                self.database = None;
                self.fleet.postgres.as_mut().context("a durable Postgres")?.crash().await?;
                Some((after(back_ms), Mend::StartPostgres))
            }
            Blow::RestartPostgres { back_ms } => {
                self.database = None;
                self.fleet.postgres.as_mut().context("a durable Postgres")?.stop().await?;
                Some((after(back_ms), Mend::StartPostgres))
            }
            Blow::KillPostgrest { back_ms } => {
                self.fleet.postgrest.kill();
                Some((after(back_ms), Mend::StartPostgrest))
            }
            Blow::KillGateway { back_ms } => {
                self.fleet.gateway.kill();
                Some((after(back_ms), Mend::StartGateway))
            }
            Blow::CutAll(how) => {
                self.cut += self.proxy()?.cut_all(how) as u64;
                None
            }
            Blow::CutSome { how, percent, dice } => {
                let mut dice = Dice::new(dice);
                self.cut += self.proxy()?.cut_some(how, |_| dice.next() % 100 < percent) as u64;
                None
            }
            Blow::QueueGone { back_ms } => {
                self.cut += self.proxy()?.connections() as u64;
                self.proxy()?.go_down();
                Some((after(back_ms * 2), Mend::QueueBack))
            }
            Blow::QueueSilent { back_ms } => {
                self.proxy()?.go_silent();
                Some((after(back_ms * 2), Mend::QueueBack))
            }
        };
        *self.thrown.entry(blow.name()).or_insert(0) += 1;
        eprintln!(
            "chaos: {} s, after {} finished: {blow:?}",
            self.began.elapsed().as_secs(),
            self.look.finished
        );
        self.mends.extend(mend);
        Ok(())
    }

    fn proxy(&self) -> anyhow::Result<&crate::proxy::Proxy> {
        self.fleet.proxy.as_ref().context("a proxy")
    }

    async fn mend(&mut self) -> anyhow::Result<()> {
        let now = Instant::now();
        let (due, later) = self.mends.iter().partition(|(at, _)| *at <= now);
        self.mends = later;
        let due: Vec<(Instant, Mend)> = due;
        for (_, mend) in due {
            match mend {
                Mend::StartWorker(worker) => {
                    let worker = &mut self.fleet.workers[worker];
                    worker.kill();
                    worker.spawn()?;
                }
                Mend::WakeWorker(worker) => {
                    let worker = &mut self.fleet.workers[worker];
                    if worker.is_running() {
                        worker.signal("CONT")?;
                    }
                }
                Mend::StartPostgres => {
                    let postgres = self.fleet.postgres.as_mut().context("a durable Postgres")?;
                    // Two blows may overlap: the later one's end is the end.
                    postgres.crash().await?;
                    postgres.start_again()?;
                }
                Mend::StartPostgrest => {
                    self.fleet.postgrest.kill();
                    self.fleet.postgrest.spawn()?;
                }
                Mend::StartGateway => {
                    self.fleet.gateway.kill();
                    self.fleet.gateway.spawn()?;
                }
                Mend::QueueBack => self.proxy()?.come_back(),
            }
        }
        Ok(())
    }

    // --- The operator ----------------------------------------------------------------------------

    /// Lowers the day's limit to what is nearly used up, and raises it once enough runs wait: the first
    /// time with a message, then in the store, as `atlas budget set` does.
    async fn play_the_operator(&mut self) -> anyhow::Result<()> {
        let Look { finished, deferred, used, reserved, .. } = self.look;
        if !self.lowered && self.limits.front().is_some_and(|after| *after <= finished) {
            let per_run = used / i64::try_from(finished.max(1)).unwrap_or(1);
            let left = per_run * i64::try_from(self.plan.raise_at).unwrap_or(1);
            if self.set_budget_in_the_store(used + reserved + left).await {
                self.limits.pop_front();
                self.lowered = true;
            }
            return Ok(());
        }
        let enough = deferred >= i64::try_from(self.plan.raise_at).unwrap_or(1);
        let all_wait = deferred > 0
            && usize::try_from(deferred).unwrap_or(0) + finished
                >= usize::try_from(self.published.requests).unwrap_or(0);
        if self.lowered && (enough || all_wait || finished >= self.plan.tasks.len()) {
            if self.exhausted == 0 {
                self.set_budget_by_message(NO_LIMIT).await?;
            } else if !self.set_budget_in_the_store(NO_LIMIT).await {
                return Ok(());
            }
            self.exhausted += u64::from(deferred > 0);
            self.lowered = false;
        }
        Ok(())
    }

    /// False: the database is not there at the moment.
    async fn set_budget_in_the_store(&self, daily: i64) -> bool {
        let Some(database) = &self.database else { return false };
        let change = json!({"change": {"daily_limit": daily}, "limits": {}});
        database.execute("select change_fleet($1)", &[&change]).await.is_ok()
    }

    async fn set_budget_by_message(&mut self, daily: i64) -> anyhow::Result<()> {
        self.published.controls += 1;
        let command = json!({
            "role": "architect",
            "msg_type": "control",
            "content": {"command": "set_budget", "daily": daily},
        });
        self.publish(&[command.to_string().into_bytes()]).await
    }

    // --- The end ---------------------------------------------------------------------------------

    /// For a run that is stuck: asks the emulator for messages past the workers, then ends worker after
    /// worker and asks again. Whoever held them is the one after whose end they come.
    async fn who_holds_the_messages(&mut self) -> String {
        let url = self.fleet.emulator_url("subscriptions/architect_in-atlas:pull");
        let request = self.http.post(url).json(&json!({"maxMessages": 1000, "returnImmediately": true}));
        let connections = self.fleet.proxy.as_ref().map_or(0, crate::proxy::Proxy::connections);
        let mut said = format!("{connections} connections to Pub/Sub are open.");
        for worker in &self.fleet.workers {
            let metrics = worker.metrics().await;
            let gauges = ["atlas_in_flight", "atlas_work_blocked", "pubsub_", "atlas_circuit"];
            let lines: Vec<&str> =
                metrics.lines().filter(|line| gauges.iter().any(|name| line.starts_with(name))).collect();
            let _ = write!(said, "\n{}: {}", worker.name(), lines.join(", "));
        }
        for ended in 0..=self.fleet.workers.len() {
            if let Some(worker) = ended.checked_sub(1).and_then(|last| self.fleet.workers.get_mut(last)) {
                worker.kill();
            }
            let mut came = 0;
            let began = Instant::now();
            // Longer than an ack deadline.
            while came == 0 && began.elapsed() < Duration::from_secs(40) {
                let Some(request) = request.try_clone() else { break };
                if let Ok(answer) = request.send().await
                    && let Ok(answer) = answer.json::<Value>().await
                {
                    came = answer["receivedMessages"].as_array().map_or(0, Vec::len);
                }
                tokio::time::sleep(Duration::from_millis(500)).await;
            }
            let _ = write!(said, " With {ended} workers ended the emulator gives {came} messages.");
            if came > 0 {
                break;
            }
        }
        said
    }

    /// Waits until nothing is left to do: every process ready, every book closed.
    async fn rest(&mut self) -> anyhow::Result<()> {
        self.moved = Instant::now();
        let malformed = i64::try_from(self.published.malformed.len()).unwrap_or(0);
        let mut answered_before = 0;
        loop {
            tokio::time::sleep(TICK).await;
            self.look_around().await;
            let Look { running, dead, unsent, open_of_runs, .. } = self.look;
            let answered = {
                let answers = self.consumer.answers();
                self.plan.tasks.iter().filter(|task| answers.finals.contains_key(task)).count()
            };
            if answered != answered_before {
                answered_before = answered;
                self.moved = Instant::now();
            }
            let mut not_ready = Vec::new();
            for process in [&self.fleet.postgrest, &self.fleet.gateway].into_iter().chain(&self.fleet.workers)
            {
                if !process.is_ready().await {
                    not_ready.push(process.name().to_owned());
                }
            }
            if self.database.is_some()
                && (running, unsent, open_of_runs) == (0, 0, 0)
                && dead >= malformed
                && answered == self.plan.tasks.len()
                && not_ready.is_empty()
            {
                return Ok(());
            }
            if self.moved.elapsed() > STUCK {
                bail!(
                    "not at rest after {STUCK:?}: {:?}, {answered} of {} answered, not ready: {not_ready:?}",
                    self.look,
                    self.plan.tasks.len()
                );
            }
        }
    }

    /// What a killed gateway left open is booked by the sweeps when it is an hour old: lets that hour pass.
    async fn let_an_hour_pass(&mut self) -> anyhow::Result<i64> {
        let database = self.fleet.database().await?;
        let open = "select count(*) from token_ledger where state = 'reserved'";
        let orphans: i64 = database.query_one(open, &[]).await?.get(0);
        if orphans > 0 {
            database
                .batch_execute(
                    "create or replace function public.atlas_now() returns timestamptz language sql stable
                     as $$ select pg_catalog.now() + interval '61 minutes' $$",
                )
                .await?;
            let began = Instant::now();
            while database.query_one(open, &[]).await?.get::<_, i64>(0) > 0 {
                ensure!(
                    began.elapsed() < STUCK,
                    "{orphans} reservations of nobody are not booked by the sweeps"
                );
                tokio::time::sleep(TICK).await;
            }
        }
        Ok(orphans)
    }

    async fn finish(mut self, working: Duration) -> anyhow::Result<Ran> {
        let resting = self.began.elapsed().saturating_sub(working);
        let orphans = self.let_an_hour_pass().await?;
        self.say();
        let answers = self.consumer.answers().clone();
        Ok(Ran {
            fleet: self.fleet,
            tasks: self.plan.tasks.clone(),
            published: self.published,
            blows: self.thrown,
            cut: self.cut,
            exhausted: self.exhausted,
            most_deferred: self.most_deferred,
            answers,
            working,
            resting,
            looks: self.looks,
            above: self.above,
            orphans,
        })
    }
}

async fn look(database: &tokio_postgres::Client) -> Result<Look, tokio_postgres::Error> {
    let row = database
        .query_one(
            "select (select count(*) from runs where ended_at is not null),
                    (select count(*) from runs where status = 'failed'),
                    (select count(*) from runs where status = 'deferred'),
                    (select count(*) from runs where ended_at is null and status <> 'deferred'),
                    (select count(*) from dead_letters),
                    (select count(*) from outbox where sent_at is null),
                    (select count(*) from token_ledger where state = 'reserved' and task_id is not null),
                    coalesce(d.used, 0), coalesce(d.reserved, 0), coalesce(d.limit_tokens, $1::bigint),
                    (select coalesce(sum(l.actual - l.reserved), 0)::bigint
                       from token_ledger as l where l.day = d.day and l.actual > l.reserved)
               from (select 1) as one
                    left join (select * from token_days where scope = 'global' order by day desc limit 1) as d on true",
            &[&NO_LIMIT],
        )
        .await?;
    Ok(Look {
        finished: usize::try_from(row.get::<_, i64>(0)).unwrap_or(0),
        failed: row.get(1),
        deferred: row.get(2),
        running: row.get(3),
        dead: row.get(4),
        unsent: row.get(5),
        open_of_runs: row.get(6),
        used: row.get(7),
        reserved: row.get(8),
        limit: row.get(9),
        excess: row.get(10),
    })
}

#[cfg(test)]
mod tests {
    use super::Look;

    #[test]
    fn an_account_is_above_its_limit_where_no_billed_excess_explains_it() {
        let full = Look { used: 900, reserved: 100, limit: 1000, ..Look::default() };
        assert_eq!(full.above(), None);
        assert!(Look { reserved: 101, ..full }.above().is_some());
        let overbilled = Look { used: 960, excess: 60, ..full };
        assert_eq!(overbilled.above(), None);
        assert!(Look { used: 961, ..overbilled }.above().is_some());
    }
}
