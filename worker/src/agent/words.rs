//! The words that carry meaning in a text, for comparing texts without a model.

use std::{
    hash::{BuildHasher as _, RandomState},
    sync::LazyLock,
};

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

/// The content words of a text, each once. Held as hashes, keyed anew in each process: eight bytes a word,
/// and nobody can write two words that are taken for each other.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Bag(Vec<u64>);

impl Bag {
    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// How many both have.
    pub(super) fn shared_with(&self, other: &Self) -> usize {
        let (mut ours, mut theirs) = (self.0.iter().peekable(), other.0.iter().peekable());
        let mut shared = 0;
        while let (Some(our), Some(their)) = (ours.peek(), theirs.peek()) {
            match our.cmp(their) {
                std::cmp::Ordering::Less => drop(ours.next()),
                std::cmp::Ordering::Greater => drop(theirs.next()),
                std::cmp::Ordering::Equal => {
                    shared += 1;
                    ours.next();
                    theirs.next();
                }
            }
        }
        shared
    }

    /// Is this [word](list) one of them?
    pub(super) fn contains(&self, word: &str) -> bool {
        self.0.binary_search(&hash(word)).is_ok()
    }
}

fn hash(word: &str) -> u64 {
    static HASHER: LazyLock<RandomState> = LazyLock::new(RandomState::new);
    HASHER.hash_one(word)
}

/// The content words of a text: lower case, identifiers split at case and underscores, stemmed.
pub(super) fn of(text: &str) -> Bag {
    let mut words = hashes(text);
    words.sort_unstable();
    words.dedup();
    words.shrink_to_fit();
    Bag(words)
}

/// As [`list`], each as a bag holds it: alike within this process only.
pub(super) fn hashes(text: &str) -> Vec<u64> {
    let mut words = Vec::new();
    each(text, |word| words.push(hash(word)));
    words
}

/// As [`of`], in order and with repetitions.
pub(super) fn list(text: &str) -> Vec<String> {
    let mut words = Vec::new();
    each(text, |word| words.push(word.to_owned()));
    words
}

fn each(text: &str, mut found: impl FnMut(&str)) {
    let mut word = String::new();
    let mut was_lower = false;
    for c in text.chars() {
        let boundary = !c.is_alphanumeric() || (c.is_uppercase() && was_lower);
        if boundary {
            if is_content(&word) {
                found(stem(&word));
            }
            word.clear();
        }
        if c.is_ascii_alphanumeric() {
            word.push(c.to_ascii_lowercase());
        } else if c.is_alphanumeric() {
            word.extend(c.to_lowercase());
        }
        was_lower = c.is_lowercase();
    }
    if is_content(&word) {
        found(stem(&word));
    }
}

fn is_content(word: &str) -> bool {
    word.len() >= 3 && word.chars().nth(2).is_some() && !is_stop_word(word)
}

fn is_stop_word(word: &str) -> bool {
    /// Where the words of each initial begin and end in [`STOP_WORDS`].
    static OF_INITIAL: LazyLock<[(usize, usize); 26]> = LazyLock::new(|| {
        std::array::from_fn(|letter| {
            let before =
                |last: usize| STOP_WORDS.partition_point(|stop| usize::from(stop.as_bytes()[0]) < last);
            (before(usize::from(b'a') + letter), before(usize::from(b'a') + letter + 1))
        })
    });
    let Some(initial) = word.bytes().next().filter(u8::is_ascii_lowercase) else { return false };
    let (start, end) = OF_INITIAL[usize::from(initial - b'a')];
    STOP_WORDS[start..end].iter().any(|stop| stop.len() == word.len() && *stop == word)
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

/// A token between blanks as one word: in lower case, without the signs around it, with plain apostrophes.
pub(super) fn plain(token: &str) -> String {
    token.trim_matches(|c: char| !c.is_alphanumeric()).to_lowercase().replace('’', "'")
}

/// What share of `part`'s words occurs in `whole`, 0 to 1; 0 for no words.
pub(super) fn share(part: &Bag, whole: &Bag) -> f64 {
    if part.len() == 0 {
        return 0.0;
    }
    part.shared_with(whole) as f64 / part.len() as f64
}

/// Have two texts more than `threshold` in common, 0 to 1 (Jaccard)? Two that have not are told apart by
/// their first words that differ, mostly.
pub(super) fn are_alike(a: &Bag, b: &Bag, threshold: f64) -> bool {
    let (a, b) = (&a.0, &b.0);
    let alike = |common: usize| {
        let all = a.len() + b.len() - common;
        all > 0 && common as f64 / all as f64 > threshold
    };
    // The more they share the more alike they are, so what neither may miss is known beforehand.
    let Some(least) = (0..=a.len().min(b.len())).rev().take_while(|common| alike(*common)).last() else {
        return false;
    };
    let (may_miss, may_add) = (a.len() - least, b.len() - least);
    let (mut at, mut other, mut common) = (0, 0, 0);
    while let (Some(ours), Some(theirs)) = (a.get(at), b.get(other)) {
        at += usize::from(ours <= theirs);
        other += usize::from(theirs <= ours);
        common += usize::from(ours == theirs);
        if at - common > may_miss || other - common > may_add {
            return false;
        }
    }
    common >= least
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identifiers_and_prose_meet() {
        let code = of("fn claim_run(&self, leaseUntil: Timestamp)");
        assert!(of("a worker claims the lease").shared_with(&code) >= 2);
    }

    #[test]
    fn a_bag_has_the_words_of_the_list_each_once() {
        let text = "Leases expire; a lease that expired is taken over, and the workerPool takes it.";
        let (bag, list) = (of(text), list(text));
        assert!(list.iter().all(|word| bag.contains(word)) && !bag.contains("gateway"));
        assert_eq!(list, ["leas", "expir", "leas", "expir", "taken", "work", "pool", "tak"]);
        assert_eq!(bag.len(), 6);
        assert_eq!(of("a lease expires").shared_with(&bag), 2);
    }

    #[test]
    fn the_stop_words_are_sorted_for_the_search() {
        assert!(STOP_WORDS.is_sorted());
        assert!(STOP_WORDS.iter().all(|stop| is_stop_word(stop)));
        for word in ["a", "aboutt", "abou", "yourself", "zebra", "queue", "the_", "éa", ""] {
            assert!(!is_stop_word(word), "{word}");
        }
    }

    #[test]
    fn alike_is_what_jaccard_says() {
        let bag = |words: std::ops::Range<u64>| Bag(words.collect());
        for (a, b) in
            [(0..0, 0..0), (0..1, 0..0), (0..9, 0..9), (0..9, 1..10), (0..100, 8..100), (0..40, 2..43)]
        {
            let (a, b) = (bag(a), bag(b));
            let common = a.shared_with(&b);
            let all = a.len() + b.len() - common;
            for threshold in [0.0, 0.5, 0.8, 0.85, 0.92, 0.99, 1.0] {
                let jaccard = if all == 0 { 0.0 } else { common as f64 / all as f64 };
                assert_eq!(are_alike(&a, &b, threshold), jaccard > threshold, "{common} of {all}");
                assert_eq!(are_alike(&b, &a, threshold), jaccard > threshold, "{common} of {all}");
            }
        }
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
