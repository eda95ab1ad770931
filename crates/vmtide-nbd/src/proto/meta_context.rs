//! Metadata contexts: `NBD_OPT_SET_META_CONTEXT` and `NBD_OPT_LIST_META_CONTEXT`.

use super::wire::{Fields, put_counted_string, string};
use super::{ProtocolError, violation};

/// A context the server agreed to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MetaContext {
    /// The number that names it in replies on this connection.
    pub(crate) id: u32,
    /// Its name, e.g. `base:allocation`.
    pub(crate) name: String,
}

impl MetaContext {
    /// From the data of `NBD_REP_META_CONTEXT`.
    pub(crate) fn decode(data: &[u8]) -> Result<Self, ProtocolError> {
        let mut fields = Fields::new("a metadata context", data);
        let id = fields.u32()?;
        let name = string("a metadata context", fields.rest())?;
        Ok(Self { id, name })
    }

    /// The data of `NBD_REP_META_CONTEXT`.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = self.id.to_be_bytes().to_vec();
        out.extend(self.name.as_bytes());
        out
    }
}

/// The data of both options.
pub(crate) fn encode_queries(export: &str, queries: &[String]) -> Vec<u8> {
    let mut out = Vec::new();
    put_counted_string(&mut out, export);
    out.extend(u32::try_from(queries.len()).unwrap_or(0).to_be_bytes());
    for query in queries {
        put_counted_string(&mut out, query);
    }
    out
}

/// The export and the queries of both options.
pub(crate) fn decode_queries(data: &[u8]) -> Result<(String, Vec<String>), ProtocolError> {
    let mut fields = Fields::new("a metadata query", data);
    let export = fields.counted_string()?;
    let count = fields.u32()?;
    // Every query takes at least its length field, so this bounds the loop and the memory.
    if u64::from(count) * 4 > data.len() as u64 {
        return Err(violation(format!("{count} metadata queries do not fit {} bytes", data.len())));
    }
    let queries = (0..count).map(|_| fields.counted_string()).collect::<Result<_, _>>()?;
    fields.end()?;
    Ok((export, queries))
}

/// The payload of `NBD_CMD_BLOCK_STATUS` that asks for some contexts only
/// (`NBD_FLAG_BLOCK_STATUS_PAYLOAD`).
pub(crate) fn encode_status_filter(length: u64, contexts: &[u32]) -> Vec<u8> {
    let mut out = length.to_be_bytes().to_vec();
    out.extend(contexts.iter().flat_map(|id| id.to_be_bytes()));
    out
}

/// The effect length and the contexts of such a payload.
pub(crate) fn decode_status_filter(payload: &[u8]) -> Result<(u64, Vec<u32>), ProtocolError> {
    let mut fields = Fields::new("a block status payload", payload);
    let length = fields.u64()?;
    let rest = fields.rest();
    if !rest.len().is_multiple_of(4) {
        return Err(violation("a block status payload has a torn context number"));
    }
    let mut ids = Fields::new("a block status payload", rest);
    let contexts = (0..rest.len() / 4).map(|_| ids.u32()).collect::<Result<_, _>>()?;
    Ok((length, contexts))
}
