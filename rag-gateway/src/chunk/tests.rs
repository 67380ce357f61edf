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
        let heading = chunk.heading.as_deref().unwrap_or_default();
        assert!(heading.chars().count() <= 1500, "a heading of {} bytes", heading.len());
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

/// Every language that has a structure of its own, and some that share one.
const LANGUAGES: &[&str] = &[
    "markdown",
    "text",
    "rst",
    "asciidoc",
    "pdf",
    "docx",
    "rust",
    "python",
    "javascript",
    "typescript",
    "go",
    "java",
    "kotlin",
    "scala",
    "c",
    "cpp",
    "csharp",
    "ruby",
    "php",
    "shell",
    "sql",
    "terraform",
    "yaml",
    "json",
    "toml",
    "ini",
    "xml",
    "html",
    "css",
    "csv",
    "dockerfile",
    "makefile",
    "swift",
    "lua",
    "jupyter",
    "unheard-of",
];

/// Pieces that mean something to one grammar or another, and much else besides.
fn code_like() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        prop::sample::select(vec![
            "fn f() {",
            "def f(x):",
            "class A {",
            "class A:",
            "impl<T> A for B {",
            "struct S;",
            "func (r *R) F() {",
            "public static void main(String[] a) {",
            "namespace n {",
            "module M",
            "end",
            "}",
            "})",
            "];",
            "{",
            "(",
            "[",
            "if x {",
            "for (;;) {",
            "while true; do",
            "done",
            "case $x in",
            "esac",
            "/* a comment",
            "*/",
            "// note",
            "# note",
            "\"\"\"",
            "'''",
            "`${",
            "r#\"",
            "<<EOF",
            "EOF",
            "<?php",
            "?>",
            "@Override",
            "#[test]",
            "#include <x.h>",
            "let x = 1;",
            "return y",
            "x = [1, 2, 3]",
            "template<typename T>",
            "=> {",
            "async function g() {",
            "type T = {",
            "interface I {",
            "fun f() = 1",
            "object O {",
            "CREATE TABLE t (",
            "resource \"a\" \"b\" {",
            "key:",
            "- item",
            "  nested:",
            "\"k\": {",
            "[section]",
            "= Title",
            "----",
            "====",
            "Title",
            "~~~~~",
            "\u{feff}",
            "\0",
            "\t",
        ])
        .prop_map(str::to_owned),
        "[ \t]{0,16}",
        "\\PC{0,40}",
        "[\\s\\S]{0,20}",
        "([a-zäö€汉🙂_]{1,9} ){0,30}",
        "[({\\[<]{1,60}",
    ];
    let separator = prop::sample::select(vec!["\n", "\n", "\n", "\r\n", "\n\n", " ", "\n    ", "\n\t\t"]);
    prop::collection::vec((piece, separator), 0..80)
        .prop_map(|pieces| pieces.into_iter().flat_map(|(piece, end)| [piece, end.to_owned()]).collect())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn every_language_keeps_the_promises_whatever_it_is_given(
        text in code_like(),
        lang in prop::sample::select(LANGUAGES),
        max_tokens in 32_usize..120,
        overlap in 0_usize..16,
    ) {
        assert_promises(&text, Some(lang), max_tokens, overlap);
    }
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

/// Headings and first lines of the chunks of a text.
fn outline(lang: &str, text: &str, max_tokens: usize) -> Vec<(String, String)> {
    let chunks = Chunker::new(max_tokens, 0).chunk(Some(lang), text);
    chunks
        .into_iter()
        .map(|chunk| {
            let first = chunk.text.lines().next().unwrap_or_default().trim().to_owned();
            (chunk.heading.unwrap_or_default(), first)
        })
        .collect()
}

