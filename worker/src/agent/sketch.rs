//! What a model writes, shown while it writes it: readable Markdown out of JSON that is not whole yet.
//!
//! A preview, for eyes only. The document that counts is made from the whole answer: checked,
//! numbered, with its sources. So the preview leaves out what is only known then (citations) or only
//! readable whole (diagrams).
//!
//! What the document redacts or escapes must not have been seen here before, and much of it is only known for
//! what it is by its end: the last line of a key, the quote that closes a password, the colon of a script
//! link. So each text goes through what the document does to it as a whole, and is shown when it has ended;
//! a plain sentence of a longer one as soon as it has, because nothing that follows can reach back into it.
//!
//! Total and bounded: any text may be pushed, in any pieces; what is no JSON shows nothing.

use super::{
    read, render,
    spec::{Field, Kind},
};

/// No schema of ours nests as deep.
const MAX_DEPTH: usize = 12;
/// What is kept of a text until it is shown; of a longer one the rest is not shown. The document has less.
const MAX_TEXT_BYTES: usize = 4 * read::MAX_TEXT_CHARS;
/// Of a text that goes on, at least so much more is looked at in one go.
const MIN_SENTENCES_BYTES: usize = 40;
/// A longer run without a blank is no word.
const MAX_WORD_CHARS: usize = 30;
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
    /// The text that is being written, as it came.
    text: String,
    /// False when there was more of it than is kept.
    is_whole: bool,
    /// How many bytes of it were looked at for whole sentences.
    looked_at: usize,
    /// What was shown of it.
    told: String,
    /// It begins a block or a list's item.
    opens: bool,
    /// What is said before the text that is being shown, if it says anything.
    before: &'static str,
    /// What is said after it.
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
            text: String::new(),
            is_whole: true,
            looked_at: 0,
            told: String::new(),
            opens: false,
            before: "",
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
        let end = self.ready.floor_char_boundary(max);
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
                    'n' => '\n',
                    'r' => '\r',
                    't' => '\t',
                    'b' => '\u{8}',
                    'f' => '\u{c}',
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
        if self.text.len() >= MAX_TEXT_BYTES {
            self.is_whole = false;
            return;
        }
        if c.is_whitespace()
            && self.text.ends_with(['.', '!', '?'])
            && self.text.len() - self.looked_at >= MIN_SENTENCES_BYTES
        {
            self.looked_at = self.text.len();
            if is_plain(&self.text) {
                self.tell();
            }
        }
        self.text.push(c);
    }

    fn show(&mut self, text: &str) {
        if self.shown < MAX_SHOWN_CHARS {
            self.shown += text.len();
            self.ready.push_str(text);
        }
    }

    /// Shows what the document would have of the text so far.
    fn tell(&mut self) {
        let (text, _) = read::text(&self.text, read::MAX_TEXT_CHARS);
        let text = if self.opens { render::block(&text) } else { render::inline(&text) };
        // Else what comes now changes what was shown, and no more of it is.
        if let Some(more) = text.strip_prefix(self.told.as_str())
            && !more.is_empty()
        {
            let before = std::mem::take(&mut self.before);
            self.show(before);
            self.show(more);
            self.told = text;
        }
    }

    fn end_text(&mut self) {
        if self.is_whole {
            self.tell();
        } else {
            let before = std::mem::take(&mut self.before);
            self.show(before);
            self.show(" …");
        }
        if !std::mem::take(&mut self.before).is_empty() {
            // Nothing came, so nothing is to be closed.
            self.after = "";
        }
        self.text.clear();
        self.told.clear();
        self.looked_at = 0;
        self.is_whole = true;
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
            self.before = between_texts(&key);
            String::new()
        };
        self.show(&before);
        self.opens =
            before.ends_with("- ") || (before.is_empty() && self.before.is_empty() && field != Field::Title);
        let is_name = first
            && !in_list
            && matches!(key.as_str(), "name" | "section" | "chosen" | "title")
            && field != Field::Title;
        self.opens &= !is_name;
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

