//! Checks Mermaid sources before a reader's browser has to.
//!
//! Only the subset that the prompt asks for: flowcharts, sequence diagrams and state diagrams. The
//! check is stricter than Mermaid: what passes renders, what does not pass may render and is asked
//! for again. Nothing that could carry HTML, links or scripts passes.

use std::collections::{HashMap, HashSet};

use super::{clean, read};

const MAX_LINES: usize = 200;
const MAX_BYTES: usize = 10_000;
const MAX_LABEL_CHARS: usize = 160;
/// A text of this length that ends in our mark was cut: a sequence may end in one of its own, and a cut one has
/// lost its styles.
const NEARLY_ALL_CHARS: usize = read::MAX_TEXT_CHARS * 9 / 10;

/// Why a diagram is outside the subset; it may render all the same.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {message}")]
pub struct MermaidError {
    /// Counted from 1.
    pub line: usize,
    /// What is wrong, and what to write instead.
    pub message: String,
}

/// Takes off what does no good and no harm: a Markdown fence, comments, styles, line-break tags.
pub(super) fn tidy(source: &str) -> String {
    let text = clean::text(source);
    let mut lines: Vec<String> = Vec::new();
    for line in text.lines() {
        let line = line.trim_end().replace('\t', "    ");
        let start = line.trim_start();
        let word = start.split_whitespace().next().unwrap_or_default();
        if start.starts_with("```")
            || start.starts_with("%%")
            || matches!(
                word,
                "style" | "classDef" | "linkStyle" | "click" | "class" | "accTitle:" | "accDescr:"
            )
        {
            continue;
        }
        let line = ["<br/>", "<br />", "<br>", "\\n"].iter().fold(line, |line, tag| line.replace(tag, " "));
        lines.push(line);
    }
    let lines = lines.join("\n");
    let lines = lines.trim_matches('\n');
    let kind = lines.split_whitespace().next().unwrap_or_default();
    if kind == "sequenceDiagram" || kind.starts_with("stateDiagram") {
        // Here a semicolon ends a statement, even within a text.
        return lines
            .lines()
            .map(|line| line.trim_end_matches(';').replace(';', ","))
            .collect::<Vec<_>>()
            .join("\n");
    }
    lines.to_owned()
}

/// Is this a diagram that renders?
pub fn check(source: &str) -> Result<(), MermaidError> {
    let at = |line: usize, message: &str| MermaidError { line, message: message.to_owned() };
    // Our own mark, where of a longer text no more is kept.
    if source.ends_with('…') && source.chars().count() > NEARLY_ALL_CHARS {
        return Err(at(source.lines().count(), "it was too long and is cut here; draw the main parts only"));
    }
    if source.len() > MAX_BYTES || source.lines().count() > MAX_LINES {
        return Err(at(1, "the diagram is too large; draw the main parts only"));
    }
    let mut lines = source
        .lines()
        .enumerate()
        .map(|(index, line)| (index + 1, line.trim()))
        .filter(|(_, line)| !line.is_empty());
    let Some((number, header)) = lines.next() else { return Err(at(1, "the diagram is empty")) };
    if let Some(index) = source.lines().position(|line| line.contains("%%")) {
        return Err(at(index + 1, "`%%` begins a comment; leave it out"));
    }
    let words: Vec<&str> = header.trim_end_matches(';').split_whitespace().collect();
    let checked = match words.as_slice() {
        ["flowchart" | "graph"] | ["flowchart" | "graph", "TB" | "TD" | "BT" | "RL" | "LR"] => flowchart(lines),
        ["sequenceDiagram"] => sequence(lines),
        ["stateDiagram-v2" | "stateDiagram"] => state(lines),
        _ => Err((
            number,
            "begin with `flowchart LR`, `flowchart TD`, `sequenceDiagram` or `stateDiagram-v2`, alone on its line"
                .to_owned(),
        )),
    };
    checked.map_err(|(line, message)| MermaidError { line, message })
}

type Fault = (usize, String);

