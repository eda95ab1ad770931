//! Removing for good, and keeping until a time.
//!
//! In a bucket with versions a plain DELETE only hides an object behind a marker, and what it costs
//! goes on: so versions are removed one by one, by their ids. What object lock keeps refuses that;
//! it is left as it is, and nothing hides it.

use crate::bucket::{BucketRetention, ObjectLockState, Versioning, date, mode_name, mode_of};
use crate::client::Request;
use crate::failure::Failure;
use crate::store::Core;
use crate::xml;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use http::Method;
use jiff::Timestamp;
use vmtide_repo::{RepoError, Result, Retention, RetentionMode};

/// Whether the bucket keeps versions; asked for once.
pub(crate) fn versioning(core: &Core) -> Result<Versioning> {
    if let Some(known) = core.state.lock().versioning {
        return Ok(known);
    }
    let what = "ask whether the bucket keeps versions";
    let found = match core.try_send(&Request::new(Method::GET, "").query("versioning", ""))? {
        Ok(answer) => {
            let document: xml::VersioningDocument = xml::parse(what, &answer.body)?;
            match document.status.as_deref() {
                Some("Enabled") => Versioning::On,
                Some("Suspended") => Versioning::Suspended,
                _ => Versioning::Off,
            }
        }
        Err(failure) if cannot_ask(&failure) => Versioning::Unknown,
        Err(failure) => return Err(core.error(failure, what)),
    };
    core.state.lock().versioning = Some(found);
    Ok(found)
}

/// Whether the bucket has object lock; asked for once.
pub(crate) fn object_lock(core: &Core) -> Result<ObjectLockState> {
    if let Some(known) = &core.state.lock().object_lock {
        return Ok(known.clone());
    }
    let what = "ask whether the bucket has object lock";
    let found = match core.try_send(&Request::new(Method::GET, "").query("object-lock", ""))? {
        Ok(answer) => {
            let document: xml::LockDocument = xml::parse(what, &answer.body)?;
            match document.object_lock_enabled.as_deref() {
                Some("Enabled") => ObjectLockState::On(default_retention(document)),
                _ => ObjectLockState::Off,
            }
        }
        Err(failure) if failure.is(404, "ObjectLockConfigurationNotFoundError") => {
            ObjectLockState::Off
        }
        Err(failure) if cannot_ask(&failure) => ObjectLockState::Unknown,
        Err(failure) => return Err(core.error(failure, what)),
    };
    core.state.lock().object_lock = Some(found.clone());
    Ok(found)
}

fn default_retention(document: xml::LockDocument) -> Option<BucketRetention> {
    let default = document.rule?.default_retention?;
    let days = default.days.or(default.years.map(|years| years.saturating_mul(365)))?;
    Some(BucketRetention { mode: default.mode?, days })
}

fn cannot_ask(failure: &Failure) -> bool {
    failure.is_denied() || failure.is_unknown() || failure.is(400, "NotImplemented")
}

/// Removes an object with all its versions.
pub(crate) fn remove(core: &Core, name: &str) -> Result<()> {
    let key = core.key(name);
    let what = format!("remove {name}");
    match versioning(core)? {
        Versioning::On | Versioning::Suspended => return remove_versions(core, name, &key),
        Versioning::Off => {}
        // A plain DELETE would hide it, also where its version is locked.
        Versioning::Unknown => match core.try_send(&Request::new(Method::HEAD, &key))? {
            Ok(answer) if answer.header("x-amz-version-id").is_some() => {
                return remove_versions(core, name, &key);
            }
            Ok(_) => {}
            Err(failure) if failure.is_missing() => {}
            Err(failure) => return Err(core.error(failure, &what)),
        },
    }
    match core.try_send(&Request::new(Method::DELETE, &key))? {
        // It keeps versions, though it would not say so.
        Ok(answer) if answer.header("x-amz-version-id").is_some() => {
            remove_versions(core, name, &key)
        }
        Ok(_) => Ok(()),
        Err(failure) if failure.is_missing() => Ok(()),
        Err(failure) => Err(refused(core, name, &key, None, failure, &what)),
    }
}

/// Removes each version, then the markers that hide them.
fn remove_versions(core: &Core, name: &str, key: &str) -> Result<()> {
    let what = format!("remove {name}");
    let (versions, markers) = versions_of(core, key, &what)?;
    for id in versions.iter().chain(&markers) {
        let request = Request::new(Method::DELETE, key).query("versionId", id.clone());
        match core.try_send(&request)? {
            Ok(_) => {}
            Err(failure) if failure.is_missing() => {}
            Err(failure) => return Err(refused(core, name, key, Some(id), failure, &what)),
        }
    }
    Ok(())
}

