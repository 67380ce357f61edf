//! Relevancy thresholds that were measured.
//!
//! A cosine means something for one model only, so there is no default for a model that is not here.
//! How they were measured is in docs/ARCHITECTURE.md, "Search".

/// Cosines below which passages were not worth showing, by model.
const MEASURED: &[(&str, f32)] = &[("multilingual-e5-small", 0.79), ("multilingual-e5-small-q4", 0.79)];

/// The threshold of a model, if it was measured.
pub(super) fn measured(model: &str) -> Option<f32> {
    // `intfloat/multilingual-e5-small` and `multilingual-e5-small` are one model.
    let name = model.rsplit('/').next().unwrap_or(model);
    MEASURED.iter().find(|(known, _)| name.eq_ignore_ascii_case(known)).map(|(_, threshold)| *threshold)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_measured_models_have_one() {
        assert_eq!(measured("intfloat/multilingual-e5-small"), Some(0.79));
        assert_eq!(measured("text-embedding-3-small"), None);
        assert_eq!(measured(""), None);
    }
}
