//! From a document as the model wrote it to one that can be published: citations are checked,
//! diagrams are checked, sources are numbered, Markdown and metadata are made.

use std::{
    collections::{HashMap, HashSet},
    sync::LazyLock,
};

use atlas_shared::config::{SourceLines, SourceUrls};
use jiff::civil::Date;
use regex::Regex;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::{
    clean,
    draft::TokenUse,
    mermaid,
    passages::{Entry, Shelf},
    prompt,
    provenance::{self, Meaning, Particular},
    render,
    spec::{Field, Kind, Spec},
    words,
};

/// Citations of one statement that are kept.
const MAX_CITATIONS_A_CLAIM: usize = 8;
/// Numbers and names of a statement that are told to be in no passage.
const MAX_UNSAID: usize = 4;
/// Citation faults that are listed in the metadata; all are counted.
const MAX_LISTED_FAULTS: usize = 100;

/// A finished document.
#[derive(Clone, Debug, PartialEq)]
pub struct Finished {
    /// The structured form, its citations numbered as in the Markdown: the answer's field `spec`.
    pub spec: Spec,
    /// The answer's `content`.
    pub markdown: String,
    /// What to set over the request's metadata: `kind`, `prompt_version`, `citations`,
    /// `citations_invalid`, `citations_weak`, `statements_unsaid`, `citation_faults`, `general_knowledge`, `searches`,
    /// `context_degraded`, `repaired`, …
    pub metadata: Map<String, Value>,
    /// The sources, as in `metadata.citations`.
    pub citations: Vec<Citation>,
}

/// A source of the document, one entry of `metadata.citations`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Citation {
    /// Its number in the text.
    pub n: u32,
    /// Path of the file.
    pub source: String,
    /// First line.
    pub start_line: u32,
    /// Last line, included.
    pub end_line: u32,
    /// Heading or symbol, when known.
    pub heading: Option<String>,
    /// Where it was found.
    pub collection: String,
    /// Repository, when known.
    pub repo: Option<String>,
    /// Commit, when known.
    pub commit: Option<String>,
    /// Where these lines can be read (`SOURCE_URL_TEMPLATE`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
    /// `atlas_shared::gateway_api::quote_hash` of these lines: anybody with the file can check that
    /// it still says what was cited.
    pub text_hash: String,
}

/// A citation that does not hold, one entry of `metadata.citation_faults`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CitationFault {
    /// `invalid`: no such passage was given, removed. `weak`: passage and statement share hardly a word, or
    /// the passage says the opposite.
    pub fault: String,
    /// For `weak` the number in the text, for `invalid` the number the model made up.
    pub n: u32,
    /// Which field.
    pub field: String,
    /// How the statement begins.
    pub claim: String,
}

/// Something the reader must know before the rest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Note {
    /// No model wrote this.
    Offline,
    /// The model's answer broke off.
    CutOff,
    /// The model's answer has faults that mending did not cure.
    Incomplete(Vec<String>),
    /// It has faults, and the call that should mend them could not be made.
    Unmended(Vec<String>),
    /// The model's answer held more than a document may hold.
    Shortened,
    /// So many differences from the parent that the author did not name.
    Unnamed(usize),
    /// The prompt showed only a part of the request or the parent.
    SubjectCut,
}

/// What a document is finished from.
#[derive(Debug)]
pub(super) struct Draft<'a> {
    pub(super) kind: Kind,
    pub(super) date: Option<Date>,
    pub(super) spec: Spec,
    pub(super) request: &'a str,
    pub(super) shelf: &'a Shelf,
    pub(super) notes: Vec<Note>,
    pub(super) degraded: Option<&'a str>,
    pub(super) searches: u32,
    pub(super) repaired: Option<&'a str>,
    /// No search was on offer, for want of tokens.
    pub(super) search_left_out: bool,
    pub(super) token_use: &'a TokenUse,
    pub(super) source_urls: &'a SourceUrls,
}

