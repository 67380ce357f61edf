//! What BM25 sees of a chunk and of a query.
//!
//! The engines split on everything that is not a letter or a digit, lower-case and stem English. They
//! leave `VectorIndex` in one piece; here its parts are added, on both sides, so that the name and
//! the words find each other.
//!
//! They also leave a whole sentence in one piece where a script puts no spaces between words. Runs of such
//! characters become overlapping pairs here, on both sides: `請求書` is weighed and sought as `請求 求書`, and a
//! character alone stays one. Lucene's [`CJKAnalyzer`] does the same for Han, kana and Hangul; Thai, Lao, Myanmar and
//! Khmer are served by the same rule. Nothing changes for texts without such characters.
//!
//! Accents are taken off Latin and Greek letters, on both sides, as Lucene's [`ASCIIFoldingFilter`] does: who asks for
//! `resume` finds `résumé`. Other scripts keep their marks: there they tell words apart.
//!
//! [`ASCIIFoldingFilter`]: https://lucene.apache.org/core/9_12_0/analysis/common/org/apache/lucene/analysis/miscellaneous/ASCIIFoldingFilter.html
//! [`CJKAnalyzer`]: https://lucene.apache.org/core/9_12_0/analysis/common/org/apache/lucene/analysis/cjk/package-summary.html

use std::{
    borrow::Cow,
    collections::{HashMap, HashSet},
    sync::LazyLock,
};

use atlas_shared::config::Bm25Config;
use serde::{Deserialize, Serialize};
use unicode_normalization::UnicodeNormalization as _;

use super::ChunkRecord;

/// How BM25 weighs the chunks of a collection. Decided when it is made and recorded in it, so that all
/// its chunks are weighed alike, whatever the settings are later.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Weighing {
    pub(crate) k1: f64,
    pub(crate) b: f64,
    /// How often the heading is in what is weighed.
    pub(crate) heading: u32,
    /// Runs of characters without spaces are weighed and sought as pairs. Not in collections from before that was
    /// done: their chunks and the words of a query would not find each other. A rebuild does it.
    #[serde(default)]
    pub(crate) pairs: bool,
    /// Accents are taken off. Recorded as `pairs` is, for the same reason.
    #[serde(default)]
    pub(crate) folds: bool,
}

impl Weighing {
    /// That of collections without a record of it: the engines' defaults.
    pub(crate) fn unrecorded() -> Self {
        Self { k1: 1.2, b: 0.75, heading: 1, pairs: false, folds: false }
    }

    /// What BM25 sees of a chunk: where it stands, its heading as often as it counts, its text.
    pub(crate) fn text(self, record: &ChunkRecord) -> String {
        let text = record.contextual_text();
        let (Some(heading), 2..) = (&record.heading, self.heading) else { return self.lexical_text(&text) };
        let mut weighed = String::with_capacity(text.len() + (heading.len() + 1) * self.heading as usize);
        for _ in 1..self.heading {
            weighed.push_str(heading);
            weighed.push('\n');
        }
        weighed.push_str(&text);
        self.lexical_text(&weighed)
    }

