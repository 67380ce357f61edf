//! Files that repeat the words of an answer without giving it: tests, benchmarks, examples, changelogs, licences and
//! vendored code.
//!
//! A test of a function has all the words of the function's documentation, often more times than the documentation
//! itself. So what words find in such files counts less than in others (`SECONDARY_WEIGHT`), unless the question asks
//! for them. It is the kind of file that counts, told from its path; code search engines such as Zoekt do the same.

use crate::index::{ChunkRecord, Hit};

/// What a file is, where that makes it a less likely answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Test,
    Benchmark,
    Example,
    Changes,
    Legal,
    Vendored,
}

/// Gives what is found in such files less weight: `weight` times its score, and examples, which often answer, half as
/// far from one. What the question asks for keeps its score.
pub(super) fn weigh(question: &str, weight: f32, hits: &mut [Hit]) {
    if weight >= 1.0 {
        return;
    }
    let asked = asked(question);
    for hit in hits {
        if let Some(kind) = Kind::of(&hit.record)
            && !asked.contains(&kind)
        {
            hit.score *= if kind == Kind::Example { f32::midpoint(1.0, weight) } else { weight };
        }
    }
}

impl Kind {
    fn of(record: &ChunkRecord) -> Option<Self> {
        let mut folders: Vec<&str> = record.source.split(['/', '\\']).collect();
        let name = folders.pop()?;
        let stem = name.split_once('.').map_or(name, |(stem, _)| stem);
        let prose = matches!(record.lang.as_deref(), None | Some("markdown" | "rst" | "asciidoc" | "text"));
        Self::of_folders(&folders, prose).or_else(|| Self::of_name(name, stem, prose)).or_else(|| {
            (record.lang.as_deref() == Some("rust") && is_test_module(record)).then_some(Self::Test)
        })
    }

    fn of_folders(folders: &[&str], prose: bool) -> Option<Self> {
        // Elsewhere than at the top, `vendor` may be what the software is about.
        if folders.first().is_some_and(|folder| folder.eq_ignore_ascii_case("vendor")) {
            return Some(Self::Vendored);
        }
        folders.iter().find_map(|folder| {
            Some(match folder.to_ascii_lowercase().as_str() {
                "node_modules" | "third_party" | "third-party" | "thirdparty" | "_vendor" | "vendored"
                | "bower_components" | "site-packages" => Self::Vendored,
                "test" | "tests" | "__tests__" | "testdata" | "fixtures" | "__fixtures__" | "__mocks__"
                | "e2e" | "androidtest" => Self::Test,
                // Of prose it is a specification.
                "spec" | "specs" if !prose => Self::Test,
                "bench" | "benches" | "benchmark" | "benchmarks" => Self::Benchmark,
                "example" | "examples" | "_examples" | "sample" | "samples" | "demo" | "demos" => {
                    Self::Example
                }
                "changelog" | "changelogs" | "changelog.d" | ".changeset" | ".changes" | "newsfragments"
                | "releasenotes" | "release-notes" | "release_notes" | "whatsnew" => Self::Changes,
                "releases" if prose => Self::Changes,
                "licenses" | "licences" if prose => Self::Legal,
                _ => return None,
            })
        })
    }

    fn of_name(name: &str, stem: &str, prose: bool) -> Option<Self> {
        if !prose {
            // `test_app.py`, `app_test.go`, `app.spec.ts`, `conftest.py`, `AppTest.java`
            let whole = name.rsplit_once('.').map_or(name, |(whole, _)| whole);
            let parts: Vec<&str> = whole.split(['.', '_', '-']).collect();
            let ends = [parts.first(), parts.last()].into_iter().flatten();
            for part in ends {
                match part.to_ascii_lowercase().as_str() {
                    "test" | "tests" | "tst" | "conftest" => return Some(Self::Test),
                    "spec" if parts.len() > 1 => return Some(Self::Test),
                    "bench" | "benchmark" | "benchmarks" => return Some(Self::Benchmark),
                    _ => {}
                }
            }
            return ["Test", "Tests", "TestCase", "Spec"]
                .iter()
                .any(|end| whole.len() > end.len() && whole.ends_with(end))
                .then_some(Self::Test);
        }
        let lower = stem.to_ascii_lowercase();
        if lower.starts_with("changelog")
            || matches!(lower.as_str(), "changes" | "release-notes" | "release_notes")
        {
            return Some(Self::Changes);
        }
        // In lower case they may be about such things.
        match stem.split_once('-').map_or(stem, |(stem, _)| stem) {
            "HISTORY" | "NEWS" | "RELEASES" => Some(Self::Changes),
            "LICENSE" | "LICENCE" | "COPYING" | "NOTICE" | "AUTHORS" | "CONTRIBUTORS" | "MAINTAINERS"
            | "CODE_OF_CONDUCT" => Some(Self::Legal),
            _ => None,
        }
    }
}

