//! Values that are secret by the name they are given: `DB_PASSWORD=…`, `"password": "…"`, `token = '…'`.
//!
//! Names are common and values are mostly none: types, calls, variables, placeholders, prose. So a name
//! only makes a value suspect, and how it is written decides: in quotes, at the end of a line of YAML, in
//! an environment file. Written by hand, because a regex over such names costs more than all the others.

use super::{Found, Pieces, is_number, is_random, mixes};

/// Longer names are none.
const MAX_NAME: usize = 80;
/// Longer values are looked at in part.
const MAX_VALUE: usize = 512;
/// How much of a line is looked at on either side of a sign, so that long ones cost no more than others.
const MAX_LINE: usize = 1024;
/// Blanks between name, sign and value.
const MAX_BLANKS: usize = 24;

/// What people choose and type: short, and often a word.
const PASSWORDS: &[&str] = &["password", "passwd", "passphrase", "passwort", "pwd"];

/// What machines make. Compared with names in lower case, without `_`, `-`, `.` and blanks.
const KEYS: &[&str] = &[
    "secret",
    "token",
    "apikey",
    "accesskey",
    "secretkey",
    "secretkeybase",
    "privatekey",
    "signingkey",
    "encryptionkey",
    "masterkey",
    "accountkey",
    "storagekey",
    "sharedkey",
    "authkey",
    "servicekey",
    "rolekey",
    "webhookkey",
    "sessionkey",
    "credential",
    "credentials",
];

/// Those that are also the end of other words (`compass`, `unauth`): only by themselves, or after a sign.
const WHOLE: &[(&str, Class)] = &[("pass", Class::Password), ("pw", Class::Password), ("auth", Class::Key)];

/// Values of such names that keep no secret.
const PLACEHOLDERS: &[&str] = &[
    "any",
    "argon2",
    "argon2id",
    "base64",
    "basic",
    "bcrypt",
    "bearer",
    "bool",
    "boolean",
    "bytes",
    "changeit",
    "changeme",
    "char",
    "default",
    "disabled",
    "dummy",
    "empty",
    "enabled",
    "encrypted",
    "env",
    "example",
    "expired",
    "false",
    "file",
    "hash",
    "hashed",
    "hidden",
    "hmac",
    "hunter",
    "input",
    "int",
    "integer",
    "invalid",
    "jwt",
    "keyring",
    "login",
    "md5",
    "missing",
    "nil",
    "no",
    "none",
    "not",
    "null",
    "nullable",
    "number",
    "oauth",
    "oauth2",
    "object",
    "off",
    "on",
    "optional",
    "pass",
    "passphrase",
    "passwd",
    "password",
    "pbkdf2",
    "plain",
    "plaintext",
    "prompt",
    "pwd",
    "random",
    "redacted",
    "refresh",
    "required",
    "reset",
    "rsa",
    "scram",
    "scrypt",
    "secret",
    "secure",
    "sha1",
    "sha256",
    "sha512",
    "str",
    "string",
    "text",
    "todo",
    "token",
    "true",
    "undefined",
    "unknown",
    "unset",
    "user",
    "username",
    "uuid",
    "value",
    "vault",
    "void",
    "wrong",
    "yes",
];

#[derive(Clone, Copy, PartialEq)]
enum Class {
    Password,
    Key,
}

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
            _ => continue,
        };
        let (class, from) = if sign == Sign::Flag {
            let length = bytes[from..].iter().take(MAX_NAME).take_while(|byte| is_name(**byte)).count();
            if bytes.get(from + length) != Some(&b' ') {
                continue;
            }
            match class_of(&text[from..from + length]) {
                Some(class) => (class, from + length),
                None => continue,
            }
        } else {
            match name_before(text, at, sign).and_then(class_of) {
                Some(class) => (class, from),
                None => continue,
            }
        };
        if let Some(value) = value(text, at, from, sign, class) {
            found.push(Found { at: value, name: "" });
        }
    }
}

fn is_blank(byte: u8) -> bool {
    byte == b' ' || byte == b'\t'
}

fn is_name(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-' | b'.')
}

