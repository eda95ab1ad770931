//! Which files clients may reach: those below the configured directories, whatever a client writes.
//!
//! A path goes through four gates. **The name** is checked as text, by the rules of the platform
//! ([`windows_names`], [`unix_names`]): no `..`, no devices, no streams, no short names, nothing relative. **The
//! place** it names must be inside a root, as text, so that nothing outside is ever touched, not even to learn
//! whether it is there. **The file** it turns out to be, links followed, must be inside a root, too, and a regular
//! file or block device. **The same file** must still be there after it was opened ([`Located::recheck`]): on Linux
//! the kernel is asked to walk from the root without leaving it and without any link (`openat2`), and the file
//! that it finds is held from before the provider opens it until after, so that its number stays its own. For a
//! file to be made the directory is looked at in the same way ([`Vacant::recheck`]).
//!
//! On Windows the directories from the root to the file are held from before the provider opens it until after, such that
//! none of them can be renamed, removed or made a link meanwhile; the file is known by its number on its volume.
//!
//! Image files are then opened without following links that came there meanwhile ([`no_links`](vmtide_image::OpenOptions::no_links)).
//!
//! **What is not covered:** providers open by path, and what they opened is not compared with what was held. Whoever
//! may write in a root can, on Windows with the right to make symbolic links, exchange a file for a link before it is opened
//! and back before it is looked at again, and have the agent read or write another file of the host as a disk, with the
//! agent's rights. On Linux he can exchange it for another real file that he may move or link there, and have the files that
//! are kept beside a disk, of tracking, read through links; and a file that is made through an exchanged directory is noticed, but it
//! has been made. Where others than those who run the host may write in a root, the agent's account should have no rights
//! outside of it.
//!
//! Every refusal looks like a file that is not there.

pub mod unix_names;
pub mod windows_names;

mod pin;

use crate::error::{AgentError, Result};
use crate::vms::HostPath;
use pin::Pin;
use std::fmt;
use std::io;
use std::path::{Component, Path, PathBuf};
use thiserror::Error;

/// Why a path is not served. For the log of the agent; clients learn only that there is no such disk.
#[derive(Debug, Error)]
pub enum Refusal {
    /// The text is no path that is served.
    #[error("{0}")]
    Name(&'static str),
    /// It names a place outside of all roots.
    #[error("is outside of the served directories")]
    Outside,
    /// It leads through links to a place outside of all roots.
    #[error("leads outside of the served directories")]
    LeadsOutside,
    /// It is a directory, a pipe, a character device.
    #[error("is neither a file nor a block device")]
    NoFile,
    /// A file shall be made in what is no directory.
    #[error("is in no directory")]
    NoDirectory,
    /// Another file is there now.
    #[error("was exchanged while it was opened")]
    Exchanged,
    /// It is not there, or cannot be looked at.
    #[error("{0}")]
    Io(#[from] io::Error),
}

/// The directories whose disks are served.
#[derive(Clone)]
pub struct Roots {
    roots: Vec<Root>,
    /// How names of Windows are found where this is no Windows; none where there are no such files.
    host_path: Option<HostPath>,
}

impl fmt::Debug for Roots {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Roots").field("roots", &self.roots).finish_non_exhaustive()
    }
}

/// One directory.
#[derive(Clone, Debug)]
struct Root {
    /// As the operator wrote it, made absolute: clients write it the same way.
    configured: PathBuf,
    /// What it is with all links followed, and as the platform's own calls write it.
    real: PathBuf,
}

/// A file inside a root.
#[derive(Debug)]
pub struct Located {
    /// With all links followed.
    path: PathBuf,
    root: PathBuf,
    pin: Pin,
}

/// A place inside a root for a file to be made.
#[derive(Debug)]
pub struct Vacant {
    /// With all links of its directory followed.
    path: PathBuf,
    directory: PathBuf,
    root: PathBuf,
    pin: Pin,
}

impl Roots {
    /// These directories.
    ///
    /// # Errors
    /// Where there are none, or one is not there or no directory.
    pub fn new(directories: &[PathBuf]) -> Result<Self> {
        if directories.is_empty() {
            return Err(AgentError::usage("no directory to serve: give at least one --root"));
        }
        let roots = directories.iter().map(|directory| Root::new(directory));
        Ok(Self { roots: roots.collect::<Result<_>>()?, host_path: None })
    }

    /// The same, where the platform has names of its own for files: a stand-in for a host of Windows. What a name
    /// means must lie below the directories like any other.
    pub fn with_host_path(self, host_path: Option<HostPath>) -> Self {
        Self { host_path, ..self }
    }

