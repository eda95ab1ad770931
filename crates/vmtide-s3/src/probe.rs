//! Which guarantees a server gives, tried out.
//!
//! A server's words are no proof: one that is widely used answers 200 to a PUT that must not replace
//! anything, and replaces it. So each guarantee is tried with a small object under `probe/`, which
//! is removed again where these keys may remove.

use crate::bucket::{ObjectLockState, Versioning};
use crate::client::Request;
use crate::spool::Content;
use crate::store::{Core, S3Store};
use crate::{versions, xml};
use http::Method;
use jiff::{SignedDuration, Timestamp};
use serde::Serialize;
use std::collections::BTreeSet;
use std::io::ErrorKind;
use vmtide_repo::{ObjectStore as _, RepoError, Result};

/// The length of the object that is written.
const PROBE_BYTES: usize = 1000;

/// How far the clocks of store and machine may be apart before the user is told. Signatures end at
/// 15 minutes.
const CLOCK_LIMIT: SignedDuration = SignedDuration::from_mins(5);

/// How much is tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProbeDepth {
    /// Only what needs no writing, of a repository that is there: a GET and a LIST.
    Reading,
    /// All of it: some ten requests.
    Full,
}

/// Whether a guarantee is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Guarantee {
    /// Yes, as tried.
    Yes,
    /// No, as tried.
    No,
    /// These keys may not do what would have to be tried.
    Denied,
    /// Not tried.
    Untried,
}

/// What a server was found to guarantee.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct StoreGuarantees {
    /// Whether these keys may write.
    pub write: Guarantee,
    /// Whether what was written is read back at once. Needed.
    pub read_after_write: Guarantee,
    /// Whether parts of objects can be read. Needed.
    pub ranged_read: Guarantee,
    /// Whether what was written is listed at once. Needed.
    pub list_after_write: Guarantee,
    /// Whether a listing that comes in several pages is whole. Needed.
    pub list_in_pages: Guarantee,
    /// Whether what was removed is listed no more. Needed.
    pub list_after_delete: Guarantee,
    /// Whether a write can be made to replace nothing (`If-None-Match: *`). Not needed: all names
    /// are unique.
    pub conditional_write: Guarantee,
    /// Whether these keys may remove. Only `forget` and `prune` need it.
    pub delete: Guarantee,
    /// Whether the bucket keeps versions.
    pub versioning: Versioning,
    /// Whether objects can be made immutable.
    pub object_lock: ObjectLockState,
    /// How far the store's clock is ahead of this machine's, in seconds.
    pub clock_ahead_seconds: Option<i64>,
}

impl StoreGuarantees {
    const fn untried() -> Self {
        Self {
            write: Guarantee::Untried,
            read_after_write: Guarantee::Untried,
            ranged_read: Guarantee::Untried,
            list_after_write: Guarantee::Untried,
            list_in_pages: Guarantee::Untried,
            list_after_delete: Guarantee::Untried,
            conditional_write: Guarantee::Untried,
            delete: Guarantee::Untried,
            versioning: Versioning::Unknown,
            object_lock: ObjectLockState::Unknown,
            clock_ahead_seconds: None,
        }
    }

    /// Why no repository can be kept there; none where one can.
    pub fn refusal(&self) -> Option<String> {
        let needed = [
            (self.read_after_write, "what was written is not read back as it was"),
            (self.ranged_read, "parts of objects cannot be read"),
            (
                self.list_after_write,
                "what was written is not listed at once, so that `prune` could remove what a new \
                 backup needs",
            ),
            (
                self.list_in_pages,
                "its long listings are cut, so that `prune` would remove what it does not see \
                 needed",
            ),
            (
                self.list_after_delete,
                "what was removed is still listed, so that a new backup could rely on it",
            ),
        ];
        needed
            .into_iter()
            .find(|(guarantee, _)| *guarantee == Guarantee::No)
            .map(|(_, what)| format!("this server cannot hold a repository: {what}"))
    }

