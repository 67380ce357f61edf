//! How commands talk: results to standard output, everything else to standard error.
//!
//! Colours only where a terminal reads them (and `NO_COLOR` is not set): `anstream` strips them
//! otherwise. A reader that goes away (`atlas runs list | head`) ends the output, not in a panic.

use std::{fmt, io::Write as _, time::Duration};

use anstyle::{AnsiColor, Style};
use indicatif::{HumanDuration, ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle};
use serde::Serialize;

use crate::error::{CliError, Result};

/// Bold.
pub(crate) const BOLD: Style = Style::new().bold();
/// Less important.
pub(crate) const DIM: Style = Style::new().dimmed();
/// Good.
pub(crate) const GREEN: Style = AnsiColor::Green.on_default();
/// Look at this.
pub(crate) const YELLOW: Style = AnsiColor::Yellow.on_default();
/// Bad.
pub(crate) const RED: Style = AnsiColor::Red.on_default();

/// When to colour.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Color {
    /// On a terminal.
    #[default]
    Auto,
    /// Always.
    Always,
    /// Never.
    Never,
}

/// What the user wants to see.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ui {
    /// No notes, only results and errors.
    pub(crate) quiet: bool,
    /// More notes.
    pub(crate) verbose: bool,
}

impl Ui {
    /// Sets the colours of this process.
    pub(crate) fn new(color: Color, quiet: bool, verbose: bool) -> Self {
        match color {
            Color::Auto => {}
            Color::Always => anstream::ColorChoice::Always.write_global(),
            Color::Never => anstream::ColorChoice::Never.write_global(),
        }
        Self { quiet, verbose }
    }

    /// A line of the result, to standard output.
    // A method, so that no command writes past the choices above.
    #[expect(clippy::unused_self, reason = "results are never quiet; kept beside `note`")]
    pub(crate) fn out(self, line: impl fmt::Display) {
        // A closed pipe is the reader's choice.
        let _ = writeln!(anstream::stdout().lock(), "{line}");
    }

    /// A value for a script, as indented JSON on standard output.
    pub(crate) fn json(self, value: &impl Serialize) -> Result<()> {
        let text = serde_json::to_string_pretty(value)
            .map_err(|error| CliError::failure("cannot write the result as JSON").because(error))?;
        self.out(text);
        Ok(())
    }

    /// A line about what goes on, to standard error.
    pub(crate) fn note(self, line: impl fmt::Display) {
        if !self.quiet {
            let _ = writeln!(anstream::stderr().lock(), "{line}");
        }
    }

    /// Text without a line's end, to standard error at once: it goes on.
    pub(crate) fn write(self, text: impl fmt::Display) {
        if !self.quiet {
            let mut out = anstream::stderr().lock();
            let _ = write!(out, "{text}").and_then(|()| out.flush());
        }
    }

    /// A note for `--verbose`.
    pub(crate) fn detail(self, line: impl fmt::Display) {
        if self.verbose {
            self.note(line);
        }
    }

    /// A line that even `--quiet` shows.
    #[expect(clippy::unused_self, reason = "kept beside `note`, which it differs from in one thing")]
    pub(crate) fn warn(self, line: impl fmt::Display) {
        let _ = writeln!(anstream::stderr().lock(), "{}", paint(YELLOW, line));
    }

    /// A progress bar on standard error; draws nothing where that is no terminal. `{rate}` is what is done in a
    /// second, `{left}` the time until the end; both say nothing before there is something to reckon with.
    pub(crate) fn bar(self, length: u64, template: &str) -> ProgressBar {
        let bar = ProgressBar::with_draw_target(
            Some(length),
            if self.quiet { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr_with_hz(10) },
        );
        // The templates are literals of this crate; a broken one costs the looks only.
        if let Ok(style) = ProgressStyle::with_template(template) {
            let style = style
                .with_key("rate", |state: &ProgressState, out: &mut dyn fmt::Write| {
                    let _ = out.write_str(&rate(state.pos(), state.per_sec()));
                })
                .with_key("left", |state: &ProgressState, out: &mut dyn fmt::Write| {
                    let _ = out.write_str(&left(state.pos(), state.eta()));
                });
            bar.set_style(style.progress_chars("█▉▊▋▌▍▎▏ "));
        }
        bar.enable_steady_tick(Duration::from_millis(200));
        bar
    }
}

