//! What is done to every text that others wrote, where it comes in: characters that do not belong
//! into text are dropped, and what looks like a secret is taken out before it can leave for an API.

use std::{borrow::Cow, sync::LazyLock};

use regex::{Captures, Regex, RegexSet};

/// Cleans a text of several lines.
pub(super) fn text(raw: &str) -> String {
    if raw.bytes().all(|byte| matches!(byte, b'\n' | b'\t' | b' '..=b'~')) {
        return redact(raw).into_owned();
    }
    let kept: String = raw.replace("\r\n", "\n").chars().filter_map(keep).collect();
    redact(&kept).into_owned()
}

/// Cleans a text and puts it on one line.
pub(super) fn line(raw: &str) -> String {
    let text = text(raw);
    if is_one_line(&text) { text } else { text.split_whitespace().collect::<Vec<_>>().join(" ") }
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

/// A pattern of secrets and what is put in its place.
struct Pattern {
    regex: Regex,
    /// What it is; shown in its place.
    name: &'static str,
}

/// What secrets look like. Each pattern names a prefix that its issuer documents, so that ordinary
/// text does not match. Word boundaries are ASCII: the engine's fast automata know no others.
static PATTERNS: LazyLock<Vec<Pattern>> = LazyLock::new(|| {
    [
        (
            "private key",
            r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY( BLOCK)?-----[\s\S]*?(-----END [A-Z0-9 ]{0,40}PRIVATE KEY( BLOCK)?-----|\z)",
        ),
        ("AWS key", r"(?-u:\b)(?:AKIA|ASIA|ABIA|ACCA)[0-9A-Z]{16}(?-u:\b)"),
        ("API key", r"(?-u:\b)sk-[A-Za-z0-9_-]{20,}"),
        ("GitHub token", r"(?-u:\b)(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{22,})"),
        ("GitLab token", r"(?-u:\b)glpat-[A-Za-z0-9_-]{20,}"),
        ("Slack token", r"(?-u:\b)xox[abeoprs]-[A-Za-z0-9-]{10,}"),
        ("Google API key", r"(?-u:\b)AIza[0-9A-Za-z_-]{35}"),
        ("Stripe key", r"(?-u:\b)[rs]k_(?:live|test)_[0-9A-Za-z]{16,}"),
        ("npm token", r"(?-u:\b)npm_[A-Za-z0-9]{36}(?-u:\b)"),
        ("Google OAuth token", r"(?-u:\b)ya29\.[A-Za-z0-9_-]{20,}"),
        ("Hugging Face token", r"(?-u:\b)hf_[A-Za-z0-9]{30,}"),
        ("SendGrid key", r"(?-u:\b)SG\.[A-Za-z0-9_-]{16,}\.[A-Za-z0-9_-]{16,}"),
        ("PyPI token", r"(?-u:\b)pypi-[A-Za-z0-9_-]{32,}"),
        ("DigitalOcean token", r"(?-u:\b)do[opr]_v1_[a-f0-9]{40,}"),
        ("Supabase key", r"(?-u:\b)(?:sbp_[a-f0-9]{40}|sb_secret_[A-Za-z0-9_-]{20,})"),
        ("Slack webhook", r"(?-u:\b)https://hooks\.slack\.com/services/[A-Za-z0-9/_-]{20,}"),
        ("age key", r"(?-u:\b)AGE-SECRET-KEY-1[0-9A-Z]{50,}"),
        ("Azure key", r"(?i)(?-u:\b)(?:AccountKey|SharedAccessKey)=[A-Za-z0-9+/]{32,}={0,2}"),
        ("JWT", r"(?-u:\b)eyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*"),
    ]
    .into_iter()
    .filter_map(|(name, pattern)| Some(Pattern { name, regex: Regex::new(pattern).ok()? }))
    .collect()
});

/// `scheme://user:password@host`.
static URL_PASSWORD: LazyLock<Option<Regex>> =
    LazyLock::new(|| Regex::new(r"((?-u:\b)[a-z][a-z0-9+.-]*://[^\s:/@]{1,64}:)([^\s@/]{1,256})@").ok());

/// `api_key = "…"` and its like; the value is judged by [`looks_random`].
static ASSIGNMENT: LazyLock<Option<Regex>> = LazyLock::new(|| {
    Regex::new(
        r#"(?i)(?-u:\b)([a-z0-9_.-]{0,40}(?:passw(?:or)?d|secret|api[_-]?key|access[_-]?key|auth[_-]?token|token)["']?\s*(?:=|:|=>)\s*["']?)([A-Za-z0-9+/_=.~-]{16,})"#,
    )
    .ok()
});

/// `Authorization: Bearer …`; the value is judged by [`looks_random`].
static AUTHORIZATION: LazyLock<Option<Regex>> =
    LazyLock::new(|| Regex::new(r"(?i)(?-u:\b)((?:bearer|basic)\s+)([A-Za-z0-9+/_=.~-]{16,})").ok());

/// `password = "…"`, in quotes: people choose shorter ones than machines do, with a digit in them.
static PASSWORD: LazyLock<Option<Regex>> = LazyLock::new(|| {
    Regex::new(
        r#"(?i)(?-u:\b)((?:passw(?:or)?d|passphrase|pwd)["']?\s*(?:=|:|=>)\s*["'])([^"'\s${}<>()]{6,64})(["'])"#,
    )
    .ok()
});

/// All patterns in one pass: nearly every text has no secret at all. `None` cannot happen, as a test
/// shows; then every pattern is tried.
static ANY: LazyLock<Option<RegexSet>> = LazyLock::new(|| {
    let others = [&*URL_PASSWORD, &*ASSIGNMENT, &*AUTHORIZATION, &*PASSWORD].into_iter().flatten();
    RegexSet::new(PATTERNS.iter().map(|pattern| &pattern.regex).chain(others).map(Regex::as_str)).ok()
});

/// Takes out what looks like a secret.
pub(super) fn redact(text: &str) -> Cow<'_, str> {
    if !may_hold_a_secret(text) || ANY.as_ref().is_some_and(|any| !any.is_match(text)) {
        return Cow::Borrowed(text);
    }
    let mut text = Cow::Borrowed(text);
    for Pattern { regex, name } in PATTERNS.iter() {
        replace(&mut text, regex, |_| format!("(redacted {name})"));
    }
    if let Some(regex) = &*URL_PASSWORD {
        replace(&mut text, regex, |found| format!("{}(redacted)@", &found[1]));
    }
    for regex in [&*ASSIGNMENT, &*AUTHORIZATION].into_iter().flatten() {
        replace(&mut text, regex, |found| {
            if looks_random(&found[2]) { format!("{}(redacted)", &found[1]) } else { found[0].to_owned() }
        });
    }
    if let Some(regex) = &*PASSWORD {
        replace(&mut text, regex, |found| {
            let chosen = found[2].bytes().any(|byte| byte.is_ascii_digit())
                && found[2].bytes().any(|byte| byte.is_ascii_alphabetic());
            if chosen { format!("{}(redacted){}", &found[1], &found[3]) } else { found[0].to_owned() }
        });
    }
    text
}

