//! Where a list of candidates ends.
//!
//! Of equal scores an engine gives any, and others the next time. A list that ends between them is another one each
//! time, and so is what fusion makes of it. So some more are asked for than are needed: where all that tie with the
//! last one needed are among them, their place decides which ones stay. Else still more are asked for, once. What ties
//! with hundreds of others is left out, where there is enough without it.

use crate::{
    fusion::best_first,
    index::{Hit, Lists},
};

/// More than needed that are asked for at first: few chunks are equal to others, and each one that is read costs.
const BEYOND: usize = 8;

/// Times as many as needed that are asked for where those were not enough.
const AT_MOST: usize = 4;

/// How many candidates to ask for where `needed` are wanted, first and then.
pub(super) fn lengths(needed: usize) -> [usize; 2] {
    [needed + BEYOND, needed.saturating_mul(AT_MOST).max(needed + BEYOND)]
}

/// Cuts lists of which `asked` candidates were asked for to the best `needed`. False, and nothing is cut, where it is
/// not known which ones these are; with `enough`, what is certain stays if it is so many, else what there is.
pub(super) fn cut(lists: &mut Lists, asked: usize, needed: usize, enough: Option<usize>) -> bool {
    let end = |list: &mut Vec<Hit>| -> Option<usize> {
        list.sort_by(best_first);
        let wanted = needed.min(list.len());
        let certain = match list.last() {
            // What is not here may tie with the last one.
            Some(last) if list.len() >= asked => list.partition_point(|hit| hit.score > last.score),
            _ => list.len(),
        };
        if certain >= wanted {
            return Some(wanted);
        }
        enough.map(|enough| if certain >= enough { certain } else { wanted })
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
        let [first, then] = lengths(NEEDED);
        let ids = |lists: Lists| lists.lexical.into_iter().map(|hit| hit.id).collect();
        let ask = |asked| Lists { lexical: engine(scores, turn, asked), ..Lists::default() };
        let mut lists = ask(first);
        if cut(&mut lists, first, NEEDED, None) {
            return (ids(lists), false);
        }
        let mut lists = ask(then);
        assert!(cut(&mut lists, then, NEEDED, Some(4)));
        (ids(lists), true)
    }

    #[test]
    fn ties_at_the_end_are_cut_by_place() {
        let scores: Vec<u8> = (0..14).map(|at| 100 - at).chain([50; 4]).chain(0..40).collect();
        let (ids, again) = candidates(&scores, 0);
        assert!(!again, "no second search for it");
        assert_eq!(ids, (0..16).map(Uuid::from_u128).collect::<Vec<_>>());
        assert_eq!(candidates(&scores, 16), (ids, false));
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
        assert!(cut(&mut lists, 24, NEEDED, None));
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
            let hopeless = scores.iter().any(|score| better(*score) < 4 && as_good(*score) >= 4 * NEEDED);
            prop_assume!(!hopeless);
            prop_assert_eq!(one, two);
        }
    }
}
