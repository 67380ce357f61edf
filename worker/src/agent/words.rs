//! The words that carry meaning in a text, for comparing texts without a model.

use std::collections::HashSet;

/// Words too common to say anything, in English prose about software.
const STOP_WORDS: &[&str] = &[
    "about", "after", "again", "all", "also", "and", "any", "are", "because", "been", "before", "being",
    "both", "but", "can", "could", "does", "each", "etc", "every", "for", "from", "had", "has", "have",
    "her", "his", "how", "into", "its", "itself", "just", "may", "might", "more", "most", "must", "not",
    "off", "one", "only", "other", "our", "out", "over", "own", "per", "same", "shall", "she", "should",
    "some", "such", "than", "that", "the", "their", "them", "then", "there", "these", "they", "this",
    "those", "through", "too", "two", "under", "until", "use", "used", "uses", "using", "very", "via", "was",
    "were", "what", "when", "where", "which", "while", "who", "why", "will", "with", "without", "would",
    "you", "your",
];

/// The content words of a text: lower case, identifiers split at case and underscores, stemmed.
pub(super) fn of(text: &str) -> HashSet<String> {
    list(text).into_iter().collect()
}

/// As [`of`], in order and with repetitions.
pub(super) fn list(text: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut word = String::new();
    let mut was_lower = false;
    for c in text.chars() {
        let boundary = !c.is_alphanumeric() || (c.is_uppercase() && was_lower);
        if boundary {
            push(&mut words, &word);
            word.clear();
        }
        if c.is_ascii_alphanumeric() {
            word.push(c.to_ascii_lowercase());
        } else if c.is_alphanumeric() {
            word.extend(c.to_lowercase());
        }
        was_lower = c.is_lowercase();
    }
    push(&mut words, &word);
    words
}

fn push(words: &mut Vec<String>, word: &str) {
    if word.len() < 3 || word.chars().count() < 3 || STOP_WORDS.binary_search(&word).is_ok() {
        return;
    }
    words.push(stem(word).to_owned());
}

/// Cuts the common English endings; crude, but the same on both sides of a comparison.
fn stem(word: &str) -> &str {
    if !word.is_ascii() {
        return word;
    }
    let strip = |word: &'_ str, endings: &[&str]| -> usize {
        let found = endings.iter().find(|ending| word.ends_with(*ending) && word.len() - ending.len() >= 3);
        word.len() - found.map_or(0, |ending| ending.len())
    };
    let word = &word[..strip(word, &["ations", "ation", "ings", "ing", "ers", "er", "ed", "es", "s"])];
    &word[..strip(word, &["e", "y", "i"])]
}

/// What share of `part`'s words occurs in `whole`, 0 to 1; 0 for no words.
pub(super) fn share(part: &HashSet<String>, whole: &HashSet<String>) -> f64 {
    if part.is_empty() {
        return 0.0;
    }
    part.intersection(whole).count() as f64 / part.len() as f64
}

/// How much two texts have in common, 0 to 1 (Jaccard).
pub(super) fn similarity(a: &HashSet<String>, b: &HashSet<String>) -> f64 {
    let (a, b) = if a.len() <= b.len() { (a, b) } else { (b, a) };
    let common = a.intersection(b).count();
    let all = a.len() + b.len() - common;
    if all == 0 { 0.0 } else { common as f64 / all as f64 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identifiers_and_prose_meet() {
        let code = of("fn claim_run(&self, leaseUntil: Timestamp)");
        assert!(of("a worker claims the lease").iter().filter(|word| code.contains(*word)).count() >= 2);
    }

    #[test]
    fn the_stop_words_are_sorted_for_the_search() {
        assert!(STOP_WORDS.is_sorted());
    }

    #[test]
    fn endings_do_not_matter() {
        for (a, b) in
            [("retries", "retry"), ("deployed", "deploy"), ("leases", "lease"), ("queueing", "queue")]
        {
            assert_eq!(of(a), of(b), "{a} {b}");
        }
    }
}
