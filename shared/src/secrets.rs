//! What secrets look like: one set of rules for everything that reads other people's texts.
//!
//! Two questions are asked with different stakes. [`find`] decides whether a whole document is left
//! out of the index, so it knows only what issuers of credentials give out: a prefix and a length that
//! nothing else has. [`redact`] decides which few characters do not leave for an API, so it also takes
//! what the words around it make a secret: `password: …`, `curl -u …`, a URL with a password, a key
//! whose first or last line is in another passage. A false alarm costs a document there, a word here.
//!
//! Both take time linear in the text. Neither ever returns, prints or logs what it found.

use std::{borrow::Cow, ops::Range, sync::LazyLock};

use regex::{Captures, Regex, RegexSet};

mod assigned;
mod keys;

/// Credentials by the form that their issuer gives them.
struct Form {
    /// With its article: "an AWS access key".
    what: &'static str,
    /// What it begins with: these words, separated by `|`. Looking for them is one fast pass, and few texts have any.
    marks: &'static str,
    /// All of it, marks included.
    pattern: &'static str,
    /// How a document must look to be left out; `None`: nothing of this form is reason enough.
    refused: Option<&'static str>,
}

const fn form(what: &'static str, marks: &'static str, pattern: &'static str) -> Form {
    Form { what, marks, pattern, refused: Some(pattern) }
}

impl Form {
    /// Documents must show more than a passage to be left out.
    const fn refused(self, pattern: &'static str) -> Self {
        Self { refused: Some(pattern), ..self }
    }

    /// Too common in ordinary documents, or of too little use to a thief.
    const fn never_refused(self) -> Self {
        Self { refused: None, ..self }
    }
}

const API_KEY: &str = "an API key";

