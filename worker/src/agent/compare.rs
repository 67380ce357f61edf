//! What a refinement changed, by comparison with its parent: an author may leave things out, and not say so.
//!
//! Compared are the names of components and decisions, and which sections say something. It is crude on
//! purpose: what is reworded under the same name is the author's to tell.

use serde::Deserialize as _;
use serde_json::{Map, Value};

use super::{
    clean,
    read::{Fault, Reading},
    schema::Cure,
    spec::{Change, Field, Kind, Spec},
    words,
};

/// How each of our faults begins.
const FAULT: &str = "`changes` does not name a difference from the earlier document";
/// Names more alike than this (Jaccard over words) are one.
const SAME_NAME: f64 = 0.49;
/// What share of a name's words a change must hold to name it.
const NAMED: f64 = 0.6;
/// Differences that are listed.
const MAX_LISTED: usize = 40;

/// Sections that are compared as a whole.
const SECTIONS: &[Field] = &[
    Field::Context,
    Field::Requirements,
    Field::Diagrams,
    Field::Deployment,
    Field::Scaling,
    Field::Security,
    Field::Observability,
    Field::Risks,
];

/// The structure of a readable parent that a refinement can be compared with; `None`: it has another one, as a
/// decision record has.
pub(super) fn structure(parent: &Value) -> Option<Box<Spec>> {
    let kind = &parent["metadata"]["kind"];
    if !kind.is_null() && *kind != Kind::Spec.as_str() && *kind != Kind::Refine.as_str() {
        return None;
    }
    let mut spec = Spec::deserialize(&parent["spec"]).ok()?;
    // Its numbers mean other passages, and its changes are history.
    spec.items(Kind::Refine).into_iter().filter_map(|item| item.citations).for_each(Vec::clear);
    spec.changes.clear();
    (!spec.components.is_empty() || !spec.decisions.is_empty()).then(|| Box::new(spec))
}

/// Something that only one of both documents has.
#[derive(Clone, Debug, PartialEq)]
struct Difference {
    field: Field,
    name: String,
    dropped: bool,
}

impl Difference {
    fn sentence(&self) -> String {
        let Self { field, name, dropped } = self;
        let what = match field {
            Field::Components => "component",
            Field::Decisions => "decision",
            _ => "section",
        };
        let name = clean::cut(&clean::line(name), 120);
        match (what, dropped) {
            ("section", true) => format!("the section “{name}” says nothing any more"),
            ("section", false) => format!("the section “{name}” said nothing before"),
            (what, true) => format!("the {what} “{name}” is gone"),
            (what, false) => format!("the {what} “{name}” is new"),
        }
    }
}

/// What differs and is named by no change.
fn unnamed(parent: &Spec, now: &Spec) -> Vec<Difference> {
    let mut differences = Vec::new();
    let names = |spec: &Spec, field: Field| -> Vec<String> {
        match field {
            Field::Components => spec.components.iter().map(|it| it.name.clone()).collect(),
            _ => spec.decisions.iter().map(|it| it.title.clone()).collect(),
        }
    };
    for field in [Field::Components, Field::Decisions] {
        let (dropped, added) = unmatched(names(parent, field), names(now, field));
        for (names, dropped) in [(dropped, true), (added, false)] {
            differences.extend(names.into_iter().map(|name| Difference { field, name, dropped }));
        }
    }
    let (before, after) = (sections(parent), sections(now));
    for field in SECTIONS {
        let dropped = before.contains(field);
        if dropped != after.contains(field) {
            differences.push(Difference { field: *field, name: field.heading().to_owned(), dropped });
        }
    }
    let told: Vec<String> = now
        .changes
        .iter()
        .filter(|it| !it.found_by_comparison && !says_nothing_changed(&it.change))
        .map(|it| format!("{} {} {}", it.section, it.change, it.reason))
        .collect();
    differences.retain(|it| !told.iter().any(|text| names_it(text, &it.name)));
    differences
}

fn sections(spec: &Spec) -> Vec<Field> {
    let mut spec = spec.clone();
    let items = spec.items(Kind::Refine);
    let says = |field: Field| items.iter().any(|it| it.field == field && !it.claim().trim().is_empty());
    let mut found: Vec<Field> = SECTIONS.iter().copied().filter(|field| says(*field)).collect();
    drop(items);
    // A diagram may have no title.
    if !spec.diagrams.is_empty() && !found.contains(&Field::Diagrams) {
        found.push(Field::Diagrams);
    }
    found
}

/// The names of either side that have no partner on the other.
fn unmatched(mut before: Vec<String>, mut after: Vec<String>) -> (Vec<String>, Vec<String>) {
    let plain = |name: &str| clean::line(name).to_lowercase();
    let mut pair = |same: &dyn Fn(&str, &str) -> bool| {
        before.retain(|old| match after.iter().position(|new| same(old, new)) {
            Some(at) => {
                after.remove(at);
                false
            }
            None => true,
        });
    };
    // Exact pairs first, so that no other name takes their partner.
    pair(&|old, new| plain(old) == plain(new));
    pair(&|old, new| words::are_alike(&words::of(old), &words::of(new), SAME_NAME));
    (before, after)
}

