//! Names and generations of collections.
//!
//! A collection that callers name (`docs`) is an alias of a *generation* (`docs@2`), so that another one
//! can be filled beside it and take its place at once. `@` is in no name that a caller may choose.

/// Digits that the number of a generation has at most: there is always a next one.
const MAX_DIGITS: usize = 18;

/// Where Qdrant keeps what caches go by. No collection of ours has this name, on either engine.
pub(crate) const VERSIONS: &str = "atlas.versions";

/// Where Qdrant keeps vectors that were paid for and are not written yet: in the payloads of such a collection, because
/// different models' are of different lengths.
pub(crate) const PAID: &str = "atlas.paid";

/// Between a collection's name and the number of a generation.
const MARK: char = '@';

/// The name of a generation.
pub(crate) fn generation(name: &str, number: u64) -> String {
    format!("{name}{MARK}{number}")
}

/// The collection and the number of a generation; `None` for what [`generation`] does not write, as the name of a
/// collection.
pub(crate) fn parse(name: &str) -> Option<(&str, u64)> {
    let (plain, number) = name.split_once(MARK)?;
    if number.len() > MAX_DIGITS {
        return None;
    }
    let number = number.parse().ok().filter(|number| *number > 0)?;
    (generation(plain, number) == name).then_some((plain, number))
}

/// The collection's own name, whichever of its generations is named. Changes are announced under it:
/// answers may be cached under either name.
pub(crate) fn plain(name: &str) -> &str {
    parse(name).map_or(name, |(plain, _)| plain)
}

/// The number after all that are there.
pub(crate) fn next<'n>(name: &str, taken: impl IntoIterator<Item = &'n str>) -> u64 {
    taken
        .into_iter()
        .filter_map(parse)
        .filter(|(of, _)| *of == name)
        .map(|(_, number)| number)
        .max()
        .unwrap_or_default()
        .saturating_add(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generations_are_counted_by_name() {
        assert_eq!(generation("docs", 2), "docs@2");
        assert_eq!(parse("docs@12"), Some(("docs", 12)));
        assert_eq!(parse("docs"), None);
        for other in
            ["docs@x", "docs@+5", "docs@05", "docs@0", "docs@", "docs@1@1", "docs@18446744073709551615"]
        {
            assert_eq!(parse(other), None, "{other}");
        }
        assert_eq!(next("docs", ["docs@1", "docs@9", "doc@30", "docs"]), 10);
        assert_eq!(next("docs", []), 1);
    }
}
