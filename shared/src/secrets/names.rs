//! Names of secrets, in the languages that documents of teams are written in.

/// Longer names are none.
pub(super) const MAX_NAME: usize = 80;

/// What people choose and type: short, and often a word. Compared as [`KEYS`] are.
const PASSWORDS: &[&str] = &[
    "password",
    "passwd",
    "passphrase",
    "passcode",
    "passwort",
    "kennwort",
    "motdepasse",
    "wachtwoord",
    // With and without its ñ.
    "contrasena",
    "contrasea",
    "pwd",
    // Redis.
    "requirepass",
    "masterauth",
];

/// The same without ASCII, as they stand at the end of a name.
const FOREIGN: &[&str] = &["пароль", "密码", "密碼", "パスワード", "비밀번호"];

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
    "licensekey",
    "geheimnis",
    // With and without its ü.
    "apischluessel",
    "apischlssel",
    // `client-key-data` of a kubeconfig.
    "keydata",
    "credential",
    "credentials",
];

/// Those that are also the end of other words (`compass`, `unauth`): only by themselves, or after a sign.
const WHOLE: &[(&str, Class)] = &[("pass", Class::Password), ("pw", Class::Password), ("auth", Class::Key)];

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Class {
    Password,
    Key,
}

pub(super) fn is_name(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-' | b'.')
}

/// What a name is that of, if it is one of a secret.
pub(super) fn class_of(name: &str) -> Option<Class> {
    // `PASSWORD_2`, `token1`
    let name = name.trim_end_matches(|c: char| c.is_ascii_digit()).trim_end_matches(['_', '-', '.']);
    let tail = &name[name.ceil_char_boundary(name.len().saturating_sub(24))..];
    let mut end = String::with_capacity(24);
    end.extend(tail.chars().filter(char::is_ascii_alphanumeric).map(|c| c.to_ascii_lowercase()));
    if PASSWORDS.iter().any(|word| end.ends_with(word)) {
        return Some(Class::Password);
    }
    if KEYS.iter().any(|word| end.ends_with(word)) {
        return Some(Class::Key);
    }
    if !tail.is_ascii() && FOREIGN.iter().any(|word| tail.to_lowercase().ends_with(word)) {
        return Some(Class::Password);
    }
    WHOLE.iter().find_map(|(word, class)| {
        let before = name.len().checked_sub(word.len())?;
        let (head, tail) = (name.get(..before)?, name.get(before..)?);
        let camel = tail.starts_with(|c: char| c.is_ascii_uppercase())
            && head.ends_with(|c: char| c.is_ascii_lowercase());
        let apart = !head.ends_with(char::is_alphanumeric);
        (tail.eq_ignore_ascii_case(word) && (apart || camel)).then_some(*class)
    })
}

/// Whether these may be the last letters of a name, told before the name is looked at.
pub(super) fn may_end_name(before: &[u8]) -> bool {
    // Two letters tell it of nearly all words. What Markdown puts around a name is no part of it.
    let Some(last) = before.last_chunk::<2>() else { return false };
    match &last.map(|byte| byte | 0x20) {
        b"rd" | b"rt" | b"wd" | b"se" | b"de" | b"en" | b"et" | b"th" | b"al" | b"ls" | b"ss" | b"ey" => {
            ends_name(before)
        }
        [_, b'*' | b'`' | b'"'] => ends_name(before),
        last => *last == [0xb1, b'a'],
    }
}

fn ends_name(before: &[u8]) -> bool {
    let around = before.iter().rev().take(3).take_while(|byte| matches!(byte, b'*' | b'`' | b'"')).count();
    let Some([first, last @ ..]) = before[..before.len() - around].last_chunk::<4>() else { return false };
    matches!(
        (first | 0x20, &last.map(|byte| byte | 0x20)),
        (b'w', b"ord" | b"ort")
            | (b'o', b"ord" | b"ken")
            | (b'r', b"ase")
            | (b'c', b"ode" | b"ret")
            | (b'a', b"sse" | b"uth")
            | (b't', b"ial")
            | (b'i', b"als")
            | (b'p', b"ass")
            | (b's', b"swd")
            | (_, b"key" | b"pwd")
    )
}