/// The ids of the versions of one key, and of its markers.
fn versions_of(core: &Core, key: &str, what: &str) -> Result<(Vec<String>, Vec<String>)> {
    let (mut versions, mut markers) = (Vec::new(), Vec::new());
    let mut from: Option<(String, String)> = None;
    loop {
        let mut request = Request::new(Method::GET, "").query("versions", "").query("prefix", key);
        if let Some((key, version)) = &from {
            request = request.query("key-marker", key).query("version-id-marker", version);
        }
        let answer = core.send(&request, what)?;
        let page: xml::VersionPage = xml::parse_page(what, "ListVersionsResult", &answer.body)?;
        // Keys come in order: the first other one ends it.
        let others = |version: &&xml::VersionInPage| version.key != key;
        let ended = page.versions.iter().chain(&page.delete_markers).any(|v| others(&v));
        let ours = |page: Vec<xml::VersionInPage>| {
            page.into_iter().filter(|version| version.key == key).map(|version| version.version_id)
        };
        versions.extend(ours(page.versions));
        markers.extend(ours(page.delete_markers));
        let next = page.next_key_marker.zip(page.next_version_id_marker);
        if ended || !page.is_truncated {
            return Ok((versions, markers));
        }
        // A version that is left would come back when the marker above it goes.
        if next.is_none() || next == from {
            return Err(xml::not_whole(what));
        }
        from = next;
    }
}

/// Why something could not be removed: it is kept until a time, or these keys may not remove.
fn refused(
    core: &Core,
    name: &str,
    key: &str,
    version: Option<&str>,
    failure: Failure,
    what: &str,
) -> RepoError {
    if (failure.is_denied() || failure.is(400, "InvalidRequest"))
        && let Ok(Some(retention)) = retention_of(core, key, version)
        && retention.until > Timestamp::now()
    {
        return RepoError::Locked { object: name.into(), until: retention.until };
    }
    core.error(failure, what)
}

/// How long an object, or one version of it, is kept; none where it is not.
pub(crate) fn retention_of(
    core: &Core,
    key: &str,
    version: Option<&str>,
) -> Result<Option<Retention>> {
    let mut request = Request::new(Method::HEAD, key);
    if let Some(version) = version {
        request = request.query("versionId", version);
    }
    let what = format!("ask until when {key} is kept");
    let answer = core.send(&request, &what)?;
    let mode = answer.header("x-amz-object-lock-mode").and_then(mode_of);
    let until = answer.header("x-amz-object-lock-retain-until-date").and_then(xml::time);
    Ok(mode.zip(until).map(|(mode, until)| Retention { mode, until }))
}

/// Keeps an object until a time. S3 refuses to shorten a time and to weaken a mode: what is kept
/// longer or more firmly already goes on as it is, and of both the later time and the firmer mode
/// are asked for.
pub(crate) fn retain(core: &Core, name: &str, retention: &Retention) -> Result<()> {
    let key = core.key(name);
    let what = format!("keep {name} until {}", retention.until);
    let failure = match core.try_send(&retention_request(&key, retention))? {
        Ok(_) => return Ok(()),
        Err(failure) => failure,
    };
    if !failure.is_denied() {
        return Err(core.error(failure, &what));
    }
    let Ok(Some(now)) = retention_of(core, &key, None) else {
        return Err(core.error(failure, &what));
    };
    let is_firm = now.mode == RetentionMode::Compliance;
    let both = Retention {
        mode: if is_firm { now.mode } else { retention.mode },
        until: now.until.max(retention.until),
    };
    if both == now {
        return Ok(());
    }
    if both == *retention {
        return Err(core.error(failure, &what));
    }
    core.send(&retention_request(&key, &both), &what).map(drop)
}

fn retention_request(key: &str, retention: &Retention) -> Request {
    let document = xml::retention(mode_name(retention.mode), &date(retention.until));
    let content = Core::document(&document);
    let md5 = content.md5.map(|md5| BASE64_STANDARD.encode(md5)).unwrap_or_default();
    Request::new(Method::PUT, key)
        .query("retention", "")
        .header("content-md5", &md5)
        .header("content-type", "application/xml")
        .content(content)
}
