//! The passages of one document, numbered. A number means the same passage from the moment the
//! model has seen it; before that, packing may renumber.

use std::{
    hash::{BuildHasher as _, RandomState},
    sync::{Arc, LazyLock, OnceLock},
};

use atlas_shared::gateway_api::{Passage, quote_hash};
use moka::sync::Cache;
use serde::{Deserialize, Serialize};

use super::{
    clean,
    provenance::{self, Meaning},
    words::{self, Bag},
};

/// Passages a document can have in all; what comes after is ignored.
const MAX_PASSAGES: usize = 120;
/// A longer passage is cut to its most relevant lines.
const MAX_PASSAGE_CHARS: usize = 4_000;
/// Texts more alike than this (Jaccard over words) are one passage.
const SAME: f64 = 0.85;
/// What a passage costs besides its text: its place and its fence, in characters.
const FRAME_CHARS: usize = 80;
/// What is left of a passage after lines that are known already must be this many lines, or it says nothing.
const MIN_NEW_LINES: usize = 3;
/// Being found at rank `r` (from 0) is worth `1 / (this + r)`: the tenth a quarter of the first. Being found twice
/// adds up, as in reciprocal rank fusion.
const RANK_OFFSET: f64 = 3.0;
/// Of two that were found at the same rank, the one that the model asked for is worth more.
const ASKED_FOR: f64 = 1.1;
/// KiB of tidied passages that are remembered. A team's documents are found again and again.
const REMEMBERED_KIB: u64 = 8 << 10;
/// Bytes that one costs besides its text and what is read in it.
const REMEMBERED_EACH: usize = 2_000;
/// Bytes for each byte of its text: the text, its words, and the words of its sentences once it is cited.
const REMEMBERED_PER_BYTE: usize = 4;
/// A shorter passage counts as this long: a snippet is no bargain only because it is short.
const LEAST_SIZE: usize = 600;

/// The passages at hand.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Shelf {
    entries: Vec<Entry>,
    /// How many times passages were added: 0 before the first.
    additions: u32,
    /// True once the model has seen numbers.
    frozen: bool,
    /// What the document is about, for cutting long passages.
    about: String,
    /// Passages that were dropped because they say what another one says.
    #[serde(default)]
    duplicates: u32,
    /// Passages that were cut to their relevant lines.
    #[serde(default)]
    trimmed: u32,
}

/// A passage and its number.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Entry {
    /// Its number.
    pub(super) n: u32,
    /// The passage, cleaned. Documents that were given the same one share it.
    pub(super) passage: Arc<Passage>,
    /// [`quote_hash`] of the lines it names, before they were cleaned.
    #[serde(default)]
    pub(super) text_hash: Arc<str>,
    /// Which addition brought it: 1 is the first retrieval.
    pub(super) addition: u32,
    /// What it is worth: how often it was found, and how far up.
    #[serde(default)]
    worth: f64,
    /// In the next prompt?
    pub(super) packed: bool,
    /// Did the model see it?
    pub(super) given: bool,
    /// Its words, once somebody asked for them.
    #[serde(skip)]
    words: Words,
}

/// The words of a passage: worked out from it, so that they make no difference to what it is.
#[derive(Clone, Debug, Default)]
struct Words(OnceLock<Arc<Bags>>);

impl PartialEq for Words {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

#[derive(Debug)]
struct Bags {
    /// Of the text alone.
    text: Bag,
    /// Of the text, its path and its heading.
    whole: Bag,
    /// What each sentence of the text says, once somebody asked: most passages are not cited.
    sentences: OnceLock<Vec<Meaning>>,
}

impl Bags {
    fn of(Passage { text, source, heading, .. }: &Passage) -> Self {
        let whole = words::of(&format!("{source} {} {text}", heading.as_deref().unwrap_or_default()));
        Self { text: words::of(text), whole, sentences: OnceLock::new() }
    }
}

impl Entry {
    /// `path:start-end`.
    pub(super) fn place(&self) -> String {
        format!("{}:{}-{}", self.passage.source, self.passage.start_line, self.passage.end_line)
    }

    fn size(&self) -> usize {
        self.passage.text.len() + self.passage.source.len() + FRAME_CHARS
    }

