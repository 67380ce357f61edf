//! Where cited files can be read: URL templates by collection (`SOURCE_URL_TEMPLATE`).

use serde::{Deserialize, Serialize};
use url::Url;

/// What a template may hold.
const PLACEHOLDERS: [&str; 6] = ["path", "start", "end", "commit", "repo", "collection"];
/// Longer links are left out.
const MAX_URL_BYTES: usize = 2_000;

/// URL templates by collection.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceUrls(Vec<Template>);

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Template {
    /// `None`: for every collection that has none of its own.
    collection: Option<String>,
    text: String,
}

/// Lines of a file that is cited.
#[derive(Clone, Copy, Debug)]
pub struct SourceLines<'a> {
    /// Where it was found.
    pub collection: &'a str,
    /// Path of the file.
    pub path: &'a str,
    /// First line, counted from 1.
    pub start: u32,
    /// Last line, included.
    pub end: u32,
    /// Commit, when known.
    pub commit: Option<&'a str>,
    /// Repository, when known.
    pub repo: Option<&'a str>,
}

impl SourceUrls {
    /// Reads the setting: templates separated by spaces, each for all collections or `NAME=TEMPLATE`.
    /// The error says what is wrong with which one.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut templates: Vec<Template> = Vec::new();
        for entry in text.split_whitespace() {
            let (collection, text) = match entry.split_once('=') {
                Some((name, template)) if crate::message::is_name(name) => (Some(name.to_owned()), template),
                _ => (None, entry),
            };
            check(text).map_err(|why| format!("{entry:?} {why}"))?;
            if templates.iter().any(|known| known.collection == collection) {
                let whose = collection.as_deref().unwrap_or("all collections");
                return Err(format!("names {whose} twice"));
            }
            templates.push(Template { collection, text: text.to_owned() });
        }
        Ok(Self(templates))
    }

    /// The address of these lines. `None`: there is no template for the collection, or it needs
    /// something that is not known of the file (its commit), or the link would not be a plain one.
    pub fn link(&self, lines: &SourceLines<'_>) -> Option<String> {
        let template = self
            .0
            .iter()
            .find(|template| template.collection.as_deref() == Some(lines.collection))
            .or_else(|| self.0.iter().find(|template| template.collection.is_none()))?;
        let mut link = String::new();
        let mut rest = template.text.as_str();
        while let Some((before, after)) = rest.split_once('{') {
            let (name, after) = after.split_once('}')?;
            link.push_str(before);
            match name {
                "path" => link.push_str(&encoded(lines.path.trim_start_matches('/'), true)),
                "start" => link.push_str(&lines.start.to_string()),
                "end" => link.push_str(&lines.end.to_string()),
                "commit" => link.push_str(&encoded(lines.commit?, false)),
                // `owner/name` is two parts of a path on every forge.
                "repo" => link.push_str(&encoded(lines.repo?, true)),
                _ => link.push_str(&encoded(lines.collection, false)),
            }
            rest = after;
        }
        link.push_str(rest);
        // What was put in is encoded, so the template's own scheme and host are the link's.
        let walks = lines.path.split('/').any(|part| part == "..");
        (!walks && link.len() <= MAX_URL_BYTES && Url::parse(&link).is_ok()).then_some(link)
    }
}

fn check(template: &str) -> Result<(), String> {
    let mut plain = String::new();
    let mut rest = template;
    while let Some((before, after)) = rest.split_once('{') {
        plain.push_str(before);
        let Some((name, after)) = after.split_once('}') else { return Err("has a { without a }".to_owned()) };
        if !PLACEHOLDERS.contains(&name) {
            return Err(format!("holds {{{name}}}; known: {{{}}}", PLACEHOLDERS.join("}, {")));
        }
        plain.push('x');
        rest = after;
    }
    plain.push_str(rest);
    if !template.contains("{path}") {
        return Err("has no {path}".to_owned());
    }
    let host = template.split_once("://").and_then(|(_, rest)| rest.split('/').next()).unwrap_or_default();
    match Url::parse(&plain) {
        _ if plain.contains(['<', '>', '"', '`', '\\', '(', ')', '|']) => {
            Err("holds a character that does not belong into a URL".to_owned())
        }
        Ok(url)
            if matches!(url.scheme(), "http" | "https") && url.host().is_some() && !host.contains('{') =>
        {
            Ok(())
        }
        _ => Err("is not an http(s) URL with a fixed host".to_owned()),
    }
}

