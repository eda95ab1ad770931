//! What can be switched wrong with the host.

use crate::random::Random;
use std::collections::BTreeSet;
use vmtide_cim::CimValue;

/// The faults that are switched on. None by default; each stays until it is switched off.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    /// What `GetVirtualDiskChanges` and the local query fail with.
    pub changes: Option<ChangesFault>,
    /// The most ranges in one answer of the change query: the rest has to be asked for.
    pub changes_page: Option<usize>,
    /// Ranges are rounded outward to this many bytes, so more is reported than was written.
    pub over_report_bytes: Option<u64>,
    /// Ranges come unsorted, some twice.
    pub unsorted_ranges: bool,
    /// Answers of the change query hold a range behind the end of the disk.
    pub ranges_outside: bool,
    /// A failed change query is a job that fails, not a code.
    pub changes_by_job: bool,
    /// `ConvertToReferencePoint` names no reference point, in its answer or its job.
    pub no_resulting_point: bool,
    /// The lists of ids in reference points.
    pub point_ids: PointIds,
    /// The frozen file says another id than the reference point made of it.
    pub most_recent_differs: bool,
    /// Jobs end with state 32768 and a warning.
    pub job_warnings: bool,
    /// What `CreateSnapshot` answers, e.g. 32775.
    pub creation_code: Option<u32>,
    /// What `ConvertToReferencePoint` answers, e.g. 32775.
    pub conversion_code: Option<u32>,
    /// What `DestroySnapshot` answers.
    pub destruction_code: Option<u32>,
    /// The job of `CreateSnapshot` fails with this error code.
    pub creation_job: Option<u16>,
    /// The job of `ConvertToReferencePoint` fails with this error code.
    pub conversion_job: Option<u16>,
    /// VSS fails in all guests: no application-consistent checkpoint.
    pub vss_fails: bool,
    /// Every call is denied.
    pub access_denied: bool,
    /// Hyper-V shows nothing, as to a user who is not in the group Hyper-V Administrators.
    pub nothing_shown: bool,
    /// Methods answer 32769.
    pub methods_denied: bool,
    /// Merges take this many times as long.
    pub slow_merge: u64,
    /// Merges do not go on.
    pub merges_blocked: bool,
    /// A checkpoint is refused with 32775 while disks are merging.
    pub refuse_while_merging: bool,
    /// Disk files that cannot be opened: sharing violation.
    pub unopenable: BTreeSet<String>,
    /// Jobs are gone as soon as they are done, before anybody can read how they ended.
    pub jobs_vanish: bool,
    /// Jobs of this method never end.
    pub endless_job: Option<String>,
    /// This method does its work only so many milliseconds after it was called, and its job cannot be stopped: a host
    /// that completes when nobody waits any more.
    pub late: Option<(String, u64)>,
    /// Properties that the host's version does not know: they are not shown, and a call whose parameters hold one is
    /// refused.
    pub unknown_properties: BTreeSet<String>,
    /// Methods do their work at once and answer 0 with the result, without a job.
    pub synchronous: bool,
    /// The answer to this method is lost, once; whether it took effect.
    pub lost_answer: Option<(String, bool)>,
    /// `Msvm_AffectedJobElement` has no rows with the effect "create", only such with effect 0.
    pub affected_without_effect: bool,
    /// Jobs do not name what they made, nor do methods.
    pub nothing_named: bool,
    /// `ReferencePointType` of new reference points.
    pub point_kind: Option<u16>,
    /// `ConsistencyLevel` of new reference points, whatever the checkpoint was made with.
    pub point_consistency: Option<u8>,
    /// What `DestroyReferencePoint` answers.
    pub point_destruction_code: Option<u32>,
    /// Files do not tell their most recent tracking id, as over SMB.
    pub no_most_recent_ids: bool,
    /// No disk can be opened: sharing violation.
    pub sharing_violation: bool,
    /// Directories that may not be listed.
    pub unlistable: BTreeSet<String>,
    /// Merges take so long, in milliseconds, whatever the options say.
    pub merge_ms: Option<u64>,
    /// Recovery checkpoints do not hold this disk of the VM, by its number. Users' checkpoints do: a VM that goes back to one would
    /// lose the disk, and a VM of one disk its only one.
    pub skipped_disk: Option<usize>,
    /// While a checkpoint is refused, another product makes its own.
    pub foreign_at_refusal: bool,
    /// Once: when a checkpoint is asked for, another product has just asked for one as well, by a job of its own.
    pub foreign_beside: bool,
    /// Once: before a conversion somebody removes the checkpoint, and another product converts a later one.
    pub foreign_at_conversion: bool,
    /// Once: while a checkpoint is made somebody attaches a disk.
    pub disk_at_checkpoint: bool,
    /// An export of the configuration blocks all later merges of the VM, as reported of real hosts, until
    /// `ModifyDiskMergeSettings` allows them again.
    pub export_blocks_merges: bool,
}

