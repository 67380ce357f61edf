//! The offline drafter: the same document without a model, assembled from quotations.
//!
//! It is not a model and never claims to be: what it says is either quoted from a passage, with its
//! citation, or a question about what no passage says.

use std::{
    collections::{BTreeMap, HashSet},
    fmt::Write as _,
};

use super::{
    clean,
    draft::DraftInput,
    finish::{self, Finished, Note},
    passages::{Entry, Shelf},
    spec::{
        Alternative, Claim, Component, Decision, Diagram, Field, Kind, Requirements, Risk, Severity, Spec,
    },
    words,
};

/// `metadata.model` of these documents.
pub const MODEL: &str = "offline-extractive";

/// Files shown as components, most relevant first.
const MAX_FILES: usize = 8;
/// Quotations of one section.
const MAX_QUOTES: usize = 4;
/// Characters of one quotation.
const MAX_QUOTE_CHARS: usize = 220;

/// Assembles a document from the passages at hand. Needs no model, bills nothing.
pub fn draft(input: &DraftInput) -> Finished {
    let request = clean::text(&input.task.content);
    let mut shelf = Shelf::new(&request);
    shelf.add(input.passages.clone());
    // The reader of the passages is this function, and it reads all of them.
    shelf.mark_given();
    let spec = assemble(&request, &shelf);
    finish::finish(finish::Draft {
        kind: Kind::Spec,
        spec,
        request: &request,
        shelf: &shelf,
        notes: vec![Note::Offline],
        degraded: input.degraded.as_deref(),
        searches: 0,
        repaired: None,
    })
}

/// A section that is filled with the sentences that speak about its subject.
struct Aspect {
    field: Field,
    /// Stems of the words that tell it.
    words: &'static str,
    /// Asked when nothing was found.
    question: &'static str,
}

const ASPECTS: &[Aspect] = &[
    Aspect {
        field: Field::Deployment,
        words: "deploy deployment docker compose kubernetes container image rollout install helm systemd release migrate",
        question: "How is it deployed and upgraded? No passage that was found says.",
    },
    Aspect {
        field: Field::Scaling,
        words: "scale scaling replica throughput concurrency latency load batch parallel shard capacity backpressure",
        question: "What load must it carry, and how does it grow? No passage that was found says.",
    },
    Aspect {
        field: Field::Security,
        words: "security secret auth authentication authorization credential permission tls encrypt key password role sanitise injection",
        question: "Who may use it, and how are secrets kept? No passage that was found says.",
    },
    Aspect {
        field: Field::Observability,
        words: "metric metrics log logging trace tracing alert dashboard prometheus grafana health probe monitor",
        question: "How does one see that it works? No passage that was found says.",
    },
    Aspect {
        field: Field::Risks,
        words: "fail failure error crash timeout retry lost risk outage stale race corrupt overload deadlock",
        question: "What happens when a dependency fails? No passage that was found says.",
    },
];

/// A line of a passage that can be quoted.
struct Quote<'a> {
    entry: &'a Entry,
    /// The line, exactly, without its indentation and list marker.
    line: String,
    words: HashSet<String>,
    /// How much it has to do with the request.
    relevance: f64,
}