    /// What it is worth per character.
    fn bargain(&self) -> f64 {
        self.worth / self.size().max(LEAST_SIZE) as f64
    }

    /// The words of the passage, its path and its heading: for finding it, not for believing it.
    pub(super) fn words(&self) -> &Bag {
        &self.bags().whole
    }

    /// Does the passage share enough words with a statement to support it? Only its text counts, and a word
    /// of its heading as one more, never alone: a path says where something is, not what is so. Purely
    /// lexical: this finds citations that are beside the point, not subtle ones.
    pub(super) fn speaks_of(&self, statement: &Bag) -> bool {
        let text = &self.bags().text;
        let shared = statement.shared_with(text);
        // A long statement shares some word with everything.
        let needed = match statement.len() {
            0..6 => 1,
            6..14 => 2,
            _ => 3,
        };
        let in_heading = || {
            let heading = self.passage.heading.as_deref().unwrap_or_default();
            words::list(heading).iter().any(|word| statement.contains(word) && !text.contains(word))
        };
        shared >= needed || (shared > 0 && shared + 1 == needed && in_heading())
    }

    /// What each sentence of the passage says. Documents that were given the same passage share it.
    pub(super) fn sentences(&self) -> &[Meaning] {
        self.bags().sentences.get_or_init(|| provenance::sentences(&self.passage.text))
    }

    fn bags(&self) -> &Bags {
        self.words.0.get_or_init(|| Arc::new(Bags::of(&self.passage)))
    }
}

impl Shelf {
    /// An empty shelf for a document about this.
    pub(super) fn new(about: &str) -> Self {
        Self { about: about.to_owned(), ..Self::default() }
    }

    /// Adds passages, best first. What is there already is not added again. Returns the numbers of
    /// all of them, old and new.
    pub(super) fn add(&mut self, passages: Vec<Passage>) -> Vec<u32> {
        self.additions += 1;
        let about = words::of(&self.about);
        let weight = if self.additions > 1 { ASKED_FOR } else { 1.0 };
        let mut numbers = Vec::new();
        for (rank, passage) in passages.into_iter().enumerate() {
            let worth = weight / (RANK_OFFSET + rank as f64);
            let length = passage.text.len();
            let passage = self.without_known_lines(passage);
            let trimmed = passage.text.len() < length || length > MAX_PASSAGE_CHARS;
            let Some(Tidy { passage, text_hash, bags }) = tidy(passage, &about) else { continue };
            let known = self.entries.iter().position(|entry| {
                contains(&entry.passage, &passage) || words::are_alike(&entry.bags().text, &bags.text, SAME)
            });
            let n = match known {
                Some(at) => {
                    self.duplicates += 1;
                    self.entries[at].worth += worth;
                    self.entries[at].n
                }
                None if self.entries.len() >= MAX_PASSAGES => continue,
                None => {
                    let n = u32::try_from(self.entries.len() + 1).unwrap_or(u32::MAX);
                    self.trimmed += u32::from(trimmed);
                    self.entries.push(Entry {
                        n,
                        passage,
                        text_hash,
                        addition: self.additions,
                        worth,
                        packed: true,
                        given: false,
                        words: Words(OnceLock::from(bags)),
                    });
                    n
                }
            };
            if !numbers.contains(&n) {
                numbers.push(n);
            }
        }
        numbers
    }

