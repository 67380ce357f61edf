//! Reads a model's answer: finds the JSON, closes what was cut off, bends it into shape, and lists
//! what is wrong with it. Total: any text gives a [`Reading`] or `None`, never a panic.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{
    clean, mermaid,
    schema::{self, Cure},
    spec::{Decision, Field, Kind, Spec},
};

/// A longer answer is cut here; no cap of ours lets one through.
const MAX_ANSWER_BYTES: usize = 2_000_000;
/// Items of one list.
const MAX_ITEMS: usize = 40;
/// Characters of one text.
pub(super) const MAX_TEXT_CHARS: usize = 3_000;
/// Characters of all texts together.
const MAX_TOTAL_CHARS: usize = 150_000;
/// Places at which an answer's JSON object may begin.
const MAX_STARTS: usize = 16;
/// Fault lines shown to a model or a reader.
const MAX_FAULT_LINES: usize = 16;

/// What was read from an answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Reading {
    /// The document, as far as it goes.
    pub(super) spec: Spec,
    /// What is wrong with it.
    pub(super) faults: Vec<Fault>,
    /// True when the answer broke off.
    pub(super) cut: bool,
    /// True when the answer held more than a document may hold.
    pub(super) shortened: bool,
}

/// Something wrong with an answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Fault {
    /// Where; `None`: everywhere.
    pub(super) field: Option<Field>,
    /// What, for the model and for the reader.
    pub(super) text: String,
    /// What it takes to mend it.
    #[serde(default)]
    pub(super) cure: Cure,
}

/// Reads an answer that should hold these fields. `None`: it holds none of them.
pub(super) fn document(content: &str, fields: &[Field]) -> Option<Reading> {
    let (value, cut) = find_object(content, fields)?;
    let mut faults = Vec::new();
    if cut {
        // The field that was being written is incomplete even where its shape fits.
        let last = value.as_object().and_then(|map| map.keys().rev().find_map(|key| Field::named(key)));
        let text = "The answer breaks off here.".to_owned();
        faults.push(Fault { field: last, text, cure: Cure::Content });
    }
    let mut bent = schema::coerce(value, schema::made(fields).value(), &mut |cure, text| {
        let name = text.trim_start_matches('`').split(['`', '.', '[']).next().unwrap_or_default();
        faults.push(Fault { field: Field::named(name), text: format!("{text}."), cure });
    });
    let mut left = MAX_TOTAL_CHARS;
    let mut shortened = false;
    limit(&mut bent, &mut left, &mut shortened);
    // `coerce` gives what the types hold; a test feeds it arbitrary JSON.
    let mut spec: Spec = serde_json::from_value(bent).ok()?;
    drop_blanks(&mut spec);
    faults.extend(check(&spec, fields));
    Some(Reading { spec, faults, cut, shortened })
}

/// What an answer is in which [`document`] found none.
pub(super) fn instead_of_a_document(content: &str) -> &'static str {
    let is_object = content.match_indices('{').take(MAX_STARTS).any(|(start, _)| {
        let mut stream = serde_json::Deserializer::from_str(&content[start..]).into_iter::<Value>();
        matches!(stream.next(), Some(Ok(Value::Object(map))) if !map.is_empty())
    });
    if is_object {
        "The answer is a JSON object, but it has none of the fields that were asked for."
    } else {
        "The answer is not a JSON object."
    }
}

impl Reading {
    /// True when a fault cannot be mended without knowing what the document is about.
    pub(super) fn lacks_content(&self) -> bool {
        self.faults.iter().any(|fault| fault.cure == Cure::Content)
    }

    /// The fields to ask for again. All of them where a fault has no place.
    pub(super) fn faulty_fields(&self, kind: Kind) -> Vec<Field> {
        if self.faults.iter().any(|fault| fault.field.is_none()) {
            return kind.fields().to_vec();
        }
        let at: BTreeSet<Field> = self.faults.iter().filter_map(|fault| fault.field).collect();
        kind.fields().iter().copied().filter(|field| at.contains(field)).collect()
    }

