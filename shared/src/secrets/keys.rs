//! Private keys as PEM writes them: whole ones, and what is left of one that was cut into passages.

use std::{ops::Range, sync::LazyLock};

use regex::Regex;

use super::{Found, is_random};

const PRIVATE_KEY: &str = "private key";
/// A run of lines without a first or last line says not what it belongs to: a key, a certificate, a picture.
/// None of them is of use in a prompt.
const MATERIAL: &str = "key material";

/// Shorter lines are words.
const LEAST_LINE: usize = 40;
/// A line of this length is enough by itself: PEM has 64, others 70 and 76.
const FULL_LINE: usize = 64;
/// What must follow the first line of a key at least.
const LEAST_BODY: usize = 16;

static BEGIN: LazyLock<Option<Regex>> =
    LazyLock::new(|| Regex::new("-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----").ok());
static END: LazyLock<Option<Regex>> =
    LazyLock::new(|| Regex::new("-----END [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----").ok());
/// Lines of a key within a string of JSON or code.
static ESCAPED: LazyLock<Option<Regex>> =
    LazyLock::new(|| Regex::new(r"(?:[A-Za-z0-9+/]{40,}={0,2}(?:\\r)?\\n)+[A-Za-z0-9+/]*={0,2}").ok());

/// `longest`: the longest run of signs that keys are made of.
pub(super) fn find(text: &str, longest: usize) -> Vec<Found> {
    let mut found = Vec::new();
    if text.contains("PRIVATE KEY")
        && let (Some(begin), Some(end)) = (&*BEGIN, &*END)
    {
        whole(text, begin, end, &mut found);
    }
    if longest < LEAST_LINE {
        return found;
    }
    if let Some(escaped) = ESCAPED.as_ref().filter(|_| text.contains("\\n")) {
        let real =
            escaped.find_iter(text).filter(|it| looks_encoded(it.as_str().split('\\').next().unwrap_or("")));
        found.extend(real.map(|it| Found { at: it.range(), name: MATERIAL }));
    }
    // A key that was found whole has the better name.
    let within = |it: &Found| found.iter().any(|key| key.at.start <= it.at.start && it.at.end <= key.at.end);
    let mut middles = middles(text);
    middles.retain(|it| !within(it));
    found.append(&mut middles);
    found
}

/// Keys that have a first or a last line here.
fn whole(text: &str, begin: &Regex, end: &Regex, found: &mut Vec<Found>) {
    let mut from = 0;
    loop {
        let next_begin = begin.find_at(text, from);
        let next_end = end.find_at(text, from);
        match (next_begin, next_end) {
            (Some(begin), last) if last.is_none_or(|last| begin.start() < last.start()) => {
                let body = body_end(text, begin.end());
                let Some(body) = body else {
                    // Somebody speaks of such lines.
                    from = begin.end();
                    continue;
                };
                let end = with_tail(text, last.map_or(body, |last| last.end().max(body)));
                found.push(Found { at: begin.start()..end, name: PRIVATE_KEY });
                from = end;
            }
            (_, Some(last)) => {
                let start = body_start(text, from, last.start());
                let mut end = last.end();
                if start < last.start() {
                    end = with_tail(text, end);
                    found.push(Found { at: start..end, name: PRIVATE_KEY });
                }
                from = end;
            }
            (_, None) => return,
        }
    }
}

/// The end of what follows a key on its last line, where it could be more of one: it would be seen as such
/// when the key before it is gone.
fn with_tail(text: &str, end: usize) -> usize {
    let line = text[end..].split('\n').next().unwrap_or_default();
    let (core, range) = core(line, end);
    let run = core.bytes().take_while(|byte| is_base64(*byte)).count();
    let more = run >= LEAST_BODY && (range.start == end || looks_encoded(&core[..run]));
    if more { range.start + run } else { end }
}

fn is_base64(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'/' | b'=')
}

/// A line without what Markdown, diffs, comments and strings put around it, and where that is.
fn core(line: &str, at: usize) -> (&str, Range<usize>) {
    let left = line.trim_start_matches([' ', '\t', '>', '#', '*', '|', '"', '\'', '`']);
    // Only in front of a space: both are signs of base64 too.
    let left = left.strip_prefix("+ ").or_else(|| left.strip_prefix("// ")).unwrap_or(left).trim_start();
    let start = at + (line.len() - left.len());
    let core = left.trim_end_matches([' ', '\t', '\r', '"', '\'', '`', ',', ';', '|', '\\']);
    let core = core.strip_suffix("\\n").unwrap_or(core);
    (core, start..start + core.len())
}

