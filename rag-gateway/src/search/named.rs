//! Files that a question names.
//!
//! Who asks with `worker/src/outbox.rs` wants that file. Its path stands once in what is weighed of each of its chunks,
//! so files that speak of it more often would come first, and the file itself may not be among the candidates at all.
//! So its name is looked for among the first chunks of all documents, and what is best in the file goes before the rest.

use std::collections::{HashMap, HashSet};

use crate::{
    fusion::best_first,
    index::{Hit, Selection},
};

/// Names that are taken from a question.
const MAX_NAMES: usize = 4;

/// A name that more files have (`mod.rs`) does not tell which one is meant.
const MAX_FILES: usize = 8;

/// Passages of a file that go first; the others stand where they are found.
const FIRST: usize = 3;

/// Documents that have the words of a name in their first chunk, and are compared with it.
pub(super) const LOOKED_AT: usize = 256;

/// Longest name.
const MAX_NAME_BYTES: usize = 1024;

/// What a question names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Names {
    names: Vec<String>,
    /// The question without them.
    pub(super) rest: String,
}

impl Names {
    /// `None`: it names no file.
    pub(super) fn of(question: &str) -> Option<Self> {
        let mut names: Vec<String> = Vec::new();
        let mut rest = Vec::new();
        for word in question.split_whitespace() {
            match name(word) {
                Some(name) if names.len() < MAX_NAMES => names.push(name.to_owned()),
                _ => rest.push(word),
            }
        }
        (!names.is_empty()).then(|| Self { names, rest: rest.join(" ") })
    }

    /// The names, to be searched for.
    pub(super) fn text(&self) -> String {
        self.names.join(" ")
    }

    /// Of first chunks, those of files that are named.
    pub(super) fn files(&self, mut first: Vec<Hit>) -> Vec<Hit> {
        first.sort_by(best_first);
        let mut docs: HashSet<&str> = HashSet::new();
        for name in &self.names {
            let of = |exact: bool| -> HashSet<&str> {
                let hits = first.iter().filter(|hit| is_named(&hit.record.source, name, exact));
                hits.map(|hit| hit.record.doc.as_str()).collect()
            };
            // Where there is a `README.md` and others in folders, it is the first that is called so.
            let whole = of(true);
            let files = if whole.is_empty() { of(false) } else { whole };
            if files.len() <= MAX_FILES {
                docs.extend(files);
            }
        }
        let docs: HashSet<String> = docs.into_iter().map(str::to_owned).collect();
        first.retain(|hit| docs.contains(&hit.record.doc));
        for hit in &mut first {
            // How well it fits its own name says nothing about the rest of the question.
            hit.score = 0.0;
        }
        first
    }
}

/// What of these files goes first: what was `found` in each, or else how it begins.
pub(super) fn best(files: Vec<Hit>, mut found: Vec<Hit>) -> Vec<Hit> {
    found.sort_by(best_first);
    let mut taken: HashMap<String, usize> = HashMap::new();
    found.retain(|hit| {
        let taken = taken.entry(hit.record.doc.clone()).or_default();
        *taken += 1;
        *taken <= FIRST
    });
    found.extend(files.into_iter().filter(|file| !taken.contains_key(&file.record.doc)));
    found
}

/// The chunks of these files, of those that may be found.
pub(super) fn within(files: &[Hit], selection: Selection) -> Selection {
    Selection { docs: Some(files.iter().map(|hit| hit.record.doc.clone()).collect()), ..selection }
}

/// How many of them are asked for.
pub(super) fn length(files: &[Hit]) -> usize {
    files.len() * FIRST * 4
}

fn is_named(source: &str, name: &str, exact: bool) -> bool {
    match source.strip_suffix(name) {
        Some("") => true,
        Some(folder) => !exact && folder.ends_with('/'),
        None => false,
    }
}

