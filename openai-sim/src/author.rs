//! Writes answers that a person can read: an architecture document from the request and the passages
//! of the prompt, with real sentences of those passages and their numbers.
//!
//! No model, and no judgement: a sentence goes where its words point to. What no passage says is said
//! in a few fixed sentences without a citation, as a model falls back on general knowledge.

use serde_json::{Value, json};

use crate::prompt::{Passage, Prompt};

/// A sentence of a passage.
struct Sentence {
    text: String,
    /// In lower case, padded, for finding words.
    lower: String,
    /// Index of its passage.
    passage: usize,
    /// Words shared with the request.
    shared: usize,
}

/// Fitting sentences that make a document without the others.
const ENOUGH: usize = 8;

/// Takes sentences, each once.
struct Author<'a> {
    prompt: &'a Prompt,
    sentences: Vec<Sentence>,
    used: Vec<bool>,
    /// True where enough sentences share a word with the request to do without the others.
    choosy: bool,
    /// How many items a list has.
    items: usize,
}

/// Everything that an architecture document of any kind may hold, with lists of up to `items` items.
pub(crate) fn document(prompt: &Prompt, items: u64) -> Value {
    let sentences = sentences(prompt);
    let used = vec![false; sentences.len()];
    let items = usize::try_from(items).unwrap_or(2).min(8);
    let choosy = sentences.iter().filter(|sentence| sentence.shared > 0).count() >= ENOUGH;
    Author { prompt, sentences, used, choosy, items }.document()
}

/// The names that [`document`] fills.
pub(crate) const FIELDS: &[&str] = &[
    "title",
    "summary",
    "changes",
    "context",
    "requirements",
    "drivers",
    "options",
    "outcome",
    "consequences",
    "confirmation",
    "strengths",
    "findings",
    "components",
    "decisions",
    "diagrams",
    "deployment",
    "scaling",
    "security",
    "observability",
    "risks",
    "open_questions",
];

const REASONS: &[&str] = &["because", "instead", "rather than", "so that", "therefore", "in favour of"];
const MUSTS: &[&str] = &["must", "never", "at most", "at least", "always", "only", "exactly"];
const FAILURES: &[&str] =
    &["fail", "fails", "failure", "crash", "lost", "timeout", "dead", "dies", "down", "expires", "outage"];
const DEPLOYMENT: &[&str] =
    &["deploy", "deployment", "kubernetes", "image", "release", "compose", "migrate", "replicas", "start"];
const SCALING: &[&str] =
    &["workers", "replicas", "concurrent", "batch", "batched", "throughput", "many", "load", "fleet"];
const SECURITY: &[&str] = &[
    "secret",
    "secrets",
    "role",
    "rights",
    "credentials",
    "untrusted",
    "escaped",
    "redacted",
    "tls",
    "grants",
];
const OBSERVABILITY: &[&str] =
    &["metric", "metrics", "log", "logs", "alert", "trace", "readiness", "shown", "counted", "dashboard"];
const PROOFS: &[&str] = &["test", "tests", "tested", "checked", "suite", "shows", "proves", "metric"];
const GAINS: &[&str] = &["so that", "without", "cannot", "same", "exactly", "by itself", "at once"];
const COSTS: &[&str] = &["but", "cost", "costs", "slower", "wait", "waits", "only", "more"];

/// How sentences begin that rest on the one before them, and fragments.
const REFERRING: &[&str] = &[
    "This ",
    "That ",
    "These ",
    "Those ",
    "It ",
    "They ",
    "So ",
    "But ",
    "Then ",
    "Nor ",
    "And ",
    "Or ",
    "The last",
    "The first",
    "Both ",
    "Each of them",
    "What ",
    "Where ",
    "Which ",
    "How ",
    "Tests: ",
    "See ",
    "Here ",
    "There ",
    "Such ",
    "Otherwise ",
];

/// A sentence without one of these is a heading, a label or a fragment.
const VERBS: &[&str] = &[
    "is", "are", "was", "has", "have", "must", "can", "cannot", "may", "does", "do", "goes", "keeps", "keep",
    "takes", "take", "holds", "hold", "waits", "wait", "gets", "get", "makes", "make", "says", "say",
    "stores", "sends", "send", "reads", "writes", "needs", "runs", "stays", "stay", "comes", "never",
    "fails", "follows", "reserves", "asks", "costs", "replaces", "decides", "decide", "counts", "booked",
    "refused", "stops", "starts", "ends",
];

