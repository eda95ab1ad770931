//! `vmtide serve`: disks over NBD.

use crate::app::App;
use crate::commands::image::OpenArgs;
use crate::exit::Exit;
use crate::{repository, signals, units};
use clap::Args;
use std::path::{Path, PathBuf};
use std::time::Duration;
use vmtide_engine::image::{DiskSpec, format_by_name};
use vmtide_engine::serve::{
    Access, DiskServer, ListenAddress, TlsServerOptions, open_image, open_point,
};
use vmtide_engine::source::split_scheme;
use vmtide_engine::{EngineError, Result, resolve};
use vmtide_image::Format;

/// How often it is looked whether the user wants to end.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

const EXAMPLES: &str = "\
Serves until Ctrl-C or SIGTERM, which is its normal end (code 0). Any number of clients may connect,
each with several connections. When it is ready it writes the URLs to standard output, with --json as
a `listening` event.

What is not a file or URL is a restore point of the repository of -r, whose disks can be read; several
disks are exports of their ids. Whoever reaches a TCP port can connect: use 127.0.0.1 or a Unix socket
unless the network is trusted, or TLS with --tls-client-ca.

Examples:
  vmtide serve web.vhdx --nbd unix:/run/web.sock
  vmtide serve web.qcow2 --nbd 127.0.0.1:10809 --writable
  vmtide serve web.vhdx --nbd 0.0.0.0:10809 --tls-cert cert.pem --tls-key key.pem --tls-client-ca ca.pem
  vmtide serve web@latest -r /backup --nbd unix:/run/web.sock --disk virtio0
  nbdcopy 'nbd+unix:///?socket=/run/web.sock' copy.raw";

/// The options of `serve`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct ServeArgs {
    /// A disk image, block device or NBD URL, or a restore point
    #[arg(value_name = "IMAGE|POINT")]
    what: String,
    /// Where to listen: unix:PATH or HOST:PORT
    #[arg(long, value_name = "ADDRESS")]
    nbd: ListenAddress,
    /// Let clients write; the image is closed in order at the end
    #[arg(long)]
    writable: bool,
    /// With --writable: even where other images read through it, which breaks them
    #[arg(long, requires = "writable")]
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
    /// An internal snapshot of a qcow2 image, by id or name
    #[arg(long, value_name = "NAME")]
    snapshot: Option<String>,
    /// Only this disk of a restore point
    #[arg(long, value_name = "DISK")]
    disk: Option<String>,
}

/// Serves.
pub fn run(app: &App, args: &ServeArgs) -> Result<Exit> {
    if is_image(&args.what) || app.global.repository.is_none() {
        let mut options = args.open.options(args.format);
        options.snapshot.clone_from(&args.snapshot);
        let name = args.export.as_deref().unwrap_or_default();
        let access = match (args.writable, args.force) {
            (false, _) => Access::ReadOnly,
            (true, false) => Access::Writable,
            (true, true) => Access::WritableParent,
        };
        let disk = open_image(&DiskSpec::parse(&args.what)?, &options, name, access)?;
        return serve(app, args, vec![disk]);
    }
    if args.writable {
        return Err(EngineError::usage("a restore point never changes: --writable is for images"));
    }
    let repository = repository::open(app)?;
    // What is served must not be pruned.
    let _lease = repository.lease(vmtide_repo::Purpose::Read)?;
    let point = resolve(&repository, &args.what)?;
    let mut disks = open_point(&repository, &point, args.disk.as_deref())?;
    if let (Some(name), [only]) = (&args.export, &mut disks[..]) {
        only.name.clone_from(name);
    }
    serve(app, args, disks)
}

/// What is there as a file or is written like one is no restore point.
fn is_image(what: &str) -> bool {
    let path = Path::new(what);
    split_scheme(what).is_some() || path.exists() || format_by_name(path).is_some()
}

fn serve(
    app: &App,
    args: &ServeArgs,
    disks: Vec<vmtide_engine::serve::ServedDisk>,
) -> Result<Exit> {
    let cancel = signals::cancel_on_signals()?;
    let tls = args.tls_cert.clone().zip(args.tls_key.clone()).map(|(certificate, key)| {
        TlsServerOptions { certificate, key, client_authorities: args.tls_client_ca.clone() }
    });
    let server = DiskServer::start(disks, &args.nbd, tls)?;
    if server.is_exposed() {
        app.output.warning("the port is open to the network, and whoever reaches it can connect");
    }
    for export in server.exports() {
        let access = if export.writable { "writable" } else { "read-only" };
        app.output.line(format!(
            "serving {} ({}, {access}) at {}",
            export.description,
            units::size(export.size_bytes),
            export.url
        ));
    }
    app.output.event("listening", &serde_json::json!({ "exports": server.exports() }));
    while !cancel.is_cancelled() {
        std::thread::sleep(POLL_INTERVAL);
    }
    let exports = server.exports().to_vec();
    server.stop()?;
    app.output.summary(&serde_json::json!({ "exports": exports }));
    Ok(Exit::Done)
}
