//! How `backup` and `copy` are told for how long new restore points are immutable.

use jiff::SignedDuration;
use vmtide_engine::Result;
use vmtide_repo::{Immutability, RetentionMode};

/// A time such as `30d` or `6months`, from now on.
pub(super) fn parse_time(text: &str) -> std::result::Result<SignedDuration, String> {
    let wrong = |error: jiff::Error| format!("{text:?} is no length of time: {error}");
    let span: jiff::Span = text.parse().map_err(wrong)?;
    let now = jiff::Zoned::now();
    let end = now.checked_add(span).map_err(wrong)?;
    Ok(end.timestamp().duration_since(now.timestamp()))
}

/// What the two options say together; none where nothing is to be immutable.
///
/// # Errors
/// Where the time is too short or too long.
pub(super) fn of(
    duration: Option<SignedDuration>,
    mode: RetentionMode,
) -> Result<Option<Immutability>> {
    Ok(duration.map(|duration| Immutability::new(mode, duration)).transpose()?)
}