    /// The faults in words, each once.
    pub(super) fn fault_lines(&self) -> Vec<String> {
        let mut lines: Vec<String> = Vec::new();
        for fault in &self.faults {
            let line = match fault.field {
                Some(field) if !fault.text.starts_with('`') => format!("`{}`: {}", field.name(), fault.text),
                _ => fault.text.clone(),
            };
            if !lines.contains(&line) {
                lines.push(line);
            }
        }
        let more = lines.len().saturating_sub(MAX_FAULT_LINES);
        lines.truncate(MAX_FAULT_LINES);
        if more > 0 {
            lines.push(format!("… and {more} more of the kind."));
        }
        lines
    }

    /// The answer as it is shown where some of it is to be written anew: all of it, so that the rest
    /// agrees with it.
    pub(super) fn shown_whole(&self) -> String {
        serde_json::to_string(&self.spec).unwrap_or_default()
    }

    /// The answer as it is shown where only the form of these fields is at fault: they, and title and
    /// summary to know what about.
    pub(super) fn shown(&self, fields: &[Field]) -> String {
        let Ok(Value::Object(map)) = serde_json::to_value(&self.spec) else { return String::new() };
        let shown: Map<String, Value> = map
            .into_iter()
            .filter(|(name, _)| {
                name == "title" || name == "summary" || fields.iter().any(|field| field.name() == name)
            })
            .collect();
        Value::Object(shown).to_string()
    }

    /// This document with `fields` taken from `patch`, where that has no more faults there and says
    /// something where this does.
    pub(super) fn patched(&self, patch: &Self, fields: &[Field], kind: Kind) -> Self {
        let faults_at = |reading: &Self, field: Field| {
            reading.faults.iter().filter(|fault| fault.field.is_none_or(|at| at == field)).count()
        };
        let (Ok(Value::Object(mut base)), Ok(Value::Object(mut new))) =
            (serde_json::to_value(&self.spec), serde_json::to_value(&patch.spec))
        else {
            return self.clone();
        };
        let taken: Vec<Field> = fields
            .iter()
            .copied()
            .filter(|field| faults_at(patch, *field) <= faults_at(self, *field))
            .filter(|field| says(&new, *field) || !says(&base, *field))
            .collect();
        for field in &taken {
            match new.remove(field.name()) {
                Some(value) => base.insert(field.name().to_owned(), value),
                None => base.remove(field.name()),
            };
        }
        let Ok(spec) = serde_json::from_value(Value::Object(base)) else { return self.clone() };
        let whole = taken.len() == kind.fields().len();
        let mut faults: Vec<Fault> = self
            .faults
            .iter()
            .filter(|fault| fault.field.map_or(!whole, |field| !taken.contains(&field)))
            .cloned()
            .collect();
        faults.extend(
            patch.faults.iter().filter(|fault| fault.field.is_none_or(|at| taken.contains(&at))).cloned(),
        );
        let still_cut = self.cut && faults.iter().any(|fault| fault.text.contains("breaks off"));
        Self { spec, faults, cut: still_cut, shortened: self.shortened || patch.shortened }
    }

    /// True when the other one should be kept instead: it says more of what a document of this kind must
    /// say; as much of that and more of the rest; or as much of all, with fewer faults. Of two that broke
    /// off alike, the longer is kept; else the later.
    pub(super) fn is_worse_than(&self, other: &Self, kind: Kind) -> bool {
        let (here, there) = (self.said(kind), other.said(kind));
        if here != there {
            return here < there;
        }
        let rank = |reading: &Self| (reading.faults.len(), reading.cut);
        if rank(self) != rank(other) {
            return rank(self) > rank(other);
        }
        let length = |reading: &Self| reading.shown_whole().len();
        self.spec != other.spec && !(self.cut && length(self) > length(other))
    }

