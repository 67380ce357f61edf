//! Source code and data without a grammar, by layout: blank lines and indentation say where things begin,
//! keywords (or, in data, keys) what they are called.
//!
//! Comments and attributes stay with what they describe, because no blank line is between them.

use super::{Definition, FIRST_BLOCK_LEVEL, Level, Structure, lines::Lines, path_of, short};

/// Indentation beyond this many steps makes no difference.
const DEEPEST: usize = 10;

/// After a blank line: the shallower, the better.
const AFTER_BLANK: Level = FIRST_BLOCK_LEVEL + 1;

/// In the middle of a block: any line after a blank one is better.
const INSIDE: Level = AFTER_BLANK + 40;

pub(super) fn structure(lines: &Lines<'_>, lang: &str) -> Structure {
    let mut structure = Structure::flat(lines.len());
    // Enclosing definitions: indentation and index into `headings`.
    let mut stack: Vec<(usize, String)> = Vec::new();
    let mut path: Option<usize> = None;
    let mut after_blank = true;
    for line in 0..lines.len() {
        if lines.is_blank(line) {
            after_blank = true;
            structure.heading_of[line] = path;
            continue;
        }
        let text = lines.line(line);
        let indent = indentation(text);
        let steps = Level::try_from((indent / 2).min(DEEPEST)).unwrap_or(Level::MAX);
        let trimmed = text.trim_start();
        let closes = trimmed.starts_with(['}', ')', ']']) || trimmed.trim_end_matches([';', ',']) == "end";
        match (after_blank, closes) {
            (_, true) => {}
            (true, false) => structure.offer(line, AFTER_BLANK + steps),
            (false, false) => structure.offer(line, INSIDE + steps),
        }
        after_blank = false;

        let depth_before = stack.len();
        if !closes {
            while stack.last().is_some_and(|(above, _)| *above >= indent) {
                stack.pop();
            }
        }
        let definition = match lang {
            "yaml" => yaml_key(trimmed),
            "json" => json_key(trimmed),
            "toml" | "ini" => section(trimmed),
            "xml" | "html" | "css" | "csv" | "dockerfile" | "makefile" => None,
            "shell" => shell_function(trimmed),
            _ => definition(trimmed),
        };
        if stack.len() != depth_before {
            path = remember(&mut structure, &stack);
        }
        structure.heading_of[line] = path;
        if let Some(name) = definition {
            structure.definitions.push(Definition { line, indent, name: name.clone() });
            stack.push((indent, name));
            path = remember(&mut structure, &stack);
        }
    }
    structure
}

fn remember(structure: &mut Structure, stack: &[(usize, String)]) -> Option<usize> {
    if stack.is_empty() {
        return None;
    }
    let names: Vec<&str> = stack.iter().map(|(_, name)| name.as_str()).collect();
    structure.headings.push(path_of(&names));
    Some(structure.headings.len() - 1)
}

fn indentation(line: &str) -> usize {
    line.chars()
        .map_while(|character| match character {
            ' ' => Some(1),
            '\t' => Some(4),
            _ => None,
        })
        .sum()
}

/// The key of a YAML mapping or list that begins on the next line: `/pets:`, `"200":`, `steps: # three`.
fn yaml_key(line: &str) -> Option<String> {
    if line.starts_with(['#', '-', '{', '[']) {
        return None;
    }
    let (key, value) = match line.trim_end().strip_suffix(':') {
        Some(key) => (key, ""),
        None => line.split_once(": ")?,
    };
    let nested = value.trim_start().is_empty() || value.trim_start().starts_with(['#', '&', '|', '>', '!']);
    named_key(key).filter(|_| nested)
}

/// The key of a JSON object or array that goes on in the next line: `"paths": {`.
fn json_key(line: &str) -> Option<String> {
    let line = line.trim_end();
    let (key, _) = line.strip_suffix(['{', '['])?.trim_end().strip_suffix(':')?.rsplit_once('"')?;
    named_key(key.strip_prefix('"')?)
}

