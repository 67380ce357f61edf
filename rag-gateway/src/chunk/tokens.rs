//! Token counts that are never too low and never slow.

use std::cell::RefCell;

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
        _ if text.is_ascii() => COUNTED
            .with_borrow_mut(|counted| ascii_words(text.as_bytes()).map(|word| counted.tokens(word)).sum()),
        _ => encoded(text),
    }
}

/// What the encoder itself says.
fn encoded(text: &str) -> usize {
    cl100k_base_singleton().encode_ordinary(text).len()
}

/// The pieces that cl100k_base encodes one by one, of a text that is ASCII. The same as its pattern gives, which is
///
/// ```text
/// '(?i:[sdmt]|ll|ve|re) | [^\r\n\p{L}\p{N}]?+\p{L}++ | \p{N}{1,3}+ | ?[^\s\p{L}\p{N}]++[\r\n]*+
///   | \s++$ | \s*[\r\n] | \s+(?!\S) | \s
/// ```
///
/// but many times faster: that pattern looks ahead, so a regular expression engine has to try and go back.
fn ascii_words(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut rest = text;
    std::iter::from_fn(move || {
        let end = ascii_word_end(rest)?;
        let (word, after) = rest.split_at(end);
        rest = after;
        Some(word)
    })
}

/// Where the first piece ends; `None` when there is no text.
fn ascii_word_end(text: &[u8]) -> Option<usize> {
    let (&first, after) = text.split_first()?;
    let letters = |from: usize| run(text, from, u8::is_ascii_alphabetic);
    let marks = |from: usize| {
        let end = run(text, from, |byte| !is_space(*byte) && !byte.is_ascii_alphanumeric());
        if end > from { run(text, end, |byte| matches!(byte, b'\r' | b'\n')) } else { end }
    };
    if first == b'\''
        && let Some(end) = contraction(after)
    {
        return Some(1 + end);
    }
    if first.is_ascii_alphabetic() {
        return Some(letters(1));
    }
    if first.is_ascii_digit() {
        return Some(run(text, 1, u8::is_ascii_digit).min(3));
    }
    let is_end = matches!(first, b'\r' | b'\n');
    if !is_end && after.first().is_some_and(u8::is_ascii_alphabetic) {
        return Some(letters(2));
    }
    if !is_space(first) {
        return Some(marks(0));
    }
    if first == b' ' {
        let end = marks(1);
        if end > 1 {
            return Some(end);
        }
    }
    let end = run(text, 1, |byte| is_space(*byte));
    if end == text.len() {
        return Some(end);
    }
    // Up to the last line's end; else all but the last one, which belongs to what follows.
    let line_end = text[..end].iter().rposition(|byte| matches!(byte, b'\r' | b'\n'));
    Some(line_end.map_or((end - 1).max(1), |at| at + 1))
}

/// Where bytes of a kind end that begin at `from`.
fn run(text: &[u8], from: usize, is: impl Fn(&u8) -> bool) -> usize {
    text[from..].iter().position(|byte| !is(byte)).map_or(text.len(), |length| from + length)
}

/// What `\s` means in ASCII.
fn is_space(byte: u8) -> bool {
    matches!(byte, b'\t'..=b'\r' | b' ')
}

/// The length of `s`, `ll` and so on after an apostrophe.
fn contraction(after: &[u8]) -> Option<usize> {
    let lower = |at: usize| after.get(at).map(u8::to_ascii_lowercase);
    match (lower(0)?, lower(1)) {
        (b's' | b'd' | b'm' | b't', _) => Some(1),
        (b'l', Some(b'l')) | (b'v' | b'r', Some(b'e')) => Some(2),
        _ => None,
    }
}

/// Entries of the table of words that were counted: a power of two.
const COUNTED_WORDS: usize = 1 << 14;

/// Longest word that is remembered, in bytes.
const LONGEST_WORD: usize = 15;

/// How many tokens a word has, for words that were seen lately: a few thousand words are most of any text, and
/// encoding one costs a hundred times more than finding it here. Of fixed size; words that fall on the same place
/// push each other out.
struct Counted(Vec<([u64; 2], u8)>);

thread_local! {
    static COUNTED: RefCell<Counted> = const { RefCell::new(Counted(Vec::new())) };
}

impl Counted {
    fn tokens(&mut self, word: &[u8]) -> usize {
        if word.len() <= 1 {
            return word.len();
        }
        if word.len() > LONGEST_WORD {
            return encoded_bytes(word);
        }
        if self.0.is_empty() {
            self.0.resize(COUNTED_WORDS, ([0; 2], 0));
        }
        let key = key(word);
        let Some(slot) = self.0.get_mut(place(key)) else { return encoded_bytes(word) };
        if slot.0 != key {
            // At most one token a byte: it fits.
            *slot = (key, u8::try_from(encoded_bytes(word)).unwrap_or(u8::MAX));
        }
        usize::from(slot.1)
    }
}

/// The word with its length: two words never share a key, and no key is 0.
fn key(word: &[u8]) -> [u64; 2] {
    let mut halves = [[0; 8]; 2];
    for (at, byte) in word.iter().enumerate() {
        halves[at / 8][at % 8] = *byte;
    }
    halves[1][LONGEST_WORD % 8] = u8::try_from(word.len()).unwrap_or(u8::MAX);
    halves.map(u64::from_le_bytes)
}

/// A place in the table: multiplying by an odd number mixes all bits into the high ones.
fn place([low, high]: [u64; 2]) -> usize {
    const MIX: u64 = 0x9e37_79b9_7f4a_7c15;
    let mixed = (low.wrapping_mul(MIX) ^ high).wrapping_mul(MIX);
    usize::try_from(mixed >> (u64::BITS - COUNTED_WORDS.trailing_zeros())).unwrap_or_default()
}

fn encoded_bytes(word: &[u8]) -> usize {
    // ASCII by construction.
    std::str::from_utf8(word).map_or(word.len(), encoded)
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
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn ascii_is_counted_as_the_encoder_counts_it(
            text in prop::collection::vec(
                prop_oneof![
                    "[ -~]{0,20}",
                    "[ \\t\\r\\n\x0b\x0c]{1,6}",
                    "['a-zA-Z ]{1,6}",
                    "[0-9]{1,8}",
                    "[!-/:-@]{1,5}[\\r\\n]{0,3}",
                    "'(s|S|ll|LL|ve|re|lx|t|d|m)",
                    "[\x00-\x7f]{0,12}",
                ],
                0..24,
            )
        ) {
            let text = text.concat();
            let words: Vec<&[u8]> = ascii_words(text.as_bytes()).collect();
            prop_assert_eq!(words.concat(), text.as_bytes());
            // Twice: the second time from the table.
            for _ in 0..2 {
                prop_assert_eq!(exact(&text), encoded(&text), "{:?}", words);
            }
        }
    }

    #[test]
    fn code_is_counted_exactly() {
        for text in [include_str!("tokens.rs"), include_str!("../../../README.md"), include_str!("tests.rs")]
        {
            for line in text.split_inclusive('\n') {
                assert_eq!(exact(line), encoded(line), "{line:?}");
            }
        }
    }

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