/// Percent-encoded: only unreserved characters stay (RFC 3986), and slashes where they separate.
fn encoded(text: &str, slashes: bool) -> String {
    use std::fmt::Write as _;
    text.bytes().fold(String::with_capacity(text.len()), |mut out, byte| {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => out.push(char::from(byte)),
            b'/' if slashes => out.push('/'),
            // Writing to a String cannot fail.
            _ => {
                let _ = write!(out, "%{byte:02X}");
            }
        }
        out
    })
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    const LINES: SourceLines<'static> = SourceLines {
        collection: "atlas",
        path: "docs/a b.md",
        start: 3,
        end: 9,
        commit: Some("3f9a2c1"),
        repo: Some("team/app"),
    };

    #[test]
    fn a_collection_has_its_template_and_others_the_common_one() {
        let urls = SourceUrls::parse(
            "https://git.example.com/{repo}/blob/{commit}/{path}#L{start}-L{end} wiki=https://wiki.example.com/{path}?at={start}",
        )
        .unwrap();
        assert_eq!(
            urls.link(&LINES).as_deref(),
            Some("https://git.example.com/team/app/blob/3f9a2c1/docs/a%20b.md#L3-L9")
        );
        let wiki = SourceLines { collection: "wiki", commit: None, ..LINES };
        assert_eq!(urls.link(&wiki).as_deref(), Some("https://wiki.example.com/docs/a%20b.md?at=3"));
    }

    #[test]
    fn what_is_not_known_gives_no_link() {
        let urls = SourceUrls::parse("https://x.example.com/{commit}/{path}").unwrap();
        assert_eq!(urls.link(&SourceLines { commit: None, ..LINES }), None);
        let named = SourceUrls::parse("other=https://x.example.com/{path}").unwrap();
        assert_eq!(named.link(&LINES), None);
        assert_eq!(SourceUrls::default().link(&LINES), None);
    }

    #[test]
    fn a_hostile_path_stays_a_path() {
        let urls = SourceUrls::parse("https://x.example.com/{commit}/{path}").unwrap();
        let hostile = SourceLines {
            path: "a](javascript:alert(1))<script>\"?x=1#y@evil.example//z",
            commit: Some("../../x@evil"),
            ..LINES
        };
        let link = urls.link(&hostile).unwrap();
        assert!(link.starts_with("https://x.example.com/"), "{link}");
        assert!(!link.contains(['(', ')', '<', '>', '"', ']', '@', '?', '#']), "{link}");
        assert_eq!(urls.link(&SourceLines { path: "../../etc/passwd", ..LINES }), None);
        assert_eq!(urls.link(&SourceLines { path: &"x".repeat(5000), ..LINES }), None);
    }

    #[test]
    fn a_bad_template_says_what_is_wrong() {
        for (bad, why) in [
            ("https://x.example.com/", "{path}"),
            ("https://x.example.com/{file}", "known"),
            ("https://x.example.com/{path", "without"),
            ("javascript:alert({path})", "URL"),
            ("https://{repo}/{path}", "fixed host"),
            ("ftp://x.example.com/{path}", "http"),
            ("a=https://x.example.com/{path} a=https://y.example.com/{path}", "twice"),
            ("https://x.example.com/{path})", "character"),
        ] {
            let error = SourceUrls::parse(bad).unwrap_err();
            assert!(error.contains(why), "{bad}: {error}");
        }
        assert_eq!(SourceUrls::parse(" "), Ok(SourceUrls::default()));
    }
}
