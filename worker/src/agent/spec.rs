//! What the agent writes: the structured document behind the Markdown.
//!
//! One type serves all kinds; a kind is a list of [`Field`]s. The JSON schema, the reader, the
//! renderer and the score card all walk that list, so that a field cannot be asked for and then
//! not shown.

use atlas_shared::message::Task;
use serde::{Deserialize, Serialize};

use super::guess;

/// Where a record weighs its options.
pub(super) const PROS_AND_CONS: &str = "Pros and Cons of the Options";
/// Where a record has what is not the decision itself.
pub(super) const MORE: &str = "More Information";
/// Where every document lists the passages that it cites.
pub(super) const SOURCES: &str = "Sources";
/// Sections that a record has below another one, under a level-3 heading.
pub(super) const BELOW: &[Field] =
    &[Field::Consequences, Field::Confirmation, Field::Diagrams, Field::OpenQuestions];

/// What kind of document is wanted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A full architecture spec.
    #[default]
    Spec,
    /// One decision, as an architecture decision record (MADR 4).
    Adr,
    /// An assessment of an existing design.
    Review,
    /// Changes to an earlier spec, with a summary of what changed.
    Refine,
}

/// What decided about the [`Kind`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum KindFrom {
    /// The request's words.
    Request,
    /// `metadata.kind`, or `metadata.parent_id` without it.
    Metadata,
}

impl Kind {
    /// All kinds.
    pub const ALL: [Self; 4] = [Self::Spec, Self::Adr, Self::Review, Self::Refine];

    /// The word in `metadata.kind`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Spec => "spec",
            Self::Adr => "adr",
            Self::Review => "review",
            Self::Refine => "refine",
        }
    }

    /// The kind a request wants: `metadata.kind` wins; a request with a parent refines it; else its
    /// [first sentences](guess) decide. `Err` holds an unknown `metadata.kind`.
    pub fn of(task: &Task, has_parent: bool) -> Result<Self, String> {
        if let Some(asked) = &task.options.kind {
            return Self::ALL
                .into_iter()
                .find(|kind| kind.as_str().eq_ignore_ascii_case(asked))
                .ok_or_else(|| asked.clone());
        }
        if has_parent {
            return Ok(Self::Refine);
        }
        Ok(guess::kind(&task.content))
    }

    /// What decided that a request gets a document of the kind that it gets.
    pub fn chosen_by(task: &Task) -> KindFrom {
        let options = &task.options;
        if options.kind.is_some() || options.parent_id.is_some() {
            KindFrom::Metadata
        } else {
            KindFrom::Request
        }
    }

    /// The level-2 headings of a document of this kind, in order. A record has those of
    /// [MADR 4](https://adr.github.io/madr/), with the consequences and the confirmation under its outcome.
    pub fn headings(self) -> Vec<&'static str> {
        let (below, more): (&[Field], &[&str]) =
            if self == Self::Adr { (BELOW, &[PROS_AND_CONS, MORE]) } else { (&[], &[]) };
        let fields = self.fields().iter().filter(|field| **field != Field::Title && !below.contains(field));
        let headings = fields.map(|field| field.heading_in(self)).filter(|heading| !heading.is_empty());
        headings.chain(more.iter().copied()).chain([SOURCES]).collect()
    }

    /// The fields of a document of this kind, in the order they are written and shown.
    pub fn fields(self) -> &'static [Field] {
        use Field as F;
        match self {
            Self::Spec => &[
                F::Title,
                F::Summary,
                F::Context,
                F::Requirements,
                F::Components,
                F::Decisions,
                F::Diagrams,
                F::Deployment,
                F::Scaling,
                F::Security,
                F::Observability,
                F::Risks,
                F::OpenQuestions,
            ],
            Self::Adr => &[
                F::Title,
                F::Summary,
                F::Context,
                F::Drivers,
                F::Options,
                F::Outcome,
                F::Consequences,
                F::Confirmation,
                F::Diagrams,
                F::OpenQuestions,
            ],
            Self::Review => &[
                F::Title,
                F::Summary,
                F::Context,
                F::Strengths,
                F::Findings,
                F::Risks,
                F::Diagrams,
                F::OpenQuestions,
            ],
            Self::Refine => &[
                F::Title,
                F::Summary,
                F::Changes,
                F::Context,
                F::Requirements,
                F::Components,
                F::Decisions,
                F::Diagrams,
                F::Deployment,
                F::Scaling,
                F::Security,
                F::Observability,
                F::Risks,
                F::OpenQuestions,
            ],
        }
    }
}

