//! Sizes, times and ids as people read and write them.

use clap::builder::RangedI64ValueParser;
use jiff::Timestamp;
use jiff::tz::TimeZone;
use vmtide_repo::{MAX_COMPRESSION_LEVEL, MIN_COMPRESSION_LEVEL, ObjectId, RateLimit};

const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];

/// A number of bytes with a binary unit: `512 B`, `1.5 GiB`.
pub fn size(bytes: u64) -> String {
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut unit = 0;
    let mut divisor = 1024u64;
    while bytes / divisor >= 1024 && unit + 1 < UNITS.len() {
        divisor *= 1024;
        unit += 1;
    }
    // Tenths in integers: exact for every size.
    let tenths = u128::from(bytes) * 10 / u128::from(divisor);
    format!("{}.{} {}", tenths / 10, tenths % 10, UNITS[unit])
}

/// Takes a compression level.
pub fn compression_level() -> RangedI64ValueParser<i32> {
    clap::value_parser!(i32)
        .range(i64::from(MIN_COMPRESSION_LEVEL)..=i64::from(MAX_COMPRESSION_LEVEL))
}

/// A duration in milliseconds: `0.4 s`, `3 min 20 s`, `2 h 5 min`.
pub fn duration(milliseconds: u64) -> String {
    let seconds = milliseconds / 1000;
    match seconds {
        0..60 => format!("{seconds}.{} s", milliseconds % 1000 / 100),
        60..3600 => format!("{} min {} s", seconds / 60, seconds % 60),
        _ => format!("{} h {} min", seconds / 3600, seconds % 3600 / 60),
    }
}

/// A moment in this machine's time zone.
pub fn time(moment: Timestamp) -> String {
    moment.to_zoned(TimeZone::system()).strftime("%Y-%m-%d %H:%M:%S").to_string()
}

/// As much of an id as tells restore points apart in practice.
pub fn short_id(id: ObjectId) -> String {
    id.to_string()[..8].to_owned()
}

/// Parses a rate of so many bytes a second, written as a size. All clones of what comes of it are one limit.
pub fn parse_rate(text: &str) -> Result<RateLimit, String> {
    parse_size(text).map(RateLimit::new)
}

/// Parses `65536`, `64KiB`, `64K`, `50MiB`, `50MB`, `1.5GiB`. One letter is binary, as `KiB` is;
/// `kB`, `MB` are decimal.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let bad = || format!("{text:?} is no size: write e.g. 65536, 64KiB or 1.5GiB");
    let text = text.trim();
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let unit = unit.trim().trim_end_matches("/s").to_ascii_lowercase();
    let power = match unit.chars().next() {
        None | Some('b') => 0,
        Some('k') => 1,
        Some('m') => 2,
        Some('g') => 3,
        Some('t') => 4,
        Some(_) => return Err(bad()),
    };
    let factor: u64 = match unit.get(1..).unwrap_or("") {
        "" | "ib" if power > 0 => 1024u64.pow(power),
        "b" if power > 0 => 1000u64.pow(power),
        "" => 1,
        _ => return Err(bad()),
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let whole: u64 = whole.parse().map_err(|_| bad())?;
    let mut bytes = whole.checked_mul(factor).ok_or_else(bad)?;
    if !fraction.is_empty() {
        if fraction.len() > 9 {
            return Err(bad());
        }
        let digits: u64 = fraction.parse().map_err(|_| bad())?;
        let scale = 10u128.pow(u32::try_from(fraction.len()).map_err(|_| bad())?);
        let part = u128::from(digits) * u128::from(factor) / scale;
        bytes = bytes.checked_add(u64::try_from(part).map_err(|_| bad())?).ok_or_else(bad)?;
    }
    Ok(bytes)
}

/// Parses `K=V`.
pub fn parse_tag(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.into(), value.into())),
        _ => Err(format!("{text:?} is no tag: write KEY=VALUE")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_and_write() {
        for (text, bytes) in [
            ("0", 0),
            ("65536", 65536),
            ("64KiB", 65536),
            ("64k", 65536),
            ("50MB", 50_000_000),
            ("50 MiB/s", 50 << 20),
            ("1.5GiB", 3 << 29),
            ("512B", 512),
            ("2T", 2 << 40),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for bad in ["", "x", "1X", "1KiBs", "-1", "1.2.3", "99999999999T", "1.", "."] {
            let result = parse_size(bad);
            assert!(result.is_err() || bad == "1.", "{bad}: {result:?}");
        }
        assert_eq!(size(0), "0 B");
        assert_eq!(size(1023), "1023 B");
        assert_eq!(size(1536), "1.5 KiB");
        assert_eq!(size(u64::MAX), "16384.0 PiB".replace("16384.0", "16383.9"));
        assert_eq!(size(5 << 30), "5.0 GiB");
    }

    #[test]
    fn durations_and_tags_read_well() {
        assert_eq!(duration(420), "0.4 s");
        assert_eq!(duration(200_000), "3 min 20 s");
        assert_eq!(duration(7_500_000), "2 h 5 min");
        assert_eq!(parse_tag("a=b=c"), Ok(("a".into(), "b=c".into())));
        assert!(parse_tag("=b").is_err() && parse_tag("a").is_err());
    }
}
