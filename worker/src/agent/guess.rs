//! Which kind of document a request asks for, by its first sentences; `metadata.kind` always wins.
//!
//! No model and no list of phrases: [`text`] cuts the request into sentences, the [`lexicon`] says what each
//! word can do (ask for something new, for a judgement, for a choice …) in four languages, and the rules here
//! look at which of these stand where. A request for *one record* decides ("write an ADR", "ADR: …"). Else each
//! sentence speaks for at most one kind, the stronger the clearer it is, and the strongest wins:
//!
//! - **spec**: it begins with a verb that asks for something new. What comes after that verb is what is to be
//!   made, so that "design a code review tool" asks for no review.
//! - **review**: it begins with a verb or a noun of judgement and something that is there ("our …", "this …",
//!   a path), looks for faults in it, or asks how good it is.
//! - **adr**: it begins with a verb or a noun of choosing, asks what should be done, or asks for one of several.
//!
//! What speaks for nothing, and what ties, is a **spec**.

mod lexicon;
mod text;

use self::{
    lexicon as lex,
    text::{Sentence, sentences},
};
use super::spec::Kind;

/// How clearly a sentence speaks for a kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Clarity {
    /// Alternatives in a question, a verb that may only say what the request is about.
    Hint,
    /// A verb or noun that asks for a judgement or a choice.
    Asked,
    /// A verb that asks for something new.
    Ordered,
    /// A judgement or a choice between named things.
    Named,
}

/// The kind that a request asks for by its words.
pub(super) fn kind(request: &str) -> Kind {
    let sentences = sentences(request);
    if sentences.iter().any(asks_for_a_record) {
        return Kind::Adr;
    }
    let mut strongest = (Clarity::Hint, Kind::Spec);
    for (clarity, kind) in sentences.iter().filter_map(speaks_for) {
        // Of two that are as clear the first wins, and a hint at a spec is what nobody contradicts.
        if clarity > strongest.0 || (strongest == (Clarity::Hint, Kind::Spec) && clarity >= strongest.0) {
            strongest = (clarity, kind);
        }
    }
    strongest.1
}

/// A sentence without what is only polite ("could you please", "we would like you to"), its verb first.
fn opening(sentence: &Sentence) -> Vec<&str> {
    let all = sentence.all();
    let mut words = all.as_slice();
    loop {
        words = match words {
            [first, rest @ ..] if *first == "," || lex::POLITE.has(first) => rest,
            [like, "you", "to", rest @ ..] if ["like", "want", "need", "ask"].contains(like) => rest,
            [like, "to", rest @ ..] if ["like", "want", "need", "have"].contains(like) => rest,
            ["need", "help", rest @ ..] | ["to", rest @ ..] => rest,
            _ => break,
        };
    }
    let mut words = words.to_vec();
    // German: "könntest du … prüfen", "wir müssen uns … entscheiden".
    let polite = &all[..all.len() - words.len()];
    if polite.iter().any(|word| lex::MODAL.has(word))
        && let Some(last) = words.last()
        && [lex::DESIGN, lex::CHANGE, lex::JUDGE, lex::LOOK, lex::CHOOSE, lex::SPOT, lex::WRITE]
            .iter()
            .any(|verbs| verbs.has(last))
    {
        words.rotate_right(1);
    }
    words
}

/// Does the noun at `at` only modify the one that follows it?
fn modifies(words: &[&str], at: usize) -> bool {
    words.get(at + 1).is_some_and(|next| {
        // "ADR 12", "decision record (ADR)"
        !ends_object(next) && !lex::RECORD.has(next) && !next.starts_with(|c: char| c.is_ascii_digit())
    })
}

/// Stands after an object, and is no part of it.
fn ends_object(word: &str) -> bool {
    word == ","
        || [
            lex::PREPOSITION,
            lex::AFTER,
            lex::IS,
            lex::A,
            lex::THE,
            lex::OURS,
            lex::POLITE,
            lex::AND,
            lex::OR,
        ]
        .iter()
        .any(|words| words.has(word))
}

/// Where the object ends that a sentence begins with.
fn object_end(words: &[&str]) -> usize {
    words.iter().skip(1).position(|word| ends_object(word)).map_or(words.len(), |at| at + 1)
}

/// `ADR`, `decision record`: one of them.
fn is_record(words: &[&str], at: usize) -> bool {
    // "ADR-12" too.
    lex::RECORD.has_compound(words[at].trim_end_matches(|c: char| c.is_ascii_digit() || c == '-'))
        || (at > 0
            && lex::SHEET.has(words[at])
            && (lex::CHOICE.has(words[at - 1]) || lex::RECORD.has(words[at - 1])))
}

