//! A platform on another host: what is said of its VMs between an agent there and its clients.
//!
//! The types are the JSON of the agent's `/v1/vms…`, as `docs/agent-protocol.md` describes it; one definition for
//! both ends. A freeze takes minutes where applications are brought to rest, longer than one request should, and so
//! does the end of one: both are begun by one request, and [`FreezeView::state`] is then asked for until it is a
//! final one.

use crate::journal::is_sixteen_digits;
use crate::{
    Base, Changes, Consistency, DiskId, ErrorReport, FreezeRequest, FrozenVm, FullReason, JobId,
    Seal, TrackingId, VmConfig,
};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use vmtide_block::CancelToken;

/// The most disks of one VM that are spoken of: Hyper-V has places for 4 × 64 on SCSI and 4 on IDE.
const MAX_DISKS: usize = 512;
/// The most characters of a name, an id or a tracking id.
const MAX_TEXT: usize = 1024;
/// The shortest and the longest mark of a client, in characters.
const TOKEN_CHARS: std::ops::RangeInclusive<usize> = 8..=64;

/// The body that asks for a freeze of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FreezeDocument {
    /// The client's own mark, random: the same request sent again after its answer was lost finds the freeze that
    /// the first one made. 8 to 64 letters and digits.
    pub client_token: String,
    /// The VM, by name or id.
    pub vm: String,
    /// The job: 16 hexadecimal digits.
    pub job: String,
    /// The lineage that tracking belongs to: 16 hexadecimal digits.
    pub lineage: String,
    /// The consistency wanted.
    pub consistency: Consistency,
    /// Whether less is acceptable.
    #[serde(default)]
    pub allow_downgrade: bool,
    /// The moments of disks to compare with.
    #[serde(default)]
    pub bases: Vec<BaseDocument>,
    /// Disks to leave out.
    #[serde(default)]
    pub exclude: Vec<DiskId>,
    /// How long the freeze outlives its last use, in seconds.
    #[serde(default)]
    pub ttl_seconds: Option<u64>,
}

/// An earlier moment of one disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BaseDocument {
    /// The disk.
    pub disk: DiskId,
    /// Its tracking id then.
    pub tracking_id: Option<TrackingId>,
    /// Its size then, in bytes.
    pub size_bytes: u64,
}

impl FreezeDocument {
    /// What asks for `request`.
    pub fn new(request: &FreezeRequest, client_token: String, ttl_seconds: u64) -> Self {
        let base = |(disk, base): (&DiskId, &Base)| BaseDocument {
            disk: disk.clone(),
            tracking_id: base.tracking.clone(),
            size_bytes: base.size_bytes,
        };
        Self {
            client_token,
            vm: request.vm.clone(),
            job: request.job.as_str().to_owned(),
            lineage: request.lineage.clone(),
            consistency: request.consistency,
            allow_downgrade: request.allow_downgrade,
            bases: request.bases.iter().map(base).collect(),
            exclude: request.exclude.clone(),
            ttl_seconds: Some(ttl_seconds),
        }
    }

