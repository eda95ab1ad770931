//! Leases: how everybody who works with a repository is known to those who remove from it.
//!
//! Whoever writes or reads data puts `leases/W/begin` under a random id W before anything else, and
//! renews it while at work. Nothing is locked by that: writers do not wait for each other nor for
//! anybody. `prune` removes what it condemned only when all leases that were there before have
//! ended (format §11). A lease ends by `leases/W/end`; by nobody hearing of it for
//! [`EXPIRES_AFTER`], counted in the store's own time; or by its process being gone, where that can
//! be known. In the last two cases it is *revoked* first, because a process that only stood still
//! may go on at any time: see [`revoke`].

mod process;
mod revoke;
mod roster;

pub(crate) use revoke::{Revocations, confirm, revoke, void};
pub(crate) use roster::{LeaseState, Roster, read_end, read_record};

use crate::context::RepoContext;
use crate::envelope::ObjectKind;
use crate::{ObjectId, RepoError, Result, record};
use jiff::{SignedDuration, Timestamp};
use parking_lot::{Condvar, Mutex};
use process::Process;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// How often a lease is renewed. Each time costs one small object.
const RENEW_EVERY: Duration = Duration::from_secs(5 * 60);

/// After a renewal that failed it is tried again this soon.
const RETRY_AFTER: Duration = Duration::from_secs(30);

/// A lease that was not renewed for so long, in the store's time, is taken for dead. Twelve renewals
/// fit in: shorter would cut off hosts that hang for a while (nothing is lost by that, but their
/// backup has to be run again); longer lets dead ones keep garbage longer.
pub(crate) const EXPIRES_AFTER: SignedDuration = SignedDuration::from_secs(60 * 60);

/// What a renewal holds: nobody reads it, its time is what counts. Not empty, because some stores
/// treat empty objects as directories.
const RENEWAL: &[u8] = b"renewed\n";

/// What somebody does with the repository.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Purpose {
    /// A backup, or anything else that writes restore points.
    Backup,
    /// Reading restore points: restoring, verifying, serving, comparing.
    Read,
    /// Removing what is not needed.
    Prune,
}

impl std::fmt::Display for Purpose {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Backup => "a backup",
            Self::Read => "a restore, verification or other reader",
            Self::Prune => "a prune",
        })
    }
}

/// The document of `leases/W/begin`. For people and for the fast path; what counts is that it is
/// there.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct LeaseRecord {
    /// What for.
    pub purpose: Purpose,
    /// The host's name.
    pub host: String,
    /// The process, where the system names it well enough.
    pub process: Option<Process>,
    /// When it began, by the holder's clock.
    pub began: Timestamp,
    /// The program and version.
    pub program: String,
}

impl LeaseRecord {
    /// Whether the holder is known to have ended.
    pub fn is_gone(&self) -> bool {
        self.process.as_ref().is_some_and(Process::is_gone)
    }
}

/// The document of `leases/W/end`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct LeaseEnd {
    /// The restore points that were made under the lease.
    pub points: Vec<ObjectId>,
}

/// A lease. Ends when it is dropped; if the process dies before, others find out.
#[derive(Debug)]
pub struct Lease {
    held: Option<Arc<Held>>,
}

#[derive(Debug)]
struct Held {
    context: Arc<RepoContext>,
    id: ObjectId,
    renewals: Mutex<Renewals>,
    wake: Condvar,
    points: Mutex<Vec<ObjectId>>,
    /// Something that was sent to the store may arrive later: nobody may be told that all is over.
    uncertain: AtomicBool,
}

#[derive(Debug, Default)]
struct Renewals {
    next: u32,
    last: Option<String>,
    /// Old renewals cannot be removed with these rights.
    keeps_all: bool,
    ended: bool,
}

impl Lease {
    /// Begins a lease that is needed.
    ///
    /// # Errors
    /// Those of the store.
    pub(crate) fn begin(context: &Arc<RepoContext>, purpose: Purpose) -> Result<Self> {
        let id = ObjectId::random()?;
        let record = LeaseRecord {
            purpose,
            host: vmtide_block::files::host_name(),
            process: Process::current(),
            began: Timestamp::now(),
            program: concat!("vmtide ", env!("CARGO_PKG_VERSION")).into(),
        };
        record::write(context, ObjectKind::Lease, id, &record)?;
        let held = Arc::new(Held {
            context: Arc::clone(context),
            id,
            renewals: Mutex::default(),
            wake: Condvar::new(),
            points: Mutex::default(),
            uncertain: AtomicBool::new(false),
        });
        if renews() {
            let renewed = Arc::clone(&held);
            let renewer = std::thread::Builder::new().name("lease".into());
            if let Err(error) = renewer.spawn(move || renewed.keep_alive()) {
                return Err(RepoError::io("start a thread that renews the lease", error));
            }
        }
        Ok(Self { held: Some(held) })
    }

