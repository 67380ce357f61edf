//! What BM25 sees of a chunk and of a query.
//!
//! The engines split on everything that is not a letter or a digit, lower-case and stem English. They
//! leave `VectorIndex` in one piece; here its parts are added, on both sides, so that the name and
//! the words find each other.

use std::collections::HashSet;

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

/// About how many terms BM25 counts in a text: words that are not stop words.
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

fn is_stop_word(word: &str) -> bool {
    const STOP_WORDS: &[&str] = &[
        "a", "about", "after", "all", "also", "an", "and", "any", "are", "as", "at", "be", "because", "been",
        "before", "being", "but", "by", "can", "do", "does", "for", "from", "had", "has", "have", "he",
        "her", "his", "how", "i", "if", "in", "into", "is", "it", "its", "more", "no", "not", "of", "on",
        "only", "or", "other", "our", "out", "own", "same", "she", "so", "some", "such", "than", "that",
        "the", "their", "them", "then", "there", "these", "they", "this", "those", "through", "to", "too",
        "up", "was", "we", "were", "what", "when", "where", "which", "while", "who", "why", "will", "with",
        "you", "your",
    ];
    word.len() <= 7
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
    fn stop_words_do_not_count() {
        assert_eq!(term_count("The store is where the truth is: runs, results."), 4);
        assert_eq!(term_count(""), 0);
    }
}
