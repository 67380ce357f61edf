//! The four books, side by side.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt::Display,
};

use serde_json::Value;
use uuid::Uuid;

use super::{consumer, driver::Ran};

/// At most so many differences of one kind are listed.
const LISTED: usize = 10;

/// All that was compared.
#[derive(Clone, Debug, Default)]
pub(super) struct Checks {
    pub(super) lines: Vec<Line>,
    /// Final states, with the reason of failed ones.
    pub(super) endings: BTreeMap<String, u64>,
    /// Faults that struck, by kind.
    pub(super) faults: BTreeMap<String, u64>,
    /// Calls that reached the model.
    pub(super) calls: u64,
    /// Tokens that the API billed above its word for calls whose answer was lost.
    pub(super) unknowable: i64,
    pub(super) tokens: Tokens,
}

/// The sums.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Tokens {
    pub(super) billed: i64,
    pub(super) settled: i64,
    pub(super) assumed: i64,
}

/// One comparison.
#[derive(Clone, Debug)]
pub(super) struct Line {
    /// Which books.
    pub(super) books: &'static str,
    /// What must hold.
    pub(super) what: &'static str,
    pub(super) expected: String,
    pub(super) found: String,
    /// Task ids and what is wrong with them.
    pub(super) differences: Vec<String>,
}

impl Checks {
    fn line(
        &mut self,
        books: &'static str,
        what: &'static str,
        expected: impl Display,
        found: impl Display,
        differences: impl IntoIterator<Item = String>,
    ) {
        let (expected, found) = (expected.to_string(), found.to_string());
        let all: Vec<String> = differences.into_iter().collect();
        let mut differences: Vec<String> = all.iter().take(LISTED).cloned().collect();
        if all.len() > LISTED {
            differences.push(format!("and {} more", all.len() - LISTED));
        }
        self.lines.push(Line { books, what, expected, found, differences });
    }

    /// Two numbers that must be equal.
    fn equal(&mut self, books: &'static str, what: &'static str, expected: i64, found: i64) {
        let differs = (expected != found).then(|| format!("{found} instead of {expected}"));
        self.line(books, what, expected, found, differs);
    }
}

/// A run as it is stored.
struct Run {
    status: String,
    error_code: Option<String>,
}

/// A row of the ledger.
#[derive(Clone, Debug)]
struct Entry {
    task: Option<Uuid>,
    attempt: Option<i32>,
    model: String,
    state: String,
    reserved: i64,
    actual: i64,
    prompt: i64,
    completion: i64,
}

/// A call that the model billed.
#[derive(Clone, Debug)]
struct Call {
    task: Option<Uuid>,
    attempt: Option<i32>,
    step: String,
    model: String,
    prompt: i64,
    completion: i64,
    fault: String,
}

impl Call {
    fn tokens(&self) -> i64 {
        self.prompt + self.completion
    }

    fn is_overbilled(&self) -> bool {
        self.fault == "overbill"
    }

    /// What an API that keeps its word would have billed: `overbill` bills the prompt twice. Nobody can
    /// know of that excess when the answer is lost too, so no book can hold it.
    fn honest(&self) -> i64 {
        if self.is_overbilled() { self.prompt / 2 + self.completion } else { self.tokens() }
    }
}

/// Compares everything with everything.
pub(super) async fn reconcile(ran: &Ran) -> anyhow::Result<Checks> {
    let mut checks = Checks::default();
    let database = ran.fleet.database().await?;
    let runs = stored_runs(&database).await?;
    let sim = |path: &str| format!("{}/sim/{path}", ran.fleet.sim_url);
    let calls: Vec<Value> = reqwest::get(sim("calls")).await?.json().await?;
    let calls: Vec<Call> = calls.iter().map(call).collect();
    let strikes: Vec<Value> = reqwest::get(sim("strikes")).await?.json().await?;
    let meter = ran.fleet.meter().await?;
    checks.calls = meter["calls"].as_u64().unwrap_or(0);
    for strike in &strikes {
        *checks.faults.entry(strike["fault"].as_str().unwrap_or("?").to_owned()).or_insert(0) += 1;
    }

    published_and_stored(&mut checks, ran, &runs, &strikes);
    dead_letters(&mut checks, ran, &database).await?;
    stored_and_answered(&mut checks, ran, &runs, &database).await?;
    billed_and_booked(&mut checks, &calls, &meter, &database).await?;
    guarantees(&mut checks, ran, &calls, &database).await?;
    Ok(checks)
}

