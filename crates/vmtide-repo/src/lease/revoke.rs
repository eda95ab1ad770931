//! Taking a lease for dead without having to be right.
//!
//! Whoever decides that the holder of lease W is dead may be wrong: the holder stood still, and may
//! go on at any time with its next step, which may be the commit of its restore point. Two objects
//! settle what counts, in any order of events and without anybody waiting:
//!
//! 1. `revoked/W/intent-R`, R random, says that somebody is about to judge.
//! 2. Then the restore points of W that are there are listed, and `revoked/W/judgement-R` names them.
//!
//! A restore point of W counts if it is in *all* judgements of W; where there are none it counts.
//! A writer looks for intents after it has put its restore point, and reports it done only where
//! there is none or all have become judgements that name it. So for a point that was reported,
//! every other intent, and hence every other listing, came after it and found it: no judgement can
//! ever leave it out. Points left out are *void*: nobody shows or uses them, and prune removes them.

use crate::context::RepoContext;
use crate::envelope::ObjectKind;
use crate::{ObjectId, RepoError, Result, record};
use serde::{Deserialize, Serialize};
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};

/// Under which revocations lie.
const PREFIX: &str = "revoked/";

/// What an intent holds: nobody reads it.
const INTENT: &[u8] = b"intent\n";

/// The document of a judgement.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct JudgementRecord {
    /// The restore points of the lease that were there.
    points: Vec<ObjectId>,
}

/// What is known about one revoked lease.
#[derive(Clone, Debug, Default)]
struct Revocation {
    intents: BTreeSet<ObjectId>,
    judgements: BTreeSet<ObjectId>,
}

/// All revoked leases, as a listing shows them.
#[derive(Debug, Default)]
pub(crate) struct Revocations {
    leases: BTreeMap<ObjectId, Revocation>,
    /// The judgements read so far: the points that all of a lease's judgements name.
    named: BTreeMap<ObjectId, BTreeSet<ObjectId>>,
}

impl Revocations {
    /// Lists all. What this is held against must have been listed before.
    ///
    /// # Errors
    /// Those of the store.
    pub fn read(context: &RepoContext) -> Result<Self> {
        Self::read_under(context, PREFIX)
    }

    fn read_under(context: &RepoContext, prefix: &str) -> Result<Self> {
        let mut found = Self::default();
        context.store.list(prefix, &mut |entry| {
            let mut parts = entry.name.split('/').skip(1);
            let lease = parts.next().and_then(|id| id.parse::<ObjectId>().ok());
            let (Some(lease), Some(last)) = (lease, parts.next()) else { return Ok(()) };
            let revocation = found.leases.entry(lease).or_default();
            let id = |label: &str| last.strip_prefix(label)?.parse::<ObjectId>().ok();
            revocation.intents.extend(id("intent-"));
            revocation.judgements.extend(id("judgement-"));
            Ok(())
        })?;
        Ok(found)
    }

    /// Whether a judgement on the lease is there.
    pub fn is_judged(&self, lease: ObjectId) -> bool {
        self.leases.get(&lease).is_some_and(|revocation| !revocation.judgements.is_empty())
    }

    /// Whether a restore point that was made under a lease does not count.
    ///
    /// # Errors
    /// Those of the store; [`RepoError::Damaged`] for a judgement that
    /// cannot be read, because what it says is not known.
    pub fn is_void(
        &mut self,
        context: &RepoContext,
        lease: ObjectId,
        point: ObjectId,
    ) -> Result<bool> {
        #[cfg(feature = "simulation")]
        if crate::simulation::is_weak(crate::simulation::Weakness::JudgementIgnored) {
            return Ok(false);
        }
        let Some(revocation) = self.leases.get(&lease) else { return Ok(false) };
        if revocation.judgements.is_empty() {
            return Ok(false);
        }
        let named = match self.named.entry(lease) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(slot) => {
                slot.insert(named_by_all(context, lease, &revocation.judgements)?)
            }
        };
        Ok(!named.contains(&point))
    }

    /// Whether every intent to judge the lease has become a judgement.
    fn is_settled(&self, lease: ObjectId) -> bool {
        self.leases
            .get(&lease)
            .is_none_or(|revocation| revocation.intents.is_subset(&revocation.judgements))
    }
}

/// The restore points that all of these judgements of a lease name.
fn named_by_all(
    context: &RepoContext,
    lease: ObjectId,
    judgements: &BTreeSet<ObjectId>,
) -> Result<BTreeSet<ObjectId>> {
    let mut named: Option<BTreeSet<ObjectId>> = None;
    for judgement in judgements {
        let header = context.header_under(ObjectKind::Judgement, lease, *judgement);
        // Judgements are never removed: one that is listed and gone is damage.
        let record: JudgementRecord = record::try_read(context, header)?
            .ok_or_else(|| RepoError::damaged(header.object_name(), "missing"))?;
        let points: BTreeSet<ObjectId> = record.points.into_iter().collect();
        named = Some(match named {
            Some(named) => named.intersection(&points).copied().collect(),
            None => points,
        });
    }
    Ok(named.unwrap_or_default())
}

/// Revokes a lease. `points_of` answers with the restore points of the lease that are there, and is
/// asked after the intent can be seen.
///
/// # Errors
/// Those of the store and of `points_of`. The lease is not judged then.
pub(crate) fn revoke(
    context: &RepoContext,
    lease: ObjectId,
    points_of: impl FnOnce() -> Result<Vec<ObjectId>>,
) -> Result<()> {
    let id = ObjectId::random()?;
    context.store.put(&format!("{PREFIX}{lease}/intent-{id}"), INTENT)?;
    judge(context, lease, id, points_of()?)
}

fn judge(
    context: &RepoContext,
    lease: ObjectId,
    id: ObjectId,
    points: Vec<ObjectId>,
) -> Result<()> {
    let header = context.header_under(ObjectKind::Judgement, lease, id);
    record::write_as(context, header, &JudgementRecord { points })
}

/// Whether anybody took the holder of a lease for dead.
///
/// # Errors
/// Those of the store.
pub(super) fn is_revoked(context: &RepoContext, lease: ObjectId) -> Result<bool> {
    let found = Revocations::read_under(context, &format!("{PREFIX}{lease}/"))?;
    Ok(!found.leases.is_empty())
}

/// Whether a restore point that was just written under a lease counts, for ever. Where that cannot
/// be told yet, it is made void, so that it can.
///
/// # Errors
/// Those of the store: then nothing is known.
pub(crate) fn confirm(context: &RepoContext, lease: ObjectId, point: ObjectId) -> Result<bool> {
    let mut found = Revocations::read_under(context, &format!("{PREFIX}{lease}/"))?;
    if found.is_settled(lease) {
        return Ok(!found.is_void(context, lease, point)?);
    }
    // Somebody is about to judge, and may have looked before the point was there.
    void(context, lease)?;
    Ok(false)
}

/// Makes void whatever was made under a lease, also what only appears later.
///
/// # Errors
/// Those of the store: then nothing is known.
pub(crate) fn void(context: &RepoContext, lease: ObjectId) -> Result<()> {
    revoke(context, lease, || Ok(Vec::new()))
}
