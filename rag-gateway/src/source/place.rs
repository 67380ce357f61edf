//! Where a repository lies: at its remote, however that is written, or in its folder.
//!
//! It is kept with each document as a text (`origin`), and compared when a repository of the same name is indexed:
//! `example.org/team/api in /home/me/api`, or only the remote (of clones that are deleted again, and of documents from
//! before folders were kept), or only the folder (where there is no remote).

use std::{borrow::Cow, path::Path};

use atlas_shared::gateway_api::MAX_SOURCE_BYTES;

/// What stands between the remote and the folder. No address has a space.
const IN: &str = " in ";

/// The address of a remote, without credentials.
#[derive(Debug)]
struct Address<'a> {
    /// Lower case; unknown where the usual port is meant.
    scheme: Option<String>,
    /// Whose home the path is relative to. Never of another kind: a name is a token as often as it is a name.
    user: Option<&'a str>,
    host: String,
    /// Other than the usual one of the scheme.
    port: Option<u16>,
    path: String,
}

/// The text for a remote (may be empty, or a path) of the repository in this folder. `is_here`: it stays there.
pub(super) fn origin(remote: &str, root: &Path, is_here: bool) -> String {
    let here = root.display().to_string();
    if remote.is_empty() {
        return here;
    }
    let local = match remote.split_once("://") {
        Some(("file", path)) => Some(path),
        Some(_) => None,
        // As git sees it: `host:path` has no slash before the colon.
        None => match remote.find(':') {
            Some(1) if cfg!(windows) => Some(remote),
            Some(colon) => remote.find('/').is_some_and(|slash| slash < colon).then_some(remote),
            None => Some(remote),
        },
    };
    if let Some(path) = local {
        // Relative ones are relative to the folder; an absolute one stays what it is.
        let folder = root.join(path);
        let folder = folder.canonicalize().unwrap_or(folder).display().to_string();
        return folder
            .strip_suffix(".git")
            .map(|folder| folder.trim_end_matches('/').to_owned())
            .unwrap_or(folder);
    }
    // What cannot be read may hold credentials anywhere.
    let Some(address) = Address::of_remote(remote) else { return here };
    let address = address.text();
    let whole = format!("{address}{IN}{here}");
    let fits = whole.len() <= MAX_SOURCE_BYTES && !here.chars().any(char::is_control);
    if is_here && fits { whole } else { address }
}

/// The remote of an origin; the folder where there is none.
pub(super) fn address(origin: &str) -> &str {
    split(origin).0.unwrap_or(origin)
}

/// The folder that an origin remembers.
pub(super) fn folder(origin: &str) -> Option<&str> {
    split(origin).1
}

/// Is it the same repository by its remote? Without one, by its folder.
pub(super) fn is_same(one: &str, other: &str) -> bool {
    if one == other {
        return true;
    }
    match (split(one).0, split(other).0) {
        (Some(one), Some(other)) => {
            one == other
                || Address::of_text(one)
                    .zip(Address::of_text(other))
                    .is_some_and(|(one, other)| one.is_same(&other))
        }
        _ => false,
    }
}

/// Remote and folder.
fn split(origin: &str) -> (Option<&str>, Option<&str>) {
    if Path::new(origin).is_absolute() {
        return (None, Some(origin));
    }
    match origin.split_once(IN) {
        Some((remote, folder)) => (Some(remote), Some(folder)),
        None => (Some(origin), None),
    }
}