/// Finishes a document.
pub(super) fn finish(draft: Draft<'_>) -> Finished {
    let Draft {
        kind,
        date,
        mut spec,
        request,
        shelf,
        notes,
        degraded,
        searches,
        repaired,
        search_left_out,
        token_use,
        source_urls,
    } = draft;

    // A number in brackets in what is quoted is the file's own.
    let is_quoted = notes.contains(&Note::Offline);
    for item in if is_quoted { Vec::new() } else { spec.items(kind) } {
        let mut found = Vec::new();
        for text in item.texts {
            found.extend(take_markers(text));
        }
        if let Some(citations) = item.citations {
            citations.extend(found);
        }
    }
    let mut broken = 0;
    for diagram in &mut spec.diagrams {
        diagram.mermaid = mermaid::tidy(&diagram.mermaid);
        diagram.fault = mermaid::check(&diagram.mermaid).err().map(|error| error.to_string());
        broken += usize::from(diagram.fault.is_some());
    }

    let request = Meaning::of(request);
    let checked = check_citations(&mut spec, kind, &request, shelf);
    let citations: Vec<Citation> = checked
        .order
        .iter()
        .enumerate()
        .filter_map(|(index, old)| {
            let entry = shelf.get(*old)?;
            let passage = &entry.passage;
            Some(Citation {
                text_hash: entry.text_hash.to_string(),
                n: u32::try_from(index + 1).unwrap_or(u32::MAX),
                source: passage.source.clone(),
                start_line: passage.start_line,
                end_line: passage.end_line,
                heading: passage.heading.clone(),
                collection: passage.collection.clone(),
                repo: passage.repo.clone(),
                commit: passage.commit.clone(),
                url: source_urls.link(&SourceLines {
                    collection: &passage.collection,
                    path: &passage.source,
                    start: passage.start_line,
                    end: passage.end_line,
                    commit: passage.commit.as_deref(),
                    repo: passage.repo.as_deref(),
                }),
            })
        })
        .collect();
    let given = shelf.entries().filter(|entry| entry.given).count();
    let markdown = render::markdown(&render::Input {
        kind,
        date,
        spec: &spec,
        request: &request,
        citations: &citations,
        weak: &checked.faults,
        standing: &checked.standing,
        notes: &notes,
        degraded,
        without_passages: given == 0,
    });

    let weak = checked.weak;
    let found: Vec<&str> =
        spec.changes.iter().filter(|it| it.found_by_comparison).map(|it| it.change.as_str()).collect();
    let mut metadata = Map::new();
    let mut set = |name: &str, value: Value| metadata.insert(name.to_owned(), value);
    set("kind", json!(kind));
    set("prompt_version", json!(prompt::version()));
    set("citations", json!(citations));
    set("citations_invalid", json!(checked.invalid));
    set("citations_weak", json!(weak));
    set("statements_unsaid", json!(checked.unsaid));
    set("citation_faults", json!(checked.faults));
    set("general_knowledge", json!(checked.uncited));
    set("passages_given", json!(given));
    set("passages_left_out", json!(shelf.len() - given));
    set("passages_duplicate", json!(shelf.duplicates()));
    set("passages_trimmed", json!(shelf.trimmed()));
    if !token_use.calls.is_empty() {
        set("token_use", json!(token_use));
    }
    if kind == Kind::Refine {
        set("changes_found_by_comparison", json!(found));
    }
    set("searches", json!(searches));
    if search_left_out {
        set(
            "search_left_out",
            json!(format!(
                "The run's budget (TOKEN_BUDGET_PER_RUN) leaves no room for {} search and a whole document after it.",
                if searches == 0 { "a" } else { "another" }
            )),
        );
    }
    if notes.contains(&Note::SubjectCut) {
        set("request_cut", json!(true));
    }
    set("diagrams_broken", json!(broken));
    set("context_degraded", json!(degraded.is_some()));
    if let Some(why) = degraded {
        set("context_degraded_reason", json!(why));
    }
    set("repaired", json!(repaired.is_some()));
    if let Some(why) = repaired {
        set("repair_reason", json!(why));
    }
    set(
        "incomplete",
        json!(notes.iter().any(|note| match note {
            Note::CutOff | Note::Incomplete(_) | Note::Unmended(_) | Note::Shortened | Note::Unnamed(_) =>
                true,
            Note::Offline | Note::SubjectCut => false,
        })),
    );
    Finished { spec, markdown, metadata, citations }
}

/// Takes `[3]` and `[1, 2]` out of a text, for models that cite in the text in spite of the rules.
fn take_markers(text: &mut String) -> Vec<u32> {
    static MARKER: LazyLock<Option<Regex>> =
        LazyLock::new(|| Regex::new(r"(?:^|\s|([.,;:)]))\[(\d{1,4}(?:\s*,\s*\d{1,4})*)\]").ok());
    let Some(marker) = &*MARKER else { return Vec::new() };
    // Code keeps its brackets: `items[0]`.
    if !text.contains('[') || text.contains('`') {
        return Vec::new();
    }
    let mut numbers = Vec::new();
    let mut rest = text.clone();
    // Markers that touch (`[1][2]`) are found one after the other.
    for _ in 0..8 {
        let mut any = false;
        let next = marker
            .replace_all(&rest, |found: &regex::Captures<'_>| {
                any = true;
                numbers.extend(found[2].split(',').filter_map(|n| n.trim().parse::<u32>().ok()));
                found.get(1).map_or(String::new(), |kept| kept.as_str().to_owned())
            })
            .into_owned();
        rest = next;
        if !any {
            break;
        }
    }
    rest.trim().clone_into(text);
    numbers
}

struct Checked {
    /// Passage numbers in the order of their first citation.
    order: Vec<u32>,
    invalid: usize,
    weak: usize,
    /// Statements with a number or a name that none of their sources has.
    unsaid: usize,
    /// Statements without a citation that supports them.
    uncited: usize,
    faults: Vec<CitationFault>,
    /// What is to be said about statements, by their keys; nothing about those that are supported.
    standing: HashMap<String, Standing>,
}

