//! The text of PDF and DOCX files, in bounded time and space.
//!
//! Both formats are read by other people's code, from files of strangers: a panic, a file that never
//! ends and a bomb are each the failure of that one file. What comes out is text with one line for
//! each page (PDF) or paragraph (DOCX); see [`super`].

use std::{
    collections::HashMap,
    io::{Cursor, Read as _},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
    thread,
    time::Duration,
};

use quick_xml::{
    Reader, XmlVersion,
    events::{BytesStart, Event},
};
use zip::ZipArchive;

/// Larger files are not opened.
pub(crate) const MAX_FILE_BYTES: u64 = 32 * 1024 * 1024;

/// Most text that is taken from one file.
const MAX_TEXT_BYTES: usize = 8 * 1024 * 1024;

/// Most XML that is unpacked from one DOCX file.
const MAX_XML_BYTES: u64 = 64 * 1024 * 1024;

/// How long one PDF file may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// A thread cannot be stopped from outside: after so many that never came back, no more are started.
const MAX_STUCK: usize = 2;

/// Deep nesting in a file is recursion in its reader.
const STACK_BYTES: usize = 64 * 1024 * 1024;

/// Readers that never came back.
static STUCK: AtomicUsize = AtomicUsize::new(0);

/// A format whose text must be taken out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    Pdf,
    Docx,
}

impl Format {
    /// By the file's name; `None` where the file is text, or nothing we know.
    pub(crate) fn of(name: &str) -> Option<Self> {
        let (_, extension) = name.rsplit_once('.')?;
        match extension.to_ascii_lowercase().as_str() {
            "pdf" => Some(Self::Pdf),
            "docx" => Some(Self::Docx),
            _ => None,
        }
    }
}

/// The text of a file, or why there is none, in words. Blocking.
pub(crate) fn text(format: Format, data: Vec<u8>) -> Result<String, String> {
    let text = match format {
        Format::Pdf => in_bounded_time(move || pdf(&data))?,
        Format::Docx => docx(data)?,
    };
    if text.trim().is_empty() {
        return Err("it holds no text; scanned pages need OCR first".to_owned());
    }
    Ok(text)
}

/// Runs a reader on a thread of its own, and gives up on it after a while.
fn in_bounded_time(read: impl FnOnce() -> Result<String, String> + Send + 'static) -> Result<String, String> {
    if STUCK.load(Ordering::Relaxed) >= MAX_STUCK {
        return Err("other PDF files hold up their readers; restart to try again".to_owned());
    }
    let (done, answer) = mpsc::sync_channel(1);
    thread::Builder::new()
        .name("atlas-pdf".to_owned())
        .stack_size(STACK_BYTES)
        .spawn(move || {
            let result = catch_unwind(AssertUnwindSafe(read))
                .unwrap_or_else(|_| Err("its reader stumbled over it; it may be damaged".to_owned()));
            if done.send(result).is_err() {
                // Too late, but it came back.
                STUCK.fetch_sub(1, Ordering::Relaxed);
            }
        })
        .map_err(|error| format!("no thread to read it on: {error}"))?;
    answer.recv_timeout(PATIENCE).unwrap_or_else(|_| {
        STUCK.fetch_add(1, Ordering::Relaxed);
        Err(format!("it took longer than {} s to read", PATIENCE.as_secs()))
    })
}

/// One line a page.
fn pdf(data: &[u8]) -> Result<String, String> {
    let pages = pdf_extract::extract_text_from_mem_by_pages(data)
        .map_err(|error| format!("it cannot be read as PDF: {error}"))?;
    let mut text = String::new();
    for page in pages {
        push_page(&mut text, &page);
        text.push('\n');
        if text.len() > MAX_TEXT_BYTES {
            return Err(format!("it holds more than {MAX_TEXT_BYTES} bytes of text"));
        }
    }
    Ok(text)
}