/// The section of a TOML or INI file: `[profile.dev]`.
fn section(line: &str) -> Option<String> {
    let line = line.split(['#', ';']).next().unwrap_or_default().trim_end();
    let name = line.strip_prefix('[')?.strip_suffix(']')?;
    named_key(name.trim_start_matches('[').trim_end_matches(']'))
}

/// A shell function: `lock() {`, `function lock {`.
fn shell_function(line: &str) -> Option<String> {
    let named = line.strip_prefix("function ").map(str::trim_start);
    let rest = named.unwrap_or(line);
    let end = rest
        .find(|c: char| !(c.is_alphanumeric() || matches!(c, '_' | '-' | '.' | ':')))
        .unwrap_or(rest.len());
    let (name, after) = rest.split_at(end);
    let calls = after.trim_start().strip_prefix('(').is_some_and(|after| after.trim_start().starts_with(')'));
    (!name.is_empty() && (calls || named.is_some())).then(|| format!("function {}", short(name)))
}

fn named_key(key: &str) -> Option<String> {
    let key = key.trim().trim_matches(['"', '\'']);
    (!key.is_empty() && !key.chars().any(char::is_control)).then(|| short(key))
}

/// Words that may come before the keyword.
const MODIFIERS: &[&str] = &[
    "pub",
    "async",
    "unsafe",
    "default",
    "export",
    "public",
    "private",
    "protected",
    "internal",
    "static",
    "abstract",
    "final",
    "override",
    "inline",
    "virtual",
    "suspend",
    "open",
    "data",
    "sealed",
    "declare",
    "extern",
    "partial",
    "local",
    "const",
    "or",
    "replace",
    "create",
    "temporary",
    "unique",
    "readonly",
];

/// Words that define something, and how the definition is called.
const KEYWORDS: &[(&str, &str)] = &[
    ("fn", "fn"),
    ("func", "func"),
    ("fun", "fun"),
    ("function", "function"),
    ("def", "def"),
    ("class", "class"),
    ("struct", "struct"),
    ("enum", "enum"),
    ("union", "union"),
    ("trait", "trait"),
    ("impl", "impl"),
    ("interface", "interface"),
    ("protocol", "protocol"),
    ("record", "record"),
    ("object", "object"),
    ("type", "type"),
    ("mod", "mod"),
    ("module", "module"),
    ("namespace", "namespace"),
    ("macro_rules!", "macro"),
    ("resource", "resource"),
    ("variable", "variable"),
    ("message", "message"),
    ("service", "service"),
    ("rpc", "rpc"),
    ("table", "table"),
    ("view", "view"),
    ("trigger", "trigger"),
    ("policy", "policy"),
    ("procedure", "procedure"),
    ("index", "index"),
];

/// The name of what this line defines, such as `fn finish`.
fn definition(line: &str) -> Option<String> {
    let mut rest = line;
    for _ in 0..6 {
        let word_end =
            rest.find(|c: char| !(c.is_alphanumeric() || c == '_' || c == '!')).unwrap_or(rest.len());
        let word = &rest[..word_end];
        let after = &rest[word_end..];
        let lower = word.to_ascii_lowercase();
        if let Some((_, label)) = KEYWORDS.iter().find(|(keyword, _)| *keyword == lower) {
            return name_of(label, after);
        }
        if !MODIFIERS.contains(&lower.as_str()) {
            return None;
        }
        // `pub(crate)`, `extern "C"`.
        let after =
            after.strip_prefix('(').and_then(|inner| inner.split_once(')')).map_or(after, |(_, after)| after);
        let after = after.trim_start();
        rest =
            after.strip_prefix('"').and_then(|inner| inner.split_once('"')).map_or(after, |(_, after)| after);
        rest = rest.trim_start();
    }
    None
}