/// A file in each language with a grammar, and in shell, as a template with two long bodies, what its lines are, and
/// the names that must be found.
const GRAMMARS: &[(&str, &str, [&str; 2], [&str; 2])] = &[
    (
        "python",
        "class Worker(Base):\n    \"\"\"Works.\"\"\"\n    def run(self):\nONE    @cached\n    async def stop(self):\nTWO",
        ["        self.step(1, 2)", "        self.wait(3)"],
        ["class Worker › def run", "class Worker › def stop"],
    ),
    (
        "javascript",
        "// Serves.\nexport class Api {\n  get(id) {\nONE  }\n}\nconst save = async (x) => {\nTWO};\n",
        ["    this.load(id, 1);", "  await put(x, 2);"],
        ["class Api", "const save"],
    ),
    (
        "typescript",
        "interface Shape {\nONE}\nexport function area(s: Shape): number {\nTWO}\n",
        ["  width: number;", "  s = grow(s, 1);"],
        ["interface Shape", "function area"],
    ),
    (
        "go",
        "package a\n\ntype Run struct {\nONE}\n\nfunc (r *Run) Finish(ctx context.Context) error {\nTWO}\n",
        ["\tField int", "\tr.step(ctx, 1)"],
        ["type Run", "func Finish"],
    ),
    (
        "java",
        "public class Shop {\n    public void open(int hour) {\nONE    }\n    private int close() {\nTWO    }\n}\n",
        ["        door.turn(hour, 1);", "        door.lock(2);"],
        ["class Shop › method open", "class Shop › method close"],
    ),
    (
        "kotlin",
        "class Shop {\n    fun open(hour: Int) {\nONE    }\n}\n\nfun close() {\nTWO}\n",
        ["        door.turn(hour, 1)", "    door.lock(2)"],
        ["class Shop", "fun close"],
    ),
    (
        "scala",
        "object Shop {\n  def open(hour: Int): Unit = {\nONE  }\n}\n\ntrait Door {\nTWO}\n",
        ["    door.turn(hour, 1)", "  def lock(): Unit"],
        ["object Shop", "trait Door"],
    ),
    (
        "c",
        "struct point {\nONE};\n\nstatic int *grow(int n) {\nTWO}\n",
        ["  int x;", "  n = step(n, 1);"],
        ["struct point", "function grow"],
    ),
    (
        "cpp",
        "namespace shop {\nclass Door {\nONE};\nvoid Door::lock(int n) {\nTWO}\n}\n",
        ["  int hinge;", "  turn(n, 1);"],
        ["class Door", "Door::lock"],
    ),
    (
        "csharp",
        "namespace Shop;\n\npublic class Door {\n    public void Lock(int n) {\nONE    }\n    public int Open() {\nTWO    }\n}\n",
        ["        Turn(n, 1);", "        Push(2);"],
        ["class Door", "class Door › method Open"],
    ),
    (
        "ruby",
        "class Door\n  def lock(n)\nONE  end\n\n  def open\nTWO  end\nend\n",
        ["    turn(n, 1)", "    push(2)"],
        ["class Door › def lock", "class Door › def open"],
    ),
    (
        "php",
        "<?php\nclass Door {\n    public function lock($n) {\nONE    }\n    function open() {\nTWO    }\n}\n",
        ["        $this->turn($n, 1);", "        $this->push(2);"],
        ["class Door › method lock", "class Door › method open"],
    ),
    (
        "shell",
        "set -eu\n\nlock() {\nONE}\n\nfunction open {\nTWO}\n",
        ["  turn \"$1\" 1", "  push 2"],
        ["function lock", "function open"],
    ),
];

#[test]
fn each_grammar_cuts_at_definitions_and_names_them() {
    for (lang, template, lines, names) in GRAMMARS {
        let body = |line: &str| format!("{line}\n").repeat(12);
        let text = template.replace("ONE", &body(lines[0])).replace("TWO", &body(lines[1]));
        let outline = outline(lang, &text, 110);
        for name in names {
            let found = outline.iter().any(|(heading, _)| heading.contains(name));
            assert!(found, "{lang}: no {name:?} in {outline:#?}");
        }
    }
}

