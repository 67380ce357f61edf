//! Where a statement comes from, as far as words can tell: the request, a passage, or neither.
//!
//! Comparing words alone takes "must be available" and "must not be available" for one statement. So each
//! word also knows whether its clause denies it, and what is denied on one side only is no support.

use std::{borrow::Cow, sync::LazyLock};

use regex::{Captures, Regex};

use super::{clean, words};

/// Of this many words of a statement one may be missing in the request for it to come from there. Of fewer, none:
/// in a short statement the one word that is new is what it says.
const WORDS_FOR_A_NEW_ONE: usize = 6;
/// What share of a statement's words a sentence must hold to speak of the same thing.
const SAME_STATEMENT: f64 = 0.8;
/// A shorter statement is no statement.
const MIN_WORDS: usize = 2;

/// What may stand after a sentence's end and belongs to it: emphasis, code, quotes.
const AROUND: &[char] = &['*', '_', '`', '"', '\'', '”', '’'];

/// A word, and how it was used.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Word {
    /// As [`words::hashes`] gives it: passages of many documents are held like this.
    hash: u64,
    said: bool,
    denied: bool,
}

/// The words of a text, and how each of them was used.
#[derive(Clone, Debug, Default)]
pub(super) struct Meaning {
    /// Each once, in the order of their hashes.
    words: Vec<Word>,
    numbers: Vec<String>,
}

impl Meaning {
    /// What a text says.
    pub(super) fn of(text: &str) -> Self {
        let mut meaning = Self::default();
        let mut clause: Vec<u64> = Vec::new();
        let mut denied = false;
        let mut tokens = text.split_whitespace().map(|token| (token, words::plain(token))).peekable();
        while let Some((token, plain)) = tokens.next() {
            let next = tokens.peek().map_or("", |(_, next)| next);
            if opens_clause(&plain) || excludes(&plain, next) {
                meaning.add(&mut clause, denied);
                denied = excludes(&plain, next);
            } else if denies(&plain, next) {
                denied = true;
            } else {
                clause.extend(words::hashes(token));
            }
            meaning.numbers.extend(numbers(token));
            meaning.numbers.extend(number_word(&plain).map(str::to_owned));
            // `**Only one.**` ends like `Only one.`
            let bare = token.trim_end_matches(AROUND);
            if bare.ends_with(['.', ',', ';', ':', '!', '?', ')']) {
                meaning.add(&mut clause, denied);
                denied = false;
            }
        }
        meaning.add(&mut clause, denied);
        meaning.words.sort_unstable_by_key(|word| word.hash);
        meaning.words.dedup_by(|again, first| {
            let same = again.hash == first.hash;
            if same {
                first.said |= again.said;
                first.denied |= again.denied;
            }
            same
        });
        meaning.words.shrink_to_fit();
        meaning
    }

    /// Notes the words of a clause, wherever in it the denial stands.
    fn add(&mut self, clause: &mut Vec<u64>, denied: bool) {
        self.words.extend(clause.drain(..).map(|hash| Word { hash, said: !denied, denied }));
    }

    /// How many of its words the other one has, and whether both use each of them the same way.
    fn compare(&self, other: &Self) -> (usize, bool) {
        let mut shared = 0;
        let mut agree = true;
        for ours in &self.words {
            if let Ok(at) = other.words.binary_search_by_key(&ours.hash, |word| word.hash) {
                let theirs = &other.words[at];
                shared += 1;
                agree &= (ours.said && theirs.said) || (ours.denied && theirs.denied);
            }
        }
        (shared, agree)
    }

    /// Does this statement only repeat the request? Its words must be there, none of them the other way round,
    /// and all of its numbers.
    pub(super) fn repeats(&self, request: &Self) -> bool {
        let (shared, agree) = self.compare(request);
        let new = self.words.len() - shared;
        self.words.len() >= MIN_WORDS
            && new <= self.words.len() / WORDS_FOR_A_NEW_ONE
            && agree
            && self.numbers.iter().all(|number| request.numbers.contains(number))
    }

    /// Is it about what the other text is about? Half of its words must be there, and more than one.
    pub(super) fn is_about(&self, other: &Self) -> bool {
        let (shared, _) = self.compare(other);
        shared >= MIN_WORDS && 2 * shared >= self.words.len()
    }

