//! Checks citations against the files they name: does the file exist, does it have these lines, and
//! are they, byte for byte, the passage that the spec was written from?

use std::{collections::HashMap, fmt, fs, path::Path};

use atlas_rag_gateway::source::decode::decode;
use atlas_shared::gateway_api::quote_hash;
use serde::Deserialize;
use serde_json::Value;

/// The part of an entry of `metadata.citations` that is checked.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub(crate) struct Citation {
    /// Its number in the text.
    pub(crate) n: u32,
    /// Path of the file, relative to what was indexed.
    pub(crate) source: String,
    /// First line, counted from 1.
    pub(crate) start_line: u32,
    /// Last line, included.
    pub(crate) end_line: u32,
    /// [`quote_hash`] of the passage.
    pub(crate) text_hash: String,
}

impl fmt::Display for Citation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{}] {}:{}-{}", self.n, self.source, self.start_line, self.end_line)
    }
}

/// Reads `metadata.citations`.
pub(crate) fn of_metadata(citations: Option<&Value>) -> Result<Vec<Citation>, String> {
    let Some(citations) = citations else { return Ok(Vec::new()) };
    Vec::deserialize(citations)
        .map_err(|error| format!("metadata.citations is not a list of citations: {error}"))
}

/// The citations that do not hold, each with the reason.
pub(crate) fn check(root: &Path, citations: &[Citation]) -> Vec<(Citation, String)> {
    let mut files: HashMap<&str, Result<String, String>> = HashMap::new();
    citations
        .iter()
        .filter_map(|citation| {
            let file = files.entry(&citation.source).or_insert_with(|| read(root, &citation.source));
            let verdict = file.as_ref().map_err(Clone::clone).and_then(|text| check_lines(text, citation));
            verdict.err().map(|why| (citation.clone(), why))
        })
        .collect()
}

fn read(root: &Path, source: &str) -> Result<String, String> {
    let root = root.canonicalize().map_err(|error| error.to_string())?;
    let path =
        root.join(source).canonicalize().map_err(|error| format!("the file cannot be read: {error}"))?;
    // A source is somebody else's text: it must not make us read outside.
    if !path.starts_with(&root) {
        return Err("the file is outside the folder".to_owned());
    }
    let data = fs::read(path).map_err(|error| format!("the file cannot be read: {error}"))?;
    // As it was indexed.
    let decoded = decode(data).map_err(|why| why.unwrap_or_else(|| "the file is binary".to_owned()))?;
    Ok(decoded.text)
}

fn check_lines(text: &str, citation: &Citation) -> Result<(), String> {
    let lines: Vec<&str> = text.lines().collect();
    let (start, end) = (citation.start_line as usize, citation.end_line as usize);
    if start == 0 || start > end {
        return Err(format!("lines {start} to {end} are no lines"));
    }
    let Some(cited) = lines.get(start - 1..end) else {
        return Err(format!("the file has only {} lines", lines.len()));
    };
    if quote_hash(&cited.join("\n")) == citation.text_hash {
        Ok(())
    } else {
        Err("the lines are not the passage (did the file change since it was indexed?)".to_owned())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use serde_json::json;

    use super::*;

    fn citation(source: &str, start_line: u32, end_line: u32, text: &str) -> Citation {
        Citation { n: 1, source: source.to_owned(), start_line, end_line, text_hash: quote_hash(text) }
    }

    #[test]
    fn a_citation_holds_only_if_the_lines_are_the_passage() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("root")).unwrap();
        let root = dir.path().join("root");
        fs::write(root.join("a.md"), "one\r\ntwo\nthree\n").unwrap();
        fs::write(dir.path().join("outside.md"), "secret\n").unwrap();
        let faults = check(
            &root,
            &[
                citation("a.md", 1, 2, "one\ntwo"),
                citation("a.md", 2, 3, "two\nthree\n"),
                citation("a.md", 1, 1, "uno"),
                citation("a.md", 3, 9, "three"),
                citation("a.md", 0, 1, "one"),
                citation("gone.md", 1, 1, "one"),
                citation("../outside.md", 1, 1, "secret"),
            ],
        );
        let whys: Vec<&str> = faults.iter().map(|(_, why)| why.split(':').next().unwrap()).collect();
        assert_eq!(
            whys,
            [
                "the lines are not the passage (did the file change since it was indexed?)",
                "the file has only 3 lines",
                "lines 0 to 1 are no lines",
                "the file cannot be read",
                "the file is outside the folder",
            ]
        );
    }

    #[test]
    fn metadata_without_citations_has_none_and_nonsense_is_refused() {
        assert_eq!(of_metadata(None).unwrap(), []);
        assert!(of_metadata(Some(&json!([{"n": 1}]))).is_err());
    }
}
