//! Weighted reciprocal rank fusion (Cormack et al., SIGIR 2009), deterministic.
//!
//! The engines' own fusion orders ties at random and loses the cosine, so it is done here: equal
//! queries get equal answers.

use std::{cmp::Ordering, collections::HashMap, mem, sync::Arc};

use uuid::Uuid;

use crate::index::{ChunkRecord, Hit, Lists};

/// The constant of the paper.
const K: f64 = 60.0;

/// A chunk with its fused score.
#[derive(Clone, Debug)]
pub(crate) struct Fused {
    pub(crate) hit: Hit,
    /// Which of the searched collections it is in.
    pub(crate) collection: usize,
    pub(crate) score: f64,
    /// Cosine, where the dense list had it or the adapter gave it.
    pub(crate) cosine: Option<f32>,
}

/// What was found in one collection.
#[derive(Clone, Debug, Default)]
pub(crate) struct Found {
    pub(crate) lists: Lists,
    /// In files that the question names.
    pub(crate) named: Vec<Hit>,
}

/// Weights of the lists.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Weights {
    pub(crate) dense: f64,
    pub(crate) lexical: f64,
    /// More than the others together at least: then the first ones of this list come before all that is not in it.
    pub(crate) named: f64,
}

impl Default for Weights {
    fn default() -> Self {
        Self { dense: 1.0, lexical: 1.0, named: 3.0 }
    }
}

/// One list of what was found in each collection, best first; ties by place. Where two revisions of a
/// document are found at the same moment, only the newer one stays.
///
/// Cosines of one model mean the same everywhere, so the dense lists are ranked as one. BM25 depends
/// on a collection's own words and lengths, so each lexical list is ranked by itself.
pub(crate) fn fuse(found: Vec<Found>, weights: Weights) -> Vec<Fused> {
    let mut dense: Vec<(usize, Hit)> = Vec::new();
    let mut lexical: Vec<Vec<(usize, Hit)>> = Vec::with_capacity(found.len());
    let mut named: Vec<Vec<(usize, Hit)>> = Vec::new();
    let mut cosines: Vec<HashMap<Uuid, f32>> = Vec::with_capacity(found.len());
    for (collection, mut found) in found.into_iter().enumerate() {
        let old = old_revisions(&found);
        let Found { lists, named: first } = &mut found;
        for old in old {
            let is_current = |hit: &Hit| !Arc::ptr_eq(&hit.record, &old);
            lists.dense.retain(is_current);
            lists.lexical.retain(is_current);
            first.retain(is_current);
        }
        let Found { mut lists, named: first } = found;
        cosines.push(mem::take(&mut lists.cosines));
        named.push(first.into_iter().map(|hit| (collection, hit)).collect());
        dense.extend(lists.dense.into_iter().map(|hit| (collection, hit)));
        lexical.push(lists.lexical.into_iter().map(|hit| (collection, hit)).collect());
    }
    let mut fused: HashMap<(usize, Uuid), Fused> = HashMap::new();
    let mut add = |mut list: Vec<(usize, Hit)>, weight: f64, is_dense: bool| {
        list.sort_by(|a, b| b.1.score.total_cmp(&a.1.score).then_with(|| by_place(a, b)));
        for (rank, (collection, hit)) in list.into_iter().enumerate() {
            let cosine = is_dense.then(|| hit.score.clamp(0.0, 1.0));
            let entry = fused.entry((collection, hit.id)).or_insert(Fused {
                hit,
                collection,
                score: 0.0,
                cosine: None,
            });
            entry.score += weight / (K + rank as f64 + 1.0);
            entry.cosine = entry.cosine.or(cosine);
        }
    };
    add(dense, weights.dense, true);
    for list in lexical {
        add(list, weights.lexical, false);
    }
    for list in named {
        add(list, weights.named, false);
    }
    let mut fused: Vec<Fused> = fused.into_values().collect();
    for fused in fused.iter_mut().filter(|fused| fused.cosine.is_none()) {
        fused.cosine = cosines[fused.collection].get(&fused.hit.id).map(|cosine| cosine.clamp(0.0, 1.0));
    }
    fused.sort_by(|a, b| {
        b.score
            .total_cmp(&a.score)
            .then_with(|| place(a.collection, &a.hit).cmp(&place(b.collection, &b.hit)))
    });
    fused
}

/// Records of documents of which a newer revision was found too.
fn old_revisions(Found { lists, named }: &Found) -> Vec<Arc<ChunkRecord>> {
    let hits = || lists.dense.iter().chain(&lists.lexical).chain(named);
    let mut newest: HashMap<&str, i64> = HashMap::new();
    for hit in hits() {
        let rev = newest.entry(&hit.record.doc).or_insert(hit.record.rev);
        *rev = hit.record.rev.max(*rev);
    }
    let is_old = |hit: &&Hit| newest.get(hit.record.doc.as_str()).is_some_and(|rev| hit.record.rev < *rev);
    hits().filter(is_old).map(|hit| Arc::clone(&hit.record)).collect()
}