/// Where the body ends that begins after a first line; `None`: there is none.
fn body_end(text: &str, from: usize) -> Option<usize> {
    let rest = &text[from..];
    let line = rest.split('\n').next().unwrap_or_default();
    let signs = |byte: u8| is_base64(byte) || byte == b'\\' || byte == b' ';
    // What quotes and lists of Markdown put in front.
    let skipped = line.len() - line.trim_start_matches([' ', '\t', '>', '#', '*', '+']).len();
    let inline = skipped + line[skipped..].bytes().take_while(|byte| signs(*byte)).count();
    // A `+` in front may be the first sign as well.
    if line[..inline].bytes().filter(|byte| is_base64(*byte)).count() >= LEAST_BODY {
        return Some(from + inline);
    }
    let mut end = None;
    let mut at = from + line.len() + 1;
    for line in text.get(at..)?.split('\n') {
        let (core, range) = core(line, at);
        at += line.len() + 1;
        let header = end.is_none() && core.contains(": ") && core.len() < 100;
        if header || (core.is_empty() && end.is_none()) {
            continue;
        }
        let least = if end.is_none() { LEAST_BODY } else { 1 };
        // A chunk may begin with the first words of a line, so the first run of a line is looked at.
        let run = core.bytes().take_while(|byte| is_base64(*byte)).count();
        if run < least || (run < core.len() && run < LEAST_BODY) {
            break;
        }
        end = Some(range.start + run);
        if run < core.len() {
            break;
        }
    }
    end
}

/// Where the body begins that ends before a last line.
fn body_start(text: &str, from: usize, end: usize) -> usize {
    let mut start = end;
    let signs = |byte: &u8| is_base64(*byte) || *byte == b'\\';
    let inline = text.as_bytes()[from..end].iter().rev().take_while(|byte| signs(byte)).count();
    if inline >= LEAST_BODY {
        return end - inline;
    }
    let mut line_end = text[from..end].rfind('\n').map_or(from, |at| from + at);
    // After a sentence on the same line somebody speaks of such lines.
    let before = text[from..end].rsplit('\n').next().unwrap_or_default();
    if !core(before, 0).0.bytes().all(is_base64) {
        return end;
    }
    while line_end > from {
        let line_start = text[from..line_end].rfind('\n').map_or(from, |at| from + at + 1);
        let (core, range) = core(&text[line_start..line_end], line_start);
        // The last line may be short, and PGP puts a sum of five signs after it.
        if core.is_empty() || !core.bytes().all(is_base64) {
            break;
        }
        start = range.start;
        if line_start == from {
            break;
        }
        line_end = line_start - 1;
    }
    start
}

fn looks_encoded(line: &str) -> bool {
    line.bytes().all(is_base64)
        && line.bytes().any(|byte| byte.is_ascii_uppercase())
        && line.bytes().any(|byte| byte.is_ascii_lowercase())
        && is_random(line, LEAST_BODY)
}

/// Lines of base64 one after another.
fn middles(text: &str) -> Vec<Found> {
    let mut found = Vec::new();
    // Where it is, how many lines it has, and whether one of them is a whole one.
    let mut run: Option<(Range<usize>, usize, bool)> = None;
    let mut close = |run: &mut Option<(Range<usize>, usize, bool)>| {
        if let Some((at, ..)) = run.take().filter(|(_, lines, full)| *lines >= 2 || *full) {
            found.push(Found { at, name: MATERIAL });
        }
    };
    let mut at = 0;
    for line in text.split('\n') {
        let (core, range) = core(line, at);
        at += line.len() + 1;
        let long = core.len() >= LEAST_LINE && looks_encoded(core);
        match &mut run {
            Some((all, lines, full)) if long => {
                all.end = range.end;
                *lines += 1;
                *full |= core.len() >= FULL_LINE;
            }
            Some((all, lines, full)) => {
                // The last line is as long as what was left.
                if !core.is_empty() && core.bytes().all(is_base64) && (*lines >= 2 || *full) && mixed(core) {
                    all.end = range.end;
                }
                close(&mut run);
            }
            None if long => run = Some((range, 1, core.len() >= FULL_LINE)),
            None => {}
        }
    }
    close(&mut run);
    found
}

/// More than a word.
fn mixed(line: &str) -> bool {
    line.ends_with('=') || is_random(line, 6)
}
