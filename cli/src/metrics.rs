//! Reads a metrics page (Prometheus text format) as far as `atlas demo` needs it.

use std::collections::BTreeMap;

/// One line: a value and its labels.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Sample {
    /// Metric name, with `_sum`, `_count`, `_bucket`.
    pub(crate) name: String,
    /// Labels.
    pub(crate) labels: BTreeMap<String, String>,
    /// Value.
    pub(crate) value: f64,
}

/// All samples of a page; lines that are none are left out.
pub(crate) fn parse(page: &str) -> Vec<Sample> {
    page.lines().filter_map(sample).collect()
}

fn sample(line: &str) -> Option<Sample> {
    let line = line.trim();
    if line.starts_with('#') {
        return None;
    }
    let (name, labels, rest) = if let Some((name, rest)) = line.split_once('{') {
        let (labels, rest) = read_labels(rest)?;
        (name, labels, rest)
    } else {
        let (name, rest) = line.split_once(' ')?;
        (name, BTreeMap::new(), rest)
    };
    let value = rest.split_whitespace().next()?.parse().ok()?;
    Some(Sample { name: name.to_owned(), labels, value })
}

/// `a="x",b="y"} rest`; values may hold escaped quotes.
fn read_labels(text: &str) -> Option<(BTreeMap<String, String>, &str)> {
    let mut labels = BTreeMap::new();
    let mut rest = text;
    loop {
        rest = rest.trim_start_matches([',', ' ']);
        if let Some(rest) = rest.strip_prefix('}') {
            return Some((labels, rest));
        }
        let (name, after) = rest.split_once("=\"")?;
        let mut value = String::new();
        let mut chars = after.char_indices();
        loop {
            match chars.next()? {
                (_, '\\') => value.push(match chars.next()?.1 {
                    'n' => '\n',
                    other => other,
                }),
                (at, '"') => {
                    rest = &after[at + 1..];
                    break;
                }
                (_, other) => value.push(other),
            }
        }
        labels.insert(name.to_owned(), value);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn samples_and_their_labels_are_read() {
        let page = "# HELP a b\n# TYPE a counter\natlas_tokens_total{model=\"gpt \\\"4\\\"\",kind=\"prompt\"} 12\nup 1\nbroken{\n\nx{} NaN 17\n";
        let samples = parse(page);
        assert_eq!(samples.len(), 3);
        assert_eq!(samples[0].name, "atlas_tokens_total");
        assert_eq!(samples[0].labels["model"], "gpt \"4\"");
        assert_eq!(samples[0].labels["kind"], "prompt");
        assert!((samples[0].value - 12.0).abs() < f64::EPSILON);
        assert_eq!(samples[1].name, "up");
        assert!(samples[2].value.is_nan());
    }
}