    /// The directories, links followed.
    pub fn directories(&self) -> impl Iterator<Item = &Path> {
        self.roots.iter().map(|root| root.real.as_path())
    }

    /// Finds the file that a client named. Blocks.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn locate(&self, requested: &str) -> std::result::Result<Located, Refusal> {
        let path = self.inside(requested)?;
        let real = plain(std::fs::canonicalize(path)?);
        let root = self.root_of_real(&real).ok_or(Refusal::LeadsOutside)?;
        let pin = Pin::of(root, &real)?;
        if !pin.is_disk() {
            return Err(Refusal::NoFile);
        }
        Ok(Located { root: root.to_path_buf(), path: real, pin })
    }

    /// Finds the place of a file that a client wants to make: its directory must be there, inside a root. Whether
    /// the file is there is not looked at. Blocks.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn locate_new(&self, requested: &str) -> std::result::Result<Vacant, Refusal> {
        let path = self.inside(requested)?;
        let (Some(directory), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(Refusal::Outside);
        };
        let real = plain(std::fs::canonicalize(directory)?);
        let root = self.root_of_real(&real).ok_or(Refusal::LeadsOutside)?;
        let pin = Pin::of(root, &real)?;
        if !pin.is_directory() {
            return Err(Refusal::NoDirectory);
        }
        Ok(Vacant { path: real.join(name), root: root.to_path_buf(), directory: real, pin })
    }

    /// Finds the directory that a client named; a slash at its end does not count. Blocks.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn locate_directory(&self, requested: &str) -> std::result::Result<PathBuf, Refusal> {
        let path = self.inside(requested.trim_end_matches(is_slash))?;
        let real = plain(std::fs::canonicalize(path)?);
        let root = self.root_of_real(&real).ok_or(Refusal::LeadsOutside)?;
        if Pin::of(root, &real)?.is_directory() { Ok(real) } else { Err(Refusal::NoDirectory) }
    }

    /// Makes a directory that a client named, with its parents below the root; one that is there stays as it is.
    /// Blocks.
    ///
    /// # Errors
    /// [`Refusal`]; [`Refusal::LeadsOutside`] where a part that is there leads elsewhere.
    pub fn create_directory(&self, requested: &str) -> std::result::Result<(), Refusal> {
        let requested = requested.trim_end_matches(is_slash);
        let path = self.inside(requested)?;
        let is_there = |path: &&Path| std::fs::symlink_metadata(path).is_ok();
        let there = path.ancestors().find(is_there).ok_or(Refusal::NoDirectory)?;
        let missing = path.strip_prefix(there).map_err(|_| Refusal::Outside)?;
        let mut real = plain(std::fs::canonicalize(there)?);
        self.root_of_real(&real).ok_or(Refusal::LeadsOutside)?;
        for part in missing.components() {
            real.push(part);
            match std::fs::create_dir(&real) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(error.into());
                }
                _ => {}
            }
        }
        // What was exchanged for a link meanwhile is noticed.
        self.locate_directory(requested).map(drop)
    }

    /// The path of a name that is good as text and names a place inside a root.
    fn inside(&self, requested: &str) -> std::result::Result<PathBuf, Refusal> {
        let path = match &self.host_path {
            Some(host_path) if !cfg!(windows) && windows_names::check(requested).is_ok() => {
                host_path(requested)
            }
            _ => parse(requested)?,
        };
        let is_inside =
            |root: &Root| is_below(&path, &root.configured) || is_below(&path, &root.real);
        if self.roots.iter().any(is_inside) { Ok(path) } else { Err(Refusal::Outside) }
    }

    fn root_of_real(&self, real: &Path) -> Option<&Path> {
        self.directories().find(|root| is_below(real, root))
    }
}

/// What parts of a path are parted by.
fn is_slash(c: char) -> bool {
    c == '/' || cfg!(windows) && c == '\\'
}

impl Root {
    fn new(directory: &Path) -> Result<Self> {
        let shown = directory.display();
        let failed = |error| AgentError::io(format!("serve the directory {shown}"), error);
        let configured = std::path::absolute(directory).map_err(failed)?;
        let real = std::fs::canonicalize(&configured).map_err(failed)?;
        if !std::fs::metadata(&real).map_err(failed)?.is_dir() {
            return Err(AgentError::usage(format!("--root {shown}: is no directory")));
        }
        Ok(Self { configured: plain(configured), real: plain(real) })
    }
}

