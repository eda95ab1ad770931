//! Requests that leave something behind when their answer is lost, and so cannot simply be sent again.
//!
//! A connection that breaks says nothing of what the agent did: it may hold the disk for a write that it has not
//! noticed the end of, have made the disk, or keep a freeze whose name nobody heard. Each of these is recognized here
//! when the request is sent again.

use crate::contract::json;
use crate::frames::MEDIA_TYPE;
use crate::transport::{Request, Transport};
use crate::tries::{Failure, Verdict, random_fraction};
use crate::url::segment;
use crate::v1::{self, DiskDetails, Freeze, Place};
use crate::{AgentError, Result};
use bytes::Bytes;
use http::Method;
use serde::{Deserialize, Serialize};
use std::time::{Duration, Instant};
use vmtide_block::{ByteRange, CancelToken};

/// How long a disk may be in use by an earlier try of the same write: the agent waits 30 s for the rest of a body, and
/// then the write and the flush that are on their way must end. Shorter, a broken connection ends a restore.
const OWN_USE: Duration = Duration::from_secs(90);

/// How long a disk may be in use where no try was lost: a reader of ours that is done is let go a moment after its
/// last byte came. Longer, it is told late that a VM has the disk.
const READERS_END: Duration = Duration::from_secs(5);

/// How long a disk that a lost try may be making can look like another one.
const CREATION: Duration = Duration::from_secs(10);

/// How long a freeze outlives its client. Shorter, a network that is away for some minutes ends a backup; longer, a
/// dead client's freeze holds storage back.
pub(crate) const TIME_TO_LIVE: Duration = Duration::from_secs(600);

/// The words of the agent that are looked at.
const IN_USE: &str = "in_use";
const EXISTS: &str = "exists";

/// A failure that passes, but only for some time.
#[derive(Default)]
struct Grace {
    since: Option<Instant>,
}

impl Grace {
    fn pass(&mut self, failure: Failure, patience: Duration) -> Failure {
        if self.since.get_or_insert_with(Instant::now).elapsed() < patience {
            Failure { verdict: Verdict::Passing, ..failure }
        } else {
            failure
        }
    }
}

/// What the failures of one write mean for the next try.
#[derive(Default)]
struct WriteTries {
    /// A try was lost that the agent may still be at.
    lost: bool,
    grace: Grace,
}

impl WriteTries {
    fn judge(&mut self, failure: Failure) -> Failure {
        if failure.error.code() == IN_USE {
            let patience = if self.lost { OWN_USE } else { READERS_END };
            return self.grace.pass(failure, patience);
        }
        self.lost |= matches!(
            failure.error,
            AgentError::Unreachable { .. } | AgentError::Refused { status: 408 | 502 | 504, .. }
        );
        failure
    }
}

#[derive(Deserialize)]
struct WrittenDocument {
    position: u64,
}

/// Writes a stream of frames. When this returns, all of it is on the disk's stable storage.
pub(crate) fn write(
    transport: &Transport,
    path: &str,
    frames: Bytes,
    position: u64,
    cancel: &CancelToken,
) -> Result<()> {
    let target = format!("/v1/disks/content?path={}", segment(path));
    let request = Request::new(Method::PUT, target).body(MEDIA_TYPE, frames);
    let mut tries = WriteTries::default();
    let body = transport.persist(cancel, |_| {
        transport.attempt(&request, cancel).map_err(|failure| tries.judge(failure))
    })?;
    let written: WrittenDocument = json(&transport.agent, &body)?;
    if written.position != position {
        let detail = format!("{} bytes were written where {position} were sent", written.position);
        return Err(AgentError::protocol(&transport.agent, detail));
    }
    Ok(())
}

/// A disk to be made.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct CreateDocument {
    pub format: String,
    pub virtual_size_bytes: u64,
    pub fixed: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub logical_sector_bytes: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub physical_sector_bytes: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub block_size_bytes: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk_id: Option<String>,
}

