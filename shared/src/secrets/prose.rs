//! Secrets that a sentence tells: "the password is …", "token `…`", and files whose names are followed by
//! nothing but a blank.

use std::ops::Range;

use super::{
    is_random,
    names::{Class, is_name},
    values::{is_named, is_phrase, is_placeholder, is_prose, is_stated, is_words},
};

/// What may stand between a name and the verb: "the password of the test user is …".
const MAX_BETWEEN: usize = 48;
const MAX_VALUE: usize = 256;
/// How far before a password the user's name is looked for.
const MAX_BEFORE: usize = 160;

/// What tells a value from what is said about it.
const VERBS: &[&str] = &["is", "was", "ist", "war", "lautet", "lautete", "heißt", "est", "es", "equals"];
/// After these a command may follow as well as a value.
const JOINTS: &[&str] = &["to", "auf", "=", "->", "→", "–", "—", "now"];

/// Where the secret is that a sentence tells, whose name has a blank behind it.
pub(super) fn value(text: &str, name: &Range<usize>, from: usize, class: Class) -> Option<Range<usize>> {
    let line = text.get(from..text.floor_char_boundary(from + MAX_BETWEEN + MAX_VALUE))?;
    let line = line.split('\n').next().unwrap_or_default();
    let skipped = line.len() - line.trim_start_matches(' ').len();
    let (at, rest) = (from + skipped, &line[skipped..]);
    if let Some((value, quoted)) = token(rest) {
        let found = at + value.start..at + value.end;
        let value = &rest[value];
        let direct = if quoted {
            is_stated(value, class, true)
        } else {
            is_file(text, name) && is_file_value(value)
                || is_random(value, 20) && is_plain_run(value) && !is_words(value)
        };
        if direct {
            return Some(found);
        }
    }
    // `pass` is also what is done with options.
    let name = &text[name.clone()];
    if name.eq_ignore_ascii_case("pass") || name.eq_ignore_ascii_case("auth") {
        return None;
    }
    after_verb(rest, class).map(|value| at + value.start..at + value.end)
}

/// "… for the database is `…`", "… (production): …".
fn after_verb(rest: &str, class: Class) -> Option<Range<usize>> {
    let mut at = 0;
    let mut words = 0;
    while at < rest.len().min(MAX_BETWEEN) && words < 8 {
        let word = rest[at..].split(' ').next().unwrap_or_default();
        let next = at + word.len() + 1;
        // What was told here was taken out before.
        if word.contains("(redacted") {
            return None;
        }
        // `name = value` is no sentence.
        let joint = JOINTS.contains(&word) && (word != "=" || at > 0);
        let verb = VERBS.contains(&word) || word.ends_with(':');
        if verb || joint {
            let blanks = rest.get(next..)?.bytes().take_while(|byte| *byte == b' ').count();
            let start = next + blanks;
            let (value, quoted) = token(rest.get(start..)?)?;
            let found = start + value.start..start + value.end;
            let value = &rest[found.clone()];
            if is_stated(value, class, quoted) || (quoted && verb && is_phrase(value, class, true)) {
                return Some(found);
            }
        }
        if word.ends_with(['.', '!', '?', ';']) || word.contains(['{', '<', '"', '`', '|']) {
            return None;
        }
        at = next;
        words += 1;
    }
    None
}

/// The first word of a text, or what it has in quotes, and whether it is in quotes.
fn token(text: &str) -> Option<(Range<usize>, bool)> {
    let first = text.chars().next()?;
    let close = match first {
        '"' | '\'' | '`' => first,
        '“' => '”',
        '„' => '“',
        '«' => '»',
        _ => {
            let stops = |c: char| c.is_whitespace() || matches!(c, '"' | '`' | '<' | '|');
            let word = &text[..text.find(stops).unwrap_or(text.len())];
            // The end of the sentence is none of the value. A mark of exclamation may be.
            let word = word.trim_end_matches(['.', ',', ';', ')']);
            return (!word.is_empty()).then_some((0..word.len(), false));
        }
    };
    let start = first.len_utf8();
    let length = text[start..].find(close)?;
    Some((start..start + length, true))
}

/// Nothing that a path, a call or a name with points has.
fn is_plain_run(value: &str) -> bool {
    value.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'+' | b'=' | b'~'))
}

/// `machine … login … password …` of a .netrc, `requirepass …` of Redis.
fn is_file(text: &str, name: &Range<usize>) -> bool {
    let word = text[name.clone()].to_ascii_lowercase();
    if text.as_bytes().get(name.end) != Some(&b' ') {
        return false;
    }
    if matches!(word.as_str(), "requirepass" | "masterauth") {
        return true;
    }
    if !matches!(word.as_str(), "password" | "passwd") {
        return false;
    }
    let start = text.ceil_char_boundary(name.start.saturating_sub(MAX_BEFORE));
    let before: Vec<_> = text[start..name.start].split_whitespace().rev().take(4).collect();
    let user = before
        .first()
        .is_some_and(|user| user.bytes().all(|byte| is_name(byte) || matches!(byte, b'@' | b'+')));
    user && matches!(before.get(1), Some(&("login" | "account" | "machine" | "user")))
}

fn is_file_value(value: &str) -> bool {
    value.len() >= 3 && !is_placeholder(value) && !is_named(value) && !is_prose(&value.to_lowercase())
}
