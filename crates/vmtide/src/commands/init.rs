//! `vmtide init`: make a repository.

use crate::app::App;
use crate::exit::Exit;
use crate::passwords::PasswordSource;
use crate::repository::directory_of;
use crate::units;
use clap::Args;
use std::sync::Arc;
use vmtide_engine::{EngineError, Result};
use vmtide_repo::{Encryption, InitOptions, LocalStore, Repository};

const EXAMPLES: &str = "\
Examples:
  vmtide init /backup
  VMTIDE_PASSWORD=… vmtide init /backup --json
  vmtide init ./test --encryption none

Without the password nothing can be restored: keep it in a safe place that is not this machine.";

/// The options of `init`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct InitArgs {
    /// The directory to make it in; must not exist or be empty [default: that of -r]
    #[arg(value_name = "REPO")]
    target: Option<String>,
    /// aes-256-gcm, or none
    #[arg(long, value_name = "CIPHER", default_value = "aes-256-gcm")]
    encryption: Encryption,
    /// The average length of chunks, a power of two from 16KiB to 1MiB; smaller ones find more
    /// duplicates and cost more metadata
    #[arg(long, value_name = "SIZE", default_value = "64KiB", value_parser = units::parse_size)]
    chunk_size: u64,
    /// A name for the first password, as `vmtide key list` shows it
    #[arg(long, value_name = "TEXT", default_value = "first")]
    key_label: String,
}

/// Makes the repository.
pub fn run(app: &App, args: &InitArgs) -> Result<Exit> {
    let location = args.target.as_ref().or(app.global.repository.as_ref());
    let location = location.ok_or_else(|| {
        EngineError::usage("no repository: say where to make it, `vmtide init REPO`")
    })?;
    let directory = directory_of(location)?;
    let options = InitOptions {
        chunk_size_bytes: u32::try_from(args.chunk_size).map_err(|_| {
            EngineError::usage(format!("--chunk-size {}: too large", args.chunk_size))
        })?,
        encryption: args.encryption,
        key_label: args.key_label.clone(),
        ..InitOptions::default()
    };
    let password = match args.encryption {
        Encryption::None => None,
        Encryption::Aes256Gcm => {
            Some(PasswordSource::of_repository(&app.global.password).get_new()?)
        }
    };
    let store = LocalStore::create(&directory)?;
    let repository = Repository::init(Arc::new(store), &options, password.as_ref())?;
    let config = repository.config();
    app.output.line(format!(
        "repository {} made at {}: chunks of {}, encryption {}",
        config.id,
        repository.location(),
        units::size(u64::from(config.chunk_size_bytes)),
        config.encryption
    ));
    app.output.summary(&serde_json::json!({
        "repository": repository.location(),
        "id": config.id,
        "chunk_size_bytes": config.chunk_size_bytes,
        "encryption": config.encryption.to_string(),
    }));
    Ok(Exit::Done)
}
