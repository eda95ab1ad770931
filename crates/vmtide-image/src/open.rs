//! Opening an image with all the files it consists of.
//!
//! An image names its backing file and its external data file, and whoever wrote the image chose
//! those names. Following them blindly lets a guest or an uploader read any file of the host
//! through its own disk, so it happens only by an explicit [`BackingPolicy`]; and the format of a
//! backing file is taken from the image's header or from the caller, never probed.

use crate::elsewhere::leads_elsewhere;
use crate::format::{Format, probe_file};
use crate::parent::{ParentLink, find_named, find_parent, in_another_case, last_name, real_path};
use crate::qcow2::header::{Header, incompatible};
use crate::qcow2::{Companions, Qcow2Image, Qcow2Writer};
use crate::vmdk::{ExtentFiles, VmdkImage, VmdkWriter};
use crate::{DiskImage, ImageWriter, vhd, vhdx, vmdk};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use vmtide_block::{BlockDevice, BlockError, OpenMode, RawDevice, Result, WritableBlockDevice};

/// The most images in one chain. QEMU has no limit and a stack to lose; nobody has chains this long.
pub const MAX_CHAIN_DEPTH: usize = 64;

/// Whether the files that an image names are opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BackingPolicy {
    /// Never: an image that needs another file is refused. The right choice for images from
    /// anywhere else.
    #[default]
    Refuse,
    /// Only plain files in the directory of the image that names them, and not through symbolic
    /// links. On Windows, no name on another machine is even looked up.
    SameDirectory,
    /// Any file the process can open. For images whose every writer is trusted.
    Allow,
}

/// How to open an image.
#[derive(Clone, Default)]
pub struct OpenOptions {
    /// The format; probed by content where it is not given. Give it for a disk whose guest is not
    /// trusted: the guest of a raw disk can write any signature.
    pub format: Option<Format>,
    /// Whether the files the image names are opened, down the whole chain.
    pub backing: BackingPolicy,
    /// The format of backing files whose image does not give it (old images do not).
    pub backing_format: Option<Format>,
    /// What to use as the backing disk of the image instead of the file it names; the policy is
    /// not asked.
    pub backing_device: Option<Arc<dyn BlockDevice>>,
    /// Directories in which parents, extent files and data files are looked for by their file name, after the
    /// image's own. The user named them, so they are searched whatever the policy.
    pub search: Vec<PathBuf>,
    /// Takes a parent that does not say of itself what the child wants. For rescuing data: what is
    /// read may be a mixture of two moments.
    pub any_parent: bool,
    /// Opens no file through a symbolic link: for a path that the caller has resolved, where somebody else may exchange
    /// files meanwhile. See [`RawDevice::open_resolved`] for what each system looks at.
    pub no_links: bool,
}

impl OpenOptions {
    /// One of the files of the image.
    pub(crate) fn file(&self, path: &Path, mode: OpenMode) -> Result<RawDevice> {
        if self.no_links {
            RawDevice::open_resolved(path, mode)
        } else {
            RawDevice::open(path, mode)
        }
    }

    /// Whether the path of an image says where it is, and is not looked up another time: a link that came into it since
    /// the caller resolved it would lead to another directory. Where opening itself looks for no links (Windows), all that
    /// an image names is looked up.
    const fn keeps_paths(&self) -> bool {
        self.no_links && !cfg!(windows)
    }

    /// The directory of the image at `image`, in which the files lie that it names by relative paths.
    pub(crate) fn directory_of(&self, image: &Path) -> Result<PathBuf> {
        let real = if self.keeps_paths() { image.to_path_buf() } else { real_path(image)? };
        Ok(real.parent().map_or_else(PathBuf::new, Path::to_path_buf))
    }