    /// How much is said: of the fields that no document may lack, then of all. A field counts twice where it
    /// has no fault.
    fn said(&self, kind: Kind) -> (usize, usize) {
        let Ok(Value::Object(map)) = serde_json::to_value(&self.spec) else { return (0, 0) };
        let said = |field: &Field| {
            let at_fault = |fault: &Fault| fault.field.is_none_or(|at| at == *field);
            match says(&map, *field) {
                false => 0,
                true if self.faults.iter().any(at_fault) => 1,
                true => 2,
            }
        };
        let fields = kind.fields().iter();
        (fields.clone().filter(|field| is_required(**field)).map(said).sum(), fields.map(said).sum())
    }

    /// True when there is enough to show: a name or a summary, and something below it.
    pub(super) fn says_something(&self, kind: Kind) -> bool {
        let mut spec = self.spec.clone();
        let items = spec.items(kind);
        let has = |wanted: fn(Field) -> bool| {
            items.iter().any(|item| wanted(item.field) && !item.claim().trim().is_empty())
        };
        has(|field| matches!(field, Field::Title | Field::Summary))
            && has(|field| !matches!(field, Field::Title | Field::Summary | Field::Diagrams))
    }
}

/// Finds the JSON object in an answer: bare, in a Markdown fence, after thoughts, wrapped in one
/// more object, or cut off. True: it was cut off and closed here.
fn find_object(content: &str, fields: &[Field]) -> Option<(Value, bool)> {
    let mut text = content.trim_start_matches('\u{feff}').trim();
    text = &text[..text.floor_char_boundary(MAX_ANSWER_BYTES)];
    // Reasoning models of some servers think aloud first.
    if let Some(end) = text.rfind("</think>") {
        text = &text[end + "</think>".len()..];
    }
    let known = |value: &Value| {
        fields.iter().filter(|field| value.get(field.name()).is_some_and(|value| !value.is_null())).count()
    };
    // {"spec": {…}}: the object that holds the most of what is wanted, itself or one level down.
    let wanted = |value: Value| -> (usize, Value) {
        let own = known(&value);
        match value {
            Value::Object(map) if own == 0 => map
                .into_iter()
                .map(|(_, inner)| (known(&inner), inner))
                .max_by_key(|(count, _)| *count)
                .unwrap_or((0, Value::Null)),
            value => (own, value),
        }
    };
    // An inner object may have a field of the same name, so the fullest candidate wins, not the first
    // that is whole.
    let mut best: (usize, Value, bool) = (0, Value::Null, false);
    for (start, _) in text.match_indices('{').take(MAX_STARTS) {
        if best.0 == fields.len() {
            // Nothing can hold more.
            break;
        }
        let rest = &text[start..];
        let mut stream = serde_json::Deserializer::from_str(rest).into_iter::<Value>();
        let (value, cut) = match stream.next() {
            Some(Ok(value)) => (Some(value), false),
            _ => (close(rest), true),
        };
        if let Some((count, value)) = value.map(wanted)
            && count > best.0
        {
            best = (count, value, cut);
        }
    }
    (best.0 > 0).then_some((best.1, best.2))
}