/// How a statement stands, where its citations alone do not say it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Standing {
    /// Which of its citations are weak.
    pub(super) weak: Vec<u32>,
    /// Others hold.
    pub(super) is_supported: bool,
    /// It speaks of something of the team's, which is no general knowledge.
    pub(super) names_something: bool,
    /// Numbers and names in it that neither a passage it cites nor the request has.
    pub(super) unsaid: Vec<String>,
}

/// Fields that say what is so, not what shall be.
fn states_facts(field: Field) -> bool {
    matches!(field, Field::Context | Field::Strengths)
}

/// Is a statement about what the request or a passage is about? Then it is not known in general.
fn is_about_the_team(claim: &Meaning, request: &Meaning, given: &HashMap<u32, &Entry>) -> bool {
    claim.is_about(request)
        || given.values().any(|entry| entry.sentences().iter().any(|says| claim.is_about(says)))
}

/// What is exact in a statement and stands neither in the passages that support it nor in the request.
fn unsaid(claim: &str, field: Field, supporting: &[&Entry], request: &Meaning) -> Vec<String> {
    let mut missing: Vec<String> = Vec::new();
    for particular in provenance::particulars(claim, states_facts(field)) {
        let is_said = match &particular {
            Particular::Number(number) => {
                request.has_number(number)
                    || supporting
                        .iter()
                        .any(|entry| entry.sentences().iter().any(|says| says.has_number(number)))
            }
            Particular::Name(name) => {
                let parts = Meaning::of(name);
                let has = |entry: &&Entry| words::list(name).iter().all(|word| entry.words().contains(word));
                parts.is_part_of(request) || supporting.iter().any(has)
            }
        };
        let text = particular.into_text();
        if !is_said && missing.len() < MAX_UNSAID && !missing.contains(&text) {
            missing.push(text);
        }
    }
    missing
}

/// Removes citations of passages that were not given, finds those that support nothing, and numbers
/// the rest by first appearance.
fn check_citations(spec: &mut Spec, kind: Kind, request: &Meaning, shelf: &Shelf) -> Checked {
    let given: HashMap<u32, &Entry> =
        shelf.entries().filter(|entry| entry.given).map(|entry| (entry.n, entry)).collect();
    let is_known = |name: &str| given.values().any(|entry| entry.passage.text.contains(name));
    let mut checked = Checked {
        order: Vec::new(),
        invalid: 0,
        weak: 0,
        unsaid: 0,
        uncited: 0,
        faults: Vec::new(),
        standing: HashMap::new(),
    };
    for item in spec.items(kind) {
        let (claim, key) = (item.claim(), item.key());
        let field = item.field;
        let Some(citations) = item.citations else { continue };
        if claim.trim().is_empty() {
            citations.clear();
            continue;
        }
        let said = words::of(&claim);
        let mut seen = HashSet::new();
        let mut kept = Vec::new();
        let mut standing = Standing::default();
        // Worked out only where something is cited.
        let mut meaning: Option<Meaning> = None;
        let mut supporting: Vec<&Entry> = Vec::new();
        for n in std::mem::take(citations) {
            if !seen.insert(n) {
                continue;
            }
            let fault = |fault: &str, n: u32| CitationFault {
                fault: fault.to_owned(),
                n,
                field: field.name().to_owned(),
                claim: clean::cut(&clean::line(&claim), 80),
            };
            let Some(entry) = given.get(&n) else {
                checked.invalid += 1;
                checked.faults.push(fault("invalid", n));
                continue;
            };
            if kept.len() == MAX_CITATIONS_A_CLAIM {
                continue;
            }
            let index = checked.order.iter().position(|known| *known == n).unwrap_or_else(|| {
                checked.order.push(n);
                checked.order.len() - 1
            });
            let number = u32::try_from(index + 1).unwrap_or(u32::MAX);
            let mut is_denied =
                || meaning.get_or_insert_with(|| Meaning::of(&claim)).is_denied_by(entry.sentences());
            if !entry.speaks_of(&said) || is_denied() {
                checked.weak += 1;
                checked.faults.push(fault("weak", number));
                standing.weak.push(number);
            } else {
                standing.is_supported = true;
                supporting.push(*entry);
            }
            kept.push(number);
        }
        kept.sort_unstable();
        if standing.is_supported {
            standing.unsaid = unsaid(&claim, field, &supporting, request);
        }
        checked.unsaid += usize::from(!standing.unsaid.is_empty());
        checked.uncited += usize::from(!standing.is_supported && field != Field::Title);
        standing.names_something = !standing.is_supported
            && (provenance::names_something(&claim, is_known)
                || (states_facts(field)
                    && is_about_the_team(
                        meaning.get_or_insert_with(|| Meaning::of(&claim)),
                        request,
                        &given,
                    )));
        if standing != (Standing { is_supported: true, ..Standing::default() }) {
            checked.standing.insert(key, standing);
        }
        *citations = kept;
    }
    checked.faults.truncate(MAX_LISTED_FAULTS);
    checked
}
