#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

use proptest::prelude::*;

use super::*;

const LONG: &str = "aB3dE5fG7hJ9kL1mN3pQ5rS7tU9vW1xY3zA5bC7dE9f";

/// One of every form, put together here so that no scanner takes this file for a leak.
fn issued() -> Vec<String> {
    let long = LONG;
    let (hex, capitals) = ("0a1b2c3d4e".repeat(6), "ABCDEFGHIJ234567QP0ZRY9X8G".repeat(3));
    let twice = format!("{long}{}", long.replace('a', "q"));
    vec![
        format!("AKIA{}", &capitals[..16]),
        format!("ghp_{long}"),
        format!("github_pat_{twice}"),
        format!("glpat-{long}"),
        format!("sk-proj-{long}"),
        format!("sk-ant-api03-{twice}"),
        format!("AIza{}", &long[..35]),
        format!("GOCSPX-{}", &long[..28]),
        format!("ya29.{long}"),
        format!("xoxb-123456789012-{long}"),
        format!("rk_live_{long}"),
        format!("whsec_{}", &long[..32]),
        format!("npm_{}", &long[..36]),
        format!("pypi-AgEIcHlwaS5vcmc{long}"),
        format!("hf_{long}"),
        format!("SG.{long}.{long}"),
        format!("dop_v1_{hex}"),
        format!("sbp_{}", &hex[..40]),
        format!("sb_secret_{long}"),
        format!("AGE-SECRET-KEY-1{}", &capitals[..58]),
        format!("gsk_{twice}"),
        format!("xai-{twice}"),
        format!("shpat_{}", &hex[..32]),
        format!("dapi{}", &hex[..32]),
        format!("NRAK-{}", &capitals[..27]),
        format!("lin_api_{}", &long[..40]),
        format!("r8_{}", &long[..37]),
        format!("hvs.{long}"),
        format!("ATATT3x{twice}"),
        format!("pscale_pw_{long}"),
        format!("dp.pt.{long}"),
        format!("sntrys_{twice}"),
        format!("glsa_{}_{}", &long[..32], &hex[..8]),
        format!("nvapi-{twice}"),
        format!("pplx-{twice}"),
        format!("dckr_pat_{long}"),
        format!("tskey-auth-{long}"),
        private_key("RSA "),
    ]
}

/// Too common, or of too little use, to leave a document out.
fn only_redacted() -> Vec<String> {
    let hex = "0a1b2c3d4e".repeat(6);
    vec![
        format!("key-{}", &hex[..32]),
        format!("SK{}", &hex[..32]),
        format!("https://hooks.slack.com/services/T0/B0/{LONG}"),
        format!("AccountKey={LONG}{LONG}=="),
        format!("eyJ{LONG}.eyJ{LONG}.{LONG}"),
        format!("12345678{}:AA{}", 90, &LONG[..33]),
        format!("MTA{}.{}.{}", &LONG[..23], &LONG[..6], &LONG[..38]),
    ]
}

fn line_of_key(n: usize) -> String {
    let signs: Vec<char> = LONG.chars().chain("+/QzKpWm2Xv8".chars()).collect();
    (0..64).map(|at| signs[(at * 7 + n * 13 + at * at * n) % signs.len()]).collect()
}

fn private_key(kind: &str) -> String {
    let body: Vec<String> = (0..20).map(line_of_key).collect();
    let name = format!("{kind}PRIVATE");
    format!("-----BEGIN {name} KEY-----\n{}\nq1Zx=\n-----END {name} KEY-----", body.join("\n"))
}

#[test]
fn every_pattern_compiles() {
    assert_eq!(ISSUED.each.len(), FORMS.len());
    let refused = FORMS.iter().chain([&PRIVATE_KEY]).filter(|form| form.refused.is_some());
    let marks: usize = refused.map(|form| form.marks.split('|').count()).sum();
    assert_eq!(REFUSED.iter().map(Vec::len).sum::<usize>(), marks);
    assert_eq!(UNMARKED_FORMS.each.len(), UNMARKED.len());
    assert_eq!(SPOKEN_FORMS.each.len(), SPOKEN.len());
    assert!([&ISSUED, &UNMARKED_FORMS, &SPOKEN_FORMS].iter().all(|compiled| compiled.any.is_some()));
    assert!(URL_FORM.is_some());
}