    /// What BM25 sees of a text or a query: its words, and at the end the parts of its compound identifiers.
    pub(crate) fn lexical_text(self, text: &str) -> String {
        let folded = self.folded(text);
        let text = &*folded;
        let mut out = if self.pairs && !text.is_ascii() && text.chars().any(is_unspaced) {
            text.split_inclusive(|character: char| !character.is_alphanumeric()).fold(
                String::with_capacity(3 * text.len()),
                |mut out, word| {
                    for (at, part) in Pairs(word).enumerate() {
                        if at > 0 {
                            out.push(' ');
                        }
                        out.push_str(part);
                    }
                    out
                },
            )
        } else {
            text.to_owned()
        };
        let mut seen = HashSet::new();
        for word in self.split(text) {
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

    /// What BM25 sees of a query: texts of which none has a term twice; none at all of a query without terms.
    ///
    /// The engines weigh every term of a query text with one, however often it stands there. BM25 weighs it by how
    /// often ([Robertson and Zaragoza], 2009, with k3 infinite, as Lucene does), which decides where whole paragraphs
    /// are asked with: what a paragraph repeats is what it is about. Scores of several texts add up to that.
    ///
    /// [Robertson and Zaragoza]: https://doi.org/10.1561/1500000019
    pub(crate) fn query(self, text: &str) -> Vec<String> {
        let mut texts: Vec<String> = Vec::new();
        let mut begun: HashMap<[Option<char>; 2], usize> = HashMap::new();
        let text = self.lexical_text(text);
        for word in words(&text).filter(|word| !is_stop_word(word)) {
            // Stemming takes from the end of a word and leaves how it begins.
            let mut characters = word.chars().flat_map(char::to_lowercase);
            let begin = [characters.next(), characters.next()];
            let at = begun.entry(begin).or_default();
            let place = (*at).min(MAX_QUERY_TEXTS - 1);
            *at += 1;
            match texts.get_mut(place) {
                Some(text) => {
                    text.push(' ');
                    text.push_str(word);
                }
                // Words that begin alike stand in one text after the other, so this is the next one.
                None => texts.push(word.to_owned()),
            }
        }
        texts
    }

    /// A text with letters as they are weighed and sought.
    fn folded(self, text: &str) -> Cow<'_, str> {
        if !self.folds || text.is_ascii() || !text.chars().any(may_fold) {
            return Cow::Borrowed(text);
        }
        // Marks that stand behind their letter, as in file names of macOS, go to it or go.
        let composed: String = text.nfc().filter(|character| !is_accent(*character)).collect();
        let mut out = String::with_capacity(composed.len());
        for part in composed.split_inclusive(|character: char| !character.is_alphanumeric()) {
            let word = part.trim_end_matches(|character: char| !character.is_alphanumeric());
            let start = out.len();
            word.chars().for_each(|character| fold(character, &mut out));
            // Tea is no article: `thé` stays what it is.
            if is_stop_word(&out[start..]) && !is_stop_word(word) {
                out.truncate(start);
                out.push_str(word);
            }
            out.push_str(&part[word.len()..]);
        }
        Cow::Owned(out)
    }

    /// The words of a folded text.
    fn split(self, text: &str) -> impl Iterator<Item = &str> {
        let mut words = words(text);
        let mut pairs = Pairs("");
        std::iter::from_fn(move || {
            pairs.next().or_else(|| {
                let word = words.next()?;
                if !self.pairs || word.is_ascii() {
                    return Some(word);
                }
                pairs = Pairs(word);
                pairs.next()
            })
        })
    }

    /// The words of [`Self::text`], in any order, without making it.
    pub(crate) fn words(self, record: &ChunkRecord, mut each: impl FnMut(&str)) {
        let heading = record.heading.as_deref().unwrap_or_default();
        let said = record.said();
        let [source, heading, text] = [&record.source, heading, &*said].map(|part| self.folded(part));
        let mut seen = HashSet::new();
        for _ in 1..self.heading {
            self.split(&heading).for_each(&mut each);
        }
        for part in [&*source, &*heading, &*text] {
            for word in self.split(part) {
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
        Self { k1, b, heading: heading_weight, pairs: true, folds: true }
    }
}

fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(|character: char| !character.is_alphanumeric()).filter(|word| !word.is_empty())
}

/// A mark for letters of any script, behind its letter.
fn is_accent(character: char) -> bool {
    matches!(character, '\u{300}'..='\u{36f}')
}

/// Texts with such characters may be other ones when they are folded: Latin and Greek letters beyond ASCII, and what
/// is composed with the one before it.
fn may_fold(character: char) -> bool {
    matches!(character,
        '\u{aa}'..='\u{24f}' | '\u{1e00}'..='\u{1fff}' | '\u{370}'..='\u{3ff}' // Latin, Greek
        | '\u{fb00}'..='\u{fb06}' | '\u{ff10}'..='\u{ff5a}' // ligatures, full width
        | '\u{300}'..='\u{36f}' | '\u{3099}' | '\u{309a}' | '\u{1100}'..='\u{11ff}' // accents, Jamo
    ) && (character.is_alphanumeric() || !matches!(character, '\u{aa}'..='\u{24f}'))
}

/// A letter or digit without its accents; as it is where it is none of Latin or Greek.
fn fold(character: char, out: &mut String) {
    if character.is_ascii() || !may_fold(character) {
        out.push(character);
        return;
    }
    // Letters with a stroke and the like are letters of their own to Unicode.
    let letters = match character {
        'ß' => "ss",
        'ẞ' => "SS",
        'æ' => "ae",
        'Æ' => "Ae",
        'œ' => "oe",
        'Œ' => "Oe",
        'ø' => "o",
        'Ø' => "O",
        'đ' | 'ð' => "d",
        'Đ' | 'Ð' => "D",
        'ł' => "l",
        'Ł' => "L",
        'ħ' => "h",
        'Ħ' => "H",
        'ŧ' => "t",
        'Ŧ' => "T",
        'þ' => "th",
        'Þ' => "Th",
        'ı' => "i",
        _ => {
            let start = out.len();
            out.extend(std::iter::once(character).nfkd().filter(|part| !is_accent(*part)));
            // `½` would be two words.
            if out.len() == start || !out[start..].chars().all(char::is_alphanumeric) {
                out.truncate(start);
                out.push(character);
            }
            return;
        }
    };
    out.push_str(letters);
}

/// What is left of a word, to be taken apart: runs of characters without spaces as overlapping pairs, what is between
/// them as it is.
struct Pairs<'a>(&'a str);

impl<'a> Iterator for Pairs<'a> {
    type Item = &'a str;

