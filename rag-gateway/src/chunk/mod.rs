//! Cuts documents into passages that can be quoted.
//!
//! A chunk is whole lines, byte for byte, so that `file:start-end` can be checked by anyone. Only a
//! line that is longer than the limit by itself is cut inside; its pieces name that one line.
//!
//! The work is linear: tokens are counted once a line, a [`structure`](Structure) says how good a
//! place each line is to begin a chunk, and [`pack`](pack) cuts at the best places that keep chunks
//! within the limit. Markdown, source code by grammar, code and data by layout, and prose each have
//! a structure of their own; all share the packing, and so its promises.

mod code;
mod lang;
mod lines;
mod markdown;
mod notebook;
mod pack;
mod pages;
mod plain;
mod syntax;
mod tokens;

pub(crate) use lang::language_of;
use lines::Lines;
pub(crate) use notebook::said as said_in_notebook;

/// The language of Jupyter notebooks.
pub(crate) const NOTEBOOK: &str = "jupyter";

/// Raised when the same text gives other chunks than before: indexed documents are then stale.
const VERSION: u32 = 2;

/// One passage, borrowed from its document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Chunk<'t> {
    /// The lines, without the last line's terminator.
    pub(crate) text: &'t str,
    /// First line, counted from 1.
    pub(crate) start_line: u32,
    /// Last line, included.
    pub(crate) end_line: u32,
    /// Heading path or symbols, such as `Guide › Install` or `impl Run › fn finish`.
    pub(crate) heading: Option<String>,
    /// An upper bound of its tokens.
    pub(crate) tokens: usize,
    /// What stands between the chunk before and this one: a line's end and blank lines. `None` where
    /// they overlap or cannot be joined (the first chunk, pieces of a line, a very long gap).
    pub(crate) glue: Option<&'t str>,
}

/// How large chunks may be, in tokens of cl100k_base.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Chunker {
    max_tokens: usize,
    overlap_tokens: usize,
}

impl Chunker {
    /// By `CHUNK_TOKENS` and `CHUNK_OVERLAP_TOKENS`.
    pub(crate) fn new(max_tokens: usize, overlap_tokens: usize) -> Self {
        Self { max_tokens: max_tokens.max(1), overlap_tokens: overlap_tokens.min(max_tokens / 2) }
    }

    /// Names everything that decides where the chunks of a document end. Recorded with every chunk.
    pub(crate) fn fingerprint(self, source: &str) -> String {
        // Notebooks are cut in another way than before, and they alone need to be sent again.
        let kind = if language_of(source) == Some(NOTEBOOK) { "n" } else { "" };
        format!("{VERSION}{kind}.{}.{}", self.max_tokens, self.overlap_tokens)
    }

    /// The chunks of a document, in order. Every line that is not blank is in at least one of them; of a notebook, those
    /// of its cells' sources.
    pub(crate) fn chunk<'t>(self, lang: Option<&str>, text: &'t str) -> Vec<Chunk<'t>> {
        let lines = Lines::new(text);
        let structure = match lang {
            Some("markdown") => markdown::structure(&lines),
            Some("docx") => pages::paragraphs(&lines),
            Some("pdf") => pages::structure(&lines),
            Some("rst") => plain::structure(&lines, plain::Titles::Underlined),
            Some("asciidoc") => plain::structure(&lines, plain::Titles::Prefixed),
            Some("text") | None => plain::structure(&lines, plain::Titles::Both),
            Some(NOTEBOOK) => notebook::structure(&lines).unwrap_or_else(|| code::structure(&lines, "json")),
            Some(lang) => syntax::structure(&lines, lang).unwrap_or_else(|| code::structure(&lines, lang)),
        };
        pack::pack(&lines, &structure, self.max_tokens, self.overlap_tokens)
    }
}

/// How good a place a line is to begin a chunk: lower is better.
type Level = u8;

/// Levels below this begin a section: two sections share a chunk only when one of them is tiny.
const FIRST_BLOCK_LEVEL: Level = 8;

