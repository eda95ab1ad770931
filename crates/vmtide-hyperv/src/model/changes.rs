//! What changed on a disk, asked of the host by WMI.

use super::codes;
use crate::host::from_cim;
use crate::{ChangePage, ChangesError, Host};
use vmtide_block::{ByteRange, CancelToken, RangeSet};
use vmtide_cim::{CimError, CimInstance, CimValue};

/// The service of virtual disks.
pub(crate) const IMAGE_SERVICE: &str = "Msvm_ImageManagementService";

/// `ERROR_VHD_INVALID_CHANGE_TRACKING_ID`.
const INVALID_ID: u32 = 0xC03A_0029;
/// `ERROR_VHD_CHANGE_TRACKING_DISABLED`.
const DISABLED: u32 = 0xC03A_002A;
/// `ERROR_VHD_MISSING_CHANGE_TRACKING_INFORMATION`.
const MISSING: u32 = 0xC03A_0030;

impl Host {
    /// One call of `GetVirtualDiskChanges`: what changed of the disk at `path` since `tracking_id` was
    /// sealed, within `range`. The host resolves the path, so this also works from another machine.
    ///
    /// Ranges are cut to `range`; one that lies wholly outside is a broken answer. How much of `range` the
    /// answer covers is handed on as the host says it, 0 too: the caller judges progress.
    ///
    /// # Errors
    /// Each means that the disk is read in full.
    pub fn virtual_disk_changes(
        &self,
        path: &str,
        tracking_id: &str,
        range: ByteRange,
    ) -> Result<ChangePage, ChangesError> {
        let failed = |error: vmtide_hypervisor::HypervisorError| classify(None, error.to_string());
        let service = self.service(IMAGE_SERVICE).map_err(failed)?;
        let parameters = [
            ("Path", CimValue::from(path)),
            ("LimitId", tracking_id.into()),
            // Only VHD sets have targets.
            ("TargetSnapshotId", "".into()),
            ("ByteOffset", CimValue::Uint64(range.offset)),
            ("ByteLength", CimValue::Uint64(range.length)),
        ];
        let what = format!("asking for the changes of {path}");
        let output = match self.cim().invoke(&service, "GetVirtualDiskChanges", &parameters) {
            Ok(output) => output,
            Err(CimError::Fault { detail, code, .. }) => return Err(classify(code, detail)),
            Err(error @ CimError::TooLarge { .. }) => {
                return Err(ChangesError::TooLarge(error.to_string()));
            }
            Err(error) => return Err(failed(from_cim(error))),
        };
        match output.return_value {
            codes::DONE => {}
            codes::JOB_STARTED => {
                let job = output.parameters.optional_reference("Job");
                let job = job.map_err(|error| ChangesError::Failed(error.to_string()))?;
                let job = job.ok_or_else(|| {
                    ChangesError::Failed("the host started a job and did not name it".into())
                })?;
                self.wait(&job, &what, &CancelToken::new()).map_err(failed)?;
                // What came with the start of the job was there before its work was done.
                return Err(ChangesError::Failed(
                    "the host answered in a job, whose findings cannot be had".into(),
                ));
            }
            code => return Err(failed(codes::error(&what, code, ""))),
        }
        page(&output.parameters, range).map_err(ChangesError::Failed)
    }
}

/// Reads the answer.
fn page(answer: &CimInstance, range: ByteRange) -> Result<ChangePage, String> {
    let text = |error: CimError| error.to_string();
    let processed_bytes: u64 = answer.number("ProcessedByteLength").map_err(text)?;
    if processed_bytes > range.length {
        return Err(format!(
            "the host says it looked at {processed_bytes} bytes of {} asked for",
            range.length
        ));
    }
    let offsets = answer.numbers("ChangedByteOffsets").map_err(text)?;
    let lengths = answer.numbers("ChangedByteLengths").map_err(text)?;
    if offsets.len() != lengths.len() {
        return Err(format!("{} offsets of changes and {} lengths", offsets.len(), lengths.len()));
    }
    let mut changes = Vec::with_capacity(offsets.len());
    for (&offset, &length) in offsets.iter().zip(&lengths) {
        let change = ByteRange::new(offset, length);
        if change.checked_end().is_none() {
            return Err(format!("a change at {offset} with {length} bytes"));
        }
        let within = change.intersect(&range);
        if within.is_empty() && length > 0 {
            return Err(format!("a change at {offset} with {length} bytes is outside of {range}"));
        }
        changes.push(within);
    }
    changes.retain(|change| !change.is_empty());
    Ok(ChangePage { ranges: RangeSet::from(changes), processed_bytes })
}

/// Which kind of refusal it is. The code of a job has 16 bits, so that of the disk is only in the text.
fn classify(code: Option<u32>, detail: String) -> ChangesError {
    let is = |wanted: u32| {
        code == Some(wanted) || detail.to_ascii_lowercase().contains(&format!("{wanted:08x}"))
    };
    if is(INVALID_ID) || is(MISSING) {
        ChangesError::UnknownId(detail)
    } else if is(DISABLED) {
        ChangesError::NotTracked(detail)
    } else {
        ChangesError::Failed(detail)
    }
}
