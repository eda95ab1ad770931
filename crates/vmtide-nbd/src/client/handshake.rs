//! The client's side of the handshake, over any stream.

use crate::proto::constants::{
    CONTEXT_ALLOCATION, FLAG_FIXED_NEWSTYLE, FLAG_NO_ZEROES, INIT_MAGIC, MAX_OPTION_REPLIES,
    MAX_OPTION_REPLIES_BYTES, OLDSTYLE_MAGIC, OPTION_MAGIC, info, opt, rep,
};
use crate::proto::export_info::{ExportInfo, TransmissionFlags, check_size};
use crate::proto::meta_context::{MetaContext, encode_queries};
use crate::proto::option::{
    ListedExport, OPTION_REPLY_HEADER_BYTES, OptionReply, Refusal, encode_go, encode_option,
};
use crate::proto::request::HeaderStyle;
use crate::proto::wire::Fields;
use crate::proto::{ProtocolError, violation};
use std::io::{self, Read, Write};
use vmtide_block::BlockError;

/// Why a handshake failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HandshakeError {
    /// The stream broke or timed out.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The peer does not speak NBD, or breaks its rules.
    #[error("{0}")]
    Protocol(#[from] ProtocolError),
    /// The server said no.
    #[error("{0}")]
    Refused(#[from] Refusal),
    /// The server speaks NBD, but a kind of it that we do not use.
    #[error("{0}")]
    Unsupported(&'static str),
}

impl HandshakeError {
    /// The error as that of a block device.
    pub(crate) fn into_block_error(self, context: String) -> BlockError {
        match self {
            Self::Io(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                BlockError::disconnected(context, "the server hung up during the handshake")
            }
            Self::Io(error) => BlockError::io(context, error),
            Self::Protocol(error) => BlockError::damaged(context, error.to_string()),
            Self::Unsupported(why) => BlockError::unsupported(context, why),
            Self::Refused(refusal) => {
                let kind = match refusal.code {
                    rep::ERR_UNKNOWN => io::ErrorKind::NotFound,
                    rep::ERR_TLS_REQD | rep::ERR_POLICY => io::ErrorKind::PermissionDenied,
                    _ => return BlockError::unsupported(context, refusal.to_string()),
                };
                BlockError::io(context, io::Error::new(kind, refusal.to_string()))
            }
        }
    }
}

type Result<T> = std::result::Result<T, HandshakeError>;

/// What the server's first bytes allow.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Greeting {
    fixed: bool,
    no_zeroes: bool,
}

/// What to ask for.
#[derive(Clone, Debug)]
pub(crate) struct Wishes<'a> {
    pub(crate) export: &'a str,
    pub(crate) contexts: &'a [String],
    pub(crate) structured_replies: bool,
    pub(crate) extended_headers: bool,
}

/// What was agreed on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Agreement {
    pub(crate) info: ExportInfo,
    pub(crate) style: HeaderStyle,
    pub(crate) contexts: Vec<MetaContext>,
}

/// Reads the server's greeting and answers it.
pub(crate) fn greet(stream: &mut (impl Read + Write)) -> Result<Greeting> {
    let mut bytes = [0; 18];
    stream.read_exact(&mut bytes[..16])?;
    let mut fields = Fields::new("the greeting", &bytes[..16]);
    let (init, kind) = (fields.u64()?, fields.u64()?);
    let magic = |found, expected| ProtocolError::Magic { what: "the greeting", found, expected };
    if init != INIT_MAGIC {
        return Err(magic(init, INIT_MAGIC).into());
    }
    if kind == OLDSTYLE_MAGIC {
        return Err(HandshakeError::Unsupported(
            "the server speaks only the oldstyle protocol of before 2012",
        ));
    }
    if kind != OPTION_MAGIC {
        return Err(magic(kind, OPTION_MAGIC).into());
    }
    stream.read_exact(&mut bytes[16..])?;
    let flags = u16::from_be_bytes([bytes[16], bytes[17]]);
    let greeting = Greeting {
        fixed: flags & FLAG_FIXED_NEWSTYLE != 0,
        no_zeroes: flags & FLAG_NO_ZEROES != 0,
    };
    let answer = u32::from(flags & (FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES));
    stream.write_all(&answer.to_be_bytes())?;
    Ok(greeting)
}