    /// What a user should know, though it is no reason not to go on.
    pub fn remarks(&self) -> Vec<String> {
        let mut remarks = Vec::new();
        if self.conditional_write == Guarantee::No {
            remarks.push(
                "conditional writes are not honoured: nothing here needs them, all objects have \
                 names of their own"
                    .into(),
            );
        }
        if self.write == Guarantee::Denied {
            remarks.push("these keys may not write: backups need that".into());
        }
        if self.delete == Guarantee::Denied {
            remarks.push(
                "these keys may not remove: backups work, `forget` and `prune` need other keys"
                    .into(),
            );
        }
        if matches!(self.versioning, Versioning::On | Versioning::Suspended)
            && self.object_lock == ObjectLockState::Off
        {
            remarks.push(
                "the bucket keeps versions: `prune` removes all versions of an object, which needs \
                 s3:ListBucketVersions and s3:DeleteObjectVersion"
                    .into(),
            );
        }
        if let Some(seconds) = self.clock_ahead_seconds
            && seconds.unsigned_abs() > CLOCK_LIMIT.as_secs().unsigned_abs()
        {
            remarks.push(format!(
                "the clock of the store is {seconds} s ahead of this machine's: set it by NTP"
            ));
        }
        remarks
    }
}

impl S3Store {
    /// Tries which guarantees the server gives.
    ///
    /// # Errors
    /// Those that come before any guarantee: no such bucket, keys that are not accepted, no
    /// connection. A guarantee that is not given is no error here.
    pub fn probe(&self, depth: ProbeDepth) -> Result<StoreGuarantees> {
        let core = &self.core;
        let mut found = StoreGuarantees::untried();
        match depth {
            ProbeDepth::Reading => {
                try_reading(self, "vmtide.repo", None, &mut found)?;
                return Ok(found);
            }
            ProbeDepth::Full => {}
        }
        found.versioning = versions::versioning(core)?;
        found.object_lock = versions::object_lock(core)?;
        let mut random = [0; 16];
        getrandom::fill(&mut random).map_err(|error| {
            RepoError::io("get random bytes", std::io::Error::other(error.to_string()))
        })?;
        let id: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
        let name = format!("probe/{id}");
        let content = vec![b'v'; PROBE_BYTES];
        if !try_writing(core, &name, &content, &mut found)? {
            try_reading(self, "vmtide.repo", None, &mut found)?;
            return Ok(found);
        }
        let second = format!("{name}-2");
        let tried = try_reading(self, &name, Some(&content), &mut found)
            .and_then(|()| try_condition(core, &name, &mut found))
            .and_then(|()| try_pages(core, &name, &second, &mut found));
        // What was written goes, whatever came of it.
        try_removing(self, &name, &mut found)?;
        if let Err(error) = self.remove(&second) {
            tracing::debug!(%error, "an object of the probe stays");
        }
        tried.map(|()| found)
    }

    /// As [`probe`](Self::probe), with a server that cannot hold a repository as an error.
    ///
    /// # Errors
    /// Also [`RepoError::Invalid`] with the reason.
    pub fn require(&self, depth: ProbeDepth) -> Result<StoreGuarantees> {
        let found = self.probe(depth)?;
        match found.refusal() {
            Some(reason) => Err(RepoError::Invalid(format!("{}: {reason}", self.location()))),
            None => Ok(found),
        }
    }
}

/// Writes the object. Answers whether these keys may.
fn try_writing(
    core: &Core,
    name: &str,
    content: &[u8],
    found: &mut StoreGuarantees,
) -> Result<bool> {
    let request = Request::new(Method::PUT, &core.key(name)).content(Content::of(content, true));
    let request = core.object_headers(request, None, "probe");
    match core.try_send(&request)? {
        Ok(answer) => {
            found.write = Guarantee::Yes;
            found.clock_ahead_seconds = answer
                .header("date")
                .and_then(|date| jiff::fmt::rfc2822::parse(date).ok())
                .map(|date| date.timestamp().as_second() - Timestamp::now().as_second());
            Ok(true)
        }
        Err(failure) if failure.is(403, "AccessDenied") => {
            found.write = Guarantee::Denied;
            Ok(false)
        }
        Err(failure) => Err(core.error(failure, &format!("write {name}"))),
    }
}

/// Reads the object whole and in part, and lists it. `content` where it is known.
fn try_reading(
    store: &S3Store,
    name: &str,
    content: Option<&[u8]>,
    found: &mut StoreGuarantees,
) -> Result<()> {
    let core = &store.core;
    let yes = |condition: bool| if condition { Guarantee::Yes } else { Guarantee::No };
    let range = Request::new(Method::GET, &core.key(name)).header("range", "bytes=3-11");
    let ranged = match core.try_send(&range)? {
        Ok(answer) => Some(answer),
        Err(failure) if failure.is_missing() => None,
        Err(failure) if failure.is_denied() => return Err(core.error(failure, "read an object")),
        Err(failure) => return Err(core.error(failure, &format!("read {name}"))),
    };
    match (&ranged, content) {
        (Some(answer), _) => {
            found.ranged_read = yes(answer.status == 206 && answer.body.len() == 9);
        }
        // Before there is a repository there is nothing to read.
        (None, None) => return Ok(()),
        (None, Some(_)) => {}
    }
    let whole = core.try_send(&Request::new(Method::GET, &core.key(name)))?;
    let whole = whole.ok().map(|answer| answer.body);
    if let Some(content) = content {
        found.read_after_write = yes(whole.as_deref() == Some(content));
    }
    let length = whole.map(|bytes| bytes.len() as u64);
    found.list_after_write = yes(is_listed(core, name, length)?);
    Ok(())
}