/// A top-level field of a document.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[expect(missing_docs, reason = "the names say it")]
pub enum Field {
    Title,
    Summary,
    Changes,
    Context,
    Requirements,
    Drivers,
    Options,
    Outcome,
    Consequences,
    Confirmation,
    Strengths,
    Findings,
    Components,
    Decisions,
    Diagrams,
    Deployment,
    Scaling,
    Security,
    Observability,
    Risks,
    OpenQuestions,
}

impl Field {
    /// The property's name in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Title => "title",
            Self::Summary => "summary",
            Self::Changes => "changes",
            Self::Context => "context",
            Self::Requirements => "requirements",
            Self::Drivers => "drivers",
            Self::Options => "options",
            Self::Outcome => "outcome",
            Self::Consequences => "consequences",
            Self::Confirmation => "confirmation",
            Self::Strengths => "strengths",
            Self::Findings => "findings",
            Self::Components => "components",
            Self::Decisions => "decisions",
            Self::Diagrams => "diagrams",
            Self::Deployment => "deployment",
            Self::Scaling => "scaling",
            Self::Security => "security",
            Self::Observability => "observability",
            Self::Risks => "risks",
            Self::OpenQuestions => "open_questions",
        }
    }

    /// The heading in Markdown. Stable: readers and tools find sections by it.
    pub fn heading(self) -> &'static str {
        match self {
            Self::Title => "Title",
            Self::Summary => "Summary",
            Self::Changes => "What changed",
            Self::Context => "Context",
            Self::Requirements => "Requirements",
            Self::Drivers => "Decision Drivers",
            Self::Options => "Considered Options",
            Self::Outcome => "Decision Outcome",
            Self::Consequences => "Consequences",
            Self::Confirmation => "Confirmation",
            Self::Strengths => "Strengths",
            Self::Findings => "Findings",
            Self::Components => "Components",
            Self::Decisions => "Decisions",
            Self::Diagrams => "Diagrams",
            Self::Deployment => "Deployment",
            Self::Scaling => "Scaling",
            Self::Security => "Security",
            Self::Observability => "Observability",
            Self::Risks => "Risks",
            Self::OpenQuestions => "Open questions",
        }
    }

    /// The heading in a document of this kind. A record has those of MADR 4, whose summary stands right under
    /// the title and has none.
    pub fn heading_in(self, kind: Kind) -> &'static str {
        match (kind, self) {
            (Kind::Adr, Self::Summary) => "",
            (Kind::Adr, Self::Context) => "Context and Problem Statement",
            (_, field) => field.heading(),
        }
    }

    /// The field of that name.
    pub fn named(name: &str) -> Option<Self> {
        Kind::ALL.iter().flat_map(|kind| kind.fields()).copied().find(|field| field.name() == name)
    }
}

/// A document. Which fields are filled depends on its kind.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Spec {
    /// What it is called.
    pub title: String,
    /// The answer in a few sentences.
    pub summary: String,
    /// What is different from the parent (refine).
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub changes: Vec<Change>,
    /// What is there today, and why this is needed.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub context: Vec<Claim>,
    /// What must hold.
    #[serde(skip_serializing_if = "Requirements::is_empty")]
    pub requirements: Requirements,
    /// What the decision must serve (ADR).
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub drivers: Vec<Claim>,
    /// What could be done (ADR).
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub options: Vec<Choice>,
    /// What is decided (ADR).
    #[serde(skip_serializing_if = "Outcome::is_empty")]
    pub outcome: Outcome,
    /// What follows from the decision (ADR).
    #[serde(skip_serializing_if = "Consequences::is_empty")]
    pub consequences: Consequences,
    /// How one sees that the decision is kept (ADR).
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub confirmation: Vec<Claim>,
    /// What is good (review).
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub strengths: Vec<Claim>,
    /// What is not (review).
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub findings: Vec<Finding>,
    /// The parts.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub components: Vec<Component>,
    /// What was decided, and against what.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub decisions: Vec<Decision>,
    /// Pictures.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub diagrams: Vec<Diagram>,
    /// How it gets there.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub deployment: Vec<Claim>,
    /// How it grows.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub scaling: Vec<Claim>,
    /// How it is kept safe.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub security: Vec<Claim>,
    /// How one sees what it does.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub observability: Vec<Claim>,
    /// What may go wrong.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub risks: Vec<Risk>,
    /// What nobody knows yet.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub open_questions: Vec<String>,
}