/// What stands before a noun and belongs to it: articles, and the words that a record's name is made of.
fn is_before_record(word: &str) -> bool {
    lex::A.has(word)
        || lex::THE.has(word)
        || lex::CHOICE.has(word)
        || ["short", "brief", "architecture", "architectural", "madr", "kurz", "kurzes", "kurzen"]
            .contains(&word)
}

fn asks_for_a_record(sentence: &Sentence) -> bool {
    let words = opening(sentence);
    let record = |at: usize| is_record(&words, at) && !modifies(&words, at);
    let first = words.iter().position(|word| !is_before_record(word)).unwrap_or(words.len());
    if (0..words.len().min(first + 1)).any(record) {
        return true;
    }
    if words.first().is_some_and(|verb| lex::DESIGN.has(verb)) {
        return false;
    }
    // "… as an ADR", "turn it into a decision record".
    let shaped = (1..words.len()).any(|at| {
        ["as", "in", "into", "als", "comme", "como", "en", "sous"].contains(&words[at - 1])
            && (at..words.len())
                .find(|at| !is_before_record(words[*at]) || is_record(&words, *at))
                .is_some_and(record)
    });
    shaped || is_object(sentence, &words, is_record)
}

/// Is such a noun the object of a verb that asks for a text: `verb … noun`, without a preposition between?
fn is_object(sentence: &Sentence, opening: &[&str], is_noun: impl Fn(&[&str], usize) -> bool) -> bool {
    let asked = |words: &[&str], opens: usize| {
        (0..words.len()).any(|at| {
            let imperative = at == opens
                || at.checked_sub(1).is_some_and(|before| {
                    let before = words[before];
                    lex::AND.has(before) || lex::POLITE.has(before)
                });
            imperative
                && lex::WRITE.has(words[at])
                && (at + 1..words.len().min(at + 9))
                    .take_while(|object| !lex::PREPOSITION.has(words[*object]) && words[*object] != ",")
                    .any(|object| is_noun(words, object) && !modifies(words, object))
        })
    };
    let all = sentence.all();
    asked(opening, 0) || asked(&all, all.len().saturating_sub(opening.len()))
}

/// What a sentence asks for, if it asks for anything.
fn speaks_for(sentence: &Sentence) -> Option<(Clarity, Kind)> {
    let words = opening(sentence);
    let head = *words.first()?;
    let chooses = chooses(sentence, &words);
    // "Build or buy: …"
    if words.get(1).is_some_and(|or| lex::OR.has(or) || lex::VERSUS.has(or)) && lex::DESIGN.has(head) {
        return Some((Clarity::Named, Kind::Adr));
    }
    if lex::DESIGN.has(head) || lex::CHANGE.has(head) {
        let remedy = words.iter().take(6).any(|word| lex::REMEDY.has(word));
        return if chooses && is_object(sentence, &words, |words, at| lex::CHOICE.has_compound(words[at])) {
            Some((Clarity::Asked, Kind::Adr))
        } else if lex::DESIGN.has(head) && !remedy {
            Some((Clarity::Ordered, Kind::Spec))
        } else {
            None
        };
    }
    if is_object(sentence, &words, |words, at| lex::PLAN.has(words[at])) && !judges(&words) {
        return Some((Clarity::Ordered, Kind::Spec));
    }
    // "We collect reviews, design the system for it"
    let also_designs = words.windows(2).any(|pair| pair[0] == "," && lex::DESIGN.has(pair[1]));
    if also_designs && !is_task(head) && !lex::JUDGE.has(head) {
        return Some((Clarity::Ordered, Kind::Spec));
    }
    if judges(&words) {
        let between = words.iter().any(|word| lex::OPTION.has(word))
            || words.get(1).is_some_and(|word| lex::WHICH.has(word))
            || (words.iter().any(|word| is_whether(word)) && any(&words, &lex::OR))
            || also_chooses(&words);
        return Some(if between { (Clarity::Named, Kind::Adr) } else { (Clarity::Asked, Kind::Review) });
    }
    if looks_for_faults(&words) || asks_for_a_judgement(sentence, &words) || doubts(sentence, &words) {
        return Some((Clarity::Asked, Kind::Review));
    }
    if chooses {
        return Some((Clarity::Asked, Kind::Adr));
    }
    wonders(sentence, &words).then_some((Clarity::Hint, Kind::Adr))
}

fn any(words: &[&str], of: &lex::Words) -> bool {
    words.iter().any(|word| of.has(word))
}

