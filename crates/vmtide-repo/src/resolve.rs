//! Naming a restore point the way people do.

use crate::point::RestorePoint;
use crate::repository::PointList;
use crate::{RepoError, Result};
use jiff::Timestamp;
use jiff::civil::DateTime;
use jiff::tz::TimeZone;

/// The fewest digits of an id that name a point. Fewer would make a typing error a restore.
const MIN_PREFIX: usize = 4;

/// See [`Repository::resolve`](crate::Repository::resolve).
pub(crate) fn resolve(list: PointList, spec: &str, location: &str) -> Result<RestorePoint> {
    let PointList { points, unreadable, .. } = list;
    let not_found = |hint: &str| RepoError::NotFound {
        what: format!("restore point {spec:?} in {location}"),
        hint: hint.into(),
    };
    if let Some((vm, moment)) = spec.rsplit_once('@') {
        let until = match moment {
            "latest" => Timestamp::MAX,
            text => parse_time(text)?,
        };
        let of_vm: Vec<RestorePoint> = points.into_iter().filter(|point| point.vm == vm).collect();
        if of_vm.is_empty() {
            return Err(not_found("there is none of that VM; `vmtide points` lists all"));
        }
        return of_vm
            .into_iter()
            .rfind(|point| point.time <= until)
            .ok_or_else(|| not_found("the VM has none as old as that"));
    }
    let is_hex = spec.len() >= MIN_PREFIX && spec.bytes().all(|byte| byte.is_ascii_hexdigit());
    let prefix = spec.to_ascii_lowercase();
    if is_hex {
        let fits = |point: &&RestorePoint| point.id.to_string().starts_with(&prefix);
        let fitting: Vec<&RestorePoint> = points.iter().filter(fits).collect();
        match fitting[..] {
            [point] => return Ok(point.clone()),
            [] => {}
            _ => {
                return Err(RepoError::Invalid(format!(
                    "{spec:?} fits {} restore points; give more digits",
                    fitting.len()
                )));
            }
        }
        if let Some((_, error)) = unreadable.into_iter().find(|(name, _)| {
            name.strip_prefix("points/").is_some_and(|id| id.starts_with(&prefix))
        }) {
            return Err(error);
        }
    }
    points
        .into_iter()
        .rfind(|point| point.vm == spec)
        .ok_or_else(|| not_found("`vmtide points` lists all"))
}

/// A moment: with an offset as it says, else in local time. A day alone means its end, so that
/// `VM@2026-11-20` is the last restore point of that day.
fn parse_time(text: &str) -> Result<Timestamp> {
    let invalid = |error: &dyn std::fmt::Display| {
        RepoError::Invalid(format!(
            "{text:?} is no time ({error}); write latest, 2026-11-20 or 2026-11-20T03:00"
        ))
    };
    if let Ok(moment) = text.parse::<Timestamp>() {
        return Ok(moment);
    }
    let local = match text.parse::<jiff::civil::Date>() {
        Ok(day) if !text.contains(['T', ' ']) => day.at(23, 59, 59, 999_999_999),
        _ => text.parse::<DateTime>().map_err(|error| invalid(&error))?,
    };
    let zoned = local.to_zoned(TimeZone::system()).map_err(|error| invalid(&error))?;
    Ok(zoned.timestamp())
}
