//! Markdown from a document. Every text of the document is somebody else's: it is put into one line
//! and escaped, so that it can neither open a heading, a list, HTML or a link, nor look like one of
//! our citation markers.

use std::{borrow::Cow, collections::HashMap, fmt::Write as _, sync::LazyLock};

use jiff::civil::Date;
use regex::Regex;

use super::{
    clean,
    finish::{Citation, CitationFault, Note, Standing},
    provenance::{self, Meaning},
    spec::{Claim, Field, Kind, MORE, PROS_AND_CONS, SOURCES, Severity, Spec, key},
};

/// What is rendered.
#[derive(Debug)]
pub(super) struct Input<'a> {
    pub(super) kind: Kind,
    /// When it was decided (ADR).
    pub(super) date: Option<Date>,
    pub(super) spec: &'a Spec,
    pub(super) request: &'a Meaning,
    pub(super) citations: &'a [Citation],
    pub(super) weak: &'a [CitationFault],
    /// What is to be said about statements, by their keys.
    pub(super) standing: &'a HashMap<String, Standing>,
    pub(super) notes: &'a [Note],
    pub(super) degraded: Option<&'a str>,
    pub(super) without_passages: bool,
}

/// Says of a diagram that it may not render.
pub(super) const UNCHECKED_DIAGRAM: &str = "this diagram is outside the subset of Mermaid that Atlas checks";
/// Marks a statement that no passage supports.
const GENERAL_KNOWLEDGE: &str = "*(general knowledge)*";
/// Marks one that names something of the team's: nobody knows that in general.
const NO_PASSAGE: &str = "*(no passage says this)*";
/// What stands in a section that the model said nothing for.
pub(super) const NONE_GIVEN: &str = "*None given.*";
/// The same without a model, where no passage said anything.
pub(super) const NONE_FOUND: &str = "*No passage that was found speaks about this.*";
/// Marks a statement whose passages share hardly a word with it, or say the opposite.
const UNSUPPORTED: &str = "*(no passage says this: what is cited hardly speaks of it)*";
/// Marks a citation like that where another one of the statement holds.
const WEAK: &str = "*(weak)*";
/// Marks a statement that repeats the request.
const FROM_THE_REQUEST: &str = "*(from the request)*";

/// Marks a change that the author did not name.
const BY_COMPARISON: &str = "*(found by comparison with the earlier document)*";

/// Renders a document.
pub(super) fn markdown(input: &Input<'_>) -> String {
    let mut page = Page {
        out: String::new(),
        request: input.request,
        standing: input.standing,
        offline: input.notes.contains(&Note::Offline),
    };
    page.notes(input);
    let title = inline(&input.spec.title);
    page.line(&format!("# {}", if title.is_empty() { "Untitled".to_owned() } else { title }));
    if input.kind == Kind::Adr {
        page.record(input);
    } else {
        for field in input.kind.fields().iter().filter(|field| **field != Field::Title) {
            page.section(&format!("## {}", field.heading()), *field, input.spec);
        }
    }
    page.sources(input);
    page.out.trim_end().to_owned() + "\n"
}

struct Page<'a> {
    out: String,
    request: &'a Meaning,
    standing: &'a HashMap<String, Standing>,
    offline: bool,
}