/// Rust keeps unit tests in the file that they test.
fn is_test_module(record: &ChunkRecord) -> bool {
    let symbol = record.heading.as_deref().unwrap_or_default();
    symbol.strip_prefix("mod test").is_some_and(|rest| {
        matches!(rest.strip_prefix('s').unwrap_or(rest).chars().next(), None | Some(' ' | ','))
    })
}

/// The kinds that a question asks for.
fn asked(question: &str) -> Vec<Kind> {
    let lower = question.to_lowercase();
    let words: Vec<&str> =
        lower.split(|character: char| !character.is_alphanumeric()).filter(|word| !word.is_empty()).collect();
    words
        .iter()
        .enumerate()
        .filter_map(|(at, word)| {
            let before = at.checked_sub(1).and_then(|at| words.get(at));
            let after = words.get(at + 1);
            Some(match *word {
                "tests" | "tested" | "testcase" | "testcases" | "unittest" | "unittests" | "testsuite"
                | "fixture" | "fixtures" | "mock" | "mocks" | "mocked" | "conftest" => Kind::Test,
                // As a noun: "how do I test a route" is answered by documentation.
                "test"
                    if before.is_some_and(|word| BEFORE_A_NOUN.contains(word))
                        || after.is_some_and(|word| AFTER_TEST.contains(word)) =>
                {
                    Kind::Test
                }
                "bench" | "benches" | "benchmark" | "benchmarks" | "benchmarking" => Kind::Benchmark,
                "example" | "examples" | "sample" | "samples" | "demo" | "demos" => Kind::Example,
                "changelog" | "changelogs" | "changed" | "changes" | "release" | "releases" | "released"
                | "version" | "versions" | "breaking" | "deprecated" | "deprecation" | "upgrade"
                | "upgraded" | "upgrading" | "migrate" | "migrating" | "migration" | "history"
                | "introduced" | "removed" | "since" => Kind::Changes,
                "license" | "licenses" | "licensed" | "licence" | "licences" | "licenced" | "licensing"
                | "copyright" | "author" | "authors" | "contributor" | "contributors" | "maintainer"
                | "maintainers" | "conduct" => Kind::Legal,
                "vendor" | "vendors" | "vendored" | "dependency" | "dependencies" | "bundled" | "third" => {
                    Kind::Vendored
                }
                _ => return None,
            })
        })
        .collect()
}

/// What "test" follows as a noun.
const BEFORE_A_NOUN: &[&str] = &[
    "a",
    "the",
    "which",
    "what",
    "any",
    "this",
    "that",
    "every",
    "each",
    "no",
    "unit",
    "integration",
    "regression",
    "e2e",
    "property",
    "load",
    "smoke",
];

