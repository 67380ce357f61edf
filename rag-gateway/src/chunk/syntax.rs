//! Source code, by its grammar (tree-sitter): where statements and definitions begin, and their names.
//!
//! A file is cut before definitions, then between the statements of a long one; comments and
//! attributes stay with what they stand above. What a grammar cannot make sense of in bounded work
//! (other languages under a known name, minified code, garbage) goes to [`super::code`], which looks
//! at the layout only. The bounds count steps, not time: equal texts give equal chunks on any machine.
//!
//! Grammars bring scanners written in C, and the texts are anybody's. What was found to break one is
//! kept from it by [`fits`].

use std::{collections::HashSet, ops::ControlFlow};

use tree_sitter::{Language, Node, ParseOptions, Parser, Tree};

use super::{Definition, FIRST_BLOCK_LEVEL, Level, Structure, lines::Lines, path_of};

/// Larger texts are data: grammars take ten times their size in memory.
const MAX_BYTES: usize = 2 * 1024 * 1024;

/// Lines longer than this on average are written by machines, and say nothing about structure.
const MAX_AVERAGE_LINE: usize = 400;

/// Progress calls of the parser (one in some hundred steps) for each KiB of text, and at least.
/// Ordinary code needs about ten a KiB; recovery from errors in garbage can need any number.
const CALLS_PER_KIB: usize = 200;
const MIN_CALLS: usize = 2000;

/// Different indentations of a file that is parsed: see [`fits`].
const MAX_INDENTATIONS: usize = 300;

/// Longest word of a here-document in a file that is parsed, in bytes: see [`fits`].
const MAX_WORD: usize = 120;

/// Nesting beyond this makes no difference.
const DEEPEST: usize = 10;

/// A definition, or a statement after a blank line: the shallower, the better.
const FIRST: Level = FIRST_BLOCK_LEVEL + 1;

/// A statement in the middle of others; chunks that begin here may overlap.
const STATEMENT: Level = FIRST + 31;

/// Any line after a blank one, in long comments and strings.
const AFTER_BLANK: Level = 120;

/// Any other line that closes nothing.
const ANY: Level = 160;

/// Longest name that is shown.
const MAX_NAME_CHARS: usize = 80;

/// The structure of source code; `None` where there is no grammar, or it does not fit the text.
pub(super) fn structure(lines: &Lines<'_>, lang: &str) -> Option<Structure> {
    let text = lines.text();
    if text.len() > MAX_BYTES
        || text.len() > MAX_AVERAGE_LINE.saturating_mul(lines.len())
        || !fits(lines, lang)
    {
        return None;
    }
    let (grammar, tree) = best_tree(lang, text)?;
    let mut reading = Reading::new(lines, &grammar);
    reading.read(&tree);
    Some(reading.structure)
}

/// The tree of the grammar that understands most of the text, the first one of equals; `None` where none
/// understands half of it.
fn best_tree(lang: &str, text: &str) -> Option<(Language, Tree)> {
    let mut best: Option<(usize, Language, Tree)> = None;
    for grammar in grammars(lang) {
        let Some(tree) = parse(&grammar, text) else { continue };
        let unreadable = unreadable_bytes(&tree);
        if best.as_ref().is_none_or(|(least, ..)| unreadable < *least) {
            best = Some((unreadable, grammar, tree));
        }
        if unreadable == 0 {
            break;
        }
    }
    let (_, grammar, tree) = best.filter(|(unreadable, ..)| *unreadable <= text.len() / 2)?;
    Some((grammar, tree))
}

/// The grammars of a language; the one that understands more of a text wins.
fn grammars(lang: &str) -> Vec<Language> {
    match lang {
        "rust" => vec![tree_sitter_rust::LANGUAGE.into()],
        "python" => vec![tree_sitter_python::LANGUAGE.into()],
        "javascript" => vec![tree_sitter_javascript::LANGUAGE.into()],
        "typescript" => vec![
            tree_sitter_typescript::LANGUAGE_TYPESCRIPT.into(),
            tree_sitter_typescript::LANGUAGE_TSX.into(),
        ],
        "go" => vec![tree_sitter_go::LANGUAGE.into()],
        "java" => vec![tree_sitter_java::LANGUAGE.into()],
        "kotlin" => vec![tree_sitter_kotlin_ng::LANGUAGE.into()],
        "scala" => vec![tree_sitter_scala::LANGUAGE.into()],
        // A `.h` may be either.
        "c" => vec![tree_sitter_c::LANGUAGE.into(), tree_sitter_cpp::LANGUAGE.into()],
        "cpp" => vec![tree_sitter_cpp::LANGUAGE.into()],
        "csharp" => vec![tree_sitter_c_sharp::LANGUAGE.into()],
        "ruby" => vec![tree_sitter_ruby::LANGUAGE.into()],
        "php" => vec![tree_sitter_php::LANGUAGE_PHP.into()],
        // Not `shell`: tree-sitter-bash 0.25 reads outside of its memory when a character beyond U+00FF
        // stands after `{`, which ends the process (its scanner gives any character to `isdigit`).
        _ => Vec::new(),
    }
}