/// What a senior engineer says where no document does.
const COMMON: &[(&str, &[&str])] = &[
    (
        "deployment",
        &["Roll out one replica at a time and compare its error rate with the others before going on"],
    ),
    (
        "scaling",
        &[
            "Measure the slowest dependency first, because adding replicas only moves the queue in front of it",
        ],
    ),
    (
        "security",
        &["Give each process a key of its own with the fewest rights, so that one leak can be revoked alone"],
    ),
    ("observability", &["Record how long a request waits, how long it runs and how it ends, each by cause"]),
    ("non_functional", &["State the load and the delay that are still acceptable, and test against both"]),
    ("confirmation", &["A test in the build fails when the decision is broken"]),
    ("good", &["The rule is written once, where it is enforced"]),
    ("bad", &["One more thing to run, to watch and to upgrade"]),
    ("strengths", &["The responsibilities are separated, so each part can be tested alone"]),
    ("drivers", &["A change must be possible while requests are being served"]),
    ("context", &["No passage describes what exists today, so this starts from the request alone"]),
];

/// A road not taken: its name, what it would mean, and the reason against it.
type Road = (&'static str, &'static str, &'static str);

const ROADS: &[Road] = &[
    (
        "Leave it as it is",
        "Nothing is built; the documents say how to live with it",
        "the request names a need that what exists does not meet",
    ),
    (
        "Build it into every caller",
        "Each caller gets the rule as a library and applies it itself",
        "callers upgrade at different times, so two versions of the rule would be in force at once",
    ),
    (
        "Buy a managed service",
        "A provider runs it, and the team configures it",
        "the rules would move out of the code and the tests that enforce them today",
    ),
    (
        "Do it by hand when it happens",
        "An alert calls a person, who follows a runbook",
        "nobody is awake at night, and a runbook that is rarely used is wrong when it is needed",
    ),
    (
        "Check it afterwards in a batch",
        "A job compares what happened with what should have, once an hour",
        "by then the damage is done and has to be undone",
    ),
    (
        "Put a proxy in front",
        "A process of its own sees all traffic and applies the rule",
        "it is one more thing that can fail, and it cannot see what the store knows",
    ),
];

const CONSEQUENCES: &[(&str, &str)] = &[
    ("The rule holds without anybody having to remember it", "A change of it is a release, not a setting"),
    ("A reader of the code finds the reason in one place", "The document that says so has to be kept true"),
    ("It can be tested without the rest of the system", "The test has to be run against every adapter"),
];

const MITIGATIONS: &[&str] = &[
    "Alert on it, and let the runbook's first step say how to see which part is at fault",
    "Bound it in time, and say in the answer what was left out",
    "Rehearse it once a quarter on a copy of production",
];

impl Author<'_> {
    fn document(&mut self) -> Value {
        let title = title(&self.prompt.request);
        // The telling ones first; what is left over becomes context.
        let decisions = self.decisions();
        let risks = self.risks();
        let changes = self.changes();
        let non_functional = self.claims("non_functional", MUSTS);
        let confirmation = self.claims("confirmation", PROOFS);
        let deployment = self.claims("deployment", DEPLOYMENT);
        let security = self.claims("security", SECURITY);
        let observability = self.claims("observability", OBSERVABILITY);
        let scaling = self.claims("scaling", SCALING);
        let (good, bad) = (self.claims("good", GAINS), self.claims("bad", COSTS));
        let context = self.claims("context", &[]);
        let options = self.options(&title);
        let chosen = options[0]["name"].clone();
        let components = self.components();
        let findings = self.findings();
        json!({
            "title": title,
            "summary": self.summary(&title),
            "changes": changes,
            "context": context,
            "requirements": {"functional": self.asked(), "non_functional": non_functional},
            "drivers": self.claims("drivers", MUSTS),
            "outcome": {
                "chosen": chosen,
                "rationale": "It is the only option that the existing parts already support, and it can be undone",
                "citations": options[0]["citations"],
            },
            "options": options,
            "consequences": {"good": good, "bad": bad},
            "confirmation": confirmation,
            "strengths": self.claims("strengths", GAINS),
            "findings": findings,
            "diagrams": diagrams(&components),
            "components": components,
            "decisions": decisions,
            "deployment": deployment,
            "scaling": scaling,
            "security": security,
            "observability": observability,
            "risks": risks,
            "open_questions": self.questions(),
        })
    }

    /// The best sentence that was not used, has to do with the request, and holds one of the words; any,
    /// without words.
    fn take(&mut self, words: &[&str]) -> Option<usize> {
        let at = (0..self.sentences.len()).find(|at| {
            !self.used[*at]
                && (self.sentences[*at].shared > 0 || !self.choosy)
                && (words.is_empty()
                    || words.iter().any(|word| self.sentences[*at].lower.contains(&format!(" {word} "))))
        })?;
        self.used[at] = true;
        Some(at)
    }

    fn number(&self, at: usize) -> u64 {
        self.prompt.passages[self.sentences[at].passage].number
    }

    fn claims(&mut self, field: &str, words: &[&str]) -> Vec<Value> {
        let mut claims = Vec::new();
        while claims.len() < self.items
            && let Some(at) = self.take(words)
        {
            claims.push(json!({"text": self.sentences[at].text, "citations": [self.number(at)]}));
        }
        if claims.len() < self.items.min(1) {
            let common = COMMON.iter().find(|(name, _)| *name == field).map_or(&[][..], |(_, texts)| texts);
            claims.extend(common.iter().map(|text| json!({"text": text, "citations": []})));
        }
        claims
    }

    /// What the request itself asks for.
    fn asked(&self) -> Vec<Value> {
        let request = self.prompt.request.split_whitespace().collect::<Vec<_>>().join(" ");
        split(&request)
            .into_iter()
            .take(self.items.max(1))
            .map(|text| json!({"text": text.chars().take(300).collect::<String>(), "citations": []}))
            .collect()
    }

    fn summary(&self, title: &str) -> String {
        let mut places: Vec<&str> = Vec::new();
        for passage in &self.prompt.passages {
            if !places.contains(&passage.path()) && places.len() < 3 {
                places.push(passage.path());
            }
        }
        let what = lower_first(title);
        if places.is_empty() {
            return format!(
                "This is a proposal for {what}. No passage of the team's documents was found for it, so it rests on \
                 the request and on general knowledge. The open questions name what a person must decide first."
            );
        }
        let places: Vec<String> = places.iter().map(|place| format!("`{place}`")).collect();
        let named = match places.as_slice() {
            [rest @ .., last] if !rest.is_empty() => format!("{} and {last} say", rest.join(", ")),
            _ => format!("{} says", places.concat()),
        };
        format!(
            "This is a proposal for {what}. It builds on what {named} and keeps to the parts that exist. Each \
             statement from a document names it; the rest is marked as general knowledge. The open questions at \
             the end are for a person to decide."
        )
    }

    /// Sentences that give a reason, taken apart at the reason.
    fn decisions(&mut self) -> Vec<Value> {
        let mut decisions = Vec::new();
        for index in 0..self.items {
            let Some(at) = self.take(REASONS).or_else(|| self.take(MUSTS)).or_else(|| self.take(&[])) else {
                break;
            };
            let (what, why) = reason(&self.sentences[at].text);
            let passage = &self.prompt.passages[self.sentences[at].passage];
            let why =
                why.unwrap_or_else(|| "It is how the team's documents describe the system today".to_owned());
            decisions.push(json!({
                "title": passage.name(),
                "decision": what,
                "rationale": why,
                "alternatives": roads(2 * index).map(|(name, _, why_not)| json!({"name": name, "why_not": why_not})).collect::<Vec<_>>(),
                "consequences": [CONSEQUENCES[index % CONSEQUENCES.len()].0, CONSEQUENCES[index % CONSEQUENCES.len()].1],
                "citations": [passage.number],
            }));
        }
        if decisions.is_empty() && self.items > 0 {
            decisions.push(json!({
                "title": "Start with the smallest part that is useful",
                "decision": "Build one part, put it in front of real requests, then decide about the next",
                "rationale": "No document says what exists, so every assumption should be tested early",
                "alternatives": roads(0).map(|(name, _, why_not)| json!({"name": name, "why_not": why_not})).collect::<Vec<_>>(),
                "consequences": ["The first version covers less", "Its numbers decide what comes next"],
                "citations": [],
            }));
        }
        decisions
    }

    fn options(&mut self, title: &str) -> Vec<Value> {
        let at = self.take(REASONS).or_else(|| self.take(&[]));
        let (description, citations, pro) = match at {
            Some(at) => {
                let (what, why) = reason(&self.sentences[at].text);
                (what, vec![self.number(at)], why)
            }
            None => (format!("Build {} as a part of its own", lower_first(title)), Vec::new(), None),
        };
        let mut options = vec![json!({
            "name": "Build on what is there",
            "description": description,
            "pros": [pro.unwrap_or_else(|| "Nothing new has to be operated".to_owned())],
            "cons": ["It inherits the limits of what is there"],
            "citations": citations,
        })];
        options.extend(roads(0).chain(roads(2)).take(self.items.max(2)).map(
            |(name, description, why_not)| {
                json!({"name": name, "description": description,
                   "pros": ["It is understood at once"], "cons": [capital(why_not)], "citations": []})
            },
        ));
        options
    }

    /// One a file, named after it, described by its best sentence.
    fn components(&mut self) -> Vec<Value> {
        let mut components: Vec<Value> = Vec::new();
        let mut seen: Vec<String> = Vec::new();
        for (index, passage) in self.prompt.passages.iter().enumerate() {
            // Code is named after its file, a document after what it is about.
            let name =
                if technology(passage.path()).is_empty() { passage.name() } else { part_name(passage) };
            if components.len() > self.items || seen.contains(&name) {
                continue;
            }
            let of_it = |at: &usize| self.sentences[*at].passage == index;
            let best = (0..self.sentences.len())
                .filter(of_it)
                .find(|at| !self.used[*at])
                .or_else(|| (0..self.sentences.len()).find(of_it));
            let Some(at) = best else { continue };
            self.used[at] = true;
            seen.push(name.clone());
            components.push(json!({
                "name": name,
                "responsibility": self.sentences[at].text,
                "technology": technology(passage.path()),
                "interfaces": "",
                "citations": [passage.number],
            }));
        }
        if components.is_empty() && self.items > 0 {
            let words = &self.prompt.words;
            for (index, role) in
                ["takes requests and checks them", "does the work", "keeps what must not be lost"]
                    .iter()
                    .enumerate()
            {
                let name =
                    words.get(index).map_or_else(|| format!("Part {}", index + 1), |word| capital(word));
                components.push(json!({"name": name, "responsibility": role, "technology": "", "interfaces": "", "citations": []}));
            }
        }
        components
    }

    fn risks(&mut self) -> Vec<Value> {
        let mut risks = Vec::new();
        while risks.len() < self.items
            && let Some(at) = self.take(FAILURES)
        {
            let severity = ["high", "medium", "low"][risks.len() % 3];
            risks.push(json!({
                "risk": self.sentences[at].text, "severity": severity,
                "mitigation": MITIGATIONS[risks.len() % MITIGATIONS.len()],
                "citations": [self.number(at)],
            }));
        }
        if risks.is_empty() && self.items > 0 {
            risks.push(json!({
                "risk": "A dependency answers slowly instead of failing, and requests pile up", "severity": "medium",
                "mitigation": "Bound every call in time, and refuse early when the queue is long", "citations": [],
            }));
        }
        risks
    }

    fn findings(&mut self) -> Vec<Value> {
        let mut findings = Vec::new();
        while findings.len() < self.items
            && let Some(at) = self.take(COSTS).or_else(|| self.take(&[]))
        {
            let passage = &self.prompt.passages[self.sentences[at].passage];
            let severity = ["high", "medium", "low"][findings.len() % 3];
            findings.push(json!({
                "title": passage.name(), "severity": severity,
                "finding": self.sentences[at].text,
                "recommendation": "Write down for which load this was decided, and test it at twice that load",
                "citations": [passage.number],
            }));
        }
        if findings.is_empty() && self.items > 0 {
            findings.push(json!({
                "title": "Nothing is written down", "severity": "high",
                "finding": "No passage describes the design that is to be reviewed",
                "recommendation": "Index its documents, then ask again", "citations": [],
            }));
        }
        findings
    }

    fn changes(&self) -> Vec<Value> {
        let asked = self.asked();
        asked
            .into_iter()
            .take(self.items.max(1))
            .map(|claim| {
                json!({"section": "Decisions", "change": claim["text"], "reason": "the request asks for it", "citations": []})
            })
            .collect()
    }

    fn questions(&self) -> Vec<String> {
        let questions = [
            "Which load must this carry on the busiest day, and who decides when that is not enough?",
            "Who is called when it fails at night, and what may they do without asking?",
        ];
        questions.iter().take(self.items).map(|question| (*question).to_owned()).collect()
    }
}

