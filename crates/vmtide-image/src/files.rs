//! Chains of images whose files are not files of this system: on a share of another machine, or under the
//! names that another system has for them.
//!
//! [`open_chain`](crate::open_chain) finds and opens files by paths of this system. Here both are left to an
//! [`ImageFiles`]: it opens what it is asked for, as bytes, and says which of the names in a child may be looked
//! at. What makes a file the parent is the same as ever: what it says of itself. Only VHDX and VHD have
//! chains here, which is what Hyper-V's disks are.

use crate::open::MAX_CHAIN_DEPTH;
use crate::vhd::{VhdImage, VhdWriter};
use crate::vhdx::{VhdxImage, VhdxWriter};
use crate::{
    DiskImage, Format, ImageInfo, ImageWriter, ParentLink, identity, image_info_device,
    probe_device, vhd, vhdx,
};
use std::io::ErrorKind;
use std::sync::Arc;
use vmtide_block::{BlockDevice, BlockError, Result, WritableBlockDevice};

/// Files that images are in. May be shared by threads; calls block.
pub trait ImageFiles: Send + Sync {
    /// Opens a file for reading, so that nobody writes it meanwhile.
    ///
    /// # Errors
    /// [`BlockError::Io`] of the kind `NotFound` where there is none; others end the search for a parent.
    fn open(&self, path: &str) -> Result<Arc<dyn BlockDevice>>;

    /// Where the parent that `link` in the image at `child` means may be, the likeliest first. **The names come
    /// from the image**, whose author may be anybody: only such as may be opened are answered.
    fn parents(&self, child: &str, link: &ParentLink) -> Vec<String>;

    /// A name of the file that is the same for all ways of writing its path; for finding loops.
    fn key(&self, path: &str) -> String {
        path.to_owned()
    }
}

/// One image of an open chain.
#[derive(Clone)]
pub struct FilesLayer {
    /// The path it was opened by.
    pub path: String,
    /// What it says of itself.
    pub info: ImageInfo,
    /// The image, reading through the layers below it.
    pub image: Arc<dyn DiskImage>,
}

/// Opens the VHDX or VHD at `path` of `files` with all its parents, for reading: the image itself first, the base
/// last.
///
/// # Errors
/// [`BlockError::Unsupported`] for an image of another format; [`BlockError::Damaged`] where an image breaks its
/// format, the chain comes back to itself, or no file that may be the parent says of itself what the child wants;
/// [`BlockError::Io`] of the kind `NotFound` where there is no such file at all; what [`ImageFiles::open`] says.
pub fn open_chain_in(files: &dyn ImageFiles, path: &str) -> Result<Vec<FilesLayer>> {
    let mut chain = Chain { files, seen: Vec::new(), layers: Vec::new() };
    let file = files.open(path)?;
    chain.open(path, file)?;
    // The deepest was opened first.
    chain.layers.reverse();
    Ok(chain.layers)
}

/// Opens the VHDX or VHD in `file`, which is that at `path` of `files`, for writing; its parents for reading.
/// Nobody else may have it open.
///
/// # Errors
/// As [`open_chain_in`], and where the image must be repaired before it is written.
pub fn open_writer_in(
    files: &dyn ImageFiles,
    path: &str,
    file: Arc<dyn WritableBlockDevice>,
) -> Result<Arc<dyn ImageWriter>> {
    let mut chain = Chain { files, seen: Vec::new(), layers: Vec::new() };
    chain.enter(path)?;
    Ok(match chain_format(path, &*file)? {
        Format::Vhdx => {
            let parent = chain.parent(path, vhdx::parent_link(&*file)?)?;
            Arc::new(VhdxWriter::open_device(file, parent)?)
        }
        _ => {
            let parent = chain.parent(path, vhd::parent_link(&*file)?)?;
            Arc::new(VhdWriter::open_device(file, parent)?)
        }
    })
}

