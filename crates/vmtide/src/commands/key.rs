//! `vmtide key`: the passwords of a repository.

use crate::app::App;
use crate::exit::Exit;
use crate::passwords::PasswordSource;
use crate::table::Table;
use crate::{repository, units};
use clap::{Args, Subcommand};
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use vmtide_block::files;
use vmtide_engine::{EngineError, Result};
use vmtide_repo::{
    KdfParameters, KeyList, KeySlotInfo, ObjectId, Password, RecoveryKey, RepoError, Repository,
};

const EXAMPLES: &str = "\
Each password opens the repository by a key slot of its own. All slots hold the same master key, which
never changes: removing or changing a password keeps it from opening this repository from now on, and
takes nothing from somebody who has copied the repository, or its keys/ objects, and knows the password.
After a leak copy to a new repository (`vmtide copy`), which has a new master key.

A recovery key is a password made here, to be written on paper. It is shown once. Mistakes in typing it are
noticed; small letters and missing dashes are none. It is given wherever a password is.

Examples:
  vmtide key list -r /backup
  vmtide key add -r /backup --label safe --new-password-file /media/usb/password
  vmtide key add -r /backup --recovery
  vmtide key rotate -r /backup                  change the password that is given now
  vmtide key remove 91ab -r /backup";

/// The options of `key`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct KeyArgs {
    #[command(subcommand)]
    command: KeyCommand,
}

#[derive(Debug, Subcommand)]
enum KeyCommand {
    /// Add a password or a recovery key
    Add(AddArgs),
    /// List the key slots
    List,
    /// Remove a password; the last one stays
    Remove(RemoveArgs),
    /// Change a password: add the new one, then remove the old one
    Rotate(RotateArgs),
}

/// The new password comes from `VMTIDE_NEW_PASSWORD`, a file, a command or the terminal.
#[derive(Debug, Args)]
struct NewArgs {
    /// Read the new password from this file
    #[arg(long, value_name = "FILE")]
    new_password_file: Option<PathBuf>,
    /// Run this shell command and take its output as the new password
    #[arg(long, value_name = "COMMAND")]
    new_password_command: Option<String>,
    /// Make a recovery key and show it once, to be written down
    #[arg(long, conflicts_with_all = ["new_password_file", "new_password_command"])]
    recovery: bool,
    /// Write the recovery key into this new file instead of showing it
    #[arg(long, value_name = "FILE", requires = "recovery")]
    recovery_file: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct AddArgs {
    /// A name for it
    #[arg(long, value_name = "TEXT")]
    label: Option<String>,
    #[command(flatten)]
    new: NewArgs,
}

#[derive(Debug, Args)]
struct RemoveArgs {
    /// The id of the key slot, or its first digits
    #[arg(value_name = "ID")]
    id: String,
}

#[derive(Debug, Args)]
struct RotateArgs {
    /// The id of the key slot, or its first digits [default: the one that opens the repository now]
    #[arg(value_name = "ID")]
    id: Option<String>,
    /// Another name for it [default: that of the old one]
    #[arg(long, value_name = "TEXT")]
    label: Option<String>,
    #[command(flatten)]
    new: NewArgs,
}

/// Does it.
pub fn run(app: &App, args: &KeyArgs) -> Result<Exit> {
    let repository = repository::open(app)?;
    match &args.command {
        KeyCommand::List => list(app, &repository),
        KeyCommand::Add(args) => add(app, &repository, args),
        KeyCommand::Remove(args) => remove(app, &repository, &args.id),
        KeyCommand::Rotate(args) => rotate(app, &repository, args),
    }
}

fn json_of(key: &KeySlotInfo) -> serde_json::Value {
    serde_json::json!({ "id": key.id, "label": key.label, "created": key.created })
}

fn list(app: &App, repository: &Repository) -> Result<Exit> {
    let KeyList { keys, unreadable } = repository.keys()?;
    let mut table = Table::new(&["id", "made", "used now", "label"]);
    let is_used = |key: &KeySlotInfo| repository.opened_with() == Some(key.id);
    for key in &keys {
        let used = if is_used(key) { "yes" } else { "" };
        table.row([
            units::short_id(key.id),
            units::time(key.created),
            used.into(),
            key.label.clone(),
        ]);
    }
    if keys.is_empty() && unreadable.is_empty() {
        app.output.remark("this repository is not encrypted: it has no keys");
    } else {
        app.output.lines(table.lines());
    }
    let listed = keys.iter().map(|key| {
        let mut json = json_of(key);
        json["used"] = is_used(key).into();
        json
    });
    let listed: Vec<_> = listed.collect();
    warn_of(app, &unreadable);
    let broken: Vec<_> = unreadable
        .iter()
        .map(|(id, error)| serde_json::json!({ "id": id, "message": error.to_string() }))
        .collect();
    app.output.summary(&serde_json::json!({ "keys": listed, "unreadable": broken }));
    Ok(if unreadable.is_empty() { Exit::Done } else { Exit::Warnings })
}

/// No password is tried on these: one may be lost, or somebody put them there.
fn warn_of(app: &App, unreadable: &[(ObjectId, RepoError)]) {
    for (id, error) in unreadable {
        let id = units::short_id(*id);
        app.output.warning(&format!("{error}; `vmtide key remove {id}` removes it"));
    }
}

fn check_encrypted(repository: &Repository) -> Result<ObjectId> {
    repository.opened_with().ok_or_else(|| {
        RepoError::Invalid("this repository is not encrypted: it has no keys".into()).into()
    })
}

/// A password to be: one of the user's, or a recovery key and where it is to be told.
enum NewKey<'a> {
    Chosen(Password),
    Made(RecoveryKey, Option<(&'a Path, File)>),
}

impl NewArgs {
    /// Gets or makes it. What can go wrong with a file goes wrong before anything is changed.
    fn get(&self, app: &App, repository: &Repository) -> Result<NewKey<'_>> {
        check_encrypted(repository)?;
        if !self.recovery {
            let source = PasswordSource::for_new_key(
                self.new_password_file.as_deref(),
                self.new_password_command.as_deref(),
            );
            return Ok(NewKey::Chosen(source.get_new()?));
        }
        let file = match &self.recovery_file {
            Some(path) => Some((path.as_path(), create_secret(path)?)),
            None if app.output.is_json() => {
                return Err(EngineError::usage(
                    "a recovery key is no part of the JSON, which is logged: give --recovery-file",
                ));
            }
            None => None,
        };
        Ok(NewKey::Made(RecoveryKey::random()?, file))
    }
}

impl NewKey<'_> {
    fn password(&self) -> Password {
        match self {
            Self::Chosen(password) => password.clone(),
            Self::Made(key, _) => key.password(),
        }
    }

