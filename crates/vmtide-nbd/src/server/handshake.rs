//! The server's side of the handshake, over any stream.

use super::export::Export;
use super::options::ServerOptions;
use crate::proto::constants::{
    FLAG_FIXED_NEWSTYLE, FLAG_NO_ZEROES, INIT_MAGIC, MAX_OPTION_REPLIES, OPTION_MAGIC, opt, rep,
};
use crate::proto::export_info::{ExportInfo, TransmissionFlags};
use crate::proto::meta_context::{MetaContext, decode_queries};
use crate::proto::option::{
    ListedExport, OPTION_HEADER_BYTES, OptionReply, decode_go, decode_option_header,
};
use crate::proto::request::HeaderStyle;
use crate::proto::violation;
use std::io::{self, Read, Write};

/// The options one client may send; a real one sends under ten.
const MAX_OPTIONS: usize = 1024;

/// The contexts one client may choose.
const MAX_CONTEXTS: usize = 256;

/// How a handshake ended.
#[derive(Debug)]
pub(crate) enum Ended {
    /// The client chose an export.
    Chosen(Agreed),
    /// The client wants TLS; the handshake starts again over it.
    StartTls,
    /// The client said goodbye, or broke the rules.
    Goodbye,
}

/// What was agreed on.
#[derive(Debug)]
pub(crate) struct Agreed {
    /// The export's place in the server's list.
    pub(crate) export: usize,
    pub(crate) style: HeaderStyle,
    pub(crate) contexts: Vec<MetaContext>,
}

/// A handshake in progress.
pub(crate) struct Negotiation<'a> {
    exports: &'a [Export],
    options: &'a ServerOptions,
    /// Whether nothing but TLS is answered.
    needs_tls: bool,
    may_start_tls: bool,
    no_zeroes: bool,
    style: HeaderStyle,
    contexts: Vec<MetaContext>,
    contexts_of: Option<usize>,
}

/// Greets a client; says whether it goes without padding.
pub(crate) fn greet(stream: &mut (impl Read + Write)) -> io::Result<bool> {
    let mut greeting = Vec::with_capacity(18);
    greeting.extend(INIT_MAGIC.to_be_bytes());
    greeting.extend(OPTION_MAGIC.to_be_bytes());
    greeting.extend((FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES).to_be_bytes());
    stream.write_all(&greeting)?;
    let mut flags = [0; 4];
    stream.read_exact(&mut flags)?;
    let flags = u32::from_be_bytes(flags);
    if flags & !u32::from(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES) != 0 {
        return Err(broken("the client sets unknown flags"));
    }
    Ok(flags & u32::from(FLAG_NO_ZEROES) != 0)
}

fn broken(text: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, violation(text))
}

fn reply(stream: &mut impl Write, option: u32, kind: u32, data: Vec<u8>) -> io::Result<()> {
    stream.write_all(&OptionReply { option, kind, data }.encode())
}

fn refuse(stream: &mut impl Write, option: u32, kind: u32, why: &str) -> io::Result<()> {
    reply(stream, option, kind, why.as_bytes().to_vec())
}

impl<'a> Negotiation<'a> {
    /// Starts after the greeting, or anew (`secure`) after TLS.
    pub(crate) fn new(
        exports: &'a [Export],
        options: &'a ServerOptions,
        no_zeroes: bool,
        secure: bool,
    ) -> Self {
        let offers_tls = options.tls.is_some() && !secure;
        Self {
            exports,
            options,
            needs_tls: offers_tls,
            may_start_tls: offers_tls,
            no_zeroes,
            style: HeaderStyle::Simple,
            contexts: Vec::new(),
            contexts_of: None,
        }
    }