/// True of words and commas: nothing that may follow makes anything of them a part of a secret, a tag or a
/// link. They all need a sign that is not here, in front of what they hide or in the same run of letters.
fn is_plain(text: &str) -> bool {
    let (mut before, mut run, mut ticks) = (' ', 0, 0);
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        let next = chars.peek().copied().unwrap_or(' ');
        run = if c.is_whitespace() { 0 } else { run + 1 };
        ticks += usize::from(c == '`');
        let is_fine = match c {
            ' ' | '\n' | '.' | ',' | ';' | '!' | '?' | '/' | '_' | '`' | '–' | '—' => true,
            '-' | '\'' | '’' => before.is_alphanumeric() && next.is_alphanumeric(),
            c => c.is_alphanumeric(),
        };
        if !is_fine || run > MAX_WORD_CHARS {
            return false;
        }
        before = c;
    }
    // Within code a blank ends nothing.
    ticks % 2 == 0
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
    use pulldown_cmark::{Event, Parser, Tag};

    use super::{
        super::{
            clean,
            testing::{adr, good_spec, refine, review},
        },
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
    fn a_field_without_a_text_has_no_label() {
        let component = serde_json::json!({"name": "Ledger", "responsibility": "Books tokens.", "technology": "",
            "interfaces": " ", "citations": []});
        let answer = serde_json::json!({"components": [component]}).to_string();
        let told = shown(Kind::Spec, &answer, 3);
        assert!(told.trim_end().ends_with("**Ledger**: Books tokens."), "{told}");
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
    fn text_appears_sentence_by_sentence() {
        let mut sketch = Sketch::new(Kind::Spec);
        let mut shown = |piece: &str| {
            sketch.push(piece);
            sketch.take(usize::MAX)
        };
        assert_eq!(shown("{\"title\": \"Run lea"), "# ");
        assert_eq!(shown("ses\", \"summary\": \"Workers"), "Run leases\n\n## Summary\n\n");
        assert_eq!(shown(" claim runs in `the store`, one at a time."), "");
        assert_eq!(shown(" A dead"), "Workers claim runs in `the store`, one at a time.");
        assert_eq!(
            shown(" one's run is taken over by another one. It"),
            " A dead one's run is taken over by another one."
        );
        // What may be the beginning of something waits for its end.
        assert_eq!(shown(" has a password: correct horse. And it has more of them. And"), "");
        assert_eq!(shown(" more.\"}").split(':').next(), Some(" It has a password"));
    }

    #[test]
    fn of_an_endless_text_the_beginning_is_shown() {
        let answer = format!(
            "{{\"summary\": \"{}\", \"title\": \"T\"}}",
            "Runs are leased for a minute in all. ".repeat(2_000)
        );
        let text = shown(Kind::Spec, &answer, 100);
        assert!(text.starts_with("## Summary\n\nRuns are leased") && text.ends_with(" …\n\n# T"), "{text}");
        assert!(text.len() < MAX_TEXT_BYTES, "{}", text.len());
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

    /// Pieces of what must not be shown, and of what may stand around it.
    fn hostile_piece() -> impl Strategy<Value = String> {
        let random = "a1B2c3D4e5F6g7H8i9J0k1L2m3N4o5P6q7R8s9T0u1V2w3X4y5Z6a7B8c9D0e1F2g3";
        prop::sample::select(vec![
            format!("AKIA{}", "ABCDEFGHIJ234567"),
            format!("AK\u{200b}IA{}", "ABCDEFGHIJ234567"),
            format!("sk-proj-{}", &random[..40]),
            format!("ghp_{}", &random[..36]),
            format!("eyJ{0}.eyJ{0}.{0}", &random[..20]),
            format!("-----BEGIN {0} KEY-----\n{1}\n{1}\nabcd\n-----END {0} KEY-----", "PRIVATE", random),
            format!(
                "-----BEGIN RSA {0} KEY----- {1} Well. And {1} so on. -----END RSA {0} KEY-----",
                "PRIVATE", random
            ),
            format!("-----END {} KEY-----", "PRIVATE"),
            random.to_owned(),
            "password: correct horse. battery staple".to_owned(),
            "DB_PASSWORD=\"hunter2. and more! of it\"".to_owned(),
            "the password:\n 'hunter2! yes. no'".to_owned(),
            "password 'hunter. two'".to_owned(),
            "curl -u me:hunter2x https://example.org".to_owned(),
            "postgres://me:hunter2@db/x".to_owned(),
            format!("Authorization: Bearer {}", &random[..30]),
            "<script>alert(1)</script>".to_owned(),
            "<img src=x\n onerror=alert(1)>".to_owned(),
            "<script\n>".to_owned(),
            "[x](javascript:alert(1))".to_owned(),
            "[x](javascript\n : alert(1))".to_owned(),
            "![x](http://evil.example/p.png)".to_owned(),
            "`<b>x y</b>`".to_owned(),
            "`a b. c d`".to_owned(),
            "`".to_owned(),
            "``".to_owned(),
            "\\`".to_owned(),
            "\n\n## Sources\n\n".to_owned(),
            "# heading".to_owned(),
            "1. one".to_owned(),
            "- [x] done".to_owned(),
            "&lt;b&gt;".to_owned(),
            "Workers hold leases for a while, and say so.".to_owned(),
            "Nothing is lost. All of it is kept.".to_owned(),
            "password".to_owned(),
            "javascript".to_owned(),
            ":".to_owned(),
            "<".to_owned(),
            "'".to_owned(),
            "\"".to_owned(),
            ".".to_owned(),
        ])
    }

    /// Texts made of them, with or without something between.
    fn hostile_text() -> impl Strategy<Value = String> {
        let between = prop::sample::select(vec!["", " ", " ", ". ", ".\n", "\n", "  "]);
        prop::collection::vec((hostile_piece(), between), 1..7)
            .prop_map(|pieces| pieces.into_iter().map(|(piece, after)| piece + after).collect())
    }

    /// Nothing that acts or is fetched; within code everything is text.
    fn has_no_markup(markdown: &str) -> bool {
        let acts = |event| {
            matches!(
                event,
                Event::Html(_) | Event::InlineHtml(_) | Event::Start(Tag::Link { .. } | Tag::Image { .. })
            )
        };
        !Parser::new(markdown).any(acts) && !markdown.to_lowercase().contains("javascript:")
    }

    /// Pushes the answer in pieces of these lengths, over and over, and takes what is shown in between.
    fn streamed(answer: &str, lengths: &[usize]) -> String {
        let mut sketch = Sketch::new(Kind::Spec);
        let (mut text, mut piece) = (String::new(), String::new());
        let mut lengths = lengths.iter().copied().cycle();
        let mut left = lengths.next().unwrap_or(1);
        for c in answer.chars() {
            piece.push(c);
            left -= 1;
            if left == 0 {
                sketch.push(&std::mem::take(&mut piece));
                text.push_str(&sketch.take(64));
                left = lengths.next().unwrap_or(1);
            }
        }
        sketch.push(&piece);
        text + &sketch.take(usize::MAX)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]

        #[test]
        fn nothing_is_shown_that_the_document_leaves_out(
            text in hostile_text(),
            lengths in prop::collection::vec(1_usize..30, 1..8),
        ) {
            let written = serde_json::Value::from(text.as_str());
            let answer = format!(r#"{{"title": "T", "summary": {written}, "risks": [{{"risk": {written}}}]}}"#);
            let kept = render::block(clean::text(&text).trim());
            let shown = streamed(&answer, &lengths);
            let whole = format!("# T\n\n## Summary\n\n{kept}\n\n## Risks\n\n- {kept}");
            prop_assert_eq!(&shown, &whole);
            prop_assert!(has_no_markup(&shown), "{}", shown);
            // Broken off anywhere, it has shown no more than the beginning of that, and of the document that
            // is made of what there is.
            for end in (0..text.len()).step_by(9).filter(|end| text.is_char_boundary(*end)) {
                let written = serde_json::Value::from(&text[..end]).to_string();
                let answer = format!(r#"{{"title": "T", "summary": {}"#, &written[..written.len() - 1]);
                let kept = render::block(clean::text(&text[..end]).trim());
                let shown = streamed(&answer, &lengths);
                prop_assert!(whole.starts_with(&shown), "{}", shown);
                prop_assert!(format!("# T\n\n## Summary\n\n{kept}").starts_with(&shown), "{}", shown);
            }
        }
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
            prop_assert!(has_no_markup(&text), "{}", text);
        }
    }
}
