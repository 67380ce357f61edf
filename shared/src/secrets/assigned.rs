//! Values that are secret by the name they are given: `DB_PASSWORD=…`, `"password": "…"`, `token = '…'`.
//!
//! Names are common and values are mostly none: types, calls, variables, placeholders, prose. So a name
//! only makes a value suspect, and how it is written decides: in quotes, at the end of a line of YAML, in
//! an environment file. Written by hand, because a regex over such names costs more than all the others.

use std::ops::Range;

use super::{
    Found, Pieces, has_digit, is_number, is_random, mixes,
    names::{Class, MAX_NAME, class_of, is_name, may_end_name},
    prose,
    values::{has_special, is_phrase, is_placeholder, is_plain, is_reference, is_words, second_of_pair},
};

/// Longer values are looked at in part.
const MAX_VALUE: usize = 512;
/// How much of a line is looked at on either side of a sign, so that long ones cost no more than others.
const MAX_LINE: usize = 1024;
/// Blanks between name, sign and value.
const MAX_BLANKS: usize = 24;

/// What stands between a name and its value.
#[derive(Clone, Copy, PartialEq)]
enum Sign {
    /// `name: value`.
    Colon,
    /// `name = value`, `name := value`, `name => value`.
    Equals,
    /// `name=value`.
    Tight,
    /// `--name value`.
    Flag,
    /// `name("value")`.
    Call,
    /// `<name>value<`.
    Element,
    /// Nothing but a blank: `the name is value`.
    Blank,
}

pub(super) fn find(text: &str, found: &mut Vec<Found>) {
    let bytes = text.as_bytes();
    for (at, byte) in bytes.iter().enumerate() {
        let next = bytes.get(at + 1).copied().unwrap_or(b'\n');
        let last = if at == 0 { b'\n' } else { bytes[at - 1] };
        let (sign, from) = match byte {
            b':' if !matches!(next, b':' | b'=') && last != b':' => (Sign::Colon, at + 1),
            b'=' if matches!(next, b'=' | b'~') || matches!(last, b'=' | b'!' | b'<' | b'>' | b'~') => {
                continue;
            }
            b'=' if next == b'>' => (Sign::Equals, at + 2),
            b'=' if last == b':' || is_blank(next) || is_blank(last) => (Sign::Equals, at + 1),
            b'=' => (Sign::Tight, at + 1),
            b'(' if matches!(next, b'"' | b'\'') => (Sign::Call, at + 1),
            b'>' if next.is_ascii_graphic() && next != b'<' && last.is_ascii_alphanumeric() => {
                (Sign::Element, at + 1)
            }
            b'-' if next == b'-' && last != b'-' => (Sign::Flag, at + 2),
            // `：`
            0x9a if bytes[..at].ends_with(&[0xef, 0xbc]) => (Sign::Colon, at + 1),
            b' ' if may_end_name(&bytes[..at]) => (Sign::Blank, at + 1),
            _ => continue,
        };
        if sign == Sign::Flag {
            let length = bytes[from..].iter().take(MAX_NAME).take_while(|byte| is_name(**byte)).count();
            let class = class_of(&text[from..from + length]);
            if let Some(class) = class.filter(|_| bytes.get(from + length) == Some(&b' ')) {
                let value = value(text, at, from + length, sign, class);
                found.extend(value.map(|at| Found { at, name: "" }));
            }
            continue;
        }
        // A sign may be of more than one byte.
        let sign_at = if *byte == 0x9a { at - 2 } else { at };
        let Some(name) = name_before(text, sign_at, sign) else { continue };
        let Some(class) = class_of(&text[name.clone()]) else { continue };
        let value = match sign {
            Sign::Blank => prose::value(text, &name, from, class),
            _ => value(text, sign_at, from, sign, class).or_else(|| pair(text, &name, from, sign)),
        };
        found.extend(value.map(|at| Found { at, name: "" }));
    }
}