/// What a diagram of any kind calls a name: letters, digits, `_`, and `-` inside.
fn is_id(text: &str) -> bool {
    !text.is_empty()
        && text.len() <= 64
        && text.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_')
        && text.ends_with(|c: char| c.is_ascii_alphanumeric() || c == '_')
        && !text.contains("--")
        && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-')
}

/// Words that a parser takes for statements, also before a `-`; and what every object of JavaScript has, which
/// Mermaid 11 finds when it looks for a node of that name.
fn is_reserved(id: &str) -> bool {
    const RESERVED: &[&str] = &[
        "end",
        "graph",
        "flowchart",
        "subgraph",
        "style",
        "class",
        "classdef",
        "click",
        "href",
        "call",
        "linkstyle",
        "interpolate",
        "default",
        "state",
        "note",
        "direction",
        "participant",
        "actor",
        "loop",
        "alt",
        "else",
        "opt",
        "par",
        "and",
        "rect",
        "critical",
        "option",
        "break",
        "box",
        "activate",
        "deactivate",
        "autonumber",
        "title",
        "create",
        "destroy",
        "over",
        "links",
        "link",
        "as",
        "acctitle",
        "accdescr",
        "sequencediagram",
        "__proto__",
        "constructor",
        "hasownproperty",
        "isprototypeof",
        "propertyisenumerable",
        "tolocalestring",
        "tostring",
        "valueof",
    ];
    let lower = id.to_ascii_lowercase();
    RESERVED.contains(&lower.as_str())
        || lower.split('-').any(|part| part == "end")
        || lower.split('-').next().is_some_and(|part| RESERVED.contains(&part))
}

fn id_fault(id: &str) -> Option<String> {
    if !is_id(id) {
        let shown = clean::cut(id, 40);
        return Some(format!(
            "{shown:?} is no id; use letters, digits and `_`, and put text into a quoted label"
        ));
    }
    is_reserved(id).then(|| format!("`{id}` is a word of Mermaid; use another id"))
}

/// A label in quotes may hold anything but quotes and what HTML and Markdown are made of.
fn quoted_label_fault(label: &str) -> Option<String> {
    if label.trim().is_empty() {
        return Some("a label is empty".to_owned());
    }
    if label.chars().count() > MAX_LABEL_CHARS {
        return Some("a label is too long".to_owned());
    }
    if label.contains(['"', '<', '>', '`']) || label.contains("javascript:") {
        return Some(format!("the label {label:?} holds a character that labels cannot hold (\" < > `)"));
    }
    None
}

/// A label without quotes: words and harmless signs only.
fn bare_label_fault(label: &str) -> Option<String> {
    if let Some(fault) = quoted_label_fault(label) {
        return Some(fault);
    }
    let harmless = |c: char| c.is_alphanumeric() || " _.,:+'&?!*%/-".contains(c);
    let label = label.trim();
    if !label.chars().all(harmless)
        || label.contains("--")
        || label.starts_with(['/', '-'])
        || label.ends_with(['/', '-'])
        || label.to_lowercase().split(|c: char| !c.is_alphanumeric()).any(|word| word == "end")
    {
        return Some(format!("put the label {label:?} into quotes"));
    }
    None
}

// ---------------------------------------------------------------------------------- flowchart

fn flowchart<'a>(lines: impl Iterator<Item = (usize, &'a str)>) -> Result<(), Fault> {
    // Ids of the open subgraphs.
    let mut open: Vec<(usize, String)> = Vec::new();
    let mut nodes = 0;
    for (number, line) in lines {
        let fail = |message: String| (number, message);
        let line = line.trim_end_matches(';').trim_end();
        if line == "end" {
            if open.pop().is_none() {
                return Err(fail("this `end` closes nothing".to_owned()));
            }
            continue;
        }
        if let Some(rest) = line.strip_prefix("subgraph") {
            let id = subgraph(rest).map_err(fail)?;
            open.push((number, id));
            continue;
        }
        if let Some(rest) = line.strip_prefix("direction ") {
            if !matches!(rest.trim(), "TB" | "TD" | "BT" | "RL" | "LR") {
                return Err(fail("`direction` is one of TB, BT, RL, LR".to_owned()));
            }
            continue;
        }
        let mut cursor = Cursor { rest: line };
        let ids = cursor.statement().map_err(fail)?;
        for id in ids {
            nodes += 1;
            if open.iter().any(|(_, subgraph)| *subgraph == id) {
                return Err(fail(format!("`{id}` is also the id of the subgraph around it")));
            }
        }
    }
    match open.pop() {
        Some((number, _)) => Err((number, "this `subgraph` is not closed by `end`".to_owned())),
        None if nodes == 0 => Err((1, "there is no node".to_owned())),
        None => Ok(()),
    }
}