impl Passage {
    /// The file, without its lines.
    fn path(&self) -> &str {
        self.place.rsplit_once(':').map_or(self.place.as_str(), |(path, _)| path)
    }

    /// Its heading's last part, or its file.
    fn name(&self) -> String {
        match self.heading.rsplit('›').next().map(str::trim).filter(|heading| !heading.is_empty()) {
            Some(heading) => heading.to_owned(),
            None => part_name(self),
        }
    }
}

/// `worker/src/call.rs` is the part `worker: call`.
fn part_name(passage: &Passage) -> String {
    let path = passage.path();
    let stem = path.rsplit('/').next().unwrap_or(path);
    let stem = stem.rsplit_once('.').map_or(stem, |(stem, _)| stem);
    let stem = if stem.chars().all(|c| c.is_uppercase() || c == '_') {
        stem.to_lowercase()
    } else {
        stem.to_owned()
    };
    let name = capital(&stem.replace(['_', '-'], " "));
    match path.split('/').next().filter(|top| path.contains('/') && *top != "docs") {
        Some(top) if !name.to_lowercase().contains(top) => format!("{name} ({top})"),
        _ => name,
    }
}

fn technology(path: &str) -> &'static str {
    match path.rsplit('.').next().unwrap_or_default() {
        "rs" => "Rust",
        "sql" => "SQL",
        "py" => "Python",
        "ts" | "tsx" => "TypeScript",
        "go" => "Go",
        "yaml" | "yml" => "YAML",
        _ => "",
    }
}

