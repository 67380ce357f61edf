//! Tables of Markdown: a row that names a secret, or a column of them.

use std::ops::Range;

use super::{
    Found, is_number,
    names::{Class, class_of},
    values::{is_stated, second_of_pair},
};

/// Longer cells are sentences.
const MAX_NAME: usize = 40;
/// Rows and columns beyond these are data.
const MAX_LINE: usize = 4096;
const MAX_CELLS: usize = 32;

pub(super) fn find(text: &str, found: &mut Vec<Found>) {
    let mut at = 0;
    let mut header = 0..0;
    // The columns of the table that this line is in, by what their header names.
    let mut columns: Vec<Option<Class>> = Vec::new();
    for line in text.split('\n') {
        let range = at..at + line.len();
        at = range.end + 1;
        if !line.contains('|') || line.len() > MAX_LINE {
            columns.clear();
            header = 0..0;
            continue;
        }
        if is_rule(line) {
            columns = cells(&text[header.clone()], header.start).map(|cell| name(&text[cell])).collect();
            header = 0..0;
            continue;
        }
        let row = line.trim_start().starts_with('|');
        let mut named = None;
        for (index, cell) in cells(line, range.start).enumerate() {
            let class = columns.get(index).copied().flatten().or(named);
            if let Some(value) = class.and_then(|class| value(text, &cell, class)) {
                found.push(Found { at: value, name: "" });
            } else if row && named.is_none() {
                named = name(&text[cell]);
            }
        }
        header = range;
    }
}

/// `|---|:--:|`
fn is_rule(line: &str) -> bool {
    line.contains("--") && line.bytes().all(|byte| matches!(byte, b'|' | b'-' | b':' | b' ' | b'\t' | b'\r'))
}

/// Where the cells of a line are, without what is around them.
fn cells(line: &str, start: usize) -> impl Iterator<Item = Range<usize>> {
    let inner = line.trim_start();
    let start = start + (line.len() - inner.len());
    let (inner, start) = inner.strip_prefix('|').map_or((inner, start), |inner| (inner, start + 1));
    let mut at = start;
    inner.split('|').take(MAX_CELLS).map(move |cell| {
        let around = |c: char| c.is_whitespace() || matches!(c, '*' | '`' | '"' | '\'');
        let left = cell.trim_start_matches(around);
        let begin = at + (cell.len() - left.len());
        at += cell.len() + 1;
        begin..begin + left.trim_end_matches(around).len()
    })
}

/// What a cell names, if it is nothing but a name.
fn name(cell: &str) -> Option<Class> {
    let cell = cell.split_once('(').map_or(cell, |(cell, _)| cell).trim().trim_end_matches(':');
    (cell.len() <= MAX_NAME && cell.split(' ').count() <= 4).then(|| class_of(cell)).flatten()
}

/// Where the secret of a cell is.
fn value(text: &str, cell: &Range<usize>, class: Class) -> Option<Range<usize>> {
    let value = &text[cell.clone()];
    if value.contains(" / ") || (class == Class::Key && value.contains(['/', ':'])) {
        return second_of_pair(value).map(|at| cell.start + at.start..cell.start + at.end);
    }
    (!value.contains(char::is_whitespace) && !is_number(value) && is_stated(value, class, true))
        .then(|| cell.clone())
}