#[test]
fn attributes_and_comments_stay_with_what_they_describe() {
    let function = |name: &str| {
        format!("/// About {name}.\n#[inline]\npub fn {name}() {{\n{}}}\n", "    work(1, 2);\n".repeat(12))
    };
    // No blank line anywhere: only the grammar knows where one ends.
    let text = ["first", "second", "third"].map(function).concat();
    let outline = outline("rust", &text, 110);
    let expected: Vec<(String, String)> =
        ["first", "second", "third"].map(|name| (format!("fn {name}"), format!("/// About {name}."))).into();
    assert_eq!(outline, expected);
}

#[test]
fn keywords_in_strings_and_comments_define_nothing() {
    let text = "/*\nfn not_this() {\n*/\nconst TEXT: &str = \"\nfn nor_this() {\n\";\nfn this() {}\n";
    let chunks = Chunker::new(320, 0).chunk(Some("rust"), text);
    assert_eq!(chunks[0].heading.as_deref(), Some("fn this"));
}

#[test]
fn what_no_grammar_can_read_is_cut_by_layout() {
    // Objective-C under a C name, a minified file, deep nesting: each in bounded work.
    let objc = "@implementation Door\n- (void)lock:(int)n {\n  [self turn:n];\n}\n@end\n".repeat(40);
    let minified = format!("function a(){{{}}}", "b(1);c(2);".repeat(20_000));
    let nested = format!("{}{}", "(".repeat(100_000), ")".repeat(100_000));
    let lines_of_nesting = "{\n".repeat(20_000);
    let keys = (0..3000).map(|depth| format!("{}k{depth}:\n", " ".repeat(depth)));
    let yaml = keys.collect::<Vec<_>>().concat();
    for (lang, text) in [
        ("c", objc.as_str()),
        ("javascript", &minified),
        ("javascript", &nested),
        ("rust", &lines_of_nesting),
        ("python", &"((((\n".repeat(5_000)),
        ("ruby", &"<<A\n".repeat(2_000)),
        ("yaml", &yaml),
    ] {
        assert_promises(text, Some(lang), 64, 8);
    }
}

/// Each of these ended the process, or may have.
#[test]
fn what_breaks_a_grammars_scanner_is_kept_from_it() {
    // A character beyond the table of `isdigit`, after a brace (tree-sitter-bash).
    for character in ['ā', '€', '漢', '🙂', '\u{e000}', '\u{f0000}', '\u{10ffff}'] {
        for text in [format!("echo {{{character}}}\n"), format!("echo {{1..{character}}}\n")] {
            assert_promises(&text.repeat(3), Some("shell"), 64, 8);
        }
    }
    // A here-document's word that is longer than its length can say (tree-sitter-ruby).
    for length in [100, 255, 256, 300, 1000, 5000] {
        for mark in ["<<", "<<~", "<<-\"", "<<'", "<<`"] {
            let quote = mark.trim_start_matches(['<', '~', '-']);
            let word = "w".repeat(length);
            let text = format!("a = {mark}{word}{quote}\n  b\n{word}\n").repeat(3);
            assert_promises(&text, Some("ruby"), 64, 8);
        }
    }
    // More indentation than its state has room for (tree-sitter-python, tree-sitter-scala).
    for depth in [200, 299, 301, 505, 511, 515, 2000] {
        let staircase = |line: &str| -> String {
            let lines = (0..depth).map(|level| format!("{}{line}\n", " ".repeat(level)));
            lines.collect::<Vec<_>>().concat()
        };
        let string = format!("{}\"\"\"text {{1}}\"\"\"\n", " ".repeat(depth));
        assert_promises(&(staircase("if x:") + &string), Some("python"), 64, 8);
        assert_promises(&(staircase("class A:") + "f" + &string), Some("python"), 64, 8);
        assert_promises(&(staircase("object A:") + &string), Some("scala"), 64, 8);
    }
    let continued = "if x:\n        \\\n".repeat(600);
    assert_promises(&continued, Some("python"), 64, 8);
}