/// Two roads not taken.
fn roads(from: usize) -> impl Iterator<Item = Road> {
    ROADS.iter().copied().cycle().skip(from % ROADS.len()).take(2)
}

/// The parts in the order of the passages, and how a request goes through them.
fn diagrams(components: &[Value]) -> Vec<Value> {
    let names: Vec<String> = components
        .iter()
        .take(5)
        .map(|component| {
            let name = component["name"].as_str().unwrap_or_default();
            let name = name.split([':', ',']).next().unwrap_or(name);
            name.chars().filter(|c| c.is_alphanumeric() || " -/().".contains(*c)).collect()
        })
        .collect();
    if names.len() < 2 {
        return Vec::new();
    }
    let mut flow = vec!["flowchart LR".to_owned(), "  caller([\"Caller\"])".to_owned()];
    flow.extend(names.iter().enumerate().map(|(index, name)| format!("  part{index}[\"{name}\"]")));
    flow.push("  caller -->|\"asks\"| part0".to_owned());
    for index in 1..names.len() {
        flow.push(format!("  part0 -->|\"uses\"| part{index}"));
    }
    let mut sequence = vec!["sequenceDiagram".to_owned(), "  participant c as Caller".to_owned()];
    sequence.extend(
        names.iter().take(3).enumerate().map(|(index, name)| format!("  participant p{index} as {name}")),
    );
    sequence.push("  c->>p0: request".to_owned());
    for index in 1..names.len().min(3) {
        sequence.push(format!("  p0->>p{index}: what it needs"));
        sequence.push(format!("  p{index}-->>p0: result"));
    }
    sequence.push("  p0-->>c: answer".to_owned());
    vec![
        json!({"title": "The parts and who uses whom", "mermaid": flow.join("\n")}),
        json!({"title": "A request on its way", "mermaid": sequence.join("\n")}),
    ]
}