    /// Tells a recovery key, before the repository depends on it.
    fn tell(&mut self, app: &App) -> Result<()> {
        let Self::Made(key, file) = self else { return Ok(()) };
        let Some((path, file)) = file else {
            let text = zeroize::Zeroizing::new(format!(
                "recovery key, shown only now; write it down and keep it safe:\n\n    {}\n\n",
                key.text()
            ));
            return app.output.must_write(&text).map_err(|error| {
                EngineError::io("show the recovery key; nothing was changed", error)
            });
        };
        let written = file.write_all(key.text().as_bytes()).and_then(|()| file.write_all(b"\n"));
        let written = written.and_then(|()| file.sync_all()).and_then(|()| sync_parent(path));
        written.map_err(|error| {
            EngineError::io(format!("write the recovery key to {}", path.display()), error)
        })
    }
}

/// A new file that only its owner can read; on Windows, whoever may read its directory.
fn create_secret(path: &Path) -> Result<File> {
    let mut options = File::options();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options.open(path).map_err(|error| {
        EngineError::io(format!("make the file {} for the recovery key", path.display()), error)
    })
}

/// Makes the name of a new file durable.
fn sync_parent(path: &Path) -> std::io::Result<()> {
    files::sync_directory(files::directory_of(path))
}

fn label_of(wanted: Option<&String>, recovery: bool) -> String {
    let default = if recovery { "recovery key" } else { "" };
    wanted.map_or_else(|| default.into(), Clone::clone)
}

fn add(app: &App, repository: &Repository, args: &AddArgs) -> Result<Exit> {
    let mut new = args.new.get(app, repository)?;
    new.tell(app)?;
    let label = label_of(args.label.as_ref(), args.new.recovery);
    let key = repository.add_key(&label, &new.password(), &KdfParameters::default())?;
    app.output.line(format!("key {} added", units::short_id(key.id)));
    app.output.summary(&json_of(&key));
    Ok(Exit::Done)
}

fn remove(app: &App, repository: &Repository, prefix: &str) -> Result<Exit> {
    let id = find(&repository.keys()?, prefix)?;
    repository.remove_key(id)?;
    app.output.line(format!("key {} removed", units::short_id(id)));
    app.output.summary(&serde_json::json!({ "removed": id }));
    Ok(Exit::Done)
}

fn rotate(app: &App, repository: &Repository, args: &RotateArgs) -> Result<Exit> {
    let keys = repository.keys()?;
    warn_of(app, &keys.unreadable);
    let used = check_encrypted(repository)?;
    let old = args.id.as_ref().map_or(Ok(used), |prefix| find(&keys, prefix))?;
    let mut new = args.new.get(app, repository)?;
    new.tell(app)?;
    let label = keys.keys.iter().find(|key| key.id == old).map(|key| key.label.clone());
    let label = args.label.clone().or(label.filter(|_| !args.new.recovery));
    let label = label_of(label.as_ref(), args.new.recovery);
    let kdf = KdfParameters::default();
    let rotated = repository.rotate_key(old, &label, &new.password(), &kdf)?;
    let (id, old_id) = (units::short_id(rotated.key.id), units::short_id(old));
    if let Some(error) = rotated.old_left {
        app.output.line(format!("key {id} added; key {old_id} is still there"));
        return Err(error.into());
    }
    app.output.line(format!("key {id} added, key {old_id} removed"));
    let mut json = json_of(&rotated.key);
    json["removed"] = old.to_string().into();
    app.output.summary(&json);
    Ok(Exit::Done)
}

/// The slot, readable or not, whose id begins so.
fn find(keys: &KeyList, prefix: &str) -> Result<ObjectId> {
    let prefix = prefix.to_ascii_lowercase();
    let unreadable = keys.unreadable.iter().map(|(id, _)| *id);
    let matching: Vec<ObjectId> = keys
        .keys
        .iter()
        .map(|key| key.id)
        .chain(unreadable)
        .filter(|id| !prefix.is_empty() && id.to_string().starts_with(&prefix))
        .collect();
    match matching.as_slice() {
        [id] => Ok(*id),
        [] => Err(EngineError::NotFound {
            what: format!("key {prefix}"),
            hint: "see `vmtide key list`".into(),
        }),
        _ => Err(EngineError::usage(format!("several keys begin with {prefix}: give more digits"))),
    }
}