/// `user/password = bob/secret`, `credentials: bob / secret`.
fn pair(text: &str, name: &Range<usize>, from: usize, sign: Sign) -> Option<Range<usize>> {
    if !matches!(sign, Sign::Colon | Sign::Equals | Sign::Tight) {
        return None;
    }
    let last = name.end.saturating_sub("credentials".len());
    let both = text[..name.start].ends_with('/')
        || text.get(last..name.end).is_some_and(|name| name.to_ascii_lowercase().contains("credential"));
    let rest = text.get(from..text.floor_char_boundary(from + MAX_VALUE)).filter(|_| both)?;
    second_of_pair(rest).map(|at| from + at.start..from + at.end)
}

fn is_blank(byte: u8) -> bool {
    byte == b' ' || byte == b'\t'
}

/// Where the name is that ends before a sign.
fn name_before(text: &str, at: usize, sign: Sign) -> Option<Range<usize>> {
    let bytes = text.as_bytes();
    let back = |mut end: usize, drop: &dyn Fn(u8) -> bool, most: usize| {
        let least = end.saturating_sub(most);
        while end > least && drop(bytes[end - 1]) {
            end -= 1;
        }
        end
    };
    let word =
        |end: usize| text.ceil_char_boundary(back(end, &|byte| is_name(byte) || !byte.is_ascii(), MAX_NAME));
    let mut end = at;
    if matches!(sign, Sign::Colon | Sign::Equals | Sign::Blank) {
        if sign == Sign::Equals && end > 0 && bytes[end - 1] == b':' {
            end -= 1;
        }
        end = back(end, &is_blank, MAX_BLANKS);
        // `"name"`, `\"name\"`, `map["name"]`, `**name**`.
        end = back(end, &|byte| matches!(byte, b'"' | b'\'' | b'`' | b'\\' | b']' | b'*'), 4);
    }
    let mut start = word(end);
    if start == end {
        return None;
    }
    if sign == Sign::Element && (start == 0 || bytes[start - 1] != b'<') {
        return None;
    }
    let name = &text[start..end];
    // `API key: …`
    if name.eq_ignore_ascii_case("key") && start > 0 && bytes[start - 1] == b' ' {
        start = word(start - 1);
    } else if name.eq_ignore_ascii_case("passe") && ends_with(&text[..start], "mot de ") {
        start -= "mot de ".len();
    }
    Some(start..end)
}