/// `subgraph id`, `subgraph id["label"]`, `subgraph "label"`. Returns the id.
fn subgraph(rest: &str) -> Result<String, String> {
    if !rest.starts_with(' ') {
        return Err("write `subgraph id[\"label\"]`".to_owned());
    }
    let rest = rest.trim();
    if let Some(label) = rest.strip_prefix('"').and_then(|rest| rest.strip_suffix('"')) {
        return quoted_label_fault(label).map_or(Ok(label.to_owned()), Err);
    }
    let (id, label) = match rest.split_once('[') {
        Some((id, label)) => {
            let label = label.strip_suffix(']').ok_or("the label of this subgraph has no `]`")?;
            (id.trim_end(), Some(label))
        }
        None => (rest, None),
    };
    if let Some(fault) = id_fault(id) {
        return Err(fault);
    }
    if let Some(label) = label {
        let fault = match label.strip_prefix('"').and_then(|label| label.strip_suffix('"')) {
            Some(label) => quoted_label_fault(label),
            None => bare_label_fault(label),
        };
        if let Some(fault) = fault {
            return Err(fault);
        }
    }
    Ok(id.to_owned())
}

/// Reads one line of a flowchart.
struct Cursor<'a> {
    rest: &'a str,
}

/// Opening and closing of the node shapes, longest first.
const SHAPES: &[(&str, &str)] = &[
    ("(((", ")))"),
    ("((", "))"),
    ("([", "])"),
    ("[[", "]]"),
    ("[(", ")]"),
    ("{{", "}}"),
    ("[/", "/]"),
    ("[", "]"),
    ("(", ")"),
    ("{", "}"),
];