/// False for texts that a scanner cannot keep its state of: it has 1 KiB for it, and ends the process, or
/// writes beyond it, when that is not enough.
fn fits(lines: &Lines<'_>, lang: &str) -> bool {
    match lang {
        // Two bytes a level of indentation (tree-sitter-python 0.25).
        "python" => {
            let mut widths = HashSet::new();
            let mut continued = 0;
            for line in 0..lines.len() {
                let text = lines.raw(line);
                let rest = text.trim_start();
                widths.insert(&text[..text.len() - rest.len()]);
                // What such a line is indented by counts for the next one too.
                continued += usize::from(rest.trim_end() == "\\");
            }
            widths.len() + continued <= MAX_INDENTATIONS
        }
        // The length of a here-document's word in one byte (tree-sitter-ruby 0.23).
        "ruby" => {
            let text = lines.text();
            text.match_indices("<<").all(|(at, mark)| {
                let word = text[at + mark.len()..].trim_start_matches(['~', '-']);
                if word.len() <= MAX_WORD {
                    return true;
                }
                match word.chars().next() {
                    Some(quote @ ('"' | '\'' | '`')) => {
                        word.bytes().skip(1).take(MAX_WORD).any(|byte| byte == quote as u8)
                    }
                    _ => word
                        .bytes()
                        .take(MAX_WORD)
                        .any(|byte| !(byte.is_ascii_alphanumeric() || byte == b'_' || byte >= 0x80)),
                }
            })
        }
        _ => true,
    }
}