fn name_of(label: &str, after: &str) -> Option<String> {
    if !after.starts_with([' ', '\t', '<']) {
        return None;
    }
    let after = after.trim_start();
    if label == "impl" || label == "resource" || label == "variable" {
        let end = after.find(['{', ';']).unwrap_or(after.len());
        let name: String = after[..end].trim().chars().filter(|c| *c != '"').take(80).collect();
        return (!name.is_empty()).then(|| format!("{label} {name}"));
    }
    // A Go method: `func (r *Run) Finish(`.
    let after = match after.strip_prefix('(').and_then(|inner| inner.split_once(')')) {
        Some((_, name)) if label == "func" => name.trim_start(),
        _ => after,
    };
    let after = strip_ignoring_case(after, "if not exists").unwrap_or(after).trim_start();
    let end = after
        .find(|c: char| !(c.is_alphanumeric() || matches!(c, '_' | '.' | ':' | '$' | '-')))
        .unwrap_or(after.len());
    let name = after[..end].trim_end_matches([':', '-', '.']);
    (name.chars().next().is_some_and(|c| c.is_alphabetic() || c == '_' || c == '$'))
        .then(|| format!("{label} {name}"))
}

fn strip_ignoring_case<'t>(text: &'t str, prefix: &str) -> Option<&'t str> {
    let (head, tail) = text.split_at_checked(prefix.len())?;
    head.eq_ignore_ascii_case(prefix).then_some(tail)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_of_data_are_named_where_something_is_below_them() {
        for (line, expected) in [
            ("paths:", Some("paths")),
            ("\"/pets/{id}\":", Some("/pets/{id}")),
            ("run: |", Some("run")),
            ("base: &base", Some("base")),
            ("image: redis:7", None),
            ("- name: x", None),
            ("# a comment:", None),
            ("http://example.org", None),
        ] {
            assert_eq!(yaml_key(line).as_deref(), expected, "{line}");
        }
        assert_eq!(json_key("\"paths\": {").as_deref(), Some("paths"));
        assert_eq!(json_key("\"/pets\" : [").as_deref(), Some("/pets"));
        assert_eq!(json_key("\"a\": 1,"), None);
        assert_eq!(json_key("{"), None);
        assert_eq!(section("[profile.dev] # comment").as_deref(), Some("profile.dev"));
        assert_eq!(section("[[bin]]").as_deref(), Some("bin"));
        assert_eq!(section("key = [1]"), None);
    }

    #[test]
    fn shell_functions_are_named() {
        for (line, expected) in [
            ("lock() {", Some("function lock")),
            ("my-lock ( )", Some("function my-lock")),
            ("function open {", Some("function open")),
            ("function open() {", Some("function open")),
            ("lock (a)", None),
            ("() {", None),
            ("type ls", None),
            ("echo lock", None),
            ("functional=1", None),
        ] {
            assert_eq!(shell_function(line).as_deref(), expected, "{line}");
        }
    }

    #[test]
    fn definitions_of_many_languages_are_named() {
        for (line, expected) in [
            ("pub(crate) async fn finish(self) {", Some("fn finish")),
            ("impl<T> Index for Edge<T> {", Some("impl <T> Index for Edge<T>")),
            ("extern \"C\" fn raw() {}", Some("fn raw")),
            ("export default function App() {", Some("function App")),
            ("func (r *Run) Finish(ctx context.Context) error {", Some("func Finish")),
            ("class Worker(Base):", Some("class Worker")),
            ("CREATE OR REPLACE FUNCTION public.claim_run(", Some("function public.claim_run")),
            ("create table if not exists runs (", Some("table runs")),
            ("resource \"aws_s3_bucket\" \"logs\" {", Some("resource aws_s3_bucket logs")),
            ("let fname = 3;", None),
            ("function() {", None),
            ("return type;", None),
            ("# type of thing", None),
        ] {
            assert_eq!(definition(line).as_deref(), expected, "{line}");
        }
    }
}
