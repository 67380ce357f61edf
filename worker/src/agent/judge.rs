//! A score card for a rendered document: deterministic checks, no model.
//!
//! It reads the Markdown, not the structure behind it, so that it judges what a reader gets and works
//! for any file. It can tell whether a document is complete, honest about its sources and readable;
//! it cannot tell whether it is right. Whether its sources are there is for the caller to look up
//! ([`judge_with_sources`]); nothing is read here.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
    fmt::{self, Write as _},
    sync::LazyLock,
};

use atlas_shared::secrets;
use pulldown_cmark::{Event, Options, Parser, Tag, TagEnd};
use regex::Regex;
use serde::{Deserialize, Serialize};

use super::{
    clean, mermaid,
    provenance::MARKS,
    render::{NONE_FOUND, NONE_GIVEN, UNCHECKED_DIAGRAM},
    spec::{BELOW, Field, Kind, PROS_AND_CONS, SOURCES},
    words,
};

/// Shorter says too little, longer is not read.
const WORDS: std::ops::RangeInclusive<usize> = 150..=4_000;
/// A mean above this is hard to read.
const MAX_SENTENCE_WORDS: f64 = 28.0;
/// No sentence is longer.
const LONGEST_SENTENCE: usize = 80;
/// Statements with a citation, at least, for full marks.
const WANTED_GROUNDING: f64 = 0.5;

/// Checks that nothing else makes up for: with less than half of their marks the whole document has a cap.
const CAPPING: &[&str] = &["citations", "grounding", "safety"];
/// The cap of a document that fails one of them altogether.
const LEAST_CAP: f64 = 70.0;

/// Words that stand where something is still to be written.
const PLACEHOLDERS: &[&str] = &["tbd", "tba", "tbc", "todo", "fixme", "xxx", "n/a"];
/// What a statement costs that is nothing else.
const PRICE_OF_A_PLACEHOLDER: f64 = 0.1;

/// Places in which a statement may not stand any more.
const AGAIN: usize = 3;
/// What each further place costs.
const PRICE_OF_AGAIN: f64 = 0.1;
/// Repeated statements that are named.
const NAMED_AGAIN: usize = 5;
/// Fewer words are a name.
const STATEMENT_WORDS: usize = 3;

/// Phrases that sell or fill instead of saying something.
const BANNED: &[&str] = &[
    "best-in-class",
    "best of breed",
    "cutting-edge",
    "cutting edge",
    "delve",
    "game-changer",
    "game changer",
    "in today's fast-paced",
    "it is important to note",
    "it's important to note",
    "leverage the power",
    "next-generation",
    "robust and scalable",
    "scalable and robust",
    "seamless",
    "state-of-the-art",
    "synergy",
    "unlock the potential",
    "world-class",
    "as an ai",
    "as a language model",
];

/// The verdict on a document.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ScoreCard {
    /// What kind of document it was taken for, by its headings.
    pub kind: Kind,
    /// One a check, in a fixed order.
    pub checks: Vec<Check>,
}

/// One check.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Check {
    /// Its name, stable.
    pub name: String,
    /// 0 to 1; 1: nothing to complain about.
    pub score: f64,
    /// What was found, in words.
    pub detail: String,
}

impl Check {
    /// True for full marks.
    pub fn passed(&self) -> bool {
        self.score >= 1.0
    }
}

impl ScoreCard {
    /// The mean of all checks, 0 to 100; no more than the cap of those that nothing makes up for.
    pub fn score(&self) -> u32 {
        let sum: f64 = self.checks.iter().map(|check| check.score).sum();
        let mean = sum / self.checks.len().max(1) as f64;
        let cap = self.checks.iter().filter_map(cap).min();
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "0 to 100")]
        let score = (mean * 100.0).floor() as u32;
        cap.map_or(score, |cap| score.min(cap))
    }

    /// True when every check has full marks.
    pub fn passed(&self) -> bool {
        self.checks.iter().all(Check::passed)
    }
}

impl fmt::Display for ScoreCard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let passed = self.checks.iter().filter(|check| check.passed()).count();
        writeln!(
            f,
            "{} / 100  ({}, {passed} of {} checks passed)",
            self.score(),
            self.kind.as_str(),
            self.checks.len()
        )?;
        for Check { name, score, detail } in &self.checks {
            let mark = if *score >= 1.0 { "ok  " } else { "    " };
            writeln!(f, "  {mark}{name:<13} {:>4.0} %  {detail}", (score * 100.0).floor())?;
        }
        Ok(())
    }
}

/// The most that a document can have with this check, where it has less than half of its marks.
fn cap(check: &Check) -> Option<u32> {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "0 to 100")]
    let cap = (LEAST_CAP + 2.0 * (100.0 - LEAST_CAP) * check.score).floor() as u32;
    (check.score < 0.5 && CAPPING.contains(&check.name.as_str())).then_some(cap)
}

/// Judges a rendered document by itself.
pub fn judge(markdown: &str) -> ScoreCard {
    card(markdown, None)
}

/// Judges a rendered document by itself and by what was found where its [`sources`] say they are.
pub fn judge_with_sources(markdown: &str, looked_up: &[(Source, Lookup)]) -> ScoreCard {
    card(markdown, Some(looked_up))
}

fn card(markdown: &str, looked_up: Option<&[(Source, Lookup)]>) -> ScoreCard {
    let page = Page::read(markdown);
    let mut checks = vec![
        complete(&page),
        headings(&page),
        decisions(&page),
        components(&page),
        citations(&page, looked_up),
        grounding(&page, looked_up),
        diagrams(&page),
        length(&page),
        repetition(&page),
        language(&page),
        safety(markdown, &page),
    ];
    for check in &mut checks {
        if let Some(cap) = cap(check) {
            let _ = write!(check.detail, "; no score above {cap}");
        }
    }
    ScoreCard { kind: page.kind, checks }
}

/// A document taken apart.
struct Page<'a> {
    kind: Kind,
    /// The level-2 headings, in order.
    headings: Vec<&'a str>,
    /// Lines of each section, without fenced blocks.
    sections: BTreeMap<&'a str, Vec<&'a str>>,
    /// Fenced blocks: language and content.
    blocks: Vec<(&'a str, String)>,
    /// True when there is a title.
    titled: bool,
    /// All lines outside fenced blocks.
    prose: Vec<&'a str>,
}