/// Names a fault: "risks of", but not "risk scoring".
fn has_fault(words: &[&str]) -> bool {
    any(words, &lex::FLAWED)
        || (0..words.len()).any(|at| lex::FAULT.has_compound(words[at]) && !modifies(words, at))
}

/// Begins an indirect question.
fn is_whether(word: &str) -> bool {
    ["whether", "if", "ob", "si"].contains(&word)
}

/// "… and recommend one".
fn also_chooses(words: &[&str]) -> bool {
    words.windows(2).any(|pair| lex::AND.has(pair[0]) && lex::RECOMMEND.has(pair[1]))
        && !words.iter().any(|word| lex::REMEDY.has(word))
}

/// Begins with a verb of judgement that something follows which is there.
fn judges(words: &[&str]) -> bool {
    let [verb, rest @ ..] = words else { return false };
    if !lex::JUDGE.has(verb) {
        return false;
    }
    let is_there = |word: &str| {
        lex::OURS.has(word) || lex::THE.has(word) || word.contains(['/', '.', '_']) || word.ends_with("'s")
    };
    match rest {
        [] => false,
        [and, other, ..] if lex::AND.has(and) && lex::DESIGN.has(other) => false,
        [and, _, rest @ ..] if lex::AND.has(and) => rest.first().is_some_and(|next| is_there(next)),
        [a, new, ..] if lex::A.has(a) && (lex::A.has(new) || lex::JUDGE_OR_NOUN.has(verb)) => false,
        [next, ..] => is_there(next) || (!lex::JUDGE_OR_NOUN.has(verb) && !lex::A.has(next)),
    }
}

/// Begins with a verb that looks, at something that is there or for what is wrong with it.
fn looks_for_faults(words: &[&str]) -> bool {
    let heads = words
        .iter()
        .enumerate()
        .filter(|(at, _)| *at == 0 || lex::AND.has(words[at - 1]))
        .map(|(at, word)| (*word, &words[at + 1..]));
    heads.into_iter().any(|(verb, rest)| {
        let faults = has_fault(rest);
        let between = |word: &&&str| {
            [lex::PREPOSITION, lex::POLITE, lex::VERDICT, lex::A].iter().any(|words| words.has(word))
        };
        let object = rest.iter().find(|word| !between(word));
        let ours = object.is_some_and(|word| lex::OURS.has(word) || ["it", "them"].contains(word))
            || rest.iter().any(|word| word.contains('/') && word.contains('.'));
        let fails = (any(rest, &lex::OURS) || rest.contains(&"you'd")) && any(rest, &lex::FAIL);
        let whether = rest.windows(2).any(|pair| {
            (is_whether(pair[0]) || ["that", "dass"].contains(&pair[0])) && lex::OURS.has(pair[1])
        });
        (lex::LOOK.has(verb) && (ours || faults || whether))
            || (lex::SPOT.has(verb) && (faults || fails || whether))
    })
}

/// Asks for a judgement by its noun: "do a review of …", "security review: …", "feedback on …".
fn asks_for_a_judgement(sentence: &Sentence, words: &[&str]) -> bool {
    let is_verdict = |words: &[&str], at: usize| {
        (lex::VERDICT.has_compound(words[at])
            || (at > 0 && words[at] == "model" && words[at - 1] == "threat"))
            && words.get(at + 1).is_none_or(|next| {
                lex::OURS.has(next)
                    || lex::THE.has(next)
                    || lex::POLITE.has(next)
                    || is_of(next)
                    || (lex::PREPOSITION.has(next)
                        && words.get(at + 2).is_some_and(|after| lex::OURS.has(after)))
            })
    };
    let object = is_object(sentence, words, |words, at| {
        is_verdict(words, at) && words.get(at + 1).is_none_or(|next| is_of(next) || lex::OURS.has(next))
    });
    let end = object_end(words);
    object
        || is_verdict(words, end - 1)
        || (lex::LOOK.has(words[end - 1]) && words.get(end).is_some_and(|next| lex::OURS.has(next)))
}

/// Ties a judgement to what is judged.
fn is_of(word: &str) -> bool {
    [
        "of", "on", "at", "about", "into", "von", "vom", "zu", "zum", "zur", "uber", "ueber", "auf", "der",
        "des", "de", "du", "d", "sur", "sobre", "del", "a",
    ]
    .contains(&word)
}