async fn stored_runs(database: &tokio_postgres::Client) -> anyhow::Result<HashMap<Uuid, Run>> {
    let rows = database.query("select task_id, status, error_code from runs", &[]).await?;
    Ok(rows.iter().map(|row| (row.get(0), Run { status: row.get(1), error_code: row.get(2) })).collect())
}

fn call(value: &Value) -> Call {
    let id = value["request_id"].as_str().unwrap_or_default();
    // `TASK.ATTEMPT.STEP`; embeddings have no task.
    let mut parts = id.splitn(3, '.');
    let task = parts.next().and_then(|task| task.parse().ok());
    Call {
        task,
        attempt: parts.next().and_then(|attempt| attempt.parse().ok()),
        step: parts.next().unwrap_or_default().to_owned(),
        model: value["model"].as_str().unwrap_or_default().to_owned(),
        prompt: value["prompt_tokens"].as_i64().unwrap_or(0),
        completion: value["completion_tokens"].as_i64().unwrap_or(0),
        fault: value["fault"].as_str().unwrap_or("fine").to_owned(),
    }
}

/// Which faults explain a run that failed with this code.
fn explains(code: &str) -> &'static [&'static str] {
    match code {
        "content_policy" => &["content_filter"],
        "context_length_exceeded" => &["context_length"],
        "invalid_request" => &["400"],
        "model_refused" => &["refusal"],
        "empty_answer" => &["empty"],
        // The answer and its repair.
        "invalid_answer" => &["not_json", "wrong_schema"],
        // What a fault may have billed counts against the run's limit.
        "run_budget_exhausted" => {
            &["502", "504", "hang", "cut", "drop", "truncated", "malformed", "no_usage", "overbill", "length"]
        }
        _ => &[],
    }
}

fn published_and_stored(checks: &mut Checks, ran: &Ran, runs: &HashMap<Uuid, Run>, strikes: &[Value]) {
    let tasks = &ran.tasks;
    let missing =
        tasks.iter().filter(|task| !runs.contains_key(task)).map(|task| format!("{task} has no run"));
    let known: BTreeSet<&Uuid> = tasks.iter().collect();
    let strange =
        runs.keys().filter(|task| !known.contains(task)).map(|task| format!("{task} was never published"));
    let all: Vec<String> = missing.chain(strange).collect();
    checks.line("published = stored", "each request has one run", tasks.len(), runs.len(), all);

    let mut struck: HashMap<Uuid, BTreeSet<&str>> = HashMap::new();
    for strike in strikes {
        let id = strike["request_id"].as_str().unwrap_or_default();
        if let Some(task) = id.split('.').next().and_then(|task| task.parse().ok()) {
            struck.entry(task).or_default().insert(strike["fault"].as_str().unwrap_or_default());
        }
    }
    let mut open = Vec::new();
    let mut unexplained = Vec::new();
    let (mut done, mut failed) = (0_u64, 0_u64);
    for (task, run) in runs {
        match run.status.as_str() {
            "done" => {
                done += 1;
                *checks.endings.entry("done".to_owned()).or_insert(0) += 1;
            }
            "failed" => {
                failed += 1;
                let code = run.error_code.as_deref().unwrap_or("none");
                *checks.endings.entry(format!("failed: {code}")).or_insert(0) += 1;
                let met = struck.get(task);
                let explained =
                    explains(code).iter().any(|fault| met.is_some_and(|struck| struck.contains(fault)));
                if !explained {
                    unexplained.push(format!("{task} failed with {code}; faults it met: {met:?}"));
                }
            }
            other => open.push(format!("{task} is {other}")),
        }
    }
    checks.line("published = stored", "each run is final", tasks.len(), done + failed, open);
    checks.line(
        "published = stored",
        "a failed run met a fault that explains it",
        failed,
        failed - unexplained.len() as u64,
        unexplained,
    );
}

async fn dead_letters(
    checks: &mut Checks,
    ran: &Ran,
    database: &tokio_postgres::Client,
) -> anyhow::Result<()> {
    let rows = database.query("select raw, reason, source, task_id from dead_letters", &[]).await?;
    let expected = &ran.published.malformed;
    let mut found: HashMap<&str, Vec<String>> = HashMap::new();
    let mut strange = Vec::new();
    for row in &rows {
        let (raw, reason, source): (Vec<u8>, String, String) = (row.get(0), row.get(1), row.get(2));
        let text = String::from_utf8_lossy(&raw);
        let marker = text.find("chaos-").and_then(|at| text.get(at..at + 38));
        match marker.and_then(|marker| expected.iter().find(|(known, _)| known == marker)) {
            Some((known, _)) => found.entry(known).or_default().push(reason),
            None => strange.push(format!("{reason} from {source}: task {:?}", row.get::<_, Option<Uuid>>(3))),
        }
    }
    let wrong = expected.iter().filter_map(|(marker, kind)| {
        let reasons = found.get(marker.as_str()).cloned().unwrap_or_default();
        (reasons.len() != 1 || reasons[0] != *kind)
            .then(|| format!("{marker} ({kind}): in dead_letters as {reasons:?}"))
    });
    let wrong: Vec<String> = wrong.chain(strange).collect();
    checks.line(
        "published = stored",
        "each malformed message once in dead_letters",
        expected.len(),
        rows.len(),
        wrong,
    );
    Ok(())
}

