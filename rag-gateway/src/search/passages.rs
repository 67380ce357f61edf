//! From ranked chunks to passages: one a file if asked for, neighbours joined within a bound.
//!
//! Joined passages are exactly the lines they name, as single chunks are: what stands between two
//! chunks was kept when they were cut, and where it was not they are not joined.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use atlas_shared::gateway_api::Passage;
use uuid::Uuid;

use super::query::Query;
use crate::{fusion::Fused, index::ChunkRecord, indexing::chunk_id_at};

/// A passage in the making.
#[derive(Clone, Debug)]
pub(super) struct Draft {
    collection: usize,
    /// The chunk that was ranked best: what the passage is named and scored by.
    best: Arc<ChunkRecord>,
    score: f64,
    cosine: Option<f32>,
    /// What was joined; `None`: the best chunk's text.
    joined: Option<String>,
    start: u32,
    end: u32,
    /// An upper bound; zero: not known, so nothing is joined.
    tokens: usize,
    /// First and last chunk in it.
    first: u32,
    last: u32,
    /// How the first one is joined to what stands before it.
    glue: Option<String>,
}

impl Draft {
    fn new(fused: Fused) -> Self {
        let Fused { hit, collection, score, cosine } = fused;
        let best = hit.record;
        Self {
            collection,
            score,
            cosine,
            joined: None,
            start: best.start,
            end: best.end,
            tokens: best.tokens as usize,
            first: best.n,
            last: best.n,
            glue: best.glue.clone(),
            best,
        }
    }

    fn text(&self) -> &str {
        self.joined.as_deref().unwrap_or(&self.best.text)
    }

    pub(super) fn collection(&self) -> usize {
        self.collection
    }

    /// Ids of the chunks before and after it, if there may be room for them.
    pub(super) fn neighbours(&self, bound: usize) -> Vec<Uuid> {
        if self.tokens == 0 || self.tokens >= bound {
            return Vec::new();
        }
        let before = self.first.checked_sub(1);
        let after = Some(self.last + 1).filter(|n| *n < self.best.of);
        after.into_iter().chain(before).map(|n| chunk_id_at(&self.best, n)).collect()
    }

    /// Takes a chunk in, if it stands directly before or after and fits.
    fn take(&mut self, collection: usize, other: &ChunkRecord, bound: usize) -> bool {
        let same = self.collection == collection
            && self.best.doc == other.doc
            && self.best.rev == other.rev
            && self.best.hash == other.hash
            && self.best.cut == other.cut;
        let tokens = self.tokens + other.tokens as usize;
        if !same || self.tokens == 0 || other.tokens == 0 || tokens > bound {
            return false;
        }
        if other.n == self.last + 1 {
            let Some(text) = joined(self.text(), self.end, other.glue.as_deref(), &other.text, other.start)
            else {
                return false;
            };
            self.joined = Some(text);
            self.end = self.end.max(other.end);
            self.last = other.n;
        } else if other.n + 1 == self.first {
            let Some(text) = joined(&other.text, other.end, self.glue.as_deref(), self.text(), self.start)
            else {
                return false;
            };
            self.joined = Some(text);
            self.start = other.start;
            self.first = other.n;
            self.glue.clone_from(&other.glue);
        } else {
            return false;
        }
        self.tokens = tokens;
        true
    }

    pub(super) fn passage(self, collection: &str) -> Passage {
        #[expect(clippy::cast_possible_truncation, reason = "only the order of scores means something")]
        let score = self.score as f32;
        let ChunkRecord { text, source, heading, lang, repo, commit, .. } = &*self.best;
        Passage {
            text: self.joined.unwrap_or_else(|| text.clone()),
            similarity: self.cosine,
            source: source.clone(),
            start_line: self.start,
            end_line: self.end,
            heading: heading.clone(),
            score,
            collection: collection.to_owned(),
            lang: lang.clone(),
            repo: Some(repo.clone()).filter(|repo| !repo.is_empty()),
            commit: commit.clone(),
        }
    }
}

