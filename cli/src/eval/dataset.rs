//! Test collections in the layout of BEIR (Thakur et al., 2021): `corpus.jsonl`, `queries.jsonl`,
//! `qrels/<split>.tsv`.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fs::File,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
};

use atlas_shared::gateway_api::MAX_QUERY_BYTES;
use serde::{Deserialize, de::DeserializeOwned};

use crate::error::{CliError, Result};

/// Longest line that is read: a document of the collection.
const MAX_LINE_BYTES: usize = 16 << 20;

/// A document of the corpus.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct CorpusDocument {
    #[serde(rename = "_id")]
    pub(crate) id: String,
    #[serde(default)]
    pub(crate) title: Option<String>,
    pub(crate) text: String,
}

/// A query.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Query {
    #[serde(rename = "_id")]
    pub(crate) id: String,
    pub(crate) text: String,
}

/// A test collection.
#[derive(Clone, Debug)]
pub(crate) struct Dataset {
    pub(crate) name: String,
    pub(crate) corpus: Vec<CorpusDocument>,
    /// Only those with at least one relevant document.
    pub(crate) queries: Vec<Query>,
    /// Grades by query and document; not in it: not relevant.
    pub(crate) judgements: HashMap<String, BTreeMap<String, f64>>,
}

impl Dataset {
    /// Reads a folder.
    pub(crate) fn read(dir: &Path, split: &str) -> Result<Self> {
        let corpus: Vec<CorpusDocument> =
            json_lines(&dir.join("corpus.jsonl"), |document: &CorpusDocument| &document.id, |_| None)?;
        let judgements = judgements(&dir.join("qrels").join(format!("{split}.tsv")))?;
        let is_judged = |query: &Query| {
            judgements.get(&query.id).is_some_and(|graded| graded.values().any(|grade| *grade > 0.0))
        };
        // What is not asked may be as it is. A question that the gateway refuses would end the run after the corpus is
        // indexed and paid for.
        let problem = |query: &Query| is_judged(query).then(|| unanswerable(&query.text)).flatten();
        let mut queries: Vec<Query> =
            json_lines(&dir.join("queries.jsonl"), |query: &Query| &query.id, problem)?;
        queries.retain(is_judged);
        if corpus.is_empty() || queries.is_empty() {
            return Err(CliError::usage(format!("there is nothing to measure in {}", dir.display()))
                .because(format_args!(
                    "{} documents, {} queries with relevant documents",
                    corpus.len(),
                    queries.len()
                )));
        }
        let name = dir
            .canonicalize()
            .ok()
            .and_then(|dir| Some(dir.file_name()?.to_string_lossy().into_owned()))
            .unwrap_or_else(|| "dataset".to_owned());
        Ok(Self { name, corpus, queries, judgements })
    }
}

fn open(path: &Path) -> Result<BufReader<File>> {
    File::open(path).map(BufReader::new).map_err(|error| {
        CliError::usage(format!("cannot read {}", path.display()))
            .because(error)
            .fix("name a folder in BEIR's layout: corpus.jsonl, queries.jsonl, qrels/test.tsv")
    })
}

/// Why no gateway answers this.
fn unanswerable(query: &str) -> Option<String> {
    match query.trim().len() {
        0 => Some("the question is empty".to_owned()),
        length if length > MAX_QUERY_BYTES => {
            Some(format!("the question has {length} bytes; at most {MAX_QUERY_BYTES} are searched for"))
        }
        _ => None,
    }
}

/// Reads a file. `problem` says why an item cannot be used.
fn json_lines<T: DeserializeOwned>(
    path: &Path,
    id: impl Fn(&T) -> &String,
    problem: impl Fn(&T) -> Option<String>,
) -> Result<Vec<T>> {
    let mut items = Vec::new();
    let mut ids = HashSet::new();
    for (number, line) in lines(path)? {
        let item = serde_json::from_str(&line).map_err(|error| bad_line(path, number, &error))?;
        if !ids.insert(id(&item).clone()) {
            return Err(bad_line(path, number, &format_args!("{:?} was there before", id(&item))));
        }
        if let Some(problem) = problem(&item) {
            return Err(bad_line(path, number, &format_args!("{problem} ({:?})", id(&item))));
        }
        items.push(item);
    }
    Ok(items)
}