impl Cursor<'_> {
    fn skip_space(&mut self) {
        self.rest = self.rest.trim_start();
    }

    fn take(&mut self, token: &str) -> bool {
        match self.rest.strip_prefix(token) {
            Some(rest) => {
                self.rest = rest;
                true
            }
            None => false,
        }
    }

    /// `a["A"] & b -->|"text"| c -.-> d`. Returns the ids.
    fn statement(&mut self) -> Result<Vec<String>, String> {
        let mut ids = Vec::new();
        loop {
            loop {
                self.skip_space();
                ids.push(self.node()?);
                let touches = !self.rest.starts_with(' ');
                self.skip_space();
                if self.rest.starts_with('&') {
                    if touches || !self.rest.starts_with("& ") {
                        return Err("put spaces around `&`".to_owned());
                    }
                    self.take("&");
                    continue;
                }
                if self.rest.is_empty() {
                    return Ok(ids);
                }
                // `x--` and `--o` are heads of links.
                let last = ids.last().map_or("", String::as_str);
                if touches && last.ends_with(['x', 'o']) {
                    return Err("put spaces around links".to_owned());
                }
                break;
            }
            self.link()?;
            if self.rest.starts_with(['x', 'o']) {
                return Err("put spaces around links".to_owned());
            }
        }
    }

    fn node(&mut self) -> Result<String, String> {
        let bytes = self.rest.as_bytes();
        let mut end = 0;
        while let Some(byte) = bytes.get(end) {
            let inside = byte.is_ascii_alphanumeric() || *byte == b'_';
            // A `-` belongs to the id only between two of its characters: `api-gateway`, not `a-->b`.
            let dash = *byte == b'-' && end > 0 && bytes.get(end + 1).is_some_and(u8::is_ascii_alphanumeric);
            if !inside && !dash {
                break;
            }
            end += 1;
        }
        let (id, rest) = self.rest.split_at(end);
        if id.is_empty() {
            let shown = clean::cut(self.rest, 30);
            return Err(if shown.is_empty() {
                "a link leads nowhere".to_owned()
            } else {
                format!("expected a node at {shown:?}")
            });
        }
        if let Some(fault) = id_fault(id) {
            return Err(fault);
        }
        self.rest = rest;
        if let Some((open, close)) = SHAPES.iter().find(|(open, _)| self.rest.starts_with(open)) {
            self.rest = &self.rest[open.len()..];
            self.label(close)?;
        }
        if self.rest.starts_with(":::") || self.rest.starts_with('@') {
            return Err("styles and icons are not wanted here".to_owned());
        }
        Ok(id.to_owned())
    }

    /// The label of a node up to `close`.
    fn label(&mut self, close: &str) -> Result<(), String> {
        if let Some(rest) = self.rest.strip_prefix('"') {
            let Some((label, rest)) = rest.split_once('"') else {
                return Err("a quoted label does not end".to_owned());
            };
            self.rest = rest;
            if let Some(fault) = quoted_label_fault(label) {
                return Err(fault);
            }
            return if self.take(close) {
                Ok(())
            } else {
                Err(format!("expected `{close}` after the label"))
            };
        }
        let Some((label, rest)) = self.rest.split_once(close) else {
            return Err(format!("a label has no `{close}`"));
        };
        self.rest = rest;
        bare_label_fault(label).map_or(Ok(()), Err)
    }

    fn link(&mut self) -> Result<(), String> {
        let wrong = || "links are `-->`, `---`, `-.->` and `==>`, with text as `-->|\"text\"|`".to_owned();
        self.take("<");
        let body = self.rest.len();
        let line: String = self.rest.chars().take_while(|c| matches!(c, '-' | '=' | '.' | '~')).collect();
        self.rest = &self.rest[line.len()..];
        let arrow = self.take(">");
        let two_sided = arrow || self.rest.starts_with(['x', 'o']) && self.rest[1..].starts_with(' ');
        if !arrow && two_sided {
            self.rest = &self.rest[1..];
        }
        let dotted = line.len() >= 3
            && line.starts_with('-')
            && line.ends_with('-')
            && line[1..line.len() - 1].chars().all(|c| c == '.');
        let all = |sign: char, least: usize| line.len() >= least && line.chars().all(|c| c == sign);
        let whole = if two_sided {
            all('-', 2) || all('=', 2) || dotted
        } else {
            all('-', 3) || all('=', 3) || all('~', 3) || dotted
        };
        if whole {
            if self.rest.trim_start().starts_with('|') {
                self.skip_space();
                self.take("|");
                let Some((text, rest)) = self.rest.split_once('|') else {
                    return Err("the text of a link has no second `|`".to_owned());
                };
                self.rest = rest;
                let text = text.trim();
                return match text.strip_prefix('"').and_then(|text| text.strip_suffix('"')) {
                    Some(text) => quoted_label_fault(text),
                    None => bare_label_fault(text),
                }
                .map_or(Ok(()), Err);
            }
            return Ok(());
        }
        // `-- text -->`, `== text ==>`, `-. text .->`
        let ends: &[&str] = match line.as_str() {
            "--" => &["-->", "---"],
            "==" => &["==>", "==="],
            "-." => &[".->", ".-"],
            _ => return Err(wrong()),
        };
        if arrow || body == self.rest.len() || !self.rest.starts_with(' ') {
            return Err(wrong());
        }
        let dots = line == "-.";
        // The longer one stands first, and of two at one place the first is taken.
        let found =
            ends.iter().filter_map(|end| Some((self.rest.find(end)?, *end))).min_by_key(|(at, _)| *at);
        let Some((at, end)) = found else { return Err(wrong()) };
        let text = self.rest[..at].trim();
        self.rest = &self.rest[at + end.len()..];
        if dots && text.contains('.') {
            return Err("no dots in the text of a dotted link; write `-.->|\"text\"|`".to_owned());
        }
        match text.strip_prefix('"').and_then(|text| text.strip_suffix('"')) {
            Some(text) => quoted_label_fault(text),
            None => bare_label_fault(text),
        }
        .map_or(Ok(()), Err)
    }
}