/// The request without its verb, as a title.
fn title(request: &str) -> String {
    let line = request.split_whitespace().collect::<Vec<_>>().join(" ");
    let first = split(&line).into_iter().next().unwrap_or(line);
    let mut rest = first.as_str();
    for verb in [
        "please ",
        "design ",
        "write ",
        "review ",
        "assess ",
        "propose ",
        "plan ",
        "describe ",
        "an adr on ",
        "an adr for ",
        "an adr: ",
        "a decision record on ",
        "a decision record for ",
        "a ",
        "an ",
        "the ",
        "our ",
    ] {
        if rest.len() > verb.len()
            && rest.is_char_boundary(verb.len())
            && rest[..verb.len()].eq_ignore_ascii_case(verb)
        {
            rest = &rest[verb.len()..];
        }
    }
    // What follows a comma says why, and for how much.
    let rest = rest.split(", ").next().unwrap_or(rest);
    let words: Vec<&str> = rest.trim_end_matches(['.', '?', '!']).split(' ').take(14).collect();
    let title = capital(words.join(" ").trim_end_matches([',', ':', ';']));
    if title.is_empty() { "Proposal".to_owned() } else { title }
}

/// What is done, and why, where a sentence says both.
fn reason(sentence: &str) -> (String, Option<String>) {
    for word in [", because ", " because ", ", so that ", " so that ", "; otherwise ", ": "] {
        if let Some((what, why)) = sentence.split_once(word)
            && what.split(' ').count() >= 4
            && why.split(' ').count() >= 4
        {
            let why = match word.trim_matches([',', ' ', ';', ':']) {
                "so that" => format!("So that {why}"),
                "because" => format!("Because {why}"),
                _ => capital(why),
            };
            return (what.to_owned(), Some(why));
        }
    }
    (sentence.to_owned(), None)
}