impl<'a> Page<'a> {
    fn read(markdown: &'a str) -> Self {
        let mut page = Self {
            kind: Kind::Spec,
            headings: Vec::new(),
            sections: BTreeMap::new(),
            blocks: Vec::new(),
            titled: false,
            prose: Vec::new(),
        };
        let mut section = "";
        let mut fence: Option<(&str, &str, Vec<&str>)> = None;
        for line in markdown.lines() {
            let marks = fence_marks(line);
            if let Some((open, language, content)) = &mut fence {
                if marks.starts_with(*open) && line.trim() == marks {
                    page.blocks.push((*language, content.join("\n")));
                    fence = None;
                } else {
                    content.push(line);
                }
                continue;
            }
            if !marks.is_empty() {
                // ```` ```mermaid {theme: dark} ```` is Mermaid too.
                let info = line.trim_start()[marks.len()..].trim_start();
                let language = info.split(|c: char| c.is_whitespace() || c == '{').next().unwrap_or_default();
                fence = Some((marks, language, Vec::new()));
                continue;
            }
            page.prose.push(line);
            if let Some(heading) = line.strip_prefix("## ") {
                section = heading.trim();
                page.headings.push(section);
                page.sections.entry(section).or_default();
            } else if let Some(title) = line.strip_prefix("# ") {
                page.titled |= !title.trim().is_empty() && title.trim() != "Untitled";
            } else {
                // What other kinds have as a section of its own, a record has below one.
                if let Some(heading) = line.strip_prefix("### ")
                    && BELOW.iter().any(|field| field.heading() == heading)
                {
                    section = heading;
                }
                page.sections.entry(section).or_default().push(line);
            }
        }
        if let Some((_, language, content)) = fence {
            page.blocks.push((language, content.join("\n")));
        }
        let has = |field: Field| page.headings.contains(&field.heading());
        page.kind = if has(Field::Outcome) {
            Kind::Adr
        } else if has(Field::Findings) {
            Kind::Review
        } else if has(Field::Changes) {
            Kind::Refine
        } else {
            Kind::Spec
        };
        page
    }

    fn section(&self, field: Field) -> &[&'a str] {
        self.sections.get(field.heading_in(self.kind)).map_or(&[], Vec::as_slice)
    }

    /// The lines of *Sources*.
    fn sources(&self) -> &[&'a str] {
        self.sections.get(SOURCES).map_or(&[], Vec::as_slice)
    }

    /// The lines of all other sections.
    fn lines(&self) -> impl Iterator<Item = &'a str> {
        let others = self.sections.iter().filter(|(heading, _)| **heading != SOURCES);
        others.flat_map(|(_, lines)| lines).copied()
    }

    /// The list items of a section.
    fn items(&self, field: Field) -> impl Iterator<Item = &'a str> {
        self.section(field).iter().filter_map(|line| item(line))
    }

    /// True when the section says something.
    fn says(&self, field: Field) -> bool {
        let said = self.section(field).iter().any(|line| {
            let line = line.trim();
            !line.is_empty()
                && !line.starts_with("###")
                // What stands between the title and a record's summary.
                && !["> **Note:**", "- Status: ", "- Date: "].iter().any(|begin| line.starts_with(begin))
                && !matches!(line, NONE_GIVEN | NONE_FOUND)
                && !is_nothing(line, field)
        });
        said || (field == Field::Diagrams && !self.blocks.is_empty())
    }
}

/// The marks that open or close a fenced block, if this line has some; however far it is indented.
fn fence_marks(line: &str) -> &str {
    let line = line.trim_start();
    let mark = if line.starts_with('~') { '~' } else { '`' };
    let rest = line.trim_start_matches(mark);
    let marks = &line[..line.len() - rest.len()];
    // Backticks further on make it code within a line.
    if marks.len() < 3 || (mark == '`' && rest.contains('`')) { "" } else { marks }
}

/// The text of a list's item.
fn item(line: &str) -> Option<&str> {
    ["- ", "* ", "+ "].iter().find_map(|bullet| line.strip_prefix(bullet))
}

/// True of what is more than a filler; citations and marks are no words of it.
fn says_something(text: &str) -> bool {
    let words = plain_words(&unmarked(text));
    words.len() >= 2 && !is_placeholder(&words)
}

/// A line that stands in a section and leaves it empty.
fn is_nothing(line: &str, field: Field) -> bool {
    if line.starts_with(['>', '|']) {
        return false;
    }
    let words = plain_words(&unmarked(item(line).unwrap_or(line)));
    is_placeholder(&words)
        || words.iter().all(|word| matches!(word.as_str(), "none" | "nothing" | "unknown"))
        || (field == Field::OpenQuestions && is_honest_nothing(&words))
}

/// Somebody meant to write something here.
fn is_placeholder(words: &[String]) -> bool {
    let is_open = words.len() <= 3 && words.starts_with(&["to".to_owned(), "be".to_owned()]);
    let all = words.iter().all(|word| PLACEHOLDERS.contains(&word.as_str()));
    !words.is_empty() && (all || is_open)
}

/// The words of a text, in lower case and without the signs around them.
fn plain_words(text: &str) -> Vec<String> {
    text.split_whitespace().map(words::plain).filter(|word| !word.is_empty()).collect()
}

/// A text without what the renderer wrote beside its statements, and without its citations.
fn unmarked(text: &str) -> Cow<'_, str> {
    static CITED: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new(r"\s*\[\d{1,5}\]").ok());
    let text = without_marks(text);
    match &*CITED {
        Some(cited) => Cow::Owned(cited.replace_all(&text, "").into_owned()),
        None => text,
    }
}

/// A text without the marks that say where its statements come from.
fn without_marks(text: &str) -> Cow<'_, str> {
    static MARK: LazyLock<Option<Regex>> =
        LazyLock::new(|| Regex::new(&format!(r"\s*\*\((?:{MARKS})\b.*?\)\*")).ok());
    MARK.as_ref().map_or(Cow::Borrowed(text), |mark| mark.replace_all(text, ""))
}

fn check(name: &str, score: f64, detail: impl Into<String>) -> Check {
    Check { name: name.to_owned(), score: score.clamp(0.0, 1.0), detail: detail.into() }
}

/// The share, or full marks where there is nothing to count.
fn share(part: usize, whole: usize) -> f64 {
    if whole == 0 { 1.0 } else { part as f64 / whole as f64 }
}

fn complete(page: &Page<'_>) -> Check {
    // A record needs no picture.
    let optional = |field: Field| page.kind == Kind::Adr && field == Field::Diagrams;
    let wanted: Vec<Field> = page
        .kind
        .fields()
        .iter()
        .copied()
        .filter(|field| *field != Field::Title && !optional(*field))
        .collect();
    let empty: Vec<&str> =
        wanted.iter().filter(|field| !page.says(**field)).map(|field| field.heading()).collect();
    let mut score = share(wanted.len() - empty.len(), wanted.len());
    let mut detail = if empty.is_empty() {
        format!("all {} sections say something", wanted.len())
    } else {
        format!("nothing in {}", empty.join(", "))
    };
    if !page.titled {
        score -= 0.1;
        detail.push_str("; no title");
    }
    let open =
        page.lines().flat_map(statements).filter(|statement| is_placeholder(&plain_words(statement))).count();
    if open > 0 {
        score -= PRICE_OF_A_PLACEHOLDER * open as f64;
        let _ = write!(detail, "; {open} × TBD or the like");
    }
    check("complete", score, detail)
}

