//! How many tokens a text has, for reservations.
//!
//! For model families whose tokenizer is known the count is exact; for others the number of bytes is
//! an upper bound, because no byte-level tokenizer makes more tokens than there are bytes.
//!
//! The encoders are built on first use (about 100 ms each) and live as long as the process.
//!
//! A prompt is counted several times while it is fitted into a budget, and most of it (instructions,
//! schema, passages) is in other prompts too. So a text is counted in segments, and the counts of
//! segments are remembered. Segments end where every encoding ends a token, so that the sum is exact.
//! A long text is remembered whole as well: the prompt that fits is counted again when it is reserved for.

use std::{
    collections::HashSet,
    hash::{BuildHasher as _, RandomState},
    sync::LazyLock,
};

use moka::sync::Cache;
use tiktoken_rs::{CoreBPE, tokenizer::Tokenizer};

/// Segments whose counts are remembered, about 100 bytes each.
const REMEMBERED_SEGMENTS: u64 = 32_768;
/// Shorter segments are counted sooner than they are looked up.
const WORTH_REMEMBERING: usize = 12;
/// Texts from this length are remembered whole, besides their segments.
const WORTH_REMEMBERING_WHOLE: usize = 2_048;
/// Whole texts whose counts are remembered: of the prompts that are being fitted now.
const REMEMBERED_TEXTS: u64 = 8_192;

/// The number of tokens of a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Count {
    /// How many.
    pub tokens: u64,
    /// False: an upper bound, because the model's tokenizer is not known.
    pub exact: bool,
}

/// Counts `text` as `model` would.
pub fn count(model: &str, text: &str) -> Count {
    family(model).and_then(|family| count_segments(family, text)).unwrap_or_else(|| bytes(text))
}

/// Counts in tokens of `cl100k_base`: the unit of chunk sizes, whatever the model.
pub fn count_cl100k(text: &str) -> Count {
    count_with(tiktoken_rs::cl100k_base_singleton(), text).unwrap_or_else(|| bytes(text))
}

/// True when the model's tokenizer is known, so that counts are exact.
pub fn is_known(model: &str) -> bool {
    family(model).is_some()
}

/// Builds the model's encoder now, so that the first request does not wait for it. Blocks: call it
/// from a blocking thread.
pub fn warm_up(model: &str) {
    let _ = count(model, "");
}

/// The encodings of the models that are still served.
#[derive(Clone, Copy, Debug, Hash)]
enum Family {
    Harmony,
    O200k,
    Cl100k,
}

fn family(model: &str) -> Option<Family> {
    // Routers put the vendor in front (`openai/gpt-4.1`); what follows is the model's name.
    let name = model.rsplit('/').next().unwrap_or(model);
    match tiktoken_rs::tokenizer::get_tokenizer(name)? {
        Tokenizer::O200kHarmony => Some(Family::Harmony),
        Tokenizer::O200kBase => Some(Family::O200k),
        Tokenizer::Cl100kBase => Some(Family::Cl100k),
        // No chat model uses the older ones; bytes are bound enough.
        Tokenizer::P50kBase | Tokenizer::R50kBase | Tokenizer::P50kEdit | Tokenizer::Gpt2 => None,
    }
}

impl Family {
    fn encoder(self) -> &'static CoreBPE {
        match self {
            Self::Harmony => tiktoken_rs::o200k_harmony_singleton(),
            Self::O200k => tiktoken_rs::o200k_base_singleton(),
            Self::Cl100k => tiktoken_rs::cl100k_base_singleton(),
        }
    }
}

/// Counts, remembering long texts.
fn count_segments(family: Family, text: &str) -> Option<Count> {
    static TEXTS: LazyLock<Counts> = LazyLock::new(|| Counts::new(REMEMBERED_TEXTS));
    if text.len() < WORTH_REMEMBERING_WHOLE {
        return count_each_segment(family, text);
    }
    let tokens = TEXTS.get_or(family, text, || Some(count_each_segment(family, text)?.tokens))?;
    Some(Count { tokens, exact: true })
}

