//! A measured run: kept as a file, shown as a table, compared with another one.

use std::{collections::BTreeMap, fmt, path::Path};

use serde::{Deserialize, Serialize};

use super::{
    measure::{Measures, NAMES},
    significance::{bootstrap, mean, paired_p_value},
};
use crate::{
    error::{CliError, Result},
    ui::table,
};

/// A way of searching.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Mode {
    /// BM25 alone
    Lexical,
    /// Cosine alone
    Dense,
    /// Both, fused
    Hybrid,
    /// Both, fused, then reordered by the gateway's reranker
    Rerank,
}

impl Mode {
    pub(crate) const ALL: [Self; 4] = [Self::Lexical, Self::Dense, Self::Hybrid, Self::Rerank];
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Lexical => "lexical",
            Self::Dense => "dense",
            Self::Hybrid => "hybrid",
            Self::Rerank => "hybrid + rerank",
        })
    }
}

/// One run over a test collection.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Run {
    pub(crate) dataset: String,
    pub(crate) documents: usize,
    /// The version of `atlas`.
    pub(crate) atlas: String,
    pub(crate) embedding_model: Option<String>,
    /// Measures by mode and query id.
    pub(crate) modes: BTreeMap<Mode, BTreeMap<String, Measures>>,
    /// Modes that could not be measured, and why.
    #[serde(default)]
    pub(crate) left_out: BTreeMap<Mode, String>,
}

impl Run {
    pub(crate) fn load(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path)
            .map_err(|error| CliError::usage(format!("cannot read {}", path.display())).because(error))?;
        serde_json::from_str(&text).map_err(|error| {
            CliError::usage(format!("{} is not a saved run", path.display()))
                .because(error)
                .fix("make one: atlas eval --dataset DIR --save FILE")
        })
    }

    pub(crate) fn save(&self, path: &Path) -> Result<()> {
        let fail = |error: &dyn std::fmt::Display| {
            CliError::failure(format!("cannot write {}", path.display())).because(error)
        };
        let text = serde_json::to_string_pretty(self).map_err(|error| fail(&error))?;
        std::fs::write(path, text + "\n").map_err(|error| fail(&error))
    }

    /// Mean and 95 % interval of every mode and measure.
    pub(crate) fn table(&self) -> String {
        let rows: Vec<Vec<String>> = self
            .modes
            .iter()
            .map(|(mode, queries)| {
                std::iter::once(mode.to_string())
                    .chain((0..NAMES.len()).map(|at| {
                        let values: Vec<f64> = queries.values().map(|found| found.values()[at]).collect();
                        let interval = bootstrap(&values);
                        format!("{:.3} [{:.3}, {:.3}]", interval.mean, interval.low, interval.high)
                    }))
                    .chain([queries.len().to_string()])
                    .collect()
            })
            .collect();
        let head: Vec<&str> = ["mode"].into_iter().chain(NAMES).chain(["queries"]).collect();
        table(&head, &rows)
    }

    /// What each way of searching brings over those it is made of, and what the reranker brings: the
    /// difference and its p-value. `None` where there is nothing to compare.
    pub(crate) fn modes_compared(&self) -> Option<String> {
        let pairs = [
            (Mode::Dense, Mode::Lexical),
            (Mode::Hybrid, Mode::Lexical),
            (Mode::Hybrid, Mode::Dense),
            (Mode::Rerank, Mode::Hybrid),
        ];
        let rows: Vec<Vec<String>> = pairs
            .iter()
            .filter_map(|(mode, other)| {
                let (queries, others) = (self.modes.get(mode)?, self.modes.get(other)?);
                let cells = (0..NAMES.len()).map(|at| {
                    let differences = differences(&pairs_of(others, queries, at));
                    let p = paired_p_value(&differences);
                    let significant = if p < 0.05 { " *" } else { "" };
                    format!("{:+.3}, p {p:.4}{significant}", mean(&differences))
                });
                Some([format!("{mode} over {other}")].into_iter().chain(cells).collect())
            })
            .collect();
        let head: Vec<&str> = ["difference (* significant)"].into_iter().chain(NAMES).collect();
        (!rows.is_empty()).then(|| table(&head, &rows))
    }

    /// This run against an earlier one, over the queries that both have.
    pub(crate) fn compared_with(&self, before: &Self) -> Result<String> {
        let of = |run: &Self| format!("{} of {} documents", run.dataset, run.documents);
        let (then, now) = (of(before), of(self));
        if then != now {
            return Err(CliError::usage("the two runs cannot be compared")
                .because(format_args!("they measured two datasets: {then}, {now}"))
                .fix("measure both on the same dataset; of a folder that was renamed, change `dataset` in one of the files"));
        }
        let mut rows = Vec::new();
        for (mode, queries) in &self.modes {
            let Some(old) = before.modes.get(mode) else { continue };
            for (at, name) in NAMES.iter().enumerate() {
                let pairs = pairs_of(old, queries, at);
                if pairs.is_empty() {
                    continue;
                }
                let differences = differences(&pairs);
                let p = paired_p_value(&differences);
                let better = differences.iter().filter(|difference| **difference > 0.0).count();
                let worse = differences.iter().filter(|difference| **difference < 0.0).count();
                rows.push(vec![
                    mode.to_string(),
                    (*name).to_owned(),
                    format!("{:.3}", mean(&pairs.iter().map(|pair| pair.0).collect::<Vec<_>>())),
                    format!("{:.3}", mean(&pairs.iter().map(|pair| pair.1).collect::<Vec<_>>())),
                    format!("{:+.3}", mean(&differences)),
                    format!("{p:.4}"),
                    if p < 0.05 { "yes" } else { "no" }.to_owned(),
                    format!("{better} / {worse} of {}", pairs.len()),
                ]);
            }
        }
        if rows.is_empty() {
            return Err(CliError::usage("the two runs cannot be compared")
                .because("they have no mode and no query in common")
                .fix("measure the same dataset with the same modes"));
        }
        Ok(table(
            &["mode", "measure", "before", "after", "change", "p", "significant", "better / worse"],
            &rows,
        ))
    }
}