/// The sentences of all passages that can stand alone, most fitting first.
fn sentences(prompt: &Prompt) -> Vec<Sentence> {
    let mut all: Vec<Sentence> = Vec::new();
    for (index, passage) in prompt.passages.iter().enumerate() {
        let is_code = !technology(passage.path()).is_empty();
        for text in split(&prose(&passage.text, is_code)) {
            let words = text.split(' ').count();
            let starts = text.starts_with(|c: char| c.is_uppercase() || c == '`');
            // Words that point to a sentence before this one.
            let refers = REFERRING.iter().any(|word| text.starts_with(word)) || text.contains(" below");
            let says = text.split(' ').any(|word| VERBS.contains(&word.trim_end_matches([',', ';', ':'])));
            if !(6..=34).contains(&words) || !starts || refers || !says || text.chars().count() > 240 {
                continue;
            }
            if all.iter().any(|known| known.text == text) {
                continue;
            }
            let plain: String =
                text.to_lowercase().chars().map(|c| if c.is_alphanumeric() { c } else { ' ' }).collect();
            let lower = format!(" {} ", plain.split_whitespace().collect::<Vec<_>>().join(" "));
            let stem = |word: &str| word.trim_end_matches("ing").trim_end_matches(['s', 'e', 'd']).to_owned();
            let shared =
                prompt.words.iter().filter(|word| lower.contains(&format!(" {}", stem(word)))).count();
            all.push(Sentence { text, lower, passage: index, shared });
        }
    }
    // Stable: equally fitting ones stay in the order of the passages.
    all.sort_by_key(|sentence| std::cmp::Reverse(sentence.shared));
    all
}

/// Paragraphs of a Markdown text, or the comments of code, each on one line; no headings, tables, code.
fn prose(text: &str, is_code: bool) -> String {
    let mut out = String::new();
    let mut fenced = false;
    for line in text.lines() {
        let line = line.trim();
        if line.starts_with("```") {
            fenced = !fenced;
            out.push('\n');
            continue;
        }
        let said = if is_code {
            ["//!", "///", "//", "-- ", "# "]
                .iter()
                .find_map(|sign| line.strip_prefix(sign))
                .unwrap_or_default()
        } else if fenced || line.starts_with(['#', '|', '<', '!', '{', '}', '[', '┌', '│', '└']) {
            ""
        } else {
            line
        };
        let said = said.trim();
        let digits = said.bytes().take_while(u8::is_ascii_digit).count();
        let listed = ["- ", "* ", "+ ", "> "].iter().find_map(|sign| said.strip_prefix(sign));
        let listed = listed.or_else(|| (digits > 0).then(|| said[digits..].strip_prefix(". ")).flatten());
        if said.is_empty() || listed.is_some() {
            out.push('\n');
        } else if !out.ends_with('\n') {
            out.push(' ');
        }
        out.push_str(listed.unwrap_or(said));
    }
    // Bold and italics are the renderer's business; links are said by their text.
    let mut plain = out.replace('*', "");
    while let Some(start) = plain.find("](") {
        let end = plain[start..].find(')').map_or(plain.len(), |end| start + end + 1);
        plain.replace_range(start..end, "");
        if let Some(open) = plain[..start].rfind('[') {
            plain.remove(open);
        }
    }
    plain
}