fn headings(page: &Page<'_>) -> Check {
    let wanted = page.kind.headings();
    let missing: Vec<&str> =
        wanted.iter().copied().filter(|heading| !page.headings.contains(heading)).collect();
    let foreign: Vec<&str> =
        page.headings.iter().copied().filter(|heading| !wanted.contains(heading)).collect();
    if page.headings == wanted {
        return check("headings", 1.0, "the stable ones, in order");
    }
    let detail = match (missing.as_slice(), foreign.as_slice()) {
        ([], []) => "in another order, or twice".to_owned(),
        (missing, []) => format!("missing: {}", missing.join(", ")),
        ([], foreign) => format!("unknown: {}", foreign.join(", ")),
        (missing, foreign) => format!("missing: {}; unknown: {}", missing.join(", "), foreign.join(", ")),
    };
    let faults = missing.len() + foreign.len();
    check("headings", (1.0 - share(faults.max(1), wanted.len())).min(0.9), detail)
}

/// Two alternatives, consequences and a reason for every decision; two options for a record.
fn decisions(page: &Page<'_>) -> Check {
    const NAME: &str = "decisions";
    if page.kind == Kind::Review {
        let findings = page.section(Field::Findings);
        let count = findings.iter().filter(|line| line.starts_with("### ")).count();
        let advised = findings
            .iter()
            .filter(|line| {
                line.strip_prefix("**Do:**").is_some_and(|advice| !is_placeholder(&plain_words(advice)))
            })
            .count();
        let detail = format!("{advised} of {count} findings say what to do");
        return check(NAME, if count == 0 { 0.0 } else { share(advised.min(count), count) }, detail);
    }
    if page.kind == Kind::Adr {
        let weighed = page.sections.get(PROS_AND_CONS).map_or(&[][..], Vec::as_slice);
        let named: BTreeSet<Vec<String>> =
            weighed.iter().filter_map(|line| line.strip_prefix("### ")).map(plain_words).collect();
        let options = named.len();
        let weighed = options >= 2 && page.says(Field::Outcome);
        return check(NAME, if weighed { 1.0 } else { 0.0 }, format!("{options} options weighed"));
    }
    let (mut count, mut good) = (0, 0);
    let mut current: Option<Weighing> = None;
    for line in page.section(Field::Decisions).iter().chain([&"### "]) {
        if line.starts_with("### ") {
            if let Some(done) = current.replace(Weighing::default()) {
                count += 1;
                good += usize::from(done.alternatives() >= 2 && done.consequences >= 1 && done.reason);
            }
            continue;
        }
        let Some(weighing) = &mut current else { continue };
        match line.trim() {
            "**Alternatives**" => weighing.list = List::Alternatives,
            "**Consequences**" => weighing.list = List::Consequences,
            line => match (item(line), &weighing.list) {
                (Some(text), List::Alternatives) => {
                    weighing.weigh(text);
                }
                (Some(text), List::Consequences) => {
                    weighing.consequences += usize::from(says_something(text));
                }
                (Some(_), List::None) => {}
                (None, _) => {
                    weighing.reason |= line.split_once("*Why:*").is_some_and(|(_, why)| says_something(why));
                }
            },
        }
    }
    let detail = format!("{good} of {count} have a reason, two alternatives and consequences");
    check(NAME, if count == 0 { 0.0 } else { share(good, count) }, detail)
}

#[derive(Default)]
struct Weighing {
    list: List,
    /// What the alternatives are called, and what speaks against them: each once.
    names: BTreeSet<Vec<String>>,
    objections: BTreeSet<Vec<String>>,
    consequences: usize,
    reason: bool,
}

impl Weighing {
    /// Notes an alternative that says something: `*Name*: what speaks against it`.
    fn weigh(&mut self, text: &str) {
        if !says_something(text) {
            return;
        }
        let (name, objection) = match text.strip_prefix('*').and_then(|text| text.split_once("*:")) {
            Some(parts) => parts,
            None => (text, text),
        };
        let objection = plain_words(&unmarked(objection));
        if !objection.is_empty() && !is_placeholder(&objection) {
            self.names.insert(plain_words(name));
            self.objections.insert(objection);
        }
    }

    /// One alternative under two names, or refused twice for the same words, is one.
    fn alternatives(&self) -> usize {
        self.names.len().min(self.objections.len())
    }
}

#[derive(Default)]
enum List {
    #[default]
    None,
    Alternatives,
    Consequences,
}

/// `[3]` outside code.
fn markers(line: &str) -> Vec<u32> {
    static MARKER: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new(r"\[(\d{1,5})\]").ok());
    let Some(marker) = &*MARKER else { return Vec::new() };
    marker.captures_iter(line).filter_map(|found| found[1].parse().ok()).collect()
}

fn is_labelled(line: &str) -> bool {
    is_general(line) || line.contains("*(from the request)*")
}

/// Also where passages are cited that hardly speak of it.
fn is_general(line: &str) -> bool {
    line.contains("*(general knowledge") || line.contains("*(no passage says this")
}

fn components(page: &Page<'_>) -> Check {
    const NAME: &str = "components";
    if !page.kind.fields().contains(&Field::Components) {
        return check(NAME, 1.0, "not part of this kind");
    }
    let all: Vec<&str> = page.items(Field::Components).collect();
    let told = all
        .iter()
        .filter(|line| !markers(line).is_empty() || is_labelled(line))
        .filter(|line| !told_by(line).is_empty())
        .count();
    let empty = all.iter().filter(|line| told_by(line).is_empty()).count();
    let mut detail = format!("{told} of {} say where they come from", all.len());
    if empty > 0 {
        let _ = write!(detail, "; {empty} do nothing");
    }
    check(NAME, if all.is_empty() { 0.0 } else { share(told, all.len()) }, detail)
}

/// The words of an item beside its name, its marks and its citations.
fn told_by(line: &str) -> Vec<String> {
    statements(line).into_iter().flat_map(plain_words).collect()
}

/// What an item says, for telling it from others. A statement in bold is one as well.
fn claim(line: &str) -> Vec<String> {
    let told = told_by(line);
    let bold = plain_words(&unmarked(line));
    if told.is_empty() && bold.len() >= STATEMENT_WORDS && !line.contains("**:") { bold } else { told }
}

/// An entry of *Sources*.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// Its number in the text.
    pub n: u32,
    /// Path of the file.
    pub path: String,
    /// First line, counted from 1.
    pub start: u32,
    /// Last line, included.
    pub end: u32,
    /// The commit that has them, in lower-case hex, as a rule its first twelve digits.
    pub commit: Option<String>,
}

/// What was found where a source says it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Lookup {
    /// Its file has these lines.
    Found,
    /// It has not; the reason in a few words.
    Wrong(String),
    /// Nobody looked; the reason in a few words.
    NotChecked(String),
}

/// The sources that a document lists, those whose lines can be read.
pub fn sources(markdown: &str) -> Vec<Source> {
    let page = Page::read(markdown);
    let listed = page.sources();
    listed.iter().filter_map(|line| source(line)).collect()
}