/// What a change query fails with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChangesFault {
    /// 0xC03A0029: the id is not valid.
    InvalidId,
    /// 0xC03A002A: tracking is disabled.
    Disabled,
    /// 0xC03A0030: information is missing.
    Missing,
    /// Another code.
    Code(u32),
    /// The call succeeds and has processed nothing.
    NothingProcessed,
    /// The two lists of an answer differ in length (WMI only).
    UnequalLists,
}

/// What is wrong with the lists of a reference point.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PointIds {
    /// Nothing.
    #[default]
    Whole,
    /// There are no tracking ids.
    Empty,
    /// There is one tracking id less than disks.
    Shorter,
    /// The tracking ids are empty texts.
    Blank,
}

impl Faults {
    /// A property within the parameters of a call that the host does not know; none where it knows all.
    pub(crate) fn unknown_in(&self, parameters: &[(&str, CimValue)]) -> Option<&String> {
        let is_in = |name: &&String| {
            let element = format!("NAME=\"{name}\"");
            let mut texts = parameters.iter().flat_map(|(_, value)| value.elements());
            texts.any(|value| value.as_str().is_some_and(|text| text.contains(&element)))
        };
        self.unknown_properties.iter().find(is_in)
    }

    /// One fault or none, by chance; never one after which nothing can succeed for ever.
    pub fn any(random: &mut Random) -> Self {
        let mut faults = Self::default();
        match random.below(24) {
            0 => faults.changes = Some(ChangesFault::InvalidId),
            1 => faults.changes = Some(ChangesFault::Disabled),
            2 => faults.changes = Some(ChangesFault::Missing),
            3 => faults.changes = Some(ChangesFault::NothingProcessed),
            4 => faults.changes_page = Some(1 + index(random.below(3))),
            5 => faults.over_report_bytes = Some(1 << (12 + random.below(9))),
            6 => faults.unsorted_ranges = true,
            7 => faults.ranges_outside = true,
            8 => faults.no_resulting_point = true,
            9 => faults.point_ids = PointIds::Empty,
            10 => faults.point_ids = PointIds::Shorter,
            11 => faults.job_warnings = true,
            12 => faults.creation_code = Some(32775),
            13 => faults.conversion_code = Some(32775),
            14 => faults.vss_fails = true,
            15 => faults.slow_merge = 2 + random.below(50),
            16 => faults.jobs_vanish = true,
            17 => faults.conversion_job = Some(32768),
            18 => faults.synchronous = true,
            19 => faults.changes = Some(ChangesFault::Code(0xC03A_0024)),
            20 => faults.affected_without_effect = true,
            21 => {
                let methods =
                    ["CreateSnapshot", "ConvertToReferencePoint", "DestroyReferencePoint"];
                let method = random.choose(&methods).copied().unwrap_or("CreateSnapshot");
                faults.lost_answer = Some((method.to_owned(), random.one_in(2)));
            }
            22 => faults.most_recent_differs = true,
            _ => {}
        }
        faults
    }
}

fn index(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}
