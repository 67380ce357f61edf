//! What was sold, to whom.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::Fault;

/// Tokens billed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bill {
    /// Calls that were billed.
    pub calls: u64,
    /// Tokens of prompts.
    pub prompt_tokens: u64,
    /// Tokens of answers.
    pub completion_tokens: u64,
    /// Both.
    pub total_tokens: u64,
}

impl Bill {
    fn add(&mut self, prompt: u64, completion: u64) {
        self.calls += 1;
        self.prompt_tokens += prompt;
        self.completion_tokens += completion;
        self.total_tokens += prompt + completion;
    }
}

/// One call that was billed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BilledCall {
    /// `X-Client-Request-Id`.
    pub request_id: String,
    /// `chat` or `embedding`.
    pub kind: String,
    /// The model that was asked for.
    pub model: String,
    /// Tokens of the prompt.
    pub prompt_tokens: u64,
    /// Tokens of the answer.
    pub completion_tokens: u64,
    /// What went wrong with it, if anything.
    pub fault: Option<Fault>,
}

/// One fault that struck, billed or not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Strike {
    /// `X-Client-Request-Id`.
    pub request_id: String,
    /// What went wrong.
    pub fault: Fault,
}

/// Everything that was billed since the start or the last reset.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Meter {
    /// Calls that arrived, refused ones included, counted when they arrive.
    pub calls: u64,
    /// Tokens of prompts.
    pub prompt_tokens: u64,
    /// Tokens of answers.
    pub completion_tokens: u64,
    /// Both.
    pub total_tokens: u64,
    /// By the model that was asked for.
    pub by_model: BTreeMap<String, Bill>,
    /// By task: the part of `X-Client-Request-Id` before the first dot.
    pub by_task: BTreeMap<String, Bill>,
    /// `chat` and `embedding`.
    pub by_kind: BTreeMap<String, Bill>,
    /// How often each fault struck.
    pub faults: BTreeMap<String, u64>,
}

impl Meter {
    /// All tokens billed.
    pub fn total_tokens(&self) -> u64 {
        self.total_tokens
    }

    /// Calls that arrived.
    pub fn calls(&self) -> u64 {
        self.calls
    }

    /// What one task was billed.
    pub fn task(&self, task: &str) -> Bill {
        self.by_task.get(task).copied().unwrap_or_default()
    }

    pub(crate) fn arrived(&mut self) {
        self.calls += 1;
    }

    pub(crate) fn struck(&mut self, fault: Fault) {
        *self.faults.entry(fault.to_string()).or_insert(0) += 1;
    }

    pub(crate) fn bill(&mut self, call: &BilledCall) {
        let (prompt, completion) = (call.prompt_tokens, call.completion_tokens);
        self.prompt_tokens += prompt;
        self.completion_tokens += completion;
        self.total_tokens += prompt + completion;
        let task = task_of(&call.request_id);
        let task = if task.is_empty() { "unknown" } else { task };
        for (bills, key) in [
            (&mut self.by_model, call.model.as_str()),
            (&mut self.by_task, task),
            (&mut self.by_kind, call.kind.as_str()),
        ] {
            bills.entry(key.to_owned()).or_default().add(prompt, completion);
        }
    }
}

/// The task of a call: the part of its id before the first dot.
pub(crate) fn task_of(request_id: &str) -> &str {
    request_id.split('.').next().unwrap_or_default()
}