/// Parses JSON that breaks off: ends the string, drops the half of a pair, closes the brackets.
fn close(text: &str) -> Option<Value> {
    let mut open = Vec::new();
    let (mut in_string, mut escaped) = (false, false);
    // Where the text may be cut so that closing the brackets gives JSON, and what is open there.
    let mut safe: Vec<(usize, usize)> = Vec::new();
    let mut stacks: Vec<Vec<char>> = Vec::new();
    for (at, c) in text.char_indices() {
        if in_string {
            match c {
                _ if escaped => escaped = false,
                '\\' => escaped = true,
                '"' => in_string = false,
                _ => {}
            }
            continue;
        }
        match c {
            '"' => in_string = true,
            '{' => open.push('}'),
            '[' => open.push(']'),
            '}' | ']' => {
                if open.pop() != Some(c) {
                    break;
                }
                if open.is_empty() {
                    break;
                }
                safe.push((at + 1, open.len()));
                stacks.push(open.clone());
            }
            ',' => {
                safe.push((at, open.len()));
                stacks.push(open.clone());
            }
            _ => {}
        }
        if open.len() > 64 {
            return None;
        }
        // Only the latest ones matter.
        if safe.len() > 64 {
            safe.drain(..32);
            stacks.drain(..32);
        }
    }
    let finish = |body: &str, open: &[char]| -> Option<Value> {
        let mut whole = body.to_owned();
        whole.extend(open.iter().rev());
        serde_json::from_str(&whole).ok()
    };
    if in_string {
        // The text in the open string is worth keeping where it is a value.
        let body = if escaped { &text[..text.len() - 1] } else { text };
        if let Some(value) = finish(&format!("{body}…\""), &open) {
            return Some(value);
        }
    }
    if let Some(value) = finish(text, &open) {
        return Some(value);
    }
    safe.iter().zip(&stacks).rev().find_map(|((at, _), open)| finish(&text[..*at], open))
}