/// The name that ends before a sign.
fn name_before(text: &str, at: usize, sign: Sign) -> Option<&str> {
    let bytes = text.as_bytes();
    let back = |mut end: usize, drop: &dyn Fn(u8) -> bool, most: usize| {
        let least = end.saturating_sub(most);
        while end > least && drop(bytes[end - 1]) {
            end -= 1;
        }
        end
    };
    let mut end = at;
    if matches!(sign, Sign::Colon | Sign::Equals) {
        if sign == Sign::Equals && end > 0 && bytes[end - 1] == b':' {
            end -= 1;
        }
        end = back(end, &is_blank, MAX_BLANKS);
        // `"name"`, `\"name\"`, `map["name"]`, `**name**`.
        end = back(end, &|byte| matches!(byte, b'"' | b'\'' | b'`' | b'\\' | b']' | b'*'), 4);
    }
    let start = back(end, &is_name, MAX_NAME);
    if start == end {
        return None;
    }
    if sign == Sign::Element && (start == 0 || bytes[start - 1] != b'<') {
        return None;
    }
    // `API key: …`
    if text[start..end].eq_ignore_ascii_case("key") && start > 0 && bytes[start - 1] == b' ' {
        return text.get(back(start - 1, &is_name, MAX_NAME)..end);
    }
    text.get(start..end)
}

fn class_of(name: &str) -> Option<Class> {
    // `PASSWORD_2`, `token1`
    let name = name.trim_end_matches(|c: char| c.is_ascii_digit()).trim_end_matches(['_', '-', '.']);
    let least = name.len().saturating_sub(24);
    let tail = (least..=name.len()).find(|at| name.is_char_boundary(*at)).and_then(|at| name.get(at..))?;
    let mut end = String::with_capacity(24);
    end.extend(tail.chars().filter(char::is_ascii_alphanumeric).map(|c| c.to_ascii_lowercase()));
    if PASSWORDS.iter().any(|word| end.ends_with(word)) {
        return Some(Class::Password);
    }
    if KEYS.iter().any(|word| end.ends_with(word)) {
        return Some(Class::Key);
    }
    WHOLE.iter().find_map(|(word, class)| {
        let before = name.len().checked_sub(word.len())?;
        let (head, tail) = (name.get(..before)?, name.get(before..)?);
        let camel = tail.starts_with(|c: char| c.is_ascii_uppercase())
            && head.ends_with(|c: char| c.is_ascii_lowercase());
        (tail.eq_ignore_ascii_case(word) && (head.is_empty() || head.ends_with(['_', '-', '.']) || camel))
            .then_some(*class)
    })
}