#[test]
fn openapi_names_the_path_of_keys() {
    let operation = |path: &str| {
        format!(
            "  {path}:\n    get:\n      summary: Reads it\n      responses:\n        \"200\":\n          description: {}\n",
            "words ".repeat(30)
        )
    };
    let text = format!("openapi: 3.1.0\npaths:\n{}{}", operation("/pets"), operation("/pets/{id}"));
    let outline = outline("yaml", &text, 64);
    let named = outline.iter().any(|(heading, _)| heading.starts_with("paths › /pets/{id}"));
    assert!(named, "{outline:#?}");
}

#[test]
fn titles_of_both_markups_are_their_own() {
    let (one, two) = ("a b c ".repeat(20), "d e f ".repeat(20));
    let headings = |lang: &str, text: &str| -> Vec<String> {
        outline(lang, text, 64).into_iter().map(|(heading, _)| heading).collect()
    };
    let rst = headings(
        "rst",
        &format!("=====\nGuide\n=====\n\n{one}\n\nInstall\n=======\n\n{two}\n\n== no title ==\n"),
    );
    assert!(rst.contains(&"Guide › Install".to_owned()), "{rst:?}");
    let adoc = headings(
        "asciidoc",
        &format!("= Guide\n\n----\n\n== not a title\n\n----\n\n{one}\n\n=== Deep\n\n{two}\n"),
    );
    assert!(adoc.contains(&"Guide › Deep".to_owned()), "{adoc:?}");
    assert!(adoc.iter().all(|heading| !heading.contains("not a title")), "{adoc:?}");
}

#[test]
fn pages_of_a_pdf_are_named() {
    let pages = (1..=4).map(|n| format!("This is what page {n} says. {}\n", "word ".repeat(40)));
    let pages = pages.collect::<Vec<_>>().concat();
    let chunks = Chunker::new(64, 0).chunk(Some("pdf"), &pages);
    assert_eq!((chunks[2].start_line, chunks[2].end_line), (3, 3));
    assert_eq!(chunks[2].heading.as_deref(), Some("page 3"));
}

/// A notebook as Jupyter writes it.
fn notebook(cells: &[(&str, Vec<String>)]) -> String {
    let cells: Vec<serde_json::Value> = cells
        .iter()
        .map(|(kind, source)| {
            serde_json::json!({
                "cell_type": kind,
                "metadata": {"note": "beside source"},
                "outputs": [{"data": {"image/png": "iVBORw0KGgo".repeat(40)}, "text": ["printed by source\n"]}],
                "source": source,
            })
        })
        .collect();
    let notebook = serde_json::json!({"cells": cells, "metadata": {"name": "source"}, "nbformat": 4});
    serde_json::to_string_pretty(&notebook).unwrap() + "\n"
}

#[test]
fn a_notebook_is_its_cells_and_not_what_running_it_left() {
    let own = |lines: &[&str]| lines.iter().map(|line| format!("{line}\n")).collect::<Vec<_>>();
    let text = notebook(&[
        ("markdown", own(&["# Sales", "", "Where the \"orders\" come from."])),
        ("code", own(&["import pandas as pd"])),
        ("code", own(&[" ", ""])),
        ("markdown", own(&["## Café"])),
        ("code", own(&["def load(path):", "    # read it", "    return pd.read_csv(path)"])),
    ]);
    assert_promises_of_a_notebook(&text, 64);
    let chunks = Chunker::new(64, 16).chunk(Some("jupyter"), &text);
    let said: Vec<(String, String)> = chunks
        .iter()
        .map(|chunk| (chunk.heading.clone().unwrap_or_default(), said_in_notebook(chunk.text)))
        .collect();
    let expected = [
        ("Sales", "# Sales\n\nWhere the \"orders\" come from.\n"),
        ("Sales", "import pandas as pd\n"),
        ("Sales › Café", "## Café\n"),
        ("Sales › Café › def load", "def load(path):\n    # read it\n    return pd.read_csv(path)\n"),
    ];
    assert_eq!(said, expected.map(|(heading, text)| (heading.to_owned(), text.to_owned())));
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(chunks[1].text, lines[chunks[1].start_line as usize - 1], "a quote is a line of the file");
}