#[test]
fn what_an_issuer_gave_out_is_found_with_its_line_and_redacted() {
    for secret in issued() {
        let text = format!("one\nbefore {secret} after");
        let (what, line) = find(&text).unwrap_or_else(|| panic!("{secret}"));
        assert_eq!(line, 2, "{what}");
        let redacted = redact(&text);
        let what = what.split_once(' ').unwrap().1;
        assert!(redacted.starts_with(&format!("one\nbefore (redacted {what})")), "{secret}: {redacted}");
        assert!(redacted.ends_with(" after") && !redacted.contains("aB3dE5"), "{redacted}");
    }
    for secret in only_redacted() {
        let text = format!("before {secret} after");
        assert_eq!(find(&text), None, "{secret}");
        let redacted = redact(&text);
        assert!(redacted.starts_with("before (redacted ") && redacted.ends_with(" after"), "{redacted}");
        assert!(!redacted.contains("aB3dE5"), "{redacted}");
    }
}

#[test]
fn names_of_kinds_of_secrets_leave_no_document_out() {
    for ordinary in [
        "Keep your password and `sk-...` key secret. -----BEGIN PRIVATE KEY-----",
        "a sk-learn-pipeline-with-many-words-in-it and disk-usage-of-everything-there",
        "npm_config_registry, hf_hub, r8_unorm, xai-sdk, key-value-store-of-the-cluster, SKU0123",
        "TELEGRAM=1:AA",
        "password: letmein99",
    ] {
        assert_eq!(find(ordinary), None, "{ordinary}");
    }
}