/// The lines of two chunks as one text. `None` where what stands between them is not known.
fn joined(above: &str, above_end: u32, glue: Option<&str>, below: &str, below_start: u32) -> Option<String> {
    if let Some(glue) = glue {
        return Some(format!("{above}{glue}{below}"));
    }
    // Lines that both have are taken once.
    let shared = above_end.checked_sub(below_start)? + 1;
    let (mut offset, mut terminator) = (0, 0);
    for line in below.split_inclusive('\n').take(shared as usize) {
        offset += line.len();
        terminator = line.len() - line.trim_end_matches(['\r', '\n']).len();
    }
    // Pieces of one long line name the same line and share nothing, even where one ends as the next
    // begins. A chunk that is more than a piece has a line that its neighbour has not.
    if offset == below.len() || above.lines().count() <= shared as usize {
        return None;
    }
    let shared_text = &below[..offset - terminator];
    above.ends_with(shared_text).then(|| format!("{above}{}", &below[offset - terminator..]))
}

/// The best passages, at most `top_k`: neighbours among the found chunks become one passage.
pub(super) fn select(fused: Vec<Fused>, query: &Query) -> Vec<Draft> {
    let mut drafts: Vec<Draft> = Vec::new();
    let mut files: HashSet<(usize, String)> = HashSet::new();
    // Drafts of a document, so that looking for a neighbour is not looking at all of them.
    let mut of_doc: HashMap<(usize, String), Vec<usize>> = HashMap::new();
    for fused in fused {
        let file = (fused.collection, fused.hit.record.doc.clone());
        if query.passage_tokens > 0
            && let Some(places) = of_doc.get(&file)
            && places
                .iter()
                .any(|at| drafts[*at].take(fused.collection, &fused.hit.record, query.passage_tokens))
        {
            continue;
        }
        if drafts.len() == query.top_k {
            break;
        }
        if query.collapse_by_file && !files.insert(file.clone()) {
            continue;
        }
        of_doc.entry(file).or_default().push(drafts.len());
        drafts.push(Draft::new(fused));
    }
    drafts
}