    /// The request that this asks for. Every text of it is checked: ids become parts of names of files.
    ///
    /// # Errors
    /// What is wrong, in words that begin with the name of the member.
    pub fn request(&self, cancel: CancelToken) -> Result<FreezeRequest, String> {
        let token = self.client_token.as_bytes();
        if !TOKEN_CHARS.contains(&token.len()) || !token.iter().all(u8::is_ascii_alphanumeric) {
            return Err("client_token: give 8 to 64 letters and digits".into());
        }
        let job = JobId::parse(&self.job).ok_or("job: give 16 lower-case hexadecimal digits")?;
        if !is_sixteen_digits(&self.lineage) {
            return Err("lineage: give 16 lower-case hexadecimal digits".into());
        }
        if self.vm.is_empty() || is_long(&self.vm) || self.vm.contains('\0') {
            return Err("vm: give a name or an id".into());
        }
        if self.bases.len() > MAX_DISKS || self.exclude.len() > MAX_DISKS {
            return Err(format!("bases, exclude: at most {MAX_DISKS} disks"));
        }
        if self.exclude.iter().any(|disk| is_long(&disk.0)) {
            return Err("exclude: a name of a disk is too long".into());
        }
        let mut bases = BTreeMap::new();
        for base in &self.bases {
            let id = base.tracking_id.as_ref().map_or("", |id| &id.0);
            if is_long(&base.disk.0) || is_long(id) {
                return Err("bases: a name or a tracking id is too long".into());
            }
            let entry = Base { tracking: base.tracking_id.clone(), size_bytes: base.size_bytes };
            if bases.insert(base.disk.clone(), entry).is_some() {
                return Err(format!("bases: {} is there twice", base.disk));
            }
        }
        Ok(FreezeRequest {
            vm: self.vm.clone(),
            job,
            lineage: self.lineage.clone(),
            consistency: self.consistency,
            allow_downgrade: self.allow_downgrade,
            bases,
            exclude: self.exclude.clone(),
            cancel,
        })
    }
}

fn is_long(text: &str) -> bool {
    text.len() > MAX_TEXT
}

/// Where a freeze of a VM stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FreezeState {
    /// It is being made.
    Freezing,
    /// Its disks can be read.
    Frozen,
    /// All is read, and the platform is naming the moment for good.
    Sealing,
    /// The moment has its names for good. Its disks cannot be read any more.
    Sealed,
    /// It could not be sealed: no restore point may come of it.
    SealFailed,
    /// It was committed, and the platform is at it.
    Committing,
    /// It is over: tracking goes on from its moment.
    Committed,
    /// It was committed, and the tracking of its moment could not be kept.
    CommitFailed,
    /// It was given up, and the platform is at it.
    Aborting,
    /// It is over without a trace.
    Aborted,
    /// It was given up, and something is left for the next reaping.
    AbortFailed,
    /// It could not be made; nothing is left of it.
    Failed,
}

impl FreezeState {
    /// Whether it stays as it is.
    pub const fn is_final(self) -> bool {
        matches!(
            self,
            Self::Committed | Self::CommitFailed | Self::Aborted | Self::AbortFailed | Self::Failed
        )
    }

    /// Whether the platform is at something, so that it will be another one by itself.
    pub const fn is_passing(self) -> bool {
        matches!(self, Self::Freezing | Self::Sealing | Self::Committing | Self::Aborting)
    }
}

/// A freeze of a VM as it is told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FreezeView {
    /// Its id.
    pub id: String,
    /// The client's mark.
    pub client_token: String,
    /// The VM as it was asked for.
    pub vm: String,
    /// Where it stands.
    pub state: FreezeState,
    /// When it was asked for (RFC 3339).
    pub created_at: String,
    /// When it is given up unless it is used (RFC 3339); none once it has ended.
    pub expires_at: Option<String>,
    /// How long it lives after its last use.
    pub ttl_seconds: u64,
    /// Why it failed, or why its end did.
    pub error: Option<ErrorReport>,
    /// What a commit could not remove and left for the next reaping; also why it was given up by the agent.
    pub notes: Vec<String>,
    /// The moment, while it is frozen.
    pub moment: Option<MomentView>,
    /// The names of the moment, once it is sealed.
    #[serde(default)]
    pub seal: Option<Seal>,
}

/// A moment of a VM as it is told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MomentView {
    /// The configuration at that moment.
    pub config: VmConfig,
    /// The consistency reached.
    pub consistency: Consistency,
    /// Why that is less than was asked for.
    pub downgrade_reason: Option<String>,
    /// What else the user should know.
    pub warnings: Vec<String>,
    /// The disks, in the order of the configuration.
    pub disks: Vec<DiskView>,
}