    /// The passage without the lines at its ends that passages of the same file hold already, so that they
    /// are not paid for twice. Where hardly anything is left, the other passages stand for all of it.
    fn without_known_lines(&self, passage: Passage) -> Passage {
        if !self.entries.iter().any(|entry| same_file(&entry.passage, &passage)) {
            return passage;
        }
        let (Some(first), Some(last)) =
            (usize::try_from(passage.start_line).ok(), usize::try_from(passage.end_line).ok())
        else {
            return passage;
        };
        let lines: Vec<&str> = passage.text.lines().collect();
        if lines.is_empty() || last.checked_sub(first).map(|more| more + 1) != Some(lines.len()) {
            // The lines do not add up, so none of them can be named.
            return passage;
        }
        let known = |at: usize| {
            let line = u32::try_from(first + at).unwrap_or(u32::MAX);
            self.entries.iter().any(|entry| {
                same_file(&entry.passage, &passage)
                    && (entry.passage.start_line..=entry.passage.end_line).contains(&line)
            })
        };
        let start = (0..lines.len()).find(|at| !known(*at)).unwrap_or(lines.len());
        let end = (start..lines.len()).rev().find(|at| !known(*at)).map_or(start, |at| at + 1);
        if end - start == lines.len() {
            return passage;
        }
        let said = lines[start..end].iter().filter(|line| !line.trim().is_empty()).count();
        if said < MIN_NEW_LINES {
            let of_it = |entry: &&Entry| {
                same_file(&entry.passage, &passage)
                    && entry.passage.start_line <= passage.end_line
                    && passage.start_line <= entry.passage.end_line
            };
            return self.entries.iter().find(of_it).map_or(passage.clone(), |entry| (*entry.passage).clone());
        }
        let line = |at: usize| u32::try_from(first + at).unwrap_or(u32::MAX);
        Passage {
            text: lines[start..end].join("\n"),
            start_line: line(start),
            end_line: line(end - 1),
            ..passage
        }
    }

