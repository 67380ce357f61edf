//! Which kind of document a request asks for, by its first sentences; `metadata.kind` always wins.
//!
//! Looked at are the first three sentences, without what is only polite. In this order:
//!
//! 1. **adr**: a sentence asks for *one record* ("write an ADR", "draft the decision record"), or begins with
//!    one ("ADR: …"). The word as a mere modifier ("an ADR viewer") asks for none.
//! 2. **review**: a sentence begins with "review", "assess", "audit", "critique" or "evaluate" and something
//!    that exists ("our …", "this …", "how …", a path), or asks for a review of something. With a design verb
//!    beside it ("evaluate and design …") it asks for something new.
//! 3. **adr**: a sentence asks to choose ("decide whether …", "should we use X or Y?"), and none begins with
//!    a design verb.
//! 4. **spec**: everything else.

use super::{spec::Kind, words::plain};

/// Sentences that are looked at.
const SENTENCES: usize = 3;
/// Words of a sentence that are looked at.
const WORDS: usize = 40;

/// Verbs that ask for a text.
const WRITE: &[&str] = &[
    "write", "draft", "record", "create", "make", "prepare", "produce", "document", "capture", "give",
    "need", "want", "like", "have", "do", "perform", "conduct", "run", "add", "see", "get",
];
/// Verbs that ask for something new.
const DESIGN: &[&str] = &[
    "design",
    "redesign",
    "build",
    "architect",
    "plan",
    "sketch",
    "specify",
    "propose",
    "implement",
    "invent",
];
/// Verbs that ask for a judgement.
const JUDGE: &[&str] =
    &["review", "assess", "audit", "critique", "evaluate", "criticise", "criticize", "appraise"];
/// Of those the ones that are no nouns too.
const ONLY_VERBS: &[&str] = &["assess", "evaluate", "criticise", "criticize", "appraise"];
const JUDGEMENT: &[&str] = &["review", "assessment", "audit", "critique", "evaluation", "appraisal"];
const CHOOSE: &[&str] = &["decide", "choose", "pick", "settle", "select"];
/// What something that is there begins with.
const EXISTING: &[&str] = &[
    "our",
    "this",
    "that",
    "the",
    "these",
    "those",
    "my",
    "their",
    "its",
    "your",
    "existing",
    "current",
    "how",
    "whether",
    "what",
    "where",
    "if",
    "why",
    "all",
    "attached",
    "following",
];
/// What may follow a noun that is no modifier of the next one.
const AFTER: &[&str] = &[
    "on", "for", "of", "about", "that", "which", "to", "with", "in", "and", "or", "as", "from", "before",
    "after", "where", "whether", "because", "please", "so", "by", "when", "if", "at", "now", "first", "too",
];
/// What ends an object.
const PREPOSITIONS: &[&str] =
    &["on", "for", "of", "about", "that", "which", "to", "with", "from", "in", "by", "where", "who"];
/// What says nothing before what is asked.
const POLITE: &[&str] = &[
    "please",
    "kindly",
    "hi",
    "hello",
    "hey",
    "dear",
    "team",
    "atlas",
    "all",
    "thanks",
    "ok",
    "okay",
    "so",
    "now",
    "then",
    "and",
    "also",
    "first",
    "next",
    "finally",
    "could",
    "can",
    "would",
    "will",
    "you",
    "i",
    "we",
    "i'd",
    "we'd",
    "us",
    "me",
    "let's",
    "let",
    "help",
    "just",
    "quickly",
    "carefully",
    "critically",
    "thoroughly",
];

/// A sentence in lower case.
struct Sentence {
    words: Vec<String>,
    asks: bool,
}

/// The kind that a request asks for by its words.
pub(super) fn kind(request: &str) -> Kind {
    let sentences = sentences(request);
    if sentences.iter().any(asks_for_a_record) {
        return Kind::Adr;
    }
    if sentences.iter().any(asks_for_a_review) {
        return Kind::Review;
    }
    let designs = |sentence: &Sentence| opening(sentence).first().is_some_and(|word| is(DESIGN, word));
    if sentences.iter().any(asks_to_choose) && !sentences.iter().any(designs) {
        return Kind::Adr;
    }
    Kind::Spec
}

fn is(list: &[&str], word: &str) -> bool {
    list.contains(&word)
}

