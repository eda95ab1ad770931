//! The names of everything we make in QEMU, and telling ours from others'.
//!
//! Block nodes, exports, jobs and the temporary bitmap of one job are `vmtide-JOB-KIND`, e.g.
//! `vmtide-0123456789abcdef-f2` for the filter of the third disk: 27 bytes at most, because QEMU
//! cuts node names off at 31. The tracking bitmaps that stay are `vmtide-LINEAGE-JOB-DISK`, 57
//! bytes of the 1023 that QEMU allows. `JOB`, `LINEAGE` and `DISK`, which is made from the disk's
//! id, are 16 lower-case hexadecimal digits. The disk is part of the name because a bitmap goes
//! where its image goes: of two images that changed places each still says whose changes it has.

use serde::{Deserialize, Serialize};
use vmtide_hypervisor::{DiskId, JobId, TrackingId};

/// What all our names begin with.
const OURS: &str = "vmtide-";

/// Digits in a job's, a lineage's or a disk's name.
const ID_DIGITS: usize = 16;

/// The granularity of our bitmaps in bytes. Larger reads more than changed; smaller costs QEMU
/// memory and writes of the bitmap: 64 KiB is 2 MiB per TiB of disk.
pub(crate) const GRANULARITY_BYTES: u64 = 64 * 1024;

/// The kinds of things a job makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Copy-before-write filter node.
    Filter,
    /// Scratch node.
    Scratch,
    /// Snapshot-access node.
    Access,
    /// Temporary bitmap that holds the changes since the base.
    Changes,
    /// NBD export.
    Export,
    /// Backup job.
    Job,
}

impl Kind {
    const fn letter(self) -> char {
        match self {
            Self::Filter => 'f',
            Self::Scratch => 's',
            Self::Access => 'a',
            Self::Changes => 'c',
            Self::Export => 'e',
            Self::Job => 'j',
        }
    }

    fn of(letter: char) -> Option<Self> {
        [Self::Filter, Self::Scratch, Self::Access, Self::Changes, Self::Export, Self::Job]
            .into_iter()
            .find(|kind| kind.letter() == letter)
    }
}

/// The name of the thing of `kind` that `job` makes for disk number `index`.
pub(crate) fn temporary(job: &JobId, kind: Kind, index: usize) -> String {
    format!("{OURS}{job}-{}{index}", kind.letter())
}

/// The job and kind in a temporary thing's name; none where it is not ours.
pub(crate) fn parse_temporary(name: &str) -> Option<(&str, Kind)> {
    let (job, tail) = split(name)?;
    let mut letters = tail.chars();
    let kind = Kind::of(letters.next()?)?;
    let digits = letters.as_str();
    let valid = !digits.is_empty()
        && digits.len() < ID_DIGITS - 1
        && digits.bytes().all(|byte| byte.is_ascii_digit());
    valid.then_some((job, kind))
}

/// The name of the tracking bitmap that `job` starts for `lineage` on `disk`.
pub(crate) fn tracking(lineage: &str, job: &JobId, disk: &DiskId) -> String {
    format!("{OURS}{lineage}-{job}-{}", digits_of(disk))
}

/// What the name of a tracking bitmap says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tracking<'a> {
    /// The repository and VM it belongs to.
    pub lineage: &'a str,
    /// The job that started it.
    pub job: &'a str,
    /// The disk it belongs to. None in a name that was made before names had it; such a bitmap is
    /// removed, but never believed.
    disk: Option<&'a str>,
}

impl Tracking<'_> {
    /// Whether it was started for `disk`.
    pub fn is_of(self, disk: &DiskId) -> bool {
        self.disk == Some(digits_of(disk).as_str())
    }
}

/// What a tracking bitmap's name says; none where it is not ours.
pub(crate) fn parse_tracking(name: &str) -> Option<Tracking<'_>> {
    let (lineage, rest) = split(name)?;
    let (job, disk) = match rest.split_once('-') {
        Some((job, disk)) => (job, Some(disk)),
        None => (rest, None),
    };
    (is_id(job) && disk.is_none_or(is_id)).then_some(Tracking { lineage, job, disk })
}

