//! Sharing the blocks of a file instead of copying them.
//!
//! XFS, Btrfs, bcachefs and others can make one file hold what another holds by referring to the same
//! blocks (`FICLONE`, ioctl_ficlone(2)); whoever changes one of the files gets blocks of its own then.
//! A disk of any size is copied in the time its extents take, and takes no space.

use crate::{OpenMode, RawDevice, Result};
use std::path::Path;

impl RawDevice {
    /// Makes this new file hold what the file at `source` holds, by sharing its blocks, and answers
    /// whether that was possible: both are files of one size on one file system that can. After
    /// `false` nothing is changed.
    ///
    /// # Errors
    /// Where `source` cannot be opened.
    pub fn share_blocks_of(&self, source: &Path) -> Result<bool> {
        let source = Self::open(source, OpenMode::ReadOnly)?;
        Ok(self.can_share(&source) && clone_file(&self.file, &source.file))
    }

    fn can_share(&self, source: &Self) -> bool {
        use crate::BlockDevice;
        let are_files = !self.is_block_device() && !source.is_block_device();
        are_files && self.writable && self.size_bytes() == source.size_bytes()
    }
}

#[cfg(target_os = "linux")]
fn clone_file(to: &std::fs::File, from: &std::fs::File) -> bool {
    // Whatever the reason is, copying is the other way, and says what is wrong with a file.
    rustix::fs::ioctl_ficlone(to, from).is_ok()
}

#[cfg(not(target_os = "linux"))]
fn clone_file(_to: &std::fs::File, _from: &std::fs::File) -> bool {
    false
}

#[cfg(all(test, target_os = "linux"))]
#[allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
mod tests {
    use super::*;
    use crate::{BlockDevice, WritableBlockDevice};
    use std::process::Command;

    /// Copies a file of `size` bytes in `directory`; answers whether blocks were shared.
    fn copy_in(directory: &Path, size: usize) -> bool {
        let (from, to) = (directory.join("from.raw"), directory.join("to.raw"));
        let bytes: Vec<u8> = (0..size).map(|at| (at / 7 % 251).to_le_bytes()[0]).collect();
        std::fs::write(&from, &bytes).unwrap();
        let mode = OpenMode::CreateNew { size_bytes: size as u64 };
        let target = RawDevice::open(&to, mode).unwrap();
        let shared = target.share_blocks_of(&from).unwrap();
        assert_eq!(target.size_bytes(), size as u64);
        assert!(std::fs::read(&to).unwrap() == if shared { bytes.clone() } else { vec![0; size] });
        // Neither sees what is written to the other.
        target.write_at(&[0xee; 700], 4000).unwrap();
        target.flush().unwrap();
        assert!(std::fs::read(&from).unwrap() == bytes);
        // A file of another size keeps its own.
        let longer = directory.join("longer.raw");
        let mode = OpenMode::CreateNew { size_bytes: size as u64 + 4096 };
        let longer = RawDevice::open(longer, mode).unwrap();
        assert!(!longer.share_blocks_of(&from).unwrap());
        shared
    }

    #[test]
    fn a_file_system_without_sharing_says_no() {
        let directory = tempfile::tempdir().unwrap();
        // Whatever the answer is here: what it claims holds.
        copy_in(directory.path(), 300_000);
        let missing = directory.path().join("missing.raw");
        let target = RawDevice::open(
            directory.path().join("x.raw"),
            OpenMode::CreateNew { size_bytes: 1 << 20 },
        );
        assert!(target.unwrap().share_blocks_of(&missing).is_err());
    }

    /// On a real XFS in a loop device: needs root and mkfs.xfs, and says so where it has not both.
    #[test]
    fn xfs_shares_blocks() {
        let directory = tempfile::tempdir().unwrap();
        let (image, mount) = (directory.path().join("xfs.img"), directory.path().join("mnt"));
        std::fs::create_dir(&mount).unwrap();
        std::fs::File::create(&image).unwrap().set_len(320 << 20).unwrap();
        let run = |program: &str, arguments: &[&Path]| {
            Command::new(program).args(arguments).output().is_ok_and(|out| out.status.success())
        };
        if !(run("mkfs.xfs", &[Path::new("-q"), &image])
            && run("mount", &[Path::new("-o"), Path::new("loop"), &image, &mount]))
        {
            println!("NOT TESTED: sharing blocks on XFS needs root, loop devices and mkfs.xfs");
            return;
        }
        let shared = std::panic::catch_unwind(|| copy_in(&mount, 3_000_000));
        assert!(run("umount", &[&mount]));
        assert!(shared.unwrap(), "XFS did not share");
    }
}