// ----------------------------------------------------------------------------------- sequence

/// Longest first, so that `-->>` is not taken for `--`.
const ARROWS: &[&str] = &["<<-->>", "<<->>", "-->>", "->>", "-->", "--x", "--)", "->", "-x", "-)"];

fn sequence<'a>(lines: impl Iterator<Item = (usize, &'a str)>) -> Result<(), Fault> {
    let mut open: Vec<(usize, &str)> = Vec::new();
    // How often each is active; everybody who was met is in it.
    let mut active: HashMap<String, i32> = HashMap::new();
    let mut messages = 0;
    for (number, line) in lines {
        let fail = |message: String| (number, message);
        let (word, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        let rest = rest.trim();
        match word {
            "autonumber" if rest.is_empty() => {}
            "participant" | "actor" => {
                let (id, label) = match rest.split_once(" as ") {
                    Some((id, label)) => (id.trim(), Some(label.trim())),
                    None => (rest, None),
                };
                if let Some(fault) = id_fault(id).or_else(|| label.and_then(text_fault)) {
                    return Err(fail(fault));
                }
                active.entry(id.to_owned()).or_default();
            }
            "activate" | "deactivate" => {
                if let Some(fault) = id_fault(rest) {
                    return Err(fail(fault));
                }
                let Some(count) = active.get_mut(rest) else {
                    return Err(fail(format!("`{rest}` is nobody yet; name it as a participant first")));
                };
                *count += if word == "activate" { 1 } else { -1 };
                if *count < 0 {
                    return Err(fail(format!("`{rest}` is not active here")));
                }
            }
            "Note" | "note" => note(rest).map_err(fail)?,
            "loop" | "alt" | "opt" | "par" | "critical" | "break" => {
                if let Some(fault) = optional_text_fault(rest) {
                    return Err(fail(fault));
                }
                open.push((number, word));
            }
            "else" | "and" | "option" => {
                let wanted = match word {
                    "else" => "alt",
                    "and" => "par",
                    _ => "critical",
                };
                if open.last().map(|(_, block)| *block) != Some(wanted) {
                    return Err(fail(format!("`{word}` belongs into `{wanted}`")));
                }
                if let Some(fault) = optional_text_fault(rest) {
                    return Err(fail(fault));
                }
            }
            "end" if rest.is_empty() => {
                if open.pop().is_none() {
                    return Err(fail("this `end` closes nothing".to_owned()));
                }
            }
            _ => {
                message(line, &mut active).map_err(fail)?;
                messages += 1;
            }
        }
    }
    match open.pop() {
        Some((number, block)) => Err((number, format!("this `{block}` is not closed by `end`"))),
        None if messages == 0 => Err((1, "there is no message".to_owned())),
        None => Ok(()),
    }
}

/// `A->>+B: text`
fn message(line: &str, active: &mut HashMap<String, i32>) -> Result<(), String> {
    let wrong = || "a message is `A->>B: text`".to_owned();
    let found = ARROWS.iter().filter_map(|arrow| Some((line.find(arrow)?, *arrow)));
    // The first arrow in the line; of those at one place the longest.
    let Some((at, arrow)) = found.min_by_key(|(at, arrow)| (*at, std::cmp::Reverse(arrow.len()))) else {
        return Err(wrong());
    };
    let from = line[..at].trim();
    let rest = line[at + arrow.len()..].trim_start();
    let (sign, rest) = match rest.strip_prefix('+') {
        Some(rest) => (1, rest),
        None => match rest.strip_prefix('-') {
            Some(rest) => (-1, rest),
            None => (0, rest),
        },
    };
    let Some((to, text)) = rest.split_once(':') else { return Err(wrong()) };
    let to = to.trim();
    for id in [from, to] {
        if let Some(fault) = id_fault(id) {
            return Err(fault);
        }
        active.entry(id.to_owned()).or_default();
    }
    if let Some(fault) = text_fault(text.trim()) {
        return Err(fault);
    }
    if sign == 1 {
        *active.entry(to.to_owned()).or_default() += 1;
    } else if sign == -1 {
        let count = active.entry(from.to_owned()).or_default();
        *count -= 1;
        if *count < 0 {
            return Err(format!("`{from}` is not active here"));
        }
    }
    Ok(())
}

/// `over A,B: text`, `left of A: text`
fn note(rest: &str) -> Result<(), String> {
    let wrong = || "a note is `Note over A,B: text` or `Note right of A: text`".to_owned();
    let (place, text) = rest.split_once(':').ok_or_else(wrong)?;
    let place = place.trim();
    let who = ["over ", "left of ", "right of "].iter().find_map(|prefix| place.strip_prefix(prefix));
    let ids: Vec<&str> = who.ok_or_else(wrong)?.split(',').map(str::trim).collect();
    if ids.len() > 2 || (ids.len() == 2 && !place.starts_with("over")) {
        return Err(wrong());
    }
    for id in ids {
        if let Some(fault) = id_fault(id) {
            return Err(fault);
        }
    }
    text_fault(text.trim()).map_or(Ok(()), Err)
}

fn optional_text_fault(text: &str) -> Option<String> {
    if text.is_empty() { None } else { text_fault(text) }
}

/// A text that runs to the end of the line.
fn text_fault(text: &str) -> Option<String> {
    if text.contains([';', '#']) {
        return Some("`;` and `#` cannot stand in a text here".to_owned());
    }
    quoted_label_fault(&text.replace('"', "'"))
}

// -------------------------------------------------------------------------------------- state

fn state<'a>(lines: impl Iterator<Item = (usize, &'a str)>) -> Result<(), Fault> {
    // Where a group was opened, and the states it holds so far; at the bottom the diagram itself.
    let mut open: Vec<(usize, HashSet<&str>)> = vec![(0, HashSet::new())];
    let mut groups: HashSet<&str> = HashSet::new();
    // States with a description on a line of its own: a group may only have a label.
    let mut described: Vec<(usize, &str)> = Vec::new();
    let mut states = 0;
    for (number, line) in lines {
        let fail = |message: String| (number, message);
        if line == "}" {
            match open.pop() {
                Some((_, held)) if !open.is_empty() && held.is_empty() => {
                    return Err(fail("this group holds no state".to_owned()));
                }
                Some(_) if !open.is_empty() => {}
                _ => return Err(fail("this `}` closes nothing".to_owned())),
            }
            continue;
        }
        let mut mention = |id| {
            if let Some((_, held)) = open.last_mut() {
                held.insert(id);
            }
        };
        if let Some(rest) = line.strip_prefix("direction ") {
            if !matches!(rest.trim(), "TB" | "BT" | "RL" | "LR") {
                return Err(fail("`direction` is one of TB, BT, RL, LR".to_owned()));
            }
            continue;
        }
        if let Some(rest) = line.strip_prefix("note ") {
            let id = state_note(rest).map_err(fail)?;
            if !open.last().is_some_and(|(_, held)| held.contains(id)) {
                return Err(fail(format!("the note is on `{id}`, which is no state above it and beside it")));
            }
            continue;
        }
        if let Some(rest) = line.strip_prefix("state ") {
            states += 1;
            let rest = rest.trim();
            if let Some(id) = rest.strip_suffix('{') {
                let id = state_declaration(id.trim()).map_err(fail)?;
                mention(id);
                groups.insert(id);
                open.push((number, HashSet::new()));
            } else {
                mention(state_declaration(rest).map_err(fail)?);
            }
            continue;
        }
        states += 1;
        let (head, text) = match line.split_once(':') {
            Some((head, text)) => (head.trim(), Some(text.trim())),
            None => (line, None),
        };
        if let Some(fault) = text.and_then(state_text_fault) {
            return Err(fail(fault));
        }
        match head.split_once("-->") {
            Some((from, to)) => {
                for id in [from.trim(), to.trim()] {
                    if id != "[*]"
                        && let Some(fault) = state_id_fault(id)
                    {
                        return Err(fail(fault));
                    }
                    mention(id);
                }
            }
            None => {
                if let Some(fault) = state_id_fault(head) {
                    return Err(fail(fault));
                }
                mention(head);
                described.push((number, head));
            }
        }
    }
    if let Some((number, id)) = described.into_iter().find(|(_, id)| groups.contains(id)) {
        return Err((number, format!("`{id}` holds states; label it with `state \"text\" as {id}` instead")));
    }
    match open.pop() {
        Some((number, _)) if number > 0 => Err((number, "this `{` is not closed by `}`".to_owned())),
        _ if states == 0 => Err((1, "there is no state".to_owned())),
        _ => Ok(()),
    }
}