impl Page<'_> {
    /// A block: text and a blank line.
    fn line(&mut self, text: &str) {
        // Writing to a String cannot fail.
        let _ = write!(self.out, "{text}\n\n");
    }

    /// A line of a list.
    fn item(&mut self, text: &str) {
        let _ = writeln!(self.out, "- {text}");
    }

    /// The end of a list.
    fn gap(&mut self) {
        if !self.out.ends_with("\n\n") {
            self.out.push('\n');
        }
    }

    fn notes(&mut self, input: &Input<'_>) {
        let mut notes: Vec<String> = Vec::new();
        let lines = |faults: &[String]| {
            faults.iter().take(5).map(|fault| inline(fault)).collect::<Vec<_>>().join(" ")
        };
        for note in input.notes {
            notes.push(match note {
                Note::Offline => "No language model was configured: this is an extract, not a design. \
                    Every statement below is quoted from an indexed file, chosen by matching words; \
                    nothing was concluded from it."
                    .to_owned(),
                Note::CutOff => {
                    "The model's answer broke off at its length limit. What is missing after that \
                    point was not written."
                        .to_owned()
                }
                Note::Incomplete(faults) => {
                    format!("The model's answer had faults that one repair did not cure: {}", lines(faults))
                }
                Note::Unmended(faults) => format!(
                    "The model's answer had faults, and the call that should mend them could not be made: {}",
                    lines(faults)
                ),
                Note::Shortened => {
                    "The model's answer was longer than a document may be; it was shortened.".to_owned()
                }
                Note::Unnamed(count) => format!(
                    "The author did not name {count} difference{} from the earlier document. Comparison found \
                     {}: see *What changed*.",
                    if *count == 1 { "" } else { "s" },
                    if *count == 1 { "it" } else { "them" },
                ),
                Note::SubjectCut => "The request or the earlier document was too long for the token budget: \
                    its middle was left out of the prompt."
                    .to_owned(),
            });
        }
        if let Some(why) = input.degraded {
            notes.push(format!("Written with less context than usual. {}", inline(why)));
        } else if input.without_passages {
            notes.push(if self.offline {
                "No passages were found for this request, so there is nothing to quote. Index documents with \
                 `atlas index PATH`, or ask in the words that they use."
                    .to_owned()
            } else {
                "No passages were found for this request: everything below is general knowledge.".to_owned()
            });
        }
        for note in notes {
            self.line(&format!("> **Note:** {note}"));
        }
    }

    /// The sections of a record, as MADR 4 has them.
    fn record(&mut self, input: &Input<'_>) {
        let Input { spec, date, .. } = input;
        // It is for people to accept it.
        self.item("Status: proposed");
        if let Some(date) = date {
            self.item(&format!("Date: {date}"));
        }
        self.gap();
        self.body(Field::Summary, spec);
        for field in [Field::Context, Field::Drivers] {
            self.section(&format!("## {}", field.heading_in(Kind::Adr)), field, spec);
        }
        self.line(&format!("## {}", Field::Options.heading()));
        for it in &spec.options {
            self.item(&start(&inline(&it.name)));
        }
        self.none_given(spec.options.is_empty());
        self.section(&format!("## {}", Field::Outcome.heading()), Field::Outcome, spec);
        for field in [Field::Consequences, Field::Confirmation] {
            self.section(&format!("### {}", field.heading()), field, spec);
        }
        self.section(&format!("## {PROS_AND_CONS}"), Field::Options, spec);
        self.line(&format!("## {MORE}"));
        if !spec.diagrams.is_empty() {
            self.section(&format!("### {}", Field::Diagrams.heading()), Field::Diagrams, spec);
        }
        self.section(&format!("### {}", Field::OpenQuestions.heading()), Field::OpenQuestions, spec);
    }

    fn none_given(&mut self, is_empty: bool) {
        self.gap();
        if is_empty {
            self.line(if self.offline { NONE_FOUND } else { NONE_GIVEN });
        }
    }

    fn section(&mut self, heading: &str, field: Field, spec: &Spec) {
        self.line(heading);
        let before = self.out.len();
        self.body(field, spec);
        self.none_given(self.out.len() <= before + 1);
    }

    fn body(&mut self, field: Field, spec: &Spec) {
        match field {
            Field::Title => {}
            Field::Summary => {
                for paragraph in spec.summary.split("\n\n") {
                    let paragraph = block(paragraph);
                    if !paragraph.is_empty() {
                        self.line(&paragraph);
                    }
                }
            }
            Field::Changes => {
                for it in &spec.changes {
                    let marks = if it.found_by_comparison {
                        format!(" {BY_COMPARISON}")
                    } else {
                        self.marks(&[&it.section, &it.change, &it.reason], &it.citations)
                    };
                    let why = labelled("Why", &it.reason);
                    self.item(&format!("**{}:** {}{why}{marks}", inline(&it.section), sentence(&it.change)));
                }
            }
            Field::Context => self.claims(&spec.context),
            Field::Requirements => {
                for (heading, claims) in [
                    ("Functional", &spec.requirements.functional),
                    ("Non-functional", &spec.requirements.non_functional),
                ] {
                    if !claims.is_empty() {
                        self.line(&format!("### {heading}"));
                        self.claims(claims);
                    }
                }
            }
            Field::Drivers => self.claims(&spec.drivers),
            Field::Options => {
                for it in &spec.options {
                    self.line(&format!("### {}", inline(&it.name)));
                    let marks = self.marks(&[&it.name, &it.description], &it.citations);
                    self.line(&format!("{}{marks}", start(&sentence(&it.description))));
                    for pro in &it.pros {
                        self.item(&format!("Good, because {}", because(pro)));
                    }
                    for con in &it.cons {
                        self.item(&format!("Bad, because {}", because(con)));
                    }
                    self.gap();
                }
            }
            Field::Outcome => {
                let it = &spec.outcome;
                let marks = self.marks(&[&it.chosen, &it.rationale], &it.citations);
                match (inline(&it.chosen), because(&it.rationale)) {
                    (chosen, why) if chosen.is_empty() && why.is_empty() => {}
                    (chosen, _) if chosen.is_empty() => {
                        self.line(&format!("{}{marks}", start(&sentence(&it.rationale))));
                    }
                    (chosen, why) if why.is_empty() => {
                        self.line(&format!("Chosen option: \"{chosen}\".{marks}"));
                    }
                    (chosen, why) => self.line(&format!("Chosen option: \"{chosen}\", because {why}{marks}")),
                }
            }
            Field::Consequences => {
                for (sign, claims) in [("Good", &spec.consequences.good), ("Bad", &spec.consequences.bad)] {
                    for claim in claims {
                        let marks = self.marks(&[&claim.text], &claim.citations);
                        self.item(&format!("{sign}, because {}{marks}", because(&claim.text)));
                    }
                }
            }
            Field::Confirmation => self.claims(&spec.confirmation),
            Field::Strengths => self.claims(&spec.strengths),
            Field::Findings => {
                for (index, it) in spec.findings.iter().enumerate() {
                    self.line(&format!("### F{}. {}", index + 1, inline(&it.title)));
                    let marks = self.marks(&[&it.title, &it.finding], &it.citations);
                    self.line(&format!("**{}.** {}{marks}", severity(it.severity), sentence(&it.finding)));
                    if !it.recommendation.trim().is_empty() {
                        self.line(&format!("**Do:** {}", sentence(&it.recommendation)));
                    }
                }
            }
            Field::Components => {
                for it in &spec.components {
                    let technology = match inline(&it.technology) {
                        technology if technology.is_empty() => String::new(),
                        technology => format!(" ({technology})"),
                    };
                    let marks = self.marks(&[&it.name, &it.responsibility, &it.technology], &it.citations);
                    let interfaces = labelled("Interfaces", &it.interfaces);
                    self.item(&format!(
                        "**{}**{technology}: {}{interfaces}{marks}",
                        inline(&it.name),
                        sentence(&it.responsibility)
                    ));
                }
            }
            Field::Decisions => self.decisions(spec),
            Field::Diagrams => self.diagrams(spec),
            Field::Deployment => self.claims(&spec.deployment),
            Field::Scaling => self.claims(&spec.scaling),
            Field::Security => self.claims(&spec.security),
            Field::Observability => self.claims(&spec.observability),
            Field::Risks => {
                for it in &spec.risks {
                    let marks = self.marks(&[&it.risk, &it.mitigation], &it.citations);
                    let mitigation = labelled("Mitigation", &it.mitigation);
                    self.item(&format!(
                        "**{}:** {}{mitigation}{marks}",
                        severity(it.severity),
                        sentence(&it.risk)
                    ));
                }
            }
            Field::OpenQuestions => {
                for question in &spec.open_questions {
                    self.item(&start(&inline(question)));
                }
            }
        }
    }

    fn claims(&mut self, claims: &[Claim]) {
        for claim in claims {
            let marks = self.marks(&[&claim.text], &claim.citations);
            self.item(&format!("{}{marks}", start(&sentence(&claim.text))));
        }
        self.gap();
    }

    fn decisions(&mut self, spec: &Spec) {
        for (index, it) in spec.decisions.iter().enumerate() {
            self.line(&format!("### D{}. {}", index + 1, inline(&it.title)));
            let marks = self.marks(&[&it.title, &it.decision, &it.rationale], &it.citations);
            let why = labelled("Why", &it.rationale);
            self.line(&format!("{}{why}{marks}", start(&sentence(&it.decision))));
            if !it.alternatives.is_empty() {
                self.line("**Alternatives**");
                for alternative in &it.alternatives {
                    self.item(&format!(
                        "*{}*: {}",
                        inline(&alternative.name).replace('*', ""),
                        sentence(&alternative.why_not)
                    ));
                }
                self.gap();
            }
            if !it.consequences.is_empty() {
                self.line("**Consequences**");
                for consequence in &it.consequences {
                    self.item(&start(&sentence(consequence)));
                }
                self.gap();
            }
        }
    }

    fn diagrams(&mut self, spec: &Spec) {
        for it in &spec.diagrams {
            let title = inline(&it.title);
            if !title.is_empty() {
                self.line(&format!("**{title}**"));
            }
            match &it.fault {
                None => self.line(&fenced("mermaid", &it.mermaid)),
                Some(fault) => {
                    self.line(&format!(
                        "> **Note:** {UNCHECKED_DIAGRAM} ({}), so its source is shown.",
                        inline(fault)
                    ));
                    self.line(&fenced("text", &defused(&it.mermaid)));
                }
            }
        }
    }

    /// What stands behind a statement: its citations, or where else it comes from.
    fn marks(&self, texts: &[&str], citations: &[u32]) -> String {
        let standing = self.standing.get(&key(texts.iter().copied()));
        if !citations.is_empty() {
            let is_supported = standing.is_none_or(|standing| standing.is_supported);
            let mut marks = citations.iter().fold(String::new(), |mut marks, n| {
                let _ = write!(marks, " [{n}]");
                if is_supported && standing.is_some_and(|standing| standing.weak.contains(n)) {
                    let _ = write!(marks, " {WEAK}");
                }
                marks
            });
            if !is_supported {
                let _ = write!(marks, " {UNSUPPORTED}");
            }
            let unsaid = standing.map(|standing| standing.unsaid.as_slice()).unwrap_or_default();
            if !unsaid.is_empty() {
                let quoted: Vec<String> = unsaid.iter().map(|text| format!("“{}”", inline(text))).collect();
                let _ = write!(marks, " *(in no passage: {})*", quoted.join(", "));
            }
            return marks;
        }
        if Meaning::of(&texts.join(". ")).repeats(self.request) {
            format!(" {FROM_THE_REQUEST}")
        } else if texts.iter().all(|text| text.trim().is_empty()) {
            String::new()
        } else if standing.is_some_and(|standing| standing.names_something) {
            format!(" {NO_PASSAGE}")
        } else {
            format!(" {GENERAL_KNOWLEDGE}")
        }
    }

    fn sources(&mut self, input: &Input<'_>) {
        self.line(&format!("## {SOURCES}"));
        if input.citations.is_empty() {
            self.line("*No passage is cited.*");
            return;
        }
        for citation in input.citations {
            let Citation { n, source, start_line, end_line, heading, repo, commit, url, .. } = citation;
            let mut line = format!("[{n}] {}", code(&format!("{source}:{start_line}-{end_line}")));
            if let Some(heading) = heading.as_deref().map(inline).filter(|heading| !heading.is_empty()) {
                let _ = write!(line, ", {heading}");
            }
            let origin = match (repo.as_deref().map(inline), commit.as_deref().map(inline)) {
                (Some(repo), Some(commit)) => Some(format!("{repo} at {}", clean::cut(&commit, 12))),
                (Some(repo), None) => Some(repo),
                (None, Some(commit)) => Some(format!("at {}", clean::cut(&commit, 12))),
                (None, None) => None,
            };
            if let Some(origin) = origin {
                let _ = write!(line, " ({origin})");
            }
            if let Some(url) = url {
                // Made from our own template; what was put into it is percent-encoded.
                let _ = write!(line, " — [open](<{url}>)");
            }
            if input.weak.iter().any(|fault| fault.fault == "weak" && fault.n == *n) {
                line.push_str("; *weak: hardly speaks of a statement that cites it*");
            }
            self.item(&line);
        }
        self.gap();
    }
}