impl<'a> Address<'a> {
    /// `None`: this is not understood.
    fn of_remote(remote: &'a str) -> Option<Self> {
        // `HELPER::ADDRESS`
        let is_helper = |name: &str| name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
        let helper = remote.split_once("::").filter(|(name, _)| is_helper(name));
        let remote = helper.map_or(remote, |(_, address)| address);
        if let Some((scheme, rest)) = remote.split_once("://") {
            let end = rest.find(['?', '#']).unwrap_or(rest.len());
            return Self::of_url(Some(scheme), &rest[..end]);
        }
        // `[user@]host:path`, `[user@host:port]:path`, `user@[host:port]:path`
        let (remote, whole) = match remote.strip_prefix('[') {
            Some(rest) => {
                let (authority, path) = rest.split_once("]:")?;
                (authority, Some(path))
            }
            None => (remote, None),
        };
        let (user, rest) = match remote.split_once('@') {
            Some((user, rest)) if !user.contains([':', '/']) => (Some(user), rest),
            _ => (None, remote),
        };
        let (authority, path) = match (whole, rest.strip_prefix('[')) {
            (Some(path), _) => (rest, path),
            (None, Some(rest)) => rest.split_once("]:")?,
            (None, None) => rest.split_once(':')?,
        };
        // `user:password@host:path` is nothing to git, but would be shown.
        let path = path.rsplit_once('@').map_or(path, |(_, path)| path);
        let is_at_home = !path.starts_with('/');
        Self::new(Some("ssh"), user.filter(|_| is_at_home), authority, path)
    }

    /// As [`Self::text`] and earlier releases wrote it.
    fn of_text(text: &'a str) -> Option<Self> {
        match text.split_once("://") {
            Some((scheme, rest)) => Self::of_url(Some(scheme), rest),
            None => Self::of_url(None, text),
        }
    }

    fn of_url(scheme: Option<&str>, rest: &'a str) -> Option<Self> {
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        let (user, authority) = match authority.rsplit_once('@') {
            Some((user, host)) => (Some(user), host),
            None => (None, authority),
        };
        let home = path.strip_prefix("~/");
        Self::new(scheme, user.filter(|_| home.is_some()), authority, home.unwrap_or(path))
    }

    /// `user` only where the path is relative to a home.
    fn new(scheme: Option<&str>, user: Option<&'a str>, authority: &str, path: &str) -> Option<Self> {
        let scheme = scheme.map(|scheme| match scheme.to_lowercase().as_str() {
            "git+ssh" | "ssh+git" => "ssh".to_owned(),
            scheme => scheme.to_owned(),
        });
        let (host, port) = match authority.rsplit_once(':') {
            // The colons of an IPv6 address are in brackets.
            Some((host, port)) if !port.contains(']') => {
                (host, if port.is_empty() { None } else { Some(port.parse().ok()?) })
            }
            _ => (authority, None),
        };
        let mut host = host.trim_end_matches('.').to_lowercase();
        if host.is_empty() || path.chars().chain(host.chars()).any(char::is_control) {
            return None;
        }
        let usual = match scheme.as_deref() {
            Some("ssh") => Some(22),
            Some("https") => Some(443),
            Some("http") => Some(80),
            Some("git") => Some(9418),
            _ => None,
        };
        let mut port = port.filter(|port| Some(*port) != usual);
        // Their ssh at the port of https.
        if let "ssh.github.com" | "altssh.gitlab.com" = host.as_str() {
            host = host.split_off(host.find('.').map_or(0, |dot| dot + 1));
            port = None;
        }
        let path = path.trim_end_matches('/');
        let path = path.strip_suffix(".git").unwrap_or(path);
        let mut path: Cow<'_, str> = path.replace(' ', "%20").into();
        // There `Team/Api` and `team/api` are one.
        if host == "github.com" {
            path = path.to_lowercase().into();
        }
        let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
        let user = user.filter(|user| !user.is_empty() && *user != "git" && !user.contains([':', ' ']));
        Some(Self { scheme, user, host, port, path: parts.join("/") })
    }

    /// `host/path`; with the scheme where there is more to say.
    fn text(&self) -> String {
        let Self { scheme, user, host, port, path } = self;
        let (user, home) = user.map_or_else(Default::default, |user| (format!("{user}@"), "~/"));
        let port = port.map(|port| format!(":{port}")).unwrap_or_default();
        let scheme = match scheme {
            Some(scheme) if !user.is_empty() || !port.is_empty() => format!("{scheme}://"),
            _ => String::new(),
        };
        format!("{scheme}{user}{host}{port}/{home}{path}")
    }

