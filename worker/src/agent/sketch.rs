//! What a model writes, shown while it writes it: readable Markdown out of JSON that is not whole yet.
//!
//! A preview, for eyes only. The document that counts is made from the whole answer: checked,
//! numbered, with its sources. So the preview leaves out what is only known then (citations) or only
//! readable whole (diagrams). Its texts are escaped like those of the document, word by word.
//!
//! Total and bounded: any text may be pushed, in any pieces; what is no JSON shows nothing.

use super::{
    render,
    spec::{Field, Kind},
};

/// No schema of ours nests as deep.
const MAX_DEPTH: usize = 12;
/// A longer word, or code span, is shown in pieces.
const MAX_WORD_CHARS: usize = 200;
/// Keys are short; a longer one is none of ours.
const MAX_KEY_CHARS: usize = 40;
/// More than this is not shown.
const MAX_SHOWN_CHARS: usize = 200_000;

/// A preview in the making.
#[derive(Clone, Debug)]
pub struct Sketch {
    kind: Kind,
    open: Vec<Level>,
    at: At,
    /// Where the text that is shown now belongs.
    place: Option<(Field, String)>,
    /// The word that is not whole yet.
    word: String,
    /// What is said after the text that is being shown.
    after: &'static str,
    /// What may be shown.
    ready: String,
    shown: usize,
}

/// An object or array that is open.
#[derive(Clone, Debug)]
struct Level {
    is_object: bool,
    /// In an object: the key whose value is being written.
    key: String,
    /// Texts shown of it.
    texts: u32,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum At {
    /// Between values; true: the next string of an object is a key.
    Between { key_next: bool },
    /// In a key.
    Key,
    /// In a text; false: one that is not shown.
    Text { shown: bool },
    /// After a backslash, in a text or a key.
    Escape { in_key: bool, shown: bool },
    /// In `\u0041`: digits seen, value so far, and the first half of a pair.
    Unicode { in_key: bool, shown: bool, digits: u8, value: u32 },
}

impl Sketch {
    /// A preview of a document of this kind.
    pub fn new(kind: Kind) -> Self {
        Self {
            kind,
            open: Vec::new(),
            at: At::Between { key_next: false },
            place: None,
            word: String::new(),
            after: "",
            ready: String::new(),
            shown: 0,
        }
    }

    /// The next piece of the answer.
    pub fn push(&mut self, piece: &str) {
        for c in piece.chars() {
            self.step(c);
        }
    }

    /// Takes up to `max` bytes of what may be shown now, in whole characters.
    pub fn take(&mut self, max: usize) -> String {
        if self.ready.len() <= max {
            return std::mem::take(&mut self.ready);
        }
        let end = (0..=max).rev().find(|end| self.ready.is_char_boundary(*end)).unwrap_or(0);
        let rest = self.ready.split_off(end);
        std::mem::replace(&mut self.ready, rest)
    }

    fn step(&mut self, c: char) {
        match self.at {
            At::Between { key_next } => self.between(c, key_next),
            At::Key => match c {
                '"' => self.at = At::Between { key_next: false },
                '\\' => self.at = At::Escape { in_key: true, shown: false },
                c => self.put(c, true, false),
            },
            At::Text { shown } => match c {
                '"' => {
                    if shown {
                        self.end_text();
                    }
                    self.at = At::Between { key_next: false };
                }
                '\\' => self.at = At::Escape { in_key: false, shown },
                c => self.put(c, false, shown),
            },
            At::Escape { in_key, shown } => {
                if c == 'u' {
                    self.at = At::Unicode { in_key, shown, digits: 0, value: 0 };
                    return;
                }
                self.back(in_key, shown);
                let meant = match c {
                    'n' | 'r' | 't' | 'b' | 'f' => ' ',
                    c => c,
                };
                self.put(meant, in_key, shown);
            }
            At::Unicode { in_key, shown, digits, value } => {
                let value = value * 16 + c.to_digit(16).unwrap_or(0);
                if digits < 3 {
                    self.at = At::Unicode { in_key, shown, digits: digits + 1, value };
                    return;
                }
                self.back(in_key, shown);
                // Halves of pairs (rare, emoji mostly) are left out of the preview.
                if let Some(c) = char::from_u32(value) {
                    self.put(c, in_key, shown);
                }
            }
        }
    }

