//! Making connections: socket, TLS, handshake.

use super::connection::Connection;
use super::handshake::{self, Agreement, Greeting, HandshakeError, Wishes};
use crate::options::NbdOptions;
use crate::proto::export_info::ExportInfo;
use crate::proto::option::ListedExport;
use crate::transport::{Stream, TimedStream, TlsClientOptions, client_handshake, split};
use crate::url::{NbdAddress, NbdUrl};
use std::io::{Read, Write};
use std::sync::Arc;
use vmtide_block::{BlockError, Result};

/// A stream of either kind, during the handshake.
trait Wire: Read + Write {}
impl<T: Read + Write> Wire for T {}

struct Greeted {
    stream: Stream,
    tls: Option<rustls::ClientConnection>,
    greeting: Greeting,
}

fn tls_options(url: &NbdUrl, options: &NbdOptions) -> TlsClientOptions {
    let given = &options.tls;
    TlsClientOptions {
        certificates: url.tls_certificates.clone().or_else(|| given.certificates.clone()),
        hostname: url.tls_hostname.clone().or_else(|| given.hostname.clone()),
        accept_any_certificate: given.accept_any_certificate || !url.tls_verify_peer,
    }
}

fn greet(url: &NbdUrl, options: &NbdOptions) -> Result<Greeted> {
    let failed = |error: HandshakeError| error.into_block_error(format!("connect to {url}"));
    let stream = Stream::connect(&url.address, options.connect_timeout())
        .map_err(|error| BlockError::io(format!("connect to {url}"), error))?;
    let mut timed = TimedStream::new(&stream, options.handshake_timeout());
    let greeting = handshake::greet(&mut timed).map_err(failed)?;
    let tls = if url.tls {
        handshake::start_tls(&mut timed, greeting).map_err(failed)?;
        let hostname = match &url.address {
            NbdAddress::Tcp { host, .. } => host.as_str(),
            NbdAddress::Unix { .. } => "localhost",
        };
        let options = tls_options(url, options);
        Some(client_handshake(&options, hostname, &mut timed)?)
    } else {
        None
    };
    Ok(Greeted { stream, tls, greeting })
}

/// Goes on with the handshake through whatever layers there are.
fn talk<T>(
    greeted: &mut Greeted,
    url: &NbdUrl,
    options: &NbdOptions,
    then: impl FnOnce(&mut dyn Wire, Greeting) -> std::result::Result<T, HandshakeError>,
) -> Result<T> {
    let mut timed = TimedStream::new(&greeted.stream, options.handshake_timeout());
    let result = match &mut greeted.tls {
        Some(tls) => then(&mut rustls::Stream::new(tls, &mut timed), greeted.greeting),
        None => then(&mut timed, greeted.greeting),
    };
    result.map_err(|error| error.into_block_error(format!("connect to {url}")))
}

fn wishes<'a>(url: &'a NbdUrl, options: &'a NbdOptions) -> Wishes<'a> {
    Wishes {
        export: &url.export,
        contexts: &options.meta_contexts,
        structured_replies: options.structured_replies,
        extended_headers: options.extended_headers,
    }
}

/// One connection, in the transmission phase.
pub(super) fn connect(url: &NbdUrl, options: &NbdOptions) -> Result<(Connection, Agreement)> {
    let mut greeted = greet(url, options)?;
    let agreement = talk(&mut greeted, url, options, |mut wire, greeting| {
        handshake::negotiate(&mut wire, greeting, &wishes(url, options))
    })?;
    let stream = Arc::new(greeted.stream);
    let halves = split(Arc::clone(&stream), greeted.tls.map(Into::into));
    let connection = Connection::start(stream, halves, agreement.style, options.request_timeout())
        .map_err(|error| BlockError::io(format!("connect to {url}"), error))?;
    Ok((connection, agreement))
}

/// The exports of the server at `url`, whose own export name does not matter
/// (`NBD_OPT_LIST`). A server may keep some or all to itself.
///
/// # Errors
/// What connecting to it says, or [`BlockError::Unsupported`] where the server does not list.
pub fn list_exports(url: &NbdUrl, options: &NbdOptions) -> Result<Vec<ListedExport>> {
    let mut greeted = greet(url, options)?;
    talk(&mut greeted, url, options, |mut wire, greeting| handshake::list(&mut wire, greeting))
}

/// An export as a server describes it to one who only asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProbedExport {
    /// Size, flags, block sizes, description.
    pub info: ExportInfo,
    /// The metadata contexts on offer; without queries in the options, all of them.
    pub contexts: Vec<String>,
}

/// Describes the export at `url` without opening it (`NBD_OPT_INFO`,
/// `NBD_OPT_LIST_META_CONTEXT` with the options' `meta_contexts` as queries).
///
/// # Errors
/// What connecting to it says; an I/O error of kind `NotFound` where there is no such export.
pub fn probe_export(url: &NbdUrl, options: &NbdOptions) -> Result<ProbedExport> {
    let mut greeted = greet(url, options)?;
    talk(&mut greeted, url, options, |mut wire, greeting| {
        let (info, contexts) = handshake::inform(&mut wire, greeting, &wishes(url, options))?;
        Ok(ProbedExport { info, contexts })
    })
}