fn source(line: &str) -> Option<Source> {
    static SOURCE: LazyLock<Option<Regex>> =
        LazyLock::new(|| Regex::new(r"^[-*+] \[(\d{1,5})\] `([^`]+):(\d+)-(\d+)`").ok());
    let found = SOURCE.as_ref()?.captures(line)?;
    let source = Source {
        n: found[1].parse().ok()?,
        path: found[2].to_owned(),
        start: found[3].parse().ok()?,
        end: found[4].parse().ok()?,
        commit: commit(&line[found[0].len()..]),
    };
    (1 <= source.start && source.start <= source.end).then_some(source)
}

/// `(atlas at 21ad0150a341…)`, after a heading that somebody else wrote and before a link.
fn commit(origin: &str) -> Option<String> {
    static COMMIT: LazyLock<Option<Regex>> =
        LazyLock::new(|| Regex::new(r"\((?:[^()]*\s)?at ([0-9a-f]{7,64})…?\)").ok());
    let origin = origin.split(" — [open](").next().unwrap_or_default();
    let last = COMMIT.as_ref()?.captures_iter(origin).last()?;
    Some(last[1].to_owned())
}

/// What was found of the sources, in words: how many are wrong, and which were checked at all.
fn told_of(looked_up: &[(Source, Lookup)]) -> (usize, String) {
    /// Sources that are named, each with its reason.
    const NAMED: usize = 5;
    let mut wrong = Vec::new();
    let mut not_checked: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for (Source { n, path, start, end, .. }, found) in looked_up {
        match found {
            Lookup::Found => {}
            Lookup::Wrong(why) => {
                let place = clean::cut(&clean::line(&format!("{path}:{start}-{end}")), 100);
                wrong.push(format!("[{n}] {place} ({why})"));
            }
            Lookup::NotChecked(why) => not_checked.entry(why).or_default().push(format!("[{n}]")),
        }
    }
    let count = wrong.len();
    let mut told = String::new();
    if count > NAMED {
        wrong.truncate(NAMED);
        wrong.push(format!("and {} more", count - NAMED));
    }
    if count > 0 {
        let _ = write!(told, "; wrong: {}", wrong.join(", "));
    }
    if !not_checked.is_empty() {
        let reasons: Vec<String> =
            not_checked.iter().map(|(why, which)| format!("{} ({why})", which.join(" "))).collect();
        let _ = write!(told, "; not checked: {}", reasons.join(", "));
    }
    (count, told)
}

fn citations(page: &Page<'_>, looked_up: Option<&[(Source, Lookup)]>) -> Check {
    let sources = page.sources();
    let (mut listed, mut malformed, mut again) = (BTreeSet::new(), 0, 0);
    let mut places = BTreeSet::new();
    for line in sources.iter().filter(|line| item(line).is_some()) {
        match source(line) {
            Some(source) => {
                listed.insert(source.n);
                again +=
                    usize::from(!places.insert((source.path, source.start, source.end, collection(line))));
            }
            None => malformed += 1,
        }
    }
    let cited: BTreeSet<u32> = page.lines().flat_map(markers).collect();
    let unlisted = cited.difference(&listed).count();
    let unused = listed.difference(&cited).count();
    let weak = sources.iter().filter(|line| line.contains("*weak:")).count();
    let (wrong, told) = looked_up.map_or((0, String::new()), told_of);
    // What a statement says and its passages do not is as weak as a citation that does not speak of it.
    let unsaid = page.prose.iter().filter(|line| line.contains("*(in no passage:")).count();
    let faults = unlisted + unused + malformed + weak + wrong + again + unsaid;
    if listed.is_empty() && unlisted + malformed == 0 {
        return check("citations", 0.0, "nothing is cited");
    }
    if faults == 0 {
        return check("citations", 1.0, format!("{} sources, each cited, none missing{told}", listed.len()));
    }
    let mut detail =
        format!("{unlisted} not listed, {unused} not cited, {malformed} without lines, {weak} weak");
    if again > 0 {
        let _ = write!(detail, ", {again} listed again");
    }
    if unsaid > 0 {
        let _ = write!(detail, ", {unsaid} with what is in no passage");
    }
    detail.push_str(&told);
    check("citations", 1.0 - share(faults, listed.len() + unlisted + malformed + unsaid), detail)
}

/// `atlas at 21ad0150a341…` of a source: the same lines of two collections are two places.
fn collection(line: &str) -> String {
    let origin = line.split(" — [open](").next().unwrap_or_default();
    let last = origin.rsplit_once('(').and_then(|(_, last)| last.split_once(')'));
    last.map_or_else(String::new, |(collection, _)| collection.to_owned())
}

/// How much of what is said stands on a passage.
fn grounding(page: &Page<'_>, looked_up: Option<&[(Source, Lookup)]>) -> Check {
    let listed = page.sources();
    let mut holding: BTreeSet<u32> =
        listed.iter().filter_map(|line| source(line)).map(|source| source.n).collect();
    for (source, _) in looked_up.unwrap_or_default().iter().filter(|(_, it)| matches!(it, Lookup::Wrong(_))) {
        holding.remove(&source.n);
    }
    let claims: Vec<&str> = page
        .kind
        .fields()
        .iter()
        .filter(|field| {
            // A record's status and date stand above its summary.
            !matches!(field, Field::Summary | Field::OpenQuestions | Field::Decisions | Field::Options)
        })
        .flat_map(|field| page.items(*field))
        .filter(|line| !line.contains("*(from the request)*"))
        .collect();
    // What is said again stands on its passage once, and what says nothing on none.
    let cited: BTreeSet<Vec<String>> = claims
        .iter()
        .filter(|line| markers(line).iter().any(|n| holding.contains(n)) && !is_general(line))
        .map(|line| claim(line))
        .filter(|claim| !claim.is_empty())
        .collect();
    let cited = cited.len();
    let honest = claims.iter().filter(|line| !markers(line).is_empty() || is_labelled(line)).count();
    let detail = format!(
        "{cited} of {} statements cite a passage, {} are unmarked",
        claims.len(),
        claims.len() - honest
    );
    if claims.is_empty() {
        return check("grounding", 0.0, "no statements");
    }
    check(
        "grounding",
        (share(cited, claims.len()) / WANTED_GROUNDING).min(1.0) * share(honest, claims.len()),
        detail,
    )
}

fn diagrams(page: &Page<'_>) -> Check {
    let drawn: Vec<&String> =
        page.blocks.iter().filter(|(language, _)| *language == "mermaid").map(|(_, source)| source).collect();
    let good = drawn.iter().filter(|source| mermaid::check(source).is_ok()).count();
    let shown_as_text = page
        .section(Field::Diagrams)
        .iter()
        // The second note is of older documents.
        .filter(|line| {
            [UNCHECKED_DIAGRAM, "this diagram does not render"].iter().any(|note| line.contains(note))
        })
        .count();
    let all = drawn.len() + shown_as_text;
    let optional = matches!(page.kind, Kind::Adr);
    let detail = format!("{good} of {all} render");
    check("diagrams", if all == 0 && !optional { 0.0 } else { share(good, all) }, detail)
}