/// Each line with what must be left of it.
#[test]
fn what_its_place_makes_a_secret_is_redacted() {
    let uuid = "3f9a2c1b-77aa-4c21-9d55-0123456789ab";
    let cases = [
        (
            "aws_secret_access_key = wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
            "aws_secret_access_key = (redacted)",
        ),
        ("HEROKU_API_KEY=01234567-89ab-cdef-0123-456789abcdef", "HEROKU_API_KEY=(redacted)"),
        ("client_secret: \"q1w2e3r4t5y6\"", "client_secret: \"(redacted)\""),
        ("client_secret: q1w2e3r4t5y6", "client_secret: (redacted)"),
        ("redis://:pw@host:6379/0", "redis://:(redacted)@host:6379/0"),
        ("postgres://app:hunter2@db/atlas", "postgres://app:(redacted)@db/atlas"),
        ("amqp://me:p@ss@mq/", "amqp://me:(redacted)@mq/"),
        ("DB_PASSWORD=Sup3rS3cret9", "DB_PASSWORD=(redacted)"),
        ("export DB_PASSWORD=letmein", "export DB_PASSWORD=(redacted)"),
        ("  password: letmein99", "  password: (redacted)"),
        ("  password: p@ss,w0rd;x1  ", "  password: (redacted)  "),
        ("{\"password\": \"letmein\", \"user\": \"me\"}", "{\"password\": \"(redacted)\", \"user\": \"me\"}"),
        (r#"let body = "{\"password\": \"letmein\"}";"#, r#"let body = "{\"password\": \"(redacted)\"}";"#),
        ("Authorization: Basic YWRtaW46aHVudGVyMg==", "Authorization: Basic (redacted)"),
        ("Authorization: Bearer aB3dE5fG7hJ9kL1m", "Authorization: Bearer (redacted)"),
        ("-H 'authorization: token 0123456789abcdef0123'", "-H 'authorization: token (redacted)'"),
        ("curl -u admin:Passw0rd99 https://host", "curl -u admin:(redacted) https://host"),
        ("curl https://host \\\n  -u admin:letmein", "curl https://host \\\n  -u admin:(redacted)"),
        ("Server=db;User Id=sa;Password=Str0ngPass1;", "Server=db;User Id=sa;Password=(redacted);"),
        ("\"Server=db;Pwd=letmein;Encrypt=true\"", "\"Server=db;Pwd=(redacted);Encrypt=true\""),
        (
            "https://x.blob/y?sv=1&sig=aB3dE5fG7hJ9kL1m%2BnOpQ%3D&se=2",
            "https://x.blob/y?sv=1&sig=(redacted)&se=2",
        ),
        ("API_KEY=\"aB3dE5fG7hJ9kL1m\"", "API_KEY=\"(redacted)\""),
        ("api key: 0123456789abcdef0123456789abcdef", "api key: (redacted)"),
        ("password: 'hunter2!'", "password: '(redacted)'"),
        ("**Password:** hunter22", "**Password:** (redacted)"),
        ("TWILIO_AUTH_TOKEN=0123456789abcdef0123456789abcdef", "TWILIO_AUTH_TOKEN=(redacted)"),
        ("let password: &str = \"hunter22\";", "let password: &str = \"(redacted)\";"),
        ("os.environ[\"API_KEY\"] = \"a1b2c3d4e5\"", "os.environ[\"API_KEY\"] = \"(redacted)\""),
        (".basic_auth(\"me\").password(\"hunter2\")", ".basic_auth(\"me\").password(\"(redacted)\")"),
        ("mysql --password hunter22 db", "mysql --password (redacted) db"),
        ("<password>hunter22</password>", "<password>(redacted)</password>"),
        ("CREATE ROLE app LOGIN PASSWORD 'letmein';", "CREATE ROLE app LOGIN PASSWORD '(redacted)';"),
        (
            "//registry.npmjs.org/:_authToken=3f9a2c1b77aa4c219d55",
            "//registry.npmjs.org/:_authToken=(redacted)",
        ),
        ("spring.datasource.password=letmein", "spring.datasource.password=(redacted)"),
        ("JWT_SECRET=supersecretjwtkey", "JWT_SECRET=(redacted)"),
    ];
    let mut wrong = Vec::new();
    for (text, left) in cases {
        // Also in the middle of others.
        let (within, left_within) = (format!("one\n{text}\nthree"), format!("one\n{left}\nthree"));
        if redact(text) != left || redact(&within) != left_within {
            wrong.push((text, redact(text).into_owned()));
        }
    }
    assert_eq!(wrong, [], "what came out");
    assert_eq!(redact(&format!("token = {uuid}")), "token = (redacted)");
}

#[test]
fn ordinary_text_passes_untouched() {
    let all = [
        "Set OPENAI_API_KEY and OPENAI_BASE_URL=https://api.openai.com/v1.",
        "let token = tokenizer_for_the_model(name);",
        "secret: service_role_key_of_the_project",
        "sk-learn is a library; task_id and disk-usage are words",
        "sk-learn-pipeline-with-many-words is a name",
        "http://localhost:8501/v1/query_chat",
        "commit 3f9a2c1b and port 8000",
        "Authorization: Bearer $SERVICE_ROLE_KEY_OF_THE_PROJECT",
        "Authorization: Bearer <token>, or Authorization: Basic authentication",
        "password: \"changeme\", pwd = '${DB_PASSWORD_2}', \"password\": \"<yours, 8 signs>\"",
        "a basic understanding-of-the-architecture is enough",
        "password: String, pub token: Option<Secret>, secret: &str,",
        "password = os.environ[\"DB_PASSWORD\"]; token = env(\"API_TOKEN_2\"); secret = read_secret(path2)",
        "token: ${{ secrets.GITHUB_TOKEN }}",
        "password_file: /run/secrets/db1, PGPASSFILE=/run/secrets/x1",
        "OPENAI_API_KEY_FILE=/run/secrets/openai1",
        "POSTGRES_PASSWORD=${POSTGRES_PASSWORD:?set it}",
        "API_KEY=your-api-key-123",
        "API_KEY=sk-...",
        "password = None, token = null, secret = true",
        "max_tokens: 4096, token: 12, tokens = 128000",
        "if token == \"a1b2c3d4e5f6\" {}",
        "Token: the thing that a caller shows. Password: Administrators choose it.",
        "secret: the name2 of a thing",
        "let password = password2;",
        "connect(password=password1, token=token2)",
        "token = createAccessTokenForUser2(user)",
        "auth: self.config.auth2,",
        "author: someone1, compass: north1",
        "\"token\": \"access_token\", \"secret\": \"my-secret-1\"",
        "docker run -u 1000:1000 -p 8080:8080 x",
        "let token: CancellationToken = CancellationToken::new();",
        "std::env::var(\"API_KEY\")",
        "token_ttl: 30s, session_token: 500ms",
        "https://example.org/path?token=",
        "3f9a2c1b77aa4c219d553f9a2c1b77aa4c219d55 is a commit\n77aa4c219d553f9a2c1b77aa4c219d553f9a2c1b too\n",
    ];
    let wrong: Vec<_> = all.into_iter().map(redact).filter(|left| matches!(left, Cow::Owned(_))).collect();
    assert_eq!(wrong, Vec::<Cow<str>>::new());
}

#[test]
fn a_key_that_was_cut_into_passages_is_redacted_in_each() {
    for indent in ["", "    ", "> ", "  \"", "# "] {
        let key = private_key("RSA ");
        let key: Vec<String> = key.lines().map(|line| format!("{indent}{line}")).collect();
        // With its begin, its middle, its end, and what is around them.
        for (part, kept) in [
            (format!("Text before.\n{}", key[..8].join("\n")), "Text before."),
            (key[5..15].join("\n"), ""),
            (format!("{}\nText after.", key[12..].join("\n")), "Text after."),
            (format!("{}\nText after.", key[21..].join("\n")), "Text after."),
            (format!("Text before.\n{}\nText after.", key.join("\n")), "Text after."),
        ] {
            let redacted = redact(&part);
            for line in &key[1..=20] {
                let line = line.trim_start_matches(indent);
                assert!(!redacted.contains(line), "{indent:?} {redacted}");
            }
            assert!(redacted.contains(kept) && redacted.contains("(redacted "), "{indent:?} {redacted}");
            assert_eq!(
                redacted.matches('\n').count(),
                part.matches('\n').count(),
                "lines stay where they are"
            );
        }
    }
    let escaped = private_key("").replace('\n', "\\n");
    let redacted = redact(&escaped).into_owned();
    assert_eq!(redacted, "(redacted private key)");
    // As in the file of a Google service account.
    let account = format!("{{\n  \"type\": \"service_account\",\n  \"private_key\": \"{escaped}\"\n}}");
    assert_eq!(find(&account).map(|(_, line)| line), Some(3));
    for part in [&escaped[..400], &escaped[200..900], &escaped[900..]] {
        assert!(!redact(part).contains(&line_of_key(8)[10..40]), "{}", redact(part));
        assert!(!redact(part).contains(&line_of_key(4)[10..40]), "{}", redact(part));
    }
}

#[test]
fn names_of_lines_of_keys_hide_nothing() {
    for text in [
        "It begins with `-----BEGIN PRIVATE KEY-----` and ends with `-----END PRIVATE KEY-----`, as PEM wants.",
        "-----BEGIN PRIVATE KEY-----\n\nA paragraph about keys: what they are for, and what not.\n",
        "See below.\n-----END PRIVATE KEY-----\nMore.",
    ] {
        assert_eq!(redact(text), text);
    }
}

proptest! {
    #[test]
    fn any_text_is_redacted_once_and_keeps_its_lines(
        parts in prop::collection::vec(
            prop_oneof![
                "[A-Za-z0-9_=/+.~-]{0,18}",
                "[ \"':=>@,\n(<]{1,3}",
                "\\PC{0,4}",
                prop::sample::select(vec![
                    "AKIA", "sk-", "ghp_", "-----BEGIN PRIVATE KEY-----", "-----END PRIVATE KEY-----", "password",
                    "Pwd", "secret", "api_key", "Bearer ", "token", "://", "eyJ", "curl -u a:b1c", "--token ", "\\n",
                ]).prop_map(str::to_owned),
                (0_usize..20).prop_map(line_of_key),
            ],
            0..14,
        ),
    ) {
        let text = parts.concat();
        let once = redact(&text).into_owned();
        let newlines = |text: &str| text.matches('\n').count();
        prop_assert_eq!(newlines(&once), newlines(&text));
        prop_assert_eq!(redact(&once), once.as_str());
        // A document is never left out for something that a passage would show.
        if find(&text).is_some() {
            prop_assert_ne!(&once, &text);
        }
    }

    #[test]
    fn credentials_are_found_as_by_looking_at_every_word(
        parts in prop::collection::vec(
            prop_oneof![
                "[A-Za-z_]{0,3}",
                "[ \n.:-]{1,2}",
                "\\PC{0,3}",
                prop::sample::select(issued()),
                // Marks that begin within other marks, and within words.
                prop::sample::select(vec!["pypi-", "A", "sk-", "AKIA", "ghp_", "SG.", "dp.", "-----BEGIN "])
                    .prop_map(str::to_owned),
            ],
            0..10,
        ),
    ) {
        let text = parts.concat();
        prop_assert_eq!(find(&text), find_at_every_word(&text));
    }
}

/// [`find`], without looking for marks first.
fn find_at_every_word(text: &str) -> Option<(&'static str, usize)> {
    let in_word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    text.char_indices().find_map(|(at, _)| {
        if text[..at].ends_with(in_word) {
            return None;
        }
        let (_, form, _) = REFUSED.iter().flatten().find(|(mark, form, regex)| {
            text[at..].starts_with(mark)
                && regex.find(&text[at..]).is_some_and(|found| is_key(form.what, found.as_str()))
        })?;
        Some((form.what, text[..at].matches('\n').count() + 1))
    })
}
