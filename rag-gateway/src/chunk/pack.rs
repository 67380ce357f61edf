//! Cuts lines into chunks at the best places that keep each within the limit.

use text_splitter::{ChunkConfig, ChunkSizer, TextSplitter};

use super::{Chunk, FIRST_BLOCK_LEVEL, Level, Structure, lines::Lines, tokens};

/// Only chunks that begin at a line this bad (in the middle of a paragraph or a block of code) share lines
/// with the one before.
const OVERLAP_FROM: Level = 32;

/// A section this much smaller than the limit may share a chunk with its neighbour.
const TINY_SHARE: usize = 5;

/// How far the whole can be from the sum of its lines.
const SLACK: usize = 8;

/// Longer lines are cut into blocks of this size first, so that no line costs more than linear time.
const LONGEST_BLOCK: usize = 16 * 1024;

/// Chunks that are further apart are not joined again.
const LONGEST_GLUE: usize = 64;

/// Cuts a document. See the module above for what is promised.
pub(super) fn pack<'t>(
    lines: &Lines<'t>,
    structure: &Structure,
    max_tokens: usize,
    overlap_tokens: usize,
) -> Vec<Chunk<'t>> {
    let mut packer = Packer { lines, structure, max_tokens, overlap_tokens, ranges: Vec::new() };
    for (start, end) in packer.sections() {
        packer.cut(start, end);
    }
    packer.join_tiny_neighbours();
    packer.chunks()
}

struct Packer<'a, 't> {
    lines: &'a Lines<'t>,
    structure: &'a Structure,
    max_tokens: usize,
    overlap_tokens: usize,
    /// Finished chunks as line ranges, in order.
    ranges: Vec<(usize, usize)>,
}

impl<'t> Packer<'_, 't> {
    /// Sections begin at headings; a tiny one joins what follows it at the same depth or deeper.
    fn sections(&self) -> Vec<(usize, usize)> {
        if let Some(regions) = &self.structure.regions {
            let parts =
                |(start, end): &(usize, usize)| self.parts(*start, *end, |level| level < FIRST_BLOCK_LEVEL);
            return regions.iter().flat_map(parts).collect();
        }
        let mut sections: Vec<(usize, usize)> = Vec::new();
        for (start, end) in self.parts(0, self.lines.len(), |level| level < FIRST_BLOCK_LEVEL) {
            if let Some(last) = sections.last_mut()
                && self.fits(last.0, end)
                && self.structure.levels[start] >= self.structure.levels[last.0]
                && (self.is_tiny(last.0, last.1) || self.is_tiny(start, end))
            {
                last.1 = end;
                continue;
            }
            sections.push((start, end));
        }
        sections
    }

    /// True when these lines fit into a chunk. Lines are counted one by one, and their sum is nearly the
    /// count of the whole: tokens may begin in one line and end in the next, and the last line's end is
    /// not quoted. Where it is close, the whole is counted.
    fn fits(&self, start: usize, end: usize) -> bool {
        let sum = self.lines.tokens(start, end);
        sum + SLACK <= self.max_tokens
            || (sum <= self.max_tokens
                && tokens::upper_bound(self.lines.slice(start, end)) <= self.max_tokens)
    }

    /// True when neighbours may share these lines.
    fn may_overlap(&self, start: usize, end: usize) -> bool {
        let sum = self.lines.tokens(start, end);
        sum <= self.overlap_tokens
            && tokens::upper_bound(self.lines.raw_slice(start, end)) <= self.overlap_tokens
    }

    fn is_tiny(&self, start: usize, end: usize) -> bool {
        self.lines.tokens(start, end) < self.max_tokens / TINY_SHARE
    }

    /// Splits `start..end` before every line whose level is accepted.
    fn parts(&self, start: usize, end: usize, accept: impl Fn(Level) -> bool) -> Vec<(usize, usize)> {
        let mut parts = Vec::new();
        let mut from = start;
        for line in start + 1..end {
            if accept(self.structure.levels[line]) && !self.lines.is_blank(line) {
                parts.push((from, line));
                from = line;
            }
        }
        if from < end {
            parts.push((from, end));
        }
        parts
    }

    /// Emits `start..end` whole if it fits; otherwise cuts it at its best places, fills chunks
    /// greedily, and goes on with the parts that are still too large.
    fn cut(&mut self, start: usize, end: usize) {
        let Some((start, end)) = self.without_blank_ends(start, end) else { return };
        if end - start == 1 || self.fits(start, end) {
            self.ranges.push((start, end));
            return;
        }
        let best = (start + 1..end)
            .filter(|line| !self.lines.is_blank(*line))
            .map(|line| self.structure.levels[line])
            .min();
        let Some(best) = best else {
            // One long line among blank ones.
            self.ranges.push((start, start + 1));
            return;
        };
        let mut open: Option<(usize, usize)> = None;
        for (from, to) in self.parts(start, end, |level| level <= best) {
            match open {
                Some((first, _)) if self.fits(first, to) => {
                    open = Some((first, to));
                }
                Some((first, last)) => {
                    self.cut(first, last);
                    open = Some((from, to));
                }
                None => open = Some((from, to)),
            }
        }
        if let Some((first, last)) = open {
            self.cut(first, last);
        }
    }

    /// What remains at the end of a cut, such as the first line of a long block, joins its neighbour
    /// where both fit: a passage of two lines says little.
    fn join_tiny_neighbours(&mut self) {
        let mut joined: Vec<(usize, usize)> = Vec::with_capacity(self.ranges.len());
        for &(start, end) in &self.ranges {
            if let Some(last) = joined.last_mut()
                && self.structure.levels[start] >= FIRST_BLOCK_LEVEL
                && (self.is_tiny(last.0, last.1) || self.is_tiny(start, end))
                && self.fits(last.0, end)
            {
                last.1 = end;
                continue;
            }
            joined.push((start, end));
        }
        self.ranges = joined;
    }

    fn without_blank_ends(&self, mut start: usize, mut end: usize) -> Option<(usize, usize)> {
        while start < end && self.lines.is_blank(start) {
            start += 1;
        }
        while start < end && self.lines.is_blank(end - 1) {
            end -= 1;
        }
        (start < end).then_some((start, end))
    }

    /// Ranges become chunks: overlaps added, overlong lines cut inside.
    fn chunks(&self) -> Vec<Chunk<'t>> {
        let mut chunks = Vec::with_capacity(self.ranges.len());
        let mut previous: Option<(usize, usize)> = None;
        // Where the last chunk of whole lines ended, if the chunk before is one.
        let mut whole_until: Option<usize> = None;
        for &(start, end) in &self.ranges {
            let heading = self.structure.heading(start, end);
            if self.fits(start, end) {
                let from = self.overlap_start(start, end, previous);
                let chunk = chunk(self.lines.slice(from, end), from, end, heading);
                let glue = whole_until
                    .filter(|before| *before <= from)
                    .map(|before| self.lines.between(before, from))
                    .filter(|glue| glue.len() <= LONGEST_GLUE);
                chunks.push(Chunk { tokens: self.lines.tokens(from, end), glue, ..chunk });
                whole_until = Some(end);
            } else {
                for text in pieces(self.lines.line(start), self.max_tokens) {
                    let chunk = chunk(text, start, start + 1, heading.clone());
                    chunks.push(Chunk { tokens: self.max_tokens, ..chunk });
                }
                whole_until = None;
            }
            previous = Some((start, end));
        }
        chunks
    }

    /// A chunk that begins in the middle of something starts a few lines earlier, where they fit.
    fn overlap_start(&self, start: usize, end: usize, previous: Option<(usize, usize)>) -> usize {
        let Some((floor, previous_end)) = previous else { return start };
        // Only where the cut is inside one block, and never over a chunk's whole predecessor.
        if previous_end != start || self.structure.levels[start] < OVERLAP_FROM {
            return start;
        }
        let mut from = start;
        while from > floor + 1 && self.may_overlap(from - 1, start) && self.fits(from - 1, end) {
            from -= 1;
        }
        while from < start && self.lines.is_blank(from) {
            from += 1;
        }
        from
    }
}