/// Sources: the issuers' documentation, and the patterns that GitHub's secret scanning names.
const FORMS: &[Form] = &[
    form("an AWS access key", "AKIA|ASIA|ABIA|ACCA", "(?:AKIA|ASIA|ABIA|ACCA)[0-9A-Z]{16}(?-u:\\b)"),
    form("a GitHub token", "ghp_|gho_|ghu_|ghs_|ghr_|github_pat_", "(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{22,})")
        .refused("(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{60,})"),
    form("a GitLab token", "glpat-|glrt-|gldt-|glptt-|glsoat-", "gl(?:pat|rt|dt|ptt|soat)-[A-Za-z0-9_-]{20,}"),
    // OpenAI, Anthropic, OpenRouter, DeepSeek and many others.
    form(API_KEY, "sk-", "sk-[A-Za-z0-9_-]{20,}").refused(
        "sk-(?:(?:proj-|svcacct-|admin-|or-v1-)?[A-Za-z0-9]{20}[A-Za-z0-9_-]{12,}|ant-[A-Za-z0-9]{2,8}-[A-Za-z0-9_-]{40,})",
    ),
    form("a Google API key", "AIza", "AIza[0-9A-Za-z_-]{35}"),
    form("a Google client secret", "GOCSPX-", "GOCSPX-[A-Za-z0-9_-]{24,}"),
    form("a Google OAuth token", "ya29.", r"ya29\.[A-Za-z0-9_-]{20,}"),
    form("a Slack token", "xox", "xox[abeoprs]-[A-Za-z0-9-]{10,}")
        .refused("xox[abeoprs]-[0-9]{8,}-[A-Za-z0-9-]{10,}"),
    form("a Slack webhook", "https://hooks.slack", r"https://hooks\.slack\.com/services/[A-Za-z0-9/_-]{20,}")
        .never_refused(),
    form("a Stripe key", "sk_live_|rk_live_|sk_test_|rk_test_", "[rs]k_(?:live|test)_[0-9A-Za-z]{16,}")
        .refused("[rs]k_live_[0-9A-Za-z]{20,}"),
    form("a webhook secret", "whsec_", "whsec_[A-Za-z0-9+/]{24,}={0,2}"),
    form("an npm token", "npm_", "npm_[A-Za-z0-9]{36}(?-u:\\b)"),
    form("a PyPI token", "pypi-A", "pypi-A[A-Za-z0-9_-]{31,}").refused("pypi-AgEIcHlwaS5vcmc[A-Za-z0-9_-]{40,}"),
    form("a Hugging Face token", "hf_", "hf_[A-Za-z0-9]{30,}").refused("hf_[A-Za-z0-9]{34,}(?-u:\\b)"),
    form("a SendGrid key", "SG.", r"SG\.[A-Za-z0-9_-]{16,}\.[A-Za-z0-9_-]{16,}"),
    form("a DigitalOcean token", "doo_v1_|dop_v1_|dor_v1_", "do[opr]_v1_[a-f0-9]{40,}"),
    form("a Supabase key", "sbp_|sb_secret_", "(?:sbp_[a-f0-9]{40}|sb_secret_[A-Za-z0-9_-]{20,})"),
    form("an age key", "AGE-SECRET-KEY-1", "AGE-SECRET-KEY-1[0-9A-Z]{50,}"),
    form("a Groq key", "gsk_", "gsk_[A-Za-z0-9]{40,}"),
    form("an xAI key", "xai-", "xai-[A-Za-z0-9]{40,}"),
    form("a Shopify token", "shp", "shp(?:at|ca|pa|ss)_[a-fA-F0-9]{32}"),
    form("a Databricks token", "dapi", "dapi[a-f0-9]{32}(?:-[0-9])?(?-u:\\b)"),
    form("a New Relic key", "NRAK-", "NRAK-[A-Z0-9]{27}"),
    form("a Linear key", "lin_", "lin_(?:api|oauth)_[A-Za-z0-9]{32,}"),
    form("a Replicate token", "r8_", "r8_[A-Za-z0-9]{37}(?-u:\\b)"),
    form("a Vault token", "hvs.|hvb.|hvr.", r"hv[sbr]\.[A-Za-z0-9_-]{20,}"),
    form("an Atlassian token", "ATATT3x", "ATATT3x[A-Za-z0-9_=-]{40,}"),
    form("a PlanetScale password", "pscale_", "pscale_(?:pw|tkn|oauth)_[A-Za-z0-9_.-]{30,}"),
    form("a Doppler token", "dp.", r"dp\.(?:pt|st|ct|sa|scim|audit)\.[A-Za-z0-9_.-]{36,}"),
    form("a Sentry token", "sntry", "sntry[su]_[A-Za-z0-9_=+/-]{40,}"),
    form("a Grafana token", "glsa_", "glsa_[A-Za-z0-9]{32}_[A-Fa-f0-9]{8}"),
    form("an NVIDIA key", "nvapi-", "nvapi-[A-Za-z0-9_-]{40,}"),
    form("a Perplexity key", "pplx-", "pplx-[A-Za-z0-9]{40,}"),
    form("a Docker token", "dckr_pat_", "dckr_pat_[A-Za-z0-9_-]{20,}"),
    form("a Tailscale key", "tskey-", "tskey-[a-z]{2,12}-[A-Za-z0-9_-]{16,}"),
    form("a Mailgun key", "key-", "key-[0-9a-f]{32}(?-u:\\b)").never_refused(),
    form("a Twilio key", "SK", "SK[0-9a-f]{32}(?-u:\\b)").never_refused(),
    form("an Azure key", "", "(?i:(?:Account|SharedAccess)Key=[A-Za-z0-9+/]{32,}={0,2})")
        .never_refused(),
    form("a JWT", "eyJ", r"eyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*").never_refused(),
];

/// The shortest run of [`FORMS`]: `xoxb-` and ten more.
const ISSUED_RUN: usize = 15;

/// Forms whose first characters are common ones: looked for only where there is a run as long as they are.
const UNMARKED: &[(&str, &str)] = &[
    ("a Telegram bot token", "[0-9]{8,10}:AA[A-Za-z0-9_-]{32,34}(?-u:\\b)"),
    ("a Discord bot token", r"[MNO][A-Za-z0-9_-]{22,27}\.[A-Za-z0-9_-]{6}\.[A-Za-z0-9_-]{27,40}(?-u:\b)"),
];

/// The shortest run of [`UNMARKED`]: what stands after the colon of a Telegram token.
const UNMARKED_RUN: usize = 34;