/// Query, document and grade, separated by tabs, below a header.
fn judgements(path: &Path) -> Result<HashMap<String, BTreeMap<String, f64>>> {
    let mut judgements: HashMap<String, BTreeMap<String, f64>> = HashMap::new();
    for (number, line) in lines(path)? {
        let mut fields = line.split('\t').map(str::trim);
        let (Some(query), Some(document), Some(grade)) = (fields.next(), fields.next(), fields.next()) else {
            return Err(bad_line(path, number, &"not three fields separated by tabs"));
        };
        match grade.parse::<f64>() {
            Ok(grade) if grade.is_finite() => {
                judgements.entry(query.to_owned()).or_default().insert(document.to_owned(), grade);
            }
            // The header.
            _ if number == 1 => {}
            _ => return Err(bad_line(path, number, &format_args!("{grade:?} is no grade"))),
        }
    }
    Ok(judgements)
}

/// The lines that are not empty, numbered from 1.
fn lines(path: &Path) -> Result<Vec<(usize, String)>> {
    let path: PathBuf = path.to_owned();
    open(&path)?
        .lines()
        .enumerate()
        .map(|(at, line)| {
            let line = line.map_err(|error| bad_line(&path, at + 1, &error))?;
            if line.len() > MAX_LINE_BYTES {
                return Err(bad_line(&path, at + 1, &"longer than 16 MiB"));
            }
            Ok((at + 1, line))
        })
        .filter(|line| !line.as_ref().is_ok_and(|(_, line)| line.trim().is_empty()))
        .collect()
}

fn bad_line(path: &Path, number: usize, why: &dyn std::fmt::Display) -> CliError {
    CliError::usage(format!("{}, line {number} cannot be read", path.display())).because(why)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
    use super::*;

    fn write(dir: &Path, qrels: &str) {
        std::fs::create_dir_all(dir.join("qrels")).unwrap();
        std::fs::write(
            dir.join("corpus.jsonl"),
            "{\"_id\":\"d1\",\"title\":\"T\",\"text\":\"x\"}\n\n{\"_id\":\"d2\",\"text\":\"y\"}\n",
        )
        .unwrap();
        std::fs::write(
            dir.join("queries.jsonl"),
            "{\"_id\":\"1\",\"text\":\"q\"}\n{\"_id\":\"2\",\"text\":\"nobody judged this\"}\n",
        )
        .unwrap();
        std::fs::write(dir.join("qrels/test.tsv"), qrels).unwrap();
    }

    #[test]
    fn a_collection_is_read_and_queries_without_relevant_documents_are_left_out() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), "query-id\tcorpus-id\tscore\n1\td1\t2\n1\td2\t0\n2\td1\t0\n");
        let dataset = Dataset::read(dir.path(), "test").unwrap();
        assert_eq!(dataset.corpus.len(), 2);
        assert_eq!(dataset.queries.iter().map(|query| query.id.as_str()).collect::<Vec<_>>(), ["1"]);
        assert_eq!(dataset.judgements["1"], [("d1".to_owned(), 2.0), ("d2".to_owned(), 0.0)].into());
    }

    #[test]
    fn a_broken_line_is_named() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), "query-id\tcorpus-id\tscore\n1\td1\tgood\n");
        let error = Dataset::read(dir.path(), "test").unwrap_err().to_string();
        assert!(error.contains("test.tsv, line 2") && error.contains("\"good\" is no grade"), "{error}");
        write(dir.path(), "query-id\tcorpus-id\tscore\n1\td1\t1\n");
        std::fs::write(dir.path().join("queries.jsonl"), "{\"_id\":\"1\",\"text\":\"q\"}\n{\"_id\":1}\n")
            .unwrap();
        let error = Dataset::read(dir.path(), "test").unwrap_err().to_string();
        assert!(error.contains("queries.jsonl, line 2"), "{error}");
        for (text, why) in [(" ".to_owned(), "is empty"), ("long ".repeat(7000), "at most 32768")] {
            write(dir.path(), "query-id\tcorpus-id\tscore\n1\td1\t1\n");
            let queries = format!("{{\"_id\":\"2\",\"text\":\"\"}}\n{{\"_id\":\"1\",\"text\":\"{text}\"}}\n");
            std::fs::write(dir.path().join("queries.jsonl"), queries).unwrap();
            let error = Dataset::read(dir.path(), "test").unwrap_err().to_string();
            assert!(error.contains("queries.jsonl, line 2") && error.contains(why), "{error}");
        }
        let twice = "{\"_id\":\"a\",\"text\":\"q\"}\n";
        std::fs::write(dir.path().join("corpus.jsonl"), twice.repeat(2)).unwrap();
        let error = Dataset::read(dir.path(), "test").unwrap_err().to_string();
        assert!(error.contains("corpus.jsonl, line 2") && error.contains("\"a\""), "{error}");
        write(dir.path(), "");
        let error = Dataset::read(dir.path(), "dev").unwrap_err().to_string();
        assert!(error.contains("dev.tsv") && error.contains("BEIR"), "{error}");
    }
}