    /// How many additions there were.
    pub(super) fn additions(&self) -> u32 {
        self.additions
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// How many were dropped because they say what another one says.
    pub(super) fn duplicates(&self) -> u32 {
        self.duplicates
    }

    /// How many were cut to their relevant lines.
    pub(super) fn trimmed(&self) -> u32 {
        self.trimmed
    }

    /// What is in the next prompt, in bytes.
    pub(super) fn packed_bytes(&self) -> u64 {
        self.entries.iter().filter(|entry| entry.packed).map(|entry| entry.size() as u64).sum()
    }

    /// How many are in the next prompt.
    pub(super) fn packed(&self) -> usize {
        self.entries.iter().filter(|entry| entry.packed).count()
    }

    /// All, in the order they came.
    pub(super) fn entries(&self) -> impl Iterator<Item = &Entry> {
        self.entries.iter()
    }

    /// The passage of that number.
    pub(super) fn get(&self, n: u32) -> Option<&Entry> {
        self.entries.iter().find(|entry| entry.n == n)
    }

    /// Everything into the next prompt.
    pub(super) fn pack_all(&mut self) {
        self.entries.iter_mut().for_each(|entry| entry.packed = true);
        self.renumber();
    }

    /// Nothing into the next prompt.
    pub(super) fn pack_none(&mut self) {
        self.entries.iter_mut().for_each(|entry| entry.packed = false);
        self.renumber();
    }

    /// The best that fit into `room` tokens, where all of them together cost `scale`: in the order of what
    /// they are worth per token. One that is too long for what is left makes way for shorter ones after it.
    pub(super) fn pack_within(&mut self, room: u64, scale: u64) {
        let total: usize = self.entries.iter().map(Entry::size).sum();
        let total = u64::try_from(total.max(1)).unwrap_or(u64::MAX);
        let mut order: Vec<usize> = (0..self.entries.len()).collect();
        // Stable: equals stay in the order they came.
        order.sort_by(|a, b| self.entries[*b].bargain().total_cmp(&self.entries[*a].bargain()));
        let mut left = room;
        for index in order {
            let size = u64::try_from(self.entries[index].size()).unwrap_or(u64::MAX);
            let cost = size.saturating_mul(scale).div_ceil(total);
            let fits = cost <= left;
            self.entries[index].packed = fits;
            if fits {
                left -= cost;
            }
        }
        self.renumber();
    }

    /// Until the model has seen them, the packed ones are 1, 2, 3, … and the others follow.
    fn renumber(&mut self) {
        if self.frozen {
            return;
        }
        let packed = self.entries.iter_mut();
        let mut n = 0;
        let (mut first, mut rest): (Vec<_>, Vec<_>) = packed.partition(|entry| entry.packed);
        for entry in first.iter_mut().chain(rest.iter_mut()) {
            n += 1;
            entry.n = n;
        }
    }

    /// The prompt was answered: what it held may be cited from now on.
    pub(super) fn mark_given(&mut self) {
        self.frozen = true;
        self.entries.iter_mut().filter(|entry| entry.packed).for_each(|entry| entry.given = true);
    }
}

fn contains(outer: &Passage, inner: &Passage) -> bool {
    same_file(outer, inner) && outer.start_line <= inner.start_line && inner.end_line <= outer.end_line
}

fn same_file(a: &Passage, b: &Passage) -> bool {
    a.source == b.source && a.collection == b.collection && a.repo == b.repo && a.commit == b.commit
}

/// A passage fit for a prompt, and what is worked out from it.
#[derive(Clone, Debug)]
struct Tidy {
    passage: Arc<Passage>,
    /// By which its lines can be found in the file again.
    text_hash: Arc<str>,
    bags: Arc<Bags>,
}

/// Makes a passage fit for a prompt; `None`: it says nothing. One that was tidied lately is remembered.
fn tidy(passage: Passage, about: &Bag) -> Option<Tidy> {
    static TIDIED: LazyLock<Cache<u128, Option<Tidy>>> = LazyLock::new(|| {
        // In KiB, because the cache keeps a byte of its own for each unit of its capacity.
        let kib = |_: &u128, tidied: &Option<Tidy>| {
            let text = tidied.as_ref().map_or(0, |tidied| tidied.passage.text.len());
            u32::try_from((text * REMEMBERED_PER_BYTE + REMEMBERED_EACH).div_ceil(1 << 10))
                .unwrap_or(u32::MAX)
        };
        Cache::builder().weigher(kib).max_capacity(REMEMBERED_KIB).build()
    });
    if passage.text.len() > MAX_PASSAGE_CHARS {
        // What is kept of a long one depends on what is asked.
        return tidied(passage, about);
    }
    let key = key(&passage);
    if let Some(known) = TIDIED.get(&key) {
        return known;
    }
    let tidied = tidied(passage, about);
    TIDIED.insert(key, tidied.clone());
    tidied
}

/// Hashes all of a passage but its scores, keyed anew in each process: nobody can write two passages that
/// are taken for each other.
fn key(passage: &Passage) -> u128 {
    static HASHERS: LazyLock<[RandomState; 2]> = LazyLock::new(|| [RandomState::new(), RandomState::new()]);
    let Passage {
        text,
        similarity: _,
        source,
        start_line,
        end_line,
        heading,
        score: _,
        collection,
        lang,
        repo,
        commit,
    } = passage;
    HASHERS.iter().fold(0, |key, hasher| {
        let parts = (text, source, start_line, end_line, heading, collection, lang, repo, commit);
        key << 64 | u128::from(hasher.hash_one(parts))
    })
}

fn tidied(passage: Passage, about: &Bag) -> Option<Tidy> {
    let short = |text: &str| clean::cut(&clean::line(text), 200);
    let heading = passage.heading.as_deref().map(short).filter(|heading| !heading.is_empty());
    let whole = (quote_hash(&passage.text), passage.start_line, passage.end_line);
    let passage = cut_to_relevant_lines(passage, about);
    // A text that was cut without naming other lines still stands for all of them.
    let text_hash = if (whole.1, whole.2) == (passage.start_line, passage.end_line) {
        whole.0
    } else {
        quote_hash(&passage.text)
    };
    let text = clean::text(&passage.text);
    if text.trim().is_empty() {
        return None;
    }
    let passage = Passage {
        text: text.trim_end().to_owned(),
        source: short(&passage.source),
        heading,
        collection: short(&passage.collection),
        repo: passage.repo.as_deref().map(short),
        commit: passage.commit.as_deref().map(short),
        // They mean something within one answer of the gateway, where the order says the same.
        similarity: None,
        score: 0.0,
        ..passage
    };
    let bags = Arc::new(Bags::of(&passage));
    Some(Tidy { passage: Arc::new(passage), text_hash: text_hash.into(), bags })
}

/// The window of lines that has most of the words looked for, so that the lines named stay true.
fn cut_to_relevant_lines(passage: Passage, about: &Bag) -> Passage {
    if passage.text.len() <= MAX_PASSAGE_CHARS {
        return passage;
    }
    let lines: Vec<&str> = passage.text.lines().collect();
    let spans = passage.end_line.checked_sub(passage.start_line).map(|lines| lines as usize + 1);
    if spans != Some(lines.len()) {
        // The lines do not add up, so no part of it can be named: keep the beginning.
        return Passage { text: clean::cut(&passage.text, MAX_PASSAGE_CHARS), ..passage };
    }
    let hits: Vec<usize> = lines.iter().map(|line| words::of(line).shared_with(about)).collect();
    let (mut best, mut best_hits) = (0..0, 0);
    let (mut start, mut chars, mut found) = (0, 0, 0);
    for end in 0..lines.len() {
        chars += lines[end].len() + 1;
        found += hits[end];
        while chars > MAX_PASSAGE_CHARS && start < end {
            chars -= lines[start].len() + 1;
            found -= hits[start];
            start += 1;
        }
        if chars <= MAX_PASSAGE_CHARS && (best.is_empty() || found > best_hits) {
            (best, best_hits) = (start..end + 1, found);
        }
    }
    if best.is_empty() {
        // One line longer than all that is allowed.
        return Passage { text: clean::cut(&passage.text, MAX_PASSAGE_CHARS), ..passage };
    }
    let first = u32::try_from(best.start).unwrap_or(0);
    let last = u32::try_from(best.end - 1).unwrap_or(0);
    Passage {
        text: lines[best].join("\n"),
        end_line: passage.start_line + last,
        start_line: passage.start_line + first,
        ..passage
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A passage with lines that add up.
    pub(in super::super) fn passage(source: &str, start_line: u32, text: &str) -> Passage {
        Passage {
            repo: Some("atlas".to_owned()),
            commit: Some("3f9a2c1".to_owned()),
            ..Passage::of_lines("atlas", source, start_line, text)
        }
    }

    fn numbers(shelf: &Shelf) -> Vec<u32> {
        shelf.entries().filter(|entry| entry.packed).map(|entry| entry.n).collect()
    }

    #[test]
    fn what_is_there_is_not_added_again() {
        let mut shelf = Shelf::new("leases");
        shelf.add(vec![
            passage("a.rs", 1, "one two three\nfour five six\nseven eight nine"),
            passage("b.rs", 1, "leases expire after sixty seconds"),
        ]);
        let again = shelf.add(vec![
            passage("a.rs", 2, "four five six"),
            passage("copy.rs", 9, "leases expire after sixty seconds"),
            passage("c.rs", 1, "something new entirely"),
        ]);
        assert_eq!(again, [1, 2, 3]);
        assert_eq!(shelf.len(), 3);
    }

    #[test]
    fn the_hash_is_of_the_lines_that_are_named_as_the_file_has_them() {
        let key = format!("key = sk-{}", "a1b2c3d4e5".repeat(4));
        let long: Vec<String> =
            (0..400).map(|line| format!("line {line} of many words about nothing")).collect();
        let mut shelf = Shelf::new("line 200");
        shelf
            .add(vec![passage("a.rs", 1, &format!("one\r\n{key}\n")), passage("b.rs", 11, &long.join("\n"))]);
        let entries: Vec<_> = shelf.entries().collect();
        assert_eq!(*entries[0].text_hash, *quote_hash(&format!("one\n{key}")));
        let Passage { start_line, end_line, .. } = *entries[1].passage;
        assert!(end_line - start_line < 399, "it was cut");
        let named = &long[start_line as usize - 11..=end_line as usize - 11];
        assert_eq!(*entries[1].text_hash, *quote_hash(&named.join("\n")));
    }

    #[test]
    fn packing_drops_the_lowest_ranked_and_renumbers_before_the_model_sees_them() {
        let mut shelf = Shelf::new("x");
        let long = "word ".repeat(200);
        shelf.add(vec![
            passage("1.md", 1, "alpha first"),
            passage("2.md", 1, &long),
            passage("3.md", 1, "gamma third"),
        ]);
        shelf.pack_within(300, 1_000);
        assert_eq!(kept(&shelf), ["1.md", "3.md"]);
        assert_eq!(numbers(&shelf), [1, 2]);
        shelf.mark_given();
        shelf.pack_all();
        assert_eq!(numbers(&shelf), [1, 3, 2], "numbers given to the model stay");
    }

    fn kept(shelf: &Shelf) -> Vec<&str> {
        shelf.entries().filter(|entry| entry.packed).map(|entry| entry.passage.source.as_str()).collect()
    }

    #[test]
    fn lines_that_are_known_are_not_paid_for_twice() {
        let lines: Vec<String> = (1..=40).map(|n| format!("line{n} says word{n} and more{n}")).collect();
        let part = |first: usize, last: usize| {
            passage("a.rs", u32::try_from(first).unwrap_or(0), &lines[first - 1..last].join("\n"))
        };
        let mut shelf = Shelf::new("x");
        shelf.add(vec![part(10, 20), part(15, 30), part(1, 12), part(19, 22), part(12, 31)]);
        let spans: Vec<(u32, u32)> =
            shelf.entries().map(|entry| (entry.passage.start_line, entry.passage.end_line)).collect();
        assert_eq!(spans, [(10, 20), (21, 30), (1, 9)]);
        assert_eq!((shelf.duplicates(), shelf.trimmed()), (2, 2));
        for entry in shelf.entries() {
            let Passage { start_line, end_line, .. } = *entry.passage;
            let named = lines[start_line as usize - 1..end_line as usize].join("\n");
            assert_eq!(entry.passage.text, named, "exactly the lines it names");
            assert_eq!(*entry.text_hash, *quote_hash(&named));
        }
    }

    #[test]
    fn passages_are_packed_by_what_they_are_worth_per_token() {
        let long = |name: &str| (0..160).map(|n| format!("{name}{n}")).collect::<Vec<_>>().join(" ");
        let mut shelf = Shelf::new("x");
        shelf.add(vec![
            passage("first.md", 1, &long("a")),
            passage("long.md", 1, &format!("{} {} {}", long("b"), long("c"), long("d"))),
            passage("third.md", 1, &long("e")),
            passage("twice.md", 1, &long("f")),
        ]);
        shelf.mark_given();
        // What a search brings, and what it finds again.
        shelf.add(vec![passage("asked.md", 1, &long("g")), passage("twice.md", 1, &long("f"))]);
        let all = |shelf: &Shelf| {
            let mut order: Vec<String> = Vec::new();
            for room in (0..=1_100).step_by(10) {
                let mut shelf = shelf.clone();
                shelf.pack_within(room, 1_000);
                for source in kept(&shelf) {
                    if !order.iter().any(|known| known == source) {
                        order.push(source.to_owned());
                    }
                }
            }
            order
        };
        assert_eq!(all(&shelf), ["twice.md", "asked.md", "first.md", "third.md", "long.md"]);
    }

    #[test]
    fn what_was_searched_for_is_packed_first() {
        let mut shelf = Shelf::new("x");
        shelf.add(vec![passage("old.md", 1, "alpha beta"), passage("old2.md", 1, "gamma delta")]);
        shelf.mark_given();
        shelf.add(vec![passage("new.md", 1, "epsilon zeta")]);
        shelf.pack_within(340, 1_000);
        assert_eq!(kept(&shelf), ["new.md"]);
    }

    #[test]
    fn a_long_passage_keeps_its_relevant_lines_and_names_them() {
        let mut lines: Vec<String> =
            (0..400).map(|n| format!("filler line number {n} says nothing")).collect();
        lines[200] = "the lease is renewed while the run lives".to_owned();
        let mut shelf = Shelf::new("lease renewal");
        shelf.add(vec![passage("long.md", 11, &lines.join("\n"))]);
        let entry = shelf.get(1).map_or_else(|| passage("", 1, ""), |entry| (*entry.passage).clone());
        assert!(entry.text.len() <= MAX_PASSAGE_CHARS);
        let at = entry.text.lines().position(|line| line.contains("the lease is renewed"));
        assert_eq!(at.map(|at| at + entry.start_line as usize), Some(211));
        assert_eq!(entry.text.lines().count(), (entry.end_line - entry.start_line + 1) as usize);
    }
}