fn rate(done: u64, per_second: f64) -> String {
    if done == 0 || !per_second.is_finite() {
        return String::new();
    }
    // A decimal only where it says something.
    if per_second < 10.0 { format!("{per_second:.1}/s") } else { format!("{per_second:.0}/s") }
}

fn left(done: u64, eta: Duration) -> String {
    if done == 0 { String::new() } else { format!("{:#} left", HumanDuration(eta)) }
}

/// Prints an error the way every command does.
pub(crate) fn print_error(error: &CliError) {
    let _ = writeln!(anstream::stderr().lock(), "{} {error}", paint(RED, "error:"));
}

/// `text` in `style`.
pub(crate) fn paint(style: Style, text: impl fmt::Display) -> String {
    format!("{style}{text}{style:#}")
}

/// A table with left-aligned columns, two spaces apart, without trailing spaces.
pub(crate) fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = head.iter().map(|cell| cell.chars().count()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let line = |cells: &mut dyn Iterator<Item = &str>| {
        let mut line = String::new();
        for (cell, width) in cells.zip(&widths) {
            line.push_str(cell);
            line.extend(std::iter::repeat_n(' ', (width + 2).saturating_sub(cell.chars().count())));
        }
        line.trim_end().to_owned()
    };
    let mut lines = vec![paint(BOLD, line(&mut head.iter().copied()))];
    lines.extend(rows.iter().map(|row| line(&mut row.iter().map(String::as_str))));
    lines.join("\n")
}

/// `12345` as `12,345`.
pub(crate) fn thousands(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// `1 file`, `2 files`.
pub(crate) fn count(number: usize, noun: &str) -> String {
    let plural = if number == 1 { "" } else { "s" };
    format!("{} {noun}{plural}", thousands(number as u64))
}

/// Bytes for people: `512 B`, `1.5 MiB`.
pub(crate) fn bytes(number: u64) -> String {
    const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
    if number < 1024 {
        return format!("{number} B");
    }
    let mut value = number as f64 / 1024.0;
    let mut unit = UNITS[0];
    for next in &UNITS[1..] {
        if value < 1024.0 {
            break;
        }
        value /= 1024.0;
        unit = next;
    }
    format!("{value:.1} {unit}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_and_the_time_left_are_told_once_something_is_done() {
        assert_eq!((rate(0, 0.0).as_str(), left(0, Duration::ZERO).as_str()), ("", ""));
        assert_eq!(left(3, Duration::from_secs(30)), "30s left");
        assert_eq!([4.2738, 173.2].map(|rate_| rate(7, rate_)), ["4.3/s", "173/s"].map(str::to_owned));
    }

    #[test]
    fn numbers_are_grouped() {
        assert_eq!(
            [0, 999, 1000, 1_234_567].map(thousands),
            ["0", "999", "1,000", "1,234,567"].map(str::to_owned)
        );
        assert_eq!(count(1, "file"), "1 file");
        assert_eq!(count(2000, "file"), "2,000 files");
    }

    #[test]
    fn sizes_have_units() {
        assert_eq!(
            [0, 1023, 1024, 1536, 5 << 20, 3 << 30].map(bytes),
            ["0 B", "1023 B", "1.0 KiB", "1.5 KiB", "5.0 MiB", "3.0 GiB"].map(str::to_owned)
        );
    }

    #[test]
    fn a_table_lines_up() {
        let text = table(&["A", "LONG"], &[vec!["xyz".to_owned(), "1".to_owned()]]);
        let plain = anstream::adapter::strip_str(&text).to_string();
        assert_eq!(plain, "A    LONG\nxyz  1");
    }
}
