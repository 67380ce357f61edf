//! Plain text, reStructuredText and AsciiDoc: sections by underlined or prefixed titles, then paragraphs.

use super::{FIRST_BLOCK_LEVEL, HeadingStack, Level, Structure, lines::Lines};

pub(super) fn structure(lines: &Lines<'_>) -> Structure {
    let mut structure = Structure::flat(lines.len());
    let mut stack = HeadingStack::default();
    // reStructuredText gives underlines their rank in order of appearance.
    let mut underlines: Vec<char> = Vec::new();
    let mut current = None;
    for line in 0..lines.len() {
        let begins_paragraph = !lines.is_blank(line) && (line == 0 || lines.is_blank(line - 1));
        if begins_paragraph {
            structure.offer(line, FIRST_BLOCK_LEVEL);
        }
        if begins_paragraph && let Some((rank, title)) = title(lines, line, &mut underlines) {
            structure.offer(line, Level::try_from(rank).unwrap_or(Level::MAX).min(FIRST_BLOCK_LEVEL - 1));
            structure.headings.push(stack.enter(rank, &title));
            current = Some(structure.headings.len() - 1);
        }
        structure.heading_of[line] = current;
    }
    structure
}

/// A title that begins on this line: its rank, counted from 1, and its text.
fn title(lines: &Lines<'_>, line: usize, underlines: &mut Vec<char>) -> Option<(usize, String)> {
    let text = lines.line(line).trim_end();
    let prefix = text.bytes().take_while(|byte| *byte == b'=').count();
    if (1..=6).contains(&prefix) && text.as_bytes().get(prefix) == Some(&b' ') {
        return Some((prefix, text[prefix..].trim().to_owned()));
    }
    if line + 1 >= lines.len() || text.starts_with(char::is_whitespace) {
        return None;
    }
    let mark = underline(lines.line(line + 1).trim_end())?;
    if lines.line(line + 1).trim_end().chars().count() < text.chars().count() || underline(text).is_some() {
        return None;
    }
    let rank = underlines.iter().position(|seen| *seen == mark).unwrap_or_else(|| {
        underlines.push(mark);
        underlines.len() - 1
    });
    Some((rank + 1, text.to_owned()))
}

/// The character of a line that is an underline: three or more of one punctuation mark.
fn underline(text: &str) -> Option<char> {
    let mark = text.chars().next()?;
    ("=-~^\"'`#*+:.".contains(mark) && text.len() >= 3 && text.chars().all(|other| other == mark))
        .then_some(mark)
}
