//! Changing the file of keys: what `vmtide agent key` does.
//!
//! The file is replaced as a whole, so that an agent that reads it meanwhile sees the old or the new one. Lines that
//! say nothing (comments) are kept.

use super::keys::{self, HEAD, KeySet, MAX_KEYS, NewKey};
use super::store;
use crate::error::{AgentError, Result};
use std::fs::File;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use zeroize::Zeroizing;

/// Adds a key. The file is made where there is none.
///
/// # Errors
/// Where the file cannot be read or written, holds a key in the clear, or has a key of this name.
pub fn add(path: &Path, name: &str, key: &NewKey) -> Result<()> {
    let mut text = read_text(path)?.unwrap_or_else(|| Zeroizing::new(HEAD.to_owned()));
    let set = parse_hashed(path, &text)?;
    if set.entries().any(|(other, _)| other == name) {
        let shown = path.display();
        return Err(AgentError::usage(format!(
            "{shown}: there is a key of the name {name} already"
        )));
    }
    if set.len() >= MAX_KEYS {
        return Err(AgentError::usage(format!(
            "{}: has {MAX_KEYS} keys, the most",
            path.display()
        )));
    }
    if !text.is_empty() && !text.ends_with('\n') {
        text.push('\n');
    }
    text.push_str(&key.line);
    text.push('\n');
    replace(path, text.as_bytes())
}

/// Removes a key. Answers whether there was one of this name. An agent that runs lets its clients in no more once it
/// has read the file again.
///
/// # Errors
/// Where the file cannot be read or written, or would hold no key: an agent does not start with that, and one that
/// runs would keep the old ones.
pub fn remove(path: &Path, name: &str) -> Result<bool> {
    let text = read_text(path)?.ok_or_else(|| no_file(path))?;
    let set = parse_hashed(path, &text)?;
    if !set.entries().any(|(other, _)| other == name) {
        return Ok(false);
    }
    if set.len() == 1 {
        let shown = path.display();
        let reason =
            format!("{shown}: {name} is its last key: add another one first, or end the agent");
        return Err(AgentError::usage(reason));
    }
    let is_other = |line: &&str| line.trim().split(':').next() != Some(name);
    let kept: String = text.split_inclusive('\n').filter(is_other).collect();
    // What is kept is read as an agent reads it, before anybody is told that the key is gone.
    if parse_hashed(path, &kept)?.entries().any(|(other, _)| other == name) {
        let shown = path.display();
        return Err(AgentError::usage(format!(
            "{shown}: the line of {name} was not found: edit it"
        )));
    }
    replace(path, kept.as_bytes())?;
    Ok(true)
}

/// The keys of the file.
///
/// # Errors
/// Where it cannot be read or is none.
pub fn list(path: &Path) -> Result<KeySet> {
    store::read(path)
}

fn no_file(path: &Path) -> AgentError {
    AgentError::io(format!("read the keys of {}", path.display()), ErrorKind::NotFound.into())
}

fn read_text(path: &Path) -> Result<Option<Zeroizing<String>>> {
    match std::fs::read_to_string(path) {
        Ok(text) => {
            let text = Zeroizing::new(text);
            // Editors of Windows begin a file with this; it would be part of the first name.
            let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
            Ok(Some(Zeroizing::new(text.to_owned())))
        }
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(AgentError::io(format!("read the keys of {}", path.display()), error)),
    }
}

fn parse_hashed(path: &Path, text: &str) -> Result<KeySet> {
    let shown = path.display();
    let set = keys::parse(text).map_err(|error| AgentError::usage(format!("{shown}: {error}")))?;
    if set.is_plain() {
        return Err(AgentError::usage(format!(
            "{shown}: holds a key in the clear; begin a new file, and take that key over with \
             `vmtide agent key add NAME --key-from {shown}`"
        )));
    }
    Ok(set)
}

fn replace(path: &Path, content: &[u8]) -> Result<()> {
    let write = || -> std::io::Result<()> {
        // Through a link to where the file is, so that the link stays.
        let path = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_path_buf());
        let mut temporary = path.clone().into_os_string();
        temporary.push(format!(".{}.new", std::process::id()));
        let temporary = PathBuf::from(temporary);
        let mut options = File::options();
        options.write(true).create_new(true);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        let mut file = options.open(&temporary)?;
        let written = file.write_all(content).and_then(|()| keep_rights(&file, &path));
        let written = written.and_then(|()| file.sync_all());
        drop(file);
        let replaced = written.and_then(|()| std::fs::rename(&temporary, &path));
        if replaced.is_err() {
            // It is of no use to anybody.
            let _ = std::fs::remove_file(&temporary);
        }
        replaced
    };
    write().map_err(|error| AgentError::io(format!("write the keys to {}", path.display()), error))
}

/// Gives the new file the rights and, as far as allowed, the owner of the old one.
#[cfg(unix)]
fn keep_rights(file: &File, old: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::MetadataExt;
    if let Ok(metadata) = std::fs::metadata(old) {
        file.set_permissions(metadata.permissions())?;
        // Only root may give a file away; everybody else keeps it.
        let _ = std::os::unix::fs::fchown(file, Some(metadata.uid()), Some(metadata.gid()));
    }
    Ok(())
}

#[cfg(not(unix))]
fn keep_rights(_file: &File, _old: &Path) -> std::io::Result<()> {
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::auth::Rights;

    #[test]
    fn keys_are_added_and_removed_and_comments_stay() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("keys");
        let one = keys::generate("one", Rights::ReadOnly).unwrap();
        let two = keys::generate("two", Rights::ReadWrite).unwrap();
        assert!(remove(&path, "one").is_err());
        add(&path, "one", &one).unwrap();
        assert!(add(&path, "one", &one).is_err());
        assert!(remove(&path, "one").is_err(), "the last key");
        std::fs::write(&path, std::fs::read_to_string(&path).unwrap() + "# mine").unwrap();
        add(&path, "two", &two).unwrap();
        let set = list(&path).unwrap();
        assert!(set.find(one.secret.as_bytes()).is_some());
        assert!(set.find(two.secret.as_bytes()).is_some_and(|caller| caller.may_write()));
        assert!(!remove(&path, "three").unwrap());
        assert!(remove(&path, "one").unwrap());
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.starts_with(HEAD) && text.contains("# mine\n") && !text.contains("one:"));
        assert!(list(&path).unwrap().find(one.secret.as_bytes()).is_none());
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        }
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_key_is_removed_from_a_file_that_an_editor_of_windows_wrote() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("keys");
        let one = keys::generate("one", Rights::ReadOnly).unwrap();
        let two = keys::generate("two", Rights::ReadOnly).unwrap();
        std::fs::write(&path, format!("\u{feff}{}\r\n{}\r\n", one.line, two.line)).unwrap();
        assert!(remove(&path, "one").unwrap());
        let left = list(&path).unwrap();
        assert!(left.find(one.secret.as_bytes()).is_none());
        assert!(left.find(two.secret.as_bytes()).is_some());
    }

    #[test]
    fn a_key_in_the_clear_is_not_touched() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("key");
        std::fs::write(&path, "swordfish\n").unwrap();
        let key = keys::generate("one", Rights::ReadOnly).unwrap();
        let error = add(&path, "one", &key).unwrap_err().to_string();
        assert!(error.contains("--key-from") && !error.contains("swordfish"));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "swordfish\n");
    }
}