    /// Whether `path` is that of a plain file in `directory`, and of no link.
    fn is_plain_in(&self, directory: &Path, path: &Path) -> Result<bool> {
        let lies_there =
            |path: &Path| path.parent() == Some(directory) && path.file_name().is_some();
        if self.keeps_paths() {
            // One that becomes a link later is not opened.
            return Ok(lies_there(path) && !path.is_symlink());
        }
        // A symbolic link is followed by `real_path` and then no longer lies where it was.
        let real = real_path(path)?;
        Ok(lies_there(&real) && real.file_name() == path.file_name())
    }
}

/// One image of an open chain.
#[derive(Clone)]
pub struct Layer {
    /// Where it was opened.
    pub path: PathBuf,
    /// The image, reading through the layers below it.
    pub image: Arc<dyn DiskImage>,
}

/// Opens the image at `path` for reading, with its backing chain.
///
/// # Errors
/// [`BlockError::Damaged`] and [`BlockError::Unsupported`] as the format's reader says, and where
/// the policy, a missing backing format, a loop or a chain of more than [`MAX_CHAIN_DEPTH`] images
/// forbids it.
pub fn open_read_only(
    path: impl AsRef<Path>,
    options: &OpenOptions,
) -> Result<Arc<dyn BlockDevice>> {
    let image = Chain::new(options).open(path.as_ref(), options.format, true)?;
    Ok(image)
}

/// Opens the image at `path` with its chain, and names every layer: the image itself first, the
/// base last. With [`OpenOptions::backing_device`] there is one layer.
///
/// # Errors
/// As [`open_read_only`].
pub fn open_chain(path: impl AsRef<Path>, options: &OpenOptions) -> Result<Vec<Layer>> {
    let mut chain = Chain::new(options);
    chain.open(path.as_ref(), options.format, true)?;
    // The deepest was opened first.
    chain.layers.reverse();
    Ok(chain.layers)
}

/// Opens the disk as it was in the internal snapshot of the qcow2 image at `path` with this id or
/// else this name, with the image's chain.
///
/// # Errors
/// As [`open_read_only`]; [`BlockError::Unsupported`] where the image is not qcow2 or has no such
/// snapshot.
pub fn open_snapshot(
    path: impl AsRef<Path>,
    options: &OpenOptions,
    id_or_name: &str,
) -> Result<Arc<dyn BlockDevice>> {
    let path = path.as_ref();
    let file = Arc::new(options.file(path, OpenMode::ReadOnly)?);
    let format = options.format.map_or_else(|| probe_file(path, &file), Ok)?;
    if format != Format::Qcow2 {
        return Err(BlockError::unsupported(
            path.display().to_string(),
            format!("is a {format} image: only qcow2 images have internal snapshots"),
        ));
    }
    let mut chain = Chain::new(options);
    chain.enter(path)?;
    let image = chain.open_qcow2(path, file, true)?;
    Ok(Arc::new(image.open_snapshot(id_or_name)?))
}

/// Opens the image at `path` for writing; its backing chain is opened for reading. Nothing else
/// may have it open.
///
/// # Errors
/// As [`open_read_only`], and where the image must be repaired before it is written.
pub fn open_writable(
    path: impl AsRef<Path>,
    options: &OpenOptions,
) -> Result<Arc<dyn ImageWriter>> {
    let path = path.as_ref();
    let file = Arc::new(options.file(path, OpenMode::ReadWrite)?);
    let mut chain = Chain::new(options);
    chain.enter(path)?;
    Ok(match options.format.map_or_else(|| probe_file(path, &file), Ok)? {
        Format::Raw => file,
        Format::Qcow2 => {
            let header = Header::read(&*file)?;
            let backing = chain.backing(path, &header, true)?;
            let data_file = match chain.data_file_path(path, &header)? {
                Some(path) => Some(Arc::new(options.file(&path, OpenMode::ReadWrite)?)
                    as Arc<dyn WritableBlockDevice>),
                None => None,
            };
            Arc::new(Qcow2Writer::open_device(file, backing, data_file)?)
        }
        Format::Vhdx => {
            let parent = chain.parent(path, vhdx::parent_link(&*file)?, true)?;
            Arc::new(vhdx::VhdxWriter::open_device(file, parent)?)
        }
        Format::Vhd => {
            let parent = chain.parent(path, vhd::parent_link(&*file)?, true)?;
            Arc::new(vhd::VhdWriter::open_device(file, parent)?)
        }
        Format::Vmdk => {
            let parent = chain.parent(path, vmdk::parent_link(&*file)?, true)?;
            let files = chain.extent_files(path);
            Arc::new(VmdkWriter::open_device(file, &files, parent)?)
        }
    })
}

