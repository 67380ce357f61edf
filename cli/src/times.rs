//! Times on the command line: ages such as `2h` or `30d`, and instants.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp, Unit, civil::Date, tz::TimeZone};

/// An age: a whole number and one of s, m, h, d, w.
pub(crate) fn parse_age(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is no age: write 90s, 30m, 12h, 7d or 2w");
    let unit = text.chars().next_back().ok_or_else(wrong)?;
    let number: u64 = text[..text.len() - unit.len_utf8()].parse().map_err(|_| wrong())?;
    let seconds: u64 = match unit {
        's' => 1,
        'm' => 60,
        'h' => 3600,
        'd' => 86_400,
        'w' => 604_800,
        _ => return Err(wrong()),
    };
    // A century is longer than anything is kept.
    number
        .checked_mul(seconds)
        .filter(|seconds| *seconds <= 36_525 * 86_400)
        .map(Duration::from_secs)
        .ok_or_else(wrong)
}

/// An instant: an age before now, a day (its first second in UTC), or a time as in RFC 3339.
pub(crate) fn parse_since(text: &str) -> Result<Timestamp, String> {
    if let Ok(age) = parse_age(text) {
        let age = SignedDuration::try_from(age).map_err(|error| error.to_string())?;
        return Timestamp::now().checked_sub(age).map_err(|error| error.to_string());
    }
    if let Ok(at) = text.parse::<Timestamp>() {
        return Ok(at);
    }
    text.parse::<Date>()
        .ok()
        .and_then(|day| day.to_zoned(TimeZone::UTC).ok())
        .map(|midnight| midnight.timestamp())
        .ok_or_else(|| {
            format!("{text:?} is no time: write an age (2h, 7d), a day (2026-03-01) or a time (2026-03-01T12:00:00Z)")
        })
}

/// How long ago, in words.
pub(crate) fn ago(now: Timestamp, at: Timestamp) -> String {
    match now.duration_since(at).as_secs() {
        ..=0 => "now".to_owned(),
        seconds @ 1..=119 => format!("{seconds} s ago"),
        seconds @ 120..=7199 => format!("{} min ago", seconds / 60),
        seconds @ 7200..=172_799 => format!("{} h ago", seconds / 3600),
        seconds => format!("{} d ago", seconds / 86_400),
    }
}

/// An instant without its fractions.
pub(crate) fn seconds(at: Timestamp) -> String {
    at.round(Unit::Second).unwrap_or(at).to_string()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn ages_have_one_unit() {
        assert_eq!(parse_age("90s").unwrap(), Duration::from_secs(90));
        assert_eq!(parse_age("2w").unwrap(), Duration::from_hours(14 * 24));
        for wrong in ["", "d", "7", "-1d", "1.5h", "7 d", "1y", "99999999999w", "7é"] {
            assert!(parse_age(wrong).unwrap_err().contains("30m"), "{wrong}");
        }
    }

    #[test]
    fn an_instant_is_an_age_a_day_or_a_time() {
        let at = |text: &str| parse_since(text).unwrap();
        assert_eq!(at("2026-03-01"), at("2026-03-01T00:00:00Z"));
        let two_hours_ago = at("2h");
        assert_eq!(Timestamp::now().duration_since(two_hours_ago).as_hours(), 2);
        assert!(parse_since("yesterday").unwrap_err().contains("7d"));
    }
}