/// The digits that stand for a disk in names: FNV-1a of its id. It has to tell the disks of one VM
/// apart, which their administrator named, and not to withstand an attacker.
fn digits_of(disk: &DiskId) -> String {
    let hash = disk.0.bytes().fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    format!("{hash:016x}")
}

/// Whether `text` can name a lineage or a job.
pub(crate) fn is_id(text: &str) -> bool {
    text.len() == ID_DIGITS
        && text.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
}

fn split(name: &str) -> Option<(&str, &str)> {
    let rest = name.strip_prefix(OURS)?;
    let (id, tail) = rest.split_once('-')?;
    is_id(id).then_some((id, tail))
}

/// What a tracking id of ours says: which bitmap, and what it was like, to tell another one of
/// the same name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Mark {
    /// The bitmap's name.
    pub bitmap: String,
    /// Its granularity in bytes.
    pub granularity: u64,
    /// Whether it is kept in the image, and so survives QEMU.
    pub persistent: bool,
    /// The image format's driver.
    pub driver: String,
}

impl Mark {
    pub fn to_id(&self) -> TrackingId {
        let place = if self.persistent { "image" } else { "memory" };
        TrackingId(format!("qemu:{}:{}:{place}:{}", self.bitmap, self.granularity, self.driver))
    }

    pub fn parse(id: &TrackingId) -> Option<Self> {
        let mut parts = id.0.strip_prefix("qemu:")?.splitn(4, ':');
        let bitmap = parts.next()?.to_owned();
        parse_tracking(&bitmap)?;
        Some(Self {
            bitmap,
            granularity: parts.next()?.parse().ok()?,
            persistent: match parts.next()? {
                "image" => true,
                "memory" => false,
                _ => return None,
            },
            driver: parts.next()?.to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_names_are_told_from_all_others() {
        let job = JobId::random();
        for kind in [Kind::Filter, Kind::Scratch, Kind::Access, Kind::Changes, Kind::Export] {
            let name = temporary(&job, kind, 123);
            assert!(name.len() <= 31, "{name}");
            assert_eq!(parse_temporary(&name), Some((job.as_str(), kind)));
            assert_eq!(parse_tracking(&name), None);
        }
        let disk = DiskId("virtio0".into());
        let name = tracking("0123456789abcdef", &job, &disk);
        assert_eq!(name.len(), 57);
        let parsed = parse_tracking(&name).unwrap();
        assert_eq!((parsed.lineage, parsed.job), ("0123456789abcdef", job.as_str()));
        assert!(parsed.is_of(&disk) && !parsed.is_of(&DiskId("virtio1".into())));
        assert_eq!(parse_temporary(&name), None);
        // A name without a disk is ours, and of no disk.
        let old = format!("vmtide-0123456789abcdef-{job}");
        assert!(!parse_tracking(&old).unwrap().is_of(&disk));
        assert_eq!(parse_tracking(&format!("{name}-")), None);
        assert_eq!(parse_tracking(&format!("{old}-")), None);
        for other in [
            "vmtide",
            "vmtide-backup",
            "vmtide-0123456789abcdef",
            "vmtide-0123456789abcdef-",
            "vmtide-0123456789abcdef-f",
            "vmtide-0123456789abcdef-x1",
            "vmtide-0123456789ABCDEF-f1",
            "libvirt-1-format",
            "x-vmtide-0123456789abcdef-f1",
        ] {
            assert_eq!(parse_temporary(other), None, "{other}");
            assert_eq!(parse_tracking(other), None, "{other}");
        }
    }

    #[test]
    fn tracking_ids_come_back_as_they_were() {
        let mark = Mark {
            bitmap: tracking("0123456789abcdef", &JobId::random(), &DiskId("sd0".into())),
            granularity: 65536,
            persistent: true,
            driver: "qcow2".into(),
        };
        assert_eq!(Mark::parse(&mark.to_id()), Some(mark));
        for foreign in ["", "rctX:1", "qemu:x:65536:image:qcow2", "qemu:"] {
            assert_eq!(Mark::parse(&TrackingId(foreign.into())), None);
        }
    }
}