/// A page on one line: words that were broken at the end of a line are whole again.
fn push_page(text: &mut String, page: &str) {
    let start = text.len();
    for line in page.lines() {
        let words: Vec<&str> = line.split(|c: char| c.is_whitespace() || c.is_control()).collect();
        for word in words.into_iter().filter(|word| !word.is_empty()) {
            let broken = text[start..].ends_with("-\u{1}");
            if text.ends_with('\u{1}') {
                text.pop();
                if broken && word.starts_with(char::is_lowercase) && before_hyphen(text) {
                    text.pop();
                } else if !broken {
                    text.push(' ');
                }
            } else if text.len() > start {
                text.push(' ');
            }
            text.push_str(word);
        }
        // Marks the end of a line until the next word shows whether it goes on.
        if text.len() > start && !text.ends_with('\u{1}') {
            text.push('\u{1}');
        }
    }
    if text.ends_with('\u{1}') {
        text.pop();
    }
}

/// True for text that ends with a lower-case letter and a hyphen.
fn before_hyphen(text: &str) -> bool {
    text.strip_suffix('-').is_some_and(|text| text.ends_with(char::is_lowercase))
}

/// One line a paragraph; headings as `#`, cells of a table between `|`.
fn docx(data: Vec<u8>) -> Result<String, String> {
    let mut archive =
        ZipArchive::new(Cursor::new(data)).map_err(|error| format!("it cannot be read as DOCX: {error}"))?;
    let mut part = |name: &str| -> Result<String, String> {
        let file = archive.by_name(name).map_err(|error| format!("{name} is not in it: {error}"))?;
        let mut xml = Vec::new();
        file.take(MAX_XML_BYTES + 1)
            .read_to_end(&mut xml)
            .map_err(|error| format!("{name} cannot be unpacked: {error}"))?;
        if xml.len() as u64 > MAX_XML_BYTES {
            return Err(format!("{name} has more than {MAX_XML_BYTES} bytes"));
        }
        String::from_utf8(xml).map_err(|_| format!("{name} is not UTF-8"))
    };
    let document = part("word/document.xml")?;
    // Without styles headings are told by their ids alone.
    let styles = part("word/styles.xml").map(|xml| heading_styles(&xml)).unwrap_or_default();
    paragraphs(&document, &styles)
}

/// Style ids that are headings, with their depth: ids are translated, names are not.
fn heading_styles(xml: &str) -> HashMap<String, usize> {
    let mut styles = HashMap::new();
    let mut reader = Reader::from_str(xml);
    let mut style: Option<String> = None;
    loop {
        match reader.read_event() {
            Ok(Event::Start(tag) | Event::Empty(tag)) => match tag.local_name().as_ref() {
                "style" => style = attribute(&tag, "styleId"),
                "name" => {
                    if let (Some(id), Some(name)) = (&style, attribute(&tag, "val"))
                        && let Some(depth) = heading_depth(&name)
                    {
                        styles.insert(id.clone(), depth);
                    }
                }
                _ => {}
            },
            Ok(Event::Eof) | Err(_) => return styles,
            Ok(_) => {}
        }
    }
}

/// `heading 2` and `Heading2` are 2, `Title` is 1.
fn heading_depth(name: &str) -> Option<usize> {
    let name = name.to_ascii_lowercase();
    if name == "title" {
        return Some(1);
    }
    let number: usize = name.strip_prefix("heading")?.trim().parse().ok()?;
    (1..=9).contains(&number).then_some(number.min(6))
}

/// The paragraph that is read.
#[derive(Default)]
struct Paragraph {
    text: String,
    depth: Option<usize>,
}

