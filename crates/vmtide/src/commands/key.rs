//! `vmtide key`: the passwords of a repository.

use crate::app::App;
use crate::exit::Exit;
use crate::passwords::PasswordSource;
use crate::table::Table;
use crate::{repository, units};
use clap::{Args, Subcommand};
use std::path::PathBuf;
use vmtide_engine::{EngineError, Result};
use vmtide_repo::{KdfParameters, KeySlotInfo, ObjectId, Repository};

const EXAMPLES: &str = "\
Each password opens the repository by a key slot of its own. Removing one does not change the others,
and takes nothing from somebody who has copied the repository and knows the password.

Examples:
  vmtide key list -r /backup
  vmtide key add -r /backup --label safe --new-password-file /media/usb/password
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
    /// Add a password
    Add(AddArgs),
    /// List the key slots
    List,
    /// Remove a password; the last one stays
    Remove(RemoveArgs),
}

/// The new password comes from `VMTIDE_NEW_PASSWORD`, a file, a command or the terminal.
#[derive(Debug, Args)]
struct AddArgs {
    /// A name for it
    #[arg(long, value_name = "TEXT", default_value = "")]
    label: String,
    /// Read the new password from this file
    #[arg(long, value_name = "FILE")]
    new_password_file: Option<PathBuf>,
    /// Run this shell command and take its output as the new password
    #[arg(long, value_name = "COMMAND")]
    new_password_command: Option<String>,
}

#[derive(Debug, Args)]
struct RemoveArgs {
    /// The id of the key slot, or its first digits
    #[arg(value_name = "ID")]
    id: String,
}

/// Does it.
pub fn run(app: &App, args: &KeyArgs) -> Result<Exit> {
    let repository = repository::open(app)?;
    match &args.command {
        KeyCommand::List => list(app, &repository),
        KeyCommand::Add(args) => add(app, &repository, args),
        KeyCommand::Remove(args) => remove(app, &repository, &args.id),
    }
}

fn json_of(key: &KeySlotInfo) -> serde_json::Value {
    serde_json::json!({ "id": key.id, "label": key.label, "created": key.created })
}

fn list(app: &App, repository: &Repository) -> Result<Exit> {
    let keys = repository.keys()?;
    let mut table = Table::new(&["id", "made", "label"]);
    for key in &keys {
        table.row([units::short_id(key.id), units::time(key.created), key.label.clone()]);
    }
    if keys.is_empty() {
        app.output.remark("this repository is not encrypted: it has no keys");
    } else {
        app.output.lines(table.lines());
    }
    let keys: Vec<_> = keys.iter().map(json_of).collect();
    app.output.summary(&serde_json::json!({ "keys": keys }));
    Ok(Exit::Done)
}

fn add(app: &App, repository: &Repository, args: &AddArgs) -> Result<Exit> {
    let source = PasswordSource::for_new_key(
        args.new_password_file.as_deref(),
        args.new_password_command.as_deref(),
    );
    let password = source.get_new()?;
    let key = repository.add_key(&args.label, &password, &KdfParameters::default())?;
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

fn find(keys: &[KeySlotInfo], prefix: &str) -> Result<ObjectId> {
    let matching: Vec<_> = keys
        .iter()
        .filter(|key| !prefix.is_empty() && key.id.to_string().starts_with(prefix))
        .collect();
    match matching.as_slice() {
        [key] => Ok(key.id),
        [] => Err(EngineError::NotFound {
            what: format!("key {prefix}"),
            hint: "see `vmtide key list`".into(),
        }),
        _ => Err(EngineError::usage(format!("several keys begin with {prefix}: give more digits"))),
    }
}
