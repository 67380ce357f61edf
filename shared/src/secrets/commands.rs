//! Passwords that commands take as an option of one letter: `mysql -p…`, `docker login -p …`.
//!
//! What such a letter means is up to the command, so the call is read back from the option to its beginning.

use std::ops::Range;

use super::{
    Found,
    values::{is_named, is_placeholder, is_prose},
};

/// How far before its option a command is looked for.
const MAX_CALL: usize = 400;
const MAX_VALUE: usize = 128;

/// How an option is given its value.
#[derive(Clone, Copy, PartialEq)]
enum Given {
    /// `-pvalue`; without a value the command asks for one.
    Attached,
    /// `-p value`.
    Apart,
    Both,
}

/// An option of one letter that takes a password.
struct Letter {
    sign: u8,
    given: Given,
    /// Any of these, and this one behind it; `""`: none.
    commands: &'static [&'static str],
    action: &'static str,
}

const fn option(sign: u8, given: Given, commands: &'static [&'static str], action: &'static str) -> Letter {
    Letter { sign, given, commands, action }
}

/// Source: the manual pages of these commands.
const OPTIONS: &[Letter] = &[
    option(
        b'p',
        Given::Attached,
        &[
            "mysql",
            "mysqldump",
            "mysqladmin",
            "mysqlimport",
            "mysqlcheck",
            "mysqlshow",
            "mysqlsh",
            "mysqlbinlog",
            "mariadb",
            "mariadb-dump",
            "mariadb-admin",
            "mariadb-check",
            "mariadb-import",
            "mydumper",
            "7z",
            "7za",
            "7zr",
            "7zz",
            "unrar",
            "rar",
        ],
        "",
    ),
    option(
        b'p',
        Given::Both,
        &["sshpass", "rabbitmqadmin", "cypher-shell", "cqlsh", "beeline", "mongoimport"],
        "",
    ),
    option(
        b'p',
        Given::Apart,
        &["mongo", "mongosh", "mongodump", "mongorestore", "mongoexport", "mongostat"],
        "",
    ),
    option(
        b'p',
        Given::Both,
        &[
            "docker", "podman", "nerdctl", "buildah", "skopeo", "helm", "oras", "crane", "az", "oc", "cf",
            "argocd",
        ],
        "login",
    ),
    option(b'a', Given::Apart, &["redis-cli", "redis-benchmark", "valkey-cli", "keydb-cli"], ""),
    option(
        b'w',
        Given::Both,
        &[
            "ldapsearch",
            "ldapmodify",
            "ldapadd",
            "ldapdelete",
            "ldapwhoami",
            "ldappasswd",
            "ldapcompare",
            "ldapmodrdn",
        ],
        "",
    ),
    option(
        b'P',
        Given::Both,
        &["sqlcmd", "bcp", "mosquitto_pub", "mosquitto_sub", "ipmitool", "zip", "unzip"],
        "",
    ),
];

pub(super) fn find(text: &str, found: &mut Vec<Found>) {
    let bytes = text.as_bytes();
    for (at, letter) in bytes.iter().enumerate().skip(2) {
        let option = bytes[at - 1] == b'-' && matches!(bytes[at - 2], b' ' | b'\t' | b'"' | b'\'');
        if !option || !matches!(letter, b'p' | b'a' | b'w' | b'P') {
            continue;
        }
        let Some((value, attached)) = value(text, at + 1) else { continue };
        let given = |option: &&Letter| {
            option.sign == *letter
                && match option.given {
                    Given::Attached => attached,
                    Given::Apart => !attached,
                    Given::Both => true,
                }
        };
        let call = call(text, at - 2);
        if OPTIONS.iter().filter(given).any(|option| calls(call, option)) {
            found.push(Found { at: value, name: "" });
        }
    }
}

/// Where the value of an option is, and whether it follows without a blank.
fn value(text: &str, from: usize) -> Option<(Range<usize>, bool)> {
    let rest = text.get(from..text.floor_char_boundary(from + MAX_VALUE))?;
    let blanks = rest.bytes().take_while(|byte| *byte == b' ').count();
    let rest = &rest[blanks..];
    let (start, length) = match rest.chars().next()? {
        quote @ ('"' | '\'') => (1, rest[1..].find(quote)?),
        _ => {
            let stops = |c: char| {
                c.is_whitespace() || matches!(c, '"' | '\'' | '`' | '|' | ';' | '&' | '<' | '>' | ')')
            };
            (0, rest.find(stops).unwrap_or(rest.len()))
        }
    };
    let value = &rest[start..start + length];
    let is_none = value.len() < 3
        || value.contains('\n')
        || value.starts_with('-')
        || is_placeholder(value)
        || is_named(value)
        || is_prose(&value.to_lowercase());
    (!is_none).then(|| (from + blanks + start..from + blanks + start + length, blanks == 0))
}

/// What a call has before its option. It may go over several lines.
fn call(text: &str, at: usize) -> &str {
    let bytes = text.as_bytes();
    let least = text.ceil_char_boundary(at.saturating_sub(MAX_CALL));
    let mut start = at;
    while start > least {
        let goes_on = match bytes[start - 1] {
            b'\n' => start >= 2 && bytes[start - 2] == b'\\',
            b'`' | b';' | b'|' | b'&' => false,
            _ => true,
        };
        if !goes_on {
            break;
        }
        start -= 1;
    }
    &text[start..at]
}

fn calls(call: &str, option: &Letter) -> bool {
    let mut words = call.split_whitespace().map(|word| {
        let word = word.trim_matches(['$', '(', '[', '"', '\'', ',']);
        word.rsplit('/').next().unwrap_or(word)
    });
    words.any(|word| option.commands.contains(&word))
        && (option.action.is_empty() || words.any(|word| word == option.action))
}
