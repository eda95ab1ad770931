//! What a restore point keeps of a disk, so that the next backup can ask what changed since.
//!
//! The token is opaque to everybody else. It names the sealed moment by its id, and says what must still be true
//! of the disk for that id to mean what it meant: change tracking itself gives no proof of completeness, so
//! any difference means reading the disk in full.

use crate::FrozenFile;
use serde::{Deserialize, Serialize};
use uuid::Uuid;
use vmtide_hypervisor::{FullReason, TrackingId};

/// The version that is written. A reader of another version reads the disk in full, which is safe.
const VERSION: u32 = 1;

/// The longest token that is read; written ones have some 400 bytes.
const MAX_TOKEN_BYTES: usize = 4096;

/// `VIRTUAL_DISK_MAXIMUM_CHANGE_TRACKING_ID_LENGTH` of virtdisk.h, with the NUL that ends it.
const MAX_TRACKING_ID_UNITS: usize = 255;

/// `InstanceID` of `Msvm_VirtualSystemReferencePoint` has at most 256 characters.
const MAX_INSTANCE_ID_CHARACTERS: usize = 256;

/// A disk at one sealed moment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct BaseToken {
    v: u32,
    /// The id of change tracking (`rctX:…`), as the host wrote it.
    pub rct: String,
    /// `VIRTUAL_DISK_ID`.
    pub disk: Uuid,
    /// The id of the VM.
    pub vm: Uuid,
    /// `InstanceID` of the reference point that keeps the id alive.
    pub point: String,
    /// The lineage whose reference point it is; only that one may destroy it.
    pub line: String,
    /// The size of the disk in bytes.
    pub size: u64,
    /// The logical sector size in bytes.
    pub sector: u32,
    /// `fixed`, `dynamic` or `differencing`.
    pub subtype: String,
    /// The name of the frozen file where checkpoints of users stood that the VM could be taken back to, and empty where
    /// none did; none in records of before this was kept. See [`Line`](super::line::Line).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held: Option<String>,
}

/// What is known of a frozen file after it is closed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct FileFacts {
    /// `VIRTUAL_DISK_ID`.
    pub disk: Option<Uuid>,
    /// The most recent tracking id it knew; none where the way to it cannot tell.
    pub most_recent: Option<String>,
    /// The size in bytes.
    pub size_bytes: u64,
    /// The logical sector size in bytes.
    pub logical_sector_bytes: u32,
    /// `fixed`, `dynamic` or `differencing`.
    pub subtype: String,
}

impl From<&FrozenFile> for FileFacts {
    fn from(file: &FrozenFile) -> Self {
        Self {
            disk: file.disk_id,
            most_recent: file.most_recent_tracking_id.clone(),
            size_bytes: file.device.size_bytes(),
            logical_sector_bytes: file.logical_sector_bytes,
            subtype: file.subtype.clone(),
        }
    }
}

/// What a token of a moment says beside the disk.
pub(crate) struct SealedBy<'a> {
    /// The VM.
    pub vm: Uuid,
    /// The reference point.
    pub point: &'a str,
    /// The lineage.
    pub line: &'a str,
    /// What is kept of the checkpoints of users.
    pub held: &'a str,
}

impl BaseToken {
    /// The token of `file`, whose moment is sealed under the id `rct`.
    pub fn new(rct: &str, disk: Uuid, file: &FileFacts, by: &SealedBy<'_>) -> Self {
        Self {
            v: VERSION,
            rct: rct.into(),
            disk,
            vm: by.vm,
            point: by.point.into(),
            line: by.line.into(),
            size: file.size_bytes,
            sector: file.logical_sector_bytes,
            subtype: file.subtype.clone(),
            held: Some(by.held.into()),
        }
    }

    /// The token as it is kept; none where it could not be read again.
    pub fn encode(&self) -> Option<TrackingId> {
        let text = serde_json::to_string(self).ok()?;
        let id = TrackingId(text);
        Self::parse(&id).is_ok().then_some(id)
    }

