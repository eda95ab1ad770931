//! Giving a VMDK another parent, or none.
//!
//! The parent is named in the descriptor, a text of many sectors. Where it is inside a sparse extent
//! the new text is written behind everything, the header, one sector, goes over to it, the old place
//! is written, and the header goes back. Where it is a file of its own, a new file takes its place.

use super::descriptor::{MAX_DESCRIPTOR_BYTES, NO_PARENT, lines};
use super::head::Head;
use super::hosted::{HostedHeader, SECTOR, flag};
use crate::Format;
use crate::bytes::{length, put};
use crate::chain::LinkTarget;
use crate::parent::real_path;
use std::path::Path;
use vmtide_block::files;
use vmtide_block::{BlockDevice, BlockError, OpenMode, RawDevice, Result, WritableBlockDevice};

/// The line with the content id that the parent is about to have; the child takes both while the
/// parent is being written. Programs keep entries of the disk data base that they do not know.
pub(super) const NEXT_PARENT_CID: &str = "ddb.vmtide.nextparentcid";

/// Lets the image at `path` name another parent; at every moment it names the old one or the new
/// one.
///
/// # Errors
/// [`BlockError::Unsupported`] where the image is of a kind that has no parent, the new one is no
/// VMDK, or its name cannot stand in a descriptor; what the medium says.
pub(crate) fn set_parent(path: &Path, target: Option<&LinkTarget>) -> Result<()> {
    change_parent(path, target, false)
}

/// Succeeds where [`set_parent`] could be called; changes nothing.
///
/// # Errors
/// As there.
pub(crate) fn can_set_parent(path: &Path, target: Option<&LinkTarget>) -> Result<()> {
    change_parent(path, target, true)
}

fn change_parent(path: &Path, target: Option<&LinkTarget>, is_trial: bool) -> Result<()> {
    let file = RawDevice::open(path, OpenMode::ReadWrite)?;
    match change_parent_in(&file, target, is_trial)? {
        Some(text) if !is_trial => replace_file(path, &text),
        _ => Ok(()),
    }
}

/// Changes the descriptor that is inside `file`. Where the descriptor is the file, nothing is
/// changed, and the answer is the text of the file that must take its place.
pub(crate) fn change_parent_in(
    file: &dyn WritableBlockDevice,
    target: Option<&LinkTarget>,
    is_trial: bool,
) -> Result<Option<Vec<u8>>> {
    let refuse = |detail: &str| BlockError::unsupported(file.name(), detail.to_owned());
    if let Some(target) = target {
        if target.format != Format::Vmdk {
            return Err(refuse("can only have a VMDK as its parent"));
        }
        if target.name.contains(['"', '\n', '\r', '\0']) {
            return Err(refuse("cannot name a parent with quotation marks or line ends"));
        }
    }
    match Head::read_image(file)? {
        Head::Hosted { header, descriptor: Some(_) } => {
            if header.has(flag::COMPRESSED) || header.has(flag::MARKERS) || header.version > 2 {
                return Err(refuse("is of a kind of VMDK that cannot be changed in place"));
            }
            embedded(file, &header, target, is_trial).map(|()| None)
        }
        Head::Descriptor(descriptor, 0) => {
            let is_sparse = descriptor
                .extents
                .iter()
                .any(|extent| extent.kind == super::descriptor::ExtentType::Sparse);
            if target.is_some() && !is_sparse {
                return Err(refuse("is a flat VMDK, which cannot have a parent"));
            }
            Ok(Some(renamed(&read_text(file, 0, file.size_bytes())?, target)))
        }
        _ => Err(refuse("has no descriptor that could name a parent")),
    }
}

fn read_text(file: &dyn BlockDevice, at: u64, bytes: u64) -> Result<Vec<u8>> {
    let mut text = vec![0; length(bytes.min(MAX_DESCRIPTOR_BYTES))];
    file.read_at(&mut text, at)?;
    let end = text.iter().position(|byte| *byte == 0).unwrap_or(text.len());
    text.truncate(end);
    Ok(text)
}

/// The descriptor's text with another parent.
fn renamed(text: &[u8], target: Option<&LinkTarget>) -> Vec<u8> {
    let end_of_line: &[u8] = match (text.contains(&b'\r'), text.contains(&b'\n')) {
        (true, true) => b"\r\n",
        (true, false) => b"\r",
        (false, _) => b"\n",
    };
    let mut out = Vec::with_capacity(text.len() + 200);
    let mut lines: Vec<&[u8]> = lines(text).map(|(_, line)| line).collect();
    if lines.last().is_some_and(|last| last.is_empty()) {
        lines.pop();
    }
    let mut is_written = false;
    for line in lines {
        let name = line.split(|byte| *byte == b'=').next().unwrap_or_default();
        let key = String::from_utf8_lossy(name).trim().to_ascii_lowercase();
        let is_comment = key.starts_with('#');
        match key.as_str() {
            "parentcid" if !is_comment => {
                if !std::mem::replace(&mut is_written, true) {
                    write_parent(&mut out, target, end_of_line);
                }
            }
            "parentfilenamehint" | NEXT_PARENT_CID if !is_comment => {}
            _ => {
                out.extend(line);
                out.extend(end_of_line);
            }
        }
    }
    if let Some(next) = target.and_then(|target| target.next_identity.as_ref()) {
        out.extend(format!("{NEXT_PARENT_CID} = \"{next}\"").as_bytes());
        out.extend(end_of_line);
    }
    out
}