/// A statement and the numbers of the passages that support it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Claim {
    /// The statement.
    pub text: String,
    /// Passages that support it; none: general knowledge.
    pub citations: Vec<u32>,
}

/// What must hold.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Requirements {
    /// What it must do.
    pub functional: Vec<Claim>,
    /// How well.
    pub non_functional: Vec<Claim>,
}

impl Requirements {
    /// True when there are none.
    pub fn is_empty(&self) -> bool {
        self.functional.is_empty() && self.non_functional.is_empty()
    }
}

/// A part of the system.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Component {
    /// Its name.
    pub name: String,
    /// What it does and does not do.
    pub responsibility: String,
    /// What it is made of.
    pub technology: String,
    /// What it offers and needs.
    pub interfaces: String,
    /// Passages that support this.
    pub citations: Vec<u32>,
}

/// A decision within a spec.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Decision {
    /// What it is about.
    pub title: String,
    /// What is decided.
    pub decision: String,
    /// Why.
    pub rationale: String,
    /// What else was possible: two or more.
    pub alternatives: Vec<Alternative>,
    /// What follows, good and bad.
    pub consequences: Vec<String>,
    /// Passages that support this.
    pub citations: Vec<u32>,
}

/// A road not taken.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Alternative {
    /// Its name.
    pub name: String,
    /// Why it was not taken.
    pub why_not: String,
}

/// A Mermaid diagram.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Diagram {
    /// Its caption.
    pub title: String,
    /// Mermaid source, no fence.
    pub mermaid: String,
    /// Why it is outside the subset that is checked; then it is shown as text. Never asked of a model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fault: Option<String>,
}

/// How bad something is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[expect(missing_docs, reason = "the names say it")]
pub enum Severity {
    Low,
    #[default]
    Medium,
    High,
}

impl Severity {
    /// The word, in JSON and for readers.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Low => "low",
            Self::Medium => "medium",
            Self::High => "high",
        }
    }
}

/// What may go wrong.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Risk {
    /// What may happen.
    pub risk: String,
    /// How bad that is.
    pub severity: Severity,
    /// What is done about it.
    pub mitigation: String,
    /// Passages that support this.
    pub citations: Vec<u32>,
}

/// A difference from the parent spec.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Change {
    /// Where.
    pub section: String,
    /// What is different now.
    pub change: String,
    /// Why.
    pub reason: String,
    /// Passages that support this.
    pub citations: Vec<u32>,
    /// The author did not name it: comparison with the parent found it. Never asked of a model.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub found_by_comparison: bool,
}

/// An option of a decision record.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Choice {
    /// Its name.
    pub name: String,
    /// What it means.
    pub description: String,
    /// What speaks for it.
    pub pros: Vec<String>,
    /// What speaks against it.
    pub cons: Vec<String>,
    /// Passages that support this.
    pub citations: Vec<u32>,
}

/// What a decision record decides.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Outcome {
    /// Name of the option.
    pub chosen: String,
    /// Why.
    pub rationale: String,
    /// Passages that support this.
    pub citations: Vec<u32>,
}

impl Outcome {
    /// True when nothing is decided.
    pub fn is_empty(&self) -> bool {
        self.chosen.is_empty() && self.rationale.is_empty() && self.citations.is_empty()
    }
}

/// What follows from a decision record.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Consequences {
    /// What gets better.
    pub good: Vec<Claim>,
    /// What gets worse.
    pub bad: Vec<Claim>,
}

impl Consequences {
    /// True when there are none.
    pub fn is_empty(&self) -> bool {
        self.good.is_empty() && self.bad.is_empty()
    }
}

/// Something that a review found.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Finding {
    /// What it is about.
    pub title: String,
    /// How bad it is.
    pub severity: Severity,
    /// What is wrong.
    pub finding: String,
    /// What to do.
    pub recommendation: String,
    /// Passages that support this.
    pub citations: Vec<u32>,
}

/// One item of a document as the checks see it: its texts, and its citations where it has them.
pub(super) struct Item<'a> {
    pub(super) field: Field,
    pub(super) texts: Vec<&'a mut String>,
    pub(super) citations: Option<&'a mut Vec<u32>>,
}