    /// Reads a token.
    ///
    /// # Errors
    /// Why it is none, in words; the disk is then read in full.
    pub fn parse(id: &TrackingId) -> Result<Self, String> {
        if id.0.len() > MAX_TOKEN_BYTES {
            return Err(format!("the tracking record has more than {MAX_TOKEN_BYTES} bytes"));
        }
        let token: Self = serde_json::from_str(&id.0)
            .map_err(|_| "the tracking record is none of Hyper-V".to_owned())?;
        if token.v != VERSION {
            return Err(format!("the tracking record has version {} and not {VERSION}", token.v));
        }
        check_tracking_id(&token.rct)?;
        if token.point.is_empty() || token.point.chars().count() > MAX_INSTANCE_ID_CHARACTERS {
            return Err("the tracking record names no reference point".into());
        }
        Ok(token)
    }

    /// Why the moment of this token says nothing of `file`, a disk of `vm`; none where it does.
    pub fn doubt(&self, vm: Uuid, file: &FileFacts) -> Option<FullReason> {
        let replaced = |what: String| Some(FullReason::DiskReplaced(what));
        if file.disk != Some(self.disk) {
            return replaced(format!("its id was {} and is {}", self.disk, name_of(file.disk)));
        }
        if self.vm != vm {
            return replaced(format!("it was a disk of the VM {}", self.vm));
        }
        if self.size != file.size_bytes {
            return Some(FullReason::Resized { from_bytes: self.size, to_bytes: file.size_bytes });
        }
        if self.sector != file.logical_sector_bytes {
            return replaced(format!(
                "its sectors had {} bytes and have {}",
                self.sector, file.logical_sector_bytes
            ));
        }
        // The file is differencing while a checkpoint of the user exists, which changes nothing in the disk.
        let differencing = self.subtype == DIFFERENCING || file.subtype == DIFFERENCING;
        if self.subtype != file.subtype && !differencing {
            return replaced(format!("its file was {} and is {}", self.subtype, file.subtype));
        }
        None
    }
}

/// Why an id may be of another past of its file than the base; none where it is not, or where the way to the file cannot
/// tell. `newest` is the most recent id that the file knows.
///
/// The counter in ids goes up with every checkpoint. A file of which an older copy was put back, or that was taken back to a
/// checkpoint, counts on from there: what is asked of the base's id is then answered for another moment. With
/// `is_sealed` the file was frozen by a checkpoint of its own since the base, so that its id is a later one.
pub(crate) fn order_doubt(base: &str, newest: Option<&str>, is_sealed: bool) -> Option<FullReason> {
    let newest = newest?;
    let is_same = newest.eq_ignore_ascii_case(base);
    if is_not_later(base, newest) && !(is_sealed && is_same) {
        return None;
    }
    Some(FullReason::AnswerDoubtful(format!(
        "the newest tracking id of its file is {newest}, which does not follow that of the base, {base}: another copy of \
         the file may be in its place, or the VM was taken back to a checkpoint"
    )))
}

/// The subtype of a file that holds changes to another.
const DIFFERENCING: &str = "differencing";

fn name_of(disk: Option<Uuid>) -> String {
    disk.map_or_else(|| "none".to_owned(), |id| id.to_string())
}

/// Checks the form of an id of change tracking; what is in it is the host's own.
///
/// # Errors
/// What is wrong with it.
pub(crate) fn check_tracking_id(id: &str) -> Result<(), String> {
    let units = id.encode_utf16().count();
    if units == 0 || units > MAX_TRACKING_ID_UNITS || id.chars().any(char::is_control) {
        return Err(format!("the tracking id is no id: {units} characters"));
    }
    Ok(())
}

