//! Answers and faults for the next calls, in order.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::Fault;

/// What to do with one call. The first step that matches a call is used, and used up.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Step {
    /// Only calls whose `X-Client-Request-Id` or prompt contains this.
    #[serde(rename = "match", skip_serializing_if = "Option::is_none")]
    pub matches: Option<String>,
    /// `chat` (the default), `embedding`, `rerank` or `any`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kind: Option<Kind>,
    /// For how many calls; 1 when missing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub times: Option<u32>,
    /// What goes wrong.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fault: Option<Fault>,
    /// `Retry-After` of a refusal, in seconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retry_after: Option<f64>,
    /// How long the call takes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub delay_ms: Option<u64>,
    /// The answer: a text, or a JSON value that is sent as text. In a JSON value a citation may name its
    /// passage by place, `"docs/a.md: never lost"`, whatever its number in the prompt is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content: Option<Value>,
    /// The answer asks for these tools.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<ScriptedCall>,
    /// Why it stopped; by itself when missing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub finish_reason: Option<String>,
}

/// Which endpoint a step is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// `/v1/chat/completions`.
    Chat,
    /// `/v1/embeddings`.
    Embedding,
    /// `/rerank`.
    Rerank,
    /// All of them.
    Any,
}

/// A tool call of a scripted answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScriptedCall {
    /// Function name; the first tool on offer when missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Arguments: an object, or a text that is sent as it is (to send broken ones); made up from the
    /// tool's schema when missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub arguments: Option<Value>,
}

/// The steps that are left.
#[derive(Clone, Debug, Default)]
pub struct Script {
    steps: Vec<Step>,
}

impl Script {
    /// A script.
    pub fn new(steps: Vec<Step>) -> Self {
        Self { steps }
    }

    /// How many steps are left.
    pub fn left(&self) -> usize {
        self.steps.len()
    }

    pub(crate) fn steps(&self) -> &[Step] {
        &self.steps
    }

    /// Takes the step for a call.
    pub(crate) fn take(&mut self, kind: Kind, request_id: &str, prompt: &str) -> Option<Step> {
        let at = self.steps.iter().position(|step| {
            let wanted = step.kind.unwrap_or(Kind::Chat);
            (wanted == kind || wanted == Kind::Any)
                && step
                    .matches
                    .as_deref()
                    .is_none_or(|text| request_id.contains(text) || prompt.contains(text))
        })?;
        let left = self.steps[at].times.unwrap_or(1);
        if left > 1 {
            self.steps[at].times = Some(left - 1);
            Some(self.steps[at].clone())
        } else {
            Some(self.steps.remove(at))
        }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn steps_are_used_in_order_by_those_they_match() {
        let steps = json!([
            {"match": "task-b", "fault": "500"},
            {"fault": "429", "times": 2},
            {"kind": "embedding", "fault": "hang"},
        ]);
        let mut script = Script::new(serde_json::from_value(steps).unwrap());
        let mut fault = |kind, id: &str| script.take(kind, id, "prompt").map(|step| step.fault.unwrap());
        assert_eq!(fault(Kind::Chat, "task-a.1"), Some(Fault::RateLimited));
        assert_eq!(fault(Kind::Chat, "task-b.1"), Some(Fault::ServerError));
        assert_eq!(fault(Kind::Chat, "task-b.2"), Some(Fault::RateLimited));
        assert_eq!(fault(Kind::Chat, "task-a.2"), None);
        assert_eq!(fault(Kind::Embedding, "x"), Some(Fault::Hang));
        assert_eq!(script.left(), 0);
    }

    #[test]
    fn a_misspelt_step_is_an_error() {
        assert!(serde_json::from_value::<Step>(json!({"falut": "429"})).is_err());
        assert!(serde_json::from_value::<Step>(json!({"fault": "boom"})).is_err());
    }
}