/// Sentences without their full stop.
fn split(text: &str) -> Vec<String> {
    let mut sentences = Vec::new();
    for paragraph in text.lines() {
        let mut start = 0;
        let ends = paragraph
            .char_indices()
            .filter(|(at, c)| {
                matches!(c, '.' | '!' | '?')
                    && paragraph[at + 1..].chars().next().is_some_and(char::is_whitespace)
                    && paragraph[at + 1..]
                        .trim_start()
                        .chars()
                        .next()
                        .is_some_and(|next| !next.is_lowercase())
            })
            .map(|(at, _)| at + 1)
            .chain([paragraph.len()]);
        for end in ends {
            let sentence = paragraph[start..end].trim().trim_end_matches('.').trim();
            start = end;
            let pairs = sentence.matches('`').count().is_multiple_of(2);
            if !sentence.is_empty() && pairs && !sentence.contains(['{', '}', '|', '<', '>', '\\', '[', ']'])
            {
                sentences.push(sentence.to_owned());
            }
        }
    }
    sentences
}

fn capital(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map_or_else(String::new, |first| first.to_uppercase().chain(letters).collect())
}

/// `Rate limiter` within a sentence; `API gateway` stays.
fn lower_first(text: &str) -> String {
    let mut letters = text.chars();
    match (letters.next(), letters.clone().next()) {
        (Some(first), Some(second)) if !second.is_uppercase() => {
            first.to_lowercase().chain(letters).collect()
        }
        _ => text.to_owned(),
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    fn prompt() -> Prompt {
        Prompt::read(&[json!({"role": "user", "content": "\
CODE is data-1.

<<<data-1 request
Design a rate limiter for our public API. It must survive a restart.
data-1>>>

Passages, best first:

<<<data-1 [1] docs/GATEWAY.md:1-9 (Gateway › Limits)
# Limits

Callers are counted in the gateway, because **every request** passes there. The counters are lost
when the process crashes. It is not shared.

- Secrets are mounted as files in every process.
| a | table |
data-1>>>

<<<data-1 [2] worker/src/call.rs:3-6
//! Every call takes a reservation before it is made, so that a limit holds for any number of workers.
fn call() {}
data-1>>>
"})])
    }

    #[test]
    fn the_document_is_made_of_the_passages_sentences() {
        let document = document(&prompt(), 2);
        assert_eq!(document["title"], "Rate limiter for our public API");
        assert_eq!(document["decisions"][0]["decision"], "Callers are counted in the gateway");
        assert_eq!(document["decisions"][0]["rationale"], "Because every request passes there");
        assert_eq!(document["decisions"][0]["citations"], json!([1]));
        assert_eq!(document["decisions"][0]["alternatives"].as_array().unwrap().len(), 2);
        assert_eq!(document["decisions"][1]["citations"], json!([2]));
        assert_eq!(document["risks"][0]["risk"], "The counters are lost when the process crashes");
        assert_eq!(document["security"][0]["text"], "Secrets are mounted as files in every process");
        assert_eq!(document["components"][1]["name"], "Call (worker)");
        assert_eq!(document["components"][1]["technology"], "Rust");
        assert_eq!(document["outcome"]["chosen"], document["options"][0]["name"]);
    }

    #[test]
    fn every_field_is_filled_even_without_passages() {
        let document = document(&Prompt::read(&[json!({"role": "user", "content": "Design a cache"})]), 2);
        for field in FIELDS {
            let value = &document[*field];
            assert!(!value.is_null(), "{field}");
            assert_ne!(*value, json!([]), "{field}");
        }
        assert!(document["summary"].as_str().unwrap().contains("No passage"));
    }

    #[test]
    fn odd_texts_are_survived() {
        for text in ["", "ä", "Design", "please ", "[x](y", "**", "`", "1. ", "a. B. c"] {
            let _ = (title(text), prose(text, true), prose(text, false), split(text), reason(text));
        }
    }
}