/// What follows "test" as a noun.
const AFTER_TEST: &[&str] = &[
    "case", "cases", "suite", "suites", "file", "files", "helper", "helpers", "coverage", "module", "modules",
];

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use uuid::Uuid;

    use super::*;

    fn record(source: &str, heading: Option<&str>) -> ChunkRecord {
        ChunkRecord {
            source: source.to_owned(),
            lang: crate::chunk::language_of(source).map(str::to_owned),
            heading: heading.map(str::to_owned),
            ..ChunkRecord::default()
        }
    }

    fn kind(source: &str) -> Option<Kind> {
        Kind::of(&record(source, None))
    }

    #[test]
    fn kinds_are_told_from_paths() {
        for (kind_of, paths) in [
            (
                Some(Kind::Test),
                &[
                    "tests/sync_mpsc.rs",
                    "src/routing/tests/merge.rs",
                    "gson/src/test/java/com/google/gson/GsonTest.java",
                    "tree_test.go",
                    "test_helpers.go",
                    "src/app.spec.ts",
                    "src/client/tests.rs",
                    "app/conftest.py",
                    "core/OrderTests.cs",
                    "spec/models/user_spec.rb",
                    "lib/__mocks__/fs.js",
                ][..],
            ),
            (Some(Kind::Benchmark), &["benches/body.rs", "Benchmarks/Run.cs", "form_benchmark.go"]),
            (Some(Kind::Example), &["examples/hello.rs", "docs/examples/one.md", "_examples/cache/main.go"]),
            (
                Some(Kind::Changes),
                &["CHANGELOG.md", "docs/changelog.rst", "CHANGES.rst", "HISTORY.md", "docs/releases/1.8.txt"],
            ),
            (Some(Kind::Legal), &["LICENSE", "LICENSE-APACHE", "licenses/MIT.txt", "AUTHORS.rst"]),
            (Some(Kind::Vendored), &["vendor/github.com/x/y.go", "web/node_modules/x/index.js"]),
            (
                None,
                &[
                    "src/latest.rs",
                    "docs/testing.rst",
                    "docs/tutorial/tests.rst",
                    "src/flask/testing.py",
                    "spec/protocol.md",
                    "lib/spec.rs",
                    "src/vendor/orders.py",
                    "docs/history.md",
                    "docs/license.rst",
                    "src/releases/mod.rs",
                    "src/contest.go",
                    "src/Contest.java",
                    "",
                ],
            ),
        ] {
            for path in paths {
                assert_eq!(kind(path), kind_of, "{path}");
            }
        }
    }

    #[test]
    fn test_modules_are_tests_of_rust_only() {
        let of = |source, heading| Kind::of(&record(source, Some(heading)));
        assert_eq!(of("src/a.rs", "mod tests › fn works"), Some(Kind::Test));
        assert_eq!(of("src/a.rs", "mod test"), Some(Kind::Test));
        assert_eq!(of("src/a.rs", "mod tests, fn x"), Some(Kind::Test));
        assert_eq!(of("src/a.rs", "mod testing › fn x"), None);
        assert_eq!(of("src/a.rs", "fn run › mod tests"), None);
        assert_eq!(of("a.md", "mod tests › x"), None);
    }

    #[test]
    fn a_question_asks_for_kinds_by_their_names() {
        for (question, kinds) in [
            ("Which tests cover the retry?", &[Kind::Test][..]),
            ("is there a test for it", &[Kind::Test]),
            ("where is the queue's unit test", &[Kind::Test]),
            ("test cases of parsing", &[Kind::Test]),
            ("how do I test code that uses time", &[]),
            ("test routes without a server", &[]),
            ("an example of a client", &[Kind::Example]),
            ("what changed in version 2?", &[Kind::Changes, Kind::Changes]),
            ("under which licence is it", &[Kind::Legal]),
            ("how fast is it? benchmark", &[Kind::Benchmark]),
            ("third-party code", &[Kind::Vendored]),
            ("change the maximum body size", &[]),
            ("", &[]),
        ] {
            assert_eq!(asked(question), kinds, "{question}");
        }
    }

    #[test]
    fn what_is_asked_for_keeps_its_score() {
        let hits = || -> Vec<Hit> {
            ["src/a.rs", "tests/a.rs", "examples/a.rs"]
                .iter()
                .map(|source| Hit { id: Uuid::nil(), score: 10.0, record: Arc::new(record(source, None)) })
                .collect()
        };
        let scores = |question: &str, weight: f32| -> Vec<f32> {
            let mut hits = hits();
            weigh(question, weight, &mut hits);
            hits.iter().map(|hit| hit.score).collect()
        };
        assert_eq!(scores("how does it retry", 0.5), [10.0, 5.0, 7.5]);
        assert_eq!(scores("how is the retry tested", 0.5), [10.0, 10.0, 7.5]);
        assert_eq!(scores("how does it retry", 1.0), [10.0; 3]);
    }
}
