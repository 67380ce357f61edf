//! The table that a person reads.

use std::fmt::Write as _;

use super::{books::Checks, driver::Ran, plan::Plan};

/// A number with separators.
#[expect(clippy::needless_pass_by_value, reason = "numbers, and texts that may be numbers")]
fn number(value: impl ToString) -> String {
    let text = value.to_string();
    if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return text;
    }
    let mut grouped = String::new();
    for (index, digit) in text.chars().enumerate() {
        if index > 0 && (text.len() - index).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

/// Writing to a String cannot fail, so the results of `writeln!` say nothing.
pub(super) fn write(plan: &Plan, ran: &Ran, checks: &Checks) -> String {
    let mut out = String::new();
    let differences: usize = checks.lines.iter().map(|line| line.differences.len()).sum();
    let verdict =
        if differences == 0 { "all books agree".to_owned() } else { format!("{differences} DIFFERENCES") };
    let _ =
        writeln!(out, "Chaos run: seed {}, {} requests: {verdict}\n", plan.seed, number(plan.tasks.len()));

    let row = |out: &mut String, what: &str, count: String| {
        let _ = writeln!(out, "  {what:<52} {count:>12}");
    };
    let _ = writeln!(out, "Published");
    let published = &ran.published;
    for (what, count) in [
        ("requests", published.requests),
        ("duplicates, right away", published.duplicates),
        ("duplicates, after the answer", published.late_duplicates),
        ("malformed messages", published.malformed.len() as u64),
        ("messages for other roles", published.other_roles),
        ("commands (set_budget)", published.controls),
    ] {
        row(&mut out, what, number(count));
    }

    let _ = writeln!(out, "\nThrown in");
    for (what, count) in &ran.blows {
        row(&mut out, what, number(count));
    }
    row(&mut out, "connections to Pub/Sub cut", number(ran.cut));
    row(&mut out, "day's limit ran out and was raised", number(ran.exhausted));
    row(&mut out, "most runs that waited for it at once", number(ran.most_deferred));
    let faults: u64 = checks.faults.values().sum();
    row(&mut out, "calls that reached the model", number(checks.calls));
    row(
        &mut out,
        "of these met a fault",
        format!("{} ({} %)", number(faults), faults * 100 / checks.calls.max(1)),
    );
    let kinds: Vec<String> = checks.faults.iter().map(|(kind, count)| format!("{kind} {count}")).collect();
    for line in kinds.chunks(7) {
        let _ = writeln!(out, "    {}", line.join(", "));
    }

    let _ = writeln!(out, "\nFinal states");
    for (what, count) in &checks.endings {
        row(&mut out, what, number(count));
    }

    let _ = writeln!(out, "\nMessages on architect_out");
    for (what, count) in &ran.answers.kinds {
        row(&mut out, what, number(count));
    }

    let _ = writeln!(out, "\nTokens");
    row(&mut out, "billed by the model", number(checks.tokens.billed));
    row(&mut out, "booked as settled", number(checks.tokens.settled));
    row(&mut out, "booked as assumed spent", number(checks.tokens.assumed));
    row(&mut out, "billed above the API's word, with the answer lost", number(checks.unknowable));
    row(&mut out, "reservations that killed gateways left, booked late", number(ran.orphans));

    let _ = writeln!(
        out,
        "\n{:<20} {:<46} {:>14} {:>13}  result",
        "Books", "What must hold", "expected", "found"
    );
    let _ = writeln!(out, "{}", "-".repeat(104));
    for line in &checks.lines {
        let result = if line.differences.is_empty() { "ok" } else { "DIFFERS" };
        let _ = writeln!(
            out,
            "{:<20} {:<46} {:>14} {:>13}  {result}",
            line.books,
            line.what,
            number(&line.expected),
            number(&line.found)
        );
        for difference in &line.differences {
            let _ = writeln!(out, "    {difference}");
        }
    }
    let _ = writeln!(
        out,
        "\n{} s from the first message to the last final state, {} s more until all was at rest; \
         the account was looked at {} times.",
        ran.working.as_secs(),
        ran.resting.as_secs(),
        number(ran.looks)
    );
    out
}

#[cfg(test)]
mod tests {
    use super::number;

    #[test]
    fn numbers_are_grouped_and_words_are_left_alone() {
        assert_eq!(number(1_234_567), "1,234,567");
        assert_eq!(number(12), "12");
        assert_eq!(number(">= 5"), ">= 5");
    }
}