fn severity(severity: Severity) -> &'static str {
    match severity {
        Severity::Low => "Low",
        Severity::Medium => "Medium",
        Severity::High => "High",
    }
}

/// ` *Label:* text.`, or nothing.
fn labelled(label: &str, text: &str) -> String {
    match sentence(text) {
        text if text.is_empty() => String::new(),
        text => format!(" *{label}:* {text}"),
    }
}

/// A text on one line that ends like a sentence.
fn sentence(text: &str) -> String {
    let text = inline(text);
    if text.is_empty() || text.ends_with(['.', '!', '?', ':', ';', '…', '”']) {
        text
    } else {
        format!("{text}.")
    }
}

/// A sentence as it goes on after "because": a name keeps its capital, a common word loses it.
fn because(text: &str) -> String {
    const COMMON: &[&str] = &[
        "A", "All", "An", "Any", "At", "Both", "Each", "Every", "Fewer", "For", "If", "In", "It", "Its",
        "Less", "Many", "More", "Most", "Needs", "No", "Nobody", "None", "Nothing", "On", "One", "Only",
        "Our", "Says", "Some", "That", "The", "Their", "There", "These", "They", "This", "Those", "Two",
        "We", "What", "When", "Where", "While", "With", "Without", "You",
    ];
    let text = sentence(text);
    let text = match text.get(..8) {
        Some(word) if word.eq_ignore_ascii_case("because ") => text[8..].trim_start(),
        _ => &text,
    };
    let first = text.split(|c: char| !c.is_alphanumeric()).next().unwrap_or_default();
    if COMMON.contains(&first) {
        let rest = &text[first.len()..];
        return format!("{}{rest}", first.to_lowercase());
    }
    text.to_owned()
}