/// Makes a disk. One that is there when the request is sent again counts as made by the try that was lost, if it is
/// what was asked for and holds nothing.
pub(crate) fn create(
    transport: &Transport,
    path: &str,
    document: &CreateDocument,
    cancel: &CancelToken,
) -> Result<()> {
    let request = Request::new(Method::POST, format!("/v1/disks?path={}", segment(path)))
        .body("application/json", v1::to_json(&transport.agent, document)?);
    let mut grace = Grace::default();
    transport.persist(cancel, |earlier| {
        let Err(failure) = transport.attempt(&request, cancel) else { return Ok(()) };
        if earlier == 0 || failure.error.code() != EXISTS {
            return Err(failure);
        }
        match is_new(transport, path, &document.format, document.virtual_size_bytes, cancel) {
            Ok(true) => Ok(()),
            // It may not be finished yet.
            Ok(false) => Err(grace.pass(failure, CREATION)),
            Err(unclear) => Err(match unclear.verdict {
                Verdict::Final if !matches!(unclear.error, AgentError::Cancelled) => {
                    grace.pass(unclear, CREATION)
                }
                _ => unclear,
            }),
        }
    })
}

/// Whether a disk is an empty one of this format and size.
fn is_new(
    transport: &Transport,
    path: &str,
    format: &str,
    size_bytes: u64,
    cancel: &CancelToken,
) -> Result<bool, Failure> {
    let body = transport.attempt(&v1::details_request(path), cancel)?;
    let details: DiskDetails = json(&transport.agent, &body).map_err(Failure::last)?;
    let is_like_it = details.format.eq_ignore_ascii_case(format)
        && details.virtual_size_bytes == size_bytes
        && details.parent_path.is_none();
    if !is_like_it || size_bytes == 0 {
        return Ok(is_like_it);
    }
    let live = Place::Live(path.to_owned());
    let zeros = v1::zeros_ahead(transport, &live, ByteRange::new(0, size_bytes));
    match transport.block_on(cancel, zeros) {
        Some(zeros) => Ok(zeros? == size_bytes),
        None => Err(Failure::last(AgentError::Cancelled)),
    }
}

#[derive(Serialize)]
struct FreezeDocument<'a> {
    disks: &'a [String],
    ttl_seconds: u64,
}

#[derive(Deserialize)]
struct FreezeList {
    freezes: Vec<Freeze>,
}

/// A freeze as it is asked for. The interface has no place for a name that the client gives, so the time to live is the
/// mark by which a freeze whose answer was lost is told from those of other jobs with the same key and disks.
#[derive(Clone, Debug)]
pub(crate) struct WantedFreeze {
    paths: Vec<String>,
    ttl: Duration,
}

/// A freeze that was made.
pub(crate) struct MadeFreeze {
    pub freeze: Freeze,
    /// A try was lost, which may have made another one or may yet make it.
    pub resent: bool,
}

impl WantedFreeze {
    /// Between one and two times [`TIME_TO_LIVE`]; renewing brings it back to that.
    pub fn new(paths: &[String]) -> Self {
        let ttl = TIME_TO_LIVE + TIME_TO_LIVE.mul_f64(random_fraction());
        Self { paths: paths.to_vec(), ttl: Duration::from_secs(ttl.as_secs()) }
    }

    fn is(&self, freeze: &Freeze) -> bool {
        freeze.ttl_seconds == self.ttl.as_secs()
            && freeze.disks.iter().map(|disk| &disk.path).eq(&self.paths)
    }

    /// Makes it, or takes the one that a lost try made.
    ///
    /// # Errors
    /// With what it failed for good. A freeze that was made nonetheless expires.
    pub fn make(&self, transport: &Transport, cancel: &CancelToken) -> Result<MadeFreeze> {
        let document = FreezeDocument { disks: &self.paths, ttl_seconds: self.ttl.as_secs() };
        let request = Request::new(Method::POST, "/v1/freezes")
            .body("application/json", v1::to_json(&transport.agent, &document)?);
        let made = transport.persist(cancel, |earlier| {
            if earlier > 0
                && let Some(freeze) = self.found(transport, cancel)?.pop()
            {
                return Ok(MadeFreeze { freeze, resent: true });
            }
            let body = transport.attempt(&request, cancel)?;
            let freeze = json(&transport.agent, &body).map_err(Failure::last)?;
            Ok(MadeFreeze { freeze, resent: earlier > 0 })
        })?;
        if made.resent {
            self.end_others(transport, &made.freeze.id, cancel);
        }
        let (frozen, asked) = (made.freeze.disks.len(), self.paths.len());
        if frozen != asked {
            let detail = format!("{frozen} disks were frozen where {asked} were asked for");
            return Err(AgentError::protocol(&transport.agent, detail));
        }
        for disk in &made.freeze.disks {
            v1::check_size(transport, disk.size_bytes)?;
        }
        Ok(made)
    }