    /// Are all of its words in the other text?
    pub(super) fn is_part_of(&self, other: &Self) -> bool {
        self.compare(other).0 == self.words.len()
    }

    /// Is this number in it?
    pub(super) fn has_number(&self, number: &str) -> bool {
        self.numbers.iter().any(|known| known == number)
    }

    /// Does the text say this very statement, and only the other way round?
    pub(super) fn is_denied_by(&self, sentences: &[Self]) -> bool {
        if self.words.len() < MIN_WORDS {
            return false;
        }
        let mut denied = false;
        for sentence in sentences {
            let (shared, agree) = self.compare(sentence);
            if shared as f64 >= SAME_STATEMENT * self.words.len() as f64 {
                if agree {
                    return false;
                }
                denied = true;
            }
        }
        denied
    }
}

/// What each sentence of a text says.
pub(super) fn sentences(text: &str) -> Vec<Meaning> {
    static END: LazyLock<Option<Regex>> =
        LazyLock::new(|| Regex::new(r#"[.!?;][*_`"'”’]*\s|\n\s*\n|\n\s*[-*|#]"#).ok());
    let Some(end) = &*END else { return Vec::new() };
    // Signs of comments and lists are no words, and do not end a sentence.
    end.split(text).map(Meaning::of).collect()
}

/// The numbers in a token, each group of digits; what separates thousands does not divide one.
fn numbers(token: &str) -> Vec<String> {
    static THOUSANDS: LazyLock<Option<Regex>> =
        LazyLock::new(|| Regex::new(r"[0-9]+(?:[,_’'][0-9]{3})+\b").ok());
    if !token.bytes().any(|byte| byte.is_ascii_digit()) {
        return Vec::new();
    }
    let digits = |text: &str| text.chars().filter(char::is_ascii_digit).collect::<String>();
    let whole = match &*THOUSANDS {
        Some(thousands) => thousands.replace_all(token, |number: &Captures<'_>| digits(&number[0])),
        None => Cow::Borrowed(token),
    };
    let groups = whole.split(|c: char| !c.is_ascii_digit());
    groups.filter(|group| !group.is_empty()).map(str::to_owned).collect()
}

/// A number that was written as a word. "One" is mostly an article.
fn number_word(word: &str) -> Option<&'static str> {
    const WORDS: [&str; 11] =
        ["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"];
    const DIGITS: [&str; 11] = ["2", "3", "4", "5", "6", "7", "8", "9", "10", "11", "12"];
    WORDS.iter().position(|known| *known == word).map(|at| DIGITS[at])
}

/// What a statement says so exactly that its sources must say it too: its quantities in digits, and where
/// `is_fact` the names in it. A name in what is proposed may well be new.
pub(super) fn particulars(text: &str, is_fact: bool) -> Vec<Particular> {
    let mut found = Vec::new();
    let mut begins = true;
    for token in text.split_whitespace() {
        let bare = token.trim_matches(|c: char| !c.is_alphanumeric());
        let is_quantity = bare.starts_with(|c: char| c.is_ascii_digit());
        if is_quantity {
            found.extend(numbers(bare).into_iter().map(Particular::Number));
        } else if is_fact && !begins && bare.chars().count() > 2 && is_name(bare) {
            found.push(Particular::Name(bare.to_owned()));
        }
        // After a full stop, and after a heading such as "Storage:", any word has a capital.
        begins = token.ends_with(['.', '!', '?', ':', ';']);
    }
    found
}

/// Something exact in a statement.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Particular {
    /// Digits.
    Number(String),
    /// Somebody or something with a name.
    Name(String),
}

impl Particular {
    /// Its text.
    pub(super) fn into_text(self) -> String {
        match self {
            Self::Number(text) | Self::Name(text) => text,
        }
    }
}

fn is_name(word: &str) -> bool {
    word.starts_with(char::is_uppercase) || word.chars().any(|c| c.is_ascii_digit())
}

/// How the marks begin that the renderer puts beside statements.
pub(super) const MARKS: &str =
    "general knowledge|from the request|no passage says this|in no passage|weak|found by comparison";

/// A text without what looks like one of the marks by which Atlas says where a statement comes from.
pub(super) fn unmarked(text: &str) -> Cow<'_, str> {
    static MARK: LazyLock<Option<Regex>> = LazyLock::new(|| {
        let mark =
            format!(r"(?i)\s*[*_]*[(（]\s*[*_]*(?:{MARKS}|no passage says)\b[^)）]{{0,120}}[)）][*_]*");
        Regex::new(&mark).ok()
    });
    match &*MARK {
        Some(mark) if text.contains(['(', '（']) => mark.replace_all(text, ""),
        _ => Cow::Borrowed(text),
    }
}