/// Parses in bounded work.
fn parse(grammar: &Language, text: &str) -> Option<Tree> {
    let mut parser = Parser::new();
    parser.set_language(grammar).ok()?;
    let mut left = MIN_CALLS + CALLS_PER_KIB * (text.len() / 1024);
    let mut progress = |_: &_| {
        left = left.saturating_sub(1);
        if left == 0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    let options = ParseOptions::new().progress_callback(&mut progress);
    let bytes = text.as_bytes();
    let mut read = |offset: usize, _| bytes.get(offset..).unwrap_or_default();
    parser.parse_with_options(&mut read, None, Some(options))
}

/// Bytes that the grammar could not read.
fn unreadable_bytes(tree: &Tree) -> usize {
    if !tree.root_node().has_error() {
        return 0;
    }
    let mut cursor = tree.walk();
    let mut bytes = 0;
    loop {
        let node = cursor.node();
        if node.is_error() {
            bytes += node.byte_range().len();
        } else if node.has_error() && cursor.goto_first_child() {
            continue;
        }
        while !cursor.goto_next_sibling() {
            if !cursor.goto_parent() {
                return bytes;
            }
        }
    }
}

/// A definition around the node that is read.
struct Open {
    /// Its depth in the tree.
    at: u32,
    /// Last line of it.
    end: usize,
    name: String,
}

/// What a kind of node can be, by its number: names are compared once a file and not once a node.
#[derive(Clone, Copy, Default)]
struct Kind {
    /// Of what nodes of this kind may define.
    label: Option<Label>,
    /// See [`is_decoration`].
    decorates: bool,
}

struct Reading<'a, 't> {
    lines: &'a Lines<'t>,
    kinds: Vec<Kind>,
    structure: Structure,
    /// Definitions around the current node, outermost first.
    open: Vec<Open>,
    /// Nodes around the current one that begin a line: their depth in the tree.
    blocks: Vec<u32>,
    /// The last line of a comment or attribute that stands alone on its lines.
    decoration_ends: Option<usize>,
    /// The last line that was looked at, by its outermost node.
    last_line: Option<usize>,
}

impl<'a, 't> Reading<'a, 't> {
    fn new(lines: &'a Lines<'t>, grammar: &Language) -> Self {
        let kinds = (0..u16::try_from(grammar.node_kind_count()).unwrap_or(u16::MAX)).map(|id| {
            let kind = grammar.node_kind_for_id(id).unwrap_or_default();
            Kind { label: label(kind), decorates: is_decoration(kind) }
        });
        let mut structure = Structure::flat(lines.len());
        for line in 0..lines.len() {
            let text = lines.line(line).trim_start();
            if text.is_empty() || text.starts_with(['}', ')', ']']) || text.trim_end_matches(';') == "end" {
                continue;
            }
            let after_blank = line == 0 || lines.is_blank(line - 1);
            structure.offer(line, if after_blank { AFTER_BLANK } else { ANY });
        }
        Self {
            lines,
            kinds: kinds.collect(),
            structure,
            open: Vec::new(),
            blocks: Vec::new(),
            decoration_ends: None,
            last_line: None,
        }
    }

    /// Visits every node once, parents first, without recursion: nesting may be of any depth.
    fn read(&mut self, tree: &Tree) {
        let mut cursor = tree.walk();
        let mut depth: u32 = 0;
        loop {
            self.visit(cursor.node(), depth);
            if cursor.goto_first_child() {
                depth += 1;
                continue;
            }
            while !cursor.goto_next_sibling() {
                if !cursor.goto_parent() {
                    self.close(0);
                    return;
                }
                depth -= 1;
            }
        }
    }

    fn visit(&mut self, node: Node<'_>, depth: u32) {
        self.close(depth);
        if depth == 0 || !node.is_named() {
            return;
        }
        let start = node.start_position();
        let line = start.row;
        // A kind that is not in the table is no definition either: an error.
        let kind = self.kinds.get(usize::from(node.kind_id())).copied().unwrap_or_default();
        let name = kind.label.and_then(|label| definition(label, node, self.lines.text()));
        let begins_line = self.last_line != Some(line)
            && line < self.lines.len()
            && self
                .lines
                .raw(line)
                .as_bytes()
                .get(..start.column)
                .is_some_and(|before| before.trim_ascii().is_empty());
        if begins_line {
            self.last_line = Some(line);
            self.offer(node, line, kind, name.is_some());
        }
        if let Some(name) = name {
            let nesting = self.open.len();
            self.structure.definitions.push(Definition { line, indent: nesting, name: name.clone() });
            self.open.push(Open { at: depth, end: last_line(node), name });
            self.name_lines(line + 1);
        }
        if begins_line {
            self.blocks.push(depth);
        }
    }

    /// Says how good a place the first line of this node is.
    fn offer(&mut self, node: Node<'_>, line: usize, kind: Kind, defines: bool) {
        let decorated = self.decoration_ends.is_some_and(|end| end + 1 == line);
        self.decoration_ends = kind.decorates.then(|| last_line(node));
        if decorated {
            // What describes it is a better beginning.
            self.structure.levels[line] = Level::MAX;
            return;
        }
        let steps = 2 * Level::try_from(self.blocks.len().min(DEEPEST)).unwrap_or(Level::MAX);
        let after_blank = line == 0 || self.lines.is_blank(line - 1);
        let level = if after_blank {
            FIRST + steps
        } else if defines || kind.decorates || self.blocks.is_empty() {
            FIRST + steps + 1
        } else {
            STATEMENT + steps
        };
        self.structure.offer(line, level);
    }

    /// Leaves what is not around a node of this depth.
    fn close(&mut self, depth: u32) {
        while self.blocks.last().is_some_and(|block| *block >= depth) {
            self.blocks.pop();
        }
        while self.open.last().is_some_and(|open| open.at >= depth)
            && let Some(closed) = self.open.pop()
        {
            self.name_lines(closed.end + 1);
        }
    }

    /// From this line on, lines stand under what is open now.
    fn name_lines(&mut self, from: usize) {
        let path = if self.open.is_empty() {
            None
        } else {
            let names: Vec<&str> = self.open.iter().map(|open| open.name.as_str()).collect();
            self.structure.headings.push(path_of(&names));
            Some(self.structure.headings.len() - 1)
        };
        let end = self.open.last().map_or(self.lines.len(), |open| open.end + 1);
        if let Some(lines) = self.structure.heading_of.get_mut(from..end.max(from).min(self.lines.len())) {
            lines.fill(path);
        }
    }
}

/// The last line that holds some of this node: an end in column 0 is the end of the line before.
fn last_line(node: Node<'_>) -> usize {
    let end = node.end_position();
    let row = if end.column == 0 { end.row.saturating_sub(1) } else { end.row };
    row.max(node.start_position().row)
}

/// Comments, attributes and the like: they belong to what follows on the next line.
fn is_decoration(kind: &str) -> bool {
    kind.contains("comment")
        || matches!(
            kind,
            "attribute_item"
                | "decorator"
                | "annotation"
                | "marker_annotation"
                | "attribute_list"
                | "modifiers"
        )
}

/// How a definition is called where it is shown: the `fn` of `fn finish`.
#[derive(Clone, Copy)]
enum Label {
    Always(&'static str),
    /// Where one kind of node stands for several things, or not always for a definition.
    ByNode(fn(Node<'_>) -> Option<&'static str>),
    /// `impl Store for Memory`.
    Implementation,
}

/// The label of what nodes of this kind define; `None` of the kinds that define nothing.
fn label(kind: &str) -> Option<Label> {
    use Label::{Always, ByNode, Implementation};
    Some(match kind {
        "function_item" | "function_signature_item" => Always("fn"),
        "struct_item" | "struct_declaration" => Always("struct"),
        "struct_specifier" => ByNode(|node| has(node, "body").then_some("struct")),
        "enum_item" | "enum_declaration" | "enum_definition" => Always("enum"),
        "enum_specifier" => ByNode(|node| has(node, "body").then_some("enum")),
        "union_item" => Always("union"),
        "union_specifier" => ByNode(|node| has(node, "body").then_some("union")),
        "trait_item" | "trait_definition" | "trait_declaration" => Always("trait"),
        "mod_item" => Always("mod"),
        "macro_definition" => Always("macro"),
        "type_item" | "type_spec" | "type_alias_declaration" | "type_definition" => Always("type"),
        "impl_item" => Implementation,
        // Go has methods of this kind, Java and C# too.
        "method_declaration" => ByNode(|node| Some(if has(node, "receiver") { "func" } else { "method" })),
        "method_definition" | "compact_constructor_declaration" => Always("method"),
        "constructor_declaration" => Always("constructor"),
        "function_declaration" => ByNode(|node| {
            Some(match node.child(0).map(|word| word.kind()) {
                Some("func") => "func",
                Some("def") => "def",
                Some("fun" | "modifiers") => "fun",
                _ => "function",
            })
        }),
        "generator_function_declaration" => Always("function"),
        "function_definition" => ByNode(|node| {
            Some(match node.child(0).map(|word| word.kind()) {
                // `async def` too; Scala puts modifiers first.
                Some("def" | "async" | "modifiers") => "def",
                _ => "function",
            })
        }),
        "method" | "singleton_method" => Always("def"),
        "class_definition" | "class_declaration" | "abstract_class_declaration" | "class" => Always("class"),
        "class_specifier" => ByNode(|node| has(node, "body").then_some("class")),
        "module" => Always("module"),
        "interface_declaration" => Always("interface"),
        "annotation_type_declaration" => Always("@interface"),
        "record_declaration" => Always("record"),
        "object_definition" | "object_declaration" => Always("object"),
        "given_definition" => Always("given"),
        "namespace_definition"
        | "namespace_declaration"
        | "file_scoped_namespace_declaration"
        | "internal_module" => Always("namespace"),
        "property_declaration" => ByNode(|node| has(node, "accessors").then_some("property")),
        "delegate_declaration" => Always("delegate"),
        "variable_declarator" => ByNode(|node| {
            let value = node.child_by_field_name("value")?.kind();
            matches!(value, "arrow_function" | "function_expression" | "class" | "generator_function")
                .then_some("const")
        }),
        _ => return None,
    })
}

/// Whether a node has this field. A type of C that has no `body` is only named (`struct point p;`).
fn has(node: Node<'_>, field: &str) -> bool {
    node.child_by_field_name(field).is_some()
}

/// What a node defines, such as `fn finish`.
fn definition(label: Label, node: Node<'_>, text: &str) -> Option<String> {
    let label = match label {
        Label::Always(label) => label,
        Label::ByNode(label) => label(node)?,
        Label::Implementation => return implementation(node, text),
    };
    Some(format!("{label} {}", name(node, text)?))
}

fn name(node: Node<'_>, text: &str) -> Option<String> {
    // C and C++ hide the name inside declarators: `int *(*f(int))[3] {`.
    let mut at = node;
    for _ in 0..16 {
        if at.kind() == "qualified_identifier" {
            // `Door::lock`, scope and all.
            return shown(at, text);
        }
        if let Some(name) = at.child_by_field_name("name") {
            return shown(name, text);
        }
        match at.child_by_field_name("declarator") {
            Some(inner) => at = inner,
            None if at.id() == node.id() => return None,
            None => return shown(at, text),
        }
    }
    None
}

/// `impl Store for Memory`.
fn implementation(node: Node<'_>, text: &str) -> Option<String> {
    let of = shown(node.child_by_field_name("type")?, text)?;
    match node.child_by_field_name("trait").and_then(|of| shown(of, text)) {
        Some(what) => Some(format!("impl {what} for {of}")),
        None => Some(format!("impl {of}")),
    }
}

/// The text of a node on one line; `None` when there is none.
fn shown(node: Node<'_>, text: &str) -> Option<String> {
    let text = text.get(node.byte_range())?;
    let words: Vec<&str> = text.split_whitespace().collect();
    let name: String =
        words.join(" ").chars().filter(|character| !character.is_control()).take(MAX_NAME_CHARS).collect();
    (!name.is_empty()).then_some(name)
}
