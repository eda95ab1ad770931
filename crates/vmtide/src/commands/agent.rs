//! `vmtide agent`: disks and what changed on them, over HTTPS.

use super::agent_service::{self, ServiceArgs};
use crate::app::App;
use crate::exit::Exit;
use crate::table::Table;
use crate::{signals, units};
use clap::{Args, Subcommand, ValueHint};
use std::fs::File;
use std::io::Write;
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use vmtide_agent::auth::keys::NewKey;
use vmtide_agent::auth::{Rights, file, keys};
use vmtide_agent::config::DEFAULT_LISTEN;
use vmtide_agent::limits::Limits;
use vmtide_agent::stream::StreamOptions;
use vmtide_agent::{AgentError, AgentOptions, CertificateFiles, ConnectionLimits, Started};
use vmtide_engine::{EngineError, Result};
use zeroize::Zeroizing;

const EXAMPLES: &str = "\
Serves the disks below the directories of --root to whoever brings a key: what they are, which blocks changed
since a tracking id, and their content. It answers the clients of rct-service, and more under /v1. It runs until
Ctrl-C or SIGTERM, which is its normal end (code 0); keys and certificates are read again when their files change.

Without --cert, a certificate is made at the first start and kept in the state directory; clients trust that file,
or pin the fingerprint that is shown. The audit log is audit.log in the state directory.

Examples:
  vmtide agent key add backup --rights read-only --auth-key-file /etc/vmtide/agent-keys
  vmtide agent --root /srv/disks --auth-key-file /etc/vmtide/agent-keys
  vmtide agent --listen 10.0.0.5:6677 --root D:\\VHDS --auth-key-file D:\\vmtide\\keys --cert c.pem --key k.pem
  curl --cacert agent-cert.pem -H \"auth_key: $KEY\" https://localhost:6677/vdisk//srv/disks/web.vhdx/info";

/// The options of `agent`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES, args_conflicts_with_subcommands = true)]
pub struct AgentArgs {
    #[command(subcommand)]
    command: Option<AgentCommand>,
    #[command(flatten)]
    serve: ServeAgentArgs,
}

#[derive(Debug, Subcommand)]
enum AgentCommand {
    /// Manage the keys of clients
    Key(KeyArgs),
    /// Install, start, stop and remove the agent as a service of Windows
    Service(ServiceArgs),
}

#[derive(Debug, Args)]
pub struct ServeAgentArgs {
    /// Where to listen
    #[arg(long, value_name = "HOST:PORT", default_value = DEFAULT_LISTEN)]
    listen: String,
    /// Serve the disks below this directory; may be repeated
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    root: Vec<PathBuf>,
    /// The keys of clients: a file of `vmtide agent key add`, or one line with a key in the clear
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    auth_key_file: Option<PathBuf>,
    /// The agent's certificate (PEM) [default: made at the first start]
    #[arg(long, value_name = "FILE", requires = "key", value_hint = ValueHint::FilePath)]
    cert: Option<PathBuf>,
    /// The private key of --cert (PEM)
    #[arg(long, value_name = "FILE", requires = "cert", value_hint = ValueHint::FilePath)]
    key: Option<PathBuf>,
    /// Let clients speak TLS 1.2, too
    #[arg(long)]
    tls12: bool,
    /// Where the audit log goes [default: audit.log in the state directory]
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    audit_log: Option<PathBuf>,
    /// The most connections at once
    #[arg(long, value_name = "NUMBER", default_value_t = ConnectionLimits::default().total)]
    max_connections: usize,
    /// The most connections of one address at once
    #[arg(long, value_name = "NUMBER", default_value_t = ConnectionLimits::default().per_peer)]
    max_connections_per_peer: usize,
    /// The most transfers of content at once, of all keys together
    #[arg(long, value_name = "NUMBER", default_value_t = Limits::default().streams_total)]
    max_transfers: usize,
    /// The most transfers of content at once of one key
    #[arg(long, value_name = "NUMBER", default_value_t = Limits::default().streams_per_client)]
    max_transfers_per_key: usize,
    /// The most bytes a second of content of one key [default: no limit]
    #[arg(long, value_name = "RATE", value_parser = units::parse_size)]
    limit_rate: Option<u64>,
    /// What is read and sent at once; for measurements
    #[arg(long, hide = true, value_name = "SIZE", value_parser = units::parse_size)]
    piece_size: Option<u64>,
    /// How many pieces of a transfer may be under way; for measurements
    #[arg(long, hide = true, value_name = "NUMBER")]
    read_ahead: Option<usize>,
    /// How many threads read for a transfer; for measurements
    #[arg(long, hide = true, value_name = "NUMBER")]
    readers: Option<usize>,
}

