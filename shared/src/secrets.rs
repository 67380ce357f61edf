//! What secrets look like: one set of rules for everything that reads other people's texts.
//!
//! Two questions are asked with different stakes. [`find`] decides whether a whole document is left
//! out of the index, so it knows only what issuers of credentials give out: a prefix and a length that
//! nothing else has. [`redact`] decides which few characters do not leave for an API, so it also takes
//! what the words around it make a secret: `password: …`, "the password is …", a column of a table,
//! `mysql -p…`, a URL with a password, a key whose first or last line is in another passage. A false alarm
//! costs a document there, a word here.
//!
//! Both take time linear in the text. Neither ever returns, prints or logs what it found.

use std::{borrow::Cow, ops::Range, sync::LazyLock};

use regex::{Captures, Regex, RegexSet};

mod assigned;
mod commands;
mod keys;
mod names;
mod prose;
mod tables;
mod values;

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

macro_rules! encoded_key {
    ($rest:literal) => {
        concat!(
            "LS0tLS1CRUdJTiB(?:QUklWQVRF|SU0EgUFJJVkFU|FQyBQUklWQVRF|EU0EgUFJJVkFU|PUEVOU1NIIFBSSVZB|",
            "FTkNSWVBURUQgUFJJVkFU|QR1AgUFJJVkFU)",
            $rest
        )
    };
}

const ENCODED_KEY: &str = encoded_key!("[A-Za-z0-9+/]{4,}={0,2}");
/// The smallest keys have 119 bytes.
const ENCODED_KEY_WHOLE: &str = encoded_key!("[A-Za-z0-9+/]{100,}={0,2}");