/// Says no where no pattern can match, which most sentences show by themselves: every secret is a long run
/// of the signs that keys are made of, or a password in a URL or in quotes.
fn may_hold_a_secret(text: &str) -> bool {
    /// The shortest run of any pattern: `xoxb-` and ten signs.
    const SHORTEST: usize = 15;
    if !text.is_ascii() {
        return true;
    }
    let bytes = text.as_bytes();
    let (mut run, mut longest, mut quoted) = (0, 0, false);
    for (at, byte) in bytes.iter().enumerate() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'/' | b'_' | b'=' | b'.' | b'~' | b'-') {
            run += 1;
            if *byte == b'-' && bytes[at..].starts_with(b"-----BEGIN") {
                return true;
            }
        } else {
            longest = longest.max(run);
            run = 0;
            quoted |= matches!(byte, b'"' | b'\'');
            if *byte == b':' && bytes[at..].starts_with(b"://") {
                return true;
            }
        }
    }
    let named = |letters: &[u8]| letters.eq_ignore_ascii_case(b"pas") || letters.eq_ignore_ascii_case(b"pwd");
    longest.max(run) >= SHORTEST || (quoted && bytes.windows(3).any(named))
}

/// Replaces every match; a text without one stays as it is.
fn replace(text: &mut Cow<'_, str>, regex: &Regex, by: impl Fn(&Captures<'_>) -> String) {
    let replaced = match regex.replace_all(text, by) {
        Cow::Borrowed(_) => return,
        Cow::Owned(replaced) => replaced,
    };
    *text = Cow::Owned(replaced);
}