/// `A`, `"label" as A`, `A <<choice>>`
/// Gives the id.
fn state_declaration(rest: &str) -> Result<&str, String> {
    if let Some(quoted) = rest.strip_prefix('"') {
        let wrong = || "write `state \"label\" as id`".to_owned();
        let (label, id) = quoted.split_once('"').ok_or_else(wrong)?;
        let id = id.trim().strip_prefix("as ").ok_or_else(wrong)?.trim();
        return quoted_label_fault(label).or_else(|| state_id_fault(id)).map_or(Ok(id), Err);
    }
    let id = ["<<choice>>", "<<fork>>", "<<join>>"]
        .iter()
        .find_map(|mark| rest.strip_suffix(mark))
        .unwrap_or(rest)
        .trim();
    state_id_fault(id).map_or(Ok(id), Err)
}

/// `right of A : text`; gives the id.
fn state_note(rest: &str) -> Result<&str, String> {
    let wrong = || "a note is `note right of A : text`".to_owned();
    let (place, text) = rest.split_once(':').ok_or_else(wrong)?;
    let id = ["left of ", "right of "].iter().find_map(|prefix| place.trim().strip_prefix(prefix));
    let id = id.ok_or_else(wrong)?.trim();
    state_id_fault(id).or_else(|| state_text_fault(text.trim())).map_or(Ok(id), Err)
}

