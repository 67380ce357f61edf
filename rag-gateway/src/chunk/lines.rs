//! A text as lines with their token counts.

use super::tokens;

/// Byte offsets and token counts of a text's lines. A line ends with `\n` (included) or the text.
pub(super) struct Lines<'t> {
    text: &'t str,
    /// Offset of each line, then the length of the text.
    starts: Vec<usize>,
    /// Tokens before each line, then all of them.
    tokens_before: Vec<usize>,
}

impl<'t> Lines<'t> {
    pub(super) fn new(text: &'t str) -> Self {
        let mut starts = vec![0];
        let mut tokens_before = vec![0];
        let (mut offset, mut tokens) = (0, 0);
        for line in text.split_inclusive('\n') {
            offset += line.len();
            tokens += tokens::upper_bound(line);
            starts.push(offset);
            tokens_before.push(tokens);
        }
        Self { text, starts, tokens_before }
    }

    pub(super) fn len(&self) -> usize {
        self.starts.len() - 1
    }

    /// A line with its terminator.
    pub(super) fn raw(&self, line: usize) -> &'t str {
        &self.text[self.starts[line]..self.starts[line + 1]]
    }

    /// A line without its terminator.
    pub(super) fn line(&self, line: usize) -> &'t str {
        without_terminator(self.raw(line))
    }

    /// Lines `start..end`, without the last one's terminator.
    pub(super) fn slice(&self, start: usize, end: usize) -> &'t str {
        without_terminator(&self.text[self.starts[start]..self.starts[end]])
    }

    /// What stands between the end of `..end` (without its last terminator) and line `start`.
    pub(super) fn between(&self, end: usize, start: usize) -> &'t str {
        let last = end.saturating_sub(1);
        let terminator = self.raw(last).len() - self.line(last).len();
        &self.text[self.starts[end] - terminator..self.starts[start]]
    }

    /// Lines `start..end`, all of them.
    pub(super) fn raw_slice(&self, start: usize, end: usize) -> &'t str {
        &self.text[self.starts[start]..self.starts[end]]
    }

    pub(super) fn is_blank(&self, line: usize) -> bool {
        self.raw(line).trim().is_empty()
    }

    /// An upper bound of the tokens of lines `start..end`.
    pub(super) fn tokens(&self, start: usize, end: usize) -> usize {
        self.tokens_before[end] - self.tokens_before[start]
    }

    /// The line that holds a byte offset.
    pub(super) fn line_at(&self, offset: usize) -> usize {
        self.starts
            .partition_point(|start| *start <= offset)
            .saturating_sub(1)
            .min(self.len().saturating_sub(1))
    }

    pub(super) fn text(&self) -> &'t str {
        self.text
    }
}

fn without_terminator(text: &str) -> &str {
    let text = text.strip_suffix('\n').unwrap_or(text);
    text.strip_suffix('\r').unwrap_or(text)
}