    fn next(&mut self) -> Option<&'a str> {
        let mut characters = self.0.char_indices();
        let (_, first) = characters.next()?;
        if !is_unspaced(first) {
            let (part, rest) = self.0.split_at(self.0.find(is_unspaced).unwrap_or(self.0.len()));
            self.0 = rest;
            return Some(part);
        }
        let second = characters.next();
        let third = characters.next();
        let (part, rest) = match (second, third) {
            // Its second character begins the next pair.
            (Some((at, second)), Some((end, third))) if is_unspaced(second) && is_unspaced(third) => {
                (&self.0[..end], &self.0[at..])
            }
            (Some((_, second)), third) if is_unspaced(second) => {
                self.0.split_at(third.map_or(self.0.len(), |(end, _)| end))
            }
            (second, _) => self.0.split_at(second.map_or(self.0.len(), |(at, _)| at)),
        };
        self.0 = rest;
        Some(part)
    }
}

/// A letter of a script that puts no spaces between words, or puts them between parts of sentences as Korean does:
/// those of Lucene's CJK bigrams, and Thai, Lao, Myanmar and Khmer. The blocks are Unicode's.
fn is_unspaced(character: char) -> bool {
    // Most characters are below all of them.
    character >= '\u{e00}'
        && matches!(character,
            '\u{e00}'..='\u{eff}' // Thai, Lao
            | '\u{1000}'..='\u{109f}' // Myanmar
            | '\u{1100}'..='\u{11ff}' // Hangul Jamo
            | '\u{1780}'..='\u{17ff}' // Khmer
            | '\u{3005}'..='\u{3007}' | '\u{3021}'..='\u{3029}' | '\u{3038}'..='\u{303b}' // Han: 々, 〇, numerals
            | '\u{3041}'..='\u{30ff}' // Hiragana, Katakana
            | '\u{3130}'..='\u{318f}' // Hangul Compatibility Jamo
            | '\u{31f0}'..='\u{31ff}' // Katakana
            | '\u{3400}'..='\u{4dbf}' | '\u{4e00}'..='\u{9fff}' // Han
            | '\u{a960}'..='\u{a97f}' | '\u{ac00}'..='\u{d7ff}' // Hangul
            | '\u{f900}'..='\u{faff}' // Han
            | '\u{ff66}'..='\u{ff9f}' | '\u{ffa0}'..='\u{ffdc}' // half-width Katakana and Hangul
            | '\u{1aff0}'..='\u{1b16f}' // Kana
            | '\u{20000}'..='\u{3ffff}' // Han
        )
        && character.is_alphanumeric()
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

/// Most texts of a query. A word that is repeated more often than that counts this often.
const MAX_QUERY_TEXTS: usize = 64;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use proptest::prelude::*;

    use super::*;

    fn today() -> Weighing {
        Weighing { pairs: true, folds: true, ..Weighing::unrecorded() }
    }

    fn split(text: &str) -> Vec<&str> {
        today().split(text).collect()
    }

    #[test]
    fn scripts_without_spaces_are_weighed_in_pairs() {
        assert_eq!(split("請求書の番号は連番です。")[..4], ["請求", "求書", "書の", "の番"]);
        assert_eq!(split("請求書"), ["請求", "求書"]);
        assert_eq!(split("番号"), ["番号"]);
        assert_eq!(split("第3章 x"), ["第", "3", "章", "x"], "a character alone stays one");
        assert_eq!(split("サーバー"), ["サー", "ーバ", "バー"]);
        assert_eq!(split("세금계산서"), ["세금", "금계", "계산", "산서"]);
        assert_eq!(split("𠮷野家"), ["𠮷野", "野家"], "characters of four bytes");
        assert_eq!(split("APIキーをv2に"), ["API", "キー", "ーを", "v2", "に"]);
        assert_eq!(today().lexical_text("API請求書v2、x"), "API 請求 求書 v2、x");
        assert_eq!(today().lexical_text("請求書"), "請求 求書");
    }

    #[test]
    fn accents_are_taken_off_latin_and_greek_letters() {
        for (text, folded) in [
            ("résumé Übergröße", "resume Ubergrosse"),
            ("re\u{301}sume\u{301}", "resume"),
            ("Łódź, Ærø; naïve façade", "Lodz, Aero; naive facade"),
            ("İstanbul ılık", "Istanbul ilik"),
            ("Αθήνα ΐ", "Αθηνα ι"),
            ("ﬁle ＡＰＩ ｖ２", "file API v2"),
            ("m² ½ 1ª", "m2 ½ 1a"),
            ("Qdrant™ § 5 → «x»", "Qdrant™ § 5 → «x»"),
            ("йод ёлка за́мок", "йод ёлка замок"),
            ("и\u{306}од", "йод"),
            ("가격", "가격"),
            ("\u{1100}\u{1161}격", "가격"),
            ("é が ガ ｶ\u{ff9e} กำหนดชำระ हिन्दी", "e が ガ ｶ\u{ff9e} กำหนดชำระ हिन्दी"),
        ] {
            assert_eq!(today().folded(text), folded, "{text}");
        }
        assert_eq!(today().query("thé à la menthe"), ["thé à la menthe"], "no word becomes a stop word");
        assert_eq!(Weighing::unrecorded().lexical_text("résumé"), "résumé", "as it was made");
    }

    proptest! {
        #[test]
        fn what_is_folded_stays_so(text in "([à-ʯ]|[Ͱ-῿]|\\PC|[\u{300}-\u{303}]|[a-z ]){0,40}") {
            let folded = today().folded(&text);
            prop_assert_eq!(&today().folded(&folded), &folded);
        }
    }

    #[test]
    fn a_word_within_a_sentence_is_among_its_words() {
        for (sentence, word) in [
            ("請求書の番号は連番です。", "番号"),
            ("发票编号必须连续", "编号"),
            ("송장번호는연속이어야한다", "번호"),
            ("ใบกำกับภาษีต้องมีเลขที่", "ภาษี"),
        ] {
            let all = split(sentence);
            assert!(split(word).iter().all(|part| all.contains(part)), "{word} in {all:?}");
        }
    }

    #[test]
    fn collections_from_before_pairs_go_on_as_they_were_made() {
        let old: Weighing = serde_json::from_str(r#"{"k1": 1.2, "b": 0.75, "heading": 1}"#).unwrap();
        assert_eq!(old, Weighing::unrecorded());
        assert_eq!(old.lexical_text("請求書 HTTPServer"), "請求書 HTTPServer HTTP Server");
        assert_eq!(old.split("請求書 x").collect::<Vec<_>>(), ["請求書", "x"]);
    }

    proptest! {
        #[test]
        fn other_texts_are_weighed_as_ever(text in "(\\PC|[a-zA-Z ]){0,60}") {
            let other: String =
                text.chars().filter(|character| !is_unspaced(*character) && !may_fold(*character)).collect();
            prop_assert_eq!(today().lexical_text(&other), Weighing::unrecorded().lexical_text(&other));
            prop_assert!(today().split(&other).eq(words(&other)));
        }

        #[test]
        fn the_engines_split_a_lexical_text_into_its_words(text in "([一-三の]|\\PC|[a-z ]){0,60}") {
            let lexical = today().lexical_text(&text);
            let folded = today().folded(&text);
            let expected: Vec<&str> = today().split(&folded).collect();
            let found: Vec<&str> = words(&lexical).take(expected.len()).collect();
            prop_assert_eq!(found, expected);
            prop_assert!(words(&lexical).eq(today().split(&lexical)), "what is taken apart stays so");
        }
    }

    #[test]
    fn compound_identifiers_are_taken_apart_once() {
        assert_eq!(today().lexical_text("VectorIndex, VectorIndex"), "VectorIndex, VectorIndex Vector Index");
        assert_eq!(today().lexical_text("HTTPServer"), "HTTPServer HTTP Server");
        assert_eq!(today().lexical_text("max_in_flight and Plain words"), "max_in_flight and Plain words");
        assert_eq!(today().lexical_text("élanVital ÀB"), "elanVital AB elan Vital");
    }

    #[test]
    fn a_repeated_word_of_a_query_is_in_several_texts() {
        assert_eq!(today().query("the retry of the queue"), ["retry queue"]);
        assert_eq!(
            today().query("Retry, retried: retries of queues?"),
            ["Retry queues", "retried", "retries"]
        );
        assert_eq!(today().query("番号と番号"), ["番号 号と と番", "番号"]);
        assert_eq!(today().query("HTTPServer"), ["HTTPServer Server", "HTTP"]);
        assert_eq!(today().query("the of and"), Vec::<String>::new());
        assert_eq!(today().query(" … "), Vec::<String>::new());
        assert_eq!(today().query(&"word ".repeat(1000)).len(), MAX_QUERY_TEXTS);
    }

    proptest! {
        #[test]
        fn the_texts_of_a_query_have_its_words_and_none_twice(
            text in "([一-三の]|\\PC|[a-cA-C]{1,3}|[a-z]|the| ){0,60}",
        ) {
            let lexical = today().lexical_text(&text);
            let mut expected: Vec<&str> = words(&lexical).filter(|word| !is_stop_word(word)).collect();
            let texts = today().query(&text);
            let mut found: Vec<&str> = texts.iter().flat_map(|text| words(text)).collect();
            expected.sort_unstable();
            found.sort_unstable();
            prop_assert_eq!(found, expected);
            for text in &texts {
                let lower: Vec<String> = words(text).map(str::to_lowercase).collect();
                let different: HashSet<&String> = lower.iter().collect();
                prop_assert_eq!(different.len(), lower.len(), "{}", text);
            }
        }
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
        assert_eq!(
            Weighing::unrecorded().text(&record),
            Weighing::unrecorded().lexical_text(&record.contextual_text())
        );
        let plain = ChunkRecord { heading: None, ..record };
        assert_eq!(weighing.text(&plain), "a.md\nEvery day.");
    }

    #[test]
    fn the_words_of_a_chunk_are_those_of_its_text() {
        for (heading, weight, pairs, folds) in [
            (Some("impl HttpServer › fn Serve"), 3, true, true),
            (Some("Grüße › 請求書 › Guide"), 2, true, true),
            (Some("請求書 › Guide"), 2, false, false),
            (Some("Gu\u{301}ide"), 1, false, true),
            (None, 2, true, false),
            (None, 0, true, true),
        ] {
            let weighing = Weighing { heading: weight, pairs, folds, ..Weighing::unrecorded() };
            let record = ChunkRecord {
                source: "src/HttpServer_v2/mod.rs".to_owned(),
                heading: heading.map(str::to_owned),
                text: "The VectorIndex of an HTTPServer, VectorIndex élanVital 漢字Text 請求書の番号は3連番です。HTTPServer版 the".to_owned(),
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