/// The name of a file in a word: without quotes, punctuation and numbers of lines around it.
fn name(word: &str) -> Option<&str> {
    let quotes = |character: char| {
        matches!(character, '`' | '\'' | '"' | '(' | ')' | '[' | ']' | '<' | '>' | '“' | '”' | '«' | '»')
    };
    let name = word.trim_start_matches(quotes);
    let name = name.trim_end_matches(|character| {
        quotes(character) || matches!(character, '.' | ',' | ';' | ':' | '?' | '!')
    });
    // `a.rs:12`, `a.rs:12-20`, `a.md#L3`
    let mut name = name.split_once('#').map_or(name, |(name, _)| name);
    let numbers = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit() || byte == b'-');
    while let Some((before, _)) = name.rsplit_once(':').filter(|(_, line)| numbers(line)) {
        name = before;
    }
    let name = name.trim_start_matches("./").trim_start_matches('/');
    let file = name.rsplit('/').next()?;
    let has_extension = file.rsplit_once('.').is_some_and(|(_, extension)| {
        (1..=10).contains(&extension.len())
            && extension.bytes().all(|byte| byte.is_ascii_alphanumeric())
            && extension.bytes().any(|byte| byte.is_ascii_alphabetic())
    });
    // `deploy/Dockerfile`, not `and/or`.
    let in_folder = name.contains('/') && file.starts_with(|first: char| first.is_ascii_uppercase());
    ((has_extension || in_folder) && name.len() <= MAX_NAME_BYTES && !name.contains(':')).then_some(name)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;
    use uuid::Uuid;

    use super::*;
    use crate::index::ChunkRecord;

    fn hits(sources: &[&str]) -> Vec<Hit> {
        let hit = |source: &&str| Hit {
            id: Uuid::new_v5(&Uuid::NAMESPACE_URL, source.as_bytes()),
            score: 1.0,
            record: Arc::new(ChunkRecord {
                doc: (*source).to_owned(),
                source: (*source).to_owned(),
                ..ChunkRecord::default()
            }),
        };
        sources.iter().map(hit).collect()
    }

    fn files(question: &str, sources: &[&str]) -> Vec<String> {
        let Some(names) = Names::of(question) else { return Vec::new() };
        names.files(hits(sources)).iter().map(|hit| hit.record.source.clone()).collect()
    }

    #[test]
    fn names_are_told_from_words() {
        for (word, expected) in [
            ("worker/src/outbox.rs", Some("worker/src/outbox.rs")),
            ("`resilience.rs`?", Some("resilience.rs")),
            ("(./docs/MODELS.md),", Some("docs/MODELS.md")),
            ("/src/a.rs:12:5", Some("src/a.rs")),
            ("src/a.rs:12-20.", Some("src/a.rs")),
            ("a.md#L3", Some("a.md")),
            ("deploy/Dockerfile", Some("deploy/Dockerfile")),
            (".gitignore", Some(".gitignore")),
            ("guess/tuned.tsv", Some("guess/tuned.tsv")),
            ("and/or", None),
            ("retry.", None),
            ("1.5", None),
            ("v1.2.3", None),
            ("https://example.com/a.html", None),
            ("…", None),
            ("::", None),
            ("", None),
        ] {
            assert_eq!(name(word), expected, "{word}");
        }
        let names = Names::of("what does `a.rs` do with b.rs, and why?");
        let expected = (String::from("a.rs b.rs"), String::from("what does do with and why?"));
        assert_eq!(names.map(|names| (names.text(), names.rest)), Some(expected));
        assert_eq!(Names::of("how are tokens reserved"), None);
    }

    #[test]
    fn a_file_is_named_by_its_path_or_the_end_of_it() {
        let all = ["README.md", "docs/README.md", "src/a.rs", "src/ba.rs", "x/src/a.rs"];
        assert_eq!(files("README.md", &all), ["README.md"]);
        assert_eq!(files("docs/README.md", &all), ["docs/README.md"]);
        assert_eq!(files("a.rs", &all), ["src/a.rs", "x/src/a.rs"]);
        assert_eq!(files("compare src/ba.rs and README.md", &all), ["README.md", "src/ba.rs"]);
        assert!(files("b.rs", &all).is_empty());
        let many: Vec<String> = (0..9).map(|at| format!("{at}/mod.rs")).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        assert!(files("mod.rs", &many).is_empty(), "which one?");
        assert_eq!(files("3/mod.rs", &many), ["3/mod.rs"]);
    }

    #[test]
    fn a_file_begins_with_what_was_found_in_it_or_at_its_beginning() {
        let mut found = hits(&["a", "a", "a", "a", "b"]);
        for (at, hit) in found.iter_mut().enumerate() {
            hit.id = Uuid::from_u128(at as u128);
        }
        let best = best(hits(&["a", "b", "c"]), found);
        let sources: Vec<&str> = best.iter().map(|hit| hit.record.source.as_str()).collect();
        assert_eq!(sources, ["a", "a", "a", "b", "c"]);
    }

    proptest! {
        #[test]
        fn any_question_can_be_read(question in "(\\PC|[a-c./:#`0-9-]| ){0,60}") {
            if let Some(names) = Names::of(&question) {
                prop_assert!(names.names.len() <= MAX_NAMES);
                prop_assert!(names.names.iter().all(|name| !name.is_empty()));
            }
        }
    }
}