fn length(page: &Page<'_>) -> Check {
    let text: Vec<Cow<'_, str>> =
        page.prose.iter().filter(|line| !line.starts_with('#')).map(|line| without_marks(line)).collect();
    let words: usize = text.iter().map(|line| line.split_whitespace().count()).sum();
    let sentences: usize = text
        .iter()
        .filter(|line| !line.trim().is_empty())
        .map(|line| line.matches(['.', '!', '?']).count().max(1))
        .sum();
    let mean = words as f64 / sentences.max(1) as f64;
    let mut score = 1.0;
    if words < *WORDS.start() {
        score = share(words, *WORDS.start());
    } else if words > *WORDS.end() {
        score = share(*WORDS.end(), words);
    }
    if mean > MAX_SENTENCE_WORDS {
        score *= MAX_SENTENCE_WORDS / mean;
    }
    let mut detail = format!("{words} words, {mean:.0} a sentence");
    let longest = page
        .lines()
        .flat_map(statements)
        .map(|statement| statement.split_whitespace().count())
        .max()
        .unwrap_or_default();
    if longest > LONGEST_SENTENCE {
        score *= share(LONGEST_SENTENCE, longest);
        let _ = write!(detail, ", one of {longest}");
    }
    check("length", score, detail)
}

/// What is said in many places fits everywhere, so it says nothing anywhere.
fn repetition(page: &Page<'_>) -> Check {
    // By its words: how it was written first, and in how many places it stands.
    let mut said: BTreeMap<String, (&str, usize)> = BTreeMap::new();
    let elsewhere = [SOURCES, Field::Changes.heading()];
    let sections = page.sections.iter().filter(|(heading, _)| !elsewhere.contains(*heading));
    for line in sections.flat_map(|(_, lines)| lines) {
        for (words, statement) in said_in(line) {
            said.entry(words).or_insert((statement, 0)).1 += 1;
        }
    }
    let of_every_decision = consequences_of_every_decision(page);
    let mut again: Vec<(&str, usize)> = said
        .into_iter()
        .filter(|(words, (_, places))| *places >= AGAIN || of_every_decision.contains(words))
        .map(|(_, found)| found)
        .collect();
    again.sort_by(|a, b| b.1.cmp(&a.1).then(a.0.cmp(b.0)));
    if again.is_empty() {
        return check("repetition", 1.0, format!("no statement stands in {AGAIN} places"));
    }
    let further: usize = again.iter().map(|(_, places)| places - 1).sum();
    let mut named: Vec<String> = again
        .iter()
        .take(NAMED_AGAIN)
        .map(|(statement, places)| format!("{places} times “{}”", clean::cut(&clean::line(statement), 60)))
        .collect();
    if again.len() > NAMED_AGAIN {
        named.push(format!("{} more", again.len() - NAMED_AGAIN));
    }
    check("repetition", 1.0 - PRICE_OF_AGAIN * further as f64, named.join(", "))
}

/// What distinguishes no decision from another: the consequences that all of them have, where there are several.
fn consequences_of_every_decision(page: &Page<'_>) -> BTreeSet<String> {
    let mut decisions: Vec<BTreeSet<String>> = Vec::new();
    let mut is_consequence = false;
    for line in page.section(Field::Decisions) {
        if line.starts_with("### ") {
            decisions.push(BTreeSet::new());
        }
        if item(line).is_none() && !line.trim().is_empty() {
            is_consequence = line.trim() == "**Consequences**";
        } else if is_consequence && let Some(decision) = decisions.last_mut() {
            decision.extend(said_in(line).into_keys());
        }
    }
    let several = decisions.len() > 1;
    decisions.into_iter().reduce(|all, one| &all & &one).filter(|_| several).unwrap_or_default()
}

/// The statements of a line by their words, each once.
fn said_in(line: &str) -> BTreeMap<String, &str> {
    let mut said = BTreeMap::new();
    for statement in statements(line) {
        let words = plain_words(statement);
        if words.len() < STATEMENT_WORDS || is_honest_nothing(&words) {
            continue;
        }
        // "It scales well" and "This scales well" are one.
        let subject = usize::from(matches!(words[0].as_str(), "it" | "this" | "that" | "they" | "these"));
        said.entry(words[subject..].join(" ")).or_insert(statement);
    }
    said
}

/// The sentences of a line, without what names or marks them. A name, a label, a technology or an interface
/// is no statement, and many parts may have the same.
fn statements(line: &str) -> Vec<&str> {
    static LEAD: LazyLock<Option<Regex>> =
        LazyLock::new(|| Regex::new(r"^(?:\*\*[^*]+\*\*(?: \([^)]*\))?:?|\*[^*]+\*:)\s*").ok());
    static END: LazyLock<Option<Regex>> = LazyLock::new(|| {
        Regex::new(r"[.!?;][*_\x22”'`)]*(?:\s+|$)|\s*\*(?:Why|Mitigation):\*\s*|\s*\*Interfaces:\*.*$|\s*\[\d{1,5}\]\s*|\s*\*\(.*?\)\*\s*").ok()
    });
    let (Some(lead), Some(end)) = (&*LEAD, &*END) else { return Vec::new() };
    if line.starts_with(['#', '>', '|']) {
        return Vec::new();
    }
    let line = line.trim();
    let text = item(line).unwrap_or(line);
    // `*None given.*` and the like speak of the document.
    if text.starts_with('*') && text.ends_with('*') && !text.starts_with("**") {
        return Vec::new();
    }
    let text = &text[lead.find(text).map_or(0, |lead| lead.end())..];
    end.split(text).filter(|statement| !statement.trim().is_empty()).collect()
}

/// There is nothing, and it is said: honest wherever it stands.
fn is_honest_nothing(words: &[String]) -> bool {
    match words {
        [first, ..] if matches!(first.as_str(), "none" | "nothing" | "unknown") => true,
        [first, second, ..] => match first.as_str() {
            "not" => matches!(second.as_str(), "applicable" | "known" | "decided" | "yet" | "part"),
            "no" => second == "passage",
            _ => false,
        },
        _ => false,
    }
}

fn language(page: &Page<'_>) -> Check {
    let text = page.prose.join("\n").to_lowercase();
    let found: Vec<&str> = BANNED.iter().copied().filter(|phrase| text.contains(phrase)).collect();
    if found.is_empty() {
        return check("language", 1.0, "no banned phrase");
    }
    check("language", 1.0 - 0.25 * found.len() as f64, format!("says {}", found.join(", ")))
}