impl Located {
    /// Where it is, with all links followed.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether both are one file, by whichever names they were asked for: links, the case of letters on Windows,
    /// hard links elsewhere.
    pub fn is_same_file(&self, other: &Self) -> bool {
        let is_same_path = is_below(&self.path, &other.path) && is_below(&other.path, &self.path);
        is_same_path || self.pin.is_same(&other.pin)
    }

    /// Succeeds where the path still leads to the same file, without leaving the root. Blocks.
    ///
    /// # Errors
    /// [`Refusal::Exchanged`].
    pub fn recheck(&self) -> std::result::Result<(), Refusal> {
        match Pin::of(&self.root, &self.path) {
            Ok(now) if now.is_same(&self.pin) => Ok(()),
            _ => Err(Refusal::Exchanged),
        }
    }
}

impl Vacant {
    /// Where the file is to be made.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Succeeds where the directory is still the same one and the file is in it now, without any link. Blocks.
    ///
    /// # Errors
    /// [`Refusal::Exchanged`].
    pub fn recheck(&self) -> std::result::Result<(), Refusal> {
        let now = (Pin::of(&self.root, &self.directory), Pin::of(&self.root, &self.path));
        match now {
            (Ok(directory), Ok(file)) if directory.is_same(&self.pin) && file.is_disk() => Ok(()),
            _ => Err(Refusal::Exchanged),
        }
    }
}

/// The path that a client's text means on this platform.
#[cfg(windows)]
fn parse(requested: &str) -> std::result::Result<PathBuf, Refusal> {
    windows_names::check(requested).map(PathBuf::from).map_err(Refusal::Name)
}

/// The path that a client's text means on this platform.
#[cfg(not(windows))]
fn parse(requested: &str) -> std::result::Result<PathBuf, Refusal> {
    unix_names::check(requested).map(PathBuf::from).map_err(Refusal::Name)
}

/// Whether `path` is `root` or below it. Both are absolute and without `..`.
fn is_below(path: &Path, root: &Path) -> bool {
    let mut path = path.components();
    root.components().all(|wanted| path.next().is_some_and(|found| is_same_name(found, wanted)))
}

#[cfg(not(windows))]
fn is_same_name(found: Component<'_>, wanted: Component<'_>) -> bool {
    found == wanted
}

/// Names differ by case only in directories where somebody switched that on, and then the file that a name
/// turns out to be is compared again.
#[cfg(windows)]
fn is_same_name(found: Component<'_>, wanted: Component<'_>) -> bool {
    let (found, wanted) =
        (found.as_os_str().to_string_lossy(), wanted.as_os_str().to_string_lossy());
    windows_names::is_same_name(&found, &wanted)
}

/// A path without the `\\?\` that Windows' own answers begin with, and that its API for virtual disks does not
/// take.
fn plain(path: PathBuf) -> PathBuf {
    if cfg!(windows)
        && let Some(text) = path.to_str()
    {
        return windows_names::without_verbatim(text).into();
    }
    path
}