fn names_it(text: &str, name: &str) -> bool {
    let wanted = words::of(name);
    if wanted.len() == 0 {
        // `UI`: too short for a content word.
        return spaced(text).contains(&spaced(name));
    }
    words::share(&wanted, &words::of(text)) >= NAMED
}

fn says_nothing_changed(change: &str) -> bool {
    let line = spaced(change);
    [" nothing ", " unchanged ", " no change ", " no changes ", " not changed ", " as before ", " the same "]
        .iter()
        .any(|phrase| line.contains(phrase))
        && line.split_whitespace().count() <= 8
}

/// The words of a line in lower case with a space before and after each, so that phrases are found as a whole.
fn spaced(text: &str) -> String {
    format!(" {} ", clean::line(text).to_lowercase().replace(|c: char| !c.is_alphanumeric(), " "))
}

/// Sets the faults of a reading that comparison finds, instead of those that it found before.
pub(super) fn set_faults(parent: &Spec, reading: &mut Reading) {
    drop_faults(reading);
    for it in unnamed(parent, &reading.spec) {
        let text = format!(
            "{FAULT}: {}. {}",
            it.sentence(),
            if it.dropped {
                "Give it back, or name it there if the request asks for that."
            } else {
                "Name it there, with its reason."
            }
        );
        // What is gone can be mended in two places.
        if it.dropped {
            reading.faults.push(Fault { field: Some(it.field), text: text.clone(), cure: Cure::Content });
        }
        reading.faults.push(Fault { field: Some(Field::Changes), text, cure: Cure::Content });
    }
}

/// What the parent had and this document has not, as JSON, for giving it back; `None`: nothing.
pub(super) fn gone(parent: &Spec, now: &Spec) -> Option<String> {
    let mut kept = parent.clone();
    let gone: Vec<Difference> = unnamed(parent, now).into_iter().filter(|it| it.dropped).collect();
    let is_gone = |field: Field, name: &str| gone.iter().any(|it| it.field == field && it.name == name);
    kept.components.retain(|it| is_gone(Field::Components, &it.name));
    kept.decisions.retain(|it| is_gone(Field::Decisions, &it.title));
    let Ok(Value::Object(all)) = serde_json::to_value(&kept) else { return None };
    let lost: Map<String, Value> =
        all.into_iter().filter(|(name, _)| gone.iter().any(|it| it.field.name() == name)).collect();
    (!lost.is_empty()).then(|| Value::Object(lost).to_string())
}

/// Lists what no change names as changes of our own. How many there are.
pub(super) fn list(parent: &Spec, spec: &mut Spec) -> usize {
    let found = unnamed(parent, spec);
    let more = found.len().saturating_sub(MAX_LISTED);
    for it in found.iter().take(MAX_LISTED) {
        let section = it.field.heading().to_owned();
        spec.changes.push(ours(section, upper(&it.sentence())));
    }
    if more > 0 {
        spec.changes.push(ours("Others".to_owned(), format!("{more} more differences of the kind")));
    }
    found.len()
}

/// Takes out the faults that comparison found: what is left of them is [listed](list).
pub(super) fn drop_faults(reading: &mut Reading) {
    reading.faults.retain(|fault| !fault.text.starts_with(FAULT));
}

fn ours(section: String, change: String) -> Change {
    Change { section, change, found_by_comparison: true, ..Change::default() }
}