/// Asks for TLS; on success both sides start it next.
pub(crate) fn start_tls(stream: &mut (impl Read + Write), greeting: Greeting) -> Result<()> {
    if !greeting.fixed {
        return Err(HandshakeError::Unsupported(
            "the server is too old for TLS (no fixed newstyle)",
        ));
    }
    ask(stream, "NBD_OPT_STARTTLS", opt::STARTTLS, &[]).map(drop)
}

/// Agrees on headers, contexts and the export, and enters the transmission phase.
pub(crate) fn negotiate(
    stream: &mut (impl Read + Write),
    greeting: Greeting,
    wishes: &Wishes<'_>,
) -> Result<Agreement> {
    if !greeting.fixed {
        let info = choose_by_name(stream, greeting, wishes.export)?;
        return Ok(Agreement { info, style: HeaderStyle::Simple, contexts: Vec::new() });
    }
    let style = agree_on_style(stream, wishes)?;
    let contexts =
        if style == HeaderStyle::Simple { Vec::new() } else { set_contexts(stream, wishes)? };
    let info = match go(stream, "NBD_OPT_GO", opt::GO, wishes.export) {
        Err(HandshakeError::Refused(refusal))
            if refusal.code == rep::ERR_UNSUP && style != HeaderStyle::Extended =>
        {
            choose_by_name(stream, greeting, wishes.export)?
        }
        other => other?,
    };
    Ok(Agreement { info, style, contexts })
}

/// What an export is, without entering the transmission phase.
pub(crate) fn inform(
    stream: &mut (impl Read + Write),
    greeting: Greeting,
    wishes: &Wishes<'_>,
) -> Result<(ExportInfo, Vec<String>)> {
    need_fixed(greeting)?;
    let style = agree_on_style(stream, wishes)?;
    let mut contexts = Vec::new();
    if style != HeaderStyle::Simple {
        let data = encode_queries(wishes.export, wishes.contexts);
        let option = opt::LIST_META_CONTEXT;
        let replies = match ask(stream, "NBD_OPT_LIST_META_CONTEXT", option, &data) {
            Err(HandshakeError::Refused(refusal)) if refusal.code == rep::ERR_UNSUP => Vec::new(),
            other => other?,
        };
        for reply in replies {
            contexts.push(MetaContext::decode(&reply.data)?.name);
        }
    }
    let info = go(stream, "NBD_OPT_INFO", opt::INFO, wishes.export)?;
    abort(stream);
    Ok((info, contexts))
}

/// The server's exports.
pub(crate) fn list(
    stream: &mut (impl Read + Write),
    greeting: Greeting,
) -> Result<Vec<ListedExport>> {
    need_fixed(greeting)?;
    let mut exports = Vec::new();
    for reply in ask(stream, "NBD_OPT_LIST", opt::LIST, &[])? {
        exports.push(ListedExport::decode(&reply.data)?);
    }
    abort(stream);
    Ok(exports)
}

fn need_fixed(greeting: Greeting) -> Result<()> {
    if greeting.fixed {
        return Ok(());
    }
    Err(HandshakeError::Unsupported(
        "the server is too old to describe its exports (no fixed newstyle)",
    ))
}

/// Says goodbye. The answer does not matter, nor whether there is one.
fn abort(stream: &mut impl Write) {
    let _ = stream.write_all(&encode_option(opt::ABORT, &[]));
}

fn agree_on_style(stream: &mut (impl Read + Write), wishes: &Wishes<'_>) -> Result<HeaderStyle> {
    let mut offers = Vec::new();
    if wishes.structured_replies && wishes.extended_headers {
        let option = ("NBD_OPT_EXTENDED_HEADERS", opt::EXTENDED_HEADERS);
        offers.push((option, HeaderStyle::Extended));
    }
    if wishes.structured_replies {
        let option = ("NBD_OPT_STRUCTURED_REPLY", opt::STRUCTURED_REPLY);
        offers.push((option, HeaderStyle::Structured));
    }
    for ((name, option), style) in offers {
        match ask(stream, name, option, &[]) {
            Ok(_) => return Ok(style),
            // Old servers answer with various errors; all mean no.
            Err(HandshakeError::Refused(refusal)) if refusal.code != rep::ERR_TLS_REQD => {}
            Err(error) => return Err(error),
        }
    }
    Ok(HeaderStyle::Simple)
}

