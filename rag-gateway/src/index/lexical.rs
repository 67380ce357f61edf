//! What BM25 sees of a chunk and of a query.
//!
//! The engines split on everything that is not a letter or a digit, lower-case and stem English. They
//! leave `VectorIndex` in one piece; here its parts are added, on both sides, so that the name and
//! the words find each other.

use std::collections::HashSet;

use atlas_shared::config::Bm25Config;
use serde::{Deserialize, Serialize};

use super::ChunkRecord;

/// How BM25 weighs the chunks of a collection. Decided when it is made and recorded in it, so that all
/// its chunks are weighed alike, whatever the settings are later.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Weighing {
    pub(crate) k1: f64,
    pub(crate) b: f64,
    /// How often the heading is in what is weighed.
    pub(crate) heading: u32,
}

impl Weighing {
    /// That of collections without a record of it: the engines' defaults.
    pub(crate) fn unrecorded() -> Self {
        Self { k1: 1.2, b: 0.75, heading: 1 }
    }

    /// What BM25 sees of a chunk: where it stands, its heading as often as it counts, its text.
    pub(crate) fn text(self, record: &ChunkRecord) -> String {
        let text = record.contextual_text();
        let (Some(heading), 2..) = (&record.heading, self.heading) else { return lexical_text(&text) };
        let mut weighed = String::with_capacity(text.len() + (heading.len() + 1) * self.heading as usize);
        for _ in 1..self.heading {
            weighed.push_str(heading);
            weighed.push('\n');
        }
        weighed.push_str(&text);
        lexical_text(&weighed)
    }
}

impl From<Bm25Config> for Weighing {
    fn from(Bm25Config { k1, b, heading_weight }: Bm25Config) -> Self {
        Self { k1, b, heading: heading_weight }
    }
}

/// The text with the parts of its compound identifiers at the end.
pub(crate) fn lexical_text(text: &str) -> String {
    let mut out = text.to_owned();
    let mut seen = HashSet::new();
    for word in words(text) {
        let mut parts = humps(word);
        if let (Some(first), Some(second)) = (parts.next(), parts.next())
            && seen.insert(word)
        {
            for part in [first, second].into_iter().chain(parts) {
                out.push(' ');
                out.push_str(part);
            }
        }
    }
    out
}

/// How many terms the engines count in a [`lexical_text`]: words that are not stop words.
pub(crate) fn term_count(text: &str) -> u32 {
    let count = words(text).filter(|word| !is_stop_word(word)).count();
    u32::try_from(count).unwrap_or(u32::MAX)
}

fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(|character: char| !character.is_alphanumeric()).filter(|word| !word.is_empty())
}

/// `QdrantEdgeIndex` → `Qdrant`, `Edge`, `Index`; `HTTPServer` → `HTTP`, `Server`.
fn humps(word: &str) -> impl Iterator<Item = &str> {
    let mut rest = word;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let mut characters = rest.char_indices().peekable();
        let mut previous = characters.next().map(|(_, character)| character)?;
        let mut end = rest.len();
        while let Some((at, character)) = characters.next() {
            let next_is_lower = characters.peek().is_some_and(|(_, next)| next.is_lowercase());
            let new_hump = character.is_uppercase()
                && (previous.is_lowercase() || (previous.is_uppercase() && next_is_lower));
            if new_hump {
                end = at;
                break;
            }
            previous = character;
        }
        let (hump, after) = rest.split_at(end);
        rest = after;
        Some(hump)
    })
}

/// The English stop words of both engines, as far as they are words here.
fn is_stop_word(word: &str) -> bool {
    const STOP_WORDS: &[&str] = &[
        "a",
        "about",
        "above",
        "after",
        "again",
        "against",
        "ain",
        "all",
        "am",
        "an",
        "and",
        "any",
        "are",
        "aren",
        "as",
        "at",
        "be",
        "because",
        "been",
        "before",
        "being",
        "below",
        "between",
        "both",
        "but",
        "by",
        "can",
        "couldn",
        "d",
        "did",
        "didn",
        "do",
        "does",
        "doesn",
        "doing",
        "don",
        "down",
        "during",
        "each",
        "few",
        "for",
        "from",
        "further",
        "had",
        "hadn",
        "has",
        "hasn",
        "have",
        "haven",
        "having",
        "he",
        "her",
        "here",
        "hers",
        "herself",
        "him",
        "himself",
        "his",
        "how",
        "i",
        "if",
        "in",
        "into",
        "is",
        "isn",
        "it",
        "its",
        "itself",
        "just",
        "ll",
        "m",
        "ma",
        "me",
        "mightn",
        "more",
        "most",
        "mustn",
        "my",
        "myself",
        "needn",
        "no",
        "nor",
        "not",
        "now",
        "o",
        "of",
        "off",
        "on",
        "once",
        "only",
        "or",
        "other",
        "our",
        "ours",
        "ourselves",
        "out",
        "over",
        "own",
        "re",
        "s",
        "same",
        "shan",
        "she",
        "should",
        "shouldn",
        "so",
        "some",
        "such",
        "t",
        "than",
        "that",
        "the",
        "their",
        "theirs",
        "them",
        "themselves",
        "then",
        "there",
        "these",
        "they",
        "this",
        "those",
        "through",
        "to",
        "too",
        "under",
        "until",
        "up",
        "ve",
        "very",
        "was",
        "wasn",
        "we",
        "were",
        "weren",
        "what",
        "when",
        "where",
        "which",
        "while",
        "who",
        "whom",
        "why",
        "will",
        "with",
        "won",
        "wouldn",
        "y",
        "you",
        "your",
        "yours",
        "yourself",
        "yourselves",
    ];
    word.len() <= 10
        && word.is_ascii()
        && STOP_WORDS.binary_search(&word.to_ascii_lowercase().as_str()).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn compound_identifiers_are_taken_apart_once() {
        assert_eq!(lexical_text("VectorIndex, VectorIndex"), "VectorIndex, VectorIndex Vector Index");
        assert_eq!(lexical_text("HTTPServer"), "HTTPServer HTTP Server");
        assert_eq!(lexical_text("max_in_flight and Plain words"), "max_in_flight and Plain words");
        assert_eq!(lexical_text("élanVital ÀB"), "élanVital ÀB élan Vital");
    }

    #[test]
    fn a_heading_counts_as_often_as_it_weighs() {
        let weighing = Weighing { heading: 3, ..Weighing::unrecorded() };
        let record = ChunkRecord {
            source: "a.md".to_owned(),
            heading: Some("Guide › KeyRotation".to_owned()),
            text: "Every day.".to_owned(),
            ..ChunkRecord::default()
        };
        let text = weighing.text(&record);
        assert_eq!(text.matches("Guide").count(), 3, "{text}");
        assert_eq!(text.matches("KeyRotation").count(), 3, "{text}");
        assert_eq!(Weighing::unrecorded().text(&record), lexical_text(&record.contextual_text()));
        let plain = ChunkRecord { heading: None, ..record };
        assert_eq!(weighing.text(&plain), "a.md\nEvery day.");
    }

    #[test]
    fn stop_words_do_not_count() {
        assert_eq!(term_count("The store is where the truth is: runs, results."), 4);
        assert_eq!(term_count(""), 0);
    }
}