#[derive(Debug, Args)]
struct KeyArgs {
    #[command(subcommand)]
    command: KeyCommand,
}

#[derive(Debug, Subcommand)]
enum KeyCommand {
    /// Make a key and show it once; only its hash is kept
    Add(AddArgs),
    /// List names and rights
    List(KeyFileArgs),
    /// Remove a key; an agent that runs notices within seconds
    Remove(RemoveArgs),
}

#[derive(Debug, Args)]
struct KeyFileArgs {
    /// The file of keys
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    auth_key_file: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct AddArgs {
    /// A name for it: letters, digits, - _ . @
    #[arg(value_name = "NAME")]
    name: String,
    /// What it is good for: reading, or changing disks and their tracking, too
    #[arg(long, value_name = "RIGHTS", default_value = "read-write")]
    #[arg(value_parser = ["read-only", "read-write"])]
    rights: String,
    /// Write the key into this new file instead of showing it
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    to: Option<PathBuf>,
    /// Take over the key in this file, which clients have already, instead of making one
    #[arg(long, value_name = "FILE", conflicts_with = "to", value_hint = ValueHint::FilePath)]
    key_from: Option<PathBuf>,
    #[command(flatten)]
    file: KeyFileArgs,
}

#[derive(Debug, Args)]
struct RemoveArgs {
    /// Its name
    #[arg(value_name = "NAME")]
    name: String,
    #[command(flatten)]
    file: KeyFileArgs,
}

/// Does it.
pub fn run(app: &App, args: &AgentArgs) -> Result<Exit> {
    match &args.command {
        None => serve(app, &args.serve),
        Some(AgentCommand::Service(args)) => agent_service::run(app, args),
        Some(AgentCommand::Key(key)) => match &key.command {
            KeyCommand::Add(args) => add(app, args),
            KeyCommand::List(args) => list(app, args),
            KeyCommand::Remove(args) => remove(app, args),
        },
    }
}

fn serve(app: &App, args: &ServeAgentArgs) -> Result<Exit> {
    let options = args.options(app)?;
    let cancel = signals::cancel_on_signals()?;
    let platform = vmtide_agent::platform_of_this_host(&options);
    vmtide_agent::run(&options, platform, &cancel, |started| tell(app, started))
        .map_err(engine_error)?;
    app.output.summary(&serde_json::json!({}));
    Ok(Exit::Done)
}

impl ServeAgentArgs {
    /// The agent's options.
    pub fn options(&self, app: &App) -> Result<AgentOptions> {
        let auth_key_file = self.auth_key_file.clone().ok_or_else(no_key_file)?;
        let files = self.cert.clone().zip(self.key.clone());
        Ok(AgentOptions {
            listen: self.listen.clone(),
            roots: self.root.clone(),
            auth_key_file,
            certificate: files.map(|(certificate, key)| CertificateFiles { certificate, key }),
            state_directory: app.state_directory(),
            only_backup_program: app.global.hyperv.only_backup_program(),
            tls12: self.tls12,
            audit_log: self.audit_log.clone(),
            connections: ConnectionLimits {
                total: self.max_connections,
                per_peer: self.max_connections_per_peer,
                ..ConnectionLimits::default()
            },
            limits: self.limits(),
        })
    }

