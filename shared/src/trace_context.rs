//! W3C trace context (<https://www.w3.org/TR/trace-context/>): the `traceparent` that joins a
//! request's logs and traces across the queue, the gateway and the model API.
//!
//! Values from outside are only ever parsed, never echoed unparsed, so a broken header cannot reach
//! a log or another service.

use std::{fmt, str::FromStr};

use rand::Rng as _;

/// The name of the HTTP header and of the message attribute.
pub const TRACEPARENT: &str = "traceparent";

/// A valid `traceparent`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TraceParent {
    /// Never zero.
    trace_id: u128,
    /// Never zero.
    span_id: u64,
    sampled: bool,
}

/// Text that is no `traceparent`. A receiver starts a new trace then (section 4.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a W3C traceparent")]
pub struct InvalidTraceParent;

impl TraceParent {
    /// A new trace.
    pub fn generate() -> Self {
        Self { trace_id: rand::rng().random_range(1..=u128::MAX), span_id: new_span_id(), sampled: true }
    }

    /// A new span of the same trace, for the next hop.
    #[must_use]
    pub fn child(self) -> Self {
        Self { span_id: new_span_id(), ..self }
    }

    /// What came in, or a new trace when nothing valid came in.
    pub fn from_incoming(value: Option<&str>) -> Self {
        value.and_then(|value| value.parse().ok()).unwrap_or_else(Self::generate)
    }

    /// What came in as a message attribute or header, among others.
    pub fn from_attributes<'a>(attributes: impl IntoIterator<Item = (&'a str, &'a str)>) -> Self {
        Self::from_incoming(
            attributes
                .into_iter()
                .find(|(name, _)| name.eq_ignore_ascii_case(TRACEPARENT))
                .map(|(_, value)| value),
        )
    }

    /// The trace's id as 32 hex digits: the log field `trace_id`.
    pub fn trace_id(self) -> String {
        format!("{:032x}", self.trace_id)
    }

    /// The span's id as 16 hex digits.
    pub fn span_id(self) -> String {
        format!("{:016x}", self.span_id)
    }

    /// True when whoever started the trace records it.
    pub fn sampled(self) -> bool {
        self.sampled
    }
}

fn new_span_id() -> u64 {
    rand::rng().random_range(1..=u64::MAX)
}

impl fmt::Display for TraceParent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "00-{:032x}-{:016x}-{:02x}", self.trace_id, self.span_id, u8::from(self.sampled))
    }
}

impl FromStr for TraceParent {
    type Err = InvalidTraceParent;

    fn from_str(text: &str) -> Result<Self, InvalidTraceParent> {
        let lower_hex = |part: &str| part.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        let mut parts = text.trim().split('-');
        let (Some(version), Some(trace), Some(span), Some(flags)) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(InvalidTraceParent);
        };
        // Version 00 has exactly four parts; later ones may append more (section 3.2.4), ff is invalid.
        let sized = version.len() == 2 && trace.len() == 32 && span.len() == 16 && flags.len() == 2;
        let known = version != "ff" && (version != "00" || parts.next().is_none());
        if !sized || !known || ![version, trace, span, flags].into_iter().all(lower_hex) {
            return Err(InvalidTraceParent);
        }
        let trace_id = u128::from_str_radix(trace, 16).map_err(|_| InvalidTraceParent)?;
        let span_id = u64::from_str_radix(span, 16).map_err(|_| InvalidTraceParent)?;
        let flags = u8::from_str_radix(flags, 16).map_err(|_| InvalidTraceParent)?;
        if trace_id == 0 || span_id == 0 {
            return Err(InvalidTraceParent);
        }
        Ok(Self { trace_id, span_id, sampled: flags & 1 == 1 })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const EXAMPLE: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    #[test]
    fn the_example_of_the_standard_is_read_and_written() {
        let parent: TraceParent = EXAMPLE.parse().unwrap_or_else(|error| unreachable!("{error}"));
        assert_eq!(parent.to_string(), EXAMPLE);
        assert_eq!(parent.trace_id(), "4bf92f3577b34da6a3ce929d0e0e4736");
        assert!(parent.sampled());
    }

    #[test]
    fn a_child_stays_in_the_trace() {
        let parent = TraceParent::generate();
        let child = parent.child();
        assert_eq!(child.trace_id(), parent.trace_id());
        assert_ne!(child.span_id(), parent.span_id());
        assert_eq!(child.to_string().parse(), Ok(child));
    }

    #[test]
    fn what_the_standard_forbids_starts_a_new_trace() {
        for bad in [
            "",
            "00",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-more",
            "00-+bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        ] {
            assert_eq!(bad.parse::<TraceParent>(), Err(InvalidTraceParent), "{bad}");
            assert_ne!(TraceParent::from_incoming(Some(bad)).to_string(), bad);
        }
        assert_eq!(TraceParent::from_attributes([("a", "b"), ("Traceparent", EXAMPLE)]).to_string(), EXAMPLE);
    }

    #[test]
    fn a_later_version_is_read_as_far_as_it_is_known() {
        let later = "01-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-more";
        assert_eq!(TraceParent::from_incoming(Some(later)).to_string(), EXAMPLE);
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in ".{0,80}") {
            if let Ok(parent) = text.parse::<TraceParent>() {
                prop_assert_eq!(parent.to_string().parse(), Ok(parent));
            }
        }
    }
}