fn paragraphs(xml: &str, styles: &HashMap<String, usize>) -> Result<String, String> {
    let damaged = |error: quick_xml::Error| format!("its text is damaged: {error}");
    let mut reader = Reader::from_str(xml);
    let mut text = String::new();
    let mut paragraph = Paragraph::default();
    // Rows around the current place, and whether each has a cell yet: a row is one line, whatever is in its cells.
    let mut rows: Vec<bool> = Vec::new();
    let mut in_text = false;
    loop {
        match reader.read_event().map_err(damaged)? {
            Event::Start(tag) => match tag.local_name().as_ref() {
                "t" => in_text = true,
                "tr" => rows.push(false),
                "tc" => begin_cell(&mut rows, &mut paragraph),
                _ => note(&tag, styles, &mut paragraph),
            },
            Event::Empty(tag) => match tag.local_name().as_ref() {
                "tc" => begin_cell(&mut rows, &mut paragraph),
                _ => note(&tag, styles, &mut paragraph),
            },
            Event::Text(piece) if in_text => paragraph.text.push_str(&piece.xml10_content()),
            Event::CData(piece) if in_text => paragraph.text.push_str(&piece.xml10_content()),
            Event::GeneralRef(entity) if in_text => {
                let character = entity.resolve_char_ref().ok().flatten();
                paragraph.text.push(character.unwrap_or(match entity.xml10_content().as_ref() {
                    "lt" => '<',
                    "gt" => '>',
                    "amp" => '&',
                    "quot" => '"',
                    "apos" => '\'',
                    _ => ' ',
                }));
            }
            Event::End(tag) => match tag.local_name().as_ref() {
                "t" => in_text = false,
                "p" if !rows.is_empty() => paragraph.text.push(' '),
                "p" => emit(&mut text, &std::mem::take(&mut paragraph)),
                "tr" => {
                    rows.pop();
                    if rows.is_empty() {
                        emit(&mut text, &std::mem::take(&mut paragraph));
                    }
                }
                _ => {}
            },
            Event::Eof => {
                emit(&mut text, &paragraph);
                return Ok(text);
            }
            _ => {}
        }
        if text.len() + paragraph.text.len() > MAX_TEXT_BYTES {
            return Err(format!("it holds more than {MAX_TEXT_BYTES} bytes of text"));
        }
    }
}

/// An empty cell is one too: what comes after it stands in its own column.
fn begin_cell(rows: &mut [bool], paragraph: &mut Paragraph) {
    let nested = rows.len() > 1;
    if let Some(has_cell) = rows.last_mut() {
        if *has_cell || nested {
            paragraph.text.push_str(" | ");
        }
        *has_cell = true;
    }
}

/// What a tag says about the paragraph it is in.
fn note(tag: &BytesStart<'_>, styles: &HashMap<String, usize>, paragraph: &mut Paragraph) {
    match tag.local_name().as_ref() {
        "tab" | "br" | "cr" => paragraph.text.push(' '),
        "pStyle" => {
            if let Some(id) = attribute(tag, "val") {
                paragraph.depth = styles.get(&id).copied().or_else(|| heading_depth(&id)).or(paragraph.depth);
            }
        }
        "outlineLvl" => {
            let level = attribute(tag, "val").and_then(|level| level.parse::<usize>().ok());
            paragraph.depth =
                level.filter(|level| *level < 9).map(|level| (level + 1).min(6)).or(paragraph.depth);
        }
        _ => {}
    }
}

/// Writes a paragraph as one line. One without text is left out, and not counted.
fn emit(text: &mut String, paragraph: &Paragraph) {
    let words: Vec<&str> = paragraph
        .text
        .split(|c: char| c.is_whitespace() || c.is_control())
        .filter(|word| !word.is_empty())
        .collect();
    let line = words.join(" ");
    if line.chars().all(|character| matches!(character, ' ' | '|')) {
        return;
    }
    if let Some(depth) = paragraph.depth {
        text.extend(std::iter::repeat_n('#', depth));
        text.push(' ');
    }
    text.push_str(&line);
    text.push('\n');
}

/// The value of an attribute, by its name without a prefix.
fn attribute(tag: &BytesStart<'_>, name: &str) -> Option<String> {
    tag.attributes().flatten().find(|attribute| attribute.key.local_name().as_ref() == name).and_then(
        |attribute| {
            attribute.normalized_value(XmlVersion::Implicit1_0).ok().map(std::borrow::Cow::into_owned)
        },
    )
}

