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
        format!("glcbt-{long}"),
        format!("xapp-1-A0B1C2D3E4F-123456789012-{}", &hex[..40]),
        format!("ATCTT3x{twice}"),
        format!("glc_eyJ{twice}"),
        format!("ntn_12345678901{}", &long[..35]),
        format!("figd_{long}"),
        format!("pat-na1-{}", uuid()),
        format!("PMAK-{}-{}", &hex[..24], &hex[..34]),
        format!("pul-{}", &hex[..40]),
        format!("rubygems_{}", &hex[..48]),
        format!("pnu_{}", &long[..36]),
        format!("rdme_{}{}", &hex[..60], &hex[..10]),
        format!("xkeysib-{}{}-{}", &hex[..60], &hex[..4], &long[..16]),
        format!("shippo_live_{}", &hex[..40]),
        format!("duffel_live_{long}"),
        format!("dt0c01.{}.{}", &capitals[..24], &capitals[..64]),
        format!("EZAK{}", &twice[..54]),
        format!("CLOJARS_{}", &hex[..60]),
        format!("p8e-{}", &long[..32]),
        format!("ops_eyJ{twice}{twice}"),
        format!("A3-{}-{}-QP0ZR-Y9X8G-QP0ZR", &capitals[..6], &capitals[..11]),
        format!("AKCp{}", &twice[..69]),
        format!("ABSK{twice}{twice}"),
        format!("HRKU-{long}"),
        format!("sq0atp-{long}"),
        format!("squ_{}", &hex[..40]),
        format!("sgp_{}", &hex[..40]),
        format!("tfp_{}", &twice[..59]),
        format!("nfp_{}", &long[..36]),
        format!("fo1_{long}"),
        format!("ico-{}", &long[..32]),
        format!("sha256~{long}"),
        format!("CCIPAT_{}_{}", &long[..22], &hex[..40]),
        format!("bkua_{}", &hex[..40]),
        format!("v1.0-{}-{}", &hex[..24], &hex.repeat(3)[..146]),
        format!("pcsk_{long}"),
        format!("lsv2_pt_{}_{}", &hex[..32], &hex[..10]),
        format!("CFPAT-{long}"),
        format!("sl.{twice}{twice}"),
        format!("sk.eyJ{twice}.{long}"),
        format!("FLWSECK-{}-X", &hex[..32]),
        format!("tk-us-{}", &twice[..48]),
        format!("fio-u-{}", &twice[..64]),
        format!("LS0tLS1CRUdJTiBSU0EgUFJJVkFURSBLRVkt{twice}{twice}"),
        private_key("RSA "),
    ]
}

fn uuid() -> String {
    let hex = "0a1b2c3d4e".repeat(6);
    format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..32])
}