/// The state of opening one chain.
struct Chain<'a> {
    options: &'a OpenOptions,
    /// The real paths on the way down, for finding loops.
    seen: Vec<PathBuf>,
    /// The layers that are open, the deepest first.
    layers: Vec<Layer>,
}

impl<'a> Chain<'a> {
    fn new(options: &'a OpenOptions) -> Self {
        Self { options, seen: Vec::new(), layers: Vec::new() }
    }

    fn open(
        &mut self,
        path: &Path,
        format: Option<Format>,
        is_top: bool,
    ) -> Result<Arc<dyn DiskImage>> {
        self.enter(path)?;
        let file = Arc::new(self.options.file(path, OpenMode::ReadOnly)?);
        let image: Arc<dyn DiskImage> = match format.map_or_else(|| probe_file(path, &file), Ok)? {
            Format::Raw => file,
            Format::Qcow2 => Arc::new(self.open_qcow2(path, file, is_top)?),
            Format::Vhdx => {
                let parent = self.parent(path, vhdx::parent_link(&*file)?, is_top)?;
                Arc::new(vhdx::VhdxImage::open_device(file, parent)?)
            }
            Format::Vhd => {
                let parent = self.parent(path, vhd::parent_link(&*file)?, is_top)?;
                Arc::new(vhd::VhdImage::open_device(file, parent)?)
            }
            Format::Vmdk => {
                let parent = self.parent(path, vmdk::parent_link(&*file)?, is_top)?;
                let files = self.extent_files(path);
                Arc::new(VmdkImage::open_device(file, &files, parent)?)
            }
        };
        self.layers.push(Layer { path: path.to_path_buf(), image: image.clone() });
        Ok(image)
    }

    fn open_qcow2(
        &mut self,
        path: &Path,
        file: Arc<RawDevice>,
        is_top: bool,
    ) -> Result<Qcow2Image> {
        let header = Header::read(&*file)?;
        let backing = self.backing(path, &header, is_top)?;
        let data_file = match self.data_file_path(path, &header)? {
            Some(path) => {
                let file = self.options.file(&path, OpenMode::ReadOnly)?;
                Some(Arc::new(file) as Arc<dyn BlockDevice>)
            }
            None => None,
        };
        Qcow2Image::open_device(file, Companions { backing, data_file })
    }

    fn enter(&mut self, path: &Path) -> Result<()> {
        let real = real_path(path)?;
        let refuse = |detail: String| Err(BlockError::damaged(path.display().to_string(), detail));
        if self.seen.contains(&real) {
            return refuse("the backing chain comes back to this image".into());
        }
        if self.seen.len() >= MAX_CHAIN_DEPTH {
            return refuse(format!("the backing chain has more than {MAX_CHAIN_DEPTH} images"));
        }
        self.seen.push(real);
        Ok(())
    }

    /// Opens the parent that `link` in the image at `child` means; `None` where there is none or
    /// the policy refuses (the reader then says what is missing).
    fn parent(
        &mut self,
        child: &Path,
        link: Option<ParentLink>,
        is_top: bool,
    ) -> Result<Option<Arc<dyn BlockDevice>>> {
        let Some(link) = link else {
            return Ok(None);
        };
        if let Some(device) = self.options.backing_device.clone().filter(|_| is_top) {
            return Ok(Some(device));
        }
        match find_parent(child, &link, self.options)? {
            Some(path) => Ok(Some(self.open(&path, link.format, false)?)),
            None => Ok(None),
        }
    }