/// Enough of a private key that a document which only names its first line is left alone.
const PRIVATE_KEY: Form = form(
    "a private key",
    "-----BEGIN ",
    r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----(?:[\s>#*+]|\\[nr])*[A-Za-z0-9+/=]{16}",
);

/// Regexes of one list, and all of them in one.
struct Compiled {
    each: Vec<(&'static str, Regex)>,
    any: Option<RegexSet>,
}

impl Compiled {
    /// Patterns are literals; a test compiles them all. They begin at a word's begin, in ASCII: the engine's
    /// fast automata know no others.
    fn new(patterns: impl Iterator<Item = (&'static str, String)>) -> Self {
        let each: Vec<_> =
            patterns.filter_map(|(what, pattern)| Some((what, Regex::new(&pattern).ok()?))).collect();
        let any = RegexSet::new(each.iter().map(|(_, regex)| regex.as_str())).ok();
        Self { each, any }
    }

    /// Those that match.
    fn matching<'a>(&'a self, text: &str) -> Vec<&'a (&'static str, Regex)> {
        match &self.any {
            Some(any) if !any.is_match(text) => Vec::new(),
            Some(any) => any.matches(text).iter().map(|index| &self.each[index]).collect(),
            None => self.each.iter().collect(),
        }
    }
}

fn at_word(pattern: &str) -> String {
    format!("(?-u:\\b){pattern}")
}

/// Its first signs, what it is, and all of it from its first sign on.
type Refused = (&'static str, &'static Form, Regex);

/// What documents are left out for, by its first byte.
static REFUSED: LazyLock<Vec<Vec<Refused>>> = LazyLock::new(|| {
    let mut by_byte: Vec<Vec<_>> = std::iter::repeat_with(Vec::new).take(256).collect();
    for form in [&PRIVATE_KEY].into_iter().chain(FORMS) {
        let regex = form.refused.and_then(|pattern| Regex::new(&format!("^(?:{pattern})")).ok());
        let Some(regex) = regex else { continue };
        for mark in form.marks.split('|') {
            if let Some(first) = mark.bytes().next() {
                by_byte[usize::from(first)].push((mark, form, regex.clone()));
            }
        }
    }
    by_byte
});

/// All first signs of [`REFUSED`]: literals, which the engine looks for many bytes at a time.
static MARKS: LazyLock<Option<Regex>> = LazyLock::new(|| {
    let marks: Vec<String> = REFUSED.iter().flatten().map(|(mark, _, _)| regex::escape(mark)).collect();
    Regex::new(&marks.join("|")).ok()
});

/// The first credential of a document by which it is left out of an index: what it is, with an article, and
/// its line, counted from 1.
pub fn find(text: &str) -> Option<(&'static str, usize)> {
    let (refused, marks) = (&*REFUSED, MARKS.as_ref()?);
    let bytes = text.as_bytes();
    let mut from = 0;
    while let Some(found) = marks.find_at(text, from) {
        let at = found.start();
        // Not behind it: one mark may begin within another. They are ASCII, so this is no middle of a character.
        from = at + 1;
        // `sk-` within `risk-` begins nothing.
        if at > 0 && (bytes[at - 1].is_ascii_alphanumeric() || bytes[at - 1] == b'_') {
            continue;
        }
        for (mark, form, regex) in &refused[usize::from(bytes[at])] {
            if bytes[at..].starts_with(mark.as_bytes())
                && regex.find(&text[at..]).is_some_and(|found| is_key(form.what, found.as_str()))
            {
                return Some((form.what, text[..at].matches('\n').count() + 1));
            }
        }
    }
    None
}

static ISSUED: LazyLock<Compiled> =
    LazyLock::new(|| Compiled::new(FORMS.iter().map(|form| (form.what, at_word(form.pattern)))));

static UNMARKED_FORMS: LazyLock<Compiled> =
    LazyLock::new(|| Compiled::new(UNMARKED.iter().map(|(what, pattern)| (*what, at_word(pattern)))));

/// `scheme://user:password@host`, also without a user. The password is the second group.
const URL_PASSWORD: &str = r#"(://[^\s:/@"'<>]{0,64}:)([^\s/"'<>]{1,256})@"#;

/// Sentences of protocols and tools that hold a secret; the second group.
const SPOKEN: &[(&str, &str)] = &[
    (
        "authorization",
        r#"(?i)((?-u:\b)authorization["'\])]*\s*[:=,]\s*["']?(?:[a-z]{2,16}\s+)?)([A-Za-z0-9+/_=.~-]{8,512})"#,
    ),
    ("bearer", r"(?i)((?-u:\b)(?:bearer|basic)\s+)([A-Za-z0-9+/_=.~-]{16,512})"),
    ("user", r#"((?:\s-u\s?|--user[= ]|--proxy-user[= ])["']?[^\s:"'$<]{1,64}:)([^\s"'$<]{3,256})"#),
    (
        "signature",
        r"(?i)([?&;](?:sig|signature|x-amz-signature|x-amz-security-token)=)([A-Za-z0-9%+/_=-]{20,})",
    ),
    ("sql", r"(?i)((?-u:\b)(?:password|identified by)\s+')([^'\n]{4,128})'"),
];

static SPOKEN_FORMS: LazyLock<Compiled> =
    LazyLock::new(|| Compiled::new(SPOKEN.iter().map(|(what, pattern)| (*what, (*pattern).to_owned()))));

static URL_FORM: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new(URL_PASSWORD).ok());

/// Something to take out.
struct Found {
    at: Range<usize>,
    /// What is put in its place: "private key", or nothing more than that something was there.
    name: &'static str,
}

/// Takes out what looks like a secret, and leaves the lines where they are.
pub fn redact(text: &str) -> Cow<'_, str> {
    let mut found = look(text);
    if found.is_empty() {
        return Cow::Borrowed(text);
    }
    // Where two overlap the one that begins first gives the name, and both go.
    found.sort_by(|a, b| a.at.start.cmp(&b.at.start).then(b.name.len().cmp(&a.name.len())));
    let mut out = String::with_capacity(text.len());
    let mut done = 0;
    let mut rest = found.into_iter().peekable();
    while let Some(Found { mut at, name }) = rest.next() {
        while let Some(next) = rest.next_if(|next| next.at.start < at.end) {
            at.end = at.end.max(next.at.end);
        }
        out.push_str(&text[done..at.start]);
        out.push_str(if name.is_empty() { "(redacted" } else { "(redacted " });
        out.push_str(name);
        out.push(')');
        out.extend(text[at.clone()].chars().filter(|c| *c == '\n'));
        done = at.end;
    }
    out.push_str(&text[done..]);
    Cow::Owned(out)
}

fn look(text: &str) -> Vec<Found> {
    let Glance { longest, signs, spoken } = Glance::at(text);
    if longest < ISSUED_RUN && !signs && !spoken {
        return Vec::new();
    }
    let mut found = keys::find(text, longest);
    for (least, forms) in [(ISSUED_RUN, &ISSUED), (UNMARKED_RUN, &UNMARKED_FORMS)] {
        if longest < least {
            continue;
        }
        for (what, regex) in forms.matching(text) {
            let real = regex.find_iter(text).filter(|found| is_key(what, found.as_str()));
            let name = what.split_once(' ').map_or(*what, |(_, name)| name);
            found.extend(real.map(|it| Found { at: it.range(), name }));
        }
    }
    if let Some(regex) = URL_FORM.as_ref().filter(|_| text.contains("://")) {
        // `postgres://USER:PASSWORD@HOST` says where it goes.
        let named = |value: &str| {
            assigned::is_placeholder(value) && !value.bytes().any(|byte| byte.is_ascii_lowercase())
        };
        found.extend(regex.captures_iter(text).filter_map(|it| second(&it, |value| !named(value))));
    }
    // `authorization` is itself a run of this length.
    let spoken = if spoken || longest >= 13 { SPOKEN_FORMS.matching(text) } else { Vec::new() };
    for (what, regex) in spoken {
        let judge = |it: &Captures<'_>| match *what {
            "authorization" => second(it, |value| is_random(value, 8) || value.ends_with('=')),
            "bearer" => second(it, |value| is_random(value, 16)),
            "user" => {
                let start = it.get(0).map_or(0, |all| all.start());
                second(it, |value| !is_number(value) && (mixes(value) || is_curl(text, start)))
            }
            "sql" => second(it, |value| !value.contains(' ') && !assigned::is_placeholder(value)),
            _ => second(it, |_| true),
        };
        found.extend(regex.captures_iter(text).filter_map(|it| judge(&it)));
    }
    if signs {
        assigned::find(text, &mut found);
    }
    found
}