/// What must never be in a document, whoever wrote it: HTML, a link that is more than a link, a picture from
/// elsewhere (who reads the document would be seen there).
fn safety(markdown: &str, page: &Page<'_>) -> Check {
    let mut found = BTreeMap::new();
    // Where a link leads whose text is being read, and the text.
    let mut link: Option<(String, String)> = None;
    for event in Parser::new_ext(markdown, Options::ENABLE_TABLES | Options::ENABLE_STRIKETHROUGH) {
        match &event {
            Event::Start(Tag::Link { dest_url, .. }) => link = Some((dest_url.to_string(), String::new())),
            Event::Text(text) | Event::Code(text) => {
                if let Some((_, shown)) = &mut link {
                    shown.push_str(text);
                }
            }
            Event::End(TagEnd::Link) => {
                if let Some((address, shown)) = link.take()
                    && is_elsewhere(&shown, &address)
                {
                    *found.entry("links that lead elsewhere than they say").or_insert(0) += 1;
                }
            }
            _ => {}
        }
        let what = match event {
            Event::Html(_) | Event::InlineHtml(_) => "HTML",
            Event::Start(Tag::Link { dest_url, .. }) if !is_plain_link(&dest_url) => "script links",
            Event::Start(Tag::Image { dest_url, .. }) if !is_relative(&dest_url) => "pictures from elsewhere",
            _ => continue,
        };
        *found.entry(what).or_insert(0) += 1;
    }
    // Diagrams and examples are drawn and copied.
    let in_blocks = page.blocks.iter().flat_map(|(_, source)| source.lines()).filter(|line| is_active(line));
    match in_blocks.count() {
        0 => {}
        lines => *found.entry("HTML").or_insert(0) += lines,
    }
    // A mark of the byte order begins files of some editors.
    let text = markdown.strip_prefix('\u{feff}').unwrap_or(markdown);
    match text.chars().filter(|c| *c != '\r' && clean::is_hidden(*c)).count() {
        0 => {}
        hidden => *found.entry("characters that hide or reorder text").or_insert(0) += hidden,
    }
    let credential = secrets::find(markdown).map(|(what, line)| format!("{what} in line {line}"));
    if found.is_empty() && credential.is_none() {
        return check("safety", 1.0, "no HTML, no script links");
    }
    let found: Vec<String> =
        found.iter().map(|(what, count)| format!("{count} × {what}")).chain(credential).collect();
    check("safety", 0.0, found.join(", "))
}

/// Does the text of a link name another host than the one that it leads to?
fn is_elsewhere(shown: &str, address: &str) -> bool {
    host(shown.trim()).is_some_and(|says| host(address.trim()).as_ref() != Some(&says))
}

/// The host of an address as a browser reads it, which takes `\` for `/` and what is before `@` for a name.
fn host(address: &str) -> Option<String> {
    let address = address.to_lowercase().replace('\\', "/");
    let rest = ["http://", "https://", "//"].iter().find_map(|scheme| address.strip_prefix(scheme));
    let rest = rest.or_else(|| address.starts_with("www.").then_some(address.as_str()))?;
    let host = rest.split(['/', '?', '#']).next()?.rsplit('@').next()?;
    let host = host.strip_prefix("www.").unwrap_or(host).split_whitespace().next()?;
    Some(host.trim_end_matches(['.', ',', '…']).to_owned())
}

/// HTML that does something, or a script link, in a fenced block.
fn is_active(line: &str) -> bool {
    static ACTIVE: LazyLock<Option<Regex>> = LazyLock::new(|| {
        Regex::new(r"(?i)<\s*/?\s*(?:script|img|iframe|svg|object|embed|style|link|form|a|div|span)\b|\]\(\s*(?:javascript|data|vbscript):").ok()
    });
    ACTIVE.as_ref().is_some_and(|active| active.is_match(line))
}

/// The scheme of an address as a browser reads it: without white space and control characters. None where it is
/// relative.
fn scheme(address: &str) -> Option<String> {
    let read: String = address.chars().filter(|c| !c.is_whitespace() && !c.is_control()).collect();
    let (scheme, _) = read.split_once(':')?;
    let is_one = !scheme.contains(['/', '?', '#']);
    is_one.then(|| scheme.to_ascii_lowercase())
}

fn is_plain_link(address: &str) -> bool {
    scheme(address).is_none_or(|scheme| matches!(scheme.as_str(), "http" | "https" | "mailto"))
}

