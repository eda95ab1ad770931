//! WS-Management: Windows hosts managed over the network, with nothing installed on them.
//!
//! [`WsmanCim`] is the transport of [`vmtide_cim::Cim`] that speaks to WinRM, by HTTP (port 5985, every message
//! sealed by NTLM or Kerberos) or HTTPS (5986). It knows nothing of Hyper-V but its namespace. From the wire up:
//!
//! * `http`: one connection, HTTP/1.1, because NTLM and Kerberos make the *connection* known, not a request;
//! * `tls`, `binding`: whose certificate is trusted, and what ties an authentication to it;
//! * `auth`: contexts of NTLM and Kerberos (over `vmtide_sspi`), and the form of sealed messages;
//! * `session`: a connection with its authentication, `pool`: a few of them;
//! * `envelope`, `answer`, `fault`, `moment`: what is written and read, over `xml`, bounded trees;
//! * `client`: operations, their batches, and which of them may be sent again.
//!
//! All that hosts send is hostile until it is read: answers are bounded in bytes, depth and elements, sealed ones are
//! opened before they are parsed, and on a connection that seals nothing unsealed is believed.

mod answer;
mod auth;
mod binding;
mod certificate;
mod client;
mod envelope;
mod fault;
#[doc(hidden)]
pub mod fuzzing;
mod http;
mod moment;
mod options;
mod pool;
mod session;
mod tls;
mod xml;

pub use client::{Identity, WsmanCim};
pub use options::{
    Authentication, ClientCertificate, Credentials, Fingerprint, OptionsError, Scheme, WsmanOptions,
};
