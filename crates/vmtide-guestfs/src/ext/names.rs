//! From inodes to paths: directories are searched for the inodes asked for, and then upwards, each directory naming its
//! parent as `..`.

use super::ROOT;
use super::inode::{Inode, Lists, Run};
use super::length;
use super::superblock::Superblock;
use crate::MAX_NAMES;
use crate::bytes::{index, u16_at, u32_at};
use crate::found::printable;
use crate::volume::Volume;
use std::collections::{BTreeSet, HashMap};
use vmtide_block::{CancelToken, Result};

/// The deepest path that is followed; beyond, and in circles, it begins with `…`.
const MAX_DEPTH: usize = 256;

/// The most bytes of one directory that are read.
const MAX_DIRECTORY_BYTES: u64 = 1 << 30;

/// A name of a file and the directory it is in.
type Link = (u32, String);

/// Finds names.
pub(super) struct Names<'a> {
    volume: &'a Volume<'a>,
    superblock: &'a Superblock,
    lists: Lists<'a>,
    links: HashMap<u32, Vec<Link>>,
    /// Of directories, once they are known.
    paths: HashMap<u32, String>,
}

impl<'a> Names<'a> {
    pub(super) fn new(
        volume: &'a Volume<'a>,
        superblock: &'a Superblock,
        lists: Lists<'a>,
    ) -> Self {
        Self { volume, superblock, lists, links: HashMap::new(), paths: HashMap::new() }
    }

    pub(super) const fn is_cut(&self) -> bool {
        self.lists.is_cut()
    }

    /// Searches `directories` for the inodes `wanted`.
    ///
    /// # Errors
    /// Those of the disk; cancelled.
    pub(super) fn look_for(
        &mut self,
        wanted: BTreeSet<u32>,
        directories: &[u32],
        cancel: &CancelToken,
    ) -> Result<()> {
        if wanted.is_empty() {
            return Ok(());
        }
        for directory in directories {
            cancel.check()?;
            let mut found = Vec::new();
            self.for_each_name(*directory, &mut |inode, name| {
                if wanted.contains(&inode) && name != b"." && name != b".." {
                    found.push((inode, printable(&String::from_utf8_lossy(name))));
                }
                true
            })?;
            for (inode, name) in found {
                let links = self.links.entry(inode).or_default();
                if links.len() < MAX_NAMES {
                    links.push((*directory, name));
                }
            }
        }
        Ok(())
    }

    /// The paths of an inode that was looked for; none where no directory has it.
    ///
    /// # Errors
    /// Those of the disk.
    pub(super) fn paths_of(&mut self, inode: u32) -> Result<Vec<String>> {
        let links = self.links.get(&inode).cloned().unwrap_or_default();
        let mut paths = Vec::with_capacity(links.len());
        for (directory, name) in links {
            paths.push(format!("{}{name}", self.path_of_directory(directory)?));
        }
        Ok(paths)
    }

    /// With `/` at the end.
    fn path_of_directory(&mut self, directory: u32) -> Result<String> {
        let mut names: Vec<(u32, String)> = Vec::new();
        let mut at = directory;
        let mut path = loop {
            if at == ROOT {
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
    fn link_of_directory(&mut self, directory: u32) -> Result<Option<Link>> {
        let mut parent = None;
        self.for_each_name(directory, &mut |inode, name| {
            parent = if name == b".." { Some(inode) } else { None };
            parent.is_none()
        })?;
        let Some(parent) = parent.filter(|parent| *parent != directory) else { return Ok(None) };
        let mut found = None;
        self.for_each_name(parent, &mut |inode, name| {
            if inode == directory && name != b"." && name != b".." {
                found = Some((parent, printable(&String::from_utf8_lossy(name))));
            }
            found.is_none()
        })?;
        Ok(found)
    }

    /// Hands over the names of a directory while `take` says to go on.
    fn for_each_name(
        &mut self,
        directory: u32,
        take: &mut dyn FnMut(u32, &[u8]) -> bool,
    ) -> Result<()> {
        let Some(inode) = self.directory(directory)? else { return Ok(()) };
        let mut runs: Vec<Run> = Vec::new();
        self.lists.for_each_run(&inode, &mut |run| {
            runs.push(run);
            Ok(())
        })?;
        let block_bytes = u64::from(self.superblock.block_bytes);
        let mut block = vec![0; length(block_bytes)];
        let mut left = MAX_DIRECTORY_BYTES / block_bytes;
        for run in runs.into_iter().filter(|run| run.is_content) {
            for number in (run.first_block..).take(length(run.count)) {
                let Some(offset) = number.checked_mul(block_bytes).filter(|_| left > 0) else {
                    return Ok(());
                };
                left -= 1;
                if !self.volume.read(&mut block, offset)? || !names_of_block(&block, take) {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    fn directory(&self, number: u32) -> Result<Option<Inode>> {
        let mut bytes = vec![0; index(self.superblock.inode_bytes)];
        let Some(offset) = self.superblock.inode_offset(self.volume, number)? else {
            return Ok(None);
        };
        let is_there = self.volume.read(&mut bytes, offset)?;
        Ok(is_there.then(|| Inode::parse(&bytes)).flatten().filter(Inode::is_directory))
    }
}

/// The entries of one block; answers with whether to go on. An index of a large directory looks like a block with one
/// empty entry.
fn names_of_block(block: &[u8], take: &mut dyn FnMut(u32, &[u8]) -> bool) -> bool {
    let mut rest = block;
    while let (Some(inode), Some(length)) = (u32_at(rest, 0), u16_at(rest, 4)) {
        // 64 KiB do not fit in 16 bits: these two mean all of it (`ext4_rec_len_from_disk`).
        let length = if matches!(length, 0 | 0xFFFF) { rest.len() } else { length.into() };
        let (Some(name_length), true) = (rest.get(6), (12..=rest.len()).contains(&length)) else {
            return true;
        };
        if inode != 0
            && let Some(name) = rest.get(8..8 + usize::from(*name_length))
            && !name.is_empty()
            && !take(inode, name)
        {
            return false;
        }
        rest = &rest[length..];
    }
    true
}