/// Sources: the issuers' documentation, and the patterns that GitHub's secret scanning names.
const FORMS: &[Form] = &[
    form("an AWS access key", "AKIA|ASIA|ABIA|ACCA", "(?:AKIA|ASIA|ABIA|ACCA)[0-9A-Z]{16}(?-u:\\b)"),
    form("a GitHub token", "ghp_|gho_|ghu_|ghs_|ghr_|github_pat_", "(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{22,})")
        .refused("(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{60,})"),
    form(
        "a GitLab token",
        "glpat-|glrt-|gldt-|glptt-|glsoat-|glcbt-|glagent-|gloas-|glft-|glffct-|glimt-",
        "gl(?:pat|rt|dt|ptt|soat|cbt|agent|oas|ft|ffct|imt)-[A-Za-z0-9_-]{20,}",
    ),
    // OpenAI, Anthropic, OpenRouter, DeepSeek and many others.
    form(API_KEY, "sk-", "sk-[A-Za-z0-9_-]{20,}").refused(
        "sk-(?:(?:proj-|svcacct-|admin-|or-v1-)?[A-Za-z0-9]{20}[A-Za-z0-9_-]{12,}|ant-[A-Za-z0-9]{2,8}-[A-Za-z0-9_-]{40,})",
    ),
    form("a Google API key", "AIza", "AIza[0-9A-Za-z_-]{35}"),
    form("a Google client secret", "GOCSPX-", "GOCSPX-[A-Za-z0-9_-]{24,}"),
    form("a Google OAuth token", "ya29.", r"ya29\.[A-Za-z0-9_-]{20,}"),
    form("a Slack token", "xox", "xox[abeoprs]-[A-Za-z0-9-]{10,}")
        .refused("xox[abeoprs]-[0-9]{8,}-[A-Za-z0-9-]{10,}"),
    form("a Slack app token", "xapp-", "xapp-[0-9]-[A-Z0-9]{6,}-[0-9]{6,}-[a-f0-9]{20,}"),
    form(
        "a Slack webhook",
        "https://hooks.slack",
        r"https://hooks\.slack\.com/(?:services|workflows|triggers)/[A-Za-z0-9/_-]{20,}",
    )
    .never_refused(),
    form(
        "a Discord webhook",
        "https://discord",
        r"https://discord(?:app)?\.com/api/webhooks/[0-9]{15,}/[A-Za-z0-9_-]{40,}",
    )
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
    form("an Atlassian token", "ATATT3x|ATCTT3x", "AT[AC]TT3x[A-Za-z0-9_=-]{40,}"),
    form("a PlanetScale password", "pscale_", "pscale_(?:pw|tkn|oauth)_[A-Za-z0-9_.-]{30,}"),
    form("a Doppler token", "dp.", r"dp\.(?:pt|st|ct|sa|scim|audit)\.[A-Za-z0-9_.-]{36,}"),
    form("a Sentry token", "sntry", "sntry[su]_[A-Za-z0-9_=+/-]{40,}"),
    form(
        "a Grafana token",
        "glsa_|glc_eyJ",
        "(?:glsa_[A-Za-z0-9]{32}_[A-Fa-f0-9]{8}|glc_eyJ[A-Za-z0-9+/]{40,}={0,2})",
    ),
    form("an NVIDIA key", "nvapi-", "nvapi-[A-Za-z0-9_-]{40,}"),
    form("a Perplexity key", "pplx-", "pplx-[A-Za-z0-9]{40,}"),
    form("a Docker token", "dckr_pat_", "dckr_pat_[A-Za-z0-9_-]{20,}"),
    form("a Tailscale key", "tskey-", "tskey-[a-z]{2,12}-[A-Za-z0-9_-]{16,}"),
    form("a Notion token", "ntn_", "ntn_[A-Za-z0-9]{20,}").refused("ntn_[0-9]{11}[A-Za-z0-9]{35}"),
    form("a Figma token", "figd_", "figd_[A-Za-z0-9_-]{20,}").refused("figd_[A-Za-z0-9_-]{40,}"),
    form("a HubSpot token", "pat-", "pat-(?:na|eu|ap)[0-9]-[a-f0-9]{8}(?:-[a-f0-9]{4}){3}-[a-f0-9]{12}"),
    form("a Postman key", "PMAK-", "PMAK-[a-f0-9]{24}-[a-f0-9]{34}"),
    form("a Pulumi token", "pul-", "pul-[a-f0-9]{40}"),
    form("a RubyGems key", "rubygems_", "rubygems_[a-f0-9]{48}"),
    form("a Prefect key", "pnu_", "pnu_[A-Za-z0-9]{36}(?-u:\\b)"),
    form("a ReadMe key", "rdme_", "rdme_[a-z0-9]{70}"),
    form("a Brevo key", "xkeysib-|xsmtpsib-", "x(?:key|smtp)sib-[a-f0-9]{64}-[A-Za-z0-9]{16}"),
    form("a Shippo token", "shippo_", "shippo_(?:live|test)_[a-fA-F0-9]{40}").refused("shippo_live_[a-fA-F0-9]{40}"),
    form("a Duffel token", "duffel_", "duffel_(?:live|test)_[A-Za-z0-9_=-]{43}").refused("duffel_live_[A-Za-z0-9_=-]{43}"),
    form("a Dynatrace token", "dt0", r"dt0[a-z][0-9]{2}\.[A-Z0-9]{24}\.[A-Z0-9]{64}"),
    form("an EasyPost key", "EZAK|EZTK", "EZ[AT]K[A-Za-z0-9]{54}").refused("EZAK[A-Za-z0-9]{54}(?-u:\\b)"),
    form("a Clojars token", "CLOJARS_", "CLOJARS_[a-z0-9]{60}"),
    form("an Adobe secret", "p8e-", "p8e-[A-Za-z0-9_-]{32}"),
    form("a 1Password token", "ops_eyJ", "ops_eyJ[A-Za-z0-9+/_-]{100,}={0,3}"),
    form("a 1Password key", "A3-", "A3-[A-Z0-9]{6}-(?:[A-Z0-9]{11}|[A-Z0-9]{6}-[A-Z0-9]{5})(?:-[A-Z0-9]{5}){3}(?-u:\\b)"),
    form("an Artifactory key", "AKCp", "AKCp[A-Za-z0-9]{69}(?-u:\\b)"),
    form("an Alibaba access key", "LTAI", "LTAI[A-Za-z0-9]{20}(?-u:\\b)").never_refused(),
    form("an AWS Bedrock key", "ABSK", "ABSK[A-Za-z0-9+/]{109,}={0,2}"),
    form("a Heroku key", "HRKU-", "HRKU-[A-Za-z0-9_-]{36,}"),
    form("a Square token", "sq0", "sq0(?:atp|csp)-[A-Za-z0-9_-]{22,}"),
    form("a Sonar token", "squ_|sqp_|sqa_", "sq[upa]_[a-f0-9]{40}"),
    form("a Sourcegraph token", "sgp_", "sgp_(?:(?:[a-f0-9]{16}|local)_)?[a-f0-9]{40}"),
    form("a Typeform token", "tfp_", "tfp_[A-Za-z0-9_.=-]{59}"),
    form("a Netlify token", "nfp_", "nfp_[A-Za-z0-9]{36}(?-u:\\b)"),
    form("a Fly.io token", "fo1_|fm1|fm2_", "(?:fo1_[A-Za-z0-9_-]{43}|fm(?:1[ar]|2)_[A-Za-z0-9+/]{100,}={0,3})"),
    form("an Infracost key", "ico-", "ico-[A-Za-z0-9]{32}(?-u:\\b)"),
    form("an OpenShift token", "sha256~", "sha256~[A-Za-z0-9_-]{43}"),
    form("a Plaid token", "access-", "access-(?:sandbox|development|production)-[a-f0-9]{8}(?:-[a-f0-9]{4}){3}-[a-f0-9]{12}")
        .never_refused(),
    form("a CircleCI token", "CCIPAT_|CCIPRJ_", "CCIP(?:AT|RJ)_[A-Za-z0-9]{16,}_[a-f0-9]{40}"),
    form("a Buildkite token", "bkua_", "bkua_[a-f0-9]{40}"),
    form("a Cloudflare key", "v1.0-", r"v1\.0-[a-f0-9]{24}-[a-f0-9]{146}"),
    form("a Pinecone key", "pcsk_", "pcsk_[A-Za-z0-9_]{40,}"),
    form("a LangSmith key", "lsv2_", "lsv2_(?:pt|sk)_[a-f0-9]{32}_[a-f0-9]{10}"),
    form("a Contentful token", "CFPAT-", "CFPAT-[A-Za-z0-9_-]{43}"),
    form("a Dropbox token", "sl.", r"sl\.(?:u\.)?[A-Za-z0-9_-]{130,}"),
    form("a Mapbox token", "sk.eyJ", r"sk\.eyJ[A-Za-z0-9_-]{50,}\.[A-Za-z0-9_-]{20,}"),
    form("a Flutterwave key", "FLWSECK", "FLWSECK(?:_TEST)?-[a-h0-9]{32}-X"),
    form("a Scalingo token", "tk-us-", "tk-us-[A-Za-z0-9_-]{48}"),
    form("a Frame.io token", "fio-u-", "fio-u-[A-Za-z0-9_=-]{64}"),
    form("a Settlemint token", "sm_", "sm_(?:aat|pat|sat)_[A-Za-z0-9]{16}(?-u:\\b)").never_refused(),
    // "-----BEGIN … PRIVATE" in base64, as in a kubeconfig and in Secrets of Kubernetes.
    form("a private key", "LS0tLS1CRUdJTi", ENCODED_KEY).refused(ENCODED_KEY_WHOLE),
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
    ("an Airtable token", r"pat[A-Za-z0-9]{14}\.[a-f0-9]{64}"),
    ("a Terraform token", r"[A-Za-z0-9]{14}\.atlasv1\.[A-Za-z0-9_=-]{60,}"),
    ("an Azure client secret", "[A-Za-z0-9_~.]{3}[0-9]Q~[A-Za-z0-9_~.-]{31,34}(?-u:\\b)"),
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

/// Hashes of passwords as `crypt`, Argon2 and Postgres write them: they can be guessed.
const HASH: &str = concat!(
    r"()(\$(?:apr1|1|2[abxy]?|5|6|7|y|gy|argon2(?:id|i|d)|scrypt|pbkdf2(?:-[a-z0-9]+)?)\$[A-Za-z0-9+/.,=$-]{20,}",
    r"|SCRAM-SHA-256\$[0-9]+:[A-Za-z0-9+/=$:]{40,})",
);

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
        r"(?i)((?-u:\b)(?:sig|signature|x-amz-signature|x-amz-security-token)=)([A-Za-z0-9%+/_=-]{16,})",
    ),
    // A line of a .pgpass.
    (
        "pgpass",
        r#"((?:^|[\s`"'])[A-Za-z0-9_.*-]+:(?:[0-9]{4,5}|\*):[A-Za-z0-9_.*-]+:[A-Za-z0-9_.@*-]+:)([^\s"'`<>|]{4,})"#,
    ),
    ("hash", HASH),
    (
        "htpasswd",
        r"((?-u:\b)htpasswd[ \t]+-[A-Za-z]*b[A-Za-z]*[ \t]+(?:[^\s|>&;()]+[ \t]+){1,2})([^\s|>&;]{3,})",
    ),
    (
        "chpasswd",
        r#"((?-u:\b)echo[ \t]+["']?[A-Za-z0-9_.-]+:)([^\s"'|]{3,})["']?[ \t]*\|[^\n|]{0,20}chpasswd"#,
    ),
    (
        "store",
        r"((?-u:\b)(?:storepass|keypass|srcstorepass|deststorepass|passin pass|passout pass)[ :]+)([^\s|;&]{4,})",
    ),
    // Account and secret side by side.
    ("twilio", r"((?-u:\b)AC[0-9a-f]{32}[^\n]{1,40}?(?-u:\b))([0-9a-f]{32})(?-u:\b)"),
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
    // What is taken out may have hidden what stands behind it: a password that ends with a command, for one.
    const MAX_PASSES: usize = 4;
    let mut out = Cow::Borrowed(text);
    for _ in 0..MAX_PASSES {
        let found = look(&out);
        if found.is_empty() {
            break;
        }
        out = Cow::Owned(without(&out, found));
    }
    out
}