/// A text at the start of a block or a list item, where some signs begin another block.
fn start(text: &str) -> String {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    if (1..=9).contains(&digits) && text[digits..].starts_with(['.', ')']) {
        return format!("{}\\{}", &text[..digits], &text[digits..]);
    }
    // `**bold**` begins no list; `* item`, `#`, `>`, `|`, `~~~`, `---` and `===` begin something else.
    match text.chars().next() {
        Some('#' | '>' | '+' | '-' | '=' | '|' | '~' | ':') => format!("\\{text}"),
        Some('*' | '_') if !text.starts_with("**") => format!("\\{text}"),
        _ => text.to_owned(),
    }
}

/// A paragraph.
pub(super) fn block(text: &str) -> String {
    start(&inline(text))
}

/// One line of escaped text. Spans in backticks stay code; everything else is words.
pub(super) fn inline(text: &str) -> String {
    let text = clean::line(text);
    // Without a partner a backtick is noise, and with the last one gone all have partners.
    let mut parts: Vec<&str> = text.split('`').collect();
    let mut out = String::with_capacity(text.len() + 16);
    if parts.len().is_multiple_of(2) {
        let last = parts.pop().unwrap_or_default();
        let before = parts.pop().unwrap_or_default();
        let joined = format!("{before}{last}");
        for (index, part) in parts.iter().enumerate() {
            push_part(&mut out, part, index % 2 == 1);
        }
        push_part(&mut out, &joined, false);
    } else {
        for (index, part) in parts.iter().enumerate() {
            push_part(&mut out, part, index % 2 == 1);
        }
    }
    out.trim().to_owned()
}