fn assemble(request: &str, shelf: &Shelf) -> Spec {
    let asked = words::of(request);
    let quotes = quotes(shelf, &asked);
    let mut used: HashSet<String> = HashSet::new();

    let files = files(shelf);
    let components: Vec<Component> = files
        .iter()
        .take(MAX_FILES)
        .map(|(source, entries)| {
            let quote = best(&quotes, &mut used, |quote| quote.entry.passage.source == *source);
            let entry = quote.map_or(entries[0], |quote| quote.entry);
            Component {
                name: (*source).to_owned(),
                responsibility: match quote {
                    Some(quote) => quoted(quote),
                    None => format!("Matches the request with {} passages", entries.len()),
                },
                technology: entry.passage.lang.clone().unwrap_or_default(),
                interfaces: headings(entries),
                citations: vec![entry.n],
            }
        })
        .collect();

    let mut open_questions = Vec::new();
    let mut spec = Spec {
        title: title(request),
        summary: summary(shelf, &files),
        context: claims(&quotes, &mut used, |quote| quote.relevance > 0.0),
        requirements: Requirements {
            functional: Vec::new(),
            non_functional: claims(&quotes, &mut used, |quote| {
                let line = quote.line.to_lowercase();
                quote.relevance > 0.0
                    && [" must ", " never ", " at most ", " at least ", " always ", " only if "]
                        .iter()
                        .any(|word| line.contains(word))
            }),
        },
        components,
        ..Spec::default()
    };
    spec.requirements.functional = vec![Claim { text: first_sentences(request, 400), citations: Vec::new() }];
    spec.decisions = decisions(&quotes, &mut used);
    for aspect in ASPECTS {
        let about = words::of(aspect.words);
        let found = claims(&quotes, &mut used, |quote| !quote.words.is_disjoint(&about));
        if found.is_empty() {
            open_questions.push(aspect.question.to_owned());
        }
        match aspect.field {
            Field::Deployment => spec.deployment = found,
            Field::Scaling => spec.scaling = found,
            Field::Security => spec.security = found,
            Field::Observability => spec.observability = found,
            _ => {
                spec.risks = found
                    .into_iter()
                    .map(|claim| Risk {
                        risk: claim.text,
                        severity: Severity::Medium,
                        mitigation: String::new(),
                        citations: claim.citations,
                    })
                    .collect();
            }
        }
    }
    open_questions.splice(0..0, unknown_words(request, shelf));
    if !spec.decisions.is_empty() {
        open_questions.push(
            "Which alternatives were weighed? An extract cannot tell; a model or a person must.".to_owned(),
        );
    }
    spec.open_questions = open_questions;
    spec.diagrams = diagram(&spec.title, &files).into_iter().collect();
    spec
}

/// The request's first sentence as a title.
fn title(request: &str) -> String {
    let line = clean::line(request);
    let end = line
        .char_indices()
        .find(|(at, c)| {
            matches!(c, '.' | '?' | '!' | ';')
                && line[at + c.len_utf8()..].chars().next().is_none_or(char::is_whitespace)
        })
        .map_or(line.len(), |(at, _)| at);
    clean::cut(line[..end].trim_end_matches([':', ',']), 90)
}

fn first_sentences(request: &str, max: usize) -> String {
    clean::cut(&clean::line(request), max)
}

fn summary(shelf: &Shelf, files: &[(&str, Vec<&Entry>)]) -> String {
    let passages = shelf.len();
    if passages == 0 {
        return "Nothing in the index matches this request, so there is nothing to quote. \
                The sections below are empty on purpose."
            .to_owned();
    }
    let names: Vec<String> = files.iter().take(3).map(|(source, _)| format!("`{source}`")).collect();
    let s = |n: usize| if n == 1 { "" } else { "s" };
    format!(
        "The index holds {passages} passage{} from {} file{} that match this request, above all in {}. \
         The sections below quote what they say, grouped by subject; the open questions at the end name \
         what they do not say.",
        s(passages),
        files.len(),
        s(files.len()),
        names.join(", "),
    )
}

/// Passages by file; files in the order of their best passage.
fn files(shelf: &Shelf) -> Vec<(&str, Vec<&Entry>)> {
    let mut files: Vec<(&str, Vec<&Entry>)> = Vec::new();
    for entry in shelf.entries() {
        match files.iter_mut().find(|(source, _)| *source == entry.passage.source) {
            Some((_, entries)) => entries.push(entry),
            None => files.push((&entry.passage.source, vec![entry])),
        }
    }
    files
}