fn upper(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map_or(String::new(), |first| first.to_uppercase().chain(chars).collect())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use serde_json::json;

    use super::{
        super::{
            draft::{Draft, DraftInput},
            testing::{call, finished, good_spec, input, refine, says, transcript},
        },
        *,
    };

    /// An answer with a store, a worker, and four decisions.
    fn parent() -> Value {
        let mut spec = good_spec();
        for name in ["Gateway", "Sweeper", "Outbox table"] {
            spec["components"]
                .as_array_mut()
                .unwrap()
                .push(json!({"name": name, "responsibility": "Its part"}));
        }
        for title in ["Fences in every write", "One clock", "At least once"] {
            let mut decision = spec["decisions"][0].clone();
            decision["title"] = json!(title);
            spec["decisions"].as_array_mut().unwrap().push(decision);
        }
        json!({"msg_type": "spec", "content": "# Run leases\n\nOld.", "metadata": {"kind": "spec"}, "spec": spec})
    }

    /// The parent as it is, with changes.
    fn all(changes: &Value) -> Value {
        let mut answer = parent()["spec"].clone();
        answer["changes"] = changes.clone();
        for field in ["components", "decisions"] {
            for item in answer[field].as_array_mut().unwrap() {
                for name in ["technology", "interfaces"] {
                    if field == "components" && item[name].is_null() {
                        item[name] = json!("");
                    }
                }
                if item["citations"].is_null() {
                    item["citations"] = json!([]);
                }
            }
        }
        answer
    }

    fn draft() -> Draft {
        Draft::new(DraftInput { parent: Some(parent()), ..input() })
    }

    fn change(section: &str, change: &str) -> Value {
        json!({"section": section, "change": change, "reason": "", "citations": []})
    }

    /// Three of four decisions, four of five components and all of *Security* are gone.
    fn liar() -> Value {
        let mut answer = refine();
        answer["changes"] = json!([change("Decisions", "Nothing changed")]);
        answer["components"].as_array_mut().unwrap().truncate(1);
        answer["security"] = json!([]);
        answer
    }

    #[test]
    fn a_refinement_that_hides_what_it_dropped_is_asked_once_and_then_told_on() {
        let mut draft = draft();
        draft.answered(&says(liar()));
        let request = call(&mut draft);
        assert_eq!(request.step, "repair.0");
        let shown = transcript(&request.request);
        for told in [
            "the decision “One clock” is gone",
            "the component “Sweeper” is gone",
            "the section “Security” says nothing any more",
            "Secrets are mounted as files",
            "exactly the fields `changes`, `components`, `decisions`, `security`",
        ] {
            assert!(shown.contains(told), "{told}\n{shown}");
        }
        draft.answered(&says(liar()));
        let done = finished(&mut draft);
        let found = done.metadata["changes_found_by_comparison"].as_array().unwrap();
        assert_eq!(found.len(), 8);
        assert_eq!(done.metadata["incomplete"], json!(true));
        let told = done.markdown.split("## Context").next().unwrap();
        insta::assert_snapshot!("refinement_told_on", told);
        assert!(done.spec.changes[1].found_by_comparison);
    }

    #[test]
    fn what_is_given_back_or_named_is_no_fault() {
        let mut given_back = draft();
        given_back.answered(&says(liar()));
        given_back.answered(&says(all(&json!([change("Scaling", "Twice the workers")]))));
        let done = finished(&mut given_back);
        assert_eq!(done.metadata["changes_found_by_comparison"], json!([]));
        assert_eq!(done.metadata["incomplete"], json!(false));
        assert_eq!(done.spec.decisions.len(), 4);

        let mut named = all(&json!([
            change("Components", "The sweeper is gone, its work is the gateway's"),
            change("Decisions", "Two clocks instead of one clock"),
            change("Security", "Moved to the team's handbook"),
        ]));
        named["components"].as_array_mut().unwrap().retain(|it| it["name"] != "Sweeper");
        named["decisions"][2]["title"] = json!("Two clocks");
        named["security"] = json!([]);
        let mut draft = draft();
        draft.answered(&says(named));
        let done = finished(&mut draft);
        assert_eq!(done.metadata["changes_found_by_comparison"], json!([]));
        assert_eq!(done.metadata["repaired"], json!(false));
    }

    #[test]
    fn what_is_new_must_be_named_too() {
        let mut answer = all(&json!([change("Scaling", "Twice the workers")]));
        let mut fresh = answer["components"][1].clone();
        fresh["name"] = json!("Redis cluster");
        answer["components"].as_array_mut().unwrap().push(fresh);
        let mut draft = draft();
        draft.answered(&says(&answer));
        assert!(transcript(&call(&mut draft).request).contains("the component “Redis cluster” is new"));
        draft.answered(&says(json!({"changes": [change("Components", "A Redis cluster for the leases")]})));
        let done = finished(&mut draft);
        assert_eq!(done.metadata["changes_found_by_comparison"], json!([]));
        assert_eq!(done.spec.changes[0].change, "A Redis cluster for the leases");
    }

    #[test]
    fn names_meet_in_spite_of_small_words() {
        let lists = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        let (gone, new) = unmatched(
            lists(&["Leases in the store", "Worker", "UI", "Redis cache"]),
            lists(&["worker pool", "Keep leases in the store", "ui", "Memcached"]),
        );
        assert_eq!((gone, new), (lists(&["Redis cache"]), lists(&["Memcached"])));
        assert!(names_it("Components: the UI goes", "UI") && !names_it("Build it anew", "UI"));
        for nothing in ["Nothing changed", "No changes.", "Unchanged", "Security is the same"] {
            assert!(says_nothing_changed(nothing), "{nothing}");
        }
        assert!(!says_nothing_changed("Leases of 30 seconds"));
    }

    #[test]
    fn another_kind_of_parent_is_not_compared() {
        let mut record = parent();
        record["metadata"]["kind"] = json!("adr");
        assert_eq!(structure(&record), None);
        assert_eq!(structure(&json!({"content": "# Old"})), None);
        assert!(structure(&parent()).is_some());
    }
}