    fn limits(&self) -> Limits {
        let usual = StreamOptions::default();
        let piece_bytes = self.piece_size.and_then(|bytes| usize::try_from(bytes).ok());
        Limits {
            streams_total: self.max_transfers,
            streams_per_client: self.max_transfers_per_key,
            bytes_per_second_per_client: self.limit_rate.and_then(NonZeroU64::new),
            stream: StreamOptions {
                piece_bytes: piece_bytes.unwrap_or(usual.piece_bytes),
                read_ahead: self.read_ahead.unwrap_or(usual.read_ahead),
                readers: self.readers.unwrap_or(usual.readers),
            },
            ..Limits::default()
        }
    }
}

/// The same options as words of a command line, for a process that starts elsewhere.
#[cfg(any(windows, test))]
impl ServeAgentArgs {
    /// # Errors
    /// Where a path has no absolute form.
    pub fn words(&self) -> Result<Vec<std::ffi::OsString>> {
        // Taken apart, so that an option that is added is not forgotten here.
        let Self {
            listen,
            root,
            auth_key_file,
            cert,
            key,
            tls12,
            audit_log,
            max_connections,
            max_connections_per_peer,
            max_transfers,
            max_transfers_per_key,
            limit_rate,
            piece_size,
            read_ahead,
            readers,
        } = self;
        let mut words: Vec<std::ffi::OsString> = vec!["--listen".into(), listen.into()];
        let files = [
            ("--auth-key-file", auth_key_file),
            ("--cert", cert),
            ("--key", key),
            ("--audit-log", audit_log),
        ];
        let files = files.into_iter().filter_map(|(name, path)| Some((name, path.as_ref()?)));
        for (name, path) in root.iter().map(|root| ("--root", root)).chain(files) {
            let path = std::path::absolute(path)
                .map_err(|error| EngineError::io(format!("find {}", path.display()), error))?;
            words.push(name.into());
            words.push(path.into());
        }
        if *tls12 {
            words.push("--tls12".into());
        }
        let text = |number: &usize| number.to_string();
        let numbers = [
            ("--max-connections", Some(text(max_connections))),
            ("--max-connections-per-peer", Some(text(max_connections_per_peer))),
            ("--max-transfers", Some(text(max_transfers))),
            ("--max-transfers-per-key", Some(text(max_transfers_per_key))),
            ("--limit-rate", limit_rate.map(|bytes| bytes.to_string())),
            ("--piece-size", piece_size.map(|bytes| bytes.to_string())),
            ("--read-ahead", read_ahead.as_ref().map(text)),
            ("--readers", readers.as_ref().map(text)),
        ];
        for (name, number) in numbers {
            if let Some(number) = number {
                words.push(name.into());
                words.push(number.into());
            }
        }
        Ok(words)
    }
}

fn no_key_file() -> EngineError {
    EngineError::usage("--auth-key-file is needed; `vmtide agent key add NAME` makes a key")
}

/// Says where the agent listens and how to know it.
pub fn tell(app: &App, started: &Started) {
    let url = format!("https://{}", started.address);
    if started.key_is_plain {
        app.output.warning("the key stands in the clear in its file; see `vmtide agent key add`");
    }
    app.output.line(format!("listening at {url}"));
    app.output.line(format!("certificate {}", started.certificate.display()));
    app.output.line(format!("fingerprint (SHA-256) {}", started.fingerprint));
    app.output.event(
        "listening",
        &serde_json::json!({
            "url": url,
            "address": started.address,
            "certificate": started.certificate,
            "fingerprint_sha256": started.fingerprint.to_string(),
            "roots": started.roots,
            "keys": started.keys,
        }),
    );
}

impl KeyFileArgs {
    fn path(&self) -> Result<&Path> {
        self.auth_key_file.as_deref().ok_or_else(|| EngineError::usage("--auth-key-file is needed"))
    }
}

fn add(app: &App, args: &AddArgs) -> Result<Exit> {
    let path = args.file.path()?;
    let rights = if args.rights == "read-only" { Rights::ReadOnly } else { Rights::ReadWrite };
    if app.output.is_json() && args.to.is_none() && args.key_from.is_none() {
        return Err(EngineError::usage("a key is no part of the JSON, which is logged: give --to"));
    }
    let key = match &args.key_from {
        Some(from) => {
            let text = std::fs::read_to_string(from).map(Zeroizing::new).map_err(|error| {
                EngineError::io(format!("read the key in {}", from.display()), error)
            })?;
            let secret = Zeroizing::new(text.trim_end_matches(['\r', '\n']).to_owned());
            keys::take_over(&args.name, rights, secret)
        }
        None => keys::generate(&args.name, rights),
    };
    let key = key.map_err(engine_error)?;
    if let Some(to) = &args.to {
        write_secret(to, &key)?;
    }
    file::add(path, &args.name, &key).map_err(engine_error)?;
    if args.to.is_none() && args.key_from.is_none() {
        let text = Zeroizing::new(format!("{}\n", key.secret.as_str()));
        app.output.remark("the key, shown only now:");
        app.output
            .must_write(&text)
            .map_err(|error| EngineError::io("show the key; remove it again", error))?;
    }
    app.output.summary(&serde_json::json!({ "name": args.name, "rights": rights }));
    Ok(Exit::Done)
}

/// Writes the key into a new file that only its owner can read.
fn write_secret(path: &Path, key: &NewKey) -> Result<()> {
    let mut options = File::options();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let written = options.open(path).and_then(|mut file| {
        file.write_all(key.secret.as_bytes())?;
        file.write_all(b"\n")?;
        file.sync_all()
    });
    written.map_err(|error| EngineError::io(format!("write the key to {}", path.display()), error))
}

fn list(app: &App, args: &KeyFileArgs) -> Result<Exit> {
    let set = file::list(args.path()?).map_err(engine_error)?;
    let mut table = Table::new(&["name", "rights"]);
    for (name, rights) in set.entries() {
        table.row([name.to_owned(), rights.to_string()]);
    }
    app.output.lines(table.lines());
    let keys: Vec<_> = set
        .entries()
        .map(|(name, rights)| serde_json::json!({ "name": name, "rights": rights }))
        .collect();
    app.output.summary(&serde_json::json!({ "keys": keys, "in_the_clear": set.is_plain() }));
    Ok(Exit::Done)
}

fn remove(app: &App, args: &RemoveArgs) -> Result<Exit> {
    if !file::remove(args.file.path()?, &args.name).map_err(engine_error)? {
        return Err(EngineError::NotFound {
            what: format!("key {}", args.name),
            hint: "see `vmtide agent key list`".into(),
        });
    }
    app.output.line(format!("key {} removed", args.name));
    app.output.summary(&serde_json::json!({ "removed": args.name }));
    Ok(Exit::Done)
}

/// The program's error for the agent's.
pub fn engine_error(error: AgentError) -> EngineError {
    match error {
        AgentError::Usage(text) => EngineError::usage(text),
        AgentError::Io { context, source } => EngineError::io(context, source),
        AgentError::Refused { context, reason } => EngineError::refused(context, reason),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Parsed {
        #[command(flatten)]
        serve: ServeAgentArgs,
    }

    #[test]
    fn options_survive_being_written_as_words() {
        let given = "x --listen 127.0.0.1:1 --root /a --root /b --auth-key-file /k --cert /c --key /p --tls12 --audit-log /l \
                     --max-connections 2 --max-connections-per-peer 3 --max-transfers 4 --max-transfers-per-key 5 \
                     --limit-rate 6000 --piece-size 65536 --read-ahead 7 --readers 8";
        let words = |parsed: Parsed| parsed.serve.words().unwrap();
        let first = words(Parsed::parse_from(given.split_whitespace()));
        assert_eq!(first.len(), given.split_whitespace().count() - 1);
        let again = Parsed::parse_from(std::iter::once("x".into()).chain(first.clone()));
        assert_eq!(words(again), first);
        assert!(words(Parsed::parse_from(["x"])).len() >= 2);
    }
}