/// The second group of a match, where it is a secret.
fn second(captures: &Captures<'_>, secret: impl Fn(&str) -> bool) -> Option<Found> {
    let group = captures.get(2)?;
    let value = group.as_str();
    let reference = value.starts_with(['$', '<', '{', '(', '*', '…', '%']) || value.contains("${");
    (!reference && secret(value)).then(|| Found { at: group.range(), name: "" })
}

/// Is this within a call of curl, which may go over several lines?
fn is_curl(text: &str, at: usize) -> bool {
    const NEAR: usize = 300;
    let from = (at.saturating_sub(NEAR)..=at).find(|from| text.is_char_boundary(*from)).unwrap_or(at);
    text[from..at].rfind("curl").is_some_and(|curl| {
        let between = &text[from + curl..at];
        between.matches('\n').count() == between.matches("\\\n").count()
    })
}

/// `sk-` also begins names in kebab case, which have no digit.
fn is_key(what: &str, found: &str) -> bool {
    what != API_KEY || has_digit(found)
}

fn has_digit(text: &str) -> bool {
    text.bytes().any(|byte| byte.is_ascii_digit())
}

fn is_number(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_digit())
}

/// Letters and digits: what people are made to use, and words are not.
fn mixes(text: &str) -> bool {
    has_digit(text) && text.bytes().any(|byte| byte.is_ascii_alphabetic())
}

