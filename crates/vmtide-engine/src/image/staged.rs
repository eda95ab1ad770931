//! A new image that gets its name only when it is complete.
//!
//! It is made in a hidden directory beside the target, under its own name: an image may consist of
//! several files, and some formats write these names into it. At the end every file moves out, the
//! one that names the others last. Until then the wanted name is free, or still what it was; a
//! failure or an interruption removes the directory, and what a killed process leaves has
//! `vmtide-partial` in its name.
//!
//! One file replaces another at once. Where the new image consists of several, the old one is first
//! put aside, the file that names the others before these: at no moment is there an image that mixes
//! old and new. A failure brings it back; what a killed process leaves has the old image in a hidden
//! directory, and none under its name. A file that is no part of the old image is never replaced.
//!
//! All of that holds at a power failure, too, unless the image is made without flushes: then nothing
//! waits for the medium, and a power failure soon after may leave the name with less behind it.

use super::files::extents_of;
use crate::in_use::{Use, check_not_in_use};
use crate::{EngineError, Result};
use std::ffi::{OsStr, OsString};
use std::path::{MAIN_SEPARATOR, Path, PathBuf};
use std::sync::Arc;
use vmtide_block::files;
use vmtide_hypervisor::JobId;
use vmtide_image::{CreateOptions, ImageWriter, create_image};

/// A new image in the making. Dropping it removes it.
pub struct StagedImage {
    /// The image.
    pub image: Arc<dyn ImageWriter>,
    // After the image, so that its files are closed when their directory goes.
    staging: StagingDirectory,
    path: PathBuf,
    replace: bool,
    names: Names,
}

impl StagedImage {
    /// Creates the image that will be at `path`, in place of what is there only if told to.
    ///
    /// # Errors
    /// Those of creating; [`EngineError::Refused`] where one of its files exists and must not be
    /// replaced, or is not a part of the image that is. Nothing is left.
    pub fn create(path: &Path, options: &CreateOptions, replace: bool) -> Result<Self> {
        let (staging, name) = StagingDirectory::beside(path)?;
        let image = create_image(staging.0.join(name), options)
            .map_err(|error| of_final_path(error, &staging.0, path))?;
        for name in names_in(&staging.0)? {
            let to = path.with_file_name(name);
            if !replace && to.symlink_metadata().is_ok() {
                return Err(already_exists(&to));
            }
        }
        if replace {
            staging.check_replaceable(path)?;
        }
        let names = if options.without_flushes { Names::Unflushed } else { Names::Durable };
        Ok(Self { image, staging, path: path.to_path_buf(), replace, names })
    }

    /// Ends the writing and gives the image its name.
    ///
    /// # Errors
    /// What the medium says; [`EngineError::Refused`] where a name was taken meanwhile, or what is
    /// to be replaced is in use now. The new image is then gone and what it was to replace still
    /// there; only where the directory cannot be synced at the very end the new one is, and the
    /// error says so.
    pub fn publish(self) -> Result<()> {
        let Self { image, staging, path, replace, names } = self;
        image.finish()?;
        drop(image);
        if replace {
            check_not_in_use(&path, Use::Write)?;
            staging.check_replaceable(&path)?;
        }
        staging.publish(&path, replace, names)?;
        crate::delta::forget(&path);
        Ok(())
    }
}

/// Whether new names are on the medium when they are given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Names {
    Durable,
    Unflushed,
}

impl Names {
    /// Makes names durable that are there already.
    fn sync_published(self, path: &Path) -> Result<()> {
        match self {
            Self::Durable => sync_published(path),
            Self::Unflushed => Ok(()),
        }
    }

    fn sync_directory_of(self, path: &Path) -> Result<()> {
        match self {
            Self::Durable => sync_directory_of(path),
            Self::Unflushed => Ok(()),
        }
    }
}