fn chunk(text: &str, start: usize, end: usize, heading: Option<String>) -> Chunk<'_> {
    let number = |line: usize| u32::try_from(line).unwrap_or(u32::MAX);
    Chunk { text, start_line: number(start + 1), end_line: number(end), heading, tokens: 0, glue: None }
}

struct UpperBound;

impl ChunkSizer for UpperBound {
    fn size(&self, text: &str) -> usize {
        tokens::upper_bound(text)
    }
}

/// Cuts one overlong line at sentences, then words, then characters.
fn pieces(line: &str, max_tokens: usize) -> Vec<&str> {
    let splitter = TextSplitter::new(ChunkConfig::new(max_tokens).with_sizer(UpperBound).with_trim(true));
    let mut pieces = Vec::new();
    let mut rest = line;
    loop {
        let (text, run, after) = tokens::next_long_run(rest).unwrap_or((rest, "", ""));
        pieces.extend(blocks(text, LONGEST_BLOCK).flat_map(|block| splitter.chunks(block)));
        // A run without a word boundary counts as its bytes, so any cut of it is as good as another.
        pieces.extend(blocks(run, max_tokens).filter(|piece| !piece.trim().is_empty()));
        if after.is_empty() {
            return pieces;
        }
        rest = after;
    }
}

/// Parts of at most `size` bytes, cut at white space where there is some.
fn blocks(mut text: &str, size: usize) -> impl Iterator<Item = &str> {
    std::iter::from_fn(move || {
        if text.is_empty() {
            return None;
        }
        let mut end = text.len();
        if end > size {
            // At least one character, however small the size.
            let limit = text.floor_char_boundary(size).max(text.chars().next().map_or(1, char::len_utf8));
            end = text[..limit].rfind(char::is_whitespace).filter(|at| *at > 0).unwrap_or(limit);
        }
        let (block, rest) = text.split_at(end);
        text = rest;
        Some(block)
    })
}
