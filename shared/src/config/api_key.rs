//! One caller's key, as `API_KEYS` and its file hold it.

use std::fmt::Write as _;

use sha2::{Digest as _, Sha256};
use uuid::Uuid;

use crate::Secret;

/// Shortest key that is accepted, in bytes.
const MIN_KEY_BYTES: usize = 8;

/// A caller of the gateway: its name, the hash of its key, and whose passages it may see.
#[derive(Clone)]
pub struct ApiKey {
    /// The caller. Two keys may have one name, so that a key can be changed without a gap.
    pub name: String,
    /// SHA-256 of the key. Keys are long and random, so a slow hash would add nothing.
    pub sha256: [u8; 32],
    /// The only tenant it may read and write; `None`: all.
    pub tenant: Option<String>,
    /// The key itself, where it was given in the environment: a command of the same user shows it to
    /// its own gateway.
    pub plain: Option<Secret>,
}

// A hash is no secret, but nobody needs it in a log.
impl std::fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The first bytes tell two keys apart.
        write!(f, "ApiKey({}:{}…:{:?})", self.name, &hex(&self.sha256)[..8], self.tenant)
    }
}

impl ApiKey {
    /// A new key: 244 random bits from the system.
    pub fn generate() -> Secret {
        Secret::new(format!("atlas_{}{}", Uuid::new_v4().simple(), Uuid::new_v4().simple()))
    }

    /// The entry of a key.
    pub fn new(name: &str, key: &str, tenant: Option<&str>) -> Self {
        Self {
            name: name.to_owned(),
            sha256: hash(key),
            tenant: tenant.map(str::to_owned),
            plain: Some(Secret::new(key)),
        }
    }

    /// Reads `name:sha256:HEX[:tenant]` or, unless `hashed_only`, `name:key[:tenant]`. The error does
    /// not repeat the entry, which is a secret.
    pub fn parse(entry: &str, hashed_only: bool) -> Result<Self, &'static str> {
        let mut parts = entry.split(':');
        let name = parts.next().unwrap_or_default();
        let Some(second) = parts.next() else { return Err("has no `:` between name and key") };
        if !crate::message::is_name(name) {
            return Err("does not begin with a name of letters, digits, '.', '_' and '-'");
        }
        let (sha256, plain) = match second {
            "sha256" => {
                let hash = parts.next().and_then(unhex);
                (hash.ok_or("has a hash that is not 64 hexadecimal digits")?, None)
            }
            _ if hashed_only => return Err("is not name:sha256:HEX; keys in a file must be hashed"),
            key if key.len() < MIN_KEY_BYTES => return Err("has a key of less than 8 characters"),
            key => (hash(key), Some(Secret::new(key))),
        };
        let tenant = parts.next().map(str::to_owned);
        if tenant.as_deref().is_some_and(|tenant| !crate::message::is_name(tenant)) {
            return Err("has a tenant that is not 1 to 128 letters, digits, '.', '_' and '-'");
        }
        if parts.next().is_some() {
            return Err("has too many parts; keys cannot contain a `:`");
        }
        Ok(Self { name: name.to_owned(), sha256, tenant, plain })
    }

    /// The line for `API_KEYS_FILE`.
    pub fn line(&self) -> String {
        let tenant = self.tenant.as_deref().map_or_else(String::new, |tenant| format!(":{tenant}"));
        format!("{}:sha256:{}{tenant}", self.name, hex(&self.sha256))
    }
}

fn hash(key: &str) -> [u8; 32] {
    Sha256::digest(key.as_bytes()).into()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn unhex(text: &str) -> Option<[u8; 32]> {
    let digits = text.as_bytes();
    if digits.len() != 64 || !digits.iter().all(u8::is_ascii_hexdigit) {
        return None;
    }
    let mut bytes = [0; 32];
    for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
    }
    Some(bytes)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn a_key_and_its_line_are_the_same_caller() {
        for tenant in [None, Some("acme")] {
            let key = ApiKey::new("ci", "a-long-random-key", tenant);
            let plain = format!("ci:a-long-random-key{}", tenant.map_or("", |_| ":acme"));
            for read in [ApiKey::parse(&key.line(), true), ApiKey::parse(&plain, false)] {
                let read = read.unwrap();
                assert_eq!((&read.name, read.sha256, &read.tenant), (&key.name, key.sha256, &key.tenant));
            }
        }
        let line = ApiKey::new("ci", "abc", None).line();
        assert_eq!(line, "ci:sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    }

    #[test]
    fn wrong_entries_are_refused_without_being_repeated() {
        let hash = "0".repeat(64);
        for entry in [
            "no-colon-at-all",
            ":a-long-random-key",
            "ci:short",
            "ci:sha256",
            "ci:sha256:abc",
            &format!("ci:sha256:{hash}:"),
            &format!("ci:sha256:{hash}:acme:more"),
            &format!("ci:sha256:{}é", &hash[..62]),
            "ci:a-long-random-key:a tenant",
            "two words:a-long-random-key",
        ] {
            let problem = ApiKey::parse(entry, false).unwrap_err();
            assert!(!problem.contains("a-long-random-key"), "{problem}");
        }
        assert!(ApiKey::parse("ci:a-long-random-key", true).is_err(), "files hold hashes");
    }
}