/// Counts segment by segment, remembering each.
fn count_each_segment(family: Family, text: &str) -> Option<Count> {
    static SEGMENTS: LazyLock<Counts> = LazyLock::new(|| Counts::new(REMEMBERED_SEGMENTS));
    let mut tokens = 0;
    for segment in segments(text) {
        let count = || Some(count_with(family.encoder(), segment)?.tokens);
        tokens += if segment.len() < WORTH_REMEMBERING {
            count()?
        } else {
            SEGMENTS.get_or(family, segment, count)?
        };
    }
    Some(Count { tokens, exact: true })
}

/// Counts that are remembered, by the text's hash and length.
struct Counts {
    counts: Cache<(u64, usize), u64>,
    /// Keyed anew in each process: nobody can write two texts that are taken for each other.
    hasher: RandomState,
}

impl Counts {
    fn new(texts: u64) -> Self {
        Self { counts: Cache::builder().max_capacity(texts).build(), hasher: RandomState::new() }
    }

    fn get_or(&self, family: Family, text: &str, count: impl FnOnce() -> Option<u64>) -> Option<u64> {
        let key = (self.hasher.hash_one((family, text)), text.len());
        if let Some(known) = self.counts.get(&key) {
            return Some(known);
        }
        let counted = count()?;
        self.counts.insert(key, counted);
        Some(counted)
    }
}

/// Where the next segment begins.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    /// Outside of any fence, or at one.
    Outside,
    /// Behind the code that opens a fence: the line that names what is in it.
    Name,
    /// What is in it.
    Inside,
}

/// The text in pieces that are likely to come again: paragraphs, the codes of fences, which are the same
/// in all of one prompt, and what is in a fence, which is the same in many prompts.
fn segments(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    let mut place = Place::Outside;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let mut end = 0;
        let mut lines = rest.split_inclusive('\n').peekable();
        let here = std::mem::replace(&mut place, Place::Outside);
        while let Some(line) = lines.next() {
            if end == 0
                && let Some(code) = code_of_a_fence(line)
            {
                end = code;
                place = Place::Name;
                break;
            }
            end += line.len();
            let Some(next) = lines.peek() else { break };
            let ends = line.trim_ascii().is_empty() && here != Place::Inside;
            if (ends || is_fence(line) || is_fence(next)) && starts_a_token(next) {
                if here == Place::Name && !is_fence(next) {
                    place = Place::Inside;
                }
                break;
            }
        }
        let (segment, after) = rest.split_at(end);
        rest = after;
        Some(segment)
    })
}

fn is_fence(line: &str) -> bool {
    line.starts_with("<<<") || line.trim_ascii_end().ends_with(">>>")
}

/// Where the code of a line `<<<CODE what it is` ends: before the blank. Every encoding ends a token
/// between a letter or digit and a blank.
fn code_of_a_fence(line: &str) -> Option<usize> {
    let code = line.strip_prefix("<<<")?;
    let end = code.find(' ')?;
    code[..end].ends_with(|last: char| last.is_ascii_alphanumeric()).then_some("<<<".len() + end)
}

/// Does every encoding begin a new token here, after a line's end? The patterns by which they split
/// a text let a token go on after `\n` only with white space or, in `o200k`, with `/`.
fn starts_a_token(line: &str) -> bool {
    line.chars().next().is_some_and(|first| !first.is_whitespace() && first != '/')
}

/// `None` where the encoder's regex gives up (it backtracks, with a limit): then bytes must do.
fn count_with(encoder: &CoreBPE, text: &str) -> Option<Count> {
    // Not `encode_ordinary`: it panics where this returns an error. Special tokens in a text are data,
    // as the API treats them, so none is allowed.
    let (tokens, _) = encoder.encode(text, &HashSet::new()).ok()?;
    Some(Count { tokens: tokens.len() as u64, exact: true })
}

