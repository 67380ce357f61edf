//! A corpus of any size, always the same: words as frequent as words are (Zipf), in documents about
//! something, so that searching them costs what searching text costs.

use std::fmt::Write as _;

/// Different words. A repository of 100,000 passages has about so many.
const VOCABULARY: u64 = 50_000;
/// Words of a document: one chunk each.
const WORDS: usize = 120;
/// Documents that share their rarer words.
const TOPIC: u64 = 20;

/// SplitMix64 (Steele, Lea and Flood, 2014): small, seeded, good enough.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    /// From 0 to 1.
    fn share(&mut self) -> f64 {
        self.next() as f64 / u64::MAX as f64
    }

    /// The rank of a word: rank r is drawn about 1/r as often as the first.
    fn word(&mut self) -> u64 {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "from 0 to the vocabulary"
        )]
        let rank = (VOCABULARY as f64).powf(self.share()) as u64;
        rank.min(VOCABULARY - 1)
    }
}

/// A word by its rank: letters only, so that it is one term.
fn spell(rank: u64) -> String {
    const CONSONANTS: &[u8] = b"bcdfghklmnprtvz";
    const VOWELS: &[u8] = b"aeiou";
    let mut rest = rank + 1;
    let mut word = String::new();
    while rest > 0 {
        let at = |set: &[u8], number: u64| char::from(set[usize::try_from(number).unwrap_or(0) % set.len()]);
        word.push(at(CONSONANTS, rest));
        word.push(at(VOWELS, rest / 15));
        rest /= 75;
    }
    word.push('x');
    word
}

/// Path and text of a document.
pub(crate) fn document(number: u64) -> (String, String) {
    let mut random = Random::new(number);
    let mut about = Random::new(number / TOPIC + 1_000_000_007);
    let topic: Vec<u64> = (0..12).map(|_| 200 + about.next() % (VOCABULARY - 200)).collect();
    let mut text = String::new();
    for at in 0..WORDS {
        let rank = if at % 6 == 5 { topic[at / 6 % topic.len()] } else { random.word() };
        let end = if at % 12 == 11 { ".\n" } else { " " };
        let _ = write!(text, "{}{end}", spell(rank));
    }
    (format!("topic{}/file{number}.txt", number / TOPIC), text)
}

/// A question of a few words that documents have: about one topic of a corpus of `documents`, never
/// twice the same for different numbers.
pub(crate) fn query(number: u64, documents: u64) -> String {
    let mut random = Random::new(number ^ 0x5EED_0000_0000);
    let mut about = Random::new(random.next() % documents / TOPIC + 1_000_000_007);
    let mut words: Vec<String> = (0..12).map(|_| spell(200 + about.next() % (VOCABULARY - 200))).collect();
    words.truncate(3);
    words.extend((0..2).map(|_| spell(random.word())));
    words.push(spell(VOCABULARY + number));
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_and_queries_are_always_the_same_and_share_words() {
        assert_eq!(document(7), document(7));
        assert_ne!(document(7).1, document(8).1);
        assert_ne!(query(1, 100), query(2, 100));
        let texts: Vec<String> = (0..100).map(|number| document(number).1).collect();
        for number in 0..20 {
            let query = query(number, 100);
            let first = query.split(' ').next().unwrap_or_default();
            assert!(texts.iter().any(|text| text.split_whitespace().any(|word| word == first)), "{query}");
        }
    }
}
