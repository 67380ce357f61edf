//! Token counts that are never too low and never slow.

use tiktoken_rs::cl100k_base_singleton;

/// Byte-pair encoding takes quadratic time on a run without a word boundary, such as base64 or a
/// megabyte of spaces. Such a run counts as its bytes: a token is at least one byte.
const LONGEST_RUN: usize = 256;

/// An upper bound of the tokens of a text in cl100k_base: exact for ordinary text.
pub(super) fn upper_bound(text: &str) -> usize {
    let mut tokens = 0;
    let mut rest = text;
    while let Some((before, run, after)) = next_long_run(rest) {
        tokens += exact(before) + run.len();
        rest = after;
    }
    tokens + exact(rest)
}

fn exact(text: &str) -> usize {
    match text.len() {
        0 => 0,
        // One byte is one token: blank lines and closing braces need no tokenizer.
        1 => 1,
        _ => cl100k_base_singleton().encode_ordinary(text).len(),
    }
}

/// Splits at the first run of only white space, or of none, that is too long to encode.
pub(super) fn next_long_run(text: &str) -> Option<(&str, &str, &str)> {
    if text.len() <= LONGEST_RUN {
        return None;
    }
    let mut start = 0;
    let mut white = None;
    for (at, character) in text.char_indices() {
        let is_white = character.is_whitespace();
        if white != Some(is_white) {
            if at - start > LONGEST_RUN {
                return Some((&text[..start], &text[start..at], &text[at..]));
            }
            (start, white) = (at, Some(is_white));
        }
    }
    (text.len() - start > LONGEST_RUN).then(|| (&text[..start], &text[start..], ""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ordinary_text_is_counted_exactly() {
        let text = "The gateway answers `POST /v1/query_chat` within 15 ms.\n";
        assert_eq!(upper_bound(text), cl100k_base_singleton().encode_ordinary(text).len());
    }

    #[test]
    fn a_megabyte_without_a_word_boundary_is_counted_at_once() {
        // Would take hours if it reached the encoder.
        assert_eq!(upper_bound(&"a".repeat(1 << 20)), 1 << 20);
        assert_eq!(upper_bound(&" ".repeat(1 << 20)), 1 << 20);
        let mixed = format!("short words, then {} and more", "ab".repeat(1 << 18));
        assert!(upper_bound(&mixed) > 1 << 19);
    }
}