    /// Opens the backing file that `header` names, where the policy allows; `None` where there is
    /// none or the policy refuses (the reader then says what is missing).
    fn backing(
        &mut self,
        overlay: &Path,
        header: &Header,
        is_top: bool,
    ) -> Result<Option<Arc<dyn BlockDevice>>> {
        if let Some(device) = self.options.backing_device.clone().filter(|_| is_top) {
            return Ok(Some(device));
        }
        let Some(name) = &header.backing_name else {
            return Ok(None);
        };
        let Some(path) = find_named(self.options, overlay, "backing file", name)? else {
            return Ok(None);
        };
        let format = match (&header.backing_format, self.options.backing_format) {
            (Some(format), _) => format.parse()?,
            (None, Some(format)) => format,
            (None, None) => {
                return Err(BlockError::unsupported(
                    overlay.display().to_string(),
                    format!(
                        "does not say the format of its backing file {name:?}, and probing it \
                         would trust a guest; give the format"
                    ),
                ));
            }
        };
        Ok(Some(self.open(&path, Some(format), false)?))
    }

    fn data_file_path(&self, image: &Path, header: &Header) -> Result<Option<PathBuf>> {
        match &header.data_file_name {
            Some(name) if header.has(incompatible::EXTERNAL_DATA) => {
                find_named(self.options, image, "data file", name)
            }
            _ => Ok(None),
        }
    }

    fn extent_files(&self, image: &Path) -> PolicyFiles<'a> {
        extent_files(image, self.options)
    }
}

/// The extent files of the VMDK at `image`, as far as the policy allows.
pub(crate) fn extent_files<'a>(image: &Path, options: &'a OpenOptions) -> PolicyFiles<'a> {
    PolicyFiles { image: image.to_path_buf(), options }
}

/// The extent files of a VMDK, as far as the policy allows.
pub(crate) struct PolicyFiles<'a> {
    image: PathBuf,
    options: &'a OpenOptions,
}

impl PolicyFiles<'_> {
    /// Where the extent file called `name` is. Where it is not there, one of its last name beside the
    /// descriptor or in a directory to search is taken: disks are copied away from the data store or
    /// the Windows path that their descriptors name; at last one whose name has another case.
    fn path(&self, name: &str) -> Result<PathBuf> {
        let named = self.named(name);
        if named.as_ref().is_ok_and(|path| path.exists()) {
            return named;
        }
        let Some(last) = last_name(name) else {
            return named;
        };
        let search = || self.options.search.iter();
        let beside = self.named(last).into_iter();
        let mut exact = beside.chain(search().map(|directory| directory.join(last)));
        exact.find(|path| path.is_file()).or_else(|| self.in_another_case(last)).map_or(named, Ok)
    }

    fn in_another_case(&self, last: &str) -> Option<PathBuf> {
        let own = self.options.directory_of(&self.image).ok();
        let beside = own.and_then(|directory| in_another_case(&directory, last));
        // What the policy allows is asked of this name as of any other.
        let allowed = beside.and_then(|path| self.named(path.file_name()?.to_str()?).ok());
        let mut searched = self.options.search.iter().filter_map(|at| in_another_case(at, last));
        allowed.or_else(|| searched.next())
    }

    fn named(&self, name: &str) -> Result<PathBuf> {
        resolve(self.options, &self.image, "extent file", name)?.ok_or_else(|| {
            BlockError::unsupported(
                self.image.display().to_string(),
                format!(
                    "keeps its data in the extent file {name:?}, which was not opened; allow it \
                     (backing policy) if you trust the image"
                ),
            )
        })
    }
}

impl ExtentFiles for PolicyFiles<'_> {
    fn open(&self, name: &str) -> Result<Arc<dyn BlockDevice>> {
        Ok(Arc::new(self.options.file(&self.path(name)?, OpenMode::ReadOnly)?))
    }

    fn open_writable(&self, name: &str) -> Result<Arc<dyn WritableBlockDevice>> {
        Ok(Arc::new(self.options.file(&self.path(name)?, OpenMode::ReadWrite)?))
    }

    fn place(&self, name: Option<&str>) -> Option<String> {
        let path = match name {
            Some(name) => self.path(name).ok()?,
            None => self.image.clone(),
        };
        vmtide_block::files::file_identity(&path)
    }
}