/// A disk of a moment as it is told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskView {
    /// Its place in the list, by which it is read.
    pub index: usize,
    /// Which disk.
    pub id: DiskId,
    /// Its size, in bytes.
    pub size_bytes: u64,
    /// The tracking id of the moment.
    pub tracking_id: Option<TrackingId>,
    /// What may differ from the base.
    pub changes: ChangesView,
    /// The earlier disk that this one was, where it stood in another place at the base.
    #[serde(default)]
    pub moved_from: Option<DiskId>,
}

/// What may differ from the base, as it is told; the ranges themselves are asked for page by page.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum ChangesView {
    /// Everything.
    Everything {
        /// Why.
        reason: FullReason,
    },
    /// Ranges.
    Ranges {
        /// How many.
        count: u64,
        /// Their bytes.
        total_bytes: u64,
    },
}

impl MomentView {
    /// What is told of a frozen VM.
    pub fn new(frozen: &dyn FrozenVm) -> Self {
        let disks = frozen.disks().iter().enumerate().map(|(index, disk)| DiskView {
            index,
            id: disk.id.clone(),
            size_bytes: disk.device.size_bytes(),
            tracking_id: disk.tracking.clone(),
            moved_from: frozen.moved_from(&disk.id).cloned(),
            changes: match &disk.changes {
                Changes::Everything(reason) => ChangesView::Everything { reason: reason.clone() },
                Changes::Ranges(ranges) => ChangesView::Ranges {
                    count: ranges.as_slice().len() as u64,
                    total_bytes: ranges.total_bytes(),
                },
            },
        });
        Self {
            config: frozen.config().clone(),
            consistency: frozen.consistency(),
            downgrade_reason: frozen.downgrade_reason().map(ToOwned::to_owned),
            warnings: frozen.warnings().to_vec(),
            disks: disks.collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> FreezeRequest {
        let base = Base { tracking: Some(TrackingId("rctX:1".into())), size_bytes: 10 };
        FreezeRequest {
            vm: "web".into(),
            job: JobId::random(),
            lineage: "0123456789abcdef".into(),
            consistency: Consistency::Application,
            allow_downgrade: true,
            bases: BTreeMap::from([(DiskId("scsi0:0".into()), base)]),
            exclude: vec![DiskId("scsi0:1".into())],
            cancel: CancelToken::new(),
        }
    }

    #[test]
    fn a_request_survives_the_way() {
        let request = request();
        let document = FreezeDocument::new(&request, "abcdefgh".into(), 600);
        let text = serde_json::to_string(&document).unwrap();
        let read: FreezeDocument = serde_json::from_str(&text).unwrap();
        let arrived = read.request(CancelToken::new()).unwrap();
        assert_eq!((&arrived.vm, &arrived.job), (&request.vm, &request.job));
        assert_eq!((&arrived.bases, &arrived.exclude), (&request.bases, &request.exclude));
        assert_eq!(
            (arrived.lineage, arrived.consistency, arrived.allow_downgrade),
            (request.lineage, request.consistency, true)
        );
    }

    #[test]
    fn what_would_become_a_part_of_a_path_is_refused() {
        let good = FreezeDocument::new(&request(), "abcdefgh".into(), 600);
        let refused = |change: fn(&mut FreezeDocument), word: &str| {
            let mut document = good.clone();
            change(&mut document);
            let error = document.request(CancelToken::new()).unwrap_err();
            assert!(error.starts_with(word), "{error}");
        };
        refused(|document| document.job = "../../../etc/abc".into(), "job");
        refused(|document| document.job = "0123456789ABCDEF".into(), "job");
        refused(|document| document.lineage = "0123456789abcde/".into(), "lineage");
        refused(|document| document.vm = String::new(), "vm");
        refused(|document| document.vm = "x".repeat(2000), "vm");
        refused(|document| document.client_token = "a b c d e".into(), "client_token");
        refused(|document| document.client_token = "abc".into(), "client_token");
        refused(|document| document.bases.push(document.bases[0].clone()), "bases");
        refused(|document| document.exclude = vec![DiskId("x".repeat(2000))], "exclude");
    }
}