fn set_contexts(stream: &mut (impl Read + Write), wishes: &Wishes<'_>) -> Result<Vec<MetaContext>> {
    let mut queries = vec![CONTEXT_ALLOCATION.to_owned()];
    for context in wishes.contexts {
        if !queries.contains(context) {
            queries.push(context.clone());
        }
    }
    let data = encode_queries(wishes.export, &queries);
    let option = opt::SET_META_CONTEXT;
    let replies = match ask(stream, "NBD_OPT_SET_META_CONTEXT", option, &data) {
        Err(HandshakeError::Refused(refusal)) if refusal.code == rep::ERR_UNSUP => Vec::new(),
        other => other?,
    };
    let mut contexts: Vec<MetaContext> = Vec::new();
    for reply in replies {
        let context = MetaContext::decode(&reply.data)?;
        let known = |known: &MetaContext| known.id == context.id || known.name == context.name;
        if contexts.iter().any(known) {
            return Err(violation(format!("context {} is set twice", context.name)).into());
        }
        // A server may select by wildcard; what we did not ask for by name we do not know.
        contexts.push(context);
    }
    Ok(contexts)
}

fn go(
    stream: &mut (impl Read + Write),
    name: &'static str,
    option: u32,
    export: &str,
) -> Result<ExportInfo> {
    let wanted = [info::NAME, info::DESCRIPTION, info::BLOCK_SIZE];
    let replies = ask(stream, name, option, &encode_go(export, &wanted))?;
    let mut result = ExportInfo::default();
    let mut described = false;
    for reply in replies {
        described |= result.apply(&reply.data)? == info::EXPORT;
    }
    if !described {
        return Err(violation("the server accepts an export without describing it").into());
    }
    Ok(result)
}

fn choose_by_name(
    stream: &mut (impl Read + Write),
    greeting: Greeting,
    export: &str,
) -> Result<ExportInfo> {
    stream.write_all(&encode_option(opt::EXPORT_NAME, export.as_bytes()))?;
    let mut bytes = [0; 10 + 124];
    let length = if greeting.no_zeroes { 10 } else { bytes.len() };
    stream.read_exact(&mut bytes[..length])?;
    let mut fields = Fields::new("the export's description", &bytes[..10]);
    let size_bytes = fields.u64()?;
    check_size(size_bytes)?;
    Ok(ExportInfo { size_bytes, flags: TransmissionFlags(fields.u16()?), ..ExportInfo::default() })
}

/// Sends an option and collects its replies up to the acknowledgement.
fn ask(
    stream: &mut (impl Read + Write),
    name: &'static str,
    option: u32,
    data: &[u8],
) -> Result<Vec<OptionReply>> {
    let expected = match option {
        opt::LIST => Some(rep::SERVER),
        opt::INFO | opt::GO => Some(rep::INFO),
        opt::LIST_META_CONTEXT | opt::SET_META_CONTEXT => Some(rep::META_CONTEXT),
        _ => None,
    };
    stream.write_all(&encode_option(option, data))?;
    let mut replies = Vec::new();
    let mut total_bytes = 0;
    loop {
        let reply = read_reply(stream)?;
        if reply.option != option {
            return Err(violation(format!(
                "the server answers option {} where {name} was asked",
                reply.option
            ))
            .into());
        }
        if reply.kind == rep::ACK {
            return Ok(replies);
        }
        if reply.is_error() {
            return Err(Refusal::new(name, &reply).into());
        }
        if Some(reply.kind) != expected {
            let kind = reply.kind;
            return Err(violation(format!("the server answers {name} with type {kind}")).into());
        }
        total_bytes += reply.data.len();
        if replies.len() >= MAX_OPTION_REPLIES || total_bytes > MAX_OPTION_REPLIES_BYTES {
            return Err(violation(format!("the server answers {name} without an end")).into());
        }
        replies.push(reply);
    }
}

fn read_reply(stream: &mut impl Read) -> Result<OptionReply> {
    let mut header = [0; OPTION_REPLY_HEADER_BYTES];
    stream.read_exact(&mut header)?;
    let (mut reply, length) = OptionReply::decode_header(&header)?;
    // Bounded by MAX_OPTION_BYTES; taken as it comes, so a lie about the length costs nothing.
    let read = stream.take(length.into()).read_to_end(&mut reply.data)?;
    if read as u64 != u64::from(length) {
        return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
    }
    Ok(reply)
}
