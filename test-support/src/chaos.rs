//! A chaos run: the whole fleet on real services, broken on purpose all the time, and four books that
//! must agree at the end: what was **published**, what is **stored**, what was **answered**, and what the
//! simulator **billed**.
//!
//! Everything that the run decides comes from one seed ([`plan`]): the messages and their order, which
//! blow falls after how many finished requests, how long what was broken stays broken, and (with the
//! simulator's seed) which fault which attempt of which call meets. What no seed can decide is how the
//! processes interleave: on which instruction a killed worker was, whose call came first. The same seed
//! is the same storm, not the same history.

mod audit;
mod books;
mod consumer;
mod driver;
mod plan;
mod report;

use std::path::PathBuf;

pub use crate::fleet::FleetError;

/// What is to be run.
#[derive(Clone, Debug)]
pub struct ChaosOptions {
    /// What everything is derived from.
    pub seed: u64,
    /// Requests to publish. Duplicates, malformed messages and the like come on top.
    pub requests: usize,
    /// Where the report is kept as well.
    pub folder: PathBuf,
}

/// How a run ended.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The table, for a person.
    pub report: String,
    /// What differs, one line each; empty when all books agree.
    pub differences: Vec<String>,
    /// Where the report is.
    pub file: PathBuf,
}

/// Runs it: minutes, or as long as `requests` take. Progress goes to standard error.
pub async fn run(options: ChaosOptions) -> Result<Outcome, FleetError> {
    eprintln!("chaos: seed {}, {} requests", options.seed, options.requests);
    let plan = plan::Plan::new(options.seed, options.requests);
    let ran = driver::run(&plan, &options.folder).await?;
    let checks = books::reconcile(&ran).await?;
    let report = report::write(&plan, &ran, &checks);
    std::fs::create_dir_all(&options.folder).map_err(anyhow::Error::from)?;
    let file = options.folder.join(format!("chaos-{}-{}.txt", options.seed, options.requests));
    std::fs::write(&file, &report).map_err(anyhow::Error::from)?;
    let differences: Vec<String> = checks
        .lines
        .iter()
        .flat_map(|line| line.differences.iter().map(move |what| format!("{}: {what}", line.what)))
        .collect();
    if !differences.is_empty() {
        keep_logs(&ran.fleet, &options.folder);
    }
    Ok(Outcome { report, differences, file })
}

/// After a difference the logs are worth more than the space.
fn keep_logs(fleet: &crate::fleet::Fleet, folder: &std::path::Path) {
    let _ = std::fs::create_dir_all(folder);
    let _ = std::fs::write(folder.join("emulator.log"), fleet.emulator.log());
    for entry in std::fs::read_dir(fleet.dir()).into_iter().flatten().flatten() {
        if entry.path().extension().is_some_and(|extension| extension == "log") {
            let _ = std::fs::copy(entry.path(), folder.join(entry.file_name()));
        }
    }
}