    /// Begins a lease of a reader: where nothing can be written, it goes on without, because
    /// whoever is prevented from writing must not be prevented from restoring.
    ///
    /// # Errors
    /// Those of the store, but for a lack of rights.
    pub(crate) fn begin_reading(context: &Arc<RepoContext>, purpose: Purpose) -> Result<Self> {
        match Self::begin(context, purpose) {
            Err(RepoError::Denied { source, .. }) => Ok(Self::without(&source)),
            Err(RepoError::Io { source, .. })
                if source.kind() == std::io::ErrorKind::ReadOnlyFilesystem =>
            {
                Ok(Self::without(&source))
            }
            other => other,
        }
    }

    fn without(reason: &std::io::Error) -> Self {
        tracing::info!(%reason, "reading without a lease: a prune elsewhere does not wait for this");
        Self { held: None }
    }

    /// Its id; none for a reader who could not write one.
    pub fn id(&self) -> Option<ObjectId> {
        self.held.as_ref().map(|held| held.id)
    }

    /// Notes a restore point that was made under the lease.
    pub(crate) fn add_point(&self, point: ObjectId) {
        if let Some(held) = &self.held {
            held.points.lock().push(point);
        }
    }

    /// While something may still arrive at the store, the lease is not ended by us.
    pub(crate) fn set_uncertain(&self, uncertain: bool) {
        if let Some(held) = &self.held {
            held.uncertain.store(uncertain, Ordering::Relaxed);
        }
    }

    /// Renews it now.
    ///
    /// # Errors
    /// Those of the store.
    pub(crate) fn renew(&self) -> Result<()> {
        self.held.as_ref().map_or(Ok(()), |held| held.renew())
    }

    /// Whether somebody took us for dead.
    ///
    /// # Errors
    /// Those of the store.
    pub(crate) fn is_revoked(&self) -> Result<bool> {
        self.held.as_ref().map_or(Ok(false), |held| revoke::is_revoked(&held.context, held.id))
    }

    /// Says, in place of an error of missing data, that the lease was revoked, where it was.
    pub(crate) fn explain(&self, error: RepoError) -> RepoError {
        let is_missing = matches!(error, RepoError::Damaged { .. } | RepoError::NotFound { .. });
        if is_missing && matches!(self.is_revoked(), Ok(true)) {
            return stood_still();
        }
        error
    }
}

/// The error of a job whose lease was revoked.
pub(crate) fn stood_still() -> RepoError {
    RepoError::Busy {
        detail: format!(
            "this job stood still for so long (more than {} minutes) that it was taken for dead and \
             a prune went on without it; nothing that it did counts: run it again",
            EXPIRES_AFTER.as_secs() / 60
        ),
    }
}

impl Held {
    fn renew(&self) -> Result<()> {
        let mut renewals = self.renewals.lock();
        if renewals.ended {
            // A renewal after the end would look like a lease of nobody.
            return Ok(());
        }
        let name = format!("leases/{}/renewed-{:08x}", self.id, renewals.next);
        renewals.next = renewals.next.wrapping_add(1);
        self.context.store.put(&name, RENEWAL)?;
        let old = renewals.last.replace(name).filter(|_| !renewals.keeps_all);
        if let Some(old) = old {
            // Without the right to remove they stay until prune removes them.
            renewals.keeps_all = self.context.store.remove(&old).is_err();
        }
        Ok(())
    }

    /// Renews until the lease ends.
    fn keep_alive(&self) {
        let mut wait = RENEW_EVERY;
        loop {
            let mut renewals = self.renewals.lock();
            if !renewals.ended {
                self.wake.wait_for(&mut renewals, wait);
            }
            if renewals.ended {
                return;
            }
            drop(renewals);
            wait = match self.renew() {
                Ok(()) => RENEW_EVERY,
                Err(error) => {
                    tracing::warn!(%error, "the lease on the repository was not renewed");
                    RETRY_AFTER
                }
            };
        }
    }

    fn remove(&self) -> Result<()> {
        let renewals = self.renewals.lock();
        if renewals.keeps_all {
            return Err(RepoError::Invalid("it cannot be removed".into()));
        }
        renewals.last.iter().try_for_each(|name| self.context.store.remove(name))?;
        self.context.store.remove(&ObjectKind::Lease.object_name(self.id))
    }

    fn end(&self) {
        self.renewals.lock().ended = true;
        self.wake.notify_all();
        if self.uncertain.load(Ordering::Relaxed) {
            return;
        }
        let end = LeaseEnd { points: std::mem::take(&mut *self.points.lock()) };
        // Whoever made no restore point need not leave a trace, where he may remove his own.
        if end.points.is_empty() && self.remove().is_ok() {
            return;
        }
        if let Err(error) = record::write(&self.context, ObjectKind::LeaseEnd, self.id, &end) {
            tracing::debug!(%error, "the end of the lease was not written; it expires");
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Some(held) = self.held.take() {
            held.end();
        }
    }
}

/// Whether leases are renewed by a thread; a simulation has a time of its own.
fn renews() -> bool {
    #[cfg(feature = "simulation")]
    if crate::simulation::process().is_some() {
        return false;
    }
    true
}