    /// The freezes of this key that are as this one was asked for; none where the agent does not list them.
    fn found(&self, transport: &Transport, cancel: &CancelToken) -> Result<Vec<Freeze>, Failure> {
        match transport.attempt(&Request::get("/v1/freezes"), cancel) {
            Ok(body) => {
                let mut list: FreezeList = json(&transport.agent, &body).map_err(Failure::last)?;
                list.freezes.retain(|freeze| self.is(freeze));
                Ok(list.freezes)
            }
            Err(failure)
                if matches!(
                    failure.error,
                    AgentError::Refused { status: 405, .. } | AgentError::NotFound { .. }
                ) =>
            {
                Ok(Vec::new())
            }
            Err(failure) => Err(failure),
        }
    }

    /// Ends what other tries made. Tried once: they expire otherwise.
    pub fn end_others(&self, transport: &Transport, kept: &str, cancel: &CancelToken) {
        let others = match self.found(transport, cancel) {
            Ok(found) => found,
            Err(failure) => {
                tracing::debug!(error = %failure.error, "freezes of lost tries are left to their expiry");
                return;
            }
        };
        for freeze in others.iter().filter(|freeze| freeze.id != kept) {
            if let Err(error) = v1::end_freeze(transport, &freeze.id) {
                tracing::debug!(%error, "a freeze of a lost try is left to its expiry");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::v1::FreezeDisk;

    fn refused(status: u16, code: &str) -> Failure {
        Failure::last(AgentError::Refused {
            agent: "a".into(),
            status,
            code: code.into(),
            detail: String::new(),
        })
    }

    fn lost() -> Failure {
        let error = AgentError::Unreachable { agent: "a".into(), detail: "gone".into() };
        Failure { error, verdict: Verdict::Passing, wait: None, answered: true }
    }

    /// How long ago the disk was first found in use.
    fn after(ago: Duration, lost_one: bool) -> Verdict {
        let mut tries = WriteTries::default();
        if lost_one {
            assert_eq!(tries.judge(lost()).verdict, Verdict::Passing);
        }
        let begun = Instant::now().checked_sub(ago).unwrap();
        tries.grace.since = Some(begun);
        tries.judge(refused(409, IN_USE)).verdict
    }

    #[test]
    fn a_disk_in_use_passes_for_longer_where_it_may_be_ours() {
        let second = Duration::from_secs(1);
        assert_eq!(after(Duration::ZERO, false), Verdict::Passing);
        assert_eq!(after(READERS_END + second, false), Verdict::Final);
        assert_eq!(after(READERS_END + second, true), Verdict::Passing);
        assert_eq!(after(OWN_USE + second, true), Verdict::Final);
        let mut tries = WriteTries::default();
        assert_eq!(tries.judge(refused(409, "cancelled")).verdict, Verdict::Final);
        assert!(!tries.lost);
    }

    #[test]
    fn freezes_of_others_are_not_taken_for_ours() {
        let paths = ["/a".to_owned(), "/b".to_owned()];
        let wanted = WantedFreeze::new(&paths);
        let ttl_seconds = wanted.ttl.as_secs();
        assert!((600..=1200).contains(&ttl_seconds));
        let freeze = |ttl_seconds, paths: &[&str]| Freeze {
            id: "1".into(),
            ttl_seconds,
            disks: paths
                .iter()
                .map(|path| FreezeDisk { path: (*path).into(), size_bytes: 1, tracking_id: None })
                .collect(),
        };
        assert!(wanted.is(&freeze(ttl_seconds, &["/a", "/b"])));
        for other in [
            freeze(ttl_seconds + 1, &["/a", "/b"]),
            freeze(ttl_seconds, &["/b", "/a"]),
            freeze(ttl_seconds, &["/a"]),
            freeze(ttl_seconds, &["/a", "/b", "/c"]),
        ] {
            assert!(!wanted.is(&other), "{other:?}");
        }
    }
}
