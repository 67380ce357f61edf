#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use proptest::prelude::*;
use tiktoken_rs::cl100k_base_singleton;

use super::*;

/// Everything that is promised of every chunk of every text.
fn assert_promises(text: &str, lang: Option<&str>, max_tokens: usize, overlap_tokens: usize) {
    let chunks = Chunker::new(max_tokens, overlap_tokens).chunk(lang, text);
    let lines: Vec<&str> = text.split_inclusive('\n').collect();
    let mut covered = vec![false; lines.len()];
    let mut previous_end = 0;
    for chunk in &chunks {
        let (start, end) = (chunk.start_line as usize, chunk.end_line as usize);
        assert!(1 <= start && start <= end && end <= lines.len(), "{start}-{end} of {}", lines.len());
        let quoted: String = lines[start - 1..end].concat();
        let exact = quoted.strip_suffix('\n').unwrap_or(&quoted);
        let exact = exact.strip_suffix('\r').unwrap_or(exact);
        if start == end {
            assert!(exact.contains(chunk.text), "a piece of line {start} is not in it");
        } else {
            assert_eq!(chunk.text, exact, "lines {start}-{end} are not quoted exactly");
        }
        assert!(!chunk.text.trim().is_empty(), "a blank chunk");
        let tokens = cl100k_base_singleton().encode_ordinary(chunk.text).len();
        assert!(tokens <= max_tokens, "{tokens} tokens in lines {start}-{end}, at most {max_tokens} allowed");
        if start <= previous_end && start != end {
            let shared: String = lines[start - 1..previous_end].concat();
            let tokens = cl100k_base_singleton().encode_ordinary(&shared).len();
            assert!(tokens <= overlap_tokens, "lines {start}-{previous_end} are shared: {tokens} tokens");
        }
        covered[start - 1..end].fill(true);
        previous_end = end;
    }
    for (line, covered) in lines.iter().zip(&covered) {
        assert!(*covered || line.trim().is_empty(), "{line:?} is in no chunk");
    }
}

fn without_space(text: &str) -> String {
    text.split_whitespace().collect()
}