/// Where the secret is that stands after a sign, if there is one.
fn value(
    text: &str,
    sign_at: usize,
    from: usize,
    sign: Sign,
    class: Class,
) -> Option<std::ops::Range<usize>> {
    let bytes = text.as_bytes();
    let mut at = from;
    let limit = bytes.len().min(from + MAX_BLANKS);
    // `**Password:** …`
    while at < limit && (is_blank(bytes[at]) || (sign == Sign::Colon && bytes[at] == b'*')) {
        at += 1;
    }
    if sign == Sign::Colon && text.is_char_boundary(at) {
        let rest = text[at..boundary(text, at + MAX_NAME)].split('\n').next().unwrap_or_default();
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
    let line_end = line_end.map_or_else(|| boundary(text, end + MAX_LINE), |length| end + length);
    let behind = text[end..line_end].trim();
    let tight = sign == Sign::Tight;
    let line_start = boundary(text, sign_at.saturating_sub(MAX_LINE));
    let name_line = text[line_start..sign_at].rfind('\n').map_or(line_start, |at| line_start + at + 1);
    let place = Place {
        // Nothing but a comment behind it: code would go on, or end its line with a sign.
        last: behind.is_empty() || behind.starts_with('#'),
        prose: bytes.get(end) == Some(&b' ') && behind.starts_with(|c: char| c.is_alphanumeric()),
        tight,
        followed: bytes.get(end).copied().unwrap_or(b'\n'),
        file: tight && is_setting(&text[name_line..sign_at]),
        sign,
    };
    // Where nothing can follow, a value goes on to the next blank.
    if class == Class::Password && (sign == Sign::Colon || place.file) && !place.last {
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

/// The place, or the next one before it where a character begins.
fn boundary(text: &str, at: usize) -> usize {
    let at = at.min(text.len());
    (0..=at).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0)
}

#[derive(Clone, Copy)]
struct Place {
    last: bool,
    /// A word follows.
    prose: bool,
    tight: bool,
    followed: u8,
    /// Looks like a line of an environment or properties file, or a part of a connection string.
    file: bool,
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

/// Does it stand for a value, or say that there is none?
pub(super) fn is_placeholder(value: &str) -> bool {
    let lower = value.to_ascii_lowercase();
    let lower = lower.trim_end_matches(['.', ':', '!', '?']);
    let filler = |c: char| matches!(c, 'x' | '*' | '.' | '-' | '_' | '#' | '?' | '0' | '•' | '…' | '+' | '=');
    PLACEHOLDERS.contains(&lower)
        || lower.chars().all(filler)
        || lower.contains("...")
        || lower.contains('…')
        || [
            "your",
            "my-",
            "my_",
            "<",
            "{",
            "$",
            "%",
            "@@",
            "change",
            "replace",
            "insert",
            "example",
            "placeholder",
            "redacted",
            "(redacted",
            "env:",
            "file:",
            "vault:",
            "test-",
            "test_",
            "fake",
            "dummy",
            "xxx",
            "not-",
            "not_",
            "no-",
            "no_",
            "todo",
            "some-",
            "some_",
        ]
        .iter()
        .any(|start| lower.starts_with(start))
        || lower.contains("://")
        || lower.contains("${")
        || lower.contains("{{")
        || lower.contains("$(")
}

/// A path, a time, a size, a version, a date, a number with a unit.
fn is_plain(value: &str) -> bool {
    let path = value.starts_with(['/', '~', '\\']) || value.starts_with("./") || value.starts_with("../");
    let digits = value.bytes().take_while(u8::is_ascii_digit).count();
    let unit = digits > 0
        && value.len() - digits <= 4
        && value[digits..].bytes().all(|byte| byte.is_ascii_alphabetic() || byte == b'%');
    let version = value
        .trim_start_matches('v')
        .bytes()
        .all(|byte| byte.is_ascii_digit() || matches!(byte, b'.' | b'-' | b':' | b'/'));
    path || unit || (version && value.bytes().any(|byte| !byte.is_ascii_digit()))
}

/// Words joined by signs or humps, perhaps with a number at the end: a name, not a value.
fn is_words(value: &str) -> bool {
    let Pieces { signs, count, digits, .. } = Pieces::of(value);
    value.bytes().all(is_name)
        && digits <= 4
        && count >= 2
        && signs >= count * 3
        && value.contains(['_', '-', '.'])
}

fn quoted(value: &str, class: Class, sign: Sign) -> bool {
    let chars = value.chars().count();
    if chars < 4
        || is_placeholder(value)
        || value.contains(['<', '>', ' ', '\t', '\\', '(']) && class == Class::Key
    {
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
            let special = value.bytes().any(|byte| {
                byte.is_ascii_punctuation() && !is_name(byte) && byte != b'/' && byte != b':' && byte != b','
            });
            !is_words(value) && (mixes(value) || special || (single && chars >= 5 && sign != Sign::Call))
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
    let reference = value.contains('.')
        && !value.ends_with('.')
        && value.split('.').all(|part| {
            let Pieces { signs, count, .. } = Pieces::of(part);
            part.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_') && signs * 10 >= count * 25
        });
    if reference {
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
        Sign::Tight => place.tight,
        Sign::Flag | Sign::Element => true,
        Sign::Equals | Sign::Call => false,
    };
    if !written {
        return false;
    }
    let word = value.bytes().all(|byte| byte.is_ascii_alphanumeric());
    match class {
        Class::Password => (chars >= 6 && (mixes(value) || is_number(value))) || (place.file && word),
        Class::Key => {
            let Pieces { count, .. } = Pieces::of(value);
            (word && chars >= 8 && mixes(value) && (place.file || count >= 4))
                || (place.file && word && chars >= 12)
        }
    }
}