    /// Answers options until the client has chosen.
    pub(crate) fn run(mut self, stream: &mut (impl Read + Write)) -> io::Result<Ended> {
        for _ in 0..MAX_OPTIONS {
            let mut header = [0; OPTION_HEADER_BYTES];
            stream.read_exact(&mut header)?;
            let (option, length) = decode_option_header(&header)
                .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
            let mut data = Vec::new();
            stream.take(length.into()).read_to_end(&mut data)?;
            if data.len() as u64 != u64::from(length) {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            if let Some(ended) = self.answer(stream, option, &data)? {
                return Ok(ended);
            }
        }
        Err(broken("the client sends options without an end"))
    }

    fn answer(
        &mut self,
        stream: &mut impl Write,
        option: u32,
        data: &[u8],
    ) -> io::Result<Option<Ended>> {
        match option {
            opt::ABORT => {
                // The client may have hung up already.
                let _ = reply(stream, option, rep::ACK, Vec::new());
                return Ok(Some(Ended::Goodbye));
            }
            opt::STARTTLS if self.may_start_tls => {
                if !data.is_empty() {
                    refuse(stream, option, rep::ERR_INVALID, "no data is expected")?;
                    return Ok(None);
                }
                reply(stream, option, rep::ACK, Vec::new())?;
                return Ok(Some(Ended::StartTls));
            }
            opt::EXPORT_NAME if self.needs_tls => return Ok(Some(Ended::Goodbye)),
            _ if self.needs_tls => {
                refuse(stream, option, rep::ERR_TLS_REQD, "start TLS first")?;
            }
            opt::EXPORT_NAME => return self.export_name(stream, data).map(Some),
            opt::LIST => self.list(stream, data)?,
            opt::INFO | opt::GO => return self.go(stream, option, data),
            opt::STRUCTURED_REPLY if self.options.structured_replies => {
                self.change_style(stream, option, data, HeaderStyle::Structured)?;
            }
            opt::EXTENDED_HEADERS
                if self.options.structured_replies && self.options.extended_headers =>
            {
                self.change_style(stream, option, data, HeaderStyle::Extended)?;
            }
            opt::LIST_META_CONTEXT | opt::SET_META_CONTEXT if self.options.structured_replies => {
                self.meta_contexts(stream, option, data)?;
            }
            _ => refuse(stream, option, rep::ERR_UNSUP, "unknown option")?,
        }
        Ok(None)
    }

    fn change_style(
        &mut self,
        stream: &mut impl Write,
        option: u32,
        data: &[u8],
        style: HeaderStyle,
    ) -> io::Result<()> {
        if !data.is_empty() {
            return refuse(stream, option, rep::ERR_INVALID, "no data is expected");
        }
        if self.style == HeaderStyle::Extended && style == HeaderStyle::Structured {
            let why = "extended headers are agreed on";
            return refuse(stream, option, rep::ERR_EXT_HEADER_REQD, why);
        }
        self.style = style;
        reply(stream, option, rep::ACK, Vec::new())
    }

    fn list(&self, stream: &mut impl Write, data: &[u8]) -> io::Result<()> {
        if !data.is_empty() {
            return refuse(stream, opt::LIST, rep::ERR_INVALID, "no data is expected");
        }
        for export in self.exports.iter().take(MAX_OPTION_REPLIES) {
            let listed = ListedExport {
                name: export.name().to_owned(),
                description: export.description().unwrap_or_default().to_owned(),
            };
            reply(stream, opt::LIST, rep::SERVER, listed.encode())?;
        }
        reply(stream, opt::LIST, rep::ACK, Vec::new())
    }

    fn find(&self, name: &str) -> Option<(usize, &'a Export)> {
        let exports = self.exports;
        exports.iter().enumerate().find(|(_, export)| export.name() == name)
    }

    fn describe(&self, export: &Export) -> ExportInfo {
        let mut flags = export.flags().0;
        if self.style != HeaderStyle::Simple {
            flags |= TransmissionFlags::DONT_FRAGMENT;
        }
        if self.style == HeaderStyle::Extended {
            flags |= TransmissionFlags::STATUS_PAYLOAD;
        }
        let mut block_sizes = export.block_sizes();
        block_sizes.maximum_payload = self.options.max_payload_bytes;
        block_sizes.preferred = block_sizes.preferred.max(block_sizes.minimum);
        ExportInfo {
            size_bytes: export.device().size_bytes(),
            flags: TransmissionFlags(flags),
            block_sizes,
            canonical_name: Some(export.name().to_owned()),
            description: export.description().map(str::to_owned),
        }
    }

    fn agreed(&mut self, export: usize) -> Ended {
        let contexts = std::mem::take(&mut self.contexts);
        Ended::Chosen(Agreed {
            export,
            style: self.style,
            // Contexts are those of the export they were set for.
            contexts: if self.contexts_of == Some(export) { contexts } else { Vec::new() },
        })
    }

    fn export_name(&mut self, stream: &mut impl Write, data: &[u8]) -> io::Result<Ended> {
        let name = std::str::from_utf8(data).unwrap_or("\0");
        let Some((index, export)) = self.find(name) else {
            // This option has no error reply.
            return Ok(Ended::Goodbye);
        };
        if self.style == HeaderStyle::Extended {
            return Ok(Ended::Goodbye);
        }
        let info = self.describe(export);
        let mut out = info.size_bytes.to_be_bytes().to_vec();
        out.extend(info.flags.0.to_be_bytes());
        if !self.no_zeroes {
            out.extend([0; 124]);
        }
        stream.write_all(&out)?;
        Ok(self.agreed(index))
    }

    fn go(
        &mut self,
        stream: &mut impl Write,
        option: u32,
        data: &[u8],
    ) -> io::Result<Option<Ended>> {
        let (name, wanted) = match decode_go(data) {
            Ok(go) => go,
            Err(error) => {
                refuse(stream, option, rep::ERR_INVALID, &error.to_string())?;
                return Ok(None);
            }
        };
        let Some((index, export)) = self.find(&name) else {
            refuse(stream, option, rep::ERR_UNKNOWN, "there is no such export")?;
            return Ok(None);
        };
        for data in self.describe(export).encode(&wanted) {
            reply(stream, option, rep::INFO, data)?;
        }
        reply(stream, option, rep::ACK, Vec::new())?;
        Ok((option == opt::GO).then(|| self.agreed(index)))
    }

    fn meta_contexts(
        &mut self,
        stream: &mut impl Write,
        option: u32,
        data: &[u8],
    ) -> io::Result<()> {
        let set = option == opt::SET_META_CONTEXT;
        if set {
            // Whatever comes of it, earlier choices are gone.
            self.contexts.clear();
            self.contexts_of = None;
        }
        if self.style == HeaderStyle::Simple {
            let why = "structured replies come first";
            return refuse(stream, option, rep::ERR_INVALID, why);
        }
        let (name, queries) = match decode_queries(data) {
            Ok(parsed) => parsed,
            Err(error) => return refuse(stream, option, rep::ERR_INVALID, &error.to_string()),
        };
        let Some((index, export)) = self.find(&name) else {
            return refuse(stream, option, rep::ERR_UNKNOWN, "there is no such export");
        };
        let wanted = |context: &str| {
            let lists_all = !set && queries.is_empty();
            lists_all || queries.iter().any(|query| matches(query, context, set))
        };
        let chosen: Vec<_> = export
            .context_names()
            .filter(|name| wanted(name))
            .take(MAX_CONTEXTS)
            .zip(0..)
            .map(|(name, id)| MetaContext { id: if set { id } else { 0 }, name: name.to_owned() })
            .collect();
        for context in &chosen {
            reply(stream, option, rep::META_CONTEXT, context.encode())?;
        }
        if set {
            self.contexts = chosen;
            self.contexts_of = Some(index);
        }
        reply(stream, option, rep::ACK, Vec::new())
    }
}

/// Whether a query selects a context: by its name, or for a list by a namespace (`base:`,
/// `qemu:dirty-bitmap:`) it lies in.
fn matches(query: &str, context: &str, set: bool) -> bool {
    query == context || (!set && query.ends_with(':') && context.starts_with(query))
}
