//! Text that arrives while it is written, in pieces that may come late, twice or in another order.

use std::collections::{BTreeMap, HashSet};

use serde_json::Value;

/// Pieces that wait for an earlier one; a queue that loses one must not make us wait for ever.
const MAX_WAITING: usize = 8;

/// Puts the pieces of a call in order.
#[derive(Debug, Default)]
pub(crate) struct LiveText {
    /// Which call speaks.
    speaker: Option<Speaker>,
    /// Those that spoke before it: what still comes of them is out of date.
    past: HashSet<Speaker>,
    /// The piece that comes next.
    next: u64,
    waiting: BTreeMap<u64, String>,
    /// Something was shown.
    pub(crate) shown: bool,
}

/// Run attempt, step, attempt of the call.
type Speaker = (u64, String, u64);

/// What to print for a message.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Printed {
    /// True when another call speaks now, and what it says replaces what was said before.
    pub(crate) starts_anew: bool,
    /// The text.
    pub(crate) text: String,
}

impl LiveText {
    /// Takes a message's text. `None`: it is no text, or there is nothing to print yet.
    pub(crate) fn take(&mut self, metadata: &serde_json::Map<String, Value>, text: &str) -> Option<Printed> {
        if metadata.get("stage").and_then(Value::as_str) != Some("text") {
            return None;
        }
        let stream = metadata.get("stream")?;
        let attempt = metadata.get("attempt").and_then(Value::as_u64).unwrap_or(0);
        let step = stream["step"].as_str().unwrap_or_default().to_owned();
        let speaker = (attempt, step, stream["call"].as_u64().unwrap_or(0));
        let part = stream["part"].as_u64()?;
        let mut starts_anew = false;
        if self.past.contains(&speaker) {
            return None;
        }
        if self.speaker.as_ref() != Some(&speaker) {
            starts_anew = self.shown;
            let mut past = std::mem::take(&mut self.past);
            past.extend(self.speaker.take());
            *self = Self { speaker: Some(speaker), past, shown: self.shown, ..Self::default() };
        }
        if part < self.next {
            return None;
        }
        self.waiting.insert(part, text.to_owned());
        if self.waiting.len() > MAX_WAITING
            && let Some(first) = self.waiting.keys().next()
        {
            self.next = *first;
        }
        let mut ready = String::new();
        while let Some(text) = self.waiting.remove(&self.next) {
            ready.push_str(&text);
            self.next += 1;
        }
        if ready.is_empty() {
            return None;
        }
        self.shown = true;
        Some(Printed { starts_anew, text: printable(&ready) })
    }
}

/// Nothing in a text from elsewhere may steer the terminal.
fn printable(text: &str) -> String {
    text.chars().filter(|c| !c.is_control() || *c == '\n').collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn take(live: &mut LiveText, step: &str, part: u64, text: &str) -> Option<(bool, String)> {
        let metadata =
            json!({"stage": "text", "attempt": 1, "stream": {"step": step, "call": 1, "part": part}});
        live.take(metadata.as_object()?, text).map(|printed| (printed.starts_anew, printed.text))
    }

    #[test]
    fn pieces_are_put_in_order_and_copies_dropped() {
        let mut live = LiveText::default();
        assert_eq!(take(&mut live, "draft.0", 1, "b"), None);
        assert_eq!(take(&mut live, "draft.0", 0, "a"), Some((false, "ab".to_owned())));
        assert_eq!(take(&mut live, "draft.0", 1, "b"), None);
        assert_eq!(take(&mut live, "draft.0", 2, "c\u{1b}[31m"), Some((false, "c[31m".to_owned())));
        assert_eq!(take(&mut live, "repair.0", 0, "d"), Some((true, "d".to_owned())));
    }

    #[test]
    fn what_comes_late_of_an_earlier_call_is_not_shown_again() {
        let mut live = LiveText::default();
        assert_eq!(take(&mut live, "draft.0", 0, "a"), Some((false, "a".to_owned())));
        assert_eq!(take(&mut live, "repair.0", 0, "b"), Some((true, "b".to_owned())));
        assert_eq!(take(&mut live, "draft.0", 1, "late"), None);
        assert_eq!(take(&mut live, "repair.0", 1, "c"), Some((false, "c".to_owned())));
    }

    #[test]
    fn a_lost_piece_does_not_stop_the_rest() {
        let mut live = LiveText::default();
        let shown: Vec<_> = (1..=9).filter_map(|part| take(&mut live, "draft.0", part, "x")).collect();
        assert_eq!(shown, [(false, "x".repeat(9))]);
    }

    #[test]
    fn other_progress_is_no_text() {
        let mut live = LiveText::default();
        let metadata = json!({"stage": "writing", "stream": true});
        assert_eq!(metadata.as_object().and_then(|metadata| live.take(metadata, "x")), None);
    }
}
