//! The agent: a service on the host that tells which blocks of a disk changed, and streams them over HTTPS.

pub mod provider;
