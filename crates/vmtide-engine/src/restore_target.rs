//! Where the disks of a restore point go: which file for each, and the VM's configuration beside them.

use crate::image::OpenDiskOptions;
use crate::image::staged::{publish, temporary_beside};
use crate::restore::{RestoreJob, RestoreTarget};
use crate::target::{Durability, ImageKind, TargetRules, WritePlan};
use crate::{EngineError, Result};
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use vmtide_image::Format;
use vmtide_repo::{DiskRecord, RestorePoint};

/// The file beside the disks that holds the VM's configuration.
pub(crate) const CONFIG_FILE: &str = "vm-config.json";

/// The most bytes that the name of a VM or disk takes in a file name: two of them, a number and an
/// extension stay below the 255 that file systems allow.
const NAME_PART_BYTES: usize = 100;

/// What a restore writes.
pub(crate) struct Plan {
    /// One for each disk, in order.
    pub writes: Vec<WritePlan>,
    /// Where the VM's configuration goes.
    pub config_path: Option<PathBuf>,
}

/// Decides where every disk goes, and refuses what would overwrite without being told to. Makes
/// the directory of a restore to a directory; touches nothing else.
pub(crate) fn plan(job: &RestoreJob<'_>, disks: &[&DiskRecord]) -> Result<Plan> {
    let rules = TargetRules {
        verb: "restore",
        replace_option: "--force",
        in_place: job.in_place,
        replace: job.force && !job.in_place,
        force: job.force,
        kind: ImageKind {
            format: job.format,
            subformat: job.subformat.clone(),
            ..ImageKind::default()
        },
        durability: Durability::Always,
        open: OpenDiskOptions::default(),
        default_format: Some(Format::Raw),
    };
    rules.check()?;
    let path = match &job.target {
        RestoreTarget::Nbd(url) => {
            only_disk(disks, "an NBD export")?;
            return Ok(Plan { writes: vec![rules.plan_nbd(url)?], config_path: None });
        }
        RestoreTarget::Agent(url, options) => {
            only_disk(disks, "a disk of an agent")?;
            return Ok(Plan { writes: vec![rules.plan_agent(url, options)?], config_path: None });
        }
        RestoreTarget::Path(path) => path,
    };
    let text = path.as_os_str().to_string_lossy();
    let names_directory = text.ends_with(std::path::is_separator);
    let metadata = std::fs::metadata(path).ok();
    let is_directory = metadata.as_ref().is_some_and(std::fs::Metadata::is_dir);
    if is_directory || (metadata.is_none() && (names_directory || disks.len() > 1)) {
        return plan_directory(job, &rules, path, disks);
    }
    only_disk(disks, &format!("the file {}", path.display()))?;
    Ok(Plan { writes: vec![rules.plan_path(path.clone())?], config_path: None })
}

fn only_disk(disks: &[&DiskRecord], target: &str) -> Result<()> {
    if disks.len() == 1 {
        return Ok(());
    }
    let ids: Vec<_> = disks.iter().map(|disk| disk.id.as_str()).collect();
    Err(EngineError::usage(format!(
        "{} disks do not go into {target}: choose one with --disk ({}), or give a directory",
        disks.len(),
        ids.join(", ")
    )))
}

fn plan_directory(
    job: &RestoreJob<'_>,
    rules: &TargetRules,
    directory: &Path,
    disks: &[&DiskRecord],
) -> Result<Plan> {
    std::fs::create_dir_all(directory)
        .map_err(|error| EngineError::io(format!("create {}", directory.display()), error))?;
    let format = job.format.unwrap_or(Format::Raw);
    let mut writes: Vec<WritePlan> = Vec::with_capacity(disks.len());
    for disk in disks {
        let stem = format!("{}-{}", file_name_of(&job.point.vm), file_name_of(&disk.id));
        let mut path = directory.join(format!("{stem}.{format}"));
        // Two ids may differ only in what a file name cannot hold.
        let mut number = 2;
        while writes.iter().any(|write| write.name() == path.display().to_string()) {
            path = directory.join(format!("{stem}-{number}.{format}"));
            number += 1;
        }
        writes.push(rules.plan_path(path)?);
    }
    let config_path = directory.join(CONFIG_FILE);
    if config_path.exists() && !job.force && !job.in_place {
        return Err(rules.already_there(&config_path));
    }
    Ok(Plan { writes, config_path: Some(config_path) })
}

/// A name of a VM or disk as a part of a file name: no separators, nothing hidden, no surprises
/// for shells.
pub(crate) fn file_name_of(name: &str) -> String {
    let mut safe = String::new();
    for c in name.chars() {
        let c = if c.is_alphanumeric() || "._-+".contains(c) { c } else { '_' };
        if safe.len() + c.len_utf8() > NAME_PART_BYTES {
            break;
        }
        safe.push(c);
    }
    match safe.trim_start_matches('.') {
        "" => "disk".into(),
        name => name.into(),
    }
}

/// A new file that only its owner may read: a configuration tells much of its VM.
fn create_for_owner(path: &Path) -> std::io::Result<File> {
    let mut options = File::options();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options.open(path)
}

/// Writes the VM's configuration as readable JSON, under a temporary name first. Answers with its
/// path.
pub(crate) fn write_config(path: &Path, point: &RestorePoint, replace: bool) -> Result<String> {
    let temporary = temporary_beside(path)?;
    let write = || -> std::io::Result<()> {
        let mut file = create_for_owner(&temporary)?;
        serde_json::to_writer_pretty(&mut file, &point.config)?;
        file.write_all(b"\n")?;
        file.sync_all()
    };
    let written = write()
        .map_err(|error| EngineError::io(format!("write {}", path.display()), error))
        .and_then(|()| publish(&temporary, path, replace));
    if let Err(error) = written {
        // Without its name it is only garbage.
        let _ = std::fs::remove_file(&temporary);
        return Err(error);
    }
    Ok(path.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_become_safe_file_names() {
        assert_eq!(file_name_of("Web Server/1"), "Web_Server_1");
        assert_eq!(file_name_of("../../etc/passwd"), "_.._etc_passwd");
        assert_eq!(file_name_of("virtio0"), "virtio0");
        assert_eq!(file_name_of("..."), "disk");
        assert_eq!(file_name_of("müller"), "müller");
        assert_eq!(file_name_of(&"x".repeat(1000)).len(), 100);
        assert_eq!(file_name_of(&"日".repeat(1000)), "日".repeat(33));
    }
}