/// One measure of the queries that both have.
fn pairs_of(
    old: &BTreeMap<String, Measures>,
    new: &BTreeMap<String, Measures>,
    at: usize,
) -> Vec<(f64, f64)> {
    new.iter().filter_map(|(id, new)| Some((old.get(id)?.values()[at], new.values()[at]))).collect()
}

/// What the second of each pair is more.
fn differences(pairs: &[(f64, f64)]) -> Vec<f64> {
    // Numbers come back from a file with another last digit.
    let same = |difference: f64| if difference.abs() < 1e-9 { 0.0 } else { difference };
    pairs.iter().map(|(old, new)| same(new - old)).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
    use super::*;

    fn run(mode: Mode, ndcg: f64) -> Run {
        let queries = (0..30)
            .map(|at| {
                let noise = f64::from(at % 3) / 128.0;
                (format!("q{at}"), Measures { ndcg_10: ndcg + noise, recall_100: 0.5, mrr_10: 0.5 })
            })
            .collect();
        Run {
            dataset: "d".to_owned(),
            documents: 1,
            atlas: "0".to_owned(),
            embedding_model: None,
            modes: [(mode, queries)].into(),
            left_out: BTreeMap::new(),
        }
    }

    #[test]
    fn a_change_is_told_from_no_change() {
        let table = run(Mode::Lexical, 0.4).compared_with(&run(Mode::Lexical, 0.3)).unwrap();
        let line = |name: &str| table.lines().find(|line| line.contains(name)).unwrap().to_owned();
        assert!(line("nDCG@10").contains("+0.100") && line("nDCG@10").contains("yes"), "{table}");
        assert!(line("MRR@10").contains("+0.000") && line("MRR@10").contains("no"), "{table}");
        assert!(run(Mode::Dense, 0.4).compared_with(&run(Mode::Lexical, 0.4)).is_err());
        for other in [
            Run { dataset: "other".to_owned(), ..run(Mode::Lexical, 0.4) },
            Run { documents: 2, ..run(Mode::Lexical, 0.4) },
        ] {
            let error = run(Mode::Lexical, 0.4).compared_with(&other).unwrap_err().to_string();
            assert!(error.contains("two datasets"), "{error}");
        }
    }

    #[test]
    fn modes_of_a_run_are_told_apart() {
        let mut both = run(Mode::Lexical, 0.3);
        assert_eq!(both.modes_compared(), None);
        both.modes.extend(run(Mode::Hybrid, 0.4).modes);
        both.modes.extend(run(Mode::Rerank, 0.4).modes);
        let table = both.modes_compared().unwrap();
        let line = |name: &str| table.lines().find(|line| line.starts_with(name)).unwrap().to_owned();
        assert!(line("hybrid over lexical").contains("+0.100, p 0.0000 *"), "{table}");
        assert!(line("hybrid + rerank over hybrid").contains("+0.000, p 1.0000 "), "{table}");
        assert!(!table.contains("dense"), "{table}");
    }

    #[test]
    fn a_run_survives_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run.json");
        let kept = run(Mode::Lexical, 0.5);
        kept.save(&path).unwrap();
        assert_eq!(Run::load(&path).unwrap(), kept);
        std::fs::write(&path, "{}").unwrap();
        assert!(Run::load(&path).unwrap_err().to_string().contains("not a saved run"));
    }
}