/// VHDX or VHD.
fn chain_format(path: &str, file: &dyn BlockDevice) -> Result<Format> {
    match probe_device(file)? {
        format @ (Format::Vhdx | Format::Vhd) => Ok(format),
        other => Err(BlockError::unsupported(
            path,
            format!("is a {other} image; only VHDX and VHD disks can be opened here"),
        )),
    }
}

/// The state of opening one chain.
struct Chain<'a> {
    files: &'a dyn ImageFiles,
    /// The keys on the way down.
    seen: Vec<String>,
    /// The layers that are open, the deepest first.
    layers: Vec<FilesLayer>,
}

impl Chain<'_> {
    fn open(&mut self, path: &str, file: Arc<dyn BlockDevice>) -> Result<Arc<dyn DiskImage>> {
        self.enter(path)?;
        let format = chain_format(path, &*file)?;
        let info = image_info_device(&*file, Some(format))?;
        let image: Arc<dyn DiskImage> = if format == Format::Vhdx {
            let parent = self.parent(path, vhdx::parent_link(&*file)?)?;
            Arc::new(VhdxImage::open_device(file, parent)?)
        } else {
            let parent = self.parent(path, vhd::parent_link(&*file)?)?;
            Arc::new(VhdImage::open_device(file, parent)?)
        };
        self.layers.push(FilesLayer { path: path.to_owned(), info, image: image.clone() });
        Ok(image)
    }

    fn enter(&mut self, path: &str) -> Result<()> {
        let key = self.files.key(path);
        if self.seen.contains(&key) {
            return Err(BlockError::damaged(path, "the chain of parents comes back to this image"));
        }
        if self.seen.len() >= MAX_CHAIN_DEPTH {
            return Err(BlockError::damaged(
                path,
                format!("the chain of parents has more than {MAX_CHAIN_DEPTH} images"),
            ));
        }
        self.seen.push(key);
        Ok(())
    }

    /// Opens the parent that `link` in the image at `child` means; none where it has none.
    fn parent(
        &mut self,
        child: &str,
        link: Option<ParentLink>,
    ) -> Result<Option<Arc<dyn BlockDevice>>> {
        let Some(link) = link else { return Ok(None) };
        let mut others = Vec::new();
        for path in self.files.parents(child, &link) {
            let file = match self.files.open(&path) {
                Ok(file) => file,
                Err(error) if error.io_kind() == Some(ErrorKind::NotFound) => continue,
                Err(error) => return Err(error),
            };
            let said = match link.format {
                Some(format) => identity(&*file, format),
                None => Ok(None),
            };
            match said {
                Ok(Some(said)) if link.identities.contains(&said) => {
                    return Ok(Some(self.open(&path, file)?));
                }
                Ok(said) => {
                    let said = said.unwrap_or_else(|| "nothing".into());
                    others.push(format!("{path} says {said}"));
                }
                Err(error) => others.push(error.to_string()),
            }
        }
        if others.is_empty() {
            let named = link.names.first().map_or("", String::as_str);
            return Err(BlockError::io(
                format!("{child}: its parent {named:?} was not found where parents are looked for"),
                std::io::Error::from(ErrorKind::NotFound),
            ));
        }
        Err(BlockError::damaged(
            child,
            format!(
                "the parent must be {}, but {}: it was changed or replaced after this child was made",
                link.identities.join(" or "),
                others.join("; ")
            ),
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vhdx::{VhdxCreateOptions, VhdxParent};
    use crate::windows_parents;
    use std::collections::HashMap;
    use vmtide_block::MemoryDevice;

    const MIB: u64 = 1 << 20;

    #[derive(Default)]
    struct Files(HashMap<String, Arc<MemoryDevice>>);

    impl ImageFiles for Files {
        fn open(&self, path: &str) -> Result<Arc<dyn BlockDevice>> {
            match self.0.get(&path.to_lowercase()) {
                Some(file) => Ok(file.clone()),
                None => Err(BlockError::io(path, std::io::Error::from(ErrorKind::NotFound))),
            }
        }
        fn parents(&self, child: &str, link: &ParentLink) -> Vec<String> {
            windows_parents(child, link)
        }
        fn key(&self, path: &str) -> String {
            path.to_lowercase()
        }
    }

    impl Files {
        /// Makes an image that holds `byte` in its block `number`; answers with its identity.
        fn add(
            &mut self,
            path: &str,
            parent: Option<(&str, String)>,
            number: u64,
            byte: u8,
        ) -> String {
            let parent = parent.map(|(name, identity)| VhdxParent {
                identity,
                disk_id: None,
                relative_path: None,
                absolute_path: Some(name.into()),
                volume_path: None,
                device: Arc::new(MemoryDevice::new(8 << 20)),
            });
            let file = Arc::new(MemoryDevice::new(0));
            let disk_id = Some("5c39b92d-1d5a-4cc6-a8c5-3d9a7c1f9b10".to_owned());
            let options = VhdxCreateOptions { parent, disk_id, ..VhdxCreateOptions::new(8 * MIB) };
            let writer = VhdxWriter::create_device(file.clone(), &options).unwrap();
            writer.write_at(&[byte; 4096], number * 2 * MIB).unwrap();
            writer.finish().unwrap();
            self.0.insert(path.to_lowercase(), file.clone());
            identity(&*file, Format::Vhdx).unwrap().unwrap()
        }
    }

    #[test]
    fn chains_are_read_through_files_of_another_system() {
        let mut files = Files::default();
        let base = files.add(r"C:\VMs\web.vhdx", None, 0, 1);
        let middle = files.add(r"C:\VMs\web_1.avhdx", Some((r"C:\VMs\web.vhdx", base)), 1, 2);
        // Moved since: found beside its child.
        files.add(r"C:\VMs\web_2.avhdx", Some((r"D:\Old\web_1.avhdx", middle)), 2, 3);
        let chain = open_chain_in(&files, r"C:\VMs\web_2.avhdx").unwrap();
        let paths: Vec<_> = chain.iter().map(|layer| layer.path.to_lowercase()).collect();
        assert_eq!(paths, [r"c:\vms\web_2.avhdx", r"c:\vms\web_1.avhdx", r"c:\vms\web.vhdx"]);
        assert_eq!(
            chain[2].info.identifiers["virtual_disk_id"],
            "5c39b92d-1d5a-4cc6-a8c5-3d9a7c1f9b10"
        );
        for (number, byte) in [(0, 1), (1, 2), (2, 3), (3, 0)] {
            let mut found = [9; 4096];
            chain[0].image.read_at(&mut found, number * 2 * MIB).unwrap();
            assert_eq!(found, [byte; 4096]);
        }
        let writer = files.0[r"c:\vms\web_2.avhdx"].clone();
        let writer = open_writer_in(&files, r"C:\VMs\web_2.avhdx", writer).unwrap();
        let mut found = [9; 4096];
        writer.read_at(&mut found, 0).unwrap();
        assert_eq!(found, [1; 4096]);
    }

    #[test]
    fn a_replaced_or_missing_parent_is_refused() {
        let mut files = Files::default();
        let base = files.add(r"C:\VMs\web.vhdx", None, 0, 1);
        files.add(r"C:\VMs\web_1.avhdx", Some((r"C:\VMs\web.vhdx", base)), 1, 2);
        files.add(r"C:\VMs\web.vhdx", None, 0, 7);
        let error = open_chain_in(&files, r"C:\VMs\web_1.avhdx").err().unwrap();
        assert!(error.to_string().contains("changed or replaced"), "{error}");
        files.0.remove(r"c:\vms\web.vhdx");
        let error = open_chain_in(&files, r"C:\VMs\web_1.avhdx").err().unwrap();
        assert_eq!(error.io_kind(), Some(ErrorKind::NotFound), "{error}");
        let raw = Arc::new(MemoryDevice::new(1 << 20));
        files.0.insert(r"c:\vms\x.vhdx".into(), raw);
        let error = open_chain_in(&files, r"C:\VMs\x.vhdx").err().unwrap();
        assert!(error.to_string().contains("raw"), "{error}");
    }
}