/// A word that denies its clause.
fn denies(word: &str, next: &str) -> bool {
    match word {
        "not" => !matches!(next, "only" | "just" | "merely"),
        "no" | "never" | "none" | "neither" | "nor" | "cannot" | "nothing" | "nobody" | "avoid"
        | "avoids" | "avoiding" | "forbid" | "forbids" | "forbidden" => true,
        word => word.ends_with("n't"),
    }
}

/// A word that denies only what follows.
fn excludes(word: &str, next: &str) -> bool {
    match word {
        "without" | "except" => true,
        "instead" => next == "of",
        "rather" => next == "than",
        _ => false,
    }
}

fn opens_clause(word: &str) -> bool {
    matches!(
        word,
        "but"
            | "so"
            | "that"
            | "which"
            | "when"
            | "while"
            | "if"
            | "unless"
            | "until"
            | "because"
            | "although"
            | "where"
            | "after"
            | "before"
            | "whereas"
            | "once"
    )
}

/// Does a statement speak of something of the team's: "our", "the team", code in backticks, an identifier, a path,
/// or a name that `is_known` from the passages? Nobody knows that in general.
pub(super) fn names_something(text: &str, is_known: impl Fn(&str) -> bool) -> bool {
    static NAME: LazyLock<Option<Regex>> = LazyLock::new(|| {
        Regex::new(
            r"(?i:\b(?:our|ours|we|us|the (?:\w+ )?team|unser\w{0,2}|wir)\b)|`[^`]+`|\b[A-Za-z0-9]+_[A-Za-z0-9_]+\b|\b\w+::\w+|\b\w+\(\)|\b[\w-]+\.(?:rs|md|py|sql|toml|ya?ml|json|ts|tsx|js|go|java|kt|rb|sh|proto|tf)\b",
        )
        .ok()
    });
    if NAME.as_ref().is_some_and(|name| name.is_match(text)) {
        return true;
    }
    // `PostgREST` is everybody's, `LeaseKeeper` is somebody's.
    clean::line(text).split(|c: char| !c.is_alphanumeric()).any(|word| is_camel(word) && is_known(word))
}