/// Too common, or of too little use, to leave a document out.
fn only_redacted() -> Vec<String> {
    let hex = "0a1b2c3d4e".repeat(6);
    vec![
        format!("key-{}", &hex[..32]),
        format!("SK{}", &hex[..32]),
        format!("https://hooks.slack.com/services/T0/B0/{LONG}"),
        format!("https://discord.com/api/webhooks/123456789012345678/{LONG}"),
        format!("LTAI{}", &LONG[..20]),
        format!("access-sandbox-{}", uuid()),
        format!("sm_pat_{}", &LONG[..16]),
        format!("pat{}.{hex}{}", &LONG[..14], &hex[..4]),
        format!("{}.atlasv1.{LONG}{LONG}", &LONG[..14]),
        format!("abc8Q~{}", &LONG[..34]),
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
fn each_form_has_an_example() {
    let examples = [issued(), only_redacted()].concat().join("\n");
    let seen = |what: &&str| ISSUED.matching(&examples).iter().any(|(seen, _)| seen == what);
    let unseen: Vec<_> = FORMS.iter().map(|form| form.what).filter(|what| !seen(what)).collect();
    assert_eq!(unseen, Vec::<&str>::new());
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

/// As people write them down in notes, run-books and shells: each with what must be left of it.
#[test]
fn what_a_sentence_a_table_or_a_command_tells_is_redacted() {
    let cases = [
        ("password: \"correct horse battery staple\"", "password: \"(redacted)\""),
        ("api_key: 'abcd efgh'", "api_key: '(redacted)'"),
        ("passphrase: open sesame 42", "passphrase: (redacted)"),
        ("passphrase: correct horse battery staple", "passphrase: (redacted)"),
        ("{\"password\": \"Correct Horse Battery Staple\"}", "{\"password\": \"(redacted)\"}"),
        ("Kennwort: Herbst2026!", "Kennwort: (redacted)"),
        ("mot de passe : Automne2025!", "mot de passe : (redacted)"),
        ("contraseña: Invierno2025!", "contraseña: (redacted)"),
        ("密码：Winter2025xx", "密码：(redacted)"),
        ("пароль: Zima2025xx", "пароль: (redacted)"),
        ("password: Sommer!Sonne", "password: (redacted)"),
        ("export MYSQL_PWD='Winter 2025'", "export MYSQL_PWD='(redacted)'"),
        ("The password is \"Staging-DB-2024!\"", "The password is \"(redacted)\""),
        ("Password – Winter2025", "Password – (redacted)"),
        (
            "[\"mysql\", \"-u\", \"root\", \"-pWinter2025\"]",
            "[\"mysql\", \"-u\", \"root\", \"-p(redacted)\"]",
        ),
        ("Passwort lautet Herbst2025!", "Passwort lautet (redacted)"),
        ("password is Tr0ub4dor&3xyz", "password is (redacted)"),
        ("The password of the admin is `hunter22`.", "The password of the admin is `(redacted)`."),
        (
            "Das Passwort für die Datenbank lautet „Sommer2024“.",
            "Das Passwort für die Datenbank lautet „(redacted)“.",
        ),
        ("The password was changed to Wint3rIsHere.", "The password was changed to (redacted)."),
        ("Password (production): Wint3rIsHere!", "Password (production): (redacted)"),
        ("The API key is 0123456789abcdef0123456789abcdef.", "The API key is (redacted)."),
        ("token `f47ac10b58cc4372a5670e02b2c3d479`", "token `(redacted)`"),
        ("**password** `hunter22`", "**password** `(redacted)`"),
        ("mysql -u root -pS3cretRoot99", "mysql -u root -p(redacted)"),
        ("mysqldump -h db \\\n  -p'S3cret Root' shop", "mysqldump -h db \\\n  -p'(redacted)' shop"),
        ("sshpass -p 'Deploy#2024' ssh me@host", "sshpass -p '(redacted)' ssh me@host"),
        ("docker login -u bob -p D0ckerPass99", "docker login -u bob -p (redacted)"),
        ("redis-cli -a R3disPass99 ping", "redis-cli -a (redacted) ping"),
        ("ldapsearch -x -w LdapPass99", "ldapsearch -x -w (redacted)"),
        ("7z a -pSesam99 out.7z dir", "7z a -p(redacted) out.7z dir"),
        ("keytool -storepass s3cretStore -v", "keytool -storepass (redacted) -v"),
        (
            "machine api.example.com login bob password n3trcPassw0rd",
            "machine api.example.com login bob password (redacted)",
        ),
        (
            "machine host\n  login bob\n  password n3trcPassw0rd",
            "machine host\n  login bob\n  password (redacted)",
        ),
        ("requirepass f00bared", "requirepass (redacted)"),
        ("host:5432:db:user:pgPassF1le", "host:5432:db:user:(redacted)"),
        ("admin:$apr1$Zx8kPq1L$kH3bV9qT7yN2mR5wC8xD1/", "admin:(redacted password hash)"),
        ("htpasswd -nb admin Secr3tPass", "htpasswd -nb admin (redacted)"),
        ("echo \"root:toor1234\" | sudo chpasswd", "echo \"root:(redacted)\" | sudo chpasswd"),
        ("client-key-data: LS0tLS1CRUdJTiBSU0EgUFJJVkFURSBLRVkt", "client-key-data: (redacted private key)"),
        ("| password | Winter2025xx |", "| password | (redacted) |"),
        (
            "| `DB_PASSWORD` | string | `hunter22` | the password |",
            "| `DB_PASSWORD` | string | `(redacted)` | the password |",
        ),
        (
            "| user | Password |\n|---|:--:|\n| bob | hunter22 |",
            "| user | Password |\n|---|:--:|\n| bob | (redacted) |",
        ),
        ("user/password = bob/alicepass99", "user/password = bob/(redacted)"),
        ("credentials: admin / hunter22", "credentials: admin / (redacted)"),
        ("password = S3cretRoot99", "password = (redacted)"),
        ("sig=abcDEF123%2Bxyz456%3D&se=2026", "sig=(redacted)&se=2026"),
        (
            "Twilio AC0a1b2c3d4e0a1b2c3d4e0a1b2c3d4e0a auth 0123456789abcdef0123456789abcdef",
            "Twilio AC0a1b2c3d4e0a1b2c3d4e0a1b2c3d4e0a auth (redacted)",
        ),
        (
            "AC0a1b2c3d4e0a1b2c3d4e0a1b2c3d4e0a / 0123456789abcdef0123456789abcdef",
            "AC0a1b2c3d4e0a1b2c3d4e0a1b2c3d4e0a / (redacted)",
        ),
    ];
    let mut wrong = Vec::new();
    for (text, left) in cases {
        let (within, left_within) = (format!("one\n{text}\nthree"), format!("one\n{left}\nthree"));
        if redact(text) != left || redact(&within) != left_within {
            wrong.push((text, redact(text).into_owned()));
        }
        // They are reason to take out words, and none to leave a document out.
        assert_eq!(find(text), None, "{text}");
    }
    assert_eq!(wrong, [], "what came out");
}

/// What architecture documents say about secrets without telling one, a block for each kind of text.
const ORDINARY: &[&str] = &[
    r"the password is stored in the vault
The password is stored in the vault, and the token is read from `TOKEN_FILE`.
password: see the vault
passphrase: see the vault
token `budget`
the API key is rotated every 90 days
password is required
Passwort lautet wie im Handbuch
Passwort ist im Tresor hinterlegt
commit `3f9a2c1b77aa4c219d553f9a2c1b77aa4c219d55` and UUID `3f9a2c1b-77aa-4c21-9d55-0123456789ab`
| Field | password | required |
| password | string | The password |
| password | changeme |
| `API_KEY` | `sk-…` | the key |
| password | `VARCHAR(255)` | |
| password | 8-64 characters |",
    r"| Name | Password | Token |
|------|----------|-------|
| bob  | `<your password>` | none |
| eve  | ******** | `$TOKEN` |
| max  | see vault | string |
| x | bcrypt | uuid4 |
| y | `DB_PASSWORD_2` | `TOKEN_V2_NAME` |",
    r#"mysql -u root -p
mysql -u root -p shop
mysql -p
docker run -p 8080:80 -p 127.0.0.1:8081:81 image1
docker compose -p project1 up; docker run --rm -p 5432:5432 postgres16
ssh -p 22 host1; ssh -p 2222 me@host99
mkdir -p path/to99/dir
cp -a src99 dst99
curl -w "%{http_code}" https://host; curl -w format99 x
ps -p 1234, tar -a, ls -a dir99, git add -p file99.rs
redis-cli -a $REDIS_PASSWORD ping
docker login -u "$USER" -p "$TOKEN_2"
sshpass -p "${DEPLOY_PASS}" ssh host
docker login -p is insecure, redis-cli -a and sshpass -p are too
Use `redis-cli -a` or `docker login -p`.
The password is hashed with Argon2id; it is SHA-256 of the token, password is base64-encoded.
The password is PBKDF2-HMAC-SHA256 encoded, the token is OAuth2 based and Base64.
password: minimum 8 characters
password: 8 to 64 characters
Password: at least 12 characters, one digit
password: "must match"
"password": "Enter your password"
"password": "Passwort vergessen?"
"password": "The password of the user"
"token": "Invalid token"
"secret": "Client Secret"
"password": "Password is required"
password: "too short"
passwort: wie im Handbuch
Passphrase: a sequence of words
Passphrase: words that a user remembers
token: opaque string of 32 bytes
The token is issued by the gateway, and the API key is `sk-...`.
user/password = <user>/<password>
user/password authentication
credentials: read from `~/.aws/credentials`
credentials: `same-origin`
host:5432:database:user:password
localhost:8080, 127.0.0.1:5432:5432, shared/src/lib.rs:1234:5:error
at 2026-01-01T12:30:45 and 12:30:45:123:456
machine learning, login and password are asked for
login form password field
The machine asks for login name and password together
`sig=inspect.signature(f)`; sig=SIGTERM
let signature = sign(x); signature=hmac_sha256(key)
token budget of 4096 tokens; a token is 4 characters
The secret is mounted at /run/secrets/db_password1.
The password is in DB_PASSWORD_FILE.
The secret `atlas-secrets-v2` holds all of them. Secret `postgres-16-credentials`.
`password` is TEXT64, auth `oauth2`
token bucket with 10 tokens a second; token `gpt-4o-2024-08-06`
API key `ATLAS_API_KEY_2` is read from the environment
auth v2.1.0-rc1 and key ab12cd34
password = password2
password = sha256(x1)
password = hash1
password=os.environ["X1"]
password rules: 8-64 characters, 1 digit
The token is `worker_v2_token`; the token is `12345`.
Password to change: admin2fa
| token | f32 |
| Tokens | 128000 |
| Model | Token limit |
|---|---|
| gpt-4.1 | 128k |
Passwords (see RFC2617) and tokens (RFC6750)
Secret key (AES256) and password (SHA512)"#,
];

#[test]
fn documents_that_speak_of_secrets_pass_untouched() {
    let lines = |text: &str| text.lines().map(str::to_owned).collect::<Vec<_>>();
    let mut wrong = Vec::new();
    for text in ORDINARY {
        let redacted = redact(text);
        wrong.extend(lines(&redacted).into_iter().zip(lines(text)).filter(|(left, line)| left != line));
        assert_eq!(find(text), None);
    }
    assert_eq!(wrong, []);
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
        "password\nWorkers hold leases, and say so. -----END PRIVATE KEY-----",
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
                    "Kennwort", "password is ", "| ", "|---|---|\n", "mysql -p", "docker login -p ", "`", " / ", "：",
                    "login me password ", "h:5432:d:u:", "$apr1$", "sig=", "Passwort lautet ", "пароль", "-storepass ",
                    "echo a:", " | chpasswd", "htpasswd -nb u ", "correct horse ", "battery staple", "Hunter22", "is ",
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