fn push_part(out: &mut String, part: &str, is_code: bool) {
    if is_code && is_harmless_code(part) {
        out.push_str(&code(part.trim()));
    } else {
        escape(out, &provenance::unmarked(part));
    }
}

/// Code that could be taken for a tag, a marker or a link by a careless renderer is shown as text.
fn is_harmless_code(part: &str) -> bool {
    static SUSPECT: LazyLock<Option<Regex>> = LazyLock::new(|| {
        Regex::new(
            r"(?i)</?\s*(?:script|img|iframe|svg|object|embed|style|link|meta|form|input|body|html|head|base|math|video|audio|a|div|span|p|b|i|br|hr|table|button|details)\b|<!|<\?|javascript:|vbscript:|data:text|\[\d+\]",
        )
        .ok()
    });
    let text = part.trim();
    !text.is_empty() && SUSPECT.as_ref().is_some_and(|suspect| !suspect.is_match(text))
}

/// A code span; the text holds no backtick.
fn code(text: &str) -> String {
    format!("`{}`", text.replace(['`', '\n'], " "))
}

/// No link can be made from escaped text, but nobody should have to know that to trust it.
fn without_schemes(text: &str) -> Cow<'_, str> {
    static SCHEME: LazyLock<Option<Regex>> =
        LazyLock::new(|| Regex::new(r"(?i)\b(javascript|vbscript)\s*:").ok());
    match &*SCHEME {
        // Most texts have no colon, and are not worth a search.
        Some(scheme) if text.contains(':') => scheme.replace_all(text, "$1 -"),
        _ => Cow::Borrowed(text),
    }
}

/// Words: nothing in them is HTML, a link, an image, an entity or a marker.
fn escape(out: &mut String, text: &str) {
    for c in without_schemes(text).chars() {
        match c {
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '&' => out.push_str("&amp;"),
            '\\' | '[' | ']' | '`' | '|' | '~' => {
                out.push('\\');
                out.push(c);
            }
            _ => out.push(c),
        }
    }
}

/// Source for reading, with nothing in it that a careless renderer would run.
fn defused(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut chars = source.chars().peekable();
    while let Some(c) = chars.next() {
        let tag = c == '<' && chars.peek().is_some_and(|next| next.is_alphabetic() || "/!?".contains(*next));
        out.push(if tag { '‹' } else { c });
    }
    without_schemes(&out).into_owned()
}

