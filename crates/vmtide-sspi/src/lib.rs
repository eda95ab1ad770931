//! Logins at Windows hosts, as WinRM and SMB both need them.
//!
//! NTLM and Kerberos themselves are those of the `sspi` crate. Around it both transports need the same: which
//! mechanism to try for whom ([`may_try_kerberos`]), whom to ask for tickets ([`Kdc`]), what the domain's and the
//! host's refusals mean ([`AuthError`], [`ticket_refusal`]), and calls into the library that leave neither secrets in
//! logs nor panics in the process ([`guarded`]). It is in one place so that a host is not reached by Kerberos for
//! control and by NTLM, or not at all, for data.
//!
//! What comes from the network is hostile: answers are bounded in bytes and time, DER is read within what is there.

mod account;
pub mod der;
mod error;
mod guard;
mod kdc;
mod mit;

pub use account::{may_try_kerberos, split_user};
pub use error::{AuthError, kerberos_error, one_line, ticket_refusal};
pub use guard::guarded;
pub use kdc::{Kdc, kdc_url};