/// Whether the id of a reference point seals the same moment as the frozen file's own, or an earlier one, whose
/// changes are a superset. `rctX:` and a GUID are followed by a counter of eight digits that grows with each moment;
/// whether they are decimal or hexadecimal is not documented, and as text of one length they compare the same.
pub(crate) fn is_not_later(sealed: &str, frozen: &str) -> bool {
    if sealed.eq_ignore_ascii_case(frozen) {
        return true;
    }
    match (sealed.rsplit_once(':'), frozen.rsplit_once(':')) {
        (Some((line, counter)), Some((other_line, other))) => {
            line.eq_ignore_ascii_case(other_line)
                && counter.len() == other.len()
                && [counter, other].iter().all(|text| text.bytes().all(|b| b.is_ascii_hexdigit()))
                && counter.to_ascii_lowercase() <= other.to_ascii_lowercase()
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RCT: &str = "rctX:5bfde23b:ce75:4303:b54f:6c18394f105c:00000001";

    fn file(size_bytes: u64) -> FileFacts {
        FileFacts {
            disk: Some(Uuid::from_u128(7)),
            most_recent: None,
            size_bytes,
            logical_sector_bytes: 512,
            subtype: "dynamic".into(),
        }
    }

    fn token() -> BaseToken {
        let by =
            SealedBy { vm: Uuid::from_u128(1), point: r"Microsoft:A\B", line: "0123", held: "" };
        BaseToken::new(RCT, Uuid::from_u128(7), &file(4096), &by)
    }

    #[test]
    fn tokens_come_back_as_they_were_and_are_short() {
        let text = token().encode().unwrap();
        assert!(text.0.len() < 400, "{}", text.0);
        assert_eq!(BaseToken::parse(&text).unwrap(), token());
        // Written before what users' checkpoints hold was kept.
        let older = TrackingId(text.0.replace(",\"held\":\"\"", ""));
        assert_eq!(BaseToken::parse(&older).unwrap().held, None);
        assert_ne!(older, text);
    }

    #[test]
    fn only_an_id_that_follows_the_bases_is_of_the_same_past() {
        let id = |counter: u32| format!("rctX:5bfde23b:ce75:4303:b54f:6c18394f105c:{counter:08}");
        let doubt =
            |newest: &str, is_sealed| order_doubt(&id(4), Some(newest), is_sealed).is_some();
        assert!(!doubt(&id(5), true) && !doubt(&id(5), false));
        assert!(doubt(&id(4), true), "every checkpoint seals an id of its own");
        assert!(!doubt(&id(4), false));
        assert!(doubt(&id(3), true) && doubt(&id(3), false));
        assert!(doubt("rctX:other:00000009", true) && doubt("", false));
        assert_eq!(order_doubt(&id(4), None, true), None);
    }

    #[test]
    fn what_is_no_token_is_refused() {
        let good = token().encode().unwrap().0;
        for bad in [
            String::new(),
            "rctX:1".into(),
            good.replace("\"v\":1", "\"v\":2"),
            good.replace(RCT, ""),
            good.replace(RCT, &"x".repeat(256)),
            good.replace(RCT, "a\\u0000b"),
            good.replace(r"Microsoft:A\\B", ""),
            good.replace("4096", "-1"),
            "x".repeat(5000),
        ] {
            assert!(BaseToken::parse(&TrackingId(bad.clone())).is_err(), "{bad}");
        }
    }

    #[test]
    fn every_difference_of_the_disk_is_a_doubt() {
        let (vm, same) = (Uuid::from_u128(1), file(4096));
        assert_eq!(token().doubt(vm, &same), None);
        let differs = |change: fn(&mut FileFacts)| {
            let mut file = file(4096);
            change(&mut file);
            token().doubt(vm, &file)
        };
        assert!(matches!(token().doubt(Uuid::nil(), &same), Some(FullReason::DiskReplaced(_))));
        let resized = FullReason::Resized { from_bytes: 4096, to_bytes: 8192 };
        assert_eq!(token().doubt(vm, &file(8192)), Some(resized));
        assert!(differs(|file| file.disk = None).is_some());
        assert!(differs(|file| file.logical_sector_bytes = 4096).is_some());
        assert!(differs(|file| file.subtype = "fixed".into()).is_some());
        assert_eq!(differs(|file| file.subtype = "differencing".into()), None);
    }

    #[test]
    fn only_the_same_moment_or_an_earlier_one_is_trusted() {
        let id = |counter: &str| format!("rctX:5bfde23b:ce75:4303:b54f:6c18394f105c:{counter}");
        assert!(is_not_later(&id("00000002"), &id("00000002")));
        assert!(is_not_later(&id("00000002"), &id("0000000A")));
        assert!(is_not_later(&id("0000000a"), &id("0000000B")));
        assert!(!is_not_later(&id("00000003"), &id("00000002")));
        assert!(!is_not_later("rctX:other:00000001", &id("00000002")));
        assert!(!is_not_later(&id("1"), &id("00000002")));
        assert!(!is_not_later("x", "y"));
    }
}
