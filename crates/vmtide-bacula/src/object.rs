//! What a backup leaves in the catalogue for restores: an object that says what it is, and a form of options
//! that a restore can fill in.

use crate::job::Job;
use crate::moments::DiskMoment;
use crate::stream::MomentId;
use crate::{BackendError, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::PathBuf;
use vmtide_engine::is_vm_target;
use vmtide_hypervisor::{FrozenVm, VmConfig};
use vmtide_image::Format;

/// The version of the object.
const FORMAT: u32 = 1;

/// The most bytes of an object; the plugin takes no more.
const MAX_OBJECT_BYTES: usize = 15 << 20;

/// What a backup was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PointObject {
    /// The version of this object.
    pub format: u32,
    /// The moment.
    pub moment: String,
    /// Bacula's letter of the level.
    pub level: char,
    /// The consistency reached.
    pub consistency: String,
    /// The job, by Bacula's unique name.
    pub job: String,
    /// The source, as the plugin line had it.
    pub source: String,
    /// The VM.
    pub config: VmConfig,
    /// The disks: sizes and the platform's tracking ids.
    pub disks: BTreeMap<String, DiskSummary>,
}

/// A disk in a [`PointObject`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskSummary {
    /// Its size in bytes.
    pub size_bytes: u64,
    /// The platform's name of the moment.
    #[serde(default)]
    pub tracking: Option<String>,
}

impl PointObject {
    /// Describes a frozen VM, of which `disks` were sent.
    pub fn new(
        frozen: &dyn FrozenVm,
        job: &Job,
        moment: MomentId,
        disks: &BTreeMap<String, DiskMoment>,
    ) -> Self {
        let summary = |disk: &DiskMoment| DiskSummary {
            size_bytes: disk.size_bytes,
            tracking: disk.tracking.clone(),
        };
        Self {
            format: FORMAT,
            moment: moment.to_string(),
            level: job.level.letter(),
            consistency: frozen.consistency().to_string(),
            job: job.name.clone(),
            source: job.command.source_text.clone(),
            config: frozen.config().clone(),
            disks: disks.iter().map(|(id, disk)| (id.clone(), summary(disk))).collect(),
        }
    }

    /// As it is kept.
    ///
    /// # Errors
    /// Where the VM's configuration is larger than an object may be.
    pub fn bytes(&self) -> Result<Vec<u8>> {
        let json = serde_json::to_vec(self)
            .map_err(|error| BackendError::Refused(format!("write a restore object: {error}")))?;
        if json.len() > MAX_OBJECT_BYTES {
            return Err(BackendError::Refused(
                "the VM's configuration is larger than 15 MiB".into(),
            ));
        }
        Ok(json)
    }

    /// Reads one; none where it is something else.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let object: Self = serde_json::from_slice(bytes).ok()?;
        (object.format == FORMAT).then_some(object)
    }
}

/// The form, in the daemon's own language for such.
pub const fn options_form() -> &'static str {
    "# vmtide: options of a restore\n\
     OptPrompt=\"Where to: a directory, a block device, original (replaces the images of the VM), or \
     hyperv+winrm://HOST/NAME (a new VM)\"\n\
     OptDefault=\"\"\n\
     to=@STR@\n\
     OptPrompt=\"Format of restored disks: raw, qcow2, vhdx, vhd or vmdk\"\n\
     OptDefault=\"raw\"\n\
     format=@STR@\n"
}

/// Where disks are restored to, beyond what Bacula itself says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Destination {
    /// The path that Bacula gives.
    #[default]
    Path,
    /// A directory.
    Directory(PathBuf),
    /// A block device; for one disk.
    Device(PathBuf),
    /// The images that the VM had.
    Original,
    /// A new VM on the Hyper-V host of this URL.
    Vm(String),
}

/// The form, filled in.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RestoreOptions {
    /// Where to.
    pub to: Destination,
    /// The format of new images; none is raw.
    pub format: Option<Format>,
}

impl RestoreOptions {
    /// Reads a form that was filled in: lines of `key=value` or `key="value"`.
    ///
    /// # Errors
    /// [`BackendError::Usage`] with what is wrong.
    pub fn parse(text: &str) -> Result<Self> {
        let mut options = Self::default();
        for line in text.lines() {
            let Some((key, value)) = line.trim().split_once('=') else { continue };
            let value = value.trim().trim_matches('"').trim();
            match key.trim() {
                "to" if !value.is_empty() => options.to = destination(value)?,
                "format" if !value.is_empty() => {
                    let format = value.parse().map_err(|_| {
                        BackendError::Usage(format!(
                            "format={value}: use raw, qcow2, vhdx, vhd or vmdk"
                        ))
                    })?;
                    options.format = Some(format);
                }
                _ => {}
            }
        }
        Ok(options)
    }
}

fn destination(text: &str) -> Result<Destination> {
    if text == "original" {
        return Ok(Destination::Original);
    }
    if is_vm_target(text) {
        return Ok(Destination::Vm(text.to_owned()));
    }
    let path = PathBuf::from(text);
    if !path.is_absolute() {
        return Err(BackendError::Usage(format!(
            "to={text}: give the absolute path of a directory or block device, original, or hyperv+winrm://HOST/NAME"
        )));
    }
    Ok(if is_block_device(&path) {
        Destination::Device(path)
    } else {
        Destination::Directory(path)
    })
}

#[cfg(unix)]
fn is_block_device(path: &std::path::Path) -> bool {
    use std::os::unix::fs::FileTypeExt;
    std::fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_block_device())
}

#[cfg(not(unix))]
fn is_block_device(path: &std::path::Path) -> bool {
    path.starts_with(r"\\.\")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_form_is_read() {
        let read = |text: &str| RestoreOptions::parse(text);
        assert_eq!(read("").unwrap(), RestoreOptions::default());
        assert_eq!(read("to=\nformat=\"\"\n").unwrap(), RestoreOptions::default());
        let filled = read("# x\nto=\"/restored\"\nformat=vhdx\nelse=1\n").unwrap();
        assert_eq!(filled.to, Destination::Directory("/restored".into()));
        assert_eq!(filled.format, Some(Format::Vhdx));
        assert_eq!(read("to=original").unwrap().to, Destination::Original);
        let url = "hyperv+winrm://hv1/web%20two";
        assert_eq!(read(&format!("to={url}\n")).unwrap().to, Destination::Vm(url.into()));
        read("to=relative").unwrap_err();
        read("format=iso").unwrap_err();
    }
}
