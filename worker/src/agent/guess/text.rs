//! A request as the sentences that say what is asked: the first few, folded, without what stands around them.
//!
//! Left out are code blocks, quotes of others, greetings, labels of subject lines, and the items of a list that
//! follows a sentence: they are details of what was asked before. Work is bounded on any input.

use super::lexicon::POLITE;

/// Bytes of a request that are looked at.
const BYTES: usize = 8 << 10;
/// Sentences that are looked at.
const SENTENCES: usize = 6;
/// Words of a sentence that are looked at.
const WORDS: usize = 48;
/// Bytes of a word that are looked at.
const WORD: usize = 64;
/// Words with a full stop that ends no sentence.
const ABBREVIATIONS: &[&str] =
    &["vs", "e.g", "i.e", "etc", "z.b", "bzw", "ca", "approx", "no", "nr", "dr", "p.ej", "ggf"];
/// What a subject line begins with.
const LABELS: &[&str] = &[
    "subject", "betreff", "objet", "asunto", "re", "aw", "fwd", "fw", "title", "titel", "titre", "topic",
    "thema", "request", "anfrage", "task", "aufgabe",
];
/// Pronouns that French hangs on a verb.
const PRONOUNS: &[&str] = &["nous", "vous", "tu", "on", "il", "elle", "ils", "moi", "je"];

/// A sentence, or what stands before a colon. A comma is a word of its own.
#[derive(Debug, Default)]
pub(super) struct Sentence {
    pub(super) words: Vec<String>,
    /// Ends with a question mark.
    pub(super) asks: bool,
}

impl Sentence {
    /// Its words, polite ones too.
    pub(super) fn all(&self) -> Vec<&str> {
        self.words.iter().map(String::as_str).collect()
    }
}

/// A word in lower case, without accents and what stands around it.
fn fold(token: &str) -> String {
    let mut folded = String::with_capacity(token.len());
    for letter in token.trim_matches(|c: char| !c.is_alphanumeric()).chars().flat_map(char::to_lowercase) {
        match letter {
            'ä' | 'à' | 'á' | 'â' | 'ã' => folded.push('a'),
            'è' | 'é' | 'ê' | 'ë' => folded.push('e'),
            'ì' | 'í' | 'î' | 'ï' => folded.push('i'),
            'ö' | 'ò' | 'ó' | 'ô' | 'õ' => folded.push('o'),
            'ü' | 'ù' | 'ú' | 'û' => folded.push('u'),
            'ß' => folded.push_str("ss"),
            'ç' => folded.push('c'),
            'ñ' => folded.push('n'),
            'œ' => folded.push_str("oe"),
            '’' => folded.push('\''),
            other => folded.push(other),
        }
    }
    folded
}

/// The first sentences of a request.
pub(super) fn sentences(request: &str) -> Vec<Sentence> {
    let mut reader = Reader::default();
    let mut in_code = false;
    let mut after_prose = false;
    for line in request[..request.floor_char_boundary(BYTES)].lines() {
        let line = line.trim();
        if line.starts_with("```") || line.starts_with("~~~") {
            in_code = !in_code;
            reader.end(false);
            continue;
        }
        if in_code || line.starts_with('>') {
            continue;
        }
        let (text, marked) = unmarked(line);
        if text.is_empty() || marked.is_some() {
            reader.end(false);
        }
        match marked {
            Some(Mark::Item) if after_prose => continue,
            Some(Mark::Heading) if !reader.sentences.is_empty() => continue,
            _ => {}
        }
        reader.line(text);
        after_prose |= marked != Some(Mark::Item) && !reader.is_empty();
        if reader.is_full() {
            break;
        }
    }
    reader.end(false);
    reader.sentences.truncate(SENTENCES);
    reader.sentences
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Mark {
    Item,
    Heading,
}

/// A line without the marks of a heading, an item or a subject line.
fn unmarked(line: &str) -> (&str, Option<Mark>) {
    let heading = line.trim_start_matches('#');
    if heading.len() < line.len() {
        return (heading, Some(Mark::Heading));
    }
    if let Some(item) = ["- ", "* ", "+ ", "• "].iter().find_map(|mark| line.strip_prefix(mark)) {
        return (item, Some(Mark::Item));
    }
    let digits = line.trim_start_matches(|c: char| c.is_ascii_digit());
    if digits.len() < line.len()
        && let Some(item) = digits.strip_prefix(". ").or_else(|| digits.strip_prefix(") "))
    {
        return (item, Some(Mark::Item));
    }
    let mut rest = line;
    while let Some((label, text)) = rest.split_once(':')
        && label.len() <= 12
        && LABELS.contains(&fold(label).as_str())
    {
        rest = text.trim_start();
    }
    (rest, None)
}

/// Puts words together to sentences, over the ends of lines.
#[derive(Default)]
struct Reader {
    sentences: Vec<Sentence>,
    open: Sentence,
}

impl Reader {
    fn is_full(&self) -> bool {
        self.sentences.len() >= SENTENCES
    }

    fn is_empty(&self) -> bool {
        self.sentences.is_empty() && self.open.words.is_empty()
    }

    fn line(&mut self, line: &str) {
        for token in line.split_whitespace() {
            if self.is_full() {
                return;
            }
            self.token(&token[..token.floor_char_boundary(WORD)]);
        }
        // "Hi team," is a line of its own.
        if self.open.words.iter().all(|word| word == "," || POLITE.has(word)) {
            self.open.words.clear();
        }
    }

    fn token(&mut self, token: &str) {
        let word = fold(token);
        if token == "&" {
            self.push("and".to_owned());
        } else if !word.is_empty() {
            // "l'architecture", "d'une", but "let's" and "can't".
            let word = match word.split_once('\'') {
                Some((article, noun)) if article.len() <= 2 && noun.len() > 2 => noun.to_owned(),
                _ => word,
            };
            match word.split_once('-') {
                Some((verb, pronoun)) if PRONOUNS.contains(&pronoun) => {
                    self.push(verb.to_owned());
                    self.push(pronoun.to_owned());
                }
                _ => self.push(word),
            }
        }
        let bare = token.trim_end_matches(['"', '”', '“', '»', '\'', ')', '*', '_', '`']);
        match bare.chars().last() {
            Some('.')
                if self.open.words.last().is_some_and(|word| ABBREVIATIONS.contains(&word.as_str())) => {}
            Some('.' | '!' | ':' | ';') => self.end(false),
            Some('?') => self.end(true),
            Some(',') => self.push(",".to_owned()),
            _ if matches!(token, "-" | "–" | "—" | "|") => self.end(false),
            _ => {}
        }
    }

    fn push(&mut self, word: String) {
        if self.open.words.len() < WORDS {
            self.open.words.push(word);
        }
    }

    fn end(&mut self, asks: bool) {
        let sentence = Sentence { words: std::mem::take(&mut self.open.words), asks };
        if sentence.words.iter().any(|word| word != "," && !POLITE.has(word)) {
            self.sentences.push(sentence);
        }
    }
}