async fn stored_and_answered(
    checks: &mut Checks,
    ran: &Ran,
    runs: &HashMap<Uuid, Run>,
    database: &tokio_postgres::Client,
) -> anyhow::Result<()> {
    let answers = &ran.answers;
    let mut results = 0;
    let mut wrong = Vec::new();
    // One at a time: ten thousand specs are many megabytes.
    for task in &ran.tasks {
        let rows = database.query("select data from architect_out where id = $1", &[task]).await?;
        results += rows.len();
        let (Some(row), Some(run)) = (rows.first(), runs.get(task)) else {
            wrong.push(format!("{task} has no result row"));
            continue;
        };
        let data: Value = row.get(0);
        let wanted = if run.status == "done" { "spec" } else { "error" };
        match answers.finals.get(task) {
            None => wrong.push(format!("{task} is {} and was never answered", run.status)),
            Some(seen) if seen.kind != wanted => {
                wrong.push(format!("{task} is {} and was answered with {}", run.status, seen.kind));
            }
            Some(seen) if seen.hash != consumer::hash(&data) => {
                wrong.push(format!("{task}: the answer is not what is stored"));
            }
            Some(_) => {}
        }
    }
    let answered = ran.tasks.iter().filter(|task| answers.finals.contains_key(task)).count();
    let rows: i64 = database.query_one("select count(*) from architect_out", &[]).await?.get(0);
    checks.equal("stored", "one result row a task", i64::try_from(ran.tasks.len())?, rows);
    checks.line("stored = answered", "each task was answered with what is stored", results, answered, wrong);
    let different = answers.finals.iter().filter(|(_, seen)| seen.different > 0);
    let different: Vec<String> = different
        .map(|(task, seen)| format!("{task}: {} of {} copies differ", seen.different, seen.copies))
        .collect();
    let copies: u64 = answers.finals.values().map(|seen| seen.copies).sum();
    checks.line("answered", "all copies of an answer are equal", copies, copies, different);
    checks.line(
        "answered",
        "every message can be read",
        0,
        answers.unreadable.len(),
        answers.unreadable.clone(),
    );
    Ok(())
}

async fn ledger(database: &tokio_postgres::Client) -> anyhow::Result<Vec<Entry>> {
    let rows = database
        .query(
            "select task_id, attempt, model, state, reserved, actual, tokens_prompt, tokens_completion from token_ledger",
            &[],
        )
        .await?;
    Ok(rows
        .iter()
        .map(|row| Entry {
            task: row.get(0),
            attempt: row.get(1),
            model: row.get(2),
            state: row.get(3),
            reserved: row.get(4),
            actual: row.get(5),
            prompt: row.get(6),
            completion: row.get(7),
        })
        .collect())
}