fn text_like() -> impl Strategy<Value = String> {
    let line = prop_oneof![
        Just(String::new()),
        Just("   ".to_owned()),
        "#{1,6} [A-Za-z ]{1,20}",
        "```[a-z]{0,4}",
        "[-*] [a-z ]{1,40}",
        " {0,12}(fn|class|def|struct) [a-z_]{1,10}\\(\\) \\{",
        " {0,12}[a-z_]{1,8} = [a-z0-9]{1,12};",
        " {0,8}\\}",
        "[=~-]{3,20}",
        "\\PC{0,80}",
        "([a-zäöü€汉字🙂]{1,9} ){0,60}",
        "[a-z]{0,700}",
    ];
    (prop::collection::vec(line, 0..60), any::<bool>(), any::<bool>()).prop_map(|(lines, windows, ended)| {
        let terminator = if windows { "\r\n" } else { "\n" };
        let mut text = lines.join(terminator);
        if ended {
            text.push_str(terminator);
        }
        text
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn chunks_keep_their_promises(
        text in text_like(),
        lang in prop::option::of(prop::sample::select(vec!["markdown", "rust", "text", "rst", "yaml"])),
        max_tokens in 32_usize..200,
        overlap in 0_usize..16,
    ) {
        assert_promises(&text, lang, max_tokens, overlap);
    }

    #[test]
    fn any_text_at_all_is_chunked(text in "\\PC{0,400}|[\\s\\S]{0,400}", lang in prop::option::of(Just("markdown"))) {
        assert_promises(&text, lang, 32, 8);
    }
}

#[test]
fn markdown_is_cut_at_headings_and_names_their_path() {
    let section = |title: &str| format!("{title}\n\n{}\n", "Some words about it. ".repeat(20));
    let text = [section("# Guide"), section("## Install"), section("### Linux"), section("## Use")].concat();
    let chunks = Chunker::new(160, 16).chunk(Some("markdown"), &text);
    let headings: Vec<_> = chunks.iter().map(|chunk| chunk.heading.clone().unwrap()).collect();
    assert_eq!(headings, ["Guide", "Guide › Install", "Guide › Install › Linux", "Guide › Use"]);
    assert!(chunks[1].text.starts_with("## Install\n"));
}

#[test]
fn a_hash_inside_a_code_block_is_no_heading() {
    let text = "# Real\n\n```sh\n# not a heading\nls\n```\n";
    let chunks = Chunker::new(100, 0).chunk(Some("markdown"), text);
    assert_eq!(chunks.len(), 1);
    assert_eq!(chunks[0].heading.as_deref(), Some("Real"));
}

#[test]
fn code_is_cut_between_definitions_and_names_them() {
    let function =
        |name: &str| format!("/// About {name}.\nfn {name}() {{\n{}}}\n\n", "    work();\n".repeat(12));
    let text = format!("{}{}{}", function("first"), function("second"), function("third"));
    let chunks = Chunker::new(80, 0).chunk(Some("rust"), &text);
    let headings: Vec<_> = chunks.iter().map(|chunk| chunk.heading.clone().unwrap()).collect();
    assert_eq!(headings, ["fn first", "fn second", "fn third"]);
    assert!(chunks[1].text.starts_with("/// About second.\n"), "the comment stays with its function");
}

#[test]
fn the_middle_of_a_long_function_knows_where_it_is() {
    let text =
        format!("impl Run {{\n    fn finish(self) {{\n{}    }}\n}}\n", "        step();\n".repeat(200));
    let chunks = Chunker::new(100, 0).chunk(Some("rust"), &text);
    assert!(chunks.len() > 3);
    assert_eq!(chunks[2].heading.as_deref(), Some("impl Run › fn finish"));
}

#[test]
fn an_overlong_line_is_cut_at_words_and_keeps_its_number() {
    let line = "alpha beta gamma delta. ".repeat(400);
    let text = format!("short\n\n{line}\n\nend\n");
    let chunks = Chunker::new(64, 8).chunk(None, &text);
    let of_the_line: Vec<_> = chunks.iter().filter(|chunk| chunk.start_line == 3).cloned().collect();
    assert!(of_the_line.len() > 10);
    assert!(of_the_line.iter().all(|chunk| chunk.end_line == 3 && line.contains(chunk.text)));
    let quoted: String = of_the_line.iter().map(|chunk| chunk.text).collect();
    assert!(without_space(&quoted) == without_space(&line), "something of the line is lost or doubled");
}

#[test]
fn a_megabyte_on_one_line_does_not_hang() {
    let text = "x".repeat(1 << 20);
    let chunks = Chunker::new(320, 32).chunk(Some("json"), &text);
    assert!(chunks.len() >= (1 << 20) / 320);
}

#[test]
fn an_empty_document_has_no_chunks() {
    for text in ["", "\n\n", "  \r\n\t\n"] {
        assert_eq!(Chunker::new(320, 32).chunk(Some("markdown"), text), []);
    }
}

#[test]
fn restructured_text_and_asciidoc_have_headings_too() {
    let rst = "Guide\n=====\n\nHello.\n\nInstall\n-------\n\nDo it.\n";
    let chunks = Chunker::new(100, 0).chunk(Some("rst"), rst);
    assert_eq!(chunks.last().unwrap().heading.as_deref(), Some("Guide"), "tiny sections share a chunk");
    let long = format!("= Guide\n\n{}\n\n== Install\n\n{}\n", "a b c ".repeat(20), "d e f ".repeat(20));
    let chunks = Chunker::new(64, 0).chunk(Some("asciidoc"), &long);
    assert_eq!(chunks.last().unwrap().heading.as_deref(), Some("Guide › Install"));
}