/// Whether a name means something else than a file: QEMU takes a colon before the first slash as a
/// protocol (nbd://, json:{...}, rbd:...). On Windows a colon behind the letter of a drive names a stream
/// beside the content.
pub(crate) fn is_no_plain_path(name: &str) -> bool {
    if !cfg!(windows) {
        return name.split('/').next().is_some_and(|head| head.contains(':'));
    }
    let without_drive = match name.as_bytes() {
        [letter, b':', b'/' | b'\\', ..] if letter.is_ascii_alphabetic() => &name[2..],
        _ => name,
    };
    without_drive.contains(':')
}

/// The path that `name` in `image` means, where the policy allows to open it. Relative names
/// start at the image's directory; QEMU does so for backing files but takes data files from
/// its working directory, which for a file inside an image means something else every time.
pub(crate) fn resolve(
    options: &OpenOptions,
    image: &Path,
    what: &str,
    name: &str,
) -> Result<Option<PathBuf>> {
    let refuse = |detail: &str| {
        Err(BlockError::unsupported(
            image.display().to_string(),
            format!("names the {what} {name:?}, {detail}"),
        ))
    };
    if options.backing == BackingPolicy::Refuse {
        return Ok(None);
    }
    let plain = name.strip_prefix("file:").unwrap_or(name);
    if is_no_plain_path(plain) {
        return refuse("which is not a plain path");
    }
    let directory = options.directory_of(image)?;
    let path = directory.join(plain);
    if options.backing == BackingPolicy::SameDirectory {
        // Before anything touches it: Windows would log in to the server that it names.
        if cfg!(windows) && leads_elsewhere(plain, &directory.to_string_lossy()) {
            return refuse(
                "which is on another machine or a device; allow it if you trust the image",
            );
        }
        if !options.is_plain_in(&directory, &path)? {
            return refuse("which is not a plain file in the image's own directory");
        }
    }
    Ok(Some(path))
}

#[cfg(target_os = "linux")]
#[cfg(test)]
mod tests {
    use super::*;
    use crate::{CreateOptions, create_image, identity, list_chain};
    use std::os::unix::fs::symlink;

    /// The served directory `root` with `vm`, and `outside`, which has files of the same names.
    struct Tree {
        _directory: tempfile::TempDir,
        root: PathBuf,
        outside: PathBuf,
        options: OpenOptions,
    }

    impl Tree {
        fn new() -> Self {
            let directory = tempfile::tempdir().unwrap();
            let at = std::fs::canonicalize(directory.path()).unwrap();
            let (root, outside) = (at.join("root"), at.join("outside"));
            for place in [&root.join("vm"), &outside] {
                std::fs::create_dir_all(place).unwrap();
                for name in ["web.qcow2", "db.qcow2", "flat.vmdk"] {
                    std::fs::write(place.join(name), [1; 512]).unwrap();
                }
            }
            let options = OpenOptions {
                backing: BackingPolicy::SameDirectory,
                no_links: true,
                ..OpenOptions::default()
            };
            Self { _directory: directory, root, outside, options }
        }

        /// The directory of the image becomes a link to `outside`, or what it was.
        fn exchange(&self, away: bool) {
            let (vm, held) = (self.root.join("vm"), self.root.join("held"));
            if away {
                std::fs::rename(&vm, &held).unwrap();
                symlink(&self.outside, &vm).unwrap();
            } else {
                std::fs::remove_file(&vm).unwrap();
                std::fs::rename(&held, &vm).unwrap();
            }
        }

        fn names(&self, name: &str) -> Result<Option<PathBuf>> {
            resolve(&self.options, &self.root.join("vm/web.qcow2"), "backing file", name)
        }
    }