fn without(text: &str, mut found: Vec<Found>) -> String {
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
    out
}

fn look(text: &str) -> Vec<Found> {
    let Glance { longest, signs, spoken, options, cells } = Glance::at(text);
    if longest < ISSUED_RUN && !signs && !spoken && !options && !cells {
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
            values::is_placeholder(value) && !value.bytes().any(|byte| byte.is_ascii_lowercase())
        };
        found.extend(regex.captures_iter(text).filter_map(|it| second(&it, |value| !named(value))));
    }
    // `authorization` is itself a run of this length.
    let spoken = if spoken || cells || longest >= 13 { SPOKEN_FORMS.matching(text) } else { Vec::new() };
    for (what, regex) in spoken {
        let stated = |value: &str| {
            !values::is_placeholder(value) && !values::is_prose(value) && !value.starts_with('-')
        };
        let judge = |it: &Captures<'_>| match *what {
            "authorization" => second(it, |value| is_random(value, 8) || value.ends_with('=')),
            "bearer" => second(it, |value| is_random(value, 16)),
            "user" => {
                let start = it.get(0).map_or(0, |all| all.start());
                second(it, |value| !is_number(value) && (mixes(value) || is_curl(text, start)))
            }
            "sql" => second(it, |value| !value.contains(' ') && !values::is_placeholder(value)),
            "signature" => {
                let start = it.get(0).map_or(0, |all| all.start());
                let in_query = text[..start].ends_with(['?', '&', ';']);
                second(it, |value| {
                    (in_query && value.len() >= 20)
                        || (value.contains('%') && mixes(value))
                        || is_random(value, 16)
                })
            }
            "pgpass" => second(it, |value| {
                // `:` is the one sign that it has to be written otherwise: this is an address of IPv6.
                let address = value.contains(':') && !value.contains("\\:");
                stated(value)
                    && !address
                    && !values::is_words(value)
                    && (mixes(value) || values::has_special(value))
            }),
            "hash" => it.get(2).map(|hash| Found { at: hash.range(), name: "password hash" }),
            "store" | "htpasswd" | "chpasswd" => second(it, stated),
            _ => second(it, |_| true),
        };
        found.extend(regex.captures_iter(text).filter_map(|it| judge(&it)));
    }
    if signs {
        assigned::find(text, &mut found);
    }
    if options {
        commands::find(text, &mut found);
    }
    if cells {
        tables::find(text, &mut found);
    }
    found
}