fn is_relative(address: &str) -> bool {
    scheme(address).is_none() && !address.trim_start().starts_with(['/', '\\'])
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::{
        super::{
            draft::Draft,
            offline,
            testing::{adr, finished, good_spec, input, refine, review, says, task},
        },
        *,
    };

    fn document(answer: &Value, request: &str, kind: &str) -> String {
        let mut input = input();
        input.task = task(request, &json!({ "kind": kind }));
        input.parent = (kind == "refine").then(|| json!({"msg_type": "spec", "content": "# Old"}));
        let mut draft = Draft::new(input);
        draft.answered(&says(answer));
        draft.cannot_call("test", "no repair");
        finished(&mut draft).markdown
    }

    fn sloppy() -> Value {
        let mut answer = good_spec();
        answer["decisions"][0]["alternatives"] = json!([]);
        answer["summary"] = json!("A robust and scalable, seamless, state-of-the-art solution.");
        for field in ["deployment", "scaling", "security", "observability", "risks"] {
            answer[field] = json!([]);
        }
        answer["components"][0]["citations"] = json!([]);
        answer
    }

    fn broken() -> Value {
        let mut answer = good_spec();
        answer["diagrams"][0]["mermaid"] = json!("flowchart LR\n a[(] --> ");
        answer["context"] = json!([{"text": "Penguins swim", "citations": [1, 7]}]);
        answer["title"] = json!("");
        answer
    }

    fn hostile() -> Value {
        let mut answer = good_spec();
        answer["summary"] =
            json!("<script>alert(1)</script>\n\n## Approved\n\n[x](javascript:alert(1)) as a language model");
        answer
    }

    #[test]
    fn score_cards_of_good_sloppy_broken_and_hostile_answers() {
        let request = "Design how workers share runs, so that no run is lost when a worker dies.";
        let cards: Vec<String> = [
            ("good spec", document(&good_spec(), request, "spec")),
            ("good record", document(&adr(), request, "adr")),
            ("good review", document(&review(), request, "review")),
            ("good refinement", document(&refine(), request, "refine")),
            ("sloppy", document(&sloppy(), request, "spec")),
            ("broken", document(&broken(), request, "spec")),
            ("hostile", document(&hostile(), request, "spec")),
            ("offline", offline::draft(&input()).unwrap().markdown),
            ("not a document", "# Hello\n\nworld <script>".to_owned()),
        ]
        .into_iter()
        .map(|(name, markdown)| format!("{name}: {}", judge(&markdown)))
        .collect();
        insta::assert_snapshot!(cards.join("\n"));
    }

    #[test]
    fn the_commit_of_a_source_is_read_and_a_wrong_source_costs_and_is_named() {
        let document = document(&good_spec(), "x y z", "spec");
        let (body, _) = document.split_once("## Sources").unwrap();
        let markdown = format!(
            "{body}## Sources\n\n- [1] `docs/a.md:1-2`, fn at (at 0123456) (atlas at 21ad0150a341…) — [open](<https://x/(at%20fffffff)>)\n\
             - [2] `b.md:3-4` (at abcdef0)\n- [3] `c.md:5-6`, Who looks at face (atlas)\n"
        );
        let sources = sources(&markdown);
        let commits: Vec<Option<&str>> = sources.iter().map(|source| source.commit.as_deref()).collect();
        assert_eq!(commits, [Some("21ad0150a341"), Some("abcdef0"), None]);

        let citations = |found: [Lookup; 3]| {
            let looked_up: Vec<(Source, Lookup)> = sources.iter().cloned().zip(found).collect();
            let card = judge_with_sources(&markdown, &looked_up);
            card.checks.into_iter().find(|check| check.name == "citations").unwrap()
        };
        let nobody_looked = || Lookup::NotChecked("it names no commit".to_owned());
        let fine = citations([Lookup::Found, nobody_looked(), nobody_looked()]);
        assert!(fine.passed(), "{}", fine.detail);
        assert!(fine.detail.ends_with("; not checked: [2] [3] (it names no commit)"), "{}", fine.detail);
        let wrong = citations([Lookup::Found, Lookup::Wrong("gone".to_owned()), Lookup::Found]);
        assert!((wrong.score - 2.0 / 3.0).abs() < 1e-9, "{}", wrong.score);
        assert!(wrong.detail.ends_with("; wrong: [2] b.md:3-4 (gone)"), "{}", wrong.detail);
    }

    fn safe(markdown: &str) -> bool {
        judge(markdown).checks.iter().any(|check| check.name == "safety" && check.passed())
    }

    const EXAMPLES: [&str; 3] = [
        include_str!("../../../docs/examples/tenant-budgets.md"),
        include_str!("../../../docs/examples/adr-leases.md"),
        include_str!("../../../docs/examples/review-outbox.md"),
    ];

    fn check_of(markdown: &str, name: &str) -> Check {
        judge(markdown).checks.into_iter().find(|check| check.name == name).unwrap()
    }

    /// The first example, with what `change` makes of each of its lines.
    fn spoiled(change: impl Fn(&str) -> String) -> String {
        let (body, sources) = EXAMPLES[0].split_once("## Sources").unwrap();
        let body: String = body.lines().map(|line| change(line) + "\n").collect();
        format!("{body}## Sources{sources}")
    }

    #[test]
    fn honest_documents_lose_nothing_by_what_catches_empty_ones() {
        for (example, least) in EXAMPLES.iter().zip([100, 97, 100]) {
            let card = judge(example);
            assert!(card.score() >= least, "{card}");
        }
    }

    #[test]
    fn a_document_that_stands_on_no_passage_is_not_passed() {
        let regex = Regex::new(r" (?:\[\d+\] ?)+").unwrap();
        let honest = EXAMPLES[0].split_once("## Sources").unwrap().0;
        let honest = regex.replace_all(honest, " *(general knowledge)*") + "## Sources\n\n*None given.*\n";
        let card = judge(&honest);
        assert_eq!(card.score(), 70, "{card}");
        assert_eq!(check_of(&honest, "citations").detail, "nothing is cited; no score above 70");
        // One that is cited saves nothing.
        let one =
            honest.replacen("*(general knowledge)*", "[1]", 1).replace("*None given.*", "- [1] `a.md:1-2`");
        let card = judge(&one);
        assert!(card.score() < 80, "{card}");
    }

    #[test]
    fn what_is_written_to_please_the_checks_does_not() {
        let same_alternative = spoiled(|line| {
            if line.starts_with("- *") && line.contains("*:") && !line.starts_with("- **") {
                "- *Same thing*: it is not good enough here.".to_owned()
            } else {
                line.to_owned()
            }
        });
        let cited = Regex::new(r"^- [^*].*?((?: \[\d+\])+)$").unwrap();
        let same_statement =
            spoiled(|line| cited.replace(line, "- The system does the thing$1").into_owned());
        let component = Regex::new(r"^- (\*\*\w[^*]*\*\*) \(.*?((?: \[\d+\])+| \*\([^)]*\)\*)$").unwrap();
        let empty_components = spoiled(|line| component.replace(line, "- $1:$2").into_owned());
        let reason = Regex::new(r"\*Why:\* .*?((?: \[\d+\])+)$").unwrap();
        let no_reasons = spoiled(|line| reason.replace(line, "*Why:* TBD$1").into_owned());
        let place = Regex::new(r"(?m)^(- \[\d+\]) .*$").unwrap();
        let one_place = place.replace_all(EXAMPLES[0], "$1 `README.md:1-1`").into_owned();
        for (what, markdown, name) in [
            ("one alternative", same_alternative, "decisions"),
            ("one statement", same_statement, "grounding"),
            ("empty components", empty_components.clone(), "components"),
            ("no reasons", no_reasons, "decisions"),
            ("one place", one_place, "citations"),
        ] {
            let found = check_of(&markdown, name);
            assert!(found.score < 0.5, "{what}: {}", judge(&markdown));
            assert!(
                judge(&markdown).score() < if name == "components" { 95 } else { 90 },
                "{what}: {}",
                judge(&markdown)
            );
        }
        assert!(check_of(&empty_components, "components").detail.ends_with("; 5 do nothing"));
    }

    #[test]
    fn nothing_under_a_heading_and_a_sentence_without_end_cost() {
        let (head, tail) = EXAMPLES[0].split_once("## Open questions").unwrap();
        let sources = tail.split_once("## Sources").unwrap().1;
        for nothing in ["- None.", "- None known.", "TBD", "- To be decided."] {
            let markdown = format!("{head}## Open questions\n\n{nothing}\n\n## Sources{sources}");
            let found = check_of(&markdown, "complete");
            assert!(found.detail.starts_with("nothing in Open questions"), "{nothing}: {}", found.detail);
        }
        let endless = format!("- {}\n", "and then it goes on ".repeat(300));
        let markdown = EXAMPLES[0].replacen("## Scaling\n\n", &format!("## Scaling\n\n{endless}"), 1);
        let found = check_of(&markdown, "length");
        assert!(found.score < 0.1 && found.detail.ends_with(", one of 1500"), "{}", found.detail);
    }

    #[test]
    fn what_is_in_no_passage_is_weak_and_marks_are_no_words() {
        let document = document(&good_spec(), "x y z", "spec");
        let marked = document.replacen(" [1]\n", " [1] *(in no passage: “3 (three)”, “Oracle”)*\n", 1);
        assert_ne!(marked, document);
        let found = check_of(&marked, "citations");
        assert!((found.score - 0.75).abs() < 1e-9, "{}", found.detail);
        assert!(found.detail.ends_with(", 1 with what is in no passage"), "{}", found.detail);
        assert_eq!(check_of(&marked, "length"), check_of(&document, "length"));
        assert_eq!(check_of(&marked, "repetition"), check_of(&document, "repetition"));
    }

    #[test]
    fn what_hides_or_deceives_or_gives_away_is_not_safe_and_not_passed() {
        let token = format!("ghp_{}", "a1B2c3D4e5F6".repeat(3));
        for bad in [
            "a\u{202e}b",
            "a\u{200b}b",
            token.as_str(),
            "[http://bank.example](http://evil.example/login)",
            "[www.bank.example/a](https://bank.example@evil.example/a)",
            "[`https://bank.example`](login)",
        ] {
            assert!(!safe(bad), "{bad}");
            let markdown = format!("{}\n{bad}\n", EXAMPLES[0]);
            assert_eq!(judge(&markdown).score(), 70, "{bad}");
            assert!(!check_of(&markdown, "safety").detail.contains(&token));
        }
        for good in [
            "\u{feff}# T\r\n\r\ntext\r\n",
            "[https://bank.example/…](https://www.bank.example/login) [bank](http://evil.example) 👩\u{fe0f}",
            "A token begins with `ghp_`.",
        ] {
            assert!(safe(good), "{good}");
        }
    }

    #[test]
    fn no_html_and_no_link_that_acts_is_safe() {
        for bad in [
            "<video onerror=alert(1)>",
            "text <details ontoggle=alert(1)>",
            "<base href=x>",
            "a <math> b",
            "<!-- hidden -->",
            "[x][y]\n\n[y]: javascript:alert(1)",
            "<javascript:alert(1)>",
            "[x](<javascript:alert(1)>)",
            "[x](java&#115;cript:alert(1))",
            "[x](&Tab;javascript:alert(1))",
            "[x](JavaScript:alert(1))",
            "[x](data:text/html,x)",
            "![x](https://example.org/seen.png)",
            "![x](//example.org/seen.png)",
            "```js\n<script>alert(1)</script>\n```",
        ] {
            assert!(!safe(bad), "{bad}");
        }
        for good in [
            "[x](https://example.org/a:b) [y](#part) [z](docs/a.md) <https://example.org> <me@example.org>",
            "`<script>` and `Vec<T>`, a < b, 1 <2",
            "![plan](plan.png)",
            "```rust\nlet a: Vec<u8> = b;\n```",
        ] {
            assert!(safe(good), "{good}");
        }
    }

    #[test]
    fn a_broken_diagram_is_found_in_any_fence() {
        let broken = "flowchart LR\n a[(] --> ";
        for (open, close) in [
            ("```mermaid", "```"),
            ("~~~mermaid", "~~~"),
            ("  ```mermaid", "  ```"),
            ("````mermaid {a: 1}", "````"),
        ] {
            let text = format!("# T\n\n## Diagrams\n\n{open}\n{broken}\n{close}\n");
            let card = judge(&text);
            let diagrams = card.checks.iter().find(|check| check.name == "diagrams").unwrap();
            assert!(!diagrams.passed(), "{open}: {}", diagrams.detail);
        }
    }

    #[test]
    fn fillers_weigh_nothing_and_any_bullet_lists() {
        let document = document(&good_spec(), "x y z", "spec");
        let score = |text: &str| judge(text).score();
        assert_eq!(score(&document.replace("\n- ", "\n* ")), score(&document));
        let empty = document.replace("*Why:*", "*Why:* x\n\n*Because:*");
        assert!(score(&empty) < score(&document));
    }

    #[test]
    fn statements_that_are_said_again_and_again_cost_and_are_named() {
        let repetition = |answer: &Value| {
            let card = judge(&document(answer, "x y z", "spec"));
            card.checks.into_iter().find(|check| check.name == "repetition").unwrap()
        };
        let good = repetition(&good_spec());
        assert!(good.passed(), "{}", good.detail);

        let mut empty = good_spec();
        for field in ["deployment", "scaling", "security", "observability"] {
            empty[field] = json!([{"text": "This scales well", "citations": []}]);
        }
        empty["context"][0]["text"] = json!("Runs are leased. It scales well!");
        let empty = repetition(&empty);
        assert!(empty.score < 0.7, "{}", empty.score);
        assert!(empty.detail.contains("5 times “It scales well”"), "{}", empty.detail);

        // The same price for every decision.
        let mut decisions = good_spec();
        let one = decisions["decisions"][0].clone();
        decisions["decisions"] = json!([one, one, one]);
        for n in 0..3 {
            decisions["decisions"][n]["title"] = json!(format!("Number {n}"));
            decisions["decisions"][n]["consequences"] = json!(["Bad: somebody has to run it"]);
        }
        let decisions = repetition(&decisions);
        assert!(decisions.detail.contains("3 times “Bad: somebody has to run it”"), "{}", decisions.detail);
    }

    #[test]
    fn a_consequence_of_every_decision_is_that_of_none() {
        let two = |consequences: [&str; 2]| {
            let mut answer = good_spec();
            let mut second = answer["decisions"][0].clone();
            second["title"] = json!("Fences in the store");
            second["decision"] = json!("Every write names the lease that it stands on");
            answer["decisions"][0]["consequences"] = json!([consequences[0], "It can be tested alone"]);
            second["consequences"] = json!([consequences[1], "A late write is refused"]);
            answer["decisions"].as_array_mut().unwrap().push(second);
            let card = judge(&document(&answer, "x y z", "spec"));
            card.checks.into_iter().find(|check| check.name == "repetition").unwrap()
        };
        let same = two(["Somebody has to run it", "Somebody has to run it!"]);
        assert_eq!(same.detail, "2 times “Somebody has to run it”");
        assert!(two(["Somebody has to run it", "Somebody has to pay for it"]).passed());
    }

    #[test]
    fn names_and_honest_nothings_may_be_said_again() {
        let mut answer = good_spec();
        for field in ["deployment", "scaling", "security", "observability"] {
            answer[field] = json!([
                {"text": "None known at this time", "citations": []},
                {"text": "Not applicable to this part", "citations": []},
                {"text": "Postgres", "citations": []},
                {"text": format!("See the runbook of {field}"), "citations": []},
            ]);
        }
        let component = answer["components"][0].clone();
        answer["components"] = json!([component, component, component]);
        for n in 0..3 {
            answer["components"][n]["name"] = json!(format!("Number {n}"));
            answer["components"][n]["responsibility"] = json!(format!("Does the part {n} of the work"));
            answer["components"][n]["technology"] = json!("Rust on Kubernetes with Postgres");
        }
        let card = judge(&document(&answer, "x y z", "spec"));
        let found = card.checks.iter().find(|check| check.name == "repetition").unwrap();
        assert!(found.passed(), "{}", found.detail);
    }

    #[test]
    fn the_kind_is_told_by_the_headings() {
        let request = "x y z";
        for (answer, kind) in
            [(good_spec(), "spec"), (adr(), "adr"), (review(), "review"), (refine(), "refine")]
        {
            assert_eq!(judge(&document(&answer, request, kind)).kind.as_str(), kind);
        }
    }

    proptest! {
        #[test]
        fn any_text_can_be_judged(text in "\\PC{0,200}", lines in "[#\\-`\\[\\]0-9a-z\n *]{0,200}") {
            prop_assert!(judge(&text).score() <= 100);
            prop_assert!(judge(&lines).score() <= 100);
        }
    }
}