/// Whether the object is listed, with its length and a time.
fn is_listed(core: &Core, name: &str, length_bytes: Option<u64>) -> Result<bool> {
    let key = core.key(name);
    let mut listed = false;
    core.list_keys(&key, &mut |object| {
        listed |= object.key == key
            && length_bytes.is_none_or(|length| length == object.size)
            && xml::time(&object.last_modified).is_some();
        Ok(())
    })?;
    Ok(listed)
}

/// Writes a second one, and lists both a page each.
fn try_pages(core: &Core, name: &str, second: &str, found: &mut StoreGuarantees) -> Result<()> {
    // A server that does not list at once is refused for that.
    if found.list_after_write != Guarantee::Yes {
        return Ok(());
    }
    let request =
        Request::new(Method::PUT, &core.key(second)).content(Content::of(b"second", true));
    core.send(&core.object_headers(request, None, "probe"), &format!("write {second}"))?;
    let mut keys = BTreeSet::new();
    let listed = core.list_in_pages(&core.key(name), Some(1), &mut |object| {
        keys.insert(object.key);
        Ok(())
    });
    found.list_in_pages = match listed {
        Ok(()) if keys == BTreeSet::from([core.key(name), core.key(second)]) => Guarantee::Yes,
        Ok(()) => Guarantee::No,
        Err(RepoError::Io { source, .. }) if source.kind() == ErrorKind::InvalidData => {
            Guarantee::No
        }
        Err(error) => return Err(error),
    };
    Ok(())
}

/// Writes it once more, which must fail.
fn try_condition(core: &Core, name: &str, found: &mut StoreGuarantees) -> Result<()> {
    let request = Request::new(Method::PUT, &core.key(name))
        .content(Content::of(b"replaced", true))
        .header("if-none-match", "*");
    let request = core.object_headers(request, None, "again");
    found.conditional_write = match core.try_send(&request)? {
        Err(failure) if failure.is(412, "PreconditionFailed") => Guarantee::Yes,
        Err(failure) if failure.is_denied() => Guarantee::Denied,
        Ok(_) | Err(_) => Guarantee::No,
    };
    if found.conditional_write == Guarantee::No {
        core.conditional.store(false, std::sync::atomic::Ordering::Relaxed);
    }
    Ok(())
}

/// Removes it, and sees that it is gone.
fn try_removing(store: &S3Store, name: &str, found: &mut StoreGuarantees) -> Result<()> {
    let core = &store.core;
    match store.remove(name) {
        Ok(()) => found.delete = Guarantee::Yes,
        // The default of the bucket keeps it for a while: it says nothing of these keys.
        Err(RepoError::Locked { .. }) => return Ok(()),
        Err(RepoError::Denied { .. }) => {
            found.delete = Guarantee::Denied;
            return Ok(());
        }
        Err(error) => return Err(error),
    }
    let gone = !is_listed(core, name, None)?
        && matches!(
            core.try_send(&Request::new(Method::HEAD, &core.key(name)))?,
            Err(failure) if failure.is_missing()
        );
    found.list_after_delete = if gone { Guarantee::Yes } else { Guarantee::No };
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_needed_is_a_reason_to_refuse() {
        let mut found = StoreGuarantees::untried();
        found.conditional_write = Guarantee::No;
        found.delete = Guarantee::Denied;
        found.clock_ahead_seconds = Some(-4000);
        assert_eq!(found.refusal(), None);
        assert_eq!(found.remarks().len(), 3, "{:?}", found.remarks());
        for spoil in [
            |found: &mut StoreGuarantees| found.read_after_write = Guarantee::No,
            |found: &mut StoreGuarantees| found.ranged_read = Guarantee::No,
            |found: &mut StoreGuarantees| found.list_after_write = Guarantee::No,
            |found: &mut StoreGuarantees| found.list_in_pages = Guarantee::No,
            |found: &mut StoreGuarantees| found.list_after_delete = Guarantee::No,
        ] {
            let mut found = found.clone();
            spoil(&mut found);
            assert!(found.refusal().is_some(), "{found:?}");
        }
    }
}