fn sentences(request: &str) -> Vec<Sentence> {
    let mut sentences = Vec::new();
    let mut words: Vec<String> = Vec::new();
    let mut end = |words: &mut Vec<String>, asks: bool| {
        if !words.is_empty() {
            sentences.push(Sentence { words: std::mem::take(words), asks });
        }
    };
    for line in request.lines().filter(|line| !line.trim().is_empty()).take(2 * SENTENCES) {
        for token in line.split_whitespace().take(SENTENCES * WORDS) {
            let word = plain(token);
            let stop = token.trim_end_matches(['"', '”', '\'', ')', '*', '_']).chars().last();
            if !word.is_empty() && words.len() < WORDS {
                words.push(word);
            }
            if let Some('.' | '!' | '?' | ':' | ';') = stop {
                end(&mut words, stop == Some('?'));
            } else if stop == Some(',') && words.len() < WORDS {
                words.push(",".to_owned());
            }
        }
        end(&mut words, false);
    }
    end(&mut words, false);
    sentences.truncate(SENTENCES);
    sentences
}

/// A sentence without what is only polite: "could you please", "we would like you to", "I want to".
fn opening(sentence: &Sentence) -> &[String] {
    let mut words = sentence.words.as_slice();
    loop {
        words = match words {
            [first, rest @ ..] if first == "," || is(POLITE, first) => rest,
            [like, you, to, rest @ ..]
                if is(&["like", "want", "need", "ask"], like) && you == "you" && to == "to" =>
            {
                rest
            }
            [like, to, rest @ ..]
                if is(&["like", "want", "need", "have", "us", "me"], like) && to == "to" =>
            {
                rest
            }
            [to, rest @ ..] if to == "to" => rest,
            words => return words,
        };
    }
}

/// The word that follows, if the noun at `at` modifies it.
fn modifies(words: &[String], at: usize) -> bool {
    words.get(at + 1).is_some_and(|next| next != "," && !is(AFTER, next))
}

/// Where a noun is the object of a verb that asks for a text: `verb … noun`, without a preposition between.
fn asked_for(sentence: &Sentence, is_noun: impl Fn(&[String], usize) -> bool) -> bool {
    let words = &sentence.words;
    let opens = words.len() - opening(sentence).len();
    words.iter().enumerate().any(|(at, verb)| {
        let imperative = at == opens
            || at.checked_sub(1).is_some_and(|before| {
                is(&[",", "and", "then", "please", "you", "we", "i", "i'd", "would"], &words[before])
            });
        is(WRITE, verb)
            && imperative
            && (at + 1..words.len().min(at + 8))
                .take_while(|object| !is(PREPOSITIONS, &words[*object]) && words[*object] != ",")
                .any(|object| is_noun(words, object) && !modifies(words, object))
    })
}

/// `ADR`, `decision record`: one of them.
fn is_record(words: &[String], at: usize) -> bool {
    is(&["adr", "madr"], &words[at])
        || (words[at] == "record" && at > 0 && is(&["decision", "madr", "adr"], &words[at - 1]))
}

fn asks_for_a_record(sentence: &Sentence) -> bool {
    let words = opening(sentence);
    let named = words
        .iter()
        .take_while(|word| {
            is(
                &[
                    "a",
                    "an",
                    "the",
                    "one",
                    "new",
                    "short",
                    "architecture",
                    "architectural",
                    "decision",
                    "adr",
                    "madr",
                    "record",
                ],
                word,
            )
        })
        .count();
    let begins = (0..named).any(|at| is_record(words, at) && !modifies(words, at));
    begins || asked_for(sentence, is_record)
}

fn asks_for_a_review(sentence: &Sentence) -> bool {
    let words = opening(sentence);
    let judges = match words {
        [verb, rest @ ..] if is(JUDGE, verb) => judges(verb, rest),
        _ => false,
    };
    judges
        || asked_for(sentence, |words, at| {
            is(JUDGEMENT, &words[at]) && words.get(at + 1).is_some_and(|next| is(&["of", "on"], next))
        })
}

/// Is this verb followed by something that exists, and not by a wish for something new?
fn judges(verb: &str, rest: &[String]) -> bool {
    match rest {
        [] => false,
        [and, other, ..] if is(&["and", "then", ","], and) && is(DESIGN, other) => false,
        [and, _, rest @ ..] if and == "and" => rest.first().is_some_and(|next| is(EXISTING, next)),
        [next, new, ..] if is(&["a", "an"], next) && new == "new" => false,
        [next, ..] => {
            is(EXISTING, next) || next.contains(['/', '.', '_']) || (is(ONLY_VERBS, verb) && next != "new")
        }
    }
}

