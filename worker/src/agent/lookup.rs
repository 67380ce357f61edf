//! What to ask the gateway before a document is begun.
//!
//! A refinement often names nothing that the index knows ("use Redis instead"): what it is about is in
//! the parent. So the parent's title and decisions are searched for too, and the passages that the
//! parent cited are looked up again, so that what it stood on can be cited once more.

use std::collections::{BTreeMap, HashSet};

use atlas_shared::gateway_api::Passage;
use serde::Deserialize as _;
use serde_json::Value;

use super::{clean, finish::Citation};

/// Longest query that goes to the gateway.
const MAX_QUERY_CHARS: usize = 1_000;
/// The parent's part of it.
const MAX_PARENT_CHARS: usize = 400;
/// Files of the parent that are looked up again.
const MAX_FILES: usize = 4;
/// Passages of one such file that are kept where none is the one that was cited.
const MAX_OTHERS: usize = 1;

/// A question for the gateway.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lookup {
    /// What to look for.
    pub query: String,
    /// Only in this file, as a glob; `None`: everywhere.
    pub path: Option<String>,
}

/// The first question: the request, and what its parent is about.
pub fn first(request: &str, parent: Option<&Value>) -> Lookup {
    let request = clean::cut(&clean::line(request), MAX_QUERY_CHARS);
    let query = match parent.map(subject).filter(|subject| !subject.is_empty()) {
        Some(subject) => format!("{request} {subject}"),
        None => request,
    };
    Lookup { query, path: None }
}

/// One question for each of the files that the parent cited most.
pub fn again(request: &str, parent: &Value) -> Vec<Lookup> {
    let mut files: BTreeMap<String, usize> = BTreeMap::new();
    for citation in citations(parent) {
        *files.entry(citation.source).or_default() += 1;
    }
    let mut files: Vec<(String, usize)> = files.into_iter().collect();
    files.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    let Lookup { query, .. } = first(request, Some(parent));
    files
        .into_iter()
        .take(MAX_FILES)
        .map(|(file, _)| Lookup { query: query.clone(), path: Some(literal(&file)) })
        .collect()
}

/// All passages in the order of their worth: what the request found first, then what the parent cited,
/// in turns, so that neither pushes the other out of a small budget.
pub fn merge(found: Vec<Passage>, cited: Vec<Passage>, parent: &Value) -> Vec<Passage> {
    let citations = citations(parent);
    let was_cited = |passage: &Passage| {
        citations.iter().any(|citation| {
            citation.source == passage.source
                && citation.start_line <= passage.end_line
                && passage.start_line <= citation.end_line
        })
    };
    let mut others: BTreeMap<String, usize> = BTreeMap::new();
    let cited: Vec<Passage> = cited
        .into_iter()
        .filter(|passage| {
            let count = others.entry(passage.source.clone()).or_default();
            was_cited(passage) || {
                *count += 1;
                *count <= MAX_OTHERS
            }
        })
        .collect();
    let mut seen = HashSet::new();
    let (mut first, mut second) = (found.into_iter(), cited.into_iter());
    let mut merged = Vec::new();
    loop {
        let pair = [first.next(), second.next()];
        if pair.iter().all(Option::is_none) {
            return merged;
        }
        for passage in pair.into_iter().flatten() {
            if seen.insert((passage.source.clone(), passage.start_line, passage.end_line)) {
                merged.push(passage);
            }
        }
    }
}

/// The parent's title and the titles of its decisions.
fn subject(parent: &Value) -> String {
    let mut words: Vec<&str> = Vec::new();
    let spec = &parent["spec"];
    words.extend(spec["title"].as_str());
    words.extend(spec["outcome"]["chosen"].as_str());
    for decision in spec["decisions"].as_array().into_iter().flatten() {
        words.extend(decision["title"].as_str());
    }
    if words.is_empty() {
        // An answer of an older version, or of another writer, has its Markdown only.
        let content = parent["content"].as_str().unwrap_or_default();
        words.extend(content.lines().find_map(|line| line.strip_prefix("# ")));
    }
    clean::cut(&clean::line(&words.join(" ")), MAX_PARENT_CHARS)
}

fn citations(parent: &Value) -> Vec<Citation> {
    parent["metadata"]["citations"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|citation| Citation::deserialize(citation).ok())
        .collect()
}

/// A glob that means this path and nothing else.
fn literal(path: &str) -> String {
    path.chars().fold(String::with_capacity(path.len()), |mut glob, c| {
        match c {
            '*' | '?' | '[' | ']' | '{' | '}' | '!' => {
                glob.push('[');
                glob.push(c);
                glob.push(']');
            }
            c => glob.push(c),
        }
        glob
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{super::passages::tests::passage, *};

    fn parent() -> Value {
        let citation = |source: &str, start: u32| {
            json!({"n": 1, "source": source, "start_line": start, "end_line": start + 2, "heading": null,
                   "collection": "atlas", "repo": null, "commit": null, "text_hash": "x"})
        };
        json!({
            "msg_type": "spec", "content": "# Run leases\n",
            "spec": {"title": "Run leases", "decisions": [{"title": "Leases in the store"}]},
            "metadata": {"citations": [citation("docs/b.md", 1), citation("docs/a[1].md", 10), citation("docs/b.md", 30)]},
        })
    }

    #[test]
    fn a_refinement_is_searched_with_what_its_parent_is_about() {
        assert_eq!(first("Use Redis", Some(&parent())).query, "Use Redis Run leases Leases in the store");
        let old = json!({"content": "> note\n\n# Old title\n\ntext"});
        assert_eq!(first("Use Redis", Some(&old)).query, "Use Redis Old title");
        assert_eq!(first("Use\nRedis", None).query, "Use Redis");
        assert!(first(&"long ".repeat(9_000), Some(&parent())).query.chars().count() < 1_500);
    }

    #[test]
    fn the_files_that_the_parent_cited_are_looked_up_again() {
        let lookups = again("Use Redis", &parent());
        let paths: Vec<&str> = lookups.iter().filter_map(|lookup| lookup.path.as_deref()).collect();
        assert_eq!(paths, ["docs/b.md", "docs/a[[]1[]].md"]);
        assert_eq!(again("x", &json!({"content": "no citations"})), []);
    }

    #[test]
    fn what_was_cited_comes_back_without_crowding_out_what_was_found() {
        let merged = merge(
            vec![passage("new.md", 1, "n"), passage("docs/b.md", 2, "b"), passage("new.md", 9, "n")],
            vec![
                passage("docs/b.md", 2, "b"),
                passage("docs/b.md", 60, "other"),
                passage("docs/b.md", 80, "another"),
                passage("docs/b.md", 31, "cited too"),
            ],
            &parent(),
        );
        let places: Vec<(&str, u32)> =
            merged.iter().map(|passage| (passage.source.as_str(), passage.start_line)).collect();
        assert_eq!(
            places,
            [("new.md", 1), ("docs/b.md", 2), ("docs/b.md", 60), ("new.md", 9), ("docs/b.md", 31)]
        );
    }
}