/// An error that names files below the staging directory, as of the files they will become.
fn of_final_path(error: vmtide_block::BlockError, staging: &Path, path: &Path) -> EngineError {
    use vmtide_block::BlockError;
    let staged = format!("{}{MAIN_SEPARATOR}", staging.display());
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    let target = directory
        .map_or_else(String::new, |parent| format!("{}{MAIN_SEPARATOR}", parent.display()));
    let plain = |text: String| text.replace(&staged, &target);
    match error {
        BlockError::Io { context, source } => BlockError::Io { context: plain(context), source },
        BlockError::Unsupported { context, detail } => {
            BlockError::Unsupported { context: plain(context), detail }
        }
        other => other,
    }
    .into()
}

/// A directory that is removed with all that is in it when dropped.
struct StagingDirectory(PathBuf);

impl StagingDirectory {
    fn beside(path: &Path) -> Result<(Self, OsString)> {
        let name = file_name(path)?;
        let directory = path.with_file_name(hidden_name(name));
        create_for_owner(&directory)
            .map_err(|error| EngineError::io(format!("create {}", path.display()), error))?;
        Ok((Self(directory), name.to_os_string()))
    }

    /// Refuses to replace a file that is not the image's own: another image may live in it.
    fn check_replaceable(&self, path: &Path) -> Result<()> {
        let own = extents_of(path);
        for name in names_in(&self.0)? {
            let to = path.with_file_name(&name);
            if to == path || to.symlink_metadata().is_err() {
                continue;
            }
            if !own.contains(&to) {
                return Err(EngineError::refused(
                    format!("replace {}", path.display()),
                    format!(
                        "{} would be replaced, too, and does not belong to it: choose another name",
                        to.display()
                    ),
                ));
            }
            check_not_in_use(&to, Use::Write)?;
        }
        Ok(())
    }

    fn publish(self, path: &Path, replace: bool, durable: Names) -> Result<()> {
        let main = file_name(path)?.to_os_string();
        let mut names = names_in(&self.0)?;
        // Whoever names the others comes when they are there.
        names.retain(|name| *name != main);
        names.sort();
        names.push(main);
        if replace && names.len() == 1 {
            move_to(&self.0.join(file_name(path)?), path, true)?;
            return durable.sync_published(path);
        }
        let aside = if replace { Some(Self::beside(path)?.0.keep()) } else { None };
        let mut moved: Vec<(PathBuf, PathBuf)> = Vec::new();
        let outcome = self.move_all(path, &names, aside.as_deref(), durable, &mut |from, to| {
            move_to(from, to, false)?;
            moved.push((from.to_path_buf(), to.to_path_buf()));
            Ok(())
        });
        if let Err(error) = outcome {
            put_back(&moved, aside.as_deref());
            return Err(error);
        }
        let synced = durable.sync_published(path);
        // Removes what was replaced.
        drop(aside.map(Self));
        synced
    }

    /// All renames of an image of these files, of which the last names the others. Replaces nothing:
    /// what is there is moved into `aside` before.
    fn move_all(
        &self,
        path: &Path,
        names: &[OsString],
        aside: Option<&Path>,
        durable: Names,
        rename: &mut dyn FnMut(&Path, &Path) -> Result<()>,
    ) -> Result<()> {
        if let Some(aside) = aside {
            for name in names.iter().rev() {
                let old = path.with_file_name(name);
                if old.symlink_metadata().is_ok() {
                    rename(&old, &aside.join(name))?;
                    if old == path {
                        // Without it there is no image; only then its parts may go.
                        durable.sync_directory_of(path)?;
                    }
                }
            }
        }
        for name in names {
            let new = path.with_file_name(name);
            if new == path && names.len() > 1 {
                durable.sync_directory_of(path)?;
            }
            rename(&self.0.join(name), &new)?;
        }
        Ok(())
    }

    /// The path of the directory, which is not removed any more.
    fn keep(mut self) -> PathBuf {
        std::mem::take(&mut self.0)
    }
}

/// Undoes renames, the last first, and removes the directory of what was put aside if all of it is
/// back.
fn put_back(moved: &[(PathBuf, PathBuf)], aside: Option<&Path>) {
    for (from, to) in moved.iter().rev() {
        if let Err(error) = rename(to, from, false) {
            tracing::warn!(path = %to.display(), %error, "cannot be put back");
        }
    }
    if let Some(aside) = aside
        && let Err(error) = std::fs::remove_dir(aside)
    {
        tracing::warn!(path = %aside.display(), %error, "still holds what was to be replaced");
    }
}