#[cfg(unix)]
#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    /// A tree with a served directory, and everything around it that must stay out of reach.
    struct Tree {
        directory: tempfile::TempDir,
        roots: Roots,
    }

    impl Tree {
        fn new() -> Self {
            let directory = tempfile::tempdir().unwrap();
            let at = std::fs::canonicalize(directory.path()).unwrap();
            for name in ["disks/vm", "disks2", "other"] {
                std::fs::create_dir_all(at.join(name)).unwrap();
            }
            for name in
                ["disks/a.vhdx", "disks/vm/b.vhdx", "disks2/c.vhdx", "other/secret", "disks/%2e"]
            {
                std::fs::write(at.join(name), b"x").unwrap();
            }
            symlink(at.join("other/secret"), at.join("disks/out")).unwrap();
            symlink("../other/secret", at.join("disks/out-relative")).unwrap();
            symlink(at.join("other"), at.join("disks/out-directory")).unwrap();
            symlink("a.vhdx", at.join("disks/in")).unwrap();
            symlink("vm", at.join("disks/in-directory")).unwrap();
            symlink("loop", at.join("disks/loop")).unwrap();
            symlink("/proc/self/root", at.join("disks/everything")).unwrap();
            symlink("/dev/zero", at.join("disks/zero")).unwrap();
            symlink(at.join("disks"), at.join("link-to-root")).unwrap();
            let _socket = std::os::unix::net::UnixListener::bind(at.join("disks/socket")).unwrap();
            let roots = Roots::new(&[at.join("disks"), at.join("link-to-root")]).unwrap();
            Self { directory, roots }
        }

        fn at(&self, name: &str) -> String {
            let at = std::fs::canonicalize(self.directory.path()).unwrap();
            format!("{}/{name}", at.display())
        }
    }

    #[test]
    fn files_inside_are_found_by_every_name_they_have() {
        let tree = Tree::new();
        for (name, real) in [
            ("disks/a.vhdx", "disks/a.vhdx"),
            ("disks/vm/b.vhdx", "disks/vm/b.vhdx"),
            ("disks//vm///b.vhdx", "disks/vm/b.vhdx"),
            ("disks/in", "disks/a.vhdx"),
            ("disks/in-directory/b.vhdx", "disks/vm/b.vhdx"),
            ("link-to-root/a.vhdx", "disks/a.vhdx"),
            ("disks/%2e", "disks/%2e"),
        ] {
            let located = tree.roots.locate(&tree.at(name)).unwrap();
            assert_eq!(located.path(), Path::new(&tree.at(real)), "{name}");
            located.recheck().unwrap();
        }
        let made = tree.roots.locate_new(&tree.at("disks/in-directory/new.vhdx")).unwrap();
        assert_eq!(made.path(), Path::new(&tree.at("disks/vm/new.vhdx")));
    }

    #[test]
    fn directories_are_found_and_made_inside_only() {
        let tree = Tree::new();
        let find = |name: &str| tree.roots.locate_directory(&tree.at(name));
        for (name, real) in [("disks/", "disks"), ("disks/in-directory", "disks/vm")] {
            assert_eq!(find(name).unwrap(), Path::new(&tree.at(real)), "{name}");
        }
        for name in
            ["disks/a.vhdx", "disks/out-directory", "other", "disks/none", "disks/everything"]
        {
            assert!(find(name).is_err(), "{name}");
        }
        let make = |name: &str| tree.roots.create_directory(&tree.at(name));
        make("disks/new/deep/er").unwrap();
        make("disks/new/deep/er/").unwrap();
        make("disks/in-directory/made").unwrap();
        assert!(Path::new(&tree.at("disks/vm/made")).is_dir());
        for name in [
            "other/new",
            "disks/out-directory/new",
            "disks/a.vhdx/new",
            "disks/a.vhdx",
            "disks/loop/x",
        ] {
            assert!(make(name).is_err(), "{name}");
        }
        assert!(!Path::new(&tree.at("other/new")).exists());
    }

    #[test]
    fn one_file_is_one_by_all_of_its_names() {
        let tree = Tree::new();
        std::fs::hard_link(tree.at("disks/a.vhdx"), tree.at("disks/vm/hard.vhdx")).unwrap();
        let locate = |name: &str| tree.roots.locate(&tree.at(name)).unwrap();
        let file = locate("disks/a.vhdx");
        for name in ["disks//a.vhdx", "disks/in", "link-to-root/a.vhdx", "disks/vm/hard.vhdx"] {
            assert!(file.is_same_file(&locate(name)), "{name}");
        }
        assert!(!file.is_same_file(&locate("disks/vm/b.vhdx")));
    }

    #[test]
    fn a_file_that_was_made_elsewhere_is_noticed() {
        let tree = Tree::new();
        let make = || {
            let vacant = tree.roots.locate_new(&tree.at("disks/vm/new.vhdx")).unwrap();
            assert!(vacant.recheck().is_err(), "nothing was made");
            vacant
        };
        let vacant = make();
        std::fs::write(vacant.path(), b"x").unwrap();
        vacant.recheck().unwrap();
        std::fs::remove_file(vacant.path()).unwrap();

        let vacant = make();
        symlink(tree.at("other/secret"), vacant.path()).unwrap();
        assert!(matches!(vacant.recheck(), Err(Refusal::Exchanged)));
        std::fs::remove_file(vacant.path()).unwrap();

        let vacant = make();
        std::fs::rename(tree.at("disks/vm"), tree.at("disks/old")).unwrap();
        symlink(tree.at("other"), tree.at("disks/vm")).unwrap();
        std::fs::write(vacant.path(), b"x").unwrap();
        assert!(matches!(vacant.recheck(), Err(Refusal::Exchanged)));
        // Also where another directory of the same name is there by then.
        std::fs::remove_file(tree.at("disks/vm")).unwrap();
        std::fs::create_dir(tree.at("disks/vm")).unwrap();
        std::fs::write(vacant.path(), b"x").unwrap();
        assert!(matches!(vacant.recheck(), Err(Refusal::Exchanged)));
    }

    /// What a hostile client could write, below the directory of the tree.
    const INSIDE: &[&str] = &[
        "other/secret",
        "disks/../other/secret",
        "disks/vm/../../other/secret",
        "disks/./a.vhdx",
        "disks/vm/..",
        "disks/..",
        "disks/.",
        "disks",
        "disks/",
        "disks/vm",
        "disks2/c.vhdx",
        "disksx",
        "DISKS/a.vhdx",
        "disks/A.VHDX",
        "disks/out",
        "disks/out-relative",
        "disks/out-directory/secret",
        "disks/everything/etc/passwd",
        "disks/loop",
        "disks/zero",
        "disks/socket",
        "disks/a.vhdx/",
        "disks/a.vhdx/..",
        "disks/a.vhdx/../a.vhdx",
        "disks/a.vhdx\0",
        "disks/a.vhdx\0.raw",
        "disks/%2e%2e/other/secret",
        "disks/..%2fother/secret",
        "disks/..\\other\\secret",
        "disks\\..\\other\\secret",
        "disks/missing",
        "disks/a.vhdx ",
        "disks/a.vhdx.",
        "disks/ a.vhdx",
        "disks/\u{2024}\u{2024}/other/secret",
        "disks/\u{ff0e}\u{ff0e}/other/secret",
        "disks/..\u{2215}other/secret",
        "disks/a.vhdx:stream",
        "link-to-root/../other/secret",
    ];

    /// And without it.
    const ANYWHERE: &[&str] = &[
        "",
        "/",
        ".",
        "..",
        "//",
        "/etc/passwd",
        "//etc/passwd",
        "/dev/zero",
        "/dev/null",
        "/proc/self/environ",
        "/proc/self/root/etc/passwd",
        "etc/passwd",
        "disks/a.vhdx",
        "./disks/a.vhdx",
        "~/a.vhdx",
        "file:///etc/passwd",
        "C:\\VHDS\\a.vhdx",
        "C:a.vhdx",
        "\\\\server\\share\\a.vhdx",
        "\\\\.\\PhysicalDrive0",
        "\\\\?\\C:\\a.vhdx",
        "//?/etc/passwd",
        "//./etc/passwd",
        "nbd://localhost",
        "json:{}",
        "\0",
        "/\0",
        "/dev/fd/0",
        "/dev/stdin",
        "\n",
    ];

    #[test]
    fn nothing_outside_is_reached() {
        let tree = Tree::new();
        let mut attempts: Vec<String> = INSIDE.iter().map(|name| tree.at(name)).collect();
        attempts.extend(ANYWHERE.iter().map(|path| (*path).to_owned()));
        attempts.push(format!("/{}", "a/".repeat(5000)));
        attempts.push(tree.at(&format!("disks/{}", "x".repeat(300))));
        assert!(attempts.len() >= 60, "{}", attempts.len());
        for attempt in attempts {
            let found = tree.roots.locate(&attempt);
            assert!(found.is_err(), "{attempt:?} leads to {found:?}");
        }
    }

    #[test]
    fn new_files_are_not_made_outside() {
        let tree = Tree::new();
        for name in [
            "disks/out-directory/new",
            "disks/../new",
            "disks/vm/../../new",
            "other/new",
            "disks/missing/new",
            "disks/a.vhdx/new",
            "new",
        ] {
            assert!(tree.roots.locate_new(&tree.at(name)).is_err(), "{name}");
        }
    }

    #[test]
    fn a_file_that_is_exchanged_is_noticed() {
        let tree = Tree::new();
        let located = tree.roots.locate(&tree.at("disks/vm/b.vhdx")).unwrap();
        std::fs::rename(tree.at("disks/vm"), tree.at("disks/old")).unwrap();
        symlink(tree.at("other"), tree.at("disks/vm")).unwrap();
        std::fs::write(tree.at("other/b.vhdx"), b"x").unwrap();
        assert!(matches!(located.recheck(), Err(Refusal::Exchanged)));
        let located = tree.roots.locate(&tree.at("disks/a.vhdx")).unwrap();
        std::fs::write(tree.at("disks/new"), b"x").unwrap();
        std::fs::rename(tree.at("disks/new"), tree.at("disks/a.vhdx")).unwrap();
        assert!(matches!(located.recheck(), Err(Refusal::Exchanged)));
    }
}
