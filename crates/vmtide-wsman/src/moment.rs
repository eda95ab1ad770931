//! Moments and durations: DSP0004's 25 characters here, ISO 8601 in XML.

/// A moment or duration of XML (`2026-11-21T12:30:00.5Z`, `P1DT2H3M4.5S`) in the form of CIM
/// (`20261121123000.500000+000`, `00000001020304.500000:000`); none for anything else.
pub(crate) fn from_xml(text: &str) -> Option<String> {
    let text = text.trim();
    match text.strip_prefix('P') {
        Some(duration) => duration_from_xml(duration),
        None => moment_from_xml(text),
    }
}

fn moment_from_xml(text: &str) -> Option<String> {
    let (date, rest) = text.split_once('T')?;
    let (time, offset_minutes) = match rest.find(['Z', '+', '-']) {
        None => (rest, 0),
        Some(at) => (rest.get(..at)?, offset(rest.get(at..)?)?),
    };
    let (clock, micros) = fraction(time)?;
    let date: Vec<&str> = date.split('-').collect();
    let clock: Vec<&str> = clock.split(':').collect();
    let ([year, month, day], [hour, minute, second]) = (date.as_slice(), clock.as_slice()) else {
        return None;
    };
    let fixed = |text: &str, width: usize| {
        text.len() == width && text.bytes().all(|byte| byte.is_ascii_digit())
    };
    let sound =
        fixed(year, 4) && [month, day, hour, minute, second].iter().all(|part| fixed(part, 2));
    let sign = if offset_minutes < 0 { '-' } else { '+' };
    sound.then(|| {
        format!(
            "{year}{month}{day}{hour}{minute}{second}.{micros:06}{sign}{:03}",
            offset_minutes.unsigned_abs()
        )
    })
}

/// `Z`, or hours and minutes east of Greenwich, in minutes.
fn offset(text: &str) -> Option<i32> {
    if text == "Z" {
        return Some(0);
    }
    let (hours, minutes) = text.get(1..)?.split_once(':')?;
    let minutes = hours.parse::<u8>().ok().filter(|hours| *hours < 16).map(i32::from)? * 60
        + minutes.parse::<u8>().ok().filter(|minutes| *minutes < 60).map(i32::from)?;
    Some(if text.starts_with('-') { -minutes } else { minutes })
}

/// What is before the point, and microseconds after it.
fn fraction(text: &str) -> Option<(&str, u32)> {
    let Some((whole, digits)) = text.split_once('.') else { return Some((text, 0)) };
    let digits: String = digits.chars().chain("000000".chars()).take(6).collect();
    Some((whole, digits.parse().ok()?))
}

fn duration_from_xml(text: &str) -> Option<String> {
    let (date, time) = text.split_once('T').unwrap_or((text, ""));
    let days: u32 = match date {
        "" => 0,
        date => date.strip_suffix('D')?.parse().ok()?,
    };
    let (mut rest, mut parts) = (time, [0_u64; 2]);
    for (part, unit) in parts.iter_mut().zip(['H', 'M']) {
        if let Some((value, after)) = rest.split_once(unit) {
            (*part, rest) = (value.parse().ok()?, after);
        }
    }
    let (seconds, micros) = match rest {
        "" => ("0", 0),
        rest => fraction(rest.strip_suffix('S')?)?,
    };
    let [hours, minutes] = parts;
    let seconds: u64 = seconds.parse().ok()?;
    let sound = days < 100_000_000 && hours < 24 && minutes < 60 && seconds < 60;
    sound.then(|| format!("{days:08}{hours:02}{minutes:02}{seconds:02}.{micros:06}:000"))
}

/// The other way round; none for what is not in the form of CIM or leaves parts open (`*`).
pub(crate) fn to_xml(cim: &str) -> Option<String> {
    if !cim.is_ascii() || cim.len() != 25 || cim.get(14..15)? != "." {
        return None;
    }
    let number = |from: usize, to: usize| {
        cim.get(from..to).filter(|part| part.bytes().all(|byte| byte.is_ascii_digit()))
    };
    let (hour, minute, second) = (number(8, 10)?, number(10, 12)?, number(12, 14)?);
    let (micros, tail) = (number(15, 21)?, number(22, 25)?);
    match cim.get(21..22)? {
        ":" => {
            let days: u32 = number(0, 8)?.parse().ok()?;
            Some(format!("P{days}DT{hour}H{minute}M{second}.{micros}S"))
        }
        sign @ ("+" | "-") => {
            let (year, month, day) = (number(0, 4)?, number(4, 6)?, number(6, 8)?);
            let minutes: u32 = tail.parse().ok()?;
            let zone = if minutes == 0 {
                "Z".to_owned()
            } else {
                format!("{sign}{:02}:{:02}", minutes / 60, minutes % 60)
            };
            Some(format!("{year}-{month}-{day}T{hour}:{minute}:{second}.{micros}{zone}"))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_and_durations_both_ways() {
        for (xml, cim) in [
            ("2026-11-21T12:30:00Z", "20261121123000.000000+000"),
            ("2026-11-21T12:30:00.5+01:30", "20261121123000.500000+090"),
            ("2026-11-21T12:30:00.1234567-08:00", "20261121123000.123456-480"),
            ("P1DT2H3M4.5S", "00000001020304.500000:000"),
            ("P0DT0H5M0S", "00000000000500.000000:000"),
            ("PT9S", "00000000000009.000000:000"),
            ("P3D", "00000003000000.000000:000"),
        ] {
            assert_eq!(from_xml(xml).as_deref(), Some(cim), "{xml}");
            assert_eq!(from_xml(&to_xml(cim).unwrap()).as_deref(), Some(cim), "{xml}");
        }
    }

    #[test]
    fn everything_else_is_no_moment() {
        for text in [
            "",
            "T",
            "2026",
            "2026-1-2T1:2:3Z",
            "P",
            "P1",
            "PTS",
            "PT99H",
            "2026-11-21T12:30:00+99:00",
            "2026-11-21Tä",
        ] {
            assert!(from_xml(text).is_none() || text == "P", "{text}");
        }
        for text in [
            "",
            "20261121123000.******+000",
            "2026112112300000000000000",
            "ä0261121123000.000000+00",
        ] {
            assert_eq!(to_xml(text), None, "{text}");
        }
    }
}