/// Joins drafts of one collection with their neighbours. No chunk gets into two passages.
pub(super) fn join(
    drafts: &mut [Draft],
    collection: usize,
    neighbours: Vec<(Uuid, ChunkRecord)>,
    bound: usize,
) {
    let neighbours: HashMap<Uuid, ChunkRecord> = neighbours.into_iter().collect();
    let mut used: HashSet<Uuid> = drafts
        .iter()
        .filter(|draft| draft.collection == collection)
        .flat_map(|draft| (draft.first..=draft.last).map(|n| chunk_id_at(&draft.best, n)))
        .collect();
    for draft in drafts.iter_mut().filter(|draft| draft.collection == collection) {
        for id in draft.neighbours(bound) {
            if let Some(record) = neighbours.get(&id)
                && !used.contains(&id)
                && draft.take(collection, record, bound)
            {
                used.insert(id);
            }
        }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{chunk::Chunker, index::Hit};

    fn records(chunker: Chunker, lang: Option<&str>, text: &str) -> Vec<ChunkRecord> {
        let chunks = chunker.chunk(lang, text);
        let of = u32::try_from(chunks.len()).unwrap();
        (0..of)
            .zip(chunks)
            .map(|(n, chunk)| ChunkRecord {
                doc: "doc".to_owned(),
                n,
                of,
                start: chunk.start_line,
                end: chunk.end_line,
                tokens: u32::try_from(chunk.tokens).unwrap(),
                glue: chunk.glue.map(str::to_owned),
                text: chunk.text.to_owned(),
                ..ChunkRecord::default()
            })
            .collect()
    }

    fn draft(record: ChunkRecord) -> Draft {
        let hit = Hit { id: Uuid::nil(), score: 1.0, record: Arc::new(record) };
        Draft::new(Fused { hit, collection: 0, score: 1.0, cosine: None })
    }

    /// The lines that a passage names, byte for byte, without the last one's terminator.
    fn lines(text: &str, start: u32, end: u32) -> String {
        let lines: Vec<&str> = text.split_inclusive('\n').collect();
        let text = lines[start as usize - 1..end as usize].concat();
        let text = text.strip_suffix('\n').unwrap_or(&text);
        text.strip_suffix('\r').unwrap_or(text).to_owned()
    }

    #[test]
    fn neighbours_are_joined_with_what_stands_between_them() {
        let text = "# One\r\n\r\nFirst paragraph about apples.\r\n  \r\n\r\n# Two\r\n\r\nSecond one about pears and plums.\r\n";
        let chunks = records(Chunker::new(12, 0), Some("markdown"), text);
        assert!(chunks.len() > 1, "{chunks:?}");
        let mut whole = draft(chunks[0].clone());
        for record in &chunks[1..] {
            assert!(whole.take(0, record, 1000), "{record:?}");
        }
        assert_eq!(whole.text(), lines(text, whole.start, whole.end));
        assert_eq!((whole.start, whole.end), (1, 8));
    }

    #[test]
    fn the_bound_holds_and_other_revisions_stay_apart() {
        let text = "one apple\n\ntwo apples\n\nthree apples\n";
        let chunks = records(Chunker::new(4, 0), None, text);
        let mut small = draft(chunks[0].clone());
        assert!(!small.take(0, &chunks[1], small.tokens + chunks[1].tokens as usize - 1), "no room");
        assert!(!small.take(1, &chunks[1], 1000), "another collection");
        assert!(!small.take(0, &ChunkRecord { rev: 9, ..chunks[1].clone() }, 1000), "another revision");
        assert!(!small.take(0, &ChunkRecord { tokens: 0, ..chunks[1].clone() }, 1000), "an old record");
        assert!(!small.take(0, &chunks[2], 1000), "not next to it");
        assert!(small.take(0, &chunks[1], 1000));
    }

    #[test]
    fn pieces_of_one_line_are_never_joined() {
        let text = format!("{}\nnext line\n", "word and another ".repeat(40));
        let chunks = records(Chunker::new(16, 8), None, &text);
        let pieces = chunks.iter().filter(|chunk| chunk.start == 1).count();
        assert!(pieces > 1);
        for pair in chunks.windows(2).take(pieces) {
            assert!(!draft(pair[0].clone()).take(0, &pair[1], 1000), "{pair:?}");
        }
    }

    /// Found by fuzzing: the last piece is also how the one before it ends.
    #[test]
    fn pieces_that_look_like_an_overlap_are_not_joined() {
        let text = "a uoea. a. #a#d#anp. #a#..# #a#d..a .a a#..#..\n";
        let chunks = records(Chunker::new(15, 0), None, text);
        assert!(chunks.len() > 1 && chunks.iter().all(|chunk| (chunk.start, chunk.end) == (1, 1)));
        for pair in chunks.windows(2) {
            assert!(!draft(pair[0].clone()).take(0, &pair[1], 1000), "{pair:?}");
            assert!(!draft(pair[1].clone()).take(0, &pair[0], 1000), "{pair:?}");
        }
    }

    proptest! {
        /// Chunks of any text, joined from any of them in both directions, are the lines they name.
        #[test]
        fn a_joined_passage_is_exactly_its_lines(
            lines_of in prop::collection::vec("(|  |[a-z]{1,9}( [a-z#.]{1,9}){0,8}|# [a-z]{1,5}|    [a-z]{1,6}\\(\\) \\{)", 1..60),
            crlf in any::<bool>(), limit in 4_usize..40, overlap in 0_usize..10,
            lang in prop::sample::select(vec![None, Some("markdown"), Some("rust")]), from in any::<prop::sample::Index>(),
        ) {
            let text = lines_of.iter().fold(String::new(), |text, line| text + line + if crlf { "\r\n" } else { "\n" });
            let chunks = records(Chunker::new(limit, overlap), lang, &text);
            prop_assume!(!chunks.is_empty());
            let middle = from.index(chunks.len());
            let mut whole = draft(chunks[middle].clone());
            for record in chunks[middle + 1..].iter().chain(chunks[..middle].iter().rev()) {
                whole.take(0, record, 100_000);
                // Chunks may be pieces of one line; what was joined is always whole lines.
                if whole.first != whole.last {
                    prop_assert_eq!(whole.text(), &lines(&text, whole.start, whole.end));
                }
            }
        }
    }
}
