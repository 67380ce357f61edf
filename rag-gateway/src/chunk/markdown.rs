//! Markdown: sections by heading, then blocks, then nested blocks.

use pulldown_cmark::{Event, Options, Parser, Tag, TagEnd};

use super::{FIRST_BLOCK_LEVEL, HeadingStack, Level, Structure, lines::Lines};

/// Blocks nested deeper than this are all alike.
const DEEPEST: u8 = 8;

pub(super) fn structure(lines: &Lines<'_>) -> Structure {
    let mut structure = Structure::flat(lines.len());
    let mut stack = HeadingStack::default();
    // Line and path of each heading.
    let mut sections: Vec<usize> = Vec::new();
    let mut depth: u8 = 0;
    let mut open: Option<(usize, usize, String)> = None;
    let options = Options::ENABLE_TABLES | Options::ENABLE_YAML_STYLE_METADATA_BLOCKS;
    for (event, range) in Parser::new_ext(lines.text(), options).into_offset_iter() {
        let line = lines.line_at(range.start);
        match event {
            Event::Start(Tag::Heading { level, .. }) => {
                open = Some((line, level as usize, String::new()));
            }
            Event::End(TagEnd::Heading(_)) => {
                let Some((line, level, title)) = open.take() else { continue };
                // A heading inside a quote or a list item is no section of the document.
                if depth == 0 {
                    structure.offer(line, Level::try_from(level).unwrap_or(FIRST_BLOCK_LEVEL - 1));
                    structure.headings.push(stack.enter(level, &title));
                    sections.push(line);
                }
            }
            Event::Text(text) | Event::Code(text) => {
                if let Some((_, _, title)) = &mut open {
                    title.push_str(&text);
                }
            }
            Event::Start(tag) if is_block(&tag) => {
                structure.offer(line, FIRST_BLOCK_LEVEL + depth.min(DEEPEST));
                depth = depth.saturating_add(1);
            }
            Event::End(tag) if is_block_end(tag) => depth = depth.saturating_sub(1),
            Event::Rule => structure.offer(line, FIRST_BLOCK_LEVEL + depth.min(DEEPEST)),
            _ => {}
        }
    }
    for (index, start) in sections.iter().enumerate() {
        let end = sections.get(index + 1).copied().unwrap_or(lines.len());
        if let Some(section) = structure.heading_of.get_mut(*start..end.max(*start)) {
            section.fill(Some(index));
        }
    }
    blank_lines_in_code(lines, &mut structure);
    structure
}

/// Long code blocks are cut at their blank lines before anything else.
fn blank_lines_in_code(lines: &Lines<'_>, structure: &mut Structure) {
    for line in 1..lines.len() {
        if lines.is_blank(line - 1) && !lines.is_blank(line) {
            structure.offer(line, FIRST_BLOCK_LEVEL + DEEPEST + 1);
        }
    }
}

fn is_block(tag: &Tag<'_>) -> bool {
    matches!(
        tag,
        Tag::Paragraph
            | Tag::BlockQuote(_)
            | Tag::CodeBlock(_)
            | Tag::HtmlBlock
            | Tag::List(_)
            | Tag::Item
            | Tag::Table(_)
            | Tag::MetadataBlock(_)
    )
}

fn is_block_end(tag: TagEnd) -> bool {
    matches!(
        tag,
        TagEnd::Paragraph
            | TagEnd::BlockQuote(_)
            | TagEnd::CodeBlock
            | TagEnd::HtmlBlock
            | TagEnd::List(_)
            | TagEnd::Item
            | TagEnd::Table
            | TagEnd::MetadataBlock(_)
    )
}