/// Where the secret is that stands after a sign, if there is one.
fn value(text: &str, sign_at: usize, from: usize, sign: Sign, class: Class) -> Option<Range<usize>> {
    let bytes = text.as_bytes();
    let mut at = from;
    let limit = bytes.len().min(from + MAX_BLANKS);
    // `**Password:** …`
    while at < limit && (is_blank(bytes[at]) || (sign == Sign::Colon && bytes[at] == b'*')) {
        at += 1;
    }
    if sign == Sign::Colon && text.is_char_boundary(at) {
        let rest = text[at..text.floor_char_boundary(at + MAX_NAME)].split('\n').next().unwrap_or_default();
        if typed(rest) {
            // `password: &str = "…"`
            let equals = rest.find(" = ").filter(|length| *length < MAX_NAME)?;
            return value(text, sign_at, at + equals + 3, Sign::Equals, class);
        }
    }
    // b"…", f"…", r"…", \"…\", @"…"
    let prefixed =
        at + 1 < bytes.len() && matches!(bytes[at], b'b' | b'r' | b'f' | b'u' | b'@' | b'\\' | b'$');
    let open = if prefixed && matches!(bytes[at + 1], b'"' | b'\'') { at + 1 } else { at };
    if let Some(quote @ (b'"' | b'\'' | b'`')) = bytes.get(open) {
        let start = open + 1;
        let end =
            bytes[start..].iter().take(MAX_VALUE).position(|byte| byte == quote || *byte == b'\n')? + start;
        if bytes[end] != *quote {
            return None;
        }
        let end = if end > start && bytes[end - 1] == b'\\' { end - 1 } else { end };
        let formatted = open > at && matches!(bytes[at], b'f' | b'$');
        let value = text.get(start..end)?;
        let secret = !(formatted && value.contains('{')) && quoted(value, class, sign);
        return secret.then_some(start..end);
    }
    if sign == Sign::Call {
        return None;
    }
    let stops = |byte: u8| {
        byte.is_ascii_whitespace()
            || matches!(
                byte,
                b'"' | b'\''
                    | b'`'
                    | b'<'
                    | b'>'
                    | b','
                    | b';'
                    | b'('
                    | b')'
                    | b'['
                    | b']'
                    | b'{'
                    | b'}'
                    | b'&'
                    | b'|'
            )
    };
    let rest = &bytes[at..bytes.len().min(at + MAX_VALUE)];
    let mut end = at + rest.iter().position(|byte| stops(*byte)).unwrap_or(rest.len());
    if end == at || !text.is_char_boundary(end) {
        return None;
    }
    let line_end = bytes[end..].iter().take(MAX_LINE).position(|byte| *byte == b'\n');
    let line_end = line_end.map_or_else(|| text.floor_char_boundary(end + MAX_LINE), |length| end + length);
    let behind = text[end..line_end].trim();
    let line_start = text.floor_char_boundary(sign_at.saturating_sub(MAX_LINE));
    let name_line = text[line_start..sign_at].rfind('\n').map_or(line_start, |at| line_start + at + 1);
    let setting = &text[name_line..sign_at];
    let place = Place {
        // Nothing but a comment behind it: code would go on, or end its line with a sign.
        last: behind.is_empty() || behind.starts_with('#'),
        prose: bytes.get(end) == Some(&b' ') && behind.starts_with(|c: char| c.is_alphanumeric()),
        followed: bytes.get(end).copied().unwrap_or(b'\n'),
        file: sign == Sign::Tight && is_setting(setting),
        alone: setting.trim().bytes().all(is_name),
        sign,
    };
    if class == Class::Password && (sign == Sign::Colon || place.file) && !place.last {
        // `passphrase: open sesame 42`
        let line = text.get(at..line_end).unwrap_or_default().trim_end();
        if is_phrase(line, class, false) {
            return Some(at..at + line.len());
        }
        // Where nothing can follow, a value goes on to the next blank.
        let whole = at + rest.iter().position(u8::is_ascii_whitespace).unwrap_or(rest.len());
        let ends = text.get(whole..line_end).is_some_and(|rest| rest.trim().is_empty());
        if ends
            && !matches!(bytes[whole - 1], b',' | b';' | b')' | b'}' | b']' | b'"' | b'\'' | b'>' | b'`')
            && !matches!(place.followed, b'(' | b'[' | b'<' | b'"' | b'\'')
        {
            let value = text.get(at..whole)?;
            return bare(value, class, Place { last: true, followed: b'\n', ..place }).then_some(at..whole);
        }
    }
    let mut value = text.get(at..end)?;
    // The end of a sentence.
    let trimmed = value.trim_end_matches(['.', ':', '!', '?']);
    if trimmed.len() < value.len() && class == Class::Key {
        value = trimmed;
        end = at + value.len();
    }
    bare(value, class, place).then_some(at..end)
}

fn ends_with(text: &str, end: &str) -> bool {
    let at = text.len().checked_sub(end.len());
    at.and_then(|at| text.get(at..)).is_some_and(|last| last.eq_ignore_ascii_case(end))
}

#[derive(Clone, Copy)]
struct Place {
    last: bool,
    /// A word follows.
    prose: bool,
    followed: u8,
    /// Looks like a line of an environment or properties file, or a part of a connection string.
    file: bool,
    /// There is nothing else in front of the sign but the name, as in files of settings.
    alone: bool,
    sign: Sign,
}

/// Is this the name of `NAME=value`, alone on its line, or after `;` or a flag?
fn is_setting(line: &str) -> bool {
    let start = line.trim_start();
    if let Some((_, name)) = start.rsplit_once(';') {
        return name.trim().bytes().all(|byte| is_name(byte) || byte == b' ');
    }
    let name = ["export ", "set ", "ENV ", "ARG ", "- ", "-e "]
        .iter()
        .fold(start, |start, word| start.strip_prefix(word).unwrap_or(start));
    let upper = |name: &str| {
        name.bytes().all(|byte| byte.is_ascii_uppercase() || byte.is_ascii_digit() || byte == b'_')
    };
    (!name.is_empty() && name.bytes().all(is_name))
        || line.rsplit([' ', '"', '\'', '`']).next().is_some_and(upper)
}