impl Drop for StagingDirectory {
    fn drop(&mut self) {
        if self.0.as_os_str().is_empty() {
            return;
        }
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            tracing::warn!(path = %self.0.display(), %error, "cannot remove an unfinished image");
        }
    }
}

/// A new directory that only its owner may look into; on Windows, whoever may into the one above it.
fn create_for_owner(path: &Path) -> std::io::Result<()> {
    let builder = std::fs::DirBuilder::new();
    #[cfg(unix)]
    let builder = {
        let mut builder = builder;
        std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
        builder
    };
    builder.create(path)
}

fn names_in(directory: &Path) -> Result<Vec<OsString>> {
    let list = || -> std::io::Result<Vec<OsString>> {
        std::fs::read_dir(directory)?.map(|entry| Ok(entry?.file_name())).collect()
    };
    list().map_err(|error| EngineError::io(format!("list {}", directory.display()), error))
}

fn file_name(path: &Path) -> Result<&OsStr> {
    path.file_name()
        .ok_or_else(|| EngineError::usage(format!("{} does not name a file", path.display())))
}

/// A hidden name that tells what it is. A long name must not become too long by what is added.
fn hidden_name(name: &OsStr) -> String {
    let name: String = name.to_string_lossy().chars().take(40).collect();
    format!(".{name}.vmtide-partial-{}", JobId::random())
}

/// A hidden name in the same directory, so that the rename at the end stays in one file system.
pub(crate) fn temporary_beside(path: &Path) -> Result<PathBuf> {
    Ok(path.with_file_name(hidden_name(file_name(path)?)))
}

/// Gives a complete file its name.
pub(crate) fn publish(temporary: &Path, path: &Path, replace: bool) -> Result<()> {
    move_to(temporary, path, replace)?;
    sync_published(path)
}

fn move_to(from: &Path, to: &Path, replace: bool) -> Result<()> {
    rename(from, to, replace).map_err(|error| match error.kind() {
        std::io::ErrorKind::AlreadyExists => already_exists(to),
        _ => EngineError::io(format!("rename {} to {}", from.display(), to.display()), error),
    })
}

fn already_exists(path: &Path) -> EngineError {
    EngineError::refused(
        format!("{} already exists", path.display()),
        "nothing was replaced; remove it, or say that it may be replaced",
    )
}

fn rename(from: &Path, to: &Path, replace: bool) -> std::io::Result<()> {
    if replace { std::fs::rename(from, to) } else { files::rename_new(from, to) }
}

/// Makes names durable that are there already.
fn sync_published(path: &Path) -> Result<()> {
    sync_directory_of(path).map_err(|error| match error {
        EngineError::Io { context, source } => EngineError::Io {
            context: format!(
                "{} is complete and has its name, which a power failure may undo: {context}",
                path.display()
            ),
            source,
        },
        other => other,
    })
}