/// Names and words are not secrets; a mix of digits and letters of both cases is.
fn looks_random(value: &str) -> bool {
    let digits = value.bytes().filter(u8::is_ascii_digit).count();
    let upper = value.bytes().any(|byte| byte.is_ascii_uppercase());
    let lower = value.bytes().any(|byte| byte.is_ascii_lowercase());
    let hex = value.len() >= 32 && value.bytes().all(|byte| byte.is_ascii_hexdigit());
    hex || (digits >= 3 && upper && lower)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn every_pattern_compiles() {
        assert_eq!(PATTERNS.len(), 19);
        for regex in [&URL_PASSWORD, &ASSIGNMENT, &AUTHORIZATION, &PASSWORD] {
            assert!(regex.is_some());
        }
        assert!(ANY.is_some());
    }

    /// Put together here, so that no scanner takes this file for a leak.
    fn secrets() -> Vec<String> {
        let long = "aB3dE5fG7hJ9kL1mN3pQ5rS7tU9vW1xY3zA5b";
        vec![
            format!("AKIA{}", "ABCDEFGHIJ234567"),
            format!("sk-proj-{long}"),
            format!("ghp_{long}"),
            format!("github_pat_{long}"),
            format!("glpat-{long}"),
            format!("xoxb-{long}"),
            format!("AIza{}", &long[..35]),
            format!("sk_live_{long}"),
            format!("npm_{}", &long[..36]),
            format!("eyJ{long}.eyJ{long}.{long}"),
            format!("ya29.{long}"),
            format!("hf_{long}"),
            format!("SG.{long}.{long}"),
            format!("pypi-{long}"),
            format!("dop_v1_{}", "0a1b2c3d4e".repeat(6)),
            format!("sbp_{}", "0a1b2c3d4e".repeat(4)),
            format!("sb_secret_{long}"),
            format!("https://hooks.slack.com/services/T0/B0/{long}"),
            format!("AGE-SECRET-KEY-1{}", "QP0ZRY9X8G".repeat(6)),
            format!("AccountKey={long}{long}=="),
            format!("-----BEGIN RSA PRIVATE {}-----\n{long}\n{long}\n-----END RSA PRIVATE KEY-----", "KEY"),
            format!("-----BEGIN OPENSSH PRIVATE {}-----\n{long}", "KEY"),
        ]
    }

    #[test]
    fn secrets_do_not_pass() {
        for secret in secrets() {
            let cleaned = text(&format!("before {secret} after"));
            assert!(cleaned.starts_with("before (redacted "), "{secret}: {cleaned}");
            assert!(!cleaned.contains("aB3dE5"), "{cleaned}");
        }
        assert_eq!(text("postgres://app:hunter2@db/atlas"), "postgres://app:(redacted)@db/atlas");
        assert_eq!(text("API_KEY=\"aB3dE5fG7hJ9kL1m\""), "API_KEY=\"(redacted)\"");
        assert_eq!(text("Authorization: Bearer aB3dE5fG7hJ9kL1m"), "Authorization: Bearer (redacted)");
        assert_eq!(text("password: 'hunter2!'"), "password: '(redacted)'");
    }

    #[test]
    fn no_secret_is_overlooked_by_the_first_look() {
        let shortest = ["xoxb-0123456789", "pwd='abcde1'", "a://b:c@d", "PASSWD = \"abcde1\""];
        for secret in secrets().into_iter().chain(shortest.map(str::to_owned)) {
            assert!(may_hold_a_secret(&secret), "{secret}");
            assert!(ANY.as_ref().unwrap().is_match(&secret), "{secret}");
        }
        assert!(!may_hold_a_secret("A worker's lease is renewed, or it's taken over \"at once\" (60 s)."));
    }

    #[test]
    fn ordinary_text_passes_untouched() {
        for ordinary in [
            "Set OPENAI_API_KEY and OPENAI_BASE_URL=https://api.openai.com/v1.",
            "let token = tokenizer_for_the_model(name);",
            "secret: service_role_key_of_the_project",
            "sk-learn is a library; task_id and disk-usage are words",
            "http://localhost:8501/v1/query_chat",
            "commit 3f9a2c1b and port 8000",
            "Authorization: Bearer $SERVICE_ROLE_KEY_OF_THE_PROJECT",
            "password: \"changeme\", pwd = '${DB_PASSWORD_2}', \"password\": \"<yours, 8 signs>\"",
            "a basic understanding-of-the-architecture is enough",
        ] {
            assert_eq!(text(ordinary), ordinary);
        }
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
        fn where_the_first_look_says_no_no_pattern_matches(
            parts in prop::collection::vec(
                prop_oneof![
                    "[A-Za-z0-9_=/+.~-]{0,18}",
                    "[ \"':=>@,]{1,3}",
                    prop::sample::select(vec![
                        "AKIA", "sk-", "ghp_", "xoxb-", "AIza", "sk_live_", "-----BEGIN ", "PRIVATE KEY-----",
                        "password", "Pwd", "passphrase", "secret", "api_key", "Bearer ", "token", "://", "eyJ", "SG.",
                    ]).prop_map(str::to_owned),
                ],
                0..12,
            ),
        ) {
            let text = parts.concat();
            if !may_hold_a_secret(&text) {
                prop_assert!(!ANY.as_ref().is_some_and(|any| any.is_match(&text)), "{}", text);
            }
        }

        #[test]
        fn any_text_can_be_cleaned_and_cut(raw in "\\PC{0,200}", max in 0_usize..50) {
            let cleaned = text(&raw);
            prop_assert_eq!(&text(&cleaned), &cleaned);
            prop_assert!(cut(&raw, max).chars().count() <= max + 1);
            let _ = cut_middle(&raw, max);
        }
    }
}