/// A line in the middle of something.
const WORST_LEVEL: Level = Level::MAX;

/// What a document is made of, line by line.
struct Structure {
    /// One a line.
    levels: Vec<Level>,
    /// One a line: what the line stands under, as an index into `headings`.
    heading_of: Vec<Option<usize>>,
    /// Heading paths.
    headings: Vec<String>,
    /// Definitions (line, indentation, name), for code: named in the heading of the chunk that holds them.
    definitions: Vec<Definition>,
    /// The lines that are cut into chunks; `None`: all.
    regions: Option<Vec<(usize, usize)>>,
}

/// A definition in source code.
struct Definition {
    line: usize,
    indent: usize,
    name: String,
}

impl Structure {
    fn flat(lines: usize) -> Self {
        Self {
            levels: vec![WORST_LEVEL; lines],
            heading_of: vec![None; lines],
            headings: Vec::new(),
            definitions: Vec::new(),
            regions: None,
        }
    }

    /// The best level wins where several structures begin on one line.
    fn offer(&mut self, line: usize, level: Level) {
        if let Some(slot) = self.levels.get_mut(line) {
            *slot = (*slot).min(level);
        }
    }

    /// What a chunk of these lines is called.
    fn heading(&self, start: usize, end: usize) -> Option<String> {
        let mut path: Vec<String> = Vec::new();
        if let Some(index) = self.heading_of.get(start).copied().flatten() {
            path.extend(self.headings.get(index).cloned());
        }
        let first = self.definitions.partition_point(|definition| definition.line < start);
        let inside: Vec<&Definition> =
            self.definitions.iter().skip(first).take_while(|definition| definition.line < end).collect();
        let mut depth = inside.iter().map(|definition| definition.indent).min();
        // One definition at this depth: what it holds says more than its name.
        while let Some(outermost) = depth {
            let names: Vec<&str> = inside
                .iter()
                .filter(|definition| definition.indent == outermost)
                .map(|definition| definition.name.as_str())
                .take(MAX_NAMES)
                .collect();
            path.push(names.join(", "));
            let deeper =
                inside.iter().map(|definition| definition.indent).filter(|indent| *indent > outermost);
            depth = if names.len() == 1 && path.len() < PATH_ENDS { deeper.min() } else { None };
        }
        (!path.is_empty()).then(|| path.join(" › "))
    }
}

/// Nested headings, innermost last.
#[derive(Default)]
struct HeadingStack(Vec<(usize, String)>);

impl HeadingStack {
    /// Enters a heading and returns its path.
    fn enter(&mut self, depth: usize, title: &str) -> String {
        while self.0.last().is_some_and(|(above, _)| *above >= depth) {
            self.0.pop();
        }
        self.0.push((depth, short(title.trim())));
        let titles: Vec<&str> = self.0.iter().map(|(_, title)| title.as_str()).collect();
        path_of(&titles)
    }
}

/// Definitions of one depth that are named.
const MAX_NAMES: usize = 4;

/// Names of a path that are shown: the outermost and the innermost.
const PATH_ENDS: usize = 3;

/// Longest title in a path: it is stored and embedded with every chunk below it.
const MAX_TITLE_CHARS: usize = 120;

/// A heading path. Bounded, however deep the nesting is: every line may have another one.
fn path_of(names: &[&str]) -> String {
    if names.len() <= 2 * PATH_ENDS {
        return names.join(" › ");
    }
    let (outer, inner) = (&names[..PATH_ENDS], &names[names.len() - PATH_ENDS..]);
    format!("{} › … › {}", outer.join(" › "), inner.join(" › "))
}

/// A title of bounded length.
fn short(title: &str) -> String {
    match title.char_indices().nth(MAX_TITLE_CHARS) {
        Some((end, _)) => format!("{}…", &title[..end]),
        None => title.to_owned(),
    }
}

#[cfg(test)]
mod tests;
