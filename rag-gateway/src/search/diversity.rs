//! Maximal marginal relevance (Carbonell and Goldstein, SIGIR 1998): passages that repeat what is
//! there already come later.
//!
//! How alike two passages are is judged by their words, so it works without embeddings too and costs
//! the index nothing.

use std::{
    collections::HashSet,
    hash::{DefaultHasher, Hash as _, Hasher as _},
};

use crate::fusion::Fused;

/// Reorders the candidates: the first `wanted` are chosen one by one, each for its relevance less
/// what it repeats; the rest keeps its order behind them.
pub(super) fn diversify(fused: &mut Vec<Fused>, diversity: f32, wanted: usize) {
    let diversity = f64::from(diversity);
    let (Some(best), Some(worst)) = (fused.first(), fused.last()) else { return };
    let (best, range) = (best.score, (best.score - worst.score).max(f64::EPSILON));
    let words: Vec<HashSet<u64>> = fused.iter().map(|fused| words(&fused.hit.record.text)).collect();
    let relevance: Vec<f64> = fused.iter().map(|fused| 1.0 - (best - fused.score) / range).collect();
    // How alike each candidate is to the most similar one that was chosen.
    let mut repeats = vec![0.0_f64; fused.len()];
    let mut left: Vec<usize> = (0..fused.len()).collect();
    let mut order = Vec::with_capacity(fused.len());
    while order.len() < wanted && !left.is_empty() {
        let gain = |at: usize| (1.0 - diversity) * relevance[at] - diversity * repeats[at];
        // The first of equals: the order before decides ties.
        let mut chosen = 0;
        for place in 1..left.len() {
            if gain(left[place]) > gain(left[chosen]) {
                chosen = place;
            }
        }
        let at = left.remove(chosen);
        order.push(at);
        for other in &left {
            repeats[*other] = repeats[*other].max(likeness(&words[at], &words[*other]));
        }
    }
    order.extend(left);
    let mut slots: Vec<Option<Fused>> = std::mem::take(fused).into_iter().map(Some).collect();
    fused.extend(order.into_iter().filter_map(|at| slots[at].take()));
}

fn words(text: &str) -> HashSet<u64> {
    text.split(|character: char| !character.is_alphanumeric())
        // Short words are in every text.
        .filter(|word| word.len() > 2)
        .map(|word| {
            // Its keys are fixed, so equal queries get equal answers.
            let mut hasher = DefaultHasher::new();
            word.to_lowercase().hash(&mut hasher);
            hasher.finish()
        })
        .collect()
}

/// The cosine of two sets of words.
fn likeness(a: &HashSet<u64>, b: &HashSet<u64>) -> f64 {
    if a.is_empty() || b.is_empty() {
        return 0.0;
    }
    let (small, large) = if a.len() <= b.len() { (a, b) } else { (b, a) };
    let shared = small.iter().filter(|word| large.contains(word)).count();
    shared as f64 / ((a.len() * b.len()) as f64).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::index::{ChunkRecord, Hit};

    fn candidates() -> Vec<Fused> {
        [
            ("a", "budget tokens are reserved before every call", 0.030),
            ("b", "budget tokens are reserved before every single call", 0.029),
            ("c", "tokens reserved before call: every budget", 0.028),
            ("d", "the queue holds messages until a worker pulls them", 0.020),
            ("e", "unrelated weather report", 0.010),
        ]
        .into_iter()
        .map(|(source, text, score)| {
            let record =
                ChunkRecord { source: source.to_owned(), text: text.to_owned(), ..ChunkRecord::default() };
            let hit = Hit { id: uuid::Uuid::nil(), score: 0.0, record: record.into() };
            Fused { hit, collection: 0, score, cosine: None }
        })
        .collect()
    }

    fn order(diversity: f32, wanted: usize) -> Vec<String> {
        let mut fused = candidates();
        diversify(&mut fused, diversity, wanted);
        fused.into_iter().map(|fused| fused.hit.record.source.clone()).collect()
    }

    #[test]
    fn what_repeats_comes_later() {
        assert_eq!(order(0.5, 2), ["a", "d", "b", "c", "e"], "the rest keeps its order");
        assert_eq!(order(0.0, 5), ["a", "b", "c", "d", "e"], "relevance alone");
        assert_eq!(order(0.5, 5), order(0.5, 5));
        let mut none = Vec::new();
        diversify(&mut none, 0.5, 3);
        assert!(none.is_empty());
    }
}
