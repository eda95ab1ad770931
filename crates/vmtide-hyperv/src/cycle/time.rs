//! Times that the host writes: the `datetime` of CIM, and the form that WS-Management gives it.

/// A point in time in seconds since 1970; none where `text` is none.
///
/// `20261121123000.000000+060` (DSP0004 §5.2.4: the offset from UTC in minutes) or `2026-11-21T11:30:00Z`.
pub(crate) fn seconds_of(text: &str) -> Option<i64> {
    let text = text.trim();
    if let Ok(time) = text.parse::<jiff::Timestamp>() {
        return Some(time.as_second());
    }
    if text.len() != 25 || !text.is_ascii() || text.as_bytes().get(14) != Some(&b'.') {
        return None;
    }
    let field = |from: usize, to: usize| text.get(from..to)?.parse::<i16>().ok();
    let small = |from: usize, to: usize| text.get(from..to)?.parse::<i8>().ok();
    let local = jiff::civil::DateTime::new(
        field(0, 4)?,
        small(4, 6)?,
        small(6, 8)?,
        small(8, 10)?,
        small(10, 12)?,
        small(12, 14)?,
        0,
    )
    .ok()?;
    let minutes = i64::from(field(22, 25)?);
    let east = match text.get(21..22)? {
        "+" => minutes,
        "-" => -minutes,
        _ => return None,
    };
    let utc = local.to_zoned(jiff::tz::TimeZone::UTC).ok()?.timestamp().as_second();
    Some(utc - east * 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_name_the_same_moment() {
        let expected = 1_795_260_600;
        for text in [
            "20261121113000.000000+000",
            "20261121123000.123456+060",
            "20261121063000.000000-300",
            "2026-11-21T11:30:00Z",
            "2026-11-21T12:30:00+01:00",
        ] {
            assert_eq!(seconds_of(text), Some(expected), "{text}");
        }
    }

    #[test]
    fn what_is_no_time_is_none() {
        for text in [
            "",
            "yesterday",
            "20261321123000.000000+060",
            "2026112112300 .000000+060",
            "20261121123000.000000*060",
            "00000001000000.000000:000",
            "ä0261121123000.000000+060",
        ] {
            assert_eq!(seconds_of(text), None, "{text}");
        }
    }
}
