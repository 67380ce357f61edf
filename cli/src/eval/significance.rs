//! How sure a difference is. Everything is seeded: the same numbers give the same answer.

use rand::{Rng as _, SeedableRng as _, rngs::StdRng};

const SEED: u64 = 0x00A7_1A5E;
/// Resamples of the bootstrap.
const RESAMPLES: usize = 10_000;
/// Random assignments of the randomisation test.
const ASSIGNMENTS: usize = 100_000;

/// A mean and the 95 % interval it lies in.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Interval {
    pub(crate) mean: f64,
    pub(crate) low: f64,
    pub(crate) high: f64,
}

/// The mean over queries with its percentile bootstrap interval (Efron, 1979): queries are drawn anew,
/// with replacement, because other queries could have been asked.
pub(crate) fn bootstrap(values: &[f64]) -> Interval {
    let mean = mean(values);
    if values.len() < 2 {
        return Interval { mean, low: mean, high: mean };
    }
    let mut random = StdRng::seed_from_u64(SEED);
    let mut means: Vec<f64> = (0..RESAMPLES)
        .map(|_| {
            let sum: f64 = (0..values.len()).map(|_| values[random.random_range(0..values.len())]).sum();
            sum / values.len() as f64
        })
        .collect();
    means.sort_by(f64::total_cmp);
    Interval { mean, low: means[RESAMPLES / 40], high: means[RESAMPLES - 1 - RESAMPLES / 40] }
}

/// The two-sided p-value of Fisher's paired randomisation test, which Smucker, Allan and Carterette
/// (2007) recommend for rankings: if both runs were the same, each query's difference could as well
/// have the other sign.
pub(crate) fn paired_p_value(differences: &[f64]) -> f64 {
    let observed = mean(differences).abs();
    if differences.iter().all(|difference| *difference == 0.0) {
        return 1.0;
    }
    let mut random = StdRng::seed_from_u64(SEED);
    let as_extreme = (0..ASSIGNMENTS)
        .filter(|_| {
            let sum: f64 = differences
                .iter()
                .map(|difference| if random.random::<bool>() { *difference } else { -difference })
                .sum();
            // Sums in another order differ in the last digits.
            (sum / differences.len() as f64).abs() >= observed - 1e-12
        })
        .count();
    // The observed assignment is one of the possible ones.
    (as_extreme + 1) as f64 / (ASSIGNMENTS + 1) as f64
}

/// The mean; 0 of nothing.
pub(crate) fn mean(values: &[f64]) -> f64 {
    if values.is_empty() { 0.0 } else { values.iter().sum::<f64>() / values.len() as f64 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interval_holds_its_mean_and_narrows_with_more_queries() {
        let few: Vec<f64> = (0..20).map(|at| f64::from(at % 2)).collect();
        let many: Vec<f64> = (0..2000).map(|at| f64::from(at % 2)).collect();
        let (few, many) = (bootstrap(&few), bootstrap(&many));
        for interval in [few, many] {
            assert!(interval.low < interval.mean && interval.mean < interval.high, "{interval:?}");
        }
        // The standard error of 20 fair coins is 0.112, of 2000 0.0112; 95 % is 1.96 of it each way.
        assert!((few.high - few.low - 0.44).abs() < 0.1, "{few:?}");
        assert!((many.high - many.low - 0.044).abs() < 0.01, "{many:?}");
        assert_eq!(bootstrap(&[0.5]), Interval { mean: 0.5, low: 0.5, high: 0.5 });
    }

    #[test]
    fn p_values_tell_chance_from_change() {
        assert!((paired_p_value(&[0.0; 50]) - 1.0).abs() < 1e-9);
        let chance: Vec<f64> = (0..50).map(|at| if at % 2 == 0 { 0.1 } else { -0.1 }).collect();
        assert!(paired_p_value(&chance) > 0.5);
        assert!(paired_p_value(&[0.1; 50]) < 0.001);
        // Five differences of one sign: 2 of 32 assignments are as extreme.
        let exact = paired_p_value(&[0.1; 5]);
        assert!((exact - 0.0625).abs() < 0.01, "{exact}");
    }
}