/// As elsewhere, but a `-` begins an arrow.
fn state_id_fault(id: &str) -> Option<String> {
    if id.eq_ignore_ascii_case("root") {
        return Some(format!("`{id}` is a word of Mermaid; use another id"));
    }
    id_fault(id).or_else(|| id.contains('-').then(|| format!("no `-` in the id `{id}` of a state; use `_`")))
}

fn state_text_fault(text: &str) -> Option<String> {
    if text.contains(':') {
        return Some("a second `:` cannot stand in a text here".to_owned());
    }
    text_fault(text)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_the_prompt_asks_for_passes() {
        for source in [
            "flowchart LR\n  a[\"HTTP API (v1)\"] -->|\"reads\"| db[(\"Postgres\")]\n  a --> b & c\n  c -.-> d{{\"x\"}}",
            "flowchart TD;\n  subgraph s[\"Service\"]\n    direction LR\n    x --> y\n  end\n  x ==> z(\"Z\");",
            "graph TB\n  api-gateway[Gateway] -- calls --> svc1(Service 1)\n  svc1 --- q",
            "flowchart LR\n  a<-->b\n  a ~~~ c",
            "sequenceDiagram\n  autonumber\n  participant A as Worker\n  actor U\n  U->>+A: ask (now): please\n  A-->>-U: answer\n  alt ok\n    A->>A: note\n  else not ok\n    A-xU: fail\n  end\n  Note over A,U: done",
            "stateDiagram-v2\n  [*] --> Queued\n  Queued --> Running : claim\n  state \"Waits for tokens\" as Deferred\n  state Running {\n    direction LR\n    a --> b\n  }\n  Running --> [*]\n  note right of Queued : here",
        ] {
            assert_eq!(check(&tidy(source)), Ok(()), "{source}");
        }
    }

    #[test]
    fn faults_are_named_with_their_line() {
        let broken = [
            "",
            "pie title Pets\n \"Dogs\" : 3",
            "flowchart LR",
            "flowchart LR\n  a[HTTP (v1)] --> b",
            "flowchart LR\n  a --> end",
            "flowchart LR\n  a --> ",
            "flowchart LR\n  a -> b",
            "flowchart LR\n  subgraph s\n  a --> b",
            "flowchart LR\n  subgraph s\n  s --> b\n  end",
            "flowchart LR\n  a[\"<script>alert(1)</script>\"] --> b",
            "flowchart LR\n  a[\"open] --> b",
            "flowchart LR\n  a[\"x\"]:::red --> b",
            "flowchart LR\n  api gateway --> b",
            "sequenceDiagram\n  A->>B",
            "sequenceDiagram\n  A->>B: hi\n  deactivate B",
            "sequenceDiagram\n  loop x\n  A->>B: hi",
            "sequenceDiagram\n  A->>B: hi\n  else\n  end",
            "stateDiagram-v2\n  A --> B : a: b",
            "stateDiagram-v2\n  state A {\n  b --> c",
            // Found by comparing with Mermaid itself.
            "stateDiagram-v2\n  a --> accTitle : x",
            "sequenceDiagram\n  a->>sequenceDiagram: x",
            "sequenceDiagram\n  a->>b: 50 %% x",
            "flowchart LR\n  a((- item)) --> b",
            "stateDiagram-v2\n  state \"x\" as a\n  state a {\n    a : y\n  }",
            "stateDiagram-v2\n  a --> b\n  state c {\n    direction LR\n  }",
            "stateDiagram-v2\n  a --> b\n  note right of c : here",
            "stateDiagram-v2\n  a --> root",
            "sequenceDiagram\n  activate a\n  b->>c: x",
            "flowchart LR\n  a --> toString",
            "flowchart LR\n  __proto__ --> a",
        ];
        let told: Vec<String> = broken
            .iter()
            .map(|source| match check(&tidy(source)) {
                Ok(()) => format!("{source:?} passes"),
                Err(error) => format!("{source:?}\n    {error}"),
            })
            .collect();
        insta::assert_snapshot!(told.join("\n"));
    }

    #[test]
    fn a_diagram_that_was_cut_says_so() {
        let edges: Vec<String> = (0..600).map(|n| format!("    A{n} --> B{n}")).collect();
        let (kept, is_cut) = read::text(&format!("flowchart LR\n{}", edges.join("\n")), read::MAX_TEXT_CHARS);
        let line = tidy(&kept).lines().count();
        let message = "it was too long and is cut here; draw the main parts only".to_owned();
        assert!(is_cut && line > 100, "{line}");
        assert_eq!(check(&tidy(&kept)), Err(MermaidError { line, message }));
        assert_eq!(check("sequenceDiagram\n    A->>B: waits…"), Ok(()), "its own dots");
    }

    #[test]
    fn harmless_extras_are_taken_off() {
        let source = "```mermaid\n%%{init: {}}%%\nflowchart LR\n  a[\"one<br/>two\"] --> b\n  style a fill:#f00\n  click a \"javascript:alert(1)\"\n```";
        assert_eq!(tidy(source), "flowchart LR\n  a[\"one two\"] --> b");
        assert_eq!(tidy("sequenceDiagram\n  A->>B: one; two;"), "sequenceDiagram\n  A->>B: one, two");
    }

    proptest! {
        #[test]
        fn arbitrary_text_never_panics(text in "\\PC{0,200}") {
            let _ = check(&tidy(&text));
        }

        #[test]
        fn arbitrary_lines_never_panic(
            kind in prop_oneof![Just("flowchart LR"), Just("sequenceDiagram"), Just("stateDiagram-v2")],
            body in "[a-cxo \\-=.>|\"\\[\\](){}:&+~<;\n]{0,80}",
        ) {
            let _ = check(&tidy(&format!("{kind}\n{body}")));
        }

        #[test]
        fn nothing_that_passes_holds_html(body in "[a-c<>/\" \\[\\]\\-\n]{0,60}") {
            let source = tidy(&format!("flowchart LR\n{body}"));
            if check(&source).is_ok() {
                let arrows_out = source.replace("-->", "").replace("<--", "");
                prop_assert!(!arrows_out.contains(['<', '>']), "{}", source);
            }
        }
    }
}