fn asks_to_choose(sentence: &Sentence) -> bool {
    let words = opening(sentence);
    let has = |wanted: &[&str]| words.iter().any(|word| is(wanted, word));
    match words {
        [verb, next, ..] if is(CHOOSE, verb) => {
            is(&["between", "whether", "which", "if", "on", "where", "how", "among"], next) || has(&["or"])
        }
        [should, ..] if is(&["should", "shall", "which", "do", "is", "whether", "what"], should) => {
            sentence.asks && has(&["or"])
        }
        words => sentence.asks && has(&["or"]) && words.len() <= 8,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kind_is_told_by_what_is_asked_for() {
        let table = [
            (
                Kind::Adr,
                &[
                    "Write an ADR on caching",
                    "Write an ADR on where the lease of a run is kept",
                    "Should we use Redis or Memcached? Write an architecture decision record",
                    "The lease of a run must be kept somewhere: write the ADR",
                    "We have argued long enough about the queue, please write the ADR",
                    "Could you please draft a short decision record about our queue?",
                    "We need an ADR for the choice of the message bus",
                    "I'd like an ADR that settles tenancy",
                    "Record the decision to keep leases in the store. Make it an ADR.",
                    "ADR: where do leases live",
                    "An architecture decision record on retries",
                    "Architecture decision record: retries",
                    "Create a MADR record for the store",
                    "Should we use Redis or Memcached?",
                    "Kafka or NATS?",
                    "Decide whether the gateway caches in Redis or in memory",
                    "Help us decide between Postgres and SQLite",
                    "Choose between Kafka and NATS for our events",
                    "Which is better for our queue, Redis Streams or Pub/Sub?",
                    "Review our notes on leases. Then write an ADR.",
                ][..],
            ),
            (
                Kind::Review,
                &[
                    "Review our cache",
                    "Review how answers get from the outbox to the topic",
                    "Please review our cache design",
                    "Could you assess the way we handle retries?",
                    "Could you please critically review this design?",
                    "Hi Atlas, can you audit the existing token ledger",
                    "Critique the current deployment",
                    "Evaluate our rate limiter",
                    "Evaluate Redis as we use it",
                    "We would like you to review the gateway's search",
                    "I want a review of our retry policy",
                    "Do a security review of the gateway",
                    "Write a critique of our queue",
                    "Review docs/ARCHITECTURE.md",
                    "Review and improve our cache design",
                    "Assess whether the ledger can lose tokens",
                    "Our cache is slow. Please review the design.",
                    "Review the ADR on leases",
                ][..],
            ),
            (
                Kind::Spec,
                &[
                    "Design a cache",
                    "Design an ADR viewer web app",
                    "ADR viewer for our wiki",
                    "Write a spec for an ADR viewer",
                    "Write a decision record service for our wiki",
                    "Design a tool that lets teams write an ADR",
                    "Build a tool to write ADRs",
                    "Evaluate and design a new cache",
                    "Evaluate a new cache for search",
                    "Review queue for moderators",
                    "Audit log for payments",
                    "Design an audit log of all decisions",
                    "A review app for restaurants",
                    "Design a code review bot",
                    "Design a queue that retries or drops. Should it log or count?",
                    "Should it be fast or cheap? Design a cache that is both.",
                    "Design a logging system for microservices",
                    "How do workers share runs?",
                    "We record decisions in a wiki. Design a better way.",
                    "Xylophone zebra quux",
                    "",
                    "???",
                    "Plan the migration to Postgres, and review it with the team",
                    "A service that assesses credit risk",
                ][..],
            ),
        ];
        let wrong: Vec<_> = table
            .iter()
            .flat_map(|(wanted, requests)| {
                requests.iter().map(move |request| (*wanted, *request, kind(request)))
            })
            .filter(|(wanted, _, found)| wanted != found)
            .collect();
        assert!(wrong.is_empty(), "wanted, request, found: {wrong:#?}");
        assert!(table.iter().map(|(_, requests)| requests.len()).sum::<usize>() >= 60);
    }
}
