//! Measures of one ranking, as `trec_eval` defines them.

use std::collections::{BTreeMap, HashSet};

use serde::{Deserialize, Serialize};

/// What one query's ranking is worth; each from 0 to 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Measures {
    /// Normalised discounted cumulative gain of the first ten, gain = grade, discount = log2(rank + 1)
    /// (Järvelin and Kekäläinen, 2002; `ndcg_cut_10`).
    pub(crate) ndcg_10: f64,
    /// Share of the relevant documents among the first hundred (`recall_100`).
    pub(crate) recall_100: f64,
    /// One over the rank of the first relevant document, 0 beyond ten (MRR@10).
    pub(crate) mrr_10: f64,
}

/// The names of the measures, in the order of [`Measures::values`].
pub(crate) const NAMES: [&str; 3] = ["nDCG@10", "recall@100", "MRR@10"];

impl Measures {
    pub(crate) fn values(&self) -> [f64; 3] {
        [self.ndcg_10, self.recall_100, self.mrr_10]
    }
}

/// Measures a ranking of documents, best first. A document counts once, where it is first.
pub(crate) fn measure(ranking: &[String], grades: &BTreeMap<String, f64>) -> Measures {
    let mut seen = HashSet::new();
    let ranking: Vec<&String> = ranking.iter().filter(|document| seen.insert(document.as_str())).collect();
    let grade = |document: &String| grades.get(document).copied().unwrap_or_default().max(0.0);
    let discounted = |grades: &mut dyn Iterator<Item = f64>| -> f64 {
        grades.take(10).enumerate().map(|(at, grade)| grade / ((at + 2) as f64).log2()).sum()
    };

    let mut ideal: Vec<f64> = grades.values().copied().filter(|grade| *grade > 0.0).collect();
    ideal.sort_by(|a, b| b.total_cmp(a));
    let relevant = ideal.len();
    let best = discounted(&mut ideal.into_iter());
    let got = discounted(&mut ranking.iter().map(|document| grade(document)));
    let found = ranking.iter().take(100).filter(|document| grade(document) > 0.0).count();
    let first = ranking.iter().take(10).position(|document| grade(document) > 0.0);
    Measures {
        ndcg_10: if best > 0.0 { got / best } else { 0.0 },
        recall_100: if relevant > 0 { found as f64 / relevant as f64 } else { 0.0 },
        mrr_10: first.map_or(0.0, |at| 1.0 / (at + 1) as f64),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ranking(ids: &[&str]) -> Vec<String> {
        ids.iter().map(|id| (*id).to_owned()).collect()
    }

    fn grades(grades: &[(&str, f64)]) -> BTreeMap<String, f64> {
        grades.iter().map(|(id, grade)| ((*id).to_owned(), *grade)).collect()
    }

    #[test]
    fn measures_are_those_of_trec_eval() {
        // Worked by hand: grades 3, 2, 0, 1 at ranks 1, 3, 2, 5; one relevant document is missed.
        let judged = grades(&[("a", 3.0), ("b", 2.0), ("c", 0.0), ("d", 1.0), ("e", 1.0)]);
        let found = measure(&ranking(&["a", "c", "b", "x", "d"]), &judged);
        let got = 3.0 + 2.0 / 4_f64.log2() + 1.0 / 6_f64.log2();
        let best = 3.0 + 2.0 / 3_f64.log2() + 1.0 / 4_f64.log2() + 1.0 / 5_f64.log2();
        assert!((found.ndcg_10 - got / best).abs() < 1e-12, "{found:?}");
        assert!((found.recall_100 - 0.75).abs() < 1e-12, "{found:?}");
        assert!((found.mrr_10 - 1.0).abs() < 1e-12, "{found:?}");
    }

    #[test]
    fn a_document_counts_once_and_ranks_end() {
        let judged = grades(&[("a", 1.0)]);
        let twice = measure(&ranking(&["x", "a", "a"]), &judged);
        assert!((twice.recall_100 - 1.0).abs() < 1e-12 && (twice.mrr_10 - 0.5).abs() < 1e-12, "{twice:?}");
        let mut late: Vec<String> = (0..10).map(|number| format!("x{number}")).collect();
        late.push("a".to_owned());
        let late = measure(&late, &judged);
        assert_eq!(late, Measures { ndcg_10: 0.0, recall_100: 1.0, mrr_10: 0.0 });
        assert_eq!(measure(&[], &judged), Measures::default());
    }
}