    #[test]
    fn a_directory_exchanged_for_a_link_leads_nowhere() {
        let tree = Tree::new();
        let vm = tree.root.join("vm");
        let files = extent_files(&vm.join("web.vmdk"), &tree.options);
        assert!(files.open("flat.vmdk").is_ok() && files.open_writable("flat.vmdk").is_ok());
        tree.exchange(true);
        assert!(files.open("flat.vmdk").is_err() && files.open_writable("flat.vmdk").is_err());
        // What is found now is opened when the link may be gone again: it must lie in the directory all the same.
        let found = tree.names("db.qcow2").unwrap().unwrap();
        assert_eq!(found, vm.join("db.qcow2"));
        assert!(tree.options.file(&found, OpenMode::ReadOnly).is_err());
        let link = ParentLink { names: vec!["db.qcow2".into()], ..ParentLink::default() };
        let parent = find_parent(&vm.join("web.qcow2"), &link, &tree.options).unwrap();
        assert_eq!(parent, Some(vm.join("db.qcow2")));
        tree.exchange(false);
        assert!(tree.options.file(&found, OpenMode::ReadWrite).is_ok());
    }

    #[test]
    fn what_a_parent_says_of_itself_is_not_read_through_a_link() {
        let tree = Tree::new();
        let base = tree.outside.join("base.vhdx");
        create_image(&base, &CreateOptions::new(Format::Vhdx, 1 << 20)).unwrap().finish().unwrap();
        let device = RawDevice::open(&base, OpenMode::ReadOnly).unwrap();
        let link = ParentLink {
            names: vec!["base.vhdx".into()],
            format: Some(Format::Vhdx),
            identities: identity(&device, Format::Vhdx).unwrap().into_iter().collect(),
        };
        let child = tree.root.join("vm/web.qcow2");
        tree.exchange(true);
        assert!(find_parent(&child, &link, &tree.options).is_err());
        let search = OpenOptions { search: vec![tree.root.join("vm")], ..tree.options.clone() };
        assert!(find_parent(&child, &link, &search).is_err());
        let follows = OpenOptions { no_links: false, ..tree.options.clone() };
        assert_eq!(find_parent(&child, &link, &follows).unwrap(), Some(base));
    }

    #[test]
    fn only_plain_names_lie_in_the_directory() {
        let tree = Tree::new();
        let vm = tree.root.join("vm");
        symlink("db.qcow2", vm.join("alias")).unwrap();
        std::fs::create_dir(vm.join("sub")).unwrap();
        std::fs::write(vm.join("sub/db.qcow2"), "x").unwrap();
        let outside = tree.outside.join("db.qcow2");
        for name in [
            "..",
            "sub/..",
            ".",
            "",
            "sub/db.qcow2",
            "sub/../db.qcow2",
            "../vm/db.qcow2",
            "../../outside/db.qcow2",
            outside.to_str().unwrap(),
            "alias",
        ] {
            assert!(tree.names(name).is_err(), "{name:?}: {:?}", tree.names(name));
        }
        for name in
            ["db.qcow2", "./db.qcow2", "file:db.qcow2", vm.join("db.qcow2").to_str().unwrap()]
        {
            assert_eq!(tree.names(name).unwrap(), Some(vm.join("db.qcow2")), "{name:?}");
        }
    }

    #[test]
    fn a_chain_is_listed_and_checked_without_following_links() {
        let tree = Tree::new();
        let path = tree.root.join("vm/raw");
        std::fs::write(tree.outside.join("raw"), [1; 512]).unwrap();
        let options = OpenOptions { format: Some(Format::Raw), ..tree.options.clone() };
        tree.exchange(true);
        assert!(list_chain(&path, &options).is_err());
        assert!(crate::check_image(&path, &options, crate::Repair::Nothing).is_err());
        let follows = OpenOptions { no_links: false, ..options };
        assert_eq!(list_chain(&path, &follows).unwrap().len(), 1);
        assert!(crate::check_image(&path, &follows, crate::Repair::Nothing).is_ok());
    }
}
