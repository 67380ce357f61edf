//! What a prompt is about: its request, its words, and its numbered passages.

use serde_json::Value;

use crate::tokens::content_text;

/// A numbered passage of a prompt, such as `[3] src/main.rs:1-20` and the lines below it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Passage {
    pub(crate) number: u64,
    /// `path:start-end`.
    pub(crate) place: String,
    /// What stands in brackets after it.
    pub(crate) heading: String,
    pub(crate) text: String,
}

/// What the answer is made from.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Prompt {
    /// The request, or the last user message.
    pub(crate) request: String,
    /// Its telling words, most frequent first.
    pub(crate) words: Vec<String>,
    pub(crate) passages: Vec<Passage>,
    /// An earlier answer, which is to be mended.
    pub(crate) earlier: Option<String>,
    /// It holds the request itself, not only an earlier answer to it.
    pub(crate) shows_request: bool,
    /// It holds the document that the request wants changed.
    pub(crate) shows_parent: bool,
    /// A JSON schema that the prompt spells out.
    pub(crate) schema: Option<Value>,
    /// Everything, for a script's `match`.
    pub(crate) all: String,
}

impl Prompt {
    /// The number of the passage that a script names by its place: a path, or a path and words of that
    /// passage (`docs/a.md: never lost`).
    pub(crate) fn number_of(&self, place: &str) -> Option<u64> {
        let (path, words) = place.split_once(": ").unwrap_or((place, ""));
        let said = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
        let fits = |passage: &&Passage| {
            passage.place.rsplit_once(':').is_some_and(|(file, _)| file == path)
                && (words.is_empty()
                    || passage.heading.contains(words)
                    || said(&passage.text).contains(words))
        };
        self.passages.iter().find(fits).map(|passage| passage.number)
    }

    pub(crate) fn read(messages: &[Value]) -> Self {
        let said = |roles: &[&str]| -> Vec<String> {
            messages
                .iter()
                .filter(|message| message["role"].as_str().is_some_and(|role| roles.contains(&role)))
                .map(|message| content_text(&message["content"]))
                .collect()
        };
        let users = said(&["user"]);
        let data = said(&["user", "tool"]).join("\n");
        // Atlas fences its data: `<<<CODE request`, then the request.
        let fenced = |name: &str| {
            users.iter().find_map(|text| {
                let (start, _) = text.match_indices("<<<").find(|(at, _)| {
                    text[*at..].lines().next().is_some_and(|line| line.trim_end().ends_with(name))
                })?;
                let body = text[start..].split_once('\n')?.1;
                Some(body.lines().take_while(|line| !line.ends_with(">>>")).collect::<Vec<_>>().join("\n"))
            })
        };
        let asked = fenced(" request");
        let shows_request = asked.is_some();
        let request = asked.or_else(|| users.last().cloned()).unwrap_or_default();
        let all: Vec<String> = messages.iter().map(|message| content_text(&message["content"])).collect();
        Self {
            words: telling_words(&request),
            passages: passages(&data),
            earlier: fenced(" earlier answer"),
            shows_request,
            shows_parent: fenced(" earlier document").is_some(),
            schema: all.iter().find_map(|text| spelt_schema(text)),
            request,
            all: all.join("\n"),
        }
    }
}

/// Passages by their headers: `[n] place` at the start of a line, or after a fence's `<<<CODE `. When
/// there are fenced ones only those count, so that a request cannot fake one.
fn passages(text: &str) -> Vec<Passage> {
    let found = |fenced_only: bool| {
        let mut passages: Vec<Passage> = Vec::new();
        let mut open = false;
        for line in text.lines() {
            if let Some((number, place)) = header(line, fenced_only) {
                open = !passages.iter().any(|passage| passage.number == number);
                if open {
                    let (place, heading) = match place.split_once(" (") {
                        Some((place, heading)) => (place, heading.trim_end().trim_end_matches(')')),
                        None => (place, ""),
                    };
                    passages.push(Passage {
                        number,
                        place: place.trim().to_owned(),
                        heading: heading.to_owned(),
                        text: String::new(),
                    });
                }
            } else if line.ends_with(">>>") || line.starts_with("<<<") {
                open = false;
            } else if open && let Some(passage) = passages.last_mut() {
                passage.text.push_str(line);
                passage.text.push('\n');
            }
        }
        passages
    };
    let fenced = found(true);
    if fenced.is_empty() { found(false) } else { fenced }
}

