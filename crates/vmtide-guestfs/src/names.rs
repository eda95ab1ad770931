//! From inodes to paths, as Unix has them: directories are searched for the inodes asked for, and then upwards, each directory naming
//! its parent as `..`.

use crate::found::{Touched, printable};
use crate::{FoundFile, MAX_NAMES};
use std::collections::{BTreeSet, HashMap};
use vmtide_block::{CancelToken, Result};

/// The deepest path that is followed; beyond, and in circles, it begins with `…`.
const MAX_DEPTH: usize = 256;

/// The most directories that names are looked for in.
pub(crate) const MAX_DIRECTORIES: usize = 1 << 23;

/// The most bytes of one directory that are read.
pub(crate) const MAX_DIRECTORY_BYTES: u64 = 1 << 30;

/// A file system's directories.
pub(crate) trait Directories {
    /// The inode of the first.
    fn root(&self) -> u64;

    /// Hands over the inodes and names of a directory, `..` among the first, while `take` says to go on.
    fn for_each_name(
        &mut self,
        directory: u64,
        take: &mut dyn FnMut(u64, &[u8]) -> bool,
    ) -> Result<()>;
}

/// A name of a file and the directory it is in.
type Link = (u64, String);

/// Finds names.
struct Names<'a, D> {
    source: &'a mut D,
    links: HashMap<u64, Vec<Link>>,
    /// Of directories, once they are known.
    paths: HashMap<u64, String>,
}

/// The files that were touched with their names, by path. `directories` are all, in rising order; `label` knows inodes that are
/// no files.
///
/// # Errors
/// Those of the disk; cancelled.
pub(crate) fn named(
    source: &mut impl Directories,
    touched: Touched,
    directories: &[u64],
    label: &dyn Fn(u64) -> Option<String>,
    cancel: &CancelToken,
) -> Result<Vec<FoundFile>> {
    let mut names = Names { source, links: HashMap::new(), paths: HashMap::new() };
    let wanted: BTreeSet<u64> = touched.files.keys().map(|(number, _)| *number).collect();
    names.look_for(&wanted, directories, cancel)?;
    let mut files = Vec::with_capacity(touched.files.len());
    for ((number, _), ranges) in touched.files {
        cancel.check()?;
        let mut paths = match label(number) {
            _ if number == names.source.root() => vec!["/".to_owned()],
            Some(label) => vec![label],
            None => names.paths_of(number)?,
        };
        paths.truncate(MAX_NAMES);
        let path = if paths.is_empty() { format!("[inode {number}]") } else { paths.remove(0) };
        let is_directory = directories.binary_search(&number).is_ok();
        files.push(FoundFile { path, other_paths: paths, is_directory, ranges });
    }
    files.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(files)
}

impl<D: Directories> Names<'_, D> {
    fn look_for(
        &mut self,
        wanted: &BTreeSet<u64>,
        directories: &[u64],
        cancel: &CancelToken,
    ) -> Result<()> {
        if wanted.is_empty() {
            return Ok(());
        }
        for directory in directories {
            cancel.check()?;
            let links = &mut self.links;
            self.source.for_each_name(*directory, &mut |inode, name| {
                if wanted.contains(&inode) && !is_own(name) {
                    let links = links.entry(inode).or_default();
                    if links.len() < MAX_NAMES {
                        links.push((*directory, text(name)));
                    }
                }
                true
            })?;
        }
        Ok(())
    }

    /// The paths of an inode that was looked for; none where no directory has it.
    fn paths_of(&mut self, inode: u64) -> Result<Vec<String>> {
        let links = self.links.get(&inode).cloned().unwrap_or_default();
        let mut paths = Vec::with_capacity(links.len());
        for (directory, name) in links {
            paths.push(format!("{}{name}", self.path_of_directory(directory)?));
        }
        Ok(paths)
    }

    /// With `/` at the end.
    fn path_of_directory(&mut self, directory: u64) -> Result<String> {
        let mut names: Vec<(u64, String)> = Vec::new();
        let mut at = directory;
        let mut path = loop {
            if at == self.source.root() {
                break "/".to_owned();
            }
            if let Some(path) = self.paths.get(&at) {
                break path.clone();
            }
            let link = if names.len() < MAX_DEPTH { self.link_of_directory(at)? } else { None };
            let Some((parent, name)) = link else { break format!("…/[inode {at}]/") };
            names.push((at, name));
            at = parent;
        };
        for (inode, name) in names.into_iter().rev() {
            path = format!("{path}{name}/");
            self.paths.insert(inode, path.clone());
        }
        Ok(path)
    }

    /// A directory's parent, and its name there.
    fn link_of_directory(&mut self, directory: u64) -> Result<Option<Link>> {
        let mut parent = None;
        self.source.for_each_name(directory, &mut |inode, name| {
            parent = if name == b".." { Some(inode) } else { None };
            parent.is_none()
        })?;
        let Some(parent) = parent.filter(|parent| *parent != directory) else { return Ok(None) };
        let mut found = None;
        self.source.for_each_name(parent, &mut |inode, name| {
            if inode == directory && !is_own(name) {
                found = Some((parent, text(name)));
            }
            found.is_none()
        })?;
        Ok(found)
    }
}

fn is_own(name: &[u8]) -> bool {
    name == b"." || name == b".."
}

fn text(name: &[u8]) -> String {
    printable(&String::from_utf8_lossy(name))
}