fn headings(entries: &[&Entry]) -> String {
    let mut seen: Vec<&str> = Vec::new();
    for entry in entries {
        if let Some(heading) = entry.passage.heading.as_deref()
            && !seen.contains(&heading)
        {
            seen.push(heading);
        }
    }
    if seen.is_empty() { String::new() } else { format!("see {}", seen[..seen.len().min(3)].join("; ")) }
}

/// The lines worth quoting, most relevant first.
fn quotes<'a>(shelf: &'a Shelf, asked: &HashSet<String>) -> Vec<Quote<'a>> {
    let mut quotes = Vec::new();
    for (rank, entry) in shelf.entries().enumerate() {
        let mut in_fence = false;
        for line in entry.passage.text.lines() {
            if line.trim_start().starts_with("```") {
                in_fence = !in_fence;
                continue;
            }
            let Some(line) = prose(line) else { continue };
            if in_fence {
                continue;
            }
            let words = words::of(&line);
            if words.len() < 4 {
                continue;
            }
            let shared = words.intersection(asked).count() as f64;
            // Shared words count most; then short lines before long ones, good passages before others.
            let relevance = if shared == 0.0 {
                0.0
            } else {
                shared + words::share(&words, asked) + 1.0 / (2.0 + rank as f64)
            };
            quotes.push(Quote { entry, line, words, relevance });
        }
    }
    quotes.sort_by(|a, b| b.relevance.total_cmp(&a.relevance));
    quotes
}

/// A line of prose without its marker; `None` for code, headings, tables and fragments.
fn prose(line: &str) -> Option<String> {
    let line = line.trim();
    let comment = ["//!", "///", "//", "--", "#:", "# "]
        .iter()
        .find_map(|marker| line.strip_prefix(marker).map(|rest| (marker, rest.trim())));
    let is_heading = line.starts_with('#');
    let line = match comment {
        // In Markdown a `#` begins a heading, and a heading is no statement.
        Some((marker, _)) if is_heading && marker.trim() == "#" => return None,
        Some((_, rest)) => rest,
        None => line,
    };
    let line = line.trim_start_matches(['-', '*', '>', ' ']).trim();
    let list_number = line.bytes().take_while(u8::is_ascii_digit).count();
    let line = match line.get(list_number..) {
        Some(rest) if list_number > 0 && rest.starts_with(". ") => rest[2..].trim(),
        _ => line,
    };
    let letters = line.chars().filter(|c| c.is_alphabetic() || *c == ' ').count();
    let enough = line.split_whitespace().count() >= 5 && letters * 100 >= line.chars().count() * 72;
    let code = line.ends_with(['{', '}', ';', '(', ',', '=', '|', '\\'])
        || line.starts_with(['|', '<', '{', '@', '$']);
    (enough && !code).then(|| line.to_owned())
}

/// The most relevant line not quoted yet.
fn best<'q, 'a>(
    quotes: &'q [Quote<'a>],
    used: &mut HashSet<String>,
    wanted: impl Fn(&Quote<'a>) -> bool,
) -> Option<&'q Quote<'a>> {
    let found = quotes.iter().find(|quote| !used.contains(&quote.line) && wanted(quote))?;
    used.insert(found.line.clone());
    Some(found)
}