/// The second group of a match, where it is a secret.
fn second(captures: &Captures<'_>, secret: impl Fn(&str) -> bool) -> Option<Found> {
    let group = captures.get(2)?;
    let value = group.as_str();
    let reference = value.starts_with(['$', '<', '{', '(', '*', '…', '%'])
        || value.contains("${")
        || value.contains("(redacted");
    (!reference && secret(value)).then(|| Found { at: group.range(), name: "" })
}

/// Is this within a call of curl, which may go over several lines?
fn is_curl(text: &str, at: usize) -> bool {
    const NEAR: usize = 300;
    let from = text.ceil_char_boundary(at.saturating_sub(NEAR));
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
    /// There is a sign that may stand between a name and its value, or a blank behind what may be a name.
    signs: bool,
    /// There may be a sentence of [`SPOKEN`] other than those with a long run.
    spoken: bool,
    /// There is an option that may have a password.
    options: bool,
    /// There may be a table.
    cells: bool,
}

impl Glance {
    fn at(text: &str) -> Self {
        let mut all = Self::default();
        let bytes = text.as_bytes();
        let (mut run, mut last) = (0, 0);
        for (at, &byte) in bytes.iter().enumerate() {
            if is_key_sign(byte) {
                run += 1;
                all.longest = all.longest.max(run);
            } else {
                run = 0;
                all.signs = all.signs || (byte == b' ' && names::may_end_name(&bytes[..at]));
            }
            // The last one is the last byte of `：`.
            all.signs |= matches!(byte, b':' | b'=' | b'(' | b'>' | 0x9a) || (byte == b'-' && last == b'-');
            all.spoken |= matches!(byte, b'\'' | b'&' | b'?' | b'%' | b'$')
                || (last == b'-' && (byte == b'-' || is_option(bytes, at)))
                || (byte == b':' && (last.is_ascii_digit() || last == b'*'));
            all.options |= last == b'-' && matches!(byte, b'p' | b'a' | b'w' | b'P') && is_option(bytes, at);
            all.cells |= byte == b'|';
            last = byte;
        }
        all
    }
}

/// Is this the letter of an option of one: behind a blank or a quote, and a `-`?
fn is_option(bytes: &[u8], letter: usize) -> bool {
    bytes[letter].is_ascii_alphabetic()
        && (letter < 2
            || bytes[letter - 2].is_ascii_whitespace()
            || matches!(bytes[letter - 2], b'"' | b'\''))
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