/// What one pass over the bytes tells: nearly every sentence has nothing at all.
#[derive(Default)]
struct Glance {
    /// The longest run of signs that keys are made of.
    longest: usize,
    /// There is a sign that may stand between a name and its value.
    signs: bool,
    /// There may be a sentence of [`SPOKEN`] other than those with a long run.
    spoken: bool,
}

impl Glance {
    fn at(text: &str) -> Self {
        let mut all = Self::default();
        let (mut run, mut last) = (0, 0);
        for byte in text.bytes() {
            if is_key_sign(byte) {
                run += 1;
                all.longest = all.longest.max(run);
            } else {
                run = 0;
            }
            all.signs |= matches!(byte, b':' | b'=' | b'(' | b'>') || (byte == b'-' && last == b'-');
            all.spoken |=
                matches!(byte, b'\'' | b'&' | b'?') || (last == b'-' && matches!(byte, b'u' | b'-'));
            last = byte;
        }
        all
    }
}

fn is_key_sign(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'/' | b'_' | b'=' | b'.' | b'~' | b'-')
}

/// Is this what a machine made up? Names and words are not: they are made of pieces (`create`, `Access`,
/// `Token`, `v`, `2`) that are longer than the ones of chance.
fn is_random(value: &str, least: usize) -> bool {
    let Pieces { signs, count, digits, letters } = Pieces::of(value);
    if signs < least {
        return false;
    }
    let hex = value.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b'-');
    if hex && digits >= 2 && (letters > 0 || signs >= 24) {
        return true;
    }
    let short = |tenths: usize| signs * 10 < count * tenths;
    (digits >= 1 && letters >= 1 && short(35)) || (signs >= 24.max(least) && short(24))
}

/// How a value falls into words and numbers.
#[derive(Default)]
struct Pieces {
    /// Letters and digits.
    signs: usize,
    count: usize,
    digits: usize,
    letters: usize,
}

impl Pieces {
    fn of(value: &str) -> Self {
        #[derive(Clone, Copy, PartialEq)]
        enum Kind {
            Lower,
            Upper,
            Digit,
            Other,
        }
        let mut all = Self::default();
        let (mut last, mut run) = (Kind::Other, 0);
        for byte in value.bytes() {
            let kind = match byte {
                b'a'..=b'z' => Kind::Lower,
                b'A'..=b'Z' => Kind::Upper,
                b'0'..=b'9' => Kind::Digit,
                _ => Kind::Other,
            };
            let new = match (last, kind) {
                (_, Kind::Other) => false,
                // `Word` is one piece, and `XMLWord` is two.
                (Kind::Upper, Kind::Lower) => run > 1,
                (last, kind) => last != kind,
            };
            all.count += usize::from(new);
            all.signs += usize::from(kind != Kind::Other);
            all.digits += usize::from(kind == Kind::Digit);
            all.letters += usize::from(matches!(kind, Kind::Lower | Kind::Upper));
            run = if last == kind { run + 1 } else { 1 };
            last = kind;
        }
        all
    }
}

#[cfg(test)]
mod tests;
