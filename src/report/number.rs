//! Numbers as people read them.

/// A number with four significant digits: `1.235`, `12,350`, `2e-5`; `not finite` where it is not finite.
pub(super) fn short(value: f64) -> String {
    if !value.is_finite() {
        return "not finite".into();
    }
    if value == 0.0 {
        return "0".into();
    }
    let magnitude = value.abs().log10().floor() as i32;
    if !(-4..9).contains(&magnitude) {
        let mantissa = format!("{value:.3e}");
        let (digits, exponent) = mantissa.split_once('e').unwrap_or((&mantissa, "0"));
        return format!("{}e{exponent}", trimmed(digits)).replace('-', "\u{2212}");
    }
    let decimals = (3 - magnitude).clamp(0, 8) as usize;
    let plain = format!("{value:.decimals$}");
    grouped(trimmed(&plain)).replace('-', "\u{2212}")
}

/// A whole number with separators: `6,173,286,400`.
pub(super) fn count(value: u64) -> String {
    grouped(&value.to_string())
}

/// Bytes in binary units: `5.43 GiB`.
pub(super) fn bytes(value: u64) -> String {
    const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
    if value < 1024 {
        return format!("{value} bytes");
    }
    let power = (value.ilog2() / 10).min(4) as usize;
    let scaled = value as f64 / 1024f64.powi(power as i32);
    let decimals = if scaled < 10.0 { 2 } else { 1 };
    format!("{scaled:.decimals$} {}", UNITS[power - 1])
}

/// A span of time: `48.2 s`, `12 min 3 s`, `3 h 04 min`.
pub(super) fn seconds(value: f64) -> String {
    if !value.is_finite() || value < 0.0 {
        return "unknown".into();
    }
    if value < 59.95 {
        return format!("{value:.1} s");
    }
    let whole = value.round() as u64;
    match whole {
        ..3600 => format!("{} min {} s", whole / 60, whole % 60),
        _ => format!("{} h {:02} min", whole / 3600, whole / 60 % 60),
    }
}

/// A span of time in its larger unit, for where room is scarce: `48 s`, `32 min`, `3.1 h`.
pub(super) fn span(value: f64) -> String {
    match value {
        v if !v.is_finite() || v < 0.0 => "unknown".into(),
        ..59.5 => format!("{value:.0} s"),
        ..5970.0 => format!("{:.0} min", value / 60.0),
        _ => format!("{:.1} h", value / 3600.0),
    }
}

/// A whole number with three digits and a unit: `3.67 M`, `6.18 B`.
pub(super) fn scaled(value: u64) -> String {
    const UNITS: [&str; 6] = ["", " k", " M", " B", " T", " Q"];
    let (mut scaled, mut unit) = (value as f64, 0);
    while scaled >= 999.5 && unit + 1 < UNITS.len() {
        scaled /= 1000.0;
        unit += 1;
    }
    let decimals = match scaled {
        _ if unit == 0 => 0,
        ..9.995 => 2,
        ..99.95 => 1,
        _ => 0,
    };
    format!("{scaled:.decimals$}{}", UNITS[unit])
}

/// A moment as `2026-11-22 02:50 UTC`, from seconds since 1970 (proleptic Gregorian calendar, years that begin in March).
pub(super) fn date(unix: u64) -> String {
    let (days, rest) = (unix / 86_400, unix % 86_400);
    // Days since 1 March of year 0; 400 years are 146,097 days.
    let days = days + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let (month, carry) = if month < 10 {
        (month + 3, 0)
    } else {
        (month - 9, 1)
    };
    let year = era * 400 + year + carry;
    format!(
        "{year:04}-{month:02}-{day:02} {:02}:{:02} UTC",
        rest / 3600,
        rest / 60 % 60
    )
}

/// Without zeros that say nothing: `1.500` is `1.5`.
pub(super) fn trimmed(digits: &str) -> &str {
    if digits.contains('.') {
        digits.trim_end_matches('0').trim_end_matches('.')
    } else {
        digits
    }
}

/// Separators between thousands.
pub(super) fn grouped(digits: &str) -> String {
    let (sign, rest) = match digits.strip_prefix('-') {
        Some(rest) => ("-", rest),
        None => ("", digits),
    };
    let (whole, fraction) = rest.find('.').map_or((rest, ""), |dot| rest.split_at(dot));
    let mut out = String::from(sign);
    for (i, digit) in whole.chars().enumerate() {
        if i > 0 && (whole.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out + fraction
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_well() {
        for (value, text) in [
            (0.0, "0"),
            (1.23456, "1.235"),
            (1.5, "1.5"),
            (12_345.6, "12,346"),
            (0.000_02, "2e\u{2212}5"),
            (0.000_123_4, "0.0001234"),
            (-0.5, "\u{2212}0.5"),
            (3e12, "3e12"),
            (f64::NAN, "not finite"),
        ] {
            assert_eq!(short(value), text);
        }
        assert_eq!(count(6_173_286_400), "6,173,286,400");
        assert_eq!(count(12), "12");
        assert_eq!(bytes(1023), "1023 bytes");
        assert_eq!(bytes(5 << 30), "5.00 GiB");
        assert_eq!(bytes(u64::MAX), "16777216.0 TiB");
        assert_eq!(scaled(999), "999");
        assert_eq!(scaled(3_670_016), "3.67 M");
        assert_eq!(scaled(999_960), "1.00 M");
        assert_eq!(scaled(6_176_956_416), "6.18 B");
        assert_eq!(span(1_934.0), "32 min");
        assert_eq!(seconds(59.96), "1 min 0 s");
        assert_eq!(seconds(3_661.0), "1 h 01 min");
    }

    #[test]
    fn dates_are_right_around_leap_days() {
        for (unix, text) in [
            (0, "1970-01-01 00:00 UTC"),
            (951_782_400, "2000-02-29 00:00 UTC"),
            (1_709_251_199, "2024-02-29 23:59 UTC"),
            (1_709_251_200, "2024-03-01 00:00 UTC"),
            (4_107_542_400, "2100-03-01 00:00 UTC"),
            (1_795_315_800, "2026-11-22 02:50 UTC"),
        ] {
            assert_eq!(date(unix), text, "{unix}");
        }
        assert!(!date(u64::MAX).is_empty());
    }
}