fn by_place(a: &(usize, Hit), b: &(usize, Hit)) -> Ordering {
    place(a.0, &a.1).cmp(&place(b.0, &b.1))
}

/// The order of a list of one collection, whatever order its ties came in.
pub(crate) fn best_first(a: &Hit, b: &Hit) -> Ordering {
    b.score.total_cmp(&a.score).then_with(|| place(0, a).cmp(&place(0, b)))
}

/// Where a chunk stands: no two are at the same place.
fn place(collection: usize, hit: &Hit) -> (&str, &str, u32, u32, usize, Uuid) {
    let record = &hit.record;
    (&record.source, &record.repo, record.start, record.n, collection, hit.id)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn hit(source: &str, score: f32) -> Hit {
        let record = ChunkRecord {
            doc: source.to_owned(),
            source: source.to_owned(),
            rev: 1,
            ..ChunkRecord::default()
        };
        Hit { id: Uuid::new_v5(&Uuid::NAMESPACE_URL, source.as_bytes()), score, record: Arc::new(record) }
    }

    fn lists(dense: Vec<Hit>, lexical: Vec<Hit>) -> Found {
        Found { lists: Lists { dense, lexical, cosines: HashMap::new() }, named: Vec::new() }
    }

    fn order(found: Found) -> Vec<String> {
        fuse(vec![found], Weights::default())
            .into_iter()
            .map(|fused| fused.hit.record.source.clone())
            .collect()
    }

    #[test]
    fn what_both_lists_like_comes_first() {
        let lists = lists(vec![hit("a", 0.9), hit("b", 0.8)], vec![hit("c", 9.0), hit("b", 8.0)]);
        assert_eq!(order(lists), ["b", "a", "c"], "equal scores are ordered by source");
    }

    #[test]
    fn what_is_in_a_named_file_comes_before_everything_else() {
        let both = || (0..40).map(|at| hit(&format!("{at:02}"), 40.0 - at as f32)).collect::<Vec<_>>();
        let named = vec![hit("20", 0.0), hit("elsewhere", 5.0), hit("new", 0.0)];
        let order = order(Found { named, ..lists(both(), both()) });
        assert_eq!(order[..4], ["20", "elsewhere", "new", "00"]);
        assert_eq!(order.len(), 42, "nothing twice");
    }

    #[test]
    fn the_cosine_survives_and_stays_within_bounds() {
        let lexical = vec![hit("c", 5.0), hit("d", 4.0), hit("e", 3.0)];
        let cosines = [(lexical[1].id, 0.4), (lexical[2].id, 1.2)].into();
        let mut found = lists(vec![hit("a", 1.000_1), hit("b", -0.2)], lexical);
        found.lists.cosines = cosines;
        let cosines: HashMap<String, Option<f32>> = fuse(vec![found], Weights::default())
            .into_iter()
            .map(|fused| (fused.hit.record.source.clone(), fused.cosine))
            .collect();
        assert_eq!((cosines["d"], cosines["e"]), (Some(0.4), Some(1.0)));
        assert_eq!(cosines["a"], Some(1.0));
        assert_eq!(cosines["b"], Some(0.0));
        assert_eq!(cosines["c"], None);
    }

    #[test]
    fn of_two_revisions_only_the_newer_one_is_found() {
        let mut old = hit("a", 9.0);
        old.id = Uuid::from_u128(1);
        let mut new = hit("a", 5.0);
        Arc::make_mut(&mut new.record).rev = 2;
        let lists = lists(Vec::new(), vec![old, new.clone()]);
        let fused = fuse(vec![lists], Weights::default());
        assert_eq!(fused.len(), 1);
        assert_eq!(fused[0].hit.id, new.id);
    }

    #[test]
    fn collections_are_fused_by_cosine_and_by_their_own_lexical_ranks() {
        let found = vec![
            lists(vec![hit("a", 0.5)], vec![hit("a", 100.0), hit("same", 90.0)]),
            lists(vec![hit("b", 0.9)], vec![hit("same", 1.0)]),
        ];
        let fused: Vec<(String, usize)> = fuse(found, Weights::default())
            .into_iter()
            .map(|fused| (fused.hit.record.source.clone(), fused.collection))
            .collect();
        let expected = [("a", 0), ("b", 1), ("same", 1), ("same", 0)];
        assert_eq!(fused, expected.map(|(source, collection)| (source.to_owned(), collection)));
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
            let with = |lexical: Vec<Hit>| lists(list.clone(), lexical);
            prop_assert_eq!(order(with(list.clone())), order(with(turned)));
        }
    }
}
