//! Reads a process's `/metrics`.

use std::collections::BTreeMap;

/// Series by name with labels, as they are printed.
#[derive(Debug, Default)]
pub(crate) struct Scrape(BTreeMap<String, f64>);

impl Scrape {
    /// Reads `url`; a process that does not answer has no series.
    pub(crate) async fn of(url: &str) -> Self {
        let Ok(answer) = reqwest::get(url).await else { return Self::default() };
        Self::parse(&answer.text().await.unwrap_or_default())
    }

    fn parse(text: &str) -> Self {
        let series = text.lines().filter(|line| !line.starts_with('#')).filter_map(|line| {
            let (name, value) = line.rsplit_once(' ')?;
            Some((name.to_owned(), value.parse().ok()?))
        });
        Self(series.collect())
    }

    /// The sum of all series of this name.
    pub(crate) fn sum(&self, name: &str) -> f64 {
        self.0
            .iter()
            .filter(|(series, _)| series.split('{').next() == Some(name))
            .map(|(_, value)| value)
            .sum()
    }

    /// The sum of all series of this name that have this label.
    pub(crate) fn sum_of(&self, name: &str, label: &str) -> f64 {
        self.0
            .iter()
            .filter(|(series, _)| series.split('{').next() == Some(name) && series.contains(label))
            .map(|(_, value)| value)
            .sum()
    }

    /// A quantile of a histogram: the upper bound of the bucket it is in, and what share of all
    /// observations is at or below that bound.
    pub(crate) fn quantile(&self, name: &str, quantile: f64) -> Option<(f64, f64)> {
        let prefix = format!("{name}_bucket{{");
        let mut buckets: BTreeMap<u64, f64> = BTreeMap::new();
        for (series, count) in &self.0 {
            let Some(labels) = series.strip_prefix(&prefix) else { continue };
            let Some(bound) = labels.split("le=\"").nth(1).and_then(|rest| rest.split('"').next()) else {
                continue;
            };
            let bound: f64 = if bound == "+Inf" { f64::INFINITY } else { bound.parse().ok()? };
            // Positive floats are ordered as their bits are.
            *buckets.entry(bound.to_bits()).or_default() += count;
        }
        let all = *buckets.values().last()?;
        let (bound, count) = buckets.iter().find(|(_, count)| **count >= quantile * all)?;
        (all > 0.0).then(|| (f64::from_bits(*bound), count / all))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_the_bound_of_their_bucket() {
        let scrape = Scrape::parse(
            "# HELP x\nx_bucket{le=\"0.005\"} 50\nx_bucket{le=\"0.01\"} 99\nx_bucket{le=\"+Inf\"} 100\ny{a=\"1\"} 2\ny{a=\"2\"} 3\n",
        );
        assert_eq!(scrape.quantile("x", 0.5), Some((0.005, 0.5)));
        assert_eq!(scrape.quantile("x", 0.99), Some((0.01, 0.99)));
        assert_eq!(scrape.quantile("x", 1.0), Some((f64::INFINITY, 1.0)));
        assert_eq!(scrape.quantile("z", 0.5), None);
        assert!((scrape.sum("y") - 5.0).abs() < 1e-9);
        assert!((scrape.sum_of("y", "a=\"2\"") - 3.0).abs() < 1e-9);
    }
}