fn sync_directory_of(path: &Path) -> Result<()> {
    let directory = files::directory_of(path);
    files::sync_directory(directory)
        .map_err(|error| EngineError::io(format!("sync {}", directory.display()), error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmtide_image::Format;

    fn left_in(directory: &Path) -> Vec<String> {
        let mut names: Vec<_> = names_in(directory)
            .unwrap()
            .into_iter()
            .map(|name| name.to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn an_image_is_there_when_it_is_complete_and_not_before() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.qcow2");
        let options = CreateOptions::new(Format::Qcow2, 1 << 20);
        let create = |replace| StagedImage::create(&path, &options, replace);
        let (first, second) = (create(false).unwrap(), create(false).unwrap());
        first.image.write_at(&[7; 512], 0).unwrap();
        assert!(!path.exists());
        assert_eq!(left_in(directory.path()).len(), 2);
        first.publish().unwrap();
        let error = second.publish().unwrap_err();
        assert!(error.to_string().contains("already exists"), "{error}");
        let error = create(false).err().unwrap();
        assert!(error.to_string().contains("already exists"), "{error}");
        drop(create(true).unwrap());
        assert_eq!(left_in(directory.path()), ["disk.qcow2"]);
        create(true).unwrap().publish().unwrap();
        assert_eq!(left_in(directory.path()), ["disk.qcow2"]);
    }

    #[test]
    fn all_files_of_an_image_move_or_none() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.vmdk");
        let stage = || {
            let (staging, _) = StagingDirectory::beside(&path).unwrap();
            for name in ["disk.vmdk", "disk-s001.vmdk", "disk-s002.vmdk"] {
                std::fs::write(staging.0.join(name), name).unwrap();
            }
            staging
        };
        let all = ["disk-s001.vmdk", "disk-s002.vmdk", "disk.vmdk"];
        let content = |name: &str| std::fs::read_to_string(path.with_file_name(name)).unwrap();
        std::fs::write(directory.path().join("disk-s002.vmdk"), "mine").unwrap();
        stage().publish(&path, false, Names::Durable).unwrap_err();
        assert_eq!(left_in(directory.path()), ["disk-s002.vmdk"]);
        stage().publish(&path, true, Names::Durable).unwrap();
        assert_eq!(left_in(directory.path()), all);
        assert_eq!(content("disk-s002.vmdk"), "disk-s002.vmdk");
        for name in all {
            std::fs::write(path.with_file_name(name), "old").unwrap();
        }
        // Every moment at which it can be killed: none of these is an image of old and new.
        for kept in 0..6 {
            let staging = stage();
            let aside = StagingDirectory::beside(&path).unwrap().0;
            let names: Vec<OsString> = all.iter().map(OsString::from).collect();
            let mut moved = Vec::new();
            let killed =
                staging.move_all(&path, &names, Some(&aside.0), Names::Durable, &mut |from, to| {
                    if moved.len() == kept {
                        return Err(EngineError::usage("killed"));
                    }
                    moved.push((from.to_path_buf(), to.to_path_buf()));
                    move_to(from, to, false)
                });
            killed.unwrap_err();
            assert!(!path.exists() || (kept == 0 && all.iter().all(|name| content(name) == "old")));
            put_back(&moved, Some(&aside.keep()));
            drop(staging);
            assert_eq!(left_in(directory.path()), all, "{kept}");
            assert!(all.iter().all(|name| content(name) == "old"));
        }
    }

    #[test]
    fn only_an_image_s_own_files_are_replaced_with_it() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        let flat = CreateOptions {
            subformat: Some("monolithicFlat".into()),
            ..CreateOptions::new(Format::Vmdk, 1 << 20)
        };
        let create = |name: &str| StagedImage::create(&at(name), &flat, true);
        create("disk.vmdk").unwrap().publish().unwrap();
        std::fs::write(at("disk.old"), "something else").unwrap();
        let error = create("disk.old").err().unwrap();
        assert!(error.to_string().contains("disk-flat.vmdk"), "{error}");
        // One that comes meanwhile.
        let new = create("new.vmdk").unwrap();
        std::fs::write(at("new-flat.vmdk"), "mine").unwrap();
        new.publish().unwrap_err();
        assert_eq!(std::fs::read_to_string(at("new-flat.vmdk")).unwrap(), "mine");
        create("disk.vmdk").unwrap().publish().unwrap();
        let left = ["disk-flat.vmdk", "disk.old", "disk.vmdk", "new-flat.vmdk"];
        assert_eq!(left_in(directory.path()), left);
    }

    #[test]
    fn a_name_taken_meanwhile_is_not_overwritten() {
        let directory = tempfile::tempdir().unwrap();
        let (from, to) = (directory.path().join("a"), directory.path().join("b"));
        std::fs::write(&from, "new").unwrap();
        std::fs::write(&to, "old").unwrap();
        let error = publish(&from, &to, false).unwrap_err();
        assert!(error.to_string().contains("already exists"), "{error}");
        assert_eq!(std::fs::read_to_string(&to).unwrap(), "old");
        publish(&from, &to, true).unwrap();
        assert_eq!(std::fs::read_to_string(&to).unwrap(), "new");
    }
}