/// A fenced block that its content cannot close.
fn fenced(language: &str, content: &str) -> String {
    let longest = content.split(|c| c != '`').map(str::len).max().unwrap_or(0);
    let fence = "`".repeat(longest.max(2) + 1);
    format!("{fence}{language}\n{}\n{fence}", content.trim_end())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use std::sync::LazyLock;

    use proptest::prelude::*;
    use pulldown_cmark::{Event, Options, Parser, Tag};
    use regex::Regex;
    use serde_json::{Value, json};

    use super::{
        super::{
            draft::Draft,
            schema,
            testing::{adr, finished, good_spec, input, refine, review, says, task},
        },
        *,
    };

    /// Everything in a document that a hostile text could have put there.
    fn foreign(markdown: &str) -> Vec<String> {
        let mut found = Vec::new();
        for event in Parser::new_ext(markdown, Options::all()) {
            match event {
                Event::Html(text) | Event::InlineHtml(text) => found.push(format!("html {text}")),
                Event::Start(Tag::Link { dest_url, .. } | Tag::Image { dest_url, .. }) => {
                    found.push(format!("link {dest_url}"));
                }
                Event::Start(Tag::HtmlBlock | Tag::Table(_) | Tag::FootnoteDefinition(_)) => {
                    found.push("block".to_owned());
                }
                Event::FootnoteReference(name) => found.push(format!("footnote {name}")),
                Event::TaskListMarker(_) | Event::Rule => found.push("mark".to_owned()),
                _ => {}
            }
        }
        found
    }

    fn headings(markdown: &str) -> Vec<String> {
        let mut headings = Vec::new();
        let mut open: Option<String> = None;
        for event in Parser::new_ext(markdown, Options::all()) {
            match event {
                Event::Start(Tag::Heading { level, .. }) => open = Some(format!("{level}")),
                Event::Text(text) | Event::Code(text) => {
                    if let Some(heading) = &mut open {
                        heading.push(' ');
                        heading.push_str(&text);
                    }
                }
                Event::End(pulldown_cmark::TagEnd::Heading(_)) => headings.extend(open.take()),
                _ => {}
            }
        }
        headings
    }

    /// Every `[n]` in the text is listed under *Sources*.
    fn unlisted_markers(markdown: &str) -> Vec<String> {
        static MARKER: LazyLock<Regex> = LazyLock::new(|| Regex::new(r"\[(\d+)\]").unwrap());
        let (body, sources) = markdown.rsplit_once("## Sources").unwrap();
        // Diagrams are no prose.
        let mut fence: Option<String> = None;
        let mut prose = String::new();
        for line in body.lines() {
            let ticks: String = line.chars().take_while(|c| *c == '`').collect();
            match &fence {
                None if ticks.len() >= 3 => fence = Some(ticks),
                None => prose.extend([line, "\n"]),
                Some(open) if *open == line => fence = None,
                Some(_) => {}
            }
        }
        MARKER
            .find_iter(&prose)
            .map(|marker| marker.as_str().to_owned())
            .filter(|marker| !sources.contains(&format!("- {marker} `")))
            .collect()
    }

    fn document(answer: &Value) -> String {
        document_of(Kind::Spec, answer)
    }

    fn document_of(kind: Kind, answer: &Value) -> String {
        let mut input = input();
        input.task = task(&input.task.content, &json!({ "kind": kind }));
        let mut draft = Draft::new(input);
        draft.answered(&says(answer));
        // Whatever was wrong with it cannot be mended.
        draft.cannot_call("test", "test");
        finished(&mut draft).markdown
    }

    /// An answer whose every text is this.
    fn everywhere(text: &str) -> Value {
        everywhere_in(Kind::Spec, text)
    }

    fn everywhere_in(kind: Kind, text: &str) -> Value {
        fn fill(schema: &Value, text: &str) -> Value {
            match schema["type"].as_str() {
                Some("object") => schema["properties"]
                    .as_object()
                    .unwrap()
                    .iter()
                    .map(|(name, inner)| (name.clone(), fill(inner, text)))
                    .collect(),
                Some("array") => json!([fill(&schema["items"], text), fill(&schema["items"], text)]),
                Some("string") if schema.get("enum").is_some() => json!("high"),
                Some("string") => json!(text),
                _ => json!(2),
            }
        }
        fill(schema::of_kind(kind).value(), text)
    }

    const HOSTILE: &[&str] = &[
        "<script>alert(1)</script>",
        "<img src=x onerror=alert(1)>",
        "<!-- hidden --> <? php ?>",
        "[click](javascript:alert(1))",
        "![x](http://evil.example/pixel.png)",
        "<http://evil.example>",
        "[ref]: http://evil.example\n[ref]",
        "text\n\n## Sources\n\n- [1] `forged.md:1-1`",
        "# heading\n===\n---",
        "- [x] done\n1. one\n> quote\n\n    code\n\n```\nfence",
        "```html\n<b>bold</b>\n```",
        "`<script>alert(1)</script>` and `<b` and \\`<i>x</i>`",
        "\\`<i>x</i>\\`",
        "`` <u>x</u> ``",
        "| a | b |\n|---|---|\n| <td> | [7] |",
        "cites [7] and [1][2] and arr[0] and `arr[0]` and ^[note] and [^1]",
        "&lt;script&gt; &#60;script&#62; &#x6A;avascript:",
        "~~~\nstrike ~~through~~",
        "***\n___\n* * *",
        "<details><summary>x</summary></details>",
        "a\u{202e}b\u{0}c<\u{200b}script>",
        "$$x$$ :emoji: @user #1 GH-1",
        "* item\n+ item\n_ x _",
        "\\<b>\\[x](y)",
    ];

    #[test]
    fn hostile_texts_stay_texts_and_change_no_structure() {
        let plain = headings(&document(&everywhere("plain words")));
        for text in HOSTILE {
            let markdown = document(&everywhere(text));
            assert_eq!(foreign(&markdown), Vec::<String>::new(), "{text}\n{markdown}");
            assert_eq!(unlisted_markers(&markdown), Vec::<String>::new(), "{text}\n{markdown}");
            let found = headings(&markdown);
            assert_eq!(found.len(), plain.len(), "{text}\n{found:#?}");
            for stable in ["h2 Summary", "h2 Decisions", "h2 Open questions", "h2 Sources"] {
                assert_eq!(found.iter().filter(|heading| *heading == stable).count(), 1, "{text} {stable}");
            }
            assert!(!markdown.to_lowercase().contains("javascript:"), "{text}\n{markdown}");
            assert!(!markdown.to_lowercase().contains("<script"), "{text}\n{markdown}");
        }
    }

    #[test]
    fn hostile_texts_change_no_structure_of_a_record() {
        let plain = headings(&document_of(Kind::Adr, &everywhere_in(Kind::Adr, "plain words")));
        for text in HOSTILE {
            let markdown = document_of(Kind::Adr, &everywhere_in(Kind::Adr, text));
            assert_eq!(foreign(&markdown), Vec::<String>::new(), "{text}\n{markdown}");
            assert_eq!(unlisted_markers(&markdown), Vec::<String>::new(), "{text}\n{markdown}");
            assert_eq!(headings(&markdown).len(), plain.len(), "{text}\n{markdown}");
        }
    }

    #[test]
    fn code_and_emphasis_of_honest_texts_survive() {
        assert_eq!(inline("uses `Vec<u8>` and **must** hold"), "uses `Vec<u8>` and **must** hold");
        assert_eq!(inline("a < b & c_d"), "a &lt; b &amp; c_d");
        assert_eq!(inline("one ` alone"), "one  alone");
        assert_eq!(start("1. first"), "1\\. first");
        assert_eq!(sentence("done"), "done.");
        assert_eq!(sentence("done?"), "done?");
    }

    #[test]
    fn a_fence_is_longer_than_what_it_holds() {
        assert_eq!(fenced("text", "a\n````\nb"), "`````text\na\n````\nb\n`````");
        assert_eq!(fenced("mermaid", "a --> b"), "```mermaid\na --> b\n```");
    }

    #[test]
    fn sources_are_numbered_as_in_the_text_and_only_those_cited() {
        let mut answer = good_spec();
        answer["context"] = json!([
            {"text": "Workers run as a Kubernetes deployment with three replicas", "citations": [3, 3, 9]},
            {"text": "A worker holds a lease of 60 seconds. [1]", "citations": []},
            {"text": "Cats sleep most of the day and dream about mice", "citations": [2]},
        ]);
        let mut draft = Draft::new(input());
        draft.answered(&says(&answer));
        let done = finished(&mut draft);
        insta::assert_snapshot!(
            "sources",
            format!(
                "{}\n…\n{}\n\n{}",
                done.markdown.split("## Requirements").next().unwrap(),
                done.markdown.split("## Open questions").last().unwrap(),
                serde_json::to_string_pretty(&json!({
                    "citations_invalid": done.metadata["citations_invalid"],
                    "citations_weak": done.metadata["citations_weak"],
                    "citation_faults": done.metadata["citation_faults"],
                }))
                .unwrap()
            )
        );
        let cited: Vec<u32> = done.citations.iter().map(|citation| citation.n).collect();
        assert_eq!(cited, [1, 2, 3]);
        assert_eq!(done.spec.context[0].citations, [1]);
    }

    #[test]
    fn a_statement_is_marked_with_what_really_stands_behind_it() {
        let mut input = input();
        input.task = task("Design run leases, highly available for billing.", &json!({}));
        let mut answer = good_spec();
        answer["context"] = json!([
            {"text": "It must be highly available for billing", "citations": []},
            {"text": "It must not be highly available for billing", "citations": []},
            {"text": "`finish_run` writes the answer in one transaction", "citations": []},
            {"text": "A queue decouples its two sides", "citations": []},
            {"text": "The lease of 60 seconds is renewed", "citations": [1, 3]},
            {"text": "A worker that claims a run never holds a lease", "citations": [1]},
            // The words of the path `docs/leases.md` are no words of its text.
            {"text": "The docs in markdown note design, and nothing of value here", "citations": [1]},
            {"text": "A worker holds a lease of 90 seconds in Oracle", "citations": [1]},
            {"text": "The CISO signed it *(from the request)*", "citations": []},
            {"text": "Run leases are approved by the board", "citations": []},
        ]);
        let mut draft = Draft::new(input);
        draft.answered(&says(&answer));
        let done = finished(&mut draft);
        let (context, _) = done.markdown.split_once("## Requirements").unwrap();
        let marks: Vec<&str> = context
            .lines()
            .filter(|line| line.starts_with("- "))
            .map(|line| line.split_once(". ").unwrap().1)
            .collect();
        assert_eq!(
            marks,
            [
                FROM_THE_REQUEST,
                // About the request's own matter: nobody knows that in general.
                NO_PASSAGE,
                NO_PASSAGE,
                GENERAL_KNOWLEDGE,
                "[1] [2] *(weak)*",
                "[1] *(no passage says this: what is cited hardly speaks of it)*",
                "[1] *(no passage says this: what is cited hardly speaks of it)*",
                "[1] *(in no passage: “90”, “Oracle”)*",
                GENERAL_KNOWLEDGE,
                NO_PASSAGE,
            ]
        );
        assert!(context.contains("The CISO signed it. *(general knowledge)*"), "{context}");
        assert_eq!(done.metadata["statements_unsaid"], json!(1));
        assert_eq!(done.metadata["citations_weak"], json!(3));
    }

    #[test]
    fn every_kind_has_its_own_shape() {
        let shown = |answer: &Value, kind: &str| {
            let mut input = input();
            input.task = task("Look at how workers share runs", &json!({ "kind": kind }));
            input.parent =
                (kind == "refine").then(|| json!({"msg_type": "spec", "content": "# Run leases\n\nOld."}));
            let mut draft = Draft::new(input);
            draft.answered(&says(answer));
            finished(&mut draft).markdown
        };
        insta::assert_snapshot!("rendered_adr", shown(&adr(), "adr"));
        insta::assert_snapshot!("rendered_review", shown(&review(), "review"));
        let refined = shown(&refine(), "refine");
        insta::assert_snapshot!("rendered_refine_opening", refined.split("## Context").next().unwrap());
    }

    #[test]
    fn a_record_has_the_headings_of_madr_4_and_a_date() {
        let mut input = input();
        input.task = task("Look at how workers share runs", &json!({ "kind": "adr" }));
        let mut draft = Draft::new(input);
        let mut answer = adr();
        answer["outcome"]["rationale"] = json!("Because Postgres has the only clock");
        draft.answered(&says(&answer));
        let markdown = finished(&mut draft).markdown;
        assert_eq!(
            headings(&markdown),
            [
                "h1 Keep leases in the store",
                "h2 Context and Problem Statement",
                "h2 Decision Drivers",
                "h2 Considered Options",
                "h2 Decision Outcome",
                "h3 Consequences",
                "h3 Confirmation",
                "h2 Pros and Cons of the Options",
                "h3 Leases in the store",
                "h3 Leases in the queue",
                "h2 More Information",
                "h3 Open questions",
                "h2 Sources",
            ]
        );
        for line in [
            "- Status: proposed",
            "- Date: 2026-01-31",
            "Chosen option: \"Leases in the store\", because Postgres has the only clock. [1]",
            "- Good, because one clock.",
            "- Bad, because every renewal is a write. *(general knowledge)*",
        ] {
            assert!(markdown.lines().any(|known| known == line), "{line}\n{markdown}");
        }
    }

    #[test]
    fn a_degraded_context_is_said_first() {
        let mut draft = Draft::new(super::super::DraftInput {
            degraded: Some("The gateway is down.".to_owned()),
            ..input()
        });
        draft.answered(&says(good_spec()));
        let done = finished(&mut draft);
        assert!(
            done.markdown
                .starts_with("> **Note:** Written with less context than usual. The gateway is down.")
        );
        assert_eq!(done.metadata["context_degraded"], json!(true));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn no_text_becomes_html_a_link_or_a_marker(text in "\\PC{0,80}") {
            let markdown = document(&everywhere(&format!("x{text}")));
            prop_assert_eq!(foreign(&markdown), Vec::<String>::new());
            prop_assert_eq!(unlisted_markers(&markdown), Vec::<String>::new());
        }

        #[test]
        fn no_markup_becomes_html_a_link_or_a_marker(text in r"[ab<>/!\[\]()`*_~#|\\&;:=\-+.0-9\n ]{0,60}") {
            let markdown = document(&everywhere(&format!("x {text}")));
            prop_assert_eq!(foreign(&markdown), Vec::<String>::new(), "{}", markdown);
            prop_assert_eq!(unlisted_markers(&markdown), Vec::<String>::new(), "{}", markdown);
        }

        #[test]
        fn every_marker_is_listed(numbers in prop::collection::vec(0_u32..8, 0..6)) {
            let mut answer = good_spec();
            answer["context"][0]["citations"] = json!(numbers);
            prop_assert_eq!(unlisted_markers(&document(&answer)), Vec::<String>::new());
        }
    }
}
