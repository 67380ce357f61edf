//! Weighted reciprocal rank fusion (Cormack et al., SIGIR 2009), deterministic.
//!
//! The engines' own fusion orders ties at random and loses the cosine, so it is done here: equal
//! queries get equal answers.

use std::{cmp::Ordering, collections::HashMap};

use crate::index::{Hit, Lists};

/// The constant of the paper.
const K: f64 = 60.0;

/// A chunk with its fused score.
#[derive(Clone, Debug)]
pub(crate) struct Fused {
    pub(crate) hit: Hit,
    pub(crate) score: f64,
    /// Cosine, where the dense list had it.
    pub(crate) cosine: Option<f32>,
}

/// Weights of the two lists.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Weights {
    pub(crate) dense: f64,
    pub(crate) lexical: f64,
}

impl Default for Weights {
    fn default() -> Self {
        Self { dense: 1.0, lexical: 1.0 }
    }
}

/// One list, best first; ties by source and line. Where two revisions of a document are found at the
/// same moment, only the newer one stays.
pub(crate) fn fuse(lists: Lists, weights: Weights) -> Vec<Fused> {
    let newest = newest_revisions(&lists);
    let current = |hit: &Hit| newest.get(&hit.record.doc).is_none_or(|rev| hit.record.rev == *rev);
    let mut fused: HashMap<uuid::Uuid, Fused> = HashMap::new();
    for (mut list, weight, is_dense) in
        [(lists.dense, weights.dense, true), (lists.lexical, weights.lexical, false)]
    {
        list.retain(current);
        list.sort_by(|a, b| b.score.total_cmp(&a.score).then_with(|| by_place(a, b)));
        for (rank, hit) in list.into_iter().enumerate() {
            let cosine = is_dense.then(|| hit.score.clamp(0.0, 1.0));
            let entry = fused.entry(hit.id).or_insert(Fused { hit, score: 0.0, cosine: None });
            entry.score += weight / (K + rank as f64 + 1.0);
            entry.cosine = entry.cosine.or(cosine);
        }
    }
    let mut fused: Vec<Fused> = fused.into_values().collect();
    fused.sort_by(|a, b| b.score.total_cmp(&a.score).then_with(|| by_place(&a.hit, &b.hit)));
    fused
}

fn newest_revisions(lists: &Lists) -> HashMap<String, i64> {
    let mut newest: HashMap<String, i64> = HashMap::new();
    for hit in lists.dense.iter().chain(&lists.lexical) {
        let rev = newest.entry(hit.record.doc.clone()).or_insert(hit.record.rev);
        *rev = hit.record.rev.max(*rev);
    }
    newest
}

fn by_place(a: &Hit, b: &Hit) -> Ordering {
    let key = |hit: &Hit| (hit.record.start, hit.record.n, hit.id);
    (&a.record.source, &a.record.repo, key(a)).cmp(&(&b.record.source, &b.record.repo, key(b)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use uuid::Uuid;

    use super::*;
    use crate::index::ChunkRecord;

    fn hit(source: &str, score: f32) -> Hit {
        let record = ChunkRecord {
            doc: source.to_owned(),
            source: source.to_owned(),
            rev: 1,
            ..ChunkRecord::default()
        };
        Hit { id: Uuid::new_v5(&Uuid::NAMESPACE_URL, source.as_bytes()), score, record }
    }

    fn order(lists: Lists) -> Vec<String> {
        fuse(lists, Weights::default()).into_iter().map(|fused| fused.hit.record.source).collect()
    }

    #[test]
    fn what_both_lists_like_comes_first() {
        let lists =
            Lists { dense: vec![hit("a", 0.9), hit("b", 0.8)], lexical: vec![hit("c", 9.0), hit("b", 8.0)] };
        assert_eq!(order(lists), ["b", "a", "c"], "equal scores are ordered by source");
    }

    #[test]
    fn the_cosine_survives_and_stays_within_bounds() {
        let lists = Lists { dense: vec![hit("a", 1.000_1), hit("b", -0.2)], lexical: vec![hit("c", 5.0)] };
        let cosines: HashMap<String, Option<f32>> = fuse(lists, Weights::default())
            .into_iter()
            .map(|fused| (fused.hit.record.source, fused.cosine))
            .collect();
        assert_eq!(cosines["a"], Some(1.0));
        assert_eq!(cosines["b"], Some(0.0));
        assert_eq!(cosines["c"], None);
    }

    #[test]
    fn of_two_revisions_only_the_newer_one_is_found() {
        let mut old = hit("a", 9.0);
        old.id = Uuid::from_u128(1);
        let mut new = hit("a", 5.0);
        new.record.rev = 2;
        let fused = fuse(Lists { dense: Vec::new(), lexical: vec![old, new.clone()] }, Weights::default());
        assert_eq!(fused.len(), 1);
        assert_eq!(fused[0].hit.id, new.id);
    }

    proptest! {
        #[test]
        fn the_order_of_ties_in_the_lists_does_not_matter(
            scores in prop::collection::vec(0_u8..3, 0..20),
            turn in 0_usize..20,
        ) {
            let list: Vec<Hit> =
                scores.iter().enumerate().map(|(at, score)| hit(&format!("{at:02}"), f32::from(*score))).collect();
            let mut turned = list.clone();
            turned.rotate_left(turn.min(list.len()));
            let lists = |lexical: Vec<Hit>| Lists { dense: list.clone(), lexical };
            prop_assert_eq!(order(lists(list.clone())), order(lists(turned)));
        }
    }
}