#[cfg(test)]
pub(crate) mod tests {
    #![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

    use std::io::Write as _;

    use proptest::prelude::*;
    use zip::{ZipWriter, write::SimpleFileOptions};

    use super::*;

    /// A PDF with one line of text on each page.
    pub(crate) fn pdf_of(pages: &[&str]) -> Vec<u8> {
        let mut objects = vec![
            "<< /Type /Catalog /Pages 2 0 R >>".to_owned(),
            format!(
                "<< /Type /Pages /Count {} /Kids [{}] >>",
                pages.len(),
                (0..pages.len()).map(|n| format!("{} 0 R", 4 + 2 * n)).collect::<Vec<_>>().join(" ")
            ),
            "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>".to_owned(),
        ];
        for (n, page) in pages.iter().enumerate() {
            let lines: Vec<String> = page.lines().map(|line| format!("({line}) Tj 0 -14 Td")).collect();
            let stream = format!("BT /F1 12 Tf 72 720 Td {} ET", lines.join(" "));
            objects.push(format!(
                "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents {} 0 R /Resources << /Font << /F1 3 0 R >> >> >>",
                5 + 2 * n
            ));
            objects.push(format!("<< /Length {} >>\nstream\n{stream}\nendstream", stream.len()));
        }
        let mut file = "%PDF-1.4\n".to_owned();
        let mut offsets = Vec::new();
        for (number, object) in objects.iter().enumerate() {
            offsets.push(file.len());
            file.extend([format!("{} 0 obj\n{object}\nendobj\n", number + 1)]);
        }
        let start = file.len();
        file.extend([format!("xref\n0 {}\n0000000000 65535 f \n", objects.len() + 1)]);
        for offset in offsets {
            file.extend([format!("{offset:010} 00000 n \n")]);
        }
        file.extend([format!(
            "trailer\n<< /Size {} /Root 1 0 R >>\nstartxref\n{start}\n%%EOF\n",
            objects.len() + 1
        )]);
        file.into_bytes()
    }

    /// A DOCX file with this body.
    pub(crate) fn docx_of(body: &str) -> Vec<u8> {
        let mut archive = ZipWriter::new(Cursor::new(Vec::new()));
        let mut part = |name: &str, xml: &str| {
            archive.start_file(name, SimpleFileOptions::default()).unwrap();
            archive.write_all(xml.as_bytes()).unwrap();
        };
        part("word/document.xml", &format!("<w:document xmlns:w=\"w\"><w:body>{body}</w:body></w:document>"));
        part(
            "word/styles.xml",
            "<w:styles xmlns:w=\"w\"><w:style w:styleId=\"berschrift2\"><w:name w:val=\"heading 2\"/></w:style></w:styles>",
        );
        archive.finish().unwrap().into_inner()
    }