#[test]
fn what_is_no_notebook_or_on_one_line_is_cut_as_json() {
    let whole = notebook(&[("code", vec!["a = 1\n".to_owned()])]);
    let value: serde_json::Value = serde_json::from_str(&whole).unwrap();
    for text in [value.to_string(), whole.replace("cells", "sheets"), whole[..whole.len() / 2].to_owned()] {
        assert_promises(&text, Some("jupyter"), 64, 8);
        assert_eq!(
            Chunker::new(64, 8).chunk(Some("jupyter"), &text),
            Chunker::new(64, 8).chunk(Some("json"), &text)
        );
    }
}

#[test]
fn only_notebooks_are_cut_in_another_way_than_before() {
    let chunker = Chunker::new(320, 32);
    assert_eq!(chunker.fingerprint("src/a.rs"), "2.320.32");
    assert_eq!(chunker.fingerprint("a/b.ipynb"), "2n.320.32");
}

/// Chunks are lines of the cells' sources, all of them, and of one cell each.
fn assert_promises_of_a_notebook(text: &str, max_tokens: usize) {
    let chunks = Chunker::new(max_tokens, 0).chunk(Some("jupyter"), text);
    let lines: Vec<&str> = text.lines().collect();
    let mut quoted = vec![false; lines.len()];
    for chunk in &chunks {
        let (start, end) = (chunk.start_line as usize, chunk.end_line as usize);
        let exact = lines[start - 1..end].join("\n");
        assert!(chunk.text == exact || (start == end && exact.contains(chunk.text)), "{}", chunk.text);
        assert!(cl100k_base_singleton().encode_ordinary(chunk.text).len() <= max_tokens);
        quoted[start - 1..end].fill(true);
    }
    let mut in_source = false;
    for (line, quoted) in lines.iter().zip(quoted) {
        if line.trim() == "]" || line.trim() == "]," {
            in_source = false;
        }
        let says = serde_json::from_str::<String>(line.trim().trim_end_matches(','));
        match says {
            Ok(says) if in_source => assert!(quoted || says.trim().is_empty(), "{line} is in no chunk"),
            _ => assert!(!quoted, "{line} is quoted"),
        }
        in_source |= line.trim() == "\"source\": [";
    }
}

proptest! {
    #[test]
    fn quotes_from_notebooks_are_lines_of_cells(
        cells in prop::collection::vec(
            (
                prop::sample::select(vec!["code", "markdown", "raw"]),
                prop::collection::vec("(#{1,3} )?(\\PC|[a-z\"\\\\ ]){0,60}", 0..12),
            ),
            1..8,
        ),
        max in 16_usize..128,
    ) {
        let cells: Vec<(&str, Vec<String>)> = cells
            .into_iter()
            .map(|(kind, lines)| (kind, lines.into_iter().map(|line| line + "\n").collect()))
            .collect();
        let text = notebook(&cells);
        if cells.iter().any(|(_, lines)| !lines.is_empty()) {
            assert_promises_of_a_notebook(&text, max);
        }
    }

    #[test]
    fn whatever_says_it_is_a_notebook_is_cut(
        parts in prop::collection::vec(
            prop::sample::select(vec![
                "{", "}", "[", "]", ",", ":", "\n", "\"cells\"", "\"source\"", "\"cell_type\"", "\"code\"", "\"a\\n\"",
                "\"", "\\", "1", "é",
            ]),
            0..60,
        ),
    ) {
        let text = parts.concat();
        for chunk in Chunker::new(32, 4).chunk(Some("jupyter"), &text) {
            prop_assert!(text.contains(chunk.text));
            said_in_notebook(chunk.text);
        }
    }
}
