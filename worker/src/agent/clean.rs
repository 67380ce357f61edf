//! What is done to every text that others wrote, where it comes in: characters that do not belong
//! into text are dropped, and what looks like a secret is taken out before it can leave for an API.

use std::borrow::Cow;

use atlas_shared::secrets::redact;

/// Cleans a text of several lines.
pub(super) fn text(raw: &str) -> String {
    redact(&visible(raw)).into_owned()
}

/// Cleans a text and puts it on one line.
pub(super) fn line(raw: &str) -> String {
    let text = visible(raw);
    if is_one_line(&text) {
        return redact(&text).into_owned();
    }
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    match redact(&line) {
        Cow::Borrowed(_) => line,
        Cow::Owned(redacted) => redacted,
    }
}

/// Says yes only where nothing is to be done to make it one: most texts of a document are.
fn is_one_line(text: &str) -> bool {
    let mut last = b' ';
    for byte in text.bytes() {
        if !matches!(byte, b' '..=b'~') || (byte == b' ' && last == b' ') {
            return false;
        }
        last = byte;
    }
    text.is_empty() || last != b' '
}

/// The text without the characters that no text needs.
fn visible(raw: &str) -> Cow<'_, str> {
    if raw.bytes().all(|byte| matches!(byte, b'\n' | b'\t' | b' '..=b'~')) {
        return Cow::Borrowed(raw);
    }
    Cow::Owned(raw.replace("\r\n", "\n").chars().filter_map(keep).collect())
}

/// At most `max` characters; a cut is visible.
pub(super) fn cut(text: &str, max: usize) -> String {
    match text.char_indices().nth(max) {
        None => text.to_owned(),
        Some((end, _)) => format!("{}…", text[..end].trim_end()),
    }
}

/// At most about `max` characters of a long text: its beginning and its end, with a note between.
pub(super) fn cut_middle(text: &str, max: usize) -> Cow<'_, str> {
    let length = text.chars().count();
    if length <= max {
        return Cow::Borrowed(text);
    }
    let (head, tail) = (max * 2 / 3, max / 3);
    let at = |index: usize| text.char_indices().nth(index).map_or(text.len(), |(at, _)| at);
    Cow::Owned(format!(
        "{}\n[… {} characters left out …]\n{}",
        text[..at(head)].trim_end(),
        length - head - tail,
        text[at(length - tail)..].trim_start()
    ))
}

/// A character that no reader sees, and that [`text`] drops.
pub(super) fn is_hidden(c: char) -> bool {
    keep(c).is_none()
}

fn keep(c: char) -> Option<char> {
    match c {
        '\n' | '\t' => Some(c),
        '\u{b}' | '\u{c}' | '\r' | '\u{85}' | '\u{2028}' | '\u{2029}' => Some('\n'),
        // Control characters (NUL does not even fit into jsonb), and what hides or reorders text:
        // zero-width and bidirectional marks, and the tag characters that no reader sees.
        c if c.is_control() => None,
        '\u{200b}'..='\u{200f}'
        | '\u{202a}'..='\u{202e}'
        | '\u{2060}'..='\u{2069}'
        | '\u{feff}'
        | '\u{fff9}'..='\u{fffb}'
        | '\u{e0000}'..='\u{e007f}' => None,
        c => Some(c),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn secrets_do_not_pass_with_what_hides_them_either() {
        let key = format!("AKIA{}", "ABCDEFGHIJ234567");
        assert_eq!(text(&format!("before {key} after")), "before (redacted AWS access key) after");
        assert_eq!(text(&key.replace("KIA", "K\u{200b}IA")), "(redacted AWS access key)");
        assert_eq!(line("the password:\n 'hunter2!'"), "the password: '(redacted)'");
    }

    #[test]
    fn hidden_characters_are_dropped() {
        assert_eq!(text("a\u{0}b\u{202e}c\u{200b}d\u{e0041}e\r\nf\tg"), "abcde\nf\tg");
        assert_eq!(line("  a \n\n b\tc "), "a b c");
    }

    #[test]
    fn a_long_text_keeps_its_ends() {
        let long = format!("{}{}{}", "a".repeat(100), "b".repeat(100), "c".repeat(100));
        let shorter = cut_middle(&long, 30);
        assert_eq!(shorter, format!("{}\n[… 270 characters left out …]\n{}", "a".repeat(20), "c".repeat(10)));
        assert_eq!(cut_middle("short", 30), "short");
    }

    proptest! {
        #[test]
        fn any_text_can_be_cleaned_and_cut(raw in "\\PC{0,200}", max in 0_usize..50) {
            let cleaned = text(&raw);
            prop_assert_eq!(&text(&cleaned), &cleaned);
            prop_assert!(cut(&raw, max).chars().count() <= max + 1);
            let _ = cut_middle(&raw, max);
        }
    }
}