    fn back(&mut self, in_key: bool, shown: bool) {
        self.at = if in_key { At::Key } else { At::Text { shown } };
    }

    fn between(&mut self, c: char, key_next: bool) {
        match c {
            '{' | '[' if self.open.len() < MAX_DEPTH => {
                let is_object = c == '{';
                // An array counts only within an object: brackets in prose before it are prose.
                if is_object || !self.open.is_empty() {
                    self.open.push(Level { is_object, key: String::new(), texts: 0 });
                    self.at = At::Between { key_next: is_object };
                }
            }
            '}' | ']' => {
                self.open.pop();
                self.at = At::Between { key_next: false };
            }
            ',' => self.at = At::Between { key_next: self.open.last().is_some_and(|level| level.is_object) },
            '"' if key_next => {
                if let Some(level) = self.open.last_mut() {
                    level.key.clear();
                }
                self.at = At::Key;
            }
            '"' if !self.open.is_empty() => {
                let shown = self.begin_text();
                self.at = At::Text { shown };
            }
            _ => {}
        }
    }

    /// A character of a key or a text.
    fn put(&mut self, c: char, in_key: bool, shown: bool) {
        if in_key {
            if let Some(level) = self.open.last_mut()
                && level.key.len() < MAX_KEY_CHARS
            {
                level.key.push(c);
            }
            return;
        }
        if !shown {
            return;
        }
        let in_code = !self.word.matches('`').count().is_multiple_of(2);
        let full = self.word.chars().count() >= MAX_WORD_CHARS;
        if c.is_whitespace() && (!in_code || full) {
            self.end_word();
            if !self.ready.ends_with([' ', '\n']) {
                self.show(" ");
            }
            return;
        }
        self.word.push(c);
        if full {
            self.end_word();
        }
    }

    fn show(&mut self, text: &str) {
        if self.shown < MAX_SHOWN_CHARS {
            self.shown += text.len();
            self.ready.push_str(text);
        }
    }

    fn end_word(&mut self) {
        let word = std::mem::take(&mut self.word);
        self.show(&render::inline(&word));
    }

    fn end_text(&mut self) {
        self.end_word();
        let after = std::mem::take(&mut self.after);
        self.show(after);
    }

    /// A text begins: shows what stands before it. False: it is not shown.
    fn begin_text(&mut self) -> bool {
        let Some(field) = self.open.first().and_then(|top| Field::named(&top.key)) else { return false };
        if !self.kind.fields().contains(&field) {
            return false;
        }
        let lists = self.open.iter().filter(|level| !level.is_object).count();
        let (in_list, key) = match self.open.last() {
            Some(level) if level.is_object => (false, level.key.clone()),
            _ => {
                (true, self.open.iter().rev().find(|l| l.is_object).map_or(String::new(), |l| l.key.clone()))
            }
        };
        let first = self.open.last_mut().is_none_or(|level| {
            level.texts += 1;
            level.texts == 1
        });
        if key == "mermaid" {
            return false;
        }
        let part = self.open.get(1).filter(|level| level.is_object).map_or("", |level| level.key.as_str());
        let part = part.to_owned();
        let fresh = self.head(field, &part);
        let in_item = !in_list && self.open.len() >= 2 && !self.open[self.open.len() - 2].is_object;
        let before = if in_list || (in_item && first) {
            let sign = match key.as_str() {
                "pros" => "- Good, because ",
                "cons" => "- Bad, because ",
                _ if part == "good" => "- Good, because ",
                _ if part == "bad" => "- Bad, because ",
                _ => "- ",
            };
            let line = if fresh { "" } else { "\n" };
            format!("{line}{}{sign}", "  ".repeat(lists.saturating_sub(1)))
        } else if fresh || first {
            String::new()
        } else if field == Field::Outcome && key == "rationale" {
            ", because ".to_owned()
        } else {
            between_texts(&key).to_owned()
        };
        self.show(&before);
        let is_name = first
            && !in_list
            && matches!(key.as_str(), "name" | "section" | "chosen" | "title")
            && field != Field::Title;
        if is_name && field == Field::Outcome {
            self.show("Chosen option: \"");
            self.after = "\"";
        } else if is_name {
            self.show("**");
            self.after = "**";
        } else if key == "severity" {
            self.after = ")";
        }
        true
    }

