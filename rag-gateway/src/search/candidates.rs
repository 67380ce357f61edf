//! Where a list of candidates ends.
//!
//! Of equal scores an engine gives any, and others the next time. A list that ends between them is another one each
//! time, and so is what fusion makes of it. So one more is asked for than is needed, and what ties with the last one is
//! left out: it may be any of many. Only where too little would be left more are asked for, once, because a second
//! search costs as much as the first.

use crate::{
    fusion::best_first,
    index::{Hit, Lists},
};

/// One search of at most two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Attempt {
    /// How many candidates to ask for.
    pub(super) asked: usize,
    /// How many must be left of each list that had more.
    least: usize,
    /// What there is must do.
    is_last: bool,
}

/// The searches for `needed` candidates of which `top_k` passages are made.
pub(super) fn attempts(needed: usize, top_k: usize) -> [Attempt; 2] {
    /// Times as many as needed that are asked for in the second search.
    const AT_MOST: usize = 4;
    [
        Attempt { asked: needed + 1, least: top_k.max(needed / 2), is_last: false },
        Attempt { asked: needed.saturating_mul(AT_MOST), least: top_k, is_last: true },
    ]
}

/// Cuts lists to the best `needed`, or to fewer that are certain. False, and nothing is cut, where these are too few.
pub(super) fn cut(lists: &mut Lists, needed: usize, attempt: Attempt) -> bool {
    let Attempt { asked, least, is_last } = attempt;
    let end = |list: &mut Vec<Hit>| -> Option<usize> {
        list.sort_by(best_first);
        let wanted = needed.min(list.len());
        let certain = match list.last() {
            // What is not here may tie with the last one.
            Some(last) if list.len() >= asked => list.partition_point(|hit| hit.score > last.score),
            _ => list.len(),
        };
        match certain.min(wanted) {
            left if left >= least.min(wanted) => Some(left),
            _ => is_last.then_some(wanted),
        }
    };
    let Some((dense, lexical)) = end(&mut lists.dense).zip(end(&mut lists.lexical)) else { return false };
    // Nobody has to ask for these again, where only the lexical list keeps them.
    lists.cosines.extend(lists.dense.drain(dense..).map(|hit| (hit.id, hit.score)));
    lists.lexical.truncate(lexical);
    true
}

#[cfg(test)]
mod tests {
    use std::{collections::HashMap, sync::Arc};

    use proptest::prelude::*;
    use uuid::Uuid;

    use super::*;
    use crate::index::ChunkRecord;

    const NEEDED: usize = 16;
    const TOP_K: usize = 4;

    /// What an engine gives: the best, and of equal ones any.
    fn engine(scores: &[u8], turn: usize, asked: usize) -> Vec<Hit> {
        let mut all: Vec<Hit> = scores
            .iter()
            .enumerate()
            .map(|(at, score)| Hit {
                id: Uuid::from_u128(at as u128),
                score: f32::from(*score),
                record: Arc::new(ChunkRecord { source: format!("{at:03}"), ..ChunkRecord::default() }),
            })
            .collect();
        all.rotate_left(turn % scores.len().max(1));
        all.sort_by(|a, b| b.score.total_cmp(&a.score));
        all.truncate(asked);
        all
    }

    /// As the pipeline asks.
    fn candidates(scores: &[u8], turn: usize) -> (Vec<Uuid>, bool) {
        let [first, then] = attempts(NEEDED, TOP_K);
        let ids = |lists: Lists| lists.lexical.into_iter().map(|hit| hit.id).collect();
        let ask =
            |attempt: Attempt| Lists { lexical: engine(scores, turn, attempt.asked), ..Lists::default() };
        let mut lists = ask(first);
        if cut(&mut lists, NEEDED, first) {
            return (ids(lists), false);
        }
        let mut lists = ask(then);
        assert!(cut(&mut lists, NEEDED, then));
        (ids(lists), true)
    }

    #[test]
    fn what_ties_with_the_one_after_the_last_is_left_out() {
        let scores: Vec<u8> = (0..14).map(|at| 100 - at).chain([50; 4]).chain(0..40).collect();
        for turn in [0, 16] {
            assert_eq!(candidates(&scores, turn), ((0..14).map(Uuid::from_u128).collect(), false));
        }
        let distinct: Vec<u8> = (0..40).map(|at| 100 - at).collect();
        assert_eq!(
            candidates(&distinct, 7),
            ((0..16).map(Uuid::from_u128).collect(), false),
            "no tie, all of them"
        );
        let scores: Vec<u8> = (0..6).map(|at| 100 - at).chain([50; 30]).collect();
        assert_eq!(candidates(&scores, 9), ((0..16).map(Uuid::from_u128).collect(), true), "six are too few");
    }

    #[test]
    fn what_ties_with_too_many_is_left_out_unless_hardly_anything_is_left() {
        let scores: Vec<u8> = [9, 8, 7, 6].into_iter().chain([1; 500]).collect();
        assert_eq!(candidates(&scores, 3).0, [0, 1, 2, 3].map(Uuid::from_u128));
        assert_eq!(candidates(&[1; 500], 3).0.len(), NEEDED);
        assert_eq!(candidates(&[1; 3], 1).0.len(), 3);
        assert_eq!(candidates(&[], 0).0.len(), 0);
    }

    #[test]
    fn cosines_of_what_is_cut_are_kept() {
        let dense = engine(&[7; 20], 0, 20);
        let mut lists = Lists { dense, lexical: Vec::new(), cosines: HashMap::new() };
        assert!(cut(&mut lists, NEEDED, Attempt { asked: 24, ..attempts(NEEDED, TOP_K)[0] }));
        assert_eq!((lists.dense.len(), lists.cosines.len()), (NEEDED, 4));
        assert_eq!(lists.cosines.get(&Uuid::from_u128(19)), Some(&7.0));
    }

    proptest! {
        #[test]
        fn equal_indexes_give_equal_lists(
            scores in prop::collection::vec(0_u8..12, 0..120),
            turns in (0_usize..120, 0_usize..120),
        ) {
            let [(one, _), (two, _)] = [turns.0, turns.1].map(|turn| candidates(&scores, turn));
            let better = |score: u8| scores.iter().filter(|other| **other > score).count();
            let as_good = |score: u8| scores.iter().filter(|other| **other >= score).count();
            // Where more tie than are looked at, and hardly anything is before them, the engine decides.
            let hopeless = scores.iter().any(|score| better(*score) < TOP_K && as_good(*score) >= 4 * NEEDED);
            prop_assume!(!hopeless);
            prop_assert_eq!(one, two);
        }
    }
}