impl Item<'_> {
    /// All that the item says, as one text.
    pub(super) fn claim(&self) -> String {
        self.texts.iter().map(|text| text.as_str()).collect::<Vec<_>>().join(" ")
    }

    /// What tells this item from others.
    pub(super) fn key(&self) -> String {
        key(self.texts.iter().map(|text| text.as_str()))
    }
}

/// The [`Item::key`] of an item with these texts: name and body say which one it is.
pub(super) fn key<'a>(texts: impl Iterator<Item = &'a str>) -> String {
    texts.take(2).collect::<Vec<_>>().join("\n")
}

fn claims(field: Field, claims: &mut [Claim]) -> impl Iterator<Item = Item<'_>> {
    claims.iter_mut().map(move |claim| Item {
        field,
        texts: vec![&mut claim.text],
        citations: Some(&mut claim.citations),
    })
}

impl Spec {
    /// Every item with text, in the order of `kind`'s fields and thus of the rendered document.
    /// Diagram sources are no prose and are left out; their titles are in.
    pub(super) fn items(&mut self, kind: Kind) -> Vec<Item<'_>> {
        let mut items = Vec::new();
        let Self {
            title,
            summary,
            changes,
            context,
            requirements,
            drivers,
            options,
            outcome,
            consequences,
            confirmation,
            strengths,
            findings,
            components,
            decisions,
            diagrams,
            deployment,
            scaling,
            security,
            observability,
            risks,
            open_questions,
        } = self;
        let plain = |field, text| Item { field, texts: vec![text], citations: None };
        items.push(plain(Field::Title, title));
        items.push(plain(Field::Summary, summary));
        items.extend(changes.iter_mut().map(|it| Item {
            field: Field::Changes,
            texts: vec![&mut it.section, &mut it.change, &mut it.reason],
            // Comparison is its source.
            citations: (!it.found_by_comparison).then_some(&mut it.citations),
        }));
        items.extend(claims(Field::Context, context));
        items.extend(claims(Field::Requirements, &mut requirements.functional));
        items.extend(claims(Field::Requirements, &mut requirements.non_functional));
        items.extend(claims(Field::Drivers, drivers));
        for it in options {
            let mut texts = vec![&mut it.name, &mut it.description];
            texts.extend(&mut it.pros);
            texts.extend(&mut it.cons);
            items.push(Item { field: Field::Options, texts, citations: Some(&mut it.citations) });
        }
        items.push(Item {
            field: Field::Outcome,
            texts: vec![&mut outcome.chosen, &mut outcome.rationale],
            citations: Some(&mut outcome.citations),
        });
        items.extend(claims(Field::Consequences, &mut consequences.good));
        items.extend(claims(Field::Consequences, &mut consequences.bad));
        items.extend(claims(Field::Confirmation, confirmation));
        items.extend(claims(Field::Strengths, strengths));
        items.extend(findings.iter_mut().map(|it| Item {
            field: Field::Findings,
            texts: vec![&mut it.title, &mut it.finding, &mut it.recommendation],
            citations: Some(&mut it.citations),
        }));
        items.extend(components.iter_mut().map(|it| Item {
            field: Field::Components,
            texts: vec![&mut it.name, &mut it.responsibility, &mut it.technology, &mut it.interfaces],
            citations: Some(&mut it.citations),
        }));
        for it in decisions {
            let mut texts = vec![&mut it.title, &mut it.decision, &mut it.rationale];
            for alternative in &mut it.alternatives {
                texts.extend([&mut alternative.name, &mut alternative.why_not]);
            }
            texts.extend(&mut it.consequences);
            items.push(Item { field: Field::Decisions, texts, citations: Some(&mut it.citations) });
        }
        items.extend(diagrams.iter_mut().map(|it| plain(Field::Diagrams, &mut it.title)));
        items.extend(claims(Field::Deployment, deployment));
        items.extend(claims(Field::Scaling, scaling));
        items.extend(claims(Field::Security, security));
        items.extend(claims(Field::Observability, observability));
        items.extend(risks.iter_mut().map(|it| Item {
            field: Field::Risks,
            texts: vec![&mut it.risk, &mut it.mitigation],
            citations: Some(&mut it.citations),
        }));
        items.extend(open_questions.iter_mut().map(|text| plain(Field::OpenQuestions, text)));

        let position = |field: Field| kind.fields().iter().position(|known| *known == field);
        items.retain(|item| position(item.field).is_some());
        items.sort_by_key(|item| position(item.field));
        items
    }
}