fn claims<'a>(
    quotes: &[Quote<'a>],
    used: &mut HashSet<String>,
    wanted: impl Fn(&Quote<'a>) -> bool,
) -> Vec<Claim> {
    let mut claims = Vec::new();
    while claims.len() < MAX_QUOTES
        && let Some(quote) = best(quotes, used, &wanted)
    {
        claims.push(Claim { text: quoted(quote), citations: vec![quote.entry.n] });
    }
    claims
}

fn quoted(quote: &Quote<'_>) -> String {
    format!("“{}”", clean::cut(&quote.line, MAX_QUOTE_CHARS))
}

/// Lines that give a reason are decisions somebody took.
fn decisions(quotes: &[Quote<'_>], used: &mut HashSet<String>) -> Vec<Decision> {
    const REASONS: &[&str] =
        &["because", "instead of", "rather than", "so that", "in favour of", "in favor of", "decided"];
    let mut decisions = Vec::new();
    while decisions.len() < 3
        && let Some(quote) = best(quotes, used, |quote| {
            let line = quote.line.to_lowercase();
            quote.relevance > 0.0 && REASONS.iter().any(|reason| line.contains(reason))
        })
    {
        let passage = &quote.entry.passage;
        let title = match &passage.heading {
            Some(heading) => heading.clone(),
            None => format!("From {}", passage.source),
        };
        decisions.push(Decision {
            title,
            decision: quoted(quote),
            rationale: String::new(),
            alternatives: Vec::<Alternative>::new(),
            consequences: Vec::new(),
            citations: vec![quote.entry.n],
        });
    }
    decisions
}

/// Words that a request says and no document needs to.
const VERBS: &str = "design build create write make add give show describe explain plan propose need want \
                         please system service architecture spec solution approach support new";

/// Words of the request that no passage knows: each is a question.
fn unknown_words(request: &str, shelf: &Shelf) -> Vec<String> {
    let mut known: HashSet<String> = HashSet::new();
    for entry in shelf.entries() {
        known.extend(entry.words());
    }
    if known.is_empty() {
        return Vec::new();
    }
    let verbs = words::of(VERBS);
    let mut asked: Vec<&str> = Vec::new();
    let mut seen = HashSet::new();
    for word in request.split(|c: char| !c.is_alphanumeric() && c != '-' && c != '_') {
        let stems = words::list(word);
        if stems.is_empty() || stems.iter().any(|stem| known.contains(stem) || verbs.contains(stem)) {
            continue;
        }
        if seen.insert(stems) {
            asked.push(word);
        }
    }
    if asked.is_empty() {
        return Vec::new();
    }
    let list: Vec<String> = asked.iter().take(6).map(|word| format!("“{}”", clean::cut(word, 40))).collect();
    vec![format!(
        "No passage that was found mentions {}. Is it in scope, and where is it written down?",
        list.join(", ")
    )]
}

/// Request, folders, files: what the document rests on.
fn diagram(title: &str, files: &[(&str, Vec<&Entry>)]) -> Option<Diagram> {
    if files.is_empty() {
        return None;
    }
    let mut areas: BTreeMap<&str, Vec<(usize, &str, usize)>> = BTreeMap::new();
    for (index, (source, entries)) in files.iter().take(MAX_FILES).enumerate() {
        let (area, name) = source.rsplit_once('/').unwrap_or(("top level", source));
        areas.entry(area).or_default().push((index, name, entries.len()));
    }
    let mut out = format!("flowchart LR\n    request[\"{}\"]\n", label(title));
    for (number, (area, members)) in areas.iter().enumerate() {
        // Writing to a String cannot fail.
        let _ = writeln!(out, "    subgraph area{number}[\"{}\"]", label(area));
        for (index, name, _) in members {
            let _ = writeln!(out, "        file{index}[\"{}\"]", label(name));
        }
        let _ = writeln!(out, "    end");
    }
    for (index, _, passages) in areas.values().flatten() {
        let s = if *passages == 1 { "" } else { "s" };
        let _ = writeln!(out, "    request -->|\"{passages} passage{s}\"| file{index}");
    }
    Some(Diagram {
        title: "Where the passages come from".to_owned(),
        mermaid: out.trim_end().to_owned(),
        fault: None,
    })
}

/// A text as a Mermaid label.
fn label(text: &str) -> String {
    let text: String = text.chars().map(|c| if "\"<>`;#".contains(c) { ' ' } else { c }).collect::<String>();
    let text = clean::cut(&clean::line(&text), 60);
    if text.is_empty() { "?".to_owned() } else { text }
}