    /// The heading of a section whose first text this is; true if it is.
    fn head(&mut self, field: Field, part: &str) -> bool {
        let part = match part {
            "functional" => "Functional",
            "non_functional" => "Non-functional",
            _ => "",
        };
        let place = (field, part.to_owned());
        if self.place.as_ref() == Some(&place) {
            return false;
        }
        let same_field = self.place.as_ref().is_some_and(|(before, _)| *before == field);
        if self.place.is_some() {
            self.show("\n\n");
        }
        if field == Field::Title {
            self.show("# ");
        } else if !same_field {
            let heading = field.heading_in(self.kind);
            let level = if matches!(field, Field::Consequences | Field::Confirmation) { "###" } else { "##" };
            if !heading.is_empty() {
                self.show(&format!("{level} {heading}\n\n"));
            }
        }
        if !part.is_empty() {
            self.show(&format!("### {part}\n\n"));
        }
        self.place = Some(place);
        true
    }
}

/// What stands between a text of an item and the one before it.
fn between_texts(key: &str) -> &'static str {
    match key {
        "responsibility" | "decision" | "description" | "change" | "finding" | "why_not" => ": ",
        "technology" => " *Technology:* ",
        "interfaces" => " *Interfaces:* ",
        "rationale" | "reason" => " *Why:* ",
        "mitigation" => " *Mitigation:* ",
        "recommendation" => " *Do:* ",
        "severity" => " (",
        _ => " ",
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{
        super::testing::{adr, good_spec, refine, review},
        *,
    };

    fn shown(kind: Kind, answer: &str, size: usize) -> String {
        let mut sketch = Sketch::new(kind);
        let mut text = String::new();
        for piece in answer.as_bytes().chunks(size) {
            sketch.push(&String::from_utf8_lossy(piece));
            text.push_str(&sketch.take(64));
        }
        text + &sketch.take(usize::MAX)
    }

    #[test]
    fn the_preview_reads_like_the_document() {
        insta::assert_snapshot!("preview_spec", shown(Kind::Spec, &good_spec().to_string(), 5));
        let others = [(Kind::Adr, adr()), (Kind::Review, review()), (Kind::Refine, refine())]
            .map(|(kind, answer)| shown(kind, &answer.to_string(), 11))
            .join("\n\n-----\n\n");
        insta::assert_snapshot!("preview_others", others);
    }

    #[test]
    fn pieces_do_not_matter() {
        let answer = format!("```json\n{:#}\n```", good_spec());
        let whole = shown(Kind::Spec, &answer, answer.len());
        for size in [1, 3, 8] {
            assert_eq!(shown(Kind::Spec, &answer, size), whole);
        }
    }

    #[test]
    fn text_appears_word_by_word() {
        let mut sketch = Sketch::new(Kind::Spec);
        sketch.push("{\"title\": \"Run lea");
        assert_eq!(sketch.take(usize::MAX), "# Run ");
        sketch.push("ses\", \"summary\": \"They ");
        assert_eq!(sketch.take(usize::MAX), "leases\n\n## Summary\n\nThey ");
    }

    #[test]
    fn a_hostile_text_is_escaped() {
        let answer = r##"{"title": "<script>alert(1)</script> [x](javascript:alert(1)) \u001b[31mred `a b` `c", "summary": "# no"}"##;
        let text = shown(Kind::Spec, answer, 4);
        assert!(
            !text.contains("<script") && !text.contains("javascript:") && !text.contains('\u{1b}'),
            "{text}"
        );
        assert!(text.contains("`a b`"), "{text}");
    }

    #[test]
    fn what_is_no_document_shows_nothing() {
        for answer in
            ["Sure! Here [1] is \"it\".", "[\"a\", \"b\"]", "{\"unexpected\": \"x\"}", "", "{{{{[[[\"x"]
        {
            assert_eq!(shown(Kind::Spec, answer, 3), "", "{answer}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_survived(text in "(\\{|\\}|\\[|\\]|\"|:|,|title|summary|\\\\|\\\\u00|[a-z<` ])*", size in 1_usize..9) {
            let text = shown(Kind::Spec, &text, size);
            prop_assert!(!text.contains('<'));
        }
    }
}
