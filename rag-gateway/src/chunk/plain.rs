//! Plain text, reStructuredText and AsciiDoc: sections by underlined or prefixed titles, then paragraphs.

use super::{FIRST_BLOCK_LEVEL, HeadingStack, Level, Structure, lines::Lines};

/// How titles are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Titles {
    /// reStructuredText: a line of punctuation below, and perhaps one above.
    Underlined,
    /// AsciiDoc: `=` before; its old style of underlines too.
    Prefixed,
    /// Plain text: whatever somebody chose.
    Both,
}

pub(super) fn structure(lines: &Lines<'_>, titles: Titles) -> Structure {
    let mut structure = Structure::flat(lines.len());
    let mut stack = HeadingStack::default();
    // reStructuredText ranks its styles in order of appearance; one with a line above is another style.
    let mut styles: Vec<(char, bool)> = Vec::new();
    let mut current = None;
    // The fence of the AsciiDoc block that is open: nothing in it is a title.
    let mut fence: Option<&str> = None;
    for line in 0..lines.len() {
        let begins_paragraph = !lines.is_blank(line) && (line == 0 || lines.is_blank(line - 1));
        if begins_paragraph {
            structure.offer(line, FIRST_BLOCK_LEVEL);
        }
        let was_open = fence.is_some();
        if titles == Titles::Prefixed {
            fence = next_fence(fence, lines.line(line).trim_end());
        }
        if !was_open
            && fence.is_none()
            && begins_paragraph
            && let Some((rank, title)) = title(lines, line, titles, &mut styles)
        {
            structure.offer(line, Level::try_from(rank).unwrap_or(Level::MAX).min(FIRST_BLOCK_LEVEL - 1));
            structure.headings.push(stack.enter(rank, &title));
            current = Some(structure.headings.len() - 1);
        }
        structure.heading_of[line] = current;
    }
    structure
}

/// AsciiDoc's listings, literals, examples, passthroughs and comments end with the line they began with.
fn next_fence<'t>(open: Option<&'t str>, line: &'t str) -> Option<&'t str> {
    match open {
        Some(fence) if fence == line => None,
        Some(fence) => Some(fence),
        None => {
            let mark = line.chars().next().filter(|mark| "-.+/`".contains(*mark))?;
            let least = if mark == '`' { 3 } else { 4 };
            (line.len() >= least && line.chars().all(|other| other == mark)).then_some(line)
        }
    }
}

/// A title that begins on this line: its rank, counted from 1, and its text.
fn title(
    lines: &Lines<'_>,
    line: usize,
    titles: Titles,
    styles: &mut Vec<(char, bool)>,
) -> Option<(usize, String)> {
    let text = lines.line(line).trim_end();
    if titles != Titles::Underlined {
        let prefix = text.bytes().take_while(|byte| *byte == b'=').count();
        if (1..=6).contains(&prefix) && text.as_bytes().get(prefix) == Some(&b' ') {
            return Some((prefix, text[prefix..].trim().to_owned()));
        }
    }
    let next = |offset: usize| (line + offset < lines.len()).then(|| lines.line(line + offset).trim_end());
    // A line above, the title, the same line below.
    if let Some(above) = underline(text)
        && titles != Titles::Prefixed
        && let (Some(title), Some(below)) = (next(1), next(2))
        && underline(below) == Some(above)
        && !title.trim().is_empty()
        && underline(title).is_none()
        && text.chars().count() >= title.trim().chars().count()
    {
        return Some((rank(styles, above, true), title.trim().to_owned()));
    }
    if text.starts_with(char::is_whitespace) || underline(text).is_some() {
        return None;
    }
    let below = next(1)?;
    let mark = underline(below)?;
    // AsciiDoc's old underlines are as long as the title, give or take two; its fences are not.
    let (title_len, mark_len) = (text.chars().count(), below.chars().count());
    let fits = match titles {
        Titles::Prefixed => title_len.abs_diff(mark_len) <= 2,
        _ => mark_len >= title_len,
    };
    fits.then(|| (rank(styles, mark, false), text.to_owned()))
}

fn rank(styles: &mut Vec<(char, bool)>, mark: char, above: bool) -> usize {
    let known = styles.iter().position(|style| *style == (mark, above));
    known.unwrap_or_else(|| {
        styles.push((mark, above));
        styles.len() - 1
    }) + 1
}

/// The character of a line that is an underline: three or more of one punctuation mark.
fn underline(text: &str) -> Option<char> {
    let mark = text.chars().next()?;
    ("=-~^\"'`#*+:.".contains(mark) && text.len() >= 3 && text.chars().all(|other| other == mark))
        .then_some(mark)
}
