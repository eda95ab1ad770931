//! When a certificate ends (RFC 5280 4.1).

use vmtide_sspi::der::{Node, SEQUENCE, expect, read};

const INTEGER: u8 = 0x02;
/// `[0]`: the version, which certificates of version 1 leave out.
const VERSION: u8 = 0xa0;
const UTC_TIME: u8 = 0x17;
const GENERALIZED_TIME: u8 = 0x18;

/// When a certificate ends, in seconds since 1970; none where that cannot be read.
pub(crate) fn end_unix_s(certificate: &[u8]) -> Option<i64> {
    let signed = expect(expect(certificate, SEQUENCE)?.content, SEQUENCE)?;
    let mut rest = expect(signed.content, VERSION).map_or(signed.content, |version| version.rest);
    // Its number, the algorithm, who made it.
    for tag in [INTEGER, SEQUENCE, SEQUENCE] {
        rest = expect(rest, tag)?.rest;
    }
    let validity = expect(rest, SEQUENCE)?;
    seconds_of(&read(read(validity.content)?.rest)?)
}

/// `YYMMDDHHMMSSZ`, from 1950 to 2049, or `YYYYMMDDHHMMSSZ`.
fn seconds_of(time: &Node<'_>) -> Option<i64> {
    let text = std::str::from_utf8(time.content).ok()?.strip_suffix('Z')?;
    let (year, rest) = match time.tag {
        UTC_TIME => {
            let (year, rest) = text.split_at_checked(2)?;
            let year: i64 = year.parse().ok()?;
            (if year < 50 { 2000 + year } else { 1900 + year }, rest)
        }
        GENERALIZED_TIME => {
            let (year, rest) = text.split_at_checked(4)?;
            (year.parse().ok()?, rest)
        }
        _ => return None,
    };
    let part = |from: usize| rest.get(from..from + 2)?.parse::<i64>().ok();
    let (month, day) = (part(0)?, part(2)?);
    let known = rest.len() == 10 && (1..=12).contains(&month) && (1..=31).contains(&day);
    let seconds = part(4)? * 3600 + part(6)? * 60 + part(8)?;
    known.then(|| days_since_1970(year, month, day) * 86_400 + seconds)
}

/// Days of the Gregorian calendar, counted in years that begin with March: the day that some have more is the last then.
fn days_since_1970(year: i64, month: i64, day: i64) -> i64 {
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let leap_days = year.div_euclid(4) - year.div_euclid(100) + year.div_euclid(400);
    365 * year + leap_days + (153 * month + 2) / 5 + day - 1 - 719_468
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn certificates_tell_their_end() {
        for (year, month, day) in
            [(2026, 2, 28), (2028, 2, 29), (2049, 12, 31), (2050, 1, 1), (4096, 3, 1)]
        {
            let mut parameters = rcgen::CertificateParams::new(vec!["h".to_owned()]).unwrap();
            parameters.not_after = rcgen::date_time_ymd(year, month, day);
            let key = rcgen::KeyPair::generate().unwrap();
            let made = parameters.self_signed(&key).unwrap();
            let end = parameters_end(year, month, day);
            assert_eq!(end_unix_s(made.der()), Some(end), "{year}-{month}-{day}");
        }
        for length in 0..64 {
            assert_eq!(end_unix_s(&vec![0x30; length]), None);
        }
    }

    fn parameters_end(year: i32, month: u8, day: u8) -> i64 {
        rcgen::date_time_ymd(year, month, day).unix_timestamp()
    }
}