    /// Servers have a port for each protocol, so only two ports of one protocol are two servers.
    fn is_same(&self, other: &Self) -> bool {
        let differ =
            |one: Option<&str>, other: Option<&str>| one.zip(other).is_some_and(|(one, other)| one != other);
        let two_ports = self.scheme.is_some()
            && self.scheme == other.scheme
            && self.port.zip(other.port).is_some_and(|(one, other)| one != other);
        self.host == other.host && self.path == other.path && !two_ports && !differ(self.user, other.user)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(remote: &str) -> String {
        origin(remote, Path::new("/home/me/api"), false)
    }

    #[test]
    fn a_remote_is_one_however_it_is_written() {
        for (one, others) in [
            (
                "https://example.org/Team/api",
                &[
                    "https://me:hunter2@Example.ORG/Team/api.git/",
                    "https://example.org:443//Team/api.git?private_token=hunter2#x",
                    "http://example.org/Team/api",
                    "git@example.org:Team/api.git",
                    "example.org:Team/api",
                    "gitea@example.org:Team/api",
                    "ssh://git@example.org:22/Team/api.git",
                    "ssh://me@example.org:2222/Team/api.git",
                    "[git@example.org:2222]:Team/api",
                    "git@[example.org:2222]:Team/api",
                    "git+ssh://example.org/Team/api",
                ][..],
            ),
            (
                "git@github.com:acme/c.git",
                &["https://github.com/Acme/C", "ssh://git@ssh.github.com:443/acme/c.git"],
            ),
            ("https://[::1]:3000/c", &["ssh://git@[::1]:2222/c", "https://[::1]/c"]),
        ] {
            for other in others {
                assert!(is_same(&of(one), &of(other)), "{} and {}", of(one), of(other));
            }
        }
        assert_eq!(of("ssh://git@github.com:22/acme/c.git"), "github.com/acme/c");
        assert!(is_same("github.com/Acme/C", &of("git@github.com:acme/c")), "as earlier releases wrote it");
        assert!(
            is_same("example.org:2222/c", &of("ssh://git@example.org:2222/c")),
            "as earlier releases wrote it"
        );
    }

    #[test]
    fn two_repositories_are_two() {
        for (one, other) in [
            ("https://example.org/team/api", "https://example.org/other/api"),
            ("https://example.org/team/api", "https://example.com/team/api"),
            ("https://example.org/team/api", "https://example.org/Team/api"),
            ("http://127.0.0.1:3000/team/api", "http://127.0.0.1:4000/team/api"),
            ("ssh://git@127.0.0.1:2222/api", "ssh://git@127.0.0.1:2223/api"),
            ("ann@example.org:api.git", "ben@example.org:api.git"),
            ("https://example.org/team/api", ""),
            ("/srv/api", "/srv/other/api"),
            ("/srv/api", "https://srv/api"),
        ] {
            let (one, other) = (of(one), of(other));
            assert!(!is_same(&one, &other), "{one} and {other}");
        }
    }

    #[test]
    fn no_credentials_are_kept() {
        for remote in [
            "ftps://deploy:hunter2@ftp.example.org/c.git",
            "https://hunter2@example.org/c#-x",
            "https://example.org/c?token=hunter2",
            "https://me:hunter2/x@example.org/c",
            "me:hunter2@example.org:c",
            "ext::ssh -o Password=hunter2 %S x",
            "helper::https://me:hunter2@example.org/c",
            "ssh://me:hunter2@example.org/~/c",
        ] {
            assert!(!of(remote).contains("hunter2"), "{remote}: {}", of(remote));
        }
    }

    #[test]
    fn the_folder_is_kept_where_it_stays() {
        let root = Path::new("/home/me/notes in work");
        let origin = origin("https://example.org/a b", root, true);
        assert_eq!(origin, "example.org/a%20b in /home/me/notes in work");
        assert_eq!(
            (address(&origin), folder(&origin)),
            ("example.org/a%20b", Some("/home/me/notes in work"))
        );
        assert_eq!(address("/home/me/notes in work"), "/home/me/notes in work");
        assert_eq!(folder("example.org/a"), None);
    }
}
