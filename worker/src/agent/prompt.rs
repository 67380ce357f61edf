//! The prompts. The texts are the templates in `worker/prompts/`; here is what goes into them.
//!
//! Order is for prompt caches: the system message is the same for every request of a kind, the
//! first user message the same for every round of a task.

use std::{borrow::Cow, sync::LazyLock};

use atlas_shared::{gateway_api::Passage, message::Task};
use minijinja::{Environment, UndefinedBehavior, context, syntax::SyntaxConfig};
use regex::Regex;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::{
    clean,
    draft::{Subject, ToolResult, search_tool},
    passages::{Entry, Shelf},
    schema,
    spec::{Field, Kind},
};

/// Name and text of every template.
const TEMPLATES: &[(&str, &str)] = &[
    ("system.j2", include_str!("../../prompts/system.j2")),
    ("spec.j2", include_str!("../../prompts/spec.j2")),
    ("adr.j2", include_str!("../../prompts/adr.j2")),
    ("review.j2", include_str!("../../prompts/review.j2")),
    ("refine.j2", include_str!("../../prompts/refine.j2")),
    ("request.j2", include_str!("../../prompts/request.j2")),
    ("passage.j2", include_str!("../../prompts/passage.j2")),
    ("found.j2", include_str!("../../prompts/found.j2")),
    ("mend.j2", include_str!("../../prompts/mend.j2")),
    ("again.j2", include_str!("../../prompts/again.j2")),
];

/// The judge's rules: a prompt of its own, no part of [`version`].
const JUDGE: (&str, &str) = ("judge.j2", include_str!("../../prompts/judge.j2"));

static ENVIRONMENT: LazyLock<Environment<'static>> = LazyLock::new(|| {
    let mut environment = Environment::new();
    environment.set_undefined_behavior(UndefinedBehavior::Strict);
    if let Ok(syntax) = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build() {
        environment.set_syntax(syntax);
    }
    for (name, text) in TEMPLATES.iter().chain([&JUDGE]) {
        // A template that does not parse is missing here and an error where it is rendered;
        // a test renders every one.
        let _ = environment.add_template(name, text);
    }
    environment
});

static VERSION: LazyLock<String> = LazyLock::new(|| {
    let mut hash = Sha256::new();
    for (name, text) in TEMPLATES {
        hash.update(name.as_bytes());
        hash.update([0]);
        hash.update(text.as_bytes());
        hash.update([0]);
    }
    // What goes with the prompt says as much about the answer as its words.
    for kind in Kind::ALL {
        hash.update(schema::of_kind(kind).text());
        hash.update([0]);
    }
    hash.update(search_tool().parameters.to_string());
    hash.update(search_tool().description);
    hex(&hash.finalize(), 12)
});

/// Which prompts these are: a short hash of all templates, schemas and the tool, stored with every document.
/// `worker/prompts/VERSIONS.md` lists them; its history says which commit had which.
pub fn version() -> &'static str {
    &VERSION
}

pub(super) fn hex(bytes: &[u8], digits: usize) -> String {
    use std::fmt::Write as _;
    let mut text = bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    });
    text.truncate(digits);
    text
}

/// Why the model is asked to start over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Again {
    /// The answer was cut at the cap.
    Shorter,
    /// There was no answer.
    Empty,
    /// It asked for searches that it may not make.
    NoTools,
}

impl Again {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Shorter => "shorter",
            Self::Empty => "empty",
            Self::NoTools => "no_tools",
        }
    }

    /// What becomes of it, for whoever watches.
    pub(super) fn told(self) -> &'static str {
        match self {
            Self::Shorter => "The answer was cut off at its length limit: asking for a shorter one.",
            Self::Empty => "The answer was empty: asking once more.",
            Self::NoTools => "The model asked for more searches than it may make: asking it to write.",
        }
    }
}

/// The code that fences this task's data: nobody who wrote a document knows it, and it is changed
/// until it occurs in none of them. What comes later is stripped of it ([`unfenced`]).
pub(super) fn fence(task: &Task, passages: &[Passage]) -> String {
    let mut seed = format!("{}\n{}", task.task_id, task.content);
    for _ in 0..16 {
        let code = format!("data-{}", hex(&Sha256::digest(seed.as_bytes()), 10));
        let taken =
            task.content.contains(&code) || passages.iter().any(|passage| passage.text.contains(&code));
        if !taken {
            return code;
        }
        seed = code;
    }
    format!("data-{}", hex(&Sha256::digest(seed.as_bytes()), 10))
}

/// Data without the fence's code.
fn unfenced(text: &str, fence: &str) -> String {
    text.replace(fence, "")
}

/// The text of a parent answer for the prompt: no sources, no citation numbers.
pub(super) fn parent_text(parent: &Value) -> Option<String> {
    static MARKER: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new(r" ?\[\d{1,4}\]").ok());
    if parent["msg_type"].as_str().is_some_and(|kind| kind != "spec") {
        return None;
    }
    let content = clean::text(parent["content"].as_str()?);
    let body = content.split("\n## Sources").next().unwrap_or(&content);
    let body = match &*MARKER {
        Some(marker) => marker.replace_all(body, "").into_owned(),
        None => body.to_owned(),
    };
    let body = body.trim();
    (!body.is_empty()).then(|| body.to_owned())
}

