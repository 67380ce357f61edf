//! How many tokens a text has, for reservations.
//!
//! For model families whose tokenizer is known the count is exact; for others the number of bytes is
//! an upper bound, because no byte-level tokenizer makes more tokens than there are bytes.
//!
//! The encoders are built on first use (about 100 ms each) and live as long as the process.

use std::collections::HashSet;

use tiktoken_rs::{CoreBPE, tokenizer::Tokenizer};

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
    encoder(model).and_then(|encoder| count_with(encoder, text)).unwrap_or_else(|| bytes(text))
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
#[derive(Clone, Copy)]
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

fn encoder(model: &str) -> Option<&'static CoreBPE> {
    family(model).map(|family| match family {
        Family::Harmony => tiktoken_rs::o200k_harmony_singleton(),
        Family::O200k => tiktoken_rs::o200k_base_singleton(),
        Family::Cl100k => tiktoken_rs::cl100k_base_singleton(),
    })
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