async fn billed_and_booked(
    checks: &mut Checks,
    calls: &[Call],
    meter: &Value,
    database: &tokio_postgres::Client,
) -> anyhow::Result<()> {
    let entries = ledger(database).await?;
    let billed: i64 = calls.iter().map(Call::tokens).sum();
    checks.equal(
        "billed",
        "the meter is the sum of its calls",
        meter["total_tokens"].as_i64().unwrap_or(-1),
        billed,
    );
    let sum = |state: &str| {
        entries.iter().filter(|entry| entry.state == state).map(|entry| entry.actual).sum::<i64>()
    };
    let booked: i64 = entries.iter().map(|entry| entry.actual).sum();
    checks.tokens = Tokens { billed, settled: sum("settled"), assumed: sum("assumed") };
    let (lost, unknowable) = settled_is_billed(checks, calls, &entries);
    let less = (booked < billed - unknowable).then(|| format!("{billed} billed, {booked} booked"));
    checks.line(
        "billed <= booked",
        "all tokens together",
        format!(">= {}", billed - unknowable),
        booked,
        less,
    );

    // By task, and the embeddings (no task) as one: what was settled, and what an honest API billed else.
    let mut by_task: HashMap<Option<Uuid>, (i64, i64)> = HashMap::new();
    for entry in &entries {
        let books = by_task.entry(entry.task).or_default();
        books.1 += entry.actual;
        if entry.state == "settled" {
            books.0 += entry.actual;
        }
    }
    for (task, tokens) in lost {
        by_task.entry(task).or_default().0 += tokens;
    }
    let less: Vec<String> = by_task
        .iter()
        .filter(|(_, (billed, booked))| booked < billed)
        .map(|(task, (billed, booked))| {
            format!("{}: {billed} billed, {booked} booked{}", name(*task), story(*task, calls, &entries))
        })
        .collect();
    checks.line(
        "billed <= booked",
        "the tokens of each task",
        by_task.len(),
        by_task.len() - less.len(),
        less,
    );

    let accounts = database
        .query(
            "select d.day::text, d.scope, d.used, d.reserved, coalesce(l.actual, 0)::bigint, coalesce(l.reserved, 0)::bigint
               from token_days as d
                    left join lateral (
                      select sum(actual) as actual, sum(reserved) filter (where state = 'reserved') as reserved
                        from token_ledger as l
                       where l.day = d.day and (d.scope = 'global' or l.scope = d.scope)
                    ) as l on true",
            &[],
        )
        .await?;
    let wrong: Vec<String> = accounts
        .iter()
        .filter(|row| {
            (row.get::<_, i64>(2), row.get::<_, i64>(3)) != (row.get::<_, i64>(4), row.get::<_, i64>(5))
        })
        .map(|row| {
            let (day, scope): (String, String) = (row.get(0), row.get(1));
            format!(
                "{day} {scope}: used {} and reserved {}, the ledger says {} and {}",
                row.get::<_, i64>(2),
                row.get::<_, i64>(3),
                row.get::<_, i64>(4),
                row.get::<_, i64>(5)
            )
        })
        .collect();
    checks.line(
        "booked",
        "the accounts are the sums of the ledger",
        accounts.len(),
        accounts.len() - wrong.len(),
        wrong,
    );
    Ok(())
}

/// Every settled row is a billed call of the same attempt, token for token, and no call is settled twice;
/// what was billed and not settled is covered by what was assumed. Returns what was not settled, by task, and
/// how much of it nobody can know.
fn settled_is_billed(
    checks: &mut Checks,
    calls: &[Call],
    entries: &[Entry],
) -> (HashMap<Option<Uuid>, i64>, i64) {
    type Key = (Option<Uuid>, Option<i32>, String, i64, i64);
    let mut open: HashMap<Key, Vec<&Call>> = HashMap::new();
    for call in calls {
        let key = (
            call.task,
            call.attempt.filter(|_| call.task.is_some()),
            call.model.clone(),
            call.prompt,
            call.completion,
        );
        open.entry(key).or_default().push(call);
    }
    let mut wrong = Vec::new();
    let mut above = Vec::new();
    let (mut settled, mut within) = (0, 0);
    let mut assumed: HashMap<Option<Uuid>, i64> = HashMap::new();
    for entry in entries {
        if entry.state == "assumed" {
            *assumed.entry(entry.task).or_insert(0) += entry.actual;
        }
        if entry.state != "settled" {
            continue;
        }
        settled += 1;
        let key = (entry.task, entry.attempt, entry.model.clone(), entry.prompt, entry.completion);
        // Calls of embeddings have no task, so an overbilled one can look like an honest one of twice its tokens.
        let exceeds = entry.actual > entry.reserved;
        let call = open.get_mut(&key).and_then(|calls| {
            let likely = calls.iter().position(|call| call.is_overbilled() == exceeds);
            let at = likely.or_else(|| calls.len().checked_sub(1))?;
            Some(calls.swap_remove(at))
        });
        match call {
            // The API broke its word: no reservation can hold that.
            Some(call) if call.is_overbilled() => {}
            Some(call) => {
                within += 1;
                if exceeds {
                    above.push(format!(
                        "{} {}: {} of {} reserved ({})",
                        name(entry.task),
                        call.step,
                        entry.actual,
                        entry.reserved,
                        call.fault
                    ));
                }
            }
            None => wrong.push(format!(
                "{} attempt {:?}: settled {} + {} tokens that were not billed so",
                name(entry.task),
                entry.attempt,
                entry.prompt,
                entry.completion
            )),
        }
    }
    let mut unsettled: HashMap<Option<Uuid>, i64> = HashMap::new();
    let mut unknowable = 0;
    for call in open.into_values().flatten() {
        *unsettled.entry(call.task).or_insert(0) += call.honest();
        unknowable += call.tokens() - call.honest();
    }
    checks.line(
        "billed = settled",
        "each settled row is one billed call",
        settled,
        settled - wrong.len(),
        wrong,
    );
    checks.line(
        "settled <= reserved",
        "what an honest API billed was reserved before",
        within,
        within - above.len(),
        above,
    );
    let uncovered: Vec<String> = unsettled
        .iter()
        .filter(|(task, tokens)| **tokens > assumed.get(*task).copied().unwrap_or(0))
        .map(|(task, tokens)| {
            let assumed = assumed.get(task).copied().unwrap_or(0);
            let story = story(*task, calls, entries);
            format!("{}: {tokens} billed and not settled, {assumed} assumed{story}", name(*task))
        })
        .collect();
    let lost: i64 = unsettled.values().sum();
    let covering: i64 = assumed.values().sum();
    checks.line("billed <= assumed", "calls whose answer was lost are covered", lost, covering, uncovered);
    checks.unknowable = unknowable;
    (unsettled, unknowable)
}

