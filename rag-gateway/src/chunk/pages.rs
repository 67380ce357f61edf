//! PDF and DOCX: one line a page, or a paragraph (see [`crate::source`]), so a passage's lines are its pages
//! or paragraphs.

use super::{FIRST_BLOCK_LEVEL, HeadingStack, Level, Structure, lines::Lines};

pub(super) fn structure(lines: &Lines<'_>) -> Structure {
    let mut structure = Structure::flat(lines.len());
    for line in 0..lines.len() {
        structure.offer(line, FIRST_BLOCK_LEVEL);
        structure.headings.push(format!("page {}", line + 1));
        structure.heading_of[line] = Some(line);
    }
    structure
}

/// DOCX: one line a paragraph, headings with `#`.
pub(super) fn paragraphs(lines: &Lines<'_>) -> Structure {
    let mut structure = Structure::flat(lines.len());
    let mut stack = HeadingStack::default();
    let mut current = None;
    for line in 0..lines.len() {
        let text = lines.line(line);
        structure.offer(line, FIRST_BLOCK_LEVEL);
        let depth = text.bytes().take_while(|byte| *byte == b'#').count();
        if (1..FIRST_BLOCK_LEVEL).contains(&Level::try_from(depth).unwrap_or(Level::MAX))
            && text.as_bytes().get(depth) == Some(&b' ')
        {
            structure.offer(line, Level::try_from(depth).unwrap_or(FIRST_BLOCK_LEVEL));
            structure.headings.push(stack.enter(depth, &text[depth..]));
            current = Some(structure.headings.len() - 1);
        }
        structure.heading_of[line] = current;
    }
    structure
}