    #[test]
    fn a_page_of_a_pdf_is_a_line() {
        let pdf = pdf_of(&["The first page\nhas two lines.", "The second."]);
        let text = text(Format::Pdf, pdf).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines, ["The first page has two lines.", "The second."]);
    }

    #[test]
    fn words_broken_at_the_end_of_a_line_are_whole_again() {
        let mut page = String::from("before\n");
        push_page(&mut page, "reser-\nvation of a well-\nKnown A-\n1 token\n\n  next  line ");
        assert_eq!(page, "before\nreservation of a well-Known A-1 token next line");
    }

    #[test]
    fn a_paragraph_of_a_docx_is_a_line_and_headings_are_marked() {
        let body = "<w:p><w:pPr><w:pStyle w:val=\"Heading1\"/></w:pPr><w:r><w:t>Guide</w:t></w:r></w:p>\
                    <w:p/>\
                    <w:p><w:r><w:t>Tom &amp; Jerry</w:t></w:r><w:r><w:tab/><w:t>run &#x2713;</w:t></w:r></w:p>\
                    <w:p><w:pPr><w:pStyle w:val=\"berschrift2\"/></w:pPr><w:r><w:t>Install</w:t></w:r></w:p>\
                    <w:tbl><w:tr><w:tc><w:p><w:r><w:t>a</w:t></w:r></w:p></w:tc>\
                    <w:tc><w:p><w:r><w:t>b</w:t></w:r></w:p></w:tc></w:tr></w:tbl>\
                    <w:p><w:del><w:r><w:delText>gone</w:delText></w:r></w:del></w:p>";
        let text = text(Format::Docx, docx_of(body)).unwrap();
        assert_eq!(text, "# Guide\nTom & Jerry run ✓\n## Install\na | b\n");
    }

    #[test]
    fn empty_cells_of_a_docx_keep_their_columns() {
        let cell = |text: &str| format!("<w:tc><w:p><w:r><w:t>{text}</w:t></w:r></w:p></w:tc>");
        let row = |cells: &[&str]| format!("<w:tr>{}</w:tr>", cells.concat());
        let (a, b) = (cell("first"), cell("last"));
        let body = [
            "<w:tbl>".to_owned(),
            row(&[&a, "<w:tc><w:tcPr/><w:p/></w:tc>", &b]),
            row(&[&a, "<w:tc/>", &b]),
            row(&[&a, "<w:tc><w:p></w:p></w:tc>"]),
            row(&["<w:tc><w:p><w:r><w:t/></w:r></w:p></w:tc>", &b]),
            row(&["<w:tc><w:p/></w:tc>", "<w:tc><w:p/></w:tc>"]),
            row(&[&a, &format!("<w:tc><w:tbl>{}</w:tbl><w:p/></w:tc>", row(&[&a, &b]))]),
            "</w:tbl>".to_owned(),
        ]
        .concat();
        let text = text(Format::Docx, docx_of(&body)).unwrap();
        assert_eq!(text, "first | | last\nfirst | | last\nfirst |\n| last\nfirst | | first | last\n");
    }

    #[test]
    fn a_bomb_is_not_unpacked() {
        let mut archive = ZipWriter::new(Cursor::new(Vec::new()));
        archive.start_file("word/document.xml", SimpleFileOptions::default()).unwrap();
        let block = vec![b' '; 1 << 20];
        for _ in 0..=(MAX_XML_BYTES >> 20) {
            archive.write_all(&block).unwrap();
        }
        let bomb = archive.finish().unwrap().into_inner();
        assert!(bomb.len() < 1 << 20, "it is small on disk");
        let why = text(Format::Docx, bomb).unwrap_err();
        assert!(why.contains("more than"), "{why}");
    }

    #[test]
    fn a_reader_that_panics_fails_its_own_file_only() {
        let why = in_bounded_time(|| panic!("as pdf-extract does")).unwrap_err();
        assert!(why.contains("damaged"), "{why}");
        assert_eq!(in_bounded_time(|| Ok("fine".to_owned())), Ok("fine".to_owned()));
    }

    #[test]
    fn a_file_without_text_says_so() {
        let why = text(Format::Docx, docx_of("<w:p/>")).unwrap_err();
        assert!(why.contains("no text"), "{why}");
        assert!(text(Format::Pdf, b"not a pdf".to_vec()).unwrap_err().contains("PDF"));
        assert!(text(Format::Docx, b"not a zip".to_vec()).unwrap_err().contains("DOCX"));
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]

        #[test]
        fn damaged_files_are_failures_of_their_own(
            at in 0_usize..600,
            bytes in prop::collection::vec(any::<u8>(), 1..40),
            docx in any::<bool>(),
        ) {
            let (format, mut data) = if docx {
                (Format::Docx, docx_of("<w:p><w:r><w:t>text</w:t></w:r></w:p>"))
            } else {
                (Format::Pdf, pdf_of(&["text"]))
            };
            let at = at % data.len();
            let end = (at + bytes.len()).min(data.len());
            data.splice(at..end, bytes);
            // Either way; it must come back.
            let _ = text(format, data);
        }
    }
}
