//! The files of the host: where its paths lie in the directory, and the images among them.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use uuid::Uuid;
use vmtide_block::{
    BlockError, ByteRange, CancelToken, ExtentKind, OpenMode, Progress, RawDevice, Result,
};
use vmtide_image::vhdx::{VhdxCreateOptions, VhdxKind, VhdxWriter};
use vmtide_image::{
    BackingPolicy, CreateOptions, CreateParent, DiskImage, Format, ImageWriter, Layer, NewParent,
    OpenOptions, RebaseOptions, create_image, image_info, open_chain, open_read_only,
    open_writable, rebase_image,
};

/// Where a path of the host lies in `root`: `C:\a\b` in `C/a/b`, `\\server\share\a` in
/// `UNC/server/share/a`. None for a path that is not absolute or leaves its volume.
pub(crate) fn local_path(root: &Path, path: &str) -> Option<PathBuf> {
    let (mut local, rest) = if let Some(rest) = path.strip_prefix(r"\\") {
        (root.join("UNC"), rest)
    } else {
        let (drive, rest) = path.split_once(r":\")?;
        if drive.len() != 1 || !drive.bytes().all(|b| b.is_ascii_alphabetic()) {
            return None;
        }
        (root.join(drive.to_ascii_uppercase()), rest)
    };
    for part in rest.split('\\') {
        if matches!(part, "" | "." | "..") || part.contains(['/', ':', '\0']) {
            return None;
        }
        local.push(part);
    }
    Some(local)
}

/// The directory of a path of the host.
pub(crate) fn directory_of(path: &str) -> &str {
    path.rsplit_once('\\').map_or("", |(directory, _)| directory)
}

/// The name of a file without its directory.
pub(crate) fn name_of(path: &str) -> &str {
    path.rsplit_once('\\').map_or(path, |(_, name)| name)
}

/// What a new disk file is like.
#[derive(Clone, Debug)]
pub(crate) struct NewImage {
    pub(crate) format: Format,
    pub(crate) size_bytes: u64,
    pub(crate) block_bytes: u32,
    pub(crate) logical_sector_bytes: u32,
    pub(crate) physical_sector_bytes: u32,
    pub(crate) fixed: bool,
    pub(crate) disk_id: Option<Uuid>,
}

/// Makes a disk file without a parent.
pub(crate) fn create(path: &Path, new: &NewImage) -> Result<Arc<dyn ImageWriter>> {
    make_directory(path)?;
    if new.format == Format::Vhdx {
        let mut options = VhdxCreateOptions::new(new.size_bytes);
        options.block_size_bytes = (new.block_bytes > 0).then_some(new.block_bytes);
        options.logical_sector_bytes = new.logical_sector_bytes;
        options.physical_sector_bytes = new.physical_sector_bytes;
        options.kind = if new.fixed { VhdxKind::Fixed } else { VhdxKind::Dynamic };
        options.disk_id = new.disk_id.map(|id| id.hyphenated().to_string());
        options.without_flushes = true;
        return Ok(Arc::new(VhdxWriter::create(path, &options)?));
    }
    let mut options = CreateOptions::new(new.format, new.size_bytes);
    options.without_flushes = true;
    if new.fixed {
        options.subformat = Some("fixed".into());
    }
    create_image(path, &options)
}

fn make_directory(path: &Path) -> Result<()> {
    let directory = path.parent().unwrap_or(path);
    std::fs::create_dir_all(directory)
        .map_err(|error| BlockError::io(format!("make {}", directory.display()), error))
}

/// Makes a differencing file over `parent`, which lies beside it.
pub(crate) fn create_child(path: &Path, parent: &Path) -> Result<Arc<dyn ImageWriter>> {
    let info = image_info(parent, None)?;
    let device = open(parent)?;
    let mut options = CreateOptions::new(info.format, device.size_bytes());
    options.subformat = Some("differencing".into());
    options.without_flushes = true;
    // Blocks no larger than the parent's: a small disk has small files.
    options.block_size_bytes = info.block_size_bytes.map(|bytes| bytes.min(2 << 20));
    let name = parent.file_name().map(|name| name.to_string_lossy().into_owned());
    let identity = match info.format {
        Format::Vhdx => "data_write_guid",
        _ => "unique_id",
    };
    options.parent = Some(CreateParent {
        name: name.unwrap_or_default(),
        absolute_path: None,
        format: info.format,
        identity: info.identifiers.get(identity).cloned(),
        device,
    });
    create_image(path, &options)
}

fn trusting() -> OpenOptions {
    OpenOptions { backing: BackingPolicy::SameDirectory, ..OpenOptions::default() }
}

/// Opens a disk file with its parents for reading.
pub(crate) fn open(path: &Path) -> Result<Arc<dyn vmtide_block::BlockDevice>> {
    open_read_only(path, &trusting())
}

/// Opens a disk file for writing. Nothing is flushed: the host's disks live as long as its test.
pub(crate) fn write(path: &Path) -> Result<Arc<dyn ImageWriter>> {
    let info = image_info(path, None)?;
    if info.format != Format::Vhdx {
        return open_writable(path, &trusting());
    }
    let parent = match info.backing {
        // A child lies beside its parent, whatever the spelling of its name.
        Some(parent) => {
            let name = parent.name.rsplit(['\\', '/']).next().unwrap_or_default();
            Some(open(&path.with_file_name(name))?)
        }
        None => None,
    };
    let file = RawDevice::open(path, OpenMode::ReadWrite)?.without_flushes();
    Ok(Arc::new(VhdxWriter::open_device(Arc::new(file), parent)?))
}

/// Merges a differencing file into its parent, gives its children that parent, and removes it.
pub(crate) fn merge(child: &Path, parent: &Path, grandchildren: &[PathBuf]) -> Result<()> {
    let layers = open_chain(child, &trusting())?;
    let Some(Layer { image, .. }) = layers.into_iter().next() else {
        return Err(BlockError::damaged(child.display().to_string(), "it has no layers"));
    };
    let writer = write(parent)?;
    let size_bytes = image.size_bytes();
    if writer.size_bytes() < size_bytes {
        writer.resize(size_bytes)?;
    }
    let mut at = 0;
    while at < size_bytes {
        for place in image.layout(ByteRange::from_bounds(at, size_bytes))? {
            at = place.range.end();
            match place.kind {
                ExtentKind::Unallocated => {}
                ExtentKind::Zero => writer.write_zeroes(place.range)?,
                ExtentKind::Data => copy(&*image, &*writer, place.range)?,
            }
        }
    }
    writer.finish()?;
    drop((writer, image));
    for grandchild in grandchildren {
        let options = RebaseOptions {
            open: trusting(),
            parent: Some(NewParent {
                path: parent.to_owned(),
                format: None,
                stored_name: parent.file_name().map(|name| name.to_string_lossy().into_owned()),
            }),
            relink_only: true,
            force: true,
        };
        rebase_image(grandchild, &options, &Progress::new(), &CancelToken::new())?;
    }
    remove(child)
}

/// Copies what a file holds itself.
fn copy(from: &dyn DiskImage, to: &dyn ImageWriter, range: ByteRange) -> Result<()> {
    let mut at = range.offset;
    let mut buffer = vec![0; 1 << 20];
    while at < range.end() {
        let length = usize::try_from(range.end() - at).unwrap_or(usize::MAX).min(buffer.len());
        let piece = &mut buffer[..length];
        from.read_at(piece, at)?;
        to.write_at(piece, at)?;
        at += length as u64;
    }
    Ok(())
}

/// Removes a file.
pub(crate) fn remove(path: &Path) -> Result<()> {
    std::fs::remove_file(path)
        .map_err(|error| BlockError::io(format!("remove {}", path.display()), error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_of_the_host_stay_in_the_directory() {
        let at = |path: &str| local_path(Path::new("/r"), path);
        assert_eq!(at(r"c:\VMs\a.vhdx"), Some("/r/C/VMs/a.vhdx".into()));
        assert_eq!(at(r"\\nas\vms\a.vhdx"), Some("/r/UNC/nas/vms/a.vhdx".into()));
        for path in [r"C:\..\x", r"C:\a\\b", r"C:\a/b", r"CC:\a", "a.vhdx", r"C:\a:b", r"C:a"] {
            assert_eq!(at(path), None, "{path}");
        }
    }

    #[test]
    fn files_are_merged_and_their_children_follow() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        let id = Uuid::from_u128(7);
        let new = NewImage {
            format: Format::Vhdx,
            size_bytes: 4 << 20,
            block_bytes: 1 << 20,
            logical_sector_bytes: 512,
            physical_sector_bytes: 4096,
            fixed: false,
            disk_id: Some(id),
        };
        let write = |writer: Arc<dyn ImageWriter>, byte: u8, offset: u64| {
            writer.write_at(&[byte; 1024], offset).unwrap();
            writer.finish().unwrap();
        };
        write(create(&at("a.vhdx"), &new).unwrap(), 1, 0);
        write(create_child(&at("b.avhdx"), &at("a.vhdx")).unwrap(), 2, 512);
        write(create_child(&at("c.avhdx"), &at("b.avhdx")).unwrap(), 3, 2 << 20);
        merge(&at("b.avhdx"), &at("a.vhdx"), &[at("c.avhdx")]).unwrap();
        assert!(!at("b.avhdx").exists());
        let mut bytes = vec![0; 4 << 20];
        open(&at("c.avhdx")).unwrap().read_at(&mut bytes, 0).unwrap();
        assert_eq!(
            [bytes[0], bytes[512], bytes[1535], bytes[1536], bytes[2 << 20]],
            [1, 2, 2, 0, 3]
        );
        merge(&at("c.avhdx"), &at("a.vhdx"), &[]).unwrap();
        let info = image_info(at("a.vhdx"), None).unwrap();
        assert_eq!(info.identifiers["virtual_disk_id"], id.hyphenated().to_string());
        let mut again = vec![0; 4 << 20];
        open(&at("a.vhdx")).unwrap().read_at(&mut again, 0).unwrap();
        assert_eq!(bytes, again);
    }
}