/// Asks how good something is that is there.
fn doubts(sentence: &Sentence, words: &[&str]) -> bool {
    let all = sentence.all();
    let (head, first) = (words[0], all[0]);
    let next = all.get(1).copied().unwrap_or_default();
    let ours = any(&all, &lex::OURS);
    let bad = has_fault(words);
    let good = any(words, &lex::QUALITY);
    let fails = any(words, &lex::FAIL);
    if ours && (any(&all, &lex::WORRY) || any(words, &lex::THINK)) {
        return true;
    }
    if lex::HOW.has(head) {
        return ours
            && (words.get(1).is_some_and(|word| lex::QUALITY.has(word)) || (lex::WHY.has(head) && bad));
    }
    if [lex::SHOULD, lex::BETTER, lex::RECOMMEND].iter().any(|words| any(&all, words)) {
        return false;
    }
    let is_there = ours || any(&words[1..], &lex::THE);
    if lex::WHAT.has(head) {
        let opinion = words.contains(&"you") && !any(words, &lex::USE);
        return (bad && (is_there || words.len() <= 6)) || (ours && (fails || opinion));
    }
    if lex::CAN.has(first) {
        return ours && (fails || (lex::OURS.has(next) && (good || bad)));
    }
    if lex::IS.has(first) {
        return lex::OURS.has(next) || ((good || bad || fails) && is_there && !any(words, &lex::NEED));
    }
    let whether = words.iter().any(|word| is_whether(word));
    (ours && (good || bad) && (whether || sentence.asks))
        || (sentence.asks && ((bad && words.len() <= 4) || (lex::OURS.has(next) && !any(&all, &lex::NEED))))
}

/// Asks for anything by its first word.
fn is_task(verb: &str) -> bool {
    [lex::SPOT, lex::WRITE, lex::LOOK].iter().any(|verbs| verbs.has(verb))
}

/// Asks to choose, by a verb or a noun of choosing, or names rivals.
fn chooses(sentence: &Sentence, words: &[&str]) -> bool {
    if lex::CHOOSE.has(words[0]) || lex::RECOMMEND.has(words[0]) || also_chooses(words) {
        return true;
    }
    // "whether to …", "which cache to use", "why we chose …"
    let asked = |word: &&str| lex::WHICH.has(word) || is_whether(word);
    if let Some(at) = words.iter().position(asked)
        && at > 0
        && (words.get(at + 1) == Some(&"to")
            || (!sentence.asks && is_task(words[0]) && any(&words[at..], &lex::USE)))
    {
        return true;
    }
    if lex::WRITE.has(words[0]) && words.contains(&"why") && any(words, &lex::CHOSE) {
        return true;
    }
    let is_choice = |words: &[&str], at: usize| lex::CHOICE.has_compound(words[at]);
    let end = object_end(words);
    if is_choice(words, end - 1) || is_object(sentence, words, is_choice) {
        return true;
    }
    words.iter().position(|word| lex::VERSUS.has(word)).is_some_and(|at| {
        words.len() <= 16
            && !words[..at]
                .iter()
                .any(|word| ["that", "which", "who", "for", "with", "showing"].contains(word))
    })
}

/// Asks what should be done, or which of several.
fn wonders(sentence: &Sentence, words: &[&str]) -> bool {
    let all = sentence.all();
    let (first, head) = (all[0], words[0]);
    let or = any(&all, &lex::OR);
    if lex::HOW.has(head) {
        return false;
    }
    if lex::SHOULD.has(first) || lex::SHOULD.has(head) {
        return all.get(1).is_some_and(|who| lex::WE.has(who)) || sentence.asks;
    }
    if lex::IS.has(first) && all.get(1).is_some_and(|who| lex::WE.has(who)) && any(words, &lex::NEED) {
        return true;
    }
    if any(words, &lex::WORTH) {
        return sentence.asks;
    }
    if words.len() == 3 && lex::OR.has(words[1]) {
        return true;
    }
    if lex::WHICH.has(head) {
        return sentence.asks
            && (or
                || words.len() <= 2
                || [lex::SHOULD, lex::RECOMMEND, lex::BETTER, lex::USE].iter().any(|ask| any(words, ask)));
    }
    if lex::WHAT.has(head) {
        return any(words, &lex::BETTER)
            || any(words, &lex::RECOMMEND)
            || ((any(words, &lex::SHOULD) || words.contains(&"you")) && (or || any(words, &lex::USE)));
    }
    if lex::NEED.has(head) && words.get(1).is_some_and(|who| lex::WE.has(who)) {
        return sentence.asks;
    }
    let should = all.windows(2).any(|pair| lex::WE.has(pair[0]) && lex::SHOULD.has(pair[1]));
    sentence.asks && (should || any(words, &lex::BETTER) || (or && (words.len() <= 12 || lex::IS.has(first))))
}

#[cfg(test)]
mod tests;
