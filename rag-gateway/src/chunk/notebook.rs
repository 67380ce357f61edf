//! Jupyter notebooks: the cells' sources, which are lines of the file as everything that is quoted is.
//!
//! A notebook is JSON, and `"source"` has one line of it for each line of a cell. Only those are cut into chunks: outputs,
//! images and metadata are what running it left, and are neither searched nor quoted. A cell never shares a chunk with
//! another one, because what stands between them is not part of either. What is searched is what the lines say
//! ([`said`]), not how JSON writes it. A file that is not laid out so is cut as other JSON.

use std::fmt::Write as _;

use super::{Definition, FIRST_BLOCK_LEVEL, HeadingStack, Level, Structure, lines::Lines};

/// Notebooks do not nest; what does is something else.
const MAX_DEPTH: usize = 64;

/// What may stand on a line of a source beside it: indentation, `"source": [` and the like.
const MAX_BESIDE: usize = 128;

/// A cell: what kind it is, and where the strings of its source are, quotes included.
#[derive(Default)]
struct Cell<'t> {
    kind: &'t str,
    source: Vec<(usize, usize)>,
}

/// `None`: it is no notebook, or its lines hold more than sources.
pub(super) fn structure(lines: &Lines<'_>) -> Option<Structure> {
    let mut structure = Structure::flat(lines.len());
    let mut regions: Vec<(usize, usize)> = Vec::new();
    let mut stack = HeadingStack::default();
    let mut current = None;
    for Cell { kind, source } in cells(lines.text())? {
        let (Some((first, _)), Some((_, last))) = (source.first(), source.last()) else { continue };
        let (start, end) = (lines.line_at(*first), lines.line_at(last - 1) + 1);
        let written: usize = source.iter().map(|(start, end)| end - start).sum();
        let beside = lines.raw_slice(start, end).len().saturating_sub(written);
        if regions.last().is_some_and(|(_, before)| *before > start) || beside > MAX_BESIDE * (end - start) {
            return None;
        }
        let mut after_blank = true;
        let mut says_something = false;
        for (from, to) in source {
            let line = lines.line_at(from);
            let text = decoded(&lines.text()[from..to]).unwrap_or_default();
            let text = text.trim_end();
            if text.is_empty() {
                after_blank = true;
                continue;
            }
            if after_blank {
                structure.offer(line, FIRST_BLOCK_LEVEL);
            }
            after_blank = false;
            says_something = true;
            let depth = text.bytes().take_while(|byte| *byte == b'#').count();
            if kind == "markdown" && (1..=6).contains(&depth) && text.as_bytes().get(depth) == Some(&b' ') {
                structure.offer(line, Level::try_from(depth).unwrap_or(FIRST_BLOCK_LEVEL - 1));
                structure.headings.push(stack.enter(depth, &text[depth..]));
                current = Some(structure.headings.len() - 1);
            }
            if kind == "code" {
                structure.definitions.extend(definition(line, text));
            }
            structure.heading_of[line] = current;
        }
        // No chunk goes over the beginning of a cell.
        structure.offer(start, FIRST_BLOCK_LEVEL - 1);
        structure.heading_of[start] = structure.heading_of[start].or(current);
        if says_something {
            regions.push((start, end));
        }
    }
    structure.regions = Some(regions);
    Some(structure)
}

/// `def load(path):` in a cell.
fn definition(line: usize, text: &str) -> Option<Definition> {
    let code = text.trim_start();
    let rest = code.strip_prefix("async ").unwrap_or(code);
    let (keyword, rest) = rest.split_once(' ').filter(|(keyword, _)| matches!(*keyword, "def" | "class"))?;
    let name: String =
        rest.chars().take_while(|character| character.is_alphanumeric() || *character == '_').collect();
    (!name.is_empty()).then(|| Definition {
        line,
        indent: text.len() - code.len(),
        name: super::short(&format!("{keyword} {name}")),
    })
}

/// What lines of a notebook say: strings without quotes and escapes, everything else as it is.
pub(crate) fn said(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for line in text.lines() {
        let line = line.trim();
        let string = line.strip_suffix(',').unwrap_or(line);
        match decoded(string) {
            Some(said) => {
                let _ = writeln!(out, "{}", said.trim_end());
            }
            None => {
                let _ = writeln!(out, "{line}");
            }
        }
    }
    out
}

fn decoded(string: &str) -> Option<String> {
    string.starts_with('"').then(|| serde_json::from_str(string).ok()).flatten()
}

/// An object or an array that is open.
struct Open<'t> {
    is_object: bool,
    key: &'t str,
    /// The next string is a key.
    at_key: bool,
}

/// The cells of a notebook (nbformat 4). Reads each byte once, and checks no more than it needs.
fn cells(text: &str) -> Option<Vec<Cell<'_>>> {
    let bytes = text.as_bytes();
    let mut open: Vec<Open<'_>> = Vec::new();
    let mut cells: Vec<Cell<'_>> = Vec::new();
    let mut at = 0;
    while let Some(byte) = bytes.get(at) {
        match byte {
            b'{' | b'[' => {
                if open.len() == MAX_DEPTH {
                    return None;
                }
                let is_object = *byte == b'{';
                open.push(Open { is_object, key: "", at_key: is_object });
                if is_object && open.len() == 3 && open[0].key == "cells" && !open[1].is_object {
                    cells.push(Cell::default());
                }
            }
            b'}' | b']' => {
                open.pop().filter(|open| open.is_object == (*byte == b'}'))?;
            }
            b',' => {
                let inner = open.last_mut()?;
                inner.at_key = inner.is_object;
            }
            b'"' => {
                let end = end_of_string(bytes, at)?;
                let string = &text[at + 1..end - 1];
                match open.last_mut() {
                    Some(inner) if inner.at_key => {
                        inner.key = string;
                        inner.at_key = false;
                    }
                    _ => {
                        if let ([root, list, cell, rest @ ..], Some(last)) = (&open[..], cells.last_mut())
                            && root.key == "cells"
                            && !list.is_object
                        {
                            match (cell.key, rest) {
                                ("cell_type", []) => last.kind = string,
                                ("source", []) => last.source.push((at, end)),
                                ("source", [lines]) if !lines.is_object => last.source.push((at, end)),
                                _ => {}
                            }
                        }
                    }
                }
                at = end;
                continue;
            }
            _ => {}
        }
        at += 1;
    }
    (open.is_empty() && !cells.is_empty()).then_some(cells)
}

/// Behind the closing quote of the string that begins here.
fn end_of_string(bytes: &[u8], start: usize) -> Option<usize> {
    let mut at = start + 1;
    loop {
        match bytes.get(at)? {
            b'"' => return Some(at + 1),
            b'\\' => at += 2,
            _ => at += 1,
        }
    }
}