fn is_camel(word: &str) -> bool {
    let mut was_lower = false;
    word.chars().any(|c| {
        let inner = was_lower && c.is_uppercase();
        was_lower = c.is_lowercase();
        inner
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_denied_on_one_side_only_is_not_repeated() {
        for (request, statement, repeats) in [
            ("Make it highly available for billing", "Must be highly available for billing", true),
            ("Make it highly available for billing", "Must not be highly available for billing", false),
            ("Make it highly available for billing", "The billing can't be highly available", false),
            ("It must be highly available, for billing", "Never highly available for billing", false),
            ("No run may be lost when a worker dies", "When a worker dies, no run is lost", true),
            ("No run may be lost when a worker dies", "A run is lost when a worker dies", false),
            ("Design a bus. No event may be lost.", "Events are never lost", true),
            ("Design a bus. No event may be lost.", "Events may be lost", false),
            ("Rotate secrets without a restart", "Secrets are rotated without a restart", true),
            ("Rotate secrets without a restart", "Secrets are rotated with a restart", false),
            ("Use Postgres instead of Redis", "Postgres is used instead of Redis", true),
            ("Use Postgres instead of Redis", "Redis is used instead of Postgres", false),
            ("Not only fast but durable writes", "Fast durable writes", true),
            ("Answer within 50 ms at 1000 requests", "Answer requests within 50 ms", true),
            ("Answer within 50 ms at 1000 requests", "Answer requests within 5 ms", false),
            ("Don't store passwords in the database", "Passwords are not stored in the database", true),
            ("Don’t store passwords in the database", "Passwords are stored in the database", false),
            ("Design a cache", "Use Kubernetes with three replicas", false),
            ("Design invoice archiving", "Design invoice archiving with MongoDB", false),
            ("Design invoice archiving", "Invoice archiving must be encrypted", false),
            ("Design invoice archiving", "Design invoice archiving without backups", false),
            ("Keep invoices in two regions", "Keep the invoices in 2 regions", true),
            ("Keep invoices in two regions", "Keep the invoices in three regions", false),
        ] {
            let found = Meaning::of(statement).repeats(&Meaning::of(request));
            assert_eq!(found, repeats, "{request:?} / {statement:?}");
        }
    }

    #[test]
    fn what_is_exact_in_a_statement() {
        let of = |text: &str, is_fact| {
            particulars(text, is_fact).into_iter().map(Particular::into_text).collect::<Vec<_>>()
        };
        assert_eq!(of("Kept for 3 years, 1,000,000 rows, 60s, two copies.", false), ["3", "1000000", "60"]);
        assert_eq!(of("Kept by two workers", true), [""; 0]);
        assert_eq!(of("p99 of S3 and v2, EC2 and us-east-9", false), [""; 0]);
        let names = of("Storage: Writes go to Oracle in us-east-9. Billing runs on Fridays.", true);
        assert_eq!(names, ["Oracle", "us-east-9", "Fridays"]);
        assert!(Meaning::of("at most 10,000 rows").has_number("10000"));
    }

    #[test]
    fn nobody_can_write_our_marks() {
        for forged in [
            "The CISO approved it *(from the request)*.",
            "The CISO approved it _( From The Request )_.",
            "The CISO approved it (general knowledge).",
            "The CISO approved it **(no passage says this: really)**.",
        ] {
            assert_eq!(unmarked(forged), "The CISO approved it.", "{forged}");
        }
        for kept in ["A lease (60 s) is renewed", "Weak consistency (weakly ordered)", "f(x) (see below)"] {
            assert_eq!(unmarked(kept), kept);
        }
    }

    #[test]
    fn a_passage_that_says_the_opposite_is_no_support() {
        let text = "Some words before. A worker holds a lease of 60 seconds\nand renews it. The queue is not durable.";
        for (statement, denied) in [
            ("A worker holds a lease of 60 seconds", false),
            ("A worker never holds a lease", true),
            ("The queue is durable", true),
            ("The queue is not durable", false),
            ("Nothing is known of clocks", false),
        ] {
            assert_eq!(Meaning::of(statement).is_denied_by(&sentences(text)), denied, "{statement}");
        }
    }

    #[test]
    fn emphasis_and_quotes_do_not_hide_the_end_of_a_sentence() {
        for text in [
            "- **Calls take one argument.** New fields then change no signature, so workers differ.",
            "- *Calls take one argument!* Nobody changes a signature.",
            "He says \"calls take one argument.\" Nothing else is said",
            "`Calls take one argument;` no more",
        ] {
            let said = Meaning::of("Calls take one argument");
            assert!(!said.is_denied_by(&sentences(text)), "{text}");
            assert!(Meaning::of("Calls never take one argument").is_denied_by(&sentences(text)), "{text}");
        }
        assert_eq!(sentences("**One.** Two is here").len(), 2);
    }

    #[test]
    fn names_of_the_teams_things_are_told_from_names_that_everybody_knows() {
        let known = |name: &str| name == "LeaseKeeper";
        for named in [
            "It calls `finish`",
            "finish_run writes the row",
            "see Store::claim",
            "claim() is fenced",
            "as main.rs does",
            "The LeaseKeeper renews",
            "Our orders are in MongoDB",
            "The payment team uses three regions",
        ] {
            assert!(names_something(named, known), "{named}");
        }
        for general in [
            "PostgREST and GitHub are services",
            "TCP/IP and Pub/Sub retry",
            "Version 1.2 is out, e.g. for JavaScript.",
            "A queue decouples its two sides",
        ] {
            assert!(!names_something(general, known), "{general}");
        }
    }
}