/// Cleans every text and keeps the document within bounds.
fn limit(value: &mut Value, left: &mut usize, shortened: &mut bool) {
    match value {
        Value::String(text) => {
            let max = MAX_TEXT_CHARS.min(*left);
            let (kept, is_cut) = self::text(text, max);
            *shortened |= is_cut;
            *text = if max == 0 { String::new() } else { kept };
            *left = left.saturating_sub(text.chars().count());
        }
        Value::Array(items) => {
            *shortened |= items.len() > MAX_ITEMS;
            items.truncate(MAX_ITEMS);
            for item in items {
                limit(item, left, shortened);
            }
        }
        Value::Object(map) => {
            for (_, item) in map.iter_mut() {
                limit(item, left, shortened);
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

/// A text of an answer as a document has it before it is rendered: clean, and of `max` characters at most.
/// True: it had more.
pub(super) fn text(raw: &str, max: usize) -> (String, bool) {
    let cleaned = clean::text(raw);
    (clean::cut(cleaned.trim(), max), cleaned.chars().count() > max)
}

/// Items that say nothing are no items.
fn drop_blanks(spec: &mut Spec) {
    let said = |text: &str| !text.trim().is_empty();
    for claims in [
        &mut spec.context,
        &mut spec.requirements.functional,
        &mut spec.requirements.non_functional,
        &mut spec.drivers,
        &mut spec.confirmation,
        &mut spec.strengths,
        &mut spec.consequences.good,
        &mut spec.consequences.bad,
        &mut spec.deployment,
        &mut spec.scaling,
        &mut spec.security,
        &mut spec.observability,
    ] {
        claims.retain(|claim| said(&claim.text));
    }
    spec.changes.retain(|it| said(&it.change) || said(&it.section));
    spec.options.retain(|it| said(&it.name) || said(&it.description));
    spec.findings.retain(|it| said(&it.finding) || said(&it.title));
    spec.components.retain(|it| said(&it.name) || said(&it.responsibility));
    spec.decisions.retain(|it| said(&it.title) || said(&it.decision));
    spec.diagrams.retain(|it| said(&it.mermaid));
    spec.risks.retain(|it| said(&it.risk));
    spec.open_questions.retain(|text| said(text));
    for decision in &mut spec.decisions {
        decision.alternatives.retain(|it| said(&it.name) || said(&it.why_not));
        decision.consequences.retain(|text| said(text));
    }
    for option in &mut spec.options {
        option.pros.retain(|text| said(text));
        option.cons.retain(|text| said(text));
    }
}

/// True when this document, as an object, says something in a field. Empty lists are not in it.
fn says(spec: &Map<String, Value>, field: Field) -> bool {
    match spec.get(field.name()) {
        None => false,
        Some(Value::String(text)) => !text.trim().is_empty(),
        Some(_) => true,
    }
}

/// True for the fields that [`check`] wants to say something.
fn is_required(field: Field) -> bool {
    matches!(
        field,
        Field::Title
            | Field::Summary
            | Field::Components
            | Field::Decisions
            | Field::Findings
            | Field::Changes
            | Field::Options
            | Field::Outcome
    )
}

/// What a document of the right shape may still lack.
fn check(spec: &Spec, fields: &[Field]) -> Vec<Fault> {
    let mut faults = Vec::new();
    for field in fields {
        // A diagram is there and may not render; all else that is found here was not written.
        let cure = if *field == Field::Diagrams { Cure::Form } else { Cure::Content };
        let mut fault = |text: String| faults.push(Fault { field: Some(*field), text, cure });
        let mut wanted = |missing: bool, what: &str| {
            if missing {
                fault(format!("There is no {what}."));
            }
        };
        match field {
            Field::Title => wanted(spec.title.trim().is_empty(), "title"),
            Field::Summary => wanted(spec.summary.trim().is_empty(), "summary"),
            Field::Components => wanted(spec.components.is_empty(), "component"),
            Field::Findings => wanted(spec.findings.is_empty(), "finding"),
            Field::Changes => wanted(spec.changes.is_empty(), "change"),
            Field::Options => wanted(spec.options.len() < 2, "second option to weigh"),
            Field::Outcome => {
                wanted(spec.outcome.chosen.trim().is_empty(), "chosen option");
                let chosen = spec.outcome.chosen.trim().to_lowercase();
                let among = spec.options.iter().any(|option| {
                    let name = option.name.trim().to_lowercase();
                    !name.is_empty() && (chosen.contains(&name) || name.contains(&chosen))
                });
                if fields.contains(&Field::Options) && !chosen.is_empty() && !among {
                    fault("`chosen` is none of the options.".to_owned());
                }
            }
            Field::Decisions => {
                wanted(spec.decisions.is_empty(), "decision");
                for Decision { title, rationale, alternatives, consequences, .. } in &spec.decisions {
                    let title = clean::cut(&clean::line(title), 60);
                    if alternatives.len() < 2 {
                        fault(format!(
                            "The decision {title:?} weighs {} alternatives; give two or more.",
                            alternatives.len()
                        ));
                    }
                    if consequences.is_empty() {
                        fault(format!("The decision {title:?} has no consequences."));
                    }
                    if rationale.trim().is_empty() {
                        fault(format!("The decision {title:?} has no rationale."));
                    }
                }
            }
            Field::Diagrams => {
                for (index, diagram) in spec.diagrams.iter().enumerate() {
                    if let Err(error) = mermaid::check(&mermaid::tidy(&diagram.mermaid)) {
                        fault(format!("Diagram {}: {error}.", index + 1));
                    }
                }
            }
            Field::Context
            | Field::Requirements
            | Field::Drivers
            | Field::Consequences
            | Field::Confirmation
            | Field::Strengths
            | Field::Deployment
            | Field::Scaling
            | Field::Security
            | Field::Observability
            | Field::Risks
            | Field::OpenQuestions => {}
        }
    }
    faults
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use proptest::prelude::*;
    use serde_json::json;

    use super::{super::testing::good_spec, *};

    const FIELDS: &[Field] = &[Field::Title, Field::Summary, Field::Context, Field::OpenQuestions];
    const GOOD: &str = r#"{"title":"T","summary":"S","context":[{"text":"A fact","citations":[1]}],"open_questions":["Why?"]}"#;

    #[test]
    fn json_is_found_wherever_it_hides() {
        let answers = [
            GOOD.to_owned(),
            format!("  \n\n\t{GOOD}\n\n   \n"),
            format!("```json\n{GOOD}\n```"),
            format!("Here is the document:\n\n```\n{GOOD}\n```\nI hope {{it}} helps."),
            format!("<think>Maybe {{\"title\": 1}} or so</think>{GOOD}"),
            format!("I considered {{braces}} and then wrote {GOOD}"),
            format!("{{\"document\": {GOOD}}}"),
            format!("\u{feff}{GOOD}"),
        ];
        for answer in answers {
            let reading = document(&answer, FIELDS).unwrap_or_else(|| unreachable_reading(&answer));
            assert_eq!(reading.spec.title, "T", "{answer}");
            assert_eq!(reading.spec.context[0].citations, [1], "{answer}");
            assert!(reading.faults.is_empty(), "{answer}: {:?}", reading.faults);
        }
    }

    fn unreachable_reading(answer: &str) -> Reading {
        assert!(answer.is_empty(), "nothing was read from {answer}");
        Reading { spec: Spec::default(), faults: Vec::new(), cut: false, shortened: false }
    }

    #[test]
    fn what_was_cut_off_is_kept_as_far_as_it_goes() {
        let cut = &GOOD[..GOOD.find("fact").unwrap()];
        let reading = document(cut, FIELDS).unwrap();
        assert_eq!(reading.spec.summary, "S");
        assert_eq!(reading.spec.context[0].text, "A…");
        assert!(reading.cut);
        assert_eq!(reading.faulty_fields(Kind::Spec), [Field::Context, Field::OpenQuestions]);
        insta::assert_snapshot!(reading.fault_lines().join("\n"));
    }

    #[test]
    fn prose_and_foreign_json_are_no_document() {
        for answer in ["", "I cannot do that.", "[1, 2]", "{\"foo\": 1}", "null", "{{{{", "{\"title\": null}"]
        {
            assert_eq!(document(answer, FIELDS), None, "{answer}");
        }
    }

    #[test]
    fn a_patch_replaces_only_what_it_mends() {
        let fields = &[Field::Title, Field::Summary, Field::Decisions];
        let base = document(
            r#"{"title":"T","summary":"S","decisions":[{"title":"D","decision":"d","rationale":"r","alternatives":[],"consequences":["c"],"citations":[]}]}"#,
            fields,
        )
        .unwrap();
        assert_eq!(base.faulty_fields(Kind::Spec), [Field::Decisions]);
        let patch = document(
            r#"{"decisions":[{"title":"D","decision":"d","rationale":"r","alternatives":[{"name":"a","why_not":"x"},{"name":"b","why_not":"y"}],"consequences":["c"],"citations":[2]}]}"#,
            &[Field::Decisions],
        )
        .unwrap();
        let whole = base.patched(&patch, &[Field::Decisions], Kind::Spec);
        assert_eq!(whole.faults, []);
        assert_eq!(whole.spec.summary, "S");
        assert_eq!(whole.spec.decisions[0].alternatives.len(), 2);

        let worse = document(r#"{"decisions":[]}"#, &[Field::Decisions]).unwrap();
        let kept = base.patched(&worse, &[Field::Decisions], Kind::Spec);
        assert_eq!(kept.faults.len(), 1);
        assert_eq!(kept.spec.decisions.len(), 1, "nothing is no mend");
    }

    #[test]
    fn what_a_document_must_say_counts_more_than_the_number_of_faults() {
        let kind = Kind::Spec;
        let whole = good_spec().to_string();
        let rich = document(&whole[..whole.find("\"observability\"").unwrap() + 20], kind.fields()).unwrap();
        let stub = document(
            r#"{"title":"T","summary":"S","context":[{"text":"c","citations":[]}],"requirements":{"functional":[],"non_functional":[]},"components":[],"decisions":[],"diagrams":[],"deployment":[],"scaling":[],"security":[],"observability":[],"risks":[],"open_questions":["Why?"]}"#,
            kind.fields(),
        )
        .unwrap();
        assert!(rich.faults.len() > stub.faults.len(), "{:?} {:?}", rich.faults, stub.faults);
        assert!(stub.is_worse_than(&rich, kind) && !rich.is_worse_than(&stub, kind));

        let longer =
            document(&whole[..whole.find("\"Count takeovers").unwrap() + 12], kind.fields()).unwrap();
        let shorter =
            document(&whole[..whole.find("\"Count takeovers").unwrap() + 8], kind.fields()).unwrap();
        assert!(shorter.is_worse_than(&longer, kind) && !longer.is_worse_than(&shorter, kind));
    }

    #[test]
    fn a_fault_says_whether_something_has_to_be_written() {
        let reading = |change: fn(&mut Value)| {
            let mut answer = good_spec();
            change(&mut answer);
            document(&answer.to_string(), Kind::Spec.fields()).unwrap()
        };
        let form = [
            reading(|answer| answer["diagrams"][0]["mermaid"] = json!("flowchart LR\n a[(] --> b")),
            reading(|answer| answer["risks"][0]["severity"] = json!("grave")),
            reading(|answer| answer["summary"] = json!(["S"])),
        ];
        let content = [
            reading(|answer| answer["decisions"] = json!([])),
            reading(|answer| answer["decisions"][0]["alternatives"] = json!([])),
            reading(|answer| answer["security"] = Value::Null),
            reading(|answer| answer["security"][0]["citations"] = json!(["docs/a.md"])),
            reading(|answer| _ = answer.as_object_mut().unwrap().remove("scaling")),
        ];
        for reading in form {
            assert!(!reading.faults.is_empty() && !reading.lacks_content(), "{:?}", reading.faults);
        }
        for reading in content {
            assert!(reading.lacks_content(), "{:?}", reading.faults);
        }
    }

    #[test]
    fn what_is_no_document_is_called_what_it_is() {
        for (answer, what) in [
            ("Sure! Use Redis.", "not a JSON object"),
            ("[1, 2]", "not a JSON object"),
            ("{\"title\"", "not a JSON object"),
            ("{\"answer\": \"Use Redis\"}", "none of the fields"),
            ("I thought: {\"answer\": 1}", "none of the fields"),
        ] {
            assert_eq!(document(answer, Kind::Spec.fields()), None);
            assert!(instead_of_a_document(answer).contains(what), "{answer}");
        }
    }

    #[test]
    fn an_endless_answer_is_bounded() {
        let claim = format!(r#"{{"text":"{}","citations":[]}}"#, "long ".repeat(2_000));
        let answer = format!(
            r#"{{"title":"T","summary":"S","context":[{}],"open_questions":[]}}"#,
            vec![claim; 200].join(",")
        );
        let reading = document(&answer, FIELDS).unwrap();
        assert!(reading.shortened);
        assert!(reading.spec.context.len() <= MAX_ITEMS);
        assert!(serde_json::to_string(&reading.spec).unwrap().len() < 2 * MAX_TOTAL_CHARS);
    }

    proptest! {
        #[test]
        fn arbitrary_text_never_panics(text in "\\PC{0,300}") {
            for kind in Kind::ALL {
                let _ = document(&text, kind.fields());
            }
        }

        #[test]
        fn arbitrary_json_like_text_never_panics(text in r#"[{}\[\]",:\\a-z0-9 \n]{0,200}"#) {
            let _ = document(&text, FIELDS);
            let _ = document(&format!("{{\"title\":{text}"), FIELDS);
        }

        #[test]
        fn a_good_answer_cut_anywhere_never_panics(at in 0_usize..GOOD.len()) {
            if GOOD.is_char_boundary(at) {
                let reading = document(&GOOD[..at], FIELDS);
                prop_assert!(at < 12 || reading.is_some(), "{}", &GOOD[..at]);
            }
        }
    }
}