fn write_parent(out: &mut Vec<u8>, target: Option<&LinkTarget>, end_of_line: &[u8]) {
    let none = format!("{NO_PARENT:08x}");
    let cid = target.and_then(|target| target.identity.as_deref()).unwrap_or(&none);
    out.extend(format!("parentCID={cid}").as_bytes());
    out.extend(end_of_line);
    if let Some(target) = target {
        out.extend(format!("parentFileNameHint=\"{}\"", target.name).as_bytes());
        out.extend(end_of_line);
    }
}

/// Changes a descriptor inside a sparse extent.
fn embedded(
    file: &dyn WritableBlockDevice,
    header: &HostedHeader,
    target: Option<&LinkTarget>,
    is_trial: bool,
) -> Result<()> {
    let Some((at, space)) = header.descriptor_range(file)? else {
        return Ok(());
    };
    let text = renamed(&read_text(file, at, space)?, target);
    if text.len() as u64 > space {
        // It must stay where it is: QEMU looks for it in sector 1 whatever the header says.
        return Err(BlockError::unsupported(
            file.name(),
            format!(
                "has {space} bytes for its descriptor, but {} are needed with this parent's name; \
                 use a shorter path, or convert the image",
                text.len()
            ),
        ));
    }
    if is_trial {
        return Ok(());
    }
    let end = file.size_bytes().next_multiple_of(SECTOR);
    let padded = |bytes: u64| {
        let mut padded = text.clone();
        padded.resize(length(bytes), 0);
        padded
    };
    file.resize(end + space)?;
    file.write_at(&padded(space), end)?;
    file.flush()?;
    lead_to(file, end / SECTOR, space / SECTOR)?;
    file.write_at(&padded(space), at)?;
    file.flush()?;
    lead_to(file, header.descriptor_offset, header.descriptor_sectors)?;
    file.resize(end)?;
    file.flush()
}

/// Lets the header lead to the descriptor at this sector.
fn lead_to(file: &dyn WritableBlockDevice, sector: u64, sectors: u64) -> Result<()> {
    let mut bytes = vec![0; length(SECTOR)];
    file.read_at(&mut bytes, 0)?;
    put(&mut bytes, 28, &sector.to_le_bytes());
    put(&mut bytes, 36, &sectors.to_le_bytes());
    file.write_at(&bytes, 0)?;
    file.flush()
}

/// Puts a new file with this text in the place of the one at `path`; where that is a symbolic link,
/// of the one it leads to.
fn replace_file(path: &Path, text: &[u8]) -> Result<()> {
    let path = &real_path(path)?;
    let failed = |what: &str, error: std::io::Error| {
        BlockError::io(format!("{what} {}", path.display()), error)
    };
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    // No other file has this name, also none that somebody put in the way.
    let mut random = [0; 8];
    getrandom::fill(&mut random).map_err(|error| {
        BlockError::io(format!("{}: random numbers", path.display()), std::io::Error::other(error))
    })?;
    name.push(format!(".vmtide-new-{:016x}", u64::from_le_bytes(random)));
    let new = path.with_file_name(name);
    let file = RawDevice::open(&new, OpenMode::CreateNew { size_bytes: text.len() as u64 })?;
    let replaced = (|| {
        file.write_at(text, 0)?;
        file.flush()?;
        let permissions = std::fs::metadata(path).map_err(|error| failed("stat", error))?;
        std::fs::set_permissions(&new, permissions.permissions())
            .map_err(|error| failed("set the permissions of the new", error))?;
        std::fs::rename(&new, path).map_err(|error| failed("replace", error))
    })();
    if replaced.is_err() {
        // The error of the change is the one that counts.
        let _ = std::fs::remove_file(&new);
        return replaced;
    }
    let directory = files::directory_of(path);
    files::sync_directory(directory)
        .map_err(|error| BlockError::io(format!("flush {}", directory.display()), error))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(next: Option<&str>) -> LinkTarget {
        LinkTarget {
            name: "new base.vmdk".into(),
            absolute_path: "/disks/new base.vmdk".into(),
            format: Format::Vmdk,
            identity: Some("12345678".into()),
            next_identity: next.map(str::to_owned),
        }
    }

    #[test]
    fn only_what_names_the_parent_changes() {
        let text =
            b"# Disk DescriptorFile\r\nversion=1\r\nCID=aaaaaaaa\r\n ParentCID = bbbbbbbb\r\n\
            parentFileNameHint=\"old.vmdk\"\r\n# parentCID=cccccccc\r\nRW 8 SPARSE \"x\"\r\n";
        let changed = renamed(text, Some(&target(Some("87654321"))));
        let changed = String::from_utf8(changed).unwrap();
        assert_eq!(
            changed,
            "# Disk DescriptorFile\r\nversion=1\r\nCID=aaaaaaaa\r\nparentCID=12345678\r\n\
             parentFileNameHint=\"new base.vmdk\"\r\n# parentCID=cccccccc\r\nRW 8 SPARSE \"x\"\r\n\
             ddb.vmtide.nextparentcid = \"87654321\"\r\n"
        );
        let again = renamed(changed.as_bytes(), Some(&target(None)));
        let again = String::from_utf8(again).unwrap();
        assert!(!again.contains("nextparentcid") && again.contains("=12345678"), "{again}");
        let none = String::from_utf8(renamed(changed.as_bytes(), None)).unwrap();
        assert!(none.contains("parentCID=ffffffff") && !none.contains("Hint"), "{none}");
    }
}