/// All that is known of a task's calls, for a difference.
fn story(task: Option<Uuid>, calls: &[Call], entries: &[Entry]) -> String {
    if task.is_none() {
        return String::new();
    }
    let calls: Vec<String> = calls
        .iter()
        .filter(|call| call.task == task)
        .map(|call| {
            let Call { step, model, prompt, completion, fault, .. } = call;
            format!("{}.{step} {model} {prompt} + {completion} ({fault})", call.attempt.unwrap_or(0))
        })
        .collect();
    let entries: Vec<String> = entries
        .iter()
        .filter(|entry| entry.task == task)
        .map(|entry| {
            let Entry { model, state, reserved, actual, .. } = entry;
            format!("{} {model} {state} {actual} of {reserved}", entry.attempt.unwrap_or(0))
        })
        .collect();
    format!("\n      calls: {}\n      ledger: {}", calls.join("; "), entries.join("; "))
}

fn name(task: Option<Uuid>) -> String {
    task.map_or_else(|| "embeddings".to_owned(), |task| task.to_string())
}

async fn guarantees(
    checks: &mut Checks,
    ran: &Ran,
    calls: &[Call],
    database: &tokio_postgres::Client,
) -> anyhow::Result<()> {
    let breaches = database.query("select what, detail from chaos.breaches", &[]).await?;
    for (what, says) in [
        ("no grant above a limit in force", "grant above the limit"),
        ("no live lease was taken", "live lease taken"),
        ("no finished run changed", "finished run changed"),
        ("no result row changed", "result row changed"),
    ] {
        let found: Vec<String> =
            breaches.iter().filter(|row| row.get::<_, &str>(0) == says).map(|row| row.get(1)).collect();
        checks.line("witness", what, 0, found.len(), found);
    }
    checks.line(
        "witness",
        "the day's account, looked at all the time",
        0,
        ran.above.len(),
        ran.above.clone(),
    );

    // Guarantee 4: once a step was settled, no later attempt pays for it.
    let mut settled: HashMap<(Uuid, String), i32> = HashMap::new();
    for row in database.query("select task_id, step, attempt from chaos.steps", &[]).await? {
        settled.insert((row.get(0), row.get(1)), row.get(2));
    }
    let again: Vec<String> = calls
        .iter()
        .filter_map(|call| {
            let (task, attempt) = (call.task?, call.attempt?);
            let first = settled.get(&(task, call.step.clone()))?;
            (attempt > *first).then(|| {
                format!(
                    "{task}: step {} was settled by attempt {first} and billed again by {attempt}",
                    call.step
                )
            })
        })
        .collect();
    checks.line(
        "billed = stored",
        "no settled step is paid again later",
        settled.len(),
        settled.len() - again.len(),
        again,
    );

    let count = async |query: &str| anyhow::Ok(database.query_one(query, &[]).await?.get::<_, i64>(0));
    for (what, query) in [
        ("no reservation is open", "select count(*) from token_ledger where state = 'reserved'"),
        ("no answer is unsent", "select count(*) from outbox where sent_at is null"),
        ("no lease is held", "select count(*) from runs where lease_until is not null"),
        ("no run waits", "select count(*) from runs where ended_at is null"),
    ] {
        checks.equal("at rest", what, 0, count(query).await?);
    }
    let ran_out = (ran.exhausted < 2).then(|| format!("it ran out {} times", ran.exhausted));
    checks.line("the plan", "the day's limit ran out and was raised", 2, ran.exhausted, ran_out);
    Ok(())
}