/// `&str = …`, `Option<String>,`, `string;`: a type, perhaps with a value after it.
fn typed(rest: &str) -> bool {
    const TYPES: &[&str] = &[
        "String",
        "str",
        "string",
        "bool",
        "Option",
        "Secret",
        "SecretString",
        "int",
        "bytes",
        "Vec",
        "u8",
        "u32",
        "u64",
        "usize",
        "i32",
        "i64",
        "number",
        "boolean",
        "any",
        "Buffer",
        "Cow",
        "Box",
        "Arc",
        "impl",
        "dyn",
        "Optional",
        "Uint8Array",
        "char",
        "varchar",
        "text",
    ];
    let word = rest.trim_start_matches(['&', '*', '\'', '?', '[', '(']);
    let word = word.strip_prefix("static ").or_else(|| word.strip_prefix("mut ")).unwrap_or(word);
    let length = word.bytes().take_while(|byte| byte.is_ascii_alphanumeric() || *byte == b'_').count();
    TYPES.contains(&&word[..length])
}

fn quoted(value: &str, class: Class, sign: Sign) -> bool {
    let chars = value.chars().count();
    if chars < 4 || is_placeholder(value) {
        return false;
    }
    if value.contains(' ') {
        return sign != Sign::Call && is_phrase(value, class, true);
    }
    if value.contains(['<', '>', '\t', '\\', '(']) && class == Class::Key {
        return false;
    }
    if value.contains(char::is_whitespace) || is_plain(value) {
        return false;
    }
    let strong = is_random(value, 12);
    match class {
        Class::Password => {
            if is_number(value) {
                return chars >= 6 && sign != Sign::Call;
            }
            let single = value.bytes().all(|byte| byte.is_ascii_lowercase());
            !is_words(value)
                && (mixes(value) || has_special(value) || (single && chars >= 5 && sign != Sign::Call))
        }
        Class::Key => {
            let one = value.bytes().all(|byte| byte.is_ascii_alphanumeric());
            strong || (sign != Sign::Call && one && chars >= 8 && mixes(value) && !is_words(value))
        }
    }
}

fn bare(value: &str, class: Class, place: Place) -> bool {
    let chars = value.chars().count();
    if chars < 5 || is_placeholder(value) || is_plain(value) {
        return false;
    }
    // A call, an index, a macro, a path of code.
    let goes_on = matches!(place.followed, b'(' | b'[' | b'<' | b'{') && place.sign != Sign::Element;
    if goes_on || value.contains("::") || value.ends_with('!') && class == Class::Key {
        return false;
    }
    if is_reference(value) {
        return false;
    }
    if is_random(value, 16) {
        return !is_words(value);
    }
    let code = matches!(place.followed, b',' | b')');
    // Names of variables are written like this.
    let constant = value.bytes().all(|byte| byte.is_ascii_uppercase() || byte == b'_');
    if code || constant || is_words(value) {
        return false;
    }
    let written = match place.sign {
        // In a sentence, too; after a value of code a sign follows.
        Sign::Colon => place.last || (class == Class::Password && place.prose),
        Sign::Tight | Sign::Flag | Sign::Element => true,
        // `password = S3cret99` of an ini file, and neither `password = password2` nor `hash = sha1`.
        Sign::Equals => {
            let digits = value.bytes().filter(u8::is_ascii_digit).count();
            let value_like = digits >= 2 || (has_special(value) && has_digit(value));
            place.alone && place.last && class == Class::Password && value_like && class_of(value).is_none()
        }
        Sign::Call | Sign::Blank => false,
    };
    if !written {
        return false;
    }
    let word = value.bytes().all(|byte| byte.is_ascii_alphanumeric());
    match class {
        Class::Password => {
            let upper = value.bytes().any(|byte| byte.is_ascii_uppercase());
            let lower = value.bytes().any(|byte| byte.is_ascii_lowercase());
            // `Summer!Sun`
            let joined = value.trim_end_matches('!').contains(['!', '#', '^', '+', '~', '&', '@']);
            let joined = joined && upper && lower && place.last && place.sign == Sign::Colon;
            (chars >= 6 && (mixes(value) || is_number(value) || joined)) || (place.file && word)
        }
        Class::Key => {
            let Pieces { count, .. } = Pieces::of(value);
            (word && chars >= 8 && mixes(value) && (place.file || count >= 4))
                || (place.file && word && chars >= 12)
        }
    }
}
