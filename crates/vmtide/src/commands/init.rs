//! `vmtide init`: make a repository.

use crate::app::App;
use crate::exit::Exit;
use crate::passwords::PasswordSource;
use crate::repository::{directory_of, is_s3};
use crate::{s3, units};
use clap::Args;
use std::sync::Arc;
use vmtide_engine::{EngineError, Result};
use vmtide_repo::{Encryption, InitOptions, LocalStore, ObjectStore, Repository};
use vmtide_s3::{ProbeDepth, S3Store, StoreGuarantees};

const EXAMPLES: &str = "\
Examples:
  vmtide init /backup
  VMTIDE_PASSWORD=… vmtide init /backup --json
  vmtide init ./test --encryption none
  vmtide init s3://backups/vm --s3-endpoint https://minio.example:9000

Without the password nothing can be restored: keep it in a safe place that is not this machine.";

/// The options of `init`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct InitArgs {
    /// The directory to make it in, which must not exist or be empty, or s3://BUCKET/PREFIX with
    /// nothing in it [default: that of -r]
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
    let (store, guarantees) = create(app, location)?;
    let repository = Repository::init(store, &options, password.as_ref())?;
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
        "guarantees": guarantees,
    }));
    Ok(Exit::Done)
}

/// The store of a new repository; in S3 only where the server can hold one, with what it guarantees.
fn create(app: &App, location: &str) -> Result<(Arc<dyn ObjectStore>, Option<StoreGuarantees>)> {
    if !is_s3(location) {
        return Ok((Arc::new(LocalStore::create(directory_of(location)?)?), None));
    }
    let store = S3Store::create(&app.global.s3.options(location)?)?;
    let found = store.require(ProbeDepth::Full)?;
    if app.global.verbose > 0 {
        app.output.line(s3::summary(&found));
        found.remarks().iter().for_each(|remark| app.output.remark(remark));
    }
    Ok((Arc::new(store), Some(found)))
}