/// At most about `max` characters of a parent: its diagrams go first, then the end of every section
/// that is longer than its share. The headings stay, so that the model sees what there was.
pub(super) fn squeezed(parent: &str, max: usize) -> Cow<'_, str> {
    if parent.chars().count() <= max {
        return Cow::Borrowed(parent);
    }
    let mut sections: Vec<String> = vec![String::new()];
    let mut in_fence = false;
    for line in parent.lines() {
        if line.starts_with("```") {
            if !in_fence && let Some(section) = sections.last_mut() {
                section.push_str("(a diagram, left out)\n");
            }
            in_fence = !in_fence;
            continue;
        }
        if in_fence {
            continue;
        }
        if line.starts_with("## ") {
            sections.push(String::new());
        }
        if let Some(section) = sections.last_mut() {
            section.push_str(line);
            section.push('\n');
        }
    }
    // What short sections do not use is for the long ones.
    let mut lengths: Vec<usize> = sections.iter().map(|section| section.chars().count()).collect();
    lengths.sort_unstable();
    let (mut left, mut share) = (max, max);
    for (index, length) in lengths.iter().enumerate() {
        share = left / (lengths.len() - index);
        if *length > share {
            break;
        }
        left -= length;
        share = max;
    }
    let text: Vec<String> = sections
        .iter()
        .map(|section| {
            let text = clean::cut(section.trim_end(), share);
            if text.len() < section.trim_end().len() {
                format!("{text} (left out: the rest of this section)")
            } else {
                text
            }
        })
        .collect();
    // Too many headings even for that: the middle goes.
    Cow::Owned(clean::cut_middle(&text.join("\n\n"), max + 40 * sections.len()).into_owned())
}

/// The system message.
pub(super) fn system(kind: Kind, schema: Option<&str>) -> Result<String, minijinja::Error> {
    render("system.j2", context! { kind => kind.as_str(), schema => schema })
}

/// The first user message: request, parent, passages.
pub(super) fn request(subject: &Subject, shelf: &Shelf, words: u32) -> Result<String, minijinja::Error> {
    let fence = &subject.fence;
    let show = |text: &str| unfenced(&clean::cut_middle(text, subject.max_chars), fence);
    let passages: Vec<_> = shelf
        .entries()
        .filter(|entry| entry.packed && entry.addition == 1)
        .map(|entry| shown(entry, fence))
        .collect();
    render(
        "request.j2",
        context! {
            fence,
            request => show(&subject.request),
            parent => subject.parent.as_deref().map(|parent| unfenced(&squeezed(parent, subject.max_chars), fence)),
            passages,
            words,
        },
    )
}

/// The answer to a tool call.
pub(super) fn found(
    subject: &Subject,
    shelf: &Shelf,
    result: &ToolResult,
) -> Result<String, minijinja::Error> {
    let (new, known): (Vec<&Entry>, Vec<&Entry>) = result
        .numbers
        .iter()
        .filter_map(|n| shelf.get(*n))
        .partition(|entry| entry.addition == result.addition);
    let known: Vec<String> =
        known.iter().filter(|entry| entry.packed).map(|entry| format!("[{}]", entry.n)).collect();
    let left_out = new.iter().filter(|entry| !entry.packed).count();
    let passages: Vec<_> =
        new.iter().filter(|entry| entry.packed).map(|entry| shown(entry, &subject.fence)).collect();
    render(
        "found.j2",
        context! {
            fence => subject.fence.as_str(),
            remark => result.remark.as_deref(),
            passages,
            known => known.join(", "),
            left_out,
        },
    )
}

/// The message that asks for some fields again. `anew`: it comes after the request and the passages, from
/// which what is missing is to be written; else it stands alone.
pub(super) fn mend(
    subject: &Subject,
    fields: &[Field],
    faults: &[String],
    shown: &str,
    anew: bool,
) -> Result<String, minijinja::Error> {
    let fields: Vec<String> = fields.iter().map(|field| format!("`{}`", field.name())).collect();
    let faults: Vec<String> =
        faults.iter().take(24).map(|fault| clean::cut(&unfenced(fault, &subject.fence), 300)).collect();
    render(
        "mend.j2",
        context! {
            fence => subject.fence.as_str(),
            faults,
            shown => unfenced(shown, &subject.fence),
            fields => fields.join(", "),
            anew,
        },
    )
}

/// The message that asks to start over.
pub(super) fn again(why: Again, words: u32) -> Result<String, minijinja::Error> {
    render("again.j2", context! { why => why.as_str(), words => words / 2 })
}

/// The system message of a judge.
pub(super) fn judge(schema: Option<&str>) -> Result<String, minijinja::Error> {
    render("judge.j2", context! { schema => schema })
}

/// A passage as `passage.j2` shows it.
fn shown(entry: &Entry, fence: &str) -> minijinja::Value {
    context! {
        n => entry.n,
        place => unfenced(&entry.place(), fence),
        heading => entry.passage.heading.as_deref().map(|heading| unfenced(heading, fence)),
        text => unfenced(&entry.passage.text, fence),
    }
}

fn render(name: &str, context: minijinja::Value) -> Result<String, minijinja::Error> {
    Ok(ENVIRONMENT.get_template(name)?.render(context)?.trim_end().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_listed_so_that_a_document_can_be_traced_to_its_prompt() {
        let listed = include_str!("../../prompts/VERSIONS.md");
        assert!(
            listed.lines().any(|line| line.starts_with(&format!("| `{}` |", version()))),
            "the prompts, schemas or the tool changed: add a line for `{}` to worker/prompts/VERSIONS.md",
            version()
        );
    }
}
