//! What BM25 sees of a chunk and of a query.
//!
//! The engines split on everything that is not a letter or a digit, lower-case and stem English. They
//! leave `VectorIndex` in one piece; here its parts are added, on both sides, so that the name and
//! the words find each other.

use std::{collections::HashSet, sync::LazyLock};

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

    /// The words of [`Self::text`], in any order, without making it.
    pub(crate) fn words(self, record: &ChunkRecord, mut each: impl FnMut(&str)) {
        let heading = record.heading.as_deref().unwrap_or_default();
        let mut seen = HashSet::new();
        for _ in 1..self.heading {
            words(heading).for_each(&mut each);
        }
        for part in [record.source.as_str(), heading, &record.text] {
            for word in words(part) {
                each(word);
                if let Some(humps) = compound(word)
                    && seen.insert(word)
                {
                    humps.for_each(&mut each);
                }
            }
        }
    }

    /// How many terms the engines count in [`Self::text`]: words that are not stop words.
    pub(crate) fn terms(self, record: &ChunkRecord) -> u32 {
        let mut count: u32 = 0;
        self.words(record, |word| count = count.saturating_add(u32::from(!is_stop_word(word))));
        count
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
        if let Some(humps) = compound(word)
            && seen.insert(word)
        {
            for part in humps {
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

/// The parts of a compound identifier; `None` of a word that has only one.
fn compound(word: &str) -> Option<impl Iterator<Item = &str>> {
    // Without a capital after its first letter a word has no humps.
    let may_have = if word.is_ascii() {
        word.bytes().skip(1).any(|byte| byte.is_ascii_uppercase())
    } else {
        word.chars().skip(1).any(char::is_uppercase)
    };
    (may_have && humps(word).nth(1).is_some()).then(|| humps(word))
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
    static PACKED: LazyLock<Vec<u128>> = LazyLock::new(|| {
        let mut packed: Vec<u128> = STOP_WORDS.iter().filter_map(|word| pack(word)).collect();
        packed.sort_unstable();
        packed
    });
    pack(word).is_some_and(|packed| PACKED.binary_search(&packed).is_ok())
}

/// A short ASCII word in lower case as a number; `None` of others. Every word of every chunk is looked for among the
/// stop words, and numbers are compared many times faster than texts.
fn pack(word: &str) -> Option<u128> {
    const CASE: u8 = 0x20;
    (word.len() <= LONGEST_STOP_WORD && word.is_ascii())
        .then(|| word.bytes().fold(0, |packed, byte| packed << 8 | u128::from(byte | CASE)))
}

/// In bytes.
const LONGEST_STOP_WORD: usize = 10;

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
    fn the_words_of_a_chunk_are_those_of_its_text() {
        for (heading, weight) in
            [(Some("impl HttpServer › fn Serve"), 3), (Some("Guide"), 1), (None, 2), (None, 0)]
        {
            let weighing = Weighing { heading: weight, ..Weighing::unrecorded() };
            let record = ChunkRecord {
                source: "src/HttpServer_v2/mod.rs".to_owned(),
                heading: heading.map(str::to_owned),
                text: "The VectorIndex of an HTTPServer, VectorIndex élanVital 漢字Text the".to_owned(),
                ..ChunkRecord::default()
            };
            let text = weighing.text(&record);
            let mut expected: Vec<&str> = words(&text).collect();
            expected.sort_unstable();
            let mut found = Vec::new();
            weighing.words(&record, |word| found.push(word.to_owned()));
            found.sort_unstable();
            assert_eq!(found, expected);
            let counted = expected.iter().filter(|word| !is_stop_word(word)).count();
            assert_eq!(weighing.terms(&record) as usize, counted);
        }
    }

    #[test]
    fn stop_words_do_not_count() {
        let weighing = Weighing { heading: 1, ..Weighing::unrecorded() };
        let terms =
            |text: &str| weighing.terms(&ChunkRecord { text: text.to_owned(), ..ChunkRecord::default() });
        assert_eq!(terms("The store is where the truth is: runs, results."), 4);
        assert_eq!(terms(""), 0);
    }
}