fn header(line: &str, fenced_only: bool) -> Option<(u64, &str)> {
    let rest = match line.strip_prefix("<<<") {
        Some(fenced) => fenced.split_once(' ')?.1,
        None if fenced_only => return None,
        None => line,
    };
    let (number, place) = rest.strip_prefix('[')?.split_once(']')?;
    if !place.starts_with(' ') || place.trim().is_empty() {
        return None;
    }
    Some((number.parse().ok()?, place))
}

/// The schema after the words "JSON schema:".
fn spelt_schema(text: &str) -> Option<Value> {
    let after = &text[text.find("JSON schema:")? + "JSON schema:".len()..];
    let start = after.find('{')?;
    serde_json::Deserializer::from_str(&after[start..]).into_iter::<Value>().next()?.ok()
}

const COMMON: &[&str] = &[
    "about", "after", "also", "and", "are", "between", "design", "does", "each", "for", "from", "have",
    "how", "into", "its", "must", "need", "needs", "not", "our", "should", "system", "that", "the", "their",
    "them", "then", "there", "they", "this", "use", "uses", "using", "variant", "want", "what", "when",
    "which", "with", "without", "write", "you", "your",
];

fn telling_words(text: &str) -> Vec<String> {
    let mut words: Vec<(String, usize)> = Vec::new();
    for word in text.split(|c: char| !c.is_alphanumeric()).take(5000) {
        let word = word.to_lowercase();
        if !(3..=24).contains(&word.chars().count())
            || COMMON.contains(&word.as_str())
            || word.starts_with(char::is_numeric)
        {
            continue;
        }
        if let Some((_, count)) = words.iter_mut().find(|(known, _)| *known == word) {
            *count += 1;
        } else if words.len() < 200 {
            words.push((word, 1));
        }
    }
    // Stable: equally frequent words stay in the order of the text.
    words.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    words.into_iter().map(|(word, _)| word).take(12).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn atlas_prompts_are_understood() {
        let messages = [
            json!({"role": "system", "content": "Answer with JSON that fits this JSON schema:\n{\"type\": \"object\"}"}),
            json!({"role": "user", "content":
                "CODE is data-1.\n\n<<<data-1 request\nDesign a queue for queue messages\n[9] fake.md:1-2\ndata-1>>>\n\n\
                 Passages, best first:\n\n<<<data-1 [1] docs/a.md:1-3 (Intro)\n\nThe queue is durable.\ndata-1>>>\n\n\
                 <<<data-1 [2] src/b.rs:5-9\n\nfn pull() {}\ndata-1>>>\n\nWrite the document now."}),
        ];
        let prompt = Prompt::read(&messages);
        assert_eq!(prompt.request, "Design a queue for queue messages\n[9] fake.md:1-2");
        assert_eq!(prompt.words[0], "queue");
        let numbers: Vec<u64> = prompt.passages.iter().map(|passage| passage.number).collect();
        assert_eq!(numbers, [1, 2], "[9] is the request's own text");
        assert_eq!(prompt.passages[0].text.trim(), "The queue is durable.");
        assert_eq!(
            (prompt.passages[0].place.as_str(), prompt.passages[0].heading.as_str()),
            ("docs/a.md:1-3", "Intro")
        );
        assert_eq!(prompt.schema, Some(json!({"type": "object"})));
    }

    #[test]
    fn passages_are_found_by_their_place() {
        let prompt = Prompt::read(&[json!({"role": "user", "content":
            "Q\n[1] a.md:1-2 (One › Two)\nNothing is\nlost.\n[7] a.md:9-9\nAll is found."})]);
        for (place, number) in [
            ("a.md", Some(1)),
            ("a.md: Two", Some(1)),
            ("a.md: is lost", Some(1)),
            ("a.md: All is", Some(7)),
            ("a.md: other", None),
            ("b.md", None),
        ] {
            assert_eq!(prompt.number_of(place), number, "{place}");
        }
    }

    #[test]
    fn plain_numbered_passages_are_understood() {
        let prompt =
            Prompt::read(&[json!({"role": "user", "content": "Q\n[1] a.md:1-2\nOne.\n[7] b.md:3\nTwo."})]);
        let texts: Vec<(u64, &str)> = prompt.passages.iter().map(|p| (p.number, p.text.trim())).collect();
        assert_eq!(texts, [(1, "One."), (7, "Two.")]);
        assert_eq!(Prompt::read(&[json!({"role": "user", "content": "see [1]\n[x] y\n[2]\n"})]).passages, []);
    }
}
