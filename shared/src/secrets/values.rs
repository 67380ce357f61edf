//! What stands where a value does: a secret, or a placeholder, a path, a size, a word, a sentence.

use super::{
    Pieces, has_digit, is_number, is_random, mixes,
    names::{Class, class_of, is_name},
};

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
        || lower.contains("(redacted")
        || lower.contains("${")
        || lower.contains("{{")
        || lower.contains("$(")
}

/// A path, a time, a size, a version, a date, a number with a unit.
pub(super) fn is_plain(value: &str) -> bool {
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
pub(super) fn is_words(value: &str) -> bool {
    let Pieces { signs, count, digits, .. } = Pieces::of(value);
    value.bytes().all(is_name)
        && digits <= 4
        && count >= 2
        && signs >= count * 3
        && value.contains(['_', '-', '.'])
}

/// `self.config.auth2`: words with points between them.
pub(super) fn is_reference(value: &str) -> bool {
    value.contains('.')
        && !value.ends_with('.')
        && value.split('.').all(|part| {
            let Pieces { signs, count, .. } = Pieces::of(part);
            part.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_') && signs * 10 >= count * 25
        })
}

/// `$PASSWORD`, `<password>`, `{password}`, `(redacted)`: it says where the value comes from.
pub(super) fn is_named(value: &str) -> bool {
    value.starts_with(['$', '<', '{', '(', '[', '*', '…', '%', '&', '@']) || value.contains("${")
}

/// How kinds of hashes, ciphers, encodings and standards begin, which have a digit as passwords do.
const TERMS: &[&str] = &[
    "aes",
    "argon",
    "ascii",
    "base32",
    "base58",
    "base64",
    "base85",
    "bcrypt",
    "blake",
    "chacha",
    "crypt",
    "curve25519",
    "ec2",
    "ecdsa",
    "ed25519",
    "es256",
    "es384",
    "hmac",
    "hs256",
    "hs512",
    "http",
    "ipv",
    "iso",
    "k8s",
    "latin1",
    "md4",
    "md5",
    "ntlm",
    "oauth",
    "pbkdf",
    "pkcs",
    "poly1305",
    "ps256",
    "rfc",
    "ripemd",
    "rs256",
    "rs512",
    "rsa",
    "saml",
    "sha1",
    "sha2",
    "sha3",
    "sha5",
    "sha-",
    "sm2",
    "sm3",
    "sm4",
    "tls",
    "ulid",
    "unicode",
    "utf",
    "uuid",
    "varchar",
    "x25519",
    "x509",
    "xchacha",
];

fn is_term(value: &str) -> bool {
    let lower = value.to_ascii_lowercase();
    TERMS.iter().any(|term| lower.starts_with(term))
}

/// Not made of letters, digits and what joins words.
pub(super) fn has_special(value: &str) -> bool {
    value
        .bytes()
        .any(|byte| byte.is_ascii_punctuation() && !is_name(byte) && !matches!(byte, b'/' | b':' | b','))
}

/// Is this a secret, though only a sentence, a table or a pair says so? Marks of code are left out beforehand.
pub(super) fn is_stated(value: &str, class: Class, quoted: bool) -> bool {
    let inner = value.trim_end_matches(['.', ',', ';', ':', '!', '?', ')', '\'']);
    if is_placeholder(value)
        || is_named(value)
        || is_plain(inner)
        || (is_words(inner) && !(quoted && has_special(value)))
        || is_term(value)
        || is_reference(inner)
        || class_of(inner).is_some()
        || value.contains(['(', '[', '{', '<', '>', '|', '\\'])
        || value.contains("::")
        || value.starts_with(['/', '.', '-', '#', '@'])
    {
        return false;
    }
    match class {
        Class::Key => {
            // Names of versions and models have signs within.
            let one = quoted && value.bytes().all(|byte| byte.is_ascii_alphanumeric());
            is_random(value, if one { 12 } else { 16 }) && !value.contains('/')
        }
        Class::Password => {
            if !mixes(inner) || inner.chars().count() < 6 {
                return false;
            }
            let upper = inner.bytes().any(|byte| byte.is_ascii_uppercase());
            let lower = inner.bytes().any(|byte| byte.is_ascii_lowercase());
            let digits = inner.bytes().filter(u8::is_ascii_digit).count();
            quoted
                || has_special(inner)
                || (upper && lower && inner.len() >= 8)
                || digits >= 2 && inner.len() >= 7
        }
    }
}

/// Where the second part of `user/password` or `user:password` is, after blanks.
pub(super) fn second_of_pair(text: &str) -> Option<std::ops::Range<usize>> {
    let user = |byte: u8| is_name(byte) || byte == b'@';
    let blank = |byte: u8| byte == b' ';
    let bytes = text.as_bytes();
    let skip = |at: usize, over: &dyn Fn(u8) -> bool| {
        at + bytes[at..].iter().take(64).take_while(|byte| over(**byte)).count()
    };
    let at = skip(0, &blank);
    let at = skip(at, &|byte| byte == b'`' || byte == b'"');
    let end = skip(at, &user);
    let joint = skip(end, &blank);
    if end == at || !matches!(bytes.get(joint), Some(b'/' | b':')) {
        return None;
    }
    let start = skip(joint + 1, &blank);
    let stops = |c: char| c.is_whitespace() || matches!(c, '`' | '"' | ',' | ';' | '|' | '<' | '>' | ')');
    let rest = &text[start..];
    let length = rest.find(stops).unwrap_or(rest.len());
    let value = &rest[..length];
    is_stated(value, Class::Password, true).then(|| start..start + length)
}

/// Words of sentences about secrets, and of labels: no passphrase is made of them. In lower case.
const PROSE: &[&str] = &[
    "a",
    "about",
    "after",
    "again",
    "against",
    "all",
    "allowed",
    "also",
    "always",
    "an",
    "and",
    "are",
    "as",
    "at",
    "auf",
    "aus",
    "be",
    "bei",
    "before",
    "below",
    "between",
    "bits",
    "both",
    "but",
    "by",
    "bytes",
    "called",
    "can",
    "cannot",
    "changed",
    "characters",
    "chars",
    "check",
    "chosen",
    "confirm",
    "contains",
    "create",
    "current",
    "das",
    "days",
    "dem",
    "den",
    "der",
    "des",
    "die",
    "digits",
    "do",
    "does",
    "don't",
    "each",
    "ein",
    "eine",
    "either",
    "else",
    "enter",
    "every",
    "expires",
    "field",
    "first",
    "for",
    "forgot",
    "format",
    "from",
    "für",
    "generate",
    "generated",
    "get",
    "given",
    "has",
    "have",
    "here",
    "hours",
    "how",
    "if",
    "im",
    "in",
    "ins",
    "into",
    "is",
    "ist",
    "it",
    "its",
    "keep",
    "key",
    "keys",
    "kein",
    "last",
    "least",
    "length",
    "letters",
    "like",
    "log",
    "long",
    "longer",
    "looks",
    "los",
    "match",
    "matches",
    "max",
    "maximum",
    "may",
    "minimum",
    "min",
    "minutes",
    "mit",
    "more",
    "most",
    "must",
    "my",
    "need",
    "needs",
    "never",
    "new",
    "nicht",
    "nur",
    "of",
    "oder",
    "old",
    "one",
    "only",
    "or",
    "our",
    "out",
    "per",
    "please",
    "read",
    "repeat",
    "rotated",
    "same",
    "see",
    "seconds",
    "set",
    "shall",
    "short",
    "should",
    "sie",
    "siehe",
    "sign",
    "signs",
    "so",
    "stored",
    "such",
    "symbols",
    "than",
    "that",
    "the",
    "their",
    "them",
    "then",
    "there",
    "they",
    "this",
    "times",
    "to",
    "too",
    "type",
    "und",
    "under",
    "until",
    "update",
    "use",
    "used",
    "uses",
    "von",
    "was",
    "weak",
    "were",
    "what",
    "when",
    "where",
    "which",
    "who",
    "wie",
    "will",
    "wird",
    "with",
    "within",
    "without",
    "words",
    "years",
    "you",
    "your",
    "zeichen",
    "zu",
    "zum",
    "zur",
    "über",
];

pub(super) fn is_prose(word: &str) -> bool {
    PROSE.contains(&word)
}

/// A passphrase of several words, rather than a sentence or a label. Without quotes more is asked of it.
pub(super) fn is_phrase(value: &str, class: Class, quoted: bool) -> bool {
    let words: Vec<&str> = value.split_whitespace().take(9).collect();
    let ordinary = |word: &str| {
        let lower = word.to_lowercase();
        let lower = lower.trim_end_matches(['.', ',', '!', '?']);
        lower.len() > 24
            || is_prose(lower)
            || is_placeholder(lower)
            || class_of(lower).is_some()
            || is_term(lower)
            || !word.chars().all(|c| c.is_alphanumeric() || matches!(c, '-' | '!' | '?' | '\''))
    };
    if !(2..=8).contains(&words.len()) || words.iter().any(|word| ordinary(word)) {
        return false;
    }
    let low = words.iter().all(|word| !word.chars().any(char::is_uppercase));
    match class {
        Class::Password if quoted => low || words.len() >= 4 || words.iter().any(|word| has_digit(word)),
        Class::Password => {
            low && (words.len() >= 4 || words.iter().any(|word| has_digit(word))) && !is_number(words[0])
        }
        // Groups of the same length.
        Class::Key => {
            let one = words[0].len();
            quoted && low && one >= 4 && words.iter().all(|word| word.len() == one)
        }
    }
}
