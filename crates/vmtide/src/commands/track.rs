//! `vmtide track`: images whose changes vmtide tracks itself.

use crate::app::App;
use crate::commands::image::OpenArgs;
use crate::exit::Exit;
use crate::{signals, units};
use clap::{Args, ValueHint};
use std::path::{Path, PathBuf};
use std::time::Duration;
use vmtide_engine::serve::{DiskServer, ListenAddress, TlsServerOptions, tracked};
use vmtide_engine::track::{
    HostOptions, Options, changed_ranges, host_image, seal_moment, set_tracking, tracking_state,
};
use vmtide_engine::{EngineError, Result};
use vmtide_image::Format;

/// How often it is looked whether the user wants to end.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

const MS_PER_DAY: u64 = 24 * 60 * 60 * 1000;

const EXAMPLES: &str = "\
With --listen it offers the image over NBD until Ctrl-C or SIGTERM, which is its normal end (code 0), and tracks every write;
without, it asks whoever has the image open, or reads the files beside it (IMAGE.rct, IMAGE.mrt). After a crash the
answer to --changes may be larger than the truth, never smaller; where that cannot be kept, it is an error.

Examples:
  vmtide track web.vhdx --listen unix:/run/web.sock
  qemu-system-x86_64 … -drive format=raw,file=nbd:unix:/run/web.sock
  id=$(vmtide track web.vhdx --checkpoint)
  vmtide track web.vhdx --changes \"$id\" > changes.json
  vmtide track web.vhdx --state --json";

/// The options of `track`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct TrackArgs {
    /// A disk image
    #[arg(value_name = "IMAGE", value_hint = ValueHint::FilePath)]
    image: PathBuf,
    /// What is done.
    #[command(flatten)]
    action: Action,
    /// What one bit of a tracking id stands for, a power of two from 4 KiB to 16 MiB
    #[arg(long, value_name = "SIZE", default_value = "64KiB", value_parser = units::parse_size)]
    granularity: u64,
    /// What a mark that survives a crash stands for, a power of two up to 1 GiB
    #[arg(long, value_name = "SIZE", default_value = "16MiB", value_parser = units::parse_size)]
    region: u64,
    /// Retain at most so many ids
    #[arg(long, value_name = "NUMBER", default_value_t = 32)]
    #[arg(value_parser = clap::value_parser!(u16).range(1..=1024))]
    max_ids: u16,
    /// Retain ids for so many days [default: until there are too many]
    #[arg(long, value_name = "NUMBER")]
    max_age_days: Option<u32>,
    /// Write the state of tracking every so many seconds while the guest writes; 0 for only when it must be
    #[arg(long, value_name = "SECONDS", default_value_t = 300)]
    save_interval: u32,
    /// Where frozen views keep what is overwritten [default: TMPDIR, or else /var/tmp]
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    scratch_dir: Option<PathBuf>,
    /// The most that one frozen view keeps; the view fails beyond it
    #[arg(long, value_name = "SIZE", default_value = "32GiB", value_parser = units::parse_size)]
    scratch_limit: u64,
    /// Even where other images read through it, which breaks them
    #[arg(long)]
    force: bool,
    /// Serve over TLS alone, with this certificate (PEM)
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// The private key of --tls-cert (PEM)
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// Let in only clients with a certificate of these authorities (PEM)
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_client_ca: Option<PathBuf>,
    /// The name of the export [default: the default export, without a name]
    #[arg(long, value_name = "NAME")]
    export: Option<String>,
    /// The image's format [default: found by its content]
    #[arg(long, value_name = "FORMAT")]
    format: Option<Format>,
    /// How parents are found.
    #[command(flatten)]
    open: OpenArgs,
}