fn bytes(text: &str) -> Count {
    Count { tokens: text.len() as u64, exact: false }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn known_models_are_counted_exactly() {
        // Counts as published by OpenAI's tokenizer.
        assert_eq!(count("gpt-4", "hello world"), Count { tokens: 2, exact: true });
        assert_eq!(count("text-embedding-3-small", "tiktoken is great!"), Count { tokens: 6, exact: true });
        for model in
            ["gpt-4.1", "gpt-4o-mini", "gpt-5-nano", "o3", "o4-mini", "openai/gpt-4.1-mini", "gpt-oss-20b"]
        {
            assert_eq!(count(model, "hello world"), Count { tokens: 2, exact: true }, "{model}");
        }
    }

    #[test]
    fn unknown_models_are_bounded_by_bytes() {
        for model in ["llama-3.3-70b", "SmolLM2", "gpt-6", "text-davinci-003", ""] {
            assert_eq!(count(model, "hällo"), Count { tokens: 6, exact: false }, "{model}");
            assert!(!is_known(model));
        }
    }

    proptest! {
        /// Segments are worth nothing if their sum is off by one token.
        #[test]
        fn counting_in_segments_is_exact(
            lines in prop::collection::vec(
                prop_oneof![
                    Just(String::new()),
                    Just("  ".to_owned()),
                    Just("<<<data-0123456789 [3] docs/a.md:1-20".to_owned()),
                    Just("data-0123456789>>>".to_owned()),
                    "[ \\t/.,;!a-zA-Z0-9'é漢😀\u{a0}\u{2028}-]{0,80}",
                    "\\PC{0,60}",
                ],
                0..30,
            ),
            end in prop_oneof![Just("\n"), Just("\r\n"), Just("\n\n"), Just("\n \n")],
        ) {
            let text = lines.join(end);
            prop_assert_eq!(segments(&text).collect::<String>(), text.clone());
            for family in [Family::Harmony, Family::O200k, Family::Cl100k] {
                let whole = count_with(family.encoder(), &text);
                prop_assert!(whole.is_some());
                // Twice: counted, then remembered.
                prop_assert_eq!(count_segments(family, &text), whole, "{:?}", family);
                prop_assert_eq!(count_segments(family, &text), whole, "{:?}", family);
            }
        }
    }

    #[test]
    fn paragraphs_and_fences_are_segments() {
        let text = "<<<x [1] a.md:1-2\n\nOne.\nStill one.\n\n  indented\n\nTwo.\nx>>>\nOne.\n\nTwo.\n<<<x [2]\n\n\
                    Three.\n\nFour.";
        let expected = [
            "<<<x",
            " [1] a.md:1-2\n\n",
            "One.\nStill one.\n\n  indented\n\nTwo.\n",
            "x>>>\n",
            "One.\n\n",
            "Two.\n",
            "<<<x",
            " [2]\n\n",
            "Three.\n\nFour.",
        ];
        assert_eq!(segments(text).collect::<Vec<_>>(), expected);
    }

    #[test]
    fn special_tokens_in_a_text_are_data() {
        assert!(count("gpt-4.1", "<|endoftext|>").tokens > 1);
    }

    #[test]
    fn hostile_texts_are_counted_without_panic() {
        let long = 200_000;
        for text in [
            " ".repeat(long),
            " ".repeat(long) + "x",
            "\n".repeat(long),
            "\u{a0}".repeat(long),
            "a".repeat(long),
            "<|endoftext|>".repeat(2_000),
            "é".repeat(long),
        ] {
            for model in ["gpt-4.1", "gpt-4"] {
                let counted = count(model, &text);
                assert!(counted.tokens > 0 && counted.tokens <= text.len() as u64);
            }
        }
    }

    proptest! {
        #[test]
        fn bytes_bound_every_count(text in "\\PC{0,200}") {
            for model in ["gpt-4.1", "gpt-4"] {
                prop_assert!(count(model, &text).tokens <= text.len() as u64);
            }
        }
    }
}