/// One of these.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct Action {
    /// Host the image, and listen there: unix:PATH or HOST:PORT
    #[arg(long, value_name = "ADDRESS")]
    listen: Option<ListenAddress>,
    /// Show whether it is tracked, the newest id, and whether it was written since
    #[arg(long)]
    state: bool,
    /// Seal this moment and write its id
    #[arg(long)]
    checkpoint: bool,
    /// Write the ranges that were written since this id, as JSON
    #[arg(long, value_name = "ID")]
    changes: Option<String>,
    /// Switch tracking on
    #[arg(long)]
    enable: bool,
    /// Switch tracking off, and forget all ids
    #[arg(long)]
    disable: bool,
}

/// Does what is asked.
pub fn run(app: &App, args: &TrackArgs) -> Result<Exit> {
    let (image, action) = (&args.image, &args.action);
    if let Some(address) = &action.listen {
        return host(app, args, address);
    }
    if let Some(id) = &action.changes {
        return changes(app, image, id);
    }
    if action.checkpoint {
        let id = seal_moment(image)?;
        app.output.line(&id);
        app.output.summary(&serde_json::json!({ "id": id }));
        return Ok(Exit::Done);
    }
    if !action.state {
        set_tracking(image, action.enable)?;
    }
    let state = tracking_state(image)?;
    match (state.enabled, state.newer_changes) {
        (false, _) => app.output.line("change tracking is off"),
        (true, true) => app.output.line(format!("{} (written since)", state.most_recent_id)),
        (true, false) => app.output.line(format!("{} (not written since)", state.most_recent_id)),
    }
    app.output.summary(&state);
    Ok(Exit::Done)
}

fn changes(app: &App, image: &Path, id: &str) -> Result<Exit> {
    let changed = changed_ranges(image, id)?;
    let bytes = changed.total_bytes();
    let text = serde_json::to_string(&changed)
        .map_err(|error| EngineError::io("write the changed ranges", error))?;
    app.output.line(text);
    app.output.summary(&serde_json::json!({ "ranges": changed, "changed_bytes": bytes }));
    Ok(Exit::Done)
}

fn host(app: &App, args: &TrackArgs, address: &ListenAddress) -> Result<Exit> {
    let cancel = signals::cancel_on_signals()?;
    let image =
        host_image(&args.image, &args.open.options(args.format), args.force, &options(args)?)?;
    let state = image.disk().state();
    let served = tracked(image, args.export.as_deref().unwrap_or_default());
    let tls = args.tls_cert.clone().zip(args.tls_key.clone()).map(|(certificate, key)| {
        TlsServerOptions { certificate, key, client_authorities: args.tls_client_ca.clone() }
    });
    let server = DiskServer::start(vec![served], address, tls)?;
    if server.is_exposed() {
        app.output.warning("the port is open to the network, and whoever reaches it can connect");
    }
    for export in server.exports() {
        app.output.line(format!(
            "tracking {} ({}) at {}, newest id {}",
            export.description,
            units::size(export.size_bytes),
            export.url,
            state.most_recent_id
        ));
    }
    let exports = server.exports().to_vec();
    app.output.event("listening", &serde_json::json!({ "exports": exports, "tracking": state }));
    while !cancel.is_cancelled() {
        std::thread::sleep(POLL_INTERVAL);
    }
    server.stop()?;
    app.output.summary(&serde_json::json!({ "exports": exports }));
    Ok(Exit::Done)
}

fn options(args: &TrackArgs) -> Result<HostOptions> {
    let small = |name: &str, bytes: u64| {
        u32::try_from(bytes).map_err(|_| EngineError::usage(format!("--{name} is too large")))
    };
    Ok(HostOptions {
        tracking: Options {
            granularity_bytes: small("granularity", args.granularity)?,
            region_bytes: small("region", args.region)?,
            max_ids: usize::from(args.max_ids),
            max_age_ms: args.max_age_days.map(|days| u64::from(days) * MS_PER_DAY),
            enable: true,
            scratch_directory: args.scratch_dir.clone(),
            scratch_limit_bytes: args.scratch_limit,
            ..Options::default()
        },
        save_interval_ms: u64::from(args.save_interval) * 1000,
        socket: true,
    })
}
